"""Invariant 6, the bases: one that is not the one trained against is refused, wherever it is looked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import factories
import pytest
import torch
from factories import EOS
from safetensors.torch import load_file, save_file
from saved import IDS, Saved, change_config, check_refused, check_same_logits
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointWrapper
from transformers import AutoModelForCausalLM

import calm
from calm import CalmForCausalLM, fingerprints, sources


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


def test_bases_that_did_not_change_are_left_as_recorded(
    pristine: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrapped, or rounded while they were loaded, they have other names or digests, and are the same weights."""
    wrapped, rounded = pristine.load(), pristine.load(dtype=torch.bfloat16).float()
    wrapped.anchor = torch.compile(wrapped.anchor)
    layers = wrapped.augmenting["augmenting"].h
    layers[0] = CheckpointWrapper(layers[0])
    caplog.clear()
    for number, model in enumerate((wrapped, rounded)):
        model.save_pretrained(tmp_path / str(number))
        loaded = CalmForCausalLM.from_pretrained(tmp_path / str(number))
        assert loaded.config.anchor_reference == pristine.model.config.anchor_reference
        assert loaded.config.augmenting_references == pristine.model.config.augmenting_references
    assert not caplog.records


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


# -- negative controls ------------------------------------------------------------------------------------------------


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
