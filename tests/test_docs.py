"""The pages that `make docs` builds: whole, and readable without a network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.pipeline

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs", reason="the pages need mkdocs-material and mkdocstrings, which make setup installs")
    site = tmp_path_factory.mktemp("docs") / "site"
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(site)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr  # strict: a link to nothing and a docstring that cannot be read are errors
    return site


def test_every_public_module_area_and_format_has_its_page(site: Path) -> None:
    expected = {
        "api/python.html": ["edgepress.pipeline.api.compress", "edgepress.checkpoints.errors.EdgepressError"],
        "api/checkpoints.html": ["edgepress.checkpoints.checkpoint.Checkpoint.block"],
        "api/stages.html": ["edgepress.stages.gptq.plan", "edgepress.stages.options.Wanda"],
        "api/eval.html": ["edgepress.eval.perplexity.measure"],
        "api/hardware.html": ["edgepress.hardware.check.Verdict.fits"],
        "api/pipeline.html": ["edgepress.pipeline.recipe.Recipe"],
    }
    for page, names in expected.items():
        text = (site / page).read_text()
        for name in names:
            assert f'id="{name}"' in text
    for page in ("index.html", "hardware/rv32/FORMAT.html", "hardware/socs/SCHEMA.html", "benchmarks/methods.png"):
        assert (site / page).is_file()


def test_nothing_is_fetched_to_read_them(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 12
    for page in pages:
        for tag in re.findall(r"<(?:script|link|img|iframe|source)\b[^>]*>", page.read_text()):
            assert not re.search(r'(?:src|href)="(?:https?:)?//', tag), f"{page}: {tag}"
    for style in site.rglob("*.css"):
        assert not re.search(r"@import|url\(['\"]?(?:https?:)?//", style.read_text()), style
