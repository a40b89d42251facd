# SPDX-License-Identifier: Apache-2.0
"""Builds the compiled modules for the GPU of this machine, runs its tests, prints a summary.

    python tests/gpu/run.py [--placement shared|own|one_process] [PIECE ...]

Each piece takes less than nine minutes. Needs nvcc, CMake, Ninja and, for the Python that runs it,
JAX with CUDA, nanobind and pytest: nothing is installed. JAX_EP_FFI_INCLUDE_DIR may name a folder
with the XLA FFI headers of another jaxlib.
"""

import argparse
import os
import pathlib
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUILD = ROOT / "build" / "gpu"
# Piece -> which tests.
PIECES = {
    "problems": ["test_problems.py"],
    "halves": ["test_halves.py"],
    "masks": ["test_rank_mask.py"],
    "models": ["test_models.py"],
    "nodes": ["test_nodes.py", "-k", "not plans_by_counts and not low_latency_kernels"],
    "nodes-by-counts": ["test_nodes.py", "-k", "plans_by_counts"],
    "nodes-low-latency": ["test_nodes.py", "-k", "low_latency_kernels"],
    "network": ["test_network.py"],
    "graphs": ["test_programs.py", "-k", "not soak"],
    "sanitizer": ["test_sanitizer.py"],
    "failures": ["test_failures.py"],
    "missing": ["test_missing_ranks.py"],
    "profiles": ["test_profiles.py"],
    "closed": ["test_closed.py"],
    "soak": ["test_programs.py", "-k", "soak"],
    "collectives": ["test_collectives.py"],
}
# Placement of ranks -> the pieces that have something to run. The sanitizer's ranks share a GPU in
# any case, and so do those on hosts in name alone; only a rank with a process of its own can be
# lost; NCCL wants a GPU for each rank.
PIECES_OF = {
    "shared": [
        *("problems", "halves", "masks", "models", "nodes", "nodes-by-counts"),
        *("nodes-low-latency", "network", "graphs", "profiles", "closed", "sanitizer"),
        *("failures", "missing", "soak"),
    ],
    "own": [
        *("problems", "halves", "masks", "models", "nodes", "nodes-by-counts"),
        *("nodes-low-latency", "graphs", "closed", "failures", "missing", "collectives", "soak"),
    ],
    "one_process": [
        *("problems", "halves", "masks", "models", "nodes", "nodes-by-counts"),
        *("nodes-low-latency", "graphs", "closed", "collectives", "soak"),
    ],
}


def _first_line(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as e:
        return f"({command[0]}: {e})"
    return done.stdout.strip().splitlines()[0]


def _describe() -> str:
    query = "--query-gpu=name,driver_version"
    gpu = _first_line("nvidia-smi", query, "--format=csv,noheader")
    jax = _first_line(sys.executable, "-c", "import jax; print(jax.__version__)")
    return f"GPU, driver: {gpu}; jax {jax}; Python {sys.version.split()[0]}"


def build() -> None:
    """Compiles the modules into the source tree, and the programs for sanitizer and benchmark."""
    capability = _first_line("nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader")
    nanobind = _first_line(sys.executable, "-m", "nanobind", "--cmake_dir")
    arguments = {
        "Python_EXECUTABLE": sys.executable,
        "nanobind_DIR": nanobind,
        "JAX_EP_CUDA": "ON",
        "JAX_EP_CUDA_ARCHS": f"{capability.replace('.', '')}-real",
        "JAX_EP_FFI_INCLUDE_DIR": os.environ.get("JAX_EP_FFI_INCLUDE_DIR", ""),
    }
    defines = [f"-D{name}={value}" for name, value in arguments.items() if value]
    subprocess.run(["cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *defines], check=True)
    targets = ["_ext", "_cuda", "virtual_ranks", "link_probe", "lost_owner", "jax_ep_nvtx_log"]
    # Where NVSHMEM is, kernels for RDMA too.
    help_text = subprocess.run(
        ["cmake", "--build", BUILD, "--target", "help"], check=True, capture_output=True, text=True
    ).stdout
    if "jax_ep_rdma" in help_text:
        targets += ["jax_ep_rdma", "virtual_nodes"]
    subprocess.run(["cmake", "--build", BUILD, "--parallel", "--target", *targets], check=True)
    for pattern in ("_ext*.so", "_cuda*.so", "csrc/rdma/libjax_ep_rdma.so"):
        for module in BUILD.glob(pattern):
            shutil.copy(module, ROOT / "jax_ep")


def run(piece: str, placement: str) -> tuple[int, float]:
    """Runs the tests of a piece; the exit status and the seconds."""
    start = time.monotonic()
    file, *options = PIECES[piece]
    environment = {
        **os.environ,
        "JAX_EP_GPU_TESTS": "1",
        "JAX_EP_GPU_PLACEMENT": placement,
        "JAX_EP_VIRTUAL_RANKS": str(next(BUILD.rglob("virtual_ranks"))),
        "PYTHONPATH": str(ROOT),
    }
    for program in BUILD.rglob("virtual_nodes"):
        environment["JAX_EP_VIRTUAL_NODES"] = str(program)
    for library in BUILD.rglob("libjax_ep_nvtx_log.so"):
        environment["JAX_EP_NVTX_LOG_LIBRARY"] = str(library)
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-s", "--durations=0", HERE / file]
    done = subprocess.run([*command, *options], cwd=ROOT, env=environment, check=False)
    return done.returncode, time.monotonic() - start


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--placement",
        choices=PIECES_OF,
        default="shared",
        help="all ranks on one GPU; each on its own, in a process of its own; or in one process",
    )
    parser.add_argument("--build-only", action="store_true", help="run nothing")
    parser.add_argument("pieces", nargs="*", metavar="PIECE", help="default: all there are")
    args = parser.parse_args(argv)
    allowed = PIECES_OF[args.placement]
    if unknown := set(args.pieces) - set(allowed):
        parser.error(
            f"unknown: {', '.join(sorted(unknown))}; with placement {args.placement} there are "
            f"{', '.join(allowed)}"
        )
    args.pieces = args.pieces or allowed
    return args


def main() -> int:
    """Runs the pieces named as arguments, or all."""
    args = parse_args()
    start = time.monotonic()
    build()
    print(f"built in {time.monotonic() - start:.0f} s")
    if args.build_only:
        return 0
    results = {piece: run(piece, args.placement) for piece in args.pieces}
    print(f"\n{_describe()}; placement {args.placement}")
    for piece, (status, seconds) in results.items():
        print(f"{piece:11} {'passed' if status == 0 else 'FAILED'} {seconds:6.0f} s")
    return max(status for status, _ in results.values())


if __name__ == "__main__":
    sys.exit(main())
