"""`calm playground`: a page to look at a composition: every part's answer side by side, and what connections do."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from calm.cli import loading
from calm.cli.arguments import Dtype, parse_augmenting
from calm.errors import CalmError
from calm.hosts import in_url

if TYPE_CHECKING:
    from calm.playground.answers import Company

AUTH = "CALM_PLAYGROUND_AUTH"


def playground(
    model: loading.Model,
    host: Annotated[
        str, typer.Option(help=f"Address to listen on. One that others can reach needs {AUTH}=USER:PASSWORD.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen on.")] = 7860,
    anchor: loading.Anchor = None,
    augmenting: loading.Augmenting = None,
    dtype: Dtype = "auto",
    device: loading.Device = None,
) -> None:
    """Open a page: one prompt, the answers of every part side by side, and what the connections did."""
    try:
        from calm.playground import app
    except ImportError as error:
        raise CalmError(f"The page needs Gradio ({error}). Install it: pip install 'calm-lm[serve]'") from error
    auth = _auth()
    app.check_address(host, port, auth)
    page = app.Page(load_company(model, anchor, augmenting, dtype, device)).build()
    Console(highlight=False, soft_wrap=True).print(
        f"http://{in_url(host)}:{port} shows {model}; Ctrl-C ends it", markup=False, emoji=False
    )
    app.serve(page, host, port, auth)


def load_company(
    model: str, anchor: str | None, augmenting: list[str] | None, dtype: str, device: str | None
) -> Company:
    """Load a composition, and its augmenting models once more, whole: the composition holds their first layers only.

    Raises:
        CalmError: If a part cannot be loaded, or if there is no such device.
    """
    from calm import sources
    from calm.playground.answers import Company

    composed, tokenizer = loading.load(model, anchor, augmenting, dtype, device)
    config = composed.config
    moved = parse_augmenting(augmenting) if augmenting else {}
    where = moved if isinstance(moved, dict) else dict.fromkeys(config.augmenting_configs, moved)
    whole = {
        name: sources.load_part(config, name, where.get(name), dtype=dtype).eval().to(composed.device)
        for name in config.augmenting_configs
    }
    return Company(composed, whole, tokenizer)


def _auth() -> tuple[str, str] | None:
    value = os.environ.get(AUTH)
    if not value:
        return None
    user, colon, password = value.partition(":")
    if not (user and colon and password):
        raise CalmError(f"{AUTH} is set, but not as USER:PASSWORD.")
    return user, password
