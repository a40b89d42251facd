// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cuda/tuning_module.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/tuning/heuristics.h"
#include "csrc/tuning/tuned_launches.h"
#include "csrc/tuning/warps_and_stages.h"
#include "xla_ffi/cuda/python_errors.h"
#include "xla_ffi/cuda/python_group.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

// operation, whether low-latency, tokens, SMs, senders, tail
using LaunchTuple = std::tuple<std::string, bool, int64_t, int32_t, int32_t, int32_t>;

OpKind op_named(const std::string& op) {
  if (op != "dispatch" && op != "combine") {
    raise_if_error(Status::invalid_argument("op is " + op + "; allowed: dispatch, combine"));
  }
  return op == "dispatch" ? OpKind::kPlanDispatch : OpKind::kCombine;
}

void set_launches(int64_t group_id, const std::vector<LaunchTuple>& launches) {
  std::vector<TunedLaunch> tuned;
  for (const auto& [op, low_latency, num_tokens, num_sms, num_senders, tail] : launches) {
    tuned.push_back(
        {.op = op_named(op),
         .low_latency = low_latency,
         .num_tokens = num_tokens,
         .choice = {
             .num_sms = num_sms, .num_senders = num_senders, .tail = static_cast<Tail>(tail)}});
  }
  raise_if_error(find_group(group_id)->set_launches(std::move(tuned)));
}

nb::dict launch_limits() {
  nb::dict limits;
  limits["num_sms"] = default_num_sms(false);
  limits["low_latency_num_sms"] = default_num_sms(true);
  limits["dispatch_warps"] = kCompiledDispatch.num_warps;
  limits["combine_warps"] = kCompiledCombine.num_warps;
  return limits;
}

}  // namespace

void define_tuning(nb::module_& m) {
  m.def(
      "set_launches",
      &set_launches,
      nb::kw_only(),
      nb::arg("group_id"),
      nb::arg("launches"),
      "What later launches of a group are to be like, instead of what was said before:\n"
      "(operation, whether low-latency, tokens, SMs, senders, tail) each; operation \"dispatch\"\n"
      "or \"combine\"; tokens a power of two, for calls with more than half of it, too; SMs and\n"
      "senders 0, and tail -1, where the model is to choose. Raises ValueError, with no change,\n"
      "if no kernel can be launched so. CUDA graphs that are recorded keep theirs.");
  m.def(
      "launch_limits",
      &launch_limits,
      "SMs that a kernel takes at most by default (num_sms, low_latency_num_sms), and the warps\n"
      "of its blocks (dispatch_warps, combine_warps), of which one at least does not send first.\n"
      "Needs no GPU.");
}

}  // namespace jax_ep
