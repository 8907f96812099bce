"""Saved compositions to test with: bases on disk, a composition of them, its checkpoint, and what to check."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import factories
import torch
from factories import assert_identical

import calm
from calm import CalmForCausalLM, CheckpointError

IDS = factories.tokens(2, 9)


def check_same_logits(found: CalmForCausalLM, expected: CalmForCausalLM) -> None:
    """Bit for bit, cached and uncached, and it is the composition that was saved, not merely its anchor."""
    with torch.no_grad():
        assert_identical(found(IDS).logits, expected(IDS).logits)
        assert_identical(found(IDS, use_cache=False).logits, expected(IDS, use_cache=False).logits)
        with found.composition_disabled():
            assert not torch.equal(found(IDS).logits, expected(IDS).logits)


def check_refused(load: Callable[[], object], *words: str) -> None:
    """A `CheckpointError` whose message says all of these words."""
    try:
        load()
    except CheckpointError as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
    else:
        raise AssertionError("it was loaded")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Saved:
    """Two bases on disk, a composition of them, and its checkpoint."""

    def __init__(self, folder: Path, anchor: str = "llama", augmenting: str = "gpt2", **kwargs: object) -> None:
        self.anchor, self.augmenting, self.out = folder / "anchor", folder / "augmenting", folder / "out"
        factories.base(anchor).save_pretrained(self.anchor)
        factories.base(augmenting, 24, 4, 2, seed=1).save_pretrained(self.augmenting)
        self.model = factories.perturb(calm.compose(self.anchor, self.augmenting, [(0, 1), (2, 3)], **kwargs))
        self.model.save_pretrained(self.out)

    def load(self, **kwargs: object) -> CalmForCausalLM:
        return CalmForCausalLM.from_pretrained(self.out, **kwargs)

    def edit_config(self, **changes: object) -> None:
        change_config(self.out, **changes)
