"""Turn a LLaMA-like language model into something that fits and runs on a tiny chip, honestly measured.

The parts are folders at the top of the repository, which are linked here so that every tool finds them under one name:
`edgepress.pipeline` (the command line and the runs), `edgepress.stages`, `edgepress.eval`, `edgepress.hardware`,
`edgepress.checkpoints` and `edgepress.recipes`.
"""


def __getattr__(name: str) -> str:
    if name == "__version__":  # read when asked for: the command hears no signal while its first modules are imported
        from importlib.metadata import version

        return version("edgepress")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
