"""The stages of a run: two bases, then the composition and its ablations; each is kept on disk once it is done."""

from __future__ import annotations

import dataclasses
import json
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import calm
from calm.experiments.key_value_arithmetic import bases
from calm.experiments.key_value_arithmetic.data import TASKS, Task, TaskName, build_tokenizer
from calm.experiments.key_value_arithmetic.evaluate import evaluate, numeric_perplexity, percent_right
from calm.experiments.key_value_arithmetic.lines import Batches, Line, composition_line
from calm.experiments.key_value_arithmetic.mixing import Mixed
from calm.experiments.key_value_arithmetic.recipe import Recipe
from calm.experiments.key_value_arithmetic.training import Report, fit
from calm.experiments.steps import fingerprint, write_json

RESULT_FILE = "stage.json"


@dataclass(frozen=True)
class Stage:
    """One trained model.

    Args:
        name: its row in the table.
        folder: where it is kept, below the run's folder.
        needs: names of the stages that come before it.
    """

    name: str
    folder: str
    needs: tuple[str, ...] = ()


# In the order in which they should start: what others wait for first.
STAGES = (
    Stage("m_A", "augmenting"),
    Stage("m_B", "anchor"),
    Stage("composed", "composed", ("m_A", "m_B")),
    Stage("encoder_m_A", "ablations/encoder", ("m_A", "m_B")),
    Stage("random_m_A", "ablations/random", ("m_B",)),
    Stage("vanilla_base", "ablations/vanilla_augmenting"),
    Stage("vanilla_m_A", "ablations/vanilla", ("vanilla_base", "m_B")),
)
FOLDERS = {stage.name: stage.folder for stage in STAGES}


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind.

    Args:
        fingerprint: of everything that it depends on.
        accuracy: percent by task, on held-out keys.
        right: by task, "1" or "0" for each expression; the same expressions for every stage of a run.
        perplexity: of the answers to NUM-MATH.
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
    answers: list[tuple[str, str, str]]
    steps: int
    seconds: float
    cpu_seconds: float
    training_seconds: float
    trainable_parameters: int
    learning_rate: float | None
    searched: dict[str, float]


@dataclass(frozen=True)
class Trained:
    """What training gave.

    Args:
        model: the model, in evaluation mode.
        steps: as in `StageResult`, like the others.
        trainable_parameters: see there.
        learning_rate: see there.
        searched: see there.
    """

    model: PreTrainedModel | Mixed
    steps: int
    trainable_parameters: int
    learning_rate: float | None
    searched: Mapping[str, float] = dataclasses.field(default_factory=dict)


def stage_fingerprint(stage: Stage, recipe: Recipe, seed: int) -> str:
    """Changes with whatever would change the stage's result; settings of later stages do not count."""
    parts: list[object] = [stage.name, seed]
    if not stage.needs:
        later = {"composition_training": None, "connections": None, "numeric_share": None}
        other = "anchor" if stage.name != "m_B" else "augmenting"
        later |= {f"{other}_model": None, f"{other}_training": None}
        recipe = dataclasses.replace(recipe, **later)  # type: ignore[arg-type]
    return fingerprint(*parts, dataclasses.replace(recipe, workers=1))


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
    clock = Clock()
    folder = begin(output_dir / stage.folder)
    task, tokenizer = Task.draw(recipe.data, seed), build_tokenizer(recipe.data)
    trained = train(stage.name, task, recipe, tokenizer, seed, output_dir, report)
    clock.trained()
    trained.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return end(folder, stage_fingerprint(stage, recipe, seed), trained, clock, task, recipe, seed)


def train(
    name: str,
    task: Task,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerFast,
    seed: int,
    output_dir: Path,
    report: Report,
) -> Trained:
    """Train the model of one of the `STAGES`; arguments as for `run_stage`."""
    if name in ("m_A", "vanilla_base"):
        known = task if name == "m_A" else task.revalued(seed)
        augmenting, steps = bases.train_augmenting(known, recipe, tokenizer, seed, report)
        return Trained(augmenting, steps, trainable(augmenting), recipe.augmenting_training.learning_rate)
    if name == "m_B":
        anchor, steps = bases.train_anchor(task, recipe, tokenizer, seed, report)
        return Trained(anchor, steps, trainable(anchor), recipe.anchor_training.learning_rate)
    source = output_dir / FOLDERS["vanilla_base" if name == "vanilla_m_A" else "m_A"]
    if name == "random_m_A":
        source = output_dir / FOLDERS[name] / "augmenting"
        bases.new_augmenting(recipe.augmenting_model, tokenizer, seed).save_pretrained(source)
        tokenizer.save_pretrained(source)
    attend = "prompt" if name == "encoder_m_A" else "causal"
    return compose_and_train(output_dir / FOLDERS["m_B"], source, task, recipe, seed, report, attend)


def compose_and_train(
    anchor: Path, augmenting: Path, task: Task, recipe: Recipe, seed: int, report: Report, attend: str = "causal"
) -> Trained:
    """Compose two bases and train the connections on `D_C`.

    Args:
        anchor: the folder of `m_B`.
        augmenting: the folder of the augmenting model.
        task: keys, values and the split.
        recipe: sizes and lengths.
        seed: of weights and data.
        report: is told about progress.
        attend: as for `calm.compose`.
    """
    torch.manual_seed(seed)
    model = calm.compose(str(anchor), str(augmenting), recipe.connections, attend=attend)
    steps = train_composition(model, task, recipe, seed, report)
    return Trained(model, steps, trainable(model), recipe.composition_training.learning_rate)


def train_composition(model: calm.CalmForCausalLM, task: Task, recipe: Recipe, seed: int, report: Report) -> int:
    """Train the connections on `D_C`: KV-MATH over the composition keys, and some NUM-MATH.

    Args:
        model: trained in place.
        task: keys, values and the split.
        recipe: lengths and shares.
        seed: of the data.
        report: is told about progress.

    Returns:
        The number of steps.
    """

    def draw(rng: random.Random, step: int) -> list[Line]:
        return [composition_line(task, rng, recipe.numeric_share) for _ in range(recipe.composition_training.rows)]

    vocabulary = build_tokenizer(recipe.data).get_vocab()
    batches = Batches(draw, vocabulary, recipe.composition_training.steps, f"D_C {seed}")
    return fit(model, batches, recipe.composition_training, seed, report, hardware=recipe.hardware)


def trainable(model: PreTrainedModel) -> int:
    """How many numbers of a model are trained."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


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
    names: Sequence[TaskName] = TASKS,
    right: Mapping[str, str] | None = None,
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
        names: what is asked.
        right: what else was asked, as in `StageResult`.
    """
    tokenizer = build_tokenizer(recipe.data)
    answers = evaluate(trained.model, tokenizer, task, recipe.evaluation_examples, seed, names)
    asked: dict[str, str] = {**(right or {})}
    asked |= {name: "".join(str(int(answer.right)) for answer in answers[name]) for name in names}
    result = StageResult(
        fingerprint=identity,
        accuracy={name: percent_right(flags) for name, flags in asked.items()},
        right=asked,
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
