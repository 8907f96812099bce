"""What a training step costs, against its floor, LoRA, full fine-tuning and CALM-pytorch, and how it scales.

All that is compared takes turns in one run on one machine, with one batch; a ratio is the median over turns. Targets
are those of issue 3, "How it is measured"; see README.md beside this file.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import peft
import scaling
import torch
import typer
from measuring import (
    RESULTS,
    Result,
    compare_bytes,
    compare_times,
    console,
    hardware,
    held_bytes,
    peak_bytes,
    show,
    take_turns,
    versions,
    write,
)
from parts import Step, adamw, loss_of, randomize_outputs
from random_models import gpt2, llama
from torch import Tensor, nn
from transformers import PreTrainedModel

import calm
from calm import sources
from calm.backbones import decoder_of, layers_of, truncated
from calm.experiments.checkpoints import SMOLLM2_135M
from calm.planning import plan

PACKAGES = ("calm-lm", "torch", "transformers", "peft")
OTHERS = ("CALM-pytorch", "x-transformers")  # benchmarks/requirements.txt


class Comparison(str, Enum):
    """What can be measured on its own: the numbers of issue 3."""

    floor = "floor"  # 1 and 2
    full = "full"  # 3
    calm_pytorch = "calm-pytorch"  # 4
    scaling = "scaling"  # 5


@dataclass(frozen=True)
class Sizes:
    """How large everything is.

    Attributes:
        tokens: Tokens of the one row of a batch.
        connections: Connections, at a uniform gap.
        turns: Turns of each comparison.
        tiny: A random model instead of SmolLM2-135M.
        specialist_layers: Layers of the specialist, for floor and LoRA.
        quarter: Width, layers, heads and inner width of the augmenting model for full fine-tuning: a random llama with
            the anchor's vocabulary and a quarter of its parameters.
        width: Width of both models of the pair for CALM-pytorch, with heads of 64 numbers.
        depths: Layers of that anchor and of that augmenting model.
        vocabulary: Tokens that this pair knows.
        scaling: Sizes of the scaling plots.
    """

    tokens: int = 512
    connections: int = 4
    turns: int = 20
    tiny: bool = False
    specialist_layers: int = 15
    quarter: tuple[int, int, int, int] = (320, 14, 5, 896)
    width: int = 512
    depths: tuple[int, int] = (12, 6)
    vocabulary: int = 20_000
    scaling: scaling.Sizes = field(default_factory=scaling.Sizes)


QUICK = Sizes(
    tokens=32,
    connections=2,
    turns=2,
    tiny=True,
    specialist_layers=4,
    quarter=(32, 4, 2, 64),
    width=128,
    depths=(4, 2),
    vocabulary=256,
    scaling=scaling.QUICK,
)


def load_anchor(sizes: Sizes) -> PreTrainedModel:
    if sizes.tiny:
        return llama(width=64, layers=8, heads=4, vocabulary=256, context=sizes.tokens)
    source = sources.Source.parse(SMOLLM2_135M.fetch())
    return sources.load_anchor(source, sources.load_config(source), dtype=torch.float32)


def specialist_of(anchor: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The anchor's first layers, with weights of their own."""
    return copy.deepcopy(truncated(anchor, layers))


def row_of_tokens(sizes: Sizes, vocabulary: int) -> Tensor:
    return torch.randint(0, vocabulary, (1, sizes.tokens))


def parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in nn.Module.parameters(model))


# -- 1 and 2: the floor, and LoRA --------------------------------------------------------------------------------------


def against_floor_and_lora(sizes: Sizes) -> list[Result]:
    """A step, with outputs of the augmenting model recomputed and kept, against its parts and against LoRA."""
    anchor = load_anchor(sizes)
    specialist = specialist_of(anchor, sizes.specialist_layers)
    with_lora = same_weights(anchor)
    planned = plan(anchor, specialist, sizes.connections, sequence_length=sizes.tokens, dtype="float32")
    model = randomize_outputs(calm.compose(anchor, specialist, sizes.connections))
    step = Step(model, row_of_tokens(sizes, anchor.config.vocab_size))
    lora, lora_details = lora_step(with_lora, model.get_nb_trainable_parameters()[0], step)
    seconds = take_turns(
        "floor and LoRA",
        {
            "composed": step.composed,
            "kept": step.kept,
            "augmenting": step.augmenting,
            "anchor": step.anchor,
            "connections": step.connections,
            "lora": lora,
        },
        sizes.turns,
    )

    def together(*parts: str) -> list[float]:
        return [sum(turn) for turn in zip(*(seconds[part] for part in parts), strict=True)]

    # what the connections' own arithmetic comes to: no implementation of the formula can be below
    arithmetic = step.connection_flops()
    floor = planned.training_step_flops - arithmetic
    kept_floor = floor - sum(part.forward_flops for part in planned.augmenting.values())
    details = {"parameters": planned.total_parameters, "composition_parameters": planned.connections.parameters}
    return [
        compare_times(
            "floor",
            seconds["composed"],
            together("augmenting", "anchor"),
            1.10,
            ratio_of_flops=1 + arithmetic / floor,
            **details,
        ),
        compare_times(
            "floor_with_connections", seconds["composed"], together("augmenting", "anchor", "connections"), None
        ),
        compare_times(
            "floor_kept", seconds["kept"], seconds["anchor"], 1.05, ratio_of_flops=1 + arithmetic / kept_floor
        ),
        compare_times("floor_kept_with_connections", seconds["kept"], together("anchor", "connections"), None),
        compare_times("lora", seconds["composed"], seconds["lora"], 1.25, **lora_details),
        compare_times("lora_kept", seconds["kept"], seconds["lora"], 1.0, **lora_details),
    ]


def same_weights(model: PreTrainedModel) -> PreTrainedModel:
    """Another model around the same weights."""
    return copy.deepcopy(model, {id(t): t for t in (*model.parameters(), *model.buffers())})


def lora_step(anchor: PreTrainedModel, trainable: int, step: Step) -> tuple[Callable[[], None], dict[str, Any]]:
    """A step of PEFT's LoRA on all linear layers, with about as many trainable parameters, batch and loss of `step`."""
    linears = [module for module in decoder_of(anchor).modules() if isinstance(module, nn.Linear)]
    rank = round(trainable / sum(linear.in_features + linear.out_features for linear in linears))
    model = peft.get_peft_model(anchor, peft.LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    optimizer = adamw([weight for weight in model.parameters() if weight.requires_grad])

    def run() -> None:
        optimizer.zero_grad()
        loss_of(model.train(), anchor, step.batch, step.labels).backward()
        optimizer.step()

    return run, {"rank": rank, "lora_parameters": model.get_nb_trainable_parameters()[0]}


# -- 3: full fine-tuning -----------------------------------------------------------------------------------------------


def against_full_fine_tuning(sizes: Sizes) -> list[Result]:
    """A step against one that trains every weight of the anchor, with the anchor's usual loss: its head is trained."""
    anchor = load_anchor(sizes)
    width, layers, heads, inner = sizes.quarter
    vocabulary = anchor.config.vocab_size
    quarter = llama(width=width, layers=layers, heads=heads, inner=inner, vocabulary=vocabulary, context=sizes.tokens)
    tuned = copy.deepcopy(anchor).requires_grad_()
    model = randomize_outputs(calm.compose(anchor, quarter, sizes.connections))
    step = Step(model, row_of_tokens(sizes, anchor.config.vocab_size))
    optimizer = adamw(tuned.parameters())

    def full() -> None:
        optimizer.zero_grad()
        tuned.train()(**step.batch, labels=step.labels, use_cache=False).loss.backward()
        optimizer.step()

    seconds = take_turns("full fine-tuning", {"composed": step.composed, "full": full}, sizes.turns)
    composed = all_bytes(model, step.optimizer, step.composed)
    details = {
        "parameters": parameters(tuned),
        "augmenting_parameters": parameters(quarter),
        "parameters_in_layers": parameters(layers_of(tuned)),
        "augmenting_parameters_in_layers": parameters(layers_of(quarter)),
    }
    return [
        compare_times("full_time", seconds["composed"], seconds["full"], 0.75, **details),
        compare_bytes("full_memory", composed, all_bytes(tuned, optimizer, full), 0.5, **details),
    ]


def all_bytes(model: nn.Module, optimizer: torch.optim.Optimizer, step: Callable[[], None]) -> int:
    """Peak of the bytes of everything in a training step: weights, optimizer states, gradients and whatever else."""
    optimizer.zero_grad()
    return held_bytes(model, optimizer) + peak_bytes(step)


# -- 4: CALM-pytorch ---------------------------------------------------------------------------------------------------


def against_calm_pytorch(sizes: Sizes) -> list[Result]:
    """A step of two GPT-2s against one of x-transformers of the same sizes, connected at the same layers."""
    anchor, augmenting = (
        gpt2(sizes.width, depth, sizes.width // 64, sizes.vocabulary, sizes.tokens) for depth in sizes.depths
    )
    model = randomize_outputs(calm.compose(anchor, augmenting, sizes.connections))
    step = Step(model, row_of_tokens(sizes, sizes.vocabulary))
    from calm_pytorch import calm_pytorch_step  # what it needs, nothing else here does

    other, optimizer, other_step = calm_pytorch_step(
        sizes.width, sizes.depths, sizes.vocabulary, model.config.layer_pairs, step.labels
    )
    seconds = take_turns("CALM-pytorch", {"composed": step.composed, "other": other_step}, sizes.turns)
    details = {
        "parameters": parameters(model),
        "composition_parameters": model.get_nb_trainable_parameters()[0],
        "calm_pytorch_parameters": parameters(other),
        "calm_pytorch_composition_parameters": sum(weight.numel() for weight in other.parameters()),
    }
    return [
        compare_times("calm_pytorch_time", seconds["composed"], seconds["other"], 0.9, **details),
        compare_bytes(
            "calm_pytorch_memory",
            all_bytes(model, step.optimizer, step.composed),
            all_bytes(other, optimizer, other_step),
            0.8,
            **details,
        ),
    ]


# -- all ---------------------------------------------------------------------------------------------------------------

COMPARISONS: dict[Comparison, Callable[[Sizes], list[Result]]] = {
    Comparison.floor: against_floor_and_lora,
    Comparison.full: against_full_fine_tuning,
    Comparison.calm_pytorch: against_calm_pytorch,
}


def main(
    only: Annotated[list[Comparison] | None, typer.Argument(help="What to measure; everything by default.")] = None,
    turns: Annotated[int | None, typer.Option(min=2, help="Turns of each comparison.")] = None,
    quick: Annotated[bool, typer.Option(help="Tiny models, to see that the script runs.")] = False,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = RESULTS,
) -> None:
    """Measure what a training step costs; write DATE-training.json and a plot for each way of scaling."""
    chosen = list(only or Comparison)
    if Comparison.calm_pytorch in chosen and importlib.util.find_spec("CALM_pytorch") is None:
        console.print(
            "[bold red]CALM-pytorch is not installed[/]: `make bench-training` installs benchmarks/requirements.txt. "
            "Without it, name what to measure: python benchmarks/training.py floor full scaling"
        )
        raise typer.Exit(1)
    packages = [*PACKAGES, *(OTHERS if Comparison.calm_pytorch in chosen else ())]
    sizes = QUICK if quick else Sizes()
    if turns is not None:
        sizes = replace(sizes, turns=turns, scaling=replace(sizes.scaling, turns=turns))
    now, start = datetime.now(timezone.utc), time.perf_counter()
    report: dict[str, Any] = {
        "date": now.isoformat(timespec="seconds"),
        "command": " ".join(["python", "benchmarks/training.py", *sys.argv[1:]]),
        "hardware": hardware(),
        "versions": versions(packages),
        "settings": {
            "anchor": "a random llama" if sizes.tiny else "SmolLM2-135M",
            "batch_size": 1,
            "dtype": "float32",
            **asdict(sizes),
        },
        "ratios": {},
        "results": [],
    }
    parts = [*(comparison.value for comparison in only or ()), *(["quick"] if quick else [])]
    name = "-".join([f"{now:%Y-%m-%d}-training", *parts])
    unfinished = output / f"{name}.unfinished.json"  # what an interrupted run leaves
    results: list[Result] = []
    for comparison in chosen:
        torch.manual_seed(0)
        if comparison is Comparison.scaling:
            report["scaling"] = scaling.measure(sizes.scaling)
        else:
            results += COMPARISONS[comparison](sizes)
        report["ratios"] = {result.name: result.ratio for result in results}
        report["results"] = [asdict(result) for result in results]
        report["seconds"] = round(time.perf_counter() - start)
        write(unfinished, report)
    if "scaling" in report:
        scaling.draw(report["scaling"], output / name)
    path = unfinished.replace(output / f"{name}.json")
    machine = f"{report['hardware']['cpu']}, {report['hardware']['threads']} threads"
    show(f"{report['settings']['anchor']}, {sizes.tokens} tokens, float32; {machine}", "compared with", results)
    if "scaling" in report:
        line = report["scaling"]["augmenting_models"]["line"]
        console.print(
            f"one more augmenting model: {line['slope']:.3f} s a step, {line['slope_by_one']:.2f} of one alone "
            f"(a straight line, R² {line['r_squared']:.4f})"
        )
    console.print(f"{path} ({report['seconds']} s)")


if __name__ == "__main__":
    typer.run(main)
