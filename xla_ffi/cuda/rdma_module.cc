// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cuda/rdma_module.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "csrc/core/error_record.h"
#include "csrc/core/protocol.h"
#include "csrc/runtime/cuda_registry.h"
#include "csrc/runtime/cuda_status.h"
#include "csrc/runtime/rank_words.h"
#include "csrc/runtime/transport/rdma.h"
#include "xla_ffi/cuda/python_errors.h"
#include "xla_ffi/cuda/python_group.h"

namespace nb = nanobind;

namespace jax_ep {
namespace {

const RdmaLibrary& library() {
  const RdmaLibrary* const found = rdma_library();
  if (found == nullptr) {
    raise_if_error({StatusCode::kFailedPrecondition, "no RDMA library has been loaded"});
  }
  return *found;
}

void raise_if_failed(int error, const char* what) {
  if (error == 0) return;
  raise_if_error(
      {StatusCode::kInternal, std::string(what) + " failed with error " + std::to_string(error)});
}

using Version = std::tuple<int32_t, int32_t, int32_t>;

Version version_of(const int32_t (&version)[3]) { return {version[0], version[1], version[2]}; }

void load(const std::string& path) {
  Status status;
  {
    const nb::gil_scoped_release unlocked;
    status = load_rdma_library(path);
  }
  raise_if_error(status);
}

Version loaded_version() {
  int32_t version[3] = {};
  raise_if_failed(library().loaded_version(version), "asking for NVSHMEM's version");
  return version_of(version);
}

nb::bytes make_id() {
  char id[kMaxRdmaIdBytes] = {};
  raise_if_failed(library().make_id(id), "making an id of a job of NVSHMEM");
  return nb::bytes(id, static_cast<size_t>(library().id_bytes));
}

void initialize(nb::bytes id, int32_t pe, int32_t num_pes, int32_t device) {
  const RdmaLibrary& with = library();
  if (id.size() != static_cast<size_t>(with.id_bytes)) {
    raise_if_error(Status::invalid_argument("id has " + std::to_string(id.size()) +
                                            " bytes; allowed: " + std::to_string(with.id_bytes)));
  }
  const std::string copy(id.c_str(), id.size());
  int error = 0;
  Status status;
  {
    const nb::gil_scoped_release unlocked;  // waits for other processes
    const DeviceGuard guard(device);
    status = guard.status();
    if (status.ok()) error = with.initialize(copy.data(), pe, num_pes);
  }
  raise_if_error(status);
  raise_if_failed(error, "initializing NVSHMEM");
  if (with.is_initialized() == 0) {  // it may report success though it failed
    raise_if_error({StatusCode::kInternal, "NVSHMEM is not initialized, though it says so"});
  }
}

// Symmetric memory that stays: other memory of the job lies at the same distance from it in all
// processes, if all have asked for the same in the same order.
const std::byte*& anchor() {
  static const std::byte* memory = nullptr;
  return memory;
}

void set_anchor(int32_t device) {
  constexpr size_t kBytes = 256;
  const RdmaLibrary& with = library();
  {
    const nb::gil_scoped_release unlocked;  // waits for other processes
    const DeviceGuard guard(device);
    anchor() = static_cast<const std::byte*>(with.allocate(kBytes));
  }
  if (anchor() == nullptr) {
    raise_if_error({StatusCode::kResourceExhausted, "NVSHMEM has no symmetric memory"});
  }
}

void finalize(int32_t device) {
  int error = 0;
  const RdmaLibrary& with = library();
  {
    const nb::gil_scoped_release unlocked;  // waits for other processes
    const DeviceGuard guard(device);
    error = with.finalize();
  }
  raise_if_failed(error, "finalizing NVSHMEM");
}

int64_t allocate_network_heap(int64_t group_id) {
  const std::shared_ptr<CudaGroup> group = find_group(group_id);
  const std::byte* heap = nullptr;
  Status status;
  {
    const nb::gil_scoped_release unlocked;  // waits for other processes
    status = group->allocate_network_heap(heap);
  }
  raise_if_error(status);
  return heap - anchor();
}

void release_network_heap(int64_t group_id) {
  const std::shared_ptr<CudaGroup> group = find_group(group_id);
  const nb::gil_scoped_release unlocked;  // waits for other processes
  group->release_network_heap();
}

// Group name, group index, rank, who gave up, for whom it waited, and all of that as a word.
using GiveUp = std::tuple<std::string, int32_t, int32_t, uint32_t, uint32_t, uint32_t>;

std::vector<GiveUp> give_ups() {
  std::vector<GiveUp> result;
  for (const RankStatus& status : rank_statuses()) {
    if (!status.error.has_value()) continue;
    const std::optional<Aborted> aborted = aborted_of(*status.error);
    if (!aborted.has_value()) continue;
    const WordsOwner& owner = status.owner;
    result.emplace_back(owner.group_name,
                        owner.group_index,
                        owner.rank,
                        aborted->by,
                        aborted->blamed,
                        pack(*aborted));
  }
  return result;
}

bool tell_give_up(int64_t group_id, int32_t group_index, int32_t rank, uint32_t word) {
  const std::shared_ptr<CudaGroup> group = CudaGroupRegistry::instance().find(group_id);
  if (group == nullptr) return false;
  const nb::gil_scoped_release unlocked;
  for (const RankContext& context : group->ranks()) {
    const LocalRank& local = context.config().local;
    if (local.group_index != group_index || local.rank != rank) continue;
    return context.tell(unpack_aborted(word)).ok();
  }
  return false;
}

// Group name, group index, rank, operation as a number and by name, exchange.
using Running = std::tuple<std::string, int32_t, int32_t, uint32_t, std::string, uint32_t>;

std::vector<Running> running() {
  std::vector<Running> result;
  for (const RunningKernel& kernel : running_kernels()) {
    const WordsOwner& owner = kernel.owner;
    const KernelPhase& phase = kernel.phase;
    result.emplace_back(owner.group_name,
                        owner.group_index,
                        owner.rank,
                        phase.op,
                        std::string(name(static_cast<OpKind>(phase.op))),
                        phase.epoch);
  }
  return result;
}

std::vector<int32_t> unread_by(int64_t group_id, int32_t group_index, int32_t rank) {
  const std::shared_ptr<CudaGroup> group = CudaGroupRegistry::instance().find(group_id);
  std::vector<int32_t> ranks;
  if (group == nullptr) return ranks;
  const nb::gil_scoped_release unlocked;
  for (const RankContext& context : group->ranks()) {
    const LocalRank& local = context.config().local;
    if (local.group_index != group_index || local.rank != rank) continue;
    if (!context.find_unread(ranks).ok()) ranks.clear();
  }
  return ranks;
}

uint32_t stuck_word(uint32_t by, uint32_t blamed, uint32_t op) {
  const auto tag = static_cast<uint32_t>(WaitTag::kInTransport);
  return pack(Aborted{.by = by, .blamed = blamed, .tag = tag, .op = op});
}

}  // namespace

void define_rdma(nb::module_& m) {
  m.def("running",
        &running,
        "(group name, group index, rank, operation's number, operation, exchange) of each kernel\n"
        "between domains of this process that has begun and not ended. Never waits.");
  m.def("unread_by",
        &unread_by,
        nb::arg("group_id"),
        nb::arg("group_index"),
        nb::arg("rank"),
        "The ranks of other domains that have not read all that a rank of this process has sent\n"
        "to them by its rail, ascending; none if the group is closed, or CUDA refuses. Asks CUDA.");
  m.def("stuck_word",
        &stuck_word,
        nb::arg("by"),
        nb::arg("blamed"),
        nb::arg("op"),
        "What `tell_give_up` takes for a rank whose kernel does not come back from the network.");
  m.def("give_ups",
        &give_ups,
        "(group name, group index, rank, who gave up, whom it waited for, word) of each rank of\n"
        "this process that has given up, or been told that another one has. Never waits.");
  m.def("tell_give_up",
        &tell_give_up,
        nb::arg("group_id"),
        nb::arg("group_index"),
        nb::arg("rank"),
        nb::arg("word"),
        "Has the kernels of a rank of this process give up because another one has, as the word\n"
        "of `give_ups` says. False if the group is closed, or CUDA refuses.");
  m.def("load_rdma",
        &load,
        nb::arg("path"),
        "Loads the library for RDMA, once; what it is linked with must have been loaded or be\n"
        "found. Raises RuntimeError if it cannot be, or is of another version. Needs no GPU.");
  m.def(
      "rdma_versions",
      [] { return std::tuple(version_of(library().built_version), loaded_version()); },
      "Versions of NVSHMEM that the library was built with, and that it has found. Needs no GPU.");
  m.def("rdma_make_id", &make_id, "The id of a new job, for all its processes. Needs no GPU.");
  m.def("rdma_initialize",
        &initialize,
        nb::arg("id"),
        nb::kw_only(),
        nb::arg("pe"),
        nb::arg("num_pes"),
        nb::arg("device"),
        "Joins a job as its process `pe`, on a device of this process. Waits for the others,\n"
        "without limit. Raises RuntimeError if it fails.");
  m.def("rdma_set_anchor",
        &set_anchor,
        nb::kw_only(),
        nb::arg("device"),
        "Allocates what network heaps are measured from; once, with all processes.");
  m.def("rdma_finalize",
        &finalize,
        nb::kw_only(),
        nb::arg("device"),
        "Leaves the job, with all its processes.");
  m.def(
      "allocate_network_heap",
      &allocate_network_heap,
      nb::arg("group_id"),
      "Allocates a group's network heap by the library for RDMA, with all processes, and returns\n"
      "its place: the same number in all of them. Raises MemoryError if it does not fit.");
  m.def("release_network_heap",
        &release_network_heap,
        nb::arg("group_id"),
        "Gives it back, with all processes, when no kernel uses it any more.");
}

}  // namespace jax_ep
