# SPDX-License-Identifier: Apache-2.0
"""The oracle's plan, dispatch and combine against cases worked out by hand."""

import os
import pathlib
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import jax_ep
from jax_ep import reference

# Two ranks of two tokens each; rank 0 hosts experts 0 and 1, rank 1 hosts 2 and 3. Token t of rank
# r is number 2 r + t in row_source, and its row holds 10 (r + 1) + t.
TOPK_IDX = np.array([[[0, 3], [1, -1]], [[3, 2], [0, 1]]])
TOPK_WEIGHTS = np.array([[[1, 2], [3, 99]], [[4, 5], [6, 7]]], np.float32)
X = np.array([[[10], [11]], [[20], [21]]], np.float32)
BFLOAT16 = ml_dtypes.bfloat16


FP8 = ml_dtypes.float8_e4m3fn


def dispatch(x=X, **kwargs):
    return reference.dispatch(x, TOPK_IDX, TOPK_WEIGHTS, num_experts=4, dtype=np.float32, **kwargs)


def test_expert_rows_by_hand():
    recv = dispatch(recv_capacity=5)
    assert recv.x[..., 0].tolist() == [[10, 21, 11, 21, 0], [20, 10, 20, 0, 0]]
    assert recv.weights.tolist() == [[1, 6, 3, 7, 0], [5, 2, 4, 0, 0]]
    assert recv.topk_idx is None
    assert recv.group_sizes.tolist() == [[2, 2], [1, 2]]
    assert recv.tokens_per_expert.tolist() == [[2, 2], [1, 2]]
    assert recv.num_dropped.tolist() == [0, 0]
    assert recv.plan.slot.tolist() == [[[0, 1], [2, -1]], [[2, 0], [1, 3]]]
    assert recv.plan.row_source.tolist() == [[0, 3, 1, 3, -1], [2, 0, 2, -1, -1]]
    assert recv.plan.row_topk_idx is None


@pytest.mark.parametrize("quantized_before", [False, True])
def test_rows_in_fp8_by_hand(quantized_before):
    """Each row is one block of one element, which is the largest value of FP8 times its scale."""
    x = reference.quantize_fp8(X) if quantized_before else X
    recv = dispatch(x, recv_capacity=5, wire_dtype=FP8, recv_dtype=FP8)
    rows = np.float32([[10, 21, 11, 21, 0], [20, 10, 20, 0, 0]])
    assert (recv.x.values.dtype, recv.x.scales.dtype) == (FP8, np.float32)
    assert recv.x.values[..., 0].astype(int).tolist() == np.where(rows > 0, 448, 0).tolist()
    np.testing.assert_array_equal(recv.x.scales[..., 0], rows / np.float32(448))
    assert dispatch(x, recv_capacity=5, wire_dtype=FP8).x[..., 0].tolist() == rows.tolist()


def test_rows_that_come_in_fp8_are_not_quantized_again():
    x = reference.QuantizedRows(np.full(X.shape, 1.5, FP8), X)  # whose scales are not amax / 448
    recv = dispatch(x, recv_capacity=5, wire_dtype=FP8, recv_dtype=FP8)
    assert recv.x.values[..., 0].tolist() == [[1.5, 1.5, 1.5, 1.5, 0], [1.5, 1.5, 1.5, 0, 0]]
    assert recv.x.scales[..., 0].tolist() == [[10, 21, 11, 21, 0], [20, 10, 20, 0, 0]]
    rows = dispatch(x, recv_capacity=5, wire_dtype=FP8).x[..., 0]
    assert rows.tolist() == [[15, 31.5, 16.5, 31.5, 0], [30, 15, 30, 0, 0]]


def test_expert_rows_are_aligned_by_hand():
    recv = dispatch(recv_capacity=8, expert_alignment=4)
    assert recv.x[..., 0].tolist() == [[10, 21, 0, 0, 11, 21, 0, 0], [20, 0, 0, 0, 10, 20, 0, 0]]
    assert recv.weights.tolist() == [[1, 6, 0, 0, 3, 7, 0, 0], [5, 0, 0, 0, 2, 4, 0, 0]]
    assert recv.group_sizes.tolist() == [[4, 4], [4, 4]]
    assert recv.tokens_per_expert.tolist() == [[2, 2], [1, 2]]
    assert recv.plan.slot.tolist() == [[[0, 4], [4, -1]], [[5, 0], [1, 5]]]


def test_expert_rows_are_dropped_in_row_order_by_hand():
    recv = dispatch(recv_capacity=3)
    assert recv.x[..., 0].tolist() == [[10, 21, 11], [20, 10, 20]]
    assert recv.weights.tolist() == [[1, 6, 3], [5, 2, 4]]
    assert recv.group_sizes.tolist() == [[2, 1], [1, 2]]
    assert recv.tokens_per_expert.tolist() == [[2, 2], [1, 2]]
    assert recv.num_dropped.tolist() == [1, 0]
    assert recv.plan.slot.tolist() == [[[0, 1], [2, -1]], [[2, 0], [1, -1]]]


@pytest.mark.parametrize(
    ("alignment", "capacity", "group_sizes", "num_dropped", "slot"),
    [
        # Rank 1: row 1 is padding of expert 2, rows 2 and 3 are of expert 3.
        (2, 3, [[2, 1], [2, 1]], [1, 1], [[[0, 2], [2, -1]], [[-1, 0], [1, -1]]]),
        # The padding of expert 1 and 3 is cut off, and nothing is lost.
        (4, 6, [[4, 2], [4, 2]], [0, 0], [[[0, 4], [4, -1]], [[5, 0], [1, 5]]]),
        # Padding is cut off, and the experts behind it have no row at all.
        (4, 2, [[2, 0], [2, 0]], [2, 2], [[[0, -1], [-1, -1]], [[-1, 0], [1, -1]]]),
    ],
)
def test_aligned_rows_are_dropped_by_hand(alignment, capacity, group_sizes, num_dropped, slot):
    plan = reference.plan(
        TOPK_IDX, num_experts=4, recv_capacity=capacity, expert_alignment=alignment
    )
    assert plan.group_sizes.tolist() == group_sizes
    assert plan.num_dropped.tolist() == num_dropped
    assert plan.slot.tolist() == slot
    assert plan.tokens_per_expert.tolist() == [[2, 2], [1, 2]]


def test_rank_rows_by_hand():
    recv = dispatch(layout="rank")
    assert recv.x[..., 0].tolist() == [[10, 11, 21, 0], [10, 20, 0, 0]]
    assert recv.weights.tolist() == [
        [[1, 0], [3, 0], [6, 7], [0, 0]],
        [[0, 2], [4, 5], [0, 0], [0, 0]],
    ]
    assert recv.topk_idx.tolist() == [
        [[0, -1], [1, -1], [0, 1], [-1, -1]],
        [[-1, 1], [1, 0], [-1, -1], [-1, -1]],
    ]
    assert recv.group_sizes.tolist() == [[2, 1], [1, 1]]
    assert recv.tokens_per_expert.tolist() == [[2, 2], [1, 2]]
    assert recv.num_dropped.tolist() == [0, 0]
    assert recv.plan.slot.tolist() == [[[0, 0], [1, -1]], [[1, 1], [2, 2]]]
    assert recv.plan.row_source.tolist() == [[0, 1, 3, -1], [0, 2, -1, -1]]


def test_rank_rows_are_dropped_in_row_order_by_hand():
    recv = dispatch(layout="rank", recv_capacity=2)
    assert recv.x[..., 0].tolist() == [[10, 11], [10, 20]]
    assert recv.group_sizes.tolist() == [[2, 0], [1, 1]]
    assert recv.tokens_per_expert.tolist() == [[2, 2], [1, 2]]
    # One row, though it was for two experts.
    assert recv.num_dropped.tolist() == [1, 0]
    assert recv.plan.slot.tolist() == [[[0, 0], [1, -1]], [[1, 1], [-1, -1]]]


def test_the_capacity_is_the_worst_case_by_hand():
    # 2 ranks * 3 tokens * min(2, 2) local experts; each of 2 groups can need 3 more rows: 18, and
    # 16 is the most that groups of multiples of 4 can sum to.
    idx, sizes = np.full((2, 3, 2), -1), {"num_experts": 4}
    assert reference.plan(idx, **sizes).capacity == 12
    assert reference.plan(idx, **sizes, expert_alignment=4).capacity == 16
    assert reference.plan(idx, **sizes, layout="rank").capacity == 6
    assert reference.plan(idx[:, :0], **sizes, expert_alignment=4).capacity == 0
    # One token, 16 local experts of which it can select 2: at most 2 groups need padding.
    wide = reference.plan(np.full((1, 1, 2), -1), num_experts=16, expert_alignment=8)
    assert wide.capacity == 16


def test_the_capacity_of_a_factor_by_hand():
    # 3 tokens * 2 selections * 1.25, rounded up; each of 2 groups can need 3 more rows: 14.
    idx, sizes = np.full((2, 3, 2), -1), {"num_experts": 4, "capacity_factor": 1.25}
    assert reference.plan(idx, **sizes).capacity == 8
    assert reference.plan(idx, **sizes, expert_alignment=4).capacity == 16
    assert reference.plan(idx, **sizes, layout="rank").capacity == 8
    assert reference.plan(idx[:, :0], **sizes).capacity == 0
    assert reference.plan(idx, **sizes, recv_capacity=5).capacity == 5


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_scalars_travel_both_ways_by_hand(layout):
    plan = reference.plan(TOPK_IDX, num_experts=4, layout=layout, recv_capacity=3)
    back = reference.combine_scalars(plan, reference.dispatch_scalars(plan, TOPK_WEIGHTS))
    dropped = {"expert": [6, 0], "rank": [6, 7]}[layout]
    assert back.tolist() == [[[1, 2], [3, 0]], [[4, 5], dropped]]


def test_combine_of_expert_rows_by_hand():
    plan = reference.plan(TOPK_IDX, num_experts=4, recv_capacity=4)
    y = np.array([[[1], [2], [4], [8]], [[16], [32], [64], [np.nan]]], np.float32)
    weights = np.array([[1, 6, 3, 7], [5, 2, 4, 0]], np.float32)
    out = reference.combine(y, plan, dtype=np.float32)
    assert out[..., 0].tolist() == [[1 + 32, 4], [16 + 64, 2 + 8]]
    out = reference.combine(y, plan, weights, dtype=np.float32)
    assert out[..., 0].tolist() == [[1 + 2 * 32, 3 * 4], [5 * 16 + 4 * 64, 6 * 2 + 7 * 8]]


def test_combine_of_rank_rows_by_hand():
    plan = reference.plan(TOPK_IDX, num_experts=4, layout="rank", recv_capacity=3)
    y = np.array([[[1], [2], [4]], [[8], [16], [np.nan]]], np.float32)
    weights = np.array([[[1, 0], [3, 0], [6, 7]], [[0, 2], [4, 5], [0, 0]]], np.float32)
    out = reference.combine(y, plan, dtype=np.float32)
    assert out[..., 0].tolist() == [[1 + 8, 2], [16, 4]]
    out = reference.combine(y, plan, weights, dtype=np.float32)
    assert out[..., 0].tolist() == [[1 + 2 * 8, 3 * 2], [(4 + 5) * 16, (6 + 7) * 4]]


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_a_token_without_selections_gets_positive_zero(layout):
    plan = reference.plan(np.full((2, 1, 2), -1), num_experts=2, layout=layout)
    y = np.full((2, plan.capacity, 3), np.nan, np.float32)
    out = reference.combine(y, plan, dtype=np.float32)
    assert out.tolist() == [[[0, 0, 0]], [[0, 0, 0]]]
    assert not np.signbit(out).any()


@pytest.mark.parametrize("layout", ["expert", "rank"])
def test_a_sum_of_negative_zeros_is_positive_zero(layout):
    plan = reference.plan(np.array([[[0]]]), num_experts=1, layout=layout)
    out = reference.combine(np.array([[[-0.0]]], np.float32), plan, dtype=np.float32)
    assert not np.signbit(out).any()


def test_a_dropped_row_counts_as_zero_by_hand():
    plan = reference.plan(TOPK_IDX, num_experts=4, recv_capacity=2)
    y = np.array([[[1], [2]], [[16], [32]]], np.float32)
    out = reference.combine(y, plan, dtype=np.float32)
    assert out[..., 0].tolist() == [[1 + 32, 0], [16, 2]]


def one_token(values, *, num_ranks, order=None, dtype=np.float32, weights=None):
    """The sum of one token's rows, one from each expert; `order` permutes its top-k positions."""
    num_experts = len(values)
    topk_idx = np.full((num_ranks, 1, num_experts), -1)
    topk_idx[0, 0] = range(num_experts) if order is None else order
    plan = reference.plan(topk_idx, num_experts=num_experts)
    y = np.zeros((num_ranks, plan.capacity, 1), np.float32)
    scale = np.zeros((num_ranks, plan.capacity), np.float32)
    num_local = num_experts // num_ranks
    for expert, value in enumerate(values):
        y[expert // num_local, expert % num_local] = value
        scale[expert // num_local, expert % num_local] = 1 if weights is None else weights[expert]
    out = reference.combine(y, plan, None if weights is None else scale, dtype=dtype)
    return float(out[0, 0, 0])


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_a_rank_adds_its_experts_in_ascending_order(order):
    # 2^24 + 1 is a tie that float32 rounds to 2^24.
    big = 2.0**24
    assert one_token([big, 1, 1], num_ranks=1, order=order) == big
    assert one_token([1, 1, big], num_ranks=1, order=order) == big + 2


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 2, 0)])
def test_ranks_are_added_in_ascending_order(order):
    big = 2.0**24
    assert one_token([big, 1, 1], num_ranks=3, order=order) == big
    assert one_token([1, 1, big], num_ranks=3, order=order) == big + 2


def test_a_ranks_sum_is_rounded_once_before_it_travels():
    # bfloat16 rounds 257 to 256, and so the ranks' sums cancel...
    assert one_token([256, 1, -256, 0], num_ranks=2, dtype=BFLOAT16) == 0
    # ...but not inside a rank, where 256 + 1 stays 257 and 1 is left.
    assert one_token([256, 1, -256, 0], num_ranks=1, dtype=BFLOAT16) == 1
    # Sums over ranks are not rounded in between either: 128 + 0.5 + 0.5.
    assert one_token([128, 0.5, 0.5, 0], num_ranks=4, dtype=BFLOAT16) == 129


def test_weights_are_applied_by_fma():
    w = 1 + 2.0**-12  # w * w = 1 + 2^-11 + 2^-24, which float32 rounds to 1 + 2^-11
    values, weights = [1 + 2.0**-11, w], [-1, w]
    assert one_token(values, num_ranks=1, weights=weights) == 2.0**-24


def test_rank_rows_apply_weights_in_ascending_expert_order():
    plan = reference.plan(np.array([[[2, 0, 1]]]), num_experts=3, layout="rank")
    weights = np.array([[[1, 2.0**24, 1]]], np.float32)
    out = reference.combine(np.ones((1, 1, 1), np.float32), plan, weights, dtype=np.float32)
    assert out.item() == 2.0**24


@pytest.mark.parametrize(
    ("index", "message"),
    [
        (4, r"topk_idx of rank 1, token 0, k 1 is 4; allowed: -1 to 3"),
        (-2, r"topk_idx of rank 1, token 0, k 1 is -2; allowed: -1 to 3"),
        (3, r"topk_idx of rank 1, token 0, k 1 is 3, which the token has selected already"),
    ],
)
def test_bad_indices_are_named(index, message):
    topk_idx = TOPK_IDX.copy()
    topk_idx[1, 0, 1] = index
    with pytest.raises(ValueError, match=message):
        reference.plan(topk_idx, num_experts=4)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_experts is 5; it must be a multiple of 2"):
        reference.plan(TOPK_IDX, num_experts=5)
    with pytest.raises(ValueError, match="layout 'rank' with expert_alignment 2 is not defined"):
        reference.plan(TOPK_IDX, num_experts=4, layout="rank", expert_alignment=2)
    with pytest.raises(ValueError, match="layout 'row' with expert_alignment 1 is not defined"):
        reference.plan(TOPK_IDX, num_experts=4, layout="row")
    with pytest.raises(ValueError, match="wire_dtype is int8; allowed: None, float8_e4m3fn"):
        dispatch(wire_dtype="int8")
    with pytest.raises(ValueError, match="recv_dtype is int8; allowed: None, float8_e4m3fn"):
        dispatch(wire_dtype=FP8, recv_dtype="int8")
    with pytest.raises(ValueError, match="recv_dtype is float8_e4m3fn and wire_dtype is None; all"):
        dispatch(recv_dtype=FP8)
    with pytest.raises(ValueError, match="x is a QuantizedRows and wire_dtype is None; allowed wi"):
        dispatch(reference.quantize_fp8(X))
    with pytest.raises(ValueError, match="dtype is None; exact_bits needs the dtype of the rows"):
        reference.combine(X, reference.plan(TOPK_IDX, num_experts=4))


_WITHOUT_JAX = """
import sys
for name in ("jax", "jaxlib", "flax"):
    sys.modules[name] = None  # importing it raises
import numpy as np
import jax_ep.reference as reference
logits = np.random.default_rng(0).standard_normal((2, 3, 4))
routed = [reference.route(rank, num_topk=2) for rank in logits]
idx, weights = (np.stack(part) for part in zip(*routed))
w = np.ones((4, 5, 6))
x = np.ones((2, 3, 5))
out = reference.moe(x, idx, weights, w, w, w.transpose(0, 2, 1), wire_dtype="float8_e4m3fn")
assert out.shape == (2, 3, 5)
bad = [m for m in sys.modules if m.startswith("jax_ep.") and "reference" not in m]
assert not bad, bad
print("ran")
"""


def test_runs_where_jax_cannot_be_imported_and_loads_nothing_of_the_library():
    root = pathlib.Path(jax_ep.__file__).parent.parent
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_JAX],
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == ("ran\n", 0), done.stderr
