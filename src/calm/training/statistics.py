"""Whether a connection is used: how much it adds, how sharply it looks, how strongly it is still pulled."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import register_fsdp_forward_method
from transformers import TrainerCallback

from calm.alignment import BLOCK
from calm.attention import Connection
from calm.data import IGNORED
from calm.sharding import is_zero3, whole

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from calm.model import CalmForCausalLM

STATISTICS = {
    "gate": "how far the gate is open",
    "injection": "norm of what is added / norm of the residual",
    "entropy": "entropy of the attention (nats)",
    "gradient": "norm of the gradient",
}


class ConnectionStatistics(TrainerCallback):
    """Measures every connection in the steps that are logged; a connection that adds nothing is not needed.

    `values` holds those of the current step, if any: `connection_INDEX/gate`, how far its gate is open (mean over
    positions), if it has one; `.../injection`, the norm of what it adds relative to that of the anchor's hidden state
    (means over positions); `.../entropy`, of its attention, in nats (mean over heads and the last 512 positions of the
    batch's first document: log(positions) where it looks everywhere, 0 where it looks at one); `.../gradient`, the norm
    of its gradient after clipping. Positions behind a row's last label do not count: padding, but for
    the end of a chat template.

    Args:
        model: The composed model that is trained.
    """

    def __init__(self, model: CalmForCausalLM) -> None:
        self.model, self.connections = model, model.connections
        self.values: dict[str, float] = {}
        self._real = torch.empty(0)
        self._hooks: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the Trainer when the model is wrapped: where FSDP shards connections, they are gathered to look."""
        for connection in self.connections:
            register_fsdp_forward_method(connection, "attention_weights")
            register_fsdp_forward_method(connection, "openness")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the Trainer before each optimiser step."""
        self.values.clear()  # a step that is logged unforeseen, as Ctrl-C has it, is not to show another one's
        step = state.global_step + 1
        intervals = (state.logging_steps, state.eval_steps, state.save_steps)
        if step == state.max_steps or any(step % interval == 0 for interval in intervals):
            self._hooks.append(self.model.register_forward_pre_hook(self._see_labels, with_kwargs=True))
            for index, connection in enumerate(cast(Iterable[Connection], self.connections)):
                self._hooks.append(connection.register_forward_hook(partial(self._watch, index)))

    def _see_labels(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        real = (kwargs["labels"] != IGNORED).flip(-1).cumsum(-1).flip(-1) > 0
        self._real = real | ~real.any(-1, keepdim=True)  # what fills a last batch up has no labels at all

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the Trainer when the gradients of a step are complete."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for index, connection in enumerate(self.connections):
            norms = [p.grad.float().norm() for p in connection.parameters() if p.grad is not None]
            if is_zero3(next(connection.parameters())):  # which has taken the gradients away already
                continue
            norms = whole(norms)
            self.values[f"connection_{index}/gradient"] = torch.stack(norms).norm().item() if norms else 0.0

    @torch.no_grad()
    def _watch(self, index: int, connection: Connection, args: tuple[Any, ...], output: Tensor) -> None:
        """A forward hook that measures one connection."""
        hidden, context, alignment = args[:3]
        real = self._real.to(hidden.device)
        added, residual = (states.float().norm(dim=-1)[real].mean().item() for states in (output, hidden))
        self.values[f"connection_{index}/injection"] = added / residual
        if connection.gate is not None:
            self.values[f"connection_{index}/gate"] = connection.openness(hidden)[real].mean().item()
        length, first = alignment.of_first_document(int(real[0].nonzero()[-1]) + 1)
        rows = slice(max(length - BLOCK, 0), length)
        weights = connection.attention_weights(hidden[:1, rows], context[:1, :length], first)
        entropy = -torch.special.xlogy(weights, weights).sum(-1).mean(1)[:, real[0, rows]].mean().item()
        self.values[f"connection_{index}/entropy"] = entropy
