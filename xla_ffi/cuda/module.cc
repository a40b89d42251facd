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
#include <type_traits>
#include <utility>
#include <vector>

#include "csrc/core/error_record.h"
#include "csrc/core/heap_description.h"
#include "csrc/core/low_latency_fit.h"
#include "csrc/core/network_layout.h"
#include "csrc/core/shape_check.h"
#include "csrc/core/wait_times.h"
#include "csrc/launch/launch.h"
#include "csrc/runtime/cuda_registry.h"
#include "csrc/runtime/rank_words.h"
#include "xla_ffi/cuda/handlers.h"
#include "xla_ffi/cuda/python_errors.h"
#include "xla_ffi/cuda/python_group.h"
#include "xla_ffi/cuda/rdma_module.h"
#include "xla_ffi/cuda/tuning_module.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

nb::dict cuda_target(XLA_FFI_Handler* execute) {
  nb::dict stages;
  stages["execute"] = nb::capsule(reinterpret_cast<void*>(execute), "xla._CUSTOM_CALL_TARGET");
  return stages;
}

// What Python calls a member of HeapShape.
template <typename Value>
struct HeapSize {
  const char* name;
  Value HeapShape::* member;
};

constexpr DType largest(DType) { return DType::kFloat16; }
constexpr Wire largest(Wire) { return Wire::kFloat8E4M3; }
constexpr Layout largest(Layout) { return Layout::kRank; }

// Python's int for a member: an enum comes as its number.
template <typename Value>
using Number = std::conditional_t<std::is_enum_v<Value>, int32_t, Value>;

template <typename Value>
void set(HeapShape& shape, const HeapSize<Value>& size, Number<Value> given) {
  if constexpr (std::is_enum_v<Value>) {
    const auto last = static_cast<int32_t>(largest(Value{}));
    if (given < 0 || given > last) {
      raise_if_error(out_of_range(size.name, given, "0 to " + std::to_string(last)));
    }
  }
  shape.*size.member = static_cast<Value>(given);
}

// HeapShape(name=number, ...) in Python, of all these sizes. ValueError if no heap is like that.
template <typename... Values>
void define_constructor(nb::class_<HeapShape>& shape_type, const HeapSize<Values>&... sizes) {
  const auto make = [sizes...](HeapShape* place, Number<Values>... given) {
    HeapShape shape;
    (set(shape, sizes, given), ...);
    raise_if_error(check_heap_shape(shape));
    new (place) HeapShape(shape);
  };
  shape_type.def("__init__", make, nb::kw_only(), nb::arg(sizes.name)...);
}

std::vector<nb::bytes> make_group(int64_t id, CudaGroupConfig config) {
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
                   const std::vector<nb::bytes>& handles,
                   const std::vector<int32_t>& pes) {
  std::vector<HeapHandle> parsed(handles.size());
  for (size_t i = 0; i < handles.size(); ++i) {
    const std::string_view bytes(handles[i].c_str(), handles[i].size());
    raise_if_error(HeapHandle::from_bytes(bytes, parsed[i]));
  }
  const std::shared_ptr<CudaGroup> group = find_group(id);
  Status status;
  {
    const nb::gil_scoped_release unlocked;
    status = group->connect(group_index, rank, parsed, pes);
  }
  raise_if_error(status);
}

void disconnect_group(int64_t id, double limit_s) {
  const std::shared_ptr<CudaGroup> group = find_group(id);
  Status status;
  {
    // A kernel may wait for a peer whose program waits for a callback, which waits for the GIL.
    const nb::gil_scoped_release unlocked;
    status = group->disconnect(limit_s);
  }
  raise_if_error(status);
}

bool close_group(int64_t id, bool leave_heaps) {
  const nb::gil_scoped_release unlocked;  // to free memory is to wait for the device
  if (leave_heaps) {
    const std::shared_ptr<CudaGroup> group = CudaGroupRegistry::instance().find(id);
    if (group != nullptr) group->leave_heaps();
  }
  return CudaGroupRegistry::instance().close(id);
}

// peer, operation, what is waited for, exchange, seconds, whether it has ended, and that without it
using WaitTuple = std::tuple<int32_t, std::string, std::string, uint32_t, double, bool, bool>;
using StatusTuple =
    std::tuple<std::string, int32_t, int32_t, std::optional<std::string>, std::vector<WaitTuple>>;

std::vector<StatusTuple> statuses() {
  std::vector<StatusTuple> result;
  for (const RankStatus& status : rank_statuses()) {
    const WordsOwner& owner = status.owner;
    std::optional<std::string> error;
    if (status.error.has_value()) error = describe(*status.error, owner.timeout_s);
    std::vector<WaitTuple> waits;
    for (const RankWait& of : status.waits) {
      const auto peer = static_cast<uint32_t>(of.peer);
      waits.emplace_back(of.peer,
                         std::string(name(static_cast<OpKind>(of.wait.op))),
                         awaited_text(static_cast<WaitTag>(of.wait.tag), of.wait.op, peer),
                         of.wait.epoch,
                         waited_s(owner.report_s, of.wait.level),
                         of.wait.ended,
                         of.wait.given_up);
    }
    result.emplace_back(
        owner.group_name, owner.group_index, owner.rank, std::move(error), std::move(waits));
  }
  return result;
}

using Region = std::tuple<std::string, std::string, std::string, int64_t, int64_t>;

std::vector<Region> regions_of(const HeapShape& shape) {
  std::vector<Region> regions;
  for (const RegionInfo& region : heap_regions(shape)) {
    regions.emplace_back(region.name, region.shape, region.holds, region.offset, region.bytes);
  }
  return regions;
}

void define_heap_shape(nb::module_& m) {
  nb::class_<HeapShape> shape_type(m, "HeapShape", "What the size of a group's heaps depends on.");
  define_constructor(shape_type,
                     HeapSize{"num_ranks", &HeapShape::num_ranks},
                     HeapSize{"num_experts", &HeapShape::num_experts},
                     HeapSize{"num_topk", &HeapShape::num_topk},
                     HeapSize{"max_tokens", &HeapShape::max_tokens},
                     HeapSize{"hidden", &HeapShape::hidden},
                     HeapSize{"dtype", &HeapShape::dtype},
                     HeapSize{"wire", &HeapShape::wire},
                     HeapSize{"layout", &HeapShape::layout},
                     HeapSize{"low_latency_tokens", &HeapShape::low_latency_tokens},
                     HeapSize{"num_neighbors", &HeapShape::num_neighbors},
                     HeapSize{"gathered_domains", &HeapShape::gathered_domains});
  m.def("heap_bytes",
        &heap_bytes,
        nb::arg("shape"),
        "Bytes of symmetric heap that each rank needs, and of network heap. Needs no GPU.");
  m.def(
      "network_heap_bytes",
      [](const HeapShape& shape) { return network_layout_of(shape).total_bytes; },
      nb::arg("shape"),
      "Bytes of it that are the network heap's; 0 of one domain. Needs no GPU.");
  m.def("heap_regions",
        &regions_of,
        nb::arg("shape"),
        "(name, shape, holds, offset, bytes) of each region of the heap. Needs no GPU.");
}

EpShape call_shape(const HeapShape& shape, int64_t num_tokens) {
  return {.num_ranks = shape.num_ranks,
          .num_experts = shape.num_experts,
          .num_topk = shape.num_topk,
          .num_tokens = num_tokens,
          .layout = shape.layout};
}

// Whether calls of the group with so many tokens on each rank are low-latency ones.
bool dispatch_is_low_latency(const HeapShape& shape,
                             int64_t num_tokens,
                             bool fp8_x,
                             bool fp8_rows) {
  PlanDispatchOp op{};
  op.plan.shape = call_shape(shape, num_tokens);
  op.dispatch.shape = op.plan.shape;
  op.dispatch.hidden = shape.hidden;
  op.dispatch.dtype = shape.dtype;
  op.dispatch.wire = shape.wire;
  op.dispatch.x_format = fp8_x ? RowFormat::kFloat8E4M3 : RowFormat::kDType;
  op.dispatch.rows_format = fp8_rows ? RowFormat::kFloat8E4M3 : RowFormat::kDType;
  return fits_low_latency(make_heap_layout(shape), op);
}
bool combine_is_low_latency(const HeapShape& shape, int64_t num_tokens, int32_t domain_size) {
  CombineOp op{};
  op.shape = call_shape(shape, num_tokens);
  op.hidden = shape.hidden;
  op.domain_size = domain_size;
  op.dtype = shape.dtype;
  return fits_low_latency(make_heap_layout(shape), op, shape.spans_domains());
}

void define_low_latency(nb::module_& m) {
  m.def(
      "dispatch_is_low_latency",
      &dispatch_is_low_latency,
      nb::arg("shape"),
      nb::kw_only(),
      nb::arg("num_tokens"),
      nb::arg("fp8_x"),
      nb::arg("fp8_rows"),
      "Whether a dispatch of so many tokens on each rank, quantized or not on the way in or out,\n"
      "is done by the low-latency kernels, which in one domain can do it in halves. Needs no GPU.");
  m.def("combine_is_low_latency",
        &combine_is_low_latency,
        nb::arg("shape"),
        nb::kw_only(),
        nb::arg("num_tokens"),
        nb::arg("domain_size"),
        "The same of a combine.");
}

std::vector<nb::bytes> create_group(
    int64_t group_id,
    std::string name,
    GroupNonce nonce,
    double warn_after_s,
    double timeout_s,
    int32_t max_num_sms,
    int32_t tail_num_sms,
    const HeapShape& heap,
    bool rdma,
    bool masks_missing_ranks,
    const std::vector<std::tuple<int32_t, int32_t, int32_t>>& ranks) {
  CudaGroupConfig config{.group = {.name = std::move(name),
                                   .nonce = nonce,
                                   .warn_after_s = warn_after_s,
                                   .timeout_s = timeout_s,
                                   .max_num_sms = max_num_sms,
                                   .tail_num_sms = tail_num_sms,
                                   .heap = heap,
                                   .link = rdma ? DomainLink::kRdma : DomainLink::kMappedMemory,
                                   .masks_missing_ranks = masks_missing_ranks},
                         .ranks = {}};
  for (const auto& [device, group_index, rank] : ranks) {
    config.ranks.push_back({.device = device, .group_index = group_index, .rank = rank});
  }
  return make_group(group_id, std::move(config));
}

void give_up_on(int64_t id,
                const std::vector<int32_t>& group_indices,
                const std::vector<int32_t>& ranks) {
  const std::shared_ptr<CudaGroup> group = find_group(id);
  for (const int32_t group_index : group_indices) {
    raise_if_error(group->give_up_on(group_index, ranks));
  }
}

void define_groups(nb::module_& m) {
  m.def(
      "create_group",
      &create_group,
      nb::kw_only(),
      nb::arg("group_id"),
      nb::arg("name"),
      nb::arg("nonce"),
      nb::arg("warn_after_s"),
      nb::arg("timeout_s"),
      nb::arg("max_num_sms"),
      nb::arg("tail_num_sms"),
      nb::arg("heap"),
      nb::arg("rdma"),
      nb::arg("masks_missing_ranks"),
      nb::arg("ranks"),
      "Allocates the heaps of this process's ranks, (device ordinal, group index, rank) each, and\n"
      "loads the kernels; `rdma`: those that reach other domains by RDMA, for which it has been\n"
      "initialized, instead of mapped memory; `masks_missing_ranks`: the low-latency kernels go\n"
      "on without who does not come, and who gives up does not end the others. Returns the ranks'\n"
      "handles, for their peers. The id is the caller's choice.");
  m.def(
      "connect_group",
      &connect_group,
      nb::arg("group_id"),
      nb::arg("group_index"),
      nb::arg("rank"),
      nb::arg("handles"),
      nb::arg("pes"),
      "Maps the heaps of all ranks of an EP group for one rank of this process, given the handles\n"
      "of all ranks of the mesh and, with RDMA, the number in its job of each rank's process. The "
      "group serves calls once all of its ranks here are connected.");
  m.def(
      "disconnect_group",
      &disconnect_group,
      nb::kw_only(),
      nb::arg("group_id"),
      nb::arg("limit_s"),
      "Waits for the kernels on the group's devices of this process, at most limit_s, and unmaps\n"
      "the peers' heaps. Raises TimeoutError, with the heaps still mapped, or RuntimeError, "
      "having\n"
      "done what it could, if CUDA refuses, as after a kernel's trap.");
  m.def(
      "close_group",
      &close_group,
      nb::kw_only(),
      nb::arg("group_id"),
      nb::arg("leave_heaps"),
      "Forgets a group; False if it was not there. Frees its heaps, which no process may map any\n"
      "more, unless they are to be left as they are.");
  m.def("give_up_on",
        &give_up_on,
        nb::arg("group_id"),
        nb::arg("group_indices"),
        nb::arg("ranks"),
        "From now on nobody of a group that goes on without missing ranks waits for these. Never\n"
        "waits.");
  m.def(
      "statuses",
      &statuses,
      "(group name, group index, rank, error or None, waits) of each rank of this process of\n"
      "which a kernel has said something, also where the group has been closed. A wait is (peer,\n"
      "operation, what is waited for, exchange, seconds, whether it has ended, whether without "
      "what\n"
      "was waited for). Never waits.");
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
        targets["jax_ep_plan_dispatch"] = cuda_target(jax_ep_plan_dispatch_cuda);
        targets["jax_ep_dispatch_start"] = cuda_target(jax_ep_dispatch_start_cuda);
        targets["jax_ep_dispatch_done"] = cuda_target(jax_ep_dispatch_done_cuda);
        targets["jax_ep_combine_start"] = cuda_target(jax_ep_combine_start_cuda);
        targets["jax_ep_combine_done"] = cuda_target(jax_ep_combine_done_cuda);
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
  define_heap_shape(m);
  define_low_latency(m);
  define_groups(m);
  define_rdma(m);
  define_tuning(m);
  m.attr("ffi_api_version") = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
}

}  // namespace jax_ep
