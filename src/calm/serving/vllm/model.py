"""CalmForCausalLM in vLLM: a composition with its anchor's head, its switches, and its weights."""

import itertools
from typing import Any, cast

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.forward_context import get_forward_context
from vllm.sequence import IntermediateTensors

from calm import backbones
from calm.config import CalmConfig
from calm.errors import CalmError, CheckpointError
from calm.serving.vllm.composition import Composition
from calm.serving.vllm.switches import Switches
from calm.serving.vllm.weights import SAFETENSORS, BaseWeights, Weights


class CalmForCausalLM(nn.Module):
    """A composition as a vLLM model: `calm.CalmForCausalLM` over paged caches (issue 5, "vLLM plugin").

    Args:
        vllm_config: vLLM's configuration, of a composition.
        prefix: Of the names of layers.

    Raises:
        CalmError: If vLLM's attention backend does not serve compositions, or a base is missing.
    """

    allow_patterns_overrides = SAFETENSORS
    fall_back_to_pt_during_load = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: CalmConfig = vllm_config.model_config.hf_config
        self.config = config
        names = list(config.augmenting_configs)
        self._known_tokens = backbones.known_tokens(config.anchor_config, config.augmenting_configs)
        # before vLLM's models are made, which may change transformers' classes
        self._bases = [BaseWeights.find(config, None, "anchor.")]
        self._bases += [BaseWeights.find(config, name, f"augmenting.{i}.") for i, name in enumerate(names)]
        self.secondary_weights = [base.source for base in self._bases]
        self.model = Composition(vllm_config=vllm_config, prefix=prefix)
        self.switches = Switches(names, vllm_config)
        self._spreads = not vllm_config.use_v2_model_runner  # the second model runner has `model_state` do it
        attention = cast(Any, self.model.connections)[0].attention
        self._any_layer = attention.layer_name
        if self._spreads and attention.attn_backend.get_name() == "FLASHINFER":
            raise CalmError(
                "vLLM's first model runner with the attention backend FLASHINFER does not tell which tokens are whose. "
                "Leave VLLM_USE_V2_MODEL_RUNNER unset, or choose --attention-backend FLASH_ATTN."
            )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the composition.

        Args:
            input_ids: Int64 `[tokens]`, of all requests of a step one after another.
            positions: Int64 `[tokens]`.
            intermediate_tensors: Of pipeline stages, which there are none of.
            inputs_embeds: Embeddings instead of tokens, which a composition cannot take.

        Returns:
            The anchor's last hidden state, `[tokens, D_B]`.
        """
        tokens = len(positions)
        metadata: Any = get_forward_context().attn_metadata
        if self._spreads and metadata:  # there is none where only memory or shapes are tried out
            self.switches.spread(metadata[self._any_layer].query_start_loc, tokens)
        return self.model(input_ids, positions, self.switches.of_tokens(tokens))

    @staticmethod
    def get_model_state_cls() -> type:
        """For vLLM's second model runner."""
        from calm.serving.vllm.model_state import CalmModelState

        return CalmModelState

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The anchor's embeddings, `[tokens, D_B]`."""
        return self.model.anchor.embed_input_ids(input_ids)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """The anchor's logits, `[tokens, vocabulary]`; `None` on ranks that do not gather them.

        Tokens that one of the models lacks, which a tokenizer has none of, get `-inf`.
        """
        logits: torch.Tensor | None = self.model.anchor.compute_logits(hidden_states)
        if logits is not None and self._known_tokens is not None:
            logits[:, self._known_tokens :] = float("-inf")
        return logits

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
                model: Any = self.model.get_submodule(prefix.removesuffix("."))
                loaded |= {f"model.{prefix}{name}" for name in model.load_weights(base.taken(own))}
        return loaded

    def _prefix_of(self, name: str) -> str:
        return next((base.prefix for base in self._bases if name.startswith(base.prefix)), "connections.")

    def _load_connections(self, weights: dict[str, torch.Tensor]) -> set[str]:
        connections: Any = self.model.connections
        shapes = {
            f"connections.{i}.{name}": shape for i, one in enumerate(connections) for name, shape in one.shapes.items()
        }
        problems = [f"{name!r} is missing" for name in sorted(shapes.keys() - weights.keys())]
        problems += [f"{name!r} is unexpected" for name in sorted(weights.keys() - shapes.keys())]
        problems += [
            f"{name!r} has shape {tuple(weights[name].shape)}, expected {tuple(shape)}"
            for name, shape in shapes.items()
            if name in weights and weights[name].shape != shape
        ]
        if problems:
            raise CheckpointError(f"The composition's weights do not fit its configuration: {problems[0]}.")
        for index, connection in enumerate(connections):
            connection.load({name: weights.pop(f"connections.{index}.{name}") for name in connection.shapes})
        return {f"model.connections.{name}" for name, _ in self.model.connections.named_parameters()}
