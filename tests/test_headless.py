"""The base model of a composition: both models without the head, the same numbers and gradients as the whole."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import factories
import pytest
import torch
import torch.distributed as dist
from factories import Mix, assert_identical, assert_same
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import calm
from calm.cache import CalmCache

IDS = factories.tokens(2, 10)
PACKED = torch.cat([torch.arange(6), torch.arange(4)]).unsqueeze(0)  # positions of two documents in one row
ANCHORS = ("llama", "gemma2", "gpt2", "opt", "bloom", "falcon", "mixtral")


def logits_of(model: calm.CalmForCausalLM, hidden: Tensor) -> Tensor:
    """The head, and the soft-capping of the anchors that have one."""
    head = model.get_output_embeddings()
    logits = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def gradients_of(model: calm.CalmForCausalLM, loss: Tensor) -> dict[str, Tensor]:
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    return dict(zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True))


@pytest.mark.parametrize("anchor", ANCHORS)
def test_hidden_states_times_head_are_the_logits(anchor: str) -> None:
    """Gradients too; and not those of the anchor on its own."""
    model = Mix(anchor=anchor, augmenting=("gpt2", "llama")).shared()
    hidden = model.base_model(IDS).last_hidden_state
    whole = model(IDS, labels=IDS)
    assert_same(logits_of(model, hidden), whole.logits)
    loss = torch.nn.functional.cross_entropy(logits_of(model, hidden)[:, :-1].flatten(0, 1), IDS[:, 1:].flatten())
    expected = gradients_of(model, whole.loss)
    for name, gradient in gradients_of(model, loss).items():
        assert name.startswith("connections.")
        assert_same(gradient, expected[name])
    with model.composition_disabled():
        alone = model.base_model(IDS).last_hidden_state
        assert_identical(alone, model.anchor.base_model(IDS)[0])
    assert (alone - hidden).norm() > 0.1 * hidden.norm()


def test_it_is_no_second_model() -> None:
    model = Mix(anchor="bloom").build()  # without plans of its own, for which transformers then asks the base model
    before = list(model.state_dict())
    view = model.base_model
    assert view is model.base_model and not isinstance(view, torch.nn.Module)
    assert list(model.state_dict()) == before
    assert copy.deepcopy(model).base_model.model is not model
    assert model.get_decoder() is model and model.get_encoder() is model
    assert not model.supports_tp_plan and not model.supports_pp_plan


def test_with_a_cache() -> None:
    model = Mix().shared()
    expected = model.base_model(IDS, use_cache=False).last_hidden_state
    first = model.base_model(IDS[:, :7])
    assert isinstance(first.past_key_values, CalmCache)
    second = model.base_model(IDS[:, 7:], past_key_values=first.past_key_values)
    assert_same(second.last_hidden_state, expected[:, 7:])


def test_padding_is_inert() -> None:
    model = Mix().shared()
    ids, mask, positions = factories.padded([IDS[0], IDS[1, :6]], "left")
    found = model.base_model(ids, attention_mask=mask, position_ids=positions, use_cache=False).last_hidden_state
    assert_same(found[1:, 4:], model.base_model(IDS[1:, :6]).last_hidden_state)


def test_packed_rows() -> None:
    """As each document alone, and as many of them in a row as one likes."""
    model = Mix().shared()
    row = IDS[:1].repeat(1, 10)
    assert row.shape[1] > model.context_length
    found = model.base_model(row, position_ids=PACKED.repeat(1, 10), use_cache=False).last_hidden_state
    for start, end in ((90, 96), (96, 100)):
        assert_same(found[:, start:end], model.base_model(row[:, start:end]).last_hidden_state)
    in_one = model.base_model(IDS[:1], position_ids=torch.arange(10).unsqueeze(0)).last_hidden_state
    assert (in_one[:, 6:] - found[:, 6:10]).norm() > 0.1 * in_one[:, 6:].norm()
    with pytest.raises(calm.CalmError, match="100 tokens do not fit"):
        model.base_model(row, position_ids=torch.arange(100).unsqueeze(0), use_cache=False)
    with pytest.raises(calm.CalmError, match="100 tokens do not fit"):  # with a mask it is one document
        model.base_model(row, torch.ones_like(row), PACKED.repeat(1, 10), use_cache=False)


@pytest.mark.parametrize("mix", [Mix(anchor="bloom"), Mix(augmenting=("gpt2", "mamba"))])
def test_packed_rows_are_refused_where_documents_would_mix(mix: Mix) -> None:
    model = mix.shared()
    model.base_model(IDS, position_ids=torch.arange(10).expand(2, -1), use_cache=False)  # one document a row
    with pytest.raises(calm.CalmError, match=r"packing = True.*does not keep the examples of a packed row apart"):
        model.base_model(IDS[:1], position_ids=PACKED, use_cache=False)


def test_packed_rows_are_looked_at_without_dropout_and_autocast() -> None:
    """The check compares two passes: what makes them differ anyway must not fail it."""
    model = Mix().build()
    model.anchor.config.attention_dropout = 0.5
    for layer in model.anchor.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    with torch.autocast("cpu", torch.bfloat16):
        model.base_model(IDS[:1], position_ids=PACKED, use_cache=False)
    assert all(module.training for module in model.anchor.modules())


def test_the_end_of_the_prompt_has_to_be_known() -> None:
    model = Mix(attend="prompt").shared()
    labels = IDS.clone()
    labels[:, :4] = -100
    hidden = model.base_model(IDS, prompt_length=4, use_cache=False).last_hidden_state
    assert_same(logits_of(model, hidden), model(IDS, labels=labels).logits)
    with pytest.raises(calm.CalmError, match="cannot know where the prompt ends"):
        model.base_model(IDS)
    with model.composition_disabled():
        model.base_model(IDS)


@pytest.fixture
def one_process() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_under_data_parallel(one_process: None) -> None:
    """Called from the model's own forward, as TRL does it, so that the gradients of all parameters are waited for."""
    model = Mix().build()
    expected = gradients_of(model, logits_of(model, model.base_model(IDS).last_hidden_state).square().mean())
    model.forward = lambda ids: logits_of(model, model.base_model(ids).last_hidden_state)
    DistributedDataParallel(model)(IDS).square().mean().backward()
    for name, gradient in expected.items():
        assert_same(model.get_parameter(name).grad, gradient)
