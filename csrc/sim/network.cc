// SPDX-License-Identifier: Apache-2.0
// The network between nodes, as cruel as its contract allows (csrc/device/transport/transport.h): a
// message's bytes are read piece by piece some time after the call, and written piece by piece
// later still, in any order and among those of other messages; its word changes some time after the
// last. Nothing but the acquire of that word tells anybody that the bytes are there, and that the
// source has been read. Each word has two participants with clocks of their own, for what its
// messages read and what they write.
#include "csrc/sim/engine.h"

namespace jax_ep::sim {
namespace {

constexpr uint32_t kPieceBytes = Memory::kLineBytes;
constexpr uint32_t kWordBytes = 8;
constexpr uint32_t kMaxStepsAtOnce = 16;  // pieces that are read or written before others may act

Stamp network_stamp(uint16_t participant, const NetworkMessage& message, bool strong) {
  Stamp stamp;
  stamp.time = message.sequence;
  stamp.participant = participant;
  stamp.location = message.location & 0xfff;
  stamp.strong = strong ? 1 : 0;
  return stamp;
}

// The offset of registered memory of any rank; fails where there is none.
uint64_t registered(Engine& e, const void* address, uint64_t bytes) {
  const uint64_t at = e.offset_of(address);
  const uint64_t owner = at >> e.rank_shift;
  if (owner >= e.config.num_ranks) e.fail_here("address", "a message to no rank's memory");
  for (const auto& [begin, end] : e.ranks[owner].registered) {
    if (begin <= at && at + bytes <= end) return at;
  }
  e.fail_here("address", "not registered for the network: " + e.place(at));
}

// Counts a message of a word; fails if its rank cannot know that the one before has appeared.
uint32_t next_message(Engine& e, const Thread& thread, uint64_t address) {
  const uint32_t rank = thread.id.rank;
  auto [it, is_first] = e.network_words.try_emplace(address);
  NetworkWord& word = it->second;
  if (is_first) {
    const uint64_t key = uint64_t{1} << 62 | address << 1;
    const Block& block = *thread.block;
    word.rank = rank;
    word.reads_as = e.participant(key, block, format("the network's read for rank %u", rank));
    word.writes_as = e.participant(key | 1, block, format("the network's write for rank %u", rank));
  }
  if (word.rank != rank) {
    e.fail_here("misuse",
                format("the word is of rank %u's messages: ", word.rank) + e.place(address));
  }
  if (thread.view.generic[word.writes_as] < word.messages) {
    e.fail_here("misuse", "the last message of this word may be in flight: " + e.place(address));
  }
  return ++word.messages;
}

uint32_t take_any(Random& random, std::vector<uint32_t>& from) {
  const uint32_t i = random.below(static_cast<uint32_t>(from.size()));
  const uint32_t taken = from[i];
  from.erase(from.begin() + i);
  return taken;
}

}  // namespace

namespace ops {

void network_put(void* to,
                 const void* from,
                 uint32_t bytes,
                 void* word,
                 uint64_t before,
                 uint64_t after,
                 Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  NetworkMessage message{};
  message.word = registered(e, word, kWordBytes);
  if (message.word % kWordBytes != 0) e.fail_here("address", "misaligned word of a message");
  if (bytes % kPieceBytes != 0) {
    e.fail_here("address", format("a message of %u bytes, not a multiple of 16", bytes));
  }
  if (bytes > 0) {
    message.target = registered(e, to, bytes);
    message.source = registered(e, from, bytes);
    const bool aligned = message.target % kPieceBytes == 0 && message.source % kPieceBytes == 0;
    if (!aligned) e.fail_here("address", "misaligned bytes of a message");
    if (message.target >> e.rank_shift != message.word >> e.rank_shift) {
      e.fail_here("address", "bytes and word of a message are of two ranks");
    }
    if (message.source >> e.rank_shift != thread.id.rank) {
      e.fail_here("address", "the source of a message is another rank's");
    }
  }
  message.before = before;
  message.after = after;
  message.sequence = next_message(e, thread, message.word);
  message.view = thread.view;
  ++thread.view.now;  // what the issuer does next is not ordered before the message
  message.rank = thread.id.rank;
  message.location = thread.location;
  message.data.resize(bytes);
  for (uint32_t i = 0; i < bytes / kPieceBytes; ++i) message.to_fetch.push_back(i);
  e.messages.push_back(std::move(message));
}

void network_acquired(const void* word, Location at) {
  Engine& e = *engine;
  Thread& thread = e.step(at);
  const auto it = thread.from_network.find(e.offset_of(word));
  if (it == thread.from_network.end()) return;  // the network has not changed it, or long ago
  thread.view.join(it->second);
  thread.sync = "network_acquired";
  thread.sync_location = thread.location;
}

}  // namespace ops

void Engine::advance_messages() {
  const uint32_t index = random.below(static_cast<uint32_t>(messages.size()));
  NetworkMessage& message = messages[index];
  for (uint32_t steps = 1 + random.below(kMaxStepsAtOnce); steps > 0; --steps) {
    const bool can_fetch = !message.to_fetch.empty();
    const bool can_land = !message.to_land.empty();
    if (!can_fetch && !can_land) break;
    if (can_fetch && (!can_land || random.chance(1, 2))) {
      fetch_piece(message);
    } else {
      land_piece(message);
    }
    if (!report.ok()) return;
  }
  if (!message.to_fetch.empty() || !message.to_land.empty()) return;
  if (random.chance(1, 2)) return;  // the word takes its time
  change_word(message);
  if (&message != &messages.back()) message = std::move(messages.back());
  messages.pop_back();
}

void Engine::fetch_piece(NetworkMessage& message) {
  const uint32_t at = take_any(random, message.to_fetch) * kPieceBytes;
  const Access access{&message.view,
                      network_stamp(network_words[message.word].reads_as, message, false)};
  memory.load(message.source + at, kPieceBytes, message.data.data() + at, access, time);
  report_memory(access.stamp);
  message.to_land.push_back(at / kPieceBytes);
}

void Engine::land_piece(NetworkMessage& message) {
  const uint32_t at = take_any(random, message.to_land) * kPieceBytes;
  const Access access{&message.view,
                      network_stamp(network_words[message.word].writes_as, message, false)};
  uint32_t visible[Memory::kWords];
  for (uint32_t& word : visible) word = draw_visible();
  memory.store(message.target + at, kPieceBytes, message.data.data() + at, access, visible);
  report_memory(access.stamp);
}

// Whoever acquires the word knows what the issuer knew, and that the network is done.
void Engine::change_word(NetworkMessage& message) {
  const NetworkWord& word = network_words[message.word];
  uint64_t value = 0;
  const Access of_all{nullptr, {}};
  memory.load(message.word, kWordBytes, &value, of_all, time);
  const bool is_stored_to =
      message.sequence > 1 && memory.last_writer(message.word) != word.writes_as;
  if (value != message.before || is_stored_to) {
    fail("misuse",
         format("the word of a message of rank %u holds %llu, and not %llu%s: ",
                message.rank,
                static_cast<unsigned long long>(value),
                static_cast<unsigned long long>(message.before),
                is_stored_to ? ", and is not the network's alone" : "") +
             place(message.word));
    return;
  }
  Published published{message.view, message.rank, false, 0, true};
  published.view.disown();
  published.view.generic.raise(word.reads_as, message.sequence);
  published.view.generic.raise(word.writes_as, message.sequence);
  const Access access{&message.view, network_stamp(word.writes_as, message, true)};
  uint32_t visible[Memory::kWords] = {};
  visible[0] = visible[1] = draw_visible();
  memory.store(message.word,
               kWordBytes,
               &message.after,
               access,
               visible,
               memory.publish(std::move(published)));
  report_memory(access.stamp);
  wake_watchers(message.word, visible[0]);
}

}  // namespace jax_ep::sim
