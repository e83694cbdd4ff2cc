"""Reading tables: what files of named columns have in common."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cvae_dist.sources.arrow import arrow_errors, carried, fill
from cvae_dist.sources.chosen import Chosen
from cvae_dist.sources.cursor import rows_at
from cvae_dist.sources.files import BadFile, File
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.source import FileReader, Schema
from cvae_dist.store.layout import STRING, Block
from cvae_dist.store.urls import Location

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True)
class TableReader(FileReader):
    """Reads tables of one kind, in batches whose memory is bounded.

    Attributes
    ----------
    root : Location
    schema : Schema
    chosen : Chosen
        Columns of the first file. Every other file has the same.
    options : TableOptions
        By which they were chosen.
    """

    root: Location
    schema: Schema
    chosen: Chosen
    options: TableOptions

    @abstractmethod
    def start_of(self, file: File, row: int) -> int:
        """Return the last row not after ``row`` at which reading can begin."""

    @abstractmethod
    def batches(self, file: File, start: int) -> "Iterator[pa.RecordBatch]":
        """Yield the chosen columns of a file from such a row on."""

    def read_file(self, file: File, first: int, out: Block) -> Mapping[str, Block]:
        """Read rows into ``out``; see :class:`~cvae_dist.sources.source.FileReader`."""
        parts: list[dict[str, Block]] = [{column.name: _empty(column.dtype) for column in self.schema.columns}]
        if not len(out):
            return parts[0]
        done = 0
        with (
            arrow_errors(file, "values", "cannot be decoded"),
            rows_at(
                (self, file),
                first,
                first + len(out),
                lambda row: self.start_of(file, row),
                lambda start: self.batches(file, start),
            ) as batches,
        ):
            for batch in batches:
                row = first + done
                if self.chosen.features:
                    fill(batch, self.chosen, file.path, row, out[done : done + len(batch)])
                pairs = self.chosen.carried
                parts.append({column.name: carried(batch, name, column, file.path, row) for name, column in pairs})
                done += len(batch)
            if done < len(out):
                detail = f"ends after row {first + done:,}, where {first + len(out):,} rows were counted"
                raise BadFile(file.path, "truncated", detail)
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _empty(dtype: str) -> Block:
    return np.empty(0, dtype=object if dtype == STRING else dtype)
