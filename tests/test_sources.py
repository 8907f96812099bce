"""sources.py: names, folders and GGUF files, and the tokenizers beside them."""

from __future__ import annotations

from pathlib import Path

import factories
import numpy as np
import pytest
import torch
from factories import assert_identical, assert_same
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, modeling_gguf_pytorch_utils

import calm
from calm import (
    CalmError,
    CheckpointError,
    TokenizerMismatchError,
    backbones,
    sources,
)
from calm.sources import Source

IDS = factories.tokens(2, 9)


def test_names_folders_and_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"")
    assert Source.parse("gpt2") == Source("gpt2")
    assert Source.parse("owner/name", "main") == Source("owner/name", None, "main")
    assert Source.parse(tmp_path) == Source(str(tmp_path))
    assert Source.parse(tmp_path / "a.gguf") == Source(str(tmp_path), "a.gguf")
    assert Source.parse("owner/name/model-q8.gguf") == Source("owner/name", "model-q8.gguf")
    assert Source.parse("owner/name@v2", "main") == Source("owner/name", None, "v2")
    assert Source.parse("owner/name/model-q8.gguf@v2") == Source("owner/name", "model-q8.gguf", "v2")
    (tmp_path / "b@v2").mkdir()
    assert Source.parse(tmp_path / "b@v2") == Source(str(tmp_path / "b@v2"))
    assert Source("a", "b.gguf", "c").arguments() == {"gguf_file": "b.gguf", "revision": "c"}
    for wrong in (
        "./no",
        "/no/such/folder",
        "~/no",
        "a/b/c",
        str(tmp_path / "b.gguf"),
        "b.gguf",
        "./o/n/b.gguf",
        "/o/b.gguf",
    ):
        with pytest.raises(CheckpointError, match="no such"):
            Source.parse(wrong)


def test_arguments_that_nobody_knows(tmp_path: Path) -> None:
    """Whoever slips in a name is told of that, and not of a model that cannot be loaded."""
    folder = save(tmp_path / "a", "llama", factories.word_tokenizer())
    with pytest.raises(CalmError, match=r"^num_head=4: neither calm nor the loading of .* takes"):
        calm.compose(folder, folder, 1, num_head=4)
    calm.compose(folder, folder, 1).save_pretrained(tmp_path / "out")
    with pytest.raises(CalmError, match=r"^verify=False: neither calm"):
        calm.CalmForCausalLM.from_pretrained(tmp_path / "out", verify=False)
    for name in ("source", "depth", "role", "output_loading_info"):  # what functions within are given
        with pytest.raises(CalmError, match=f"^{name}=1: neither calm"):
            calm.compose(folder, folder, 1, **{name: 1})


def test_names_that_are_no_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for load in (calm.CalmForCausalLM.from_pretrained, lambda name: calm.compose(name, name, 1)):
        with pytest.raises(CheckpointError, match=r"'\./nope'.* no such folder"):
            load("./nope")
        with pytest.raises(CheckpointError, match=r"'m/nope' \(a name on a hub, since there is no such folder in /"):
            load("m/nope")


def test_a_folder_without_a_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="No usable configuration"):
        calm.compose(tmp_path, tmp_path, 1)
    (tmp_path / "config.json").write_text('{"model_type": "llama99"}')
    with pytest.raises(CheckpointError, match="llama99"):
        calm.compose(tmp_path, tmp_path, 1)


def write_gguf(
    path: Path, width: int = 32, layers: int = 3, seed: int = 0, *, stored: str = "F32", values: str | None = None
) -> Path:
    """A tiny llama as a GGUF file, its matrices stored in one of GGUF's types, rounded to the `values` of another."""
    gguf = pytest.importorskip("gguf")
    types = gguf.GGMLQuantizationType
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
        weight = (numbers.standard_normal(shape) * scale if len(shape) == 2 else np.ones(shape)).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weight)
            return
        if values is not None:
            weight = gguf.quants.dequantize(gguf.quants.quantize(weight, types[values]), types[values])
        writer.add_tensor(name, gguf.quants.quantize(weight, types[stored]), raw_dtype=types[stored])

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


def test_a_configuration_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    factories.config("llama").save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"hidden_size": 32', '"hidden_size": "wide"'))
    with pytest.raises(CheckpointError, match=r"(?s)No usable configuration.*hidden_size.*wide"):
        sources.load_config(Source.parse(tmp_path))


def test_gguf_files_without_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Source.parse(write_gguf(tmp_path / "a.gguf"))
    config = sources.load_config(source)
    monkeypatch.setattr(modeling_gguf_pytorch_utils, "is_gguf_available", lambda: False)
    for load in (sources.load_config, sources.load_tokenizer, lambda source: sources.load_anchor(source, config)):
        with pytest.raises(CheckpointError, match=r"(?s)gguf.*pip install 'calm-lm\[gguf\]'"):
            load(source)


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


def test_quantized_gguf_files_train(tmp_path: Path) -> None:
    """Loss and gradients are those of the dequantized weights."""

    def trained(**stored: str) -> list[Tensor]:
        anchor = write_gguf(tmp_path / f"{len(stored)}a.gguf", **stored)
        augmenting = write_gguf(tmp_path / f"{len(stored)}b.gguf", seed=1, **stored)
        torch.manual_seed(0)  # the connections
        model = factories.perturb(calm.compose(anchor, augmenting, 2)).train()
        loss = model(IDS, labels=IDS, skip_logits=True).loss
        loss.backward()
        return [loss.detach(), *(weight.grad for weight in model.connections.parameters())]

    quantized, expected = trained(stored="Q8_0"), trained(stored="F32", values="Q8_0")
    for found, wanted in zip(quantized, expected, strict=True):
        assert_same(found, wanted)
    assert not torch.allclose(quantized[0], trained()[0], rtol=1e-5), "the weights are quantized"


def test_gguf_files_are_not_quantized_once_more(tmp_path: Path) -> None:
    anchor = write_gguf(tmp_path / "a.gguf")
    for other in (anchor, write_gguf(tmp_path / "b.gguf", seed=1)):
        with pytest.raises(CalmError, match=r"a\.gguf.* cannot be quantized.*quantization_config out"):
            calm.compose(anchor, other, 1, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


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
    calm.compose(*loaded, 2)
    for model in loaded:
        model.name_or_path = ""
    with pytest.raises(TokenizerMismatchError, match=r"64 tokens.*72.*anchor_tokenizer="):
        calm.compose(*loaded, 2)
    calm.compose(*loaded, 2, anchor_tokenizer=words, augmenting_tokenizer=words)
    calm.compose(loaded[0], {"m": loaded[1]}, 2, anchor_tokenizer=words, augmenting_tokenizer={"m": words})
    with pytest.raises(TokenizerMismatchError):
        calm.compose(*loaded, 2, anchor_tokenizer=words, augmenting_tokenizer=factories.word_tokenizer(60, prefix="v"))


def test_an_augmenting_model_may_have_more_tokens(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A specialist with a `[PAD]` of its own, the embedding resized for it or not. The other way round, it is blind."""
    words, more = factories.word_tokenizer(), factories.word_tokenizer()
    more.add_special_tokens({"pad_token": "[PAD]"})
    anchor = save(tmp_path / "a", "llama", words)
    for name, vocab in (("resized", 65), ("padded", 72)):
        specialist = save(tmp_path / name, "gpt2", more, vocab=vocab)
        caplog.clear()
        model = factories.perturb(calm.compose(anchor, specialist, 2))
        assert "lacks (1, '[PAD]' among them) and will not be given them" in caplog.text
        assert model.generate(IDS, max_new_tokens=4).max() < factories.VOCAB
        with pytest.raises(CalmError, match="input_ids hold 64: expected ids from 0 to 63"):
            model(torch.tensor([[3, 64]]))
        with pytest.raises(TokenizerMismatchError, match=r"65 tokens.*; 64 tokens.*pass it as augmenting_tokenizer="):
            calm.compose(specialist, anchor, 2)
    calm.compose(save(tmp_path / "c", "llama", more, vocab=72), anchor, 2, augmenting_tokenizer=more)
    moved = factories.word_tokenizer(63)
    moved.add_tokens(["w99", "w63"])
    with pytest.raises(TokenizerMismatchError, match=r"63 tokens have the same id in both\). Compose models"):
        calm.compose(anchor, save(tmp_path / "d", "gpt2", moved, vocab=65), 2)


def test_loaded_models_are_compared_by_the_tokenizers_where_they_came_from(tmp_path: Path) -> None:
    words, others = factories.word_tokenizer(), factories.word_tokenizer(prefix="v")
    paths = save(tmp_path / "a", "llama", words), save(tmp_path / "b", "gpt2", others)
    models = [AutoModelForCausalLM.from_pretrained(path) for path in paths]
    for bases in ((models[0], models[1]), (models[0], paths[1]), (paths[0], models[1])):
        with pytest.raises(TokenizerMismatchError, match="2 tokens have the same id"):
            calm.compose(*bases, 2)
    calm.compose(*models, 2, augmenting_tokenizer=words)


def test_tokenizers_that_could_not_be_compared_are_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The repository that a loaded model came from is looked for among what is cached, and not on the network."""
    with_one = save(tmp_path / "a", "llama", factories.word_tokenizer())
    without = save(tmp_path / "b", "gpt2")
    calm.compose(with_one, with_one, 2)
    model = AutoModelForCausalLM.from_pretrained(with_one)
    calm.compose(model, model, 2)
    assert not caplog.records
    nameless, cached = factories.base("gpt2"), factories.base("gpt2")
    cached.name_or_path = "nobody/nothing-of-this-name"
    for other in (without, nameless, cached):
        caplog.clear()
        calm.compose(with_one, other, 2)
        (message,) = [record.getMessage() for record in caplog.records]
        assert "64 tokens, which is all that could be compared" in message and str(with_one) in message
    caplog.clear()
    calm.compose(without, nameless, 2)
    assert "no tokenizer was found beside either" in caplog.text


@pytest.mark.parametrize("architecture", ["gpt2", "gemma2", "qwen2", "mamba"])
def test_a_folder_without_a_tokenizer_has_none(architecture: str, tmp_path: Path) -> None:
    """There transformers makes up an empty one: two of them would be equal whatever the vocabularies are."""
    anchor, larger = save(tmp_path / "a", architecture), save(tmp_path / "b", architecture, vocab=72)
    assert sources.load_tokenizer(Source.parse(anchor)) is None
    if architecture == "mamba":
        return
    calm.compose(anchor, save(tmp_path / "c", "llama"), 2)
    with pytest.raises(TokenizerMismatchError, match=r"64 tokens.*72"):
        calm.compose(anchor, larger, 2)
