// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_ROW_WRITER_H_
#define JAX_EP_CSRC_CPU_ROW_WRITER_H_

#include <cstddef>
#include <cstdint>

namespace jax_ep {

// Output of one operation from which on it is streamed: more than the cache that a group of cores
// shares keeps until the next operation reads it.
inline constexpr int64_t kStreamBytes = 32 * 1024 * 1024;

// Writes rows, either through the caches, or streaming past them: then a line of memory is not
// read before it is overwritten, which halves the traffic, and the rows that are read meanwhile
// keep their place in the caches. One object per task and thread.
class RowWriter {
 public:
  explicit RowWriter(bool streaming) : streaming_(streaming) {}
  // Orders streamed writes before whatever tells another thread that the task is done.
  ~RowWriter();
  RowWriter(const RowWriter&) = delete;
  RowWriter& operator=(const RowWriter&) = delete;

  // Of any alignment and size; the ranges do not overlap.
  void copy(std::byte* to, const std::byte* from, int64_t bytes) const;
  void clear(std::byte* to, int64_t bytes) const;

 private:
  const bool streaming_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_ROW_WRITER_H_
