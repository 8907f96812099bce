"""A connection in vLLM: one causal attention from the anchor's layer output to an augmenting model's, paged as any."""

import math

import torch
import torch.nn.functional as F
from torch import nn
from vllm.config import CacheConfig
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.attention.selector import get_attn_backend

from calm.attention import NORM_EPS, Gate, alibi_slopes
from calm.attention import Connection as Original
from calm.errors import CalmError
from calm.serving.vllm.checks import ALIBI_BACKENDS

LARGEST_HEAD = 512
"""No attention backend of vLLM has larger heads."""

FLASH_2_LARGEST_HEAD = 256
"""FLASH_ATTN says what its newest version has kernels for; this is version 2's, the only one with ALiBi slopes."""


class Connection(nn.Module):
    """`calm.attention.Connection` with vLLM's layers (paper, section 3.1).

    `f_proj` is linear and only feeds `W_K` and `W_V`, so it is folded into them when the weights are loaded. Heads are
    padded with zeros to a size that the attention kernels have, which changes nothing, since the scale stays that of
    the unpadded ones. The gate is calm's own module; ranks of tensor parallelism, which share the heads, each have it
    whole.

    Args:
        augmenting_width: `D_A`.
        anchor_width: `D_B`.
        num_heads: `N_H`; must be divisible by the number of tensor-parallel ranks.
        attention: `"gated"`, `"normalized"` or `"paper"`.
        cache_config: vLLM's, without a sliding window.
        prefix: Name of the layer, for its part of the paged cache.

    Attributes:
        shapes: Of a `calm.attention.Connection`'s parameters by name, which `load` takes.

    Raises:
        CalmError: If the attention backend cannot compute it.
    """

    def __init__(
        self,
        augmenting_width: int,
        anchor_width: int,
        num_heads: int,
        attention: str,
        cache_config: CacheConfig,
        prefix: str,
    ):
        super().__init__()
        with torch.device("meta"):
            original = Original(augmenting_width, anchor_width, num_heads, attention)
        self.shapes = {name: parameter.shape for name, parameter in original.named_parameters()}
        self.num_heads = num_heads
        self.head_size = anchor_width // num_heads
        self.normalize = attention != "paper"
        attention_backend, self.padded_size = backend_and_size(self.head_size, cache_config, slopes=self.normalize)
        self.gate = Gate(anchor_width) if attention == "gated" else None
        inner = num_heads * self.padded_size
        self.q = ColumnParallelLinear(anchor_width, inner, bias=False, prefix=f"{prefix}.q")
        self.kv = MergedColumnParallelLinear(augmenting_width, [inner, inner], bias=False, prefix=f"{prefix}.kv")
        self.o = RowParallelLinear(inner, anchor_width, bias=False, prefix=f"{prefix}.o")

        local = num_heads // get_tensor_model_parallel_world_size()
        first = get_tensor_model_parallel_rank() * local
        slopes = alibi_slopes(num_heads, torch.device("cpu"))[first : first + local].tolist()
        self.attention = Attention(
            local,
            self.padded_size,
            1 / math.sqrt(self.head_size),
            alibi_slopes=slopes if self.normalize else None,
            cache_config=cache_config,
            prefix=f"{prefix}.attention",
            attn_backend=attention_backend,
        )
        backend = attention_backend.get_name()
        if self.normalize and backend not in ALIBI_BACKENDS:
            raise CalmError(
                f"vLLM's attention backend {backend} does not apply ALiBi slopes, which this composition's connections "
                f"need (attention='{attention}'). Choose another: --attention-backend {' or '.join(ALIBI_BACKENDS[1:])}"
            )

    def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        """What is to be added to the anchor's layer output.

        Args:
            hidden: `H_B`, `[tokens, D_B]`.
            context: `H_A` of the same tokens, `[tokens, D_A]`.

        Returns:
            `[tokens, D_B]`.
        """
        opened = None if self.gate is None else self.gate(hidden)
        if self.normalize:
            hidden = F.rms_norm(hidden, hidden.shape[-1:], eps=NORM_EPS)
            context = F.rms_norm(context, context.shape[-1:], eps=NORM_EPS)
        queries, _ = self.q(hidden)
        keys_and_values, _ = self.kv(context)
        keys, values = keys_and_values.chunk(2, dim=-1)
        injection, _ = self.o(self.attention(queries, keys, values))
        return injection if opened is None else (injection * opened).to(injection.dtype)

    def load(self, weights: dict[str, torch.Tensor]) -> None:
        """Take the weights of a `calm.attention.Connection`.

        Args:
            weights: Its parameters by name, of the shapes in `shapes`, on the CPU.
        """
        f_proj, dtype = weights["f_proj.weight"].float(), self.q.weight.dtype
        self.q.weight.weight_loader(self.q.weight, self._pad_rows(weights["w_q.weight"]).to(dtype))
        for shard, name in enumerate(("w_k.weight", "w_v.weight")):
            folded = self._pad_rows(weights[name].float() @ f_proj).to(dtype)
            self.kv.weight.weight_loader(self.kv.weight, folded, shard)
        w_o = self._pad_rows(weights["w_o.weight"].T).T.contiguous()
        self.o.weight.weight_loader(self.o.weight, w_o.to(dtype))
        if self.gate is not None:
            self.gate.weight.data.copy_(weights["gate.weight"])
            self.gate.bias.data.copy_(weights["gate.bias"])

    def _pad_rows(self, weight: torch.Tensor) -> torch.Tensor:
        """Each head's rows filled up with zeros: `[heads * head size, n]` to `[heads * padded size, n]`."""
        heads = weight.unflatten(0, (self.num_heads, self.head_size))
        return F.pad(heads, (0, 0, 0, self.padded_size - self.head_size)).flatten(0, 1)


class PaddedAttention(Attention):
    """An attention whose heads are padded with zeros, for a base with heads of a size that no kernel has.

    Args:
        attention: The one to stand for; it has to be forgotten.
        cache_config: The base's.
    """

    def __init__(self, attention: Attention, cache_config: CacheConfig):
        window = attention.sliding_window
        super().__init__(
            attention.num_heads,
            backend_and_size(attention.head_size, cache_config)[1],
            attention.impl.scale,
            num_kv_heads=attention.num_kv_heads,
            cache_config=cache_config,
            logits_soft_cap=attention.impl.logits_soft_cap or None,
            per_layer_sliding_window=window,
            prefix=attention.layer_name,
        )
        self.unpadded_size = attention.head_size

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """As `Attention.forward`, `[tokens, heads * head size]` in and out."""
        padding = (0, self.head_size - self.unpadded_size)
        query, key, value = (
            F.pad(states.unflatten(-1, (-1, self.unpadded_size)), padding).flatten(-2) for states in (query, key, value)
        )
        attended = super().forward(query, key, value).unflatten(-1, (-1, self.head_size))
        return attended[..., : self.unpadded_size].flatten(-2)


def backend_and_size(
    head_size: int, cache_config: CacheConfig, slopes: bool = False
) -> tuple[type[AttentionBackend], int]:
    """The attention backend to compute with, and the smallest head size, from the given one on, that it has.

    It is the one that vLLM chooses, but that slopes may need TRITON_ATTN where vLLM chooses FLASH_ATTN.

    Args:
        head_size: What is wanted.
        cache_config: For the cache's dtype.
        slopes: Whether the attention has ALiBi slopes.

    Raises:
        CalmError: If there is none.
    """
    for size in range(head_size, LARGEST_HEAD + 1):
        try:
            backend = get_attn_backend(size, torch.get_default_dtype(), cache_config.cache_dtype)
        except ValueError:
            continue
        if slopes and backend.get_name() == "FLASH_ATTN" and _flash_fails_with_slopes(size):
            backend = AttentionBackendEnum.TRITON_ATTN.get_class()
        fitting = next((larger for larger in range(size, LARGEST_HEAD + 1) if backend.supports_head_size(larger)), None)
        if fitting is not None:
            return backend, fitting
    raise CalmError(
        f"No attention backend of this vLLM has heads of size {head_size} or more. Choose another with "
        "--attention-backend, or compose with more heads (num_heads=)."
    )


def _flash_fails_with_slopes(head_size: int) -> bool:
    """Whether FLASH_ATTN prepares a step for a newer FlashAttention than the one that computes layers with slopes.

    These fall back to version 2 by themselves, which refuses what version 3 (Hopper's) is prepared with, and lacks the
    larger heads.
    """
    return head_size > FLASH_2_LARGEST_HEAD or get_flash_attn_version() != get_flash_attn_version(requires_alibi=True)
