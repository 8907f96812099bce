"""A browser and pages for it: Debian's Chromium, driven by Playwright, on pages served by this process."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pages import free_port

from calm.playground.answers import Company

CHROMIUM = Path("/usr/bin/chromium")


@pytest.fixture(scope="session")
def chromium() -> Iterator[object]:
    """The browser; without one the test fails: `make test-browser` installs it."""
    from playwright.sync_api import sync_playwright

    assert CHROMIUM.exists(), f"{CHROMIUM} is missing: apt-get install chromium, or run make test-browser as root"
    offline = ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=str(CHROMIUM), args=["--no-sandbox", "--disable-gpu", *offline]
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def serve() -> Iterator[Callable[..., str]]:
    """Serves a company until the tests end, and says where."""
    from calm.playground import app

    pages = []

    def start(company: Company, auth: tuple[str, str] | None = None) -> str:
        page = app.Page(company).build()
        pages.append(page)
        return app.serve(page, "127.0.0.1", free_port(), auth, block=False)

    yield start
    for page in pages:
        page.close(verbose=False)


_connected: list[tuple[str, object]] | None = None


def _audit(event: str, arguments: tuple) -> None:
    if _connected is not None and event == "socket.connect" and arguments[0].family != socket.AF_UNIX:
        _connected.append(arguments[1])


@pytest.fixture
def connections_out() -> Iterator[list[tuple[str, int]]]:
    """Every address that this process connects to meanwhile."""
    global _connected
    sys.addaudithook(_audit)
    _connected = []
    yield _connected
    _connected = None
