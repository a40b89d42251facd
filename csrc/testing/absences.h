// SPDX-License-Identifier: Apache-2.0
// Exchanges of the kernels that leave out who does not come, on the simulator: some rank stays
// away, or ends in the middle, or comes late. Every result is compared with what the CPU backend
// makes of the ranks that were there.
#ifndef JAX_EP_CSRC_TESTING_ABSENCES_H_
#define JAX_EP_CSRC_TESTING_ABSENCES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "csrc/sim/machine.h"
#include "csrc/testing/cluster.h"

namespace jax_ep {

struct Absence {
  enum class Kind {
    kAway,     // does not come to the exchange, nor to later ones
    kKilled,   // ends in it, just before its `amount`-th store to others
    kLate,     // comes to it, and to later ones, when time has leapt `amount` times
    kBeats,    // does not come any more, but sends heartbeats in each of so many leaps
    kGivesUp,  // comes with an error of its program, and ends
    kElse,     // comes with another call, of which the others know nothing
  };
  int32_t rank;
  int32_t exchange;  // from 0
  Kind kind;
  uint64_t amount = 0;
};

struct AbsenceStory {
  ClusterOptions options;
  std::vector<OpKind> ops;  // the exchanges: kPlanDispatch or kCombine, the first a kPlanDispatch
  // Ranks, as bits, that all others' masks leave out, by exchange; empty: none in any. They
  // themselves know nothing of that.
  std::vector<uint64_t> left_out = {};
  // A rank's combines also leave out whom it has missed in its last dispatch, as handles say.
  bool carries_missing = false;
  std::vector<Absence> absences = {};
  // The hosts of the ranks in `told` say of those in `given_up` that they need not be waited for.
  uint64_t told = 0;
  uint64_t given_up = 0;
  // By rank, leaps of time within the timeout; empty: kPatience.
  std::vector<int32_t> patience = {};
  uint32_t first_epoch = 0;
  uint32_t last_all_ended = 0;  // with it: the last exchange that ranks have seen all end
  uint32_t blocks = 2;

  static constexpr int32_t kPatience = 3;
};

struct AbsenceOutcome {
  sim::Report report;
  bool ended = false;   // all kernels, but for those of who has been killed or has given up
  bool killed = false;  // who was to be
  // By exchange and rank, as bits whom it found missing; kNotReached: its kernel did not end.
  std::vector<std::vector<uint64_t>> missing;

  static constexpr uint64_t kNotReached = ~uint64_t{0};
};
// The same story and seed give the same run.
AbsenceOutcome run_story(const AbsenceStory& story, uint64_t seed);

// Stories with all that may happen, and what is wrong with how they end, empty if nothing is: the
// first that is wrong. For mutants too.
std::string run_stories(uint64_t seed);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_TESTING_ABSENCES_H_
