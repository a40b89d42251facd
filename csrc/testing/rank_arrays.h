// SPDX-License-Identifier: Apache-2.0
// One rank's operands and results in a device's memory, simulated or real, for one problem: what
// the kernels are given, and how their results compare with the CPU backend's, bit by bit.
#ifndef JAX_EP_CSRC_TESTING_RANK_ARRAYS_H_
#define JAX_EP_CSRC_TESTING_RANK_ARRAYS_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "csrc/core/kernel_params.h"
#include "csrc/testing/cluster.h"

namespace jax_ep {

// Copies between the host and one rank's memory.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual void write(void* to, const void* from, size_t bytes) = 0;
  virtual void read(void* to, const void* from, size_t bytes) = 0;
};

// An exchange among all ranks with what the CPU backend makes of it.
struct Problem {
  explicit Problem(const ClusterOptions& options,
                   RowFormat x_format = RowFormat::kDType,
                   RowFormat rows_format = RowFormat::kDType);

  Cluster cluster;
  RowFormat x_format;
  RowFormat rows_format;
  bool ok;  // the CPU backend ran it
};

class RankArrays {
 public:
  // Places the rank's arrays from `memory` on. The problem must outlive the object.
  RankArrays(Problem& problem, int32_t rank, std::byte* memory);

  // Bytes that the arrays take.
  [[nodiscard]] size_t bytes() const { return bytes_; }
  // Writes all operands but those that earlier operations make, and marks results as untouched.
  void upload(DeviceMemory& memory) const;

  // Has the program say that it runs on another rank.
  void replace_rank(DeviceMemory& memory, int32_t said) const;
  // Writes a handle that no plan made: zeros, as a carry starts with, repetitions, holes, or
  // anything.
  void replace_handle(DeviceMemory& memory, uint32_t seed) const;

  [[nodiscard]] PlanParams plan(const RankView& view) const;
  [[nodiscard]] DispatchParams dispatch(const RankView& view) const;
  [[nodiscard]] CombineParams combine(const RankView& view) const;

  // What is wrong with the results of an operation; empty if nothing is.
  [[nodiscard]] std::string check_plan(DeviceMemory& memory) const;
  [[nodiscard]] std::string check_dispatch(DeviceMemory& memory) const;
  [[nodiscard]] std::string check_combine(DeviceMemory& memory) const;
  // The same where the group had been closed before.
  [[nodiscard]] std::string check_poisoned(OpKind op, DeviceMemory& memory) const;

 private:
  template <typename T>
  T* place(size_t count);
  [[nodiscard]] RankBuffers& buffers() const { return problem_.cluster.rank(rank_); }
  [[nodiscard]] const ClusterOptions& options() const { return problem_.cluster.options(); }
  [[nodiscard]] std::vector<int32_t> expected_source_slot() const;

  Problem& problem_;
  int32_t rank_;
  std::byte* memory_;
  size_t bytes_ = 0;

  std::vector<std::byte> x_;  // as uploaded
  std::vector<float> x_scales_;
  std::vector<std::byte> expected_rows_;
  std::vector<float> expected_scales_;

  int32_t* program_rank_on_device_;
  int32_t* topk_idx_;
  int32_t* slot_;
  int32_t* row_source_;
  int32_t* row_topk_idx_;
  int32_t* source_slot_;
  int32_t* group_sizes_;
  int32_t* tokens_per_expert_;
  int32_t* num_dropped_;
  std::byte* x_on_device_;
  float* x_scales_on_device_;
  float* token_scalars_;
  std::byte* rows_;
  float* rows_scales_;
  float* row_scalars_;
  std::byte* y_;
  float* weights_;
  std::byte* out_;
  float* returned_scalars_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_RANK_ARRAYS_H_
