"""What is asked of models, mixtures and pipelines, and how it becomes a table."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import sacrebleu
import torch

import calm
from calm.data import load_tokenizer
from calm.experiments.methods import bases, mixing, scoring, table
from calm.experiments.methods.examples import Example
from calm.experiments.methods.metrics import Bleu, Perplexity
from calm.experiments.results import METHODS, Results, made_here


def test_results_hold_the_table_with_intervals_and_paired_differences(finished, data, tmp_path):
    _, outcomes, _ = finished
    fields = table.fields(data, {0: outcomes, 1: outcomes})
    results = Results(
        domain="test", preset="tiny", command="", settings={}, seeds=(0, 1), seconds=0.0, **made_here(), **fields
    )
    assert Results.load(results.save(tmp_path)) == results
    references = [[example.completion.strip() for example in data.tests["syllables"].examples]]
    for method, outcome in outcomes.items():
        answers = outcome["answers"]["syllables"]
        assert results.table["syllables"][method].mean == pytest.approx(
            sacrebleu.corpus_chrf(answers, references).score
        )
        assert results.other["syllables BLEU"][method].mean == pytest.approx(
            sacrebleu.corpus_bleu(answers, references).score
        )
        nats, tokens = np.sum(outcome["references"]["syllables"], axis=0)
        perplexity = results.other["syllables perplexity of the reference"][method]
        assert perplexity.mean == pytest.approx(np.exp(nats / tokens))
        low, high = perplexity.interval
        assert 0 < low < perplexity.mean < high
        low, high = results.table["syllables"][method].interval
        assert low <= results.table["syllables"][method].mean <= high
    kept, changes = results.preservation["Sums"], results.preservation_changes["Sums"]
    assert set(kept) == set(METHODS) and set(changes) == set(METHODS) - {"m_B"}
    assert all(changes[method].mean == pytest.approx(kept[method].mean - kept["m_B"].mean) for method in changes)
    perplexities = results.preservation_changes["Arithmetic perplexity"]
    assert "pipeline" not in results.preservation["Arithmetic perplexity"]  # it would be m_B's own
    assert perplexities["m_B_zero_shot"].interval == (0, 0)  # paired: on the same texts the same model
    low, high = results.preservation["Arithmetic perplexity"]["m_B"].interval
    assert low < high  # unpaired it would not be told from another
    assert perplexities["m_A"].interval != (0, 0)
    composed, alone = (results.table["syllables"][method].mean for method in ("composed", "m_A"))
    assert results.differences["syllables"]["m_A"].mean == pytest.approx(composed - alone)
    for row in ("syllables BLEU", "syllables perplexity of the reference"):  # no metric is without a verdict
        ours, theirs = (results.other[row][method].mean for method in ("composed", "m_A"))
        found = results.differences[row]["m_A"]
        assert found.mean == pytest.approx(ours - theirs)
        assert found.interval[0] <= found.mean <= found.interval[1]
    assert (
        results.preservation["Arithmetic perplexity"]["m_B"]
        == results.preservation["Arithmetic perplexity"]["m_B_zero_shot"]
    )


def test_a_perplexity_is_that_of_the_models_own_loss(anchor):
    model, tokenizer = bases.load(anchor), load_tokenizer(anchor)
    rows = scoring.text_rows(["1 + 2 = 3", "4 - 1 - 1 = 2 x 1"], tokenizer, 64)
    found = scoring.negative_log_likelihoods(scoring.logits_of(model), rows, tokenizer, batch=2)
    for row, (nats, tokens) in zip(rows, found, strict=True):
        ids = torch.from_numpy(row["input_ids"]).long()[None]
        assert nats / tokens == pytest.approx(model(ids, labels=ids).loss.item(), rel=1e-5)
    expected = np.exp(sum(nats for nats, _ in found) / sum(tokens for _, tokens in found))
    assert Perplexity().value(np.asarray(found).sum(axis=0), 2) == pytest.approx(expected)


def test_mixed_logits_are_one_model_at_each_end_and_cached_as_uncached_between(anchor, settings, tmp_path):
    bases.save_random(anchor, tmp_path / "random", 1)
    first, second, tokenizer = bases.load(anchor), bases.load(tmp_path / "random"), load_tokenizer(anchor)
    prompts = tokenizer(["1 + 2 =", "3 - 1 + 2 ="], return_tensors="pt", padding=True, padding_side="left")
    own = tokenizer(["2 =", "4 - 4 + 4 ="], return_tensors="pt", padding=True, padding_side="left")

    def last(model, inputs: dict[str, torch.Tensor], written: torch.Tensor) -> torch.Tensor:
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(written)], 1)
        tokens, positions = torch.cat([inputs["input_ids"], written], 1), (mask.cumsum(-1) - 1).clamp(0)
        return model(tokens, attention_mask=mask, position_ids=positions).logits[:, -1]

    def decode(weight: float) -> list[torch.Tensor]:
        begins = prompts["input_ids"].shape[1]
        processor = mixing.MixedLogits(second, weight, own["input_ids"], own["attention_mask"], begins=begins)
        written, steps = prompts["input_ids"][:, :0], []
        for _ in range(3):
            scores, other = last(first, prompts, written), last(second, own, written)
            mixed = processor(torch.cat([prompts["input_ids"], written], 1), scores)
            expected = (1 - weight) * scores.log_softmax(-1) + weight * other.log_softmax(-1)
            steps.append((mixed, expected, scores.log_softmax(-1), other.log_softmax(-1)))
            written = torch.cat([written, mixed.argmax(-1, keepdim=True)], 1)
        return steps

    with torch.no_grad():
        for mixed, expected, _, _ in decode(0.4):
            torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)
        for mixed, _, alone, other in decode(0.0):
            torch.testing.assert_close(mixed, alone)
            assert not torch.allclose(mixed, other, atol=1e-2)  # the two are not the same model
        for mixed, _, _, other in decode(1.0):
            torch.testing.assert_close(mixed, other, atol=1e-5, rtol=1e-5)


def test_the_mixture_of_a_run_is_of_its_models_and_its_anchor_has_the_examples(finished, anchor, data):
    folder, outcomes, _ = finished
    first, second = bases.load(anchor), bases.load(folder / "seed-0/cell/m_A")
    tokenizer, training = load_tokenizer(anchor), outcomes["mixed_logits"]["training"]
    developed, searched = data.development["syllables"], {}
    for weight in mixing.WEIGHTS:
        given = scoring.answers(first, tokenizer, developed, 4, few_shot=True, mix=(second, weight))
        references = [[example.completion.strip() for example in developed.examples]]
        searched[weight] = sacrebleu.corpus_chrf(given, references).score
    assert len(set(searched.values())) > 1
    assert {float(weight): chrf for weight, chrf in training["searched"].items()} == pytest.approx(searched)
    weight = training["learning_rate"]
    assert searched[weight] == max(searched.values())
    task = data.tests["syllables"]
    given = scoring.answers(first, tokenizer, task, 4, few_shot=True, mix=(second, weight))
    assert outcomes["mixed_logits"]["answers"]["syllables"] == given
    assert given != scoring.answers(first, tokenizer, task, 4, mix=(second, weight))
    references = scoring.reference_likelihoods(first, tokenizer, task, 4, few_shot=True, mix=(second, weight))
    np.testing.assert_allclose(outcomes["mixed_logits"]["references"]["syllables"], references, rtol=1e-5)


def test_references_are_scored_after_the_prompts_that_are_answered(finished, anchor, data):
    folder, outcomes, _ = finished
    first, second = bases.load(anchor), bases.load(folder / "seed-0/cell/m_A")
    tokenizer, task = load_tokenizer(anchor), data.tests["syllables"]

    def nats_after(model, before: str) -> list[float]:
        found = []
        for example in task.examples:
            prompt = tokenizer(before + example.prompt)["input_ids"]
            ids = torch.tensor([prompt + tokenizer(example.completion)["input_ids"]])
            predicted = model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            found.append(float(-predicted.gather(-1, ids[0, len(prompt) :, None]).sum()))
        return found

    def nats(found) -> list[float]:
        assert [tokens for _, tokens in found] == [len(tokenizer(e.completion)["input_ids"]) for e in task.examples]
        return [nats for nats, _ in found]

    shown = scoring.shown(task.few_shot)
    with torch.no_grad():
        alone = {"m_A": nats_after(second, ""), "m_B": nats_after(first, shown)}
        assert nats_after(first, "") != pytest.approx(alone["m_B"], rel=1e-2), "the examples make a difference"
    for method, expected in alone.items():
        assert nats(outcomes[method]["references"]["syllables"]) == pytest.approx(expected, rel=1e-4)
    for weight, method in ((0.0, "m_B"), (1.0, "m_A")):
        mixed = scoring.reference_likelihoods(first, tokenizer, task, 4, few_shot=True, mix=(second, weight))
        assert nats(mixed) == pytest.approx(alone[method], rel=1e-4)


def test_in_a_mixture_the_anchor_reads_examples_and_m_a_does_not(anchor, data, tmp_path):
    bases.save_random(anchor, tmp_path / "random", 1)
    first, second, tokenizer = bases.load(anchor), bases.load(tmp_path / "random"), load_tokenizer(anchor)
    task = data.tests["syllables"]

    def answers(model, **options) -> list[str]:
        return scoring.answers(model, tokenizer, task, 4, **options)

    alone = answers(first), answers(first, few_shot=True), answers(second)
    assert alone[0] != alone[1] != alone[2]
    assert answers(first, few_shot=True, mix=(second, 0.0)) == alone[1]
    assert answers(first, few_shot=True, mix=(second, 1.0)) == alone[2]

    asked = [e._replace(prompt=scoring.shown(task.few_shot) + e.prompt) for e in task.examples]
    rows = [scoring.completion_rows(read, tokenizer, 256, append_eos=False) for read in (asked, task.examples)]

    def likelihoods(weight: float) -> list[tuple[float, int]]:
        return scoring.reference_likelihoods(first, tokenizer, task, 4, few_shot=True, mix=(second, weight))

    for weight, model, read in ((0.0, first, rows[0]), (1.0, second, rows[1])):
        expected = scoring.negative_log_likelihoods(scoring.logits_of(model), read, tokenizer, 4)
        np.testing.assert_allclose(likelihoods(weight), expected, rtol=1e-5)
    nats = []
    for own, plain in zip(*rows, strict=True):
        predicted = []
        for model, row in ((first, own), (second, plain)):
            ids, labelled = torch.from_numpy(row["input_ids"]).long()[None], row["labels"][1:] != -100
            predicted.append(model(ids).logits[0, :-1][labelled].log_softmax(-1))
        mixed = (0.6 * predicted[0] + 0.4 * predicted[1]).log_softmax(-1)
        targets = torch.from_numpy(plain["labels"][1:][plain["labels"][1:] != -100]).long()
        nats.append((-mixed[range(len(targets)), targets]).sum().item())
    assert [of_example for of_example, _ in likelihoods(0.4)] == pytest.approx(nats, rel=1e-5)


def test_answers_are_worth_the_mean_of_their_tasks_metrics(anchor, data, tmp_path):
    bases.save_random(anchor, tmp_path / "random", 1)
    first, second, tokenizer = bases.load(anchor), bases.load(tmp_path / "random"), load_tokenizer(anchor)
    by_chrf = data.development["syllables"]
    by_bleu = dataclasses.replace(by_chrf, metric=Bleu(), examples=by_chrf.examples[:3])

    one, other, both = (
        scoring.worth(first, tokenizer, tasks, 4, few_shot=True, mix=(second, 0.9))
        for tasks in ([by_chrf], [by_bleu], [by_chrf, by_bleu])
    )
    assert one != other
    assert both == pytest.approx((one + other) / 2)


def test_what_a_rate_is_worth_is_what_its_model_answers(finished, data, anchor):
    folder, outcomes, _ = finished
    found, developed = outcomes["composed"]["training"], data.development["syllables"]
    rate = f"{found['learning_rate']:g}"
    model = calm.CalmForCausalLM.from_pretrained(folder / "seed-0/cell/composed" / rate).eval()
    given = scoring.answers(model, load_tokenizer(str(anchor)), developed, 4)
    references = [[example.completion.strip() for example in developed.examples]]
    assert found["searched"][rate] == pytest.approx(sacrebleu.corpus_chrf(given, references).score)


def test_in_a_pipeline_the_anchor_reads_what_m_a_answered_to_the_question_and_to_the_examples(finished, anchor, data):
    folder, outcomes, _ = finished
    first, second = bases.load(anchor), bases.load(folder / "seed-0/cell/m_A")
    tokenizer, task = load_tokenizer(anchor), data.tests["syllables"]
    answered = outcomes["m_A"]["answers"]["syllables"]
    shown = dataclasses.replace(task, examples=task.few_shot)
    before = "".join(
        f"Hint: {answer.strip()}\n{example.prompt}{example.completion}\n\n"
        for example, answer in zip(task.few_shot, scoring.answers(second, tokenizer, shown, 4), strict=True)
    )
    prompts = [
        f"{before}Hint: {answer.strip()}\n{example.prompt}"
        for example, answer in zip(task.examples, answered, strict=True)
    ]
    pairs = zip(prompts, task.examples, strict=True)
    asked = dataclasses.replace(task, examples=tuple(Example(prompt, e.completion) for prompt, e in pairs))
    assert outcomes["pipeline"]["answers"]["syllables"] == scoring.answers(first, tokenizer, asked, 4)
    references = scoring.reference_likelihoods(first, tokenizer, asked, 4)
    np.testing.assert_allclose(outcomes["pipeline"]["references"]["syllables"], references, rtol=1e-4)
    assert outcomes["pipeline"]["answers"] != outcomes["m_B"]["answers"]
    assert outcomes["pipeline"]["nll"] == outcomes["m_B"]["nll"], "plain text has no question"


def test_answers_end_at_the_first_stop_string():
    assert scoring.until("one\ntwo; three", ("\n", ";")) == "one"
    assert scoring.until("one", ("\n",)) == "one"
