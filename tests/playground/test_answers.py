"""Answers that take turns are those that each model gives alone, and what is measured is calm.inspection's."""

from __future__ import annotations

import pytest
import torch
from factories import Mix, word_tokenizer
from transformers import set_seed

from calm.playground.answers import Answer, Company, Question, Sampling

TWO = Mix("llama", ("gpt2", "mamba"))
PROMPT = "w5 w9 w33 w17 w5"
SAMPLED = Sampling(max_new_tokens=12, temperature=1.0, top_p=0.9, seed=3)


def company(mix: Mix = TWO) -> Company:
    return Company(mix.build(), mix.augmenting_models(), word_tokenizer())


def last(answers: Company, question: Question) -> list[Answer]:
    *_, final = answers.answers(question)
    return final


def alone(model: torch.nn.Module, sampling: Sampling, prompt: str = PROMPT) -> list[int]:
    inputs = word_tokenizer()(prompt, return_tensors="pt")
    set_seed(sampling.seed)
    produced = model.generate(**inputs, **sampling.arguments(), max_new_tokens=sampling.max_new_tokens, pad_token_id=0)
    return produced[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("sampling", [Sampling(12), SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "mix", [TWO, TWO.with_(attend="prompt"), Mix("gemma2", ("gpt2",)), Mix("mamba", ("llama",), num_heads=4)], ids=str
)
def test_taking_turns_changes_no_answer(mix: Mix, sampling: Sampling):
    parts = company(mix)
    found = last(parts, Question(PROMPT, sampling))
    models = [*parts.augmenting.values(), parts.composed.anchor, parts.composed]
    assert [answer.token_ids for answer in found] == [alone(model, sampling) for model in models]
    assert [(a.role, a.name) for a in found[:-2]] == [("augmenting", name) for name in parts.augmenting]
    assert [a.name for a in found[-2:]] == ["anchor", "composed"]
    assert len({tuple(answer.token_ids) for answer in found}) > 2  # or the comparison would show nothing
    assert found[-1].text == word_tokenizer().decode(found[-1].token_ids)
