"""Which augmenting models are on in each request: known to vLLM's workers by the request, to the model by the token."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.sampling_params import SamplingParams
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.sample import logits_processor as processors_v1
from vllm.v1.worker.gpu.sample import logits_processor as processors_v2

from calm.serving.augmenting import switched_on

ARGUMENT = "augmenting"
"""Of `SamplingParams.extra_args`, and so of `vllm_xargs` over HTTP."""

LAYER = "augmenting_switches"
"""Under this name the switches are among a model's layers, where a worker's other parts find them."""

Row = tuple[bool, ...]


def row_of(params: SamplingParams | None, names: Sequence[str]) -> Row | None:
    """For each augmenting model whether a request has it on, or `None` where all are.

    Args:
        params: The request's.
        names: Those of the composition.

    Raises:
        CalmError: If the request asks for what is not there.
    """
    asked = ((params and params.extra_args) or {}).get(ARGUMENT)
    if asked is None:
        return None
    on = switched_on(asked, names)
    return None if len(on) == len(names) else tuple(name in on for name in names)


class Switches:
    """Which augmenting models are on, on the device, at addresses that stay: CUDA graphs read them.

    Args:
        names: The augmenting models.
        vllm_config: vLLM's configuration.
    """

    def __init__(self, names: Sequence[str], vllm_config: VllmConfig):
        self.names = tuple(names)
        scheduler, device = vllm_config.scheduler_config, vllm_config.device_config.device
        self._rows = torch.ones(scheduler.max_num_seqs + 1, len(names), dtype=torch.bool, device=device)
        self._tokens = torch.ones(scheduler.max_num_batched_tokens, len(names), dtype=torch.bool, device=device)
        self._counted = torch.arange(len(self._tokens), dtype=torch.int32, device=device)
        vllm_config.compilation_config.static_forward_context[LAYER] = self

    def set_rows(self, rows: Mapping[int, Row]) -> None:
        """Say what is on in each row; in those left out, everything.

        Args:
            rows: By the place in the batch, or wherever else the model runner keeps requests.
        """
        table = torch.ones(self._rows.shape, dtype=torch.bool)
        for index, row in rows.items():
            table[index] = torch.tensor(row)
        async_tensor_h2d(table, out=self._rows)

    def spread(self, starts: torch.Tensor, tokens: int, rows: torch.Tensor | None = None) -> None:
        """Look up what is on for each token of a step: on the device, so that a CUDA graph may hold it.

        Args:
            starts: Int32 `[requests + 1]`, where each request's tokens begin; padding repeats the end.
            tokens: How many tokens the step has; those that pad it get anything.
            rows: Int64 `[requests]`, each request's row; by default they are in order.
        """
        row = torch.searchsorted(starts[1:], self._counted[:tokens], right=True)
        if rows is not None:
            row = rows[row.clamp(max=len(rows) - 1)]
        self._tokens[:tokens] = self._rows[row]

    def of_tokens(self, tokens: int) -> torch.Tensor:
        """Bool `[tokens, augmenting models]`."""
        return self._tokens[:tokens]


class Switch(processors_v1.LogitsProcessor, processors_v2.LogitsProcessor):
    """Tells the switches of requests that come, move and go; leaves the logits alone.

    A logits processor is the part of vLLM's workers that hears of these, on every rank and before the step that they
    are first part of. The two model runners of vLLM each have an interface for them, and this is both.

    Attributes:
        names: The augmenting models; each composition has a class of its own, see `processor`.
    """

    names: tuple[str, ...] = ()

    def __init__(self, vllm_config: VllmConfig, *others: Any):
        self._layers = vllm_config.compilation_config.static_forward_context  # empty until the model is made
        self._rows: dict[int, Row] = {}
        self._changed = False

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse a request, before it is queued, that names what is not there.

        Raises:
            CalmError: See `switched_on`; over HTTP status 400.
        """
        row_of(sampling_params, cls.names)

    def _row_of(self, params: SamplingParams, *others: Any) -> Row | None:
        return row_of(params, self.names)

    def update_state(self, batch_update: processors_v1.BatchUpdate | None) -> None:
        """For the first model runner: rows are places in the batch."""
        if processors_v1.process_dict_updates(self._rows, batch_update, self._row_of):
            self._layers[LAYER].set_rows(self._rows)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """For the second model runner: rows are slots, which a request keeps.

        Returns:
            That no logits are changed.
        """
        before, row = self._rows.pop(req_idx, None), self._row_of(sampling_params)
        if row is not None:
            self._rows[req_idx] = row
        self._changed |= before != row
        return False

    def apply_staged_writes(self) -> None:
        """For the second model runner: all requests of a step have been added."""
        if self._changed:
            self._layers[LAYER].set_rows(self._rows)
            self._changed = False

    def is_argmax_invariant(self) -> bool:
        """It is."""
        return True

    def apply(self, logits: torch.Tensor, *others: Any) -> torch.Tensor:
        """Nothing."""
        return logits


_PREFIX = "Switch_"


def processor(names: Sequence[str]) -> str:
    """Under which name vLLM imports the logits processor of a composition.

    vLLM makes these from nothing but a name, in processes that hold no model too, and has the class, not an instance,
    check requests. So the name says what the composition's augmenting models are called.

    Args:
        names: The augmenting models.
    """
    return f"{__name__}:{_PREFIX}{json.dumps(list(names)).encode().hex()}"


@functools.cache
def _class_of(encoded: str) -> type[Switch]:
    return type(_PREFIX + encoded, (Switch,), {"names": tuple(json.loads(bytes.fromhex(encoded)))})


def __getattr__(name: str) -> Any:
    if name.startswith(_PREFIX):
        return _class_of(name.removeprefix(_PREFIX))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
