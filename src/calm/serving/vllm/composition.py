"""A composition's models in vLLM: runs the augmenting models, hooks the connections into the anchor."""

from functools import partial
from typing import Any, cast

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import maybe_prefix

from calm import backbones
from calm.config import CalmConfig, width_of
from calm.serving.vllm import bases
from calm.serving.vllm.connection import Connection


@support_torch_compile
class Composition(nn.Module):
    """What `calm.CalmForCausalLM` computes up to the anchor's last hidden state, over paged caches.

    Position t of the anchor sees the augmenting positions up to t, so that a connection is one more causal attention,
    whose keys and values come from another model: batching, paging, chunked prefill, prefix caching and tensor
    parallelism are vLLM's own. All of it is one graph for torch.compile.

    Args:
        vllm_config: vLLM's configuration, of a composition.
        prefix: Of the names of layers.

    Raises:
        CalmError: If vLLM's attention backend does not serve compositions.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: CalmConfig = vllm_config.model_config.hf_config
        self.config = config
        self.names = list(config.augmenting_configs)
        self._known_tokens = backbones.known_tokens(config.anchor_config, config.augmenting_configs)
        self.anchor: Any = bases.build_anchor(config.anchor_config, vllm_config, maybe_prefix(prefix, "anchor"))
        self.augmenting = nn.ModuleList()  # by number: vLLM wants one in a layer's name and no second one
        for index, (name, base) in enumerate(config.augmenting_configs.items()):
            own = maybe_prefix(prefix, f"augmenting{index}")
            self.augmenting.append(bases.build_augmenting(base, config.augmenting_depth(name), vllm_config, own))
        self.connections = nn.ModuleList(
            Connection(
                width_of(config.augmenting_configs[pair.augmenting]),
                width_of(config.anchor_config),
                cast(int, config.num_heads),
                config.attention,
                bases.cache_config(vllm_config, None),
                maybe_prefix(prefix, f"connections.{index}"),
            )
            for index, pair in enumerate(config.layer_pairs)
        )
        # both hold something during a forward pass only
        self._captured: dict[tuple[str, int], torch.Tensor] = {}
        self._on: dict[str, torch.Tensor] = {}
        self._hook()

    def _hook(self) -> None:
        pairs = self.config.layer_pairs
        layers = bases.layers_of(self.anchor, self.config.anchor_config)
        for index in sorted({pair.anchor_layer for pair in pairs}):
            here = [i for i, pair in enumerate(pairs) if pair.anchor_layer == index]
            layers[index].register_forward_hook(partial(self._inject, here))
        for name, model in zip(self.names, self.augmenting, strict=True):
            layers = bases.layers_of(model, model.config)
            for index in sorted({pair.augmenting_layer for pair in pairs if pair.augmenting == name}):
                layers[index].register_forward_hook(partial(self._capture, (name, index)))

    def _capture(self, key: tuple[str, int], layer: nn.Module, args: Any, output: Any) -> None:
        self._captured[key] = bases.residual_of(output)

    def _inject(self, indices: list[int], layer: nn.Module, args: Any, output: Any) -> Any:
        hidden = bases.residual_of(output)
        injection = torch.zeros_like(hidden)
        for i in indices:
            pair = self.config.layer_pairs[i]
            context = self._captured[pair.augmenting, pair.augmenting_layer]
            # chosen, not multiplied: what is off adds exactly nothing, whatever it was
            added = torch.where(self._on[pair.augmenting], self.connections[i](hidden, context), 0.0)
            injection = injection + added
        return bases.add_to_residual(output, injection)

    def forward(self, input_ids: torch.Tensor | None, positions: torch.Tensor, on: torch.Tensor) -> torch.Tensor:
        """Run the augmenting models, then the anchor with the connections.

        Args:
            input_ids: Int64 `[tokens]`, of all requests of a step one after another. Those that an augmenting model
                lacks, which a tokenizer has none of, are others to it: looked up they would end the engine, for all.
            positions: Int64 `[tokens]`.
            on: Bool `[tokens, augmenting models]`, for which tokens each of them is switched on.

        Returns:
            The anchor's last hidden state, `[tokens, D_B]`.
        """
        self._on.update(zip(self.names, on.split(1, dim=-1), strict=True))
        known = input_ids
        if input_ids is not None and self._known_tokens is not None:
            known = input_ids.clamp(max=self._known_tokens - 1)
        for model in self.augmenting:
            model(known, positions, None, None)
        hidden = self.anchor(input_ids, positions, None, None)
        self._captured.clear()
        self._on.clear()
        return hidden
