"""Documented Emacs Lisp functions out of Debian's packages, found by a small reader of balanced forms."""

from __future__ import annotations

import gzip
import os
import re
from collections.abc import Iterator

from calm.errors import CalmError
from calm.experiments import debian
from calm.experiments.code.functions import Function, first_sentence

PACKAGE = "emacs-el"  # GPL-3+
_DEFUN = re.compile(r"^\((?:cl-)?def(?:un|subst|macro)\s", re.MULTILINE)
_SKIP = re.compile(r"(?:\s|;[^\n]*)*")
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_CHARACTER = re.compile(r"\?(?:\\(?:[CMSHAs]-|\^))*(?:\\.|.)", re.DOTALL)  # ?a ?\( ?\\ ?\C-a ?\M-\C-x ?\^I
_ATOM = re.compile(r"""(?:\\.|[^\s()\[\]";'`,])+""", re.DOTALL)


def read(folder: str | os.PathLike[str]) -> tuple[list[Function], dict[str, str]]:
    """All documented functions and macros of `emacs-el`, and its version as {package: version}.

    Args:
        folder: where Debian packages are kept.

    Raises:
        CalmError: If the package cannot be had, or has no Lisp.
    """
    package = debian.package(PACKAGE, folder)
    functions: list[Function] = []
    for path in package.root.rglob("*.el*"):
        if path.suffix == ".el":
            data = path.read_bytes()
        elif path.name.endswith(".el.gz"):
            data = gzip.decompress(path.read_bytes())
        else:
            continue
        functions += parse(data.decode("utf-8", errors="replace"), path.relative_to(package.root).as_posix())
    if not functions:
        raise CalmError(f"No Emacs Lisp functions in {str(package.root)!r}: remove the folder to fetch it anew")
    return functions, {PACKAGE: package.version}


def parse(source: str, file: str) -> Iterator[Function]:
    """The documented functions that begin a line; what cannot be read as a form is passed over."""
    for start in _DEFUN.finditer(source):
        parts = list(_parts(source, start.start()))
        if len(parts) < 6 or not source.startswith('"', parts[3][0]):  # defun name (arguments) "doc" body... )
            continue
        doc_start, doc_end = parts[3]
        docstring = re.sub(r"\\(.)", r"\1", source[doc_start + 1 : doc_end - 1])
        rest = source[doc_end : parts[-1][1]]
        if not re.match(r"[ \t]*\n", rest):  # code, or the closing parenthesis, on the docstring's last line
            continue
        header = source[start.start() : parts[2][1]].expandtabs(8)
        lines = [line.rstrip() for line in rest.expandtabs(8).split("\n")]
        yield Function(file, f"{header}\n", "\n".join(line for line in lines if line), first_sentence(docstring))


def _parts(source: str, start: int) -> Iterator[tuple[int, int]]:
    """Begin and end of each form in the list that opens at `start`, and of its closing parenthesis last."""
    at = start + 1
    while True:
        at = _skip(source, at)
        if source.startswith(")", at):
            yield at, at + 1
            return
        end = _end(source, at)
        if end is None:
            return
        yield at, end
        at = end


def _end(source: str, at: int) -> int | None:
    """Where the form that begins at `at` ends; None if it does not."""
    closing = []
    while at < len(source):
        sign = source[at]
        if sign in "([":
            closing.append(")" if sign == "(" else "]")
            at += 1
        elif sign in ")]":
            if not closing or closing.pop() != sign:
                return None
            at += 1
        elif sign in "'`,":
            at = _skip(source, at + 1)
            continue
        else:
            pattern = {'"': _STRING, "?": _CHARACTER}.get(sign, _ATOM)
            found = pattern.match(source, at)
            if not found:
                return None
            at = found.end()
        if not closing:
            return at
        at = _skip(source, at)
    return None


def _skip(source: str, at: int) -> int:
    """Past whitespace and comments."""
    found = _SKIP.match(source, at)
    return found.end() if found else at
