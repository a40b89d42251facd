// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CORE_ROW_ALIGNMENT_H_
#define JAX_EP_CSRC_CORE_ROW_ALIGNMENT_H_

#include <cstdint>
#include <string_view>

#include "csrc/core/status.h"

namespace jax_ep {

// What the kernels move in one piece, where they can: bulk copies take no less.
inline constexpr int64_t kRowAlignment = 16;

// InvalidArgument, naming the buffer, if the kernels would move its rows in pieces that do not
// start where they must, which is a fault on the GPU. `bytes` are those of a row in the narrowest
// of the formats that it takes on its way: the kernels choose by them, and move rows for which they
// are no multiple of kRowAlignment element by element, wherever those start.
Status check_rows_aligned(std::string_view buffer,
                          const void* rows,
                          int64_t num_rows,
                          int64_t bytes);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_ROW_ALIGNMENT_H_
