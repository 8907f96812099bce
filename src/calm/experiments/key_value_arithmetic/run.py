"""main(): the key-value experiment from nothing to the paper's table, in minutes on two CPU cores."""

from __future__ import annotations

import dataclasses
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console

import calm
from calm.errors import CalmError
from calm.experiments.key_value_arithmetic import report, stages, workers
from calm.experiments.key_value_arithmetic.data import Task
from calm.experiments.key_value_arithmetic.recipe import preset as recipe_of
from calm.experiments.key_value_arithmetic.stages import STAGES, Stage, StageResult
from calm.experiments.steps import read_json, write_json


def main(preset: str = "demo", seed: int = 0, output_dir: str | os.PathLike[str] = "runs/demo") -> dict[str, Any]:
    """Train `m_A` and `m_B`, compose them on 20% of the keys, evaluate on the others, and show the paper's table.

    Leaves the bases in `augmenting/` and `anchor/`, the composition in `composed/`, and `results.json` and, where
    matplotlib is installed, `table.png` in the output directory. Stages that an earlier call finished with the same
    settings are not trained again.

    Args:
        preset: `"demo"`, or `"tiny"`, which only proves that everything runs.
        seed: of the data, the models and their training.
        output_dir: where everything goes.

    Returns:
        What `results.json` holds: `table` (percent by row and task), `held_out_keys`, `seconds` (wall clock, earlier
        calls whose stages were kept included), `seed`, and how it was made.

    Raises:
        CalmError: no such preset, one with direct answers, or a folder that cannot be written to.
        StageFailed: a stage ended with an error.
    """
    recipe = recipe_of(preset)
    if recipe.data.answer != "restate":
        raise CalmError(
            f"preset={preset!r} asks for direct answers; expected 'demo' or 'tiny'. "
            "calm reproduce key_value_arithmetic runs the others."
        )
    if recipe.workers > 1:
        recipe = dataclasses.replace(recipe, workers=min(recipe.workers, os.cpu_count() or 1))
    out = Path(output_dir)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CalmError(f"output_dir={str(out)!r} cannot be written to ({error}); choose another folder.") from error
    console = Console(highlight=False)
    task = Task.draw(recipe.data, seed)
    console.print(
        f"{recipe.data.keys:,d} keys; the composition trains on {len(task.composition_keys)} of them and is tested on "
        f"the other {len(task.held_out_keys)}. Seed {seed}, preset {preset}."
    )

    results = {stage.name: result for stage in STAGES if (result := stages.kept(stage, recipe, seed, out))}
    missing = stages.missing(STAGES, results, recipe)
    kept_stages = [stage.name for stage in STAGES if stage not in missing]
    clock = _Clock(out / "clock.json", go_on=bool(kept_stages))
    if kept_stages:
        console.print(f"Kept from an earlier run ({clock.before:.0f} s): {', '.join(kept_stages)}.")
    with workers.new_progress() as progress:

        def finished(stage: Stage, result: StageResult) -> None:
            results[stage.name] = result
            clock.save()
            accuracies = ", ".join(f"{name} {percent:.1f}%" for name, percent in result.accuracy.items())
            progress.console.print(f"{stage.name}: {result.steps} steps in {result.seconds:.0f} s; {accuracies}")

        workers.run_stages(missing, recipe, seed, out, progress, finished)

    table = {name: results[name].accuracy for name in report.ROWS}
    content = {
        "table": table,
        "held_out_keys": len(task.held_out_keys),
        "seconds": clock.save() if missing else clock.before,
        "seed": seed,
        "preset": preset,
        "kept_stages": kept_stages,
        "stages": {
            name: {"steps": r.steps, "seconds": r.seconds, "cpu_seconds": r.cpu_seconds} for name, r in results.items()
        },
        "settings": dataclasses.asdict(recipe),
        "versions": {
            "calm-lm": calm.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }
    write_json(out / "results.json", content)
    _show(console, content, results, out)
    return content


def _show(console: Console, content: dict[str, Any], results: dict[str, StageResult], out: Path) -> None:
    report.print_table(console, content["table"])
    console.print(f"{content['seconds']:.0f} s. {out / 'results.json'} holds the table.", markup=False, emoji=False)
    try:
        report.save_plot(out / "table.png", content["table"])
        console.print(f"{out / 'table.png'} shows it.", markup=False, emoji=False)
    except ImportError:
        console.print(
            "No plot was drawn: matplotlib is not installed (pip install 'calm-lm[train]')", markup=False, emoji=False
        )
    shown = report.example(results)
    if shown is None:
        return
    prompt, answers = shown
    console.print("\nWhat neither can, both can:", style="bold")
    for name, text in answers.items():
        console.print(
            f"{name:>10}: {prompt} {text}", style="green" if name == "composed" else "red", markup=False, emoji=False
        )
    try_it = (
        f"\nTry it: calm chat {out / 'composed'}\nand type, for example: {prompt}\n"
        f"On a page: calm playground {out / 'composed'} (needs pip install 'calm-lm[serve]')"
    )
    console.print(try_it, markup=False, emoji=False, soft_wrap=True)


class _Clock:
    """Wall-clock seconds, those of earlier calls included whose stages are kept."""

    def __init__(self, path: Path, go_on: bool) -> None:
        self.path, self.started = path, time.perf_counter()
        self.before = float(read_json(path, {"seconds": 0})["seconds"]) if go_on else 0.0

    def save(self) -> float:
        total = round(self.before + time.perf_counter() - self.started, 1)
        write_json(self.path, {"seconds": total})
        return total


if __name__ == "__main__":
    main()
