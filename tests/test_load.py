# SPDX-License-Identifier: Apache-2.0
"""`LoadWindow` and `LoadReport`: against counts by hand, Prometheus' own parser, and pictures."""

import functools
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from matplotlib.image import imread
from prometheus_client.parser import text_string_to_metric_families

import jax_ep
from ep_testing.flax_layers import EXPERTS, FFN, HIDDEN, LOAD, TOPK, make_group, plan_of
from ep_testing.hlo import collectives
from jax_ep import __main__, plot
from jax_ep.flax import nnx as ep_nnx
from jax_ep.flax.nnx import LayerStats

LAYERS, E, R = 2, 6, 3


def stats_of(counts, dropped=None):
    """As of one layer with `stats="all"`, experts in blocks."""
    counts = jnp.asarray(counts, jnp.int32)
    dropped = jnp.zeros(R, jnp.int32) if dropped is None else jnp.asarray(dropped, jnp.int32)
    zero = jnp.zeros((), jnp.float32)
    return LayerStats(
        tokens_per_expert=counts,
        num_dropped=dropped.sum(dtype=jnp.int32),
        load_balance_loss=zero,
        router_z_loss=zero,
        rows_per_rank=counts.reshape(R, -1).sum(axis=1, dtype=jnp.int32),
        dropped_per_rank=dropped,
    )


def drawn(steps, seed=0):
    return np.random.default_rng(seed).integers(0, 50, (steps, LAYERS, E))


@functools.partial(jax.jit, donate_argnums=0)
def add(window, stats):
    return window.add(stats)


def window_of(counts, **options):
    window = None
    for step in counts:
        stats = [stats_of(layer) for layer in step]
        window = jax_ep.LoadWindow.like(stats, **options) if window is None else window
        window = add(window, stats)
    return window


# --- the window --------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3, 4, 11])
def test_the_window_has_the_last_steps(steps):
    counts = drawn(steps)
    report = window_of(counts, length=4, half_life=2.0).read()
    last = counts[-4:]
    np.testing.assert_array_equal(report.counts, last)
    rows = last.reshape(*last.shape[:2], R, -1).sum(-1)
    np.testing.assert_array_equal(report.rows, rows)
    np.testing.assert_array_equal(report.total, counts.sum(axis=0))
    assert report.step == steps
    average = counts[0].astype(float)
    for step in counts[1:]:
        average = 0.5**0.5 * average + (1 - 0.5**0.5) * step
    np.testing.assert_allclose(report.ema, average, rtol=1e-5)


def test_totals_do_not_overflow():
    most = np.full((5, LAYERS, E), 2**30)
    report = window_of(most, length=2).read()
    assert (report.total == 5 * 2**30).all()
    assert (report.load == 2 * 2**30).all()


def test_an_empty_window():
    window = jax_ep.LoadWindow.like([stats_of(np.ones(E))] * LAYERS)
    assert window.counts.shape == (100, LAYERS, E)
    report = window.read()
    assert report.counts.shape == (0, LAYERS, E)
    assert report.imbalance.tolist() == [1, 1]
    assert report.expert_cv.tolist() == report.dropped_share.tolist() == [0, 0]
    with pytest.raises(ValueError, match="report has no step; allowed: at least one"):
        plot.heat_map(report)


def test_stacked_layers_are_those_of_a_list():
    stats = [stats_of(c) for c in drawn(1)[0]]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *stats)
    one = jax_ep.LoadWindow.like(stacked).add(stacked).read()
    other = jax_ep.LoadWindow.like(stats).add(stats).read()
    np.testing.assert_array_equal(one.counts, other.counts)
    shapes = jax.eval_shape(lambda: stacked)
    assert jax_ep.LoadWindow.like(shapes).counts.shape == (100, LAYERS, E)


@pytest.mark.parametrize("kind", ["all", "load"])
def test_of_layers_with_copies(kind):
    """Three steps inside of one program; "load" adds no collective, and its sums are the same."""
    plan = plan_of(np.stack([LOAD, np.arange(1, EXPERTS + 1)]))
    x = jax.random.normal(jax.random.key(0), (3, 16, HIDDEN))
    with make_group(num_experts=12) as group:
        layers = [
            ep_nnx.MoE(group, FFN, placement=plan.layer(i), rngs=nnx.Rngs(i)) for i in range(2)
        ]
        graph, state = nnx.split(layers)
        tokens = jax.sharding.PartitionSpec(("data", "expert"))
        x = jax.device_put(x, jax.sharding.NamedSharding(group.mesh, jax.sharding.PartitionSpec()))

        def step(window, state, x):
            x = jax.lax.with_sharding_constraint(x, jax.sharding.NamedSharding(group.mesh, tokens))
            found = [m.with_stats(x, stats=kind)[1] for m in nnx.merge(graph, state)]
            return window.add(found)

        stats = [m.with_stats(x[0], stats=kind)[1] for m in layers]
        run = jax.jit(step, donate_argnums=0)
        window = jax_ep.LoadWindow.like(stats, length=3)
        text = run.lower(window, state, x[0]).compile().as_text()
        for tokens_of_step in x:
            window = run(window, state, tokens_of_step)
        # Where sums of all devices end up is the compiler's choice, which the second call knows.
        assert run._cache_size() <= (1 if kind == "load" else 2)
        want = [[m.with_stats(s, routing=True)[1].topk_idx for m in layers] for s in x]
    if kind == "load":
        assert not collectives(text)
    report = window.read(plan) if kind == "load" else window.read()
    counts = [[np.bincount(np.ravel(i), minlength=EXPERTS) for i in s] for s in want]
    np.testing.assert_array_equal(report.counts, counts)
    np.testing.assert_array_equal(report.total, np.sum(counts, axis=0))
    assert report.rows.shape == (3, 2, 4)
    assert (report.rows.sum(axis=2) == 16 * TOPK).all()
    if kind == "all":
        with pytest.raises(ValueError, match="allowed: a placement only for statistics by slot"):
            window.read(plan)


ONE = stats_of(np.ones(E))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jax_ep.LoadWindow.like([ONE], length=0), "length is 0; allowed: an int from 1"),
        (lambda: jax_ep.LoadWindow.like([ONE], half_life=0.0), "half_life is 0.0; allowed: finite"),
        (lambda: jax_ep.LoadWindow.like(ONE), r"\[6\], of one layer; allowed: \[stats\], or"),
        (lambda: jax_ep.LoadWindow.like([]), "stats is no LayerStats, or one without tokens"),
        (lambda: jax_ep.LoadWindow.like([LayerStats.zeros(6)]), "stats is no LayerStats, or one"),
        (lambda: jax_ep.LoadWindow.like([ONE]).add([ONE, ONE]),
         r"tokens_per_expert \[2, 6\], stats='all'; allowed: \[1, 6\], stats='all', for which"),
        (lambda: jax_ep.LoadWindow.like([ONE, stats_of(np.ones(9))]),
         r"of the shapes \[\(6,\), \(9,\)\]; allowed: all alike"),
    ],
)  # fmt: skip
def test_windows_that_do_not_fit(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# --- the report --------------------------------------------------------------------------------


def report_of():
    counts = np.array([[[4, 0, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]]])
    rows = counts.reshape(1, 2, R, 2).sum(-1)
    dropped = np.array([[[2, 0, 1], [0, 0, 0]]])
    return jax_ep.LoadReport(counts, rows, dropped, counts[0] * 10, counts[0] / 2, 7)


def test_numbers_by_hand():
    report = report_of()
    np.testing.assert_allclose(report.imbalance, [2.0, 1.0])
    np.testing.assert_allclose(report.expert_cv, [np.std([4, 0, 1, 1, 0, 0]), 0.0])
    assert report.idle_experts.tolist() == [3, 0]
    np.testing.assert_allclose(report.dropped_share, [0.5, 0.0])
    np.testing.assert_allclose(report.hottest_share, [4 / 6, 1 / 6])
    assert report.top(2).tolist() == [[0, 2], [0, 1]]
    scalars = report.scalars()
    assert scalars["moe/layer00/imbalance"] == 2.0
    assert len(scalars) == 10
    assert all(type(value) is float for value in scalars.values())


@pytest.mark.parametrize("per_expert", [False, True])
def test_prometheus_reads_its_text(per_expert):
    report = report_of()
    text = report.prometheus(per_expert=per_expert)
    families = {f.name: f for f in text_string_to_metric_families(text)}
    imbalance = families["jax_ep_moe_imbalance"]
    assert imbalance.type == "gauge"
    assert [(s.labels, s.value) for s in imbalance.samples] == [
        ({"layer": "0"}, 2.0),
        ({"layer": "1"}, 1.0),
    ]
    total = families["jax_ep_moe_selections"]
    assert total.type == "counter"
    assert [s.value for s in total.samples] == [60, 60]
    num_series = sum(len(f.samples) for f in families.values())
    assert num_series == 2 * 6 + (12 if per_expert else 0)
    if per_expert:
        samples = families["jax_ep_moe_expert_selections"].samples
        assert {(s.labels["layer"], s.labels["expert"]): s.value for s in samples}["0", "0"] == 40


def test_files_are_read_back_and_planned_from(tmp_path, capsys):
    report, path = report_of(), tmp_path / "load.npz"
    report.save(path)
    again = jax_ep.LoadReport.read(path)
    assert again.step == 7
    for name in ("counts", "rows", "dropped", "total", "ema"):
        np.testing.assert_array_equal(getattr(again, name), getattr(report, name))
    sizes = ["--num-ranks", "3", "--slots-per-rank", "3"]
    assert __main__.main(["plan", str(path), *sizes]) == 0
    assert "ExpertPlacement(2 layers, 6 experts" in capsys.readouterr().out
    np.savez(path, load=report.load)
    with pytest.raises(ValueError, match=r"has no \['version', 'step', 'counts'"):
        jax_ep.LoadReport.read(path)
    np.savez(
        path,
        version=2,
        step=1,
        **{n: np.ones(1) for n in ("counts", "rows", "dropped", "total", "ema")},
    )
    with pytest.raises(ValueError, match="is of version 2; allowed: 1"):
        jax_ep.LoadReport.read(path)


def test_arrays_that_do_not_fit():
    report = report_of()
    with pytest.raises(ValueError, match=r"counts, rows, dropped, total and ema have the shapes"):
        jax_ep.LoadReport(
            report.counts, report.rows[..., :2], report.dropped, report.total, report.ema, 1
        )
    with pytest.raises(ValueError, match=r"counts has shape \(2,\) and num_ranks is 1; allowed"):
        jax_ep.LoadReport.of_counts(np.ones(2), 1)


def test_reports_need_no_jax():
    code = (
        "import sys\n"
        "sys.modules['jax'] = sys.modules['jaxlib'] = None\n"
        "import numpy as np, jax_ep\n"
        "print(jax_ep.LoadReport.of_counts(np.ones((2, 1, 5), int), 2).imbalance)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "[1.2]\n", done.stderr


# --- pictures and the command line ---------------------------------------------------------------


def test_pictures_have_the_numbers(tmp_path):
    load = np.random.default_rng(0).poisson(9 * np.arange(1, 25) % 25, (700, 2, 24))
    report = jax_ep.LoadReport.of_counts(load, 4)
    plan = jax_ep.plan_placement(report.load, num_ranks=4, slots_per_rank=8)
    heat = plot.heat_map(report, -1)
    assert f"layer 1: hottest rank {report.imbalance[1]:.2f}" in heat.axes[0].get_title()
    # The hottest expert comes first; 700 steps in 350 columns.
    image = heat.axes[0].images[0].get_array()
    assert image.shape == (24, 350)
    assert image.mean(axis=1).argmax() == 0
    of_ranks = plot.ranks(report)
    printed = [text.get_text() for text in of_ranks.axes[0].texts]
    rows = report.rows.sum(axis=0)
    want = rows / rows.mean(axis=1, keepdims=True)
    assert printed == [f"{value:.2f}" for value in want.ravel()]
    both = plot.before_after(report, plan)
    assert f"{report.imbalance[0]:.2f} of the mean" in both.axes[0].get_title()
    assert f"{plan.imbalance(report.load)[0]:.2f} of the mean" in both.axes[1].get_title()
    for axes in both.axes[:2]:
        assert sum(bar.get_height() for bar in axes.patches) == pytest.approx(report.load[0].sum())
    for name, figure in (("heat", heat), ("ranks", of_ranks), ("both", both)):
        figure.savefig(tmp_path / f"{name}.png")
        pixels = imread(tmp_path / f"{name}.png")
        assert pixels.std() > 0.05
    with pytest.raises(ValueError, match="layer is 2; allowed: -2 to 1"):
        plot.heat_map(report, 2)
    other = jax_ep.plan_placement(report.load[:1], num_ranks=4, slots_per_rank=8)
    with pytest.raises(
        ValueError, match=r"plan has \[1, 24\] layers and experts; allowed: \[2, 24"
    ):
        plot.before_after(report, other)


def test_the_command_prints_and_draws(tmp_path, capsys):
    path, picture = tmp_path / "load.npz", tmp_path / "heat.png"
    report_of().save(path)
    assert __main__.main(["load", str(path), "--out", str(picture), "--layer", "1"]) == 0
    out = capsys.readouterr().out
    assert "1 steps up to step 7, 6 experts, 3 ranks" in out
    assert re.search(r"^ +0 +2\.000 +1\.\d+ +3 +50\.00%  0 \(66\.7%\), 2", out, re.MULTILINE)
    assert imread(picture).std() > 0.05
    np.savez(path, load=np.ones((2, 6)))
    assert __main__.main(["load", str(path), "--num-ranks", "3"]) == 0
    assert "1 steps up to step 1, 6 experts, 3 ranks" in capsys.readouterr().out
    assert __main__.main(["load", str(path)]) == 1
    assert "python -m jax_ep load: " in capsys.readouterr().err
    assert __main__.main(["load", str(tmp_path / "none.npz")]) == 1
