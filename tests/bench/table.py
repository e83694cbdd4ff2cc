"""How a figure is measured and shown."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

T = TypeVar("T")


class Row(NamedTuple):
    """One figure: ``value`` must be at least ``bar`` (at most, where ``lower`` is better); ``goal`` is for later.

    Without a bar it is there to be compared. A ``value`` that is not a number was not measured, and ``note`` says why.
    """

    name: str
    value: float
    bar: float | None
    goal: float | None = None
    note: str = ""
    lower: bool = False
    reference: str = ""

    @property
    def holds(self) -> bool:
        if self.bar is None:
            return True
        return self.value <= self.bar if self.lower else self.value >= self.bar


def alternate(repeats: int, *runs: Callable[[], T]) -> list[list[T]]:
    """Run A, B, A, B, ... and return what each returned, so that drift of the machine hits all alike."""
    results: list[list[T]] = [[] for _ in runs]
    for _ in range(repeats):
        for run, result in zip(runs, results, strict=True):
            result.append(run())
    return results


def seconds(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> float:
    """Return how long ``run`` takes."""
    began = clock()
    run()
    return clock() - began


def median(values: Iterable[float]) -> float:
    return statistics.median(values)


def machine() -> str:
    """Return one line that says where the figures come from."""
    with open("/proc/cpuinfo") as file:
        model = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), "?")
    return (
        f"{model}, {os.cpu_count()} CPUs, {platform.system()} {platform.release()}, Python {platform.python_version()}"
    )


def show(rows: Iterable[Row]) -> bool:
    """Print rows as they come and return whether all of them hold."""
    print(machine())
    _print("figure", "value", "must be", "", "later, reference, notes")
    good = True
    for row in rows:
        sign = "<=" if row.lower else ">="
        later = "" if row.goal is None else f"later {sign} {row.goal:g}"
        beside = "; ".join(filter(None, (later, row.reference and f"reference {row.reference}", row.note)))
        verdict = "ok" if row.holds else "MISS" if row.value == row.value else "not measured"
        bar, verdict = ("", "") if row.bar is None else (f"{sign} {row.bar:g}", verdict)
        _print(row.name, f"{row.value:.4g}", bar, verdict, beside)
        good &= row.holds
    return good


def _print(name: str, value: str, bar: str, verdict: str, beside: str) -> None:
    print(f"{name:<72} {value:>9} {bar:>10}  {verdict:<4}  {beside}", flush=True)
