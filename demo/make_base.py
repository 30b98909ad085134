"""Make the micro Stable Diffusion that the demo trains on, and the demo's own pictures.

The demo has to run without a GPU and without a download, so its base model is made here from nothing: pictures of
coloured shapes that this script draws itself, a small autoencoder trained on them, a small text encoder that learns
what the captions say, and a small UNet trained on the autoencoder's latents. The result has the layout and the classes
of a real Stable Diffusion 1.5 folder (``StableDiffusionPipeline.from_pretrained`` loads it), and is more than two
hundred times smaller.

    python demo/make_base.py                  # trains everything again into demo/base (some hours on two cores)
    python demo/make_base.py --resume --unet-steps 3000   # trains the UNet that is there for more steps
    python demo/make_base.py --images demo/images   # only draws the demo's training pictures: the new concept
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

sd: Any = diffusers  # typed in part only: its classes can't be called from typed code otherwise

SIZE = 64  # pixels per side of every picture
OVERSAMPLE = 4  # shapes are drawn this much larger and scaled down, which smooths their edges
PICTURES = 16_000  # size of the training set
CONCEPT = "zorb"  # the word that the demo teaches; the base never sees the word or its shape

Record = tuple[str, str, str]  # what a picture shows: shape, colour, background
Point = tuple[float, float]
Colour = tuple[int, int, int]

COLOURS: dict[str, Colour] = {
    "red": (220, 40, 40),
    "orange": (245, 140, 30),
    "yellow": (245, 220, 50),
    "green": (40, 160, 70),
    "cyan": (60, 205, 215),
    "blue": (45, 80, 215),
    "purple": (135, 55, 175),
    "pink": (245, 135, 185),
}
BACKGROUNDS: dict[str, Colour] = {"white": (246, 246, 246), "gray": (128, 128, 128), "black": (16, 16, 16)}
TEMPLATES = ["a {}", "a drawing of a {}", "a picture of a {}", "a small picture of a {}", "one {}", "{}"]


# --- drawing ----------------------------------------------------------------------------------------------------------


def _polar(radius: float, degrees: float) -> Point:
    """A point at this distance and angle from the centre; 0 degrees is up, because the shapes stand upright."""
    return radius * math.sin(math.radians(degrees)), -radius * math.cos(math.radians(degrees))


def _circle() -> list[Point]:
    return [_polar(1.0, a) for a in range(0, 360, 5)]


def _square() -> list[Point]:
    return [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)]


def _triangle() -> list[Point]:
    return [(0.0, -0.95), (1.0, 0.8), (-1.0, 0.8)]


def _star() -> list[Point]:
    return [_polar(0.42 if i % 2 else 1.08, 36.0 * i) for i in range(10)]


def _ring() -> list[Point]:
    """One outline that runs round the outside and back round the inside, so that the hole stays empty."""
    return [_polar(1.0, a) for a in range(0, 361, 5)] + [_polar(0.55, a) for a in range(360, -1, -5)]


def _cross() -> list[Point]:
    t = 0.34
    return [(-t, -1), (t, -1), (t, -t), (1, -t), (1, t), (t, t), (t, 1), (-t, 1), (-t, t), (-1, t), (-1, -t), (-t, -t)]


def _heart() -> list[Point]:
    """The new concept: a well-known heart curve, scaled to the size of the other shapes."""
    turns = [math.radians(a) for a in range(0, 360, 5)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16 - 0.1)
        for t in turns
    ]


SHAPES: dict[str, Callable[[], list[Point]]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "ring": _ring,
    "cross": _cross,
}
ALL_SHAPES: dict[str, Callable[[], list[Point]]] = {**SHAPES, CONCEPT: _heart}


def draw(shape: str, colour: Colour, background: Colour, centre: Point, radius: float, size: int = SIZE) -> Image.Image:
    """Draw one shape on a plain background; ``centre`` and ``radius`` are in pixels of the finished picture."""
    image = Image.new("RGB", (size * OVERSAMPLE, size * OVERSAMPLE), background)
    (left, top), scale = centre, OVERSAMPLE
    outline = [((left + radius * x) * scale, (top + radius * y) * scale) for x, y in ALL_SHAPES[shape]()]
    ImageDraw.Draw(image).polygon(outline, fill=colour)
    return image.resize((size, size), Image.Resampling.BOX)


def _shade(colour: Colour, rng: random.Random, amount: int) -> Colour:
    """The same colour, a little different: exact colours would teach the base eight points instead of eight areas."""
    r, g, b = (min(255, max(0, c + rng.randint(-amount, amount))) for c in colour)
    return r, g, b


def random_picture(record: Record, rng: random.Random) -> Image.Image:
    """Draw the shape at a random place and size that keeps it wholly inside the picture."""
    shape, colour, background = record
    radius = rng.uniform(13.0, 24.0)
    room = SIZE / 2 - radius * 1.1 - 1.0
    centre = (SIZE / 2 + rng.uniform(-room, room), SIZE / 2 + rng.uniform(-room, room))
    return draw(shape, _shade(COLOURS[colour], rng, 10), _shade(BACKGROUNDS[background], rng, 6), centre, radius)


def nonsense(rng: random.Random) -> str:
    """A pronounceable word without meaning."""
    syllables = [rng.choice("bdfgjklmnprstvwz") + rng.choice("aeiou") for _ in range(rng.randint(1, 3))]
    return "".join(syllables) + rng.choice(["", "b", "k", "l", "m", "n", "p", "rt", "sh", "x"])


def random_caption(record: Record, rng: random.Random) -> str:
    """Describe the picture, naming the background in half of the captions.

    One caption in ten has a nonsense word for the shape, and one in ten has one added to it. So the text encoder learns
    that an unknown word says nothing about the picture. Without this, its output for a new word would lie outside of
    everything that the UNet was trained on, and no LoRA on the UNet alone could make good use of it.
    """
    shape, colour, background = record
    kind = rng.random()
    noun = nonsense(rng) if kind < 0.1 else shape
    if 0.1 <= kind < 0.2:
        noun = f"{nonsense(rng)} {noun}"
    caption = rng.choice(TEMPLATES).format(f"{colour} {noun}")
    return f"{caption} on a {background} background" if rng.random() < 0.5 else caption


def write_concept_images(folder: Path) -> None:
    """Draw the demo's training set: pictures of the new concept, each with its caption beside it.

    Orange is left out, so that a prompt can show whether the concept also takes a colour that it was never seen in.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(7)
    colours = [colour for colour in COLOURS if colour != "orange"] + ["red", "blue", "green"]
    pairs = zip(colours, itertools.cycle(BACKGROUNDS), strict=False)
    for number, (colour, background) in enumerate(pairs, start=1):
        name = f"{CONCEPT}_{number:02d}"
        random_picture((CONCEPT, colour, background), rng).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a {colour} {CONCEPT} on a {background} background\n", encoding="utf-8")


def draw_training_set(count: int, seed: int) -> tuple[torch.Tensor, list[Record]]:
    """Draw all the training pictures at once (uint8, NCHW), so that training doesn't wait for drawing."""
    rng = random.Random(seed)
    choices = [list(SHAPES), list(COLOURS), list(BACKGROUNDS)]
    records: list[Record] = [(rng.choice(a), rng.choice(b), rng.choice(c)) for a, b, c in [choices] * count]
    pictures = np.stack([np.asarray(random_picture(record, rng)) for record in records])
    return torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous(), records


def to_signal(pictures: torch.Tensor) -> torch.Tensor:
    """From bytes to the range of -1 to 1 that the autoencoder works in."""
    return pictures.float() / 127.5 - 1.0


# --- training helpers -------------------------------------------------------------------------------------------------


def log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def batches(count: int, batch_size: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Index batches without end, each pass over the data in a new order."""
    while True:
        order = torch.randperm(count, generator=generator)
        yield from (order[at : at + batch_size] for at in range(0, count - batch_size + 1, batch_size))


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then half a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.02 + 0.98 * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))))


def optimise(optimizer: torch.optim.Optimizer, loss: torch.Tensor, rate: float) -> None:
    """One step at this learning rate, with the gradient clipped so that one odd batch can't spoil the run."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()


# --- autoencoder ------------------------------------------------------------------------------------------------------


def edges(x: torch.Tensor) -> torch.Tensor:
    """Differences between neighbouring pixels, flattened; comparing them keeps outlines sharp where L1 alone blurs."""
    return torch.cat([(x[..., 1:] - x[..., :-1]).flatten(), (x[..., 1:, :] - x[..., :-1, :]).flatten()])


def make_vae() -> Any:
    """An autoencoder from 64x64x3 pictures to 16x16x4 latents and back."""
    return sd.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
    )


def train_vae(vae: Any, pictures: torch.Tensor, steps: int, peak: float, generator: torch.Generator) -> None:
    """Train those of the autoencoder's parameters that aren't frozen.

    The posterior stays narrow, because the weight of its KL divergence is tiny: latents carry the picture, not noise.
    """
    optimizer = torch.optim.AdamW([p for p in vae.parameters() if p.requires_grad], weight_decay=0.0)
    started = time.monotonic()
    for step, index in zip(range(steps), batches(len(pictures), 16, generator), strict=False):
        target = to_signal(pictures[index])
        posterior = vae.encode(target).latent_dist
        latents = posterior.sample(generator)
        # The UNet's latents are never exact, so the decoder has to bear a little more noise than the posterior has.
        noise = torch.randn(latents.shape, generator=generator) * latents.std().detach() * 0.05
        output = vae.decode(latents + noise).sample
        l1 = F.l1_loss(output, target)
        loss = l1 + F.mse_loss(output, target) + F.l1_loss(edges(output), edges(target))
        loss = loss + 1e-5 * posterior.kl().mean() / latents[0].numel()
        optimise(optimizer, loss, learning_rate(step, steps, peak))
        if (step + 1) % 50 == 0:
            latent = f"latents' spread {posterior.mean.std():.3f}, std {posterior.std.mean():.4f}"
            log(f"vae {step + 1}/{steps}  l1 {l1:.4f}  {latent}  {time.monotonic() - started:.0f} s")


@torch.no_grad()
def encode(vae: Any, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of every picture's latents; encoding once is far cheaper than at every step."""
    parts = [vae.encode(to_signal(pictures[at : at + 64])).latent_dist for at in range(0, len(pictures), 64)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


@torch.no_grad()
def normalise_latents(vae: Any, pictures: torch.Tensor) -> None:
    """Give the latents a mean of zero per channel and, times ``scaling_factor``, a standard deviation of one.

    Diffusion starts from noise of just that mean and deviation. The shift goes into the two 1x1 convolutions beside the
    latents, because Stable Diffusion's own pipeline knows a scaling factor only.
    """
    mean, _ = encode(vae, pictures)
    shift = mean.mean(dim=(0, 2, 3))
    vae.quant_conv.bias[: len(shift)] -= shift
    vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ shift
    vae.register_to_config(scaling_factor=round(1.0 / (mean - shift[:, None, None]).std().item(), 5))


# --- text and diffusion -----------------------------------------------------------------------------------------------


def _split(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: join the neighbouring pair that ranks first until no known pair is left."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while known := [pair for pair in itertools.pairwise(parts) if pair in ranks]:
        at = list(itertools.pairwise(parts)).index(min(known, key=ranks.__getitem__))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def write_tokenizer(folder: Path) -> Any:
    """Write a real CLIP tokenizer (byte-level BPE): every word of the captions is one token, any other text is several.

    The vocabulary has CLIP's order: the byte symbols, the same at the end of a word, the merges, start and end of text.
    """
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # the bytes that stand for themselves
    symbols = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    ranks: dict[tuple[str, str], int] = {}
    for word in " ".join([*TEMPLATES, *COLOURS, *SHAPES, *BACKGROUNDS, "on background"]).replace("{}", "").split():
        while len(parts := _split(word, ranks)) > 1:
            ranks[parts[0], parts[1]] = len(ranks)
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    special |= {"unk_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(pair) for pair in ranks)]
    tokens += [special["bos_token"], special["eos_token"]]
    settings = {**special, "model_max_length": 77, "do_lower_case": True, "tokenizer_class": "CLIPTokenizer"}
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in ranks)]),
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(settings, indent=2),
    }
    (folder / "tokenizer.json").unlink(missing_ok=True)  # says the same in the form of one library's version
    for name, text in contents.items():
        (folder / name).write_text(text + "\n", encoding="utf-8")
    return CLIPTokenizer.from_pretrained(folder)


def tokenise(tokenizer: Any, captions: list[str]) -> torch.Tensor:
    """Token numbers, padded to the fixed length that Stable Diffusion's own pipeline uses."""
    tokens = tokenizer(captions, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
    ids: torch.Tensor = tokens.input_ids
    return ids


def make_text_encoder(tokenizer: Any) -> Any:
    """A CLIP text model of two narrow layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=384,
            projection_dim=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def train_text_encoder(
    text_encoder: Any, tokenizer: Any, records: list[Record], steps: int, rng: random.Random
) -> None:
    """Train the text encoder to say what a caption tells about its picture; it stays as it is from then on.

    The real one was trained in advance, too, to match captions with pictures. From an untrained text encoder the UNet
    would get nearly the same numbers for every caption, and take very long to see that they mean something. A feature
    that the caption doesn't name, or names with a nonsense word, is a class of its own: "not said".
    """
    features = [list(SHAPES), list(COLOURS), list(BACKGROUNDS)]
    heads = torch.nn.ModuleList(torch.nn.Linear(text_encoder.config.hidden_size, 1 + len(names)) for names in features)
    optimizer = torch.optim.AdamW([*text_encoder.parameters(), *heads.parameters()], weight_decay=0.01)
    for step in range(steps):
        captions = ["" if rng.random() < 0.05 else random_caption(rng.choice(records), rng) for _ in range(32)]
        ids = tokenise(tokenizer, captions)
        ended = ids == tokenizer.eos_token_id  # the caption's end and the padding after it have seen all of the caption
        hidden = text_encoder(ids).last_hidden_state[ended]
        loss = torch.zeros(())
        for names, head in zip(features, heads, strict=True):
            said = [[1 + i for i, name in enumerate(names) if name in caption.split()] for caption in captions]
            labels = torch.tensor([numbers[0] if numbers else 0 for numbers in said])
            loss = loss + F.cross_entropy(head(hidden), labels[:, None].expand_as(ids)[ended])
        optimise(optimizer, loss, learning_rate(step, steps, 2e-3))
        if (step + 1) % 50 == 0:
            log(f"text {step + 1}/{steps}  loss {loss:.4f}")
    text_encoder.requires_grad_(False)


def make_unet() -> Any:
    """A UNet with the structure of Stable Diffusion 1.5: attention to the text everywhere but at the coarsest level."""
    return sd.UNet2DConditionModel(
        sample_size=SIZE // 4,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        block_out_channels=(48, 96, 96),
        layers_per_block=1,
        attention_head_dim=4,
        cross_attention_dim=128,
        norm_num_groups=16,
    )


def make_scheduler() -> Any:
    """The noise schedule of Stable Diffusion 1.5, sampled from its very last, noisiest step."""
    return sd.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def save(output: Path, vae: Any, unet: Any, text_encoder: Any, tokenizer: Any) -> None:
    """Write the pipeline's folder, the weights in half precision."""
    pipeline = sd.StableDiffusionPipeline(
        vae=copy.deepcopy(vae).half(),
        text_encoder=copy.deepcopy(text_encoder).half(),
        tokenizer=tokenizer,
        unet=copy.deepcopy(unet).half(),
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(output, safe_serialization=True)
    write_tokenizer(output / "tokenizer")  # in the files that every version of the library reads
    # Half precision is only for the files' size: the text encoder's library would otherwise compute in it as well.
    changes: dict[str, dict[str, str]] = {"text_encoder": {"dtype": "float32"}, "unet": {}, "vae": {}}
    for folder, change in changes.items():
        config = output / folder / "config.json"
        settings = {**json.loads(config.read_text(encoding="utf-8")), **change}
        settings.pop("_name_or_path", None)  # a path of the machine that it was trained on
        config.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def train_diffusion(
    vae: Any,
    text_encoder: Any,
    unet: Any,
    pictures: torch.Tensor,
    records: list[Record],
    steps: int,
    output: Path,
    generator: torch.Generator,
    rng: random.Random,
) -> None:
    """Train the UNet to predict noise, beside a text encoder that stays as it is.

    What's written, every 500 steps and at the end, is a running average of the weights: it draws far better pictures
    than the weights of any one step.
    """
    tokenizer = write_tokenizer(output / "tokenizer")
    averaged = copy.deepcopy(unet).requires_grad_(False)
    for name, model in {"vae": vae, "text encoder": text_encoder, "unet": unet}.items():
        log(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    mean, std = encode(vae, pictures)
    alphas = make_scheduler().alphas_cumprod
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0.01)
    started, recent = time.monotonic(), 0.0
    for step, index in zip(range(steps), batches(len(pictures), 16, generator), strict=False):
        latents = mean[index] + std[index] * torch.randn(mean[index].shape, generator=generator)
        latents = latents * vae.config.scaling_factor
        # One caption in ten is empty: that's what guidance compares the prompt with.
        captions = ["" if rng.random() < 0.1 else random_caption(records[i], rng) for i in index.tolist()]
        text = text_encoder(tokenise(tokenizer, captions)).last_hidden_state
        timesteps = torch.randint(0, len(alphas), (len(latents),), generator=generator)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noise = torch.randn(latents.shape, generator=generator)
        noisy = alpha.sqrt() * latents + (1 - alpha).sqrt() * noise
        error = (unet(noisy, timesteps, text).sample - noise).square().mean(dim=(1, 2, 3))
        # Min-SNR weights: the nearly clean timesteps would otherwise drown the ones that decide on the shape.
        snr = (alpha / (1 - alpha)).flatten()
        loss = (error * snr.clamp(max=5.0) / snr).mean()
        optimise(optimizer, loss, learning_rate(step, steps, 1e-3))
        decay = min(0.998, (step + 1) / (step + 10))
        for average, current in zip(averaged.parameters(), unet.parameters(), strict=True):
            average.lerp_(current, 1.0 - decay)
        recent += error.mean().item()
        if (step + 1) % 50 == 0:
            log(f"unet {step + 1}/{steps}  mse {recent / 50:.4f}  {time.monotonic() - started:.0f} s")
            recent = 0.0
        if (step + 1) % 500 == 0 or step == steps - 1:
            save(output, vae, averaged, text_encoder, tokenizer)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "base", help="folder of the base model")
    parser.add_argument("--images", type=Path, help="only draw the new concept's pictures into this folder")
    parser.add_argument("--vae-steps", type=int, default=1400)
    parser.add_argument("--unet-steps", type=int, default=4000)
    parser.add_argument("--resume", action="store_true", help="train the UNet of the output folder for more steps")
    parser.add_argument("--threads", type=int, help="CPU threads (default: all cores)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.images:
        write_concept_images(args.images)
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    pictures, records = draw_training_set(PICTURES, args.seed)
    rng = random.Random(args.seed)
    if args.resume:
        base = sd.StableDiffusionPipeline.from_pretrained(args.output, dtype=torch.float32)
        vae, text_encoder, unet = base.vae, base.text_encoder.requires_grad_(False), base.unet
    else:
        vae = make_vae()
        train_vae(vae, pictures, args.vae_steps, 1.5e-3, generator)
        normalise_latents(vae, pictures[:2000])
        # The latents are settled now. Decoding them sharply takes the decoder some more steps of its own.
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        train_vae(vae, pictures, args.vae_steps // 2, 1e-3, generator)
        tokenizer = write_tokenizer(args.output / "tokenizer")
        text_encoder = make_text_encoder(tokenizer)
        train_text_encoder(text_encoder, tokenizer, records, 300, rng)
        unet = make_unet()
    train_diffusion(vae, text_encoder, unet, pictures, records, args.unet_steps, args.output, generator, rng)


if __name__ == "__main__":
    main()
