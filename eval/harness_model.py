"""lm-eval's Hugging Face model over a checkpoint's weights, whose answers are kept on disk as they come."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from lm_eval.models.huggingface import HFLM

from edgepress.checkpoints.errors import NumericsError, TextError
from edgepress.checkpoints.tokens import require_known
from edgepress.eval.answer_file import AnswerFile
from edgepress.eval.chat import in_template
from edgepress.eval.settings import Settings
from edgepress.eval.subject import Subject

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
