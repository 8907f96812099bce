"""Choosing which layers to connect: a uniform gap as in the paper, or explicit pairs. Pure Python."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from calm.errors import CalmError


@dataclass(frozen=True, order=True)
class LayerPair:
    """One connection: the output of a layer of an augmenting model is added to the output of a layer of the anchor.

    Attributes:
        augmenting: Name of the augmenting model.
        augmenting_layer: 0-based index of the augmenting layer whose output is read.
        anchor_layer: 0-based index of the anchor layer whose output is added to.
    """

    augmenting: str
    augmenting_layer: int
    anchor_layer: int

    def to_dict(self) -> dict[str, str | int]:
        """The pair as it stands in `config.json`."""
        return asdict(self)


def uniform_pairs(
    count: int, augmenting_depth: int, anchor_depth: int, name: str = "augmenting"
) -> list[tuple[int, int]]:
    """Choose `count` layers of each model at a uniform gap and pair them in order (paper, section 3.1).

    With `N` layers the i-th chosen one (i = 1..count) is the `floor(i * N / count)`-th, so the last layers of both
    models are always paired.

    Args:
        count: How many connections.
        augmenting_depth: Number of layers of the augmenting model.
        anchor_depth: Number of layers of the anchor.
        name: The augmenting model's, for the error.

    Returns:
        `(augmenting layer, anchor layer)` pairs, 0-based, ascending.

    Raises:
        CalmError: If `count` is not between 1 and the smaller depth.
    """
    most = min(augmenting_depth, anchor_depth)
    if not 1 <= count <= most:
        raise CalmError(
            f"connections={count}: expected a number from 1 to {most}, because the augmenting model {name!r} "
            f"has {augmenting_depth} layers and the anchor {anchor_depth} and each layer is chosen at most once. "
            "Pass explicit (augmenting layer, anchor layer) pairs to use a layer more than once."
        )
    return [(i * augmenting_depth // count - 1, i * anchor_depth // count - 1) for i in range(1, count + 1)]


def choose_pairs(
    connections: int | Iterable[tuple[int, int]] | Mapping[str, int | Iterable[tuple[int, int]]],
    augmenting_depths: Mapping[str, int],
    anchor_depth: int,
) -> list[LayerPair]:
    """Turn what a user passes as `connections` into checked layer pairs.

    Args:
        connections: A number (uniform, for every augmenting model), `(augmenting layer, anchor layer)` pairs (only
            with one augmenting model), or either of them by the augmenting model's name.
        augmenting_depths: Number of layers of each augmenting model, by name.
        anchor_depth: Number of layers of the anchor.

    Returns:
        The pairs, augmenting models in the order of `augmenting_depths`, each one's sorted by anchor layer.

    Raises:
        CalmError: On an unknown name, a layer outside a model, a duplicate, or no pair at all.
    """
    if isinstance(connections, Mapping):
        unknown = sorted(set(connections) - set(augmenting_depths))
        missing = sorted(set(augmenting_depths) - set(connections))
        if unknown or missing:
            raise CalmError(
                f"connections names {sorted(connections)}, but the augmenting models are "
                f"{sorted(augmenting_depths)}: give each of them its connections by that name."
            )
        by_name = dict(connections)
    elif isinstance(connections, int):
        by_name = dict.fromkeys(augmenting_depths, connections)
    elif len(augmenting_depths) == 1:
        by_name = {next(iter(augmenting_depths)): connections}
    else:
        raise CalmError(
            f"connections={connections!r}: with several augmenting models ({sorted(augmenting_depths)}) pass a "
            "number, or the pairs by name: {name: [(augmenting layer, anchor layer), ...]}."
        )

    pairs: list[LayerPair] = []
    for name, depth in augmenting_depths.items():
        wanted = by_name[name]
        if isinstance(wanted, bool) or not isinstance(wanted, int | Iterable) or isinstance(wanted, str):
            raise CalmError(f"connections={wanted!r}: expected a number or (augmenting layer, anchor layer) pairs.")
        layers = uniform_pairs(wanted, depth, anchor_depth, name) if isinstance(wanted, int) else list(wanted)
        for pair in layers:
            try:
                augmenting_layer, anchor_layer = pair
            except (TypeError, ValueError):
                raise CalmError(
                    f"connection {pair!r}: expected a pair (augmenting layer, anchor layer), for example (7, 11)."
                ) from None
            pairs.append(LayerPair(name, augmenting_layer, anchor_layer))
    check_pairs(pairs, augmenting_depths, anchor_depth)
    order = list(augmenting_depths)
    return sorted(pairs, key=lambda pair: (order.index(pair.augmenting), pair.anchor_layer, pair.augmenting_layer))


def check_pairs(pairs: list[LayerPair], augmenting_depths: Mapping[str, int], anchor_depth: int) -> None:
    """Refuse pairs that name a layer that does not exist, twice the same pair, or nothing at all.

    Raises:
        CalmError: With the pair, the valid range and what to do.
    """
    for pair in pairs:
        for role, layer, depth in (
            (
                f"augmenting model {pair.augmenting!r}",
                pair.augmenting_layer,
                augmenting_depths[pair.augmenting],
            ),
            ("anchor", pair.anchor_layer, anchor_depth),
        ):
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < depth:
                raise CalmError(
                    f"connection ({pair.augmenting_layer!r}, {pair.anchor_layer!r}): layer {layer!r} is outside the "
                    f"{role}, which has {depth} layers: expected a whole number from 0 to {depth - 1}."
                )
    if len(set(pairs)) < len(pairs):
        twice = next(pair for pair in pairs if pairs.count(pair) > 1)
        raise CalmError(
            f"connection ({twice.augmenting_layer}, {twice.anchor_layer}) of augmenting model {twice.augmenting!r} "
            "is given twice: give each pair once."
        )
    unused = sorted(set(augmenting_depths) - {pair.augmenting for pair in pairs})
    if unused or not pairs:
        raise CalmError(
            f"connections: none given for augmenting model {unused}: every augmenting model needs at least one "
            "(augmenting layer, anchor layer) pair."
        )
