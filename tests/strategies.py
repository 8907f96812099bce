"""Hypothesis strategies: which models are composed how, and which rows they read."""

from __future__ import annotations

import factories
from factories import Mix
from hypothesis import strategies as st
from torch import Tensor

# Few shapes, so that the models can be kept; depths are even because gpt_neo's layers come in pairs.
ANCHOR_SHAPES = ((32, 4, 4), (24, 2, 2))
AUGMENTING_SHAPES = ((16, 2, 4), (24, 4, 2), (48, 2, 4))


@st.composite
def mixes(draw: st.DrawFn, anchor: str, attend: str | None = None, augmenting: tuple[str, ...] | None = None) -> Mix:
    """Any composition on an anchor: one or two augmenting models of any width, depth and number of heads."""
    anchor_shape = draw(st.sampled_from(ANCHOR_SHAPES))
    if augmenting is None:
        augmenting = tuple(draw(st.lists(st.sampled_from(factories.AUGMENTING), min_size=1, max_size=2)))
    shapes = tuple(draw(st.sampled_from(AUGMENTING_SHAPES)) for _ in augmenting)
    most = min(anchor_shape[1], *(layers for _, layers, _ in shapes))
    pairs = [
        st.lists(
            st.tuples(st.integers(0, layers - 1), st.integers(0, anchor_shape[1] - 1)),
            min_size=1,
            max_size=3,
            unique=True,
        ).map(tuple)
        for _, layers, _ in shapes
    ]
    return Mix(
        anchor=anchor,
        augmenting=augmenting,
        connections=draw(st.one_of(st.integers(1, most), st.tuples(*pairs))),
        attention=draw(st.sampled_from(("gated", "normalized", "paper"))),
        attend=attend or draw(st.sampled_from(("causal", "prompt"))),
        num_heads=draw(st.sampled_from((None, 1, 8))),
        anchor_shape=anchor_shape,
        augmenting_shapes=shapes,
    )


@st.composite
def rows(
    draw: st.DrawFn, min_rows: int = 1, max_rows: int = 3, min_length: int = 1, max_length: int = 14
) -> list[Tensor]:
    """Rows of random tokens, of different lengths."""
    lengths = draw(st.lists(st.integers(min_length, max_length), min_size=min_rows, max_size=max_rows))
    seed = draw(st.integers(0, 1000))
    return [factories.tokens(1, length, seed + i)[0] for i, length in enumerate(lengths)]
