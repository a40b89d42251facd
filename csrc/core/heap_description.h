// SPDX-License-Identifier: Apache-2.0
// The table of heap_layout.h in words, for people: messages, introspection and documents.
#ifndef JAX_EP_CSRC_CORE_HEAP_DESCRIPTION_H_
#define JAX_EP_CSRC_CORE_HEAP_DESCRIPTION_H_

#include <array>
#include <cstdint>
#include <string>

#include "csrc/core/heap_layout.h"
#include "csrc/core/status.h"

namespace jax_ep {

// Every region of a heap, in the order in which they lie in it.
std::array<RegionInfo, kNumRegions> heap_regions(const HeapShape& shape);

// InvalidArgument unless check_shape takes these sizes and the kernels are written for them, of its
// network heap too; names the size and what is allowed.
Status check_heap_shape(const HeapShape& shape);

// "12.5 GiB", "3.0 MiB", "640 bytes".
std::string bytes_text(int64_t bytes);

// Bytes of each rank's heap, and of its network heap, if there are several domains.
int64_t heap_bytes(const HeapShape& shape);

// What takes most of a heap, largest first, and what to lower, for example
// "rows 3.5 GiB (bytes [R, max_tokens, row_stride]), ..; lower max_tokens_per_rank (4096) or hidden
// (7168)".
std::string heap_needs(const HeapShape& shape);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_HEAP_DESCRIPTION_H_
