"""Tiny random models of many architectures, compositions of them that are not trivially the anchor, and comparisons."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

import calm

VOCAB = 64
CONTEXT = 64
WINDOW = 4  # of sliding-window attention: shorter than any sequence of the tests
PAD, EOS = 0, 1  # the models know no end of sequence: a test that wants one passes eos_token_id=EOS

Maker = Callable[[int, int, int], PreTrainedConfig]  # (width, layers, heads)


def _llama_like(name: str, **extra: object) -> Maker:
    def make(width: int, layers: int, heads: int) -> PreTrainedConfig:
        return getattr(transformers, name)(
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=max(1, heads // 2),
            head_dim=width // heads,
            max_position_embeddings=CONTEXT,
            **_COMMON,
            **{k: v(layers) if callable(v) else v for k, v in extra.items()},
        )

    return make


def _alternating(layers: int) -> list[str]:
    return ["sliding_attention" if i % 2 == 0 else "full_attention" for i in range(layers)]


_COMMON = {"vocab_size": VOCAB, "pad_token_id": PAD, "bos_token_id": None, "eos_token_id": None}
_NO_DROPOUT_GPT2 = {"embd_pdrop": 0.0, "resid_pdrop": 0.0, "attn_pdrop": 0.0}
_MOE = {"num_local_experts": 3, "num_experts_per_tok": 2}
_SLIDING = {"sliding_window": WINDOW, "layer_types": _alternating}

CONFIGS: dict[str, Maker] = {
    "llama": _llama_like("LlamaConfig"),
    "gemma": _llama_like("GemmaConfig"),
    "gemma2": _llama_like("Gemma2Config", query_pre_attn_scalar=8, **_SLIDING),
    "gemma3_text": _llama_like("Gemma3TextConfig", query_pre_attn_scalar=8, **_SLIDING),
    "qwen2": _llama_like("Qwen2Config"),
    "qwen3": _llama_like("Qwen3Config"),
    "mistral": _llama_like("MistralConfig", sliding_window=WINDOW),
    "phi3": _llama_like("Phi3Config"),
    "olmo": _llama_like("OlmoConfig"),
    "olmo2": _llama_like("Olmo2Config"),
    "olmo3": _llama_like("Olmo3Config", **_SLIDING),
    "mixtral": _llama_like("MixtralConfig", **_MOE),
    "gpt_oss": _llama_like("GptOssConfig", **_MOE, **_SLIDING),
    "gpt2": lambda width, layers, heads: transformers.GPT2Config(
        n_embd=width, n_layer=layers, n_head=heads, n_positions=CONTEXT, **_NO_DROPOUT_GPT2, **_COMMON
    ),
    "gpt_neox": lambda width, layers, heads: transformers.GPTNeoXConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=CONTEXT,
        **_COMMON,
    ),
    "gpt_neo": lambda width, layers, heads: transformers.GPTNeoConfig(
        hidden_size=width,
        num_layers=2 * (layers // 2),
        attention_types=[[["global", "local"], layers // 2]],
        num_heads=heads,
        window_size=WINDOW,
        max_position_embeddings=CONTEXT,
        embed_dropout=0.0,
        resid_dropout=0.0,
        attention_dropout=0.0,
        **_COMMON,
    ),
    "falcon": lambda width, layers, heads: transformers.FalconConfig(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, **_COMMON
    ),
    "bloom": lambda width, layers, heads: transformers.BloomConfig(
        hidden_size=width,
        n_layer=layers,
        n_head=heads,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **_COMMON,
    ),
    "opt": lambda width, layers, heads: transformers.OPTConfig(
        hidden_size=width,
        word_embed_proj_dim=width,
        ffn_dim=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=CONTEXT,
        dropout=0.0,
        **_COMMON,
    ),
    "mamba": lambda width, layers, heads: transformers.MambaConfig(
        hidden_size=width, num_hidden_layers=layers, state_size=4, **_COMMON
    ),
}

# The invariants run over these: rotary, learned, offset and ALiBi positions; pre-, post- and parallel norms; tuple and
# tensor outputs of layers; grouped heads; sliding windows; experts; a recurrent model.
ANCHORS = (
    "llama",
    "gemma2",
    "gemma3_text",
    "qwen3",
    "gpt2",
    "gpt_neox",
    "gpt_neo",
    "falcon",
    "bloom",
    "mixtral",
    "opt",
)
OTHER_ANCHORS = ("gemma", "qwen2", "mistral", "phi3", "olmo2", "gpt_oss")
AUGMENTING = (*ANCHORS, "mamba")


def config(architecture: str, width: int = 32, layers: int = 4, heads: int = 4) -> PreTrainedConfig:
    """The configuration of a tiny model."""
    return CONFIGS[architecture](width, layers, heads)


def _randomize(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Weights large enough for sharp attention and logits that differ: a degenerate model hides every mistake."""
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if name.endswith(("A_log", ".D", "dt_proj.bias")):  # a recurrence with other values need not be stable
            continue
        noise = torch.randn(weight.shape, generator=generator)
        if weight.dim() > 1:
            weight.data = noise if "embed" in name or "wte" in name else noise / weight.shape[-1] ** 0.5
        else:
            weight.data += 0.1 * noise
    return model


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """The same random numbers in every run: torch starts each process with others."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


@functools.cache
def _base(architecture: str, width: int, layers: int, heads: int, seed: int) -> PreTrainedModel:
    with _seeded(seed):
        model = AutoModelForCausalLM.from_config(config(architecture, width, layers, heads))
    return _randomize(model, seed).eval()


def base(architecture: str, width: int = 32, layers: int = 4, heads: int = 4, seed: int = 0) -> PreTrainedModel:
    """A tiny random model of its own, in evaluation mode, float32."""
    return copy.deepcopy(_base(architecture, width, layers, heads, seed))


@dataclass(frozen=True)
class Mix:
    """A composition to build: everything that a test varies, hashable, so that what is built can be kept.

    Attributes:
        anchor: Architecture of the anchor.
        augmenting: Architectures of the augmenting models.
        connections: A number, or `(augmenting layer, anchor layer)` pairs for each augmenting model.
        attention: "gated", "normalized" or "paper".
        attend: "causal" or "prompt".
        num_heads: Heads of the connections, the anchor's when `None`.
        anchor_shape: Width, layers and heads of the anchor.
        augmenting_shapes: The same of the augmenting models.
    """

    anchor: str = "llama"
    augmenting: tuple[str, ...] = ("gpt2",)
    connections: int | tuple[tuple[tuple[int, int], ...], ...] = 2
    attention: str = "gated"
    attend: str = "causal"
    num_heads: int | None = None
    anchor_shape: tuple[int, int, int] = (32, 4, 4)
    augmenting_shapes: tuple[tuple[int, int, int], ...] = ((24, 4, 2), (16, 2, 4))

    def anchor_model(self) -> PreTrainedModel:
        return base(self.anchor, *self.anchor_shape)

    def augmenting_models(self) -> dict[str, PreTrainedModel]:
        shapes = zip(self.augmenting, self.augmenting_shapes, strict=False)
        return {f"m{i}": base(name, *shape, seed=i + 1) for i, (name, shape) in enumerate(shapes)}

    def fresh(self) -> calm.CalmForCausalLM:
        """The composition as `compose` makes it: its gates are closed, or its output matrices zero."""
        models = self.augmenting_models()
        connections = self.connections
        if not isinstance(connections, int):
            connections = dict(zip(models, connections, strict=True))
        with _seeded(0):
            return calm.compose(
                self.anchor_model(),
                models,
                connections,
                num_heads=self.num_heads,
                attention=self.attention,
                attend=self.attend,
            )

    def build(self) -> calm.CalmForCausalLM:
        """A composition of its own whose connections matter, see `perturb`."""
        return perturb(self.fresh())

    def shared(self) -> calm.CalmForCausalLM:
        """Like `build`, but kept: for tests that change nothing."""
        return _shared(self)

    def with_(self, **changes: object) -> Mix:
        return replace(self, **changes)


@functools.lru_cache(maxsize=64)
def _shared(mix: Mix) -> calm.CalmForCausalLM:
    return mix.build()


def perturb(model: calm.CalmForCausalLM, share: float = 0.2, seed: int = 7) -> calm.CalmForCausalLM:
    """Random matrices, scaled so that each injection has `share` of the norm of what it is added to.

    Those that are random already stay; identities would hide a matrix that is left out or transposed.
    """
    generator = torch.Generator().manual_seed(seed)
    for connection in model.connections:
        linears = [connection.w_o]
        if connection.gate is not None:
            linears += [connection.w_v, connection.f_proj]
            connection.gate.bias.data.fill_(1)
            shape = connection.gate.weight.shape
            connection.gate.weight.data = torch.randn(shape, generator=generator).to(connection.gate.weight)
        for linear in linears:
            weight = linear.weight
            weight.data = torch.randn(weight.shape, generator=generator).to(weight) / linear.in_features**0.5

    def scale(module: torch.nn.Module, args: tuple, output: Tensor) -> Tensor:
        factor = share * args[0].norm() / output.norm()
        for strength in [module.w_o.weight] if module.gate is None else module.gate.parameters():
            strength.data *= factor
        return output * factor  # so that later connections are scaled on what they will get

    _watch_connections(model, scale)
    return model


def open_gates(model: calm.CalmForCausalLM, far: float = 0.2) -> calm.CalmForCausalLM:
    """Open the gates, position by position about as far: a closed one hides whatever is done to the matrices.

    At 0.2, output matrices of unit variance add about as much as there is (at the widths of the tests).
    """
    generator = torch.Generator().manual_seed(7)
    for connection in model.connections:
        width = connection.w_o.out_features
        connection.gate.bias.data.fill_(8 * far / width)
        weight = torch.randn(1, width, generator=generator) * far / (2 * width**0.5)
        connection.gate.weight.data.copy_(weight)
    return model


def injection_shares(model: calm.CalmForCausalLM) -> list[float]:
    """What each connection adds, as a share of the norm of what it is added to, on the input that `perturb` uses."""
    shares = {}

    def measure(module: torch.nn.Module, args: tuple, output: Tensor) -> None:
        shares[module] = float(output.norm() / args[0].norm())

    _watch_connections(model, measure)
    return [shares[connection] for connection in model.connections]


def _watch_connections(model: calm.CalmForCausalLM, hook: Callable) -> None:
    handles = [connection.register_forward_hook(hook) for connection in model.connections]
    with torch.no_grad():
        model(tokens(2, 12, seed=3), use_cache=False, prompt_length=6)
    for handle in handles:
        handle.remove()


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids, neither padding nor end."""
    return torch.randint(2, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))


def padded(rows: list[Tensor], side: str, fill: int = PAD) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of different lengths as one batch: ids, mask, and positions as `generate` counts them."""
    length = max(len(row) for row in rows)
    ids = torch.full((len(rows), length), fill)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        columns = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        ids[i, columns], mask[i, columns] = row, 1
    return ids, mask, (mask.cumsum(-1) - 1).clamp(min=0)


def assert_same(found: Tensor, expected: Tensor, tolerance: float = 3e-5) -> None:
    """Same shape, and equal up to float32 rounding relative to the largest value."""
    assert found.shape == expected.shape, f"shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    difference = (found - expected).abs().max().item() if found.numel() else 0.0
    limit = tolerance * max(1.0, expected.abs().max().item())
    assert difference <= limit, f"differs by {difference:.2e}, at most {limit:.2e} allowed"


def assert_identical(found: Tensor, expected: Tensor) -> None:
    """Bit for bit."""
    assert found.shape == expected.shape and found.dtype == expected.dtype
    assert torch.equal(found, expected), f"differs by {(found - expected).abs().max().item():.2e}, not bit for bit"


def digests(module: torch.nn.Module) -> dict[str, bytes]:
    """Every parameter and buffer of a module, to the bit."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    return {name: value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in state.items()}


@contextmanager
def patched(owner: object, **replacements: object) -> Iterator[None]:
    """Break something on purpose: the negative controls replace attributes and put them back."""
    before = {name: getattr(owner, name) for name in replacements}
    for name, value in replacements.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(owner, name, value)


def word_tokenizer(size: int = VOCAB, *, prefix: str = "w") -> PreTrainedTokenizerFast:
    """A tokenizer of `size` whole words (w0, w1, ...), left-padding."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary: Mapping[str, int] = {"<pad>": PAD, "<eos>": EOS} | {f"{prefix}{i}": i for i in range(2, size)}
    tokenizer = Tokenizer(models.WordLevel(dict(vocabulary), unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left"
    )
