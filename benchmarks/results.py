"""RESULTS.md: one section per claim and device; sections that are not measured again stay as they are."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

HEAD = """# Benchmarks

Written by `make bench` (`python -m benchmarks`), not by hand. Each section has a claim, the measurements, the date,
the machine and the method. Sections are replaced when they are measured again: each is of the code of its date, and
uses the argument names of that date.
"""
_SECTION = re.compile(r"<!-- (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def update(path: Path, sections: Mapping[str, str]) -> None:
    """Replaces sections of the same name in the file, and keeps the others."""
    kept = dict(_SECTION.findall(path.read_text())) if path.exists() else {}
    parts = [f"<!-- {name} -->\n{text.strip()}\n<!-- end -->\n" for name, text in sorted({**kept, **sections}.items())]
    path.write_text("\n".join([HEAD, *parts]))


def machine(device: str) -> str:
    """Describes the machine in one line."""
    cores = f"{_processor()}, {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name()} ({cores})" if device == "cuda" else cores


def versions(*packages: str) -> str:
    """Versions of Python and of packages."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
