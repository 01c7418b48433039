"""The page itself: self-contained, escaped, complete or saying what is missing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from edgepress.pipeline.cli import app
from edgepress.pipeline.page import content
from edgepress.pipeline.page.content import sections
from edgepress.pipeline.page.read import clean, read_study
from edgepress.pipeline.page.render import Sample, Samples, chosen, write_report
from edgepress.pipeline.recipe import build
from tests.pipeline import report_help as made

pytestmark = pytest.mark.unit

HOSTILE = "<script>alert(1)</script>\" onload='x' $\\frac$ {{ 7*7 }} & \x00"


class Page(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def written(out: Path, samples: Samples | None = None) -> tuple[Page, str, list[str]]:
    study = read_study(out)
    result = write_report(study, made.chip(study), samples, "not asked for.", "1 core")
    html = result.page.read_text()
    return Page(html), html, result.left_out


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page, str, list[str]]:
    out = made.write_run(tmp_path_factory.mktemp("page") / "out")
    samples = Samples({"Once": [Sample("uncompressed", "upon a time", 20.0), Sample("eora", "<b>twice</b>", 24.0)]}, 9)
    return out, *written(out, samples)


def test_a_whole_run_leaves_nothing_out(whole: tuple[Path, Page, str, list[str]]) -> None:
    out, page, _, left_out = whole
    assert left_out == ["Answers, measured speed and intervals: there is no evaluation.json of these checkpoints here."]
    found = [attributes["id"] for attributes in page.all("section")]
    wanted = [
        "results",
        "next",
        "quality",
        "stages",
        "memory",
        "importance",
        "training",
        "quantisation",
        "samples",
        "reproduce",
        "left-out",
    ]
    assert found == wanted
    pngs = {path.stem for path in (out / "figures").glob("*.png")}
    assert pngs == {
        *("pareto", "waterfall-perplexity", "waterfall-bytes", "memory-map", "importance-1", "lora-loss"),
        "gptq-error-1",
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (out / "figures").glob("*.png"))
    for words in ("2.14.1", "2 cores", "upon a time", "Seed", "embedded", "compress --recipe"):
        assert words in page.words


def test_nothing_on_the_page_points_outside_it(whole: tuple[Path, Page, str, list[str]]) -> None:
    _, page, html, _ = whole
    for tag, attributes in page.tags:
        for name in ("src", "srcset", "href", "action", "poster"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:", "#")), f"{tag} {name}"
    assert "@import" not in html and "url(" not in re.sub(r"data:[^\"]*", "", html)
    policy = next(a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None and policy.startswith("default-src 'none'; img-src data:;")


def test_figures_have_words_and_tables_have_headings(whole: tuple[Path, Page, str, list[str]]) -> None:
    _, page, _, _ = whole
    images = page.all("img")
    assert len(images) == len(page.all("figure")) == 7
    assert all(len(image["alt"] or "") > 40 for image in images)
    assert all(head.get("scope") in ("col", "row") for head in page.all("th"))
    assert page.all("html")[0]["lang"] == "en"
    identifiers = [a["id"] for _, a in page.tags if a.get("id")]
    assert len(identifiers) == len(set(identifiers))
    targets = {a["href"] for a in page.all("a")}
    assert {f"#{name}" for name in ("results", "memory", "samples")} <= targets <= {f"#{name}" for name in identifiers}


def test_hostile_names_stay_words(tmp_path: Path) -> None:
    recipe = {"soc": "siracusa", "seed": 0, "model": HOSTILE}
    names = ("none", HOSTILE, "both")
    state = {
        "about": HOSTILE,
        "notes": [HOSTILE],
        "configurations": [{"name": n, "recipe": recipe, "failure": ""} for n in names]
        + [{"name": "bad", "recipe": recipe, "failure": HOSTILE}],
    }
    rows = [row | {"sweep": HOSTILE, "model": HOSTILE, "text": HOSTILE} for row in made.sweep_rows(names)]
    out = made.write_sweep(tmp_path / "out", rows, state)
    page, html, _ = written(out, Samples({clean(HOSTILE): [Sample(clean(HOSTILE), clean(HOSTILE), 1.0)]}, 3))
    assert len(page.all("script")) == 1
    assert not [tag for tag, attributes in page.tags if "onload" in attributes]
    assert "<script>alert" not in html and "{{ 7*7 }}" in page.words and "\x00" not in html
    assert page.words.count("<script>alert(1)</script>") >= 8
    assert all(re.fullmatch(r"[\w.-]+", path.name) for path in (out / "recipes").iterdir())


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize(
    ("stages", "reasons"),
    [
        ((), ["What each stage did", "Block importance", "LoRA's losses", "GPTQ's errors"]),
        (("depth", "wanda"), ["LoRA's losses", "GPTQ's errors"]),
        (("gptq", "eora"), ["Block importance", "LoRA's losses"]),
    ],
)
def test_what_a_run_lacks_is_left_out_by_name(tmp_path: Path, stages: tuple[str, ...], reasons: list[str]) -> None:
    page, _, left_out = written(made.write_run(tmp_path / "out", stages))
    found = [reason.partition(":")[0] for reason in left_out]
    assert [reason for reason in found if not reason.startswith("Answers")] == [*reasons, "Generated text"]
    assert all(reason in page.words for reason in left_out)
    assert ("no lora stage in this run" in page.words) == ("lora" not in stages)


@pytest.mark.usefixtures("undrawn")
def test_a_stage_whose_folder_is_gone_is_said_so(tmp_path: Path) -> None:
    out = made.write_run(tmp_path / "out")
    for path in out.glob("4-gptq-*/*"):
        path.unlink()
    _, _, left_out = written(out)
    assert "GPTQ's errors: the folder of gptq is not in out, or its manifest cannot be read." in left_out


@pytest.mark.usefixtures("undrawn")
def test_no_verdict_is_a_reason(tmp_path: Path) -> None:
    study = read_study(made.write_run(tmp_path / "out", hardware={"fits": None, "summary": "No verdict: odd model."}))
    _, missing = sections(study, made.chip(study))
    assert missing[0] == "Memory map: No verdict: odd model."


@pytest.mark.usefixtures("undrawn")
def test_pictures_of_an_earlier_report_do_not_stay(tmp_path: Path) -> None:
    out = made.write_run(tmp_path / "out")
    written(out)
    made.write_run(out, ("wanda",))
    written(out)
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {"pareto.png", "waterfall-perplexity.png", "waterfall-bytes.png", "memory-map.png"}


@pytest.mark.usefixtures("undrawn")
def test_the_recipe_beside_the_page_is_the_one_that_ran(tmp_path: Path) -> None:
    ran = build("two-minutes", {"seed": 3, "model": "tiny", "wanda.pattern": "2:4"})
    out = made.write_run(tmp_path / "out", recipe=ran.to_dict())
    written(out)
    again = build(str(out / "recipe.yaml"), {})
    assert again.to_dict() == ran.to_dict()
    packaged = build("default", {})  # its model is none
    made.write_run(out, recipe=packaged.to_dict())
    written(out)
    assert build(str(out / "recipe.yaml"), {}).to_dict() == packaged.to_dict()
    study = read_study(out)
    assert content.recipes(study)[0].command == f"compress --recipe {out / 'recipe.yaml'} -o again"


def test_samples_come_from_the_uncompressed_model_and_the_last_stages(tmp_path: Path) -> None:
    study = read_study(made.write_run(tmp_path / "out"))
    assert [name for name, _ in chosen(study, 3)] == ["lora", "gptq", "eora"]  # the source is not on this disk
    assert [name for name, _ in chosen(study, 99)] == list(made.STAGES)


def test_the_text_colours_have_enough_contrast() -> None:
    css = (resources.files("edgepress.pipeline.page") / "templates" / "report.css").read_text()
    found = re.findall(r"--(ink|muted|accent|good|bad|page|faint): (#[0-9a-f]{6})", css)
    assert len(found) == 14
    modes = [dict(found[:7]), dict(found[7:])]  # by day and by night

    def light(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.03928 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    assert light(modes[0]["page"]) > 0.9 and light(modes[1]["page"]) < 0.02
    for colours in modes:
        for background in (colours.pop("page"), colours.pop("faint")):
            for name, colour in colours.items():
                dark, bright = sorted((light(background), light(colour)))
                assert (bright + 0.05) / (dark + 0.05) >= 4.5, name


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "there is no folder"),
        (["OUT", "--samples", "-1"], "--samples must be 0 or more"),
        (["OUT", "--prompts", " "], "a prompt needs at least one word"),
        (["OUT", "--soc", "abacus"], "abacus"),
    ],
)
def test_mistakes_of_the_command(tmp_path: Path, arguments: list[str], words: str) -> None:
    out = made.write_run(tmp_path / "out")
    result = CliRunner().invoke(app, ["report", *(str(out) if a == "OUT" else a for a in arguments)])
    assert result.exit_code != 0
    assert words in str(result.exception)
    assert not (out / "report.html").exists()


@pytest.mark.usefixtures("undrawn")
def test_the_command_says_what_it_wrote(tmp_path: Path) -> None:
    out = made.write_run(tmp_path / "out", ("wanda",))
    result = CliRunner().invoke(app, ["report", str(out), "--samples", "0", "--json"])
    assert result.exit_code == 0, result.output
    told: dict[str, Any] = json.loads(result.stdout)
    assert told["bytes"] == (out / "report.html").stat().st_size
    assert len(told["figures"]) == 4
    assert any("switched off by --samples 0" in reason for reason in told["left_out"])
