"""How well does a LoRA know the demo's concept, and which settings teach it best? On the CPU, with demo/base.

    python benchmarks/quality.py lora demo/output/lora_final.safetensors [--samples 32]
    python benchmarks/quality.py rows [--rows base snr_gamma=5] [--seeds 3] >> quality.jsonl
    python benchmarks/quality.py table quality.jsonl
    python benchmarks/quality.py concepts [--seeds 3]
    python benchmarks/quality.py methods lessons.jsonl [--methods plain "class preservation"] [--lessons zorb]

`lora` draws samples with and without a LoRA from the same noise, and prints one JSON object. `rows` trains the demo's
config once per row of ROWS and seed (a minute each), measures the LoRA files, and prints one JSON object per run.
`table` makes the table of docs/defaults.md from these. `concepts` teaches two words at once, with and without the key
of this name, puts a table into the same page, and leaves pictures, LoRA files and samples in CONCEPTS_OUTPUT. `methods`
teaches a shape and a texture with each of METHODS, at three rates, and measures what is forgotten at equal likeness.

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
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "demo"), str(ROOT / "benchmarks")]

from make_base import ALL_SHAPES, BACKGROUNDS, COLOURS, CONCEPT, draw, random_picture, to_signal  # noqa: E402
from make_base import SHAPES as OLD_SHAPES  # noqa: E402
from models import JSON, put_table, table  # noqa: E402
from speed import run_script  # noqa: E402

Array = np.ndarray[Any, Any]
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


def measure(pictures: Sequence[Array], shape: str) -> dict[str, float]:
    """Return the mean closeness to the named shape, and the share of samples to which no other shape is closer."""
    figures = [normalised(find_figure(picture)) for picture in pictures]
    masks = templates().items()
    scores = [{name: float((one & mask).sum() / (one | mask).sum()) for name, mask in masks} for one in figures]
    is_right = [score[shape] > 0 and max(score, key=score.__getitem__) == shape for score in scores]
    closeness = statistics.mean(score[shape] for score in scores)
    return {"closeness": round(closeness, 4), "share": round(sum(is_right) / len(is_right), 4)}


# --- one LoRA ---------------------------------------------------------------------------------------------------------


def load_pipeline(lora: Path | None = None) -> Any:
    """Load the demo's base model, with a LoRA if one is given."""
    owner: Any = diffusers.StableDiffusionPipeline
    pipeline = owner.from_pretrained(ROOT / "demo/base", dtype=torch.float32)
    scheduler: Any = diffusers.DDIMScheduler
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    tensors = load_file(lora) if lora else {}
    if any(".lokr_" in key for key in tensors):
        merge_lokr(pipeline.unet, tensors)
    elif lora:
        pipeline.load_lora_weights(lora.parent, weight_name=lora.name)
    return pipeline


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


def sample(pipeline: Any, prompts: Iterable[str], samples: int, steps: int) -> dict[str, list[Array]]:
    """Draw samples of each prompt; sample number i always starts from the same noise."""
    pictures = {}
    for prompt in prompts:
        generators = [torch.Generator().manual_seed(1000 + number) for number in range(samples)]
        options = {"num_inference_steps": steps, "guidance_scale": 4.0, "output_type": "np"}
        images = pipeline([prompt] * samples, generator=generators, **options).images
        pictures[prompt] = list((images * 255).round().astype(np.uint8))
    return pictures


def measure_lora(lora: Path, samples: int, steps: int) -> JSON:
    named = NEW_PROMPTS | OLD_PROMPTS
    before, after = (sample(load_pipeline(file), named, samples, steps) for file in (None, lora))
    prompts = {
        prompt: {"before": measure(before[prompt], shape), "after": measure(after[prompt], shape)}
        for prompt, shape in named.items()
    }
    return {"samples": samples, "steps": steps, "prompts": prompts}


# --- rows: training with changed settings -----------------------------------------------------------------------------

MEASURED_STEPS = (50, 100, 200)
RANK = 8  # the demo's
RATE = 2e-3  # twice the demo's, because steps and batch are half of its
COMMON: JSON = {"steps": MEASURED_STEPS[-1], "checkpoint_steps": 50, "batch_size": 2, "learning_rate": RATE}
COMMON |= {"validation_steps": 0, "sample_at_start": False, "autosave_minutes": 0, "log_steps": 25}
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
ROW_SAMPLING = (10, 6)  # samples per prompt, and the sampler's steps
HELD_OUT_PICTURES = 12
HELD_OUT_TIMESTEPS = (125, 375, 625, 875)
ENOUGH = 0.6  # the closeness whose step the table has


@functools.cache
def old_samples() -> dict[str, list[Array]]:
    """Return what the base model draws for the old prompts."""
    return sample(load_pipeline(), OLD_PROMPTS, *ROW_SAMPLING)


def old_change(drawn: Mapping[str, Sequence[Array]]) -> float:
    """Return how far the pixels of old prompts moved from what the base model draws, 0 to 1."""
    moved = [np.abs(np.subtract(drawn[old], old_samples()[old], dtype=float)).mean() for old in OLD_PROMPTS]
    return float(np.mean(moved)) / 255


@functools.cache
def held_out() -> tuple[list[str], torch.Tensor]:
    """Return captions and latents of pictures that no row trains with."""
    rng = random.Random(99)  # make_base.py drew the training pictures with another seed.
    pairs = itertools.islice(zip(itertools.cycle(COLOURS), itertools.cycle(BACKGROUNDS)), HELD_OUT_PICTURES)
    records = [(CONCEPT, *pair) for pair in pairs]
    pictures = np.stack([np.asarray(random_picture(record, rng)) for record in records])
    vae = load_pipeline().vae
    with torch.no_grad():
        latents = vae.encode(to_signal(torch.from_numpy(pictures).permute(0, 3, 1, 2))).latent_dist.mean
    captions = [f"a {colour} {shape} on a {background} background" for shape, colour, background in records]
    return captions, latents * vae.config.scaling_factor


@torch.no_grad()
def held_out_loss(pipeline: Any) -> float:
    captions, latents = held_out()
    context, _ = pipeline.encode_prompt(captions, "cpu", 1, False)
    generator = torch.Generator().manual_seed(99)
    losses = []
    for timestep in HELD_OUT_TIMESTEPS:
        noise = torch.randn(latents.shape, generator=generator)
        timesteps = torch.full((len(noise),), timestep)
        noisy = pipeline.scheduler.add_noise(latents, noise, timesteps)
        losses.append(float((pipeline.unet(noisy, timesteps, context).sample - noise).square().mean()))
    return statistics.mean(losses)


def measure_model(lora: Path | None) -> JSON:
    """Measure the base model with or without a LoRA."""
    pipeline, named = load_pipeline(lora), ROW_PROMPTS | OLD_PROMPTS
    drawn = sample(pipeline, named, *ROW_SAMPLING)
    scores = {prompt: measure(drawn[prompt], shape) for prompt, shape in named.items()}
    return {
        "closeness": statistics.mean(scores[prompt]["closeness"] for prompt in ROW_PROMPTS),
        "share": statistics.mean(scores[prompt]["share"] for prompt in ROW_PROMPTS),
        "old_closeness": statistics.mean(scores[prompt]["closeness"] for prompt in OLD_PROMPTS),
        "old_change": old_change(drawn),
        "held_out_loss": held_out_loss(pipeline),
    }


def train_demo(keys: JSON) -> list[JSON]:
    """Train the demo's config with changed keys; return the events."""
    words = [word for key, value in keys.items() for word in ("--set", f"{key}={json.dumps(value)}")]
    return run_script(ROOT / "demo/config.json", "--fresh", *words)[0]


def measure_row(row: str, seed: int) -> JSON:
    """Train one row with one seed, and measure the LoRA files that it leaves."""
    with tempfile.TemporaryDirectory() as folder:
        events = train_demo(COMMON | ROWS[row] | {"seed": seed, "output_path": folder})
        files = {step: Path(folder, f"checkpoints/lora_step_{step}.safetensors") for step in MEASURED_STEPS}
        by_step = {str(step): measure_model(file) for step, file in files.items()}
    fastest = max(event["steps_per_second"] or 0 for event in events if event["type"] == "progress")
    return {"row": row, "seed": seed, "by_step": by_step, "seconds_per_step": 1 / fastest}


def measure_rows(rows: Sequence[str], seeds: int) -> Iterator[JSON]:
    """Measure the untrained model, then seed by seed, so that an interrupted comparison leaves a whole table."""
    yield {"row": UNTRAINED, "by_step": dict.fromkeys(map(str, MEASURED_STEPS), measure_model(None))}
    yield from (measure_row(row, seed) for seed, row in itertools.product(range(seeds), rows))


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


def quality_table(results: Sequence[JSON]) -> str:
    by_row = {row: [result for result in results if result["row"] == row] for row in (UNTRAINED, *ROWS)}
    before = by_row[UNTRAINED][0]["by_step"][str(MEASURED_STEPS[0])]["closeness"]
    rows = {row: table_row(results, before) for row, results in by_row.items() if results}
    return table(["row", *rows[UNTRAINED]], ([row, *cells.values()] for row, cells in rows.items()))


# --- two concepts in one run ------------------------------------------------------------------------------------------

WORDS = (CONCEPT, "blick")  # The base's text encoder tells few invented words from CONCEPT, but this one.
HOURGLASS = [(-0.9, -1.0), (0.9, -1.0), (0.2, 0.0), (0.9, 1.0), (-0.9, 1.0), (-0.2, 0.0)]  # the second word's shape
CONCEPTS_OUTPUT = ROOT / "demo/output/concepts"
CASES: dict[str, JSON] = {
    "with concepts": {"concepts": [{"folder": word, "trigger_words": [word]} for word in WORDS]},
    "without": {},
}
TWO_WORDS: JSON = {"dataset_path": str(CONCEPTS_OUTPUT / "images"), "trigger_words": WORDS, "steps": 600}
TWO_WORDS |= ROWS["targets=all"] | ROWS["snr_gamma=1"]  # These rows need the fewest steps to learn a shape.
TWO_WORDS |= {"validation_steps": 0, "sample_at_start": False}
PROMPT_FORMS = ("{word}, a {colour} shape", "a {colour} {word}")  # The captions in training have the first form.
WORD_SAMPLING = (16, 12)  # samples per prompt, and the sampler's steps


def write_two_concepts(folder: Path) -> None:
    """Write the demo's pictures and as many hourglasses in the same colours, with captions that have neither word."""
    rng = random.Random(8)
    for word, file in itertools.product(WORDS, sorted((ROOT / "demo/images").glob("*.txt"))):
        caption = file.read_text("utf-8")
        _, colour, _, _, _, background, _ = caption.split()  # a red zorb on a white background
        target = folder / word / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(caption.replace(CONCEPT, "shape"), "utf-8")
        demo = Image.open(file.with_suffix(".png"))
        picture = demo if word == CONCEPT else random_picture((word, colour, background), rng)
        picture.save(target.with_suffix(".png"))


def measure_words(pipeline: Any, form: str, output: Path) -> list[float]:
    """Return, word by word, how many percent of the samples show its shape, and how many the other word's."""
    shares = []
    for word, other in (WORDS, WORDS[::-1]):
        prompts = [form.format(word=word, colour=colour) for colour in ("red", "blue")]
        rows = [*sample(pipeline, prompts, *WORD_SAMPLING).values()]
        Image.fromarray(np.vstack([np.hstack(row) for row in rows])).save(output / f"{prompts[0]}.png")
        shares += [100 * measure([*itertools.chain(*rows)], shape)["share"] for shape in (word, other)]
    return shares


def compare_concepts(seeds: int) -> str:
    ALL_SHAPES[WORDS[1]] = lambda: HOURGLASS
    write_two_concepts(CONCEPTS_OUTPUT / "images")
    results: dict[tuple[str, str], list[list[float]]] = {key: [] for key in itertools.product(CASES, PROMPT_FORMS)}
    for seed, case in itertools.product(range(seeds), CASES):
        output = CONCEPTS_OUTPUT / f"{case} {seed}"
        events = train_demo(TWO_WORDS | CASES[case] | {"seed": seed, "output_path": str(output)})
        pipeline = load_pipeline(Path(events[-1]["final_path"]))
        for form in PROMPT_FORMS:
            results[case, form].append(measure_words(pipeline, form, output))
    head = ["config", "prompt", *(f"{word}: {what} %" for word in WORDS for what in ("its shape", "the other's"))]
    columns = {key: zip(*runs, strict=True) for key, runs in results.items()}
    rows = ([*key, *(mean_and_deviation(shares, 0) for shares in cells)] for key, cells in columns.items())
    return table(head, rows)


# --- what a LoRA forgets ----------------------------------------------------------------------------------------------

LESSONS_OUTPUT = ROOT / "demo/output/lessons"
STRIPED, PERIOD = "blick", 16  # the second lesson's word, and its stripes' period in pixels
LIKENESSES = {CONCEPT: (0.7, 0.8), STRIPED: (0.5, 0.6)}  # What is forgotten is read off where a LoRA shows this much.
RATES = (1e-3, 2e-3, 4e-3)
# The class words are words that the base knows; it tells unknown ones apart with difficulty.
LESSONS: dict[str, JSON] = {
    CONCEPT: {"dataset_path": str(ROOT / "demo/images"), "class_words": "circle", "steps": 300},
    STRIPED: {"dataset_path": str(LESSONS_OUTPUT / "images"), "class_words": "small", "steps": 600},
}
LESSON_PROMPTS = {CONCEPT: [*NEW_PROMPTS], STRIPED: [f"a red {STRIPED} circle", f"a blue {STRIPED} square"]}
REGULARIZATION: JSON = {"regularization_path": str(LESSONS_OUTPUT / "regularization")}
TO_BASE = REGULARIZATION | {"regularization_target": "base"}
METHODS: dict[str, JSON] = {
    "plain": {},
    "regularization images": REGULARIZATION,
    "regularization to base": TO_BASE,
    "class preservation": {"class_preservation_weight": 1.0},
    "change penalty 0.001": {"change_penalty": 0.001},
    "change penalty 0.0001": {"change_penalty": 0.0001},
    "class preservation and penalty": {"class_preservation_weight": 1.0, "change_penalty": 0.0001},
    "rank 4": {"lora_rank": 4},
    "rank 16": {"lora_rank": 16},
    "text encoder": ROWS["text_encoder"],
    "lokr": {"lora_type": "lokr"},
}


def stripe(picture: Image.Image, rng: random.Random) -> Image.Image:
    """Cut stripes of background into a figure; the base's autoencoder draws such stripes, but no darker ones."""
    pixels = np.array(picture)
    columns = (np.arange(pixels.shape[1]) + rng.randrange(PERIOD)) % PERIOD < PERIOD // 2
    pixels[:, columns] = pixels[0, 0]
    return Image.fromarray(pixels)


def write_lessons() -> None:
    """Write ten striped figures of all old shapes, and twenty plain ones as regularization images."""
    rng = random.Random(9)
    old = [*itertools.islice(itertools.cycle(OLD_SHAPES), 30)]
    for number, (shape, colour) in enumerate(zip(old, itertools.cycle(COLOURS), strict=False)):
        background = rng.choice(["white", "black"])
        picture, words = random_picture((shape, colour, background), rng), f"{colour} {shape}"
        if number < 10:
            picture, words = stripe(picture, rng), f"{colour} {STRIPED} {shape}"
        file = LESSONS_OUTPUT / ("images" if number < 10 else "regularization") / f"{number:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        picture.save(file)
        file.with_suffix(".txt").write_text(f"a {words} on a {background} background", "utf-8")


def stripes(picture: Array) -> float:
    """Return the amplitude of the stripes' wave along a figure, 0 to about 0.64, in the rows of its middle half."""
    pixels = picture.astype(np.float64)
    distance = np.linalg.norm(pixels - np.median(pixels[[0, -1]].reshape(-1, 3), axis=0), axis=-1)
    rows, columns = np.nonzero(find_figure(picture))
    if not rows.size or np.ptp(columns) < PERIOD:
        return 0.0
    top, bottom = (round(np.quantile(rows, share)) for share in (0.25, 0.75))
    profile = distance[top : bottom + 1, columns.min() : columns.max() + 1].mean(axis=0)
    wave = np.exp(2j * np.pi * np.arange(len(profile)) / PERIOD)
    return float(2 * abs((profile / profile.max() * wave).mean()))


@functools.cache
def full_stripes() -> float:
    """Return the stripes of the training pictures, as the base's autoencoder draws them."""
    files = sorted((LESSONS_OUTPUT / "images").glob("*.png"))
    pixels = torch.from_numpy(np.stack([np.array(Image.open(file)) for file in files])).permute(0, 3, 1, 2)
    vae = load_pipeline().vae
    with torch.no_grad():
        drawn = vae.decode(vae.encode(to_signal(pixels)).latent_dist.mean).sample / 2 + 0.5
    pictures = (drawn.clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    return statistics.mean(stripes(picture) for picture in pictures)


def likeness(lesson: str, pictures: Sequence[Array]) -> float:
    """Return how much of the lesson the pictures show: the closeness to the shape, or the share of the stripes."""
    if lesson == CONCEPT:
        return measure(pictures, CONCEPT)["closeness"]
    return statistics.mean(min(1.0, stripes(picture) / full_stripes()) for picture in pictures)


def measure_lesson(lesson: str, lora: Path | None) -> JSON:
    pipeline, prompts = load_pipeline(lora), LESSON_PROMPTS[lesson]
    drawn = sample(pipeline, [*prompts, *OLD_PROMPTS], *ROW_SAMPLING)
    shown, leaked = (
        likeness(lesson, [picture for prompt in some for picture in drawn[prompt]]) for some in (prompts, OLD_PROMPTS)
    )
    return {
        "likeness": shown,
        "leaked": leaked,
        "old share": statistics.mean(measure(drawn[old], shape)["share"] for old, shape in OLD_PROMPTS.items()),
        "old change": old_change(drawn),
    }


def measure_method(lesson: str, method: str, rate: float, seed: int) -> JSON:
    """Train one lesson, and measure what the LoRA knows and has forgotten, up to the checkpoint that knows enough."""
    keys: JSON = {"learning_rate": rate, "seed": seed, "trigger_words": [lesson], "batch_size": 2, "log_steps": 25}
    keys |= {"checkpoint_steps": 50, "validation_steps": 50, "sample_prompts": ["a red circle"], "sample_steps": 1}
    keys |= {"autosave_minutes": 0, "sample_at_start": False, "lora_targets": "all", "snr_gamma": 1.0}
    keys |= LESSONS[lesson] | METHODS[method]
    if keys.get("train_text_encoder"):
        keys["text_encoder_learning_rate"] = rate / 2
    if keys.get("regularization_path"):  # Half of what trains are then regularization images.
        keys["steps"] = keys["steps"] * 3 // 2
    with tempfile.TemporaryDirectory() as folder:
        events = train_demo(keys | {"output_path": folder})
        drifts = {event["step"]: event["drift"] for event in events if event["type"] == "validation"}
        by_step: list[JSON] = []
        for step, drift in drifts.items():
            measured = measure_lesson(lesson, Path(folder, f"checkpoints/lora_step_{step}.safetensors"))
            by_step.append({"step": step, "drift": drift} | measured)
            if measured["likeness"] >= max(LIKENESSES[lesson]):
                break
    return {"lesson": lesson, "method": method, "rate": rate, "seed": seed, "by_step": by_step}


def at_likeness(result: JSON, wanted: float) -> JSON | None:
    """Return what a run measured where its likeness first passes `wanted`, on straight lines between checkpoints."""
    start = measured_untrained(result["lesson"])
    for before, after in itertools.pairwise([start, *result["by_step"]]):
        if before["likeness"] < wanted <= after["likeness"]:
            part = (wanted - before["likeness"]) / (after["likeness"] - before["likeness"])
            return {key: before[key] + part * (after[key] - before[key]) for key in after}
    return None


@functools.cache
def measured_untrained(lesson: str) -> JSON:
    return {"step": 0, "drift": 0.0} | measure_lesson(lesson, None)


def best_rate(results: Sequence[JSON]) -> float:
    """Return the rate that leaves most old prompts right at the higher likeness that any of them reaches."""
    for wanted in reversed(LIKENESSES[results[0]["lesson"]]):
        reached = [(-at["old share"], result["rate"]) for result in results if (at := at_likeness(result, wanted))]
        if reached:
            return float(min(reached)[1])
    return float(max(results, key=lambda result: result["by_step"][-1]["likeness"])["rate"])


def compare_methods(
    file: Path, lessons: Sequence[str], methods: Sequence[str], rates: Sequence[float], seeds: int
) -> None:
    """Measure what the file lacks, and add it: every rate with the first seed, and the best one with the others."""
    write_lessons()
    done = [json.loads(line) for line in file.read_text("utf-8").splitlines()] if file.exists() else []

    def results(lesson: str, method: str, rates: Sequence[float], seed: int) -> list[JSON]:
        found = []
        for rate in rates:
            key = {"lesson": lesson, "method": method, "rate": rate, "seed": seed}
            result = next((row for row in done if key.items() <= row.items()), None)
            if result is None:
                result = measure_method(lesson, method, rate, seed)
                with file.open("a", encoding="utf-8") as output:
                    output.write(json.dumps(result) + "\n")
            found.append(result)
        return found

    for lesson, method in itertools.product(lessons, methods):
        best = best_rate(results(lesson, method, rates, 0))
        for seed in range(1, seeds):
            results(lesson, method, [best], seed)


FORGOTTEN = {  # Each column has what it is read from, its digits and its factor.
    "step": ("step", 0, 1),
    "old prompts right %": ("old share", 0, 100),
    "old prompts' change %": ("old change", 1, 100),
    "drift %": ("drift", 1, 100),
}
# Stripes in a circle leave it a circle, so they have a column of their own.
LEAKED = {"stripes in old prompts %": ("leaked", 0, 100)}


def lessons_table(results: Sequence[JSON], lesson: str) -> str:
    """Return a row per method, at its best rate: what its runs have forgotten at each likeness."""
    head, rows = ["method", "rate", "seeds"], []
    columns = FORGOTTEN | (LEAKED if lesson == STRIPED else {})
    head += [f"{column} at {wanted}" for wanted in LIKENESSES[lesson] for column in columns]
    for method in METHODS:
        own = [result for result in results if (result["lesson"], result["method"]) == (lesson, method)]
        first = [result for result in own if result["seed"] == 0]
        if not first:
            continue
        rate = best_rate(first)
        runs = [result for result in own if result["rate"] == rate]
        cells = [method, f"{rate:g}", str(len(runs))]
        for wanted in LIKENESSES[lesson]:
            reached = [at for run in runs if (at := at_likeness(run, wanted))]
            for key, digits, scale in columns.values():
                text = mean_and_deviation([scale * at[key] for at in reached], digits) if reached else "-"
                some = key == "step" and 0 < len(reached) < len(runs)
                cells.append(f"{text} ({len(reached)} of {len(runs)})" if some else text)
        rows.append(cells)
    return table(head, rows)


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
    concepts = commands.add_parser("concepts", help="teach two words at once")
    concepts.add_argument("--seeds", type=int, default=3, help="runs per row (default 3)")
    methods = commands.add_parser("methods", help="measure what each method forgets, and write the tables")
    methods.add_argument("file", type=Path, help="results go here; what it has already is not measured again")
    methods.add_argument("--methods", nargs="*", choices=METHODS, default=[*METHODS], metavar="METHOD")
    methods.add_argument("--lessons", nargs="+", choices=LESSONS, default=[*LESSONS])
    methods.add_argument("--rates", nargs="+", type=float, default=RATES, help="tried with the first seed")
    methods.add_argument("--seeds", type=int, default=3, help="runs per row (default 3)")
    commands.add_parser("table", help="print the results as a table").add_argument("file", type=Path)
    options = parser.parse_args()
    if options.command == "lora":
        print(json.dumps(measure_lora(options.file, options.samples, options.steps)))
    elif options.command == "table":
        print(quality_table([json.loads(line) for line in options.file.read_text("utf-8").splitlines()]))
    else:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # The runs inherit it.
        if options.command == "methods":
            compare_methods(options.file, options.lessons, options.methods, options.rates, options.seeds)
            results = [json.loads(line) for line in options.file.read_text("utf-8").splitlines()]
            for lesson in LESSONS:
                put_table(ROOT / "docs/defaults.md", f"lesson {lesson}", lessons_table(results, lesson))
        elif options.command == "concepts":
            text = compare_concepts(options.seeds)
            put_table(ROOT / "docs/defaults.md", "two concepts", text)
            print(text)
        else:
            for result in measure_rows(options.rows, options.seeds):
                print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
