"""The recipe of a training run: one YAML file, every field checked before anything is loaded."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeFloat,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from calm.data import is_file_source
from calm.errors import CalmError, CheckpointError

# Strict, so that `true` is not taken for 1. Floats are not: YAML reads 2e-3 (without a dot) as a string.
PositiveInt = Annotated[int, Field(strict=True, gt=0)]
NonNegativeInt = Annotated[int, Field(strict=True, ge=0)]
LayerPairs = list[tuple[NonNegativeInt, NonNegativeInt]]


class _Section(BaseModel):
    """A part of the recipe; unknown fields are errors. Descriptions say what is expected: errors print them."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class DataRecipe(_Section):
    """What to train and evaluate on."""

    train: str = Field(description="a .jsonl or .json file, or the name of a `datasets` data set")
    eval: str | None = Field(None, description="a .jsonl or .json file, or the name of a `datasets` data set")
    config: str | None = Field(None, description="a configuration of the data set, where it has several")
    train_split: str = Field("train", description="a split of the data set that `train` names")
    eval_split: str = Field("validation", description="a split of the data set that `eval` names")
    max_length: PositiveInt = Field(
        1024, description="a whole number of tokens above 0; longer examples are dropped and counted"
    )
    packing: bool = Field(
        False, description="true or false: lay short examples one after another into rows of max_length tokens"
    )
    append_eos: bool = Field(True, description="true or false: end prompt/completion completions with the EOS token")
    augmenting_outputs: Literal["recompute", "memory", "disk"] = Field(
        "recompute",
        description="one of recompute, memory, disk: run the augmenting models in every step, or once and keep it",
    )
    augmenting_outputs_dir: str | None = Field(
        None, description="a directory that can be written to, for augmenting_outputs: disk"
    )

    @field_validator("augmenting_outputs_dir")
    @classmethod
    def _of_home(cls, directory: str | None) -> str | None:
        return os.path.expanduser(directory) if directory else directory

    @model_validator(mode="after")
    def _directory_is_used(self) -> DataRecipe:
        if self.augmenting_outputs_dir is not None and self.augmenting_outputs != "disk":
            raise ValueError(
                f"data.augmenting_outputs_dir = {self.augmenting_outputs_dir!r}: nothing is kept there with "
                f"augmenting_outputs = {self.augmenting_outputs!r}; expected augmenting_outputs: disk"
            )
        return self

    @field_validator("train", "eval")
    @classmethod
    def _file_exists(cls, source: str | None) -> str | None:
        if source is not None and is_file_source(source) and not Path(source).expanduser().is_file():
            raise ValueError(f"there is no such file (looked from {Path.cwd()})")
        return source


class TrainingRecipe(_Section):
    """How to train. The defaults suit a composition: few parameters, all new, beside frozen bases."""

    output_dir: str = Field(description="a directory that can be written to, made if it is missing")
    epochs: PositiveFloat | None = Field(None, description="a number above 0 (3 if max_steps is not given either)")
    max_steps: PositiveInt | None = Field(None, description="a whole number of optimiser steps above 0")
    per_device_batch_size: PositiveInt = Field(8, description="a whole number above 0")
    gradient_accumulation: PositiveInt = Field(1, description="a whole number of batches per optimiser step, above 0")
    learning_rate: PositiveFloat = Field(3e-4, description="a number above 0, the highest learning rate of the run")
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="one of cosine, linear, constant"
    )
    warmup: NonNegativeFloat = Field(
        0.05, description="a share of the run (from 0 to below 1) or a whole number of steps"
    )
    weight_decay: NonNegativeFloat = Field(0.0, description="a number from 0")
    max_grad_norm: PositiveFloat = Field(1.0, description="a number above 0 that the gradient's norm is clipped to")
    log_steps: PositiveInt = Field(10, description="a whole number of steps above 0")
    eval_steps: PositiveInt = Field(100, description="a whole number of steps above 0; needs data.eval")
    save_steps: PositiveInt | None = Field(
        None,
        description="a whole number of steps above 0 (as eval_steps if not given), with data.eval a multiple of it",
    )
    keep_checkpoints: PositiveInt = Field(
        2, description="a whole number above 0; the best and the last checkpoint are always kept"
    )
    early_stopping_patience: PositiveInt | None = Field(
        None, description="a whole number of evaluations without improvement, above 0; needs data.eval"
    )
    seed: NonNegativeInt = Field(0, le=2**32 - 1, description="a whole number from 0 to 4,294,967,295")
    bf16: bool = Field(False, description="true or false: compute in bfloat16 (autocast)")
    fp16: bool = Field(False, description="true or false: compute in float16 (autocast, scaled gradients)")
    activation_checkpointing: bool = Field(
        False, description="true or false: recompute activations in the backward pass instead of keeping them"
    )
    report_to: list[str] = Field(
        [], description="a list of loggers that transformers knows, such as [tensorboard], [trackio] or [wandb]"
    )

    @field_validator("warmup")
    @classmethod
    def _share_or_steps(cls, warmup: float) -> float:
        if warmup > 1 and warmup != int(warmup):
            raise ValueError("neither a share of the run nor a whole number of steps")
        return warmup

    @field_validator("output_dir")
    @classmethod
    def _writable(cls, output_dir: str) -> str:
        output_dir = os.path.expanduser(output_dir)
        existing = next(p for p in (Path(output_dir).absolute(), *Path(output_dir).absolute().parents) if p.exists())
        if not existing.is_dir():
            raise ValueError(f"{existing} is a file, not a directory")
        if not os.access(existing, os.W_OK | os.X_OK):
            raise ValueError(f"{existing} cannot be written to")
        if existing == Path(output_dir).absolute() and any(existing.iterdir()):
            from calm.checkpoint import refuse_other_model  # which takes seconds to import, so only now

            try:
                refuse_other_model(output_dir)
            except CheckpointError as error:
                raise ValueError(str(error).removesuffix(".")) from error
        return output_dir

    @model_validator(mode="after")
    def _one_length(self) -> TrainingRecipe:
        if self.epochs is not None and self.max_steps is not None:
            raise ValueError(f"epochs = {self.epochs} and max_steps = {self.max_steps}: give one of them, not both")
        return self

    @model_validator(mode="after")
    def _one_precision(self) -> TrainingRecipe:
        if self.bf16 and self.fp16:
            raise ValueError("training.bf16 = True and training.fp16 = True: choose one of them")
        return self


class Recipe(_Section):
    """A training run: what is composed, on which data, and how it is trained."""

    anchor: str = Field(description="the name or path of the anchor model (m_B)")
    augmenting: str | dict[str, str] = Field(
        description="the name or path of the augmenting model (m_A), or several as {name: name or path}"
    )
    connections: PositiveInt | LayerPairs | dict[str, PositiveInt | LayerPairs] = Field(
        4,
        description=(
            "a number of connections above 0, or pairs [[augmenting layer, anchor layer], ...], or either of them by "
            "the augmenting model's name"
        ),
    )
    num_heads: PositiveInt | None = Field(None, description="a whole number that divides the anchor's width")
    attention: Literal["gated", "normalized", "paper"] = Field("gated", description="one of gated, normalized, paper")
    attend: Literal["causal", "prompt"] = Field("causal", description="one of causal, prompt")
    dtype: Literal["float32", "bfloat16"] = Field("float32", description="one of float32, bfloat16")
    attn_implementation: Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention"] | None = (
        Field(None, description="one of eager, sdpa, flash_attention_2, flash_attention_3, flex_attention")
    )
    quantization: Literal["int8", "nf4"] | None = Field(
        None, description="one of int8 (torchao), nf4 (4 bits, bitsandbytes), or left out"
    )
    data: DataRecipe = Field(description="the section that says what to train on")
    training: TrainingRecipe = Field(description="the section that says how to train")

    @field_validator("anchor", "augmenting")
    @classmethod
    def _local_model_exists(cls, models: str | dict[str, str]) -> str | dict[str, str]:
        for model in [models] if isinstance(models, str) else models.values():
            # "organisation/name" may be a hub name, but few of these can be anything but paths
            looks_local = model.startswith(("/", ".", "~")) or model.count("/") > 1 or model.endswith(".gguf")
            if looks_local and not Path(model).exists():
                from calm.sources import Source  # which takes seconds, so only now

                try:
                    Source.parse(model)
                except CheckpointError as error:
                    raise ValueError(f"{str(error).removesuffix('.')} (looked from {Path.cwd()})") from error
        return models

    @field_validator("connections", "augmenting")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if not value:
            raise ValueError("there is nothing in it")
        return value

    @model_validator(mode="after")
    def _evaluation_has_data(self) -> Recipe:
        for field in ("eval_steps", "early_stopping_patience"):
            if field in self.training.model_fields_set and self.data.eval is None:
                raise ValueError(
                    f"training.{field} = {getattr(self.training, field)}: there is no data.eval to evaluate on; "
                    f"give data.eval or leave out {field}"
                )
        if self.data.eval is not None and self.save_steps % self.training.eval_steps:
            raise ValueError(
                f"training.save_steps = {self.save_steps}: expected a multiple of training.eval_steps = "
                f"{self.training.eval_steps}"
            )
        return self

    @model_validator(mode="after")
    def _quantized_once(self) -> Recipe:
        if self.quantization is not None and (gguf := [base for base in self.bases if base.endswith(".gguf")]):
            raise ValueError(
                f"quantization = {self.quantization!r}: {gguf[0]} is a GGUF file, which transformers cannot quantize "
                "while it loads it; leave quantization out, or take the model's safetensors files"
            )
        return self

    @model_validator(mode="after")
    def _packed_prompts(self) -> Recipe:
        if self.data.packing and self.attend == "prompt":
            raise ValueError(
                "data.packing = True and attend = 'prompt': the prompts of several examples in one row cannot be told "
                "apart; train without packing"
            )
        return self

    @property
    def augmenting_by_name(self) -> dict[str, str]:
        """The augmenting models by name; a single one is called as `calm.compose` calls it."""
        return {"augmenting": self.augmenting} if isinstance(self.augmenting, str) else self.augmenting

    @property
    def bases(self) -> list[str]:
        """The anchor and the augmenting models."""
        return [self.anchor, *self.augmenting_by_name.values()]

    @property
    def save_steps(self) -> int:
        """Optimiser steps between checkpoints."""
        return self.training.save_steps or self.training.eval_steps


def load_recipe(path: str | Path) -> Recipe:
    """Read and checks a recipe.

    Args:
        path: the YAML file. Paths in it are relative to the working directory.

    Raises:
        CalmError: the file cannot be read or is not YAML, or fields are missing, unknown or wrong; the message names
            the file and, for each problem, the field, its value and what was expected.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CalmError(f"{path}: there is no such recipe (looked from {Path.cwd()})") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CalmError(f"{path}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise CalmError(f"{path}: not a YAML file: {error}") from error
    if not isinstance(values, dict):
        found = "it is empty" if values is None else f"it holds a {type(values).__name__}"
        raise CalmError(f"{path}: a recipe is a mapping of fields (anchor: ..., augmenting: ..., ...), but {found}")
    return check_recipe(values, name=str(path))


def check_recipe(values: dict[str, Any], name: str = "recipe") -> Recipe:
    """Check the fields of a recipe given as a dictionary.

    Args:
        values: the fields.
        name: how error messages call the recipe.

    Raises:
        CalmError: as `load_recipe`.
    """
    try:
        return Recipe.model_validate(values)
    except ValidationError as error:
        problems = list(dict.fromkeys(_problem(details, values) for details in error.errors()))
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise CalmError("\n  ".join([f"{name}: {count} in the recipe", *problems])) from error


def _problem(details: Any, values: dict[str, Any]) -> str:
    """One line for one of pydantic's errors: the field, its value, what was expected."""
    model: type[_Section] = Recipe
    path: list[str] = []
    expected, is_section = None, True
    for part in details["loc"]:  # a location goes on into types and list indices; a field is what users know
        known = model.model_fields.get(part)
        if known is None:
            break
        path.append(part)
        expected = known.description
        annotation: Any = known.annotation
        is_section = isinstance(annotation, type) and issubclass(annotation, _Section)
        if not is_section:
            break
        model = annotation
    if details["type"] == "extra_forbidden":
        unknown = str(details["loc"][-1])
        similar = difflib.get_close_matches(unknown, model.model_fields, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else f"the fields here are {', '.join(model.model_fields)}"
        return f"{'.'.join([*path, unknown])}: unknown field; {hint}"
    reason = str(details["ctx"]["error"]) if details["type"] == "value_error" else ""  # from a validator above
    if reason and is_section:  # it compares fields, and names them
        return reason
    value: Any = values
    for part in path:
        if part not in value:
            return f"{'.'.join(path)}: missing; expected {expected}"
        value = value[part]
    return f"{'.'.join(path)} = {value!r}: {reason + '; ' if reason else ''}expected {expected}"
