// SPDX-License-Identifier: Apache-2.0
// The halves of an exchange. The first one is called with the operands of the whole operation and
// keeps copies of them; the second one reads the whole operation's call from those copies and its
// own results.
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "csrc/cpu/flights/flights.h"
#include "xla_ffi/cpu/handlers.h"
#include "xla_ffi/cpu/rank_call.h"
#include "xla_ffi/op_arguments.h"

namespace jax_ep {
namespace {

// A flight's number, in two words: JAX has no integers of 64 bits by default.
static_assert(kTicketWords == 2);

FlightNumber read_ticket(const uint32_t* words) {
  return FlightNumber{words[1]} << 32 | FlightNumber{words[0]};
}

void write_ticket(FlightNumber number, uint32_t* words) {
  words[0] = static_cast<uint32_t>(number);
  words[1] = static_cast<uint32_t>(number >> 32);
}

OperandView view_of(const ffi::AnyBuffer& buffer) {
  return {.dtype = static_cast<int32_t>(buffer.element_type()),
          .dims = {buffer.dimensions().begin(), buffer.dimensions().size()},
          .bytes = {static_cast<const std::byte*>(buffer.untyped_data()), buffer.size_bytes()}};
}

// Copies as XLA would pass them.
class StagedBuffers {
 public:
  explicit StagedBuffers(const StagedOperands& operands) {
    for (const OperandView& view : operands.views()) {
      XLA_FFI_Buffer& buffer = buffers_.emplace_back();
      std::memset(&buffer, 0, sizeof(buffer));
      buffer.struct_size = XLA_FFI_Buffer_STRUCT_SIZE;
      buffer.dtype = static_cast<XLA_FFI_DataType>(view.dtype);
      // XLA's type has no const; nobody writes to operands.
      buffer.data = const_cast<std::byte*>(view.bytes.data());
      buffer.rank = static_cast<int64_t>(view.dims.size());
      buffer.dims = const_cast<int64_t*>(view.dims.data());
    }
  }

  // After `program_rank`, the operands of the whole operation.
  [[nodiscard]] Operands after(const ffi::AnyBuffer& program_rank) const {
    std::vector<ffi::AnyBuffer> all = {program_rank};
    for (const XLA_FFI_Buffer& buffer : buffers_) all.emplace_back(&buffer);
    return Operands(std::move(all));
  }

 private:
  std::vector<XLA_FFI_Buffer> buffers_;
};

// Those that take part in a call, of which the last operand may be a mask. What it should look like
// is checked with the other operands, by the second half.
RankSet ranks_of(const Operands& operands, int32_t num_ranks) {
  const Buffer last("rank_mask", operands[operands.size() - 1]);
  if (!last.check(ffi::DataType::PRED, {num_ranks}).ok()) return {};
  return {last.data<const uint8_t>(), num_ranks};
}

ffi::Future start(FlightKind kind,
                  const RankCall& call,
                  const ffi::RemainingArgs& args,
                  const ffi::RemainingRets& results,
                  const EpAttrs& attrs,
                  bool counts) {
  const Operands operands(args);
  BufferReader reader(operands, results);
  const Buffer program_rank = reader.operand("program_rank");
  const Buffer ticket = reader.result("ticket");
  Status status = ticket.check(ffi::DataType::U32, {kTicketWords});
  if (status.ok()) status = program_rank.check(ffi::DataType::S32, {1});
  GroupRank rank;
  if (status.ok()) status = find_rank(call, attrs, start_name(kind), rank);
  if (!status.ok()) return refuse_call(call, attrs, status);
  Flights::Start begun{.kind = kind,
                       .group = rank.group,
                       .run_id = call.run_id.run_id,
                       .site = call.site->number,
                       .place = rank.place,
                       .ranks = ranks_of(operands, attrs.num_ranks),
                       .counts = counts,
                       .operands = {}};
  if (!begun.ranks.has(rank.place.rank)) {  // nobody else is in its flight
    begun.ranks = RankSet::only(rank.place.rank, attrs.num_ranks);
    begun.counts = false;
  }
  for (size_t i = 1; i < operands.size(); ++i) begun.operands.push_back(view_of(operands[i]));
  ffi::Promise promise;
  ffi::Future future(promise);
  rank.group->flights->start(std::move(begun),
                             [promise, words = ticket.data<uint32_t>()](
                                 const Status& outcome, FlightNumber number) mutable {
                               if (!outcome.ok()) return promise.SetError(to_error(outcome));
                               write_ticket(number, words);
                               promise.SetAvailable();
                             });
  return future;
}

// `read(operands, arguments)` decodes the whole operation's call. Operands: program_rank, ticket,
// and what the second half is to come after, which nobody reads.
template <typename Op, typename Read>
ffi::Future finish(FlightKind kind,
                   const RankCall& call,
                   const ffi::RemainingArgs& args,
                   const EpAttrs& attrs,
                   const Read& read) {
  const Operands operands(args);
  if (operands.size() < 2) {
    return refuse_call(call,
                       attrs,
                       Status::invalid_argument("the call has " + std::to_string(operands.size()) +
                                                " operands; expected at least 2"));
  }
  const Buffer program_rank("program_rank", operands[0]);
  const Buffer ticket("ticket", operands[1]);
  Status status = program_rank.check(ffi::DataType::S32, {1});
  if (status.ok()) status = ticket.check(ffi::DataType::U32, {kTicketWords});
  GroupRank rank;
  if (status.ok()) status = find_rank(call, attrs, done_name(kind), rank);
  if (!status.ok()) return refuse_call(call, attrs, status);

  const FlightNumber number = read_ticket(ticket.data<const uint32_t>());
  TakenFlight flight{.kind = kind, .number = number};
  OpArguments<Op> arguments;
  const Flights::Done done{.kind = kind, .number = number, .place = rank.place};
  status = rank.group->flights->take(done, flight.operands);
  if (status.ok()) {
    const StagedBuffers staged(*flight.operands);
    status = read(staged.after(operands[0]), arguments);
  }
  return join_rendezvous(call,
                         rank,
                         program_rank.data<const int32_t>(),
                         {.num_ranks = attrs.num_ranks,
                          .call = arguments.op,
                          .flight = std::move(flight),
                          .refusal = std::move(status)});
}

ffi::Future dispatch_start(CallSiteState* site,
                           ffi::RunId run_id,
                           int32_t device,
                           ffi::RemainingArgs operands,
                           ffi::RemainingRets results,
                           EpAttrs attrs,
                           bool counts) {
  return start(FlightKind::kDispatch, {site, run_id, device}, operands, results, attrs, counts);
}

ffi::Future combine_start(CallSiteState* site,
                          ffi::RunId run_id,
                          int32_t device,
                          ffi::RemainingArgs operands,
                          ffi::RemainingRets results,
                          EpAttrs attrs,
                          bool counts) {
  return start(FlightKind::kCombine, {site, run_id, device}, operands, results, attrs, counts);
}

ffi::Future dispatch_done(CallSiteState* site,
                          ffi::RunId run_id,
                          int32_t device,
                          ffi::RemainingArgs operands,
                          ffi::RemainingRets results,
                          EpAttrs attrs,
                          int32_t dtype,
                          int32_t wire,
                          bool zero_fill) {
  const DispatchAttrs own{.dtype = dtype, .wire = wire, .zero_fill = zero_fill};
  return finish<PlanDispatchOp>(FlightKind::kDispatch,
                                {site, run_id, device},
                                operands,
                                attrs,
                                [&](const Operands& staged, auto& arguments) {
                                  return read_plan_dispatch(
                                      staged, results, attrs, own, Platform::kCpu, arguments);
                                });
}

ffi::Future combine_done(CallSiteState* site,
                         ffi::RunId run_id,
                         int32_t device,
                         ffi::RemainingArgs operands,
                         ffi::RemainingRets results,
                         EpAttrs attrs,
                         int32_t domain_size) {
  return finish<CombineOp>(FlightKind::kCombine,
                           {site, run_id, device},
                           operands,
                           attrs,
                           [&](const Operands& staged, auto& arguments) {
                             return read_combine(
                                 staged, results, attrs, domain_size, Platform::kCpu, arguments);
                           });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_start_cpu,
                              dispatch_start,
                              bind_call().Attr<bool>("counts"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_dispatch_done_cpu,
                              dispatch_done,
                              with_dispatch_attrs(bind_call()));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_start_cpu,
                              combine_start,
                              bind_call().Attr<bool>("counts"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(jax_ep_combine_done_cpu,
                              combine_done,
                              with_combine_attrs(bind_call()));

}  // namespace jax_ep
