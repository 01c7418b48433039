"""What to take and what to do with it, in words: the head of the page, and commands that exist."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from edgepress.checkpoints.headers import adapter_path
from edgepress.checkpoints.memory import size_text
from edgepress.pipeline.formats import FORMATS
from edgepress.pipeline.page.content import Chip, chip_words, path_of, percent, signed_range
from edgepress.pipeline.page.figures import number
from edgepress.pipeline.page.read import EVALUATION, SOURCE, StageRun, Study
from edgepress.pipeline.page.recommend import Taken, chain_of, difference


def recommendation(study: Study, chip: Chip) -> str:
    """One sentence: what to take, and by which rule (pipeline/page/recommend.py)."""
    taken = chip.taken(study)
    if taken is None:
        return f"Nothing to take: no perplexity of {study.model_title} is finite."
    name, run, count = _called(study, taken), taken.run, len(taken.among)
    what = f"{study.quality_name} {number(study.quality(run))} in {size_text(study.size(run))}"
    room = f"the {size_text(chip.room)} of {chip.name} for weights"
    none = f"nothing here fits {room}"
    if taken.rule == "nothing":
        return f"{study.model_title} was measured and not compressed: {what}."
    if taken.rule == "beaten":
        return f"Take {name}: {none}, and no compressed checkpoint is smaller or better than it."
    if taken.rule == "budget":
        if count == 1:
            return f"Take {name}: it alone fits {room}, with {what}."
        return f"Take {name}: of the {count} that fit {room}, none has a lower {study.quality_name}; {what}."
    if taken.rule == "alone":
        why = "it is the only compressed checkpoint that no other beats in both size and quality"
    elif taken.rule == "knee":
        why = f"it is the knee of the {count} that no other beats in both size and quality"
    else:
        why = f"of the {count} that no other beats in both size and quality, which have no knee, it is the smallest"
    return f"Take {name}: {none}, and {why}; {what}."


def _called(study: Study, taken: Taken) -> str:
    run = taken.run
    if run.stage == SOURCE:
        return "the uncompressed model"
    if study.kind == "sweep":
        return taken.choice.name
    last = run is study.configurations[0].result
    return f"the result, {run.name}" if last else f"stage {run.position}, {run.name}"


def reasons(study: Study, chip: Chip) -> list[str]:
    """What else a reader must know of the checkpoint to take, a sentence each."""
    taken = chip.taken(study)
    if taken is None or taken.rule == "nothing":
        return [words for words in (chip_words(chip), _failed(study)) if words]
    source, run = taken.choice.source, taken.run
    words = []
    if run is not source and run.measured == source.measured:
        before, after = study.quality(source), study.quality(run)
        words.append(
            f"From the uncompressed {study.model_title} it goes from {size_text(study.size(source))} to "
            f"{size_text(study.size(run))} of {study.size_name} and from {study.quality_name} {number(before)} to "
            f"{number(after)} ({percent(after / before - 1)})."
        )
    words.append(chip_words(chip))
    words.append(_as_good(study, taken))
    words.append(_failed(study))
    return [sentence for sentence in words if sentence]


def _as_good(study: Study, taken: Taken) -> str:
    """The smallest checkpoint that the measured windows do not tell apart from the one to take."""
    found = [
        (study.size(c.run), c, d)
        for c in study.comparable
        if study.size(c.run) < study.size(taken.run) and (d := difference(study, taken.run, c.run)) and d.within_noise
    ]
    if not found:
        return ""
    size, choice, d = min(found, key=lambda entry: entry[0])
    less = size_text(study.size(taken.run) - size)
    return f"{choice.name} is {less} smaller, and its perplexity is not told apart: {signed_range(d)}."


def _failed(study: Study) -> str:
    count = len(study.failures)
    return f"{count} {'configuration' if count == 1 else 'configurations'} failed." if count else ""


def rule(study: Study, chip: Chip) -> str:
    """How the checkpoint to take was chosen, in words for the page."""
    taken = chip.taken(study)
    if taken is None or taken.rule == "nothing":
        return ""
    words = (
        f"The rule: of the checkpoints that fit {chip.name}, the one of lowest {study.quality_name}; the smaller where "
        "two are equal. Where none fits, the knee: of those that no other beats in both size and quality, the one "
        "farthest below the straight line between the smallest and the best, in bytes and mean loss, both scaled to "
        "0 to 1 between these two."
    )
    if not chip.fits:
        words += f" Fits means here: no more packed bytes than the memory of {chip.name} for weights."
    return words


# --- what to do next --------------------------------------------------------------------------------------------------
# Commands for the checkpoint to take; export formats are those of the registry, so none is named that is not there.


@dataclass(frozen=True)
class Deed:
    title: str
    code: str
    words: str = ""


def deeds(study: Study, chip: Chip) -> list[Deed]:
    """Load, run, hold against the chip, export, measure more."""
    taken = chip.taken(study)
    if taken is None or taken.run.folder is None:
        return []
    folder = path_of(study, taken.run)
    path, soc = shlex.quote(folder), shlex.quote(chip.soc or study.soc)
    made = [
        Deed("Load it", _loading(taken.run, folder), _needs(taken.run)),
        Deed("Let it write", f'compress generate {path} "Once upon a time"'),
        Deed("Hold it against a chip", f"compress check {path} --soc {soc}", "What lies where, and how fast."),
    ]  # fmt: skip
    if (chip.verdict or {}).get("fits"):
        made.append(
            Deed(
                f"Run it as on {chip.name}",
                f"compress simulate {path} --soc {soc}",
                "A C program on a simulated core. It computes in float32 and says first whether that fits too.",
            )
        )
    exports = [f"compress export {path} --to {name}" for name in FORMATS]
    if (chip.verdict or {}).get("fits"):
        exports.append(f"compress export {path} --to rv32 --soc {soc}")
    if exports:
        made.append(
            Deed(
                "Export it",
                "\n".join(exports),
                "`compress export --help` says what each loses; one that cannot hold this checkpoint says so.",
            )
        )
    if not any(r.fingerprint in study.evaluated for r in study.runs):
        words = "Then report again: intervals and measured speed are on this page."
        made.append(Deed("Measure intervals and speed", _eval_command(study, chip), words))
    return made


def _needs(run: StageRun) -> str:
    assert run.folder is not None
    return f"Python, with transformers{' and peft' if adapter_path(run.folder).is_file() else ''}."


def _loading(run: StageRun, folder: str) -> str:
    """Python that loads a folder of any stage with its adapter, if it has one."""
    assert run.folder is not None
    apart = adapter_path(run.folder).parent != run.folder  # of an earlier day; else transformers finds it by itself
    config = run.folder / "config.json"
    # GPTQModel's float32 kernel leaves out zero points; dense weights would be rounded in any precision but their own.
    dtype = "bfloat16" if config.is_file() and "quantization_config" in config.read_text() else "auto"
    lines = [
        *(["from peft import PeftModel"] if apart else []),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f"folder = {folder!r}",
        f'model = AutoModelForCausalLM.from_pretrained(\n    folder, dtype="{dtype}"\n)',
        *(['model = PeftModel.from_pretrained(model, f"{folder}/adapter")'] if apart else []),
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
    ]
    return "\n".join(lines)


def _eval_command(study: Study, chip: Chip) -> str:
    """Of a run all stages; of a sweep the checkpoint to take, those it comes from and the front, as far as here."""
    out = shlex.quote(str(study.out))
    if study.kind == "run":
        return f"compress eval {out} --task perplexity,speed"
    taken = chip.taken(study)
    chain = chain_of(study, taken.choice).runs if taken else ()
    wanted = {r.fingerprint: r.folder for r in (*chain, *(c.run for c in study.front)) if r.folder}
    paths = " ".join(shlex.quote(str(path)) for path in wanted.values())
    return f"compress eval {paths} --task perplexity,speed -o {shlex.quote(str(study.out / EVALUATION))}"
