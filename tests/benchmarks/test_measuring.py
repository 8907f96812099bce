"""What benchmarks measure with: times turn by turn, exact memory, and parts that are the composed step's own."""

from __future__ import annotations

import pytest
import torch
from factories import Mix, tokens
from measuring import compare_times, held_bytes, peak_bytes, take_turns
from parts import Step, adamw, connection_inputs, gradients_start_at, loss_of
from scaling import straight_line
from torch import nn

from calm.backbones import layers_of

MB = 2**20


def test_all_take_turns_in_alternating_order() -> None:
    order: list[str] = []
    runs = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = take_turns("turns", runs, 2)
    assert "".join(order) == "abc" + "cba" + "abc"  # the first is the warm-up
    assert [len(seconds[name]) for name in "abc"] == [2, 2, 2]


def test_a_ratio_is_the_median_over_turns() -> None:
    result = compare_times("times", [1.0, 2.0, 30.0], [1.0, 1.0, 10.0], target=2.5)
    assert result.ratio == 2.0 and result.spread == (1.5, 2.5)  # that of the medians would be 2.0 / 1.0, of sums 2.75
    assert result.composed == 2.0 and result.reference == 1.0 and result.met
    assert compare_times("times", [1.0, 2.0, 30.0], [1.0, 1.0, 10.0], target=1.9).met is False
    assert compare_times("times", [1.0, 2.0], [1.0, 1.0], target=None).met is None


def test_peak_memory_is_exact() -> None:
    def run() -> None:
        first = torch.empty(MB, dtype=torch.uint8)
        second = torch.empty(2 * MB, dtype=torch.uint8)
        del first
        third = torch.empty(MB // 2, dtype=torch.uint8)
        del second, third

    assert peak_bytes(run) == 3 * MB


def test_held_memory_counts_shared_weights_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False))
    optimizer = adamw(model.parameters())
    assert held_bytes(model, optimizer) == 2 * 256
    model[1].weight = model[0].weight
    optimizer = adamw(model.parameters())
    assert held_bytes(model, optimizer) == 256
    model(torch.ones(1, 8)).sum().backward()
    optimizer.step()
    assert held_bytes(model, optimizer) == 256 + 2 * 256 + 4  # two states, and AdamW's count of steps


def test_a_straight_line_is_found_and_a_bent_one_noticed() -> None:
    line = straight_line([1, 2, 4, 8], [0.5, 0.8, 1.4, 2.6], one=0.25)
    assert line["slope"] == pytest.approx(0.3) and line["intercept"] == pytest.approx(0.2)
    assert line["slope_by_one"] == pytest.approx(1.2) and line["r_squared"] == pytest.approx(1)
    assert straight_line([1, 2, 4, 8], [1.0, 4.0, 16.0, 64.0], one=1.0)["r_squared"] < 0.99


@pytest.fixture(scope="module")
def step() -> Step:
    return Step(Mix("llama", ("llama",), connections=2).build(), tokens(1, 12))


def test_the_anchors_part_has_the_anchors_loss_and_stops_at_the_first_connection(step: Step) -> None:
    anchor = step.model.anchor
    with step.model.composition_disabled():
        expected = step.model(**step.batch, labels=step.labels).loss
    assert loss_of(anchor, anchor, step.batch, step.labels).item() == pytest.approx(expected.item(), rel=1e-5)

    reached = {}
    layers = list(layers_of(anchor))
    first = min(pair.anchor_layer for pair in step.model.config.layer_pairs)
    handles = [
        layer.register_forward_hook(lambda layer, args, output, i=i: reached.update({i: args[0].requires_grad}))
        for i, layer in enumerate(layers)
    ]
    with gradients_start_at(layers[first]):
        loss_of(anchor, anchor, step.batch, step.labels).backward()
    for handle in handles:
        handle.remove()
    assert reached == {i: i > first for i in range(len(layers))}


def test_connections_alone_compute_what_they_compute_in_the_composed_model(step: Step) -> None:
    inputs = connection_inputs(step.model, **step.batch)
    assert [hidden.requires_grad for _, hidden, _ in inputs] == [False, True]  # as in the composed model
    composed = []
    handles = [c.register_forward_hook(lambda c, args, output: composed.append(output)) for c in step.model.connections]
    step.model(**step.batch, use_cache=False)
    for handle in handles:
        handle.remove()
    for (connection, hidden, others), expected in zip(inputs, composed, strict=True):
        torch.testing.assert_close(connection(hidden, *others), expected)
    step.connections()
    assert all(weight.grad is not None for weight in step.model.connections.parameters())
