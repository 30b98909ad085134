"""What only a CUDA card can tell: one Markdown table, in at most twelve minutes.

    python benchmarks/gpu.py > gpu.md
    python benchmarks/gpu.py --shape      the same rows with tiny models on the CPU, to try this script

The models have random weights in full size. A row that fails says so; one for which no time is left is left out.

- **no waiting**: steps in which torch raises an error where the CPU waits for the GPU.
- **attention**: what torch's profiler saw of it in three steps.
- **beside a bare loop**: steps of the trainer and of speed.py's loop, which is never compiled or quantized.
- **sigterm**: how long a run takes to end and what it saves, if the signal comes in a step of many micro-batches.
- **peak memory**: what torch allocated in each phase and reserved, in GiB, and in brackets the script's estimate.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import memory
import speed
import torch
from memory import GIB, Setting, setting
from models import JSON, table
from speed import CUDA

import train_lora as trainer

LIMIT_S, ROW_LIMIT_S = 720.0, 150.0
ATTENTION = re.compile("flash|fmha|attention|sdpa|softmax", re.IGNORECASE)


def config_of(work: Path, row: Setting, steps: int, **keys: Any) -> Path:
    """Write the config of a setting; without CUDA of a tiny model, in fp32 and not quantized."""
    keys |= {"mixed_precision": "bf16" if row.half else "no", "gradient_checkpointing": row.checkpointing}
    keys |= {"resolution": row.resolution, **row.keys}
    if not CUDA:
        keys |= {"mixed_precision": "no", "resolution": 64, "quantize_base": "none"}
    model = f"{'full' if CUDA else 'tiny'}_{row.family.replace('sd21', 'sd21v')}"  # SD 2.1 at 768 pixels predicts v.
    return speed.write_config(work, model, steps, 4, **keys)


def no_waiting(work: Path, row: Setting) -> str:
    made = speed.set_up(config_of(work, row, 6, log_steps=100))
    set_mode: Callable[[str], Any] = torch.cuda.set_sync_debug_mode if CUDA else str
    # The first steps make the optimizer's state, and the end of the last one reads the loss.
    speed.before_each_loss(made, lambda step: set_mode("error" if 2 <= step < 5 else "default"))
    made.train()
    return "three steps without waiting" if CUDA else "six steps on the CPU, which never waits"


def attention(work: Path, row: Setting) -> str:
    made = speed.set_up(config_of(work, row, 3))
    with torch.profiler.profile() as profile:
        made.train()
    events = [event for event in profile.events() or () if not CUDA or "CUDA" in str(event.device_type)]
    calls = collections.Counter(event.name[:80] for event in events if ATTENTION.search(event.name))
    return "; ".join(f"{count} of `{name}`" for name, count in calls.most_common(4))


def beside_a_bare_loop(work: Path, row: Setting) -> str:
    start = time.perf_counter()
    result = speed.measure_loop(config_of(work, row, 7 * speed.BLOCK))
    log = max(work.glob("*/events.jsonl"), key=lambda path: path.stat().st_mtime).read_text("utf-8")
    failed = "not compiled, " * ("compile_unavailable" in log)
    speeds = " and ".join(f"{1 / result[key]:.3g}" for key in ("step_s", "bare_s"))
    return f"{failed}{speeds} per second, ratio {result['ratio']:.3f}, {time.perf_counter() - start:.0f} s with set-up"


def sigterm(work: Path, row: Setting) -> str:
    with speed.start_script(config_of(work, row, 1000)) as process:
        events = map(json.loads, process.stdout or ())
        step_s = next(1 / event["steps_per_second"] for event in events if event["type"] == "progress")
        time.sleep(0.3 * step_s)  # The second step is a third done.
        process.send_signal(signal.SIGTERM)
        start, last = time.perf_counter(), [*events][-1]
    ended = f"exit code {process.returncode} after {time.perf_counter() - start:.2f} s, step {last['step']} saved"
    return f"a step takes {step_s:.1f} s, {ended}"


def take_peaks() -> tuple[float, float]:
    """Return the most that torch allocated and reserved since the last call, in GiB; without CUDA both are 0."""
    peaks = torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    return peaks


def peak_memory(work: Path, row: Setting) -> str:
    if CUDA and (needed := row.estimate()["total"]) > (free := torch.cuda.mem_get_info()[0]):
        return f"does not fit: {needed / GIB:.1f} of {free / GIB:.1f}"
    take_peaks()  # These are of earlier rows.
    made = speed.set_up(config_of(work, row, 3, validation_steps=3, sample_steps=2, sample_prompts=["a zorb"]))
    peaks, sample = {"set-up": take_peaks()}, made.sample
    vars(made)["sample"] = lambda *where: (peaks.update(training=take_peaks()), sample(*where))
    made.train()
    peaks["sampling"] = take_peaks()
    peaks["reserved"] = (max(reserved for _, reserved in peaks.values()), 0)
    terms, resident = made.plan.memory, made.plan.memory["training"] - made.plan.memory["activations"]
    estimates = [max(terms["caching"], resident), terms["training"], resident + terms["sampling"]]
    pairs = zip(peaks.items(), [*estimates, terms["total"] - trainer.CUDA_CONTEXT], strict=True)
    return ", ".join(f"{name} {most:.2f} ({estimate / GIB:.2f})" for (name, (most, _)), estimate in pairs)


SWITCHES: list[JSON] = [{}, {"batch_size": 4}, {"compile": True}, {"optimizer": "adamw8bit"}, {"quantize_base": "nf4"}]
SD15, SDXL = ([setting(*size, **keys) for keys in SWITCHES] for size in (("sd15", 512, False), ("sdxl", 1024, True)))
ROWS: list[tuple[Callable[[Path, Setting], str], list[Setting]]] = [  # What matters most comes first.
    (no_waiting, [SD15[0], SD15[3]]),
    (attention, [setting(*size, False) for size in memory.SIZES]),
    (beside_a_bare_loop, [*SD15, SDXL[0], SDXL[2], SDXL[4]]),
    (sigterm, [setting("sd15", 512, False, gradient_accumulation_steps=40)]),
    (peak_memory, [modes[number] for number in (1, 2, 4, 3, 0) for modes in memory.fits_settings()]),  # fp32 last
]


def answer(function: Callable[[Path, Setting], str], work: Path, row: Setting) -> tuple[str, bool]:
    """Return a row's result, or its failure as text, because not every exception can be sent to another process."""
    trainer.release_memory()  # The earlier row's.
    try:
        return function(work, row), True
    except Exception as error:
        traceback.print_exc()
        return f"**failed**: {type(error).__name__}: {error}".partition("\n")[0][:300], False


def measure(work: Path) -> Iterator[list[str]]:
    yield ["machine", *[""] * 5, ", ".join(map(str, speed.in_new_process(speed.describe_machine).values()))]
    end, pool = time.monotonic() + LIMIT_S, None
    for function, row in [(function, row) for function, settings in ROWS for row in settings]:
        if (limit_s := min(ROW_LIMIT_S, end - time.monotonic())) <= 0:
            return
        pool = pool or multiprocessing.get_context("spawn").Pool(1)
        try:
            result, works = pool.apply_async(answer, (function, work, row)).get(limit_s)
        except multiprocessing.TimeoutError:  # A process that died does not answer either.
            result, works = f"**failed**: no answer in {limit_s:.0f} s", False
        if not works:
            pool.terminate()
            pool = None
        cells, keys = memory.row_name(row), ", ".join(f"{key} {value}" for key, value in row.keys.items())
        yield [function.__name__.replace("_", " "), *cells[:2], *cells[4:], keys, result.replace("|", "/")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", action="store_true", help="run the rows with tiny models on the CPU")
    if parser.parse_args().shape:
        os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}  # The new processes inherit these.
    elif not CUDA:
        sys.exit("torch sees no CUDA device here. --shape tries this script on the CPU.")
    print(table(["measured", "family", "resolution", "precision", "checkpointing", "keys", "result"], []), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for line in measure(Path(folder)):
            print(f"| {' | '.join(line)} |", flush=True)


if __name__ == "__main__":
    main()
