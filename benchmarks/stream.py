"""Measure what the event stream costs the training.

    python benchmarks/stream.py [--seconds 60] [--pairs 2]

Two things: the time that one progress event takes on the thread that emits it, and the demo's training speed while
the parent reads every line, beside its speed while the parent sleeps on a pipe that is full from the start. The two
speeds alternate, so that a noisy machine harms both alike. One JSON object goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

EMIT = """
import json, pathlib, sys, time
import train_lora as t
stream = t.EventStream()
stream.start(lambda: None, None)
stream.open_log(pathlib.Path(sys.argv[1]))
fields = dict(step=1, total_steps=1000, percent=0.1, loss=0.123456789, loss_avg=0.123456789, learning_rate=1e-4,
              grad_norm=0.0123456789, epoch=1.5, steps_per_second=3.3333333, eta_seconds=123.4567, vram_gb=7.123)
times = []
for _ in range(3000):
    time.sleep(0.001)  # as between steps: the writer's thread gets its turn
    begin = time.perf_counter()
    stream.emit("progress", **fields)
    times.append(time.perf_counter() - begin)
stream.close()
pathlib.Path(sys.argv[2]).write_text(json.dumps(sorted(times)))
"""


def event_cost() -> dict[str, float]:
    """Microseconds per event on the emitting thread, with events.jsonl being written and a reader."""
    with tempfile.TemporaryDirectory() as folder:
        log, result = Path(folder) / "events.jsonl", Path(folder) / "times.json"
        subprocess.run([sys.executable, "-c", EMIT, log, result], cwd=ROOT, capture_output=True, check=True)
        times = [second * 1e6 for second in json.loads(result.read_text())]
    return {"median_us": statistics.median(times), "p99_us": times[len(times) * 99 // 100], "max_us": times[-1]}


def drain(descriptor: int) -> None:
    while os.read(descriptor, 65536):
        pass


def fill(descriptor: int) -> None:
    os.set_blocking(descriptor, False)
    try:
        while True:
            os.write(descriptor, b" " * 4096)
    except BlockingIOError:
        os.set_blocking(descriptor, True)


def training_speed(seconds: float, *, asleep: bool) -> float:
    """Steps per second of the demo over `seconds` of training."""
    with tempfile.TemporaryDirectory() as folder:
        reading, writing = os.pipe()
        if asleep:
            fill(writing)
        else:
            threading.Thread(target=drain, args=(reading,), daemon=True).start()
        changes = [f"output_path={folder}", "steps=100000", "validation_steps=0", "checkpoint_steps=0", "log_steps=1"]
        command = [sys.executable, str(ROOT / "train_lora.py"), "--config", str(ROOT / "demo/config.json")]
        command += [word for change in changes for word in ("--set", change)]
        with subprocess.Popen(command, stdout=writing, stderr=subprocess.DEVNULL) as process:
            os.close(writing)
            log = Path(folder) / "events.jsonl"
            while not (log.exists() and b'"progress"' in log.read_bytes()):
                time.sleep(0.5)
            time.sleep(seconds)
            process.kill()
        if asleep:
            os.close(reading)
        events = [json.loads(line) for line in log.read_bytes().split(b"\n")[:-1]]
    progress = [event for event in events if event["type"] == "progress"][1:]
    return float((len(progress) - 1) / (progress[-1]["elapsed"] - progress[0]["elapsed"]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0, help="of training for each speed")
    parser.add_argument("--pairs", type=int, default=2)
    options = parser.parse_args()
    cost = event_cost()
    pairs = [
        {
            "awake_steps_per_second": training_speed(options.seconds, asleep=False),
            "asleep_steps_per_second": training_speed(options.seconds, asleep=True),
        }
        for _ in range(options.pairs)
    ]
    ratios = [pair["asleep_steps_per_second"] / pair["awake_steps_per_second"] for pair in pairs]
    print(json.dumps({"event": cost, "pairs": pairs, "ratio": statistics.mean(ratios)}, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
