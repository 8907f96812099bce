"""Evaluation: EleutherAI's lm-eval on a composed model, on its parts, or on any causal language model (issue 4)."""

from __future__ import annotations

from calm.errors import CalmError

try:
    import lm_eval as _  # noqa: F401
except ImportError as error:
    raise CalmError("Evaluation needs lm-eval, which is not installed: pip install 'calm-lm[eval]'") from error

from calm.evaluation.harness import evaluate
from calm.evaluation.results import Evaluation, Metric, TaskResult
from calm.evaluation.tasks import load_tasks

__all__ = ["Evaluation", "Metric", "TaskResult", "evaluate", "load_tasks"]
