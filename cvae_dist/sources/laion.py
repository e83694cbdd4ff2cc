"""Embeddings and what describes them as LAION's tools write them: ``img_emb_0000.npy``, ``metadata_0000.parquet``."""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np

from cvae_dist.errors import InvalidInput
from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.files import BadFile, File, Files
from cvae_dist.sources.npy import npy_reader
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.parquet import ParquetReader, metadata_reader
from cvae_dist.sources.source import FileReader, Schema
from cvae_dist.store.layout import Block
from cvae_dist.store.urls import Location

_NUMBER = re.compile(r"(\d+)\.\w+$")
_BETWEEN = "\n"  # the parts of a pair's version: no storage has it in one of its own


def pairs(url: str, found: FileTable) -> FileTable:
    """Return the ``.npy`` files among files, each listed with its Parquet file, which has the same number.

    The version of a pair tells that of the ``.npy`` file, and size, version and path of the other one, so that nothing
    else is needed to read it.

    Raises
    ------
    InvalidInput
        Two files of a kind have the same number.
    """
    files = Files.join(list(found.batches()))
    is_rows = np.array([path.lower().endswith(".npy") for path in files.path], bool)
    for kind in (files[~is_rows], files[is_rows]):
        _require_apart(url, kind)
    described = files[~is_rows]
    columns = described.path, described.size.tolist(), described.version
    ends = {
        number: _BETWEEN.join(["", str(size), version, path])
        for path, size, version in zip(*columns, strict=True)
        if (number := number_of(path)) is not None
    }
    rows = files[is_rows]
    versions = [one + ends.get(number_of(path) or "", "") for path, one in zip(rows.path, rows.version, strict=True)]
    return FileTable.of(replace(rows, version=np.array(versions, object)))


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
    """

    root: Location
    schema: Schema
    rows: FileReader
    table: ParquetReader

    def count_file(self, file: File) -> int:
        """Return the rows of a pair; see :class:`~cvae_dist.sources.source.FileReader`."""
        vectors, described = _pair(file)
        count = self.rows.count_file(vectors)
        with _named_after(file):
            others = self.table.count_file(described)
        if count != others:
            raise BadFile(file.path, "pair", f"has {count:,} rows, {described.path} describes {others:,}")
        return count

    def read_file(self, file: File, first: int, out: Block) -> Mapping[str, Block]:
        """Read rows and what describes them; see :class:`~cvae_dist.sources.source.FileReader`."""
        vectors, described = _pair(file)
        self.rows.read_file(vectors, first, out)
        if not self.schema.columns:
            return {}
        with _named_after(file):
            return self.table.read_file(described, first, np.empty((len(out), 0), np.uint8))


def laion_reader(root: Location, model: File, options: TableOptions) -> LaionReader:
    """Return what reads pairs like that of ``model``, which is one of :func:`pairs`.

    Raises
    ------
    BadFile
        The pair of ``model`` is not there or cannot be used.
    InvalidInput
        Feature columns were named.
    """
    if options.columns:
        raise InvalidInput("features of LAION's pairs are in the .npy files: leave out --columns")
    vectors, described = _pair(model)
    rows = npy_reader(root, vectors, "many")
    with _named_after(model):
        table = metadata_reader(root, described, options)
    return LaionReader(root, replace(rows.schema, columns=table.schema.columns), rows, table)


def number_of(path: str) -> str | None:
    """Return the number at the end of a name, as it is written: "0012" of ``img_emb/img_emb_0012.npy``."""
    found = _NUMBER.search(path)
    return found[1] if found else None


def _pair(file: File) -> tuple[File, File]:
    """Return both files of a pair as they were listed, or raise :class:`BadFile`."""
    vectors, size, version, path = [*file.version.split(_BETWEEN, 3), "", "", ""][:4]
    if not size.isdecimal():
        name = f"metadata_{number_of(file.path) or '*'}.parquet"
        raise BadFile(file.path, "pair", f"has no {name} that describes its rows")
    return replace(file, version=vectors), File(file.root, path, int(size), version)


@contextmanager
def _named_after(file: File) -> Iterator[None]:
    """Say of a pair what is wrong with its Parquet file: a pair is listed, and set aside, as its ``.npy`` file."""
    try:
        yield
    except BadFile as error:
        raise BadFile(file.path, error.code, f"is described by {error.path}, which {error.detail}") from error


def _require_apart(url: str, files: Files) -> None:
    """Refuse files of one kind that have the same number: nobody could tell the pairs."""
    seen: dict[str | None, str] = {}
    for path in files.path:
        other = seen.setdefault(number_of(path), path)
        if other != path:
            raise InvalidInput(
                f"{url} holds {other} and {path}, which have the same number, so pairs cannot be told apart. Nothing "
                "was written; ingest one folder of embeddings with its metadata at a time"
            )
