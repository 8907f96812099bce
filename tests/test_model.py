"""model.py: a composed model against plain recomputation, and as the transformers model that it is to everyone else."""

from __future__ import annotations

import copy
import threading
import weakref
from pathlib import Path
from typing import Any

import factories
import numpy as np
import pytest
import torch
from factories import Mix, assert_identical, assert_same
from test_attention import formula
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerFast, TextIteratorStreamer, pipeline

import calm
from calm import CalmError, backbones

IDS = factories.tokens(2, 10)


def capture(model: torch.nn.Module, layer: int, ids: Tensor, **kwargs: Any) -> Tensor:
    """What a layer of a bare model puts out."""
    found = []
    handle = backbones.layers_of(model)[layer].register_forward_hook(lambda module, args, output: found.append(output))
    with torch.no_grad():
        model(input_ids=ids, **kwargs)
    handle.remove()
    return found[0][0] if isinstance(found[0], tuple) else found[0]


# -- one forward pass -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["paper", "normalized", "gated"])
@pytest.mark.parametrize("augmenting", ["gpt2", "gemma3_text", "falcon", "mamba"])
def test_recomputed_from_bare_models(attention: str, augmenting: str) -> None:
    """The paper's equation end to end: untouched bases, the formula in numpy, the anchor's own norm and head.

    A connection at layer 1 and one at the last: the second asks with what the first has changed.
    """
    mix = Mix(augmenting=(augmenting,), connections=(((0, 1), (2, 3)),), attention=attention)
    model, anchor, (other,) = mix.shared(), mix.anchor_model(), mix.augmenting_models().values()

    def inject(index: int, layer: int) -> Any:
        context = capture(other, layer, IDS)

        def hook(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
            connection = model.connections[index]
            added = [formula(connection, output[row], context[row], 4, attention) for row in range(2)]
            return output + torch.from_numpy(np.stack(added)).float()

        return hook

    anchor.model.layers[1].register_forward_hook(inject(0, 0))
    anchor.model.layers[3].register_forward_hook(inject(1, 2))
    with torch.no_grad():
        assert_same(model(IDS).logits, anchor(IDS).logits, 1e-4)
        assert (model(IDS).logits - mix.anchor_model()(IDS).logits).abs().max() > 0.1


@pytest.mark.parametrize("heads", [1, 2, 16])
def test_number_of_heads(heads: int) -> None:
    model = Mix(num_heads=heads, connections=(((3, 3),),)).shared()
    mix = Mix()
    hidden = capture(mix.anchor_model(), 3, IDS)
    context = capture(mix.augmenting_models()["m0"], 3, IDS)
    inputs = []
    handle = model.anchor.model.norm.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(IDS)
    handle.remove()
    expected = formula(model.connections[0], hidden[0], context[0], heads, "gated")
    np.testing.assert_allclose((inputs[0] - hidden)[0].detach().numpy(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("anchor", ["llama", "gemma3_text", "gpt2", "bloom", "opt"])
@pytest.mark.parametrize("attend", ["causal", "prompt"])
def test_the_loss_is_that_of_the_logits(anchor: str, attend: str) -> None:
    model = Mix(anchor=anchor, attend=attend).shared()
    labels = IDS.clone()
    labels[0, :4], labels[1, :7] = -100, -100
    output = model(IDS, labels=labels)
    logits = model(IDS, prompt_length=torch.tensor([4, 7])).logits
    assert_same(output.logits, logits)
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert_same(output.loss, expected)


def test_tokens_in_a_batch_count() -> None:
    """`num_items_in_batch`, as a trainer with gradient accumulation passes it, reaches the anchor's loss."""
    model = Mix().shared()
    assert model.accepts_loss_kwargs
    mean = model(IDS, labels=IDS).loss
    assert_same(model(IDS, labels=IDS, num_items_in_batch=36).loss, mean / 2)


def test_outputs_that_are_asked_for() -> None:
    model = Mix().shared()
    whole = model(IDS)
    assert_same(model(IDS, logits_to_keep=3).logits, whole.logits[:, -3:])
    assert len(model(IDS, output_hidden_states=True).hidden_states) == 5
    plain = model(IDS, return_dict=False)
    assert isinstance(plain, tuple) and torch.equal(plain[0], whole.logits)
    assert isinstance(whole.past_key_values, calm.CalmCache)
    assert model(IDS, use_cache=False).past_key_values is None
    model.train()
    assert model(IDS).past_key_values is None
    model.eval()


@pytest.mark.parametrize("anchor", ["llama", "gemma3_text", "qwen3", "mistral", "gpt2", "mixtral"])
@pytest.mark.parametrize("attention", ["paper", "normalized", "gated"])
def test_packed_rows(anchor: str, attention: str) -> None:
    """Documents one after another in a row, positions that restart, no mask: each has the logits it has alone."""
    model = Mix(anchor=anchor, augmenting=("llama", "gemma2"), attention=attention).shared()
    documents = [factories.tokens(1, n, seed=n) for n in (5, 1, 7, 3)]
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    with torch.no_grad():
        packed = model(torch.cat(documents, 1), position_ids=positions, use_cache=False).logits
        alone = torch.cat([model(document).logits for document in documents], 1)
        assert_same(packed, alone)
        connected = model(torch.cat(documents, 1), use_cache=False).logits
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(connected, alone)  # negative control: as one document


def test_packed_rows_in_training() -> None:
    """A trainer packs in training mode, where there is no cache."""
    model = Mix(augmenting=("llama",)).build().train()
    documents = [factories.tokens(1, n, seed=n) for n in (5, 7)]
    ids, positions = torch.cat(documents, 1), torch.cat([torch.arange(5), torch.arange(7)])[None]
    labels = ids.clone()
    labels[0, 5] = -100
    packed = model(ids, position_ids=positions, labels=labels).loss
    alone = sum(model(d, labels=d).loss * (d.shape[1] - 1) for d in documents) / 10
    assert_same(packed, alone)


@pytest.mark.parametrize("attend", ["causal", "prompt"])
@pytest.mark.parametrize("augmenting", [("gpt2", "gemma3_text"), ("mamba",), ("falcon", "llama")])
def test_kept_outputs_stand_for_the_augmenting_models(augmenting: tuple[str, ...], attend: str) -> None:
    """The same logits, loss and gradients, also from a composition that has no augmenting models (any more)."""
    model = Mix(augmenting=augmenting, attend=attend).build()
    ids, mask, _ = factories.padded([*factories.tokens(1, 9), *factories.tokens(1, 6)], "right")
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :3] = -100

    def losses_and_gradients(**kwargs: Any) -> list[Tensor]:
        output = model(ids, attention_mask=mask, labels=labels, **kwargs)
        gradients = torch.autograd.grad(output.loss, list(model.connections.parameters()))
        return [output.loss, output.logits, *gradients]

    expected = losses_and_gradients()
    kept = model.augmenting_outputs(ids, mask)
    assert not any(output.requires_grad for output in kept.values())
    for found, wanted in zip(losses_and_gradients(augmenting_outputs=kept), expected, strict=True):
        assert_identical(found, wanted)
    shifted = {key: output.roll(1, 1) for key, output in kept.items()}  # negative control
    with pytest.raises(AssertionError, match="differs by"):
        assert_same(losses_and_gradients(augmenting_outputs=shifted)[0], expected[0])
    model.release_augmenting()
    for found, wanted in zip(losses_and_gradients(augmenting_outputs=kept), expected, strict=True):
        assert_identical(found, wanted)
    with pytest.raises(CalmError, match=r"\['m0'.*were not loaded: pass their augmenting_outputs"):
        model(ids)


@pytest.mark.parametrize("anchor", ["llama", "gpt2", "gemma3_text"])
def test_hidden_states_hold_what_connections_add_whatever_the_anchor_did_before(anchor: str) -> None:
    """Asked once for its hidden states, a model records them with hooks that stay, and were there before ours."""
    asked, fresh = factories.base(anchor), factories.base(anchor)
    alone = asked(IDS, output_hidden_states=True).hidden_states
    models = []
    for base in (asked, fresh):
        torch.manual_seed(0)
        models.append(factories.perturb(calm.compose(base, factories.base("opt"), [(0, 1), (2, 2)])))
    found, expected = (model(IDS, output_hidden_states=True).hidden_states for model in models)
    assert len(found) == len(expected) == len(alone)
    for state, wanted in zip(found, expected, strict=True):
        factories.assert_identical(state, wanted)
    assert [torch.equal(state, before) for state, before in zip(found, alone, strict=True)] == [True] * 2 + [False] * 3


def test_what_cannot_work_says_so() -> None:
    model = Mix().shared()
    for name in ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager"):
        with pytest.raises(CalmError, match=r"continuous batching.*generate\(\).*vLLM"):
            getattr(model, name)([[3, 4]])
    for given in ({"assistant_early_exit": 2}, {"generation_config": GenerationConfig(assistant_early_exit=2)}):
        with pytest.raises(CalmError, match=r"assistant_early_exit=2.*assistant_model="):
            model.generate(IDS[:1], max_new_tokens=4, **given)


# -- pipelines and streams --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    return factories.word_tokenizer()


def test_pipeline(words: PreTrainedTokenizerFast) -> None:
    """In batches, of prompts of different lengths; each as alone."""
    model = Mix(augmenting=("gpt2", "mamba")).build()
    generator = pipeline("text-generation", model=model, tokenizer=words, device="cpu")
    prompts = ["w5 w9 w33 w7", "w8", "w20 w21 w22 w23 w24 w25 w26"]
    settings = {"max_new_tokens": 5, "do_sample": False, "return_full_text": False}
    batched = [row[0]["generated_text"] for row in generator(prompts, batch_size=3, **settings)]
    single = [generator(prompt, **settings)[0]["generated_text"] for prompt in prompts]
    assert batched == single
    ids = words(prompts[0], return_tensors="pt", return_token_type_ids=False)
    expected = words.decode(model.generate(**ids, max_new_tokens=5, do_sample=False)[0, 4:], skip_special_tokens=True)
    assert single[0].strip() == expected.strip() and len(set(single)) == 3


def test_pipeline_from_a_folder(words: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    torch.manual_seed(0)  # some weights write <eos>, which a pipeline leaves out
    factories.base("llama").save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    model = factories.perturb(calm.compose(tmp_path / "base", tmp_path / "base", 2))
    model.save_pretrained(tmp_path / "out")
    words.save_pretrained(tmp_path / "out")
    generator = pipeline("text-generation", model=str(tmp_path / "out"), device="cpu")
    assert isinstance(generator.model, calm.CalmForCausalLM)
    text = generator("w5 w9 w33", min_new_tokens=3, max_new_tokens=3, do_sample=False)[0]["generated_text"]
    ids = words("w5 w9 w33", return_tensors="pt", return_token_type_ids=False)
    new = words.decode(model.generate(**ids, min_new_tokens=3, max_new_tokens=3, do_sample=False)[0, 3:])
    assert text.endswith(new) and len(new.split()) == 3


def test_streaming(words: PreTrainedTokenizerFast) -> None:
    model = Mix().shared()
    streamer = TextIteratorStreamer(words, skip_prompt=True, timeout=60)
    kwargs = {"max_new_tokens": 6, "do_sample": False}
    thread = threading.Thread(target=model.generate, args=(IDS[:1],), kwargs=kwargs | {"streamer": streamer})
    thread.start()
    pieces = list(streamer)
    thread.join()
    expected = words.decode(model.generate(IDS[:1], **kwargs)[0, 10:])
    assert "".join(pieces).split() == expected.split()
    assert len([piece for piece in pieces if piece]) > 1


# -- torch.compile ----------------------------------------------------------------------------------------------------


def mostly_slow(first: int, *cases: tuple) -> list:
    """Compiling takes seconds: the first cases run always, the others with the slow tests."""
    return [pytest.param(*case, marks=() if i < first else pytest.mark.slow) for i, case in enumerate(cases)]


SMALL = {"connections": 1, "anchor_shape": (24, 2, 2), "augmenting_shapes": ((16, 2, 4),)}


@pytest.mark.parametrize(
    "mix",
    mostly_slow(
        1,
        (Mix("gpt2", attend="prompt", **SMALL),),
        *(
            (Mix(anchor, ("llama", "gemma3_text"), attend=attend),)
            for anchor, attend in (
                ("gemma3_text", "prompt"),
                ("llama", "causal"),
                ("gpt2", "causal"),
                ("gpt2", "prompt"),
                ("qwen3", "causal"),
            )
        ),
    ),
    ids=lambda mix: f"{mix.anchor}-{mix.attend}-{len(mix.augmenting)}",
)
def test_compiled_without_a_break(mix: Mix) -> None:
    torch._dynamo.reset()
    model = mix.build()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        for kwargs in ({}, {"attention_mask": mask, "position_ids": positions}):
            kwargs |= {"use_cache": False, "prompt_length": 5}
            assert_same(compiled(IDS, **kwargs).logits, model(IDS, **kwargs).logits)


def test_compiled_training_step() -> None:
    torch._dynamo.reset()
    model = Mix(augmenting=("llama",)).build().train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    grads = []
    for run in (model, compiled):
        loss = run(IDS, labels=IDS).loss
        loss.backward()
        grads.append([loss.detach(), *(p.grad for p in model.connections.parameters())])
        model.zero_grad()
    for found, expected in zip(*reversed(grads), strict=True):
        assert_same(found, expected)


@pytest.mark.parametrize(
    ("anchor", "attend", "padding"),
    mostly_slow(
        1,
        ("llama", "causal", 3),
        ("llama", "prompt", 3),
        ("llama", "causal", 0),
        ("gemma3_text", "causal", 3),
        ("gemma3_text", "prompt", 0),
        ("bloom", "causal", 3),
        ("bloom", "prompt", 0),
    ),
)
def test_compiled_decoding_compiles_twice(anchor: str, attend: str, padding: int) -> None:
    """With a static cache: one graph for the prompt and one for every further token, whatever the padding."""
    torch._dynamo.reset()
    model = Mix(anchor=anchor, augmenting=("llama", "bloom"), attend=attend).build()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list) -> Any:
        graphs.append(graph)
        return graph.forward

    ids, mask, _ = factories.padded([IDS[0], IDS[1, padding:]], "left")
    kwargs = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "output_logits": True}
    kwargs |= {"return_dict_in_generate": True}
    expected = model.generate(ids, **kwargs)
    model.forward = torch.compile(model.forward, fullgraph=True, backend=count)
    found = model.generate(ids, cache_implementation="static", disable_compile=True, **kwargs)
    for step, expected_step in zip(found.logits, expected.logits, strict=True):
        assert_same(step, expected_step)
    assert len(graphs) == 2


# -- being looked at and moved ----------------------------------------------------------------------------------------


def test_built_from_its_configuration_alone() -> None:
    """Random weights, the right shapes; on the meta device no memory: what planning and engines do."""
    model = Mix(anchor="gemma3_text", augmenting=("gpt2", "mamba"), attention="paper").build()
    config = copy.deepcopy(model.config)
    shapes = {name: weight.shape for name, weight in model.state_dict().items()}
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    assert {name: weight.shape for name, weight in empty.state_dict().items()} == shapes
    random = calm.CalmForCausalLM(copy.deepcopy(model.config)).eval()
    assert {name: weight.shape for name, weight in random.state_dict().items()} == shapes
    assert random(IDS).logits.isfinite().all()


def test_configurations_of_the_bases_are_not_touched() -> None:
    """Known trap: a live configuration inside another one loses its attention implementation."""
    anchor, other = factories.base("gemma2"), factories.base("llama")
    anchor.set_attn_implementation("eager")
    before = [model.config._attn_implementation for model in (anchor, other)]
    assert before == ["eager", "sdpa"]
    model = calm.compose(anchor, other, 2)
    assert [m.config._attn_implementation for m in (anchor, other)] == before
    assert model.augmenting["augmenting"].config._attn_implementation == "sdpa"
    assert model.anchor.config is anchor.config
    changed = IDS.clone()
    changed[:, 5] = 2 + (IDS[:, 5] - 1) % 60
    assert_identical(anchor(changed).logits[:, :5], anchor(IDS).logits[:, :5])


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_implementations_of_the_bases(implementation: str) -> None:
    mix = Mix(anchor="llama", augmenting=("gemma3_text",))
    expected = mix.shared()(IDS).logits
    anchor, (other,) = mix.anchor_model(), mix.augmenting_models().values()
    for base in (anchor, other):
        base.set_attn_implementation(implementation)
    model = calm.compose(anchor, {"m0": other}, mix.connections)
    model.connections.load_state_dict(mix.shared().connections.state_dict())
    assert_same(model(IDS).logits, expected)


def test_state_dict_round_trip() -> None:
    """The names of the bases' weights are their own, after a prefix."""
    mix = Mix(augmenting=("gpt2", "mamba"))
    model = mix.build()
    names = set(model.state_dict())
    assert {f"anchor.{name}" for name in mix.anchor_model().state_dict()} <= names
    other = mix.fresh()
    other.load_state_dict(model.state_dict())
    assert_identical(other(IDS).logits, model(IDS).logits)


def test_a_composition_that_is_thrown_away_is_gone() -> None:
    """With its bases: nothing outside holds it."""
    model = Mix().build()
    model.generate(IDS, max_new_tokens=2)
    gone = weakref.ref(model)
    del model
    import gc

    gc.collect()
    assert gone() is None
