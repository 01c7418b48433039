"""Turn a LLaMA-like language model into something that fits and runs on a tiny chip, honestly measured.

The parts are folders at the top of the repository, which are linked here so that every tool finds them under one name:
`edgepress.pipeline` (the command line and the runs), `edgepress.stages`, `edgepress.eval`, `edgepress.hardware`,
`edgepress.checkpoints` and `edgepress.recipes`.
"""

from importlib.metadata import version

__version__ = version("edgepress")
