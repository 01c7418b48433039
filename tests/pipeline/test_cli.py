"""The command line: what a mistake gets, what --json prints, how soon --help answers."""

from __future__ import annotations

import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from edgepress.checkpoints.errors import RecipeError
from edgepress.pipeline.recipe import build

pytestmark = pytest.mark.pipeline

Command = Callable[..., Any]


def test_help_answers_without_importing_torch() -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "edgepress", "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "--wanda" in done.stdout
    code = "import sys, edgepress.pipeline.cli; assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time of both, since the machine is shared; a torch import alone takes several seconds.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "no/such/folder"], "there is no model 'no/such/folder'"),
        (["--wanda", "1-8"], "not an N:M pattern"),
        (["--wanda", "8:8"], "N must be at least 1 and below M"),
        (["--wanda", "1:7"], "self_attn.q_proj (64)"),
        (["--depth", "9"], "at most 4 can go"),
        (["--metric", "luck"], "perplexity, taylor, taylor-signed, magnitude, influence"),
        (["--skip", "lora,loro"], "no such stage"),
        (["--quant", "int5"], "gptq4, gptq3, gptq8"),
        (["--quant", "awq"], "(near: awq4)"),
        (["--quant", "int4-g64"], "--quant int4 --group 64"),
        (["--lora-targets", "w1"], "blocks have"),
        (["--eora", "48"], "the smallest quantised layer has rank 32"),
        (["--data", "no-such.txt"], "there is no text"),
        (["--device", "tpu"], "auto, cpu and cuda"),
        (["--recipe", "nowhere"], "shipped are"),
        (["--soc", "nochip"], "siracusa"),
        (["--protocol", "magic"], "windows and rows"),
    ],
)
def test_a_mistake_gets_one_message_and_code_2(
    compress: Command, quick: list[str], tiny_llama: Path, tmp_path: Path, arguments: list[str], words: str
) -> None:
    done = compress("--model", tiny_llama, *quick, *arguments, "-o", tmp_path / "out")
    assert done.returncode == 2, done.stdout + done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("[0-9]-*"))


def test_all_faults_of_a_recipe_come_at_once(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        "modle: x\nseed: one\nskip: lara\nstages:\n  - depth: {remove: -1}\n  - wonda\n  - lora: {rank: 8, rnak: 8}\n"
    )
    with pytest.raises(RecipeError) as caught:
        build(str(recipe), {})
    text = str(caught.value)
    for word in ("modle", "seed", "lara", "--depth -1", "wonda", "rnak"):
        assert word in text
    assert len(caught.value.faults) == 6


# Parameters as the models' published safetensors files count them.
PUBLISHED = {
    "smollm2-135m": 134515008, "smollm2-360m": 361821120, "smollm2-1.7b": 1711376384, "tinyllama-1.1b": 1100048384,
    "qwen2.5-0.5b": 494032768, "qwen2.5-1.5b": 1543714304, "qwen2.5-3b": 3085938688, "qwen3-0.6b": 596049920,
    "qwen3-1.7b": 1720574976, "qwen3-4b": 4022468096, "llama-3.2-1b": 1235814400, "llama-3.2-3b": 3212749824,
    "gemma-3-270m": 268098176, "gemma-3-1b": 999885952,
}  # fmt: skip


@pytest.mark.parametrize("preset", PUBLISHED)
def test_the_models_that_people_name_are_presets(compress: Command, preset: str) -> None:
    done = compress("plan", preset.upper(), "--depth", 1, "--skip", "wanda,lora,gptq,eora", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["source"]["parameters_total"] == PUBLISHED[preset]


def test_a_plan_waits_for_no_library_that_runs_models(chain: Path) -> None:
    """torch alone takes longer to import than the 1.5 seconds that a plan may take."""
    heavy = ("torch", "transformers", "peft", "matplotlib", "scipy", "pandas")
    first, depth = next(chain.glob("1-*")), ["--depth", "1", "--protect-first", "1", "--protect-last", "1"]
    depth += ["--skip", "wanda,lora,gptq,eora"]
    for arguments in (["plan", "llama-3.2-1b"], ["--plan", "--model", "qwen3-0.6b"], ["plan", str(first), *depth]):
        code = (
            f"import sys; sys.argv = ['compress', *{arguments}]\n"
            "from edgepress.pipeline.cli import perform\n"
            f"assert perform() == 0\nassert not {{*{heavy}}} & set(sys.modules), set({heavy}) & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", [p.stem for p in (Path(__file__).parents[2] / "recipes").glob("*.yaml")])
def test_every_shipped_recipe_plans(name: str) -> None:
    from edgepress.checkpoints.families import PRESETS, shape_from_config
    from edgepress.pipeline.plan import plan
    from edgepress.pipeline.sweep_recipe import is_sweep, load_sweep
    from edgepress.pipeline.tree import grow, spec_fingerprints

    shape = shape_from_config(PRESETS["llama-3.1-8b"])
    if is_sweep(name):
        assert grow(load_sweep(name, {}).configurations, lambda recipe: shape, spec_fingerprints).distinct
    else:
        assert plan(build(name, {}), shape)


def test_plan_prints_json_from_presets_and_config_json(compress: Command, tiny_llama: Path, tmp_path: Path) -> None:
    done = compress("plan", "--model", "llama-3.2-1b", "--json")
    stages = json.loads(done.stdout)["stages"]
    assert [s["stage"] for s in stages] == ["depth", "wanda", "lora", "gptq", "eora"]
    assert all(s["file_bytes"] > 0 and s["peak_memory_bytes"] > 0 for s in stages)
    # table A.1 of the thesis: depth 2 leaves 1114.2 M, with width 1:8 1007.7 M non-zero
    assert round(stages[0]["parameters_total"] / 1e6, 1) == 1114.2
    assert round(stages[1]["parameters_nonzero"] / 1e6, 1) == 1007.7
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text((tiny_llama / "config.json").read_text())
    bare = compress(
        "plan", "--model", tmp_path / "bare", "--wanda", "1:8", "--eora", "4", "--protect-first", "1", "--json"
    )
    assert bare.returncode == 0, bare.stderr
    assert json.loads(bare.stdout)["stages"][0]["blocks"] == 4


def test_an_unreachable_hub_names_the_local_way(compress: Command, tmp_path: Path) -> None:
    done = compress("--model", "someone/something", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "--model ./folder" in done.stderr


@pytest.mark.parametrize("command", [
    "run", "check", "plan", "fit", "rank", "eval", "verify", "pack", "export", "simulate", "unpack", "report",
    "generate", "compare",
])  # fmt: skip
def test_a_folder_that_is_not_there_is_called_so(compress: Command, tmp_path: Path, command: str) -> None:
    """Also one that might be the name of a model on the hub."""
    more = {"generate": ["hello"], "compare": ["demo/other"], "unpack": ["-o", "back"]}
    for name in ("./gone", "demo/reslut"):
        done = compress(command, name, *more.get(command, []), cwd=tmp_path)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert re.search(r"no (such )?(folder|file|checkpoint)", done.stderr), done.stderr
    assert not list(tmp_path.iterdir())


def test_options_before_a_command_are_refused(compress: Command) -> None:
    done = compress("--depth", "2", "plan")
    assert done.returncode == 2
    assert "options go behind the command" in done.stderr


def test_check_exits_3_when_it_does_not_fit_and_0_when_it_does(compress: Command, chain: Path) -> None:
    assert compress("check", "smollm2-135m").returncode == 3
    done = compress("check", chain / "result", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["fits"] is True


def test_eval_json_has_the_documented_keys_and_agrees_with_the_report(compress: Command, chain: Path) -> None:
    done = compress("eval", chain / "result", "--text", "embedded", "--window", 64, "--tokens", 1024, "--json")
    result = json.loads(done.stdout)
    assert set(result) >= {"perplexity", "tokens", "protocol"}
    report = json.loads((chain / "report.json").read_text())
    assert result["perplexity"] == report["stages"][-1]["perplexity"]["after"]
    assert result["tokens"] == 1024


def test_version_and_short_help(compress: Command) -> None:
    assert compress("--version").stdout == f"edgepress {version('edgepress')}\n"
    for command in ([], ["eval"], ["run"], ["socs"]):
        assert compress(*command, "-h").stdout == compress(*command, "--help").stdout != ""


def test_a_shell_completes_commands_and_options(compress: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """As bash asks: the words so far, and which of them the cursor is on."""
    monkeypatch.setenv("_COMPRESS_COMPLETE", "complete_bash")
    for words, place, expected in (("compress ev", "1", "eval"), ("compress plan --quant-eff", "2", "--quant-effort")):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", place)
        assert expected in compress().stdout.split()


def test_a_group_in_a_method_s_name_is_told_its_flag(compress: Command) -> None:
    done = compress("plan", "--quant", "int4-g32")
    assert done.returncode == 2 and "--quant int4 --group 32" in done.stderr
    assert "(near: awq4)" in compress("plan", "--quant", "awq").stderr


def test_run_is_the_plain_command(compress: Command, chain: Path) -> None:
    """Told so by its help: the same options, and the model as an argument."""
    plain, named = compress("--help").stdout, compress("run", "--help").stdout
    flags = set(re.findall(r"--[a-z-]+", plain)) - {"--version", "--install-completion", "--show-completion"}
    assert flags == set(re.findall(r"--[a-z-]+", named))
    assert compress("run", "nowhere", "--plan").stderr == compress("--plan", "--model", "nowhere").stderr != ""


@pytest.mark.parametrize("command", ["plan", "run --plan", "check", "fit"])
def test_a_model_is_an_argument_or_an_option_and_not_both(compress: Command, command: str) -> None:
    argument = compress(*command.split(), "stories15m")
    option = compress(*command.split(), "--model", "stories15m")
    both = compress(*command.split(), "stories260k", "--model", "stories15m")
    assert argument.returncode == option.returncode and argument.stderr == option.stderr
    assert _without_times(argument.stdout) == _without_times(option.stdout) and argument.stdout + argument.stderr
    assert both.returncode == 2 and "given twice" in both.stderr


def _without_times(text: str) -> str:
    return re.sub(r"about \S+ \w+ here", "", text)


@pytest.mark.parametrize("command", ["verify", "pack", "export", "simulate", "generate"])
def test_a_checkpoint_must_be_named(compress: Command, command: str) -> None:
    done = compress(command, *(["hello"] if command == "generate" else []))
    assert done.returncode == 2 and "must be named" in done.stderr


@pytest.mark.parametrize("arguments", [["-o", "a", "-o", "b"], ["--out", "a", "-o", "b"], ["--out=a", "-ob"]])
def test_an_output_is_named_once(compress: Command, arguments: list[str]) -> None:
    for command in ([], ["run"], ["ablate"], ["eval"], ["pack", "model"]):
        done = compress(*command, *arguments)
        assert done.returncode == 2 and "is given twice" in done.stderr


def test_an_output_folder_stands_for_its_result(compress: Command, chain: Path, tmp_path: Path) -> None:
    result = chain / "result"
    judged, of_result = (" ".join(compress("check", named).stdout.split()) for named in (chain, result))
    assert judged.replace(str(chain), "") == of_result.replace(str(result), "") != ""
    assert compress("rank", chain, "--samples", 2, "--length", 32, "--json").returncode == 2  # quantised: not ranked
    assert compress("verify", chain).stdout == compress("verify", result).stdout != ""
    packed = [compress("pack", named, "-o", tmp_path / f"{k}.bin", "--json") for k, named in enumerate((chain, result))]
    assert json.loads(packed[0].stdout)["sha256"] == json.loads(packed[1].stdout)["sha256"]
    plans = [compress("plan", named, "--skip", "depth,wanda,lora,gptq", "--json") for named in (chain, result)]
    assert plans[0].returncode == plans[1].returncode and plans[0].stderr == plans[1].stderr
    for k, named in enumerate((chain, result)):
        assert compress("export", named, "--to", "hf", "-o", tmp_path / f"hf{k}").returncode == 0
    first, second = ({p.name: p.read_bytes() for p in (tmp_path / f"hf{k}").iterdir()} for k in (0, 1))
    assert first == second
    stages = compress("generate", chain, "void", "--tokens", 2, "--plain").stdout
    assert all(f"[{path.name}]" in stages for path in chain.glob("[1-5]-*"))
    for command in ("run", "ablate"):
        done = compress(command, chain, "-o", chain)
        assert done.returncode == 2 and "the output folder itself" in done.stderr


def test_pack_writes_over_a_file_only_when_told(compress: Command, chain: Path, tmp_path: Path) -> None:
    taken = tmp_path / "model.bin"
    assert compress("pack", chain, "-o", taken).returncode == 0
    before = taken.read_bytes()
    taken.write_bytes(before[:-1])
    done = compress("pack", chain, "-o", taken)
    assert done.returncode == 2 and "--force" in done.stderr and taken.read_bytes() == before[:-1]
    assert compress("pack", chain, "-o", taken, "--force").returncode == 0 and taken.read_bytes() == before
    taken.write_text("mine")  # which --force does not cover
    assert compress("pack", chain, "-o", taken, "--force").returncode == 2 and taken.read_text() == "mine"


def test_check_names_tensors_in_json_only_when_asked(compress: Command, chain: Path) -> None:
    short, whole = (json.loads(compress("check", chain, "--json", *more).stdout) for more in ([], ["--tensors"]))
    assert "tensors" not in short["placement"] and whole["placement"]["tensors"]
    assert len(json.dumps(short)) < len(json.dumps(whole)) / 2
    assert compress("check", chain, "--tensors").returncode == 2


def test_quiet_and_verbose(compress: Command, chain: Path) -> None:
    def told(*arguments: str) -> tuple[str, str]:
        done = compress("eval", chain / "result", "--window", 64, "--tokens", 1024, *arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout, done.stderr

    usual, quiet, verbose = told(), told("-q"), told("--verbose")
    assert usual[0] == quiet[0] == verbose[0] and usual[0].startswith("perplexity ")
    assert quiet[1] == "" and "measuring perplexity of" in usual[1]
    assert len(verbose[1].splitlines()) > len(usual[1].splitlines())
    assert compress("eval", "-q", "-v").returncode == 2


def test_eval_says_what_it_is_about_to_measure(compress: Command, chain: Path, tmp_path: Path) -> None:
    """The tokens that --limit leaves, and the text that --from names; with --json nothing."""
    text = tmp_path / "own.txt"
    text.write_text("a line of one's own, and another\n" * 200)
    asked = ("eval", chain / "result", "--window", 64, "--limit", 2, "--from", f"perplexity={text}")
    done = compress(*asked, "--task", "perplexity", "--answers", "none")
    assert done.returncode == 0 and f"on 128 tokens of {text}: about" in done.stderr, done.stderr
    assert "measuring" not in compress(*asked, "--task", "perplexity", "--answers", "none", "--json").stderr


@pytest.mark.parametrize("metric", ["magnitude", "bits"])
def test_rank_says_what_it_is_about_to_do(
    compress: Command, tiny_llama: Path, metric: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EDGEPRESS_CACHE", str(tmp_path))
    asked = ("rank", tiny_llama, "--metric", metric, "--samples", 2, "--length", 32, "--data", "embedded")
    done = compress(*asked)
    subject = "ranking 6 blocks of" if metric == "magnitude" else "measuring what each of 16 ways costs every layer"
    assert done.returncode == 0, done.stderr
    assert re.search(rf"{subject}.* on 2 windows of 32 tokens: about \d+ s here", done.stderr), done.stderr
    again = "16 ways costs every layer was measured before, and is kept in" if metric == "bits" else subject
    assert again in compress(*asked).stderr
    for quiet in ("-q", "--json"):
        assert compress(*asked, quiet).stderr == ""


@pytest.mark.usefixtures("undrawn")
def test_report_says_what_it_is_about_to_write(compress: Command, chain: Path, tmp_path: Path) -> None:
    """Samples that are kept are not counted again."""
    out = shutil.copytree(chain, tmp_path / "out", symlinks=True)
    asked = ("report", out, "--samples", 2, "--tokens", 200, "--prompts", "A file")

    def told(*more: object) -> str:
        done = compress(*asked, *more)
        assert done.returncode == 0, done.stderr
        return str(done.stderr)

    first = re.search(
        rf"writing {re.escape(str(out))}/report.html with its figures and 1 samples of at most 200 tokens by each of "
        r"uncompressed, eora\S*: about (\d+) s here", told(),
    )  # fmt: skip
    again = re.search(r"about (\d+) s here", told())
    assert first and again and int(first[1]) > int(again[1])
    assert re.search(r"report.html with its figures: about \d+ s here", told("--samples", 0))
    assert told("-q") == told("--json") == ""


def test_fit_says_so_where_nothing_fits(compress: Command) -> None:
    done = compress("fit", "llama-2-7b")
    assert done.returncode == 3 and "No setting of the stages makes llama-2-7b fit" in done.stdout


def test_ctrl_c_says_how_to_go_on(tiny_llama: Path, quick: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "edgepress.pipeline.cli",
        "--model",
        str(tiny_llama),
        "-o",
        str(tmp_path / "out"),
        *quick,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "out" / "compress.log"
    while not (log.is_file() and "1/5 depth" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "the same command goes on" in stdout
    assert "Traceback" not in stderr
