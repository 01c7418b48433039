"""What imports what: no circles, and one direction, by the source alone."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parents[1]
# Each folder with those that its modules may import from, besides itself.
BELOW = {
    "pipeline": {"stages", "eval", "hardware", "checkpoints"},
    "stages": {"checkpoints"},
    "eval": {"checkpoints"},
    "hardware": {"checkpoints"},
    "checkpoints": set(),
}


def source_files() -> dict[str, Path]:
    """Each module's file, by its name below `edgepress`."""
    files = [path.relative_to(ROOT) for folder in BELOW for path in (ROOT / folder).rglob("*.py")]
    return {".".join(file.with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports() -> dict[str, set[str]]:
    """The modules that each module's source imports: at the top, in functions, and for type checkers alike."""
    files, found = source_files(), {}
    for module, file in files.items():
        found[module] = set()
        for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names = [(alias.name, "") for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file}:{node.lineno} imports by a relative name"
                names = [(f"{node.module}.{alias.name}", str(node.module)) for alias in node.names]
            else:
                continue
            for whole, package in names:  # `from a import b` takes the module a.b, or a name of the module a
                known = (name.removeprefix("edgepress.") for name in (whole, package))
                found[module] |= {next((name for name in known if name in files), module)} - {module}
    return found


def circles(graph: dict[str, set[str]]) -> set[str]:
    """The largest groups of modules that all import one another, directly or through others."""

    def reached(start: str) -> set[str]:
        seen, waiting = set(), [start]
        while waiting:
            new = graph[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {module: reached(module) for module in graph}
    return {
        " ".join(sorted(other for other in reach[module] if module in reach[other]))
        for module in graph
        if module in reach[module]
    }


def test_a_circle_is_found_through_any_number_of_modules() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": {"d"}, "f": {"a"}}) == {"a b c", "d e"}
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == set()


def test_no_circle_of_imports() -> None:
    assert circles(imports()) == set()


def test_the_map_names_what_is_there() -> None:
    """Every path of ARCHITECTURE.md and CONTRIBUTING.md, but for the names that a reader chooses."""
    for page in ("ARCHITECTURE.md", "CONTRIBUTING.md", "README.md", "stages/README.md"):
        text = (ROOT / page).read_text(encoding="utf-8")
        paths = re.findall(r"`((?:[a-z]+/)+[\w.]+\.(?:py|md|toml))`", text)
        missing = {path for path in paths if not (ROOT / path).is_file() and not _chosen(path)}
        assert not missing, f"{page} names {', '.join(sorted(missing))}"


def _chosen(path: str) -> bool:
    """Whether a path is one that a page tells its reader to write."""
    return "NAME" in path or Path(path).stem in ("chance", "dither", "direction", "ternary")


def test_imports_go_one_way() -> None:
    graph = imports()
    assert {name.split(".")[0] for names in graph.values() for name in names} == BELOW.keys()
    up = {
        f"{module} imports {name}"
        for module, names in graph.items()
        for name in names
        if (folder := name.split(".")[0]) != (own := module.split(".")[0]) and folder not in BELOW[own]
    }
    assert not up
