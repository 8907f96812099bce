"""Trains bases and baselines by the transformers Trainer and PEFT, compositions by `calm.training`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import get_last_checkpoint

from calm import loss
from calm.backbones import contiguous_input
from calm.data import CompletionCollator, Row
from calm.experiments.methods.examples import Example
from calm.experiments.methods.settings import BATCHES, Fit, Settings
from calm.training import TrainingResult, train
from calm.training.checkpoints import WholeCheckpointsTrainer
from calm.training.loop import SortedSteps
from calm.training.recipe import check_recipe

SAVE_STEPS = 100
"""Steps between a baseline's checkpoints, or a twentieth of its training, whichever is more: they are three times as
large as what is trained."""


def fine_tune(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Row],
    fit: Fit,
    seed: int,
    bf16: bool,
    folder: Path,
) -> int:
    """Train whatever of a model requires gradients, going on from the last checkpoint if there is one.

    Args:
        model: float32, trained in place, left in evaluation mode.
        tokenizer: for padding.
        rows: `input_ids` and `labels`; drawn anew in each epoch, as in the training of a composition.
        fit: steps, rows and learning rate.
        seed: of the order.
        bf16: compute in bfloat16 (autocast).
        folder: where checkpoints are kept.

    Returns:
        How many parameters were trained.
    """
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=fit.steps,
        per_device_train_batch_size=fit.rows // BATCHES,
        gradient_accumulation_steps=BATCHES,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        learning_rate=fit.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        bf16=bf16,
        use_cpu=not torch.cuda.is_available(),
        max_grad_norm=1.0,
        logging_strategy="no",
        save_steps=max(SAVE_STEPS, fit.steps // 20),
        save_total_limit=1,
        report_to="none",
        seed=seed,
    )
    arguments._n_gpu = min(arguments.n_gpu, 1)  # DataParallel would take as many times the rows
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=list(rows),
        data_collator=CompletionCollator.for_tokenizer(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(folder)))
    model.eval()
    return trained


class _Trainer(WholeCheckpointsTrainer):
    """In a composition's order of steps, and without logits of prompts, wherever the head itself is not trained."""

    go_on = "run the same command again"

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        plain = model.get_base_model() if isinstance(model, PeftModel) else model
        if not loss.can_skip_logits(plain):
            return cast(torch.Tensor, super().compute_loss(model, inputs, return_outputs, num_items_in_batch))
        labels = inputs.pop("labels")
        # accelerate has autocast on the forward of the model that it was given, not on the one within PEFT's
        with self.accelerator.autocast():
            with loss.without_head(plain) as decoded:
                plain(**inputs, use_cache=False)
            return loss.loss_without_logits(plain, decoded, labels, num_items_in_batch)

    def _get_train_sampler(self, train_dataset: Any = None) -> SortedSteps:
        lengths = [len(row["input_ids"]) for row in self.train_dataset]
        return SortedSteps(lengths, self.args.train_batch_size * BATCHES, self.args.seed)


def with_lora(model: PreTrainedModel, parameters: int, seed: int) -> PreTrainedModel:
    """Freeze a model and add LoRA to all of its linear layers but the head (alpha twice the rank).

    Args:
        model: the model.
        parameters: about so many are added: the rank is what comes nearest.
        seed: of the new weights.
    """
    head = model.get_output_embeddings()
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear) and module is not head]
    of_rank_1 = sum(module.in_features + module.out_features for module in linear)
    rank = max(1, round(parameters / of_rank_1))
    set_seed(seed)
    config = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    adapted: Any = get_peft_model(model, config)
    _freeze_head(model)
    return adapted


def load_lora(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """A model with the LoRA that its `save_pretrained` left in a folder, in the model's dtype."""
    adapted: Any = PeftModel.from_pretrained(model, str(folder), autocast_adapter_dtype=False)
    _freeze_head(model)
    return adapted.eval()


def _freeze_head(model: PreTrainedModel) -> None:
    head = model.get_output_embeddings()
    if head is not None:  # frozen by PEFT, and as quick as a composition's
        head.register_forward_pre_hook(contiguous_input)


def train_composition(
    anchor: str | Path,
    augmenting: str | Path,
    examples: Sequence[Example],
    texts: Sequence[str],
    settings: Settings,
    fit: Fit,
    seed: int,
    folder: Path,
    *,
    attend: str = "causal",
) -> TrainingResult:
    """Compose two models and train the connections, going on from the last checkpoint if there is one.

    Args:
        anchor: `m_B`.
        augmenting: `m_A`.
        examples: `D_C`.
        texts: learned as they are beside it.
        settings: connections, types and lengths.
        fit: steps, rows and learning rate.
        seed: of the connections' weights and of the order.
        folder: where the composition is left.
        attend: "causal", or "prompt" for `m_A` as an encoder.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "train.jsonl"
    rows = [*(example._asdict() for example in examples), *({"text": text} for text in texts)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    connections = settings.connections
    recipe = check_recipe(
        {
            "anchor": str(anchor),
            "augmenting": str(augmenting),
            "connections": connections if isinstance(connections, int) else [list(pair) for pair in connections],
            "num_heads": settings.num_heads,
            "attend": attend,
            "dtype": settings.dtype,
            "data": {"train": str(data), "max_length": settings.max_length, "augmenting_outputs": "memory"},
            "training": {
                "output_dir": str(folder),
                "max_steps": fit.steps,
                "per_device_batch_size": fit.rows // BATCHES,
                "gradient_accumulation": BATCHES,
                "learning_rate": fit.learning_rate,
                "keep_checkpoints": 1,
                "seed": seed,
                "bf16": settings.dtype == "bfloat16",
            },
        }
    )
    return train(recipe, resume=get_last_checkpoint(str(folder)) is not None)
