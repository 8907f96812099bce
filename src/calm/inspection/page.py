"""An inspection as one HTML file that fetches nothing: what was used, where it looked, what would have come without."""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from torch import Tensor

from calm.connections import LayerPair
from calm.inspection.measure import Inspection, NextTokens, Without

FOLDER = Path(__file__).parent

WINDOW = 128
"""How many of the last positions are shown; attention from them goes to all tokens."""

VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "␍"})


def name_of(pair: LayerPair) -> str:
    """How a connection is called wherever it is shown."""
    return f"{pair.augmenting} {pair.augmenting_layer} → {pair.anchor_layer}"


def visible(token: str) -> str:
    """A token's text with its white space, and what else cannot be printed, to be seen."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in token.translate(VISIBLE))


def to_html(
    inspection: Inspection,
    answers: Mapping[str, str] | None = None,
    chosen: str = "its likeliest token each time",
) -> str:
    """Write an inspection as a page.

    Args:
        inspection: Of one prompt.
        answers: What each model answered, to be shown beside one another, by its name.
        chosen: How the composed model's tokens were chosen.

    Returns:
        A whole HTML document with its style, script and data; text of tokens is escaped.
    """
    script = (FOLDER / "page.js").read_text(encoding="utf-8")
    environment = Environment(loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined)
    positions = len(inspection.tokens) - 1
    hidden = max(0, positions - WINDOW)
    tokens = [visible(token) for token in inspection.tokens]
    names = [name_of(use.pair) for use in inspection.connections]
    first_produced = max(0, inspection.produced.start - hidden)
    read = tokens[hidden:-1]
    rows = summary(inspection)
    return environment.get_template("page.html").render(
        inspection=inspection,
        answers=answers or {},
        chosen=chosen,
        tokens=tokens,
        names=names,
        augmenting={use.pair.augmenting for use in inspection.connections},
        hidden=hidden,
        read=read,
        seen=tokens[:-1],
        first_produced=first_produced,
        heads=len(inspection.connections[0].attention),
        summary=rows,
        most_injected=max(row["injection"] or 0 for row in rows) or 1,
        strips=_strips(inspection, hidden),
        variants=["all on", *(f"without {name}" for name in names), "bare anchor"],
        places=_places(inspection, tokens),
        maps={
            "weights": [_bytes(use.attention[:, hidden:]) for use in inspection.connections],
            "read": read,
            "next": [None] * first_produced + tokens[hidden + first_produced + 1 :],
            "seen": tokens[:-1],
            "offset": hidden,
        },
        bar=_bar,
        style=Markup((FOLDER / "page.css").read_text(encoding="utf-8")),
        script=Markup(script),
        script_hash="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def summary(inspection: Inspection) -> list[dict[str, Any]]:
    """Each connection in one line, and all of them off: means over the produced positions.

    Returns:
        Of each its `name`, `injection`, `entropy` (nats), `looks_at` (tokens), `moved` (total variation without it)
        and `kl` (nats); the first three are `None` for the bare anchor.
    """

    def change(without: Without) -> dict[str, float]:
        places = inspection.produced
        return {"moved": without.total_variation[places].mean().item(), "kl": without.kl[places].mean().item()}

    rows: list[dict[str, Any]] = []
    for use in inspection.connections:
        entropy = use.entropy[:, inspection.produced].mean().item()
        injection = use.injection[inspection.produced].mean().item()
        reach = {"injection": injection, "entropy": entropy, "looks_at": math.exp(entropy)}
        rows.append({"name": name_of(use.pair), **reach, **change(use.without)})
    nothing = {"injection": None, "entropy": None, "looks_at": None}
    return [*rows, {"name": "all off: the bare anchor", **nothing, **change(inspection.anchor)}]


def _strips(inspection: Inspection, hidden: int) -> list[dict[str, Any]]:
    """What is shown position by position: for each connection a shade from 0 to 1 and a text."""
    injections = {name_of(use.pair): use.injection[hidden:] for use in inspection.connections}
    entropies = {name_of(use.pair): use.entropy.mean(0)[hidden:] for use in inspection.connections}
    moved = {f"without {name_of(use.pair)}": use.without.total_variation[hidden:] for use in inspection.connections}
    moved["bare anchor"] = inspection.anchor.total_variation[hidden:]
    return [
        {
            "title": "How much is added",
            "text": "The size of what each connection adds, relative to the anchor's state at that layer: at 1, as "
            "much is added as was there.",
            "rows": _cells(injections, "{:.2f}"),
        },
        {
            "title": "How widely it looks",
            "text": "The entropy of its attention in nats, mean over heads: 0 where it looks at one token alone, more "
            "where it looks at many.",
            "rows": _cells(entropies, "{:.2f}"),
        },
        {
            "title": "What switching it off changes",
            "text": "How much of the probability of the next token moves to other tokens, in percent (the total "
            "variation between the two distributions): at 0 nothing changes, at 100 everything does.",
            "rows": _cells({name: 100 * share for name, share in moved.items()}, "{:.0f}", darkest=100),
        },
    ]


def _cells(
    rows: dict[str, Tensor], style: str, darkest: float | None = None
) -> list[tuple[str, list[tuple[float, str]]]]:
    most = darkest or max(values.max().item() for values in rows.values()) or 1.0
    return [(name, [(value / most, style.format(value)) for value in values.tolist()]) for name, values in rows.items()]


def _places(inspection: Inspection, tokens: list[str]) -> list[dict[str, Any]]:
    """The likeliest tokens at each produced position, for the composed model and with something switched off."""
    removed = [*(use.without for use in inspection.connections), inspection.anchor]
    places = []
    for position in range(*inspection.produced.indices(len(tokens))):
        produced = int(inspection.token_ids[position + 1])
        variants: list[dict[str, Any]] = [{"top": _top(inspection.next_tokens, position, produced)}]
        for without in removed:
            moved, kl = without.total_variation[position].item(), without.kl[position].item()
            variants.append({"top": _top(without.next_tokens, position, produced), "moved": moved, "kl": kl})
        places.append({"after": tokens[position], "produced": tokens[position + 1], "variants": variants})
    return places


def _top(next_tokens: NextTokens, position: int, produced: int) -> list[dict[str, Any]]:
    probabilities = next_tokens.top_probabilities[position].tolist()
    same = (next_tokens.top_ids[position] == produced).tolist()  # two tokens may have one text
    guesses = zip(next_tokens.top_tokens[position], probabilities, same, strict=True)
    return [{"token": visible(token), "probability": share, "same": is_it} for token, share, is_it in guesses]


def _bytes(attention: Tensor) -> str:
    """The mean over heads and each head, a byte a weight: 255 is 1."""
    maps = torch.cat([attention.mean(0, keepdim=True), attention])
    return base64.b64encode((255 * maps).round().to(torch.uint8).numpy().tobytes()).decode()


def _bar(share: float) -> Markup:
    return Markup('<span class="bar" aria-hidden="true"><i style="--v:{:.3f}"></i></span>').format(share)
