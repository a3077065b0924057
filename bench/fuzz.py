"""Corrupt what the commands read, one byte or one field at a time: each must end in a result or in one line.

python bench/fuzz.py [CASES] [SEED]        (2,000 cases of seed 0 if none are given; an hour on one thread)

A small pipeline, a dataset of every kind with pictures of every format, a config, a run and an interrupted run are made
on the spot. A case changes one file of them at random, runs in this process a command that reads it, and puts the file
back. It fails if the command raises, exits with another code than 0, 2 or 3, or takes more than 20 seconds. Figures go
to bench/results/fuzz.json; failures are printed with the seed that makes the case again.
"""

import contextlib
import io
import json
import os
import random
import shutil
import signal
import struct
import sys
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import yaml
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from PIL import Image
from rich.console import Console
from rich.progress import track

from ctrl_diffusion.commands.app import main as ctrl
from ctrl_diffusion.commands.jobs.train import train_job
from ctrl_diffusion.run.measure import Measurements
from ctrl_diffusion.system.progress import Interrupted

SECONDS = 20
CODES = (0, 2, 3)
FORMATS = {"png": "PNG", "jpg": "JPEG", "tif": "TIFF", "webp": "WEBP", "avif": "AVIF"}
ROWS = 44
# what a field may hold instead of what it should
VALUES = (
    None, True, -1, 0, 1, 3.5, 2**31, 2**63, 1e308, float("nan"), "", "x", "nan", "None", "../x", "\x00", "é" * 40,
    [], {}, [1], ["x", "y"], {"x": 1}, [[]],
)  # fmt: skip
CELLS = ("", '"', 'a"b', "x,y", "nan", "\x00", " 1.0 ", "../x.png", "é", "\t", "-")
SETTINGS = {
    "classifier": {"updates": 40, "head": "categorical", "grid": 1, "depth": 1},
    "learners": ["weighted"],
    "weighted": {"updates": 2, "batch": 8, "cache": 8, "renoising": 0},
    "evaluation": {"prior_samples": 16, "paths": 16, "probes": 1, "sweep_paths": 16},
    "steps": 2,
    "rank": 2,
    "checkpoint": 1,
}


@dataclass(frozen=True)
class Target:
    """Name a file, how it is corrupted, and the command that reads it."""

    file: str
    change: Callable[[bytes, random.Random], bytes]
    command: tuple[str, ...]
    copied: str = ""  # a folder that the command writes into: it runs on a copy


def change_byte(content: bytes, rng: random.Random) -> bytes:
    """Replace, remove or insert one byte, or cut the file off."""
    at, kind = rng.randrange(len(content)), rng.choice(("replace", "replace", "replace", "remove", "insert", "cut"))
    byte = bytes([rng.randrange(256)])
    if kind == "cut":
        return content[:at]
    return content[:at] + (b"" if kind == "remove" else byte) + content[at + (kind != "insert") :]


def change_field(value: Any, rng: random.Random) -> Any:
    """Return nested values with one of them replaced, removed, or under another name."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.9:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        out = value.copy()
        kind = rng.random()
        if kind < 0.75:
            out[key] = change_field(value[key], rng)
        elif kind < 0.9:
            del out[key]
        elif isinstance(value, dict):
            out[f"{key}_"] = out.pop(key)
        else:
            out.append(out[key])
        return out
    return rng.choice(VALUES)


def change_json(content: bytes, rng: random.Random) -> bytes:
    return json.dumps(change_field(json.loads(content), rng)).encode()


def change_yaml(content: bytes, rng: random.Random) -> bytes:
    return yaml.safe_dump(change_field(yaml.safe_load(content), rng), allow_unicode=True).encode()


def change_lines(content: bytes, rng: random.Random) -> bytes:
    """Change one row of JSON lines."""
    lines = content.splitlines(keepends=True)
    row = rng.randrange(len(lines))
    return b"".join([*lines[:row], change_json(lines[row], rng) + b"\n", *lines[row + 1 :]])


def change_cell(content: bytes, rng: random.Random) -> bytes:
    """Change one cell of a CSV file, or its separators."""
    rows = [line.split(",") for line in content.decode().splitlines()]
    row = rng.choice(rows)
    row[rng.randrange(len(row))] = rng.choice(
        ("", '"', 'a"b', "x,y", "nan", "\x00", " 1.0 ", "../x.png", "é", "\t", "-")
    )
    return "\n".join(map(",".join, rows)).encode(errors="surrogateescape")


def change_header(content: bytes, rng: random.Random) -> bytes:
    """Change one field of the header of a safetensors file."""
    (size,) = struct.unpack("<Q", content[:8])
    header = json.dumps(change_field(json.loads(content[8 : 8 + size]), rng)).encode()
    return struct.pack("<Q", len(header)) + header + content[8 + size :]


def write_pipeline(folder: Path) -> None:
    """Write a small unconditional model with random weights."""
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 4), norm_num_groups=2, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, add_attention=False,
    )  # fmt: skip
    DDPMPipeline(unet=unet.eval(), scheduler=DDPMScheduler(clip_sample=False)).save_pretrained(folder)


def write_datasets(folder: Path) -> None:
    """Write the same pictures, of every format, under a table of each kind."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng, rows = random.Random(0), []
    for kind in ("csv", "jsonl", "parquet"):
        (folder / kind).mkdir(parents=True)
    for i in range(ROWS):
        ending = list(FORMATS)[i % len(FORMATS)]
        pixels = bytes(min(255, rng.randrange(128) + 127 * (i % 2)) for _ in range(64))
        image = Image.frombytes("L", (8, 8), pixels)
        rows.append({"file_name": f"{i}.{ending}", "tone": ("dark", "light")[i % 2]})
        for kind in ("csv", "jsonl", "parquet"):
            image.save(folder / kind / rows[-1]["file_name"], FORMATS[ending])
    lines = ["file_name,tone", *(f"{row['file_name']},{row['tone']}" for row in rows)]
    (folder / "csv" / "metadata.csv").write_text("\n".join(lines))
    (folder / "jsonl" / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), folder / "parquet" / "table.parquet")


def write_runs(root: Path) -> None:
    """Write a config, a finished run and an interrupted one."""
    settings = {**SETTINGS, "prior": str(root / "pipeline"), "control": "tone", "data": str(root / "csv")}
    (root / "config.yaml").write_text(yaml.safe_dump({**settings, "prior": "pipeline", "data": "csv"}))
    train_job(settings, root / "run")
    with (
        mock.patch.object(Measurements, "from_run", side_effect=KeyboardInterrupt),
        contextlib.suppress(Interrupted),
    ):
        train_job(settings, root / "broken")


def targets(root: Path) -> list[Target]:
    """List what is corrupted; a file that stands in several rows is corrupted the more often."""
    inspect, sample = ("inspect", "pipeline"), ("sample", "run", "-n", "2", "--quiet", "--out", "samples")
    dry = ("train", "--config", "config.yaml", "--dry-run", "--quiet")
    found = [
        Target("config.yaml", change_yaml, dry),
        Target("config.yaml", change_byte, dry),
        Target("pipeline/model_index.json", change_json, inspect),
        Target("pipeline/unet/config.json", change_json, inspect),
        Target("pipeline/unet/config.json", change_byte, inspect),
        Target("pipeline/scheduler/scheduler_config.json", change_json, inspect),
        Target("pipeline/unet/diffusion_pytorch_model.safetensors", change_header, inspect),
        Target("pipeline/unet/diffusion_pytorch_model.safetensors", change_byte, inspect),
        Target("csv/metadata.csv", change_cell, dry),
        Target("csv/metadata.csv", change_byte, dry),
        Target("jsonl/metadata.jsonl", change_lines, (*dry, "--data", "jsonl")),
        Target("jsonl/metadata.jsonl", change_byte, (*dry, "--data", "jsonl")),
        Target("parquet/table.parquet", change_byte, (*dry, "--data", "parquet/table.parquet")),
        *(Target(f"csv/{i}.{ending}", change_byte, (*dry, "--skip-bad")) for i, ending in enumerate(FORMATS)),
        *(Target(f"csv/{i}.{ending}", change_byte, dry) for i, ending in enumerate(FORMATS)),
    ]
    for path in sorted((root / "run").rglob("*")):
        name, ending = path.relative_to(root).as_posix(), path.suffix
        if path.name == "config.yaml":
            found.append(Target(name, change_yaml, sample))
        elif ending == ".json" and path.name not in ("metrics.json", "start.json"):
            found += [Target(name, change_json, sample), Target(name, change_byte, sample)]
        elif ending == ".safetensors":
            found += [Target(name, change_header, sample), Target(name, change_byte, sample)]
    for path in sorted((root / "broken" / "checkpoint").iterdir())[-2:]:
        name = path.relative_to(root).as_posix()
        found.append(Target(name, change_byte, ("train", "--resume", "broken", "--quiet"), copied="broken"))
    return found


class Hang(BaseException):
    """Signal that a command takes too long."""


def on_alarm(*_: object) -> None:
    raise Hang


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, on_alarm)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def outcome(command: tuple[str, ...]) -> tuple[str, str]:
    """Run a command in this process; return "0", "2", … or what it failed by, and what it printed on stderr."""
    stderr = io.StringIO()
    argv = mock.patch.object(sys, "argv", ["ctrl", *command])
    with argv, alarm(SECONDS), contextlib.redirect_stderr(stderr), contextlib.redirect_stdout(io.StringIO()):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default")
                ctrl()
            code = "0"
        except SystemExit as stop:
            code = str(stop.code or 0)
        except Hang:
            return "hang", stderr.getvalue() + traceback.format_exc()
        except Exception as error:  # what no user should see
            return type(error).__name__, stderr.getvalue() + traceback.format_exc()
    return code, stderr.getvalue()


def try_case(root: Path, targets: list[Target], seed: int) -> tuple[Target, str, str]:
    """Corrupt one file in the current folder `root`, run its command, and put everything back."""
    rng = random.Random(seed)
    target = rng.choice(targets)
    path = root / target.file
    content = path.read_bytes()
    if target.copied:
        shutil.copytree(root / target.copied, root / "kept")
    path.write_bytes(target.change(content, rng))
    try:
        code, text = outcome(target.command)
    finally:
        shutil.rmtree(root / "samples", ignore_errors=True)
        if target.copied:
            shutil.rmtree(root / target.copied)
            (root / "kept").rename(root / target.copied)
        else:
            path.write_bytes(content)
    return target, code, text


def is_failure(code: str, text: str) -> bool:
    """Return whether a case ended in anything but a result or an error of one line."""
    return code not in map(str, CODES) or "Traceback" in text or (code == "2" and not text.strip())


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Make everything in a temporary folder, and work there."""
    diffusers_logging.set_verbosity_error()
    diffusers_logging.disable_progress_bar()
    with TemporaryDirectory() as scratch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        root = Path(scratch)
        write_pipeline(root / "pipeline")
        write_datasets(root)
        write_runs(root)
        before = os.getcwd()
        os.chdir(root)
        try:
            yield root
        finally:
            os.chdir(before)


def main() -> None:
    import evidence

    cases, first = (int(text) for text in (*sys.argv[1:], *("2000", "0")[len(sys.argv) - 1 :]))
    codes, failures, slowest = Counter(), 0, 0.0
    with workspace() as root:
        files = targets(root)
        for seed in track(range(first, first + cases), "corrupted files", console=Console(stderr=True)):
            begin = time.monotonic()
            target, code, text = try_case(root, files, seed)
            slowest = max(slowest, time.monotonic() - begin)
            codes[code] += 1
            if is_failure(code, text):
                failures += 1
                print(f"seed {seed}: {target.file}, {target.change.__name__}: {code}\n{text[-1500:]}")
    figures = {"cases": cases, "seed": first, "codes": dict(codes), "failures": failures}
    print(json.dumps(figures), f"slowest {slowest:.1f} s")
    if cases >= 2000:
        evidence.write("fuzz", figures)
    raise SystemExit(min(1, failures))


if __name__ == "__main__":
    main()
