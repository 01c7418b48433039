"""Kinds that damage what the product wrote, or feed it what others wrote badly or with intent."""

from __future__ import annotations

import json
import math
import os
import random
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.campaign import mutate
from tests.campaign.case import Case, digest, kind
from tests.campaign.world import CHAINS, EVAL, number, perplexities, weights

_UNVOUCHED = ("compress.log", "sweep.log", "recipe.yaml", ".locks", "figures", ".edgepress", "report.html")


def _one_of_each(case: Case, folder: Path) -> Path:
    """A file of a folder: first one of the kinds there are, then one of the kind."""
    groups: dict[str, list[Path]] = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            name = "".join(c for c in path.name if not c.isdigit())
            groups.setdefault(f"{path.parent.name[:6]}/{name[:14]}{path.suffix}", []).append(path)
    return case.draw.choice(groups[case.draw.choice(sorted(groups))])


# --- what the product wrote ------------------------------------------------------------------------------------------


@kind("hostile", 40)
def finished_run_damaged(case: Case) -> None:
    """Any file of a finished output folder flipped, cut or removed; then any command on it."""
    chain = case.draw.choice(["five", "nf4", "vocabulary", "dora", "self"])
    expected = case.world.undisturbed(chain)
    out = case.work_copy(expected)
    target = _one_of_each(case, out)
    name = target.relative_to(out)
    case.tell(f"chain {chain}, {name.parent}: {mutate.damage_file(target, case.draw)}")
    stage = out / name.parts[0] if (out / name.parts[0] / "config.json").exists() else (out / "result").resolve()
    command = case.draw.choice(["compress", "compress", "eval", "eval all", "verify", "pack", "report", "check"])
    if command == "compress":
        done = case.compress(*case.world.chain_argv(chain, out))
        if done.code == 0:
            case.same("weights", weights(out), weights(expected))
            case.same("report", perplexities(out), perplexities(expected))
    elif command == "eval":
        done = case.eval(stage)
        if done.code == 0:
            case.same("perplexity", number(done.out), case.world.perplexity(expected / stage.name))
    elif command == "eval all":
        from tests.campaign.kills import _scores

        argv = ["--text", case.world.text, *EVAL, "--limit", "4", "-o"]
        done = case.compress("eval", out, *argv, case.work / "scores.json")
        if done.code == 0:
            whole = case.world.made(f"scores-{chain}.json", lambda p: case.world.run("eval", expected, *argv, p))
            case.same("scores", _scores(case.work / "scores.json"), _scores(whole))
    elif command == "verify":
        done = case.compress("verify", stage)
        vouched = stage.name == name.parts[0] and name.name not in ("loss.png",) and name.parts[-1] not in _UNVOUCHED
        if done.code == 0 and vouched and digest(target) != digest(expected / name):
            case.fault("silently wrong", f"verified with a damaged {name}")
    elif command == "pack":
        done = case.compress("pack", stage, "-o", case.work / "image.bin")
        if done.code == 0:
            whole = case.world.made(
                f"image-{stage.name}", lambda p: case.world.run("pack", expected / stage.name, "-o", p)
            )
            case.same("image", digest(case.work / "image.bin"), digest(whole))
        elif (case.work / "image.bin").exists():
            case.fault("left over", "an image of a damaged checkpoint")
    elif command == "report":
        done = case.compress("report", out, "--samples", "0")
        told = "! " in done.err or done.out.count("left out: ") > 1  # one is for --samples 0
        if done.code == 0 and not told:
            case.same("page", _numbers_of_page(out), _numbers_of_page(case.world.reported(chain)))
    else:
        done = case.compress("check", stage, "--json", codes=(0, 2, 3))
        if done.code in (0, 3):
            whole = case.world.made(
                f"check-{stage.name}",
                lambda p: p.write_text(case.world.run("check", expected / stage.name, "--json").out),
            )
            expected_words = whole.read_text().replace(str(expected), str(out))
            case.same("verdict", json.loads(done.out), json.loads(expected_words))


def _numbers_of_page(out: Path) -> list[str]:
    """The numbers that a report shows, in order, without those of paths, times and figures."""
    text = re.sub(r"data:[^\"']+|<svg.*?</svg>", "", (out / "report.html").read_text(), flags=re.DOTALL)
    return re.findall(r"(?<![\w/.-])\d+\.\d+(?![\w/-])", re.sub(r"/\S+", "", text))


@kind("hostile", 40)
def unfinished_run_damaged(case: Case) -> None:
    """A chain killed in the middle, then any of its files damaged; the resumed run gives the same bytes or refuses."""
    chain = case.draw.choice(list(CHAINS))
    event = case.draw.choice(range(1, 9)) * max(20, case.world.events(chain)) // 9
    expected, out = case.world.undisturbed(chain), case.work_copy(case.world.unfinished(chain, event))
    unfinished = [p for p in out.glob("[0-9]-*") if not (p / "manifest.json").is_file()]
    within = unfinished[0] if unfinished and case.draw.random() < 0.7 else out
    if not any(p.is_file() for p in within.rglob("*")):
        within = out
    target = _one_of_each(case, within)
    case.tell(f"chain {chain}, event {event}, {target.relative_to(out)}: {mutate.damage_file(target, case.draw)}")
    if case.draw.random() < 0.2 and unfinished:
        command = case.draw.choice(["eval", "verify", "pack", "check"])
        argv = [command, unfinished[0], *(["-o", case.work / "image.bin"] if command == "pack" else [])]
        if case.compress(*argv, codes=(2,)).code == 0:
            case.fault("silently wrong", f"{command} took an unfinished folder")
    done = case.compress(*case.world.chain_argv(chain, out))
    if done.code == 0:
        case.same("weights", weights(out), weights(expected))
        case.same("report", perplexities(out), perplexities(expected))


@kind("hostile", 14)
def answers_damaged(case: Case) -> None:
    """Kept answers or a report of `eval` flipped or edited; the scores are the right ones or it is refused."""
    from tests.campaign.kills import _scores

    work = case.work_copy(case.world.answered, "answered")
    files = [p for p in work.rglob("*") if p.is_file()]
    target = case.draw.choice(files)
    if target.suffix == ".jsonl" and case.draw.random() < 0.4:
        text = target.read_text()
        mutate.replace_file(target, text.replace("true", "false", 1).replace(" e", " q", 1).encode())
        case.tell(f"{target.name}: edited")
    else:
        case.tell(mutate.damage_file(target, case.draw))
    if target.name == "scores.json":
        whole = case.world.answered / "scores.json"
        done = case.compress("compare", target, whole)
        if done.code == 0 and digest(target) != digest(whole):
            case.fault("silently wrong", "a damaged report was compared")
        return
    done = case.compress(*case.world.eval_argv(case.world.model, work))
    if done.code == 0:
        case.same("scores", _scores(work / "scores.json"), _scores(case.world.answered / "scores.json"))


@kind("hostile", 12)
def sweep_damaged(case: Case) -> None:
    """Any file of a finished sweep damaged; then the sweep again, or its report."""
    from tests.campaign.kills import _rows

    out = case.work_copy(case.world.swept)
    target = _one_of_each(case, out)
    case.tell(f"{target.relative_to(out)}: {mutate.damage_file(target, case.draw)}")
    if case.draw.random() < 0.5:
        case.compress("report", out, "--samples", "0")
        return
    done = case.compress("sweep", case.world.sweep, "-o", out, codes=(0, 1, 2))
    if done.code == 0:
        case.same("weights", weights(out), weights(case.world.swept))
        case.same("results", _rows(out), _rows(case.world.swept))


@kind("hostile", 30)
def image_damaged(case: Case) -> None:
    """A packed image flipped or cut, or its header rewritten with a hash that holds; then unpack."""
    image, out = case.copy(case.world.image), case.work / "restored"
    crafted = case.draw.random() < 0.6
    case.tell(_crafted_image(image, case.draw) if crafted else mutate.damage_file(image, case.draw))
    if image.exists():
        done = case.compress("unpack", image, "-o", out)
        if done.code == 0 and not crafted and digest(image) != digest(case.world.image):
            case.fault("silently wrong", "a damaged image was unpacked")
        if done.code != 0 and out.exists():
            case.fault("left over", "a folder of a damaged image")
        if done.code == 0 and case.draw.random() < 0.5:
            case.eval(out)


def _crafted_image(path: Path, draw: random.Random) -> str:
    """Another header, its hash made anew: what somebody who means it would send."""
    import hashlib

    from edgepress.checkpoints.packed_sizes import PAGE, PREAMBLE_BYTES, aligned

    fixed = struct.Struct("<8sIIQd")
    data = bytearray(path.read_bytes())
    magic, version, header_bytes, _, scale = fixed.unpack_from(data)
    table = json.loads(bytes(data[PREAMBLE_BYTES : PREAMBLE_BYTES + header_bytes]))
    body = bytes(data[aligned(PREAMBLE_BYTES + header_bytes, PAGE) :])
    way = draw.choice(("header", "header", "header", "body", "documents", "scale", "sizes", "deep"))
    said = way
    if way == "header":
        table, said = mutate.change_json(table, draw, deepest=6)
    elif way == "body":
        place = draw.randrange(len(body))
        body = body[:place] + draw.randbytes(8) + body[place + 8 :]
    elif way == "documents":
        name = draw.choice(
            ("../evil.json", "/tmp/campaign-evil", "..", "a/../../evil", "manifest.json", "config.json", "\0")
        )
        table.setdefault("documents", {})[name] = [0, 10]
        said = f"documents: {name!r}"
    elif way == "scale":
        scale = draw.choice((float("nan"), float("inf"), -1.0, 1e300))
    elif way == "sizes":
        layout = draw.choice(table["layouts"])
        entry = draw.choice(layout)
        key = draw.choice([k for k in entry if k != "kind"])
        entry[key] = draw.choice((*mutate.ODD, [2**40, 2**40], [2**62, 4], [-1, -1]))
        said = f"{entry.get('name')}.{key}"
    text = json.dumps(table).encode()
    if way == "deep":
        text = text[:-1] + b', "deep": ' + b"[" * 100000 + b"]" * 100000 + b"}"
    start = aligned(PREAMBLE_BYTES + len(text), PAGE)
    head = fixed.pack(magic, version, len(text), start + len(body), scale)
    filled = text.ljust(start - PREAMBLE_BYTES) + body
    hashed = hashlib.sha256(head + filled).digest()
    mutate.replace_file(path, (head + hashed).ljust(PREAMBLE_BYTES, b"\0") + filled)
    return f"image, hash holds: {said}"


# --- what others wrote -----------------------------------------------------------------------------------------------


def _use(case: Case, model: Path | str) -> Any:
    """A command on a model that is not ours; `eval` half of the time, since its number can be held against another."""
    command = case.draw.choice(["eval", "eval", "eval", "check", "plan", "generate", "pack", "rank", "compress"])
    if command == "eval":
        return case.eval(model)
    chain = ["--data", case.world.text, "--skip", "lora,gptq,eora", "--window", "64", "--tokens", "256"]
    chain += ["--depth", "1", "--protect-first", "1", "--protect-last", "1", "--depth-samples", "2"]
    chain += ["--depth-length", "32", "--wanda-samples", "2", "--wanda-length", "32"]
    argv: dict[str, list[object]] = {
        "check": ["check", model],
        "plan": ["plan", "--model", model, *chain],
        "generate": ["generate", model, "the statement", "--tokens", "4"],
        "pack": ["pack", model, "-o", case.work / "image.bin"],
        "rank": ["rank", model, "--data", case.world.text, "--samples", "2", "--length", "32", "--metric", "magnitude"],
        "compress": ["--model", model, *chain, "-o", case.work / "out"],
    }
    case.compress(*argv[command], codes=(0, 2, 3) if command == "check" else (0, 2))
    return None


@kind("hostile", 40)
def config_changed(case: Case) -> None:
    """A model's config.json with one value gone, odd, renamed or nested; our number is plain transformers' or none."""
    model = case.copy(case.world.model)
    case.tell(mutate.change_json_file(model / "config.json", case.draw))
    done = _use(case, model)
    if done is not None:
        case.like_plain(done, model, case.world.perplexity(case.world.model))


@kind("hostile", 26)
def weights_file_crafted(case: Case) -> None:
    """A safetensors header that lies: sizes, offsets, types, names, depth; or a file cut, or an index that lies."""
    model = case.copy(case.world.model)
    path = model / "model.safetensors"
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    way = case.draw.choice(
        ("json", "json", "json", "length", "cut", "dtype", "renamed", "huge", "deep", "index", "nan")
    )
    said = way
    if way == "json":
        header, said = mutate.change_json(header, case.draw)
    elif way == "dtype":
        name = case.draw.choice([k for k in header if k != "__metadata__"])
        header[name]["dtype"] = case.draw.choice(("F16", "F32", "U8", "F8_E4M3", "I64", "BOOL", "C64", "F4", ""))
    elif way == "renamed":
        name = case.draw.choice([k for k in header if k != "__metadata__"])
        header[name.replace("layers.1", "layers.9") if "layers.1" in name else f"x.{name}"] = header.pop(name)
        said = f"{name} renamed"
    elif way == "huge":
        name = case.draw.choice([k for k in header if k != "__metadata__"])
        header[name]["shape"] = [2**31, 2**31]
    text = json.dumps(header).encode()
    if way == "deep":
        text = b"[" * 50000 + b"]" * 50000
    size = case.draw.choice((2**63, 2**40, 0, 1, len(data))) if way == "length" else len(text)
    data = struct.pack("<Q", size) + text + body
    if way == "cut":
        data = data[: case.draw.randrange(len(data))]
    elif way == "nan":
        place = len(data) - 2 * case.draw.randrange(1, 1000)
        data = data[:place] + b"\xff\x7f" + data[place + 2 :]
    mutate.replace_file(path, data)
    if way == "index":
        names = [k for k in header if k != "__metadata__"]
        index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model.safetensors")}
        index, said = mutate.change_json(index, case.draw)
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    case.tell(f"safetensors: {said}")
    done = _use(case, model)
    if done is not None:
        case.like_plain(done, model, case.world.perplexity(case.world.model))


@kind("hostile", 24)
def tokenizer_changed(case: Case) -> None:
    """tokenizer.json or tokenizer_config.json changed or damaged; our number is plain transformers' or none."""
    model = case.copy(case.world.model)
    path = model / case.draw.choice(
        ["tokenizer.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"]
    )
    if case.draw.random() < 0.7:
        case.tell(mutate.change_json_file(path, case.draw, deepest=case.draw.choice((1, 2, 4))))
    else:
        case.tell(mutate.damage_file(path, case.draw))
    done = _use(case, model)
    if done is not None:
        case.like_plain(done, model, case.world.perplexity(case.world.model))


@kind("hostile", 24)
def gguf_crafted(case: Case) -> None:
    """A GGUF file whose header, keys, counts or offsets were changed, or that is cut."""
    path = case.copy(case.world.gguf)
    header_end = path.stat().st_size - 4 * 10**5
    ways: list[Callable[[], str]] = [
        lambda: mutate.flip_in(path, case.draw, 0, 24),
        lambda: mutate.flip_in(path, case.draw, 24, 700),
        lambda: mutate.flip_in(path, case.draw, 24, max(800, header_end)),
        lambda: mutate.damage_file(path, case.draw),
        lambda: _gguf_counts(path, case.draw),
        lambda: _gguf_key(path, case.draw),
    ]
    case.tell(case.draw.choice(ways)())
    if path.exists():
        done = _use(case, path)
        if done is not None and path.is_file():
            case.like_plain(done, path.parent, case.world.perplexity(case.world.gguf), gguf=path.name)


def _gguf_counts(path: Path, draw: random.Random) -> str:
    data = bytearray(path.read_bytes())
    place = draw.choice((8, 16))
    value = draw.choice((0, 1, 2**31, 2**62, 2**64 - 1))
    data[place : place + 8] = struct.pack("<Q", value)
    mutate.replace_file(path, bytes(data))
    return f"count at {place} is {value}"


def _gguf_key(path: Path, draw: random.Random) -> str:
    """A number behind a key replaced."""
    data = bytearray(path.read_bytes())
    keys = (
        "block_count", "embedding_length", "feed_forward_length", "attention.head_count", "attention.key_length",
        "rope.dimension_count", "vocab_size", "context_length", "rope.freq_base", "layer_norm_rms_epsilon",
    )  # fmt: skip
    key = draw.choice(keys)
    place = data.index(f"llama.{key}".encode()) + len(f"llama.{key}") + 4
    value = (
        struct.pack("<f", draw.choice((0.0, -1.0, math.nan, 1e30)))
        if "freq" in key or "norm" in key
        else struct.pack("<I", draw.choice((0, 1, 3, 5, 2**31 - 1, 2**32 - 1)))
    )
    data[place : place + 4] = value
    mutate.replace_file(path, bytes(data))
    return f"{key} is {value.hex()}"


@kind("hostile", 18)
def llama2c_crafted(case: Case) -> None:
    """llama2.c's model.bin or tokenizer with another header, random bytes, or cut."""
    folder = case.copy(case.world.llama2c)
    path = folder / case.draw.choice(("model.bin", "model.bin", "tok512.bin"))
    if path.name == "model.bin" and case.draw.random() < 0.6:
        data = bytearray(path.read_bytes())
        place, value = case.draw.randrange(7), case.draw.choice((0, 1, -1, 3, 7, 64, 2**31 - 1, -(2**31), 1000))
        data[4 * place : 4 * place + 4] = struct.pack("<i", value)
        mutate.replace_file(path, bytes(data))
        case.tell(f"header field {place} is {value}")
    elif case.draw.random() < 0.5:
        case.tell(mutate.flip_in(path, case.draw, 0, 28 if path.name == "model.bin" else 4000))
    else:
        case.tell(mutate.damage_file(path, case.draw))
    if (folder / "model.bin").exists():
        done = _use(case, folder / "model.bin")
        if done is not None and done.code == 0 and not math.isfinite(number(done.out)):
            case.fault("silently wrong", f"perplexity {number(done.out)}")


@kind("hostile", 30)
def recipe_changed(case: Case) -> None:
    """A shipped recipe or sweep with a line gone, odd, nested, aliased or tagged; then plan, or the run itself."""
    from edgepress import recipes

    shipped = sorted(Path(recipes.__path__[0]).glob("*.yaml"))
    source = case.draw.choice([*shipped, case.world.sweep, case.world.recipe])
    path = case.copy(source, "recipe.yaml")
    text, said = source.read_text(), []
    for _ in range(case.draw.choice((1, 1, 2))):
        text, what = mutate.change_text(text, case.draw, case.canary)
        said.append(what)
    mutate.replace_file(path, text.encode(errors="surrogatepass"))
    case.tell(f"{source.name}: {'; '.join(said)}")
    own: list[object] = []
    if source == case.world.recipe:
        own = ["--model", case.world.model, "--data", case.world.text, "--window", "64", "--tokens", "256"]
    elif source != case.world.sweep:
        own = ["--model", "smollm2-135m", "--data", "embedded"]  # a shape, deep enough for what recipes remove
    done = case.compress("plan", "--recipe", path, *own)
    if done.code == 0 and source == case.world.recipe:
        case.compress("--recipe", path, *own, "-o", case.work / "out")
    if done.code == 0 and source == case.world.sweep and case.draw.random() < 0.5:
        case.compress("sweep", path, "-o", case.work / "out", codes=(0, 1, 2))


@kind("hostile", 24)
def chip_changed(case: Case) -> None:
    """A chip's TOML file changed; `check` and `fit` say what is wrong, and no number of theirs is not one."""
    path = case.copy(case.world.soc, "chip.toml")
    text, said = mutate.change_text(path.read_text(), case.draw, case.canary)
    mutate.replace_file(path, text.encode(errors="surrogatepass"))
    case.tell(said)
    model = case.draw.choice([case.world.model, case.world.last("five"), "stories260k"])
    command = case.draw.choice(["check", "check", "check", "fit", "set"])
    if command == "set":
        argv: list[object] = ["check", model, "--soc", path, "--set", f"kv_copies={case.draw.choice(mutate.ODD)!s:.50}"]
    else:
        argv = [command, model, "--soc", path]
    done = case.compress(*(str(a).replace("\0", "") for a in argv), codes=(0, 2, 3))
    words = done.out.lower().replace("(", " ").replace(",", " ").split()
    if done.code in (0, 3) and ("nan" in words or "inf" in words):
        case.fault("silently wrong", "a number that is none, in the verdict")


# --- data ------------------------------------------------------------------------------------------------------------

_LINES = [f"Line {i} says that the statement of number {i} is executed, and so on." for i in range(60)]
_PLAIN = "\n".join(_LINES)


def _rows_of(lines: list[str]) -> list[dict[str, Any]]:
    return [{"text": line} for line in lines]


@kind("hostile", 30)
def text_encoded(case: Case) -> None:
    """The same text with a byte order mark, other line ends, suffixes and forms gives the same number, or a message."""
    import pandas

    base = case.given / "base.txt"
    base.write_text(_PLAIN)
    jsonl = "".join(json.dumps(r) + "\n" for r in _rows_of(_LINES))
    ways: dict[str, tuple[str, bytes, str]] = {  # name, contents, what is right: same, rows, refused
        "bom": ("a.txt", b"\xef\xbb\xbf" + _PLAIN.encode(), "same"),
        "crlf": ("a.txt", _PLAIN.replace("\n", "\r\n").encode(), "same"),
        "upper": ("A.TXT", _PLAIN.encode(), "same"),
        "utf16": ("a.txt", _PLAIN.encode("utf-16"), "same or refused"),
        "latin1": ("a.txt", ("é" + _PLAIN).encode("latin-1"), "refused"),
        "nul": ("a.txt", _PLAIN.encode() + bytes(100), "any"),
        "empty": ("a.txt", b"", "refused"),
        "blank": ("a.txt", b" \n\n\t\n" * 100, "refused"),
        "bom rows": ("a.jsonl", b"\xef\xbb\xbf" + jsonl.encode(), "rows"),
        "crlf rows": ("a.jsonl", jsonl.replace("\n", "\r\n").encode(), "rows"),
        "upper rows": ("A.JSONL", jsonl.encode(), "rows"),
        "json rows": ("a.json", json.dumps(_rows_of(_LINES)).encode(), "rows"),
        "utf16 rows": ("a.jsonl", jsonl.encode("utf-16"), "rows or refused"),
        "null": ("a.jsonl", jsonl.encode() + b'{"text": null}\n', "refused"),
        "number": ("a.jsonl", jsonl.encode() + b'{"text": 7}\n', "refused"),
        "list": ("a.jsonl", jsonl.encode() + b'{"text": ["a", "b"]}\n', "refused"),
        "nested": ("a.jsonl", jsonl.encode() + b'{"text": {"a": "b"}}\n', "refused"),
        "no row": ("a.jsonl", jsonl.encode() + b"7\n", "refused"),
        "no field": ("a.jsonl", jsonl.encode() + b'{"other": "x"}\n', "refused"),
        "cut row": ("a.jsonl", jsonl.encode() + b'{"text": "a', "refused"),
        "deep row": ("a.jsonl", jsonl.encode() + b'{"text": ' + b"[" * 10**5 + b"]" * 10**5 + b"}\n", "refused"),
        "deep json": ("a.json", b"[" * 10**6, "refused"),
        "digits": ("a.json", b'[{"text": ' + b"9" * 10**5 + b"}]", "refused"),
        "surrogate": ("a.jsonl", jsonl.encode() + b'{"text": "\\ud800 alone"}\n', "refused"),
        "parquet": ("a.parquet", b"", "rows"),
        "parquet null": ("a.parquet", b"", "refused"),
        "parquet cut": ("a.parquet", b"", "refused"),
        "parquet flipped": ("a.parquet", b"", "any"),
        "folder": ("a.txt", b"", "refused"),
        "special": ("a.txt", b"x", "any"),
        "special rows": ("a.jsonl", b"x", "any"),
    }  # fmt: skip
    way = case.draw.choice(sorted(ways))
    name, contents, right = ways[way]
    path = case.given / name
    if way == "folder":
        path.mkdir()
    elif "parquet" in way:
        rows = _rows_of(_LINES)
        pandas.DataFrame([*rows, {"text": None}] if way == "parquet null" else rows).to_parquet(path)
        if way == "parquet cut":
            path.write_bytes(path.read_bytes()[: case.draw.randrange(path.stat().st_size)])
        elif way == "parquet flipped":
            case.tell(mutate.flip_in(path, case.draw, 0, 10**9))
    else:
        path.write_bytes(contents)
    if "special" in way:
        case.tell(mutate.special(path, case.draw))
    if case.draw.random() < 0.25:
        out = ["--skip", "lora,gptq,eora", "--depth", "0", "--wanda-samples", "2", "--wanda-length", "32"]
        argv = ["--model", case.world.model, "--data", path, *out, "--window", "32", "--tokens", "64"]
        done = case.compress(*argv, "-o", case.work / "out")
        if done.code == 0 and right == "refused":
            case.fault("silently wrong", f"{way}: accepted as calibration text")
        return
    plain = base if right.startswith("same") else case.given / "base.jsonl"
    (case.given / "base.jsonl").write_text(jsonl)
    short = ["--window", "64", "--tokens", "512", "--dtype", "float32"]
    done = case.compress("eval", case.world.model, "--text", path, *short)
    case.tell(f"{way}: {right}")
    if done.code != 0:
        if right in ("same", "rows"):
            case.fault("message", f"{way}: refused, and could be read")
    elif right == "refused":
        case.fault("silently wrong", f"{way}: measured, {number(done.out)}")
    elif right != "any":
        expected = case.compress("eval", case.world.model, "--text", plain, *short, codes=(0,))
        case.same(way, number(done.out), number(expected.out))
    elif not math.isfinite(number(done.out)):
        case.fault("silently wrong", f"perplexity {number(done.out)}")


@kind("hostile", 14)
def questions_changed(case: Case) -> None:
    """A task's file of questions changed or damaged; scores are numbers within bounds, or there is a message."""
    path = case.copy(case.world.questions)
    if case.draw.random() < 0.6:
        lines = path.read_text().splitlines()
        place = case.draw.randrange(len(lines))
        value, said = mutate.change_json(json.loads(lines[place]), case.draw)
        lines[place] = json.dumps(value)
        mutate.replace_file(path, "\n".join(lines).encode())
    else:
        said = mutate.damage_file(path, case.draw)
    case.tell(said)
    argv = ["--task", "triviaqa-closed", "--from", f"triviaqa-closed={path}", "--new-tokens", "3"]
    done = case.compress(
        "eval", case.world.model, *argv, "--answers", case.work / "answers", "-o", case.work / "s.json"
    )
    if done.code == 0:
        scores = json.loads((case.work / "s.json").read_text())["checkpoints"][0]["results"]["triviaqa-closed"][
            "scores"
        ]
        if any(s["metric"] in ("accuracy", "exact", "substring") and not 0 <= s["value"] <= 1 for s in scores):
            case.fault("silently wrong", "a share that is none")


@kind("hostile", 14)
def special_in_place(case: Case) -> None:
    """A pipe, device, loop or dangling link in the place of a file that a command reads."""
    model = case.copy(case.world.model)
    names = {"config.json": "model", "model.safetensors": "model", "tokenizer.json": "model"}
    places = [
        *names,
        "image",
        "recipe",
        "chip",
        "gguf",
        "llama2c",
        "questions",
        "answers",
        "manifest.json",
        "report.json",
    ]
    place = case.draw.choice(places)
    if place in names:
        case.tell(mutate.special(model / place, case.draw))
        _use(case, model)
        return
    if place in ("manifest.json", "report.json"):
        out = case.work_copy(case.world.undisturbed("five"))
        target = (out / "result").resolve() / place if place == "manifest.json" else out / place
        case.tell(mutate.special(target, case.draw))
        argv: list[object] = case.draw.choice(
            [["verify", out / "result"], ["report", out, "--samples", "0"], ["eval", out]]
        )
        case.compress(*argv)
        return
    suffix = {"recipe": ".yaml", "chip": ".toml", "gguf": ".gguf", "llama2c": ".bin", "questions": ".jsonl"}
    where = case.work if place == "answers" else case.given  # answers are written where they are read
    path = where / f"x{suffix.get(place, '')}"
    case.tell(f"{place}: {mutate.special(path, case.draw)}")
    small = [case.world.model, "--task", "triviaqa-closed", "--new-tokens", "2"]
    commands: dict[str, list[object]] = {
        "image": ["unpack", path, "-o", case.work / "restored"],
        "recipe": ["plan", "--recipe", path],
        "chip": ["check", "stories260k", "--soc", path],
        "gguf": ["eval", path, "--text", case.world.text, *EVAL],
        "llama2c": ["eval", path, "--text", case.world.text, *EVAL],
        "questions": ["eval", *small, "--from", f"triviaqa-closed={path}", "--answers", case.work / "a"],
        "answers": ["eval", *small, "--from", f"triviaqa-closed={case.world.questions}", "--answers", path],
    }
    case.compress(*commands[place], codes=(0, 2, 3))


@kind("hostile", 10)
def special_as_output(case: Case) -> None:
    """Outputs named as devices, folders, files of others or places that are not there; what lies there stays."""
    targets: list[str | Path] = [
        "/dev/null",
        "/dev/full",
        case.work / "folder",
        case.work / "no" / "such",
        case.work / "mine.txt",
        case.work,
    ]
    (case.work / "folder").mkdir()
    (case.work / "mine.txt").write_text("mine")
    fifo = case.work / "pipe"
    os.mkfifo(fifo)
    target = case.draw.choice([*targets, fifo])
    world = case.world
    commands: list[list[object]] = [
        ["pack", world.last("five"), "-o", target],
        ["unpack", world.image, "-o", target],
        ["check", "stories260k", "--csv", target],
        ["check", "stories260k", "--png", target],
        [
            "rank",
            world.model,
            "--data",
            world.text,
            "--metric",
            "magnitude",
            "--samples",
            "2",
            "--length",
            "32",
            "-o",
            case.work / "folder" if target == case.work else target,  # a folder gets a file beside it
        ],
        ["eval", world.model, "--text", world.text, *EVAL, "--limit", "2", "-o", target],
        world.chain_argv("gates", Path(target)),
    ]
    command = case.draw.choice(commands)
    case.compress(*command, codes=(0, 2, 3))
    if (case.work / "mine.txt").read_text(errors="replace") != "mine" and command[0] in ("pack", "unpack", "--model"):
        case.fault("outside", f"{command[0]} wrote over a file that is not its own")
    if not fifo.is_fifo() or Path("/dev/null").is_file():
        case.fault("outside", "a pipe or device was replaced")
