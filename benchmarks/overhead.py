"""What composition costs beyond its parts: time, memory and checkpoint size, composed against parts in one run.

The anchor is SmolLM2-135M; the specialist is a copy of its own first half (same tokenizer, weights of its own), joined
by connections at a uniform gap. Composed and parts take turns on one machine, so that what else the machine does hits
both, and a ratio is the median over turns. Targets are those of issue 2, section 5; see README.md beside this file.
"""

from __future__ import annotations

import copy
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from measuring import RESULTS, Result, compare_times, console, hardware, peak_bytes, show, take_turns, versions, write
from parts import connection_inputs, gradients_start_at, randomize_outputs
from torch import Tensor
from transformers import DynamicCache

import calm
from calm import sources
from calm.backbones import layers_of, truncated
from calm.experiments.checkpoints import SMOLLM2_135M
from calm.planning import plan

PACKAGES = ("calm-lm", "torch", "transformers", "safetensors")
CHECKPOINT_ALLOWANCE = 16 * 1024  # bytes, issue 2


class Bench:
    """The composed model, and its parts run on their own: the same modules, so that weights are the same.

    Args:
        specialist_layers: How many of SmolLM2's layers the specialist has.
        connections: How many connections.
        tokens: Length of the sequence of a forward pass or training step; decoding starts after as many.
    """

    def __init__(self, specialist_layers: int, connections: int, tokens: int):
        torch.manual_seed(0)
        anchor = sources.Source.parse(SMOLLM2_135M.fetch())
        anchor_model = sources.load_anchor(anchor, sources.load_config(anchor), dtype=torch.float32)
        specialist = copy.deepcopy(truncated(anchor_model, specialist_layers))
        self.model = randomize_outputs(calm.compose(anchor_model, specialist, connections))
        self.anchor, self.augmenting = self.model.anchor, self.model.augmenting["augmenting"]
        self.first_connected = layers_of(self.anchor)[min(pair.anchor_layer for pair in self.model.config.layer_pairs)]
        self.plan = plan(anchor_model, specialist, connections, sequence_length=tokens, dtype="float32")
        self.ids = torch.randint(0, self.anchor.config.vocab_size, (1, tokens))
        self.optimizer = torch.optim.AdamW(self.model.connections.parameters(), lr=1e-6)

    @torch.no_grad()
    def composed_forward(self) -> None:
        self.model.eval()(self.ids, use_cache=False)

    @torch.no_grad()
    def parts_forward(self) -> None:
        self.augmenting(self.ids, use_cache=False)
        self.anchor.eval()(self.ids, use_cache=False)

    def composed_step(self) -> None:
        self.optimizer.zero_grad()
        self.model.train()(self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()

    def parts_step(self) -> None:
        """The augmenting model forward; the anchor forward, and backward to the output of the first connected layer."""
        with torch.no_grad():
            self.augmenting(self.ids, use_cache=False)
        with gradients_start_at(self.first_connected):
            self.anchor.train()(self.ids, labels=self.ids, use_cache=False).loss.backward()

    def decoders(self) -> tuple[Callable[[], None], Callable[[], None]]:
        """Two functions that decode one more token each, after the sequence, composed and in parts."""
        self.model.eval()
        token = self.ids[:, :1]
        with torch.no_grad():
            cache = self.model(self.ids, use_cache=True).past_key_values
            anchor_cache = DynamicCache(config=self.anchor.config)
            augmenting_cache = DynamicCache(config=self.augmenting.config)
            self.anchor(self.ids, past_key_values=anchor_cache)
            self.augmenting(self.ids, past_key_values=augmenting_cache)

        @torch.no_grad()
        def composed() -> None:
            self.model(token, past_key_values=cache, use_cache=True)

        @torch.no_grad()
        def parts() -> None:
            self.augmenting(token, past_key_values=augmenting_cache, use_cache=True)
            self.anchor(token, past_key_values=anchor_cache, use_cache=True)

        return composed, parts


def timed(
    name: str, composed: Callable[[], None], parts: Callable[[], None], turns: int, target: float, **details: Any
) -> Result:
    """Let the composed model and its parts take turns."""
    seconds = take_turns(name, {"composed": composed, "parts": parts}, turns)
    return compare_times(name, seconds["composed"], seconds["parts"], target, **details)


def memory(bench: Bench) -> Result:
    """Compare what composing adds to the peak of a training step with what connections cannot do without."""
    bench.composed_step()  # the optimizer's states exist from here on
    bench.optimizer.zero_grad()
    trained = sum(weight.nbytes for weight in bench.model.connections.parameters())
    states = sum(t.nbytes for s in bench.optimizer.state.values() for t in s.values() if t.dim())
    composed = peak_bytes(bench.composed_step) + trained + states
    bench.optimizer.zero_grad()
    parts = peak_bytes(bench.parts_step)
    activations = connection_activations(bench)
    needed = trained + trained + states + activations
    ratio = (composed - parts) / needed
    return Result(
        "extra peak memory of a training step",
        composed - parts,
        needed,
        "bytes",
        ratio,
        (ratio, ratio),
        1.05,
        {
            "composed_peak": composed,
            "parts_peak": parts,
            "connection_weights": trained,
            "connection_gradients": trained,
            "optimizer_states": states,
            "connection_activations": activations,
        },
    )


def connection_activations(bench: Bench) -> int:
    """Bytes that the connections alone keep for the backward pass, run one by one outside of the composed model."""
    inputs = connection_inputs(bench.model, input_ids=bench.ids)
    weights = {weight.data_ptr() for weight in bench.model.connections.parameters()}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        added = [connection(hidden, *others) for connection, hidden, others in inputs]
    del added
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def checkpoint(bench: Bench) -> Result:
    """Compare a saved composition, with all files, with its parameters."""
    with tempfile.TemporaryDirectory() as folder:
        bench.model.save_pretrained(folder)
        files = {path.name: path.stat().st_size for path in Path(folder).iterdir()}
    parameters = sum(weight.nbytes for weight in bench.model.connections.parameters())
    ratio = sum(files.values()) / parameters
    target = 1 + CHECKPOINT_ALLOWANCE / parameters
    return Result(
        "checkpoint", sum(files.values()), parameters, "bytes", ratio, (ratio, ratio), target, {"files": files}
    )


def main(
    turns: Annotated[int, typer.Option(min=2, help="Turns of a forward pass and of a training step.")] = 48,
    decode_turns: Annotated[int, typer.Option(min=2, help="Tokens to decode.")] = 200,
    tokens: Annotated[int, typer.Option(min=2, help="Length of a sequence.")] = 512,
    specialist_layers: Annotated[int, typer.Option(min=1, max=30, help="Layers of the specialist.")] = 15,
    connections: Annotated[int, typer.Option(min=1, help="Connections, at a uniform gap.")] = 4,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
) -> None:
    """Measure what composition costs beyond its parts; write DATE-overhead.json."""
    now, machine, start = datetime.now(timezone.utc), hardware(), time.perf_counter()
    bench = Bench(specialist_layers, connections, tokens)
    planned = bench.plan
    parts_flops = planned.anchor.forward_flops + sum(part.forward_flops for part in planned.augmenting.values())
    results = [
        timed(
            f"forward, {tokens} tokens",
            bench.composed_forward,
            bench.parts_forward,
            turns,
            1.05,
            # what the connections' own arithmetic comes to: no implementation of the formula can be below
            ratio_of_flops=1 + planned.connections.forward_flops / parts_flops,
        ),
        timed(
            f"cached decoding, a token after {tokens}",
            *bench.decoders(),
            decode_turns,
            1.10,
            ratio_of_weights_read=planned.weight_bytes / (planned.weight_bytes - planned.connections.weight_bytes),
        ),
        timed("training step", bench.composed_step, bench.parts_step, turns, 1.10),
        memory(bench),
        checkpoint(bench),
    ]
    report = {
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/overhead.py", *sys.argv[1:]]),
        "hardware": machine,
        "versions": versions(PACKAGES),
        "settings": {
            "anchor": "SmolLM2-135M",
            "specialist_layers": specialist_layers,
            "connections": connections,
            "layer_pairs": [(pair.augmenting_layer, pair.anchor_layer) for pair in planned.layer_pairs],
            "tokens": tokens,
            "batch_size": 1,
            "dtype": "float32",
            "composition_parameters": planned.connections.parameters,
        },
        "results": [
            {"parts" if key == "reference" else key: value for key, value in asdict(result).items()}
            for result in results
        ],
        "seconds": round(time.perf_counter() - start),
    }
    path = output / f"{now:%Y-%m-%d}-overhead.json"
    write(path, report)
    title = (
        f"SmolLM2-135M + its first {specialist_layers} layers, {connections} connections, {tokens} tokens, float32; "
        f"{machine['cpu']}, {machine['threads']} threads"
    )
    show(title, "parts", results)
    console.print(f"{path} ({report['seconds']} s)")


if __name__ == "__main__":
    typer.run(main)
