"""The commands eval, compare and generate."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.quiet import quiet_libraries
from edgepress.eval.tasks import TASKS, Settings, find_tasks
from edgepress.pipeline.flags import Device, Json, settings_flags, with_model

if TYPE_CHECKING:
    from edgepress.pipeline.progress import Reporter

_TASKS = f"What to measure, comma-separated: {', '.join(TASKS)}, or any task of lm-eval; default: perplexity."
_CHECKPOINTS = "Checkpoints of any stage, any models --model takes, or an output folder; default: the packaged model."
Tasks = Annotated[str, typer.Option("--task", help=_TASKS)]
Dtype = Annotated[str, typer.Option(help="auto, bfloat16 or float32; auto is float32 for tasks that answer.")]
ReportFile = Annotated[
    str, typer.Option("--out", "-o", help="Report as JSON; for several checkpoints a .png beside it.")
]


@with_model("checkpoints")
@settings_flags
def evaluate(
    settings: Settings,
    checkpoints: Annotated[
        list[str],
        typer.Argument(help=_CHECKPOINTS),
    ] = [],  # noqa: B006  typer reads the default and copies it
    task: Tasks = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    out: ReportFile = "",
    as_json: Json = False,
) -> None:
    """Measure checkpoints: perplexity, questions, lm-eval's tasks.

    Each number comes with its interval and protocol. An output folder stands for all stages of its last run. Answers
    are kept and resumed (--answers). A file is measured from its beginning, named texts on their test part.
    """
    tasks = find_tasks(task.split(",") if task else ["perplexity"])
    quiet_libraries()
    from edgepress.checkpoints.manifest import is_special, require_output
    from edgepress.checkpoints.runtime import machine
    from edgepress.pipeline.evaluate import (
        check_request,
        draw,
        intention,
        keeping_answers,
        measure_all,
        open_all,
        print_measured,
        print_steps,
        report,
        steps,
        write_report,
    )
    from edgepress.pipeline.store import is_store

    special = bool(out) and is_special(Path(out))  # a device or pipe has no folder to keep answers and figures in
    home = Path(checkpoints[0]) if not out and checkpoints and is_store(Path(checkpoints[0]).expanduser()) else Path()
    if out and not special:
        require_output(Path(out))
        home = Path(out).parent
    settings = keeping_answers(settings, home)
    check_request(tasks, settings)
    named = open_all(checkpoints)
    intended = "" if as_json else intention(named, tasks, settings, device, dtype)
    if len(named) == 1 and not (task or out or settings.limit or settings.sources):
        _perplexity_alone(named[0][1], settings, device, dtype, as_json, intended)
        return
    with _reporter(as_json) as reporter:
        reporter.say(intended)
        measured = measure_all(named, tasks, settings, device, dtype, reporter)
    run = len(checkpoints) == 1 and len(named) > 1  # one name that is several checkpoints is a run, in its order
    changes = steps(measured) if run else []
    path = Path(out) if out else home / "evaluation.json" if len(named) > 1 else None
    if path:
        write_report(path, measured, machine(), changes)
        if len(named) > 1 and not special:
            draw(measured, path.with_suffix(".png"))
    if as_json:
        typer.echo(json.dumps(report(measured, machine(), changes), indent=2))
        return
    console = Console()
    print_measured(console, measured)
    print_steps(console, changes)
    console.print(f"Measured on {machine()}.", highlight=False)
    if path:
        figure = f"   figure: {path.with_suffix('.png')}" if len(named) > 1 and not special else ""
        console.print(f"report: {path}{figure}", highlight=False, soft_wrap=True)


def _perplexity_alone(model: Any, settings: Settings, device: str, dtype: str, as_json: bool, intended: str) -> None:
    """One checkpoint, no task named: its perplexity on one line."""
    from edgepress.checkpoints.runtime import Runtime, choose_device, choose_dtype
    from edgepress.eval.perplexity import measure, protocol_of, text_of

    how, data = protocol_of(settings, settings.protocol), text_of("perplexity", settings)
    where = choose_device(device)
    precision = choose_dtype(dtype, where, model.shape.dense_dtype)
    with _reporter(as_json) as reporter:
        reporter.say(intended)
        result = measure(model, data, how, Runtime(where, precision, progress=reporter), kv=settings.kv)
    if as_json:
        typer.echo(json.dumps(result.to_dict(), indent=2))
    else:
        typer.echo(
            f"perplexity {result.perplexity:.4f}  ({result.protocol}; {result.text}; {result.dtype}; "
            f"{result.bits_per_byte:.3f} bits per byte)"
        )


@settings_flags
def compare(
    settings: Settings,
    a: Annotated[str, typer.Argument(help="A checkpoint, or a report of `compress eval -o`: FILE.json[:LABEL].")],
    b: Annotated[str, typer.Argument(help="The one compared with it.")],
    task: Tasks = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Say whether B differs from A by more than noise.

    Every metric, item by item: exact McNemar test where items are right or wrong, paired bootstrap elsewhere.
    """
    reports = [".json" in name for name in (a, b)]
    if reports[0] != reports[1]:
        raise PlanError("compare two reports, or two checkpoints, not one of each")
    tasks = find_tasks(task.split(",") if task else ["perplexity"]) if task or not reports[0] else []
    quiet_libraries()
    from edgepress.eval.results import compare as pair
    from edgepress.pipeline.evaluate import (
        check_request,
        keeping_answers,
        measure_all,
        open_all,
        print_differences,
        read_report,
        verdict,
    )

    if reports[0]:
        one, two = read_report(a), read_report(b)
    else:
        settings = keeping_answers(settings, Path())
        check_request(tasks, settings)
        named = open_all([a, b])
        if len(named) != 2:
            raise PlanError("compare takes two checkpoints; name stage folders, not an output folder")
        with _reporter(as_json) as reporter:
            one, two = measure_all(named, tasks, settings, device, dtype, reporter)
    wanted = [t.name for t in tasks] or [name for name in one.results if name in two.results]
    if missing := [name for name in wanted if name not in one.results or name not in two.results]:
        raise PlanError(f"not in both reports: {', '.join(missing)}")
    if not wanted:
        raise PlanError("the two reports have no task in common")
    differences = [d for name in wanted for d in pair(one.results[name], two.results[name])]
    if as_json:
        rows = [d.to_dict() | {"verdict": verdict(d)} for d in differences]
        typer.echo(json.dumps({"a": one.label, "b": two.label, "differences": rows}, indent=2))
    else:
        print_differences(Console(), one.label, two.label, differences)


@contextmanager
def _reporter(quiet: bool) -> Iterator[Reporter]:
    """Progress on standard error; Ctrl-C stops at the next step, and what was answered stays on disk."""
    from edgepress.pipeline.progress import Reporter

    with Reporter(Console(stderr=True), quiet=quiet) as reporter:
        try:
            with interrupts.gently(reporter.interrupt):
                yield reporter
        except KeyboardInterrupt:
            words = "the same command goes on from the answers that are kept"
            interrupts.caught(None if quiet else reporter.say, words)
            raise


@with_model("checkpoints")
def generate(
    checkpoints: Annotated[
        list[str], typer.Argument(help="Checkpoints of any stage, models, or an output folder for all its stages.")
    ],
    prompt: Annotated[str, typer.Argument(help="What the model continues.")],
    tokens: Annotated[int, typer.Option(help="New tokens at most.")] = 60,
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the tokenizer's chat template.")] = False,
    temperature: Annotated[float, typer.Option(help="Sample at this temperature; 0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
    plain: Annotated[bool, typer.Option("--plain", help="Plain lines, also on a terminal.")] = False,
    kv_bits: Annotated[int, typer.Option(help="Bits of a cached key or value: 16, 8 or 4.")] = 16,
    kv_window: Annotated[int, typer.Option(help="Newest tokens that stay in the KV cache; 0 is all.")] = 0,
    kv_sinks: Annotated[int, typer.Option(help="First tokens that the KV cache keeps, and keeps in full.")] = 4,
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Continue a prompt, with several checkpoints side by side."""
    quiet_libraries()
    from edgepress.checkpoints.kv_format import KVFormat
    from edgepress.checkpoints.memory import release
    from edgepress.checkpoints.runtime import choose_device
    from edgepress.eval.generation import Decoding, continue_prompt
    from edgepress.pipeline.evaluate import as_dict, open_all, print_plain, print_table

    kv = KVFormat(kv_bits, kv_window, kv_sinks)
    decoding, where = Decoding(tokens, temperature, seed, chat, kv), choose_device(device)
    entries = open_all(checkpoints)
    found = []
    for _, checkpoint in entries:
        found.append(continue_prompt(checkpoint, prompt, decoding, where))
        release()  # one model at a time in memory
    console = Console()
    if as_json:
        typer.echo(json.dumps(as_dict(prompt, decoding, entries, found), indent=2))
    elif len(entries) == 1:
        typer.echo(found[0].text.strip() if chat else found[0].prompt + found[0].text)
    elif plain or not console.is_terminal:
        print_plain(console, entries, found)
    else:
        print_table(console, prompt, decoding, entries, found)
