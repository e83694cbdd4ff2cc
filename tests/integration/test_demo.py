"""The demo: the digits pipeline from files to pictures, with fewer steps than `make demo`."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from sklearn.datasets import load_digits

from cvae_dist.cli import main
from cvae_dist.pipeline import PipelineResult, read_pipeline, run
from cvae_dist.store import RowStore
from cvae_dist.verbs import VERBS

PIPELINES = Path(__file__).parents[2] / "pipelines"
DIGITS = PIPELINES / "digits.yaml"


def write_digits() -> str:
    """Run the script as the demo does and return what it prints."""
    command = [sys.executable, str(PIPELINES / "write_digits.py"), "demo/digits"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def contents(folder: Path) -> dict[str, bytes]:
    """Return every file below a folder."""
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shortened(steps: int) -> str:
    """Write the pipeline with fewer training steps into the working directory and return its name."""
    pipeline = yaml.safe_load(DIGITS.read_text())
    training = next(stage["train"] for stage in pipeline["stages"] if "train" in stage)
    training |= {"num_steps": steps, "tb_logging": False}
    Path("digits.yaml").write_text(yaml.safe_dump(pipeline))
    return "digits.yaml"


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PipelineResult]:
    """Run the demo once for all tests of this module."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert write_digits() == "demo/digits: 1,797 images written\n"
        return folder, run(shortened(steps=400))


def test_the_tree_holds_the_digits_once(demo: tuple[Path, PipelineResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo[0])
    assert write_digits() == "demo/digits: already there\n"
    digits = load_digits()
    files = sorted(Path("demo/digits").rglob("*.npy"), key=lambda path: path.stem)
    assert len(files) == 1797
    np.testing.assert_array_equal(np.stack([np.load(file) for file in files]), digits.images)
    assert [int(file.parent.name) for file in files] == digits.target.tolist()


def test_everything_lands_where_the_pipeline_says(demo: tuple[Path, PipelineResult]) -> None:
    folder, result = demo
    assert [stage.rows for stage in result.stages] == [1797, None, 1797, 1797, None, None, None, None]
    assert not any(stage.nothing_to_do for stage in result.stages)
    for stage in result.stages:
        assert (folder / stage.url).exists()
        if stage.url.endswith(".png"):
            assert (folder / stage.url).read_bytes().startswith(b"\x89PNG")


def test_rows_latents_and_reconstructions_are_of_the_same_images(demo: tuple[Path, PipelineResult]) -> None:
    stores = [
        RowStore.open(str(demo[0] / "demo" / name)) for name in ("rows.zarr", "latents.zarr", "reconstructions.zarr")
    ]
    ids = [list(store.read("id", 0, 1797)) for store in stores]
    assert ids[0] == ids[1] == ids[2]
    assert ids[0][0] == "0/0000.npy"
    labels = stores[1].read("label", 0, 1797)
    assert [str(label) for label in labels] == [name.split("/")[0] for name in ids[0]]
    assert stores[1].read("z", 0, 5).shape == (5, 2)


def test_the_quality_is_measured_on_held_out_rows(demo: tuple[Path, PipelineResult]) -> None:
    quality = demo[1].quality
    assert quality is not None
    assert quality.held_out_rows == 180
    assert quality.neighbour_accuracy is not None
    assert 0.5 < quality.neighbour_accuracy < 1
    assert quality.reconstruction_mse is not None
    assert quality.reconstruction_fraction is not None
    assert 0.2 < quality.reconstruction_fraction < 0.9
    variance = load_digits().images.reshape(1797, 64).var(axis=0).mean()
    assert quality.reconstruction_mse / variance == pytest.approx(quality.reconstruction_fraction)
    assert quality.negative_elbo is not None
    assert 0 < quality.negative_elbo < 200


def test_a_second_run_finds_everything_done_and_changes_nothing(
    demo: tuple[Path, PipelineResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, first = demo
    monkeypatch.chdir(folder)
    before = contents(folder)
    assert main(["run", "digits.yaml", "--json"]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [stage["nothing_to_do"] for stage in result["stages"]] == [True] * len(first.stages)
    assert "nothing to do" in result["message"]
    assert first.quality is not None
    assert result["quality"]["neighbour_accuracy"] == first.quality.neighbour_accuracy
    assert contents(folder) == before


def test_the_closing_table_names_every_output(
    demo: tuple[Path, PipelineResult], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo[0])
    assert main(["run", "digits.yaml", "--quiet"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    for stage in demo[1].stages:
        assert f"{stage.stage} " in printed.out
        assert f"{stage.url} " in printed.out
    assert printed.out.count("nothing to do") >= len(demo[1].stages)
    for name in ("validation -ELBO", "5-NN accuracy", "reconstruction MSE"):
        assert name in printed.out


@pytest.mark.parametrize(
    ("command", "output"),
    [
        ("embed demo/rows.zarr demo/model again.zarr --batch-size 100", "again.zarr"),
        ("decode demo/latents.zarr demo/model rows-again.zarr", "rows-again.zarr"),
        ("score demo/rows.zarr demo/model scores.zarr --workers 1", "scores.zarr"),
        ("sample demo/model new.zarr -n 10 --seed 3 --no-noise", "new.zarr"),
        ("plot latents demo/latents.zarr latents.svg --label label", "latents.svg"),
        ("plot grid demo/model grid.svg --grid-size 3", "grid.svg"),
        ("plot loss demo/model loss.svg", "loss.svg"),
        ("plot reconstructions demo/rows.zarr demo/reconstructions.zarr rows.svg -n 3", "rows.svg"),
    ],
)
def test_every_command_says_what_it_wrote(
    demo: tuple[Path, PipelineResult],
    command: str,
    output: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(demo[0])
    assert main([*command.split(), "--quiet"]) == 0
    assert output in capsys.readouterr().out
    assert Path(output).exists()


@pytest.mark.parametrize("url", ["demo/rows.zarr", "demo/latents.zarr", "demo/model"])
def test_info_shows_stores_and_models(
    demo: tuple[Path, PipelineResult],
    url: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(demo[0])
    assert main(["info", url]) == 0
    printed = capsys.readouterr()
    assert len(printed.out.splitlines()) > 3
    assert printed.err == ""


@pytest.mark.parametrize("pipeline", sorted(PIPELINES.glob("*.yaml")), ids=lambda path: path.name)
def test_every_pipeline_file_is_valid_and_says_how_to_run_it(pipeline: Path) -> None:
    assert f"cvae-dist run pipelines/{pipeline.name}" in pipeline.read_text()
    assert all(stage.name in VERBS for stage in read_pipeline(pipeline).stages)
