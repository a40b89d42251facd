// SPDX-License-Identifier: Apache-2.0
#include "csrc/sim/memory.h"

#include <algorithm>
#include <bit>
#include <cstring>

namespace jax_ep::sim {
namespace {

constexpr std::size_t kCellBlock = 4096;

bool knows(const Access& access, Stamp stamp) { return !access.view || access.view->sees(stamp); }

}  // namespace

void Memory::reset() {
  ++era_;
  published_.assign(1, {});
  references_.assign(1, 0);
  free_published_.clear();
  cells_used_ = 0;
  for (auto& cells : free_cells_) cells.clear();
  problem = {};
}

void Memory::poison(uint64_t address, uint64_t bytes) {
  const uint64_t end = address + bytes;
  while (address < end) {
    const uint64_t next = (address / kLineBytes + 1) * kLineBytes;
    Page* page = pages_[address / kPageBytes].get();
    if (!page) {
      address = (address / kPageBytes + 1) * kPageBytes;
      continue;
    }
    Line& line = line_at(address);
    if (address % kLineBytes == 0 && next <= end) {
      discard(line);
    } else {
      // Part of a line: only whole bytes can be told apart.
      split(line, 1);
      for (; address < std::min(next, end); ++address) {
        Cell& cell = line.parts[address % kLineBytes];
        for (uint32_t i = 0; i < cell.num_stores; ++i) release(cell.store[i].published);
        clear(cell);
      }
    }
    address = next;
  }
}

Memory::Line& Memory::line_at(uint64_t address) {
  auto& page = pages_[address / kPageBytes];
  if (!page) page = std::make_unique<Page>();
  Line& line = page->lines[address % kPageBytes / kLineBytes];
  if (line.era != era_) {
    line.era = era_;
    line.whole.cell_bytes = kLineBytes;
    clear(line.whole);
  }
  address_ = address;
  return line;
}

Memory::Cell* Memory::allocate_cells(uint32_t count) {
  auto& free_cells = free_cells_[std::bit_width(count) - 1];
  if (!free_cells.empty()) {
    Cell* cells = free_cells.back();
    free_cells.pop_back();
    return cells;
  }
  // kCellBlock is a multiple of 16, the most that is asked for, but not of all mixtures.
  if (cells_used_ % kCellBlock + count > kCellBlock) {
    cells_used_ = (cells_used_ / kCellBlock + 1) * kCellBlock;
  }
  const std::size_t block = cells_used_ / kCellBlock;
  if (block == cell_blocks_.size()) cell_blocks_.push_back(std::make_unique<Cell[]>(kCellBlock));
  Cell* cells = &cell_blocks_[block][cells_used_ % kCellBlock];
  cells_used_ += count;
  return cells;
}

// Gives every `cell_bytes` of the line a history of their own, all as theirs so far.
void Memory::split(Line& line, uint32_t cell_bytes) {
  if (line.cell_bytes() <= cell_bytes) return;
  const uint32_t count = kLineBytes / cell_bytes;
  Cell* parts = allocate_cells(count);
  for (uint32_t k = 0; k < count; ++k) {
    const uint32_t offset = k * cell_bytes;
    const Cell& from = line.cell(offset);
    const uint32_t inside = offset % line.cell_bytes();
    Cell& to = parts[k];
    to = from;
    for (uint32_t i = 0; i < from.num_stores; ++i) {
      for (uint32_t w = 0; w < std::max(cell_bytes / 4, 1u); ++w) {
        to.store[i].visible[w] = from.store[i].visible[inside / 4 + w];
      }
      std::memcpy(to.store[i].value, from.store[i].value + inside, cell_bytes);
      share(to.store[i].published);
    }
  }
  const uint32_t era = line.era;
  discard(line);
  line.era = era;
  line.parts = parts;
  line.whole.cell_bytes = static_cast<uint8_t>(cell_bytes);
}

void Memory::discard(Line& line) {
  const uint32_t count = kLineBytes / line.cell_bytes();
  Cell* cells = line.is_split() ? line.parts : &line.whole;
  for (uint32_t k = 0; k < count; ++k) {
    for (uint32_t i = 0; i < cells[k].num_stores; ++i) release(cells[k].store[i].published);
  }
  if (line.is_split()) free_cells_[std::bit_width(count) - 1].push_back(line.parts);
  line.whole.cell_bytes = kLineBytes;
  line.era = 0;
}

uint32_t Memory::load(
    uint64_t address, uint32_t bytes, void* to, const Access& access, uint32_t now) {
  Line& line = line_at(address);
  split(line, bytes);
  const auto offset = static_cast<uint32_t>(address % kLineBytes);
  const uint32_t step = line.cell_bytes();
  uint32_t published = 0;
  for (uint32_t k = 0; k < bytes; k += step) {
    published =
        load_cell(line.cell(offset + k), step, static_cast<std::byte*>(to) + k, access, now);
  }
  return published;
}

uint32_t Memory::load_cell(
    Cell& cell, uint32_t bytes, std::byte* to, const Access& access, uint32_t now) {
  const uint32_t words = std::max(bytes / 4, 1u);
  const uint32_t word_bytes = std::min(bytes, 4u);
  if (!cell.num_stores) {
    report("uninitialized", "load of what nothing has stored", access.stamp);
    for (uint32_t w = 0; w < words; ++w) std::memcpy(to + 4 * w, &kPoison, word_bytes);
    return 0;
  }
  int32_t oldest = cell.forgot_stores ? 0 : -1;  // the oldest store that it may return; -1: none
  for (int32_t i = 0; i < cell.num_stores; ++i) {
    if (knows_store(access, cell.store[i].by)) {
      oldest = i;
    } else if (check_races && !both_strong(cell.store[i].by, access.stamp)) {
      report("race", "load races with store", cell.store[i].by);
    }
  }
  note_load(cell, access);
  uint32_t published = 0;
  for (uint32_t w = 0; w < words; ++w) {
    int32_t i = cell.num_stores - 1;
    while (stale_reads && i > oldest && cell.store[i].visible[w] > now) --i;
    if (i < 0) {
      std::memcpy(to + 4 * w, &kPoison, word_bytes);
      continue;
    }
    std::memcpy(to + 4 * w, cell.store[i].value + 4 * w, word_bytes);
    published = cell.store[i].published;
  }
  return published;
}

uint32_t Memory::next_visible(uint64_t address, uint32_t then) {
  Line& line = line_at(address);
  const Cell& cell = line.cell(static_cast<uint32_t>(address % kLineBytes));
  const auto word = static_cast<uint32_t>(address % line.cell_bytes() / 4);
  uint32_t next = ~uint32_t{0};
  for (uint32_t i = cell.num_stores; i-- > 0 && cell.store[i].visible[word] > then;) {
    next = std::min(next, cell.store[i].visible[word]);
  }
  return next;
}

uint32_t Memory::load_newest(uint64_t address, void* to, uint32_t now) {
  Line& line = line_at(address);
  split(line, 4);
  const auto offset = static_cast<uint32_t>(address % kLineBytes);
  uint32_t published = 0;
  for (uint32_t k = 0; k < 4; k += line.cell_bytes()) {
    Cell& cell = line.cell(offset + k);
    if (!cell.num_stores) {
      report("uninitialized", "atomic on what nothing has stored", {});
      return 0;
    }
    Store& newest = cell.store[cell.num_stores - 1];
    newest.visible[0] = std::min(newest.visible[0], now);
    std::memcpy(static_cast<std::byte*>(to) + k, newest.value, std::min(line.cell_bytes(), 4u));
    published = newest.published;
  }
  return published;
}

uint16_t Memory::last_writer(uint64_t address) {
  const Cell& cell = line_at(address).cell(static_cast<uint32_t>(address % kLineBytes));
  return cell.num_stores > 0 ? cell.store[cell.num_stores - 1].by.participant : uint16_t{0};
}

void Memory::store(uint64_t address,
                   uint32_t bytes,
                   const void* from,
                   const Access& access,
                   const uint32_t* visible,
                   uint32_t published) {
  Line& line = line_at(address);
  split(line, bytes);
  const auto offset = static_cast<uint32_t>(address % kLineBytes);
  const uint32_t step = line.cell_bytes();
  const auto* bytes_from = static_cast<const std::byte*>(from);
  bool all_new = true;
  for (uint32_t k = 0; k < bytes; k += step) {
    Cell& cell = line.cell(offset + k);
    all_new &= store_cell(cell, step, bytes_from + k, access, visible + k / 4, published);
  }
  if (bytes == kLineBytes && step != bytes && all_new) {
    discard(line);
    line.era = era_;
    clear(line.whole);
    store_cell(line.whole, bytes, bytes_from, access, visible, published);
    line.whole.forgot_stores = true;
  }
}

bool Memory::store_cell(Cell& cell,
                        uint32_t bytes,
                        const std::byte* from,
                        const Access& access,
                        const uint32_t* visible,
                        uint32_t published) {
  bool knows_all = true;
  if (check_races) {
    for (uint32_t i = 0; i < cell.num_stores; ++i) {
      const Stamp other = cell.store[i].by;
      if (knows_store(access, other)) continue;
      knows_all = false;
      if (!both_strong(other, access.stamp)) report("race", "store races with store", other);
    }
    // A load before an overwriting bulk copy needs no proxy fence.
    for (uint32_t i = 0; i < cell.num_loads; ++i) {
      if (!knows(access, cell.load[i]) && !both_strong(cell.load[i], access.stamp)) {
        report("race", "store races with load", cell.load[i]);
      }
    }
  }
  cell.num_loads = 0;
  // Who reads a weak store without knowing of it races with it, whatever value it gets: what was
  // there before no longer matters. Shorter histories are faster.
  const bool all_new = check_races && knows_all && !access.stamp.strong;
  if (all_new && cell.num_stores) {
    for (uint32_t i = 0; i < cell.num_stores; ++i) release(cell.store[i].published);
    cell.num_stores = 0;
    cell.forgot_stores = true;
  }
  if (cell.num_stores == kStores) {
    release(cell.store[0].published);
    std::copy(cell.store + 1, cell.store + kStores, cell.store);
    --cell.num_stores;
    cell.forgot_stores = true;
  }
  Store& store = cell.store[cell.num_stores++];
  store.by = access.stamp;
  store.published = published;
  share(published);
  std::memcpy(store.value, from, bytes);
  for (uint32_t w = 0; w < std::max(bytes / 4, 1u); ++w) store.visible[w] = visible[w];
  return all_new;
}

// Remembers a load; those that it is ordered after are implied by it.
void Memory::note_load(Cell& cell, const Access& access) {
  uint32_t kept = 0;
  for (uint32_t i = 0; i < cell.num_loads; ++i) {
    const Stamp other = cell.load[i];
    const bool implied = other.participant == access.stamp.participant || knows(access, other);
    if (!implied) cell.load[kept++] = other;
  }
  if (kept == kLoads) --kept;  // forgetting one may miss a race, but never invents one
  cell.load[kept] = access.stamp;
  cell.num_loads = static_cast<uint8_t>(kept + 1);
}

// A store reaches a bulk copy only through a proxy fence, unless copies of one block did both.
bool Memory::knows_store(const Access& access, Stamp stamp) const {
  if (!access.view || !access.stamp.async) return knows(access, stamp);
  if (stamp.async && block_of[stamp.participant] == block_of[access.stamp.participant]) {
    return access.view->sees(stamp);
  }
  return access.view->async_sees(stamp, access.space);
}

bool Memory::both_strong(Stamp a, Stamp b) const {
  if (!a.strong || !b.strong) return false;
  return (!a.gpu_scope && !b.gpu_scope) || rank_of[a.participant] == rank_of[b.participant];
}

void Memory::report(const char* kind, const char* what, Stamp other) {
  if (!problem.kind) problem = {kind, what, other, address_};
}

uint32_t Memory::publish(Published published) {
  published.serial = ++serials_;
  if (free_published_.empty()) {
    published_.push_back(std::move(published));
    references_.push_back(0);
    return static_cast<uint32_t>(published_.size() - 1);
  }
  const uint32_t i = free_published_.back();
  free_published_.pop_back();
  published_[i] = std::move(published);
  return i;
}

void Memory::release(uint32_t published) {
  if (!published || --references_[published]) return;
  published_[published] = {};
  free_published_.push_back(published);
}

}  // namespace jax_ep::sim
