"""A run of CI ends: what hangs is killed, and a process that dies ends the run with its test's name."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
# In place of make: processes in its group, in another group, and without a parent; all ignore SIGTERM.
MAKE = """#!/bin/bash
trap "" TERM
sleep 600 & echo $! >> "$PIDS"
setsid sleep 600 & echo $! >> "$PIDS"
(sleep 600 & echo $! >> "$PIDS")
touch "$PIDS.all"
"""


def start(folder: Path, last_line: str, limit: str) -> subprocess.Popen[str]:
    for name, content in (("make", MAKE + last_line), ("chromium", "")):
        (folder / name).write_text(content)
        (folder / name).chmod(0o755)
    env = {name: value for name, value in os.environ.items() if name != "LIGHTNING_BN_CI_RUN"}  # CI runs this test, too
    env |= {"PATH": f"{folder}:{env['PATH']}", "PIDS": str(folder / "pids"), "CI_LIMIT": limit}
    streams = {"text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([ROOT / ".ci" / "run"], env=env, **streams)  # type: ignore[call-overload, no-any-return]


def left(folder: Path) -> list[int]:
    pids = [int(pid) for pid in (folder / "pids").read_text().split()]
    assert len(pids) == 3
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


@pytest.mark.parametrize(
    ("last_line", "limit", "returncode"), [("wait", "2s", 137), ("exit 0", "60s", 0), ("exit 2", "60s", 2)]
)
def test_a_run_that_ends_or_is_killed_leaves_no_process(
    tmp_path: Path, last_line: str, limit: str, returncode: int
) -> None:
    run = start(tmp_path, last_line, limit)
    output, _ = run.communicate(timeout=60)
    assert run.returncode == returncode and left(tmp_path) == []
    assert ("killed after 2 s. A whole run may take 2s" in output) is ("killed after" in output) is (limit == "2s")


def test_a_run_that_is_ended_from_outside_leaves_no_process_behind(tmp_path: Path) -> None:
    run = start(tmp_path, "wait", limit="60s")
    while not (tmp_path / "pids.all").exists():
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    run.communicate(timeout=60)
    assert run.returncode == 143 and left(tmp_path) == []


@pytest.mark.parametrize("end", ["os.abort()", "ctypes.PyDLL(None).sleep(600)"], ids=["dies", "hangs with the GIL"])
def test_a_process_that_dies_or_hangs_ends_the_run_with_its_tests_name(tmp_path: Path, end: str) -> None:
    (tmp_path / "test_it.py").write_text(f"import ctypes, os\ndef test_bad(): {end}\ndef test_later(): pass\n")
    found = re.search(r"^NO_HANG := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    command = [sys.executable, "-m", "pytest", "-p", "xdist", "-n", "1", "--dist", "worksteal"]
    command += [*found[1].split(), "-o", "faulthandler_timeout=2", "test_it.py"]
    env = {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    env["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"  # a third of the time
    ran = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 1 and "1 failed in" in ran.stdout
    assert "crashed while running 'test_it.py::test_bad'" in ran.stdout
