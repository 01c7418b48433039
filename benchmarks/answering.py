"""Question answering on SmolLM2-135M: batches of like length, against a plain loop that answers one question at a time.

Goal: at least 3 x the loop's questions a second, and the same answers. Usage:
python -m benchmarks.answering QUESTIONS.jsonl [number] [float32|bfloat16]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from edgepress.checkpoints.runtime import Runtime
from edgepress.checkpoints.sources import open_source
from edgepress.eval.answers import Question, answer_all
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings
from edgepress.eval.trivia import load_items


@torch.no_grad()
def one_at_a_time(subject: Subject, questions: list[Question], new_tokens: int) -> list[str]:
    """The loop as a reader of transformers' documentation would write it."""
    tokenizer, model, answers = subject.tokenizer, subject.model, []
    caller: Any = model
    for question in questions:
        inputs = tokenizer(question.prompt, return_tensors="pt")
        output = caller.generate(
            **inputs,
            max_new_tokens=new_tokens,
            min_new_tokens=1,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
        new = output[0, inputs["input_ids"].shape[1] :]
        answers.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    return answers


def timed(work: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """The result, and seconds by the wall's clock and the processor's: the second survives a shared machine."""
    began = time.perf_counter(), time.process_time()
    result = work()
    return result, (time.perf_counter() - began[0], time.process_time() - began[1])


def main(file: str, number: int = 64, dtype: str = "float32") -> None:
    source = open_source(None)
    subject = Subject(source, Runtime(dtype=getattr(torch, dtype)))
    settings = Settings(limit=number, sources=(f"triviaqa-closed={file}",))
    items = load_items("triviaqa-closed", settings)
    questions = [Question(item.id, f"Question: {item.question} Answer:", item.expected) for item in items]
    one_at_a_time(subject, questions[:1], 4)  # the first pass allocates

    batched, ours = timed(lambda: answer_all(subject, questions, settings, "triviaqa-closed"))
    single, theirs = timed(lambda: one_at_a_time(subject, questions, settings.new_tokens))
    same = sum(a.text == b for a, b in zip(batched, single, strict=True))
    print(f"{len(questions)} questions, {dtype}, {torch.get_num_threads()} threads")
    for name, a, b in zip(("seconds", "processor seconds"), ours, theirs, strict=True):
        print(
            f"{name}: batched {a:.1f} ({a / len(questions):.3f} a question), one at a time {b:.1f}, ratio {b / a:.2f}"
        )
    print(f"goal: ratio 3; same answers: {same} of {len(questions)}")


if __name__ == "__main__":
    main(sys.argv[1], *(int(n) for n in sys.argv[2:3]), *sys.argv[3:4])
