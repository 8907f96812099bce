"""Which augmenting positions each anchor position may see, and the attention bias that says so, block by block.

One idea serves every case: for each anchor position, *how many* augmenting positions it sees (`visible`). The same
tokenizer gives t + 1; "prompt only" cuts that at the prompt's length; other tokenizers only change how `visible` is
counted. Padding is never seen, and neither is another document of a packed row.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

BLOCK = 512
"""Query positions of one piece of a long attention, over all rows of the batch that have a bias of their own."""

SMALLEST_BLOCK = 32
"""Query positions of one row in a piece, in batches of however many rows."""


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
    """Who sees what in one forward pass, shared by every connection; `blocks` makes the attention bias from it.

    An anchor position sees the real tokens among the columns from `first` up to, and without, `visible`.

    Attributes:
        visible: Int64 `[1 or batch, query length]`.
        counts: Int64 `[1 or batch, key length + 1]`, how many real tokens there are before each column.
        slopes: Float32 `[heads]`, ALiBi slopes (Press et al., arXiv 2108.12409) over the distance from the last
            position seen, counted in real tokens; or `None`.
        real: Bool `[batch, key length]`, false for padding; `None` without any.
        first: Int64 `[batch, query length]`, where each position's document starts in a packed row; `None` for 0.
        sees: Bool `[1 or batch, query length, 1]`, false where an anchor position sees nothing, or `None` when every
            position sees something. Such a position has no `-inf` in its bias, which keeps the softmax finite; the
            connection leaves its hidden state as it is.
        shifts: Whether the bias of a block is that of any other one, shifted, in each row: rows of plain causal order.
        documents: With `shifts`, lengths of the documents of packed rows, one row after another, or `None`; the other
            attributes are then those of the longest one. Documents do not see one another.
    """

    visible: Tensor
    counts: Tensor
    slopes: Tensor | None = None
    real: Tensor | None = None
    first: Tensor | None = None
    sees: Tensor | None = None
    shifts: bool = False
    documents: list[int] | None = None
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def to(self, device: torch.device) -> Alignment:
        """The same alignment on another device (a base spread over several has its connections spread likewise)."""
        if self.visible.device == device:
            return self
        if device not in self._made:
            there: dict[str, Any] = {
                f.name: value.to(device) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)
            }
            self._made[device] = replace(self, **there)
        moved: Alignment = self._made[device]
        return moved

    def blocks(self, query_length: int, key_length: int, dtype: torch.dtype) -> Iterator[tuple[slice, int, Tensor]]:
        """Cut the attention of a row, or of one document, into pieces, each with the keys that may be seen in it.

        Args:
            query_length: Number of query positions, the last ones of those that have keys (an anchor may drop the
                others before its last layers).
            key_length: Number of keys.
            dtype: Of the queries.

        Returns:
            Of each piece: its query positions, the number of leading keys, and the bias between them in that dtype,
            `[1 or batch, 1 or heads, queries, keys]`: `-inf` where an augmenting position is not seen, otherwise the
            ALiBi penalty (0 without slopes).
        """
        total, longest = self.visible.shape[1], self.counts.shape[1] - 1
        rows = max(BLOCK // max(len(self.visible), len(self.counts)), SMALLEST_BLOCK)
        if self.shifts:
            rows = min(BLOCK, total)
        if torch.compiler.is_compiling():  # a loop would be compiled for each length
            rows = total
        # for a backward pass each connection keeps its bias: one for all of them, then
        keep = query_length <= rows or torch.is_grad_enabled()
        for end in range(query_length % rows or rows, query_length + 1, rows):
            start, keys = max(end - rows, 0), key_length - query_length + end
            if self.shifts:
                bias = self._bias(total - rows, total, longest, dtype, keep=True)
                bias = bias[:, :, rows - (end - start) :, longest - keys :]
            else:
                before = total - query_length
                bias = self._bias(before + start, before + end, keys, dtype, keep)
            yield slice(start, end), keys, bias

    def _bias(self, start: int, end: int, keys: int, dtype: torch.dtype, keep: bool) -> Tensor:
        """The bias of the query positions from `start` to `end` on the leading keys."""
        key = (start, end, keys, dtype)
        if key in self._made:
            kept: Tensor = self._made[key]
            return kept
        visible, columns = self.visible[:, start:end, None], torch.arange(keys, device=self.visible.device)
        seen = columns < visible  # [1 or batch, query, key]
        if self.first is not None:
            seen = seen & (columns >= self.first[:, start:end, None])
        if self.real is not None:
            seen = seen & self.real[:, None, :keys]
        if self.sees is not None:
            seen = seen | ~self.sees[:, start:end]
        bias = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf")).unsqueeze(1)
        if self.slopes is not None:
            last = _at(self.counts, visible.squeeze(-1)).unsqueeze(-1) - 1
            distance = (last - self.counts[:, None, :keys]).clamp(min=0).float().unsqueeze(1)
            bias = torch.addcmul(bias, distance, self.slopes.view(1, -1, 1, 1), value=-1)
        bias = bias.to(dtype)
        if keep:
            self._made[key] = bias
        return bias

    def of_first_document(self, length: int) -> tuple[int, Alignment]:
        """That of the beginning of the batch's first row alone, or of its first document.

        Args:
            length: Number of leading positions of the row, of a pass over whole rows.

        Returns:
            How many positions the document has, and its alignment.
        """
        if self.documents is not None:
            return self.documents[0], replace(self, documents=None)
        of_rows = {"visible": length, "counts": length + 1, "real": length, "first": length, "sees": length}
        row: dict[str, Any] = {
            name: value[:1, :end] for name, end in of_rows.items() if (value := getattr(self, name)) is not None
        }
        return length, replace(self, **row)


def _at(counts: Tensor, columns: Tensor) -> Tensor:
    """The entries of `[1 or batch, key length + 1]` at columns `[1 or batch, query length]`."""
    rows = max(len(counts), len(columns))
    return counts.expand(rows, -1).gather(1, columns.expand(rows, -1))


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

    One block of its bias serves all of them: that of `length` x `length` is large, and half of it hides keys.

    Args:
        length: Number of positions of a row.
        slopes: Float32 `[heads]`, as in `Alignment`.
        device: Where the result lives.
        documents: For packed rows, the lengths of their documents: t sees the positions of its own up to itself.

    Returns:
        The alignment.
    """
    length = length if documents is None else max(documents)
    counts = torch.arange(length + 1, device=device).unsqueeze(0)
    slopes = None if slopes is None else slopes.to(device)
    return Alignment(counts[:, 1:], counts, slopes, shifts=True, documents=documents)


def align(
    visible: Tensor,
    key_length: int,
    padding_mask: Tensor | None = None,
    documents: Tensor | None = None,
    slopes: Tensor | None = None,
    may_be_blind: bool = False,
) -> Alignment:
    """The alignment of rows of any kind, from counts of visible positions.

    Args:
        visible: Int64 `[1 or batch, query_length]`, from `visible_same_tokenizer`.
        key_length: Number of augmenting positions held, those of a static cache that are still empty included.
        padding_mask: `[batch, <= key_length]`, 1 for a token and 0 for padding; missing columns count as padding.
        documents: Int64 `[batch, key_length]`, a rising number for each document, for packed rows without a cache.
        slopes: Float32 `[heads]`, as in `Alignment`.
        may_be_blind: Whether `visible` may be 0 somewhere.

    Returns:
        The alignment.
    """
    real = first = sees = None
    counts = torch.arange(key_length + 1, device=visible.device).unsqueeze(0)
    if padding_mask is not None:
        real = torch.nn.functional.pad(padding_mask.bool(), (0, key_length - padding_mask.shape[1]))
        counts = torch.nn.functional.pad(real.cumsum(-1), (1, 0))
    if documents is not None:
        first = torch.searchsorted(documents, documents)
    if may_be_blind or real is not None:
        hidden = 0 if first is None else _at(counts, first)
        sees = (_at(counts, visible) > hidden).unsqueeze(-1)
    return Alignment(visible, counts, None if slopes is None else slopes.to(visible.device), real, first, sees)
