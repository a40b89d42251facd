// SPDX-License-Identifier: Apache-2.0
#include "xla_ffi/cuda/trace_range.h"

#if __has_include(<nvtx3/nvToolsExt.h>)
#include <nvtx3/nvToolsExt.h>

#include <memory>
#include <string>

#include "csrc/runtime/cuda_registry.h"

namespace jax_ep {
namespace {

// Null where no tool is attached. NVTX looks for one at this module's first call, and never again.
nvtxDomainHandle_t domain() {
  static const nvtxDomainHandle_t domain = nvtxDomainCreateA("jax_ep");
  return domain;
}

std::string name_of(std::string_view operation, int64_t group_id) {
  std::string name = "jax_ep." + std::string(operation);
  const std::shared_ptr<CudaGroup> group = CudaGroupRegistry::instance().find(group_id);
  if (group != nullptr) name += "[" + group->config().group.name + "]";
  return name;
}

}  // namespace

TraceRange::TraceRange(std::string_view operation, int64_t group_id) {
  if (domain() == nullptr) return;
  const std::string name = name_of(operation, group_id);  // which tools copy
  nvtxEventAttributes_t event{};
  event.version = NVTX_VERSION;
  event.size = NVTX_EVENT_ATTRIB_STRUCT_SIZE;
  event.messageType = NVTX_MESSAGE_TYPE_ASCII;
  event.message.ascii = name.c_str();
  nvtxDomainRangePushEx(domain(), &event);
}

TraceRange::~TraceRange() {
  if (domain() != nullptr) nvtxDomainRangePop(domain());
}

}  // namespace jax_ep

#else  // a CUDA compiler without NVTX

namespace jax_ep {

TraceRange::TraceRange(std::string_view /*operation*/, int64_t /*group_id*/) {}
TraceRange::~TraceRange() = default;

}  // namespace jax_ep

#endif
