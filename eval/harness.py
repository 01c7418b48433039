"""Any task of lm-eval on a checkpoint's effective dense weights, scored by lm-eval itself.

Data comes from the hub, or with --from TASK=PLACE from local files: a .jsonl file whose rows have the fields of the
task's data set, a folder with such a file per split (test.jsonl, validation.jsonl, train.jsonl), or for mmlu a
folder with dev/SUBJECT_dev.csv and test/SUBJECT_test.csv as the authors publish them.
"""

from __future__ import annotations

import logging
import math
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import PlanError, TextError
from edgepress.checkpoints.quiet import quiet_import
from edgepress.eval.harness_data import jsonl_splits, mmlu_subjects
from edgepress.eval.results import Result, Score, mean, proportion
from edgepress.eval.settings import Settings
from edgepress.eval.subject import Subject

with quiet_import():
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from edgepress.eval.harness_model import KeptModel

# It would ask git for the commit it runs from, which prints an error outside of a repository.
evaluator.get_git_commit_hash = lambda: None

# lm-eval's metrics whose items are (log-likelihood, words or bytes) pairs; the last is divided by ln 2.
_ROLLING = {"word_perplexity": 1.0, "byte_perplexity": 1.0, "bits_per_byte": math.log(2)}
_SHOTS = {"mmlu": 5}  # where the field's number of examples is not what lm-eval does unasked


def run(name: str, subject: Subject, settings: Settings) -> Result:
    began = time.perf_counter()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    shots = settings.shots if settings.shots >= 0 else _SHOTS.get(name.split("_")[0])
    if settings.chat and not subject.tokenizer.chat_template:
        raise PlanError(f"--chat: the tokenizer of {subject.checkpoint.folder} has no chat template; leave --chat out")
    manager = _manager(name)
    tasks, origin = _load(name, settings, shots, manager)
    with KeptModel(subject, settings, name) as model:
        found: Any = evaluator.simple_evaluate(
            model=model,
            tasks=tasks,
            task_manager=manager,
            num_fewshot=shots,
            limit=settings.limit or None,
            bootstrap_iters=0,  # its own standard errors need a pool of processes; ours come from the items
            apply_chat_template=settings.chat,
            # None: the global random states stay as they are. Examples are drawn by lm-eval's own seed, 1234.
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
        )
    used = sorted({int(n) for n in found["n-shot"].values()})
    words = [f"lm-eval {lm_eval.__version__}", "-".join(map(str, used)) + "-shot", origin]
    if settings.chat:
        words.append("chat template")
    if settings.limit:
        words.append(f"first {settings.limit}" + (" of each subtask" if len(tasks) > 1 else ""))
    if model.cut:
        words.append(f"{model.cut} prompts cut on the left to {subject.positions} tokens")
    scores = _scores(found, "; ".join([*words, subject.dtype]))
    details = {"lm_eval_versions": found["versions"], "subtasks": _subtasks(found) if len(tasks) > 1 else {}}
    return Result(name, tuple(scores), time.perf_counter() - began, details)


def _load(name: str, settings: Settings, shots: int | None, manager: TaskManager) -> tuple[list[Any], str]:
    """lm-eval's task objects with their data, and where the data came from in words."""
    files = settings.files_of(name)
    members: list[Any] = []
    if files and name.split("_")[0] == "mmlu":
        members = [
            {"task": f"mmlu_{subject}", "custom_dataset": _given(splits)}
            for subject, splits in mmlu_subjects(files[0]).items()
            if name in ("mmlu", f"mmlu_{subject}")
        ]
        if not members:
            raise TextError(f"{files[0]}/test has no file for {name}")
    elif files:
        members = [{"task": name, "custom_dataset": _given(jsonl_splits(files[0], bool(shots)))}]
    # Members of a group are lm-eval's own tasks with these entries replaced; a bare dict would be a task of its own.
    spec = {"group": f"local {name}", "task": members} if members else name
    try:
        loaded = manager.load([spec])
        tasks = list(loaded["tasks"].values())
    except Exception as error:  # the hub's, the network's, datasets' and Jinja's errors alike
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if files:
            raise TextError(f"lm-eval cannot make '{name}' of {files[0]}: {type(error).__name__}: {reason}") from None
        form = "a folder with dev/ and test/ of headerless .csv files: question,A,B,C,D,letter"
        if not name.startswith("mmlu"):
            form = "a .jsonl file whose rows have the fields of the hub's data set, or a folder with one per split"
        raise TextError(
            f"the data of '{name}' could not be had from the hub: {reason}\nPass instead {form}: --from {name}=PATH"
        ) from None
    return tasks, ", ".join(f.name for f in files) or "hub data"


def _given(splits: Any) -> Any:
    """lm-eval asks for data with the task's metadata as keywords; it is the same whatever they are."""
    return lambda **_: splits


def _manager(name: str) -> TaskManager:
    """lm-eval's index of tasks. All of it takes ten seconds to build; a known name needs one folder."""
    folders = {"mmlu": "mmlu/default", "hellaswag": "hellaswag", "arc_easy": "arc", "piqa": "piqa"}
    folders["wikitext"] = "wikitext"
    known = folders.get("mmlu" if name.startswith("mmlu_") else name)
    root = Path(lm_eval.__file__).parent / "tasks"
    if known and (root / known).is_dir():
        manager = TaskManager(include_defaults=False, include_path=str(root / known))
        if name in manager.task_index:
            return manager
    return TaskManager()


# --- scores -----------------------------------------------------------------------------------------------------------


def _scores(found: dict[str, Any], protocol: str) -> list[Score]:
    """One score for each metric, over the items of all subtasks, in lm-eval's order."""
    items: dict[str, list[tuple[str, Any]]] = defaultdict(list)
    for task, samples in found["samples"].items():
        for sample in samples:
            for metric in sample["metrics"]:
                label = metric if sample["filter"] == "none" else f"{metric}, {sample['filter']}"
                items[label].append((f"{task}/{sample['doc_id']}", sample[metric]))
    return [_score(label, pairs, found, protocol) for label, pairs in items.items()]


def _score(label: str, pairs: list[tuple[str, Any]], found: dict[str, Any], protocol: str) -> Score:
    metric, _, chosen = label.partition(", ")
    ids, values = [name for name, _ in pairs], [value for _, value in pairs]
    better = all(directions.get(metric, True) for directions in found["higher_is_better"].values())
    if metric in _ROLLING:
        of_nats = _ROLLING[metric]
        transform: Any = "mean" if metric == "bits_per_byte" else "exp"
        nll, sizes = [-v[0] / of_nats for v in values], [v[1] for v in values]
        return mean(
            label, ids, nll, protocol, weights=sizes, transform=transform, higher_is_better=False, of="documents"
        )
    if all(isinstance(v, int | float) for v in values):
        if set(values) <= {0, 1}:
            return proportion(label, ids, values, protocol)
        return mean(label, ids, values, protocol, higher_is_better=better)
    # Such as F1 over the whole set: lm-eval has the number, and no item has one of its own.
    of_tasks = [
        r[f"{metric},{chosen or 'none'}"] for r in found["results"].values() if f"{metric},{chosen or 'none'}" in r
    ]
    if len(of_tasks) != 1:
        raise PlanError(
            f"'{label}' is no mean over items and cannot be combined over {len(of_tasks)} subtasks; name one"
        )
    return Score(label, of_tasks[0], math.nan, math.nan, len(values), "", protocol, better)


def _subtasks(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    return {
        task: {key.removesuffix(",none"): value for key, value in numbers.items() if isinstance(value, float)}
        | {"n": len(found["samples"][task])}
        for task, numbers in found["results"].items()
        if task in found["samples"]
    }
