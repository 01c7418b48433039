"""The output folder, a store of stage folders keyed by fingerprint, and its copy behind a URL.

One command owns the folder at a time; the workers that it starts each claim the stage folder they write.
Both are flocks, which the kernel drops with the process that held them, however it ended.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.errors import CheckpointError, EdgepressError, PlanError, require_unicode
from edgepress.checkpoints.manifest import (
    MANIFEST,
    MARKER,
    SEAL,
    WORK,
    Manifest,
    check_files,
    drafted,
    remove_partial,
    require_inside,
    require_name,
    require_no_links_out,
    require_place,
    seal_holds,
    sealed,
    write_bytes,
    write_json,
)  # fmt: skip

if TYPE_CHECKING:
    from edgepress.checkpoints.checkpoint import Checkpoint

LOCKS, RESULT = ".locks", "result"
REPORT, EARLIER_REPORT = "report.json", "report-earlier.json"


class Store:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def opened(self) -> Iterator[Store]:
        """Create or take over the folder. Raises PlanError if it holds something else or is in use."""
        folder = self.folder
        require_unicode(folder, f"the name of the folder {folder}")
        require_place(folder)
        if folder.exists() and not folder.is_dir():
            raise PlanError(f"{folder} is a file; give a folder with -o")
        if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
            names = ", ".join(sorted(p.name for p in folder.iterdir())[:5])
            raise PlanError(f"{folder} is not an output folder of compress (it holds {names}); choose another with -o")
        folder.mkdir(parents=True, exist_ok=True)
        require_own(folder)
        try:
            lock = FileLock(folder / MARKER, preserve_lock_file=True).acquire(timeout=0)
        except Timeout:
            raise PlanError(f"another compress is writing to {folder}; wait for it, or choose another -o") from None
        with lock:
            remove_partial(folder)
            for draft in folder.glob(".fetched-*"):
                shutil.rmtree(draft, ignore_errors=True)
            with interrupts.or_undone(partial(remove_partial, folder)):  # of workers that were stopped as they wrote
                yield self
            remove_partial(folder)  # of workers that died

    def stage_folder(self, position: int, label: str, fingerprint: str) -> Path:
        return self.folder / f"{position}-{label}-{fingerprint[:8]}"

    @contextmanager
    def claimed(self, folder: Path) -> Iterator[None]:
        """Hold a stage folder for this process; waits while another one computes it."""
        locks = self.folder / LOCKS
        locks.mkdir(parents=True, exist_ok=True)
        with FileLock(locks / folder.name, on_acquired=_sign):
            yield

    def finished(self, folder: Path, fingerprint: str) -> Checkpoint | None:
        """The stage's checkpoint if it is there and sound, None if it is not finished.

        Raises CheckpointError naming a folder that is damaged or was made from something else; such a folder
        is neither reused nor removed.
        """
        require_no_links_out(folder)
        if not (folder / MANIFEST).is_file():
            if folder.is_dir() and not (folder / WORK).is_dir() and any(folder.iterdir()):
                raise CheckpointError(
                    f"{folder} has neither a manifest nor work in progress: it is damaged or not ours. "
                    "It was neither used nor removed; move it away and run the same command again"
                )
            return None
        from edgepress.checkpoints.checkpoint import Checkpoint

        checkpoint = Checkpoint.open(folder, hashes=True)
        if checkpoint.fingerprint != fingerprint:
            raise CheckpointError(
                f"{folder} belongs to another run: its fingerprint is {checkpoint.fingerprint[:12]}, expected "
                f"{fingerprint[:12]}. It was neither used nor removed; move it away and run the same command again"
            )
        shutil.rmtree(folder / WORK, ignore_errors=True)
        return checkpoint

    def result(self) -> Path | None:
        """The last stage's folder of the last run, if that run is finished.

        Raises CheckpointError where `result` does not lead to a folder of this store.
        """
        link = self.folder / RESULT
        if not link.is_symlink() and not link.exists():
            return None
        if not link.is_symlink() or Path(os.readlink(link)).name != os.readlink(link) or not link.is_dir():
            raise CheckpointError(f"{link} is not the link to a stage's folder beside it that compress keeps there")
        require_inside(self.folder, [RESULT], str(self.folder))
        return link.resolve()

    def forget_result(self, coming: Path | None) -> None:
        """At the start of a run: take `result` away unless it is the folder that this run will give.

        The report of the run that gave it is kept under another name. Raises PlanError where `result` is no link.
        """
        link = self.folder / RESULT
        if link.exists() and not link.is_symlink():
            raise PlanError(
                f"{link} is not the link that compress keeps there; move it away, or choose another folder with -o"
            )
        if coming is not None and link.is_symlink() and os.readlink(link) == coming.name:
            return
        link.unlink(missing_ok=True)
        if (self.folder / REPORT).is_file():
            os.replace(self.folder / REPORT, self.folder / EARLIER_REPORT)

    def link_result(self, folder: Path) -> None:
        """Point `result` at the last stage's folder, atomically."""
        temporary = self.folder / ".result.partial"
        temporary.unlink(missing_ok=True)
        with interrupts.or_undone(partial(temporary.unlink, missing_ok=True)):
            temporary.symlink_to(folder.name)
            os.replace(temporary, self.folder / RESULT)

    # --- measurements, which belong to a checkpoint and a protocol, not to a run -----------------------------------

    def measurement(self, key: str, note: Callable[[str], None] = lambda message: None) -> dict[str, Any] | None:
        """What was measured before; None where it was not, or the file is not as it was written, which is told."""
        path = self.folder / "measurements" / f"{key}.json"
        if not path.is_file():
            return None
        try:
            facts: dict[str, Any] = json.loads(path.read_text())
            holds = seal_holds(facts, key)
        except (ValueError, TypeError, RecursionError):
            holds = False
        if not holds:
            note(f"{path} is damaged or was edited; it is measured again")
            return None
        del facts[SEAL]
        return facts

    def keep_measurement(self, key: str, facts: dict[str, Any]) -> None:
        path = self.folder / "measurements" / f"{key}.json"
        path.parent.mkdir(exist_ok=True)
        write_json(path, sealed(facts, key))


def _sign(lock: int) -> None:
    """Write this process's id into a claim's file, for whoever wonders who holds it."""
    os.truncate(lock, 0)
    os.write(lock, str(os.getpid()).encode())


def require_own(folder: Path) -> None:
    """Raise CheckpointError where something in an output folder is a link out of it, through which we would write."""
    if folder.is_dir():
        require_inside(folder, [p.name for p in folder.iterdir() if p.is_symlink() and p.name != RESULT], str(folder))


def is_store(folder: Path) -> bool:
    return (folder / MARKER).is_file()


def checkpoint_folder(named: str | Path) -> Path:
    """The folder that a user names; of an output folder, that of its last run's result.

    Raises CheckpointError where there is no such folder, or its run is not finished.
    """
    folder = Path(named).expanduser()
    if not folder.is_dir():
        what = "is a file, not a folder" if folder.exists() else "there is no such folder"
        raise CheckpointError(f"{folder}: {what}")
    return finished_result(folder) if is_store(folder) else folder


def finished_result(store: Path) -> Path:
    """The folder of the last run's result. Raises CheckpointError where that run is not finished."""
    require_own(store)
    if (result := Store(store).result()) is None:
        raise CheckpointError(
            f"{store} has no result yet: its run is not finished. Run its command again to finish it, or name a "
            "stage's folder in it"
        )
    return result


def open_model(named: str | None) -> Checkpoint:
    """The model that a user names: what `open_source` takes, or an output folder, which stands for its result."""
    from edgepress.checkpoints.sources import open_source

    return open_source(str(checkpoint_folder(named)) if named and is_store(Path(named).expanduser()) else named)


def require_apart(model: str | None, out: Path) -> None:
    """Raise PlanError where a run's output folder is its model too: each run would start from the last one's result."""
    if model and is_store(folder := Path(model).expanduser()) and folder.resolve() == out.resolve():
        raise PlanError(f"--model {model} is the output folder itself; choose another -o, or name a stage's folder")


# --- a store behind a URL ---------------------------------------------------------------------------------------------
# A store behind an fsspec URL: finished stage folders are sent there, and fetched to where work is done.


_SHARED_FOLDERS = ("measurements", "calibration")
_MOST_BYTES = 2**26  # of a manifest


class Mirror:
    """One output folder on this machine and its counterpart at a URL; stages in the work stay here.

    The manifest is sent last, so a folder that is seen with one is whole: the rule of the store itself.
    """

    def __init__(self, url: str, folder: Path) -> None:
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise PlanError("a store at a URL needs fsspec: pip install 'edgepress[ray]'") from None
        try:
            self.files, self.root = url_to_fs(url)
        except (ImportError, ValueError) as error:  # a protocol whose package is missing, or one nobody knows
            raise PlanError(f"--store {url}: {error}") from None
        self.url, self.folder = url, folder
        folder.mkdir(parents=True, exist_ok=True)

    def check(self) -> None:
        """Raise PlanError where the URL cannot be written."""
        probe = f"{self.root}/.edgepress"
        try:
            self.files.makedirs(self.root, exist_ok=True)
            self.files.pipe_file(probe, b"")
        except Exception as error:  # every file system has errors of its own
            raise PlanError(f"--store {self.url} cannot be written: {type(error).__name__}: {error}") from None

    def has(self, name: str) -> bool:
        with self._named(name):
            return bool(self.files.exists(f"{self.root}/{name}/{MANIFEST}"))

    def fetch(self, name: str, fingerprint: str) -> bool:
        """Bring a finished stage folder here if it is there and not here; whether it is here now.

        What comes is not trusted: its manifest must be sound and of this fingerprint, name files in the folder alone,
        and every file must have the size and sha256 listed. Only then does the folder appear. Raises CheckpointError
        saying what is wrong at the URL; nothing of it is left here.
        """
        _require_folder_name(name, self.url)
        self._fetch_shared()
        target = self.folder / name
        if (target / MANIFEST).is_file():
            return True
        if not self.has(name):
            return False
        if target.is_symlink():
            raise CheckpointError(f"{target} is a link, where a stage's folder would be put; move it away")
        draft = self.folder / f".fetched-{name}"
        shutil.rmtree(draft, ignore_errors=True)
        try:
            self._fetch_folder(name, fingerprint, draft)
            shutil.rmtree(target, ignore_errors=True)  # an attempt that died here before another machine finished it
            draft.rename(target)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
        return True

    def _fetch_folder(self, name: str, fingerprint: str, draft: Path) -> None:
        there = f"{self.url.rstrip('/')}/{name}"
        manifest, content = self._manifest(name)
        if manifest.fingerprint != fingerprint:
            raise CheckpointError(
                f"{there} was refused: its fingerprint is {manifest.fingerprint[:12]}, asked for was "
                f"{fingerprint[:12]}. Remove it there, and it is computed again"
            )
        for file, facts in manifest.files.items():
            if file == MANIFEST or Path(file).parts[0] == WORK:
                raise CheckpointError(f"{there} was refused: its manifest lists {file}, which is no result")
            place = f"{self.root}/{name}/{file}"
            with self._named(f"{name}/{file}"):
                size = int(self.files.size(place))
            if size != facts["bytes"]:
                raise CheckpointError(
                    f"{there} was refused: {file} has {size} bytes, the manifest says {facts['bytes']}. Remove the "
                    "folder there, and it is computed again"
                )
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            with self._named(f"{name}/{file}"):
                self.files.get_file(place, str(draft / file))
        try:
            check_files(draft, manifest, hashes=True)
        except CheckpointError as error:
            reason = str(error).partition(" is damaged: ")[2].partition(". It was")[0] or str(error)
            raise CheckpointError(
                f"{there} was refused: {reason}. Remove the folder there, and it is computed again"
            ) from None
        write_bytes(draft / MANIFEST, content)

    def _manifest(self, name: str) -> tuple[Manifest, bytes]:
        """The manifest at the URL, and its bytes, read once: what was checked is what is kept."""
        place = f"{self.root}/{name}/{MANIFEST}"
        with self._named(f"{name}/{MANIFEST}"):
            content = bytes(self.files.cat_file(place, start=0, end=_MOST_BYTES))
        if len(content) == _MOST_BYTES:
            raise CheckpointError(f"{self.url}/{name}/{MANIFEST} was refused: no manifest is so large")
        return Manifest.parse(content, f"{self.url.rstrip('/')}/{name}/{MANIFEST}"), content

    def fetch_line(self, name: str, fingerprint: str) -> None:
        """A stage folder and those it was made from: some stages look at their ancestors' weights."""
        while name and self.fetch(name, fingerprint):
            manifest = Manifest.read(self.folder / name)
            if manifest.fingerprint != fingerprint:
                raise CheckpointError(
                    f"{self.folder / name} belongs to another run: its fingerprint is {manifest.fingerprint[:12]}, "
                    f"expected {fingerprint[:12]}; move it away"
                )
            parent = manifest.parent
            if not parent or Path(parent["path"]).is_absolute():
                return
            name, fingerprint = parent["path"].removeprefix("../"), parent["fingerprint"]

    def send(self, name: str) -> None:
        """Put a finished stage folder, and what was measured, at the URL; the manifest last."""
        folder = self.folder / name
        if not self.has(name):
            manifest = Manifest.read(folder)
            require_inside(folder, manifest.files, str(folder / MANIFEST))
            for file in (*manifest.files, MANIFEST):
                self._put(folder / file, f"{name}/{file}")
        for shared in _SHARED_FOLDERS:
            for path in (self.folder / shared).glob("[!.]*"):
                with self._named(f"{shared}/{path.name}"):
                    there = self.files.exists(f"{self.root}/{shared}/{path.name}")
                if not there and path.is_file() and not path.is_symlink():
                    self._put(path, f"{shared}/{path.name}")

    def _fetch_shared(self) -> None:
        """Measurements and sampled texts, whose readers check the hashes that they carry."""
        for shared in _SHARED_FOLDERS:
            with self._named(shared):
                if not self.files.exists(f"{self.root}/{shared}"):
                    continue
                entries: list[dict[str, Any]] = self.files.ls(f"{self.root}/{shared}", detail=True)
            (self.folder / shared).mkdir(exist_ok=True)
            for entry in entries:
                name = require_name(str(entry["name"]).rstrip("/").rpartition("/")[2], f"{self.url}/{shared}")
                target = self.folder / shared / name
                if entry["type"] != "file" or name.startswith(".") or target.is_file() or target.is_symlink():
                    continue
                with drafted(target) as draft, self._named(f"{shared}/{name}"):
                    self.files.get_file(entry["name"], str(draft))

    def _put(self, path: Path, name: str) -> None:
        with self._named(name):
            self.files.makedirs(f"{self.root}/{Path(name).parent.as_posix()}", exist_ok=True)
            self.files.put_file(str(path), f"{self.root}/{name}")

    @contextmanager
    def _named(self, name: str) -> Iterator[None]:
        """Turn what a file system raises, each has errors of its own, into one that names the URL and file."""
        try:
            yield
        except EdgepressError:
            raise
        except Exception as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else ""
            raise CheckpointError(f"--store {self.url}: {name}: {type(error).__name__} {reason}".rstrip()) from None


def _require_folder_name(name: str, told_by: str) -> None:
    """Raise CheckpointError unless a name can only be that of a stage's folder in the store."""
    if "/" in require_name(name, told_by) or name.startswith("."):
        raise CheckpointError(f"{told_by} names {name!r}, which is no stage's folder")
