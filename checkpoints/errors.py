"""The errors that a user can cause, and their words.

Each carries one message: what is wrong, where, what exists, what to do next. The command line prints it
and exits with code 2; the Python API raises it.
"""

from __future__ import annotations

import difflib
import errno
import importlib.util
from collections.abc import Iterable


class EdgepressError(Exception):
    """Something the user can mend."""


class PlanError(EdgepressError):
    """The request cannot be carried out, known before any weight is touched."""


class CheckpointError(EdgepressError):
    """A folder or file is missing, damaged, unfinished, or belongs to something else."""


class TextError(EdgepressError):
    """A text cannot be found, read, or is too short for what is asked of it."""


class NumericsError(EdgepressError):
    """A value is not finite, or a matrix stays singular after everything that was tried."""


class RecipeError(PlanError):
    """Every fault of a recipe at once."""

    def __init__(self, faults: Iterable[str]) -> None:
        self.faults = tuple(faults)
        count = len(self.faults)
        head = "1 error in the recipe" if count == 1 else f"{count} errors in the recipe"
        super().__init__("\n".join([f"{head}:", *(f"  - {fault}" for fault in self.faults)]))


def near(name: object, names: Iterable[str]) -> str:
    """` (near: …)` with the names that are written much like this one, or nothing where none is."""
    found = difflib.get_close_matches(str(name), list(names), n=3)
    return f" (near: {', '.join(found)})" if found else ""


def require_unicode(text: object, what: str, error: type[EdgepressError] = CheckpointError) -> None:
    """Raise `error` for a name or text from outside with bytes that are none of its encoding's.

    Python keeps them (PEP 383); tokenizers, safetensors and others that take Unicode alone do not say what is wrong.
    """
    try:
        str(text).encode()
    except UnicodeEncodeError:
        raise error(
            f"{what} is no text in the encoding of this shell: write it in UTF-8, or set PYTHONUTF8=1"
        ) from None


# What is to be done about an error of the operating system that has a plain remedy.
_REMEDIES = {
    errno.ENOSPC: "free some space there; the same command goes on from what is finished",
    errno.EDQUOT: "your quota is used up; the same command goes on from what is finished",
    errno.EROFS: "the disk is read-only; name another folder (-o, or EDGEPRESS_CACHE for converted models)",
    errno.EACCES: "change its permissions, or name another folder (-o, or EDGEPRESS_CACHE for converted models)",
    errno.EPERM: "change its permissions, or name another folder (-o, or EDGEPRESS_CACHE for converted models)",
    errno.ENOENT: "it is not there, or was removed while it was in use",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EISDIR: "give a file",
    errno.ENOTDIR: "give a folder",
    errno.EMFILE: "raise the limit (ulimit -n 4096)",
    errno.ENFILE: "close other programs",
    errno.ELOOP: "its links lead in a circle",
    errno.EIO: "the disk may be failing; copy the file from elsewhere",
    errno.ENOMEM: "there is not enough memory; close other programs, or use a smaller model or batch",
}
_NOT_WRITTEN = "a file could not be written whole: the disk is full, or a quota is used up"
# torch raises RuntimeError for all its troubles; these words of it mean the machine. Its zip writer has three ways to
# say that a file could not grow: which one depends on where in the file it happened.
_TORCH = {
    "inline_container": _NOT_WRITTEN,
    "PytorchStreamWriter": _NOT_WRITTEN,
    "iostream error": _NOT_WRITTEN,
    "DefaultCPUAllocator": "there is not enough memory; close other programs, or use a smaller model, window or batch",
    "Cannot allocate memory": "there is not enough memory; close other programs, or use a smaller model or batch",
}
# What loading a library, or a call into one, says where there is no memory left (ulimit -v).
_NO_MEMORY = ("failed to map segment", "Cannot allocate memory", "error return without exception set")
# The libraries that read a user's files, by the package that their exceptions come from.
_READERS = {
    "safetensors": "a safetensors file",
    "safetensors_rust": "a safetensors file",
    "jinja2": "a chat template",
    "yaml": "a YAML file",
    "json": "a JSON file",
    "tomllib": "a TOML file",
    "pyarrow": "a parquet file",
    "tokenizers": "a tokenizer",
    "huggingface_hub": "a configuration, or what the hub gave",
    "gguf": "a GGUF file",
    "peft": "an adapter",
    "PIL": "a picture",
}


# Packages that only some of the work needs, and the extra of edgepress that brings each.
EXTRAS = {
    "datasets": "data", "pyarrow": "data", "pandas": "sweep", "lm_eval": "eval", "sacrebleu": "eval",
    "rouge_score": "eval", "gptqmodel": "gptq", "optimum": "gptq", "ray": "ray", "fsspec": "ray",
    "sentence_transformers": "sbert", "bitsandbytes": "nf4", "mlflow": "tracking", "tensorboard": "tracking",
    "unicorn": "chip", "ziglang": "chip", "onnx": "deeploy",
}  # fmt: skip


def missing(package: str, what: str) -> str:
    """That `what` needs a package which is not installed, and how to get it."""
    name = package.replace("_", "-")
    return f"{what} needs {name}, which is not installed: pip install 'edgepress[{EXTRAS[package]}]'"


def installed(package: str) -> bool:
    """Whether a package is there to be imported, by its name as a module."""
    return importlib.util.find_spec(package) is not None


def require_package(package: str, what: str) -> None:
    """Raise PlanError where a package of EXTRAS is not installed."""
    if not installed(package):
        raise PlanError(missing(package, what))


def in_words(error: BaseException) -> str | None:
    """The one message of an error that a user can mend; None for a bug.

    The last net: where the file's name is known, a CheckpointError or its like is raised that says more.
    """
    if isinstance(error, EdgepressError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return missing(error.name, "this")
    if isinstance(error, MemoryError):
        return "there is not enough memory; close other programs, or use a smaller model, window or batch"
    if isinstance(error, ImportError | SystemError) and any(words in str(error) for words in _NO_MEMORY):
        return f"a library could not be loaded or used ({_first_line(error)}); most often there is not enough memory"
    if isinstance(error, RecursionError):
        return "a file is nested too deeply to be read; no model, recipe or data file needs that"
    if isinstance(error, OSError):
        where = " -> ".join(str(name) for name in (error.filename, error.filename2) if name)
        what = error.strerror or str(error) or type(error).__name__
        remedy = _REMEDIES.get(error.errno or 0)
        return (f"{where}: " if where else "") + what + (f"; {remedy}" if remedy else "")
    if isinstance(error, UnicodeError):
        return f"a file is not UTF-8 text: {error}"
    if isinstance(error, RuntimeError) and (known := next((w for k, w in _TORCH.items() if k in str(error)), None)):
        return f"{known}; the same command goes on from what is finished"
    package = type(error).__module__.partition(".")[0]
    if package.startswith("safetensors") and "I/O error" in str(error):
        return f"a safetensors file could not be read or written: {_first_line(error)}"
    if package in _READERS:
        return f"{_READERS[package]} cannot be used: {_first_line(error)}"
    if type(error).__name__ == "OutOfMemoryError" and package == "torch":
        return f"the device has not enough memory: {_first_line(error)}"
    return None


def not_written(error: RuntimeError) -> bool:
    """Whether torch could not write a file because there was no room for it."""
    return any(words in str(error) for words, what in _TORCH.items() if what is _NOT_WRITTEN)


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
