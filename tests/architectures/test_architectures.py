"""Architectures in both roles, in mixes: all checks on each, rules for single architectures, and the docs' table."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import transformers
from checks import CheckFailed, check_cached, check_loaded, examine, measure_bare
from tiny import architectures, tiny_config, tiny_model
from transformers import PreTrainedModel

import calm
from calm import backbones

PAGE = Path(__file__).parents[2] / "docs" / "support-matrix.md"
ANCHORS = (
    "llama",
    "gemma",
    "gemma2",
    "gemma3_text",
    "qwen2",
    "qwen3",
    "mistral",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "falcon",
    "bloom",
    "olmo2",
    "mixtral",
    "gpt_oss",
)
# Every one also serves as the augmenting model of another.
MIXES = [*zip(ANCHORS, ANCHORS[5:] + ANCHORS[:5], strict=True), ("llama", "mamba")]


def anchor(architecture: str) -> PreTrainedModel:
    return tiny_model(tiny_config(architecture))


def augmenting(architecture: str, layers: int = 4) -> PreTrainedModel:
    """Narrower and deeper than the anchors."""
    return tiny_model(tiny_config(architecture, width=24, layers=layers, heads=2), seed=1)


@pytest.mark.parametrize("mix", MIXES, ids="-".join)
def test_mix(mix: tuple[str, str]) -> None:
    assert examine(anchor(mix[0]), augmenting(mix[1])) == []


# One of each kind that has a rule of its own: layers that depend on their number and a prefill that drops positions;
# recurrent and attention layers of which a cut must leave both; several residual streams; positions that do not start
# at 0; a head called `decoder`; a decoder out of an encoder-decoder.
@pytest.mark.parametrize(
    "mix",
    [
        ("gemma4_text", "nemotron_h"),
        ("qwen4_exp_text", "gemma3n_text"),
        ("gemma3n_text", "gemma4_text"),
        ("roberta", "minicpm3"),
        ("modernbert-decoder", "roberta"),
        ("bart", "deepseek_v4"),
    ],
    ids="-".join,
)
def test_mix_of_peculiar_architectures(mix: tuple[str, str]) -> None:
    bases = anchor(mix[0]), augmenting(mix[1], layers=3)
    bare = [measure_bare(base) for base in bases]
    # in transformers, Bart's decoder and DeepSeek-V4 see padding
    assert examine(*bases, *bare) == (["left padding"] if "bart" in mix else [])


def test_checks_notice_positions_that_are_not_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_OFFSET_POSITIONS", set())
    with pytest.raises(CheckFailed, match="cached decoding"):
        check_cached(anchor("roberta"), augmenting("llama"), 1e-4)


def test_checks_notice_a_cut_that_changes_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_UNCUTTABLE", set())
    with pytest.raises(CheckFailed, match="by path"):
        check_loaded(anchor("llama"), augmenting("minicpm3"), 1e-4)


def test_kept_depth() -> None:
    llama = tiny_config("llama", layers=6)
    assert [backbones.kept_depth(llama, depth) for depth in (1, 3, 6)] == [1, 3, 6]
    hybrid = tiny_config("jamba", layers=6)  # attention in layers 1, 3 and 5
    assert [backbones.kept_depth(hybrid, depth) for depth in (1, 2, 3, 6)] == [2, 2, 3, 6]
    recurrent = tiny_config("mamba", layers=6)
    assert backbones.kept_depth(recurrent, 1) == 1
    sharing = tiny_config("gemma3n_text", layers=6)
    assert backbones.kept_depth(sharing, 1) == 6


def table() -> dict[str, tuple[str, str]]:
    """Verdicts of the page by architecture: as anchor, as augmenting model."""
    rows = re.findall(r"^\| `([^`]+)` \| ([^|]+) \| ([^|]+) \|", PAGE.read_text(), re.MULTILINE)
    return {name: (first, second) for name, first, second in rows}


def test_page_lists_every_architecture() -> None:
    version = re.search(r"transformers (\S+),", PAGE.read_text())
    assert version is not None
    if version[1] != transformers.__version__:
        pytest.skip(f"the page is about transformers {version[1]}: run python docs/support_matrix.py")
    assert list(table()) == architectures()
    assert {verdict for row in table().values() for verdict in row} <= {"yes", "refused", "not tried"}


def test_page_says_what_is_refused() -> None:
    for architecture, verdicts in table().items():
        config = tiny_config(architecture)
        for role, verdict in zip(("anchor", "augmenting model"), verdicts, strict=True):
            if verdict == "refused":
                with pytest.raises(calm.UnsupportedModelError, match=re.escape(repr(config.model_type))):
                    backbones.check_supported(config, role)
            else:
                backbones.check_supported(config, role)


@pytest.mark.parametrize(
    ("architecture", "field", "value"),
    [
        ("llama", "is_causal", False),
        ("gemma3_text", "use_bidirectional_attention", True),
        ("bert", "is_decoder", False),
        ("bart", "is_encoder_decoder", True),
    ],
)
def test_configurations_that_see_the_future_are_refused(architecture: str, field: str, value: bool) -> None:
    config = tiny_config(architecture)
    backbones.check_supported(config, "anchor")
    setattr(config, field, value)
    if not config.is_encoder_decoder:
        assert measure_bare(tiny_model(config))["causality"] > 1e-2  # the refusal is not for nothing
    with pytest.raises(calm.UnsupportedModelError, match=architecture):
        backbones.check_supported(config, "anchor")


def test_compose_refuses_before_anything_is_loaded(tmp_path: Path) -> None:
    config = tiny_config("xlnet")
    config.save_pretrained(tmp_path)  # and no weights
    with pytest.raises(calm.UnsupportedModelError, match="'xlnet': it attends in both directions"):
        calm.compose(anchor("llama"), str(tmp_path), connections=1)
