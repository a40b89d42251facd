# SPDX-License-Identifier: Apache-2.0
"""Runs all that needs a GPU for each rank: tests, training, benchmark; prints a summary.

    python tools/run_nvlink.py [PIECE ...]

Each piece takes less than nine minutes and writes its output into --out. One that fails does not
stop the others. Needs what tests/gpu/run.py needs, and optax, orbax-checkpoint, matplotlib, rich,
tabulate. No setting of a GPU is changed; NCCL and NVSHMEM keep the variables that are set.
"""

import argparse
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
LIMIT_S = 540.0
SOAK = 10_000
# Of the example: how far below the entropy of single bytes its held-out loss must end.
LEAST_LEARNED = 0.5

Pieces = dict[str, list[str]]


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

    def bench(placement: str, tokens: int) -> list[str]:
        sizes = ["--ranks", str(ranks), "--tokens", str(tokens), "--placement", placement]
        return ["benchmarks/nvlink.py", *sizes, "--json", str(bench_json(placement, tokens))]

    def bench_json(placement: str, tokens: int) -> pathlib.Path:
        return out / f"{placement}_{tokens}.json"

    return {
        "own": tests("own", "problems", "collectives"),
        "bench-4096": bench("own", 4096),
        "own-programs": tests("own", "graphs", "soak"),
        "one-process": tests("one_process", "problems", "collectives"),
        "one-process-programs": tests("one_process", "graphs", "soak"),
        "example": train(1),
        **({"example-two-axes": train(2)} if ranks > 2 else {}),
        "own-failures": tests("own", "failures"),
        **{f"bench-{tokens}": bench("own", tokens) for tokens in (1024, 8192, 128)},
        "bench-one-process": bench("one_process", 4096),
    }


def run(command: list[str], log: pathlib.Path, limit_s: float = LIMIT_S) -> str:
    """Runs a piece, shows and keeps what it prints; "passed", or how it ended."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "JAX_EP_SOAK": str(SOAK),
        "PYTHONUNBUFFERED": "1",
    }
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *command],
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.poll() is None:  # with the ranks that it started
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    text = log.read_text(errors="replace")
    print(text, flush=True)
    if status is None:
        return f"FAILED: not done after {limit_s:g} s"
    if status != 0:
        return f"FAILED: exit status {status}"
    return _what_was_learned(text) if "train_moe_lm" in command[0] else "passed"


def _what_was_learned(text: str) -> str:
    found = re.search(r"^below it by +(-?[\d.]+) nats", text, re.MULTILINE)
    if found is None or float(found[1]) < LEAST_LEARNED:
        return f"FAILED: it learned {found[1] if found else 'nothing'}, not {LEAST_LEARNED} nats"
    return "passed"


def main() -> int:
    """Runs the pieces named as arguments, or all."""
    sys.path.insert(0, str(ROOT / "tests"))
    from gpu.placement import count_gpus  # noqa: PLC0415

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
    results = {}
    for name in args.pieces or every:
        start = time.monotonic()
        print(f"==> {name}: python {' '.join(every[name])}", flush=True)
        results[name] = run(every[name], out / f"{name}.log"), time.monotonic() - start
    numbers = sorted(str(path) for path in out.glob("*.json"))
    if numbers:
        report = ["benchmarks/nvlink.py", "--report", *numbers]
        results["report"] = run(report, out / "report.log"), 0.0
    print(f"{num_gpus} GPUs; logs and numbers are in {out}")
    for name, (result, seconds) in results.items():
        print(f"{name:22} {seconds:5.0f} s  {result}")
    return int(any(result != "passed" for result, _ in results.values()))


if __name__ == "__main__":
    sys.exit(main())
