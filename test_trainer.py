#!/usr/bin/env python3
"""Tests of train_lora.py: `python test_trainer.py`, or pytest. The sections mirror the script's.

Everything runs offline on the CPU; the models are tiny, with random weights, in the real diffusers
layout. Tests that need torch are skipped where it is not installed; the others still run.
"""

from __future__ import annotations

import ast
import base64
import collections
import contextlib
import ctypes
import dataclasses
import errno
import hashlib
import html.parser
import http.client
import http.server
import importlib
import importlib.util
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import select
import shlex
import shutil
import signal
import socket
import string
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import jsonschema
import pytest
from PIL import Image, ImageDraw, ImageOps

import train_lora as trainer

sys.path.append(str(Path(__file__).resolve().parent / "benchmarks"))
import memory

trainer.import_checkers()

ROOT = Path(__file__).resolve().parent
SCRIPT = ROOT / "train_lora.py"
SCHEMA = json.loads((ROOT / "config_schema.json").read_text("utf-8"))
EVENT_SCHEMA = json.loads((ROOT / "docs" / "events.schema.json").read_text("utf-8"))
EVENT_VALIDATOR = jsonschema.Draft7Validator(EVENT_SCHEMA)
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and descriptors")

Json = dict[str, Any]
Shapes = dict[str, list[int]]

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny models run faster so, here and in the child processes
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell; the child processes must hear it
    signal.signal(signal.SIGINT, signal.default_int_handler)

if HAS_TORCH:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    trainer.import_libraries()
    import diffusers
    import torch
    import transformers


# ======================================================================================
# tools: running the script, tiny models, small datasets
# ======================================================================================


class Run:
    """A finished run of the script: exit code, events (each checked against docs/events.schema.json), stderr."""

    def __init__(self, code: int, stdout: bytes, stderr: bytes) -> None:
        self.code, self.stderr = code, stderr.decode("utf-8", "replace")
        self.events: list[Json] = [json.loads(line) for line in stdout.splitlines()]
        check_events(self.events)

    @property
    def last(self) -> Json:
        return self.events[-1]

    def of(self, event_type: str) -> list[Json]:
        return [event for event in self.events if event["type"] == event_type]


def check_events(events: list[Json]) -> None:
    for event in events:
        EVENT_VALIDATOR.validate(event)
    assert events[0]["type"] == "start"
    ends = [event["type"] for event in events if event["type"] in trainer.LAST_TYPES]
    assert ends == [events[-1]["type"]], "exactly one last event, and it is last"


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(*arguments: str | Path, **options: Any) -> Run:
    done = subprocess.run(command(*arguments), capture_output=True, timeout=300, **options)
    return Run(done.returncode, done.stdout, done.stderr)


def write_config(folder: Path, **keys: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps(keys), "utf-8")
    return path


def draw_image(path: Path, size: tuple[int, int], shade: int = 0) -> None:
    image = Image.new("RGB", size, (shade * 37 % 256, 200, 90))
    ImageDraw.Draw(image).ellipse((8, 8, size[0] // 2, size[1] // 2), fill=(250, 20, shade * 53 % 256))
    image.save(path)


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images in several shapes, with captions."""
    folder = tmp_path_factory.mktemp("images")
    for number, size in enumerate([(64, 64), (96, 64), (64, 100), (128, 128), (200, 90)]):
        draw_image(folder / f"{number}.png", size, number)
        (folder / f"{number}.txt").write_text(f"picture {number}, blob", "utf-8")
    return folder


KINDS = ("sd15", "sd21", "sd21v", "sdxl")


def new(owner: Any, **settings: Any) -> Any:
    """Build one of diffusers' models, whose constructors are not typed."""
    return owner(**settings)


def build_model(folder: Path, kind: str, wide: bool = False) -> None:
    """Make a tiny Stable Diffusion with random weights: real layout, real classes, real tokenizer files.

    A `wide` one has heads 64 wide and groups of 32 channels, which the headers of single files do not say.
    """
    torch.manual_seed(0)
    xl = kind == "sdxl"
    text_width = 64 if wide else 32
    heads = 8 if kind == "sd15" else (1, 2) if wide else (4, 8)
    blocks = ["CrossAttn", ""]
    down = [f"{cross}DownBlock2D" for cross in (reversed(blocks) if xl else blocks)]
    up = [f"{cross}UpBlock2D" for cross in (blocks if xl else reversed(blocks))]
    extra: Json = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * 6 + text_width,
        "transformer_layers_per_block": (1, 2),
    }
    unet = new(
        diffusers.UNet2DConditionModel,
        sample_size=12 if kind in ("sd21v", "sdxl") else 8,
        down_block_types=down,
        up_block_types=up,
        block_out_channels=(64, 128) if wide else (32, 64),
        layers_per_block=2 if xl else 1,
        cross_attention_dim=(1 + xl) * text_width,
        attention_head_dim=heads,
        norm_num_groups=32 if wide else 8,
        use_linear_projection=kind != "sd15",
        **(extra if xl else {}),
    )
    unet.save_pretrained(folder / "unet")
    vae = new(
        diffusers.AutoencoderKL,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64) if wide else (8, 8, 16, 16),
        norm_num_groups=32 if wide else 4,
        scaling_factor=0.13025 if xl else 0.18215,
        force_upcast=xl,
    )
    vae.save_pretrained(folder / "vae")
    letters = [chr(code) for code in range(33, 127)]
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    for suffix in ("", "_2") if xl else ("",):
        pad = "!" if suffix or kind.startswith("sd21") else "<|endoftext|>"
        build_text_encoder(folder, suffix, vocabulary, pad, text_width)
    prediction = "v_prediction" if kind == "sd21v" else "epsilon"
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER | {"prediction_type": prediction})
    index: Json = {"_class_name": "StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"} | PIPELINE_INDEX
    if xl:
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
        index |= {"tokenizer_2": ["transformers", "CLIPTokenizer"]}
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    write_json(folder / "model_index.json", index)


SCHEDULER: Json = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
PIPELINE_INDEX: Json = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
}


def build_text_encoder(folder: Path, suffix: str, vocabulary: dict[str, int], pad: str, width: int) -> None:
    end = vocabulary["<|endoftext|>"]
    settings = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4 if width == 32 else 1,
        projection_dim=width,
        hidden_act="gelu" if pad == "!" else "quick_gelu",
        bos_token_id=vocabulary["<|startoftext|>"],
        eos_token_id=end,
        pad_token_id=end,
    )
    owner: Any = transformers.CLIPTextModelWithProjection if suffix else transformers.CLIPTextModel
    owner(settings).save_pretrained(folder / f"text_encoder{suffix}")
    tokenizer = folder / f"tokenizer{suffix}"
    write_json(tokenizer / "vocab.json", vocabulary)
    (tokenizer / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings_json = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad, **special}
    write_json(tokenizer / "tokenizer_config.json", settings_json)


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), "utf-8")


def hollow_model(folder: Path) -> Path:
    """Make an SD 1.5 that is whole for all that reads only configs and headers; needs no torch."""
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write_json(folder / "unet/config.json", {"in_channels": 4, "out_channels": 4, "sample_size": 64})
    write_json(folder / "vae/config.json", {"block_out_channels": [128, 256, 512, 512]})
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER | {"prediction_type": "epsilon"})
    write_json(folder / "text_encoder/config.json", {"hidden_size": 768})
    header = json.dumps({"a": {"dtype": "F16", "shape": [3, 5], "data_offsets": [0, 30]}}).encode()
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(30))
    return folder


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        build_model(folder / kind, kind)
    return folder


@pytest.fixture(scope="session")
def wide_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny models as folders, and the same as single files in the original layout."""
    import safetensors.torch

    folder = tmp_path_factory.mktemp("wide")
    for kind, said in {"sd15": "epsilon", "sd21v": "v", "sdxl": "epsilon"}.items():
        build_model(folder / kind, kind, wide=True)
        dtype = torch.float16 if kind == "sdxl" else torch.float32
        for path in (folder / kind).glob("*/*.safetensors"):  # so that a file in half precision holds the same values
            values = {key: value.to(dtype).float() for key, value in tensors_of(path).items()}
            safetensors.torch.save_file(values, path, {"format": "pt"})
        to_single_file(folder / kind, folder / f"{kind}.safetensors", dtype, {"modelspec.prediction_type": said})
    shutil.copytree(folder / "sd15/tokenizer", folder / "clip_tokenizer")
    return folder


def words(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


RESNET = words("norm1=in_layers.0 conv1=in_layers.2 norm2=out_layers.0 conv2=out_layers.3")
RESNET |= words("time_emb_proj=emb_layers.1 conv_shortcut=skip_connection")
UNET_ENDS = words("conv_in=input_blocks.0.0 conv_norm_out=out.0 conv_out=out.2 add_embedding=label_emb.0")
UNET_ENDS |= words("time_embedding=time_embed linear_1=0 linear_2=2")
VAE = words("down_blocks=down up_blocks=up resnets=block conv_shortcut=nin_shortcut conv_norm_out=norm_out")
VAE |= words("downsamplers.0=downsample upsamplers.0=upsample group_norm=norm to_q=q to_k=k to_v=v to_out.0=proj_out")
VAE |= words("mid_block.resnets.0=mid.block_1 mid_block.resnets.1=mid.block_2 mid_block.attentions.0=mid.attn_1")
OPEN_CLIP = words("encoder.layers=transformer.resblocks self_attn=attn layer_norm1=ln_1 layer_norm2=ln_2 fc1=c_fc")
OPEN_CLIP |= words("fc2=c_proj final_layer_norm=ln_final embeddings.token_embedding=token_embedding")
OPEN_CLIP |= words("embeddings.position_embedding.weight=positional_embedding")
PLACE = re.compile(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnet|attention|downsampler|upsampler)s\.(\d+)\.(.+)")


def swap(name: str, table: dict[str, str]) -> str:
    """Replace whole dotted parts of a name."""
    parts = "|".join(re.escape(part) for part in sorted(table, key=len, reverse=True))
    return re.sub(rf"(?<![^.])({parts})(?![^.])", lambda found: table[found[1]], name)


def original_unet(tensors: dict[str, Any], layers: int) -> dict[str, Any]:
    def rename(name: str) -> str:
        found = PLACE.match(name)
        if not found:
            return swap(name, UNET_ENDS)
        side, part, place, rest = found[1], found[3], int(found[4]), found[5]
        first = int(found[2] or 0) * (layers + 1)
        if part == "downsampler":
            return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op')}"
        if part == "upsampler":
            attends = any(key.startswith(f"up_blocks.{found[2]}.attentions.") for key in tensors)
            return f"output_blocks.{first + layers}.{1 + attends}.{rest}"
        if part == "resnet":
            rest = swap(rest, RESNET)
        if side == "mid":
            return f"middle_block.{1 if part == 'attention' else 2 * place}.{rest}"
        block = f"input_blocks.{first + place + 1}" if side == "down" else f"output_blocks.{first + place}"
        return f"{block}.{int(part == 'attention')}.{rest}"

    return {rename(name): tensor for name, tensor in tensors.items()}


def original_vae(tensors: dict[str, Any], levels: int) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, tensor in tensors.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda found: f"up_blocks.{levels - 1 - int(found[1])}", key)
        linear = ".attentions." in name and tensor.ndim == 2  # a 1x1 convolution there
        result[swap(name, VAE)] = tensor[:, :, None, None] if linear else tensor
    return result


def original_clip(tensors: dict[str, Any]) -> dict[str, Any]:
    """Name CLIP-L's tensors as the older transformers did: under text_model., with the position numbers."""
    result = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    positions = len(result["text_model.embeddings.position_embedding.weight"])
    return result | {"text_model.embeddings.position_ids": torch.arange(positions)[None]}


def original_open_clip(tensors: dict[str, Any], unused_layer: bool) -> dict[str, Any]:
    """Rename to open_clip's layout; SD 2 files also have a last layer and a projection that diffusers leaves out."""
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if unused_layer:
        last = max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers."))
        old, new = f"encoder.layers.{last}.", f"encoder.layers.{last + 1}."
        tensors |= {name.replace(old, new): tensor for name, tensor in tensors.items() if name.startswith(old)}
        tensors["text_projection.weight"] = torch.zeros_like(tensors[f"{old}self_attn.out_proj.weight"])
    result: dict[str, Any] = {
        "text_projection": tensors.pop("text_projection.weight").T,
        "logit_scale": torch.tensor(4.6052),
    }
    for key, tensor in tensors.items():
        if "q_proj." in key:
            tensor = torch.cat([tensors[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
        if not re.search(r"\.[kv]_proj\.", key):
            result[swap(key, OPEN_CLIP).replace("q_proj.", "in_proj_")] = tensor
    return result


def to_single_file(
    model_folder: Path, target: Path, dtype: Any, metadata: dict[str, str] | None = None, with_vae: bool = True
) -> None:
    """Write the folder's UNet, text encoders and VAE to target; the family follows from the folder's contents."""

    def load(part: str) -> dict[str, Any]:
        return tensors_of(next((model_folder / part).glob("*.safetensors")))

    unet, vae = (json.loads((model_folder / part / "config.json").read_text("utf-8")) for part in ("unet", "vae"))
    parts = {"model.diffusion_model.": original_unet(load("unet"), unet["layers_per_block"])}
    if (model_folder / "text_encoder_2").is_dir():
        parts["conditioner.embedders.0.transformer."] = original_clip(load("text_encoder"))
        parts["conditioner.embedders.1.model."] = original_open_clip(load("text_encoder_2"), unused_layer=False)
    elif unet["use_linear_projection"]:
        parts["cond_stage_model.model."] = original_open_clip(load("text_encoder"), unused_layer=True)
    else:
        parts["cond_stage_model.transformer."] = original_clip(load("text_encoder"))
    if with_vae:
        parts["first_stage_model."] = original_vae(load("vae"), len(vae["block_out_channels"]))
    whole = {prefix + name: tensor for prefix, tensors in parts.items() for name, tensor in tensors.items()}
    cast = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in whole.items()}
    import safetensors.torch

    safetensors.torch.save_file({name: tensor.clone().contiguous() for name, tensor in cast.items()}, target, metadata)


class Recorder(trainer.EventStream):
    """An event stream into a list, for runs inside this process."""

    def __init__(self) -> None:
        self.events: list[Json] = []
        self.warnings: list[Json] = []
        self.phase, self.ended = "test", ""
        self._lock = threading.RLock()

    def emit(self, event_type: str, **fields: Any) -> None:
        self.events.append({"type": event_type, **fields})

    def info(self, message: str, phase: str | None = None, **fields: Any) -> None:
        self.beat()
        self.phase = phase or self.phase
        self.emit("info", message=message, **fields)

    def open_log(self, path: Path) -> None: ...


class Quiet(trainer.StopWatcher):
    """A watcher that hears nothing; `after` asks for a stop once that many polls have passed."""

    def __init__(self, after: float = math.inf) -> None:
        self.signal, self.save_requested, self.saved, self.after = None, False, trainer.SavedFiles(), after

    @property
    def requested(self) -> bool:
        self.after -= 1
        return self.after < 0

    def arm(self, rescue: Any) -> None: ...


def small(images: Path, model: Path, output: Path, **changes: Any) -> Json:
    """A config that trains in a second."""
    return {
        "dataset_path": str(images),
        "base_model": str(model),
        "output_path": str(output),
        "trigger_words": ["zorb"],
        "steps": 4,
        "batch_size": 2,
        "lora_rank": 4,
        "learning_rate": 1e-2,
        "bucket_step": 16,
        "validation_steps": 0,
        "sample_steps": 3,
        "save_dtype": "fp32",
        **changes,
    }


def scan_quietly(config: trainer.TrainingConfig) -> trainer.Dataset:
    trainer.import_checkers()
    return trainer.scan_dataset(config, Recorder())


def view_of(made: trainer.LoRATrainer, index: int, mirrored: bool = False) -> dict[str, Any]:
    """The cache's entry of an image."""
    return made.cached[made.keys[made.plan.view(index, mirrored)]]


def make_trainer(
    tmp_path: Path, config: Json, *, stop: Quiet | None = None, fresh: bool = False
) -> trainer.LoRATrainer:
    """A trainer in this process that has checked its images and holds its folder."""
    path = tmp_path / "in_process.json"
    write_json(path, config)
    folder = trainer.OutputFolder(Path(config["output_path"]))
    folder.open()
    loaded = trainer.load_config(str(path))
    return trainer.LoRATrainer(loaded, scan_quietly(loaded), Recorder(), stop or Quiet(), folder, fresh)


def prepare(tmp_path: Path, config: Json, **options: Any) -> trainer.LoRATrainer:
    """The same, set up but not yet trained."""
    made = make_trainer(tmp_path, config, **options)
    try:
        made.setup()
    except trainer.TrainerError:
        made.folder._lock.close()  # type: ignore[union-attr]
        raise
    return made


def train(tmp_path: Path, config: Json, **options: Any) -> trainer.LoRATrainer:
    made = prepare(tmp_path, config, **options)
    if made.train():
        made.finish()
    elif made.state.step > made.stop.saved.step:
        made.save()
    if made.final_path.exists() and made.config.save_format == "kohya":
        check_for_readers(shapes_of(made.final_path))
    made.folder._lock.close()  # type: ignore[union-attr]
    return made


def patched(code: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """The script in a process of its own, with some of its parts replaced by `code` first."""
    program = f"import os, sys, time\nimport train_lora as t\n{code}\nsys.exit(t.main(sys.argv[1:]))"
    process = [sys.executable, "-c", program, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(process, cwd=ROOT, **options)


def logged(path: Path) -> list[Json]:
    """The events in a file, but for a torn last line."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def warning_codes(made: trainer.LoRATrainer) -> list[str]:
    return [event["code"] for event in emitted(made, "warning")]


def emitted(made: trainer.LoRATrainer, event_type: str) -> list[Json]:
    events: Any = made.events
    return [event for event in events.events if event["type"] == event_type]


def tensors_of(path: Path) -> dict[str, Any]:
    import safetensors.torch

    return dict(safetensors.torch.load_file(path))


def shapes_of(path: Path) -> dict[str, list[int]]:
    return {key: shape for key, (_, shape) in trainer.tensor_headers(path).items()}


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = tensors_of(one), tensors_of(other)
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different


# ======================================================================================
# the file itself
# ======================================================================================


def banners() -> list[tuple[int, str]]:
    lines = SCRIPT.read_text("utf-8").splitlines()
    rule = "# " + "=" * 86
    return [
        (number, lines[number + 1][2:])
        for number in range(len(lines) - 2)
        if lines[number] == lines[number + 2] == rule
    ]


def test_the_docstring_lists_the_sections_in_order() -> None:
    listed = re.findall(r"^    ([a-zA-Z][\w ,]*?)  +\S", trainer.__doc__ or "", re.MULTILINE)
    assert listed == [title for _, title in banners()]


def test_no_section_uses_a_later_one() -> None:
    tree = ast.parse(SCRIPT.read_text("utf-8"))
    starts = [line for line, _ in banners()]

    def section(line: int) -> int:
        return sum(start < line for start in starts)

    defined: dict[str, int] = {}
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = section(node.lineno)
        elif isinstance(node, ast.Assign):
            defined |= {name.id: section(node.lineno) for name in node.targets if isinstance(name, ast.Name)}
    forward = []
    for owner in tree.body:
        if isinstance(owner, (ast.FunctionDef, ast.ClassDef)):
            names = [node for node in ast.walk(owner) if isinstance(node, ast.Name)]
            own = {name.id for name in names if isinstance(name.ctx, ast.Store)}
            forward += [
                (owner.name, name.id)
                for name in names
                if name.id not in own and defined.get(name.id, 0) > section(owner.lineno)
            ]
    assert forward == []


def test_the_script_has_its_three_classes_and_one_main() -> None:
    for name in ("TrainingConfig", "ProgressEvent", "LoRATrainer", "main"):
        assert hasattr(trainer, name)
    for verb in ("setup", "train", "loss", "sample", "save", "finish"):
        assert callable(getattr(trainer.LoRATrainer, verb))


def test_only_the_families_section_names_a_family() -> None:
    source = SCRIPT.read_text("utf-8")
    families = next(line for line, title in banners() if title == "model families")
    after = source.splitlines()[families:]
    end = next(index for index, line in enumerate(after) if line == "# hardware and memory")
    assert not re.search(r"\.name ==|is_xl|== \"sd", "\n".join(after[end:]))


def test_a_python_that_is_too_old_is_told_so_in_words() -> None:
    code = "import sys; sys.version_info = (3, 9, 18); import train_lora"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("train_lora.py needs Python 3.10 or later; this is ")
    assert len(ran.stderr.splitlines()) == 1


def test_importing_the_script_imports_nothing_heavy() -> None:
    heavy = ("torch", "diffusers", "PIL", "numpy", "jsonschema")
    code = f"import sys, train_lora; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_requirements_and_the_inline_metadata_list_the_same_packages() -> None:
    header = re.search(r"# dependencies = \[\n(.*?)# \]", SCRIPT.read_text("utf-8"), re.DOTALL)
    assert header
    inline = re.findall(r'"([^"]+)"', header[1])
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    listed = [line.partition("#")[0].strip() for line in lines]
    assert [line for line in listed if line] == inline
    assert len(inline) == 10


def test_the_top_level_holds_only_what_the_design_lists() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    top = {name.partition("/")[0] for name in listed.stdout.split()}
    files = {
        "train_lora.py",
        "config_schema.json",
        "example_config.json",
        "requirements.txt",
        "Dockerfile",
        "README.md",
    }
    expected = files | {"test_trainer.py", "LICENSE", "demo", "docs", "benchmarks"}
    assert {name for name in top if not name.startswith(".")} == expected


# ======================================================================================
# config
# ======================================================================================


def parse(tmp_path: Path, document: Any, overrides: tuple[str, ...] = ()) -> trainer.TrainingConfig:
    path = tmp_path / "config.json"
    text = document if isinstance(document, (str, bytes)) else json.dumps(document)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return trainer.load_config(str(path), overrides)


def problems_of(tmp_path: Path, document: Any, overrides: tuple[str, ...] = ()) -> dict[str, str]:
    with pytest.raises(trainer.TrainerError) as caught:
        parse(tmp_path, document, overrides)
    assert caught.value.code in ("config_invalid", "config_unreadable")
    return {item["path"]: item["message"] for item in caught.value.problems} or {"": caught.value.message}


REQUIRED: Json = {
    "dataset_path": "images",
    "base_model": "owner/model",
    "output_path": "out",
    "trigger_words": ["zorb"],
}


def test_the_config_class_and_the_schema_have_the_same_keys() -> None:
    fields = [field.name for field in dataclasses.fields(trainer.TrainingConfig)]
    assert fields == list(SCHEMA["definitions"])
    for field in dataclasses.fields(trainer.TrainingConfig):
        assert field.default is dataclasses.MISSING, "defaults live in the schema only"


def test_the_schema_is_valid_and_defines_every_key_once_for_both_shapes() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    refs = {key: {"$ref": f"#/definitions/{key}"} for key in SCHEMA["definitions"]}
    both = {"$schema", "training_params"}
    assert SCHEMA["properties"]["training_params"]["properties"] == refs
    assert {key: value for key, value in SCHEMA["properties"].items() if key not in both} == refs
    for key, definition in SCHEMA["definitions"].items():
        assert definition["description"], key
        if "default" in definition:
            jsonschema.validate(definition["default"], definition)
        for example in definition.get("examples", []):
            jsonschema.validate(example, definition)


def test_what_null_comes_to_stands_in_the_schema_too(tmp_path: Path) -> None:
    config = parse(tmp_path, REQUIRED)
    definitions = SCHEMA["definitions"]
    assert config.learning_rate == definitions["learning_rate"]["x-when-null"]["adamw"] == 1e-4
    assert (config.lora_alpha, config.sample_prompts) == (config.lora_rank, ("zorb",))
    assert trainer.count_steps(config, {}) == definitions["steps"]["x-when-null"] == 1000


def test_the_example_shows_every_key_and_is_valid() -> None:
    document = json.loads((ROOT / "example_config.json").read_text("utf-8"))
    jsonschema.validate(document, SCHEMA)
    keys = {*document, *document["training_params"]} - {"$schema", "training_params"}
    assert keys == set(SCHEMA["definitions"])
    config = trainer.load_config(str(ROOT / "example_config.json"))
    assert config.base_model == trainer.SHORT_NAMES["sd15"]


def test_the_example_passes_validation_but_for_its_paths() -> None:
    result = run("--config", ROOT / "example_config.json", "--validate-only", env=os.environ | {"HF_HUB_OFFLINE": "1"})
    assert result.code == 1
    assert result.last["code"] == "dataset_unreadable"
    assert len(result.last["problems"]) == 1


def test_flat_and_nested_configs_are_the_same(tmp_path: Path) -> None:
    flat = parse(tmp_path, REQUIRED | {"steps": 7, "lora_rank": 8})
    nested = parse(tmp_path, {**REQUIRED, "training_params": {"steps": 7, "lora_rank": 8}})
    everything_nested = parse(tmp_path, {"training_params": REQUIRED | {"steps": 7, "lora_rank": 8}})
    assert flat == nested == everything_nested
    for document in (REQUIRED, {"training_params": REQUIRED}):
        jsonschema.validate(document, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"training_params": {"steps": 3}}, SCHEMA)


def test_a_key_in_both_shapes_must_have_one_value(tmp_path: Path) -> None:
    assert parse(tmp_path, REQUIRED | {"steps": 7, "training_params": {"steps": 7}}).steps == 7
    assert "steps" in problems_of(tmp_path, REQUIRED | {"steps": 7, "training_params": {"steps": 8}})


def test_all_problems_are_reported_at_once_before_torch_is_imported(tmp_path: Path) -> None:
    document = {
        "dataset_path": 3,
        "trigger_words": [],
        "stepz": 1,
        "training_params": {"lora_rank": 0, "device": "tpu"},
    }
    config = write_config(tmp_path, **document)
    code = f"import sys, train_lora; train_lora.main(['--config', {str(config)!r}]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    result = Run(done.returncode, done.stdout, done.stderr)
    assert result.code == 0
    found = {item["path"]: item["message"] for item in result.last["problems"]}
    expected = {"dataset_path", "base_model", "output_path", "trigger_words", "stepz", "lora_rank", "device"}
    assert set(found) == expected
    assert "steps" in found["stepz"]
    assert "at least 1" in found["lora_rank"]


@pytest.mark.parametrize(
    ("change", "path", "words"),
    [
        ({"steps": "many"}, "steps", "integer or null, not text"),
        ({"deterministic": "False"}, "deterministic", "boolean, not text: write false without quotes"),
        ({"lora_rank": "16"}, "lora_rank", "integer, not text: write 16 without quotes"),
        ({"trigger_words": "flurp"}, "trigger_words", 'array, not text: write ["flurp"]'),
        ({"dataset_path": "C:\bilder"}, "dataset_path", "write / between folders"),
        ({"steps": True}, "steps", "not a boolean"),
        ({"batch_size": 1.5}, "batch_size", "integer"),
        ({"optimizer": "adamv"}, "optimizer", '"adamw8bit"'),
        ({"resolution": 500}, "resolution", "multiple of 8"),
        ({"adam_beta1": 1}, "adam_beta1", "less than 1"),
        ({"learning_rate": 0}, "learning_rate", "more than 0"),
        ({"trigger_words": ["ok", " "]}, "trigger_words[1]", "blank"),
        ({"trigger_words": ["a", "a"]}, "trigger_words", "twice"),
        ({"metadata": {"colour": "red"}}, "metadata", "title"),
        ({"output_name": "../evil"}, "output_name", "match"),
        ({"output_name": "state"}, "output_name", "match"),
        ({"sample_prompts": ["\udcff"]}, "sample_prompts", "surrogates"),
        ({"dataset_path": "a\0b"}, "dataset_path", "match"),
        ({"dataset_path": "\ud800"}, "dataset_path", "surrogates"),
        ({"training_params": 3}, "training_params", "object"),
        ({"training_params": {"lora_rnk": 3}}, "training_params.lora_rnk", "lora_rank"),
    ],
)
def test_a_bad_value_is_named_with_what_is_allowed(tmp_path: Path, change: Json, path: str, words: str) -> None:
    found = problems_of(tmp_path, REQUIRED | change)
    assert words in found[path]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"steps": 1,,}', "line 1, column 13"),
        ("", "line 1, column 1"),
        ("[]", "object"),
        ("{" * 3, "line 1"),
        ('{"a":' * 100_000, "parsed"),
        ('{"steps": NaN}', "not finite"),
        ('{"steps": 1e999}', "not finite"),
        ('{"steps": ' + "9" * 5000 + "}", "parsed"),
        ('{"steps": 1, "steps": 2}', "twice"),
        (b'{"steps": "\xff"}', "UTF-8"),
    ],
)
def test_malformed_json_is_an_error_with_a_place_or_a_reason(tmp_path: Path, text: str | bytes, words: str) -> None:
    with pytest.raises(trainer.TrainerError) as caught:
        parse(tmp_path, text)
    assert caught.value.code in ("config_invalid", "config_unreadable")
    assert words in caught.value.message


MENDED_BY = {  # a config -> words of the hint, and the lines that are shown
    '{\n"a": 1,\n}': ("Remove the comma before the closing bracket, on line 2", {"line 2": '"a": 1,', "line 3": "}"}),
    '{"a": ["b",]}': ("Remove the comma before", {"line 1": '{"a": ["b",]}'}),
    '{"a": 1\n\n"b": 2}': ("Put a comma at the end of line 1", {"line 1": '{"a": 1', "line 3": '"b": 2}'}),
    '{\n"a": "C:\\Users"}': ("Write / or \\\\ in the place of \\ on line 2", {"line 2": '"a": "C:\\Users"}'}),
    '{"a": "x\n"}': ('Close the text with " on line 1', {"line 1": '{"a": "x'}),
    '{"a": "x}': ('Close the text with " on line 1', {"line 1": '{"a": "x}'}),
    '{"a": {}': ("ends too early", {"line 1": '{"a": {}'}),
    "": ("is empty", {"line 1": ""}),
    '{"a": 1, // one\n"b": 2}': (
        "JSON has no comments, and writes true, false, null: see line 1",
        {"line 1": '{"a": 1, // one'},
    ),
    "{'a': 1}": ("plain double quotes", {"line 1": "{'a': 1}"}),
    '{"a": \u201cx\u201d}': ("plain double quotes", {"line 1": '{"a": \u201cx\u201d}'}),
    '{"a": True}': ("writes true, false, null", {"line 1": '{"a": True}'}),
    '{"a" 1}': ("Look at that place", {"line 1": '{"a" 1}'}),
}


@pytest.mark.parametrize("text", MENDED_BY)
def test_broken_json_comes_with_its_remedy_and_the_lines_in_question(tmp_path: Path, text: str) -> None:
    with pytest.raises(trainer.TrainerError) as caught:
        parse(tmp_path, text)
    words, lines = MENDED_BY[text]
    assert words in caught.value.hint
    told = {item["path"]: item["message"] for item in caught.value.problems}
    assert told == lines or (sys.version_info >= (3, 13) and told == {min(lines): lines[min(lines)]})  # it names less


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "latin-1"])
def test_a_config_that_is_not_utf_8_is_told_how_to_save_it(tmp_path: Path, encoding: str) -> None:
    with pytest.raises(trainer.TrainerError) as caught:
        parse(tmp_path, '{\n"dataset_path": "Möwen"}'.encode(encoding))
    assert ("not UTF-8 (line 2)" if encoding == "latin-1" else "UTF-16") in caught.value.message
    assert caught.value.hint == "Save it as UTF-8."


def test_a_config_that_is_not_there_is_named_with_its_folder_and_the_file_that_is_meant(tmp_path: Path) -> None:
    (tmp_path / "my.json.txt").touch()
    with pytest.raises(trainer.TrainerError) as caught:
        trainer.load_config(str(tmp_path / "my.json"))
    assert f"{tmp_path / 'my.json'} cannot" in caught.value.message
    assert "did you mean 'my.json.txt'?" in caught.value.message


def test_keys_of_other_trainers_are_known_by_ours(tmp_path: Path) -> None:
    others = {name: key for key, row in SCHEMA["definitions"].items() for name in row.get("x-other-names", [])}
    assert not {*others} & {*SCHEMA["definitions"]} and len(others) > 40
    assert all(f"here it is '{key}'" in trainer.unknown_key(name, name, [])["message"] for name, key in others.items())
    told = problems_of(tmp_path, REQUIRED | {"lr": 1, "max_train_steps": 2}, ("network_dim=3",))
    ours = ["learning_rate", "steps", "lora_rank"]
    assert [message.split("'")[1] for message in told.values()] == ours


@posix
def test_a_path_of_windows_is_refused_on_another_system_unless_it_exists(tmp_path: Path) -> None:
    told = problems_of(tmp_path, REQUIRED | {"dataset_path": "C:\\photos", "base_model": "demo\\base"})
    assert set(told) == {"dataset_path", "base_model"} and all("as on Windows" in text for text in told.values())
    (tmp_path / "a\\b").mkdir()
    assert parse(tmp_path, REQUIRED | {"dataset_path": "a\\b"}).dataset_path == str(tmp_path / "a\\b")


def test_a_byte_order_mark_and_whole_floats_are_accepted(tmp_path: Path) -> None:
    config = parse(tmp_path, b"\xef\xbb\xbf" + json.dumps(REQUIRED | {"steps": 1000.0}).encode())
    assert config.steps == 1000
    assert isinstance(config.steps, int)


def test_set_overrides_a_key_wherever_it_stands(tmp_path: Path) -> None:
    document = REQUIRED | {"training_params": {"steps": 7}}
    config = parse(
        tmp_path, document, ("steps=9", "output_name=mine", 'trigger_words=["a", "b"]', "deterministic=true")
    )
    assert (config.steps, config.output_name, config.trigger_words, config.deterministic) == (
        9,
        "mine",
        ("a", "b"),
        True,
    )
    found = problems_of(tmp_path, REQUIRED, ("stepz=9", "steps", "steps=x"))
    assert set(found) == {"--set stepz", "--set steps", "steps"}
    assert "not finite" in problems_of(tmp_path, REQUIRED, ("weight_decay=NaN",))["--set weight_decay"]
    assert "parsed" in problems_of(tmp_path, REQUIRED, ("steps=" + "[" * 100_000,))["--set steps"]
    assert parse(tmp_path, REQUIRED, ("output_path=~nosuchuser/x",)).output_path.endswith("~nosuchuser/x")


def test_paths_are_relative_to_the_config_and_overrides_to_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base").mkdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    config = parse(tmp_path, REQUIRED | {"base_model": "base"}, ("output_path=here",))
    assert config.dataset_path == str(tmp_path / "images")
    assert config.base_model == str(tmp_path / "base")
    assert config.output_path == str(elsewhere / "here")
    assert parse(tmp_path, REQUIRED | {"base_model": "sdxl"}).base_model == trainer.SHORT_NAMES["sdxl"]
    assert parse(tmp_path, REQUIRED | {"base_model": "x.safetensors"}).base_model == str(tmp_path / "x.safetensors")


def test_the_config_can_come_from_stdin(tmp_path: Path) -> None:
    result = run("--config", "-", input=json.dumps({"stepz": 1}).encode(), cwd=tmp_path)
    assert (result.code, result.last["code"]) == (1, "config_invalid")


def test_odd_combinations_warn(tmp_path: Path) -> None:
    odd = {"steps": 5, "epochs": 2, "lr_warmup_steps": 5, "learning_rate": 0.5}
    codes = [code for code, _, _ in trainer.config_warnings(parse(tmp_path, REQUIRED | odd))]
    assert codes == ["steps_over_epochs", "warmup_too_long", "learning_rate_high"]


CANNOT_WORK: dict[str, tuple[str, Json]] = {  # what is wrong: the path of the problem, the settings
    "reads no lokr": ("save_format", {"lora_type": "lokr", "save_format": "diffusers"}),
    "with lora_type lokr": ("use_rslora", {"lora_type": "lokr", "use_rslora": True}),
    "must be 0 with": ("lora_dropout", {"lora_type": "lokr", "lora_dropout": 0.1}),
    "must be none with": ("quantize_base", {"lora_type": "lokr", "quantize_base": "nf4"}),
    "must be more than min_timestep (500)": ("max_timestep", {"min_timestep": 500, "max_timestep": 500}),
    "averages itself": ("ema_decay", {"optimizer": "schedulefree_adamw", "ema_decay": 0.9}),
    "must be more than 0": ("adam_beta1", {"optimizer": "schedulefree_adamw", "adam_beta1": 0}),
    "must be an existing .safetensors file": ("init_lora_path", {"init_lora_path": "missing.safetensors"}),
}


@pytest.mark.parametrize("message", CANNOT_WORK)
def test_settings_that_cannot_work_together_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, message: str
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    key, changes = CANNOT_WORK[message]
    with pytest.raises(trainer.TrainerError) as caught:
        parse(tmp_path, REQUIRED | changes)
    assert caught.value.code == "config_invalid"
    assert [problem["path"] for problem in caught.value.problems] == [key]
    assert message in caught.value.problems[0]["message"]


def test_a_missing_optional_package_is_named_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = {name: row.package for name, row in trainer.OPTIMIZERS.items() if row.package}
    listed = (ROOT / "requirements.txt").read_text("utf-8")
    assert all(re.search(rf"^# {package} .*\b{name}\b", listed, re.MULTILINE) for name, package in packages.items())
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for optimizer, package in packages.items():
        with pytest.raises(trainer.TrainerError) as caught:
            parse(tmp_path, REQUIRED | {"optimizer": optimizer, "report_to": ["wandb", "tensorboard"]})
        told = [(problem["path"], problem["message"].rpartition(": ")[2]) for problem in caught.value.problems]
        tools = ("wandb", "tensorboard")
        assert told == [("optimizer", f"pip install {package}"), *(("report_to", f"pip install {t}") for t in tools)]
    assert "pip install bitsandbytes" in problems_of(tmp_path, REQUIRED | {"quantize_base": "nf4"})["quantize_base"]
    # A folder that a tracker left beside the script looks like a package without a file of its own.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=None))
    with pytest.raises(trainer.TrainerError):
        parse(tmp_path, REQUIRED | {"report_to": ["wandb"]})


def test_each_optimizer_has_its_own_rate_and_odd_ones_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    rates = SCHEMA["definitions"]["learning_rate"]["x-when-null"]
    assert list(rates) == SCHEMA["definitions"]["optimizer"]["enum"] == list(trainer.OPTIMIZERS)
    assert (rates["adamw"], rates["prodigy"], rates["lion"]) == (1e-4, 1.0, 3e-5)
    for optimizer, rate in rates.items():
        config = parse(tmp_path, REQUIRED | {"optimizer": optimizer})
        assert config.learning_rate == rate
        assert not list(trainer.config_warnings(config))
    odd: list[tuple[str, Json]] = [
        ("prodigy_rate_low", {"optimizer": "prodigy", "learning_rate": 1e-4}),
        ("schedule_not_needed", {"optimizer": "schedulefree_adamw", "lr_scheduler": "cosine"}),
        ("schedule_not_needed", {"optimizer": "prodigy", "lr_scheduler": "cosine_with_restarts"}),
        ("learning_rate_high", {"learning_rate": 1.0}),
        ("setting_unused", {"huber_c": 0.5}),
        ("setting_unused", {"optimizer": "lion", "adam_beta2": 0.99}),
        ("setting_unused", {"text_encoder_learning_rate": 1e-5}),
    ]
    for code, changes in odd:
        assert [warning[0] for warning in trainer.config_warnings(parse(tmp_path, REQUIRED | changes))] == [code]


# ======================================================================================
# terminal
# ======================================================================================


class Screen:
    """What a terminal shows: enough of one for what the script writes, with windows that get narrower."""

    encoding = "utf-8"

    def __init__(self, width: int) -> None:
        self.width, self.rows, self.row, self.column, self.breaks, self.writes = width, [""], 0, 0, 0, [""]

    def write(self, text: str) -> None:
        self.writes += [text] * bool(text)
        for part in re.findall(r"\x1b\[[\d;]*[A-Za-z]|[^\x1b]|\x1b", text.replace("\r\n", "\n")):
            assert part != "\x1b", "an escape sequence that nobody knows"
            if part in ("\x1b[J", "\x1b[K"):
                self.rows[self.row] = self.rows[self.row][: self.column]
                self.rows = self.rows[: self.row + 1] if part[-1] == "J" else self.rows
            elif part in "\r\n":
                self.column, self.row = 0, self.row + (part == "\n")
                self.rows += [""] * (self.row == len(self.rows))
            elif part[0] != "\x1b":
                self.put(part)

    def put(self, letter: str) -> None:
        cells = letter + "\0" * (unicodedata.east_asian_width(letter) in "WF")  # the second half of a wide one
        if self.column + len(cells) > self.width:
            self.column, self.row, self.breaks = 0, self.row + 1, self.breaks + 1
            self.rows += [""] * (self.row == len(self.rows))
        row = self.rows[self.row]
        self.rows[self.row] = row[: self.column] + cells + row[self.column + len(cells) :]
        self.column += len(cells)

    def flush(self) -> None: ...

    def resize(self, width: int) -> None:
        """Break the row of the cursor anew, as terminals do; the cursor stays with its letter."""
        row, self.width = self.rows[self.row], width
        parts = [row[start : start + width] for start in range(0, len(row), width)] or [""]
        self.rows[self.row : self.row + 1] = parts
        self.row, self.column = self.row + self.column // width, self.column % width

    def text(self) -> str:
        return "\n".join(self.rows).replace("\0", "").rstrip("\n")


class Clock:
    now = 100.0


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> Screen:
    """A terminal at stderr, and stdout elsewhere; time stands still but for `pass_time`."""
    screen = Screen(80)
    monkeypatch.setattr(trainer, "sys", SimpleNamespace(stderr=screen, platform="linux"))
    monkeypatch.setattr(os, "isatty", lambda descriptor: descriptor == 2)
    monkeypatch.setattr(trainer, "terminal_width", lambda: screen.width)
    monkeypatch.setattr(trainer, "in_foreground", lambda: True)
    monkeypatch.setattr(time, "monotonic", lambda: Clock.now)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    return screen


def show(terminal: trainer.Terminal, *events: Json, every: float = 0.2) -> None:
    for event in events:
        Clock.now += every
        terminal.show(event["type"], {key: value for key, value in event.items() if key != "type"})


def progress(step: int, **changes: Any) -> Json:
    known = {"percent": step / 15, "loss": 0.1, "loss_avg": 0.0912, "learning_rate": 1e-4, "grad_norm": 1.0}
    known |= {"epoch": 1.0, "steps_per_second": 2.34, "eta_seconds": 3725.0, "vram_gb": 7.93}
    return {"type": "progress", "step": step, "total_steps": 1500, **known, **changes}


def phase(message: str, name: str = "caching", **counts: int) -> Json:
    return {"type": "info", "message": message, "phase": name, **counts}


A_WARNING = {"type": "warning", "code": "x", "message": "The pictures of 日本 are small.", "hint": "Use larger ones."}
A_SAMPLE = {
    "type": "sample",
    "step": 9,
    "image_path": "/out/a\x1b[2J.png",
    "prompt": "a zorb,\nin 東京",
    "index": 0,
    "seed": 1,
}
AN_END = {
    "type": "complete",
    "step": 1500,
    "final_path": "/out/lora_final.safetensors",
    "total_time": 3725,
    "loss": 0.09,
}


def test_one_line_tells_of_the_training_and_what_happened_stands_above_it(screen: Screen) -> None:
    terminal = trainer.Terminal()
    show(terminal, phase("Encoding images.", current=0, total=9), phase("Encoding images.", current=4, total=9))
    assert screen.text() == " Encoding images 4/9  ━━━━━━━━━━━━━━━━━───────────────────────   44%"
    show(terminal, phase("Encoding images.", current=9, total=9), phase("Training.", "training"))
    show(terminal, progress(1), A_WARNING, progress(400))
    head = "Warning: The pictures of 日本 are small. Use larger ones.\n"
    line = " Step  400/1500  ━━────────   26%  1:02:05 left  loss 0.0912   2.3 it/s  7.9 GB"
    assert screen.text() == head + line
    assert (screen.row, screen.column) == (1, 0), "the cursor stands at the start of the line"
    show(terminal, phase("Sampling at step 400.", "sampling"), A_SAMPLE, every=5)
    assert screen.text().splitlines()[-1] == " Sampling at step 400  0:00:05"
    show(terminal, phase("Training.", "training"))
    assert screen.text() == f"{head}Sample: /out/a?[2J.png (a zorb, in 東京)\n{line}"
    Clock.now += 4
    terminal.show("", {})
    assert "  1:02:01 left" in screen.text()
    show(terminal, AN_END | {"warnings": [A_WARNING]})
    ended = screen.text()
    terminal.show("", {})
    assert ended == screen.text()
    assert ended.endswith(
        "Complete: 1,500 steps in 1:02:05, loss 0.0900.\n  LoRA        /out/lora_final.safetensors\n"
        "  Report      /out/report.html\n  Warnings    1"
    )
    assert screen.column == 0


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (200, f" Step  400/1500  {'━' * 10}{'─' * 30}   26%  1:02:05 left  loss 0.0912   2.3 it/s  7.9 GB"),
        (72, " Step  400/1500   26%  1:02:05 left  loss 0.0912   2.3 it/s  7.9 GB"),
        (60, " Step  400/1500   26%  1:02:05 left  loss 0.0912   2.3 it/s"),
        (40, " Step  400/1500   26%  1:02:05 left"),
        (24, " Step  400/1500   26%"),
        (4, " .."),
        (1, " "),
    ],
)
def test_the_line_has_the_width_of_the_terminal(screen: Screen, width: int, line: str) -> None:
    screen.width = width
    show(terminal := trainer.Terminal(), progress(1), progress(400))
    assert screen.text() == line
    downloads = [
        phase("Downloading 誰か/日本語モデル😀-xl-base (MB).", current=done, total=6938) for done in range(0, 6938, 700)
    ]
    for narrower in range(width, 11, -1):
        screen.width = narrower
        show(terminal, *downloads, progress(2), progress(1500, steps_per_second=0.01, loss_avg=None, eta_seconds=None))
    assert screen.breaks == 0
    assert screen.text() == screen.rows[0], "every line took the place of the one before"


def test_a_window_that_gets_narrower_keeps_no_piece_of_the_line(screen: Screen) -> None:
    show(terminal := trainer.Terminal(), A_WARNING | {"hint": ""}, progress(400))
    for width in (70, 33, 30, 90, 25):
        screen.resize(width)
        show(terminal, progress(401))
        assert [row[:5] for row in screen.rows] == ["Warni", " Step"]
    screen.resize(15)
    show(terminal, A_SAMPLE | {"image_path": "a.png", "prompt": "b"})
    assert screen.rows[1:] == ["Sample: a.png", "        (b)", " Step  401/..."]


def test_the_line_is_drawn_ten_times_a_second_at_most_and_only_if_it_changes(screen: Screen) -> None:
    show(terminal := trainer.Terminal(), *(progress(step) for step in range(1000)), every=0.001)
    assert len(screen.writes) <= 12
    Clock.now += 0.1
    terminal.show("", {})
    assert " Step  999/1500" in screen.writes[-1]
    count = len(screen.writes)
    Clock.now += 0.2
    terminal.show("", {})
    assert len(screen.writes) == count


def test_in_the_background_nothing_is_drawn_over_what_is_typed(screen: Screen, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = trainer.Terminal()
    monkeypatch.setattr(trainer, "in_foreground", lambda: False)
    show(terminal, progress(1), A_SAMPLE, progress(2))
    assert "".join(screen.writes).count("\x1b[J") == 0
    assert screen.rows[0].startswith("Sample: ")


@pytest.mark.parametrize(
    ("variables", "drawn", "coloured"),
    [
        ({}, True, True),
        ({"NO_COLOR": ""}, True, True),
        ({"NO_COLOR": "1"}, True, False),
        ({"TERM": "dumb"}, False, False),
        ({"TERM": ""}, False, False),
    ],
)
def test_colours_and_the_line_are_for_terminals_that_can_and_people_who_want_them(
    screen: Screen, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], drawn: bool, coloured: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    show(trainer.Terminal(), A_WARNING, *(progress(step) for step in range(50)), AN_END | {"warnings": []})
    written = "".join(screen.writes)
    assert bool(re.search(r"\x1b\[[\d;]*m", written)) is coloured
    assert ("\x1b" in written) is drawn
    assert written.count("Step ") == 1 or drawn, "every ten seconds on a terminal that cannot"
    assert screen.text().splitlines()[0] == "Warning: The pictures of 日本 are small. Use larger ones."


@pytest.mark.parametrize("able", [0, 1])
def test_on_windows_escape_sequences_are_turned_on_first(monkeypatch: pytest.MonkeyPatch, able: int) -> None:
    asked: list[tuple[int, int]] = []

    def set_mode(handle: int, mode: int) -> int:
        asked.append((handle, mode))
        return able

    calls = {"GetStdHandle": lambda number: number, "GetConsoleMode": lambda handle, mode: 1}
    kernel = SimpleNamespace(SetConsoleMode=set_mode, **calls)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(trainer, "sys", SimpleNamespace(platform="win32"))
    assert trainer.takes_escapes() is bool(able)
    assert asked == [(-12, 4)]


def test_a_bar_has_letters_that_the_terminal_can_show(screen: Screen) -> None:
    screen.encoding = "ascii"
    show(trainer.Terminal(), A_WARNING, progress(750))
    assert "are small" in screen.text()
    assert "  #####-----   50%" in screen.text()
    assert screen.text().isascii()


def test_no_text_moves_the_cursor_and_a_long_path_stays_whole(screen: Screen) -> None:
    screen.width = 20
    show(trainer.Terminal(), A_WARNING | {"message": "a\r\nb\tc\x9bm\u202ed", "hint": "in /a/very/long-path/to it."})
    assert screen.writes[-1].replace("\x1b[1;33m", "").replace("\x1b[m", "").splitlines() == [
        "Warning: a b c?m?d",
        "         in",
        "         /a/very/long-path/to",
        "         it.",
    ]


def test_a_log_tells_each_phase_once_and_then_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, screen: Screen
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    counts = [phase("Sampling at step 4.", "sampling", current=done, total=40) for done in (*range(40), 40)]
    show(trainer.Terminal(), *counts, A_SAMPLE | {"prompt": "a"}, *counts, every=0.45)
    told = [line for line in screen.text().splitlines() if line.startswith("Sampling")]
    assert told == [f"Sampling at step 4. {done}/40" for done in (0, 23, 4, 27)]


def test_an_error_says_what_happened_where_and_what_to_do(screen: Screen) -> None:
    listed = [{"path": "steps", "message": "must be at least 1"}, {"path": "x", "message": "unknown key; " + "b " * 40}]
    message = "The config has 2 problems: steps: must be at least 1; x: unknown"
    error = {"type": "error", "code": "config_invalid", "message": message, "hint": "Mend them.", "problems": listed}
    show(trainer.Terminal(), progress(3), error | {"step": 120, "phase": "resuming"})
    assert screen.text().splitlines() == [
        "Error: The config has 2 problems.",
        "  Where       while resuming; step 120 is saved",
        "  What to do  Mend them.",
        "  Code        config_invalid (docs/troubleshooting.md)",
        "  Problems    - steps: must be at least 1",
        "              - x: unknown key; " + "b " * 23 + "b",
        " " * 16 + "b " * 15 + "b",
    ]
    many = [{"path": f"{number}.png", "message": "is broken"} for number in range(300)]
    show(trainer.Terminal(), error | {"message": "No images.", "problems": many, "step": None, "phase": "checking"})
    assert screen.text().count("is broken") == 300, "nothing is cut off"


@pytest.mark.parametrize(("free", "fits"), [(8.0, "9.1 GB needed, 8.0 GB free: it does NOT fit"), (24.0, ": it fits;")])
def test_a_check_ends_with_what_a_run_needs_and_whether_it_fits(screen: Screen, free: float, fits: str) -> None:
    dataset: Json = {"images": 40, "validation_images": 4, "regularization_images": 0, "skipped": [{}], "captions": {}}
    dataset |= {"buckets": {"512x512": 30, "448x576": 6}, "steps_per_epoch": 36}
    model = {"name": "m", "title": "Stable Diffusion 1.x", "prediction_type": "epsilon", "guessed": False}
    hardware = {"device": "cuda:0", "name": "RTX", "free_gb": free}
    event: Json = {"dataset": dataset, "model": model, "hardware": hardware, "config": {"steps": 1000}, "warnings": []}
    show(trainer.Terminal(), event | {"type": "validated", "memory": {"total_gb": 9.1, "host_gb": 5.0}})
    text = screen.text()
    for line in (
        "Images      40, 4 held out, 1 with a flaw",
        "Buckets     512x512: 30, 448x576: 6",
        fits,
        "Warnings    0",
    ):
        assert line in text
    assert max(map(len, screen.rows)) < 80


def at_a_terminal(*arguments: str | Path, width: int = 80, stdout: bool = False, **variables: str) -> tuple[int, str]:
    """Run Python with a terminal of this width at stderr (and at stdout); its exit code and what it wrote there."""
    import fcntl
    import struct
    import termios

    reading, writing = os.openpty()
    fcntl.ioctl(writing, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    settings = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "TERM")} | variables
    streams: Json = {"stdout": writing if stdout else subprocess.DEVNULL, "stderr": writing}
    written = b""
    with subprocess.Popen([sys.executable, *map(str, arguments)], cwd=ROOT, env=settings, **streams) as process:
        os.close(writing)
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(reading, 4096):
                written += data
        os.close(reading)
    return process.returncode, written.decode()


@posix
@pytest.mark.parametrize("width", [40, 80, 200])
def test_at_a_real_terminal_the_line_fits_and_goes_at_the_end(width: int) -> None:
    code = (
        "import train_lora as t\n"
        "t.Terminal.REDRAW_S = 0\n"
        "s = t.EventStream(); s.start(lambda: None, None)\n"
        f"for event in {[progress(step) for step in range(200)]}: s.emit(event.pop('type'), **event)\n"
        "s.emit('complete', step=1, final_path='/a b c', total_time=1, loss=None); s.close()\n"
    )
    ended, written = at_a_terminal("-c", code, width=width, TERM="xterm")
    screen = Screen(width)
    screen.write(written)
    assert (ended, screen.breaks) == (0, 0)
    assert screen.text().startswith("Complete: 1 step in 0:00:01, loss")
    assert max(line.count("Step") for line in written.split("\x1b[J")) == 1


@posix
def test_events_on_the_same_terminal_stay_whole_and_the_end_can_be_read() -> None:
    ended, written = at_a_terminal(SCRIPT, "--config", "none.json", stdout=True, TERM="xterm", NO_COLOR="1")
    lines = written.splitlines()
    events = [json.loads(line) for line in lines if line.startswith("{")]
    check_events(events)
    assert ended == 1
    told = [line for line in lines[-12:] if re.match("Error: The config /|  (Where|What to do|Code) ", line)]
    assert len(told) == 4
    assert told[1] == "  Where       while reading none.json"
    assert "\x1b" not in written
    assert len([line for line in lines if "gives a progress line instead" in line]) == 1


@posix
def test_a_file_at_stderr_gets_the_log_where_the_events_are_on_a_terminal(tmp_path: Path) -> None:
    reading, writing = os.openpty()
    with (tmp_path / "log").open("wb") as log:
        subprocess.run(command("--config", tmp_path / "none"), stdout=writing, stderr=log, timeout=60)
    os.close(writing)
    os.close(reading)
    assert (tmp_path / "log").read_text().startswith("Error: The config ")


# ======================================================================================
# events
# ======================================================================================


def test_help_shows_every_option_and_examples() -> None:
    done = subprocess.run(command("--help"), capture_output=True, text=True, check=True)
    for word in (
        "--config",
        "--validate-only",
        "--set",
        "--fresh",
        "--health-port",
        "--debug",
        "--version",
        "examples:",
    ):
        assert word in done.stdout
    version = subprocess.run(command("--version"), capture_output=True, text=True, check=True)
    assert version.stdout == f"train_lora.py {trainer.VERSION}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "Put --config before the JSON file"),
        ("my.json", "Put --config before my.json"),
        ("--confg x", "No such option: --confg (did you mean '--config'?)"),
        ("--config", "expected one argument"),
        ("--config a b", "No such option: b"),
        ("--conf a", "No such option: --conf (did you mean '--config'?)"),
    ],
)
def test_a_wrong_command_line_is_an_error_event_and_exit_code_2(arguments: str, words: str) -> None:
    result = run(*arguments.split())
    assert (result.code, result.last["code"]) == (2, "usage")
    assert words in result.last["message"]


def test_events_are_strict_json_whatever_they_hold() -> None:
    long = "é\n" * 1_000_000
    fields = {"loss": math.nan, "path": Path("a\udcffb"), "text": "\ud800 é", "deep": [{"a": math.inf}], "long": long}
    line = trainer.ProgressEvent("info", 0, "", 0.0, fields).line()
    event = json.loads(line, parse_constant=lambda token: pytest.fail(token))
    assert (event["loss"], event["path"], event["text"]) == (None, "a\ufffdb", "\ufffd é")
    assert event["long"] == long
    assert line.isascii()
    assert line.count(b"\n") == 1


def test_an_error_reaches_a_person_on_stderr_too(tmp_path: Path) -> None:
    result = run("--config", tmp_path / "missing.json")
    assert result.last["code"] == "config_unreadable"
    assert "missing.json" in result.stderr
    assert "Traceback" not in result.stderr


NOISE = """
import ctypes, logging, os, subprocess, sys, warnings
import train_lora
load = train_lora.import_libraries
def noisy(*unused):
    print("python print"); os.write(1, b"raw write\\n"); subprocess.run(["echo", "a child process"])
    ctypes.CDLL(None).puts(b"C puts"); ctypes.CDLL(None).fflush(None);
    warnings.warn("careful"); logging.getLogger("a library").warning("logged")
    load(*unused)
train_lora.import_libraries = noisy
sys.exit(train_lora.main(sys.argv[1:]))
"""


@posix
@needs_torch
def test_a_noisy_library_cannot_reach_stdout(tmp_path: Path, images: Path, models: Path) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out"))
    arguments = [sys.executable, "-c", NOISE, "--config", str(config), "--validate-only"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, timeout=120)
    result = Run(done.returncode, done.stdout, done.stderr)
    assert result.last["type"] == "validated"
    for noise in ("python print", "raw write", "a child process", "C puts"):
        assert noise in result.stderr
    assert "careful" not in result.stderr and "logged" not in result.stderr, "advice for people at a notebook"


@posix
def test_a_closed_or_full_stdout_is_said_on_stderr(tmp_path: Path) -> None:
    line = shlex.join(command("--config", tmp_path / "none.json"))
    closed = subprocess.run(["sh", "-c", f"{line} >&-"], capture_output=True, text=True)
    assert closed.returncode == 1
    assert "stdout is closed" in closed.stderr
    if Path("/dev/full").exists():
        full = subprocess.run(["sh", "-c", f"{line} >/dev/full"], capture_output=True, text=True)
        assert full.returncode == 1
        assert "No space left" in full.stderr
        assert "Traceback" not in full.stderr


@posix
@pytest.mark.parametrize("terminal", [False, True])
def test_nobody_needs_to_read_or_even_open_stderr(tmp_path: Path, terminal: bool) -> None:
    line = shlex.join(command("--config", tmp_path / "none.json"))
    for closed in ("2>&-", "<&- 2>&-", "2>/dev/full"):
        done = subprocess.run(["sh", "-c", f"{line} {closed}"], capture_output=True)
        result = Run(done.returncode, done.stdout, b"")
        assert (result.code, result.last["code"]) == (1, "config_unreadable")
    code = (
        "import train_lora as t\n"
        "s = t.EventStream(); s.start(lambda: None, None)\n"
        "for n in range(3000): s.info(f'note {n} ' + 'x' * 100)\n"
        "s.emit('complete', step=1, final_path='/out/a', total_time=1, loss=None); s.close()\n"
    )
    reading, writing = os.openpty() if terminal else os.pipe()  # nobody reads: full after 64 KB, or 4
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=writing, timeout=30)
    os.close(reading)
    os.close(writing)
    assert len(done.stdout.splitlines()) == 3002


@posix
def test_progress_does_not_crowd_out_the_end_for_a_person_who_was_away() -> None:
    code = (
        "import train_lora as t\n"
        "s = t.EventStream(); s.start(lambda: None, None)\n"
        "s.warning('x', 'y' * 200_000)\n"  # more than a pipe holds
        f"for n in range(3000): s.emit('progress', **{progress(7)})\n"
        "s.emit('complete', step=1, final_path='/out/a', total_time=1, loss=None)\n"
        "t.wait_until_empty(s._spoken, None)\n"
    )
    pipes: Json = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as child:
        while b'"complete"' not in child.stdout.readline():  # type: ignore[union-attr]
            pass
        told = child.stderr.read().decode()  # type: ignore[union-attr]
    assert told.splitlines()[-4].startswith("Complete: ")


STDOUT_FULL = """
whole, t.write_all = t.write_all, lambda fd, data: full(fd, data)
def full(fd, data):
    if b'"progress"' in data and b"events.jsonl" not in os.fsencode(os.readlink(f"/proc/self/fd/{fd}")):
        raise OSError(28, "No space left on device")
    whole(fd, data)
"""


@needs_torch
@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
def test_a_stdout_that_fills_up_ends_the_run_with_an_error_and_everything_saved(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=100_000))
    with patched(STDOUT_FULL, "--config", config) as process:
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 1
    assert b"stdout cannot be written to: No space left on device" in stderr
    log = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    check_events(log)
    assert (log[-1]["type"], log[-1]["code"]) == ("error", "disk_full")
    assert (tmp_path / f"out/checkpoints/state_step_{log[-1]['step']}.safetensors").exists()


@posix
@needs_torch
def test_when_the_reader_goes_away_the_run_saves_and_exits_141(tmp_path: Path, images: Path, models: Path) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=100_000))
    with subprocess.Popen(command("--config", config), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        for line in process.stdout:
            if json.loads(line)["type"] == "progress":
                break
        process.stdout.close()
        assert process.wait(timeout=30) == 141
    log = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    check_events(log)
    assert Path(log[-1]["state_path"]).exists()


@posix
def test_a_slow_reader_loses_progress_and_nothing_else() -> None:
    code = (
        "import train_lora as t\n"
        "s = t.EventStream(); s.QUEUE_LIMIT = 50\n"
        "s.start(lambda: None, None)\n"
        "for n in range(5000):\n"
        "    s.emit('progress', **{k: n for k in 'step total_steps percent loss loss_avg learning_rate grad_norm epoch'"
        " ' steps_per_second eta_seconds vram_gb'.split()})\n"
        "    n % 100 or s.info(f'note {n}')\n"
        "s.emit('complete', step=1, final_path='/out/a', total_time=1, loss=None); s.close()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        time.sleep(2)
        assert process.stdout
        events = [json.loads(line) for line in process.stdout]
    assert len([event for event in events if event["type"] == "info"]) == 50
    progress = len([event for event in events if event["type"] == "progress"])
    assert progress < 5000
    assert progress + events[-1]["dropped"] == 5000


@pytest.mark.parametrize(
    "torn",
    [b'{"type": "prog', b'{"ty', b'{"ty\0\0', b"\0\0\0", b"{", b"\0" * 1_500_000],
    ids=lambda torn: str(torn[:9]),
)
def test_a_torn_last_line_of_the_log_is_cut(tmp_path: Path, torn: bytes) -> None:
    log = tmp_path / "events.jsonl"
    log.write_bytes(b'{"type": "start"}\n' + torn)
    code = (
        "import sys, pathlib, train_lora as t\n"
        "s = t.EventStream(); s.start(lambda: None, None)\n"
        "s.open_log(pathlib.Path(sys.argv[1])); s.info('hello'); s.close()\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "events.jsonl")], cwd=ROOT, check=True, capture_output=True
    )
    lines = [
        line for line in (tmp_path / "events.jsonl").read_text().splitlines() if line.strip("\0")
    ]  # too many to cut
    assert [json.loads(line)["type"] for line in lines] == ["start", "start", "info"]


def test_the_log_takes_whole_lines_only_and_catches_up_once_the_disk_has_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = (
        "import os, resource, sys, pathlib, train_lora as t\n"
        "log = pathlib.Path(sys.argv[1])\n"
        "s = t.EventStream(); s.start(lambda: None, None); s.open_log(log)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (log.stat().st_size + 250, resource.RLIM_INFINITY))\n"
        "for n in range(5): s.info(f'note {n}')\n"
        "sys.stderr.write(log.read_text())\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)\n"
        "s.emit('complete', step=1, final_path='x', total_time=1, loss=None); s.close()\n"
    )
    pytest.importorskip("resource")
    log = tmp_path / "events.jsonl"
    done = subprocess.run([sys.executable, "-c", code, str(log)], cwd=ROOT, capture_output=True, check=True)
    meanwhile = [json.loads(line) for line in done.stderr.splitlines() if line.startswith(b"{")]
    assert [event["seq"] for event in meanwhile] == [0, 1, 2]
    assert log.read_bytes() == done.stdout
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [event["seq"] for event in events] == list(range(8))
    assert [event["code"] for event in events if event["type"] == "warning"] == ["log_not_written"]


@posix
@needs_torch
def test_a_name_that_is_not_utf8_is_a_folder_like_any_other(tmp_path: Path, images: Path, models: Path) -> None:
    odd = tmp_path / os.fsdecode(b"\xff\n\xe9")
    try:
        odd.mkdir()
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    shutil.copytree(images, odd / "images")
    config = write_config(tmp_path, **small(odd / "images", models / "sd15", odd / "out", steps=2))
    result = run("--config", config)
    assert (result.code, result.last["type"]) == (0, "complete")
    assert result.last["final_path"].endswith("/\ufffd\n\ufffd/out/lora_final.safetensors")
    assert (odd / "out/lora_final.safetensors").exists()


# ======================================================================================
# stopping
# ======================================================================================


def stop_when(process: subprocess.Popen[bytes], ready: Any, stop: int | Callable[[], None]) -> Run:
    """Send a signal, or do what else stops it, once an event is `ready`; the finished run."""
    lines = []
    assert process.stdout
    for line in process.stdout:
        lines.append(line)
        if ready(json.loads(line)):
            process.send_signal(stop) if isinstance(stop, int) else stop()
            break
    rest = process.stdout.read()
    return Run(process.wait(timeout=60), b"".join(lines) + rest, b"")


@posix
@needs_torch
@pytest.mark.parametrize("phase", ["importing", "loading", "caching"])
def test_a_stop_before_training_leaves_at_once_with_nothing_to_save(
    tmp_path: Path, images: Path, models: Path, phase: str
) -> None:
    config = write_config(tmp_path, **small(images, models / "sdxl", tmp_path / "out"))
    with subprocess.Popen(command("--config", config), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        result = stop_when(process, lambda event: event.get("phase") == phase, signal.SIGTERM)
    assert result.code == 143
    assert result.last["type"] == "interrupted"
    assert (result.last["path"], result.last["state_path"], result.last["signal"]) == (None, None, "SIGTERM")
    assert list((tmp_path / "out/checkpoints").iterdir()) == []


@posix
@needs_torch
def test_a_stopped_run_saves_goes_on_and_ends_as_if_it_had_not_been_stopped(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = write_config(
        tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=60, lora_dropout=0.1, lr_scheduler="cosine")
    )
    whole = run("--config", config, "--set", f"output_path={tmp_path / 'whole'}")
    assert (whole.code, whole.last["type"]) == (0, "complete")
    losses: dict[int, float] = {}
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with subprocess.Popen(
            command("--config", config), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            result = stop_when(process, lambda event: event["type"] == "progress", number)
        assert result.code == code
        assert result.last["signal"] == signal.Signals(number).name
        assert result.last["step"] == max(event["step"] for event in result.of("progress"))
        assert Path(result.last["path"]).exists()
        assert Path(result.last["state_path"]).exists()
        losses |= {event["step"]: event["loss"] for event in result.of("progress")}
    last = run("--config", config)
    assert (last.code, last.last["type"]) == (0, "complete")
    losses |= {event["step"]: event["loss"] for event in last.of("progress")}
    assert losses == {event["step"]: event["loss"] for event in whole.of("progress")}
    assert_same_tensors(tmp_path / "out/lora_final.safetensors", tmp_path / "whole/lora_final.safetensors")
    state = "checkpoints/state_step_60.safetensors"
    assert_same_tensors(tmp_path / "out" / state, tmp_path / "whole" / state)
    log = [json.loads(line) for line in (tmp_path / "out/events.jsonl").read_text().splitlines()]
    assert [event["type"] for event in log if event["seq"] == 0] == ["start"] * 3


@posix
@needs_torch
def test_sigusr1_and_files_named_save_and_stop_do_what_they_say(tmp_path: Path, images: Path, models: Path) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=3000, checkpoint_steps=0))
    with subprocess.Popen(command("--config", config), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        lines = []
        assert process.stdout
        for line in process.stdout:
            lines.append(line)
            kind = json.loads(line)["type"]
            if kind == "progress" and len([item for item in lines if b'"progress"' in item]) == 1:
                process.send_signal(signal.SIGUSR1)
            if kind == "checkpoint":
                asked = ("save", "stop")[len([item for item in lines if b'"checkpoint"' in item]) - 1]
                (tmp_path / "out" / asked).touch()
                if asked == "stop":
                    break
        result = Run(0, b"".join(lines) + process.stdout.read(), b"")
        assert process.wait(timeout=60) == 143
    assert result.last["type"] == "interrupted"
    assert not (tmp_path / "out/stop").exists()


@posix
@needs_torch
def test_two_signals_at_once_are_one_request_and_lose_nothing(tmp_path: Path, images: Path, models: Path) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=100_000))
    with subprocess.Popen(command("--config", config), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:

        def trained(event: Json) -> bool:
            if event["type"] == "progress":
                process.send_signal(signal.SIGINT)
                return True
            return False

        result = stop_when(process, trained, signal.SIGTERM)
    assert result.last["type"] == "interrupted"
    assert result.last["step"] >= 1
    assert Path(result.last["path"]).exists()


@posix
@pytest.mark.parametrize("moment", ["first line", "reader asleep"])
def test_a_stop_is_heard_from_the_first_line_on_and_whether_or_not_somebody_reads(tmp_path: Path, moment: str) -> None:
    reading, writing = os.pipe()
    if moment == "reader asleep":
        os.set_blocking(writing, False)
        with pytest.raises(BlockingIOError):
            while True:
                os.write(writing, b" " * 65536)
        os.set_blocking(writing, True)
    hang = "t.load_config = lambda *_: (print('ready', file=sys.stderr, flush=True), time.sleep(60))"
    with patched(hang, "--config", tmp_path / "none", stdout=writing) as process:
        os.close(writing)
        if moment == "first line":
            lines = os.read(reading, 65536)
        else:
            assert process.stderr
            process.stderr.readline()
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=10) == 143
    if moment == "first line":
        lines += os.read(reading, 65536)
        assert [event["type"] for event in Run(143, lines, b"").events] == ["start", "interrupted"]
    os.close(reading)


@posix
def test_a_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    hang = "t.load_config = lambda *_: time.sleep(60)"
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # as nohup does
    with patched(ignore + hang, "--config", tmp_path / "none") as process:
        assert process.stdout
        lines = process.stdout.readline()
        process.send_signal(signal.SIGHUP)
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        result = Run(process.wait(timeout=10), lines + process.stdout.read(), b"")
    assert (result.code, result.last["signal"]) == (130, "SIGINT")


SLOW_MICRO_BATCH = """
t.StopWatcher.RESCUE_S = float(os.environ["RESCUE_S"])
loss = t.LoRATrainer.loss
def slow(self, batch, step, micro_batch):
    if step == 3:
        self.events.info("slow"); time.sleep(60)
    return loss(self, batch, step, micro_batch)
t.LoRATrainer.loss = slow
"""


@posix
@needs_torch
@pytest.mark.parametrize("way", ["patience", "second signal"])
def test_a_stop_in_a_long_micro_batch_does_not_wait_for_its_end(
    tmp_path: Path, images: Path, models: Path, way: str
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", steps=6, checkpoint_steps=2)
    whole = train(tmp_path, config | {"output_path": str(tmp_path / "whole")})
    path, patience = write_config(tmp_path, **config), "0.5" if way == "patience" else "60"
    environment = os.environ | {"RESCUE_S": patience}
    sent = math.inf
    with patched(SLOW_MICRO_BATCH, "--config", path, stderr=subprocess.DEVNULL, env=environment) as process:

        def slow(event: Json) -> bool:
            nonlocal sent
            if event.get("message") == "slow" and way == "second signal":
                process.send_signal(signal.SIGTERM)
                time.sleep(1.5)
            sent = time.monotonic()
            return event.get("message") == "slow"

        result = stop_when(process, slow, signal.SIGTERM)
    assert time.monotonic() - sent < 5  # the grace time would end it after 8
    assert (result.code, result.last["type"]) == (143, "interrupted")
    assert result.last["step"] == (3 if way == "patience" else 2)
    assert trainer.decode_state(Path(result.last["state_path"]))
    assert_same_tensors(train(tmp_path, config).final_path, whole.final_path)


@posix
@needs_torch
def test_a_parent_that_asks_for_a_stop_and_goes_away_asks_once(tmp_path: Path, images: Path, models: Path) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=100_000))
    slow = SLOW_MICRO_BATCH.replace("time.sleep(60)", "time.sleep(2)")
    environment = os.environ | {"RESCUE_S": "60"}
    with patched(slow, "--config", config, stderr=subprocess.DEVNULL, env=environment) as process:
        assert process.stdout
        for line in process.stdout:
            if b'"slow"' in line:
                break
        process.send_signal(signal.SIGINT)
        time.sleep(1.2)
        process.stdout.close()
        assert process.wait(timeout=30) == 130
    log = logged(tmp_path / "out/events.jsonl")
    assert (log[-1]["type"], log[-1]["step"]) == ("interrupted", 4)


@posix
@needs_torch
def test_as_the_first_process_of_a_container_it_hears_a_stop(tmp_path: Path, images: Path, models: Path) -> None:
    inside = ["unshare", "--fork", "--pid", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        inside[1:1] = ["--user", "--map-root-user"]
        if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
            pytest.skip("no PID namespace can be made here")
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=100_000))
    arguments = [*inside, *command("--config", config)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")

        def stop_child() -> None:
            (child,) = children.read_text().split()
            os.kill(int(child), signal.SIGTERM)

        result = stop_when(process, lambda event: event["type"] == "progress", stop_child)
    assert result.events[0]["pid"] == 1
    assert (result.code, result.last["type"]) == (143, "interrupted")
    assert Path(result.last["path"]).exists()


@posix
@needs_torch
def test_a_signal_to_the_whole_group_is_one_stop_and_leaves_no_process(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=100_000))
    # The shell gets the signal too, and outlives it, as a job runner does.
    shell = ["sh", "-c", f"trap : TERM; {shlex.join(command('--config', config))} & wait $!; wait $!"]
    with subprocess.Popen(shell, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        result = stop_when(
            process, lambda event: event["type"] == "progress", lambda: os.killpg(process.pid, signal.SIGTERM)
        )
    assert (result.code, result.last["type"]) == (143, "interrupted")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


@needs_torch
def test_a_stop_abandons_the_step_at_the_next_micro_batch(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", gradient_accumulation_steps=3)
    made = train(tmp_path, config, stop=Quiet(after=4))
    assert made.state.step == 1
    resumed = train(tmp_path, config)
    assert resumed.state.step == 4
    whole = train(tmp_path, config | {"output_path": str(tmp_path / "whole")})
    assert_same_tensors(resumed.final_path, whole.final_path)


@needs_torch
def test_a_stop_is_heard_between_denoising_steps(tmp_path: Path, images: Path, models: Path) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", sample_steps=20), stop=Quiet(after=5))
    made.sample(0)
    assert emitted(made, "sample") == []


# ======================================================================================
# several processes
# ======================================================================================


class Pair:
    """Two processes of a run, started as torchrun does, but as copies of one that has imported everything."""

    def __init__(self, folder: Path, config: Json, *arguments: str, patch: str = "") -> None:
        folder.mkdir(exist_ok=True)
        self.stdout = [folder / f"stdout_{rank}" for rank in range(2)]
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["test_trainer"])
        told = ["--config", str(write_config(folder, **config)), *arguments]
        self.processes = [
            context.Process(target=be_one_of_two, args=(rank, port, told, self.stdout[rank], patch))
            for rank in range(2)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, ready: Callable[[Json], Any]) -> None:
        deadline = time.monotonic() + 60
        while not any(ready(event) for event in logged(self.stdout[0])):
            assert time.monotonic() < deadline, self.stdout[0].read_text()
            time.sleep(0.02)

    def end(self, limit_s: float = 60) -> tuple[Run, list[int | None]]:
        """What the main process told, and the exit codes; the other process tells nothing."""
        deadline = time.monotonic() + limit_s
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        for process in self.processes:
            process.kill()
        assert self.stdout[1].read_bytes() == b""
        return Run(codes[0] or 0, self.stdout[0].read_bytes(), b""), codes


def be_one_of_two(rank: int, port: int, arguments: list[str], stdout: Path, patch: str) -> None:
    """The body of one process of a Pair."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with stdout.open("wb") as file:
        os.dup2(file.fileno(), 1)
    trainer.unused_packages = lambda config: []  # everything is imported already
    exec(patch, {"t": trainer, "rank": rank, "time": time})
    sys.exit(trainer.main(arguments))


def together(tmp_path: Path, config: Json, **options: Any) -> Run:
    result, codes = Pair(tmp_path / "pair", config, **options).end()
    assert (codes, result.last["type"]) == ([0, 0], "complete")
    return result


def assert_same_run(result: Run, one: trainer.LoRATrainer, other: Path) -> None:
    """Hold a run of two processes against one that had all samples itself."""
    losses = [[event["loss"], event["grad_norm"]] for event in emitted(one, "progress")]
    torch.testing.assert_close(
        torch.tensor([[event["loss"], event["grad_norm"]] for event in result.of("progress")]), torch.tensor(losses)
    )
    torch.testing.assert_close(tensors_of(other), tensors_of(one.final_path), rtol=1e-3, atol=1e-5)


ALL_DRAWS = {
    "train_text_encoder": True,
    "max_caption_tokens": 150,
    "random_flip": True,
    "caption_dropout": 0.3,
    "noise_offset": 0.1,
    "snr_gamma": 5.0,
    "loss_type": "huber",
    "ema_decay": 0.9,
    "gradient_accumulation_steps": 2,
    "lr_scheduler": "cosine",
}


@posix
@needs_torch
@pytest.mark.parametrize(
    ("kind", "batch_size", "changes"), [("sd15", 1, {}), ("sdxl", 2, ALL_DRAWS)], ids=["plain", "everything"]
)
def test_two_processes_end_where_one_does_that_has_the_whole_batch(
    tmp_path: Path, images: Path, models: Path, kind: str, batch_size: int, changes: Json
) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    (folder / "0.txt").write_text(LONG)
    config = small(folder, models / kind, tmp_path / "one", epochs=3, learning_rate=1e-4, **changes) | {"steps": None}
    one = train(tmp_path, config | {"batch_size": 2 * batch_size})
    # Buckets of one to three images: batches that are uneven, and that leave a process without samples.
    assert {len(bucket) for bucket in one.plan.buckets.values()} & {1, 3}
    cache = {"cache_dir": str(tmp_path / "cache")}
    changes = {"output_path": str(tmp_path / "two"), "batch_size": batch_size, "validation_steps": 2, **cache}
    result = together(tmp_path, config | changes, patch=WARNING)
    assert_same_run(result, one, tmp_path / "two/lora_final.safetensors")
    header, wanted = (
        trainer.read_header(folder / "lora_final.safetensors") for folder in (tmp_path / "two", tmp_path / "one")
    )
    same = ("ss_total_batch_size", "ss_steps", "ss_epoch", "ss_max_train_steps", "train_lora.params")
    assert {key: header[key] for key in same[:4]} == {key: wanted[key] for key in same[:4]}
    assert f"2 processes train together, on batches of {2 * batch_size}." in [e["message"] for e in result.of("info")]
    codes = [event["code"] for event in result.of("warning")]
    assert codes.count("of_rank_1") == codes.count("of_both") == codes.count("training_on_cpu") == 1
    # Each has encoded every second image, and what they have encoded is on disk.
    counts = [int(event["message"].split()[-1]) for event in result.of("warning") if event["code"] == "encoded"]
    views = len(one.plan.views())
    assert sorted(counts) == [views // 2, (views + 1) // 2]
    alone = prepare(tmp_path, config | cache | {"output_path": str(tmp_path / "three")})
    assert f"{views} of {views} images are in the cache already." in [e["message"] for e in emitted(alone, "info")]


WARNING = """
t.LoRATrainer.warned, encoded, encode_images = False, [], t.encode_images
t.encode_images = lambda vae, images: encoded.extend(images) or encode_images(vae, images)
accumulate = t.LoRATrainer.accumulate
def warn(self, step):
    if not self.warned:
        self.events.warning("of_both", "Both processes find this.")
        self.events.warning("encoded", f"By process {rank}: {len(encoded)}")
    if rank and not self.warned:
        self.events.warning("of_rank_1", "One process finds this.")
    self.warned = True
    return accumulate(self, step)
t.LoRATrainer.accumulate = warn
"""


@posix
@needs_torch
def test_a_signal_to_either_process_stops_both_and_the_resumed_run_has_the_same_bits(
    tmp_path: Path, images: Path, models: Path
) -> None:
    changes = {"steps": 40, "batch_size": 1, "lora_dropout": 0.1, "ema_decay": 0.9}
    config = small(images, models / "sd15", tmp_path / "out", **changes)
    whole = together(tmp_path, config | {"output_path": str(tmp_path / "whole")})
    losses: dict[int, float] = {}
    for rank, number in ((1, signal.SIGINT), (0, signal.SIGTERM)):
        pair = Pair(tmp_path / "pair", config, patch=SLOWLY)
        pair.wait_for(lambda event: event["type"] == "progress")
        os.kill(pair.processes[rank].pid or 0, number)
        result, codes = pair.end(8)
        assert codes == [128 + number] * 2
        assert (result.last["type"], result.last["signal"]) == ("interrupted", number.name)
        assert Path(result.last["path"]).exists()
        losses |= {event["step"]: event["loss"] for event in result.of("progress")}
        assert result.last["step"] == max(losses) < 40
    result = together(tmp_path, config)
    losses |= {event["step"]: event["loss"] for event in result.of("progress")}
    assert losses == {event["step"]: event["loss"] for event in whole.of("progress")}
    for name in ("lora_final.safetensors", "checkpoints/state_step_40.safetensors"):
        assert_same_tensors(tmp_path / "out" / name, tmp_path / "whole" / name)

    with pytest.raises(trainer.TrainerError, match="batch_size") as caught:
        prepare(tmp_path, config | {"steps": 41})
    assert caught.value.code == "resume_mismatch"
    alone = train(tmp_path, config | {"steps": 41, "batch_size": 2})  # the same batches, summed in another order
    assert alone.state.step == 41
    assert warning_codes(alone).count("resume_not_exact") == 1


SLOWLY = "t.LoRATrainer.periodic = lambda self: time.sleep(0.1)"


@posix
@needs_torch
def test_a_failure_of_one_process_is_the_one_error_of_all(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", steps=2000, batch_size=1)
    fail = "def fail(*_): raise MemoryError('no memory left')\nif rank: t.{} = fail"
    result, codes = Pair(tmp_path / "pair", config, patch=fail.format("LoRATrainer.advance")).end(30)
    assert codes == [1, 1]
    assert result.last["code"] == "out_of_memory"
    assert result.last["message"].startswith("Process 1: ")
    assert "no memory left" in result.last["message"]

    before_they_meet, codes = Pair(tmp_path / "pair", config, patch=fail.format("load_config")).end(30)
    assert (codes, before_they_meet.last["code"]) == ([1, 1], "out_of_memory")
    of_the_main_one = fail.replace("if rank", "if not rank").format("LoRATrainer.advance")
    result, codes = Pair(tmp_path / "pair", config, "--fresh", patch=of_the_main_one).end(30)
    assert (codes, result.last["code"]) == ([1, 1], "out_of_memory")
    assert not result.last["message"].startswith("Process")


@posix
@needs_torch
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_other_at_once(tmp_path: Path, images: Path, models: Path, rank: int) -> None:
    config = small(images, models / "sd15", tmp_path / "out", steps=100_000, batch_size=1, checkpoint_steps=0)
    pair = Pair(tmp_path / "pair", config)
    pair.wait_for(lambda event: event.get("step", 0) >= 3)
    pair.processes[rank].kill()
    for process in pair.processes:
        process.join(5)
    assert [process.exitcode for process in pair.processes] == ([-9, 1] if rank == 0 else [1, -9])
    events = logged(pair.stdout[0])
    if rank == 1:
        check_events(events)
        assert (events[-1]["type"], events[-1]["message"]) == ("error", "Process 1 of 2 has gone.")
        assert events[-1]["step"] >= 3  # what was trained is saved


@posix
@needs_torch
@pytest.mark.parametrize("victim", ["process", "launcher"])
def test_under_accelerate_launch_a_killed_process_is_an_error_and_a_killed_launcher_a_stop(
    tmp_path: Path, images: Path, models: Path, victim: str
) -> None:
    psutil = pytest.importorskip("psutil")
    config = write_config(
        tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=100_000, batch_size=1, checkpoint_steps=0)
    )
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--main_process_port", "0", *command("--config", config)[1:]]
    with subprocess.Popen(launch, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:

        def kill() -> None:
            ranks = psutil.Process(process.pid).children()
            second = next(child for child in ranks if child.environ().get("RANK") == "1")
            (second if victim == "process" else process).kill()

        result = stop_when(process, lambda event: event.get("phase") == "loading", kill)
    if victim == "process":
        assert result.code == 1
        assert (result.last["type"], result.last["message"]) == ("error", "Process 1 of 2 has gone.")
    else:
        assert (result.last["type"], result.last["signal"]) == ("interrupted", "SIGTERM")


def test_what_several_processes_cannot_share_is_refused_before_they_wait(tmp_path: Path, images: Path) -> None:
    told = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    result = run("--config", "-", env=told, input=b"{}")
    assert (result.code, result.last["code"]) == (2, "usage")
    config = write_config(tmp_path, **small(images, tmp_path / "none", tmp_path / "out", device="cuda:1"))
    result = run("--config", config, env=told)
    assert [item["path"] for item in result.last["problems"]] == ["device"]


@pytest.mark.parametrize("others", [1, 3])
def test_a_warning_that_processes_give_at_the_same_moment_is_told_once(others: int) -> None:
    class Slow(Recorder):
        def emit(self, event_type: str, **fields: Any) -> None:
            time.sleep(0.1)
            super().emit(event_type, **fields)

    events = Slow()
    senders = [threading.Thread(target=events.relay, args=("of_all", "All find this.", "")) for _ in range(others)]
    for sender in senders:
        sender.start()
    time.sleep(0.02)
    events.warning("of_all", "All find this.")
    for sender in senders:
        sender.join()
    assert len(events.events) == len(events.warnings) == 1


def test_the_parts_of_a_batch_are_all_of_it_and_differ_by_one_at_most() -> None:
    for size in (1, 2, 3, 8):
        for count in range(20):
            parts = [range(count)[trainer.Group(rank, size).part(count)] for rank in range(size)]
            assert [index for part in parts for index in part] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_what_no_launcher_says_is_a_group_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for told in ({}, {"WORLD_SIZE": "1", "RANK": "0"}, {"WORLD_SIZE": "many", "RANK": "0"}):
        for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
            monkeypatch.delenv(name, raising=False)
        for name, value in told.items():
            monkeypatch.setenv(name, value)
        group = trainer.Group.from_environment()
        assert (group.rank, group.size, group.is_main) == (0, 1, True)
        assert (group.share(lambda: 3), group.gather(3), group.any(False), group.in_turn(lambda: 3)) == (
            3,
            [3],
            False,
            3,
        )


# ======================================================================================
# health
# ======================================================================================

WAITING = "t.load_config = lambda *_: time.sleep(600)"
WITH_A_CHILD = """
import subprocess
def wait(*_):
    child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, close_fds=False)
    print(child.pid, "child", file=sys.stderr, flush=True)
    time.sleep(600)
t.load_config = wait
"""


class Served:
    """The script with --health-port, as it waits or trains; what it answers, and how it ends."""

    def __init__(self, code: str, *arguments: str | Path, port: str = "0", **options: Any) -> None:
        self.process = patched(code, *arguments, "--health-port", port, **options)
        assert self.process.stdout
        self.lines = [self.process.stdout.readline(), self.process.stdout.readline()]
        told = json.loads(self.lines[1])
        self.address = str(told.get("address"))
        host, _, number = self.address.rpartition(":")
        self.place = (host.strip("[]"), int(number or 0))

    def connect(self, *parts: bytes) -> socket.socket:
        connection = socket.create_connection(self.place, timeout=20)
        with contextlib.suppress(OSError):  # it may have heard enough
            for part in parts:
                connection.sendall(part)
        return connection

    def ask(self, *parts: bytes) -> bytes:
        """Send as it is, and read to the end; nothing is what a closed connection says."""
        with self.connect(*parts) as connection:
            return read_all(connection)

    def get(self, page: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], Any]:
        client = http.client.HTTPConnection(*self.place, timeout=20)
        client.request(method, page, headers=headers)
        with contextlib.closing(client), client.getresponse() as answer:
            content = answer.read()
        return answer.status, dict(answer.getheaders()), json.loads(content) if content else None

    def stop(self, number: int = signal.SIGTERM) -> Run:
        self.process.send_signal(number)
        stdout, stderr = self.process.communicate(timeout=60)
        return Run(self.process.returncode, b"".join(self.lines) + stdout, stderr or b"")


def read_all(connection: socket.socket) -> bytes:
    content = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65536):
            content += piece
    return content


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One process for all that may be sent to it; none of it leaves a trace in what it tells."""
    made = Served(WAITING, "--config", tmp_path_factory.mktemp("served") / "none")
    yield made
    assert made.get("/health")[0] == 200
    result = made.stop()
    assert (result.code, [event["type"] for event in result.events]) == (143, ["start", "info", "interrupted"])
    assert re.sub(r"127\.0\.0\.1:\d+", "X", result.stderr) == (
        "Serving http://X/health and /status.\nInterrupted: Stopped by SIGTERM: nothing to save.\n"
    )


def test_health_and_status_are_answered_before_anything_is_loaded(served: Served) -> None:
    status, headers, body = served.get("/health?verbose=1")
    assert (status, headers["Content-Type"], headers["Cache-Control"]) == (200, "application/json", "no-store")
    assert list(body) == list(trainer.VITALS)
    assert (body["status"], body["phase"], body["step"]) == ("ok", "starting", 0)
    assert body["stalled_after_seconds"] == trainer.HealthServer.STALLED_S == 600
    assert "after 600 s" in trainer.HEALTH_HELP
    status, _, body = served.get("/status")
    assert (status, body["state"], body["pid"]) == (200, "running", served.process.pid)
    assert [event["type"] for event in body["events"]] == ["start", "info"]
    for page in ("/health", "/status"):
        got, head = served.get(page), served.get(page, "HEAD")
        assert (head[0], head[2]) == (200, None)
        assert {**head[1], "Content-Length": ""} == {**got[1], "Content-Length": ""}
        assert int(head[1]["Content-Length"]) > 50


BINARY = random.Random(0).randbytes(3000)
GET = b"GET /health HTTP/1.1\r\n"
AT_HOME = GET + b"Host: localhost\r\n"
CLIENT_HELLO = bytes.fromhex("16030100c8010000c40303") + BINARY[:193].replace(b"\r\n\r\n", b"")
REQUESTS: dict[str, tuple[bytes, int]] = {
    "GET": (AT_HOME + b"\r\n", 200),
    "HTTP/1.0 without a host": (b"GET /health HTTP/1.0\r\n\r\n", 200),
    "HEAD": (b"HEAD /status HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", 200),
    "POST": (b"POST /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}", 405),
    "a body that never comes": (b"PUT /status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999999\r\n\r\n", 405),
    "a chunked body": (b"POST /status HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nFFFFFFFFFFFF\r\n" + BINARY, 405),
    "DELETE": (b"DELETE /health HTTP/1.1\r\n\r\n", 405),
    "a body that is waited for": (AT_HOME + b"Expect: 100-continue\r\nContent-Length: 5\r\n\r\n", 200),
    "pipelined": (AT_HOME + b"\r\n" + b"GET /etc/passwd HTTP/1.1\r\n\r\n" * 50, 200),
    "two slashes": (b"GET //health HTTP/1.1\r\n\r\n", 404),
    "the root": (b"GET / HTTP/1.1\r\n\r\n", 404),
    "another file": (b"GET /../../etc/passwd HTTP/1.1\r\n\r\n", 404),
    "another file in disguise": (b"GET /health/%2e%2e/%2e%2e/etc/passwd HTTP/1.1\r\n\r\n", 404),
    "POST elsewhere": (b"POST /stop HTTP/1.1\r\n\r\n", 404),
    "no slash": (b"GET health HTTP/1.1\r\n\r\n", 400),
    "another server's page": (b"GET http://example.com/health HTTP/1.1\r\n\r\n", 400),
    "a proxy": (b"CONNECT example.com:443 HTTP/1.1\r\n\r\n", 400),
    "OPTIONS of all": (b"OPTIONS * HTTP/1.1\r\n\r\n", 400),
    "lower case": (b"get /health HTTP/1.1\r\n\r\n", 400),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), 400),
    "HTTP/9.9": (b"GET /health HTTP/9.9\r\n\r\n", 400),
    "a NUL byte in the path": (b"GET /health\0 HTTP/1.1\r\n\r\n", 400),
    "a NUL byte in a header": (AT_HOME + b"X: a\0b\r\n\r\n", 400),
    "a header without a name": (AT_HOME + b": x\r\n\r\n", 400),
    "a line that is no header": (AT_HOME + b"x\r\n\r\n", 400),
    "a folded header": (AT_HOME + b"X: a\r\n b\r\n\r\n", 400),
    "a carriage return in a header": (AT_HOME + b"X: a\rb\r\n\r\n", 400),
    "letters beyond ASCII": ("GET /h\u00e9alth HTTP/1.1\r\n\r\n".encode(), 400),
    "nothing": (b"\r\n\r\n", 400),
    "binary junk": (BINARY + b"\r\n\r\n", 400),
    "a header of a megabyte": (AT_HOME + b"X: " + b"a" * 1_000_000 + b"\r\n\r\n", 431),
    "ten thousand headers": (AT_HOME + b"X: a\r\n" * 10_000 + b"\r\n", 431),
    "a path of a megabyte": (b"GET /" + b"a" * 1_000_000, 431),
    "a megabyte without a line": (BINARY * 333, 431),
    "an IP address as the host": (GET + b"Host: 192.168.1.2:80\r\n\r\n", 200),
    "an IPv6 host": (GET + b"host:[::1]:80\r\n\r\n", 200),
    "localhost in capitals": (GET + b"HOST: LocalHost:8080 \r\n\r\n", 200),
    "a stranger's name": (GET + b"Host: rebound.example.com\r\n\r\n", 403),
    "a stranger's name with digits": (GET + b"Host: 127.0.0.1.example.com:80\r\n\r\n", 403),
    "a stranger behind localhost": (GET + b"Host: localhost\r\nHost: example.com\r\n\r\n", 403),
    "an empty host": (GET + b"Host:\r\n\r\n", 403),
    "much space in the host": (GET + b"Host: x" + b" " * 7900 + b"x\r\n\r\n", 403),
    "a user in the host": (GET + b"Host: localhost@example.com\r\n\r\n", 403),
}


@pytest.mark.parametrize("title", REQUESTS)
def test_each_request_has_its_answer_and_nothing_but_two_pages_is_served(served: Served, title: str) -> None:
    request, expected = REQUESTS[title]
    head, _, body = served.ask(request).partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines[1:])
    assert lines[0] == f"HTTP/1.1 {expected} {trainer.ANSWERS[expected][0]}".encode()
    assert (headers[b"Connection"], headers[b"X-Content-Type-Options"]) == (b"close", b"nosniff")
    assert (headers.get(b"Allow") == b"GET, HEAD") == (expected == 405)
    assert not any(name.lower().startswith(b"access-control") for name in headers)
    if request.startswith(b"HEAD"):
        assert body == b""
    else:
        assert len(body) == int(headers[b"Content-Length"])
        assert set(json.loads(body)) >= ({"status"} if expected == 200 else {"error", "hint"})


NEVER_ENDING = {
    "silence": b"",
    "one letter": b"G",
    "HTTP/0.9": b"GET /health\r\n",
    "no last line": AT_HOME,
    "TLS": CLIENT_HELLO,
    "almost too long": b"GET /" + b"a" * 8000,
}


def test_what_never_ends_is_cut_off_without_an_answer(served: Served) -> None:
    waiting = [served.connect(request) for request in NEVER_ENDING.values()]
    for connection in waiting:
        with connection:
            assert read_all(connection) == b""


@pytest.mark.parametrize("request_", NEVER_ENDING.values(), ids=NEVER_ENDING)
def test_who_hangs_up_early_is_let_go(served: Served, request_: bytes) -> None:
    with served.connect(request_) as half_open:
        half_open.shutdown(socket.SHUT_WR)
        assert read_all(half_open).startswith(b"HTTP/1.1 400 ")
    for request in (request_, request_ + b"\r\n\r\n"):
        served.connect(request).close()
        with served.connect(request) as rude:
            rude.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closing it resets
    assert served.get("/health")[0] == 200


def test_a_client_that_takes_a_moment_is_heard_after_however_long_a_silence(served: Served) -> None:
    time.sleep(trainer.HealthServer.CONNECTION_S + 0.1)
    with served.connect() as connection:
        time.sleep(0.1)
        connection.sendall(AT_HOME[:20])
        time.sleep(0.1)
        connection.sendall(AT_HOME[20:] + b"\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 200 ")


def test_a_drip_does_not_extend_the_time_of_a_connection(served: Served) -> None:
    with served.connect(AT_HOME) as connection:
        start, sent = time.monotonic(), 0
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < start + 60:
                connection.sendall(b"x")
                sent += 1
                time.sleep(0.05)
        assert sent < 1000


def test_more_connections_than_are_held_shut_nobody_out(served: Served) -> None:
    slow = [served.connect(AT_HOME) for _ in range(200)]
    descriptors = Path(f"/proc/{served.process.pid}/fd")
    for _ in range(10):
        assert served.get("/health")[0] == 200
        if descriptors.exists():
            assert len(list(descriptors.iterdir())) < trainer.HealthServer.CONNECTIONS + 30
    for connection in slow:
        connection.close()


def test_children_do_not_inherit_the_port_and_the_next_run_can_have_it_at_once(tmp_path: Path) -> None:
    first = Served(WITH_A_CHILD, "--config", tmp_path / "none")
    assert first.get("/health")[0] == 200  # closed by us first: the system remembers the connection
    assert first.process.stderr
    while not (line := first.process.stderr.readline()).endswith(b"child\n"):
        pass
    first.stop()
    second = Served(WAITING, "--config", tmp_path / "none", port=str(first.place[1]))
    assert second.address == first.address
    assert second.get("/health")[0] == 200
    second.stop()
    os.kill(int(line.split()[0]), signal.SIGKILL)


@pytest.mark.parametrize("host", ["taken", "203.0.113.1", "no.such.host.invalid", "a..b"])
def test_a_port_that_cannot_be_had_is_a_warning_and_the_run_goes_on(tmp_path: Path, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"{'127.0.0.1' if host == 'taken' else host}:{taken.getsockname()[1]}"
        result = run("--config", tmp_path / "none", "--health-port", place)
    assert [event.get("code") for event in result.events] == [None, "health_unavailable", "config_unreadable"]
    assert "The run goes on" in result.events[1]["hint"]


def test_a_malformed_port_is_a_wrong_command_line(tmp_path: Path) -> None:
    for text in ("", " ", "x", "-1", "65536", ":80", "::1:80", "[::1]", "1.2.3.4", "80x", "a:b:1", "\uff18"):
        with pytest.raises(trainer.TrainerError, match=re.escape(f"--health-port: '{text}' is not [HOST:]N")):
            trainer.health_address(text)
    result = run("--config", tmp_path / "none", "--health-port=80x")
    assert (result.code, result.last["code"], len(result.events)) == (2, "usage", 2)
    assert "8080" in result.last["hint"]


def test_hosts_and_ports_are_read_from_the_option_else_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORA_HEALTH_PORT", raising=False)
    assert trainer.health_address(None) is None
    assert trainer.health_address("0") == ("127.0.0.1", 0)
    assert trainer.health_address("0.0.0.0:65535") == ("0.0.0.0", 65535)
    assert trainer.health_address("trainer.local:80") == ("trainer.local", 80)
    assert trainer.health_address("[fe80::1%eth0]:80") == ("fe80::1%eth0", 80)
    monkeypatch.setenv("LORA_HEALTH_PORT", "")
    assert trainer.health_address(None) is None
    monkeypatch.setenv("LORA_HEALTH_PORT", "8080")
    assert trainer.health_address(None) == ("127.0.0.1", 8080)
    assert trainer.health_address("[::1]:9") == ("::1", 9)
    monkeypatch.setenv("LORA_HEALTH_PORT", "none")
    assert trainer.health_address("9") == ("127.0.0.1", 9)
    with pytest.raises(trainer.TrainerError, match="LORA_HEALTH_PORT: 'none'"):
        trainer.health_address(None)


@pytest.mark.parametrize(("host", "foreign"), [("[::1]", 403), ("0.0.0.0", 200), ("[::]", 200)])
def test_other_names_are_heeded_only_where_other_machines_may_connect(tmp_path: Path, host: str, foreign: int) -> None:
    made = Served(WAITING, "--config", tmp_path / "none", port=f"{host}:0")
    if made.address == "None":
        made.stop()
        pytest.skip("no IPv6 here")
    assert made.get("/health")[0] == 200
    assert made.get("/health", Host="trainer.example.com")[0] == foreign
    if host == "[::]":
        made.place = ("127.0.0.1", made.place[1])
        assert made.get("/health")[0] == 200
    made.stop()


def test_health_goes_from_ok_to_stalled_to_ok_to_ended() -> None:
    events: Any = Recorder()
    server = trainer.HealthServer(events, Quiet())

    def ask() -> tuple[int, Json]:
        head, _, body = server.answer(b"GET /health HTTP/1.0\r\n\r\n").partition(b"\r\n\r\n")
        return int(head.split()[1]), json.loads(body)

    events.beat_at = time.monotonic() + 9
    assert ask()[1]["idle_seconds"] == 0, "a beat that comes while the answer is made"
    events.beat()
    assert ask()[0] == 200
    events.beat_at -= server.STALLED_S + 1
    code, body = ask()
    assert (code, body["status"], body["idle_seconds"] > 600) == (503, "stalled", True)
    assert server.answer(b"GET /status HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert server.answer(b"HEAD /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 503 ")
    events.beat()
    assert ask()[1]["status"] == "ok"
    events.ended = "complete"
    events.beat_at -= server.STALLED_S + 1
    assert (ask()[0], ask()[1]["status"]) == (200, "ended")


def test_a_request_that_cannot_be_answered_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    events: Any = Recorder()
    server = trainer.HealthServer(events, Quiet())
    answers = iter((MemoryError(), b"well"))

    def answer(head: bytes) -> bytes:
        if isinstance(found := next(answers), Exception):
            raise found
        return found

    monkeypatch.setattr(server, "answer", answer)
    server.start("127.0.0.1", 0)
    port = int(events.events[-1]["address"].partition(":")[2])
    for expected in (b"", b"well"):
        with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\n\r\n")
            assert connection.recv(99) == expected


@needs_torch
def test_every_use_of_the_unet_is_a_sign_of_progress(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare(
        tmp_path, small(images, models / "sd15", tmp_path / "out", gradient_accumulation_steps=3, sample_steps=7)
    )
    beats: list[int] = []
    monkeypatch.setattr(made.events, "beat", lambda: beats.append(1))
    made.accumulate(0)
    assert len(beats) == 3
    beats.clear()
    made.effect_error(made.evaluation_weights())
    assert len(beats) >= 2, "a large model on a CPU takes minutes for each"
    beats.clear()
    made.denoise(torch.randn(1, 4, 8, 8), "zorb")
    assert len(beats) == 1 + 2 * 7


def test_each_item_of_long_work_is_a_sign_of_progress_even_where_its_event_is_left_out() -> None:
    code = (
        "import json, sys, train_lora as t\n"
        "s = t.EventStream(); s.REPEAT_S = 1e9; beats = []\n"
        "for n in s.track('Encoding.', range(5), 5, phase='caching'):\n"
        "    beats.append(s.beat_at); s.beat_at = 0.0\n"
        "print(json.dumps([beat > 0 for beat in [*beats, s.beat_at]]), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stderr.splitlines()[-1]) == [True] * 6


def test_the_newest_events_of_each_type_are_kept_and_long_ones_are_not() -> None:
    code = (
        "import sys, train_lora as t\n"
        "s = t.EventStream()\n"
        "for n in range(100): s.warning('x', f'{n}')\n"
        "s.info('a note'); s.info('y' * 20_000)\n"
        "server = t.HealthServer(s, t.StopWatcher(s))\n"
        "sys.stderr.buffer.write(server.answer(b'GET /status HTTP/1.0\\r\\n\\r\\n').partition(b'\\r\\n\\r\\n')[2])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    body = json.loads(done.stderr)
    assert [event["message"] for event in body["events"]] == ["95", "96", "97", "98", "99", "a note"]
    assert body["warnings"] == 100


HUNG = """
import ctypes
t.HealthServer.STALLED_S = 0.2
def hang(*_):
    while True:  # a signal ends C's sleep
        ctypes.CDLL(None).sleep(600)
t.load_config = hang
"""


@posix
def test_a_main_thread_that_hangs_in_a_library_is_stalled_and_still_stopped(tmp_path: Path) -> None:
    made = Served(HUNG, "--config", tmp_path / "none")
    deadline = time.monotonic() + 60
    while (answer := made.get("/health"))[0] != 503:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert (answer[2]["status"], answer[2]["stalled_after_seconds"]) == ("stalled", 0.2)
    assert made.get("/status")[2]["status"] == "stalled"
    assert made.stop().code == 143


def worry(made: Served, until: Callable[[], Any]) -> list[int]:
    """Send every kind of request at once, over and over; what /health said in between."""
    codes, requests = [], [request for request, _ in REQUESTS.values()]
    while not until():
        for request in (*requests, AT_HOME, CLIENT_HELLO, b"G"):
            with contextlib.suppress(OSError):
                made.connect(request[:20_000]).close()
        with contextlib.suppress(OSError):  # it has ended
            codes.append(made.get("/health")[0])
    return codes


@needs_torch
@pytest.mark.parametrize("way", ["train", "validate only"])
def test_a_run_under_hostile_requests_tells_the_same_and_ends_the_same(
    tmp_path: Path, images: Path, models: Path, way: str
) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=30, sample_prompts=["a"]))
    arguments = ["--config", str(config), *(["--validate-only"] if way == "validate only" else [])]
    alone = run(*arguments, "--set", f"output_path={tmp_path / 'alone'}")
    made = Served("", *arguments, stderr=subprocess.DEVNULL)
    assert made.process.stdout
    rest: list[bytes] = []
    reader = threading.Thread(target=lambda: rest.append(made.process.stdout.read()))  # type: ignore[union-attr]
    reader.start()
    codes = worry(made, lambda: not reader.is_alive())
    result = Run(made.process.wait(timeout=60), b"".join([*made.lines, *rest]), b"")
    assert set(codes) == {200}

    def told(one: Run) -> list[tuple[Any, ...]]:
        of_steps = [event for event in one.events if event["type"] not in ("start", "info")]
        return [(event["type"], event.get("step"), event.get("loss"), event.get("code")) for event in of_steps]

    assert (result.code, told(result)) == (alone.code, told(alone))


SHORT_PIPE = """
import fcntl
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 4096)
t.EventStream.QUEUE_LIMIT = 5
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pipes have another size")
@needs_torch
def test_status_follows_a_run_whose_reader_is_asleep_and_its_events_are_those_of_the_schema(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = write_config(
        tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=100_000, checkpoint_steps=20, log_steps=1)
    )
    made = Served(SHORT_PIPE, "--config", config, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 100
    while (body := made.get("/status")[2])["saved_step"] < 40:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    log = {event["seq"]: event for event in logged(tmp_path / "out/events.jsonl")}
    for event in body["events"]:
        EVENT_VALIDATOR.validate(event)
        assert event == log[event["seq"]]
    assert [event["seq"] for event in body["events"]] == sorted(event["seq"] for event in body["events"])
    assert collections.Counter(event["type"] for event in body["events"])["progress"] == 5
    newest = [event for event in body["events"] if event["type"] == "progress"][-1]
    shown = ("step", "total_steps", "percent", "loss", "loss_avg", "learning_rate", "epoch", "steps_per_second")
    assert {key: body[key] for key in (*shown, "eta_seconds", "vram_gb")} == {
        key: newest[key] for key in (*shown, "eta_seconds", "vram_gb")
    }
    assert (body["status"], body["state"], body["phase"]) == ("ok", "running", "training")
    assert Path(body["saved_state_path"]).name.startswith("state_step_")
    assert not [value for key, value in body.items() if key != "events" and isinstance(value, (dict, list))]
    result = made.stop()
    assert (result.code, result.last["type"]) == (143, "interrupted")
    assert result.last["dropped"] > 0


@posix
@needs_torch
def test_slow_connections_do_not_delay_a_stop(tmp_path: Path, images: Path, models: Path) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=100_000))
    made = Served("t.HealthServer.CONNECTION_S = 600.0", "--config", config, stderr=subprocess.DEVNULL)
    slow = [made.connect(AT_HOME) for _ in range(100)]
    while made.get("/health")[2]["phase"] != "training" or not made.get("/health")[2]["step"]:
        time.sleep(0.05)
    result = made.stop()  # which waits for a minute at most; a connection has ten
    assert (result.code, result.last["type"]) == (143, "interrupted")
    for connection in slow:
        connection.close()


@posix
@needs_torch
def test_of_several_processes_the_main_one_serves(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out")
    result, _ = Pair(tmp_path / "pair", config, "--health-port", "0").end()
    assert [event["seq"] for event in result.events if "address" in event] == [1]
    assert "health_unavailable" not in [event["code"] for event in result.of("warning")]


def test_the_health_page_describes_every_field_and_states_the_time(served: Served) -> None:
    page = (ROOT / "docs/health.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == list(served.get("/status")[2])
    assert f"{trainer.HealthServer.STALLED_S:.0f} seconds" in page
    assert all(str(status) in page for status in trainer.ANSWERS)
    shown = [json.loads(block) for block in re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)]
    assert [list(document) for document in shown] == [list(trainer.VITALS)]


# ======================================================================================
# output folder
# ======================================================================================


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "file.bin"
    trainer.write_file(target, b"old")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(trainer.TrainerError) as caught:
        trainer.write_file(target, b"new")
    assert caught.value.code == "disk_full"
    assert target.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [target]


@posix
def test_files_follow_the_umask_and_replace_links(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("mine")
    link = tmp_path / "link.bin"
    link.symlink_to(precious)
    previous = os.umask(0o027)
    try:
        trainer.write_file(link, b"data")
    finally:
        os.umask(previous)
    assert precious.read_text() == "mine"
    assert not link.is_symlink()
    assert link.stat().st_mode & 0o777 == 0o640


def test_one_run_per_output_folder_and_leftovers_of_ours_are_swept(tmp_path: Path) -> None:
    first = trainer.OutputFolder(tmp_path / "out")
    first.open()
    ours = first.checkpoints / ".state_step_2.safetensors.0a1b2c3d.train_lora.tmp"
    theirs = first.checkpoints / "other.tmp"
    ours.touch()
    theirs.touch()
    code = (
        "import sys, pathlib, train_lora as t\n"
        "try: t.OutputFolder(pathlib.Path(sys.argv[1])).open()\n"
        "except t.TrainerError as e: print(e.code)\n"
    )
    again = [sys.executable, "-c", code, str(first.path)]
    assert subprocess.run(again, cwd=ROOT, capture_output=True, text=True).stdout.strip() == "output_in_use"
    first._lock.close()  # type: ignore[union-attr]
    assert subprocess.run(again, cwd=ROOT, capture_output=True, text=True).stdout == ""
    assert not ours.exists()
    assert theirs.exists()


@needs_torch
def test_the_output_folder_holds_exactly_what_the_readme_lists(tmp_path: Path, images: Path, models: Path) -> None:
    changes = {"checkpoint_steps": 2, "validation_steps": 2, "output_name": "my", "sample_prompts": ["a", "b"]}
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=6, **changes))
    result = run("--config", config)
    assert (result.code, result.last["type"]) == (0, "complete")
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert names == {
        ".lock",
        "config.json",
        "events.jsonl",
        "my_final.safetensors",
        "report.html",
        "samples/grid.png",
        *(f"checkpoints/my_step_{step}.safetensors" for step in (2, 4, 6)),
        *(f"checkpoints/state_step_{step}.safetensors" for step in (4, 6)),
        *(f"samples/step_{step}_{index}.png" for step in (2, 4, 6) for index in (0, 1)),
    }
    assert [event["step"] for event in result.of("checkpoint")] == [2, 4, 6]
    assert [event["step"] for event in result.of("progress")] == [1, 2, 3, 4, 5, 6]
    assert (out / "events.jsonl").read_bytes().splitlines() == [json.dumps(event).encode() for event in result.events]
    text: Any = Image.open(out / "samples/step_4_1.png")
    assert (text.text["prompt"], text.text["seed"], text.text["step"]) == ("b", "43", "4")
    resolved = json.loads((out / "config.json").read_text())["config"]
    assert (resolved["resolution"], resolved["steps"], resolved["lora_alpha"]) == (64, 6, 4)
    before = {
        path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != "events.jsonl"
    }
    again = run("--config", config)
    assert (again.code, again.last["type"], again.last["step"]) == (0, "complete", 6)
    unchanged = {path: path.stat().st_mtime_ns for path in before if path.name != ".lock"}
    assert unchanged.items() <= before.items()


@posix
def test_an_output_that_cannot_be_written_is_an_error_and_nothing_is_made(tmp_path: Path, images: Path) -> None:
    blocker = tmp_path / "file"
    blocker.touch()
    config = write_config(tmp_path, **small(images, hollow_model(tmp_path / "model"), blocker / "out"))
    before = sorted(tmp_path.rglob("*"))
    result = run("--config", config)
    assert (result.code, result.last["code"]) == (1, "output_not_writable")
    assert sorted(tmp_path.rglob("*")) == before


# ======================================================================================
# model families
# ======================================================================================

SD15_UNET: Json = {"in_channels": 4, "out_channels": 4}


@pytest.mark.parametrize(
    ("pipeline", "unet", "family"),
    [
        ("StableDiffusionPipeline", {}, "sd15"),
        ("StableDiffusionPipeline", {"use_linear_projection": False, "cross_attention_dim": 32}, "sd15"),
        ("StableDiffusionPipeline", {"use_linear_projection": True}, "sd21"),
        ("StableDiffusionXLPipeline", {"use_linear_projection": True, "addition_embed_type": "text_time"}, "sdxl"),
    ],
)
def test_families_are_told_apart_by_structure(pipeline: str, unet: Json, family: str) -> None:
    assert trainer.detect_family({"_class_name": pipeline}, SD15_UNET | unet).name == family


@pytest.mark.parametrize(
    ("pipeline", "unet"),
    [
        ("StableDiffusionInpaintPipeline", {}),
        ("StableDiffusionPipeline", {"in_channels": 9}),
        ("StableDiffusionXLPipeline", {"use_linear_projection": True}),
        ("StableDiffusionXLImg2ImgPipeline", {"use_linear_projection": True, "addition_embed_type": "text_time"}),
        ("FluxPipeline", {}),
        ("StableDiffusionPipeline", {"_class_name": "UNet2DModel"}),
    ],
)
def test_other_models_are_refused_by_name(pipeline: str, unet: Json) -> None:
    with pytest.raises(trainer.TrainerError) as caught:
        trainer.detect_family({"_class_name": pipeline}, SD15_UNET | unet)
    assert caught.value.code == "model_unsupported"
    assert "sd15" in caught.value.hint or "text-to-image" in caught.value.hint


PLAIN, HALF = "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"
SHARDS = [f"unet/diffusion_pytorch_model-0000{number}-of-00002.safetensors" for number in (1, 2)]


@pytest.mark.parametrize(
    ("names", "wish", "half", "expected"),
    [
        ([PLAIN, HALF], None, True, ("fp16", [HALF])),
        ([PLAIN, HALF], None, False, (None, [PLAIN])),
        ([HALF], None, False, ("fp16", [HALF])),
        ([PLAIN, HALF], "fp16", False, ("fp16", [HALF])),
        ([PLAIN, "unet/diffusion_pytorch_model.non_ema.safetensors"], None, True, (None, [PLAIN])),
        ([*SHARDS, "unet/diffusion_pytorch_model.bin"], None, False, (None, SHARDS)),
    ],
)
def test_one_variant_of_the_weights_is_chosen(names: list[str], wish: str, half: bool, expected: Any) -> None:
    assert trainer.choose_weights(names, "unet", wish, half) == expected


def test_pickled_weights_are_never_an_alternative() -> None:
    pickled = ["unet/diffusion_pytorch_model.bin"]
    for names, wish, code in (
        (pickled, None, "model_unsafe"),
        ([], None, "model_not_found"),
        ([PLAIN], "ema", "model_not_found"),
    ):
        with pytest.raises(trainer.TrainerError) as caught:
            trainer.choose_weights(names, "unet", wish, False)
        assert caught.value.code == code


def test_a_model_or_a_dataset_that_is_spelled_wrong_is_answered_with_what_lies_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("my_photos", "demo/base"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "demo/base/model_index.json").touch()
    (tmp_path / "one.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    base, config = tmp_path / "demo/base", parse(tmp_path, REQUIRED)
    offline = trainer.hub_unreachable(dataclasses.replace(config, base_model="demo/bas"))
    assert "no folder here (did you mean 'base'?)" in offline.message
    assert "did you mean" not in trainer.hub_unreachable(config).message
    answers: dict[Callable[[], Any], str] = {
        lambda: scan(tmp_path, tmp_path / "my_fotos"): "my_photos",
        lambda: trainer.local_folder(base.with_name("bas")): "base",
        lambda: trainer.local_folder(base.parent): "base",
        lambda: trainer.open_single_file(tmp_path / "on.safetensors"): "one.safetensors",
    }
    for call, name in answers.items():
        with pytest.raises(trainer.TrainerError, match=f"did you mean '{name}'"):
            call()


@needs_torch
@pytest.mark.parametrize(
    ("name", "make", "code", "words"),
    [
        ("model", lambda model: None, "model_not_found", "does not exist"),
        ("model", lambda model: model.mkdir(), "model_not_found", "has no model_index.json"),
        ("model", lambda model: model.with_suffix(".ckpt").touch(), "model_not_found", "does not exist"),
        ("model.CKPT", lambda model: model.touch(), "model_unsafe", "holds pickled weights"),
        ("model.gguf", lambda model: model.touch(), "model_not_found", "is no .safetensors file"),
    ],
)
def test_a_missing_model_is_an_error_before_anything_is_made(
    tmp_path: Path, images: Path, name: str, make: Any, code: str, words: str
) -> None:
    make(tmp_path / name)
    result = run("--config", write_config(tmp_path, **small(images, tmp_path / name, tmp_path / "out")))
    assert (result.code, result.last["code"]) == (1, code)
    assert words in result.last["message"]
    assert not (tmp_path / "out").exists()


def copy_model(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def pickle_only(model: Path) -> None:
    (model / "unet/diffusion_pytorch_model.safetensors").rename(model / "unet/diffusion_pytorch_model.bin")


def truncate(model: Path) -> None:
    path = model / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def drop_weights(model: Path) -> None:
    import safetensors.torch

    path = model / "unet/diffusion_pytorch_model.safetensors"
    tensors = tensors_of(path)
    safetensors.torch.save_file({key: tensors[key] for key in sorted(tensors)[3:]}, path)


@needs_torch
@pytest.mark.parametrize(
    ("break_it", "code"),
    [
        (pickle_only, "model_unsafe"),
        (truncate, "model_corrupt"),
        (drop_weights, "model_corrupt"),
        (lambda model: (model / "unet/config.json").write_text("{"), "model_corrupt"),
        (lambda model: (model / "tokenizer/vocab.json").unlink(), "model_corrupt"),
    ],
)
def test_a_broken_model_is_told_from_an_unsafe_one(
    tmp_path: Path, images: Path, models: Path, break_it: Any, code: str
) -> None:
    model = copy_model(models / "sd15", tmp_path / "model")
    break_it(model)
    with pytest.raises(trainer.TrainerError) as caught:
        prepare(tmp_path, small(images, model, tmp_path / "out"))
    assert caught.value.code == code


COMMIT = "0123456789" * 4


class FakeHub(http.server.ThreadingHTTPServer):
    """What huggingface_hub asks of the Hub, for one model; `log` has every request, `faults` what goes wrong."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.files, self.url = files, f"http://127.0.0.1:{self.server_port}"
        self.log: list[str] = []
        self.tokens: set[str | None] = set()
        self.faults: dict[str, tuple[int, dict[str, str]]] = {}  # by a part of the path
        self.cut = ""  # the file whose connection breaks half-way
        self.halfway, self.go_on = threading.Event(), threading.Event()
        self.go_on.set()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def got(self) -> set[str]:
        """The files that were downloaded."""
        return {line.partition(f"/{COMMIT}/")[2] for line in self.log if line.startswith("GET") and "/resolve/" in line}


class HubAnswer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        hub, path = self.server, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.log.append(f"{self.command} {path}")
        if "someone" in path:  # the library has questions of its own
            hub.tokens.add(self.headers.get("Authorization"))
        place = path.removeprefix("/api/models")
        for part, (status, headers) in hub.faults.items():
            if part in path:
                return self.answer(status, b"", headers)
        if place.startswith("/someone/old-name"):
            return self.answer(307, b"", {"Location": path.replace("old-name", "tiny-sd")})
        if re.fullmatch(rf"/someone/tiny-sd(/revision/(main|{COMMIT}))?", place):
            siblings = [{"rfilename": name} for name in hub.files]
            return self.send_json({"id": "someone/tiny-sd", "sha": COMMIT, "siblings": siblings})
        if place == f"/someone/tiny-sd/tree/{COMMIT}":
            return self.send_json(
                [{"type": "file", "path": name, "size": len(data), "oid": "0"} for name, data in hub.files.items()]
            )
        data = hub.files.get(place.partition(f"/resolve/{COMMIT}/")[2])
        if data is None:
            return self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
        return self.answer(
            200, data, {"ETag": f'"{hashlib.sha1(path.encode() + data).hexdigest()}"', "X-Repo-Commit": COMMIT}
        )

    do_HEAD = do_GET

    def send_json(self, document: Any) -> None:
        self.answer(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        half = len(data) // 2
        self.wfile.write(data[:half])
        if self.server.cut and self.path.endswith(self.server.cut):
            self.server.halfway.set()
            self.server.go_on.wait(30)
            self.close_connection = True
        else:
            self.wfile.write(data[half:])

    def log_message(self, *_: Any) -> None: ...


UNET = "unet/diffusion_pytorch_model.safetensors"
JUNK = """README.md preview.png v1-5-pruned.safetensors unet/diffusion_pytorch_model.bin unet/flax_model.msgpack
    unet/diffusion_pytorch_model.non_ema.safetensors vae/diffusion_pytorch_model.bin vae/openvino_model.xml
    text_encoder/pytorch_model.bin text_encoder/flax_model.msgpack unet/onnx/model.safetensors unet/model.onnx
    safety_checker/config.json safety_checker/model.safetensors feature_extractor/preprocessor_config.json"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A Hub that has one whole model in two variants and much that nobody needs; this process asks it."""
    constants = pytest.importorskip("huggingface_hub").constants
    folder = hollow_model(tmp_path / "on_the_hub")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}
    files |= {name.replace(".safe", ".fp16.safe"): data for name, data in files.items()}
    files |= {name: name.encode() for name in (*JUNK.split(), "tokenizer/vocab.json", "tokenizer/merges.txt")}
    made = FakeHub(files)
    for name, value in {"ENDPOINT": made.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "hub")}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", made.url + "/{repo_id}/resolve/{revision}/{filename}")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    yield made
    made.go_on.set()
    made.shutdown()
    made.server_close()


def locate(tmp_path: Path, *, weights: bool = True, half: bool = False, **keys: Any) -> tuple[Any, list[Json]]:
    """Locate a model of the fake Hub: the source and the events."""
    events = Recorder()
    config = parse(tmp_path, REQUIRED | {"base_model": "someone/tiny-sd"} | keys)
    return trainer.locate_model(config, events, weights=weights, half=half), events.events


def refusal(tmp_path: Path, **options: Any) -> trainer.TrainerError:
    with pytest.raises(trainer.TrainerError) as caught:
        locate(tmp_path, **options)
    return caught.value


NEEDED = {*trainer.MODEL_KEYS, "text_encoder/config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}
WEIGHT_FILES = {UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}


@pytest.mark.parametrize(("half", "variant"), [(False, None), (True, None), (False, "fp16")])
def test_only_the_files_that_a_run_needs_are_downloaded(
    tmp_path: Path, hub: FakeHub, half: bool, variant: str | None
) -> None:
    locate(tmp_path, weights=False)
    assert hub.got() == set(trainer.MODEL_KEYS)
    source, _ = locate(tmp_path, half=half, variant=variant)
    fp16 = {name.replace(".safe", ".fp16.safe") for name in WEIGHT_FILES}
    assert hub.got() == NEEDED | (fp16 if half or variant else WEIGHT_FILES)
    assert {part.variant for part in source.parts.values()} == {"fp16" if half or variant else None}
    hub.log.clear()
    locate(tmp_path, half=half, variant=variant)
    assert not hub.got()


def tensor_file(size: int) -> bytes:
    header = json.dumps({"a": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


def test_a_download_tells_how_many_megabytes_have_come(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500_000)
    hub.files |= {UNET: tensor_file(3_000_000), "vae/diffusion_pytorch_model.safetensors": tensor_file(2_000_000)}
    _, events = locate(tmp_path)
    assert {(event["message"], event["total"]) for event in events} == {("Downloading someone/tiny-sd (MB).", 6)}
    told = [event["current"] for event in events]
    assert told == sorted(set(told))
    assert (told[0], told[-1]) == (0, 6)
    assert len(told) > 4
    for path in (tmp_path / "hub").rglob(UNET):
        path.resolve().unlink()
        path.unlink()
    _, events = locate(tmp_path)
    assert {event["total"] for event in events} == {4}, "only what is missing counts"
    assert not locate(tmp_path)[1]


def test_half_a_model_is_completed_online_and_named_offline(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    locate(tmp_path)
    (pointer,) = (tmp_path / "hub").rglob(UNET)
    pointer.resolve().unlink()
    pointer.unlink()
    blobs = tmp_path / "hub/models--someone--tiny-sd/blobs"
    for name, age in {"abc.1.incomplete": 7200, "abc.2.incomplete": 60}.items():  # killed long ago; another's download
        (blobs / name).write_bytes(b"half")
        os.utime(blobs / name, (time.time() - age,) * 2)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    hub.log.clear()
    error = refusal(tmp_path)
    assert (error.code, UNET in error.message, "vae" in error.message) == ("model_not_found", True, False)
    assert "same command" in error.hint
    assert locate(tmp_path, weights=False)[0].family.name == "sd15", "its configs are all here"
    assert not hub.log
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    locate(tmp_path)
    assert hub.got() == {UNET}
    assert [path.name for path in blobs.glob("*.incomplete")] == ["abc.2.incomplete"]


def test_a_network_that_dies_in_a_download_is_one_error_and_the_next_start_goes_on(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.cut = UNET
    error = refusal(tmp_path)
    assert (error.code, UNET in error.message) == ("model_not_found", True)
    assert "same command" in error.hint
    assert not list((tmp_path / "hub").rglob("*.incomplete"))
    hub.cut = ""
    hub.log.clear()
    locate(tmp_path)
    assert UNET in hub.got()
    assert "model_index.json" not in hub.got()


@posix
def test_a_full_disk_in_a_download_is_disk_full(tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    import resource

    hub.files[UNET] = tensor_file(3_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1e6))
        assert refusal(tmp_path).code == "disk_full"
    assert not any("GET /someone" in line for line in hub.log), "told before a byte is downloaded"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, before[1]))
    try:
        assert refusal(tmp_path).code == "disk_full"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    locate(tmp_path)


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to model someone/tiny-sd is restricted."}
REFUSED = {"X-Error-Message": "Invalid credentials in Authorization header"}


@pytest.mark.parametrize(
    ("place", "status", "headers", "says"),
    [
        ("/resolve/", 403, GATED, "is gated.*Accept its terms on the page of someone/tiny-sd.*HF_TOKEN"),
        ("/api/", 401, GATED, "is gated"),
        ("/api/", 401, REFUSED, "refused the token.*HF_TOKEN"),
        ("/api/", 401, {"X-Error-Message": 'User Access Token "x" is expired'}, "refused the token"),
        ("/api/", 401, {"X-Error-Code": "RepoNotFound"}, "no model 'someone/tiny-sd' on the Hub.*spelling"),
        ("/api/", 404, {"X-Error-Code": "RevisionNotFound"}, "no model"),
        ("/api/", 503, {}, "did not deliver .*503"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do(
    tmp_path: Path, hub: FakeHub, place: str, status: int, headers: dict[str, str], says: str
) -> None:
    hub.faults[place] = (status, headers)
    error = refusal(tmp_path)
    assert error.code == "model_not_found"
    assert re.search(says, f"{error.message} {error.hint}")


def test_a_model_that_the_hub_does_not_give_is_taken_from_the_cache(
    tmp_path: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    locate(tmp_path)
    for status, headers in ((404, {"X-Error-Code": "RepoNotFound"}), (401, REFUSED), (503, {})):
        hub.faults[""] = (status, headers)
        assert locate(tmp_path)[0].family.name == "sd15"
        assert "what its cache has is used" in locate(tmp_path, weights=False)[1][0]["message"]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert locate(tmp_path)[0].family.name == "sd15"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert locate(tmp_path)[0].family.name == "sd15"
    assert locate(tmp_path, revision=COMMIT)[0].family.name == "sd15"
    assert refusal(tmp_path, revision="v9").code == "model_not_found"


def test_a_gated_models_page_is_named_where_the_hub_is_the_official_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub_errors = pytest.importorskip("huggingface_hub").errors
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    error = hub_errors.GatedRepoError("gated", response=SimpleNamespace(headers={}, request=None))
    said = trainer.hub_refusal(parse(tmp_path, REQUIRED | {"base_model": "someone/tiny-sd"}), error)
    assert said
    assert "https://huggingface.co/someone/tiny-sd" in said.hint


def test_a_model_whose_first_home_is_gone_is_pointed_to_the_new_one(tmp_path: Path, hub: FakeHub) -> None:
    for gone, home in trainer.MOVED.items():
        error = refusal(tmp_path, base_model=gone)
        assert (error.code, f'"{home}"' in error.hint) == ("model_not_found", True)
        assert home in trainer.SHORT_NAMES or home.count("/") == 1
    for name, home in trainer.SHORT_NAMES.items():
        refusal(tmp_path, base_model=name)
        assert hub.log[-1] == f"GET /api/models/{home}"
    error = refusal(tmp_path, base_model="someone/tiny-sb", revision="v9")
    assert "no model 'someone/tiny-sb' at revision 'v9'" in error.message
    assert hub.log[-1].endswith("/revision/v9")


def test_a_renamed_model_works_and_its_new_name_is_told_once(tmp_path: Path, hub: FakeHub) -> None:
    config = parse(tmp_path, REQUIRED | {"base_model": "someone/old-name"})
    events = Recorder()
    for weights in (False, True):
        assert trainer.locate_model(config, events, weights=weights, half=False).family.name == "sd15"
    (warning,) = events.warnings
    assert (warning["code"], "someone/tiny-sd" in warning["message"]) == ("model_renamed", True)


def test_a_repository_of_single_files_says_to_download_one(tmp_path: Path, hub: FakeHub) -> None:
    hub.files = {"README.md": b"", "x/a.safetensors": b"", "juggernaut.safetensors": b""}
    error = refusal(tmp_path)
    assert (error.code, "juggernaut.safetensors" in error.hint) == ("model_unsupported", True)
    hub.files = {"README.md": b""}
    assert "download it" not in refusal(tmp_path).hint


TOKEN = "hf_" + "aB3x" * 9
STRANGE = {"control": "odd-\x01-secret", "typographic": "\u201codd-secret\u201d", "short": "not-a-hf-token"}


@pytest.mark.parametrize("debug", [(), ("--debug",)])
@pytest.mark.parametrize(
    ("token", "model"),
    [
        *((text, "someone/tiny-sd") for text in (TOKEN + "\n", *STRANGE.values())),
        ("", TOKEN),
        ("", f"https://user:{'pass' + TOKEN[20:]}@huggingface.co/someone/tiny-sd"),
        ("", f"https://civitai.com/models/1.safetensors?token={'pass' + TOKEN[20:]}"),
    ],
)
def test_a_token_is_in_no_output(
    tmp_path: Path, hub: FakeHub, images: Path, token: str, model: str, debug: tuple[str, ...]
) -> None:
    hub.faults[""] = (
        401,
        REFUSED | {"X-Error-Message": f"Invalid credentials in Authorization header: {token!a}"[:90]},
    )
    config = write_config(tmp_path, **small(images, Path("x"), tmp_path / "out") | {"base_model": model})
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    for place in ({"HF_TOKEN": token}, {"HF_TOKEN": "", "HF_TOKEN_PATH": str(tmp_path / "token")}):
        (tmp_path / "token").write_text(token, "utf-8")
        result = run("--config", config, *debug, env=environment | place)
        assert (result.code, result.last["code"]) == (1, "model_not_found")
        assert ("Traceback" in result.stderr) == bool(debug)
        told = json.dumps(result.events, ensure_ascii=False) + result.stderr
        for secret in ("aB3xaB3x", "odd-", "not-a-hf-token"):
            assert secret not in told
        if token == STRANGE["typographic"]:
            assert "characters" in result.last["message"]


@posix
def test_a_stop_request_in_a_download_ends_the_process_at_once(tmp_path: Path, hub: FakeHub, images: Path) -> None:
    hub.cut, hub.files[UNET] = UNET, tensor_file(1_000_000)
    hub.go_on.clear()
    code = "t.import_checkers(); t.run = lambda options, events, stop, group: "
    code += "t.locate_model(t.load_config(options.config), events, weights=True, half=False)"
    config = write_config(tmp_path, **REQUIRED | {"base_model": "someone/tiny-sd"})
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "hub")}
    process = patched(code, "--config", config, env=environment)
    assert hub.halfway.wait(30)
    start = time.monotonic()
    process.send_signal(signal.SIGTERM)
    stdout, stderr = process.communicate(timeout=30)
    assert time.monotonic() - start < 2
    result = Run(process.returncode, stdout, stderr)
    assert (result.code, result.last["type"]) == (143, "interrupted")
    assert result.of("info")[0]["phase"] == "downloading"
    hub.cut = ""
    assert locate(tmp_path)[0].family.name == "sd15"


@needs_torch
def test_a_run_downloads_from_the_hub_once_and_needs_no_network_then(
    tmp_path: Path, images: Path, models: Path, hub: FakeHub
) -> None:
    source = models / "sd15"
    hub.files = {
        path.relative_to(source).as_posix(): path.read_bytes() for path in source.rglob("*.*") if path.is_file()
    }
    config = write_config(tmp_path, **small(images, Path("x"), tmp_path / "out") | {"base_model": "someone/tiny-sd"})
    secrets = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": "0f1e2d3c" * 5}
    environment = os.environ | secrets | {"HF_HUB_CACHE": str(tmp_path / "hub")}
    result = run("--config", config, env=environment | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url})
    assert (result.code, result.last["type"]) == (0, "complete")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert [event["current"] for event in result.of("info") if "(MB)" in event["message"]][-1] > 0
    assert trainer.read_header(Path(result.last["final_path"]))["ss_sd_model_name"] == "someone/tiny-sd"
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    for secret in secrets.values():
        assert not any(secret.encode() in data for data in (*written, result.stderr.encode()))
        assert secret not in json.dumps(result.events)
    again = run("--config", config, "--set", "steps=6", env=environment | {"HF_HUB_OFFLINE": "1"})
    assert (again.code, again.last["type"], again.last["step"]) == (0, "complete", 6)
    elsewhere = f"output_path={tmp_path / 'other'}"
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        for name in ("someone/else", "sdxl"):
            options = ("--set", f"base_model={name}", "--set", elsewhere)
            missing = run("--config", config, *options, env=environment | offline)
            assert (missing.code, missing.last["code"]) == (1, "model_not_found")
            assert missing.last["elapsed"] < 30
    assert not (tmp_path / "other").exists()


@needs_torch
def test_offline_validation_guesses_the_family_and_says_so(tmp_path: Path, images: Path) -> None:
    config = write_config(tmp_path, **REQUIRED | {"dataset_path": str(images), "base_model": "sdxl"})
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path / "hub")}
    result = run("--config", config, "--validate-only", env=environment)
    assert result.last["model"]["family"] == "sdxl"
    assert result.last["model"]["guessed"] is True
    assert "Valid: as far as it can be told: the base model was not reached." in result.stderr
    assert "model_guessed" in [event["code"] for event in result.of("warning")]
    result = run("--config", config, "--validate-only", "--set", "base_model=sd21", env=environment)
    model = result.last["model"]
    assert (model["prediction_type"], model["prediction_told"]) == ("v_prediction", False), "what it usually is"
    assert model["native_resolution"] == 768


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("scheduler/scheduler_config.json", {"beta_schedule": "sigmoid"}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}),
        ("unet/config.json", {}),
        ("unet/config.json", []),
        ("unet/config.json", {"block_out_channels": "x"}),
        ("unet/config.json", {"block_out_channels": [32, 64]}),
        ("unet/config.json", {"down_block_types": ["CrossAttnDownBlock2D"]}),
        ("unet/config.json", {"down_block_types": ["DownBlock2D"] * 4}),
        ("unet/config.json", {"transformer_layers_per_block": [1]}),
        ("unet/config.json", {"sample_size": -8}),
        ("unet/config.json", {"sample_size": 10**7}),
        ("vae/config.json", {"block_out_channels": []}),
        ("vae/config.json", {"scaling_factor": None}),
    ],
)
def test_a_strange_model_config_is_named_and_crashes_nothing(
    tmp_path: Path, images: Path, name: str, content: Any
) -> None:
    model = hollow_model(tmp_path / "model")
    write_json(model / name, content)
    with pytest.raises(trainer.TrainerError, match=name) as caught:
        trainer.locate_model(
            parse(tmp_path, small(images, model, tmp_path / "out")), Recorder(), weights=False, half=False
        )
    assert caught.value.code == "model_corrupt"


@posix
def test_a_pipe_in_a_models_place_does_not_hang(tmp_path: Path, images: Path) -> None:
    for name in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors"):
        model = hollow_model(tmp_path / name.replace("/", "_"))
        (model / name).unlink()
        os.mkfifo(model / name)
        with pytest.raises(trainer.TrainerError):
            trainer.locate_model(
                parse(tmp_path, small(images, model, tmp_path / "out")), Recorder(), weights=False, half=False
            )


def test_model_type_must_not_contradict_the_model(tmp_path: Path, images: Path) -> None:
    config = parse(tmp_path, small(images, hollow_model(tmp_path / "model"), tmp_path / "out", model_type="sdxl"))
    with pytest.raises(trainer.TrainerError, match="sd15"):
        trainer.locate_model(config, Recorder(), weights=False, half=False)


def test_settings_that_do_not_fit_the_model_are_refused_before_anything_is_loaded(tmp_path: Path) -> None:
    model = hollow_model(tmp_path / "model")
    draw_image(save_picture(tmp_path / "images/a.png", Image.new("RGB", (64, 64))), (64, 64))
    scheduler = json.loads((model / "scheduler/scheduler_config.json").read_text())
    write_json(model / "scheduler/scheduler_config.json", scheduler | {"num_train_timesteps": 500})
    required = REQUIRED | {"dataset_path": str(tmp_path / "images"), "base_model": str(model)}
    for changes in ({"zero_terminal_snr": True}, {"min_timestep": 500}, {"max_timestep": 501}):
        with pytest.raises(trainer.TrainerError) as caught:
            config = parse(tmp_path, required | changes)
            source = trainer.locate_model(config, Recorder(), weights=False, half=False)
            trainer.make_plan(config, scan_quietly(config), source, None, half=False)
        assert caught.value.code == "config_invalid"
        assert [problem["path"] for problem in caught.value.problems] == list(changes)


def test_zero_terminal_snr_follows_the_scheduler_but_never_for_epsilon(tmp_path: Path) -> None:
    model = hollow_model(tmp_path / "model")
    path = model / "scheduler/scheduler_config.json"
    scheduler = json.loads(path.read_text())
    for prediction, said, wish, outcome in [
        ("v_prediction", True, "auto", True),
        ("v_prediction", False, "auto", False),
        ("v_prediction", False, True, True),
        ("v_prediction", True, False, False),
        ("epsilon", True, "auto", False),
    ]:
        write_json(path, scheduler | {"prediction_type": prediction, "rescale_betas_zero_snr": said})
        config = parse(tmp_path, REQUIRED | {"base_model": str(model), "zero_terminal_snr": wish})
        source = trainer.locate_model(config, Recorder(), weights=False, half=False)
        assert source.scheduler["rescale_betas_zero_snr"] is outcome


def test_a_prediction_type_that_contradicts_the_model_is_told(tmp_path: Path) -> None:
    save_picture(tmp_path / "images/a.png", Image.new("RGB", (64, 64)))
    for wish, codes in {"auto": [], "epsilon": [], "v_prediction": ["prediction_type_suspect"]}.items():
        plan = plan_of(tmp_path / wish, tmp_path / "images", prediction_type=wish)
        told = [warning[0] for warning in trainer.plan_warnings(plan)]
        assert [code for code in told if code.startswith("prediction")] == codes


# ======================================================================================
# single files
# ======================================================================================

# The telling tensors of real files, as their makers' code and the tools that read them name and shape them.
U, CLIP, SGM = "model.diffusion_model.", "cond_stage_model.transformer.text_model.", "conditioner.embedders."
TO_K = ".transformer_blocks.0.attn2.to_k.weight"
VAE_ONLY: Shapes = {"first_stage_model.encoder.conv_in.weight": [128, 3, 3, 3]}
SD1_FILE: Shapes = {
    f"{U}input_blocks.0.0.weight": [320, 4, 3, 3],
    f"{U}input_blocks.1.1.proj_in.weight": [320, 320, 1, 1],
    f"{U}input_blocks.1.1{TO_K}": [320, 768],
    f"{U}out.2.weight": [4, 320, 3, 3],
    f"{CLIP}embeddings.token_embedding.weight": [49408, 768],
    f"{CLIP}embeddings.position_ids": [1, 77],
    **VAE_ONLY,
}
SD2_FILE: Shapes = {
    f"{U}input_blocks.0.0.weight": [320, 4, 3, 3],
    f"{U}input_blocks.1.1.proj_in.weight": [320, 320],
    f"{U}input_blocks.1.1{TO_K}": [320, 1024],
    f"{U}out.2.weight": [4, 320, 3, 3],
    "cond_stage_model.model.token_embedding.weight": [49408, 1024],
    "cond_stage_model.model.transformer.resblocks.23.attn.in_proj_weight": [3072, 1024],
    **VAE_ONLY,
}
SDXL_FILE: Shapes = {
    f"{U}input_blocks.0.0.weight": [320, 4, 3, 3],
    f"{U}label_emb.0.0.weight": [1280, 2816],
    f"{U}input_blocks.4.1{TO_K}": [640, 2048],
    f"{U}out.2.weight": [4, 320, 3, 3],
    f"{SGM}0.transformer.text_model.embeddings.token_embedding.weight": [49408, 768],
    f"{SGM}1.model.transformer.resblocks.31.attn.in_proj_weight": [3840, 1280],
    f"{SGM}1.model.text_projection": [1280, 1280],
    **VAE_ONLY,
}
REFINER: Shapes = {
    f"{U}input_blocks.0.0.weight": [384, 4, 3, 3],
    f"{U}label_emb.0.0.weight": [1536, 2560],
    f"{U}out.2.weight": [4, 384, 3, 3],
    f"{SGM}0.model.text_projection": [1280, 1280],
}
MARKS: Shapes = {"v_pred": [0], "ztsnr": [0]}


def changed(shapes: Shapes, channels: int = 4, **extra: list[int]) -> Shapes:
    """The same file with a UNet of other input channels, and with more tensors ("__" stands for a dot)."""
    more = {key.replace("__", "."): shape for key, shape in extra.items()}
    return shapes | {f"{U}input_blocks.0.0.weight": [320, channels, 3, 3]} | more


def without(shapes: Shapes, start: str) -> Shapes:
    return {key: shape for key, shape in shapes.items() if not key.startswith(start)}


def spec(**fields: str) -> dict[str, str]:
    return {f"modelspec.{key}": value for key, value in fields.items()}


BARE_CLIP: Shapes = {"cond_stage_model.transformer.embeddings.token_embedding.weight": [49408, 768]}
XL_ARCHITECTURE = "stable-diffusion-xl-v1-base"
CHECKPOINTS: dict[str, tuple[Shapes, dict[str, str], tuple[str, str | None, bool] | str]] = {
    "SD 1.4 with EMA": (changed(SD1_FILE, model_ema__decay=[], alphas_cumprod=[1000]), {}, ("sd15", None, False)),
    "SD 1.5 pruned": (SD1_FILE, {"format": "pt"}, ("sd15", None, False)),
    "SD 1.5, CLIP without text_model": (without(SD1_FILE, CLIP) | BARE_CLIP, {}, ("sd15", None, False)),
    "SD 1.5 without VAE": (without(SD1_FILE, "first_stage"), {}, ("sd15", None, False)),
    "SD 1.5 by kohya": (SD1_FILE, spec(prediction_type="epsilon"), ("sd15", "epsilon", False)),
    "SD 1.5 v-prediction": (SD1_FILE, spec(prediction_type="v"), ("sd15", "v_prediction", False)),
    "SD 1.5 by ComfyUI": (SD1_FILE, spec(predict_key="epsilon"), ("sd15", "epsilon", False)),
    "SD 2.1 by Stability": (SD2_FILE, {}, ("sd21", None, False)),
    "SD 2.1 base": (SD2_FILE, spec(architecture="stable-diffusion-v2-512"), ("sd21", "epsilon", False)),
    "SD 2.1 768-v": (SD2_FILE, spec(architecture="stable-diffusion-v2-768-v"), ("sd21", "v_prediction", False)),
    "SD 2.1 by OneTrainer": (SD2_FILE, spec(architecture="stable-diffusion-v2"), ("sd21", None, False)),
    "SDXL with a stray tensor": (changed(SDXL_FILE, text_model__x__weight=[1]), {}, ("sdxl", None, False)),
    "SDXL base": (SDXL_FILE, spec(architecture=XL_ARCHITECTURE, prediction_type="epsilon"), ("sdxl", "epsilon", False)),
    "SDXL merge": (SDXL_FILE, {}, ("sdxl", None, False)),
    "SDXL v, zero terminal SNR (NoobAI)": (SDXL_FILE | MARKS, {}, ("sdxl", "v_prediction", True)),
    "SDXL v": (changed(SDXL_FILE, v_pred=[0]), spec(prediction_type="epsilon"), ("sdxl", "v_prediction", False)),
    "SDXL v by its metadata": (SDXL_FILE, spec(prediction_type="v_prediction"), ("sdxl", "v_prediction", False)),
    "SDXL v-zsnr (SwarmUI)": (SDXL_FILE, spec(prediction_type="v-zsnr"), ("sdxl", "v_prediction", True)),
    "SDXL flow": (SDXL_FILE, spec(prediction_type="flow"), ("sdxl", "flow", False)),
    "SDXL without VAE": (without(SDXL_FILE, "first_stage"), {}, ("sdxl", None, False)),
    "SD 1.5 inpainting": (changed(SD1_FILE, 9), {}, "inpainting"),
    "SD 2 inpainting": (changed(SD2_FILE, 9), {}, "inpainting"),
    "SDXL inpainting": (changed(SDXL_FILE, 9), {}, "inpainting"),
    "InstructPix2Pix": (changed(SD1_FILE, 8), {}, "editing"),
    "SD 2 depth": (changed(SD2_FILE, 5), {}, "depth"),
    "SD x4 upscaler": (changed(SD2_FILE, 7), {}, "upscaler"),
    "SDXL refiner": (REFINER, spec(architecture="stable-diffusion-xl-v1-refiner"), "refiner"),
    "CosXL": (changed(SDXL_FILE, edm_vpred__sigma_max=[]), {}, "EDM"),
    "Playground v2.5": (changed(SDXL_FILE, edm_mean=[1, 4, 1, 1]), {}, "EDM"),
    "SDXL UNet alone": (without(SDXL_FILE, "conditioner"), {}, "without text encoders"),
    "VAE with the prefix": (VAE_ONLY, {}, "a VAE"),
}
OTHER_FILES = {  # one tensor of each -> what it is called
    "cond_stage_model.roberta.embeddings.word_embeddings.weight": "AltDiffusion",
    f"{U}time_embed.cond_proj.weight": "latent consistency",
    "cc_projection.weight": "Zero123",
    "depth_model.model.pretrained.act_postprocess3.0.project.0.bias": "depth",
    "embedder.model.ln_final.weight": "unCLIP",
    f"{U}label_emb.weight": "upscaler",
    f"{U}encoder_hid_proj.weight": "Kolors",
    f"{U}scaled_fp8": "quantized",
    f"{U}input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight.absmax": "quantized",
    "control_model.input_hint_block.0.weight": "ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "ControlNet",
    "lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight": "ControlNet",
    "lora_controlnet": "Control-LoRA",
    "adapter.body.0.resnets.0.block1.weight": "T2I-Adapter",
    "body.0.block1.weight": "T2I-Adapter",
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.lora_down.weight": "LoRA",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight": "LoRA",
    "transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight": "LoRA",
    "lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a": "LoRA",
    "emb_params": "textual inversion",
    "clip_g": "textual inversion",
    "<my-token>": "textual inversion",
    "encoder.conv_in.weight": "VAE",
    "down_blocks.0.attentions.0.proj_in.weight": "diffusers' layout",
    "text_model.embeddings.token_embedding.weight": "text encoder",
    "encoder.block.0.layer.0.SelfAttention.k.weight": "text encoder",
    "vision_model.embeddings.patch_embedding.weight": "vision",
    "image_proj.proj.weight": "IP-Adapter",
    "down_blocks.0.motion_modules.0.temporal_transformer.norm.weight": "AnimateDiff",
    "model.1.sub.0.RDB1.conv1.0.weight": "upscaler",
    f"{U}joint_blocks.0.context_block.attn.qkv.weight": "Stable Diffusion 3",
    "double_blocks.0.img_attn.qkv.weight": "FLUX",
    f"{U}double_blocks.0.img_attn.qkv.weight": "FLUX",
    "double_stream_modulation_img.lin.weight": "FLUX.2",
    "distilled_guidance_layer.in_proj.weight": "Chroma",
    "t_block.1.weight": "PixArt",
    "model.double_layers.0.attn.w1q.weight": "AuraFlow",
    "clip_txt_mapper.weight": "Cascade",
    f"{U}clip_mapper.weight": "Cascade",
    f"{U}mlp_t5.0.weight": "HunyuanDiT",
    "cap_embedder.0.weight": "Lumina",
    "txt_norm.weight": "Qwen",
    f"{U}head.modulation": "Wan",
    "txt_in.individual_token_refiner.blocks.0.norm1.weight": "HunyuanVideo",
    f"{U}patchify_proj.weight": "LTX",
    "blocks.0.cross_attn.q_linear.weight": "Sana",
    "double_stream_blocks.0.block.adaLN_modulation.1.bias": "HiDream",
    "net.x_embedder.proj.1.weight": "Cosmos",
    f"{U}input_blocks.1.0.time_stack.emb_layers.1.bias": "Video",
}


@pytest.mark.parametrize("title", CHECKPOINTS)
def test_a_checkpoint_is_known_by_its_header(title: str) -> None:
    shapes, header, expected = CHECKPOINTS[title]
    path = Path(f"{title}.safetensors")
    if isinstance(expected, str):
        with pytest.raises(trainer.TrainerError, match=expected) as caught:
            trainer.single_file_family(path, shapes)
        assert caught.value.code == "model_unsupported"
        return
    told = trainer.told_prediction(shapes, header)
    found = trainer.single_file_family(path, shapes).name, told.get("prediction_type"), told["rescale_betas_zero_snr"]
    assert found == expected


def test_files_that_are_no_checkpoint_are_refused_by_name() -> None:
    for key, name in OTHER_FILES.items():
        for others in ({}, SD1_FILE if key.startswith(("cond", "control_", "depth", "embedder", U)) else {}):
            with pytest.raises(trainer.TrainerError, match=re.escape(name)) as caught:
                trainer.single_file_family(Path("x.safetensors"), {key: [8, 8], **others})
            assert caught.value.code == "model_unsupported"


def original_header(family: trainer.ModelFamily) -> dict[str, tuple[str, list[int]]]:
    """The header of a full-size checkpoint in the original layout, from diffusers' and transformers' own classes."""
    vae_blocks: Json = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    with torch.device("meta"):
        vae = new(diffusers.AutoencoderKL, **vae_blocks, block_out_channels=(128, 256, 512, 512), layers_per_block=2)
    tensors = {f"{U}{key}": value for key, value in original_unet(full_size_unet(family).state_dict(), 2).items()}
    tensors |= {f"first_stage_model.{key}": value for key, value in original_vae(vae.state_dict(), 4).items()}
    for row in family.text_encoders:
        states = full_size_encoder(row).state_dict()
        clip = original_open_clip(states, row.unused_layers == 1) if row.open_clip else original_clip(states)
        tensors |= {row.original + key: value for key, value in clip.items()}
    return {key: ("F16", list(value.shape)) for key, value in tensors.items()}


def full_size_encoder(row: trainer.TextEncoder) -> Any:
    sizes: Json = {"hidden_size": row.width, "intermediate_size": 4 * row.width, "projection_dim": row.width}
    sizes |= {"num_hidden_layers": row.layers, "num_attention_heads": row.width // 64}
    with torch.device("meta"):
        return getattr(transformers, row.class_name)(transformers.CLIPTextConfig(**sizes))


@needs_torch
@pytest.mark.parametrize("family", trainer.FAMILIES, ids=lambda family: family.name)
def test_a_full_size_checkpoint_has_every_weight_and_no_other(family: trainer.ModelFamily) -> None:
    headers = original_header(family)
    assert len(headers) == FULL_SIZE[family.name].weights
    found, parts, scheduler = trainer.read_single_file(Path("x.safetensors"), headers, {})
    configs = [parts[part].config or {} for part in ("unet", "vae")]
    source = trainer.ModelSource("x", found, configs[0], configs[1], scheduler, "epsilon", parts=parts)
    trainer.check_single_file(source)
    sizes = {part: sum(math.prod(shape) for shape in value.shapes.values()) for part, value in parts.items()}
    assert {part: sizes[part] for part in ("unet", "vae")} == {
        part: family.parameters[part] for part in ("unet", "vae")
    }
    real = full_size_unet(family).config
    assert {key: real[key] for key in ("cross_attention_dim", "attention_head_dim", "layers_per_block")} == {
        key: configs[0][key] for key in ("cross_attention_dim", "attention_head_dim", "layers_per_block")
    }
    middle = {key: value for key, value in headers.items() if not key.startswith(f"{U}middle_block.1")}
    block = f"{U}input_blocks.4.1.transformer_blocks.0.ff.net.2.weight"
    for broken in (middle, headers | {block: ("F16", [7, 7])}, headers | {f"{U}more.weight": ("F16", [1])}):
        with pytest.raises(
            trainer.TrainerError, match=r"not built as Stable Diffusion"
        ) as caught:  # distilled, changed
            _, parts, _ = trainer.read_single_file(Path("x.safetensors"), broken, {})
            trainer.check_single_file(dataclasses.replace(source, parts=parts))
        assert caught.value.code == "model_unsupported"


@needs_torch
@pytest.mark.parametrize("kind", ["sd15", "sd21v", "sdxl"])
def test_training_from_a_single_file_equals_training_from_its_folder(
    tmp_path: Path, images: Path, wide_models: Path, kind: str
) -> None:
    import safetensors.torch

    changes: Json = {"resolution": 64, "train_text_encoder": kind != "sdxl", "lora_targets": "all"}
    changes |= {"validation_steps": 4}
    runs = [
        train(tmp_path, small(images, base, tmp_path / name, **changes))
        for name, base in {"folder": wide_models / kind, "file": wide_models / f"{kind}.safetensors"}.items()
    ]
    assert_same_tensors(*(made.final_path for made in runs))
    assert runs[0].state.losses == runs[1].state.losses
    samples = [Image.open(made.folder.samples / "step_4_0.png").tobytes() for made in runs]
    assert samples[0] == samples[1]
    if kind == "sdxl":  # as diffusers' converter wrote files for some time, and Playground's are
        tensors = tensors_of(wide_models / "sdxl.safetensors")
        projection = tensors.pop("conditioner.embedders.1.model.text_projection").T.contiguous()
        tensors |= {"conditioner.embedders.1.model.text_projection.weight": projection}
        safetensors.torch.save_file(tensors, tmp_path / "linear.safetensors", {"modelspec.prediction_type": "epsilon"})
        options = {**changes, "tokenizer_path": str(wide_models / "clip_tokenizer")}
        linear = train(tmp_path, small(images, tmp_path / "linear.safetensors", tmp_path / "linear", **options))
        assert linear.state.losses == runs[0].state.losses
    header = trainer.read_header(runs[1].final_path)
    assert header["ss_sd_model_name"] == f"{kind}.safetensors"
    assert header["modelspec.prediction_type"] == ("v" if kind == "sd21v" else "epsilon")


@needs_torch
def test_a_checkpoint_that_is_cut_under_the_run_is_one_error(
    tmp_path: Path, images: Path, wide_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = Path(shutil.copy(wide_models / "sd15.safetensors", tmp_path / "m.safetensors"))
    real = trainer.LoRATrainer.adapt

    def adapt(made: trainer.LoRATrainer) -> None:
        os.truncate(path, 200_000)
        real(made)

    monkeypatch.setattr(trainer.LoRATrainer, "adapt", adapt)
    with pytest.raises(trainer.TrainerError, match="cut short") as caught:
        prepare(tmp_path, small(images, path, tmp_path / "out", tokenizer_path=str(wide_models / "clip_tokenizer")))
    assert caught.value.code == "model_corrupt"


@needs_torch
def test_another_vae_comes_from_a_folder_or_a_file_of_either_layout(
    tmp_path: Path, images: Path, wide_models: Path
) -> None:
    import safetensors.torch

    base, folder = tmp_path / "no_vae.safetensors", wide_models / "sd15"
    to_single_file(folder, base, torch.float32, {"modelspec.prediction_type": "epsilon"}, with_vae=False)
    with pytest.raises(trainer.TrainerError, match="has no VAE") as caught:
        prepare(tmp_path, small(images, base, tmp_path / "none", tokenizer_path=str(wide_models / "clip_tokenizer")))
    assert caught.value.code == "model_not_found" and "vae_path" in caught.value.hint
    whole = tensors_of(wide_models / "sd15.safetensors")
    prefix = "first_stage_model."
    vae = {key.removeprefix(prefix): value for key, value in whole.items() if key.startswith(prefix)}
    safetensors.torch.save_file(vae, tmp_path / "original.safetensors")
    own = folder / "vae/diffusion_pytorch_model.safetensors"
    renamed = copy_model(folder / "vae", tmp_path / "vae-fp16-fix")
    tried = (folder / "vae", folder, renamed, tmp_path / "original.safetensors", wide_models / "sd15.safetensors", own)
    options = {"tokenizer_path": str(wide_models / "clip_tokenizer"), "resolution": 64}
    expected = view_of(prepare(tmp_path, small(images, folder, tmp_path / "folder", **options)), 0)
    for number, path in enumerate(tried):
        made = prepare(tmp_path, small(images, base, tmp_path / str(number), vae_path=str(path), **options))
        assert all(torch.equal(value, expected[key]) for key, value in view_of(made, 0).items())
    (tmp_path / "vae.pt").touch()
    (tmp_path / "vae.PT").touch()
    tiny = shutil.copytree(folder / "vae", tmp_path / "tiny-vae")
    write_json(
        tiny / "config.json", json.loads((tiny / "config.json").read_text()) | {"_class_name": "AutoencoderTiny"}
    )
    refused: dict[Path, str] = {
        tmp_path / "vae.PT": "model_unsafe",
        tiny: "model_unsupported",
        wide_models / "sdxl/vae": "model_unsupported",
        wide_models / "sd15/unet": "model_unsupported",
        tmp_path / "vae.pt": "model_unsafe",
        tmp_path / "none.safetensors": "model_not_found",
        folder / "text_encoder/model.safetensors": "model_unsupported",
        wide_models / "clip_tokenizer": "model_not_found",
    }
    for path, code in refused.items():
        with pytest.raises(trainer.TrainerError) as caught:
            prepare(tmp_path, small(images, folder, tmp_path / "refused", vae_path=str(path)))
        assert caught.value.code == code


# ======================================================================================
# base models
# ======================================================================================


@needs_torch
def test_a_single_files_tokenizer_is_looked_up_in_order(
    tmp_path: Path, wide_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    alone = tmp_path / "models/m.safetensors"
    alone.parent.mkdir()
    alone.symlink_to(wide_models / "sd15.safetensors")
    cache = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))

    def tokenizer(**changes: Any) -> Path:
        config = parse(tmp_path, REQUIRED | {"base_model": str(alone), **changes})
        return Path(trainer.locate_model(config, Recorder(), weights=True, half=False).tokenizers[0])

    with pytest.raises(trainer.TrainerError) as caught:
        tokenizer()
    assert caught.value.code == "model_not_found"
    place = str(alone.parent / "clip_tokenizer")
    for told in ("vocab.json", "merges.txt", "openai/clip-vit-large-patch14", place, "tokenizer_path"):
        assert told in caught.value.hint
    repository = cache / "models--stabilityai--stable-diffusion-xl-base-1.0"
    snapshot = repository / "snapshots" / ("0" * 40)
    shutil.copytree(wide_models / "sdxl/tokenizer", snapshot / "tokenizer")
    write_json(repository / "refs/main", 0)
    (repository / "refs/main").write_text("0" * 40)
    assert tokenizer() == snapshot / "tokenizer"
    shutil.copytree(wide_models / "clip_tokenizer", alone.parent / "clip_tokenizer")
    assert tokenizer() == alone.parent / "clip_tokenizer"
    assert tokenizer(tokenizer_path=str(wide_models / "sdxl")) == wide_models / "sdxl/tokenizer"
    transformers.CLIPTokenizer.from_pretrained(wide_models / "clip_tokenizer").save_pretrained(tmp_path / "one_file")
    assert not (tmp_path / "one_file/vocab.json").exists()
    assert tokenizer(tokenizer_path=str(tmp_path / "one_file")) == tmp_path / "one_file"
    with pytest.raises(trainer.TrainerError) as caught:
        tokenizer(tokenizer_path=str(tmp_path / "nowhere"))
    assert [problem["path"] for problem in caught.value.problems] == ["tokenizer_path"]
    assert "tokenizer folder" in caught.value.hint


@needs_torch
@pytest.mark.parametrize(
    "vocabulary", [{}, {"a": 0, "b": 1}, {"<|endoftext|>": 0, "<|startoftext|>": 1, "a</w>": 5000}]
)
def test_a_tokenizer_that_does_not_go_with_the_model_is_refused_by_validation_too(
    tmp_path: Path, images: Path, wide_models: Path, vocabulary: Json
) -> None:
    folder = shutil.copytree(wide_models / "clip_tokenizer", tmp_path / "words")
    write_json(folder / "vocab.json", vocabulary)
    config = small(images, wide_models / "sd15.safetensors", tmp_path / "out", tokenizer_path=str(folder))
    write_json(tmp_path / "config.json", config)
    loaded = trainer.load_config(str(tmp_path / "config.json"))
    for check in (lambda: trainer.validate(loaded, Recorder()), lambda: prepare(tmp_path, config)):
        with pytest.raises(trainer.TrainerError) as caught:
            check()
        assert caught.value.code == "model_corrupt"
        assert [problem["path"] for problem in caught.value.problems] == ["tokenizer_path"]


@needs_torch
@posix
def test_what_may_not_be_read_is_said_with_that_remedy(
    tmp_path: Path, images: Path, wide_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, closed = Path.is_file, tmp_path / "closed"

    def refuse(self: Path, **options: Any) -> bool:  # root, who runs the tests in a container, may read anything
        if self.is_relative_to(closed):
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        return real(self, **options)

    closed.mkdir()
    monkeypatch.setattr(Path, "is_file", refuse)
    base = str(wide_models / "sd15.safetensors")
    for changes in ({"base_model": str(closed / "m.safetensors")}, {"vae_path": str(closed)}):
        with pytest.raises(trainer.TrainerError, match="Permission denied") as caught:
            config = parse(tmp_path, REQUIRED | {"base_model": base} | changes)
            trainer.locate_model(config, Recorder(), weights=True, half=False)
        assert "the right to read it" in caught.value.hint
        assert [problem["path"] for problem in caught.value.problems] in ([], ["vae_path"])


def predict_as_epsilon_models_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every UNet give back its input, nearly, which is pure noise at the last timestep."""
    real = trainer.LoRATrainer.predict
    monkeypatch.setattr(trainer.LoRATrainer, "predict", lambda self, x, *rest: x + 1e-3 * real(self, x, *rest))


@needs_torch
def test_what_nobody_told_is_measured_and_stays_on_a_resume(
    tmp_path: Path, images: Path, wide_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "silent.safetensors"
    to_single_file(wide_models / "sd15", base, torch.float32)
    options = {"tokenizer_path": str(wide_models / "clip_tokenizer"), "resolution": 64}
    made = train(tmp_path, small(images, base, tmp_path / "v", **options))  # random weights do not return their input
    assert made.plan.source.prediction_type == "v_prediction"
    assert trainer.read_header(made.final_path)["modelspec.prediction_type"] == "v"
    again = make_trainer(tmp_path, small(images, base, tmp_path / "v", **options))
    assert again.setup() is True, "it is finished"
    again.folder._lock.close()  # type: ignore[union-attr]
    predict_as_epsilon_models_do(monkeypatch)
    assert prepare(tmp_path, small(images, base, tmp_path / "e", **options)).plan.source.prediction_type == "epsilon"
    longer = prepare(tmp_path, small(images, base, tmp_path / "v", steps=6, **options))
    assert longer.plan.source.prediction_type == "v_prediction", "as the run began"
    told = {"prediction_type": "v_prediction"}
    suspect = prepare(tmp_path, small(images, base, tmp_path / "told", **options, **told))
    assert suspect.plan.source.prediction_type == "v_prediction"
    assert "prediction_type_suspect" in warning_codes(suspect)


@needs_torch
def test_what_a_measured_prediction_changes_is_said(
    tmp_path: Path, images: Path, wide_models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tmp_path / "silent.safetensors"
    to_single_file(wide_models / "sd21v", base, torch.float32)
    options = {"tokenizer_path": str(wide_models / "clip_tokenizer")}
    row = trainer.FAMILIES[1]
    native = {"epsilon": 64, "v_prediction": 96}  # for 512 and 768
    monkeypatch.setattr(trainer, "FAMILIES", (dataclasses.replace(row, native_resolution=native),))
    predict_as_epsilon_models_do(monkeypatch)
    made = prepare(tmp_path, small(images, base, tmp_path / "size", **options))
    assert (made.plan.source.prediction_type, made.plan.resolution) == ("epsilon", 96)
    assert "resolution_suspect" in warning_codes(made)
    assert "resolution_suspect" not in warning_codes(
        prepare(tmp_path, small(images, base, tmp_path / "same", **options, resolution=96))
    )
    with pytest.raises(trainer.TrainerError, match="zero_terminal_snr must not be true"):
        prepare(tmp_path, small(images, base, tmp_path / "zero", **options, zero_terminal_snr=True))
    monkeypatch.setattr(trainer.LoRATrainer, "predict", lambda self, x, *rest: x * math.nan)
    broken = prepare(tmp_path, small(images, base, tmp_path / "nan", **options))
    assert broken.plan.source.prediction_type == "v_prediction", "nothing was measured: as it usually is"
    assert not any("measured, as" in event["message"] for event in emitted(broken, "info"))


def safetensors_bytes(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype: str, shape: list[int], *offsets: int) -> Json:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


LYING_HEADERS = {
    "scalars for weights": safetensors_bytes(dict.fromkeys(SD1_FILE, tensor("F16", [0], 0, 0))),
    "a huge header": safetensors_bytes({}, length=2**63),
    "a header longer than the file": safetensors_bytes({}, length=10**6),
    "no JSON": safetensors_bytes(b"{nonsense"),
    "deep JSON": safetensors_bytes(b"[" * 10**5),
    "data beyond the end": safetensors_bytes({"a.weight": tensor("F32", [2**40], 0, 2**42)}, bytes(64)),
    "overlapping tensors": safetensors_bytes(
        {"a.weight": tensor("F32", [4], 0, 16), "b.weight": tensor("F32", [4], 8, 24)}, bytes(24)
    ),
    "a hole": safetensors_bytes({"a.weight": tensor("F32", [4], 8, 24)}, bytes(24)),
    "a shape that is not its size": safetensors_bytes({"a.weight": tensor("F32", [400], 0, 16)}, bytes(16)),
    "sizes that overflow": safetensors_bytes({"a.weight": tensor("F32", [2**62, 2**62], 0, 16)}, bytes(16)),
    "negative offsets": safetensors_bytes({"a.weight": tensor("F32", [4], -16, 0)}, bytes(16)),
    "an unknown dtype": safetensors_bytes({"a.weight": tensor("PICKLE", [4], 0, 16)}, bytes(16)),
    "integers for weights": safetensors_bytes({"a.weight": tensor("I32", [4], 0, 16)}, bytes(16)),
    "nothing": b"",
    "a pickle": b"\x80\x02cos\nsystem\n",
}


@pytest.mark.parametrize("lie", LYING_HEADERS)
def test_a_lying_header_is_refused_before_anything_is_allocated(tmp_path: Path, lie: str) -> None:
    import tracemalloc

    pytest.importorskip("numpy")  # or safetensors imports it with the first file, and that is counted
    single = tmp_path / "single.safetensors"
    single.write_bytes(LYING_HEADERS[lie])
    folder = hollow_model(tmp_path / "folder")
    (folder / "unet/diffusion_pytorch_model.safetensors").write_bytes(LYING_HEADERS[lie])
    for base in (single, folder):
        config = parse(tmp_path, REQUIRED | {"base_model": str(base)})
        tracemalloc.start()
        try:
            trainer.locate_model(config, Recorder(), weights=True, half=False)
        except trainer.TrainerError as error:
            code, allocated = error.code, tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert code in ("model_corrupt", "model_unsupported")
        assert allocated < 1 << 22


@needs_torch
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    """Tensors without a byte may have any size in a header."""
    headers = original_header(trainer.FAMILIES[0])
    positions, layer = f"{CLIP}embeddings.position_embedding.weight", f"{CLIP}encoder.layers"
    block = f"{U}input_blocks.1.1.transformer_blocks"
    odd: list[dict[str, list[int]]] = [
        {positions: [10**12, 0]},
        {f"{layer}.{number}.mlp.fc1.bias": [0] for number in range(10**4)},
        {f"{block}.{number}.norm1.weight": [0] for number in range(10**4)},
    ]
    for changes in odd:
        changed = headers | {key: ("F16", shape) for key, shape in changes.items()}
        with pytest.raises(trainer.TrainerError, match=r"maximum|not valid") as caught:
            trainer.read_single_file(Path("x.safetensors"), changed, {})
        assert caught.value.code == "model_corrupt"


@pytest.mark.parametrize(
    ("entry", "code"),
    [
        ({"unet": ["my_unet", "UNet2DConditionModel"]}, "model_unsafe"),
        ({"vae": ["diffusers_modules.local.vae", "AutoencoderKL"]}, "model_unsafe"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, "model_unsupported"),
        ({"vae": ["diffusers", "AutoencoderTiny"]}, "model_unsupported"),
        ({"_class_name": ["pipeline_mine", "MyPipeline"]}, "model_unsupported"),
        ({"unet": 7}, "model_corrupt"),
    ],
)
def test_a_model_that_names_classes_of_its_own_is_refused(tmp_path: Path, entry: Json, code: str) -> None:
    model = hollow_model(tmp_path / "model")
    (model / "my_unet.py").write_text("raise SystemExit('run')", "utf-8")
    write_json(model / "model_index.json", {"_class_name": "StableDiffusionPipeline"} | entry)
    with pytest.raises(trainer.TrainerError) as caught:
        trainer.locate_model(
            parse(tmp_path, REQUIRED | {"base_model": str(model)}), Recorder(), weights=True, half=False
        )
    assert caught.value.code == code


@posix
def test_links_that_lead_out_of_a_model_are_refused_and_the_hubs_own_are_not(tmp_path: Path) -> None:
    def locate(base: Path) -> trainer.ModelSource:
        return trainer.locate_model(
            parse(tmp_path, REQUIRED | {"base_model": str(base)}), Recorder(), weights=True, half=False
        )

    outside = hollow_model(tmp_path / "outside")
    for name in ("unet/config.json", "unet/diffusion_pytorch_model.safetensors", "model_index.json", "vae"):
        model = hollow_model(tmp_path / name.replace("/", "_"))
        (model / name).rename(model / "moved")
        (model / name).symlink_to(outside / name)
        with pytest.raises(trainer.TrainerError, match="link") as caught:
            locate(model)
        assert caught.value.code == "model_unsafe"
    snapshot = hollow_model(tmp_path / "models--me--m/snapshots/abc")
    blob = tmp_path / "models--me--m/blobs/123"
    blob.parent.mkdir()
    (snapshot / "unet/config.json").rename(blob)
    (snapshot / "unet/config.json").symlink_to("../../../blobs/123")
    assert locate(snapshot).parts
    (tmp_path / "linked").symlink_to(outside)
    assert locate(tmp_path / "linked").parts


# ======================================================================================
# hardware and memory
# ======================================================================================


@needs_torch
def test_the_device_is_chosen_in_order_and_a_missing_one_is_an_error() -> None:
    hardware = trainer.choose_device("auto")
    expected = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    assert hardware.device.startswith(expected)
    assert trainer.choose_device("cpu").device == "cpu"
    with pytest.raises(trainer.TrainerError) as caught:
        trainer.choose_device("cuda:15")
    assert caught.value.code == "device_unavailable"
    assert trainer.choose_dtype("auto", "cpu")[0] == torch.float32
    assert trainer.choose_dtype("bf16", "cpu")[0] == torch.bfloat16


@needs_torch
def test_a_cpu_that_others_keep_busy_is_told_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    cores, codes = os.cpu_count() or 1, []
    for load, threads in ((cores + 0.5, ""), (cores + 0.5, "1"), (cores - 0.5, "")):
        monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0.0, 0.0))
        monkeypatch.setenv("OMP_NUM_THREADS", threads)
        codes.append([code for code, *_ in trainer.hardware_warnings(trainer.choose_device("cpu"), "cpu")])
    assert codes == [["cpu_shared"], [], []]


def full_size_unet(family: trainer.ModelFamily) -> Any:
    """The family's real UNet on the meta device: right names and shapes, no memory."""
    with torch.device("meta"):
        owner: Any = diffusers.UNet2DConditionModel
        return owner(**memory.full_size(family.name))


@needs_torch
@pytest.mark.parametrize("family", trainer.FAMILIES, ids=lambda family: family.name)
def test_full_size_models_have_the_expected_modules_and_sizes(family: trainer.ModelFamily) -> None:
    unet, counts = full_size_unet(family), FULL_SIZE[family.name].counts
    assert sum(weight.numel() for weight in unet.parameters()) == family.parameters["unet"]
    for targets, count in zip(trainer.TARGETS, counts[:3], strict=True):
        pattern = re.compile(trainer.TARGETS[targets][0] + r"\.weight")
        shapes = {key: weight.shape for key, weight in unet.named_parameters() if pattern.fullmatch(key)}
        assert len(shapes) == count
        assert sum(shape[0] + math.prod(shape[1:]) for shape in shapes.values()) == family.lora_width[targets]
    linear = [module.weight for module in unet.modules() if isinstance(module, torch.nn.Linear)]
    assert sum(weight.numel() for weight in linear) == family.linear
    assert all(trainer.takes_nf4(weight.shape) for weight in linear)
    assert sum(weight.numel() for weight in unet.parameters() if weight.dim() == 2) == family.linear


@needs_torch
def test_the_estimate_counts_weights_and_lora_from_the_files(tmp_path: Path, images: Path, models: Path) -> None:
    config = parse(tmp_path, small(images, models / "sdxl", tmp_path / "out"))
    source = trainer.locate_model(config, Recorder(), weights=False, half=False)
    terms = trainer.estimate_vram(config, source, 96, half=False, checkpointing=False)
    made = prepare(tmp_path, small(images, models / "sdxl", tmp_path / "out"))
    lora = sum(weight.numel() for weight in made.live.values())
    assert terms["lora"] == lora * 4
    assert terms["weights"] == sum(w.numel() for w in made.unet.parameters()) * 4 - lora * 4
    resident = sum(terms[term] for term in ("weights", "lora", "gradients", "optimizer", "ema", "workspaces"))
    phases = (terms[phase] for phase in ("activations", "sampling", "finishing"))
    assert terms["allocated"] == max(resident + max(phases), terms["caching"] + terms["workspaces"])
    assert terms["total"] == terms["allocated"] + terms["overhead"]
    nf4 = dataclasses.replace(config, quantize_base="nf4")
    shapes = source.parts["unet"].shapes.values()
    linear = sum(math.prod(shape) for shape in shapes if len(shape) == 2 and shape[1] % 64 == 0)
    saved = terms["weights"] - trainer.estimate_vram(nf4, source, 96, half=False, checkpointing=False)["weights"]
    assert saved == int(linear * (4 - 0.5 - 1 / 64 - 4 / 64 / 256))


@needs_torch
@pytest.mark.parametrize("row", memory.COUNTED, ids=lambda row: " ".join(memory.row_name(row)))
def test_the_estimate_is_what_a_step_is_counted_to_hold(row: memory.Setting) -> None:
    """At full size, and as docs/vram.md has it."""
    found = memory.compared(row)
    assert found.estimated == pytest.approx(found.counted, rel=0.05)
    assert found.estimated_all == pytest.approx(found.counted_all, rel=0.02)
    name = f"| {' | '.join(memory.row_name(row))} |"
    (line,) = [line for line in memory.DOCUMENT.read_text("utf-8").splitlines() if line.startswith(name)]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[8] == memory.gib(found.estimated)
    assert float(cells[7]) == pytest.approx(found.counted / 1024**3, rel=0.02, abs=0.01)


ODD_UNETS: dict[str, Json] = {  # no family's: of other widths, levels and depths
    "narrow": {"block_out_channels": (64, 128), "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")},
    "deep": {
        "block_out_channels": (96, 192, 384),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "transformer_layers_per_block": (1, 1, 3),
        "use_linear_projection": True,
    },
}


@needs_torch
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("targets", trainer.TARGETS)
@pytest.mark.parametrize("odd", ODD_UNETS)
def test_the_estimate_holds_for_unets_of_other_shapes(odd: str, targets: str, checkpointing: bool) -> None:
    unet = ODD_UNETS[odd] | {"layers_per_block": 1, "cross_attention_dim": 256}
    unet["up_block_types"] = [kind.replace("Down", "Up") for kind in reversed(unet["down_block_types"])]
    config, source = memory.make_config(lora_targets=targets, lora_rank=4), memory.make_source("sd15", unet)
    found = memory.count(config, unet | {"attention_head_dim": 8}, 64, half=False, checkpointing=checkpointing)
    numbers = trainer.unet_activations(config, source, 64 * 64, half=False, checkpointing=checkpointing)
    assert numbers * 4 == pytest.approx(found.peak, rel=0.1)


def test_the_table_of_what_fits_is_the_scripts_own_and_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None; sys.path.insert(0, 'benchmarks'); import memory as m; "
    code += "sys.stdout.buffer.write(m.fit_table().encode())"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert done.stdout.decode() in memory.DOCUMENT.read_text("utf-8")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("family", [family.name for family in trainer.FAMILIES])
def test_more_of_anything_never_needs_less_memory(family: str, kind: str, checkpointing: bool) -> None:
    def total(resolution: int = 768, half: bool = True, **keys: Any) -> int:
        config = memory.make_config(lora_type=kind, **keys)
        options = {"half": half, "checkpointing": checkpointing}
        return trainer.estimate_vram(config, memory.make_source(family), resolution, **options)["total"]

    more: dict[str, tuple[Any, ...]] = {
        "batch_size": (1, 2, 4, 8),
        "lora_rank": (4, 16, 64, 128),
        "resolution": (256, 512, 768, 1024, 1536),
        "lora_targets": tuple(trainer.TARGETS),
        "gradient_accumulation_steps": (1, 4),
        "max_caption_tokens": (75, 150, 225),
        "train_text_encoder": (False, True),
        "ema_decay": (None, 0.99),
        "optimizer": ("adamw8bit", "adamw", "prodigy"),
        "half": (True, False),
    }
    for key, values in more.items():
        needed = [total(**{key: value}) for value in values]
        assert needed == sorted(needed), key
        assert needed[-1] > needed[0] or checkpointing or key == "max_caption_tokens", key


def test_checkpointing_is_turned_on_when_the_run_would_not_fit() -> None:
    gpu = trainer.Hardware("cuda:0", "GPU", "", 8 * 1024**3, 7 * 1024**3)
    assert trainer.choose_checkpointing("auto", 8 * 1024**3, gpu)[0] is True
    assert trainer.choose_checkpointing("auto", 6 * 1024**3, gpu)[0] is False
    assert trainer.choose_checkpointing(True, 0, gpu)[0] is True
    assert trainer.choose_checkpointing("auto", 8 * 1024**3, None)[0] is False


def planned(images: Path, family: str, free_gib: float, **keys: Any) -> trainer.Plan:
    """The plan of a run on a GPU with so much free memory, of a full-size model that is not here."""
    config = memory.make_config(dataset_path=str(images), caption_separator=",", **keys)
    gpu = trainer.Hardware("cuda:0", "GPU", "", 24 * 1024**3, int(free_gib * 1024**3))
    return trainer.make_plan(config, scan_quietly(config), memory.make_source(family), gpu, half=True)


@pytest.mark.parametrize(
    ("family", "free_gib", "keys", "expected"),
    [
        ("sd15", 4, {"resolution": 512}, {}),
        ("sd15", 4, {"resolution": 512, "gradient_checkpointing": False, "batch_size": 4}, {"gradient_checkpointing"}),
        ("sd21", 3.3, {"batch_size": 8}, {"batch_size", "gradient_accumulation_steps"}),
        ("sdxl", 6, {}, {"quantize_base"}),
        ("sdxl", 9, {"lora_rank": 128, "lora_targets": "all"}, {"quantize_base", "optimizer"}),
        ("sdxl", 3.2, {"lora_rank": 8}, {"quantize_base", "optimizer", "resolution"}),
    ],
)
def test_a_run_that_will_not_fit_is_told_settings_that_do(
    images: Path, family: str, free_gib: float, keys: Json, expected: set[str]
) -> None:
    plan = planned(images, family, free_gib, **keys)
    warned = [(message, hint) for code, message, hint in trainer.plan_warnings(plan) if code == "memory_short"]
    assert len(warned) == bool(expected)
    for message, hint in warned:
        assert f"and {free_gib:.1f}".rstrip("0") in message
        changes = {
            key: json.loads(value) for key, value in re.findall(r"(\w+_\w+|\boptimizer|\bresolution) ([\w\"]+)", hint)
        }
        assert changes.keys() == expected
        mended = planned(images, family, free_gib, **keys | changes)
        assert mended.memory["total"] <= free_gib * 1024**3
        assert f"about {trainer.gigabytes(mended.memory['total'])} GB" in hint
        for key in expected - {"gradient_accumulation_steps"}:  # nothing is named that is not needed
            fewer = planned(images, family, free_gib, **keys | {k: v for k, v in changes.items() if k != key})
            assert fewer.memory["total"] > free_gib * 1024**3


@needs_torch
def test_a_sample_is_decoded_in_tiles_where_that_would_take_more_than_training(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = memory.make_source("sdxl")
    room = [trainer.decode_bytes(source, side**2, half=True) for side in (1024, 512)]
    assert [trainer.decode_side(source, 1024, size, half=True) for size in (*room, 0)] == [1024, 512, 256]
    assert trainer.decode_side(source, 128, 0, half=True) == 128

    def samples(name: str, side: int) -> list[Image.Image]:
        monkeypatch.setattr(trainer, "decode_side", lambda *_, **__: side)
        train(tmp_path, small(images, models / "sd15", tmp_path / name, validation_steps=4))
        return [Image.open(path) for path in sorted((tmp_path / name / "samples").glob("*.png"))]

    decoded: list[int] = []
    real = diffusers.AutoencoderKL.decode

    def watched(vae: Any, latents: torch.Tensor) -> Any:
        inner = vae.decoder.register_forward_pre_hook(lambda _, inputs: decoded.append(inputs[0].shape[-1]))
        try:
            return real(vae, latents)
        finally:
            inner.remove()

    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", watched)
    whole, tiled = samples("whole", 64), samples("tiled", 32)
    assert len(decoded) > 2 * len(whole)
    assert decoded[-1] <= decoded[0] // 2
    assert [image.size for image in whole] == [image.size for image in tiled]


def test_a_run_that_nothing_makes_fit_is_told_how_much_it_needs_at_least(images: Path) -> None:
    plan = planned(images, "sdxl", 1.5)
    (hint,) = [hint for code, _, hint in trainer.plan_warnings(plan) if code == "memory_short"]
    assert hint.startswith("Use a device with more free memory")
    assert "resolution 256" in hint


def test_a_gpu_without_memory_of_its_own_is_held_against_main_memory_and_told_of_no_cuda_settings(images: Path) -> None:
    config = memory.make_config(dataset_path=str(images), caption_separator=",")
    hardware = trainer.Hardware("mps", "Apple GPU", "", 24 * 1024**3, 5 * 1024**3)
    plan = trainer.make_plan(config, scan_quietly(config), memory.make_source("sdxl"), hardware, half=True)
    assert plan.memory["host"] == plan.memory["total"]
    (hint,) = [hint for code, _, hint in trainer.plan_warnings(plan) if code == "memory_short"]
    assert "nf4" not in hint and "adamw8bit" not in hint


@pytest.mark.parametrize("free_gib", [1.0, 3.0, 6.0])
def test_what_is_advised_is_within_the_bounds_of_its_keys(images: Path, free_gib: float) -> None:
    definitions = trainer.load_schema()["definitions"]
    for keys in ({"resolution": 2048, "lora_rank": 3}, {"batch_size": 32, "gradient_accumulation_steps": 64}):
        plan = planned(images, "sdxl", free_gib, **keys)
        changes, _ = trainer.fitting_settings(plan, int(free_gib * 1024**3))
        assert changes
        assert trainer.check_values(changes, {key: definitions[key] for key in changes}) == []


def test_main_memory_need_not_hold_what_is_read_weight_by_weight() -> None:
    def host(source: trainer.ModelSource, quantize_base: str = "none") -> int:
        config = memory.make_config(quantize_base=quantize_base)
        return trainer.estimate_vram(config, source, 1024, half=True, checkpointing=True)["host"]

    folder = memory.make_source("sdxl")
    *_, second, largest = sorted(folder.family.parameters.values())
    assert host(folder) - host(folder, "nf4") == 2 * (largest - second)
    parts = {name: trainer.Part(Path(), {"w": [size]}, config={}) for name, size in folder.family.parameters.items()}
    assert host(folder) - host(dataclasses.replace(folder, parts=parts)) == 2 * largest


def test_a_run_that_starts_from_a_lora_is_not_told_another_rank(images: Path) -> None:
    plan = planned(images, "sdxl", 1.5, init_lora_path="lora.safetensors", lora_rank=64)
    (hint,) = [hint for code, _, hint in trainer.plan_warnings(plan) if code == "memory_short"]
    assert "resolution 256" in hint and "lora_rank" not in hint


@needs_torch
def test_a_run_on_the_cpu_is_held_against_main_memory(tmp_path: Path, images: Path, models: Path) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", batch_size=4, device="cpu"))
    code = "import sys, train_lora as t; t.free_memory_bytes = lambda: 2**28; sys.exit(t.main(sys.argv[1:]))"
    arguments = [sys.executable, "-c", code, "--config", str(config), "--validate-only"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True)
    result = Run(done.returncode, done.stdout, done.stderr)
    assert result.last["hardware"]["free_gb"] == 0.25
    assert result.last["memory"]["host_gb"] == result.last["memory"]["total_gb"]
    assert any("Gradient checkpointing: on" in event["message"] for event in result.of("info"))
    (warning,) = [event for event in result.of("warning") if event["code"] == "memory_short"]
    assert "0.25 GB are free (cpu)" in warning["message"]
    assert "batch_size 1" in warning["hint"]


# ======================================================================================
# images
# ======================================================================================


def save_picture(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def picture_kinds() -> Iterator[tuple[str, Callable[[Path], Path], Any]]:
    """Yield (name, writer, what must be read: RGB [h, w, 3], computed with numpy from what was written)."""
    numpy = pytest.importorskip("numpy")
    rng = numpy.random.default_rng(0)
    rgb = rng.integers(0, 256, (12, 20, 3), dtype="uint8")
    grey, alpha = rgb[..., 0], rgb[..., 1]

    def over_white(colour: Any, opacity: Any) -> Any:
        share = opacity[..., None].astype(float) / 255
        return colour.astype(float) * share + 255 * (1 - share)

    def saved(name: str, image: Image.Image, **options: Any) -> Callable[[Path], Path]:
        return lambda folder: save_picture(folder / name, image, **options)

    turns: dict[int, Callable[[Any], Any]] = {  # what a viewer does with the stored rows, by EXIF's definition
        1: lambda x: x,
        2: lambda x: x[:, ::-1],
        3: lambda x: x[::-1, ::-1],
        4: lambda x: x[::-1],
        5: lambda x: x.swapaxes(0, 1),
        6: lambda x: x.swapaxes(0, 1)[:, ::-1],
        7: lambda x: x.swapaxes(0, 1)[::-1, ::-1],
        8: lambda x: x.swapaxes(0, 1)[::-1],
    }
    for number, turn in turns.items():
        exif = Image.Exif()
        exif[0x0112] = number
        yield f"EXIF {number}", saved("a.png", Image.fromarray(rgb), exif=exif), turn(rgb)
    cmyk = rng.integers(0, 256, (12, 20, 4), dtype="uint8")
    ink = cmyk.astype(float)
    inked = (255 - ink[..., :3]) * (255 - ink[..., 3:]) / 255
    yield "CMYK", saved("a.tif", Image.frombytes("CMYK", (20, 12), cmyk.tobytes())), inked
    deep = rng.integers(0, 65536, (12, 20), dtype="uint16")
    for suffix in ("png", "tif"):
        yield f"16 bits grey {suffix}", saved(f"a.{suffix}", Image.fromarray(deep)), (deep / 257)[..., None]
    yield "1 bit", saved("a.png", Image.fromarray(grey > 99)), (grey > 99)[..., None] * 255.0
    yield (
        "LA",
        saved("a.png", Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])),
        over_white(grey[..., None], alpha),
    )
    rgba = numpy.dstack([rgb, alpha])
    for suffix in ("png", "webp", "tif"):
        options = {"lossless": True, "exact": True} if suffix == "webp" else {}
        yield f"RGBA {suffix}", saved(f"a.{suffix}", Image.fromarray(rgba), **options), over_white(rgb, alpha)
    palette = rng.integers(0, 256, (16, 3), dtype="uint8")
    see_through = rng.integers(0, 256, 16, dtype="uint8")
    indices = rng.integers(0, 16, (12, 20), dtype="uint8")
    image = Image.fromarray(indices, "L").convert("P")
    image.putdata(indices.flatten().tolist())
    image.putpalette(palette.tobytes())
    expected = over_white(palette[indices], see_through[indices])
    yield "palette, transparent", saved("a.png", image, transparency=see_through.tobytes()), expected
    yield "palette", saved("a.bmp", image), palette[indices]
    others = [Image.fromarray(255 - rgb)]
    animation = {"save_all": True, "append_images": others, "duration": 50}
    yield "animated PNG", saved("a.png", Image.fromarray(rgb), **animation), rgb
    yield "animated WebP", saved("a.webp", Image.fromarray(rgb), lossless=True, **animation), rgb
    yield "pages TIFF", saved("a.tif", Image.fromarray(rgb), save_all=True, append_images=others), rgb


def test_every_kind_of_picture_is_read_as_it_looks(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    Image.init()
    table = {}
    for number, (name, write, expected) in enumerate(picture_kinds()):
        with trainer.open_image(write(tmp_path / str(number)), tmp_path) as (image, _):
            loaded = numpy.asarray(trainer.to_rgb(image)).astype(float)
        wanted = numpy.broadcast_to(expected, (*expected.shape[:2], 3))
        assert loaded.shape == wanted.shape, name
        table[name] = float(abs(loaded - wanted).max())
    print("\nlargest difference in 1/255:", {name: round(value, 2) for name, value in table.items()})
    assert len(table) == 21
    assert max(table.values()) <= 1, table


def test_an_image_is_scaled_to_cover_and_cropped_in_the_centre() -> None:
    image = Image.new("RGB", (200, 100), "red")
    image.paste((0, 0, 255), (50, 0, 150, 100))
    fitted, crop = trainer.fit_image(image, (64, 64))
    assert (fitted.size, crop) == ((64, 64), (32, 0))
    for left in (2, 61):
        red, _, blue = fitted.getpixel((left, 32))  # type: ignore[misc]
        assert red <= 2 and blue >= 253


def test_a_thin_image_is_not_scaled_as_a_whole() -> None:
    fitted, crop = trainer.fit_image(Image.new("RGB", (1, 20_000), "red"), (1024, 1024))  # 60 GB otherwise
    assert (fitted.size, crop, fitted.getpixel((9, 9))) == ((1024, 1024), (0, 10_239_488), (255, 0, 0))


def test_what_is_transparent_in_a_mask_does_not_train() -> None:
    for image in (Image.new("RGBA", (4, 4), (255, 255, 255, 0)), Image.new("LA", (4, 4), (255, 0))):
        assert trainer.to_grey(image).getextrema() == (0, 0)
    assert trainer.to_grey(Image.new("I;16", (4, 4), 65535)).getextrema() == (255, 255)
    assert trainer.to_grey(Image.new("I", (4, 4), 1 << 30)).getextrema() == (255, 255)


def test_large_images_are_decoded_one_after_the_other() -> None:
    budget, most, now = trainer.PixelBudget(100), [0], [0]

    def decode(pixels: int) -> None:
        with budget.take(pixels):
            now[0] += pixels
            most[0] = max(most[0], now[0])
            time.sleep(0.01)
            now[0] -= pixels

    list(trainer.map_ahead(decode, [60, 60, 30, 30, 30, 30, 60], workers=7))
    assert most[0] <= 100
    decode(1000)  # alone, a larger one may


# ======================================================================================
# dataset
# ======================================================================================


def scan(tmp_path: Path, folder: Path, **changes: Any) -> trainer.Dataset:
    return scan_quietly(parse(tmp_path, REQUIRED | {"dataset_path": str(folder), **changes}))


def test_captions_come_from_metadata_then_sidecars_then_trigger_words(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "3_blue bird").mkdir(parents=True)
    for name in ("a.png", "b.png", "c.png", "3_blue bird/d.png"):
        draw_image(folder / name, (64, 64), len(name))
    lines = ['{"file_name": "a.png", "text": "from metadata"}', "", "not json", '{"file_name": "c.png", "text": null}']
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    (folder / "a.txt").write_text("from sidecar", "utf-8")
    (folder / "b.txt").write_bytes(b"\xef\xbb\xbf a Zorb, resting \n")
    dataset = scan(tmp_path, folder)
    captions = {example.name: example.caption for example in dataset.examples}
    assert captions == {
        "3_blue bird/d.png": "zorb, blue bird",
        "a.png": "zorb, from metadata",
        "b.png": "a Zorb, resting",
        "c.png": "zorb",
    }
    assert [example.repeats for example in dataset.examples] == [3, 1, 1, 1]
    assert [flaw.path for flaw in dataset.flaws] == ["metadata.jsonl:3", "metadata.jsonl:4"]
    sources = [example.caption_source for example in dataset.examples]
    assert sources == ["folder name", "metadata.jsonl", "sidecar", "trigger words"]


def test_a_huge_metadata_file_costs_little_and_loses_nothing_silently(tmp_path: Path) -> None:
    folder = save_picture(tmp_path / "images/a.png", Image.new("RGB", (64, 64))).parent
    path = folder / "metadata.jsonl"
    path.write_text("x\n" * 1000 + json.dumps({"file_name": "a.png", "text": "long " * 20_000}))
    (told, *rest, last) = scan(tmp_path, folder).flaws
    assert (told.path, len(rest), last.message) == ("metadata.jsonl:1", 99, "has 1000 bad lines, which are skipped")
    path.write_text(json.dumps({"file_name": "a.png", "text": "long " * 20_000}))
    dataset = scan(tmp_path, folder)
    assert dataset.flaws[0].message == "is longer than 8 kB; the rest is not read"
    assert len(dataset.examples[0].caption) < 8200
    path.write_text(" " * (1 << 26) + json.dumps({"file_name": "a.png", "text": "lost"}))
    assert [flaw.message for flaw in scan(tmp_path, folder).flaws] == ["is longer than 65536 kB; the rest is not read"]


def test_names_match_whatever_system_wrote_them(tmp_path: Path) -> None:
    folder = save_picture(
        tmp_path / "images" / "cafe\u0301.png", Image.new("RGB", (64, 64))
    ).parent  # as a Mac stores it
    save_picture(folder / "b.png", Image.new("RGB", (64, 64), "red"))
    (folder / "b.TXT").write_text("from Windows")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": ".\\caf\u00e9.png", "text": "composed"}))
    dataset = scan(tmp_path, folder)
    assert [example.caption for example in dataset.examples] == ["zorb, from Windows", "zorb, composed"]
    assert dataset.flaws == ()


def test_trigger_words_count_as_whole_words_only() -> None:
    assert trainer.with_trigger_words("a zorbing ball", ["zorb", "ball"], ",") == "zorb, a zorbing ball"
    assert trainer.with_trigger_words("", ["a b", "c"], ";") == "a b; c"


LATIN = "café, zorb".encode("cp1252")


@pytest.mark.parametrize(
    ("data", "caption", "doubt"),
    [
        ("über, zorb".encode(), "über, zorb", ""),
        ("über, zorb".encode("utf-8-sig"), "über, zorb", ""),
        ("über, zorb".encode("utf-16"), "über, zorb", ""),
        (b"\xfe\xff" + "über, zorb".encode("utf-16-be"), "über, zorb", ""),
        ("über, zorb".encode("utf-32"), "über, zorb", ""),
        (LATIN, "café, zorb", "Windows-1252"),
        (b"zorb " * 200_000, ("zorb " * 200_000)[: 1 << 13].strip(), "longer than 8 kB"),
        (b"zorb, " + "ü".encode() * 9000, "zorb, " + "ü" * 4093, "longer than 8 kB"),
        (b"zorb " + b"\xfc" * 9000, "zorb " + "ü" * 8187, "Windows-1252"),
        (b" \n", "zorb", ""),
        ("zorb".encode("utf-16-le"), None, "a.txt: it is no text"),
        (b"\xff\xfe\x00\xd8", None, "a.txt: it is no UTF-16 text"),
    ],
    ids=[
        "utf-8",
        "bom",
        "utf-16",
        "utf-16-be",
        "utf-32",
        "latin",
        "megabyte",
        "cut letter",
        "long latin",
        "blank",
        "utf-16 without mark",
        "broken",
    ],
)
def test_captions_are_read_as_editors_write_them(tmp_path: Path, data: bytes, caption: str | None, doubt: str) -> None:
    folder = tmp_path / "images"
    for name in ("a.png", "b.png"):
        save_picture(folder / name, Image.new("RGB", (64, 64)))
    (folder / "a.txt").write_bytes(data)
    dataset = scan(tmp_path, folder)
    assert [example.caption for example in dataset.examples] == [caption or "zorb", "zorb"][: 1 + bool(caption)]
    assert [flaw.message for flaw in dataset.flaws if doubt not in flaw.message] == []
    assert len(dataset.flaws) == bool(doubt)


def make_hostile(folder: Path) -> dict[str, str]:
    """Fill a folder with what strangers might send: {name that must be told of: words of its reason}."""
    folder.mkdir()
    for name in ("good.png", "good\nname 'x'.png", "told.png", f"{'n' * 247}.png"):  # a mask's name would be too long
        draw_image(folder / name, (64, 64))
    with contextlib.suppress(OSError):  # macOS refuses it
        draw_image(folder / os.fsdecode(b"g\xff.png"), (64, 64))
    Image.new("RGB", (1, 20_000)).save(folder / "thin.png")
    return make_evasions(folder) | make_junk(folder) | make_bad_metadata(folder / "metadata.jsonl")


def make_evasions(folder: Path) -> dict[str, str]:
    """Add links that lead out, in circles or nowhere, pipes, devices and sockets: as images, captions and masks."""
    outside = folder.parent / "outside"
    outside.mkdir()
    draw_image(outside / "secret.png", (64, 64))
    (outside / "secret.txt").write_text("secret")
    for name in ("led out.png", "piped.png", "masked.png"):
        draw_image(folder / name, (64, 64))
    (folder / "circle").mkdir()
    links: dict[str, str | Path] = {
        "link.png": outside / "secret.png",
        "loop.png": "loop.png",
        "dangling.png": "nothing.png",
    }
    links |= {"linked": outside, "circle/circle": folder / "circle", "device.png": "/dev/zero"}
    links |= {"led out.txt": outside / "secret.txt", "masked-masklabel.png": outside / "secret.png"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.png")
    os.mkfifo(folder / "piped.txt")
    with contextlib.closing(socket.socket(socket.AF_UNIX)) as unix:
        unix.bind(os.path.relpath(folder / "socket.png"))
    return {
        **{"link.png": "leads out", "device.png": "leads out", "masked.png": "leads out", "led out.png": "led out.txt"},
        **{"loop.png": "leads nowhere", "dangling.png": "leads nowhere"},
        **{"linked": "links to folders", "circle/circle": "links to folders"},
        **{"pipe.png": "not a regular", "socket.png": "not a regular", "piped.png": "piped.txt: not a regular"},
    }


def make_junk(folder: Path) -> dict[str, str]:
    """Add bombs, cut files, other formats under wrong names, and a mask that is none."""
    bad = {"bomb.png": "900 megapixels", "wide.png": "121 megapixels", "sparse.png": "more than 1024 MB"}
    Image.new("1", (30000, 30000)).save(folder / "bomb.png")
    Image.new("1", (12100, 10000)).save(folder / "wide.png")
    with (folder / "sparse.png").open("wb") as sparse:
        sparse.truncate(3 << 30)
    with Image.open(folder / "good.png") as good:
        scans = save_picture(folder / "scans.jpg", good, progressive=True).read_bytes()
        for suffix in ("jpg", "png", "webp", "bmp", "tif", "avif"):
            if f".{suffix}" in Image.registered_extensions():
                data = save_picture(folder / f"cut.{suffix}", good).read_bytes()
                (folder / f"cut.{suffix}").write_bytes(data[: len(data) * 2 // 3])
                bad[f"cut.{suffix}"] = "cannot be used"
        good.save(folder / "script.jpg", "EPS")
        good.convert("P").save(folder / "other.png", "GIF")
        good.save(folder / "maskless.png")
    last = scans[scans.rfind(b"\xff\xda") : -2]
    (folder / "scans.jpg").write_bytes(scans[:-2] + last * 100 + scans[-2:])
    with Image.open(folder / "good.png") as good:
        phone = save_picture(folder / "phone.jpg", good, format="MPO", save_all=True, append_images=[good]).read_bytes()
    (folder / "phone.jpg").write_bytes(phone[:-2] + last * 101 + phone[-2:])
    (folder / "page.jpg").write_text("<html><svg/></html>")
    (folder / "maskless-masklabel.png").write_text("no mask")
    for name in ("empty.webp", "phone.heic"):
        (folder / name).touch()
    bad |= dict.fromkeys(
        ("script.jpg", "other.png", "page.jpg", "empty.webp"), "cannot be used: no image of a known format"
    )
    bad["other.png"] = "no image of a known format (it is GIF)"
    (folder / "telephone.jpg").write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1")
    bad["telephone.jpg"] = "no image of a known format (it is HEIC)"
    bad["cut.png"] = "the file ends too early"
    bad |= {"maskless.png": "mask maskless-masklabel.png: no image of a known format"}
    bad |= dict.fromkeys(("scans.jpg", "phone.jpg"), "minutes to decode")
    return bad | {"phone.heic": ".heic is not read"}


def make_bad_metadata(path: Path) -> dict[str, str]:
    """Write one good line, that of told.png, among bad ones."""
    outside = ["../outside/secret.png", "/etc/passwd.png", "C:\\secret.png", "\\\\host\\secret.png"]
    entries: list[Any] = [{"file_name": name, "text": "secret"} for name in outside]
    entries += [{"file_name": "told.png", "text": 1}, {"file_name": 1, "text": "x"}, [], "x", 7, None]
    lines = [*map(json.dumps, entries), "[" * 100_000, "{"]
    good = [{"file_name": "told.png", "text": "told \ud800"}, {"file_name": "nowhere.png", "text": "x"}]
    path.write_text("\n".join([*lines, "", *map(json.dumps, good)]), "utf-8")
    bad = {f"metadata.jsonl:{number}": "leads out" for number in range(1, 5)}
    bad |= {f"metadata.jsonl:{number}": "both strings" for number in range(5, 13)}
    return bad | {"metadata.jsonl": 'names 1 file that the folder has no image of: "nowhere.png"'}


@posix
@needs_torch
def test_hostile_files_are_named_none_outside_is_opened_and_the_rest_trains(tmp_path: Path, models: Path) -> None:
    folder = tmp_path / "images"
    bad = make_hostile(folder)
    config = small(folder, models / "sd15", tmp_path / "out", steps=1, masked_loss=True)
    global OPENED
    OPENED = []
    made = train(tmp_path, config)
    opened, OPENED = OPENED, None
    told = {flaw.path: flaw.message for flaw in made.plan.dataset.flaws}
    assert told.keys() == bad.keys()
    assert [name for name, words in bad.items() if words not in told[name]] == []
    warned = [event["message"] for event in emitted(made, "warning")]
    assert [name for name in bad if not any(message.startswith(name) for message in warned)] == []
    captions = {example.name: example.caption for example in made.plan.dataset.examples}
    assert captions.pop("told.png") == "zorb, told ?"
    assert set(captions.values()) == {"zorb"} and len(captions) >= 5
    assert made.final_path.exists()
    assert any(path.endswith("good.png") for path in opened)
    assert [path for path in opened if "secret" in path or path.startswith("/dev/zero")] == []
    with pytest.raises(trainer.TrainerError) as caught:
        scan(tmp_path, folder, on_bad_image="error", masked_loss=True)
    assert caught.value.code == "dataset_unreadable"
    assert {item["path"] for item in caught.value.problems} == bad.keys() - {"metadata.jsonl"}


OPENED: list[str] | None = None  # what this process opens, links resolved, while somebody asks


def note_opened(event: str, details: tuple[Any, ...]) -> None:
    if OPENED is not None and event == "open" and isinstance(details[0], (str, bytes)):
        OPENED.append(os.fsdecode(os.path.realpath(details[0])))


sys.addaudithook(note_opened)


@posix
def test_a_thousand_nested_folders_are_searched_or_named(tmp_path: Path) -> None:
    draw_image(save_picture(tmp_path / "images/a.png", Image.new("RGB", (64, 64))), (64, 64))
    folder = tmp_path / "images"
    try:
        for _ in range(1100):  # more than Python calls into each other
            folder /= "d"
            folder.mkdir()
        draw_image(folder / "deep.png", (64, 64), 1)
        place = os.open(folder, os.O_RDONLY)
        for _ in range(10):  # longer than a path may be
            os.mkdir("long" * 50, dir_fd=place)
            inner = os.open("long" * 50, os.O_RDONLY, dir_fd=place)
            os.close(place)
            place = inner
        os.close(place)
        dataset = scan(tmp_path, tmp_path / "images")
        assert len(dataset.examples) == 2
        (flaw,) = dataset.flaws
        assert flaw.message == "cannot be used: its path is too long, or it cannot be read"
    finally:
        subprocess.run(["rm", "-rf", tmp_path / "images"], check=True)  # shutil's calls itself too


def test_an_empty_or_unusable_folder_is_an_error_that_says_what_was_found(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for flaws in (0, 1):
        with pytest.raises(trainer.TrainerError) as caught:
            scan(tmp_path, folder)
        assert (caught.value.code, len(caught.value.problems)) == ("dataset_empty", flaws)
        (folder / "empty.png").touch()


def test_our_own_output_is_never_a_training_image(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("samples/mine.png", "out/samples/step_1_0.png"):
        (folder / name).parent.mkdir(parents=True)
        draw_image(folder / name, (64, 64))
    inside = scan(tmp_path, folder, output_path=str(folder / "out"))
    assert [example.name for example in inside.examples] == ["samples/mine.png"]
    draw_image(folder / "photo.png", (64, 64))
    same = scan(tmp_path, folder, output_path=str(folder))
    assert [example.name for example in same.examples] == ["out/samples/step_1_0.png", "photo.png"]


def test_caption_files_that_no_image_takes_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in ("01.png", "a.b.png", "5_in/02.PNG"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        draw_image(folder / name, (64, 64), len(name))
    (folder / "phone.heic").touch()
    strays = ["01.png.txt", "01.txt.txt", "1.txt", "5_in/02.PNG.txt"]
    for name in (*strays, "01.txt", "a.b.txt", "5_in/02.TXT", "phone.txt", ".hidden.txt", "notes.md"):
        (folder / name).write_text("told")
    told = {flaw.code: flaw.message for flaw in scan(tmp_path, folder).flaws}
    assert told.keys() == {"captions_stray", "image_skipped"}
    assert told["captions_stray"] == f"has 4 caption files without an image of that name: {', '.join(strays)}"


def test_kohya_folders_repeat_and_a_zero_leaves_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "images"
    for number, name in enumerate(("10_zorb/a.png", "10_zorb/deep/b.png", "0_off/c.png", "d.png", "1_x/2_y/e.png")):
        save_picture(folder / name, Image.new("RGB", (64, 64), (number, 0, 0)))
    dataset = scan(tmp_path, folder, repeats=3)
    assert {example.name: (example.repeats, example.caption) for example in dataset.examples} == {
        "10_zorb/a.png": (30, "zorb"),
        "10_zorb/deep/b.png": (30, "zorb"),
        "1_x/2_y/e.png": (6, "zorb, y"),
        "d.png": (3, "zorb"),
    }
    assert [(flaw.code, flaw.path) for flaw in dataset.flaws] == [("folder_left_out", "0_off")]
    assert len(scan(tmp_path, folder, on_bad_image="error").examples) == 4
    monkeypatch.setattr(trainer, "MAX_SHOWN", 229_999)
    with pytest.raises(trainer.TrainerError, match="230,000 images") as caught:
        plan_of(tmp_path, folder, repeats=10_000)
    assert caught.value.code == "config_invalid"


def plan_of(tmp_path: Path, dataset: Path, **changes: Any) -> trainer.Plan:
    """A plan without torch, on a model of which only the headers are there."""
    model = hollow_model(tmp_path / "hollow")
    config = parse(tmp_path, REQUIRED | {"dataset_path": str(dataset), "base_model": str(model), **changes})
    source = trainer.locate_model(config, Recorder(), weights=False, half=False)
    return trainer.make_plan(config, scan_quietly(config), source, None, half=False)


def test_what_is_usable_but_hardly_meant_is_a_warning(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name, size in {"a": (64, 64), "b": (64, 64), "300_x/c": (64, 400), "d": (600, 600)}.items():
        save_picture(folder / f"{name}.png", Image.new("RGB", size))
    (folder / "c.png").touch()
    prior = save_picture(tmp_path / "prior/p.png", Image.new("RGB", (512, 512), "red")).parent
    plan = plan_of(
        tmp_path,
        folder,
        batch_size=2,
        masked_loss=True,
        regularization_path=str(prior),
        unmasked_weight=0.1,
        keep_tokens=1,
    )
    codes = [code for code, _, _ in trainer.plan_warnings(plan)]
    for prompts, told in {("a dog", "zorbing"): 2, ("a dog", "a Zorb, red"): 0, (): 0}.items():
        asked = dataclasses.replace(plan, config=dataclasses.replace(plan.config, sample_prompts=prompts))
        said = [message for code, message, _ in trainer.dataset_warnings(asked) if code == "prompts_untriggered"]
        assert said == [f"{told} sample prompts hold no trigger word: {', '.join(prompts)}."] * bool(told)
    expected = ["setting_unused", "image_skipped", "captions_missing", "prior_captions_missing", "images_tiny"]
    assert codes == [*expected, "images_cropped", "repeats_high", "duplicates", "masks_missing"]
    square = plan_of(tmp_path, prior, aspect_ratio_bucketing=False, batch_size=2)
    assert [code for code, _, _ in trainer.dataset_warnings(square)] == ["captions_missing"]
    plan = plan_of(tmp_path, folder, batch_size=4)
    assert "buckets_small" in [code for code, _, _ in trainer.plan_warnings(plan)]


def test_buckets_keep_the_area_and_take_the_nearest_aspect_ratio() -> None:
    sizes = trainer.bucket_sizes(512, 64)
    assert sizes[0] == (512, 512)
    for width, height in sizes[1:]:
        assert width % 64 == height % 64 == 0
        assert 0.7 * 512**2 <= width * height <= 512**2
        assert max(width, height) <= 4 * min(width, height)
    assert trainer.choose_bucket(1000, 1000, sizes) == (512, 512)
    assert trainer.choose_bucket(1920, 1080, sizes) == (640, 384)
    assert trainer.choose_bucket(1080, 1920, sizes) == (384, 640)
    assert trainer.bucket_sizes(64, 64) == [(64, 64)]


def random_examples(count: int) -> list[trainer.Example]:
    """Images of all sizes that people have, without the images."""
    draw = random.Random(1)
    made = []
    for number in range(count):
        width, height = (round(math.exp(draw.uniform(math.log(300), math.log(6000)))) for _ in range(2))
        height = min(max(height, width // 4), width * 4)
        nowhere = Path(f"{number}.png")
        made.append(
            trainer.Example(
                str(number), nowhere, nowhere, "", "", 1, width, height, str(number), "train", False, None, ""
            )
        )
    return made


def test_buckets_lose_no_image_and_less_of_each_than_a_square_crop() -> None:
    dataset = trainer.Dataset(tuple(random_examples(500)), ())
    allowed = trainer.bucket_sizes(1024, 64)
    sizes = [trainer.choose_bucket(example.width, example.height, allowed) for example in dataset.examples]
    buckets = trainer.make_buckets(dataset, sizes)
    batches = trainer.epoch_batches(buckets, 4, seed=0, epoch=0)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)
    pairs = list(zip(dataset.examples, sizes, strict=True))
    cropped = sum(trainer.cropped_share(example, size) for example, size in pairs) / 500
    square = sum(trainer.cropped_share(example, (1024, 1024)) for example in dataset.examples) / 500
    assert cropped < 0.05 < 0.4 < square
    example = dataclasses.replace(dataset.examples[0], width=200, height=100)
    assert trainer.cropped_share(example, (64, 64)) == 0.5


def test_an_epoch_shows_every_image_once_in_pure_batches() -> None:
    buckets = {(64, 64): trainer.Bucket(tuple(range(7))), (96, 48): trainer.Bucket((7, 7, 7, 8))}
    batches = trainer.epoch_batches(buckets, 3, seed=1, epoch=2)
    assert sorted(index for batch in batches for index in batch) == sorted([*range(7), 7, 7, 7, 8])
    assert len(batches) == trainer.batches_per_epoch(buckets, 3) == 5
    assert all({index < 7 for index in batch} != {True, False} for batch in batches)
    assert batches == trainer.epoch_batches(buckets, 3, seed=1, epoch=2)
    assert batches != trainer.epoch_batches(buckets, 3, seed=1, epoch=3)


def test_regularization_images_are_shown_as_often_as_the_others_and_all_have_their_turn(tmp_path: Path) -> None:
    folder, prior = tmp_path / "images", tmp_path / "images/reg"  # a folder inside the dataset is not the dataset's
    for number in range(4):
        save_picture(folder / f"{number}.png", Image.new("RGB", (64, 64), (number, 0, 0)))
    for number in range(10):
        save_picture(prior / f"1_a car/{number}.png", Image.new("RGB", (64, 64), (0, number + 1, 0)))
    dataset = scan(tmp_path, folder, regularization_path=str(prior), repeats=2)
    assert collections.Counter((example.role, example.caption, example.repeats) for example in dataset.examples) == {
        ("train", "zorb", 2): 4,
        ("prior", "a car", 1): 10,
    }
    assert dataset.examples[-1].name == "reg/1_a car/9.png"
    moved = prior.rename(tmp_path / "moved")
    again = scan(tmp_path, folder, regularization_path=str(moved), repeats=2)
    assert again.fingerprint == dataset.fingerprint, "a moved folder resumes"
    for number in range(4):
        shutil.copy(folder / f"{number}.png", moved)
    split = scan(tmp_path, folder, regularization_path=str(moved), validation_split=0.5)
    assert (len(split.of_role("validation")), len(split.of_role("prior"))) == (2, 12), "held out here is held out there"
    (bucket,) = trainer.make_buckets(dataset, [(64, 64)] * 14).values()
    shown = [collections.Counter(bucket.epoch(7, epoch)) for epoch in range(5)]
    assert all(epoch.total() == 16 and epoch.keys() >= set(range(4)) for epoch in shown)
    assert {index: sum(epoch[index] for epoch in shown) for index in range(4, 14)} == dict.fromkeys(range(4, 14), 4)
    examples = [dataclasses.replace(example, role="prior") for example in dataset.examples * 10]
    many = trainer.Dataset((*dataset.examples[:4], *examples), ())
    spread = trainer.make_buckets(many, [(64, 64)] * 4 + [(64 + number % 30, 64) for number in range(140)])
    assert sum(bucket.prior_count for bucket in spread.values()) == 8
    assert sum(map(len, spread.values())) == 16 and len(spread) == 30
    rare = dataclasses.replace(bucket, prior=(4,), prior_count=8)
    assert rare.epoch(7, 1) == [*bucket.members, *[4] * 8]


def test_held_out_images_are_drawn_by_content_and_never_trained_on() -> None:
    examples = random_examples(40)
    copies = [dataclasses.replace(example, name=f"copy {example.name}") for example in examples[:20]]
    parted = trainer.hold_out([*examples, *copies], 0.25, seed=3)
    held_out = {example.digest for example in parted if example.role == "validation"}
    assert len(held_out) == 10
    assert not held_out & {example.digest for example in parted if example.role == "train"}
    assert parted == trainer.hold_out([*examples, *copies], 0.25, seed=3)
    assert parted != trainer.hold_out([*examples, *copies], 0.25, seed=4)
    assert [example.role for example in trainer.hold_out(examples[:1], 0.5, seed=3)] == ["train"]
    (bucket,) = trainer.make_buckets(trainer.Dataset(tuple(parted), ()), [(64, 64)] * 60).values()
    assert {parted[index].digest for index in bucket.members} == {example.digest for example in examples} - held_out


def test_shuffled_captions_keep_their_first_tags_and_a_longer_run_only_adds(tmp_path: Path) -> None:
    config = parse(tmp_path, REQUIRED | {"shuffle_tags": True, "keep_tokens": 2})
    caption = "zorb, big, a, b ,, c, d"
    variants = trainer.caption_variants(caption, config, 9)
    assert len(variants) == 9 and len(set(variants)) > 4
    assert all(text.startswith("zorb, big, ") for text in variants)
    assert {tuple(sorted(text.split(", "))) for text in variants} == {("a", "b", "big", "c", "d", "zorb")}
    assert trainer.caption_variants(caption, config, 99)[:9] == variants
    assert len(trainer.caption_variants(caption, config, 99)) == 16
    assert trainer.caption_variants(caption, dataclasses.replace(config, seed=1), 9) != variants
    assert trainer.caption_variants(caption, dataclasses.replace(config, shuffle_tags=False), 9) == (caption,)
    for number in range(2):
        save_picture(tmp_path / f"images/{number}.png", Image.new("RGB", (64, 64), (number, 0, 0)))
        (tmp_path / f"images/{number}.txt").write_text(caption)
    plan = plan_of(tmp_path, tmp_path / "images", shuffle_tags=True, validation_split=0.5, epochs=3)
    by_role = {example.role: texts for example, texts in zip(plan.dataset.examples, plan.variants, strict=True)}
    assert by_role["validation"] == (caption,) and len(by_role["train"]) == 3


def test_augmentations_are_pure_draws_with_the_configured_shares(tmp_path: Path) -> None:
    config = parse(tmp_path, REQUIRED | {"random_flip": True, "caption_dropout": 0.2})
    draws = [trainer.draw_augmentation(config, step, place) for step in range(2000) for place in range(2)]
    assert draws[5:7] == [trainer.draw_augmentation(config, *place) for place in ((2, 1), (3, 0))]
    for share, values in zip((0.5, 0.2), zip(*draws, strict=True), strict=True):
        assert sum(values) / 4000 == pytest.approx(share, abs=0.03)
    plain = parse(tmp_path, REQUIRED)
    assert {trainer.draw_augmentation(plain, step, 0) for step in range(100)} == {(False, False)}


def test_draws_are_pure_functions_of_what_they_are_for() -> None:
    keys = {trainer.draw_key(purpose, *numbers) for purpose in ("a", "b") for numbers in ((1, 23), (12, 3), (1, 2, 3))}
    assert len(keys) == 6
    assert all(0 <= key < 2**63 for key in keys)
    import hashlib

    expected = int.from_bytes(hashlib.blake2b(b"noise/42/7/0", digest_size=8).digest(), "big") // 2
    assert trainer.draw_key("noise", 42, 7, 0) == expected, "changing this breaks every run that is to be resumed"


# ======================================================================================
# diffusion maths
# ======================================================================================


@needs_torch
@pytest.mark.parametrize("change", [{}, {"beta_schedule": "linear"}, {"rescale_betas_zero_snr": True}])
def test_the_noise_schedule_is_the_one_of_diffusers(change: Json) -> None:
    reference: Any = diffusers.DDIMScheduler
    expected = reference.from_config(SCHEDULER | change).alphas_cumprod
    ours = trainer.noise_schedule(SCHEDULER | change)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours.float(), expected, atol=2e-6, rtol=1e-4)


@needs_torch
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_diffusers(prediction: str) -> None:
    owner: Any = diffusers.DDPMScheduler
    reference = owner.from_config(SCHEDULER)
    alpha_bar = trainer.noise_schedule(SCHEDULER)
    latents, noise = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 250, 998, 999])
    noisy, target = trainer.diffuse(latents, noise, alpha_bar, timesteps, prediction)
    torch.testing.assert_close(noisy, reference.add_noise(latents, noise, timesteps), atol=2e-6, rtol=2e-6)
    expected = noise if prediction == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target, expected, atol=2e-6, rtol=2e-6)


@needs_torch
@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts"])
def test_learning_rates_follow_diffusers_schedules(name: str, warmup: int) -> None:
    from diffusers.optimization import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = "constant_with_warmup" if name == "constant" and warmup else name
    schedule = get_scheduler(
        reference, optimizer, num_warmup_steps=warmup, num_training_steps=40, num_cycles=trainer.RESTARTS
    )
    for step in range(40):
        ours = trainer.learning_rate_factor(name, step, 40, warmup)
        assert ours == pytest.approx(schedule.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        schedule.step()


@needs_torch
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper(prediction: str) -> None:
    import numpy

    betas = numpy.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha_bar = numpy.cumprod(1 - betas)
    snr = alpha_bar / (1 - alpha_bar)
    expected = numpy.minimum(snr, 5.0) / (snr if prediction == "epsilon" else snr + 1)
    weights = trainer.loss_weights(trainer.noise_schedule(SCHEDULER), prediction, 5.0)
    assert abs(weights.numpy() - expected).max() < 1e-9
    reference: Any = diffusers.training_utils
    owner: Any = diffusers.DDPMScheduler
    theirs = reference.compute_snr(owner.from_config(SCHEDULER), torch.arange(1000)).double().numpy()
    assert abs(theirs / snr - 1).max() < 1e-3  # diffusers' table is in float32
    assert torch.equal(
        trainer.loss_weights(trainer.noise_schedule(SCHEDULER), prediction, None), torch.ones(1000).double()
    )
    # By hand: alpha_bar 0.9 has snr 9, 0.5 has 1, 0 (zero terminal SNR) has 0.
    three = trainer.loss_weights(torch.tensor([0.9, 0.5, 0.0], dtype=torch.float64), prediction, 5.0).tolist()
    by_hand = [5 / 9, 1.0] if prediction == "epsilon" else [5 / 10, 1 / 2]
    assert three[:2] == pytest.approx(by_hand, abs=1e-12)
    assert prediction == "epsilon" or three[2] == 0


@needs_torch
def test_the_huber_loss_by_hand() -> None:
    prediction, target = torch.zeros(1, 1, 1, 3), torch.tensor([[[[0.0, 0.3, -4.0]]]])
    c = 0.1
    by_hand = [2 * c * (math.sqrt(error**2 + c**2) - c) for error in (0.0, 0.3, -4.0)]
    found = trainer.sample_error(prediction, target, huber_c=c)
    assert found.item() == pytest.approx(sum(by_hand) / 3, abs=1e-7)
    weights = torch.tensor([[[[1.0, 0.5, 0.0]]]])
    masked = trainer.sample_error(prediction, target, weights, c)
    assert masked.item() == pytest.approx(0.5 * by_hand[1] / 3, abs=1e-7)
    small = torch.full((1, 1, 1, 3), 1e-3)  # far below c it is the squared error
    assert trainer.sample_error(small, torch.zeros_like(small), huber_c=1.0).item() == pytest.approx(1e-6, rel=1e-5)


@needs_torch
def test_the_moving_average_is_that_of_diffusers() -> None:
    from diffusers.training_utils import EMAModel

    weight = torch.nn.Parameter(torch.randn(5))
    ours = weight.detach().clone()
    theirs = EMAModel([weight], decay=0.7)
    for step in range(30):
        weight.data += torch.randn(5)
        theirs.step([weight])
        ours.lerp_(weight.detach(), 1 - trainer.ema_decay_at(0.7, step))
        torch.testing.assert_close(ours, theirs.shadow_params[0])


# ======================================================================================
# model
# ======================================================================================


def load_pipeline(model: Path) -> Any:
    name = json.loads((model / "model_index.json").read_text())["_class_name"]
    pipeline = getattr(diffusers, name).from_pretrained(model, dtype=torch.float32)
    owner: Any = diffusers.DDIMScheduler
    pipeline.scheduler = owner.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@needs_torch
@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_images_are_encoded_as_the_pipeline_does(
    tmp_path: Path, images: Path, models: Path, kind: str
) -> None:
    made = prepare(tmp_path, small(images, models / kind, tmp_path / "out", random_flip=True))
    pipeline = load_pipeline(models / kind)
    text = made.plan.dataset.examples[2].caption
    encoded = pipeline.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    half: Json = {"atol": 1e-3, "rtol": 1e-3}  # fp16 keeps eleven bits
    cached = made.cached[made.keys[text]]
    torch.testing.assert_close(cached["context"].float(), encoded[0], **half)
    if kind == "sdxl":
        torch.testing.assert_close(cached["pooled"].float(), encoded[2], **half)
    for index, mirrored in itertools.product(range(5), (False, True)):
        entry, example = view_of(made, index, mirrored), made.plan.dataset.examples[index]
        size = (entry["mean"].shape[2] * 8, entry["mean"].shape[1] * 8)
        with Image.open(example.path) as image:
            fitted, crop = trainer.fit_image(ImageOps.mirror(image) if mirrored else image, size)
        latents = pipeline.vae.encode(pipeline.image_processor.preprocess(fitted)).latent_dist
        scale = pipeline.vae.config.scaling_factor
        torch.testing.assert_close(entry["mean"].float(), latents.mean[0] * scale, **half)
        torch.testing.assert_close(entry["std"].float(), latents.std[0] * scale, **half)
        expected = [example.height, example.width, crop[1], crop[0], size[1], size[0]]
        assert entry["time_ids"].tolist() == expected


@needs_torch
def test_encoders_are_gone_after_caching(tmp_path: Path, images: Path, models: Path) -> None:
    import gc

    made = prepare(tmp_path, small(images, models / "sdxl", tmp_path / "out", sample_at_start=True))
    gc.collect()
    alive = [item for item in gc.get_objects() if type(item).__name__.startswith("CLIPTextModel")]
    assert alive == []
    assert made.vae.encoder is None
    assert {name.split(".")[0] for name, _ in made.vae.named_parameters()} == {"decoder", "post_quant_conv"}


LONG = " ".join(string.ascii_lowercase * 5)  # 130 tokens


@needs_torch
def test_captions_over_the_limit_and_common_trigger_words_are_told(tmp_path: Path, models: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    draw_image(folder / "long.png", (64, 64))
    (folder / "long.txt").write_text(LONG)
    config = small(folder, models / "sd15", tmp_path / "out", trigger_words=["z", "zorb"])
    warned = {event["code"]: event["message"] for event in emitted(prepare(tmp_path, config), "warning")}
    assert warned["captions_cut"].startswith("1 caption of more than 75 tokens (the longest has 135): long.png")
    assert warned["trigger_words_common"].endswith("common words: z.")
    wide = prepare(tmp_path, config | {"output_path": str(tmp_path / "wide"), "max_caption_tokens": 150})
    assert "captions_cut" not in warning_codes(wide)


@needs_torch
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_long_captions_are_encoded_in_windows_and_shorter_ones_filled_up(
    tmp_path: Path, images: Path, models: Path, kind: str
) -> None:
    config = small(images, models / kind, tmp_path / "out", max_caption_tokens=150, sample_prompts=[LONG, "a b"])
    made = prepare(tmp_path, config)
    context, conditions = made.conditions([LONG, "a b"], torch.zeros(2, 6))
    pipeline = load_pipeline(models / kind)
    words = LONG.split()
    options = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    parts = [" ".join(words[:75]), " ".join(words[75:]), "a b", ""]
    encoded = [pipeline.encode_prompt(part, **options) for part in parts]
    expected = torch.stack([torch.cat([encoded[i][0], encoded[i + 1][0]], dim=1)[0] for i in (0, 2)])
    assert context.shape == expected.shape == (2, 154, expected.shape[2])
    torch.testing.assert_close(context, expected, atol=1e-3, rtol=1e-3)
    if kind == "sdxl":
        pooled = torch.cat([encoded[0][2], encoded[2][2]])
        torch.testing.assert_close(conditions["text_embeds"], pooled, atol=1e-3, rtol=1e-3)  # type: ignore[index]


@needs_torch
def test_the_lora_starts_as_the_identity_in_fp32_and_depends_on_the_seed_only(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", mixed_precision="bf16")
    one = prepare(tmp_path, config | {"output_path": str(tmp_path / "1")})
    torch.manual_seed(99)
    two = prepare(tmp_path, config | {"output_path": str(tmp_path / "2")})
    other = prepare(tmp_path, config | {"output_path": str(tmp_path / "3"), "seed": 1})
    assert one.unet.conv_in.weight.dtype == torch.bfloat16
    for name, weight in one.live.items():
        assert weight.dtype == torch.float32
        assert torch.equal(weight, two.live[name])
        if name.endswith("/lora_B"):
            assert not weight.any()
        else:
            bound = 1 / math.sqrt(weight[0].numel())
            assert 0.5 * bound < weight.abs().max() <= bound
            assert not torch.equal(weight, other.live[name])


@needs_torch
@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_clip_skip_takes_an_earlier_layer_through_the_last_norm(
    tmp_path: Path, images: Path, models: Path, kind: str
) -> None:
    made = prepare(tmp_path, small(images, models / kind, tmp_path / "out", clip_skip=1))
    text = "zorb, picture 1, blob"
    context, _ = made.conditions([text], torch.zeros(1, 6))
    pipeline = load_pipeline(models / kind)
    tokens = pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    encoder = pipeline.text_encoder
    with torch.no_grad():  # as diffusers' encode_prompt, which does not know where transformers 5 keeps the norm
        hidden = encoder(tokens, output_hidden_states=True).hidden_states
        expected = encoder.final_layer_norm(hidden[-2])
        torch.testing.assert_close(encoder.final_layer_norm(hidden[-1]), encoder(tokens)[0])
    torch.testing.assert_close(context, expected, atol=2e-3, rtol=1e-3)  # the cache is fp16
    plain = prepare(tmp_path, small(images, models / kind, tmp_path / "plain"))
    assert not torch.allclose(plain.conditions([text], torch.zeros(1, 6))[0], expected, atol=1e-2)
    assert plain.keys[text] != made.keys[text]
    with pytest.raises(trainer.TrainerError) as caught:
        prepare(tmp_path, small(images, models / kind, tmp_path / "many", clip_skip=11))
    assert caught.value.problems[0]["path"] == "clip_skip"


@needs_torch
def test_text_encoders_are_gone_after_caching_unless_they_train(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []
    real = trainer.load_component

    def load(source: trainer.ModelSource, name: str, *rest: Any) -> Any:
        loaded.append((name, weakref.ref(component := real(source, name, *rest))))
        return component

    monkeypatch.setattr(trainer, "load_component", load)
    made = [
        prepare(tmp_path, small(images, models / "sdxl", tmp_path / str(training), train_text_encoder=training))
        for training in (False, True)
    ]
    there = [sorted(part for part, alive in some if alive() and part != "vae") for some in (loaded[:4], loaded[4:])]
    assert made and there == [["unet"], ["text_encoder", "text_encoder_2", "unet"]]


@needs_torch
def test_sdxl_takes_no_clip_skip(tmp_path: Path, images: Path, models: Path) -> None:
    with pytest.raises(trainer.TrainerError) as caught:
        prepare(tmp_path, small(images, models / "sdxl", tmp_path / "out", clip_skip=1))
    assert [problem["path"] for problem in caught.value.problems] == ["clip_skip"]


@needs_torch
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_text_encoders_that_train_start_from_what_the_cache_would_hold(
    tmp_path: Path, images: Path, models: Path, kind: str
) -> None:
    changes: Json = {"max_caption_tokens": 150, "train_text_encoder": True, "text_encoder_learning_rate": 2e-2}
    cached = prepare(tmp_path, small(images, models / kind, tmp_path / "cached", max_caption_tokens=150))
    made = prepare(tmp_path, small(images, models / kind, tmp_path / "out", **changes))
    long = "zorb " + "blob " * 30
    assert made.encoder
    for length, text in ((77, "a zorb"), (154, long)):
        cached.keys[text] = text
        with torch.no_grad():
            cached.cached.put(text, made.encoder.encode([text], torch.float16)[0])
        texts = [text, "zorb, picture 1, blob"]
        context, conditions = made.conditions(texts, torch.zeros(2, 6))
        expected, pooled = cached.conditions(texts, torch.zeros(2, 6))
        assert context.shape[1] == length
        torch.testing.assert_close(context, expected, atol=2e-3, rtol=2e-3)
        if conditions and pooled:
            torch.testing.assert_close(conditions["text_embeds"], pooled["text_embeds"], atol=2e-3, rtol=2e-3)
    assert not encoded_counts(made).get("captions")
    made.train()
    moved = {key for key, weight in made.live.items() if key.endswith("lora_B") and weight.any()}
    still = {key for key in made.live if key.endswith("lora_B")} - moved
    # SDXL takes the last but one layer's output: the last layer of its first encoder is never used.
    last = made.encoder.parts[0][2].config.num_hidden_layers - 1
    assert {int(key.partition("layers.")[2][:1]) for key in still} == ({last} if kind == "sdxl" else set())
    assert all(key.startswith("text_encoder.") for key in still)
    rates = emitted(made, "progress")[-1]["learning_rates"]
    assert rates == {"unet": 1e-2, "text_encoder": 2e-2}


def quantized_layers(unet: Any) -> dict[str, Any]:
    """The layers that hold nf4, by their names in the base."""
    layers = {name.replace(".base_layer", ""): module for name, module in unet.named_modules()}
    return {name: module for name, module in layers.items() if type(module).__module__.startswith("bitsandbytes")}


def from_nf4(weight: Any) -> torch.Tensor:
    """Undo nf4 by the formulas of QLoRA (Dettmers et al. 2023, 3), with the tables that lie beside a weight."""
    state, scales = weight.quant_state, weight.quant_state.state2
    steps = scales.absmax.repeat_interleave(256)[: len(state.absmax)]
    absmax = scales.code[state.absmax.long()] * steps + state.offset
    codes = torch.stack([weight.data >> 4, weight.data & 15], dim=1).flatten().long()
    values = state.code[codes].reshape(len(absmax), 64) * absmax[:, None]
    result: torch.Tensor = values.reshape(state.shape).to(state.dtype)
    return result


def one_step_of(made: trainer.LoRATrainer) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A prediction and the adapter's gradients."""
    batch = made.collate(0)
    noisy = torch.randn(batch.mean.shape, generator=trainer.generator("test"))
    output = made.predict(noisy, torch.tensor([7, 700])[: len(noisy)], batch.context, batch.conditions)
    torch.autograd.backward(output.float().square().mean())
    return output.detach(), {key: weight.grad.float() for key, weight in made.parameters.items()}


@needs_torch
@needs("bitsandbytes")
@pytest.mark.parametrize("dtype", ["no", "bf16"])
@pytest.mark.parametrize(("kind", "adapter"), [("sd15", "lora"), ("sdxl", "lora"), ("sdxl", "dora")])
def test_an_nf4_base_computes_what_its_weights_stand_for(
    tmp_path: Path, images: Path, models: Path, kind: str, adapter: str, dtype: str
) -> None:
    changes: Json = {"lora_type": adapter, "mixed_precision": dtype, "lora_targets": "all"}
    made, plain = (
        prepare(tmp_path, small(images, models / kind, tmp_path / base, quantize_base=base, **changes))
        for base in ("nf4", "none")
    )
    layers, reference = quantized_layers(made.unet), dict(plain.unet.named_parameters())
    named = {name.replace(".base_layer", ""): name for name in reference}
    base = {name: weight.shape for name, weight in load_pipeline(models / kind).unet.named_parameters()}
    linear = {name for name, shape in base.items() if len(shape) == 2 and shape[1] % 64 == 0}  # of whole blocks
    assert {f"{name}.weight" for name in layers} == linear
    for name, layer in layers.items():
        weight, value = reference[named[f"{name}.weight"]], from_nf4(layer.weight)
        assert 0 < (weight - value).norm() < 0.11 * weight.norm()  # of normal numbers nf4 keeps all but a tenth
        weight.data = value
    for key, weight in made.live.items():
        values = torch.rand(weight.shape, generator=trainer.generator(key)) - 0.5
        weight.copy_(weight if key.endswith("vector") else values / 4)
        plain.live[key].copy_(weight)
    for one in (made, plain):
        one.refresh()
    (ours, gradients), (theirs, expected) = (one_step_of(one) for one in (made, plain))
    assert ours.dtype == theirs.dtype == made.dtype
    share = 1e-5 if dtype == "no" else 0.15  # in bf16 the order of sums shows
    assert (ours - theirs).norm() <= share * theirs.norm()
    for key, gradient in gradients.items():
        assert (gradient - expected[key]).norm() <= share * expected[key].norm() + 1e-7, key


@needs_torch
@needs("bitsandbytes")
@pytest.mark.parametrize("kind", ["sd15", "sd21v", "sdxl"])
def test_an_nf4_base_is_read_one_weight_at_a_time_from_a_folder_as_from_a_file(
    tmp_path: Path, images: Path, wide_models: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    real, read_so_far, whole = trainer.open_tensors, 0, []

    @contextlib.contextmanager
    def watched(paths: Any) -> Any:
        nonlocal read_so_far
        with real(paths) as read:

            def one(key: str) -> Any:
                nonlocal read_so_far
                read_so_far += 1
                whole.append(sum(alive() is not None for alive in matrices))
                value = read(key).clone()
                if value.dim() == 2:
                    matrices.append(weakref.ref(value.untyped_storage()))
                return value

            yield one

    bases = {"folder": wide_models / kind, "file": wide_models / f"{kind}.safetensors"}
    configs = [parse(tmp_path, small(images, base, tmp_path / name)) for name, base in bases.items()]
    unets = []
    for config in configs:
        matrices: list[Any] = []
        source = trainer.locate_model(config, Recorder(), weights=True, half=False)
        monkeypatch.setattr(trainer, "open_tensors", watched)
        unets.append(trainer.load_component(source, "unet", torch.float32, torch.device("cpu"), True))
        monkeypatch.setattr(trainer, "open_tensors", real)
    assert read_so_far == 2 * len(list(unets[0].parameters()))
    assert max(whole) <= 1
    for ours, theirs in zip(*(unet.named_parameters() for unet in unets), strict=True):
        assert ours[0] == theirs[0] and torch.equal(ours[1].data, theirs[1].data)
    used = 0
    for layer in quantized_layers(unets[0]).values():
        state = layer.weight.quant_state
        used += layer.weight.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    linear = sum(math.prod(layer.weight.quant_state.shape) for layer in quantized_layers(unets[0]).values())
    assert 0 <= used - linear * trainer.NF4_BYTES <= 4 * len(quantized_layers(unets[0]))


@needs_torch
@needs("bitsandbytes")
def test_a_file_trained_on_nf4_is_like_any_other_and_says_so(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sdxl", tmp_path / "plain", lora_targets="all", train_text_encoder=True)
    plain = train(tmp_path, config)
    config |= {"quantize_base": "nf4", "init_lora_path": str(plain.final_path), "output_path": str(tmp_path / "nf4")}
    made = train(tmp_path, config | {"validation_steps": 2, "validation_split": 0.3, "use_rslora": True})
    assert shapes_of(made.final_path) == shapes_of(plain.final_path)
    told = [json.loads(trainer.read_header(run.final_path)["train_lora.params"]) for run in (plain, made)]
    assert [params["quantize_base"] for params in told] == ["none", "nf4"]
    assert not [name for name in made.components if name != "unet" and quantized_layers(made.components[name])]
    assert len(emitted(made, "validation")) == len(emitted(made, "sample")) == 2
    with pytest.raises(trainer.TrainerError) as caught:  # it is another base, so another run
        prepare(tmp_path, config | {"quantize_base": "none", "steps": 6})
    assert "quantize_base" in [problem["path"] for problem in caught.value.problems]


@needs_torch
@needs("bitsandbytes")
def test_what_nf4_saves_is_told_and_that_it_is_little_for_sd15(tmp_path: Path, images: Path) -> None:
    said = {}
    for family in trainer.FAMILIES[:3]:
        config = parse(tmp_path, small(images, tmp_path, tmp_path / "out", quantize_base="nf4", resolution=512))
        source = trainer.ModelSource("x", family, family.unet, {}, {}, "epsilon")
        plan = trainer.make_plan(config, scan_quietly(config), source, None, half=True)
        codes = [code for code, _, _ in trainer.plan_warnings(plan)]
        said[family.name] = ("quantization_saves_little" in codes, [*plan.reasons()][-1])
    sentence = "The UNet's weights take {} GB with nf4 instead of {} GB.".format
    assert said == {
        "sd15": (True, sentence(1.23, 1.6)),
        "sd21": (True, sentence(1.2, 1.61)),
        "sdxl": (False, sentence(1.7, 4.78)),
    }


@needs_torch
@needs("bitsandbytes")
def test_a_bitsandbytes_that_fails_on_the_device_is_told_before_anything_is_loaded(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import bitsandbytes

    config = small(images, models / "sd15", tmp_path / "out", quantize_base="nf4")
    path = write_config(tmp_path, **config)
    assert run("--config", path, "--validate-only").last["type"] == "validated"
    monkeypatch.setattr(bitsandbytes, "matmul_4bit", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(trainer, "load_component", lambda *_: pytest.fail("something was loaded"))
    checks = (lambda: prepare(tmp_path, config), lambda: trainer.validate(trainer.load_config(str(path)), Recorder()))
    for check in checks:
        with pytest.raises(trainer.TrainerError, match="nf4 cannot be used on cpu: bitsandbytes fails") as caught:
            check()
        assert caught.value.code == "config_invalid"
        assert [problem["path"] for problem in caught.value.problems] == ["quantize_base"]


@needs_torch
@pytest.mark.parametrize("name", trainer.OPTIMIZERS)
def test_an_optimizer_is_the_librarys_own_with_the_settings_of_the_config(tmp_path: Path, name: str) -> None:
    kind = trainer.OPTIMIZERS[name]
    owner = getattr(pytest.importorskip(kind.module), kind.class_name)
    weights = [torch.nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
    settings = {"weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    config = parse(tmp_path, REQUIRED | settings | {"optimizer": name})
    groups = [{"params": [weight], "lr": rate} for weight, rate in zip(weights, (0.5, 0.25), strict=True)]
    made = trainer.make_optimizer(config, groups, torch.device("cpu"))
    assert type(made) is owner
    for group, rate in zip(made.param_groups, (0.5, 0.25), strict=True):
        assert (group["lr"], group["weight_decay"]) == (rate, 0.2)
        assert not kind.adam or (group["betas"], group["eps"]) == ((0.8, 0.95), 1e-6)
        assert {key: group[key] for key in kind.fixed} == kind.fixed
        assert name != "prodigy" or group["decouple"]
        assert not kind.averages or group["train_mode"]
    for weight, group in zip(weights, made.param_groups, strict=True):
        weight.grad, group["lr"] = torch.ones_like(weight), 0.5
    made.step()
    for weight in weights:
        kept = [
            value for value in made.state[weight].values() if torch.is_tensor(value) and value.numel() == weight.numel()
        ]
        assert sum(value.element_size() for value in kept) == kind.state_bytes


@needs_torch
@needs("schedulefree")
def test_schedule_free_weights_are_its_own_and_training_keeps_its_bits(
    tmp_path: Path, images: Path, models: Path
) -> None:
    changes: Json = {"optimizer": "schedulefree_adamw", "adam_beta1": 0.9}
    made = train(tmp_path, small(images, models / "sd15", tmp_path / "out", **changes))
    before = {key: weight.clone() for key, weight in made.live.items()}
    ours = made.evaluation_weights()
    with made.evaluating():
        assert all(torch.equal(made.parameters[key], weight) for key, weight in ours.items())
    assert all(torch.equal(made.parameters[key], weight) for key, weight in before.items())
    assert any(not torch.equal(ours[key], weight) for key, weight in before.items())
    made.optimizer.eval()  # its own way, which changes the live weights
    for key, weight in ours.items():
        torch.testing.assert_close(made.live[key], weight, atol=1e-7, rtol=1e-6)


@needs_torch
def test_the_average_is_in_the_file_and_the_live_weights_are_not(tmp_path: Path, images: Path, models: Path) -> None:
    made = train(tmp_path, small(images, models / "sd15", tmp_path / "out", ema_decay=0.6, steps=6))
    plain = train(tmp_path, small(images, models / "sd15", tmp_path / "plain", steps=6))
    assert all(torch.equal(weight, plain.live[key]) for key, weight in made.live.items()), "averaging disturbs nothing"
    key = next(key for key in made.live if key.endswith("to_q/lora_B"))
    module = key.removeprefix("unet.").removesuffix("/lora_B").replace(".", "_")
    saved = tensors_of(made.final_path)[f"lora_unet_{module}.lora_up.weight"]
    assert torch.equal(saved, made.ema[key])
    assert not torch.equal(saved, made.live[key])


# ======================================================================================
# cache
# ======================================================================================


def encoded_counts(made: trainer.LoRATrainer) -> dict[str, int]:
    """How many images and captions were encoded."""
    told = [event for event in emitted(made, "info") if "total" in event and event["message"].startswith("Encoding")]
    return {event["message"].split()[1].rstrip("."): event["total"] for event in told}


@needs_torch
def test_a_second_run_encodes_nothing_and_one_changed_image_is_the_only_one_encoded_again(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    model = copy_model(models / "sd15", tmp_path / "model")
    config = small(folder, model, tmp_path / "1", cache_dir=str(tmp_path / "cache"), random_flip=True, steps=2)

    def again(name: str, **changes: Any) -> dict[str, int]:
        made = train(tmp_path, config | {"output_path": str(tmp_path / name)} | changes)
        assert made.final_path.exists()
        return encoded_counts(made)

    assert again("1") == {"images": 10, "captions": 7}
    assert again("memory", cache_dir=None) == {"images": 10, "captions": 7}
    with monkeypatch.context() as patch:
        for name in ("PromptEncoder", "encode_images"):
            patch.setattr(trainer, name, lambda *_: pytest.fail("nothing is to be encoded"))
        made = train(tmp_path, config | {"output_path": str(tmp_path / "2")})
        assert encoded_counts(made) == {}
    said = [event["message"] for event in emitted(made, "info")]
    assert "10 of 10 images are in the cache already." in said
    assert "7 of 7 texts are in the cache already." in said
    entries = [next((tmp_path / "cache").glob(f"*/{key}.safetensors")) for key in made.keys.values()]
    whole = [entry.read_bytes() for entry in entries]
    zeros = whole[4][: len(whole[4]) // 2] + bytes(len(whole[4]) // 2)
    for entry, data in zip(entries[1:], [b"", b"junk", whole[3][:-1], zeros, whole[0]], strict=False):
        entry.write_bytes(data)
    make_pipe(entries[8])
    assert sum(again("junk").values()) == 6
    for name in ("2", "junk"):
        assert_same_tensors(tmp_path / f"{name}/lora_final.safetensors", tmp_path / "1/lora_final.safetensors")
    assert [trainer.tensor_bytes_hash(entry.read_bytes()) for entry in entries] == [
        *map(trainer.tensor_bytes_hash, whole)
    ]
    assert again("3", steps=4) == {}
    assert_same_tensors(tmp_path / "1/lora_final.safetensors", tmp_path / "memory/lora_final.safetensors")
    draw_image(folder / "3.png", (128, 128), 99)
    assert again("4", random_flip=False) == {"images": 1}
    (folder / "3.txt").write_text("another caption")
    assert again("5", random_flip=False) == {"captions": 1}
    assert again("6", random_flip=False, resolution=96) == {"images": 5}
    assert again("7", random_flip=False, max_caption_tokens=150) == {"captions": 7}
    vae = model / "vae/diffusion_pytorch_model.safetensors"
    vae.write_bytes(vae.read_bytes()[:-1] + bytes([vae.read_bytes()[-1] ^ 1]))
    assert again("9", random_flip=False) == {"images": 5}


@needs_torch
def test_a_cache_too_large_for_memory_is_read_from_the_output_folder_with_the_same_result(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(images, models / "sdxl", tmp_path / "out")
    in_memory = train(tmp_path, config | {"output_path": str(tmp_path / "memory")})
    plan = in_memory.plan
    needed = trainer.cache_size(plan.config, plan.source, plan.sizes, len(plan.captions) + len(plan.prompts))
    monkeypatch.setattr(trainer, "free_memory_bytes", lambda: 2 * needed - 1)
    made = train(tmp_path, config)
    assert not made.cached._entries
    entries = list((tmp_path / "out/cache").glob("*/*.safetensors"))
    assert len(entries) == len(made.keys)
    held = sum(tensor.nbytes for key in in_memory.keys.values() for tensor in in_memory.cached[key].values())
    assert needed == pytest.approx(held, rel=0.05)
    assert_same_tensors(made.final_path, in_memory.final_path)
    real = trainer.LoRATrainer.advance

    def advance_and_remove(self: trainer.LoRATrainer, *of_step: Any) -> None:
        real(self, *of_step)
        shutil.rmtree(tmp_path / "lost/cache", ignore_errors=True)

    monkeypatch.setattr(trainer.LoRATrainer, "advance", advance_and_remove)
    interrupted = make_trainer(tmp_path, config | {"output_path": str(tmp_path / "lost")})
    with pytest.raises(trainer.TrainerError, match="is gone") as caught:
        interrupted.run()
    assert (caught.value.code, interrupted.stop.saved.step) == ("dataset_unreadable", 1)


@needs_torch
def test_on_a_gpu_groups_are_encoded_at_once_and_as_a_whole_where_a_member_is_missing(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"aspect_ratio_bucketing": False, "max_caption_tokens": 150, "sample_prompts": [LONG]}
    config = small(images, models / "sdxl", tmp_path / "out", cache_dir=str(tmp_path / "cache"), **changes)
    alone = prepare(tmp_path, config | {"output_path": str(tmp_path / "alone"), "cache_dir": None})
    monkeypatch.setattr(trainer.LoRATrainer, "at_once", lambda self, most: 3)
    grouped = prepare(tmp_path, config)
    for item, key in alone.keys.items():
        assert grouped.cached[grouped.keys[item]].keys() == alone.cached[key].keys()
        for name, tensor in alone.cached[key].items():
            torch.testing.assert_close(grouped.cached[grouped.keys[item]][name], tensor, atol=2e-3, rtol=2e-3)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "cache").glob("*/*")}
    lost = next(path for path in before if path.stem == grouped.keys[grouped.plan.view(1)])
    lost.unlink()
    again = prepare(tmp_path, config | {"output_path": str(tmp_path / "again")})
    assert encoded_counts(again) == {"images": 3}
    assert trainer.tensor_bytes_hash(lost.read_bytes()) == trainer.tensor_bytes_hash(before.pop(lost)[1])
    assert all(path.stat().st_mtime_ns == written for path, (written, _) in before.items())


@needs_torch
def test_a_full_cache_folder_is_no_reason_to_stop_while_memory_holds_it(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, data: bytes) -> None:
        if "cache" in path.parts:
            raise trainer.TrainerError("disk_full", "The disk is full.")
        real(path, data)

    real = trainer.write_file
    monkeypatch.setattr(trainer, "write_file", full)
    config = small(images, models / "sd15", tmp_path / "out", cache_dir=str(tmp_path / "cache"), steps=1)
    assert "cache_not_written" in warning_codes(train(tmp_path, config))
    monkeypatch.setattr(trainer, "free_memory_bytes", lambda: 0)
    with pytest.raises(trainer.TrainerError) as caught:
        prepare(tmp_path, config | {"output_path": str(tmp_path / "other")})
    assert caught.value.code == "disk_full"


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


SWAPS: dict[str, Callable[[Path], None]] = {
    "changed": lambda path: draw_image(path, (64, 100), 9),
    "gone": Path.unlink,
    "pipe": make_pipe,
    "link out": lambda path: path.symlink_to(path.rename(path.parent.parent / "moved.png")),
}


@posix
@needs_torch
@pytest.mark.parametrize("swap", SWAPS)
def test_an_image_that_is_swapped_after_its_check_is_neither_opened_nor_cached_under_its_old_name(
    tmp_path: Path, images: Path, models: Path, swap: str
) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    made = make_trainer(tmp_path, small(folder, models / "sd15", tmp_path / "out"))
    SWAPS[swap](folder / "2.png")
    with pytest.raises(trainer.TrainerError, match=r"2\.png can no longer be read") as caught:
        made.setup()
    assert caught.value.code == "dataset_unreadable"


# ======================================================================================
# LoRA files
# ======================================================================================


DRAWN: list[tuple[str, Json]] = [
    *((kind, {}) for kind in KINDS),
    ("sd15", {"train_text_encoder": True, "ema_decay": 0.5}),
    ("sd21", {"save_format": "diffusers", "lora_type": "dora", "lora_targets": "all"}),
    ("sd21v", {"zero_terminal_snr": True, "train_text_encoder": True, "save_format": "diffusers"}),
    ("sdxl", {"train_text_encoder": True, "lora_targets": "all", "prediction_type": "v_prediction"}),
    ("sdxl", {"train_text_encoder": True, "save_format": "diffusers", "use_rslora": True}),
]


@needs_torch
@pytest.mark.parametrize(
    ("kind", "extra"), DRAWN, ids=lambda value: value if isinstance(value, str) else "+".join(value)
)
def test_the_stock_pipeline_draws_the_same_image_from_the_file(
    tmp_path: Path, images: Path, models: Path, kind: str, extra: Json
) -> None:
    import numpy

    changes: Json = {
        "steps": 6,
        "validation_steps": 6,
        "lora_alpha": 2,
        "sample_prompts": ["a zorb"],
        "learning_rate": 3e-2,
        "text_encoder_learning_rate": 3e-2,
    }
    made = train(tmp_path, small(images, models / kind, tmp_path / "out", sample_steps=6, **changes | extra))
    ours = numpy.asarray(Image.open(tmp_path / "out/samples/step_6_0.png"), dtype=int)
    pipeline = load_pipeline(models / kind)
    settings = {"prediction_type": extra.get("prediction_type", pipeline.scheduler.config.prediction_type)}
    if extra.get("zero_terminal_snr"):
        settings |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **settings)
    side = made.plan.resolution

    def draw() -> Any:
        noise = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(42))
        settings = {"num_inference_steps": 6, "guidance_scale": 7.0, "height": side, "width": side, "latents": noise}
        return numpy.asarray(pipeline("a zorb", negative_prompt="", **settings).images[0], dtype=int)

    before = draw()
    pipeline.load_lora_weights(made.final_path)
    assert abs(before - ours).max() > 8, "the LoRA must matter for this test to mean anything"
    assert abs(draw() - ours).max() <= 2


def merged(weights: Json, base: Any, scale: float) -> Any:
    """A layer's weight with an adapter of kohya's or LyCORIS's layout on it, as ComfyUI and LyCORIS compute it."""
    weight = base.double()
    w = {name: value.double() for name, value in weights.items()}
    if "lokr_w1" in w:
        w2 = w["lokr_w2"] if "lokr_w2" in w else w["lokr_w2_a"] @ w["lokr_w2_b"]
        rank = w["lokr_w2_b"].shape[0] if "lokr_w2_b" in w else None
        w1 = w["lokr_w1"].reshape(*w["lokr_w1"].shape, *[1] * (w2.dim() - 2))
        return weight + torch.kron(w1, w2).reshape(weight.shape) * (scale / rank if rank else 1)
    down, up = w["lora_down.weight"], w["lora_up.weight"]
    changed = weight + (scale / down.shape[0]) * (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    if "dora_scale" in w:  # Liu et al. 2024: the norm is over all inputs of an output
        norm = changed.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
        assert w["dora_scale"].shape == norm.shape
        changed = w["dora_scale"] * changed / norm
    return changed


def write_as(made: trainer.LoRATrainer, style: str, path: Path) -> None:
    """Write what was trained in one of the formats."""
    made.config = dataclasses.replace(made.config, save_format=style)
    made.plan = dataclasses.replace(made.plan, config=made.config)
    made.write_lora(path)
    if style == "kohya":
        check_for_readers(shapes_of(path))


def apply_by_formula(made: trainer.LoRATrainer, path: Path, components: Json) -> None:
    """Merge a kohya file into a pipeline's components, every tensor of it."""
    modules: dict[str, Json] = {}
    for name, value in tensors_of(path).items():
        prefix, _, part = name.partition(".")
        modules.setdefault(prefix, {})[part] = value
    for layer in {key.rpartition("/")[0] for key in made.live}:
        part, _, name = layer.partition(".")
        weights = modules.pop(trainer.file_prefix("kohya", layer, made.plan.source))
        target = components[part].get_submodule(name.removeprefix("text_model." * (part == "text_encoder")))
        target.weight.data = merged(weights, target.weight.data, float(weights.pop("alpha"))).float()
    assert not modules


ADAPTERS: dict[str, Json] = {
    "lora": {},
    "dora": {"lora_type": "dora"},
    "lokr": {"lora_type": "lokr"},
    "lokr, rank 1": {"lora_type": "lokr", "lora_rank": 1},
}


@needs_torch
@pytest.mark.parametrize(
    ("kind", "adapter"),
    [*itertools.product(["sd15", "sd21", "sdxl"], ["lora", "dora", "lokr"]), ("sdxl", "lokr, rank 1")],
)
def test_a_file_that_is_read_back_has_the_trained_effect(
    tmp_path: Path, images: Path, models: Path, kind: str, adapter: str
) -> None:
    extra: Json = {"lora_targets": "all", "lora_alpha": 3, "train_text_encoder": True, "learning_rate": 3e-2}
    made = train(tmp_path, small(images, models / kind, tmp_path / "out", steps=3, **extra | ADAPTERS[adapter]))
    assert made.encoder
    batch = made.collate(0)
    inputs = (torch.randn(batch.mean.shape), torch.tensor([7, 700])[: len(batch.mean)], batch.context.detach())
    tokens = torch.arange(77)[None] + 5
    with torch.no_grad(), made.evaluating():
        ours = made.unet(*inputs, added_cond_kwargs=batch.conditions).sample
        texts = {row.folder: encoder(tokens)[0] for row, _, encoder in made.encoder.parts}
        plain = load_pipeline(models / kind).unet(*inputs, added_cond_kwargs=batch.conditions).sample
    for style in ("kohya", *["diffusers"] * (made.config.lora_type != "lokr")):
        write_as(made, style, path := tmp_path / f"{style}.safetensors")
        pipeline = load_pipeline(models / kind)
        components = {row.folder: getattr(pipeline, row.folder) for row, _, _ in made.encoder.parts}
        components["unet"] = pipeline.unet
        diffusers_reads = adapter == "lora" or style == "diffusers"
        pipeline.load_lora_weights(path) if diffusers_reads else apply_by_formula(made, path, components)
        with torch.no_grad():
            theirs = pipeline.unet(*inputs, added_cond_kwargs=batch.conditions).sample
            for name, expected in texts.items():
                torch.testing.assert_close(components[name](tokens)[0], expected, atol=2e-5, rtol=1e-5)
        difference = float((ours - theirs).abs().max() / (ours - plain).abs().max())
        reader = "diffusers" if diffusers_reads else "formula"
        print(f"{kind}, {adapter}, {style} format, read by {reader}: {difference:.1e} of the effect at most")
        assert difference < 1e-4


@needs_torch
@needs("lycoris")
@pytest.mark.parametrize(("kind", "adapter"), [*itertools.product(["sd15", "sd21"], ["lora", "dora", "lokr"])])
def test_lycoris_makes_the_trained_model_of_a_file(
    tmp_path: Path, images: Path, models: Path, kind: str, adapter: str
) -> None:
    """Another public loader, on every layer of the UNet and the text encoder."""
    lycoris: Any = importlib.import_module("lycoris.modules")
    changes: Json = {"lora_type": adapter, "lora_alpha": 3, "learning_rate": 3e-2, "train_text_encoder": True}
    made = train(tmp_path, small(images, models / kind, tmp_path / "out", steps=3, lora_targets="all", **changes))
    tensors, pipeline = tensors_of(made.final_path), load_pipeline(models / kind)
    plain = {part: getattr(pipeline, part) for part in ("unet", "text_encoder")}
    named = {f"lora_unet_{name.replace('.', '_')}": layer for name, layer in plain["unet"].named_modules()}
    for name, layer in plain["text_encoder"].named_modules():
        named[f"lora_te_text_model_{name.removeprefix('text_model.').replace('.', '_')}"] = layer
    for name in {key.partition(".")[0] for key in tensors}:
        algorithm, parts = lycoris.get_module(tensors, name)
        lycoris.make_module(algorithm, parts, name, named[name]).merge_to(1.0)
    batch, tokens = made.collate(0), torch.arange(77)[None] + 5
    with torch.no_grad(), made.evaluating():
        inputs = (batch.mean, torch.tensor([500] * len(batch.mean)), batch.context.detach())
        for part, values in {"unet": inputs, "text_encoder": (tokens,)}.items():
            ours, theirs = made.components[part](*values)[0], plain[part](*values)[0]
            before = getattr(load_pipeline(models / kind), part)(*values)[0]
            difference = float((ours - theirs).abs().max() / (ours - before).abs().max())
            print(f"{kind}, {adapter}, {part}, read by LyCORIS: {difference:.1e} of the effect at most")
            assert difference < 1e-3  # a text encoder's effect is near float32's last bits


FORMATS: list[tuple[str, Json]] = [
    ("sd15", {"lora_targets": "attention", "lora_alpha": 2}),
    ("sd15", {"lora_type": "dora", "lora_targets": "all", "train_text_encoder": True}),
    ("sdxl", {"train_text_encoder": True, "use_rslora": True}),
    ("sdxl", {"lora_type": "lokr"}),
    ("sd21", {"lora_type": "lokr", "lora_rank": 1}),
]


@needs_torch
@pytest.mark.parametrize(("kind", "changes"), FORMATS)
def test_a_run_starts_from_a_file_in_either_format_and_at_any_alpha(
    tmp_path: Path, images: Path, models: Path, kind: str, changes: Json
) -> None:
    first = train(tmp_path, small(images, models / kind, tmp_path / "first", **changes))
    formats = ["kohya", *["diffusers"] * (changes.get("lora_type") != "lokr")]
    for style in formats:
        path = tmp_path / f"{style}.safetensors"
        write_as(first, style, path)
        for alpha in (first.config.lora_alpha, 2.5):
            started = {"init_lora_path": str(path), "lora_alpha": alpha}
            made = prepare(tmp_path, small(images, models / kind, tmp_path / f"{style}{alpha}", **changes | started))
            ratio = trainer.adapter_scale(made.config) / trainer.adapter_scale(first.config)
            for key, weight in made.live.items():
                part = key.rpartition("/")[2]
                expected = first.live[key] / (ratio if part in ("lora_B", "lokr_w1") else 1)
                torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-5)


NOT_TO_START_FROM: dict[str, Json] = {
    "does not fit lora_rank 8": {"lora_rank": 8},
    "holds": {"lora_targets": "attention"},
    "lacks": {"lora_targets": "all"},
    "lacks ": {"train_text_encoder": True},
    "is of lora_type lora, not dora": {"lora_type": "dora"},
    "cannot be read": {"init_lora_path": "junk.safetensors"},
}


@needs_torch
@pytest.mark.parametrize("message", NOT_TO_START_FROM)
def test_a_file_that_does_not_fit_is_refused_before_anything_is_loaded(
    tmp_path: Path, images: Path, models: Path, message: str, starting_point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    changes = {"init_lora_path": str(starting_point)} | NOT_TO_START_FROM[message]
    monkeypatch.setattr(trainer, "load_component", lambda *_: pytest.fail("something was loaded"))
    with pytest.raises(trainer.TrainerError) as caught:
        prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", **changes))
    assert caught.value.code == "config_invalid"
    assert [problem["path"] for problem in caught.value.problems] == ["init_lora_path"]
    assert message.strip() in caught.value.problems[0]["message"]


def test_a_layer_of_a_file_fits_by_its_shapes_alone() -> None:
    def fits(shape: tuple[int, ...], rank: int = 4, **parts: tuple[int, ...]) -> bool:
        named = {name.replace("_weight", ".weight"): shape for name, shape in parts.items()}
        return trainer.fits(named, shape, rank)

    linear, convolution = (6, 10), (6, 10, 3, 3)
    assert fits(linear, lora_down_weight=(4, 10), lora_up_weight=(6, 4))
    assert fits(linear, lora_down_weight=(4, 10, 1, 1), lora_up_weight=(6, 4, 1, 1))  # of a 1x1 convolution
    assert fits(
        convolution, lora_A_weight=(4, 10, 3, 3), lora_B_weight=(6, 4, 1, 1), lora_magnitude_vector=(1, 6, 1, 1)
    )
    assert fits(linear, lora_down_weight=(4, 10), lora_up_weight=(6, 4), dora_scale=(6, 1))
    assert not fits(linear, lora_down_weight=(4, 10), lora_up_weight=(6, 4), dora_scale=(1, 10))
    assert not fits(linear, lora_down_weight=(4, 10), lora_up_weight=(4, 6))
    assert not fits(linear, lora_down_weight=(4, 10))
    assert not fits(linear, lora_down_weight=(), lora_up_weight=(6, 4))
    assert not fits(linear, rank=2, lora_down_weight=(4, 10), lora_up_weight=(6, 4))
    assert fits(linear, lokr_w1=(2, 2), lokr_w2=(3, 5))
    assert fits(convolution, lokr_w1=(2, 2), lokr_w2_a=(3, 4), lokr_w2_b=(4, 45))
    assert not fits(convolution, rank=2, lokr_w1=(2, 2), lokr_w2_a=(3, 4), lokr_w2_b=(4, 45))
    assert not fits(linear, lokr_w1=(2, 2), lokr_w2=(3, 6))


@needs_torch
def test_a_file_with_odd_values_is_refused(tmp_path: Path, images: Path, models: Path, starting_point: Path) -> None:
    import safetensors.torch

    good = tensors_of(starting_point)
    first = next(key for key in good if key.endswith("lora_up.weight"))
    alpha = first.replace("lora_up.weight", "alpha")
    odd: list[Json] = [
        {first: good[first] * math.nan},
        {alpha: torch.tensor([1.0, 2.0])},
        {alpha: torch.tensor(math.inf)},
    ]
    path = tmp_path / "odd.safetensors"
    for number, changes in enumerate(odd):
        safetensors.torch.save_file(good | changes, path)
        with pytest.raises(trainer.TrainerError) as caught:
            config = small(images, models / "sd15", tmp_path / str(number), init_lora_path=str(path))
            prepare(tmp_path, config)
        assert (caught.value.code, caught.value.problems[0]["path"]) == ("config_invalid", "init_lora_path")


@pytest.fixture(scope="session")
def starting_point(tmp_path_factory: pytest.TempPathFactory, images: Path, models: Path) -> Path:
    folder = tmp_path_factory.mktemp("start")
    return train(folder, small(images, models / "sd15", folder / "out", steps=1)).final_path


@needs_torch
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_alpha_scales_the_effect_as_alpha_over_rank(tmp_path: Path, images: Path, models: Path, kind: str) -> None:
    import safetensors.torch

    made = train(tmp_path, small(images, models / kind, tmp_path / "out", lora_rank=4, lora_alpha=2))
    name = next(key for key in made.live if key.endswith("to_q/lora_A")).removesuffix("/lora_A")
    down, up = made.live[f"{name}/lora_A"], made.live[f"{name}/lora_B"]
    name = name.removeprefix("unet.")
    tensors = tensors_of(made.final_path)
    for alpha in (2.0, 6.0):
        changed = tmp_path / f"{alpha}.safetensors"
        safetensors.torch.save_file(
            {key: torch.tensor(alpha) if key.endswith(".alpha") else value for key, value in tensors.items()}, changed
        )
        pipeline = load_pipeline(models / kind)
        layer = pipeline.unet.get_submodule(name)
        inputs = torch.randn(3, down.shape[1])
        before = layer(inputs)
        pipeline.load_lora_weights(changed)
        effect = pipeline.unet.get_submodule(name)(inputs) - before
        torch.testing.assert_close(effect, alpha / 4 * inputs @ down.T @ up.T, atol=1e-6, rtol=1e-4)


Layers = dict[str, tuple[int, ...]]  # a layer's name in a kohya file -> the shape of its weight


@dataclasses.dataclass(frozen=True)
class FullSize:
    """A family's real model, as its authors' config describes it."""

    widths: tuple[int, ...]  # of the UNet's levels
    depths: tuple[int, ...]  # transformer blocks at each level
    middle: int  # and between the two halves
    context: int  # width of the text
    encoders: dict[str, tuple[int, int]]  # prefix of the keys -> layers, width
    counts: tuple[int, ...]  # the UNet's layers for the targets attention, transformer, all; then each text encoder's
    weights: int  # of a checkpoint in one file, as published
    linear: bool = True  # the ends of a transformer; else convolutions
    original: bool = False  # keys number the UNet's blocks through, input_blocks_4_1_...
    taken_for: str = ""  # another family whose LoRAs look the same, by which readers know these


SD_TEXT, XL_TEXT = {"lora_te": (12, 768)}, {"lora_te1": (12, 768), "lora_te2": (32, 1280)}
FULL_SIZE = {  # CompVis v1-inference.yaml, Stability-AI v2-inference.yaml and sd_xl_base.yaml
    "sd15": FullSize((320, 640, 1280, 1280), (1, 1, 1, 0), 1, 768, SD_TEXT, (128, 192, 278, 72), 1131, linear=False),
    "sd21": FullSize(
        (320, 640, 1280, 1280), (1, 1, 1, 0), 1, 1024, {"lora_te": (23, 1024)}, (128, 192, 278, 138), 1228
    ),
    "sdxl": FullSize((320, 640, 1280), (0, 2, 10), 10, 2048, XL_TEXT, (560, 722, 788, 72, 192), 2515, original=True),
}


def unet_layers(size: FullSize) -> Layers:
    """Every layer of the UNet that a LoRA may hold, in the order in which data flows through them."""
    layers: Layers = {}
    now, skips, last = size.widths[0], [size.widths[0]], len(size.widths) - 1

    def name(diffusers_name: str, original_name: str) -> str:
        return f"lora_unet_{original_name if size.original else diffusers_name}"

    def resnet(place: str, inputs: int, width: int) -> None:
        names = ["in_layers_2", "out_layers_3", "emb_layers_1", "skip_connection"]
        names = names if size.original else ["conv1", "conv2", "time_emb_proj", "conv_shortcut"]
        shapes: list[tuple[int, ...]] = [(width, inputs, 3, 3), (width, width, 3, 3), (width, 4 * size.widths[0])]
        shapes += [(width, inputs, 1, 1)] if inputs != width else []
        layers.update({f"{place}_{part}": shape for part, shape in zip(names, shapes, strict=False)})

    def transformer(place: str, width: int, depth: int) -> None:
        square, kernel = (width, width), () if size.linear else (1, 1)
        layers.update({f"{place}_proj_{end}": (*square, *kernel) for end in ("in", "out") if depth})
        for block in (f"{place}_transformer_blocks_{number}" for number in range(depth)):
            layers.update({f"{block}_attn1_to_{part}": square for part in ("q", "k", "v", "out_0")})
            layers.update({f"{block}_attn2_to_{part}": square for part in ("q", "out_0")})
            layers.update({f"{block}_attn2_to_{part}": (width, size.context) for part in ("k", "v")})
            layers.update({f"{block}_ff_net_0_proj": (8 * width, width), f"{block}_ff_net_2": (width, 4 * width)})

    for level, (width, depth) in enumerate(zip(size.widths, size.depths, strict=True)):
        for layer in range(2):
            number = 3 * level + layer + 1
            resnet(name(f"down_blocks_{level}_resnets_{layer}", f"input_blocks_{number}_0"), now, width)
            transformer(name(f"down_blocks_{level}_attentions_{layer}", f"input_blocks_{number}_1"), width, depth)
            skips.append(now := width)
        if level < last:
            place = name(f"down_blocks_{level}_downsamplers_0_conv", f"input_blocks_{3 * level + 3}_0_op")
            layers[place] = (now, now, 3, 3)
            skips.append(now)
    for layer in range(2):
        resnet(name(f"mid_block_resnets_{layer}", f"middle_block_{2 * layer}"), now, now)
    transformer(name("mid_block_attentions_0", "middle_block_1"), now, size.middle)
    for level, (width, depth) in enumerate(zip(size.widths[::-1], size.depths[::-1], strict=True)):
        for layer in range(3):
            number = 3 * level + layer
            resnet(name(f"up_blocks_{level}_resnets_{layer}", f"output_blocks_{number}_0"), now + skips.pop(), width)
            transformer(name(f"up_blocks_{level}_attentions_{layer}", f"output_blocks_{number}_1"), width, depth)
            now = width
        if level < last:
            behind = f"output_blocks_{3 * level + 2}_{1 + bool(depth)}_conv"
            layers[name(f"up_blocks_{level}_upsamplers_0_conv", behind)] = (now, now, 3, 3)
    return layers


def text_layers(prefix: str, count: int, width: int) -> Layers:
    shapes: Layers = {f"self_attn_{part}_proj": (width, width) for part in ("q", "k", "v", "out")}
    shapes |= {"mlp_fc1": (4 * width, width), "mlp_fc2": (width, 4 * width)}
    every = itertools.product(range(count), shapes.items())
    return {f"{prefix}_text_model_encoder_layers_{number}_{part}": shape for number, (part, shape) in every}


def every_layer(size: FullSize) -> list[Layers]:
    """The layers of the UNet and of each text encoder."""
    return [unet_layers(size), *(text_layers(prefix, *encoder) for prefix, encoder in size.encoders.items())]


def unnumbered(layer: str) -> str:
    """A layer's name for a model of any depth."""
    return re.sub(r"(blocks|attentions|resnets|encoder_layers)_\d+", r"\1_n", layer)


KNOWN = {name: {unnumbered(layer) for part in every_layer(size) for layer in part} for name, size in FULL_SIZE.items()}

# What readers take, as their sources show it; facts, none of their code. A layer's tensors, beside its alpha, by kind
# of adapter: a letter is one size, wherever it stands.
LINEAR = {"lora_down.weight": "r i", "lora_up.weight": "o r"}
CONVOLUTION = {"lora_down.weight": "r i k k", "lora_up.weight": "o r 1 1"}
FORMS: dict[str, list[dict[str, str]]] = {
    "lora": [LINEAR, CONVOLUTION],
    "dora": [LINEAR | {"dora_scale": "o 1"}, CONVOLUTION | {"dora_scale": "o 1 1 1"}],
    "lokr": [{"lokr_w1": "a b", "lokr_w2": "c d"}, {"lokr_w1": "a b", "lokr_w2": "c d k k"}],
}
FORMS["lokr"].append({"lokr_w1": "a b", "lokr_w2_a": "c r", "lokr_w2_b": "r d"})


@dataclasses.dataclass(frozen=True)
class Reader:
    """Which names of a UNet's layers a program takes, and which kinds of adapter it reads wrongly."""

    source: str
    sd: str
    sdxl: str
    misread: dict[str, str] = dataclasses.field(default_factory=dict)


FROZEN, PER_INPUT = {"dora": "held against the frozen weight's norm"}, {"dora": "one magnitude per input"}
NO_LYCORIS = {"dora": "no magnitudes", "lokr": "nothing"}
READERS = {
    "ComfyUI": Reader("comfyanonymous: comfy/lora.py, comfy/weight_adapter/", "either", "either", FROZEN),
    "Forge": Reader("lllyasviel: backend/patcher/lora.py, packages_3rdparty/", "either", "either", FROZEN),
    "A1111": Reader("AUTOMATIC1111: extensions-builtin/Lora/network*.py", "either", "original", PER_INPUT),
    "InvokeAI": Reader("invokeai 6.14: backend/patches/", "diffusers", "either", PER_INPUT),
    "LyCORIS": Reader("lycoris_lora 4.1: kohya.py, modules/", "diffusers", "original"),
    "sd-scripts": Reader("kohya-ss: networks/lora.py", "diffusers", "original", NO_LYCORIS),
}


def layer_shape(kind: str, parts: Json) -> tuple[int, ...]:
    """Hold a layer's tensors against the forms of its kind; the shape of its weight, of a LoKr as a matrix."""
    for form in FORMS[kind]:
        letters = {part: named.split() for part, named in (form | {"alpha": ""}).items()}
        if {part: len(shape) for part, shape in parts.items()} == {part: len(named) for part, named in letters.items()}:
            pairs = [("1", 1), *(pair for part in parts for pair in zip(letters[part], parts[part], strict=True))]
            sizes = dict(pairs)
            assert all(sizes[letter] == size for letter, size in pairs), parts
            kernel = [sizes["k"]] * 2 if "k" in sizes else []
            if kind == "lokr":
                return (sizes["a"] * sizes["c"], math.prod([sizes["b"], sizes["d"], *kernel]))
            return (sizes["o"], sizes["i"], *kernel)
    raise AssertionError(f"no reader takes {parts}")


def check_for_readers(shapes: Json) -> Layers:
    """Hold a kohya file's tensors against what every reader takes; the layers that are in it."""
    layers: dict[str, Json] = {}
    for key, shape in shapes.items():
        layer, _, part = key.partition(".")
        layers.setdefault(layer, {})[part] = shape
    xl = any(re.match("lora_unet_(input|middle|output)_", name) for name in layers)
    unknown = {name for name in layers if unnumbered(name) not in KNOWN["sdxl" if xl else "sd15"]}
    layouts = ("original", "either") if xl else ("diffusers", "either")
    assert not unknown and all((reader.sdxl if xl else reader.sd) in layouts for reader in READERS.values())
    every = {part for parts in layers.values() for part in parts}
    kind = "lokr" if "lokr_w1" in every else "dora" if "dora_scale" in every else "lora"
    return {name: layer_shape(kind, parts) for name, parts in layers.items()}


def invokeai_base(shapes: Json) -> str | None:
    """The family as InvokeAI tells it (model_manager/configs/lora.py, util/model_util.py): by the first width it finds.

    Of LoKr it knows only what has two full matrices: something from rank 16 on, below only SDXL is told, by its depth.
    """
    for key, shape in sorted(shapes.items()):
        layer, _, part = key.partition(".")
        full = [shapes.get(f"{layer}.{name}", (0, 0))[1] for name in ("lokr_w1", "lokr_w2")]
        width = shape[1] if part == "lora_down.weight" else math.prod(full)
        if width and re.match(r"lora_te_.*_self_attn_|lora_unet_.*(_attn2_to_[kv]|time_emb_proj)$", layer):
            return {768: "sd15", 1024: "sd21", 1280: "sdxl", 2048: "sdxl"}.get(width)
    return "sdxl" if any(re.search(r"_transformer_blocks_([2-9]|\d\d)_", key) for key in shapes) else None


@needs_torch
@pytest.mark.parametrize(("name", "kind"), [*itertools.product(FULL_SIZE, FORMS)])
def test_full_size_files_have_every_layer_that_readers_know_and_no_other(
    tmp_path: Path, images: Path, name: str, kind: str
) -> None:
    family, size = next(family for family in trainer.FAMILIES if family.name == name), FULL_SIZE[name]
    settings: Json = {"lora_type": kind, "lora_rank": 16 if kind == "lokr" else 2, "train_text_encoder": True}
    config = parse(tmp_path, small(images, tmp_path, tmp_path / "out", lora_targets="all", **settings))
    components = {row.folder: full_size_encoder(row) for row in family.text_encoders} | {"unet": full_size_unet(family)}
    source = trainer.ModelSource("m", family, components["unet"].config, {}, {}, "epsilon")
    weights: Json = {}
    for part, pattern in trainer.trained_parts(config, family).items():
        weights |= trainer.add_adapter(part, components[part], config, pattern)
    for targets, with_text in itertools.product(("transformer", "all"), (False, True)):
        config = dataclasses.replace(config, lora_targets=targets, train_text_encoder=with_text)
        wanted = "|".join(rf"{part}\.{pattern}/.+" for part, pattern in trainer.trained_parts(config, family).items())
        chosen = {key: torch.zeros(weight.shape) for key, weight in weights.items() if re.fullmatch(wanted, key)}
        shapes = {key: tuple(tensor.shape) for key, tensor in trainer.file_tensors(chosen, config, source).items()}
        found = check_for_readers(shapes)
        kept = re.compile("" if targets == "all" else "_transformer_blocks_|_proj_(in|out)$")
        groups = every_layer(size)[: None if with_text else 1]
        groups[0] = {layer: shape for layer, shape in groups[0].items() if kept.search(layer)}
        expected = {layer: shape for group in groups for layer, shape in group.items()}
        missing, unexpected = expected.keys() - found.keys(), found.keys() - expected.keys()
        counts = [len(group.keys() & found.keys()) for group in groups]
        print(f"{name} {kind} {targets}: {counts}, {len(missing)} missing, {len(unexpected)} unexpected")
        assert not missing and not unexpected
        assert counts == [size.counts[[*trainer.TARGETS].index(targets)], *(size.counts[3:] if with_text else ())]
        lokr = {layer: (shape[0], math.prod(shape[1:])) for layer, shape in expected.items()}
        assert found == (lokr if kind == "lokr" else expected)
        assert invokeai_base(shapes) == (size.taken_for or name)


def a1111_version(header: dict[str, str]) -> str:
    """The family that A1111 shows and filters by (extensions-builtin/Lora/network.py)."""
    if header.get("ss_base_model_version", "").startswith("sdxl_"):
        return "SDXL"
    return "SD2" if header.get("ss_v2") == "True" else "SD1" if header else "Unknown"


def forge_version(header: dict[str, str]) -> str:
    """Forge's (extensions-builtin/sd_forge_lora/network.py): by the architecture too, else it is unknown."""
    architecture = header.get("modelspec.architecture")
    told = "SDXL" if architecture == "stable-diffusion-xl-v1-base/lora" else a1111_version(header)
    return told if told in ("SDXL", "SD2") or architecture == "stable-diffusion-v1/lora" else "Unknown"


@needs_torch
def test_the_header_tells_readers_what_it_is_and_nothing_private(tmp_path: Path, images: Path, models: Path) -> None:
    expected = {
        "sd15": ("stable-diffusion-v1/lora", "sd_v1", "False", "SD1"),
        "sd21": ("stable-diffusion-v2-512/lora", "sd_v2", "True", "SD2"),
        "sd21v": ("stable-diffusion-v2-768-v/lora", "sd_v2_v", "True", "SD2"),
        "sdxl": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False", "SDXL"),
    }
    for kind, (architecture, version, is_v2, shown) in expected.items():
        extra = {"metadata": {"title": "Zorb", "author": "me"}, "save_dtype": "fp16", "steps": 1}
        made = train(tmp_path, small(images, models / kind, tmp_path / kind, **extra))
        header = trainer.read_header(made.final_path)
        assert header["modelspec.architecture"] == architecture
        assert (header["ss_base_model_version"], header["ss_v2"]) == (version, is_v2)
        assert (a1111_version(header), forge_version(header)) == (shown, shown)
        assert header["modelspec.title"] == "Zorb"
        assert header["modelspec.trigger_phrase"] == "zorb"
        assert (header["ss_network_dim"], header["ss_network_alpha"]) == ("4", "4")
        assert json.loads(header["ss_tag_frequency"])["dataset"]["zorb"] == 5
        assert json.loads(header["train_lora.params"])["steps"] == 1
        data = made.final_path.read_bytes()
        import hashlib

        length = int.from_bytes(data[:8], "little")
        assert header["sshs_model_hash"] == hashlib.sha256(data[8 + length :]).hexdigest()
        assert str(tmp_path) not in json.dumps(header)
        dtypes = {key.rpartition(".")[2]: tensor.dtype for key, tensor in tensors_of(made.final_path).items()}
        assert dtypes == {"weight": torch.float16, "alpha": torch.float32}


@needs_torch
def test_a_token_that_was_pasted_into_a_caption_or_title_is_in_no_lora_file(
    tmp_path: Path, images: Path, models: Path
) -> None:
    token = "hf_" + "a1B2" * 9
    changes: Json = {"trigger_words": [f"zorb {token}"], "metadata": {"author": token}, "steps": 1}
    made = train(tmp_path, small(images, models / "sd15", tmp_path / "out", **changes))
    assert token.encode() not in made.final_path.read_bytes()
    again = make_trainer(tmp_path, small(images, models / "sd15", tmp_path / "out", **changes))
    assert again.setup() is True
    again.folder._lock.close()  # type: ignore[union-attr]


@needs_torch
def test_the_hashes_are_those_that_readers_compute_from_the_file(tmp_path: Path, images: Path, models: Path) -> None:
    import hashlib

    for rank, name in ((4, "small"), (64, "over 1 MiB")):
        changes = {"lora_rank": rank, "lora_targets": "all", "steps": 1}
        made = train(tmp_path, small(images, models / "sd15", tmp_path / name, **changes))
        data, header = made.final_path.read_bytes(), trainer.read_header(made.final_path)
        length = int.from_bytes(data[:8], "little")
        digest = hashlib.sha256(data[8 + length :]).hexdigest()
        assert (header["sshs_model_hash"], header["modelspec.hash_sha256"]) == (digest, f"0x{digest}")
        with made.final_path.open("rb") as file:
            file.seek(0x100000)
            assert header["sshs_legacy_hash"] == hashlib.sha256(file.read(0x10000)).hexdigest()[:8]
        assert (len(data) > 0x110000) is (rank == 64)
        assert made.is_finished(1)


@needs_torch
def test_a_thumbnail_is_the_newest_sample_and_only_where_it_is_wanted(
    tmp_path: Path, images: Path, models: Path
) -> None:
    for wanted in (False, True):
        (tmp_path / str(wanted) / "samples").mkdir(parents=True)
        (tmp_path / str(wanted) / "samples/step_best_0.png").touch()  # a user's, and no picture
        changes: Json = {"validation_steps": 1, "steps": 2, "metadata": {"thumbnail": "sample"} if wanted else {}}
        config = small(images, models / "sd15", tmp_path / str(wanted), **changes)
        header = trainer.read_header(train(tmp_path, config).final_path)
        assert ("modelspec.thumbnail" in header) is wanted
    kind, _, data = header["modelspec.thumbnail"].partition(",")
    assert kind == "data:image/jpeg;base64"
    Image.open(tmp_path / "True/samples/step_2_0.png").save(expected := io.BytesIO(), "JPEG", quality=85)
    assert base64.b64decode(data) == expected.getvalue()
    again = make_trainer(tmp_path, config)
    assert again.setup() is True, "a thumbnail does not make it unfinished"
    again.folder._lock.close()  # type: ignore[union-attr]
    credited = config | {"metadata": {"author": "A"}}
    assert trainer.read_header(train(tmp_path, credited).final_path)["modelspec.author"] == "A"
    assert prepare(tmp_path, config).is_finished(2) is False, "its header names an author that the config does not"


@needs_torch
def test_foreign_and_broken_samples_are_no_thumbnail_and_stop_no_save(
    tmp_path: Path, images: Path, models: Path
) -> None:
    changes: Json = {"validation_steps": 1, "steps": 1, "metadata": {"thumbnail": "sample"}}
    made = train(tmp_path, small(images, models / "sd15", tmp_path / "out", **changes))
    expected, good = made.thumbnail(), (made.folder.samples / "step_1_0.png").read_bytes()
    assert expected
    for name in ("step_abc_0", "step__0", "step_2_copy_0"):
        (made.folder.samples / f"{name}.png").write_bytes(good)
    (made.folder.samples / "step_7_0.png").write_bytes(b"no picture")
    (made.folder.samples / "step_8_0.png").write_bytes(good[:-200])
    (made.folder.samples / "step_9_0.png").mkdir()
    if hasattr(os, "mkfifo"):
        os.mkfifo(made.folder.samples / "step_10_0.png")
    assert made.thumbnail() == expected
    palette = Image.new("P", (9, 9))
    (made.folder.samples / "step_11_0.png").write_bytes(trainer.png_bytes(palette, {"run_id": made.run_id}))
    assert made.thumbnail() not in (None, expected), "a user's palette picture serves too"


MISTAKES: dict[str, Callable[[Json], Json]] = {  # what a bug in the writer might do to a file's tensors
    "alpha doubled": lambda tensors: {k: v * 2 if k.endswith("alpha") else v for k, v in tensors.items()},
    "up and down swapped": lambda tensors: {
        k.replace("lora_up", "x").replace("lora_down", "lora_up").replace("x", "lora_down"): v
        for k, v in tensors.items()
    },
    "alpha a quarter too large": lambda tensors: {
        k: v * 1.25 if k.endswith("alpha") else v for k, v in tensors.items()
    },
    "a layer left out": lambda tensors: {k: v for k, v in tensors.items() if "mid_block" not in k},
    "zeros": lambda tensors: {k: v if k.endswith("alpha") else v * 0 for k, v in tensors.items()},
    "another prefix": lambda tensors: {k.replace("lora_unet", "lora_net"): v for k, v in tensors.items()},
    "not finite": lambda tensors: {k: v * math.nan for k, v in tensors.items()},
}


@needs_torch
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_final_file_that_does_not_do_what_was_trained_is_an_error_and_costs_nothing(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    weak: Json = {"mixed_precision": "bf16", "learning_rate": 1e-5, "steps": 2}  # less than bf16's last bits
    real, config = trainer.file_tensors, small(images, models / "sd15", tmp_path / "out", **weak)
    made = prepare(tmp_path, config)
    assert made.train()
    monkeypatch.setattr(trainer, "file_tensors", lambda *rest: MISTAKES[mistake](real(*rest)))
    with pytest.raises(trainer.TrainerError, match="does not do what was trained") as caught:
        made.finish()
    made.folder._lock.close()  # type: ignore[union-attr]
    assert caught.value.code == "checkpoint_corrupt"
    assert not made.final_path.exists()
    monkeypatch.undo()
    train(tmp_path, config)
    assert made.final_path.exists()


@needs_torch
def test_a_lora_too_strong_for_fp16_is_read_back_all_the_same(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", steps=2))
    assert made.train()
    real, alpha = trainer.LoRATrainer.answer, "alpha doubled"
    layer = next(part for part in made.unet.modules() if hasattr(part, "lora_B"))

    def strongest(weights: Json) -> float:
        return max(float(weight.abs().max()) for key, weight in weights.items() if key.endswith("lora_B"))

    def overflowing(self: Any, weights: Json) -> Any:
        return real(self, weights) * (math.nan if strongest(weights) > limit and not layer.disable_adapters else 1)

    limit = strongest(made.live) / 10
    monkeypatch.setattr(trainer.LoRATrainer, "answer", overflowing)
    made.finish()
    assert made.final_path.exists() and "lora_too_strong" in warning_codes(made)
    writer = trainer.file_tensors
    monkeypatch.setattr(trainer, "file_tensors", lambda *rest: MISTAKES[alpha](writer(*rest)))
    with pytest.raises(trainer.TrainerError, match="does not do what was trained"):
        made.finish()
    made.folder._lock.close()  # type: ignore[union-attr]


@needs_torch
def test_no_file_has_the_final_name_before_it_was_read_back(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", steps=2)
    made = prepare(tmp_path, config)
    assert made.train()

    def killed(self: Any, path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.LoRATrainer, "check_file", killed)
        made.finish()
    made.folder._lock.close()  # type: ignore[union-attr]
    assert not made.final_path.exists()
    again = train(tmp_path, config)
    assert any("read back" in str(event.get("message")) for event in emitted(again, "info"))
    assert again.final_path.exists() and not [*again.folder.path.glob("*.tmp"), *again.folder.path.glob(".*.tmp")]


FP16_FILE = {"save_dtype": "fp16"}
READ_BACK: list[tuple[str, Json]] = [
    ("sd15", {"train_text_encoder": True, "save_dtype": "bf16", "lora_type": "dora"}),
    ("sd15", {"mixed_precision": "bf16", "save_dtype": "fp16", "learning_rate": 1e-7}),  # next to no effect
    ("sd15", {"save_format": "diffusers", "use_rslora": True, "lora_alpha": 2, "ema_decay": 0.5}),
    ("sd15", {"lora_type": "lokr", "lora_alpha": 3, "mixed_precision": "bf16", "learning_rate": 1e-4, **FP16_FILE}),
    ("sdxl", {"lora_type": "lokr", "lora_targets": "all", "save_dtype": "fp16", "lora_dropout": 0}),
]


@needs_torch
@pytest.mark.parametrize(("kind", "changes"), READ_BACK)
def test_every_final_file_is_read_back_and_its_effect_told(
    tmp_path: Path, images: Path, models: Path, kind: str, changes: Json
) -> None:
    made = train(tmp_path, small(images, models / kind, tmp_path / "out", steps=2, **changes))
    told = [event["message"] for event in emitted(made, "info") if "read back" in event["message"]]
    assert len(told) == 1
    print(kind, changes, told[0])


# ======================================================================================
# checkpoints
# ======================================================================================


@needs_torch
def test_a_state_reads_back_bit_by_bit_and_a_damaged_one_is_noticed(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(7.0), "c": torch.randn(5).bfloat16()}
    path = tmp_path / "state.safetensors"
    data = trainer.encode_state(tensors, {"run_id": "x", "number": 0.1})
    path.write_bytes(data)
    back, record = trainer.decode_state(path)
    assert record == {"run_id": "x", "number": 0.1}
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    for damaged in (data[:-1], data[:50], b"", data[:-1] + bytes([data[-1] ^ 1]), data.replace(b"0.1", b"0.2")):
        path.write_bytes(damaged)
        with pytest.raises(ValueError):
            trainer.decode_state(path)


RESUMED: list[Json] = [
    {},
    {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
    {"lora_dropout": 0.3, "batch_size": 1},
    {"gradient_checkpointing": True},
    {"mixed_precision": "bf16"},
    {
        "caption_dropout": 0.3,
        "random_flip": True,
        "shuffle_tags": True,
        "max_caption_tokens": 150,
        "repeats": 2,
        "masked_loss": True,
        "validation_split": 0.2,
        "validation_steps": 3,
        "prior_loss_weight": 0.5,
    },
]
# Each optimizer and each kind of adapter, with samples in between from averaged weights: (model, settings, package).
RESUMED_ALSO: list[tuple[str, Json, str]] = [
    ("sd15", {"optimizer": "adamw8bit", "lora_type": "dora", "lora_rank": 64}, "bitsandbytes"),
    ("sd15", {"optimizer": "adafactor", "lora_type": "lokr", "validation_steps": 3}, "transformers"),
    ("sd15", {"optimizer": "prodigy", "train_text_encoder": True, "lora_dropout": 0.2}, "prodigyopt"),
    ("sd15", {"optimizer": "lion", "ema_decay": 0.8, "validation_steps": 3, "noise_offset": 0.1}, "lion_pytorch"),
    ("sd15", {"optimizer": "schedulefree_adamw", "lora_targets": "all", "validation_steps": 3}, "schedulefree"),
    ("sdxl", {"train_text_encoder": True, "ema_decay": 0.8, "mixed_precision": "bf16", "snr_gamma": 5}, "torch"),
    ("sdxl", {"quantize_base": "nf4", "lora_type": "dora", "validation_steps": 3}, "bitsandbytes"),
    ("sd15", {"quantize_base": "nf4", "mixed_precision": "bf16", "lora_dropout": 0.2}, "bitsandbytes"),
]
TESTED = {changes.get("optimizer", "adamw") for _, changes, _ in RESUMED_ALSO}
RESUMED_ALSO += [
    ("sd15", {"optimizer": name}, row.module.partition(".")[0])
    for name, row in trainer.OPTIMIZERS.items()
    if name not in TESTED
]


@needs_torch
@pytest.mark.parametrize(
    ("kind", "changes"), [*(("sd15", changes) for changes in RESUMED), ("sdxl", RESUMED[1]), ("sdxl", RESUMED[-1])]
)
def test_resuming_is_exact(tmp_path: Path, images: Path, models: Path, kind: str, changes: Json) -> None:
    if "prior_loss_weight" in changes:
        prior = save_picture(tmp_path / "prior/1_blob/a.png", Image.new("RGB", (64, 64), "red"))
        changes = changes | {"regularization_path": str(prior.parent.parent), "cache_dir": str(tmp_path / "cache")}
    config = small(images, models / kind, tmp_path / "whole", steps=8, **changes)
    whole = train(tmp_path, config)
    config["output_path"] = str(tmp_path / "parts")
    for polls in (3, 4):
        torch.manual_seed(polls)  # what was drawn before must not matter
        train(tmp_path, config, stop=Quiet(after=polls))
    parts = train(tmp_path, config)
    assert emitted(parts, "validation") == emitted(whole, "validation")[-len(emitted(parts, "validation")) or 9 :]
    assert parts.state.step == 8
    assert parts.state.losses == whole.state.losses
    assert_same_tensors(parts.final_path, whole.final_path)
    state = "checkpoints/state_step_8.safetensors"
    assert_same_tensors(tmp_path / "parts" / state, tmp_path / "whole" / state)


@needs_torch
@pytest.mark.parametrize(("kind", "changes", "package"), RESUMED_ALSO)
def test_every_optimizer_and_adapter_resumes_exactly(
    tmp_path: Path, images: Path, models: Path, kind: str, changes: Json, package: str
) -> None:
    pytest.importorskip(package)
    test_resuming_is_exact(tmp_path, images, models, kind, changes)
    records = [
        trainer.decode_state(tmp_path / place / "checkpoints/state_step_8.safetensors")[1]
        for place in ("whole", "parts")
    ]
    assert records[0]["optimizer"] == records[1]["optimizer"]
    if changes.get("validation_steps"):  # what samples and validation borrow goes back as it was
        plain = changes | {"validation_steps": 0}
        quiet = train(tmp_path, small(images, models / kind, tmp_path / "quiet", steps=8, **plain))
        assert_same_tensors(quiet.final_path, tmp_path / "whole/lora_final.safetensors")


@needs_torch
def test_a_state_does_not_bring_the_kernels_of_another_device(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", steps=6)
    train(tmp_path, config, stop=Quiet(after=3))
    resumed = prepare(tmp_path, config)
    point = resumed.find_point()
    assert point
    for group in resumed.optimizer.param_groups:
        group["fused"] = True  # as on a GPU; the state is of a CPU
    resumed.restore(point)
    assert [group["fused"] for group in resumed.optimizer.param_groups] == [True]


@needs_torch
def test_a_damaged_state_falls_back_to_the_one_before(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=2)
    whole = train(tmp_path, config | {"output_path": str(tmp_path / "whole")})
    train(tmp_path, config, stop=Quiet(after=6))
    states = sorted((tmp_path / "out/checkpoints").glob("state_*"))
    assert [path.name for path in states] == ["state_step_2.safetensors", "state_step_4.safetensors"]
    (tmp_path / "out/lora_final.safetensors").unlink()
    states[1].write_bytes(states[1].read_bytes()[:-7])
    resumed = train(tmp_path, config)
    assert warning_codes(resumed).count("checkpoint_corrupt") == 1
    assert_same_tensors(resumed.final_path, whole.final_path)
    for path in (tmp_path / "out/checkpoints").glob("state_*"):
        path.write_bytes(b"junk")
    with pytest.raises(trainer.TrainerError) as caught:
        prepare(tmp_path, config)
    assert caught.value.code == "checkpoint_corrupt"


def damage(data: bytes, step: int) -> Iterator[bytes]:
    """Every `step`-th way to flip one bit or to cut the end off."""
    for bit in range(0, len(data) * 8, step):
        flipped = bytearray(data)
        flipped[bit // 8] ^= 1 << bit % 8
        yield bytes(flipped)
    for length in range(0, len(data), step):
        yield data[:length]


def check_damage(tmp_path: Path, images: Path, models: Path, step: int) -> int:
    """Damage the newer of two states in many ways: each time the other one is found, or the whole of this one."""
    config = small(images, models / "sd15", tmp_path / "out", lora_rank=1, lora_targets="attention")
    made = prepare(tmp_path, config, stop=Quiet(after=3))
    assert not made.train()
    for number in (3, 2):
        made.state = dataclasses.replace(made.state, step=number)
        made.save()
    newest = made.folder.checkpoints / "state_step_3.safetensors"
    (tensors, record), data = trainer.decode_state(newest), newest.read_bytes()
    warnings: list[str] = []

    def find() -> trainer.ResumePoint:
        warnings.clear()
        states = trainer.numbered(made.folder.checkpoints, "state_step")
        found = trainer.find_resume_point(states, made.run_id, lambda code, *_: warnings.append(code))
        assert found
        return found

    tried = 0
    for damaged in damage(data, step):
        newest.write_bytes(damaged)
        found = find()
        if found.path == newest:  # what a reader needs is all there: a copy of the run's id was hit
            assert found.record == record
            assert all(torch.equal(found.tensors[name], tensor) for name, tensor in tensors.items())
        else:
            assert (found.state.step, warnings) == (2, ["checkpoint_corrupt"])
        tried += 1
    newest.unlink()
    assert find().state.step == 2
    return tried


@needs_torch
def test_a_flipped_bit_or_a_cut_falls_back_to_the_older_state(tmp_path: Path, images: Path, models: Path) -> None:
    assert check_damage(tmp_path, images, models, step=997) > 500


FILE_SYSTEM_MODULES = ("posix", "nt", "_io")


def kill_in_save(made: trainer.LoRATrainer, number: int) -> bool:
    """Save in a copy of this process that is killed at its `number`-th call into the file system; False: it ended."""
    child = os.fork()
    if not child:
        calls = 0

        def count(_: Any, event: str, called: Any) -> None:
            nonlocal calls
            module = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
            if event == "c_call" and module in FILE_SYSTEM_MODULES:
                calls += 1
                if calls == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.setprofile(count)
        with contextlib.suppress(BaseException):
            made.save()
            os._exit(0)
        os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@posix
@needs_torch
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_at_any_call_of_a_save_leaves_a_good_state_and_its_lora(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=1, checkpoint_limit=2, steps=3)
    made = prepare(tmp_path, config)
    assert made.train()
    made.state = dataclasses.replace(made.state, step=4)
    before = tmp_path / "before"
    shutil.copytree(tmp_path / "out", before)
    found = set()
    number = 1
    while kill_in_save(made, number):
        states = trainer.numbered(made.folder.checkpoints, "state_step")
        point = trainer.find_resume_point(states, made.run_id, lambda *w: pytest.fail(str(w)))
        assert point
        found.add(point.state.step)
        loras = trainer.numbered(made.folder.checkpoints, "lora_step")
        assert len(loras) >= 2
        assert all(trainer.written_by(path) == made.run_id for _, path in loras)
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(before, tmp_path / "out")
        number += 1
    assert number > 40
    assert found == {3, 4}


@needs_torch
def test_a_fall_back_keeps_what_it_saves(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", steps=8, checkpoint_steps=2, checkpoint_limit=1)
    stopped = train(tmp_path, config, stop=Quiet(after=6))
    checkpoints = stopped.folder.checkpoints
    shutil.copy(checkpoints / "state_step_6.safetensors", checkpoints / "state_step_7.safetensors")
    for step in (6, 7):
        state = checkpoints / f"state_step_{step}.safetensors"
        state.write_bytes(state.read_bytes()[:-1] + b"?")
    made = prepare(tmp_path, config, stop=Quiet(after=1))
    assert made.stop.saved.step == 4
    assert not made.train()
    made.save()
    assert all(Path(str(path)).exists() for path in (made.stop.saved.path, made.stop.saved.state_path))
    good = [path.name for _, path in trainer.numbered(checkpoints, "state_step") if is_good(path)]
    assert good == ["state_step_5.safetensors", "state_step_4.safetensors"]
    made.folder._lock.close()  # type: ignore[union-attr]
    train(tmp_path, config)
    assert all(is_good(path) for _, path in trainer.numbered(checkpoints, "state_step"))


def is_good(state: Path) -> bool:
    try:
        return bool(trainer.decode_state(state))
    except ValueError:
        return False


@needs_torch
def test_other_settings_do_not_resume_but_more_steps_do(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", lora_alpha=4, checkpoint_steps=2)
    train(tmp_path, config)
    with pytest.raises(trainer.TrainerError) as caught:
        prepare(tmp_path, config | {"lora_rank": 8, "seed": 7})
    assert caught.value.code == "resume_mismatch"
    assert {item["path"] for item in caught.value.problems} == {"lora_rank", "seed"}
    longer = train(tmp_path, config | {"steps": 6, "sample_prompts": ["new"], "log_steps": 2})
    assert [event["step"] for event in emitted(longer, "progress")] == [6]
    straight = train(tmp_path, config | {"steps": 6, "output_path": str(tmp_path / "straight")})
    assert_same_tensors(longer.final_path, straight.final_path)
    assert trainer.read_header(longer.final_path)["ss_steps"] == "6"


@needs_torch
def test_more_steps_under_a_decaying_schedule_warn(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", lr_scheduler="cosine", lr_warmup_steps=1)
    train(tmp_path, config, stop=Quiet(after=2))
    assert "schedule_stretched" not in warning_codes(train(tmp_path, config, stop=Quiet(after=1)))
    assert "schedule_stretched" in warning_codes(train(tmp_path, config | {"steps": 9}))


@needs_torch
def test_five_interruptions_change_no_rate_no_loss_and_no_bit(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sdxl", tmp_path / "whole", steps=12, lr_scheduler="cosine", lr_warmup_steps=4)
    whole = train(tmp_path, config)
    config["output_path"] = str(tmp_path / "parts")
    parts = [train(tmp_path, config, stop=Quiet(after=2)) for _ in range(5)] + [train(tmp_path, config)]
    progress = [event for part in parts for event in emitted(part, "progress")]
    same = ("step", "loss", "loss_avg", "learning_rate", "grad_norm", "epoch", "percent")
    expected = emitted(whole, "progress")
    assert [[event[key] for key in same] for event in progress] == [[event[key] for key in same] for event in expected]
    assert_same_tensors(parts[-1].final_path, whole.final_path)
    state = "checkpoints/state_step_12.safetensors"
    assert_same_tensors(tmp_path / "parts" / state, tmp_path / "whole" / state)


@needs_torch
def test_fresh_starts_over_and_removes_the_old_run_after_its_first_save(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=2, validation_steps=2)
    first = train(tmp_path, config | {"sample_prompts": ["a", "b"], "output_name": "old"})
    mine = tmp_path / "out/samples/step_by_step.png"
    draw_image(mine, (64, 64))
    kept = [tmp_path / "out/my_best.safetensors", tmp_path / "out/keep/lora_final.safetensors"]
    for copy in kept:
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(first.final_path, copy)
    checkpoints = tmp_path / "out/checkpoints"
    broken = small(images, copy_model(models / "sd15", tmp_path / "broken"), tmp_path / "out")
    (tmp_path / "broken/tokenizer/vocab.json").unlink()
    with pytest.raises(trainer.TrainerError):
        prepare(tmp_path, broken, fresh=True)
    assert trainer.read_run(tmp_path / "out/config.json")["run_id"] == first.run_id
    fresh = prepare(tmp_path, config | {"lora_rank": 2, "checkpoint_steps": 3}, fresh=True)
    assert (checkpoints / "state_step_4.safetensors").exists()
    assert fresh.train()
    fresh.finish()
    names = {
        path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*") if path.is_file()
    }
    assert names == {
        ".lock",
        "config.json",
        "report.html",
        "my_best.safetensors",
        "keep/lora_final.safetensors",
        "lora_final.safetensors",
        *(f"checkpoints/{name}.safetensors" for name in ("lora_step_3", "state_step_3", "state_step_4")),
        *(f"samples/{name}.png" for name in ("step_2_0", "step_4_0", "step_by_step")),
    }
    assert trainer.written_by(checkpoints / "state_step_4.safetensors") == fresh.run_id


@needs_torch
def test_a_fresh_run_that_is_killed_before_its_first_save_still_replaces_the_old_one(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=3)
    first = train(tmp_path, config)
    for _ in range(2):
        killed = prepare(tmp_path, config, fresh=True)
        killed.folder._lock.close()  # type: ignore[union-attr]
    again = prepare(tmp_path, config)
    assert (again.run_id, again.state.step) == (killed.run_id, 0)
    assert trainer.written_by(first.final_path) == first.run_id
    assert again.train()
    again.finish()
    wrote = {trainer.written_by(path) for path in (tmp_path / "out").rglob("*.safetensors")}
    assert wrote == {again.run_id}
    assert trainer.read_run(tmp_path / "out/config.json") == {"run_id": again.run_id, "replaces": []}


@needs_torch
def test_fresh_replaces_a_run_whose_states_or_config_are_broken(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=2)
    old = train(tmp_path, config)
    (tmp_path / "out/config.json").unlink()
    broken = old.folder.checkpoints / "state_step_9.safetensors"
    broken.write_bytes(b"junk")
    prepare(tmp_path, config, fresh=True).folder._lock.close()  # type: ignore[union-attr]
    again = train(tmp_path, config)
    assert len(emitted(again, "progress")) == 4
    wrote = {trainer.written_by(path) for path in (tmp_path / "out").rglob("*.safetensors")}
    assert wrote == {again.run_id, None}


@needs_torch
def test_states_of_another_run_are_not_passed_over_in_silence(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=2)
    train(tmp_path, config)
    write_json(tmp_path / "out/config.json", {"run_id": "another"})
    made = prepare(tmp_path, config)
    assert "states_ignored" in warning_codes(made)


@needs_torch
def test_a_state_that_may_not_be_read_is_not_called_corrupt(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=2)
    train(tmp_path, config, stop=Quiet(after=3))

    def forbidden(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "read_bytes", forbidden)
    folder = trainer.OutputFolder(tmp_path / "out")
    with pytest.raises(trainer.TrainerError, match="Permission denied") as caught:
        trainer.find_resume_point(trainer.numbered(folder.checkpoints, "state_step"), None, lambda *_: None)
    assert caught.value.code == "output_not_writable"


@needs_torch
def test_a_final_lora_that_is_damaged_or_wanted_otherwise_is_written_again(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = small(images, models / "sd15", tmp_path / "out")
    good = train(tmp_path, config).final_path
    tensors = {name: tensor.clone() for name, tensor in tensors_of(good).items()}  # else mapped from the file
    good.write_bytes(good.read_bytes()[:-1] + b"x")
    train(tmp_path, config)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in tensors_of(good).items())
    half = train(tmp_path, config | {"save_dtype": "bf16", "metadata": {"title": "Zorb"}})
    assert trainer.read_header(half.final_path)["modelspec.title"] == "Zorb"
    assert {tensor.dtype for tensor in tensors_of(half.final_path).values()} == {torch.bfloat16, torch.float32}


@needs_torch
def test_files_of_another_run_are_left_alone_without_fresh(tmp_path: Path, images: Path, models: Path) -> None:
    other = train(tmp_path, small(images, models / "sd15", tmp_path / "other", checkpoint_steps=2))
    copied = tmp_path / "out/checkpoints/lora_step_77.safetensors"
    copied.parent.mkdir(parents=True)
    shutil.copy(other.final_path, copied)
    shutil.copy(other.final_path, tmp_path / "out/lora_final.safetensors")
    train(tmp_path, small(images, models / "sd15", tmp_path / "out", checkpoint_steps=1), stop=Quiet(after=2))
    assert copied.exists()
    assert (tmp_path / "out/lora_final.safetensors").exists()


@needs_torch
def test_what_a_kill_prevented_at_the_resumed_step_is_made_then(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=2, validation_steps=2)
    train(tmp_path, config, stop=Quiet(after=20))
    (tmp_path / "out/lora_final.safetensors").unlink(missing_ok=True)
    late = [tmp_path / "out" / name for name in ("checkpoints/lora_step_4.safetensors", "samples/step_4_0.png")]
    for path in late:
        path.unlink(missing_ok=True)
    train(tmp_path, config)
    assert all(path.exists() for path in late)


@needs_torch
def test_a_model_that_was_replaced_does_not_resume(tmp_path: Path, images: Path, models: Path) -> None:
    model = copy_model(models / "sd15", tmp_path / "model")
    config = small(images, model, tmp_path / "out", resolution=64)
    train(tmp_path, config, stop=Quiet(after=2))
    shutil.rmtree(model)
    copy_model(models / "sd21", model)
    with pytest.raises(trainer.TrainerError) as caught:
        prepare(tmp_path, config)
    assert caught.value.code == "resume_mismatch"
    assert [item["path"] for item in caught.value.problems] == ["unet"]
    shutil.rmtree(model)
    copy_model(models / "sd15", model)
    write_json(model / "scheduler/scheduler_config.json", SCHEDULER | {"beta_end": 0.02})
    with pytest.raises(trainer.TrainerError) as caught:
        prepare(tmp_path, config)
    assert [item["path"] for item in caught.value.problems] == ["scheduler"]


@needs_torch
def test_a_base_with_other_weights_of_the_same_shapes_is_told(tmp_path: Path, images: Path, models: Path) -> None:
    import safetensors.torch

    model = copy_model(models / "sd15", tmp_path / "model")
    train(tmp_path, small(images, model, tmp_path / "out", steps=2))
    same = prepare(tmp_path, small(images, model, tmp_path / "out", steps=3))
    same.folder._lock.close()  # type: ignore[union-attr]
    path = model / "unet/diffusion_pytorch_model.safetensors"
    safetensors.torch.save_file({key: value * 1.5 for key, value in tensors_of(path).items()}, path)
    other = prepare(tmp_path, small(images, model, tmp_path / "out", steps=3))
    told = ["base_model_changed" in warning_codes(made) for made in (same, other)]
    assert told == [False, True]
    other.folder._lock.close()  # type: ignore[union-attr]
    moved = copy_model(models / "sd15", tmp_path / "moved")
    there = prepare(tmp_path, small(images, moved, tmp_path / "out", steps=3))
    assert there.state.step == 2 and "base_model_changed" not in warning_codes(there)
    there.folder._lock.close()  # type: ignore[union-attr]
    elsewhere = copy_model(model, tmp_path / "elsewhere")
    with pytest.raises(trainer.TrainerError, match="base_model") as caught:
        prepare(tmp_path, small(images, elsewhere, tmp_path / "out", steps=3))
    assert caught.value.code == "resume_mismatch"


@needs_torch
def test_a_lost_config_json_loses_no_run(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out")
    stopped = train(tmp_path, config, stop=Quiet(after=2))
    (tmp_path / "out/config.json").write_text("{")
    again = train(tmp_path, config)
    assert again.run_id == stopped.run_id == trainer.read_run(tmp_path / "out/config.json")["run_id"]
    assert len(emitted(again, "progress")) == 2


@needs_torch
def test_the_last_lora_is_named_after_an_autosave_too(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", autosave_minutes=1e-9, checkpoint_steps=2)
    made = prepare(tmp_path, config, stop=Quiet(after=3))
    assert not made.train()
    lora = str(made.lora_path(2))
    assert made.stop.saved == trainer.SavedFiles(3, lora, str(made.folder.checkpoints / "state_step_3.safetensors"))
    made.folder._lock.close()  # type: ignore[union-attr]
    assert prepare(tmp_path, config).stop.saved == made.stop.saved


@needs_torch
def test_checkpoint_limit_keeps_the_newest(tmp_path: Path, images: Path, models: Path) -> None:
    train(tmp_path, small(images, models / "sd15", tmp_path / "out", checkpoint_steps=1, checkpoint_limit=2))
    names = {path.name for path in (tmp_path / "out/checkpoints").iterdir()}
    assert names == {f"{stem}_step_{step}.safetensors" for stem in ("lora", "state") for step in (3, 4)}


@needs_torch
def test_another_thread_count_is_said_when_resuming(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out")
    train(tmp_path, config, stop=Quiet(after=2))
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        made = prepare(tmp_path, config)
    finally:
        torch.set_num_threads(threads)
    assert "resume_not_exact" in warning_codes(made)


# ======================================================================================
# samples
# ======================================================================================


@needs_torch
def test_samples_do_not_touch_the_training(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "without", lora_dropout=0.2)
    without = train(tmp_path, config)
    sampled = {"output_path": str(tmp_path / "with"), "validation_steps": 1, "sample_at_start": True}
    with_samples = train(tmp_path, config | sampled)
    assert [event["step"] for event in emitted(with_samples, "sample")] == [0, 1, 2, 3, 4]
    assert_same_tensors(without.final_path, with_samples.final_path)
    assert with_samples.state.losses == without.state.losses


# ======================================================================================
# tracking
# ======================================================================================


@needs_torch
@needs("tensorboard")
def test_tensorboard_shows_what_the_events_say_also_after_a_resume(tmp_path: Path, images: Path, models: Path) -> None:
    changes: Json = {"report_to": ["tensorboard"], "validation_split": 0.2, "validation_steps": 2, "steps": 6}
    config = small(images, models / "sd15", tmp_path / "out", train_text_encoder=True, **changes)
    made = train(tmp_path, config, stop=Quiet(after=3))
    made.trackers.close()
    resumed = train(tmp_path, config)
    resumed.trackers.close()
    reader: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    shown = reader.EventAccumulator(str(tmp_path / "out/tensorboard"), purge_orphaned_data=False).Reload()
    told = [*emitted(made, "progress"), *emitted(resumed, "progress")]
    for tag, values in {
        "progress/loss": [event["loss"] for event in told],
        "progress/learning_rate/text_encoder": [5e-5] * 6,
        "progress/grad_norm": [event["grad_norm"] for event in told],
        "validation/loss": [event["loss"] for event in (*emitted(made, "validation"), *emitted(resumed, "validation"))],
    }.items():
        scalars = {scalar.step: scalar.value for scalar in shown.Scalars(tag)}
        assert list(scalars.values()) == pytest.approx(values, rel=1e-6)
    drawn = shown.Images("samples/0")
    assert [image.step for image in drawn] == [2, 4, 6]
    assert Image.open(io.BytesIO(drawn[-1].encoded_image_string)).size == (64, 64)


@needs_torch
@needs("wandb")
def test_wandb_keeps_offline_what_the_events_say(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    changes: Json = {"report_to": ["wandb"], "validation_steps": 4, "dataset_path": str(images)}
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", **changes))
    result = run("--config", config)
    assert (result.code, result.last["type"]) == (0, "complete")
    assert not result.of("warning") or "tracking_failed" not in {event["code"] for event in result.of("warning")}
    logged_run = next((tmp_path / "out/wandb").glob("offline-run-*"))
    summary = next(logged_run.glob("run-*.wandb")).read_bytes()
    assert b"progress/loss_avg" in summary and b"learning_rate/unet" in summary
    assert str(tmp_path).encode() not in summary.replace(str(tmp_path / "out").encode(), b"")
    assert len(list(logged_run.glob("files/media/images/samples/*.png"))) == 1


@needs_torch
def test_a_tracker_that_fails_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Failing:
        def __init__(self, *_: Any) -> None:
            self.calls = 0

        def scalars(self, step: int, values: Any) -> None:
            raise ConnectionError("no network")

        def close(self) -> None: ...

    def absent(*_: Any) -> None:
        raise OSError("no account")

    monkeypatch.setattr(trainer, "TRACKER_OF", {"tensorboard": Failing, "wandb": absent})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))
    made = train(tmp_path, small(images, models / "sd15", tmp_path / "out", report_to=["tensorboard", "wandb"]))
    assert made.final_path.exists()
    told = [event["message"] for event in emitted(made, "warning") if event["code"] == "tracking_failed"]
    assert [message.rpartition(": ")[2] for message in told] == ["no account", "no network"]


# ======================================================================================
# report
# ======================================================================================


class Logger(Recorder):
    """A recorder that writes events.jsonl too."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.emit("start")

    def emit(self, event_type: str, **fields: Any) -> None:
        super().emit(event_type, **fields)
        with self.path.open("a") as file:
            file.write(json.dumps(self.events[-1]) + "\n")

    def info(self, message: str, phase: str | None = None, **fields: Any) -> None:
        self.emit("info", message=message, phase=phase or "", **fields)


def make_reporting(tmp_path: Path, config: Json, **options: Any) -> trainer.LoRATrainer:
    made = make_trainer(tmp_path, config, **options)
    made.events = Logger(made.folder.path / "events.jsonl")
    made.stop.conclude = lambda: None  # type: ignore[method-assign]
    return made


def report_of(tmp_path: Path, config: Json, **options: Any) -> Page:
    """Run in this process, to the end or to a stop, and read its page."""
    made = make_reporting(tmp_path, config, **options)
    made.run()
    made.folder._lock.close()  # type: ignore[union-attr]
    return Page(made.folder.path / "report.html")


class Page(html.parser.HTMLParser):
    """A page that was read strictly: its texts by element, links, pictures; every element is closed in its turn."""

    VOID = ("meta", "img", "br")

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.open = path.read_text("utf-8"), list[str]()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: dict[str, list[str]] = collections.defaultdict(list)
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        self.open += [] if tag in self.VOID else [tag]
        self.texts[tag].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        assert tag == "path"  # of an SVG
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        for tag in set(self.open):
            self.texts[tag][-1] += data

    def of(self, tag: str, name: str) -> list[str]:
        return [value for owner, key, value in self.attributes if (owner, key) == (tag, name)]

    @property
    def samples(self) -> list[str]:
        return [source.removeprefix("samples/step_").removesuffix(".png") for source in self.of("img", "src")]

    @property
    def rows(self) -> dict[str, str]:
        return dict(zip(self.texts["th"], self.texts["td"], strict=True))


def told(*events: Any) -> trainer.RunLog:
    """What a log comes to: phases are texts, progress is a step, a validation (step, loss)."""
    log = trainer.RunLog()
    for event in events:
        if isinstance(event, int):
            fields: Json = {"type": "progress", "step": event, "loss": event / 10, "loss_avg": None}
            log.take(fields | {"learning_rates": {"unet": 1e-4}})
        elif isinstance(event, tuple):
            log.take({"type": "validation", "step": event[0], "loss": event[1]})
        else:
            log.take({"type": "start"} if event == "start" else {"type": "info", "message": "", "phase": event})
    return log


def test_attempts_are_told_as_one_run() -> None:
    first = ("start", "loading", "training", 1, 2, (2, 0.5), "training", 3, 4, (4, 0.4))
    resumed = told(*first, "start", "resuming", "training", 3, (3, 0.7))
    assert resumed.curves["progress loss"] == {1: 0.1, 2: 0.2, 3: 0.3}
    assert resumed.curves["validation loss"] == {2: 0.5, 3: 0.7}
    assert resumed.curves["unet"].keys() == {1, 2, 3}
    failed = told(*first, "start", "loading", "start", "resuming")
    assert [*failed.curves["progress loss"]] == [1, 2, 3, 4]
    fresh = told(*first, "start", "training", 2)
    assert fresh.curves["progress loss"] == {2: 0.2}
    assert not fresh.curves["validation loss"]
    assert [*told(*first, "start", "training", 1, 2, "start", "resuming", "training", 2, 3).curves["unet"]] == [1, 2, 3]


def test_a_log_is_read_on_from_where_it_was_and_what_is_no_event_is_passed_over(tmp_path: Path) -> None:
    path, log = tmp_path / "events.jsonl", trainer.RunLog()
    event = {"type": "progress", "loss": 0.5, "loss_avg": 0.5, "learning_rates": {}}
    lines = [json.dumps(event | {"step": step}) for step in (1, 2, 3)]
    path.write_text("\n".join(["null", "[1]", "{}", "not JSON", '{"type": "progress"}', lines[0], lines[1][:20]]))
    log.read(path)
    assert [*log.curves["progress loss"]] == [1]
    with path.open("a") as file:
        file.write(lines[1][20:] + "\n")
    log.read(path)
    assert [*log.curves["progress loss"]] == [1, 2]
    path.write_text(lines[2] + "\n")
    log.read(path)
    assert [*log.curves["progress loss"]] == [1, 2, 3]


@pytest.mark.parametrize(
    "line",
    [
        *("[" * 100_000, "0" * 2_500_000, '{"type": "sample", "step": "2", "index": 0}'),
        *(f'{{"type": "progress", "step": {step}, "loss": 1}}' for step in ("NaN", '"5"', "null", "-1", "1e999", 2.5)),
        *(f'{{"type": "validation", "step": 2, "loss": {loss}}}' for loss in ("NaN", "-1e999", '"x"', "[1]", 10**400)),
    ],
    ids=lambda line: line[:60],
)
def test_a_log_that_was_tampered_with_is_still_drawn(tmp_path: Path, line: str) -> None:
    path, log = tmp_path / "events.jsonl", trainer.RunLog()
    ours = [f'{{"type": "progress", "step": {step}, "loss": 0.5}}' for step in (1, 2, 3)]
    path.write_text("\n".join([line, *ours[:2], line, ours[2], ""]))
    log.read(path)
    log.cut(3)
    assert log.curves["progress loss"] == {1: 0.5, 2: 0.5, 3: 0.5}
    assert not log.samples
    assert all("<svg" in trainer.chart("", "", curve) for curve in log.curves.values() if curve)


def test_a_thinned_curve_keeps_ends_and_extremes_and_a_hundred_thousand_steps_stay_few() -> None:
    draws = random.Random(1)
    curve = {step: draws.random() for step in range(1, 20_001, 3)} | {777: 9.0, 12_001: -9.0}
    curve = dict(sorted(curve.items()))
    few = trainer.thinned(curve, 400)
    assert 200 < len(few) <= 400
    assert few.items() <= curve.items()
    assert (min(few), max(few)) == (1, max(curve))
    assert (min(few.values()), max(few.values())) == (-9.0, 9.0)
    assert trainer.thinned({1: 0.5, 2: 0.4}, 400) == {1: 0.5, 2: 0.4}
    log = trainer.RunLog()
    for step in range(1, 100_001):
        log.take({"type": "progress", "step": step, "loss": 1 / step, "loss_avg": 0.1, "learning_rates": {}})
        assert len(log.curves["progress loss"]) <= 2 * log.MOST_POINTS
    assert (min(log.curves["progress loss"]), log.curves["progress loss"][100_000]) == (1, 1e-5)


def test_columns_are_even_with_both_ends_and_a_new_one_brings_no_old_one_back() -> None:
    before: set[int] = set()
    for count in range(1, 200):
        chosen = trainer.spread(range(count), 12)
        assert chosen[0] == 0 and chosen[-1] == count - 1 and len(chosen) == min(count, len(chosen)) <= 12
        assert len({after - one for one, after in itertools.pairwise(chosen[:-1])}) <= 1
        assert set(chosen) <= before | {count - 1}
        before = set(chosen)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 1000, [0, 200, 400, 600, 800, 1000]),
        (0.12, 0.31, [0.1, 0.15, 0.2, 0.25, 0.3, 0.35]),
        (1e-4, 1e-4, [0, 2e-5, 4e-5, 6e-5, 8e-5, 1e-4]),
        (0, 0, [0, 0.2]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low: float, high: float, expected: list[float]) -> None:
    assert trainer.ticks(low, high) == pytest.approx(expected)


@needs_torch
def test_the_grid_has_the_samples_where_they_belong_and_labels_that_fit(tmp_path: Path) -> None:
    tiles: dict[Any, Any] = {}
    for step, row in itertools.product((0, 5, 10), (0, 1)):
        path = tmp_path / f"step_{step}_{row}.png"
        picture = Image.new("RGB", (512, 512), (20 * step, 200 * row, 9))
        path.write_bytes(trainer.png_bytes(picture, {"run_id": "other" if (step, row) == (5, 1) else "ours"}))
        if (step, row) == (0, 1):
            path.write_bytes(path.read_bytes()[:-300])
        tiles[step, row] = trainer.tile(path, "ours", 128)
    grid = trainer.draw_grid(("a caf\u00e9 on \u5e02\u5834 \U0001f600\ud800 hill", "word " * 400), tiles, 128)
    assert grid.size == (416, 28 + 2 * 156 + 8)
    middles = {
        (step, row): grid.getpixel((72 + 136 * column, 120 + 156 * row))
        for column, step in enumerate((0, 5, 10))
        for row in (0, 1)
    }
    white = (255, 255, 255)
    expected = {(0, 0): (0, 0, 9), (5, 0): (100, 0, 9), (10, 0): (200, 0, 9), (10, 1): (200, 200, 9)}
    assert middles == expected | {(0, 1): white, (5, 1): white}
    for top in (30, 186):
        label, margin = (grid.crop((x, top, x + 8, top + 24)).tobytes() for x in (8, 408))
        assert min(label) < 99 and {*margin} == {255}, "it begins at the edge, and ends before the other"


@needs_torch
def test_each_sample_is_decoded_once_and_the_grid_is_drawn_for_new_ones(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded: list[str] = []
    tile = trainer.tile

    def counted(path: Path, *options: Any) -> Any:
        decoded.append(path.name)
        return tile(path, *options)

    monkeypatch.setattr(trainer, "tile", counted)
    changes: Json = {"validation_steps": 2, "checkpoint_steps": 1, "steps": 6}
    report_of(tmp_path, small(images, models / "sd15", tmp_path / "out", **changes))
    assert decoded == [f"step_{step}_0.png" for step in (2, 4, 6)]


@needs_torch
def test_a_page_tells_of_the_run_and_nothing_in_it_is_markup_or_from_elsewhere(
    tmp_path: Path, images: Path, models: Path
) -> None:
    hostile = ["</style><script>alert(1)</script>", "\"'><img src=x onerror=alert(2)> \u8d64 {x} %s $y &amp; \x00"]
    out = tmp_path / "o'u\"t #1 %41?<b>"
    changes: Json = {"sample_prompts": hostile, "validation_split": 0.3, "metadata": {"title": "</pre><script>"}}
    changes |= {"validation_steps": 2, "train_text_encoder": True, "sample_at_start": True}
    page = report_of(tmp_path, small(images, models / "sd15", out, **changes))
    assert page.texts["h1"] == page.texts["title"] == ["lora: finished"]
    assert "script" not in page.texts and "onerror" not in {name for _, name, _ in page.attributes}
    assert page.texts["p"][0] == hostile[0]
    assert json.loads(page.texts["pre"][0])["sample_prompts"] == hostile
    assert [figure.split("\n")[0] for figure in page.texts["h3"]][:3] == ["Loss", "Held-out loss", "Learning rate"]
    links = {*page.of("a", "href"), *page.of("img", "src")}
    names = {f"samples/step_{step}_{row}.png" for step in (0, 2, 4) for row in (0, 1)}
    assert links == names | {"samples/grid.png"}
    assert all((out / name).is_file() for name in links)
    assert page.of("img", "alt") == [f"Prompt {row} at step {step}" for row in (1, 2) for step in (0, 2, 4)]
    assert not re.search(r"https?:|url\(|@import", page.source.replace(hostile[0], ""))
    (policy,) = (value for value in page.of("meta", "content") if "default-src" in value)
    assert policy == "default-src 'none';img-src 'self' file:;style-src 'unsafe-inline'"
    assert len(page.source.splitlines()) - len(page.texts["pre"][0].splitlines()) < 120
    losses = [json.loads(line)["loss"] for line in (out / "events.jsonl").open() if '"progress"' in line]
    assert page.texts["figcaption"][0].startswith(f"Faint: each step (up to {max(losses):.4g};")
    assert page.rows["Steps"].startswith("4 of 4, ")
    assert page.rows["Images"] == "5" and page.rows["Validation images"] == "2"


@needs_torch
def test_report_and_grid_follow_a_run_through_stop_resume_other_prompts_and_fresh(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", steps=8, validation_steps=2, sample_prompts=["a", "b"])
    grid = tmp_path / "out/samples/grid.png"
    killed = make_reporting(tmp_path, config | {"checkpoint_steps": 4}, stop=Quiet(after=24))
    killed.setup()
    assert not killed.train()
    killed.folder._lock.close()  # type: ignore[union-attr]
    page = Page(tmp_path / "out/report.html")
    assert (page.texts["h1"], page.rows["Steps"][:6]) == (["lora: running"], "6 of 8")
    run_id = trainer.written_by(grid)
    assert page.samples == [f"{step}_{row}" for row in (0, 1) for step in (2, 4, 6)]
    config["sample_prompts"] = ["a", "other"]
    stopped = report_of(tmp_path, config, stop=Quiet(after=0))
    assert (stopped.texts["h1"], stopped.rows["Steps"][:6]) == (["lora: interrupted"], "4 of 8")
    assert (trainer.written_by(grid), stopped.samples) == (run_id, ["2_0", "4_0"])
    assert (tmp_path / "out/samples/step_6_0.png").exists()
    finished = report_of(tmp_path, config)
    assert finished.texts["h1"] == ["lora: finished"]
    assert finished.samples == ["2_0", "4_0", "6_0", "8_0", "6_1", "8_1"]
    before = {path: path.stat().st_mtime_ns for path in (grid, tmp_path / "out/report.html")}
    again = make_reporting(tmp_path, config)
    again.run()
    again.folder._lock.close()  # type: ignore[union-attr]
    assert any(event["message"].startswith("This run is finished already") for event in emitted(again, "info"))
    assert {path: path.stat().st_mtime_ns for path in before} == before
    fresh = report_of(tmp_path, config | {"validation_steps": 3, "steps": 4}, fresh=True)
    assert fresh.rows["Steps"].startswith("4 of 4, ")
    assert fresh.samples == ["3_0", "4_0", "3_1", "4_1"], "also of the finished LoRA"
    assert trainer.written_by(grid) not in (run_id, None)
    report_of(tmp_path, config | {"validation_steps": 0}, fresh=True)
    assert not grid.exists()


@needs_torch
def test_a_failed_run_says_so_on_its_page(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: trainer.LoRATrainer, *_: Any) -> None:
        raise RuntimeError("no luck <today>")

    monkeypatch.setattr(trainer.LoRATrainer, "finish", fail)
    with pytest.raises(RuntimeError):
        report_of(tmp_path, small(images, models / "sd15", tmp_path / "out"))
    page = Page(tmp_path / "out/report.html")
    assert page.texts["h1"] == ["lora: failed"]
    assert "no luck <today>" in page.rows["Message"] and page.rows["Message"].startswith("internal: ")


@needs_torch
def test_a_report_that_cannot_be_written_is_one_warning_and_the_run_goes_on(
    tmp_path: Path, images: Path, models: Path
) -> None:
    for hindered in ("report.html", "samples/grid.png", "events.jsonl"):
        out = tmp_path / hindered.replace("/", "-")
        made = make_reporting(tmp_path, small(images, models / "sd15", out, checkpoint_steps=1, validation_steps=2))
        made.events.path = tmp_path / "log"  # type: ignore[attr-defined]
        (out / "events.jsonl").unlink()
        (out / hindered).mkdir()
        made.run()
        made.folder._lock.close()  # type: ignore[union-attr]
        assert made.final_path.exists()
        assert warning_codes(made).count("report_not_written") == 1
        assert (out / hindered).is_dir()
        if hindered != "report.html":
            assert Page(out / "report.html").texts["h1"] == ["lora: finished"]


@needs_torch
def test_a_grid_that_a_viewer_holds_keeps_no_page_from_being_written_and_comes_later(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", validation_steps=2)
    made, write = make_reporting(tmp_path, config), trainer.write_file

    def held(path: Path, data: bytes) -> None:
        if path.name == "grid.png":
            raise PermissionError(13, "in use", str(path))
        write(path, data)

    monkeypatch.setattr(trainer, "write_file", held)
    made.run()
    page = Page(tmp_path / "out/report.html")
    assert (page.texts["h1"], page.samples) == (["lora: finished"], ["2_0", "4_0"])
    assert warning_codes(made).count("report_not_written") == 1
    assert not (tmp_path / "out/samples/grid.png").exists()
    monkeypatch.setattr(trainer, "write_file", write)
    made.show()
    assert (tmp_path / "out/samples/grid.png").exists()


@needs_torch
def test_a_folder_that_was_moved_away_keeps_its_successors_report(tmp_path: Path, images: Path, models: Path) -> None:
    made = make_reporting(tmp_path, small(images, models / "sd15", tmp_path / "out"))
    made.setup()
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/report.html").write_text("theirs")
    made.show()
    made.folder._lock.close()  # type: ignore[union-attr]
    assert (tmp_path / "out/report.html").read_text() == "theirs"
    assert "report_not_written" not in warning_codes(made)


# ======================================================================================
# trainer
# ======================================================================================


LOSSES: list[tuple[str, Json]] = [
    *((kind, {}) for kind in KINDS),
    ("sd15", {"snr_gamma": 2.0, "noise_offset": 0.1, "min_timestep": 300, "max_timestep": 900}),
    ("sd15", {"loss_type": "huber", "huber_c": 0.3}),
    ("sd21v", {"zero_terminal_snr": True, "min_timestep": 999}),
    ("sd21v", {"snr_gamma": 0.5, "noise_offset": 0.2}),
    ("sdxl", {"prediction_type": "v_prediction", "loss_type": "huber", "snr_gamma": 5.0, "zero_terminal_snr": True}),
]


@needs_torch
@pytest.mark.parametrize(("kind", "changes"), LOSSES)
def test_every_loss_and_noise_equals_an_independent_computation(
    tmp_path: Path, images: Path, models: Path, kind: str, changes: Json
) -> None:
    made = prepare(tmp_path, small(images, models / kind, tmp_path / "out", **changes))
    batch = made.collate(0)
    shape = batch.mean.shape

    def drawn(name: str, *size: int) -> Any:
        return torch.randn(size or shape, generator=trainer.generator(name, 42, 0, 0))

    noise = drawn("noise") + changes.get("noise_offset", 0) * drawn("offset", *shape[:2], 1, 1)
    span = (changes.get("min_timestep", 0), changes.get("max_timestep", 1000))
    timesteps = torch.randint(*span, shape[:1], generator=trainer.generator("timesteps", 42, 0, 0))
    pipeline = load_pipeline(models / kind)
    owner: Any = diffusers.DDPMScheduler
    zero = {"rescale_betas_zero_snr": changes.get("zero_terminal_snr", False)}
    scheduler = owner.from_config(pipeline.scheduler.config, **zero)
    latents = batch.mean + batch.std * drawn("posterior")
    noisy = scheduler.add_noise(latents, noise, timesteps)
    with torch.no_grad():
        prediction = pipeline.unet(noisy, timesteps, batch.context, added_cond_kwargs=batch.conditions).sample
    velocity = kind == "sd21v" or "prediction_type" in changes
    error = prediction - (scheduler.get_velocity(latents, noise, timesteps) if velocity else noise)
    c = changes.get("huber_c", 0.1)
    errors = 2 * c * ((error**2 + c**2).sqrt() - c) if changes.get("loss_type") else error**2
    snr = scheduler.alphas_cumprod[timesteps] / (1 - scheduler.alphas_cumprod[timesteps])
    weights = snr.clamp(max=changes.get("snr_gamma", math.inf)) / (snr + velocity)
    expected = (errors.mean(dim=(1, 2, 3)) * (weights if "snr_gamma" in changes else 1)).mean()
    found = made.loss(batch, 0, 0).item()
    print(f"{kind} {changes}: loss {found:.7f}, difference {abs(found - float(expected)):.1e}")
    assert found == pytest.approx(float(expected), abs=1e-6)


def plain_errors(made: trainer.LoRATrainer, model: Path, batch: trainer.Batch, step: int) -> Any:
    """Each pixel's squared error [B, C, h, w], by diffusers' scheduler and the pipeline's own UNet."""
    shape, key = batch.mean.shape, (made.config.seed, step, 0)
    posterior, noise = (torch.randn(shape, generator=trainer.generator(name, *key)) for name in ("posterior", "noise"))
    timesteps = torch.randint(1000, (len(batch.mean),), generator=trainer.generator("timesteps", *key))
    pipeline = load_pipeline(model)
    owner: Any = diffusers.DDPMScheduler
    noisy = owner.from_config(pipeline.scheduler.config).add_noise(batch.mean + batch.std * posterior, noise, timesteps)
    with torch.no_grad():
        return (pipeline.unet(noisy, timesteps, batch.context).sample - noise).double().square()


@needs_torch
def test_regularization_images_weigh_what_the_config_says_in_any_batch(
    tmp_path: Path, images: Path, models: Path
) -> None:
    for number in range(3):
        draw_image(save_picture(tmp_path / f"prior/{number}.png", Image.new("RGB", (64, 64))), (64, 64), 7 + number)
    changes = {"regularization_path": str(tmp_path / "prior"), "prior_loss_weight": 0.3, "batch_size": 3}
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", aspect_ratio_bucketing=False, **changes))
    mixes = set()
    for step in range(4):
        roles = [made.plan.dataset.examples[index].role for index in made.batch_at(step)[1]]
        errors = plain_errors(made, models / "sd15", batch := made.collate(step), step).mean(dim=(1, 2, 3)).tolist()
        expected = sum(error * {"train": 1.0, "prior": 0.3}[role] for error, role in zip(errors, roles, strict=True))
        assert made.loss(batch, step, 0).item() == pytest.approx(expected / len(roles), abs=1e-6)
        mixes.add(tuple(sorted(roles)))
    assert len(mixes) > 1, "batches of several kinds"


@needs_torch
def test_a_mask_weighs_each_latent_pixel_and_turns_with_its_image(tmp_path: Path, models: Path) -> None:
    folder = tmp_path / "images"
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    half.paste(51, (32, 0, 64, 8))
    draw_image(save_picture(folder / "file.png", Image.new("RGB", (64, 64))), (64, 64))
    save_picture(folder / "file-masklabel.png", half)
    with Image.open(folder / "file.png") as image:
        image.putalpha(half)
        image.save(folder / "alpha.png")
    draw_image(folder / "whole.png", (64, 64), 3)
    expected = torch.zeros(8, 8)
    expected[:, :4] = 1
    expected[0, 4:] = 0.2
    expected = expected + (1 - expected) * 0.25
    changes = {"masked_loss": True, "unmasked_weight": 0.25, "random_flip": True, "batch_size": 3}
    made = prepare(tmp_path, small(folder, models / "sd15", tmp_path / "out", **changes))
    assert [example.name for example in made.plan.dataset.examples] == ["alpha.png", "file.png", "whole.png"]
    assert "masks_missing" in warning_codes(made)
    for step in range(3):
        indices = made.batch_at(step)[1]
        mirrored = [trainer.draw_augmentation(made.config, step, place)[0] for place in range(len(indices))]
        masks = [expected.flip(1) if flip else expected for flip in mirrored]
        masks = [torch.ones(8, 8) if index == 2 else mask for index, mask in zip(indices, masks, strict=True)]
        batch = made.collate(step)
        torch.testing.assert_close(batch.mask, torch.stack(masks)[:, None], atol=1e-7, rtol=0)
        errors = plain_errors(made, models / "sd15", batch, step)
        by_hand = (
            sum(float((error * mask).sum()) / error.numel() for error, mask in zip(errors, masks, strict=True)) / 3
        )
        assert made.loss(batch, step, 0).item() == pytest.approx(by_hand, abs=1e-6)


@needs_torch
def test_the_held_out_loss_is_the_same_each_time_and_equals_an_independent_one(
    tmp_path: Path, images: Path, models: Path
) -> None:
    changes = {"validation_split": 0.4, "validation_steps": 2, "sample_at_start": True, "lora_dropout": 0.5, "seed": 5}
    made = train(tmp_path, small(images, models / "sd15", tmp_path / "out", **changes))
    told = {event["step"]: event["loss"] for event in emitted(made, "validation")}
    held_out = [i for i, example in enumerate(made.plan.dataset.examples) if example.role == "validation"]
    assert list(told) == [0, 2, 4] and len(held_out) == 2
    assert not {index for step in range(20) for index in made.batch_at(step)[1]} & set(held_out)
    pipeline = load_pipeline(models / "sd15")
    owner: Any = diffusers.DDPMScheduler
    scheduler, losses = owner.from_config(pipeline.scheduler.config), []
    for index, part in itertools.product(held_out, range(4)):
        batch = made.assemble([made.plan.view(index)], [made.plan.dataset.examples[index].caption], [1.0])
        noise = torch.randn(batch.mean.shape, generator=trainer.generator("validation", 5, index, part))
        timesteps = torch.tensor([125 + 250 * part])
        with torch.no_grad():
            noisy = scheduler.add_noise(batch.mean, noise, timesteps)
            losses.append(torch.nn.functional.mse_loss(pipeline.unet(noisy, timesteps, batch.context).sample, noise))
    assert told[0] == pytest.approx(float(sum(losses)) / 8, abs=1e-6)
    made.validate(4)
    assert emitted(made, "validation")[-1]["loss"] == told[4] != told[2]
    assert "setting_unused" in warning_codes(
        prepare(tmp_path, small(images, models / "sd15", tmp_path / "never", **changes | {"validation_steps": 0}))
    )


@needs_torch
def test_clipping_really_clips(tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", max_grad_norm=1e-3))
    made.accumulate(0)
    before = float(made.gradient.norm())
    seen: list[float] = []
    monkeypatch.setattr(made.optimizer, "step", lambda: seen.append(float(made.gradient.norm())))
    loss, norm = made.update(torch.tensor(1.0)).tolist()
    assert loss == 1.0
    assert norm == pytest.approx(before, rel=1e-5)
    assert before > 1e-2
    assert seen == [pytest.approx(1e-3, rel=1e-2)]
    for key, weight in made.masters.items():
        assert weight.grad is made.gradients[key], "what is clipped is what the optimizer sees"


@needs_torch
def test_accumulating_equals_one_larger_batch(tmp_path: Path, images: Path, models: Path) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", gradient_accumulation_steps=2))
    total = made.accumulate(0)
    grads = [part.clone() for part in made.gradients.values()]
    losses = [made.loss(made.collate(index), 0, index) for index in (0, 1)]
    expected = torch.autograd.grad((losses[0] + losses[1]) / 2, list(made.parameters.values()))
    assert total == pytest.approx(float((losses[0] + losses[1]).detach()) / 2, rel=1e-6)
    for ours, reference in zip(grads, expected, strict=True):
        torch.testing.assert_close(ours, reference, atol=1e-7, rtol=1e-4)


def gradients_of(made: trainer.LoRATrainer, step: int = 0) -> Any:
    made.accumulate(step)
    return made.gradient.clone()


def take_step(made: trainer.LoRATrainer, step: int, spoil: Callable[[], Any] = lambda: None) -> None:
    made.clock = time.monotonic()
    loss = made.accumulate(step)
    spoil()
    assert loss is not None
    made.advance(step, loss, {})


@needs_torch
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, images: Path, models: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        config = small(images, models / "sdxl", tmp_path / str(checkpointing), gradient_checkpointing=checkpointing)
        made = prepare(tmp_path, config)
        assert made.unet.is_gradient_checkpointing is checkpointing
        grads.append(gradients_of(made))
    torch.testing.assert_close(*grads)


@needs_torch
@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6)])
def test_the_lean_lora_layer_computes_what_pefts_own_does(shape: tuple[int, ...], scale: float) -> None:
    import peft

    layer: Any = torch.nn.Sequential(torch.nn.Linear(6, 4)).double().requires_grad_(False)
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, lora_alpha=cast(int, 2 * scale), target_modules=["0"]), layer)
    layer.double()
    weights = [layer[0].lora_A["default"].weight, layer[0].lora_B["default"].weight]
    torch.nn.init.normal_(weights[1])
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)

    def computed() -> list[Any]:
        output = layer(x)
        return [output, *torch.autograd.grad((output**3).sum(), [x, *weights])]

    theirs = computed()
    trainer.speed_up(layer)
    assert type(layer[0]) is trainer.lean_linear()
    for ours, reference in zip(computed(), theirs, strict=True):
        torch.testing.assert_close(ours, reference)
    assert torch.autograd.gradcheck(lambda x, *_: layer(x), (x, *weights))


@needs_torch
def test_layers_that_are_no_plain_lora_on_a_linear_one_keep_pefts_forward(
    tmp_path: Path, images: Path, models: Path
) -> None:
    import peft

    changes: list[dict[str, Any]] = [{}, {"lora_dropout": 0.5}, {"lora_type": "dora"}, {"lora_type": "lokr"}]
    for index, change in enumerate(changes):
        made = prepare(tmp_path, small(images, models / "sd15", tmp_path / f"{index}", **change))
        lean = [module for module in made.unet.modules() if type(module) is trainer.lean_linear()]
        assert bool(lean) is (index == 0)
        convolutions = [module for module in made.unet.modules() if isinstance(module, peft.tuners.lora.Conv2d)]
        assert all(type(module) is peft.tuners.lora.Conv2d for module in convolutions)


@needs_torch
@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True}, {"lora_type": "dora"}, {"lora_type": "lokr"}])
def test_in_bf16_the_gradient_is_fp32s_but_for_rounding_and_masters_stay_fp32(
    tmp_path: Path, images: Path, models: Path, changes: dict[str, Any]
) -> None:
    made = {}
    for precision in ("no", "bf16"):
        config = small(images, models / "sd15", tmp_path / precision, batch_size=4, **changes)
        made[precision] = prepare(tmp_path, config | {"mixed_precision": precision})
        made[precision].unet.load_state_dict(
            {
                k: v.bfloat16()
                for k, v in made[precision].unet.state_dict().items()
                if "lora" not in k and "lokr" not in k
            },
            strict=False,
        )
    whole, half = (gradients_of(one) for one in made.values())
    assert float((half - whole).norm() / whole.norm()) < 0.03
    ours = made["bf16"]
    assert {weight.dtype for weight in ours.live.values()} == {torch.float32}
    plain = not changes.get("lora_type")
    assert {weight.dtype for weight in ours.parameters.values()} == {torch.bfloat16 if plain else torch.float32}
    take_step(ours, 0)
    for key, weight in ours.parameters.items():
        assert torch.equal(weight, ours.live[key].to(weight.dtype)), "the copies follow their masters"


@needs_torch
def test_a_verdict_that_is_read_a_step_late_changes_nothing_but_when(
    tmp_path: Path, images: Path, models: Path
) -> None:
    """As on CUDA, where reading a step's loss at once would leave the GPU without work."""
    made = {}
    for late in (0, 1):
        config = small(images, models / "sd15", tmp_path / f"{late}", steps=6, checkpoint_steps=3, ema_decay=0.9)
        made[late] = prepare(tmp_path, config | {"save_dtype": "fp32"})
        made[late].late = late
        view_of(made[late], made[late].batch_at(1)[1][0])["mean"] *= math.nan
        assert made[late].train()
        made[late].finish()
    now, then = made[0], made[1]
    bad = next(event for event in emitted(now, "warning") if event["code"] == "step_not_finite")
    assert bad["message"].startswith("Step 2 ")
    for key, weight in now.live.items():
        assert torch.equal(weight, then.live[key])
        assert torch.equal(now.ema[key], then.ema[key])
    told = [[(event["step"], event["loss"]) for event in emitted(one, "progress")] for one in (now, then)]
    assert str(told[0]) == str(told[1])
    assert now.state.losses == then.state.losses
    events: Any = then.events
    kinds = [event["type"] for event in events.events]
    assert kinds.index("checkpoint") == [i for i, kind in enumerate(kinds) if kind == "progress"][2] + 1


@needs_torch
def test_a_step_that_is_not_finite_leaves_optimizer_and_average_as_they_were(
    tmp_path: Path, images: Path, models: Path
) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", ema_decay=0.5))
    take_step(made, 0)
    before: dict[str, Any] = {}
    average = made.all_ema.clone()
    trainer.pack(made.optimizer.state_dict(), before)
    before = {name: tensor.clone() for name, tensor in before.items()}
    take_step(made, 1, lambda: made.gradient[0].fill_(math.inf))
    after: dict[str, Any] = {}
    trainer.pack(made.optimizer.state_dict(), after)
    assert len(before) == 3 * len(made.live)
    assert average.any()
    assert torch.equal(made.all_ema, average)
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())


@needs_torch
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_unet_computes_what_it_did_for_every_bucket(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", steps=4, batch_size=1))
    by_size = {made.plan.sizes[made.batch_at(step)[1][0]]: step for step in range(6)}
    assert len(by_size) > 1
    plain = {step: gradients_of(made, step) for step in by_size.values()}
    made.compile_blocks()
    assert "compile_unavailable" not in warning_codes(made)
    compiled = {step: gradients_of(made, step) for step in by_size.values()}
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    widths = {block.norm1.normalized_shape for block in made.unet.modules() if hasattr(block, "attn1")}
    assert graphs == len(widths), "all sizes share one for each width"
    for step, reference in plain.items():
        torch.testing.assert_close(compiled[step], reference, rtol=1e-3, atol=1e-6)


@needs_torch
def test_cublas_hears_of_determinism_before_anything_is_multiplied(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reads the variable once, at its first product; trying nf4 is one."""
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    seen = []
    monkeypatch.setattr(trainer, "check_quantizer", lambda *_: seen.append(os.environ.get("CUBLAS_WORKSPACE_CONFIG")))
    try:
        prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", deterministic=True))
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [":4096:8"]


@needs_torch
@needs("bitsandbytes")
def test_what_a_run_does_not_need_is_not_imported(tmp_path: Path) -> None:
    plain, eight = (parse(tmp_path, REQUIRED | {"optimizer": name}) for name in ("adamw", "adamw8bit"))
    assert trainer.unused_packages(plain) == ["kernels", "bitsandbytes"]
    assert trainer.unused_packages(eight) == ["kernels"]
    code = (
        "import sys, train_lora; train_lora.import_libraries(['bitsandbytes'])\n"
        "train_lora.peft.inject_adapter_in_model(train_lora.peft.LoraConfig(target_modules=['0']), "
        "train_lora.torch.nn.Sequential(train_lora.torch.nn.Linear(2, 2)))\n"
        "print([name for name in sys.modules if name.startswith('bitsandbytes.')])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@needs("torch", "triton")
def test_nothing_is_reported_as_leaked_when_the_process_ends() -> None:
    code = "import train_lora; train_lora.import_libraries(['kernels', 'bitsandbytes'])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "leaked" not in done.stderr


@needs_torch
@pytest.mark.parametrize(
    "failure",
    [
        RuntimeError("Failed to find a C++ compiler\nand a stack trace"),
        OSError("/tmp/x.so: failed to map segment from shared object"),  # where /tmp runs no code
    ],
)
def test_without_a_compiler_a_run_warns_and_goes_on(
    failure: Exception, tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_nothing(*_: Any, **__: Any) -> Any:
        raise failure

    monkeypatch.setattr(torch, "compile", compile_nothing)
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", steps=1, compile=True))
    (told,) = (event for event in emitted(made, "warning") if event["code"] == "compile_unavailable")
    assert told["message"].endswith(f"nothing is compiled: {type(failure).__name__}: {failure}".partition("\n")[0])
    assert made.train()


@needs_torch
def test_training_moves_every_weight_and_lowers_the_loss(tmp_path: Path, images: Path, models: Path) -> None:
    made = train(tmp_path, small(images, models / "sd15", tmp_path / "out", steps=60, batch_size=5))
    assert all(weight.any() for weight in made.live.values())
    losses = [event["loss"] for event in emitted(made, "progress")]
    assert sum(losses[-10:]) < sum(losses[:10])


@needs_torch
def test_a_step_that_is_not_finite_changes_nothing_and_names_the_images(
    tmp_path: Path, images: Path, models: Path
) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", steps=3))
    poisoned = made.batch_at(1)[1][0]
    view_of(made, poisoned)["mean"] *= math.nan
    assert made.train()
    warnings = [event for event in emitted(made, "warning") if event["code"] == "step_not_finite"]
    assert made.plan.dataset.examples[poisoned].name in warnings[0]["message"]
    assert all(bool(torch.isfinite(weight).all()) for weight in made.live.values())
    assert all(math.isfinite(loss) for loss in made.state.losses)


@needs_torch
def test_divergence_ends_the_run_and_no_broken_lora_is_written(tmp_path: Path, images: Path, models: Path) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", steps=20, checkpoint_steps=2))
    for index in range(5):
        view_of(made, index)["mean"] *= math.inf
    with pytest.raises(trainer.TrainerError) as caught:
        made.train()
    assert caught.value.code == "loss_not_finite"
    assert made.state.step == made.MOST_BAD_STEPS + 1
    with torch.no_grad():
        next(iter(made.live.values())).fill_(math.nan)
    with pytest.raises(trainer.TrainerError):
        made.finish()
    assert not made.final_path.exists()
    untrained = prepare(tmp_path, small(images, models / "sd15", tmp_path / "short", steps=2))
    untrained.cached = made.cached
    assert untrained.train()
    with pytest.raises(trainer.TrainerError, match="nothing was trained"):
        untrained.finish()


@needs_torch
def test_fp16_with_a_scaler_trains_and_resumes(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", mixed_precision="fp16", steps=6)
    try:
        whole = train(tmp_path, config | {"output_path": str(tmp_path / "whole")})
    except RuntimeError as error:
        if "not implemented" not in str(error):
            raise
        pytest.skip(f"no fp16 on this CPU: {error}")
    train(tmp_path, config, stop=Quiet(after=3))
    resumed = prepare(tmp_path, config)
    point = resumed.find_point()
    assert point
    resumed.restore(dataclasses.replace(point, record=point.record | {"scaler": {}}))  # begun without one
    resumed.folder._lock.close()  # type: ignore[union-attr]
    resumed = train(tmp_path, config)
    assert resumed.scaler.state_dict() == whole.scaler.state_dict()
    assert_same_tensors(resumed.final_path, whole.final_path)


@needs_torch
def test_the_state_is_saved_between_checkpoints_when_minutes_have_passed(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", autosave_minutes=1e-9, checkpoint_steps=3)
    made = train(tmp_path, config)
    saved = [(event["step"], event["path"] is not None) for event in emitted(made, "checkpoint")]
    assert saved == [(1, False), (2, False), (3, True), (4, False)]


def fail_writes(monkeypatch: pytest.MonkeyPatch, number: int, failing: Callable[[str], bool]) -> None:
    """Let the device fail with errno `number` while files whose name is `failing` are being written."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        name = Path(f"/proc/self/fd/{descriptor}").readlink().name
        if failing(name):
            raise OSError(number, os.strerror(number), name)
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


linux = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")


@linux
@needs_torch
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_periodic_save_that_fails_warns_and_a_second_in_a_row_ends_the_run(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", steps=12, checkpoint_steps=2)
    whole = train(tmp_path, config | {"output_path": str(tmp_path / "whole")})
    made = prepare(tmp_path, config)
    fail_writes(monkeypatch, number, lambda name: made.state.step in (4, 8, 10))
    with pytest.raises(trainer.TrainerError) as caught:
        made.train()
    assert caught.value.code == ("disk_full" if number == errno.ENOSPC else "output_not_writable")
    assert [event["step"] for event in emitted(made, "checkpoint")] == [2, 6]
    assert warning_codes(made).count("save_failed") == 2
    names = {path.name for path in made.folder.checkpoints.iterdir()}
    assert names == {f"{stem}_step_{step}.safetensors" for stem in ("lora", "state") for step in (2, 6)}
    made.folder._lock.close()  # type: ignore[union-attr]
    monkeypatch.undo()
    assert_same_tensors(train(tmp_path, config).final_path, whole.final_path)


@linux
@needs_torch
def test_memory_that_runs_out_in_a_save_is_an_exception_and_no_abort() -> None:
    resource = pytest.importorskip("resource")
    tensors = {"large": torch.zeros(2**27)}
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**29, before[1]))
    try:
        with pytest.raises(MemoryError):
            trainer.serialize(tensors, {})
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@linux
@needs_torch
def test_a_lora_that_cannot_be_written_leaves_the_state_and_comes_when_the_run_goes_on(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=2)
    made = prepare(tmp_path, config)
    fail_writes(monkeypatch, errno.ENOSPC, lambda name: "lora_step" in name)
    with pytest.raises(trainer.TrainerError, match="full"):
        made.train()
    assert made.stop.saved == trainer.SavedFiles(4, None, str(made.folder.checkpoints / "state_step_4.safetensors"))
    made.folder._lock.close()  # type: ignore[union-attr]
    monkeypatch.undo()
    resumed = train(tmp_path, config)
    assert resumed.lora_path(4).exists()
    assert resumed.final_path.exists()


@linux
@needs_torch
def test_a_final_lora_that_cannot_be_written_is_an_error_and_comes_with_the_next_start(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small(images, models / "sd15", tmp_path / "out")
    made = prepare(tmp_path, config)
    assert made.train()
    fail_writes(monkeypatch, errno.ENOSPC, lambda name: "final" in name)
    with pytest.raises(trainer.TrainerError) as caught:
        made.finish()
    assert caught.value.code == "disk_full"
    made.folder._lock.close()  # type: ignore[union-attr]
    monkeypatch.undo()
    again = train(tmp_path, config)
    assert again.final_path.exists()
    assert emitted(again, "progress") == []


OUT_OF_MEMORY = {  # phase: the part of the script in which memory runs out
    "planning": "make_plan",
    "caching": "encode_images",
    "loading": "add_adapter",
    "resuming": "unpack",
    "training": "sample_error",
    "saving": "file_tensors",
}


@needs_torch
@pytest.mark.parametrize("phase", OUT_OF_MEMORY)
def test_out_of_memory_says_where_and_what_was_trained_is_saved(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", steps=6)
    path = write_config(tmp_path, **config)
    if phase == "resuming":
        train(tmp_path, config, stop=Quiet(after=2))
    steps = iter(range(5))
    real = trainer.sample_error

    def exhausted(*arguments: Any, **_: Any) -> Any:
        if phase == "training" and next(steps) < 4:
            return real(*arguments)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer, OUT_OF_MEMORY[phase], exhausted)
    events = Recorder()
    folder = trainer.OutputFolder(tmp_path / "out")
    folder.open()
    loaded = trainer.load_config(str(path))
    made = trainer.LoRATrainer(loaded, scan_quietly(loaded), events, Quiet(), folder)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        made.run()
    folder._lock.close()  # type: ignore[union-attr]
    error = made.explained(caught.value)
    assert error.code == "out_of_memory"
    assert f"while {phase}" in error.message
    if phase != "planning":
        assert f"resolution {made.plan.resolution}, batch_size 2, lora_rank 4" in error.message
        assert "batch_size 1" in error.hint
        assert ("--fresh" in error.hint) == (made.stop.saved.step > 0)
    monkeypatch.undo()
    saved = {"training": 4, "saving": 6, "resuming": 2}.get(phase)
    assert made.stop.saved.step == (saved or 0)
    again = train(tmp_path, config)
    assert len(emitted(again, "progress")) == 6 - (saved or 0)


def test_main_memory_that_runs_out_beside_a_gpu_is_told_apart_from_the_gpus(tmp_path: Path, images: Path) -> None:
    plan = planned(images, "sdxl", 8)
    made = trainer.LoRATrainer(plan.config, plan.dataset, Recorder(), Quiet(), trainer.OutputFolder(tmp_path))
    made.plan = plan
    hints = {
        text: made.explained(RuntimeError(text)).hint for text in ("DefaultCPUAllocator: no", "CUDA out of memory")
    }
    assert ["main memory ran out" in hint for hint in hints.values()] == [True, False]


@needs_torch
@pytest.mark.parametrize("trouble", ["path", "memory"])
def test_a_sample_that_cannot_be_made_does_not_end_the_run(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", validation_steps=2))

    def exhausted(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    if trouble == "path":
        (tmp_path / "out/samples/step_2_0.png").mkdir()
    else:
        monkeypatch.setattr(trainer, "decode_latents", exhausted)
    assert made.train()
    assert "sample_not_written" in warning_codes(made)
    assert len(emitted(made, "progress")) == 4


@needs_torch
def test_a_folder_that_goes_during_the_run_is_made_again(tmp_path: Path, images: Path, models: Path) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out"))
    shutil.rmtree(tmp_path / "out")
    assert made.train()
    made.finish()
    assert made.final_path.exists()
    assert trainer.read_run(tmp_path / "out/config.json")["run_id"] == made.run_id
    assert (tmp_path / "out/.lock").exists()


@needs_torch
def test_a_folder_that_goes_after_the_last_save_is_saved_again(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=1)
    made = prepare(tmp_path, config, stop=Quiet(after=2))
    made.setup = lambda: False  # type: ignore[method-assign]
    done = made.train

    def and_then_remove() -> bool:
        finished = done()
        shutil.rmtree(tmp_path / "out")
        return finished

    made.train = and_then_remove  # type: ignore[method-assign]
    made.stop.conclude = lambda: None  # type: ignore[method-assign]
    made.run()
    assert all(Path(str(path)).exists() for path in (made.stop.saved.path, made.stop.saved.state_path))
    made.folder._lock.close()  # type: ignore[union-attr]
    assert len(emitted(train(tmp_path, config), "progress")) == 2


@needs_torch
@pytest.mark.parametrize("alive", [True, False])
def test_a_run_whose_folder_was_moved_away_leaves_its_successor_alone(
    tmp_path: Path, images: Path, models: Path, alive: bool
) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=2)
    moved = prepare(tmp_path, config)
    (tmp_path / "out").rename(tmp_path / "elsewhere")
    successor = prepare(tmp_path, config | {"seed": 7})
    assert successor.train()
    if not alive:
        successor.folder._lock.close()  # type: ignore[union-attr]
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")}
    with pytest.raises(trainer.TrainerError) as caught:
        moved.train()
    assert caught.value.code == "output_in_use"
    assert {path: path.read_bytes() for path in (tmp_path / "out").rglob("*.safetensors")} == before


@needs_torch
def test_epochs_give_the_length_when_steps_do_not(tmp_path: Path, images: Path, models: Path) -> None:
    changes = {"steps": None, "epochs": 3, "batch_size": 1, "gradient_accumulation_steps": 2}
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", **changes))
    assert made.plan.total_steps == math.ceil(5 * 3 / 2)


@needs_torch
def test_a_disk_that_will_not_hold_the_run_is_a_warning(
    tmp_path: Path, images: Path, models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nearly_full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: nearly_full)
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out"))
    assert "disk_space_low" in warning_codes(made)


def caused_by(error: Exception, cause: Exception) -> Exception:
    error.__context__ = cause
    return error


def test_out_of_memory_and_a_full_disk_have_their_own_codes() -> None:
    cases: dict[str, list[BaseException]] = {
        "out_of_memory": [
            MemoryError(),
            OSError(errno.ENOMEM, "Cannot allocate memory"),
            ImportError("libgomp.so.1: failed to map segment from shared object"),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
            RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes."),  # on Windows
            RuntimeError("could not create a primitive"),
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED"),
            caused_by(OSError("Unable to load weights from checkpoint file"), OSError("Cannot allocate memory")),
        ],
        "disk_full": [OSError(number, os.strerror(number)) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)],
        "internal": [KeyError("x")],
    }
    for code, errors in cases.items():
        for error in errors:
            made = trainer.as_trainer_error(error, "training")
            assert made.code == code
            assert "Unable to load" not in made.message, "what ran out is told, not what a library made of it"
            assert made.hint


# ======================================================================================
# command line
# ======================================================================================


@needs_torch
def test_validation_reports_model_dataset_memory_and_hardware(tmp_path: Path, images: Path, models: Path) -> None:
    folder = shutil.copytree(images, tmp_path / "images")
    (folder / "0.txt").write_text("ab " * 52)
    (folder / "4.png").write_text("no image")
    for name in ("3_bird/a.png", "copy.png"):
        save_picture(folder / name, Image.new("RGBA", (64, 64), (9, 9, 9, 99)))
    save_picture(folder / "copy-masklabel.png", Image.new("L", (64, 64)))
    changes = {
        "repeats": 2,
        "validation_split": 0.1,
        "masked_loss": True,
        "regularization_path": str(tmp_path / "prior"),
    }
    save_picture(tmp_path / "prior/a.png", Image.new("RGB", (64, 64), "red"))
    config = write_config(tmp_path, **small(folder, models / "sd21v", tmp_path / "out", epochs=2, **changes))
    result = run("--config", config, "--validate-only")
    assert result.code == 0
    last = result.last
    assert last["valid"] is True
    assert (last["model"]["family"], last["model"]["prediction_type"]) == ("sd21", "v_prediction")
    assert last["model"]["native_resolution"] == 96
    dataset = last["dataset"]
    assert dataset | {"buckets": {}, "suggestions": []} == {
        "images": 6,
        "validation_images": 1,
        "regularization_images": 1,
        "masks": 2,
        "skipped": [{"path": "4.png", "message": "cannot be used: no image of a known format"}],
        "captions": {"sidecar": 4, "folder name": 1, "trigger words": 1},
        "repeats": {"2": 5, "6": 1},
        "buckets": {},
        "steps_per_epoch": sum(math.ceil(count / 2) for count in dataset["buckets"].values()),
        "tokens": {"limit": 75, "longest": 109, "cut": ["0.png"], "common_trigger_words": []},
        "duplicates": [["3_bird/a.png", "copy.png"]],
        "suggestions": [],
    }
    assert "Remove the copies, or use repeats." in dataset["suggestions"]
    assert last["hardware"]["device"]
    assert last["memory"]["total_gb"] > 0
    assert last["config"]["resolution"] == 96
    assert [item["code"] for item in last["warnings"]] == [event["code"] for event in result.of("warning")]
    assert not (tmp_path / "out").exists()


@needs_torch
def test_validation_tells_what_a_start_would_go_on_from(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out")
    train(tmp_path, config, stop=Quiet(after=1))

    def told(**options: Any) -> list[str]:
        events: Any = Recorder()
        trainer.validate(trainer.load_config(str(write_config(tmp_path, **config))), events, **options)
        return [event["message"] for event in events.events if "goes on from" in event.get("message", "")]

    (step,) = {step for step, _ in trainer.numbered(tmp_path / "out/checkpoints", "state_step")}
    assert told() == [f"A start goes on from step {step} of 4."]
    config["lora_rank"] = 8
    with pytest.raises(trainer.TrainerError) as caught:
        told()
    assert caught.value.code == "resume_mismatch"
    assert {item["path"] for item in caught.value.problems} == {"lora_rank", "lora_alpha"}
    assert told(fresh=True) == []


@needs_torch
def test_validation_lists_every_problem_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file/out"
    config = write_config(tmp_path, **small(tmp_path / "no", tmp_path / "nothing", output, device="cuda:15"))
    result = run("--config", config, "--validate-only")
    assert result.code == 1
    assert {item["path"] for item in result.last["problems"]} == {
        "dataset_unreadable",
        "model_not_found",
        "device_unavailable",
        "output_not_writable",
    }


def test_validation_works_without_torch_and_says_so(tmp_path: Path, images: Path) -> None:
    model = hollow_model(tmp_path / "model")
    config = write_config(tmp_path, **small(images, model, tmp_path / "out"))
    code = "import sys; sys.modules['torch'] = None; import train_lora; sys.exit(train_lora.main(sys.argv[1:]))"

    def without_torch(*arguments: str) -> Run:
        done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True)
        return Run(done.returncode, done.stdout, done.stderr)

    result = without_torch("--config", str(config), "--validate-only")
    assert (result.code, result.last["type"]) == (0, "validated")
    assert result.last["hardware"] is None
    assert result.last["dataset"]["tokens"] is None
    assert next(event["code"] for event in result.of("warning")) == "torch_missing"
    trained = without_torch("--config", str(config))
    assert (trained.code, trained.last["code"]) == (1, "dependency_missing")


def test_validation_notices_a_half_downloaded_weight_file(tmp_path: Path, images: Path) -> None:
    model = hollow_model(tmp_path / "model")
    path = model / "unet/diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    result = run("--config", write_config(tmp_path, **small(images, model, tmp_path / "out")), "--validate-only")
    assert (result.code, result.last["code"]) == (1, "model_corrupt")


def test_a_bug_of_ours_is_one_internal_error_and_a_traceback_only_with_debug(tmp_path: Path, images: Path) -> None:
    config = write_config(tmp_path, **small(images, hollow_model(tmp_path / "model"), tmp_path / "out"))
    code = (
        "import sys, train_lora\n"
        "def broken(*_): raise KeyError('bug')\n"
        "train_lora.import_libraries = broken\n"
        "sys.exit(train_lora.main(sys.argv[1:]))\n"
    )
    for extra, traceback in (([], False), (["--debug"], True)):
        arguments = [sys.executable, "-c", code, "--config", str(config), *extra]
        done = subprocess.run(arguments, cwd=ROOT, capture_output=True)
        result = Run(done.returncode, done.stdout, done.stderr)
        assert (result.code, result.last["code"]) == (1, "internal")
        assert ("Traceback" in result.stderr) is traceback


# ======================================================================================
# README, docs and the demo
# ======================================================================================

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/RESULTS.md"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
README = TEXTS["README.md"]
EVENTS_PAGE, DATASETS_PAGE, VRAM_PAGE = (TEXTS[f"docs/{name}.md"] for name in ("events", "datasets", "vram"))


def section(text: str, heading: str) -> str:
    """What stands under a heading, to the next of its level."""
    level = heading.partition(" ")[0]
    found = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, heading
    return found[1]


def marked(text: str, mark: str) -> list[str]:
    """The lines of the table below a mark, without its head."""
    found = re.search(rf"^<!-- {mark} -->\n((?:\|.*\n)+)", text, re.MULTILINE)
    assert found, mark
    return found[1].splitlines()[2:]


def prose(text: str) -> str:
    """What is outside of the fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(text: str, level: str = "##") -> list[str]:
    return re.findall(rf"^{level} (.+)$", prose(text), re.MULTILINE)


def test_the_docs_say_who_draws_a_dora_otherwise() -> None:
    text = " ".join(TEXTS["docs/output.md"].split())
    match = re.search(r"LyCORIS: (.+) draw slightly other pictures, (.+?) wrong ones", text)
    assert match
    for name, reader in READERS.items():
        assert (name in match[1], name in match[2]) == (reader.misread == FROZEN, reader.misread == PER_INPUT)


def test_the_readme_has_its_headings_and_stays_short() -> None:
    assert headings(README) == [
        "Your first LoRA",
        "Features",
        "Installation",
        "Configuration",
        "Usage",
        "Output",
        "Events",
        "Docker",
        "Documentation",
    ]
    assert len(README.splitlines()) <= 350
    assert all(f"]({name})" in section(README, "## Documentation") for name in TEXTS if name != "README.md")


def test_every_error_code_has_one_entry() -> None:
    codes = set(re.findall(r'TrainerError\(\s*"(\w+)"', SCRIPT.read_text("utf-8"))) | set(trainer.HINTS)
    assert codes == set(trainer.HINTS)
    entries = headings(section(TEXTS["docs/troubleshooting.md"], "## By error code"), "###")
    assert entries == list(trainer.HINTS) == EVENT_SCHEMA["definitions"]["error"]["properties"]["code"]["enum"]


def told_warnings() -> set[str]:
    """The codes of warnings in the script: where they are emitted, what a `..._warnings` yields, and the dataset's."""
    tree, codes = ast.parse(SCRIPT.read_text("utf-8")), list(trainer.DATASET_HINTS)
    for node in ast.walk(tree):
        first: Any = None
        if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in ("warning", "warn", "_warn"):
            first = node.args[0]
        elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple) and len(node.value.elts) == 3:
            first = node.value.elts[0]
        if isinstance(first, ast.Constant):
            codes.append(str(first.value))
    return set(codes)


def test_every_warning_code_has_one_entry() -> None:
    entries = [
        re.findall(r"^\| `(\w+)` \|", section(text, heading), re.MULTILINE)
        for text, heading in ((EVENTS_PAGE, "## Warning codes"), (DATASETS_PAGE, "## Warnings"))
    ]
    assert sorted(itertools.chain(*entries)) == sorted(told_warnings())
    assert set(trainer.DATASET_HINTS) <= set(entries[1])


COMMON_FIELDS = ("type", "seq", "timestamp", "elapsed", "dropped")


def event_types(events: Json) -> list[str]:
    return [name for name, row in events["definitions"].items() if "const" in row.get("properties", {}).get("type", {})]


def field_rows(fields: Json, shared: Json) -> list[str]:
    described = {
        key: shared[value["$ref"].rpartition("/")[2]] if "$ref" in value else value for key, value in fields.items()
    }
    return [f"| `{key}` | {value['description']} |" for key, value in described.items()]


def parameter_row(key: str, definition: Json) -> str:
    default = f"`{json.dumps(definition['default'])}`" if "default" in definition else "required"
    return f"| `{key}` | {default} | {definition['description']} |"


def tables(keys: Json, events: Json) -> dict[str, list[str]]:
    """The rows of the tables that the two schemas give, by the mark above each."""
    shared = events["definitions"]
    types = {name: shared[name]["properties"] for name in event_types(events)}
    parts = {name: types["validated"][name]["properties"] for name in ("model", "hardware", "dataset")}
    parts["tokens"] = parts["dataset"]["tokens"]["properties"]
    for name, fields in types.items():
        parts[name] = {key: value for key, value in fields.items() if key not in COMMON_FIELDS}
    parts["common"] = {key: shared[key] for key in COMMON_FIELDS[1:]}
    rows = {f"fields of {name}": field_rows(fields, shared) for name, fields in parts.items()}
    return rows | {"parameters": [parameter_row(key, definition) for key, definition in keys.items()]}


def with_lines(text: str, pattern: str, lines: list[str]) -> str:
    """Replace the lines of JSON that all match by other ones; the last keeps its comma or has none, as it was."""
    block = re.search(rf"(?:^{pattern},?\n)+", text, re.MULTILINE)
    assert block
    end = ",\n" if block[0].endswith(",\n") else "\n"
    return text[: block.start()] + ",\n".join(lines) + end + text[block.end() :]


def derived_schemas() -> tuple[str, str]:
    """The config's schema with a reference to each definition in both shapes, the events' with a rule for each type."""
    schema, events = ((ROOT / name).read_text("utf-8") for name in ("config_schema.json", "docs/events.schema.json"))
    for indent in ("    ", "        "):
        refs = [f'{indent}"{key}": {{"$ref": "#/definitions/{key}"}}' for key in json.loads(schema)["definitions"]]
        schema = with_lines(schema, indent + r'"\w+": \{"\$ref": "#/definitions/\w+"\}', refs)
    types = event_types(json.loads(events))
    events = with_lines(events, r'      "enum": \["start".*\]', [f'      "enum": {json.dumps(types)}'])
    rule = '    {{"if": {{"properties": {{"type": {{"const": "{0}"}}}}}}, "then": {{"$ref": "#/definitions/{0}"}}}}'
    return schema, with_lines(events, r'    \{"if": .*\}', [rule.format(name) for name in types])


def derived_example(keys: Json) -> str:
    shown: Json = json.loads((ROOT / "example_config.json").read_text("utf-8"))
    nested = shown["training_params"]
    shown["training_params"] = {key: nested.get(key, keys[key]["default"]) for key in keys if key not in shown}
    return json.dumps(shown, indent=2) + "\n"


def derived() -> dict[Path, str]:
    """All that follows from the definitions in the two schemas; `python test_trainer.py --write` writes it."""
    schema, events = derived_schemas()
    keys = json.loads(schema)["definitions"]
    texts = {ROOT / "config_schema.json": schema, ROOT / "docs/events.schema.json": events}
    texts[ROOT / "example_config.json"] = derived_example(keys)
    rows = tables(keys, json.loads(events))
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        texts[page] = re.sub(
            r"^(<!-- ([a-z ]+) -->\n(?:\|.*\n){2})((?:\|.*\n)*)",
            lambda found: found[1] + ("".join(f"{row}\n" for row in rows[found[2]]) if found[2] in rows else found[3]),
            page.read_text("utf-8"),
            flags=re.MULTILINE,
        )
    return texts


def test_what_follows_from_the_schemas_is_written_down() -> None:
    stale = [path.name for path, text in derived().items() if path.read_text("utf-8") != text]
    assert not stale, "python test_trainer.py --write"
    told = {mark for text in TEXTS.values() for mark in re.findall(r"^<!-- ([a-z ]+) -->", text, re.MULTILINE)}
    assert told >= tables(SCHEMA["definitions"], EVENT_SCHEMA).keys()


def test_every_event_has_a_section_and_each_term_of_the_memory_a_row() -> None:
    types = set(re.findall(r'\b(?:emit|tell)\(\s*"(\w+)"', SCRIPT.read_text("utf-8")))
    assert set(EVENT_SCHEMA["properties"]["type"]["enum"]) == types > set(trainer.LAST_TYPES)
    assert headings(section(EVENTS_PAGE, "## Types"), "###") == EVENT_SCHEMA["properties"]["type"]["enum"]
    terms = re.findall(r"^\| `(\w+)` \|", section(TEXTS["docs/vram.md"], "## Terms"), re.MULTILINE)
    report = EVENT_SCHEMA["definitions"]["validated"]["properties"]
    assert {f"{term}_gb" for term in terms} == set(report["memory"]["properties"])


def test_what_the_memory_page_sets_for_a_card_leaves_a_tenth_of_it() -> None:
    rows = [re.findall(r"(\d+) GB|`(\{.*?\})` ([\d.]+)(, checkpointing)?", row) for row in marked(VRAM_PAGE, "cards")]
    assert [int(row[0][0]) for row in rows] == list(memory.CARDS_GIB)
    for card, *cells in rows:
        for (family, side), (_, keys, told, lean) in zip((("sd15", 512), ("sdxl", 1024)), cells, strict=True):
            row = memory.setting(family, side, bool(lean), **json.loads(keys))
            fast = memory.setting(family, side, False, **json.loads(keys)).estimate()["total"]
            needed, most = row.estimate()["total"], 0.9 * int(card[0]) * 1024**3
            assert (told, bool(lean)) == (f"{needed / 1024**3:.1f}", fast > most)
            assert needed <= most
            check_config(json.loads(keys))


# Blocks of the pages. Each is executed or validated, by its language; one that nobody checks fails.


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line} {self.language}"


def blocks_of(page: str) -> Iterator[Block]:
    text = TEXTS[page]
    for found in re.finditer(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", text, re.MULTILINE):
        line, body = text[: found.start()].count("\n") + 1, re.sub(f"^{found[1]}", "", found[3], flags=re.MULTILINE)
        yield Block(page, line, found[2], body)


BLOCKS = [block for page in TEXTS for block in blocks_of(page)]
RUN_ELSEWHERE = {  # (page, language): the test that has all of these blocks
    ("README.md", "python"): "test_the_first_lora_comes_out_as_the_readme_says",
    ("docs/embedding.md", "js"): "test_a_parent_shows_stops_and_resumes_a_run",
    ("docs/embedding.md", "python"): "test_a_parent_shows_stops_and_resumes_a_run",
    ("docs/health.md", "json"): "test_the_health_page_describes_every_field_and_states_the_time",
}


def test_no_block_of_the_pages_is_overlooked() -> None:
    fences = sum(len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) for text in TEXTS.values())
    assert fences == 2 * len(BLOCKS)
    assert all(callable(globals()[name]) for (page, _), name in RUN_ELSEWHERE.items() if page in TEXTS)
    ours = [block.text for block in BLOCKS if (block.page, block.language) == ("README.md", "bash")]
    assert ours[0].endswith("train_lora.py --config demo/config.json > /dev/null\n")
    assert ours[1].endswith(".venv/bin/python test_trainer.py\n")  # .ci/run runs the second one


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_of_the_pages_is_run_or_validated_and_docker_and_pip_match_a_pattern(
    tmp_path: Path, block: Block
) -> None:
    if (block.page, block.language) not in RUN_ELSEWHERE:
        CHECKS[block.language](block.text, tmp_path)


def check_config(document: Json, overrides: tuple[str, ...] = ()) -> None:
    """Let the loader check a config or a part of one, on any machine: packages that are missing do not count."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            parse(Path(folder), REQUIRED | document, overrides)
        except trainer.TrainerError as error:
            faults = [item for item in error.problems if not item["message"].startswith("needs the package")]
            assert error.problems, error.message
            assert not faults, faults


def check_json(text: str, _: Path) -> None:
    """An event per line, or a config."""
    documents = [json.loads(line) for line in text.splitlines()] if '"type"' in text else [json.loads(text)]
    for document in documents:
        EVENT_VALIDATOR.validate(document) if "type" in document else check_config(document)


def check_jsonl(text: str, _: Path) -> None:
    assert all(trainer.parse_metadata(line) for line in text.splitlines())


def check_text(text: str, folder: Path) -> None:
    """The options of the script, or files in a folder as a tree; a dataset is scanned, and nothing is wrong with it."""
    if text.startswith("train_lora.py"):
        assert {*re.findall(r"--[a-z-]+", text)} == script_options()
    elif text.startswith("my_photos/"):
        make_tree(text, folder)
        document = REQUIRED | {"dataset_path": str(folder / "my_photos"), "masked_loss": "mask" in text}
        found = scan_quietly(parse(folder, document))
        pictures = [name for name, _ in tree_lines(text) if not name.endswith((".txt", trainer.MASK_SUFFIX))]
        assert [example.name for example in found.examples] == pictures
        assert not found.flaws
    else:
        assert text.startswith("output_path/")  # test_the_first_lora_comes_out_as_the_readme_says


def tree_lines(text: str) -> list[tuple[str, str]]:
    """The files below a tree's first line, with what is said of each."""
    lines = [line.strip().partition("  ") for line in text.splitlines()[1:]]
    return [(name, said.strip()) for name, _, said in lines]


def make_tree(text: str, folder: Path) -> None:
    for number, (name, said) in enumerate(tree_lines(text)):
        path = folder / "my_photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(said, "utf-8") if path.suffix == ".txt" else draw_image(path, (64, 64), number)


def script_options() -> set[str]:
    return {*re.findall(r'add_argument\("(--[a-z-]+)"', SCRIPT.read_text("utf-8")), "--help"}


def check_python(text: str, folder: Path) -> None:
    run_block([sys.executable, "-c", text])


def run_block(command: list[str]) -> None:
    if not HAS_TORCH or os.name == "nt":
        pytest.skip("it trains, by a POSIX shell or with its signals")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def check_bash(text: str, _: Path) -> None:
    """Run what makes a folder for itself as it stands; of other blocks look at every command."""
    if "mktemp" in text:
        run_block(["bash", "-euo", "pipefail", "-c", text])
        return
    commands = [words for line in text.replace("\\\n", " ").splitlines() for words in shell_commands(line)]
    assert commands
    for words in commands:
        check_command(words)


def check_powershell(text: str, folder: Path) -> None:
    check_bash(text.replace("\\", "/"), folder)


def shell_commands(line: str) -> list[list[str]]:
    """Split a line into its commands' words, without assignments in front, redirections and comments."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="<>|&;")
    lexer.whitespace_split = True
    commands: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;"):
            commands.append([])
        elif set(word) <= set("<>&"):
            next(lexer)
        elif commands[-1] or not re.match(r"\w+=", word):
            commands[-1].append(word)
    return [words for words in commands if words]


def check_command(words: list[str]) -> None:
    """Hold a command against what its program takes: ours by its own parser, others by the forms that we use."""
    if "train_lora.py" in words:  # behind python, accelerate launch, torchrun and their options
        check_call(words[words.index("train_lora.py") + 1 :])
    elif words[0] == "docker" and "--config" in words:  # the image's entry point is the script
        check_call(words[min(words.index(option) for option in script_options() if option in words) :])
    else:
        line = " ".join([words[0].rpartition("/")[2], *words[1:]])
        found = next(filter(None, (re.fullmatch(form, line) for form in KNOWN_COMMANDS)), None)
        assert found, f"nobody checks: {line}"
        for name in found.groupdict().get("names", "").split():
            assert (ROOT / name).exists() or re.search(rf"^(# )?{re.escape(name)}\b", REQUIREMENTS, re.MULTILINE), name
        for option in re.findall(r"(?<= )--[\w-]+", line) if found.groupdict().get("ours") else ():
            assert f'"{option}"' in (ROOT / found["ours"]).read_text("utf-8"), option


REQUIREMENTS = (ROOT / "requirements.txt").read_text("utf-8")
KNOWN_COMMANDS = [  # `names` are files of ours or packages in requirements.txt, `ours` a script whose options are known
    r"(python3?(\.\d+)?|py) -m (venv (\.venv|build/\w+)|json\.tool)",
    r"python3? -m pytest -q (-n [02] )?test_trainer\.py( -k [\w ]+)?",
    r"source \.venv/bin/activate",
    r"pre-commit install",
    r"sed s/>=\\\(\[0-9\]\\\)/==\\1/ requirements\.txt",  # lower bounds as versions
    r"pip install -r build/\w+/requirements\.txt",
    r"pip install (-U )?(-r )?(?P<names>[\w.-]+( [\w-]+)*)( --index-url https://download\.pytorch\.org/whl/\w+)?",
    r"python3? (?P<ours>test_trainer\.py)( .+)?",
    r"python3? (?P<ours>(benchmarks|demo)/\w+\.py)( .+)?",
    r"(python parent\.py|node parent\.mjs) (?P<names>[\w/.]+) [\w/]+",
    r"docker (build|compose|exec|inspect|logs|ps|run|stop) .+",
    r"curl (-\w )?http://127\.0\.0\.1:\d+/(health|status)",
    r"mkdir -p \w+( \w+)*",
    r"tensorboard --logdir \w+",
    r"(cat|tail -n 1)( \w+\.jsonl)+",
]


def check_call(arguments: list[str]) -> None:
    """Let the script's own parser and loader have the arguments of a call."""
    options = trainer.parse_arguments(arguments)
    check_config({}, tuple(options.set))
    if options.config.startswith("demo/"):
        assert (ROOT / options.config).exists()


def check_yaml(text: str, _: Path) -> None:
    """A file for a container engine: it can be read, and the script takes the arguments in it."""
    yaml = pytest.importorskip("yaml")
    waiting = [yaml.safe_load(text)]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            waiting += part.values()
        elif isinstance(part, list):
            waiting += part
            if "--config" in part:
                check_call(part)


CHECKS: dict[str, Callable[[str, Path], None]] = {
    "bash": check_bash,
    "json": check_json,
    "jsonl": check_jsonl,
    "powershell": check_powershell,
    "python": check_python,
    "text": check_text,
    "yaml": check_yaml,
}


def test_the_first_lora_without_a_gpu_has_the_demos_model_and_settings() -> None:
    told = re.findall(r'`("\w+": [^`]+)`', section(section(README, "## Your first LoRA"), "### 4. Write the config"))
    instead = json.loads(f"{{{', '.join(told)}}}")
    demo = json.loads((ROOT / "demo/config.json").read_text("utf-8"))
    assert instead == {"base_model": "demo/base"} | {key: demo[key] for key in ("steps", "learning_rate", "batch_size")}
    assert (ROOT / instead["base_model"] / "model_index.json").is_file()


@needs_torch
@posix
def test_the_first_lora_comes_out_as_the_readme_says(tmp_path: Path, models: Path) -> None:
    """The section's files and commands in a folder of their own, with a tiny model and two steps for 250."""
    steps = section(README, "## Your first LoRA")
    found = {block.language: block.text for block in BLOCKS if block.page == "README.md" and block.text in steps}
    commands = [block.text for block in BLOCKS if block.language == "bash" and block.text in steps]
    for name in ("train_lora.py", "config_schema.json"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (tmp_path / ".venv/bin/python").chmod(0o755)
    make_tree(found["text"], tmp_path)
    config = json.loads(found["json"])
    assert config["base_model"] == "sd15"
    assert (config["validation_steps"], config["checkpoint_steps"]) == (250, 250)
    few: Json = {"base_model": str(models / "sd15"), "steps": 4, "validation_steps": 2, "checkpoint_steps": 2}
    write_json(tmp_path / "my_lora.json", config | few | {"sample_steps": 2})

    def follow(*command: str) -> str:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return done.stderr

    checked = follow("bash", "-c", commands[0])
    for start in re.findall(r"`([\w ]+:?)`(?=[^|]* \|.* \|$)", section(steps, "### 5. Check"), re.MULTILINE):
        assert start == "Error:" or re.search(rf"^ *{start} ", checked, re.MULTILINE), start
    follow("bash", "-c", commands[1])
    told = re.findall(r"`([\w/]+\.(?:png|html|safetensors))`", section(steps, "### 6. Train"))
    assert len(told) == 5
    output = tmp_path / config["output_path"]
    order = [event["type"] for event in logged(output / "events.jsonl") if event.get("step") == 2]
    assert order == ["progress", "checkpoint", "sample", "sample"]  # as docs/events.md says
    assert all((output / name.replace("250", "2")).is_file() for name in told)
    code = found["python"].replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(models / "sd15"))
    follow(sys.executable, "-c", code)
    assert len({path.read_bytes() for path in tmp_path.glob("picture_*.png")}) == 4

    tree = next(block.text for block in BLOCKS if block.text.startswith("output_path/"))
    names = [
        re.sub(r"\\?\d+", r"\\d+", re.escape(name)).replace("lora_", "(my_)?lora_") for name, _ in tree_lines(tree)
    ]
    files = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
    for name in names:
        assert any(re.fullmatch(name, file) for file in files), name
    for file in files:
        assert file == ".lock" or any(re.fullmatch(name, file) for name in names), file


OURS = {
    path: path.read_text("utf-8")
    for pattern in ("*.py", "*.json", "*.txt", "*/*.py", "docs/*.json", "Dockerfile")
    for path in ROOT.glob(pattern)
}
OTHERS_OPTIONS = {"--all-files", "--build-arg", "--gpus", "--help", "--index-url", "--python-version", "--read-only"}
OTHERS_OPTIONS |= {"--tmpfs", "--user"}


@pytest.mark.parametrize("page", TEXTS)
def test_what_stands_in_backticks_exists(page: str) -> None:
    """Commands, options, names with an underscore (of keys, fields, codes, functions), paths, values of config keys."""
    examples = " ".join(block.text for block in BLOCKS)
    known = {word for text in (*OURS.values(), examples) for word in re.findall(r"\w+", text)}
    known |= set(
        re.findall(r"^\| `(\w+)` \|", TEXTS["docs/health.md"], re.MULTILINE)
    )  # held to /status by its own test
    options = {option for text in OURS.values() for option in re.findall(r'add_argument\("(--[\w-]+)"', text)}
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(TEXTS[page])):
        if re.match(r"\S*(python3?|pip|docker|accelerate|torchrun|tensorboard) -*\w+ ", span) and "…" not in span:
            check_bash(span, ROOT)
        else:
            assert {*re.findall(r"(?<![\w-])--[a-z][\w-]+", span)} <= options | OTHERS_OPTIONS, span
        for word in re.findall(r"(?<![\w./{-])[a-z]+(?:_[a-z0-9]+)+(?![\w./*…])", span):
            assert word in known, f"{word} in {span}"
        if re.match(r"(docs|benchmarks|demo)/(?!output)[\w/.]+$", span):
            assert (ROOT / span).exists(), span
    for key, value in re.findall(r"`(\w+)`:? `(\"[^`]+\"|[\d.e-]+|true|false|null)`", prose(TEXTS[page])):
        if key in SCHEMA["definitions"]:
            jsonschema.validate(json.loads(value), SCHEMA["definitions"][key])


def slug(heading: str) -> str:
    """As GitHub makes an anchor of it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_between_the_pages_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(TEXTS[page])):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in map(slug, headings(path.read_text("utf-8"), "#+")), target


@needs_torch
def test_the_demo_teaches_its_concept_and_old_prompts_stay(tmp_path: Path) -> None:
    """The README's first command, and the numbers that benchmarks/demo_quality.py gives for its LoRA."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))  # threads that share a core wait for each other
    environment = os.environ | {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // workers))}
    arguments = command("--config", ROOT / "demo/config.json", "--set", f"output_path={tmp_path}")
    done = subprocess.run(arguments, capture_output=True, env=environment, timeout=1200)
    result = Run(done.returncode, done.stdout, done.stderr)
    assert (result.code, result.last["type"]) == (0, "complete")
    assert [event["step"] for event in result.of("sample") if event["index"] == 0] == [0, 200, 400]
    arguments = [sys.executable, str(ROOT / "benchmarks/demo_quality.py"), "--lora", result.last["final_path"]]
    settings = ["--samples", "6", "--steps", "15", "--batch-size", "6"]
    done = subprocess.run([*arguments, *settings], capture_output=True, env=environment, timeout=1200, check=True)
    closeness = {
        prompt: (measured["before"]["closeness"], measured["after"]["closeness"])
        for prompt, measured in json.loads(done.stdout)["prompts"].items()
    }
    for prompt in ("a red zorb", "a blue zorb"):
        before, after = closeness[prompt]
        assert after > before + 0.1, prompt
    for prompt in ("a red circle", "a blue square"):
        before, after = closeness[prompt]
        assert after > before - 0.2, prompt


DOCKERFILE = re.sub(r"^#.*\n|\\\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} +(.+)$", DOCKERFILE, re.MULTILINE)


def test_the_image_is_what_the_readme_says() -> None:
    assert instructions("ARG")[0] == "BASE_IMAGE=nvidia/cuda:11.8.0-base-ubuntu22.04"
    assert f'image.version="{trainer.VERSION}"' in DOCKERFILE
    said = section(README, "## Docker")
    assert {f"{name}=" for name in re.findall(r"--build-arg (\w+)=", said)} == {
        re.sub("=.*", "=", argument) for argument in instructions("ARG")
    }
    assert f"without `--user`: {instructions('USER')[0]})" in said
    for variable in ("HF_HOME=/models", "LORA_HEALTH_PORT=8080"):
        assert variable in instructions("ENV")[-1].split()


def test_the_files_of_the_image_are_enough_to_validate_its_demo(tmp_path: Path) -> None:
    """Copies what COPY names and .dockerignore lets through."""
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    copied = [(name, copy.split()[-1]) for copy in instructions("COPY") for name in copy.split()[:-1]]
    assert sorted(name for name, _ in copied) == sorted(allowed)
    for name, target in copied:
        place = tmp_path / target.strip("/")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, place, ignore=shutil.ignore_patterns("output"))
        else:
            place.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, place)
    script = json.loads(instructions("ENTRYPOINT")[0])[1]
    arguments = ["--config", "app/demo/config.json", "--set", "output_path=output", "--validate-only"]
    done = subprocess.run([sys.executable, script.strip("/"), *arguments], cwd=tmp_path, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["type"] == "validated", done.stderr


def docker_runs() -> list[list[str]]:
    """The words of every `docker run` in the README's section, and what the compose file says as such a line."""
    lines = section(README, "## Docker").replace("\\\n", " ")
    runs = [
        shlex.split(line, comments=True) for line in re.findall(r"(?:^|`)(docker run [^`\n]+)", lines, re.MULTILINE)
    ]
    yaml = pytest.importorskip("yaml")
    service = yaml.safe_load((ROOT / "docs/compose.yaml").read_text("utf-8"))["services"]["train"]
    volumes = [word for volume in service["volumes"] for word in ("-v", volume)]
    return [*runs, ["docker", "run", *volumes, service["image"], *service["command"]]]


def test_docker_runs_mount_the_volumes_of_the_image_and_keep_to_them() -> None:
    volumes = {*json.loads(instructions("VOLUME")[0])} - {"/tmp"}
    for words in docker_runs():
        options, arguments = words[: words.index("train-lora")], words[words.index("train-lora") + 1 :]
        mounted = {word.split(":")[1] for option, word in itertools.pairwise(options) if option == "-v"}
        assert mounted in (set(), volumes)
        check_call(arguments)
        paths = re.findall(r"(?:^|=)(/\w+)", "\n".join(arguments), re.MULTILINE)
        assert paths
        assert {*paths} <= (mounted or volumes | {"/app"})
    assert len(docker_runs()) == 5


@posix
@pytest.mark.parametrize("form", ["{}", "127.0.0.1:{}", "0.0.0.0:{}"])
def test_the_health_check_of_the_image_follows_the_health_port(form: str) -> None:
    check = instructions("HEALTHCHECK")[0].partition(" CMD ")[2]

    def checked(address: str | None) -> int:
        environment = {name: text for name, text in os.environ.items() if name != "LORA_HEALTH_PORT"}
        environment |= {
            "http_proxy": "http://127.0.0.1:9",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        environment |= {} if address is None else {"LORA_HEALTH_PORT": address}
        return subprocess.run(["sh", "-c", check], env=environment, stderr=subprocess.DEVNULL, timeout=60).returncode

    answer = 200

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(answer if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = form.format(server.server_port)
        assert checked(address) == 0
        answer = 503
        assert checked(address) == 1
        server.shutdown()
    assert checked(address) == 1
    assert (checked(""), checked(None)) == (0, 0)


# ======================================================================================
# embedding, contributing, changelog
# ======================================================================================

EMBEDDING = (ROOT / "docs/embedding.md").read_text("utf-8")
PARENTS = {"python": ".py", "js": ".mjs"}


def parent(folder: Path, language: str, config: Path, cwd: Path) -> subprocess.Popen[str]:
    """Start a parent of docs/embedding.md as it stands there; it writes to folder/out."""
    interpreter = sys.executable if language == "python" else shutil.which("node")
    if not interpreter:
        pytest.skip("node is not installed")
    path = folder / f"parent{PARENTS[language]}"
    path.write_text(fenced(EMBEDDING, language), "utf-8")
    return subprocess.Popen(
        [interpreter, path, config, folder / "out"],
        env=os.environ | {"PYTHON": sys.executable},
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    )


def fenced(text: str, language: str) -> str:
    (block,) = re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return str(block)


def told_until(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout
    assert any(words in line for line in process.stdout), words


def last_logged(folder: Path) -> Json:
    """Wait for the end of a run that nobody may be waiting for any more; its last event."""
    deadline = time.monotonic() + 60
    with (folder / ".lock").open("ab") as lock:
        while not trainer.lock_file(lock):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    return dict(json.loads((folder / "events.jsonl").read_bytes().splitlines()[-1]))


@pytest.mark.parametrize("language", PARENTS)
def test_a_parent_takes_under_40_lines(language: str) -> None:
    assert len(fenced(EMBEDDING, language).splitlines()) < 40


@needs_torch
@posix
@pytest.mark.parametrize("language", PARENTS)
def test_a_parent_shows_stops_and_resumes_a_run(tmp_path: Path, language: str) -> None:
    demo = json.loads((ROOT / "demo/config.json").read_text("utf-8"))
    demo |= {key: str(ROOT / "demo" / demo[key]) for key in ("dataset_path", "base_model")}
    demo |= {"validation_steps": 0, "sample_at_start": False, "batch_size": 1}
    with parent(tmp_path, language, write_config(tmp_path, **demo | {"steps": 100_000}), ROOT) as process:
        told_until(process, "step 3 of 100000, ")
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
    ended = last_logged(tmp_path / "out")
    if language == "js" or sys.version_info >= (3, 11):  # before, Ctrl-C cancels every task: the page says so
        assert rest.endswith("last event: interrupted, exit code: 143\n")
        assert process.returncode == 143
    saved = ended["step"]
    with parent(tmp_path, language, write_config(tmp_path, **demo | {"steps": saved + 2}), ROOT) as process:
        told, _ = process.communicate(timeout=120)
    assert re.findall(r"^step (\d+) of", told, re.MULTILINE) == [str(saved + 1), str(saved + 2)]
    assert told.endswith("last event: complete, exit code: 0\n")
    assert process.returncode == 0
    assert re.search(r"^Encoding images\. \d+ of \d+$", told, re.MULTILINE)
    assert "Complete: " in (tmp_path / "out/stderr.log").read_text("utf-8")
    assert not (tmp_path / "out/stop").exists()


HOSTILE = """
import json, os, sys, time
def say(text):
    sys.stdout.write(text)
    sys.stdout.flush()
    time.sleep(0.1)
say('{"type": "start", "protocol": 1}\\n{"type": "pro')
say('gress", "step": 1, "total_steps": 2, "eta_seconds": null, "new": [1]}\\n{"type": "news", "what": 1}\\n')
say(json.dumps({"type": "info", "message": "x" * 300_000}) + "\\n")
"""


@posix
@pytest.mark.parametrize("language", PARENTS)
def test_a_parent_takes_pieces_long_lines_and_unknown_ones_and_sees_a_child_die(tmp_path: Path, language: str) -> None:
    dies = 'say(\'{"type": "comp\')\nos.kill(os.getpid(), 9)'
    (tmp_path / "train_lora.py").write_text(HOSTILE + dies, "utf-8")
    with parent(tmp_path, language, tmp_path / "x.json", tmp_path) as process:
        told, _ = process.communicate(timeout=60)
    first, long, last = told.splitlines()
    assert (first, long.strip()) == ("step 1 of 2, 0 s left", "x" * 300_000)
    assert last == f"last event: info, exit code: {-9 if language == 'python' else 'SIGKILL'}"
    assert process.returncode != 0


@pytest.mark.parametrize("language", PARENTS)
def test_a_parent_without_arguments_says_how_it_is_called(tmp_path: Path, language: str) -> None:
    program = sys.executable if language == "python" else shutil.which("node")
    if not program:
        pytest.skip("node is not installed")
    path = tmp_path / f"parent{PARENTS[language]}"
    path.write_text(fenced(EMBEDDING, language), "utf-8")
    done = subprocess.run([program, path], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, f"usage: {path.name} CONFIG OUTPUT\n")


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_a_parent_in_node_says_that_the_interpreter_in_its_environment_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "parent.mjs"
    path.write_text(fenced(EMBEDDING, "js"), "utf-8")
    environment = os.environ | {"PYTHON": str(tmp_path / "none")}
    command = ["node", str(path), "x.json", str(tmp_path / "out")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (127, f"PYTHON: spawn {tmp_path / 'none'} ENOENT\n")


@posix
@pytest.mark.torture
@pytest.mark.parametrize("language", PARENTS)
def test_a_parent_kills_a_child_that_does_not_stop(tmp_path: Path, language: str) -> None:
    (tmp_path / "train_lora.py").write_text(f"{HOSTILE}\ntime.sleep(60)", "utf-8")
    with parent(tmp_path, language, tmp_path / "x.json", tmp_path) as process:
        told_until(process, "xxx")
        process.send_signal(signal.SIGINT)
        told, _ = process.communicate(timeout=30)
    assert "exit code: -9" in told or "exit code: SIGKILL" in told
    assert not (tmp_path / "out/stop").exists()


CONTRIBUTING = TEXTS["docs/CONTRIBUTING.md"]
PLACES = {
    title: re.findall(r"^\d\. `([^`]+)`: (.+)$", body, re.MULTILINE)
    for title, body in re.findall(r"^### (An? .+)\n((?:(?!#).*\n)*)", CONTRIBUTING, re.MULTILINE)
}


def test_each_addition_takes_at_most_three_places_and_all_that_is_named_is_there() -> None:
    assert set(PLACES) == {"A config key", "An event", "An optimizer", "A model family"}
    for title, places in PLACES.items():
        assert 1 < len(places) <= 3, title
        for file, told in places:
            source = (ROOT / file).read_text("utf-8")
            names = re.findall(r"`([A-Za-z_-]+)`", told)
            assert [name for name in names if name not in source] == [], (title, file)
    for name in re.findall(r"`((?:docs|benchmarks|\.ci)/[\w.]+)`", CONTRIBUTING):
        assert (ROOT / name).exists(), name


def test_each_selection_of_tests_finds_some() -> None:
    tests = [name.lower() for name in globals() if name.startswith("test_")]
    for selection in re.findall(r'^\|.*`"(.+)"`', section(CONTRIBUTING, "## Checks"), re.MULTILINE):
        for word in selection.split(" or "):
            assert any(word in name for name in tests), word


def test_the_newest_version_of_the_changelog_is_the_scripts() -> None:
    versions = re.findall(
        r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d|unreleased)$", TEXTS["docs/CHANGELOG.md"], re.MULTILINE
    )
    assert len(versions) == len(headings(TEXTS["docs/CHANGELOG.md"]))
    assert versions[0][0] == trainer.VERSION
    assert "unreleased" not in [date for _, date in versions[1:]]


def test_the_hooks_before_a_commit_are_checks_of_ci() -> None:
    hooks = re.findall(r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text("utf-8"), re.MULTILINE)
    assert len(hooks) == 3
    ci = (ROOT / ".ci/run").read_text("utf-8")
    assert [hook for hook in hooks if f".venv/bin/{hook}" not in ci] == []


# ======================================================================================
# the torture run: python test_trainer.py -m torture -s
# ======================================================================================

FORK_SERVER = """
import json, os, sys
import train_lora
train_lora.import_libraries()
for line in sys.stdin:
    config, events = json.loads(line)
    child = os.fork()
    if not child:
        null = os.open(os.devnull, os.O_RDWR)
        out = os.open(events, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for descriptor, target in ((null, 0), (out, 1), (null, 2)):
            os.dup2(descriptor, target)
        os._exit(train_lora.main(["--config", config]))
    print(child, flush=True)
    print(os.waitpid(child, 0)[1], flush=True)
"""


class Forks:
    """Runs of the script as forks of one process that has the heavy imports behind it: seconds less for each."""

    def __init__(self) -> None:
        self.server = subprocess.Popen(
            [sys.executable, "-c", FORK_SERVER], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def start(self, config: Path, events: Path) -> int:
        assert self.server.stdin
        self.server.stdin.write(json.dumps([str(config), str(events)]) + "\n")
        self.server.stdin.flush()
        return int(self.answer())

    def answer(self) -> str:
        assert self.server.stdout
        return self.server.stdout.readline()

    def wait(self) -> int:
        return os.waitstatus_to_exitcode(int(self.answer()))

    def kill_after(self, delay: float, config: Path, events: Path) -> bool:
        """Run and SIGKILL; False when the run had ended before."""
        child = self.start(config, events)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        code = self.wait()
        assert code in (0, -signal.SIGKILL)
        return code != 0

    def close(self) -> None:
        assert self.server.stdin
        self.server.stdin.close()
        self.server.wait(timeout=60)


KILLED_RUNS: list[Json] = [
    {"lr_scheduler": "cosine", "lr_warmup_steps": 20, "lora_dropout": 0.1},
    {"batch_size": 1, "checkpoint_limit": 3, "lr_scheduler": "linear"},
    {"gradient_accumulation_steps": 2, "validation_steps": 10, "sample_at_start": True},
    {"gradient_checkpointing": True, "mixed_precision": "bf16", "checkpoint_limit": 1},
]


@pytest.mark.torture
@posix
@needs_torch
def test_two_hundred_kills_lose_no_checkpoint_and_change_no_bit(tmp_path: Path, images: Path, models: Path) -> None:
    moments = random.Random(3)
    forks = Forks()
    kills = finished = lost_steps = 0
    while kills < 200:
        changes = {"steps": 120, "checkpoint_steps": 2, **KILLED_RUNS[finished % 4], "seed": finished}
        kind, folder = ("sd15", "sdxl")[finished // 2 % 2], tmp_path / str(finished)
        folder.mkdir()
        whole = write_config(folder, **small(images, models / kind, folder / "whole", **changes))
        started = time.monotonic()
        forks.start(whole, folder / "whole.jsonl")
        assert forks.wait() == 0
        events = logged(folder / "whole.jsonl")
        duration, training = (
            time.monotonic() - started,
            {e["step"]: e["loss"] for e in events if e["type"] == "progress"},
        )
        setup = next(event["elapsed"] for event in events if event["type"] == "progress") - events[0]["elapsed"]
        config = folder / "parts.json"
        write_json(config, small(images, models / kind, folder / "parts", **changes))
        checkpoints, stream = folder / "parts/checkpoints", folder / "parts.jsonl"
        saved = 0

        def moment(setup: float = setup, rest: float = duration - setup) -> float:
            return setup * moments.random() if moments.random() < 0.4 else setup + moments.uniform(0, rest / 8)

        while forks.kill_after(moment(), config, stream):
            kills += 1
            saved = max([saved, *(event["step"] for event in logged(stream) if event["type"] == "checkpoint")])
            files = [path for path in (folder / "parts").rglob("*.safetensors") if not path.name.startswith(".")]
            assert all(tensors_of(path) for path in files), "a file that cannot be read"
            states = trainer.numbered(checkpoints, "state_step") if checkpoints.exists() else []
            assert all(trainer.decode_state(path) for _, path in states)
            newest = states[0][0] if states else 0
            assert newest >= saved, "a checkpoint that was announced is gone"
            last = [event["step"] for event in logged(stream) if event["type"] == "progress"]
            lost_steps = max([lost_steps, *(step - newest for step in last)])
        finished += 1
        names = [{path.relative_to(out) for path in out.rglob("*")} for out in (folder / "whole", folder / "parts")]
        assert names[0] == names[1], "temporaries or missing files"
        for path in (folder / "whole").rglob("*.safetensors"):
            assert_same_tensors(path, folder / "parts" / path.relative_to(folder / "whole"))
        for event in logged(folder / "parts/events.jsonl"):
            assert event["type"] != "progress" or event["loss"] == training[event["step"]]
    forks.close()
    assert lost_steps <= 2
    print(f"\n{kills} kills over {finished} runs; never more than {lost_steps} steps to do again")


STRACE = ["strace", "-f", "-e", "trace=%file,%desc,fsync"]


def traced_save(made: trainer.LoRATrainer, log: Path, *options: str) -> bool:
    """Save in a copy of this process under strace; False when it was killed."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        with contextlib.suppress(BaseException):
            select.select([reading], [], [])  # a call that a save does not make: one that is under way counts or not
            made.save()
            os._exit(0)
        os._exit(1)
    with subprocess.Popen(
        [*STRACE, *options, "-o", str(log), "-p", str(child)], stderr=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stderr
        if "attached" not in tracer.stderr.readline():
            os.kill(child, signal.SIGKILL)
            pytest.skip("strace may not attach here")
        os.write(writing, b"x")
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.close(reading)
    os.close(writing)
    assert code in (0, -signal.SIGKILL)
    return code == 0


@pytest.mark.torture
@needs_torch
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_at_every_system_call_of_a_save_leaves_a_good_state(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", checkpoint_steps=1, checkpoint_limit=2, steps=3)
    made = prepare(tmp_path, config)
    assert made.train()
    made.state = dataclasses.replace(made.state, step=4)
    before, log = tmp_path / "before", tmp_path / "log"
    shutil.copytree(tmp_path / "out", before)

    def reset() -> None:
        shutil.rmtree(tmp_path / "out")
        shutil.copytree(before, tmp_path / "out")

    assert traced_save(made, log)
    calls = [match[1] for line in log.read_text().splitlines() if (match := re.match(r"\d+ +(\w+)\(", line))]
    ours = ("mmap", "select", "pselect6", "restart_syscall")  # malloc's too, so their number varies; our own wait
    calls = [call for call in calls if call not in ours]
    order = [call for call in calls if call in ("fsync", "rename", "unlink", "write")]
    print("\n" + " ".join(order))
    assert [call for call in order if call != "write"] == ["fsync", "rename", "fsync"] * 2 + ["unlink"] * 2
    assert order[0] == order[4] == "write"
    tried = collections.Counter(calls)
    found: collections.Counter[int] = collections.Counter()
    for call, count in tried.items():
        for number in range(1, count + 1):
            reset()
            assert not traced_save(made, log, "-e", f"inject={call}:signal=KILL:when={number}")
            states = trainer.numbered(made.folder.checkpoints, "state_step")
            point = trainer.find_resume_point(states, made.run_id, lambda *w: pytest.fail(str(w)))
            assert point
            found[point.state.step] += 1
            assert len(trainer.numbered(made.folder.checkpoints, "lora_step")) >= 2
    assert set(found) == {3, 4}
    print(f"killed at each of {tried.total()} calls {dict(tried)}; newest good state {dict(found)}")


@pytest.mark.torture
@posix
@needs_torch
def test_a_hundred_stops_at_random_moments_end_as_promised(tmp_path: Path, images: Path, models: Path) -> None:
    moments = random.Random(4)
    changes = {"steps": 100_000, "checkpoint_steps": 7, "validation_steps": 5, "sample_at_start": True}
    waits: list[float] = []
    phases: collections.Counter[str] = collections.Counter()
    span = 0.0
    for number in range(101):
        kind = ("sd15", "sdxl")[number % 2]
        config = write_config(tmp_path, **small(images, models / kind, tmp_path / kind, **changes))
        if number % 10 == 0:
            shutil.rmtree(tmp_path / kind, ignore_errors=True)
        with subprocess.Popen(
            command("--config", config), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        ) as process:
            assert process.stdout
            if number == 0:  # how long the way to the first step is: half of the stops come before, half after it
                span = 2 * stop_when(process, lambda event: event["type"] == "progress", signal.SIGTERM).last["elapsed"]
                continue
            lines = [process.stdout.readline()]
            time.sleep(moments.uniform(0, span))
            sent = time.monotonic()
            process.send_signal(signal.SIGTERM)
            lines += process.stdout.readlines()
            result = Run(process.wait(timeout=30), b"".join(lines), b"")
            waits.append(time.monotonic() - sent)
        assert (result.code, result.last["type"], result.last["signal"]) == (143, "interrupted", "SIGTERM")
        if result.last["state_path"]:
            assert trainer.decode_state(Path(result.last["state_path"]))[1]["state"]["step"] == result.last["step"]
        assert result.last["step"] >= max([event["step"] for event in result.of("progress")], default=0)
        phases[
            [event.get("phase", "starting") for event in result.events if event["type"] in ("start", "info")][-1]
        ] += 1
    waits.sort()
    assert waits[-1] < 10
    print(f"\n{len(waits)} stops in {dict(phases)}: 95 % within {waits[94]:.2f} s, all within {waits[-1]:.2f} s")


@pytest.mark.torture
@needs_torch
def test_no_flipped_bit_and_no_cut_of_a_state_goes_unnoticed(tmp_path: Path, images: Path, models: Path) -> None:
    print(f"\n{check_damage(tmp_path, images, models, step=61):,} damaged states")


@pytest.mark.torture
@posix
def test_a_hundred_thousand_events_under_noise_and_not_one_torn_line() -> None:
    code = (
        "import os, threading, train_lora as t\n"
        "s = t.EventStream(); s.start(lambda: None, None)\n"
        "threading.Thread(target=lambda: [os.write(1, b'noise') for _ in range(20000)], daemon=True).start()\n"
        "def work(k):\n"
        "    for n in range(25000): s.warning('x', f'{k} {n} ' + 'y' * (n % 3000))\n"
        "workers = [threading.Thread(target=work, args=(k,)) for k in range(4)]\n"
        "[w.start() for w in workers]; [w.join() for w in workers]\n"
        "s.emit('complete', step=1, final_path='x', total_time=1, loss=None); s.close()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    result = Run(done.returncode, done.stdout, b"")
    assert [event["seq"] for event in result.events] == list(range(100_002))


@pytest.mark.torture
@posix
@needs_torch
def test_a_reader_that_sleeps_a_minute_finds_all_but_the_dropped_progress(
    tmp_path: Path, images: Path, models: Path
) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=100_000))
    with patched("t.EventStream.QUEUE_LIMIT = 200", "--config", config, stderr=subprocess.DEVNULL) as process:
        assert process.stdout
        time.sleep(60)
        process.send_signal(signal.SIGTERM)
        result = Run(0, process.stdout.read(), b"")
        assert process.wait(timeout=30) == 143
    log = logged(tmp_path / "out/events.jsonl")
    missing = {event["seq"]: event["type"] for event in log}.items() - {
        e["seq"]: e["type"] for e in result.events
    }.items()
    assert {event_type for _, event_type in missing} == {"progress"}
    assert len(missing) == result.last["dropped"]
    print(f"\n{len(log)} events, {len(missing)} dropped, all of them progress")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for path, text in derived().items():
            path.write_text(text, "utf-8")
        sys.exit()
    # Side by side where pytest-xdist is installed; it would hide what -s is to show.
    workers = (
        ["-n", "auto", "--dist", "worksteal"] if importlib.util.find_spec("xdist") and "-s" not in sys.argv else []
    )
    sys.exit(pytest.main([__file__, "-q", *workers, *sys.argv[1:]]))
