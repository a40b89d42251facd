# SPDX-License-Identifier: Apache-2.0
"""Runs all that needs a GPU for each rank: tests, training, benchmark; prints a summary.

    python tools/run_nvlink.py [PIECE ...]

Each piece takes less than nine minutes, or says where each rank stands and is ended. What it prints
appears at once, and is in a file of --out. One that fails does not stop the others. Needs what
tests/gpu/run.py needs, and optax, orbax-checkpoint, matplotlib, rich, tabulate. No setting of a GPU
is changed; NCCL and NVSHMEM keep the variables that are set.
"""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "testing"))
from ep_launch import standing  # noqa: E402
from ep_launch.placement import count_gpus  # noqa: E402

# What every piece needs: the modules, compiled for this machine's GPUs into the source tree.
BUILD = ["tests/gpu/run.py", "--build-only"]
BUILT = "build/gpu"
LINK_PROBE = f"{BUILT}/csrc/probe/link_probe"
SUMMARY = "summary.json"
LIMIT_S = 540.0
SOAK = 10_000
# Of the example: how far below the entropy of single bytes its held-out loss must end.
LEAST_LEARNED = 0.5

Pieces = dict[str, list[str]]
Results = dict[str, tuple[str, float]]  # piece -> how it ended, seconds


def pieces(num_gpus: int, out: pathlib.Path) -> Pieces:
    """Name -> command, without the interpreter; what matters most comes first.

    Args:
        num_gpus: of this machine.
        out: a folder, for what benchmark and example write.
    """
    ranks = next(r for r in (8, 4, 2) if r <= num_gpus)

    def tests(placement: str, *names: str) -> list[str]:
        return ["tests/gpu/run.py", "--placement", placement, *names]

    def train(data: int) -> list[str]:
        mesh = f"{data}x{ranks // data}"
        folder = str(out / f"moe_lm_{mesh}")
        return ["examples/train_moe_lm.py", "--platform", "cuda", "--mesh", mesh, "--out", folder]

    def serve() -> list[str]:
        options = ["--platform", "cuda", "--mesh", f"1x{ranks}", "--processes", str(ranks)]
        return ["examples/serve_moe_lm.py", "bench", *options, "--out", str(out / "serving")]

    def bench(placement: str, tokens: int) -> list[str]:
        sizes = ["--ranks", str(ranks), "--tokens", str(tokens), "--placement", placement]
        files = ["--link-probe", LINK_PROBE, "--json", str(bench_json(placement, tokens))]
        return ["benchmarks/run.py", *sizes, *files]

    def bench_json(placement: str, tokens: int) -> pathlib.Path:
        return out / f"{placement}_{tokens}.json"

    sizes = ["--placement", "own", "--ranks", str(ranks)]
    copies = ["--copies", *sizes, "--json", str(out / "copies" / "copies.json")]
    lines = ["--ranks", str(ranks), "--json", str(out / "kernels" / "lines.json")]
    nodes = ("nodes", "nodes-by-counts", "nodes-low-latency")
    return {
        "own": tests("own", "problems", "collectives"),
        "bench-4096": bench("own", 4096),
        "kernels": ["benchmarks/predict.py", "--measure", BUILT, *lines],
        "copies": ["benchmarks/run.py", *copies],
        "own-programs": tests("own", "graphs", "halves", "masks", "soak"),
        "one-process": tests("one_process", "problems", "collectives"),
        "models": tests("own", "models"),
        "one-process-models": tests("one_process", "models"),
        "nodes": tests("own", *nodes),
        "one-process-nodes": tests("one_process", *nodes),
        "one-process-programs": tests("one_process", "graphs", "halves", "masks", "soak"),
        "example": train(1),
        **({"example-two-axes": train(2)} if ranks > 2 else {}),
        "serve": serve(),
        "own-failures": tests("own", "failures", "closed"),
        "own-missing": tests("own", "missing"),
        "one-process-closed": tests("one_process", "closed"),
        **{f"bench-{tokens}": bench("own", tokens) for tokens in (128, 16, 1, 1024, 8192)},
        "bench-one-process": bench("one_process", 4096),
    }


def run(command: list[str], log: pathlib.Path, limit_s: float = LIMIT_S) -> str:
    """Runs a piece; shows what it prints at once, and keeps it; "passed", or how it ended.

    The piece writes into the log itself, so what it printed is there however it or this ends.
    """
    log.write_bytes(b"")
    with tempfile.TemporaryDirectory() as name, open(log, "ab") as file:
        standings = pathlib.Path(name)
        process = subprocess.Popen(
            [sys.executable, standing.__file__, *command],
            cwd=ROOT,
            env=_environment(standings),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        shown = _Shown(log)
        try:
            status = _wait(process, shown, time.monotonic() + limit_s)
            if status is None:
                report = standing.report(standings, process.pid)
                ending = (
                    f"\n=== not done after {limit_s:g} s; where each process stands:\n{report}\n"
                )
                file.write(ending.encode())
        finally:
            if process.poll() is None:  # with the ranks that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            file.flush()
            shown.show()
    if status is None:
        return f"FAILED: not done after {limit_s:g} s"
    if status != 0:
        return f"FAILED: exit status {status}"
    text = log.read_text(errors="replace")
    return _what_was_learned(text) if "train_moe_lm" in command[0] else "passed"


def _environment(standings: pathlib.Path) -> dict[str, str]:
    path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "JAX_EP_SOAK": str(SOAK),
        "PYTHONUNBUFFERED": "1",
        standing.VARIABLE: str(standings),
    }


class _Shown:
    """How much of a log has been shown."""

    def __init__(self, log: pathlib.Path) -> None:
        self._log = log
        self._position = 0

    def show(self) -> None:
        with open(self._log, "rb") as file:
            file.seek(self._position)
            new = file.read()
        self._position += len(new)
        sys.stdout.write(new.decode(errors="replace"))
        sys.stdout.flush()


def _wait(process: subprocess.Popen, shown: _Shown, deadline: float) -> int | None:
    """Shows what a piece prints until it ends; its exit status, None at the deadline."""
    while time.monotonic() < deadline:
        shown.show()
        try:
            return process.wait(0.1)
        except subprocess.TimeoutExpired:
            pass
    return None


def _what_was_learned(text: str) -> str:
    found = re.search(r"^below it by +(-?[\d.]+) nats", text, re.MULTILINE)
    if found is None or float(found[1]) < LEAST_LEARNED:
        return f"FAILED: it learned {found[1] if found else 'nothing'}, not {LEAST_LEARNED} nats"
    return "passed"


def _run_all(names: Iterable[str], every: Pieces, out: pathlib.Path) -> Results:
    """Builds, then runs the pieces; how each one ended, also in a file that always says so much."""
    results: Results = {}

    def one(name: str, command: list[str]) -> None:
        print(f"==> {name}: python {' '.join(command)}", flush=True)
        start = time.monotonic()
        results[name] = "did not end", 0.0
        _write(out / SUMMARY, results)
        results[name] = run(command, out / f"{name}.log"), time.monotonic() - start
        _write(out / SUMMARY, results)

    one("build", BUILD)
    if results["build"][0] != "passed":
        return results  # nothing else could run
    for name in names:
        one(name, every[name])
    if numbers := sorted(str(p) for p in out.glob("*.json") if p.name != SUMMARY):
        one("report", ["benchmarks/run.py", "--report", *numbers])
    return results


def _write(path: pathlib.Path, results: Results) -> None:
    pieces_of = {
        n: {"result": result, "seconds": round(s, 1)} for n, (result, s) in results.items()
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(pieces_of, indent=1) + "\n")
    partial.rename(path)


def main() -> int:
    """Runs the pieces named as arguments, or all."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "build" / "nvlink")
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="default: all")
    args = parser.parse_args()
    num_gpus = count_gpus()
    if num_gpus < 2:
        parser.error(f"this machine has {num_gpus} GPUs; 2, 4 or 8 are needed")
    out = args.out.resolve()
    every = pieces(num_gpus, out)
    if unknown := set(args.pieces) - set(every):
        parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(every)}")
    out.mkdir(parents=True, exist_ok=True)
    # So that a piece, which has a session of its own, ends with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    results = _run_all(args.pieces or every, every, out)
    print(f"{num_gpus} GPUs; logs and numbers are in {out}")
    for name, (result, seconds) in results.items():
        print(f"{name:22} {seconds:5.0f} s  {result}")
    return int(any(result != "passed" for result, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
