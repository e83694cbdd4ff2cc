"""Importing the package, and the parts an ingest worker needs, must stay cheap."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from fsspec.registry import known_implementations

import cvae_dist
from cvae_dist.store.opening import EXTRAS


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules that a fresh interpreter has after a statement."""
    code = f"import sys; {statement}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


LIGHT = ("store", "verbs.ingest", "verbs.verify", "verbs.info", "model.files", "verbs.plot", "verbs.fit_prior")
HEAVY = {"dask", "distributed", "sklearn", "matplotlib", "datashader"}


@pytest.mark.parametrize(
    ("statement", "unwanted"),
    [
        ("import cvae_dist", HEAVY | {"torch", "zarr", "numpy"}),
        ("import " + ", ".join(f"cvae_dist.{name}" for name in LIGHT), HEAVY | {"torch"}),
        ("import cvae_dist.training.loader, cvae_dist.model.directory", HEAVY),
    ],
)
def test_an_import_loads_nothing_it_does_not_need(statement: str, unwanted: set[str]) -> None:
    loaded = modules_after(statement)
    assert "cvae_dist" in loaded
    assert not loaded & unwanted


def extras() -> list[tuple[str, str]]:
    """Return every extra with each package that it installs."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    needs = {name: needs for name, needs in project["optional-dependencies"].items() if name not in ("all", "dev")}
    return [(extra, re.split(r"[<>=]", need)[0]) for extra in needs for need in needs[extra]]


@pytest.fixture(scope="module")
def named() -> set[object]:
    """Every module that this package imports, and every constant in it, which may be a module's name."""
    named = set()
    for path in Path(cvae_dist.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                named |= {part for alias in node.names for part in alias.name.split(".")}
            elif isinstance(node, ast.ImportFrom):
                named |= set((node.module or "").split("."))
            elif isinstance(node, ast.Constant):
                named.add(node.value)
    return named


@pytest.mark.parametrize(("extra", "package"), extras())
def test_an_extra_installs_what_is_imported(extra: str, package: str, named: set[object]) -> None:
    """By this package, by torch for a name that stands here as a string, or by fsspec for a URL of the extra."""
    urls = [url for url, its_extra in EXTRAS.items() if its_extra == extra and url in known_implementations]
    of_urls = {known_implementations[url]["class"].split(".")[0] for url in urls}
    assert {package, package.partition("-")[0]} & (of_urls | named), "such as arro3 of arro3-core"


@pytest.mark.parametrize("name", cvae_dist.__all__)
def test_every_exported_name_is_there(name: str) -> None:
    assert getattr(cvae_dist, name).__name__ == name
    assert name in dir(cvae_dist)


def test_a_verb_stays_a_function_when_its_module_is_imported_first() -> None:
    code = "import cvae_dist.verbs.ingest, cvae_dist as cvae; print(cvae.ingest.__name__, callable(cvae.ingest))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["ingest", "True"]


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'emebd'"):
        cvae_dist.emebd  # noqa: B018 - the access is the test
