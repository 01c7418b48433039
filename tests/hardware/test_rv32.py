"""The program for RV32: what lies where, and a simulator that lets nothing outside the chip's memories pass."""

from __future__ import annotations

import json
import struct
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.forms import Grid, RealGrid
from edgepress.checkpoints.shape import LinearShape, Pattern, parse_sparsity
from edgepress.hardware.rv32.build import build, compilers, find_compiler
from edgepress.hardware.rv32.layout import (
    MAGIC,
    CodeForm,
    Layout,
    code_form,
    code_forms,
    form_notes,
    require_runnable,
)
from edgepress.hardware.rv32.memory import Use, does_not_fit, linker_script, memory_use
from edgepress.hardware.rv32.project import sources
from edgepress.hardware.rv32.rows import decode, decode_numbers, encode, encode_numbers
from edgepress.hardware.rv32.simulator import StoppedError, difference, find_simulator, simulate
from edgepress.hardware.soc import load_soc
from tests.hardware.conftest import Make

FORM = Grid(4, 32)


@pytest.fixture(scope="module", params=["gcc", "clang"])
def compiler(request: pytest.FixtureRequest) -> list[str]:
    """Each of the compilers that are there."""
    find_compiler()
    return compilers().get(request.param) or pytest.skip(f"{request.param} for RV32 is not installed")


def require(simulator: str) -> str:
    try:
        return find_simulator(simulator)
    except PlanError as error:
        pytest.skip(str(error))


# --- bytes ------------------------------------------------------------------------------------------------------------


@pytest.mark.unit
def test_the_layouts_bytes_are_those_of_its_parts(make: Make) -> None:
    shape = make("stories15m", grid=FORM, adapter_rank=4, adapter_packed=True)
    layout = Layout(shape, 1001)
    weights = sum(x.weights for block in shape.blocks for x in block.linears)
    sides = sum(x.out_features + x.in_features for block in shape.blocks for x in block.linears)
    layers = sum(len(block.linears) for block in shape.blocks)
    expected = (
        len(MAGIC)
        + weights // 2  # codes
        + weights // 32 * 3  # of each group a float16 and a byte
        + 4 * sides + 16 * layers  # A and B in bytes, four float32 between them
        + 32000 * 288 * 4 + 4 * 288 * 13  # the embedding is the head; two norms a block and the last
        + 4 * 32001 + 1004  # where the texts begin, and these, filled to whole words
    )  # fmt: skip
    assert layout.nbytes == expected
    assert all(part.offset % 4 == 0 for part in layout.parts.values())
    ends = [0] + [part.offset + part.nbytes for part in layout.parts.values()]
    assert all(part.offset - end in range(17) for part, end in zip(layout.parts.values(), ends, strict=False))


def read_back(data: bytes, form: CodeForm, rows: int, columns: int, group: int, symmetric: bool) -> list[list[float]]:
    """The weights (rows, columns) that the codes of a grid stand for, bit by bit as FORMAT.md has it."""
    bits, middle, sides = form.bits, 2 ** (form.bits - 1), 8 if symmetric else 12
    unit = 32 if form.of else {2: 16, 3: 32, 4: 8, 8: 4}[bits]
    sets = list(combinations(range(form.of), form.kept))
    wide = (len(sets) - 1).bit_length()  # bits of a set's number
    index, stored = 0, unit * bits // 8
    if form.of:
        index, stored = -(-unit // form.of * wide // 8), -(-unit // form.of * form.kept * bits // 8)
    record = sides + 4 * (index + stored) * group // unit
    weights = []
    for row in range(rows):
        values = []
        for column in range(columns):
            at = (row // 4 * (columns // group) + column // group) * record
            (scale,) = struct.unpack_from("<e", data, at + 2 * (row % 4))
            zero = middle if symmetric else data[at + 8 + row % 4] + 1
            first = at + sides + column % group // unit * 4 * (index + stored)
            numbers = int.from_bytes(data[first + row % 4 * index :][:index], "little")
            codes = int.from_bytes(data[first + 4 * index + row % 4 * stored :][:stored], "little")
            place, code = column % unit, zero
            if form.of:
                kept = sets[numbers >> place // form.of * wide & 2**wide - 1]
                if place % form.of in kept:
                    place = place // form.of * form.kept + kept.index(place % form.of)
                    code = codes >> place * bits & 2**bits - 1
            else:
                code = codes >> place * bits & 2**bits - 1
            values.append(scale * (code - zero))
        weights.append(values)
    return weights


PATTERNS = ["", "2:4", "1:4", "3:4", "1:2", "1:8", "4:8", "6:8", "2:8", "1:16", "1:32"]


@pytest.mark.unit
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_codes_lie_as_the_format_says_and_come_back(pattern: str, bits: int, symmetric: bool) -> None:
    dice, rows, columns, group = np.random.default_rng(bits), 6, 192, 64
    form, nm = CodeForm(bits), Pattern.parse(pattern) if pattern else None
    codes = dice.integers(0, 2**bits, (rows, columns), np.uint8)
    zeros = dice.integers(0, 2**bits - 1, (rows, 3), np.uint8)
    scales = dice.uniform(0.01, 0.02, (rows, 3)).astype(np.float16)
    points = np.full((rows, 3), 2 ** (bits - 1)) if symmetric else zeros.astype(int) + 1
    if nm:
        form = CodeForm(bits, nm.of - nm.removed, nm.of)
        gone = dice.random((rows, columns // nm.of, nm.of)).argsort(-1) < nm.removed
        codes = np.where(gone.reshape(codes.shape), points.repeat(group, 1), codes).astype(np.uint8)
    grid = Grid(bits, group, symmetric)
    data = encode(form, codes, scales, None if symmetric else zeros)
    assert len(data) == form.nbytes(LinearShape("", rows, columns, "F32", grid=grid)) and len(data) % 4 == 0
    wanted = scales.astype(float).repeat(group, 1) * (codes.astype(int) - points.repeat(group, 1))
    assert np.array_equal(read_back(data, form, rows, columns, group, symmetric), wanted)
    back = decode(form, data, rows, columns, 3, not symmetric)
    given = {"codes": codes, "scales": scales} | ({} if symmetric else {"zeros": zeros})
    assert back.keys() == given.keys() and all(np.array_equal(back[name], array) for name, array in given.items())


@pytest.mark.unit
def test_codes_without_the_zeros_of_their_pattern_are_no_such_form() -> None:
    with pytest.raises(ValueError, match="groups of 4 weights with fewer zeros than 2"):
        encode(CodeForm(4, 2, 4), np.zeros((4, 32), np.uint8), np.ones((4, 1), np.float16), None)


# Bytes of 32 codes of a row, all or those that are kept with their sets' numbers; counted by hand.
SMALLER = [
    ("2:4", 2, 8, 7), ("2:4", 3, 12, 9), ("2:4", 4, 16, 11), ("2:4", 8, 32, 19),
    ("1:8", 2, 8, 9), ("1:8", 3, 12, 13), ("1:8", 4, 16, 16), ("1:8", 8, 32, 30),
    ("1:4", 2, 8, 8), ("1:4", 3, 12, 11), ("1:4", 4, 16, 14), ("1:4", 8, 32, 26),
    ("4:8", 2, 8, 8), ("4:8", 3, 12, 10), ("4:8", 4, 16, 12), ("4:8", 8, 32, 20),
]  # fmt: skip


@pytest.mark.unit
@pytest.mark.parametrize(("pattern", "bits", "whole", "left_out"), SMALLER)
def test_zeros_are_left_out_where_that_is_smaller(
    pattern: str, bits: int, whole: int, left_out: int, make: Make
) -> None:
    grid = Grid(bits, 32, True)
    shape = make("stories15m", grid=grid, pattern=Pattern.parse(pattern))
    (x,) = (x for x in shape.blocks[0].linears if x.name.endswith("up_proj"))  # 768 x 288
    units, scales = 768 * 288 // 32, 768 * 288 // 32 * 2
    first, second = code_forms(shape, x)
    assert (first.nbytes(x), second.nbytes(x)) == (units * whole + scales, units * left_out + scales)
    assert code_form(shape, x) == (second if left_out < whole else first)
    notes = " ".join(form_notes(shape))
    assert ("left out of" if left_out < whole else "stored in") in notes and pattern in notes
    assert Layout(shape, 0).parts["0.mlp.up_proj.codes"].nbytes == units * min(whole, left_out) + scales


# Of numbers, bytes of 32 of a row.
NUMBERS = [
    ("2:4", "F32", 128, 67), ("2:4", "BF16", 64, 35), ("1:8", "F32", 128, 114), ("1:8", "F16", 64, 58),
    ("4:8", "BF16", 64, 36), ("1:16", "F16", 64, 61), ("1:32", "BF16", 64, 63),
]  # fmt: skip


@pytest.mark.unit
@pytest.mark.parametrize(("pattern", "dtype", "whole", "left_out"), NUMBERS)
def test_numbers_without_a_grid_lie_without_zeros_too(
    pattern: str, dtype: str, whole: int, left_out: int, make: Make
) -> None:
    shape = make("stories15m", dtype=dtype, pattern=Pattern.parse(pattern))
    (x,) = (x for x in shape.blocks[0].linears if x.name.endswith("up_proj"))  # 768 x 288
    first, second = code_forms(shape, x)
    assert (first.nbytes(x), second.nbytes(x)) == (768 * 288 // 32 * whole, 768 * 288 // 32 * left_out)
    assert code_form(shape, x) == second and second.name.startswith(f"{dtype}_")
    assert (
        f"bytes where all numbers take {sum(b.weights for b in shape.blocks[0].linears) * 6 * whole // 32:,}"
        in (form_notes(shape)[0])
    )
    assert Layout(shape, 0).parts["0.mlp.up_proj.codes"].nbytes == 768 * 288 // 32 * left_out


@pytest.mark.unit
@pytest.mark.parametrize("pattern", ["2:4", "1:4", "1:2", "1:8", "4:8", "1:16", "1:32"])
@pytest.mark.parametrize("bits", [16, 32])
def test_kept_numbers_lie_as_the_format_says_and_come_back(pattern: str, bits: int) -> None:
    dice, rows, columns, nm = np.random.default_rng(bits), 6, 96, Pattern.parse(pattern)
    form = CodeForm(bits, nm.of - nm.removed, nm.of, "F16" if bits == 16 else "F32")
    numbers = dice.integers(1, 2**15, (rows, columns)).astype(f"<u{bits // 8}")
    gone = dice.random((rows, columns // nm.of, nm.of)).argsort(-1) < nm.removed
    numbers = np.where(gone.reshape(numbers.shape), 0, numbers).astype(numbers.dtype)
    data = encode_numbers(form, numbers)
    assert len(data) == form.nbytes(LinearShape("", rows, columns, form.dtype)) and len(data) % 4 == 0
    assert np.array_equal(decode_numbers(form, data, rows, columns), numbers)
    sets = list(combinations(range(form.of), form.kept))
    wide = (len(sets) - 1).bit_length()
    index, kept = -(-32 // form.of * wide // 8), 32 // form.of * form.kept * bits // 8
    for row, column in [(r, c) for r in range(rows) for c in range(columns)]:
        unit = (row // 4 * (columns // 32) + column // 32) * 4 * (index + kept)
        chosen = int.from_bytes(data[unit + row % 4 * index :][:index], "little")
        places = sets[chosen >> column % 32 // form.of * wide & 2**wide - 1]
        value = 0
        if column % form.of in places:
            place = column % 32 // form.of * form.kept + places.index(column % form.of)
            at = unit + 4 * index + row % 4 * kept + place * bits // 8
            value = int.from_bytes(data[at : at + bits // 8], "little")
        assert value == numbers[row, column]


@pytest.mark.unit
@pytest.mark.parametrize(("group", "pattern", "config"), [
    (16, "2:4", {}), (32, "3:5", {}), (32, "8:16", {}), (32, "0.5", {}), (32, "2:4", {"desc_act": True}),
])  # fmt: skip
def test_zeros_that_cannot_be_left_out_are_stored(
    group: int, pattern: str, config: dict[str, bool], make: Make
) -> None:
    shape = make("stories15m", grid=Grid(4, group), pattern=parse_sparsity(pattern))
    shape = replace(shape, config=dict(shape.config) | {"quantization_config": config})
    assert code_form(shape, shape.blocks[0].linears[0]) == CodeForm(4)
    assert "cannot be left out" in form_notes(shape)[0]


@pytest.mark.unit
def test_a_part_of_another_size_is_a_bug(make: Make) -> None:
    layout = Layout(make("stories260k"), 0)
    contents = {name: bytes(part.nbytes) for name, part in layout.parts.items()}
    assert len(layout.joined(contents)) == layout.nbytes
    with pytest.raises(RuntimeError):
        layout.joined(contents | {"model.norm": b""})


@pytest.mark.unit
def test_each_memorys_bytes_and_what_is_missing(make: Make) -> None:
    shape, soc = make("stories260k"), load_soc("siracusa")
    mram, sram, l1 = uses = memory_use(shape, soc, 1_000_000, 500, 256)
    assert (mram.name, mram.address, mram.capacity) == ("MRAM", 0x10400000, 4 << 20)
    assert sram.address == 0x10800000 and l1.address == 0x10000000
    # 5 blocks, keys and values of 4 heads of 8 channels; then x, normed, query, gate, up, two scores, angles, one
    assert sram.parts == {"KV cache": 4 * 2 * 5 * 256 * 32, "activations": 4 * (3 * 64 + 2 * 172 + 2 * 256 + 8 + 1)}
    assert does_not_fit(uses) == ""
    over = does_not_fit(memory_use(shape, soc, 5_000_000, 500, 256))
    assert over.startswith("MRAM would hold 5,009,716 of 4,194,304 bytes")


@pytest.mark.unit
def test_a_chip_without_addresses_or_rights_is_refused(make: Make, tmp_path: Path) -> None:
    shape = make("stories260k")
    with pytest.raises(PlanError, match=r"memories\.MRAM has no address and access; memories\.L2 has no address"):
        memory_use(shape, load_soc("gap9"), 1, 1, 16)
    chip = tmp_path / "chip.toml"
    chip.write_text('based_on = "siracusa"\nmemories.MRAM.access = "rw"\nmemories.L1.access = "rx"\n')
    with pytest.raises(PlanError, match=r"MRAM has access 'rw', without the x.*L1 has access 'rx', without the w"):
        memory_use(shape, load_soc(str(chip)), 1, 1, 16)
    with pytest.raises(PlanError, match=r"RP2350 cannot run a program for RV32 cores: its RISC-V cores, Hazard3"):
        memory_use(shape, load_soc("rp2350"), 1, 1, 16)
    with pytest.raises(PlanError, match="no memory has the role working"):
        memory_use(shape, replace(load_soc("rp2350"), no_rv32=""), 1, 1, 16)


@pytest.mark.unit
@pytest.mark.parametrize(("line", "words"), [
    ('memories.L2.access = "rw"', "memories.L2: 'address' and 'access' go together"),
    ('memories.L1.access = "x"', "memories.L1: access 'x' is not rx or rw or rwx"),
    ('memories.L1.address = { value = 3, unit = "address", kind = "stated", source = "a test" }', "3 is not a"),
    ('memories.L1.address = { value = 4, unit = "B", kind = "stated", source = "a test" }', "unit 'B' is not address"),
])  # fmt: skip
def test_a_wrong_address_is_a_fault_of_the_chips_file(line: str, words: str, tmp_path: Path) -> None:
    chip = tmp_path / "chip.toml"
    chip.write_text(f'based_on = "siracusa"\n{line}\n')
    with pytest.raises(PlanError) as error:
        load_soc(str(chip))
    assert words in str(error.value)


@pytest.mark.unit
def test_all_that_cannot_be_run_is_named_at_once(make: Make) -> None:
    shape = make("stories260k", grid=RealGrid(4, 32))
    with pytest.raises(PlanError, match="real zero points: quantise to an integer grid instead"):
        require_runnable(shape, 256)
    with pytest.raises(PlanError, match="the adapter's vectors"):
        require_runnable(make("stories260k", adapter_vector="magnitude", adapter_rank=2), 256)
    rope = {"rope_scaling": {"type": "su", "factor": 2.0}}
    config = dict(shape.config) | rope | {"hidden_act": "gelu_new", "edgepress": {"activation_bits": 8}}
    with pytest.raises(PlanError) as error:
        require_runnable(replace(shape, config=config), 1000)
    for words in ("a context of 1000 tokens", "'gelu_new'", "of type 'su'", "inputs of 8 bits"):
        assert words in str(error.value)


@pytest.mark.unit
def test_the_first_difference_is_told() -> None:
    assert difference([1, 2, 3], (1, 2, 3)) == ""
    assert "from place 1 of 3" in difference([1, 5, 3], [1, 2, 3])
    assert "from place 2 of 3" in difference([1, 2], [1, 2, 3])


@pytest.mark.unit
def test_a_simulator_is_found_or_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_simulator() == "unicorn"
    with pytest.raises(PlanError, match=r"--simulator spke: there is auto, unicorn, qemu, spike \(near: spike"):
        find_simulator("spke")
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    for name, how in (("qemu", "apt-get install qemu-system-misc"), ("spike", "pip install spike")):
        with pytest.raises(PlanError, match=f"the simulator {name} was not found: {how}"):
            find_simulator(name)
    monkeypatch.setattr("edgepress.hardware.rv32.simulator.find_spec", lambda name: None)
    with pytest.raises(PlanError, match="no simulator was found: pip install"):
        find_simulator()


# --- the simulator ----------------------------------------------------------------------------------------------------


def program(folder: Path, body: str, working: int = 256 * 1024, functions: str = "") -> Path:
    """A folder like an exported one whose program does this and nothing else."""
    uses = (
        Use("MRAM", 0x10400000, "rx", 4 << 20, {"code": 0, "tables": 0, "weights": 0}),
        Use("SRAM", 0x10800000, "rw", 4 << 20, {"KV cache": 0, "activations": 0}),
        Use("L1", 0x10000000, "rw", working, {"stack": 0}),
    )
    for name, content in sources().items():
        (folder / name).write_bytes(content)
    for name in ("runtime.c", "products.c", "lists.c", "integers.c", "model.c"):
        (folder / name).write_text("typedef int nothing;\n")
    (folder / "main.c").write_text(
        'static void done(void) { register int a7 __asm__("a7") = 2; __asm__ volatile("ecall" :: "r"(a7)); }\n'
        f"{functions}\nint main(void) {{ {body} done(); return 0; }}\n"
    )
    (folder / "weights.bin").write_bytes(MAGIC)
    (folder / "link.ld").write_text(linker_script(uses, "a test"))
    facts = {"memories": [use.to_dict() for use in uses], "linears": {"roles": ["q", "down"], "bytes": 4}}
    (folder / "memory.json").write_text(json.dumps(facts))
    return folder


def store(address: int) -> str:
    return f"*(volatile int *){address:#x} = 7;"


@pytest.mark.pipeline
def test_what_lies_inside_may_be_written(compiler: list[str], tmp_path: Path) -> None:
    folder = program(tmp_path, " ".join(map(store, (0x10000000, 0x1003FFFC, 0x10800000, 0x10BFFFFC))))
    build(folder, compiler)
    outcome = simulate(folder)
    assert outcome.tokens == () and outcome.instructions > 8
    assert outcome.stack == 256 * 1024  # its lowest byte was written


OUTSIDE = [
    (store(0x10040000), "at 0x10040000 were to be written, 0 bytes past the end of L1 (0x10000000 to 0x1003ffff)"),
    (store(0x10400100), "4 bytes at 0x10400100 were to be written, but MRAM is 'rx'"),
    (store(0x10C00010), "were to be written, 16 bytes past the end of SRAM"),
    (store(0x0FFFFFF0), "were to be written, 16 bytes before L1"),
    ("(void)*(volatile int *)0x20000000;", "4 bytes at 0x20000000 were to be read"),
    ("((void (*)(void))0x10800000)();", "were to be executed, but SRAM is 'rw'"),
]  # fmt: skip


@pytest.mark.pipeline
@pytest.mark.parametrize(("body", "words"), OUTSIDE)
def test_an_access_that_the_memories_do_not_allow_stops_it(
    body: str, words: str, compiler: list[str], tmp_path: Path
) -> None:
    build(program(tmp_path, body), compiler)
    with pytest.raises(StoppedError) as error:
        simulate(tmp_path)
    assert words in str(error.value)
    assert "in main" in str(error.value) or "executed" in words


OPERATORS = """
#ifdef __clang__
#define OPERATOR __attribute__((noinline))
#else
#define OPERATOR __attribute__((noipa))
#endif
#define NOPS(n) __asm__ volatile(".rept " #n "\\n nop\\n .endr" ::: "memory")
const int LINEARS[4] __attribute__((section(".tables"))) = {1, 2, 3, 4};
OPERATOR void helper(void) { NOPS(7); }
OPERATOR void linear(const int *layer) { NOPS(100); if (*layer == 4) BODY; }
OPERATOR void norm(int n) { (void)n; NOPS(1000); helper(); }
OPERATOR void forward(void) {
    norm(1); linear(&LINEARS[1]); linear(&LINEARS[2]); linear(&LINEARS[3]); NOPS(50); norm(2);
}
"""
HAND_OVER = """
extern const unsigned char weights[];
static void hand_over(void) {
    register unsigned a0 __asm__("a0") = 17, a2 __asm__("a2") = 4, a7 __asm__("a7") = 1;
    register const void *a1 __asm__("a1") = weights;
    __asm__ volatile("ecall" : "+r"(a0) : "r"(a1), "r"(a2), "r"(a7) : "memory");
}
"""


@pytest.mark.pipeline
def test_instructions_are_counted_for_the_operator_that_forward_called(compiler: list[str], tmp_path: Path) -> None:
    folder = program(tmp_path, "forward(); forward();", functions=OPERATORS.replace("BODY", "NOPS(3)"))
    build(folder, compiler)
    taken = simulate(folder).operators
    assert taken.keys() == {"norm", "linear q", "linear down", "other"}
    # Two calls of forward; a call takes a frame and some jumps on top.
    assert 4 * 1007 < taken["norm"] <= 4 * 1007 + 4 * 24
    assert 2 * 100 < taken["linear q"] <= 2 * 100 + 2 * 24
    assert 2 * 203 < taken["linear down"] <= 2 * 203 + 4 * 24
    assert 2 * 50 < taken["other"] <= 2 * 50 + 2 * 40


@pytest.mark.pipeline
def test_a_stop_names_the_operator(compiler: list[str], tmp_path: Path) -> None:
    folder = program(tmp_path, "forward();", functions=OPERATORS.replace("BODY", store(0x10400100)))
    build(folder, compiler)
    with pytest.raises(StoppedError, match=r"but MRAM is 'rx', by the code at 0x[0-9a-f]+ in linear \(linear down\)"):
        simulate(folder)


@pytest.mark.pipeline
def test_a_program_that_never_ends_is_stopped(compiler: list[str], tmp_path: Path) -> None:
    build(program(tmp_path, 'for (;;) __asm__ volatile("");'), compiler)
    with pytest.raises(StoppedError, match="not done after 1,000 instructions"):
        simulate(tmp_path, limit=1000)


@pytest.mark.pipeline
def test_a_memory_cut_below_what_is_asked_of_it_fails_to_link(compiler: list[str], tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"(?s)could not build.*L1"):
        build(program(tmp_path, "", working=512), compiler)


# --- other simulators -------------------------------------------------------------------------------------------------


@pytest.mark.pipeline
@pytest.mark.parametrize("simulator", ["qemu", "spike"])
def test_other_simulators_count_the_same_instructions_and_stack(
    simulator: str, compiler: list[str], tmp_path: Path
) -> None:
    require(simulator)
    functions = HAND_OVER + OPERATORS.replace("BODY", "hand_over()")
    folder = program(tmp_path, "forward(); forward();", functions=functions)
    build(folder, compiler)
    first, other = simulate(folder), simulate(folder, simulator=simulator)
    assert other.instructions == first.instructions > 2 * 1300
    assert other.stack == first.stack > 0
    assert other.tokens == first.tokens == (17, 17)
    assert other.text == first.text == MAGIC[:4] * 2
    assert other.sections == first.sections and not other.operators


@pytest.mark.pipeline
@pytest.mark.parametrize("simulator", ["qemu", "spike"])
@pytest.mark.parametrize(("body", "words"), OUTSIDE)
def test_other_simulators_stop_at_the_same_accesses(
    body: str, words: str, simulator: str, compiler: list[str], tmp_path: Path
) -> None:
    require(simulator)
    build(program(tmp_path, body), compiler)
    with pytest.raises(StoppedError) as error:
        simulate(tmp_path, simulator=simulator)
    said = str(error.value).replace(" was to be", " were to be")
    assert words.removeprefix("4 bytes ") in said
    assert "in main" in said or "executed" in words
