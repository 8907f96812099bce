"""Which choices in the attention matter: the same frozen m_A and m_B, the same D_C, the same steps, three seeds.

Run: `python -m calm.experiments.key_value_arithmetic.ablations --seeds 0 1 2 --steps 250 --lr 3e-3`.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin

import calm
from calm.alignment import Alignment
from calm.attention import GATE_SCALE, Connection, alibi_slopes
from calm.experiments.key_value_arithmetic.composition import train_composition
from calm.experiments.key_value_arithmetic.data import TASKS, Task, build_tokenizer
from calm.experiments.key_value_arithmetic.evaluate import evaluate, flags_of, percent_right
from calm.experiments.key_value_arithmetic.recipe import Recipe, preset
from calm.experiments.key_value_arithmetic.stages import STAGES, kept
from calm.experiments.steps import fingerprint, read_json, write_json


@dataclass(frozen=True)
class Variant:
    """One set of choices; the defaults are those of `attention="gated"`.

    Args:
        gate: "closed" (a gate that starts at zero), "open" (one that starts at 1) or "none" (`W_O` starts at zero, the
            other matrices at random, and what is added does not come in units of the anchor's state).
        identities: behind a gate, start `W_V`, `W_O` and, where the widths are equal, `f_proj` as identities.
        normalize: RMS-normalise queries and context.
        position: "steep" (`calm.attention.alibi_slopes`), "alibi" (2^(-8i/H), as Press et al.), "rotary" or "none".
        pairs: "uniform", "last_to_every" (m_A's last layer to every anchor layer) or "last" (one connection).
    """

    gate: str = "closed"
    identities: bool = True
    normalize: bool = True
    position: str = "steep"
    pairs: str = "uniform"

    def layer_pairs(self, augmenting_layers: int, anchor_layers: int) -> int | list[tuple[int, int]]:
        """What `calm.compose` takes as `connections`."""
        if self.pairs == "last_to_every":
            return [(augmenting_layers - 1, layer) for layer in range(anchor_layers)]
        return anchor_layers if self.pairs == "uniform" else [(augmenting_layers - 1, anchor_layers - 1)]


VARIANTS = {
    "default: gate, identities, both norms, steep ALiBi, uniform pairs": Variant(),
    "no gate: W_O starts at zero": Variant(gate="none"),
    "a gate, all matrices at random": Variant(identities=False),
    "a gate that starts open": Variant(gate="open"),
    "no norms": Variant(normalize=False),
    "no position": Variant(position="none"),
    "standard ALiBi slopes": Variant(position="alibi"),
    "rotary": Variant(position="rotary"),
    "m_A's last layer to every anchor layer": Variant(pairs="last_to_every"),
    "last pair only": Variant(pairs="last"),
    "the paper's formula (no gate, no norms, no position), zero W_O": Variant("none", normalize=False, position="none"),
}


class VariantConnection(Connection):
    """A connection that makes positions itself; its model is composed with `attention="paper"`, which makes none."""

    def __init__(self, augmenting_width: int, anchor_width: int, num_heads: int, variant: Variant) -> None:
        super().__init__(augmenting_width, anchor_width, num_heads, "normalized" if variant.gate == "none" else "gated")
        self.variant, self.normalize = variant, variant.normalize
        if self.gate is None:
            return
        if variant.gate == "open":
            nn.init.constant_(self.gate.bias, 1 / (anchor_width * GATE_SCALE))
        if not variant.identities:
            for linear in (self.f_proj, self.w_v, self.w_o):
                nn.init.normal_(linear.weight, std=1 / math.sqrt(linear.in_features))

    def forward(
        self, hidden: Tensor, context: Tensor, alignment: Alignment, cache_layer: CacheLayerMixin | None = None
    ) -> Tensor:
        """As `Connection.forward`, with this variant's positions."""
        past = 0 if cache_layer is None else cache_layer.get_seq_length()
        self.positions = torch.arange(past, past + hidden.shape[1], dtype=torch.float32)
        slopes = self._slopes()
        if slopes is not None:
            alignment = dataclasses.replace(alignment, slopes=slopes)
        return super().forward(hidden, context, alignment, cache_layer)

    def project(self, hidden: Tensor, context: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Connection.project`, rotated if this variant is rotary."""
        queries, keys, values = super().project(hidden, context)
        if self.variant.position == "rotary":
            queries, keys = rotate(queries, self.positions), rotate(keys, self.positions)
        return queries, keys, values

    def _slopes(self) -> Tensor | None:
        if self.variant.position == "steep":
            return alibi_slopes(self.num_heads)
        if self.variant.position == "alibi":
            return torch.exp2(-8 * torch.arange(1, self.num_heads + 1) / self.num_heads)
        return None


def rotate(states: Tensor, positions: Tensor) -> Tensor:
    """Rotary positions (Su et al., arXiv 2104.09864), base 10,000.

    Args:
        states: [batch, heads, length, width].
        positions: [length].
    """
    half = states.shape[-1] // 2
    angles = positions[:, None] * 10_000 ** -(torch.arange(half) / half)
    first, second = states[..., :half], states[..., half:]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def measure(name: str, recipe: Recipe, seed: int, run_dir: Path) -> dict[str, Any]:
    """Train and evaluate one variant on one seed's bases.

    Args:
        name: one of `VARIANTS`.
        recipe: sizes, steps and learning rate.
        seed: of the bases and of `D_C`.
        run_dir: the run of `run.main` that trained the bases.
    """
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    variant, started = VARIANTS[name], time.process_time()
    folders = {stage.name: str(run_dir / stage.folder) for stage in STAGES}
    torch.manual_seed(seed)
    pairs = variant.layer_pairs(recipe.augmenting_model.layers, recipe.anchor_model.layers)
    model = calm.compose(folders["m_B"], folders["m_A"], pairs, attention="paper")
    for index in range(len(model.connections)):
        model.connections[index] = VariantConnection(
            recipe.augmenting_model.width, recipe.anchor_model.width, recipe.anchor_model.heads, variant
        )
    task = Task.draw(recipe.data, seed)
    train_composition(model, task, recipe, seed, lambda step, total, note: None)
    answers = evaluate(model, build_tokenizer(recipe.data), task, recipe.evaluation_examples, seed)
    return {
        "variant": name,
        "seed": seed,
        "accuracy": {task_name: percent_right(flags_of(answers[task_name])) for task_name in TASKS},
        "cpu_seconds": round(time.process_time() - started, 1),
    }


def markdown(rows: Sequence[dict[str, Any]], seeds: Sequence[int]) -> str:
    """Held-out KV-MATH of each variant: the mean, and each seed."""
    lines = [
        "| variant | mean | " + " | ".join(f"seed {seed}" for seed in seeds) + " |",
        "|---" * (2 + len(seeds)) + "|",
    ]
    for name in dict.fromkeys(row["variant"] for row in rows):
        by_seed = {row["seed"]: row["accuracy"]["KV-MATH"] for row in rows if row["variant"] == name}
        found = [by_seed[seed] for seed in seeds if seed in by_seed]
        if found:
            cells = [f"{by_seed[seed]:.1f}" if seed in by_seed else "" for seed in seeds]
            lines.append(f"| {name} | {statistics.mean(found):.1f} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure all variants on all seeds; results already in the output file are kept."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS), metavar="NAME")
    parser.add_argument("--runs", default="runs/seed{seed}", help="folder of each seed's run, with {seed} in it")
    parser.add_argument("--out", type=Path, default=Path("runs/attention-ablations.json"))
    parser.add_argument("--workers", type=int, default=2)
    chosen = parser.parse_args()

    recipe = preset("demo")
    training = dataclasses.replace(recipe.composition_training, steps=chosen.steps, learning_rate=chosen.lr)
    recipe = dataclasses.replace(recipe, composition_training=training)
    console = Console(highlight=False)
    for seed in chosen.seeds:
        run_dir = Path(chosen.runs.format(seed=seed))
        for stage in STAGES[:2]:
            if not kept(stage, recipe, seed, run_dir):
                parser.error(f"{run_dir} has no {stage.name} of seed {seed}; train it with run.main first")

    identity, stored = fingerprint(recipe, chosen.runs), read_json(chosen.out, {})
    rows: list[dict[str, Any]] = stored.setdefault(identity, [])
    jobs = [(name, seed) for name in chosen.variants for seed in chosen.seeds]
    jobs = [job for job in jobs if job not in {(row["variant"], row["seed"]) for row in rows}]
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(chosen.workers, multiprocessing.get_context("spawn")) as pool:
        futures = [pool.submit(measure, name, recipe, seed, Path(chosen.runs.format(seed=seed))) for name, seed in jobs]
        for future in futures:
            rows.append(future.result())
            write_json(chosen.out, stored)  # other recipes' results among it
            console.print(rows[-1])
    text = markdown(rows, chosen.seeds)
    chosen.out.with_suffix(".md").write_text(text, encoding="utf-8")
    console.print(text, markup=False)


if __name__ == "__main__":
    main()
