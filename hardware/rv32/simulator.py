"""Run an exported program on a simulated RV32 core that has exactly the chip's memories, and measure it.

`python -m edgepress.hardware.rv32.simulator FOLDER [--check] [--simulator NAME]` does so for a folder that was built.
No torch.
"""

from __future__ import annotations

import argparse
import codecs
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import EdgepressError, PlanError, near
from edgepress.hardware.rv32.elf import Program, read_elf
from edgepress.hardware.rv32.monitor import FILL, STACK, TRAP, messages, path_of

AUTO = "auto"
# In the order in which they are taken; only the first counts instructions by operator.
SIMULATORS = {
    "unicorn": 'pip install "edgepress[chip]", or pip install unicorn',
    "qemu": "apt-get install qemu-system-misc",
    "spike": "pip install spike",
}
PAGE = 4096  # what the simulators can map
PYTHON = "Python in float32"
OTHER = "other"  # what no operator takes: calls, the sum of a branch and the state, the loop over tokens
# What tables call the functions of runtime.c and products.c; a linear layer's is `linear` and its role.
_OPERATORS = {
    "embed": "embedding", "likeliest": "head", "rotate": "rotary", "angles": "rotary", "norm_heads": "norm",
    "activate": "activation", "keep": "KV cache", "arrange": "order of inputs",
}  # fmt: skip
_WORDS = {"read": "read", "write": "written", "fetch": "executed"}
_TRAPS = {1: "fetch", 5: "read", 7: "write"}  # causes of a trap that memory protection is behind
_STOPPED = "the program was stopped: "


class StoppedError(EdgepressError):
    """The program did what its chip cannot."""


@dataclass(frozen=True)
class Outcome:
    """What a program did: its tokens, prompt included, and what it took."""

    tokens: tuple[int, ...]
    text: bytes
    instructions: int  # of all tokens
    operators: Mapping[str, int]  # the same by operator; empty where the simulator does not tell them apart
    sections: Mapping[str, int]  # bytes as linked, by section
    stack: int  # bytes of the working memory from its end to the lowest that was written

    @property
    def fed(self) -> int:
        """Tokens that were fed, the prompt's included: all but the last."""
        return max(1, len(self.tokens) - 1)

    @property
    def instructions_a_token(self) -> float:
        """Of every token that was fed."""
        return self.instructions / self.fed


class _Counts:
    """Instructions by operator, which is a function that `forward` calls, with all that it calls itself."""

    def __init__(self, program: Program, facts: Mapping[str, Any]) -> None:
        self._forward, self._main = program.symbols.get("forward"), program.symbols.get("main")
        self._entries = {s.address: name for name, s in program.symbols.items() if s.is_function}
        self._linears, self._layers = program.symbols.get("LINEARS"), facts.get("linears")
        self.taken: dict[str, int] = {}
        self.total = 0
        self.operator = OTHER
        self._in_forward = False

    def block(self, address: int, instructions: int, argument: Callable[[], int]) -> None:
        """A run of instructions without a jump begins; argument: gives a function's first one."""
        if self._forward is not None and address in self._forward:
            self.operator, self._in_forward = OTHER, True
        elif self._in_forward:
            self.operator, self._in_forward = self._called(address, argument), False
        elif self._main is not None and address in self._main:
            self.operator = OTHER
        self.taken[self.operator] = self.taken.get(self.operator, 0) + instructions
        self.total += instructions

    def _called(self, address: int, argument: Callable[[], int]) -> str:
        name = self._entries.get(address, OTHER)
        if self._linears is not None and self._layers and argument() in self._linears:
            roles, place = self._layers["roles"], argument() - self._linears.address
            return f"linear {roles[place // self._layers['bytes'] % len(roles)]}"
        return _OPERATORS.get(name, name)


def find_simulator(name: str = AUTO) -> str:
    """The simulator of this name, or the first that is there. Raises PlanError with what to install otherwise."""
    if name != AUTO and name not in SIMULATORS:
        raise PlanError(f"--simulator {name}: there is {AUTO}, {', '.join(SIMULATORS)}{near(name, SIMULATORS)}")
    for own, how in SIMULATORS.items():
        if name in (AUTO, own) and (find_spec(own) if own == "unicorn" else path_of(own)):
            return own
        if name == own:
            raise PlanError(f"the simulator {own} was not found: {how}")
    raise PlanError(f"no simulator was found: {SIMULATORS['unicorn']}")


def simulate(
    folder: Path, show: Callable[[bytes], None] | None = None, limit: int = 0, simulator: str = "unicorn"
) -> Outcome:
    """Run FOLDER/chip.elf in the memories of FOLDER/memory.json.

    show: is called with each token's text as it comes; limit: instructions after which unicorn stops it, 0 for none;
    the others stop at one only once the program has handed over a token.
    Raises StoppedError at an access that the memories do not allow, naming the address and the memory.
    """
    simulator = find_simulator(simulator)
    facts = json.loads((folder / "memory.json").read_text())
    program = read_elf(folder / "chip.elf")
    for memory in facts["memories"]:
        if memory["address"] % PAGE or memory["capacity"] % PAGE:
            raise PlanError(f"{memory['name']} does not lie on multiples of {PAGE} bytes, which simulators map")
    if simulator == "unicorn":
        return _on_unicorn(program, facts, show, limit)
    return _beside_a_monitor(simulator, program, facts["memories"], show, limit)


def _beside_a_monitor(
    simulator: str,
    program: Program,
    memories: Sequence[Mapping[str, Any]],
    show: Callable[[bytes], None] | None,
    limit: int,
) -> Outcome:
    """On Spike or QEMU."""
    tokens: list[int] = []
    written, taken, stack = bytearray(), 0, 0
    for message in messages(program, memories, simulator):
        kind, first, second, third = message.words
        if kind == STACK:
            stack = first
            break
        taken += message.instructions
        if kind >= TRAP:
            what = _TRAPS.get(kind - TRAP)
            if what is None:
                raise StoppedError(f"{_STOPPED}it came upon exception {kind - TRAP} at {first:#x}{_by(program, first)}")
            told = f"memory at {second:#x} was to be {_WORDS[what]}, {_place(second, what, memories)}"
            raise StoppedError(f"{_STOPPED}{told}{_by(program, first)}")
        if kind == 1:
            tokens.append(first)
            text = program.read(second, third)
            written.extend(text)
            if show is not None:
                show(text)
        if limit and taken > limit:
            raise StoppedError(f"{_STOPPED}it was not done after {limit:,} instructions")
    return Outcome(tuple(tokens), bytes(written), taken, {}, _sizes(program), stack)


def _on_unicorn(
    program: Program, facts: Mapping[str, Any], show: Callable[[bytes], None] | None, limit: int
) -> Outcome:
    import unicorn
    from unicorn.riscv_const import UC_RISCV_REG_A0, UC_RISCV_REG_A1, UC_RISCV_REG_A2, UC_RISCV_REG_A7, UC_RISCV_REG_PC

    memories = facts["memories"]
    core = unicorn.Uc(unicorn.UC_ARCH_RISCV, unicorn.UC_MODE_RISCV32)
    rights = {"r": unicorn.UC_PROT_READ, "w": unicorn.UC_PROT_WRITE, "x": unicorn.UC_PROT_EXEC}
    for memory in memories:
        core.mem_map(memory["address"], memory["capacity"], sum(rights[letter] for letter in memory["access"]))
    working = next(memory for memory in memories if "stack" in memory["parts"])
    core.mem_write(working["address"], bytes([FILL]) * working["capacity"])
    for section in program.sections:
        if section.contents:
            core.mem_write(section.address, section.contents)

    tokens: list[int] = []
    written = bytearray()
    counts = _Counts(program, facts)
    stopped: list[str] = []

    def argument() -> int:
        return int(core.reg_read(UC_RISCV_REG_A0))

    def block(_: Any, address: int, size: int, data: Any) -> None:
        counts.block(address, size // 4, argument)  # no compressed ones among RV32IMF's
        if limit and counts.total > limit:
            stopped.append(f"it was not done after {limit:,} instructions")
            core.emu_stop()

    def interrupt(_: Any, number: int, data: Any) -> None:
        kind = core.reg_read(UC_RISCV_REG_A7)
        if number not in (8, 11) or kind not in (1, 2):  # ecall from user or machine mode, as main.c makes it
            at = core.reg_read(UC_RISCV_REG_PC)
            stopped.append(f"it came upon exception {number} at {at:#x}{_by(program, at, counts.operator)}")
            core.emu_stop()
        elif kind == 2:
            core.emu_stop()
        else:
            token, piece, length = (core.reg_read(r) for r in (UC_RISCV_REG_A0, UC_RISCV_REG_A1, UC_RISCV_REG_A2))
            tokens.append(token)
            text = bytes(core.mem_read(piece, length)) if length else b""
            written.extend(text)
            if show is not None:
                show(text)

    def access(_: Any, kind: int, address: int, size: int, value: int, data: Any) -> bool:
        at = core.reg_read(UC_RISCV_REG_PC)
        what = "write" if kind in _kinds("WRITE") else "fetch" if kind in _kinds("FETCH") else "read"
        where = _place(address, what, memories)
        stopped.append(
            f"{size} bytes at {address:#x} were to be {_WORDS[what]}, {where}{_by(program, at, counts.operator)}"
        )
        return False

    core.hook_add(unicorn.UC_HOOK_BLOCK, block)
    core.hook_add(unicorn.UC_HOOK_INTR, interrupt)
    core.hook_add(unicorn.UC_HOOK_MEM_INVALID, access)
    try:
        core.emu_start(program.entry, 0xFFFFFFFF)
    except unicorn.UcError as error:
        stopped = stopped or [str(error)]
    if stopped:
        raise StoppedError(f"{_STOPPED}{stopped[0]}")
    stack = bytes(core.mem_read(working["address"], working["capacity"])).lstrip(bytes([FILL]))
    return Outcome(tuple(tokens), bytes(written), counts.total, counts.taken, _sizes(program), len(stack))


def _sizes(program: Program) -> dict[str, int]:
    return {section.name: section.nbytes for section in program.sections}


def _by(program: Program, at: int, operator: str = OTHER) -> str:
    """Which code it was, in words; operator: that it was called for, where one knows."""
    where = program.place(at)
    of = "" if operator in (OTHER, where) else f" ({operator})"
    return f", by the code at {at:#x} in {where}{of}" if where else ""


def _kinds(which: str) -> set[int]:
    import unicorn

    return {getattr(unicorn, f"UC_MEM_{which}_{end}") for end in ("UNMAPPED", "PROT")}


def _place(address: int, what: str, memories: Sequence[Mapping[str, Any]]) -> str:
    for memory in memories:
        first, end = memory["address"], memory["address"] + memory["capacity"]
        if first <= address < end:
            return f"but {memory['name']} is '{memory['access']}'"
    below = [m for m in memories if m["address"] + m["capacity"] <= address]
    if below:
        nearest = max(below, key=lambda m: int(m["address"]))
        end = nearest["address"] + nearest["capacity"]
        return f"{address - end:,} bytes past the end of {nearest['name']} ({nearest['address']:#x} to {end - 1:#x})"
    nearest = min(memories, key=lambda m: int(m["address"]))
    return f"{nearest['address'] - address:,} bytes before {nearest['name']} ({nearest['address']:#x})"


def operator_lines(outcome: Outcome, estimate: Mapping[str, float] | None = None) -> list[str]:
    """A table for the terminal: each operator's instructions a token, largest first, their share, and the estimate."""
    rows = sorted(outcome.operators.items(), key=lambda item: -item[1])
    lines = [f"{'operator':<17}{'instructions a token':>21}{'share':>8}" + ("   estimate" if estimate else "")]
    for name, taken in [*rows, ("all, on one core", outcome.instructions)]:
        guess = "" if not estimate else f"{estimate.get(name, 0.0):>11,.0f}"
        if estimate and name not in outcome.operators:
            guess = f"{sum(estimate.values()):>11,.0f}"
        lines.append(f"{name:<17}{taken / outcome.fed:>21,.0f}{taken / outcome.instructions:>8.1%}{guess}")
    return lines


def used_bytes(outcome: Outcome, memories: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row a memory: its bytes as predicted and as linked, the stack as it was measured."""
    s = outcome.sections
    linked = {
        "code": s.get(".text", 0),
        "tables": s.get(".tables", 0),
        "weights": s.get(".weights", 0),
        "KV cache": s.get(".kv", 0),
        "activations": s.get(".bss", 0),
        "stack": outcome.stack,
    }
    return [
        {
            "memory": memory["name"],
            "capacity": memory["capacity"],
            "predicted": memory["bytes"],
            "used": sum(linked[part] for part in memory["parts"]),
            "parts": {part: linked[part] for part in memory["parts"]},
        }
        for memory in memories
    ]


def expected_tokens(folder: Path) -> tuple[int, ...]:
    """The tokens in expected.txt, prompt included."""
    return tokens_of(folder / "expected.txt")


def tokens_of(path: Path) -> tuple[int, ...]:
    return tuple(int(word) for word in path.read_text().split())


def printer() -> Callable[[bytes], None]:
    """What prints a text as its bytes come; a character whose bytes are in two tokens waits for the second."""
    decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def show(text: bytes) -> None:
        print(decode(text), end="", flush=True)

    return show


def expected_of(folder: Path) -> str:
    """Whose tokens expected.txt has."""
    return str(json.loads((folder / "memory.json").read_text()).get("expected", PYTHON))


def difference(tokens: Sequence[int], wanted: Sequence[int], whose: str = PYTHON) -> str:
    """Where the tokens leave those that are expected, in words; empty where they do not."""
    if tuple(tokens) == tuple(wanted):
        return ""
    both = enumerate(zip(tokens, wanted, strict=False))
    place = next((k for k, (own, other) in both if own != other), min(len(tokens), len(wanted)))
    return f"the tokens are not those of {whose} from place {place} of {len(wanted)} on"


def main(arguments: Sequence[str]) -> int:
    """Print what FOLDER's program writes; with --check compare its tokens with expected.txt. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m edgepress.hardware.rv32.simulator")
    parser.add_argument("folder", type=Path, help="an exported program that was built")
    parser.add_argument("--check", action="store_true", help="compare its tokens with expected.txt")
    parser.add_argument("--simulator", default=AUTO, help=f"{AUTO}, {', '.join(SIMULATORS)}")
    asked = parser.parse_args(arguments)
    folder: Path = asked.folder
    try:
        outcome = simulate(folder, printer(), simulator=asked.simulator)
    except EdgepressError as error:
        print(f"\nerror: {error}", file=sys.stderr)
        return 2
    print("\n", *operator_lines(outcome), sep="\n")
    for row in used_bytes(outcome, json.loads((folder / "memory.json").read_text())["memories"]):
        print(f"{row['memory']}: {row['used']:,} of {row['capacity']:,} bytes ({row['predicted']:,} predicted)")
    if not asked.check:
        return 0
    wanted, whose = expected_tokens(folder), expected_of(folder)
    told = difference(outcome.tokens, wanted, whose)
    print(told or f"all {len(wanted)} tokens are those of {whose}")
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
