"""Compositions on disk, in vLLM's engine within this process, and what transformers says of the same tokens."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from factories import Mix, perturb, tokens
from torch import Tensor
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.outputs import RequestOutput

import calm

GENERATED = 12
LENGTHS = (3, 17, 36, 45)  # with the generated tokens within the tiny models' context; two are longer than a block
BLOCK = 32  # of the cache: what is shared with an earlier request is found again in whole blocks
CHUNK = 24  # tokens of one step: the longer prompts are computed in several


@dataclass
class Expected:
    """What transformers makes of one prompt.

    Attributes:
        prompt: Token ids.
        generated: The greedy tokens.
        log_probs: Float32 `[prompt + generated - 1, vocabulary]`, each position's of the next token.
    """

    prompt: list[int]
    generated: list[int]
    log_probs: Tensor


def save(
    mix: Mix, folder: Path, dtype: torch.dtype = torch.float32, context: int | None = None
) -> calm.CalmForCausalLM:
    """A composition whose connections matter, and its bases, as folders; with rotary positions of any context."""
    anchor, augmenting = str(folder / "anchor"), {}
    for name, base in {"anchor": mix.anchor_model(), **mix.augmenting_models()}.items():
        if context is not None:
            base.config.max_position_embeddings = context
        base.save_pretrained(folder / name)
    for name in mix.augmenting_models():
        augmenting[name] = str(folder / name)
    pairs = mix.connections if isinstance(mix.connections, int) else dict(zip(augmenting, mix.connections, strict=True))
    model = calm.compose(
        anchor, augmenting, pairs, num_heads=mix.num_heads, attention=mix.attention, attend=mix.attend, dtype=dtype
    )
    perturb(model).save_pretrained(folder / "composed")
    return model


def eager(model: calm.CalmForCausalLM) -> calm.CalmForCausalLM:
    """Transformers' plain attention: its default leaves out the capping of scores that Gemma 2 has."""
    for base in (model.anchor, *model.augmenting.values()):
        base.set_attn_implementation("eager")
    return model


def log_probs_of(model: calm.CalmForCausalLM, ids: Sequence[int]) -> Tensor:
    """Float32 `[len(ids) - 1, vocabulary]`, in one pass without a cache."""
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0, :-1].float().log_softmax(-1)


def expect(model: calm.CalmForCausalLM, prompts: Sequence[Sequence[int]], generated: int = GENERATED) -> list[Expected]:
    """What transformers makes of these prompts."""
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        with torch.no_grad():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=generated, do_sample=False, eos_token_id=None
            )
        row = out[0].tolist()
        expected.append(Expected(list(prompt), row[len(prompt) :], log_probs_of(model, row)))
    return expected


def expect_each(
    model: calm.CalmForCausalLM,
    prompts: Sequence[Sequence[int]],
    augmenting: Sequence[list[str]],
    generated: int = GENERATED,
) -> list[Expected]:
    """What transformers makes of each prompt with these augmenting models on."""
    found = []
    for prompt, on in zip(prompts, augmenting, strict=True):
        with model.augmenting_disabled(*set(model.config.augmenting_configs) - set(on)):
            found += expect(model, [prompt], generated)
    return found


@contextmanager
def serving(folder: Path, **arguments: object) -> Iterator[LLM]:
    """An engine of the composition in a folder, float32 unless told otherwise, without a tokenizer."""
    defaults: dict[str, object] = {
        "dtype": "float32",
        "enforce_eager": True,
        "skip_tokenizer_init": True,
        "max_logprobs": -1,
        "max_num_seqs": 8,
        "max_num_batched_tokens": CHUNK,
        "block_size": BLOCK,
        "disable_log_stats": True,
    }
    llm = LLM(str(folder), **(defaults | arguments))
    try:
        yield llm
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def run(
    llm: LLM,
    prompts: Sequence[Sequence[int]],
    generated: int = GENERATED,
    whole: bool = True,
    augmenting: Sequence[object] | None = None,
) -> list[RequestOutput]:
    """Greedy generation with the log-probabilities of the whole vocabulary, the prompt's too if `whole`.

    vLLM does not look for a prompt's beginning in its cache where the prompt's log-probabilities are asked for.
    Each prompt has the augmenting models on that `augmenting` says, by default all.
    """
    sampling = [
        SamplingParams(
            temperature=0,
            max_tokens=generated,
            ignore_eos=True,
            logprobs=-1,
            prompt_logprobs=-1 if whole else None,
            detokenize=False,
            extra_args=None if augmenting is None else {"augmenting": augmenting[index]},
        )
        for index in range(len(prompts))
    ]
    return llm.generate([{"prompt_token_ids": list(prompt)} for prompt in prompts], sampling, use_tqdm=False)


def found_log_probs(output: RequestOutput) -> Tensor:
    """Float32 `[positions, vocabulary]`, of the prompt's positions but the first if they are there."""
    rows = [*(output.prompt_logprobs or [None])[1:], *output.outputs[0].logprobs]
    return torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows])


def worst(outputs: Sequence[RequestOutput], expected: Sequence[Expected]) -> float:
    """The largest difference of log-probabilities, where both have the same greedy tokens.

    Raises:
        AssertionError: If they have not.
    """
    differences = []
    for output, wanted in zip(outputs, expected, strict=True):
        assert list(output.outputs[0].token_ids) == wanted.generated
        found = found_log_probs(output)
        differences.append((found - wanted.log_probs[-len(found) :]).abs().max().item())
    return max(differences)


def prompts(lengths: Sequence[int] = LENGTHS) -> list[list[int]]:
    """Random prompts of mixed lengths."""
    return [tokens(1, length, seed=length)[0].tolist() for length in lengths]
