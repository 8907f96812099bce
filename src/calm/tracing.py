"""A training step operation by operation, on real tensors or on shapes alone: its FLOPs, its traffic, its peak memory.

Shapes are enough for all of it but time: the same PyTorch operations are dispatched, and the same tensors live as long.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper
from transformers import masking_utils

from calm.model import CalmForCausalLM

aten = torch.ops.aten
prim = torch.ops.prim


def _attention_flop(queries: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_flop_count(queries, keys, values)


def _attention_backward_flop(gradient: Any, queries: Any, keys: Any, values: Any, *args: Any, **kwargs: Any) -> int:
    return sdpa_backward_flop_count(gradient, queries, keys, values)


def _grouped_mm_flop(rows: Any, experts: Any, *args: Any, out_shape: Any, **kwargs: Any) -> int:
    return 2 * prod(out_shape) * rows[-1]


# PyTorch's formulas, and those of operations that it does not count.
FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: shape_wrapper(_attention_flop),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: shape_wrapper(_attention_backward_flop),
    aten._grouped_mm: shape_wrapper(_grouped_mm_flop),
}


@dataclass(frozen=True)
class Operation:
    """One operation that PyTorch dispatched, views left out.

    Attributes:
        name: PyTorch's name of it; attention that skips what a causal mask hides has " causal" added.
        dtype: Of its first floating-point result (or argument), "integer" without any.
        flops: Of matrix products, convolutions and attention; 0 for all others.
        bytes: Of the tensors that it reads and writes.
        new_bytes: Of the tensors that it makes.
    """

    name: str
    dtype: str
    flops: int
    bytes: int
    new_bytes: int


class Trace(TorchDispatchMode):
    """Writes down every operation within its context, and how many bytes the tensors made within it take.

    Args:
        clock: Seconds, to time operations with; it has to wait for a device that works ahead. Not timed by default.

    Attributes:
        operations: In the order in which they ran.
        seconds: What each of them took, with a clock.
        live_bytes: Bytes of tensors made within the context that are still there.
        peak_bytes: The most that these ever were. What is alive only within one operation is not seen.
    """

    def __init__(self, clock: Callable[[], float] | None = None) -> None:
        super().__init__()
        self.clock = clock
        self.operations: list[Operation] = []
        self.seconds: list[float] = []
        self.live_bytes = self.peak_bytes = 0
        self._storages: dict[int, weakref.ref] = {}

    @property
    def flops(self) -> int:
        """FLOPs of all operations."""
        return sum(operation.flops for operation in self.operations)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is prim.device.default:  # asked of tensors without contents only
            return func(*args, **kwargs)
        if func._overloadpacket not in FLOPS:
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        start = self.clock() if self.clock else 0.0
        result = func(*args, **kwargs)
        seconds = self.clock() - start if self.clock else 0.0
        if not func.is_view:
            self._write_down(func, args, kwargs, result)
            if self.clock:
                self.seconds.append(seconds)
        return result

    def _write_down(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        arguments = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        results = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        made = [t for t in results if not any(t is argument for argument in arguments)]
        for tensor in made:
            self._hold(tensor.untyped_storage())
        formula = FLOPS.get(func._overloadpacket)
        name = func._overloadpacket.__name__
        if "attention" in name and (kwargs.get("is_causal") or True in [a for a in args if isinstance(a, bool)]):
            name += " causal"
        floating = [t.dtype for t in (*results, *arguments) if t.dtype.is_floating_point]
        new_bytes = sum(t.nbytes for t in made)
        self.operations.append(
            Operation(
                name,
                str(floating[0]).removeprefix("torch.") if floating else "integer",
                int(formula(*args, **kwargs, out_val=result)) if formula else 0,
                sum(t.nbytes for t in arguments) + new_bytes,
                new_bytes,
            )
        )

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: Any) -> None:
            self.live_bytes -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, freed)
        self.live_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)


@contextmanager
def shapes_only() -> Iterator[None]:
    """Run tensors by their shapes, as if on a CPU: nothing is allocated or computed."""
    look_for_documents = masking_utils.find_packed_sequence_indices
    # it would take positions that it cannot look at for those of packed rows, and have every model make a mask
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        with FakeTensorMode(allow_non_fake_inputs=True), _KnownShapes():
            yield
    finally:
        masking_utils.find_packed_sequence_indices = look_for_documents


class _KnownShapes(TorchDispatchMode):
    """Answers what PyTorch does not say about tensors without contents.

    Mixtures of experts run in other dtypes than bfloat16, which PyTorch's own rule demands; and a boolean index, such
    as that of the labelled positions, is taken to be true everywhere.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._grouped_mm.default:
            rows, experts, *rest = args
            return func(rows.bfloat16(), experts.bfloat16(), *rest, **(kwargs or {})).to(rows.dtype)
        if func is aten.index.Tensor and len(args[1]) == 1 and args[1][0].dtype is torch.bool:
            tensor, (mask,) = args
            return tensor.new_empty(mask.numel(), *tensor.shape[mask.dim() :])
        return func(*args, **(kwargs or {}))


# -- the step that `calm.training` does ---------------------------------------------------------------------------


def connections_in_float32(model: CalmForCausalLM) -> torch.optim.AdamW:
    """Make a composed model ready to train as `calm.training` does: its connections in float32, and their optimizer.

    Args:
        model: Changed in place.

    Returns:
        AdamW with its states made, as they are from the second step on.
    """
    for module in model.train().connections.modules():  # Module.float() refuses tensors without contents
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.float()))
    weights = list(model.connections.parameters())
    optimizer = torch.optim.AdamW(weights, lr=1e-6, weight_decay=0.0, fused=True)
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def loss_of(model: CalmForCausalLM, input_ids: Tensor) -> Tensor:
    """The forward half of a step: every token is a label, and logits are made in chunks.

    Args:
        model: The composed model.
        input_ids: Int64 `[batch, length]`; a batch that is padded on the right needs no mask (`calm.data`).

    Returns:
        The loss.
    """
    output = model(input_ids, labels=input_ids, skip_logits=True, use_cache=False)
    loss: Tensor = output.loss
    return loss


def update(loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
    """The other half: gradients, clipped, and AdamW."""
    loss.backward()
    nn.utils.clip_grad_norm_([weight for group in optimizer.param_groups for weight in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad()
