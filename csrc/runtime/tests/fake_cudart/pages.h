// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_PAGES_H_
#define JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_PAGES_H_

#include <cstddef>
#include <cstdint>
#include <memory>

namespace jax_ep::fake_cudart {

// By which another process finds pages; travels as bytes.
struct Ticket {
  int64_t pid;
  int32_t descriptor;  // in that process
  int32_t reserved;
  uint64_t serial;  // a random number: descriptors are used again
  uint64_t bytes;
};

// Memory that other processes can map too. It ends where a page begins that nobody may touch, and
// is at addresses that are never used again: an access past it, or too late, ends the process.
//
// It is a file without a name, which Linux deletes with the last process that has it. Whoever maps
// it holds a lock on it, so that others can ask; the kernel drops a dead process's locks.
class Pages {
 public:
  enum class Alias { kNone, kSecond };
  enum class OpenError { kNone, kOwnerGone, kFreed };

  // Filled with what no program expects. Null if the system has no memory. A second alias shows
  // the same bytes at another address.
  static std::unique_ptr<Pages> make(size_t bytes, Alias alias = Alias::kNone);
  // Maps another process's.
  static std::unique_ptr<Pages> open(const Ticket& ticket, OpenError& error);
  // Unmaps.
  ~Pages();
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;

  [[nodiscard]] std::byte* data() const { return data_; }
  [[nodiscard]] std::byte* alias() const { return alias_; }
  [[nodiscard]] size_t bytes() const { return bytes_; }
  [[nodiscard]] bool contains(const void* address) const;
  [[nodiscard]] Ticket ticket() const;

  // By the maker: nobody can open it any more, and it is no longer mapped here. Returns whether
  // another process has it mapped now.
  bool free();
  // By those who opened it: whether the maker has freed it, or has ended.
  [[nodiscard]] bool abandoned() const;

 private:
  struct Control;
  explicit Pages(size_t bytes) : bytes_(bytes) {}
  bool map();
  void unmap();

  size_t bytes_;
  int descriptor_ = -1;
  Control* control_ = nullptr;
  std::byte* data_ = nullptr;
  std::byte* alias_ = nullptr;
};

}  // namespace jax_ep::fake_cudart

#endif  // JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_PAGES_H_
