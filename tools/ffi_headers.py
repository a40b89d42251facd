# SPDX-License-Identifier: Apache-2.0
"""Prints where the XLA FFI headers are that pyproject.toml pins: those of one release of jaxlib.

A build in isolation gets them with its build requirements. This is for builds without isolation,
in an environment whose own jaxlib may be newer. If so, it downloads the pinned one, takes the
headers and leaves the rest.

    python tools/ffi_headers.py CACHE_FOLDER
"""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
import zipfile

ROOT = pathlib.Path(__file__).resolve().parent.parent


def pinned_version() -> str:
    """Returns the version of jaxlib that pyproject.toml builds on."""
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text())
    for requirement in pyproject["build-system"]["requires"]:
        if match := re.fullmatch(r"jaxlib==([\w.]+)", requirement):
            return match.group(1)
    raise SystemExit("pyproject.toml: build-system.requires pins no jaxlib")


def installed_headers(version: str) -> pathlib.Path | None:
    """Returns the headers of this environment's jaxlib if it is that version."""
    try:
        jaxlib = importlib.metadata.distribution("jaxlib")
    except importlib.metadata.PackageNotFoundError:
        return None
    if jaxlib.version != version:
        return None
    return pathlib.Path(str(jaxlib.locate_file("jaxlib/include")))


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
    version = pinned_version()
    cache = pathlib.Path(sys.argv[1]).resolve()
    print(installed_headers(version) or downloaded_headers(version, cache))


if __name__ == "__main__":
    main()
