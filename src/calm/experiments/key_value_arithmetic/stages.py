"""The stages of a run: two bases, then the composition and its ablations; each is kept on disk once it is done."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import calm
from calm.experiments.key_value_arithmetic import bases
from calm.experiments.key_value_arithmetic import recipe as recipes
from calm.experiments.key_value_arithmetic.data import TASKS, Task, build_tokenizer
from calm.experiments.key_value_arithmetic.evaluate import evaluate, percent_right
from calm.experiments.key_value_arithmetic.lines import Batches, Line, composition_line
from calm.experiments.key_value_arithmetic.recipe import Recipe
from calm.experiments.key_value_arithmetic.training import Report, fit

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


@dataclass(frozen=True)
class StageResult:
    """What a stage leaves behind.

    Args:
        fingerprint: of everything that it depends on.
        accuracy: percent by task, on held-out keys.
        answers: prompt, expected and given text of the first KV-MATH expressions.
        steps: training steps.
        seconds: wall clock of training and evaluation.
        cpu_seconds: processor time of the same.
    """

    fingerprint: str
    accuracy: dict[str, float]
    answers: list[tuple[str, str, str]]
    steps: int
    seconds: float
    cpu_seconds: float


def stage_fingerprint(stage: Stage, recipe: Recipe, seed: int) -> str:
    """Changes with whatever would change the stage's result; settings of later stages do not count."""
    parts: list[object] = [stage.name, seed]
    if not stage.needs:
        later = {"composition_training": None, "connections": None, "numeric_share": None}
        other = "anchor" if stage.name != "m_B" else "augmenting"
        later |= {f"{other}_model": None, f"{other}_training": None}
        recipe = dataclasses.replace(recipe, **later)  # type: ignore[arg-type]
    return recipes.fingerprint(*parts, dataclasses.replace(recipe, workers=1))


def kept(stage: Stage, recipe: Recipe, seed: int, output_dir: Path) -> StageResult | None:
    """The result of an earlier run with the same settings, if it finished."""
    try:
        result = StageResult(**json.loads((output_dir / stage.folder / RESULT_FILE).read_text()))
    except (OSError, ValueError, TypeError):  # missing, or cut off, or of another version: trained again
        return None
    return result if result.fingerprint == stage_fingerprint(stage, recipe, seed) else None


def run_stage(stage: Stage, recipe: Recipe, seed: int, output_dir: Path, report: Report) -> StageResult:
    """Train, evaluate and save one model.

    Args:
        stage: which.
        recipe: sizes and lengths.
        seed: of the whole run.
        output_dir: the run's folder; the stages that this one needs are there.
        report: is told about progress.
    """
    started, started_cpu = time.perf_counter(), time.process_time()
    folder = output_dir / stage.folder
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT_FILE).unlink(missing_ok=True)
    task = Task.draw(recipe.data, seed)
    tokenizer = build_tokenizer(recipe.data)

    model: PreTrainedModel
    if stage.name == "m_A":
        model, steps = bases.train_augmenting(task, recipe, tokenizer, seed, report)
    elif stage.name == "vanilla_base":
        model, steps = bases.train_augmenting(task.revalued(seed), recipe, tokenizer, seed, report)
    elif stage.name == "m_B":
        model, steps = bases.train_anchor(task, recipe, tokenizer, seed, report)
    else:
        model, steps = compose_and_train(stage.name, task, recipe, seed, output_dir, report)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    answers = evaluate(model, tokenizer, task, recipe.evaluation_examples, seed)
    result = StageResult(
        fingerprint=stage_fingerprint(stage, recipe, seed),
        accuracy={name: percent_right(answers[name]) for name in TASKS},
        answers=[(answer.prompt, answer.expected, answer.given) for answer in answers["KV-MATH"][:100]],
        steps=steps,
        seconds=round(time.perf_counter() - started, 1),
        cpu_seconds=round(time.process_time() - started_cpu, 1),
    )
    write_json(folder / RESULT_FILE, dataclasses.asdict(result))
    return result


def compose_and_train(
    name: str, task: Task, recipe: Recipe, seed: int, output_dir: Path, report: Report
) -> tuple[calm.CalmForCausalLM, int]:
    """Compose `m_B` with the augmenting model of that row and train the connections on `D_C`.

    Args:
        name: the row of the table.
        task: keys, values and the split.
        recipe: sizes and lengths.
        seed: of weights and data.
        output_dir: where the bases are.
        report: is told about progress.

    Returns:
        The composed model and the number of steps.
    """
    folders = {stage.name: output_dir / stage.folder for stage in STAGES}
    anchor = folders["m_B"]
    augmenting: str | Path | PreTrainedModel = folders["vanilla_base" if name == "vanilla_m_A" else "m_A"]
    if name == "random_m_A":
        augmenting = folders[name] / "augmenting"
        tokenizer = build_tokenizer(recipe.data)
        bases.new_augmenting(recipe.augmenting_model, tokenizer, seed).save_pretrained(augmenting)
        tokenizer.save_pretrained(augmenting)
    torch.manual_seed(seed)
    model = calm.compose(
        str(anchor), str(augmenting), recipe.connections, attend="prompt" if name == "encoder_m_A" else "causal"
    )
    return model, train_composition(model, task, recipe, seed, report)


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
    return fit(model, batches, recipe.composition_training, seed, report)


def read_json(path: Path, default: Any) -> Any:
    """What `write_json` wrote, or `default` if there is no such file."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else default


def write_json(path: Path, content: object) -> None:
    """Write a file that is either whole or not there."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)
