"""The work of `compress fit`: settings that make a model fit a chip, their likely cost, and the command."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table

from edgepress.checkpoints.errors import CheckpointError, EdgepressError, PlanError, TextError
from edgepress.checkpoints.families import PRESETS
from edgepress.checkpoints.headers import shape_from_folder
from edgepress.checkpoints.manifest import MANIFEST, Manifest
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.shape import ModelShape
from edgepress.hardware import fit as quality
from edgepress.hardware.fit import Candidate, Found, Loss, Quantisation, Settings, is_dense, search
from edgepress.hardware.needs import room_for
from edgepress.hardware.placement import weight_bytes
from edgepress.hardware.soc import Soc
from edgepress.hardware.units import times_text
from edgepress.pipeline.tables import print_whole
from edgepress.stages.options import STAGES, Options

if TYPE_CHECKING:
    from edgepress.hardware.check import Verdict
    from edgepress.pipeline.budget import Offer, Outcome

SMALLEST_VOCABULARY = 512  # 256 bytes, special tokens, and a few hundred pieces
_SAMPLE_CHARACTERS = 2**18  # of the corpus, to see how much longer it gets


class Vocabularies:
    """The sizes to choose from, and what each is likely to cost."""

    def __init__(self, shape: ModelShape, corpus: str, folder: Path | None) -> None:
        self.rows, self.corpus = shape.vocabulary, corpus
        steps = (n for power in range(9, 18) for n in (2**power, 2**power * 3 // 2))
        self.sizes = [size for size in steps if SMALLEST_VOCABULARY <= size < self.rows]
        self._longer: Callable[[int], float] | None = None
        if corpus:
            assert folder is not None
            used, self._longer = _corpus_lengths(folder, corpus)
            self.sizes = [size for size in self.sizes if size < used] + [used]

    def cost(self, size: int) -> float:
        """Rise of the loss in nats for each token of the uncut vocabulary."""
        if size == self.rows:
            return 0.0
        if self._longer is not None:
            return quality.length_cost(self._longer(size))
        return quality.vocabulary_cost(size, self.rows)


def _corpus_lengths(folder: Path, corpus: str) -> tuple[int, Callable[[int], float]]:
    """How many tokens a corpus keeps, and by how much unseen text of its kind gets longer with at most so many.

    The length is that of the corpus's last fifth, when its first four fifths choose the tokens.
    """
    from tokenizers import Tokenizer

    from edgepress.checkpoints.config import read_config
    from edgepress.checkpoints.vocabulary import count_ids, load_tokenizer, trim
    from edgepress.eval.text import NAMED, load_text

    whole = load_text(corpus, "whole") if corpus not in NAMED else load_text(corpus, "calibrate")
    if not any(document.strip() for document in whole.documents):
        raise TextError(f"the corpus '{corpus}' is empty; --trim-vocabulary needs the text the model is meant for")
    seen, unseen = load_text(corpus, "calibrate"), load_text(corpus, "evaluate")
    tokenizer = load_tokenizer(folder)
    rows = int(read_config(folder).get("vocab_size") or 0)
    used, counts = (count_ids([text.token_ids(tokenizer).tolist()]) for text in (whole, seen))
    sample, room = [], _SAMPLE_CHARACTERS
    for document in unseen.documents:
        sample.append(document[:room])
        room -= len(sample[-1])

    @cache
    def tokens(limit: int) -> int:
        definition = trim(folder, tokenizer, counts, rows, limit).definition
        return sum(len(row.ids) for row in Tokenizer.from_str(json.dumps(definition)).encode_batch(sample))

    before = sum(len(tokenizer(document)["input_ids"]) for document in sample)
    return len(trim(folder, tokenizer, used, rows).kept), lambda size: tokens(size) / before


def estimated(shape: ModelShape, vocabularies: Vocabularies, measured: Mapping[Settings, float]) -> Loss:
    """The loss to rank by: measured where a sweep has the very settings, else the proxy of hardware/fit.py."""

    def loss(settings: Settings) -> tuple[float, bool]:
        if settings in measured:
            return measured[settings], True
        how = settings.quantisation
        cost = quality.depth_cost(settings.removed, len(shape.blocks)) + quality.PATTERNS.get(settings.pattern, 0.0)
        cost += (
            quality.quantisation_cost(how.bits, how.group, shape.hidden_size) + quality.EMBEDDINGS[how.embedding_bits]
        )
        return cost + vocabularies.cost(settings.vocabulary), False

    return loss


# --- what earlier runs measured -------------------------------------------------------------------------------------


def read_sweep(out: Path, shape: ModelShape) -> dict[Settings, float]:
    """What the finished stages in an output folder cost this model, in nats a token of its own vocabulary.

    From bits per byte against the uncompressed model, measured by the same protocol on the same text; folders of
    another model, with an adapter beside the weights, or with settings that `fit` does not search are passed over.
    Raises CheckpointError where there is nothing to read.
    """
    if not out.is_dir():
        raise CheckpointError(f"there is no folder {out}; --sweep takes the output folder of an earlier run or sweep")
    found: dict[Settings, float] = {}
    finished = sorted(path.parent for path in out.glob(f"*/{MANIFEST}") if not path.parent.is_symlink())
    for folder in finished:
        chain = list(_chain(folder))
        settings, root = _settings_of(chain, shape), chain[-1].quality.get("before", {})
        after = chain[0].quality.get("after", {})
        same = all(root.get(key) == after.get(key) for key in ("text", "protocol", "dtype"))
        if settings is None or not root or not same or not _made_from(folder, chain, shape):
            continue
        rise = math.log(root["perplexity"]) * (after["bits_per_byte"] / root["bits_per_byte"] - 1)
        found[settings] = min(rise, found.get(settings, math.inf))
    if not found:
        raise CheckpointError(
            f"{out} holds {len(finished)} finished stages, none of them measured on this model with settings that fit "
            "searches; leave --sweep out to rank by the estimate alone"
        )
    return found


def _chain(folder: Path) -> Iterator[Manifest]:
    """The manifests of a stage and of those before it in the same store, the last stage first."""
    while (folder / MANIFEST).is_file():
        manifest = Manifest.read(folder)
        if manifest.parent is None:
            return
        yield manifest
        if not manifest.parent["path"].startswith(".."):
            return
        folder = (folder / manifest.parent["path"]).resolve()


def _made_from(folder: Path, chain: list[Manifest], shape: ModelShape) -> bool:
    assert chain[-1].parent is not None
    source = folder / chain[-1].parent["path"]
    try:
        found = shape_from_folder(source)
    except (EdgepressError, OSError):
        return False
    same = ("hidden_size", "num_hidden_layers", "vocab_size", "num_attention_heads", "intermediate_size")
    return all(found.config.get(key) == shape.config.get(key) for key in same)


def _settings_of(chain: list[Manifest], shape: ModelShape) -> Settings | None:
    """What a chain of stages did, if `fit` could have asked for it."""
    vocabulary, removed, pattern, how = shape.vocabulary, 0, "none", Quantisation()
    for manifest in chain:
        options = manifest.options
        if manifest.stage == "vocabulary":
            vocabulary = int(options["size"])
        elif manifest.stage == "depth" and not options["layers"]:
            removed += int(options["remove"])  # --homotopic removes them in several turns
        elif manifest.stage == "wanda" and options.get("method", "wanda") == "wanda":
            pattern = pattern if pattern != "none" else str(options["pattern"])  # the last turn's, which comes first
        elif manifest.stage == "gptq" and (options.get("layers") or str(options["quant"]).endswith("-s")):
            return None
        elif manifest.stage == "gptq" and not options["symmetric"] and str(options["quant"]).startswith("gptq"):
            group = _resolved_group(shape, options)
            how = Quantisation(options["quant"], _bits(options["quant"]), group, int(options["quant_embeddings"]))
        elif manifest.stage not in ("lora", "tune") or manifest.facts.get("added_bytes"):
            return None
    return Settings(vocabulary, removed, pattern, how)


def _bits(quant: str) -> int:
    return int(quant.removeprefix("gptq").removesuffix("-channel"))


def _resolved_group(shape: ModelShape, options: Mapping[str, Any]) -> int:
    from edgepress.checkpoints.shape import with_grid

    wanted = -1 if str(options["quant"]).endswith("-channel") else int(options["group"])
    grid = with_grid(shape, _bits(options["quant"]), wanted, False, 0).grid
    assert grid is not None
    return grid.group


# --- search and words -----------------------------------------------------------------------------------------------


def fit(
    model: str, shape: ModelShape, soc: Soc, *, corpus: str, sweep: Path | None, protect: tuple[int, int], best: int,
    context: int, kv_bits: int, activation_bits: int, prefill_chunk: int | None = None,
) -> tuple[Found, list[str]]:  # fmt: skip
    """Search, and what should be said of it. Raises PlanError, TextError or CheckpointError for bad input."""
    from edgepress.pipeline.shapes import tokenizer_folder

    if min(protect) < 0 or best < 1:
        raise PlanError("protected blocks cannot be negative, and at least one setting must be asked for")
    vocabularies = Vocabularies(shape, corpus, tokenizer_folder(model or None) if corpus else None)
    measured = read_sweep(sweep, shape) if sweep is not None else {}
    known = {settings.vocabulary for settings in measured}
    found = search(
        shape,
        soc,
        estimated(shape, vocabularies, measured),
        removable=max(0, len(shape.blocks) - sum(protect)),
        vocabularies=sorted({*vocabularies.sizes, *known}),
        patterns=tuple(quality.PATTERNS),
        best=best,
        context=context,
        kv_bits=kv_bits,
        activation_bits=activation_bits,
        prefill_chunk=prefill_chunk,
        name=model,
    )
    return found, list(_notes(found, model, shape, soc, corpus, measured))


def _notes(
    found: Found, model: str, shape: ModelShape, soc: Soc, corpus: str, measured: Mapping[Settings, float]
) -> Iterator[str]:
    cut = [c for c in (*found.fitting, *found.closest) if c.settings.vocabulary < shape.vocabulary]
    if cut and not corpus:
        yield (
            "The vocabulary was taken as free. To realise a cut, give a text with --trim-vocabulary: here, to count "
            "what it needs of the vocabulary, and beside the command's --vocabulary-size."
        )
    if not is_dense(shape):
        yield (
            "The model is quantised, or has an adapter, so only its vocabulary can be cut; give the model from before "
            "that to search all settings."
        )
    if model.lower() in PRESETS and not Path(model).exists():
        yield f"'{model}' is a preset, a shape without weights: give the model's folder in its place to compress it."
    if not found.patterns_help and is_dense(shape):
        yield f"N:M zeros save no room on {soc.name}, so no pattern was tried; --wanda none leaves the stage out."
    what = "measured (m) where the sweep has the settings, else estimated" if measured else "estimated"
    yield (
        f"Loss: {what}, nats a token above the uncompressed model; x ppl is exp of it. Estimates add up what single "
        f"measures cost other models ({'; '.join(quality.SOURCES)}). Measure what you choose."
    )


def command_of(model: str, shape: ModelShape, settings: Settings, corpus: str, protect: tuple[int, int]) -> str:
    """The command line that makes these settings."""
    how = settings.quantisation
    words = ["compress"]
    if model:
        words += ["--model", model]
    words += ["--depth", str(settings.removed)]
    if settings.removed and protect != (4, 2):
        words += ["--protect-first", str(protect[0]), "--protect-last", str(protect[1])]
    words += ["--wanda", settings.pattern, "--quant", how.quant]
    if how.bits and how.group != -1:
        words += ["--group", str(how.group)]
    if how.embedding_bits:
        words += ["--quant-embeddings", str(how.embedding_bits)]
    words += ["--eora", "0"]
    if settings.vocabulary < shape.vocabulary:
        words += ["--trim-vocabulary", corpus] if corpus else []
        words += ["--vocabulary-size", str(settings.vocabulary)]
    return shlex.join(words)


def measured_fit(
    model: str, shape: ModelShape, soc: Soc, chip: str, *, data: str, corpus: str, protect: tuple[int, int], best: int,
    out: Path, console: Console, quiet: bool, fits: Callable[[ModelShape], Verdict],
) -> tuple[list[dict[str, Any]], Outcome]:  # fmt: skip
    """Choose by what each layer's bits cost this model, as `--budget CHIP` does, and run the best plan into `out`.

    chip: what `soc` was loaded from. fits: judges a shape on the chip.
    Returns what was proposed, the best first, and what running it gave. Raises TooSmallError where no plan fits, and
    PlanError for bad input and for a model that fits as it is.
    """
    from edgepress.checkpoints import interrupts
    from edgepress.pipeline.budget import Wish, candidate_stages, require_possible, run_budget
    from edgepress.pipeline.progress import Reporter
    from edgepress.pipeline.recipe import draft
    from edgepress.pipeline.run import prepared
    from edgepress.pipeline.store import Store, open_model

    if model.lower() in PRESETS and not Path(model).exists():
        raise PlanError(f"'{model}' is a preset, a shape without weights to measure: give the model's folder")
    if not is_dense(shape):
        raise PlanError("the model is quantised, or has an adapter: --measure takes the model from before that")
    if fits(shape).fits:
        raise PlanError(f"the model fits {soc.name} as it is: there is nothing to measure")
    tried = ("vocabulary",) if corpus else ()
    flags: dict[str, Any] = {
        "model": model or None,
        "data": data or None,
        "soc": chip,
        "vocabulary.corpus": corpus or None,
    }
    flags |= {"depth.protect_first": protect[0], "depth.protect_last": protect[1]}
    flags, skip, beside = candidate_stages(flags, "", tried=tried)
    wish = Wish(chip, beside=beside, tried=tried, accepts=lambda after: fits(after).fits)
    recipe = prepared(draft(None, flags, skip), out)
    require_possible(recipe, wish, open_model(recipe.model))
    told: list[dict[str, Any]] = []

    def offered(offers: Sequence[Offer]) -> None:
        for offer in offers[:best]:
            room, need = room_for(soc, "weights"), weight_bytes(offer.shape, soc.layout).total
            told.append(
                {
                    "vocabulary": offer.shape.vocabulary, "removed_blocks": list(offer.plan.removed),
                    "bits": _bits_of(offer.shape), "embedding_bits": offer.plan.embedding,
                    "eora": offer.plan.eora.rank if offer.plan.eora else 0, "weight_bytes": need,
                    "room_bytes": room, "loss": offer.plan.loss, "perplexity": offer.perplexity,
                    "command": command_of_stages(model, data, offer.stages),
                }
            )  # fmt: skip
        if not quiet:
            print_offers(console, f"{model or 'the packaged model'} fits {soc.name} with", told)

    with (
        Store(out).opened(),
        Reporter(console, out / "compress.log", quiet=quiet) as reporter,
        interrupts.gently(reporter.interrupt),
    ):
        outcome = run_budget(recipe, wish, out, reporter, offered)
    return told, outcome


def _bits_of(shape: ModelShape) -> float:
    """Bits of a code, on average over the weights of the linear layers."""
    layers = [x for block in shape.blocks for x in block.linears]
    return sum(x.weights * (x.grid.bits if x.grid else 16) for x in layers) / sum(x.weights for x in layers)


def command_of_stages(model: str, data: str, stages: Sequence[tuple[str, Options]]) -> str:
    """The command line that runs these stages and no others."""
    words = ["compress", *(["--model", model] if model else []), *(["--data", data] if data else [])]
    for _, options in stages:
        for field in fields(options):
            if not _by_default(options, field.name, field.default):
                flag, value = field.metadata["flag"], getattr(options, field.name)
                words += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, str(value)]
    run = {name for name, _ in stages}
    return shlex.join([*words, "--skip", ",".join(name for name in STAGES if name not in run)])


def _by_default(options: Options, name: str, default: Any) -> bool:
    """Whether these options are the same with this field at its default, whatever that means beside the others."""
    if getattr(options, name) == default:
        return True
    try:
        return replace(options, **{name: default}) == options
    except PlanError:
        return False


def print_offers(console: Console, title: str, offers: Sequence[Mapping[str, Any]]) -> None:
    """The plans' table, with what is predicted, and the command of each."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "tokens", "blocks", "bits", "embed.", "EoRA", "weights", "room", "loss", "ppl"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, offer in enumerate(offers, 1):
        gone, need, room = len(offer["removed_blocks"]), offer["weight_bytes"], offer["room_bytes"]
        table.add_row(
            str(number), str(offer["vocabulary"]), f"-{gone}" if gone else "all", f"{offer['bits']:.2f}",
            str(offer["embedding_bits"] or "as is"), str(offer["eora"] or "none"), size_text(need),
            f"{100 * need / room:.0f} %", f"{offer['loss']:.3f}", f"{offer['perplexity']:.2f}",
        )  # fmt: skip
    console.print(title, highlight=False)
    print_whole(console, table)
    for number, offer in enumerate(offers, 1):
        console.print(f"{number}  {offer['command']}", highlight=False, soft_wrap=True, emoji=False)
    console.print("Loss and ppl are predicted, from what each layer's bits cost this model; the first runs now.")


def to_dict(candidate: Candidate, command: str) -> dict[str, Any]:
    return {
        **candidate.settings.to_dict(),
        "loss": candidate.loss,
        "measured": candidate.measured,
        "weight_bytes": candidate.weight_bytes,
        "over_bytes": candidate.over_bytes,
        "fits": candidate.verdict.fits,
        "summary": candidate.verdict.summary,
        "command": command,
    }


def print_fit(console: Console, title: str, found: Found, commands: list[str], notes: list[str]) -> None:
    """The table, the commands, and what to know."""
    shown = found.fitting or found.closest
    console.print(title, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    zeros = ["N:M"] if found.patterns_help else []
    for column in ("", "tokens", "blocks", *zeros, "bits", "embed.", "weights", "room", "loss", "x ppl"):
        table.add_column(column, justify="right", no_wrap=True)
    for number, c in enumerate(shown, 1):
        how, need, room = c.settings.quantisation, c.weight_bytes, c.weight_room
        table.add_row(
            str(number),
            str(c.settings.vocabulary),
            f"-{c.settings.removed}" if c.settings.removed else "all",
            *([c.settings.pattern] if zeros else []),
            _words(how),
            str(how.embedding_bits or "as is"),
            size_text(need),
            f"{100 * need / room:.0f} %" if need <= room else times_text(need, room),
            f"{c.loss:.3f}{'m' if c.measured else ''}",
            f"{math.exp(c.loss):.2f}" if c.loss < 7 else "> 1000",
        )
    print_whole(console, table)
    if not found.fitting:
        console.print(f"The closest one: {shown[0].verdict.summary}", highlight=False, emoji=False)
    for number, command in enumerate(commands, 1):
        console.print(f"{number}  {command}", highlight=False, soft_wrap=True, emoji=False)
    for note in notes:
        console.print(f"  - {note}", highlight=False, emoji=False)


def _words(how: Quantisation) -> str:
    """4/g32: four bits, groups of 32; 4/row: one scale a row."""
    return f"{how.bits}/{'row' if how.group == -1 else f'g{how.group}'}" if how.bits else "as is"
