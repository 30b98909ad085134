"""How fast is the trainer beside a bare loop, what memory does it hold, and how does it grow? All of it on the CPU.

    python benchmarks/speed.py [--only loop run …] [--sizes tiny mid] > speed.jsonl
    python benchmarks/speed.py --write speed.jsonl      # puts the tables into benchmarks/RESULTS.md

It needs no download: the models have random weights in the real layout (mid: SD 1.5 with 128 to 512 channels, at 256
pixels). `--only loop run --sizes tiny` takes less than a minute. One JSON object per result goes to stdout. torch gets
one thread, and all seconds are CPU time, so that other programs on the machine hardly count.

- **loop**: seconds per step of LoRATrainer.train beside a bare loop in the same process: diffusers' UNet with PEFT's
  LoRA in fp32 under autocast, random tensors on the device, AdamW, clip_grad_norm_, no events. The two take turns.
- **run**: a whole run by its command line: 20 images, 30 steps. `peak_gb` is the most resident memory in GiB,
  `estimate_gb` the `total` of --validate-only.
- **images, steps, lora_rank, resolution, batch_size**: the command line again with one of these growing.
- **held**: the command line with each of the settings that hold a LoRA to its base, with a batch of 2.

benchmarks/gpu.py measures the same loop on a card.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import itertools
import json
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
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/RESULTS.md"
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import torch  # noqa: E402
from models import JSON, build_model, full_size_config, make_dataset, put_table, table, write_json  # noqa: E402

import train_lora as trainer  # noqa: E402

CUDA = torch.cuda.is_available()
BLOCK = 5 if CUDA else 1  # steps between two waits for the GPU
SIZES = {"tiny": (64, 63), "mid": (256, 15)}  # a model's resolution, and the steps of either loop
GROWTH: dict[str, tuple[str, Sequence[int]]] = {  # what grows, with which model, over which values
    "images": ("tiny", (10, 100, 1000)),
    "steps": ("tiny", (100, 500, 2000)),
    "lora_rank": ("mid", (4, 32, 128)),
    "resolution": ("mid", (256, 384, 512)),
    "batch_size": ("mid", (1, 2, 4)),
}
MEASURES = ("loop", "run", *GROWTH, "held")
HELD: dict[str, JSON] = {  # what holds a LoRA to its base
    "plain": {},
    "regularization images": {"regularization_path": "8_images_256"},
    "regularization to base": {"regularization_path": "8_images_256", "regularization_target": "base"},
    "class preservation": {"class_preservation_weight": 1.0, "class_words": "thing"},
    "change penalty": {"change_penalty": 0.01},
}


def write_config(work: Path, model: str, steps: int, images: int = 8, **keys: Any) -> Path:
    """Write the config of a run without samples, and what it needs: images and, the first time, the model.

    `model` is a size, and a kind of models.KINDS behind it if it is not SD 1.5: tiny, mid, full_sdxl.
    """
    size, _, kind = model.partition("_")
    side = keys.setdefault("resolution", SIZES.get(size, (512,))[0])
    if not (work / model / "model_index.json").exists():  # It is written last.
        configs = None if size == "tiny" else full_size_config((kind or "sd15").removesuffix("v"))
        if size == "mid" and configs:
            configs["unet"] |= {"block_out_channels": [128, 256, 512, 512]}
            configs["vae"] |= {"block_out_channels": [32, 64, 128, 128]}
        has_room = CUDA and torch.cuda.mem_get_info()[0] > 16 * 2**30  # SDXL's UNet takes ten while it is made.
        with torch.device("cuda" if has_room else "cpu"):
            build_model(work / model, kind or "sd15", configs, torch.float16)
    dataset, name = work / f"{images}_images_{side}", str(time.monotonic_ns())
    if not dataset.exists():
        make_dataset(dataset, [(side, side)] * images)
    paths = {"base_model": work / model, "dataset_path": dataset, "output_path": work / name}
    document: JSON = {key: str(path) for key, path in paths.items()} | {"trigger_words": ["zorb"], "steps": steps}
    document |= {"lora_targets": "attention", "mixed_precision": "no", "bucket_step": 16, "log_steps": 1}
    document |= dict.fromkeys(("validation_steps", "checkpoint_steps", "autosave_minutes"), 0)
    write_json(work / f"{name}.json", document | {"gradient_checkpointing": False} | keys)
    return work / f"{name}.json"


# --- in one process with a bare loop ----------------------------------------------------------------------------------


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


def before_each_loss(made: trainer.LoRATrainer, action: Callable[[int], None]) -> None:
    """Let a trainer call `action` with the number of earlier steps before it computes a step's loss."""
    loss, numbers = made.loss, itertools.count()

    def watched(*arguments: Any, **options: Any) -> Any:
        action(next(numbers))
        return loss(*arguments, **options)

    vars(made)["loss"] = watched


def cpu_time_s(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def bare_step(made: trainer.LoRATrainer) -> Callable[[], None]:
    """Return one step as a plain script takes it: diffusers' UNet, PEFT's LoRA, AdamW, and nothing else."""
    import diffusers
    import peft

    config, device, dtype = made.config, made.device, made.dtype
    size, resolution = config.batch_size, made.plan.resolution
    owner: Any = diffusers.UNet2DConditionModel
    unet = owner.from_pretrained(config.base_model, subfolder="unet", dtype=dtype).to(device).requires_grad_(False)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    unet.add_adapter(peft.LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=targets))
    weights = [weight for weight in unet.parameters() if weight.requires_grad]
    for weight in weights:
        weight.data = weight.data.float()
    if made.checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = torch.optim.AdamW(weights, lr=1e-4, weight_decay=0.01, fused=CUDA)
    alpha_bar = made.alpha_bar.to(device).float()
    latents = torch.randn(size, 4, resolution // 8, resolution // 8, device=device)
    context = torch.randn(size, 77, unet.config.cross_attention_dim, device=device, dtype=dtype)
    conditions = None
    if made.plan.source.family.time_ids:
        sizes = torch.tensor([[resolution, resolution, 0, 0, resolution, resolution]] * size)
        width = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        pooled = torch.randn(size, width, device=device, dtype=dtype)
        conditions = {"text_embeds": pooled, "time_ids": sizes.to(device)}

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        timesteps = torch.randint(0, len(alpha_bar), (size,), device=device)
        share = alpha_bar[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = share.sqrt() * latents + (1 - share).sqrt() * noise
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            prediction = unet(noisy, timesteps, context, added_cond_kwargs=conditions).sample
        torch.autograd.backward(torch.nn.functional.mse_loss(prediction.float(), noise))
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()

    return step


def measure_loop(config: Path) -> JSON:
    """Let blocks of the trainer's steps and of bare ones take turns; the first two rounds are not counted."""
    made = set_up(config)
    bare = bare_step(made)
    times: list[float] = []

    def read_clock() -> None:
        if CUDA:
            torch.cuda.synchronize()
        times.append(time.perf_counter() if CUDA else time.process_time())

    def take_turns(step: int) -> None:
        if step % BLOCK == 0:
            read_clock()
            for _ in range(BLOCK):
                bare()
            read_clock()

    before_each_loss(made, take_turns)
    made.train()
    blocks = [(end - start) / BLOCK for start, end in itertools.pairwise(times)]
    pairs = list(zip(blocks[1::2], blocks[::2], strict=False))[2:]
    low, middle, high = statistics.quantiles([one / other for one, other in pairs])
    step_s, bare_s = (statistics.median(seconds) for seconds in zip(*pairs, strict=True))
    result: JSON = {"n": len(pairs) * BLOCK, "step_s": step_s, "bare_s": bare_s, "ratio": middle}
    return result | {"ratio_quartiles": f"{low:.3g} to {high:.3g}"}


# --- by the command line ----------------------------------------------------------------------------------------------


def start_script(config: Path, *options: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "train_lora.py"), "--config", str(config), *options]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment)


def run_script(config: Path, *options: str) -> tuple[list[JSON], float]:
    """Run the script to its end; return its events, with the CPU time until each as `at_s`, and its peak in GiB."""
    events, peak_gb = [], 0.0
    with start_script(config, *options) as process:
        assert process.stdout
        start = cpu_time_s(process.pid)
        for line in process.stdout:
            events.append(json.loads(line) | {"at_s": cpu_time_s(process.pid) - start})
            match = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process.pid}/status").read_text())
            peak_gb = int(match[1]) / 2**20 if match else peak_gb  # A process that has ended has none.
    assert events[-1]["type"] in ("complete", "validated"), events[-1]
    return events, peak_gb


def measure_run(config: Path) -> JSON:
    events, peak_gb = run_script(config)
    arrived = {event["step"]: event["at_s"] for event in events if event["type"] == "progress"}
    last = max(arrived)
    step_s = (arrived[last] - arrived[2]) / (last - 2)  # The first two steps do not count.
    return {"step_s": step_s, "first_step_s": arrived[1], "peak_gb": peak_gb}


def measure_growth(work: Path, by: str) -> Iterator[JSON]:
    model, values = GROWTH[by]
    for value in values:
        sizes = {"steps": 100 if model == "tiny" else 8, by: value}
        yield {"value": value} | measure_run(write_config(work, model, **sizes))


# --- what is measured, and the tables ---------------------------------------------------------------------------------


def describe_machine() -> JSON:
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout
    return {
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "gpu": torch.cuda.get_device_name() if CUDA else "none",
        "date": trainer.utc_now()[:10],
        "commit": commit.strip(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "diffusers", "peft", "transformers")},
    }


def measure(only: Sequence[str], sizes: Sequence[str], work: Path) -> Iterator[JSON]:
    yield {"measure": "machine"} | describe_machine()
    for size in sizes:
        resolution, steps = SIZES[size]
        about = {"model": size, "resolution": resolution}
        if "loop" in only:
            yield {"measure": "loop"} | about | in_new_process(measure_loop, write_config(work, size, steps, 20))
        if "run" in only:
            config = write_config(work, size, 30, 20)
            estimate = run_script(config, "--validate-only")[0][-1]["memory"]
            yield {"measure": "run"} | about | measure_run(config) | {"estimate_gb": estimate["total_gb"]}
    for method, keys in HELD.items() if "held" in only else ():
        write_config(work, "mid", 8)  # Its eight images are the regularization images.
        config = write_config(work, "mid", 8, 10, batch_size=2, **keys)
        yield {"measure": "held", "model": "mid", "method": method} | measure_run(config)
    for by in [by for by in GROWTH if by in only]:
        yield from ({"measure": by, "model": GROWTH[by][0]} | row for row in measure_growth(work, by))


def cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def write_tables(rows: Sequence[JSON]) -> None:
    """Replace the tables in RESULTS.md that these rows have something for; the words between them stay."""
    for name, group in trainer.grouped(rows, lambda row: str(row["measure"])).items():
        columns = [column for column in group[0] if column != "measure"]
        put_table(RESULTS, name, table(columns, ([cell(row[column]) for column in columns] for row in group)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, help="default: all")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=[*SIZES], help="of loop and run; default: both")
    parser.add_argument("--write", type=Path, metavar="JSONL", help="put results into RESULTS.md and measure nothing")
    options = parser.parse_args()
    if options.write:
        return write_tables([json.loads(line) for line in options.write.read_text().splitlines()])
    os.environ["OMP_NUM_THREADS"] = "1"  # The new processes inherit it.
    with tempfile.TemporaryDirectory() as folder:
        for row in measure(options.only, options.sizes, Path(folder)):
            print(json.dumps(row), flush=True)
    return None


if __name__ == "__main__":
    main()
