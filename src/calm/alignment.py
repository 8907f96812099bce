"""Which augmenting positions each anchor position may see, and the attention bias that says so.

One idea serves every case: for each anchor position, *how many* augmenting positions it sees (`visible`). The same
tokenizer gives t + 1; "prompt only" cuts that at the prompt's length; other tokenizers only change how `visible` is
counted. Padding is never seen, and neither is another document of a packed row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

BLOCK = 512
"""Query positions of one piece of a long causal attention."""


def visible_same_tokenizer(
    query_length: int, past_length: int | Tensor, prompt_length: int | Tensor | None, device: torch.device
) -> Tensor:
    """Count the augmenting positions that each anchor position sees when both models read the same tokens.

    Position t sees positions 0..t. With a `prompt_length` (attend mode "prompt", the paper's encoder ablation) it sees
    those of them that belong to the prompt, so that this mode does not leak within the prompt either and gives the
    same numbers whether a prompt is prefilled at once or in chunks.

    Args:
        query_length: Number of new anchor positions.
        past_length: Number of positions before them (an int, or a 0-d tensor from a static cache).
        prompt_length: Leading columns that are prompt, padding included: one number, or `[batch]`, or `None`.
        device: Where the result lives.

    Returns:
        Int64 `[1 or batch, query_length]`.
    """
    visible = torch.arange(1, query_length + 1, device=device) + past_length
    visible = visible.unsqueeze(0)
    if prompt_length is None:
        return visible
    if isinstance(prompt_length, Tensor):
        return torch.minimum(visible, prompt_length.to(device).reshape(-1, 1))
    return visible.clamp(max=prompt_length)


@dataclass
class Alignment:
    """The additive attention bias of one forward pass, shared by every connection.

    Attributes:
        bias: Float32 `[1 or batch, 1 or heads, query length, key length]`: `-inf` where an augmenting position is not
            seen, otherwise the ALiBi penalty (0 without slopes). From `align_causal` it is that of the last positions
            of the longest document, since that of others is the same, shifted.
        sees: Bool `[1 or batch, query length, 1]`, false where an anchor position sees nothing, or `None` when every
            position sees something. Such a position has no `-inf` in its `bias`, which keeps the softmax finite; the
            connection leaves its hidden state as it is.
        documents: Lengths of the documents of packed rows, one row after another, or `None`. Documents do not see one
            another.
    """

    bias: Tensor
    sees: Tensor | None
    documents: list[int] | None = None
    _made: dict[Any, Any] = field(default_factory=dict, repr=False)

    def to(self, device: torch.device) -> Alignment:
        """The same alignment on another device (a base spread over several has its connections spread likewise)."""
        if self.bias.device == device:
            return self
        if device not in self._made:
            sees = None if self.sees is None else self.sees.to(device)
            self._made[device] = Alignment(self.bias.to(device), sees, self.documents)
        moved: Alignment = self._made[device]
        return moved

    def blocks(self, query_length: int, key_length: int, dtype: torch.dtype) -> Iterator[tuple[slice, int, Tensor]]:
        """Cut the attention of a row, or of one document, into pieces, each with the keys that may be seen in it.

        Args:
            query_length: Number of query positions, the last ones of those that have keys.
            key_length: Number of keys.
            dtype: Of the queries.

        Returns:
            Of each piece: its query positions, the number of leading keys, and the bias between them in that dtype.
        """
        bias = self.bias_in(dtype)
        rows, longest = bias.shape[-2:]
        for end in range(query_length % rows or rows, query_length + 1, rows):
            start, keys = max(end - rows, 0), key_length - query_length + end
            yield slice(start, end), keys, bias[:, :, rows - (end - start) :, longest - keys :]

    def last(self, count: int) -> Alignment:
        """That of the last `count` query positions (an anchor may drop the others before its last layers)."""
        if self.bias.shape[2] <= count or self.documents is not None:
            return self
        if count not in self._made:
            sees = None if self.sees is None else self.sees[:, -count:]
            self._made[count] = Alignment(self.bias[:, :, -count:], sees)
        shorter: Alignment = self._made[count]
        return shorter

    def of_first_document(self, length: int) -> tuple[int, Alignment]:
        """That of the batch's first row alone, or of its first document, for its last query positions.

        Args:
            length: Number of keys of a row.

        Returns:
            How many keys the document has, and the alignment of as many of its last positions as its bias has.
        """
        length = length if self.documents is None else self.documents[0]
        rows, longest = self.bias.shape[-2:]
        bias = self.bias[:1, :, max(rows - length, 0) :, longest - length :]
        return length, Alignment(bias, None if self.sees is None else self.sees[:1])

    def bias_in(self, dtype: torch.dtype) -> Tensor:
        """The bias in the dtype of the queries; one copy serves all connections, forward and backward."""
        if self.bias.dtype == dtype:
            return self.bias
        if dtype not in self._made:
            self._made[dtype] = self.bias.to(dtype)
        cast: Tensor = self._made[dtype]
        return cast


def document_lengths(documents: Tensor) -> list[int]:
    """How long the documents of packed rows are.

    Args:
        documents: Int64 `[batch, length]`, a number for each document, as transformers finds them in position ids.

    Returns:
        Their lengths, one row after another; none goes on in the next row.
    """
    rows = torch.arange(len(documents), device=documents.device).unsqueeze(-1)
    counts: list[int] = torch.unique_consecutive(documents + rows * documents.numel(), return_counts=True)[1].tolist()
    return counts


def align_causal(
    length: int, slopes: Tensor | None, device: torch.device, documents: list[int] | None = None
) -> Alignment:
    """The alignment of rows that start here and hold no padding on their left: position t sees positions 0..t.

    Made for a block of positions, not for all: the bias of `length` x `length` is large, and half of it hides keys.

    Args:
        length: Number of positions of a row.
        slopes: Float32 `[heads]`, as for `align`.
        device: Where the result lives.
        documents: For packed rows, the lengths of their documents: t sees the positions of its own up to itself.

    Returns:
        The alignment.
    """
    length = length if documents is None else max(documents)
    rows = length if torch.compiler.is_compiling() else min(length, BLOCK)  # a loop would be compiled for each length
    positions = torch.arange(length, device=device)
    distance = positions[-rows:].unsqueeze(-1) - positions
    bias = torch.zeros(distance.shape, device=device).masked_fill_(distance < 0, float("-inf")).view(1, 1, rows, length)
    if slopes is not None:
        bias = bias - slopes.to(device).view(1, -1, 1, 1) * distance.clamp(min=0)
    return Alignment(bias, None, documents)


def align(
    visible: Tensor,
    key_length: int,
    padding_mask: Tensor | None = None,
    documents: Tensor | None = None,
    slopes: Tensor | None = None,
    may_be_blind: bool = False,
) -> Alignment:
    """Turn counts of visible positions into an attention bias.

    Args:
        visible: Int64 `[1 or batch, query_length]`, from `visible_same_tokenizer`.
        key_length: Number of augmenting positions held, those of a static cache that are still empty included.
        padding_mask: `[batch, <= key_length]`, 1 for a token and 0 for padding; missing columns count as padding.
        documents: Int64 `[batch, key_length]`, a number for each document, for packed rows without a cache.
        slopes: Float32 `[heads]`, ALiBi slopes (Press et al., arXiv 2108.12409) over the distance from the last
            position seen, counted in real tokens.
        may_be_blind: Whether `visible` may be 0 somewhere.

    Returns:
        The alignment.
    """
    positions = torch.arange(key_length, device=visible.device)
    seen = positions < visible.unsqueeze(-1)  # [1 or batch, query, key]
    key_positions = positions.unsqueeze(0)
    if padding_mask is not None:
        real = torch.nn.functional.pad(padding_mask.bool(), (0, key_length - padding_mask.shape[1]))
        seen = seen & real.unsqueeze(1)
        key_positions = real.cumsum(-1) - 1
        may_be_blind = True
    if documents is not None:
        seen = seen & (documents.unsqueeze(1) == documents.unsqueeze(2))

    sees = None
    if may_be_blind:
        sees = seen.any(-1, keepdim=True)
        seen = seen | ~sees
    bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf")).unsqueeze(1)
    if slopes is not None:
        rows = max(visible.shape[0], key_positions.shape[0])
        last = key_positions.expand(rows, -1).gather(1, (visible - 1).clamp(min=0).expand(rows, -1))
        distance = (last.unsqueeze(-1) - key_positions.unsqueeze(1)).clamp(min=0)
        bias = bias - slopes.to(bias.device).view(1, -1, 1, 1) * distance.unsqueeze(1)
    return Alignment(bias, sees)
