"""The command line `calm`: one thin file a command."""

from __future__ import annotations

from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from typer.core import TyperGroup

from calm.cli import (
    chat,
    compose,
    demo,
    evaluate,
    generate,
    inspect_,
    plan,
    playground,
    rehearse,
    reproduce,
    serve,
    train,
)
from calm.errors import CalmError


class _Commands(TyperGroup):
    """The group of commands; turns the errors meant for users into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except CalmError as error:
            _print_error(f"[bold red]error:[/] {escape(str(error))}")
            raise typer.Exit(1) from error
        except KeyboardInterrupt as interruption:
            _print_error(f"[bold]{escape(str(interruption) or 'interrupted')}[/]")
            raise typer.Exit(130) from interruption


def _print_error(message: str) -> None:
    Console(stderr=True, soft_wrap=True, highlight=False).print(message)


app = typer.Typer(
    cls=_Commands,
    name="calm",
    help="Compose two language models with a few trained cross-attention connections (CALM, arXiv 2401.02412).",
    epilog="Exit codes: 0 done, 1 an error that the message explains, 2 wrong usage, 130 interrupted.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("plan")(plan.plan)
app.command("compose")(compose.compose)
app.command("rehearse")(rehearse.rehearse)
app.command("train")(train.train)
app.command("generate")(generate.generate)
app.command("chat")(chat.chat)
app.command("evaluate")(evaluate.evaluate)
app.command("reproduce")(reproduce.reproduce)
app.command("inspect")(inspect_.inspect)
app.command("playground")(playground.playground)
app.command("serve")(serve.serve)


def main() -> None:
    """Run the command line and exits."""
    app(prog_name="calm")
