// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_CHUNKS_H_
#define JAX_EP_CSRC_CPU_CHUNKS_H_

#include <algorithm>
#include <cstdint>

namespace jax_ep {

// Memory traffic of one unit of parallel work: about 20 us, a few times what it costs to wake a
// sleeping thread. So work of one unit or less runs on the caller alone.
inline constexpr int64_t kChunkBytes = 256 * 1024;

// Items per unit, for parallel_for, where each moves about this many bytes.
constexpr int64_t items_per_chunk(int64_t bytes_per_item) {
  return std::max<int64_t>(kChunkBytes / std::max<int64_t>(bytes_per_item, 1), 1);
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_CHUNKS_H_
