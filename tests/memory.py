"""By how much a process grows; to be asked of a rank, for it changes how the process takes its memory."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

_M_MMAP_THRESHOLD = -3


def growth(run: Callable[[], Any], *, of_its_own: int = 2**20) -> float:
    """MiB by which this process grows at most while ``run`` runs. Linux and glibc only.

    Args:
        run: What is measured. What is loaded once should have been loaded.
        of_its_own: From this many bytes on glibc gives a tensor pages of its own and takes them back; by itself it
            keeps up to 64 MiB.
    """
    assert ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, of_its_own)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM, the most there was, starts from now
    before = _status("VmRSS")
    run()
    return _status("VmHWM") - before


def _status(key: str) -> float:
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024
