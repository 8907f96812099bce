"""Where bases come from: find, load and freeze them, whole or truncated, and their tokenizers."""

from __future__ import annotations

import copy
import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    MODEL_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from calm.backbones import computation_of, decoder_of, freeze, truncate_config, truncated
from calm.config import CalmConfig, depth_of, text_config, width_of
from calm.errors import CalmError, CheckpointError, TokenizerMismatchError
from calm.fingerprints import check_fingerprint

logger = logging.getLogger(__name__)

HUB_KWARGS = ("token", "cache_dir", "force_download", "local_files_only")  # what concerns finding files


class _IncompleteError(CheckpointError):
    """Weights that a model needs are not among a checkpoint's."""


@dataclass(frozen=True)
class Source:
    """Where a base comes from, as a user wrote it: a hub name, a folder, or a GGUF file.

    Attributes:
        name_or_path: What transformers' `from_pretrained` takes.
        gguf_file: File within it, for GGUF.
        revision: Branch, tag or commit of a hub repository.
    """

    name_or_path: str
    gguf_file: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, name: str | os.PathLike[str], revision: str | None = None) -> Source:
        """Read `folder/model.gguf` (a file) and `owner/repository/model.gguf` (on a hub) apart from names and folders.

        What is on a hub may end in `@` and its revision, which counts more than the argument.

        Raises:
            CheckpointError: If a path that can only be local does not exist.
        """
        text = os.fspath(name)
        if "@" in text and not text.startswith((".", "/", "~")) and not Path(text).exists():
            text, _, revision = text.rpartition("@")
        if text.endswith(".gguf"):
            path = Path(text)
            if path.is_file():
                return cls(str(path.parent), path.name, revision)
            parts = text.split("/")
            if len(parts) == 3 and not text.startswith((".", "/", "~")):
                return cls("/".join(parts[:2]), parts[2], revision)
            raise CheckpointError(f"{text!r}: no such GGUF file. Give its path, or OWNER/REPOSITORY/FILE.gguf.")
        if not Path(text).is_dir() and (text.startswith((".", "/", "~")) or text.count("/") > 1):
            raise CheckpointError(f"{text!r}: no such folder. Give the folder that holds config.json, or a hub name.")
        return cls(text, None, revision)

    @classmethod
    def of(cls, base: PreTrainedModel | str | os.PathLike[str], revision: str | None = None) -> Source:
        """Where a base is or came from, a loaded model as far as it says; `name_or_path` is empty if it does not.

        Raises:
            CheckpointError: As `parse`.
        """
        return cls(base.name_or_path) if isinstance(base, PreTrainedModel) else cls.parse(base, revision)

    def reference(self) -> dict[str, Any]:
        """What a composition records of where a base is; a folder by its absolute path."""
        name = self.name_or_path
        name = str(Path(name).absolute()) if name and Path(name).is_dir() else name
        return {"name_or_path": name, "gguf_file": self.gguf_file, "revision": self.revision}

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of every `from_pretrained`."""
        return {key: value for key, value in (("gguf_file", self.gguf_file), ("revision", self.revision)) if value}


def load_config(source: Source, /, **load_kwargs: Any) -> PreTrainedConfig:
    """Load a base's configuration.

    Args:
        source: Where it is.
        load_kwargs: Those of the weights; the ones that concern finding files are used.

    Raises:
        CheckpointError: If there is none, or its architecture is unknown to the installed transformers.
    """
    try:
        return AutoConfig.from_pretrained(source.name_or_path, **source.arguments(), **_finding(load_kwargs))
    except (OSError, ValueError, KeyError, ImportError, StrictDataclassError) as error:
        raise CheckpointError(
            f"No usable configuration for {source.name_or_path!r}{not_here(source.name_or_path)}: {error}"
            f"{_advice(source, error)}"
        ) from error


def load_anchor(source: Source, config: PreTrainedConfig, /, **load_kwargs: Any) -> PreTrainedModel:
    """Load a whole causal language model.

    Args:
        source: Where it is.
        config: From `load_config`.
        load_kwargs: For `from_pretrained` (`dtype`, `device_map`, `quantization_config`, ...).

    Raises:
        CheckpointError: If it is missing, unreadable or incomplete.
    """
    return freeze(_load(AutoModelForCausalLM, source, config, **load_kwargs))


def load_augmenting(source: Source, config: PreTrainedConfig, depth: int, /, **load_kwargs: Any) -> PreTrainedModel:
    """Load the first `depth` layers of a decoder; later layers and the head are never built.

    Args:
        source: Where it is.
        config: From `load_config`.
        depth: How many layers to keep.
        load_kwargs: For `from_pretrained`.

    Returns:
        The frozen, truncated decoder.

    Raises:
        CheckpointError: If it is missing, unreadable or incomplete.
    """
    if source.gguf_file is not None:  # the names of a GGUF file's weights are mapped by the whole configuration
        return truncated(load_anchor(source, config, **load_kwargs), depth)
    config = copy.deepcopy(config)
    truncate_config(config, depth)
    stored_quantized = getattr(config, "quantization_config", None) is not None
    if type(config) in MODEL_MAPPING and not stored_quantized:  # torchao's metadata name the causal model's weights
        try:
            return freeze(decoder_of(_load(AutoModel, source, config, **load_kwargs)))
        except _IncompleteError:
            pass  # the plain model has parts that a causal language model's checkpoint has not: poolers, encoders
    return freeze(decoder_of(_load(AutoModelForCausalLM, source, config, **load_kwargs)))


def _load(auto_class: Any, source: Source, config: PreTrainedConfig, /, **load_kwargs: Any) -> PreTrainedModel:
    try:
        with _quiet():  # the later layers' weights are unexpected on purpose
            model, info = auto_class.from_pretrained(
                source.name_or_path, config=config, output_loading_info=True, **source.arguments(), **load_kwargs
            )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, ImportError, SafetensorError) as error:
        unknown = (
            re.search(r"(?:unexpected keyword argument|multiple values for keyword argument) '(\w+)'", str(error))
            if type(error) is TypeError
            else None
        )
        if unknown is not None and unknown[1] in load_kwargs:
            raise CalmError(
                f"{unknown[1]}={load_kwargs[unknown[1]]!r}: neither calm nor the loading of {source.name_or_path!r} "
                "takes this argument. Leave it out, or look for a slip in its name."
            ) from error
        raise CheckpointError(f"Cannot load {source.name_or_path!r}: {error}{_advice(source, error)}") from error
    if missing := sorted(info.get("missing_keys", ())):
        raise _IncompleteError(
            f"{source.name_or_path!r} lacks {len(missing)} weights of a {type(model).__name__}, {missing[0]!r} among "
            "them: its files are incomplete, or of another architecture."
        )
    return model


def not_here(name: str) -> str:
    """What to add to a name that was taken for one on a hub, since there is no folder of that name."""
    return "" if Path(name).exists() else f" (a name on a hub, since there is no such folder in {Path.cwd()})"


def _finding(load_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that configurations and tokenizers are found and read with."""
    return {key: load_kwargs[key] for key in (*HUB_KWARGS, "trust_remote_code") if key in load_kwargs}


def _advice(source: Source, error: Exception) -> str:
    missing = source.gguf_file is not None and isinstance(error, ImportError)
    return "\nInstall what reads GGUF files: pip install 'calm-lm[gguf]'" if missing else ""


@contextmanager
def _quiet() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


def load_tokenizer(source: Source, **load_kwargs: Any) -> PreTrainedTokenizerBase | None:
    """Load a base's tokenizer, `None` where it has none beside its weights.

    Raises:
        CheckpointError: If reading it from a GGUF file takes a package that is not installed.
    """
    arguments = source.arguments() | _finding(load_kwargs)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.name_or_path, **arguments)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        if advice := _advice(source, error):
            raise CheckpointError(f"Cannot load the tokenizer in {source.gguf_file!r}: {error}{advice}") from error
        return None
    if source.gguf_file is None:  # where there are no files, transformers makes up an empty tokenizer
        files = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
        lenient = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
        if not any(cached_file(source.name_or_path, file, **arguments, **lenient) for file in sorted(files)):
            return None
    return tokenizer


def unwrapped(base: Any) -> Any:
    """The model that PEFT has put an adapter into, with the adapter's layers; anything else as it is."""
    peft = sys.modules.get("peft")
    return base.get_base_model() if peft is not None and isinstance(base, peft.PeftModel) else base


def has_adapter(model: PreTrainedModel) -> bool:
    """Whether there are layers of PEFT's in a model."""
    if "peft" not in sys.modules:
        return False
    from peft.tuners.tuners_utils import BaseTunerLayer

    return any(isinstance(module, BaseTunerLayer) for module in model.modules())


def check_same_tokenizer(
    anchor: PreTrainedTokenizerBase | None,
    augmenting: PreTrainedTokenizerBase | None,
    anchor_config: PreTrainedConfig,
    augmenting_config: PreTrainedConfig,
    names: tuple[str, str],
) -> None:
    """Refuse two bases whose tokens do not line up; without tokenizers, ask for equal vocabulary sizes, and warn.

    The composition reads what the anchor's tokenizer writes. An augmenting model may know tokens beyond these (a
    specialist that was given a `[PAD]` of its own): it never sees them, and a warning says so.

    Args:
        anchor: The anchor's tokenizer, if known.
        augmenting: The augmenting model's tokenizer, if known.
        anchor_config: For the vocabulary size.
        augmenting_config: The same.
        names: What to call the two in the error.

    Raises:
        TokenizerMismatchError: Naming both.
    """
    advice = "Compose models that share a tokenizer; different tokenizers are not supported yet."
    if anchor is not None and augmenting is not None:
        ours, theirs = anchor.get_vocab(), augmenting.get_vocab()
        shared = len(ours.items() & theirs.items())
        if shared < len(ours):
            if shared == len(theirs):
                advice += " If what only the anchor's has never occurs, pass it as augmenting_tokenizer=, too."
            raise TokenizerMismatchError(
                f"The anchor {names[0]} and the augmenting model {names[1]} have different tokenizers "
                f"({type(anchor).__name__} with {len(ours)} tokens, {type(augmenting).__name__} with {len(theirs)}; "
                f"{shared} tokens have the same id in both). {advice}"
            )
        if shared < len(theirs):
            logger.warning(
                "The augmenting model %s has tokens that the anchor %s lacks (%d, %r among them) and will not be given "
                "them: the composition reads what the anchor's tokenizer writes.",
                *(names[1], names[0], len(theirs) - shared, min(theirs.keys() - ours.keys())),
            )
        return
    ours, theirs = (getattr(text_config(c), "vocab_size", None) for c in (anchor_config, augmenting_config))
    if ours != theirs:
        raise TokenizerMismatchError(
            f"The anchor {names[0]} has {ours} tokens and the augmenting model {names[1]} has {theirs}, so their "
            f"tokenizers seem to differ. {advice} If they do share one (only padding the embedding differently), pass "
            "anchor_tokenizer= and augmenting_tokenizer=."
        )
    where = "either" if anchor is None and augmenting is None else names[0 if anchor is None else 1]
    logger.warning(
        "The anchor %s and the augmenting model %s both have %s tokens, which is all that could be compared: no "
        "tokenizer was found beside %s. If theirs may differ, pass anchor_tokenizer= and augmenting_tokenizer=.",
        *(*names, ours, where),
    )


def load_bases(
    config: CalmConfig,
    anchor: PreTrainedModel | str | os.PathLike[str] | None = None,
    augmenting: Any = None,
    verify: bool = True,
    /,  # what users call their arguments for from_pretrained must not be taken for these
    **load_kwargs: Any,
) -> tuple[PreTrainedModel, dict[str, PreTrainedModel]]:
    """Load a composition's bases by their recorded references, or take those given by hand.

    Args:
        config: The composition.
        anchor: The anchor, or where it is now.
        augmenting: The augmenting model(s), or where they are now: one, or by name. With `{}` none is loaded.
        verify: Compare configurations and fingerprints.
        load_kwargs: For `from_pretrained` of every base. Each is loaded in the dtype that it was composed in, and
            quantized again if it was quantized while it was loaded, unless they say otherwise.

    Returns:
        The anchor, and the truncated augmenting models by name.

    Raises:
        CalmError: If one given by hand is neither a model nor a name.
        CheckpointError: If one is missing, unreadable, or not the base that was trained against.
    """
    anchor = unwrapped(anchor)
    given = _given(config, augmenting)
    wanted = config.augmenting_configs if given or augmenting is None else {}

    anchor_source = (
        None if isinstance(anchor, PreTrainedModel) else _find("the anchor", anchor, config.anchor_reference)
    )
    anchor_kwargs = _as_recorded(config.anchor_reference, load_kwargs)
    anchor_model = _take("the anchor", anchor, anchor_source, config.anchor_config, verify, **anchor_kwargs)
    models: dict[str, PreTrainedModel] = {}
    places: dict[str, Source | None] = {}
    for name, expected in wanted.items():
        role = f"the augmenting model {name!r}"
        base, depth = given.get(name), config.augmenting_depth(name)
        source, reference = None, config.augmenting_references.get(name, {})
        if not isinstance(base, PreTrainedModel):
            source = _find(role, base, reference)
        if source is not None and source == anchor_source:  # one set of weights serves as both
            base, source = anchor_model, None
        models[name] = _take(role, base, source, expected, verify, depth, **_as_recorded(reference, load_kwargs))
        places[name] = source
    if verify:
        check_fingerprint(anchor_model, config.anchor_reference, _looked_at("the anchor", anchor_source))
        for name, model in models.items():
            role = _looked_at(f"the augmenting model {name!r}", places[name])
            check_fingerprint(model, config.augmenting_references.get(name, {}), role)
    return anchor_model, models


def _looked_at(role: str, source: Source | None) -> str:
    """What to call a base in an error, with its revision if it has any."""
    if source is None or os.path.exists(source.name_or_path):
        return role
    name = "/".join(filter(None, (source.name_or_path, source.gguf_file)))
    return f"{role} ({name!r} at revision {source.revision or 'main'!r}; another is written {f'{name}@REVISION'!r})"


def record_given(config: CalmConfig, anchor: Any = None, augmenting: Any = None) -> CalmConfig:
    """A composition with the places of bases that were given by hand, after `load_bases` has checked them.

    A loaded model that does not say where it came from leaves the recorded place as it is.

    Args:
        config: The composition; stays as it is.
        anchor: As for `load_bases`.
        augmenting: Likewise.

    Returns:
        A copy with other references; fingerprints are kept.
    """
    config = copy.deepcopy(config)
    config.anchor_reference = _moved(config.anchor_reference, unwrapped(anchor))
    for name, base in _given(config, augmenting).items():
        config.augmenting_references[name] = _moved(config.augmenting_references.get(name, {}), base)
    return config


def _moved(reference: Mapping[str, Any], base: Any) -> dict[str, Any]:
    if base is None:
        return dict(reference)
    if isinstance(base, PreTrainedModel):  # which tells neither its revision nor its GGUF file
        same = Source.of(base).reference()["name_or_path"] in ("", reference.get("name_or_path"))
        if same or reference.get("gguf_file"):
            return dict(reference)
    return {key: value for key, value in reference.items() if key != "folder"} | Source.of(base).reference()


def _given(config: CalmConfig, augmenting: Any) -> dict[str, Any]:
    """Augmenting models given by hand, by name; a single one needs none."""
    by_name = augmenting if isinstance(augmenting, Mapping) else {} if augmenting is None else {"": augmenting}
    given = {name: unwrapped(base) for name, base in by_name.items()}
    if "" in given and len(config.augmenting_configs) == 1:
        given = {next(iter(config.augmenting_configs)): given[""]}
    if unknown := sorted(set(given) - set(config.augmenting_configs)):
        found = "one model without a name" if unknown == [""] else repr(unknown)
        raise CheckpointError(
            f"augmenting={found}: this composition has the augmenting models "
            f"{sorted(config.augmenting_configs)}; give them by name."
        )
    return given


def locate(role: str, reference: Mapping[str, Any], expected: PreTrainedConfig) -> tuple[Source, PreTrainedConfig]:
    """Find a base by its recorded reference and check its configuration there, for who loads weights another way.

    Args:
        role: What to call the base in an error.
        reference: From the composition's configuration.
        expected: The configuration that was composed.

    Raises:
        CheckpointError: If it has no reference, is not there, or is not the one composed.
    """
    source = _find(role, None, dict(reference))
    found = load_config(source)
    _check_config(found, expected, role, verify=True)
    return source, found


def load_part(config: CalmConfig, name: str, where: Any = None, **load_kwargs: Any) -> PreTrainedModel:
    """Load one base of a composition alone and whole, with its own head: what the composition is compared with.

    Args:
        config: The composition.
        name: `"anchor"`, or an augmenting model's name.
        where: Where it is now, instead of its recorded reference.
        load_kwargs: For `from_pretrained`.

    Raises:
        CheckpointError: If there is no such part, if it is missing or unreadable, or not the base trained against.
    """
    if name == "anchor":
        return load_bases(config, where, {}, **load_kwargs)[0]
    if name not in config.augmenting_configs:
        raise CheckpointError(
            f"This composition has no part {name!r}: expected 'anchor' or one of its augmenting models, "
            f"{', '.join(map(repr, config.augmenting_configs))}."
        )
    role, reference = f"the augmenting model {name!r}", config.augmenting_references.get(name, {})
    source = _find(role, where, reference)
    expected, arguments = config.augmenting_configs[name], _as_recorded(reference, load_kwargs)
    model = _take(role, None, source, expected, True, **arguments)
    check_fingerprint(truncated(model, config.augmenting_depth(name)), reference, _looked_at(role, source))
    return model


def _as_recorded(reference: Mapping[str, Any], load_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """How to load a base: in the dtype that it was composed in, and quantized as it was, unless asked otherwise."""
    recorded = {"dtype": reference["dtype"]} if "dtype" in reference else {}
    if "quantization_config" not in load_kwargs:
        recorded |= reference.get("loaded_with", {})
    asked = {key: value for key, value in load_kwargs.items() if key != "dtype" or value not in (None, "auto")}
    if "torch_dtype" in asked:  # transformers' former name for it, which would lose against the recorded one
        asked.setdefault("dtype", asked["torch_dtype"])
    return {**load_kwargs, **recorded, **asked}


def _take(
    role: str,
    base: Any,
    source: Source | None,
    expected: PreTrainedConfig,
    verify: bool,
    depth: int | None = None,
    /,
    **load_kwargs: Any,
) -> PreTrainedModel:
    if source is None:
        _check_config(base.config, expected, role, verify)
        return freeze(base) if depth is None else truncated(base, depth)
    found = load_config(source, **load_kwargs)
    _check_config(found, expected, role, verify)
    if depth is None:
        return load_anchor(source, found, **load_kwargs)
    return load_augmenting(source, found, depth, **load_kwargs)


def _find(role: str, base: Any, reference: dict[str, Any]) -> Source:
    argument = "anchor=" if role == "the anchor" else "augmenting="
    if isinstance(base, str | os.PathLike):
        return Source.parse(base)
    if base is not None:
        raise CalmError(
            f"{argument} is given a {type(base).__name__} for {role}: expected a transformers model, or a hub name, "
            "folder or GGUF file."
        )
    name = reference.get("name_or_path")
    if reference.get("adapter"):
        raise CheckpointError(
            f"{role} had an adapter (PEFT) when this composition was made, which no reference names: load "
            f"{name or 'the model'!r} with its adapter, and pass {argument} with it."
        )
    if folder := reference.get("folder"):
        file = f"the file {reference['gguf_file']!r} in " if reference.get("gguf_file") else ""
        raise CheckpointError(
            f"{role} was {file}a folder {folder!r} on the computer of whoever uploaded this composition: pass "
            f"{argument} with the model or where it is here."
        )
    if not name:
        raise CheckpointError(
            f"{role} was given as a loaded model when this composition was made, so there is no reference to load it "
            f"by: pass {argument} with the model or where it is."
        )
    source = Source(name, reference.get("gguf_file"), reference.get("revision"))
    if Path(name).is_absolute() and not Path(name, source.gguf_file or "config.json").is_file():
        raise CheckpointError(
            f"{role} is recorded as {name!r}, which is not there: pass {argument} with where it is now."
        )
    return source


def _check_config(found: PreTrainedConfig, expected: PreTrainedConfig, role: str, verify: bool) -> None:
    for what, value in (
        ("architecture", lambda c: text_config(c).model_type),
        ("width", width_of),
        ("depth", depth_of),
    ):
        if value(found) != value(expected):
            raise CheckpointError(
                f"{role} has {what} {value(found)!r}; this composition was trained against {value(expected)!r}. Give "
                "the base that it was made with."
            )
    if not verify:
        return
    here, then = computation_of(found), computation_of(expected)
    # a field that one side lacks says only that another version of transformers wrote it
    for field in sorted(here.keys() & then.keys()):
        if here[field] != then[field]:
            raise CheckpointError(
                f"{role} has {field}={here[field]!r} in its configuration; this composition was trained against "
                f"{then[field]!r}. Give the base that it was made with, or pass verify_bases=False (in Python) if the "
                "change is meant."
            )
