// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/tests/rank_process.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <cstdlib>
#include <sstream>

namespace jax_ep {
namespace {

// A pipe's ends, for reading and for writing; closed in processes that are started.
std::array<int, 2> make_pipe() {
  std::array<int, 2> ends{-1, -1};
  EXPECT_EQ(pipe2(ends.data(), O_CLOEXEC), 0);
  return ends;
}

std::string read_line(int descriptor) {
  std::string line;
  for (char next = 0; read(descriptor, &next, 1) == 1 && next != '\n';) line += next;
  return line;
}

std::string read_bytes(int descriptor, size_t count) {
  std::string bytes(count, '\0');
  size_t done = 0;
  while (done < count) {
    const ssize_t got = read(descriptor, bytes.data() + done, count - done);
    if (got <= 0) break;
    done += static_cast<size_t>(got);
  }
  return bytes;
}

std::string join_words(const std::vector<std::string>& words) {
  std::string line;
  for (const std::string& word : words) line += " " + word;
  return line;
}

}  // namespace

std::string to_hex(const std::string& bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const char byte : bytes) {
    text += kDigits[static_cast<unsigned char>(byte) >> 4];
    text += kDigits[static_cast<unsigned char>(byte) & 0xF];
  }
  return text;
}

std::string from_hex(const std::string& text) {
  std::string bytes;
  for (size_t i = 0; i + 1 < text.size(); i += 2) {
    bytes += static_cast<char>(std::stoi(text.substr(i, 2), nullptr, 16));
  }
  return bytes;
}

RankProcess::RankProcess() {
  signal(SIGPIPE, SIG_IGN);  // of a process that was killed: `ask` finds it out
  const std::array<int, 2> in = make_pipe();
  const std::array<int, 2> out = make_pipe();
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, in[0], STDIN_FILENO);
  posix_spawn_file_actions_adddup2(&actions, out[1], STDOUT_FILENO);
  std::string name = "rank";
  std::string option = "--rank-process";
  char* const arguments[] = {name.data(), option.data(), nullptr};
  EXPECT_EQ(posix_spawn(&pid_, "/proc/self/exe", &actions, nullptr, arguments, environ), 0);
  posix_spawn_file_actions_destroy(&actions);
  close(in[0]);
  close(out[1]);
  to_ = in[1];
  from_ = out[0];
}

RankProcess::~RankProcess() {
  close(to_);
  close(from_);
  if (pid_ < 0) return;
  int status = 0;
  EXPECT_EQ(waitpid(pid_, &status, 0), pid_);
  EXPECT_EQ(status, 0) << "a process of ranks ended badly; why stands above";
}

void RankProcess::kill() {
  EXPECT_EQ(::kill(pid_, SIGKILL), 0);
  EXPECT_EQ(waitpid(pid_, nullptr, 0), pid_);
  pid_ = -1;
}

std::string RankProcess::ask(const std::string& line) {
  const std::string text = line + "\n";
  EXPECT_EQ(write(to_, text.data(), text.size()), static_cast<ssize_t>(text.size()));
  const std::string length = read_line(from_);
  EXPECT_FALSE(length.empty()) << "a process of ranks is gone, asked: " << line;
  return read_bytes(from_, length.empty() ? 0 : std::stoul(length));
}

Status RankProcess::ask_status(const std::string& line) {
  const std::string answer = ask(line);
  const int code = std::atoi(answer.c_str());
  if (code == 0) return {};
  return {static_cast<StatusCode>(code), answer.substr(answer.find(' ') + 1)};
}

std::string RankProcess::tell(const std::string& command) { return ask(command); }

std::vector<std::string> RankProcess::list(const std::string& command) {
  std::istringstream text(ask(command));
  std::vector<std::string> lines;
  for (std::string line; std::getline(text, line);) lines.push_back(line);
  return lines;
}

Status RankProcess::create(int group, const RankOfProcess& rank) {
  return ask_status("create" + join_words({std::to_string(group),
                                           std::to_string(rank.rank),
                                           std::to_string(rank.num_ranks),
                                           std::to_string(rank.device),
                                           std::to_string(rank.group_index),
                                           std::to_string(rank.nonce),
                                           std::to_string(rank.max_tokens)}));
}

std::string RankProcess::handle(int group) { return ask("handle " + std::to_string(group)); }

Status RankProcess::connect(int group, const std::vector<std::string>& handles) {
  return ask_status("connect " + std::to_string(group) + join_words(handles));
}

Status RankProcess::disconnect(int group, double limit_s) {
  return ask_status("disconnect" + join_words({std::to_string(group), std::to_string(limit_s)}));
}

void RankProcess::leave_heaps(int group) { ask("leave_heaps " + std::to_string(group)); }

void RankProcess::destroy(int group) { ask("destroy " + std::to_string(group)); }

void RankProcess::begin_disconnect(int group) { ask("begin_disconnect " + std::to_string(group)); }

bool RankProcess::told_closed(int group) { return ask("closed " + std::to_string(group)) != "0"; }

int RankProcess::sms(int group) { return std::stoi(ask("sms " + std::to_string(group))); }

void RankProcess::join() { ask("join"); }

void RankProcess::store(int group, int32_t rank, int64_t offset, const std::string& word) {
  ask("store" +
      join_words({std::to_string(group), std::to_string(rank), std::to_string(offset), word}));
}

std::string RankProcess::load(int group, int32_t rank, int64_t offset, size_t bytes) {
  return ask("load" + join_words({std::to_string(group),
                                  std::to_string(rank),
                                  std::to_string(offset),
                                  std::to_string(bytes)}));
}

}  // namespace jax_ep
