"""The attention backend of connections where vLLM chooses FLASH_ATTN: there is no GPU, so its answers are made up."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import engine
import pytest
from factories import Mix
from vllm.v1.attention.backends import flash_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

from calm.serving.vllm import connection


def versions(monkeypatch: pytest.MonkeyPatch, own: int | None, with_slopes: int | None) -> None:
    """Let vLLM say that its FlashAttention is of these versions."""
    monkeypatch.setattr(
        connection, "get_flash_attn_version", lambda requires_alibi=False: with_slopes if requires_alibi else own
    )


@pytest.mark.parametrize(
    ("version", "head_size", "slopes", "chosen"),
    [
        (2, 64, True, ("FLASH_ATTN", 64)),
        (3, 64, True, ("TRITON_ATTN", 64)),  # Hopper
        (4, 64, True, ("TRITON_ATTN", 64)),  # Blackwell
        (3, 64, False, ("FLASH_ATTN", 64)),
        (3, 16, True, ("TRITON_ATTN", 32)),  # its smallest
        (3, 20, True, ("TRITON_ATTN", 32)),
        (2, 20, True, ("FLASH_ATTN", 24)),
        (2, 256, True, ("FLASH_ATTN", 256)),
        (2, 300, True, ("TRITON_ATTN", 304)),  # FLASH_ATTN has these, but not with slopes
        (2, 300, False, ("FLASH_ATTN", 304)),
        (None, 64, True, ("FLASH_ATTN", 64)),  # ROCm's, which has one version only
    ],
)
def test_slopes_need_a_flash_attention_that_is_prepared_for_them(
    version: int | None, head_size: int, slopes: bool, chosen: tuple[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def choose(size: int, *others: object) -> type[FlashAttentionBackend]:
        """As vLLM does with --attention-backend FLASH_ATTN."""
        if not FlashAttentionBackend.supports_head_size(size):
            raise ValueError("not valid for this configuration")
        return FlashAttentionBackend

    monkeypatch.setattr(connection, "get_attn_backend", choose)
    monkeypatch.setattr(flash_attn, "is_fa_version_supported", lambda version: True)
    versions(monkeypatch, version, version and 2)
    cache_config: Any = SimpleNamespace(cache_dtype="auto")
    backend, size = connection.backend_and_size(head_size, cache_config, slopes)
    assert (backend.get_name(), size) == chosen


class Flash(CPUAttentionBackend):
    """What vLLM chooses."""

    @staticmethod
    def get_name() -> str:
        return "FLASH_ATTN"


class Triton(CPUAttentionBackend):
    """What the connections get instead."""

    @staticmethod
    def get_name() -> str:
        return "TRITON_ATTN"


@pytest.mark.parametrize("attention", ["gated", "paper"])
def test_connections_compute_with_another_backend_than_the_bases(
    attention: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one engine, with the right logits; those of the paper have no slopes and keep what vLLM chose."""
    mix = Mix("llama", ("gpt2",), attention=attention, anchor_shape=(64, 4, 2), augmenting_shapes=((64, 3, 2),))
    expected = engine.expect(engine.eager(engine.save(mix, tmp_path)), engine.prompts())
    plain, given = connection.Attention, []

    def attend(*arguments: Any, attn_backend: type, **options: Any) -> connection.Attention:
        given.append(attn_backend)
        return plain(*arguments, attn_backend=attn_backend, **options)

    monkeypatch.setattr(connection, "Attention", attend)
    monkeypatch.setattr(connection, "get_attn_backend", lambda *others: Flash)
    monkeypatch.setattr(connection, "AttentionBackendEnum", SimpleNamespace(TRITON_ATTN=_Found(Triton)))
    versions(monkeypatch, 3, 2)
    with engine.serving(tmp_path / "composed") as llm:
        outputs = engine.run(llm, [one.prompt for one in expected])
    assert set(given) == {Flash if attention == "paper" else Triton}
    assert engine.worst(outputs, expected) < 1e-3


class _Found:
    def __init__(self, backend: type):
        self._backend = backend

    def get_class(self) -> type:
        return self._backend
