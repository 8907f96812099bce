"""`calm reproduce`: one domain of the paper, with its baselines, from data to results."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from calm.cli.arguments import MOST_SEED

Domain = Literal["key_value_arithmetic", "low_resource", "dictionary", "code"]


def reproduce(
    domain: Annotated[Domain, typer.Argument(help="The paper's section 4.1, 4.2 or 4.3, or dictionary.")],
    preset: Annotated[str, typer.Option(help="cpu (for two cores), gpu, or paper; demo.")] = "cpu",
    seed: Annotated[
        list[int] | None, typer.Option(min=0, max=MOST_SEED, help="Instead of the preset's seeds; repeat for several.")
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(
            help="Debian's code of a language of low_resource (cy) or dictionary (cym), instead of the preset's."
        ),
    ] = None,
    output_dir: Annotated[Path, typer.Option(help="Where data and models go.")] = Path("runs/reproduce"),
    results_dir: Annotated[Path, typer.Option(help="Where results, plots and REPORT.md go.")] = Path("results"),
    allow_code_execution: Annotated[
        bool, typer.Option(help="Run the code that models write (HumanEval), in limited processes of its own.")
    ] = False,
    search: Annotated[
        bool, typer.Option(help="Search for learning rates, too, that cpu has from an earlier search.")
    ] = False,
    composition_seen: Annotated[
        bool, typer.Option(help="Train m_A on D_C, too, which cpu and gpu of low_resource and code hold out.")
    ] = False,
    all_methods: Annotated[bool, typer.Option(help="Run the methods, too, that the preset leaves out.")] = False,
) -> None:
    """Reproduce one domain of the paper: data, training, baselines, tables and plots.

    Run it again to go on, or once for each GPU to share the work.
    """
    from transformers.utils import logging

    from calm.experiments.reproduce import reproduce as run

    logging.disable_progress_bar()  # of loading weights, dozens of times; training shows its own
    run(
        domain,
        preset,
        seeds=seed,
        languages=language,
        output_dir=output_dir,
        results_dir=results_dir,
        allow_code_execution=allow_code_execution,
        search=search,
        composition_seen=composition_seen,
        all_methods=all_methods,
    )
