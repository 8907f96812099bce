"""config.py: CalmConfig through JSON, its defaults, and every choice that is refused."""

from __future__ import annotations

import json
from pathlib import Path

import factories
import pytest
from transformers import AutoConfig, GPT2Config, MambaConfig

from calm.checkpoint import read_config
from calm.config import CalmConfig, depth_of, width_of
from calm.errors import CalmError, CheckpointError

PAIRS = [{"augmenting": "a", "augmenting_layer": i, "anchor_layer": i + 1} for i in (0, 2)]


def make(**kwargs: object) -> CalmConfig:
    defaults = {
        "anchor_config": factories.config("gemma3_text"),
        "augmenting_configs": {"a": factories.config("gpt2", 24, 4, 2)},
        "connections": PAIRS,
        "anchor_reference": {"name_or_path": "x/y", "revision": "main", "gguf_file": None, "fingerprint": {"a": "b"}},
    }
    return CalmConfig(**defaults | kwargs)


@pytest.mark.parametrize("anchor", factories.ANCHORS)
def test_through_a_file(anchor: str, tmp_path: Path) -> None:
    config = make(anchor_config=factories.config(anchor), num_heads=8, attention="paper", attend="prompt")
    config.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    assert values["model_type"] == "calm" and values["format_version"] == 1
    for loaded in (CalmConfig.from_pretrained(tmp_path), AutoConfig.from_pretrained(tmp_path)):
        assert isinstance(loaded, CalmConfig)
        assert type(loaded.anchor_config) is type(config.anchor_config)
        assert type(loaded.augmenting_configs["a"]) is GPT2Config
        assert loaded.to_dict() | {"_name_or_path": ""} == config.to_dict()
        assert loaded.layer_pairs == config.layer_pairs
        assert (loaded.num_heads, loaded.attention, loaded.attend) == (8, "paper", "prompt")


def test_defaults() -> None:
    config = make(anchor_config=factories.config("llama", 32, 4, 2))
    assert (config.num_heads, config.attention, config.attend) == (2, "gated", "causal")
    assert config.augmenting_depth("a") == 3
    assert [pair.to_dict() for pair in config.layer_pairs] == PAIRS


def test_looks_like_its_anchor() -> None:
    config = make()
    text = config.get_text_config(decoder=True)
    assert (text.vocab_size, text.num_hidden_layers) == (factories.VOCAB, 4)
    assert (config.vocab_size, config.hidden_size) == (factories.VOCAB, 32)
    assert CalmConfig.from_dict(config.to_dict() | {"vocab_size": factories.VOCAB}).to_dict() == config.to_dict()
    with pytest.raises(CalmError, match=r"vocab_size=3: a composition's is its anchor's, 64"):
        CalmConfig.from_dict(config.to_dict() | {"vocab_size": 3})
    assert config.to_json_string()


@pytest.mark.parametrize("architecture", factories.CONFIGS)
def test_sizes_of_a_base(architecture: str) -> None:
    config = factories.config(architecture, 24, 2, 2)
    assert (width_of(config), depth_of(config)) == (24, 2)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"num_heads": 5}, ["num_heads=5", "32", "4"]),
        ({"num_heads": 0}, ["num_heads=0", "32"]),
        ({"num_heads": 64}, ["num_heads=64", "32"]),
        ({"num_heads": "x"}, ["num_heads='x'", "whole number", "32"]),
        ({"num_heads": 2.0}, ["num_heads=2.0", "whole number", "32"]),
        ({"num_heads": True}, ["num_heads=True", "whole number", "32"]),
        ({"attention": "linear"}, ["attention='linear'", "'gated'", "'normalized'", "'paper'"]),
        ({"attend": "both"}, ["attend='both'", "'causal'", "'prompt'"]),
        ({"connections": [PAIRS[0] | {"augmenting": "b"}]}, ["['b']", "['a']"]),
        ({"connections": [PAIRS[0], PAIRS[0]]}, ["twice"]),
        ({"connections": [PAIRS[0] | {"anchor_layer": 4}]}, ["layer 4", "anchor"]),
        ({"connections": []}, ["none given"]),
    ],
)
def test_refused(kwargs: dict, words: list[str]) -> None:
    with pytest.raises(CalmError) as error:
        make(**kwargs)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_an_anchor_without_heads_wants_a_number() -> None:
    anchor = MambaConfig(hidden_size=32, num_hidden_layers=4)
    with pytest.raises(CalmError, match=r"num_heads=None.*mamba.*divisor of its width 32"):
        make(anchor_config=anchor)
    assert make(anchor_config=anchor, num_heads=4).num_heads == 4


def test_of_a_newer_format() -> None:
    with pytest.raises(CheckpointError, match=r"format version 2.*reads up to 1.*Upgrade"):
        make(format_version=2)


@pytest.mark.parametrize(
    ("kwargs", "words"),
    [
        ({"format_version": None}, ["format_version=None", "whole number"]),
        ({"format_version": "1"}, ["format_version='1'", "whole number"]),
        ({"connections": [{"augmenting": "a"}]}, ["'augmenting_layer'"]),
        ({"connections": [PAIRS[0] | {"augmenting": ["a"]}]}, ["connections=", "'augmenting_layer'"]),
        ({"connections": 5}, ["connections=5", "a list"]),
        ({"anchor_config": None}, ["is None", "configuration"]),
        ({"anchor_config": 3}, ["is 3", "configuration"]),
        ({"anchor_config": {"model_type": "no-such-type"}}, ["no-such-type"]),
        ({"anchor_config": {"model_type": "llama", "hidden_size": "wide"}}, ["hidden_size"]),
        ({"augmenting_configs": {"a": None}}, ["is None", "configuration"]),
        ({"augmenting_configs": [1]}, ["augmenting_configs=[1]", "by name"]),
        ({"anchor_reference": "x/y"}, ["anchor_reference='x/y'", "dictionary"]),
        ({"augmenting_references": ["x"]}, ["augmenting_references=['x']", "by name"]),
    ],
)
def test_of_a_damaged_checkpoint(kwargs: dict, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        make(**kwargs)
    assert all(word in str(error.value) for word in words), str(error.value)
    make().save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | kwargs))
    with pytest.raises(CheckpointError):
        read_config(tmp_path)
