"""CalmCache: one transformers `Cache` over the anchor, the augmenting models and the connections."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedConfig, StaticCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer

from calm.errors import CalmError


class CalmCache(Cache):
    """Keys and values (or states) of every part of a composed model.

    Reordering, cropping, repeating, selecting and resetting act on all parts together, because `layers` is the
    concatenation of the parts' own layers. Lengths are those of the connections, one entry per token whatever the
    bases keep (a sliding-window or recurrent base forgets).

    Args:
        anchor: The anchor's cache.
        augmenting: Each augmenting model's cache, by name.
        cross: The connections' keys and values, one layer a connection.
    """

    def __init__(self, anchor: Cache, augmenting: Mapping[str, Cache], cross: Cache):
        self.anchor = anchor
        self.augmenting = dict(augmenting)
        self.cross = cross
        self.prompt_length: int | Tensor | None = None  # of attend mode "prompt", remembered between calls
        self.is_being_written = False  # during a pass, and after one that ended in the middle
        super().__init__(layers=[])

    @classmethod
    def build(
        cls,
        anchor: PreTrainedConfig,
        augmenting: Mapping[str, PreTrainedConfig],
        num_connections: int,
        max_length: int | None = None,
        offloading: bool = False,
    ) -> CalmCache:
        """Make an empty cache.

        Args:
            anchor: The anchor's configuration.
            augmenting: The truncated augmenting models' configurations.
            num_connections: Number of connections.
            max_length: Length in tokens of a static cache, or `None` for a dynamic one.
            offloading: Keep the bases' layers on the CPU while they are not in use.

        Returns:
            The cache.
        """

        def base(config: PreTrainedConfig) -> Cache:
            if max_length is None:
                return DynamicCache(config=config, offloading=offloading)
            return StaticCache(config=config, max_cache_len=max_length, offloading=offloading)

        cross_layers: list[CacheLayerMixin] = [
            DynamicLayer() if max_length is None else StaticLayer(max_length) for _ in range(num_connections)
        ]
        return cls(base(anchor), {name: base(c) for name, c in augmenting.items()}, Cache(layers=cross_layers))

    @property
    def layers(self) -> list[CacheLayerMixin]:
        """The layers of all parts; read anew each time, since a dynamic cache may add its layers late."""
        caches = (self.anchor, *self.augmenting.values(), self.cross)
        return [layer for cache in caches for layer in cache.layers]

    @layers.setter
    def layers(self, value: list[CacheLayerMixin]) -> None:
        if value:  # the parts own their layers; Cache.__init__ sets an empty list
            raise CalmError("The layers of a CalmCache are those of its parts and cannot be set.")

    def reset(self) -> None:
        """Empty all parts; the next prompt has a length of its own."""
        super().reset()
        self.prompt_length = None
        self.is_being_written = False

    def is_torn(self) -> bool:
        """Whether a pass that ended in the middle (an error, Ctrl-C) has left tokens in some parts and not in others.

        Of a recurrent layer, which knows no length, that cannot be told: then it counts as one that has.
        """
        if not self.is_being_written:
            return False
        layers = self.layers
        if not all(isinstance(layer, CacheLayerMixin) for layer in layers):
            return True
        self.is_being_written = len({int(layer.get_seq_length()) for layer in layers}) > 1
        return self.is_being_written

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows of all parts, for beam search."""
        super().reorder_cache(beam_idx)
        self._change_rows(lambda lengths: lengths.index_select(0, beam_idx.to(lengths.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of all parts."""
        super().batch_repeat_interleave(repeats)
        self._change_rows(lambda lengths: lengths.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows of all parts."""
        super().batch_select_indices(indices)
        self._change_rows(lambda lengths: lengths[indices])

    def _change_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        if isinstance(self.prompt_length, Tensor) and self.prompt_length.numel() > 1:  # one a row
            self.prompt_length = change(self.prompt_length)

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Remove the last tokens from all parts, as transformers' caches do; without any left the prompt is gone."""
        super().crop(*args, **kwargs)
        if self.get_seq_length() == 0:
            self.prompt_length = None

    def update(self, *args: object, **kwargs: object) -> tuple[Tensor, Tensor]:
        """Refused: only the parts are written to."""
        raise CalmError("A CalmCache is written to through its parts; pass it to a composed model, not to a base.")

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        """Number of tokens seen (a 0-d tensor with a static cache)."""
        return self.cross.get_seq_length(0)

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Number of tokens that fit, -1 where there is no limit."""
        return self.cross.get_max_length(0)

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Key length and offset of the connections' attention for `query_length` new tokens."""
        return self.cross.get_mask_sizes(query_length, 0)
