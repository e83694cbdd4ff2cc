"""Rules of the house that the import contracts cannot state: which module may name what."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import cvae_dist

PACKAGE = Path(cvae_dist.__file__).parent
MODULES = {str(path.relative_to(PACKAGE)): path for path in sorted(PACKAGE.rglob("*.py"))}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def torch_names(tree: ast.AST) -> set[str]:
    """Return the names that a module imports from torch, or torch itself as."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            for alias in node.names:
                if (module or alias.name).partition(".")[0] == "torch":
                    names.add((alias.asname or alias.name).partition(".")[0])
    return names


def root(node: ast.AST) -> str:
    """Return the name that a chain of attributes begins with."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_names(source: str) -> Iterator[str]:
    """Yield what a module names of torch that is private: attributes, imports, and strings given to getattr."""
    tree = ast.parse(source)
    known = torch_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and root(node) in known:
            yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None)
            parts = [part for alias in node.names for part in f"{module or ''}.{alias.name}".strip(".").split(".")]
            if parts[0] == "torch":
                yield from filter(is_private, parts)
        elif isinstance(node, ast.Call) and root(node.func) in ("getattr", "hasattr") and root(node.args[0]) in known:
            yield from (
                name.value for name in node.args[1:2] if isinstance(name, ast.Constant) and is_private(name.value)
            )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch\ntorch.cpu._is_amx_tile_supported()", ["_is_amx_tile_supported"]),
        ("import torch.nn as n\nn._reduction", ["_reduction"]),
        ("from torch import ops\nhasattr(ops.mkldnn, '_linear_pointwise')", ["_linear_pointwise"]),
        ("from torch._dynamo import config", ["_dynamo"]),
        ("import torch._inductor", ["_inductor"]),
        ("import torch\ntorch.__version__\nself._modules\ngetattr(torch, 'float32')", []),
    ],
)
def test_private_names_are_found(source: str, expected: list[str]) -> None:
    assert list(private_names(source)) == expected


def test_only_kernels_names_what_is_private_to_torch() -> None:
    found = {name: set(private_names(path.read_text())) for name, path in MODULES.items()}
    assert "_linear_pointwise" in found.pop("model/kernels.py")
    assert not {name: private for name, private in found.items() if private}


def test_only_threads_sets_how_many_threads_torch_computes_with() -> None:
    """Attribute, import or the name as a string; a message may advise its reader to call it."""

    def names(path: Path) -> Iterator[object]:
        for node in ast.walk(ast.parse(path.read_text())):
            yield getattr(node, "attr", None) or getattr(node, "name", None) or getattr(node, "value", None)

    assert [name for name, path in MODULES.items() if "set_num_threads" in names(path)] == ["model/threads.py"]
