"""Measure how long the script takes to its first stdout line, and to the end of --help.

    python benchmarks/startup.py [--runs 10]

Each figure is from the start of the process, the median, minimum and maximum of all runs after one that warms the
disk's cache. One JSON object goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

SCRIPT = [sys.executable, str(Path(__file__).resolve().parent.parent / "train_lora.py")]


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10)
    runs = parser.parse_args().runs
    print(json.dumps({"first_line": summary(first_line, runs), "help": summary(whole_help, runs)}, indent=2))


if __name__ == "__main__":
    main()
