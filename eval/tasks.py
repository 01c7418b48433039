"""The tasks there are: names and summaries here, their code only when one runs, so that this costs nothing.

A task is a function `run(name, subject, settings) -> Result`, found by the place written here. To add one: write
the function, add a line to TASKS, and a field to Settings for each new flag.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import PlanError

if TYPE_CHECKING:
    from edgepress.eval.results import Result
    from edgepress.eval.settings import Settings
    from edgepress.eval.subject import Subject

    Run = Callable[[str, Subject, Settings], Result]


@dataclass(frozen=True)
class Task:
    name: str
    summary: str
    place: str  # "module:function" that runs it
    checker: str = ""  # "module:function" that reads its data, called as check(name, settings) before any model loads
    answers: bool = False  # greedy answers of many tokens: float32 by default, so that no near-tie hangs on the batch

    def load(self) -> Run:
        run: Run = _found(self.place)
        return run

    def check(self, settings: Settings) -> None:
        """Raise what is wrong with the task's data, while nothing has been computed yet."""
        if not settings.kv.plain and self.name not in KV_CACHE_TASKS:
            raise PlanError(
                f"--task {self.name} runs with the model's own KV cache; --kv-bits and --kv-window are for "
                f"{', '.join(KV_CACHE_TASKS)}. Leave them out, or the task"
            )
        if self.checker:
            _found(self.checker)(self.name, settings)


def _found(place: str) -> Any:
    module, _, function = place.partition(":")
    return getattr(importlib.import_module(module), function)


KV_CACHE_TASKS = ("perplexity", "wikitext2", "triviaqa-closed", "triviaqa-open", "generation")
_HARNESS = "edgepress.eval.harness:run", "edgepress.eval.harness_data:check"
TASKS = {
    task.name: task
    for task in (
        Task(
            "perplexity",
            "of --text by --protocol, with bits per byte",
            "edgepress.eval.text_tasks:any_text",
            "edgepress.eval.text_tasks:check",
        ),
        Task(
            "wikitext2",
            "perplexity of WikiText-2's test part, by windows and by rows",
            "edgepress.eval.text_tasks:wikitext2",
            "edgepress.eval.text_tasks:check",
        ),
        Task(
            "triviaqa-closed",
            "questions alone; exact, substring and 80 % of words",
            "edgepress.eval.trivia:closed",
            "edgepress.eval.trivia:check",
            answers=True,
        ),
        Task(
            "triviaqa-open",
            "questions with their shortest context",
            "edgepress.eval.trivia:opened",
            "edgepress.eval.trivia:check",
            answers=True,
        ),
        Task(
            "generation",
            "ROUGE-L, F1, SBERT and BLEU of answers to instructions; seconds and sizes",
            "edgepress.eval.generation:run",
            "edgepress.eval.generation:check",
            answers=True,
        ),
        Task(
            "speed",
            "decode and prefill tokens/s, time to first token, memory",
            "edgepress.eval.speed:run",
            "edgepress.eval.speed:check",
        ),
        Task(
            "robustness",
            "a score under noise and masks",
            "edgepress.eval.robustness:run",
            "edgepress.eval.robustness:check",
        ),
        Task("mmlu", "57 subjects, multiple choice, 5-shot (lm-eval)", *_HARNESS),
        Task("hellaswag", "endings of a scene (lm-eval)", *_HARNESS),
        Task("arc_easy", "grade-school science (lm-eval)", *_HARNESS),
        Task("piqa", "everyday physics (lm-eval)", *_HARNESS),
    )
}


def find_tasks(names: Sequence[str]) -> list[Task]:
    """The tasks of these names, each once. Raises PlanError naming every one that is not there, and all there are."""
    found, unknown = [], []
    for name in dict.fromkeys(names):
        if name in TASKS:
            found.append(TASKS[name])
        elif name in (others := _harness_names()):
            found.append(Task(name, "lm-eval's", *_HARNESS))
        else:
            close = difflib.get_close_matches(name, {*TASKS, *others}, n=3)
            unknown.append(f"'{name}'" + (f" (near: {', '.join(close)})" if close else ""))
    if unknown:
        raise PlanError(f"there is no task {', nor '.join(unknown)}. {_there_are()}")
    if not found:
        raise PlanError(f"--task names no task. {_there_are()}")
    return found


def _there_are() -> str:
    return f"There are: {', '.join(TASKS)}; and any task or group of lm-eval"


def _harness_names() -> set[str]:
    """Names of lm-eval's tasks and groups, read off its files: its own index takes ten seconds to build."""
    return {name for path in _harness_files() for name in _names_in(path)}


def _harness_files() -> Iterator[Path]:
    spec = importlib.util.find_spec("lm_eval")
    for place in (spec.submodule_search_locations or []) if spec else []:
        yield from (Path(place) / "tasks").rglob("*.yaml")


def _names_in(path: Path) -> list[str]:
    return re.findall(r"^\"?(?:task|group)\"?: *[\"']?([\w.-]+)", path.read_text(errors="replace"), flags=re.M)
