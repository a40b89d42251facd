// SPDX-License-Identifier: Apache-2.0
// The compiled module jax_ep._ext: hands handlers and the group registry to Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <chrono>
#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

#include "csrc/core/group_registry.h"
#include "csrc/cpu/rendezvous.h"
#include "xla_ffi/handlers.h"
#include "xla_ffi/site.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

nb::capsule capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
}

nb::dict cpu_target(XLA_FFI_Handler* execute) {
  nb::dict stages;
  stages["instantiate"] = capsule(instantiate_cpu_site);
  stages["execute"] = capsule(execute);
  return stages;
}

}  // namespace

NB_MODULE(_ext, m) {
  m.doc() = "FFI handlers of jax_ep and the registry of its groups.";
  m.def(
      "cpu_targets",
      [] {
        nb::dict targets;
        targets["jax_ep_plan"] = cpu_target(jax_ep_plan_cpu);
        targets["jax_ep_dispatch"] = cpu_target(jax_ep_dispatch_cpu);
        targets["jax_ep_combine"] = cpu_target(jax_ep_combine_cpu);
        return targets;
      },
      "FFI target name -> stages, for jax.ffi.register_ffi_target(..., platform='cpu').");
  m.def(
      "create_group",
      [](std::string name, int32_t num_ranks, double timeout_s) {
        const auto timeout =
            std::chrono::milliseconds(static_cast<int64_t>(std::ceil(timeout_s * 1e3)));
        return GroupRegistry::instance().create(
            {.name = std::move(name), .num_ranks = num_ranks, .timeout = timeout});
      },
      nb::arg("name"),
      nb::arg("num_ranks"),
      nb::arg("timeout_s"),
      "Registers a group; returns its id, which the FFI targets take as an attribute.");
  m.def(
      "close_group",
      [](int64_t id) { return GroupRegistry::instance().close(id); },
      nb::arg("id"),
      "Forgets a group; False if it was not there. Calls that name it fail from then on.");
  m.def("num_groups", [] { return GroupRegistry::instance().size(); }, "Groups registered now.");
  m.def("num_sites", &Rendezvous::num_alive, "Custom calls of live compiled programs.");
  m.def(
      "num_open_meetings", &Rendezvous::num_open_meetings, "Operations that wait for a rank now.");
  m.attr("ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

}  // namespace jax_ep
