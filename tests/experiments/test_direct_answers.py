"""The key-value experiment with direct answers: what m_B is told inside, and what m_A reads and shares with it."""

import dataclasses
import io
import random

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import calm
from calm.experiments.key_value_arithmetic import bases, composition, recipe, reproduce, stages, workers
from calm.experiments.key_value_arithmetic.data import DataSettings, Task, build_tokenizer
from calm.experiments.key_value_arithmetic.lines import IGNORED, Batches, Line, arithmetic_line, encode, glossary_line
from calm.experiments.key_value_arithmetic.superposition import Superposed
from calm.experiments.key_value_arithmetic.training import exact_match, fit
from calm.experiments.results import Asked

DATA = DataSettings(keys=80, syllables=20, syllables_per_key=(2, 2), values=(1, 5), operands=(2, 3), answer="direct")
TINY = dataclasses.replace(
    recipe.PRESETS["cpu"],
    **{
        name: getattr(recipe.PRESETS["tiny"], name)
        for name in ("augmenting_training", "anchor_training", "composition_training", "steps_on_all", "workers")
    },
    data=DATA,
    augmenting_model=recipe.ModelSettings(width=24, feed_forward=48),
    anchor_model=recipe.ModelSettings(width=24, feed_forward=48),
    evaluation_examples=20,
    validation_examples=10,
)


@pytest.fixture(scope="module")
def task():
    return Task.draw(DATA, 0)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(DATA)


@pytest.fixture
def told(tokenizer):
    return Superposed(bases.new_anchor(TINY.anchor_model, tokenizer, 0), torch.arange(30, 35), recipe.Superposition())


def test_the_numbers_told_and_the_numbers_written_make_the_answer(task):
    rng = random.Random(0)
    strings = 0
    for _ in range(300):
        line = arithmetic_line(task, rng, with_unknowns=0.7)
        read = [
            line.worth.get(at, word) for at, word in enumerate(line.words) if at in line.worth or not word.isalpha()
        ]
        *expression, equals, answer, end = read
        assert equals == "=" and end == "<end>" and eval(" ".join(expression)) == int(answer)
        assert [word for word, learned in zip(line.words, line.learned, strict=True) if learned] == [answer, end]
        strings += len(line.worth)
        for at in line.worth:
            assert line.words[at - 1].isalpha() and line.words[at].isalpha()  # the second of two syllables
    assert 0.2 < strings / 300 / 2.75 < 0.5


def test_what_is_told_is_asked_for_in_a_share_of_the_lines(task):
    rng = random.Random(0)
    lines = [arithmetic_line(task, rng, with_unknowns=0.7, written_down=0.3) for _ in range(1000)]
    asked = [line for line in lines if ":" in line.words]
    assert 260 < len(asked) < 340 and sum(len(line.worth) for line in asked) > 200
    for line in asked:
        colon = line.words.index(":")
        told = [line.worth.get(at, word) for at, word in enumerate(line.words[:colon])]
        told = [word for word in told if not word.isalpha()]
        assert line.words[colon + 1 :] == [*told, "<end>"]
        assert line.learned == [at > colon for at in range(len(line.words))]
    assert not any(":" in arithmetic_line(task, rng, with_unknowns=0.7).words for _ in range(100))


def test_an_entry_is_a_key_and_its_value_without_a_sign_between(task):
    rng = random.Random(0)
    line = glossary_line(task, rng, 5)
    keys = {"".join(key.split("-")): str(value) for key, value in task.values.items()}
    values = 0
    for at, (word, learned) in enumerate(zip(line.words, line.learned, strict=True)):
        assert learned == word.isdigit()
        if learned:
            assert keys["".join(line.words[at - 2 : at])] == word
            values += 1
    assert values == 5
    drawn = [glossary_line(task, rng, 5).words for _ in range(200)]
    signs = sum(word in "+-=:;" for words in drawn for word in words)
    assert 0.65 < signs / 1000 < 0.75


def test_a_words_worth_is_at_its_token(tokenizer):
    lines = [Line(["ba", "be", "="], [False] * 3, {1: "3"}), Line(["4"], [True])]
    batch = encode(lines, tokenizer.get_vocab())
    assert batch["worth"].tolist() == [[IGNORED, tokenizer.get_vocab()["3"], IGNORED], [IGNORED] * 3]
    assert "worth" not in encode(lines[1:], tokenizer.get_vocab())


def test_what_is_told_is_the_number_in_units_of_the_state(told):
    told.settings = recipe.Superposition(noise=0, others=0)
    torch.manual_seed(0)
    numbers, states = torch.randint(30, 35, (4000,)), torch.randn(4000, 24) * torch.rand(4000, 1) * 9
    said = told.told(numbers, states)
    directions = F.rms_norm(told.model.get_input_embeddings()(numbers), (24,))
    size = (said * directions).mean(-1) / states.square().mean(-1).sqrt()
    torch.testing.assert_close(
        said, directions * (size * states.square().mean(-1).sqrt())[:, None], atol=1e-4, rtol=1e-4
    )
    quietest, loudest = told.settings.loudness
    assert quietest * 0.99 < size.min() < quietest * 1.05 and loudest * 0.95 < size.max() < loudest * 1.01
    assert size.log().mean().item() == pytest.approx(torch.tensor(told.settings.loudness).log().mean().item(), abs=0.1)


@pytest.mark.parametrize("kind", ["noise", "others"])
def test_what_is_told_is_not_clean(told, kind):
    """Noise anywhere, or along the numbers alone; its size in units of the number's own is what it says."""
    told.settings = recipe.Superposition(**{"loudness": (1, 1), "noise": 0, "others": 0, kind: 0.5})
    torch.manual_seed(0)
    numbers, states = torch.randint(30, 35, (4000,)), torch.ones(4000, 24)
    embedded = told.model.get_input_embeddings()
    every = F.rms_norm(embedded(torch.arange(30, 35)), (24,))
    noise = told.told(numbers, states) - F.rms_norm(embedded(numbers), (24,))
    if kind == "noise":
        size = noise.square().mean(-1).sqrt()
    else:
        shares = torch.linalg.lstsq(every.T, noise.T).solution
        torch.testing.assert_close(shares.T @ every, noise, atol=1e-4, rtol=1e-4)
        size = shares.T.square().mean(-1).sqrt()
    assert size.mean().item() == pytest.approx(0.25, abs=0.02) and size.min() < 0.02


def test_nothing_else_is_changed(told):
    ids = torch.randint(0, 20, (2, 6))
    worth = torch.full((2, 6), IGNORED)
    plain = told.model(ids).logits
    assert torch.equal(told(ids, worth=worth).logits, plain)
    worth[0, 3] = 31
    with_number = told(ids, worth=worth).logits
    assert torch.equal(with_number[1], plain[1])
    # the first layer's output changes at one place; what is before it cannot see it
    torch.testing.assert_close(with_number[0, :3], plain[0, :3])
    assert not torch.allclose(with_number[0, 3:], plain[0, 3:])
    assert torch.equal(told.model(ids).logits, plain)  # no hook is left behind


def test_a_model_learns_from_what_it_is_told_alone(task, tokenizer):
    """The operands are strings: without what it is told there is nothing to learn the answer from."""
    one = dataclasses.replace(task, settings=dataclasses.replace(DATA, operands=(1, 1)))
    settings = recipe.TrainingSettings(steps=150, rows=64, learning_rate=1e-2)

    def trained(worth: bool) -> float:
        def draw(rng, step):
            lines = [arithmetic_line(one, rng, with_unknowns=1.0) for _ in range(64)]
            return lines if worth else [Line(line.words, line.learned) for line in lines]

        vocabulary = tokenizer.get_vocab()
        numbers = torch.tensor([vocabulary[str(number)] for number in range(1, 6)])
        model = Superposed(bases.new_anchor(TINY.anchor_model, tokenizer, 0), numbers, recipe.Superposition())
        batches = Batches(draw, tokenizer.get_vocab(), settings.steps, "train")
        fit(model, batches, settings, 0, lambda *_: None)
        torch.manual_seed(0)
        strings = [line for line in draw(random.Random("test"), 0) if any(word.isalpha() for word in line.words)]
        return exact_match(model, encode(strings, tokenizer.get_vocab()))

    assert trained(worth=True) > 80 > 50 > trained(worth=False)


def test_m_A_shares_the_anchors_embeddings_and_waits_for_it(tmp_path, monkeypatch):
    assert stages.needs(stages.Stage("m_A", "augmenting"), TINY) == ("m_B",)
    assert stages.needs(stages.Stage("m_A", "augmenting"), recipe.PRESETS["demo"]) == ()
    monkeypatch.setitem(recipe.PRESETS, "tiny", TINY)
    monkeypatch.setattr(reproduce, "BASELINES", reproduce.BASELINES[:1])
    monkeypatch.setattr(
        reproduce, "CURVES", [stage for stage in stages.CURVES if stage.name in ("connections 1", "m_A 0.2")]
    )
    results = reproduce.reproduce("tiny", Asked((0,)), tmp_path, Console(file=io.StringIO()))
    models = {
        name: AutoModelForCausalLM.from_pretrained(tmp_path / "seed-0" / name)
        for name in (
            "anchor",
            "augmenting",
            "ablations/vanilla_augmenting",
            "ablations/random/augmenting",
            "curves/m_A-0.2/augmenting",
        )
    }
    embeddings = models["anchor"].get_input_embeddings().weight
    for name, model in models.items():
        assert torch.equal(model.get_input_embeddings().weight, embeddings), name
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight, name
    composed = calm.CalmConfig.from_pretrained(tmp_path / "seed-0/composed")
    pairs = [(pair["augmenting_layer"], pair["anchor_layer"]) for pair in composed.connections]
    assert pairs == [(2, 0), (2, 1), (2, 2)]
    alone = calm.CalmConfig.from_pretrained(tmp_path / "seed-0/curves/connections-1").connections
    assert [(pair["augmenting_layer"], pair["anchor_layer"]) for pair in alone] == [(2, 0)]
    assert [count for count, _ in results.curves["connections"].points["composed"]] == [1, 3]
    assert len(results.curves["quality of m_A"].points["composed"]) == 2
    assert results.parameters["augmenting"] == models["augmenting"].num_parameters()
    trained = calm.CalmForCausalLM.from_pretrained(tmp_path / "seed-0/composed").connections
    assert results.parameters["composition"] == sum(weight.numel() for weight in trained.parameters())
    assert results.training["composed"].trainable_parameters == results.parameters["composition"] - 3 * 2 * 24 * 24
    assert results.training["m_A"].trainable_parameters == models["augmenting"].num_parameters() - embeddings.numel()


def test_frozen_queries_and_keys_stay_small(tmp_path, task, tokenizer):
    for name, model in (
        ("anchor", bases.new_anchor(TINY.anchor_model, tokenizer, 0)),
        ("augmenting", bases.new_augmenting(TINY.augmenting_model, tokenizer, 0)),
    ):
        model.save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    folders = tmp_path / "anchor", tmp_path / "augmenting"
    model = composition.new_composition(*folders, TINY, 0)
    before = {name: weight.clone() for name, weight in model.connections.named_parameters()}
    composition.train_composition(model, task, TINY, 0, lambda *_: None)
    changed = {name for name, weight in model.connections.named_parameters() if not torch.equal(weight, before[name])}
    assert changed == {name for name in before if "w_q" not in name and "w_k" not in name}
    free = composition.new_composition(*folders, dataclasses.replace(TINY, frozen_queries_and_keys=None), 0)
    torch.testing.assert_close(model.connections[0].w_k.weight, free.connections[0].w_k.weight * 0.1)
    assert all(weight.requires_grad for weight in free.connections.parameters())


@pytest.mark.parametrize(
    ("settings", "is_told"),
    [
        ({}, True),
        ({"with_unknowns": 0.0, "written_down": 0.0}, False),
        ({"data": dataclasses.replace(DATA, answer="restate"), "written_down": 0.0}, False),
    ],
)
def test_the_anchor_is_told_only_where_answers_are_direct(task, tokenizer, monkeypatch, settings, is_told):
    """Without the wrapper a llama would take what it is told as an unknown argument and pass over it."""
    trained = []
    monkeypatch.setattr(bases, "fit", lambda model, *_: trained.append(model) or 0)
    of = dataclasses.replace(TINY, **settings)
    model, _ = bases.train_anchor(Task.draw(of.data, 0), of, tokenizer, 0, lambda *_: None)
    assert isinstance(trained[0], Superposed) == is_told and isinstance(model, LlamaForCausalLM)
    if is_told:
        assert tokenizer.convert_ids_to_tokens(trained[0].numbers.tolist()) == ["1", "2", "3", "4", "5"]
        assert trained[0].model is model


def test_looks_at_the_validation_lines_change_nothing(task, tokenizer):
    def weights(check_every):
        training = dataclasses.replace(TINY.anchor_training, check_every=check_every)
        model, _ = bases.train_anchor(
            task, dataclasses.replace(TINY, anchor_training=training), tokenizer, 0, lambda *_: None
        )
        return torch.cat([weight.flatten() for weight in model.parameters()])

    assert torch.equal(weights(3), weights(10))


def test_m_A_is_trained_again_with_its_anchor():
    done = dict.fromkeys(stage.name for stage in stages.STAGES if stage.name != "m_B")
    everything = [stage.name for stage in stages.STAGES]
    assert [stage.name for stage in stages.missing(stages.STAGES, done, TINY)] == everything
    demo = [stage.name for stage in stages.missing(stages.STAGES, done, recipe.PRESETS["demo"])]
    assert demo == [name for name in everything if name not in ("m_A", "vanilla_base")]


@pytest.mark.slow
def test_two_workers_wait_for_the_anchor(tmp_path):
    finished = []
    of = dataclasses.replace(TINY, workers=2)
    with workers.new_progress() as progress:
        bases_of = [stage for stage in stages.STAGES if stage.name in ("m_A", "m_B", "vanilla_base")]
        workers.run_stages(bases_of[::-1], of, 0, tmp_path, progress, lambda stage, _: finished.append(stage.name))
    assert finished[0] == "m_B" and set(finished) == {"m_A", "m_B", "vanilla_base"}


def test_what_comes_later_changes_no_base():
    bases_of = [stage for stage in stages.STAGES if stage.name in ("m_A", "m_B", "vanilla_base")]
    for name, value in (("frozen_queries_and_keys", None), ("connections", 1), ("numeric_share", 0.5)):
        other = dataclasses.replace(TINY, **{name: value})
        for stage in bases_of:
            assert stages.stage_fingerprint(stage, TINY, 0) == stages.stage_fingerprint(stage, other, 0), (stage, name)
    quieter = dataclasses.replace(TINY, superposition=recipe.Superposition(noise=0.1))
    assert all(stages.stage_fingerprint(s, TINY, 0) != stages.stage_fingerprint(s, quieter, 0) for s in stages.STAGES)


def test_another_anchor_is_another_m_A_where_they_share_embeddings():
    longer = dataclasses.replace(TINY, anchor_training=dataclasses.replace(TINY.anchor_training, steps=21))
    m_a = next(stage for stage in stages.STAGES if stage.name == "m_A")
    for shared in (True, False):
        first, second = (dataclasses.replace(r, shared_embeddings=shared) for r in (TINY, longer))
        same = stages.stage_fingerprint(m_a, first, 0) == stages.stage_fingerprint(m_a, second, 0)
        assert same != shared


def test_recipes_that_cannot_be():
    with pytest.raises(calm.CalmError, match=r"written_down is 0.3: expected 0 but for direct answers"):
        dataclasses.replace(TINY, data=dataclasses.replace(DATA, answer="restate"))
    with pytest.raises(calm.CalmError, match=r"with_unknowns is 0.7: expected 0 with direct answers in digits"):
        dataclasses.replace(TINY, data=dataclasses.replace(DATA, numbers="digits"), written_down=0.0)
    with pytest.raises(calm.CalmError, match=r"one width, not 64 \(m_A\) and 24"):
        dataclasses.replace(TINY, augmenting_model=recipe.ModelSettings(width=64, feed_forward=48))
