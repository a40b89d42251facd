// SPDX-License-Identifier: Apache-2.0
// How long kernels wait, from what users say in seconds; what they get where they say nothing is in
// jax_ep/_src/groups/deadlines.py.
#ifndef JAX_EP_CSRC_CORE_WAIT_TIMES_H_
#define JAX_EP_CSRC_CORE_WAIT_TIMES_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace jax_ep {

// Nanoseconds; infinity, and what is longer than 73 years, is 2^61, twice of which is still a
// signed number.
inline uint64_t to_wait_ns(double seconds) {
  constexpr double kLongest = static_cast<double>(uint64_t{1} << 61);
  return static_cast<uint64_t>(std::min(std::ceil(seconds * 1e9), kLongest));
}

// When a kernel reports a wait to its host first; it reports again after twice, four times ... as
// long. Soon, for a group's health, and so that one of the reports comes exactly after
// `warn_after`.
inline double first_report_s(double warn_after_s) {
  if (std::isinf(warn_after_s)) return 1;
  double seconds = warn_after_s;
  while (seconds > 1) seconds /= 2;
  return seconds;
}

// How long a wait had taken at its report of a level.
inline double waited_s(double first_report_seconds, uint32_t level) {
  return std::ldexp(first_report_seconds, static_cast<int>(level) - 1);
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_WAIT_TIMES_H_
