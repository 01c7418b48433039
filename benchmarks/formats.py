"""Every stage of a run in every format of `compress export`, each file loaded by the program it is for.

    .venv/bin/python -m benchmarks.formats demo --llama-cpp PYTHON --executorch PYTHON --llama2c FOLDER [--only gguf]

A cell is the largest difference of log-probabilities between that program and the checkpoint's own numbers in float32,
and the bytes written. 120 tokens of the embedded text are read; tokens below e^-12 by the checkpoint are left out, and
llama.cpp is asked at every sixth position. The two Pythons have xllamacpp, and edgepress with executorch; the folder
has llama2.c's run.c and runq.c. A format whose program is missing is "not installed". What was measured of a checkpoint
by a version of a program is kept in `--cache` and printed again.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from edgepress.checkpoints.checkpoint import Checkpoint
from edgepress.checkpoints.errors import PlanError
from edgepress.checkpoints.memory import size_text
from edgepress.checkpoints.runtime import Runtime
from edgepress.eval.text import load_text
from edgepress.pipeline.formats import FORMATS, Wanted, module_of
from edgepress.pipeline.formats.proof import exact_model, logits_of

TOKENS = 120
EVERY = 6  # positions at which llama.cpp is asked, a request each
RARE = -12.0  # log-probability below which a token is left out
MISSING = "not installed"

_IDS = "import json, sys, numpy as np; ids = json.load(open(sys.argv[2]))\n"
TRANSFORMERS = f"""{_IDS}
import torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32)
with torch.no_grad():
    np.save(sys.argv[3], model(torch.tensor([ids])).logits[0].float().numpy())
"""
ONNX = f"""{_IDS}
import onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
fed = {{"input_ids": [ids], "attention_mask": [[1] * len(ids)], "position_ids": [list(range(len(ids)))]}}
fed = {{name: np.array(value, np.int64) for name, value in fed.items()}}
for given in session.get_inputs()[3:]:
    fed[given.name] = np.zeros((1, given.shape[1], 0, given.shape[3]), np.float32)
np.save(sys.argv[3], session.run(["logits"], fed)[0][0])
"""
EXECUTORCH = f"""{_IDS}
import torch
from executorch.runtime import Runtime
forward = Runtime.get().load_program(sys.argv[1]).load_method("forward")
steps = [forward.execute((torch.tensor([[token]]), torch.tensor([n])))[0][0].clone() for n, token in enumerate(ids)]
np.save(sys.argv[3], torch.cat(steps).numpy())
"""
LLAMA_CPP = f"""{_IDS}
import os, xllamacpp
vocabulary, every = int(sys.argv[4]), int(sys.argv[5])
wanted = xllamacpp.CommonParams()
wanted.model.path, wanted.n_ctx, wanted.n_gpu_layers, wanted.warmup = sys.argv[1], 256, 0, False
# Its own settings keep keys and values in 16 bits, in flash attention even where the cache is told to have 32.
wanted.cache_type_k = wanted.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
wanted.cpuparams.n_threads = wanted.cpuparams_batch.n_threads = 1  # its threads wait for each other, spinning
wanted.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
if sys.argv[6:]:
    wanted.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(sys.argv[6], 1.0)]
server, found = xllamacpp.Server(wanted), np.full((len(ids), vocabulary), np.nan, np.float32)
for end in range(every, len(ids) + 1, every):
    told = server.handle_completions({{
        "prompt": ids[:end], "n_predict": 1, "n_probs": vocabulary, "temperature": 0, "cache_prompt": False,
        "post_sampling_probs": False,
    }})
    told = told if isinstance(told, dict) else json.loads(told)
    listed = told.get("completion_probabilities") or (told["choices"][0]["logprobs"] or {{"content": []}})["content"]
    for token in listed[0]["top_logprobs"] if listed else []:  # none where it ends the text
        found[end - 1, token["id"]] = token["logprob"]
np.save(sys.argv[3], found)
sys.stdout.flush()
os._exit(0)  # its threads do not end
"""
LLAMA2C = """
#define TESTING
#include "%s"
int main(int count, char **given) {
    Transformer model;
    build_transformer(&model, given[1]);
    for (int n = 2; n < count; n++)
        fwrite(forward(&model, atoi(given[n]), n - 2), sizeof(float), model.config.vocab_size, stdout);
    return 0;
}
"""


class CannotReadError(Exception):
    """The program for which the file was written does not run it."""


@dataclass(frozen=True)
class Programs:
    """Where the programs are; empty where they are not."""

    here: str
    llama_cpp: str
    executorch: str
    llama2c: str

    def names(self) -> dict[str, str]:
        """Format -> its program and version."""
        from importlib.metadata import version

        own = {name: version(name) for name in ("transformers", "compressed-tensors", "onnxruntime") if _has(name)}
        found = {"hf": f"transformers {own.get('transformers', '')}"}
        found |= {"gguf": f"llama.cpp (xllamacpp {_version(self.llama_cpp, 'xllamacpp')})"}
        found |= {"onnx": f"ONNX Runtime {own['onnxruntime']}" if "onnxruntime" in own else MISSING}
        found |= {"executorch": f"ExecuTorch {_version(self.executorch, 'executorch')}"}
        both = f"transformers, compressed-tensors {own.get('compressed-tensors', '')}"
        found |= {"compressed-tensors": both if "compressed-tensors" in own else MISSING}
        found |= {name: f"{file} ({_gcc()})" for name, file in LLAMA2C_FILES.items()}
        gone = {"gguf": self.llama_cpp, "executorch": self.executorch} | dict.fromkeys(LLAMA2C_FILES, self.llama2c)
        return {name: told if gone.get(name, "there") else MISSING for name, told in found.items()}


LLAMA2C_FILES = {"llama2c float32": "run.c", "llama2c int8": "runq.c"}
COLUMNS = ("hf", "gguf", "onnx", "executorch", "compressed-tensors", *LLAMA2C_FILES)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="an output folder, all its stages; or checkpoint folders")
    parser.add_argument("--llama-cpp", default=os.environ.get("LLAMA_CPP_PYTHON", ""))
    parser.add_argument("--executorch", default=os.environ.get("EXECUTORCH_PYTHON", ""))
    parser.add_argument("--llama2c", default=os.environ.get("LLAMA2C", ""))
    parser.add_argument("--only", nargs="+", choices=COLUMNS, default=COLUMNS)
    parser.add_argument("--cache", type=Path, default=Path("formats.json"))
    given = parser.parse_args(arguments)
    programs = Programs(sys.executable, given.llama_cpp, given.executorch, given.llama2c)
    kept: dict[str, str] = json.loads(given.cache.read_text()) if given.cache.is_file() else {}
    readers = programs.names()
    rows: dict[str, dict[str, str]] = {}
    for stage in (stage for run in given.run for stage in stages_of(run)):
        source = Checkpoint.open(stage)
        row = rows.setdefault(stage.name.rpartition("-")[0] or stage.name, {})
        keys = {column: f"{source.fingerprint} {column} by {readers[column]}" for column in given.only}
        ids: list[int] = []
        for column, key in keys.items():
            if readers[column] != MISSING and key not in kept:
                if not ids:
                    ids, ours = reference(source)
                kept[key] = cell(stage, column, ids, ours, programs)
                given.cache.write_text(json.dumps(kept, indent=2))
            row[column] = kept.get(key, MISSING)
            print(f"{stage.name} {column}: {row[column]}", file=sys.stderr, flush=True)
    print(table(rows, given.only, readers))


def stages_of(run: Path) -> list[Path]:
    """The last run's folders in order, or the one that is given."""
    if not (run / "report.json").is_file():
        return [run]
    return [run / Path(stage["path"]).name for stage in json.loads((run / "report.json").read_text())["stages"]]


def reference(source: Checkpoint) -> tuple[list[int], NDArray[np.float32]]:
    """Token ids and log-probabilities (tokens, vocabulary) of the numbers that the checkpoint's files stand for."""
    ids = load_text("embedded", "evaluate").token_ids(source.tokenizer(), TOKENS)
    logits = logits_of(exact_model(source), ids[None])[0]
    return ids.tolist(), log_probabilities(logits.numpy())


def log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    return torch.log_softmax(torch.from_numpy(logits), dim=-1).numpy()


def difference(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> float:
    """The largest, over the tokens that are not rare, at the positions that were asked for."""
    asked = ~np.isnan(theirs).all(1)
    kept = ours[asked] > RARE
    return float(np.abs(ours[asked] - theirs[asked])[kept].max())


def cell(stage: Path, column: str, ids: list[int], ours: NDArray[np.float32], programs: Programs) -> str:
    """What the table says: difference and bytes, or why there is no file."""
    form, _, kind = column.partition(" ")
    with tempfile.TemporaryDirectory(prefix="edgepress-formats-") as made:
        folder = Path(made)
        python = programs.executorch if form == "executorch" else programs.here
        try:
            path, nbytes, adapter = written(stage, form, kind, folder / FORMATS[form].default, python)
            theirs = read(column, path, adapter, ids, ours.shape[1], folder, programs)
        except PlanError as error:
            return refusal(str(error))
        except CannotReadError as error:
            return f"not loaded: {error}"
    return f"{difference(ours, theirs):.2g}; {size_text(nbytes, 'MiB', 1 if nbytes > 2**22 else 2)}"


def written(stage: Path, form: str, kind: str, out: Path, python: str) -> tuple[Path, int, str | None]:
    """Path, bytes and adapter of what `compress export` writes: in this process, or by another Python where that has
    what it takes. Raises PlanError where it refuses.
    """
    if python == sys.executable:
        made = module_of(FORMATS[form]).write(Checkpoint.open(stage, hashes=True), Wanted(out, kind), Runtime())
        return made.path, made.nbytes, made.facts.get("adapter")
    command = [python, "-m", "edgepress", "export", str(stage), "--to", form, "--json", "-o", str(out)]
    done = subprocess.run([*command, *(["--type", kind] if kind else [])], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error:" in line] or done.stderr.splitlines()[-1:]
        raise PlanError(lines[-1].partition("error: ")[2] or lines[-1] if lines else f"exit code {done.returncode}")
    facts = json.loads(done.stdout)
    return Path(facts["path"]), facts["bytes"], facts.get("adapter")


def refusal(line: str) -> str:
    """The reason without the flag before it and the advice behind it."""
    if "pip install" in line:
        return MISSING
    return "refused: " + re.split(r"; (?:take|give) ", re.sub(r"^--to \S+: ", "", line))[0]


def read(
    column: str, path: Path, adapter: str | None, ids: list[int], vocabulary: int, folder: Path, programs: Programs
) -> NDArray[np.float32]:
    """Log-probabilities (tokens, vocabulary) of the format's own program, in a process of its own."""
    if column in LLAMA2C_FILES:
        source, binary = folder / "logits.c", folder / "logits"
        source.write_text(LLAMA2C % (Path(programs.llama2c).resolve() / LLAMA2C_FILES[column]))
        _done(["gcc", "-O2", "-w", str(source), "-o", str(binary), "-lm"])
        raw = _done([str(binary), str(path / "model.bin"), *map(str, ids)])
        return log_probabilities(np.frombuffer(raw, np.float32).reshape(len(ids), vocabulary).copy())
    (folder / "ids.json").write_text(json.dumps(ids))
    python, program = {
        "gguf": (programs.llama_cpp, LLAMA_CPP), "onnx": (programs.here, ONNX),
        "executorch": (programs.executorch, EXECUTORCH),
    }.get(column, (programs.here, TRANSFORMERS))  # fmt: skip
    given = [str(path), str(folder / "ids.json"), str(folder / "logits.npy")]
    if column == "gguf":
        given += [str(vocabulary), str(EVERY), *([adapter] if adapter else [])]
    _done([python, "-c", program, *given])
    found: NDArray[np.float32] = np.load(folder / "logits.npy")
    return found if column == "gguf" else log_probabilities(found)


def _done(command: list[str]) -> bytes:
    done = subprocess.run(command, capture_output=True)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines()
        raise CannotReadError(lines[-1] if lines else f"exit code {done.returncode}")
    return done.stdout


def _has(package: str) -> bool:
    import importlib.metadata

    return any(True for _ in importlib.metadata.distributions(name=package))


def _version(python: str, package: str) -> str:
    if not python:
        return ""
    asked = f"from importlib.metadata import version; print(version({package!r}))"
    return subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()


def _gcc() -> str:
    return f"gcc {subprocess.run(['gcc', '-dumpfullversion'], capture_output=True, text=True).stdout.strip()}"


def table(cells: dict[str, dict[str, str]], columns: Sequence[str], readers: dict[str, str]) -> str:
    lines = ["| | " + " | ".join(f"`{column}`" for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += ["| read by | " + " | ".join(readers[column] for column in columns) + " |"]
    lines += [f"| {name} | " + " | ".join(row.get(c, "") for c in columns) + " |" for name, row in cells.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
