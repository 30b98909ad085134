"""How fast is the trainer beside a bare loop, what memory does it hold, and how does it grow?

    python benchmarks/speed.py [--only loop memory run …] [--sizes tiny mid sd15 sdxl] [--threads 2] > speed.jsonl
    python benchmarks/speed.py --write speed.jsonl      # puts the tables into benchmarks/RESULTS.md

It needs no download: the models have random weights in the real layout (mid: SD 1.5 with 128 to 512 channels; sd15 and
sdxl: full size). With CUDA the full-size models are measured at 512 and 1024 pixels in bf16, with and without
checkpointing and compile; without, in fp32 at 256. `--only loop memory run --sizes tiny` takes less than a minute.
One JSON object per result goes to stdout. With `--threads 1` on a CPU all seconds are CPU time, so that other programs
on the machine hardly count.

- **loop**: seconds per step of LoRATrainer.train beside a bare loop in the same process: diffusers' UNet with PEFT's
  LoRA in fp32 under autocast, random tensors on the device, AdamW, clip_grad_norm_, no events. The two take turns.
- **memory**: resident memory of a process of its own after the imports, and its peak before and in the steps; on CUDA
  also what torch allocated at most in the steps, against the plan's estimate.
- **run**: a whole run by its command line: 20 images, 30 steps, a save every 10.
- **images, steps** (of the first size), **lora_rank, resolution, batch_size** (of the last size): the command line
  again with one of these growing.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/RESULTS.md"
SCRIPT = [sys.executable, str(ROOT / "train_lora.py")]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from models import build_model, full_size_config, make_dataset, write_json  # noqa: E402

import train_lora as trainer  # noqa: E402

JSON = dict[str, Any]
CUDA = torch.cuda.is_available()
ROUNDS = {"tiny": 60, "mid": 12, "sd15": 6, "sdxl": 6}  # blocks of either loop
BLOCK = 10 if CUDA else 1  # steps between two waits for the GPU
MEASURES = ("loop", "memory", "run", "images", "steps", "lora_rank", "resolution", "batch_size")


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

    @property
    def family(self) -> str:
        return "sdxl" if self.model == "sdxl" else "sd15"

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.mixed_precision == "bf16" else torch.float32


def gpu_cases(model: str, resolution: int, batches: Sequence[int]) -> list[Case]:
    switches = (False, True)
    return [
        Case(model, resolution, batch, "bf16", checkpointing, compiled)
        for batch, checkpointing, compiled in itertools.product(batches, switches, switches)
    ]


CASES = {name: [Case(name, 64 if name == "tiny" else 256)] for name in ROUNDS}
if CUDA:
    nf4 = Case("sdxl", 1024, 1, "bf16", gradient_checkpointing=True, quantize_base="nf4")
    CASES["sd15"], CASES["sdxl"] = gpu_cases("sd15", 512, (1, 4, 8)), [*gpu_cases("sdxl", 1024, (1, 4)), nf4]


def component_configs(case: Case) -> dict[str, JSON] | None:
    """Return the configs to build a case's model from; None stands for the tiny ones."""
    if case.model == "tiny":
        return None
    configs = full_size_config(case.family)
    if case.model == "mid":
        configs["unet"] |= {"block_out_channels": [128, 256, 512, 512]}
        configs["vae"] |= {"block_out_channels": [32, 64, 128, 128]}
    return configs


def write_config(work: Path, case: Case, steps: int, images: int, **changes: Any) -> Path:
    """Write the config of a run without samples, and what it needs: images and, the first time, the model."""
    model, side = work / case.model, min(case.resolution, 512)
    if not model.exists():
        build_model(model, case.family, component_configs(case), torch.float16)
    dataset, name = work / f"{images}_images_{side}", str(time.monotonic_ns())
    if not dataset.exists():
        make_dataset(dataset, [(side, side)] * images)
    keys = {"base_model": str(model), "dataset_path": str(dataset), "output_path": str(work / name), "steps": steps}
    keys |= {"trigger_words": ["zorb"], "lora_targets": "attention", "bucket_step": 16, "log_steps": 1}
    keys |= dict.fromkeys(("validation_steps", "checkpoint_steps", "autosave_minutes"), 0)
    case_keys = {key: value for key, value in dataclasses.asdict(case).items() if key != "model"}
    write_json(work / f"{name}.json", keys | case_keys | changes)
    return work / f"{name}.json"


# --- in a process of its own ------------------------------------------------------------------------------------------


def in_new_process(function: Callable[..., JSON], *arguments: Any) -> JSON:
    """Call a function where no memory, thread or compiled code of an earlier case is left."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def set_up(config_path: Path) -> trainer.LoRATrainer:
    """Set up a trainer in this process; its events go to the null device and to events.jsonl."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    trainer.import_checkers()
    trainer.import_libraries()
    config = trainer.load_config(str(config_path))
    events = trainer.EventStream()
    events.start(lambda: None, str(config_path))
    folder = trainer.OutputFolder(Path(config.output_path))
    folder.open()
    events.open_log(folder.path / "events.jsonl")
    plan = trainer.plan_run(config, events, download=False)
    made = trainer.LoRATrainer(plan, events, trainer.StopWatcher(events), folder)
    made.setup()
    return made


def clock_s(process: int | None = None) -> float:
    """Return the time on the wall; or, where torch has one thread, this process's CPU time or another's."""
    if CUDA or os.environ["OMP_NUM_THREADS"] != "1":
        return time.perf_counter()
    if process is None:
        return time.process_time()
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_gpu() -> None:
    if CUDA:
        torch.cuda.synchronize()


def bare_step(case: Case, model: str, alpha_bar: torch.Tensor) -> Callable[[], None]:
    """Return one step as a plain script takes it: diffusers' UNet, PEFT's LoRA, AdamW, and nothing else."""
    import diffusers
    import peft

    device, size, side = "cuda" if CUDA else "cpu", case.batch_size, case.resolution // 8
    owner: Any = diffusers.UNet2DConditionModel
    unet = owner.from_pretrained(model, subfolder="unet", dtype=case.dtype).to(device).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=case.lora_rank, lora_alpha=case.lora_rank, target_modules=targets))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    if case.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01, fused=CUDA)
    alpha_bar = alpha_bar.to(device).float()
    latents = torch.randn(size, 4, side, side, device=device)
    context = torch.randn(size, 77, unet.config.cross_attention_dim, device=device, dtype=case.dtype)
    conditions = None
    if case.family == "sdxl":
        sizes = torch.tensor([[case.resolution, case.resolution, 0, 0, case.resolution, case.resolution]] * size)
        pooled = torch.randn(size, 1280, device=device, dtype=case.dtype)
        conditions = {"text_embeds": pooled, "time_ids": sizes.to(device)}

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        timesteps = torch.randint(0, len(alpha_bar), (size,), device=device)
        share = alpha_bar[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        with torch.autocast(device, case.dtype, enabled=case.dtype != torch.float32):
            prediction = unet(noisy, timesteps, context, added_cond_kwargs=conditions).sample
        torch.autograd.backward(torch.nn.functional.mse_loss(prediction.float(), noise))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return step


def measure_loop(config: Path, case: Case) -> JSON:
    """Let blocks of the trainer's steps and of bare ones take turns; the first two rounds are not counted."""
    made = set_up(config)
    bare = bare_step(case, made.plan.config.base_model, trainer.noise_schedule(made.plan.source.scheduler))
    trained: list[float] = []
    plain: list[float] = []
    loss, calls, mark = made.loss, 0, 0.0

    def loss_between_bare_steps(*arguments: Any, **options: Any) -> Any:
        nonlocal calls, mark
        if calls % BLOCK == 0:
            wait_for_gpu()
            trained.append((clock_s() - mark) / BLOCK)
            mark = clock_s()
            for _ in range(BLOCK):
                bare()
            wait_for_gpu()
            plain.append((clock_s() - mark) / BLOCK)
            mark = clock_s()
        calls += 1
        return loss(*arguments, **options)

    vars(made)["loss"] = loss_between_bare_steps
    made.train()
    pairs = list(zip(trained[1:], plain, strict=False))[2:]
    low, middle, high = statistics.quantiles([one / other for one, other in pairs])
    seconds = [statistics.median(times) for times in zip(*pairs, strict=True)]
    ratio = {"ratio": middle, "ratio_quartiles": [low, high]}
    return {"n": len(pairs) * BLOCK, "step_s": seconds[0], "bare_s": seconds[1], **ratio}


def resident_gb(process: int | str, name: str = "VmHWM") -> float:
    """Return a process's peak of resident memory, or with VmRSS the present one; NaN where there is no /proc."""
    try:
        match = re.search(rf"{name}:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    except OSError:
        return math.nan
    return int(match[1]) / 1e6 if match else math.nan


def measure_memory(config: Path, case: Case) -> JSON:
    trainer.import_checkers()
    trainer.import_libraries()
    result: JSON = {"imported_gb": resident_gb("self", "VmRSS")}
    made = set_up(config)
    result["setup_peak_gb"] = resident_gb("self")
    if Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")  # The peak starts again from here.
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    made.train()
    result["training_peak_gb"] = resident_gb("self")
    result["estimate_gb"] = made.plan.memory["total"] / 1e9
    if CUDA:
        result["allocated_gb"] = torch.cuda.max_memory_allocated() / 1e9
        result["allocated_to_estimate"] = torch.cuda.max_memory_allocated() / made.plan.memory["allocated"]
    return result


# --- by the command line ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finished:
    """A whole run: its peak memory, and its events with the seconds until each came."""

    peak_gb: float
    events: list[tuple[float, JSON]]

    def arrived_s(self, step: int) -> float:
        return next(at for at, event in self.events if event["type"] == "progress" and event["step"] == step)

    def step_s(self, last: int) -> float:
        """Return the mean seconds of the steps, without the first two."""
        return (self.arrived_s(last) - self.arrived_s(2)) / (last - 2)


def run_script(config: Path) -> Finished:
    events, peak_gb = [], 0.0
    command, environment = [*SCRIPT, "--config", str(config)], os.environ | {"HF_HUB_OFFLINE": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout
        start = clock_s(process.pid)
        for line in process.stdout:
            events.append((clock_s(process.pid) - start, json.loads(line)))
            peak_gb = max(peak_gb, resident_gb(process.pid))
    assert events[-1][1]["type"] == "complete", events[-1]
    return Finished(peak_gb, events)


def measure_run(config: Path) -> JSON:
    done = run_script(config)
    pairs = itertools.pairwise(done.events)
    saves = [at - before for (before, _), (at, event) in pairs if event["type"] == "checkpoint"]
    return {
        "seconds": done.events[-1][0],
        "first_event_s": done.events[0][0],
        "first_step_s": done.arrived_s(1),
        "step_s": done.step_s(30),
        "save_s": statistics.median(saves),
        "peak_gb": done.peak_gb,
    }


def growing(case: Case) -> dict[str, tuple[int, ...]]:
    """Return what grows, over which values."""
    values = {"images": (10, 100, 1000), "steps": (100, 500, 2000), "lora_rank": (4, 32, 128), "batch_size": (1, 2, 4)}
    return {**values, "resolution": (case.resolution, case.resolution * 3 // 2, case.resolution * 2)}


def measure_growth(work: Path, by: str, case: Case) -> Iterator[JSON]:
    for value in growing(case)[by]:
        steps = value if by == "steps" else 100 if case.model == "tiny" else 8
        keys: JSON = {by: value} if by in vars(case) else {}
        images = value if by == "images" else 8
        done = run_script(write_config(work, dataclasses.replace(case, **keys), steps, images))
        first_s, step_s = done.arrived_s(1), done.step_s(steps)
        yield {"value": value, "step_s": step_s, "first_step_s": first_s, "peak_gb": done.peak_gb}


# --- what is measured, and the tables ---------------------------------------------------------------------------------


def describe_machine(threads: int) -> JSON:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if CUDA else "none",
        "threads": threads,
        "clock": "CPU time" if threads == 1 and not CUDA else "wall",
        "date": trainer.utc_now()[:10],
        "commit": commit.strip(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft", "transformers")},
    }


def measure(only: Sequence[str], sizes: Sequence[str], work: Path, threads: int) -> Iterator[JSON]:
    yield {"measure": "machine"} | describe_machine(threads)
    for case in [case for size in sizes for case in CASES[size]]:
        about = dataclasses.asdict(case)
        if "loop" in only and case.quantize_base == "none":  # The bare loop does not quantize.
            config = write_config(work, case, (ROUNDS[case.model] + 3) * BLOCK, images=20)
            yield {"measure": "loop"} | about | in_new_process(measure_loop, config, case)
        if "memory" in only:
            yield {"measure": "memory"} | about | in_new_process(measure_memory, write_config(work, case, 3, 4), case)
        if "run" in only:
            yield {"measure": "run"} | about | measure_run(write_config(work, case, 30, 20, checkpoint_steps=10))
    for by in [by for by in MEASURES[3:] if by in only]:
        case = CASES[sizes[0 if by in ("images", "steps") else -1]][0]
        yield from ({"measure": by, "model": case.model} | row for row in measure_growth(work, by, case))


def cell(value: Any) -> str:
    if isinstance(value, list):
        return " to ".join(map(cell, value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def table(rows: Sequence[JSON]) -> str:
    """Return rows as Markdown, without the settings that all of them leave at their defaults."""
    defaults = {field.name: field.default for field in dataclasses.fields(Case)} | {"measure": rows[0]["measure"]}
    names = dict.fromkeys(name for row in rows for name in row)
    columns = [name for name in names if any(row.get(name) != defaults.get(name) for row in rows)]
    lines = [columns, ["---"] * len(columns), *([cell(row.get(name, "")) for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_tables(rows: Sequence[JSON]) -> None:
    """Replace the tables in RESULTS.md that these rows have something for; the words between them stay."""
    text = RESULTS.read_text("utf-8")
    for name, group in trainer.grouped(rows, lambda row: str(row["measure"])).items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(begin)
        _, ended, after = rest.partition(end)
        text = before + begin + table(group) + end + after if ended else text
    RESULTS.write_text(text, "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, help="default: all")
    sizes = ["sd15", "sdxl"] if CUDA else ["tiny", "mid"]
    parser.add_argument("--sizes", nargs="+", choices=list(CASES), default=sizes, help=f"default: {' '.join(sizes)}")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch on the CPU")
    parser.add_argument("--write", type=Path, metavar="JSONL", help="put results into RESULTS.md and measure nothing")
    options = parser.parse_args()
    if options.write:
        return write_tables([json.loads(line) for line in options.write.read_text().splitlines()])
    os.environ["OMP_NUM_THREADS"] = str(options.threads)  # The new processes inherit it.
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(options.only, options.sizes, Path(folder), options.threads):
            print(json.dumps(row), flush=True)
    return None


if __name__ == "__main__":
    main()
