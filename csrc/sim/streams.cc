// SPDX-License-Identifier: Apache-2.0
// Streams, kernels and blocks: when they start and end, and what each knows then.
#include <algorithm>

#include "csrc/sim/engine.h"

namespace jax_ep::sim {

void Engine::advance_stream(uint32_t rank, uint32_t index) {
  Stream& stream = ranks[rank].streams[index];
  while (report.ok() && stream.blocks_alive == 0 && !stream.ops.empty()) {
    StreamOp op = std::move(stream.ops.front());
    stream.ops.pop_front();
    if (op.kernel) {
      stream.running = std::move(op);
      ++stream.kernels;
      // A kernel knows all that its stream did before.
      stream.before = stream.done.generic;
      stream.before.raise(stream.done.owner, stream.done.now++);
      stream.blocks_alive = stream.blocks_waiting = stream.running.shape.blocks;
      start_blocks(rank);
      return;
    }
    host_stream = &stream;
    const std::string error = op.check();
    host_stream = nullptr;
    if (!error.empty()) {
      fail("wrong result", format("rank %u stream %u: ", rank, index) + error);
    }
  }
}

// Starts blocks of the rank's kernels while there is room for them.
void Engine::start_blocks(uint32_t rank) {
  Rank& owner = ranks[rank];
  while (owner.blocks_resident < config.resident_blocks) {
    std::vector<uint32_t> waiting_streams;
    for (uint32_t s = 0; s < config.streams; ++s) {
      if (owner.streams[s].blocks_waiting) waiting_streams.push_back(s);
    }
    if (waiting_streams.empty()) return;
    const auto n = static_cast<uint32_t>(waiting_streams.size());
    start_block(rank, waiting_streams[n == 1 ? 0 : random.below(n)]);
  }
}

void Engine::start_block(uint32_t rank, uint32_t stream_index) {
  Stream& stream = ranks[rank].streams[stream_index];
  const LaunchShape& shape = stream.running.shape;
  const uint32_t index = shape.blocks - stream.blocks_waiting--;
  const uint32_t slot = block_slot(rank, stream_index, index);
  Block& block = blocks[slot];
  block.index = index;
  block.alive = shape.threads;
  block.killed = false;
  block.weight = 256;
  block.shape = shape;
  block.mbars.clear();
  for (BarrierState& barrier : block.barriers) barrier.arrived.clear();
  for (CollectiveState& warp : block.warps) warp.arrived = 0;
  memory.poison(shared_base(block), shape.shared_bytes);
  active.push_back(&block);
  ++ranks[rank].blocks_resident;
  for (uint32_t t = 0; t < shape.threads; ++t) {
    const uint32_t i = slot * config.max_threads + t;
    Thread& thread = threads[i];
    thread.id = {rank, stream_index, index, t, shape.blocks, shape.threads};
    thread.block = &block;
    thread.view.generic = stream.before;
    std::fill_n(thread.view.async, kNumMemorySpaces, stream.before);
    std::fill_n(thread.view.now_async, kNumMemorySpaces, thread.view.now++);
    thread.location = 0;
    thread.what = "";
    thread.watch = thread.watch_too = kNothing;
    thread.polled = thread.last_strong = 0;
    thread.waits_for = nullptr;
    thread.sync = nullptr;
    thread.has_fence = false;
    thread.stores.groups.clear();
    thread.async_loads.groups.clear();
    prepare_fiber(thread.context, stacks.at(i), &Engine::enter);
    make_ready(thread);
  }
}

void Engine::enter() {
  Engine& e = *engine;
  FiberContext other;
  fiber_entered(e.from_scheduler ? e.scheduler : other);
  Thread& thread = *e.current;
  try {
    e.ranks[thread.id.rank].streams[thread.id.stream].running.kernel();
  } catch (const Ended&) {
    // The failure is in the report.
  }
  thread.state = ThreadState::kDone;
  swap_fibers(thread.context, e.scheduler, /*final=*/true);
}

void Engine::retire(Thread& thread) {
  Block& block = *thread.block;
  if (thread.stores.issued != thread.stores.waited) {
    fail("exit", name(thread) + " ended before its bulk stores were written: bulk_wait<0> missing");
    return;
  }
  if (thread.async_loads.issued != thread.async_loads.waited) {
    fail("exit", name(thread) + " ended before its async loads: async_wait<0> missing");
    return;
  }
  View& done = ranks[block.rank].streams[block.stream].done;
  done.generic.join(thread.view.generic);
  done.generic.raise(thread.view.owner, thread.view.now);
  if (--block.alive == 0) retire_block(block);
}

void Engine::retire_block(Block& block) {
  for (const BulkCopy& copy : copies) {
    if (copy.issuer->block != &block) continue;
    fail("exit", name(*copy.issuer) + " ended before its bulk loads were written");
    return;
  }
  Stream& stream = ranks[block.rank].streams[block.stream];
  for (const auto& [address, mbar] : block.mbars) {
    stream.done.generic.raise(mbar.participant, mbar.issued);
  }
  active.erase(std::find(active.begin(), active.end(), &block));
  --ranks[block.rank].blocks_resident;
  start_blocks(block.rank);
  if (--stream.blocks_alive == 0) advance_stream(block.rank, block.stream);
}

// A trap ends the rank's context: all that runs there, and all that was to run.
void Engine::kill_rank(uint32_t rank) {
  ranks[rank].trapped = true;
  for (auto& [address, parked] : watchers) {
    std::erase_if(parked, [rank](const Thread* thread) { return thread->id.rank == rank; });
  }
  std::erase_if(copies, [rank](const BulkCopy& copy) { return copy.issuer->id.rank == rank; });
  // The network may have taken a message, all of it or a part.
  std::erase_if(messages, [this, rank](const NetworkMessage& message) {
    return message.rank == rank && random.chance(1, 2);
  });
  for (Block* block : std::vector<Block*>(active)) {
    if (block->rank != rank) continue;
    num_ready -= static_cast<uint32_t>(block->ready.size());
    block->ready.clear();
    block->spinning.clear();
    block->alive = 0;
    block->killed = true;
    const auto slot = static_cast<uint32_t>(block - blocks.data());
    for (uint32_t t = 0; t < block->shape.threads; ++t) {
      threads[slot * config.max_threads + t].state = ThreadState::kDone;
    }
    std::erase(active, block);
  }
  for (Stream& stream : ranks[rank].streams) {
    stream.ops.clear();
    stream.blocks_alive = stream.blocks_waiting = 0;
  }
}

// The host waited for all: what is appended next comes after all that was done.
void Engine::join_streams() {
  Clock all;
  for (Rank& rank : ranks) {
    for (Stream& stream : rank.streams) {
      stream.done.disown();
      all.join(stream.done.generic);
    }
  }
  for (uint32_t r = 0; r < config.num_ranks; ++r) {
    for (uint32_t s = 0; s < config.streams; ++s) {
      View& done = ranks[r].streams[s].done;
      done.owner = host_participant(r, s);
      done.generic = all;
      ++done.now;
    }
  }
}

}  // namespace jax_ep::sim
