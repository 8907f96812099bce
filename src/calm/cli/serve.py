"""`calm serve`: a composition behind OpenAI's API, on vLLM or on transformers."""

from __future__ import annotations

import os
from typing import Annotated, Literal

import typer
from rich.console import Console

from calm.cli import loading
from calm.cli.arguments import Dtype
from calm.errors import CalmError

TRANSFORMERS_ONLY = ("log_prompts", "anchor", "augmenting", "device")


def serve(
    context: typer.Context,
    model: loading.Model,
    vllm_options: Annotated[
        list[str] | None, typer.Argument(metavar="[-- VLLM_OPTIONS]", help="After --: passed on to vLLM's server.")
    ] = None,
    engine: Annotated[
        Literal["vllm", "transformers"] | None, typer.Option(help="vllm where it is installed, else transformers.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address; one that other machines reach takes an API key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0: any free one.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="CALM_API_KEY", help="Asked of every client; safer in the environment."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What clients call the model; by default the folder's name.")] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Answers generated together; by default 8, or as many as vLLM takes.")
    ] = None,
    queue: Annotated[int, typer.Option(min=1, help="Answers that may wait; more are refused with 429.")] = 64,
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 1024,
    body_size: Annotated[int, typer.Option(min=1, help="Most bytes of a request.")] = 1 << 20,
    timeout: Annotated[float, typer.Option(min=0.001, help="Most seconds for a request, waiting included.")] = 600.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompts and answers.")] = False,
    anchor: loading.Anchor = None,
    augmenting: loading.Augmenting = None,
    dtype: Dtype = "auto",
    device: loading.Device = None,
) -> None:
    """Serve a composition with OpenAI's API: /v1/models, /v1/chat/completions, /v1/completions."""
    from calm.serving import vllm_server

    vllm_there = vllm_server.is_installed()
    engine = engine or ("vllm" if vllm_there else "transformers")
    if engine == "vllm" and not vllm_there:
        raise CalmError(
            "--engine vllm: vLLM is not installed in this environment. See docs/vllm.md, or take --engine transformers."
        )
    others = [option for option in TRANSFORMERS_ONLY if _is_given(context, option)]
    if engine == "vllm" and others:
        options = ", ".join(f"--{option.replace('_', '-')}" for option in others)
        raise typer.BadParameter(f"{options}: for --engine transformers; vLLM's own options come after --")
    if engine == "transformers" and vllm_options:
        raise typer.BadParameter(f"{' '.join(vllm_options)}: --engine transformers takes no options of vLLM")
    if moved := [option for option in vllm_options or () if vllm_server.sets_address(option)]:
        raise typer.BadParameter(
            f"{' '.join(moved)} after --: where the server listens is said before it, to calm serve, which asks for an "
            "API key where other machines get in"
        )
    try:
        from calm.serving import server
        from calm.serving.app import build
    except ImportError as error:
        raise CalmError(f"serving needs more packages ({error}): pip install 'calm-lm[serve]'") from error
    from calm import checkpoint
    from calm.serving.limits import Limits
    from calm.serving.names import Names

    server.check_access(host, api_key)
    config = checkpoint.read_config(model)
    name = name or default_name(model)
    limits = Limits(batch_size or Limits.batch_size, queue, max_tokens, body_size, timeout)
    bound = server.bind(host, port, timeout)
    if engine == "vllm":
        port = bound.getsockname()[1]
        bound.close()
        names = list(Names(name, list(config.augmenting_configs)).on)
        served_in = vllm_server.as_composed(dtype, config.anchor_reference.get("dtype"))
        line, variables = vllm_server.command(
            model, names, host, port, served_in, vllm_options or [], api_key, limits, batch_size
        )
        vllm_server.become(line, variables)
    server.exit_on_sigterm()
    composed, tokenizer = loading.load(model, anchor, augmenting, dtype, device)
    app = build(composed, tokenizer, name, host=host, api_key=api_key, limits=limits, log_prompts=log_prompts)
    key = "with an API key" if api_key is not None else "without an API key, for this machine only"
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    console.print(
        f"{name} on {server.url_of(bound)}/v1, {key}; Ctrl-C finishes what runs and ends", markup=False, emoji=False
    )
    server.run(app, bound, timeout)


def default_name(model: str) -> str:
    """The last part of a hub name or of a folder's path, which may be `.`."""
    return os.path.basename(os.path.abspath(model))


def _is_given(context: typer.Context, option: str) -> bool:
    source = context.get_parameter_source(option)
    return source is not None and source.name != "DEFAULT"
