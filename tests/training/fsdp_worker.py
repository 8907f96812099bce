"""One process of `test_fully_sharded_training_is_that_of_one_process`, started by torchrun."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard

import calm


def main(folder: Path) -> None:
    """A step on this process's half of the batch, with everything sharded; then save."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = calm.CalmForCausalLM.from_pretrained(folder / "composed").train()
    mesh = dist.init_device_mesh("cpu", (world,))
    for module in list(model.modules()):
        if type(module).__name__ in model._no_split_modules:
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(weight, dist.tensor.DTensor) for weight in model.parameters())

    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 64, (4, 9), generator=generator)  # as factories.tokens
    optimizer = torch.optim.AdamW(model.connections.parameters(), lr=1e-2)
    mine = ids.chunk(world)[rank]
    model(mine, labels=mine, skip_logits=True).loss.backward()
    gradients = {name: weight.grad.full_tensor() for name, weight in model.connections.named_parameters()}
    assert all(weight.grad is None for weight in model.anchor.parameters())
    optimizer.step()
    model.save_pretrained(folder / "sharded", is_main_process=rank == 0)
    if rank == 0:
        torch.save(gradients, folder / "gradients.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
