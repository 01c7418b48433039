"""Silence the banners and warnings of libraries; what they raise still comes through."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import io
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgepress.checkpoints.errors import CheckpointError, EdgepressError


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
    """Around an import or call that prints on standard output. Sets what GPTQModel needs on two cores.

    GPTQModel 7.7 asks for two loader threads and refuses to start on machines with fewer than three cores
    unless told how many to use.
    """
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    _keep_hub_cache()
    with silenced("torch.utils.cpp_extension"):
        yield


@contextlib.contextmanager
def silenced(name: str) -> Iterator[None]:
    """Nothing is printed within, and the logger of this name tells errors alone."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


def _keep_hub_cache() -> None:
    """Name the hub's own default cache folder, where none is named.

    tokenicer, imported with GPTQModel, else names /tmp/tokenicer_hf_home and makes it: a folder that anybody may have
    made before, and that holds modules of code. A home that cannot be written to gives way to a folder of this process.
    """
    if "HF_HOME" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "huggingface"
    there = next(folder for folder in (home, *home.absolute().parents) if folder.is_dir())
    if not os.access(there, os.W_OK | os.X_OK):
        home = Path(tempfile.mkdtemp(prefix="edgepress-hub-"))
        atexit.register(shutil.rmtree, home, ignore_errors=True)
    os.environ["HF_HOME"] = str(home)


@contextlib.contextmanager
def readable(what: str) -> Iterator[None]:
    """Around a library's reading of a file from outside: whatever it raises becomes a CheckpointError, `what: why`.

    transformers' and tokenizers' readers raise AttributeError, KeyError, bare Exception and Rust's panics alike for
    files that make no sense to them.
    """
    try:
        yield
    except (EdgepressError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except ImportError as error:
        raise CheckpointError(f"{what}: it needs one more package: {error}") from None
    except BaseException as error:  # a panic of Rust's is no Exception
        reason = str(error).strip().splitlines()
        raise CheckpointError(f"{what}: {reason[0] if reason else type(error).__name__}") from None


_VERBOSITY = "EDGEPRESS_VERBOSITY"  # in the environment, so that workers have it too


def verbosity() -> int:
    """How much is told: -1 results alone (--quiet), 0 progress as well, 1 libraries' warnings and every step too."""
    return {"-1": -1, "1": 1}.get(os.environ.get(_VERBOSITY, ""), 0)


def set_verbosity(level: int) -> None:
    os.environ[_VERBOSITY] = str(level)


def quiet_libraries() -> None:
    """Their warnings and bars would run through ours; errors still come through. With --verbose all come through."""
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _keep_hub_cache()
    if verbosity() > 0:
        return
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)


_TRANSFORMERS = "transformers.utils.logging"
_BARS = ("TRANSFORMERS_VERBOSITY", "HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE")


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """The same for a part of a program: afterwards warnings and bars are as they were."""
    importlib.import_module("tqdm")  # which reads TQDM_DISABLE once, when it is imported
    before = {name: os.environ.get(name) for name in _BARS}
    theirs: Any = sys.modules.get(_TRANSFORMERS)
    bars, level = (theirs.is_progress_bar_enabled(), theirs.get_verbosity()) if theirs else (True, logging.WARNING)
    with warnings.catch_warnings():
        quiet_libraries()
        if theirs and verbosity() <= 0:
            theirs.disable_progress_bar()
            theirs.set_verbosity_error()
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value
            if (theirs := sys.modules.get(_TRANSFORMERS)) is not None:
                theirs.set_verbosity(level)
                if bars:
                    theirs.enable_progress_bar()
