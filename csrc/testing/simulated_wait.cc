// SPDX-License-Identifier: Apache-2.0
#include "csrc/device/wait.h"
#include "csrc/testing/simulated_kernel.h"

namespace jax_ep {

SimulatedKernel simulated_wait(const RankView& view, int32_t peer) {
  const auto body = [view, peer] {
    using namespace dev;  // NOLINT(google-build-using-namespace)
    if (thread_id() != 0) return;
    const u64 start = now_ns();
    const Ptr<u32> word = acknowledged(view, Channel::kHighThroughput, view.rank, peer);
    const auto done = [&](u32 seen) {
      if (seen != 0) return true;
      while (now_ns() <= start + view.timeout_ns) spin_pause("the deadline to pass");
      st_relaxed<Scope::kSys>(word, 1);
      return false;
    };
    (void)wait_until<Scope::kSys>(
        view, word, done, {WaitTag::kAcknowledged, OpKind::kPlan, peer, 1, 0}, "acknowledged");
  };
  return {32, 0, body};
}

}  // namespace jax_ep
