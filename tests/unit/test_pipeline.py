"""A pipeline file is checked as a whole before anything runs."""

import json
from pathlib import Path

import pytest

from cvae_dist.cli import main
from cvae_dist.errors import InvalidPipeline, SourceNotFound
from cvae_dist.events import Event
from cvae_dist.pipeline import read_pipeline, run
from cvae_dist.verbs import VERBS

INGEST = "- ingest: {source: tree, store: rows.zarr, rows_per_file: one}\n"


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_tree(digits_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(digits_tree.parent)


def written(stages: str, shared: str = "") -> str:
    """Write a pipeline file with these stages and return its name."""
    Path("pipeline.yaml").write_text(f"{shared}stages:\n{stages}")
    return "pipeline.yaml"


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ("- inget: {source: a}\n", "stage 2: unknown verb 'inget', nothing was run; did you mean 'ingest'"),
        ("- fly\n", "known: decode, embed, fit-prior"),
        ("- embed: {store: rows.zarr, model: m, latents: l, bach_size: 3}\n", "did you mean 'batch_size'"),
        ("- train: {store: rows.zarr, model: m, dim_latnt: 3}\n", "did you mean 'dim_latent'"),
        ("- train: {store: rows.zarr, model: m, dim_latent: 0}\n", "dim_latent=0 cannot be used"),
        ("- train: {store: rows.zarr}\n", "model"),
        ("- ingest: {source: a, store: b, nonfinite: keep}\n", "nonfinite='keep' cannot be used"),
        ("- ingest: {source: a, store: b, on_event: print}\n", "unknown option 'on_event'"),
        ("- ingest: [a, b]\n", "arguments must be a mapping"),
        (
            "- train: {store: a, model: b, dim-latent: 2, dim_latent: 2}\n",
            "(train), nothing was run: 'dim_latent' is given twice, also as 'dim-latent'; keep one of them",
        ),
        ("- {ingest: {}, train: {}}\n", "must be one `verb:"),
    ],
)
def test_a_mistake_in_any_stage_is_named_and_nothing_runs(stages: str, message: str) -> None:
    with pytest.raises(InvalidPipeline) as error:
        run(written(INGEST + stages))
    assert message in str(error.value)
    assert "pipeline.yaml, stage 2" in str(error.value)
    assert not Path("rows.zarr").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("stages: []\n", "no list `stages`"),
        ("- ingest: {}\n", "must be a mapping"),
        ("stages: {\n", "is not YAML"),
        (f"worker: 2\nstages:\n{INGEST}", "did you mean 'workers'"),
        (f"workers: 0\nstages:\n{INGEST}", "workers=0 cannot be used"),
        (f"storage_options: {{}}\nstorage-options: {{}}\nstages:\n{INGEST}", "'storage_options' is given twice"),
    ],
)
def test_a_mistake_around_the_stages_is_named(content: str, message: str) -> None:
    Path("pipeline.yaml").write_text(content)
    with pytest.raises(InvalidPipeline) as error:
        run("pipeline.yaml")
    assert message in str(error.value)
    assert not Path("rows.zarr").exists()


def test_a_missing_file_is_said_to_be_missing() -> None:
    with pytest.raises(SourceNotFound, match=r"no pipeline file absent\.yaml"):
        run("absent.yaml")


def test_the_command_line_calls_a_mistake_in_the_file_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", written("- inget: {}\n")]) == 2
    assert "did you mean 'ingest'" in capsys.readouterr().err


def test_options_may_be_spelled_as_flags() -> None:
    spelled = (
        "- ingest: {source: tree, store: rows.zarr, rows-per-file: one}\n- train: {store: a, model: b, grad-clip: 2}"
    )
    pipeline = read_pipeline(written(spelled, shared="storage-options: {auto_mkdir: true}\n"))
    assert pipeline.stages[0].arguments["rows_per_file"] == "one"
    assert pipeline.stages[1].arguments["grad_clip"] == 2
    assert pipeline.shared.storage_options == {"auto_mkdir": True}


def test_a_stage_that_fails_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    file = written(INGEST + "- embed: {store: rows.zarr, model: nowhere, latents: latents.zarr}\n")
    assert main(["run", file, "--json"]) == 1
    printed = capsys.readouterr()
    end = json.loads(printed.out.splitlines()[-1])
    assert (end["event"], end["kind"]) == ("error", "SourceNotFound")
    assert end["message"].startswith("pipeline.yaml, stage 2 (embed latents.zarr): there is no model at ")
    assert printed.err == f"cvae-dist: {end['message']}\n"


def test_a_stage_that_fails_is_named_in_python_too() -> None:
    with pytest.raises(SourceNotFound) as error:
        run(written("- ingest: {source: nowhere, store: rows.zarr}\n"))
    assert error.value.__notes__ == ["pipeline.yaml, stage 1 (ingest rows.zarr)"]


def test_arguments_replace_the_shared_settings_of_the_file() -> None:
    file = written(INGEST, shared="workers: 2\nstorage_options: {auto_mkdir: true}\n")
    assert read_pipeline(file).shared.workers == 2
    replaced = read_pipeline(file, workers=3).shared
    assert (replaced.workers, replaced.storage_options) == (3, {"auto_mkdir": True})


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_names_its_own_arguments(name: str) -> None:
    """The words of ``VERBS`` are the parameters of the functions, so that YAML and Python agree."""
    from inspect import signature

    verb = VERBS[name]
    assert {*verb.reads, verb.writes} <= set(signature(verb.load()).parameters)


@pytest.mark.parametrize("name", VERBS)
def test_the_arguments_of_every_verb_are_checked(name: str) -> None:
    with pytest.raises(InvalidPipeline, match="unknown option 'colour'"):
        read_pipeline(written(f"- {name}: {{colour: red}}\n"))


def test_a_second_run_finds_everything_done() -> None:
    file = written(INGEST + "- verify: {url: rows.zarr}\n")
    events: list[Event] = []
    first = run(file, on_event=events.append)
    assert [(stage.stage, stage.rows, stage.nothing_to_do) for stage in first.stages] == [
        ("ingest", 300, False),
        ("verify", None, False),
    ]
    assert {event.stage for event in events} == {"ingest", "verify"}
    assert first.quality is None
    assert run(file).stages[0].nothing_to_do
