// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/mishaps.h"

#include <algorithm>

namespace jax_ep {
namespace {

using enum Mishap;

bool has(const ErrorRecord& record, WaitTag tag) {
  return record.written == 1 && record.tag == static_cast<uint32_t>(tag);
}

bool is_low_latency(const Scenario& scenario) { return scenario.groups[0].low_latency_tokens > 0; }

OpKind last_op(const Scenario& scenario) { return scenario.groups[0].steps[0].ops.back().kind; }

std::string text_of(const ErrorRecord& record) {
  return record.written == 1 ? describe(record, 1) : "no record";
}

// That the peer `by` told it that it gave up with `tag`.
bool is_told(const ErrorRecord& record, int32_t by, WaitTag tag) {
  const Aborted aborted = unpack_aborted(record.detail);
  return has(record, WaitTag::kPeerGaveUp) && record.peer == static_cast<uint32_t>(by) &&
         aborted.by == static_cast<uint32_t>(by) && aborted.tag == static_cast<uint32_t>(tag);
}

// That all ranks but those that were told by a peer say `tag`, and one at least does; for kArrived
// that a packet is missing will do.
template <typename Check>
std::string expect_records(const Outcome& outcome, WaitTag tag, const Check& check) {
  if (outcome.report.kind != "trap") return "it must end in a trap; " + outcome.report.text();
  int count = 0;
  for (const ErrorRecord& record : outcome.errors) {
    if (record.written == 0 || has(record, WaitTag::kPeerGaveUp)) continue;
    ++count;
    const bool right =
        has(record, tag) || (tag == WaitTag::kArrived && has(record, WaitTag::kPacket));
    if (!right || !check(record)) return "a wrong record: " + text_of(record);
  }
  return count > 0 ? "" : "nobody says what happened";
}

std::string judge_missing(const Scenario& scenario, const Outcome& outcome) {
  const size_t exchanges = scenario.groups[0].steps[0].ops.size();
  // Low-latency exchanges have their flags by turns.
  const size_t before =
      is_low_latency(scenario) ? std::min<size_t>(kLowLatencyBanks, exchanges) : 1;
  return expect_records(outcome, WaitTag::kArrived, [&](const ErrorRecord& record) {
    return record.peer == static_cast<uint32_t>(scenario.rank) &&
           record.op == static_cast<uint32_t>(last_op(scenario)) && record.expected == exchanges &&
           record.seen == exchanges - before;
  });
}

// Rank 0 alone gives up; the others, which would wait for ever, end because it told them.
std::string judge_one_impatient(const Scenario& scenario, const Outcome& outcome) {
  if (std::string error = judge_missing(scenario, outcome); !error.empty()) return error;
  const auto own_tag = static_cast<WaitTag>(outcome.errors[0].tag);
  if (own_tag == WaitTag::kPeerGaveUp) return "rank 0: " + text_of(outcome.errors[0]);
  const ErrorRecord& told = outcome.errors[2];
  if (!has(told, WaitTag::kPeerGaveUp)) return "rank 2 was not told: " + text_of(told);
  const Aborted aborted = unpack_aborted(told.detail);
  const bool right = aborted.by == 0 && aborted.blamed == static_cast<uint32_t>(scenario.rank) &&
                     aborted.tag == static_cast<uint32_t>(own_tag) &&
                     aborted.op == static_cast<uint32_t>(last_op(scenario)) && told.peer == 0;
  return right ? "" : "rank 2 was told: " + text_of(told);
}

std::string judge_late(const Scenario& scenario, const Outcome& outcome) {
  if (!outcome.report.ok()) return outcome.report.text();
  for (const size_t rank : {0, 2}) {
    const LongWait& wait = outcome.long_waits[rank];
    const bool right = wait.level >= 1 && wait.ended &&
                       (wait.tag == static_cast<uint32_t>(WaitTag::kArrived) ||
                        wait.tag == static_cast<uint32_t>(WaitTag::kPacket)) &&
                       wait.op == static_cast<uint32_t>(last_op(scenario)) &&
                       wait.epoch == scenario.groups[0].steps[0].ops.size();
    if (!right) {
      return "rank " + std::to_string(rank) + " reported level " + std::to_string(wait.level) +
             (wait.ended ? ", ended" : ", not ended") + ", exchange " + std::to_string(wait.epoch);
    }
  }
  return "";
}

std::string judge_other_call(const Scenario& scenario, const Outcome& outcome) {
  const CallPart part = scenario.mishap == kOtherCallSite ? CallPart::kCallSite : CallPart::kTokens;
  return expect_records(outcome, WaitTag::kWrongCall, [&](const ErrorRecord& record) {
    const auto odd = static_cast<uint32_t>(scenario.rank);
    return (record.peer == odd || record.rank == odd) &&
           record.detail == 1U << static_cast<uint32_t>(part);
  });
}

std::string judge_other_op(const Scenario& scenario, const Outcome& outcome) {
  return expect_records(outcome, WaitTag::kWrongOp, [&](const ErrorRecord& record) {
    const auto odd = static_cast<uint32_t>(scenario.rank);
    return (record.peer == odd || record.rank == odd) && record.op != record.other_op &&
           record.expected == record.seen;
  });
}

std::string judge_overlap(const Scenario& scenario, const Outcome& outcome) {
  return expect_records(outcome, WaitTag::kOverlap, [&](const ErrorRecord& record) {
    const auto op = static_cast<uint32_t>(last_op(scenario));
    return record.op == op && (record.other_op == op || record.other_op == kMaxOps);
  });
}

std::string judge_closed(const Scenario& scenario, const Outcome& outcome) {
  if (!outcome.report.ok()) return outcome.report.text();
  for (const ErrorRecord& record : outcome.errors) {
    const bool right = has(record, WaitTag::kClosed) && record.detail == 0 &&
                       record.op == static_cast<uint32_t>(last_op(scenario));
    if (!right) return text_of(record);
  }
  return "";
}

// Rank 0 alone is closed; rank 2, which would wait for ever, ends because it told it.
std::string judge_closed_meanwhile(const Scenario& scenario, const Outcome& outcome) {
  if (outcome.report.kind != "trap") return "it must end in a trap; " + outcome.report.text();
  const ErrorRecord& closed = outcome.errors[0];
  const bool right = has(closed, WaitTag::kClosed) && closed.detail == kClosedInAWait &&
                     closed.op == static_cast<uint32_t>(last_op(scenario));
  if (!right) return "rank 0: " + text_of(closed);
  return is_told(outcome.errors[2], 0, WaitTag::kClosed) ? ""
                                                         : "rank 2: " + text_of(outcome.errors[2]);
}

// The rank says so, and tells the others. That it sent anything would be a bad address.
std::string judge_wrong_rank(const Scenario& scenario, const Outcome& outcome) {
  if (outcome.report.kind != "trap") return "it must end in a trap; " + outcome.report.text();
  for (size_t rank = 0; rank < outcome.errors.size(); ++rank) {
    const ErrorRecord& record = outcome.errors[rank];
    const bool is_it = rank == static_cast<size_t>(scenario.rank);
    const bool right = is_it ? has(record, WaitTag::kWrongRank) &&
                                   record.rank == static_cast<uint32_t>(scenario.rank) &&
                                   record.peer == static_cast<uint32_t>(said_rank(scenario)) &&
                                   record.op == static_cast<uint32_t>(last_op(scenario))
                             : is_told(record, scenario.rank, WaitTag::kWrongRank);
    if (!right) return "rank " + std::to_string(rank) + ": " + text_of(record);
  }
  return "";
}

// Nobody waits for the others to find out.
std::string judge_wrong_flight(const Scenario& scenario, const Outcome& outcome) {
  return expect_records(outcome, WaitTag::kStaleFlight, [&](const ErrorRecord& record) {
    return record.op == static_cast<uint32_t>(last_op(scenario)) && record.peer == record.rank;
  });
}

// Where rows are said to come that nobody has sent, it waits for them, and says so at last.
std::string judge_hostile_handle(const Scenario& scenario, const Outcome& outcome) {
  if (outcome.report.ok()) return "";
  if (!is_low_latency(scenario)) return outcome.report.text();
  return expect_records(outcome, WaitTag::kArrived, [&](const ErrorRecord& record) {
    return record.op == static_cast<uint32_t>(last_op(scenario));
  });
}

// It polls once more, and goes on: what it waited for has come.
std::string judge_stood_still(const Outcome& outcome) {
  if (!outcome.report.ok()) return outcome.report.text() + "\n" + text_of(outcome.errors[0]);
  return outcome.long_waits[0].ended ? "" : "rank 0 did not wait for long";
}

}  // namespace

Scenario mishap_scenario(Mishap mishap, OpKind last, Layout layout, uint64_t seed) {
  using enum OpKind;
  ScenarioStep step;
  step.options.shape = {
      .num_ranks = 3, .num_experts = 6, .num_topk = 3, .num_tokens = 8, .layout = layout};
  step.options.shape.recv_capacity = worst_case_capacity(step.options.shape);
  step.options.hidden = 64;
  step.options.seed = static_cast<uint32_t>(seed);
  // As a closed group leaves these, too.
  step.options.row_dots = mishap == kClosed && last == kDispatch;
  step.ops = {kPlan};
  if (last != kPlan) step.ops.push_back(kDispatch);
  if (last == kCombine) step.ops.push_back(kCombine);
  if (last == kPlanDispatch) step.ops = {kPlanDispatch, kPlanDispatch};
  Scenario scenario{.groups = {{.max_tokens = 8, .steps = {step}}}};
  scenario.mishap = mishap;
  // What two tokens claim, or two kernels at once, is a race; it must not be more. So is closing
  // with a kernel's first look, which it may miss.
  scenario.check_races =
      mishap != kHostileHandle && mishap != kOverlap && mishap != kClosedMeanwhile;
  return scenario;
}

Scenario low_latency_mishap_scenario(Mishap mishap, OpKind last, Layout layout, uint64_t seed) {
  using enum OpKind;
  Scenario scenario = mishap_scenario(mishap, last, layout, seed);
  GroupScenario& group = scenario.groups[0];
  group.low_latency_tokens = group.max_tokens;
  ScenarioStep& step = group.steps[0];
  // A combine of scalars would not be a low-latency one.
  step.options.scalars = last != kCombine && mishap != kOtherOp;
  step.ops = {kPlanDispatch, last};
  return scenario;
}

namespace {

void append_low_latency_mishaps(std::vector<Scenario>& scenarios, uint64_t seed) {
  using enum OpKind;
  for (const Mishap mishap : {kMissing,
                              kOneImpatient,
                              kLate,
                              kOtherOp,
                              kOtherCallSite,
                              kOtherTokens,
                              kOverlap,
                              kHostileHandle,
                              kClosed,
                              kClosedMeanwhile,
                              kWrongRank}) {
    for (const OpKind last : {kPlanDispatch, kCombine}) {
      if (last == kPlanDispatch && mishap == kHostileHandle) continue;  // it makes the handle
      for (const Layout layout : {Layout::kExpert, Layout::kRank}) {
        scenarios.push_back(low_latency_mishap_scenario(mishap, last, layout, seed));
        scenarios.back().other_op = last == kCombine ? kPlanDispatch : kCombine;
      }
    }
  }
}

// What must not be done with a flight, as operations whose last one does it.
std::vector<std::vector<ScenarioOp>> wrong_uses_of_flights() {
  using enum OpKind;
  using enum Half;
  const ScenarioOp start(kPlanDispatch, kFirst);
  const ScenarioOp done(kPlanDispatch, kSecond);
  const ScenarioOp back(kCombine, kFirst);
  const ScenarioOp end(kCombine, kSecond);
  const ScenarioOp back1(kCombine, kFirst, 1);
  const ScenarioOp start1(kPlanDispatch, kFirst, 1);
  return {
      {start, done, done},
      {kPlanDispatch, back, end, end},
      // Another flight is open in its bank.
      {kPlanDispatch, back, end, kPlanDispatch, kCombine, kPlanDispatch, back1, end},
      // It is of the other operation.
      {kPlanDispatch, start, end},
      {kPlanDispatch, back, done},
      // As many exchanges as there are banks have begun while it was open.
      {kPlanDispatch, back, kPlanDispatch, kCombine, kPlanDispatch, kCombine, end},
      {start, kPlanDispatch, kCombine, kPlanDispatch, start1, done},
  };
}

void append_wrong_flights(std::vector<Scenario>& scenarios, uint64_t seed) {
  for (const std::vector<ScenarioOp>& ops : wrong_uses_of_flights()) {
    scenarios.push_back(
        low_latency_mishap_scenario(kWrongFlight, OpKind::kCombine, Layout::kExpert, seed));
    scenarios.back().groups[0].steps[0].ops = ops;
  }
}

// Halves of a closed group.
void append_closed_halves(std::vector<Scenario>& scenarios, uint64_t seed) {
  using enum OpKind;
  for (const OpKind last : {kPlanDispatch, kCombine}) {
    for (const Half half : {Half::kFirst, Half::kSecond}) {
      scenarios.push_back(low_latency_mishap_scenario(kClosed, last, Layout::kExpert, seed));
      std::vector<ScenarioOp>& ops = scenarios.back().groups[0].steps[0].ops;
      ops = {kPlanDispatch, {last, Half::kFirst}};
      if (half == Half::kSecond) ops.emplace_back(last, half);
    }
  }
}

}  // namespace

std::vector<Scenario> all_mishaps(uint64_t seed) {
  using enum OpKind;
  std::vector<Scenario> scenarios;
  for (const Mishap mishap : {kMissing,
                              kOneImpatient,
                              kLate,
                              kOtherOp,
                              kOtherCallSite,
                              kOtherTokens,
                              kOverlap,
                              kHostileHandle,
                              kClosed,
                              kClosedMeanwhile,
                              kWrongRank,
                              kStoodStill}) {
    const bool by_layout = mishap == kHostileHandle || mishap == kClosed;
    const bool not_of_plan = mishap == kHostileHandle || mishap == kOtherOp;
    for (const OpKind last : {kPlan, kDispatch, kCombine, kPlanDispatch}) {
      if (last == kPlan && not_of_plan) continue;
      if (last != kPlan && mishap == kStoodStill) continue;
      if (last == kPlanDispatch && mishap == kHostileHandle) continue;  // it makes the handle
      scenarios.push_back(mishap_scenario(mishap, last, Layout::kExpert, seed));
      if (by_layout) scenarios.push_back(mishap_scenario(mishap, last, Layout::kRank, seed));
    }
  }
  // A plan and its dispatch in one meet each of the others.
  for (const OpKind other : {kDispatch, kCombine}) {
    scenarios.push_back(mishap_scenario(kOtherOp, kPlanDispatch, Layout::kExpert, seed));
    scenarios.back().other_op = other;
  }
  append_low_latency_mishaps(scenarios, seed);
  append_wrong_flights(scenarios, seed);
  append_closed_halves(scenarios, seed);
  return scenarios;
}

std::string verdict_on(const Scenario& scenario, const Outcome& outcome) {
  switch (scenario.mishap) {
    case kMissing: return judge_missing(scenario, outcome);
    case kOneImpatient: return judge_one_impatient(scenario, outcome);
    case kLate: return judge_late(scenario, outcome);
    case kOtherOp: return judge_other_op(scenario, outcome);
    case kOtherCallSite:
    case kOtherTokens: return judge_other_call(scenario, outcome);
    case kOverlap: return judge_overlap(scenario, outcome);
    case kClosed: return judge_closed(scenario, outcome);
    case kClosedMeanwhile: return judge_closed_meanwhile(scenario, outcome);
    case kWrongRank: return judge_wrong_rank(scenario, outcome);
    case kWrongFlight: return judge_wrong_flight(scenario, outcome);
    case kStoodStill: return judge_stood_still(outcome);
    case kHostileHandle: return judge_hostile_handle(scenario, outcome);
    case kNone: break;
  }
  return outcome.report.ok() ? "" : outcome.report.text();
}

}  // namespace jax_ep
