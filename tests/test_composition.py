"""composition.py: what compose() makes of models, names and choices; what it leaves as it was; what it refuses."""

from __future__ import annotations

import collections
import copy
import gc
import pickle
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import factories
import pytest
import torch
import transformers
from factories import Mix, assert_identical, assert_same
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import calm
from calm import CalmError, CheckpointError, UnsupportedModelError, backbones
from calm.attention import Connection

IDS = factories.tokens(2, 9)


def small(**kwargs: object) -> calm.CalmForCausalLM:
    return calm.compose(factories.base("llama"), factories.base("gpt2", 24, 4, 2), 2, **kwargs)


def test_one_line() -> None:
    """The names, numbers and defaults of the documentation."""
    model = small()
    assert isinstance(model, calm.CalmForCausalLM) and not model.training
    assert list(model.augmenting) == ["augmenting"]
    assert [pair.to_dict() for pair in model.config.layer_pairs] == [
        {"augmenting": "augmenting", "augmenting_layer": 1, "anchor_layer": 1},
        {"augmenting": "augmenting", "augmenting_layer": 3, "anchor_layer": 3},
    ]
    assert (model.config.num_heads, model.config.attention, model.config.attend) == (4, "gated", "causal")
    assert len(model.connections) == 2 and all(isinstance(c, Connection) for c in model.connections)


def test_trainable_parameters(capsys: pytest.CaptureFixture) -> None:
    """D_A x D_B for the projection, 4 D_B^2 for the attention and D_B + 1 for the gate, a connection."""
    model = small()
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == 2 * (24 * 32 + 4 * 32**2 + 32 + 1)
    model.print_trainable_parameters()
    share = 100 * trainable / total
    assert (
        f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}"
        in capsys.readouterr().out
    )


def test_connections_by_pairs_and_by_name() -> None:
    anchor, others = factories.base("llama"), {"a": factories.base("gpt2"), "b": factories.base("opt")}
    model = calm.compose(
        anchor, others, {"b": [(0, 3), (2, 1)], "a": 1}, num_heads=8, attention="paper", attend="prompt"
    )
    found = [(p.augmenting, p.augmenting_layer, p.anchor_layer) for p in model.config.layer_pairs]
    assert found == [("a", 3, 3), ("b", 2, 1), ("b", 0, 3)]
    assert len(backbones.layers_of(model.augmenting["a"])) == 4
    assert len(backbones.layers_of(model.augmenting["b"])) == 3
    assert model.connections[0].num_heads == 8 and not model.connections[0].normalize


def test_names_and_folders(tmp_path: Path) -> None:
    """By path the same as by hand; what is not needed is not built."""
    anchor, other = factories.base("gemma3_text"), factories.base("gpt2", 24, 4, 2)
    anchor.save_pretrained(tmp_path / "anchor")
    other.save_pretrained(tmp_path / "other")
    torch.manual_seed(0)
    by_hand = calm.compose(anchor, other, [(1, 2)])
    torch.manual_seed(0)
    by_name = calm.compose(str(tmp_path / "anchor"), tmp_path / "other", [(1, 2)])
    factories.perturb(by_hand)
    by_name.connections.load_state_dict(by_hand.connections.state_dict())
    assert_identical(by_name(IDS).logits, by_hand(IDS).logits)
    assert by_name.config.anchor_reference["fingerprint"] == by_hand.config.anchor_reference["fingerprint"]
    assert by_name.config.anchor_reference["name_or_path"] == str(tmp_path / "anchor")
    reference = "augmenting_references"
    assert (
        getattr(by_name.config, reference)["augmenting"]["fingerprint"]
        == (getattr(by_hand.config, reference)["augmenting"]["fingerprint"])
    )
    assert sum(p.numel() for p in by_name.augmenting.parameters()) < 0.7 * sum(p.numel() for p in other.parameters())


def test_relative_folders_are_found_again_from_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    factories.base("llama").save_pretrained(tmp_path / "here" / "anchor")
    monkeypatch.chdir(tmp_path / "here")
    model = calm.compose("anchor", "anchor", 2)
    model.save_pretrained("out")
    monkeypatch.chdir(tmp_path)
    assert_identical(calm.CalmForCausalLM.from_pretrained("here/out")(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    factories.base("llama").save_pretrained(tmp_path)
    model = calm.compose(tmp_path, tmp_path, 2, dtype=dtype)
    bases = {p.dtype for base in (model.anchor, model.augmenting) for p in base.parameters()}
    assert bases == {dtype} and model(IDS).logits.dtype == dtype
    mixed = calm.compose(factories.base("llama").to(dtype), factories.base("gpt2"), 2)
    assert {p.dtype for p in mixed.augmenting.parameters()} == {torch.float32}
    factories.perturb(mixed)
    assert mixed(IDS).logits.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_connections_of_half_precision_bases_learn(dtype: torch.dtype, tmp_path: Path) -> None:
    """W_O begins as an identity, next to which an update of 1e-3 is less than half a step of bfloat16."""
    model = calm.compose(factories.base("llama").to(dtype), factories.base("gpt2").to(dtype), 2)
    assert {p.dtype for p in model.connections.parameters()} == {torch.float32}
    factories.perturb(model)  # gates are open
    before = [connection.w_o.weight.diagonal().clone() for connection in model.connections]
    optimizer = torch.optim.SGD(model.connections.parameters(), lr=1e-3)
    model.train()(IDS, labels=IDS).loss.backward()
    for weight in model.connections.parameters():
        weight.grad.sign_()
    optimizer.step()
    for connection, old in zip(model.connections, before, strict=True):
        assert (connection.w_o.weight.diagonal() - old).abs().min() > 5e-4
    model.eval().save_pretrained(tmp_path)
    bases = {"anchor": model.anchor, "augmenting": dict(model.augmenting)}
    again = calm.CalmForCausalLM.from_pretrained(tmp_path, **bases)
    assert {p.dtype for p in again.connections.parameters()} == {dtype}
    model.connections.to(dtype)
    assert_identical(again(IDS).logits, model(IDS).logits)


# -- what stays as it was ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("anchor", factories.ANCHORS)
def test_the_users_models_are_not_changed(anchor: str) -> None:
    mix = Mix(anchor=anchor, augmenting=("gpt2", "gemma3_text"))
    models = {"anchor": mix.anchor_model(), **mix.augmenting_models()}
    for model in models.values():
        model.requires_grad_(False)
    logits = {name: model(IDS).logits for name, model in models.items()}
    generated = models["anchor"].generate(IDS, max_new_tokens=4, do_sample=False)
    before = {
        name: (list(model.state_dict()), model.config.to_dict(), [m.training for m in model.modules()])
        for name, model in models.items()
    }
    composed = factories.perturb(calm.compose(models["anchor"], {k: models[k] for k in ("m0", "m1")}, 2))
    composed(IDS)
    composed.generate(IDS, max_new_tokens=2)
    for name, model in models.items():
        after = (list(model.state_dict()), model.config.to_dict(), [m.training for m in model.modules()])
        assert after == before[name]
        assert_identical(model(IDS).logits, logits[name])
    assert torch.equal(models["anchor"].generate(IDS, max_new_tokens=4, do_sample=False), generated)


def test_an_error_in_a_forward_pass_leaves_nothing_behind() -> None:
    """The hooks' state is taken down however the pass ends: the anchor alone is the anchor again."""
    mix = Mix()
    model = mix.build()
    bare = model.anchor(IDS).logits
    handle = model.anchor.model.norm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS)
    handle.remove()
    assert model._running() is None
    assert_identical(model.anchor(IDS).logits, bare)
    with pytest.raises(ZeroDivisionError), model.composition_disabled():
        raise ZeroDivisionError
    assert not torch.equal(model(IDS).logits, bare)


def test_one_anchor_in_two_compositions() -> None:
    mix = Mix(augmenting=("gpt2",))
    anchor, (other,) = mix.anchor_model(), mix.augmenting_models().values()
    first = factories.perturb(calm.compose(anchor, other, 2), seed=1)
    expected = first(IDS).logits
    second = factories.perturb(calm.compose(anchor, other, [(0, 0)], attention="paper"), seed=2)
    assert first.anchor is second.anchor
    assert_identical(first(IDS).logits, expected)
    alone = factories.perturb(calm.compose(mix.anchor_model(), other, [(0, 0)], attention="paper"), seed=2)
    alone.connections.load_state_dict(second.connections.state_dict())
    assert_identical(second(IDS).logits, alone(IDS).logits)
    assert not torch.equal(second(IDS).logits, expected)
    loss = second(IDS, labels=IDS).loss
    loss.backward()
    assert all(p.grad is None for p in first.connections.parameters())
    with first.composition_disabled():
        assert not torch.equal(second(IDS).logits, anchor(IDS).logits)


@pytest.mark.parametrize("architecture", ["llama", "gemma3_text", "gpt2", "bloom"])
def test_a_model_composed_with_itself(architecture: str, tmp_path: Path) -> None:
    anchor = factories.base(architecture)
    model = factories.perturb(calm.compose(anchor, anchor, 2))
    apart = factories.perturb(calm.compose(factories.base(architecture), factories.base(architecture), 2))
    apart.connections.load_state_dict(model.connections.state_dict())
    assert_identical(model(IDS).logits, apart(IDS).logits)
    assert {id(p) for p in model.augmenting.parameters()} <= {id(p) for p in anchor.parameters()}
    anchor.save_pretrained(tmp_path)
    named = calm.compose(tmp_path, tmp_path, 2)
    named.connections.load_state_dict(model.connections.state_dict())
    assert_identical(named(IDS).logits, model(IDS).logits)
    assert {id(p) for p in named.augmenting.parameters()} <= {id(p) for p in named.anchor.parameters()}
    sequences = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert torch.equal(sequences, apart.generate(IDS, max_new_tokens=4, do_sample=False))


def test_a_composed_anchor_as_augmenting_model_brings_no_hooks_along() -> None:
    """The copy of its layers must not hold the first composition, nor run it."""
    anchor = factories.base("llama")
    first = factories.perturb(calm.compose(anchor, factories.base("gpt2"), 4))
    expected = first(IDS).logits
    second = calm.compose(factories.base("qwen3"), anchor, [(2, 1)])
    hooks = [hook for module in second.augmenting.modules() for hook in module._forward_hooks.values()]
    owners = [hook.model and hook.model() for hook in hooks if isinstance(hook, backbones.CompositionHook)]
    assert owners.count(second) == 1 and first not in owners, "hooks of another composition were copied"
    assert_identical(first(IDS).logits, expected)


def test_deepcopy() -> None:
    """A copy of its own: its hooks run its own connections, and neither sees the other's training."""
    model = Mix(augmenting=("gpt2", "mamba")).build()
    expected = model(IDS).logits
    copied = copy.deepcopy(model)
    assert_identical(copied(IDS).logits, expected)
    with torch.no_grad():
        for weight in copied.connections.parameters():
            weight.mul_(-1.5)
    assert_identical(model(IDS).logits, expected)
    assert not torch.equal(copied(IDS).logits, expected)
    copied(IDS, labels=IDS).loss.backward()
    assert all(weight.grad is None for weight in model.parameters())
    assert copied._running() is None and model._running() is None
    owned = {id(p) for p in model.parameters()}
    assert not any(id(p) in owned for p in copied.parameters())


def test_a_pickled_composition_is_a_composition() -> None:
    """What starting a process with a model does to it."""
    model = Mix(augmenting=("gpt2",)).build()
    copied = pickle.loads(pickle.dumps(model))
    assert_identical(copied(IDS).logits, model(IDS).logits)
    with torch.no_grad():
        copied.connections[0].w_o.weight.mul_(-1.5)
    assert not torch.equal(copied(IDS).logits, model(IDS).logits)


def test_an_anchor_outlives_its_compositions() -> None:
    """A sweep composes one anchor many times: what is thrown away is freed and leaves the anchor as it was."""
    anchor = factories.base("llama")
    expected = anchor(IDS).logits
    for _ in range(2):
        model = factories.perturb(calm.compose(anchor, factories.base("gpt2"), 2))
        assert not torch.equal(model(IDS).logits, expected)
        gone = weakref.ref(model)
        del model
        gc.collect()
        assert gone() is None
        assert_identical(anchor(IDS).logits, expected)


def test_threads_do_not_disturb_one_another() -> None:
    """Several threads run one composition, and two compositions of one anchor, at the same time."""
    anchor = factories.base("llama")
    models = [
        factories.perturb(calm.compose(anchor, factories.base(name), 2), seed)
        for seed, name in enumerate(("gpt2", "qwen3"))
    ]
    inputs = [factories.tokens(1, length, seed=length) for length in range(3, 11)]
    jobs = [(model, ids) for ids in inputs for model in models]

    def logits(job: tuple[calm.CalmForCausalLM, Tensor]) -> Tensor:
        model, ids = job
        with torch.no_grad():
            return model.generate(ids, max_new_tokens=6, output_logits=True, return_dict_in_generate=True).logits[-1]

    alone = [logits(job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(logits, jobs))
    for found, expected in zip(together, alone, strict=True):
        assert_identical(found, expected)


# -- what it costs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3])
def test_cost_is_linear_in_the_augmenting_models(count: int) -> None:
    """One pass of each kept layer and one of each connection; no model reads another's but the anchor."""
    others = {f"m{i}": factories.base("llama", 16, 4, 2, seed=i) for i in range(count)}
    model = calm.compose(factories.base("gpt2"), others, [(0, 1), (2, 3)] if count == 1 else dict.fromkeys(others, 2))
    calls: collections.Counter[str] = collections.Counter()

    def counted(module: nn.Module, kind: str) -> None:
        module.register_forward_hook(lambda *args: calls.update([kind]))

    for layer in backbones.layers_of(model.anchor):
        counted(layer, "anchor layer")
    for other in model.augmenting.values():
        for layer in backbones.layers_of(other):
            counted(layer, "augmenting layer")
    for connection in model.connections:
        counted(connection, "connection")
    model(IDS)
    kept = sum(model.config.augmenting_depth(name) for name in model.augmenting)
    assert calls == {"anchor layer": 4, "augmenting layer": kept, "connection": 2 * count}
    assert kept == (3 if count == 1 else 4 * count)
    trainable, _ = model.get_nb_trainable_parameters()
    assert trainable == count * 2 * (16 * 32 + 4 * 32**2 + 32 + 1)


def test_augmenting_models_do_not_depend_on_one_another() -> None:
    """What each adds at its first connection is what it adds alone, and several on one layer add up."""
    anchor = factories.base("llama")
    others = {"a": factories.base("gpt2"), "b": factories.base("opt")}
    both = factories.perturb(calm.compose(anchor, others, {"a": [(1, 3)], "b": [(2, 3)]}))
    hidden = []
    handle = both.anchor.model.norm.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    both(IDS)
    for name, pair in (("a", (1, 3)), ("b", (2, 3))):
        single = calm.compose(factories.base("llama"), others[name], [pair])
        index = list(others).index(name)
        single.connections[0].load_state_dict(both.connections[index].state_dict())
        inner = single.anchor.model.norm.register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
        single(IDS)
        inner.remove()
    anchor(IDS)
    handle.remove()
    together, first, second, bare = hidden
    assert_same(together - bare, (first - bare) + (second - bare))


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"connections": 5}, ["connections=5", "1 to 4"]),
        ({"connections": [(4, 0)]}, ["layer 4", "augmenting model 'augmenting'", "4 layers"]),
        ({"connections": [(0, 4)]}, ["layer 4", "anchor"]),
        ({"connections": [(0, 0), (0, 0)]}, ["(0, 0)", "twice"]),
        ({"connections": []}, ["none given"]),
        ({"num_heads": 5}, ["num_heads=5", "width 32"]),
        ({"num_heads": -4}, ["num_heads=-4", "width 32"]),
        ({"attention": "soft"}, ["attention='soft'", "'paper'"]),
        ({"attend": "all"}, ["attend='all'", "'prompt'"]),
    ],
)
def test_wrong_choices_are_refused_before_anything_is_loaded(kwargs: dict, words: list[str], tmp_path: Path) -> None:
    """From the configurations alone: there are no weights on disk."""
    factories.config("llama").save_pretrained(tmp_path / "anchor")
    factories.config("gpt2").save_pretrained(tmp_path / "other")
    with pytest.raises(CalmError) as error:
        calm.compose(tmp_path / "anchor", tmp_path / "other", **{"connections": 2} | kwargs)
    assert all(word in str(error.value) for word in words), str(error.value)
    with pytest.raises(CheckpointError, match="Cannot load"):
        calm.compose(tmp_path / "anchor", tmp_path / "other", 2)


@pytest.mark.parametrize("kwargs", [{"num_head": 2}, {"dtype": torch.bfloat16}, {"revision": "v2", "token": "x"}])
def test_arguments_that_nothing_would_read_are_refused(kwargs: dict, tmp_path: Path) -> None:
    """Misspelt, or for loading bases that are loaded already."""
    with pytest.raises(CalmError) as error:
        small(**kwargs)
    assert all(f"{key}={value!r}" in str(error.value) for key, value in kwargs.items()), str(error.value)
    factories.base("gpt2").save_pretrained(tmp_path)
    calm.compose(factories.base("llama"), tmp_path, 2, dtype=torch.bfloat16)
    for bases in ((factories.base("llama"), tmp_path), (tmp_path, tmp_path)):
        with pytest.raises(CalmError, match=r"^num_head=2: neither calm nor the loading"):
            calm.compose(*bases, 2, num_head=2)


def test_different_vocabularies_are_refused() -> None:
    config = factories.config("gpt2")
    config.vocab_size = 80
    with pytest.raises(calm.TokenizerMismatchError, match=r"LlamaForCausalLM.*64 tokens.*GPT2LMHeadModel.*80"):
        calm.compose(factories.base("llama"), AutoModelForCausalLM.from_config(config), 2)


def test_an_anchor_without_a_head_is_refused() -> None:
    model = factories.base("llama")
    for headless in (model.model, transformers.LlamaForSequenceClassification(factories.config("llama"))):
        with pytest.raises(UnsupportedModelError, match=r"no language-model head.*ForCausalLM"):
            calm.compose(headless, factories.base("gpt2"), 2)
    calm.compose(factories.base("gpt2"), model.model, 2)  # an augmenting model needs none


def test_a_composition_is_not_a_base(tmp_path: Path) -> None:
    model = small()
    model.save_pretrained(tmp_path)
    for composed in (model, tmp_path):
        with pytest.raises(UnsupportedModelError, match=r"anchor is itself a composed model"):
            calm.compose(composed, factories.base("gpt2"), 2)
        with pytest.raises(UnsupportedModelError, match=r"augmenting model is itself a composed model"):
            calm.compose(factories.base("gpt2"), composed, 2)


@pytest.mark.parametrize("name", ["", "a.b", "a b", "1", 3])
def test_names_that_no_module_can_have_are_refused(name: object) -> None:
    with pytest.raises(CalmError, match=r"name.*letters, digits and underscores"):
        calm.compose(factories.base("llama"), {name: factories.base("gpt2")}, 2)


@pytest.mark.parametrize("name", ["anchor", "composed"])
def test_names_that_mean_other_parts_are_refused(name: str) -> None:
    with pytest.raises(CalmError, match=f"name '{name}' means another part"):
        calm.compose(factories.base("llama"), {name: factories.base("gpt2")}, 2)


@pytest.mark.parametrize("name", ["keys", "items", "values", "pop", "forward", "training", "class"])
def test_names_that_modules_have_already(name: str) -> None:
    """Words that mean something else to a `ModuleDict` either work or are refused; they do not break later."""
    other = factories.base("gpt2")
    try:
        model = calm.compose(factories.base("llama"), {name: other}, 2)
    except CalmError as error:
        assert repr(name) in str(error)
    else:
        factories.perturb(model)
        assert model(IDS).logits.shape == (2, 9, factories.VOCAB)
        assert list(model.augmenting) == [name]


def test_no_augmenting_model_is_refused() -> None:
    with pytest.raises(CalmError, match="at least one"):
        calm.compose(factories.base("llama"), {}, 2)
