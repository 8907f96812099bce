"""Training data: what is read, where the loss is, what is refused and how."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from bases import byte_tokenizer, save_base, sums, write_jsonl
from tokenizers import normalizers

import calm
from calm.data import CompletionCollator, load_examples, load_tokenizer, tokenize_example
from calm.errors import CalmError

CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "2+2?"},
    {"role": "assistant", "content": "4"},
]


def completion_of(row: dict, tokenizer) -> str:
    return tokenizer.decode([token for token in row["labels"] if token != -100])


def prompt_of(row: dict) -> list[int]:
    length = sum(label == -100 for label in row["labels"])
    assert all(label == -100 for label in row["labels"][:length]), "the prompt is one run at the start"
    return list(row["input_ids"][:length])


def test_prompt_tokens_are_those_of_generation_and_labels_are_the_completion_with_eos():
    tokenizer = byte_tokenizer()
    row = tokenize_example({"prompt": "a b =", "completion": " c", "source": "ignored"}, tokenizer)
    assert prompt_of(row) == tokenizer("a b =")["input_ids"]
    assert row["input_ids"][0] == tokenizer.bos_token_id
    assert completion_of(row, tokenizer) == " c<eos>"
    assert row["labels"][-2:] == row["input_ids"][-2:]


def test_merge_across_the_boundary_does_not_change_the_prompt():
    """`ab` is one token: tokenized together, the prompt's last token would not be what generation sees."""
    tokenizer = byte_tokenizer(merges=[("a", "b")])
    assert len(tokenizer("ab", add_special_tokens=False)["input_ids"]) == 1
    row = tokenize_example({"prompt": "xa", "completion": "bab"}, tokenizer)
    assert prompt_of(row) == tokenizer("xa")["input_ids"]
    assert completion_of(row, tokenizer) == "bab<eos>"


def test_eos_is_appended_once_and_only_if_wanted():
    tokenizer = byte_tokenizer()
    example = {"prompt": "p", "completion": "c"}
    assert completion_of(tokenize_example({"prompt": "p", "completion": "c<eos>"}, tokenizer), tokenizer) == "c<eos>"
    assert completion_of(tokenize_example(example, tokenizer, append_eos=False), tokenizer) == "c"
    tokenizer.eos_token = None
    with pytest.raises(CalmError, match="no EOS token"):
        tokenize_example(example, tokenizer)


def test_chat_prompt_is_what_generation_sees_and_the_last_turn_is_the_completion():
    tokenizer = byte_tokenizer(chat=True)
    row = tokenize_example({"messages": CHAT}, tokenizer)
    generation = tokenizer.apply_chat_template(CHAT[:-1], add_generation_prompt=True, return_dict=True)
    assert prompt_of(row) == generation["input_ids"]
    assert completion_of(row, tokenizer) == "4<eos>"


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"messages": CHAT[:-1]}, "last message must be the assistant's.*'user'"),
        ({"messages": CHAT[4:]}, "no message before"),
        ({"messages": []}, "non-empty list"),
        ({"messages": [{"role": "user", "content": ["a"]}, CHAT[2]]}, "message 1 needs 'content'"),
        ({"messages": [CHAT[1], {"role": "assistant", "content": " "}]}, "completion .* is empty"),
        ({"prompt": "a"}, "no 'completion' .its fields: prompt."),
        ({"words": "a b"}, "no 'prompt' .its fields: words."),
        ({"text": ""}, "the text .. .str. is too short: it needs two tokens, of which the second is learned"),
        ({"text": None}, "no 'text' .its fields: text."),
        ({"text": "a b", "completion": "c"}, "no 'prompt' .its fields: completion, text."),
        ({"text": ["a b"]}, "'text' must be a string"),
        (
            {"text": "a b \ud83d c"},
            r"'text' is no valid Unicode text: .* half of a character \('.ud83d'\) at .* 4",
        ),
        ({"prompt": "a", "completion": "\udc00"}, "'completion' is no valid Unicode text"),
        ({"messages": [{"role": "user", "content": "\ud83d"}, CHAT[2]]}, "'content of message 1' is no valid Unicode"),
        ({"prompt": "a", "completion": ""}, "the completion is empty"),
        ({"prompt": "a", "completion": 5}, "'completion' must be a string, got 5 .int."),
        ({"prompt": [CHAT[1]], "completion": "a"}, "under 'messages'"),
    ],
)
def test_unusable_examples_are_refused(example: dict, message: str):
    with pytest.raises(CalmError, match=f"^here: .*{message}"):
        tokenize_example(example, byte_tokenizer(chat=True), where="here")


@pytest.mark.parametrize("append_eos", [True, False])
def test_a_completion_without_tokens_is_refused(append_eos: bool):
    """Its row would have no label, or EOS alone: some tokenizers drop characters that they do not know."""
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("\N{ZERO WIDTH SPACE}", "")
    with pytest.raises(CalmError, match=r"row 7: the tokenizer makes no tokens of the completion '\\u200b' \(str\)"):
        example = {"prompt": "a", "completion": "\N{ZERO WIDTH SPACE}"}
        tokenize_example(example, tokenizer, where="row 7", append_eos=append_eos)


def test_chat_needs_a_template_and_an_empty_prompt_a_bos_token():
    with pytest.raises(CalmError, match="no chat template"):
        tokenize_example({"messages": CHAT}, byte_tokenizer())
    empty = {"prompt": "", "completion": "c"}
    assert prompt_of(tokenize_example(empty, byte_tokenizer())) == [1]
    with pytest.raises(CalmError, match="the prompt is empty and the tokenizer adds no BOS"):
        tokenize_example(empty, byte_tokenizer(bos=False))


def test_chat_template_that_renders_the_last_turn_differently_is_refused():
    tokenizer = byte_tokenizer(chat=True)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|assistant|>", "<|assistant|>think:")
    with pytest.raises(CalmError, match="does not begin with its own prompt"):
        tokenize_example({"messages": CHAT}, tokenizer)
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(CalmError, match="refuses these messages: roles must alternate"):
        tokenize_example({"messages": CHAT}, tokenizer)


def test_all_of_a_text_but_its_first_token_is_learned_and_it_does_not_end():
    tokenizer = byte_tokenizer()
    ids = tokenizer("a b c")["input_ids"]
    for append_eos in (True, False):
        row = tokenize_example({"text": "a b c", "source": "ignored"}, tokenizer, append_eos=append_eos)
        assert row == {"input_ids": ids, "labels": [-100, *ids[1:]]}
    with_prompt = {"prompt": "a", "completion": " b", "text": "ignored where there is a prompt"}
    assert tokenize_example(with_prompt, tokenizer) == tokenize_example({"prompt": "a", "completion": " b"}, tokenizer)


def test_json_lines_json_lists_and_lists_in_memory_read_alike(tmp_path: Path):
    tokenizer, rows = byte_tokenizer(), sums(5)
    lines = write_jsonl(tmp_path / "a.jsonl", rows)
    lines.write_text("\ufeff" + lines.read_text().replace("\n", "\n\n", 1))  # a BOM and a blank line
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=1))
    read = [load_examples(source, tokenizer, max_length=64) for source in (lines, str(tmp_path / "a.json"), rows)]
    ids = [[row["input_ids"].tolist() for row in data] for data in read]
    assert len(ids[0]) == 5
    assert ids[0] == ids[1] == ids[2]


def test_dates_stay_text(tmp_path: Path):
    """`datasets` would read this column as timestamps."""
    tokenizer = byte_tokenizer()
    file = write_jsonl(tmp_path / "dates.jsonl", [{"prompt": "3 May 2020", "completion": "2020-05-03"}])
    assert completion_of(load_examples(file, tokenizer, max_length=64)[0], tokenizer) == "2020-05-03<eos>"


def test_datasets_names_are_read_by_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", sums(3))
    write_jsonl(folder / "test.jsonl", sums(2, seed=1))
    tokenizer = byte_tokenizer()
    assert len(load_examples(str(folder), tokenizer, max_length=64)) == 3
    assert len(load_examples(str(folder), tokenizer, max_length=64, split="test")) == 2
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load_examples(f"~/{folder.name}", tokenizer, max_length=64)) == 3
    with pytest.raises(CalmError, match="no such data file"):
        load_examples(f"{folder}-2", tokenizer, max_length=64)
    with pytest.raises(CalmError, match="split 'dev', could not be read"):
        load_examples(str(folder), tokenizer, max_length=64, split="dev")


def test_a_configuration_of_a_data_set(tmp_path: Path):
    """A folder whose card names two configurations, as on the hub."""
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", sums(3))
    write_jsonl(folder / "b.jsonl", sums(2))
    configs = "".join(f"- config_name: {name}\n  data_files: {name}.jsonl\n" for name in "ab")
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    tokenizer = byte_tokenizer()
    assert len(load_examples(str(folder), tokenizer, max_length=64, config="a")) == 3
    assert len(load_examples(str(folder), tokenizer, max_length=64, config="b")) == 2
    with pytest.raises(CalmError, match=r"(?s)could not be read.*'a', 'b'.*give its config"):
        load_examples(str(folder), tokenizer, max_length=64)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no such data file"),
        ("", "the file is empty"),
        (" \n", "the file is empty"),
        ("[]", "there are no examples"),
        ('{"prompt": "a", "completion": "b"}\n{"prompt": "a"\n', 'line 2 is not JSON: .*\'{"prompt": "a"\''),
        ('{"prompt": "a", "completion": "b"}\n["a"]\n', "line 2: expected an object with fields"),
        ('{"prompt": "a", "completion": "b"}\n\n{"prompt": "a"}\n', "line 3: no 'completion'"),
        ('[{"prompt": "a", "completion": "b"},\n oops]', "line 2 is not JSON"),
        (b"\xff\xfe{}", "not a UTF-8"),
    ],
)
def test_bad_files_are_refused_with_file_and_line(tmp_path: Path, content: str | bytes | None, message: str):
    file = tmp_path / "bad.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CalmError, match=f"bad.jsonl.*{message}"):
        load_examples(file, byte_tokenizer(), max_length=64)


def test_too_long_examples_are_dropped_whole_counted_and_reported(caplog: pytest.LogCaptureFixture):
    tokenizer = byte_tokenizer()
    rows = [
        {"prompt": "1+1=", "completion": "2"},
        {"prompt": "x" * 50, "completion": "2"},
        {"prompt": "1", "completion": "2" * 50},
    ]
    with caplog.at_level(logging.WARNING):
        data = load_examples(rows, tokenizer, max_length=20)
    assert len(data) == 1
    assert completion_of(data[0], tokenizer) == "2<eos>"
    assert "dropped 2 of 3 examples" in caplog.text
    with pytest.raises(
        CalmError, match=r"all 2 examples are longer than max_length = 20 tokens \(the longest has 53\)"
    ):
        load_examples(rows[1:], tokenizer, max_length=20)
    exact = len(data[0]["input_ids"])
    assert len(load_examples(rows[:1], tokenizer, max_length=exact)) == 1


def test_collator_pads_right_without_loss():
    tokenizer = byte_tokenizer()
    rows = load_examples(
        [{"prompt": "1", "completion": "2"}, {"prompt": "10+1=", "completion": "11"}], tokenizer, max_length=64
    )
    batch = CompletionCollator.for_tokenizer(tokenizer)(rows)
    short = len(rows[0]["input_ids"])
    assert {key: value.dtype for key, value in batch.items()} == dict.fromkeys(batch, torch.int64)
    assert batch["input_ids"].shape == batch["labels"].shape == (2, 9)
    assert batch["input_ids"][0, :short].tolist() == rows[0]["input_ids"].tolist()
    assert (batch["labels"][0, short:] == -100).all()
    assert (batch["input_ids"][0, short:] == tokenizer.pad_token_id).all()
    tokenizer.pad_token = None
    assert CompletionCollator.for_tokenizer(tokenizer).pad_token_id == tokenizer.eos_token_id


def test_loss_is_that_of_the_completion_only(tiny_bases: dict[str, str]):
    """The model's loss is the mean over the completion's tokens; with the prompt's tokens in it, it is another."""
    model = calm.compose(tiny_bases["anchor"], tiny_bases["augmenting"], connections=2)
    tokenizer = load_tokenizer(tiny_bases["anchor"])
    rows = load_examples(sums(4), tokenizer, max_length=64)
    batch = CompletionCollator.for_tokenizer(tokenizer)(rows)
    padding = batch["input_ids"] == tokenizer.pad_token_id
    with torch.no_grad():
        output = model(**batch)
        everything = model(**batch | {"labels": batch["input_ids"].masked_fill(padding, -100)})
    scores = output.logits.log_softmax(-1)
    by_hand = [
        -scores[i, t - 1, row["input_ids"][t]]
        for i, row in enumerate(rows)
        for t in range(len(prompt_of(row)), len(row["input_ids"]))
    ]
    torch.testing.assert_close(output.loss, torch.stack(by_hand).mean())
    assert abs(everything.loss - output.loss) > 1e-3, "the two would not be told apart"


def test_tokenizer_of_a_base_of_a_composition_and_of_nothing(tmp_path: Path, tiny_bases: dict[str, str]):
    vocabulary = load_tokenizer(tiny_bases["anchor"]).get_vocab()
    calm.compose(tiny_bases["anchor"], tiny_bases["augmenting"], connections=1).save_pretrained(tmp_path / "composed")
    assert load_tokenizer(tmp_path / "composed").get_vocab() == vocabulary, "the anchor's"
    own = byte_tokenizer(merges=[("a", "b")])
    own.save_pretrained(tmp_path / "composed")
    assert load_tokenizer(tmp_path / "composed").get_vocab() == own.get_vocab() != vocabulary
    with pytest.raises(CalmError, match="no tokenizer was found"):
        load_tokenizer(save_base(tmp_path / "bare", None, seed=0))
