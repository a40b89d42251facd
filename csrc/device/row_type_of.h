// SPDX-License-Identifier: Apache-2.0
// The row type of a dtype: which of the kernels that are compiled a host launches.
#ifndef JAX_EP_CSRC_DEVICE_ROW_TYPE_OF_H_
#define JAX_EP_CSRC_DEVICE_ROW_TYPE_OF_H_

#include <type_traits>

#include "csrc/core/dtype.h"
#include "csrc/device/convert.h"

namespace jax_ep {

// `use(std::type_identity<RowType>{})`; `otherwise` if a dtype has none.
template <typename Result, typename Use>
Result with_row_type(DType dtype, Result otherwise, const Use& use) {
  switch (dtype) {
    case DType::kFloat32: return use(std::type_identity<dev::Float32Rows>{});
    case DType::kBFloat16: return use(std::type_identity<dev::BFloat16Rows>{});
    case DType::kFloat16: return use(std::type_identity<dev::Float16Rows>{});
  }
  return otherwise;
}

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_DEVICE_ROW_TYPE_OF_H_
