// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/buffer.h"

#include <algorithm>

namespace jax_ep {
namespace {

using xla::ffi::DataType;

std::string dtype_name(DataType dtype) {
  switch (dtype) {
    case DataType::F32: return "float32";
    case DataType::BF16: return "bfloat16";
    case DataType::F16: return "float16";
    case DataType::F64: return "float64";
    case DataType::S32: return "int32";
    case DataType::S64: return "int64";
    case DataType::F8E4M3FN: return "float8_e4m3fn";
    case DataType::PRED: return "bool";
    default: return "XLA type " + std::to_string(static_cast<int>(dtype));
  }
}

template <typename Dims>
std::string dims_text(const Dims& dims) {
  std::string text = "[";
  for (const int64_t dim : dims) {
    if (text.size() > 1) text += ", ";
    text += dim == kAny ? "any" : std::to_string(dim);
  }
  return text + "]";
}

}  // namespace

bool Buffer::has_dims(std::initializer_list<int64_t> dims) const {
  const auto got = this->dims();
  return std::equal(
      got.begin(), got.end(), dims.begin(), dims.end(), [](int64_t have, int64_t want) {
        return want == kAny || have == want;
      });
}

Status Buffer::mismatch(std::string_view dtype, std::initializer_list<int64_t> dims) const {
  const std::string got = buffer_.has_value()
                              ? dtype_name(buffer_->element_type()) + dims_text(this->dims())
                              : "not an array";
  return Status::invalid_argument("buffer '" + std::string(name_) + "' is " + got + "; expected " +
                                  std::string(dtype) + dims_text(dims));
}

Status Buffer::check(DataType dtype, std::initializer_list<int64_t> dims) const {
  if (buffer_.has_value() && buffer_->element_type() == dtype && has_dims(dims)) return {};
  return mismatch(dtype_name(dtype), dims);
}

Status Buffer::check_rows(std::initializer_list<int64_t> dims, DType& dtype) const {
  if (!buffer_.has_value()) return mismatch("float32, bfloat16 or float16", dims);
  switch (buffer_->element_type()) {
    case DataType::F32: dtype = DType::kFloat32; break;
    case DataType::BF16: dtype = DType::kBFloat16; break;
    case DataType::F16: dtype = DType::kFloat16; break;
    default: return mismatch("float32, bfloat16 or float16", dims);
  }
  if (has_dims(dims)) return {};
  return mismatch(name(dtype), dims);
}

Status Buffer::check_rows_or_fp8(DType dtype,
                                 std::initializer_list<int64_t> dims,
                                 RowFormat& format) const {
  const auto allowed = [&] { return std::string(name(dtype)) + " or float8_e4m3fn"; };
  if (!buffer_.has_value()) return mismatch(allowed(), dims);
  if (buffer_->element_type() == DataType::F8E4M3FN) {
    format = RowFormat::kFloat8E4M3;
    return check(DataType::F8E4M3FN, dims);
  }
  format = RowFormat::kDType;
  DType got;
  if (const Status status = check_rows(dims, got); status.ok() && got == dtype) return {};
  return mismatch(allowed(), dims);
}

Operands::Operands(const xla::ffi::RemainingArgs& args) {
  for (size_t i = 0; i < args.size(); ++i) {
    // All operands of our targets are arrays.
    buffers_.push_back(args.get<xla::ffi::AnyBuffer>(i).value());
  }
}

Buffer BufferReader::operand(std::string_view name) {
  const size_t i = num_operands_++;
  return i < operands_.size() ? Buffer(name, operands_[i]) : Buffer(name);
}

Buffer BufferReader::last_operand(std::string_view name) {
  return num_operands_ < operands_.size() ? operand(name) : Buffer(name);
}

Buffer BufferReader::result(std::string_view name) {
  const size_t i = num_results_++;
  if (i >= results_.size()) return Buffer(name);
  auto buffer = results_.get<xla::ffi::AnyBuffer>(i);
  return buffer.has_value() ? Buffer(name, **buffer) : Buffer(name);
}

Buffer BufferReader::last_result(std::string_view name) {
  return num_results_ < results_.size() ? result(name) : Buffer(name);
}

Status BufferReader::finish() const {
  if (num_operands_ == operands_.size() && num_results_ == results_.size()) return {};
  return Status::invalid_argument("the call has " + std::to_string(operands_.size()) +
                                  " operands and " + std::to_string(results_.size()) +
                                  " results; expected " + std::to_string(num_operands_) + " and " +
                                  std::to_string(num_results_));
}

}  // namespace jax_ep
