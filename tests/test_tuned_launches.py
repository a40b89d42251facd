# SPDX-License-Identifier: Apache-2.0
"""Groups on GPUs launch as their tuning says: the module is real, CUDA is a fake that writes down
what is launched.
"""

import pytest

import jax_ep
from ep_launch.processes import run_processes
from ep_testing import fake_cudart
from ep_testing.cuda_calls import Sizes, buffers, call
from ep_testing.programs import make_mesh

CONFIG = {
    "num_experts": 64, "num_topk": 2, "hidden": 4096, "max_tokens_per_rank": 1024,
    "dtype": "float32", "layout": "rank",
}  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    fake = fake_cudart.install(monkeypatch, devices=2)
    yield fake
    fake.check_clean()


def _launched(fake, group, operation, num_tokens):
    sizes = Sizes(
        num_experts=64, hidden=4096, num_tokens=num_tokens, layout="rank", scalars=False,
        recv_capacity=2 * num_tokens,
    )  # fmt: skip
    call(fake, operation, group.group_id, buffers(operation, sizes), sizes)
    launch = fake.launches()[-1]
    return {name: launch[name] for name in ("blocks", "senders", "tail_blocks")}


def _launches(fake, tuning, operation, num_tokens, **config):
    mesh = make_mesh((2,), ("expert",))
    config = jax_ep.EpConfig(**CONFIG | config)
    with jax_ep.EpGroup(mesh, "expert", config, timeout=60.0, tuning=tuning) as group:
        return _launched(fake, group, operation, num_tokens)


def _tuned(op, **fields):
    return jax_ep.Tuning(launches=(jax_ep.TunedLaunch(op=op, **fields),))


@pytest.mark.parametrize("op", ["dispatch", "combine"])
def test_kernels_are_launched_as_their_tuning_says(op, fake):
    operation = {"dispatch": "plan_dispatch", "combine": "combine"}[op]
    default = _launches(fake, "off", operation, 1000)
    assert default["blocks"] == 24
    tuning = _tuned(op, num_tokens=1024, num_sms=40, num_senders=3)
    tuned = _launches(fake, tuning, operation, 1000)
    assert (tuned["blocks"], tuned["senders"]) == (40, 3)
    # Others are not meant: half of the tokens, or the other operation.
    assert _launches(fake, tuning, operation, 512) == _launches(fake, "off", operation, 512)
    other = {"plan_dispatch": "combine", "combine": "plan_dispatch"}[operation]
    assert _launches(fake, tuning, other, 1000) == _launches(fake, "off", other, 1000)


def test_a_tail_is_taken_or_left(fake):
    def tail(tuned, **config):
        tuning = _tuned("dispatch", num_tokens=1024, num_sms=16, tail=tuned)
        return _launches(fake, tuning, "plan_dispatch", 1024, **config)["tail_blocks"]

    assert tail(True) == 132 - 16
    assert tail(False) == 0
    assert tail(True, tail_num_sms=7) == 7


def test_the_config_has_the_last_word_on_sms(fake):
    tuning = _tuned("combine", num_tokens=1024, num_sms=40)
    assert _launches(fake, tuning, "combine", 1024, max_num_sms=30)["blocks"] == 30
    assert _launches(fake, tuning, "combine", 1024, max_num_sms=50)["blocks"] == 40


def test_tuning_opens_the_low_latency_path_where_the_config_leaves_it_open(fake):
    launch = jax_ep.TunedLaunch(op="combine", path="low_latency", num_tokens=8, num_sms=5)
    tuning = jax_ep.Tuning(launches=(launch,), low_latency_tokens=8)
    mesh = make_mesh((2,), ("expert",))
    for asked, blocks in ((None, 5), (0, None)):
        config = jax_ep.EpConfig(**CONFIG | {"low_latency_tokens": asked})
        with jax_ep.EpGroup(mesh, "expert", config, timeout=60.0, tuning=tuning) as group:
            found = _launched(fake, group, "combine", 8)
            name = [name for name in fake.lines("calls") if name.startswith("launch_")][-1]
            assert (name == "launch_low_latency_combine") == (asked is None)
            assert blocks is None or found["blocks"] == blocks
            assert group.tuning.low_latency_tokens == (8 if asked is None else None)
    # No more than the kernels can serve, or than the group has.
    small = jax_ep.EpConfig(**CONFIG | {"max_tokens_per_rank": 3})
    with jax_ep.EpGroup(mesh, "expert", small, timeout=60.0, tuning=tuning) as group:
        assert group.tuning.low_latency_tokens == 3


@pytest.mark.multiprocess
def test_what_ranks_share_is_that_of_rank_0s_table():
    fake_cudart.load()
    outputs = run_processes(
        """
import logging
import numpy as np
import pytest
from jax.sharding import Mesh
from ep_testing import fake_cudart
import jax_ep

logging.basicConfig(stream=sys.stdout, format="%(levelname)s %(message)s")
fake = fake_cudart.install(pytest.MonkeyPatch(), devices=1, first=process)
mesh = Mesh(np.array(jax.devices()), ("expert",))
config = jax_ep.EpConfig(num_experts=8, num_topk=2, hidden=16, max_tokens_per_rank=64)
own = jax_ep.TunedLaunch(op="combine", num_tokens=64, num_sms=8 + process)
tuning = jax_ep.Tuning(launches=(own,), low_latency_tokens=[32, 16][process])
with jax_ep.EpGroup(mesh, "expert", config, timeout=60.0, tuning=tuning) as group:
    assert group.tuning.low_latency_tokens == 32
    assert group.tuning.launches == (own,)  # which need not be alike
nothing = [jax_ep.Tuning(), tuning][process]
with jax_ep.EpGroup(mesh, "expert", config, timeout=60.0, tuning=nothing) as group:
    assert group.tuning.low_latency_tokens is None
# One process has no table: none has the group.
required = [tuning, "require"][process]
with pytest.raises(jax_ep.EpUnavailable, match="in process 1, no table of tuning has .op dispatch"):
    jax_ep.EpGroup(mesh, "expert", config, timeout=60.0, tuning=required)
fake.check_clean()
""",
        num_processes=2,
        devices_each=1,
    )
    assert "low_latency_tokens is" not in outputs[0]
    assert "low_latency_tokens is 32 in the tuning of rank 0, which counts" in outputs[1]
