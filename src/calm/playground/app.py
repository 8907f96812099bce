"""The Gradio page: what is on it, what its buttons do, and how it is served."""

from __future__ import annotations

import itertools
import logging
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from calm.errors import CalmError
from calm.hosts import in_url, is_loopback, names_of
from calm.inspection import Inspection
from calm.inspection.measure import MAX_TOKENS
from calm.inspection.page import name_of
from calm.playground import view
from calm.playground.answers import MAX_CHARACTERS, Answer, Company, Question, Sampling

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).parent
SESSIONS = 32
"""Whose last answers are kept; an inspection holds the weights of all pairs of tokens."""
KEPT = 3600
"""Seconds for which they are."""
GONE = "This answer is no longer kept. Generate it again to export it."
NOT_SHOWN = "The answers are complete, but what the connections did is not shown."

_PLAIN: dict[str, Any] = {"js_on_load": None, "apply_default_css": False}
"""HTML as it is: the page has its own style and script."""


@dataclass
class Shown:
    """What one visitor sees, kept between clicks."""

    question: Question
    answers: list[Answer]
    inspection: Inspection | None = None


class Page:
    """The page of one composition.

    Args:
        company: Who answers.
    """

    def __init__(self, company: Company):
        self.company = company
        self._numbers = itertools.count(1)  # of runs and stops, as they come
        self._stopped: dict[str, int] = {}  # the last stop of a session, which holds for the runs before it

    def build(self) -> gr.Blocks:
        """Lay the page out and connect its parts; nothing is served yet."""
        names, pairs = list(self.company.augmenting), self.company.composed.config.layer_pairs
        context = self.company.composed.context_length
        most = min(context or MAX_TOKENS, MAX_TOKENS)
        defaults = Sampling()
        with gr.Blocks(title="calm playground", analytics_enabled=False, fill_width=True) as page:
            shown = gr.State(None, time_to_live=KEPT)
            exported = gr.Textbox(visible="hidden", show_label=False)
            # not a state, which would be read only when it is the question's turn
            run = gr.Number(0, precision=0, visible="hidden", show_label=False)
            gr.HTML(view.intro(self.company), **_PLAIN)
            with gr.Row(equal_height=False, elem_id="ask"):
                with gr.Column(scale=3, min_width=300):
                    prompt = gr.Textbox(
                        label="Prompt",
                        placeholder="Write something for the models to continue …",
                        lines=3,
                        max_lines=12,
                        max_length=MAX_CHARACTERS,
                        elem_id="prompt",
                        autofocus=True,
                    )
                    with gr.Row(elem_id="actions"):
                        generate = gr.Button("Generate", variant="primary", elem_id="generate")
                        stop = gr.Button("Stop", variant="secondary", elem_id="stop")
                with gr.Column(scale=2, min_width=300):
                    switches = [
                        gr.Checkbox(
                            value=True,
                            label="Augmenting model is on" if len(names) == 1 else f"Augmenting model “{name}” is on",
                            info="off: the composed model is the anchor alone"
                            if len(names) == 1
                            else "off: its connections add nothing to the composed model",
                            elem_id=f"switch-{index}",
                        )
                        for index, name in enumerate(names)
                    ]
                    with gr.Accordion("Sampling", open=False, elem_id="sampling"):
                        max_new_tokens = gr.Slider(
                            1, most, min(defaults.max_new_tokens, most), step=1, label="Most new tokens"
                        )
                        temperature = gr.Slider(
                            0,
                            2,
                            defaults.temperature,
                            step=0.05,
                            label="Temperature",
                            info="0: the likeliest token each time",
                        )
                        top_p = gr.Slider(
                            0.05,
                            1,
                            defaults.top_p,
                            step=0.05,
                            label="Top-p",
                            info="with a temperature: from the likeliest tokens of this total probability",
                        )
                        seed = gr.Number(defaults.seed, precision=0, label="Seed", info="with a temperature")
                        chat = gr.Checkbox(
                            value=self.company.tokenizer.chat_template is not None,
                            visible=self.company.tokenizer.chat_template is not None,
                            label="Chat template",
                            info="off: the prompt is continued as it is",
                        )
            status = gr.HTML(view.status("Ready."), **_PLAIN)
            answers = gr.HTML(self._answers([], frozenset(), running=False), **_PLAIN, elem_id="answers")
            gr.HTML(view.heading("looked"), **_PLAIN)
            connection = gr.Radio(
                [(name_of(pair), index) for index, pair in enumerate(pairs)],
                value=0,
                label="Connection: from a layer of the augmenting model → to a layer of the anchor, counted from 0",
                elem_id="connection",
            )
            looked = gr.HTML(view.looked(None, pairs[0]), **_PLAIN, elem_id="looked")
            gr.HTML(view.heading("added"), **_PLAIN)
            added = gr.HTML(view.added(None), **_PLAIN, elem_id="added")
            with gr.Row(elem_id="export"):
                as_html = gr.Button("Export as a page (HTML)", size="sm", interactive=False, elem_id="export-html")
                as_json = gr.Button("Export as data (JSON)", size="sm", interactive=False, elem_id="export-json")

            inputs = [run, prompt, max_new_tokens, temperature, top_p, seed, chat, *switches]
            quiet: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
            one_at_a_time: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "models"}
            gr.on([generate.click, prompt.submit], self._begin, None, [status, run], queue=False, **quiet).then(
                self._generate, inputs, [answers, status, shown], **one_at_a_time, **quiet
            ).then(
                self._measure,
                [shown, connection],
                [looked, added, status, as_html, as_json, shown],
                **one_at_a_time,
                **quiet,
            )
            stop.click(self._stop, None, None, queue=False, **quiet)
            connection.change(self._look, [shown, connection], looked, **quiet)
            for button, kind in ((as_html, "html"), (as_json, "json")):
                export = self._export_html if kind == "html" else self._export_json
                button.click(export, shown, exported, **quiet).then(
                    None, exported, None, js=f"(text) => window.calmDownload('calm-playground.{kind}', text)", **quiet
                )
        return page

    def _begin(self) -> tuple[str, int]:
        """Runs at once, even while another visitor's answers are being written."""
        return view.status("Waiting for the models …"), next(self._numbers)

    def _stop(self, request: gr.Request) -> None:
        self._stopped[str(request.session_hash)] = next(self._numbers)

    def _generate(
        self,
        request: gr.Request,
        run: int,
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        chat: bool,
        *switches: bool,
    ) -> Iterator[tuple[str, str, Shown | None]]:
        """Stream the answers, side by side."""
        off = frozenset(name for name, on in zip(self.company.augmenting, switches, strict=True) if not on)
        last: list[Answer] = []
        try:
            sampling = Sampling(int(max_new_tokens), float(temperature), float(top_p), int(seed or 0))
            question = Question(prompt or "", sampling, off, chat)
            yield self._answers([], off, running=True), view.status("Reading the prompt …"), None
            for last in self.company.answers(question):
                yield self._answers(last, off, running=True), view.status("Writing …"), None
                if run < self._stopped.get(str(request.session_hash), 0):
                    break
        except CalmError as error:
            yield self._answers(last, off, running=False), view.status(str(error), error=True), None
            return
        except Exception:  # as when memory runs out: the page must not wait for ever
            logger.exception("an answer failed")
            text = "The models failed. What they said is where calm playground was started."
            yield self._answers(last, off, running=False), view.status(text, error=True), None
            return
        yield self._answers(last, off, running=False), view.status("Measuring …"), Shown(question, last)

    def _measure(self, shown: Shown | None, connection: int) -> tuple[Any, ...]:
        """Look into the composed model for the answer that it gave."""
        pair = self.company.composed.config.layer_pairs[connection]
        if shown is None:  # there is an error to be read
            idle = gr.update(interactive=False)
            return view.looked(None, pair), view.added(None), gr.skip(), idle, idle, None
        text = "Ready."
        all_off = shown.question.off == set(self.company.augmenting)
        if not all_off:
            try:
                shown.inspection = self.company.inspect(shown.question, shown.answers[-1])
            except CalmError as error:
                text = f"{NOT_SHOWN} {error}"
            except Exception:
                logger.exception("a measurement failed")
                text = f"{NOT_SHOWN} Measuring it failed; why is said where calm playground was started."
        return (
            view.looked(shown.inspection, pair, all_off),
            view.added(shown.inspection),
            view.status(text),
            gr.update(interactive=shown.inspection is not None),
            gr.update(interactive=True),
            shown,
        )

    def _look(self, shown: Shown | None, connection: int) -> str:
        pair = self.company.composed.config.layer_pairs[connection]
        all_off = shown is not None and shown.question.off == set(self.company.augmenting)
        return view.looked(shown.inspection if shown is not None else None, pair, all_off)

    def _export_html(self, shown: Shown | None) -> str:
        if shown is None or shown.inspection is None:
            raise gr.Error(GONE, print_exception=False)
        return view.export_html(shown.question, shown.answers, shown.inspection)

    def _export_json(self, shown: Shown | None) -> str:
        if shown is None:
            raise gr.Error(GONE, print_exception=False)
        return view.export_json(shown.question, shown.answers, shown.inspection)

    def _answers(self, answers: list[Answer], off: frozenset[str], running: bool) -> str:
        return view.answers(self.company, answers, off, running)


def serve(page: gr.Blocks, host: str, port: int, auth: tuple[str, str] | None, block: bool = True) -> str:
    """Serve a page until it is interrupted.

    Args:
        page: From `Page.build`.
        host: Address to listen on.
        port: Port to listen on.
        auth: User and password; needed where others can reach the address.
        block: Return only when interrupted.

    Returns:
        Where the page is.

    Raises:
        CalmError: If the address is not this machine's own and there is no password, or if it cannot be listened on.
    """
    check_address(host, port, auth)
    page.queue(api_open=False)
    # a web page that has a name of its own lead here (DNS rebinding) is known by that name
    local = [Middleware(TrustedHostMiddleware, allowed_hosts=names_of(host))]
    try:
        _, url, _ = page.launch(
            server_name=in_url(host),  # it makes URLs of it
            server_port=port,
            auth=auth,
            app_kwargs={"middleware": local if auth is None else []},
            prevent_thread_lock=not block,
            quiet=True,
            share=False,
            show_error=False,
            max_file_size=1,  # byte: nothing on the page takes files
            state_session_capacity=SESSIONS,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            mcp_server=False,
            pwa=False,
            theme=theme(),
            head=f"<style>{(FOLDER / 'page.css').read_text(encoding='utf-8')}</style>",  # css= would rewrite it
            js=(FOLDER / "page.js").read_text(encoding="utf-8"),
        )
    except OSError as error:  # taken since it was looked at
        raise _cannot_listen(host, port, error) from error
    return str(url)


def check_address(host: str, port: int, auth: tuple[str, str] | None) -> None:
    """Refuse an address that others can reach, unless a password is asked for, or that cannot be listened on.

    Raises:
        CalmError: As said.
    """
    if not is_loopback(host) and auth is None:
        raise CalmError(
            f"--host {host} can be reached from other machines: set CALM_PLAYGROUND_AUTH=USER:PASSWORD, which visitors "
            "are then asked for, or leave --host out."
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET  # as Gradio takes it
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        raise _cannot_listen(host, port, error) from error


def _cannot_listen(host: str, port: int, error: OSError) -> CalmError:
    return CalmError(f"Cannot listen on {in_url(host)}:{port} ({error}). Choose another --port or --host.")


def theme() -> gr.themes.Base:
    """The colours of `calm inspect`'s page, and fonts that every system has."""
    return gr.themes.Base(
        font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"], radius_size="md"
    ).set(
        body_background_fill="#fbfaf7",
        body_background_fill_dark="#15171b",
        body_text_color="#23262d",
        body_text_color_dark="#e6e4de",
        body_text_color_subdued="#626a76",
        body_text_color_subdued_dark="#9ba3ae",
        block_background_fill="#ffffff",
        block_background_fill_dark="#1c1f25",
        block_border_color="#dfdcd4",
        block_border_color_dark="#333842",
        border_color_primary="#dfdcd4",
        border_color_primary_dark="#333842",
        input_background_fill="#ffffff",
        input_background_fill_dark="#15171b",
        input_border_color="#dfdcd4",
        input_border_color_dark="#333842",
        color_accent="#1f5f8b",
        slider_color="#1f5f8b",
        slider_color_dark="#7cc4f0",
        button_primary_background_fill="#1f5f8b",
        button_primary_background_fill_hover="#174a6d",
        button_primary_background_fill_dark="#7cc4f0",
        button_primary_background_fill_hover_dark="#a3d6f5",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#0d1418",
        checkbox_background_color_selected="#1f5f8b",
        checkbox_background_color_selected_dark="#2f7fb5",
    )
