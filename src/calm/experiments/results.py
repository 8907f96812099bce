"""What an experiment measured: the paper's table with intervals, and how it was made; one JSON file a run (issue 4)."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from calm.errors import CalmError
from calm.experiments.steps import write_json

METHODS = {
    "m_A": "m_A alone",
    "m_B": "m_B alone",
    "m_B_zero_shot": "m_B alone, zero-shot",
    "composed": "m_A ⊕ m_B composed",
    "vanilla_m_A": "composed with vanilla m_A",
    "random_m_A": "composed with random m_A",
    "encoder_m_A": "composed, m_A as an encoder",
    "lora": "LoRA on m_B, D_C",
    "full_on_DC": "m_B fine-tuned on D_C",
    "full_on_all": "m_B fine-tuned on all of m_A's data",
    "mixed_logits": "log-probabilities of m_A and m_B mixed",
    "pipeline": "m_A's answer in m_B's prompt",
}
"""The methods that are compared, in the order of tables, and what they are called there."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Cell(_Strict):
    """One number of a table.

    Attributes:
        mean: Over the seeds.
        interval: 95%, over test examples and, where there are several, seeds.
        values: One for each seed.
    """

    mean: float
    interval: tuple[float, float] | None
    values: tuple[float, ...]


class Row(_Strict):
    """How the numbers of one row are to be read.

    Attributes:
        metric: Such as "chrF" or "exact match, %".
        higher_is_better: Whether more is better.
        examples: Test examples (texts, for a perplexity).
        title: What people call the row, such as "Welsh to English".
    """

    metric: str
    higher_is_better: bool
    examples: int
    title: str


class Curve(_Strict):
    """Numbers against something that was varied.

    Attributes:
        title: What is shown.
        x: What was varied.
        y: The metric.
        points: By name of the line, (x, number).
    """

    title: str
    x: str
    y: str
    points: dict[str, tuple[tuple[float, Cell], ...]]


class Training(_Strict):
    """How one method was trained, the first seed's where seeds differ.

    Attributes:
        trainable_parameters: How many numbers were trained; 0 for a method that trains none.
        learning_rate: The one that was chosen; for `mixed_logits` m_A's weight.
        searched: Learning rates (for `mixed_logits` weights of m_A) that were tried, with the metric of answers to
            the development set; in older results the loss there.
        steps: Optimiser steps.
        seconds: Of this training, without the search.
    """

    trainable_parameters: int
    learning_rate: float | None = None
    searched: dict[str, float] = {}
    steps: int = 0
    seconds: float = 0.0


class Results(_Strict):
    """One run of one domain.

    Attributes:
        domain: `key_value_arithmetic`, `low_resource`, `dictionary` or `code`.
        preset: Its sizes.
        variant: What tells it from a run of the preset with its own languages and seeds, as `Asked.variant` names it;
            else empty.
        command: What makes it again.
        date: When it was put together, YYYY-MM-DD.
        settings: The preset, with the languages and seeds that were run.
        seeds: Of data, weights and training.
        rows: How to read the rows of `table`, `other` and `preservation`.
        table: By row and method.
        differences: By row, of `table` and of `other`, and method: composed minus that method on the same examples.
        other: More metrics of the same test sets, by row and method (rows named such as "cy BLEU").
        preservation: What each method does to other abilities, by row (such as "English perplexity") and method.
        preservation_changes: By row of `preservation` and method, that method minus m_B on the same texts and examples.
        curves: What was varied, and what came out.
        training: By method; where rows were trained apart, by "METHOD ROW".
        parameters: Of "anchor", "augmenting" and "composition".
        examples: Answers to look at, by row: the prompt, the reference and what each method wrote.
        notes: What a reader has to know.
        hardware: Of the machine that put it together; steps may have been brought from another.
        versions: Of Python and the packages that matter, on that machine.
        seconds: Wall clock of all steps, those kept from earlier calls included.
    """

    domain: str
    preset: str
    variant: str = ""
    command: str
    date: str
    settings: dict[str, Any]
    seeds: tuple[int, ...]
    rows: dict[str, Row]
    table: dict[str, dict[str, Cell]]
    differences: dict[str, dict[str, Cell]] = {}
    other: dict[str, dict[str, Cell]] = {}
    preservation: dict[str, dict[str, Cell]] = {}
    preservation_changes: dict[str, dict[str, Cell]] = {}
    curves: dict[str, Curve] = {}
    training: dict[str, Training] = {}
    parameters: dict[str, int] = {}
    examples: dict[str, list[dict[str, str]]] = {}
    notes: tuple[str, ...] = ()
    hardware: str
    versions: dict[str, str]
    seconds: float

    @property
    def name(self) -> str:
        """The preset, with the variant if there is one: "cpu", "cpu-seed3"."""
        return f"{self.preset}-{self.variant}" if self.variant else self.preset

    @property
    def stem(self) -> str:
        """What the names of its files begin with: its date and name."""
        return f"{self.date}-{self.name}"

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write `FOLDER/DOMAIN/DATE-PRESET.json`, or `DATE-PRESET-VARIANT.json`.

        Returns:
            The file.

        Raises:
            CalmError: If it cannot be written.
        """
        path = Path(folder, self.domain, f"{self.stem}.json")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, self.model_dump(mode="json"))
        except OSError as error:
            raise CalmError(f"Cannot write the results to {str(path)!r}: {error}") from error
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Results:
        """Read what `save` wrote.

        Raises:
            CalmError: If it is not there, or no such file.
        """
        try:
            return cls.model_validate_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValidationError) as error:
            raise CalmError(f"{str(path)!r} holds no results of an experiment: {error}") from error


@dataclass(frozen=True)
class Asked:
    """What was asked for instead of what a preset has.

    Attributes:
        seeds: None for the preset's. Where learning rates are searched for, it is with the first one.
        languages: rows of a domain that has a row for each language, None for the preset's.
        allow_code_execution: have rows that run what models write.
        search: for learning rates, too, that an earlier search has found.
        composition_seen: m_A is trained on D_C, too, which the preset holds out of its data.
        all_methods: run those, too, that the preset leaves out.
    """

    seeds: tuple[int, ...] | None = None
    languages: tuple[str, ...] | None = None
    allow_code_execution: bool = False
    search: bool = False
    composition_seen: bool = False
    all_methods: bool = False

    @property
    def searches(self) -> bool:
        """Whether no learning rate is taken from an earlier search, which had an m_A and methods of its own."""
        return self.search or self.composition_seen or self.all_methods

    def command(self, domain: str, preset: str) -> str:
        """The command line that makes such results again."""
        words = ["calm reproduce", domain, "--preset", preset]
        words += [f"--language {language}" for language in self.languages or ()]
        words += [f"--seed {seed}" for seed in self.seeds or ()]
        words += ["--search"] if self.search else []
        words += ["--composition-seen"] if self.composition_seen else []
        words += ["--all-methods"] if self.all_methods else []
        return " ".join([*words, *(["--allow-code-execution"] if self.allow_code_execution else [])])

    def variant(self, seeds: Sequence[int], languages: Sequence[str] = (), code_left_out: bool = False) -> str:
        """What tells the run from one of the whole preset, so that neither overwrites the other's results.

        Args:
            seeds: the preset's.
            languages: the preset's.
            code_left_out: rows were left out because they execute code.

        Returns:
            Such as "om", "seed3", "xh-om-seed3-4", "search", "seen", "all", "no-execution", "seed3-no-execution", or
            "".
        """
        found = list(self.languages or ()) if self.languages != tuple(languages) else []
        if self.seeds and self.seeds != tuple(seeds):
            found.append("seed" + "-".join(map(str, self.seeds)))
        said = {"search": self.search, "seen": self.composition_seen, "all": self.all_methods}
        said["no-execution"] = code_left_out
        return "-".join([*found, *(word for word, is_so in said.items() if is_so)])


_DATA_AND_METRICS = ("peft", "sacrebleu", "rapidfuzz", "lemminflect", "polib")
"""Of the extra `reproduce`: what data, baselines and metrics depend on."""


def made_here() -> dict[str, Any]:
    """The fields of `Results` that say when and where it was put together: `date`, `hardware`, `versions`.

    Raises:
        CalmError: If a package of the extra `reproduce` is missing.
    """
    try:
        versions = {name: version(name) for name in ("calm-lm", "torch", "transformers", *_DATA_AND_METRICS)}
    except PackageNotFoundError as error:
        raise CalmError(f"calm reproduce needs {error.name}: pip install 'calm-lm[reproduce]'.") from error
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": f"{device}, {os.cpu_count()} CPU cores",
        "versions": {
            "python": platform.python_version(),
            **versions,
        },
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
