"""Kinds that mean harm: code that must not run, and paths that lead out of the folders a command was given."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign import mutate, server
from tests.campaign.case import Case, kind
from tests.campaign.hostile import _use
from tests.campaign.server import Bounds
from tests.campaign.world import number


class _Payload:
    """Unpickled, it touches the canary."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.canary}",)


def _python(canary: Path) -> str:
    return f"import pathlib\npathlib.Path({str(canary)!r}).touch()\nclass Evil:\n    pass\n"


def _pickled(case: Case) -> bytes:
    return pickle.dumps(_Payload(case.canary))


@kind("hostile", 30)
def code_planted(case: Case) -> None:
    """Pickles, auto_map, custom classes and scripts in models, adapters and unfinished work; none may run."""
    ways: list[Callable[[Case], None]] = [
        _pickled_weights, _pickled_beside, _auto_map, _tokenizer_class, _adapter_pickle, _work_pickle, _data_script,
        _generation_code,
    ]  # fmt: skip
    case.draw.choice(ways)(case)


def _pickled_weights(case: Case) -> None:
    model = case.copy(case.world.model)
    (model / "model.safetensors").unlink()
    name = case.draw.choice(("pytorch_model.bin", "model.pt", "consolidated.00.pth", "model.ckpt", "tf_model.h5"))
    (model / name).write_bytes(_pickled(case))
    case.tell(f"{name} is a pickle")
    _use(case, case.draw.choice([model, model / name]))


def _pickled_beside(case: Case) -> None:
    model = case.copy(case.world.model)
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (model / name).write_bytes(_pickled(case))
    case.tell("pickles beside sound weights")
    _use(case, model)


def _auto_map(case: Case) -> None:
    model = case.copy(case.world.model)
    (model / "modeling_evil.py").write_text(_python(case.canary))
    path = model / case.draw.choice(("config.json", "tokenizer_config.json"))
    config = json.loads(path.read_text())
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    config["auto_map"] = (
        dict.fromkeys(names, "modeling_evil.Evil")
        if path.name == "config.json"
        else {"AutoTokenizer": ["modeling_evil.Evil"] * 2}
    )
    if case.draw.random() < 0.5:
        config["model_type"] = "evil"
    config["trust_remote_code"] = True
    path.write_text(json.dumps(config))
    case.tell(f"auto_map in {path.name}")
    _use(case, model)


def _tokenizer_class(case: Case) -> None:
    model = case.copy(case.world.model)
    (model / "tokenization_evil.py").write_text(_python(case.canary))
    path = model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = case.draw.choice(("tokenization_evil.Evil", "Evil", "os.system", "../outside/evil"))
    config["tokenizer_file"] = str(case.outside / "secret.txt")
    path.write_text(json.dumps(config))
    case.tell(f"tokenizer_class {config['tokenizer_class']}")
    _use(case, model)


def _adapter_pickle(case: Case) -> None:
    model = case.copy(case.world.last("five"), "model")
    (model / "manifest.json").unlink()
    way = case.draw.choice(("pickle", "both", "auto_mapping", "corda"))
    path = model / "adapter_config.json"
    config = json.loads(path.read_text())
    (model / "adapter_model.bin").write_bytes(_pickled(case))
    (model / "evil.py").write_text(_python(case.canary))
    if way == "pickle":
        (model / "adapter_model.safetensors").unlink()
    elif way == "auto_mapping":
        config["auto_mapping"] = {"base_model_class": "Evil", "parent_library": "evil"}
    elif way == "corda":
        config["base_model_name_or_path"] = str(case.outside)
    path.write_text(json.dumps(config))
    case.tell(f"adapter: {way}")
    _use(case, model)


def _work_pickle(case: Case) -> None:
    """The Trainer keeps an optimiser's state as a pickle: a planted one is found before it is read."""
    chain = "distill"
    event = case.world.events(chain) * case.draw.randrange(2, 8) // 9
    out = case.work_copy(case.world.unfinished(chain, event))
    places = [p for p in out.rglob("*") if p.suffix in (".pt", ".pth", ".bin") and p.is_file()]
    for path in places or [out / "optimizer.pt"]:
        mutate.replace_file(path, _pickled(case)) if path.exists() else path.write_bytes(_pickled(case))
    case.tell(f"event {event}: pickles in the place of {[p.name for p in places]}")
    case.compress(*case.world.chain_argv(chain, out))


def _data_script(case: Case) -> None:
    """A folder or script where a data set's name is expected."""
    folder = case.given / "dataset"
    folder.mkdir()
    (folder / "dataset.py").write_text(_python(case.canary))
    spec = case.draw.choice((folder, folder / "dataset.py", "./dataset"))
    case.tell(f"data {spec}")
    argv = ["eval", case.world.model, "--text", spec, "--window", "64", "--tokens", "128"]
    case.compress(*argv)


def _generation_code(case: Case) -> None:
    model = case.copy(case.world.model)
    (model / "custom_generate").mkdir()
    (model / "custom_generate" / "generate.py").write_text(_python(case.canary) + "def generate(*a, **k): pass\n")
    path = model / "generation_config.json"
    config = json.loads(path.read_text()) if path.exists() else {}
    config |= {"custom_generate": str(model), "trust_remote_code": True, "cache_implementation": "evil"}
    path.write_text(json.dumps(config))
    case.tell("custom_generate")
    case.compress("generate", model, "the statement", "--tokens", "4")


_TEMPLATES = {
    "escape": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "import": "{{ self.__init__.__globals__.__builtins__.__import__('os').system('touch CANARY') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "attr": "{{ (''|attr('__class__')|attr('__mro__'))[1] }}",
    "include": "{% include '../../outside/secret.txt' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "endless": "{% for i in range(10**9) %}{% endfor %}x",
    "nested loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}x",
    "huge": "{{ 'x' * 10**10 }}",
    "huge join": "{{ ('x' * 10**6) | replace('x', 'x' * 10**6) }}",
    "long": "{% for i in range(99999) %}{{ messages[0].content * 1000 }}{% endfor %}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "format": "{{ '%1000000000d' % 1 }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "syntax": "{% for %}",
    "unclosed": "{{ messages[0].content",
    "raise": "{{ raise_exception('no') }}",
    "undefined": "{{ nothing.at.all }}",
    "zero": "{{ 1 // 0 }}",
    "type": "{{ messages + 1 }}",
    "deep": "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}",
    "number": 7,
    "list": [{"name": "default", "template": "{{ messages[0].content }}"}],
    "nothing": "",
}  # fmt: skip


@kind("hostile", 24)
def template_planted(case: Case) -> None:
    """A chat template that breaks out, never ends, grows without end or is no template."""
    model = case.copy(case.world.model)
    name = case.draw.choice(sorted(_TEMPLATES))
    template = _TEMPLATES[name]
    if isinstance(template, str):
        template = template.replace("CANARY", str(case.canary))
    if isinstance(template, str) and case.draw.random() < 0.5:
        (model / "chat_template.jinja").write_text(template)
    else:
        path = model / "tokenizer_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": template}))
    case.tell(f"template: {name}")
    tasks = ["--task", "triviaqa-closed", "--from", f"triviaqa-closed={case.world.questions}", "--new-tokens", "2"]
    rows = case.given / "chat.jsonl"
    messages = [{"role": "user", "content": f"what is {i}?"} for i in range(3)]
    rows.write_text("".join(json.dumps({"messages": messages}) + "\n" for _ in range(50)))
    commands: list[list[object]] = [
        ["generate", model, "the statement", "--chat", "--tokens", "3"],
        ["eval", model, *tasks, "--chat", "--answers", case.work / "answers", "-o", case.work / "s.json"],
        ["eval", model, "--text", rows, "--window", "32", "--tokens", "64"],
        ["eval", model, "--text", case.world.text, "--window", "64", "--tokens", "128"],
    ]
    case.compress(*case.draw.choice(commands))


# --- paths that lead out ---------------------------------------------------------------------------------------------


@kind("hostile", 30)
def path_leads_out(case: Case) -> None:
    """Names and links in models, stores, sweeps and images that leave their folder: nothing there is touched."""
    ways: list[Callable[[Case], None]] = [
        _weight_map, _linked_files, _store_link, _result_link, _manifest_parent, _report_paths, _sweep_paths,
        _adapter_path, _manifest_files,
    ]  # fmt: skip
    case.draw.choice(ways)(case)


def _outer_weights(case: Case) -> Path:
    return Path(shutil.copy(case.world.model / "model.safetensors", case.outside / "model.safetensors"))


def _weight_map(case: Case) -> None:
    model = case.copy(case.world.model)
    outer = _outer_weights(case)
    import safetensors

    with safetensors.safe_open(outer, "pt") as file:
        names = list(file.keys())
    (model / "model.safetensors").unlink()
    target = case.draw.choice(
        (
            "../../outside/model.safetensors",
            str(outer),
            "./../../outside/model.safetensors",
            "x/../../../outside/model.safetensors",
        )
    )
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, target)}
    (model / "model.safetensors.index.json").write_text(json.dumps(index))
    case.tell(f"weight_map: {target}")
    _must_not_work(case, model)


def _must_not_work(case: Case, model: Path) -> None:
    done = case.compress("eval", model, "--text", case.world.text, "--window", "64", "--tokens", "128")
    if done.code == 0:
        case.fault("outside", f"weights outside were measured: {number(done.out)}")


def _linked_files(case: Case) -> None:
    """Links out of a model's folder: allowed to be refused, not to be copied into a result."""
    model = case.copy(case.world.model)
    names = [
        "tokenizer.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
        "chat_template.jinja",
        "tokenizer.model",
    ]
    name = case.draw.choice([*names, "added_tokens.json", "generation_config.json"])
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(case.outside / "secret.txt")
    case.tell(f"{name} links to a secret")
    argv = ["--model", model, "--data", case.world.text, "--window", "64", "--tokens", "128", "--depth", "0"]
    argv += ["--skip", "lora,gptq,eora", "--wanda-samples", "2", "--wanda-length", "32", "-o", case.work / "out"]
    commands: list[list[object]] = [argv, ["pack", model, "--tokenizer", "-o", case.work / "image.bin"]]
    case.compress(*case.draw.choice(commands))


def _store_link(case: Case) -> None:
    """Links out of a store where the product would write."""
    out = case.work_copy(case.world.undisturbed("five"))
    name = case.draw.choice(
        [
            "measurements",
            "compress.log",
            "report.json",
            ".locks",
            "recipe.yaml",
            "calibration",
            "figures",
            "report.html",
        ]
    )
    path = out / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    folder = name in ("measurements", ".locks", "calibration", "figures")
    path.symlink_to(case.outside if folder else case.outside / "victim.txt")
    case.tell(f"{name} leads out")
    world = case.world
    argv = case.draw.choice(
        [
            world.chain_argv("five", out),
            ["report", out, "--samples", "0"],
            [*world.chain_argv("five", out), "--seed", "3", "--skip", "lora,gptq,eora"],
        ]
    )
    case.compress(*argv)


def _result_link(case: Case) -> None:
    out = case.work_copy(case.world.undisturbed("five"))
    outer = case.outside / "model"
    shutil.copytree(case.world.last("five"), outer)
    (out / "result").unlink()
    (out / "result").symlink_to(case.draw.choice((str(outer), "../../outside/model", "/etc")))
    case.tell("result leads out")
    case.compress(
        *case.draw.choice(
            [
                ["eval", out, "--text", case.world.text],
                ["report", out, "--samples", "0"],
                case.world.chain_argv("five", out),
            ]
        )
    )


def _resealed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file of ours and give it the hash that somebody who means it would give."""
    from edgepress.checkpoints.manifest import SEAL, sealed, write_json

    data = json.loads(path.read_text())
    data.pop(SEAL, None)
    change(data)
    write_json(path, sealed(data))


def _manifest_parent(case: Case) -> None:
    out = case.work_copy(case.world.undisturbed("five"))
    stage = (out / "result").resolve()
    to = case.draw.choice(("../../../outside", str(case.outside), "/etc", "\0", "../" * 30))
    _resealed(stage / "manifest.json", lambda d: d["parent"].update(path=to))
    case.tell(f"manifest's parent: {to!r}")
    case.compress(
        *case.draw.choice(
            [
                ["verify", stage],
                ["report", out, "--samples", "0"],
                ["eval", stage, "--text", case.world.text, "--tokens", "512"],
            ]
        )
    )


def _manifest_files(case: Case) -> None:
    """A store at a URL whose manifest names files elsewhere: nothing of it may arrive."""
    far = case.given / "far"
    shutil.copytree(case.world.undisturbed("five"), far, symlinks=True)
    stage = (far / "result").resolve()
    name = case.draw.choice(
        ("../evil", "../../outside/evil", str(case.outside / "evil"), "a/../../evil", "..", "\0", "x" * 5000)
    )
    bad = {"bytes": 4, "sha256": "4" * 64}
    if case.draw.random() < 0.5:
        _resealed(stage / "manifest.json", lambda d: d["files"].update({name: bad}))
        case.tell(f"far manifest names {name!r}")
    else:
        target = case.draw.choice([p for p in stage.rglob("*") if p.is_file()])
        case.tell(f"far {target.name}: {mutate.damage_file(target, case.draw)}")
    key = json.loads((case.world.last("five") / "manifest.json").read_text())["fingerprint"]
    near = case.work / "near"

    def body() -> None:
        from edgepress.checkpoints.errors import EdgepressError
        from edgepress.pipeline.store import Mirror

        try:
            Mirror(far.as_uri(), near).fetch(stage.name, key)
        except EdgepressError as error:
            raise SystemExit(f"error: {error}") from None

    done = server.run(body, ("Mirror.fetch",), case.work, Bounds((case.work,), (case.outside,)))
    case.judge(done, (0, 1))
    if done.code == 0 and (near / stage.name).is_dir():
        from tests.campaign.world import weights

        case.same("fetched", weights(near / stage.name), weights(case.world.last("five")))
    elif near.is_dir() and any(near.glob("[0-9]-*")):
        case.fault("left over", "a part of what was fetched")


def _report_paths(case: Case) -> None:
    out = case.work_copy(case.world.undisturbed("five"))

    def change(data: dict[str, Any]) -> None:
        for stage in data["stages"]:
            stage["path"] = case.draw.choice((str(case.outside), "../../outside", "/etc"))

    _resealed(out / "report.json", change)
    case.tell("report.json's paths lead out")
    case.compress("report", out, "--samples", case.draw.choice(("0", "1")), "--tokens", "4")


def _sweep_paths(case: Case) -> None:
    out = case.work_copy(case.world.swept)

    def change(data: dict[str, Any]) -> None:
        for configuration in data["configurations"]:
            configuration["folders"] = ["../../outside" for _ in configuration["folders"]]

    _resealed(out / "sweep.json", change)
    case.tell("sweep.json's folders lead out")
    argv = [["report", out, "--samples", "0"], ["sweep", case.world.sweep, "-o", out]]
    case.compress(*case.draw.choice(argv), codes=(0, 1, 2))


def _adapter_path(case: Case) -> None:
    model = case.copy(case.world.last("five"), "model")
    (model / "manifest.json").unlink()
    adapter = model / "adapter_model.safetensors"
    outer = case.outside / "adapter.safetensors"
    shutil.move(adapter, outer)
    adapter.symlink_to(outer)
    case.tell("the adapter is a link out")
    _must_not_work(case, model)


@kind("hostile", 14)
def adapter_changed(case: Case) -> None:
    """A checkpoint's adapter without its manifest: config changed, weights crafted; a number only if it is the same."""
    model = case.copy(case.world.last("five"), "model")
    (model / "manifest.json").unlink()
    if case.draw.random() < 0.6:
        case.tell(mutate.change_json_file(model / "adapter_config.json", case.draw))
    else:
        path = model / "adapter_model.safetensors"
        size = int.from_bytes(path.read_bytes()[:8], "little")
        case.tell(mutate.flip_in(path, case.draw, 0, 8 + size))
    _use(case, model)
