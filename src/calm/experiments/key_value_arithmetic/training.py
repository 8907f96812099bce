"""fit(): one model on drawn batches with the transformers Trainer, with nothing saved on the way."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from calm.experiments.key_value_arithmetic.lines import IGNORED, Batches
from calm.experiments.key_value_arithmetic.mixing import Mixed
from calm.experiments.key_value_arithmetic.recipe import CPU, Hardware, TrainingSettings
from calm.experiments.key_value_arithmetic.superposition import Superposed

Report = Callable[[int, int, str], None]
"""What progress is told to: steps done, steps at most, a word on how it goes."""

REPORT_EVERY = 10


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Args:
        model: the model, in evaluation mode.
        steps: of training.
        trainable_parameters: how many numbers were trained.
        learning_rate: the one that was chosen (for a mixture m_A's weight).
        searched: what was tried, with the percent of validation lines that came out right.
    """

    model: PreTrainedModel | Mixed
    steps: int
    trainable_parameters: int
    learning_rate: float | None
    searched: Mapping[str, float] = field(default_factory=dict)


def fit(
    model: PreTrainedModel | Superposed,
    batches: Batches,
    settings: TrainingSettings,
    seed: int,
    report: Report,
    validation: Mapping[str, Tensor] | None = None,
    hardware: Hardware = CPU,
) -> int:
    """Train what requires gradients.

    Args:
        model: trained in place, left in evaluation mode.
        batches: one item for each step.
        settings: steps, learning rate and weight decay.
        seed: of the Trainer.
        report: is told about progress.
        validation: a batch whose exact match is reported on the way.
        hardware: where to train; the model is left there.

    Returns:
        The number of steps.
    """
    with tempfile.TemporaryDirectory() as nothing_is_written_here:
        arguments = TrainingArguments(
            output_dir=nothing_is_written_here,
            max_steps=len(batches),
            per_device_train_batch_size=1,  # an item is a whole batch already
            train_sampling_strategy="sequential",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
            learning_rate=settings.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=settings.warmup_steps,
            adam_beta2=0.98,
            weight_decay=settings.weight_decay,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            seed=seed,
            use_cpu=hardware.device == "cpu",
            bf16=hardware.bf16,
            dataloader_num_workers=hardware.loaders,
        )
        arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would take as many items for a step
        trainer = Trainer(
            model=model,
            args=arguments,
            train_dataset=batches,
            data_collator=_only_item,
            callbacks=[_Watch(settings, report, validation)],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    model.eval()
    return trainer.state.global_step


def exact_match(model: PreTrainedModel | Mixed | Superposed, batch: Mapping[str, Tensor]) -> float:
    """Percent of rows whose learned tokens are all the likeliest ones: what greedy decoding would then write.

    Args:
        model: a causal language model.
        batch: as `lines.encode` makes it, one example to a row.
    """
    was_training = model.training
    model.eval()
    read = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    with torch.no_grad(), torch.random.fork_rng():  # a look draws noise (`Superposed`), and leaves training's as it was
        torch.manual_seed(0)
        predicted = model(**read, use_cache=False).logits[:, :-1].argmax(-1)
    model.train(was_training)
    labels = batch["labels"][:, 1:].to(model.device)
    return 100 * ((predicted == labels) | (labels == IGNORED)).all(-1).float().mean().item()


def trainable(model: PreTrainedModel) -> int:
    """How many numbers of a model are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


class _Watch(TrainerCallback):
    """Reports progress, and how many of the validation expressions are right."""

    def __init__(self, settings: TrainingSettings, report: Report, validation: Mapping[str, Tensor] | None) -> None:
        self.settings, self.report, self.validation = settings, report, validation
        self.seen = ""

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        step = state.global_step
        if self.validation is not None and step % self.settings.check_every == 0:
            self.seen = f"{exact_match(kwargs['model'], self.validation):.0f}%"
        if step % REPORT_EVERY == 0 or step == state.max_steps:
            self.report(step, state.max_steps, self.seen)


def _only_item(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    (item,) = items
    return item
