"""What fails behind the page: it says so, and what there is can still be had; and addresses that take brackets."""

from __future__ import annotations

import logging

import httpx
import pytest
from factories import Mix, patched
from pages import company, free_port, words

from calm.playground import app
from calm.playground.answers import Question, Sampling


def test_a_measurement_that_fails_leaves_the_answers(caplog: pytest.LogCaptureFixture):
    """As when memory runs out: weights of all pairs of tokens take more of it than the answers did."""
    parts = company(Mix("llama", ("qwen2",)))
    question = Question(words(5, 9, 34), Sampling(4))
    *_, answers = parts.answers(question)

    def fail(*_: object) -> None:
        raise RuntimeError("out of memory, say")

    shown = app.Shown(question, answers)
    with patched(parts, inspect=fail), caplog.at_level(logging.ERROR):
        looked, _, status, as_html, as_json, kept = app.Page(parts)._measure(shown, 0)
    assert "The answers are complete, but what the connections did is not shown." in status
    assert "out of memory, say" in caplog.text and "out of memory" not in status
    assert (as_html["interactive"], as_json["interactive"]) == (False, True)
    assert kept is shown and "After an answer" in looked


def test_version_6_of_the_internet_too():
    """In a URL such an address has brackets."""
    page = app.Page(company(Mix("llama", ("qwen2",)))).build()
    port = free_port()
    url = app.serve(page, "::1", port, None, block=False)
    try:
        assert url == f"http://[::1]:{port}/" and httpx.get(url).status_code == 200
    finally:
        page.close(verbose=False)
