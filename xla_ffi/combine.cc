// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/calls.h"
#include "xla_ffi/handlers.h"
#include "xla_ffi/site.h"
#include "xla_ffi/validate.h"

namespace jax_ep {
namespace {

ffi::Future combine(CpuSite* site,
                    ffi::RunId run_id,
                    ffi::AnyBuffer group_rank,
                    ffi::AnyBuffer y_arg,
                    ffi::AnyBuffer weights_arg,
                    ffi::AnyBuffer row_scalars_arg,
                    ffi::AnyBuffer topk_idx_arg,
                    ffi::AnyBuffer slot_arg,
                    ffi::Result<ffi::AnyBuffer> out_ret,
                    ffi::Result<ffi::AnyBuffer> token_scalars_ret,
                    EpAttrs attrs) {
  using enum ffi::DataType;
  const Buffer y("y", y_arg);
  const Buffer weights("weights", weights_arg);
  const Buffer row_scalars("row_scalars", row_scalars_arg);
  const Buffer topk_idx("topk_idx", topk_idx_arg);
  const Buffer slot("slot", slot_arg);
  const Buffer out("out", out_ret);
  const Buffer token_scalars("token_scalars", token_scalars_ret);

  DType dtype;
  JAX_EP_FAIL_IF_ERROR(y.check_rows({kAny, kAny}, dtype));
  EpShape shape;
  JAX_EP_FAIL_IF_ERROR(make_shape(attrs, topk_idx.dim(0), y.dim(0), shape));
  DType out_dtype;
  JAX_EP_FAIL_IF_ERROR(out.check_rows({shape.num_tokens, y.dim(1)}, out_dtype));
  if (out_dtype != dtype) {
    return failed(Status::invalid_argument("buffer 'out' is " + std::string(name(out_dtype)) +
                                           "; expected the dtype of 'y', " +
                                           std::string(name(dtype))));
  }
  JAX_EP_FAIL_IF_ERROR(topk_idx.check(S32, {shape.num_tokens, shape.num_topk}));
  JAX_EP_FAIL_IF_ERROR(slot.check(S32, {shape.num_tokens, shape.num_topk}));
  const bool weighted = !weights.absent();
  if (weighted) JAX_EP_FAIL_IF_ERROR(check_row_scalars(weights, shape));
  const bool with_scalars = !row_scalars.absent();
  if (with_scalars) {
    JAX_EP_FAIL_IF_ERROR(check_row_scalars(row_scalars, shape));
    JAX_EP_FAIL_IF_ERROR(token_scalars.check(F32, {shape.num_tokens, shape.num_topk}));
  } else {
    JAX_EP_FAIL_IF_ERROR(token_scalars.check(F32, {0}));
  }

  return join_site(site,
                   run_id,
                   attrs,
                   group_rank,
                   CombineCall{.shape = shape,
                               .hidden = y.dim(1),
                               .weighted = weighted,
                               .scalars = with_scalars ? shape.num_topk : 0,
                               .dtype = dtype,
                               .y = y.data<const void>(),
                               .weights = weights.data<const float>(),
                               .row_scalars = row_scalars.data<const float>(),
                               .topk_idx = topk_idx.data<const int32_t>(),
                               .slot = slot.data<const int32_t>(),
                               .out = out.data<void>(),
                               .token_scalars = token_scalars.data<float>()});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_cpu,
                              combine,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CpuSite>>()
                                  .Ctx<ffi::RunId>()
                                  .Arg<ffi::AnyBuffer>()  // group_rank
                                  .Arg<ffi::AnyBuffer>()  // y
                                  .Arg<ffi::AnyBuffer>()  // weights
                                  .Arg<ffi::AnyBuffer>()  // row_scalars
                                  .Arg<ffi::AnyBuffer>()  // topk_idx
                                  .Arg<ffi::AnyBuffer>()  // slot
                                  .Ret<ffi::AnyBuffer>()  // out
                                  .Ret<ffi::AnyBuffer>()  // token_scalars
                                  .Attr<EpAttrs>("ep"));

}  // namespace jax_ep
