"""A checkpoint folder's manifest, its fingerprint, and safe writing and naming of files.

A stage's folder counts as finished only once `manifest.json` lies in it; the manifest is written last and
atomically. It lists the sha256 of every file and carries one over itself, so an edit or a flipped bit anywhere is
found. Names that a file states never lead out of the folder it lies in. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.errors import CheckpointError

FORMAT = 2
MANIFEST = "manifest.json"
PARTIAL = ".partial"  # ends the name of a file being written, which a kill may leave behind
MARKER = ".edgepress"  # lies in every output folder of ours
WORK = ".work"  # a stage's durable progress, gone once the manifest is there
SEAL = "sha256"  # the key under which a JSON object carries the hash of the rest of it

_FOLDERS = ("adapter", "edge", "scaling", "additional_chat_templates")  # of a checkpoint, beside the files at its top
_READ = {".json", ".safetensors", ".model", ".jinja", ".txt", ".tiktoken", ".factors", ".spm"}
_STAGE_FOLDER = re.compile(r"\d+-.+-[0-9a-f]{8}")
_MOST_BYTES = 2**26  # of a manifest; one of 10,000 files takes 2 MiB


@dataclass
class Manifest:
    stage: str
    stage_version: int
    options: dict[str, Any]
    fingerprint: str
    parent: dict[str, str] | None  # {"path", "fingerprint"}; the path is relative where both lie in one store
    seed: int
    dtype: str
    device: str
    calibration: dict[str, Any] | None
    parameters_total: int
    parameters_nonzero: int
    sparsity: dict[str, Any] | None
    file_bytes: int
    packed_bytes: int  # of the image that `compress pack` writes
    seconds: float
    peak_memory_bytes: int
    versions: dict[str, str]
    files: dict[str, dict[str, Any]]  # name -> {"bytes", "sha256"}
    origin: dict[str, Any] = field(default_factory=dict)  # the uncompressed model and which of its blocks are left
    quality: dict[str, Any] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    format: int = FORMAT

    def write(self, folder: Path) -> None:
        write_json(folder / MANIFEST, sealed(asdict(self)))

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Raises CheckpointError where the file is missing, unreadable, changed since, or of another format."""
        path = folder / MANIFEST
        if not path.is_file():
            raise CheckpointError(
                f"{folder} holds no {MANIFEST}: it was never finished, or is not a checkpoint of ours"
            )
        require_inside(folder, [MANIFEST], "a checkpoint")
        if path.stat().st_size > _MOST_BYTES:
            raise CheckpointError(f"{path} is damaged (no manifest has {path.stat().st_size} bytes); move it away")
        return cls.parse(path.read_bytes(), str(path))

    @classmethod
    def parse(cls, content: bytes, path: str) -> Manifest:
        """From the file's bytes; `path` names it in errors. Raises CheckpointError."""
        try:
            data = json.loads(content)
            if data["format"] != FORMAT:
                raise CheckpointError(f"{path} has format {data['format']}; this version reads format {FORMAT}")
            holds, stated = seal_holds(data), data.pop(SEAL, None)
            manifest = cls(**data)
            _require_kinds(manifest)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"{path} is damaged ({error}); move the folder away to compute it again") from None
        for name in manifest.files:
            require_name(name, path)
        if not holds:
            why = "it does not have the sha256 that it states of itself" if stated else "it states no sha256 of itself"
            raise CheckpointError(
                f"{path} is damaged or was edited: {why}. "
                "It was neither used nor removed; move the folder away to compute it again"
            )
        return manifest


def _require_kinds(manifest: Manifest) -> None:
    """Raise TypeError where what the manifest leads to is not of the kind that it should be."""
    parent = manifest.parent
    if parent is not None and not (isinstance(parent["path"], str) and isinstance(parent["fingerprint"], str)):
        raise TypeError("parent is no path and fingerprint")
    for name, facts in manifest.files.items():
        if not (isinstance(facts["bytes"], int) and isinstance(facts["sha256"], str)):
            raise TypeError(f"{name} has no size and hash")
    if not (isinstance(manifest.fingerprint, str) and isinstance(manifest.options, dict)):
        raise TypeError("fingerprint or options are of another kind")
    if manifest.sparsity is not None and not isinstance(manifest.sparsity["pattern"], str):
        raise TypeError("sparsity is no pattern")


def fingerprint(
    parent: str, stage: str, version: int, options: Mapping[str, Any], calibration: str | None, seed: int, dtype: str
) -> str:
    """Sha256 over everything that decides a stage's output; equal fingerprints mean equal bytes."""
    facts = [FORMAT, parent, stage, version, dict(options), calibration, seed, dtype]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and hash of every file of a checkpoint, the manifest, work in progress and cut writes left out."""
    return {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": sha256_file(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and path.name != MANIFEST
        and path.suffix != PARTIAL
        and path.relative_to(folder).parts[0] != WORK
    }


def check_files(folder: Path, manifest: Manifest, hashes: bool) -> None:
    """Raise CheckpointError naming the folder and file if anything differs from what the manifest lists."""
    require_inside(folder, manifest.files, str(folder / MANIFEST))
    for name, facts in manifest.files.items():
        path = folder / name
        if not path.is_file():
            fault = "is missing"
        elif path.stat().st_size != facts["bytes"]:
            fault = f"has {path.stat().st_size} bytes, the manifest says {facts['bytes']}"
        elif hashes and sha256_file(path) != facts["sha256"]:
            fault = "does not have the sha256 that the manifest says"
        else:
            continue
        raise CheckpointError(
            f"the checkpoint {folder} is damaged: {name} {fault}. "
            "It was neither used nor removed; move it away and run the same command to compute it again."
        )


# --- names and links that stay in the folder -------------------------------------------------------------------------


def require_name(name: object, told_by: str) -> str:
    """`name`, if it can only name something in a folder. Raises CheckpointError naming the file that states it.

    It is relative, its parts are neither empty nor `.` nor `..`, and it has no backslash, drive or control character.
    """
    if (
        not isinstance(name, str)
        or any(part in ("", ".", "..") for part in name.split("/"))
        or re.search(r"[\x00-\x1f\x7f\\]|^[A-Za-z]:", name)
    ):
        raise CheckpointError(
            f"{told_by} names a file {str(name)[:200]!r}, which does not lie in its folder; nothing was read from there"
        )
    return name


def require_inside(folder: Path, names: Iterable[object], told_by: str) -> None:
    """Raise CheckpointError for the first of `names` that is none of a file in `folder`, or a link out of it.

    told_by: the file that states the names. Links are followed within the folder, and from a snapshot in the hub's
    cache (`snapshots/REVISION/NAME`) to the `blobs` beside it, which is how that cache keeps its files.
    """
    for name in dict.fromkeys(require_name(name, told_by) for name in names):
        _require_no_way_out(folder / name, folder)


def require_own_links(folder: Path) -> None:
    """Raise CheckpointError where a file that a model is read from is a link out of its folder, or no file.

    All JSON, safetensors, tokenizer and template files at the top; `adapter`, `edge` and `scaling` with all in them.
    """
    try:
        entries = [e for e in os.scandir(folder) if e.name in _FOLDERS or Path(e.name).suffix in _READ]
    except OSError:
        return  # no folder: whoever opens it says so
    for entry in entries:
        if entry.is_symlink():
            _require_no_way_out(Path(entry.path), folder)
        if entry.name not in _FOLDERS and not entry.is_file() and not entry.is_dir() and not entry.is_symlink():
            raise CheckpointError(f"{entry.path} is a device, pipe or socket, where a model's file would be")
        if entry.name in _FOLDERS and entry.is_dir():
            for path in Path(entry.path).iterdir():
                _require_no_way_out(path, folder)


def require_no_links_out(folder: Path) -> None:
    """Raise CheckpointError where anything in a folder of ours, however deep, is a link out of it."""
    for home, folders, files in os.walk(folder):
        for path in (Path(home) / name for name in (*folders, *files)):
            if path.is_symlink():
                _require_no_way_out(path, folder)


def require_finished(folder: Path) -> None:
    """Raise CheckpointError for a folder in which a stage is still at work, or was when it was stopped.

    In a store such a folder has no manifest, whatever else it has: without one it would pass for a model from outside.
    """
    if (folder / MANIFEST).is_file():
        return
    if (folder / WORK).is_dir():
        raise CheckpointError(f"{folder} is a checkpoint still being written; run its command again to finish it")
    real = folder.resolve()
    if _STAGE_FOLDER.fullmatch(real.name) and (real.parent / MARKER).is_file():
        raise CheckpointError(
            f"{real} is a stage's folder without {MANIFEST}: it was never finished, or the file was removed. Move the "
            "folder away and run its command again to compute it"
        )


def _require_no_way_out(path: Path, folder: Path) -> None:
    home = folder.resolve()
    allowed = [home]
    if home.parent.name == "snapshots":
        allowed.append(home.parent.parent / "blobs")
    try:
        real = path.resolve()
    except (OSError, RuntimeError):  # links in a circle
        real = Path("/")
    if not any(real.is_relative_to(place) for place in allowed):
        raise CheckpointError(
            f"{path} is a link out of its folder, to {os.readlink(path) if path.is_symlink() else real}; it was not "
            "followed. Put the file itself there"
        )


# --- hashes that JSON carries of itself ------------------------------------------------------------------------------


def seal_of(data: Any, about: str = "") -> str:
    """Sha256 over a value as JSON, whatever the order of its keys; about: what else it belongs to."""
    same = json.loads(json.dumps(data))  # as a reader will have it: keys are strings
    return hashlib.sha256((about + json.dumps(same, sort_keys=True)).encode()).hexdigest()


def sealed(data: Mapping[str, Any], about: str = "") -> dict[str, Any]:
    """The object with the hash of itself under `sha256`."""
    rest = {key: value for key, value in data.items() if key != SEAL}
    return rest | {SEAL: seal_of(rest, about)}


def seal_holds(data: Mapping[str, Any], about: str = "") -> bool:
    """Whether an object is as it was sealed; one whose hash is gone is not."""
    return isinstance(data, Mapping) and SEAL in data and bool(sealed(data, about)[SEAL] == data[SEAL])


# --- writing ---------------------------------------------------------------------------------------------------------


def write_json(path: Path, data: Any) -> None:
    write_bytes(path, (json.dumps(data, indent=2) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write as `replacing` does."""
    with replacing(path) as file:
        file.write(data)


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write that becomes `path` at the end: whoever looks sees the old file or the whole new one.

    That holds after a power cut too; after an error or Ctrl-C nothing is left. A device, pipe or socket is never
    replaced: what was written is sent to it at the end. Raises CheckpointError where `path` is a folder or lies in
    none, and OSError naming the path.
    """
    path = Path(path)
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file to write")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: there is no folder {path.parent}")
    try:
        if is_special(path):
            with tempfile.TemporaryFile() as spool:
                yield spool
                spool.seek(0)
                _send(spool, path)
            return
        with drafted(path) as draft, draft.open("wb") as file:
            yield file
    except OSError as error:
        if error.errno is not None and error.filename is None:
            error.filename = str(path)
        raise


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """The path of a draft beside `path`, which whoever enters writes, and which becomes `path` at the end.

    Its bytes reach the disk before it takes the name. After an error or Ctrl-C the draft is removed. Raises
    CheckpointError for a device or pipe, which a draft would replace, and OSError naming `path`, not the draft.
    """
    if is_special(path):
        raise CheckpointError(f"{path} is a device or pipe; name a file to write")
    draft = path.with_name(f".{path.name}{PARTIAL}")
    with _named(path, draft), interrupts.or_undone(partial(_remove, draft)):
        yield draft
        with draft.open("rb+") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    sync_folder(path.parent)


def _remove(draft: Path) -> None:
    with suppress(OSError):
        draft.unlink(missing_ok=True)


@contextmanager
def drafted_folder(folder: Path) -> Iterator[Path]:
    """A new folder beside `folder`, which takes its place at the end, also of an older one.

    Folders above it are made. After an error or Ctrl-C neither the draft nor these are left. Raises CheckpointError
    for the current folder, in which a shell would see nothing of its successor, and OSError naming `folder`.
    """
    place = folder.resolve()
    if place == Path.cwd():
        raise CheckpointError(f"{folder} is the current folder, which cannot be replaced; name a new folder with -o")
    draft = place.with_name(f".{place.name}{PARTIAL}")
    remove = partial(shutil.rmtree, draft, ignore_errors=True)
    remove()
    with _named(folder, draft), folders_above(place), interrupts.or_undone(remove):
        draft.mkdir()
        yield draft
        shutil.rmtree(place, ignore_errors=True)
        draft.replace(place)
    sync_folder(place.parent)


@contextmanager
def folders_above(path: Path) -> Iterator[None]:
    """Make the folders that `path` lies in; after an error or Ctrl-C those that were made and are empty go again."""
    made = [folder for folder in path.absolute().parents if not folder.exists()]  # the innermost first

    def remove() -> None:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()

    with interrupts.or_undone(remove):
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        yield


@contextmanager
def _named(path: Path, draft: Path) -> Iterator[None]:
    """Within, an error of the operating system about the draft, or what is in it, names what it is a draft of."""
    try:
        yield
    except OSError as error:
        if isinstance(error.filename, str) and Path(error.filename).is_relative_to(draft):
            error.filename = str(path / Path(error.filename).relative_to(draft))
            error.filename2 = None
        raise


def require_output(path: Path) -> None:
    """Raise CheckpointError before long work where its result could not be written to `path`, whose folder is made."""
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder; name a file to write")
    require_place(path)


def require_place(path: Path) -> None:
    """Raise CheckpointError where no file or folder can be made at `path`; folders above it may be missing.

    Permissions do not tell for root, or in /proc: a file without a name is made in the nearest folder that is there.
    """
    if is_special(path):
        return
    above = path if path.is_dir() else next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise CheckpointError(f"{path} cannot be written: {above} is a file, not a folder")
    try:
        with tempfile.TemporaryFile(dir=above):
            pass
    except OSError as error:
        where = "" if above == path else f" in {above}"
        raise CheckpointError(
            f"{path} cannot be written: no file can be made{where} ({error.strerror}); name another place with -o"
        ) from None


def is_special(path: Path) -> bool:
    """Whether a path is a device, pipe or socket, or a process's own stream such as /dev/stdout."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return False
    if not stat.S_ISREG(mode):
        return not stat.S_ISDIR(mode)
    home = path.parent.resolve()  # /dev/fd and /dev/stdout lead to a file where the shell redirected to one
    return path.is_symlink() and any(home.is_relative_to(place) for place in ("/dev", "/proc"))


def _send(draft: IO[bytes], path: Path) -> None:
    # Opened so, a pipe that nobody reads is an error and not a wait without end.
    handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK | getattr(os, "O_NOCTTY", 0))
    os.set_blocking(handle, True)
    with open(handle, "wb", closefd=True) as file:
        shutil.copyfileobj(draft, file)


def remove_partial(folder: Path) -> None:
    """Remove the cut writes that a process killed at once left in a folder that only we write to."""
    for path in folder.rglob(f".*{PARTIAL}"):
        if path.is_file() and not path.is_symlink():
            path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make a rename in this folder durable."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
