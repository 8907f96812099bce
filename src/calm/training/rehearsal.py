"""What a model writes by itself, for trainings to keep it as it is: its own text is what it would go on writing."""

from __future__ import annotations

import torch
from tqdm.auto import tqdm
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from calm.errors import CalmError
from calm.generation import without_defaults

TOKENS = 40
"""Length of a text at most, about that of a short example with its answer."""
_ROUNDS = 10


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    number: int,
    batch: int,
    seed: int,
    max_new_tokens: int = TOKENS,
) -> list[str]:
    """Draw texts from a model's own distribution (self-synthesized rehearsal, arXiv 2403.01244; here from nothing).

    Trained beside `D_C`, they say where there is nothing to change, without any text of the anchor's training, and
    without making it better at the texts that preservation is measured on, as prose of the same kind would.

    Args:
        model: the anchor.
        tokenizer: its tokenizer; texts begin after its BOS token, or its EOS token if it has no other.
        number: of texts.
        batch: texts at a time.
        seed: of the draws, together with `batch`.
        max_new_tokens: of a text, which is cut there if it has not ended.

    Returns:
        So many texts, of two words or more (in letters beyond ASCII, which may go without spaces, of one).

    Raises:
        CalmError: If the tokenizer has no token to begin with, or if the model writes next to nothing.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if start is None:
        raise CalmError(
            "the anchor's tokenizer has neither a BOS nor an EOS token, which its own texts would begin with"
        )
    config = GenerationConfig(
        do_sample=True,
        top_k=0,
        max_new_tokens=max_new_tokens,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=start if tokenizer.eos_token_id is None else tokenizer.eos_token_id,
    )
    set_seed(seed)
    texts: list[str] = []
    with without_defaults(model), tqdm(total=number, desc="the anchor's own texts", unit="text") as progress:
        for _ in range(_ROUNDS * -(-number // batch)):
            if len(texts) >= number:
                break
            begun = torch.full((batch, 1), start, device=model.device)
            written = model.generate(begun, attention_mask=torch.ones_like(begun), generation_config=config)
            decoded = tokenizer.batch_decode(written[:, 1:], skip_special_tokens=True)
            texts += [text for text in decoded if _is_text(text, tokenizer)]
            progress.update(min(number, len(texts)) - progress.n)
    if len(texts) < number:
        raise CalmError(
            f"the anchor wrote {len(texts)} texts of two words or more where {number} were asked for: it ends its "
            "texts at once; go without (in the experiments: rehearsal = 0), or take another anchor"
        )
    return texts[:number]


def _is_text(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether there is something to learn: all of a text but its first token is."""
    words = len(text.split()) > 1 or not text.isascii()
    return words and len(tokenizer(text, add_special_tokens=False)["input_ids"]) > 1
