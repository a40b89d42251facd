// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/row_alignment.h"

#include <gtest/gtest.h>

namespace jax_ep {
namespace {

const void* at(uintptr_t address) { return reinterpret_cast<const void*>(address); }

TEST(RowAlignment, RowsMovedInPiecesOf16BytesMustStartAtMultiplesOfThat) {
  EXPECT_TRUE(check_rows_aligned("x", at(0x1000), 1, 128).ok());
  EXPECT_TRUE(check_rows_aligned("x", at(0x1010), 7, 16).ok());
  for (const uintptr_t offset : {1, 2, 8, 15, 198}) {
    const Status status = check_rows_aligned("x", at(0x1000 + offset), 1, 128);
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << offset;
  }
}

TEST(RowAlignment, TheErrorNamesBufferAndAddress) {
  const Status status = check_rows_aligned("rows", at(0x7f00c6), 1, 64);
  EXPECT_EQ(status.message(),
            "buffer 'rows' is at address 0x7f00c6, which is not a multiple of 16, as it must be "
            "for such rows; XLA's options may be why, such as "
            "--xla_gpu_enable_dynamic_slice_fusion");
}

TEST(RowAlignment, RowsMovedElementByElementMayStartAnywhere) {
  EXPECT_TRUE(check_rows_aligned("x", at(0x1002), 4, 198).ok());
  EXPECT_TRUE(check_rows_aligned("x", at(0x1002), 4, 8).ok());
}

TEST(RowAlignment, WithoutRowsOrChannelsNothingIsMoved) {
  EXPECT_TRUE(check_rows_aligned("x", at(0x1002), 0, 128).ok());
  EXPECT_TRUE(check_rows_aligned("x", at(0x1002), 4, 0).ok());
}

}  // namespace
}  // namespace jax_ep
