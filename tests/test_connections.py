"""connections.py: the paper's uniform gap, explicit pairs, and every choice that is refused."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from calm.connections import LayerPair, choose_pairs, uniform_pairs
from calm.errors import CalmError


@given(st.integers(1, 80), st.integers(1, 80), st.data())
def test_uniform_gap(augmenting_depth: int, anchor_depth: int, data: st.DataObject) -> None:
    """Each layer at most once, in order, gaps that differ by at most one, and always the last layers."""
    count = data.draw(st.integers(1, min(augmenting_depth, anchor_depth)))
    pairs = uniform_pairs(count, augmenting_depth, anchor_depth)
    assert len(pairs) == count
    assert pairs[-1] == (augmenting_depth - 1, anchor_depth - 1)
    for layers, depth in zip(zip(*pairs, strict=True), (augmenting_depth, anchor_depth), strict=True):
        ends = [-1, *layers]
        gaps = [b - a for a, b in itertools.pairwise(ends)]
        assert all(gap in (depth // count, -(-depth // count)) for gap in gaps)


def test_uniform_gap_as_in_the_paper() -> None:
    """N_A/n and N_B/n are the gaps: with 12 and 24 layers and four connections every 3rd and every 6th."""
    assert uniform_pairs(4, 12, 24) == [(2, 5), (5, 11), (8, 17), (11, 23)]
    assert uniform_pairs(1, 12, 24) == [(11, 23)]


def test_a_number_holds_for_each_augmenting_model() -> None:
    pairs = choose_pairs(2, {"a": 4, "b": 6}, 8)
    assert pairs == [LayerPair("a", 1, 3), LayerPair("a", 3, 7), LayerPair("b", 2, 3), LayerPair("b", 5, 7)]


def test_pairs_by_name_and_in_order() -> None:
    """Sorted by anchor layer within each model; a generator of pairs is as good as a list."""
    pairs = choose_pairs({"b": 1, "a": ((i, 3 - i) for i in (0, 2))}, {"a": 4, "b": 2}, 4)
    assert pairs == [LayerPair("a", 2, 1), LayerPair("a", 0, 3), LayerPair("b", 1, 3)]
    assert choose_pairs([(3, 1), (1, 1), (3, 0)], {"a": 4}, 4) == [
        LayerPair("a", 3, 0),
        LayerPair("a", 1, 1),
        LayerPair("a", 3, 1),
    ]


@pytest.mark.parametrize(
    ("connections", "words"),
    [
        (0, ["connections=0", "1 to 4"]),
        (5, ["connections=5", "1 to 4", "4 layers", "6", "'a'"]),
        (-1, ["connections=-1"]),
        (True, ["connections=True"]),
        (2.5, ["connections=2.5", "a number"]),
        ("all", ["connections='all'"]),
        (None, ["connections=None"]),
        ([], ["none given", "'a'"]),
        ([(4, 0)], ["(4, 0)", "layer 4", "augmenting model 'a'", "0 to 3"]),
        ([(0, 6)], ["(0, 6)", "layer 6", "anchor", "6 layers", "0 to 5"]),
        ([(0, -1)], ["(0, -1)", "layer -1", "0 to 5"]),
        ([(0, 1.0)], ["1.0", "whole number"]),
        ([(True, 1)], ["True", "whole number"]),
        ([(0, 1), (2, 3), (0, 1)], ["(0, 1)", "twice"]),
        ([(0, 1, 2)], ["(0, 1, 2)", "a pair"]),
        ([3], ["connection 3", "a pair"]),
        ({"b": 2}, ["['b']", "['a']"]),
        ({"a": 2, "b": 1}, ["['a', 'b']", "['a']"]),
    ],
)
def test_refused(connections: object, words: list[str]) -> None:
    with pytest.raises(CalmError) as error:
        choose_pairs(connections, {"a": 4}, 6)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_pairs_without_names_are_refused_for_several_models() -> None:
    with pytest.raises(CalmError, match="by name"):
        choose_pairs([(0, 0)], {"a": 4, "b": 4}, 6)
    with pytest.raises(CalmError, match="'b'"):
        choose_pairs({"a": 1, "b": []}, {"a": 4, "b": 4}, 6)
