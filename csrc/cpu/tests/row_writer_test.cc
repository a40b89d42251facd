// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/row_writer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstddef>
#include <vector>

namespace jax_ep {
namespace {

constexpr std::byte kBefore{0xA5};

class RowWriterTest : public testing::TestWithParam<bool> {};

INSTANTIATE_TEST_SUITE_P(Modes, RowWriterTest, testing::Bool(), [](const auto& info) {
  return info.param ? "streaming" : "through_caches";
});

// Every alignment of both ends against lines, and the bytes around untouched.
TEST_P(RowWriterTest, WritesTheseBytesAndNoOthers) {
  std::vector<std::byte> from(1000);
  for (size_t i = 0; i < from.size(); ++i) from[i] = static_cast<std::byte>(i * 7 + i / 256);
  for (size_t offset = 0; offset < 65; ++offset) {
    for (const int64_t bytes : {0, 1, 2, 15, 16, 63, 64, 65, 127, 128, 129, 192, 300, 511}) {
      const size_t from_offset = (offset * 5) % 67;
      std::vector<std::byte> copied(1000, kBefore);
      std::vector<std::byte> cleared(1000, kBefore);
      {
        const RowWriter writer(GetParam());
        writer.copy(copied.data() + 64 + offset, from.data() + from_offset, bytes);
        writer.clear(cleared.data() + 64 + offset, bytes);
      }
      std::vector<std::byte> expected(1000, kBefore);
      std::copy_n(from.begin() + static_cast<int64_t>(from_offset),
                  bytes,
                  expected.begin() + static_cast<int64_t>(64 + offset));
      ASSERT_EQ(copied, expected) << "offset " << offset << ", bytes " << bytes;
      std::fill_n(expected.begin() + static_cast<int64_t>(64 + offset), bytes, std::byte{0});
      ASSERT_EQ(cleared, expected) << "offset " << offset << ", bytes " << bytes;
    }
  }
}

TEST_P(RowWriterTest, WritesNothingToNullRowsOfNoBytes) {
  const RowWriter writer(GetParam());
  writer.copy(nullptr, nullptr, 0);
  writer.clear(nullptr, 0);
}

}  // namespace
}  // namespace jax_ep
