# SPDX-License-Identifier: Apache-2.0
"""Prints where the sources of GoogleTest are, with which CMake and Bazel build our C++ tests.

They come from PyPI, where a package of ROS has them, in releases for one Python and one kind of
machine each. The sources are the same in all, so one of these is pinned, whatever runs this. It is
downloaded into CACHE_FOLDER, once, and not installed.

    python tools/googletest.py CACHE_FOLDER

Without a network, the environment variable JAX_EP_GOOGLETEST_DIR may name a folder that has them,
such as Debian's /usr/src/googletest/googletest, from `apt-get install googletest`.
"""

import os
import pathlib
import subprocess
import sys
import tempfile
import zipfile

VERSION = "1.15.1"
SHA256 = "6a578c55eca01c7d215e54bf1dd3172ada677b591dd2f5d3c8260b882364ee6e"
REQUIREMENT = f"ros-gtest-vendor=={VERSION} --hash=sha256:{SHA256}\n"
# Of the pinned file.
PLATFORM = [
    *("--implementation", "cp", "--python-version", "3.11", "--abi", "cp311"),
    *("--platform", "manylinux_2_28_x86_64"),
]
# Of a wheel's members, how those begin that are wanted.
SOURCES = f"ros_gtest_vendor-{VERSION}.data/data/src/gtest_vendor/"
VARIABLE = "JAX_EP_GOOGLETEST_DIR"
NEEDED = ("include/gtest/gtest.h", "src/gtest-all.cc", "src/gtest_main.cc")


def given_sources() -> pathlib.Path | None:
    """Returns the folder that the environment names; None if it names none."""
    if not (name := os.environ.get(VARIABLE)):
        return None
    folder = pathlib.Path(name).resolve()
    if missing := [file for file in NEEDED if not (folder / file).is_file()]:
        raise SystemExit(
            f"jax_ep: {VARIABLE} is {name}, which has no {missing[0]}: it must be a folder with "
            "the sources of GoogleTest, such as /usr/src/googletest/googletest"
        )
    return folder


def download(folder: pathlib.Path) -> pathlib.Path:
    """Puts the pinned wheel into a folder; returns it."""
    (folder / "requirements.txt").write_text(REQUIREMENT)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-qq", "download"]
    done = subprocess.run(
        [*pip, "--no-deps", "--only-binary=:all:", *PLATFORM, "--require-hashes",
         f"--dest={folder}", f"--requirement={folder / 'requirements.txt'}"],
        stdout=sys.stderr,  # standard output is for the answer
        check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"jax_ep: the C++ tests need GoogleTest, and pip cannot download ros-gtest-vendor "
            f"{VERSION}. Without a network: set {VARIABLE} to a folder with its sources, such as "
            "/usr/src/googletest/googletest (Debian, Ubuntu: apt-get install googletest)"
        )
    (wheel,) = folder.glob("ros_gtest_vendor-*.whl")
    return wheel


def downloaded_sources(cache: pathlib.Path) -> pathlib.Path:
    """Returns the folder in `cache`, filled if it is not there yet."""
    target = cache / f"googletest-{VERSION}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = pathlib.Path(name)
        with zipfile.ZipFile(download(folder)) as archive:
            members = [m for m in archive.namelist() if m.startswith(SOURCES)]
            archive.extractall(folder, members)
        # At once, so that nobody finds half of it; another process may have been faster.
        try:
            (folder / SOURCES).rename(target)
        except OSError:
            if not target.is_dir():
                raise
    return target


def main() -> None:
    """Prints the folder."""
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    print(given_sources() or downloaded_sources(pathlib.Path(sys.argv[1]).resolve()))


if __name__ == "__main__":
    main()
