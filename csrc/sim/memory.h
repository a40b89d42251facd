// SPDX-License-Identifier: Apache-2.0
// Simulated memory: values, and who stored and loaded them.
//
// A cell keeps its last few stores in coherence order and the loads since. A load returns the
// newest store that is either ordered before it or has become visible by now; every word of a
// store draws its own delay, so unordered stores are seen late, torn and out of order. Besides,
// two accesses that conflict, are not ordered and are not both strong are reported as a race.
#ifndef JAX_EP_CSRC_SIM_MEMORY_H_
#define JAX_EP_CSRC_SIM_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "csrc/sim/vector_clock.h"

namespace jax_ep::sim {

// Who accesses, and what they know.
struct Access {
  const View* view;  // null: everything (the host while nothing runs)
  Stamp stamp;
  MemorySpace space = MemorySpace::kGlobal;  // of use for a bulk copy's
};

// What a release hands to the acquire that reads its store.
struct Published {
  View view;
  uint32_t rank = 0;
  bool gpu_scope = false;
  uint64_t serial = 0;        // unique per store
  bool from_network = false;  // it is handed over by network_acquired alone
};

class Memory {
 public:
  static constexpr uint32_t kPageBytes = 4096;
  static constexpr uint32_t kLineBytes = 16;  // the largest access
  static constexpr uint32_t kWords = kLineBytes / 4;
  static constexpr uint32_t kPoison = 0xfff0dead;  // a NaN, and an absurd index

  static constexpr uint16_t kNoBlock = 0xffff;

  struct Problem {
    const char* kind = nullptr;
    const char* what = nullptr;
    Stamp other;
    uint64_t address = 0;
  };

  explicit Memory(uint64_t bytes) : pages_((bytes + kPageBytes - 1) / kPageBytes) {}

  // Everything becomes uninitialized.
  void reset();
  void poison(uint64_t address, uint64_t bytes);

  // `bytes` is 1, 2, 4, 8 or 16 and divides `address`. Returns what the store that was read
  // published (see published()), 0 if nothing.
  uint32_t load(uint64_t address, uint32_t bytes, void* to, const Access& access, uint32_t now);

  // When a load sees a newer store than it did at `then`; ~0: as far as is known, never.
  uint32_t next_visible(uint64_t address, uint32_t then);

  // The load half of an atomic: reads the newest store, which thereby becomes visible to all.
  uint32_t load_newest(uint64_t address, void* to, uint32_t now);

  // Who stored last to an address; 0: the host before the run, or nobody.
  uint16_t last_writer(uint64_t address);

  // Word i becomes visible to all at visible[i]; accesses of less than a word have one.
  void store(uint64_t address,
             uint32_t bytes,
             const void* from,
             const Access& access,
             const uint32_t* visible,
             uint32_t published = 0);

  uint32_t publish(Published published);
  const Published& published(uint32_t i) const { return published_[i]; }

  bool check_races = true;
  bool stale_reads = true;
  std::vector<uint16_t> rank_of;   // by participant
  std::vector<uint16_t> block_of;  // by participant; kNoBlock: the host
  Problem problem;                 // the first since it was cleared

 private:
  static constexpr uint32_t kStores = 3;
  static constexpr uint32_t kLoads = 3;
  struct Store {
    Stamp by;
    std::byte value[kLineBytes];
    uint32_t visible[kWords];
    uint32_t published;
  };
  // One access long: all accesses to it so far had its size, or more.
  struct Cell {
    uint8_t num_stores = 0;
    uint8_t num_loads = 0;
    bool forgot_stores = false;
    uint8_t cell_bytes = kLineBytes;  // of a line's `whole`: how the line is split
    Stamp load[kLoads];
    Store store[kStores];
  };
  // What an ordered load needs lies in the first 64 bytes.
  struct alignas(64) Line {
    uint32_t era = 0;  // of another era: uninitialized
    Cell whole;
    Cell* parts = nullptr;  // kLineBytes / cell_bytes of them if that is more than 1

    uint32_t cell_bytes() const { return whole.cell_bytes; }
    bool is_split() const { return whole.cell_bytes != kLineBytes; }
    Cell& cell(uint32_t offset) { return is_split() ? parts[offset / whole.cell_bytes] : whole; }
  };
  struct Page {
    Line lines[kPageBytes / kLineBytes];
  };

  Line& line_at(uint64_t address);
  void split(Line& line, uint32_t cell_bytes);
  void discard(Line& line);
  Cell* allocate_cells(uint32_t count);
  static void clear(Cell& cell) {
    cell.num_stores = cell.num_loads = 0;
    cell.forgot_stores = false;
  }
  uint32_t load_cell(Cell& cell, uint32_t bytes, std::byte* to, const Access& access, uint32_t now);
  // Whether the store leaves nothing of the cell's history.
  bool store_cell(Cell& cell,
                  uint32_t bytes,
                  const std::byte* from,
                  const Access& access,
                  const uint32_t* visible,
                  uint32_t published);
  void note_load(Cell& cell, const Access& access);
  bool knows_store(const Access& access, Stamp stamp) const;
  bool both_strong(Stamp a, Stamp b) const;
  void report(const char* kind, const char* what, Stamp other);
  void share(uint32_t published) {
    if (published) ++references_[published];
  }
  void release(uint32_t published);

  std::vector<std::unique_ptr<Page>> pages_;
  std::vector<Published> published_{1};
  std::vector<uint32_t> references_{0};  // stores that hold it, by published
  std::vector<uint32_t> free_published_;
  // Parts of split lines: blocks of cells, and who gave theirs back, by log2 of their number.
  std::vector<std::unique_ptr<Cell[]>> cell_blocks_;
  std::size_t cells_used_ = 0;
  std::vector<Cell*> free_cells_[5];
  uint32_t era_ = 1;
  uint64_t serials_ = 0;
  uint64_t address_ = 0;  // of the access under way
};

}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_SIM_MEMORY_H_
