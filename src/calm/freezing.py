"""What follows from frozen bases: which parts train, and what cannot be done to a composed model."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any

import transformers
from packaging import version
from torch import nn
from transformers import PreTrainedModel

from calm import backbones
from calm.errors import CalmError

if TYPE_CHECKING:
    from typing_extensions import Self

logger = logging.getLogger(__name__)


class CompositionFreezing(PreTrainedModel):
    """What `CalmForCausalLM` changes of how transformers' models are trained, counted and resized."""

    anchor: PreTrainedModel
    augmenting: nn.ModuleDict
    connections: nn.ModuleList
    _warned = False  # of frozen connections, once
    _warned_of_augmenting = False  # of what trains there, once

    def train(self, mode: bool = True) -> Self:
        """Switch the anchor and the connections; augmenting models stay in evaluation mode.

        A warning says so if the connections are frozen (PEFT freezes whatever its configuration does not name), or if
        weights of an augmenting model, such as an adapter's, are not: these never get a gradient.

        Raises:
            CalmError: For training, if a part of the anchor is offloaded: its weights are not there in backward passes.
        """
        if mode and backbones.device_map_of(self.anchor):
            gone = [name for name, weight in self.anchor.named_parameters() if weight.is_meta]
            if gone:
                raise CalmError(
                    f"The device_map offloads {len(gone)} weights of the anchor ({gone[0]!r}, ...), which can generate "
                    "and not train: gradients flow back through it, and its weights would be gone by then. Load it "
                    "within devices, or quantized; augmenting models may be offloaded."
                )
        if mode and not self.training and not self._warned and self._learns_nothing():
            self._warned = True
            logger.warning(
                "The connections are frozen, as PEFT freezes what its configuration does not name, and will not train. "
                'If they are to, pass modules_to_save=[f"connections.{i}" for i in range(%d)] to it, or put the '
                "adapter on model.anchor alone.",
                len(self.connections),
            )
        if mode and not self.training and not self._warned_of_augmenting:
            thawed = [name for name, weight in self.augmenting.named_parameters() if weight.requires_grad]
            if thawed:
                self._warned_of_augmenting = True
                logger.warning(
                    "%d weights of the augmenting models require gradients (%s, ...) and will not get any: augmenting "
                    "models run without. Train an adapter on such a model alone, before it is composed.",
                    len(thawed),
                    thawed[0],
                )
        super().train(mode)
        self.augmenting.eval()
        return self

    def _learns_nothing(self) -> bool:
        weights = dict(self.connections.named_parameters())
        if not any(weight.requires_grad for weight in weights.values()):
            return True
        gates = [weight for name, weight in weights.items() if ".gate." in name]
        # what an adapter adds to connections stays behind frozen gates that are shut
        return bool(gates) and not any(gate.requires_grad for gate in gates) and not any(gate.any() for gate in gates)

    def _set_gradient_checkpointing(self, enable: bool = True, **kwargs: Any) -> None:
        if enable:
            check_activation_checkpointing()
        function = kwargs.get("gradient_checkpointing_func")
        if enable and isinstance(function, partial) and function.keywords.get("use_reentrant", True):
            raise CalmError(
                "Activation checkpointing with use_reentrant=True would leave connections and adapters without "
                "gradients, since no input of the frozen layers below them has any: pass use_reentrant=False."
            )
        super()._set_gradient_checkpointing(enable=enable, **kwargs)

    def enable_input_require_grads(self) -> None:
        """Nothing to do, since gradients start at the connections, or at an adapter that sits below them.

        Starting them at the embeddings would store and back-propagate everything below the first of these.
        """

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> list[str]:
        """What `DistributedDataParallel` leaves alone: all that is frozen, which every process has loaded itself.

        It would send it to the others first, and cannot where it is quantized by torchao.
        """
        parameters = self.named_parameters(remove_duplicate=False)
        frozen = [name for name, weight in parameters if not weight.requires_grad]
        return frozen + [name for name, _ in self.named_buffers(remove_duplicate=False)]

    def _replicate_for_data_parallel(self) -> Any:
        raise CalmError(
            "nn.DataParallel cannot run a composed model: its replicas' hooks would run the original's connections. "
            "Use one process per GPU (torchrun or accelerate launch), or show this process one GPU only."
        )

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> Any:
        """Refused: the bases are frozen.

        Raises:
            CalmError: Always.
        """
        raise CalmError("The embeddings of a composed model belong to its frozen bases: resize them before composing.")

    def get_input_embeddings(self) -> nn.Module:
        """The anchor's input embeddings."""
        return self.anchor.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        """The anchor's language-model head."""
        return self.anchor.get_output_embeddings()

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters (weights shared between parts count once), as in PEFT."""
        parameters = list(self.parameters())
        return sum(p.numel() for p in parameters if p.requires_grad), sum(p.numel() for p in parameters)

    def print_trainable_parameters(self) -> None:
        """Print the numbers of trainable and of all parameters, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )


def check_activation_checkpointing() -> None:
    """Refuse activation checkpointing with a transformers that gets it wrong.

    Raises:
        CalmError: Naming the version.
    """
    if version.parse(transformers.__version__) < version.parse("5.23"):
        raise CalmError(
            f"Activation checkpointing of a composed model needs transformers 5.23 or later, found "
            f"{transformers.__version__}: earlier ones run the connections' hooks a second time in the backward "
            "pass. Upgrade transformers (which needs Python 3.11), or train without it."
        )
