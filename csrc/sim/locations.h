// SPDX-License-Identifier: Apache-2.0
// Small numbers for places in the kernels' source, so that a Stamp can hold one.
#ifndef JAX_EP_CSRC_SIM_LOCATIONS_H_
#define JAX_EP_CSRC_SIM_LOCATIONS_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <source_location>
#include <string>

namespace jax_ep::sim {

class LocationTable {
 public:
  // 1 to 4095; 0 stands for an unknown place, and for what no longer fits.
  uint16_t id(const std::source_location& at) {
    if (at.line() == 0) return 0;
    std::size_t i =
        (reinterpret_cast<std::uintptr_t>(at.file_name()) / 16 + at.line() * 31) % kSize;
    for (std::size_t probes = 0; probes + 1 < kSize; ++probes, i = (i + 1) % kSize) {
      if (i == 0) continue;
      Entry& entry = entries_[i];
      if (entry.line == 0) entry = {at.file_name(), at.line()};
      if (entry.line == at.line() && entry.file == at.file_name()) return static_cast<uint16_t>(i);
    }
    return 0;
  }
  // "dispatch.h:120"
  std::string text(uint16_t id) const {
    const Entry& entry = entries_[id];
    if (entry.line == 0) return "an unknown place";
    const char* slash = std::strrchr(entry.file, '/');
    return std::string(slash ? slash + 1 : entry.file) + ":" + std::to_string(entry.line);
  }

 private:
  static constexpr std::size_t kSize = 4096;
  struct Entry {
    const char* file = nullptr;
    uint32_t line = 0;
  };
  Entry entries_[kSize];
};

}  // namespace jax_ep::sim

#endif  // JAX_EP_CSRC_SIM_LOCATIONS_H_
