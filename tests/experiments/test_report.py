"""The results file, tables on the terminal, and the sentences on where composition does not help."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from calm.errors import CalmError
from calm.experiments import report, tables
from calm.experiments.results import METHODS, Asked, Cell, Curve, Results, Row, Training


def cell(mean: float, width: float | None = 1.0) -> Cell:
    return Cell(mean=mean, interval=None if width is None else (mean - width, mean + width), values=(mean,))


def results(**changed) -> Results:
    rows = {
        "cy": Row(metric="chrF", higher_is_better=True, examples=500, title="Welsh to English"),
        "English perplexity": Row(metric="perplexity", higher_is_better=False, examples=200, title="English"),
    }
    fields = {
        "domain": "low_resource",
        "preset": "cpu",
        "command": "calm reproduce low_resource --preset cpu",
        "date": "2026-01-02",
        "settings": {},
        "seeds": (0,),
        "rows": rows,
        "table": {"cy": {"m_A": cell(30), "m_B": cell(10), "composed": cell(33), "lora": cell(32.5)}},
        "differences": {
            "cy": {
                "m_A": cell(3.0),  # better
                "m_B": cell(23.0, None),  # better, one run
                "random_m_A": cell(0.2),  # not clearly
                "lora": cell(0.5),  # nor this
                "full_on_all": cell(-7.0),  # worse
                "mixed_logits": cell(-1.0, None),  # not better, one run
            }
        },
        "preservation": {"English perplexity": {"m_B": cell(40), "composed": cell(44), "m_A": cell(90)}},
        "curves": {"share": Curve(title="Share", x="%", y="chrF", points={"composed": ((5, cell(1)), (10, cell(2)))})},
        "training": {"composed": Training(trainable_parameters=7, learning_rate=0.001, searched={"0.001": 2.0})},
        "parameters": {"anchor": 135_000_000},
        "examples": {"cy": [{"prompt": "Welsh: a|b\nEnglish:", "reference": "x", "composed": "<b>`y`"}]},
        "notes": ("A note.",),
        "hardware": "a machine",
        "versions": {"torch": "1"},
        "seconds": 60.0,
    }
    return Results(**{**fields, **changed})


def test_results_are_read_as_they_were_written_and_anything_else_is_refused(tmp_path):
    path = results().save(tmp_path)
    assert path == tmp_path / "low_resource" / "2026-01-02-cpu.json"
    assert Results.load(path) == results()
    path.write_text(path.read_text().replace('"preset"', '"presets"'))
    with pytest.raises(CalmError, match="holds no results of an experiment"):
        Results.load(path)


def test_no_run_overwrites_another_of_the_same_preset_and_day(tmp_path):
    own = {"seeds": (0, 1), "languages": ("cy",)}
    runs = [
        (Asked(), False),
        (Asked((1, 0)), False),  # the first seed chooses learning rates
        (Asked((3,)), False),
        (Asked((3, 4)), False),
        (Asked(), True),
        (Asked((3,)), True),
        (Asked(languages=("xh",)), False),
        (Asked((3,), ("xh", "om")), False),
        (Asked((3,), search=True), False),
        (Asked((3,), composition_seen=True), False),
        (Asked((3,), composition_seen=True, all_methods=True), True),
    ]
    variants = [asked.variant(**own, code_left_out=left_out) for asked, left_out in runs]
    expected = [
        "",
        "seed1-0",
        "seed3",
        "seed3-4",
        "no-execution",
        "seed3-no-execution",
        "xh",
        "xh-om-seed3",
        "seed3-search",
        "seed3-seen",
        "seed3-seen-all-no-execution",
    ]
    assert variants == expected
    assert Asked((0, 1), ("cy",)).variant(**own) == ""  # the preset's own, asked for by name
    expected = "calm reproduce low_resource --preset gpu --language xh --language om --seed 3"
    assert Asked((3,), ("xh", "om")).command("low_resource", "gpu") == expected
    assert Asked(None, None, True).command("code", "cpu") == "calm reproduce code --preset cpu --allow-code-execution"
    assert Asked((3,), None, search=True).command("code", "cpu") == "calm reproduce code --preset cpu --seed 3 --search"
    seen = Asked(composition_seen=True).command("low_resource", "cpu")
    assert seen == "calm reproduce low_resource --preset cpu --composition-seen"
    assert Asked(all_methods=True).command("code", "cpu") == "calm reproduce code --preset cpu --all-methods"
    paths = [results(variant=variant).save(tmp_path) for variant in variants]
    assert len({path.name for path in tmp_path.glob("low_resource/*.json")}) == len(runs)
    assert paths[2].name == "2026-01-02-cpu-seed3.json" and Results.load(paths[2]).variant == "seed3"
    shown = [run.name for run in report.newest(tmp_path)]
    assert shown == sorted(run.name for run in map(Results.load, paths))
    results(variant="seed3", date="2026-01-03").save(tmp_path)  # the newest of each
    assert [run.date for run in report.newest(tmp_path) if run.name == "cpu-seed3"] == ["2026-01-03"]
    assert [run.date for run in report.newest(tmp_path) if run.name == "cpu"] == ["2026-01-02"]


def test_where_composition_does_not_help_is_what_the_intervals_say():
    sentences = list(report.no_help(results()))
    assert [re.search(r": (the composed model .*? than .*?) \(", s).group(1) for s in sentences[:3]] == [
        f"the composed model is not clearly better than {METHODS['random_m_A']}",
        f"the composed model is worse than {METHODS['full_on_all']}",
        f"the composed model is not better than {METHODS['mixed_logits']}",
    ]
    assert sentences[0].endswith(f"; {METHODS['lora']} (0.50 [-0.50, 1.50]).")  # one sentence for one verdict
    assert "from 40.00 to 44.00 (+10.0%)" in sentences[3]
    assert len(sentences) == 4
    assert "on the same examples" not in sentences[3]
    paired = {"English perplexity": {"composed": cell(4.0)}}
    (*_, sentence) = report.no_help(results(preservation_changes=paired))
    assert "(+10.0%, 4.00 [3.00, 5.00] on the same examples)" in sentence
    kept = results(preservation={"English perplexity": {"m_B": cell(40), "composed": cell(40.2)}})
    assert len(list(report.no_help(kept))) == 3  # half a percent is within what is asked for


@pytest.mark.parametrize(
    ("higher_is_better", "after", "change", "lost"),
    [
        (False, 40.2, cell(0.2, 0.1), True),  # half a percent, and surely so
        (False, 44, cell(4, 9), False),  # a tenth, which may be chance
        (False, 39, cell(-1, 0.1), False),
        (True, 39.8, cell(-0.2, 0.1), True),
        (True, 36, cell(-4, 9), False),
    ],
)
def test_where_noise_is_known_it_decides_whether_something_was_lost(higher_is_better, after, change, lost):
    row = {"English": Row(metric="%", higher_is_better=higher_is_better, examples=9, title="English")}
    kept = {"English": {"m_B": cell(40), "composed": cell(after)}}
    run = results(rows=row, differences={}, preservation=kept, preservation_changes={"English": {"composed": change}})
    assert len(list(report.no_help(run))) == lost


@pytest.mark.parametrize(("after", "change"), [(-55, "(-10.0%)"), (-45, None)])
def test_a_loss_of_a_negative_number_is_a_loss(after, change):
    row = {
        "cy": Row(metric="chrF", higher_is_better=True, examples=1, title="Welsh"),
        "English": Row(metric="log-likelihood", higher_is_better=True, examples=1, title="English"),
    }
    kept = {"English": {"m_B": cell(-50), "composed": cell(after)}}
    sentences = list(report.no_help(results(rows=row, differences={}, preservation=kept)))
    assert len(sentences) == (change is not None)
    assert all(change in sentence for sentence in sentences)


def test_tables_show_every_number_with_its_interval():
    shown = io.StringIO()
    tables.print_results(Console(file=shown, width=200), results())
    assert "33.0 [32.0, 34.0]" in shown.getvalue()
    assert "-7.00 [-8.00, -6.00]" in shown.getvalue()
    assert "A note." in shown.getvalue()
    assert tables.shown(cell(0.0, None)) == "0.0"


@pytest.mark.parametrize(
    ("mean", "interval", "shown"),
    [
        (67.66, (62.14, 74.0), "67.7 [62.1, 74.0]"),
        (9.996, (9.1, 10.5), "10.00 [9.10, 10.50]"),
        (2357.9, (874.8, 2845.2), "2,358 [875, 2,845]"),
        (-10192474.8, (-18812318.7, -1646254.0), "-10,192,475 [-18,812,319, -1,646,254]"),
        (-0.0001, (-4.35, 4.35), "0.00 [-4.35, 4.35]"),
        (3.0, (-0.001, 6.0), "3.00 [0.00, 6.00]"),
    ],
)
def test_a_number_has_the_digits_that_say_something(mean, interval, shown):
    assert tables.shown(Cell(mean=mean, interval=interval, values=[mean])) == shown


@pytest.mark.parametrize(
    ("before", "after", "shown"),
    [
        (66.5, 68.8, "+3.5%"),
        (66.5, 66.49, "+0.0%"),
        (-50, -55, "-10.0%"),
        (20, 200, "+900.0%"),
        (66.5, 2357.9, "x 35"),
        (0, 3, "from 0"),
    ],
)
def test_a_change_is_in_percent_and_a_leap_in_times(before, after, shown):
    assert tables.change(before, after) == shown
