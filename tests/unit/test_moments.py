"""Moments against NumPy in float64, whatever the dtype, the width and the offset."""

from unittest import mock

import numpy as np
import pytest

from cvae_dist.store import Moments, compiled
from cvae_dist.store.moments import STATISTICS, RunningMoments

FLOATS = ["f2", "f4", "f8"]
INTEGERS = ["i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8"]


def assert_close(moments: Moments, block: np.ndarray, rtol: float = 1e-12) -> None:
    exact = block.astype(np.float64)
    assert moments.count == len(block)
    np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=rtol, atol=1e-14 * np.abs(exact).max())
    np.testing.assert_allclose(moments.std, exact.std(0), rtol=1e-9, atol=1e-12 * (1 + np.abs(exact).max()))
    np.testing.assert_array_equal(moments.minimum, exact.min(0))
    np.testing.assert_array_equal(moments.maximum, exact.max(0))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (3, 5), (1025, 3), (5000, 1), (700, 513), (3, 200_000)])
def test_of_a_block(dtype: str, shape: tuple[int, int]) -> None:
    generator = np.random.default_rng(0)
    values = generator.normal(3, 20, shape) if dtype in FLOATS else generator.integers(0, 120, shape)
    block = values.astype(dtype)
    assert_close(Moments.of(block), block, 1e-11)


@pytest.mark.parametrize("dtype", ["f4", "f8", "i8"])
def test_variance_survives_a_large_offset(dtype: str) -> None:
    noise = np.random.default_rng(1).normal(0, 16, (40_000, 3))
    block = (noise + 1e8).astype(dtype)
    exact = (block.astype(np.float64) - 1e8).std(0)
    np.testing.assert_allclose(Moments.of(block).std, exact, rtol=1e-9)
    parts = [Moments.of(part) for part in np.array_split(block, 7)]
    total = Moments.empty(3)
    for part in parts:
        total = total.merge(part)
    np.testing.assert_allclose(total.std, exact, rtol=1e-9)


def test_half_precision_is_exact_to_its_last_subnormal() -> None:
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    for block in (finite[:, None], finite.reshape(-1, 8), finite[:1000, None], np.float16([[-0.0], [6e-8]])):
        exact = block.astype(np.float64)
        moments = Moments.of(block)
        np.testing.assert_array_equal(moments.minimum, exact.min(0))
        np.testing.assert_array_equal(moments.maximum, exact.max(0))
        np.testing.assert_allclose(moments.mean, exact.mean(0), rtol=1e-12, atol=1e-11)
        np.testing.assert_allclose(moments.std, exact.std(0), rtol=1e-12)
        assert moments.is_finite


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 600, 4999])
def test_one_bad_value_is_noticed(dtype: str, bad: float, row: int) -> None:
    block = np.ones((5000, 3), dtype)
    assert Moments.of(block).is_finite
    block[row, 1] = bad
    assert not Moments.of(block).is_finite


def test_both_infinities_in_one_column_are_noticed() -> None:
    assert not Moments.of(np.array([[np.inf], [-np.inf], [1.0]])).is_finite


def test_values_whose_square_overflows_are_noticed() -> None:
    assert not Moments.of(np.array([[1e200], [-1e200]])).is_finite
    assert not Moments.of(np.full((3, 1), 1.7e308)).is_finite


def test_a_constant_has_no_variance() -> None:
    for value in (0.1, 1e8 + 0.1, -3e-7):
        moments = Moments.of(np.full((10_001, 3), value, np.float32))
        assert (moments.std <= 1e-12 * abs(value)).all()
        assert (moments.minimum == moments.maximum).all()


def test_no_rows() -> None:
    empty = Moments.of(np.empty((0, 2), np.float32))
    assert empty.count == 0
    assert (empty.std == 0).all()
    some = Moments.of(np.array([[1.0, 2.0]]))
    for merged in (empty.merge(some), some.merge(empty)):
        assert merged.count == 1
        np.testing.assert_array_equal(merged.mean, [1, 2])


@pytest.fixture(params=["f2", "f4", pytest.param("f8", marks=pytest.mark.heavy), "u1", "i1"], scope="module")
def compiled_type(request: pytest.FixtureRequest) -> str:
    pytest.importorskip("numba")
    assert compiled._compile(request.param) is not None
    return str(request.param)


def by_numpy(block: np.ndarray) -> Moments:
    with mock.patch.dict(compiled._ready, dict.fromkeys(compiled._CODES)):
        return Moments.of(block)


def by_numba(block: np.ndarray) -> Moments:
    code = block.dtype.str[1:]
    with mock.patch.dict(compiled._ready, {code: compiled._compile(code)}):
        return Moments.of(block)


def bits(moments: Moments) -> list[bytes]:
    return [getattr(moments, name).tobytes() for name in STATISTICS]


SHAPES = [(1, 1), (1, 700), (3, 5), (5000, 1), (700, 513), (62_500, 8), (65 * 64, 8), (325, 768), (70, 5000)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (100, 1), (3, 20), (0, 1e-7), (-6e4, 10), (0, 0)])
def test_compiled_code_gives_the_same_bits(
    compiled_type: str, shape: tuple[int, int], offset: float, scale: float
) -> None:
    values = offset + scale * np.random.default_rng(0).normal(size=shape)
    if compiled_type not in FLOATS:
        values = 1000 * values % 251 - 128 * (compiled_type == "i1")
    block = values.astype(compiled_type)
    assert bits(by_numba(block)) == bits(by_numpy(block))


def test_compiled_code_sees_every_half() -> None:
    pytest.importorskip("numba")
    every = np.arange(2**16, dtype=np.uint16).view(np.float16)
    finite = every[np.isfinite(every)]
    for block in (finite[:, None], finite.reshape(-1, 8)):
        assert bits(by_numba(block)) == bits(by_numpy(block))
        assert_close(by_numba(block), block, 1e-11)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("row", [0, 600, 4999])
def test_compiled_code_notices_one_bad_value(compiled_type: str, bad: float, row: int) -> None:
    if compiled_type not in FLOATS:
        return
    block = np.ones((5000, 3), compiled_type)
    assert by_numba(block).is_finite
    block[row, 1] = bad
    assert not by_numba(block).is_finite


def test_zeros_have_no_sign() -> None:
    for dtype in FLOATS:
        for zeros in ([0.0, -0.0], [-0.0, 0.0], [-0.0, -0.0]):
            moments = Moments.of(np.array(zeros, dtype)[:, None])
            assert not np.signbit([moments.minimum, moments.maximum]).any()


def test_what_is_not_aligned_or_contiguous_is_added(compiled_type: str) -> None:
    block = (np.random.default_rng(0).random((5000, 6)) * 99).astype(compiled_type)
    odd = np.frombuffer(b"-" + block.tobytes(), np.uint8)[1:].view(compiled_type).reshape(block.shape)
    assert bits(by_numba(odd)) == bits(by_numba(block))
    assert bits(by_numba(block[::2, 1:4])) == bits(by_numba(block[::2, 1:4].copy()))
    assert bits(by_numba(block.astype(block.dtype.newbyteorder(">")))) == bits(by_numba(block))


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS)
def test_blocks_one_after_the_other(dtype: str) -> None:
    generator = np.random.default_rng(0)
    block = (
        generator.normal(50, 2, (20_000, 7)) if dtype in FLOATS else generator.integers(0, 99, (20_000, 7))
    ).astype(dtype)
    running = RunningMoments(7, block.dtype)
    for start in range(0, len(block), 3000):
        running.add(block[start : start + 3000])
    assert_close(running.moments(), block, 1e-11)


def test_sums_of_small_integers_are_exact() -> None:
    for dtype, low, high in (("u1", 0, 256), ("i1", -128, 128), ("u1", 250, 256)):
        block = np.random.default_rng(0).integers(low, high, (100_000, 3)).astype(dtype)
        wide = block.astype(np.int64)
        moments = Moments.of(block)
        np.testing.assert_allclose(moments.mean, wide.sum(0) / len(block), rtol=1e-15)
        wide -= low  # of numbers near zero the next line loses nothing
        exact = (wide**2).sum(0) - wide.sum(0) ** 2 / len(block)
        np.testing.assert_allclose(moments.m2, exact, rtol=1e-12)


def test_numba_is_only_imported_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    block = np.ones((4096, 8), np.float32)
    monkeypatch.setattr(compiled, "_ready", {})
    monkeypatch.setattr(compiled, "_seen", {})
    monkeypatch.setattr(compiled, "_WORTH_BYTES", 3 * block.nbytes)
    monkeypatch.setattr(compiled, "_compile", lambda code: made.append(code))  # there is none
    for _ in range(3):
        Moments.of(block)
    assert not made
    for _ in range(3):
        Moments.of(block)
    assert made == ["f4"]
