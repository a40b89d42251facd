// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_WORKER_POOL_H_
#define JAX_EP_CSRC_CPU_WORKER_POOL_H_

#include <cstdint>
#include <functional>
#include <memory>

namespace jax_ep {

// Threads that share the copying of one operation. The calling thread takes part, so a pool of
// zero helpers is legal (and is what a process pinned to one core gets).
class WorkerPool {
 public:
  explicit WorkerPool(int num_helpers);
  ~WorkerPool();
  WorkerPool(const WorkerPool&) = delete;
  WorkerPool& operator=(const WorkerPool&) = delete;

  // The process's pool, made at the first call: one helper per core this process may run on,
  // less one. Never destroyed: its threads may outlive static destruction.
  static WorkerPool& shared();

  // Calls body(begin, end) for disjoint ranges that cover [0, n), each of at most `grain`
  // items, on the caller and the helpers; returns when all have returned. Several threads may
  // call it at the same time. `body` must not block on anything but memory, nor throw.
  void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

  [[nodiscard]] int num_helpers() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_WORKER_POOL_H_
