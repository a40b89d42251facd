// SPDX-License-Identifier: Apache-2.0
// Loaded before all else (LD_PRELOAD) where hosts are hosts in name alone: NVSHMEM's heap in host
// memory has the same name on every host, so here the name of the host is added.
#include <dlfcn.h>
#include <sys/types.h>
#include <unistd.h>

#include <cstring>
#include <string>

namespace {

std::string name_here(const char* name) {
  const bool is_nvshmems =
      std::strstr(name, "symm_heap") != nullptr || std::strstr(name, "nvshmem") != nullptr;
  char host[256] = {};
  if (!is_nvshmems || gethostname(host, sizeof host - 1) != 0) return name;
  return std::string(name) + "_" + host;
}

template <typename Function>
Function* next(const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int shm_open(const char* name, int flags, mode_t mode) {
  static auto* const real = next<int(const char*, int, mode_t)>("shm_open");
  return real(name_here(name).c_str(), flags, mode);
}

__attribute__((visibility("default"))) int shm_unlink(const char* name) {
  static auto* const real = next<int(const char*)>("shm_unlink");
  return real(name_here(name).c_str());
}

}  // extern "C"
