"""map_regions in this process: lazy, bounded, in one piece when something fails."""

import itertools
import threading
import time
from collections.abc import Iterator

import pytest

from cvae_dist.cluster import map_regions


def square(number: int) -> int:
    return number * number


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_every_task_once(threads: int, count: int) -> None:
    assert sorted(map_regions(square, range(count), threads=threads)) == [n * n for n in range(count)]


@pytest.mark.parametrize("threads", [1, 3])
def test_tasks_are_taken_lazily(threads: int) -> None:
    taken = 0

    def tasks() -> Iterator[int]:
        nonlocal taken
        for number in itertools.count():
            taken += 1
            yield number

    results = map_regions(square, tasks(), threads=threads)
    assert taken == 0
    for done in range(1, 20):
        next(results)
        assert taken <= done + 2 * threads
    results.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_comes_out_and_nothing_runs_on(threads: int) -> None:
    ran = []

    def fail(number: int) -> int:
        ran.append(number)
        if number == 4:
            raise ZeroDivisionError("task 4")
        time.sleep(0.001)
        return number

    with pytest.raises(ZeroDivisionError, match="task 4"):
        list(map_regions(fail, range(1000), threads=threads))
    count = len(ran)
    assert count <= 5 + 2 * threads
    time.sleep(0.02)
    assert len(ran) == count
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("region")]


def test_closing_waits_for_what_runs() -> None:
    finished = []

    def slow(number: int) -> int:
        time.sleep(0.01)
        finished.append(number)
        return number

    results = map_regions(slow, range(100), threads=2)
    next(results)
    results.close()
    count = len(finished)
    time.sleep(0.05)
    assert len(finished) == count < 10


def test_an_error_of_the_tasks_themselves_comes_out() -> None:
    def tasks() -> Iterator[int]:
        yield 1
        raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        list(map_regions(square, tasks(), threads=2))
