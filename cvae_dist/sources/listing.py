"""Every file below a place, in order and in bounded memory: on a disk, in an object store, wherever fsspec reaches."""

import contextlib
import itertools
import os
import stat
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from cvae_dist.errors import InvalidInput, SourceNotFound
from cvae_dist.sources.file_table import Collected, FileTable, suffix
from cvae_dist.sources.files import Files, local_version
from cvae_dist.store.storage import Page
from cvae_dist.store.urls import Location

_BATCH = 10_000  # files that are looked at together

T = TypeVar("T")


def find_files(root: Location, suffixes: Collection[str]) -> tuple[Location, FileTable]:
    """List every file below ``root`` whose suffix is one of ``suffixes``, in lower case and with their dots.

    Hidden files and folders, whose names begin with a dot, are left out. On a disk links to folders are followed.
    ``root`` may also be one such file.

    Returns
    -------
    root : Location
        What the paths in the table are relative to: ``root``, or the folder of the one file.
    files : FileTable
        Empty where there is no such file; its ``kinds`` tell what there is.

    Raises
    ------
    SourceNotFound
        There is nothing at all.
    InvalidInput
        Something cannot be read, has a name that is not UTF-8, or is a link to a folder it lies in.
    StorageFailed
        The storage does not answer.
    """
    if root.is_local:
        return _find_local(root, suffixes)
    if suffix(root.path) in suffixes and root.is_file():  # before it is listed, for which HTTP would fetch it whole
        return _one(root, suffixes, root.size(), root.storage.version(root.path))
    found = Collected()
    for page in root.storage.pages(root.path):
        files = _visible(page)
        kinds = found.see(files.path.tolist())
        found.take(files[np.fromiter(map(suffixes.__contains__, kinds), bool, len(files))])
    table = found.finish()
    if not table.kinds and root.is_file():
        return _one(root, suffixes, root.size(), root.storage.version(root.path))
    if not table.kinds and not root.exists():
        raise _nothing(root)
    return root, table


def _find_local(root: Location, suffixes: Collection[str]) -> tuple[Location, FileTable]:
    if os.path.isdir(root.path):
        found = Collected()
        for paths in _batched(_walk(root.path)):
            kinds = found.see(_as_text(paths))
            wanted = list(itertools.compress(paths, map(suffixes.__contains__, kinds)))
            _require_text(root.path, wanted)
            found.take(_regular(root.path, wanted))
        return root, found.finish()
    if not os.path.isfile(root.path):
        raise _nothing(root)
    status = os.stat(root.path)
    return _one(root, suffixes, status.st_size, local_version(status))


def _one(root: Location, suffixes: Collection[str], size: int, version: str) -> tuple[Location, FileTable]:
    """Return the folder of one file, and the table with it, or without where it is of another kind."""
    folder, _, name = root.path.rpartition("/")
    table = FileTable.of(_files([name], [size], [version]))
    wanted = table if suffix(name) in suffixes else table.only(lambda path: False)
    return Location(root.storage, folder or "/" * root.is_local), wanted


def _nothing(root: Location) -> SourceNotFound:
    return SourceNotFound(f"there is no directory or file {root}. Nothing was written; mend the path")


def _files(paths: Sequence[str], sizes: Sequence[int], versions: Sequence[str]) -> Files:
    return Files(np.array(paths, object), np.array(sizes, np.int64), np.array(versions, object))


def _batched(values: Iterable[T]) -> Iterator[list[T]]:
    rest = iter(values)
    return iter(lambda: list(itertools.islice(rest, _BATCH)), [])


def _visible(page: Page) -> Files:
    """Return the files of a page without hidden ones, and without marks of folders: empty objects of consoles.

    Their names end in a slash, which obstore leaves away.
    """
    files = _files(*page)
    if "/." in "/" + "\0/".join(page.names):
        files = files[np.array(["/." not in f"/{name}" for name in files.path], bool)]
    if not files.size.all():
        sizes = files.size.tolist()
        real = [size > 0 or (suffix(name) and name[-1] != "/") for name, size in zip(files.path, sizes, strict=True)]
        files = files[np.array(real, bool)]
    return files


def _walk(root: str) -> Iterator[str]:
    """Yield the relative path of every file in order. What a folder holds is in memory while it is walked."""
    names, ways = _scan(root, _Way(os.path.realpath(root)))
    pending = [("", iter(names), ways)]
    while pending:
        prefix, rest, ways = pending[-1]
        for name in rest:
            if name in ways:
                names, below = _scan(f"{root}/{prefix}{name[:-1]}", ways[name])
                pending.append((prefix + name, iter(names), below))
                break
            yield prefix + name
        else:
            pending.pop()


def _scan(folder: str, way: "_Way") -> "tuple[list[str], dict[str, _Way]]":
    """Return the names in a folder, sorted, those of folders with a slash, and the way to each folder by its name."""
    names, ways = [], {}
    with _reading(folder), os.scandir(folder) as entries:
        for entry in entries:
            name = entry.name
            if name[0] == ".":
                continue
            if _is_folder(entry):
                name += "/"
                ways[name] = way.through(entry, folder)
            names.append(name)
    names.sort()
    return names, ways


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself, or where nobody may look
        return False


def _regular(root: str, paths: Iterable[str]) -> Files:
    """Return those paths that are regular files, or links that lead nowhere, with size and version."""
    regular, sizes, versions = list[str](), list[int](), list[str]()
    prefix = f"{root}/"
    with _reading(root):
        for path in paths:
            status = _status(prefix + path)
            if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
                regular.append(path)
                sizes.append(status.st_size)
                versions.append(local_version(status))
    return _files(regular, sizes, versions)


def _status(path: str) -> os.stat_result:
    """Return the status of a file; of a link that leads to none its own, so that it is a bad file like others."""
    try:
        return os.stat(path)
    except OSError:
        return os.lstat(path)


@contextlib.contextmanager
def _reading(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InvalidInput(
            f"{error.filename or folder} cannot be read: {error.strerror}. Nothing was written; "
            "mend or remove it and run the same command again"
        ) from error


@dataclass(frozen=True)
class _Way:
    """How a folder was reached: where the last link led, and from where to where it went between those before."""

    start: str
    before: tuple[tuple[str, str], ...] = ()

    def through(self, entry: "os.DirEntry[str]", folder: str) -> "_Way":
        """Return the way on, which is the same one unless the entry of a folder is a link."""
        if not entry.is_symlink():
            return self
        target = os.path.realpath(entry.path)
        parts = (*self.before, (self.start, os.path.realpath(folder)))
        if any(f"{target}/".startswith(f"{start}/") and f"{end}/".startswith(f"{target}/") for start, end in parts):
            raise InvalidInput(
                f"{entry.path} is a symbolic link to a directory it lies in, so the tree has no end. "
                "Nothing was written; remove the link"
            )
        return _Way(target, parts)


def _as_text(paths: list[str]) -> list[str]:
    """Return names that can be shown, also of files that are not wanted."""
    try:
        "".join(paths).encode()
    except UnicodeEncodeError:
        return [os.fsencode(path).decode(errors="replace") for path in paths]
    return paths


def _require_text(root: str, paths: Iterable[str]) -> None:
    """Refuse names that are not UTF-8: they become ids."""
    try:
        "\0".join(paths).encode()
    except UnicodeEncodeError as error:
        start = error.object.rfind("\0", 0, error.start) + 1
        name = os.fsencode(os.path.join(root, error.object[start:].split("\0", 1)[0]))
        raise InvalidInput(
            f"the name {name!r} is not UTF-8, so it cannot be an id. Nothing was written; rename it"
        ) from None
