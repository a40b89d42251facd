// SPDX-License-Identifier: Apache-2.0
// What a rank brings to the first half of an exchange, kept for the second one.
#ifndef JAX_EP_CSRC_CPU_FLIGHTS_STAGED_OPERANDS_H_
#define JAX_EP_CSRC_CPU_FLIGHTS_STAGED_OPERANDS_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

namespace jax_ep {

// An array that belongs to somebody else.
struct OperandView {
  int32_t dtype = 0;  // as the layer above numbers them
  std::span<const int64_t> dims;
  std::span<const std::byte> bytes;
};

// Copies of a rank's operands: those of its first half may be gone when that has returned.
class StagedOperands {
 public:
  explicit StagedOperands(std::span<const OperandView> operands);

  // The copies, in the order in which they were given.
  [[nodiscard]] std::span<const OperandView> views() const { return views_; }

 private:
  struct Free {
    void operator()(std::byte* bytes) const;
  };

  std::unique_ptr<std::byte, Free> bytes_;
  std::vector<std::vector<int64_t>> dims_;
  std::vector<OperandView> views_;
};

using StagedOperandsPtr = std::shared_ptr<const StagedOperands>;

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_FLIGHTS_STAGED_OPERANDS_H_
