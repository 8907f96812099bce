"""What a model writes and how likely it finds texts: greedy answers, and negative log-likelihoods."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from statistics import fmean
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
)

from calm.data import IGNORED, CompletionCollator, Row, load_examples
from calm.experiments.methods.examples import Example, TaskSet
from calm.experiments.methods.mixing import MixedLogits, mix
from calm.generation import StopOnWritten, without_defaults

Item = TypeVar("Item")

Logits = Callable[[dict[str, Tensor]], Tensor]
"""Next-token logits [batch, length, vocabulary] of a batch of `input_ids`, `attention_mask` and `labels`; some leave
out first positions that no labelled token follows."""


def logits_of(model: PreTrainedModel) -> Logits:
    """A model's logits; the labels tell a composition with `attend="prompt"` where its prompt ends."""

    def run(batch: dict[str, Tensor]) -> Tensor:
        return model(**{key: tensor.to(model.device) for key, tensor in batch.items()}, use_cache=False).logits

    return run


def logits_after_examples(model: PreTrainedModel) -> Logits:
    """As `logits_of`, of a plain model whose rows begin with the same examples, which it reads once for a batch."""

    def run(batch: dict[str, Tensor]) -> Tensor:
        first = int((batch["labels"] != IGNORED).any(0).int().argmax())
        same = (batch["input_ids"] == batch["input_ids"][:1]).all(0)[: max(0, first - 1)]
        shared = int(same.cumprod(0).sum())
        if not shared:
            return logits_of(model)(batch)
        input_ids, attention_mask = (batch[key].to(model.device) for key in ("input_ids", "attention_mask"))
        return model(
            input_ids=input_ids[:, shared:],
            attention_mask=attention_mask,
            past_key_values=_read_once(model, input_ids, shared),
        ).logits

    return run


def _read_once(model: PreTrainedModel, input_ids: Tensor, shared: int) -> DynamicCache:
    """A cache, for all rows [batch, length], of the first tokens that they share."""
    cache = DynamicCache(config=model.config)
    model(input_ids=input_ids[:1, :shared], past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(len(input_ids))
    return cache


def mixed(anchor: PreTrainedModel, augmenting: PreTrainedModel, weight: float) -> Logits:
    """Log-probabilities of two models, mixed as `mix` does.

    Args:
        anchor: `m_B`.
        augmenting: `m_A`, with the same vocabulary.
        weight: of `m_A`, from 0 to 1.
    """
    of_anchor, of_augmenting = logits_of(anchor), logits_of(augmenting)

    def run(batch: dict[str, Tensor]) -> Tensor:
        return mix(of_anchor(batch), of_augmenting(batch), weight)

    return run


@torch.no_grad()
def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSet,
    batch: int,
    *,
    few_shot: bool = False,
    mix: tuple[PreTrainedModel, float] | None = None,
) -> list[str]:
    """Greedy answers to a task set.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        task: what is asked.
        batch: prompts at a time.
        few_shot: put the task's examples before each prompt; a plain model reads them once for a batch.
        mix: `m_A` and its weight, for `mixed_logits`; `m_A` reads the prompts without the examples.

    Returns:
        The answers in the order of the examples, each up to the first stop string.
    """
    before = shown(task.few_shot) if few_shot else ""
    prompts = [before + example.prompt for example in task.examples]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    given = [""] * len(prompts)
    config = GenerationConfig(
        max_new_tokens=task.max_new_tokens,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    # Padding between the examples and the question would take room in a window.
    share = few_shot and not any(DynamicCache(config=model.config).is_sliding)
    for indices in _batches(order, batch):
        inputs, shared = _padded([prompts[index] for index in indices], tokenizer, model, share=share)
        begins, processors = inputs["input_ids"].shape[1], LogitsProcessorList()
        if mix:
            own, _ = _padded([task.examples[index].prompt for index in indices], tokenizer, model)
            augmenting, weight = mix
            processors.append(MixedLogits(augmenting, weight, own["input_ids"], own["attention_mask"], begins))
        with without_defaults(model):
            written = model.generate(
                **inputs,
                past_key_values=_read_once(model, inputs["input_ids"], shared) if shared else None,
                generation_config=config,
                logits_processor=processors,
                stopping_criteria=StoppingCriteriaList([StopOnWritten(tokenizer, task.stop, begins)]),
            )
        texts = tokenizer.batch_decode(written[:, begins:], skip_special_tokens=True)
        for index, text in zip(indices, texts, strict=True):
            given[index] = until(text, task.stop)
    return given


def worth(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[TaskSet],
    batch: int,
    *,
    few_shot: bool = False,
    mix: tuple[PreTrainedModel, float] | None = None,
) -> float:
    """What a model's answers are worth: the mean of the task sets' metrics, of which more has to be better.

    Args:
        model: the model.
        tokenizer: of the model.
        tasks: what is asked.
        batch: prompts at a time.
        few_shot: as for `answers`.
        mix: as for `answers`.
    """

    def value(task: TaskSet) -> float:
        given = answers(model, tokenizer, task, batch, few_shot=few_shot, mix=mix)
        return task.metric.value(task.metric.statistics(given, task.examples).sum(0), len(task.examples))

    return fmean(value(task) for task in tasks)


def shown(examples: Sequence[Example]) -> str:
    """Examples as they are put before a prompt."""
    return "".join(f"{example.prompt}{example.completion}\n\n" for example in examples)


def hinted(examples: Sequence[Example], answers: Sequence[str]) -> tuple[Example, ...]:
    """Examples with somebody's answers written before their prompts."""
    pairs = zip(examples, answers, strict=True)
    return tuple(example._replace(prompt=f"Hint: {answer.strip()}\n{example.prompt}") for example, answer in pairs)


def _padded(
    prompts: list[str], tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, *, share: bool = False
) -> tuple[dict[str, Tensor], int]:
    """`input_ids` and `attention_mask`, padded on the left of what differs, and how many first tokens do not."""
    rows, pad = tokenizer(prompts)["input_ids"], tokenizer.pad_token_id
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*rows, strict=False)))
    shared = min(same, min(map(len, rows)) - 1) if share else 0
    length = max(map(len, rows))
    pads = [length - len(row) for row in rows]
    inputs = {
        "input_ids": [row[:shared] + [pad] * count + row[shared:] for row, count in zip(rows, pads, strict=True)],
        "attention_mask": [[1] * shared + [0] * count + [1] * (length - shared - count) for count in pads],
    }
    return {key: torch.tensor(values, device=model.device) for key, values in inputs.items()}, shared


def until(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    return min((text.partition(string)[0] for string in stop), key=len, default=text)


def completion_rows(
    examples: Sequence[Example], tokenizer: PreTrainedTokenizerBase, max_length: int, *, append_eos: bool = True
) -> list[Row]:
    """Tokenized examples whose completions are labelled, as training has them; those that are longer are left out."""
    fields = [{"prompt": example.prompt, "completion": example.completion} for example in examples]
    return load_examples(fields, tokenizer, max_length=max_length, append_eos=append_eos)


def text_rows(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> list[Row]:
    """Tokenized plain texts, cut at `max_length`; all but the first token are labelled."""
    rows = []
    for text in texts:
        ids = np.asarray(tokenizer(text)["input_ids"][:max_length], dtype=np.int32)
        labels = ids.copy()
        labels[0] = IGNORED
        rows.append({"input_ids": ids, "labels": labels})
    return rows


@torch.no_grad()
def negative_log_likelihoods(
    logits: Logits, rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, batch: int
) -> list[tuple[float, int]]:
    """How unlikely the labelled tokens of each row are.

    Args:
        logits: of the model, from `logits_of` or `mixed`.
        rows: `input_ids` and `labels`.
        tokenizer: for padding.
        batch: rows at a time.

    Returns:
        Nats and labelled tokens of each row.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]["input_ids"]))
    found = [(0.0, 0)] * len(rows)
    for indices in _batches(order, batch):
        inputs = _padded_right([rows[index] for index in indices], tokenizer)
        predicted = logits(inputs)[:, :-1]
        labels = inputs["labels"][:, -predicted.shape[1] :]
        labelled = labels != IGNORED
        likelihoods = predicted[labelled.to(predicted.device)].float().log_softmax(-1).cpu()
        nats = torch.zeros(labels.shape)
        nats[labelled] = -likelihoods.gather(-1, labels[labelled][:, None])[:, 0]
        for place, index in enumerate(indices):
            found[index] = (float(nats[place].sum()), int(labelled[place].sum()))
    return found


def reference_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: TaskSet,
    batch: int,
    *,
    few_shot: bool = False,
    mix: tuple[PreTrainedModel, float] | None = None,
) -> list[tuple[float, int]]:
    """How unlikely a model finds the references of a task set, each token after the right ones before it.

    The end token does not count: what ends an answer is a stop string, which the examples before a prompt end with.

    Args:
        model: any causal language model.
        tokenizer: its tokenizer.
        task: what is asked, with the references.
        batch: sequences at a time.
        few_shot: put the task's examples before each prompt; a plain model reads them once for a batch.
        mix: `m_A` and its weight, for `mixed_logits`; `m_A` reads the prompts without the examples.

    Returns:
        Nats and tokens of each reference, in the order of the examples.
    """
    before = task.few_shot if few_shot else ()
    if mix is not None:
        return _mixture_likelihoods(model, *mix, task.examples, shown(before), tokenizer, batch)
    examples = [example._replace(prompt=shown(before) + example.prompt) for example in task.examples]
    rows = completion_rows(examples, tokenizer, sys.maxsize, append_eos=False)
    logits = logits_after_examples(model) if before else logits_of(model)
    return negative_log_likelihoods(logits, rows, tokenizer, batch)


@torch.no_grad()
def _mixture_likelihoods(
    anchor: PreTrainedModel,
    augmenting: PreTrainedModel,
    weight: float,
    examples: Sequence[Example],
    before: str,
    tokenizer: PreTrainedTokenizerBase,
    batch: int,
) -> list[tuple[float, int]]:
    """Each completion's nats and tokens by the mixture; what is `before` every prompt only `m_B` reads."""
    longer = [example._replace(prompt=before + example.prompt) for example in examples]
    whole = sys.maxsize  # dropping an example on one side only would pair the others wrongly
    rows = [completion_rows(read, tokenizer, whole, append_eos=False) for read in (longer, examples)]
    found = []
    for indices in _batches(range(len(examples)), batch):
        predicted = []
        for logits, read in zip((logits_after_examples(anchor), logits_of(augmenting)), rows, strict=True):
            inputs = _padded_right([read[index] for index in indices], tokenizer)
            of_positions = logits(inputs)[:, :-1]
            targets = inputs["labels"][:, -of_positions.shape[1] :]
            labelled = targets != IGNORED
            predicted.append(of_positions[labelled])
            labels = targets[labelled].to(of_positions.device)
        counts = labelled.sum(1).tolist()
        nats = cross_entropy(mix(predicted[0], predicted[1], weight), labels, reduction="none").split(counts)
        found += [(float(of_example.sum()), count) for of_example, count in zip(nats, counts, strict=True)]
    return found


def mean_nll(found: Sequence[tuple[float, int]]) -> float:
    """Nats a token."""
    return sum(nats for nats, _ in found) / sum(tokens for _, tokens in found)


def _padded_right(rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> dict[str, Tensor]:
    inputs = CompletionCollator.for_tokenizer(tokenizer)(list(rows))
    lengths = torch.tensor([len(row["input_ids"]) for row in rows])
    inputs["attention_mask"] = (torch.arange(inputs["input_ids"].shape[1]) < lengths[:, None]).long()
    return inputs


def _batches(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
