// SPDX-License-Identifier: Apache-2.0
// All chance in a run: one generator, and the habits that a seed draws from it.
#ifndef JAX_EP_CSRC_SIM_SCHEDULE_PROFILE_H_
#define JAX_EP_CSRC_SIM_SCHEDULE_PROFILE_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace jax_ep::sim {

// SplitMix64. Of our own, so that a seed means the same with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed = 0) : state_(seed) {}

  uint64_t next() {
    state_ += 0x9e3779b97f4a7c15;
    uint64_t z = (state_ ^ (state_ >> 30)) * 0xbf58476d1ce4e5b9;
    z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
    return z ^ (z >> 31);
  }
  // In [0, n); 0 if n is 0.
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(((next() >> 32) * n) >> 32); }
  bool chance(uint32_t numerator, uint32_t denominator) { return below(denominator) < numerator; }
  template <std::size_t N>
  uint32_t one_of(const uint32_t (&values)[N]) {
    return values[below(N)];
  }

 private:
  uint64_t state_;
};

// How a seed misbehaves. Extremes matter more than averages: a run in which one rank is starved,
// or in which every store is late, finds what a fair run does not.
struct ScheduleProfile {
  uint32_t burst = 1;         // the most primitives that a thread runs before others may
  uint32_t stay = 1;          // the most picks in one block before another may be chosen
  uint32_t late = 0;          // chance in 8 that a store becomes visible late
  uint32_t max_delay = 1;     // and by how many primitives at most
  uint32_t copy_lag = 2;      // a copy engine acts about once per this many picks
  uint32_t speed_period = 1;  // picks between changes of the blocks' relative speeds

  static ScheduleProfile draw(Random& random) {
    ScheduleProfile profile;
    profile.burst = random.one_of({1, 8, 64, 1024});
    profile.stay = random.one_of({1, 64, 1024});
    profile.late = random.one_of({0, 1, 4, 7});
    profile.max_delay = random.one_of({64, 4096, 1 << 18});
    profile.copy_lag = random.one_of({2, 16, 256});
    profile.speed_period = random.one_of({500, 5000, 50000});
    return profile;
  }

  std::string text() const {
    return "bursts of " + std::to_string(burst) + ", stays " + std::to_string(stay) + ", " +
           std::to_string(late) + "/8 of stores late by up to " + std::to_string(max_delay) +
           ", copies every " + std::to_string(copy_lag) + ", speeds change every " +
           std::to_string(speed_period);
  }
};

}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_SIM_SCHEDULE_PROFILE_H_
