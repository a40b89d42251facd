// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/huge_pages.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace jax_ep {

#ifdef __linux__

void advise_huge_pages(void* memory, int64_t bytes) {
  constexpr uintptr_t kHugePage = 2 * 1024 * 1024;
  const auto begin = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t first = (begin + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t last = (begin + static_cast<uintptr_t>(bytes)) / kHugePage * kHugePage;
  if (bytes <= 0 || first >= last) return;
  // Whole huge pages inside: neighbors of the memory are nobody's but their owners'. A kernel
  // without huge pages refuses, which changes nothing.
  (void)madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);
}

#else

void advise_huge_pages(void* /*memory*/, int64_t /*bytes*/) {}

#endif

}  // namespace jax_ep
