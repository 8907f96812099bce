"""reproduce(): one domain of the paper from its data to results/, resumed where it was interrupted (issue 4)."""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from rich.console import Console

from calm.errors import CalmError
from calm.experiments.charts import save_charts
from calm.experiments.report import newest, write_report
from calm.experiments.results import METHODS, Asked, Results, made_here
from calm.experiments.sharing import locked
from calm.experiments.tables import print_results

Domain = Literal["key_value_arithmetic", "low_resource", "dictionary", "code"]
HAVE_LANGUAGES = ("low_resource", "dictionary")
HAVE_METHODS = ("low_resource", "dictionary", "code")
"""Domains whose presets choose among methods, and have `rates` if an earlier search found some."""
MAY_HOLD_OUT = ("low_resource", "code")
"""Domains whose presets may hold D_C out of m_A's data."""


class Reproduce(Protocol):
    """What a domain's `reproduce` module has, beside `PRESETS`, whose names are those that it takes."""

    def __call__(self, preset: str, asked: Asked, folder: Path, console: Console) -> Results:
        """Run what is not there yet, and return the results."""
        ...


def reproduce(
    domain: Domain,
    preset: str = "cpu",
    *,
    seeds: Sequence[int] | None = None,
    languages: Sequence[str] | None = None,
    output_dir: str | Path = "runs/reproduce",
    results_dir: str | Path = "results",
    allow_code_execution: bool = False,
    search: bool = False,
    composition_seen: bool = False,
    all_methods: bool = False,
    console: Console | None = None,
) -> Path:
    """Prepare the data, train, evaluate all baselines, and write `results/DOMAIN/DATE-PRESET.json`, tables and plots.

    With other languages or seeds than the preset's, with a search, with an `m_A` that has seen `D_C`, with methods that
    the preset leaves out, or without code that was to be executed, the name says so (`DATE-PRESET-om`,
    `DATE-PRESET-seed3`, `DATE-PRESET-search`, `DATE-PRESET-seen`, `DATE-PRESET-all`, `DATE-PRESET-no-execution`), so
    that nothing overwrites the results of the preset itself.

    Everything that was finished with the same settings is kept in `output_dir` and not run again: interrupt and
    repeat as you like. Several processes that call this with the same arguments share the work.

    Args:
        domain: `key_value_arithmetic`, `low_resource` or `code` (the paper's sections 4.1, 4.2 and 4.3), or
            `dictionary`, which the paper has not: what low-resource translation leaves open.
        preset: `cpu` (for two cores), `gpu` or, where the paper has the domain, `paper`; of `key_value_arithmetic` also
            `demo`, whose answers restate the values.
        seeds: instead of the preset's.
        languages: instead of the preset's, of `low_resource` (codes of Debian's `libreoffice-l10n-CODE`; of FLORES+ at
            `paper`) or `dictionary` (of `dict-freedict-CODE-eng`).
        output_dir: for data, models and what they wrote.
        results_dir: for the results.
        allow_code_execution: run the code that models write (HumanEval of `code`), in limited processes of its own.
        search: for learning rates that the preset has from an earlier search; the others are searched for anyway.
        composition_seen: train `m_A` on `D_C`, too, as the paper does, where the preset holds it out (`cpu` and `gpu`
            of `low_resource` and `code`). Such a run has a folder of its own, with data of its own.
        all_methods: run the methods, too, that the preset leaves out, so as to end in time or to fit.
        console: is told what happens.

    Returns:
        The results' JSON file.

    Raises:
        CalmError: no such domain or preset; languages of a domain that has none; a search where the preset has no rates
            from an earlier one; a `D_C` to be seen that is not held out; all methods where none is left out; data or
            models that cannot be had; folders that cannot be written to; a file among the results that holds none; a
            package that is not installed.
    """
    if domain not in get_args(Domain):
        raise CalmError(f"domain={domain!r}: expected one of {', '.join(get_args(Domain))}.")
    module = importlib.import_module(f"calm.experiments.{domain}.reproduce")
    if preset not in module.PRESETS:
        raise CalmError(f"preset={preset!r}: {domain} has {', '.join(module.PRESETS)}.")
    if languages and domain not in HAVE_LANGUAGES:
        raise CalmError(f"languages={tuple(languages)}: {domain} has none; {' and '.join(HAVE_LANGUAGES)} have.")
    anew = composition_seen or all_methods
    if search and (anew or not _knows_rates(domain, module.PRESETS[preset], languages)):
        of_what = f" of {', '.join(languages)}" if languages else ""
        of_what += " with an m_A that has seen D_C" if composition_seen else ""
        of_what += " for all methods" if all_methods else ""
        raise CalmError(
            f"search=True: the preset {preset} of {domain} has no learning rates{of_what} from an earlier search and "
            "searches anyway; leave it out."
        )
    if composition_seen and not _holds_out(domain, module.PRESETS[preset]):
        raise CalmError(
            f"composition_seen=True: the preset {preset} of {domain} does not hold D_C out of m_A's data; "
            f"cpu and gpu of {' and '.join(MAY_HOLD_OUT)} do. Leave it out."
        )
    if all_methods and not _leaves_out(domain, module.PRESETS[preset]):
        raise CalmError(f"all_methods=True: the preset {preset} of {domain} leaves no method out. Leave it out.")
    asked = Asked(
        seeds=tuple(dict.fromkeys(seeds)) if seeds else None,
        languages=tuple(dict.fromkeys(languages)) if languages else None,
        allow_code_execution=allow_code_execution,
        search=search,
        composition_seen=composition_seen,
        all_methods=all_methods,
    )
    console = console or Console(highlight=False)
    folder = Path(output_dir, f"{domain}-{preset}{'-seen' if composition_seen else ''}")
    for place in (folder, Path(results_dir)):
        try:
            place.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=place):
                pass
        except OSError as error:
            raise CalmError(f"{str(place)!r} cannot be written to ({error}); choose another folder.") from error
    # what the report could not read, and what is not installed, is found before the work, not after
    newest(Path(results_dir))
    made_here()
    run: Reproduce = module.reproduce
    results = run(preset, asked, folder, console)
    with locked(Path(results_dir, "REPORT.md")):  # processes that shared the run end at about the same time
        path = results.save(results_dir)
        drawn = save_charts(results, path.parent)
        written = write_report(Path(results_dir))
    print_results(console, results)
    for file in (path, *drawn, written):
        console.print(str(file), markup=False, emoji=False, soft_wrap=True)
    return path


def _holds_out(domain: str, preset: Any) -> bool:
    return domain in MAY_HOLD_OUT and dataclasses.asdict(preset.data).get("composition_held_out", False)


def _leaves_out(domain: Domain, preset: Any) -> bool:
    return domain in HAVE_METHODS and set(preset.methods.methods) != set(METHODS)


def _knows_rates(domain: Domain, preset: Any, languages: Sequence[str] | None) -> bool:
    if domain not in HAVE_METHODS:
        return False
    if domain not in HAVE_LANGUAGES:
        return bool(preset.rates)
    return any(language in preset.rates for language in languages or preset.languages)
