"""Reads what `BNStatsMonitor` logged to an offline W&B run, a TensorBoard log or a CSVLogger's folder."""

import csv
import json
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from os import PathLike
from pathlib import Path
from typing import Any

from lightning_bn.tracking.drift import AGGREGATES, QUANTITIES

_RUN_KEYS = {"name": "display_name", "project": "project", "id": "run_id", "host": "host", "start": "start_time"}


@dataclass(frozen=True)
class Table:
    """A logged table. The first column of a table of layer names is ``index``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]


@dataclass(frozen=True)
class LoggedRun:
    """What a monitor logged in a run, by key; lists are in the order of logging."""

    about: dict[str, str]  # label -> text, printed at the top of the page
    scalars: dict[str, list[tuple[int, float]]] = field(default_factory=lambda: defaultdict(list))  # (step, value)
    images: dict[str, list[tuple[int, bytes]]] = field(default_factory=lambda: defaultdict(list))  # (step, PNG file)
    tables: dict[str, Table] = field(default_factory=dict)  # the last of each key


def read_run(path: str | PathLike[str]) -> LoggedRun:
    """Reads the run in a folder: an offline W&B run, a TensorBoard log, or a CSVLogger's; ValueError for any other."""
    folder = Path(path)
    readers = {
        "run-*.wandb (an offline W&B run)": _read_wandb,
        "events.out.tfevents.* (a TensorBoard log)": _read_tensorboard,
        "metrics.csv (a CSVLogger's folder)": _read_csv,
    }
    for kind, read in readers.items():
        if any(folder.glob(kind.split()[0])):
            return _only_monitors(read(folder))
    files = "no such folder" if not folder.is_dir() else ", ".join(sorted(p.name for p in folder.iterdir())[:8])
    raise ValueError(f"No run at {folder}: looked for {', '.join(readers)}, but found: {files or 'an empty folder'}.")


def _read_wandb(folder: Path) -> LoggedRun:
    run = LoggedRun({"logger": "W&B, offline run", "state": "still running, or interrupted"})
    for record in _wandb_records(folder):
        if "exit" in record:
            run.about["state"] = "finished"
        settings = record.get("run") or {}
        run.about.update({label: str(settings[key]) for label, key in _RUN_KEYS.items() if settings.get(key)})
        config = settings.get("config") or record.get("config") or {}
        for key, value in (config.get("update") or {}).items():
            if _is_ours(key) and isinstance(value, dict) and all(isinstance(about, dict) for about in value.values()):
                run.tables[key] = _names_table(value)
        _read_wandb_row(run, folder / "files", record.get("history", {}).get("item", {}))
    return run


def _read_wandb_row(run: LoggedRun, files: Path, item: Mapping[str, Any]) -> None:
    step = int(item.get("trainer/global_step", item.get("_step", 0)))
    for key, value in item.items():
        if not _is_ours(key):
            continue
        name, _, part = key.rpartition("._")  # a file is logged as several keys: its type, path, size, ...
        if part == "type" and value in ("images/separated", "image-file"):
            names = item.get(f"{name}.filenames") or [item[f"{name}.path"]]
            run.images[name] += [(step, (files / file).read_bytes()) for file in names]
        elif part == "type" and value == "table-file":
            table = json.loads((files / item[f"{name}.path"]).read_text(encoding="utf-8"))
            run.tables[name] = Table(table["columns"], table["data"])
        elif _is_number(value) and f"{key.rpartition('.')[0]}._type" not in item:
            run.scalars[key].append((step, float(value)))


def _wandb_records(folder: Path) -> Iterator[dict[str, Any]]:
    # Use W&B's command, because W&B 0.31 removed the Python reader of its files.
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(folder)]
    empty = True
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdout and process.stderr  # piped above
        for line in process.stdout:
            empty = False
            if '"type":"summary"' not in line[:60]:  # repeats every row of the history
                yield json.loads(line)
        message = process.stderr.read().strip()[-500:]
    if process.returncode or empty:
        raise ValueError(f"W&B cannot read the run at {folder}: {message or 'it is empty; is it still running?'}")


def _is_number(value: Any) -> bool:
    # W&B writes the numbers that JSON lacks as texts.
    return (isinstance(value, int | float) and not isinstance(value, bool)) or value in ("NaN", "Infinity", "-Infinity")


def _read_tensorboard(folder: Path) -> LoggedRun:
    try:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    except ImportError as error:
        text = f"{folder} is a TensorBoard log, and reading it needs tensorboard: pip install 'lightning-bn[report]'."
        raise ImportError(text) from error
    events = EventAccumulator(str(folder), size_guidance=dict.fromkeys(("scalars", "images", "tensors"), 0)).Reload()
    tags = events.Tags()
    start = datetime.fromtimestamp(events.FirstEventTimestamp(), timezone.utc)
    run = LoggedRun({"logger": "TensorBoard", "name": _name_of(folder), "start": f"{start:%Y-%m-%dT%H:%M:%SZ}"})
    for key in filter(_is_ours, tags["scalars"]):
        run.scalars[key] = [(event.step, event.value) for event in events.Scalars(key)]
    for key in filter(_is_ours, tags["images"]):
        run.images[key] = [(event.step, event.encoded_image_string) for event in events.Images(key)]
    for key in filter(_is_ours, tags["tensors"]):
        text = events.Tensors(key)[-1].tensor_proto.string_val
        if key.endswith("/text_summary") and text and text[0].startswith(b"|"):
            lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text[0].decode().splitlines()]
            columns, _, *rows = [[cell.strip().replace("\\|", "|") for cell in line] for line in lines]
            run.tables[key.removesuffix("/text_summary")] = Table(columns, rows)
    return run


def _read_csv(folder: Path) -> LoggedRun:
    run = LoggedRun({"logger": "CSVLogger", "name": _name_of(folder)})
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for key in filter(_is_ours, row):
                if row[key]:
                    run.scalars[key].append((int(row["step"]), float(row[key])))
    for path in (folder / "figures").rglob("*.png"):
        key, _, number = path.relative_to(folder / "figures").with_suffix("").as_posix().rpartition("-")
        if _is_ours(key) and number.isdigit():
            run.images[key].append((int(number), path.read_bytes()))
    for images in run.images.values():
        images.sort()
    for path in sorted((folder / "figures").rglob("bn*_layers.json")):
        run.tables[path.stem] = _names_table(json.loads(path.read_text(encoding="utf-8")))
    for path in sorted(folder.rglob("*.csv")):
        key = path.relative_to(folder).with_suffix("").as_posix()
        if _is_ours(key):
            with path.open(newline="", encoding="utf-8") as file:
                columns, *rows = [*csv.reader(file)] or [[]]
            run.tables[key] = Table(columns, rows)
    return run


def _only_monitors(run: LoggedRun) -> LoggedRun:
    """Removes what others logged under similar keys: a monitor's prefix is one under which aggregates were logged."""
    aggregates = re.compile(rf"(bn\w*)_agg/({'|'.join(AGGREGATES)})")
    prefixes = "|".join({match[1] for key in run.scalars if (match := aggregates.fullmatch(key))})
    ours = re.compile(rf"({prefixes})(_({'|'.join(('agg', *QUANTITIES))})/.+|/\w+|_layers)" if prefixes else r"(?!)")
    for part in (run.scalars, run.images, run.tables):
        for key in [key for key in part if not ours.fullmatch(key)]:
            del part[key]
    return run


def _is_ours(key: str | None) -> bool:
    return key is not None and key.startswith("bn")


def _name_of(folder: Path) -> str:
    return "/".join(folder.resolve().parts[-2:])


def _names_table(names: Mapping[str, Mapping[str, Any]]) -> Table:
    columns = list(dict.fromkeys(column for about in names.values() for column in about))
    ordered = sorted(names, key=lambda index: (len(index), index))  # as numbers, if they are some
    return Table(["index", *columns], [[index, *(names[index].get(c, "") for c in columns)] for index in ordered])
