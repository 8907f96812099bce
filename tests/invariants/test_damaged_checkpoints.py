"""Invariant 6, damage: every damaged checkpoint is refused, each with an error of its own."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved import Saved, check_refused, check_same_logits
from transformers import AutoModelForCausalLM

from calm import CalmForCausalLM


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
