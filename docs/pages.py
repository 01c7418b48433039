"""A hook of MkDocs: the pages that lie where they belong in the repository, and the pictures that they show."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
PAGES = (
    "README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/*.md", "benchmarks/*.png",
    "hardware/*/*.md", "stages/README.md", "tests/campaign/README.md", "examples/*.py", "examples/*.ipynb", "LICENSE",
)  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    for pattern in PAGES:
        for path in sorted(ROOT.glob(pattern)):
            name = str(path.relative_to(ROOT))
            files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files
