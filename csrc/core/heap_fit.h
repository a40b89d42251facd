// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CORE_HEAP_FIT_H_
#define JAX_EP_CSRC_CORE_HEAP_FIT_H_

#include <cstdint>

#include "csrc/core/dtype.h"
#include "csrc/core/ep_shape.h"
#include "csrc/core/heap_layout.h"
#include "csrc/core/status.h"

namespace jax_ep {

// InvalidArgument unless an operation of this shape can use a heap: it must be of the heap's group
// and have no more tokens than the heap has room for. (recv_capacity is no size of the heap.)
Status check_fits(const HeapShape& heap, const EpShape& shape);

// InvalidArgument unless the heap has room for rows of `hidden` elements on this wire.
Status check_rows_fit(const HeapShape& heap, int64_t hidden, DType dtype, Wire wire);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_HEAP_FIT_H_
