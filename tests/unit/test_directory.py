import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from cvae_dist.config import ModelConfig
from cvae_dist.errors import Corrupt, SourceNotFound
from cvae_dist.model.directory import load_model, save_model
from cvae_dist.model.files import read_description
from cvae_dist.model.vae import VAE
from cvae_dist.store import Location, Moments

ROWS = np.random.default_rng(0).normal(1e6, 1, (200, 6))
CONFIG = ModelConfig(cells_encoder=(16,), likelihood="gaussian", feature_normalization=True)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[VAE, Path]:
    vae = VAE.of(CONFIG, Moments.of(ROWS), "<f8")
    with torch.no_grad():
        vae.likelihood.log_sigma.fill_(-1.25)
    save_model(str(tmp_path / "model"), vae, {"store": "rows.zarr"})
    return vae, tmp_path / "model"


def test_a_loaded_model_is_the_saved_one_wherever_it_is_moved(saved: tuple[VAE, Path], tmp_path: Path) -> None:
    vae, path = saved
    shutil.move(path, tmp_path / "elsewhere")
    loaded = load_model(str(tmp_path / "elsewhere"))
    np.testing.assert_array_equal(loaded.embed_rows(ROWS), vae.embed_rows(ROWS))
    np.testing.assert_array_equal(loaded.decode_rows(loaded.embed_rows(ROWS)), vae.decode_rows(vae.embed_rows(ROWS)))
    assert loaded.config == vae.config
    assert not any(weight.requires_grad for weight in loaded.parameters())


def test_any_file_system_will_do(saved: tuple[VAE, Path]) -> None:
    vae, _ = saved
    digest = save_model("memory://somewhere/model", vae, {})
    assert read_description(Location.of("memory://somewhere/model"))["digest"] == digest
    np.testing.assert_array_equal(load_model("memory://somewhere/model").embed_rows(ROWS), vae.embed_rows(ROWS))


def test_the_digest_is_that_of_the_weights(saved: tuple[VAE, Path], tmp_path: Path) -> None:
    vae, path = saved
    again = save_model(str(tmp_path / "again"), vae, {"store": "another"})
    assert again == read_description(Location.of(path))["digest"]
    with torch.no_grad():
        vae.likelihood.log_sigma.add_(1e-6)
    assert save_model(str(tmp_path / "changed"), vae, {}) != again


@pytest.mark.parametrize("position", [3, 200, -1])
def test_a_flipped_bit_in_the_weights_is_found(saved: tuple[VAE, Path], position: int) -> None:
    weights = saved[1] / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[position] ^= 1
    weights.write_bytes(data)
    with pytest.raises(Corrupt, match="does not match the digest"):
        load_model(str(saved[1]))


def test_missing_pieces_are_named(saved: tuple[VAE, Path]) -> None:
    _, path = saved
    (path / "model.safetensors").unlink()
    with pytest.raises(Corrupt, match=r"model\.safetensors is missing"):
        load_model(str(path))
    (path / "config.json").unlink()
    with pytest.raises(SourceNotFound, match=r"has no config\.json"):
        load_model(str(path))
    (path / "checkpoints").mkdir()
    with pytest.raises(SourceNotFound, match="is not finished"):
        read_description(Location.of(path))
    shutil.rmtree(path)
    with pytest.raises(SourceNotFound, match="there is no model at"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "is not JSON"),
        ("[1]", "was not written by cvae-dist"),
        ('{"model_type": "bert"}', "was not written by cvae-dist"),
        ('{"format": "cvae-dist model", "version": 99}', "model format 99, this release reads 1"),
        ('{"format": "cvae-dist model", "version": 1}', "is incomplete"),
    ],
)
def test_a_foreign_or_broken_config_is_refused(saved: tuple[VAE, Path], text: str, complaint: str) -> None:
    (saved[1] / "config.json").write_text(text)
    with pytest.raises(Corrupt, match=complaint):
        load_model(str(saved[1]))


def test_a_config_that_does_not_fit_the_weights_is_refused(saved: tuple[VAE, Path]) -> None:
    config = json.loads((saved[1] / "config.json").read_text())
    config["model"]["dim_latent"] = 3
    (saved[1] / "config.json").write_text(json.dumps(config))
    with pytest.raises(Corrupt, match="do not fit together"):
        load_model(str(saved[1]))


def test_a_flow_is_kept(tmp_path: Path) -> None:
    config = CONFIG.model_copy(update={"dim_latent": 3, "iaf_flow_length": 2, "iaf_cells": 10})
    vae = VAE.of(config, Moments.of(ROWS), "<f8")
    save_model(str(tmp_path / "model"), vae, {})
    settings = read_description(Location.of(tmp_path / "model"))["model"]
    assert (settings["iaf_context"], settings["iaf_cells"]) == (24, 10)
    loaded = load_model(str(tmp_path / "model"))
    assert loaded.flow is not None
    np.testing.assert_array_equal(loaded.embed_rows(ROWS), vae.embed_rows(ROWS))


def test_a_model_of_before_flows_is_one_without(saved: tuple[VAE, Path]) -> None:
    vae, path = saved
    config = json.loads((path / "config.json").read_text())
    for name in ("iaf_flow_length", "iaf_context", "iaf_cells", "kl_weight"):
        del config["model"][name]
    (path / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(path))
    assert loaded.flow is None
    np.testing.assert_array_equal(loaded.embed_rows(ROWS), vae.embed_rows(ROWS))
