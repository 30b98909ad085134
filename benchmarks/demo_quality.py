"""Measure what the demo's LoRA taught: how close are samples to the new concept, and are old prompts still right?

    python benchmarks/demo_quality.py --lora demo/output/lora_final.safetensors --picture before_after.png

For two prompts of the new concept and for two old prompts, samples are drawn with and without the LoRA from the same
starting noise. Each sample is measured in three steps:

1.  The background is the median colour of the picture's border. A pixel belongs to the figure if its colour's distance
    from the background is more than half of the figure's typical distance (the 95th percentile of all distances above
    40 of 255). That puts the outline in the middle of its blur.
2.  The figure's mask is cut out at its bounding box, centred in a square (so that its proportions stay) and scaled to
    48x48 pixels. That takes out position and size, which no prompt names.
3.  The mask's closeness to a shape is its intersection over union (IoU) with the mask of that shape as the demo's own
    drawing function draws it. An empty picture has a closeness of 0 to every shape.

``closeness`` is the mean IoU with the shape that the prompt names (1 is a perfect drawing; the six old shapes' own
drawings have an IoU of 0.34 to 0.63 with the concept's). ``share`` is the part of the samples whose closest shape of
all seven is the one named, and ``share_colour`` the part where, besides, the named colour is of the eight the nearest
to the figure's median colour. One JSON object goes to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "demo"))

from make_base import ALL_SHAPES, COLOURS, CONCEPT, draw  # noqa: E402

Array = np.ndarray[Any, Any]
MASK_SIZE = 48


def find_figure(picture: Array) -> Array:
    """Mask of the pixels that aren't background (uint8 HWC in, bool HW out)."""
    pixels = picture.astype(np.float64)
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    distance = np.linalg.norm(pixels - np.median(border, axis=0), axis=-1)
    clear = distance[distance > 40]
    if not clear.size:
        return np.zeros(distance.shape, dtype=bool)
    return np.asarray(distance > max(40.0, 0.5 * float(np.percentile(clear, 95))))


def normalise(mask: Array) -> Array:
    """Cut the figure out and scale it, without stretching, to a square of ``MASK_SIZE``."""
    rows, columns = np.nonzero(mask)
    if not rows.size:
        return np.zeros((MASK_SIZE, MASK_SIZE), dtype=bool)
    cut = mask[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    side = max(cut.shape)
    square = np.zeros((side, side), dtype=np.uint8)
    top, left = (side - cut.shape[0]) // 2, (side - cut.shape[1]) // 2
    square[top : top + cut.shape[0], left : left + cut.shape[1]] = cut * np.uint8(255)
    scaled = Image.fromarray(square).resize((MASK_SIZE, MASK_SIZE), Image.Resampling.BILINEAR)
    return np.asarray(scaled) > 127


def templates() -> dict[str, Array]:
    """The normalised mask of every shape, drawn large in the demo's own way."""
    pictures = {shape: draw(shape, (255, 255, 255), (0, 0, 0), (128, 128), 100, 256) for shape in ALL_SHAPES}
    return {shape: normalise(find_figure(np.asarray(picture))) for shape, picture in pictures.items()}


def iou(a: Array, b: Array) -> float:
    union = int((a | b).sum())
    return int((a & b).sum()) / union if union else 0.0


def measure(pictures: list[Array], shape: str, colour: str) -> dict[str, float]:
    """Closeness to the named shape with its standard error, and the shares of right shapes and colours."""
    masks = templates()
    palette = np.array(list(COLOURS.values()), dtype=np.float64)
    closeness, right_shape, right_both = [], [], []
    for picture in pictures:
        figure = find_figure(picture)
        scores = {name: iou(normalise(figure), mask) for name, mask in masks.items()}
        closeness.append(scores[shape])
        right_shape.append(bool(figure.any()) and max(scores, key=scores.__getitem__) == shape)
        nearest = ""
        if figure.any():
            middle = np.median(picture[figure].astype(np.float64), axis=0)
            nearest = list(COLOURS)[int(np.linalg.norm(palette - middle, axis=1).argmin())]
        right_both.append(right_shape[-1] and nearest == colour)
    error = float(np.std(closeness, ddof=1) / np.sqrt(len(closeness))) if len(closeness) > 1 else 0.0
    return {
        "closeness": round(float(np.mean(closeness)), 4),
        "std_error": round(error, 4),
        "share": round(float(np.mean(right_shape)), 4),
        "share_colour": round(float(np.mean(right_both)), 4),
    }


def sample(pipeline: Any, prompt: str, args: argparse.Namespace) -> list[Array]:
    """Draw ``args.samples`` pictures; sample number i always starts from the noise of seed i."""
    pictures: list[Array] = []
    for start in range(0, args.samples, args.batch_size):
        seeds = range(args.seed + start, args.seed + min(start + args.batch_size, args.samples))
        output = pipeline(
            [prompt] * len(seeds),
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        )
        pictures += list((output.images * 255).round().astype(np.uint8))
    return pictures


def draw_grid(
    samples: dict[str, dict[str, list[Array]]], training: list[Path], columns: list[int], margin: int = 56
) -> Image.Image:
    """Rows: before and after (and the training pictures, if given); a group of columns, with its prompt, per prompt."""
    groups = list(zip(next(iter(samples.values())), columns, strict=True))
    cell, gap, label, zoom = 64, 2, 14, 2
    width = margin + sum(n * (cell + gap) + 6 for _, n in groups)
    rows = len(samples) + bool(training)
    grid = Image.new("RGB", (width * zoom, (label + rows * (cell + gap)) * zoom), "white")
    pen = ImageDraw.Draw(grid)

    def paste(picture: Image.Image, x: int, row: int) -> None:
        place = (x * zoom, (label + row * (cell + gap)) * zoom)
        grid.paste(picture.convert("RGB").resize((cell * zoom, cell * zoom), Image.Resampling.NEAREST), place)

    for row, (name, by_prompt) in enumerate(samples.items()):
        pen.text((6, (label + row * (cell + gap) + cell // 2) * zoom), name, fill="black", font_size=22)
        x = margin
        for prompt, count in groups:
            if row == 0:
                pen.text((x * zoom, 2), prompt, fill="black", font_size=20)
            for number in range(count):
                paste(Image.fromarray(by_prompt[prompt][number]), x + number * (cell + gap), row)
            x += count * (cell + gap) + 6
    if training:
        middle = (label + len(samples) * (cell + gap) + cell // 2) * zoom
        pen.text((6, middle), "trained on", fill="black", font_size=22)
        for number, path in enumerate(training[: (width - margin) // (cell + gap)]):
            with Image.open(path) as picture:
                paste(picture, margin + number * (cell + gap), len(samples))
    return grid


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", type=Path, default=ROOT / "demo" / "base")
    parser.add_argument("--lora", type=Path, required=True, help="the LoRA's .safetensors file")
    parser.add_argument("--images", type=Path, help="the training pictures, only to show them in --picture")
    parser.add_argument("--samples", type=int, default=32, help="samples per prompt (default 32)")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance-scale", type=float, default=4.0)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--picture", type=Path, help="write a grid of samples before and after to this file")
    args = parser.parse_args(argv)

    pairs = [(CONCEPT, "red"), (CONCEPT, "blue"), ("circle", "red"), ("square", "blue")]
    named = {f"a {colour} {shape}": (shape, colour) for shape, colour in pairs}
    sd: Any = diffusers  # typed in part only: its classes can't be called from typed code otherwise
    pipeline = sd.StableDiffusionPipeline.from_pretrained(args.base, torch_dtype=torch.float32)
    pipeline.scheduler = sd.DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    samples = {"before": {prompt: sample(pipeline, prompt, args) for prompt in named}}
    pipeline.load_lora_weights(args.lora.parent, weight_name=args.lora.name)
    samples["after"] = {prompt: sample(pipeline, prompt, args) for prompt in named}

    prompts = {
        prompt: {when: measure(by_prompt[prompt], *named[prompt]) for when, by_prompt in samples.items()}
        for prompt in named
    }
    settings = {"samples": args.samples, "steps": args.steps, "guidance_scale": args.guidance_scale, "seed": args.seed}
    print(json.dumps({**settings, "prompts": prompts}, indent=2))
    if args.picture:
        training = sorted(args.images.glob("*.png")) if args.images else []
        draw_grid(samples, training, [min(n, args.samples) for n in (4, 4, 3, 3)]).save(args.picture)


if __name__ == "__main__":
    main()
