"""The training loop: the transformers Trainer with whole checkpoints, no NaN, and a Ctrl-C that loses nothing."""

from __future__ import annotations

import logging
import math
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, Dataset, Sampler
from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME

from calm import sharding
from calm.checkpoint import CONNECTIONS_PREFIX, read_weights
from calm.data import IGNORED, Row
from calm.errors import CalmError, DivergedError
from calm.training.checkpoints import WholeCheckpointsTrainer
from calm.training.statistics import ConnectionStatistics

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState

    from calm.training.augmenting_outputs import RowsWithOutputs

logger = logging.getLogger(__name__)


class CompositionTrainer(WholeCheckpointsTrainer):
    """The transformers Trainer, with whole checkpoints only, every best model saved, and errors instead of NaN."""

    _rates: list[dict[str, float]]

    def compute_loss(
        self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> torch.Tensor | tuple[torch.Tensor, Any]:
        """As the Trainer, without the logits; in evaluation each token counts the same, whatever batch it is in."""
        inputs = {**inputs, "skip_logits": True}
        if not model.training and self.eval_dataset is not None:
            # the Trainer takes the mean over examples of what it is given: this makes it the mean over labels
            inputs["num_items_in_batch"] = len(inputs["labels"]) * self._labels_per_eval_example
            kwargs["num_items_in_batch"] = None
        result: torch.Tensor | tuple[torch.Tensor, Any] = super().compute_loss(model, inputs, *args, **kwargs)
        return result

    @cached_property
    def _labels_per_eval_example(self) -> float:
        return sum(int((row["labels"] != IGNORED).sum()) for row in self.eval_dataset) / len(self.eval_dataset)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """As the Trainer, with each connection's statistics beside the training loss."""
        if "loss" in logs:
            measured = (c.values for c in self.callback_handler.callbacks if isinstance(c, ConnectionStatistics))
            for values in measured:
                logs |= values
        if not math.isfinite(logs.get("grad_norm", 0.0)):  # of a step that the scaler skips: it has no gradients
            logs = {name: value for name, value in logs.items() if not name.endswith(("grad_norm", "/gradient"))}
        super().log(logs, *args, **kwargs)

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int]:
        """Steps of examples in an order that depends on seed and epoch alone, however a step is cut into batches."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        step_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        fillers = len(rows.fillers) if isinstance(rows, WholeBatches) else 0
        self._order = SortedSteps([len(row["input_ids"]) for row in rows], step_size, self.args.seed, fillers)
        return self._order

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """As the Trainer; of a sharded run without the frozen models, and of FSDP in the files of any other run."""
        if not self.is_fsdp_enabled and not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        if self.is_deepspeed_enabled:
            self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        else:
            state = sharding.whole(self.optimizer.state_dict())
            if self.args.should_save:
                torch.save(state, Path(output_dir, OPTIMIZER_NAME))
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir, SCHEDULER_NAME))

    def _prepare_for_training(self, max_steps: int, loader: DataLoader, checkpoint: str | None) -> tuple[Any, Any]:
        """As the Trainer; DeepSpeed's checkpoints lack the frozen models, which are loaded already."""
        if checkpoint is None or not self.is_deepspeed_enabled:
            prepared: tuple[Any, Any] = super()._prepare_for_training(max_steps, loader, checkpoint)
            return prepared
        prepared = super()._prepare_for_training(max_steps, loader, None)
        deepspeed_load_checkpoint(self.model_wrapped, checkpoint, load_module_strict=False)
        self._load_optimizer_and_scheduler(checkpoint)
        return prepared

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Load a composition's weights as they were saved, in float32, into the connections, sharded or not."""
        connections = self.accelerator.unwrap_model(self.model).connections
        with sharding.gathered(connections):
            expected = connections.state_dict(prefix=CONNECTIONS_PREFIX)
            weights = read_weights(resume_from_checkpoint, expected)
        sharding.load(connections, {key.removeprefix(CONNECTIONS_PREFIX): value for key, value in weights.items()})

    def _load_best_model(self) -> None:
        self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer; remembers each group's rates, which are the recipe's until a checkpoint is loaded."""
        scheduler = super().create_scheduler(*args, **kwargs)
        if isinstance(scheduler, LambdaLR):
            groups = self.optimizer.param_groups
            self._rates = [{name: group[name] for name in ("initial_lr", "weight_decay")} for group in groups]
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """As the Trainer; a state that is missing, damaged or of other weights is an error before the first step."""
        try:
            if checkpoint is not None and self.is_fsdp_enabled:
                found = torch.load(Path(checkpoint, OPTIMIZER_NAME), map_location="cpu", weights_only=True)
                self.optimizer.load_state_dict(sharding.optimizer_state(found, self.optimizer))
                self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint, SCHEDULER_NAME), weights_only=True))
            else:
                super()._load_optimizer_and_scheduler(checkpoint)
        except Exception as error:  # of the file system, of unpickling, of the optimiser: it depends on the damage
            raise _unfit_optimizer(checkpoint, f"it cannot be read: {error}") from error
        if checkpoint is None:
            return
        self._take_rates_from_recipe()
        if self.is_deepspeed_enabled:  # which loads the optimiser with the model
            return
        if not self.optimizer.state:
            raise _unfit_optimizer(checkpoint, "it is not there")
        for weight, state in self.optimizer.state.items():
            for name, value in state.items():
                if isinstance(value, torch.Tensor) and value.dim() and value.shape != weight.shape:
                    raise _unfit_optimizer(
                        checkpoint,
                        f"{name!r} has shape {tuple(value.shape)} for a weight of shape {tuple(weight.shape)}: it is "
                        "that of another composition",
                    )

    def _take_rates_from_recipe(self) -> None:
        """Take learning rate and weight decay from the recipe, not from a resumed checkpoint.

        Where DeepSpeed's own configuration names the optimiser or the scheduler, they stay the checkpoint's.
        """
        schedule = self.lr_scheduler
        if not isinstance(schedule, LambdaLR):
            return
        schedule.base_lrs = [rates["initial_lr"] for rates in self._rates]
        factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
        schedule._last_lr = [base * factor for base, factor in zip(schedule.base_lrs, factors, strict=True)]
        for group, rates, now in zip(self.optimizer.param_groups, self._rates, schedule._last_lr, strict=True):
            group.update(rates, lr=now)

    def _load_callback_state(self) -> None:
        """As the Trainer; how long early stopping has waited is the checkpoint's, how long it may is the recipe's."""
        patience = [callback.early_stopping_patience for callback in self._early_stopping()]
        super()._load_callback_state()
        for callback, told in zip(self._early_stopping(), patience, strict=True):
            callback.early_stopping_patience = told

    def _early_stopping(self) -> list[EarlyStoppingCallback]:
        return [callback for callback in self.callback_handler.callbacks if isinstance(callback, EarlyStoppingCallback)]

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Save every new best model, also between the regular checkpoints."""
        is_new_best: bool = super()._determine_best_metric(metrics, trial)
        if is_new_best:
            self.control.should_save = True
        return is_new_best

    def _run_epoch(self, model: torch.nn.Module, epoch: int, *args: Any, **kwargs: Any) -> None:
        """As ever, in the epoch's order, which accelerate does not ask for in a distributed run that resumes in it."""
        self._order.set_epoch(epoch)
        super()._run_epoch(model, epoch, *args, **kwargs)

    def _init_training_state(self, max_steps: int, *args: Any) -> tuple[int, int]:
        """Take the steps between logs, evaluations and saves from the recipe, not from a resumed checkpoint."""
        trained: tuple[int, int] = super()._init_training_state(max_steps, *args)
        self.state.compute_steps(self.args, max_steps)
        return trained

    def _clip_grad_norm(self, model: torch.nn.Module) -> torch.Tensor | float:
        """Clip, and stop before a gradient that is not a number (as after such a loss) reaches the weights.

        With fp16 it may be no more than scaled too high: then the scaler skips the step and halves its scale.
        """
        norm: torch.Tensor | float = super()._clip_grad_norm(model)
        if math.isfinite(norm) or self._scale_is_too_high():
            return norm
        scaler = self.accelerator.scaler
        scaled = "" if scaler is None else f", with fp16's scale at {scaler.get_scale():g}"
        raise DivergedError(
            f"the loss or its gradient is not a number at step {self.state.global_step + 1} (the gradient's norm "
            f"is {float(norm)}{scaled}), so training was stopped; lower training.learning_rate or lengthen the warmup; "
            "if it happens at the first step, look for extreme weights in the models or use dtype: float32 without fp16"
        )

    def _scale_is_too_high(self) -> bool:
        """Whether a gradient that overflowed says no more than that fp16 scales it too high."""
        scaler = self.accelerator.scaler
        if scaler is None or scaler.get_scale() < 1:  # below 1 the gradient itself is more than float16 holds
            return False
        loss = self.accelerator.reduce(self._tr_loss, "sum")  # of all processes, of which none may go on alone
        return bool(loss.isfinite())


class WholeBatches(Dataset[Row]):
    """Rows, and behind them fillers without labels, with which all processes' batches are equally full.

    Without them accelerate takes rows from the beginning once more: their tokens would count twice, in the gradients of
    an epoch's last step and in the evaluation loss.

    Args:
        rows: The data.
        batch_size: Rows of a batch of all processes together.
    """

    def __init__(self, rows: Sequence[Row] | RowsWithOutputs, batch_size: int) -> None:
        self.rows = rows
        shortest = rows[min(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))]
        filler = {**shortest, "labels": np.full_like(shortest["labels"], IGNORED)}
        self.fillers = [filler] * (-len(rows) % batch_size)

    def __len__(self) -> int:
        """How many rows there are, fillers included."""
        return len(self.rows) + len(self.fillers)

    def __getitem__(self, index: int) -> Row:
        """A row or, behind the last one, a filler."""
        return self.rows[index] if index < len(self.rows) else self.fillers[index - len(self.rows)]


class SortedSteps(Sampler[int]):
    """Draws the examples of each optimiser step at random and sorts them by length, so that its batches pad little.

    Steps whose examples are all about equally long, as transformers' `group_by_length` has them, save more, but then
    one step is all of one kind of example: a composition lost its anchor's English by it (docs/dev/LOG.md, "steps of
    one kind"). A longest example is in the first step, so that a batch which does not fit in memory is found out there.

    Args:
        lengths: Tokens of each example.
        step_size: Examples of an optimiser step, on all processes together.
        seed: With the epoch it decides the order, so that a resumed run goes on in the order of the first one.
        fillers: How many of the last examples only fill up batches (see `WholeBatches`): an epoch ends with them.
    """

    def __init__(self, lengths: list[int], step_size: int, seed: int, fillers: int = 0) -> None:
        self.lengths, self.step_size, self.seed, self.fillers, self.epoch = lengths, step_size, seed, fillers, 0

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate when an epoch begins."""
        self.epoch = epoch

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        """The indices of one epoch."""
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        real = len(self) - self.fillers
        drawn = torch.randperm(real, generator=generator).tolist()
        drawn.insert(0, drawn.pop(max(range(real), key=lambda at: self.lengths[drawn[at]])))
        drawn += range(real, len(self))
        for begin in range(0, len(self), self.step_size):
            yield from sorted(drawn[begin : begin + self.step_size], key=lambda index: -self.lengths[index])


def _unfit_optimizer(checkpoint: str | None, reason: str) -> CalmError:
    return CalmError(
        f"the optimiser state in {checkpoint} cannot be used: {reason}; take that folder away to resume from the "
        "checkpoint before it, or start a new run in another training.output_dir"
    )


class LogBeforeSaving(TrainerCallback):
    """Log at each evaluation and checkpoint, so that no logged mean spans a step from which a run may be resumed."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer after each optimiser step."""
        control.should_log = control.should_log or control.should_evaluate or control.should_save


class SaveAndStop(TrainerCallback):
    """Save a checkpoint and end the training after the current optimiser step, once `requested` of any process.

    Attributes:
        requested: Set from outside, at any moment, in this process.
        stopped: Whether all processes have ended the training for it, after the same step.
    """

    requested = stopped = False

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the Trainer after each optimiser step."""
        self.stopped = self.requested
        if args.world_size > 1:  # a process that stopped alone would leave the others waiting for it
            flag = torch.tensor(int(self.requested), device=args.device)
            torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
            self.stopped = bool(flag)
        if self.stopped:
            control.should_log = control.should_save = control.should_training_stop = True


@contextmanager
def saves_on_interrupt(callback: SaveAndStop) -> Iterator[None]:
    """Within this context the first Ctrl-C or SIGTERM asks for a checkpoint and a stop; a second Ctrl-C stops at once.

    SIGTERM may come twice of its own: from SLURM, and from torchrun, which passes on what it got itself.
    """
    if threading.current_thread() is not threading.main_thread():  # only the main thread gets signals
        yield
        return

    def request(signum: int, frame: FrameType | None) -> None:
        callback.requested = True
        if signum == signal.SIGINT:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
        logger.warning(
            "%s: saving a checkpoint after this step (Ctrl-C%s stops at once, without saving)",
            *(("Ctrl-C", " again") if signum == signal.SIGINT else ("SIGTERM", "")),
        )

    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    # ignored: Ctrl-C by a job in the background of a shell; None: handled by something other than Python
    taken = [number for number, handler in previous.items() if handler not in (signal.SIG_IGN, None)]
    for number in taken:
        signal.signal(number, request)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, previous[number])
