// SPDX-License-Identifier: Apache-2.0
// One rank's operands and results in a device's memory, simulated or real: where each lies, and the
// kernels' parameters that name them. What they hold is for others to say.
#ifndef JAX_EP_CSRC_TESTING_KERNEL_ARRAYS_H_
#define JAX_EP_CSRC_TESTING_KERNEL_ARRAYS_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "csrc/core/kernel_params.h"

namespace jax_ep {

// What the operations of one exchange are told, but for the arrays.
struct ExchangeSizes {
  EpShape shape;
  int64_t hidden = 0;
  int32_t num_scalars = 0;
  int32_t domain_size = 0;  // of combine
  DType dtype = DType::kFloat32;
  Wire wire = Wire::kSame;
  RowFormat x_format = RowFormat::kDType;
  RowFormat rows_format = RowFormat::kDType;
  bool zero_fill = true;
  bool weighted = true;
  bool row_weights = false;  // dispatch multiplies rows
  bool row_dots = false;     // dispatch takes dot products with y
  bool masked = false;       // there is a rank_mask
  // Combine reads what dispatch has written.
  bool y_is_rows = false;
  bool weights_are_row_scalars = false;
};

// The letters of the shapes are those of csrc/core/ops.h. An array that an operation can do without
// is empty.
class KernelArrays {
 public:
  // Places the arrays from `memory` on, as far apart as XLA's buffers.
  KernelArrays(const ExchangeSizes& sizes, std::byte* memory);

  // Bytes that the arrays take.
  [[nodiscard]] size_t bytes() const { return bytes_; }
  // One more array, behind the others.
  template <typename T>
  std::span<T> place(int64_t count) {
    T* const at = reinterpret_cast<T*>(memory_ + bytes_);
    bytes_ += static_cast<size_t>(align_up(count * int64_t{sizeof(T)}, kAlignment));
    return {at, static_cast<size_t>(count)};
  }

  [[nodiscard]] PlanParams plan(const RankView& view) const;
  [[nodiscard]] DispatchParams dispatch(const RankView& view) const;
  [[nodiscard]] CombineParams combine(const RankView& view) const;
  [[nodiscard]] PlanDispatchParams plan_dispatch(const RankView& view) const;

  std::span<int32_t> program_rank;  // [1]
  std::span<int32_t> topk_idx;
  std::span<uint8_t> rank_mask;  // to whole words
  std::span<int32_t> slot;
  std::span<int32_t> row_source;
  std::span<int32_t> row_topk_idx;
  std::span<int32_t> source_slot;
  std::span<int32_t> group_sizes;
  std::span<int32_t> tokens_per_expert;
  std::span<int32_t> num_dropped;
  std::span<std::byte> x;  // bytes; and so are rows, y and out
  std::span<float> x_scales;
  std::span<float> token_scalars;
  std::span<std::byte> rows;
  std::span<float> rows_scales;
  std::span<float> row_scalars;
  std::span<float> row_weights;
  std::span<float> row_dots;
  std::span<std::byte> y;
  std::span<float> weights;  // combine's row scalars too
  std::span<std::byte> out;
  std::span<float> returned_scalars;
  std::span<uint32_t> tickets;  // [kMaxFlights, kTicketWords], of exchanges in halves

  static constexpr int64_t kMaxFlights = 2;

 private:
  static constexpr int64_t kAlignment = 256;  // as XLA's buffers have

  template <typename Op>
  [[nodiscard]] KernelParams<Op> params(const RankView& view, const Op& op) const {
    KernelParams<Op> params{
        .view = view, .call_tag = 0, .program_rank = program_rank.data(), .op = op};
    params.view.rank_mask = rank_mask_of(op);
    return params;
  }

  ExchangeSizes sizes_;
  std::byte* memory_;
  size_t bytes_ = 0;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_KERNEL_ARRAYS_H_
