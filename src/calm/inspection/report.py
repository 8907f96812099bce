"""The files of `calm inspect --prompt`: for each prompt a page and pictures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from calm.errors import CalmError
from calm.inspection.measure import inspect_prompt
from calm.inspection.page import summary, to_html
from calm.inspection.pictures import save_pictures
from calm.model import CalmForCausalLM


def check(prompts: Sequence[str], folder: Path) -> None:
    """Refuse what cannot work before a model is loaded, and make the folder.

    Raises:
        CalmError: If a prompt is empty, or if the folder cannot be written to.
    """
    if not all(prompts):
        raise CalmError("a prompt is empty; there is nothing to look at")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CalmError(f"{folder} cannot be written to ({error}); choose another folder with --output") from error
    if not os.access(folder, os.W_OK):
        raise CalmError(f"{folder} cannot be written to; choose another folder with --output")


def write(
    model: CalmForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    folder: Path,
) -> list[dict[str, Any]]:
    """Inspect prompts and write `prompt-NUMBER.html` and its pictures, in place of those that are there.

    Args:
        model: In evaluation mode.
        tokenizer: Its tokenizer.
        prompts: As they are.
        max_new_tokens: Most tokens to produce for each.
        folder: Where to; it exists.

    Returns:
        For each prompt, as plain JSON values: `prompt`, `completion`, `connections` (see `page.summary`; last comes
        the bare anchor), `page` and `pictures` (paths).

    Raises:
        CalmError: As `inspect_prompt`.
    """
    reports = []
    for number, prompt in enumerate(prompts, start=1):
        inspection = inspect_prompt(model, tokenizer, prompt, max_new_tokens)
        page = folder / f"prompt-{number}.html"
        page.write_text(to_html(inspection), encoding="utf-8")
        pictures = save_pictures(inspection, folder, page.stem)
        reports.append(
            {
                "prompt": prompt,
                "completion": inspection.completion,
                "connections": summary(inspection),
                "page": str(page),
                "pictures": [str(picture) for picture in pictures],
            }
        )
    return reports
