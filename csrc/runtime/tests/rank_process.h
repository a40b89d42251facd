// SPDX-License-Identifier: Apache-2.0
// Processes that hold ranks, as those of a JAX program do. A test tells each what to do and looks
// at what comes of it.
#ifndef JAX_EP_CSRC_RUNTIME_TESTS_RANK_PROCESS_H_
#define JAX_EP_CSRC_RUNTIME_TESTS_RANK_PROCESS_H_

#include <sys/types.h>

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "csrc/core/status.h"

namespace jax_ep {

// A group of which the process has one rank; the rest of its config is of runtime_fixture.h.
struct RankOfProcess {
  int32_t rank = 0;
  int32_t num_ranks = 2;
  int32_t device = 0;
  int32_t group_index = 0;
  uint64_t nonce = 1;
  int64_t max_tokens = 4;
};

class RankProcess {
 public:
  // Starts this program again, whose main() then calls serve_ranks.
  RankProcess();
  // Ends the process, and fails the test if it did not end well.
  ~RankProcess();
  RankProcess(const RankProcess&) = delete;
  RankProcess& operator=(const RankProcess&) = delete;

  // A command of fake_cudart/commands.h.
  std::string tell(const std::string& command);
  // The same, whose answer has lines.
  std::vector<std::string> list(const std::string& command);

  // Its groups have numbers of the test's choice. As in CudaGroup:
  Status create(int group, const RankOfProcess& rank);
  std::string handle(int group);  // as text
  Status connect(int group, const std::vector<std::string>& handles);
  Status disconnect(int group, double limit_s = std::numeric_limits<double>::infinity());
  void leave_heaps(int group);
  void destroy(int group);

  // What kernels would do: they store to a rank's heap, as this process has it mapped, and load.
  void store(int group, int32_t rank, int64_t offset, const std::string& word);
  std::string load(int group, int32_t rank, int64_t offset, size_t bytes);

  // Calls disconnect on a thread; returns at once. `join` waits for it.
  void begin_disconnect(int group);
  void join();

  // Whether kernels of recorded graphs are told that the group is closed.
  bool told_closed(int group);

  // SMs that a launch of the rank may use.
  int sms(int group);

  // As a user, or the system when memory is short.
  void kill();
  [[nodiscard]] pid_t pid() const { return pid_; }

 private:
  std::string ask(const std::string& line);
  Status ask_status(const std::string& line);

  pid_t pid_ = -1;
  int to_ = -1;
  int from_ = -1;
};

// Bytes as text, and back.
std::string to_hex(const std::string& bytes);
std::string from_hex(const std::string& text);

// What such a process runs; returns its exit status.
int serve_ranks();

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_RUNTIME_TESTS_RANK_PROCESS_H_
