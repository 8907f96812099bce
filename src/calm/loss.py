"""The anchor's loss without its logits: head and cross-entropy chunk by chunk, with their gradients taken on the way.

Logits of a whole batch over a vocabulary of 256,000 are the largest tensors of a training step, several times over. No
weight of the head is trained, so the gradient with respect to the hidden states is all that has to be kept.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from calm.backbones import decoder_of
from calm.config import text_config
from calm.errors import CalmError

IGNORED = -100
CHUNK = 256
"""Labelled positions of one chunk: enough to keep the head's product busy; 50 MB of logits over 50,000 tokens."""


def can_skip_logits(anchor: PreTrainedModel, asked: Mapping[str, Any] | None = None) -> bool:
    """Whether a loss can be had without logits: it is the usual one, and the head gets no gradients of its own.

    Args:
        anchor: The anchor.
        asked: What its forward is given by name: labels that are shifted already, and a loss of its router, as its
            configuration may ask for one, too, are things that only its own code computes.
    """
    asked = asked or {}
    of_router = asked.get("output_router_logits")
    if of_router is None:
        of_router = getattr(text_config(anchor.config), "output_router_logits", False)
    if of_router or asked.get("shift_labels") is not None:
        return False
    decoder = {id(weight) for weight in decoder_of(anchor).parameters()}
    head = anchor.get_output_embeddings()
    outside = [weight for weight in anchor.parameters() if id(weight) not in decoder]
    if isinstance(head, nn.Module):  # it may share its weights with the embeddings
        outside += head.parameters()
    return anchor.loss_function is ForCausalLMLoss and not any(weight.requires_grad for weight in outside)


@dataclass
class Decoded:
    """What the anchor's decoder put out in a pass within `without_head`."""

    output: Any = None

    @property
    def hidden(self) -> Tensor:
        """The last hidden state, `[batch, length, width]`, as the head gets it."""
        return cast(Tensor, self.output[0])


class _ThisThread(threading.local):
    """What of a decoder is changed for this thread: others may run the same model meanwhile."""

    decoded: Decoded | None = None
    stands_in: Any = None


_this_thread = _ThisThread()
_one_stand_in = threading.RLock()


@contextmanager
def without_head(anchor: PreTrainedModel) -> Iterator[Decoded]:
    """Within this context the anchor's head sees the last position only; what it would see is in `Decoded`.

    For this thread; in others the model runs whole.

    Args:
        anchor: The anchor.
    """
    decoded = Decoded()

    def cut(decoder: nn.Module, args: Any, output: Any) -> Any:
        if _this_thread.decoded is not decoded:
            return None
        decoded.output = output
        # of a view, torch on a CPU multiplies each row by a copy of its own of a frozen head's weights
        return _replaced(output, output[0][:, -1:].contiguous())

    outer, _this_thread.decoded = _this_thread.decoded, decoded
    handle = decoder_of(anchor).register_forward_hook(cut)
    try:
        yield decoded
    finally:
        handle.remove()
        _this_thread.decoded = outer


def loss_without_logits(
    anchor: PreTrainedModel, decoded: Decoded, labels: Tensor, num_items_in_batch: int | Tensor | None = None
) -> Tensor:
    """The cross-entropy that the anchor computes for labels, of the labelled positions alone and in chunks.

    The anchor's own code makes the logits of a chunk (soft-capping, scales, biases), with its decoder stood in for.

    Args:
        anchor: The anchor, for which `can_skip_logits`.
        decoded: From a pass within `without_head`.
        labels: Int64 `[batch, length]`, -100 where no loss is wanted.
        num_items_in_batch: What the sum is divided by; the number of labels by default.

    Returns:
        The loss, a float32 scalar; 0 where a batch of several has no labels, if `num_items_in_batch` counts them.

    Raises:
        CalmError: If there are no labels and `num_items_in_batch` is not given: their mean is not a number.
    """
    labels = labels[:, 1:].to(decoded.hidden.device)
    labelled = labels != IGNORED
    rows, targets = decoded.hidden[:, :-1][labelled], labels[labelled]
    if not len(targets) and num_items_in_batch is None:
        raise CalmError(
            "labels are -100 everywhere (but for first tokens, which nothing precedes): there is no loss to take the "
            "mean of. Leave such a batch out, or pass num_items_in_batch, the number of labels of the whole step."
        )

    def head(rows: Tensor) -> Tensor:
        with _standing_in(decoder_of(anchor), _replaced(decoded.output, rows.unsqueeze(0))):
            tokens = torch.zeros(1, len(rows), dtype=torch.long, device=rows.device)
            return cast(Tensor, anchor(input_ids=tokens, use_cache=False, return_dict=True).logits)[0]

    total = cast(Tensor, _ChunkedCrossEntropy.apply(rows, targets, head))
    count = len(targets) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, Tensor) else count)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of cross-entropies, float32; the gradient of each chunk's rows is computed while its logits are there.

    In place: scores become probabilities, and these the gradient of the loss with respect to the logits.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, targets: Tensor, head: Callable[[Tensor], Tensor]) -> Tensor:
        gradient = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        for start in range(0, len(rows), CHUNK):
            with torch.set_grad_enabled(gradient is not None):
                chunk = rows[start : start + CHUNK].detach().requires_grad_(gradient is not None)
                logits = head(chunk)
            scores = logits.detach().float()
            target = targets[start : start + CHUNK].to(scores.device).unsqueeze(-1)
            scores -= scores.amax(-1, keepdim=True)
            loss = -scores.gather(-1, target)
            sums = scores.exp_().sum(-1, keepdim=True)
            loss += sums.log()
            if gradient is not None:
                scores /= sums
                scores.scatter_add_(-1, target, -torch.ones_like(sums))
                gradient[start : start + CHUNK] = torch.autograd.grad(logits, chunk, scores.to(logits.dtype))[0]
            total += loss.sum().to(total.device)
        ctx.gradient = gradient
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        # in float32: a share of a large batch is too small a number for float16
        gradient = (ctx.gradient.float() * grad_output).to(ctx.gradient.dtype)
        ctx.gradient = None
        return gradient, None, None


@contextmanager
def _standing_in(decoder: nn.Module, output: Any) -> Iterator[None]:
    """Within this context a decoder computes nothing for this thread, and returns `output`; threads take turns."""
    with _one_stand_in:  # another thread's would be put back in the wrong order
        own, real = decoder.__dict__.get("forward"), decoder.forward  # accelerate puts one there
        outer = _this_thread.stands_in
        token = object()  # a function that refers to itself would keep the output until garbage is collected

        def forward(*args: Any, **kwargs: Any) -> Any:
            return output if _this_thread.stands_in is token else real(*args, **kwargs)

        decoder.forward, _this_thread.stands_in = forward, token
        try:
            yield
        finally:
            _this_thread.stands_in = outer
            del decoder.forward
            if own is not None:
                decoder.forward = own


def _replaced(output: Any, hidden: Tensor) -> Any:
    """A decoder's output with another last hidden state."""
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    return type(output)(**{**output, "last_hidden_state": hidden})
