// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_XLA_FFI_REGISTRATION_H_
#define JAX_EP_XLA_FFI_REGISTRATION_H_

#include <mutex>

#include "xla/ffi/api/ffi.h"

namespace jax_ep {

// Wraps a handler of the instantiate stage so that it registers its own State type.
//
// XLA calls every handler once when its target is registered, to ask for its metadata; the
// type is registered in that call. jax.ffi.register_ffi_type cannot be used: what is registered
// before the CPU backend exists is replayed targets first, types second, and XLA then refuses
// to create the backend at all (jaxlib 0.10.2 to 0.12).
//
// XLA writes State::id, so a State type belongs to exactly one platform.
template <typename State, XLA_FFI_Handler* handler>
XLA_FFI_Error* with_state(XLA_FFI_CallFrame* frame) {
  static std::mutex mutex;
  {
    const std::lock_guard<std::mutex> lock(mutex);
    if (State::id.type_id == XLA_FFI_UNKNOWN_TYPE_ID.type_id) {
      static const xla::ffi::TypeInfo info = xla::ffi::MakeTypeInfo<State>();
      if (XLA_FFI_Error* error =
              xla::ffi::Ffi::RegisterTypeId(frame->api, State::kName, &State::id, &info)) {
        return error;
      }
    }
  }
  return handler(frame);
}

}  // namespace jax_ep

#endif  // JAX_EP_XLA_FFI_REGISTRATION_H_
