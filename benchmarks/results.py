"""RESULTS.md: one section a claim and device, written wholly by code; what is not measured again stays as it is."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

import torch

HEAD = """# Benchmarks

Written by `make bench` (`python -m benchmarks`); not edited by hand. Each section says what is claimed, what was
measured, when, on what and how. A section that was not measured again keeps its older figures.
"""
_SECTION = re.compile(r"<!-- (\S+) -->\n(.*?)<!-- end -->", re.DOTALL)


def update(path: Path, sections: Mapping[str, str]) -> None:
    """Put sections into the file, in the place of those of the same name, and keep the others."""
    kept = dict(_SECTION.findall(path.read_text())) if path.exists() else {}
    parts = [f"<!-- {name} -->\n{text.strip()}\n<!-- end -->\n" for name, text in sorted({**kept, **sections}.items())]
    path.write_text("\n".join([HEAD, *parts]))


def machine(device: str) -> str:
    """What the figures were taken on, in one line."""
    cores = f"{_processor()}, {os.cpu_count()} cores"
    return f"{torch.cuda.get_device_name()} ({cores})" if device == "cuda" else cores


def versions(*packages: str) -> str:
    """Python, and the packages that matter."""
    return ", ".join([f"Python {platform.python_version()}", *(f"{name} {version(name)}" for name in packages)])


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    named = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return named[1] if named else platform.processor() or platform.machine()
