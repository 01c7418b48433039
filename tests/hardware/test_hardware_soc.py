"""SoC files: what ships is right, and a bad file is told everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.families import PRESETS, shape_from_config
from edgepress.checkpoints.shape import with_bits
from edgepress.hardware.check import check
from edgepress.hardware.rates import missing_constants
from edgepress.hardware.soc import (
    CONSTANT_UNITS,
    ENGINE_KINDS,
    KINDS,
    LINKS,
    OPERATORS,
    REQUIRED_CONSTANTS,
    ROLES,
    SHIPPED,
    UNKNOWN,
    load_soc,
    shipped_socs,
)

pytestmark = pytest.mark.unit

GOOD = """
name = "Toy"
[settings.use]
about = "what ram holds"
default = "tiles"
[settings.use.choices.tiles]
"memories.ram.role" = "tiles"
[settings.use.choices.weights]
"memories.ram.role" = "weights"
"memories.spare.role" = "tiles"
[settings.flash_size]
about = "size of the flash"
sets = "memories.flash.capacity"
[memories.flash]
role = "weights"
link = "dma"
capacity = { value = 1.5, unit = "KiB", kind = "stated", source = "data sheet" }
[memories.ram]
role = "tiles"
link = "dma"
capacity = { value = 1000, unit = "B", kind = "stated", source = "data sheet" }
[memories.spare]
role = "staging"
link = "dma"
capacity = { value = 2, unit = "KiB", kind = "stated", source = "data sheet" }
reserved = { value = 1, unit = "KiB", kind = "stated", source = "data sheet" }
[memories.scratch]
role = "working"
link = "dma"
capacity = { value = 1, unit = "MiB", low = 1, high = 1, kind = "assumed", source = "a guess" }
[engines.core]
kind = "cores"
operators = ["linear", "norm"]
skips_zeros = true
group_scales = true
source = "data sheet"
[engines.core.throughput]
8 = { value = 4, unit = "MAC/cycle", kind = "stated", source = "data sheet" }
[layout]
name = "packed"
source = "ours"
scale = { value = 16, unit = "bit", kind = "stated", source = "ours" }
scale_per = "group"
zero_points = true
patterns = true
[constants]
tile_output_channels = { value = 4, low = 4, high = 8, unit = "channels", kind = "assumed", source = "a guess" }
tile_buffers = { value = 1, unit = "buffers", kind = "stated", source = "ours" }
dma = { value = 8, unit = "B/cycle", kind = "stated", source = "data sheet" }
"""


def _faults(folder: Path, text: str) -> list[str]:
    path = folder / "toy.toml"
    path.write_text(text)
    with pytest.raises(PlanError) as caught:
        load_soc(str(path))
    head, *faults = str(caught.value).splitlines()
    assert str(path) in head and head.startswith("1 fault " if len(faults) == 1 else f"{len(faults)} faults ")
    return faults


def test_siracusa_has_the_memories_of_the_thesis() -> None:
    soc = load_soc("siracusa")
    found = {memory.name: (memory.role, memory.capacity_bytes) for memory in soc.memories}
    assert found == {
        "MRAM": ("weights", 4_194_304),
        "SRAM": ("tiles", 4_194_304),
        "L1": ("working", 262_144),
        "L2": ("staging", 2_097_152),
        "HyperRAM": ("off_chip", 64_000_000),
    }
    assert "disagree" in soc.with_role("tiles")[0].note
    assert (soc.count("tile_output_channels"), soc.count("tile_buffers")) == (32, 2)
    assert soc.with_role("staging")[0].reserved_bytes == 2 * 2**20 - 1_024_000
    assert soc.accelerator and not soc.accelerator.skips_zeros and not soc.accelerator.group_scales
    # the 1x1 mode gains nothing from narrow weights
    assert {soc.accelerator.throughput[bits].value for bits in (2, 4, 8)} == {1152}
    assert soc.constants["linear_macs"].value == 1152 and soc.constants["cluster_macs"].value == 32


def test_the_accelerators_own_layout_differs_in_nothing_else() -> None:
    plain, own = load_soc("siracusa"), load_soc("siracusa-neureka")
    assert (own.memories, own.constants, own.engines) == (plain.memories, plain.constants, plain.engines)
    assert (own.layout.slot_bits, own.layout.input_block, own.layout.scale_per) == (8, 32, "channel")
    assert not own.layout.patterns and plain.layout.patterns and plain.layout.slot_bits is None


def test_gap9_has_the_vendors_memories() -> None:
    soc = load_soc("gap9")
    assert [(m.role, m.capacity_bytes) for m in soc.memories][:3] == [
        ("weights", 2 << 20),
        ("tiles", 1_572_864),
        ("working", 128 << 10),
    ]


def test_every_shipped_file_loads_and_states_only_sourced_numbers() -> None:
    chips = ["ensemble-e8", "esp32-s3", "gap9", "phone", "rp2350", "siracusa", "siracusa-neureka", "stm32n6"]
    assert shipped_socs() == chips
    for name in chips:
        soc = load_soc(name)
        parts = [x for m in soc.memories for x in (m.capacity, m.reserved, m.latency, m.bandwidth, m.address) if x]
        numbers = [*soc.constants.values(), *parts, *(t for e in soc.engines for t in e.throughput.values())]
        assert all(number.kind in KINDS and number.source and number.unit for number in numbers)
        assert all(x.low is not None and x.high is not None for x in numbers if x.kind == "assumed")
        assert set(soc.constants) <= set(CONSTANT_UNITS)
        assert all(soc.runs(operator) for operator in OPERATORS)
        assert f"`{name}`" in (SHIPPED / "SCHEMA.md").read_text()  # how sure each chip's numbers are


@pytest.mark.parametrize("preset", ["stories260k", "smollm2-135m"])
@pytest.mark.parametrize("name", shipped_socs())
def test_every_shipped_chip_gives_a_verdict_and_a_time_or_why_there_is_none(name: str, preset: str) -> None:
    soc, shape = load_soc(name), with_bits(shape_from_config(PRESETS[preset]), 8)
    verdict = check(shape, soc, context=64, timing=True)
    assert verdict.fits is not bool(verdict.needs.short(soc)) and verdict.summary.startswith("llama ")
    if isinstance(verdict.timing, str):
        lacks = missing_constants(soc)
        assert verdict.timing.startswith("No time is estimated: ") and (
            all(word in verdict.timing for word in lacks) if lacks else "nowhere to stream from" in verdict.timing
        )
    else:
        decode = verdict.timing.decode
        assert 0 < decode.bound_seconds.low <= decode.seconds.low <= decode.seconds.default <= decode.seconds.high


def test_every_choice_of_a_shipped_chip_loads_and_has_a_verdict() -> None:
    shape = shape_from_config(PRESETS["stories260k"])
    for name in shipped_socs():
        for setting in load_soc(name).settings:
            for choice in setting.choices:
                soc = load_soc(name, [f"{setting.name}={choice}"])
                assert check(shape, soc, context=16).fits, soc.label
                # what lies in a volatile memory must have been somewhere before
                assert soc.with_role("weights") and {m.role for m in soc.memories} <= set(ROLES)


# --- settings --------------------------------------------------------------------------------------------------


def test_the_role_of_the_sram_is_a_setting() -> None:
    soc = load_soc("siracusa", ["sram_role=weights", "hyperram=16MiB"])
    assert [m.name for m in soc.with_role("weights")] == ["MRAM", "SRAM"]
    assert [m.name for m in soc.with_role("tiles")] == ["L2"] and soc.with_role("staging") == ()
    assert soc.with_role("off_chip")[0].capacity_bytes == 16 << 20
    assert soc.with_role("off_chip")[0].capacity.source == "given by the user"
    assert soc.label == "Siracusa (sram_role=weights, hyperram=16MiB)"
    assert load_soc("siracusa:sram_role=weights,hyperram=16MiB") == soc
    assert load_soc("siracusa:sram_role=tiles") == load_soc("siracusa") and load_soc("siracusa").label == "Siracusa"


def test_a_number_keeps_its_unit_where_none_is_given() -> None:
    assert load_soc("siracusa", ["hyperram=8000000"]).with_role("off_chip")[0].capacity_bytes == 8_000_000
    assert load_soc("siracusa", ["kv_copies=2"]).count("kv_cache_copies") == 2


def test_bad_settings_come_at_once_and_list_those_there_are() -> None:
    wanted = ["colour=red", "sram_role=flash", "hyperram=-3 MiB", "kv_copies=1.5", "hyperram_bandwidth", "kv_copies=x"]
    with pytest.raises(PlanError) as caught:
        load_soc("siracusa", wanted)
    text = str(caught.value)
    assert "there is no setting 'colour'" in text and "sram_role (tiles|weights; tiles)" in text and "hyperram" in text
    for words in (
        "there is no 'flash'; choose tiles or weights",
        "-3 MiB must be above 0",
        "'x' is not a number",
        "'hyperram_bandwidth': write name=value",
    ):
        assert words in text
    with pytest.raises(PlanError, match=r"1\.5 copies must be a whole number"):
        load_soc("siracusa", ["kv_copies=1.5"])


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('sets = "memories.flash.capacity"', 'sets = "memories.flush.capacity"', "is no number of this file"),
        ('default = "tiles"', 'default = "tile"', "the default 'tile' is not among its choices"),
        ('"memories.ram.role" = "weights"', '"memories.rom.role" = "weights"', "names nothing in this file"),
        ('about = "size of the flash"', "", "'about' is missing"),
    ],
)
def test_a_bad_setting_of_the_file_is_a_fault(tmp_path: Path, old: str, new: str, fault: str) -> None:
    assert old in GOOD
    path = tmp_path / "toy.toml"
    path.write_text(GOOD.replace(old, new, 1))
    with pytest.raises(PlanError, match=fault):
        load_soc(str(path), ["use=weights"])


# --- files -----------------------------------------------------------------------------------------------------


def test_a_file_based_on_a_shipped_one_holds_only_what_differs(tmp_path: Path) -> None:
    path = tmp_path / "board.toml"
    path.write_text(
        'based_on = "siracusa"\nname = "Board"\n[memories.HyperRAM]\n'
        'capacity = { value = 8, unit = "MiB", kind = "stated", source = "the board" }\n'
    )
    soc, base = load_soc(str(path)), load_soc("siracusa")
    assert soc.name == "Board" and soc.with_role("off_chip")[0].capacity_bytes == 8 << 20
    assert soc.with_role("off_chip")[0].capacity.high is None  # no bound of the old number stays behind
    assert soc.constants == base.constants and soc.memories[:4] == base.memories[:4]
    path.write_text('based_on = "sirakusa"\n')
    with pytest.raises(
        PlanError, match=r"based_on 'sirakusa' is not a chip known here \(near: siracusa.*\); shipped are ensemble-e8"
    ):
        load_soc(str(path))


def test_the_schema_names_what_the_reader_takes() -> None:
    text = (SHIPPED / "SCHEMA.md").read_text()
    for word in (*OPERATORS, *ROLES, *KINDS, *ENGINE_KINDS, *LINKS, UNKNOWN, *REQUIRED_CONSTANTS):
        assert f"`{word}`" in text, word


def test_name_in_any_case_or_path_give_the_same_chip(tmp_path: Path) -> None:
    copy = tmp_path / "mine.toml"
    copy.write_bytes((SHIPPED / "siracusa.toml").read_bytes())
    assert load_soc("Siracusa") == load_soc(str(copy)) == load_soc("siracusa")


def test_a_small_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(GOOD)
    soc = load_soc(str(path))
    assert [memory.capacity_bytes for memory in soc.memories] == [1536, 1000, 2048, 1 << 20]
    turned = load_soc(str(path), ["use=weights", "flash_size=2KiB"])
    assert [m.name for m in turned.with_role("weights")] == ["flash", "ram"]
    assert turned.with_role("weights")[0].capacity_bytes == 2048 and turned.with_role("tiles")[0].name == "spare"
    assert soc.accelerator is None and soc.count("kv_cache_copies") is None


@pytest.mark.parametrize("asked", ["sirakusa", "no/such/folder", "missing.toml", ""])
def test_unknown_name_lists_those_shipped(asked: str) -> None:
    with pytest.raises(PlanError, match=r"shipped are ensemble-e8, esp32-s3, gap9, phone"):
        load_soc(asked)


def test_broken_toml_names_file_and_line(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_text('name = "Toy"\nmemories = [}\n')
    with pytest.raises(PlanError, match=r"toy\.toml cannot be read as TOML: .*line 2"):
        load_soc(str(path))


def test_all_faults_come_at_once(tmp_path: Path) -> None:
    text = """
    name = "Toy"
    colour = "red"
    [memories.flash]
    role = "wieghts"
    link = "dam"
    capacity = { value = 0, unit = "B", kind = "stated", source = "data sheet" }
    [memories.ram]
    role = "tiles"
    link = "dma"
    capacity = { value = -5, kind = "guessed" }
    speed = 3
    [memories.scratch]
    role = "working"
    [memories.other]
    role = "working"
    link = "weight_link"
    capacity = 12
    [engines.X]
    kind = "npu"
    operators = ["matmull"]
    skips_zeros = "no"
    group_scales = true
    source = ""
    [engines.X.throughput]
    zero = { value = 4, unit = "MAC/cycle", kind = "stated", source = "x" }
    [layout]
    name = "own"
    source = "x"
    scale = { value = 16, unit = "B", kind = "stated", source = "x" }
    scale_per = "row"
    zero_points = 1
    [constants]
    tile_output_channel = { value = 4, unit = "channels", kind = "stated", source = "x" }
    tile_buffers = { value = 1.5, unit = "buffers", kind = "stated", source = "x" }
    clock = { value = 3, low = 4, unit = "MHz", kind = "stated", source = "x" }
    dma = { value = 8, unit = "B/cycle", kind = "assumed", source = "x" }
    """
    faults = _faults(tmp_path, text)
    expected = [
        "unknown key 'colour'",
        "memories.flash: unknown role 'wieghts'",
        "memories.flash: unknown link 'dam'",
        "memories.flash.capacity: 0 B must be above 0",
        "memories.ram: unknown key 'speed'",
        "memories.ram.capacity: 'unit' is missing",
        "memories.ram.capacity: 'source' is missing",
        "memories.ram.capacity: kind 'guessed'",
        "memories.ram.capacity: -5 must be above 0",
        "memories.scratch: 'capacity' is missing",
        "memories.scratch: 'link' is missing",
        "memories.other.capacity must be a table",
        "memories.other: its link 'weight_link' is not among the constants",
        "no memory has the role 'weights'",
        "more than one memory has the role 'working'",
        "engines.X: unknown kind 'npu'",
        "engines.X: unknown operator 'matmull'",
        "engines.X: 'skips_zeros' must be true or false",
        "engines.X: 'source' must be a text",
        "engines.X.throughput: 'zero' is no weight width",
        "no engine lists the operator 'linear'",
        "layout: 'patterns' is missing",
        "layout.scale: unit 'B' is not bit",
        "layout: scale_per 'row' is not group or channel",
        "layout: 'zero_points' must be true or false",
        "constants: unknown key 'tile_output_channel' (near: tile_output_channels)",
        "constants: 'tile_output_channels' is missing",
        "constants.tile_buffers: 1.5 buffers must be a whole number",
        "constants.clock: unit 'MHz' is not Hz",
        "constants.clock: value 3 lies outside",
        "constants.dma: what is assumed needs 'low' and 'high'",
    ]
    for start in expected:
        assert sum(start in fault for fault in faults) == 1, start
    assert len(faults) == len(expected), [f for f in faults if not any(start in f for start in expected)]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ('name = "Toy"', "name = 3", "'name' must be a text"),
        ('name = "Toy"', "", "'name' is missing"),
        ("value = 1000", "value = nan", "'value' must be a finite number"),
        ("value = 1000", "value = true", "'value' must be a finite number"),
        ("value = 1000", 'value = "1000"', "'value' must be a finite number"),
        ("value = 1000", "value = 1000.5", "must be a whole number"),
        ('unit = "KiB"', 'unit = "KB"', "unit 'KB' is not"),
        ('"memories.ram.role" = "tiles"', '"memories.ram.role" = "staging"', "no memory has the role 'tiles'"),
        ("[memories.ram]", "[memories.ram.bank]", "unknown key 'bank'"),
    ],
)
def test_each_fault_alone_is_found(tmp_path: Path, old: str, new: str, fault: str) -> None:
    assert old in GOOD
    assert any(fault in line for line in _faults(tmp_path, GOOD.replace(old, new)))


@pytest.mark.parametrize("key", ["memories", "constants", "engines", "layout", "settings"])
def test_a_table_that_is_none(tmp_path: Path, key: str) -> None:
    text = f'name = "Toy"\n{key} = 4\n'
    assert any(f"'{key}' must be a table" in line for line in _faults(tmp_path, text))


def test_an_empty_file_misses_what_it_must_have(tmp_path: Path) -> None:
    faults = "\n".join(_faults(tmp_path, ""))
    for key in ("name", "memories", "engines", "layout", "constants"):
        assert f"'{key}' is missing" in faults


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            '[memories.MRAM.capacity]\nvalue = 1e300\nunit = "MiB"\nkind = "stated"\nsource = "s"\n',
            "more than any chip has",
        ),
        (
            '[memories.SRAM.address]\nvalue = 0x107ffffc\nunit = "address"\nkind = "stated"\nsource = "s"\n',
            "memories.MRAM and memories.SRAM have addresses in common",
        ),
        (
            '[memories.mram]\nrole = "weights"\nlink = "weight_link"\n'
            'capacity = { value = 8, unit = "MiB", kind = "stated", source = "s" }\n',
            "memories.MRAM and memories.mram differ in the case of their letters alone",
        ),
    ],
)
def test_memories_that_no_chip_has_are_refused(tmp_path: Path, changes: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(f'based_on = "siracusa"\nname = "mine"\n{changes}')
    with pytest.raises(PlanError, match=words):
        load_soc(str(path))
