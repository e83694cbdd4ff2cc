"""The command line as its users meet it: real processes, their exit codes and what they print."""

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cvae_dist.__main__ import main as main_of_module
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


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Like ``cvae_dist``, but in this process, which has imported everything already."""

    def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.chdir(tmp_path)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        code = main(arguments)
        return subprocess.CompletedProcess(arguments, code, *capsys.readouterr())

    return run


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
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "a", "b", "--dim-latnt", "3"],
        ["train", "a", "b", "--dim-latent", "0"],
        ["ingest", "a", "b", "--nonfinite", "keep"],
        ["ingest", "a"],
        ["ingets", "a", "b"],
        ["train", "a", "b", "--config", "absent.yaml"],
    ],
)
@pytest.mark.parametrize("by_variable", [False, True])
def test_wrong_usage_is_json_too(
    arguments: list[str], by_variable: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if by_variable:
        monkeypatch.setenv("CVAE_DIST_JSON", "true")
    assert main(arguments if by_variable else [*arguments, "--json"]) == 2
    printed = capsys.readouterr()
    end = json.loads(printed.out)
    assert (end["event"], end["kind"]) == ("error", "WrongUsage")
    assert printed.err == f"cvae-dist: {end['message']}\n"


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


def test_help_and_readme_say_where_training_computes(capsys: pytest.CaptureFixture[str]) -> None:
    main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "on the CPU or an NVIDIA card" in printed
    assert "--device" in printed
    assert "--compile" in printed
    readme = " ".join((Path(__file__).parents[2] / "README.md").read_text().split())
    assert "Training takes an NVIDIA card where torch sees one (`--device cpu`" in readme
    assert "was not run on one yet" in readme


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
    assert main(["ingest", "a", "b", "--config", str(file)]) == 2
    assert "unknown option 'lable': did you mean 'label'?" in capsys.readouterr().err
    file.write_text("config: other.yaml\n")
    assert main(["ingest", "a", "b", "--config", str(file)]) == 2
    assert "unknown option 'config'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["dim-latent", "dim_latent"])
def test_a_file_may_spell_options_as_flags_or_as_arguments_but_not_both(
    tmp_path: Path, option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(f"{option}: 3\n")
    assert settings_of("train", "a", "b", "--config", str(file))["settings"].dim_latent == 3
    file.write_text("dim-latent: 3\ndim_latent: 3\n")
    assert main(["train", "a", "b", "--config", str(file)]) == 2
    said = f"--config {file}: 'dim_latent' is given twice, also as 'dim-latent'; keep one of them"
    assert capsys.readouterr().err == f"cvae-dist: {said}\n"


BAD_VALUES = [
    # command, option, bad value, what is said of it (flags, variables and files may differ)
    ("train a b", "dim-latent", "0", "dim_latent='0' cannot be used"),
    ("train a b", "cells-encoder", "x", "cells_encoder='x' cannot be used"),
    ("train a b", "lr-scheduling", "2", "lr_scheduling='2' cannot be used|unable to convert \"2\" into bool"),
    ("embed a b c", "workers", "0", "Must be >= 1"),
    ("embed a b c", "workers", "two", 'unable to convert "two" into int'),
    ("ingest a b", "nonfinite", "keep", 'Choose from: "raise", "drop"'),
    ("ingest a b", "storage-options", "3", "must be a mapping|must be a JSON object"),
]


@pytest.mark.parametrize("given_by", ["flag", "variable", "file", "file of a variable"])
@pytest.mark.parametrize(("command", "option", "value", "said"), BAD_VALUES)
def test_a_bad_value_names_what_gave_it(
    command: str,
    option: str,
    value: str,
    said: str,
    given_by: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    variable = f"CVAE_DIST_{option.upper().replace('-', '_')}"
    file = tmp_path / "bad.yaml"
    file.write_text(f"{option}: {value}\n")
    arguments = command.split()
    match given_by:
        case "flag":
            arguments.append(f"--{option}={value}")
            source = f"--{option}"
        case "variable":
            monkeypatch.setenv(variable, value)
            source = variable
        case "file":
            arguments += ["--config", str(file)]
            source = f"--config {file}"
        case _:
            monkeypatch.setenv("CVAE_DIST_CONFIG", str(file))
            source = f"CVAE_DIST_CONFIG {file}"
    assert main(arguments) == 2
    message = capsys.readouterr().err
    assert source in message
    assert option.replace("-", "_") in message.lower().replace("-", "_")
    assert any(part in message for part in said.split("|"))


def test_every_bad_value_of_several_sources_names_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("kl_warmup: 2\nseed: -7\n")
    monkeypatch.setenv("CVAE_DIST_GRAD_CLIP", "0")
    assert main(["train", "a", "b", "--seed=-1", "--config", str(file)]) == 2
    lines = capsys.readouterr().err.removeprefix("cvae-dist: ").splitlines()
    assert {line.split("=")[0] for line in lines} == {
        f"--config {file}: kl_warmup",
        "CVAE_DIST_GRAD_CLIP: grad_clip",
        "--seed: seed",
    }
    assert "seed='-7'" not in "".join(lines)


def test_a_variable_that_no_command_knows_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CVAE_DIST_DIM_LATNET", "8")
    for of_other_commands in ("DIM_LATENT", "NO_TB_LOGGING", "GRID_SIZE", "N", "WORKERS", "PIPELINE"):
        monkeypatch.setenv(f"CVAE_DIST_{of_other_commands}", "3")
    settings_of("ingest", "a", "b")
    printed = capsys.readouterr()
    said = "CVAE_DIST_DIM_LATNET in the environment has no effect: did you mean 'CVAE_DIST_DIM_LATENT'?"
    assert printed.err == f"cvae-dist: {said}\n"
    assert printed.out == ""
    monkeypatch.delenv("CVAE_DIST_DIM_LATNET")
    settings_of("ingest", "a", "b")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------------------------------------- completion

COMPLETED = [
    # what was typed, what must be offered
    ("", {"ingest", "train", "plot", "run"}),
    ("plot", {"plot"}),
    ("plot ", {"latents", "grid", "loss", "reconstructions"}),
    ("train --dim", {"--dim-latent"}),
    ("plot grid --grid", {"--grid-size"}),
    ("ingest a b --nonfinite ", {"raise", "drop"}),
    ("train ro", {"rows.zarr"}),
]


@pytest.fixture(scope="module")
def completions() -> dict[str, str]:
    """The scripts of both shells, as a process makes them that then must not have imported torch."""
    code = (
        "import sys\n"
        "from cvae_dist.cli import main\n"
        "for shell in ('bash', 'zsh'):\n"
        "    main(['--install-completion', '--shell', shell, '--output', f'completion.{shell}'])\n"
        f"print({HEAVY!r} & set(sys.modules))"
    )
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=home, env={**os.environ, "HOME": home}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == "set()"
        return {shell: (Path(home) / f"completion.{shell}").read_text() for shell in ("bash", "zsh")}


def test_completions_name_every_command_and_flag(completions: dict[str, str]) -> None:
    for script in completions.values():
        for name in [*VERBS, "info", "run"]:
            command = app
            for word in name.split():
                assert word in script
                command = command[word]
            flags = {each.name for each in command.assemble_argument_collection() if each.name.startswith("--")}
            assert {flag for flag in flags if flag not in script} == set()


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_commands_flags_choices_and_files(completions: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "rows.zarr").mkdir()
    lines = [completions["bash"]]
    for typed, _ in COMPLETED:
        words = ["cvae-dist", *typed.split(" ")]
        quoted = " ".join(map(shlex.quote, words))
        lines.append(f'COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _cvae_dist; echo "${{COMPREPLY[*]}}"')
    done = subprocess.run(["bash"], input="\n".join(lines), cwd=tmp_path, capture_output=True, text=True, check=True)
    offered = [set(line.split()) for line in done.stdout.splitlines()]
    assert [wanted - found for (_, wanted), found in zip(COMPLETED, offered, strict=True)] == [set()] * len(COMPLETED)


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


def test_verify_and_info(tree: Path, tmp_path: Path, here: Run) -> None:
    here("ingest", "tree", "rows.zarr")
    assert here("verify", "rows.zarr").returncode == 0
    described = here("info", "rows.zarr", "--json")
    assert described.returncode == 0
    assert json.loads(described.stdout)["rows"] == 6
    assert "6" in here("info", "rows.zarr").stdout
    shard = next((tmp_path / "rows.zarr" / "x").glob("c.*"))
    data = bytearray(shard.read_bytes())
    data[5] ^= 1
    shard.write_bytes(data)
    damaged = here("verify", "rows.zarr", "--json")
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


def test_an_interruption_before_the_command_has_begun_is_told_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cvae_dist.cli.main", interrupted)
    monkeypatch.setattr("sys.argv", ["cvae-dist", "train", "a", "b", "--json"])
    assert main_of_module() == 130
    printed = capsys.readouterr()
    end = json.loads(printed.out)
    assert (end["event"], end["kind"]) == ("error", "Interrupted")
    assert printed.err == f"cvae-dist: {end['message']}\n"


@pytest.mark.heavy
@pytest.mark.parametrize(
    ("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
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
        stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert stderr.splitlines()[-1] == f"cvae-dist: {word}; the same command goes on from here"
    end = json.loads(stdout.splitlines()[-1])
    message = f"{word}; the same command goes on from here"
    assert end == {"event": "error", "kind": word.capitalize(), "message": message}
    assert "Traceback" not in stderr
    assert any((tmp_path / "model" / "checkpoints").iterdir())


def test_out_of_time_is_an_exit_code_of_its_own(here: Run, tree: Path, tmp_path: Path) -> None:
    assert here("ingest", str(tree), "rows.zarr").returncode == 0
    short = ["train", "rows.zarr", "model", "--num-steps", "3", "--no-tb-logging"]
    ended = here(*short, "--max-time", "1e-9", "--json")
    assert ended.returncode == 124
    end = json.loads(ended.stdout.splitlines()[-1])
    assert (end["stopped_because"], end["steps"]) == ("out of time", 1)
    again = here(*short, "--max-time", "1e-9")
    assert again.returncode == 124
    assert again.stdout == "train: its time is over after 2 steps; the same command goes on from there\n"
    stage = "train: {store: rows.zarr, model: other, num-steps: 3, tb-logging: false, max-time: 1.0e-9}"
    assert here(*short).returncode == 0, "the third step is the last one"
    (tmp_path / "night.yaml").write_text(f"stages: [{{{stage}}}]\n")
    ended = here("run", "night.yaml", "--json")
    assert ended.returncode == 124
    end = json.loads(ended.stdout.splitlines()[-1])
    assert (end["event"], end["kind"]) == ("error", "OutOfTime")
    assert "the training of other stopped after step 1, as its time is over (max_time)" in end["message"]
    assert ended.stderr == f"cvae-dist: {end['message']}\n"


@pytest.mark.parametrize("how", ["flag", "broken flag", "variable", "config", "pipeline"])
def test_options_of_a_source_that_cannot_be_used_are_not_shown(here: Run, tmp_path: Path, how: str) -> None:
    wrong = 'source_storage_options: ["topsecret9"]'
    (tmp_path / "options.yaml").write_text(
        wrong if how == "config" else f"stages: [{{ingest: {{source: a, store: b, {wrong}}}}}]\n"
    )
    environment = {"CVAE_DIST_SOURCE_STORAGE_OPTIONS": '["topsecret9"]'} if how == "variable" else {}
    arguments = {
        "flag": ["ingest", "a", "b", "--source-storage-options", '["topsecret9"]'],
        "broken flag": ["ingest", "a", "b", "--source-storage-options", '{"secret": "topsecret9"'],
        "variable": ["ingest", "a", "b"],
        "config": ["ingest", "a", "b", "--config", "options.yaml"],
        "pipeline": ["run", "options.yaml"],
    }[how]
    ended = here(*arguments, **environment)
    assert ended.returncode == 2
    assert "source" in ended.stderr.lower()
    assert "topsecret9" not in ended.stderr + ended.stdout


@pytest.mark.parametrize("how", ["flag", "broken flag", "variable", "config", "pipeline"])
def test_storage_options_that_cannot_be_used_are_not_shown(here: Run, tmp_path: Path, how: str) -> None:
    (tmp_path / "options.yaml").write_text('storage_options: ["topsecret9"]\nstages: [{info: {url: rows}}]\n')
    environment = {"CVAE_DIST_STORAGE_OPTIONS": '["topsecret9"]'} if how == "variable" else {}
    arguments = {
        "flag": ["info", "rows", "--storage-options", '["topsecret9"]'],
        "broken flag": ["info", "rows", "--storage-options", '{"secret": "topsecret9"'],
        "variable": ["info", "rows"],
        "config": ["info", "rows", "--config", "options.yaml"],
        "pipeline": ["run", "options.yaml"],
    }[how]
    ended = here(*arguments, **environment)
    assert ended.returncode == 2
    assert "storage" in ended.stderr.lower()
    assert "topsecret9" not in ended.stderr + ended.stdout
