"""Tiny bases on disk for tests of data, training and the command line: random llamas that share a small tokenizer."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<pad>", "<bos>", "<eos>", "<|user|>", "<|assistant|>", "<|system|>"]


def byte_tokenizer(
    *, bos: bool = True, chat: bool = False, merges: list[tuple[str, str]] | None = None
) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes, and of the given merges of them, that can write any text."""
    merges = merges or []
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *alphabet, *("".join(pair) for pair in merges)])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=CHAT_TEMPLATE if chat else None,
    )


def save_base(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast | None,
    *,
    seed: int,
    width: int = 32,
    layers: int = 2,
    **config: object,
) -> Path:
    """Saves a random llama, with attention dropout so that resuming has to restore random states to be exact."""
    torch.manual_seed(seed)
    vocabulary = len(tokenizer) if tokenizer else 262
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.2,  # at the usual 0.02 the frozen head could not say much, whatever is trained
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            **{"attention_dropout": 0.1, "max_position_embeddings": 64} | config,
        )
    )
    model.save_pretrained(folder)
    if tokenizer:
        tokenizer.save_pretrained(folder)
    return folder


def cache_as(name: str, folder: Path, cache: Path, revision: str = "main") -> None:
    """Puts a folder into a cache of the hub's, as if it had been downloaded from the repository of that name."""
    repository = cache / f"models--{name.replace('/', '--')}"
    commit = revision.encode().hex().zfill(40)
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir(exist_ok=True)
    (repository / "refs" / revision).write_text(commit)


def write_jsonl(path: Path, rows: list[dict]) -> Path:
    """Writes one JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Prompt/completion examples of small sums."""
    numbers = random.Random(seed)
    pairs = [(numbers.randint(0, 9), numbers.randint(0, 9)) for _ in range(count)]
    return [{"prompt": f"{a}+{b}=", "completion": f"{a + b}"} for a, b in pairs]
