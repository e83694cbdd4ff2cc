"""A trained model as one file that runs without this package: rows to latents, or latents to rows."""

import copy
import importlib.util
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from cvae_dist.errors import InvalidInput, MissingExtra
from cvae_dist.model.vae import VAE

Direction = Literal["embed", "decode"]
SUFFIXES = (".pt2", ".onnx")

_EXAMPLE_ROWS = 8  # any number but 0 and 1, which torch.export would take for constants
_ONNX_PACKAGES = ("onnx", "onnxscript")
_UNUSED = {"embed": ("decoder", "likelihood", "stretch"), "decode": ("encoder", "flow", "stretch")}


class _OneWay(nn.Module):
    """One direction of a model, the scaling included, as the function of a single tensor."""

    def __init__(self, vae: VAE, direction: Direction) -> None:
        super().__init__()
        self.vae = _without(vae, _UNUSED[direction])
        self.direction = direction

    def forward(self, x: Tensor) -> Tensor:
        """Return latents of rows, or rows of latents."""
        return self.vae.embed(x) if self.direction == "embed" else self.vae.decode(x)


def export_program(vae: VAE, direction: Direction) -> ExportedProgram:
    """Trace one direction of a model for any number of rows.

    Parameters
    ----------
    vae : VAE
        On the CPU, in evaluation mode.
    direction : {"embed", "decode"}
        ``embed`` takes rows (n, n_features) in data units, of the dtype that
        :attr:`~cvae_dist.model.scaling.Scaling.restored_dtype` says; ``decode`` takes float32 latents (n, dim_latent).

    Returns
    -------
    torch.export.ExportedProgram
        Of one argument and one result; ``.module()`` gives the callable.

    Raises
    ------
    InvalidInput
        There is no such direction.
    """
    if direction not in ("embed", "decode"):
        raise InvalidInput(f"{direction!r} is no direction of a model: choose 'embed' or 'decode'")
    one_way = _OneWay(vae, direction).eval()
    with torch.no_grad():
        program = torch.export.export(one_way, (_example(vae, direction),), dynamic_shapes={"x": {0: Dim("n")}})
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # names of folders on this machine
    return program


def _without(vae: VAE, unused: tuple[str, ...]) -> VAE:
    """Return a model that shares its parts with ``vae`` but lacks those unused: they would travel in the file."""
    part = copy.copy(vae)
    part._modules = {name: module for name, module in vae._modules.items() if name not in unused}
    return part


def export_bytes(vae: VAE, direction: Direction, suffix: str) -> bytes:
    """Return the file: a ``.pt2`` for ``torch.export.load``, or an ``.onnx``.

    Raises
    ------
    InvalidInput
        The suffix is neither.
    MissingExtra
        ONNX is asked for without the packages that write it.
    """
    if suffix not in SUFFIXES:
        raise InvalidInput(f"a model cannot be exported as {suffix!r}: name the file *.pt2 (torch) or *.onnx")
    if suffix == ".onnx":
        return _onnx(vae, direction)
    file = io.BytesIO()
    description = {"direction": direction, "n_features": vae.n_features, "dim_latent": vae.dim_latent}
    extra = {"cvae-dist.json": json.dumps(description)}
    torch.export.save(export_program(vae, direction), file, extra_files=extra)
    return file.getvalue()


def _onnx(vae: VAE, direction: Direction) -> bytes:
    missing = [name for name in _ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtra(
            f"ONNX needs {' and '.join(missing)}, not installed here: nothing was exported. A .pt2 file needs neither. "
            "Install with: pip install 'cvae-dist[onnx]'"
        )
    names = ("x", "z") if direction == "embed" else ("z", "x")
    with _quiet():
        program = torch.onnx.export(
            export_program(vae, direction), input_names=names[:1], output_names=names[1:], dynamo=True, verbose=False
        )
    assert program is not None  # as dynamo=True
    with tempfile.TemporaryDirectory(prefix="cvae-dist-") as folder:
        path = Path(folder) / "model.onnx"
        program.save(path)
        return path.read_bytes()


@contextmanager
def _quiet() -> Iterator[None]:
    """Leave out what torch's exporter tells of itself: operators of torchvision, calls that it will change."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def _example(vae: VAE, direction: Direction) -> Tensor:
    if direction == "decode":
        return torch.zeros(_EXAMPLE_ROWS, vae.dim_latent)
    dtype = torch.float32 if vae.scaling.restored_dtype == "float32" else torch.float64
    return vae.scaling.center.to(dtype).expand(_EXAMPLE_ROWS, -1).contiguous()
