"""What README, CONTRIBUTING and the pages say of the repository is so."""

from __future__ import annotations

import pkgutil
import re
import shutil
from pathlib import Path

import pytest

from calm.cli import app
from calm.experiments.report import newest, write_report

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


def test_the_report_is_what_the_results_and_the_code_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no preset changes without the report calling what it has measured outdated."""
    published = ROOT / "results"
    for path in published.glob("*/*.json"):
        (tmp_path / "results" / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, tmp_path / "results" / path.parent.name)
    monkeypatch.chdir(tmp_path)
    written = write_report(Path("results"))
    assert written.read_text() == (published / "REPORT.md").read_text(), "run `python -m calm.experiments.report`"


def test_readme_says_of_each_language_what_was_measured() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    for results in newest(ROOT / "results"):
        if results.domain != "low_resource" or "seen" in results.variant:
            continue
        for row, cells in results.table.items():
            name = results.rows[row].title.removesuffix(" to English")
            [line] = [line for line in lines if line.startswith(f"| {name}, {len(results.seeds)} |")]
            shown = [f"{cells[method].mean:.1f}" for method in ("m_B", "m_A", "composed", "lora", "mixed_logits")]
            low, high = cells["composed"].interval
            shown[2] = f"**{shown[2]} [{low:.1f}, {high:.1f}]**"
            anchor, composed = (
                results.preservation["English perplexity"][method].mean for method in ("m_B", "composed")
            )
            shown += [f"{cells['pipeline'].mean:.1f}", f"{100 * (composed / anchor - 1):+.1f}%"]
            assert line.strip("| ").split(" | ")[2:] == shown


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
