"""Measure how long the script takes to its first stdout line, to the end of --help, and to `validated`.

    python benchmarks/startup.py [--runs 10] [--checkpoint]

--checkpoint also times `--validate-only` with a single-file SDXL of 6.9 GB, of which only the header is real (the file
system keeps the rest as a hole), and says how much of it was read into the page cache. It needs the development tools.

Each figure is from the start of the process, the median, minimum and maximum of all runs after one that warms the
disk's cache. One JSON object goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = [sys.executable, str(ROOT / "train_lora.py")]


def first_line() -> float:
    """Seconds to the `start` event of a run whose config does not exist."""
    started = time.perf_counter()
    with subprocess.Popen(
        [*SCRIPT, "--config", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout
        process.stdout.readline()
        elapsed = time.perf_counter() - started
        process.kill()
    return elapsed


def whole_help() -> float:
    started = time.perf_counter()
    subprocess.run([*SCRIPT, "--help"], check=True, capture_output=True)
    return time.perf_counter() - started


def summary(measure: Callable[[], float], runs: int) -> dict[str, float]:
    measure()
    times = [measure() for _ in range(runs)]
    return {"median_s": statistics.median(times), "min_s": min(times), "max_s": max(times)}


def hollow_checkpoint(path: Path) -> int:
    """Write the header of a full-size SDXL checkpoint, and nothing behind it; the file's size."""
    sys.path.insert(0, str(ROOT))
    import test_trainer
    import train_lora

    header, end = {}, 0
    family = next(family for family in train_lora.FAMILIES if family.name == "sdxl")
    for key, (dtype, shape) in test_trainer.original_header(family).items():
        start, end = end, end + 2 * math.prod(shape)
        header[key] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return path.stat().st_size


def validated(folder: Path) -> float:
    """Seconds from the start of the process to the `validated` event for the checkpoint in a folder."""
    config = {
        "dataset_path": "images",
        "base_model": "sdxl.safetensors",
        "output_path": "out",
        "trigger_words": ["zorb"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    started = time.perf_counter()
    command = [*SCRIPT, "--config", str(folder / "config.json"), "--validate-only"]
    done = subprocess.run(command, check=True, capture_output=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert json.loads(done.stdout.splitlines()[-1])["type"] == "validated"
    return time.perf_counter() - started


def checkpoint(runs: int) -> dict[str, float]:
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        folder, path = Path(name), Path(name, "sdxl.safetensors")
        for inside in ("images", "clip_tokenizer"):
            (folder / inside).mkdir()
        Image.new("RGB", (1024, 1024)).save(folder / "images/black.png")
        tokens = [*map(chr, range(33, 127)), *(f"{chr(code)}</w>" for code in range(33, 127))]
        vocabulary = {token: n for n, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}
        (folder / "clip_tokenizer/vocab.json").write_text(json.dumps(vocabulary))
        (folder / "clip_tokenizer/merges.txt").write_text("#version: 0.2\n")
        size = hollow_checkpoint(path)
        times = summary(lambda: validated(folder), runs)
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        validated(folder)
        fincore = ["fincore", "--bytes", "--noheadings", "--output", "RES", str(path)]
        read = int(subprocess.run(fincore, check=True, capture_output=True).stdout)
        return times | {"file_bytes": size, "read_bytes": read}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--checkpoint", action="store_true")
    options = parser.parse_args()
    found = {"first_line": summary(first_line, options.runs), "help": summary(whole_help, options.runs)}
    if options.checkpoint:
        found["checkpoint"] = checkpoint(options.runs)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
