"""Turn a LLaMA-like language model into something that fits and runs on a tiny chip, honestly measured.

`compress`, `check` and `evaluate` do in one call what the commands do; an EdgepressError says what went wrong.

The parts are folders at the top of the repository, which are linked here so that every tool finds them under one name:
`edgepress.pipeline` (the command line and the runs), `edgepress.stages`, `edgepress.eval`, `edgepress.hardware`,
`edgepress.checkpoints` and `edgepress.recipes`.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from edgepress.checkpoints.errors import EdgepressError
    from edgepress.pipeline.api import Result, Stage, check, compress, evaluate

    __version__: str
else:
    # Read when asked for: the command hears no signal while its first modules are imported.
    _PLACES = dict.fromkeys(("Result", "Stage", "check", "compress", "evaluate"), "edgepress.pipeline.api")
    _PLACES["EdgepressError"] = "edgepress.checkpoints.errors"

    def __getattr__(name):
        if name == "__version__":
            from importlib.metadata import version

            return version("edgepress")
        if name in _PLACES:
            from importlib import import_module

            return getattr(import_module(_PLACES[name]), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

    def __dir__():
        return sorted({*globals(), *_PLACES, "__version__"})


__all__ = ["EdgepressError", "Result", "Stage", "__version__", "check", "compress", "evaluate"]
