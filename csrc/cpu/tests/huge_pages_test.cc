// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/huge_pages.h"

#include <gtest/gtest.h>

#include <array>
#include <vector>

#ifdef __linux__
#include <sys/mman.h>

#include <fstream>
#include <sstream>
#include <string>
#endif

namespace jax_ep {
namespace {

constexpr int64_t kMiB = 1024 * 1024;

TEST(HugePages, AdviceLeavesTheContentsAlone) {
  std::vector<uint8_t> memory(7 * kMiB + 13, 0x5A);
  for (const int64_t begin : {0, 1, 4096, 3'000'000}) {
    advise_huge_pages(memory.data() + begin, static_cast<int64_t>(memory.size()) - begin);
  }
  EXPECT_EQ(memory, std::vector<uint8_t>(memory.size(), 0x5A));
}

TEST(HugePages, LittleMemoryHasNone) {
  std::array<uint8_t, 64> memory{};
  advise_huge_pages(memory.data(), 0);
  advise_huge_pages(memory.data(), -1);
  advise_huge_pages(memory.data(), memory.size());
  advise_huge_pages(nullptr, 0);
}

#ifdef __linux__

// Whether the page of an address has been advised, as the kernel tells.
bool is_advised(const uint8_t* address) {
  std::ifstream maps("/proc/self/smaps");
  bool inside = false;
  for (std::string line; std::getline(maps, line);) {
    uintptr_t first = 0, last = 0;
    char dash = 0;
    std::istringstream range(line);
    if (range >> std::hex >> first >> dash >> last && dash == '-') {
      const auto at = reinterpret_cast<uintptr_t>(address);
      inside = first <= at && at < last;
    }
    if (inside && line.starts_with("VmFlags:")) return line.find(" hg") != std::string::npos;
  }
  return false;
}

TEST(HugePages, WholeOnesInsideAreAdvisedAndNoOthers) {
  constexpr int64_t kBytes = 16 * kMiB;
  void* const map =
      mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(map, MAP_FAILED);
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(map) % (2 * kMiB));
  uint8_t* const aligned = static_cast<uint8_t*>(map) + (2 * kMiB - misaligned) % (2 * kMiB);
  if (madvise(aligned + 10 * kMiB, 2 * kMiB, MADV_HUGEPAGE) != 0) {
    GTEST_SKIP() << "this kernel has no huge pages";
  }
  // From the middle of the first to the middle of the fourth.
  advise_huge_pages(aligned + kMiB, 6 * kMiB);
  EXPECT_FALSE(is_advised(aligned + kMiB));
  EXPECT_TRUE(is_advised(aligned + 2 * kMiB));
  EXPECT_TRUE(is_advised(aligned + 6 * kMiB - 1));
  EXPECT_FALSE(is_advised(aligned + 6 * kMiB));
  EXPECT_EQ(munmap(map, kBytes), 0);
}

#endif

}  // namespace
}  // namespace jax_ep
