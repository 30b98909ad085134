"""Measure what hostile and slow clients of --health-port cost the training, and what a monitor notices of them.

    python benchmarks/health.py [--rounds 10] [--requests 1000] [--at-once 200]

The tests' tiny model trains (a step takes about 12 ms, most of it in the interpreter, which the server's thread shares:
the worst case); busy stretches, with that many requests, and quiet ones as long take turns. `speed_ratio` is the speed
of a busy one against the mean of the quiet ones before and after; `speed_per_cpu_ratio` the same for each second of CPU
that the whole process took, which other work on the machine changes little. All the while a monitor asks for /health
ten times a second. The trainer has one core and everything else the others, where the system can do that: what clients
cost by being there is not the server's. One JSON object goes to stdout.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import datetime
import functools
import itertools
import json
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parent.parent
Json = dict[str, Any]
Client = Callable[[int], Awaitable[str]]
CORES = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
CLIENT_CORES = CORES[1:] or CORES
HEAD = b"GET /status HTTP/1.1\r\nHost: localhost\r\n"


# --- clients ----------------------------------------------------------------------------------------------------------


async def send(port: int, *, pieces: Sequence[bytes], pause_s: float = 0.0, listens: bool = True) -> str:
    """Send a request piece by piece; the status of the answer, or how it went instead."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(pause_s)
        if not listens:
            return "not waited for"
        return (await reader.read(-1))[9:12].decode() or "closed"
    except OSError:
        return "closed"
    finally:
        writer.close()


CLIENTS: dict[str, Client] = {
    "whole": functools.partial(send, pieces=[HEAD + b"\r\n"]),
    "drip": functools.partial(send, pieces=[HEAD, *[b"x"] * 60], pause_s=0.05),
    "silent": functools.partial(send, pieces=[b""]),
    "half": functools.partial(send, pieces=[HEAD]),
    "huge": functools.partial(send, pieces=[HEAD + b"X: ", *[b"a" * 100_000] * 10]),
    "binary": functools.partial(send, pieces=[bytes(range(256)) * 8, b"\r\n\r\n"]),
    "TLS": functools.partial(send, pieces=[b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(192)]),
    "pipelined": functools.partial(send, pieces=[(HEAD + b"\r\n") * 100]),
    "body": functools.partial(
        send, pieces=[b"POST /stop HTTP/1.1\r\nContent-Length: 1000000\r\n\r\n", bytes(1_000_000)]
    ),
    "gone at once": functools.partial(send, pieces=[HEAD + b"\r\n"], listens=False),
}


async def attack(port: int, requests: int, at_once: int) -> Json:
    outcomes: collections.Counter[str] = collections.Counter()
    free = asyncio.Semaphore(at_once)

    async def one(name: str, client: Client) -> None:
        async with free:
            try:
                outcome = await asyncio.wait_for(client(port), 30)
            except (OSError, asyncio.TimeoutError) as error:
                outcome = type(error).__name__
        outcomes[f"{name}: {outcome}"] += 1

    started = time.perf_counter()
    await asyncio.gather(*(one(*pair) for pair in itertools.islice(itertools.cycle(CLIENTS.items()), requests)))
    return {"seconds": time.perf_counter() - started, "outcomes": dict(outcomes)}


def run_attack(port: int, requests: int, at_once: int) -> Json:
    return asyncio.run(attack(port, requests, at_once))


def probe(port: int) -> tuple[str, float]:
    """Ask for /health as a monitor does: the status, and the seconds it took."""
    started = time.perf_counter()
    try:
        status = asyncio.run(asyncio.wait_for(send(port, pieces=[HEAD.replace(b"status", b"health") + b"\r\n"]), 10))
    except (OSError, asyncio.TimeoutError) as error:
        status = type(error).__name__
    return status, time.perf_counter() - started


# --- training ---------------------------------------------------------------------------------------------------------


def write_config(work: Path) -> Path:
    """Write a tiny model, its pictures, and the config of a run that does not end by itself."""
    import speed  # only here: it imports torch

    return speed.write_config(work, speed.CASES["tiny"][0], 1_000_000, 20, log_steps=1)


@contextlib.contextmanager
def training(work: Path) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Train, on the first core: the process, and its port."""
    config = write_config(work)
    command = [sys.executable, str(ROOT / "train_lora.py"), "--config", str(config), "--health-port", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pin(CORES[:1])
    with (work / "stdout").open("wb") as out, (work / "stderr").open("wb") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
    pin(CLIENT_CORES)
    try:
        while len(events := read_events(work)) < 2 or events[-1]["type"] != "progress":
            assert process.poll() is None, (work / "stderr").read_text()
            time.sleep(0.2)
        yield process, int(events[1]["address"].rpartition(":")[2])
    finally:
        process.kill()


def pin(cores: Sequence[int]) -> None:
    if cores:
        os.sched_setaffinity(0, cores)


def read_events(work: Path) -> list[Json]:
    path = work / "stdout"
    return [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]] if path.exists() else []


@dataclass(frozen=True)
class Stretch:
    """A time of training: begin and end, the trainer's CPU seconds, what the monitor was answered and when."""

    begin: float
    end: float
    cpu_s: float
    answers: list[tuple[str, float]]

    @classmethod
    def until(cls, ready: Callable[[], bool], port: int, pid: int) -> Stretch:
        """Ask ten times a second until it is `ready`."""
        begin, cpu, answers = time.time(), cpu_seconds(pid), []
        while not ready():
            answers.append(probe(port))
            time.sleep(0.1)
        return cls(begin, time.time(), cpu_seconds(pid) - cpu, answers)

    def rates(self, steps: Sequence[float]) -> tuple[float, float]:
        """Steps a second, and steps a CPU second, from the times of all steps."""
        inside = [moment for moment in steps if self.begin <= moment <= self.end]
        return (len(inside) - 1) / (inside[-1] - inside[0]), len(inside) / self.cpu_s


def cpu_seconds(pid: int) -> float:
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def monitor(answers: Sequence[tuple[str, float]]) -> Json:
    times = sorted(seconds * 1000 for _, seconds in answers)
    shares = {"p50_ms": 0.5, "p99_ms": 0.99, "max_ms": 1.0}
    took = {name: times[min(len(times) - 1, int(len(times) * share))] for name, share in shares.items()}
    return {"answers": dict(collections.Counter(status for status, _ in answers)), **took}


def ratio(quiet: Sequence[float], busy: Sequence[float]) -> Json:
    """Hold each busy stretch against the quiet ones around it."""
    ratios = [rate / statistics.mean(around) for rate, *around in zip(busy, quiet, quiet[1:], strict=False)]
    low, median, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return {"median": median, "quartiles": [low, high], "n": len(ratios), "all": ratios}


def step_times(events: Sequence[Json]) -> list[float]:
    stamps = [event["timestamp"].replace("Z", "+00:00") for event in events if event["type"] == "progress"]
    return [datetime.datetime.fromisoformat(stamp).timestamp() for stamp in stamps]


def take_turns(work: Path, rounds: int, requests: int, at_once: int) -> tuple[list[Stretch], list[Json], int]:
    """Train through quiet and busy stretches, quiet ones first and last; these, the attacks, and the exit code."""
    stretches, attacks, length = [], [], 5.0
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, pin, (CLIENT_CORES,)) as pool, training(work) as (process, port):
        for turn in range(2 * rounds + 1):
            end = time.time() + length
            attacking = pool.submit(run_attack, port, requests, at_once) if turn % 2 else None
            ready = attacking.done if attacking else lambda end=end: time.time() > end
            stretches.append(Stretch.until(ready, port, process.pid))
            attacks += [attacking.result()] if attacking else []
            length = stretches[-1].end - stretches[-1].begin if attacking else length
        process.send_signal(signal.SIGTERM)
        return stretches, attacks, process.wait(timeout=60)


def measure(work: Path, rounds: int, requests: int, at_once: int) -> Json:
    stretches, attacks, code = take_turns(work, rounds, requests, at_once)
    events = read_events(work)
    steps = step_times(events)
    quiet, busy = (
        list(zip(*(one.rates(steps) for one in part), strict=True)) for part in (stretches[::2], stretches[1::2])
    )
    outcomes: collections.Counter[str] = collections.Counter()
    for attack_ in attacks:
        outcomes.update(attack_["outcomes"])
    return {
        "speed_ratio": ratio(quiet[0], busy[0]),
        "speed_per_cpu_ratio": ratio(quiet[1], busy[1]),
        "steps_per_second": {"quiet": statistics.median(quiet[0]), "busy": statistics.median(busy[0])},
        "attack_s": statistics.median(one["seconds"] for one in attacks),
        "requests": dict(sorted(outcomes.items())),
        "health": {
            "quiet": monitor([answer for one in stretches[::2] for answer in one.answers]),
            "busy": monitor([answer for one in stretches[1::2] for answer in one.answers]),
        },
        "end": {"exit_code": code, "last_event": events[-1]["type"], "stderr": (work / "stderr").read_text()[-200:]},
        "cores": {"trainer": CORES[:1], "clients": CLIENT_CORES},
        "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--requests", type=int, default=1000, help="in each round")
    parser.add_argument("--at-once", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(Path(folder), options.rounds, options.requests, options.at_once), indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
