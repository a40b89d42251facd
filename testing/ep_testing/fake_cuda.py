# SPDX-License-Identifier: Apache-2.0
"""A stand-in for the compiled module `jax_ep._cuda`, so that what is above it runs without a GPU.

It keeps the books that the real one keeps: which groups hold memory, who has mapped what. Groups
are made on a mesh of CPU devices, and take themselves for groups on GPUs.
"""

import dataclasses
import functools
import json
import math

import jax
import pytest

from jax_ep._src.groups import cuda as cuda_group
from jax_ep._src.groups import group as group_module
from jax_ep._src.groups import kernel_errors as cuda_watch
from jax_ep._src.groups import native

REGIONS = ("rows", "bytes [R, max_tokens, row_stride]", "rows on their way")


class FakeCuda:
    """Has the functions of `jax_ep._cuda`; `log` has their calls in order."""

    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.groups: dict[int, dict] = {}
        self.said: list[tuple] = []  # what kernels have reported, as `statuses` gives it
        self.left: list[int] = []  # groups whose heaps were not freed
        self.refuse: dict[str, Exception] = {}  # function -> what it raises

    def _called(self, name: str, *what) -> None:
        self.log.append((name, *what))
        if name in self.refuse:
            raise self.refuse[name]

    def cuda_targets(self) -> dict:
        return {name: {"execute": name} for name in ("jax_ep_plan",)}

    def build_info(self) -> dict:
        return {
            "architectures": "90-real, 100-real, 90-virtual",
            "cuda_runtime": 13000,
            "shared_memory": 226 * 1024,
        }

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class HeapShape:
        num_ranks: int
        num_experts: int
        num_topk: int
        max_tokens: int
        hidden: int
        dtype: int
        wire: int
        layout: int
        low_latency_tokens: int
        num_neighbors: int
        gathered_domains: int

    def heap_bytes(self, shape: HeapShape) -> int:
        element = 4 if shape.dtype == 0 else 2
        return math.prod((shape.num_ranks, shape.max_tokens, shape.hidden, element))

    def network_heap_bytes(self, shape: HeapShape) -> int:
        return 0 if shape.num_neighbors in (0, shape.num_ranks) else 4096

    def dispatch_is_low_latency(
        self, shape: HeapShape, *, num_tokens: int, fp8_x: bool, fp8_rows: bool
    ) -> bool:
        del fp8_x, fp8_rows
        return 0 < shape.low_latency_tokens >= num_tokens

    def combine_is_low_latency(
        self, shape: HeapShape, *, num_tokens: int, domain_size: int
    ) -> bool:
        return 0 < shape.low_latency_tokens >= num_tokens and domain_size in (0, 1, shape.num_ranks)

    def heap_regions(self, shape: HeapShape) -> list[tuple]:
        return [(*REGIONS, 0, self.heap_bytes(shape))]

    def create_group(
        self,
        *,
        group_id,
        name,
        nonce,
        warn_after_s,
        timeout_s,
        max_num_sms,
        tail_num_sms,
        heap,
        rdma,
        masks_missing_ranks,
        ranks,
    ) -> list[bytes]:
        self._called("create", max_num_sms, tail_num_sms)
        assert group_id not in self.groups
        self.groups[group_id] = {
            "nonce": nonce,
            "name": name,
            "deadlines": (warn_after_s, timeout_s),
            "ranks": ranks,
            "num_ranks": heap.num_ranks,
            "heap": heap,
            "rdma": rdma,
            "masks": masks_missing_ranks,
            "mapped": {},
        }
        return [json.dumps([nonce, *place[1:]]).encode() for place in ranks]

    def set_launches(self, *, group_id, launches) -> None:
        self.groups[group_id]["launches"] = launches

    def launch_limits(self) -> dict:
        return {
            "num_sms": 24,
            "low_latency_num_sms": 64,
            "dispatch_warps": 14,
            "combine_warps": 16,
        }

    def connect_group(self, group_id, group_index, rank, handles, pes) -> None:
        del pes
        self._called("connect", group_index, rank)
        group = self.groups[group_id]
        given = [json.loads(handle) for handle in handles]
        wanted = [[group["nonce"], group_index, peer] for peer in range(group["num_ranks"])]
        assert [handle for handle in sorted(given) if handle in wanted] == wanted
        group["mapped"][group_index, rank] = len(wanted)

    def disconnect_group(self, *, group_id, limit_s) -> None:
        del limit_s
        self._called("disconnect")
        self.groups[group_id]["mapped"].clear()

    def close_group(self, *, group_id, leave_heaps) -> bool:
        self._called("close")
        if leave_heaps:
            self.left.append(group_id)
        return self.groups.pop(group_id, None) is not None

    def statuses(self) -> list[tuple]:
        return self.said

    def give_ups(self) -> list[tuple]:
        return []

    def tell_give_up(self, group_id, group_index, rank, word) -> bool:
        self._called("tell_give_up", group_id, group_index, rank, word)
        return True

    def num_groups(self) -> int:
        return len(self.groups)


def install(patch: pytest.MonkeyPatch) -> FakeCuda:
    """Puts a new `FakeCuda` in the place of the compiled module."""
    fake = FakeCuda()
    patch.setattr(native, "_try_load_cuda", lambda: (fake, None))
    patch.setattr(native, "_registered", set(native._registered))
    patch.setattr(cuda_group, "_watch", functools.cache(lambda: cuda_watch.Watch(fake)))
    register = jax.ffi.register_ffi_target

    def register_others(name, stages, platform):
        if platform == "CUDA":
            fake.log.append(("register", name))
        else:
            register(name, stages, platform=platform)

    patch.setattr(jax.ffi, "register_ffi_target", register_others)
    patch.setattr(group_module, "_platform", lambda mesh: "cuda")
    return fake
