"""Answers that take turns are those that each model gives alone, and what is measured is calm.inspection's."""

from __future__ import annotations

import threading
from functools import cache

import pytest
import torch
from bases import byte_tokenizer
from factories import CONTEXT, Mix, assert_identical, assert_same, patched, word_tokenizer
from transformers import PreTrainedModel, set_seed

from calm.errors import CalmError
from calm.inspection import inspect_prompt
from calm.playground import answers
from calm.playground.answers import Answer, Company, Question, Sampling

TWO = Mix("llama", ("gpt2", "qwen2"))
PROMPT = "w5 w9 w33 w17 w5"
GREEDY = Sampling(8)
SAMPLED = Sampling(24, temperature=4.0, top_p=0.9, seed=3)


@cache
def company(mix: Mix = TWO) -> Company:
    set_seed(0)  # of the connections' weights
    return Company(mix.build(), mix.augmenting_models(), word_tokenizer())


def last(parts: Company, question: Question) -> list[Answer]:
    *_, final = parts.answers(question)
    return final


def alone(model: PreTrainedModel, sampling: Sampling) -> list[int]:
    inputs = word_tokenizer()(PROMPT, return_tensors="pt")
    set_seed(sampling.seed)
    output = model.generate(**inputs, **sampling.arguments(), max_new_tokens=sampling.max_new_tokens, pad_token_id=0)
    return output[0, inputs["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize(
    "mix",
    [TWO, TWO.with_(attend="prompt"), Mix("llama", ("mamba",)), Mix("mamba", ("llama",), num_heads=4)],
    ids=["two", "prompt", "recurrent-augmenting", "recurrent-anchor"],
)
def test_taking_turns_changes_no_answer(mix: Mix, sampling: Sampling):
    parts = company(mix)
    found = last(parts, Question(PROMPT, sampling))
    models = [*parts.augmenting.values(), parts.composed.anchor, parts.composed]
    assert [answer.token_ids for answer in found] == [alone(model, sampling) for model in models]
    assert [(answer.role, answer.name) for answer in found[:-2]] == [("augmenting", name) for name in parts.augmenting]
    assert [answer.role for answer in found[-2:]] == ["anchor", "composed"]
    # greedily, models that tie their embeddings repeat the last token; the random mamba does so when sampled, too
    if sampling == SAMPLED and mix.anchor != "mamba":
        assert found[-1].token_ids != found[-2].token_ids
    assert found[-1].text == word_tokenizer().decode(found[-1].token_ids, skip_special_tokens=True)


def test_no_defaults_of_a_model_come_in_between():
    """The likeliest token is the likeliest one, also where a model brings a penalty for repeating."""
    parts = Company(TWO.build(), TWO.augmenting_models(), word_tokenizer())
    free = [answer.token_ids for answer in last(parts, Question(PROMPT, GREEDY))]
    for model in (parts.composed, parts.composed.anchor, *parts.augmenting.values()):
        model.generation_config.repetition_penalty = 5.0
    assert [answer.token_ids for answer in last(parts, Question(PROMPT, GREEDY))] == free
    plain = parts.composed.anchor.generate(**word_tokenizer()(PROMPT, return_tensors="pt"), max_new_tokens=8)
    assert plain[0, -8:].tolist() not in free, "control: without the arguments it would have come in"


@pytest.mark.parametrize(
    "default", [{"min_p": 1.0}, {"top_h": 0.01}, {"epsilon_cutoff": 0.9}, {"typical_p": 0.01}], ids=str
)
def test_nor_do_those_of_sampling(default: dict[str, float]):
    parts = Company(TWO.build(), TWO.augmenting_models(), word_tokenizer())
    free = [answer.token_ids for answer in last(parts, Question(PROMPT, SAMPLED))]
    for model in (parts.composed, parts.composed.anchor, *parts.augmenting.values()):
        model.generation_config.update(**default)
    assert [answer.token_ids for answer in last(parts, Question(PROMPT, SAMPLED))] == free
    drawn = [
        parts.composed.anchor.generate(
            **word_tokenizer()(PROMPT, return_tensors="pt"), max_new_tokens=8, do_sample=True, top_k=0
        )[0, -8:].tolist()
        for _ in range(2)
    ]
    assert drawn[0] == drawn[1], "control: it leaves one token to be drawn"


def test_answers_that_share_random_numbers_are_others():
    """Control: without a random state of its own, an answer depends on who else is asked."""
    parts = company()
    with patched(torch.random, fork_rng=lambda devices: torch.enable_grad()), patched(torch, set_rng_state=id):
        shared = last(parts, Question(PROMPT, SAMPLED))
    assert shared[-1].token_ids != alone(parts.composed, SAMPLED)


def test_all_grow_together():
    parts = company()
    lengths = [[len(a.token_ids) for a in round_] for round_ in parts.answers(Question(PROMPT, Sampling(3)))]
    assert lengths == [[1] * 4, [2] * 4, [3] * 4]


def test_each_answer_says_why_it_ended():
    parts = Company(TWO.build(), TWO.augmenting_models(), word_tokenizer())
    free = last(parts, Question(PROMPT, GREEDY))
    parts.composed.generation_config.eos_token_id = [free[-1].token_ids[2]]
    found = last(parts, Question(PROMPT, GREEDY))
    first = free[-1].token_ids.index(free[-1].token_ids[2]) + 1
    assert found[-1].token_ids == free[-1].token_ids[:first] and found[-1].ended == "ended by itself"
    assert [a.token_ids for a in found[:-1]] == [a.token_ids for a in free[:-1]]
    assert {a.ended for a in found[:-1]} == {"stopped at the limit"}
    parts.composed.generation_config.eos_token_id = [free[-2].token_ids[2]]
    off = last(parts, Question(PROMPT, GREEDY, frozenset(parts.augmenting)))
    assert off[-1].token_ids == off[-2].token_ids == free[-2].token_ids, "it ends where the anchor does"
    long = " ".join(["w5"] * (CONTEXT - 2))
    assert [(len(a.token_ids), a.ended) for a in last(parts, Question(long, GREEDY))[:-1]] == [
        (3, "the context is full")
    ] * 3


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("mix", [TWO, Mix("mamba", ("llama",), num_heads=4)], ids=["two", "recurrent-anchor"])
def test_with_everything_off_the_composed_model_is_the_anchor(mix: Mix, sampling: Sampling):
    parts = company(mix)
    found = last(parts, Question(PROMPT, sampling, frozenset(parts.augmenting)))
    assert found[-1].token_ids == found[-2].token_ids == alone(parts.composed.anchor, sampling)


def test_one_of_two_is_switched_off():
    parts = company()
    found = last(parts, Question(PROMPT, GREEDY, frozenset({"m0"})))
    with parts.composed.augmenting_disabled("m0"):
        expected = alone(parts.composed, GREEDY)
    assert found[-1].token_ids == expected
    assert expected not in (found[-2].token_ids, alone(parts.composed, GREEDY))  # neither the anchor nor all of it


def test_two_visitors_with_other_switches_at_once():
    parts = company()
    questions = [Question(PROMPT, SAMPLED), Question(PROMPT, SAMPLED, frozenset(parts.augmenting))]
    found: dict[Question, list[list[Answer]]] = {question: [] for question in questions}

    def ask(question: Question) -> None:
        for _ in range(2):
            found[question].append(last(parts, question))

    threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    models = {questions[0]: parts.composed, questions[1]: parts.composed.anchor}
    for question, model in models.items():
        assert [answers[-1].token_ids for answers in found[question]] == [alone(model, SAMPLED)] * 2


def test_what_is_measured_is_what_inspect_measures():
    parts = company()
    question = Question(PROMPT, GREEDY)
    found = parts.inspect(question, last(parts, question)[-1])
    expected = inspect_prompt(parts.composed, parts.tokenizer, PROMPT, GREEDY.max_new_tokens)
    assert found.tokens == expected.tokens and found.produced == expected.produced
    for one, other in zip(found.connections, expected.connections, strict=True):
        assert one.pair == other.pair
        assert_identical(one.attention, other.attention)
        assert_identical(one.injection, other.injection)


def test_shares_are_those_of_generation():
    """Measured at once, they are what the connections added while the sampled tokens were written one by one."""
    parts = company()
    question = Question(PROMPT, SAMPLED)
    shares: list[float] = []
    hook = parts.composed.connections[0].register_forward_hook(
        lambda module, args, output: shares.append(float(output[0, -1].norm() / args[0][0, -1].norm()))
    )
    answer = last(parts, question)[-1]
    hook.remove()
    use = parts.inspect(question, answer).connections[0]
    measured = use.injection[len(PROMPT.split()) - 1 :]
    assert_same(measured, torch.tensor(shares), tolerance=1e-4)


def test_only_connections_that_are_on_are_measured():
    parts = company()
    question = Question(PROMPT, GREEDY, frozenset({"m0"}))
    found = parts.inspect(question, last(parts, question)[-1])
    assert {use.pair.augmenting for use in found.connections} == {"m1"}
    expected = [pair for pair in parts.composed.config.layer_pairs if pair.augmenting == "m1"]
    assert [use.pair for use in found.connections] == expected
    everything = Question(PROMPT, GREEDY, frozenset(parts.augmenting))
    with pytest.raises(CalmError, match="switched off"):
        parts.inspect(everything, last(parts, everything)[-1])


def test_a_chat_template_is_used_when_asked_for():
    tokenizer = byte_tokenizer(chat=True)
    parts = Company(company().composed, {}, tokenizer)
    plain, chat = (parts.encode(Question("hello", chat=chat))[0].tolist() for chat in (False, True))
    assert tokenizer.decode(plain) == "<bos>hello"
    assert tokenizer.decode(chat) == "<|user|>hello<eos><|assistant|>"


def test_part_of_a_character_is_not_shown_yet():
    parts = Company(company().composed, {}, byte_tokenizer())
    half, whole = "é".encode()[:1], "é"
    ids = parts.tokenizer(whole, add_special_tokens=False)["input_ids"]
    assert len(half) == 1 and len(ids) == 2
    assert answers.text_of(parts.tokenizer, ids[:1], ended=False) == ""
    assert answers.text_of(parts.tokenizer, ids[:1], ended=True) == "\ufffd"
    assert answers.text_of(parts.tokenizer, ids, ended=False) == whole


@pytest.mark.parametrize(
    ("question", "message"),
    [
        (Question(" \n"), "prompt is empty"),
        (Question("w5 " * (CONTEXT + 1)), rf"{CONTEXT + 1} tokens, and these models read {CONTEXT}"),
        (Question("w" * (answers.MAX_CHARACTERS + 1)), "100,001 characters"),
        (Question(PROMPT, off=frozenset({"m7"})), "m7"),
    ],
    ids=["empty", "long", "enormous", "unknown"],
)
def test_a_question_that_cannot_be_answered_says_why(question: Question, message: str):
    with pytest.raises(CalmError, match=message):
        next(company().answers(question))


@pytest.mark.parametrize(
    "values",
    [{"max_new_tokens": 0}, {"temperature": -1.0}, {"temperature": float("nan")}, {"top_p": 0.0}, {"seed": -1}],
)
def test_sampling_out_of_range_is_refused(values: dict):
    with pytest.raises(CalmError, match=next(iter(values))):
        Sampling(**values)
