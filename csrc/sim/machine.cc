// SPDX-License-Identifier: Apache-2.0
#include "csrc/sim/machine.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <utility>

#include "csrc/sim/engine.h"

namespace jax_ep::sim {
namespace {

// How the host accesses memory now, and whether it may at all.
Access host_access(Engine& e, uint32_t rank, uint64_t at, uint64_t bytes) {
  const uint64_t base = e.rank_base(rank);
  if (at < base || at - base > e.config.memory_bytes ||
      bytes > e.config.memory_bytes - (at - base)) {
    e.fail("misuse", format("host access outside the memory of rank %u", rank));
  }
  if (!e.running) return {nullptr, {}};
  Stream* stream = e.host_stream;
  const auto& streams = e.ranks[rank].streams;
  if (!stream || stream < streams.data() || stream >= streams.data() + streams.size()) {
    e.fail("misuse", format("host access to rank %u, but not in a check or call of it", rank));
    return {nullptr, {}};
  }
  Stamp stamp;
  stamp.time = stream->done.now;
  stamp.participant = static_cast<uint16_t>(stream->done.owner);
  return {&stream->done, stamp};
}

// Calls piece(address, bytes, offset) for pieces that one access can do.
template <typename Piece>
void for_pieces(uint64_t address, uint64_t bytes, const Piece& piece) {
  for (uint64_t done = 0; done < bytes;) {
    const uint64_t aligned = (address + done) | Memory::kLineBytes;
    const uint64_t size = std::min(aligned & -aligned, std::bit_floor(bytes - done));
    piece(address + done, static_cast<uint32_t>(size), done);
    done += size;
  }
}

void host_store(Engine& e, uint32_t rank, uint64_t at, const std::byte* data, uint64_t bytes) {
  const Access access = host_access(e, rank, at, bytes);
  if (!e.report.ok()) return;
  constexpr uint32_t kVisible[Memory::kWords] = {};
  for_pieces(at, bytes, [&](uint64_t address, uint32_t size, uint64_t offset) {
    e.memory.store(address, size, data + offset, access, kVisible);
    e.report_memory(access.stamp);
  });
}

}  // namespace

Machine::Machine(const Config& config) : engine_(std::make_unique<Engine>(config)) { reset(0); }
Machine::~Machine() = default;

void Machine::reset(uint64_t seed) { engine_->reset(seed); }

std::byte* Machine::memory(uint32_t rank) const {
  return engine_->arena + engine_->rank_base(rank);
}

void Machine::share(uint32_t rank, const void* address, uint64_t bytes) {
  const uint64_t at = engine_->offset_of(address);
  engine_->ranks[rank].shared.emplace_back(at, at + bytes);
}

void Machine::register_for_network(uint32_t rank, const void* address, uint64_t bytes) {
  const uint64_t at = engine_->offset_of(address);
  engine_->ranks[rank].registered.emplace_back(at, at + bytes);
}

void Machine::name_region(uint32_t /*rank*/,
                          const void* address,
                          uint64_t bytes,
                          std::string name) {
  engine_->regions.push_back({engine_->offset_of(address), bytes, std::move(name)});
}

void Machine::write(uint32_t rank, void* address, const void* data, uint64_t bytes) {
  Engine& e = *engine_;
  host_store(e, rank, e.offset_of(address), static_cast<const std::byte*>(data), bytes);
}

void Machine::fill(uint32_t rank, void* address, uint8_t value, uint64_t bytes) {
  const std::vector<std::byte> data(bytes, std::byte{value});
  write(rank, address, data.data(), bytes);
}

void Machine::read(uint32_t rank, const void* address, void* data, uint64_t bytes) {
  Engine& e = *engine_;
  const uint64_t at = e.offset_of(address);
  const Access access = host_access(e, rank, at, bytes);
  for_pieces(at, bytes, [&](uint64_t piece, uint32_t size, uint64_t offset) {
    e.memory.load(piece, size, static_cast<std::byte*>(data) + offset, access, e.time);
    if (access.view) e.report_memory(access.stamp);
  });
  e.memory.problem = {};  // outside a run, what nothing has stored may be looked at
}

void Machine::poison(uint32_t rank, void* address, uint64_t bytes) {
  Engine& e = *engine_;
  const uint64_t at = e.offset_of(address);
  host_access(e, rank, at, bytes);
  if (e.report.ok()) e.memory.poison(at, bytes);
}

void Machine::launch(uint32_t rank,
                     uint32_t stream,
                     LaunchShape shape,
                     std::function<void()> kernel) {
  Engine& e = *engine_;
  const Config& config = e.config;
  if (shape.blocks == 0 || shape.blocks > config.max_blocks || shape.threads == 0 ||
      shape.threads > config.max_threads || shape.threads % kWarpLanes ||
      shape.shared_bytes > config.shared_bytes) {
    e.fail("misuse",
           format("launch of %u blocks of %u threads with %u bytes: see Config",
                  shape.blocks,
                  shape.threads,
                  shape.shared_bytes));
    return;
  }
  Stream& target = e.ranks[rank].streams[stream];
  target.ops.push_back({shape, std::move(kernel), {}});
  Stream* const host = e.host_stream;
  if (host == nullptr || host == &target) return;
  target.done.generic.join(host->done.generic);
  target.done.generic.raise(host->done.owner, host->done.now++);
  e.advance_stream(rank, stream);
  e.host_stream = host;
}

void Machine::check(uint32_t rank, uint32_t stream, std::function<std::string()> check) {
  engine_->ranks[rank].streams[stream].ops.push_back({{}, {}, std::move(check)});
}

void Machine::host_call(uint32_t rank, uint32_t stream, std::function<void()> call) {
  check(rank, stream, [call = std::move(call)] {
    call();
    return std::string();
  });
}

void Machine::kill_before(uint32_t rank, uint64_t stores) {
  engine_->ranks[rank].stores_to_live = stores;
}

bool Machine::was_killed(uint32_t rank) const { return engine_->ranks[rank].trapped; }

Report Machine::run() { return engine_->run(); }

}  // namespace jax_ep::sim
