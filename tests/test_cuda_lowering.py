# SPDX-License-Identifier: Apache-2.0
"""What a program for GPUs holds, lowered where there is none: the calls that our handlers decode.

The handlers' own sources (xla_ffi/) say how many operands and results and which attributes they
take.
"""

import collections
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jax_ep
from ep_testing import fake_cuda
from ep_testing.problems import PROBLEMS
from ep_testing.programs import make_group, make_mesh

XLA_FFI = pathlib.Path(__file__).resolve().parents[1] / "xla_ffi"
TARGETS = ("jax_ep_plan", "jax_ep_dispatch", "jax_ep_combine", "jax_ep_plan_dispatch")
HALVES = (
    *("jax_ep_dispatch_start", "jax_ep_dispatch_done"),
    *("jax_ep_combine_start", "jax_ep_combine_done"),
)
EXPERT = PROBLEMS["eight_ranks"]
PROBLEMS_HERE = {
    "expert": EXPERT,
    "rank": EXPERT.replace(layout="rank"),
    "fp8": EXPERT.replace(wire_dtype="float8_e4m3fn"),
    "fp8_rows": EXPERT.replace(wire_dtype="float8_e4m3fn", recv_dtype="float8_e4m3fn"),
    "bfloat16": EXPERT.replace(dtype="bfloat16"),
}
_MLIR_TYPES = {"int64_t": "i64", "int32_t": "i32", "bool": "i1"}

pytestmark = pytest.mark.skipif(not XLA_FFI.is_dir(), reason="the C++ sources are not here")


@pytest.fixture
def fake(monkeypatch):
    return fake_cuda.install(monkeypatch)


# --- what the handlers decode ------------------------------------------------------------------


def _struct_members(name: str) -> dict[str, str]:
    """Name -> MLIR type of the members of an attribute struct."""
    for header in XLA_FFI.glob("*.h"):
        pattern = rf"XLA_FFI_REGISTER_STRUCT_ATTR_DECODING\(\s*(?:jax_ep::)?{name},(.*?)\);\n"
        found = re.search(pattern, header.read_text(), re.DOTALL)
        if found:
            members = re.findall(r'StructMember<(\w+)>\("(\w+)"\)', found[1])
            return {member: _MLIR_TYPES[cpp] for cpp, member in members}
    raise AssertionError(f"no header of xla_ffi registers {name}")


def _declaration(target: str) -> str:
    """What the target's CUDA handler binds."""
    file = "halves" if target in HALVES else target.removeprefix("jax_ep_")
    text = (XLA_FFI / "cuda" / f"{file}.cc").read_text()
    pattern = rf"XLA_FFI_DEFINE_HANDLER_SYMBOL\(\s*{target}_cuda,(.*?)\);\n"
    found = re.search(pattern, text, re.DOTALL)
    assert found, f"no handler {target}_cuda"
    return found[1] + "".join(
        body for name, body in _shared_bindings().items() if f"{name}(" in found[1]
    )


def _shared_bindings() -> dict[str, str]:
    """Functions that bind what several handlers have: name -> body."""
    texts = [
        path.read_text() for path in (XLA_FFI / "cuda/rank_call.h", XLA_FFI / "op_arguments.h")
    ]
    pattern = re.compile(r"^(?:inline )?auto (\w+)\((.*?)^}$", re.DOTALL | re.MULTILINE)
    return dict(found for text in texts for found in pattern.findall(text))


def _decoded(target: str) -> dict:
    """Counts of operands and results, and attributes: name -> type, or members of a struct."""
    declaration = _declaration(target)
    text = (XLA_FFI / "op_arguments.cc").read_text()
    name = target.removeprefix("jax_ep_")
    # A second half has the operands of the whole, and the ticket.
    name = {"dispatch_done": "plan_dispatch", "combine_done": "combine"}.get(name, name)
    (reads,) = re.findall(rf"^Status read_{name}\(.*?^}}$", text, re.DOTALL | re.MULTILINE)
    for part in re.findall(r"const (\w+) \w+\(reader(?:, \w+)?\);", reads):  # by a constructor
        reads += text.partition(f"struct {part} {{")[2].partition("\n};")[0]
    attributes = {}
    for cpp, name in re.findall(r'\bAttr<(\w+)>\("(\w+)"\)', declaration):
        attributes[name] = _MLIR_TYPES[cpp] if cpp in _MLIR_TYPES else _struct_members(cpp)
    return {
        "operands": reads.count("reader.operand(") + target.endswith("_done"),
        "results": reads.count("reader.result("),
        "attributes": attributes,
    }


# --- what a lowered program holds --------------------------------------------------------------


def _operations(operation):
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation
                yield from _operations(inner.operation)


def _type_of(attribute):
    """MLIR type of an attribute of a call, or the types of a dictionary's entries."""
    if str(attribute).startswith("{"):
        return {entry.name: _type_of(entry.attr) for entry in attribute}
    return str(attribute.type)


def _calls(lowered) -> list:
    """The calls; they live as long as `lowered` does."""
    module = lowered.compiler_ir("stablehlo")
    calls = [op for op in _operations(module.operation) if op.name == "stablehlo.custom_call"]
    return [call for call in calls if _target(call) not in ("Sharding", "SPMDFullToShardShape")]


def _target(call) -> str:
    return str(call.attributes["call_target_name"]).strip('"')


def _lower(f, group, problem):
    """`f(x, topk_idx, topk_weights, weights)` of every rank, for platform cuda."""
    hidden, experts = problem.hidden, problem.num_experts
    tokens = [a.reshape(-1, a.shape[-1]) for a in (problem.x, problem.topk_idx)]
    tokens.append(problem.topk_weights.reshape(-1, problem.num_topk))
    shapes = (experts, hidden, 4), (experts, hidden, 4), (experts, 4, hidden)
    weights = [np.ones(shape, problem.np_dtype) for shape in shapes]
    spec = P("expert")
    mapped = jax.shard_map(f, mesh=group.mesh, in_specs=spec, out_specs=spec)
    return jax.jit(mapped).trace(*tokens, weights).lower(lowering_platforms=("cuda",))


def _program(kind: str, group):
    def layer(x, idx, w, weights):
        if group.config.layout == "rank":  # jax_ep.moe is for layout "expert"
            received = jax_ep.dispatch(x, idx, w, group=group)
            y = jnp.sin(received.x)
            return jax_ep.combine(y, received.handle, received.weights, group=group)
        return jax_ep.moe(x, idx, w, *weights, group=group)

    def layers(x, idx, w, weights):
        def step(x, _):
            return layer(x, idx, w, weights), None

        return jax.lax.scan(jax.checkpoint(step), x, None, length=3)[0]

    def grad(f):
        def loss(x, w, idx, weights):
            return jnp.sum(jnp.cos(f(x, idx, w, weights).astype(jnp.float32)))

        return lambda x, idx, w, weights: jax.grad(loss, argnums=(0, 1, 3))(x, w, idx, weights)

    def counts(x, idx, w, weights):
        del weights
        return jax_ep.dispatch(x, idx, w, group=group).num_dropped[None]

    remat = jax.checkpoint(layer, policy=jax.checkpoint_policies.nothing_saveable)
    return {
        "counts": counts,
        "forward": layer,
        "backward": grad(layer),
        "scan": layers,
        "backward_of_scan": grad(layers),
        "remat": grad(remat),
    }[kind]


KINDS = ("counts", "forward", "backward", "scan", "backward_of_scan", "remat")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROBLEMS_HERE)
def test_calls_are_as_the_handlers_declare(name, kind, fake):
    problem = PROBLEMS_HERE[name]
    with make_group(problem, "ffi") as group:
        lowered = _lower(_program(kind, group), group, problem)
    calls = _calls(lowered)
    counts = collections.Counter(_target(call) for call in calls)
    forward = {"jax_ep_plan_dispatch", "jax_ep_combine"}
    backward = forward | {"jax_ep_dispatch"}
    expected = {
        "counts": {"jax_ep_plan"},
        "forward": forward,
        "scan": forward,
        # All turns have the same routing: JAX makes its plan once, before the loop.
        "backward_of_scan": set(TARGETS),
    }
    assert set(counts) == expected.get(kind, backward), "our targets and no others"
    if kind in ("counts", "forward"):
        assert set(counts.values()) == {1}
    for call in calls:
        attributes = call.attributes["mhlo.backend_config"]
        assert {
            "operands": len(call.operands),
            "results": len(call.results),
            "attributes": _type_of(attributes),
        } == _decoded(_target(call)), _target(call)
        assert str(call.attributes["has_side_effect"]) == "false"


def test_every_handler_may_be_recorded_in_a_cuda_graph():
    for target in TARGETS + HALVES:
        assert "kCmdBufferCompatible" in _declaration(target), target


@pytest.mark.parametrize("layout", ["expert", "rank"])
@pytest.mark.parametrize("quantized_in", [False, True])
@pytest.mark.parametrize("quantized_out", [False, True])
def test_rows_in_fp8_are_passed_with_their_scales(layout, quantized_in, quantized_out, fake):
    fp8 = "float8_e4m3fn"
    problem = PROBLEMS["fp8"].replace(
        hidden=200, layout=layout, recv_dtype=fp8 if quantized_out else None
    )

    def forward(x, idx, w, weights):
        del weights
        x = jax_ep.quantize(x) if quantized_in else x
        return jax.tree.leaves(jax_ep.dispatch(x, idx, w, group=group).x)

    with make_group(problem, "ffi") as group:
        lowered = _lower(forward, group, problem)
    (call,) = [call for call in _calls(lowered) if _target(call) == "jax_ep_plan_dispatch"]
    x, x_scales = (str(operand.type) for operand in list(call.operands)[1:3])
    rows, rows_scales = (str(result.type) for result in list(call.results)[-3:-1])
    tokens, capacity = problem.num_tokens, problem.plan.capacity
    fp8_in, fp8_out = (quantized_in, "f8E4M3FN"), (quantized_out, "f8E4M3FN")
    for (quantized, name), count, values, scales in (
        (fp8_in, tokens, x, x_scales),
        (fp8_out, capacity, rows, rows_scales),
    ):
        assert values == f"tensor<{count}x200x{name if quantized else 'bf16'}>"
        assert scales == (f"tensor<{count}x2xf32>" if quantized else "tensor<0xf32>")


@pytest.mark.parametrize(("layout", "rows_per_token"), [("expert", 2), ("rank", 1)])
def test_source_slot_goes_from_the_plan_to_the_others(layout, rows_per_token, fake):
    problem = EXPERT.replace(layout=layout)
    assert (problem.num_topk, problem.num_experts // problem.num_ranks) == (4, 2)
    with make_group(problem, "ffi") as group:
        lowered = _lower(_program("backward", group), group, problem)
    calls = {_target(call): call for call in _calls(lowered)}
    rows = problem.num_ranks * problem.num_tokens
    shape = f"tensor<{rows}x{rows_per_token}xi32>"
    assert str(calls["jax_ep_plan_dispatch"].results[3].type) == shape
    assert str(calls["jax_ep_dispatch"].operands[-1].type) == shape
    assert str(calls["jax_ep_combine"].operands[-1].type) == shape


def test_a_group_of_gpus_does_not_compile_for_cpu(fake):
    with make_group(EXPERT, "ffi") as group:
        arguments = [a.reshape(-1, a.shape[-1]) for a in (EXPERT.x, EXPERT.topk_idx)]

        def on_rank(x, idx):
            return jax_ep.dispatch(x, idx, group=group).x

        mapped = jax.shard_map(
            on_rank, mesh=group.mesh, in_specs=P("expert"), out_specs=P("expert")
        )
        with pytest.raises(
            ValueError, match="for platform 'cpu', and its EpGroup is of platform 'cuda'"
        ):
            jax.jit(mapped).lower(*arguments)


def test_a_group_of_cpus_does_not_compile_for_gpus():
    with make_group(EXPERT, "ffi") as group:
        assert group.platform == "cpu"
        with pytest.raises(
            ValueError, match="for platform 'cuda', and its EpGroup is of platform 'cpu'"
        ):
            _lower(_program("forward", group), group, EXPERT)


def test_a_handle_of_another_platform_is_refused(monkeypatch):
    mesh = make_mesh((EXPERT.num_ranks,), ("expert",))
    on_cpu = make_group(EXPERT, "ffi", mesh=mesh)
    fake_cuda.install(monkeypatch)
    on_gpu = make_group(EXPERT, "ffi", mesh=mesh)

    def mixed(x, idx, w, weights):
        received = jax_ep.dispatch(x, idx, group=on_gpu)
        assert received.handle.source_slot is not None
        return jax_ep.combine(received.x, received.handle, group=on_cpu)

    with on_cpu, on_gpu, pytest.raises(ValueError, match="handle is of a dispatch by another back"):
        _lower(mixed, on_gpu, EXPERT)


def _in_halves(group):
    def halves(x, idx, w, weights):
        del weights
        flight = jax_ep.dispatch_start(x, idx, w, group=group)
        received = jax_ep.dispatch_done(flight, after=jnp.cos(x), group=group)
        flight = jax_ep.combine_start(received.x, received.handle, received.weights, group=group)
        return jax_ep.combine_done(flight, group=group)

    return halves


@pytest.mark.parametrize("low_latency_tokens", [None, 0, EXPERT.num_tokens - 1])
def test_halves_of_large_calls_on_gpus_are_the_operations_in_one_piece(low_latency_tokens, fake):
    """The first half does it all."""
    problem = EXPERT.replace(low_latency_tokens=low_latency_tokens)
    with make_group(problem, "ffi") as group:
        lowered = _lower(_in_halves(group), group, problem)
    targets = sorted(_target(call) for call in _calls(lowered))
    assert targets == ["jax_ep_combine", "jax_ep_plan_dispatch"]


@pytest.mark.parametrize("domain_size", [None, 1, 2, 4])
def test_sums_over_domains_are_in_one_piece(domain_size, fake):
    problem = EXPERT.replace(
        num_ranks=4, domain_size=domain_size, low_latency_tokens=EXPERT.num_tokens
    )
    with make_group(problem, "ffi") as group:
        lowered = _lower(_in_halves(group), group, problem)
    combines = {_target(c) for c in _calls(lowered)} - {
        "jax_ep_dispatch_start",
        "jax_ep_dispatch_done",
    }
    halves = {"jax_ep_combine_start", "jax_ep_combine_done"}
    assert combines == ({"jax_ep_combine"} if domain_size == 2 else halves)


@pytest.mark.parametrize("name", PROBLEMS_HERE)
def test_halves_of_low_latency_calls_are_as_the_handlers_declare(name, fake):
    problem = PROBLEMS_HERE[name].replace(low_latency_tokens=EXPERT.num_tokens)

    def halves(x, idx, w, weights):
        if group.config.recv_dtype is None:
            return _in_halves(group)(x, idx, w, weights)
        flight = jax_ep.dispatch_start(x, idx, w, group=group)
        return jax_ep.dispatch_done(flight, after=jnp.cos(x), group=group).weights

    with make_group(problem, "ffi") as group:
        lowered = _lower(halves, group, problem)
    calls = {_target(call): call for call in _calls(lowered)}
    assert set(calls) == set(HALVES if problem.recv_dtype is None else HALVES[:2])
    for target, call in calls.items():
        declared = _decoded(target)
        declared["operands"] += target == "jax_ep_dispatch_done"  # what it comes after
        assert {
            "operands": len(call.operands),
            "results": len(call.results),
            "attributes": _type_of(call.attributes["mhlo.backend_config"]),
        } == declared, target
        has_side_effect = str(call.attributes["has_side_effect"])
        assert has_side_effect == str(target.endswith("_start")).lower()


def test_gradients_through_halves_move_no_second_half(fake):
    """Backwards the rows go through the exchanges in one piece."""
    problem = EXPERT.replace(low_latency_tokens=EXPERT.num_tokens)

    def gradient(x, idx, w, weights):
        def loss(x):
            return jnp.sum(_in_halves(group)(x, idx, w, weights) ** 2)

        return jax.grad(loss)(x)

    with make_group(problem, "ffi") as group:
        lowered = _lower(gradient, group, problem)
    counts = collections.Counter(_target(call) for call in _calls(lowered))
    assert {name: counts[name] for name in HALVES} == dict.fromkeys(HALVES, 1)
    assert counts["jax_ep_plan_dispatch"] == counts["jax_ep_plan"] == 0
    assert counts["jax_ep_dispatch"] >= 1, "the transpose of combine"
    assert counts["jax_ep_combine"] >= 1, "the transpose of dispatch"
