"""Chat templates are programs from outside: bounded in time, memory and text, and refused in one sentence."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import PlanError, TextError
from edgepress.eval import chat
from tests.models import tiny_tokenizer

pytestmark = pytest.mark.unit
TURNS = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
PLAIN = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<next>{% endif %}"
)


def tokenizer(template: str | None) -> Any:
    made = tiny_tokenizer().__class__(tokenizer_object=tiny_tokenizer().backend_tokenizer)
    made.chat_template = template
    return made


def test_conversations_come_as_the_template_writes_them() -> None:
    found = chat.in_template(tokenizer(PLAIN), [TURNS, TURNS[:1]], Path("m"), "--chat", answer_next=True)
    assert found == ["<user>What?\n<assistant>That.\n<next>", "<user>What?\n<next>"]
    assert chat.in_template(tokenizer(PLAIN), [TURNS[:1]], Path("m"), "--chat", answer_next=False) == ["<user>What?\n"]


def test_no_template_is_said() -> None:
    with pytest.raises(PlanError, match="--chat: the tokenizer of m has no chat template"):
        chat.in_template(tokenizer(None), [TURNS], Path("m"), "--chat", answer_next=True)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ raise_exception('no system turn') }}", "TemplateError: no system turn"),
        ("{% for %}", "TemplateSyntaxError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "SecurityError"),
        ("{{ 'x' * 10000000000 }}", "MemoryError"),
        ("{{ 'x' * 300000 }}", "makes 300000 characters of a conversation"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
    ],
)
def test_a_template_that_fails_is_one_sentence(template: str, said: str) -> None:
    with pytest.raises(TextError, match=said) as raised:
        chat.in_template(tokenizer(template), [TURNS], Path("m"), "--chat", answer_next=True)
    assert "\n" not in str(raised.value)


def test_a_template_without_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat, "_SECONDS", 0.5)
    nines = "{% for x in range(99999) %}" * 3 + "{% endfor %}" * 3
    began = time.monotonic()
    with pytest.raises(TextError, match="did not come to an end"):
        chat.in_template(tokenizer(nines), [TURNS], Path("m"), "--chat", answer_next=True)
    assert time.monotonic() - began < 20
