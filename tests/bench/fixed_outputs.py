"""Digests of everything that one fixed script writes, to be compared between two versions of the code.

    python -m tests.bench.fixed_outputs SOURCES before.txt      # at the old commit
    python -m tests.bench.fixed_outputs SOURCES after.txt       # at the new one
    diff before.txt after.txt                                   # every line is a change that somebody has to want

``SOURCES`` is a folder for the rows, made once: their paths and times are part of what a store is made from.
Digits, 5,000 rows of MNIST and float16 files of many rows are ingested, trained on, embedded, decoded, scored and
sampled with given seeds. What tells the time (history, seconds, versions) is left out.
"""

import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

import cvae_dist
from tests.bench.model.data import mnist

_TIMES = ("seconds", "history", "versions", "time", "rows_per_second", "waiting_share")


def make_sources(root: Path) -> None:
    """Write the three trees unless they are there."""
    if (root / "done").exists():
        return
    digits = load_digits()
    for number, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        _save(root / f"digits/{label}/{number:04d}.npy", image.astype(np.uint8))
    for number, image in enumerate(mnist().train[:5000]):
        _save(root / f"mnist/{number % 7}/{number:05d}.npy", image.reshape(28, 28))
    random = np.random.default_rng(0)
    for number in range(40):
        _save(root / f"half/{number:02d}.npy", random.normal(size=(5000, 24)).astype(np.float16))
    (root / "done").touch()


def _save(path: Path, array: np.ndarray[Any, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array)


def run(sources: Path, out: Path) -> None:
    """Make every kind of output of the three sources."""
    settings: dict[str, dict[str, Any]] = {
        "digits": dict(dim_latent=4, num_steps=400, likelihood="bernoulli", iaf_flow_length=2, cells_encoder=(64, 32)),
        "mnist": dict(dim_latent=16, num_steps=200, seed=3),
        "half": dict(dim_latent=2, num_steps=150, buffer_bytes=2_000_000),
    }
    for name, config in settings.items():
        rows, model = str(out / f"{name}.zarr"), str(out / f"{name}-model")
        one, label = ("auto", None) if name == "half" else ("one", "folder")
        cvae_dist.ingest(sources / name, rows, rows_per_file=one, label=label)
        cvae_dist.train(rows, model, precision="float32", tb_logging=False, **config)
        cvae_dist.embed(rows, model, str(out / f"{name}-latents.zarr"))
        cvae_dist.decode(str(out / f"{name}-latents.zarr"), model, str(out / f"{name}-decoded.zarr"))
        cvae_dist.score(rows, model, str(out / f"{name}-scores.zarr"))
        cvae_dist.sample(model, str(out / f"{name}-samples.zarr"), 3000, seed=5, temperature=0.9)
        cvae_dist.fit_prior(rows, model, seed=1)
        cvae_dist.sample(model, str(out / f"{name}-mixture.zarr"), 2000, prior="mixture")
    X = load_digits().data[:600].astype(np.float32)
    fitted = cvae_dist.CompressionVAE(dim_latent=2, num_steps=200, random_state=4, precision="float32").fit(X)
    for name, values in {
        "embed": fitted.embed(X),
        "std": fitted.embed(X, return_std=True)[1],
        "decode": fitted.decode(fitted.embed(X)),
        "sample": fitted.sample(50, random_state=1),
        "posterior": fitted.posterior_sample(X, 2, random_state=2),
        "iwae": fitted.score_samples(X, kind="iwae", k=5),
        "elbo": fitted.score_samples(X),
    }.items():
        _save(out / f"estimator/{name}.npy", np.asarray(values))


def digests(out: Path) -> Iterator[str]:
    """Yield a line for every object; JSON is one line an entry, without what tells the time or the folder."""
    for path in sorted(path for path in out.rglob("*") if path.is_file()):
        name = path.relative_to(out)
        if path.suffix in (".json", ".jsonl"):
            text = path.read_text().replace(str(out), "OUT")
            for number, line in enumerate(text.splitlines() if path.suffix == ".jsonl" else [text]):
                for key, value in _entries(json.loads(line)):
                    yield f"{name}:{number} {key} = {value}"
        else:
            yield f"{name} {hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()}"


def _entries(document: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(document, dict):
        for key, value in sorted(document.items()):
            if key not in _TIMES:
                yield from _entries(value, f"{prefix}.{key}")
    else:
        yield prefix, re.sub(r"0x[0-9a-f]+", "", json.dumps(document))


if __name__ == "__main__":
    place, listing = Path(sys.argv[1]), Path(sys.argv[2])
    make_sources(place)
    with tempfile.TemporaryDirectory() as folder:
        run(place, Path(folder))
        listing.write_text("\n".join(digests(Path(folder))) + "\n")
