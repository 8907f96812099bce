"""Composition-only checkpoints: writing them atomically, reading them back with clear errors, and their model card."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Container, Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

import torch
from huggingface_hub import (
    ModelCard,
    ModelCardData,
    save_torch_state_dict,
    split_torch_state_dict_into_shards,
)
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, cached_file

from calm.config import CalmConfig
from calm.errors import CheckpointError
from calm.sources import Source, not_here

logger = logging.getLogger(__name__)

WEIGHTS_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
FILES = ("README.md", "config.json", "generation_config.json", WEIGHTS_NAME, "model-*-of-*.safetensors", INDEX_NAME)
TOKENIZER_FILES = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model"),
    *("chat_template*", "additional_chat_templates/*"),
)
CONNECTIONS_PREFIX = "connections."
_CARD_MARK = re.compile(r"<!-- calm-lm wrote this card.*: (\w+) -->")
_HUB_NAME = re.compile(r"(\w[\w.-]*/)?\w[\w.-]*", re.ASCII)
_SAFETENSORS_DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}


def write(
    directory: str | os.PathLike[str],
    config: CalmConfig,
    state_dict: Mapping[str, Tensor],
    generation_config: GenerationConfig | None = None,
    max_shard_size: int | str = "5GB",
) -> None:
    """Write a composition: `config.json`, its weights as safetensors, and a model card.

    A card that somebody else wrote or changed stays as it is.

    Everything is first written beside its final place and then renamed, so that an interrupted or failed write (a
    full disk) leaves what was there before.

    Args:
        directory: Where to; made if missing.
        config: The composition's configuration.
        state_dict: Composition parameters, keys starting with `connections.`; others are left out.
        generation_config: Written as `generation_config.json` if given.
        max_shard_size: Largest weights file, in bytes or as "5GB".

    Raises:
        CheckpointError: If the directory holds a model that is no composition, or cannot be written to, or if the state
            dict holds no composition parameters or PEFT's copies of them.
    """
    refuse_other_model(directory)
    weights = {key: value for key, value in state_dict.items() if key.startswith(CONNECTIONS_PREFIX)}
    if not weights:
        raise CheckpointError("The state dict to save holds no composition parameters (keys 'connections.*').")
    if any(".modules_to_save." in key for key in weights):
        raise CheckpointError(
            "PEFT trains copies of the connections (modules_to_save), which a composition's checkpoint cannot hold: "
            "save the PeftModel, whose adapter has them."
        )
    target = Path(directory)
    try:
        target.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=target))
    except OSError as error:
        raise CheckpointError(f"Cannot write to {os.fspath(directory)!r}: {error}") from error
    try:
        save_torch_state_dict(weights, staging, max_shard_size=max_shard_size)
        config.save_pretrained(staging)
        if generation_config is not None:
            _save_generation_config(generation_config, staging)
        card = target / "README.md"
        if not card.exists() or wrote_card(card):
            model_card(config, sum(w.numel() for w in weights.values())).save(staging / "README.md")
        _move_over(staging, target)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"Saving to {os.fspath(directory)!r} failed and left what was there as it was: {error}"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse_other_model(directory: str | os.PathLike[str]) -> None:
    """Refuse a folder where saving a composition would write over another model, such as one of its own bases.

    Args:
        directory: The folder; it need not exist.

    Raises:
        CheckpointError: If its `config.json` is not a composition's, or if it has weights without one.
    """
    folder = Path(directory)
    try:
        config = (folder / "config.json").read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        config = None
    except OSError:
        config = b""
    refuse_other_files(os.fspath(directory), config, (path.name for path in folder.glob("*")))


def refuse_other_files(name: str, config: bytes | None, files: Iterable[str]) -> None:
    """Refuse a folder or repository for what it holds, as `refuse_other_model` does.

    Args:
        name: What to call it.
        config: Its `config.json`, if it has one.
        files: The names of its files.

    Raises:
        CheckpointError: Likewise.
    """
    if config is None:
        weights = sorted(fnmatch.filter(files, "model*.safetensors*"))
        holds = f"weights ({weights[0]}) without a config.json" if weights else ""
    elif (values := _values(config)) is None:
        holds = "a config.json that cannot be read"
    else:
        model_type = values.get("model_type")
        other = f"a model of type {model_type!r}" if model_type else "a config.json that is no composition's"
        holds = "" if model_type == CalmConfig.model_type else other
    if holds:
        raise CheckpointError(
            f"{name!r} holds {holds}, whose files a composition would be written over. Give another place to save to."
        )


def is_composition(config: bytes | None) -> bool:
    """Whether a `config.json` is a composition's."""
    return config is not None and (_values(config) or {}).get("model_type") == CalmConfig.model_type


def _values(config: bytes) -> dict[str, Any] | None:
    try:
        values = json.loads(config)
    except ValueError:
        return None
    return values if isinstance(values, dict) else {}


def weights_bytes(state_dict: Mapping[str, Tensor], max_shard_size: int | str = "5GB") -> int:
    """The size of the weights files (`model.safetensors`, or all its shards) that `write` makes of a state dict.

    A safetensors file is eight bytes of length, a JSON header padded to a multiple of eight, and the tensors, those of
    wider dtypes first and then by name.

    Args:
        state_dict: Composition parameters of one dtype; only names, dtypes and shapes count (meta tensors will do).
        max_shard_size: As for `write`.

    Returns:
        Bytes; the index of a checkpoint in shards is not among them.
    """
    total = 0
    shards = split_torch_state_dict_into_shards(dict(state_dict), max_shard_size=max_shard_size)
    for names in shards.filename_to_tensors.values():
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(names):
            start, end = end, end + state_dict[name].nbytes
            header[name] = {
                "dtype": _SAFETENSORS_DTYPES[state_dict[name].dtype],
                "shape": list(state_dict[name].shape),
                "data_offsets": [start, end],
            }
        length = len(json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode())
        total += 8 + length + -length % 8 + end
    return total


def _save_generation_config(generation_config: GenerationConfig, staging: Path) -> None:
    try:
        generation_config.save_pretrained(staging)
    except ValueError as error:  # transformers loads such settings, and a training is not to be lost for them
        logger.warning("The generation settings are saved as they are, although transformers finds: %s", error)
        generation_config.to_json_file(staging / GENERATION_CONFIG_NAME)


def _move_over(staging: Path, target: Path) -> None:
    written = {path.name for path in staging.iterdir()}
    for name in written:  # safetensors lets nobody else read what it writes
        shutil.copymode(staging / "config.json", staging / name)
    for name in sorted(written):
        os.replace(staging / name, target / name)
    for name in stale_weights((path.name for path in target.iterdir()), written):
        (target / name).unlink()


def stale_weights(there: Iterable[str], written: Container[str]) -> list[str]:
    """Files of an earlier save with another shard size, which would be loaded with, or instead of, what was written.

    Args:
        there: Names of the files of a folder or repository.
        written: Names of those that were saved there now.
    """
    own = re.compile(rf"model-\d{{5}}-of-\d{{5}}\.safetensors|{re.escape(WEIGHTS_NAME)}|{re.escape(INDEX_NAME)}")
    return sorted(name for name in there if own.fullmatch(name) and name not in written)


def read_config(path: str | os.PathLike[str], **hub_kwargs: Any) -> CalmConfig:
    """Read a composition's configuration.

    Raises:
        CheckpointError: If there is none, if it is not that of a composition, or of a newer format.
    """
    name = os.fspath(path)
    try:
        Source.parse(name)  # a path that can only be here has to be
    except CheckpointError as error:
        raise CheckpointError(f"{name!r} holds no composition: there is no such folder.") from error
    try:
        values, _ = CalmConfig.get_config_dict(name, **hub_kwargs)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name!r}{not_here(name)} holds no composition: {error}") from error
    if not values:
        raise CheckpointError(f"{name!r} holds no composition: there is no config.json.")
    if values.get("model_type") != CalmConfig.model_type:
        raise CheckpointError(
            f"{name!r} holds a model of type {values.get('model_type')!r}, not a composition ('calm'). "
            "Compose it first: calm.compose(anchor, augmenting)."
        )
    return CalmConfig.from_dict(values)


def read_weights(path: str | os.PathLike[str], expected: Mapping[str, Tensor], **hub_kwargs: Any) -> dict[str, Tensor]:
    """Read a composition's weights and check them against the model that they are for.

    Args:
        path: Folder or hub name.
        expected: The model's own composition parameters: keys and shapes.
        hub_kwargs: `revision`, `token`, `cache_dir`, ...

    Returns:
        Tensors by key, on the CPU, dtype as stored.

    Raises:
        CheckpointError: If files are missing, truncated or corrupted, or if a key or a shape differs.
    """
    name = os.fspath(path)
    weights: dict[str, Tensor] = {}
    for file in weight_files(name, **hub_kwargs):
        try:
            weights |= load_file(file)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{file!r} is truncated or corrupted ({error}). Take the checkpoint from before it, or save or "
                "download it again."
            ) from error
    missing, unexpected = sorted(set(expected) - set(weights)), sorted(set(weights) - set(expected))
    if missing or unexpected:
        raise CheckpointError(
            f"The weights in {name!r} do not fit its configuration: {len(missing)} missing {missing[:2]}, "
            f"{len(unexpected)} unexpected {unexpected[:2]}."
        )
    for key, weight in weights.items():
        if weight.shape != expected[key].shape:
            raise CheckpointError(
                f"{key!r} in {name!r} has shape {tuple(weight.shape)}, expected {tuple(expected[key].shape)}: the "
                "weights and the configuration are of different compositions."
            )
        if not torch.isfinite(weight).all():
            raise CheckpointError(f"{key!r} in {name!r} holds NaN or infinite values.")
    return weights


def weight_files(name: str, **hub_kwargs: Any) -> list[str]:
    """Find the safetensors files of a folder or hub repository, one or several shards.

    Raises:
        CheckpointError: If there are none, or one is missing.
    """

    def find(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False, **hub_kwargs)

    if single := find(WEIGHTS_NAME):
        return [single]
    index = find(INDEX_NAME)
    if index is None:
        raise CheckpointError(f"{name!r} has a configuration but no weights ({WEIGHTS_NAME} or {INDEX_NAME}).")
    try:
        shards = sorted(set(json.loads(Path(index).read_text())["weight_map"].values()))
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{index!r} is not a valid index of weight files: {error}") from error
    files = {shard: find(shard) for shard in shards}
    if lost := [shard for shard, file in files.items() if file is None]:
        raise CheckpointError(f"{name!r} lacks the weight files {lost} that its index names.")
    return [file for file in files.values() if file is not None]


def model_card(config: CalmConfig, num_parameters: int) -> ModelCard:
    """Describe a composition for people: its bases, its connections, its size, and how to load it.

    Args:
        config: The composition's configuration.
        num_parameters: Number of composition parameters.

    Returns:
        The card, with the hub's metadata.
    """
    anchor_reference = _for_others(config.anchor_reference)
    references = {name: _for_others(reference) for name, reference in config.augmenting_references.items()}
    anchor = describe_reference(anchor_reference, config.anchor_config.model_type)
    augmenting = {
        name: describe_reference(references.get(name, {}), base.model_type)
        for name, base in config.augmenting_configs.items()
    }
    named = [r["name_or_path"] for r in (anchor_reference, *references.values()) if r.get("name_or_path")]
    data = ModelCardData(
        library_name="calm-lm",
        pipeline_tag="text-generation",
        tags=["calm", "composition"],
        base_model=named or None,
    )
    rows = "\n".join(
        f"| {pair.augmenting} | {pair.augmenting_layer} | {pair.anchor_layer} |" for pair in config.layer_pairs
    )
    models = "\n".join(f"- augmenting model `{name}`: {text}" for name, text in augmenting.items())
    card = ModelCard(
        f"""---
{data.to_yaml()}
---

# A composition of {1 + len(augmenting)} language models

Made with [calm-lm](https://arxiv.org/abs/2401.02412) (CALM: Composition to Augment Language Models). It holds only the
{num_parameters:,} composition parameters; the frozen bases are loaded from where they are:

- anchor: {anchor}
{models}

{len(config.layer_pairs)} connections ({config.num_heads} heads, attention "{config.attention}", attend \
"{config.attend}"), layers counted from 0:

| augmenting model | augmenting layer | anchor layer |
|---|---|---|
{rows}

```python
import calm

model = calm.CalmForCausalLM.from_pretrained("THIS_REPOSITORY")
```
"""
    )
    digest = _text_digest(str(card))
    card.text += f"\n<!-- calm-lm wrote this card, and replaces it as long as it is unchanged: {digest} -->\n"
    return card


def wrote_card(path: str | os.PathLike[str]) -> bool:
    """Whether a file is a `model_card` that nobody has changed since."""
    text = Path(path).read_text(encoding="utf-8", errors="replace")
    mark = _CARD_MARK.search(text)
    return mark is not None and mark[1] == _text_digest(text.replace(mark[0], ""))


def _text_digest(text: str) -> str:
    return hashlib.sha256("".join(text.split()).encode()).hexdigest()[:16]


def uploads(directory: str | os.PathLike[str]) -> dict[str, str | bytes]:
    """What of a folder that holds a composition, and perhaps its tokenizer, goes to a hub; training leaves other files.

    Where this computer's folders lie does not concern others: the configuration goes without, and a warning says what
    they have to do.

    Args:
        directory: The folder; nothing in it changes.

    Returns:
        Files by name: their paths, and the configuration's content.
    """
    folder = Path(directory)
    files: dict[str, str | bytes] = {
        path.relative_to(folder).as_posix(): str(path)
        for pattern in (*FILES, *TOKENIZER_FILES)
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    values = json.loads((folder / "config.json").read_text())
    here = values["anchor_reference"], values["augmenting_references"]
    values["anchor_reference"] = _for_others(here[0])
    values["augmenting_references"] = {name: _for_others(reference) for name, reference in here[1].items()}
    arguments = [] if values["anchor_reference"] == here[0] else ["anchor="]
    arguments += [] if values["augmenting_references"] == here[1] else ["augmenting="]
    if arguments:
        logger.warning(
            "Bases of this composition are folders of this computer, which nobody else can load: who loads what is "
            "uploaded has to pass %s. Upload these bases too, and compose with their hub names, to spare them that.",
            " and ".join(arguments),
        )
    files["config.json"] = (json.dumps(values, indent=2, sort_keys=True) + "\n").encode()
    return files


def _for_others(reference: Mapping[str, Any]) -> dict[str, Any]:
    """A reference as others may see it: of a folder of this computer no more than its own name, which is no place."""
    name = reference.get("name_or_path")
    if not name or not _is_local(name):
        return dict(reference)
    return {**reference, "name_or_path": None, "folder": PureWindowsPath(name).name}  # which takes both slashes


def _is_local(name: str) -> bool:
    return not _HUB_NAME.fullmatch(name) or os.path.exists(name)


def describe_reference(reference: Mapping[str, Any], model_type: str) -> str:
    """A base in a few words: its name, file, revision and architecture."""
    name = reference.get("name_or_path") or reference.get("folder") or "given by hand"
    parts = [f"`{name}`", f"({model_type})"]
    if reference.get("gguf_file"):
        parts.insert(1, f"file `{reference['gguf_file']}`")
    if reference.get("revision"):
        parts.insert(1, f"at `{reference['revision']}`")
    if reference.get("adapter"):
        parts.append("with an adapter, given by hand")
    if quantization := reference.get("loaded_with", {}).get("quantization_config"):
        parts.append(f"quantized when loaded ({quantization['quant_method']})")
    return " ".join(parts)
