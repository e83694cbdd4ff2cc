"""What is found below a place on a disk and in memory; `integration/test_listing.py` asks real servers."""

import os
from pathlib import Path

import pytest

from cvae_dist.errors import InvalidInput, SourceNotFound
from cvae_dist.sources import listing
from cvae_dist.sources.file_table import FileTable
from cvae_dist.sources.listing import find_files
from cvae_dist.store import Location


def save(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())


def find(root: "Path | str", *suffixes: str) -> FileTable:
    location = Location.of(root)
    found, table = find_files(location, suffixes or (".npy",))
    assert found == location
    return table


def paths(table: FileTable) -> list[str]:
    return [path for batch in table.batches() for path in batch.path]


def test_a_tree_is_walked_in_order_and_links_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "_BATCH", 3)
    root = tmp_path / "root"
    names = ["b/x y.npy", "a.npy", "b/ä/日本.npy", "b/x-y.npy", "b.npy", "b-.npy", "B.NPY", "deep/1/2/3/4.npy"]
    save(root, *names, ".hidden.npy", ".cache/c.npy", "notes.txt", "b/data.npz", "b/README")
    save(tmp_path / "elsewhere", "far.npy")
    (root / "link").symlink_to(tmp_path / "elsewhere")
    (root / "file link.npy").symlink_to(tmp_path / "elsewhere" / "far.npy")
    os.mkfifo(root / "pipe.npy")
    table = find(root)
    assert paths(table) == sorted([*names, "link/far.npy", "file link.npy"], key=str.encode)
    (files,) = table.batches()
    for path, size, version in zip(files.path, files.size, files.version, strict=True):
        status = (root / path).stat()
        assert (size, version) == (status.st_size, str(status.st_mtime_ns))
    assert table.kinds == {
        ".npy": (len(names) + 3, "B.NPY"), ".txt": (1, "notes.txt"), ".npz": (1, "b/data.npz"), "": (1, "b/README"),
    }  # fmt: skip
    assert paths(find(root, ".npz", ".txt")) == ["b/data.npz", "notes.txt"]
    assert paths(find(f"{root}/")) == paths(table)


def test_links_that_lead_nowhere_or_round(tmp_path: Path) -> None:
    save(tmp_path, "a.npy")
    (tmp_path / "dangling.npy").symlink_to(tmp_path / "gone")
    assert paths(find(tmp_path)) == ["a.npy", "dangling.npy"]
    (tmp_path / "dangling.npy").unlink()
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "up").symlink_to(tmp_path)
    with pytest.raises(InvalidInput, match="up is a symbolic link to a directory it lies in"):
        find(tmp_path)


def test_a_folder_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, "a/b.npy")
    real = os.scandir

    def scandir(folder: str) -> object:
        if folder.endswith("/a"):
            raise PermissionError(13, "Permission denied", folder)
        return real(folder)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(InvalidInput, match="/a cannot be read: Permission denied. Nothing was written"):
        find(tmp_path)


def test_names_that_are_not_text(tmp_path: Path) -> None:
    save(tmp_path, "a.npy")
    os.link(tmp_path / "a.npy", os.fsencode(tmp_path) + b"/\xff.txt")
    assert find(tmp_path).kinds[".txt"] == (1, "\ufffd.txt")
    os.link(tmp_path / "a.npy", os.fsencode(tmp_path) + b"/\xff.npy")
    with pytest.raises(InvalidInput, match=r"xff\.npy' is not UTF-8"):
        find(tmp_path)


@pytest.mark.parametrize("kind", ["disk", "memory"])
def test_one_file_nothing_and_nothing_wanted(tmp_path: Path, kind: str) -> None:
    save(tmp_path, "tree/a.npy", "tree/b.txt")
    place = Location.of(tmp_path)
    if kind == "memory":
        place = Location.of(f"memory://{tmp_path}")
        for name in ("tree/a.npy", "tree/b.txt", "tree/.hidden"):
            (place / name).write(name.encode())
    root, table = find_files(place / "tree/a.npy", [".npy"])
    assert (root, paths(table)) == (place / "tree", ["a.npy"])
    whole = [batch for batch in find_files(place / "tree", [".npy"])[1].batches()][0]
    (single,) = table.batches()
    assert (single.size.tolist(), single.version.tolist()) == (whole.size.tolist(), whole.version.tolist())
    root, table = find_files(place / "tree/b.txt", [".npy"])
    assert (root, len(table), table.kinds) == (place / "tree", 0, {".txt": (1, "b.txt")})
    assert len(find_files(place / "tree", [".csv"])[1]) == 0
    with pytest.raises(SourceNotFound, match="there is no directory or file .*none. Nothing was written; mend"):
        find_files(place / "none", [".npy"])


def test_an_empty_folder(tmp_path: Path) -> None:
    table = find(tmp_path)
    assert (len(table), table.kinds) == (0, {})
