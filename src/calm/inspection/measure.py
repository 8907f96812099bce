"""What each connection of a composed model did while it read and continued one prompt, as plain numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from calm.attention import Connection
from calm.connections import LayerPair
from calm.errors import CalmError
from calm.generation import without_defaults
from calm.model import CalmForCausalLM

MAX_TOKENS = 1024
"""Of prompt and completion: an inspection holds one weight for each head and pair of tokens."""

TOP = 5
"""How many of the likeliest next tokens are kept."""


@dataclass(frozen=True)
class NextTokens:
    """What a model expects to follow each position; tensors are on the CPU.

    Attributes:
        top_ids: Int64 `[positions, TOP]`, the likeliest first.
        top_tokens: Their texts.
        top_probabilities: Float32, like `top_ids`.
        followed: Float32 `[positions]`, the probability of the token that does follow here.
    """

    top_ids: Tensor
    top_tokens: list[list[str]]
    top_probabilities: Tensor
    followed: Tensor


@dataclass(frozen=True)
class Without:
    """The same tokens read again with something switched off, and what that changes.

    Attributes:
        next_tokens: What is expected now.
        kl: Float32 `[positions]`, the Kullback-Leibler divergence of this distribution from the composed model's,
            `sum p log(p / q)` in nats, `p` being the composed model's.
        total_variation: Float32 `[positions]`, the share of the probability that moves to other tokens, 0 to 1.
    """

    next_tokens: NextTokens
    kl: Tensor
    total_variation: Tensor


@dataclass(frozen=True)
class ConnectionUse:
    """What one connection did; tensors are float32 and on the CPU.

    Attributes:
        pair: Which layers it connects.
        injection: `[positions]`, the norm of what it adds relative to that of the anchor's hidden state there.
        attention: `[heads, positions, positions]`, how much anchor position t (row) looks at augmenting position s
            (column). Rows sum to one; what a position does not see has weight 0.
        entropy: `[heads, positions]`, of each of these rows in nats: 0 where it looks at one token alone.
        without: The composed model with this connection alone switched off.
    """

    pair: LayerPair
    injection: Tensor
    attention: Tensor
    entropy: Tensor
    without: Without


@dataclass(frozen=True)
class Inspection:
    """One prompt, read and continued.

    Position t is where the anchor has read `tokens[t]` and expects `tokens[t + 1]`; since the last token is not read
    any more, there is one position less than tokens.

    Attributes:
        prompt: As given.
        completion: The text of what the composed model produced, special tokens included.
        token_ids: Int64 `[positions + 1]`, prompt and completion.
        tokens: The text of each.
        prompt_length: How many of them are the prompt.
        next_tokens: What the composed model expects.
        connections: Each connection that was switched on, in the order of `model.connections`.
        anchor: The bare anchor: all connections switched off.
    """

    prompt: str
    completion: str
    token_ids: Tensor
    tokens: list[str]
    prompt_length: int
    next_tokens: NextTokens
    connections: list[ConnectionUse]
    anchor: Without

    @property
    def produced(self) -> slice:
        """The positions whose next token the composed model has produced."""
        return slice(self.prompt_length - 1, len(self.tokens) - 1)


def inspect_prompt(
    model: CalmForCausalLM, tokenizer: PreTrainedTokenizerBase, prompt: str, max_new_tokens: int = 16
) -> Inspection:
    """Continue a prompt greedily and measure each connection on the way (issue 4, "The report").

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        prompt: Taken as it is, without a chat template.
        max_new_tokens: Most tokens to produce.

    Returns:
        The inspection.

    Raises:
        CalmError: If the prompt is empty, longer with its completion than `MAX_TOKENS` or the model's context, or if
            the composition is switched off.
    """
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"].to(model.device)
    prompt_length = ids.shape[1]
    if not prompt or not prompt_length:
        raise CalmError(f"The prompt {prompt!r} has no tokens; there is nothing to look at.")
    if max_new_tokens < 1 or prompt_length + max_new_tokens > MAX_TOKENS:
        raise CalmError(
            f"max_new_tokens={max_new_tokens} for a prompt of {prompt_length} tokens: expected at least 1, and at most "
            f"{MAX_TOKENS} together, since each head's attention between all of them is kept. Shorten either."
        )
    with without_defaults(model):
        token_ids = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )[0]
    return inspect_tokens(model, tokenizer, prompt, token_ids, prompt_length)


@torch.no_grad()
def inspect_tokens(
    model: CalmForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    token_ids: Tensor,
    prompt_length: int,
) -> Inspection:
    """Measure each connection on a prompt and what has been produced, however it was sampled.

    All is measured on the whole sequence at once, which gives the numbers that generation had (invariant 4), under the
    same switches.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        prompt: The text that the first tokens are, with or without a chat template around it.
        token_ids: Int64 `[positions + 1]`, prompt and completion.
        prompt_length: How many of them are the prompt.

    Returns:
        The inspection, of the connections that are switched on.

    Raises:
        CalmError: If there are more than `MAX_TOKENS`, or if the composition is switched off.
    """
    if len(token_ids) > MAX_TOKENS:
        raise CalmError(
            f"{len(token_ids)} tokens: expected at most {MAX_TOKENS}, since each head's attention between all of them "
            "is kept. Shorten the prompt or the completion."
        )
    if not (active := model.active_connections):
        raise CalmError("The composition is switched off: no connection does anything that could be measured.")
    read, follow = token_ids[None, :-1], token_ids[1:]
    kept = model.augmenting_outputs(read)  # the same whatever is switched off

    def log_probabilities() -> Tensor:
        logits = model(read, use_cache=False, prompt_length=prompt_length, augmenting_outputs=kept).logits
        return logits[0].float().log_softmax(-1)

    def next_tokens(logs: Tensor) -> NextTokens:
        top = logs.topk(min(TOP, logs.shape[-1]))
        return NextTokens(
            top.indices.cpu(),
            [_texts(tokenizer, row) for row in top.indices.tolist()],
            top.values.exp().cpu(),
            logs.gather(-1, follow.to(logs.device).unsqueeze(-1)).squeeze(-1).exp().cpu(),
        )

    with _watched(model.connections) as watches:
        composed = log_probabilities()

    def without() -> Without:
        logs = log_probabilities()
        p, q = composed.exp(), logs.exp()
        terms = torch.where(p > 0, p * (composed - logs), 0.0)  # some models give tokens no probability at all
        return Without(
            next_tokens(logs), terms.sum(-1).clamp(min=0).cpu(), ((p - q).abs().sum(-1) / 2).clamp(max=1).cpu()
        )

    connections = []
    for index in active:
        pair, watch = model.config.layer_pairs[index], watches[index]
        with model.connections_disabled(index):
            connections.append(ConnectionUse(pair, watch.injection, watch.attention, watch.entropy, without()))
    with model.composition_disabled():
        anchor = without()
    return Inspection(
        prompt,
        tokenizer.decode(token_ids[prompt_length:]),
        token_ids.cpu(),
        _texts(tokenizer, token_ids.tolist()),
        prompt_length,
        next_tokens(composed),
        connections,
        anchor,
    )


class _Watch:
    """A forward hook that measures one connection."""

    injection: Tensor
    attention: Tensor
    entropy: Tensor

    def __call__(self, connection: Connection, args: tuple[Any, ...], output: Tensor) -> None:
        hidden, context, alignment = args[:3]
        self.injection = (output[0].float().norm(dim=-1) / hidden[0].float().norm(dim=-1)).cpu()
        self.attention = connection.attention_weights(hidden, context, alignment)[0].cpu()
        self.entropy = torch.special.entr(self.attention).sum(-1)


@contextmanager
def _watched(connections: nn.ModuleList) -> Iterator[list[_Watch]]:
    watches = [_Watch() for _ in connections]
    hooks = [connection.register_forward_hook(watch) for connection, watch in zip(connections, watches, strict=True)]
    try:
        yield watches
    finally:
        for hook in hooks:
            hook.remove()


def _texts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[str]:
    """Each token's text; its name in the vocabulary where it is only a part of a character.

    Embeddings may have more rows than the tokenizer has tokens; such a one is shown as its number.
    """
    names = [name or f"<{token}>" for name, token in zip(tokenizer.convert_ids_to_tokens(ids), ids, strict=True)]
    texts = [tokenizer.decode([token]) for token in ids]
    return [name if not text or "\ufffd" in text else text for name, text in zip(names, texts, strict=True)]
