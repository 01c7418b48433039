"""Write conversations in a tokenizer's chat template, a program from outside, bounded in time, memory and text.

transformers runs templates in jinja's sandbox, which keeps them from files and processes but not from endless loops.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.errors import PlanError, TextError
from edgepress.checkpoints.memory import size_text

Conversation = Sequence[dict[str, str]]  # turns with a role and content

_SECONDS, _BYTES, _MEMORY = 20.0, 64 * 2**20, 2**30
_PER_TURN = 2**16  # characters that a template may add to each turn


def in_template(
    tokenizer: Any,
    conversations: Sequence[Conversation],
    folder: Path,
    asked: str,
    answer_next: bool,
    last_goes_on: bool = False,
) -> list[str]:
    """Each conversation as the model was tuned to read it.

    folder: whose tokenizer it is; asked: the option or row that wants it. answer_next: the beginning of an answer
    follows; last_goes_on: the last turn is not ended. Raises PlanError where the tokenizer has no template, TextError
    where it does not end, writes without end, or refuses a conversation.
    """
    if not tokenizer.chat_template:
        raise PlanError(f"{asked}: the tokenizer of {folder} has no chat template")
    reading, writing = os.pipe()
    child = 0
    try:
        with interrupts.held():
            child = os.fork()
            if child == 0:
                how = {"add_generation_prompt": answer_next, "continue_final_message": last_goes_on}
                _render(tokenizer, conversations, how, reading, writing)
            os.close(writing)
        said = _read(reading, time.monotonic() + _SECONDS)
    finally:
        os.close(reading)
        if child:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    if said is None:
        raise TextError(
            f"the chat template of {folder} did not come to an end: {_SECONDS:.0f} seconds, "
            f"{size_text(_MEMORY, 'MiB', 0)} and {size_text(_BYTES)} of text are its bounds"
        )
    found: dict[str, Any] = json.loads(said)
    if "error" in found:
        raise TextError(f"the chat template of {folder} cannot be used: {found['error']}")
    return list(found["texts"])


def _render(
    tokenizer: Any, conversations: Sequence[Conversation], how: dict[str, bool], reading: int, writing: int
) -> None:
    """The child's life: write JSON with the texts, or with what the template raised."""
    try:
        interrupts.heed(others=signal.SIG_DFL)
        os.close(reading)
        with open("/proc/self/statm") as file:
            there = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (there + _MEMORY, there + _MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        texts = []
        try:
            for turns in conversations:
                text = str(tokenizer.apply_chat_template(list(turns), tokenize=False, **how))
                if len(text) > sum(len(turn["content"]) + _PER_TURN for turn in turns) + _PER_TURN:
                    raise ValueError(f"it makes {len(text)} characters of a conversation")
                texts.append(text)
            data = json.dumps({"texts": texts})
        except Exception as error:  # a template may raise anything, and does so on purpose at turns it does not know
            words = " ".join(str(error).split())[:300]
            data = json.dumps({"error": f"{type(error).__name__}: {words}" if words else type(error).__name__})
        with open(writing, "w") as file:
            file.write(data)
    finally:
        os._exit(0)


def _read(pipe: int, until: float) -> bytes | None:
    """All that comes through a pipe; None where it does not end in time, or is too much, or nothing."""
    parts: list[bytes] = []
    size = 0
    while (left := until - time.monotonic()) > 0:
        if not select.select([pipe], [], [], left)[0]:
            return None
        if not (part := os.read(pipe, 1 << 20)):
            return b"".join(parts) or None
        parts.append(part)
        size += len(part)
        if size > _BYTES:
            return None
    return None
