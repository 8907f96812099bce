"""Compositions to put on a page: small, with words that a browser must not take for more than text; and a port."""

from __future__ import annotations

import socket

from factories import EOS, PAD, VOCAB, Mix
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from calm.playground.answers import Company

HOSTILE = (
    "<script>window.caught=1</script>",
    '<img/src="x"/onerror="window.caught=2">',
    "${window.caught=3}",
    "{{value}}",
    "@children",
    '"><b>bold</b>',
    "</p></section>",
    "&lt;i&gt;",
    "[link](javascript:window.caught=4)",
    "](https://example.invalid/x.png)",
)


def hostile_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, most of which are markup of some kind."""
    words = {f"{HOSTILE[i % len(HOSTILE)]}{i}" if i % 3 else f"w{i}": i for i in range(2, VOCAB)}
    tokenizer = Tokenizer(models.WordLevel({"<pad>": PAD, "<eos>": EOS} | words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", clean_up_tokenization_spaces=False
    )


def company(mix: Mix, tokenizer: PreTrainedTokenizerFast | None = None) -> Company:
    return Company(mix.build(), mix.augmenting_models(), tokenizer or hostile_tokenizer())


def words(*ids: int) -> str:
    """A prompt of these tokens."""
    return " ".join(hostile_tokenizer().convert_ids_to_tokens(list(ids)))


EVERYTHING = words(10, 11, 2, 13, 4, 5, 16, 7, 8, 19)
"""A prompt of all that is hostile."""


def free_port() -> int:
    """A port of this machine that no one listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
