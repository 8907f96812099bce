"""Connection: project an augmenting model's layer output, attend to it from the anchor's, add. All that is trained."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_layers import GradientCheckpointingLayer

from calm.alignment import Alignment
from calm.errors import CalmError

NORM_EPS = 1e-6

GATE_SCALE = 1 / 8
"""What a gate's bias is multiplied by, times the anchor's width. The learning rates that matrices bear fall with their
width (arXiv 2203.03466), and at these rates one number has to get from 0 to about 1 in tens of steps."""


def alibi_slopes(num_heads: int, device: torch.device | None = None) -> Tensor:
    """Fixed ALiBi slopes, one a head: a geometric sequence that falls from 2 over about eight octaves.

    Press et al. (arXiv 2108.12409) start at 2^(-8/heads); starting higher gives some heads a sharp recency prior from
    the first step, which is what speeds learning up (docs/dev/LOG.md, "attention").

    Args:
        num_heads: Number of heads.
        device: Where the result is made.

    Returns:
        Float32 `[num_heads]`.
    """
    return torch.exp2(1 - 8 * torch.arange(num_heads, device=device) / max(num_heads, 8))


def root_mean_square(states: Tensor) -> Tensor:
    """How large a model's states are, for a connection to speak as loudly.

    Args:
        states: `[..., width]`.

    Returns:
        Float32 `[..., 1]`; its gradient at states that are all zero is zero.
    """
    # summed in float32, without a copy of the states in it
    norm = torch.linalg.vector_norm(states, dim=-1, keepdim=True, dtype=torch.float32)
    return norm / math.sqrt(states.shape[-1])


class Gate(nn.Module):
    """How far a connection is open at each of the anchor's positions: `g + w . norm(H_B)`, all zero at first.

    At 0 nothing is added, at 1 a normalised state at the size of the anchor's own. One number alone would be open or
    closed for every text alike (docs/dev/LOG.md, "what the gate costs the anchor's English").

    Args:
        width: `D_B`.
    """

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, width))
        self.bias = nn.Parameter(torch.zeros(1))  # FSDP2 takes no scalars

    def forward(self, states: Tensor) -> Tensor:
        """The gate in units of the anchor's root mean square, for what is injected to be multiplied by.

        Args:
            states: `H_B`, `[..., D_B]`.

        Returns:
            `rms(H_B) * (g + w . norm(H_B))`, float32 `[..., 1]`; the norm's divisor cancels out.
        """
        always = self.bias.float() * (states.shape[-1] * GATE_SCALE)
        return F.linear(states.to(self.weight.dtype), self.weight).float() + always * root_mean_square(states)


class Connection(GradientCheckpointingLayer):
    """One connection: `H_B + f_cross(f_proj(H_A), H_B)` (paper, section 3.1).

    A new composition is the anchor, bit for bit. With `attention="gated"` a gate sees to that, which the anchor's state
    opens: linear in that state's direction, and zero at first (in Flamingo, arXiv 2204.14198, it is one number, and has
    a tanh). Behind it `W_V` and `W_O`, and `f_proj` where both models have one width, start as identities: what the
    gate lets through first is the augmenting model's own state, in units of the root mean square of the anchor's
    (docs/dev/LOG.md, "identity behind a gate"). Queries and context are RMS-normalised (without weights of their own:
    the projections that follow absorb them), and the scores carry ALiBi slopes. `"normalized"` has neither gate nor
    units; its `W_O` starts at zero, the other matrices at random. `"paper"` is that without norms and slopes. Names
    follow the paper's: `f_proj`, `W_Q`, `W_K`, `W_V`, `W_O`.

    Args:
        augmenting_width: `D_A`, width of the augmenting layer's output.
        anchor_width: `D_B`, width of the anchor layer's output.
        num_heads: `N_H`; must divide `anchor_width`.
        attention: `"gated"`, `"normalized"` or `"paper"`.

    Raises:
        CalmError: If `num_heads` does not divide `anchor_width`.
    """

    def __init__(self, augmenting_width: int, anchor_width: int, num_heads: int, attention: str = "gated"):
        super().__init__()
        if anchor_width % num_heads:
            raise CalmError(f"num_heads={num_heads} does not divide the anchor's width {anchor_width}.")
        self.num_heads = num_heads
        self.normalize = attention != "paper"
        self.f_proj = nn.Linear(augmenting_width, anchor_width, bias=False)
        self.w_q = nn.Linear(anchor_width, anchor_width, bias=False)
        self.w_k = nn.Linear(anchor_width, anchor_width, bias=False)
        self.w_v = nn.Linear(anchor_width, anchor_width, bias=False)
        self.w_o = nn.Linear(anchor_width, anchor_width, bias=False)
        self.gate = Gate(anchor_width) if attention == "gated" else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with nothing to add: a gate at zero, identities behind it; or without a gate `W_O` at zero.

        Matrices that start at random keep the variance of their input.
        """
        for linear in (self.f_proj, self.w_q, self.w_k, self.w_v):
            nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))
        if self.gate is None:
            nn.init.zeros_(self.w_o.weight)
            return
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)
        for linear in (self.w_v, self.w_o):
            nn.init.eye_(linear.weight)
        if self.f_proj.in_features == self.f_proj.out_features:
            nn.init.eye_(self.f_proj.weight)

    def forward(
        self,
        hidden: Tensor,
        context: Tensor,
        alignment: Alignment,
        cache_layer: CacheLayerMixin | None = None,
    ) -> Tensor:
        """Look up in the augmenting model's layer output what the anchor's layer output asks for: `f_cross`.

        Computes in the dtype of the connection's weights and returns that of `hidden`.

        Args:
            hidden: `H_B`, `[batch, query length, D_B]`.
            context: `H_A` at the new positions, `[batch, query length, D_A]`.
            alignment: Who sees what, for `query length x key length`.
            cache_layer: Holds keys and values of earlier positions; the new ones are appended.

        Returns:
            What is to be added to `hidden`: `[batch, query length, D_B]`, its dtype and device.
        """
        states = hidden.to(self.w_q.weight.dtype)  # once: the norm and the gate keep one copy for the backward pass
        queries, keys, values = self.project(states, context)
        if cache_layer is not None:
            keys, values = cache_layer.update(keys, values)
        attended = _attend(queries, keys, values, alignment)
        injection = self.w_o(attended.transpose(1, 2).flatten(2))
        if self.gate is not None:
            injection = injection * self.gate(states)
        injection = injection.to(hidden.dtype)
        if alignment.sees is not None:
            injection = injection * alignment.sees[:, -injection.shape[1] :]
        return injection

    def attention_weights(self, hidden: Tensor, context: Tensor, alignment: Alignment) -> Tensor:
        """Where the anchor's positions look, for those who want to see it; `forward` never makes these weights.

        Args:
            hidden: As for `forward`.
            context: `H_A` at all positions, `[batch, key length, D_A]`, of which the queries are the last.
            alignment: As for `forward`, of these positions; not of packed rows.

        Returns:
            Float32 `[batch, heads, query length, key length]`; rows of positions that see nothing are all zero.
        """
        queries, keys, _ = self.project(hidden, context)
        queries, keys = queries.float() / math.sqrt(queries.shape[-1]), keys.float()
        pieces = []
        for rows, count, bias in alignment.blocks(queries.shape[2], keys.shape[2], queries.dtype):
            scores = queries[:, :, rows] @ keys[:, :, :count].transpose(-1, -2) + bias
            pieces.append(F.pad(scores.softmax(-1), (0, keys.shape[2] - count)))
        weights = torch.cat(pieces, dim=2)
        if alignment.sees is not None:
            weights = weights * alignment.sees[:, None, -weights.shape[2] :]
        return weights

    def openness(self, hidden: Tensor) -> Tensor:
        """How far the gate is open, for those who want to see it.

        Args:
            hidden: As for `forward`.

        Returns:
            Float32 `[batch, query length, 1]`; 0 where the state is all zero, and all ones without a gate.
        """
        size = root_mean_square(hidden)
        if self.gate is None:
            return torch.ones_like(size)
        return self.gate(hidden) / size.clamp(min=torch.finfo(size.dtype).tiny)

    def project(self, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries from the anchor, keys and values from the augmenting model.

        Returns:
            Three tensors `[batch, heads, length, D_B / heads]`.
        """
        dtype = self.w_q.weight.dtype
        hidden, context = hidden.to(dtype), context.to(dtype)
        if self.normalize:
            hidden = F.rms_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)
            context = F.rms_norm(context, context.shape[-1:], eps=NORM_EPS)
        context = self.f_proj(context)
        queries, keys, values = self.w_q(hidden), self.w_k(context), self.w_v(context)
        return self._split_heads(queries), self._split_heads(keys), self._split_heads(values)

    def _split_heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)


def _attend(queries: Tensor, keys: Tensor, values: Tensor, alignment: Alignment) -> Tensor:
    """Attention as the alignment says, document by document and in blocks.

    Args:
        queries: `[batch, heads, query length, D_B / heads]`.
        keys: `[batch, heads, key length, D_B / heads]`.
        values: As `keys`.
        alignment: Who sees what.

    Returns:
        As `queries`.
    """
    if alignment.documents is None:
        return _attend_in_blocks(queries, keys, values, alignment)
    # rows one after another: to split them once costs less in the backward pass than to cut each document out
    split = [states.transpose(1, 2).flatten(0, 1).split(alignment.documents) for states in (queries, keys, values)]
    attended = []
    for document in zip(*split, strict=True):
        q, k, v = (states.transpose(0, 1).unsqueeze(0) for states in document)
        attended.append(_attend_in_blocks(q, k, v, alignment).squeeze(0).transpose(0, 1))
    joined = torch.cat(attended)
    return joined.unflatten(0, (len(queries), -1)).transpose(1, 2)


def _attend_in_blocks(queries: Tensor, keys: Tensor, values: Tensor, alignment: Alignment) -> Tensor:
    pieces = [
        F.scaled_dot_product_attention(queries[:, :, rows], keys[:, :, :count], values[:, :, :count], attn_mask=bias)
        for rows, count, bias in alignment.blocks(queries.shape[2], keys.shape[2], queries.dtype)
    ]
    return torch.cat(pieces, dim=2) if len(pieces) > 1 else pieces[0]
