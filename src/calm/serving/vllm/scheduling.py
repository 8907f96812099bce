"""VLLM's schedulers, with prefix caches that requests share only where the same augmenting models are on."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from vllm.config import VllmConfig
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from calm.serving.vllm.switches import row_of


def salted(salt: str | None, off: Sequence[str]) -> str | None:
    """A cache salt for a request's own salt and what is switched off in it: another for each pair of the two.

    What the anchor keeps of a token depends on what is added to it, so that blocks of the cache must not go from one
    setting to another. vLLM keeps blocks apart by a request's salt, and so does what stores them elsewhere.

    Args:
        salt: The request's own.
        off: The augmenting models that are off.
    """
    return None if salt is None and not off else json.dumps([salt, list(off)])


class _Salting(Scheduler):
    def __init__(self, vllm_config: VllmConfig, *others: Any, **arguments: Any):
        super().__init__(vllm_config, *others, **arguments)
        self._names = list(vllm_config.model_config.hf_config.augmenting_configs)

    def add_request(self, request: Request) -> None:
        """Salt a request before its beginning is looked for in the cache."""
        row = row_of(request.sampling_params, self._names)
        off = [] if row is None else [name for name, on in zip(self._names, row, strict=True) if not on]
        request.cache_salt = salted(request.cache_salt, off)
        if request.cache_salt is not None:
            request.block_hashes.clear()
            request.update_block_hashes()
        super().add_request(request)


class _SaltingAsync(_Salting, AsyncScheduler):
    pass


def scheduler(vllm_config: VllmConfig, **arguments: Any) -> Scheduler:
    """What vLLM makes a composition's scheduler with (`SchedulerConfig.scheduler_cls`).

    Which one it takes is not known before the configuration is whole.

    Args:
        vllm_config: vLLM's configuration.
        arguments: The scheduler's.
    """
    kind = _SaltingAsync if vllm_config.scheduler_config.async_scheduling else _Salting
    return kind(vllm_config, **arguments)


SCHEDULER = f"{__name__}.{scheduler.__name__}"
