"""Data as a user would put it there by hand: three books, a dictionary, and data sets of a hub as folders."""

from __future__ import annotations

import gzip
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polib

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnoprstuvw", k=5 + i % 4)) for i in range(900)]
"""Invented, and unlike one another."""


REGULAR_VERBS = re.findall(
    r"\w+",
    """add allow answer ask bake belong call change clean close cook cover cry dance enjoy fail fill finish follow
    gather guess happen help hope jump kick laugh explain like listen live look move need open paint play pull push rain
    reach rest roll save serve start remain stop talk thank touch turn use visit wait walk want wash watch work""",
)
IRREGULAR_VERBS = re.findall(
    r"\w+", "begin break bring buy choose come drink drive eat fall find arise give go hold know lose run see sing"
)


def write_books(folder: Path) -> Path:
    """The pages that `calm.experiments.english` reads, below `folder`, which is returned."""
    rng = random.Random(0)
    for name, page in (
        ("debian-handbook", "usr/share/doc/debian-handbook/html/en-US/{}.html"),
        ("debian-reference-en", "usr/share/debian-reference/ch{}.en.html"),
    ):
        for number in range(60):
            path = folder / name / page.format(number)
            path.parent.mkdir(parents=True, exist_ok=True)
            texts = [" ".join(rng.choices(WORDS, k=30)) + "." for _ in range(5)]
            path.write_text("".join(f"<p>{text}</p><pre>code {text}</pre>" for text in texts))
    path = folder / "jargon-text/usr/share/doc/jargon-text/jargon.txt.gz"
    path.parent.mkdir(parents=True)
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for number in range(300):
            words = rng.choices(WORDS, k=30)
            lines = f"Say {{{' '.join(words[:15])}}}\n   {' '.join(words[15:])}.\n"
            file.write(f"   :{words[0]}: /say/, n.\n\n   {number % 3}. {lines}\n   See {lines}\n")
    return folder


BOOKS = ("debian-handbook", "debian-reference-en", "jargon-text")
"""Their folders."""


def write_dictionary(folder: Path, code: str = "xyz", lines: Sequence[str] = ()) -> None:
    """An unpacked dictionary, with a note at its head as they have, and with words that are left out if not given."""
    words = iter(random.Random(1).sample(WORDS, 400))
    if not lines:
        lines = ["00-database-info", "xyz-English dictionary", "", "Edition: 1", " * Thanks to all", ""]
        for verb in REGULAR_VERBS + IRREGULAR_VERBS:
            lines += [f"{next(words)} /\u02c8ab\u026a/ <v>", verb]
        lines += [f"{next(words)} /a/ <v>", "walk"]  # a second word for a meaning
        for number in range(60):
            lines += [f"{next(words)} /a/ <n, s, m>", f"thing{'abcdefghij'[number % 10]}{'klmnop'[number // 10]}"]
        lines += ["ambi /a/ <v>", "1. try", "2. taste", "twice /a/ <n>", "cup", "twice /a/ <n>", "bowl"]
        lines += ["same /a/ <n>", "same", "phrase /a/ <v>", "get up"]
        lines += ["leak /a/ <a>", "walked", "another /a/ <v>", "fell"]  # what is asked for, as a meaning
        lines += ["unknown /a/ <v>", "qwertify", "cutter /a/ <v>", "cut", "dreamer /a/ <v>", "dream"]
    place = folder / f"dict-freedict-{code}-eng/usr/share/dictd"
    place.mkdir(parents=True)
    with gzip.open(place / f"freedict-{code}-eng.dict.dz", "wt", encoding="utf-8") as file:
        file.write("\n".join(lines) + "\n")


def write_catalogue(folder: Path) -> None:
    """LibreOffice's Xhosa messages as an unpacked package, with near-duplicates and what is left out among them."""
    rng = random.Random(0)
    catalogue = polib.POFile()
    for number in range(300):
        text = " ".join(rng.sample(WORDS, 4)).capitalize()
        # every fifth has a twin that differs in little
        for variant in (text, text.replace(" ", ", ")[:-1]) if number % 5 == 0 else (text,):
            catalogue.append(polib.POEntry(msgid=variant, msgstr=variant[::-1].lower(), msgctxt="menu"))
    for number in range(30):  # one template
        text = f"Error {number}: the printer does not answer any more"
        catalogue.append(polib.POEntry(msgid=text, msgstr=text[::-1]))
    for english_text, translation in (
        ("~Undo the ruler", "Umgca ~wokubuyisela"),
        ("Untranslated here", ""),
        ("LibreOffice Writer", "LibreOffice Writer"),
        ("<b>Bold</b> words here", "<b>amagama</b> apha"),
        ("%1 / $(ARG1)", "$(ARG1) / %1"),
        ("word " * 20, "igama " * 20),
        ("Sum the cells", "Iiseli"),
        ("Sum the Cells!", "Iiseli ezi"),
    ):
        catalogue.append(polib.POEntry(msgid=english_text, msgstr=translation))
    place = folder / "libreoffice-l10n-xh/usr/lib/libreoffice/program/resource/xh/LC_MESSAGES"
    place.mkdir(parents=True)
    catalogue.save_as_mofile(str(place / "sw.mo"))
    (folder / "libreoffice-l10n-xh/VERSION").write_text("1:2.3")


def write_data_set(folder: Path, splits: Mapping[str, Sequence[Mapping[str, Any]]], config: str | None) -> None:
    """A data set of several configurations, as the hub describes them in a README's header."""
    folder.mkdir(exist_ok=True)
    for split, rows in splits.items():
        name = f"{config or 'default'}-{split}.jsonl"
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    described = sorted(folder.glob("*.jsonl"))
    configs: dict[str, list[tuple[str, str]]] = {}
    for path in described:
        which, _, split = path.stem.rpartition("-")
        configs.setdefault(which, []).append((split, path.name))
    header = "".join(
        f"- config_name: {which}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {file}\n" for split, file in files)
        for which, files in configs.items()
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{header}---\n")


def write_code_sets(folder: Path) -> Path:
    """CodeXGLUE in Python and Go as `functions`, and MBPP as `mbpp`, below `folder`, which is returned."""
    rng = random.Random(2)

    def python_row() -> dict[str, str]:
        a, b, c, d, e, f = rng.sample(WORDS, 6)
        said = f"Make the {c} of {d}.\n\n        More."
        code = f'def {a}(self, {b}):\n        """{said}"""\n        {c} = {d}({b})\n        return {c}.{e}({f})'
        return {"repo": f"{a}/{b}", "path": "a.py", "code": code, "docstring": said}

    def go_row() -> dict[str, str]:
        a, b, c, d, e, f = rng.sample(WORDS, 6)
        code = f"func {a}({b} int) int {{\n\t{c} := {d}({b})\n\treturn {c}.{e}({f})\n}}"
        return {"repo": f"{a}/{b}", "path": "a.go", "code": code, "docstring": f"{a} makes the {c} of {d}."}

    def problem() -> dict[str, Any]:
        a, b, c, d = rng.sample(WORDS, 4)
        return {
            "text": f"Write a function to {a} the {b}.",
            "code": f"def {a}({b}):\r\n    {c} = {d} = {b} * 2\r\n    return {c} + {d}",
            "test_setup_code": "",
            "test_list": [f"assert {a}({number}) == {4 * number}" for number in range(3)],
        }

    problems = [problem() for _ in range(6)]
    name, _, rest = problems[0]["code"].replace("\r\n", "\n").partition("\n")
    leak = {"repo": "a/leak", "path": "a.py", "code": f'{name}\n    """Gollyngiad a b c."""\n{rest}'}
    leak["docstring"] = "Gollyngiad a b c."
    for config, row in (("python", python_row), ("go", go_row)):
        splits = {
            split: [row() for _ in range(size)] for split, size in (("train", 40), ("validation", 6), ("test", 6))
        }
        if config == "python":
            splits["train"].append(leak)
        write_data_set(folder / "functions", splits, config)
    write_data_set(folder / "mbpp", {"test": problems[:3], "prompt": problems[3:]}, "full")
    return folder
