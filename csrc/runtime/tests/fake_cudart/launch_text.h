// SPDX-License-Identifier: Apache-2.0
#ifndef JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_LAUNCH_TEXT_H_
#define JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_LAUNCH_TEXT_H_

#include <string>

#include "csrc/runtime/tests/fake_cudart/fake_cudart.h"

namespace jax_ep::fake_cudart {

// "plan device=0 stream=4096 ... topk_idx=140...", with every field of the parameters under its
// name. Pointers and enums are numbers; `heap` has one for each rank, with commas between.
std::string text_of(const Launch& launch);

}  // namespace jax_ep::fake_cudart

#endif  // JAX_EP_CSRC_RUNTIME_TESTS_FAKE_CUDART_LAUNCH_TEXT_H_
