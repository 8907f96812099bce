"""Invariant 6: saved and loaded again, the logits are the same; a base that is not the one trained against is refused.

So is every damaged checkpoint, each with an error of its own, and a save that fails leaves the checkpoint before it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import factories
import pytest
import strategies
import torch
from bases import cache_as
from factories import EOS, Mix, assert_identical
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import calm
from calm import CalmForCausalLM, CheckpointError, fingerprints, sources

IDS = factories.tokens(2, 9)


def check_same_logits(found: CalmForCausalLM, expected: CalmForCausalLM) -> None:
    """Bit for bit, cached and uncached, and it is the composition that was saved, not merely its anchor."""
    with torch.no_grad():
        assert_identical(found(IDS).logits, expected(IDS).logits)
        assert_identical(found(IDS, use_cache=False).logits, expected(IDS, use_cache=False).logits)
        with found.composition_disabled():
            assert not torch.equal(found(IDS).logits, expected(IDS).logits)


def check_refused(load: Callable[[], object], *words: str) -> None:
    """A `CheckpointError` whose message says all of these words."""
    try:
        load()
    except CheckpointError as error:
        missing = [word for word in words if word not in str(error)]
        assert not missing, f"{missing} not in: {error}"
    else:
        raise AssertionError("it was loaded")


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


class Saved:
    """Two bases on disk, a composition of them, and its checkpoint."""

    def __init__(self, folder: Path, anchor: str = "llama", augmenting: str = "gpt2", **kwargs: object) -> None:
        self.anchor, self.augmenting, self.out = folder / "anchor", folder / "augmenting", folder / "out"
        factories.base(anchor).save_pretrained(self.anchor)
        factories.base(augmenting, 24, 4, 2, seed=1).save_pretrained(self.augmenting)
        self.model = factories.perturb(calm.compose(self.anchor, self.augmenting, [(0, 1), (2, 3)], **kwargs))
        self.model.save_pretrained(self.out)

    def load(self, **kwargs: object) -> CalmForCausalLM:
        return CalmForCausalLM.from_pretrained(self.out, **kwargs)

    def edit_config(self, **changes: object) -> None:
        change_config(self.out, **changes)


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Shared by tests that change nothing on disk."""
    return Saved(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    return Saved(tmp_path)


@pytest.mark.parametrize("augmenting", factories.AUGMENTING)
def test_saved_and_loaded(augmenting: str, tmp_path: Path) -> None:
    """Through the references, the Auto class, and with bases given by hand, whole as they were given at first."""
    index = factories.AUGMENTING.index(augmenting)
    saved = Saved(tmp_path, anchor=factories.ANCHORS[(index + 3) % len(factories.ANCHORS)], augmenting=augmenting)
    check_same_logits(saved.load(), saved.model)
    check_same_logits(AutoModelForCausalLM.from_pretrained(saved.out), saved.model)
    anchor, other = (AutoModelForCausalLM.from_pretrained(path) for path in (saved.anchor, saved.augmenting))
    check_same_logits(saved.load(anchor=anchor, augmenting=other), saved.model)
    again = tmp_path / "again"
    saved.load().save_pretrained(again)
    check_same_logits(CalmForCausalLM.from_pretrained(again), saved.model)


@pytest.mark.parametrize("anchor", factories.ANCHORS)
@settings(max_examples=2)
@given(data=st.data())
def test_any_composition_saved_and_loaded(anchor: str, data: st.DataObject) -> None:
    """Whatever is connected how: the choice of layers, heads, widths and modes comes back with the weights."""
    mix = data.draw(strategies.mixes(anchor))
    model = mix.build()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = CalmForCausalLM.from_pretrained(folder, anchor=mix.anchor_model(), augmenting=mix.augmenting_models())
    assert loaded.config.layer_pairs == model.config.layer_pairs
    check_same_logits(loaded, model)


@pytest.mark.parametrize("anchor", (*factories.ANCHORS, *factories.OTHER_ANCHORS))
def test_composed_of_loaded_models(anchor: str, tmp_path: Path) -> None:
    """Models that never had a name: they have to be given again, by hand or as a folder."""
    mix = Mix(anchor=anchor, augmenting=("opt", "gemma2"), attention="paper", attend="prompt", num_heads=8)
    model = mix.build()
    model.save_pretrained(tmp_path / "out")
    anchor_model, augmenting = mix.anchor_model(), mix.augmenting_models()
    anchor_model.save_pretrained(tmp_path / "anchor")
    loaded = CalmForCausalLM.from_pretrained(tmp_path / "out", anchor=tmp_path / "anchor", augmenting=augmenting)
    check_same_logits(loaded, model)
    assert loaded.config.to_dict() == model.config.to_dict() | {
        key: loaded.config.to_dict()[key] for key in ("architectures", "dtype", "_name_or_path", "anchor_reference")
    }
    assert loaded.config.anchor_reference == model.config.anchor_reference | {"name_or_path": str(tmp_path / "anchor")}
    loaded.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert "_name_or_path" not in written  # a folder of this machine
    check_refused(
        lambda: CalmForCausalLM.from_pretrained(tmp_path / "out", augmenting=augmenting),
        "the anchor",
        "loaded model",
        "pass anchor=",
    )


def test_the_auto_class_passes_the_attention_on(pristine: Saved, tmp_path: Path) -> None:
    """To all bases; it is no part of the configuration, which is saved and taken again without it."""
    for asked in ("eager", "sdpa"):
        loaded = AutoModelForCausalLM.from_pretrained(pristine.out, attn_implementation=asked)
        for base in (loaded.anchor, *loaded.augmenting.values()):
            assert base.config._attn_implementation == asked
        loaded.save_pretrained(tmp_path)
        assert "asked_of_bases" not in (tmp_path / "config.json").read_text()
        check_same_logits(pristine.load(config=loaded.config, attn_implementation="sdpa"), pristine.model)


def test_what_concerns_finding_files_is_for_the_bases_too(saved: Saved, tmp_path: Path) -> None:
    """A composition on a hub of bases on a hub, all of them in a cache that is not the usual one."""
    saved.edit_config(
        anchor_reference=saved.model.config.anchor_reference | {"name_or_path": "me/anchor"},
        augmenting_references={
            "augmenting": saved.model.config.augmenting_references["augmenting"] | {"name_or_path": "me/augmenting"}
        },
    )
    for name, folder in (("out", saved.out), ("anchor", saved.anchor), ("augmenting", saved.augmenting)):
        cache_as(f"me/{name}", folder, tmp_path / "cache")
    for loader in (CalmForCausalLM, AutoModelForCausalLM):
        loaded = loader.from_pretrained("me/out", cache_dir=tmp_path / "cache", local_files_only=True)
        check_same_logits(loaded, saved.model)


def test_bases_of_a_revision(saved: Saved, tmp_path: Path) -> None:
    """Each base has its own, which is recorded; the default branch is refused, and the error says where it looked."""
    cache = {"cache_dir": tmp_path / "cache", "local_files_only": True}
    for part in ("anchor", "augmenting"):
        cache_as(f"me/{part}", getattr(saved, part), tmp_path / "cache", "v2")
    factories.base("llama", seed=7).save_pretrained(tmp_path / "newer")
    cache_as("me/anchor", tmp_path / "newer", tmp_path / "cache")
    model = calm.compose("me/anchor@v2", "me/augmenting@v2", [(0, 1), (2, 3)], **cache)
    for reference in (model.config.anchor_reference, model.config.augmenting_references["augmenting"]):
        assert reference["revision"] == "v2" and "@" not in reference["name_or_path"]
    factories.perturb(model).save_pretrained(tmp_path / "pinned")
    check_same_logits(CalmForCausalLM.from_pretrained(tmp_path / "pinned", **cache), model)
    check_refused(
        lambda: CalmForCausalLM.from_pretrained(tmp_path / "pinned", anchor="me/anchor", **cache),
        "the anchor ('me/anchor' at revision 'main'; another is written 'me/anchor@REVISION') are not those",
    )

    # a loaded model does not tell its revision
    by_hand = AutoModelForCausalLM.from_pretrained("me/anchor", revision="v2", **cache)
    loaded = CalmForCausalLM.from_pretrained(tmp_path / "pinned", anchor=by_hand, **cache)
    assert loaded.config.anchor_reference == model.config.anchor_reference
    augmenting = AutoModelForCausalLM.from_pretrained(saved.augmenting)
    calm.compose(by_hand, augmenting, [(0, 1), (2, 3)]).save_pretrained(tmp_path / "loose")
    check_refused(
        lambda: CalmForCausalLM.from_pretrained(tmp_path / "loose", **cache), "'me/anchor' at revision 'main'"
    )
    loaded = CalmForCausalLM.from_pretrained(tmp_path / "loose", anchor="me/anchor@v2", **cache)
    assert loaded.config.anchor_reference["revision"] == "v2"


def test_arguments_that_loading_does_not_know_are_refused(pristine: Saved) -> None:
    with pytest.raises(calm.CalmError, match=r"\('x',\) after the name: pass arguments by their names"):
        CalmForCausalLM.from_pretrained(pristine.out, "x")
    with pytest.raises(calm.CalmError, match=r"output_loading_info=True.*Leave it out"):
        pristine.load(output_loading_info=True)
    with pytest.raises(calm.CalmError, match=r"config is a LlamaConfig: expected the composition's CalmConfig"):
        pristine.load(config=factories.config("llama"))
    check_same_logits(pristine.load(output_loading_info=False, config=pristine.model.config), pristine.model)


def test_a_single_augmenting_model_needs_no_name_at_loading(tmp_path: Path) -> None:
    mix = Mix()
    model = mix.build()
    model.save_pretrained(tmp_path)
    (other,) = mix.augmenting_models().values()
    loaded = CalmForCausalLM.from_pretrained(tmp_path, anchor=mix.anchor_model(), augmenting=other)
    check_same_logits(loaded, model)
    check_refused(
        lambda: CalmForCausalLM.from_pretrained(tmp_path, anchor=mix.anchor_model(), augmenting={"x": other}),
        "['x']",
        "['m0']",
    )


def test_settings_of_generation_are_kept(saved: Saved) -> None:
    saved.model.generation_config.max_new_tokens = 3
    saved.model.generation_config.repetition_penalty = 1.3
    saved.model.save_pretrained(saved.out)
    loaded = saved.load()
    assert loaded.generation_config.max_new_tokens == 3
    assert loaded.generation_config.repetition_penalty == 1.3
    assert loaded.generate(IDS).shape[1] == 12


@pytest.mark.parametrize("attention", ["gated", "normalized", "paper"])
def test_sharded(attention: str, tmp_path: Path) -> None:
    saved = Saved(tmp_path, attention=attention)
    saved.model.save_pretrained(saved.out, max_shard_size=10_000)
    shards = sorted(saved.out.glob("model-*.safetensors"))
    assert len(shards) > 2 and not (saved.out / "model.safetensors").exists()
    check_same_logits(saved.load(), saved.model)
    shards[1].unlink()
    check_refused(saved.load, shards[1].name, "lacks")
    saved.model.save_pretrained(saved.out)
    assert not list(saved.out.glob("model-*")) and not list(saved.out.glob("*.index.json"))
    check_same_logits(saved.load(), saved.model)


# -- another dtype ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loaded_in_another_dtype(pristine: Saved, dtype: torch.dtype) -> None:
    """A float32 base loaded in half precision is still the right base, and the logits are near."""
    loaded = pristine.load(dtype=dtype)
    assert {weight.dtype for weight in loaded.anchor.parameters()} == {dtype}
    found, expected = loaded(IDS).logits.float(), pristine.model(IDS).logits
    assert (found - expected).norm() / expected.norm() < 0.05
    by_hand = [
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype) for path in (pristine.anchor, pristine.augmenting)
    ]
    loaded = pristine.load(anchor=by_hand[0], augmenting=by_hand[1], dtype=dtype)
    assert_identical(loaded(IDS).logits.float(), found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_composed_in_another_dtype_than_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    """Float32 bases composed in half precision are loaded in it again, or in float32, which rounds to the same."""
    saved = Saved(tmp_path, dtype=dtype)
    saved.model.connections.to(dtype)  # composed, they are float32; loaded, they are as the anchor is
    for load in (saved.load, lambda: saved.load(dtype="auto"), lambda: AutoModelForCausalLM.from_pretrained(saved.out)):
        loaded = load()
        assert {weight.dtype for weight in loaded.parameters()} == {dtype}
        check_same_logits(loaded, saved.model)
    loaded = saved.load(dtype=torch.float32)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert saved.load(torch_dtype=torch.float32).dtype == torch.float32
    by_hand = AutoModelForCausalLM.from_pretrained(saved.anchor)
    assert {weight.dtype for weight in saved.load(anchor=by_hand).anchor.parameters()} == {torch.float32}
    assert sources.load_part(loaded.config, "augmenting", dtype="auto").dtype == dtype
    other = {torch.bfloat16: torch.float16, torch.float16: torch.bfloat16}[dtype]
    check_refused(lambda: saved.load(dtype=other), "the anchor", f"composed in {str(dtype)[6:]}", f"dtype={dtype}")
    weights = load_file(saved.anchor / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 3] += 0.5
    save_file(weights, saved.anchor / "model.safetensors", {"format": "pt"})
    for wrong in ("auto", torch.float32):
        check_refused(lambda wrong=wrong: saved.load(dtype=wrong), "the anchor", "trained against", "the right")


def test_bases_stored_in_half_precision(tmp_path: Path) -> None:
    """Composed in float32, they are loaded in float32 again."""
    for part, base in (("anchor", factories.base("llama")), ("augmenting", factories.base("gpt2", 24, 4, 2, seed=1))):
        base.bfloat16().save_pretrained(tmp_path / part)
    model = factories.perturb(calm.compose(tmp_path / "anchor", tmp_path / "augmenting", 2, dtype=torch.float32))
    model.save_pretrained(tmp_path / "out")
    check_same_logits(CalmForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_references_without_a_dtype(saved: Saved) -> None:
    """Of older checkpoints: loaded as stored, or as asked for."""
    values = json.loads((saved.out / "config.json").read_text())
    for reference in (values["anchor_reference"], *values["augmenting_references"].values()):
        assert reference.pop("dtype") == "float32"
    (saved.out / "config.json").write_text(json.dumps(values))
    check_same_logits(saved.load(), saved.model)
    assert saved.load(dtype=torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("part", ["anchor", "augmenting"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_one_changed_weight_is_refused_in_any_dtype(saved: Saved, part: str, dtype: torch.dtype) -> None:
    folder = getattr(saved, part)
    weights = load_file(folder / "model.safetensors")
    key = sorted(k for k in weights if "0" in k and weights[k].dim() == 2)[0]
    weights[key][1, 2] += 0.1 * weights[key].abs().max()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    check_refused(lambda: saved.load(dtype=dtype), "weights", f"the {part}", "trained against")
    assert not torch.equal(saved.load(dtype=dtype, verify_bases=False)(IDS).logits, saved.model(IDS).logits)


@pytest.mark.parametrize("part", ["anchor", "augmenting"])
def test_a_base_that_changed_in_memory_is_told_apart(
    pristine: Saved, part: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As by merging an adapter: saved then, the composition loads with the changed base and not with its old one."""
    model = pristine.load()
    model.save_pretrained(tmp_path / "unchanged")
    assert not caplog.records
    base = model.anchor if part == "anchor" else model.augmenting["augmenting"]
    with torch.no_grad():
        next(weight for weight in base.parameters() if weight.dim() == 2).add_(0.1)
    model.save_pretrained(tmp_path / "out")
    assert "are not those that this composition was made with" in caplog.text and f"(..., {part}=" in caplog.text
    changed = whole = model.anchor
    if part == "augmenting":
        changed, whole = base, AutoModelForCausalLM.from_pretrained(pristine.augmenting)
        whole.transformer.load_state_dict(changed.state_dict(), strict=False)
    whole.save_pretrained(tmp_path / "changed")
    check_refused(
        lambda: CalmForCausalLM.from_pretrained(tmp_path / "out"), "weights", f"the {part}", "trained against"
    )
    check_same_logits(CalmForCausalLM.from_pretrained(tmp_path / "out", **{part: tmp_path / "changed"}), model)
    in_half = pristine.load().to(torch.bfloat16)
    caplog.clear()
    in_half.save_pretrained(tmp_path / "half")
    assert not caplog.records, "rounded, they are the same weights"


def test_the_smallest_change_is_refused(saved: Saved) -> None:
    """One last bit of one weight, and two weights exchanged."""
    path = saved.anchor / "model.safetensors"
    weights = load_file(path)
    key = "model.layers.1.mlp.up_proj.weight"

    def changed(change: Callable[[torch.Tensor], None]) -> None:
        copy = {name: weight.clone() for name, weight in weights.items()}
        change(copy[key])
        assert not torch.equal(copy[key], weights[key])
        save_file(copy, path, {"format": "pt"})

    def last_bit(weight: torch.Tensor) -> None:
        weight.view(torch.int32)[3, 3] ^= 1

    def exchange_in_a_row(weight: torch.Tensor) -> None:
        weight[2, [4, 7]] = weight[2, [7, 4]]

    def exchange_columns(weight: torch.Tensor) -> None:
        weight[:, [0, 5]] = weight[:, [5, 0]]

    def exchange_rows(weight: torch.Tensor) -> None:
        weight[[0, 5]] = weight[[5, 0]]

    for change in (last_bit, exchange_in_a_row, exchange_columns, exchange_rows):
        changed(change)
        check_refused(saved.load, "the anchor", "trained against")


def test_layers_exchanged_between_names_are_refused(saved: Saved) -> None:
    path = saved.anchor / "model.safetensors"
    weights = load_file(path)
    names = [f"model.layers.{i}.mlp.up_proj.weight" for i in (0, 1)]
    weights[names[0]], weights[names[1]] = weights[names[1]], weights[names[0]]
    save_file(weights, path, {"format": "pt"})
    check_refused(saved.load, "the anchor", "trained against")


def test_layers_that_are_not_run_may_change(saved: Saved) -> None:
    """The composition ends the augmenting model after its last connected layer: nothing later can matter."""
    path = saved.augmenting / "model.safetensors"
    weights = load_file(path)
    for key in weights:
        if ".h.3." in key or "lm_head" in key:
            weights[key] += 1
    save_file(weights, path, {"format": "pt"})
    check_same_logits(saved.load(), saved.model)


# -- wrong, missing and damaged files ---------------------------------------------------------------------------------


def test_wrong_bases(pristine: Saved, tmp_path: Path) -> None:
    other_seed = factories.base("llama", seed=5)
    wider, deeper = factories.base("llama", width=48), factories.base("llama", layers=6)
    check_refused(lambda: pristine.load(anchor=other_seed), "the anchor", "trained against")
    check_refused(lambda: pristine.load(anchor=wider), "the anchor", "width", "48", "32")
    check_refused(lambda: pristine.load(anchor=deeper), "the anchor", "depth", "6", "4")
    check_refused(lambda: pristine.load(anchor=factories.base("qwen3")), "architecture", "'qwen3'", "'llama'")
    check_refused(lambda: pristine.load(augmenting=factories.base("gpt2", 24, 4, 2, seed=6)), "'augmenting'", "trained")
    wider.save_pretrained(tmp_path)
    check_refused(lambda: pristine.load(anchor=tmp_path), "the anchor", "width", "48", "32")
    check_refused(lambda: pristine.load(anchor=tmp_path / "no"), "no such folder")
    for part in ("anchor", "augmenting"):
        with pytest.raises(
            calm.CalmError, match=rf"{part}= is given a int for the {part}.*expected a transformers model"
        ):
            pristine.load(**{part: 3})


@pytest.mark.parametrize("part", ["anchor", "augmenting"])
@pytest.mark.parametrize("field", ["rope_parameters", "rms_norm_eps"])
def test_the_same_weights_with_another_configuration_are_refused(part: str, field: str, tmp_path: Path) -> None:
    """They are another model: its logits differ."""
    saved = Saved(tmp_path, anchor="llama", augmenting="qwen3")
    change = {"rope_parameters": {"rope_theta": 50.0, "rope_type": "default"}, "rms_norm_eps": 0.1}[field]
    change_config(getattr(saved, part), **{field: change})
    check_refused(saved.load, f"the {part}", f"{field}={change!r}", "trained against", "verify_bases=False")
    changed = AutoModelForCausalLM.from_pretrained(getattr(saved, part))
    check_refused(lambda: saved.load(**{part: changed}), f"the {part}", field)
    assert (saved.load(verify_bases=False)(IDS).logits - saved.model(IDS).logits).abs().max() > 0.01


def test_settings_that_change_no_logits_may_differ(saved: Saved) -> None:
    for folder in (saved.anchor, saved.augmenting):
        change_config(folder, use_cache=False, attention_dropout=0.1, pad_token_id=3)
    check_same_logits(saved.load(), saved.model)
    by_hand = {part: AutoModelForCausalLM.from_pretrained(getattr(saved, part)) for part in ("anchor", "augmenting")}
    by_hand["anchor"].config.eos_token_id = EOS
    check_same_logits(saved.load(**by_hand), saved.model)


@pytest.mark.parametrize("part", ["anchor", "augmenting"])
def test_a_missing_base(saved: Saved, tmp_path: Path, part: str) -> None:
    shutil.move(getattr(saved, part), tmp_path / "elsewhere")
    check_refused(saved.load, f"the {part}", str(tmp_path / part), "not there", f"pass {part}=")
    check_same_logits(saved.load(**{part: tmp_path / "elsewhere"}), saved.model)


@pytest.mark.parametrize("given", ["folders", "models"])
def test_where_a_base_is_now_is_recorded(saved: Saved, tmp_path: Path, given: str) -> None:
    """Saved again, the composition looks for its bases where they were given, with the fingerprints that it had."""
    before = saved.model.config
    bases: dict[str, object] = {}
    for part in ("anchor", "augmenting"):
        bases[part] = shutil.move(getattr(saved, part), tmp_path / f"{part}-2")
        if given == "models":
            bases[part] = AutoModelForCausalLM.from_pretrained(bases[part])
    read = calm.CalmConfig.from_pretrained(saved.out)
    loaded = saved.load(config=read, anchor=bases["anchor"], augmenting={"augmenting": bases["augmenting"]})
    assert read.anchor_reference == before.anchor_reference, "the caller's own"
    loaded.save_pretrained(tmp_path / "out2")
    check_same_logits(CalmForCausalLM.from_pretrained(tmp_path / "out2"), saved.model)
    place = {"name_or_path": str(tmp_path / "anchor-2"), "gguf_file": None, "revision": None}
    assert loaded.config.anchor_reference == before.anchor_reference | place

    uploaded = before.anchor_reference | {"name_or_path": None, "folder": "anchor"}
    saved.edit_config(anchor_reference=uploaded)
    assert "folder" not in saved.load(**bases).config.anchor_reference
    nameless = factories.base("llama")
    nameless.load_state_dict(saved.model.anchor.state_dict())
    assert saved.load(**bases | {"anchor": nameless}).config.anchor_reference == uploaded, "it says nothing of a place"
    assert saved.load(**bases, verify_bases=False).config.anchor_reference == uploaded, "not compared with it"


def test_an_incomplete_base(saved: Saved) -> None:
    path = saved.anchor / "model.safetensors"
    weights = load_file(path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, path, {"format": "pt"})
    check_refused(saved.load, "lacks", "model.layers.1.mlp.up_proj.weight")
    path.write_bytes(path.read_bytes()[:5000])
    check_refused(saved.load, "Cannot load")
    path.unlink()
    check_refused(saved.load, "Cannot load", str(saved.anchor))


@pytest.mark.parametrize("keep", [0, 4, 100, 0.5, 0.999])
def test_a_truncated_file(saved: Saved, keep: float) -> None:
    path = saved.out / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep if keep > 1 else keep * len(data))])
    check_refused(saved.load, "model.safetensors", "truncated or corrupted")


def test_a_corrupted_header(saved: Saved) -> None:
    path = saved.out / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[20:40] = os.urandom(20)
    path.write_bytes(data)
    check_refused(saved.load, "model.safetensors")


def test_corrupted_numbers(saved: Saved) -> None:
    path = saved.out / "model.safetensors"
    weights = load_file(path)
    weights["connections.1.w_k.weight"][0, 0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    check_refused(saved.load, "connections.1.w_k.weight", "NaN")


def test_missing_weights_file(saved: Saved) -> None:
    (saved.out / "model.safetensors").unlink()
    check_refused(saved.load, "no weights", "model.safetensors")


def test_other_keys(saved: Saved) -> None:
    path = saved.out / "model.safetensors"
    weights = load_file(path)
    lost = weights.pop("connections.0.w_q.weight")
    save_file(weights, path, {"format": "pt"})
    check_refused(saved.load, "1 missing", "connections.0.w_q.weight", "0 unexpected")
    save_file(weights | {"connections.0.w_q.weight": lost, "connections.9.x": lost + 1}, path, {"format": "pt"})
    check_refused(saved.load, "0 missing", "1 unexpected", "connections.9.x")


def test_weights_from_before_there_was_a_gate(tmp_path: Path) -> None:
    """Composed as "normalized", then the default: no gate, and the same logits; as "gated" they are refused."""
    saved = Saved(tmp_path, attention="normalized")
    written = json.loads((saved.out / "config.json").read_text())
    assert (written["attention"], written["format_version"]) == ("normalized", 1)
    weights = load_file(saved.out / "model.safetensors")
    assert len(weights) == 5 * len(saved.model.connections) and not any("gate" in name for name in weights)
    loaded = saved.load()
    assert all(connection.gate is None for connection in loaded.connections)
    check_same_logits(loaded, saved.model)
    saved.edit_config(attention="gated")
    check_refused(saved.load, "do not fit its configuration", "4 missing", "connections.0.gate.bias", "0 unexpected")


def test_a_gate_that_no_attention_reads_is_refused(saved: Saved) -> None:
    weights = load_file(saved.out / "model.safetensors")
    assert weights["connections.1.gate.bias"].shape == (1,) and weights["connections.1.gate.weight"].shape == (1, 32)
    saved.edit_config(attention="normalized")
    check_refused(saved.load, "0 missing", "4 unexpected", "connections.0.gate.bias")


def test_another_shape(saved: Saved) -> None:
    path = saved.out / "model.safetensors"
    weights = load_file(path)
    weights["connections.0.f_proj.weight"] = torch.zeros(32, 23)
    save_file(weights, path, {"format": "pt"})
    check_refused(saved.load, "connections.0.f_proj.weight", "(32, 23)", "(32, 24)")


def test_a_newer_format(saved: Saved) -> None:
    saved.edit_config(format_version=99)
    check_refused(saved.load, "format version 99", "reads up to 1", "Upgrade")
    check_refused(lambda: AutoModelForCausalLM.from_pretrained(saved.out), "format version 99")


def test_a_damaged_configuration(saved: Saved) -> None:
    saved.edit_config(connections=[{"augmenting": "augmenting", "layer": 3}])
    check_refused(saved.load, "connections", "'augmenting_layer'", "'anchor_layer'")
    text = (saved.out / "config.json").read_text()
    (saved.out / "config.json").write_text(text[: len(text) // 2])
    check_refused(saved.load, str(saved.out), "holds no composition")
    (saved.out / "config.json").unlink()
    check_refused(saved.load, str(saved.out), "holds no composition")


def test_an_architecture_that_transformers_does_not_know(saved: Saved) -> None:
    values = json.loads((saved.out / "config.json").read_text())
    values["anchor_config"]["model_type"] = "llama99"
    (saved.out / "config.json").write_text(json.dumps(values))
    check_refused(saved.load, "llama99")


def test_not_a_composition(pristine: Saved, tmp_path: Path) -> None:
    check_refused(lambda: CalmForCausalLM.from_pretrained(pristine.anchor), "'llama'", "not a composition", "compose")
    check_refused(lambda: CalmForCausalLM.from_pretrained(tmp_path / "no"), str(tmp_path / "no"))


# -- a save that fails ------------------------------------------------------------------------------------------------


def check_failed_save_leaves_the_last_one(
    saved: Saved, folder: Path, fail: Callable[[], Iterator[None] | None]
) -> None:
    """A second save fails; what the first one wrote can be loaded and is complete."""
    saved.model.save_pretrained(folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = CalmForCausalLM.from_pretrained(folder)
    for weight in changed.connections.parameters():
        weight.data += 1
    fail()
    check_refused(lambda: changed.save_pretrained(folder), str(folder), "failed", "left what was there")
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "ballast"} == before
    check_same_logits(CalmForCausalLM.from_pretrained(folder), saved.model)


def no_space(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["weights", "config", "card"])
def test_a_failed_write(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    target = {
        "weights": (calm.checkpoint, "save_torch_state_dict"),
        "config": (calm.CalmConfig, "save_pretrained"),
        "card": (calm.checkpoint.ModelCard, "save"),
    }[where]
    if where == "card":  # written only where there is none

        def fail() -> None:
            monkeypatch.setattr(*target, no_space)
            monkeypatch.setattr(calm.checkpoint.Path, "exists", lambda self: False)
    else:

        def fail() -> None:
            monkeypatch.setattr(*target, no_space)

    check_failed_save_leaves_the_last_one(saved, tmp_path / "folder", fail)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk takes root")
def test_a_full_disk(saved: Saved, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this system does not let root mount a tmpfs")

    def fill() -> None:
        with pytest.raises(OSError, match="No space"), open(disk / "out" / "ballast", "wb", buffering=0) as ballast:
            for _ in range(1000):
                assert ballast.write(bytes(1024)) == 1024
        with open(disk / "out" / "ballast", "r+b") as ballast:  # room for the small files, not for the weights
            ballast.truncate(os.path.getsize(disk / "out" / "ballast") - 20 * 1024)

    try:
        check_failed_save_leaves_the_last_one(saved, disk / "out", fill)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_a_folder_that_cannot_be_made(saved: Saved, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    check_refused(lambda: saved.model.save_pretrained(tmp_path / "file"), "Cannot write", str(tmp_path / "file"))


def test_nothing_to_save(saved: Saved) -> None:
    check_refused(lambda: saved.model.save_pretrained(saved.out, state_dict={"a": torch.zeros(1)}), "no composition")


def test_other_processes_write_nothing(saved: Saved, tmp_path: Path) -> None:
    saved.model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other").exists()


# -- negative controls ------------------------------------------------------------------------------------------------


def test_weights_that_are_not_loaded_are_noticed(pristine: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calm.checkpoint, "read_weights", lambda name, expected, **kwargs: dict(expected))
    with pytest.raises(AssertionError, match="not bit for bit"):
        check_same_logits(pristine.load(), pristine.model)


def test_a_base_that_is_not_checked_is_noticed(pristine: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "check_fingerprint", lambda *args: None)
    with pytest.raises(AssertionError, match="it was loaded"):
        check_refused(lambda: pristine.load(anchor=factories.base("llama", seed=5)), "trained against")


def test_a_configuration_that_is_not_compared_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "computation_of", lambda config: {})
    with pytest.raises(AssertionError, match="it was loaded"):
        test_the_same_weights_with_another_configuration_are_refused("anchor", "rms_norm_eps", tmp_path)


def test_a_fingerprint_that_sums_up_is_noticed(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    """A digest that does not depend on where a weight stands."""

    def digest(weights: dict[str, torch.Tensor], dtype: torch.dtype | None) -> str:
        return str(sum(weight.detach().to(torch.float32).view(torch.int32).sum().item() for weight in weights.values()))

    monkeypatch.setattr(fingerprints, "_digest", digest)
    saved.model = factories.perturb(calm.compose(saved.anchor, saved.augmenting, [(0, 1), (2, 3)]))
    saved.model.save_pretrained(saved.out)
    with pytest.raises(AssertionError, match="it was loaded"):
        test_layers_exchanged_between_names_are_refused(saved)


def test_a_save_in_place_is_noticed(saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing straight to the final files."""
    write = calm.checkpoint.write

    def in_place(directory: Path, config: object, weights: dict, *args: object, **kwargs: object) -> None:
        if Path(directory).exists():
            save_file(dict(list(weights.items())[:2]), Path(directory) / "model.safetensors")
            raise CheckpointError(f"{directory} failed and left what was there")
        write(directory, config, weights, *args, **kwargs)

    monkeypatch.setattr(calm.checkpoint, "write", in_place)
    with pytest.raises(AssertionError):
        check_failed_save_leaves_the_last_one(saved, tmp_path / "folder", lambda: None)
