// SPDX-License-Identifier: Apache-2.0
#include "csrc/cpu/calls.h"
#include "xla_ffi/handlers.h"
#include "xla_ffi/site.h"
#include "xla_ffi/validate.h"

namespace jax_ep {
namespace {

ffi::Future dispatch(CpuSite* site,
                     ffi::RunId run_id,
                     ffi::AnyBuffer group_rank,
                     ffi::AnyBuffer x_arg,
                     ffi::AnyBuffer token_scalars_arg,
                     ffi::AnyBuffer topk_idx_arg,
                     ffi::AnyBuffer slot_arg,
                     ffi::AnyBuffer row_source_arg,
                     ffi::Result<ffi::AnyBuffer> rows_ret,
                     ffi::Result<ffi::AnyBuffer> row_scalars_ret,
                     EpAttrs attrs,
                     int32_t wire,
                     bool zero_fill) {
  using enum ffi::DataType;
  const Buffer x("x", x_arg);
  const Buffer token_scalars("token_scalars", token_scalars_arg);
  const Buffer topk_idx("topk_idx", topk_idx_arg);
  const Buffer slot("slot", slot_arg);
  const Buffer row_source("row_source", row_source_arg);
  const Buffer rows("rows", rows_ret);
  const Buffer row_scalars("row_scalars", row_scalars_ret);

  JAX_EP_FAIL_IF_ERROR(row_source.check(S32, {kAny}));
  DType dtype;
  JAX_EP_FAIL_IF_ERROR(x.check_rows({kAny, kAny}, dtype));
  EpShape shape;
  JAX_EP_FAIL_IF_ERROR(make_shape(attrs, x.dim(0), row_source.dim(0), shape));
  DType rows_dtype;
  JAX_EP_FAIL_IF_ERROR(rows.check_rows({shape.recv_capacity, x.dim(1)}, rows_dtype));
  if (rows_dtype != dtype) {
    return failed(Status::invalid_argument("buffer 'rows' is " + std::string(name(rows_dtype)) +
                                           "; expected the dtype of 'x', " +
                                           std::string(name(dtype))));
  }
  JAX_EP_FAIL_IF_ERROR(topk_idx.check(S32, {shape.num_tokens, shape.num_topk}));
  JAX_EP_FAIL_IF_ERROR(slot.check(S32, {shape.num_tokens, shape.num_topk}));
  const bool with_scalars = !token_scalars.absent();
  if (with_scalars) {
    JAX_EP_FAIL_IF_ERROR(token_scalars.check(F32, {shape.num_tokens, shape.num_topk}));
    JAX_EP_FAIL_IF_ERROR(check_row_scalars(row_scalars, shape));
  } else {
    JAX_EP_FAIL_IF_ERROR(row_scalars.check(F32, {0}));
  }
  if (wire != static_cast<int32_t>(Wire::kSame) &&
      wire != static_cast<int32_t>(Wire::kFloat8E4M3)) {
    return failed(Status::invalid_argument("attribute wire is " + std::to_string(wire) +
                                           "; allowed: 0 (same), 1 (float8_e4m3fn)"));
  }

  return join_site(site,
                   run_id,
                   attrs,
                   group_rank,
                   DispatchCall{.shape = shape,
                                .hidden = x.dim(1),
                                .scalars = with_scalars ? shape.num_topk : 0,
                                .dtype = dtype,
                                .wire = static_cast<Wire>(wire),
                                .zero_fill = zero_fill,
                                .x = x.data<const void>(),
                                .token_scalars = token_scalars.data<const float>(),
                                .topk_idx = topk_idx.data<const int32_t>(),
                                .slot = slot.data<const int32_t>(),
                                .row_source = row_source.data<const int32_t>(),
                                .rows = rows.data<void>(),
                                .row_scalars = row_scalars.data<float>()});
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_cpu,
                              dispatch,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::State<CpuSite>>()
                                  .Ctx<ffi::RunId>()
                                  .Arg<ffi::AnyBuffer>()  // group_rank
                                  .Arg<ffi::AnyBuffer>()  // x
                                  .Arg<ffi::AnyBuffer>()  // token_scalars
                                  .Arg<ffi::AnyBuffer>()  // topk_idx
                                  .Arg<ffi::AnyBuffer>()  // slot
                                  .Arg<ffi::AnyBuffer>()  // row_source
                                  .Ret<ffi::AnyBuffer>()  // rows
                                  .Ret<ffi::AnyBuffer>()  // row_scalars
                                  .Attr<EpAttrs>("ep")
                                  .Attr<int32_t>("wire")
                                  .Attr<bool>("zero_fill"));

}  // namespace jax_ep
