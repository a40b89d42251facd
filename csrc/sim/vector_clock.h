// SPDX-License-Identifier: Apache-2.0
// Vector clocks: how far each participant is known to have got.
//
// A participant is whatever acts by itself: a thread, a thread's bulk stores, an mbarrier's bulk
// loads, a stream's host calls. Participant 0 is the host before a run; everybody knows it.
#ifndef JAX_EP_CSRC_SIM_VECTOR_CLOCK_H_
#define JAX_EP_CSRC_SIM_VECTOR_CLOCK_H_

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "csrc/device/simulator.h"

namespace jax_ep::sim {

// One counter per participant. Copies are cheap: counters lie in chunks that are shared until
// they are written. Not for several OS threads at once.
class Clock {
 public:
  static constexpr uint32_t kMaxParticipants = 64 * 256;

  Clock() = default;
  Clock(const Clock& other) : node_(other.node_) {
    if (node_) ++node_->references;
  }
  Clock(Clock&& other) noexcept : node_(std::exchange(other.node_, nullptr)) {}
  Clock& operator=(Clock other) noexcept {
    std::swap(node_, other.node_);
    return *this;
  }
  ~Clock() { drop(node_); }

  // All clocks of the process have one width, which only grows.
  static void make_room(uint32_t participants) {
    if (participants > kMaxParticipants) std::abort();
    num_chunks_ = std::max(num_chunks_, (participants + kChunk - 1) / kChunk);
  }

  uint32_t operator[](uint32_t participant) const {
    const Chunk* chunk = node_ ? node_->chunk[participant / kChunk] : nullptr;
    return chunk ? chunk->counter[participant % kChunk] : 0;
  }
  void raise(uint32_t participant, uint32_t value) {
    if ((*this)[participant] >= value) return;
    own_chunk(participant / kChunk)->counter[participant % kChunk] = value;
  }
  void join(const Clock& other) {
    if (node_ == other.node_ || !other.node_) return;
    if (!node_) {
      *this = other;
      return;
    }
    // The lanes of a warp often share a clock and learn the same: they shall share the result.
    const auto key =
        (reinterpret_cast<uintptr_t>(node_) ^ reinterpret_cast<uintptr_t>(other.node_));
    Join& last = joins_[key / 64 % kJoins];
    if (last.into == node_ && last.from == other.node_) {
      ++last.result->references;
      drop(std::exchange(node_, last.result));
      return;
    }
    const Clock before = node_->references > 1 ? *this : Clock();
    for (uint32_t k = 0; k < num_chunks_; ++k) join_chunk(k, other.node_->chunk[k]);
    if (!before.node_) return;
    for (Node* node : {before.node_, other.node_, node_}) ++node->references;
    for (Node* node : {last.into, last.from, last.result}) drop(node);
    last = {before.node_, other.node_, node_};
  }

 private:
  static constexpr uint32_t kChunk = 64;
  struct Chunk {
    uint32_t references;
    uint32_t counter[kChunk];
    Chunk* next;  // in the pool
  };
  struct Node {
    uint32_t references;
    Node* next;                               // in the pool
    Chunk* chunk[kMaxParticipants / kChunk];  // from num_chunks_ on: null
  };

  // A remembered join. The references that it holds keep the three from changing.
  struct Join {
    Node* into;
    Node* from;
    Node* result;
  };

  static bool covers(const Chunk* a, const Chunk* b) {
    uint32_t behind = 0;
    for (uint32_t i = 0; i < kChunk; ++i) behind |= a->counter[i] < b->counter[i];
    return behind == 0;
  }
  template <typename T>
  static T* allocate(T*& pool) {
    if (pool) return std::exchange(pool, pool->next);
    void* fresh = std::calloc(1, sizeof(T));
    if (!fresh) std::abort();
    return static_cast<T*>(fresh);
  }
  static void drop(Chunk* chunk) {
    if (chunk && --chunk->references == 0) chunk->next = std::exchange(chunk_pool_, chunk);
  }
  static void drop(Node* node) {
    if (!node || --node->references) return;
    for (uint32_t k = 0; k < num_chunks_; ++k) drop(node->chunk[k]);
    node->next = std::exchange(node_pool_, node);
  }

  void join_chunk(uint32_t k, Chunk* theirs) {
    Chunk* mine = node_->chunk[k];
    if (mine == theirs || !theirs || (mine && covers(mine, theirs))) return;
    if (!mine || covers(theirs, mine)) {
      own_node();
      drop(node_->chunk[k]);
      ++theirs->references;
      node_->chunk[k] = theirs;
      return;
    }
    Chunk* chunk = own_chunk(k);
    for (uint32_t i = 0; i < kChunk; ++i) {
      chunk->counter[i] = std::max(chunk->counter[i], theirs->counter[i]);
    }
  }
  void own_node() {
    if (node_ && node_->references == 1) return;
    Node* node = allocate(node_pool_);
    node->references = 1;
    for (uint32_t k = 0; k < num_chunks_; ++k) {
      node->chunk[k] = node_ ? node_->chunk[k] : nullptr;
      if (node->chunk[k]) ++node->chunk[k]->references;
    }
    drop(node_);
    node_ = node;
  }
  Chunk* own_chunk(uint32_t k) {
    own_node();
    Chunk*& chunk = node_->chunk[k];
    if (chunk && chunk->references == 1) return chunk;
    Chunk* fresh = allocate(chunk_pool_);
    if (chunk) {
      std::memcpy(fresh->counter, chunk->counter, sizeof fresh->counter);
      drop(chunk);
    } else {
      std::memset(fresh->counter, 0, sizeof fresh->counter);
    }
    fresh->references = 1;
    return chunk = fresh;
  }

  inline static uint32_t num_chunks_ = 1;
  inline static Chunk* chunk_pool_ = nullptr;
  inline static Node* node_pool_ = nullptr;
  static constexpr uint32_t kJoins = 16;
  inline static Join joins_[kJoins] = {};
  Node* node_ = nullptr;
};

// An access: by whom, at which count of its own clock, where in the source, and how.
struct Stamp {
  uint32_t time = 0;
  uint16_t participant = 0;
  uint16_t location : 12 = 0;  // see LocationTable
  uint16_t strong : 1 = 0;
  uint16_t gpu_scope : 1 = 0;
  uint16_t async : 1 = 0;  // by a copy engine
};

// What a participant knows. `generic` orders its own accesses; `async` is what a bulk copy that
// it issues may rely on, in each memory space; they differ until a proxy fence of the space. The
// owner's own counters are apart, so that the threads that leave a barrier share one clock.
struct View {
  static constexpr uint32_t kNobody = 0xffffffffu;
  Clock generic, async[kNumMemorySpaces];
  uint32_t owner = kNobody;
  uint32_t now = 0, now_async[kNumMemorySpaces] = {};

  bool sees(Stamp stamp) const {
    return (stamp.participant == owner ? now : generic[stamp.participant]) >= stamp.time;
  }
  bool async_sees(Stamp stamp, MemorySpace space) const {
    const auto s = static_cast<uint32_t>(space);
    return (stamp.participant == owner ? now_async[s] : async[s][stamp.participant]) >= stamp.time;
  }
  void join(const View& other) {
    // Whoever knows the owner's count also got all that the owner had published with it.
    if (other.owner != kNobody &&
        (other.owner == owner ? now : generic[other.owner]) >= other.now) {
      return;
    }
    generic.join(other.generic);
    for (uint32_t s = 0; s < kNumMemorySpaces; ++s) async[s].join(other.async[s]);
    if (other.owner == kNobody) return;
    generic.raise(other.owner, other.now);
    for (uint32_t s = 0; s < kNumMemorySpaces; ++s) async[s].raise(other.owner, other.now_async[s]);
  }
  // Makes it a set of facts that can absorb those of other owners.
  void disown() {
    if (owner == kNobody) return;
    generic.raise(owner, now);
    for (uint32_t s = 0; s < kNumMemorySpaces; ++s) async[s].raise(owner, now_async[s]);
    owner = kNobody;
  }
};

}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_SIM_VECTOR_CLOCK_H_
