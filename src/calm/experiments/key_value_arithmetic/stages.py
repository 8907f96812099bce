"""The stages of a run: two bases, then the composition and its ablations; each is kept on disk once it is done."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from calm.experiments.key_value_arithmetic import bases
from calm.experiments.key_value_arithmetic.composition import compose_and_train
from calm.experiments.key_value_arithmetic.data import TASKS, Task, build_tokenizer
from calm.experiments.key_value_arithmetic.evaluate import (
    evaluate,
    flags_of,
    numeric_perplexity,
    percent_right,
)
from calm.experiments.key_value_arithmetic.mixing import Mixed
from calm.experiments.key_value_arithmetic.recipe import RATES, Recipe
from calm.experiments.key_value_arithmetic.training import Report, Trained, trainable
from calm.experiments.methods.mixing import WEIGHTS
from calm.experiments.steps import fingerprint, write_json

RESULT_FILE = "stage.json"


@dataclass(frozen=True)
class Stage:
    """One trained model.

    Args:
        name: its row in the table.
        folder: where it is kept, below the run's folder.
        needs: names of the stages that come before it, in every recipe.
        varied: of a point on a curve, a setting and its value: "composition_share", "connections", or
            "augmenting_steps".
    """

    name: str
    folder: str
    needs: tuple[str, ...] = ()
    varied: tuple[str, float] | None = None


# In the order in which they should start: what others wait for first.
STAGES = (
    Stage("m_B", "anchor"),
    Stage("m_A", "augmenting"),
    Stage("composed", "composed", ("m_A", "m_B")),
    Stage("encoder_m_A", "ablations/encoder", ("m_A", "m_B")),
    Stage("random_m_A", "ablations/random", ("m_B",)),
    Stage("vanilla_base", "ablations/vanilla_augmenting"),
    Stage("vanilla_m_A", "ablations/vanilla", ("vanilla_base", "m_B")),
)
FOLDERS = {stage.name: stage.folder for stage in STAGES}
BASELINES = (
    Stage("lora", "baselines/lora", ("m_A", "m_B")),
    Stage("full_on_DC", "baselines/full_on_DC", ("m_A", "m_B")),
    Stage("full_on_all", "baselines/full_on_all", ("m_A", "m_B")),
    Stage("mixed_logits", "baselines/mixed_logits", ("m_A", "m_B")),
)
CURVES = (
    *(
        Stage(f"share {share:g}", f"curves/share-{share:g}", ("m_A", "m_B"), ("composition_share", share))
        for share in (0.05, 0.1, 0.4, 0.8)
    ),
    *(
        Stage(f"connections {count}", f"curves/connections-{count}", ("m_A", "m_B"), ("connections", count))
        for count in (1, 2)
    ),
    *(
        Stage(f"m_A {share:g}", f"curves/m_A-{share:g}", ("m_B",), ("augmenting_steps", share))
        for share in (0.1, 0.2, 0.3)
    ),
)


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind.

    Args:
        fingerprint: of everything that it depends on.
        accuracy: percent by task, on held-out keys.
        right: by task, "1" or "0" for each expression; the same expressions for every stage of a run.
        perplexity: of the answers to NUM-MATH.
        parameters: how many numbers the model has; of a composition or a mixture with those of both bases.
        answers: prompt, expected and given text of the first KV-MATH expressions.
        steps: training steps.
        seconds: wall clock of training and evaluation.
        cpu_seconds: processor time of the same.
        training_seconds: wall clock of training alone.
        trainable_parameters: how many numbers were trained.
        learning_rate: that of the training, None where nothing was trained.
        searched: what was tried (learning rates, or m_A's weights in a mixture), with the percent of validation
            expressions that came out right.
    """

    fingerprint: str
    accuracy: dict[str, float]
    right: dict[str, str]
    perplexity: float
    parameters: int
    answers: list[tuple[str, str, str]]
    steps: int
    seconds: float
    cpu_seconds: float
    training_seconds: float
    trainable_parameters: int
    learning_rate: float | None
    searched: dict[str, float]


def needs(stage: Stage, recipe: Recipe) -> tuple[str, ...]:
    """Names of the stages that come before one."""
    return ("m_B",) if recipe.shared_embeddings and stage.name in ("m_A", "vanilla_base") else stage.needs


def missing(wanted: Sequence[Stage], finished: Mapping[str, StageResult], recipe: Recipe) -> list[Stage]:
    """The stages that have to be run: those without a result, and those that come after one of them."""
    return [stage for stage in wanted if not {stage.name, *needs(stage, recipe)} <= finished.keys()]


def stage_fingerprint(stage: Stage, recipe: Recipe, seed: int) -> str:
    """Changes with whatever would change the stage's result; settings of later stages do not count."""
    without = {"workers"}
    if stage.name != "full_on_all":
        without.add("steps_on_all")
    if not stage.needs:
        without |= {"composition_training", "connections", "numeric_share", "frozen_queries_and_keys"}
        if stage.name == "m_B":
            without |= {"augmenting_model", "augmenting_training", "shared_embeddings"}
            without |= {"glossary_entries", "glossary_share"}
        elif not recipe.shared_embeddings:
            without |= {"anchor_model", "anchor_training", "with_unknowns", "written_down", "superposition"}
    settings = {name: value for name, value in dataclasses.asdict(recipe).items() if name not in without}
    tried = WEIGHTS if stage.name == "mixed_logits" else RATES.get(stage.name)
    made_by = [importlib.metadata.version("peft")] if stage.name == "lora" else []
    return fingerprint(stage.name, seed, settings, tried, *made_by)


def kept(stage: Stage, recipe: Recipe, seed: int, output_dir: Path) -> StageResult | None:
    """The result of an earlier run with the same settings, if it finished."""
    return kept_as(stage_fingerprint(stage, recipe, seed), output_dir / stage.folder)


def kept_as(identity: str, folder: Path) -> StageResult | None:
    """The result that is kept in a folder, if it has that fingerprint."""
    try:
        result = StageResult(**json.loads((folder / RESULT_FILE).read_text()))
    except (OSError, ValueError, TypeError):  # missing, or cut off, or of another version: trained again
        return None
    return result if result.fingerprint == identity else None


def run_stage(stage: Stage, recipe: Recipe, seed: int, output_dir: Path, report: Report) -> StageResult:
    """Train, evaluate and save one model.

    Args:
        stage: which.
        recipe: sizes and lengths.
        seed: of the whole run.
        output_dir: the run's folder; the stages that this one needs are there.
        report: is told about progress.
    """
    identity = stage_fingerprint(stage, recipe, seed)
    clock = Clock()
    folder = begin(output_dir / stage.folder)
    tokenizer = build_tokenizer(recipe.data)
    right: dict[str, str] = {}
    if stage.varied is None:
        task = Task.draw(recipe.data, seed)
        trained = train(stage.name, task, recipe, tokenizer, seed, output_dir, report)
    else:
        recipe = vary(recipe, stage.varied)
        task = Task.draw(recipe.data, seed)
        source = output_dir / FOLDERS["m_A"]
        if stage.varied[0] == "augmenting_steps":
            source = folder / "augmenting"
            augmenting, _ = bases.train_augmenting(
                task, recipe, tokenizer, seed, report, _embeddings(recipe, output_dir)
            )
            augmenting.save_pretrained(source)
            tokenizer.save_pretrained(source)
            asked = evaluate(augmenting, tokenizer, task, recipe.evaluation_examples, seed, ("KV-SUBS",))
            right["m_A KV-SUBS"] = flags_of(asked["KV-SUBS"])
        trained = compose_and_train(output_dir / FOLDERS["m_B"], source, task, recipe, seed, report)
        # the same keys for every point, which none of them is trained on
        task = dataclasses.replace(task, held_out_keys=task.held_out_keys[-round(len(task.values) * 0.2) :])
    clock.trained()
    if not isinstance(trained.model, Mixed):
        trained.model.save_pretrained(str(folder))
        tokenizer.save_pretrained(folder)
    return end(folder, identity, trained, clock, task, recipe, seed, right=right)


def vary(recipe: Recipe, varied: tuple[str, float]) -> Recipe:
    """The recipe with one setting changed, as `Stage.varied` names it."""
    setting, value = varied
    if setting == "composition_share":
        return dataclasses.replace(recipe, data=dataclasses.replace(recipe.data, composition_share=value))
    if setting == "connections":
        count, pairs = int(value), recipe.connections
        return dataclasses.replace(recipe, connections=count if isinstance(pairs, int) else pairs[:count])
    training = recipe.augmenting_training
    shorter = dataclasses.replace(training, steps=max(1, round(value * training.steps)))
    return dataclasses.replace(recipe, augmenting_training=shorter)


def train(
    name: str,
    task: Task,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    output_dir: Path,
    report: Report,
) -> Trained:
    """Train the model of one of the `STAGES` or `BASELINES`; arguments as for `run_stage`."""
    if name in {stage.name for stage in BASELINES}:
        from calm.experiments.key_value_arithmetic import baselines  # needs PEFT, which the demo does without

        anchor, augmenting = (output_dir / FOLDERS[base] for base in ("m_B", "m_A"))
        return baselines.train_baseline(name, anchor, augmenting, task, recipe, tokenizer, seed, report)
    if name in ("m_A", "vanilla_base"):
        known = task if name == "m_A" else task.revalued(seed)
        embeddings = _embeddings(recipe, output_dir)
        specialist, steps = bases.train_augmenting(known, recipe, tokenizer, seed, report, embeddings)
        return Trained(specialist, steps, trainable(specialist), recipe.augmenting_training.learning_rate)
    if name == "m_B":
        arithmetician, steps = bases.train_anchor(task, recipe, tokenizer, seed, report)
        return Trained(arithmetician, steps, trainable(arithmetician), recipe.anchor_training.learning_rate)
    source = output_dir / FOLDERS["vanilla_base" if name == "vanilla_m_A" else "m_A"]
    if name == "random_m_A":
        source = output_dir / FOLDERS[name] / "augmenting"
        embeddings = _embeddings(recipe, output_dir)
        bases.new_augmenting(recipe.augmenting_model, tokenizer, seed, embeddings).save_pretrained(source)
        tokenizer.save_pretrained(source)
    attend = "prompt" if name == "encoder_m_A" else "causal"
    return compose_and_train(output_dir / FOLDERS["m_B"], source, task, recipe, seed, report, attend)


def _embeddings(recipe: Recipe, output_dir: Path) -> Tensor | None:
    """Those of `m_B`, where `m_A` has the same."""
    if not recipe.shared_embeddings:
        return None
    anchor = AutoModelForCausalLM.from_pretrained(output_dir / FOLDERS["m_B"])
    weight: Tensor = anchor.get_input_embeddings().weight.detach()
    return weight


# ---------------------------------------------------------------------------------------------------------------------
# What every stage begins and ends with


class Clock:
    """Seconds since it was made, and what of them was training."""

    def __init__(self) -> None:
        self.started, self.started_cpu, self.training = time.perf_counter(), time.process_time(), 0.0

    def trained(self) -> None:
        """Training ends here."""
        self.training = time.perf_counter() - self.started

    def read(self) -> dict[str, float]:
        """The three numbers of `StageResult`."""
        return {
            "seconds": round(time.perf_counter() - self.started, 1),
            "cpu_seconds": round(time.process_time() - self.started_cpu, 1),
            "training_seconds": round(self.training, 1),
        }


def begin(folder: Path) -> Path:
    """Make a stage's folder, without a result from before."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).unlink(missing_ok=True)
    return folder


def end(
    folder: Path,
    identity: str,
    trained: Trained,
    clock: Clock,
    task: Task,
    recipe: Recipe,
    seed: int,
    right: Mapping[str, str],
) -> StageResult:
    """Evaluate what a stage trained, and keep the result.

    Args:
        folder: the stage's.
        identity: the fingerprint that the result is found by.
        trained: what to evaluate.
        clock: runs since the stage began.
        task: whose held-out keys are asked for.
        recipe: how many expressions.
        seed: of the expressions.
        right: what else was asked, as in `StageResult`.
    """
    tokenizer = build_tokenizer(recipe.data)
    answers = evaluate(trained.model, tokenizer, task, recipe.evaluation_examples, seed)
    asked = dict(right) | {str(name): flags_of(answers[name]) for name in TASKS}
    result = StageResult(
        fingerprint=identity,
        accuracy={name: percent_right(flags) for name, flags in asked.items()},
        right=asked,
        parameters=sum(parameter.numel() for parameter in trained.model.parameters()),
        perplexity=numeric_perplexity(trained.model, tokenizer, task, recipe.evaluation_examples, seed),
        answers=[(answer.prompt, answer.expected, answer.given) for answer in answers["KV-MATH"][:100]],
        steps=trained.steps,
        trainable_parameters=trained.trainable_parameters,
        learning_rate=trained.learning_rate,
        searched=dict(trained.searched),
        **clock.read(),
    )
    write_json(folder / RESULT_FILE, dataclasses.asdict(result))
    return result
