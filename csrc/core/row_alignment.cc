// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/row_alignment.h"

#include <cinttypes>
#include <cstdio>
#include <string>

namespace jax_ep {

Status check_rows_aligned(std::string_view buffer,
                          const void* rows,
                          int64_t num_rows,
                          int64_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(rows);
  if (num_rows == 0 || bytes == 0 || bytes % kRowAlignment != 0) return {};
  if (address % kRowAlignment == 0) return {};
  char text[32];
  std::snprintf(text, sizeof text, "0x%" PRIxPTR, address);
  return Status::invalid_argument("buffer '" + std::string(buffer) + "' is at address " + text +
                                  ", which is not a multiple of " + std::to_string(kRowAlignment) +
                                  ", as it must be for such rows; XLA's options may be why, such "
                                  "as --xla_gpu_enable_dynamic_slice_fusion");
}

}  // namespace jax_ep
