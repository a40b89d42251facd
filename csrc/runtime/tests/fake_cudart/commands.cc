// SPDX-License-Identifier: Apache-2.0
#include "csrc/runtime/tests/fake_cudart/commands.h"

#include <algorithm>
#include <functional>
#include <map>
#include <sstream>
#include <utility>

#include "csrc/runtime/tests/fake_cudart/fake_cudart.h"
#include "csrc/runtime/tests/fake_cudart/launch_text.h"

namespace jax_ep::fake_cudart {
namespace {

using Words = std::vector<std::string>;

template <typename T>
std::string lines_of(const std::vector<T>& items) {
  std::ostringstream text;
  for (const T& item : items) text << item << '\n';
  return text.str();
}

int number(const Words& words, size_t index) { return std::stoi(words.at(index)); }

Machine& machine() {
  static Machine machine = make_machine(1);
  return machine;
}

// The machine can be changed before anything is made on it.
std::string start_anew() {
  reset(machine());
  return {};
}

std::string make(const Words& words) {
  machine() = make_machine(number(words, 1), number(words, 2));
  return start_anew();
}

std::string set_sms(const Words& words) {
  for (Device& device : machine().devices) device.num_sms = number(words, 1);
  return start_anew();
}

std::string set_memory(const Words& words) {
  for (Device& device : machine().devices) device.bytes = std::stoull(words.at(1));
  return start_anew();
}

std::string cut(const Words& words) {
  const size_t count = machine().devices.size();
  if (machine().reaches.empty()) {
    machine().reaches.assign(count, std::vector<bool>(count, true));
  }
  machine()
      .reaches.at(static_cast<size_t>(number(words, 1)))
      .at(static_cast<size_t>(number(words, 2))) = false;
  return start_anew();
}

std::string fail_call(const Words& words) {
  const std::string& function = words.at(1);
  fail(function == "any" ? "" : function,
       number(words, 2),
       static_cast<cudaError_t>(number(words, 3)));
  return {};
}

std::string list_launches() {
  Words texts;
  for (const Launch& launch : launches()) texts.push_back(text_of(launch));
  return lines_of(texts);
}

using Command = std::function<std::string(const Words&)>;

const std::map<std::string, Command, std::less<>>& commands() {
  static const std::map<std::string, Command, std::less<>> table{
      {"reset", make},
      {"sms", set_sms},
      {"memory", set_memory},
      {"unreachable", cut},
      {"fail", fail_call},
      {"pending_failures", [](auto&) { return std::to_string(pending_failures()); }},
      {"trap", [](auto&) { return trap(), std::string(); }},
      {"run_kernels", [](auto& words) { return run_kernels(number(words, 1)), std::string(); }},
      {"finish_kernels", [](auto&) { return finish_kernels(), std::string(); }},
      {"finish_kernels_after",
       [](auto& words) {
         finish_kernels_after(std::chrono::milliseconds(number(words, 1)));
         return std::string();
       }},
      {"num_waiting", [](auto&) { return std::to_string(num_waiting()); }},
      {"calls", [](auto&) { return lines_of(calls()); }},
      {"leaks", [](auto&) { return lines_of(leaks()); }},
      {"violations", [](auto&) { return lines_of(violations()); }},
      {"abandoned_mappings", [](auto&) { return lines_of(abandoned_mappings()); }},
      {"contexts", [](auto&) { return lines_of(contexts()); }},
      {"launches", [](auto&) { return list_launches(); }},
      {"last_error", [](auto&) { return std::to_string(last_error()); }},
  };
  return table;
}

}  // namespace

std::vector<std::string> words_of(std::string_view line) {
  std::istringstream stream{std::string(line)};
  Words words;
  for (std::string word; stream >> word;) words.push_back(word);
  return words;
}

std::optional<std::string> run_command(std::string_view line) {
  const Words words = words_of(line);
  const auto it = words.empty() ? commands().end() : commands().find(words[0]);
  if (it == commands().end()) return std::nullopt;
  return it->second(words);
}

}  // namespace jax_ep::fake_cudart

const char* jax_ep_fake_cudart(const char* line) {
  thread_local std::string answer;
  answer = jax_ep::fake_cudart::run_command(line).value_or("unknown command: " + std::string(line));
  return answer.c_str();
}
