"""results/REPORT.md: what was measured beside the paper's numbers, and where composition does not help; generated."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from calm.experiments import charts
from calm.experiments.results import METHODS, Cell, Results
from calm.experiments.tables import TRAINING, escape, markdown, methods_of, pipes, shown, verdict

PAPER = "Bansal et al. 2024, arXiv 2401.02412"

DOMAINS = {
    "key_value_arithmetic": "Key-value arithmetic (the paper's section 4.1 and Table 1)",
    "low_resource": "Low-resource languages (the paper's section 4.2, Tables 2 and 3)",
    "code": "Code (the paper's section 4.3 and Table 4)",
}

# What the paper reports, as far as its numbers are at hand; PaLM2 models, which are not public.
PAPER_TABLES: dict[str, list[list[str]]] = {
    "key_value_arithmetic": [
        ["accuracy %, the paper", "m_A", "m_B", "composed"],
        ["KV-SUBS", "98.1", "0.0", "92.9"],
        ["NUM-MATH", "4.2", "73.7", "72.0"],
        ["KV-MATH", "0.7", "0.0", "84.3"],
    ],
    "low_resource": [
        ["the paper", "reported"],
        ["best gain over m_B, in points", "13"],
        ["languages of FLORES-200 in which composed is better than m_B", "175 of 192"],
    ],
    "code": [
        ["pass@1 %, the paper", "m_B", "composed"],
        ["HumanEval", "16.4", "22.5"],
        ["MBPP", "28.6", "32.2"],
    ],
}
PAPER_ABLATIONS = (
    "The paper's Table 5 finds that vanilla and random augmenting models lose most of the gain, that an augmenting "
    "model used as an encoder loses clearly, and that LoRA with as many parameters is equal or worse."
)


def write_report(results_dir: Path) -> Path:
    """Write `REPORT.md` from the newest results of each domain and preset.

    Args:
        results_dir: holds `DOMAIN/DATE-PRESET.json`.

    Returns:
        The report; the same results give the same bytes.

    Raises:
        CalmError: a file there holds no results.
    """
    found = newest(results_dir)
    lines = [
        "# What composition adds, measured",
        "",
        f"Generated from the JSON files beside it by `python -m calm.experiments.report {results_dir.name}`; "
        f"`calm reproduce` does so after each run. Numbers of the paper are from {PAPER}. "
        "Brackets hold 95% intervals; arrows show which way is better.",
        "",
    ]
    for domain, heading in DOMAINS.items():
        lines += [f"## {heading}", ""]
        lines += [pipes(PAPER_TABLES[domain]), ""]
        of_domain = [results for results in found if results.domain == domain]
        if not of_domain:
            lines += [f"Not run yet: `calm reproduce {domain}`.", ""]
        for results in of_domain:
            lines += _of_run(results)
    lines += ["## Ablations (the paper's Table 5)", "", PAPER_ABLATIONS, ""]
    lines += [line for results in found for line in _ablations(results)] or ["Not run yet.", ""]
    lines += ["## Where composition does not help", ""]
    lines += [f"- {sentence}" for results in found for sentence in no_help(results)] or ["Nothing was run yet."]
    path = results_dir / "REPORT.md"
    path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")
    return path


def newest(results_dir: Path) -> list[Results]:
    """The last results of each domain and preset, in the order of `DOMAINS`."""
    found: dict[tuple[str, str], Results] = {}
    for path in sorted(results_dir.glob("*/*.json")):
        results = Results.load(path)
        found[results.domain, results.preset] = results
    return sorted(found.values(), key=lambda results: (list(DOMAINS).index(results.domain), results.preset))


def no_help(results: Results) -> Iterator[str]:
    """One sentence for each row and method that the composed model is not clearly better than."""
    where = f"{results.domain}, preset {results.preset}"
    for name, cells in results.differences.items():
        row = results.rows[name]
        for method in methods_of({name: cells}):
            found = verdict(cells[method], row.higher_is_better)
            if found:
                yield (
                    f"**{escape(row.title)}** ({where}): {found} than {METHODS[method]} "
                    f"({shown(cells[method])} {row.metric})."
                )
    for name, cells in results.preservation.items():
        row = results.rows[name]
        if "composed" in cells and "m_B" in cells:
            before, after = cells["m_B"].mean, cells["composed"].mean
            change = 100 * (after - before) / before if before else 0.0
            if (change < -1) if row.higher_is_better else (change > 1):
                yield (
                    f"**{escape(name)}** ({where}): with its connections on, the composed model moves the anchor's "
                    f"{row.metric} from {before:.2f} to {after:.2f} ({change:+.1f}%); switched off, it is the anchor "
                    "bit for bit."
                )


def _of_run(results: Results) -> list[str]:
    stem = f"{results.domain}/{results.date}-{results.preset}"
    sizes = ", ".join(f"{name} {number / 1e6:,.3g}M" for name, number in results.parameters.items())
    seeds = ", ".join(str(seed) for seed in results.seeds)
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    lines = [
        f"### Preset {results.preset}, {results.date}",
        "",
        f"`{results.command}` ({results.seconds / 60:.0f} minutes of finished steps on {results.hardware}; "
        f"seeds {seeds}; {versions}). Parameters: {sizes or 'not recorded'}. All of it: [{stem}.json]({stem}.json).",
        "",
        markdown(results.table, results),
        "",
    ]
    for heading, rows in (
        ("More metrics of the same answers", results.other),
        ("The composed model minus each method, on the same examples", results.differences),
        ("What is left of the anchor's other abilities", results.preservation),
    ):
        if rows:
            lines += [f"{heading}:", "", markdown(rows, results), ""]
    if results.training:
        header = ["", *TRAINING, "tried (result on the development set)"]
        lines += ["How each was trained:", "", pipes([header, *_training(results)]), ""]
    for what, caption in charts.names_of(results).items():
        lines += [f"![{results.domain}: {caption}]({stem}-{what}.png)", ""]
    for name, examples in results.examples.items():
        lines += _examples(name, examples)
    lines += [f"- {note}" for note in results.notes]
    return [*lines, ""]


def _training(results: Results) -> Iterator[list[str]]:
    for name, training in results.training.items():
        method, _, rest = name.partition(" ")
        yield [
            f"{METHODS.get(method, method)} {rest}".strip(),
            f"{training.trainable_parameters:,}",
            "" if training.learning_rate is None else f"{training.learning_rate:g}",
            str(training.steps),
            f"{training.seconds / 60:.1f}",
            ", ".join(f"{rate} ({loss:.3f})" for rate, loss in training.searched.items()),
        ]


def _ablations(results: Results) -> list[str]:
    ablated = ("composed", "vanilla_m_A", "random_m_A", "encoder_m_A", "lora")
    rows: dict[str, Mapping[str, Cell]] = {
        name: {method: cell for method, cell in cells.items() if method in ablated}
        for name, cells in results.table.items()
    }
    return [f"{results.domain}, preset {results.preset}:", "", markdown(rows, results), ""]


def _examples(name: str, examples: list[dict[str, str]]) -> list[str]:
    if not examples:
        return []
    first = examples[0]
    body = [[escape(_label(key)), escape(text)] for key, text in first.items()]
    table = "\n".join(["| | |", "| --- | --- |", *(f"| {label} | {text} |" for label, text in body)])
    return [f"One example of {escape(name)}:", "", table, ""]


def _label(key: str) -> str:
    return METHODS.get(key, key)


if __name__ == "__main__":
    print(write_report(Path(sys.argv[1] if len(sys.argv) > 1 else "results")))
