// SPDX-License-Identifier: Apache-2.0
// The compiled module jax_ep._cuda: hands the handlers for platform CUDA, and the groups whose
// ranks run on this process's devices, to Python. Importing it needs no GPU and no driver.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "csrc/core/heap_regions.h"
#include "csrc/kernels/launch.h"
#include "csrc/runtime/cuda_registry.h"
#include "xla_ffi/cuda_handlers.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

nb::dict cuda_target(XLA_FFI_Handler* execute) {
  nb::dict stages;
  stages["execute"] = nb::capsule(reinterpret_cast<void*>(execute), "xla._CUSTOM_CALL_TARGET");
  return stages;
}

// ValueError for bad arguments, MemoryError for a heap that does not fit, else RuntimeError.
void raise_if_error(const Status& status) {
  if (status.ok()) return;
  PyObject* type = PyExc_RuntimeError;
  if (status.code() == StatusCode::kInvalidArgument) type = PyExc_ValueError;
  if (status.code() == StatusCode::kResourceExhausted) type = PyExc_MemoryError;
  PyErr_SetString(type, status.message().c_str());
  throw nb::python_error();
}

HeapShape heap_shape(int32_t num_ranks,
                     int32_t num_experts,
                     int32_t num_topk,
                     int64_t max_tokens,
                     int64_t hidden,
                     int32_t dtype,
                     int32_t wire,
                     int32_t layout) {
  const auto check_enum = [](const char* name, int32_t value, int32_t largest) {
    if (value >= 0 && value <= largest) return;
    raise_if_error(Status::invalid_argument(std::string(name) + " is " + std::to_string(value) +
                                            "; allowed: 0 to " + std::to_string(largest)));
  };
  check_enum("dtype", dtype, static_cast<int32_t>(DType::kFloat16));
  check_enum("wire", wire, static_cast<int32_t>(Wire::kFloat8E4M3));
  check_enum("layout", layout, static_cast<int32_t>(Layout::kRank));
  const HeapShape shape{.num_ranks = num_ranks,
                        .num_experts = num_experts,
                        .num_topk = num_topk,
                        .max_tokens = max_tokens,
                        .hidden = hidden,
                        .dtype = static_cast<DType>(dtype),
                        .wire = static_cast<Wire>(wire),
                        .layout = static_cast<Layout>(layout)};
  raise_if_error(check_heap_shape(shape));
  return shape;
}

std::shared_ptr<CudaGroup> find_group(int64_t id) {
  std::shared_ptr<CudaGroup> group = CudaGroupRegistry::instance().find(id);
  if (group == nullptr) {
    raise_if_error(Status::invalid_argument("there is no group " + std::to_string(id)));
  }
  return group;
}

std::vector<nb::bytes> create_group(int64_t id, CudaGroupConfig config) {
  std::unique_ptr<CudaGroup> group;
  Status status;
  {
    const nb::gil_scoped_release unlocked;  // allocates and zeroes: may take a while
    status = CudaGroup::create(std::move(config), group);
  }
  raise_if_error(status);
  std::vector<nb::bytes> handles;
  for (const RankContext& rank : group->ranks()) {
    const std::string bytes = rank.handle().to_bytes();
    handles.emplace_back(bytes.data(), bytes.size());
  }
  if (!CudaGroupRegistry::instance().add(id, std::move(group))) {
    throw nb::value_error("there is a group of this id already");
  }
  return handles;
}

void connect_group(int64_t id,
                   int32_t group_index,
                   int32_t rank,
                   const std::vector<nb::bytes>& handles) {
  std::vector<HeapHandle> parsed(handles.size());
  for (size_t i = 0; i < handles.size(); ++i) {
    const std::string_view bytes(handles[i].c_str(), handles[i].size());
    raise_if_error(HeapHandle::from_bytes(bytes, parsed[i]));
  }
  const std::shared_ptr<CudaGroup> group = find_group(id);
  Status status;
  {
    const nb::gil_scoped_release unlocked;
    status = group->connect(group_index, rank, parsed);
  }
  raise_if_error(status);
}

using Region = std::tuple<std::string, std::string, std::string, int64_t, int64_t>;

std::vector<Region> regions_of(const HeapShape& shape) {
  std::vector<Region> regions;
  for (const RegionInfo& region : heap_regions(shape)) {
    regions.emplace_back(region.name, region.shape, region.holds, region.offset, region.bytes);
  }
  return regions;
}

// A function of a HeapShape, which Python gives as keyword arguments.
template <typename Body>
void define_of_shape(nb::module_& m, const char* name, Body body, const char* doc) {
  m.def(
      name,
      [body](int32_t num_ranks,
             int32_t num_experts,
             int32_t num_topk,
             int64_t max_tokens,
             int64_t hidden,
             int32_t dtype,
             int32_t wire,
             int32_t layout) {
        return body(
            heap_shape(num_ranks, num_experts, num_topk, max_tokens, hidden, dtype, wire, layout));
      },
      nb::kw_only(),
      nb::arg("num_ranks"),
      nb::arg("num_experts"),
      nb::arg("num_topk"),
      nb::arg("max_tokens"),
      nb::arg("hidden"),
      nb::arg("dtype"),
      nb::arg("wire"),
      nb::arg("layout"),
      doc);
}

void define_groups(nb::module_& m) {
  m.def(
      "create_group",
      [](int64_t group_id,
         std::string name,
         GroupNonce nonce,
         double timeout_s,
         int32_t num_sms,
         int32_t num_ranks,
         int32_t num_experts,
         int32_t num_topk,
         int64_t max_tokens,
         int64_t hidden,
         int32_t dtype,
         int32_t wire,
         int32_t layout,
         const std::vector<std::tuple<int32_t, int32_t, int32_t>>& ranks) {
        CudaGroupConfig config{
            .name = std::move(name),
            .nonce = nonce,
            .timeout_s = timeout_s,
            .num_sms = num_sms,
            .heap = heap_shape(
                num_ranks, num_experts, num_topk, max_tokens, hidden, dtype, wire, layout),
            .ranks = {}};
        for (const auto& [device, group_index, rank] : ranks) {
          config.ranks.push_back({.device = device, .group_index = group_index, .rank = rank});
        }
        return create_group(group_id, std::move(config));
      },
      nb::kw_only(),
      nb::arg("group_id"),
      nb::arg("name"),
      nb::arg("nonce"),
      nb::arg("timeout_s"),
      nb::arg("num_sms"),
      nb::arg("num_ranks"),
      nb::arg("num_experts"),
      nb::arg("num_topk"),
      nb::arg("max_tokens"),
      nb::arg("hidden"),
      nb::arg("dtype"),
      nb::arg("wire"),
      nb::arg("layout"),
      nb::arg("ranks"),
      "Allocates the heaps of this process's ranks, (device ordinal, group index, rank) each, and\n"
      "loads the kernels. Returns the ranks' handles, for their peers. The id is the caller's "
      "choice.");
  m.def("connect_group",
        &connect_group,
        nb::arg("group_id"),
        nb::arg("group_index"),
        nb::arg("rank"),
        nb::arg("handles"),
        "Maps the heaps of all ranks of an EP group for one rank of this process; handles[r] is\n"
        "of rank r. The group serves calls once all of its ranks here are connected.");
  m.def(
      "disconnect_group",
      [](int64_t id) { find_group(id)->disconnect(); },
      nb::arg("group_id"),
      "Unmaps the peers' heaps. No operation of the group may be in flight in this process.");
  m.def(
      "close_group",
      [](int64_t id) { return CudaGroupRegistry::instance().close(id); },
      nb::arg("group_id"),
      "Frees a group; False if it was not there. All processes must have disconnected before.");
  m.def(
      "error_of",
      [](int64_t id) -> std::optional<std::string> {
        const Status status = find_group(id)->error();
        if (status.ok()) return std::nullopt;
        return status.message();
      },
      nb::arg("group_id"),
      "What a kernel of this process's ranks gave up on; None if none has.");
  m.def(
      "num_groups", [] { return CudaGroupRegistry::instance().size(); }, "Groups registered now.");
}

}  // namespace

NB_MODULE(_cuda, m) {
  m.doc() = "FFI handlers of jax_ep for platform CUDA, and the groups that they serve.";
  m.def(
      "cuda_targets",
      [] {
        nb::dict targets;
        targets["jax_ep_plan"] = cuda_target(jax_ep_plan_cuda);
        targets["jax_ep_dispatch"] = cuda_target(jax_ep_dispatch_cuda);
        targets["jax_ep_combine"] = cuda_target(jax_ep_combine_cuda);
        return targets;
      },
      "FFI target name -> stages, for jax.ffi.register_ffi_target(..., platform='CUDA').");
  m.def(
      "build_info",
      [] {
        nb::dict info;
        info["architectures"] = JAX_EP_CUDA_ARCHITECTURES;
        info["cuda_runtime"] = CUDART_VERSION;
        info["shared_memory"] = shared_bytes_per_block();
        return info;
      },
      "What the kernels were compiled for (architectures, as CMake names them), with which CUDA,\n"
      "and how many bytes of shared memory a block takes at most. Needs no GPU.");
  define_of_shape(
      m,
      "heap_bytes",
      [](const HeapShape& shape) { return make_heap_layout(shape).total_bytes; },
      "Bytes of symmetric heap that each rank needs. Needs no GPU.");
  define_of_shape(m,
                  "heap_regions",
                  regions_of,
                  "(name, shape, holds, offset, bytes) of each region of the heap. Needs no GPU.");
  define_groups(m);
  m.attr("ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

}  // namespace jax_ep
