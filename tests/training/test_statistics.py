"""statistics.py: what is logged of connections (over a whole training: test_trainer.py)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import factories
import pytest
import torch
from factories import Mix
from torch.nn import functional as F

from calm.training.statistics import ConnectionStatistics


def measured(model: Any, ids: torch.Tensor, labels: torch.Tensor, **kwargs: Any) -> dict[str, float]:
    statistics = ConnectionStatistics(model)
    state: Any = SimpleNamespace(global_step=0, logging_steps=1, eval_steps=1, save_steps=1, max_steps=2)
    unused: Any = None
    statistics.on_step_begin(unused, state, unused)
    model(input_ids=ids, labels=labels, **kwargs).loss.backward()
    statistics.on_pre_optimizer_step(unused, state, unused)
    model.zero_grad()
    return statistics.values


@pytest.mark.parametrize("attend", ["causal", "prompt"])
@pytest.mark.parametrize("kept", [False, True])
def test_padding_does_not_count(attend: str, kept: bool) -> None:
    """Rows of 9 and 5 tokens: the measures of a batch are those of its rows alone, by their lengths."""
    model = Mix(attend=attend).build()
    with torch.no_grad():
        for connection in model.connections:
            connection.gate.weight.normal_(std=0.3)
            connection.gate.bias.fill_(0.1)
    lengths, pads = (9, 5), 6
    rows = [factories.tokens(1, length, seed=length) for length in lengths]
    ids = torch.cat([F.pad(row, (0, lengths[0] + pads - row.shape[1]), value=1) for row in rows])
    labels = torch.cat([F.pad(row, (0, ids.shape[1] - row.shape[1]), value=-100) for row in rows])
    labels[:, :3] = -100
    outputs = model.augmenting_outputs(ids)
    for output in outputs.values():
        output[0, lengths[0] :], output[1, lengths[1] :] = 0, 0  # as they are kept
    found = measured(model, ids, labels, **{"augmenting_outputs": outputs} if kept else {})

    alone = []
    for row in rows:
        own = row.clone()
        own[:, :3] = -100
        alone.append(measured(model, row, own))
    weights = torch.tensor(lengths) / sum(lengths)
    for index in range(len(model.connections)):
        gates = torch.tensor([values[f"connection_{index}/gate"] for values in alone])
        assert found[f"connection_{index}/gate"] == pytest.approx(float(gates @ weights), rel=1e-5)
        assert found[f"connection_{index}/entropy"] == pytest.approx(alone[0][f"connection_{index}/entropy"], rel=1e-5)
        parts = [norms(model, row)[index] for row in rows]
        added, residual = (torch.cat(norms).mean() for norms in zip(*parts, strict=True))
        assert found[f"connection_{index}/injection"] == pytest.approx(float(added / residual), rel=1e-4)


def norms(model: Any, row: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Of each connection, of what it adds and of the anchor's state, at each position of a row alone."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    hooks = [
        connection.register_forward_hook(
            lambda module, args, output: seen.append((output.norm(dim=-1)[0], args[0].norm(dim=-1)[0]))
        )
        for connection in model.connections
    ]
    with torch.no_grad():
        model(row, prompt_length=3)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("filled", [[0], [1], [0, 1]])
def test_rows_that_fill_a_last_batch_up(filled: list[int]) -> None:
    """Without any label, as distributed runs have them: measured nevertheless, since all processes gather together."""
    model = Mix().build()
    ids = factories.tokens(2, 7)
    labels = ids.clone()
    labels[filled] = -100
    values = measured(model, ids, labels)
    assert {key.rpartition("/")[2] for key in values} == {"gate", "injection", "entropy", "gradient"}
    assert all(torch.tensor(list(values.values())).isfinite())
