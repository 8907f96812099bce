"""Unpacked Debian packages as a user would put them there by hand: two books of invented English prose."""

from __future__ import annotations

import random
from pathlib import Path

WORDS = ["".join(random.Random(i).choices("abcdefghijklmnoprstuvw", k=5 + i % 4)) for i in range(900)]
"""Invented, and unlike one another."""


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
    return folder
