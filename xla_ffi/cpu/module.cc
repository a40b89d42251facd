// SPDX-License-Identifier: Apache-2.0
// The compiled module jax_ep._ext: hands handlers and the group registry to Python.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/core/notices.h"
#include "csrc/cpu/flights/flights.h"
#include "csrc/cpu/group_registry.h"
#include "csrc/cpu/rendezvous/rendezvous.h"
#include "csrc/cpu/rendezvous/waits.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/rank_call.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

nb::capsule capsule(XLA_FFI_Handler* handler) {
  return nb::capsule(reinterpret_cast<void*>(handler), "xla._CUSTOM_CALL_TARGET");
}

nb::dict cpu_target(XLA_FFI_Handler* execute) {
  nb::dict stages;
  stages["instantiate"] = capsule(instantiate_call_site);
  stages["execute"] = capsule(execute);
  return stages;
}

bool close_group(int64_t id) {
  const GroupInfoPtr group = GroupRegistry::instance().find(id);
  const bool was_open = GroupRegistry::instance().close(id);
  const nb::gil_scoped_release unlocked;
  Rendezvous::close_group(id);
  if (group != nullptr) group->flights->close();
  return was_open;
}

void give_up_on(int64_t id,
                const std::vector<int32_t>& group_indices,
                const std::vector<int32_t>& ranks) {
  const GroupInfoPtr group = GroupRegistry::instance().find(id);
  if (group == nullptr) return;
  for (const int32_t group_index : group_indices) group->given_up->add(group_index, ranks);
  const nb::gil_scoped_release unlocked;
  Rendezvous::end_waits(id);
}

std::vector<int32_t> numbers(const std::vector<RankOnDevice>& ranks) {
  std::vector<int32_t> result;
  for (const RankOnDevice& rank : ranks) result.push_back(rank.rank);
  return result;
}

using WaitTuple = std::
    tuple<int32_t, std::string, std::vector<int32_t>, std::vector<int32_t>, double, std::string>;

std::vector<WaitTuple> waits_of(int64_t id) {
  std::vector<Wait> all = Rendezvous::waits();
  std::stable_sort(
      all.begin(), all.end(), [](const Wait& a, const Wait& b) { return a.since < b.since; });
  const auto now = std::chrono::steady_clock::now();
  std::vector<WaitTuple> result;
  for (const Wait& wait : all) {
    if (wait.group->id != id) continue;
    result.emplace_back(wait.group_index,
                        std::string(wait.op),
                        numbers(wait.waiting),
                        numbers(wait.missing),
                        std::chrono::duration<double>(now - wait.since).count(),
                        root_cause(wait, all));
  }
  return result;
}

int64_t num_open_flights(int64_t id) {
  const GroupInfoPtr group = GroupRegistry::instance().find(id);
  return group == nullptr ? 0 : group->flights->num_open();
}

std::optional<std::pair<int32_t, std::string>> next_notice() {
  const nb::gil_scoped_release unlocked;
  std::optional<Notice> notice = Notices::shared().next();
  if (!notice.has_value()) return std::nullopt;
  return std::pair(static_cast<int32_t>(notice->level), std::move(notice->text));
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
        targets["jax_ep_plan_dispatch"] = cpu_target(jax_ep_plan_dispatch_cpu);
        targets["jax_ep_dispatch_start"] = cpu_target(jax_ep_dispatch_start_cpu);
        targets["jax_ep_dispatch_done"] = cpu_target(jax_ep_dispatch_done_cpu);
        targets["jax_ep_combine_start"] = cpu_target(jax_ep_combine_start_cpu);
        targets["jax_ep_combine_done"] = cpu_target(jax_ep_combine_done_cpu);
        return targets;
      },
      "FFI target name -> stages, for jax.ffi.register_ffi_target(..., platform='cpu').");
  m.def(
      "create_group",
      [](int64_t group_id,
         std::string name,
         int32_t num_ranks,
         double warn_after_s,
         double timeout_s,
         const std::vector<std::tuple<int32_t, int32_t, int32_t>>& ranks) {
        GroupInfo info{.id = group_id,
                       .name = std::move(name),
                       .num_ranks = num_ranks,
                       .warn_after = to_milliseconds(warn_after_s),
                       .timeout = to_milliseconds(timeout_s),
                       .places = {}};
        for (const auto& [device, group_index, rank] : ranks) {
          info.places[device] = {.group_index = group_index, .rank = rank};
        }
        if (!GroupRegistry::instance().add(std::move(info))) {
          throw nb::value_error("there is, or was, a group of this id");
        }
      },
      nb::kw_only(),
      nb::arg("group_id"),
      nb::arg("name"),
      nb::arg("num_ranks"),
      nb::arg("warn_after_s"),
      nb::arg("timeout_s"),
      nb::arg("ranks"),
      "Registers a group, with (device ordinal, group index, rank) of each of its ranks. The id, "
      "of\n"
      "the caller's choice, is what the FFI targets take as an attribute.");
  m.def("close_group",
        &close_group,
        nb::arg("group_id"),
        "Forgets a group; False if it was not there. Calls that name it fail from then on, and so\n"
        "do those of its operations that wait for a rank.");
  m.def("give_up_on",
        &give_up_on,
        nb::arg("group_id"),
        nb::arg("group_indices"),
        nb::arg("ranks"),
        "From now on nobody of a group that goes on without missing ranks waits for these; waits\n"
        "that are for them alone end.");
  m.def("waits_of",
        &waits_of,
        nb::arg("group_id"),
        "(group index, operation, waiting ranks, missing ranks, seconds, root cause) of each\n"
        "operation of a group that waits for a rank now, the oldest first.");
  m.def("next_notice",
        &next_notice,
        "Waits for what is to be logged: (level as in logging, text); None after stop_notices().");
  m.def(
      "stop_notices",
      [] { Notices::shared().stop(); },
      "Ends the wait of next_notice(), for good.");
  m.def("num_groups", [] { return GroupRegistry::instance().size(); }, "Groups registered now.");
  m.def("num_call_sites", &Rendezvous::num_alive, "Custom calls of live compiled programs.");
  m.def("num_open_flights", &num_open_flights, nb::arg("group_id"), "Flights of a group open now.");
  m.def("num_pending", &Rendezvous::num_pending, "Operations that wait for a rank now.");
  m.attr("ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

}  // namespace jax_ep
