"""backbones.py: finding layers, cutting a base without changing what is left, telling bases apart, refusing others."""

from __future__ import annotations

import itertools
from pathlib import Path

import factories
import numpy as np
import pytest
import torch
import transformers
from factories import assert_identical
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel

import calm
from calm import CalmError, CheckpointError, TokenizerMismatchError, UnsupportedModelError, backbones
from calm.backbones import Source

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
    loaded = backbones.load_augmenting(source, backbones.load_config(source), depth)
    for found, layer in zip(layer_outputs(loaded), expected, strict=False):
        assert_identical(found, layer)
    assert backbones.fingerprint(loaded) == backbones.fingerprint(cut)
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


def test_unsupported_names_are_refused_from_their_configuration_alone(tmp_path: Path) -> None:
    """No weights on disk: whatever is refused is refused before anything is loaded."""
    transformers.T5Config(vocab_size=factories.VOCAB).save_pretrained(tmp_path)
    factories.base("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(UnsupportedModelError, match=r"anchor.*'t5'.*encoder-decoder"):
        calm.compose(tmp_path, tmp_path / "llama", 1)
    with pytest.raises(UnsupportedModelError, match=r"augmenting model.*'t5'.*encoder-decoder"):
        calm.compose(tmp_path / "llama", tmp_path, 1)


# -- names ------------------------------------------------------------------------------------------------------------


def test_names_folders_and_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    assert Source.parse("gpt2") == Source("gpt2")
    assert Source.parse("owner/name", "main") == Source("owner/name", None, "main")
    assert Source.parse(tmp_path) == Source(str(tmp_path))
    assert Source.parse(tmp_path / "a.gguf") == Source(str(tmp_path), "a.gguf")
    assert Source.parse("owner/name/model-q8.gguf") == Source("owner/name", "model-q8.gguf")
    assert Source("a", "b.gguf", "c").arguments() == {"gguf_file": "b.gguf", "revision": "c"}
    for wrong in ("./no", "/no/such/folder", "~/no", "a/b/c", str(tmp_path / "b.gguf"), "b.gguf", "./o/n/b.gguf"):
        with pytest.raises(CheckpointError, match="no such"):
            Source.parse(wrong)


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No usable configuration"):
        calm.compose(tmp_path, tmp_path, 1)
    (tmp_path / "config.json").write_text('{"model_type": "llama99"}')
    with pytest.raises(CheckpointError, match="llama99"):
        calm.compose(tmp_path, tmp_path, 1)


def write_gguf(path: Path, width: int = 32, layers: int = 3, seed: int = 0) -> Path:
    """A tiny llama as a GGUF file."""
    gguf = pytest.importorskip("gguf")
    numbers = np.random.default_rng(seed)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(factories.CONTEXT)
    writer.add_embedding_length(width)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(2 * width)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(width // 4)
    writer.add_vocab_size(factories.VOCAB)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"w{i}" for i in range(factories.VOCAB)])
    writer.add_token_merges([])

    def add(name: str, *shape: int) -> None:
        scale = 1 if len(shape) == 1 else shape[1] ** -0.5
        weight = numbers.standard_normal(shape) * scale if len(shape) == 2 else np.ones(shape)
        writer.add_tensor(name, weight.astype(np.float32))

    add("token_embd.weight", factories.VOCAB, width)
    add("output_norm.weight", width)
    add("output.weight", factories.VOCAB, width)
    for i in range(layers):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"blk.{i}.{name}.weight", width, width)
        for name in ("ffn_gate", "ffn_up"):
            add(f"blk.{i}.{name}.weight", 2 * width, width)
        add(f"blk.{i}.ffn_down.weight", width, 2 * width)
        add(f"blk.{i}.attn_norm.weight", width)
        add(f"blk.{i}.ffn_norm.weight", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_gguf_files(tmp_path: Path) -> None:
    """Composed, saved and loaded again; the augmenting model is cut."""
    anchor, augmenting = write_gguf(tmp_path / "a.gguf"), write_gguf(tmp_path / "b.gguf", 16, 2, seed=1)
    model = calm.compose(anchor, augmenting, [(0, 1)])
    assert len(backbones.layers_of(model.augmenting["augmenting"])) == 1
    bare = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf").requires_grad_(False).eval()
    assert_identical(model(IDS).logits, bare(IDS).logits)
    factories.perturb(model)
    model.save_pretrained(tmp_path / "out")
    loaded = calm.CalmForCausalLM.from_pretrained(tmp_path / "out")
    assert_identical(loaded(IDS).logits, model(IDS).logits)
    write_gguf(tmp_path / "a.gguf", seed=5)
    with pytest.raises(CheckpointError, match=r"the anchor.*trained against"):
        calm.CalmForCausalLM.from_pretrained(tmp_path / "out")


# -- weights ----------------------------------------------------------------------------------------------------------


def test_a_base_with_nan_is_refused(tmp_path: Path) -> None:
    for value in (float("nan"), float("inf")):
        damaged = factories.base("llama")
        damaged.model.layers[1].mlp.up_proj.weight.data[3, 3] = value
        for models in ((damaged, factories.base("gpt2")), (factories.base("gpt2"), damaged)):
            with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN or infinite"):
                calm.compose(*models, 2)
        damaged.save_pretrained(tmp_path)
        with pytest.raises(CheckpointError, match=r"NaN or infinite"):
            calm.compose(tmp_path, factories.base("gpt2"), 2)


def test_nan_where_nothing_is_read_does_not_matter() -> None:
    damaged = factories.base("llama")
    damaged.model.layers[3].mlp.up_proj.weight.data[3, 3] = float("nan")
    calm.compose(factories.base("gpt2"), damaged, [(2, 3)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fingerprints_hold_in_lower_precision(dtype: torch.dtype) -> None:
    recorded = backbones.fingerprint(factories.base("llama"))
    assert len(set(recorded.values())) == 3
    model = factories.base("llama").to(dtype)
    backbones.check_fingerprint(model, recorded, "it")
    model.model.norm.float()  # mixed, as quantizing and some loaders leave it
    if dtype != torch.float32:
        model.model.norm.weight.data = model.model.norm.weight.data.to(torch.float32)
    backbones.check_fingerprint(model, recorded, "it")
    model.lm_head.weight.data[5, 5] += 0.5
    with pytest.raises(CheckpointError, match=r"it are not those.*verify_bases=False"):
        backbones.check_fingerprint(model, recorded, "it")


def test_a_bfloat16_base_loaded_in_float32_is_the_same_base() -> None:
    recorded = backbones.fingerprint(factories.base("llama").bfloat16())
    backbones.check_fingerprint(factories.base("llama").bfloat16().float(), recorded, "it")
    with pytest.raises(CheckpointError):
        backbones.check_fingerprint(factories.base("llama"), recorded, "it")


def test_quantized_weights_have_one_fingerprint() -> None:
    model = nn.Linear(4, 4)
    model.weight = nn.Parameter(torch.arange(16, dtype=torch.int8).view(4, 4), requires_grad=False)
    recorded = backbones.fingerprint(model)
    assert list(recorded) == ["stored"]
    backbones.check_fingerprint(model, recorded, "it")
    model.weight.data[0, 0] += 1
    with pytest.raises(CheckpointError):
        backbones.check_fingerprint(model, recorded, "it")


def test_weights_that_are_not_there_have_no_fingerprint() -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 4)
    assert backbones.fingerprint(model) == {}
    backbones.check_fingerprint(model, {"float32": "x"}, "it")


# -- tokenizers -------------------------------------------------------------------------------------------------------


def save(folder: Path, architecture: str, tokenizer: object = None, vocab: int = factories.VOCAB) -> Path:
    config = factories.config(architecture)
    config.vocab_size = vocab
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def test_tokenizers_on_disk(tmp_path: Path) -> None:
    words, others = factories.word_tokenizer(), factories.word_tokenizer(prefix="v")
    anchor, same = save(tmp_path / "a", "llama", words), save(tmp_path / "b", "gpt2", words)
    calm.compose(anchor, same, 2)
    different = save(tmp_path / "c", "gpt2", others)
    with pytest.raises(TokenizerMismatchError) as error:
        calm.compose(anchor, different, 2)
    assert all(
        word in str(error.value) for word in (str(anchor), str(different), "64 tokens", "2 tokens have the same")
    )


def test_a_padded_embedding_with_one_tokenizer(tmp_path: Path) -> None:
    """The vocabulary size in the configuration is that of the embedding: tokenizers decide where they are known."""
    words = factories.word_tokenizer(60)
    anchor, padded = save(tmp_path / "a", "llama", words), save(tmp_path / "b", "gpt2", words, vocab=72)
    calm.compose(anchor, padded, 2)
    loaded = [AutoModelForCausalLM.from_pretrained(path) for path in (anchor, padded)]
    with pytest.raises(TokenizerMismatchError, match=r"64 tokens.*72.*anchor_tokenizer="):
        calm.compose(*loaded, 2)
    calm.compose(*loaded, 2, anchor_tokenizer=words, augmenting_tokenizer=words)
    calm.compose(loaded[0], {"m": loaded[1]}, 2, anchor_tokenizer=words, augmenting_tokenizer={"m": words})
    with pytest.raises(TokenizerMismatchError):
        calm.compose(*loaded, 2, anchor_tokenizer=words, augmenting_tokenizer=factories.word_tokenizer(60, prefix="v"))


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "qwen2", "mamba"])
def test_a_folder_without_a_tokenizer_has_none(architecture: str, tmp_path: Path) -> None:
    """There transformers makes up an empty one: two of them would be equal whatever the vocabularies are."""
    anchor, larger = save(tmp_path / "a", architecture), save(tmp_path / "b", architecture, vocab=72)
    assert backbones.load_tokenizer(Source.parse(anchor)) is None
    if architecture == "mamba":
        return
    calm.compose(anchor, save(tmp_path / "c", "llama"), 2)
    with pytest.raises(TokenizerMismatchError, match=r"64 tokens.*72"):
        calm.compose(anchor, larger, 2)


def test_what_is_neither_a_model_nor_a_name() -> None:
    with pytest.raises(CalmError, match=r"anchor is a int.*expected a transformers model"):
        calm.compose(3, factories.base("gpt2"))
    with pytest.raises(CalmError, match=r"augmenting model is a Linear"):
        calm.compose(factories.base("gpt2"), nn.Linear(2, 2))
