# SPDX-License-Identifier: Apache-2.0
"""Checks what a wheel holds: `check_wheel.py WHEEL TAG [PLATFORM]`.

TAG is such as cp312-abi3; PLATFORM, of a wheel to publish, such as manylinux_2_28_x86_64.
"""

import pathlib
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
# 12.4 MiB at 0.2.0: most of it kernels, for two architectures and as PTX.
MAX_BYTES = 16 << 20
METADATA = {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"} | {
    f"licenses/licenses/{path.name}" for path in (ROOT / "licenses").iterdir()
}
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
    package |= names & {"jax_ep/_commit.py"}  # where the build knew it
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


def readelf(option: str, file: str) -> str:
    """Returns what readelf prints of a file."""
    command = ["readelf", option, "--wide", file]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def exported(symbols: str) -> set[str]:
    """Returns the names that others can link with, of what `readelf --dyn-syms` prints."""
    # Number, value, size, type, binding, visibility, section, name; UND is what others have.
    rows = (line.split() for line in symbols.splitlines())
    return {
        row[7]
        for row in rows
        if len(row) > 7 and row[4] in {"GLOBAL", "WEAK", "UNIQUE"} and row[6] != "UND"
    }


def library_findings(name: str, module: bytes) -> Iterator[str]:
    """Yields what is wrong with a compiled module."""
    with tempfile.NamedTemporaryFile(suffix=".so") as file:
        file.write(module)
        file.flush()
        dynamic = readelf("--dynamic", file.name)
        exports = exported(readelf("--dyn-syms", file.name))
    for library in re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic):
        if not SYSTEM_LIBRARIES.fullmatch(library):
            yield f"{name} needs {library}"
    if path := re.search(r"\((?:RPATH|RUNPATH)\).*", dynamic):
        yield f"{name} has a library path: {path.group()}"
    entry_point = f"PyInit_{pathlib.Path(name).name.partition('.')[0]}"
    if exports != {entry_point}:
        yield f"{name} exports {sorted(exports)}, expected {entry_point} alone (xla_ffi/exports.ld)"


def metadata_findings(metadata: str) -> Iterator[str]:
    """Yields what a package index would not show well."""
    header, _, readme = metadata.partition("\n\n")
    if "Description-Content-Type: text/markdown" not in header:
        yield "the description is not in Markdown"
    for link in re.findall(r"\]\(((?!https?://|#)[^)]*)\)", readme):
        yield f"the description links to {link}, which an index does not have"
    if capped := re.findall(r"^Requires-Dist: jax[^;]*<.*$", header, re.MULTILINE):
        yield f"JAX has an upper bound: {capped}"


def findings(wheel: pathlib.Path, tag: str, platform: str | None) -> Iterator[str]:
    """Yields what is wrong with the wheel."""
    if f"-{tag}-" not in wheel.name:
        yield f"the tag is not {tag}"
    if platform is not None and platform not in wheel.stem.rpartition("-")[2].split("."):
        yield f"the platform is not {platform}"
    if (size := wheel.stat().st_size) > MAX_BYTES:
        yield f"{size} bytes, more than {MAX_BYTES}"
    with zipfile.ZipFile(wheel) as archive:
        names = {n for n in archive.namelist() if not n.endswith("/")}
        yield from name_findings(names)
        for name in names:
            if name.endswith(".so"):
                yield from library_findings(name, archive.read(name))
            elif name.endswith(".dist-info/METADATA"):
                yield from metadata_findings(archive.read(name).decode())


def main() -> int:
    """Prints the findings; the exit status is 1 if there are any."""
    if len(sys.argv) not in (3, 4):
        raise SystemExit(__doc__)
    wheel = pathlib.Path(sys.argv[1])
    found = list(findings(wheel, sys.argv[2], sys.argv[3] if len(sys.argv) == 4 else None))
    for finding in found:
        print(f"{wheel.name}: {finding}", file=sys.stderr)
    if not found:
        print(f"{wheel.name}: {wheel.stat().st_size:,} bytes, contents as expected")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
