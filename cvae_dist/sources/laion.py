"""Embeddings and what describes them as LAION's tools write them: ``img_emb_0000.npy``, ``metadata_0000.parquet``."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.parquet import ParquetReader, metadata_reader
from cvae_dist.sources.source import FileReader, Schema
from cvae_dist.store.layout import Block
from cvae_dist.store.urls import Location

_NUMBER = re.compile(r"(\d+)\.\w+$")


@dataclass(frozen=True)
class LaionReader(FileReader):
    """Reads pairs of a ``.npy`` file and a Parquet file that describes its rows, in the same order.

    Attributes
    ----------
    root : Location
    schema : Schema
    rows : FileReader
        Reads the ``.npy`` files.
    table : ParquetReader
        Reads the carried columns.
    metadata : Mapping of str to File
        Parquet files by their number, as it is written.
    """

    root: Location
    schema: Schema
    rows: FileReader
    table: ParquetReader
    metadata: Mapping[str, File]

    def count_file(self, file: File) -> int:
        """Return the rows of a pair; see :class:`~cvae_dist.sources.source.FileReader`."""
        vectors, described = self._pair(file)
        count, others = self.rows.count_file(vectors), self.table.count_file(described)
        if count != others:
            raise BadFile(file.path, "pair", f"has {count:,} rows, {described.path} describes {others:,}")
        return count

    def read_file(self, file: File, first: int, out: Block) -> Mapping[str, Block]:
        """Read rows and what describes them; see :class:`~cvae_dist.sources.source.FileReader`."""
        vectors, described = self._pair(file)
        self.rows.read_file(vectors, first, out)
        if not self.schema.columns:
            return {}
        return self.table.read_file(described, first, np.empty((len(out), 0), np.uint8))

    def _pair(self, file: File) -> tuple[File, File]:
        """Return both files of a pair, each with a version of its own."""
        described = partner(file.path, self.metadata)
        end = pair_version("", described.version)
        if not file.version.endswith(end):
            raise BadFile(file.path, "changed", f"was listed with another version of {described.path}")
        return replace(file, version=file.version.removesuffix(end)), described


def laion_reader(
    root: Location, model: File, options: TableOptions, rows: FileReader, metadata: Mapping[str, File]
) -> LaionReader:
    """Return what reads pairs like that of ``model``, the ``.npy`` file, which was listed with a :func:`pair_version`.

    Raises
    ------
    BadFile
        The pair of ``model`` is not there or cannot be used.
    InvalidInput
        Feature columns were named.
    """
    if options.columns:
        raise InvalidInput("features of LAION's pairs are in the .npy files: leave out --columns")
    table = metadata_reader(root, partner(model.path, metadata), options)
    return LaionReader(root, replace(rows.schema, columns=table.schema.columns), rows, table, metadata)


def number_of(path: str) -> str | None:
    """Return the number at the end of a name, as it is written: "0012" of ``img_emb/img_emb_0012.npy``."""
    found = _NUMBER.search(path)
    return found[1] if found else None


def partner(path: str, metadata: Mapping[str, File]) -> File:
    """Return the Parquet file that belongs to a ``.npy`` file, or raise :class:`BadFile`."""
    number = number_of(path)
    if number is None or number not in metadata:
        name = "metadata_*.parquet" if number is None else f"metadata_{number}.parquet"
        raise BadFile(path, "pair", f"has no {name} that describes its rows")
    return metadata[number]


def pair_version(vectors: str, metadata: str) -> str:
    """Return the version of a pair, which changes with either file's."""
    return f"{vectors}+{metadata}"
