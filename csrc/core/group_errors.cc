// SPDX-License-Identifier: Apache-2.0
#include "csrc/core/group_errors.h"

#include <string>

namespace jax_ep {

Status closed_group(std::string_view group_name, std::string_view op) {
  return {StatusCode::kFailedPrecondition,
          std::string(group_name) + " of this " + std::string(op) +
              " has been closed; a compiled function may be called only while the group that it "
              "was traced with is open"};
}

Status unknown_group(int64_t id, std::string_view op) {
  return {StatusCode::kFailedPrecondition,
          "this " + std::string(op) +
              " was compiled for an EpGroup that this process has not made (id " +
              std::to_string(id) +
              "); before a program that was exported or serialized is called, make a group with "
              "the same mesh, axes and config, as the same in number of those with that mesh and "
              "axes"};
}

}  // namespace jax_ep
