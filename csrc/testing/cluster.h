// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_TESTING_CLUSTER_H_
#define JAX_EP_CSRC_TESTING_CLUSTER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <ostream>
#include <random>
#include <string>
#include <vector>

#include "csrc/cpu/calls.h"
#include "csrc/testing/reference.h"

namespace jax_ep {

// Values that outputs hold before an operation, to see what it leaves alone.
inline constexpr int32_t kUntouched = -1'234'567;
inline constexpr std::byte kUntouchedByte{0xA5};

struct ClusterOptions {
  EpShape shape;
  int64_t hidden = 8;
  DType dtype = DType::kFloat32;
  Wire wire = Wire::kSame;
  bool zero_fill = true;
  bool scalars = true;
  bool weighted = true;
  bool row_weights = false;  // dispatch multiplies rows
  bool row_dots = false;     // dispatch takes dot products with y
  int32_t domain_size = 0;   // of combine
  uint32_t seed = 1;
  // A rank without tokens, whose experts nobody selects; -1: none.
  int32_t absent_rank = -1;
  // The same of several, as bits, that make the calls all the same and say so: their results are
  // empty.
  uint64_t sitting_out = 0;
  bool masked = false;  // the call has a mask of ranks also if all take part

  [[nodiscard]] bool takes_part(int32_t rank) const {
    return rank != absent_rank && (sitting_out >> rank & 1) == 0;
  }
};

// For test names and messages: "R3_E6_K2_T5_C40_a4_expert_H7_bfloat16".
std::string describe(const ClusterOptions& options);
inline std::ostream& operator<<(std::ostream& stream, const ClusterOptions& options) {
  return stream << describe(options);
}

// Rows the receive buffers need so that nothing is dropped.
int64_t worst_case_capacity(const EpShape& shape);

// One rank's buffers.
struct RankBuffers {
  std::vector<int32_t> topk_idx, slot, row_source, row_topk_idx, group_sizes, tokens_per_expert;
  int32_t num_dropped = kUntouched;
  std::vector<std::byte> x, rows;  // dispatch: in, out
  std::vector<float> token_scalars, row_scalars;
  std::vector<float> row_weights, row_dots;  // dispatch: in, out
  std::vector<std::byte> y, out;             // combine: in, out; dispatch: y, too
  std::vector<float> weights;                // combine: in, and as row scalars
  std::vector<float> returned_scalars;       // combine: out
};

// The buffers of all ranks of one problem, with random routing and values, and the calls on them.
// A buffer has exactly the size that its operation may touch, for the address sanitizer.
class Cluster {
 public:
  explicit Cluster(const ClusterOptions& options);

  std::vector<Call> plan_calls();
  std::vector<Call> dispatch_calls();
  std::vector<Call> combine_calls();
  // Each runs its operation on all ranks' buffers.
  Status plan();
  Status dispatch();
  Status combine();

  [[nodiscard]] const ClusterOptions& options() const { return options_; }
  std::vector<RankBuffers>& ranks() { return ranks_; }
  RankBuffers& rank(int32_t index) { return ranks_[static_cast<size_t>(index)]; }

  // All ranks' copies of a buffer, for the reference.
  template <typename T>
  [[nodiscard]] reference::PerRank<T> all(std::vector<T> RankBuffers::* buffer) const {
    reference::PerRank<T> result;
    for (const RankBuffers& rank : ranks_) result.push_back(rank.*buffer);
    return result;
  }
  // The same of a buffer of rows, as float32.
  [[nodiscard]] reference::PerRank<float> all(std::vector<std::byte> RankBuffers::* rows) const;
  // The plan in the ranks' buffers.
  [[nodiscard]] reference::Plan planned() const;

  // The values of a buffer of rows.
  [[nodiscard]] std::vector<float> decode(const std::vector<std::byte>& rows) const;
  // A buffer of rows with these values, rounded to the dtype.
  [[nodiscard]] std::vector<std::byte> encode(const std::vector<float>& values) const;

 private:
  void choose_experts(RankBuffers& rank);
  std::vector<float> random_floats(int64_t size);

  ClusterOptions options_;
  std::mt19937 random_;
  std::vector<RankBuffers> ranks_;
  std::unique_ptr<WorkerPool> workers_ = std::make_unique<WorkerPool>(2);
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_CLUSTER_H_
