"""What more width, depth and blocks buy, and for how much time; the automatic sizes come first."""

from collections.abc import Iterator

import numpy as np

from tests.bench.model.bench_vectors import LONG, SHORT, Split, images, of_model, trained, vectors
from tests.bench.table import Row

_ROWS = 10_000
_STEPS = 1000
_SIZES: tuple[tuple[tuple[int, ...] | None, int | None], ...] = (
    (None, None),
    ((256, 256), 2),
    ((512, 256), 0),
    ((512, 512, 256), 2),
    ((1024, 512), 2),
)


def rows() -> Iterator[Row]:
    """Measure every size on vectors, in 16 and 64 dimensions, and on images."""
    for name, split, dim_latent in (
        ("long texts, 64-D", vectors(LONG, _ROWS), 64),
        ("short texts, 64-D", vectors(SHORT, _ROWS), 64),
        ("short texts, 16-D", vectors(SHORT, _ROWS), 16),
        ("MNIST, 16-D", images(_ROWS), 16),
    ):
        for cells, blocks in _SIZES:
            yield _row(name, split, dim_latent, cells, blocks)


def _row(name: str, split: Split, dim_latent: int, cells: tuple[int, ...] | None, blocks: int | None) -> Row:
    embedder, spent = trained(
        split, dim_latent=dim_latent, cells_encoder=cells, residual_blocks=blocks, num_steps=_STEPS
    )
    error = np.square(embedder.decode(embedder.embed(split.test)) - split.test).mean()
    kept = 1 - error / split.test.var(axis=0).mean()
    config = embedder.model_.config
    sizes = f"{config.cells_encoder}, {config.residual_blocks} blocks{'' if cells else ' (automatic)'}"
    note = f"variance kept {kept:.3f}, {of_model(split, embedder)}"
    return Row(f"{name}, {sizes}: CPU-seconds", spent, None, note=note)
