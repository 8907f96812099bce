"""REPORT.md from results made here: what it says where methods, intervals, seeds or domains are missing."""

from __future__ import annotations

import dataclasses
import io
import re
import subprocess
import sys
from collections.abc import Mapping

import numpy as np
import pytest
from markdown_it import MarkdownIt
from matplotlib.image import imread
from rich.console import Console

from calm.errors import CalmError
from calm.experiments import charts, report
from calm.experiments.low_resource import reproduce as low_resource
from calm.experiments.results import METHODS, Cell, Curve, Results, Row, Training
from calm.experiments.tables import escape, pipes, print_results, shown, verdict

TITLES = {"cy": "Welsh to English", "br": "Breton to English"}


def cell(mean: float, width: float | None = 1.0) -> Cell:
    return Cell(mean=mean, interval=None if width is None else (mean - width, mean + width), values=(mean,))


def results(differences: Mapping[str, Mapping[str, Cell]] | None = None, **changed) -> Results:
    """Two languages, whose composed model is better than everything unless `differences` say otherwise."""
    others = [method for method in METHODS if method != "composed"]
    kept = {"m_A": cell(90), "m_B": cell(20), "composed": cell(20.1), "full_on_all": cell(44)}
    fields = {
        "domain": "low_resource",
        "preset": "cpu",
        "command": "calm reproduce low_resource --preset cpu",
        "date": "2026-01-02",
        "settings": {},
        "seeds": (0, 1),
        "rows": {
            **{row: Row(metric="chrF", higher_is_better=True, examples=500, title=TITLES[row]) for row in TITLES},
            **{
                f"English perplexity {row}": Row(
                    metric="perplexity", higher_is_better=False, examples=200, title="English"
                )
                for row in TITLES
            },
        },
        "table": {row: {method: cell(9 + 2 * place) for place, method in enumerate(METHODS)} for row in TITLES},
        "differences": differences or {row: {method: cell(5.0) for method in others} for row in TITLES},
        "preservation": {f"English perplexity {row}": kept for row in TITLES},
        "curves": {
            "share": Curve(
                title="How much of D_C?",
                x="share, %",
                y="chrF",
                points={"lora": ((5, cell(1, None)),), "composed": ((5, cell(2)), (10, cell(4)))},
            )
        },
        "training": {"lora cy": Training(trainable_parameters=5_310_720, learning_rate=0.001, steps=200, seconds=90)},
        "parameters": {"anchor": 134_515_008, "composition": 5_310_720},
        "examples": {"cy": [{"prompt": "a|b\nc\r\nd \\", "composed": "x"}, {"prompt": "e", "lora": "| y"}]},
        "notes": ("A note.",),
        "hardware": "a machine",
        "versions": {"torch": "1"},
        "seconds": 60.0,
    }
    return Results(**{**fields, **changed})


def text_of(folder, *runs: Results) -> str:
    for run in runs:
        run.save(folder)
    return report.write_report(folder).read_text(encoding="utf-8")


def section(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n")[1].split("\n## ")[0]


def row_of(text: str, start: str) -> list[str]:
    return next(line for line in text.splitlines() if line.startswith(f"| {start} |")).split(" | ")


def test_at_a_glance_each_row_has_both_models_the_composition_and_its_best_rival(tmp_path):
    run = results()
    (tmp_path / "empty").mkdir()
    assert "Nothing was run yet." in section(text_of(tmp_path / "empty"), "At a glance")
    glance = section(text_of(tmp_path, run), "At a glance")
    _, seeds, anchor, augmenting, composed, rival, change = row_of(glance, "Welsh to English, chrF ↑ (cpu)")
    cells = {method: shown(cell) for method, cell in run.table["cy"].items()}
    assert seeds == "2" and change == "English +0.5% |"
    for found, method in ((anchor, "m_B"), (augmenting, "m_A"), (composed, "composed"), (rival, "pipeline")):
        assert found.split(", m_A's")[0] == cells[method], method
    assert rival.endswith(METHODS["pipeline"])

    lower = {**run.rows, "cy": Row(metric="loss", higher_is_better=False, examples=5, title="Welsh to English")}
    alone = {"br": {"composed": cell(3)}, "cy": run.table["cy"]}
    moved = {**run.preservation, "English perplexity br": {"m_B": cell(20), "composed": cell(30)}}
    glance = section(text_of(tmp_path, results(rows=lower, table=alone, preservation=moved)), "At a glance")
    assert row_of(glance, "Breton to English, chrF ↑ (cpu)")[2:] == [
        "",
        "",
        "3.00 [2.00, 4.00]",
        "",
        "English +50.0% |",
    ]
    parts = {"br words": alone["br"], "cy words": alone["cy"]}  # several rows of one language
    of_parts = {row: run.rows[row.split()[0]] for row in parts}
    parted = section(
        text_of(tmp_path, results(rows=run.rows | of_parts, table=parts, preservation=moved)), "At a glance"
    )
    assert row_of(parted, "Breton to English, chrF ↑ (cpu)")[-1] == "English +50.0% |"
    *_, rival, change = row_of(glance, "Welsh to English, loss ↓ (cpu)")
    assert rival == f"{cells['lora']}, {METHODS['lora']}" and change == "English +0.5% |"


@pytest.mark.parametrize(
    ("difference", "higher_is_better", "found"),
    [
        (cell(2.0), True, None),
        (cell(2.0), False, "the composed model is worse"),
        (cell(-2.0), True, "the composed model is worse"),
        (cell(-2.0), False, None),
        (cell(0.5), True, "the composed model is not clearly better"),
        (cell(-0.5), False, "the composed model is not clearly better"),
        (cell(1.0), True, "the composed model is not clearly better"),  # zero is the interval's end
        (cell(0.1, None), True, None),
        (cell(0.1, None), False, "the composed model is not better"),
        (cell(0.0, None), True, "the composed model is not better"),
    ],
)
def test_a_difference_helps_only_where_its_interval_excludes_zero_on_the_better_side(
    difference, higher_is_better, found
):
    assert verdict(difference, higher_is_better) == found


def test_where_it_always_helps_the_report_says_so_and_not_that_nothing_was_run(tmp_path):
    where = section(text_of(tmp_path, results()), "Where composition does not help")
    assert "low_resource, preset cpu: nowhere;" in where
    assert "worse" not in where and "not clearly" not in where
    assert "code: not run yet, so nothing is known." in where
    assert "one seed" not in where and "not compared" not in where and "without an interval" not in where


def test_what_cannot_be_said_is_said(tmp_path):
    differences = {"cy": {"m_A": cell(-3), "m_B": cell(20, None)}, "br": {"m_A": cell(0.2), "m_B": cell(9)}}
    where = section(text_of(tmp_path, results(differences, seeds=(0,))), "Where composition does not help")
    run = "(low_resource, preset cpu; chrF): the composed model is"
    assert f"**Welsh to English** {run} worse than {METHODS['m_A']} (-3.00 [-4.00, -2.00])." in where
    assert f"**Breton to English** {run} not clearly better than {METHODS['m_A']}" in where
    missing = re.search(r"not compared, because not run: (.*)\.", where).group(1)
    compared = ("m_A", "m_B", "composed")
    assert missing.split("; ") == [name for method, name in METHODS.items() if method not in compared]
    assert f"nothing is known of the noise: {METHODS['m_B']} on Welsh to English." in where
    assert "one seed" in where and "nowhere" not in where


def test_without_the_composed_model_there_is_no_verdict_and_no_plot_of_differences(tmp_path):
    run = results({"cy": {}, "br": {}}, table={"cy": {"m_A": cell(3, None)}, "br": {}}, preservation={}, curves={})
    where = section(text_of(tmp_path, run), "Where composition does not help")
    assert "nothing was compared with the composed model" in where and "nowhere" not in where
    assert [path.name for path in charts.save_charts(run, tmp_path)] == ["2026-01-02-cpu-table.png"]
    print_results(Console(file=io.StringIO(), width=200), run)


def test_our_numbers_stand_right_of_the_papers_in_the_same_rows_with_sizes(tmp_path):
    text = text_of(tmp_path, results())
    second = text.split("### Table 2\n")[1].split("### Table 3")[0]
    composed = row_of(second, f"**{METHODS['composed']}**")
    assert composed[1] == "44.1" and composed[11] == "46.1"
    assert composed[12:] == ["15.0 [14.0, 16.0]", "15.0 [14.0, 16.0] |"]
    assert row_of(second, "m_A before its specialist training")[12:] == ["", " |"]  # we have no such method
    assert "anchor 134,515,008, composition 5,310,720 parameters; test examples cy 500, br 500; seeds 0, 1." in second
    assert "Ours, code: Not run yet: `calm reproduce code`." in text.split("### Table 4\n")[1].split("### Table 5")[0]


def test_the_first_table_has_tasks_down_as_the_papers(tmp_path):
    tasks = ("KV-SUBS", "NUM-MATH", "KV-MATH")
    run = results(
        {task: {"m_A": cell(2)} for task in tasks},
        domain="key_value_arithmetic",
        rows={task: Row(metric="%", higher_is_better=True, examples=9, title=task) for task in tasks},
        table={task: {"m_A": cell(1), "composed": cell(80 + place)} for place, task in enumerate(tasks)},
        preservation={},
    )
    first = text_of(tmp_path, run).split("### Table 1\n")[1].split("### Table 2")[0]
    assert row_of(first, "KV-MATH")[1:] == ["0.7", "0.0", "84.3", "1.00 [0.00, 2.00]", "", "82.0 [81.0, 83.0] |"]


def test_what_is_kept_is_shown_as_a_change_of_the_anchor(tmp_path):
    kept = section(text_of(tmp_path, results()), "What is left of the anchor's other abilities")
    assert row_of(kept, METHODS["full_on_all"])[1] == "44.0 [43.0, 45.0] (+120.0%)"
    assert row_of(kept, METHODS["m_B"])[1] == "20.0 [19.0, 21.0]"
    assert row_of(kept, f"**{METHODS['composed']}**")[1].endswith("(+0.5%)")
    assert "Minus m_B alone" not in kept
    paired = results(preservation_changes={"English perplexity cy": {"composed": cell(0.1, 0.2)}})
    kept = section(text_of(tmp_path, paired), "What is left of the anchor's other abilities")
    after = kept.split("Minus m_B alone, on the same texts and examples:")[1]
    assert row_of(after, f"**{METHODS['composed']}**")[1] == "0.10 [-0.10, 0.30] |"


def test_a_run_names_its_command_machine_cost_and_plots(tmp_path):
    run = section(text_of(tmp_path, results()), report.DOMAINS["low_resource"])
    for said in (
        "- command: `calm reproduce low_resource --preset cpu`, 1 minutes",
        "- put together on: a machine",
        "- versions: torch 1",
        "- seeds: 0, 1",
        f"| {METHODS['lora']} cy | 5,310,720 | 0.001 | 200 | 1.5 |",
        "- A note.",
        "| 10 |  | 4.00 [3.00, 5.00] |",
    ):
        assert said in run
    charts.save_charts(results(), tmp_path / "low_resource")
    linked = re.findall(r"!\[.*?\]\((.*?)\)", run)
    assert len(linked) == 4 and all((tmp_path / link).is_file() for link in linked)
    charts.save_charts(results(variant="seed3"), tmp_path / "low_resource")
    assert len(list(tmp_path.glob("low_resource/*.png"))) == 8  # neither run's overwrite the other's


def test_a_run_of_other_settings_than_the_presets_is_called_outdated(tmp_path):
    preset = low_resource.PRESETS["cpu"]
    asked = dataclasses.asdict(dataclasses.replace(preset, seeds=(7,), languages=("br",))) | {"data_made": {}}
    assert "outdated" not in text_of(tmp_path, results(settings=asked))
    run = section(text_of(tmp_path, results(settings=asked)), report.DOMAINS["low_resource"])
    assert f"; split: {preset.split}\n" in run
    weaker = dataclasses.replace(
        preset.methods, steps=1, specialist=dataclasses.replace(preset.methods.specialist, rows=4)
    )
    then = dataclasses.asdict(dataclasses.replace(preset, methods=weaker))
    said = "- **outdated**: 2 settings of the preset were others then (methods.specialist.rows, methods.steps);"
    text = text_of(tmp_path, results(settings=then))
    assert said in text
    tables, verdicts = (
        section(text, heading) for heading in ("The paper's tables beside ours", "Where composition does not help")
    )
    assert "ours, low_resource cpu (outdated): cy" in tables and "Ours, low_resource cpu (outdated):" in tables
    assert "- low_resource, preset cpu (outdated): nowhere" in verdicts


def test_a_run_whose_m_a_has_seen_dc_is_not_outdated_for_that_alone(tmp_path):
    preset = low_resource.PRESETS["cpu"]
    seen = dataclasses.replace(preset, data=dataclasses.replace(preset.data, composition_held_out=False))
    then = dataclasses.asdict(seen)
    assert "outdated" not in text_of(tmp_path, results(settings=then, variant="seen"))
    said = "- **outdated**: 1 settings of the preset were others then (data.composition_held_out)"
    assert said in text_of(tmp_path, results(settings=then))


def test_a_run_of_all_methods_is_not_outdated_for_that_alone(tmp_path):
    preset = low_resource.PRESETS["cpu"]
    then = dataclasses.asdict(dataclasses.replace(preset, methods=preset.methods.with_all_methods()))
    assert "outdated" not in text_of(tmp_path, results(settings=then, variant="xh-all"))
    assert "were others then (methods.methods)" in text_of(tmp_path, results(settings=then))


def test_an_x_that_was_measured_twice_has_two_rows(tmp_path):
    curve = Curve(title="Quality", x="m_A", y="%", points={"composed": ((100, cell(2)), (100, cell(4)))})
    text = text_of(tmp_path, results(curves={"quality": curve}))
    assert "| 100 | 2.00 [1.00, 3.00] |\n| 100 | 4.00 [3.00, 5.00] |" in text


def test_tables_are_whole_whatever_examples_hold(tmp_path):
    text = text_of(tmp_path, results(), results(preset="gpu", parameters={}, versions={}))
    assert "a\\|b ⏎ c ⏎ d \\\\" in text and "\\| y" in text
    tables = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(tables) > 15
    for table in tables:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1, table
    assert escape("a\u2028b\rc") == "a ⏎ b ⏎ c"


@pytest.mark.parametrize(
    "text",
    [
        "![i](http://example.org/i.png) and [a link](x)",
        "def __init__(self): *args, **kwargs",
        "_File _Edit, m_A, a__b, trailing_",
        "Insert &lt;b&gt; & <b>bold</b> <!-- not a comment -->",
        "`code` ``two`` ~~gone~~",
        "a|b \\| c \\\\ \\* end\\",
    ],
)
def test_what_a_model_wrote_is_shown_and_not_rendered(text):
    def shown(cell_: str) -> str | None:
        tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(pipes([["", ""], ["x", cell_]]))
        cells = [token for token in tokens if token.type == "inline"][-1].children or []
        plain = all(token.type in ("text", "text_special") for token in cells)
        return "".join(token.content for token in cells) if plain else None

    assert shown(text) != text  # it would be rendered as it stands
    assert shown(escape(text)) == text


def test_the_newest_run_counts_and_the_same_results_give_the_same_bytes(tmp_path):
    first = text_of(tmp_path, results(), results(date="2025-12-31", notes=("Older.",)))
    assert "Older." not in first and first.startswith("<!-- Generated by")
    assert report.write_report(tmp_path).read_text(encoding="utf-8") == first


def test_nothing_run_is_a_report_too_and_other_files_are_refused(tmp_path):
    text = text_of(tmp_path)
    assert text.count("so nothing is known.") == len(report.DOMAINS) and "Nothing was run yet." in text
    with pytest.raises(CalmError, match="is no folder"):
        report.write_report(tmp_path / "absent")
    results(domain="cooking").save(tmp_path)
    with pytest.raises(CalmError, match="'cooking' is none of key_value_arithmetic"):
        report.write_report(tmp_path)


@pytest.mark.slow  # a fresh interpreter imports torch
def test_the_module_draws_and_writes_again(tmp_path):
    results().save(tmp_path)
    command = [sys.executable, "-m", "calm.experiments.report", str(tmp_path)]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() == [
        str(tmp_path / "REPORT.md")
    ]
    assert len(list(tmp_path.glob("low_resource/*.png"))) == 4
    failed = subprocess.run([*command[:-1], str(tmp_path / "absent")], capture_output=True, text=True)
    assert failed.returncode == 1 and "is no folder" in failed.stderr and "Traceback" not in failed.stderr


def test_plots_show_the_composed_model_in_its_colour_and_are_drawn_the_same_again(tmp_path):
    paths = charts.save_charts(results(), tmp_path)
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in charts.save_charts(results(), tmp_path)] == before
    orange = np.array([int(charts.HIGHLIGHT[place : place + 2], 16) for place in (1, 3, 5)])
    for path in paths:
        pixels = np.rint(255 * imread(path)[..., :3]).astype(int)
        assert pixels.shape[1] >= 1200 and pixels.shape[0] > 400
        assert (pixels == 255).all(axis=-1).mean() < 0.99
        assert (np.abs(pixels - orange).max(axis=-1) <= 2).sum() > 100, path.name
    without = results({"cy": {}}, table={"cy": {"m_A": cell(3), "m_B": cell(2)}}, preservation={}, curves={})
    (path,) = charts.save_charts(without, tmp_path)
    pixels = np.rint(255 * imread(path)[..., :3]).astype(int)
    assert not (np.abs(pixels - orange).max(axis=-1) <= 2).any()


def test_axes_are_honest_and_numbers_are_those_of_the_results():
    figure = charts._bars(results())
    assert [axes.get_xlim()[0] for axes in figure.axes] == [0, 0]
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == [results().table["cy"][method].mean for method in reversed(METHODS)]
    assert "higher is better" in figure.axes[0].get_xlabel()
    gain, loss, second_gain, _ = charts._gain_and_loss(results()).axes
    assert gain.get_title(loc="left") == "Gained:\nWelsh to English"
    assert second_gain.get_title(loc="left") == "Gained:\nBreton to English"
    assert loss.get_title(loc="left") == "Lost of the anchor:\nEnglish perplexity cy"
    assert "lower is better" in loss.get_xlabel()
    (bottom, _) = charts._curves(results()).axes[0].get_ylim()
    assert bottom == 0


def test_what_is_gained_is_not_the_ability_that_is_kept():
    rows = {name: Row(metric="%", higher_is_better=True, examples=9, title=name) for name in ("NUM-MATH", "KV-MATH")}
    run = results(
        rows={**rows, "NUM-MATH perplexity": rows["NUM-MATH"]},
        table={name: {"m_B": cell(1)} for name in rows},
        preservation={"NUM-MATH perplexity": {"m_B": cell(2)}},
    )
    assert charts._gained(run, "NUM-MATH perplexity") == "KV-MATH"


def test_what_is_gained_is_where_composition_adds_most_to_its_parts():
    found = {
        "words": {"m_A": cell(99), "m_B": cell(1), "composed": cell(90)},
        "past": {"m_A": cell(0), "m_B": cell(1), "composed": cell(60)},
        "rare": {"m_A": cell(0), "m_B": cell(1), "composed": cell(50)},
        "not run": {"m_B": cell(1)},
    }
    rows = {
        name: Row(metric="%", higher_is_better=True, examples=9, title=name) for name in (*found, "English perplexity")
    }
    run = results(rows=rows, table=found, preservation={"English perplexity": {"m_B": cell(2)}})
    assert charts._gained(run, "English perplexity") == "past"
    of_two = {f"{language} {row}": cells for language in ("cym", "isl") for row, cells in found.items()}
    of_two["isl rare"] = {**found["rare"], "composed": cell(99)}
    rows = {name: Row(metric="%", higher_is_better=True, examples=9, title=name) for name in (*of_two, "English isl")}
    run = results(rows=rows, table=of_two, preservation={"English isl": {"m_B": cell(2)}})
    assert charts._gained(run, "English isl") == "isl rare"
    rows["English cym"] = rows["English isl"]
    assert charts._gained(results(rows=rows, table=of_two), "English cym") == "cym past"
