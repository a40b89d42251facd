# SPDX-License-Identifier: Apache-2.0
"""Reads BUILD.bazel files, which Python runs: the Starlark in them is Python as far as it goes."""

import dataclasses
import functools
import itertools
import pathlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]

# Rules and functions that BUILD files have without loading them.
NATIVE = (
    *("alias", "config_setting", "constraint_setting", "constraint_value", "filegroup", "genrule"),
    *("label_flag", "package", "test_suite"),
)


@dataclasses.dataclass(frozen=True)
class Target:
    """What a rule is given.

    Attributes:
        kind: the rule's name.
        package: path of the BUILD file's folder, from the root.
        attributes: the rule's arguments.
    """

    kind: str
    package: str
    attributes: dict[str, Any]

    def files(self, *names: str) -> set[str]:
        """Paths, from the root, of the attributes' values that are files, of whatever package."""
        values = [value for name in names for value in self.attributes.get(name, [])]
        paths = [value for value in values if not value.startswith((":", "/", "@"))]
        own = {(pathlib.PurePath(self.package) / path).as_posix() for path in paths}
        labels = (value[2:].replace(":", "/") for value in values if value.startswith("//"))
        return own | {label for label in labels if (ROOT / label).is_file()}


@functools.cache
def targets() -> list[Target]:
    """All targets of the repository."""
    found = []
    for path in sorted(ROOT.rglob("BUILD.bazel")):
        folder = path.parent.relative_to(ROOT)
        parts = folder.parts
        # Environments and builds; other workspaces.
        if not (parts and parts[0].startswith((".", "build", "dist"))) and not (
            "offline" in parts or "bazel_consumer" in parts
        ):
            found += _Evaluation(folder.as_posix().removeprefix(".")).run(path)
    return found


def constant(path: str, name: str) -> Any:
    """The value of a name that a .bzl file or a BUILD file defines."""
    package = pathlib.PurePath(path).parent.as_posix()
    return _Evaluation(package).names_of(ROOT / path)[name]


class _Evaluation:
    """Runs the BUILD file of one package, with rules that write down what they are given."""

    def __init__(self, package: str) -> None:
        self.package = package
        self.targets: list[Target] = []

    def run(self, path: pathlib.Path) -> list[Target]:
        self.names_of(path)
        return self.targets

    def names_of(self, path: pathlib.Path) -> dict[str, Any]:
        """Runs a file; the names that it has then."""
        names = {name: self._rule(name) for name in NATIVE}
        names |= {
            "Label": str,
            "attr": _Anything(),
            "config": _Anything(),
            "exports_files": lambda *args, **kwargs: None,
            "glob": self._glob,
            "load": lambda *args, **aliases: names.update(self._load(*args, **aliases)),
            "native": SimpleNamespace(package_name=lambda: self.package),
            "provider": _Anything().provider,
            "rule": lambda implementation, **_: self._rule(
                implementation.__name__.strip("_").removesuffix("_impl")
            ),
            "select": lambda branches: list(itertools.chain(*branches.values())),
        }
        exec(compile(path.read_text(), str(path), "exec"), names)
        return names

    def _rule(self, kind: str) -> Callable[..., None]:
        def record(**attributes: Any) -> None:
            self.targets.append(Target(kind, self.package, attributes))

        return record

    def _load(self, label: str, *names: str, **aliases: str) -> dict[str, Any]:
        wanted = {**{name: name for name in names}, **aliases}
        if label.startswith("@jax_ep_cuda"):
            return {"HAVE_CUDA": True, "WHY_NO_CUDA": None}
        if label.startswith("@jax_ep_nvshmem"):
            return {"WHY_NO_NVSHMEM": None}
        if label.startswith("@"):
            return {name: self._rule(original) for name, original in wanted.items()}
        folder, _, file = label.removeprefix("//").partition(":")
        loaded = self.names_of(ROOT / (folder or "tools/bazel") / file)
        return {name: loaded[original] for name, original in wanted.items()}

    def _glob(
        self, patterns: list[str], exclude: list[str] = (), *, allow_empty: bool = True
    ) -> list[str]:
        folder = ROOT / self.package

        def paths(patterns: list[str]) -> set[str]:
            found = {path for pattern in patterns for path in folder.glob(pattern)}
            return {path.relative_to(folder).as_posix() for path in found if path.is_file()}

        found = sorted(paths(patterns) - paths(exclude))
        assert found or allow_empty, f"{self.package}: nothing matches {patterns}"
        return found


class _Anything:
    """`attr` and `config`, and `provider`: what they describe of a rule is of no interest."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None
