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
  const auto got = buffer_.dimensions();
  return std::equal(
      got.begin(), got.end(), dims.begin(), dims.end(), [](int64_t have, int64_t want) {
        return want == kAny || have == want;
      });
}

Status Buffer::mismatch(std::string_view dtype, std::initializer_list<int64_t> dims) const {
  return Status::invalid_argument(
      "buffer '" + std::string(name_) + "' is " + dtype_name(buffer_.element_type()) +
      dims_text(buffer_.dimensions()) + "; expected " + std::string(dtype) + dims_text(dims));
}

Status Buffer::check(DataType dtype, std::initializer_list<int64_t> dims) const {
  if (buffer_.element_type() == dtype && has_dims(dims)) return {};
  return mismatch(dtype_name(dtype), dims);
}

Status Buffer::check_rows(std::initializer_list<int64_t> dims, DType& dtype) const {
  switch (buffer_.element_type()) {
    case DataType::F32: dtype = DType::kFloat32; break;
    case DataType::BF16: dtype = DType::kBFloat16; break;
    case DataType::F16: dtype = DType::kFloat16; break;
    default: return mismatch("float32, bfloat16 or float16", dims);
  }
  if (has_dims(dims)) return {};
  return mismatch(name(dtype), dims);
}

}  // namespace jax_ep
