"""One process of `calm train` under FSDP2, started by `accelerate launch`.

On a CPU accelerate takes data parallelism for FSDP without a word: it asks what kind of processes there are. Here it
is told that they are GPUs', and everything else, from its configuration to sharding, is as on GPUs.
"""

from __future__ import annotations

from typing import Any

from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from calm.cli import main
from calm.training import trainer


class ShardedTrainer(trainer.CompositionTrainer):
    """Refuses to train what is not sharded; between the batches of a step some weights stay gathered."""

    def _run_epoch(self, model: Any, *args: Any, **kwargs: Any) -> None:
        assert all(isinstance(weight, DTensor) for weight in model.parameters())
        super()._run_epoch(model, *args, **kwargs)


def arguments(*args: Any) -> Any:
    made = of_the_trainer(*args)
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return made


if __name__ == "__main__":
    of_the_trainer, trainer._arguments = trainer._arguments, arguments
    trainer.CompositionTrainer = ShardedTrainer
    main()
