"""What a supported architecture must do, as anchor and as augmenting model; every comparison is of logits."""

from __future__ import annotations

import copy
import itertools
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
LACKING = 1e-2  # a bare model that differs by more than this from itself lacks the property


class CheckFailed(AssertionError):
    """A property that a supported architecture must have does not hold."""


def compose(anchor: PreTrainedModel | str, augmenting: PreTrainedModel | str, seed: int = 7) -> calm.CalmForCausalLM:
    """A composition whose connections change the logits: all their matrices are random, and the same each time."""
    model = calm.compose(anchor, augmenting, PAIRS, num_heads=4)
    generator = torch.Generator().manual_seed(seed)
    for weight in model.connections.parameters():
        if weight.dim() == 1:  # a gate's bias: open as far as 1, on average
            weight.data.fill_(8 / model.connections[0].w_o.out_features)
            continue
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


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor, **kwargs: object) -> Tensor:
    """One pass without a cache."""
    return model(input_ids=ids, use_cache=False, **kwargs).logits


# -- how far a model, bare or composed, is from having a property ----------------------------------------------------


def _leak(model: nn.Module) -> float:
    """By how much a changed token changes earlier logits."""
    ids = tokens()
    before, worst = logits_of(model, ids), 0.0
    for position in (LENGTH // 2, LENGTH - 1):
        changed = ids.clone()
        changed[:, position] = 2 + (ids[:, position] - 1) % (VOCAB - 2)
        after = logits_of(model, changed)
        worst = max(worst, difference(after[:, :position], before[:, :position]))
        if difference(after[:, position:], before[:, position:]) < 1e-3:
            raise CheckFailed("a changed token does not change the logits")
    return worst


def _positions(model: nn.Module, positions: Tensor) -> dict[str, Tensor]:
    """Positions that count from 0, as a model takes them."""
    if "position_ids" not in backbones.forward_parameters(model):
        return {}
    composed = isinstance(model, calm.CalmForCausalLM)
    return {"position_ids": positions if composed else positions + backbones.position_offset(model.config)}


@torch.no_grad()
def _cached(model: nn.Module) -> float:
    """By how much decoding with a cache, half of the tokens at once and then one by one, differs from one pass."""
    ids = tokens()
    expected = logits_of(model, ids)
    composed = isinstance(model, calm.CalmForCausalLM)
    argument = "past_key_values" if "past_key_values" in backbones.forward_parameters(model) else "cache_params"
    caches = {} if composed else {argument: DynamicCache(config=model.config)}
    bounds = [0, *range(LENGTH // 2, LENGTH + 1)]
    found = []
    for start, end in itertools.pairwise(bounds):
        positions = _positions(model, torch.arange(start, end).expand(len(ids), -1))
        output = model(input_ids=ids[:, start:end], use_cache=True, **caches, **positions)
        found.append(output.logits)
        if composed:
            caches = {"past_key_values": output.past_key_values}
    return difference(torch.cat(found, 1), expected)


def _padded(model: nn.Module) -> float:
    """By how much a left-padded row, with positions as `generate` counts them, differs from the row alone."""
    ids = tokens()
    mask = torch.ones_like(ids)
    mask[0, :PADDING] = 0
    positions = _positions(model, (mask.cumsum(-1) - 1).clamp(min=0))
    found = logits_of(model, ids.masked_fill(mask == 0, 0), attention_mask=mask, **positions)[:1, PADDING:]
    single = ids[:1, PADDING:]
    positions = _positions(model, torch.arange(single.shape[1])[None])
    return difference(found, logits_of(model, single, attention_mask=torch.ones_like(single), **positions))


def _reloaded(model: PreTrainedModel) -> float:
    """0 if the Auto classes load what the model saves."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        AutoModelForCausalLM.from_pretrained(folder)
    return 0.0


MEASURES: dict[str, Callable[[nn.Module], float]] = {
    "causality": _leak,
    "cached decoding": _cached,
    "left padding": _padded,
    "loading by name": _reloaded,
}


def measure_bare(model: PreTrainedModel) -> dict[str, float]:
    """How far a model on its own is from each property that a composition of it is asked for; infinite on an error."""
    found = {}
    for name, measure in MEASURES.items():
        try:
            found[name] = measure(model)
        except Exception:  # the bare model's own failure, whatever it is: then nothing is asked
            found[name] = float("inf")
    return found


# -- the checks -----------------------------------------------------------------------------------------------------


def check_fresh(anchor: PreTrainedModel, augmenting: PreTrainedModel, tolerance: float) -> None:
    """A new composition is its anchor, bit for bit, and `composition_disabled()` always is."""
    ids = tokens()
    expected = logits_of(anchor, ids)
    fresh = calm.compose(copy.deepcopy(anchor), augmenting, PAIRS, num_heads=4)
    if not torch.equal(logits_of(fresh, ids), expected):
        raise CheckFailed("a fresh composition is not its anchor bit for bit")
    model = compose(anchor, augmenting)
    if difference(logits_of(model, ids), expected) < 1e-2:
        raise CheckFailed("the connections do not change the logits")
    with model.composition_disabled():
        if not torch.equal(logits_of(model, ids), expected):
            raise CheckFailed("a disabled composition is not its anchor bit for bit")


def check_causal(anchor: PreTrainedModel, augmenting: PreTrainedModel, tolerance: float) -> None:
    """A changed token changes no earlier logits."""
    if (by := _leak(compose(anchor, augmenting))) > TOLERANCE / 10:
        raise CheckFailed(f"a changed token changes earlier logits by {by:.1e}")


def check_cached(anchor: PreTrainedModel, augmenting: PreTrainedModel, tolerance: float) -> None:
    """Decoding with a cache, token by token and in `generate`, gives the logits of one pass."""
    model = compose(anchor, augmenting)
    if (by := _cached(model)) > tolerance:
        raise CheckFailed(f"cached decoding: logits differ by {by:.1e}")
    ids = tokens(length=LENGTH // 2)
    output = model.generate(
        ids,
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
        suppress_tokens=[0],  # some models take the padding token for padding wherever it stands
        output_logits=True,
        return_dict_in_generate=True,
    )
    expected = logits_of(model, output.sequences[:, :-1])[:, ids.shape[1] - 1 :]
    if (by := difference(torch.stack(output.logits, 1), expected)) > tolerance:
        raise CheckFailed(f"generate: logits differ by {by:.1e}")


def check_padded(anchor: PreTrainedModel, augmenting: PreTrainedModel, tolerance: float) -> None:
    """A left-padded row, with positions as `generate` counts them, gives the logits of the row alone."""
    if (by := _padded(compose(anchor, augmenting))) > tolerance:
        raise CheckFailed(f"left padding: logits differ by {by:.1e}")


@torch.no_grad()
def check_truncated(anchor: PreTrainedModel, augmenting: PreTrainedModel, tolerance: float) -> None:
    """The truncated augmenting decoder's last connected layer puts out what that layer of the whole model does."""
    last = max(layer for layer, _ in PAIRS)
    outputs: list[Tensor] = []
    for model in (backbones.decoder_of(augmenting), backbones.truncated(augmenting, last + 1)):
        handle = backbones.layers_of(model)[last].register_forward_hook(
            lambda module, args, output: outputs.append(output[0] if isinstance(output, tuple) else output)
        )
        model(input_ids=tokens(), use_cache=False)
        handle.remove()
    full, short = outputs
    if not torch.equal(short, full):
        raise CheckFailed(f"the truncated decoder's layer differs by {difference(short, full):.1e}")


def check_loaded(anchor: PreTrainedModel, augmenting: PreTrainedModel, tolerance: float) -> None:
    """Bases composed by path (truncated by configuration) and loaded with a composition, give the same logits."""
    ids = tokens()
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / name) for name in ("anchor", "augmenting")]
        for model, path in zip((anchor, augmenting), paths, strict=True):
            model.save_pretrained(path)
        expected = logits_of(compose(*(AutoModelForCausalLM.from_pretrained(path) for path in paths)), ids)
        composed = compose(*paths)
        if (by := difference(logits_of(composed, ids), expected)) > TOLERANCE / 10:
            raise CheckFailed(f"composed by path: logits differ by {by:.1e}")
        composed.save_pretrained(f"{folder}/composed")
        again = calm.CalmForCausalLM.from_pretrained(f"{folder}/composed")
        if (by := difference(logits_of(again, ids), expected)) > TOLERANCE / 10:
            raise CheckFailed(f"saved and loaded: logits differ by {by:.1e}")


def check_saved(anchor: PreTrainedModel, augmenting: PreTrainedModel, tolerance: float) -> None:
    """A composition of loaded models, saved and loaded with these given by hand, gives the same logits."""
    ids = tokens()
    composed = compose(copy.deepcopy(anchor), augmenting)
    with tempfile.TemporaryDirectory() as folder:
        composed.save_pretrained(folder)
        again = calm.CalmForCausalLM.from_pretrained(folder, anchor=anchor, augmenting=augmenting)
    if (by := difference(logits_of(again, ids), logits_of(composed, ids))) > TOLERANCE / 10:
        raise CheckFailed(f"saved and loaded: logits differ by {by:.1e}")


def check_trained(anchor: PreTrainedModel, augmenting: PreTrainedModel, tolerance: float) -> None:
    """A training step gives every weight of the connections a gradient, and no other."""
    model = compose(anchor, augmenting).train()
    ids = tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    for name, weight in model.named_parameters():
        if not name.startswith("connections."):
            if weight.grad is not None:
                raise CheckFailed(f"{name} has a gradient")
        elif weight.grad is None or not torch.isfinite(weight.grad).all() or not weight.grad.any():
            raise CheckFailed(f"{name} has no gradient")


# Each with the property that the bare model must have for it to be asked.
CHECKS: list[tuple[Callable[[PreTrainedModel, PreTrainedModel, float], None], str | None]] = [
    (check_fresh, None),
    (check_causal, None),
    (check_truncated, None),
    (check_trained, None),
    (check_saved, None),
    (check_cached, "cached decoding"),
    (check_padded, "left padding"),
    (check_loaded, "loading by name"),
]


def examine(anchor: PreTrainedModel, augmenting: PreTrainedModel, *bare: dict[str, float]) -> list[str]:
    """Run all checks on one composition.

    Args:
        anchor: The anchor.
        augmenting: The augmenting model.
        bare: From `measure_bare`, of the two. What either model lacks on its own is not asked, and where it is itself
            less exact than `TOLERANCE`, neither is more.

    Returns:
        The properties that were not asked.

    Raises:
        CheckFailed: By the first check that fails.
    """
    lacking = []
    for check, needed in CHECKS:
        by = max((measured[needed] for measured in bare), default=0.0) if needed else 0.0
        if by > LACKING:
            lacking.append(str(needed))
        else:
            check(copy.deepcopy(anchor), copy.deepcopy(augmenting), max(TOLERANCE, 3 * by))
    return lacking
