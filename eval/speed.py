"""Measure how fast a checkpoint reads and writes on this machine, and the memory that takes.

Two ways to run the same checkpoint: `effective`, dense weights with codes dequantised and adapter added, as every
other task has them; and `kernels`, the folder as a user loads it, its codes multiplied by GPTQModel's kernels. Each
is measured in a process of its own, so that its peak of memory is not another's.

Prefill is one forward pass over the prompt, decoding one pass a token with the KV cache; a sequence alone. What is
said does not change how long it takes, so the prompt is random tokens. Times are wall-clock, medians of the repeats.
"""

from __future__ import annotations

import importlib.util
import math
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from edgepress.checkpoints import interrupts
from edgepress.checkpoints.checkpoint import Checkpoint, attention_kernels
from edgepress.checkpoints.errors import CheckpointError, PlanError, near
from edgepress.checkpoints.headers import adapter_path
from edgepress.checkpoints.memory import peak_bytes, release, reset_peak, resident_bytes, size_text
from edgepress.checkpoints.quiet import quiet_import, quiet_libraries
from edgepress.eval.results import Result, Score, not_measured
from edgepress.eval.subject import Subject
from edgepress.eval.tasks import Settings

ENGINES = ("effective", "kernels")


@dataclass(frozen=True)
class Workload:
    prompt: int = 128  # tokens
    tokens: int = 64  # new ones
    repeats: int = 5
    warmups: int = 1  # repeats that are not counted: caches fill, kernels are compiled

    def __post_init__(self) -> None:
        if self.prompt < 1 or self.tokens < 2 or self.repeats < 1 or self.warmups < 0:
            raise PlanError(
                f"speed is measured on a prompt of at least 1 token, 2 new tokens and 1 repeat; asked for "
                f"{self.prompt}, {self.tokens} and {self.repeats}"
            )

    def __str__(self) -> str:
        return f"prompt {self.prompt}, {self.tokens} new tokens, batch 1"


@dataclass(frozen=True)
class Repeat:
    """Seconds of one repeat. decode_seconds: of all new tokens but the first."""

    prefill_seconds: float
    first_token_seconds: float  # from the prompt's ids to the first new token's
    decode_seconds: float


@dataclass(frozen=True)
class Timing:
    engine: str
    workload: Workload
    repeats: tuple[Repeat, ...]
    peak_memory_bytes: int  # of the whole process, loading included
    libraries_bytes: int  # of it, resident before the model was loaded
    threads: int
    dtype: str
    device: str
    kernels: tuple[str, ...]  # classes that multiply the codes; empty for dense weights

    @property
    def prefill_rates(self) -> list[float]:
        """Prompt tokens a second."""
        return [self.workload.prompt / r.prefill_seconds for r in self.repeats]

    @property
    def decode_rates(self) -> list[float]:
        """New tokens a second after the first."""
        return [(self.workload.tokens - 1) / r.decode_seconds for r in self.repeats]

    @property
    def protocol(self) -> str:
        how = f"{self.engine}{' (' + ', '.join(self.kernels) + ')' if self.kernels else ''}"
        threads = f"{self.threads} thread{'s' * (self.threads != 1)}"
        return f"{self.workload}; {how}; {self.dtype}; {self.device}, {threads}"

    def to_dict(self) -> dict[str, Any]:
        rates = {"prefill": self.prefill_rates, "decode": self.decode_rates}
        medians = {f"{name}_tokens_per_second": statistics.median(values) for name, values in rates.items()}
        return asdict(self) | medians | {"protocol": self.protocol}


def check(name: str, settings: Settings) -> None:
    _workload(settings)


def run(name: str, subject: Subject, settings: Settings) -> Result:
    """The task `speed`: effective weights, and with --kernels those of a quantised checkpoint too."""
    workload = _workload(settings)
    began = time.perf_counter()
    progress = subject.runtime.progress
    engines = ENGINES if settings.kernels else ENGINES[:1]
    progress.start(name, len(engines))
    scores: list[Score] = []
    timings = []
    for engine in engines:
        missing = without_kernels(subject.checkpoint) if engine == "kernels" else ""
        if missing:
            progress.note(f"{name}: kernels not measured: {subject.label}: {missing}")
            scores += [not_measured(f"{metric}, {engine}", missing, higher) for metric, higher in _METRICS.items()]
        else:
            timing = measure_speed(subject.checkpoint, engine, workload, subject.runtime.device, subject.runtime.dtype)
            timings.append(timing.to_dict())
            scores += _scores(timing)
        progress.step(engine=engine)
    scores.sort(key=lambda score: list(_METRICS).index(score.metric.partition(",")[0]))
    return Result(name, tuple(scores), time.perf_counter() - began, {"timings": timings})


_METRICS = {"decode": True, "prefill": True, "first token": False, "peak memory": False}  # higher is better


def _workload(settings: Settings) -> Workload:
    return Workload(settings.speed_prompt, settings.speed_tokens, settings.repeats)


def _scores(timing: Timing) -> list[Score]:
    def score(metric: str, values: list[float], unit: str) -> Score:
        n = len(values)
        spread = f"least and most of {n} repeats" if n > 1 else ""
        low, high = (min(values), max(values)) if n > 1 else (math.nan, math.nan)
        return Score(
            f"{metric}, {timing.engine}", statistics.median(values), low, high, n, spread,
            timing.protocol, _METRICS[metric], unit,
        )  # fmt: skip

    return [
        score("decode", timing.decode_rates, "tokens/s"),
        score("prefill", timing.prefill_rates, "tokens/s"),
        score("first token", [r.first_token_seconds for r in timing.repeats], "s"),
        score("peak memory", [timing.peak_memory_bytes / 2**20], "MiB"),
    ]


def measure_speed(
    checkpoint: Checkpoint, engine: str, workload: Workload, device: torch.device, dtype: torch.dtype
) -> Timing:
    """Time one checkpoint in a fresh process.

    Raises PlanError for kernels without codes or too few positions, CheckpointError where loading fails.
    """
    _require(checkpoint, engine, workload)
    # spawn: a fork would start out with this process's memory and threads.
    with ProcessPoolExecutor(1, get_context("spawn"), interrupts.heed) as pool:
        threads = torch.get_num_threads()
        try:
            with interrupts.spawning():
                timing = pool.submit(_timed, checkpoint.folder, engine, workload, device.type, dtype, threads)
            return timing.result()
        except KeyboardInterrupt:  # else leaving the pool waits until it is timed
            for child in active_children():
                child.kill()
            raise
        except BrokenProcessPool:
            raise CheckpointError(
                f"{checkpoint.folder}: the process that timed it was killed, most likely for want of memory; its "
                f"weights alone take {size_text(checkpoint.shape.parameters_total * dtype.itemsize, 'MiB', 0)}"
            ) from None


def without_kernels(checkpoint: Checkpoint) -> str:
    """Why no library has a kernel for this checkpoint's codes; empty where one has."""
    form = checkpoint.shape.grid
    if form is None:
        return "the checkpoint is not quantised"
    return "" if form.loaders else f"no library knows {form.unknown}"


def _require(checkpoint: Checkpoint, engine: str, workload: Workload) -> None:
    if engine not in ENGINES:
        raise PlanError(f"unknown engine '{engine}'{near(engine, ENGINES)}; there are {' and '.join(ENGINES)}")
    if engine == "kernels" and (missing := without_kernels(checkpoint)):
        raise PlanError(f"{checkpoint.folder}: no kernel to multiply with: {missing}")
    wanted, positions = workload.prompt + workload.tokens, checkpoint.shape.positions
    if wanted > positions:
        raise PlanError(f"a prompt of {workload.prompt} and {workload.tokens} new tokens exceed {positions} positions")


def _timed(folder: Path, engine: str, workload: Workload, device: str, dtype: torch.dtype, threads: int) -> Timing:
    """In the new process: load, repeat, report."""
    torch.set_num_threads(threads)
    quiet_libraries()
    with quiet_import():
        import transformers  # noqa: F401  # counted with the libraries, not with the model
    reset_peak()
    before = resident_bytes()
    checkpoint = Checkpoint.open(folder)
    model = _load(checkpoint, engine, torch.device(device), dtype)
    release()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(checkpoint.shape.vocabulary, (1, workload.prompt), generator=generator).to(device)
    repeats = [time_once(model, ids, workload.tokens) for _ in range(workload.warmups + workload.repeats)]
    kinds = sorted({type(m).__name__ for m in model.modules() if hasattr(m, "qweight") or hasattr(m, "quant_state")})
    return Timing(
        engine, workload, tuple(repeats[workload.warmups :]), peak_bytes(), before, torch.get_num_threads(),
        str(dtype).removeprefix("torch."), device, tuple(kinds),
    )  # fmt: skip


@torch.no_grad()
def time_once(model: Any, ids: Tensor, tokens: int) -> Repeat:
    """Greedy decoding of `tokens` tokens after the prompt ids (1, L), timed."""
    began = _now(ids.device)
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1)
    prefilled = _now(ids.device)
    token = output.logits[:, -1:].argmax(-1)
    first = _now(ids.device)
    for _ in range(tokens - 1):
        output = model(input_ids=token, past_key_values=output.past_key_values, use_cache=True)
        token = output.logits[:, -1:].argmax(-1)
    return Repeat(prefilled - began, first - began, _now(ids.device) - first)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _load(checkpoint: Checkpoint, engine: str, device: torch.device, dtype: torch.dtype) -> Any:
    if engine == "effective":
        return checkpoint.model(device, dtype)
    assert checkpoint.shape.grid is not None
    for package in checkpoint.shape.grid.loaders:
        if not importlib.util.find_spec(package):
            raise CheckpointError(f"quantised kernels need {package}, which is not installed: pip install {package}")
    with quiet_import():
        from transformers import AutoModelForCausalLM

        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                checkpoint.folder,
                dtype=dtype,
                device_map=device,
                attn_implementation=attention_kernels(checkpoint.hf_config()),
                trust_remote_code=False,
            )
            adapter = adapter_path(checkpoint.folder)
            if adapter.is_file() and adapter.parent != checkpoint.folder:  # where transformers does not look
                from peft import PeftModel

                model = PeftModel.from_pretrained(model, adapter.parent)
        except (ImportError, ValueError, RuntimeError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{checkpoint.folder} cannot be loaded with kernels: {reason}") from None
    return model.eval()
