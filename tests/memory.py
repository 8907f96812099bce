"""The most memory that training takes, by PyTorch's CPU allocator; in this process, or in one of several (torchrun)."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from factories import Mix, tokens
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.profiler import ProfilerActivity, profile

from calm.tracing import loss_of, update

SHARED_OUT = Mix("llama", ("gpt2",), 2, anchor_shape=(256, 12, 4), augmenting_shapes=((128, 4, 2),))
BATCH, LENGTH = 2, 48


def peak_of_step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> int:
    """Weights, buffers and optimizer states, and the most that a step takes beside them."""
    update(loss_of(model, ids), optimizer)
    states = [value for state in optimizer.state.values() for value in state.values()]
    kept = [t.to_local() if isinstance(t, DTensor) else t for t in (*model.parameters(), *model.buffers(), *states)]
    storages = {storage.data_ptr(): storage.nbytes() for t in kept if (storage := t.untyped_storage())}
    return sum(storages.values()) + most_held(lambda: update(loss_of(model, ids), optimizer))


def most_held(run: Callable[[], object]) -> int:
    """The most that something takes beside what is there before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(held)


def main(kind: str, file: Path) -> None:
    """Train `SHARED_OUT` with its weights sharded over the processes, or with all of them in each."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    composed = SHARED_OUT.build().train()
    model: torch.nn.Module = composed
    buckets = 0
    if kind == "sharded":
        mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
        for module in list(composed.modules()):
            if type(module).__name__ in composed._no_split_modules:
                fully_shard(module, mesh=mesh)
        fully_shard(composed, mesh=mesh)
    else:
        model = torch.nn.parallel.DistributedDataParallel(composed, broadcast_buffers=False)
        buckets = sum(weight.nbytes for weight in composed.connections.parameters())  # there before the step
    optimizer = torch.optim.AdamW(composed.connections.parameters(), lr=1e-6, fused=True)
    peak = peak_of_step(model, optimizer, tokens(BATCH, LENGTH)) + buckets
    if dist.get_rank() == 0:
        file.write_text(str(peak))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
