// SPDX-License-Identifier: Apache-2.0
// Stackful fibers for x86-64 Linux: a switch saves the callee-saved registers and nothing else,
// about twenty times faster than swapcontext. AddressSanitizer is told of every switch.
#ifndef JAX_EP_CSRC_SIM_FIBER_H_
#define JAX_EP_CSRC_SIM_FIBER_H_

#if !defined(__x86_64__) || !defined(__linux__)
#error "The simulator's fibers are written for x86-64 Linux"
#endif

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#define JAX_EP_SIM_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define JAX_EP_SIM_ASAN 1
#endif
#endif

#ifdef JAX_EP_SIM_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace jax_ep::sim {

#ifdef JAX_EP_SIM_ASAN
inline constexpr std::size_t kStackBytes = std::size_t{256} << 10;  // red zones need room
#else
inline constexpr std::size_t kStackBytes = std::size_t{64} << 10;
#endif
inline constexpr std::size_t kGuardBytes = std::size_t{4} << 10;

// A suspended execution. The scheduler's own has no stack here.
struct FiberContext {
  void* stack_pointer = nullptr;
  const void* asan_bottom = nullptr;
  std::size_t asan_size = 0;
  void* asan_fake_stack = nullptr;
};

// Stacks with guard pages below them, in one mapping; pages that are not used cost nothing.
class StackPool {
 public:
  explicit StackPool(std::size_t count) : count_(count) {
    void* mapping = mmap(nullptr,
                         count * kStride,
                         PROT_READ | PROT_WRITE,
                         MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE,
                         -1,
                         0);
    if (mapping == MAP_FAILED) std::abort();
    base_ = static_cast<char*>(mapping);
    for (std::size_t i = 0; i < count; ++i) {
      if (mprotect(base_ + i * kStride, kGuardBytes, PROT_NONE) != 0) std::abort();
    }
  }
  ~StackPool() { munmap(base_, count_ * kStride); }
  StackPool(const StackPool&) = delete;
  StackPool& operator=(const StackPool&) = delete;

  char* at(std::size_t i) const { return base_ + i * kStride + kGuardBytes; }

 private:
  static constexpr std::size_t kStride = kStackBytes + kGuardBytes;
  std::size_t count_;
  char* base_;
};

[[gnu::naked, gnu::noinline]] inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm(R"(
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
  )");
}

// Leaves `from`, resumes `to`. With `final`, `from` is never resumed.
inline void swap_fibers(FiberContext& from, FiberContext& to, [[maybe_unused]] bool final = false) {
#ifdef JAX_EP_SIM_ASAN
  __sanitizer_start_switch_fiber(
      final ? nullptr : &from.asan_fake_stack, to.asan_bottom, to.asan_size);
#endif
  swap_stacks(&from.stack_pointer, to.stack_pointer);
#ifdef JAX_EP_SIM_ASAN
  __sanitizer_finish_switch_fiber(from.asan_fake_stack, nullptr, nullptr);
#endif
}

// The first thing that a fiber's entry function calls; `resumer` is who switched to it.
inline void fiber_entered([[maybe_unused]] FiberContext& resumer) {
#ifdef JAX_EP_SIM_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &resumer.asan_bottom, &resumer.asan_size);
#endif
}

// Makes `context` run entry(), which must not return, on `stack` when it is switched to.
inline void prepare_fiber(FiberContext& context, char* stack, void (*entry)()) {
  context = {nullptr, stack, kStackBytes, nullptr};
#ifdef JAX_EP_SIM_ASAN
  __asan_unpoison_memory_region(stack, kStackBytes);  // an abandoned fiber leaves red zones
#endif
  // Stacks start at different cache sets, or their hottest lines would evict each other.
  const std::size_t color = (reinterpret_cast<std::uintptr_t>(stack) / kStackBytes % 32) * 64;
  auto* top = reinterpret_cast<void**>(stack + kStackBytes - color);
  *--top = nullptr;  // keeps the stack aligned at entry, and ends backtraces
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context.stack_pointer = top;
}

}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_SIM_FIBER_H_
