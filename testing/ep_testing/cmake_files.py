# SPDX-License-Identifier: Apache-2.0
"""Reads the CMakeLists.txt files: which targets there are, of which sources, with which flags."""

import dataclasses
import functools
import itertools
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parents[2]

_COMMAND = re.compile(r"(\w+)\s*\(((?:[^()\"]|\"[^\"]*\")*)\)")
_WORD = re.compile(r'"([^"]*)"|(\S+)')
_VARIABLE = re.compile(r"\$\{(\w+)\}")
_SOURCE = re.compile(r".*\.(cc|cu)")

# What properties of targets, with these values, become on the command line.
_PROPERTIES = {
    ("CUDA_STANDARD", "20"): ("cu", "-std=c++20"),
    ("CUDA_VISIBILITY_PRESET", "hidden"): ("cu", "-Xcompiler=-fvisibility=hidden"),
    ("CXX_VISIBILITY_PRESET", "hidden"): ("cc", "-fvisibility=hidden"),
    ("POSITION_INDEPENDENT_CODE", "ON"): ("cu", "-Xcompiler=-fPIC"),
    ("VISIBILITY_INLINES_HIDDEN", "ON"): ("cc", "-fvisibility-inlines-hidden"),
}
# What nanobind_add_module adds where it is to optimize.
_NANOBIND = ("-Os", "-fno-stack-protector", "-ffunction-sections", "-fdata-sections")


@dataclasses.dataclass
class Target:
    """A library or a program.

    Attributes:
        sources: paths from the root.
        flags: for each kind of source, "cc" and "cu".
    """

    sources: set[str] = dataclasses.field(default_factory=set)
    flags: dict[str, set[str]] = dataclasses.field(
        default_factory=lambda: {"cc": set(), "cu": set()}
    )


@functools.cache
def targets() -> dict[str, Target]:
    """All targets of the repository, by name."""
    variables = _variables()
    found: dict[str, Target] = {}
    for path in _lists():
        folder = path.parent.relative_to(ROOT).as_posix()
        for command, words in _expanded(_commands(path.read_text()), variables):
            _apply(command, words, folder, found)
    return found


def variable(name: str) -> str:
    """The value that a variable is first set to, in cmake/ too."""
    return _variables()[name]


def _lists() -> list[pathlib.Path]:
    folders = (ROOT / "csrc").rglob("CMakeLists.txt")
    return [ROOT / "CMakeLists.txt", *sorted(folders)]


@functools.cache
def _variables() -> dict[str, str]:
    variables: dict[str, str] = {}
    for path in [*_lists(), *sorted((ROOT / "cmake").glob("*.cmake"))]:
        for command, words in _commands(path.read_text()):
            if command == "set":
                values = itertools.takewhile(lambda word: word != "CACHE", words[1:])
                variables.setdefault(words[0], ";".join(values))
    # Of the folder csrc: sources are named from the root.
    return variables | {"JAX_EP_INCLUDE_ROOT": "/"}


def _commands(text: str) -> list[tuple[str, list[str]]]:
    code = re.sub(r"#.*$", "", text, flags=re.MULTILINE)
    code = re.sub(r"^if\(JAX_EP_SANITIZE\)$.*?^endif\(\)$", "", code, flags=re.M | re.S)
    return [(m[1], [a or b for a, b in _WORD.findall(m[2])]) for m in _COMMAND.finditer(code)]


def _expanded(
    commands: list[tuple[str, list[str]]], variables: dict[str, str]
) -> Iterator[tuple[str, list[str]]]:
    """With loops unrolled, variables replaced, and without the definitions of functions."""
    loop: list[tuple[str, list[str]]] | None = None
    items: list[str] = []
    in_function = False
    for command, words in commands:
        if command in ("function", "endfunction"):
            in_function = command == "function"
        elif command == "foreach":
            loop, items = [], words[3:]
        elif command == "endforeach":
            for item in items:
                yield from _replaced(loop, variables | {"name": item})
            loop = None
        elif loop is not None:
            loop.append((command, words))
        elif not in_function:
            yield from _replaced([(command, words)], variables)


def _replaced(
    commands: list[tuple[str, list[str]]], variables: dict[str, str]
) -> Iterator[tuple[str, list[str]]]:
    for command, words in commands:
        replaced = []
        for word in words:
            while (text := _VARIABLE.sub(lambda m: variables.get(m[1], ""), word)) != word:
                word = text
            replaced += [part for part in _split(word) if part]
        yield command, replaced


def _split(word: str) -> list[str]:
    """Splits at the semicolons outside of generator expressions."""
    parts, depth = [""], 0
    for i, char in enumerate(word):
        depth += (word[i : i + 2] == "$<") - (char == ">")
        if char == ";" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _apply(command: str, words: list[str], folder: str, found: dict[str, Target]) -> None:
    if command in ("add_executable", "add_library", "jax_ep_add_module"):
        target = found[words[0]] = Target()
        target.sources = {_path(folder, word) for word in words[1:] if _SOURCE.fullmatch(word)}
        if command == "jax_ep_add_module":
            target.flags["cc"].update(_NANOBIND)
    elif command == "jax_ep_add_tests":  # cmake/JaxEpGoogleTest.cmake
        for name in words[2 + ("WHOLE" in words) :]:
            flags = {"cc": {"-Wall", "-Wextra", "-Werror", "-ffp-contract=off"}, "cu": set()}
            found[f"{name}_test"] = Target({_path(folder, f"{name}_test.cc")}, flags)
    elif command == "target_compile_options" and words[0] in found:
        for word in words[2:]:
            for kind, flags in _evaluated(word).items():
                found[words[0]].flags[kind].update(flags)
    elif command == "target_compile_features" and "cxx_std_20" in words:
        found[words[0]].flags["cc"].add("-std=c++20")
    elif command == "set_target_properties":
        for pair in _PROPERTIES.keys() & itertools.pairwise(words):
            kind, flag = _PROPERTIES[pair]
            for name in words[: words.index("PROPERTIES")]:
                found[name].flags[kind].add(flag)


def _path(folder: str, source: str) -> str:
    return source.lstrip("/") if source.startswith("/") else f"{folder}/{source}".removeprefix("./")


def _evaluated(word: str) -> dict[str, list[str]]:
    """The flags that an option is for each kind of source, with warnings as errors, optimized."""
    if not word.startswith("$<"):
        return {"cc": [word], "cu": [word]}
    depth = 0
    for i, char in enumerate(word[2:-1], 2):
        depth += (word[i : i + 2] == "$<") - (char == ">")
        if char == ":" and depth == 0:
            condition, flags = word[2:i], _split(word[i + 1 : -1])
            break
    if "COMPILE_LANGUAGE" in condition:
        kind = "cu" if "CUDA" in condition else "cc"
        return {kind: flags}
    # $<BOOL:> is of an option that CMakeLists.txt does not set: -Xptxas=-v, which only prints.
    return {} if "-Xptxas=-v" in flags else {"cc": flags, "cu": flags}
