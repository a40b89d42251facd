// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_CPU_FLOAT_ENV_H_
#define JAX_EP_CSRC_CPU_FLOAT_ENV_H_

#include <cfenv>

namespace jax_ep {

// The floating-point modes of a thread (rounding, flush-to-zero). They matter here because XLA
// sets flush-to-zero on the threads that run its programs: without care, a result would depend
// on which thread happened to compute it.
class FloatEnv {
 public:
  // That of the calling thread.
  static FloatEnv current() {
    FloatEnv env;
    std::fegetenv(&env.env_);
    return env;
  }

  // Makes it the calling thread's.
  void apply() const { std::fesetenv(&env_); }

  // Gives the calling thread what IEEE 754 calls default: nearest even, subnormals kept.
  static void apply_default() { std::fesetenv(FE_DFL_ENV); }

 private:
  FloatEnv() = default;
  std::fenv_t env_;
};

// The default modes for a scope, then the thread's own again.
class ScopedDefaultFloatEnv {
 public:
  ScopedDefaultFloatEnv() : before_(FloatEnv::current()) { FloatEnv::apply_default(); }
  ~ScopedDefaultFloatEnv() { before_.apply(); }
  ScopedDefaultFloatEnv(const ScopedDefaultFloatEnv&) = delete;
  ScopedDefaultFloatEnv& operator=(const ScopedDefaultFloatEnv&) = delete;

 private:
  FloatEnv before_;
};

}  // namespace jax_ep

#endif  // JAX_EP_CSRC_CPU_FLOAT_ENV_H_
