"""Every kind of `.npy` file that was ever met: read as NumPy reads it, or refused with a reason, and never run."""

import gzip
import io
import itertools
import pickle
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cvae_dist.sources import BadFile
from cvae_dist.store.urls import Location
from tests.servers import Served, serve
from tests.sources import read_all, scan

ROWS = np.arange(35, dtype=np.float32).reshape(7, 5)
_OVERHEAD = 1_000_000  # bytes of Python objects of a client, whatever it reads


class Bomb:
    """Writes a file when it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def npy(array: np.ndarray, version: tuple[int, int] | None = None) -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, version, allow_pickle=True)
    return stream.getvalue()


def raw(text: str, data: bytes = ROWS.tobytes(), version: int = 1, length: int | None = None) -> bytes:
    """Return a file of a header as it is given."""
    end = (length if length is not None else len(text)).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + end + text.encode() + data


def said(shape: object = "(7, 5)", descr: object = "'<f4'", fortran: object = False, more: str = "") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran}, 'shape': {shape}, {more}}}\n"


def npz() -> bytes:
    stream = io.BytesIO()
    np.savez_compressed(stream, a=np.zeros((10_000, 1000)))
    return stream.getvalue()


ACCEPTED: dict[str, bytes] = {
    "version 1": npy(ROWS, (1, 0)),
    "version 2": npy(ROWS, (2, 0)),
    "version 3": npy(ROWS, (3, 0)),
    "no spaces in the header": raw(said().replace(" ", "")),
    "much padding": raw(said().rstrip() + 2000 * " " + "\n"),
    "Fortran order": npy(np.asfortranarray(ROWS)),
    "Fortran order, three axes": npy(np.asfortranarray(ROWS[:6].reshape(5, 3, 2))),
    "Fortran order, one axis": raw(said("(35,)", fortran=True)),
    "Fortran order, big-endian": npy(np.asfortranarray(ROWS.astype(">f4"))),
    "big-endian float32": npy(ROWS.astype(">f4")),
    "big-endian float64": npy(ROWS.astype(">f8")),
    "big-endian int16": npy(ROWS.astype(">i2")),
    **{f"type {code}": npy(ROWS.astype(code)) for code in ("f2", "f8", "i1", "u1", "i2", "u4", "i8", "u8")},
    "shape of Python 2": raw(said("(7L, 5L)")),
    "one vector": npy(ROWS[0]),
    "no rows": npy(np.zeros((0, 784), np.float32)),
}  # fmt: skip

# what is in the file, and why it is refused
REFUSED: dict[str, tuple[bytes, str]] = {
    "version 4": (raw(said(), version=4), "header"),
    "structured type": (npy(np.zeros(7, [("a", "f4"), ("b", "i4")])), "dtype"),
    "gzip": (gzip.compress(npy(ROWS)), "header"),
    "HTML": (b"<html><body>404 Not Found</body></html>", "header"),
    "npz": (npz(), "header"),
    "no axis": (npy(np.array(3.0)), "shape"),
    "no columns": (npy(np.zeros((7, 0))), "shape"),
    "truncated data": (npy(ROWS)[:-1], "truncated"),
    "no data": (npy(ROWS)[: -ROWS.nbytes], "truncated"),
    "truncated header": (npy(ROWS)[:40], "header"),
    "magic only": (npy(ROWS)[:6], "header"),
    "empty": (b"", "header"),
    "trailing byte": (npy(ROWS) + b"\0", "size"),
    "two arrays": (npy(ROWS) + npy(ROWS), "size"),
    "negative shape": (raw(said("(-7, 5)")), "shape"),
    "two negative axes": (raw(said("(-7, -5)")), "shape"),
    "4 PiB": (raw(said(f"({2**50},)")), "truncated"),
    "4 PiB in Fortran order": (raw(said(f"(5, {2**48})", fortran=True)), "truncated"),
    "a product beyond 64 bits": (raw(said(f"({2**40}, {2**40})")), "truncated"),
    "a product of 2**64": (raw(said(f"({2**32}, {2**32})", "'|u1'"), b""), "truncated"),
    "an axis beyond 64 bits": (raw(said(f"({2**70}, 0, 5)"), b""), "shape"),
    "header of 200 kB": (raw(said().rstrip() + 200_000 * " " + "\n", version=2), "header"),
    "header of 4 GiB": (raw(said(), version=2, length=2**32 - 1), "header"),
    "one more key": (raw(said(more="'more': 1, ")), "header"),
    "a missing key": (raw("{'descr': '<f4', 'shape': (7, 5), }\n"), "header"),
    "a list of keys": (raw("['descr', 'fortran_order', 'shape']\n"), "header"),
    "deep nesting": (raw(said(1500 * "(" + 1500 * ")")), "header"),
    "code": (raw(said("__import__('os').getcwd()")), "header"),
    "shape of a number": (raw(said("35")), "header"),
    "shape of floats": (raw(said("(7.0, 5.0)")), "header"),
    "shape of truths": (raw(said("(True, 35)")), "shape"),
    "order of a number": (raw(said(fortran=1)), "header"),
    "no such type": (raw(said(descr="'<f3'")), "header"),
    "not UTF-8": (raw(said(), version=3).replace(b"descr", b"\xff\xfescr"), "header"),
    "float128": (npy(ROWS.astype(np.longdouble)), "dtype"),
    "complex": (npy(ROWS.astype(np.complex64)), "dtype"),
    "date": (npy(ROWS.astype("M8[s]")), "dtype"),
    "time": (npy(ROWS.astype("m8[s]")), "dtype"),
    "bytes": (npy(ROWS.astype("S4")), "dtype"),
    "text": (npy(ROWS.astype("U4")), "dtype"),
    "void": (npy(ROWS.view("V4")), "dtype"),
    "truth": (npy(ROWS > 2), "dtype"),
    "a type with axes": (raw(said("(7,)", "('<f4', (5,))")), "dtype"),
}  # fmt: skip

# what a second file is refused for, beside rows of five float32
UNLIKE: dict[str, tuple[bytes, str]] = {
    "other shape": (npy(ROWS[:, :4].copy()), "shape"),
    "more axes": (npy(ROWS.reshape(7, 5, 1)), "shape"),
    "other type": (npy(ROWS.astype(np.float64)), "dtype"),
    "other type of the same size": (npy(ROWS.astype(np.int32)), "dtype"),
}  # fmt: skip


@pytest.fixture(scope="module")
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bomb") / "it was run"


@pytest.fixture(scope="module")
def bombs(bomb: Path) -> dict[str, tuple[bytes, str]]:
    array = np.full(7, Bomb(str(bomb)), object)
    structured = np.array([(1, Bomb(str(bomb)))], [("a", "i4"), ("b", object)])
    return {
        "objects": (npy(array), "dtype"),
        "objects in a structure": (npy(structured), "dtype"),
        "a pickle": (pickle.dumps(Bomb(str(bomb))), "header"),
    }


@pytest.fixture(scope="module", params=["local", "weed"])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, bombs: dict[str, tuple[bytes, str]]
) -> Callable[[str], Any]:
    """Return what opens a case by its name, on a disk or in an object store."""
    folder = str(tmp_path_factory.mktemp("cases"))
    served = serve("weed") if request.param == "weed" else Served(folder, {}, {})
    files = {f"{name}/b.npy": data for name, data in ACCEPTED.items()}
    files |= {f"{name}/b.npy": data for name, (data, _) in itertools.chain(REFUSED.items(), bombs.items())}
    files |= {f"{name}/b.npy": data for name, (data, _) in UNLIKE.items()}
    files |= {f"{name}/a.npy": npy(ROWS) for name in UNLIKE}
    root = Location.of(served.url, served.options)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda path: (root / path).write(files[path]), files))
    return lambda name: scan(f"{served.url}/{name}", served.options)


def test_there_are_as_many_as_were_met(bombs: dict[str, tuple[bytes, str]]) -> None:
    assert len({*ACCEPTED, *REFUSED, *UNLIKE, *bombs}) >= 47


@pytest.mark.filterwarnings("ignore:Reading `.npy` or")  # of Python 2
@pytest.mark.parametrize("name", ACCEPTED)
def test_it_is_read_as_numpy_reads_it(found: Callable[[str], Any], name: str) -> None:
    expected = np.load(io.BytesIO(ACCEPTED[name]))
    reader, pieces = found(name)
    rows = read_all(reader, pieces)
    assert rows.dtype == expected.dtype.newbyteorder("=")
    one = reader.schema.one_per_file
    np.testing.assert_array_equal(rows, expected.reshape(1 if one else len(expected), reader.schema.n_features))


@pytest.mark.parametrize("name", [*REFUSED, *UNLIKE, "objects", "objects in a structure", "a pickle"])
def test_it_is_refused_with_a_reason(
    found: Callable[[str], Any], bombs: dict[str, tuple[bytes, str]], bomb: Path, name: str
) -> None:
    data, code = {**REFUSED, **UNLIKE, **bombs}[name]
    tracemalloc.start()
    try:
        with pytest.raises(BadFile) as caught:
            found(name)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (caught.value.path, caught.value.code) == ("b.npy", code), caught.value.detail
    assert "allow_pickle" not in caught.value.detail
    assert peak < len(data) + _OVERHEAD
    assert not bomb.exists()
