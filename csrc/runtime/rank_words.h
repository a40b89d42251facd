// SPDX-License-Identifier: Apache-2.0
// What of a rank outlives its group: the words that its kernels read first, and those that they
// leave for the host. A CUDA graph that was recorded with the group may be launched at any time
// later.
#ifndef JAX_EP_CSRC_RUNTIME_RANK_WORDS_H_
#define JAX_EP_CSRC_RUNTIME_RANK_WORDS_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "csrc/core/error_record.h"
#include "csrc/core/heap_layout.h"
#include "csrc/core/protocol.h"
#include "csrc/core/status.h"

namespace jax_ep {

// Pinned host memory of one rank, which its device writes, but for the last word, which it reads.
struct HostMailbox {
  ErrorRecord error;
  alignas(64) uint64_t long_waits[kMaxRanks];  // by peer, see LongWait
  alignas(64) uint64_t phases[kNumChannels];   // by channel, see KernelPhase
  alignas(64) uint64_t given_up;               // as RankView::given_up
};
static_assert(kMaxRanks <= 64, "given_up has a bit for each");

// Whose words they are, for messages.
struct WordsOwner {
  std::string group_name;
  int32_t device = 0;
  int32_t group_index = 0;
  int32_t rank = 0;
  int32_t num_ranks = 1;
  double timeout_s = 0;
  double report_s = 0;  // a wait's first report comes after this long
};

// What a rank waits for, as it last said.
struct RankWait {
  int32_t peer;
  LongWait wait;
};

struct WordsSlot;

// How many places for words a pool gets at a time.
inline constexpr size_t kWordsAtOnce = 128;

// The words of one rank. They come from pools that only grow: a few hundred bytes stay for each
// rank of each group that ever served a call. Movable; not thread-safe but for what is const.
class RankWords {
 public:
  RankWords() = default;
  ~RankWords();
  RankWords(RankWords&& other) noexcept;
  RankWords& operator=(RankWords&& other) noexcept;

  // On the owner's device, which is current; all zeros.
  static Status allocate(WordsOwner owner, RankWords& words);

  // For kernels.
  [[nodiscard]] uint32_t* control() const;
  [[nodiscard]] ErrorRecord* error_on_device() const;
  [[nodiscard]] uint64_t* long_waits_on_device() const;
  [[nodiscard]] uint64_t* phases_on_device() const;
  [[nodiscard]] const uint64_t* given_up_on_device() const;

  // From now on kernels may run with them, so they are never used again.
  void publish();
  // Tells all kernels that start from now on that the group is closed.
  Status close();

  // Kernels that leave out who does not come wait for these ranks, as bits, no longer: neither
  // those that run nor later ones. From any thread.
  void give_up_on(uint64_t ranks) const;

  // What a kernel wrote when it gave up, or found its group closed; if one has.
  [[nodiscard]] std::optional<ErrorRecord> error() const;

 private:
  void release();

  WordsSlot* slot_ = nullptr;
};

// What is to be said of a rank of this process, whose group may have been closed.
struct RankStatus {
  WordsOwner owner;
  std::optional<ErrorRecord> error;
  std::vector<RankWait> waits;  // also those that have ended
};
// Of all ranks that a kernel has left words of. Reads host memory only. Thread-safe.
std::vector<RankStatus> rank_statuses();

// A kernel between domains that has begun and not ended: it runs, or it has trapped.
struct RunningKernel {
  WordsOwner owner;
  KernelPhase phase;
};
// Of all ranks of this process, also of those whose group has been closed. Likewise.
std::vector<RunningKernel> running_kernels();

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_RANK_WORDS_H_
