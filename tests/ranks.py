"""Run a function on several gloo ranks: real processes with a process group, and a timeout.

The ranks stay alive for the next call, which gets a new process group and fresh global state. They are forked from a
server process that has imported all of lightning_bn once (8 seconds), and what most tests import.
"""

import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from pkgutil import walk_packages
from threading import Thread
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

import lightning_bn

PRELOADED = ["pytest", "timm", *(module.name for module in walk_packages(lightning_bn.__path__, "lightning_bn."))]
_CONTEXT = multiprocessing.get_context("forkserver")
_ALL_DONE = "all ranks are done"


class _Rank(NamedTuple):
    process: BaseProcess
    pipe: Connection


_ranks: list[_Rank] = []  # live processes; the first is rank 0


def run_on_ranks(fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120) -> list[Any]:
    """Call ``fn(*args)`` on ``world_size`` ranks and return the results in the order of ranks.

    A Trainer in ``fn`` uses the existing process group:
    ``Trainer(accelerator="cpu", devices=world_size, strategy="ddp")``.

    Args:
        fn: A picklable function.
        world_size: Number of ranks.
        args: Picklable arguments, the same on every rank.
        timeout: Seconds until the ranks are killed.

    Raises:
        RuntimeError: If a rank raised, died, or timed out; with the tracebacks.
    """
    while len(_ranks) < world_size:
        _ranks.append(_start(len(_ranks)))
    pipes = [rank.pipe for rank in _ranks[:world_size]]
    task = pickle.dumps((fn, args))  # multiprocessing's own pickler would share the memory of tensors
    deadline = time.monotonic() + timeout
    with tempfile.TemporaryDirectory() as folder:
        try:
            results = _ask(pipes, (world_size, folder, timeout, task), deadline)
            _ask(pipes, _ALL_DONE, deadline)
        except BaseException:  # some ranks may wait for one that died
            end_ranks(max(deadline - time.monotonic(), 1))
            raise
    return results


def end_ranks(timeout: float = 10) -> None:
    """End all ranks, and kill those that still run after ``timeout`` seconds. The next call starts new ones."""
    deadline = time.monotonic() + timeout
    for rank in _ranks:
        rank.pipe.close()
    for rank in _ranks:
        rank.process.join(max(deadline - time.monotonic(), 0))
        rank.process.kill()
        rank.process.join()
    _ranks.clear()


def processes() -> set[BaseProcess]:
    """The processes of the live ranks."""
    return {rank.process for rank in _ranks}


def start_anew() -> None:
    """Set the global state that every test begins with, in any process."""
    torch.set_num_threads(1)  # the suite runs on two cores, ranks included
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # all compiled models of one process share a limit of recompilations
        torch._dynamo.reset()


def _start(rank: int) -> _Rank:
    _CONTEXT.set_forkserver_preload(PRELOADED)  # only the first call has an effect
    pipe, of_rank = _CONTEXT.Pipe()
    process = _CONTEXT.Process(target=_serve, args=(rank, of_rank))
    process.start()
    of_rank.close()
    return _Rank(process, pipe)


def _ask(pipes: list[Connection], message: Any, deadline: float) -> list[Any]:
    """Send ``message`` to the ranks, and receive the result of each."""
    for pipe in pipes:
        pipe.send(message)
    outcomes: dict[Connection, tuple[str | None, Any]] = {}
    while missing := [pipe for pipe in pipes if pipe not in outcomes]:
        ready = wait(missing, max(deadline - time.monotonic(), 0))
        for pipe in ready or missing:
            try:
                outcomes[pipe] = pickle.loads(pipe.recv_bytes()) if ready else ("nothing in time", None)
            except (EOFError, ConnectionError):
                outcomes[pipe] = ("died", None)
    errors = [f"rank {rank}: {outcomes[pipe][0]}" for rank, pipe in enumerate(pipes) if outcomes[pipe][0]]
    if errors:
        raise RuntimeError("\n".join(errors))
    return [outcomes[pipe][1] for pipe in pipes]


# ------------------------------------------------------------------------------------------------------ on the ranks
def _serve(rank: int, pipe: Connection) -> None:
    """Run tasks until the pipe closes or one fails; then this process ends, which other ranks notice."""
    Thread(target=_end_with_the_tests, daemon=True).start()
    os.environ["LOCAL_RANK"] = str(rank)  # Lightning then starts no processes
    environment, error = dict(os.environ), None
    while error is None:
        try:
            message = pipe.recv()
        except EOFError:
            return
        os.environ.clear()
        os.environ.update(environment)
        error, outcome = _answer(rank, message)
        pipe.send_bytes(outcome if error is None else pickle.dumps((error, None)))


def _end_with_the_tests() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _answer(rank: int, message: Any) -> tuple[str | None, bytes]:
    """Return an error, or the pickled result."""
    try:
        with warnings.catch_warnings():  # also resets the warnings that come once
            return None, pickle.dumps((None, _end_group() if message == _ALL_DONE else _call(rank, *message)))
    except BaseException:
        return traceback.format_exc(), b""


def _call(rank: int, world_size: int, folder: str, timeout: float, task: bytes) -> Any:
    start_anew()
    random.seed(0)
    np.random.seed(0)
    torch.set_default_dtype(torch.float32)
    torch.set_grad_enabled(True)
    torch.use_deterministic_algorithms(False)
    dist.init_process_group(
        "gloo",
        init_method=(Path(folder) / "store").as_uri(),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout / 2),
    )
    fn, args = pickle.loads(task)
    return fn(*args)


def _end_group() -> None:
    """Close the sockets. A rank that is still in a collective would fail, so all ranks must be done."""
    dist.destroy_process_group()


def in_a_fresh_process(fn: Callable[[], Any], timeout: float = 120) -> Any:
    """Call ``fn`` in a process that no test has run in.

    torch refuses a backward in a fork of a process whose autograd has threads.
    """
    with ProcessPoolExecutor(1, mp_context=_CONTEXT) as pool:
        return pool.submit(fn).result(timeout)
