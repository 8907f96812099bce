"""switches.py: what is switched off adds nothing, the rest goes on, and afterwards all is as before."""

from __future__ import annotations

import copy

import factories
import pytest
import torch
from factories import Mix, assert_identical, perturb
from torch import Tensor

import calm
from calm import CalmError

IDS = factories.tokens(2, 10)


def logits(model: calm.CalmForCausalLM) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("off", [(0,), (1,), (0, 1)])
def test_switched_off_connections_add_nothing_with_a_cache(off: tuple[int, ...]) -> None:
    """Bit for bit as with `W_O` zero, in every step of cached generation; the first one counts the cache's tokens."""
    model = Mix().build()
    zeroed = copy.deepcopy(model)
    for index in off:
        zeroed.connections[index].w_o.weight.data.zero_()
    settings = {"max_new_tokens": 5, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    with model.connections_disabled(*off):
        found = model.generate(IDS, **settings)
    for step, expected, on in zip(
        found.logits, zeroed.generate(IDS, **settings).logits, model.generate(IDS, **settings).logits, strict=True
    ):
        assert_identical(step, expected)
        assert not torch.equal(step, on)


def test_the_switch_nests_and_goes_back() -> None:
    model = perturb(Mix().fresh())
    on = logits(model)
    with pytest.raises(ZeroDivisionError), model.connections_disabled(0):
        with model.connections_disabled(1):
            both = logits(model)
        first = logits(model)
        _ = 1 / 0
    assert_identical(logits(model), on)
    with model.composition_disabled():
        assert_identical(both, logits(model))
    assert not torch.equal(first, both) and not torch.equal(first, on)
    with (
        pytest.raises(CalmError, match=r"connections \[2\]: expected numbers from 0 to 1"),
        model.connections_disabled(2),
    ):
        pass


def test_augmenting_models_are_switched_by_name() -> None:
    model = perturb(Mix(augmenting=("llama", "gpt2")).fresh())
    pairs = model.config.layer_pairs
    first, second = sorted({pair.augmenting for pair in pairs})
    of_first = [index for index, pair in enumerate(pairs) if pair.augmenting == first]
    with model.connections_disabled(*of_first):
        expected = logits(model)
    with model.augmenting_disabled(first):
        found = logits(model)
        with model.augmenting_disabled(first, second):
            none = logits(model)
    assert_identical(found, expected)
    with model.composition_disabled():
        assert_identical(none, logits(model))
    assert not torch.equal(found, none) and not torch.equal(found, logits(model))
    with pytest.raises(CalmError, match=r"\['welsh'\]: expected some of"), model.augmenting_disabled("welsh"):
        pass
