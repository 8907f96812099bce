"""Switching connections, augmenting models or the whole composition off for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from calm.config import CalmConfig
from calm.errors import CalmError

if TYPE_CHECKING:
    from typing_extensions import Self


class CompositionSwitches:
    """What of a `CalmForCausalLM` is on; all of it, to begin with."""

    config: CalmConfig
    connections: nn.ModuleList
    _disabled = False
    _switched_off: frozenset[int] = frozenset()  # connections, by their index

    @contextmanager
    def composition_disabled(self) -> Iterator[Self]:
        """Within this context the model is its bare anchor, bit for bit, and runs no augmenting model.

        For all threads that run the model, as the other switches: they have to take turns, as those of `calm serve` do.
        """
        before, self._disabled = self._disabled, True
        try:
            yield self
        finally:
            self._disabled = before

    @contextmanager
    def connections_disabled(self, *indices: int) -> Iterator[Self]:
        """Within this context these connections add nothing; the others go on.

        Args:
            indices: Of `connections`, counted from 0.

        Raises:
            CalmError: If there is no such connection.
        """
        if unknown := [index for index in indices if not 0 <= index < len(self.connections)]:
            raise CalmError(f"connections {unknown}: expected numbers from 0 to {len(self.connections) - 1}.")
        before, self._switched_off = self._switched_off, self._switched_off.union(indices)
        try:
            yield self
        finally:
            self._switched_off = before

    @contextmanager
    def augmenting_disabled(self, *names: str) -> Iterator[Self]:
        """Within this context these augmenting models add nothing; the others go on.

        Args:
            names: Of augmenting models; with all of them the model is its bare anchor, bit for bit.

        Raises:
            CalmError: If there is no such augmenting model.
        """
        there = {pair.augmenting for pair in self.config.layer_pairs}
        if unknown := sorted(set(names) - there):
            raise CalmError(f"augmenting models {unknown}: expected some of {sorted(there)}.")
        indices = [index for index, pair in enumerate(self.config.layer_pairs) if pair.augmenting in names]
        with self.composition_disabled() if there == set(names) else self.connections_disabled(*indices):
            yield self

    @property
    def active_connections(self) -> list[int]:
        """Indices of the connections that are switched on here; none within `composition_disabled()`."""
        return [] if self._disabled else [i for i in range(len(self.connections)) if i not in self._switched_off]
