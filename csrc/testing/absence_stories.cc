// SPDX-License-Identifier: Apache-2.0
// The stories of absences.h, and how each must end.
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "csrc/testing/absences.h"

namespace jax_ep {
namespace {

using enum OpKind;
using Kind = Absence::Kind;
using Judge = std::function<std::string(const AbsenceOutcome&)>;

constexpr auto kPatience = static_cast<uint32_t>(AbsenceStory::kPatience);
// Of time, until somebody is given up.
constexpr uint32_t kLeaps = kPatience + 1;
constexpr int32_t kIt = 2;  // who is away
constexpr uint64_t kItAlone = 1U << kIt;

std::string judge_leaps(const AbsenceOutcome& outcome, uint32_t least, uint32_t most) {
  const uint32_t leaps = outcome.report.leaps;
  if (least <= leaps && leaps <= most) return {};
  return "time leapt " + std::to_string(leaps) + " times instead of " + std::to_string(least) +
         " to " + std::to_string(most);
}

std::string judge_missing(
    const AbsenceOutcome& outcome, size_t exchange, size_t rank, uint64_t least, uint64_t most) {
  const uint64_t found = outcome.missing[exchange][rank];
  if ((found & least) == least && (found & ~most) == 0) return {};
  return "in exchange " + std::to_string(exchange) + " rank " + std::to_string(rank) + " misses " +
         std::to_string(found) + " instead of " + std::to_string(least) + " to " +
         std::to_string(most);
}

// Of the two that are there.
std::string judge_both(const AbsenceOutcome& outcome,
                       size_t exchange,
                       uint64_t least,
                       uint64_t most) {
  std::string error = judge_missing(outcome, exchange, 0, least, most);
  return error.empty() ? judge_missing(outcome, exchange, 1, least, most) : error;
}

AbsenceStory story_of(uint64_t seed, std::vector<OpKind> ops, int32_t num_ranks = 3) {
  AbsenceStory story;
  ClusterOptions& options = story.options;
  options.shape = {.num_ranks = num_ranks,
                   .num_experts = 2 * num_ranks,
                   .num_topk = 3,
                   .num_tokens = seed % 3 == 0 ? 8 : 3,  // or few: that is faster
                   .expert_alignment = 2,
                   .layout = seed % 2 == 0 ? Layout::kRank : Layout::kExpert};
  if (options.shape.layout == Layout::kRank) options.shape.expert_alignment = 1;
  options.shape.recv_capacity = worst_case_capacity(options.shape);
  options.hidden = 24;
  options.dtype = DType::kBFloat16;
  options.seed = static_cast<uint32_t>(seed);
  // A combine of scalars would not be a low-latency one.
  options.scalars = true;
  for (const OpKind op : ops) options.scalars = options.scalars && op != kCombine;
  story.ops = std::move(ops);
  return story;
}

struct Told {
  const char* name;
  AbsenceStory story;
  Judge judge;
};

// Everybody is there, also for a bank's second use.
Told nobody_away(uint64_t seed) {
  const AbsenceStory story = story_of(
      seed, {kPlanDispatch, kCombine, kPlanDispatch, kCombine, kCombine, kPlanDispatch, kCombine});
  return {"nobody is away", story, [](const AbsenceOutcome& outcome) {
            for (size_t i = 0; i < outcome.missing.size(); ++i) {
              for (size_t rank = 0; rank < 3; ++rank) {
                std::string error = judge_missing(outcome, i, rank, 0, 0);
                if (!error.empty()) return error;
              }
            }
            return judge_leaps(outcome, 0, 0);
          }};
}

// It is away from the first, or the second, exchange on, and nobody has a mask: each exchange finds
// out anew. Acknowledgments that do not come must not hold the banks for longer.
Told away(uint64_t seed) {
  AbsenceStory story = story_of(
      seed, {kPlanDispatch, kCombine, kPlanDispatch, kCombine, kPlanDispatch, kPlanDispatch});
  const size_t from = seed / 2 % 2;
  story.absences = {{.rank = kIt, .exchange = static_cast<int32_t>(from), .kind = Kind::kAway}};
  return {"one is away", story, [from](const AbsenceOutcome& outcome) {
            for (size_t i = 0; i < outcome.missing.size(); ++i) {
              const uint64_t expected = i < from ? 0 : kItAlone;
              std::string error = judge_both(outcome, i, expected, expected);
              if (!error.empty()) return error;
            }
            const auto times = static_cast<uint32_t>(outcome.missing.size() - from);
            return judge_leaps(outcome, kLeaps, times * kLeaps);
          }};
}

// The same with the FP8 wire, where ranks send to themselves.
Told away_fp8(uint64_t seed) {
  AbsenceStory story = story_of(seed, {kPlanDispatch});
  story.options.wire = Wire::kFloat8E4M3;
  story.options.hidden = 128;
  story.absences = {{.rank = kIt, .exchange = 0, .kind = Kind::kAway}};
  return {"one is away, FP8", story, [](const AbsenceOutcome& outcome) {
            std::string error = judge_both(outcome, 0, kItAlone, kItAlone);
            return error.empty() ? judge_leaps(outcome, kLeaps, kLeaps) : error;
          }};
}

// Who carries what it has found waits once.
Told away_and_left_out(uint64_t seed) {
  AbsenceStory story = story_of(
      seed,
      {kPlanDispatch, kPlanDispatch, kCombine, kPlanDispatch, kCombine, kPlanDispatch, kCombine});
  story.absences = {{.rank = kIt, .exchange = 0, .kind = Kind::kAway}};
  story.left_out = {0, 4, 4, 4, 4, 4, 4};
  return {"one is away, and left out then", story, [](const AbsenceOutcome& outcome) {
            for (size_t i = 0; i < outcome.missing.size(); ++i) {
              const uint64_t expected = i == 0 ? kItAlone : 0;
              std::string error = judge_both(outcome, i, expected, expected);
              if (!error.empty()) return error;
            }
            return judge_leaps(outcome, kLeaps, kLeaps);
          }};
}

// It has been left out for so long that nobody has seen all end an exchange for 2^30 of them.
Told left_out_for_ever(uint64_t seed) {
  AbsenceStory story = story_of(seed, std::vector<OpKind>(7, kPlanDispatch));
  story.first_epoch = 65 * kClearBankEvery - 2;
  story.last_all_ended = 7;
  story.absences = {{.rank = kIt, .exchange = 0, .kind = Kind::kAway}};
  story.left_out = std::vector<uint64_t>(story.ops.size(), kItAlone);
  return {"left out for ever", story, [](const AbsenceOutcome& outcome) {
            for (size_t i = 0; i < outcome.missing.size(); ++i) {
              std::string error = judge_both(outcome, i, 0, 0);
              if (!error.empty()) return error;
            }
            return judge_leaps(outcome, 0, 0);
          }};
}

// It ends in the middle of the last exchange. What it has sent of a row counts whole, or not.
Told killed(uint64_t seed, OpKind last) {
  std::mt19937_64 random(seed);
  AbsenceStory story = story_of(seed, {kPlanDispatch, last});
  story.options.scalars = last != kCombine;
  const bool has_segments = seed % 4 == 3;
  if (has_segments) story.options.hidden = 1200;
  if (has_segments) story.blocks = 1;
  const uint64_t most =
      (has_segments ? 400 : 20) * static_cast<uint64_t>(story.options.shape.num_tokens);
  story.absences = {{.rank = kIt, .exchange = 1, .kind = Kind::kKilled, .amount = random() % most}};
  return {last == kCombine ? "killed in a combine" : "killed in a dispatch",
          story,
          [](const AbsenceOutcome& outcome) {
            std::string error = judge_both(outcome, 1, 0, outcome.killed ? kItAlone : 0);
            if (error.empty()) error = judge_both(outcome, 0, 0, 0);
            return error.empty() ? judge_leaps(outcome, 0, kLeaps) : error;
          }};
}

// It ends in the dispatch whose handle a combine then has: nobody waits for its sums once more,
// also where its routing had come, and whoever agrees on it has the same sums.
Told killed_before_a_combine(uint64_t seed) {
  Told told = killed(seed, kPlanDispatch);
  AbsenceStory& story = told.story;
  story.options.scalars = false;
  story.ops.push_back(kCombine);
  story.carries_missing = true;
  // Past its routing, where its rows go out: then its rows alone are missing.
  if (seed % 2 == 0) story.absences[0].amount = 2 + seed % 7;
  story.absences.push_back({.rank = kIt, .exchange = 2, .kind = Kind::kAway});
  return {"killed before a combine", story, [](const AbsenceOutcome& outcome) {
            uint32_t waits = 0;
            for (size_t rank = 0; rank < 2; ++rank) {
              std::string error = judge_missing(outcome, 1, rank, 0, kItAlone);
              // Who has its rows waits for its sums.
              const bool was_missing = outcome.missing[1][rank] != 0;
              const uint64_t expected = was_missing ? 0 : kItAlone;
              if (error.empty()) error = judge_missing(outcome, 2, rank, 0, expected);
              if (!error.empty()) return error;
              waits += was_missing ? 0 : 1;
            }
            return judge_leaps(outcome, 0, (waits > 0 ? 2 : 1) * kLeaps);
          }};
}

// Its program is wrong: it ends, and the others need not.
Told gives_up(uint64_t seed) {
  AbsenceStory story = story_of(seed, {kPlanDispatch, kPlanDispatch, kPlanDispatch});
  story.absences = {{.rank = kIt, .exchange = 1, .kind = Kind::kGivesUp}};
  return {"gives up", story, [](const AbsenceOutcome& outcome) {
            std::string error = judge_both(outcome, 1, kItAlone, kItAlone);
            return error.empty() ? judge_both(outcome, 2, kItAlone, kItAlone) : error;
          }};
}

// It is in another call for once, because a step of its program has ended in the middle.
Told in_another_call(uint64_t seed) {
  AbsenceStory story =
      story_of(seed, {kPlanDispatch, seed % 2 == 0 ? kPlanDispatch : kCombine, kPlanDispatch});
  story.absences = {{.rank = kIt, .exchange = 1, .kind = Kind::kElse}};
  return {"in another call", story, [](const AbsenceOutcome& outcome) {
            std::string error;
            for (size_t i = 0; i < 3 && error.empty(); ++i) {
              const bool is_apart = i == 1;
              error = judge_both(outcome, i, is_apart ? kItAlone : 0, is_apart ? kItAlone : 0);
              const uint64_t by_it = is_apart ? 3 : 0;
              if (error.empty()) error = judge_missing(outcome, i, kIt, by_it, by_it);
            }
            return error.empty() ? judge_leaps(outcome, 0, 0) : error;
          }};
}

// One goes on without two others, which then come and take their time with each other: who is far
// ahead says nothing of what they have read.
Told one_goes_ahead(uint64_t seed) {
  AbsenceStory story = story_of(seed, std::vector<OpKind>(6, kPlanDispatch));
  story.absences = {{.rank = 1, .exchange = 1, .kind = Kind::kLate, .amount = 1},
                    {.rank = kIt, .exchange = 1, .kind = Kind::kLate, .amount = 1}};
  story.told = 1;
  story.given_up = 2 | kItAlone;
  return {"one goes ahead", story, [](const AbsenceOutcome& outcome) {
            for (size_t i = 0; i < outcome.missing.size(); ++i) {
              std::string error = judge_missing(outcome, i, 0, i == 0 ? 0 : 6, 6);
              for (size_t rank = 1; rank < 3 && error.empty(); ++rank) {
                error = judge_missing(outcome, i, rank, 0, 1);
              }
              if (!error.empty()) return error;
            }
            return judge_leaps(outcome, 1, 1);
          }};
}

// It comes just when the others lose patience: all blocks of a rank find the same.
Told just_too_late(uint64_t seed, OpKind last) {
  AbsenceStory story = story_of(seed, {kPlanDispatch, last});
  story.blocks = 3;
  story.absences = {{.rank = kIt, .exchange = 1, .kind = Kind::kLate, .amount = kLeaps}};
  return {"just too late, or not", story, [](const AbsenceOutcome& outcome) {
            std::string error = judge_both(outcome, 1, 0, kItAlone);
            if (error.empty()) error = judge_missing(outcome, 1, kIt, 0, 3);
            return error.empty() ? judge_leaps(outcome, kLeaps, 2 * kLeaps) : error;
          }};
}

// It comes back when the others have left it out of some exchanges, and wait for it again: in a
// bank that it first fills with an exchange of long ago. It knows of no mask, and must wait for
// nobody.
Told zombie(uint64_t seed) {
  AbsenceStory story = story_of(seed, std::vector<OpKind>(6, kPlanDispatch));
  story.absences = {{.rank = kIt, .exchange = 1, .kind = Kind::kLate, .amount = kLeaps + 1}};
  story.left_out = {0, 0, 4, 4, 4, 0};
  return {"zombie", story, [](const AbsenceOutcome& outcome) {
            std::string error;
            for (size_t i = 0; i < 6 && error.empty(); ++i) {
              const uint64_t expected = i == 1 ? kItAlone : 0;
              error = judge_both(outcome, i, expected, expected);
              const uint64_t by_it = i >= 2 && i <= 4 ? 3 : 0;
              if (error.empty()) error = judge_missing(outcome, i, kIt, by_it, by_it);
            }
            return error.empty() ? judge_leaps(outcome, kLeaps + 1, kLeaps + 1) : error;
          }};
}

// It comes when the others have done without it so often that all banks have been used. It finds
// all that they have sent before, and that they have sent nothing to a bank that it had not read.
Told far_behind(uint64_t seed) {
  AbsenceStory story = story_of(seed, std::vector<OpKind>(6, kPlanDispatch));
  constexpr uint32_t kOthersLeaps = 5 * kLeaps;
  story.absences = {{.rank = kIt, .exchange = 1, .kind = Kind::kLate, .amount = kOthersLeaps + 1}};
  return {"far behind", story, [](const AbsenceOutcome& outcome) {
            std::string error;
            for (size_t i = 0; i < 6 && error.empty(); ++i) {
              const uint64_t expected = i == 0 ? 0 : kItAlone;
              error = judge_both(outcome, i, expected, expected);
              const uint64_t by_it = i >= 4 ? 3 : 0;  // it has not said that it ended the first
              if (error.empty()) error = judge_missing(outcome, i, kIt, by_it, by_it);
            }
            return error.empty() ? judge_leaps(outcome, kOthersLeaps + 1, kOthersLeaps + 1) : error;
          }};
}

// The hosts of two ranks give it up, and it is there all the same: what comes first counts, for all
// blocks of a rank.
Told given_up_but_there(uint64_t seed) {
  AbsenceStory story = story_of(seed, std::vector<OpKind>(5, kPlanDispatch));
  story.told = 3;
  story.given_up = kItAlone;
  story.blocks = 3;
  return {"given up, but there", story, [](const AbsenceOutcome& outcome) {
            std::string error;
            for (size_t i = 0; i < 5 && error.empty(); ++i) {
              error = judge_both(outcome, i, 0, kItAlone);
              if (error.empty()) error = judge_missing(outcome, i, kIt, 0, 3);
            }
            return error.empty() ? judge_leaps(outcome, 0, 0) : error;
          }};
}

// The hosts know at once.
Told given_up(uint64_t seed) {
  AbsenceStory story = story_of(
      seed, {kPlanDispatch, kCombine, kPlanDispatch, kPlanDispatch, kPlanDispatch, kCombine});
  story.absences = {{.rank = kIt, .exchange = 1, .kind = Kind::kAway}};
  story.told = 3;
  story.given_up = kItAlone;
  return {"given up", story, [](const AbsenceOutcome& outcome) {
            for (size_t i = 0; i < outcome.missing.size(); ++i) {
              // In the first one it is there, but who looks before it has come does not wait.
              std::string error = judge_both(outcome, i, i == 0 ? 0 : kItAlone, kItAlone);
              if (!error.empty()) return error;
            }
            return judge_leaps(outcome, 0, kLeaps);
          }};
}

// Rank 0 need not wait for it, and waits in the next exchange for rank 1, which does.
Told behind_another(uint64_t seed) {
  AbsenceStory story = story_of(seed, {kPlanDispatch, kPlanDispatch});
  story.absences = {{.rank = kIt, .exchange = 0, .kind = Kind::kAway}};
  story.left_out = {0, 4};
  story.told = 1;
  story.given_up = kItAlone;
  story.patience = {AbsenceStory::kPatience, 3 * AbsenceStory::kPatience, AbsenceStory::kPatience};
  return {"behind another", story, [](const AbsenceOutcome& outcome) {
            std::string error = judge_both(outcome, 0, kItAlone, kItAlone);
            if (error.empty()) error = judge_both(outcome, 1, 0, 0);
            return error.empty() ? judge_leaps(outcome, 3 * kPatience + 1, 3 * kPatience + 1)
                                 : error;
          }};
}

// It sends heartbeats and nothing else, for longer than anybody is waited for.
Told only_beats(uint64_t seed) {
  AbsenceStory story = story_of(seed, {kPlanDispatch, kPlanDispatch});
  constexpr uint32_t kBeats = (kMostTimeouts + 1) * kLeaps;
  story.absences = {{.rank = kIt, .exchange = 0, .kind = Kind::kBeats, .amount = kBeats}};
  story.left_out = {0, 4};
  return {"only beats", story, [](const AbsenceOutcome& outcome) {
            std::string error = judge_both(outcome, 0, kItAlone, kItAlone);
            if (error.empty()) error = judge_both(outcome, 1, 0, 0);
            return error.empty() ? judge_leaps(outcome, kBeats, kBeats) : error;
          }};
}

// One is away, and another one is killed.
Told two(uint64_t seed, OpKind last) {
  AbsenceStory story = story_of(seed, {kPlanDispatch, last}, 4);
  story.absences = {{.rank = kIt, .exchange = 1, .kind = Kind::kAway},
                    {.rank = 3, .exchange = 1, .kind = Kind::kKilled, .amount = seed * 7 % 70}};
  return {"two", story, [](const AbsenceOutcome& outcome) {
            std::string error = judge_both(outcome, 1, kItAlone, kItAlone | 8);
            return error.empty() ? judge_leaps(outcome, kLeaps, 2 * kLeaps) : error;
          }};
}

}  // namespace

std::string run_stories(uint64_t seed) {
  const Told stories[] = {nobody_away(seed),
                          away(seed),
                          away_fp8(seed),
                          away_and_left_out(seed),
                          left_out_for_ever(seed),
                          killed(seed, kPlanDispatch),
                          killed(seed, kCombine),
                          killed_before_a_combine(seed),
                          gives_up(seed),
                          in_another_call(seed),
                          one_goes_ahead(seed),
                          just_too_late(seed, kPlanDispatch),
                          just_too_late(seed, kCombine),
                          zombie(seed),
                          far_behind(seed),
                          given_up_but_there(seed),
                          given_up(seed),
                          behind_another(seed),
                          only_beats(seed),
                          two(seed, kPlanDispatch),
                          two(seed, kCombine)};
  for (const Told& told : stories) {
    const AbsenceOutcome outcome = run_story(told.story, seed);
    std::string error = outcome.ended ? told.judge(outcome) : outcome.report.text();
    if (!error.empty()) return std::string(told.name) + ": " + error;
  }
  return {};
}

}  // namespace jax_ep
