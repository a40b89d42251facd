// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CORE_SHAPE_CHECK_H_
#define JAX_EP_CSRC_CORE_SHAPE_CHECK_H_

#include <cstdint>
#include <string_view>

#include "csrc/core/ep_shape.h"
#include "csrc/core/ops.h"
#include "csrc/core/status.h"

namespace jax_ep {

// InvalidArgument that names the first size that no operation can count with, what it is and what
// is allowed.
Status check_shape(const EpShape& shape);

// InvalidArgument unless what is quantized outside of the operation travels as it is: no other wire
// carries it.
Status check_row_formats(const DispatchOp& op);

// InvalidArgument if products are made of rows that are quantized on their way.
Status check_products(const DispatchOp& op);
// InvalidArgument unless the ranks are in domains of equal sizes.
Status check_domains(const CombineOp& op);

// InvalidArgument: "`name` is `value`; allowed: `allowed`".
Status out_of_range(std::string_view name, int64_t value, std::string_view allowed);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_SHAPE_CHECK_H_
