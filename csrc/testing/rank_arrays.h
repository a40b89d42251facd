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
#include "csrc/testing/kernel_arrays.h"

namespace jax_ep {

// Copies between the host and one rank's memory.
class DeviceMemory {
 public:
  virtual ~DeviceMemory() = default;
  virtual void write(void* to, const void* from, size_t bytes) = 0;
  virtual void read(void* to, const void* from, size_t bytes) = 0;
  virtual void fill(void* to, std::byte with, size_t bytes) = 0;
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
  [[nodiscard]] size_t bytes() const { return arrays_.bytes(); }
  // Writes all operands but those that earlier operations make, and marks results as untouched.
  void upload(DeviceMemory& memory) const;

  // What an operation writes, all of it but `rows` and `rows_scales`, of which it may leave some.
  [[nodiscard]] std::vector<std::span<std::byte>> results_of(OpKind op) const;
  // Marks these two as untouched.
  void mark_rows(DeviceMemory& memory) const;
  // Whether it is of the exchanges that are in halves, and whether this half of it writes results.
  // What has no halves is all in the first.
  [[nodiscard]] bool has_halves(OpKind op, const RankView& view) const;
  [[nodiscard]] bool writes_results(OpKind op, Half half, const RankView& view) const {
    return half != (has_halves(op, view) ? Half::kFirst : Half::kSecond);
  }

  // Has the program say that it runs on another rank.
  void replace_rank(DeviceMemory& memory, int32_t said) const;
  // Writes a handle that no plan made: zeros, as a carry starts with, repetitions, holes, or
  // anything.
  void replace_handle(DeviceMemory& memory, uint32_t seed) const;
  // Has the mask leave out these ranks, as bits, where there is one.
  void replace_mask(DeviceMemory& memory, uint64_t left_out) const;

  [[nodiscard]] PlanParams plan(const RankView& view) const { return arrays_.plan(view); }
  [[nodiscard]] DispatchParams dispatch(const RankView& view) const {
    return arrays_.dispatch(view);
  }
  [[nodiscard]] CombineParams combine(const RankView& view) const { return arrays_.combine(view); }
  [[nodiscard]] PlanDispatchParams plan_dispatch(const RankView& view) const {
    return arrays_.plan_dispatch(view);
  }

  // Where the first half of an exchange leaves its ticket.
  [[nodiscard]] uint32_t* ticket(int32_t flight) const {
    return arrays_.tickets.data() + flight * kTicketWords;
  }

  // What is wrong with the results of an operation; empty if nothing is.
  [[nodiscard]] std::string check_plan(DeviceMemory& memory) const;
  [[nodiscard]] std::string check_dispatch(DeviceMemory& memory) const;
  [[nodiscard]] std::string check_combine(DeviceMemory& memory) const;
  // The same where the group had been closed before.
  [[nodiscard]] std::string check_poisoned(OpKind op, DeviceMemory& memory) const;
  // The same of a first half.
  [[nodiscard]] std::string check_poisoned_ticket(int32_t flight, DeviceMemory& memory) const;

 private:
  [[nodiscard]] RankBuffers& buffers() const { return problem_.cluster.rank(rank_); }
  [[nodiscard]] const ClusterOptions& options() const { return problem_.cluster.options(); }
  [[nodiscard]] std::vector<int32_t> expected_source_slot() const;

  Problem& problem_;
  int32_t rank_;
  KernelArrays arrays_;

  std::vector<std::byte> x_;  // as uploaded
  std::vector<float> x_scales_;
  std::vector<std::byte> expected_rows_;
  std::vector<float> expected_scales_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_RANK_ARRAYS_H_
