"""A remedy that a message prints works when it is typed.

Each case makes a message come up for real, takes the flags, commands or calls out of its text, and types them.
"""

import ast
import functools
import importlib.util
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dask
import dask.array
import numpy as np
import pytest

import cvae_dist
from cvae_dist.cli import app, main
from cvae_dist.errors import CvaeDistError, MissingExtra
from cvae_dist.events import Event
from cvae_dist.store.opening import EXTRAS
from cvae_dist.verbs import VERBS
from tests.faults.drivers import small_grid

COMMANDS = [*VERBS, "info", "run"]

FLAG = re.compile(r"--overwrite|--[a-z][a-z-]* (?:'[^']*'|[\w.+-]+)")
COMMAND = re.compile(rf"cvae-dist ((?:{'|'.join(COMMANDS)}) [^`,;)\n]+)")
CALL = re.compile(r"\b\w+\(\w*\)")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with 40 rows in shards of four, their model and their latents, and files of square items."""
    root = tmp_path_factory.mktemp("made")
    random = np.random.default_rng(0)
    for label in "ab":
        (root / "tree" / label).mkdir(parents=True)
        np.save(root / "tree" / label / "rows.npy", random.normal(size=(20, 4)).astype(np.float32))
    (root / "square").mkdir()
    for name in range(4):
        np.save(root / f"square/{name}.npy", random.normal(size=(5, 5)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cvae_dist.store.Layout.of", small_grid())
        patch.chdir(root)
        for command in (INGEST, TRAIN, EMBED):
            assert main(shlex.split(f"{command} --quiet")) == 0
        yield root


@pytest.fixture
def work(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, to be the working directory."""
    shutil.copytree(made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


# ------------------------------------------------------------------------------------- what goes wrong before


def other_rows() -> None:
    """Other rows in one of the files that the store was made from."""
    np.save("tree/a/rows.npy", np.ones((20, 4), np.float32))


def rows_of_nan() -> None:
    np.save("tree/c.npy", np.full((3, 4), np.nan, np.float32))
    shutil.rmtree("rows.zarr")


def more_rows() -> None:
    np.save("tree/c.npy", np.ones((9, 4), np.float32))


def fewer_rows() -> None:
    Path("tree/b/rows.npy").unlink()


def other_tree() -> None:
    Path("other").mkdir()
    np.save("other/rows.npy", np.ones((30, 4), np.float32))


def damage(path: str) -> Callable[[], None]:
    """Return what changes one byte in the middle of the file that ``path`` matches first."""

    def spoil() -> None:
        file = next(file for file in sorted(Path().glob(path)) if file.is_file())
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)

    return spoil


def forget_records() -> None:
    for record in Path("rows.zarr").glob("publications/*/record/c.*.*"):
        record.unlink()


def leave_a_pointer_to_nothing() -> None:
    shutil.rmtree("model")
    Path("model/checkpoints").mkdir(parents=True)
    Path("model/checkpoints/LATEST.json").write_text("{")


def leave_a_damaged_checkpoint() -> None:
    def stop(event: Event) -> None:
        if event.done == 3:
            raise InterruptedError

    settings = {"checkpoint_every": 1, "tb_logging": False, "multi_start": False}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cvae_dist.training.loop._SECONDS_BETWEEN_EVENTS", 0)
        with pytest.raises(InterruptedError):
            cvae_dist.train("rows.zarr", "stopped", on_event=stop, **settings)
    damage("stopped/checkpoints/*.pt")()


# ----------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True)
class Case:
    """A command whose message names what to type.

    Attributes
    ----------
    options : str
        Flags of the command, which commands that the message names get too.
    before : sequence of str and callable
        What leads there: commands, and functions in the working directory.
    flags_of : str
        The command that the message gives flags to, where it is another one.
    then : str
        What works after that; else the command itself.
    named : Mapping
        What stands for STORE, MODEL and LATENTS.
    """

    command: str
    options: str = ""
    before: Sequence[str | Callable[[], None]] = ()
    flags_of: str = ""
    then: str = ""
    named: Mapping[str, str] = field(default_factory=dict)


QUICK = "--num-steps 3 --no-tb-logging --multi-start false"
INGEST = "ingest tree rows.zarr --label folder"
TRAIN = f"train rows.zarr model {QUICK}"
EMBED = "embed rows.zarr model latents.zarr"
SAMPLE = "sample model new.zarr -n 5"
ANEW = f"{INGEST} --overwrite"
A_SHARD = "rows.zarr/x/c.*"

TYPED = {
    "ingest: NaN in a file": Case(INGEST, before=[rows_of_nan]),
    "ingest: other settings": Case("ingest tree rows.zarr"),
    "ingest: a file has changed": Case(INGEST, before=[other_rows]),
    "ingest: another source": Case("ingest other rows.zarr --label folder", before=[other_tree]),
    "ingest: the records are lost": Case(INGEST, before=[forget_records, more_rows]),
    "ingest: items are read as many rows": Case("ingest square square.zarr"),
    "train: files, and no store of them": Case(
        "train tree new", QUICK, named={"STORE": "new.zarr"}, then=f"train new.zarr new {QUICK}"
    ),
    "train: model before store": Case("train model rows.zarr", QUICK, then=TRAIN),
    "train: other settings": Case(f"{TRAIN} --dim-latent 3"),
    "train: done already": Case(TRAIN),
    "train: done already on fewer rows": Case(TRAIN, before=[f"{TRAIN} --overwrite", more_rows, INGEST]),
    "train: diverged": Case(
        "train rows.zarr wild --kl-weight 1e38 --num-steps 300", flags_of=f"train rows.zarr wild {QUICK}", then=TRAIN
    ),
    "train: no checkpoint is named": Case(TRAIN, before=[leave_a_pointer_to_nothing]),
    "train: no checkpoint is whole": Case(f"train rows.zarr stopped {QUICK}", before=[leave_a_damaged_checkpoint]),
    "train: a damaged shard": Case("train rows.zarr new", QUICK, before=[damage(A_SHARD)], flags_of=INGEST),
    "embed: a damaged shard": Case("embed rows.zarr model new.zarr", before=[damage(A_SHARD)], flags_of=INGEST),
    "embed: a damaged model": Case(
        "embed rows.zarr model new.zarr", before=[damage("model/model.safetensors")], flags_of=TRAIN
    ),
    "embed: model before store": Case("embed model rows.zarr new.zarr", then="embed rows.zarr model new.zarr"),
    "embed: other rows": Case(EMBED, before=[other_rows, ANEW]),
    "embed: fewer rows": Case(EMBED, before=[fewer_rows, ANEW]),
    "embed: a model of other width": Case(EMBED, before=[f"{TRAIN} --dim-latent 3 --overwrite"]),
    "verify: a damaged shard": Case("verify rows.zarr", before=[damage(A_SHARD)], flags_of=INGEST),
    "verify: a damaged model": Case("verify model", before=[damage("model/model.safetensors")], flags_of=TRAIN),
    "plot: a damaged column": Case(
        "plot latents latents.zarr new.png", before=[damage("latents.zarr/label/c.*")], flags_of=EMBED
    ),
    "sample: no prior": Case(f"{SAMPLE} --prior mixture"),
    "sample: the prior of an earlier model": Case(
        f"{SAMPLE} --prior mixture", before=["fit-prior rows.zarr model", f"{TRAIN} --seed 3 --overwrite"]
    ),
    "sample: a damaged prior": Case(
        f"{SAMPLE} --prior mixture",
        before=["fit-prior rows.zarr model --prior mixture", damage("model/priors/mixture.safetensors")],
    ),
    "sample: other settings": Case(f"{SAMPLE} --seed 4", before=[SAMPLE]),
    "sample: fewer rows": Case("sample model new.zarr -n 4", before=[SAMPLE]),
}


def typed(command: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Run a command in this process; return its exit code, and the message of its end or all that it told."""
    code = main(shlex.split(command))
    printed = capsys.readouterr()
    return code, printed.err.partition("cvae-dist: ")[2] or printed.out + printed.err


def works(command: str, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether a command does what it is for: ``verify`` fails where it finds damage."""
    code, said = typed(command, capsys)
    return code == 0 or (command.startswith("verify ") and "is damaged in" in said)


@pytest.mark.parametrize("case", TYPED.values(), ids=TYPED)
def test_what_a_message_says_to_type_works(case: Case, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for step in case.before:
        assert step() is None if callable(step) else works(step, capsys)
    mistaken = f"{case.command} {case.options}"
    _, said = typed(mistaken, capsys)
    commands, flags = COMMAND.findall(said), FLAG.findall(COMMAND.sub("", said))
    assert commands or flags, said
    for command in [each for each in commands if each.split()[0] == mistaken.split()[0]] or commands:
        words = {"STORE": "rows.zarr", "MODEL": "model", "LATENTS": "new.zarr", **case.named}
        filled = " ".join(words.get(word, word) for word in command.split())
        assert works(f"{filled} {case.options if filled.split()[0] in ('train', 'embed') else ''}", capsys)
    if flags:
        assert works(" ".join([case.flags_of or mistaken, *flags]), capsys)
    if not flags or case.flags_of:
        assert works(case.then or mistaken, capsys)


# ------------------------------------------------------------------------------------------------- Python

PYTHON = {
    # what comes before, what is refused, whose methods the message names
    "not fitted": ("model = CompressionVAE(X, num_steps=3)", "model.embed(X)", "model"),
    "no rows to fit a prior on": (
        "model = CompressionVAE(logdir='model')",
        "model.sample(3, prior='mixture')",
        "model",
    ),
    "blocks of unknown size": (
        "X = dask.array.from_array(X)[dask.array.from_array(X)[:, 0] > 0]; model = CompressionVAE(num_steps=3)",
        "model.fit(X)",
        "X",
    ),
}


@pytest.mark.parametrize(("before", "refused", "owner"), PYTHON.values(), ids=PYTHON)
def test_what_a_message_says_to_call_works(before: str, refused: str, owner: str, work: Path) -> None:
    def begun() -> dict[str, Any]:
        names = {"CompressionVAE": cvae_dist.CompressionVAE, "dask": dask, "X": np.load("tree/a/rows.npy")}
        exec(before, names)
        return names

    with pytest.raises(CvaeDistError) as error:
        exec(refused, begun())
    calls = CALL.findall(str(error.value))
    assert calls
    for call in calls:
        names = begun()
        exec(f"{owner}.{call}\n{refused}", names)


# ------------------------------------------------------------------------------ what every text may name


@functools.cache
def texts() -> list[tuple[str, str]]:
    """Return every string of the package that is no docstring, and where it stands."""
    found = []
    for path in sorted(Path(cvae_dist.__file__).parent.rglob("*.py")):
        tree = ast.parse(path.read_text())
        told = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in told:
                found.append((f"{path.name}:{node.lineno}", node.value))
    return found


def test_every_flag_that_a_text_names_exists() -> None:
    known = {"--help", "--version", "--install-completion"}
    for name in COMMANDS:
        command = app
        for word in name.split():
            command = command[word]
        known |= {flag for argument in command.assemble_argument_collection() for flag in argument.names}
    named = {(where, flag) for where, text in texts() for flag in re.findall(r"--[a-z]+(?:-[a-z]+)*(?![\w-])", text)}
    assert {flag for _, flag in named} > {"--overwrite", "--learning-rate", "--nonfinite", "--prior"}
    assert {(where, flag) for where, flag in named if flag not in known} == set()


def test_every_extra_that_a_text_names_exists() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    named = {extra for _, text in texts() for extra in re.findall(r"cvae-dist\[(\w+)\]", text)}
    assert named >= {"plot", "onnx", "flow", "tensorboard"}
    assert {*named, *EXTRAS.values()} <= project["optional-dependencies"].keys()


@pytest.mark.parametrize("protocol", EXTRAS)
def test_a_url_whose_package_is_missing_names_its_extra(protocol: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=rf"pip install 'cvae-dist\[{EXTRAS[protocol]}\]'"):
        cvae_dist.info(f"{protocol}://container/rows.zarr")
