"""Requests of one batch have different augmenting models on, each with the logits that transformers has for its own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import engine
import pytest
import torch
from engine import Expected
from factories import Mix
from vllm import LLM, EngineArgs, SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.outputs import RequestOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers

import calm
from calm.serving.vllm import scheduling, switches
from calm.serving.vllm.model_state import CalmModelState

TOLERANCE = 1e-5  # of log-probabilities in float32: what is off adds nothing, and the rest is as near as without it
APART = 0.1  # at least so far are the settings from one another, even where a gate is nearly closed

LENGTHS = (3, 17, 30, 45)  # one grows into a second block of the cache

MIX = Mix("llama", ("gpt2", "qwen2"), anchor_shape=(64, 4, 2), augmenting_shapes=((96, 3, 3), (32, 2, 4)))
SETTINGS: dict[str, object] = {"all": "all", "none": "none", "m0": ["m0"], "m1": ["m1"]}
"""What a request asks for by the setting's name."""

Job = tuple[str, list[int]]  # setting, prompt


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[calm.CalmForCausalLM]:
    folder = tmp_path_factory.mktemp("switches")
    model = engine.eager(engine.save(MIX, folder))
    model.name_or_path = str(folder / "composed")
    return model


@pytest.fixture(scope="module")
def expected(model: calm.CalmForCausalLM) -> dict[str, list[Expected]]:
    """By setting, for each prompt; before vLLM changes the classes of models that it takes from transformers."""
    prompts = engine.prompts(LENGTHS)
    on = {"all": ["m0", "m1"], "none": [], "m0": ["m0"], "m1": ["m1"]}
    return {setting: engine.expect_each(model, prompts, [on[setting]] * len(prompts)) for setting in SETTINGS}


@pytest.fixture(scope="module")
def llm(model: calm.CalmForCausalLM, expected: dict[str, list[Expected]]) -> Iterator[LLM]:
    blocks = 10  # too few for all at once: some requests lose their place in the batch, and come back to another
    with engine.serving(Path(model.name_or_path), num_gpu_blocks_override=blocks) as llm:
        yield llm


def run(llm: LLM, jobs: Sequence[Job], whole: bool = True) -> list[RequestOutput]:
    prompts = [prompt for _, prompt in jobs]
    return engine.run(llm, prompts, whole=whole, augmenting=[SETTINGS[setting] for setting, _ in jobs])


def distances(
    outputs: Sequence[RequestOutput], jobs: Sequence[Job], expected: dict[str, list[Expected]]
) -> list[float]:
    """Of each output's log-probabilities from what is expected of its setting, up to the first token that differs."""
    found = []
    for output, (setting, prompt) in zip(outputs, jobs, strict=True):
        (wanted,) = (one for one in expected[setting] if one.prompt == prompt)
        ours = engine.found_log_probs(output)
        theirs = wanted.log_probs[-len(ours) :]
        same = len(ours) - engine.GENERATED + 1  # the first generated token's, and those of the prompt
        for mine, other in zip(output.outputs[0].token_ids, wanted.generated, strict=True):
            if mine != other:
                break
            same += 1
        found.append((ours[:same] - theirs[:same]).abs().max().item())
    return found


def right(outputs: Sequence[RequestOutput], jobs: Sequence[Job], expected: dict[str, list[Expected]]) -> None:
    for output, (setting, prompt) in zip(outputs, jobs, strict=True):
        (wanted,) = (one for one in expected[setting] if one.prompt == prompt)
        assert engine.worst([output], [wanted]) < TOLERANCE, f"{setting}, {len(prompt)} tokens"


def mixed() -> list[Job]:
    """Every setting of every prompt, neighbours in the batch different in both."""
    prompts, settings = engine.prompts(LENGTHS), list(SETTINGS)
    return [(settings[(i + j) % len(settings)], prompts[i]) for j in range(len(settings)) for i in range(len(prompts))]


def test_the_settings_are_far_apart(expected: dict[str, list[Expected]]) -> None:
    for place in range(len(LENGTHS)):
        ours = {setting: wanted[place] for setting, wanted in expected.items()}
        for one in SETTINGS:
            for other in SETTINGS:
                first, second = (ours[setting].log_probs[len(ours[one].prompt) - 1] for setting in (one, other))
                assert one == other or (first - second).abs().max() > APART


def test_settings_share_a_batch(llm: LLM, expected: dict[str, list[Expected]], monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks; with more requests than rows, so that rows are left, moved and taken again; and some are put off."""
    put_off, plain = [], Scheduler._preempt_request

    def preempt(self: Scheduler, request: Request, *others: object, **more: object) -> None:
        put_off.append(request.sampling_params.extra_args)
        plain(self, request, *others, **more)

    monkeypatch.setattr(Scheduler, "_preempt_request", preempt)
    jobs = mixed()
    assert len(jobs) > 8 and max(len(prompt) for _, prompt in jobs) > engine.CHUNK
    right(run(llm, jobs), jobs, expected)
    right(run(llm, jobs, whole=False), jobs, expected)
    assert any(argument != {"augmenting": "all"} for argument in put_off)


def test_without_a_choice_all_are_on(llm: LLM, expected: dict[str, list[Expected]]) -> None:
    run(llm, [("none", prompt) for prompt in engine.prompts(LENGTHS)])  # leaves no trace
    outputs = engine.run(llm, engine.prompts(LENGTHS))
    assert engine.worst(outputs, expected["all"]) < TOLERANCE


def test_prefixes_are_not_shared_across_settings(llm: LLM, expected: dict[str, list[Expected]]) -> None:
    """One prompt with one setting after the other: each finds its own beginning again, and no other's."""
    prompt = engine.prompts(LENGTHS)[-1]
    llm.reset_prefix_cache()
    cached = {}
    for settings in (("all", "none", "m0"), ("all", "m0", "none")):
        for setting in settings:
            (output,) = run(llm, [(setting, prompt)], whole=False)
            right([output], [(setting, prompt)], expected)
            cached.setdefault(setting, []).append(output.num_cached_tokens)
    assert cached == {setting: [0, engine.BLOCK] for setting in ("all", "none", "m0")}


def test_the_comparison_sees_shared_prefixes(
    llm: LLM, expected: dict[str, list[Expected]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scheduling, "salted", lambda salt, off: salt)
    prompt = engine.prompts(LENGTHS)[-1]
    llm.reset_prefix_cache()
    run(llm, [("all", prompt)], whole=False)
    jobs = [("none", prompt)]
    outputs = run(llm, jobs, whole=False)
    llm.reset_prefix_cache()
    assert outputs[0].num_cached_tokens == engine.BLOCK
    assert distances(outputs, jobs, expected)[0] > 100 * TOLERANCE


@pytest.mark.parametrize("broken", ["gate", "rows", "names"])
def test_the_comparison_sees_broken_switches(
    broken: str, llm: LLM, expected: dict[str, list[Expected]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = switches.Switches.of_tokens
    wrong = {
        "gate": lambda self, tokens: torch.ones_like(found(self, tokens)),  # everything is on
        "rows": lambda self, tokens: found(self, tokens).roll(1, 0),  # each token has its neighbour's switches
        "names": lambda self, tokens: found(self, tokens).flip(1),  # the two augmenting models are mixed up
    }
    monkeypatch.setattr(switches.Switches, "of_tokens", wrong[broken])
    prompt = engine.prompts(LENGTHS)[1]
    jobs = [("all", prompt), ("m0", prompt), ("none", prompt)]
    assert max(distances(run(llm, jobs), jobs, expected)) > 100 * TOLERANCE


@pytest.mark.parametrize("wrong", [["m0", "third"], "some", 3, [1], {"m0": True}])
def test_what_is_not_there_is_refused_and_the_engine_goes_on(
    wrong: object, llm: LLM, expected: dict[str, list[Expected]]
) -> None:
    with pytest.raises(
        VLLMValidationError, match=r'augmenting: .* expected "all", "none" or some of \[\'m0\', \'m1\'\]'
    ):
        llm.generate([{"prompt_token_ids": [5, 6]}], SamplingParams(extra_args={"augmenting": wrong}, detokenize=False))
    jobs = [("none", engine.prompts(LENGTHS)[0])]
    right(run(llm, jobs), jobs, expected)


def test_salts_are_apart() -> None:
    """Also where a request's own salt looks like one made here."""
    made = [salted for off in ((), ("m0",), ("m0", "m1")) if (salted := scheduling.salted(None, off)) is not None]
    everything = [scheduling.salted(salt, off) for salt in (None, "", "a", *made) for off in ((), ("m0",), ("m1",))]
    assert scheduling.salted(None, ()) is None
    assert len(set(everything)) == len(everything)


def test_the_second_model_runner(model: calm.CalmForCausalLM) -> None:
    """Its parts that run without Triton: requests keep slots, steps take them in any order, and are padded."""
    config = EngineArgs(
        model=model.name_or_path, skip_tokenizer_init=True, max_num_seqs=4, max_num_batched_tokens=16, max_model_len=16
    ).create_engine_config()
    served = torch.nn.Module()
    served.switches = switches.Switches(["m0", "m1"], config)
    (name,) = config.model_config.logits_processors
    switch = getattr(switches, name.split(":")[1])(config, None)
    for slot, augmenting in {0: "none", 1: ["m1"], 3: None, 2: ["m0"]}.items():
        params = SamplingParams(extra_args=None if augmenting is None else {"augmenting": augmenting})
        assert switch.add_request(slot, params) is False
    switch.add_request(0, SamplingParams())  # taken by another
    switch.apply_staged_writes()
    batch = InputBatch.make_dummy(3, 6, InputBuffers(4, 16, torch.device("cpu")))
    batch.idx_mapping = torch.tensor([2, 0, 1])
    batch.num_tokens_after_padding = 8
    state = CalmModelState(config, served, None, torch.device("cpu"))
    assert state.prepare_inputs(batch, None) == {}
    found = served.switches.of_tokens(6).tolist()
    assert found == [[True, False]] * 2 + [[True, True]] * 2 + [[False, True]] * 2
