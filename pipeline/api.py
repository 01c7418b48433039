"""edgepress from Python: `compress`, `check` and `evaluate`, one call for what the command line does.

Keywords are the flags of the commands (`--lora-samples 80` is `lora_samples=80`). What goes wrong is an EdgepressError
with the command line's words, which name flags; nothing ends the process. Progress goes to standard error, as bars on
a terminal, and as plain lines in a notebook or file.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from io import StringIO
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, Unpack, get_type_hints

from rich.console import Console

from edgepress.checkpoints.errors import EdgepressError, PlanError, RecipeError, in_words, near, require_package
from edgepress.checkpoints.quiet import quietly
from edgepress.eval.tasks import Settings, find_tasks
from edgepress.pipeline.keywords import CompressOptions, EvaluateOptions, keyword_of
from edgepress.pipeline.recipe import PLAIN_KEYS, draft, validated
from edgepress.stages.options import STAGES

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from edgepress.checkpoints.checkpoint import Checkpoint
    from edgepress.checkpoints.shape import ModelShape
    from edgepress.hardware.check import Verdict
    from edgepress.pipeline.evaluate import Measured
    from edgepress.pipeline.run import RunResult

    # A folder, hub id, file, output folder, what `compress` gave, or a model in memory; None is the packaged one.
    Model: TypeAlias = "str | PathLike[str] | Result | Stage | Checkpoint | PreTrainedModel | None"


@dataclass(frozen=True)
class Stage:
    """One checkpoint of a run: the uncompressed model (`source`), or what a stage left."""

    name: str
    folder: Path
    perplexity: float
    bits_per_byte: float
    parameters_total: int
    parameters_nonzero: int
    file_bytes: int
    packed_bytes: int  # of the one file that `compress pack` makes
    pattern: str | None  # of zeros, proven on the files
    seconds: float  # 0 for the source
    reused: bool  # whether it was in the output folder already

    def checkpoint(self) -> Checkpoint:
        """The folder, whose blocks can be read one by one. Raises CheckpointError where it is damaged."""
        from edgepress.checkpoints.checkpoint import Checkpoint

        return Checkpoint.open(self.folder)

    def model(self) -> PreTrainedModel:
        """The whole model as transformers' module with dense effective weights: codes dequantised, adapter added."""
        model: PreTrainedModel = self.checkpoint().model()
        return model

    def tokenizer(self) -> PreTrainedTokenizerBase:
        tokenizer: PreTrainedTokenizerBase = self.checkpoint().tokenizer()
        return tokenizer


@dataclass(frozen=True)
class Result:
    """What a run gave: every stage's checkpoint with its measurement. Printed, it is the command's table."""

    out: Path  # the output folder: the same call again finds all stages in it
    source: Stage  # the uncompressed model
    stages: tuple[Stage, ...]  # in the order they ran; empty where every stage was skipped
    report: Mapping[str, Any]  # as report.json has it
    table: str

    @property
    def last(self) -> Stage:
        """The run's result; the source where every stage was skipped."""
        return self.stages[-1] if self.stages else self.source

    @property
    def folder(self) -> Path:
        """Of the last checkpoint."""
        return self.last.folder

    @property
    def perplexity(self) -> float:
        return self.last.perplexity

    @property
    def fits(self) -> bool | None:
        """Whether the result fits the chip of `soc`; None where no verdict could be given."""
        fits: bool | None = self.report["hardware"]["fits"]
        return fits

    def model(self) -> PreTrainedModel:
        """The last checkpoint, as `Stage.model`."""
        return self.last.model()

    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.last.tokenizer()

    def to_frame(self) -> pandas.DataFrame:
        """A row for the source and each stage, a column for each field of `Stage`. Needs pandas."""
        require_package("pandas", "to_frame")
        import pandas

        rows = [{f.name: getattr(stage, f.name) for f in fields(Stage)} for stage in (self.source, *self.stages)]
        return pandas.DataFrame(rows)

    def __str__(self) -> str:
        return self.table

    __repr__ = __str__


def compress(
    model: Model = None,
    *,
    out: str | PathLike[str] = "out",
    tokenizer: PreTrainedTokenizerBase | None = None,
    recipe: str | PathLike[str] = "",
    skip: str | Sequence[str] = (),
    progress: bool = True,
    **options: Unpack[CompressOptions],
) -> Result:
    """Send a model through the stages, as the command `compress` does, and measure what each leaves.

    model: a folder, hub id, .gguf or llama2.c file, an earlier result, or transformers' model in memory, which is
    first saved in `out` and goes with its `tokenizer`; None is the packaged SmolLM2-135M-Instruct. out: the output
    folder; what is finished in it is used again. recipe, skip: as the flags. Raises EdgepressError: RecipeError with
    everything that is wrong with the request, before any weight is touched.
    """
    folder = Path(out)
    with _reported():
        flags = _flags(options)
        from edgepress.pipeline.progress import Reporter
        from edgepress.pipeline.run import prepared, run
        from edgepress.pipeline.store import Store

        named = _named(model)
        if tokenizer is not None and (named is not None or model is None):
            raise PlanError("tokenizer goes with a model in memory; a model in a folder has its own there")
        if named is None and model is not None:
            with Store(folder).opened():
                named = str(_kept(model, tokenizer, folder))
        skipped = skip if isinstance(skip, str) else ",".join(skip)
        recipe_wanted = prepared(draft(str(recipe) or None, flags | {"model": named}, skipped), folder)
        with (
            Store(folder).opened(),
            Reporter(_console(), folder / "compress.log", quiet=not progress) as reporter,
        ):
            return _result(run(recipe_wanted, folder, reporter), folder)


def check(
    model: Model = None,
    *,
    soc: str | PathLike[str] = "siracusa",
    set: Mapping[str, object] | Sequence[str] = (),
    context: int = 256,
    kv_bits: int = 8,
    kv_window: int = 0,
    kv_sinks: int = 4,
    kv_groups: bool = False,
    activation_bits: int = 8,
    prefill_chunk: int = 0,
    bits: int = 0,
    embedding_bits: int = 0,
) -> Verdict:
    """Judge whether a model fits a chip, as `compress check` does; the answer has `fits`, `summary` and `to_dict()`.

    model: as of `compress`, also a preset's name or a config.json; of a model in memory the configuration is judged.
    set: settings of the chip, {"sram_role": "weights"}. Raises EdgepressError.
    """
    with _reported():
        from edgepress.hardware.check import check as judge
        from edgepress.hardware.soc import load_soc
        from edgepress.pipeline.shapes import (
            PACKAGED_PRESET,
            measured_bytes,
            model_shape,
            require_consistent,
            with_other_bits,
        )

        named = _named(model)
        shape = model_shape(named) if named is not None or model is None else _shape_in_memory(model)
        require_consistent(named, shape)
        chip = load_soc(str(soc), [f"{k}={v}" for k, v in set.items()] if isinstance(set, Mapping) else list(set))
        asked = with_other_bits(shape, bits, embedding_bits, chip)
        return judge(
            asked, chip, context=context, kv_bits=kv_bits, kv_window=kv_window, kv_sinks=kv_sinks, kv_groups=kv_groups,
            activation_bits=activation_bits, prefill_chunk=prefill_chunk or None,
            name=named or ("the model" if model is not None else PACKAGED_PRESET),
            file_bytes=measured_bytes(named) if asked is shape else None, levers=True, timing=True,
        )  # fmt: skip


def evaluate(
    model: Model = None,
    *,
    task: str | Sequence[str] = "perplexity",
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str = "auto",
    dtype: str = "auto",
    progress: bool = True,
    **settings: Unpack[EvaluateOptions],
) -> Measured:
    """Measure one checkpoint, as `compress eval` does: `.score("perplexity").value`, with `low`, `high` and `protocol`.

    model: as of `compress`; of a run, its last checkpoint. task: names of tasks, as a list or with commas between.
    Answers are kept, and taken up again, only in a folder that `answers` names. Raises EdgepressError.
    """
    with _reported(), ExitStack() as opened:
        tasks = find_tasks([name.strip() for name in task.split(",")] if isinstance(task, str) else list(task))
        wanted = _settings(settings)
        from edgepress.pipeline.evaluate import check_request, keeping_answers, measure_all
        from edgepress.pipeline.progress import Reporter
        from edgepress.pipeline.store import open_model

        wanted = keeping_answers(replace(wanted, answers=wanted.answers or "none"), Path())
        check_request(tasks, wanted)
        named = _named(model)
        if named is None and model is not None:
            home = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="edgepress-model-")))
            named = str(_saved(model, tokenizer, home / "model"))
        checkpoint = open_model(named)
        reporter = opened.enter_context(Reporter(_console(), quiet=not progress))
        return measure_all([(checkpoint.name, checkpoint)], tasks, wanted, device, dtype, reporter)[0]


# --- what was asked for -----------------------------------------------------------------------------------------------


@contextmanager
def _reported() -> Iterator[None]:
    """Libraries quiet within; whatever a user can mend leaves as an EdgepressError."""
    try:
        with quietly():
            yield
    except EdgepressError:
        raise
    except Exception as error:
        if (message := in_words(error)) is None:
            raise
        raise EdgepressError(message) from error


def _console() -> Console:
    """Standard error; in a notebook standard output as it is, where lines are lines and not a display each."""
    console = Console(stderr=True)
    return Console(file=sys.stdout, force_jupyter=False, force_terminal=False) if console.is_jupyter else console


def _flags(options: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords as `recipe.draft` takes flags. Raises RecipeError for unknown names and values of other types."""
    keys = {key: (key, kind) for key, kind in PLAIN_KEYS.items() if key != "model"}
    for stage, kind in STAGES.items():
        types = get_type_hints(kind)
        for field in fields(kind):
            keys[keyword_of(field.metadata["flag"], field.name)] = (f"{stage}.{field.name}", types[field.name])
    good, faults = _typed(options, {name: kind for name, (_, kind) in keys.items()}, "compress")
    if faults:
        raise RecipeError(faults)
    return {keys[name][0]: value for name, value in good.items()}


def _settings(options: Mapping[str, Any]) -> Settings:
    """Raises PlanError as `_flags`, and as the settings do."""
    names = {keyword_of(field.metadata["flag"], field.name): field.name for field in fields(Settings)}
    types = get_type_hints(Settings)
    given = dict(options)
    sources = given.pop("sources", ())  # the one that may come often
    good, faults = _typed(given, {name: types[key] for name, key in names.items() if key != "sources"}, "evaluate")
    if faults:
        raise PlanError("\n".join(faults))
    values = {names[name]: value for name, value in good.items()}
    return Settings(sources=(sources,) if isinstance(sources, str) else tuple(sources), **values)


def _typed(options: Mapping[str, Any], types: Mapping[str, type], function: str) -> tuple[dict[str, Any], list[str]]:
    """The options that are of their type, paths as text and None as not given; what is wrong with the others."""
    texts = {name: str(value) if isinstance(value, PathLike) else value for name, value in options.items()}
    good, wrong = validated("", types, {name: value for name, value in texts.items() if value is not None})
    return good, [fault or f"{function} has no keyword '{name}'{near(name, types)}" for name, fault in wrong]


# --- models -----------------------------------------------------------------------------------------------------------


def _named(model: Model) -> str | None:
    """A model's name or folder; None for the packaged one and for a model in memory."""
    if isinstance(model, Result | Stage):
        return str(model.folder)
    if isinstance(model, str | PathLike):
        return str(model)
    folder = getattr(model, "folder", None)  # a Checkpoint; its class would bring torch along
    return str(folder) if isinstance(folder, Path) else None


def _shape_in_memory(model: Any) -> ModelShape:
    from edgepress.checkpoints.families import shape_from_config

    return shape_from_config(_model_config(model).to_dict())


def _model_config(model: Any) -> Any:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        raise PlanError(
            f"{type(model).__name__} is no model: give a folder, a name, a file, an earlier result, or a model of "
            "transformers"
        )
    return config


def _saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    """The model as a folder of Hugging Face files."""
    config = _model_config(model)
    if tokenizer is None:
        home = Path(getattr(config, "name_or_path", "") or "")
        if not (home / "config.json").is_file():
            raise PlanError("a model in memory needs its tokenizer: give tokenizer=…, as transformers loads it")
        from edgepress.checkpoints.vocabulary import load_tokenizer

        tokenizer = load_tokenizer(home)
    model.save_pretrained(folder, safe_serialization=True)
    tokenizer.save_pretrained(folder)
    return folder


def _kept(model: Any, tokenizer: Any, out: Path) -> Path:
    """The model in the output folder, by a name that tells its bytes: the same model again is the same folder."""
    from edgepress.checkpoints.checkpoint import foreign_fingerprint

    with tempfile.TemporaryDirectory(dir=out, prefix=".model-") as temporary:
        draft = _saved(model, tokenizer, Path(temporary) / "model")
        folder = out / f"model-{foreign_fingerprint(draft)[:8]}"
        if not folder.is_dir():
            draft.rename(folder)
    return folder


def _result(done: RunResult, out: Path) -> Result:
    from edgepress.pipeline.report import print_summary

    report, first = done.report, done.report["baseline"]
    # A notebook's console would show it at once, and in colours.
    table = Console(file=StringIO(), width=120, force_jupyter=False, force_terminal=False)
    print_summary(table, done, out)
    assert isinstance(table.file, StringIO)
    shape = done.source.shape
    source = Stage(
        "source", done.source.folder, first["perplexity"], first["bits_per_byte"], shape.parameters_total,
        shape.parameters_nonzero, shape.file_bytes, report["source"]["packed_bytes"], None, 0.0, True,
    )  # fmt: skip
    stages = []
    for stage in report["stages"]:
        stages.append(
            Stage(
                stage["stage"], Path(stage["path"]), stage["perplexity"]["after"], stage["bits_per_byte"]["after"],
                stage["parameters_total"], stage["parameters_nonzero"], stage["file_bytes"], stage["packed_bytes"],
                stage["sparsity"]["pattern"], stage["seconds"], stage["reused"],
            )
        )  # fmt: skip
    return Result(out, source, tuple(stages), report, table.file.getvalue())
