"""The tasks of `compress eval` and their settings; their code is imported only when one runs.

A task is a function `run(name, subject, settings) -> Result`, found by the place written here. To add one: write
the function, add a line to TASKS, and a field to Settings for each new flag.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgepress.checkpoints.errors import PlanError, installed, missing, near
from edgepress.checkpoints.kv_format import KVFormat

if TYPE_CHECKING:
    from edgepress.eval.results import Result
    from edgepress.eval.subject import Subject

    Run = Callable[[str, Subject, "Settings"], Result]


# --- settings ---------------------------------------------------------------------------------------------------------
# What a user may set about an evaluation: one documented field each, which is also one flag of `compress eval`.
#
# No torch here, so that `--help` and a wrong task name answer at once. A new task that needs a setting of its own
# adds a field; the command line makes the flag from it.


def option(default: Any, flag: str, text: str) -> Any:
    return field(default=default, metadata={"flag": flag, "help": text})


@dataclass(frozen=True)
class Settings:
    limit: int = option(0, "--limit", "Items of each task at most; 0 is the task's own number.")
    sources: tuple[str, ...] = option((), "--from", "TASK=FILE: a task's questions or text from a local file.")
    answers: str = option("", "--answers", "Folder that keeps every prompt and answer, and resumes from them.")
    chat: bool = option(False, "--chat", "Put each question into the tokenizer's chat template.")
    new_tokens: int = option(50, "--new-tokens", "Tokens of an answer at most.")
    batch_tokens: int = option(8192, "--batch-tokens", "Tokens that are answered at once, prompts and answers.")
    shots: int = option(-1, "--shots", "Examples before each question of an lm-eval task; -1 is the task's own number.")
    text: str = option("embedded", "--text", "Text for perplexity: a file, wikitext2, or embedded.")
    protocol: str = option("windows", "--protocol", "How perplexity is measured: windows or rows.")
    window: int = option(512, "--window", "Tokens per window or row.")
    tokens: int = option(16384, "--tokens", "Tokens of the text that are measured; 0 is all.")
    kv_bits: int = option(16, "--kv-bits", "Bits of a cached key or value: 16, 8 or 4.")
    kv_window: int = option(0, "--kv-window", "Newest tokens that stay in the KV cache beside the sinks; 0 is all.")
    kv_sinks: int = option(4, "--kv-sinks", "First tokens that the KV cache keeps, and keeps in full.")
    sbert: str = option("", "--sbert", "Model of sentence embeddings for generation: a name, a folder, or none.")
    reply_tokens: int = option(128, "--reply-tokens", "Tokens of an answer to an instruction at most (generation).")
    top_p: float = option(0.0, "--top-p", "Sample answers to instructions from this much of the odds; 0 is greedy.")
    temperature: float = option(1.0, "--temperature", "Temperature of --top-p.")
    speed_prompt: int = option(128, "--speed-prompt", "Tokens of the prompt that speed reads.")
    speed_tokens: int = option(64, "--speed-tokens", "New tokens that speed times.")
    repeats: int = option(5, "--repeats", "How often speed is measured; the median counts.")
    kernels: bool = option(False, "--kernels", "Time GPTQModel's kernels too; they are compiled once, in a minute.")
    noise: str = option("0.01,0.05,0.1", "--noise", "Standard deviations of noise on MLP gates' inputs (robustness).")
    mask: str = option("0.01,0.05,0.1", "--mask", "Shares of attention outputs that are zeroed (robustness).")
    seeds: int = option(3, "--seeds", "Draws of noise and masks at each strength (robustness).")
    robust_task: str = option("perplexity", "--robust-task", "Task whose main score robustness follows.")

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise PlanError(f"--limit {self.limit}: a number of items, or 0 for the task's own number")
        if not 1 <= self.new_tokens <= 4096:
            raise PlanError(f"--new-tokens {self.new_tokens}: between 1 and 4096")
        if self.batch_tokens < 1:
            raise PlanError(f"--batch-tokens {self.batch_tokens}: at least 1; one question is always answered")
        if self.shots < -1:
            raise PlanError(f"--shots {self.shots}: 0 or more, or -1 for the task's own number")

        if not 1 <= self.reply_tokens <= 4096:
            raise PlanError(f"--reply-tokens {self.reply_tokens}: between 1 and 4096")
        if not 0 <= self.top_p <= 1:
            raise PlanError(f"--top-p {self.top_p}: above 0 up to 1, or 0 for greedy answers")
        if not 0 < self.temperature < math.inf:
            raise PlanError(f"--temperature {self.temperature}: must be positive and finite")
        if self.seeds < 1:
            raise PlanError(f"--seeds {self.seeds}: at least 1")
        _ = self.kv  # raises for what cannot be
        for flag, text in (("--noise", self.noise), ("--mask", self.mask)):
            numbers(flag, text)

    @property
    def kv(self) -> KVFormat:
        return KVFormat(self.kv_bits, self.kv_window, self.kv_sinks)

    def files_of(self, task: str) -> list[Path]:
        """The local files given for a task, in order; empty where it reads from the hub.

        Raises PlanError naming what is not TASK=FILE, or a file or folder that is not there.
        """
        files = []
        for source in self.sources:
            name, separator, path = source.partition("=")
            if not separator or not path:
                raise PlanError(f"--from {source}: expected TASK=FILE, e.g. triviaqa-closed=questions.jsonl")
            if name == task:
                files.append(Path(path).expanduser())
        for file in files:
            if not file.exists():
                raise PlanError(f"--from {task}={file}: there is no such file or folder")
        return files


def numbers(flag: str, text: str) -> tuple[float, ...]:
    """Comma-separated numbers; none for an empty text. Raises PlanError naming what is no number."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise PlanError(f"{flag} {text}: expected numbers with commas between, e.g. 0.01,0.1") from None


# --- tasks ------------------------------------------------------------------------------------------------------------


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
            "edgepress.eval.perplexity:any_text",
            "edgepress.eval.perplexity:check",
        ),
        Task(
            "wikitext2",
            "perplexity of WikiText-2's test part, by windows and by rows",
            "edgepress.eval.perplexity:wikitext2",
            "edgepress.eval.perplexity:check",
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
            unknown.append(f"'{name}'{near(name, (*TASKS, *others))}")
    if unknown and not installed("lm_eval"):
        raise PlanError(missing("lm_eval", f"the task {unknown[0]}") + f". Without it there are {', '.join(TASKS)}")
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
