"""FLORES+ for lm-eval: sentences of a language beside their English, which the data set has in files of their own."""

from __future__ import annotations

from typing import Any

import datasets

FLORES_PLUS = "openlanguagedata/flores_plus"


def flores_plus(language: str, **_: Any) -> dict[str, datasets.Dataset]:
    """The sentences of FLORES+ in one language and in English.

    Args:
        language: As FLORES+ calls it, such as "cym_Latn".

    Returns:
        The splits `dev` and `devtest`, each with the columns `sentence` and `english`.

    Raises:
        OSError: If the data set cannot be had, or is gated and its terms were not accepted on the hub.
    """
    return {
        split: datasets.Dataset.from_dict({"sentence": _column(language, split), "english": _column("eng_Latn", split)})
        for split in ("dev", "devtest")
    }


def _column(language: str, split: str) -> list[str]:
    return [text.strip() for text in datasets.load_dataset(FLORES_PLUS, language, split=split)["text"]]
