"""What README, CONTRIBUTING and the pages say of the repository is so."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

from calm.cli import app

ROOT = Path(__file__).parents[1]


def rooms() -> list[str]:
    """The rooms of src/calm, files and folders."""
    found = (path for path in (ROOT / "src" / "calm").iterdir() if not path.name.startswith("_"))
    return sorted(path.stem for path in found if path.suffix == ".py" or path.is_dir())


def code_after(document: str, heading: str) -> str:
    """The first block of code after a heading."""
    match = re.search(rf"^## {heading}\n.*?^```\w*\n(.*?)^```", (ROOT / document).read_text(), re.M | re.S)
    assert match, f"{document} has no code after {heading!r}"
    return match[1]


def test_contributing_lists_the_rooms_in_the_order_that_is_checked() -> None:
    contract = re.search(r"^layers = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), re.M | re.S)
    assert contract
    checked = [re.findall(r"\w+", line) for line in re.findall(r'"(.*?)"', contract[1])]
    listed = code_after("CONTRIBUTING.md", "Rooms and import order")
    assert [re.findall(r"\w+", re.split(r" {2,}", line)[0]) for line in listed.splitlines()] == checked


def test_readme_shows_every_room() -> None:
    tree = code_after("README.md", "Where things are")
    source = tree[tree.index("src/calm/") : tree.index("tests/")]
    shown = sorted(re.findall(r"^  (\w+)(?:\.py|/) ", source, re.M))
    assert shown == rooms()


def test_ten_lines_are_ten() -> None:
    lines = [line for line in code_after("README.md", "Ten lines of Python").splitlines() if line.strip()]
    assert len(lines) == 10
    compile("\n".join(lines), "README.md", "exec")


def test_every_command_is_on_the_page_and_in_the_changelog() -> None:
    names = [command.name for command in app.registered_commands]
    page, changes = (ROOT / "docs" / "cli.md").read_text(), (ROOT / "CHANGELOG.md").read_text()
    assert [name for name in names if f"| `calm {name}" not in page] == []
    assert [name for name in names if f"{name}`" not in changes] == []


def test_reference_shows_the_members_that_it_names() -> None:
    """A member that is inherited or not there is left out by mkdocstrings without a word."""
    page = (ROOT / "docs" / "reference.md").read_text()
    blocks = re.findall(r"^::: (\S+)\n    options:\n((?:      .*\n)*?)      members: \[(.*)\]", page, re.M)
    assert len(blocks) == page.count("members: [")
    for name, options, members in blocks:
        owner = pkgutil.resolve_name(name)
        there = dir(owner) if "inherited_members: true" in options else vars(owner)
        assert [member for member in members.split(", ") if member not in there] == [], name
