"""Documented Python functions out of the standard library and of packages that are installed here."""

from __future__ import annotations

import ast
import functools
import platform
import sysconfig
import textwrap
import warnings
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

from calm.errors import CalmError
from calm.experiments.code.functions import Function, first_sentence

PACKAGES = (
    "accelerate",
    "fsspec",
    "huggingface_hub",
    "jinja2",
    "networkx",
    "numpy",
    "packaging",
    "pydantic",
    "rich",
    "safetensors",
    "sympy",
    "typer",
)
"""What calm depends on, PyTorch's own dependencies with it: they are on every machine that it runs on. (Of PyTorch and
transformers most functions are too long.)"""

_SKIPPED = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


def versions() -> dict[str, str]:
    """Of Python and of each package."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}}


@functools.cache
def read() -> tuple[Function, ...]:
    """All documented functions and methods, at whatever length.

    Raises:
        CalmError: If a package is not installed, or has no sources.
    """
    roots = {"python": Path(sysconfig.get_path("stdlib"))}
    for name in PACKAGES:
        found = util.find_spec(name)
        if not found or not found.submodule_search_locations:
            raise CalmError(f"{name} is not installed, whose functions the code domain learns: pip install {name}")
        roots[name] = Path(found.submodule_search_locations[0])
    return tuple(
        function
        for name, root in roots.items()
        for path in root.rglob("*.py")
        if not _SKIPPED & set(path.relative_to(root).parts)
        for function in parse(_text(path), f"{name}/{path.relative_to(root).as_posix()}")
    )


def parse(source: str, file: str) -> Iterator[Function]:
    """The documented functions of one file, and the methods of its classes; none if it is not today's Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes in strings
            tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return
    lines = source.split("\n")
    blocks: list[ast.Module | ast.ClassDef] = [tree]
    while blocks:
        for node in blocks.pop().body:
            if isinstance(node, ast.ClassDef):
                blocks.append(node)
            elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (
                function := _function(node, lines, file)
            ):
                yield function


def _function(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str], file: str) -> Function | None:
    """None if it has no docstring, nothing else, or a docstring that shares a line with code."""
    docstring = ast.get_docstring(node)
    if not docstring or len(node.body) < 2:
        return None
    start, end = node.body[0].lineno, node.body[0].end_lineno or 0
    header = lines[node.lineno - 1 : start - 1]
    body = lines[end : node.end_lineno]
    if not header or node.body[1].lineno <= end:
        return None
    whole = textwrap.dedent("\n".join(line.expandtabs(8).rstrip() for line in header + body))
    kept = whole.split("\n")
    head, rest = kept[: len(header)], [line for line in kept[len(header) :] if line]
    return Function(file, "\n".join(head) + "\n", "\n".join(rest), first_sentence(docstring))


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
