"""Files of the kind ``.npy``: one item per file, or many rows per file."""

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from cvae_dist.sources.files import BadFile, File, Files, Integers, require_none
from cvae_dist.sources.npy_header import Header, read_header
from cvae_dist.sources.pieces import Pieces
from cvae_dist.sources.source import Column, FileReader, RowsPerFile, Schema
from cvae_dist.store.layout import STRING, Block
from cvae_dist.store.urls import Location

_THREADS = 32  # small files that are read at a time where that is waiting for a storage


def npy_reader(root: Location, model: File, rows_per_file: RowsPerFile) -> "NpyReader":
    """Return what reads ``.npy`` files that are like ``model``.

    ``rows_per_file`` is "one" where each file is one item of any shape, and "many" where the first axis of each file
    counts items. With "auto" a file with one axis is one vector, and others hold many.

    Raises
    ------
    BadFile
        It is no array of numbers, or one whose rows cannot be used.
    """
    header = read_header(model)
    one = rows_per_file == "one" or (rows_per_file == "auto" and len(header.shape) == 1)
    item_shape = header.shape if one else header.shape[1:] or (1,)
    if 0 in item_shape:
        raise BadFile(model.path, "shape", f"has shape {header.shape}: items without values cannot be used")
    schema = Schema(item_shape, header.dtype.newbyteorder("="), one, (Column("id", STRING),) if one else ())
    return NpyReader(root, schema, header, model.path, guessed=rows_per_file == "auto" and not one)


@dataclass(frozen=True)
class NpyReader(FileReader):
    """Reads ``.npy`` files of one item shape and dtype.

    Attributes
    ----------
    root : Location
        The folder that paths are relative to.
    schema : Schema
    model : Header
        That of the file whose shape and dtype all others have to have.
    first : str
        Path of that file.
    guessed : bool
        Nobody said whether a file is one item.
    """

    root: Location
    schema: Schema
    model: Header
    first: str
    guessed: bool

    @property
    def streams(self) -> bool:
        """Whether rows can be read a few at a time: from a disk, and where they lie one after the other."""
        return self.root.is_local and self.model.plain

    def count(self, files: Files) -> tuple[Integers, list[BadFile]]:
        """Count the rows of every file. Items are not looked at where the size is the expected one."""
        if not self.schema.one_per_file:
            return super().count(files)
        rows = np.ones(len(files), dtype=np.int64)
        others = np.flatnonzero(files.size != self.model.size)
        rows[others], problems = super().count(files[others])
        return rows, problems

    def count_file(self, file: File) -> int:
        """Return the rows of a file, after a look at its header."""
        header, schema = read_header(file), self.schema
        shape = header.shape if schema.one_per_file else header.shape[1:] or (1,)
        if shape != schema.item_shape:
            there = f"has items of shape {shape}, the first file, {self.first}, has {schema.item_shape}"
            raise BadFile(file.path, "shape", there)
        if header.dtype.newbyteorder("=") != schema.dtype:
            there = f"has dtype {header.dtype}, the first file, {self.first}, has {schema.dtype}"
            raise BadFile(file.path, "dtype", there)
        return 1 if schema.one_per_file else header.shape[0]

    def remark(self, files: int, rows: int) -> str:
        """Say what the shapes were taken to mean: a tree of images looks like a tree of matrices."""
        each = self.model.shape[0]
        if not self.guessed or files < 2 or rows != files * each:
            return ""
        return (
            f"each of {files:,} files of shape {self.model.shape} is read as {each:,} rows; "
            "if each is one item, say --rows-per-file one --overwrite"
        )

    def read(self, pieces: Pieces, out: Block) -> Mapping[str, Block]:
        """Read rows, and return the paths of items as their ids."""
        if not self.schema.one_per_file:
            return super().read(pieces, out)
        if self.model.plain and self.root.is_local:
            self._read_local_items(pieces, out)
        else:
            self._read_items(pieces, out)
        return {"id": pieces.path}

    def read_file(self, file: File, first: int, out: Block) -> Mapping[str, Block]:
        """Read rows of one file, whatever its byte order and the order of its axes."""
        self.count_file(file)
        header = read_header(file)
        if header.plain:
            file.read_into(header.offset + first * out.shape[1] * out.itemsize, out.data.cast("B"))
        elif self.schema.one_per_file:
            item = np.frombuffer(file.read(header.offset), header.dtype)
            out[0] = item.reshape(header.shape, order="F" if header.fortran else "C").ravel()
        elif header.fortran and len(header.shape) > 1:
            _read_columns(file, header, first, out)
        else:
            file.read_into(header.offset + first * out.shape[1] * out.itemsize, out.data.cast("B"))
            out.byteswap(inplace=True)
        return {}

    def _read_local_items(self, pieces: Pieces, out: Block) -> None:
        """Read one item per file with few system calls: header, row and end of file come by one ``readv``."""
        expected, size = self.model.text, self.model.size
        header, beyond = bytearray(self.model.offset), bytearray(1)
        rows = out.data.cast("B") if out.size else memoryview(b"")
        width = out.shape[1] * out.itemsize
        root = f"{self.root}/"
        open_file, read, look, close, flags = os.open, os.readv, os.fstat, os.close, os.O_RDONLY | os.O_CLOEXEC
        problems = list[BadFile]()
        versions = np.fromstring(" ".join(pieces.version), np.int64, sep=" ").tolist()  # half the time of int()
        for path, version, start in zip(pieces.path.tolist(), versions, range(0, len(rows), width), strict=True):
            try:
                descriptor = open_file(root + path, flags)
            except OSError:
                count, modified = -1, 0
            else:
                try:
                    count = read(descriptor, (header, rows[start : start + width], beyond))
                    modified = look(descriptor).st_mtime_ns
                finally:
                    close(descriptor)
            if count != size or header != expected or modified != version:  # or it is only written otherwise
                number = start // width
                file = File(self.root, path, int(pieces.size[number]), pieces.version[number])
                problems += self._try_item(file, out[number : number + 1])
        require_none(problems)

    def _read_items(self, pieces: Pieces, out: Block) -> None:
        """Read one item per file, many at a time."""

        def read(numbered: tuple[int, tuple[File, int, int]]) -> list[BadFile]:
            number, (file, _, _) = numbered
            return self._try_item(file, out[number : number + 1])

        with ThreadPoolExecutor(1 if self.root.is_local else _THREADS) as pool:
            found = pool.map(read, enumerate(pieces.files(self.root)))
            require_none([problem for problems in found for problem in problems])

    def _try_item(self, file: File, row: Block) -> list[BadFile]:
        """Read the one item of a file, and return what is wrong with it: the files after it may be bad, too."""
        try:
            self._read_item(file, row)
        except BadFile as error:
            return [error]
        return []

    def _read_item(self, file: File, row: Block) -> None:
        """Read the one item of a file into ``row``, shape (1, n_features)."""
        if file.size == self.model.size and self.model.plain and not self.root.is_local:  # most likely by one request
            data = memoryview(file.read())
            if data[: self.model.offset] == self.model.text:
                row.data.cast("B")[:] = data[self.model.offset :]
                return
        self.read_file(file, 0, row)


def _read_columns(file: File, header: Header, first: int, out: Block) -> None:
    """Read rows of a file in which the values of each feature lie together, by one read for each feature."""
    rows, size = header.shape[0], out.itemsize
    features = np.arange(out.shape[1]).reshape(header.shape[1:]).ravel(order="F").tolist()

    def read(position: int) -> None:
        start = header.offset + (position * rows + first) * size
        column = np.empty(len(out), header.dtype)
        file.read_into(start, column.data.cast("B"))
        out[:, features[position]] = column

    with ThreadPoolExecutor(1 if file.root.is_local else _THREADS) as pool:
        list(pool.map(read, range(len(features))))
