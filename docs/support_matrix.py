"""Try every causal-LM architecture of the installed transformers in both roles and write docs/support-matrix.md.

Run `python docs/support_matrix.py` (about four minutes on two cores), or `... --only llama gemma3_text` to see a few.
What takes a package that is not installed is not tried: `gemma3n`, whose image tower is of timm (with torchvision).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from queue import Queue

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "architectures"))

LIMIT = 60  # seconds for one architecture in one role
WORKERS = 2
ROLES = ("anchor", "augmenting model")
PAGE = Path(__file__).with_name("support-matrix.md")
HEADER = """# Supported architectures

Every causal language model of transformers {version}, tried by `python docs/support_matrix.py` with tiny random
weights: composed as the anchor with a Llama as the augmenting model, and as the augmenting model with a Llama as the
anchor.
**yes** means that all of this holds, compared on logits:

- a fresh composition is its anchor bit for bit, and so is any within `composition_disabled()`;
- a changed token changes no earlier logits;
- decoding with a cache, in steps and in `generate`, gives the logits of one pass;
- a left-padded row gives the logits of the row alone;
- the truncated augmenting model's layers put out what those of the whole model do;
- bases composed by name, and a composition saved and loaded, give the same logits;
- a training step gives gradients to all weights of the connections and to no others.

"As the bare model" names what the architecture lacks on its own in this version of transformers, so that a composition
of it cannot have it. **refused** means that `calm.compose` raises `UnsupportedModelError` with the reason.

{counts}

| architecture | as anchor | as augmenting model | notes |
|---|---|---|---|
"""


@dataclass
class Row:
    """What came out for one architecture: a verdict by role, and notes."""

    architecture: str
    verdicts: dict[str, str]
    notes: list[str]

    def line(self) -> str:
        """The row of the table."""
        cells = [f"`{self.architecture}`", *(self.verdicts[role] for role in ROLES), "; ".join(self.notes)]
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def try_one(architecture: str, role: str) -> tuple[str, list[str]]:
    """Try one architecture in one role, in a process of its own.

    Returns:
        The verdict ("yes", "refused", "not tried" or "fails") and notes.
    """
    from checks import CheckFailed, examine, measure_bare
    from tiny import as_decoder, tiny_config, tiny_model

    from calm import UnsupportedModelError, backbones

    try:
        config = tiny_config(architecture)
        try:
            backbones.check_supported(config, role)
        except UnsupportedModelError as error:
            return "refused", [str(error).rpartition(": ")[2].rstrip(".")]
        try:
            model = tiny_model(config)
        except ImportError as error:
            return "not tried", [" ".join(str(error).split(".")[0].split())]
        partner = tiny_model(tiny_config("llama", width=24, heads=2), seed=1)
        lacking = examine(*((model, partner) if role == "anchor" else (partner, model)), measure_bare(model))
    except CheckFailed as error:
        return "fails", [f"as {role}: {error}"]
    except Exception as error:  # one architecture's failure, whatever it is, must not end the others' trial
        return "fails", [f"as {role}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"]
    notes = [f"{name}: as the bare model" for name in lacking if name != "loading by name"]
    if flags := as_decoder(architecture):
        notes.append("with " + " and ".join(f"`{flag}={value}`" for flag, value in flags.items()))
    if "loading by name" in lacking:
        notes.append("only as a loaded model: transformers' Auto classes do not load what it saves")
    if any(type(module).__module__.startswith("timm.") for module in model.modules()):
        notes.append(f"tried with timm {version('timm')}, which its image tower takes")
    if role != "anchor" and backbones.runs_whole(config):
        notes.append("as augmenting model it runs whole: its layers depend on how many there are")
    return "yes", notes


def _start() -> None:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore")


class Worker:
    """A process that is started anew when a trial crashes or hangs it."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.pool = self.context.Pool(1, _start)

    def run(self, architecture: str) -> Row:
        """Try an architecture in both roles."""
        row = Row(architecture, {}, [])
        for role in ROLES:
            try:
                verdict, notes = self.pool.apply_async(try_one, (architecture, role)).get(timeout=LIMIT)
            except multiprocessing.TimeoutError:
                self.pool.terminate()
                self.pool = self.context.Pool(1, _start)
                verdict, notes = "fails", [f"as {role}: crashed, or took over {LIMIT} s"]
            row.verdicts[role] = verdict
            row.notes += [note for note in notes if note not in row.notes]
        print(row.line(), file=sys.stderr, flush=True)
        return row


def main() -> None:
    """Try what is asked for; write the page unless it is a selection."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="ARCHITECTURE", help="try these and write nothing")
    only = parser.parse_args().only
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import transformers
    from tiny import architectures

    if unknown := sorted(set(only or ()) - set(architectures())):
        parser.error(
            f"--only {unknown}: not among the causal language models of transformers {transformers.__version__}"
        )
    workers: Queue[Worker] = Queue()
    for _ in range(WORKERS):
        workers.put(Worker())

    def run(architecture: str) -> Row:
        worker = workers.get()
        try:
            return worker.run(architecture)
        finally:
            workers.put(worker)

    with ThreadPoolExecutor(WORKERS) as threads:
        rows = list(threads.map(run, only or architectures()))
    lines = [
        f"As {role}: " + ", ".join(f"{verdicts.count(v)} {v}" for v in ("yes", "refused", "not tried", "fails")) + "."
        for role in ROLES
        if (verdicts := [row.verdicts[role] for row in rows])
    ]
    counts = f"{len(rows)} architectures. " + " ".join(lines)
    print(counts)
    if not only:
        header = HEADER.format(version=transformers.__version__, counts=counts)
        PAGE.write_text(header + "".join(f"{row.line()}\n" for row in sorted(rows, key=lambda row: row.architecture)))
        print(f"wrote {PAGE}")
    sys.exit(any("fails" in row.verdicts.values() for row in rows))


if __name__ == "__main__":
    main()
