"""A store behind an fsspec URL: finished stage folders are sent there, and fetched to where work is done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from checkpoints.errors import PlanError
from checkpoints.manifest import MANIFEST, WORK, Manifest

_SHARED_FOLDERS = ("measurements", "calibration")


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
        return bool(self.files.exists(f"{self.root}/{name}/{MANIFEST}"))

    def fetch(self, name: str) -> bool:
        """Bring a finished stage folder here if it is there and not here; whether it is here now."""
        self._fetch_shared()
        target = self.folder / name
        if (target / MANIFEST).is_file():
            return True
        if not self.has(name):
            return False
        draft = self.folder / f".fetched-{name}"
        shutil.rmtree(draft, ignore_errors=True)
        manifest = json.loads(self.files.cat_file(f"{self.root}/{name}/{MANIFEST}"))
        for file in (*manifest["files"], MANIFEST):
            (draft / file).parent.mkdir(parents=True, exist_ok=True)
            self.files.get_file(f"{self.root}/{name}/{file}", str(draft / file))
        shutil.rmtree(target, ignore_errors=True)  # an attempt that died here before another machine finished it
        draft.rename(target)
        return True

    def fetch_line(self, name: str) -> None:
        """A stage folder and those it was made from: some stages look at their ancestors' weights."""
        while name and self.fetch(name):
            parent = Manifest.read(self.folder / name).parent
            name = Path(parent["path"]).name if parent and parent["path"].startswith("../") else ""

    def send(self, name: str) -> None:
        """Put a finished stage folder, and what was measured, at the URL; the manifest last."""
        folder = self.folder / name
        if not self.has(name):
            for path in sorted(folder.rglob("*")):
                inside = path.relative_to(folder)
                if path.is_file() and path.name != MANIFEST and inside.parts[0] != WORK:
                    self._put(path, f"{name}/{inside.as_posix()}")
            self._put(folder / MANIFEST, f"{name}/{MANIFEST}")
        for shared in _SHARED_FOLDERS:
            for path in (self.folder / shared).glob("[!.]*"):
                if not self.files.exists(f"{self.root}/{shared}/{path.name}"):
                    self._put(path, f"{shared}/{path.name}")

    def _fetch_shared(self) -> None:
        for shared in _SHARED_FOLDERS:
            if not self.files.exists(f"{self.root}/{shared}"):
                continue
            (self.folder / shared).mkdir(exist_ok=True)
            entries: list[Any] = self.files.ls(f"{self.root}/{shared}", detail=False)
            for entry in entries:
                target = self.folder / shared / Path(entry).name
                if not target.is_file():
                    draft = target.with_name(f".{target.name}.fetched")
                    self.files.get_file(entry, str(draft))
                    draft.replace(target)

    def _put(self, path: Path, name: str) -> None:
        self.files.makedirs(f"{self.root}/{Path(name).parent.as_posix()}", exist_ok=True)
        self.files.put_file(str(path), f"{self.root}/{name}")
