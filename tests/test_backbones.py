"""backbones.py: finding layers, cutting a base without changing what is left, refusing architectures."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import factories
import pytest
import torch
import transformers
from factories import assert_identical
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoModel,
    AutoModelForCausalLM,
    PreTrainedModel,
)

import calm
from calm import (
    CalmError,
    UnsupportedModelError,
    backbones,
    fingerprints,
    sources,
)
from calm.sources import Source

IDS = factories.tokens(2, 9)
ALL = sorted(factories.CONFIGS)


def layer_outputs(model: PreTrainedModel) -> list[Tensor]:
    """What each layer of a model puts out, through hooks that are taken off again."""
    outputs: list[Tensor] = []

    def record(module: nn.Module, args: tuple, output: object) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handles = [layer.register_forward_hook(record) for layer in backbones.layers_of(model)]
    with torch.no_grad():
        model(input_ids=IDS)
    for handle in handles:
        handle.remove()
    return outputs


# -- layers and cutting -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ALL)
def test_layers_are_the_decoders(architecture: str) -> None:
    model = factories.base(architecture)
    layers = backbones.layers_of(model)
    assert len(layers) == 4
    assert backbones.layers_of(backbones.decoder_of(model)) is layers
    outputs = layer_outputs(model)
    assert [output.shape for output in outputs] == [(2, 9, 32)] * 4
    assert all(not torch.equal(a, b) for a, b in itertools.pairwise(outputs))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("architecture", ALL)
def test_a_cut_model_computes_the_same(architecture: str, depth: int, tmp_path: Path) -> None:
    """Bit for bit what the whole model's first layers put out; loaded from disk it is the same again."""
    whole = factories.base(architecture).requires_grad_(False)  # torch chooses kernels by that too
    expected = layer_outputs(whole)
    cut = backbones.truncated(whole, depth)
    assert len(backbones.layers_of(cut)) == depth
    for found, layer in zip(layer_outputs(cut), expected, strict=False):
        assert_identical(found, layer)
    whole.save_pretrained(tmp_path)
    source = Source.parse(tmp_path)
    loaded = sources.load_augmenting(source, sources.load_config(source), depth)
    for found, layer in zip(layer_outputs(loaded), expected, strict=False):
        assert_identical(found, layer)
    assert fingerprints.fingerprint(loaded) == fingerprints.fingerprint(cut)
    assert not any(weight.requires_grad for weight in [*cut.parameters(), *loaded.parameters()])
    assert not any("lm_head" in name or "embed_out" in name for name, _ in loaded.named_parameters())


@pytest.mark.parametrize("architecture", ALL)
def test_cutting_shares_weights_and_changes_nothing(architecture: str) -> None:
    whole = factories.base(architecture).requires_grad_(False)
    before, names, config = factories.digests(whole), dict(whole.named_modules()).keys(), whole.config.to_dict()
    logits = whole(IDS).logits
    cut = backbones.truncated(whole, 2)
    owned = {id(weight) for weight in whole.parameters()}
    assert all(id(weight) in owned for weight in cut.parameters()), "weights were copied"
    assert {id(m) for m in cut.modules()}.isdisjoint({id(m) for m in whole.modules()}), "hooks would reach the original"
    assert factories.digests(whole) == before
    assert dict(whole.named_modules()).keys() == names
    assert whole.config.to_dict() == config
    assert_identical(whole(IDS).logits, logits)


def test_a_cut_configuration_is_cut_everywhere() -> None:
    config = factories.config("gemma3_text")
    backbones.truncate_config(config, 3)
    assert config.num_hidden_layers == len(config.layer_types) == 3


def test_no_unique_list_of_layers_is_refused() -> None:
    model = factories.base("llama")
    del model.model.layers[3]
    with pytest.raises(UnsupportedModelError, match=r"LlamaForCausalLM.*found 0 lists of 4 layers"):
        backbones.layers_of(model)


# -- contexts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", factories.CONFIGS)
def test_the_context_that_a_configuration_states(architecture: str) -> None:
    expected = {
        "falcon": 2048,
        "gpt_oss": 131_072,  # YaRN by default
        "bloom": None,  # ALiBi states none, nor does recurrence
        "mamba": None,
    }.get(architecture, factories.CONTEXT)
    assert backbones.context_of(factories.config(architecture)) == expected


@pytest.mark.parametrize(
    ("scaling", "context"),
    [
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
            256,
        ),  # as Qwen2.5's card advises
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),  # scaled length stated
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "default"}, 64),
        # Llama 3 states the length that is meant, which its factor would exceed
        (
            {
                "rope_type": "llama3",
                "factor": 32.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            },
            64,
        ),
    ],
)
def test_scaled_positions_reach_further(scaling: dict, context: int) -> None:
    """And the composition as far as the anchor does by itself."""
    config = factories.config("qwen2")
    config.rope_parameters = {"rope_theta": 10_000.0, **scaling}
    config.standardize_rope_params()
    assert backbones.context_of(config) == context
    torch.manual_seed(0)
    anchor = AutoModelForCausalLM.from_config(config).eval()
    model = calm.compose(anchor, factories.base("mamba"), 1)
    assert model.context_length == context
    ids = factories.tokens(1, context)
    with torch.no_grad():
        found = model(ids).logits
        assert_identical(found, anchor(ids).logits)
    with pytest.raises(CalmError, match=rf"{context + 1} tokens do not fit: the context of the anchor is {context}"):
        model(factories.tokens(1, context + 1))


def test_scaling_by_kind_of_layer_is_part_of_the_context() -> None:
    config = factories.config("gemma3_text")
    config.rope_parameters["full_attention"] = {"rope_type": "linear", "factor": 8.0, "rope_theta": 10_000.0}
    assert backbones.context_of(config) == factories.CONTEXT


def test_positions_that_start_after_the_padding_token_are_fewer() -> None:
    small = {"vocab_size": factories.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.RobertaConfig(**small, intermediate_size=16, max_position_embeddings=34, is_decoder=True)
    assert config.pad_token_id == 1
    model = calm.compose(factories.base("llama"), AutoModelForCausalLM.from_config(config).eval(), 1)
    assert model.context_length == 32
    model(factories.tokens(1, 32))
    with pytest.raises(
        CalmError, match=r"33 tokens do not fit: the context of the augmenting model 'augmenting' is 32"
    ):
        model(factories.tokens(1, 33))


def test_the_smallest_context_and_whose_it_is() -> None:
    short, long, none = (factories.config(name) for name in ("llama", "falcon", "mamba"))
    assert backbones.smallest_context(long, {"a": none, "b": short}) == (64, "the augmenting model 'b'")
    assert backbones.smallest_context(short, {"a": long}) == (64, "the anchor")
    assert backbones.smallest_context(none, {"a": none}) == (None, "")


# -- what cannot be composed ------------------------------------------------------------------------------------------


def refuse(config: transformers.PreTrainedConfig, auto_class: type, *words: str) -> None:
    model = auto_class.from_config(config)
    for anchor, augmenting, role in (
        (model, factories.base("llama"), "anchor"),
        (factories.base("llama"), model, "augm"),
    ):
        with pytest.raises(UnsupportedModelError) as error:
            calm.compose(anchor, augmenting, 1)
        assert role in str(error.value) and all(word in str(error.value) for word in words), str(error.value)


def test_encoders_and_encoder_decoders_are_refused_by_name() -> None:
    small = {"vocab_size": factories.VOCAB, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    bert = transformers.BertConfig(**small, intermediate_size=16, max_position_embeddings=32)
    refuse(bert, AutoModel, "'bert'", "both directions")
    refuse(bert, AutoModelForCausalLM, "'bert'", "both directions")
    t5 = transformers.T5Config(vocab_size=factories.VOCAB, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    refuse(t5, AutoModel, "'t5'", "encoder-decoder")
    bart = transformers.BartConfig(
        vocab_size=factories.VOCAB,
        d_model=16,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=16,
        decoder_ffn_dim=16,
    )
    refuse(bart, AutoModel, "'bart'", "encoder-decoder")


def test_a_causal_bert_is_composed() -> None:
    config = transformers.BertConfig(
        vocab_size=factories.VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        is_decoder=True,
    )
    model = factories.perturb(calm.compose(factories.base("llama"), AutoModelForCausalLM.from_config(config).eval(), 1))
    changed = IDS.clone()
    changed[:, 6] = 2 + (IDS[:, 6] - 1) % 60
    with torch.no_grad():
        assert_identical(model(changed).logits[:, :6], model(IDS).logits[:, :6])


class OwnConfig(transformers.LlamaConfig):
    model_type = "own-architecture"


class OwnForCausalLM(transformers.LlamaForCausalLM):
    config_class = OwnConfig


def test_an_architecture_with_code_of_its_own_is_refused_until_it_is_registered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A saved composition names the architecture, and the code would not be there when it is loaded."""
    own = OwnForCausalLM(OwnConfig(**factories.config("llama").to_dict() | {"model_type": "own-architecture"})).eval()
    remote = tmp_path / "remote"
    own.save_pretrained(remote)
    (remote / "own.py").write_text(
        "import transformers\nclass OwnConfig(transformers.LlamaConfig):\n    model_type = 'own-architecture'\n"
    )
    values = json.loads((remote / "config.json").read_text())
    values["auto_map"] = {"AutoConfig": "own.OwnConfig"}
    (remote / "config.json").write_text(json.dumps(values))
    for base, kwargs in ((own, {}), (remote, {"trust_remote_code": True})):
        for bases in ((base, factories.base("gpt2")), (factories.base("gpt2"), base)):
            with pytest.raises(UnsupportedModelError, match=r"'own-architecture'.*trust_remote_code.*register"):
                calm.compose(*bases, 2, **kwargs)

    # what AutoConfig.register and AutoModelForCausalLM.register do, undone after the test
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "own-architecture", OwnConfig)
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, OwnConfig, OwnForCausalLM)
    own.save_pretrained(tmp_path / "own")
    model = factories.perturb(calm.compose(tmp_path / "own", factories.base("gpt2"), 2))
    model.save_pretrained(tmp_path / "out")
    loaded = calm.CalmForCausalLM.from_pretrained(tmp_path / "out", augmenting=factories.base("gpt2"))
    with torch.no_grad():
        assert_identical(loaded(IDS).logits, model(IDS).logits)


def test_unsupported_names_are_refused_from_their_configuration_alone(tmp_path: Path) -> None:
    """No weights on disk: whatever is refused is refused before anything is loaded."""
    transformers.T5Config(vocab_size=factories.VOCAB).save_pretrained(tmp_path)
    factories.base("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match=r"anchor.*'t5'.*encoder-decoder"):
        calm.compose(tmp_path, tmp_path / "llama", 1)
    with pytest.raises(UnsupportedModelError, match=r"augmenting model.*'t5'.*encoder-decoder"):
        calm.compose(tmp_path / "llama", tmp_path, 1)


def test_what_is_neither_a_model_nor_a_name() -> None:
    with pytest.raises(CalmError, match=r"anchor is a int.*expected a transformers model"):
        calm.compose(3, factories.base("gpt2"))
    with pytest.raises(CalmError, match=r"augmenting model is a Linear"):
        calm.compose(factories.base("gpt2"), nn.Linear(2, 2))
