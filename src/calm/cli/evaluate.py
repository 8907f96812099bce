"""`calm evaluate`: runs lm-eval's tasks on a composition, one of its parts, or any other model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from calm.cli import loading
from calm.cli.arguments import MOST_SEED, Dtype, check_writable, stdout_for

if TYPE_CHECKING:
    from calm.evaluation import Evaluation


def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a composition or any causal language model.")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lm-eval, joined by commas; * stands for any name.")],
    include_path: Annotated[Path | None, typer.Option(help="Folder with task files of your own.")] = None,
    part: Annotated[
        str | None, typer.Option(help="What of a composition: composed, anchor, or an augmenting model's name.")
    ] = None,
    num_fewshot: Annotated[int | None, typer.Option(min=0, help="Examples in the prompt (the task's number).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many examples of each task.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences in a batch.")] = 8,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Apply the tokenizer's chat template.")
    ] = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Let tasks run the code that the model writes.")
    ] = False,
    output: Annotated[Path | None, typer.Option(help="Write the results to this file, as JSON.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Seed of few-shot examples and of sampling.")] = 1234,
    anchor: loading.Anchor = None,
    augmenting: loading.Augmenting = None,
    dtype: Dtype = "auto",
    device: loading.Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as JSON.")] = False,
) -> None:
    """Evaluate a composition, one of its parts, or any other model with EleutherAI's lm-eval."""
    from calm.evaluation import evaluate as run
    from calm.evaluation import load_tasks

    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if output is not None:
        check_writable(output)
    with stdout_for(as_json):
        loaded_tasks = load_tasks(names, include_path, allow_code_execution=allow_code_execution)
        loaded, tokenizer = loading.load_model(model, part, anchor, augmenting, dtype, device)
        evaluation = run(
            loaded,
            tokenizer,
            loaded_tasks,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            apply_chat_template=chat_template,
            allow_code_execution=allow_code_execution,
            seed=seed,
            settings={"model": model, "part": part},
        )
    # printed first: should the disk be full by now, the numbers are there
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    if as_json:
        print(json.dumps(evaluation.to_dict()))
    else:
        console.print(table(evaluation))
    if output is not None:
        evaluation.save(output)
        if not as_json:
            console.print(f"written to {output}")


def table(evaluation: Evaluation) -> Table:
    """The results as a table, one row a metric, groups last."""
    shown = Table("task", "n", "shots", "metric", "", "value", "95% interval", box=None, padding=(0, 2, 0, 0))
    for column in shown.columns:
        column.overflow = "fold"  # names that are cut off at their ends would look alike
        if column.header in ("n", "shots", "value", "95% interval"):
            column.justify, column.no_wrap = "right", True
    for name, task in (*evaluation.tasks.items(), *evaluation.groups.items()):
        for key, metric in task.metrics.items():
            measure, _, filter_name = key.partition(",")
            shown.add_row(
                name,
                str(task.samples),
                "" if task.num_fewshot is None else str(task.num_fewshot),
                measure if filter_name == "none" else f"{measure} ({filter_name})",
                {True: "↑", False: "↓", None: ""}[metric.higher_is_better],
                f"{metric.value:.4f}",
                "" if metric.interval is None else "{:.4f} - {:.4f}".format(*metric.interval),
            )
    return shown
