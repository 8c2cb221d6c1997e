"""Run a function on several gloo ranks: real processes with a real process group, and no test that hangs.

The ranks are forked from a server process that has imported all of lightning_bn once (8 seconds), so starting them
takes about a second. They live for one call. The server keeps the environment it was started with.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from multiprocessing.connection import Client, Connection, Listener, wait
from pathlib import Path
from pkgutil import walk_packages
from typing import Any

import torch
import torch.distributed as dist

import lightning_bn

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload([module.name for module in walk_packages(lightning_bn.__path__, "lightning_bn.")])


def run_on_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``fn(*args)`` on ``world_size`` ranks at once and return what each returned, in the order of ranks.

    ``dist.get_rank()`` tells a rank who it is. A Trainer in ``fn`` finds the process group ready and starts nothing:
    ``Trainer(accelerator="cpu", devices=world_size, strategy="ddp")``.

    Args:
        fn: A function that can be pickled: of a module, not of a function.
        world_size: Number of ranks.
        args: Arguments, pickled; every rank gets the same.
        timeout: Seconds until the ranks are killed.

    Raises:
        RuntimeError: If a rank raised, died, or had nothing to say in time; with the tracebacks of those that raised.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = pickle.dumps((fn, args))
        ranks, reports = [], []
        for rank in range(world_size):
            report, to_report = _CONTEXT.Pipe(duplex=False)
            process = _CONTEXT.Process(target=_rank, args=(rank, world_size, folder, timeout, task, to_report))
            process.start()
            to_report.close()
            ranks.append(process)
            reports.append(report)
        deadline = time.monotonic() + timeout
        try:
            outcomes = _collect(reports, deadline)
            for process in ranks:
                process.join(max(deadline - time.monotonic(), 1))
        finally:
            for process in ranks:
                process.kill()
                process.join()
    if any(error for error, _ in outcomes):
        raise RuntimeError("\n".join(f"rank {rank}: {error}" for rank, (error, _) in enumerate(outcomes) if error))
    return [result for _, result in outcomes]


@contextmanager
def ranks_at_hand(world_size: int) -> Iterator[Callable[..., list[Any]]]:
    """Ranks that stay, for many small calls: ``call(fn, *args)`` is what `run_on_ranks` does, in milliseconds."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(1) as pool:
        address = str(Path(folder) / "calls")
        with Listener(address, "AF_UNIX") as listener:
            ended = pool.submit(run_on_ranks, _serve, world_size, address)
            connections = dict(_introduced(listener.accept()) for _ in range(world_size))

            broken: list[str] = []

            def call(fn: Callable[..., Any], *args: Any) -> list[Any]:
                task = pickle.dumps((fn, args))  # plainly: the ranks' own pickler would share tensors' memory
                if not broken:
                    for connection in connections.values():
                        connection.send_bytes(task)
                    found = [pickle.loads(connections[rank].recv_bytes()) for rank in range(world_size)]
                    broken.extend(f"rank {rank}: {error}" for rank, (error, _) in enumerate(found) if error)
                if broken:  # for good: the ranks are gone
                    raise RuntimeError("\n".join(broken))
                return [result for _, result in found]

            try:
                yield call
            finally:
                if not broken:
                    for connection in connections.values():
                        connection.send_bytes(pickle.dumps(None))
                    ended.result()


def _introduced(connection: Connection) -> tuple[int, Connection]:
    return connection.recv(), connection


def _serve(address: str) -> None:
    with Client(address, "AF_UNIX") as connection:
        connection.send(dist.get_rank())
        while (task := pickle.loads(connection.recv_bytes())) is not None:
            fn, args = task
            try:
                connection.send_bytes(pickle.dumps((None, fn(*args))))
            except BaseException:
                connection.send_bytes(pickle.dumps((traceback.format_exc(), None)))
                raise  # so that the others do not wait


def _collect(reports: list[Connection], deadline: float) -> list[tuple[str | None, Any]]:
    """What each rank reports: an error or a result."""
    outcomes: dict[Connection, tuple[str | None, Any]] = {}
    while missing := [report for report in reports if report not in outcomes]:
        ready = wait(missing, deadline - time.monotonic())
        for report in ready or missing:
            try:
                outcomes[report] = pickle.loads(report.recv_bytes()) if ready else ("nothing in time", None)
            except EOFError:
                outcomes[report] = ("died", None)
    return [outcomes[report] for report in reports]


def _rank(rank: int, world_size: int, folder: str, timeout: float, task: bytes, report: Connection) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)  # what tells Lightning that the processes are there already
    try:
        dist.init_process_group(
            "gloo",
            init_method=(Path(folder) / "store").as_uri(),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout / 2),
        )
        fn, args = pickle.loads(task)
        torch.manual_seed(0)
        outcome = pickle.dumps((None, fn(*args)))
        dist.barrier()  # whoever is done first must not take the store away from the others
    except BaseException:
        outcome = pickle.dumps((traceback.format_exc(), None))
    report.send_bytes(outcome)
