"""The engine: a row gets what it would get alone, whatever runs beside it, and what the library gives."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import pytest
import torch
from factories import assert_same, patched
from transformers import PreTrainedTokenizerBase

import calm
from calm.errors import CalmError
from calm.serving.engine import Engine, GenerationFailedError, QueueFullError
from calm.serving.limits import Limits
from calm.serving.metrics import Metrics
from calm.serving.rows import Piece, Row, Sampling

NONE = frozenset(("one", "two"))  # switched off: the anchor alone


@dataclass
class Asked:
    """A row, and what came of it."""

    prompt: list[int]
    sampling: Sampling
    off: frozenset[str] = frozenset()
    pieces: list[Piece] = field(default_factory=list, init=False)
    ended: threading.Event = field(default_factory=threading.Event, init=False)

    def row(self) -> Row:
        self.pieces = []
        self.ended.clear()
        return Row(self.prompt, self.off, self.sampling, self.deliver)

    def deliver(self, piece: Piece | Exception) -> None:
        self.pieces.append(piece)
        if isinstance(piece, Exception) or piece.finish_reason:
            self.ended.set()

    @property
    def result(self) -> tuple[list[int], list[str], str | None]:
        """Tokens, texts and the reason of the end."""
        assert self.ended.wait(60)
        return [p.token.id for p in self.pieces], [p.text for p in self.pieces], self.pieces[-1].finish_reason

    @property
    def logprobs(self) -> torch.Tensor:
        return torch.tensor([[p.token.logprob, *(value for _, value in p.token.top)] for p in self.pieces])


def greedy(tokens: int, **options: object) -> Sampling:
    return Sampling(tokens, temperature=0.0, logprobs=3, **options)


@pytest.fixture
def engine(model: calm.CalmForCausalLM, tokenizer: PreTrainedTokenizerBase) -> Iterator[Callable[..., Engine]]:
    """Makes an engine that was not started, when the one before has let go of the model that they share."""
    made: list[Engine] = []

    def end() -> None:
        for one in made:
            if one._thread.ident is not None:
                one.close()
        made.clear()

    def make(**limits: int) -> Engine:
        end()
        made.append(Engine(model, tokenizer, Limits(**limits), Metrics()))
        return made[-1]

    yield make
    end()


def together(engine: Engine, asked: list[Asked]) -> list[tuple]:
    """Has all of them wait before the engine starts."""
    engine.submit([one.row() for one in asked])
    engine.start()
    return [one.result for one in asked]


def batches(engine: Engine) -> list[float]:
    """How many batches ran, and how many rows in all."""
    samples = {s.name: s.value for m in engine._metrics.batch_rows.collect() for s in m.samples if not s.labels}
    return [samples["calm_batch_rows_count"], samples["calm_batch_rows_sum"]]


@pytest.fixture
def mixed(tokenizer: PreTrainedTokenizerBase) -> list[Asked]:
    """Rows of different lengths: greedy, sampled with and without seeds, with different ends."""
    texts = ["a", "a longer prompt than the others", "bc", "some text"]
    prompts = [tokenizer(text)["input_ids"] for text in texts]
    return [
        Asked(prompts[0], greedy(20)),
        Asked(prompts[1], greedy(5)),
        Asked(prompts[2], Sampling(12, temperature=1.3, top_p=0.9, seed=5, logprobs=3)),
        Asked(prompts[3], Sampling(9, temperature=0.7, seed=6, logprobs=3)),
        Asked(prompts[0], Sampling(12, temperature=1.0, seed=7, logprobs=3)),
    ]


def test_rows_of_a_batch_get_what_they_get_alone(engine: Callable[..., Engine], mixed: list[Asked]):
    """Tokens the same, log-probabilities within float32 rounding (invariant 3), also those of sampled rows."""
    batched = engine()
    found = together(batched, mixed)
    logprobs = [one.logprobs for one in mixed]
    assert batches(batched) == [1, 5]
    alone = engine(batch_size=1)
    expected = together(alone, mixed)
    assert batches(alone) == [5, 5]
    assert found == expected
    for one, in_batch in zip(mixed, logprobs, strict=True):
        assert_same(in_batch, one.logprobs)
    assert len({tuple(tokens) for tokens, *_ in found}) == 5, "answers that are all the same would prove nothing"


def test_negative_control_padding_that_is_seen_changes_the_rows(engine: Callable[..., Engine], mixed: list[Asked]):
    found = together(engine(), mixed)
    zeros = torch.zeros_like
    with patched(torch, zeros_like=lambda tensor: zeros(tensor) + 1):
        assert together(engine(), mixed) != found


@pytest.mark.parametrize("off", [frozenset(), frozenset(["one"]), NONE])
def test_greedy_rows_are_what_generate_gives(
    engine: Callable[..., Engine], model: calm.CalmForCausalLM, mixed: list[Asked], off: frozenset[str]
):
    """With everything off: the bare anchor's own `generate`, scores and all."""
    rows = [replace(one, sampling=greedy(10), off=off) for one in mixed]
    running = engine()
    together(running, rows)
    running.close()  # the switches are the model's, not a thread's: until the engine has left them, they are its own
    for one in rows:
        arguments = {"max_new_tokens": 10, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        ids = torch.tensor([one.prompt])
        if off == NONE:
            output = model.anchor.generate(ids, **arguments)
        else:
            with model.augmenting_disabled(*off):
                output = model.generate(ids, **arguments)
        tokens = output.sequences[0, len(one.prompt) :].tolist()
        assert one.result[0] == tokens
        steps = torch.cat(output.logits).log_softmax(-1)
        assert_same(one.logprobs[:, 0], steps[torch.arange(len(tokens)), tokens])
        assert_same(one.logprobs[:, 1:], steps.topk(3).values)


@pytest.mark.parametrize(
    "defaults",
    [
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2, "suppress_tokens": [20, 21], "max_time": 0},
        {"encoder_repetition_penalty": 5.0},
        {"encoder_no_repeat_ngram_size": 1},
        {"cache_implementation": "quantized"},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prompt_lookup_num_tokens": 2},
    ],
    ids=str,
)
def test_no_defaults_of_a_model_come_in_between(
    engine: Callable[..., Engine], mixed: list[Asked], defaults: dict[str, object]
):
    """A request says how its tokens are chosen: many models bring a penalty for repeating, which padding changes."""
    expected = together(engine(), mixed)
    running = engine()
    with patched(running.model.generation_config, **defaults):
        assert together(running, mixed) == expected


def test_answers_grow_on_a_cache_whatever_the_model_says(engine: Callable[..., Engine], mixed: list[Asked]):
    running, lengths = engine(), []
    with patched(running.model.generation_config, use_cache=False):
        hook = running.model.register_forward_pre_hook(
            lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
        )
        together(running, [mixed[1]])
        hook.remove()
    assert lengths == [len(mixed[1].prompt), 1, 1, 1, 1]


def test_a_tokenizer_without_padding_will_do(engine: Callable[..., Engine], mixed: list[Asked]):
    expected = together(engine(), mixed)
    running = engine()
    with patched(running.tokenizer, pad_token=None):
        assert together(running, mixed) == expected


def test_rows_with_different_switches_do_not_share_a_batch(engine: Callable[..., Engine], mixed: list[Asked]):
    """Nor an answer: each is the one it gets where nothing else waits."""
    switches = [frozenset(), NONE, frozenset(["one"]), NONE]
    rows = [replace(mixed[0], off=off) for off in switches]
    running = engine()
    found = together(running, rows)
    assert batches(running) == [3, 4]
    assert found[1] == found[3]
    assert len({tuple(tokens) for tokens, *_ in found}) == 3
    for row, expected in zip(rows, found, strict=True):
        assert together(engine(), [row]) == [expected]


def test_rows_that_would_not_fit_into_the_context_together_run_one_after_the_other(
    engine: Callable[..., Engine], model: calm.CalmForCausalLM, mixed: list[Asked]
):
    """Each fits alone; padded to the longer prompt, the longer answer would not."""
    context = model.context_length
    rows = [
        replace(mixed[0], prompt=[5] * (context - 4), sampling=greedy(4)),
        replace(mixed[0], prompt=[7] * 4, sampling=greedy(context - 4)),
    ]
    running = engine()
    found = together(running, rows)
    assert batches(running) == [2, 2]
    assert [reason for *_, reason in found] == ["length", "length"]


def test_a_long_prompt_does_not_make_its_batch_long(engine: Callable[..., Engine], mixed: list[Asked]):
    """Padded to it, the short ones would take as much memory and time each: 4 x 64 tokens, where 4 x 24 may be."""
    rows = [replace(mixed[0], prompt=[5] * length, sampling=greedy(4)) for length in (4, 60, 5, 6)]
    with patched(calm.serving.engine, PROMPT=20):
        running = engine(batch_size=4, max_tokens=4)
        found = together(running, rows)
        assert batches(running) == [2, 4]
        assert found == [together(engine(), [row])[0] for row in rows]
    running = engine(batch_size=4, max_tokens=4)
    together(running, rows)
    assert batches(running) == [1, 4], "control"


def test_a_seed_makes_an_answer_come_again_and_none_does_not(engine: Callable[..., Engine], mixed: list[Asked]):
    seeded = [replace(mixed[2]) for _ in range(2)]
    other = replace(mixed[2], sampling=replace(mixed[2].sampling, seed=8))
    unseeded = [replace(mixed[2], sampling=replace(mixed[2].sampling, seed=None)) for _ in range(2)]
    first, again, different, *free = together(engine(), [*seeded, other, *unseeded])
    assert first == again
    assert first != different
    assert free[0] != free[1]


def test_sampling_draws_from_the_distribution_that_was_asked_for(engine: Callable[..., Engine], mixed: list[Asked]):
    """First tokens of 400 rows against the probabilities of temperature 0.5 and top-p 0.8."""
    rows = [replace(mixed[0], sampling=Sampling(1, 0.5, 0.8, seed, logprobs=262)) for seed in range(400)]
    together(engine(batch_size=400, queue=400), rows)
    ids = torch.tensor([id for id, _ in rows[0].pieces[0].token.top])
    probabilities = (torch.tensor([value for _, value in rows[0].pieces[0].token.top]) / 0.5).softmax(-1)
    kept = probabilities.cumsum(-1) - probabilities < 0.8
    expected = torch.where(kept, probabilities, 0.0) / probabilities[kept].sum()
    counts = torch.bincount(torch.tensor([row.result[0][0] for row in rows]), minlength=262)[ids] / 400
    assert counts[~kept].sum() == 0
    assert kept.sum() > 3
    assert (counts - expected).abs().max() < 4 * (0.25 / 400) ** 0.5  # four standard deviations at most


@pytest.mark.parametrize("temperature", [1e-3, 1e-300, 0.0])
def test_hardly_any_temperature_is_greedy(engine: Callable[..., Engine], mixed: list[Asked], temperature: float):
    rows = [mixed[0], replace(mixed[0], sampling=replace(greedy(20), temperature=temperature, seed=1))]
    expected, found = together(engine(), rows)
    assert found == expected


def test_a_stop_string_ends_its_row_and_no_other(engine: Callable[..., Engine], mixed: list[Asked]):
    tokens, texts, _ = together(engine(), [mixed[0]])[0]
    text = "".join(texts)
    stop = text[3:5]
    rows = [replace(mixed[0], sampling=greedy(20, stop=(stop,))), replace(mixed[0])]
    stopped, whole = together(engine(), rows)
    assert ("".join(stopped[1]), stopped[2]) == (text[: text.index(stop)], "stop")
    assert whole == (tokens, texts, "length")
    assert len(stopped[0]) < len(tokens)


@pytest.mark.parametrize("off", [frozenset(), NONE])
def test_the_end_of_sequence_ends_a_row_without_text(
    engine: Callable[..., Engine], mixed: list[Asked], off: frozenset[str]
):
    """The fifth token is made the one that ends, also where the composition is off."""
    asked = replace(mixed[0], off=off)
    tokens = together(engine(), [asked])[0][0]
    end = tokens[4]
    running = engine()
    with patched(running.model.generation_config, eos_token_id=[end]):
        found = together(running, [asked])[0]
        assert running.end_of_sequence() == {end}
    at = tokens.index(end)
    assert (found[0], found[2]) == (tokens[: at + 1], "stop")
    assert "".join(found[1]) == running.tokenizer.decode(tokens[:at], skip_special_tokens=True)


def test_a_full_queue_takes_all_rows_of_a_request_or_none(engine: Callable[..., Engine], mixed: list[Asked]):
    running = engine(queue=3)
    running.submit([mixed[0].row(), mixed[1].row()])
    with pytest.raises(QueueFullError):
        running.submit([mixed[2].row(), mixed[3].row()])
    running.submit([mixed[4].row()])
    running.start()
    assert all(one.result for one in (mixed[0], mixed[1], mixed[4]))
    assert mixed[2].pieces == mixed[3].pieces == []


def test_cancelled_rows_are_not_generated(engine: Callable[..., Engine], mixed: list[Asked]):
    running = engine()
    rows = [one.row() for one in mixed]
    rows[0].cancelled = True
    running.submit(rows)
    running.start()
    assert mixed[1].result
    assert mixed[0].pieces == []


def test_cancelled_rows_take_no_place_in_the_queue(engine: Callable[..., Engine], mixed: list[Asked]):
    waiting = engine(queue=1)
    gone = mixed[0].row()
    waiting.submit([gone])
    with pytest.raises(QueueFullError):
        waiting.submit([mixed[1].row()])
    gone.cancelled = True
    waiting.submit([mixed[1].row()])


def test_a_batch_that_fails_does_not_end_the_engine(engine: Callable[..., Engine], mixed: list[Asked]):
    running = engine()
    bad = replace(mixed[0], prompt=[10**6])  # no such token
    running.submit([bad.row()])
    running.start()
    assert bad.ended.wait(60)
    failed = bad.pieces[0]
    assert isinstance(failed, GenerationFailedError)
    assert failed.__traceback__ is failed.__context__ is None, "frames would hold what was computed"
    running.submit([mixed[0].row()])
    assert mixed[0].result[2] == "length"
    assert running.alive


def test_rows_whose_batch_fails_are_answered_without_the_one_that_failed(
    engine: Callable[..., Engine], mixed: list[Asked]
):
    expected = together(engine(), mixed)
    bad = replace(mixed[0], prompt=[10**6])
    running = engine()
    running.submit([one.row() for one in (mixed[0], bad, *mixed[1:])])
    running.start()
    assert [one.result for one in mixed] == expected
    assert isinstance(bad.pieces[0], GenerationFailedError) and len(bad.pieces) == 1


def test_rows_that_do_not_fit_into_memory_together_run_alone(engine: Callable[..., Engine], mixed: list[Asked]):
    def fail_together(_: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if len(kwargs["input_ids"]) > 1:
            raise torch.OutOfMemoryError

    expected = together(engine(), mixed)
    running = engine()
    hook = running.model.register_forward_pre_hook(fail_together, with_kwargs=True)
    try:
        assert together(running, mixed) == expected
    finally:
        hook.remove()


def test_rows_that_have_begun_are_not_begun_anew(engine: Callable[..., Engine], mixed: list[Asked]):
    def fail_later(_: object, args: object, kwargs: dict[str, torch.Tensor]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            raise torch.OutOfMemoryError

    running = engine()
    hook = running.model.register_forward_pre_hook(fail_later, with_kwargs=True)
    try:
        running.submit([one.row() for one in mixed])
        running.start()
        assert all(one.ended.wait(60) for one in mixed)
    finally:
        hook.remove()
    for one in mixed:
        assert [type(piece) for piece in one.pieces] == [Piece, GenerationFailedError]


def test_tokens_are_those_that_every_model_knows(
    engine: Callable[..., Engine], model: calm.CalmForCausalLM, tokenizer: PreTrainedTokenizerBase
):
    """Larger ones are refused when they come (`test_tokens_that_the_model_does_not_have_are_refused`)."""
    assert engine().vocabulary == len(tokenizer)
    with patched(model, known_tokens=100):
        assert engine().vocabulary == 100


def test_a_slow_tokenizer_is_refused(model: calm.CalmForCausalLM, tokenizer: PreTrainedTokenizerBase):
    with (
        patched(type(tokenizer), is_fast=False),
        pytest.raises(CalmError, match="not a fast tokenizer"),
    ):
        Engine(model, tokenizer, Limits(), Metrics())


def test_rows_that_are_given_up_while_a_batch_gathers_do_not_end_the_engine(
    engine: Callable[..., Engine], mixed: list[Asked]
):
    running, given_up, gathered = engine(), mixed[0].row(), threading.Event()

    def give_up(seconds: float) -> None:
        given_up.cancelled = True
        running.submit([])  # as any request would, it forgets those
        gathered.set()

    running.submit([given_up])
    with patched(calm.serving.engine, time=SimpleNamespace(sleep=give_up)):
        running.start()
        assert gathered.wait(60)
        time.sleep(0.2)  # the batch is chosen
        running.submit([mixed[1].row()])
        assert mixed[1].result[2] == "length"
    assert running.alive
