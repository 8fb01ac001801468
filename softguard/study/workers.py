"""Where the tasks of a study run: here, in processes of this machine, or on a Ray cluster.

One process, the one that was started, hands out all tasks, so that no two workers race for one. Workers of this machine end
with it, however it ends.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from functools import partial
from multiprocessing.connection import wait as wait_for
from typing import Any, NamedTuple

import torch

from softguard.errors import SoftguardError

Submit = Callable[[Callable[[], str]], "Future[str]"]


class Task(NamedTuple):
    """Something to run once all tasks called `needs` have ended well. `run` can be pickled."""

    name: str
    run: Callable[[], None]
    needs: tuple[str, ...] = ()


class Workers(NamedTuple):
    """How to start a task, and how many may be under way."""

    submit: Submit
    slots: int


def run_tasks(tasks: Sequence[Task], workers: Workers, told: Callable[[Task, str, int], None]) -> None:
    """Run all tasks, earlier ones first where both can.

    `told` gets each that has ended, with its error or "", and how many are not run because they need it.
    Raises SoftguardError if a worker died.
    """
    waiting, running = list(tasks), dict[Future[str], Task]()
    ended: set[str] = set()

    def end(task: Task, error: str) -> None:
        ended.add(task.name)
        told(task, error, drop(task) if error else 0)

    def drop(need: Task) -> int:
        own = [task for task in waiting if need.name in task.needs]
        for task in own:
            waiting.remove(task)
        return len(own) + sum(map(drop, own))

    try:
        while waiting or running:
            able = [task for task in waiting if ended.issuperset(task.needs)]
            for task in able[: workers.slots - len(running)]:
                waiting.remove(task)
                running[workers.submit(partial(_attempt, task.run))] = task
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                error = future.exception()
                if isinstance(error, BrokenProcessPool):
                    raise error
                # of a cluster, whose worker died more often than it tries again
                end(running.pop(future), _line(error) if error is not None else future.result())
    except BrokenProcessPool as error:  # of a result, or of a task that is handed out after a worker's death
        raise SoftguardError(
            "a worker died, perhaps for want of memory; the same command goes on, with fewer --workers if need be"
        ) from error


@contextmanager
def open_workers(count: int, ray_address: str | None = None, cores: int = 0) -> Iterator[Workers]:
    """`count` processes of this machine (1: this one), or a Ray cluster whose every cell takes `cores` (0: one).

    Processes share the cores of PyTorch evenly, and take a GPU each, in turn, where there are any.
    Raises SoftguardError if Ray is missing or there is no such cluster.
    """
    if ray_address is not None:
        with _cluster(ray_address, cores or 1) as workers:
            yield workers
    elif count == 1:
        yield Workers(_here, 1)
    else:
        with _processes(count) as workers:
            yield workers


def _attempt(run: Callable[[], None]) -> str:
    """Run, and give the line of an error, which a pickled exception would lose its type over; the other tasks go on."""
    try:
        run()
    except SoftguardError as error:
        return str(error)
    except Exception as error:  # such as torch.OutOfMemoryError of a GPU that is shared
        return _line(error)
    return ""


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"


def _here(run: Callable[[], str]) -> "Future[str]":
    future: Future[str] = Future()
    future.set_result(run())
    return future


@contextmanager
def _processes(count: int) -> Iterator[Workers]:
    context = multiprocessing.get_context("spawn")  # a fork of a process that has used torch's threads or CUDA hangs
    numbers = context.Queue()
    for number in range(count):
        numbers.put(number)
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(count, context, _begin, (numbers, max(1, torch.get_num_threads() // count), list(sys.path)))
    try:
        yield Workers(pool.submit, count)
    except BaseException:  # an interruption must not wait for cells to finish
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(multiprocessing.active_children()) - before:
            child.terminate()
        raise
    pool.shutdown()


def _begin(numbers: "multiprocessing.Queue[int]", threads: int, path: list[str]) -> None:
    """Set up a worker process before its first task."""
    number = numbers.get()
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))  # the parent speaks for all
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.path[:] = path
    torch.set_num_threads(threads)
    if torch.cuda.is_available():
        torch.cuda.set_device(number % torch.cuda.device_count())


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait_for([parent.sentinel])
    os._exit(1)  # a worker left alone would hold its cell's lock until the cell is done, then sleep for ever


def load_ray() -> Any:
    """The module Ray. Raises SoftguardError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise SoftguardError("--ray-address needs Ray; run: pip install ray") from error
    return ray


@contextmanager
def _cluster(address: str, cores: int) -> Iterator[Workers]:
    ray = load_ray()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # before Ray starts; it would report to its makers
    joined = not ray.is_initialized()
    if joined:
        try:
            ray.init(address=address, log_to_driver=False)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:200]
            raise SoftguardError(
                f"--ray-address {address}: no cluster could be joined ({reason}); give HOST:PORT, auto or local"
            ) from error
    run = ray.remote(num_cpus=cores, num_gpus=1 if ray.cluster_resources().get("GPU") else 0)(_on_cluster)
    where, path = os.getcwd(), list(sys.path)

    def submit(task: Callable[[], str]) -> "Future[str]":
        future: Future[str] = run.remote(task, where, path, cores).future()
        return future

    try:
        yield Workers(submit, sys.maxsize)  # Ray starts what the cluster has room for
    finally:
        if joined:
            ray.shutdown()


def _on_cluster(run: Callable[[], str], where: str, path: list[str], cores: int) -> str:
    """One task on a node of the cluster, which sees the folders of the machine that started the study."""
    try:
        os.chdir(where)
    except OSError:
        return f"{where} is not there on every node of the cluster; start the study in a folder that all nodes share"
    sys.path += [folder for folder in path if folder not in sys.path]
    torch.set_num_threads(cores)
    return run()
