"""Run any task of lm-eval on a checkpoint's effective dense weights.

Data comes from the hub, or with --from TASK=PLACE from local files: a .jsonl file whose rows have the fields of the
task's data set, a folder with such a file per split (test.jsonl, validation.jsonl, train.jsonl), or for mmlu a
folder with dev/SUBJECT_dev.csv and test/SUBJECT_test.csv as the authors publish them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from edgepress.checkpoints.errors import NumericsError, PlanError, TextError
from edgepress.checkpoints.quiet import quiet_import
from edgepress.checkpoints.tokens import require_known
from edgepress.eval.answer_file import AnswerFile
from edgepress.eval.chat import in_template
from edgepress.eval.harness_data import jsonl_splits, mmlu_subjects
from edgepress.eval.results import Result, Score, mean, proportion
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings

with quiet_import():
    import lm_eval
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager


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


# --- lm-eval's model --------------------------------------------------------------------------------------------------
# lm-eval's Hugging Face model over a checkpoint's weights, whose answers are kept on disk as they come.


_CHUNK = 64  # requests between two writes to the file
_LOGIT_TOKENS = 2048  # lm-eval keeps a batch's logits twice: 2 x 400 MB for 49,152 words in float32


class KeptModel(HFLM):  # type: ignore[misc]
    """Answers lm-eval's requests in chunks of like length, tells the progress, and resumes from its file."""

    def __init__(self, subject: Subject, settings: Settings, task: str) -> None:
        super().__init__(
            pretrained=subject.model,
            tokenizer=subject.tokenizer,
            backend="causal",
            batch_size=1,
            max_length=subject.positions,
        )
        self._subject = subject
        self._progress, self._task = subject.runtime.progress, task
        self._answers: dict[str, Any] = {}
        self.cut = 0  # prompts that did not fit the model's positions; lm-eval drops their beginning
        self._kept: AnswerFile | None = None
        if settings.answers:
            path = Path(settings.answers) / subject.label / f"{task}.jsonl"
            how = {"dtype": subject.dtype}
            note = subject.runtime.progress.note
            self._kept = AnswerFile(path, task, subject.checkpoint.fingerprint, subject.label, how, note)

    def __enter__(self) -> KeptModel:
        if self._kept:
            self._kept.__enter__()
            self._answers = {key: row["answer"] for key, row in self._kept.rows.items()}
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, trace: TracebackType | None) -> None:
        if self._kept:
            self._kept.__exit__(kind, e, trace)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        found = self._answered("loglikelihood", requests, super().loglikelihood)
        return [(answer[0], answer[1]) for answer in found]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        return self._answered("loglikelihood_rolling", requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        return self._answered("generate_until", requests, super().generate_until)

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = True, override_bs: Any = None) -> Any:
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)  # no bar of its own

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """As lm-eval's own, but bounded. A task's description is left out where the template knows no system turn."""
        folder, goes_on = self._subject.checkpoint.folder, not add_generation_prompt
        without_system = [turn for turn in chat_history if turn["role"] != "system"]
        try:
            return in_template(self.tokenizer, [chat_history], folder, "--chat", add_generation_prompt, goes_on)[0]
        except TextError:
            if without_system == chat_history:
                raise
        return in_template(self.tokenizer, [without_system], folder, "--chat", add_generation_prompt, goes_on)[0]

    def tok_encode(self, string: str, *arguments: Any, **settings: Any) -> list[int]:
        return self._known(super().tok_encode(string, *arguments, **settings))

    def tok_batch_encode(self, strings: list[str], *arguments: Any, **settings: Any) -> Any:
        ids, mask = super().tok_batch_encode(strings, *arguments, **settings)
        self._known(ids.flatten().tolist())
        return ids, mask

    def _known(self, ids: list[int]) -> list[int]:
        require_known(torch.tensor(ids), self._subject.checkpoint.shape.vocabulary, self._subject.checkpoint.name)
        return ids

    def _answered(self, kind: str, requests: list[Any], compute: Callable[..., list[Any]]) -> list[Any]:
        keys = [_key(kind, request.args) for request in requests]
        self.cut += sum(map(self._too_long, [request.args for request in requests]))
        missing = {key: r for key, r in zip(keys, requests, strict=True) if key not in self._answers}
        # Equal contexts stay neighbours: lm-eval runs such a context once for all its one-token continuations.
        todo = sorted(missing.items(), key=lambda item: (-len(item[1].args[0]), item[1].args[0]))
        self._progress.start(self._task, len(todo))
        for start in range(0, len(todo), _CHUNK):
            chunk = todo[start : start + _CHUNK]
            longest = len(self.tok_encode(chunk[0][1].args[0])) + 32
            self.batch_size_per_gpu = max(1, min(_CHUNK, _LOGIT_TOKENS // longest))
            answers = compute([request for _, request in chunk], disable_tqdm=True)
            self._keep(kind, chunk, answers)
        return [self._answers[key] for key in keys]

    def _too_long(self, arguments: tuple[Any, ...]) -> bool:
        words = "".join(part for part in arguments if isinstance(part, str))
        # No tokenizer here makes more than one token of a byte, and few texts are long enough to have to be counted.
        return len(words.encode()) > int(self.max_length) and len(self.tok_encode(words)) > int(self.max_length) + 1

    def _keep(self, kind: str, chunk: list[tuple[str, Any]], answers: list[Any]) -> None:
        rows = []
        for (key, request), answer in zip(chunk, answers, strict=True):
            if kind != "generate_until" and not math.isfinite(answer[0] if isinstance(answer, tuple) else answer):
                raise NumericsError(
                    f"{self._task}: the log-likelihood of '{request.args[-1][:60]}' after "
                    f"'{request.args[0][-60:]}' is not finite; measure with --dtype float32"
                )
            self._answers[key] = answer
            rows.append({"id": key, "kind": kind, "prompt": request.args[0], "answer": answer})
            if kind == "loglikelihood":
                rows[-1]["continuation"] = request.args[1]
        if self._kept:
            self._kept.add(rows)
        for _ in rows:
            self._progress.step()


def _key(kind: str, arguments: tuple[Any, ...]) -> str:
    return hashlib.sha256(json.dumps([kind, arguments], sort_keys=True).encode()).hexdigest()[:24]
