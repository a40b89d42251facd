// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_RENDEZVOUS_RANK_LIST_H_
#define JAX_EP_CSRC_CPU_RENDEZVOUS_RANK_LIST_H_

#include <cstdint>
#include <span>
#include <string>

namespace jax_ep {

// Ascending ranks for a message: "0,1,4-7".
std::string format_ranks(std::span<const int32_t> ranks);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_RENDEZVOUS_RANK_LIST_H_
