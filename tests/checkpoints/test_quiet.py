"""What importing the libraries leaves behind on the disk."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgepress.checkpoints.quiet import quiet_import

pytestmark = pytest.mark.unit

NAMES = ("HF_HOME", "HF_HUB_CACHE", "XDG_CACHE_HOME")


def test_no_folder_that_all_users_share_is_taken_for_the_hubs_cache(tmp_path: Path) -> None:
    """tokenicer comes with GPTQModel and would make one in /tmp, for modules of code among others."""
    code = (
        "import os\nfrom edgepress.checkpoints.quiet import quiet_import\nwith quiet_import():\n    import tokenicer\n"
    )
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | {"HOME": str(tmp_path)}
    command = [sys.executable, "-c", code + "print(os.environ['HF_HOME'])"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == str(tmp_path / ".cache" / "huggingface")


@pytest.mark.parametrize(
    ("given", "expected"), [({"XDG_CACHE_HOME": "xdg"}, "xdg/huggingface"), ({"HF_HOME": "own"}, "own")]
)
def test_a_folder_that_the_user_names_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, str], expected: str
) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is gone again afterwards, whoever sets it
        monkeypatch.delenv(name)
    for name, folder in given.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    with quiet_import():
        assert os.environ["HF_HOME"] == str(tmp_path / expected)
    assert list(tmp_path.iterdir()) == []


def test_without_a_home_to_write_in_it_is_a_folder_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is gone again afterwards, whoever sets it
        monkeypatch.delenv(name)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with quiet_import():
        home = Path(os.environ["HF_HOME"])
    assert home.name.startswith("edgepress-hub-") and home.stat().st_mode & 0o77 == 0
