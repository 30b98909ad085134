"""How well does a LoRA know the demo's concept, and which settings teach it best? On the CPU, with demo/base.

    python benchmarks/quality.py lora demo/output/lora_final.safetensors [--samples 32]
    python benchmarks/quality.py rows [--rows base snr_gamma=5] [--seeds 3] >> quality.jsonl
    python benchmarks/quality.py table quality.jsonl

`lora` draws samples with and without a LoRA from the same noise, and prints one JSON object. `rows` trains the demo's
config once per row of ROWS and seed (a minute each), measures the LoRA files, and prints one JSON object per run.
`table` makes the table of docs/defaults.md from these.

- **closeness**: the intersection over union of a sample's figure with the named shape, both cut out, centred and scaled
  to 48x48 pixels. 1 is a perfect drawing; the six old shapes have 0.34 to 0.63 with the concept's.
- **share**: the part of the samples whose closest shape of all seven is the named one.
- **old prompts' change**: how far the pixels of old prompts moved from what the base model draws, in percent.
- **held-out loss**: the mean squared error at fixed noise and timesteps on pictures of the concept that were drawn for
  this purpose, whatever loss the row was trained with.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from make_base import ALL_SHAPES, BACKGROUNDS, COLOURS, CONCEPT, draw, random_picture, to_signal  # noqa: E402

Array = np.ndarray[Any, Any]
JSON = dict[str, Any]
MASK_SIZE = 48
NEW_PROMPTS = {"a red zorb": CONCEPT, "a blue zorb": CONCEPT}  # prompt -> the shape that it names
OLD_PROMPTS = {"a red circle": "circle", "a blue square": "square"}

# --- how close a sample is to a shape ---------------------------------------------------------------------------------


def find_figure(picture: Array) -> Array:
    """Return the mask of the pixels that are not background (uint8 HWC in, bool HW out)."""
    pixels = picture.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    clear = distance[distance > 40]
    if not clear.size:
        return np.zeros(distance.shape, dtype=bool)
    # The border's colour is the background. Half of the typical distance lies in the middle of the outline's blur.
    return np.asarray(distance > max(40.0, 0.5 * float(np.percentile(clear, 95))))


def normalised(mask: Array) -> Array:
    """Cut the figure out, centre it in a square, and scale it to MASK_SIZE without stretching."""
    rows, columns = np.nonzero(mask)
    if not rows.size:
        return np.zeros((MASK_SIZE, MASK_SIZE), dtype=bool)
    figure = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].astype(np.uint8) * 255
    side = max(figure.shape)
    square = Image.new("L", (side, side))
    square.paste(Image.fromarray(figure), ((side - figure.shape[1]) // 2, (side - figure.shape[0]) // 2))
    return np.asarray(square.resize((MASK_SIZE, MASK_SIZE), Image.Resampling.BILINEAR)) > 127


@functools.cache
def templates() -> dict[str, Array]:
    """Return every shape's mask, drawn large by the demo's own function."""
    pictures = {shape: draw(shape, (255, 255, 255), (0, 0, 0), (128, 128), 100, 256) for shape in ALL_SHAPES}
    return {shape: normalised(find_figure(np.asarray(picture))) for shape, picture in pictures.items()}


def overlap(one: Array, other: Array) -> float:
    union = int((one | other).sum())
    return int((one & other).sum()) / union if union else 0.0


def measure(pictures: Sequence[Array], shape: str) -> dict[str, float]:
    """Return the mean closeness to the named shape, and the share of samples to which no other shape is closer."""
    figures = [normalised(find_figure(picture)) for picture in pictures]
    scores = [{name: overlap(figure, mask) for name, mask in templates().items()} for figure in figures]
    is_right = [score[shape] > 0 and max(score, key=score.__getitem__) == shape for score in scores]
    closeness = statistics.mean(score[shape] for score in scores)
    return {"closeness": round(closeness, 4), "share": round(sum(is_right) / len(is_right), 4)}


# --- one LoRA ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn; sample number i always starts from the noise of seed + i."""

    samples: int
    steps: int
    batch_size: int = 16
    guidance_scale: float = 4.0
    seed: int = 1000


def load_pipeline() -> Any:
    owner: Any = diffusers.StableDiffusionPipeline
    pipeline = owner.from_pretrained(ROOT / "demo/base", dtype=torch.float32)
    scheduler: Any = diffusers.DDIMScheduler
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sample(pipeline: Any, prompt: str, sampling: Sampling) -> list[Array]:
    pictures: list[Array] = []
    for start in range(0, sampling.samples, sampling.batch_size):
        seeds = range(sampling.seed + start, sampling.seed + min(start + sampling.batch_size, sampling.samples))
        output = pipeline(
            [prompt] * len(seeds),
            num_inference_steps=sampling.steps,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        )
        pictures += list((output.images * 255).round().astype(np.uint8))
    return pictures


def measure_lora(lora: Path, sampling: Sampling) -> JSON:
    pipeline, named = load_pipeline(), NEW_PROMPTS | OLD_PROMPTS
    before = {prompt: measure(sample(pipeline, prompt, sampling), shape) for prompt, shape in named.items()}
    pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    after = {prompt: measure(sample(pipeline, prompt, sampling), shape) for prompt, shape in named.items()}
    prompts = {prompt: {"before": before[prompt], "after": after[prompt]} for prompt in named}
    return {"samples": sampling.samples, "steps": sampling.steps, "prompts": prompts}


# --- rows: training with changed settings -----------------------------------------------------------------------------

MEASURED_STEPS = (50, 100, 200)
RANK = 8  # the demo's
RATE = 2e-3  # twice the demo's, because steps and batch are half of its
COMMON: JSON = {"steps": MEASURED_STEPS[-1], "checkpoint_steps": 50, "batch_size": 2, "learning_rate": RATE}
QUIET: JSON = {"validation_steps": 0, "sample_at_start": False, "autosave_minutes": 0, "log_steps": 25}
ROWS: dict[str, JSON] = {
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
    # diffusers reads DoRA's magnitudes only from its own format, and does not read LoKr; `merge_lokr` does.
    "dora": {"lora_type": "dora", "save_format": "diffusers"},
    "lokr": {"lora_type": "lokr"},
    "text_encoder": {"train_text_encoder": True, "text_encoder_learning_rate": RATE / 2},  # half, like the defaults
    "ema=0.99": {"ema_decay": 0.99},
    "prodigy": {"optimizer": "prodigy", "learning_rate": 1.0},
    "lion": {"optimizer": "lion", "learning_rate": RATE * 0.3},  # 0.3 of AdamW's, like the defaults
    "adafactor": {"optimizer": "adafactor"},
    "schedulefree": {"optimizer": "schedulefree_adamw"},
    "caption_dropout=0.1": {"caption_dropout": 0.1},
}
UNTRAINED = "untrained"
ROW_PROMPTS = {"a red zorb": CONCEPT, "orange zorb on a white background": CONCEPT}  # no picture shows an orange one
ROW_SAMPLING = Sampling(samples=10, steps=6, batch_size=10)
HELD_OUT_PICTURES = 12
HELD_OUT_TIMESTEPS = (125, 375, 625, 875)
ENOUGH = 0.6  # the closeness whose step the table has


class Judge:
    """The demo's base model, its own samples of old prompts, and held-out pictures."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        self.pipeline = load_pipeline()
        models = (self.pipeline.unet, self.pipeline.text_encoder)
        self.untrained = [(m, {name: value.clone() for name, value in m.state_dict().items()}) for m in models]
        self.before = {prompt: sample(self.pipeline, prompt, ROW_SAMPLING) for prompt in OLD_PROMPTS}
        rng = random.Random(99)  # make_base.py drew the training pictures with another seed.
        pairs = itertools.islice(zip(itertools.cycle(COLOURS), itertools.cycle(BACKGROUNDS)), HELD_OUT_PICTURES)
        records = [(CONCEPT, *pair) for pair in pairs]
        self.captions = [f"a {colour} {shape} on a {background} background" for shape, colour, background in records]
        pictures = np.stack([np.asarray(random_picture(record, rng)) for record in records])
        with torch.no_grad():
            encoded = self.pipeline.vae.encode(to_signal(torch.from_numpy(pictures).permute(0, 3, 1, 2)))
            self.latents = encoded.latent_dist.mean * self.pipeline.vae.config.scaling_factor

    @torch.no_grad()
    def held_out_loss(self) -> float:
        context, _ = self.pipeline.encode_prompt(self.captions, "cpu", 1, False)
        generator = torch.Generator().manual_seed(99)
        losses = []
        for timestep in HELD_OUT_TIMESTEPS:
            noise = torch.randn(self.latents.shape, generator=generator)
            timesteps = torch.full((len(noise),), timestep)
            noisy = self.pipeline.scheduler.add_noise(self.latents, noise, timesteps)
            losses.append(float((self.pipeline.unet(noisy, timesteps, context).sample - noise).square().mean()))
        return statistics.mean(losses)

    def apply(self, lora: Path) -> None:
        """Merge the LoRA into the models' weights, so that samples cost no more than the base model's."""
        for model, weights in self.untrained:
            model.load_state_dict(weights)
        tensors = load_file(lora)
        if any(".lokr_" in key for key in tensors):
            return merge_lokr(self.pipeline.unet, tensors)
        self.pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
        self.pipeline.fuse_lora()
        return self.pipeline.unload_lora_weights()  # type: ignore[no-any-return]  # The weights keep what was fused.

    def results(self, *, last: bool) -> JSON:
        """Measure the models as they are; the old prompts only after the last step, because samples cost the most."""
        new = [measure(sample(self.pipeline, prompt, ROW_SAMPLING), shape) for prompt, shape in ROW_PROMPTS.items()]
        result: JSON = {key: statistics.mean(one[key] for one in new) for key in ("closeness", "share")}
        result["held_out_loss"] = self.held_out_loss()
        if last:
            old = {prompt: sample(self.pipeline, prompt, ROW_SAMPLING) for prompt in OLD_PROMPTS}
            scores = [measure(old[prompt], shape)["closeness"] for prompt, shape in OLD_PROMPTS.items()]
            moved = [np.abs(np.subtract(old[p], self.before[p], dtype=float)).mean() for p in OLD_PROMPTS]
            result |= {"old_closeness": statistics.mean(scores), "old_change": float(np.mean(moved)) / 255}
        return result


def merge_lokr(unet: Any, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add scale * kron(w1, w2) to each module's weight (LyCORIS' keys; the scale is alpha / rank, 1 without a rank)."""
    modules = {"lora_unet_" + name.replace(".", "_"): module for name, module in unet.named_modules()}
    for stem in {key.partition(".")[0] for key in tensors}:
        part = {key.partition(".")[2]: value.float() for key, value in tensors.items() if key.startswith(f"{stem}.")}
        ranks = [part[name].shape[0] for name in ("lokr_w1_b", "lokr_w2_b") if name in part]
        w1, w2 = (
            part[name] if name in part else part[f"{name}_a"] @ part[f"{name}_b"].flatten(1)
            for name in ("lokr_w1", "lokr_w2")
        )
        weight = modules[stem].weight.data
        product = torch.kron(w1[(...,) + (None,) * (w2.ndim - 2)], w2).reshape(weight.shape)
        weight += product * (float(part["alpha"]) / ranks[0] if ranks else 1.0)


def train(row: str, seed: int, folder: Path) -> float:
    """Run the trainer to its end, and return the seconds per step where it was fastest."""
    keys = COMMON | QUIET | ROWS[row] | {"seed": seed, "output_path": str(folder)}
    command = [sys.executable, str(ROOT / "train_lora.py"), "--config", str(ROOT / "demo/config.json"), "--fresh"]
    command += [word for key, value in keys.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    events = [json.loads(line) for line in done.stdout.splitlines()]
    if done.returncode:
        raise RuntimeError(events[-1]["message"] if events else f"exit code {done.returncode}")
    return 1 / float(max(event["steps_per_second"] or 0 for event in events if event["type"] == "progress"))


def measure_row(judge: Judge, row: str, seed: int) -> JSON:
    """Train one row with one seed, and measure the LoRA files that it leaves."""
    by_step = {}
    with tempfile.TemporaryDirectory() as folder:
        seconds = train(row, seed, Path(folder))
        for step in MEASURED_STEPS:
            judge.apply(Path(folder, f"checkpoints/lora_step_{step}.safetensors"))
            by_step[str(step)] = judge.results(last=step == MEASURED_STEPS[-1])
    return {"row": row, "seed": seed, "by_step": by_step, "seconds_per_step": seconds}


def measure_rows(rows: Sequence[str], seeds: int) -> Iterator[JSON]:
    """Measure the untrained model, then seed by seed, so that an interrupted comparison leaves a whole table."""
    judge = Judge()
    yield {"row": UNTRAINED, "by_step": dict.fromkeys(map(str, MEASURED_STEPS), judge.results(last=True))}
    for seed, row in itertools.product(range(seeds), rows):
        yield measure_row(judge, row, seed)


# --- the table --------------------------------------------------------------------------------------------------------


def mean_and_deviation(values: Sequence[float], digits: int) -> str:
    text = f"{statistics.mean(values):.{digits}f}"
    return f"{text} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else text


def steps_to_enough(result: JSON, before: float) -> float | None:
    """Return the step at which the closeness passes ENOUGH, on straight lines from `before` at step 0."""
    points = [(0, before), *((int(step), at["closeness"]) for step, at in result["by_step"].items())]
    for (step, low), (next_step, high) in itertools.pairwise(points):
        if low < ENOUGH <= high:
            return float(step + (next_step - step) * (ENOUGH - low) / (high - low))
    return None


def table_row(results: Sequence[JSON], before: float) -> dict[str, str]:
    """Return one row of the table from its seeds' results; `before` is the untrained model's closeness."""
    last = str(MEASURED_STEPS[-1])

    def cell(key: str, step: str, digits: int, scale: float = 1) -> str:
        return mean_and_deviation([scale * result["by_step"][step][key] for result in results], digits)

    steps = [step for result in results if (step := steps_to_enough(result, before)) is not None]
    reached = mean_and_deviation(steps, 0) if len(steps) == len(results) else f"{len(steps)} of {len(results)} do"
    seconds = [result["seconds_per_step"] for result in results if "seconds_per_step" in result]
    return {
        **{f"closeness at {step}": cell("closeness", str(step), 2) for step in MEASURED_STEPS},
        f"steps to {ENOUGH}": reached if steps else f"> {last}",
        "share %": cell("share", last, 0, 100),
        "old prompts' closeness": cell("old_closeness", last, 2),
        "old prompts' change %": cell("old_change", last, 1, 100),
        "held-out loss * 1000": cell("held_out_loss", last, 1, 1000),
        "s/step": f"{min(seconds):.2f}" if seconds else "",
        "seeds": str(len(seconds) or ""),
    }


def table(results: Sequence[JSON]) -> str:
    by_row = {row: [result for result in results if result["row"] == row] for row in (UNTRAINED, *ROWS)}
    before = by_row[UNTRAINED][0]["by_step"][str(MEASURED_STEPS[0])]["closeness"]
    rows = {row: table_row(results, before) for row, results in by_row.items() if results}
    lines = [["row", *rows[UNTRAINED]], ["---"] * (1 + len(rows[UNTRAINED]))]
    lines += [[row, *cells.values()] for row, cells in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("lora", help="measure one LoRA of the demo")
    one.add_argument("file", type=Path, help="the .safetensors file")
    one.add_argument("--samples", type=int, default=32, help="samples per prompt (default 32)")
    one.add_argument("--steps", type=int, default=25, help="of the sampler (default 25)")
    rows = commands.add_parser("rows", help="train with each row's settings")
    rows.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS], metavar="ROW", help="default: all of ROWS")
    rows.add_argument("--seeds", type=int, default=3, help="seeds per row (default 3)")
    commands.add_parser("table", help="print the results as a table").add_argument("file", type=Path)
    options = parser.parse_args()
    if options.command == "lora":
        print(json.dumps(measure_lora(options.file, Sampling(options.samples, options.steps))))
    elif options.command == "table":
        print(table([json.loads(line) for line in options.file.read_text("utf-8").splitlines()]))
    else:
        for result in measure_rows(options.rows, options.seeds):
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
