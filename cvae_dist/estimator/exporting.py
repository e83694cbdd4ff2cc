"""The model as one file for other programs."""

from __future__ import annotations

import os
from pathlib import PurePosixPath

from cvae_dist.estimator.fitted import Fitted
from cvae_dist.model.export import Direction, export_bytes
from cvae_dist.store import Location


class Exporting(Fitted):
    """Live use without this package."""

    def export(self, path: str | os.PathLike[str], direction: Direction = "embed") -> None:
        """Write one direction of the model, the scaling included, as one file; any number of rows may go in.

        ``torch.export.load(path).module()(rows)`` then needs torch alone, and an ``.onnx`` file only an ONNX runtime.

        Parameters
        ----------
        path : path or URL
            Its suffix decides: ``.pt2`` (torch.export) or ``.onnx``.
        direction : {"embed", "decode"}
            Rows (n, n_features) in the data's units to latents (n, dim_latent), or back. Rows are float32, or float64
            where :meth:`decode` returns float64.

        Raises
        ------
        NotFitted
            There is no model.
        InvalidInput
            The direction or the suffix is unknown.
        MissingExtra
            ONNX is asked for and ``onnx`` or ``onnxscript`` is not installed.
        """
        suffix = PurePosixPath(os.fspath(path)).suffix.lower()
        data = export_bytes(self._model(), direction, suffix)
        Location.of(path, self.storage_options).write(data)
