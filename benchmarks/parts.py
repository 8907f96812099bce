"""A training step of a composition, and the parts that it is made of, each run on its own with the same modules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from calm import CalmForCausalLM
from calm.backbones import layers_of
from calm.loss import loss_without_logits, without_head
from calm.tracing import Trace


def randomize_outputs(model: CalmForCausalLM) -> CalmForCausalLM:
    """Give the connections output matrices and gates as after training, so that nothing is multiplied by zeros."""
    for connection in model.connections:
        nn.init.normal_(connection.w_o.weight, std=1e-3)
        nn.init.constant_(connection.gate.bias, 1e-3)
        nn.init.normal_(connection.gate.weight, std=1e-3)
    return model


def adamw(weights: Any) -> torch.optim.AdamW:
    """The optimizer of `calm.training` (the transformers Trainer's default), with steps that change next to nothing."""
    return torch.optim.AdamW(weights, lr=1e-6, fused=True)


@contextmanager
def gradients_start_at(layer: nn.Module) -> Iterator[None]:
    """Within this context back-propagation ends at a layer's output."""
    handle = layer.register_forward_hook(lambda layer, args, output: output.detach().requires_grad_())
    try:
        yield
    finally:
        handle.remove()


def connection_inputs(model: CalmForCausalLM, **batch: Any) -> list[tuple[nn.Module, Tensor, tuple[Any, ...]]]:
    """What each connection gets in a pass: itself, the anchor's hidden state, and its other arguments.

    A hidden state asks for gradients as in the composed model: not at the first connection.
    """
    inputs = []

    def keep(connection: nn.Module, args: tuple[Any, ...]) -> None:
        hidden, *others = args
        inputs.append((connection, hidden.detach().requires_grad_(hidden.requires_grad), tuple(others)))

    handles = [connection.register_forward_pre_hook(keep) for connection in model.connections]
    model.train()(**batch, use_cache=False)
    for handle in handles:
        handle.remove()
    return inputs


class Step:
    """A training step on one batch, as `calm.training` makes it, and its parts.

    Every loss is computed without logits, by the same code on the same labels (`calm.loss`).

    Args:
        model: The composed model.
        input_ids: Int64 `[batch, length]`; all of them are labels too.

    Attributes:
        batch: What the models get: `input_ids` alone, as `calm.training` collates them.
        labels: What the loss is of.
    """

    def __init__(self, model: CalmForCausalLM, input_ids: Tensor):
        self.model, self.labels = model, input_ids
        self.batch = {"input_ids": input_ids}
        self.optimizer = adamw(model.connections.parameters())
        first = min(pair.anchor_layer for pair in model.config.layer_pairs)
        self._first_connected = layers_of(model.anchor)[first]

    @cached_property
    def _outputs(self) -> dict[str, Tensor]:
        return self.model.augmenting_outputs(**self.batch)

    @cached_property
    def _connection_inputs(self) -> list[tuple[nn.Module, Tensor, tuple[Any, ...]]]:
        return connection_inputs(self.model, **self.batch)

    def composed(self) -> None:
        """The whole step, the optimizer's included."""
        self._step()

    def kept(self) -> None:
        """The whole step, with the augmenting models' outputs kept from before."""
        self._step(augmenting_outputs=self._outputs)

    def _step(self, **kwargs: Any) -> None:
        self.optimizer.zero_grad()
        self.model.train()(
            **self.batch, labels=self.labels, skip_logits=True, use_cache=False, **kwargs
        ).loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def augmenting(self) -> None:
        """The augmenting models, forward to their last connected layers."""
        for model in self.model.augmenting.values():
            model(**self.batch, use_cache=False)

    def anchor(self) -> None:
        """The anchor: forward, and back to the output of its first connected layer. It has no weights to train."""
        with gradients_start_at(self._first_connected):
            loss_of(self.model.anchor.train(), self.model.anchor, self.batch, self.labels).backward()

    def connections(self) -> None:
        """The connections: forward and back, with what they got in a composed pass."""
        self.optimizer.zero_grad()
        for connection, hidden, others in self._connection_inputs:
            hidden.grad = None
            connection(hidden, *others).backward(hidden.detach())  # any gradient of that shape will do

    def connection_flops(self) -> int:
        """FLOPs of `connections`, counted as `calm.planning` counts."""
        with Trace() as trace:
            self.connections()
        return trace.flops


def loss_of(model: Callable[..., Any], anchor: Any, batch: dict[str, Tensor], labels: Tensor) -> Tensor:
    """The loss of a model without its logits; `anchor` is what the model is, or is wrapped around."""
    with without_head(anchor) as decoded:
        model(**batch, use_cache=False)
    return loss_without_logits(anchor, decoded, labels)
