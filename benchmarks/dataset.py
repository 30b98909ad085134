"""Measure what datasets cost: buckets' crops, checking many images, the cache's second run, hostile files' memory.

    python benchmarks/dataset.py [--images 1000 10000]

Needs Linux, no GPU and no download (it takes the demo's base model); prints one line per figure. Times depend on the
machine, so each line that compares two runs gives their ratio too.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import test_trainer as tests  # noqa: E402
import train_lora as trainer  # noqa: E402

PROGRAM = """
import sys
if sys.argv.pop(1) == "without torch":
    sys.modules["torch"] = None
import train_lora
code = train_lora.main(sys.argv[1:])
sys.stderr.write(open("/proc/self/status").read())  # getrusage tells of the parent's memory before the fork too
sys.exit(code)
"""


@dataclass(frozen=True)
class Measured:
    seconds: float
    peak_mb: float
    events: list[dict[str, Any]]


def measure(config: Path, *arguments: str, torch: bool) -> Measured:
    """Run the script to its end: wall time, peak resident memory, events."""
    command = [sys.executable, "-c", PROGRAM, "with torch" if torch else "without torch", "--config", str(config)]
    start = time.monotonic()
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True)
    seconds = time.monotonic() - start
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, events[-1]
    peak = re.search(r"VmHWM:\s+(\d+) kB", done.stderr)
    assert peak
    return Measured(seconds, int(peak[1]) / 1024, events)


def write_config(folder: Path, images: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    keys = {
        "dataset_path": str(images),
        "base_model": str(ROOT / "demo/base"),
        "output_path": str(folder / f"out_{time.monotonic_ns()}"),
        "trigger_words": ["zorb"],
        "steps": 1,
        "validation_steps": 0,
    }
    path.write_text(json.dumps(keys | changes), "utf-8")
    return path


def write_images(folder: Path, numbers: range) -> None:
    """Draw small images of their own content and size, a caption beside each."""
    for number in numbers:
        draw = random.Random(number)
        size = (draw.randrange(192, 384), draw.randrange(192, 384))
        image = Image.frombytes("RGB", (16, 16), draw.randbytes(768)).resize(size, Image.Resampling.BICUBIC)
        image.save(folder / f"{number}.jpg", quality=90)
        (folder / f"{number}.txt").write_text(f"a picture of number {number}", "utf-8")


def make_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    parts = [range(start, min(start + 500, count)) for start in range(0, count, 500)]
    with ProcessPoolExecutor() as pool:
        list(pool.map(write_images, [folder] * len(parts), parts))
    return folder


def compare_crops(count: int = 500, resolution: int = 1024) -> None:
    """Share of the pixels that are cut away, and of those trained on that are made up by upscaling."""
    examples = tests.random_examples(count)
    allowed = trainer.bucket_sizes(resolution, 64)
    square = (resolution, resolution)
    for name, sizes in {
        "buckets": [trainer.choose_bucket(example.width, example.height, allowed) for example in examples],
        "fixed square": [square] * count,
    }.items():
        pairs = list(zip(examples, sizes, strict=True))
        cropped = sum(trainer.cropped_share(example, size) for example, size in pairs) / count
        scales = [max(size[0] / example.width, size[1] / example.height) for example, size in pairs]
        made_up = sum(1 - 1 / scale**2 for scale in scales if scale > 1) / count
        print(f"{name}: {count} random sizes at {resolution}: {cropped:.1%} cropped away, {made_up:.1%} upscaled")


def check_many(folder: Path, counts: Sequence[int]) -> None:
    peaks = {}
    for count in counts:
        images = make_images(folder / str(count), count)
        done = measure(write_config(folder, images), "--validate-only", torch=False)
        assert done.events[-1]["dataset"]["images"] == count
        peaks[count] = done.peak_mb
        print(f"checking {count:,} images without torch: {done.seconds:.1f} s, peak {done.peak_mb:.0f} MB")
    if len(counts) > 1:
        growth = (peaks[counts[-1]] - peaks[counts[0]]) / (counts[-1] - counts[0])
        print(f"growth: {growth * 1024:.1f} kB per image")


def second_run(folder: Path, count: int = 300) -> None:
    images = make_images(folder / "cached", count)
    changes = {"cache_dir": str(folder / "cache"), "random_flip": True}

    def encoded(done: Measured) -> tuple[float, dict[str, int]]:
        told = [event for event in done.events if event["type"] == "info" and "total" in event]
        work = {event["message"]: event for event in told if event["message"].startswith("Encoding")}
        ready = next(event["elapsed"] for event in done.events if event.get("message") == "Loading the UNet.")
        begun = next(event["elapsed"] for event in done.events if event.get("message") == "Planning the run.")
        return ready - begun, {message: event["total"] for message, event in work.items()}

    first, work = encoded(measure(write_config(folder, images, **changes), torch=True))
    print(f"first run with cache_dir, {count} images both ways: {first:.1f} s to the UNet, {work}")
    second, work = encoded(measure(write_config(folder, images, **changes), torch=True))
    print(f"second run: {second:.1f} s, {work or 'nothing encoded'}; ratio {first / second:.1f}")
    write_images(images, range(1000, 1001))
    (images / "1000.jpg").replace(images / "0.jpg")
    changed, work = encoded(measure(write_config(folder, images, **changes), torch=True))
    print(f"one image changed: {changed:.1f} s, {work} (two views of it)")


def hostile_memory(folder: Path) -> None:
    hostile = folder / "hostile/images"
    hostile.parent.mkdir()
    bad = tests.make_hostile(hostile)
    calm = make_images(folder / "calm", 8)
    before = measure(write_config(folder, calm), "--validate-only", torch=False)
    after = measure(write_config(folder, hostile, masked_loss=True), "--validate-only", torch=False)
    told = {item["path"] for item in after.events[-1]["dataset"]["skipped"]}
    assert told == bad.keys()
    growth = after.peak_mb - before.peak_mb
    print(
        f"hostile set: {len(bad)} files and lines, {len(told)} reported, peak memory {growth:+.0f} MB over a calm set's"
    )
    large = folder / "large"
    large.mkdir()
    Image.new("RGB", (10_900, 11_000), "red").save(large / "large.jpg")
    Image.new("RGBA", (10_900, 11_000), (9, 9, 9, 9)).save(large / "large.png", compress_level=1)
    done = measure(write_config(folder, large), "--validate-only", torch=False)
    print(
        f"two images just under {trainer.MAX_PIXELS // 10**6} megapixels: peak {done.peak_mb - before.peak_mb:+.0f} MB"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[1000, 10_000])
    counts = parser.parse_args().images
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        compare_crops()
        hostile_memory(folder)
        second_run(folder)
        check_many(folder, counts)


if __name__ == "__main__":
    main()
