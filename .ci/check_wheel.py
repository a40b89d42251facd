# SPDX-License-Identifier: Apache-2.0
"""Checks what a wheel holds: `check_wheel.py WHEEL TAG`, TAG such as cp312-abi3."""

import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
MAX_BYTES = 8 << 20  # most of it kernels, for two architectures
METADATA = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
# jax_ep brings nothing and asks for nothing that a Python on Linux does not have.
SYSTEM_LIBRARIES = re.compile(
    r"(libstdc\+\+|libgcc_s|libm|libc|libpthread|ld-linux-[\w-]+)\.so\.\d+"
)


def name_findings(names: set[str]) -> Iterator[str]:
    """Yields what is wrong with the set of files."""
    package = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "jax_ep").rglob("*")
        if path.suffix in {".py", ".pyi"} or path.name == "py.typed"
    }
    modules = {n for n in names if re.fullmatch(r"jax_ep/_(ext|cuda)\.[\w.-]*so", n)}
    metadata = {n for n in names if re.match(r"jax_ep-[^/]+\.dist-info/", n)}
    # _cuda is there if nvcc was.
    kinds = sorted(n.partition(".")[0] for n in modules)
    if kinds not in (["jax_ep/_ext"], ["jax_ep/_cuda", "jax_ep/_ext"]):
        yield (
            f"compiled modules: {sorted(modules)}, expected one jax_ep/_ext.*.so and at most one "
            "jax_ep/_cuda.*.so"
        )
    if "jax_ep/py.typed" not in names:
        yield "no jax_ep/py.typed"
    if missing := package - names:
        yield f"missing: {sorted(missing)}"
    if missing := METADATA - {n.split("/", 1)[1] for n in metadata}:
        yield f"missing metadata: {sorted(missing)}"
    if extra := names - package - modules - metadata:
        yield f"not of the package: {sorted(extra)}"


def library_findings(module: bytes) -> Iterator[str]:
    """Yields what is wrong with a compiled module."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(module)
        file.flush()
        dynamic = subprocess.run(
            ["readelf", "--dynamic", "--wide", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    for library in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if not SYSTEM_LIBRARIES.fullmatch(library):
            yield f"the module needs {library}"
    if path := re.search(r"\((?:RPATH|RUNPATH)\).*", dynamic):
        yield f"the module has a library path: {path.group()}"


def findings(wheel: pathlib.Path, tag: str) -> Iterator[str]:
    """Yields what is wrong with the wheel."""
    if f"-{tag}-" not in wheel.name:
        yield f"the tag is not {tag}"
    if (size := wheel.stat().st_size) > MAX_BYTES:
        yield f"{size} bytes, more than {MAX_BYTES}"
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
        yield from name_findings(names)
        for name in names:
            if name.endswith(".so"):
                yield from library_findings(archive.read(name))


def main() -> int:
    """Prints the findings; the exit status is 1 if there are any."""
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    wheel = pathlib.Path(sys.argv[1])
    found = list(findings(wheel, sys.argv[2]))
    for finding in found:
        print(f"{wheel.name}: {finding}", file=sys.stderr)
    if not found:
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, contents as expected")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
