"""The package as it is laid out: which wing imports which, names, sizes of files."""

import ast
import importlib
import pkgutil
from pathlib import Path

import pytest

import fclayers as fc

ROOT = Path(fc.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = {"bilinear", "conv", "linear", "mlp", "pool"}
# What each wing may import, besides itself.
ARROWS = {
    "_util": set(),
    "kernels": {"_util"},
    "weights": {"_util", "kernels"},
    "bilinear": {"_util", "kernels", "weights"},
    "conv": {"_util", "kernels", "weights"},
    "linear": {"_util", "kernels", "weights"},
    "mlp": {"_util", "linear"},
    "pool": {"_util", "kernels"},
    "convert": {"_util", "conv", "kernels", "linear", "weights"},
    "sharding": {"_util", "conv", "linear", "weights"},
    "heads": {"_util", "kernels", "linear", "sharding", "weights"},
    "summary": {"_util", "linear", "mlp", "weights"},
    "models": {"_util", "convert", *LAYERS},
    "interop": {"_util", "models", "weights", *LAYERS},
    "per_example": {"_util"},
    "sliding": {"_util", "kernels"},
    "train": {"_util"},
    "export": {"_util"},
}


def wing(module):
    return module.split(".")[1] if "." in module else ""


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT).with_suffix("").parts[0]
    if own == "__init__":
        return
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            names = [node.module]
        else:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [name for name in names if name.startswith("jax._src")]
        found |= {wing(name) for name in names if name.startswith("fclayers")}
    assert found - {own} <= ARROWS[own]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_short_and_parse_no_compiled_programs(path):
    text = path.read_text()
    assert text.count("\n") <= 350
    assert ".as_text(" not in text


def test_no_module_is_shadowed_by_a_function():
    for module in pkgutil.walk_packages([str(ROOT)], "fclayers."):
        parent, name = module.name.rsplit(".", 1)
        assert getattr(importlib.import_module(parent), name) is importlib.import_module(
            module.name
        )


@pytest.mark.parametrize("namespace", [fc, fc.interop, fc.train, fc.models, fc.models.vgg])
def test_public_names_are_sorted_and_there(namespace):
    assert namespace.__all__ == sorted(namespace.__all__)
    for name in namespace.__all__:
        assert hasattr(namespace, name)


def test_the_version_is_that_of_the_changelog():
    changelog = (Path(__file__).parents[1] / "CHANGELOG.md").read_text()
    assert changelog.split("\n## ")[1].startswith(fc.__version__)
