// SPDX-License-Identifier: Apache-2.0
// What is expected of a litmus program over many seeds.
#ifndef JAX_EP_CSRC_SIM_TESTS_OUTCOMES_H_
#define JAX_EP_CSRC_SIM_TESTS_OUTCOMES_H_

#include <gtest/gtest.h>

#include "csrc/sim/tests/litmus.h"

namespace jax_ep::sim {

inline constexpr uint64_t kSeeds = 100;

enum class Outcome {
  kOrdered,  // the weak outcome is never seen, and no race is reported
  kRacy,     // the weak outcome is seen with some seed, and every seed reports the race
  kHidden,   // a race that every seed reports, though values never show it
  kWeak,     // no race, but the weak outcome is seen: the program is defined to allow it
};

// What the kernels saw.
struct Seen {
  u32 a, b, c, d;
};
inline Seen seen;
inline Litmus* litmus;  // that runs

inline Ptr<u32> word(u32 rank, u32 i) { return litmus->word(rank, i); }
inline LitmusShared& block_words() { return dev::shared<LitmusShared>(); }

inline void expect(Outcome outcome,
                   const std::function<bool()>& weak,
                   const std::vector<LitmusKernel>& kernels,
                   const Config& config = litmus_config()) {
  Config values = config;
  values.check_races = false;
  Litmus with_races(config);
  Litmus with_values(values);
  uint64_t weak_seen = 0;
  uint64_t races = 0;
  for (uint64_t seed = 1; seed <= kSeeds; ++seed) {
    litmus = &with_values;
    seen = {};
    const Report by_value = litmus->run(seed, kernels);
    ASSERT_TRUE(by_value.ok()) << by_value.text();
    weak_seen += weak();
    litmus = &with_races;
    seen = {};
    const Report report = litmus->run(seed, kernels);
    ASSERT_TRUE(report.ok() || report.kind == "race") << report.text();
    races += !report.ok();
  }
  const bool racy = outcome == Outcome::kRacy || outcome == Outcome::kHidden;
  const bool shows = outcome == Outcome::kRacy || outcome == Outcome::kWeak;
  EXPECT_EQ(races, racy ? kSeeds : 0);
  EXPECT_EQ(weak_seen > 0, shows) << weak_seen << " of " << kSeeds;
}

// Rank 0 sends 7 in word 0 of rank 1, then a flag in word 1; the weak outcome: rank 1 misses it.
inline void expect_message(Outcome outcome,
                           const std::function<void()>& send,
                           const std::function<void()>& receive) {
  expect(outcome, [] { return seen.a != 7; }, {[=](Who who) {
           if (who.is(0)) send();
           if (who.is(1)) receive();
         }});
}
inline void receive() {
  wait_acquire(word(1, 1), 1);
  seen.a = dev::ld(word(1, 0));
}

}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_SIM_TESTS_OUTCOMES_H_
