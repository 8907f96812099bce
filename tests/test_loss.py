"""loss.py: the loss and its gradients are those of the logits, which are never there as a whole."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
import transformers
from factories import ANCHORS, OTHER_ANCHORS, VOCAB, Mix, assert_same, base, config, open_gates, patched, tokens
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import calm
from calm import CalmError, loss

IDS = tokens(3, 11)
LABELS = IDS.clone()
LABELS[0, :4], LABELS[1, :7], LABELS[2] = -100, -100, -100
LABELS[2, 5] = IDS[2, 5]
WIDE = 1000  # as nothing else is
SMALL = 4  # positions: several chunks, the last one shorter


def losses_and_gradients(model: calm.CalmForCausalLM, **kwargs: object) -> list[list[Tensor]]:
    """With the logits, and without."""
    found = []
    for skip_logits in (False, True):
        model.zero_grad()
        output = model(IDS, labels=LABELS, skip_logits=skip_logits, **kwargs)
        assert (output.logits is None) == skip_logits
        (3 * output.loss).backward()  # as gradient accumulation and loss scaling do
        found.append([output.loss.detach(), *(p.grad for p in model.connections.parameters())])
    return found


class LargestVocabulary(TorchDispatchMode):
    """Records the most rows of any tensor that is as wide as the vocabulary, views of weights left out."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.weights = {weight.data_ptr() for weight in model.parameters()}
        self.rows = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if not isinstance(tensor, Tensor) or tensor.untyped_storage().data_ptr() in self.weights:
                continue
            if tensor.dim() > 1 and tensor.shape[-1] == WIDE:
                self.rows = max(self.rows, tensor.numel() // WIDE)
        return result


@pytest.mark.parametrize("anchor", [*ANCHORS, *OTHER_ANCHORS])
def test_loss_and_gradients_are_those_of_the_logits(anchor: str) -> None:
    """Soft-capped logits (gemma2), learned positions, experts: the anchor's own head makes them."""
    model = Mix(anchor=anchor).build().train()
    with patched(loss, CHUNK=SMALL):
        expected, found = losses_and_gradients(model)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)
    assert all(p.grad is None for p in model.anchor.parameters())


@pytest.mark.parametrize(
    "config",
    [
        transformers.CohereConfig(logit_scale=0.3, hidden_size=32, intermediate_size=64, num_hidden_layers=4),
        transformers.GraniteConfig(logits_scaling=3.0, hidden_size=32, intermediate_size=64, num_hidden_layers=4),
        transformers.PhiConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=4),  # a head with a bias
        transformers.MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=4),
    ],
    ids=lambda config: config.model_type,
)
def test_scales_and_biases_of_heads(config: transformers.PreTrainedConfig) -> None:
    config.vocab_size, config.num_attention_heads, config.num_key_value_heads, config.pad_token_id = VOCAB, 4, 4, 0
    torch.manual_seed(0)
    anchor = transformers.AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(anchor.get_output_embeddings().weight)
    if anchor.get_output_embeddings().bias is not None:
        torch.nn.init.normal_(anchor.get_output_embeddings().bias)
    model = calm.compose(anchor, base("gpt2"), 2).train()
    for connection in model.connections:
        torch.nn.init.normal_(connection.w_o.weight, std=0.1)
    open_gates(model)
    with patched(loss, CHUNK=SMALL):
        expected, found = losses_and_gradients(model)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


def test_the_vocabulary_is_never_there_for_more_than_a_chunk() -> None:
    configs = [config(name) for name in ("llama", "gpt2")]
    for each in configs:
        each.vocab_size = WIDE
    model = calm.compose(*(transformers.AutoModelForCausalLM.from_config(each) for each in configs), 2).train()
    with patched(loss, CHUNK=4), LargestVocabulary(model) as seen:
        model(IDS, labels=LABELS, skip_logits=True).loss.backward()
    assert 0 < seen.rows <= 4
    with LargestVocabulary(model) as seen:  # negative control
        model(IDS, labels=LABELS).loss.backward()
    assert seen.rows == IDS.numel()


class BatchedProducts(TorchDispatchMode):
    """Counts products in which each row of a batch has a copy of its own of a matrix as wide as the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func is torch.ops.aten.bmm.default and WIDE in args[1].shape
        return func(*args, **(kwargs or {}))


def test_a_frozen_head_is_not_copied_for_each_row_of_a_batch() -> None:
    configs = [config(name) for name in ("llama", "gpt2")]
    for each in configs:
        each.vocab_size = WIDE
    anchor, augmenting = (transformers.AutoModelForCausalLM.from_config(each) for each in configs)
    with BatchedProducts() as seen:  # negative control: a frozen model that is no composition
        anchor.requires_grad_(False)(IDS, logits_to_keep=1)
    assert seen.number == 1
    with BatchedProducts() as seen, loss.without_head(anchor):
        anchor(IDS)
    assert seen.number == 0
    model = calm.compose(anchor, augmenting, 2)
    with BatchedProducts() as seen:
        model(IDS, labels=LABELS, skip_logits=True).loss.backward()
        model.eval().generate(IDS, max_new_tokens=3, do_sample=False)
    assert seen.number == 0


def test_only_labelled_positions_reach_the_head() -> None:
    model = Mix().build().train()
    rows = []
    model.anchor.lm_head.register_forward_hook(lambda module, args, output: rows.append(output.shape[1]))
    model(IDS, labels=LABELS, skip_logits=True)
    assert rows == [1, int((LABELS[:, 1:] != -100).sum())], "the pass itself may see one position, the loss the rest"


def test_items_of_a_whole_batch() -> None:
    """Gradient accumulation divides by the labels of all its batches."""
    expected, found = losses_and_gradients(Mix().build().train(), num_items_in_batch=torch.tensor(60))
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b)


def test_a_batch_without_labels() -> None:
    """Alone it has no loss; as a part of a step that has labels it adds nothing, and zero gradients."""
    model, nothing = Mix().build().train(), torch.full_like(LABELS, -100)
    with pytest.raises(CalmError, match=r"labels are -100 everywhere .* pass num_items_in_batch"):
        model(IDS, labels=nothing, skip_logits=True)
    only_first = nothing.clone()
    only_first[:, 0] = 5
    with pytest.raises(CalmError, match="labels are -100 everywhere"):
        model(IDS, labels=only_first, skip_logits=True)
    loss = model(IDS, labels=nothing, skip_logits=True, num_items_in_batch=7).loss
    loss.backward()
    assert loss == 0
    assert all(weight.grad.count_nonzero() == 0 for weight in model.connections.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast(dtype: torch.dtype) -> None:
    model = Mix().build().train()
    with torch.autocast("cpu", dtype):
        expected, found = losses_and_gradients(model)
    for a, b in zip(found, expected, strict=True):
        assert_same(a, b, 3e-2)


def test_a_small_share_of_a_large_batch_in_half_precision() -> None:
    """Gradients are summed before they are divided: divided first, they would vanish in float16."""
    model = Mix().build().half().train()
    model.connections.float()
    output = model(IDS, labels=LABELS, skip_logits=True, num_items_in_batch=10**6)
    (output.loss * 2**16).backward()  # as a gradient scaler does
    expected = model(IDS, labels=LABELS).loss
    found = [p.grad.clone() for p in model.connections.parameters()]
    model.zero_grad()
    expected.backward()
    scale = int((LABELS[:, 1:] != -100).sum()) / 10**6 * 2**16
    for a, b in zip(found, (p.grad for p in model.connections.parameters()), strict=True):
        assert_same(a / scale, b, 3e-2)


def test_evaluation_computes_no_gradients() -> None:
    model = Mix().build()
    with torch.no_grad():
        output = model(IDS, labels=LABELS, skip_logits=True)
        assert_same(output.loss, model(IDS, labels=LABELS).loss)
    assert not output.loss.requires_grad


def test_activation_checkpointing_changes_nothing() -> None:
    model = Mix().build().train()
    (expected, found) = losses_and_gradients(model)
    model.gradient_checkpointing_enable()
    _, checkpointed = losses_and_gradients(model)
    for a, b, c in zip(found, expected, checkpointed, strict=True):
        assert_same(a, b)
        assert_same(c, b)


def test_a_trained_head_has_its_gradients() -> None:
    """Its logits are computed after all: an adapter on the head must learn."""
    model = Mix().build()
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False))
    assert not loss.can_skip_logits(model.anchor)
    output = adapted(input_ids=IDS, labels=LABELS, skip_logits=True)
    assert output.logits is not None
    output.loss.backward()
    assert any(p.grad is not None and p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


@pytest.mark.parametrize("through", ["a keyword", "the configuration"])
def test_a_router_keeps_its_loss(through: str) -> None:
    model = Mix(anchor="mixtral").build().train()
    plain = model(IDS, labels=LABELS, skip_logits=True).loss
    asked = {"output_router_logits": True} if through == "a keyword" else {}
    with patched(model.anchor.config, output_router_logits=through == "the configuration"):
        whole = model(IDS, labels=LABELS, **asked)
        skipped = model(IDS, labels=LABELS, skip_logits=True, **asked)
    assert_same(skipped.loss, whole.loss)
    assert abs(float(whole.loss - plain)) > 1e-4, "the case that is tested"


def test_labels_that_are_shifted_already_count() -> None:
    model = Mix().build().train()
    shifted = torch.nn.functional.pad(LABELS, (0, 1), value=-100)[:, 1:].roll(1, 0)
    expected = model(IDS, labels=LABELS, shift_labels=shifted).loss
    assert_same(model(IDS, labels=LABELS, shift_labels=shifted, skip_logits=True).loss, expected)
    assert abs(float(expected - model(IDS, labels=LABELS).loss)) > 1e-4, "the case that is tested"


def test_what_is_changed_for_a_loss_is_changed_for_one_thread() -> None:
    """One trains, others ask: on one model, at the same time; and two train."""
    model = Mix().build()
    expected = model(IDS).logits.detach()
    value = model(IDS, labels=LABELS).loss.detach()

    def ask(_: int) -> None:
        with torch.no_grad():
            assert_same(model(IDS).logits, expected)

    def learn(_: int) -> None:
        assert_same(model(IDS, labels=LABELS, skip_logits=True).loss.detach(), value)

    with patched(loss, CHUNK=SMALL), ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(run, i) for i in range(150) for run in (ask, learn)]:
            done.result()
    assert "forward" not in vars(model.anchor.model) and not model.anchor.model._forward_hooks


def test_stand_ins_of_two_threads_take_turns() -> None:
    """Else the first would put back what it found under the second."""
    decoder, found, inside, leave = torch.nn.Identity(), [], threading.Event(), threading.Event()

    def first() -> None:
        with loss._standing_in(decoder, "first"):
            inside.set()
            leave.wait(60)
            found.append(decoder("own"))

    def second() -> None:
        with loss._standing_in(decoder, "second"):
            found.append(decoder("own"))

    threads = [threading.Thread(target=run) for run in (first, second)]
    threads[0].start()
    inside.wait(60)
    threads[1].start()
    assert decoder("own") == "own", "this thread's is as it was"
    threads[1].join(0.2)
    assert not found
    leave.set()
    for thread in threads:
        thread.join()
    assert found == ["first", "second"] and "forward" not in vars(decoder)


def test_an_error_in_the_head_leaves_the_anchor_as_it_was() -> None:
    model = Mix().build()
    expected = model.anchor(IDS).logits
    handle = model.anchor.lm_head.register_forward_hook(lambda module, args, output: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(IDS, labels=LABELS, skip_logits=True)
    handle.remove()
    assert_same(model.anchor(IDS).logits, expected)
