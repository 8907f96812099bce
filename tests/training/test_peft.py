"""LoRA on the anchor together with the composition: both trained, both saved and loaded, the bases as they were."""

from __future__ import annotations

import logging
from pathlib import Path

import factories
import peft
import pytest
import torch
import trl
from bases import byte_tokenizer, save_base, sums
from datasets import Dataset
from factories import assert_identical
from packaging.version import Version
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import calm

pytestmark = pytest.mark.skipif(
    Version(trl.__version__) < Version("1.16"), reason="the first TRL whose losses go through base_model"
)
IDS = factories.tokens(2, 9)
EVERY_STEP = {"max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 2, "use_cpu": True}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerFast) -> str:
    """The folder of a composition whose connections matter, the first of them at the anchor's second layer."""
    folder = tmp_path_factory.mktemp("peft")
    anchor = save_base(folder / "anchor", tokenizer, seed=0, layers=3, attention_dropout=0.0)
    augmenting = save_base(folder / "augmenting", tokenizer, seed=1, width=24)
    torch.manual_seed(0)
    factories.perturb(calm.compose(anchor, augmenting, [(0, 1), (1, 2)])).save_pretrained(folder / "composed")
    return str(folder / "composed")


def load(folder: str | Path) -> calm.CalmForCausalLM:
    return calm.CalmForCausalLM.from_pretrained(folder)


def both(model: calm.CalmForCausalLM) -> LoraConfig:
    """LoRA on the anchor, and the connections trained whole."""
    return LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=r"anchor\..*(q_proj|v_proj)",
        modules_to_save=[f"connections.{i}" for i in range(len(model.connections))],
    )


def base_weights(model: torch.nn.Module) -> dict[str, bytes]:
    """Of both bases, by the names they have without an adapter."""
    return {
        name[name.index("anchor") if "anchor" in name else name.index("augmenting") :].replace(".base_layer", ""): bits
        for name, bits in factories.digests(model).items()
        if "lora_" not in name and "connections" not in name
    }


def logged(trainer: Trainer) -> list[float]:
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def batch(tokenizer: PreTrainedTokenizerFast) -> dict[str, Tensor]:
    ids = tokenizer([row["prompt"] + row["completion"] for row in sums(4)], return_tensors="pt", padding=True)
    return {**ids, "labels": ids["input_ids"].masked_fill(ids["attention_mask"] == 0, -100)}


@pytest.mark.parametrize("skip_logits", [False, True])
def test_adapters_below_the_first_connection_get_gradients(
    composed: str, tokenizer: PreTrainedTokenizerFast, skip_logits: bool
) -> None:
    """With activation checkpointing the same ones; and no more is back-propagated than they ask for."""
    found = []
    for checkpointing in (False, True):
        model = load(composed).train()
        torch.manual_seed(1)
        lora = LoraConfig(target_modules=["q_proj"], layers_to_transform=[0], init_lora_weights=False)
        model.anchor.add_adapter(lora)
        if checkpointing:
            model.activation_checkpointing_enable()
        embedded = []
        model.get_input_embeddings().register_forward_hook(lambda *call, seen=embedded: seen.append(call[-1]))
        model(**batch(tokenizer), skip_logits=skip_logits).loss.backward()
        assert not embedded[0].requires_grad
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad})
    plain, checkpointed = found
    assert sum("lora_" in name for name in plain) == 2
    for name, gradient in plain.items():
        assert gradient.norm() > 0
        factories.assert_same(checkpointed[name], gradient)


def test_reentrant_checkpointing_is_refused(composed: str) -> None:
    """It would silently leave the first connection, and adapters below it, without gradients."""
    with pytest.raises(calm.CalmError, match="pass use_reentrant=False"):
        load(composed).activation_checkpointing_enable({"use_reentrant": True})


def test_both_in_peft_with_sft(composed: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """One adapter folder holds what is trained; checkpoints of it are resumed from."""

    def sft() -> SFTTrainer:
        model = load(composed)
        return SFTTrainer(
            model,
            args=SFTConfig(str(tmp_path), **EVERY_STEP, bf16=False),
            train_dataset=Dataset.from_list(sums(22)),
            processing_class=tokenizer,
            peft_config=both(model),
        )

    trainer = sft()
    start = {name: weight.clone() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert sum("lora_" in name for name in start) == 12 and sum("connections" in name for name in start) == 14
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0] - 0.2
    assert base_weights(trainer.model) == base_weights(load(composed))
    assert all(not torch.equal(weight, trainer.model.get_parameter(name)) for name, weight in start.items())

    trainer.save_model()
    assert len(load_file(tmp_path / "adapter_model.safetensors")) == len(start)
    assert not (tmp_path / "model.safetensors").exists()
    again = PeftModel.from_pretrained(load(composed), tmp_path).eval()
    assert_identical(again(IDS).logits, trainer.model.eval()(IDS).logits)
    assert not torch.equal(again(IDS).logits, load(composed)(IDS).logits)
    with again.disable_adapter():
        assert_identical(again(IDS).logits, load(composed)(IDS).logits)
    by_name = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    assert_identical(by_name(IDS).logits, again(IDS).logits)

    resumed = sft()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert logged(resumed) == pytest.approx(logged(trainer), rel=1e-6)


def test_both_in_peft_with_dpo(composed: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """The reference is the composition without the adapter: no second model."""
    model = load(composed)
    trainer = DPOTrainer(
        model,
        args=DPOConfig(str(tmp_path), **EVERY_STEP, bf16=False),
        train_dataset=Dataset.from_list(
            [{"prompt": row["prompt"], "chosen": row["completion"], "rejected": "no"} for row in sums(22)]
        ),
        processing_class=tokenizer,
        peft_config=both(model),
    )
    trainer.train()
    assert trainer.ref_model is None
    assert logged(trainer)[0] == pytest.approx(torch.tensor(2.0).log().item(), rel=1e-5)
    assert logged(trainer)[-1] < 0.8 * logged(trainer)[0]
    with trainer.model.eval().disable_adapter():
        assert_identical(trainer.model(IDS).logits, load(composed)(IDS).logits)


def test_the_composition_is_not_saved_without_what_peft_trained_of_it(composed: str, tmp_path: Path) -> None:
    model = load(composed)
    adapted = peft.get_peft_model(model, both(model))
    with pytest.raises(calm.CheckpointError, match="save the PeftModel"):
        adapted.get_base_model().save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("part", ["anchor", "augmenting"])
def test_bases_that_have_an_adapter_before_they_are_composed(composed: str, tmp_path: Path, part: str) -> None:
    """They are given again with it, PEFT's model or the one within; what their name says is not enough."""
    folders = {name: Path(composed).parent / name for name in ("anchor", "augmenting")}
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    torch.manual_seed(2)
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folders[part]), lora).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    model = factories.perturb(calm.compose(**{**folders, part: adapted}, connections=[(0, 1), (1, 2)]))
    assert not torch.equal(model(IDS).logits, load(composed)(IDS).logits)
    model.save_pretrained(tmp_path / "out")
    assert "with an adapter" in (tmp_path / "out" / "README.md").read_text()

    with pytest.raises(calm.CheckpointError, match=rf"{part}.*had an adapter.*{folders[part]}.*pass {part}= with it"):
        load(tmp_path / "out")
    with pytest.raises(calm.CheckpointError, match=rf"weights of the {part}"):
        calm.CalmForCausalLM.from_pretrained(tmp_path / "out", **{part: folders[part]})
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folders[part]), tmp_path / "adapter")
    within = AutoModelForCausalLM.from_pretrained(folders[part])
    within.load_adapter(tmp_path / "adapter")
    for given in (again, within):
        loaded = calm.CalmForCausalLM.from_pretrained(tmp_path / "out", **{part: given}).eval()
        assert_identical(loaded(IDS).logits, model(IDS).logits)


def test_a_merged_adapter_is_not_lost(composed: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The merged anchor is another one, which a composition that is saved with it asks for."""
    model = load(composed)
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"], init_lora_weights=False)
    model.anchor = peft.get_peft_model(model.anchor, lora).merge_and_unload()
    assert not torch.equal(model.eval()(IDS).logits, load(composed)(IDS).logits)
    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "out")
    assert "weights of the anchor are not those that this composition was made with" in caplog.text
    model.anchor.save_pretrained(tmp_path / "merged")
    with pytest.raises(calm.CheckpointError, match="weights of the anchor"):
        load(tmp_path / "out")
    loaded = calm.CalmForCausalLM.from_pretrained(tmp_path / "out", anchor=tmp_path / "merged").eval()
    assert_identical(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize("skip_logits", [False, True])
def test_both_apart(
    composed: str,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    skip_logits: bool,
) -> None:
    """The composition saved as ever, and the adapter as that of the anchor."""
    model = load(composed)
    model.anchor.add_adapter(LoraConfig(target_modules=["q_proj", "v_proj"]))
    arguments = TrainingArguments(str(tmp_path / "run"), **EVERY_STEP, report_to="none", save_strategy="no")
    rows = [{**batch(tokenizer), "skip_logits": skip_logits}] * 4
    trainer = Trainer(model, arguments, train_dataset=rows, data_collator=lambda rows: rows[0])
    trainer.train()
    assert logged(trainer)[-1] < logged(trainer)[0] - 0.2
    assert base_weights(model) == base_weights(load(composed))
    expected = model.eval()(IDS).logits

    with caplog.at_level(logging.WARNING):
        model.save_pretrained(tmp_path / "composition")
    assert "model.anchor.save_pretrained(FOLDER)" in caplog.text
    model.anchor.save_pretrained(tmp_path / "adapter")
    assert set(load_file(tmp_path / "composition" / "model.safetensors")) == set(
        load_file(Path(composed, "model.safetensors"))
    )
    assert all("lora_" in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors"))

    again = load(tmp_path / "composition")
    assert not torch.equal(again(IDS).logits, expected)
    again.anchor.load_adapter(tmp_path / "adapter")
    assert_identical(again.eval()(IDS).logits, expected)
    caplog.clear()
    again.save_pretrained(tmp_path / "again")  # the adapter does not train here, and is where it was
    assert not caplog.records
