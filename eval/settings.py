"""What a user may set about an evaluation: one documented field each, which is also one flag of `compress eval`.

No torch here, so that `--help` and a wrong task name answer at once. A new task that needs a setting of its own
adds a field; the command line makes the flag from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints.errors import PlanError


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

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise PlanError(f"--limit {self.limit}: a number of items, or 0 for the task's own number")
        if not 1 <= self.new_tokens <= 4096:
            raise PlanError(f"--new-tokens {self.new_tokens}: between 1 and 4096")
        if self.batch_tokens < 1:
            raise PlanError(f"--batch-tokens {self.batch_tokens}: at least 1; one question is always answered")
        if self.shots < -1:
            raise PlanError(f"--shots {self.shots}: 0 or more, or -1 for the task's own number")

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
