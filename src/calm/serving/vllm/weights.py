"""A base's weights on their way into vLLM: which files, which weights, and whether they are the right ones."""

import copy
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedConfig
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from calm import backbones, fingerprints
from calm.config import CalmConfig
from calm.errors import CheckpointError
from calm.serving.vllm import checks

logger = logging.getLogger(__name__)

SAFETENSORS = ["model*.safetensors"]
"""The only files read: neither pickles nor another format's copy of the weights beside them."""

Weights = Iterable[tuple[str, torch.Tensor]]

_LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.")


@dataclass
class BaseWeights:
    """The weights of one base: found by its reference, cut like the model, checked against its fingerprint.

    Attributes:
        role: What to call the base in an error.
        prefix: Of its weights' names among those of all.
        source: For vLLM's loader.
        depth: Number of layers that are kept.
        recorded: The fingerprint's digests by dtype name.
        compared_in: Of these, the one to compare: float16 if the composition was made in it, since that may have
            rounded otherwise; bfloat16 if it was made in anything else, which then comes to the same.
        names: What the fingerprint is made of, by names as in transformers' model.
        base_prefix: What transformers calls the decoder within a model with a head.
    """

    role: str
    prefix: str
    source: DefaultModelLoader.Source
    depth: int
    recorded: dict[str, str]
    compared_in: Literal["float16", "bfloat16"]
    names: set[str]
    base_prefix: str

    @classmethod
    def find(cls, config: CalmConfig, name: str | None, prefix: str) -> "BaseWeights":
        """Find a base's weights.

        Args:
            config: The composition.
            name: An augmenting model's name, or `None` for the anchor.
            prefix: To tell its weights from those of others by.

        Raises:
            CheckpointError: If the base is not where it was, or not the one composed.
        """
        where, found = checks.locate(config, name)
        model = _on_meta(found, None if name is None else config.augmenting_depth(name))
        reference = config.anchor_reference if name is None else config.augmenting_references[name]
        return cls(
            "the anchor" if name is None else f"the augmenting model {name!r}",
            prefix,
            DefaultModelLoader.Source(
                where.name_or_path,
                where.revision,
                prefix=prefix,
                fall_back_to_pt=False,
                allow_patterns_overrides=SAFETENSORS,
            ),
            model.config.get_text_config().num_hidden_layers,
            reference.get("fingerprint", {}) if get_tensor_model_parallel_rank() == 0 else {},  # once is enough
            "float16" if reference.get("dtype") == "float16" else "bfloat16",
            fingerprints.weight_names(model),
            f"{model.base_model_prefix}.",
        )

    def taken(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Those that the model has, without the prefix; when all are through, their fingerprint is checked.

        A checkpoint whose weights have other names than the model's in transformers (merged experts, say) is not
        checked, and a warning says so.

        Args:
            weights: All of the base, prefixed.

        Raises:
            CheckpointError: If they are not those that the composition was trained against.
        """
        parts = {}
        for prefixed, weight in weights:
            name = prefixed.removeprefix(self.prefix)
            layer = _LAYER.search(name)
            if layer is not None and int(layer[1]) >= self.depth:
                continue
            variants = (name, self.base_prefix + name, name.removeprefix(self.base_prefix))
            known = next((variant for variant in variants if variant in self.names), None)
            if known is not None and self.recorded:
                parts[known] = fingerprints.sums_of(known, weight, fingerprints.FINGERPRINT_DTYPES[self.compared_in])
            yield name, weight
        self._check(parts)

    def _check(self, parts: dict[str, str]) -> None:
        if not self.recorded:
            return
        if parts.keys() != self.names:
            logger.warning("The weights of %s have other names than in transformers: not compared.", self.role)
        elif fingerprints.combine(parts) != self.recorded.get(self.compared_in):
            raise CheckpointError(
                f"The weights of {self.role} in {self.source.model_or_path!r} are not those that this composition was "
                "trained against. Put the right ones there."
            )


def _on_meta(config: PreTrainedConfig, depth: int | None) -> Any:
    """Transformers' model of a base without its weights: whole, or the decoder's first layers."""
    with torch.device("meta"):
        if depth is None:
            return AutoModelForCausalLM.from_config(config)
        config = copy.deepcopy(config)
        backbones.truncate_config(config, depth)
        return backbones.decoder_of(AutoModel.from_config(config))
