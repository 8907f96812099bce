"""The paper's numbers as they were copied: each table's own averages, and what tables say of one another."""

from __future__ import annotations

import statistics

import pytest

from calm.experiments.paper import BEFORE, TABLES
from calm.experiments.results import METHODS

FIRST, FLORES, LOW, HIGH, CODE, ABLATIONS = TABLES


def test_every_row_has_a_number_for_each_column_and_a_name_of_ours():
    assert [table.number for table in TABLES] == [1, 2, 3, 3, 4, 5]
    for table in TABLES:
        assert {len(numbers) for numbers in table.rows.values()} == {len(table.columns)}
    for table in TABLES[1:]:
        assert set(table.rows) <= {BEFORE, *METHODS}
    assert set(FIRST.columns) <= set(METHODS)


@pytest.mark.parametrize("table", [FLORES, LOW, HIGH])
def test_averages_are_those_of_the_numbers_before_them(table):
    for name, (*numbers, average) in table.rows.items():
        assert statistics.mean(numbers) == pytest.approx(average, abs=0.0501), name


def test_the_ablations_agree_with_the_table_of_code():
    for method in ("composed", "full_on_all"):
        pass_at_1, explained = CODE.rows[method][:2], CODE.rows[method][2:]
        assert ABLATIONS.rows[method][6:8] == pass_at_1
        # the six languages' mean; the paper averages before it rounds, or weighs by examples
        assert statistics.mean(explained) == pytest.approx(ABLATIONS.rows[method][8], abs=0.2)
