"""CalmForCausalLM in vLLM: runs the augmenting models, hooks the connections into the anchor, heads like its anchor."""

import itertools
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from calm.config import CalmConfig, width_of
from calm.errors import CheckpointError
from calm.serving.vllm import bases, checks
from calm.serving.vllm.connection import Connection
from calm.serving.vllm.weights import SAFETENSORS, BaseWeights, Weights


@support_torch_compile
class CalmForCausalLM(nn.Module):
    """A composition as a vLLM model: `calm.CalmForCausalLM` over paged caches (issue 5, "vLLM plugin").

    Position t of the anchor sees the augmenting positions up to t, so that a connection is one more causal attention,
    whose keys and values come from another model: batching, paging, chunked prefill, prefix caching and tensor
    parallelism are vLLM's own.

    Args:
        vllm_config: vLLM's configuration, of a composition.
        prefix: Of the names of layers.

    Raises:
        CalmError: If vLLM's version or attention backend does not serve compositions, or a base is missing.
    """

    allow_patterns_overrides = SAFETENSORS
    fall_back_to_pt_during_load = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        checks.check_version()
        config: CalmConfig = vllm_config.model_config.hf_config
        self.config = config
        self.names = list(config.augmenting_configs)
        # before vLLM's models are made, which may change transformers' classes
        self._bases = [BaseWeights.find(config, None, "anchor.")]
        self._bases += [BaseWeights.find(config, name, f"augmenting.{i}.") for i, name in enumerate(self.names)]
        self.secondary_weights = [base.source for base in self._bases]
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
        self._captured: dict[tuple[str, int], torch.Tensor] = {}  # empty but during a forward pass
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
            injection = injection + self.connections[i](hidden, context)
        return bases.add_to_residual(output, injection)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the augmenting models, then the anchor with the connections.

        Args:
            input_ids: Int64 `[tokens]`, of all requests of a step one after another.
            positions: Int64 `[tokens]`.
            intermediate_tensors: Of pipeline stages, which there are none of.
            inputs_embeds: Embeddings instead of tokens, which a composition cannot take.

        Returns:
            The anchor's last hidden state, `[tokens, D_B]`.
        """
        for model in self.augmenting:
            model(input_ids, positions, None, None)
        hidden = self.anchor(input_ids, positions, None, None)
        self._captured.clear()
        return hidden

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The anchor's embeddings, `[tokens, D_B]`."""
        return self.anchor.embed_input_ids(input_ids)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The anchor's logits, `[tokens, vocabulary]`; `None` on ranks that do not gather them."""
        return self.anchor.compute_logits(hidden_states)

    def load_weights(self, weights: Weights) -> set[str]:
        """Load the connections from the composition's folder and the bases from theirs.

        Args:
            weights: Names and tensors, one source after another: `connections.*`, `anchor.*`, `augmenting.N.*`.

        Returns:
            The names of the parameters that were loaded.

        Raises:
            CheckpointError: If the composition's weights do not fit its configuration.
        """
        loaded: set[str] = set()
        for prefix, own in itertools.groupby(weights, lambda item: self._prefix_of(item[0])):
            if prefix == "connections.":
                loaded |= self._load_connections(dict(own))
            else:
                base = next(base for base in self._bases if base.prefix == prefix)
                model: Any = self.get_submodule(prefix.removesuffix("."))
                loaded |= {prefix + name for name in model.load_weights(base.taken(own))}
        return loaded

    def _prefix_of(self, name: str) -> str:
        return next((base.prefix for base in self._bases if name.startswith(base.prefix)), "connections.")

    def _load_connections(self, weights: dict[str, torch.Tensor]) -> set[str]:
        for index, connection in enumerate(cast(Any, self.connections)):
            names = {n: f"connections.{index}.{n}.weight" for n in ("f_proj", "w_q", "w_k", "w_v", "w_o")}
            if missing := sorted(name for name in names.values() if name not in weights):
                raise CheckpointError(
                    f"The composition's weights do not fit its configuration: {missing[0]!r} is missing."
                )
            connection.load({short: weights.pop(name) for short, name in names.items()})
        if weights:
            raise CheckpointError(
                f"The composition's weights do not fit its configuration: {sorted(weights)[0]!r} is unexpected."
            )
        return {f"connections.{name}" for name, _ in self.connections.named_parameters()}
