// SPDX-License-Identifier: Apache-2.0
// A tool, as profilers are to NVTX, which loads it from $NVTX_INJECTION64_PATH: it writes down the
// ranges of all threads.
#if __has_include(<nvtx3/nvToolsExt.h>)
#define NVTX_NO_IMPL
#include <nvtx3/nvToolsExt.h>

#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

struct nvtxDomainRegistration_st {
  std::string name;
};

namespace {

std::mutex mutex;
std::vector<std::unique_ptr<nvtxDomainRegistration_st>> domains;  // guarded by it
std::string lines;                                                // likewise

thread_local int depth = 0;

void write(const char* what, int at, const std::string& domain, const std::string& name) {
  const std::lock_guard lock(mutex);
  lines += std::string(what) + " " + std::to_string(at) + " " + domain + " " + name + "\n";
}

nvtxDomainHandle_t create(const char* name) {
  const std::lock_guard lock(mutex);
  domains.push_back(std::make_unique<nvtxDomainRegistration_st>(name));
  return domains.back().get();
}

int push(nvtxDomainHandle_t domain, const nvtxEventAttributes_t* event) {
  const bool is_text = event->messageType == NVTX_MESSAGE_TYPE_ASCII;
  write("push", depth, domain->name, is_text ? event->message.ascii : "?");
  return depth++;
}

int pop(nvtxDomainHandle_t domain) {
  write("pop", --depth, domain->name, "");
  return depth;
}

template <typename Function>
void set(NvtxFunctionTable table, unsigned int id, Function function) {
  *table[id] = reinterpret_cast<NvtxFunctionPointer>(function);
}

}  // namespace

// NVTX calls it once in each module that has ranges; 1: the tool is there.
extern "C" __attribute__((visibility("default"))) int InitializeInjectionNvtx2(
    NvtxGetExportTableFunc_t get_table) {
  const auto* callbacks =
      static_cast<const NvtxExportTableCallbacks*>(get_table(NVTX_ETID_CALLBACKS));
  NvtxFunctionTable table = nullptr;
  unsigned int size = 0;
  if (callbacks == nullptr ||
      callbacks->GetModuleFunctionTable(NVTX_CB_MODULE_CORE2, &table, &size) == 0 ||
      size < NVTX_CBID_CORE2_SIZE) {
    return 0;
  }
  set(table, NVTX_CBID_CORE2_DomainCreateA, create);
  set(table, NVTX_CBID_CORE2_DomainRangePushEx, push);
  set(table, NVTX_CBID_CORE2_DomainRangePop, pop);
  return 1;
}

// What was written down since the last call: "push DEPTH DOMAIN NAME", "pop DEPTH DOMAIN". The text
// lives until the thread's next call. Null if it was built without NVTX.
extern "C" __attribute__((visibility("default"))) const char* jax_ep_nvtx_log() {
  static thread_local std::string taken;
  const std::lock_guard lock(mutex);
  taken = std::exchange(lines, {});
  return taken.c_str();
}

#else

extern "C" __attribute__((visibility("default"))) const char* jax_ep_nvtx_log() { return nullptr; }

#endif
