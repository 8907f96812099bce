"""Data sets of a hub, or of folders in their place, for the `paper` presets."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import datasets

from calm.errors import CalmError

PRESERVED = 200
"""Texts whose perplexity is measured."""


def rows(name: str, config: str | None, split: str, streaming: bool = False) -> Sequence[dict[str, Any]]:
    """One split of a data set.

    Args:
        name: on the hub, or a folder that `datasets.load_dataset` takes likewise.
        config: which of its configurations.
        split: such as "train".
        streaming: read no more than is asked for.

    Raises:
        CalmError: If it cannot be had.
    """
    try:
        loaded: Any = datasets.load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # many: not found, gated, no network, no such configuration
        raise CalmError(
            f"the data set {name!r} ({config}, {split}) could not be read: {error} (one that is gated, as FLORES+ is, "
            "wants you to accept its terms on the hub and to log in with `hf auth login`)"
        ) from error
    return loaded


def first_texts(name: str, config: str | None) -> tuple[str, ...]:
    """The first texts of the column `text` of a training split; raises as `rows`."""
    return tuple(row["text"] for row in itertools.islice(rows(name, config, "train", streaming=True), PRESERVED))
