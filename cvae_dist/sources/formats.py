"""Which kind of source a location is, and what reads it."""

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

from cvae_dist.errors import InvalidInput, SourceNotFound
from cvae_dist.sources.convert import how_to_convert
from cvae_dist.sources.csv import csv_reader
from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.files import Files
from cvae_dist.sources.hdf5 import hdf5_reader
from cvae_dist.sources.laion import laion_reader, pairs
from cvae_dist.sources.listing import find_files
from cvae_dist.sources.npy import npy_reader
from cvae_dist.sources.npz import npz_reader
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.parquet import parquet_reader
from cvae_dist.sources.source import Reader, RowsPerFile, Source
from cvae_dist.store import Location
from cvae_dist.store.foreign import zarr_kind
from cvae_dist.store.urls import StorageOptions

Format = Literal["auto", "npy", "npz", "parquet", "csv", "laion", "zarr", "hdf5"]

_SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "npy": (".npy",), "npz": (".npz",), "parquet": (".parquet", ".pq"), "csv": (".csv", ".tsv"),
    "laion": (".npy", ".parquet"), "hdf5": (".h5", ".hdf5", ".nc"),
}  # fmt: skip
_TAKES: Mapping[str, tuple[str, ...]] = {  # options by format
    "npy": ("rows_per_file",), "npz": ("array",), "hdf5": ("array",), "parquet": ("columns", "id", "carry"),
    "csv": ("columns", "id", "carry"), "laion": ("id", "carry"), "zarr": ("array", "id", "carry"),
}  # fmt: skip
_PLAIN: tuple[Format, ...] = ("npy", "npz", "parquet", "csv", "hdf5")
_LAION = re.compile(r"(?:.*/)?(?:img_emb|text_emb|metadata)_(\d+)\.(?:npy|parquet)")


@dataclass(frozen=True)
class FileOptions:
    """How files are to be read; see the parameters of ``ingest`` of the same names."""

    format: Format = "auto"
    rows_per_file: RowsPerFile = "auto"
    array: str | None = None
    table: TableOptions = field(default_factory=TableOptions)

    @property
    def given(self) -> dict[str, Any]:
        """What a user said beside the format, by name."""
        rows = {"rows_per_file": self.rows_per_file} if self.rows_per_file != "auto" else {}
        said = {**rows, "array": self.array, **asdict(self.table)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in said.items() if value}

    def require_known(self, url: str, kind: str) -> None:
        """Refuse options that have no effect on files of a kind."""
        unknown = self.given.keys() - {*_TAKES[kind]}
        if unknown:
            raise InvalidInput(
                f"{url} holds {kind} files, for which {', '.join(sorted(unknown))} has no meaning; known: "
                f"{', '.join(_TAKES[kind])}. Nothing was written; leave it out"
            )


@dataclass(frozen=True)
class FileSource:
    """Files of one kind below a location.

    Attributes
    ----------
    url : str
        The location as it was named.
    root : Location
        What paths are relative to.
    found : FileTable
    format : str
    options : FileOptions
    """

    url: str
    root: Location
    found: FileTable
    format: Format
    options: FileOptions

    def list(self) -> FileTable:
        """Return the files; of pairs, one of each."""
        return self._files

    @cached_property
    def _files(self) -> FileTable:
        if self.format == "laion":
            return pairs(self.url, self.found)
        wanted = _SUFFIXES[self.format]
        if len(self.found) == sum(count for suffix, (count, _) in self.found.kinds.items() if suffix in wanted):
            return self.found
        return self.found.only(lambda path: path.lower().endswith(wanted))

    def reader(self, model: Files) -> Reader:
        """Return what reads the files, as one of them says."""
        (file,) = model.of(self.root)
        options = self.options
        match self.format:
            case "npy":
                return npy_reader(self.root, file, options.rows_per_file)
            case "npz":
                return npz_reader(self.root, file, options.array)
            case "hdf5":
                return hdf5_reader(self.root, file, options.array)
            case "parquet":
                return parquet_reader(self.root, file, options.table)
            case "csv":
                return csv_reader(self.root, file, options.table)
            case "laion":
                return laion_reader(self.root, file, options.table)
        raise AssertionError(f"{self.format} has a source of its own")


def open_source(
    source: str | os.PathLike[str] | Source,
    options: FileOptions,
    storage_options: StorageOptions | None = None,
) -> Source:
    """Find out what a location holds; a source that is one already is returned as it is.

    Raises
    ------
    SourceNotFound
        Nothing is there, or nothing that can be read; the text says how to convert what is there.
    InvalidInput
        Several kinds of files are there, and ``options.format`` does not say which are meant.
    """
    if isinstance(source, Source):
        return source
    root = Location.of(source, storage_options)
    if options.format in ("auto", "zarr") and zarr_kind(root) is not None:
        from cvae_dist.sources.zarr_array import ZarrSource, fits

        if options.format == "auto" and (message := fits(root, options.array)):
            raise InvalidInput(f"{message}. Nothing was written; to copy it all the same, say --format zarr")
        options.require_known(str(root), "zarr")
        return ZarrSource(root, options.array, options.table.id, options.table.carry)
    if options.format == "zarr":
        raise SourceNotFound(
            f"there is no Zarr array or group at {root}. Nothing was written; mend the path or --format"
        )
    suffixes = {suffix for kinds in _SUFFIXES.values() for suffix in kinds}
    folder, found = find_files(root, suffixes)
    kind = _kind(root, found) if options.format == "auto" else options.format
    if not any(found.kinds.get(suffix) for suffix in _SUFFIXES[kind]):
        raise SourceNotFound(f"there is no {_SUFFIXES[kind][0]} file below {root}. {_remedy(root, found)}")
    options.require_known(str(root), kind)
    return FileSource(str(root), folder, found, kind, options)


def _kind(root: Location, found: FileTable) -> Format:
    """Return what the names of the files say that they are."""
    there = {kind: [found.kinds[suffix] for suffix in _SUFFIXES[kind] if suffix in found.kinds] for kind in _PLAIN}
    there = {kind: counts for kind, counts in there.items() if counts}
    if not there and root.is_file():
        raise InvalidInput(f"{root} is no file of a kind that can be read. {_remedy(root, found)}")
    if not there:
        raise SourceNotFound(f"there is no file below {root} that can be read. {_remedy(root, found)}")
    if there.keys() == {"npy", "parquet"} and all(
        _LAION.fullmatch(path) for files in found.batches() for path in files.path
    ):
        return "laion"
    if len(there) > 1:
        counted = "; ".join(
            f"{sum(count for count, _ in counts):,} {kind} files ({counts[0][1]} first)"
            for kind, counts in there.items()
        )
        raise InvalidInput(
            f"{root} holds files of several kinds: {counted}. Nothing was written; say which of them hold the rows, "
            f"such as --format {next(iter(there))}, or name a folder of one kind"
        )
    return next(iter(there))


def _remedy(root: Location, found: FileTable) -> str:
    return f"Nothing was written; {how_to_convert(str(root), found.kinds)}"
