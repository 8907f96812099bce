"""TRL's trainers on a composed model: their losses are the model's own, and only connections are trained and saved."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import datasets
import factories
import pytest
import torch
import trl
from bases import byte_tokenizer, save_base, sums, write_jsonl
from datasets import Dataset
from factories import assert_identical
from packaging.version import Version
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import BloomConfig, BloomForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import calm

pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason="the first TRL whose losses go through base_model"
)
EXAMPLES = sums(22)
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"{row['completion']}0"} for row in EXAMPLES
]
EVERY_STEP = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "use_cpu": True}
EXACT = {**EVERY_STEP, "bf16": False}  # TRL computes in bfloat16 by default


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """The folder of a composition whose connections matter, with its tokenizer; its anchor has no dropout."""
    folder = tmp_path_factory.mktemp("trl")
    anchor = save_base(folder / "anchor", tokenizer, seed=0, attention_dropout=0.0)
    augmenting = save_base(folder / "augmenting", tokenizer, seed=1, width=24)
    torch.manual_seed(0)
    factories.perturb(calm.compose(anchor, augmenting, 2)).save_pretrained(folder / "composed")
    tokenizer.save_pretrained(folder / "composed")
    return str(folder / "composed")


def load(folder: str) -> calm.CalmForCausalLM:
    return calm.CalmForCausalLM.from_pretrained(folder)


def loss_of(model: calm.CalmForCausalLM, tokenizer: PreTrainedTokenizerFast) -> float:
    """The mean loss of the completions' tokens, one example at a time and from whole logits."""
    losses = []
    for example in EXAMPLES:
        prompt = tokenizer(example["prompt"])["input_ids"]
        answer = tokenizer(example["completion"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        losses += cross_entropy(logits, torch.tensor(answer), reduction="none").tolist()
    return sum(losses) / len(losses)


def logged(trainer: Any, key: str = "loss") -> list[float]:
    return [log[key] for log in trainer.state.log_history if key in log]


def sft(
    model: calm.CalmForCausalLM | str, tokenizer: PreTrainedTokenizerFast | None, output_dir: Path, **settings: Any
) -> SFTTrainer:
    return SFTTrainer(
        model,
        args=SFTConfig(str(output_dir), **settings),
        train_dataset=Dataset.from_list(EXAMPLES),
        processing_class=tokenizer,
    )


def test_sft_by_default(composed: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """With bfloat16 and activation checkpointing, TRL's defaults: it learns, and only connections change."""
    model = load(composed)
    bases = factories.digests(model.anchor) | factories.digests(model.augmenting)
    before = loss_of(model, tokenizer)
    trainer = sft(model, tokenizer, tmp_path, **{**EVERY_STEP, "max_steps": 15, "save_steps": 10})
    assert trainer.args.bf16 and trainer.args.gradient_checkpointing
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0] - 1
    assert loss_of(model.eval(), tokenizer) < before - 1
    assert factories.digests(model.anchor) | factories.digests(model.augmenting) == bases
    assert all(weight.grad is None for name, weight in model.named_parameters() if "connections" not in name)

    trainer.save_model()
    for folder in (tmp_path, tmp_path / "checkpoint-10"):
        weights = load_file(folder / "model.safetensors")
        assert set(weights) == {name for name in model.state_dict() if name.startswith("connections.")}
    ours = {"config.json", "generation_config.json", "model.safetensors"}
    trls = {"README.md", "training_args.bin", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in tmp_path.iterdir() if file.is_file()} == ours | trls
    ids = factories.tokens(2, 9)
    forward = type(model).forward  # that of the instance stays in bfloat16
    assert_identical(load(str(tmp_path))(ids).logits, forward(model, ids).logits)
    resumed = sft(load(composed), tokenizer, tmp_path, **{**EVERY_STEP, "max_steps": 15})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-10"))
    assert logged(resumed) == logged(trainer)


def test_sft_by_name(composed: str, tmp_path: Path) -> None:
    trainer = sft(composed, None, tmp_path, **EXACT)
    trainer.train()
    assert isinstance(trainer.model, calm.CalmForCausalLM) and logged(trainer)[-1] < logged(trainer)[0]


def test_sft_loss_is_that_of_the_completions(composed: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    expected = loss_of(load(composed), tokenizer)
    one_batch = {**EXACT, "max_steps": 1, "per_device_train_batch_size": len(EXAMPLES)}
    for completion_only, same in ((None, True), (True, True), (False, False)):
        trainer = sft(load(composed), tokenizer, tmp_path, completion_only_loss=completion_only, **one_batch)
        trainer.train()
        assert (logged(trainer)[0] == pytest.approx(expected, rel=1e-5)) == same


def test_sft_gradients_are_the_models_own(composed: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """TRL's loss of a padded batch, with activation checkpointing, against `model(labels=...)` without."""
    trainer = sft(load(composed), tokenizer, tmp_path, **EXACT)
    batch = next(iter(trainer.get_train_dataloader()))
    assert (batch["attention_mask"] == 0).any()
    trainer.model.train().activation_checkpointing_enable()
    trainer.compute_loss(trainer.model, dict(batch)).backward()
    model = load(composed).train()
    model(**batch).loss.backward()
    for name, weight in model.connections.named_parameters():
        factories.assert_same(trainer.model.connections.get_parameter(name).grad, weight.grad)


def test_packing(composed: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Packed examples give the loss and the gradients of single ones; not so where connections look over borders."""
    model = load(composed)
    one_batch = {**EXACT, "max_steps": 1, "per_device_train_batch_size": len(EXAMPLES)}

    def first_step(**settings: Any) -> list[float]:
        trainer = sft(load(composed), tokenizer, tmp_path, **one_batch, **settings)
        batch = next(iter(trainer.get_train_dataloader()))
        assert batch["input_ids"].shape[0] == (1 if settings else len(EXAMPLES))
        trainer.train()
        return logged(trainer) + logged(trainer, "grad_norm")

    packing = {"packing": True, "max_length": model.context_length}
    apart = first_step()
    assert first_step(**packing) == pytest.approx(apart, rel=1e-4)
    with factories.patched(calm.model, find_packed_sequence_indices=lambda positions: None):
        assert first_step(**packing) != pytest.approx(apart, rel=1e-3)


def test_packing_is_refused_where_examples_would_mix(
    composed: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    bloom = BloomForCausalLM(
        BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
    )
    model = calm.compose(bloom, load(composed).anchor, 2)
    trainer = sft(model, tokenizer, tmp_path, **EXACT, packing=True, max_length=64)
    with pytest.raises(calm.CalmError, match=r"the anchor.*'bloom'.*packing=False and padding_free=False in TRL"):
        trainer.train()


def dpo(
    model: calm.CalmForCausalLM, tokenizer: PreTrainedTokenizerFast, output_dir: Path, **settings: Any
) -> DPOTrainer:
    return DPOTrainer(
        model,
        args=DPOConfig(str(output_dir), **EXACT, **settings),
        train_dataset=Dataset.from_list(PAIRS),
        processing_class=tokenizer,
    )


def test_dpo(composed: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The reference is the composition as it was at the start: loaded again, or its scores computed beforehand."""
    start, losses = load(composed), []
    ids = factories.tokens(2, 9)
    for settings in ({}, {"precompute_ref_log_probs": True}):
        model = load(composed)
        bases = factories.digests(model.anchor) | factories.digests(model.augmenting)
        trainer = dpo(model, tokenizer, tmp_path, **settings)
        trainer.train()
        losses.append(logged(trainer))
        assert factories.digests(model.anchor) | factories.digests(model.augmenting) == bases
        if settings:
            assert trainer.ref_model is None
        else:
            assert_identical(trainer.ref_model.eval()(ids).logits, start(ids).logits)
        trainer.save_model()
        assert_identical(load(str(tmp_path))(ids).logits, model.eval()(ids).logits)
        assert not torch.equal(model(ids).logits, start(ids).logits)
    assert losses[0][0] == pytest.approx(math.log(2), rel=1e-5)
    assert losses[0][-1] < 0.9 * losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def test_the_documentations_examples(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every example of "With TRL and PEFT", one after another, on two tiny models."""
    page = Path(__file__).parents[2] / "docs" / "training.md"
    _, _, section = page.read_text().partition("## With TRL and PEFT\n")
    examples = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(examples) == 4
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save_base(Path("path/to/anchor"), tokenizer, seed=0, layers=4)
    save_base(Path("path/to/augmenting"), tokenizer, seed=1, width=24, layers=4)
    write_jsonl(Path("train.jsonl"), EXAMPLES)
    write_jsonl(Path("pairs.jsonl"), PAIRS)
    names: dict[str, Any] = {}
    for example in examples:
        exec(example.replace("Config(output_dir", "Config(use_cpu=True, output_dir"), names)  # else TRL wants a GPU
    for saved in ("sft/model", "dpo/model", "lora/adapter_model", "composition/model", "adapter/adapter_model"):
        assert Path(f"runs/{saved}.safetensors").is_file()
