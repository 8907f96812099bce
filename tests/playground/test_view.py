"""What is shown is what was measured, text stays text, and what does not fit says so."""

from __future__ import annotations

import json
import re
from functools import cache
from html.parser import HTMLParser

import pytest
from factories import Mix
from pages import HOSTILE, company, words

from calm.inspection import Inspection
from calm.inspection.page import visible
from calm.playground import view
from calm.playground.answers import Answer, Company, Question, Sampling

TWO = Mix("llama", ("gpt2", "qwen2"))
QUESTION = Question(words(5, 9, 34, 17, 5), Sampling(8, temperature=4.0, seed=2))


@cache
def measured() -> tuple[Company, list[Answer], Inspection]:
    parts = company(TWO)
    *_, answers = parts.answers(QUESTION)
    return parts, answers, parts.inspect(QUESTION, answers[-1])


class Reader(HTMLParser):
    """The tags and the texts of a document, as a browser sees them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def table(html: str) -> list[list[str]]:
    """The texts of a table's cells, row by row."""
    rows = re.findall(r"<tr>(.*?)</tr>", html, re.S)
    return [["".join(Reader(cell).texts).strip() for cell in re.findall(r"<t[hd].*?</t[hd]>", r, re.S)] for r in rows]


@pytest.mark.parametrize("index", range(4))
def test_the_heat_map_is_what_was_measured(index: int):
    parts, _, inspection = measured()
    use = inspection.connections[index]
    assert use.pair == parts.composed.config.layer_pairs[index]
    head, *rows = table(view.looked(inspection, use.pair))
    tokens = [visible(token) for token in inspection.tokens]
    assert head == ["to produce", *tokens[:-1]]
    weights = use.attention.mean(0)
    expected = [
        [tokens[t + 1], *(f"{weight:.2f}" for weight in weights[t, : t + 1])]
        for t in range(inspection.prompt_length - 1, len(tokens) - 1)
    ]
    assert rows == expected
    other = inspection.connections[index - 1].pair
    assert rows != table(view.looked(inspection, other))[1:]


def test_the_shares_are_what_was_measured():
    _, _, inspection = measured()
    _, *rows = table(view.added(inspection))
    for row, use in zip(rows, inspection.connections, strict=True):
        values = use.injection[inspection.produced]
        assert row[0] == f"{use.pair.augmenting} {use.pair.augmenting_layer} → {use.pair.anchor_layer}"
        assert row[1:] == [f"{values.mean():.2f}", *(f"{value:.2f}" for value in values)]


def test_long_texts_are_cut_and_say_so(monkeypatch: pytest.MonkeyPatch):
    _, _, inspection = measured()
    monkeypatch.setattr(view, "ROWS", 3)
    monkeypatch.setattr(view, "WINDOW", 4)
    use = inspection.connections[0]
    html = view.looked(inspection, use.pair)
    head, *rows = table(html)
    tokens = [visible(token) for token in inspection.tokens]
    assert head[1:] == tokens[-5:-1] and [row[0] for row in rows] == tokens[-3:]
    assert [len(row) - 1 for row in rows] == [2, 3, 4]
    assert rows[-1][1:] == [f"{weight:.2f}" for weight in use.attention.mean(0)[-1, -4:]]
    assert "Not shown: the first 5 produced tokens and the first 8 tokens that were read" in html
    assert [len(row) for row in table(view.added(inspection))] == [2 + 3] * 5
    monkeypatch.undo()
    assert "Not shown" not in view.looked(inspection, use.pair)


def test_before_an_answer_and_with_everything_off_there_is_no_map():
    parts, _, inspection = measured()
    pair = parts.composed.config.layer_pairs[0]
    assert "After an answer" in view.looked(None, pair)
    assert "switched off" in view.looked(None, pair, all_off=True)
    without = Inspection(**{**vars(inspection), "connections": inspection.connections[2:]})
    assert "m0 1 → 1 is switched off" in view.looked(without, pair)
    assert view.added(None) == ""


def test_text_stays_text():
    parts, answers, inspection = measured()
    shown = [answers[0], Answer("augmenting", "m1", [2], "".join(HOSTILE)), *answers[2:]]
    pages = [
        view.answers(parts, shown, frozenset(), running=True),
        view.looked(inspection, inspection.connections[0].pair),
        view.added(inspection),
        view.status("".join(HOSTILE), error=True),
        view.export_html(QUESTION, shown, inspection),
    ]
    for html in pages:
        reader = Reader(html)
        allowed = 2 if html is pages[-1] else 0  # the page's own script, and its data
        assert [tag for tag, _ in reader.tags].count("script") == allowed
        assert not [tag for tag, attributes in reader.tags if tag in ("img", "i") and attributes.get("src")]
        assert not [attributes for _, attributes in reader.tags if any(name.startswith("on") for name in attributes)]
    assert "".join(HOSTILE) in "".join(Reader(pages[0]).texts)
    assert "<script>" in "".join(HOSTILE)  # control: the reader would have found it
    assert [tag for tag, _ in Reader("".join(HOSTILE)).tags][:2] == ["script", "img"]


def test_columns_say_who_answers():
    parts, answers, _ = measured()
    texts = "".join(Reader(view.answers(parts, answers, frozenset({"m0"}), running=False)).texts)
    for expected in ("Augmenting model “m0”", "Augmenting model “m1”", "Anchor", "the anchor and 2 connections to m1"):
        assert expected in texts
    assert "8 tokens · stopped at the limit" in texts
    everything_off = view.answers(parts, answers, frozenset({"m0", "m1"}), running=False)
    assert "all switched off: this is the anchor" in everything_off
    one = company(Mix("llama", ("gpt2",)))
    texts = "".join(Reader(view.answers(one, [], frozenset(), running=False)).texts)
    assert "Augmenting model\n" in texts and "“" not in texts


def test_export_as_json_has_every_number():
    _, answers, inspection = measured()
    content = json.loads(view.export_json(QUESTION, answers, inspection))
    assert content["prompt"] == QUESTION.prompt
    assert content["sampling"] == {"max_new_tokens": 8, "temperature": 4.0, "top_p": 1.0, "seed": 2}
    assert [answer["token_ids"] for answer in content["answers"]] == [answer.token_ids for answer in answers]
    assert content["tokens"] == inspection.tokens
    for found, use in zip(content["connections"], inspection.connections, strict=True):
        assert (found["augmenting"], found["augmenting_layer"], found["anchor_layer"]) == tuple(vars(use.pair).values())
        assert found["injection"] == use.injection[inspection.produced].tolist()
        assert found["attention"] == use.attention.mean(0)[inspection.produced].tolist()
    off = json.loads(view.export_json(Question("w5", off=frozenset({"m1", "m0"})), answers, None))
    assert off["switched_off"] == ["m0", "m1"] and off["connections"] == []


def test_export_as_a_page_has_the_answers_and_says_how_they_were_chosen():
    _, answers, inspection = measured()
    html = view.export_html(QUESTION, answers, inspection)
    texts = "".join(Reader(html).texts)
    assert all(answer.text in texts for answer in answers)
    assert "by the composed model, sampled at temperature 4, seed 2" in texts
    greedy = view.export_html(Question("w5"), answers, inspection)
    assert "by the composed model, its likeliest token each time" in greedy
