"""Rows from anywhere, read only: a source lists its files without opening them."""

from cvae_dist.sources.batch import Batch, Interval, StagedBatch
from cvae_dist.sources.changes import Changes, compare, merged
from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.files import BadFile, BadFiles, File, Files, file_name
from cvae_dist.sources.formats import FileOptions, Format, open_source
from cvae_dist.sources.intake import Intake, is_news
from cvae_dist.sources.options import TableOptions
from cvae_dist.sources.pieces import Pieces
from cvae_dist.sources.places import Places, to_read
from cvae_dist.sources.source import Column, FileReader, Reader, RowsPerFile, Schema, Source
from cvae_dist.sources.spool import Spool

__all__ = [
    "BadFile", "BadFiles", "Batch", "Changes", "Column", "File", "FileOptions", "FileReader", "FileTable", "Files",
    "Format", "Intake", "Interval", "Pieces", "Places", "Reader", "RowsPerFile", "Schema", "Source", "Spool",
    "StagedBatch", "TableOptions", "compare", "file_name", "is_news", "merged", "open_source", "to_read",
]  # fmt: skip
