"""How fast is the trainer, beside a bare loop and the machine's own pace, what does it hold, and how does it grow?

    python benchmarks/speed.py [--only loop memory run …] [--sizes tiny mid sd15 sdxl] [--threads 2] > speed.jsonl
    python benchmarks/speed.py --write speed.jsonl      # puts the tables into benchmarks/RESULTS.md

Needs no download: the models have random weights in the real layout (tiny: the tests'; mid: SD 1.5's with 128 to 512
channels; sd15 and sdxl: full size). With CUDA the full-size models are measured at 512 and 1024 pixels in bf16, with
and without checkpointing and compile; without, in fp32 at 256. One JSON object per result goes to stdout.

- **loop**: seconds a step of LoRATrainer.train, its events written to a pipe that is read, beside a bare loop over the
  same UNet in the same process: diffusers' UNet with PEFT's LoRA in fp32, autocast where the compute dtype has 16 bits,
  tensors that are on the device from the start, AdamW, clip_grad_norm_, no events. The two take turns. `overhead` is
  the share of a step outside forward (predict, sample_error), backward and update; on CUDA it is the share of the time
  in which no kernel runs. `peak_share` counts the matrix products, convolutions and attention of forward and backward
  (FlopCounterMode on the bare step: gradients to activations and LoRA weights, none to frozen ones, no recomputation)
  against the best large matrix product in the compute dtype here.
- **memory**: of a process of its own: resident after the imports, the highest while it set up and while it trained; on
  CUDA what torch allocated at most while it trained, against the plan's estimate.
- **run**: a whole run by its command line: 20 images, 30 steps, a save every 10.
- **images, steps, lora_rank, resolution, batch_size**: the command line again, one of these growing; `exponent` is the
  slope in logarithms (0: flat, 1: linear).

With `--threads 1 --cpu-time` other work on the machine hardly counts: all but the whole run's `seconds` is CPU time.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/RESULTS.md"
sys.path.insert(0, str(ROOT))

import diffusers  # noqa: E402
import peft  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

import test_trainer as tests  # noqa: E402
import train_lora as trainer  # noqa: E402

sd: Any = diffusers  # typed in part only
Json = dict[str, Any]
ROUNDS = {"tiny": 60, "mid": 12, "sd15": 6, "sdxl": 6}  # of one block of either loop
CUDA_BLOCK = 10  # steps between two waits for the GPU
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Case:
    """A model and the config's keys that decide the work of a step."""

    model: str
    resolution: int
    batch_size: int = 1
    mixed_precision: str = "no"
    gradient_checkpointing: bool = False
    compile: bool = False
    quantize_base: str = "none"
    lora_rank: int = 16

    def keys(self) -> Json:
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "model"}


def on_gpu(model: str, resolution: int, batches: Sequence[int]) -> list[Case]:
    settings = itertools.product(batches, (False, True), (False, True))
    return [
        Case(model, resolution, batch, "bf16", checkpointing, compiled) for batch, checkpointing, compiled in settings
    ]


CASES = {
    "tiny": [Case("tiny", 64)],
    "mid": [Case("mid", 256)],
    "sd15": [Case("sd15", 256)],
    "sdxl": [Case("sdxl", 256)],
}
if CUDA:
    nf4 = Case("sdxl", 1024, 1, "bf16", gradient_checkpointing=True, quantize_base="nf4")
    CASES["sd15"], CASES["sdxl"] = on_gpu("sd15", 512, (1, 4, 8)), [*on_gpu("sdxl", 1024, (1, 4)), nf4]


# --- models, images, configs ------------------------------------------------------------------------------------------


def build_model(folder: Path, name: str) -> None:
    """Write a model with random weights: the tests' tiny one, its UNet, VAE and encoders replaced by larger ones."""
    tests.build_model(folder, "sdxl" if name == "sdxl" else "sd15")
    if name == "tiny":
        return
    family = next(family for family in trainer.FAMILIES if family.name == ("sdxl" if name == "sdxl" else "sd15"))
    config = dict(tests.full_size_unet(family).config)
    widths = {"block_out_channels": (128, 256, 512, 512)} if name == "mid" else {}
    sd.UNet2DConditionModel.from_config(config | widths).half().save_pretrained(folder / "unet")
    channels = (32, 64, 128, 128) if name == "mid" else (128, 256, 512, 512)
    down, up = ([f"{side}Block2D"] * 4 for side in ("DownEncoder", "UpDecoder"))
    blocks = {"down_block_types": down, "up_block_types": up, "block_out_channels": channels, "layers_per_block": 2}
    sd.AutoencoderKL(**blocks, **family.vae_config).half().save_pretrained(folder / "vae")
    vocabulary = json.loads((folder / "tokenizer/vocab.json").read_text())
    for row in family.text_encoders:
        suffix = row.folder.removeprefix("text_encoder")
        tests.build_text_encoder(folder, suffix, vocabulary, "!" if suffix else "<|endoftext|>", row.width)


def make_images(folder: Path, count: int, side: int) -> Path:
    if not folder.exists():
        folder.mkdir()
        for number in range(count):
            noise = Image.frombytes("RGB", (16, 16), random.Random(number).randbytes(768))
            noise.resize((side, side), Image.Resampling.BICUBIC).save(folder / f"{number}.jpg", quality=90)
            (folder / f"{number}.txt").write_text(f"a zorb, number {number}", "utf-8")
    return folder


def write_config(work: Path, case: Case, steps: int, images: int, **changes: Any) -> Path:
    """Write the config of a run without samples and periodic saves, its images and, the first time, its model."""
    if not (model := work / case.model).exists():
        build_model(model, case.model)
    name = f"{time.monotonic_ns()}"
    side = min(case.resolution, 512) if case.model != "tiny" else 64
    keys = {
        "base_model": str(model),
        "dataset_path": str(make_images(work / f"{images}_images_{side}", images, side)),
        "output_path": str(work / f"out_{name}"),
        "trigger_words": ["zorb"],
        "steps": steps,
        "lora_targets": "attention",
        "validation_steps": 0,
        "checkpoint_steps": 0,
        "autosave_minutes": 0,
    }
    path = work / f"{name}.json"
    path.write_text(json.dumps(keys | case.keys() | changes), "utf-8")
    return path


# --- in a process of its own ------------------------------------------------------------------------------------------


def apart(function: Callable[..., Json], *arguments: Any) -> Json:
    """Call a function in a fresh process: no memory, thread or compiled code of an earlier case."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def drain(descriptor: int) -> None:
    while os.read(descriptor, 65536):
        pass


def make_trainer(config: Path) -> trainer.LoRATrainer:
    """Set up a trainer in this process, its events going to a pipe that is read."""
    reading, writing = os.pipe()
    os.dup2(writing, 1)
    threading.Thread(target=drain, args=(reading,), daemon=True).start()
    loaded = trainer.load_config(str(config))
    events = trainer.EventStream()
    events.start(lambda: None, str(config))
    folder = trainer.OutputFolder(Path(loaded.output_path))
    folder.open()
    events.open_log(folder.path / "events.jsonl")
    stop = trainer.StopWatcher(events)
    made = trainer.LoRATrainer(loaded, trainer.scan_dataset(loaded, events), events, stop, folder)
    made.setup()
    return made


def train_until(made: trainer.LoRATrainer, step: int) -> None:
    made.plan = dataclasses.replace(made.plan, total_steps=step)
    made.train()


def clock() -> float:
    """Read the clock of a loop's steps: this thread's CPU time where --cpu-time asks for it."""
    return time.thread_time() if os.environ.get("SPEED_CPU_TIME") else time.perf_counter()


def wait() -> None:
    if CUDA:
        torch.cuda.synchronize()


def bare_step(made: trainer.LoRATrainer, case: Case) -> Callable[[], None]:
    """Give one step as a plain script takes it: diffusers' UNet, PEFT's LoRA, AdamW, and nothing else."""
    device, dtype, size = made.device, made.dtype, case.batch_size
    unet = sd.UNet2DConditionModel.from_pretrained(made.config.base_model, subfolder="unet", torch_dtype=dtype).to(
        device
    )
    unet.requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=case.lora_rank, lora_alpha=case.lora_rank, target_modules=targets))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    if case.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01, fused=CUDA)
    alpha_bar = made.alpha_bar.to(device).float()
    shape = (size, 4, case.resolution // made.plan.source.vae_factor, case.resolution // made.plan.source.vae_factor)
    mean, std = torch.randn(shape, device=device), torch.rand(shape, device=device)
    context = torch.randn(size, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)
    added: Json | None = None
    if made.plan.source.family.time_ids:
        time_ids = torch.tensor([[case.resolution, case.resolution, 0, 0, case.resolution, case.resolution]] * size)
        added = {"text_embeds": torch.randn(size, 1280, device=device, dtype=dtype), "time_ids": time_ids.to(device)}

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        timesteps = torch.randint(0, len(alpha_bar), (size,), device=device)
        chosen = alpha_bar[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(mean)
        noisy = chosen.sqrt() * (mean + std * torch.randn_like(mean)) + (1 - chosen).sqrt() * noise
        with torch.autocast(device.type, dtype, enabled=made.half):
            prediction = unet(noisy, timesteps, context, added_cond_kwargs=added).sample
        torch.autograd.backward(torch.nn.functional.mse_loss(prediction.float(), noise))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return step


def take_turns(
    made: trainer.LoRATrainer, bare: Callable[[], None], block: int, rounds: int
) -> list[tuple[float, float]]:
    """Time blocks of the trainer's steps and of bare ones in turn: seconds a step of either, without the first two."""
    ours: list[float] = []
    theirs: list[float] = []
    accumulate, mark = made.accumulate, 0.0

    def between(step: int) -> Any:
        nonlocal mark
        if step % block == 0:
            wait()
            ours.append((clock() - mark) / block)
            mark = clock()
            for _ in range(block):
                bare()
            wait()
            theirs.append((clock() - mark) / block)
            mark = clock()
        return accumulate(step)

    vars(made)["accumulate"] = between
    train_until(made, (rounds + 2) * block + 1)
    del vars(made)["accumulate"]
    return list(zip(ours[1:], theirs, strict=False))[2:]


def timed(owner: Any, name: str, spent: list[float]) -> None:
    function = getattr(owner, name)

    @functools.wraps(function)
    def timing(*arguments: Any, **options: Any) -> Any:
        start = clock()
        try:
            return function(*arguments, **options)
        finally:
            spent.append(clock() - start)

    vars(owner)[name] = timing


def overhead_share(made: trainer.LoRATrainer, steps: int) -> float:
    """Give the share of a step outside forward, backward and update; on CUDA, that in which no kernel runs."""
    end = made.state.step + steps
    if CUDA:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            wait()
            start = clock()
            train_until(made, end)
            wait()
            seconds = clock() - start
        return float(1 - sum(event.self_device_time_total for event in profile.key_averages()) / 1e6 / seconds)
    spent: list[float] = []
    for owner, name in ((made, "predict"), (trainer, "sample_error"), (torch.autograd, "grad"), (made, "update")):
        timed(owner, name, spent)
    start = clock()
    train_until(made, end)
    return 1 - sum(spent) / (clock() - start)


def step_flop(bare: Callable[[], None]) -> int:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    # The counter does not know the CPU's fused attention; as plain products it is counted whole.
    with contextlib.nullcontext() if CUDA else sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        bare()
    return int(counter.get_total_flops())


def matrix_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the floating-point operations a second of a large matrix product, the best of twenty."""
    size = 8192 if CUDA else 2048
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    times = []
    for _ in range(20):
        wait()
        start = clock()
        torch.matmul(left, right)
        wait()
        times.append(clock() - start)
    return 2 * size**3 / min(times)


def measure_loop(work: Path, case: Case, threads: int) -> Json:
    torch.set_num_threads(threads)
    block, rounds = CUDA_BLOCK if CUDA else 1, ROUNDS[case.model]
    made = make_trainer(write_config(work, case, 10**6, images=20))
    bare = bare_step(made, case)
    pairs = take_turns(made, bare, block, rounds)
    ours, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
    low, middle, high = statistics.quantiles([one / other for one, other in pairs])
    flop, peak = step_flop(bare), matrix_peak(made.device, made.dtype)
    return {
        "n": rounds * block,
        "step_s": ours,
        "bare_s": theirs,
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "overhead": overhead_share(made, max(5, rounds * block // 2)),
        "tflop": flop / 1e12,
        "tflops": flop / ours / 1e12,
        "peak_tflops": peak / 1e12,
        "peak_share": flop / ours / peak,
    }


def memory_of(process: int | str) -> dict[str, float]:
    """Read a process's resident memory and its highest, in GB; nothing where there is no /proc."""
    try:
        status = Path(f"/proc/{process}/status").read_text()
    except OSError:
        return {}
    return {name: int(size) / 1e6 for name, size in re.findall(r"(VmHWM|VmRSS):\s+(\d+) kB", status)}


def measure_memory(work: Path, case: Case, threads: int) -> Json:
    torch.set_num_threads(threads)
    config = write_config(work, case, 3, images=4)
    found: Json = {"imported_gb": memory_of("self").get("VmRSS")}
    made = make_trainer(config)
    found["setup_peak_gb"] = memory_of("self").get("VmHWM")
    if CUDA:
        found["setup_allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
    made.train()
    found["training_peak_gb"] = memory_of("self").get("VmHWM")
    estimate = {name: value / 1e9 for name, value in made.plan.memory.items()}
    if CUDA:
        found["allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        found["measured_to_estimate"] = found["allocated_gb"] / estimate["training"]
    return found | {"estimate_gb": estimate}


# --- by the command line ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A whole run: seconds from the process's start to its exit, and of each event the seconds until it came, those by
    the clock that is asked for, and the resident memory.
    """

    seconds: float
    events: list[Json]
    arrived: list[float]
    clock: list[float]
    resident_gb: list[float]
    peak_gb: float

    def first(self, wanted: Callable[[Json], bool]) -> int:
        return next(number for number, event in enumerate(self.events) if wanted(event))

    def step_s(self, first: int, last: int) -> float:
        """Give the mean seconds of the steps after `first` up to `last`."""
        steps = {event["step"]: at for event, at in zip(self.events, self.clock, strict=True) if "loss_avg" in event}
        return (steps[last] - steps[first]) / (last - first)

    def phases(self) -> dict[str, float]:
        """Give the seconds that each phase took."""
        told = [(event["phase"], at) for event, at in zip(self.events, self.clock, strict=True) if event.get("phase")]
        spent: dict[str, float] = {}
        for (phase, begun), (_, ended) in itertools.pairwise([*told, ("", self.clock[-1])]):
            spent[phase] = spent.get(phase, 0.0) + ended - begun
        return {phase: round(seconds, 2) for phase, seconds in spent.items()}

    def rate(self, message: str) -> float:
        """Give the items a second of a long work, by its first and last event."""
        work = [number for number, event in enumerate(self.events) if event.get("message") == message]
        return float(self.events[work[-1]]["total"] / max(1e-3, self.clock[work[-1]] - self.clock[work[0]]))


def cpu_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def run_script(config: Path, threads: int) -> Finished:
    command = [sys.executable, str(ROOT / "train_lora.py"), "--config", str(config)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    done = Finished(0.0, [], [], [], [], 0.0)
    peak = 0.0
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout
        for line in process.stdout:
            done.arrived.append(time.perf_counter() - start)
            done.events.append(json.loads(line))
            by_cpu = os.environ.get("SPEED_CPU_TIME")
            done.clock.append(cpu_seconds(process.pid) if by_cpu else done.events[-1]["elapsed"])
            memory = memory_of(process.pid)
            done.resident_gb.append(memory.get("VmRSS", math.nan))
            peak = max(peak, memory.get("VmHWM", 0.0))
    assert done.events[-1]["type"] == "complete", done.events[-1]
    return dataclasses.replace(done, seconds=time.perf_counter() - start, peak_gb=peak)


def measure_run(work: Path, case: Case, threads: int) -> Json:
    config = write_config(work, case, 30, images=20, checkpoint_steps=10)
    done = run_script(config, threads)
    saves = [number for number, event in enumerate(done.events) if event["type"] == "checkpoint"]
    stalls = [done.clock[number] - done.clock[number - 1] for number in saves]
    state = Path(done.events[saves[0]]["state_path"])
    return {
        "seconds": done.seconds,
        "first_event_s": done.arrived[0],
        "first_progress_s": done.arrived[done.first(lambda event: event["type"] == "progress")],
        "step_s": done.step_s(2, 30),
        "phases_s": done.phases(),
        "images_cached_per_s": done.rate("Encoding images."),
        "save_s": statistics.median(stalls),
        "state_mb": next(path.stat().st_size for path in state.parent.glob("state_*")) / 1e6,
        "peak_gb": done.peak_gb,
    }


GROWTH = {  # what grows, over which values, in which case, for how many steps
    "images": ((10, 100, 1000, 10_000), Case("tiny", 64), 400),
    "lora_rank": ((4, 16, 64, 128), Case("mid", 256), 8),
    "resolution": ((128, 256, 384, 512), Case("mid", 256), 8),
    "batch_size": ((1, 2, 4, 8), Case("mid", 256), 8),
}
LONG = 10_000  # steps of the run whose steps are watched
MEASURES = ("loop", "memory", "run", *GROWTH, "steps")


def measure_growth(work: Path, by: str, value: int, threads: int) -> Json:
    _, case, steps = GROWTH[by]
    images = value if by == "images" else 8
    changes: Json = {} if by == "images" else {by: value}
    done = run_script(write_config(work, dataclasses.replace(case, **changes), steps, images), threads)
    phases = done.phases()
    found = {"step_s": done.step_s(2, steps), "peak_gb": done.peak_gb}
    scan = {"checking_s": phases["checking"], "planning_s": phases["planning"], "caching_s": phases["caching"]}
    return found | (scan if by == "images" else {})


def measure_steps(work: Path, threads: int) -> Iterator[Json]:
    done = run_script(write_config(work, Case("tiny", 64), LONG, images=20), threads)
    for last in (100, 1000, LONG):
        line = done.first(lambda event, last=last: event["type"] == "progress" and event["step"] == last)  # type: ignore[misc]
        yield {"value": last, "step_s": done.step_s(last // 2, last), "resident_gb": done.resident_gb[line]}


def exponent(values: Sequence[float], results: Sequence[float]) -> float:
    return statistics.linear_regression([math.log(value) for value in values], [math.log(one) for one in results]).slope


# --- what is run, and the tables --------------------------------------------------------------------------------------


def describe_machine(threads: int) -> Json:
    memory = (
        re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text()) if Path("/proc/meminfo").exists() else None
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "memory_gb": round(int(memory[1]) / 2**20) if memory else None,
        "gpu": torch.cuda.get_device_name() if CUDA else None,
        "threads": threads,
        "clock": "CPU time" if os.environ["SPEED_CPU_TIME"] else "wall",
        "load_before": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "date": trainer.utc_now()[:10],
        "commit": commit.strip(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft", "transformers")},
    }


def growth(work: Path, only: Sequence[str], threads: int) -> Iterator[Json]:
    for by in [by for by in GROWTH if by in only]:
        values = GROWTH[by][0]
        rows = []
        for value in values:
            rows.append({"value": value} | measure_growth(work, by, value, threads))
            yield {"by": by} | rows[-1]
        for name in list(rows[0])[1:]:
            results = [row[name] for row in rows]
            if min(results) > 0:
                yield {"by": by, "of": name, "exponent": exponent(values, results), "times": results[-1] / results[0]}
        if by == "images":
            growth_kb = (rows[-1]["peak_gb"] - rows[-2]["peak_gb"]) * 1e6 / (values[-1] - values[-2])
            yield {"by": by, "of": "peak_gb", "kb_an_image": growth_kb}
    if "steps" in only:
        yield from ({"by": "steps"} | row for row in measure_steps(work, threads))


def measure(only: Sequence[str], sizes: Sequence[str], work: Path, threads: int) -> Iterator[Json]:
    yield {"measure": "machine"} | describe_machine(threads)
    cases = [case for size in sizes for case in CASES[size]]
    for name, function in {"loop": measure_loop, "memory": measure_memory}.items():
        for case in cases if name in only else ():
            yield {"measure": name} | dataclasses.asdict(case) | apart(function, work, case, threads)
    for case in [case for case in cases if case.model != "tiny"] if "run" in only else ():
        if not (case.compile or case.gradient_checkpointing):
            yield {"measure": "run"} | dataclasses.asdict(case) | measure_run(work, case, threads)
    yield from ({"measure": "growth"} | row for row in growth(work, only, threads))


def cell(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {cell(one)}" for name, one in value.items())
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    return f"{value:.3g}" if isinstance(value, float) and abs(value) < 1000 else str(value)


def table(rows: Sequence[Json]) -> str:
    """Render rows as Markdown, without the settings that all of them leave at their defaults."""
    plain = {field.name: field.default for field in dataclasses.fields(Case)} | {"measure": rows[0]["measure"]}
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if name != "by" and any(row.get(name) != plain.get(name) for row in rows)]
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(row: Json) -> str:
    return f"{row['measure']} by {row['by']}" if "by" in row else str(row["measure"])


def write_tables(rows: Sequence[Json]) -> None:
    """Replace the tables in RESULTS.md that these rows have something for; the words between them stay."""
    text = RESULTS.read_text("utf-8")
    for name, group in trainer.grouped(rows, section).items():
        begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
        fits = [row for row in group if "of" in row]
        tables = [table(part) for part in ([row for row in group if row not in fits], fits) if part]
        before, begun, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        if begun and ended:
            text = before + begin + "\n\n".join(tables) + "\n" + end + after
    RESULTS.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, help="default: all")
    parser.add_argument(
        "--sizes", nargs="+", choices=list(CASES), help="default: sd15 and sdxl on CUDA, else tiny and mid"
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch on the CPU")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="time the loops by their thread's CPU time: for a busy machine, --threads 1",
    )
    parser.add_argument("--write", type=Path, metavar="JSONL", help="put results into RESULTS.md and measure nothing")
    options = parser.parse_args()
    if options.write:
        return write_tables([json.loads(line) for line in options.write.read_text().splitlines()])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ["SPEED_CPU_TIME"] = "1" * options.cpu_time  # the fresh processes inherit it
    sizes = options.sizes or (["sd15", "sdxl"] if CUDA else ["tiny", "mid"])
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(options.only or MEASURES, sizes, Path(folder), options.threads):
            print(json.dumps(row), flush=True)
    return None


if __name__ == "__main__":
    main()
