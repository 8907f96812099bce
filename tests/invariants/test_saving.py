"""Invariant 6: saved and loaded again, the logits are the same, and a save that fails leaves the checkpoint before it.

The bases that are then looked for: test_right_bases.py; damaged files: test_damaged_checkpoints.py.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import factories
import pytest
import strategies
import torch
from bases import cache_as
from factories import Mix, assert_identical
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from saved import IDS, Saved, check_refused, check_same_logits
from transformers import AutoModelForCausalLM

import calm
from calm import CalmForCausalLM, CheckpointError, sources


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
