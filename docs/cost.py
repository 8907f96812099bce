"""Write docs/cost.md: what real pairs will cost, by `calm plan`, and how its predictions compare with measurements.

Run `python docs/cost.py` (a few minutes; no weights, no network). The measurements are those of the newest
benchmarks/results/DATE-planning.json, which `make bench-planning` writes.
"""

from __future__ import annotations

import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Gemma2Config, Gemma3TextConfig, LlamaConfig, PreTrainedConfig, Qwen3Config

from calm.planning import Plan, plan

PAGE = Path(__file__).with_name("cost.md")
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"

# NVIDIA's data sheet of the H100 SXM: dense bfloat16 tensor cores, and float32 outside of them (PyTorch's default).
PEAK_FLOPS = {"bfloat16": 989e12, "float32": 67e12}
UTILISATION = 0.4
CARD_BYTES = 80e9
GPUS, CONNECTIONS, LENGTH = 8, 4, 4096


def config(
    kind: type[PreTrainedConfig],
    vocab: int,
    width: int,
    feed_forward: int,
    layers: int,
    heads: int,
    key_value_heads: int,
    head_dim: int,
    tied: bool,
    **others: Any,
) -> PreTrainedConfig:
    """A configuration by the numbers in the `config.json` of the model's repository."""
    return kind(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=feed_forward,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head_dim,
        tie_word_embeddings=tied,
        max_position_embeddings=8192,
        **others,
    )


# From each model's config.json on the hub; totals agree with the parameter counts on their model cards.
MODELS = {
    "google/gemma-2-2b": config(Gemma2Config, 256_000, 2304, 9216, 26, 8, 4, 256, True, sliding_window=4096),
    "google/gemma-2-27b": config(Gemma2Config, 256_000, 4608, 36_864, 46, 32, 16, 128, True, sliding_window=4096),
    "google/gemma-3-4b-it": config(Gemma3TextConfig, 262_208, 2560, 10_240, 34, 8, 4, 256, True, sliding_window=1024),
    "google/gemma-3-27b-it": config(
        Gemma3TextConfig, 262_208, 5376, 21_504, 62, 32, 16, 128, True, sliding_window=1024
    ),
    "Qwen/Qwen3-1.7B": config(Qwen3Config, 151_936, 2048, 6144, 28, 16, 8, 128, True),
    "Qwen/Qwen3-32B": config(Qwen3Config, 151_936, 5120, 25_600, 64, 64, 8, 128, False),
    "meta-llama/Llama-3.2-1B": config(LlamaConfig, 128_256, 2048, 8192, 16, 32, 8, 64, True),
    "meta-llama/Llama-3.1-8B": config(LlamaConfig, 128_256, 4096, 14_336, 32, 32, 8, 128, False),
    "meta-llama/Llama-3.1-70B": config(LlamaConfig, 128_256, 8192, 28_672, 80, 64, 8, 128, False),
    "HuggingFaceTB/SmolLM2-135M": config(LlamaConfig, 49_152, 576, 1536, 30, 9, 3, 64, True),
    "HuggingFaceTB/SmolLM2-1.7B": config(LlamaConfig, 49_152, 2048, 8192, 24, 32, 32, 64, True),
}
PAIRS = [
    ("HuggingFaceTB/SmolLM2-1.7B", "HuggingFaceTB/SmolLM2-135M"),
    ("meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.2-1B"),
    ("google/gemma-2-27b", "google/gemma-2-2b"),
    ("google/gemma-3-27b-it", "google/gemma-3-4b-it"),
    ("Qwen/Qwen3-32B", "Qwen/Qwen3-1.7B"),
    ("meta-llama/Llama-3.1-70B", "meta-llama/Llama-3.1-8B"),
]

TEXT = """# What will it cost?

`calm plan ANCHOR AUGMENTING` answers for your pair, from configurations alone: it builds the composition without
weights and runs a training step by its shapes, operation by operation. It plans one sequence of 512 tokens in bfloat16
unless it is told otherwise; a recipe's defaults are `--dtype float32 --batch-size 8 --sequence-length 1024`. In Python
it is `calm.planning.plan`. This page is written by `python docs/cost.py`.

## The words
parameters
: Of the anchor, the augmenting model up to its last connected layer and without its head, and the connections. Only
  the connections are trained.

checkpoint
: The size of `model.safetensors`: the connections in float32, and nothing else.

memory to train
: The most that tensors take at any moment of a training step: all weights, AdamW's states, activations from the first
  connection upwards, and a chunk of logits or the gradients. What a kernel needs within itself, fragmentation and the
  GPU's own context are not in it, nor the attention weights that a logged step measures.

data parallel
: Each GPU holds all weights and trains on its own batch. Besides the above, a copy of the gradients to send.

sharded
: FSDP2: each GPU holds its share of weights and optimizer states, and gathers a layer when it is needed. Activations
  are not shared out. (Of two processes on a CPU, `tests/test_planning.py` measures the memory: data parallel within 10%
  of the plan, sharded within 20%, since how many layers are gathered ahead differs from run to run.)

FLOPs
: Multiplications and additions of matrix products and attention, each counted as one. A step's are fewer than the
  usual "three times the forward pass": nothing flows back below the first connection, and frozen weights get no
  gradients.

step time
: Of one optimizer step on one process. On your machine, `calm plan --calibrate speed.json` measures its speed in
  about a minute, and `calm plan ANCHOR AUGMENTING --calibration speed.json` adds the time. What several GPUs send to
  one another is not in it.

```sh
calm plan google/gemma-2-27b google/gemma-2-2b --sequence-length 4096 --processes 8
calm plan --calibrate speed.json --dtype float32
calm plan ./anchor ./specialist --dtype float32 --batch-size 4 --calibration speed.json --json
```
"""


@dataclass(frozen=True)
class Row:
    """A pair and its plan, without and with activation checkpointing."""

    anchor: str
    augmenting: str
    plan: Plan
    checkpointed: Plan

    @property
    def name(self) -> str:
        """Both names, without their owners."""
        return " + ".join(name.rpartition("/")[2] for name in (self.anchor, self.augmenting))


def seconds(planned: Plan) -> float:
    """Of a step on one GPU, at `UTILISATION`."""
    flops = planned.training_step_flops_by_dtype
    return sum(count / (UTILISATION * PEAK_FLOPS[dtype]) for dtype, count in flops.items())


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its first column to the left."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join("| " + " | ".join(cells) + " |\n" for cells in lines)


def validation(report: dict[str, Any]) -> str:
    """What was predicted and measured, a line for each pair and dtype."""
    names = {
        "parameters": "parameters",
        "checkpoint_bytes": "checkpoint",
        "step_flops": "FLOPs",
        "peak_bytes": "peak memory",
        "step_seconds": "step time",
    }
    runs: dict[tuple[str, str, str], dict[str, dict[str, Any]]] = {}
    for result in report["results"]:
        runs.setdefault((result["pair"], result["batch"], result["dtype"]), {})[result["what"]] = result

    def cell(what: str, found: dict[str, dict[str, Any]]) -> str:
        if what not in found:
            return "-"
        result = found[what]
        if what in ("parameters", "checkpoint_bytes"):
            return f"{result['measured']:,}" + (" exact" if result["error"] == 0 else f" ({result['error']:+.2%})")
        scale, unit = {"step_flops": (1e9, "G"), "peak_bytes": (1e6, "MB"), "step_seconds": (1, "s")}[what]
        predicted, measured = (
            f"{result[key] / scale:,.{2 if unit == 's' else 0}f}" for key in ("predicted", "measured")
        )
        return f"{predicted} / {measured} {unit} ({result['error']:+.1%})"

    machine, targets = report["hardware"], report["settings"]["targets"]
    where = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    missed = sum(not result["met"] for result in report["results"])
    rows = [[*key, *(cell(what, found) for what in names)] for key, found in runs.items()]
    return (
        f"\n## Predicted and measured\n{where}; torch {report['versions']['torch']}, transformers "
        f"{report['versions']['transformers']}; {report['date'][:10]} (`make bench-planning`). Predicted / measured, "
        f"and the error; targets: parameters and checkpoint exact, FLOPs {targets['step_flops']:.0%}, memory "
        f"{targets['peak_bytes']:.0%}, time {targets['step_seconds']:.0%}. "
        + ("All are met." if not missed else f"**{missed} of {len(report['results'])} are missed.**")
        + " The calibration ran other pairs than these. A step holds sequences x tokens; the time is the shortest of "
        f"{report['settings']['turns']} steps.\n\n" + table(["pair", "batch", "dtype", *names.values()], rows)
    )


def predictions(rows: list[Row]) -> str:
    """The tables of pairs that were not run."""

    def fits(size: int) -> str:
        return f"{size / 1e9:,.1f}" + ("" if size <= CARD_BYTES else " (too large)")

    sizes, memory, times = [], [], []
    for row in rows:
        p = row.plan
        (augmenting,) = p.augmenting.values()
        sizes.append(
            [
                row.name,
                f"{p.anchor.parameters / 1e9:,.2f}",
                f"{augmenting.parameters / 1e9:,.2f} ({augmenting.layers} of {augmenting.layers_in_full} layers)",
                f"{p.connections.parameters / 1e6:,.0f} ({p.connections.parameters / p.total_parameters:.1%})",
                f"{p.checkpoint_bytes / 1e9:,.2f}",
                f"{p.inference_bytes / 1e9:,.1f}",
            ]
        )
        for variant, tried in (("no", p), ("yes", row.checkpointed)):
            memory.append(
                [
                    row.name,
                    variant,
                    f"{tried.training_weight_bytes / 1e9:,.1f}",
                    f"{tried.optimizer_bytes / 1e9:,.1f}",
                    f"{tried.activation_bytes / 1e9:,.1f}",
                    *map(fits, (tried.training_bytes, tried.data_parallel_bytes, tried.sharded_bytes)),
                ]
            )
        hours = seconds(p) / LENGTH * 1e6 / 3600
        times.append(
            [
                row.name,
                f"{p.forward_flops_per_token / 1e9:,.1f}",
                f"{p.training_step_flops / LENGTH / 1e9:,.1f}",
                f"{p.training_step_flops_by_dtype['float32'] / p.training_step_flops:.1%}",
                f"{seconds(p):,.2f}",
                f"{seconds(row.checkpointed):,.2f}",
                f"{hours:,.2f}",
                f"{hours / GPUS:,.3f}",
            ]
        )
    return (
        f"\n## Real pairs, predicted\n**Predicted, not measured**: no machine that this project has could hold most of "
        f"them. By the published configurations, in bfloat16 with {CONNECTIONS} connections (in float32, as training "
        f"keeps them); one sequence of {LENGTH:,} tokens on each GPU. GB are 10^9 bytes.\n\n"
        "Parameters in billions (connections in millions, and their share), checkpoint in GB, and GB to run (weights "
        f"and caches of one sequence):\n\n"
        + table(["pair", "anchor", "augmenting model", "connections", "checkpoint", "to run"], sizes)
        + f"\nMemory to train in GB, by GPU, without and with activation checkpointing; a card has "
        f"{CARD_BYTES / 1e9:.0f}. (Gemma 2 needs so much without it because transformers spells out its "
        "soft-capped attention.)\n\n"
        + table(
            [
                *("pair", "checkpointing", "weights", "AdamW", "activations", "one GPU"),
                f"{GPUS} GPUs, data parallel",
                f"{GPUS} GPUs, sharded",
            ],
            memory,
        )
        + f"\nTime on H100 SXM cards, from the data sheet ({PEAK_FLOPS['bfloat16'] / 1e12:.0f} TFLOPS in bfloat16, "
        f"{PEAK_FLOPS['float32'] / 1e12:.0f} in float32) at an assumed utilisation of {UTILISATION:.0%}. FLOPs in "
        "billions a token; hours of a million tokens, which on several GPUs leave out what they send to one another "
        "(with sharding, all weights twice a step):\n\n"
        + table(
            [
                *("pair", "forward FLOPs", "step FLOPs", "in float32", "seconds a step", "with checkpointing"),
                "hours, 1 GPU",
                f"hours, {GPUS} GPUs",
            ],
            times,
        )
        + "\nWhat is computed in float32 are the connections; `bf16: true` in a recipe computes them in bfloat16 as "
        "well, and torch.backends.cuda.matmul.allow_tf32 lets tensor cores do them.\n"
        + f"\n*transformers {transformers.__version__}, torch {torch.__version__}.*\n"
    )


def main() -> None:
    """Plan every pair and write the page."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    rows = []
    for anchor, augmenting in PAIRS:
        planned, checkpointed = (
            plan(
                MODELS[anchor],
                MODELS[augmenting],
                CONNECTIONS,
                sequence_length=LENGTH,
                processes=GPUS,
                activation_checkpointing=checkpointing,
            )
            for checkpointing in (False, True)
        )
        rows.append(Row(anchor, augmenting, planned, checkpointed))
        print(rows[-1].name, f"{planned.total_parameters:,}", file=sys.stderr, flush=True)
    measured = sorted(RESULTS.glob("*-planning.json"))
    report = validation(json.loads(measured[-1].read_text())) if measured else ""
    PAGE.write_text(TEXT + report + predictions(rows))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
