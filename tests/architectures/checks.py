"""What a supported architecture must do, as anchor and as augmenting model; every comparison is of logits."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tiny import VOCAB
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel

import calm
from calm import backbones

LENGTH = 12
PADDING = 3
PAIRS = [(0, 0), (1, 2)]  # (augmenting layer, anchor layer): the augmenting model loses its third layer
TOLERANCE = 1e-4  # of the largest logit, for results that are computed in another order


class CheckFailed(AssertionError):
    """A property that a supported architecture must have does not hold."""


def compose(anchor: PreTrainedModel | str, augmenting: PreTrainedModel | str, seed: int = 7) -> calm.CalmForCausalLM:
    """A composition whose connections change the logits: all their weights are random, and the same each time."""
    model = calm.compose(anchor, augmenting, PAIRS, num_heads=4)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.connections.parameters():
        weight.data = torch.randn(weight.shape, generator=generator) / weight.shape[1] ** 0.5
    return model


def tokens(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """Random tokens, none of them special."""
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest value; infinite if anything is not finite."""
    if found.shape != expected.shape or not (torch.isfinite(found).all() and torch.isfinite(expected).all()):
        return float("inf")
    return float((found - expected).abs().max() / expected.abs().max())


def _same(found: Tensor, expected: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    if (by := difference(found, expected)) > tolerance:
        raise CheckFailed(f"{what}: logits differ by {by:.1e}")


@torch.no_grad()
def _run(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    return model(input_ids=ids, use_cache=False, **kwargs).logits


# -- properties that a bare model may lack: then a composition of it is not asked for them ---------------------------


def _leak(model: nn.Module) -> float:
    ids = tokens()
    before, worst = _run(model, ids), 0.0
    for position in (LENGTH // 2, LENGTH - 1):
        changed = ids.clone()
        changed[:, position] = 2 + (ids[:, position] - 1) % (VOCAB - 2)
        after = _run(model, changed)
        worst = max(worst, difference(after[:, :position], before[:, :position]))
        if difference(after[:, position:], before[:, position:]) < 1e-3:
            raise CheckFailed("a changed token does not change the logits")
    return worst


@torch.no_grad()
def _cached_difference(model: nn.Module) -> float:
    ids = tokens()
    expected = _run(model, ids)
    names = backbones.forward_parameters(model)
    composed = isinstance(model, calm.CalmForCausalLM)
    caches = {} if composed else {backbones.cache_argument(model): DynamicCache(config=model.config)}
    bounds = [0, *range(LENGTH // 2, LENGTH + 1)]
    found = []
    for start, end in zip(bounds, bounds[1:], strict=False):
        positions = {"position_ids": torch.arange(start, end)[None]} if "position_ids" in names else {}
        output = model(input_ids=ids[:, start:end], use_cache=True, **caches, **positions)
        found.append(output.logits)
        if composed:
            caches = {"past_key_values": output.past_key_values}
    return difference(torch.cat(found, 1), expected)


def _padded_difference(model: nn.Module) -> float:
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    kwargs = {"attention_mask": mask}
    if "position_ids" in backbones.forward_parameters(model):
        kwargs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    found = _run(model, ids.masked_fill(mask == 0, 0), **kwargs)[:1, PADDING:]
    single = ids[:1, PADDING:]
    kwargs = {key: torch.arange(single.shape[1])[None] for key in kwargs if key == "position_ids"}
    return difference(found, _run(model, single, attention_mask=torch.ones_like(single), **kwargs))


BARE: dict[str, Callable[[nn.Module], float]] = {
    "causal": _leak,
    "cached": _cached_difference,
    "padded": _padded_difference,
}


def bare_lacks(model: PreTrainedModel) -> dict[str, str]:
    """The properties of `BARE` that a model lacks on its own, with the reason."""
    lacks = {}
    for name, measure in BARE.items():
        try:
            if (by := measure(model)) > TOLERANCE:
                lacks[name] = f"logits differ by {by:.1e}"
        except Exception as error:  # the bare model's own failure, whatever it is
            lacks[name] = f"{type(error).__name__}: {error}"
    return lacks


# -- the checks -----------------------------------------------------------------------------------------------------


def check_fresh(anchor: PreTrainedModel, augmenting: PreTrainedModel) -> None:
    """A new composition is its anchor, bit for bit, and `composition_disabled()` always is."""
    ids = tokens()
    expected = _run(anchor, ids)
    fresh = calm.compose(copy.deepcopy(anchor), augmenting, PAIRS, num_heads=4)
    if not torch.equal(_run(fresh, ids), expected):
        raise CheckFailed("a fresh composition is not its anchor bit for bit")
    model = compose(copy.deepcopy(anchor), augmenting)
    if difference(_run(model, ids), expected) < 1e-2:
        raise CheckFailed("the connections do not change the logits")
    with model.composition_disabled():
        if not torch.equal(_run(model, ids), expected):
            raise CheckFailed("a disabled composition is not its anchor bit for bit")


def check_causal(anchor: PreTrainedModel, augmenting: PreTrainedModel) -> None:
    """A changed token changes no earlier logits."""
    if (by := _leak(compose(copy.deepcopy(anchor), augmenting))) > TOLERANCE / 10:
        raise CheckFailed(f"a changed token changes earlier logits by {by:.1e}")


def check_cached(anchor: PreTrainedModel, augmenting: PreTrainedModel) -> None:
    """Decoding with a cache, token by token and in `generate`, gives the logits of a pass over everything."""
    model = compose(copy.deepcopy(anchor), augmenting)
    if (by := _cached_difference(model)) > TOLERANCE:
        raise CheckFailed(f"cached decoding: logits differ by {by:.1e}")
    ids = tokens(length=LENGTH // 2)
    output = model.generate(
        ids, max_new_tokens=4, do_sample=False, eos_token_id=None, output_logits=True, return_dict_in_generate=True
    )
    expected = _run(model, output.sequences[:, :-1])[:, ids.shape[1] - 1 :]
    _same(torch.stack(output.logits, 1), expected, "generate")


def check_padded(anchor: PreTrainedModel, augmenting: PreTrainedModel) -> None:
    """A left-padded row, with positions as `generate` counts them, gives the logits of the row alone."""
    if (by := _padded_difference(compose(copy.deepcopy(anchor), augmenting))) > TOLERANCE:
        raise CheckFailed(f"left padding: logits differ by {by:.1e}")


@torch.no_grad()
def check_truncated(anchor: PreTrainedModel, augmenting: PreTrainedModel) -> None:
    """The truncated augmenting decoder's last layer puts out what that layer of the whole model does."""
    depth = 1 + max(layer for layer, _ in PAIRS)
    outputs = []
    for model in (backbones.decoder_of(augmenting), backbones.truncated(augmenting, depth)):
        layer = backbones.layers_of(model)[depth - 1]
        handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
        model(input_ids=tokens(), use_cache=False)
        handle.remove()
    full, short = (output[0] if isinstance(output, tuple) else output for output in outputs)
    if not torch.equal(short, full):
        raise CheckFailed(f"the truncated decoder's layer differs by {difference(short, full):.1e}")


def check_saved(anchor: PreTrainedModel, augmenting: PreTrainedModel) -> None:
    """Bases loaded by path (truncated by configuration), and a composition saved and loaded, give the same logits."""
    ids = tokens()
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("anchor", "augmenting")]
        for model, path in zip((anchor, augmenting), paths, strict=True):
            model.save_pretrained(path)
        expected = _run(compose(*(AutoModelForCausalLM.from_pretrained(path) for path in paths)), ids)
        loaded = compose(*paths)
        _same(_run(loaded, ids), expected, "bases loaded by path", 1e-5)
        loaded.save_pretrained(f"{folder}/composed")
        again = calm.CalmForCausalLM.from_pretrained(f"{folder}/composed")
        _same(_run(again, ids), expected, "saved and loaded", 1e-5)


def check_trained(anchor: PreTrainedModel, augmenting: PreTrainedModel) -> None:
    """A training step gives every weight of the connections a gradient, and no other."""
    model = compose(copy.deepcopy(anchor), augmenting).train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        if not name.startswith("connections."):
            if weight.grad is not None:
                raise CheckFailed(f"{name} has a gradient")
        elif weight.grad is None or not torch.isfinite(weight.grad).all() or not weight.grad.any():
            raise CheckFailed(f"{name} has no gradient")


CHECKS: dict[str, Callable[[PreTrainedModel, PreTrainedModel], None]] = {
    "fresh": check_fresh,
    "causal": check_causal,
    "cached": check_cached,
    "padded": check_padded,
    "truncated": check_truncated,
    "saved": check_saved,
    "trained": check_trained,
}
