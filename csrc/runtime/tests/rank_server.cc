// SPDX-License-Identifier: Apache-2.0
// The other side of rank_process.h.
#include <cstring>
#include <functional>
#include <iostream>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "csrc/runtime/cuda_group.h"
#include "csrc/runtime/tests/fake_cudart/commands.h"
#include "csrc/runtime/tests/fake_cudart/fake_cudart.h"
#include "csrc/runtime/tests/rank_process.h"
#include "csrc/runtime/tests/runtime_fixture.h"

namespace jax_ep {
namespace {

using Words = std::vector<std::string>;

std::string text_of(const Status& status) {
  return std::to_string(static_cast<int>(status.code())) + " " + status.message();
}

class Server {
 public:
  std::string answer(const std::string& line) {
    const Words words = fake_cudart::words_of(line);
    if (const auto it = commands_.find(words.at(0)); it != commands_.end()) {
      return it->second(words);
    }
    return fake_cudart::run_command(line).value_or("unknown command: " + line);
  }

 private:
  std::string create(const Words& words) {
    CudaGroupConfig config{.group = group_settings(std::stoi(words.at(3))),
                           .ranks = {{.device = std::stoi(words.at(4)),
                                      .group_index = std::stoi(words.at(5)),
                                      .rank = std::stoi(words.at(2))}}};
    config.group.name = "EpGroup " + words.at(1);
    config.group.nonce = std::stoull(words.at(6));
    config.group.heap.max_tokens = std::stoll(words.at(7));
    return text_of(CudaGroup::create(std::move(config), groups_[words.at(1)]));
  }

  std::string handle(const Words& words) {
    return to_hex(group(words).ranks()[0].handle().to_bytes());
  }

  std::string connect(const Words& words) {
    std::vector<HeapHandle> handles(words.size() - 2);
    for (size_t i = 0; i < handles.size(); ++i) {
      const Status status = HeapHandle::from_bytes(from_hex(words[i + 2]), handles[i]);
      if (!status.ok()) return text_of(status);
    }
    const LocalRank& local = group(words).config().ranks[0];
    return text_of(group(words).connect(local.group_index, local.rank, handles));
  }

  std::byte* address(const Words& words) {
    const RankView& view = group(words).ranks()[0].view();
    return view.heap[std::stoi(words.at(2))] + std::stoll(words.at(3));
  }

  CudaGroup& group(const Words& words) { return *groups_.at(words.at(1)); }

  std::map<std::string, std::unique_ptr<CudaGroup>> groups_;
  std::thread thread_;
  const std::map<std::string, std::function<std::string(const Words&)>> commands_{
      {"create", [this](const Words& words) { return create(words); }},
      {"handle", [this](const Words& words) { return handle(words); }},
      {"connect", [this](const Words& words) { return connect(words); }},
      {"disconnect",
       [this](const Words& words) {
         return text_of(group(words).disconnect(std::stod(words.at(2))));
       }},
      {"begin_disconnect",
       [this](const Words& words) {
         thread_ = std::thread([this, words] {
           const Status status = group(words).disconnect(kNoLimit);
           if (!status.ok()) std::cerr << status.message() << '\n';
         });
         return std::string();
       }},
      {"leave_heaps",
       [this](const Words& words) {
         group(words).leave_heaps();
         return std::string();
       }},
      {"closed",
       [this](const Words& words) {
         return std::to_string(group(words).ranks()[0].view().control[0]);
       }},
      {"join",
       [this](const Words&) {
         thread_.join();
         return std::string();
       }},
      {"sms",
       [this](const Words& words) {
         return std::to_string(group(words).ranks()[0].sm_budget().available);
       }},
      {"destroy",
       [this](const Words& words) {
         groups_.erase(words.at(1));
         return std::string();
       }},
      {"store",
       [this](const Words& words) {
         std::memcpy(address(words), words.at(4).data(), words.at(4).size());
         return std::string();
       }},
      {"load",
       [this](const Words& words) {
         return std::string(reinterpret_cast<const char*>(address(words)), std::stoul(words.at(4)));
       }},
  };
};

}  // namespace

int serve_ranks() {
  // Of two devices: rank r has device r, unless a test says otherwise.
  fake_cudart::run_command("reset 2 0");
  Server server;
  for (std::string line; std::getline(std::cin, line);) {
    const std::string answer = server.answer(line);
    std::cout << answer.size() << '\n' << answer << std::flush;
  }
  return 0;
}

}  // namespace jax_ep
