"""What the page shows, as HTML: the answers, where the composed model looked, how much was added; all text escaped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from transformers import PreTrainedModel

from calm.connections import LayerPair
from calm.inspection import ConnectionUse, Inspection
from calm.inspection.page import WINDOW, name_of, to_html, visible
from calm.playground.answers import Answer, Company, Question

FOLDER = Path(__file__).parent / "templates"

ROWS = 64
"""How many of the last produced tokens are shown; they may look at the last `WINDOW` tokens of those read."""

_environment = Environment(
    loader=FileSystemLoader(FOLDER), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
)


def intro(company: Company) -> str:
    """What this page is, for someone who has not read the paper."""
    return _render("intro", names=list(company.augmenting), connections=len(company.composed.connections))


def answers(company: Company, shown: Sequence[Answer], off: frozenset[str], running: bool) -> str:
    """A column for each model.

    Args:
        company: Who answers.
        shown: Their answers; none before the first prompt.
        off: Names of the augmenting models that are switched off in the composed model.
        running: Whether more is to come.
    """
    names, pairs = list(company.augmenting), company.composed.config.layer_pairs
    on = [name for name in names if name not in off]
    connections = sum(pair.augmenting in on for pair in pairs)
    columns = [
        *(
            {
                "role": "augmenting",
                "title": "Augmenting model" if len(names) == 1 else f"Augmenting model “{name}”",
                "who": f"alone · {_size(model)}",
            }
            for name, model in company.augmenting.items()
        ),
        {"role": "anchor", "title": "Anchor", "who": f"alone · {_size(company.composed.anchor)}"},
        {
            "role": "composed",
            "title": "Composed",
            "who": f"the anchor and {_count(connections, 'connection')}"
            + (f" to {', '.join(on)}" if len(names) > 1 else "")
            if on
            else "all switched off: this is the anchor",
        },
    ]
    texts: Sequence[Answer | None] = shown or [None] * len(columns)
    return _render("answers", columns=list(zip(columns, texts, strict=True)), running=running, count=_count)


def heading(name: str) -> str:
    """What a part of the page shows: `"looked"` or `"added"`."""
    return _render(f"heading_{name}")


def looked(inspection: Inspection | None, pair: LayerPair, all_off: bool = False) -> str:
    """The heat map of one connection: rows are produced tokens, columns what the augmenting model has read.

    Weights are the mean over heads; the last `ROWS` produced tokens and the last `WINDOW` of those read are shown.
    """
    use = _use_of(inspection, pair)
    if inspection is None or use is None:
        return _render("nothing", off=all_off or inspection is not None, name=name_of(pair))
    tokens = [visible(token) for token in inspection.tokens]
    rows, first = _shown(inspection), max(0, len(tokens) - 1 - WINDOW)
    weights = use.attention.mean(0)
    return _render(
        "looked",
        name=name_of(pair),
        heads=len(use.attention),
        columns=list(enumerate(tokens[:-1]))[first:],
        prompt_length=inspection.prompt_length,
        rows=[(tokens[t], tokens[t + 1], weights[t, first : t + 1].tolist()) for t in rows],
        hidden=(rows.start - inspection.produced.start, first),
    )


def added(inspection: Inspection | None) -> str:
    """How much each connection adds, relative to the anchor's state at its layer: the mean, and for each token."""
    if inspection is None:
        return ""
    tokens, rows = [visible(token) for token in inspection.tokens], _shown(inspection)
    injections = [use.injection[inspection.produced] for use in inspection.connections]
    return _render(
        "added",
        tokens=[tokens[t + 1] for t in rows],
        most=max([injection.max().item() for injection in injections]) or 1,
        uses=[
            (name_of(use.pair), use.pair, injection.mean().item(), injection[-len(rows) :].tolist())
            for use, injection in zip(inspection.connections, injections, strict=True)
        ],
    )


def status(text: str, error: bool = False) -> str:
    """One line that says what is going on, read out by screen readers."""
    return _render("status", text=text, error=error)


def export_html(question: Question, shown: Sequence[Answer], inspection: Inspection) -> str:
    """The page that `calm inspect` writes, of the composed answer, with the other answers."""
    sampled = "its likeliest token each time"
    if question.sampling.temperature:
        sampled = f"sampled at temperature {question.sampling.temperature:g}, seed {question.sampling.seed}"
    return to_html(inspection, {_label(answer): answer.text for answer in shown}, sampled)


def export_json(question: Question, shown: Sequence[Answer], inspection: Inspection | None) -> str:
    """What is shown, as numbers: question, answers, and of each connection its injection and mean attention."""
    content: dict[str, Any] = {
        "prompt": question.prompt,
        "chat_template": question.chat,
        "sampling": dataclasses.asdict(question.sampling),
        "switched_off": sorted(question.off),
        "answers": [dataclasses.asdict(answer) for answer in shown],
        "tokens": None,
        "connections": [],
    }
    if inspection is not None:
        rows = inspection.produced
        content |= {"tokens": inspection.tokens, "prompt_length": inspection.prompt_length}
        content["connections"] = [
            dataclasses.asdict(use.pair)
            | {"injection": use.injection[rows].tolist(), "attention": use.attention.mean(0)[rows].tolist()}
            for use in inspection.connections
        ]
    return json.dumps(content, indent=1)


def _render(template: str, **values: Any) -> str:
    return _environment.get_template(f"{template}.html").render(**values)


def _shown(inspection: Inspection) -> range:
    produced = range(*inspection.produced.indices(len(inspection.tokens)))
    return produced[-ROWS:]


def _use_of(inspection: Inspection | None, pair: LayerPair) -> ConnectionUse | None:
    uses = inspection.connections if inspection is not None else []
    return next((use for use in uses if use.pair == pair), None)


def _label(answer: Answer) -> str:
    return f"augmenting model {answer.name}" if answer.role == "augmenting" else answer.name


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _size(model: PreTrainedModel) -> str:
    number = float(model.num_parameters())
    for unit in ("", "K", "M"):
        if number < 999.5:
            return f"{model.config.model_type}, {number:.3g}{unit} parameters"
        number /= 1000
    return f"{model.config.model_type}, {number:.3g}B parameters"
