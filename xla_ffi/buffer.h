// SPDX-License-Identifier: Apache-2.0
// Checks of FFI buffers, with messages that name the buffer, what came and what was expected.
// (ffi::Verify does this from jaxlib 0.11.2 on; the headers of 0.10.2 lack it.)
#ifndef JAX_EP_XLA_FFI_BUFFER_H_
#define JAX_EP_XLA_FFI_BUFFER_H_

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "csrc/core/dtype.h"
#include "csrc/core/ops.h"
#include "csrc/core/status.h"
#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// A dimension of any size.
inline constexpr int64_t kAny = -1;

// An FFI buffer and the name it has in messages.
class Buffer {
 public:
  // One that the call does not have.
  explicit Buffer(std::string_view name) : name_(name) {}
  Buffer(std::string_view name, xla::ffi::AnyBuffer buffer) : name_(name), buffer_(buffer) {}

  // InvalidArgument unless the buffer has this dtype and these dimensions; kAny fits any size.
  [[nodiscard]] Status check(xla::ffi::DataType dtype, std::initializer_list<int64_t> dims) const;
  // The same, for one of the dtypes that token rows may have.
  [[nodiscard]] Status check_rows(std::initializer_list<int64_t> dims, DType& dtype) const;
  // The same, for token rows of this dtype, or quantized ones.
  [[nodiscard]] Status check_rows_or_fp8(DType dtype,
                                         std::initializer_list<int64_t> dims,
                                         RowFormat& format) const;

  // An operand that an op can do without is passed as an array of shape [0].
  [[nodiscard]] bool absent() const {
    return !buffer_.has_value() || (dims().size() == 1 && dims()[0] == 0);
  }
  // Size of a dimension; 0 where the buffer has fewer.
  [[nodiscard]] int64_t dim(size_t i) const { return i < dims().size() ? dims()[i] : 0; }
  template <typename T>
  [[nodiscard]] T* data() const {
    return buffer_.has_value() ? static_cast<T*>(buffer_->untyped_data()) : nullptr;
  }

 private:
  [[nodiscard]] xla::ffi::Span<const int64_t> dims() const {
    return buffer_.has_value() ? xla::ffi::Span<const int64_t>(buffer_->dimensions())
                               : xla::ffi::Span<const int64_t>();
  }
  [[nodiscard]] bool has_dims(std::initializer_list<int64_t> dims) const;
  [[nodiscard]] Status mismatch(std::string_view dtype, std::initializer_list<int64_t> dims) const;

  std::string_view name_;
  std::optional<xla::ffi::AnyBuffer> buffer_;
};

// A call's operands: those that XLA passes, or what stands for them.
class Operands {
 public:
  Operands(const xla::ffi::RemainingArgs& args);  // NOLINT(google-explicit-constructor)
  explicit Operands(std::vector<xla::ffi::AnyBuffer> buffers) : buffers_(std::move(buffers)) {}

  [[nodiscard]] size_t size() const { return buffers_.size(); }
  [[nodiscard]] const xla::ffi::AnyBuffer& operator[](size_t i) const { return buffers_[i]; }

 private:
  std::vector<xla::ffi::AnyBuffer> buffers_;
};

// Hands out a call's operands and results one by one, in the order of the target's. A call that has
// none left gives buffers that are not there, and finish() says so.
class BufferReader {
 public:
  BufferReader(const Operands& operands, const xla::ffi::RemainingRets& results)
      : operands_(operands), results_(results) {}

  [[nodiscard]] Buffer operand(std::string_view name);
  // One more, if the call has one more; of results likewise.
  [[nodiscard]] Buffer last_operand(std::string_view name);
  [[nodiscard]] Buffer result(std::string_view name);
  [[nodiscard]] Buffer last_result(std::string_view name);
  // InvalidArgument if there are more or fewer operands or results than were read.
  [[nodiscard]] Status finish() const;

 private:
  const Operands& operands_;
  const xla::ffi::RemainingRets& results_;
  size_t num_operands_ = 0;
  size_t num_results_ = 0;
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_BUFFER_H_
