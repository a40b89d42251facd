// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_HUGE_PAGES_H_
#define JAX_EP_CSRC_CPU_HUGE_PAGES_H_

#include <cstdint>

namespace jax_ep {

// Asks the kernel to back what of this memory has no pages yet with huge ones; only advice, and
// nothing where there are none. For results that are about to be written for the first time: XLA
// allocates large ones anew for every execution, and then most of an operation's time goes into
// page faults, one for each 4 KiB. The contents stay as they are, and so does who owns the memory.
void advise_huge_pages(void* memory, int64_t bytes);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_HUGE_PAGES_H_
