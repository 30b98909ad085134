"""What does a setting do to a LoRA's quality? An ablation on the demo's concept, on the CPU, several seeds per row.

    python benchmarks/quality.py [--rows base,snr_gamma=5] [--seeds 3] [--jobs 2] [--output FOLDER]
    python benchmarks/quality.py --table-only [--picture rows.png --picture-rows base,alpha=1]

Every row of ``ROWS`` is the demo's config with a few keys changed. For each row and seed ``train_lora.py`` runs as a
user would run it, and the LoRA files that it leaves at some steps are then measured on the demo's base model:

- **closeness**: how close samples of the new concept, in a colour that was trained and in one that was not, are to its
  shape (mean intersection over union, see demo_quality.py; 1 is a perfect drawing, the six old shapes have 0.34 to
  0.63, so a model that draws any of them is at about 0.5, and one that is only just learning may be lower).
- **share**: the part of these samples that is closer to the concept's shape than to the six old ones.
- **steps to reach** a closeness, on straight lines between the measured steps.
- **preservation**: the closeness of samples of two old prompts to the old shapes, and how far their pixels moved from
  what the base model draws from the same noise (mean absolute difference, in percent of the range). The second one sees
  changes long before a shape is lost.
- **held-out loss**: plain mean squared error on pictures of the concept that were never trained on, at fixed noise and
  timesteps, whatever loss the row was trained with. They are drawn here: of the demo's ten pictures a
  ``validation_split`` would leave two or so, other ones for each seed, and less to train on.
- **seconds per step**: where the run was fastest, with as many runs side by side as ``--jobs`` says.

All rows and seeds share the samples' noise and the held-out pictures. The table gives the mean over the seeds and their
standard deviation. What was measured is kept in the folder, one JSON object per line, so an interrupted run goes on
where it was; a line counts only as long as the row's settings and those of the measurement are the same.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from demo_quality import Array, draw_grid, measure, sample
from safetensors.torch import load_file

from make_base import BACKGROUNDS, COLOURS, CONCEPT, random_picture, to_signal  # isort: skip

ROOT = Path(__file__).resolve().parent.parent
sd: Any = diffusers  # typed in part only: its classes can't be called from typed code otherwise
Json = dict[str, Any]

MEASURED_STEPS = (50, 100, 200)
RANK = 8  # the demo's
RATE = 2e-3  # twice the demo's, as steps and batch are half of its
COMMON: Json = {"steps": MEASURED_STEPS[-1], "checkpoint_steps": 50, "batch_size": 2, "learning_rate": RATE}
QUIET: Json = {"validation_steps": 0, "sample_at_start": False, "autosave_minutes": 0, "log_steps": 25}
ROWS: dict[str, Json] = {
    "base": {},
    "snr_gamma=5": {"snr_gamma": 5.0},
    "snr_gamma=1": {"snr_gamma": 1.0},
    "loss_type=huber": {"loss_type": "huber"},
    "noise_offset=0.05": {"noise_offset": 0.05},
    "noise_offset=0.1": {"noise_offset": 0.1},
    "targets=attention": {"lora_targets": "attention"},
    "targets=all": {"lora_targets": "all"},
    "alpha=1": {"lora_alpha": 1},
    "alpha=rank/2": {"lora_alpha": RANK / 2},
    "alpha=2*rank": {"lora_alpha": RANK * 2},
    "scheduler=linear": {"lr_scheduler": "linear"},
    "scheduler=cosine": {"lr_scheduler": "cosine"},
    "warmup=40": {"lr_warmup_steps": 40},
    "rslora": {"use_rslora": True},
    # diffusers reads magnitudes from its own format only, and no LoKr at all: that one is merged here.
    "dora": {"lora_type": "dora", "save_format": "diffusers"},
    "lokr": {"lora_type": "lokr"},
    "text_encoder": {"train_text_encoder": True, "text_encoder_learning_rate": RATE / 2},  # half, as the defaults are
    "ema=0.99": {"ema_decay": 0.99},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "lion": {"optimizer": "lion", "learning_rate": RATE * 0.3},  # 0.3 of AdamW's, as the defaults are
    "adafactor": {"optimizer": "adafactor"},
    "schedulefree": {"optimizer": "schedulefree_adamw"},
    "caption_dropout=0.1": {"caption_dropout": 0.1},
}
UNTRAINED = "untrained"

CONCEPT_PROMPTS = {"a red zorb": (CONCEPT, "red"), "orange zorb on a white background": (CONCEPT, "orange")}
OLD_PROMPTS = {"a red circle": ("circle", "red"), "a blue square": ("square", "blue")}
SAMPLING = {"samples": 10, "steps": 6, "guidance_scale": 4.0, "batch_size": 10, "seed": 1000}
HELD_OUT_PICTURES = 12
HELD_OUT_TIMESTEPS = (125, 375, 625, 875)
SHOWN = 4  # samples per prompt that are kept for --picture
ENOUGH = 0.6  # the closeness whose step the table tells


# --- measuring --------------------------------------------------------------------------------------------------------


class Measure:
    """The demo's base model, its own samples of the old prompts, and the held-out pictures; loaded once per process."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.pipeline = sd.StableDiffusionPipeline.from_pretrained(ROOT / "demo/base", dtype=torch.float32)
        self.pipeline.scheduler = sd.DDIMScheduler.from_config(self.pipeline.scheduler.config)
        self.pipeline.set_progress_bar_config(disable=True)
        models = (self.pipeline.unet, self.pipeline.text_encoder)
        self.untrained = [(m, {name: value.clone() for name, value in m.state_dict().items()}) for m in models]
        self.before = {prompt: self.draw(prompt) for prompt in OLD_PROMPTS}
        rng = random.Random(99)  # make_base.py drew the training pictures with another seed
        pairs = zip(itertools.cycle(COLOURS), itertools.cycle(BACKGROUNDS), strict=False)
        shown = list(itertools.islice(pairs, HELD_OUT_PICTURES))
        self.captions = [f"a {colour} {CONCEPT} on a {background} background" for colour, background in shown]
        pictures = np.stack([np.asarray(random_picture((CONCEPT, *pair), rng)) for pair in shown])
        with torch.no_grad():
            signal = to_signal(torch.from_numpy(pictures).permute(0, 3, 1, 2))
            latents = self.pipeline.vae.encode(signal).latent_dist.mean * self.pipeline.vae.config.scaling_factor
        self.latents: torch.Tensor = latents

    def draw(self, prompt: str) -> list[Array]:
        return sample(self.pipeline, prompt, argparse.Namespace(**SAMPLING))

    @torch.no_grad()
    def held_out_losses(self) -> list[float]:
        """The mean squared error at each of ``HELD_OUT_TIMESTEPS``, with noise that is always the same."""
        context, _ = self.pipeline.encode_prompt(self.captions, "cpu", 1, False)
        generator = torch.Generator().manual_seed(99)
        losses = []
        for timestep in HELD_OUT_TIMESTEPS:
            noise = torch.randn(self.latents.shape, generator=generator)
            steps = torch.full((len(noise),), timestep)
            noisy = self.pipeline.scheduler.add_noise(self.latents, noise, steps)
            predicted = self.pipeline.unet(noisy, steps, context).sample
            losses.append(float((predicted - noise).square().mean()))
        return losses

    def apply(self, lora: Path) -> None:
        """Put the LoRA into the models' weights: samples then cost no more than the base model's."""
        for model, weights in self.untrained:
            model.load_state_dict(weights)
        tensors = load_file(lora)
        if any(".lokr_" in key for key in tensors):
            merge_lokr(self.pipeline.unet, tensors)
            return
        self.pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        self.pipeline.fuse_lora()
        self.pipeline.unload_lora_weights()  # only the layers beside the weights, which keep what was fused

    def results(self, *, last: bool) -> tuple[Json, dict[str, list[Array]]]:
        """Measure the models as they are; the old prompts only after the last step, because samples cost the most."""
        named = CONCEPT_PROMPTS | (OLD_PROMPTS if last else {})
        samples = {prompt: self.draw(prompt) for prompt in named}
        by_prompt = {prompt: measure(samples[prompt], *named[prompt]) for prompt in named}

        def mean(key: str, prompts: Iterable[str]) -> float:
            return statistics.mean(by_prompt[prompt][key] for prompt in prompts)

        result: Json = {"closeness": mean("closeness", CONCEPT_PROMPTS), "share": mean("share", CONCEPT_PROMPTS)}
        result |= {"held_out_losses": self.held_out_losses(), "by_prompt": by_prompt}
        if last:
            result["old_closeness"] = mean("closeness", OLD_PROMPTS)
            moved = [np.abs(np.subtract(samples[p], self.before[p], dtype=float)).mean() for p in OLD_PROMPTS]
            result["old_change_percent"] = float(np.mean(moved)) / 255 * 100
        return result, samples


def merge_lokr(unet: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add scale * kron(w1, w2) to each module's weight (LyCORIS' keys; scale is alpha / rank, 1 without a rank)."""
    modules = {"lora_unet_" + name.replace(".", "_"): module for name, module in unet.named_modules()}
    for stem in sorted({key.partition(".")[0] for key in tensors}):
        part = {key.partition(".")[2]: value.float() for key, value in tensors.items() if key.startswith(stem + ".")}
        ranks = [part[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in part]
        w1, w2 = (
            part[name] if name in part else part[f"{name}_a"] @ part[f"{name}_b"].flatten(1)
            for name in ("lokr_w1", "lokr_w2")
        )
        scale = float(part["alpha"]) / ranks[0] if ranks else 1.0
        weight = modules[stem].weight.data
        weight += scale * torch.kron(w1[(...,) + (None,) * (w2.ndim - 2)], w2).reshape(weight.shape)


@functools.cache
def measuring() -> Measure:
    return Measure()


# --- running ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    row: str
    seed: int
    output: Path

    def settings(self) -> Json:
        """All that the numbers depend on, as JSON gives it back."""
        measured = [MEASURED_STEPS, SAMPLING, [*CONCEPT_PROMPTS, *OLD_PROMPTS], HELD_OUT_PICTURES, HELD_OUT_TIMESTEPS]
        keys = {} if self.row == UNTRAINED else {**COMMON, **ROWS[self.row], "seed": self.seed}
        settings: Json = json.loads(json.dumps({"row": self.row, "seed": self.seed, "keys": keys, "measure": measured}))
        return settings

    def file(self, suffix: str) -> Path:
        return self.output / f"{self.row.replace('/', '_').replace('*', 'x')}_{self.seed}{suffix}"


def train(job: Job) -> float:
    """Run the trainer to its end and give the seconds per step where it was fastest; another end is a RuntimeError."""
    keys = COMMON | QUIET | ROWS[job.row] | {"seed": job.seed, "output_path": str(job.file(""))}
    command = [sys.executable, str(ROOT / "train_lora.py"), "--config", str(ROOT / "demo/config.json"), "--fresh"]
    for key, value in keys.items():
        command += ["--set", f"{key}={json.dumps(value)}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
        problems = [f"{item['path']}: {item['message']}" for item in events[-1].get("problems", [])] if events else []
        raise RuntimeError("; ".join(problems) or (events[-1]["message"] if events else f"exit {done.returncode}"))
    speeds: list[float] = [event["steps_per_second"] for event in events if event["type"] == "progress"]
    return 1 / max(speeds)


def run(job: Job) -> Json:
    """Train one row with one seed and measure it; what is kept are its last LoRA, some samples, and these numbers."""
    start = time.monotonic()
    if job.row == UNTRAINED:
        result, samples = measuring().results(last=True)
        by_step = {0: result}
        result = {"seconds_per_step": None}
    else:
        folder = job.file("")
        result = {"seconds_per_step": train(job)}
        by_step = {}
        for step in MEASURED_STEPS:
            measuring().apply(folder / f"checkpoints/lora_step_{step}.safetensors")
            by_step[step], samples = measuring().results(last=step == MEASURED_STEPS[-1])
        (folder / "lora_final.safetensors").replace(job.file(".safetensors"))
        shutil.rmtree(folder)
    shown = np.stack([np.stack(pictures[:SHOWN]) for pictures in samples.values()])
    np.savez_compressed(job.file(".npz"), prompts=np.array(list(samples)), pictures=shown)
    return {**job.settings(), "by_step": by_step, **result, "seconds": round(time.monotonic() - start, 1)}


def identity(result: Json) -> Json:
    """The part of a result that is its job's settings."""
    return {key: result[key] for key in ("row", "seed", "keys", "measure")}


def read_results(output: Path) -> list[Json]:
    path = output / "results.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]  # a line may have been cut off


def run_all(jobs: Sequence[Job], output: Path, workers: int) -> None:
    """Run what isn't there yet, ``workers`` at once; a row that fails is told and left out."""
    output.mkdir(parents=True, exist_ok=True)
    known = [identity(line) for line in read_results(output)]
    missing = [job for job in jobs if job.settings() not in known]
    with ProcessPoolExecutor(workers) as pool, (output / "results.jsonl").open("a", encoding="utf-8") as results:
        pending = {pool.submit(run, job): job for job in missing}
        for number, future in enumerate(as_completed(pending), start=1):
            name = f"[{number}/{len(missing)}] {pending[future].row} seed {pending[future].seed}"
            try:
                result = future.result()
            except Exception as error:  # the other rows are still worth their time
                print(f"{name}: left out: {error}", file=sys.stderr, flush=True)
                continue
            results.write(f"{json.dumps(result)}\n")
            results.flush()
            last = list(result["by_step"].values())[-1]
            print(f"{name}: closeness {last['closeness']:.3f}, {result['seconds']} s", file=sys.stderr, flush=True)


# --- the table --------------------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """Mean and, of several, standard deviation."""
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def steps_to(result: Json, before: float) -> float | None:
    """The step at which the closeness passes ``ENOUGH``, from ``before`` at step 0; None: not within the run."""
    measured = {int(step): float(at["closeness"]) for step, at in result["by_step"].items()}
    points = [(0, before), *measured.items()]
    for (step, low), (next_step, high) in itertools.pairwise(points):
        if low < ENOUGH <= high:
            return step + (next_step - step) * (ENOUGH - low) / (high - low)
    return None


def cells(found: Sequence[Json], before: float) -> dict[str, str]:
    """One row of the table from its seeds' results; ``before`` is the untrained model's closeness."""
    last = MEASURED_STEPS[-1]

    def of(key: str, step: int, digits: int, scale: float = 1) -> str:
        return spread([scale * statistics.mean(np.ravel(r["by_step"][str(step)][key])) for r in found], digits)

    steps = [step for result in found if (step := steps_to(result, before)) is not None]
    reached = spread(steps, 0) if len(steps) == len(found) else f"> {last}"
    seconds = [result["seconds_per_step"] for result in found if result["seconds_per_step"]]
    return {
        **{f"closeness at {step}": of("closeness", step, 2) for step in MEASURED_STEPS},
        f"steps to {ENOUGH}": f"{len(steps)} of {len(found)} do" if 0 < len(steps) < len(found) else reached,
        "share %": of("share", last, 0, 100),
        "old prompts' closeness": of("old_closeness", last, 2),
        "old prompts' change %": of("old_change_percent", last, 1),
        "held-out loss * 1000": of("held_out_losses", last, 1, 1000),
        "s/step": f"{min(seconds):.2f}" if seconds else "",
        "seeds": str(len(found)) if seconds else "",
    }


def table(jobs: Iterable[Job], results: Sequence[Json]) -> str:
    """Markdown; rows that have no result yet are left out."""
    wanted = [job.settings() for job in jobs]
    by_row: dict[str, list[Json]] = {setting["row"]: [] for setting in wanted}
    for result in results:
        if identity(result) in wanted:
            by_row[result["row"]].append(result)
    if not by_row[UNTRAINED]:
        return "nothing measured yet"
    zero = by_row[UNTRAINED][0]["by_step"]["0"]
    by_row[UNTRAINED][0]["by_step"] = {str(step): zero for step in MEASURED_STEPS}
    rows = {row: cells(found, zero["closeness"]) for row, found in by_row.items() if found}
    lines = [["row", *rows[UNTRAINED]], ["---"] * (1 + len(rows[UNTRAINED]))]
    lines += [[row, *found.values()] for row, found in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def draw_rows(rows: Sequence[str], output: Path, picture: Path) -> None:
    """Draw a line of samples for each row, from the first seed, and one of the untrained model."""
    samples: dict[str, dict[str, list[Array]]] = {}
    for row in [UNTRAINED, *rows]:
        path = Job(row, 0, output).file(".npz")
        if path.exists():
            with np.load(path) as kept:
                samples[row] = {str(p): list(shown) for p, shown in zip(kept["prompts"], kept["pictures"], strict=True)}
    draw_grid(samples, [], [SHOWN] * len(next(iter(samples.values()))), margin=100).save(picture)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated names of rows (default: all)")
    parser.add_argument("--seeds", type=int, default=3, help="seeds per row (default 3)")
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side, one thread each (default 2)")
    parser.add_argument("--output", type=Path, default=ROOT / "output/quality", help="folder for what was measured")
    parser.add_argument("--table-only", action="store_true", help="print the table of what is there; run nothing")
    parser.add_argument("--picture", type=Path, help="write a grid of samples to this file")
    parser.add_argument("--picture-rows", help="comma-separated names of the grid's rows (default: those of --rows)")
    args = parser.parse_args(argv)
    rows = args.rows.split(",")
    shown = args.picture_rows.split(",") if args.picture_rows else rows
    if unknown := sorted({*rows, *shown} - ROWS.keys()):
        parser.error(f"no such row: {', '.join(unknown)}")
    # Seed by seed: whatever is there when it is interrupted makes a whole table.
    jobs = [Job(UNTRAINED, 0, args.output), *(Job(r, seed, args.output) for seed in range(args.seeds) for r in rows)]
    if not args.table_only:
        run_all(jobs, args.output, args.jobs)
    print(table(jobs, read_results(args.output)))
    if args.picture:
        draw_rows(shown, args.output, args.picture)


if __name__ == "__main__":
    main()
