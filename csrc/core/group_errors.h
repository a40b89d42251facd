// SPDX-License-Identifier: Apache-2.0
// What a call is told whose group is not there.
#ifndef JAX_EP_CSRC_CORE_GROUP_ERRORS_H_
#define JAX_EP_CSRC_CORE_GROUP_ERRORS_H_

#include <cstdint>
#include <string_view>

#include "csrc/core/status.h"

namespace jax_ep {

// FailedPrecondition: an operation was called whose group is no more.
Status closed_group(std::string_view group_name, std::string_view op);
// FailedPrecondition: an operation was called of a group that was never here.
Status unknown_group(int64_t id, std::string_view op);

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CORE_GROUP_ERRORS_H_
