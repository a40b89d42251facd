// SPDX-License-Identifier: Apache-2.0
// Who is where: the ranks of a group, the domains that they form, and the experts that they host.
#ifndef JAX_EP_CSRC_CORE_TOPOLOGY_H_
#define JAX_EP_CSRC_CORE_TOPOLOGY_H_

#include <cstdint>

namespace jax_ep {

// The rank that hosts an expert: each hosts as many, in the order of the ranks.
constexpr int32_t owner_of(int32_t expert, int32_t num_local_experts) {
  return expert / num_local_experts;
}

// Ranks of one scale-up domain (NVLink) map each other's memory; between domains there is a network
// (RDMA). All domains have as many ranks, which follow each other.
struct Topology {
  int32_t num_scaleup_ranks = 1;   // of a domain
  int32_t num_scaleout_ranks = 1;  // domains

  [[nodiscard]] constexpr int32_t num_ranks() const {
    return num_scaleup_ranks * num_scaleout_ranks;
  }
  [[nodiscard]] constexpr int32_t domain_of(int32_t rank) const { return rank / num_scaleup_ranks; }
  [[nodiscard]] constexpr int32_t index_in_domain(int32_t rank) const {
    return rank % num_scaleup_ranks;
  }
  [[nodiscard]] constexpr int32_t rank_at(int32_t domain, int32_t index) const {
    return domain * num_scaleup_ranks + index;
  }
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_TOPOLOGY_H_
