"""How many threads torch computes with. No other module changes that number.

Hidden state: the number itself. Whoever owns the process changes it, for a while; a task on a worker never does.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch


@contextlib.contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch compute with ``count`` threads in this thread, and in those that begin while the context lasts."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # also for threads that begin later: they take the number that was set last


@contextlib.contextmanager
def one_thread_each() -> Iterator[int]:
    """Let torch compute with one thread in every thread, and give the number of these that use the processor fully."""
    threads = torch.get_num_threads()
    with torch_threads(1) if threads > 1 else contextlib.nullcontext():  # a worker has one: its tasks change nothing
        yield threads


def side_by_side(work: Callable[[slice], None], parts: Sequence[slice]) -> None:
    """Do ``work`` on each of ``parts``, as many at a time as torch has threads, each of them with one thread.

    Torch itself would divide every operation among its threads, which wait for one another at its end. Where another
    process takes a core, that is ten times slower. It would also let results depend on the number of threads.

    The work sees the context variables and the inference mode of the caller. An error in it is raised here.
    """
    with one_thread_each() as threads:
        if threads == 1 or len(parts) < 2:
            for part in parts:
                work(part)
        else:
            _in_a_pool(threads, _in_this_context(work), parts)


def _in_a_pool(threads: int, work: Callable[[slice], None], parts: Sequence[slice]) -> None:
    # oneDNN asks OpenMP for the number, which a new thread does not have from torch yet
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for done in [pool.submit(work, part) for part in parts]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or an interrupt nothing more is begun


def _in_this_context(work: Callable[[slice], None]) -> Callable[[slice], None]:
    """Return ``work`` with the context variables and the inference mode that this thread has now."""
    context, mode = contextvars.copy_context(), torch.is_inference_mode_enabled()

    def inherited(part: slice) -> None:
        with torch.inference_mode(mode):
            context.copy().run(work, part)

    return inherited
