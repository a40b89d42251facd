// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cuda/rdma_module.h"

#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "csrc/runtime/cuda_status.h"
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

}  // namespace

void define_rdma(nb::module_& m) {
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
