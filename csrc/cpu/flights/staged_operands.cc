// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/flights/staged_operands.h"

#include <algorithm>
#include <new>

namespace jax_ep {
namespace {

// Of each array, as XLA aligns its own.
constexpr size_t kAlignment = 64;

size_t padded(size_t num_bytes) { return (num_bytes + kAlignment - 1) / kAlignment * kAlignment; }

}  // namespace

StagedOperands::StagedOperands(std::span<const OperandView> operands) {
  size_t total = 0;
  for (const OperandView& operand : operands) total += padded(operand.bytes.size());
  bytes_.reset(static_cast<std::byte*>(::operator new(total, std::align_val_t{kAlignment})));
  std::byte* at = bytes_.get();
  for (const OperandView& operand : operands) {
    std::copy(operand.bytes.begin(), operand.bytes.end(), at);
    dims_.emplace_back(operand.dims.begin(), operand.dims.end());
    views_.push_back({operand.dtype, dims_.back(), {at, operand.bytes.size()}});
    at += padded(operand.bytes.size());
  }
}

void StagedOperands::Free::operator()(std::byte* bytes) const {
  ::operator delete(bytes, std::align_val_t{kAlignment});
}

}  // namespace jax_ep
