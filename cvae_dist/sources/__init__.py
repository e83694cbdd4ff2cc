"""Rows from anywhere, read only: a source lists its files without opening them."""

from cvae_dist.sources.files import BadFile, File, Files
from cvae_dist.sources.pieces import Pieces
from cvae_dist.sources.source import Column, FileReader, Reader, RowsPerFile, Schema, Source

__all__ = ["BadFile", "Column", "File", "FileReader", "Files", "Pieces", "Reader", "RowsPerFile", "Schema", "Source"]
