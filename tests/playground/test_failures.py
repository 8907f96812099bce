"""What fails behind the page: it says so, and what there is can still be had; and addresses that take brackets."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from types import SimpleNamespace

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


def test_stop_holds_for_what_was_asked_before_it_and_for_nothing_after():
    """Also where the next question comes before the round that runs has ended."""
    page = app.Page(company(Mix("llama", ("qwen2",))))
    visitor, other = SimpleNamespace(session_hash="visitor"), SimpleNamespace(session_hash="other")

    def generate(request: SimpleNamespace) -> Iterator[tuple]:
        return page._generate(request, page._begin()[1], words(5, 9, 34), 20, 0.0, 1.0, 0, False, True)

    running, waiting, others = generate(visitor), generate(visitor), generate(other)
    for answers in (running, others):
        next(answers), next(answers)
    page._stop(visitor)
    asked_anew = generate(visitor)
    rounds = [len(list(answers)) for answers in (running, waiting, others, asked_anew)]
    assert rounds == [1, 3, 20, 22]


def test_a_name_that_leads_here_from_elsewhere_is_refused():
    """A page that has it could else ask the models, and read the answers."""
    page = app.Page(company(Mix("llama", ("qwen2",)))).build()
    url = app.serve(page, "127.0.0.1", port := free_port(), None, block=False)
    try:
        for name, status in ((f"127.0.0.1:{port}", 200), (f"localhost:{port}", 200), (f"evil.example:{port}", 400)):
            for path in ("", "config", "gradio_api/info"):
                assert httpx.get(f"{url}{path}", headers={"host": name}).status_code == status
    finally:
        page.close(verbose=False)


def test_version_6_of_the_internet_too():
    """In a URL such an address has brackets."""
    page = app.Page(company(Mix("llama", ("qwen2",)))).build()
    port = free_port()
    url = app.serve(page, "::1", port, None, block=False)
    try:
        assert url == f"http://[::1]:{port}/" and httpx.get(url).status_code == 200
    finally:
        page.close(verbose=False)
