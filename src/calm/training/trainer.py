"""Trains a composition with the transformers Trainer: exact resume, whole checkpoints only, the best model kept."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from accelerate.utils import parse_flag_from_env
from transformers import EarlyStoppingCallback, TrainingArguments, set_seed
from transformers.integrations import get_available_reporting_integrations, is_fsdp_enabled, unset_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint

import calm
from calm.backbones import check_documents_apart, smallest_context
from calm.config import CalmConfig, depth_of
from calm.connections import choose_pairs
from calm.data import CompletionCollator, Row, is_file_source, load_examples, load_tokenizer, pack
from calm.errors import CalmError, CheckpointError
from calm.freezing import check_activation_checkpointing
from calm.sources import Source, load_config
from calm.training import augmenting_outputs
from calm.training.loop import CompositionTrainer, LogBeforeSaving, SaveAndStop, WholeBatches, saves_on_interrupt
from calm.training.quantization import quantization_config
from calm.training.recipe import Recipe
from calm.training.statistics import STATISTICS, ConnectionStatistics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import PreTrainedTokenizerBase

    from calm.model import CalmForCausalLM

logger = logging.getLogger(__name__)

RECIPE_FILE = "recipe.json"
DIGESTS = "data_digests"  # beside the fields of the recipe, in its file
LOG_FILE = "training_log.json"
PLOT_FILE = "loss.png"
CONNECTIONS_PLOT_FILE = "connections.png"


@dataclass(frozen=True)
class TrainingResult:
    """What a finished training run did.

    Attributes:
        output_dir: Where the final model, its tokenizer, `training_log.json` and `loss.png` are.
        steps: Optimiser steps of the whole run, those before a resume included.
        resumed_from: The step that this call went on from, or None.
        best_step: The step of the saved model: with `data.eval` the one with the lowest evaluation loss, else the last.
        train_loss: The training loss logged last, in nats per learned token.
        eval_loss: The saved model's evaluation loss, in nats per learned token; None without `data.eval`.
        stopped_early: Whether early stopping ended the run.
        train_examples: How many examples were trained on.
        trainable_parameters: How many parameters were trained.
        seconds: Wall-clock time that this call trained for.
    """

    output_dir: str
    steps: int
    resumed_from: int | None
    best_step: int
    train_loss: float | None
    eval_loss: float | None
    stopped_early: bool
    train_examples: int
    trainable_parameters: int
    seconds: float


class TrainingInterrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM in training, after a checkpoint was saved; the message says where."""


def train(recipe: Recipe, *, resume: bool = False) -> TrainingResult:
    """Compose the recipe's models, train the composition parameters and save the best model.

    Args:
        recipe: From `load_recipe`.
        resume: Go on from the last checkpoint in the recipe's `output_dir`. The losses are then those that the
            uninterrupted run would have had. If the recipe has changed, with a warning, it holds from then on. The
            models are taken from where the recipe says they are now; other weights are refused.

    Returns:
        What was done; `training_log.json` in `output_dir` has the same, every logged loss and the recipe.

    Raises:
        CalmError: If the data cannot be used, if the models do not fit together, if `output_dir` already holds
            checkpoints or the log of a finished run (without `resume`) or no checkpoints (with it), if a checkpoint
            cannot be written, or if the loss is not a finite number.
        TrainingInterrupted: After Ctrl-C or SIGTERM, with a checkpoint saved.
    """
    output_dir = Path(recipe.training.output_dir).absolute()
    _check_loggers(recipe)
    dtype = getattr(torch, recipe.dtype)
    load_kwargs = {
        "dtype": dtype,
        "attn_implementation": recipe.attn_implementation,
        "quantization_config": quantization_config(recipe.quantization, dtype),
    }
    arguments = _arguments(recipe, output_dir)  # from here on the processes of a distributed run know one another
    _check_launch(recipe)
    with arguments.main_process_first(local=False, desc="looking at output_dir"):
        checkpoint = _check_output_dir(output_dir, recipe, resume, arguments.world_size)
    if checkpoint is not None and (finished := _finished_result(output_dir, recipe)) is not None:
        logger.warning("%s: this run is finished, so there is nothing to resume", output_dir)
        return finished
    tokenizer = load_tokenizer(recipe.anchor)
    train_data, eval_data, examples = _load_data(recipe, tokenizer)

    kept_dirs = _kept_dirs(recipe, output_dir, {"training": train_data, "evaluation": eval_data})
    kept_before = bool(kept_dirs) and all(augmenting_outputs.is_kept(path) for path in kept_dirs.values())
    set_seed(recipe.training.seed)  # the new connections' weights
    model = _load_model(recipe, checkpoint, load_kwargs, load_augmenting=not kept_before)
    if kept_before:
        for name, reference in augmenting_outputs.references(kept_dirs["training"]).items():
            # what only a loaded model tells; where it lies may have changed since
            told = {key: reference[key] for key in ("fingerprint", "dtype", "loaded_with") if key in reference}
            recorded, base = model.config.augmenting_references[name], recipe.augmenting_by_name[name]
            if recorded.get("fingerprint") not in (None, {}, reference["fingerprint"]):
                raise CheckpointError(
                    f"augmenting: {base!r} holds other weights than those that {checkpoint} was trained against (its "
                    "outputs were kept by another run); put the right model there, or give another training.output_dir"
                )
            recorded |= told | Source.parse(base).reference()
    if recipe.data.packing:
        check_documents_apart(model.anchor, model.augmenting)
    if arguments.should_save:
        begun_with = recipe.model_dump(mode="json") | {DIGESTS: _digests_of_data(recipe)}
        _write_whole(output_dir / RECIPE_FILE, json.dumps(begun_with, indent=2))
    on_interrupt = SaveAndStop()
    trainer = CompositionTrainer(
        model=model,
        args=arguments,
        train_dataset=train_data,
        eval_dataset=eval_data,
        data_collator=CompletionCollator.for_tokenizer(tokenizer),
        callbacks=[LogBeforeSaving(), on_interrupt, ConnectionStatistics(model)],
    )
    if recipe.data.augmenting_outputs != "recompute":
        _keep_augmenting_outputs(trainer, model, kept_dirs)
    if arguments.world_size > 1:
        batch_size = recipe.training.per_device_batch_size * arguments.world_size
        trainer.train_dataset = WholeBatches(trainer.train_dataset, batch_size)
        if trainer.eval_dataset is not None:
            trainer.eval_dataset = WholeBatches(trainer.eval_dataset, batch_size)
    patience = recipe.training.early_stopping_patience
    if patience is not None:
        trainer.add_callback(EarlyStoppingCallback(patience))
    with saves_on_interrupt(on_interrupt):
        output = trainer.train(resume_from_checkpoint=checkpoint)
    state = trainer.state
    if on_interrupt.stopped and state.global_step < state.max_steps:
        raise TrainingInterrupted(
            f"interrupted at step {state.global_step} of {state.max_steps}; "
            f"{output_dir / f'{PREFIX_CHECKPOINT_DIR}-{state.global_step}'} holds everything to resume from"
        )

    result = TrainingResult(
        output_dir=recipe.training.output_dir,
        steps=state.global_step,
        resumed_from=None if checkpoint is None else _step_of(checkpoint),
        best_step=state.best_global_step or state.global_step,
        train_loss=next((log["loss"] for log in reversed(state.log_history) if "loss" in log), None),
        eval_loss=state.best_metric,
        stopped_early=state.global_step < state.max_steps,
        train_examples=examples,
        trainable_parameters=model.get_nb_trainable_parameters()[0],
        seconds=round(output.metrics["train_runtime"], 1),
    )
    try:
        trainer.save_model()  # the best one: the Trainer has loaded it back
        if arguments.should_save:
            tokenizer.save_pretrained(output_dir)
            _plot_losses(output_dir, state.log_history)
            _plot_connections(output_dir, state.log_history, model.config)
            _write_log(output_dir, recipe, result, state.log_history)
    except (CheckpointError, OSError) as error:
        best = f"{PREFIX_CHECKPOINT_DIR}-{result.best_step}"
        raise CalmError(
            f"training is done and {output_dir / best} holds the model, but saving it failed: {error}"
        ) from error
    trainer.accelerator.wait_for_everyone()  # launchers end the others when one process ends badly, however late
    return result


def _check_output_dir(output_dir: Path, recipe: Recipe, resume: bool, processes: int) -> str | None:
    """Make `output_dir` and find the checkpoint to resume from; refuse to mix two runs in one directory."""
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise CalmError(
            f"training.output_dir = {recipe.training.output_dir!r} cannot be written to: {error}"
        ) from error
    for stale in (*output_dir.glob(".saving-*"), *output_dir.glob(".deleting-*")):  # of a run that was killed meanwhile
        shutil.rmtree(stale, ignore_errors=True)
    last = get_last_checkpoint(output_dir)
    if not resume:
        if last is not None:
            raise CalmError(
                f"{output_dir} already holds a run's checkpoints (the last is {Path(last).name}); resume it with "
                "--resume (in Python: resume=True), or give another training.output_dir"
            )
        if (output_dir / LOG_FILE).exists():  # a later resume would take it for the log of the run that begins here
            raise CalmError(
                f"{output_dir} already holds a finished run (its {LOG_FILE}, though no checkpoint); give another "
                "training.output_dir, or delete that file to have the new run replace the old one's model"
            )
        return None
    if last is None:
        raise CalmError(f"{output_dir} holds no checkpoint to resume from; start the run without --resume")
    try:
        before = json.loads((output_dir / RECIPE_FILE).read_text())
    except (OSError, ValueError) as error:
        raise CalmError(
            f"{output_dir / RECIPE_FILE}, the recipe that the run was begun with, cannot be read: {error}"
        ) from error
    digests = before.pop(DIGESTS, {})  # of a run that an older version began there are none
    now = recipe.model_dump(mode="json")
    changed = _differences(before, now)
    for field, digest in _digests_of_data(recipe).items():
        if field not in changed and digests.get(field, digest) != digest:
            changed[field] = f"{field}: {now['data'][field.removeprefix('data.')]} holds something else"
    places = ("anchor", "augmenting") if _names(before) == _names(now) else ("anchor",)
    moved = [changed.pop(field) for field in list(changed) if field.split(".")[0] in places]
    fixed = [field for field in changed if not field.startswith(("training.", "data."))]
    if fixed:
        raise CalmError(
            f"{output_dir} was trained with another {', '.join(fixed)} ({'; '.join(changed[f] for f in fixed)}), so "
            "its checkpoints do not fit; put the recipe back as it was, or give another training.output_dir"
        )
    if moved:  # fingerprints tell whether they are the same
        logger.warning(
            "%s: the models are not where they were when the run was begun (%s); they have to be the same ones",
            *(output_dir, "; ".join(moved)),
        )
    sizes = [
        values["training"]["per_device_batch_size"] * values["training"]["gradient_accumulation"] * count
        for values, count in ((before, _processes_of(last)), (recipe.model_dump(), processes))
    ]
    for field in ("training.per_device_batch_size", "training.gradient_accumulation"):
        if sizes[0] == sizes[1]:  # in other batches, or on other processes, but the same examples at each step
            changed.pop(field, None)
    if sizes[0] != sizes[1]:
        changed["step"] = (
            f"examples of an optimiser step: {sizes[0]} -> {sizes[1]} (per_device_batch_size x gradient_accumulation "
            f"x {processes} processes)"
        )
    if changed:
        logger.warning(
            "the recipe has changed since %s was begun, so the run will not be what it would have been: %s",
            *(output_dir, "; ".join(changed.values())),
        )
    return last


def _finished_result(output_dir: Path, recipe: Recipe) -> TrainingResult | None:
    """The result of a run of this very recipe, if it came to its end."""
    log = output_dir / LOG_FILE
    if not log.exists():
        return None
    finished = json.loads(log.read_text())
    return TrainingResult(**finished["result"]) if finished["recipe"] == recipe.model_dump(mode="json") else None


def _digests_of_data(recipe: Recipe) -> dict[str, str]:
    """What tells the content of the recipe's data files from another one, by their fields; data sets have none."""
    files = {"data.train": recipe.data.train, "data.eval": recipe.data.eval}
    return {
        field: _digest(Path(file).expanduser())
        for field, file in files.items()
        if file is not None and is_file_source(file)
    }


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(2**20):
            digest.update(block)
    return digest.hexdigest()[:32]


def _differences(before: dict[str, Any], now: dict[str, Any], path: str = "") -> dict[str, str]:
    """The fields that differ, each with "field: before -> now"."""
    found: dict[str, str] = {}
    for key in before | now:
        old, new = before.get(key), now.get(key)
        if isinstance(new, dict) and isinstance(old, dict) and not path:
            found |= _differences(old, new, f"{key}.")
        elif old != new:
            found[f"{path}{key}"] = f"{path}{key}: {old!r} -> {new!r}"
    return found


def _names(recipe: dict[str, Any]) -> set[str]:
    """How the augmenting models of a recipe are called, which is read as it was written: its models may have moved."""
    return set(recipe["augmenting"]) if isinstance(recipe["augmenting"], dict) else {"augmenting"}


def _processes_of(checkpoint: str) -> int:
    """How many processes wrote a checkpoint: each leaves its random state."""
    return max(len(list(Path(checkpoint).glob("rng_state_*.pth"))), 1)


def _step_of(checkpoint: str) -> int:
    return int(Path(checkpoint).name.rpartition("-")[2])


def _load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> tuple[list[Row], list[Row] | None, int]:
    """Read and tokenize the recipe's data, within the smallest context of the models, before any weight is loaded.

    Returns:
        Rows to train on, rows to evaluate on, and how many examples the former hold.
    """
    anchor, *others = (load_config(Source.parse(base)) for base in recipe.bases)
    context, _ = smallest_context(anchor, dict(zip(recipe.augmenting_by_name, others, strict=True)))
    data = recipe.data
    max_length = data.max_length if context is None else min(data.max_length, context)

    def load(source: str, split: str) -> list[Row]:
        return load_examples(
            source, tokenizer, max_length=max_length, config=data.config, split=split, append_eos=data.append_eos
        )

    train_data = load(data.train, data.train_split)
    eval_data = None if data.eval is None else load(data.eval, data.eval_split)
    examples = len(train_data)
    if data.packing:
        train_data = pack(train_data, max_length)
        eval_data = None if eval_data is None else pack(eval_data, max_length)
    return train_data, eval_data, examples


def _kept_dirs(recipe: Recipe, output_dir: Path, data: dict[str, list[Row] | None]) -> dict[str, Path]:
    """Where the augmenting models' outputs for each data set are kept on the disk, or will be; empty if nowhere."""
    if recipe.data.augmenting_outputs != "disk":
        return {}
    directory = Path(recipe.data.augmenting_outputs_dir or output_dir / "augmenting_outputs").absolute()
    augmenting = recipe.augmenting_by_name
    depths = {name: depth_of(load_config(Source.parse(base))) for name, base in augmenting.items()}
    pairs = choose_pairs(recipe.connections, depths, depth_of(load_config(Source.parse(recipe.anchor))))
    layers = {name: sorted({p.augmenting_layer for p in pairs if p.augmenting == name}) for name in augmenting}
    training = recipe.training
    precision = f"{recipe.dtype} {recipe.quantization} {recipe.attn_implementation} {training.bf16} {training.fp16}"
    return {
        name: directory / augmenting_outputs.key_of(augmenting, layers, rows, precision)
        for name, rows in data.items()
        if rows is not None
    }


def _keep_augmenting_outputs(trainer: CompositionTrainer, model: CalmForCausalLM, dirs: dict[str, Path]) -> None:
    """Have the trainer train and evaluate on kept outputs, and let the augmenting models go."""

    def kept(name: str, rows: list[Row]) -> augmenting_outputs.RowsWithOutputs:
        path = dirs.get(name)
        if path is not None and augmenting_outputs.is_kept(path):
            outputs = augmenting_outputs.open_kept(path, rows)
        else:
            batch_size = trainer.args.per_device_train_batch_size
            collator = trainer.data_collator
            outputs = augmenting_outputs.keep(model, rows, collator, trainer.accelerator, batch_size, path)
        return augmenting_outputs.RowsWithOutputs(rows, outputs)

    model.augmenting.to(trainer.accelerator.device)  # where it is sharded, the Trainer has not moved it yet
    trainer.train_dataset = kept("training", trainer.train_dataset)
    if trainer.eval_dataset is not None:
        trainer.eval_dataset = kept("evaluation", trainer.eval_dataset)
    model.release_augmenting()


def _check_launch(recipe: Recipe) -> None:
    """Refuse what cannot be sharded, and see to it that each process loads the frozen models, which it compares."""
    sharded = any(parse_flag_from_env(f"ACCELERATE_USE_{engine}") for engine in ("FSDP", "DEEPSPEED"))
    if sharded and recipe.quantization == "int8":
        raise CalmError(
            "quantization = 'int8': FSDP and DeepSpeed cannot shard torchao's weights; take nf4, which they can, or "
            "data parallelism (torchrun, or examples/accelerate/ddp.yaml)"
        )
    if is_fsdp_enabled():  # transformers means by it that this flag is set
        raise CalmError(
            "fsdp_cpu_ram_efficient_loading = true: only one process of a node would load the frozen models, and each "
            "compares them with those that a checkpoint was trained against; set it to false, as in "
            "examples/accelerate/fsdp2.yaml"
        )
    unset_hf_deepspeed_config()  # which would have ZeRO-3 shard weights as they are loaded


def _check_loggers(recipe: Recipe) -> None:
    """Refuse a logger that is not there, before the models are loaded."""
    available = get_available_reporting_integrations()
    for name in recipe.training.report_to:
        if name not in available:
            raise CalmError(
                f"training.report_to = {name!r}: not installed, or unknown to transformers; installed here: "
                f"{', '.join(available) or 'none'}"
            )


def _load_model(
    recipe: Recipe, checkpoint: str | None, load_kwargs: dict[str, Any], load_augmenting: bool
) -> CalmForCausalLM:
    """Compose the models anew, or load a checkpoint, which also checks that the bases are still the same ones.

    What is trained is kept in float32 whatever the bases' dtype is: small updates vanish in bfloat16.
    """
    if checkpoint is not None:  # its weights, rounded here to the bases' dtype, are read again by the Trainer
        model = calm.CalmForCausalLM.from_pretrained(
            checkpoint, anchor=recipe.anchor, augmenting=recipe.augmenting if load_augmenting else {}, **load_kwargs
        )
    else:
        model = calm.compose(
            recipe.anchor,
            recipe.augmenting,
            recipe.connections,
            num_heads=recipe.num_heads,
            attention=recipe.attention,
            attend=recipe.attend,
            load_augmenting=load_augmenting,
            **load_kwargs,
        )
    model.connections.float()
    return model


def _arguments(recipe: Recipe, output_dir: Path) -> TrainingArguments:
    """The recipe in the words of the transformers Trainer."""
    training, evaluates = recipe.training, recipe.data.eval is not None
    if training.activation_checkpointing:
        check_activation_checkpointing()
    if training.fp16 and not torch.accelerator.is_available():  # accelerate would leave it out without a word
        raise CalmError(
            "training.fp16 = True: float16 with scaled gradients needs a GPU, and torch finds none here; expected "
            "bf16: true, which a CPU can do, or neither"
        )
    arguments = TrainingArguments(
        output_dir=str(output_dir),
        num_train_epochs=training.epochs or 3.0,
        max_steps=training.max_steps or -1,
        per_device_train_batch_size=training.per_device_batch_size,
        per_device_eval_batch_size=training.per_device_batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type="constant_with_warmup" if training.lr_scheduler == "constant" else training.lr_scheduler,
        warmup_steps=training.warmup,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        logging_steps=training.log_steps,
        logging_nan_inf_filter=False,  # a loss that is not a number is an error here
        eval_strategy="steps" if evaluates else "no",
        eval_steps=training.eval_steps,
        prediction_loss_only=True,
        save_strategy="steps",
        save_steps=recipe.save_steps,
        save_total_limit=training.keep_checkpoints,
        load_best_model_at_end=evaluates,
        metric_for_best_model="loss" if evaluates else None,
        greater_is_better=False,
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        seed=training.seed,
        bf16=training.bf16,
        fp16=training.fp16,
        **({"activation_checkpointing": True} if training.activation_checkpointing else {}),  # new in 5.23
        remove_unused_columns=False,
        ddp_find_unused_parameters=False,
        ddp_broadcast_buffers=False,  # those of frozen models do not change
        use_cpu=not torch.accelerator.is_available(),  # else bf16 is refused on a CPU
        dataloader_pin_memory=torch.accelerator.is_available(),
        report_to=training.report_to or "none",
    )
    # With several GPUs and one process the Trainer would wrap the model in DataParallel, whose copies of the model
    # run hooks that belong to the original: it trains on the first GPU instead.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _write_log(output_dir: Path, recipe: Recipe, result: TrainingResult, history: list[dict[str, float]]) -> None:
    log = {
        "result": asdict(result),
        "recipe": recipe.model_dump(mode="json"),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "history": history,
    }
    _write_whole(output_dir / LOG_FILE, json.dumps(log, indent=2))  # its presence says that the run is finished


def _write_whole(path: Path, text: str) -> None:
    """Write a file beside its place and rename it, so that a run that is killed leaves the one from before."""
    staging = path.with_name(f".{path.name}")
    staging.write_text(text)
    staging.replace(path)


def _plot_losses(output_dir: Path, history: list[dict[str, float]]) -> None:
    if (figure := _figure(7, 4)) is None:
        return
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats per learned token)")
    for key, label in (("loss", "training"), ("eval_loss", "evaluation")):
        logs = [log for log in history if key in log]
        if logs:
            axes.plot([log["step"] for log in logs], [log[key] for log in logs], marker=".", label=label)
    axes.legend()
    figure.savefig(output_dir / PLOT_FILE, dpi=120)


def _plot_connections(output_dir: Path, history: list[dict[str, float]], config: CalmConfig) -> None:
    """Draw each connection's statistics over the run: an unused connection lies at the bottom."""
    drawn = {key: label for key, label in STATISTICS.items() if key != "gate" or config.attention == "gated"}
    if (figure := _figure(4 * len(drawn), 4)) is None:
        return
    for axes, (statistic, label) in zip(figure.subplots(1, len(drawn)), drawn.items(), strict=True):
        for index, pair in enumerate(config.layer_pairs):
            key = f"connection_{index}/{statistic}"
            logs = [log for log in history if key in log]
            name = f"{pair.augmenting} {pair.augmenting_layer} \u2192 {pair.anchor_layer}"
            axes.plot([log["step"] for log in logs], [log[key] for log in logs], marker=".", label=name)
        axes.set(xlabel="step", title=label)
        if statistic != "gate":  # which is below zero where what is added has the other sign
            axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    figure.savefig(output_dir / CONNECTIONS_PLOT_FILE, dpi=120)


def _figure(width: float, height: float) -> Figure | None:
    try:
        from matplotlib.figure import Figure
    except ImportError:
        logger.warning("no plots were drawn: matplotlib is not installed (pip install 'calm-lm[train]')")
        return None
    return Figure(figsize=(width, height), layout="constrained")
