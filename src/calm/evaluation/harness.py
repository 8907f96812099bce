"""Runs lm-eval on a model."""

from __future__ import annotations

import platform
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import lm_eval
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks.manager import TaskDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from calm.errors import CalmError
from calm.evaluation import results
from calm.evaluation.adapter import CalmLM
from calm.evaluation.tasks import running_code

SEED = 1234
"""lm-eval's own seed of few-shot examples, so that these are those of published results."""


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: TaskDict,
    *,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    apply_chat_template: bool = False,
    allow_code_execution: bool = False,
    seed: int = SEED,
    settings: Mapping[str, Any] | None = None,
) -> results.Evaluation:
    """Evaluate a model on tasks.

    Args:
        model: A composition or another causal language model, on its device.
        tokenizer: Its tokenizer.
        tasks: From `load_tasks`.
        num_fewshot: Examples in the prompt, instead of the task's own number. Tasks that fix it at 0 keep 0, as
            everywhere in lm-eval.
        limit: Evaluate the first so many examples of each task only.
        batch_size: Sequences in a batch.
        apply_chat_template: Put prompts into the tokenizer's chat template.
        allow_code_execution: As for `load_tasks`.
        seed: Of few-shot examples and sampling.
        settings: More of them to put into the results, such as the model's name.

    Returns:
        The results, with 95% intervals.

    Raises:
        CalmError: If the model, the tokenizer and the tasks do not fit together.
    """
    lm = CalmLM(model, tokenizer, batch_size)
    if apply_chat_template and tokenizer.chat_template is None:
        raise CalmError(f"The tokenizer {tokenizer.name_or_path!r} has no chat template to apply: leave that out.")
    if not allow_code_execution and (unsafe := running_code(tasks)):
        raise CalmError(
            f"{', '.join(unsafe)} runs code that the model writes: pass allow_code_execution=True here, too."
        )
    set_seed(seed)
    own_fewshot = {name: task.get_config("num_fewshot") for name, task in tasks["tasks"].items()}
    started = time.monotonic()
    try:
        for name, task in tasks["tasks"].items():
            if own_fewshot[name] is None or (num_fewshot is not None and own_fewshot[name] != 0):
                task.set_config(key="num_fewshot", value=num_fewshot or 0)
            task.set_fewshot_seed(seed=seed)
            _check_fewshot(name, task)
            if task.OUTPUT_TYPE == "generate_until":
                new = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, lm.max_gen_toks)["max_gen_toks"]
                if new >= lm.max_length:
                    raise CalmError(
                        f"The task {name!r} generates up to {new} tokens, and the model's context is {lm.max_length}: "
                        "no room is left for a prompt. Set a smaller max_gen_toks in the task's generation_kwargs."
                    )
        found = lm_eval.evaluate(
            lm,
            tasks,
            limit=limit,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=apply_chat_template,
            confirm_run_unsafe_code=allow_code_execution,
        )
    finally:
        for name, number in own_fewshot.items():  # tasks serve for several models
            tasks["tasks"][name].set_config(key="num_fewshot", value=number)
    return results.Evaluation(
        tasks=results.read(found, tasks["tasks"]),
        groups=results.read(found, tasks.get("groups", {}), "groups"),
        settings={
            **(settings or {}),
            "model_type": model.config.model_type,
            "num_fewshot": num_fewshot,
            "limit": limit,
            "batch_size": batch_size,
            "apply_chat_template": apply_chat_template,
            "seed": seed,
            "max_length": lm.max_length,
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": str(model.device),
            "generation_config": model.generation_config.to_diff_dict(),
        },
        versions={
            "python": platform.python_version(),
            **{name: version(name) for name in ("calm-lm", "lm-eval", "torch", "transformers")},
        },
        seconds=round(time.monotonic() - started, 1),
    )


def _check_fewshot(name: str, task: Any) -> None:
    """Refuse more examples in the prompt than a task has to draw from."""
    wanted = task.get_config("num_fewshot")
    if not wanted or not isinstance(task, ConfigurableTask):
        return
    its_own = task.fewshot_cfg.split == task.config.test_split  # the example that is asked for is left out
    if isinstance(task.sampler, FirstNSampler) and task.fewshot_cfg.split is None:  # only if it is there
        its_own = False
    available = len(task.sampler.fewshot_docs()) - its_own
    if wanted > available:
        raise CalmError(
            f"num_fewshot = {wanted}: the task {name!r} has {available} examples to put into a prompt"
            f"{', beside the one that is asked' if its_own else ''}. Ask for no more."
        )
