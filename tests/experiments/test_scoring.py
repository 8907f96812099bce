"""Examples before a question are read once for a batch, and nothing that is measured is another for it."""

from __future__ import annotations

import dataclasses

import factories
import numpy as np
import pytest
import torch

from calm.experiments.methods import scoring
from calm.experiments.methods.examples import Example, TaskSet
from calm.experiments.methods.metrics import Chrf

QUESTIONS = ("w9", "w5 w9 w6 w7", "w5 w9", "w9 w8 w7 w6 w5", "w9 w9")
TASK = TaskSet(
    "Words",
    tuple(Example(question, f" w{3 + number} w4") for number, question in enumerate(QUESTIONS)),
    Chrf(),
    4,
    few_shot=(Example("w10 w11 w12", " w13"), Example("w14 w15", " w16 w17")),
    stop=(),
)


@pytest.fixture(scope="module")
def tokenizer():
    return factories.word_tokenizer()


@pytest.fixture(params=("llama", "gpt2"))
def model(request):
    return factories.base(request.param).eval()


@pytest.fixture
def windowed():
    return factories.base("gemma2").eval()  # with a window shorter than the examples


def unshared(task: TaskSet) -> TaskSet:
    """The same prompts, whose examples nothing knows of."""
    shown = scoring.shown(task.few_shot)
    asked = tuple(example._replace(prompt=shown + example.prompt) for example in task.examples)
    return dataclasses.replace(task, examples=asked, few_shot=())


def test_answers_are_those_to_the_whole_prompts(model, tokenizer):
    expected = [scoring.answers(model, tokenizer, unshared(TASK), batch) for batch in (1, 3)]
    assert expected[0] == expected[1] != scoring.answers(model, tokenizer, TASK, 3)
    assert scoring.answers(model, tokenizer, TASK, 3, few_shot=True) == expected[0]


def test_a_stop_string_that_begins_in_the_question_ends_no_answer(model, tokenizer):
    """As a "#" that begins a line, after a question that ends with a line's end, would with transformers' own."""
    expected = scoring.answers(model, tokenizer, TASK, 3)
    first, second = expected[0].split()[:2]
    begun = dataclasses.replace(TASK, stop=(f"{QUESTIONS[0]} {first}",))
    assert begun.stop[0] not in expected[0]
    assert scoring.answers(model, tokenizer, begun, 3)[0] == expected[0]
    written = dataclasses.replace(TASK, stop=(f" {second}",))
    assert scoring.answers(model, tokenizer, written, 3)[0] == expected[0].split(f" {second}")[0]


def test_likelihoods_are_those_after_the_whole_prompts(model, tokenizer):
    expected = np.array(scoring.reference_likelihoods(model, tokenizer, unshared(TASK), 1))
    found = np.array(scoring.reference_likelihoods(model, tokenizer, TASK, 3, few_shot=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    without = np.array(scoring.reference_likelihoods(model, tokenizer, TASK, 3))
    assert not np.allclose(found, without, rtol=1e-2), "the examples make a difference"


def test_in_a_window_no_padding_lies_between_examples_and_question(windowed, tokenizer):
    read = []
    windowed.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(args[0]))
    scoring.answers(windowed, tokenizer, TASK, 5, few_shot=True)
    pads = read[0] == factories.PAD
    assert len(pads) == 5 and pads.any()
    assert not (pads[:, 1:] & ~pads[:, :-1]).any(), "all padding is before the examples"
    expected = np.array(scoring.reference_likelihoods(windowed, tokenizer, unshared(TASK), 1))
    found = np.array(scoring.reference_likelihoods(windowed, tokenizer, TASK, 3, few_shot=True))
    np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_mixture_in_batches_keeps_the_order_of_its_questions(tokenizer):
    first, second = factories.base("llama"), factories.base("llama", seed=1)

    def likelihoods(task: TaskSet, weight: float, batch: int) -> list[tuple[float, int]]:
        return scoring.reference_likelihoods(first, tokenizer, task, batch, few_shot=True, mix=(second, weight))

    alone = [dataclasses.replace(TASK, examples=(example,)) for example in TASK.examples]
    for weight in (0.0, 0.3):
        expected = [likelihoods(task, weight, 1)[0] for task in alone]
        assert len(set(expected)) == len(expected)
        np.testing.assert_allclose(likelihoods(TASK, weight, 2), expected, rtol=1e-4)


def test_a_batch_reads_the_examples_once(tokenizer):
    model, read = factories.base("llama").eval(), []
    model.get_input_embeddings().register_forward_pre_hook(lambda module, args: read.append(tuple(args[0].shape)))
    length = len(tokenizer(scoring.shown(TASK.few_shot))["input_ids"])
    scoring.reference_likelihoods(model, tokenizer, TASK, 5, few_shot=True)
    assert read == [(1, length), (5, 5 + 2)]
    read.clear()
    scoring.answers(model, tokenizer, TASK, 5, few_shot=True)
    assert read == [(1, length), (5, 5)] + 3 * [(5, 1)]


def test_prompts_that_are_all_alike_keep_a_token_to_answer_after(tokenizer):
    model = factories.base("llama").eval()
    same = dataclasses.replace(TASK, examples=TASK.examples[:1] * 2)
    assert scoring.answers(model, tokenizer, same, 2, few_shot=True) == 2 * scoring.answers(
        model, tokenizer, unshared(dataclasses.replace(TASK, examples=TASK.examples[:1])), 1
    )
    found = scoring.reference_likelihoods(model, tokenizer, same, 2, few_shot=True)
    assert found[0] == found[1]


def test_what_examples_share_with_a_question_by_chance_is_no_more_than_what_comes_before_its_answer(tokenizer):
    model = factories.base("llama").eval()
    rows = scoring.completion_rows([Example("w3 w4", " w5"), Example("w3 w4", " w5 w6")], tokenizer, 64)
    plain, sharing = (
        scoring.negative_log_likelihoods(logits(model), rows, tokenizer, 2)
        for logits in (scoring.logits_of, scoring.logits_after_examples)
    )
    torch.testing.assert_close(torch.tensor(sharing), torch.tensor(plain))
