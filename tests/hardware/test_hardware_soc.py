"""SoC files: what ships is right, and a bad file is told everything at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints.errors import PlanError
from hardware.soc import CONSTANT_UNITS, KINDS, SHIPPED, load_soc, shipped_socs

pytestmark = pytest.mark.unit

GOOD = """
name = "Toy"
[memories.flash]
role = "weights"
capacity = { value = 1.5, unit = "KiB", kind = "stated", source = "data sheet" }
[memories.ram]
role = "tiles"
capacity = { value = 1000, unit = "B", kind = "stated", source = "data sheet" }
[memories.scratch]
role = "working"
capacity = { value = 1, unit = "MiB", kind = "assumed", source = "a guess" }
[constants]
tile_output_channels = { value = 4, unit = "channels", kind = "assumed", source = "a guess" }
tile_buffers = { value = 1, unit = "buffers", kind = "assumed", source = "a guess" }
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
        "tile memory": ("tiles", 4_194_304),
        "L1": ("working", 262_144),
        "L2": ("staging", 2_097_152),
        "HyperRAM": ("off_chip", 64_000_000),
    }
    assert "disagree" in soc.with_role("tiles")[0].note
    assert (soc.count("tile_output_channels"), soc.count("tile_buffers")) == (32, 2)
    assert soc.count("staging_reserved") == 2 * 2**20 - 1_024_000
    assert soc.accelerator and not soc.accelerator.skips_zeros and not soc.accelerator.group_scales


def test_every_shipped_file_loads_and_states_only_sourced_numbers() -> None:
    assert shipped_socs() == ["siracusa"]
    for name in shipped_socs():
        soc = load_soc(name)
        numbers = [*soc.constants.values(), *(memory.capacity for memory in soc.memories)]
        assert all(number.kind in KINDS and number.source for number in numbers)
        assert set(soc.constants) <= set(CONSTANT_UNITS)


def test_name_in_any_case_or_path_give_the_same_chip(tmp_path: Path) -> None:
    copy = tmp_path / "mine.toml"
    copy.write_bytes((SHIPPED / "siracusa.toml").read_bytes())
    assert load_soc("Siracusa") == load_soc(str(copy)) == load_soc("siracusa")


def test_a_small_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "toy.toml"
    path.write_text(GOOD)
    soc = load_soc(str(path))
    assert [memory.capacity_bytes for memory in soc.memories] == [1536, 1000, 1 << 20]
    assert soc.accelerator is None and soc.count("kv_cache_copies") is None


@pytest.mark.parametrize("asked", ["sirakusa", "no/such/folder", "missing.toml", ""])
def test_unknown_name_lists_those_shipped(asked: str) -> None:
    with pytest.raises(PlanError, match=r"shipped are siracusa"):
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
    capacity = { value = 0, unit = "B", kind = "stated", source = "data sheet" }
    [memories.ram]
    role = "tiles"
    capacity = { value = -5, kind = "guessed" }
    speed = 3
    [memories.scratch]
    role = "working"
    [memories.other]
    role = "working"
    capacity = 12
    [accelerator]
    name = "X"
    skips_zeros = "no"
    group_scales = true
    source = ""
    [constants]
    tile_output_channel = { value = 4, unit = "channels", kind = "stated", source = "x" }
    tile_buffers = { value = 1.5, unit = "buffers", kind = "stated", source = "x" }
    clock = { value = 3, low = 4, unit = "MHz", kind = "stated", source = "x" }
    """
    faults = _faults(tmp_path, text)
    expected = [
        "unknown key 'colour'",
        "memories.flash: unknown role 'wieghts'",
        "memories.flash.capacity: 0 B must be above 0",
        "memories.ram: unknown key 'speed'",
        "memories.ram.capacity: 'unit' is missing",
        "memories.ram.capacity: 'source' is missing",
        "memories.ram.capacity: kind 'guessed'",
        "memories.ram.capacity: -5 must be above 0",
        "memories.scratch: 'capacity' is missing",
        "memories.other.capacity must be a table",
        "no memory has the role 'weights'",
        "more than one memory has the role 'working'",
        "constants: unknown key 'tile_output_channel'",
        "constants: 'tile_output_channels' is missing",
        "constants.tile_buffers: 1.5 buffers must be a whole number",
        "constants.clock: unit 'MHz' is not Hz",
        "constants.clock: value 3 lies outside",
        "accelerator: 'skips_zeros' must be true or false",
        "accelerator: 'source' must be a text",
    ]
    for start in expected:
        assert sum(start in fault for fault in faults) == 1, start
    assert len(faults) == len(expected)


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
        ('role = "tiles"', 'role = "working"', "no memory has the role 'tiles'"),
        ("[memories.ram]", "[memories.ram.bank]", "unknown key 'bank'"),
    ],
)
def test_each_fault_alone_is_found(tmp_path: Path, old: str, new: str, fault: str) -> None:
    assert old in GOOD
    assert any(fault in line for line in _faults(tmp_path, GOOD.replace(old, new)))


@pytest.mark.parametrize("key", ["memories", "constants", "accelerator"])
def test_a_table_that_is_none(tmp_path: Path, key: str) -> None:
    text = f'name = "Toy"\n{key} = 4\n'
    assert any(f"'{key}' must be a table" in line for line in _faults(tmp_path, text))


def test_an_empty_file_misses_what_it_must_have(tmp_path: Path) -> None:
    faults = "\n".join(_faults(tmp_path, ""))
    for key in ("name", "memories", "constants"):
        assert f"'{key}' is missing" in faults
