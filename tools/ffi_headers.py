# SPDX-License-Identifier: Apache-2.0
"""Prints where the XLA FFI headers are that pyproject.toml pins: those of one release of jaxlib.

A build in isolation gets them with its build requirements. This is for builds without isolation,
in an environment whose own jaxlib may be newer. If so, it downloads the pinned one, takes the
headers and leaves the rest. For a Python that has no such release, it prints where those of the
installed jaxlib are, and says what a module that is built on them loads on.

    python tools/ffi_headers.py CACHE_FOLDER
"""

import importlib.metadata
import operator
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pinned_version(python: tuple[int, int]) -> str | None:
    """Returns the version of jaxlib that pyproject.toml builds on; None if it pins none."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    compare = {"<": operator.lt, "==": operator.eq}
    pin = re.compile(r"jaxlib==([\w.]+); python_version (<|==) '(\d+)\.(\d+)'")
    for requirement in pyproject["build-system"]["requires"]:
        if match := pin.fullmatch(requirement):
            version, relation, major, minor = match.groups()
            if compare[relation](python, (int(major), int(minor))):
                return version
    return None


def installed_headers(version: str | None) -> pathlib.Path | None:
    """Returns the headers of this environment's jaxlib if it is that version; None: of any."""
    try:
        jaxlib = importlib.metadata.distribution("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return None
    if version is not None and jaxlib.version != version:
        return None
    return pathlib.Path(str(jaxlib.locate_file("jaxlib/include")))


def unpinned_headers(python: tuple[int, int]) -> pathlib.Path:
    """Returns the headers of the installed jaxlib, and says what they are good for."""
    folder = installed_headers(None)
    if folder is None:
        raise SystemExit("jax_ep: this Python has no jaxlib, whose headers the build needs")
    release = importlib.metadata.version("jaxlib")
    print(
        f"jax_ep: pyproject.toml pins no jaxlib for Python {python[0]}.{python[1]}: building on "
        f"the headers of jaxlib {release}, which is installed; what is built loads on it and newer",
        file=sys.stderr,
    )
    return folder


def downloaded_headers(version: str, cache: pathlib.Path) -> pathlib.Path:
    """Returns the headers of that version in `cache`, downloaded if they are not there yet."""
    folder = cache / f"jaxlib-{version}"
    if folder.exists():
        return folder / "jaxlib" / "include"
    cache.mkdir(parents=True, exist_ok=True)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq"]
    with tempfile.TemporaryDirectory(dir=cache) as name:
        unpacked = pathlib.Path(name) / "unpacked"
        download = ["download", "--no-deps", "--only-binary=:all:", f"--dest={name}"]
        # Standard output is for the answer.
        subprocess.run([*pip, *download, f"jaxlib=={version}"], check=True, stdout=sys.stderr)
        (wheel,) = pathlib.Path(name).glob("jaxlib-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.namelist() if m.startswith("jaxlib/include/")]
            archive.extractall(unpacked, members)
        shutil.move(unpacked, folder)
    return folder / "jaxlib" / "include"


def main() -> None:
    """Prints the folder."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    python = (sys.version_info.major, sys.version_info.minor)
    version = pinned_version(python)
    cache = pathlib.Path(sys.argv[1]).resolve()
    if version is None:
        print(unpinned_headers(python))
    else:
        print(installed_headers(version) or downloaded_headers(version, cache))


if __name__ == "__main__":
    main()
