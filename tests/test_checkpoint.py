"""checkpoint.py: the folder that is uploaded and its model card (saving itself: invariants/test_saving.py)."""

from __future__ import annotations

import json
import re
import stat
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import factories
import httpx2
import pytest
import torch
import yaml
from bases import byte_tokenizer
from factories import Mix
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, ModelCard
from huggingface_hub.errors import RevisionNotFoundError
from safetensors.torch import load
from transformers import GenerationConfig

import calm
from calm import checkpoint, sources


def composition(**references: str) -> calm.CalmForCausalLM:
    """As if composed from the hub."""
    model = Mix(anchor="gemma3_text", augmenting=("gpt2", "mamba"), connections=(((1, 1), (3, 3)), ((0, 2),))).build()
    model.config.anchor_reference |= {"name_or_path": "someone/anchor-1b", "revision": "v2"}
    model.config.augmenting_references["m0"] |= {"name_or_path": "other/expert", "gguf_file": "expert-q8.gguf"}
    return model


def check_card(text: str, model: calm.CalmForCausalLM) -> None:
    _, header, body = text.split("---\n", 2)
    metadata = yaml.safe_load(header)
    assert metadata["base_model"] == ["someone/anchor-1b", "other/expert"]
    assert metadata["library_name"] == "calm-lm"
    assert metadata["pipeline_tag"] == "text-generation"
    assert {"calm", "composition"} <= set(metadata["tags"])
    assert "# A composition of 3 language models" in body
    assert "`someone/anchor-1b` at `v2` (gemma3_text)" in body
    assert "`m0`: `other/expert` file `expert-q8.gguf` (gpt2)" in body
    assert "`m1`: `given by hand` (mamba)" in body or "`m1`: given by hand (mamba)" in body
    assert f"{sum(p.numel() for p in model.connections.parameters()):,} composition parameters" in body
    assert "3 connections (4 heads" in body
    for pair in model.config.layer_pairs:
        assert f"| {pair.augmenting} | {pair.augmenting_layer} | {pair.anchor_layer} |" in body


def test_card() -> None:
    model = composition()
    count = sum(p.numel() for p in model.connections.parameters())
    check_card(str(checkpoint.model_card(model.config, count)), model)


def test_card_without_names_names_no_base_model() -> None:
    card = str(checkpoint.model_card(Mix().shared().config, 5))
    assert "base_model" not in yaml.safe_load(card.split("---\n")[1])


@pytest.mark.parametrize("folder", ["here", "moved since"])
def test_card_does_not_publish_local_folders(folder: str, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    model = composition()
    model.config.anchor_reference["name_or_path"] = str(tmp_path / folder)
    model.config.augmenting_references["m1"]["name_or_path"] = str(tmp_path / folder)
    card = str(checkpoint.model_card(model.config, 5))
    assert str(tmp_path.parent) not in card
    assert f"anchor: `{folder}` at `v2` (gemma3_text)" in card and f"`m1`: `{folder}` (mamba)" in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["other/expert"]


def test_files_can_be_read_by_others(tmp_path: Path) -> None:
    Mix().shared().save_pretrained(tmp_path)
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1, "one file is kept from readers of the others"


def test_a_card_that_was_edited_is_kept(tmp_path: Path) -> None:
    model = Mix().shared()
    (tmp_path / "README.md").write_text("mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_a_card_of_ours_is_written_anew(tmp_path: Path, sent: dict[str, Any]) -> None:
    """On the disk and on the hub, where another composition was saved before; a changed one is somebody's own."""
    first, second = Mix().shared(), composition()
    first.save_pretrained(tmp_path)
    before = (tmp_path / "README.md").read_bytes()
    second.save_pretrained(tmp_path)
    check_card((tmp_path / "README.md").read_text(), second)
    for on_the_hub, uploaded in ((before, True), (before + b"And more.", False)):
        sent["holds"] = {"README.md": on_the_hub}
        second.push_to_hub("mine")
        assert ("README.md" in sent["files"]) == uploaded
    changed = (tmp_path / "README.md").read_text().replace("# A composition", "# My composition")
    (tmp_path / "README.md").write_text(changed)
    first.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == changed


def test_arguments_that_saving_does_not_know_are_refused(tmp_path: Path) -> None:
    model = Mix().shared()
    for wrong in ({"nonsense": 1}, {"safe_serialization": False}, {"private": True}):
        with pytest.raises(calm.CalmError, match=next(iter(wrong))):
            model.save_pretrained(tmp_path / "out", **wrong)
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "out", safe_serialization=True)
    # Accelerate's recipe, and the order of transformers' arguments
    model.save_pretrained(tmp_path / "mine", True, None, save_function=torch.save, token=None, variant=None)
    model.save_pretrained(tmp_path / "other", False)
    assert (tmp_path / "mine/model.safetensors").exists() and not (tmp_path / "other").exists()


@pytest.mark.parametrize("holds", ["a base", "a broken configuration", "weights alone"])
def test_another_model_is_not_written_over(holds: str, tmp_path: Path) -> None:
    model = composition()
    model.anchor.save_pretrained(tmp_path)
    if holds == "a broken configuration":
        (tmp_path / "config.json").write_text('{"model_type": ')
    elif holds == "weights alone":
        (tmp_path / "config.json").unlink()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(calm.errors.CheckpointError, match=r"holds (a model of type 'gemma3_text'|a config|weights)"):
        model.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_composition_is_replaced(tmp_path: Path) -> None:
    composition().save_pretrained(tmp_path, max_shard_size="10KB")
    composition().save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.glob("*.safetensors*")] == ["model.safetensors"]


def test_files_that_are_not_a_compositions_stay(tmp_path: Path) -> None:
    composition().save_pretrained(tmp_path)
    others = {"model_backup.safetensors", "model-step100.safetensors", "model.safetensors.bak", "notes.txt"}
    for name in others:
        (tmp_path / name).write_text("mine")
    composition().save_pretrained(tmp_path, max_shard_size="10KB")
    assert not (tmp_path / "model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir() if path.read_bytes() == b"mine"} == others


def test_settings_that_transformers_does_not_save_lose_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It loads them, from many a hub repository."""
    mix, own = Mix(), GenerationConfig(max_new_tokens=3)
    bases: dict[str, Any] = {"anchor": mix.anchor_model(), "augmenting": mix.augmenting_models()}
    model = mix.build()
    model.generation_config.temperature = 0.7  # without sampling
    with pytest.raises(ValueError, match="temperature"):
        model.generation_config.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    assert "The generation settings are saved as they are" in caplog.text
    loaded = calm.CalmForCausalLM.from_pretrained(tmp_path, **bases)
    assert loaded.generation_config.temperature == 0.7
    assert calm.CalmForCausalLM.from_pretrained(tmp_path, generation_config=own, **bases).generation_config is own


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a hub is sent that does no more than write it down, and the files that it `holds`."""
    sent: dict[str, Any] = {"holds": {}, "branches": [], "revisions": [None]}

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            sent["token"] = token

        def create_repo(self, repo_id: str, **kwargs: object) -> SimpleNamespace:
            sent["created"] = (repo_id, kwargs)
            return SimpleNamespace(repo_id=f"me/{repo_id}")

        def list_repo_files(self, repo_id: str, *, revision: str | None = None) -> list[str]:
            if revision in sent["revisions"] or (revision or "").startswith("refs/pr"):
                return list(sent["holds"])
            raise RevisionNotFoundError(
                "no such branch", response=httpx2.Response(404, request=httpx2.Request("GET", "https://hub"))
            )

        def hf_hub_download(self, repo_id: str, filename: str, *, revision: str | None = None) -> str:
            (tmp_path_factory.getbasetemp() / filename).write_bytes(sent["holds"][filename])
            return str(tmp_path_factory.getbasetemp() / filename)

        def create_branch(self, repo_id: str, *, branch: str, exist_ok: bool) -> None:
            assert exist_ok
            sent["branches"].append((repo_id, branch))
            sent["revisions"].append(branch)  # with the files of main

        def create_commit(self, repo_id: str, operations: list[CommitOperationAdd], **kwargs: Any) -> str:
            sent["files"], sent["deleted"] = {}, []
            for operation in operations:
                if isinstance(operation, CommitOperationDelete):
                    sent["deleted"].append(operation.path_in_repo)
                    continue
                with operation.as_file() as file:
                    sent["files"][operation.path_in_repo] = file.read()
            sent["uploaded"] = (repo_id, kwargs)
            return "commit"

    monkeypatch.setattr(calm.saving, "HfApi", Hub)
    return sent


@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
def test_upload(through: str, tmp_path: Path, sent: dict[str, Any]) -> None:
    model = composition()
    if through == "push_to_hub":
        answer = model.push_to_hub("mine", private=True, token="secret", commit_message="First", revision="dev")
        assert answer == "commit"
        assert sent["token"] == "secret"
        assert sent["created"] == ("mine", {"private": True, "exist_ok": True})
        assert sent["uploaded"] == ("me/mine", {"revision": "dev", "create_pr": False, "commit_message": "First"})
    else:
        model.save_pretrained(tmp_path / "mine", push_to_hub=True)
        assert sent["created"][0] == "mine" and sent["uploaded"][0] == "me/mine"
    files = sent["files"]
    assert set(files) == {"README.md", "config.json", "generation_config.json", "model.safetensors"}
    check_card(files["README.md"].decode(), model)
    ModelCard(files["README.md"].decode())
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    loaded = calm.CalmForCausalLM.from_pretrained(
        tmp_path, anchor=Mix(anchor="gemma3_text").anchor_model(), augmenting=_augmenting()
    )
    ids = factories.tokens(2, 8)
    factories.assert_identical(loaded(ids).logits, model(ids).logits)


def test_another_model_on_the_hub_is_not_written_over(sent: dict[str, Any]) -> None:
    sent["holds"]["config.json"] = b'{"model_type": "llama"}'
    with pytest.raises(calm.errors.CheckpointError, match="'me/mine' holds a model of type 'llama'"):
        composition().push_to_hub("mine")
    assert "uploaded" not in sent
    sent["revisions"].append("dev")
    with pytest.raises(calm.errors.CheckpointError, match="holds a model of type 'llama'"):
        composition().push_to_hub("mine", revision="dev")
    assert "uploaded" not in sent and not sent["branches"]
    sent["holds"] |= {"model-00001-of-00002.safetensors": b"", "model-00002-of-00002.safetensors": b""}
    for elsewhere in ({"revision": "new"}, {"create_pr": True}):  # the model stays what it is
        composition().push_to_hub("mine", **elsewhere)
        assert sent.pop("uploaded")
        assert not sent["deleted"], "of its files none goes"
    sent["holds"]["config.json"] = b'{"model_type": "calm"}'
    composition().push_to_hub("mine")
    assert "uploaded" in sent


def test_weights_alone_on_the_hub_are_another_models(sent: dict[str, Any]) -> None:
    sent["holds"] = {"model-00001-of-00002.safetensors": b"", "model.safetensors.index.json": b""}
    with pytest.raises(calm.errors.CheckpointError, match=r"'me/mine' holds weights \(model-00001-of-00002"):
        composition().push_to_hub("mine")
    assert "uploaded" not in sent


def test_weights_of_an_earlier_upload_do_not_stay(tmp_path: Path, sent: dict[str, Any]) -> None:
    """One file beside newer shards would be what is loaded."""
    model = composition()
    model.save_pretrained(tmp_path / "first")
    sent["holds"] = {path.name: path.read_bytes() for path in (tmp_path / "first").iterdir()}
    sent["holds"] |= {"model_backup.safetensors": b"", "tokenizer.json": b""}
    model.save_pretrained(tmp_path / "mine", max_shard_size="10KB", push_to_hub=True)
    assert sent["deleted"] == ["model.safetensors"] and "model.safetensors.index.json" in sent["files"]
    sent["holds"] = sent["files"]
    model.push_to_hub("mine", revision="a-new-branch")
    assert set(sent["deleted"]) == {name for name in sent["holds"] if re.match(r"model[-.].*safetensors", name)}
    assert "model.safetensors" in sent["files"]


def test_a_branch_is_made_if_missing(sent: dict[str, Any]) -> None:
    """A commit makes none; pull requests have theirs."""
    model = Mix().shared()
    for arguments in ({}, {"revision": "refs/pr/3"}, {"revision": "dev", "create_pr": True}):
        model.push_to_hub("mine", **arguments)
        assert not sent["branches"]
    model.push_to_hub("mine", revision="dev")
    assert sent["branches"] == [("me/mine", "dev")]


def test_a_card_on_the_hub_is_kept(tmp_path: Path, sent: dict[str, Any]) -> None:
    sent["holds"] = {"README.md": b"theirs"}
    model = Mix().shared()
    model.push_to_hub("mine")
    assert set(sent["files"]) == {"config.json", "generation_config.json", "model.safetensors"}
    model.save_pretrained(tmp_path / "mine", push_to_hub=True)
    assert set(sent["files"]) == {"config.json", "generation_config.json", "model.safetensors"}


@pytest.mark.parametrize("through", ["push_to_hub", "save_pretrained"])
def test_folders_of_this_computer_are_not_uploaded(
    through: str, tmp_path: Path, sent: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """Their own names are, for the words of an error; where they are is kept on the disk alone."""
    factories.base("llama").save_pretrained(tmp_path / "my-anchor")
    factories.base("gpt2", 24, 4, 2, seed=1).save_pretrained(tmp_path / "my-expert")
    model = factories.perturb(calm.compose(tmp_path / "my-anchor", tmp_path / "my-expert", 2))
    model.config.anchor_config._name_or_path = str(tmp_path / "my-anchor")  # as checkpoints from before have it
    out = tmp_path / "mine"
    model.save_pretrained(out)
    caplog.clear()
    if through == "push_to_hub":
        calm.CalmForCausalLM.from_pretrained(out).push_to_hub("mine")
    else:
        model.save_pretrained(out, push_to_hub=True)
    for name, content in sent["files"].items():
        assert str(tmp_path).encode() not in content, name
    assert "has to pass anchor= and augmenting=" in caplog.text
    on_disk, uploaded = json.loads((out / "config.json").read_text()), json.loads(sent["files"]["config.json"])
    assert on_disk["anchor_reference"]["name_or_path"] == str(tmp_path / "my-anchor")
    assert "_name_or_path" not in on_disk["anchor_config"]
    for name, before, after in (
        ("my-anchor", on_disk["anchor_reference"], uploaded["anchor_reference"]),
        ("my-expert", *(values["augmenting_references"]["augmenting"] for values in (on_disk, uploaded))),
    ):
        assert after == before | {"name_or_path": None, "folder": name}
    references = ("anchor_reference", "augmenting_references")
    assert uploaded == on_disk | {key: uploaded[key] for key in references}

    (tmp_path / "downloaded").mkdir()
    for name, content in sent["files"].items():
        (tmp_path / "downloaded" / name).write_bytes(content)
    with pytest.raises(
        calm.CheckpointError, match=r"the anchor was a folder 'my-anchor' on the computer.*pass anchor="
    ):
        calm.CalmForCausalLM.from_pretrained(tmp_path / "downloaded")
    with pytest.raises(calm.CheckpointError, match=r"'augmenting' was a folder 'my-expert'.*pass augmenting="):
        calm.CalmForCausalLM.from_pretrained(tmp_path / "downloaded", anchor=tmp_path / "my-anchor")
    uploaded["anchor_reference"]["gguf_file"] = "a.gguf"
    with pytest.raises(calm.CheckpointError, match=r"the anchor was the file 'a\.gguf' in a folder 'my-anchor'"):
        sources.locate("the anchor", uploaded["anchor_reference"], model.config.anchor_config)
    loaded = calm.CalmForCausalLM.from_pretrained(
        tmp_path / "downloaded", anchor=tmp_path / "my-anchor", augmenting=tmp_path / "my-expert"
    )
    ids = factories.tokens(2, 8)
    factories.assert_identical(loaded(ids).logits, model(ids).logits)


def test_hub_names_are_uploaded_without_a_warning(sent: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = composition()
    caplog.clear()
    model.push_to_hub("mine")
    uploaded = json.loads(sent["files"]["config.json"])
    assert uploaded["anchor_reference"] == model.config.anchor_reference
    assert uploaded["augmenting_references"] == model.config.augmenting_references
    assert not caplog.records


def test_what_was_saved_is_what_is_uploaded(
    tmp_path: Path, sent: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The state dict and the shards of this save, without what training leaves beside them, and gathered once only."""
    model = Mix().shared()
    weights = {name: weight + 1 for name, weight in model.state_dict().items() if name.startswith("connections.")}
    (tmp_path / "checkpoint-2").mkdir()
    for beside in ("optimizer.pt", "checkpoint-2/model.safetensors"):
        (tmp_path / beside).write_bytes(b"")
    byte_tokenizer(chat=True).save_pretrained(tmp_path)
    tokenizer = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    monkeypatch.setattr(model, "_gathered_connections", lambda: pytest.fail("only one process is here"))
    model.save_pretrained(tmp_path, state_dict=weights, max_shard_size=10_000, push_to_hub=True, repo_id="mine")
    card = {"README.md", "config.json", "generation_config.json", "model.safetensors.index.json"} | tokenizer
    shards = {name: content for name, content in sent["files"].items() if name not in card}
    assert len(shards) > 1 and set(sent["files"]) == card | set(shards)
    uploaded = {name: weight for content in shards.values() for name, weight in load(content).items()}
    assert uploaded.keys() == weights.keys()
    for name, weight in weights.items():
        factories.assert_identical(uploaded[name], weight)


def _augmenting() -> dict:
    return Mix(augmenting=("gpt2", "mamba")).augmenting_models()


def test_negative_control_a_card_of_another_composition_is_noticed() -> None:
    model = composition()
    for wrong in (
        checkpoint.model_card(model.config, 5),
        checkpoint.model_card(Mix().shared().config, sum(p.numel() for p in model.connections.parameters())),
    ):
        with pytest.raises((AssertionError, KeyError)):
            check_card(str(wrong), model)
