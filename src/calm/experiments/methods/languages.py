"""From several languages to results: all of their data first, then every method on each, a row a language."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from rich.console import Console

from calm.experiments.methods import table
from calm.experiments.methods.examples import Data
from calm.experiments.methods.finished import notes_of, parameters_of, seconds_of
from calm.experiments.methods.run import run
from calm.experiments.methods.settings import Settings
from calm.experiments.results import Asked, Results, made_here

DataSettings = TypeVar("DataSettings")


@dataclasses.dataclass(frozen=True)
class Preset(Generic[DataSettings]):
    """One size of an experiment that has a row for each language.

    Attributes:
        languages: rows of the table.
        seeds: of the models and the order of examples.
        split: seed of the split, which is the same for all seeds, so that they answer the same questions.
        data: how each language's data is split, or which data sets of a hub to take.
        methods: models and lengths of training.
        rates: by language, the learning rate (for `mixed_logits` the weight) of each method that an earlier search
            found; a language without searches with its first seed.
    """

    languages: tuple[str, ...]
    seeds: tuple[int, ...]
    split: int
    data: DataSettings
    methods: Settings
    rates: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)


def results_of(
    domain: str,
    name: str,
    preset: Preset[Any],
    asked: Asked,
    prepare: Callable[[str], tuple[Data, dict[str, Any]]],
    notes: Sequence[str],
    folder: Path,
    console: Console,
) -> Results:
    """Run what is not there yet of a preset.

    Args:
        domain: its name.
        name: of the preset.
        preset: its sizes.
        asked: languages and seeds instead of the preset's; whether to search where an earlier search has found, and
            to run all methods.
        prepare: a language's data, and the same in figures. It is asked for every language before any model is trained.
        notes: what a reader has to know of the domain.
        folder: where models and outcomes are kept.
        console: is told what is done.
    """
    seeds, languages = asked.seeds or preset.seeds, asked.languages or preset.languages
    prepared = {language: prepare(language) for language in languages}
    data = {language: examples for language, (examples, _) in prepared.items()}
    known = {} if asked.searches else {name: preset.rates[name] for name in languages if name in preset.rates}
    if asked.all_methods:
        preset = dataclasses.replace(preset, methods=preset.methods.with_all_methods())
    outcomes = run(data, preset.methods, seeds, folder, console, known)
    fields = {language: table.fields(data[language], outcomes[language]) for language in languages}
    settings = dataclasses.asdict(dataclasses.replace(preset, seeds=seeds, languages=languages, rates=known))
    return Results(
        domain=domain,
        preset=name,
        variant=asked.variant(preset.seeds, preset.languages),
        command=asked.command(domain, name),
        settings={**settings, "data_made": {language: made for language, (_, made) in prepared.items()}},
        seeds=seeds,
        parameters=parameters_of(folder, seeds[0], languages[0]),
        notes=(*notes, *preset.methods.notes(tuple(known)), *notes_of(folder, preset.methods, outcomes)),
        seconds=seconds_of(folder, seeds, languages),
        **table.together(fields),
        **made_here(),
    )
