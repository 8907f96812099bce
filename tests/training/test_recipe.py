"""The recipe: every field is checked before anything is loaded, and errors say field, value and what was expected."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from calm.errors import CalmError
from calm.training.recipe import Recipe, check_recipe, load_recipe

EXAMPLE = Path(__file__).parents[2] / "examples" / "recipe.yaml"


def fields(**changes: Any) -> dict[str, Any]:
    """A valid recipe with some fields changed; `section__field` is a field of a section."""
    recipe: dict[str, Any] = {
        "anchor": "some/anchor",
        "augmenting": "some/specialist",
        "data": {"train": "some/data"},
        "training": {"output_dir": "runs/x"},
    }
    for path, value in changes.items():
        section, _, field = path.rpartition("__")
        (recipe[section] if section else recipe)[field] = value
    return recipe


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"anchor": 3}, "anchor = 3: expected the name or path of the anchor"),
        ({"anchor": "./nowhere"}, "anchor = './nowhere': './nowhere': no such folder. Give the folder that holds"),
        ({"anchor": "~/nowhere"}, "anchor = '~/nowhere': '~/nowhere': no such folder"),
        ({"anchor": "nowhere/a.gguf"}, "anchor = 'nowhere/a.gguf': 'nowhere/a.gguf': no such GGUF file. Give its path"),
        ({"augmenting": {}}, "augmenting = {}: there is nothing in it; expected the name or path"),
        (
            {"augmenting": {"a": "/no/where.gguf"}},
            "augmenting = {'a': '/no/where.gguf'}: '/no/where.gguf': no such GGUF",
        ),
        ({"connections": "many"}, "connections = 'many': expected a number of connections above 0, or pairs"),
        ({"connections": True}, "connections = True: expected a number"),
        ({"connections": 0}, "connections = 0: expected a number"),
        ({"connections": [[1, 2], [3]]}, "connections = [[1, 2], [3]]: expected"),
        ({"connections": [[1, -2]]}, "connections = [[1, -2]]: expected"),
        ({"attention": "fast"}, "attention = 'fast': expected one of gated, normalized, paper"),
        ({"attend": "all"}, "attend = 'all': expected one of causal, prompt"),
        ({"dtype": "int8"}, "dtype = 'int8': expected one of float32, bfloat16"),
        ({"quantization": "int3"}, "quantization = 'int3': expected one of int8 (torchao), nf4 (4 bits, bitsandbytes)"),
        ({"trainig": {}}, "trainig: unknown field; did you mean 'training'?"),
        ({"data": None}, "data = None: expected the section that says what to train on"),
        ({"data": {}}, "data.train: missing; expected a .jsonl or .json file"),
        ({"data__train": "nowhere.jsonl"}, "data.train = 'nowhere.jsonl': there is no such file (looked from"),
        ({"data__eval": "nowhere.json"}, "data.eval = 'nowhere.json': there is no such file"),
        ({"data__max_length": 1.5}, "data.max_length = 1.5: expected a whole number of tokens"),
        ({"data__xyz": 1}, "data.xyz: unknown field; the fields here are train, eval,"),
        ({"training__learning_rat": 1}, "training.learning_rat: unknown field; did you mean 'learning_rate'?"),
        ({"training__learning_rate": "fast"}, "training.learning_rate = 'fast': expected a number above 0"),
        ({"training__learning_rate": -1}, "training.learning_rate = -1: expected a number above 0"),
        ({"training__learning_rate": float("nan")}, "training.learning_rate = nan: expected a number above 0"),
        ({"training__epochs": float("inf")}, "training.epochs = inf: expected a number above 0"),
        ({"training__lr_scheduler": "cos"}, "training.lr_scheduler = 'cos': expected one of cosine, linear, constant"),
        ({"training__warmup": 1.5}, "training.warmup = 1.5: neither a share of the run nor a whole number of steps"),
        ({"training__per_device_batch_size": 0}, "training.per_device_batch_size = 0: expected a whole number above 0"),
        ({"training__seed": -1}, "training.seed = -1: expected a whole number from 0"),
        ({"training__seed": 2**32}, "training.seed = 4294967296: expected a whole number from 0 to 4,294,967,295"),
        ({"training__bf16": "maybe"}, "training.bf16 = 'maybe': expected true or false"),
        ({"training__output_dir": f"{__file__}/out"}, "test_recipe.py is a file, not a directory; expected"),
        ({"training__output_dir": None}, "training.output_dir = None: expected a directory"),
        ({"training": {"output_dir": "x", "epochs": 1, "max_steps": 2}}, "epochs = 1.0 and max_steps = 2: give one of"),
        ({"training__eval_steps": 5}, "training.eval_steps = 5: there is no data.eval to evaluate on"),
        ({"training__early_stopping_patience": 5}, "training.early_stopping_patience = 5: there is no data.eval"),
        (
            {"data__eval": "e", "training__eval_steps": 4, "training__save_steps": 6},
            "training.save_steps = 6: expected a multiple of training.eval_steps = 4",
        ),
    ],
)
def test_wrong_fields_are_named_with_value_and_expectation(changes: dict[str, Any], line: str):
    with pytest.raises(CalmError) as caught:
        check_recipe(fields(**changes), name="my.yaml")
    first, *problems = str(caught.value).splitlines()
    assert first == "my.yaml: 1 problem in the recipe"
    assert len(problems) == 1
    assert line in problems[0]


def test_all_problems_are_reported_at_once():
    with pytest.raises(CalmError, match="3 problems") as caught:
        check_recipe(fields(anchor=1, training__seed="x", data__trai="y"))
    assert [line.split()[0].rstrip(":") for line in str(caught.value).splitlines()[1:]] == [
        "anchor",
        "data.trai",
        "training.seed",
    ]


def test_models_on_a_hub_may_be_gguf_files():
    recipe = check_recipe(fields(anchor="owner/repository/model-q8.gguf", augmenting={"a": "owner/other/b.gguf"}))
    assert recipe.bases == ["owner/repository/model-q8.gguf", "owner/other/b.gguf"]


def test_gguf_files_are_not_quantized_once_more(tmp_path: Path):
    (tmp_path / "a.gguf").touch()
    for bases in ({"anchor": str(tmp_path / "a.gguf")}, {"augmenting": {"it": str(tmp_path / "a.gguf")}}):
        with pytest.raises(CalmError, match=r"quantization = 'nf4': .*a.gguf is a GGUF file, .*leave quantization out"):
            check_recipe(fields(**bases, quantization="nf4"))


def test_a_directory_of_ones_home_is_found_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    data = {**fields()["data"], "augmenting_outputs": "disk", "augmenting_outputs_dir": "~/kept"}
    recipe = check_recipe(fields(training__output_dir="~/runs/x", data=data))
    assert recipe.training.output_dir == str(tmp_path / "runs/x")
    assert recipe.data.augmenting_outputs_dir == str(tmp_path / "kept")


def test_directory_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("os.access", lambda path, mode: str(path) != str(tmp_path))
    with pytest.raises(CalmError, match=f"output_dir = .*{tmp_path} cannot be written to"):
        check_recipe(fields(training__output_dir=str(tmp_path / "a" / "b")))
    assert not (tmp_path / "a").exists(), "checking makes nothing"


def test_the_folder_of_a_base_is_no_place_for_a_composition(tmp_path: Path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CalmError, match=r"output_dir = .* holds a model of type 'llama', .*another place.*; expected"):
        check_recipe(fields(training__output_dir=str(tmp_path)))
    (tmp_path / "config.json").write_text('{"model_type": "calm"}')
    check_recipe(fields(training__output_dir=str(tmp_path)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no such recipe"),
        ("", "a recipe is a mapping .* but it is empty"),
        ("- a\n- b", "but it holds a list"),
        ("anchor: [a\ntraining: 1", "not a YAML file: .*line 2"),
        ("anchor: x\nanchr: y", "did you mean 'anchor'"),
    ],
)
def test_bad_files(tmp_path: Path, text: str | None, message: str):
    file = tmp_path / "my.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(CalmError, match=f"(?s)my.yaml: .*{message}"):
        load_recipe(file)


def test_values_are_read_as_people_write_them(tmp_path: Path):
    file = tmp_path / "my.yaml"
    recipe = fields(connections=[[7, 11], [15, 23]], training__warmup=100)
    # YAML takes 2e-3 for a string, since it has no dot
    file.write_text(yaml.safe_dump(recipe).replace("output_dir:", "learning_rate: 2e-3\n  output_dir:"))
    read = load_recipe(file)
    assert read.training.learning_rate == 0.002
    assert read.connections == [(7, 11), (15, 23)]
    assert check_recipe(fields(connections={"a": 2, "b": [[1, 2]]})).connections == {"a": 2, "b": [(1, 2)]}


def test_checkpoints_are_written_at_evaluations_by_default():
    assert check_recipe(fields(data__eval="e", training__eval_steps=30)).save_steps == 30
    assert check_recipe(fields(training__save_steps=7)).save_steps == 7


def test_the_example_shows_every_field_with_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    values = yaml.safe_load(EXAMPLE.read_text())
    for name in ("anchor", "augmenting"):
        values[name] = f"some/{name}"
    for name in ("train", "eval"):
        values["data"][name] = str(tmp_path / f"{name}.jsonl")
        Path(values["data"][name]).touch()
    recipe = check_recipe(values)
    shown = {"recipe": set(values), "data": set(values["data"]), "training": set(values["training"])}
    text = EXAMPLE.read_text()
    for section, model in (("recipe", Recipe), ("data", type(recipe.data)), ("training", type(recipe.training))):
        for field, info in model.model_fields.items():
            assert field in shown[section] or f"# {field}:" in text, f"{section}: {field} is not in the example"
            if field in shown[section] and not info.is_required() and info.default is not None:
                part = recipe if section == "recipe" else getattr(recipe, section)
                assert getattr(part, field) == info.default, f"{section}.{field} is not the default"


def test_checking_needs_no_torch():
    """`calm.training.recipe` itself imports nothing heavy: what is imported beside it comes from `calm` alone."""
    code = (
        "import sys; sys.modules['calm'] = type(sys)('calm'); sys.modules['calm'].__path__ = [sys.argv[1]]; "
        "import calm.training.recipe; print('torch' in sys.modules, 'transformers' in sys.modules)"
    )
    package = str(Path(__file__).parents[2] / "src" / "calm")
    run = subprocess.run([sys.executable, "-c", code, package], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False"]
