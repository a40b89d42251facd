// SPDX-License-Identifier: Apache-2.0
// Calls a handler as XLA does, without XLA: for handlers of platform CUDA, which XLA calls only
// where there is a GPU. A C interface; testing/ep_testing/fake_cudart.py has the same in Python.
#ifndef JAX_EP_XLA_FFI_TESTS_FAKE_XLA_H_
#define JAX_EP_XLA_FFI_TESTS_FAKE_XLA_H_

#include <stdint.h>

struct FakeXlaBuffer {
  int32_t dtype;  // XLA_FFI_DataType
  int32_t rank;
  const int64_t* dims;
  void* data;
};

// "name", or "dictionary.name" for an entry of an attribute that is a dictionary. In the order of
// the names.
struct FakeXlaAttribute {
  const char* name;
  int32_t dtype;
  int32_t reserved;
  int64_t value;  // its first bytes are those of the dtype
};

struct FakeXlaCall {
  void* handler;  // XLA_FFI_Handler*
  void* stream;
  int32_t device;
  int32_t num_operands;
  int32_t num_results;
  int32_t num_attributes;
  const struct FakeXlaBuffer* operands;
  const struct FakeXlaBuffer* results;
  const struct FakeXlaAttribute* attributes;
};

// Returns an empty text, or "CODE: message". It lives until the thread's next call.
extern "C" __attribute__((visibility("default"))) const char* jax_ep_fake_xla_call(
    const FakeXlaCall* call);

#endif  // JAX_EP_XLA_FFI_TESTS_FAKE_XLA_H_
