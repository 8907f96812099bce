"""What augmenting models put out for a data set, kept in memory or memory-mapped: it is the same in every epoch."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import transformers
from accelerate.utils import broadcast_object_list
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import cached_file

from calm.backbones import computation_of
from calm.checkpoint import weight_files
from calm.data import CompletionCollator, Row
from calm.errors import CalmError
from calm.sources import Source, load_config

if TYPE_CHECKING:
    from accelerate import Accelerator

    from calm.model import CalmForCausalLM

logger = logging.getLogger(__name__)

STATES_FILE = "outputs.bin"
DESCRIPTION_FILE = "outputs.json"
UNFINISHED = ".unfinished-"
FORMAT = 1


@dataclass(frozen=True)
class KeptOutputs:
    """What the connected augmenting layers put out for every token of some rows.

    Attributes:
        states: `[tokens, sum of widths]`, rows one after another, the dtype that the augmenting models compute in.
        widths: `D_A` of each output, by `"NAME.LAYER"`, in the order of the columns.
        starts: Int64 `[rows + 1]`, where each row starts.
    """

    states: Tensor
    widths: dict[str, int]
    starts: np.ndarray

    def of_row(self, index: int) -> dict[str, Tensor]:
        """The outputs of one row, `[length, D_A]` by name; read from the disk only when they are used."""
        parts = self.states[self.starts[index] : self.starts[index + 1]].split(list(self.widths.values()), dim=-1)
        return dict(zip(self.widths, parts, strict=True))


class RowsWithOutputs(torch.utils.data.Dataset[Row]):
    """Rows of a data set, each with what the augmenting models put out for it.

    Args:
        rows: From `calm.data`.
        kept: Their outputs.
    """

    def __init__(self, rows: list[Row], kept: KeptOutputs) -> None:
        self.rows, self.kept = rows, kept

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        """A row with its `augmenting_outputs`."""
        return {**self.rows[index], "augmenting_outputs": self.kept.of_row(index)}


def key_of(augmenting: Mapping[str, str], layers: Mapping[str, list[int]], rows: list[Row], precision: str) -> str:
    """Name what is kept by everything that it depends on.

    Args:
        augmenting: Names, folders or GGUF files of the augmenting models, by name.
        layers: The connected layers of each.
        rows: The data.
        precision: What dtype is computed in, and how.

    Returns:
        32 hexadecimal digits.

    Raises:
        CheckpointError: If an augmenting model has neither safetensors nor GGUF files.
    """
    digest = hashlib.sha256()
    digest.update(json.dumps([FORMAT, transformers.__version__, precision, layers]).encode())
    for name, base in augmenting.items():
        source = Source.parse(base)
        if source.gguf_file is None:
            files = weight_files(source.name_or_path, revision=source.revision)
        else:
            files = [cached_file(source.name_or_path, source.gguf_file, revision=source.revision)]
        digest.update(json.dumps([name, computation_of(load_config(source))], sort_keys=True).encode())
        for file in files:
            with open(file, "rb") as opened:
                while block := opened.read(1 << 24):
                    digest.update(block)
    for row in rows:
        digest.update(len(row["input_ids"]).to_bytes(8, "little"))
        for field in ("input_ids", "position_ids"):
            digest.update(row[field].tobytes() if field in row else b"")
    return digest.hexdigest()[:32]


def is_kept(path: Path) -> bool:
    """Whether a directory holds the outputs of a whole data set.

    Every process calls it, and all get the first one's answer: another run may keep them at any moment.
    """
    answer: bool = broadcast_object_list([(path / DESCRIPTION_FILE).is_file()])[0]
    return answer


def references(path: Path) -> dict[str, Any]:
    """The references, fingerprints included, of the augmenting models whose outputs a directory holds."""
    recorded: dict[str, Any] = json.loads((path / DESCRIPTION_FILE).read_text())["augmenting_references"]
    return recorded


def open_kept(path: Path, rows: list[Row]) -> KeptOutputs:
    """Map what `keep` wrote into memory.

    Args:
        path: The directory.
        rows: The data that it was written for.

    Raises:
        CalmError: If the file is not as long as it has to be.
    """
    description = json.loads((path / DESCRIPTION_FILE).read_text())
    starts, widths = _starts(rows), description["widths"]
    dtype = getattr(torch, description["dtype"])
    count, found = int(starts[-1]) * sum(widths.values()), (path / STATES_FILE).stat().st_size
    if found != count * dtype.itemsize:
        raise CalmError(
            f"{path / STATES_FILE} has {found:,} bytes, expected {count * dtype.itemsize:,}: it is damaged; delete "
            f"{path}, and the augmenting models' outputs are computed again"
        )
    states = torch.from_file(str(path / STATES_FILE), shared=False, size=count, dtype=dtype)
    return KeptOutputs(states.view(int(starts[-1]), -1), widths, starts)


def keep(
    model: CalmForCausalLM,
    rows: list[Row],
    collator: CompletionCollator,
    accelerator: Accelerator,
    batch_size: int,
    path: Path | None = None,
) -> KeptOutputs:
    """Run the augmenting models over a data set once and keep what their connected layers put out (issue 3).

    Several runs may do so for one `path` at once: each writes into a hidden directory of its own beside it, and what
    is complete first stays. Only a run that is killed leaves its hidden directory; the next one names it in a warning.

    Args:
        model: The composition, its augmenting models loaded.
        rows: The data; none is cut, padding is not kept.
        collator: Makes batches of rows.
        accelerator: Computes as in training; of several processes each does its share, which needs a `path`.
        batch_size: Rows that run together.
        path: A directory that all processes reach, or `None` to keep the outputs in memory. It appears when it is
            complete.

    Returns:
        The outputs.

    Raises:
        CalmError: If there is no space left for them, or if several processes are to keep them in memory.
    """
    if path is None and accelerator.num_processes > 1:
        raise CalmError(
            f"data.augmenting_outputs = 'memory' on {accelerator.num_processes} processes: each would hold all of "
            "them; expected 'disk', which the processes share"
        )
    starts = _starts(rows)
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]["input_ids"]))  # what is too large fails at once
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    first = _outputs(model, rows, order[:1], collator, accelerator)
    widths = {key: output.shape[-1] for key, output in first.items()}
    dtype = next(iter(first.values())).dtype

    def computed() -> Iterator[tuple[int, Tensor]]:
        mine = batches[accelerator.process_index :: accelerator.num_processes]
        for indices in tqdm(mine, desc="augmenting outputs", disable=not accelerator.is_main_process):
            outputs = _outputs(model, rows, indices, collator, accelerator)
            joined = torch.cat([output.to("cpu", dtype) for output in outputs.values()], dim=-1)
            for states, index in zip(joined, indices, strict=True):
                yield index, states[: starts[index + 1] - starts[index]].contiguous()

    if path is None:
        kept = torch.empty(int(starts[-1]), sum(widths.values()), dtype=dtype)
        for index, states in computed():
            kept[starts[index] : starts[index + 1]] = states
        return KeptOutputs(kept, widths, starts)

    own = broadcast_object_list([uuid.uuid4().hex])[0]  # of this run, and in all of its processes the same
    staging = path.with_name(f"{UNFINISHED}{path.name}-{own}")
    try:
        if accelerator.is_main_process:
            path.parent.mkdir(parents=True, exist_ok=True)
            _warn_of_unfinished(path.parent)
            staging.mkdir()
            (staging / STATES_FILE).touch()
        accelerator.wait_for_everyone()
        with (staging / STATES_FILE).open("r+b") as file:
            for index, states in computed():
                file.seek(int(starts[index]) * sum(widths.values()) * dtype.itemsize)
                file.write(states.view(torch.uint8).numpy().data)
            file.flush()
            os.fsync(file.fileno())
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            description = {
                "widths": widths,
                "dtype": str(dtype).removeprefix("torch."),
                "augmenting_references": model.config.augmenting_references,
            }
            (staging / DESCRIPTION_FILE).write_text(json.dumps(description))
            try:
                os.replace(staging, path)
            except OSError:
                if not (path / DESCRIPTION_FILE).is_file():  # else another run was first, with the same outputs
                    raise
        accelerator.wait_for_everyone()  # until they are where all look for them
    except OSError as error:
        size = int(starts[-1]) * sum(widths.values()) * dtype.itemsize
        raise CalmError(
            f"the augmenting models' outputs, {size:,} bytes, could not be written to {path.parent}: {error}; make "
            "room, or give another data.augmenting_outputs_dir, or augmenting_outputs: recompute"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return open_kept(path, rows)


def _warn_of_unfinished(directory: Path) -> None:
    """Name what other runs have begun there; no file system that is shared tells for certain whether they live."""
    if unfinished := sorted(map(str, directory.glob(f"{UNFINISHED}*"))):
        logger.warning(
            "unfinished outputs of augmenting models, of runs that are at it now or were killed; delete what killed "
            "ones left: %s",
            ", ".join(unfinished),
        )


def _starts(rows: list[Row]) -> np.ndarray:
    return np.cumsum([0, *(len(row["input_ids"]) for row in rows)])


def _outputs(
    model: CalmForCausalLM,
    rows: list[Row],
    indices: list[int],
    collator: CompletionCollator,
    accelerator: Accelerator,
) -> dict[str, Tensor]:
    batch = collator([rows[i] for i in indices])
    del batch["labels"]
    with accelerator.autocast():
        return model.augmenting_outputs(**{key: value.to(accelerator.device) for key, value in batch.items()})
