"""The adapter gives the model's own numbers: log-likelihoods from its logits, and what its generate generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from bases import byte_tokenizer
from factories import open_gates
from lm_eval.api.instance import Instance
from torch import Tensor
from transformers import PreTrainedModel, set_seed

import calm
from calm.evaluation.adapter import CalmLM

TOKENIZER = byte_tokenizer()
PAIRS = [
    ("1+2=", "3"),
    ("a longer context,", " and its continuation"),
    ("x", "yz"),
    ("", "from nothing"),
    ("1+2=", "4"),
]


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def by_hand(model: PreTrainedModel, context: str, continuation: str, **arguments: Any) -> tuple[float, bool]:
    """Sum of log-probabilities of the continuation, of one row without padding, and whether it is the greedy one."""
    prompt = TOKENIZER(context)["input_ids"]  # BOS, and the context
    answer = TOKENIZER(continuation, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([prompt + answer]), **arguments).logits[0].double()
    scores = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    chosen = torch.tensor(answer)
    return float(scores.gather(1, chosen[:, None]).sum()), bool((scores.argmax(-1) == chosen).all())


@pytest.fixture(scope="module")
def model(composed_folder: Path) -> calm.CalmForCausalLM:
    return calm.CalmForCausalLM.from_pretrained(composed_folder)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_loglikelihoods_are_those_of_the_logits(model: calm.CalmForCausalLM, batch_size: int):
    expected = [by_hand(model, *pair) for pair in PAIRS]
    scores = CalmLM(model, TOKENIZER, batch_size).loglikelihood(instances("loglikelihood", PAIRS))
    for (score, greedy), (by_hand_score, by_hand_greedy) in zip(scores, expected, strict=True):
        assert score == pytest.approx(by_hand_score, abs=2e-4)
        assert greedy == by_hand_greedy
    with model.composition_disabled():
        alone = [by_hand(model, *pair)[0] for pair in PAIRS]
    assert all(abs(score - other) > 0.1 for (score, _), other in zip(scores, alone, strict=True)), "not the anchor's"


def test_loglikelihoods_sum_in_float32_whatever_the_model_computes_in(model: calm.CalmForCausalLM):
    anchor = calm.CalmForCausalLM.from_pretrained(model.name_or_path, dtype=torch.bfloat16).anchor
    scores = CalmLM(anchor, TOKENIZER).loglikelihood(instances("loglikelihood", PAIRS[:1]))
    assert scores[0][0] == pytest.approx(by_hand(anchor, *PAIRS[0])[0], abs=1e-4), "bfloat16 would be off by 1e-2"


def test_the_greedy_continuation_is_known_as_such(model: calm.CalmForCausalLM):
    inputs = TOKENIZER("1+2=", return_tensors="pt")["input_ids"]
    token = model(inputs).logits[0, -1].argmax()
    answer = TOKENIZER.decode(token)
    [(_, greedy), (_, other)] = CalmLM(model, TOKENIZER).loglikelihood(
        instances("loglikelihood", [("1+2=", answer), ("1+2=", "#" if answer != "#" else "!")])
    )
    assert greedy
    assert not other


def test_prompt_only_attention_sees_the_context_and_not_the_continuation(tiny_bases: dict[str, str]):
    """Also where contexts of several lengths share a batch, one token is scored, or the left end is cut off."""
    set_seed(0)
    model = calm.compose(tiny_bases["anchor"], tiny_bases["augmenting"], connections=[(0, 0), (1, 1)], attend="prompt")
    for connection in model.connections:
        torch.nn.init.normal_(connection.w_o.weight)
    open_gates(model)
    pairs = [*PAIRS[:3], PAIRS[4], ("1+2", "=3")]
    lm = CalmLM(model, TOKENIZER, 4)
    scores = lm.loglikelihood(instances("loglikelihood", pairs))
    lengths = [len(TOKENIZER(context)["input_ids"]) for context, _ in pairs]
    expected = [by_hand(model, *p, prompt_length=length)[0] for p, length in zip(pairs, lengths, strict=True)]
    assert [score for score, _ in scores] == pytest.approx(expected, abs=2e-4)
    leaking = [by_hand(model, *pair)[0] for pair in pairs]
    assert abs(leaking[1] - expected[1]) > 0.1, "seeing the whole row gives other numbers"

    context, continuation = list(range(40, 110)), list(range(20, 30))  # 80 tokens for a context of 64
    [(cut, _)] = lm._loglikelihood_tokens([(("a", "b"), context, continuation)])
    row = torch.tensor([(context + continuation)[-65:]])
    with torch.no_grad():
        logits = model(row[:, :-1], prompt_length=55).logits[0, -10:].log_softmax(-1)
    assert cut == pytest.approx(float(logits.gather(1, row[0, -10:, None]).sum()), abs=2e-4)


def test_rolling_loglikelihoods_are_those_of_the_logits(model: calm.CalmForCausalLM):
    lm = CalmLM(model, TOKENIZER, 2)
    texts = ["a text", "and another, longer one"]
    scores = lm.loglikelihood_rolling(instances("loglikelihood_rolling", [(text,) for text in texts]))
    for score, text in zip(scores, texts, strict=True):
        # lm-eval scores the text's own tokens, of which the tokenizer's BOS is the first, after one more BOS
        tokens = torch.tensor([[TOKENIZER.bos_token_id, *TOKENIZER(text)["input_ids"]]])
        with torch.no_grad():
            logits = model(tokens).logits[0, :-1].log_softmax(-1)
        assert score == pytest.approx(float(logits.gather(1, tokens[0, 1:, None]).sum()), abs=2e-4)


def test_generation_is_that_of_generate(model: calm.CalmForCausalLM):
    """Prompts of several lengths in one batch, padded on the left, as each on its own."""
    prompts = ["1+2=", "a much longer prompt: ", "x"]
    options = {"until": ["\n"], "max_gen_toks": 8, "do_sample": False}
    answers = CalmLM(model, TOKENIZER, 3).generate_until(instances("generate_until", [(p, options) for p in prompts]))
    for prompt, answer in zip(prompts, answers, strict=True):
        inputs = TOKENIZER(prompt, return_tensors="pt")
        length = inputs["input_ids"].shape[1]
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, length:]
        assert answer == TOKENIZER.decode(tokens, skip_special_tokens=True).split("\n")[0]
    assert len(set(answers)) > 1


@pytest.mark.parametrize("beams", [1, 4])
def test_answers_do_not_depend_on_what_else_is_in_their_batch(model: calm.CalmForCausalLM, beams: int):
    """Nor with beams, which lm-eval's own stop criterion ends for the whole batch."""
    prompts = ["1+2=", "a much longer prompt: ", "x", "3+4=", "5", "ab"]
    inputs = TOKENIZER(prompts[0], return_tensors="pt")
    written = TOKENIZER.decode(model.generate(**inputs, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :])
    stop = [char for char in written if char.isalnum()][-1]
    options = {"until": [stop], "max_gen_toks": 12, "num_beams": beams, "do_sample": False}
    asked = [(prompt, options) for prompt in prompts]
    one, all_of_them = (
        CalmLM(model, TOKENIZER, size).generate_until(instances("generate_until", asked)) for size in (1, len(prompts))
    )
    assert one == all_of_them
    for prompt, answer in zip(prompts, one, strict=True):
        inputs = TOKENIZER(prompt, return_tensors="pt")
        stopped = model.generate(**inputs, max_new_tokens=12, num_beams=beams, stop_strings=[stop], tokenizer=TOKENIZER)
        text = TOKENIZER.decode(stopped[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        assert answer == text.split(stop)[0]


def test_a_continuation_longer_than_the_context_is_refused(model: calm.CalmForCausalLM):
    with pytest.raises(calm.CalmError, match="has 70 tokens, and the model's context is 64"):
        CalmLM(model, TOKENIZER).loglikelihood(instances("loglikelihood", [("x", "y" * 70)]))


def test_the_context_is_the_smallest_of_the_models(model: calm.CalmForCausalLM):
    assert CalmLM(model, TOKENIZER).max_length == model.context_length == 64
    assert CalmLM(model.anchor, TOKENIZER).max_length == 64


def test_the_model_is_left_as_it_was(model: calm.CalmForCausalLM):
    """lm-eval ties weights and may set a padding token; neither may change a frozen base."""
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    CalmLM(model, TOKENIZER)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_tokenizer_without_end_is_refused(model: calm.CalmForCausalLM):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(calm.CalmError, match="no EOS token"):
        CalmLM(model, tokenizer)
