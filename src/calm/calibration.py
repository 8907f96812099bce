"""How fast a machine is: measured once on small compositions, kept in a JSON file, used to predict a step's time.

Real training steps are run and each of their operations is timed. What an operation costs is then fitted, by its name
and dtype, as a fixed time plus a time for each FLOP and each byte; what is left of a step (Python, autograd, freeing
memory) as a time for each operation and each byte made. The operations of a step that was never run are known from
its shapes (`calm.tracing`), so its time is a sum.
"""

from __future__ import annotations

import os
import platform
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from time import perf_counter
from typing import Literal, TypeAlias

import numpy as np
import torch
import transformers
from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
)

from calm.composition import compose
from calm.errors import CalmError
from calm.tracing import Operation, Trace, connections_in_float32, loss_of, update

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICES = ("cpu", "cuda")
TURNS = 4
SHORTEST = 1e-7  # seconds; below this a clock says nothing

Cost: TypeAlias = tuple[float, float, float]


class Calibration(BaseModel):
    """The speed of one machine.

    Attributes:
        format_version: Of the file.
        device: "cpu" or "cuda".
        hardware: Name of the processor or GPU.
        threads: Threads that PyTorch computes with on a CPU.
        dtype: Of the bases that it was measured with (connections are in float32).
        versions: Of Python, torch and transformers.
        date: When it was measured.
        operations: By "name dtype": seconds of one operation, seconds by FLOP, seconds by byte. The names "product"
            and "other" stand for operations that were not measured, with and without FLOPs.
        between: Seconds by operation, and by byte made, that a step takes beside its operations.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    format_version: Literal[1] = 1
    device: Literal["cpu", "cuda"]
    hardware: str
    threads: int
    dtype: Literal["float32", "bfloat16", "float16"]
    versions: dict[str, str]
    date: str
    operations: dict[str, Cost]
    between: tuple[float, float]

    @model_validator(mode="after")
    def _knows_any_operation(self) -> Calibration:
        """What was not measured by itself costs what the rest of its kind does, which has to be there."""
        missing = [key for kind in ("product", "other") if (key := f"{kind} {self.dtype}") not in self.operations]
        if missing:
            raise ValueError(f"operations lack {' and '.join(map(repr, missing))}")
        return self

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON.

        Raises:
            CalmError: If the file cannot be written.
        """
        try:
            Path(path).write_text(self.model_dump_json(indent=2) + "\n")
        except OSError as error:
            raise CalmError(f"The calibration cannot be written to {os.fspath(path)!r}: {error}") from error

    def check_dtype(self, dtype: str) -> None:
        """Refuse to predict what was not measured.

        Raises:
            CalmError: If the bases of the plan are in another dtype.
        """
        if dtype != self.dtype:
            raise CalmError(
                f"dtype={dtype!r}: the calibration of {self.hardware} was measured in {self.dtype}. Plan in "
                f"{self.dtype}, or measure again: calm plan --calibrate FILE --dtype {dtype}."
            )

    def seconds(self, operations: Sequence[Operation]) -> float:
        """Predict how long a step takes.

        Args:
            operations: All of the step.

        Returns:
            Seconds.
        """
        by_operation, by_byte = self.between
        total = by_operation * len(operations) + by_byte * sum(op.new_bytes for op in operations)
        return total + sum(self._seconds_of(op) for op in operations)

    def _seconds_of(self, operation: Operation) -> float:
        anything = "product" if operation.flops else "other"
        keys = (
            f"{operation.name} {operation.dtype}",
            f"{anything} {operation.dtype}",
            f"{anything} {self.dtype}",
        )
        fixed, by_flop, by_byte = next(self.operations[key] for key in keys if key in self.operations)
        return fixed + by_flop * operation.flops + by_byte * operation.bytes


def load_calibration(path: str | os.PathLike[str]) -> Calibration:
    """Read a calibration.

    Args:
        path: A file that `Calibration.save` wrote.

    Returns:
        The calibration.

    Raises:
        CalmError: If there is no such file, or if it is damaged, of another version of the format, or of a kind of
            device that is not known.
    """
    name = os.fspath(path)
    try:
        return Calibration.model_validate_json(Path(path).read_bytes())
    except OSError as error:
        raise CalmError(f"The calibration {name!r} cannot be read: {error}") from error
    except ValidationError as error:
        problem = error.errors()[0]
        where, found = ".".join(map(str, problem["loc"])) or "the file", problem["input"]
        said = f"{where} = {found!r}: " if isinstance(found, str | int | float) and problem["loc"] else f"{where}: "
        raise CalmError(
            f"{name!r} is no calibration that this version of calm can use: {said}{problem['msg']}. Make one on the "
            "machine that will train: calm plan --calibrate FILE."
        ) from error


# -- measuring ----------------------------------------------------------------------------------------------------

Pair: TypeAlias = tuple[PreTrainedConfig, PreTrainedConfig, int, int]


def _pairs(scale: int) -> list[Pair]:
    """Compositions to measure: (anchor, augmenting model, sequences, tokens). GPUs want larger ones (`scale`)."""

    def sizes(width: int, layers: int, heads: int, vocab_size: int) -> dict[str, int]:
        return {
            "hidden_size": width * scale,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "vocab_size": vocab_size,
            "intermediate_size": 3 * width * scale,
            "num_key_value_heads": heads // 2,
            "head_dim": width * scale // heads,
            "max_position_embeddings": 4096,
        }

    def gpt2(width: int, layers: int, heads: int, vocab_size: int) -> GPT2Config:
        return GPT2Config(n_embd=width * scale, n_layer=layers, n_head=heads, vocab_size=vocab_size, n_positions=4096)

    return [
        (LlamaConfig(**sizes(256, 3, 4, 8192)), gpt2(128, 2, 2, 8192), 2, 128 * scale),
        (LlamaConfig(**sizes(768, 2, 12, 49152)), Qwen3Config(**sizes(320, 2, 4, 49152)), 1, 512 * scale),
        (gpt2(512, 2, 8, 24576), LlamaConfig(**sizes(512, 2, 8, 24576)), 4, 256 * scale),
        (Gemma2Config(**sizes(384, 2, 6, 32768)), Gemma2Config(**sizes(192, 2, 4, 32768)), 2, 256 * scale),
    ]


def calibrate(dtype: str = "bfloat16", device: str | None = None) -> Calibration:
    """Measure this machine, in about a minute; it should do nothing else meanwhile.

    Args:
        dtype: Of the bases, as in `plan`.
        device: "cpu" or "cuda"; a GPU if there is one.

    Returns:
        The calibration. On a GPU each operation is waited for, so that what it hides behind others is not seen.

    Raises:
        CalmError: On an unknown dtype or device.
    """
    if dtype not in DTYPES:
        raise CalmError(f"dtype={dtype!r}: expected one of {', '.join(map(repr, DTYPES))}.")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in DEVICES or (device == "cuda" and not torch.cuda.is_available()):
        raise CalmError(f"device={device!r}: expected 'cpu', or 'cuda' where PyTorch finds a GPU.")
    samples: dict[str, list[tuple[Operation, float]]] = defaultdict(list)
    steps, rests = [], []
    for pair in _pairs(scale=1 if device == "cpu" else 4):
        operations, seconds, whole = _measure(pair, DTYPES[dtype], device)
        for operation, taken in zip(operations, seconds, strict=True):
            anything = "product" if operation.flops else "other"
            samples[f"{operation.name} {operation.dtype}"].append((operation, taken))
            samples[f"{anything} {operation.dtype}"].append((operation, taken))
        steps.append((len(operations), sum(operation.new_bytes for operation in operations)))
        rests.append(max(whole - sum(seconds), SHORTEST))
    fitted = {key: _fit([(1, op.flops, op.bytes) for op, _ in of], [s for _, s in of]) for key, of in samples.items()}
    return Calibration(
        device=device,  # type: ignore[arg-type]
        hardware=torch.cuda.get_device_name() if device == "cuda" else processor(),
        threads=torch.get_num_threads(),
        dtype=dtype,  # type: ignore[arg-type]
        versions={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        date=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        operations={key: (a, b, c) for key, (a, b, c) in sorted(fitted.items())},
        between=_fit(steps, rests),  # type: ignore[arg-type]
    )


def _measure(pair: Pair, dtype: torch.dtype, device: str) -> tuple[list[Operation], list[float], float]:
    """A step's operations, the shortest time that each of them took over the turns, and that of a whole step."""

    def clock() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return perf_counter()

    anchor, augmenting, batch_size, length = pair
    with torch.random.fork_rng(), torch.device(device):
        model = compose(
            AutoModelForCausalLM.from_config(anchor, dtype=dtype), AutoModel.from_config(augmenting, dtype=dtype), 2
        )
        ids = torch.randint(anchor.vocab_size, (batch_size, length))
        optimizer = connections_in_float32(model)
        update(loss_of(model, ids), optimizer)  # warm-up
        wholes, turns = [], []
        for _ in range(TURNS):
            start = clock()
            update(loss_of(model, ids), optimizer)
            wholes.append(clock() - start)
            with Trace(clock) as trace:
                update(loss_of(model, ids), optimizer)
            turns.append(trace.seconds)
    return trace.operations, [max(min(seconds), SHORTEST) for seconds in zip(*turns, strict=True)], min(wholes)


def _fit(amounts: Iterable[tuple[int, ...]], seconds: Iterable[float]) -> tuple[float, ...]:
    """Costs of each amount, none below zero, with the least sum of squared relative errors.

    With three amounts all choices of those that cost something can be tried.
    """
    taken = np.array(list(seconds))
    relative = np.array(list(amounts), dtype=float) / taken[:, None]
    best, error = np.zeros(relative.shape[1]), float("inf")
    for choice in range(1, 1 << relative.shape[1]):
        chosen = [i for i in range(relative.shape[1]) if choice >> i & 1]
        costs = np.linalg.lstsq(relative[:, chosen], np.ones(len(taken)), rcond=None)[0]
        left = float(((relative[:, chosen] @ costs - 1) ** 2).sum())
        if (costs >= 0).all() and left < error - 1e-9:
            best, error = np.zeros(relative.shape[1]), left
            best[chosen] = costs
    return tuple(best.tolist())


def processor() -> str:
    """The name of this machine's processor."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
