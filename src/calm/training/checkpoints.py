"""Checkpoints of a training that are whole or not there: what a killed run leaves is never half of one."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from calm.errors import CalmError


class WholeCheckpointsTrainer(Trainer):
    """The transformers Trainer, with checkpoints that are written aside and renamed.

    Attributes:
        go_on: how to resume, for the error that says that no checkpoint could be written.
    """

    go_on = "go on with --resume"
    _staging: str | None = None

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Train on, unless the resumed checkpoint is the end already: the Trainer would go one step beyond."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _get_output_dir(self, trial: Any) -> str:
        return self._staging or super()._get_output_dir(trial)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save what `save_pretrained` saves (of a composition no base), and no pickled arguments beside it."""
        model = self.accelerator.unwrap_model(self.model)
        model.save_pretrained(output_dir or self.args.output_dir, is_main_process=self.args.should_save)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write a checkpoint beside its place and rename it, so that there are only whole ones.

        A run that is killed, or whose disk fills, while it saves leaves a directory whose name no resume looks for.
        """
        run_dir = Path(self.args.output_dir)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        staging = run_dir / f".saving-{name}"
        try:
            self._staging = str(staging)
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            best = run_dir / f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
            self.state.best_model_checkpoint = str(best) if best.name == name or best.is_dir() else None
            if self.args.should_save:
                self.state.save_to_json(str(staging / name / TRAINER_STATE_NAME))
                _flush(staging / name)
                os.replace(staging / name, run_dir / name)
        except Exception as error:  # a full disk is an OSError, RuntimeError or SafetensorError: it depends on the file
            last = get_last_checkpoint(run_dir)
            kept = f"{Path(last).name} is whole and stays" if last else "there is no earlier one"
            raise CalmError(
                f"the checkpoint of step {self.state.global_step} could not be written to {run_dir}: {error}; {kept}; "
                f"make room (or fix the cause) and {self.go_on}"
            ) from error
        finally:
            self._staging = None
            if self.args.should_save:
                shutil.rmtree(staging, ignore_errors=True)
        if self.args.should_save:
            self._delete_old_checkpoints(run_dir)
        self.accelerator.wait_for_everyone()  # until the checkpoint is where all look for it

    def _delete_old_checkpoints(self, run_dir: Path) -> None:
        """Keep the last `save_total_limit` checkpoints, the best one among them.

        Each is renamed first: a run that is killed while it deletes leaves no half of one.
        """
        checkpoints = [Path(path) for path in sort_checkpoints(str(run_dir))]
        kept = {checkpoints[-1], Path(self.state.best_model_checkpoint or checkpoints[-1])}
        excess = len(checkpoints) - max(self.args.save_total_limit, len(kept))
        for old in [path for path in checkpoints if path not in kept][: max(excess, 0)]:
            condemned = run_dir / f".deleting-{old.name}"
            os.replace(old, condemned)
            shutil.rmtree(condemned, ignore_errors=True)


def _flush(directory: Path) -> None:
    """Write files through to the disk: some file systems say only then that they are full."""
    for file in directory.rglob("*"):
        if file.is_file():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
