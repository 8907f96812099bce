"""Training data: reads prompt/completion, chat and text examples, tokenizes them with the loss on completions, pads.

An example is `{"prompt": str, "completion": str}`, `{"messages": [{"role": str, "content": str}, ...]}` or
`{"text": str}` (the formats of TRL). In a chat the last message, the assistant's, is the completion and everything
before it the prompt. The prompt's tokens are exactly those that generation would see. A text is a piece of what the
anchor is to keep: all of it but its first token is learned, and it does not end.
"""

from __future__ import annotations

import bisect
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from calm.errors import CalmError, CheckpointError

if TYPE_CHECKING:  # checking a recipe or a data file needs neither torch nor transformers
    import torch
    from transformers import PreTrainedTokenizerBase

    from calm.sources import Source as BaseSource

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of positions without loss, as in transformers."""

Row = dict[str, Any]
"""A tokenized example: the arrays `input_ids` and `labels`."""

Source = str | Path | Iterable[Mapping[str, Any]]
"""A JSON or JSONL file, the name of a `datasets` data set, or the examples themselves."""


def load_examples(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    config: str | None = None,
    split: str = "train",
    append_eos: bool = True,
) -> list[Row]:
    """Read and tokenize a data set, every example checked.

    Examples longer than `max_length` are dropped, never cut: a cut prompt is not what generation sees, and a cut
    completion teaches to stop early. How many were dropped is reported as a warning.

    Args:
        source: a `.json`/`.jsonl` file, the name of a `datasets` data set, or the examples themselves.
        tokenizer: the tokenizer that the composed model's bases share.
        max_length: tokens that an example may have, prompt and completion together.
        config: the configuration of a `datasets` data set, where it has several.
        split: the split to read; only used for a `datasets` name.
        append_eos: end the completions of prompt/completion examples with the tokenizer's EOS token. Chat examples
            always end as the chat template ends them, texts never.

    Returns:
        One row an example: `input_ids` and `labels`, int32 arrays of one length; labels are -100 on the prompt (of
        a text, on its first token).

    Raises:
        CalmError: the file is missing, empty or not JSON; an example has no usable prompt or completion, or is a text
            of a single token; chat examples with a tokenizer without chat template; no example is left within
            `max_length`.
    """
    rows: list[Row] = []
    dropped = longest = 0
    name = "the examples"
    for where, example in read_rows(source, split, config):
        row = tokenize_example(example, tokenizer, where=where, append_eos=append_eos)
        longest = max(longest, len(row["input_ids"]))
        if len(row["input_ids"]) > max_length:
            dropped += 1
        else:
            rows.append({key: np.asarray(ids, dtype=np.int32) for key, ids in row.items()})
    if isinstance(source, str | Path):
        name = str(source)
    if not rows and not dropped:
        raise CalmError(f"{name}: there are no examples in it")
    if not rows:
        raise CalmError(
            f"{name}: all {dropped} examples are longer than max_length = {max_length} tokens (the longest has "
            f"{longest}), so nothing is left to train on; raise max_length or shorten the examples"
        )
    if dropped:
        logger.warning(
            "%s: dropped %d of %d examples, longer than max_length = %d tokens (the longest has %d)",
            *(name, dropped, dropped + len(rows), max_length, longest),
        )
    return rows


def load_tokenizer(
    name: str | os.PathLike[str], anchor: str | os.PathLike[str] | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base (hub name, folder or GGUF file) or of a saved composition.

    A composition that was saved without a tokenizer has its anchor's.

    Args:
        name: The base or composition.
        anchor: Where a composition's anchor is now, instead of its recorded reference.

    Raises:
        CalmError: If there is none.
    """
    from calm import sources

    looked = []
    for source in _tokenizer_places(name, anchor):
        looked.append(repr(source.name_or_path))
        if (tokenizer := sources.load_tokenizer(source)) is not None:
            return tokenizer
    raise CalmError(
        f"no tokenizer was found in {' or '.join(looked)}; save one there (tokenizer.save_pretrained), or if this is a "
        "composition whose anchor has moved, say where it is (anchor=, --anchor)"
    )


def _tokenizer_places(name: str | os.PathLike[str], anchor: str | os.PathLike[str] | None) -> Iterator[BaseSource]:
    from calm.checkpoint import read_config
    from calm.sources import Source as BaseSource

    yield BaseSource.parse(name)
    if anchor is not None:
        yield BaseSource.parse(anchor)
        return
    with suppress(CheckpointError):
        reference = read_config(name).anchor_reference
        if reference.get("name_or_path"):
            yield BaseSource(reference["name_or_path"], reference.get("gguf_file"), reference.get("revision"))


def is_file_source(source: str | Path) -> bool:
    """Whether a data source means a file (it exists as one or is named `*.json`/`*.jsonl`), not a hub name."""
    path = Path(source).expanduser()
    return path.is_file() or path.suffix.lower() in {".json", ".jsonl"}


def read_rows(
    source: Source, split: str = "train", config: str | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each raw example with where it stands ("train.jsonl, line 3"), for error messages.

    JSON files are read line by line here, because `datasets` infers types: it turns a column of completions such as
    "2020-05-03" into timestamps, and its errors name no line.

    Raises:
        CalmError: file not found, a line is not JSON, an example is not an object, unknown data set or split.
    """
    if not isinstance(source, str | Path):
        for number, row in enumerate(source, start=1):
            yield _checked_object(row, f"example {number}")
        return
    name = os.path.expanduser(source)
    if is_file_source(name) or (str(name).startswith((".", "/")) and not Path(name).exists()):
        yield from _read_json(Path(name))
    else:
        try:
            import datasets

            loaded = datasets.load_dataset(str(name), config, split=split)
        except Exception as error:  # many: not installed or found, unknown split, needs a config name
            raise CalmError(
                f"the data set {str(source)!r}, split {split!r}, could not be read: {error} "
                "(a file must end in .jsonl or .json; anything else is taken for the name of a data set; one with "
                "several configurations wants you to give its config)"
            ) from error
        for number, row in enumerate(loaded, start=1):
            yield f"{source} ({split}), example {number}", row


def _read_json(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield the examples of a JSONL file, or of a JSON file that holds one list."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise CalmError(f"{path}: there is no such data file") from error
    except UnicodeDecodeError as error:
        raise CalmError(f"{path}: not a UTF-8 text file ({error}); convert it to UTF-8") from error
    except OSError as error:
        raise CalmError(f"{path}: cannot be read: {error.strerror}") from error
    if not text.strip():
        raise CalmError(f"{path}: the file is empty")
    if text.lstrip().startswith("["):
        try:
            rows = json.loads(text)
        except json.JSONDecodeError as error:
            raise CalmError(f"{path}, line {error.lineno} is not JSON: {error.msg} (column {error.colno})") from error
        for number, row in enumerate(rows, start=1):
            yield _checked_object(row, f"{path}, example {number}")
        return
    # Split at "\n" only: splitlines() would also split at U+2028, which may stand unescaped inside a JSON string.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            shown = line if len(line) <= 60 else line[:57] + "..."
            raise CalmError(
                f"{path}, line {number} is not JSON: {error.msg} (column {error.colno}): {shown!r}; "
                "a .jsonl file has one complete JSON object on each line"
            ) from error
        yield _checked_object(row, f"{path}, line {number}")


def _checked_object(row: Any, where: str) -> tuple[str, Mapping[str, Any]]:
    if not isinstance(row, Mapping):
        raise CalmError(f"{where}: expected an object with fields, got {_shown(row)}")
    return where, row


def tokenize_example(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str = "example",
    append_eos: bool = True,
) -> dict[str, list[int]]:
    """Tokenize one example, with the loss on the completion only.

    Args:
        example: `{"prompt", "completion"}`, `{"messages"}` or, where there is none of these, `{"text"}`; other fields
            are ignored.
        tokenizer: the tokenizer of the composed model.
        where: how error messages call the example.
        append_eos: end a prompt/completion example's completion with EOS.

    Returns:
        `{"input_ids": [...], "labels": [...]}` of equal length; labels are -100 on the prompt, or a text's first token.

    Raises:
        CalmError: a field is missing, of the wrong type or empty; no chat template; no EOS token to append; a text of
            a single token.
    """
    if "text" in example and all(example.get(field) is None for field in ("messages", "prompt", "completion")):
        ids = list(tokenizer(_text_field(example, "text", where))["input_ids"])
        if len(ids) < 2:
            raise CalmError(
                f"{where}: the text {_shown(example['text'])} is too short: it needs two tokens, of which the second "
                "is learned"
            )
        return {"input_ids": ids, "labels": [IGNORED, *ids[1:]]}
    if example.get("messages") is not None:
        prompt, completion = _render_chat(example["messages"], tokenizer, where)
        # A chat template writes its own special tokens into the text.
        prompt_ids, completion_ids = _tokenize_pair(prompt, completion, tokenizer, special_tokens=False)
    else:
        prompt, completion = (_text_field(example, field, where) for field in ("prompt", "completion"))
        if not completion.strip():
            raise CalmError(f"{where}: the completion is empty; there is nothing to learn from it")
        prompt_ids, completion_ids = _tokenize_pair(prompt, completion, tokenizer, special_tokens=True)
        if append_eos and completion_ids:
            if tokenizer.eos_token_id is None:
                raise CalmError(
                    f"the tokenizer {tokenizer.name_or_path!r} has no EOS token to end completions with: the model "
                    "would not learn where to stop; set one, or set append_eos to false"
                )
            if completion_ids[-1:] != [tokenizer.eos_token_id]:
                completion_ids = [*completion_ids, tokenizer.eos_token_id]
    if not prompt_ids:
        raise CalmError(
            f"{where}: the prompt is empty and the tokenizer adds no BOS token, so nothing comes before the "
            "completion's first token to predict it from; write a prompt"
        )
    if not completion_ids:
        raise CalmError(
            f"{where}: the tokenizer makes no tokens of the completion {_shown(completion)}, so there is nothing to "
            "learn from it"
        )
    return {
        "input_ids": [*prompt_ids, *completion_ids],
        "labels": [*[IGNORED] * len(prompt_ids), *completion_ids],
    }


def _text_field(example: Mapping[str, Any], field: str, where: str) -> str:
    value = example.get(field)
    if value is None:
        fields = ", ".join(sorted(map(str, example))) or "none"
        raise CalmError(
            f"{where}: no {field!r} (its fields: {fields}); an example is "
            '{"prompt": "...", "completion": "..."}, {"messages": [{"role": "user", "content": "..."}, ...]} or '
            '{"text": "..."}'
        )
    if not isinstance(value, str):
        hint = "; a conversation goes under 'messages'" if isinstance(value, list) else ""
        raise CalmError(f"{where}: {field!r} must be a string, got {_shown(value)}{hint}")
    return _unicode(value, field, where)


def _unicode(text: str, field: str, where: str) -> str:
    """A text that tokenizers take; JSON can hold half of a character beyond U+FFFF, where a text was cut."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalmError(
            f"{where}: {field!r} is no valid Unicode text: it holds half of a character ({text[error.start]!a}) at "
            f"position {error.start}; write the whole character or leave it out"
        ) from error
    return text


def _tokenize_pair(
    prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase, *, special_tokens: bool
) -> tuple[list[int], list[int]]:
    """Tokenize a prompt as generation does, and the completion as it follows that prompt.

    The two are tokenized together, because many tokenizers write a word differently at the start of a text. Where
    that would merge characters across the boundary and so change the prompt's tokens, the completion stands alone.
    """
    prompt_ids = list(tokenizer(prompt, add_special_tokens=special_tokens)["input_ids"])
    both = list(tokenizer(prompt + completion, add_special_tokens=special_tokens)["input_ids"])
    if both[: len(prompt_ids)] == prompt_ids and len(both) > len(prompt_ids):
        return prompt_ids, both[len(prompt_ids) :]
    return prompt_ids, list(tokenizer(completion, add_special_tokens=False)["input_ids"])


def _render_chat(messages: Any, tokenizer: PreTrainedTokenizerBase, where: str) -> tuple[str, str]:
    """Render a chat with the tokenizer's template, as the text of the prompt and that of the completion."""
    if tokenizer.chat_template is None:
        raise CalmError(
            f"{where}: the example is a chat, but the tokenizer {tokenizer.name_or_path!r} has no chat template; "
            "write it as 'prompt' and 'completion', or use models whose tokenizer has a chat template"
        )
    if not isinstance(messages, list) or not messages:
        raise CalmError(f"{where}: 'messages' must be a non-empty list, got {_shown(messages)}")
    for number, message in enumerate(messages, start=1):
        for field in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(field), str):
                raise CalmError(
                    f"{where}: message {number} needs {field!r}, a string "
                    f'({{"role": "user", "content": "..."}}), got {_shown(message)}'
                )
            _unicode(message[field], f"{field} of message {number}", where)
    if messages[-1]["role"] != "assistant":
        raise CalmError(
            f"{where}: the last message must be the assistant's, since it is the completion; its role is "
            f"{messages[-1]['role']!r}"
        )
    if not messages[-1]["content"].strip():
        raise CalmError(f"{where}: the completion (the last message) is empty; there is nothing to learn from it")
    if len(messages) == 1:
        raise CalmError(f"{where}: there is no message before the assistant's, so there is no prompt")
    import jinja2

    try:
        prompt = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=False)
        conversation = tokenizer.apply_chat_template(messages, tokenize=False)
    except jinja2.TemplateError as error:
        raise CalmError(f"{where}: the tokenizer's chat template refuses these messages: {error}") from error
    if not conversation.startswith(prompt):
        raise CalmError(
            f"{where}: with this tokenizer's chat template a conversation does not begin with its own prompt (it "
            "renders the last turn differently), so the completion cannot be told apart; write the examples as "
            "'prompt' and 'completion'"
        )
    return prompt, conversation[len(prompt) :]


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '...'} ({type(value).__name__})"


def pack(rows: list[Row], length: int) -> list[Row]:
    """Lay tokenized examples one after another into rows of at most `length` tokens (best fit, longest first).

    Positions restart with each example, which is how the composed model knows that it is a document of its own. Its
    first token has no label, so nothing is learned across a border.

    Args:
        rows: From `load_examples`, none longer than `length`.
        length: Tokens of a packed row.

    Returns:
        Rows with `input_ids`, `labels` and `position_ids`; every example is in exactly one.
    """
    packs: list[list[Row]] = []
    spaces: list[tuple[int, int]] = []  # (tokens that still fit, index of the pack), sorted
    for row in sorted(rows, key=lambda row: -len(row["input_ids"])):
        size = len(row["input_ids"])
        at = bisect.bisect_left(spaces, (size, 0))
        if at == len(spaces):
            packs.append([])
            space, index = length, len(packs) - 1
        else:
            space, index = spaces.pop(at)
        packs[index].append(row)
        bisect.insort(spaces, (space - size, index))
    return [
        {
            "input_ids": np.concatenate([row["input_ids"] for row in packed]),
            "labels": np.concatenate([row["labels"] for row in packed]),
            "position_ids": np.concatenate([np.arange(len(row["input_ids"]), dtype=np.int32) for row in packed]),
        }
        for packed in packs
    ]


@dataclass(frozen=True)
class CompletionCollator:
    """Pad tokenized examples on the right into one batch.

    There is no mask: in causal order nothing sees the padding that follows it, and without a mask every model may use
    its quickest attention. In packed rows positions say where a document ends; what fills them up is one more.

    Args:
        pad_token_id: what to fill `input_ids` with; any valid id will do, since it is masked and has no label.
    """

    pad_token_id: int

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> CompletionCollator:
        """A collator that pads with the tokenizer's padding token, else its EOS token, else token 0."""
        candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        return cls(next(token for token in candidates if token is not None))

    def __call__(self, rows: list[Row]) -> dict[str, Any]:
        """Collate rows of `load_examples`.

        Args:
            rows: each with `input_ids` and `labels`, `position_ids` if it is packed, and `augmenting_outputs` if they
                were kept: tensors `[length, D_A]` by name.

        Returns:
            `input_ids` and `labels` (and `position_ids` of packed rows), int64 tensors of shape [batch, longest row];
            `augmenting_outputs` likewise, by name.
        """
        import torch
        from torch.nn.utils.rnn import pad_sequence

        def padded(arrays: list[np.ndarray], fill: int) -> torch.Tensor:
            return pad_sequence([torch.from_numpy(a).long() for a in arrays], batch_first=True, padding_value=fill)

        batch: dict[str, Any] = {
            "input_ids": padded([row["input_ids"] for row in rows], self.pad_token_id),
            "labels": padded([row["labels"] for row in rows], IGNORED),
        }
        if (kept := rows[0].get("augmenting_outputs")) is not None:
            batch["augmenting_outputs"] = {
                key: pad_sequence([row["augmenting_outputs"][key] for row in rows], batch_first=True) for key in kept
            }
        if "position_ids" not in rows[0]:
            return batch
        longest = batch["input_ids"].shape[1]
        positions = [row["position_ids"] for row in rows]
        filled = [np.concatenate([p, np.arange(longest - len(p), dtype=np.int32)]) for p in positions]
        batch["position_ids"] = padded(filled, 0)
        return batch
