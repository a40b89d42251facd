// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_XLA_FFI_CUDA_TRACE_RANGE_H_
#define JAX_EP_XLA_FFI_CUDA_TRACE_RANGE_H_

#include <cstdint>
#include <string_view>

namespace jax_ep {

// What profilers show of a handler: a range of its thread in NVTX's domain "jax_ep", such as
// `jax_ep.dispatch[EpGroup 0 (axis 'expert', 8 ranks)]`, or `jax_ep.dispatch` of a group that is
// not open. It lasts as long as the object, on whatever way the handler returns. Where no tool is
// attached it is a branch; where the build found no NVTX, nothing.
class TraceRange {
 public:
  TraceRange(std::string_view operation, int64_t group_id);
  ~TraceRange();
  TraceRange(const TraceRange&) = delete;
  TraceRange& operator=(const TraceRange&) = delete;
};

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_CUDA_TRACE_RANGE_H_
