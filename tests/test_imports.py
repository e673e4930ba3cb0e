"""The arrows of the design: what each package may import of ours, read from the source of every file."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"kernels", "data", "ggsd_jax", "configs", "experiments", "tests"}
MAY_IMPORT = {
    "kernels": {"kernels"},
    "data": {"data"},
    "ggsd_jax": {"kernels", "data", "ggsd_jax"},
    "configs": set(),
    "experiments": {"kernels", "data", "ggsd_jax", "experiments"},
    "tests": {"kernels", "data", "ggsd_jax", "experiments"},
}


def imported(path: Path) -> set[str]:
    """Top-level names of all modules a file imports, wherever in the file it does."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
        elif isinstance(node, ast.ImportFrom):  # relative: it stays within the package it climbs to
            parents = path.relative_to(ROOT).parts[: -node.level]
            names.add(parents[0] if parents else (node.module or "").split(".")[0])
    return names


def files(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_of_ours_only_what_the_design_allows(package):
    wrong = {str(f.relative_to(ROOT)): imported(f) & OURS - MAY_IMPORT[package] for f in files(package)}
    assert {name: names for name, names in wrong.items() if names} == {}


def test_data_never_imports_jax():
    assert [f.name for f in files("data") if imported(f) & {"jax", "jaxlib", "flax", "optax"}] == []


def test_no_module_needs_torch():
    assert [f.name for p in ("kernels", "data", "ggsd_jax") for f in files(p) if "torch" in imported(f)] == []
