"""The command line as its users meet it: real processes, their exit codes and what they print."""

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.cli import app, main
from cvae_dist.verbs import VERBS

HEAVY = {"torch", "dask", "distributed", "sklearn", "matplotlib", "datashader"}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Six files of four values."""
    folder = tmp_path / "tree" / "a"
    folder.mkdir(parents=True)
    for i in range(6):
        np.save(folder / f"{i}.npy", np.arange(4, dtype=np.float32) + i)
    return tmp_path / "tree"


def settings_of(*tokens: str) -> dict[str, object]:
    """Return the arguments that a command line gives its command, without running it."""
    _, bound, _ = app.parse_args(tokens, exit_on_error=False, print_error=False)
    return dict(bound.arguments)


def test_the_metric_is_a_flag_of_embed() -> None:
    assert settings_of("embed", "rows", "model", "latents", "--metric", "data")["metric"] == "data"


# ------------------------------------------------------------------------------------------- wrong usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "a", "b", "--dim-latnt", "3"], "Unknown option: --dim-latnt. Did you mean --dim-latent?"),
        (["ingets", "a", "b"], 'Unknown command "ingets". Did you mean "ingest"?'),
        (["plot", "latnets"], 'Unknown command "latnets". Did you mean "latents"?'),
        (["train", "a", "b", "--dim-latent", "0"], "dim_latent='0' cannot be used: input should be greater"),
        (["train", "a", "b", "--dim-latent", "two"], "dim_latent='two' cannot be used"),
        (["ingest", "a", "b", "--nonfinite", "keep"], '"keep"'),
        (["ingest", "a"], "STORE"),
        (["embed", "a", "b", "c", "--batch-size", "0"], "Must be >= 1"),
        (["embed", "a", "b", "c", "--metric", "cosine"], '"latent", "data"'),
        (["sample", "a", "b", "-n", "0"], "Must be >= 1"),
        (["fit-prior", "a", "b", "--n-components", "0"], "Must be >= 1"),
        (["plot", "grid", "a", "b", "--grid-size", "0"], "Must be >= 1"),
        (["sample", "a", "b"], "--n"),
        (["ingest", "a", "b", "--storage-options", "anon"], "write it as JSON"),
        (["ingest", "a", "b", "--storage-options", "[1]"], "must be a JSON object"),
        (["train", "a", "b", "--config", "absent.yaml"], "cannot read --config absent.yaml"),
    ],
)
def test_wrong_usage_is_one_message_and_code_2(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


def test_wrong_usage_of_a_real_process(cvae_dist: Run) -> None:
    done = cvae_dist("ingest", "tree", "rows.zarr", "--overwite")
    assert done.returncode == 2
    assert done.stderr == "cvae-dist: Unknown option: --overwite. Did you mean --overwrite?\n"


def imported_by_help(*commands: str) -> dict[str, set[str]]:
    """Return the libraries that a process has imported after showing the help of each of the commands in turn."""
    code = (
        "import sys\n"
        "from cvae_dist.cli import main\n"
        "for command in sys.argv[1:]:\n"
        "    main([*command.split(), '--help'])\n"
        "    print(*{name.partition('.')[0] for name in sys.modules}, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code, *commands], capture_output=True, text=True, check=True)
    imported = [set(line.split()) for line in done.stderr.splitlines()]
    assert "cyclopts" in imported[0]
    return dict(zip(commands, imported, strict=True))


def test_the_lists_of_commands_need_no_library() -> None:
    imported = imported_by_help("", "plot")
    assert not {*HEAVY, "numpy", "zarr"} & imported["plot"]


def test_help_needs_no_heavy_library() -> None:
    imported = imported_by_help("run", "info", *VERBS)
    assert {command: HEAVY & libraries for command, libraries in imported.items() if HEAVY & libraries} == {}


def test_the_list_of_commands_says_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--help"])
    main(["plot", "--help"])
    printed = capsys.readouterr().out
    for name, verb in VERBS.items():
        assert verb.summary == str(verb.load().__doc__).splitlines()[0]
        assert f" {name.split()[-1]} " in printed
        assert " ".join(verb.summary.split()[:4]) in printed


@pytest.mark.parametrize("name", [*VERBS, "info", "run"])
def test_every_flag_says_what_it_is_for(name: str) -> None:
    command = app
    for word in name.split():
        command = command[word]
    arguments = command.assemble_argument_collection(parse_docstring=True)
    assert [argument.name for argument in arguments if argument.show and not argument.parameter.help] == []


def test_flags_are_the_arguments_of_the_verb_and_the_shared_options(capsys: pytest.CaptureFixture[str]) -> None:
    main(["sample", "--help"])
    printed = capsys.readouterr().out
    assert "Usage: cvae-dist sample --n INT [OPTIONS] MODEL OUT" in printed
    for flag in ("--n -n", "--seed", "--noise --no-noise", "--prior", "--overwrite", "--workers", "--json"):
        assert flag in printed
    for flag in ("--no-overwrite", "--client", "--on-event", "--no-json"):
        assert flag not in printed
    main(["verify", "--help"])
    assert "--scheduler" not in capsys.readouterr().out


# --------------------------------------------------------------------------------- where options come from


def test_flags_win_over_environment_over_file_over_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("dim_latent: 3\nseed: 3\nbatch_size: 3\ncells_encoder: [32, 16]\n")
    monkeypatch.setenv("CVAE_DIST_SEED", "4")
    monkeypatch.setenv("CVAE_DIST_BATCH_SIZE", "4")
    arguments = settings_of("train", "a", "b", "--config", str(file), "--batch-size", "5")
    settings = arguments["settings"]
    given = settings.model_dump(exclude_unset=True)
    assert given == {"dim_latent": 3, "seed": 4, "batch_size": 5, "cells_encoder": (32, 16)}


def test_a_file_may_hold_any_option_and_no_unknown_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("workers: 2\nstorage_options: {client_kwargs: {region: x}}\nlabel: folder\n")
    arguments = settings_of("ingest", "a", "b", "--config", str(file))
    assert arguments["label"] == "folder"
    assert arguments["shared"].workers == 2
    assert arguments["shared"].storage_options == {"client_kwargs": {"region": "x"}}
    file.write_text("lable: folder\n")
    with pytest.raises(SystemExit) as exit_:
        main(["ingest", "a", "b", "--config", str(file)])
    assert exit_.value.code == 2
    assert "unknown option 'lable': did you mean 'label'?" in capsys.readouterr().err


# ------------------------------------------------------------------------------- results and their failures


def test_ingest_says_what_it_wrote_and_that_there_is_nothing_left_to_do(cvae_dist: Run, tree: Path) -> None:
    first = cvae_dist("ingest", "tree", "rows.zarr")
    assert first.returncode == 0, first.stderr
    assert first.stdout.startswith("ingest: wrote 6 rows to ")
    assert "6/6 rows" in first.stderr
    again = cvae_dist("ingest", "tree", "rows.zarr", "--quiet")
    assert again.returncode == 0
    assert again.stdout.startswith("ingest: nothing to do, ")
    assert again.stderr == ""


def test_json_is_one_object_per_line_ending_in_the_result(cvae_dist: Run, tree: Path) -> None:
    done = cvae_dist("ingest", "tree", "rows.zarr", "--json")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0
    assert done.stderr == ""
    assert [line["event"] for line in lines][0] == "start"
    assert lines[-1]["event"] == "result"
    assert (lines[-1]["rows"], lines[-1]["rows_written"]) == (6, 6)

    failed = cvae_dist("ingest", "nowhere", "other.zarr", "--json")
    error = json.loads(failed.stdout.splitlines()[-1])
    assert failed.returncode == 1
    assert (error["event"], error["kind"]) == ("error", "SourceNotFound")


@pytest.mark.parametrize("source", ["nowhere", "empty"])
def test_a_source_without_rows_fails_in_one_message(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(["ingest", source, "rows.zarr", "--quiet"]) == 1
    printed = capsys.readouterr()
    assert printed.err.startswith("cvae-dist: ")
    assert source in printed.err
    assert "Traceback" not in printed.err
    assert not (tmp_path / "rows.zarr").exists()


def test_other_settings_are_refused_unless_overwrite(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["ingest", "tree", "rows.zarr", "--quiet"]) == 0
    assert main(["ingest", "tree", "rows.zarr", "--quiet", "--label", "folder"]) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert main(["ingest", "tree", "rows.zarr", "--quiet", "--label", "folder", "--overwrite"]) == 0


def test_a_full_disk_is_one_message_without_a_traceback(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "tree").mkdir()
    np.save(tmp_path / "tree" / "rows.npy", rng.normal(size=(5000, 50)))
    done = subprocess.run(
        [sys.executable, "-m", "cvae_dist", "ingest", "tree", "rows.zarr", "--rows-per-file", "many"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 1
    assert "no room left to write" in done.stderr
    assert "run the same command again" in done.stderr
    assert "Traceback" not in done.stderr


def test_verify_and_info(tree: Path, tmp_path: Path, cvae_dist: Run) -> None:
    cvae_dist("ingest", "tree", "rows.zarr")
    assert cvae_dist("verify", "rows.zarr").returncode == 0
    described = cvae_dist("info", "rows.zarr", "--json")
    assert described.returncode == 0
    assert json.loads(described.stdout)["rows"] == 6
    assert "6" in cvae_dist("info", "rows.zarr").stdout
    shard = next(path for path in (tmp_path / "rows.zarr" / "x" / "c").rglob("*") if path.is_file())
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    damaged = cvae_dist("verify", "rows.zarr", "--json")
    assert damaged.returncode == 1
    problems = json.loads(damaged.stdout.splitlines()[-1])["problems"]
    assert [(problem["array"], problem["shard"]) for problem in problems] == [("x", 0)]


def test_a_reader_that_goes_away_is_no_error(tree: Path, tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "cvae_dist", "ingest", "tree", "rows.zarr", "--json"],
        cwd=tmp_path,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    assert done.stderr == ""
    assert done.returncode == 128 + signal.SIGPIPE


# ------------------------------------------------------------------------------------------- being stopped


@pytest.mark.parametrize(
    ("number", "code", "word"),
    [
        pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.heavy),
        (signal.SIGTERM, 143, "terminated"),
    ],
)
def test_a_stopped_training_says_so_and_goes_on(
    digits_tree: Path, tmp_path: Path, cvae_dist: Run, number: int, code: int, word: str
) -> None:
    cvae_dist("ingest", "tree", "rows.zarr")
    command = [sys.executable, "-m", "cvae_dist", "train", "rows.zarr", "model", "--num-steps"]
    with subprocess.Popen(
        [*command, "200000", "--multi-start", "false", "--json"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "progress":
                break
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr.splitlines()[-1] == f"cvae-dist: {word}; the same command goes on from here"
    assert "Traceback" not in stderr
    assert any((tmp_path / "model" / "checkpoints").iterdir())
