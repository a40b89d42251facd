// SPDX-License-Identifier: Apache-2.0
#include "csrc/testing/absences.h"

#include <algorithm>
#include <bit>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "csrc/device/peers.h"
#include "csrc/device/primitives.h"
#include "csrc/device/wait.h"
#include "csrc/testing/simulated_group.h"

namespace jax_ep {
namespace {

constexpr uint64_t kLeap = uint64_t{1} << 40;  // of the simulator's time
constexpr uint64_t kOne = 1;

bool has(uint64_t ranks, int32_t rank) { return (ranks >> rank & 1) != 0; }

// Of whom a rank's results have nothing, and of whom they count what is not there.
struct Without {
  uint64_t ranks = 0;
  uint64_t torn = 0;
  auto operator<=>(const Without&) const = default;
};

// Problems with the same routing and values among different ranks.
class Problems {
 public:
  Problems(const ClusterOptions& options, bool masked) : options_(options) {
    options_.masked = masked;
  }

  // What a dispatch makes of it; the combine's results are those of all other ranks' sums.
  Problem& dispatch(const Without& without) {
    return find({without, 0}, [&](Problem& problem) {
      for (int32_t rank = 0; rank < options_.shape.num_ranks; ++rank) {
        empty_rows(problem.cluster.rank(rank), without.torn);
      }
    });
  }
  // Where a combine has nothing of the sums of `missing`.
  Problem& combine(const Without& without, uint64_t missing) {
    return find({without, missing}, [&](Problem& problem) {
      for (int32_t rank = 0; rank < options_.shape.num_ranks; ++rank) {
        empty_rows(problem.cluster.rank(rank), without.torn);
        std::vector<std::byte>& y = problem.cluster.rank(rank).y;
        if (has(missing, rank)) std::fill(y.begin(), y.end(), std::byte{0});
      }
      problem.ok = problem.cluster.combine().ok();
    });
  }

 private:
  using Key = std::pair<Without, uint64_t>;

  template <typename Change>
  Problem& find(const Key& key, const Change& change) {
    std::unique_ptr<Problem>& problem = problems_[key];
    if (!problem) {
      ClusterOptions options = options_;
      options.sitting_out = key.first.ranks;
      problem = std::make_unique<Problem>(options);
      change(*problem);
    }
    return *problem;
  }

  // Those with tokens of `sources` hold none, and selections of their experts have none.
  void empty_rows(RankBuffers& buffers, uint64_t sources) const {
    const EpShape& shape = options_.shape;
    for (size_t i = 0; i < buffers.slot.size(); ++i) {
      const int32_t expert = buffers.topk_idx[i];
      if (expert < 0 || expert >= shape.num_experts) continue;
      if (has(sources, expert / shape.num_local_experts())) buffers.slot[i] = -1;
    }
    const auto clear = [](auto& values, int64_t row, int64_t count, auto value) {
      if (values.empty()) return;
      std::fill_n(values.begin() + row * count, count, value);
    };
    const int64_t row_bytes = options_.hidden * size_bytes(options_.dtype);
    for (int64_t row = 0; row < shape.recv_capacity; ++row) {
      int32_t& source = buffers.row_source[static_cast<size_t>(row)];
      if (source < 0 || !has(sources, static_cast<int32_t>(source / shape.num_tokens))) continue;
      source = -1;
      clear(buffers.row_topk_idx, row, shape.num_topk, -1);
      clear(buffers.rows, row, row_bytes, std::byte{0});
      clear(buffers.row_scalars, row, shape.scalars_per_row(), 0.0F);
    }
  }

  ClusterOptions options_;
  std::map<Key, std::unique_ptr<Problem>> problems_;
};

class StoryRun {
 public:
  StoryRun(sim::Machine& machine, const AbsenceStory& story, AbsenceOutcome& outcome)
      : machine_(machine),
        story_(story),
        outcome_(outcome),
        num_ranks_(story.options.shape.num_ranks),
        problems_(story.options, is_masked(story)),
        group_(machine, heap_shape(story), kChunkTarget, 0, "group"),
        without_(static_cast<size_t>(num_ranks_)),
        carried_(static_cast<size_t>(num_ranks_)),
        ended_(static_cast<size_t>(num_ranks_), story.first_epoch) {
    if (story.first_epoch != 0) {
      group_.set_epoch(story.first_epoch);
      for (int32_t rank = 0; rank < num_ranks_; ++rank) {
        group_.set_peers_ended(rank, story.last_all_ended);
      }
    }
    outcome_.missing.assign(
        story.ops.size(),
        std::vector<uint64_t>(static_cast<size_t>(num_ranks_), AbsenceOutcome::kNotReached));
  }

  static bool is_masked(const AbsenceStory& story) {
    return story.carries_missing || std::any_of(story.left_out.begin(),
                                                story.left_out.end(),
                                                [](uint64_t ranks) { return ranks != 0; });
  }
  static HeapShape heap_shape(const AbsenceStory& story) {
    const EpShape& shape = story.options.shape;
    HeapShape heap{.num_ranks = shape.num_ranks,
                   .num_experts = shape.num_experts,
                   .num_topk = shape.num_topk,
                   .max_tokens = shape.num_tokens,
                   .hidden = story.options.hidden,
                   .dtype = story.options.dtype,
                   .wire = story.options.wire,
                   .layout = shape.layout};
    heap.low_latency_tokens = heap.max_tokens;
    return heap;
  }
  static uint64_t arrays_offset(const AbsenceStory& story) {
    return SimulatedGroup::memory_bytes(heap_shape(story));
  }
  static uint64_t memory_bytes(const AbsenceStory& story) {
    ClusterOptions options = story.options;
    options.masked = is_masked(story);
    Problem problem(options);
    const uint64_t arrays = RankArrays(problem, 0, nullptr).bytes() + 256;
    return (arrays_offset(story) + arrays + 4095) / 4096 * 4096;
  }

  void append() {
    for (int32_t rank = 0; rank < num_ranks_; ++rank) {
      if (has(story_.told, rank)) {
        machine_.host_call(static_cast<uint32_t>(rank), 0, [this, rank] {
          group_.give_up_on(rank, story_.given_up);
        });
      }
      for (size_t i = 0; i < story_.ops.size(); ++i) {
        if (!append_absence(rank, i)) break;
        append_exchange(rank, i);
      }
    }
  }

 private:
  [[nodiscard]] uint64_t mask_of(int32_t rank, size_t exchange) const {
    const uint64_t out = story_.left_out.empty() ? 0 : story_.left_out[exchange];
    const bool carries = story_.carries_missing && story_.ops[exchange] == OpKind::kCombine;
    return (has(out, rank) ? 0 : out) | (carries ? carried_[static_cast<size_t>(rank)] : 0);
  }

  // False: the rank does not come any more.
  bool append_absence(int32_t rank, size_t exchange) {
    const auto r = static_cast<uint32_t>(rank);
    for (const Absence& absence : story_.absences) {
      if (absence.rank != rank || absence.exchange != static_cast<int32_t>(exchange)) continue;
      const uint64_t amount = absence.amount;
      switch (absence.kind) {
        case Absence::Kind::kAway: return false;
        case Absence::Kind::kKilled:
          machine_.host_call(r, 0, [this, r, amount] { machine_.kill_before(r, amount); });
          break;
        case Absence::Kind::kLate:
          machine_.launch(r, 0, {}, [amount] {
            while (dev::now_ns() < amount * kLeap) dev::spin_pause("its time");
          });
          break;
        case Absence::Kind::kBeats: append_heartbeats(rank, amount); return false;
        case Absence::Kind::kGivesUp:
        case Absence::Kind::kElse: break;
      }
    }
    return true;
  }

  [[nodiscard]] bool comes(int32_t rank, size_t exchange, Absence::Kind kind) const {
    return std::any_of(story_.absences.begin(), story_.absences.end(), [&](const Absence& absence) {
      return absence.kind == kind && absence.rank == rank &&
             absence.exchange == static_cast<int32_t>(exchange);
    });
  }

  void append_heartbeats(int32_t rank, uint64_t leaps) {
    machine_.launch(static_cast<uint32_t>(rank), 0, {}, [view = group_.masking_view(rank), leaps] {
      if (dev::thread_id() != 0) return;
      for (uint64_t leap = 1; leap <= leaps; ++leap) {
        while (dev::now_ns() < leap * kLeap) dev::spin_pause("the next heartbeat");
        const auto tick = static_cast<uint32_t>(leap);
        dev::for_each_peer(
            view, [&](int32_t peer) { dev::put_heartbeat(view, peer, heartbeat(tick, 1, 0)); });
      }
    });
  }

  void append_exchange(int32_t rank, size_t exchange) {
    const auto r = static_cast<uint32_t>(rank);
    const OpKind kind = story_.ops[exchange];
    std::byte* const memory = machine_.memory(r) + arrays_offset(story_);
    // The kernel's arguments do not depend on the problem's routing.
    Problem& own = problems_.dispatch({.ranks = mask_of(rank, exchange)});
    arrays_.push_back(std::make_unique<RankArrays>(own, rank, memory));
    const RankArrays& arrays = *arrays_.back();
    const auto missing = std::span(reinterpret_cast<uint8_t*>(memory + arrays.bytes()), size_t{256})
                             .first(static_cast<size_t>(num_ranks_));
    machine_.host_call(r, 0, [this, r, rank, kind, exchange, memory, missing, &arrays] {
      SimulatedMemory device(machine_, rank);
      if (kind == OpKind::kPlanDispatch) {
        machine_.poison(r, memory, arrays.bytes());
        arrays.upload(device);
      } else {
        arrays.replace_mask(device, mask_of(rank, exchange));
      }
      for (const std::span<std::byte> result : arrays.results_of(kind)) {
        machine_.poison(r, result.data(), result.size());
      }
      machine_.poison(r, missing.data(), missing.size());
      if (comes(rank, exchange, Absence::Kind::kGivesUp))
        arrays.replace_rank(device, (rank + 1) % num_ranks_);
    });
    RankView view = group_.masking_view(rank);
    const int32_t patience = story_.patience.empty() ? AbsenceStory::kPatience
                                                     : story_.patience[static_cast<size_t>(rank)];
    view.timeout_ns = static_cast<uint64_t>(patience) * kLeap + kLeap / 2;
    const bool is_other = comes(rank, exchange, Absence::Kind::kElse);
    const SimulatedLaunch launch{.blocks = story_.blocks, .call_site = is_other ? 1U : 0U};
    if (kind == OpKind::kPlanDispatch) {
      PlanDispatchParams params = arrays.plan_dispatch(view);
      params.op.dispatch.missing_ranks = missing.data();
      group_.launch(params, launch);
    } else {
      CombineParams params = arrays.combine(view);
      params.op.missing_ranks = missing.data();
      group_.launch(params, launch);
    }
    machine_.check(r, 0, [this, rank, exchange, missing, memory] {
      SimulatedMemory device(machine_, rank);
      const std::string error = check(rank, exchange, device, missing, memory);
      const std::string where =
          "exchange " + std::to_string(exchange) + ", rank " + std::to_string(rank) + ": ";
      return error.empty() ? error : where + error;
    });
  }

  std::string check(int32_t rank,
                    size_t exchange,
                    DeviceMemory& device,
                    std::span<uint8_t> missing,
                    std::byte* memory) {
    uint64_t found = 0;
    for (int32_t other = 0; other < num_ranks_; ++other) {
      uint8_t is_missing = 0;
      device.read(&is_missing, &missing[static_cast<size_t>(other)], 1);
      if (is_missing > 1) return "missing_ranks has a " + std::to_string(is_missing);
      found |= uint64_t{is_missing} << other;
    }
    outcome_.missing[exchange][static_cast<size_t>(rank)] = found;
    const uint64_t mask = mask_of(rank, exchange);
    if ((found & (mask | kOne << rank)) != 0) return "it misses itself, or who is left out";
    if (std::string wrong = check_words(rank, mask | found); !wrong.empty()) return wrong;
    if (story_.ops[exchange] == OpKind::kPlanDispatch) carried_[static_cast<size_t>(rank)] = found;
    return story_.ops[exchange] == OpKind::kPlanDispatch
               ? check_dispatch(rank, mask, found, device, memory)
               : check_combine(rank, mask, found, device, memory);
  }

  // What a kernel leaves for the host, and for the next one. `without`: whom it has not met.
  std::string check_words(int32_t rank, uint64_t without) {
    ended_[static_cast<size_t>(rank)] = group_.epoch(rank, Channel::kLowLatency);
    const uint32_t ended = group_.peers_ended(rank, Channel::kLowLatency);
    const uint32_t own = ended_[static_cast<size_t>(rank)];
    if (without == 0 && own - ended > 1) {  // so that the next ones need not look for themselves
      return "it has met all, and has it from exchange " + std::to_string(ended) +
             " that all have ended";
    }
    if (clears_bank(own) && own - ended > kOldestEnded) {
      return "in exchange " + std::to_string(own) + " it still has it from exchange " +
             std::to_string(ended) + " that all have ended";
    }
    for (int32_t other = 0; other < num_ranks_; ++other) {
      if (!dev::has_reached(ended_[static_cast<size_t>(other)], ended)) {
        return "it takes exchange " + std::to_string(ended) + " for ended by rank " +
               std::to_string(other);
      }
      const LongWait wait = group_.long_wait(rank, other);
      if (wait.level != 0 && !wait.ended) {
        return "it has said that it waits for rank " + std::to_string(other) +
               ", and not that it "
               "does not any longer";
      }
    }
    return {};
  }

  // Each missing rank is missing as a whole, or its rows alone are.
  std::string check_dispatch(
      int32_t rank, uint64_t mask, uint64_t found, DeviceMemory& device, std::byte* memory) {
    std::string first_error;
    for (uint64_t torn = 0; torn <= found; ++torn) {
      if ((torn & ~found) != 0) continue;
      const Without without{.ranks = mask | (found & ~torn), .torn = torn};
      const RankArrays expected(problems_.dispatch(without), rank, memory);
      std::string error = expected.check_plan(device);
      if (error.empty()) error = expected.check_dispatch(device);
      if (error.empty()) {
        without_[static_cast<size_t>(rank)] = without;
        return {};
      }
      if (first_error.empty()) first_error = error;
    }
    return first_error + ", without ranks " + std::to_string(mask | found);
  }

  std::string check_combine(
      int32_t rank, uint64_t mask, uint64_t found, DeviceMemory& device, std::byte* memory) {
    const Without& without = without_[static_cast<size_t>(rank)];
    for (int32_t other = 0; other < num_ranks_; ++other) {
      if (has(mask | found | without.ranks, other)) continue;
      // Ranks that do not agree have rows in other places.
      if (without_[static_cast<size_t>(other)] != without) return {};
    }
    const RankArrays expected(problems_.combine(without, mask | found), rank, memory);
    return expected.check_combine(device);
  }

  sim::Machine& machine_;
  const AbsenceStory& story_;
  AbsenceOutcome& outcome_;
  const int32_t num_ranks_;
  Problems problems_;
  SimulatedGroup group_;
  std::vector<std::unique_ptr<RankArrays>> arrays_;
  // By rank, of its last dispatch: what it made of it, and whom it missed.
  std::vector<Without> without_;
  std::vector<uint64_t> carried_;
  std::vector<uint32_t> ended_;  // by rank, the last exchange: it says so in the next one
};

}  // namespace

AbsenceOutcome run_story(const AbsenceStory& story, uint64_t seed) {
  sim::Config config;
  config.num_ranks = static_cast<uint32_t>(story.options.shape.num_ranks);
  config.clock_skew_ns = 16;
  config.max_blocks = story.blocks;
  config.max_threads = SimulatedGroup::kMaxThreads;
  config.shared_bytes = SimulatedGroup::max_shared_bytes();
  config.granule_bytes = 1;  // missing_ranks
  config.max_leaps = 100;
  config.survive_traps =
      std::any_of(story.absences.begin(), story.absences.end(), [](const Absence& absence) {
        return absence.kind == Absence::Kind::kGivesUp;
      });
  config.memory_bytes = StoryRun::memory_bytes(story);
  sim::Machine machine(config);
  machine.reset(seed);
  AbsenceOutcome outcome;
  StoryRun run(machine, story, outcome);
  run.append();
  outcome.report = machine.run();
  outcome.ended = config.survive_traps ? outcome.report.kind == "trap" : outcome.report.ok();
  for (const Absence& absence : story.absences) {
    outcome.killed = outcome.killed || machine.was_killed(static_cast<uint32_t>(absence.rank));
  }
  return outcome;
}

}  // namespace jax_ep
