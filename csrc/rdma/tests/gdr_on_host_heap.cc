// SPDX-License-Identifier: Apache-2.0
// Stands for libgdrapi.so.2 (GDRCopy) where NVSHMEM's heap is in host memory (NVSHMEM_HEAP_KIND=
// SYSMEM): there the address of the CPU is the device's, so nothing has to be mapped. NVSHMEM's UCX
// transport stores signals through it, and GDRCopy itself needs a module of the kernel.
#include <cstdint>
#include <cstring>

extern "C" {

// As gdrapi.h has them.
struct GdrHandle {
  unsigned long address;  // NOLINT(google-runtime-int)
};
struct GdrInfo {
  uint64_t va;
  uint64_t mapped_size;
  uint32_t page_size;
  uint64_t tm_cycles;
  uint32_t cycles_per_ms;
  unsigned mapped : 1;
  unsigned wc_mapping : 1;
};

#define EXPORTED __attribute__((visibility("default")))

EXPORTED void* gdr_open() {
  static char place;
  return &place;
}
EXPORTED int gdr_close(void* /*gdr*/) { return 0; }
EXPORTED int gdr_pin_buffer(void* /*gdr*/,
                            unsigned long address,  // NOLINT(google-runtime-int)
                            size_t /*size*/,
                            uint64_t /*token*/,
                            uint32_t /*space*/,
                            GdrHandle* handle) {
  handle->address = address;
  return 0;
}
EXPORTED int gdr_unpin_buffer(void* /*gdr*/, GdrHandle /*handle*/) { return 0; }
EXPORTED int gdr_map(void* /*gdr*/, GdrHandle handle, void** address, size_t /*size*/) {
  *address = reinterpret_cast<void*>(handle.address);
  return 0;
}
EXPORTED int gdr_unmap(void* /*gdr*/, GdrHandle /*handle*/, void* /*address*/, size_t /*size*/) {
  return 0;
}
EXPORTED int gdr_get_info(void* /*gdr*/, GdrHandle handle, GdrInfo* info) {
  *info = {};
  info->va = handle.address;
  info->page_size = 65536;
  info->mapped = 1;
  return 0;
}
EXPORTED int gdr_copy_from_mapping(GdrHandle /*handle*/, void* to, const void* from, size_t size) {
  std::memcpy(to, from, size);
  return 0;
}
EXPORTED int gdr_copy_to_mapping(GdrHandle /*handle*/, void* to, const void* from, size_t size) {
  std::memcpy(to, from, size);
  return 0;
}
EXPORTED void gdr_runtime_get_version(int* major, int* minor) {
  *major = 2;
  *minor = 9;
}
EXPORTED int gdr_driver_get_version(void* /*gdr*/, int* major, int* minor) {
  gdr_runtime_get_version(major, minor);
  return 0;
}

}  // extern "C"
