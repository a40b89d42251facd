# SPDX-License-Identifier: Apache-2.0
"""Writes docs/guide/api.md from signatures and docstrings: `python tools/docs/api_reference.py`.

Reads the source text of the package that Python imports, and imports neither JAX nor Flax, so that
the page is the same whatever versions are installed. A test compares the page with what this gives.
"""

import ast
import importlib.util
import inspect
import itertools
import pathlib
import re
import sys
from collections.abc import Iterator

PAGE = pathlib.Path(__file__).resolve().parents[2] / "docs" / "guide" / "api.md"

# Heading, what the names are reached through, the module that says which names and where they are.
SECTIONS = (
    (
        "jax_ep",
        {
            "jax_ep._src.config": ("EpConfig",),
            "jax_ep._src.groups.group": ("EpGroup",),
            "jax_ep._src.groups.health": ("EpHealth",),
            "jax_ep._src.api": ("dispatch", "combine", "combine_with_status"),
            "jax_ep._src.missing": ("lost_selections",),
            "jax_ep._src.halves": (
                "dispatch_start",
                "dispatch_done",
                "combine_start",
                "combine_done",
            ),
            "jax_ep._src.types": (
                "Dispatched",
                "DispatchHandle",
                "DispatchFlight",
                "CombineFlight",
            ),
            "jax_ep._src.quantized": ("QuantizedRows", "quantize"),
            "jax_ep._src.routing": (
                "route",
                "update_bias",
            ),
            "jax_ep._src.expert_choice": ("route_expert_choice",),
            "jax_ep._src.losses": ("load_balance_loss", "router_z_loss"),
            "jax_ep._src.moe": ("moe", "moe_with_experts", "MoeStats"),
            "jax_ep._src.sharded.moe": ("sharded_moe",),
            "jax_ep._src.balancing.planner": ("plan_placement",),
            "jax_ep._src.balancing.placement": ("ExpertPlacement",),
            "jax_ep._src.balancing.arrays": ("PlacementArrays",),
            "jax_ep._src.balancing.place": ("place",),
            "jax_ep._src.balancing.copies": ("expand_experts", "move_experts"),
            "jax_ep._src.balancing.restore": ("restore_experts",),
            "jax_ep._src.balancing.rebalancer": ("Rebalancer",),
            "jax_ep._src.balancing.load_window": ("LoadWindow",),
            "jax_ep._src.balancing.load_report": ("LoadReport",),
            "jax_ep._src.tuning.launches": ("Tuning", "TunedLaunch"),
            "jax_ep._src.errors": ("EpUnavailable", "EpGroupClosed"),
        },
    ),
    (
        "jax_ep.experts",
        {
            "jax_ep._src.experts.bound": (
                "gated",
                "ungated",
                "gpt_oss",
                "custom",
                "ExpertWeights",
            ),
            "jax_ep._src.experts.kinds": ("Experts", "Gated", "Ungated", "GptOss", "Custom"),
            "jax_ep._src.experts.matrices": ("Matrices", "QuantizedMatrices", "LowRank"),
        },
    ),
    (
        "jax_ep.plot",
        {"jax_ep._src.balancing.load_plots": ("heat_map", "ranks", "before_after")},
    ),
    (
        "jax_ep.serving",
        {"jax_ep._src.service": ("start_service", "join_service", "CoordinationService")},
    ),
    (
        "jax_ep.flax",
        {
            "jax_ep.flax._load": ("load_experts",),
            "jax_ep.flax._placed": ("stored_from_logical",),
        },
    ),
    (
        "jax_ep.flax.nnx",
        {
            "jax_ep.flax.nnx": ("MoE", "MoeStat", "SelectionBias", "ExpertMap"),
            "jax_ep.flax._stats": ("LayerStats",),
        },
    ),
    (
        "jax_ep.flax.linen",
        {
            "jax_ep.flax.linen": (
                *("MoE", "update_bias", "set_placement"),
                *("STATS", "BIAS", "PLACEMENT"),
            )
        },
    ),
    (
        "jax_ep.reference",
        {
            "jax_ep.reference._plan": ("Plan", "plan"),
            "jax_ep.reference._exchange": (
                "Dispatched",
                "dispatch",
                "combine",
                "combine_error_bound",
                "dispatch_scalars",
                "combine_scalars",
                "dispatch_vjp",
                "combine_vjp",
            ),
            "jax_ep.reference._balancing": ("place",),
            "jax_ep.reference._layer": (
                "moe",
                "moe_dense",
                "route",
                "route_expert_choice",
                "load_balance_loss",
                "router_z_loss",
                "update_bias",
                "silu",
            ),
            "jax_ep.reference._rounding": (
                "QuantizedRows",
                "round_to",
                "fma32",
                "quantize_fp8",
                "dequantize_fp8",
            ),
        },
    ),
)

INTRODUCTION = """# API reference

Written by `tools/docs/api_reference.py` from the docstrings; do not edit. The letters are those of
the [glossary](glossary.md).
"""

_HEADER = re.compile(r"^([A-Z]\w+):$")
_ENTRY = re.compile(r"^ {4}(\*{0,2}\w[\w, ]*|\w+(?:\[.*\])?): (.*)$")
_TITLES = {"Args": "Arguments", "Attributes": "Attributes", "Raises": "Raises", "Warns": "Warns"}
_MAX_WIDTH = 100
_PUBLIC_METHODS = ("__call__",)


def _source(module: str) -> ast.Module:
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)  # imports nothing
    if spec is None or spec.origin is None:
        raise SystemExit(f"{package} is not installed, and not on PYTHONPATH")
    path = pathlib.Path(spec.origin).parent.joinpath(*rest.split(".")).with_suffix(".py")
    if not path.exists():
        path = path.with_suffix("") / "__init__.py"
    return ast.parse(path.read_text())


# --- signatures --------------------------------------------------------------------------------


def _signature(name: str, function: ast.FunctionDef, *, drop_self: bool = False) -> str:
    returns = f" -> {ast.unparse(function.returns)}" if function.returns else ""
    if name.endswith("__init__"):
        name, returns = name.removesuffix(".__init__"), ""
    arguments = list(_arguments(function.args))
    if drop_self:
        arguments = arguments[1:]
    line = f"{name}({', '.join(arguments)}){returns}"
    if len(line) <= _MAX_WIDTH:
        return line
    return "\n".join([f"{name}(", *(f"    {argument}," for argument in arguments), f"){returns}"])


def _arguments(args: ast.arguments) -> Iterator[str]:
    def with_default(arg: ast.arg, default: ast.expr | None) -> str:
        text = ast.unparse(arg)
        if default is None:
            return text
        equals = " = " if arg.annotation else "="
        return f"{text}{equals}{ast.unparse(default)}"

    positional = [*args.posonlyargs, *args.args]
    defaults = [None] * (len(positional) - len(args.defaults)) + list(args.defaults)
    for arg, default in zip(positional, defaults, strict=True):
        yield with_default(arg, default)
    if args.vararg:
        yield f"*{ast.unparse(args.vararg)}"
    elif args.kwonlyargs:
        yield "*"
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        yield with_default(arg, default)


def _fields(definition: ast.ClassDef) -> list[str]:
    """Of a dataclass or a Linen module: `name: type = default`."""
    fields = [
        ast.unparse(node).partition(" = dataclasses.field(")[0]
        for node in definition.body
        if isinstance(node, ast.AnnAssign) and not _is_private(ast.unparse(node.target))
    ]
    by_keyword = any("kw_only=True" in ast.unparse(d) for d in definition.decorator_list)
    return ["*", *fields] if fields and by_keyword else fields


def _is_private(name: str) -> bool:
    return name.startswith("_")


def _is_property(node: ast.FunctionDef) -> bool:
    return any(ast.unparse(decorator) == "property" for decorator in node.decorator_list)


# --- docstrings --------------------------------------------------------------------------------


def _markdown(docstring: str | None) -> str:
    """A Google docstring with its sections as lists."""
    lines: list[str] = []
    section = None
    for line in inspect.cleandoc(docstring or "").splitlines():
        header = _HEADER.match(line)
        if header and header.group(1) in (*_TITLES, "Returns"):
            section = header.group(1)
            lines += [f"**{_TITLES.get(section, section)}**", ""]
        elif section in _TITLES and (entry := _ENTRY.match(line)):
            names = ", ".join(f"`{name}`" for name in entry.group(1).split(", "))
            lines.append(f"- {names}: {entry.group(2)}")
        elif section in _TITLES:
            lines.append("  " + line.strip() if line.strip() else "")
        elif section == "Returns":
            lines.append(line.strip())
        else:
            lines.append(line)
    return "\n".join(lines).strip()


# --- the page ----------------------------------------------------------------------------------


def _code(text: str) -> str:
    return f"```text\n{text}\n```"


def _describe_function(prefix: str, node: ast.FunctionDef, level: int) -> Iterator[str]:
    is_method = level > 3
    yield f"{'#' * level} `{prefix}{node.name}`"
    if _is_property(node):
        returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
        yield _code(f"{node.name}{returns}  (property)")
    else:
        yield _code(_signature(node.name, node, drop_self=is_method))
    yield _markdown(ast.get_docstring(node, clean=False))


def _describe_class(prefix: str, node: ast.ClassDef) -> Iterator[str]:
    yield f"### `{prefix}{node.name}`"
    methods = [member for member in node.body if isinstance(member, ast.FunctionDef)]
    constructor = next((m for m in methods if m.name == "__init__"), None)
    fields = _fields(node)
    bases = ", ".join(ast.unparse(base) for base in node.bases)
    if constructor:
        yield _code("class " + _signature(f"{node.name}.__init__", constructor, drop_self=True))
    elif fields:
        opening = f"class {node.name}("
        yield _code("\n".join([opening, *(f"    {field}," for field in fields), ")"]))
    else:
        yield _code(f"class {node.name}({bases})")
    yield _markdown(ast.get_docstring(node, clean=False))
    if constructor and (text := _markdown(ast.get_docstring(constructor, clean=False))):
        yield text
    for method in methods:
        shown = not _is_private(method.name) or method.name in _PUBLIC_METHODS
        if shown and method.name != "setup":
            yield from _describe_function(f"{node.name}.", method, level=4)


def _describe_constant(prefix: str, name: str, body: list[ast.stmt]) -> Iterator[str]:
    for node, after in itertools.pairwise(body):
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == name:
            yield f"### `{prefix}{name}`"
            yield _code(ast.unparse(node))
            assert isinstance(after, ast.Expr)
            assert isinstance(after.value, ast.Constant)
            yield _markdown(str(after.value.value))


def _describe(prefix: str, module: str, name: str) -> Iterator[str]:
    body = _source(module).body
    named = [n for n in body if getattr(n, "name", None) == name]
    node = named[-1] if named else None  # after its overloads, if it has some
    if isinstance(node, ast.ClassDef):
        yield from _describe_class(prefix, node)
    elif isinstance(node, ast.FunctionDef):
        yield from _describe_function(prefix, node, level=3)
    else:
        yield from _describe_constant(prefix, name, body)


def names() -> dict[str, list[str]]:
    """The names that the page describes, by the module that they are reached through."""
    return {title: [n for ns in modules.values() for n in ns] for title, modules in SECTIONS}


def page() -> str:
    """The text of docs/guide/api.md."""
    parts = [INTRODUCTION.strip()]
    for title, modules in SECTIONS:
        parts.append(f"## {title}")
        if text := _markdown(ast.get_docstring(_source(title), clean=False)):
            parts.append(text)
        for module, members in modules.items():
            for name in members:
                described = list(_describe(f"{title}.", module, name))
                if not described:
                    raise SystemExit(f"{module} does not define {name}")
                parts += described
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(f"wrote {PAGE}", file=sys.stderr)
