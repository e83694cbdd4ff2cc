"""How a figure is measured and shown."""

import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

import rich.box
from rich.console import Console
from rich.table import Table


class Row(NamedTuple):
    """One figure: ``value`` must be at least ``bar`` (at most, where ``lower`` is better); ``goal`` is for later."""

    name: str
    value: float
    bar: float
    goal: float | None = None
    note: str = ""
    lower: bool = False

    @property
    def holds(self) -> bool:
        return self.value <= self.bar if self.lower else self.value >= self.bar


def alternate(repeats: int, *runs: Callable[[], float]) -> list[list[float]]:
    """Run A, B, A, B, ... and return what each returned, so that drift of the machine hits all alike."""
    results: list[list[float]] = [[] for _ in runs]
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
    table = Table(box=rich.box.SIMPLE, title=machine(), title_justify="left")
    for heading in ("figure", "value", "must be", "later", "", "note"):
        table.add_column(heading, justify="right" if heading in ("value", "must be", "later") else "left")
    good = True
    for row in rows:
        sign = "<=" if row.lower else ">="
        later = "" if row.goal is None else f"{sign} {row.goal:g}"
        verdict = "ok" if row.holds else "MISS"
        table.add_row(row.name, f"{row.value:.3g}", f"{sign} {row.bar:g}", later, verdict, row.note)
        good &= row.holds
    Console(width=160).print(table)
    return good
