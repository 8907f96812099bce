"""What does not fit is refused before weights are loaded, with the reason and the way out."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import engine
import pytest
import torch
from factories import CONTEXT, Mix, word_tokenizer
from safetensors.torch import load_file, save_file
from vllm import EngineArgs
from vllm.config import VllmConfig

import calm

PLAIN = Mix("llama", ("gpt2",))
CASES: dict[str, tuple[Mix, dict[str, object], str]] = {
    "prompt only": (Mix(attend="prompt"), {}, "attend='prompt'.*calm serve"),
    "architecture": (Mix("llama", ("falcon",)), {}, "augmenting model 'm0' has the architecture 'falcon'.*llama"),
    "architecture of the anchor": (Mix("bloom", ("llama",)), {}, "the anchor has the architecture 'bloom'"),
    "heads of a base": (
        Mix("llama", ("gpt2",), augmenting_shapes=((24, 4, 3),)),
        {"tensor_parallel_size": 2},
        "augmenting model 'm0' has 3 attention heads .* tensor_parallel_size=2",
    ),
    "heads of the connections": (
        Mix("llama", ("gpt2",), num_heads=1),
        {"tensor_parallel_size": 2},
        "connections have 1 heads, which tensor_parallel_size=2",
    ),
    "stages": (PLAIN, {"pipeline_parallel_size": 2}, "[Pp]ipeline"),
    "context": (
        PLAIN,
        {"max_model_len": CONTEXT, "hf_overrides": {"augmenting_configs": "short"}},
        f"max_model_len={CONTEXT} is beyond the context of the augmenting model 'm0', 32 tokens.*--max-model-len 32",
    ),
    "adapters": (PLAIN, {"enable_lora": True}, "LoRA"),
    "quantization": (PLAIN, {"quantization": "fp8"}, "quantization"),
    "scheduler": (PLAIN, {"scheduler_cls": "vllm.v1.core.sched.scheduler.Scheduler"}, "a scheduler class of your own"),
    "halves of a batch": (PLAIN, {"enable_dbo": True}, "dual batch overlap"),
    "embeddings": (PLAIN, {"enable_prompt_embeds": True}, "prompts as embeddings"),
    "parts of a prompt": (PLAIN, {"prefill_context_parallel_size": 2}, "prefill context parallelism"),
    "parts of a cache": (
        PLAIN.with_(augmenting_shapes=((24, 4, 4),)),  # vLLM asks for more ranks than the anchor has heads of keys
        {"tensor_parallel_size": 4, "decode_context_parallel_size": 2},
        "decode context parallelism",
    ),
    "load format": (PLAIN, {"load_format": "sharded_state"}, "load_format='sharded_state'.*safetensors"),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Mix], Path]:
    made: dict[Mix, Path] = {}

    def save(mix: Mix) -> Path:
        if mix not in made:
            made[mix] = tmp_path_factory.mktemp("composition")
            engine.save(mix, made[mix])
        return made[mix] / "composed"

    return save


def configure(folder: Path, **arguments: object) -> VllmConfig:
    """What vLLM does before it starts anything: here the refusals have to come."""
    return EngineArgs(**({"model": str(folder), "skip_tokenizer_init": True} | arguments)).create_engine_config()


@pytest.mark.parametrize("case", CASES)
def test_refused_before_anything_is_loaded(case: str, saved: Callable[[Mix], Path]) -> None:
    mix, arguments, message = CASES[case]
    folder = saved(mix)
    if "hf_overrides" in arguments:
        values = json.loads((folder / "config.json").read_text())["augmenting_configs"]
        values["m0"]["n_positions"] = 32
        arguments = arguments | {"hf_overrides": lambda config: _with(config, augmenting_configs=values)}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        configure(folder, **arguments)


def _with(config: calm.CalmConfig, **values: object) -> calm.CalmConfig:
    return type(config).from_dict(config.to_dict() | values)


def test_what_fits_is_not_refused(saved: Callable[[Mix], Path]) -> None:
    configure(saved(PLAIN))
    configure(saved(PLAIN), tensor_parallel_size=2)


OTHER_VERSION = """
import importlib.util, sys

class Finder:
    def find_spec(self, name, path, target=None):
        if name == "vllm._version":
            return importlib.util.spec_from_file_location(name, {file!r})
        if name == "vllm.compilation.decorators":
            raise ImportError(name)

sys.meta_path.insert(0, Finder())
"""
"""Begins every Python process as if another vLLM were installed, without something that compositions take."""

CONFIGURE = """
import sys
from vllm import EngineArgs
EngineArgs(model=sys.argv[1], skip_tokenizer_init=True).create_engine_config()
"""


def test_another_version_of_vllm(saved: Callable[[Mix], Path], tmp_path: Path) -> None:
    """In all of vLLM's processes, one of which imports the model's module to see what it can do."""
    file = tmp_path / "version.py"
    file.write_text("__version__ = '0.99.1'\n__version_tuple__ = (0, 99, 1)\n")
    (tmp_path / "sitecustomize.py").write_text(OTHER_VERSION.format(file=str(file)))
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    line = [sys.executable, "-c", CONFIGURE, str(saved(PLAIN))]
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "CalmError: vLLM 0.99.1 is installed; compositions are served by vLLM <0.33,>=0.32.0. Install" in said
    assert "calm serve MODEL --engine transformers" in said


def edited(folder: Path, target: Path) -> Path:
    """A copy of a composition and its bases, to change something in."""
    shutil.copytree(folder.parent, target)
    config = target / "composed" / "config.json"
    config.write_text(config.read_text().replace(str(folder.parent), str(target)))
    return target


def test_other_tokenizers(saved: Callable[[Mix], Path], tmp_path: Path) -> None:
    folder = edited(saved(PLAIN), tmp_path / "copy")
    word_tokenizer().save_pretrained(folder / "anchor")
    word_tokenizer().save_pretrained(folder / "m0")
    configure(folder / "composed")
    word_tokenizer(prefix="x").save_pretrained(folder / "m0")
    with pytest.raises(ValueError, match="different tokenizers"):
        configure(folder / "composed")


def test_a_base_that_moved(saved: Callable[[Mix], Path], tmp_path: Path) -> None:
    folder = edited(saved(PLAIN), tmp_path / "copy")
    (folder / "m0").rename(folder / "moved")
    with pytest.raises(ValueError, match=r"augmenting model 'm0' is recorded as .* not there"):
        configure(folder / "composed")


@pytest.mark.parametrize("base", ["anchor", "m0", "m1"])
def test_a_base_that_moved_is_named_as_the_error_says(base: str, saved: Callable[[Mix], Path], tmp_path: Path) -> None:
    """And is otherwise the recorded one, its fingerprint included; so are the other bases."""
    folder = edited(saved(Mix("llama", ("gpt2", "qwen2"))), tmp_path / "copy")
    before = configure(folder / "composed").model_config.hf_config
    (folder / base).rename(folder / "moved")
    with pytest.raises(ValueError, match="not there") as refused:
        configure(folder / "composed")
    option = re.search(r"--hf-overrides '(.*?)'", str(refused.value))
    overrides = json.loads(option[1].replace("PATH", str(folder / "moved")))
    after = configure(folder / "composed", hf_overrides=overrides).model_config.hf_config
    expected = {"anchor": before.anchor_reference} | before.augmenting_references
    expected[base] = expected[base] | {"name_or_path": str(folder / "moved")}
    found = {"anchor": after.anchor_reference} | after.augmenting_references
    assert found.keys() == expected.keys() and found[base]["fingerprint"]
    for name, reference in found.items():
        assert reference == {key: value for key, value in expected[name].items() if key in reference}
        assert reference.keys() >= {"name_or_path", "fingerprint", "dtype"}


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"anchor_reference": "PATH"}, r"'PATH': expected a reference .*{\"anchor_reference\": {\"name_or_path"),
        ({"augmenting_references": {"m0": "PATH"}}, r"'PATH': expected a reference .*\"m0\": {\"name_or_path"),
        ({"augmenting_references": {"third": {}}}, r"={'third': {}}: expected .* names, which are \['m0'\]"),
        ({"augmenting_references": "PATH"}, r"='PATH': expected .* names, which are \['m0'\]"),
    ],
)
def test_places_in_another_form(overrides: dict[str, object], message: str, saved: Callable[[Mix], Path]) -> None:
    with pytest.raises(ValueError, match=message):
        configure(saved(PLAIN), hf_overrides=overrides)


def test_a_base_with_another_configuration(saved: Callable[[Mix], Path], tmp_path: Path) -> None:
    folder = edited(saved(PLAIN), tmp_path / "copy")
    file = folder / "anchor" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rms_norm_eps": 0.5}))
    with pytest.raises(ValueError, match=r"the anchor has rms_norm_eps=0\.5"):
        configure(folder / "composed")


@pytest.mark.parametrize("base", ["anchor", "m0"])
def test_a_base_with_one_changed_weight(base: str, saved: Callable[[Mix], Path], tmp_path: Path) -> None:
    folder = edited(saved(PLAIN), tmp_path / "copy")
    with engine.serving(folder / "composed"):
        pass  # unchanged, it is loaded
    weights = load_file(folder / base / "model.safetensors")
    name = next(name for name in sorted(weights) if name.endswith(("mlp.c_fc.weight", "mlp.up_proj.weight")))
    weights[name][0, 0] += 0.1
    save_file(weights, folder / base / "model.safetensors", {"format": "pt"})
    role = "the anchor" if base == "anchor" else "the augmenting model 'm0'"
    with (
        pytest.raises(calm.CheckpointError, match=f"weights of {role} .* not those"),
        engine.serving(folder / "composed"),
    ):
        pass


def test_the_weights_of_a_base_that_moved(saved: Callable[[Mix], Path], tmp_path: Path) -> None:
    """Are loaded from where it is now, if they are the ones composed."""
    folder = edited(saved(PLAIN), tmp_path / "copy")
    (folder / "m0").rename(folder / "moved")
    place = {"augmenting_references": {"m0": {"name_or_path": str(folder / "moved")}}}
    with engine.serving(folder / "composed", hf_overrides=place):
        pass
    weights = load_file(folder / "moved" / "model.safetensors")
    weights = {name: weight + 0.1 for name, weight in weights.items()}
    save_file(weights, folder / "moved" / "model.safetensors", {"format": "pt"})
    with (
        pytest.raises(calm.CheckpointError, match=r"weights of the augmenting model 'm0' .* not those"),
        engine.serving(folder / "composed", hf_overrides=place),
    ):
        pass


LOST = ["connections.1.w_k.weight", "connections.1.gate.weight", "connections.1.gate.bias"]


@pytest.mark.parametrize("name", LOST)
def test_a_composition_that_lost_a_weight(saved: Callable[[Mix], Path], tmp_path: Path, name: str) -> None:
    folder = edited(saved(PLAIN), tmp_path / "copy")
    weights = load_file(folder / "composed" / "model.safetensors")
    del weights[name]
    refused(folder, weights, f"'{re.escape(name)}' is missing")


@pytest.mark.parametrize("attention", ["normalized", "paper"])
def test_a_gate_where_none_should_be(attention: str, saved: Callable[[Mix], Path], tmp_path: Path) -> None:
    folder = edited(saved(PLAIN.with_(attention=attention)), tmp_path / "copy")
    weights = load_file(folder / "composed" / "model.safetensors")
    weights["connections.1.gate.bias"] = torch.ones(1)
    refused(folder, weights, r"'connections\.1\.gate\.bias' is unexpected")


@pytest.mark.parametrize(
    ("name", "shape"),
    [("w_o.weight", (16, 32)), ("f_proj.weight", (24, 32)), ("gate.weight", (1, 1)), ("gate.bias", ())],
)
def test_a_weight_of_another_shape(
    name: str, shape: tuple[int, ...], saved: Callable[[Mix], Path], tmp_path: Path
) -> None:
    """Those of the gate's would be copied all the same, one number to every place."""
    folder = edited(saved(PLAIN), tmp_path / "copy")
    weights = load_file(folder / "composed" / "model.safetensors")
    weights[f"connections.0.{name}"] = torch.ones(shape)
    refused(folder, weights, re.escape(f"'connections.0.{name}' has shape {shape}, expected"))


def refused(folder: Path, weights: dict[str, torch.Tensor], message: str) -> None:
    """With these weights, the composition beside its bases is not loaded."""
    save_file(weights, folder / "composed" / "model.safetensors", {"format": "pt"})
    with pytest.raises(calm.CheckpointError, match=message), engine.serving(folder / "composed"):
        pass


def test_a_backend_without_slopes(saved: Callable[[Mix], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calm.serving.vllm.connection, "ALIBI_BACKENDS", ("NONE", "TRITON_ATTN"))
    with (
        pytest.raises(
            calm.CalmError, match=r"backend CPU_ATTN does not apply ALiBi slopes.*--attention-backend TRITON"
        ),
        engine.serving(saved(PLAIN)),
    ):
        pass
    with engine.serving(saved(Mix("llama", ("gpt2",), attention="paper"))):
        pass  # which has none


def test_bfloat16_bases_are_the_ones_composed(tmp_path: Path) -> None:
    engine.save(PLAIN, tmp_path, torch.bfloat16)
    with engine.serving(tmp_path / "composed"):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bases_that_were_rounded_when_they_were_composed(
    dtype: torch.dtype, saved: Callable[[Mix], Path], tmp_path: Path
) -> None:
    folder = edited(saved(PLAIN), tmp_path / "copy")
    composed = calm.compose(str(folder / "anchor"), {"m0": str(folder / "m0")}, 1, dtype=dtype)
    composed.save_pretrained(folder / "composed")
    with engine.serving(folder / "composed"):
        pass
