"""run(): all methods on one pair of models, with every data set and seed; every method is kept once it is done."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import calm
from calm import planning
from calm.data import Row, load_tokenizer
from calm.errors import CalmError, DivergedError
from calm.experiments.methods import bases, scoring, training
from calm.experiments.methods.examples import Data, Example, TaskSet
from calm.experiments.methods.mixing import WEIGHTS
from calm.experiments.methods.settings import BEYOND, TRAINED_ON_DC, Fit, Settings
from calm.experiments.results import METHODS
from calm.experiments.sharing import Job, do_all, locked
from calm.experiments.steps import fingerprint, once, read_json, write_json
from calm.training import rehearsal

COMPOSED = ("composed", "vanilla_m_A", "random_m_A", "encoder_m_A")
ANCHOR_ALONE = ("m_B", "m_B_zero_shot")
"""Methods whose outcome depends on no seed."""
ANY_SEED = "any-seed"
"""The folder, beside those of the seeds, with the outcomes of these."""
WEIGHTS_OF = "weights-of"
"""The file in a base's folder with the fingerprint of what its weights were made with; `base.json`, which says what is
known of them, may come from another machine without any."""
BEGUN = "begun.json"
"""The file in a training's folder that says what it is trained as, and how long it took before it was gone on with."""

Found = tuple[float, float]
"""What a search goes by: the worth of a model's answers to the development set, and minus the nats of right ones."""

Outcome = dict[str, Any]
"""What one method leaves: `answers` by row of `tests` and `preserved_tests`, `references` (how unlikely it finds the
right answers) by row of `tests`, `nll` by preserved text set, `training`, as plain JSON."""


def run(
    data: Mapping[str, Data],
    settings: Settings,
    seeds: Sequence[int],
    folder: Path,
    console: Console,
    rates: Mapping[str, Mapping[str, float]] | None = None,
) -> dict[str, dict[int, dict[str, Outcome]]]:
    """Train and evaluate the methods, each once, with every data set and every seed.

    Several processes may do so in one folder at the same time: each method is one's, and all return all outcomes.

    Args:
        data: of one pair of models, by name: the folder of what data sets do not share, as they do a vanilla `m_A`
            and with it their `general` texts (if there is one only, its name may be empty).
        settings: sizes and lengths.
        seeds: of weights and of the order of examples.
        folder: where models and outcomes are kept: in its `seed-SEED`, but for what `m_B` answers by itself, which is
            the same for every seed and lies in `ANY_SEED`.
        console: is told what was done.
        rates: by data set, the learning rate (for `mixed_logits` the weight) by method; a data set without searches
            for them with its first seed. A method that diverges at the one that it has searches for its own.

    Raises:
        CalmError: data sets with other `general` texts; a method diverged at every learning rate.

    Returns:
        The outcomes by data set, seed and method.
    """
    if len({examples.general for examples in data.values()}) > 1:
        raise CalmError(
            f"{', '.join(data)}: data sets that share a vanilla m_A, with other general texts; run each in a folder of "
            "its own."
        )
    runs: dict[tuple[str, int], _Run] = {}
    for name, examples in data.items():
        known, first = (rates or {}).get(name), None
        for seed in seeds:
            runs[name, seed] = _Run(examples, settings, seed, folder, console, known, first, name)
            if known is None and first is None:
                first = runs[name, seed]
    do_all([job for one in runs.values() for job in one.jobs()], console)
    return {
        name: {
            seed: {method: runs[name, seed].outcomes[method] for method in METHODS if method in settings.methods}
            for seed in seeds
        }
        for name in data
    }


class _Run:
    def __init__(
        self,
        data: Data,
        settings: Settings,
        seed: int,
        folder: Path,
        console: Console,
        rates: Mapping[str, float] | None,
        first: _Run | None,
        name: str,
    ) -> None:
        self.data, self.settings, self.seed, self.console = data, settings, seed, console
        self.first, self.found = first, dict[str, float]()
        self.rates = first.found if first else rates  # what the first one finds, once it has
        self.diverged = dict[str, float]()  # methods that did at the rate that they were given
        self.spent = 0.0  # seconds of the trainings that a step went on with, before it did
        self.outcomes = dict[str, Outcome]()
        self.root, shared = folder, folder / f"seed-{seed}"
        self.folder, self.of_any_seed = shared / name, folder / ANY_SEED / name
        self.bf16 = settings.dtype == "bfloat16"
        self.is_cut = not isinstance(settings.augmenting, str)
        self.anchor = settings.anchor if isinstance(settings.anchor, str) else str(settings.anchor.folder())
        self.tokenizer: PreTrainedTokenizerBase = load_tokenizer(self.anchor)
        self.vanilla, self.specialist, self.random = shared / "vanilla", self.folder / "m_A", self.folder / "random"
        self.development = scoring.completion_rows(data.developed, self.tokenizer, settings.max_length)
        self.asked_in_search = fingerprint(
            {row: [_asked(task), task.metric.name] for row, task in data.development.items()}
        )
        self.tasks = {**data.tests, **data.preserved_tests}
        self.asked = fingerprint(
            {row: _asked(task) for row, task in self.tasks.items()},
            dict(data.preserved),
            settings.max_length,
            "references",  # outcomes that were kept before there were any do not count
        )
        self.vanilla_as: list[Any] = [settings.anchor, settings.augmenting, settings.general, fingerprint(data.general)]
        self.vanilla_as += [seed, settings.max_length, settings.dtype, *(["vocabulary kept"] if self.is_cut else [])]
        self.specialist_as: list[Any] = [settings.specialist]
        if isinstance(settings.specialist, Fit):
            self.specialist_as = [*self.vanilla_as, settings.specialist, fingerprint(data.specialist)]
        is_trained = isinstance(settings.specialist, Fit)
        self.of_its_shape = self.vanilla if is_trained else self.specialist  # as m_A, and there as early as can be
        self.bases = fingerprint(self.specialist_as if is_trained else [self.vanilla_as, self.specialist_as])

    def jobs(self) -> list[Job]:
        """All that there is to do, in the order in which to do it; each method's leaves it in `outcomes`."""
        vanilla, specialist, random = (made(base) for base in (self.vanilla, self.specialist, self.random))
        of_its_shape = made(self.of_its_shape)
        rehearsal = self.folder / "rehearsal.json"
        composed = dict.fromkeys(COMPOSED, specialist) | {"vanilla_m_A": vanilla, "random_m_A": random}
        needs = {method: (base, rehearsal) for method, base in composed.items()} | {
            "m_A": (specialist,),
            "lora": (of_its_shape, rehearsal),
            "full_on_DC": (rehearsal,),
            "full_on_all": (rehearsal,),
            "mixed_logits": (specialist,),
            "pipeline": (specialist, *([self._path("m_A")] if "m_A" in self.settings.methods else [])),
        }
        jobs = [
            Job(vanilla, lambda: self._make(self.vanilla)),
            Job(specialist, lambda: self._make(self.specialist), (vanilla,)),
            Job(random, lambda: self._make(self.random), (vanilla,)),
            Job(rehearsal, self._rehearse),
        ]
        for method in METHODS:
            if method in self.settings.methods:
                before = (self.first._path(method),) if self.first else ()
                jobs.append(
                    Job(self._path(method), functools.partial(self._do, method), needs.get(method, ()) + before)
                )
        return jobs

    def _do(self, method: str) -> None:
        outcome = self.outcomes[method] = self._method(method)
        if "learning_rate" in outcome["training"]:
            self.found[method] = outcome["training"]["learning_rate"]

    def _path(self, method: str) -> Path:
        return (self.of_any_seed if method in ANCHOR_ALONE else self.folder) / f"{method}.json"

    # --- bases ------------------------------------------------------------------------------------------------------

    def _make(self, base: Path) -> None:
        self._once(made(base), self._made_as(base), lambda: self._save_base(base))

    def _made_as(self, base: Path) -> list[Any]:
        return self.specialist_as if base == self.specialist else self.vanilla_as

    def _save_base(self, base: Path) -> Outcome:
        make = {
            self.vanilla: self._make_vanilla,
            self.specialist: self._make_specialist,
            self.random: self._make_random,
        }[base]
        (base / WEIGHTS_OF).unlink(missing_ok=True)  # what it stands for is about to be overwritten
        outcome = make()
        write_json(base / WEIGHTS_OF, fingerprint(self._made_as(base)))
        _remove(base / "training")
        return outcome

    def _train_base(self, model: PreTrainedModel, base: Path, rows: Sequence[Row], fit: Fit) -> None:
        if self.is_cut:
            bases.keep_vocabulary(model)
        folder = base / "training"
        self.spent += _begin(folder, fingerprint(self._made_as(base)))
        training.fine_tune(model, self.tokenizer, rows, fit, self.seed, self.bf16, folder)

    def _make_vanilla(self) -> Outcome:
        settings = self.settings
        if isinstance(settings.augmenting, str):
            model = bases.load(settings.augmenting)
        else:
            model = bases.cut(bases.load(self.anchor), settings.augmenting)
        if settings.general is not None:
            rows = scoring.text_rows(self.data.general, self.tokenizer, settings.max_length)
            self._train_base(model, self.vanilla, rows, settings.general)
        self._save(model, self.vanilla)
        return {"parameters": model.num_parameters()}

    def _make_specialist(self) -> Outcome:
        fit = self.settings.specialist
        model = bases.load(fit if isinstance(fit, str) else self._base(self.vanilla))
        if isinstance(fit, Fit):
            self._train_base(model, self.specialist, self._rows(self.data.specialist), fit)
        self._save(model, self.specialist)
        return {"parameters": model.num_parameters()}

    def _make_random(self) -> Outcome:
        bases.save_random(self._base(self.vanilla), self.random, self.seed)
        return {}

    def _base(self, folder: Path) -> Path:
        """The folder of a base, which is made again if only what is known of it was brought from another machine.

        Weights that lie there may be those of an earlier run with other settings.
        """
        with locked(made(folder)):  # another process may be making it
            if read_json(folder / WEIGHTS_OF, None) != fingerprint(self._made_as(folder)):
                self.console.print(f"[dim]{folder.name}, whose weights are not here, is made again ...[/dim]")
                self._save_base(folder)
        return folder

    def _rehearse(self) -> None:
        settings, number = self.settings, self.settings.rehearsed(len(self.data.composition))
        asked = [settings.anchor, settings.dtype, settings.batch, number, rehearsal.TOKENS, self.seed]

        def write() -> Outcome:
            anchor = bases.load(self.anchor, settings.dtype)
            return {"texts": rehearsal.write(anchor, self.tokenizer, number, settings.batch, self.seed)}

        self.rehearsed = self._once(self.folder / "rehearsal.json", asked, write)["texts"] if number else []

    # --- methods ----------------------------------------------------------------------------------------------------

    def _method(self, method: str) -> Outcome:
        path = self._path(method)
        depends_on: list[Any] = [self.settings.anchor, self.settings.dtype, method]
        if method in TRAINED_ON_DC:
            depends_on += [self.bases, self.settings.of_training(), fingerprint(self.data.composition), self.seed]
            depends_on += [fingerprint(self.rehearsed), self.settings.steps_of(method)]
            if method == "lora":
                depends_on.append(importlib.metadata.version("peft"))
            if method == "full_on_all":
                depends_on.append(fingerprint(self.data.specialist))
            rate, searched = self._rate(method, depends_on)
            trained = self._trained(method, rate, depends_on)
            if not math.isfinite(trained["nll"]):
                raise CalmError(
                    f"{method} diverged with seed {self.seed} at every learning rate that was tried, the last one "
                    f"{rate:g}: give its preset lower ones (Settings.learning_rates), or leave it out "
                    "(Settings.methods); what is finished of the others is kept"
                )
            return self._once(
                path,
                [*depends_on, rate, searched, self.asked],
                lambda: self._evaluated(method, rate, searched, trained, depends_on),
            )
        if method in ("m_A", "mixed_logits", "pipeline"):
            depends_on += [self.bases]
        if method == "mixed_logits":
            asked_for, weight = [WEIGHTS, self.asked_in_search], self.rates[method] if self.rates is not None else None
            if weight is not None and self._found_before(method, weight, [*depends_on, None, *asked_for, self.asked]):
                weight = None  # what is kept was searched for
            depends_on += [weight, *asked_for]
        return self._once(path, [*depends_on, self.asked], lambda: self._untrained(method))

    def _untrained(self, method: str) -> Outcome:
        dtype = self.settings.dtype
        if method == "m_A":
            return self._measure(bases.load(self._base(self.specialist), dtype))
        anchor = bases.load(self.anchor, dtype)
        if method == "pipeline":
            return self._measure(anchor, few_shot=True, tasks=self._hinted())
        if method != "mixed_logits":
            return self._measure(anchor, few_shot=method == "m_B")
        augmenting = bases.load(self._base(self.specialist), dtype)
        if self.rates is not None:
            weight, searched = self.rates[method], {}
        else:
            searched = {tried: self._worth(anchor, few_shot=True, mix=(augmenting, tried)) for tried in WEIGHTS}
            equal = [tried for tried in WEIGHTS if searched[tried] == max(searched.values())]
            weight = (
                min(equal, key=lambda tried: self._mixture_nll(anchor, augmenting, tried)) if equal[1:] else equal[0]
            )
        outcome = self._measure(anchor, few_shot=True, mix=(augmenting, weight))
        outcome["training"] |= {"learning_rate": weight, "searched": searched}
        return outcome

    def _rate(self, method: str, depends_on: Sequence[Any]) -> tuple[float, dict[str, float]]:
        """The learning rate whose model, trained to its end, answers the development set best, and what each was worth.

        Of rates that are worth the same it is the one whose model finds the right answers likelier.
        """
        if self.rates is not None:
            rate = self.rates[method]
            if math.isfinite(self._trained(method, rate, depends_on)["nll"]):
                tried = read_json(self._path(method), {}).get("result", {}).get("training", {}).get("searched", {})
                is_kept = self._found_before(method, rate, [*depends_on, rate, tried, self.asked])
                return rate, tried if is_kept else {}
            self.console.print(f"{method} searches for a learning rate of its own with seed {self.seed}")
            self.diverged[method] = rate
        kind = "composition" if method in COMPOSED else "lora" if method == "lora" else "full"
        candidates = self.settings.learning_rates[kind]
        if len(candidates) == 1:
            return candidates[0], {}

        searched: dict[float, Found] = {}
        rates = list(candidates)
        for rate in rates:
            trained = self._trained(method, rate, depends_on)
            searched[rate] = float(trained["worth"]), -float(trained["nll"])
            best = _best(searched)
            for other in searched:
                if other != best:
                    _remove(self.folder / method / f"{other:g}")
            if len(rates) == len(searched) < len(candidates) + BEYOND and (beyond := _beyond(searched)) is not None:
                rates.append(beyond)
        return best, {f"{rate:g}": worth for rate, (worth, _) in sorted(searched.items()) if math.isfinite(worth)}

    def _found_before(self, method: str, rate: float, settings: Any) -> bool:
        """Whether the outcome that is kept has these settings, those of a search, and this rate, which it found."""
        kept = read_json(self._path(method), {})
        return bool(
            kept.get("fingerprint") == fingerprint(settings) and kept["result"]["training"]["learning_rate"] == rate
        )

    def _trained(self, method: str, rate: float, depends_on: Sequence[Any]) -> Outcome:
        """Train with one learning rate. The model lies in the folder of that name beside what is returned."""
        folder = self.folder / method / f"{rate:g}"
        settings = [*depends_on, rate, self.asked_in_search]
        trained_as = fingerprint([*depends_on, rate])
        return self._once(_kept(folder), settings, lambda: self._fit(method, rate, folder, trained_as))

    def _fit(self, method: str, rate: float, folder: Path, trained_as: str) -> Outcome:
        spent = _begin(folder, trained_as)
        self.spent += spent
        started = time.perf_counter() - spent
        fit = Fit(self.settings.steps_of(method), self.settings.rows, rate)
        try:
            trainable = self._train(method, fit, folder)
        except DivergedError as error:
            self.console.print(f"{method} at {rate:g}: {error}")
            return {"worth": -math.inf, "nll": math.inf, "trainable_parameters": 0, "seconds": 0.0}
        seconds = round(time.perf_counter() - started, 1)
        for checkpoint in folder.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)
        model = self._load(method, folder)
        nll = self._development_nll(scoring.logits_of(model))
        worth = self._worth(model) if math.isfinite(nll) else -math.inf
        return {"worth": worth, "nll": nll, "trainable_parameters": trainable, "seconds": seconds}

    def _evaluated(
        self, method: str, rate: float, searched: Mapping[str, float], trained: Outcome, depends_on: Sequence[Any]
    ) -> Outcome:
        folder = self.folder / method / f"{rate:g}"
        if not folder.exists():  # removed, since another search had found a better one
            _kept(folder).unlink()
            trained = self._trained(method, rate, depends_on)
        outcome = self._measure(self._load(method, folder))
        outcome["training"] = {
            "trainable_parameters": trained["trainable_parameters"],
            "learning_rate": rate,
            "searched": dict(searched),
            "steps": self.settings.steps_of(method),
            "seconds": trained["seconds"],
        }
        if method in self.diverged:
            outcome["training"]["diverged_at"] = self.diverged[method]
        for other in folder.parent.iterdir():
            if other.is_dir() and (other != folder or method.startswith("full")):  # as large as the anchor
                _remove(other)
        return outcome

    def _train(self, method: str, fit: Fit, folder: Path) -> int:
        """Leave a trained model in a folder; the number of its trained parameters."""
        settings = self.settings
        examples = self.data.composition * settings.copies(len(self.data.composition))
        if method in COMPOSED:
            augmenting = {"vanilla_m_A": self.vanilla, "random_m_A": self.random}.get(method, self.specialist)
            return training.train_composition(
                self.anchor,
                self._base(augmenting),
                examples,
                self.rehearsed,
                settings,
                fit,
                self.seed,
                folder,
                attend="prompt" if method == "encoder_m_A" else "causal",
            ).trainable_parameters
        model = bases.load(self.anchor)
        if method == "lora":
            augmenting = self._base(self.of_its_shape)
            composition = planning.plan(self.anchor, str(augmenting), settings.connections, sequence_length=2)
            model = training.with_lora(model, composition.connections.parameters, self.seed)
        elif method == "full_on_all":
            examples = tuple(dict.fromkeys((*self.data.specialist, *examples)))
        rows = self._rows(examples) + scoring.text_rows(self.rehearsed, self.tokenizer, settings.max_length)
        trained = training.fine_tune(model, self.tokenizer, rows, fit, self.seed, self.bf16, folder)
        model.to(getattr(torch, settings.dtype)).save_pretrained(folder)
        return trained

    def _load(self, method: str, folder: Path) -> PreTrainedModel:
        dtype = self.settings.dtype
        if method in COMPOSED:
            return calm.CalmForCausalLM.from_pretrained(folder, dtype=dtype).to(bases.device()).eval()
        if method == "lora":
            return training.load_lora(bases.load(self.anchor, dtype), folder)
        return bases.load(folder, dtype)

    # --- measuring --------------------------------------------------------------------------------------------------

    def _hinted(self) -> dict[str, TaskSet]:
        """The tasks with what `m_A` answers to each prompt written before it, in the examples before it, too."""
        augmenting = bases.load(self._base(self.specialist), self.settings.dtype)
        answers = (self.outcomes.get("m_A") or self._method("m_A"))["answers"]

        def of_examples(task: TaskSet) -> list[str]:
            shown = dataclasses.replace(task, examples=task.few_shot)
            return scoring.answers(augmenting, self.tokenizer, shown, self.settings.batch)

        return {
            row: dataclasses.replace(
                task,
                examples=scoring.hinted(task.examples, answers[row]),
                few_shot=scoring.hinted(task.few_shot, of_examples(task)),
            )
            for row, task in self.tasks.items()
        }

    def _measure(
        self,
        model: PreTrainedModel,
        *,
        few_shot: bool = False,
        mix: tuple[PreTrainedModel, float] | None = None,
        tasks: Mapping[str, TaskSet] | None = None,
    ) -> Outcome:
        settings = self.settings
        fewer = max(1, settings.batch // 4)  # a row's logits are many: HumanEval's have up to 600 tokens
        logits = scoring.mixed(model, *mix) if mix else scoring.logits_of(model)
        tasks = tasks or self.tasks
        written = {
            row: scoring.answers(model, self.tokenizer, task, settings.batch, few_shot=few_shot, mix=mix)
            for row, task in tasks.items()
        }
        references = {
            row: scoring.reference_likelihoods(model, self.tokenizer, tasks[row], fewer, few_shot=few_shot, mix=mix)
            for row in self.data.tests
        }
        nll = {}
        for name, texts in self.data.preserved.items():
            rows = scoring.text_rows(texts, self.tokenizer, settings.max_length)
            nll[name] = scoring.negative_log_likelihoods(logits, rows, self.tokenizer, fewer)
        return {
            "answers": written,
            "references": references,
            "nll": nll,
            "parameters": model.num_parameters(),
            "training": {"trainable_parameters": 0},
        }

    def _worth(
        self, model: PreTrainedModel, *, few_shot: bool = False, mix: tuple[PreTrainedModel, float] | None = None
    ) -> float:
        developed = list(self.data.development.values())
        return scoring.worth(model, self.tokenizer, developed, self.settings.batch, few_shot=few_shot, mix=mix)

    def _mixture_nll(self, anchor: PreTrainedModel, augmenting: PreTrainedModel, weight: float) -> float:
        found: list[tuple[float, int]] = []
        for task in self.data.development.values():
            fewer, mix = max(1, self.settings.batch // 4), (augmenting, weight)
            found += scoring.reference_likelihoods(anchor, self.tokenizer, task, fewer, few_shot=True, mix=mix)
        return scoring.mean_nll(found)

    def _development_nll(self, logits: scoring.Logits) -> float:
        found = scoring.negative_log_likelihoods(logits, self.development, self.tokenizer, self.settings.batch)
        return scoring.mean_nll(found)

    def _rows(self, examples: Sequence[Example]) -> list[Row]:
        return scoring.completion_rows(examples, self.tokenizer, self.settings.max_length)

    def _save(self, model: PreTrainedModel, folder: Path) -> None:
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def _once(self, path: Path, settings: Any, compute: Callable[[], Outcome]) -> Outcome:
        def timed() -> Outcome:
            self.console.print(f"[dim]{path.relative_to(self.root)} ...[/dim]")
            self.spent, started = 0.0, time.perf_counter()
            result = compute()
            seconds = round(self.spent + time.perf_counter() - started, 1)
            self.console.print(f"{path.relative_to(self.root)}: {seconds:.0f} s")
            return {**result, "step_seconds": seconds}

        return once(path, settings, timed)


def _asked(task: TaskSet) -> list[Any]:
    """What answers depend on."""
    return [task.examples, task.few_shot, task.max_new_tokens, task.stop]


def made(base: Path) -> Path:
    """What is known of a base, in its folder."""
    return base / "base.json"


def _kept(folder: Path) -> Path:
    """What is known of a training, beside the folder with its model."""
    return folder.with_name(f"{folder.name}.json")


def _begin(folder: Path, trained_as: str) -> float:
    """Make the folder of a training, with the checkpoints of one that was interrupted if it was the same one.

    Returns:
        The seconds that this one took until its last checkpoint.
    """
    about, spent = read_json(folder / BEGUN, {}), 0.0
    written = [path.stat().st_mtime for path in folder.glob("checkpoint-*")]
    if written and about.get("trained_as") == trained_as:
        spent = about["spent"] + max(written) - about["began"]
    elif folder.exists():
        _remove(folder)  # a training that is over, or had other settings or data, is not gone on with
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / BEGUN, {"trained_as": trained_as, "spent": spent, "began": time.time()})
    return spent


def _remove(folder: Path) -> None:
    """Remove a folder that is never seen in parts."""
    condemned = folder.with_name(f"{folder.name}.removed")
    shutil.rmtree(condemned, ignore_errors=True)
    if folder.exists():
        folder.rename(condemned)
        shutil.rmtree(condemned)


def _best(searched: Mapping[float, Found]) -> float:
    """The rate that was worth most, of these the likeliest; what diverged was worth nothing."""
    return max(searched, key=lambda tried: searched[tried])


def _beyond(searched: Mapping[float, Found]) -> float | None:
    """The next rate to try, a step beyond the end of those that were; None if the best one lies between others."""
    rates, best = sorted(searched), _best(searched)
    if rates[0] < best < rates[-1]:
        return None
    return float(f"{best * best / rates[1 if best == rates[0] else -2]:.1g}")
