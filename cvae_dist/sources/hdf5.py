"""HDF5 and NetCDF4 files (extra ``hdf5``): one dataset of each, rows along its first axis."""

import math
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cvae_dist.errors import InvalidInput, MissingExtra, StorageFailed
from cvae_dist.sources.cf import BadValues, Packing
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.source import ArrayReader, FileReader, require_rows, schema_of
from cvae_dist.store.layout import Block
from cvae_dist.store.urls import Location

if TYPE_CHECKING:
    import h5py

_MAGIC = b"\x89HDF\r\n\x1a\n"
_NETCDF3 = (b"CDF\x01", b"CDF\x02", b"CDF\x05")
# What HDF5 and h5py bring along: gzip, shuffle, fletcher32, szip, nbit, scaleoffset, lzf. Others are plugins.
_FILTERS = (1, 2, 3, 4, 5, 6, 32000)
_CACHE_BYTES = 64_000_000  # of chunks: rows are asked for in runs that may end inside one
_NAMED = 10
_MOST_LISTED = 1000
_MOST_DECODED = 2_000_000_000  # bytes of a chunk

_kept = threading.local()


def hdf5_reader(root: Location, model: File, array: str | None) -> FileReader:
    """Return what reads one dataset of each file, all of which have to be like that of ``model``.

    ``array`` is its path; by default it is the only one that holds numbers and has at least two axes. Numbers are
    unpacked as the CF attributes say, and missing ones become NaN.

    Raises
    ------
    BadFile
        The model is no such file, or has no such dataset, or several and no name was given.
    MissingExtra
        h5py is not installed.
    """
    with _dataset(model, array) as (dataset, packing):
        schema = schema_of(model, dataset.shape, packing.dtype)
    return Hdf5Reader(root, schema, array, packing.remark)


@dataclass(frozen=True)
class Hdf5Reader(ArrayReader):
    """Reads a dataset of each HDF5 file; ``note`` says how numbers are unpacked."""

    note: str

    def remark(self, files: int, rows: int) -> str:
        """Say how numbers are unpacked."""
        return self.note

    def count_file(self, file: File) -> int:
        """Return the rows of the dataset, all of whose chunks have to be there."""
        with self._dataset(file) as (dataset, packing):
            _require_written(file, dataset, packing)
            return int(dataset.shape[0])

    def read_file(self, file: File, first: int, out: Block) -> Mapping[str, Block]:
        """Read rows into ``out``."""
        with self._dataset(file) as (dataset, packing):
            require_rows(file, dataset.shape[0], first + len(out))
            rows = slice(first, first + len(out))
            if packing.plain and len(out):
                dataset.read_direct(out.reshape((len(out), *dataset.shape[1:])), rows)
            elif len(out):
                out[:] = packing.decode(dataset[rows]).reshape(out.shape)
        return {}

    @contextmanager
    def _dataset(self, file: File) -> "Iterator[tuple[h5py.Dataset, Packing]]":
        with _dataset(file, self.array) as (dataset, packing):
            self.require_like(file, dataset.shape, packing.dtype)
            yield dataset, packing


@contextmanager
def _dataset(file: File, array: str | None) -> "Iterator[tuple[h5py.Dataset, Packing]]":
    """Give a dataset that is harmless to read. Whatever HDF5 says of the file is a ``BadFile``."""
    try:
        content = _opened(file)
        dataset = _only(file, content) if array is None else _named(file, content, array)
        _require_harmless(file, dataset)
        yield dataset, Packing.of(dict(dataset.attrs), dataset.dtype)
    except (InvalidInput, MissingExtra, StorageFailed, MemoryError):
        raise
    except BadValues as error:
        raise BadFile(file.path, "values", str(error)) from None
    except Exception as error:
        _kept.content = None
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadFile(file.path, "hdf5", f"cannot be read by HDF5: {why}") from error


def _opened(file: File) -> "h5py.File":
    """Return the content of a file; this thread keeps it open for what is asked for next."""
    try:
        import h5py
    except ImportError:
        raise MissingExtra(f"{file} needs h5py, which is not installed; pip install 'cvae-dist[hdf5]'") from None
    kept = getattr(_kept, "content", None)
    if kept is None or kept[0] != file:
        head = bytes(file.read(0, len(_MAGIC)))
        if not head:
            raise BadFile(file.path, "hdf5", "is empty")
        if head.startswith(_NETCDF3):
            name = str(file)
            target = f"{name.removesuffix('.nc')}.zarr"
            line = (
                f"import xarray; xarray.open_dataset({name!r}, engine='scipy').to_zarr({target!r}, consolidated=False)"
            )
            raise BadFile(
                file.path, "netcdf3", f"is a NetCDF file of the classic format: convert it with Python: {line}"
            )
        kept = _kept.content = file, h5py.File(file.open(), "r", rdcc_nbytes=_CACHE_BYTES)
    return kept[1]


def _named(file: File, content: "h5py.File", path: str) -> "h5py.Dataset":
    """Return the dataset at a path that does not leave the file."""
    import h5py

    found: Any = content
    for name in filter(None, path.split("/")):
        links, key = (found.id.links if isinstance(found, h5py.Group) else None), name.encode()
        if links is None or not links.exists(key):
            found = None
        elif links.get_info(key).type == h5py.h5l.TYPE_HARD:
            found = found[name]
        else:
            where = b":".join(filter(None, np.ravel(links.get_val(key)))).decode(errors="replace")
            raise BadFile(file.path, "link", f"has only a link at {path}, to {where}, and links are not followed")
    if not isinstance(found, h5py.Dataset):
        raise BadFile(file.path, "array", f"holds no dataset {path!r} but: {_listed(_datasets(content))}")
    return found


def _only(file: File, content: "h5py.File") -> "h5py.Dataset":
    found = _datasets(content)
    able = [dataset for dataset in found.values() if _is_numeric(dataset) and dataset.ndim > 1]
    if len(able) != 1:
        what = f"holds {len(able)} datasets of numbers with at least two axes, so one has to be named"
        raise BadFile(file.path, "array", f"{what}: {_listed(found)}")
    return able[0]


def _datasets(content: "h5py.File") -> "dict[str, h5py.Dataset]":
    """Return the datasets that lie in the file itself, by path."""
    import h5py

    found: dict[str, h5py.Dataset] = {}

    def look(path: str, one: Any) -> bool | None:
        if isinstance(one, h5py.Dataset):
            found[path] = one
        return True if len(found) == _MOST_LISTED else None

    content.visititems(look)
    return found


def _listed(found: Mapping[str, Any]) -> str:
    return ", ".join([*found][:_NAMED]) + (", ..." if len(found) > _NAMED else "") if found else "none"


def _is_numeric(dataset: "h5py.Dataset") -> bool:
    try:
        return dataset.dtype.kind in "iuf" and dataset.dtype.itemsize <= 8
    except TypeError:  # a type that NumPy has not
        return False


def _require_harmless(file: File, dataset: "h5py.Dataset") -> None:
    """Refuse what is not an array of numbers in this very file, or needs a plugin."""
    import h5py

    if not _is_numeric(dataset):
        said = f"holds {dataset.name} of a type that is no number; float16, float32, float64 and integers are accepted"
        raise BadFile(file.path, "dtype", said)
    if not dataset.shape:
        raise BadFile(file.path, "shape", f"has shape {dataset.shape} at {dataset.name}, which holds no rows")
    made = dataset.id.get_create_plist()
    if made.get_layout() == h5py.h5d.VIRTUAL or made.get_external_count():
        raise BadFile(file.path, "external", f"keeps the values of {dataset.name} in other files, which are not read")
    filters = [made.get_filter(number) for number in range(made.get_nfilters())]
    if strange := [f"{code} ({name.decode(errors='replace')})" for code, _, _, name in filters if code not in _FILTERS]:
        raise BadFile(
            file.path,
            "filter",
            f"has {dataset.name} compressed by the HDF5 plugin {', '.join(strange)}, which is not loaded; gzip, lzf, "
            "szip, shuffle, fletcher32 and scaleoffset are read",
        )
    size = math.prod(dataset.chunks or ()) * dataset.dtype.itemsize
    if size > _MOST_DECODED:
        raise BadFile(file.path, "chunks", f"has chunks of {size:,} bytes, which are decoded whole; use smaller ones")


def _require_written(file: File, dataset: "h5py.Dataset", packing: Packing) -> None:
    """Refuse values that were never written, unless they read as NaN."""
    import h5py

    if not dataset.size or packing.is_missing(dataset.fillvalue):
        return
    said = f"which read as the fill value {dataset.fillvalue}"
    if dataset.chunks is not None:
        shapes = zip(dataset.shape, dataset.chunks, strict=True)
        expected, there = math.prod(-(-n // chunk) for n, chunk in shapes), dataset.id.get_num_chunks()
        if there < expected:
            raise BadFile(file.path, "missing", f"lacks {expected - there:,} of {expected:,} chunks, {said}")
    elif dataset.id.get_create_plist().get_layout() == h5py.h5d.CONTIGUOUS and not dataset.id.get_storage_size():
        raise BadFile(file.path, "missing", f"lacks all values of {dataset.name}, {said}")
