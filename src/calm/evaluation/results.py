"""What an evaluation found: metrics with 95% intervals, the settings and versions; written as JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from scipy.stats import binomtest

from calm.errors import CalmError

NORMAL_95 = 1.959964
"""The 97.5% quantile of the normal distribution."""


@dataclass(frozen=True)
class Metric:
    """One metric of one task.

    Attributes:
        value: In the metric's unit, as lm-eval gives it (`acc` from 0 to 1, `bleu` and `chrf` from 0 to 100).
        stderr: Its standard error, `None` where lm-eval knows none.
        interval: The 95% interval, `None` where there is none.
        higher_is_better: `None` where the task does not say.
    """

    value: float
    stderr: float | None
    interval: tuple[float, float] | None
    higher_is_better: bool | None


@dataclass(frozen=True)
class TaskResult:
    """One task, or one group of tasks.

    Attributes:
        samples: How many examples were evaluated.
        num_fewshot: Examples in the prompt; `None` for a group.
        version: The version of the task's definition.
        metrics: By lm-eval's names, "METRIC,FILTER".
    """

    samples: int
    num_fewshot: int | None
    version: Any
    metrics: dict[str, Metric]


@dataclass(frozen=True)
class Evaluation:
    """A model's results.

    Attributes:
        tasks: By task.
        groups: Groups' aggregates, by group.
        settings: What was evaluated, and how.
        versions: Of python and the packages that matter.
        seconds: How long it took.
    """

    tasks: dict[str, TaskResult]
    groups: dict[str, TaskResult]
    settings: dict[str, Any]
    versions: dict[str, str]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    def save(self, path: str | Path) -> None:
        """Write as JSON; an interrupted or failed write leaves what was there.

        Args:
            path: The file; its folder is made if missing.

        Raises:
            CalmError: If it cannot be written.
        """
        target = Path(path)
        staging = None
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=target.parent, suffix=".partial", delete=False) as file:
                staging = Path(file.name)
                file.write(json.dumps(self.to_dict(), indent=2) + "\n")
            staging.chmod(0o644)
            os.replace(staging, target)
        except OSError as error:
            raise CalmError(f"Cannot write the results to {os.fspath(path)!r}: {error}") from error
        finally:
            if staging is not None:
                staging.unlink(missing_ok=True)


def interval(value: float, stderr: float | None, samples: Sequence[float]) -> tuple[float, float] | None:
    """The 95% interval of a metric.

    Wilson's score interval for a share of successes, since it holds where they are few or many (0 of 100 is not known
    to be exactly 0); otherwise the normal one.

    Args:
        value: The metric.
        stderr: Its standard error.
        samples: Its values on each example; may be empty.

    Returns:
        The lower and the upper end, `None` without a standard error.
    """
    successes = sum(samples)
    if samples and {float(sample) for sample in samples} <= {0.0, 1.0} and abs(value - successes / len(samples)) < 1e-9:
        wilson = binomtest(round(successes), len(samples)).proportion_ci(method="wilson")
        return float(wilson.low), float(wilson.high)
    return None if stderr is None else (value - NORMAL_95 * stderr, value + NORMAL_95 * stderr)


def read(results: Mapping[str, Any], names: Iterable[str], kind: str = "results") -> dict[str, TaskResult]:
    """Read tasks (`kind="results"`) or groups' aggregates (`kind="groups"`) out of lm-eval's results."""
    return {name: _read_one(results, name, found) for name in names if (found := results.get(kind, {}).get(name))}


def _samples(results: Mapping[str, Any], name: str) -> list[Any]:
    """A task's examples, or those of all tasks in a group."""
    members = results.get("group_subtasks", {}).get(name, [])
    return [*results["samples"].get(name, []), *(sample for member in members for sample in _samples(results, member))]


def _read_one(results: Mapping[str, Any], name: str, found: Mapping[str, Any]) -> TaskResult:
    samples = _samples(results, name)
    metrics = {}
    for key, value in found.items():
        metric, comma, filter_name = key.partition(",")
        if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = found.get(f"{metric}_stderr,{filter_name}")
        stderr = float(stderr) if isinstance(stderr, int | float) else None  # lm-eval writes "N/A" for none
        values = [sample[metric] for sample in samples if sample["filter"] == filter_name and metric in sample]
        numbers = values if all(isinstance(number, int | float) for number in values) else []
        metrics[key] = Metric(
            float(value),
            stderr,
            interval(float(value), stderr, numbers),
            results.get("higher_is_better", {}).get(name, {}).get(metric),
        )
    return TaskResult(found.get("sample_len", 0), results["n-shot"].get(name), results["versions"].get(name), metrics)
