"""Finds and loads lm-eval's tasks: the standard ones by name, and those of a folder whose data are local files."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.manager import TaskDict

from calm.errors import CalmError
from calm.evaluation.code import check_limits, limited_code_eval

SHIPPED = Path(__file__).parent / "task_files"
"""Tasks that come with calm: `humaneval_offline` and `humaneval_instruct_offline`, `flores_cy` and its like."""

_LOADING = logging.getLogger("lm_eval.api.task")


def load_tasks(
    names: Sequence[str], include_path: str | Path | None = None, *, allow_code_execution: bool = False
) -> TaskDict:
    """Load tasks with their data.

    Args:
        names: Tasks, groups or tags of lm-eval, those in `SHIPPED` (with the groups `mgsm` and `flores`), or tasks of
            `include_path`; with * and ? for several.
        include_path: A folder of lm-eval task files (`*.yaml`). Relative `data_files` in them are looked for from the
            file's own folder.
        allow_code_execution: Load tasks that run what a model generates. The usual ones (HumanEval, MBPP) run it in
            processes of their own, with limits of time and memory; the hub's metric for it is neither downloaded nor
            run. A task that brings an executor of its own runs that one, in this process if it likes.

    Returns:
        lm-eval's tasks and groups, for `evaluate`; may be used for several models.

    Raises:
        CalmError: On unknown names, a folder without valid task files, data that are not there or not reachable, or
            tasks that run code without permission.
    """
    if not names:
        raise CalmError("No tasks are given: name at least one, for example gsm8k.")
    folders = [SHIPPED, *([_checked(Path(include_path))] if include_path is not None else [])]
    # the tasks that come with lm-eval are many files, which take seconds to read
    manager = TaskManager(include_path=folders, include_defaults=False)
    if any("*" in name or "?" in name for name in names) or not all(_has(manager, name) for name in names):
        manager = TaskManager(include_path=folders)
    for folder in folders:
        _find_data_files(manager, folder)
    matches = [match for name in names for match in _match(manager, name)]
    loaded: TaskDict = {"tasks": {}, "groups": {}, "group_map": {}}
    with limited_code_eval():
        for name in dict.fromkeys(matches):
            for kind, found in _load(manager, name).items():
                loaded[kind].update(found)
    if unsafe := running_code(loaded):
        if not allow_code_execution:
            raise CalmError(
                f"{', '.join(unsafe)}: running this runs code that the model writes, on this machine. Allow it with "
                "--allow-code-execution (allow_code_execution=True), in a container if you do not trust the model."
            )
        check_limits()
    return loaded


def running_code(tasks: TaskDict) -> list[str]:
    """Names of the tasks of which lm-eval says that they run what a model writes."""
    return [name for name, task in tasks["tasks"].items() if getattr(task, "UNSAFE_CODE", False)]


def _checked(folder: Path) -> Path:
    """The folder, resolved, with every task file in it readable: lm-eval would pass silently over the others."""
    folder = folder.expanduser().resolve()
    files = sorted(folder.glob("**/*.yaml"))
    if not files:
        raise CalmError(f"include_path={str(folder)!r}: expected a folder with lm-eval task files (*.yaml) in it")
    for file in files:
        try:
            load_yaml(file, resolve_func=False)
        except Exception as error:  # whatever may be wrong with a file of somebody else's
            raise CalmError(f"{file} is not a task file of lm-eval: {error}") from error
    return folder


def _has(manager: TaskManager, name: str) -> bool:
    """Whether there are tasks of this name, and everything that they name is there, too."""
    if name in manager.all_groups:
        members = (manager.task_index[name].cfg or {}).get("task", [])
        return all(_has(manager, member) for member in _named(members))
    return bool(manager.match_tasks([name]))


def _named(members: Any) -> list[str]:
    """Names of a group's members: tasks, groups, or groups written out within it."""
    if isinstance(members, str):
        return [members]
    if isinstance(members, dict):
        return _named(members.get("task") or members["group"])
    return [name for member in members for name in _named(member)]


def _match(manager: TaskManager, name: str) -> list[str]:
    if found := manager.match_tasks([name]):
        return found
    near = [task for task in manager.all_tasks if name.lower() in task.lower()]
    near = (get_close_matches(name, manager.all_tasks, n=5) + sorted(near, key=len))[:5]
    raise CalmError(
        f"There is no task {name!r}"
        + (f"; near it are {', '.join(dict.fromkeys(near))}" if near else "")
        + ". `lm-eval ls tasks` lists all standard ones; --include-path adds a folder of your own."
    )


def _find_data_files(manager: TaskManager, folder: Path) -> None:
    """Make relative `data_files` absolute (datasets would look for them in the current folder)."""
    index = manager.task_index
    for name, entry in index.items():
        files = ((entry.cfg or {}).get("dataset_kwargs") or {}).get("data_files")
        if files is None or entry.yaml_path is None or not entry.yaml_path.is_relative_to(folder):
            continue
        config = load_yaml(entry.yaml_path)
        config["dataset_kwargs"]["data_files"] = _absolute(files, entry.yaml_path.parent)
        index[name] = replace(entry, yaml_path=None, cfg=config)


def _absolute(files: Any, folder: Path) -> Any:
    if isinstance(files, dict):
        return {split: _absolute(names, folder) for split, names in files.items()}
    if isinstance(files, list):
        return [_absolute(name, folder) for name in files]
    return files if "://" in files else str(folder / files)


def _load(manager: TaskManager, name: str) -> TaskDict:
    _LOADING.addFilter(_concerns_us)
    try:
        return manager.load([name])
    except OSError as error:
        raise CalmError(
            f"The data of the task {name!r} cannot be loaded: {error}. Without a connection to the hub, use tasks "
            "whose data are local files: humaneval_offline, or your own with --include-path."
        ) from error
    except Exception as error:  # a task is YAML and Python of somebody else's
        raise CalmError(f"The task {name!r} cannot be loaded: {type(error).__name__}: {error}") from error
    finally:
        _LOADING.removeFilter(_concerns_us)


def _concerns_us(record: logging.LogRecord) -> bool:
    """Not so the word about an option of lm-eval's own command line, of each task whose data a function makes."""
    return "Custom kwargs can be passed to `--metadata`" not in record.getMessage()
