"""What the folder of a finished run says besides the methods' outcomes: sizes, notes, and how long it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calm.experiments.methods.run import ANY_SEED, Outcome, made
from calm.experiments.methods.settings import Fit, Settings
from calm.experiments.results import METHODS
from calm.experiments.steps import read_json


def parameters_of(folder: Path, seed: int, name: str = "") -> dict[str, int]:
    """Sizes of the models of a finished run: "anchor", "augmenting", and "composition" (its trained parameters)."""
    of_seed = folder / f"seed-{seed}" / name

    def of(path: Path) -> dict[str, Any]:
        return dict(read_json(path, {}).get("result", {}))

    found = {
        "anchor": of(folder / ANY_SEED / name / "m_B.json").get("parameters"),
        "augmenting": of(of_seed / "m_A" / "base.json").get("parameters"),
        "composition": of(of_seed / "composed.json").get("training", {}).get("trainable_parameters"),
    }
    return {name: number for name, number in found.items() if number is not None}


def notes_of(
    folder: Path, settings: Settings, outcomes: Mapping[str, Mapping[int, Mapping[str, Outcome]]]
) -> list[str]:
    """Notes of a finished run for its results: what trainings took or were given that `table.fields` does not say.

    Args:
        folder: of the run.
        settings: of the run.
        outcomes: what `run` returned.

    Returns:
        How long the first seed's training of `m_A` took, where it was trained; and which method diverged with which
        seed at the learning rate that it was given, and so has another one.
    """
    notes = []
    for name, by_seed in outcomes.items():
        first = next(iter(by_seed))
        within = f" of {name}" if name else ""
        if isinstance(settings.specialist, Fit):
            known = read_json(made(folder / f"seed-{first}" / name / "m_A"), {})["result"]
            minutes = known["step_seconds"] / 60
            notes.append(f"With seed {first} the training of m_A{within} took {minutes:.0f} minutes.")
        for seed, outcomes_of_seed in by_seed.items():
            for method, outcome in outcomes_of_seed.items():
                if (given := outcome["training"].get("diverged_at")) is not None:
                    has = outcome["training"]["learning_rate"]
                    notes.append(f"{METHODS[method]}{within} diverged with seed {seed} at {given:g} and has {has:g}.")
    return notes


def seconds_of(folder: Path, seeds: Sequence[int], names: Sequence[str] = ()) -> float:
    """Seconds of all finished steps.

    Args:
        folder: holds the seeds as `seed-0`, `seed-1`, ...
        seeds: whose steps count.
        names: of the data sets whose steps count, where several share a vanilla `m_A`, whose steps count, too.
    """
    within = [*names, "vanilla"] if names else [""]
    parts = [ANY_SEED, *(f"seed-{seed}" for seed in seeds)]
    paths = [path for part in parts for name in within for path in (folder / part / name).rglob("*.json")]
    kept = [read_json(path, {}) for path in paths]
    return sum(step["result"].get("step_seconds", 0.0) for step in kept if isinstance(step, dict) and "result" in step)
