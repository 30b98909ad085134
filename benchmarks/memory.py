"""Count the memory that a training step takes, without a GPU and without allocating it.

    python benchmarks/memory.py constants   count anew what KEPT_PER_PIXEL and the constants beside it say (10 minutes)
    python benchmarks/memory.py tables      write the tables of docs/vram.md (two minutes)

A full-size UNet is built under FakeTensorMode, whose tensors have sizes and storages but no data. It gets its adapter
by the script's own function and takes a step. A storage counts from the operation that makes it until nothing refers
to it any more, so temporaries are part of the peak. The tensors claim to be on the CPU: on `meta`, attention would
fall back to its plain formula and keep matrices that no GPU keeps. A count takes three to six seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import models  # noqa: E402

import train_lora as trainer  # noqa: E402

trainer.import_checkers()
trainer.import_libraries()
import torch  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.nn import functional  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves, tree_map_only  # noqa: E402

DOCUMENT = ROOT / "docs" / "vram.md"
FAMILIES = {family.name: family for family in trainer.FAMILIES}
GIB = 1024**3


class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the bytes of the storages that live, and the most that lived at once."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # likewise
        self.live: dict[int, int] = {}  # the bytes of each storage
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for storage in [leaf.untyped_storage() for leaf in tree_leaves(made) if isinstance(leaf, torch.Tensor)]:
            if storage._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
                self.peak = max(self.peak, self.total())
        return made

    def total(self) -> int:
        return sum(self.live.values())


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let autocast run normalisations in fp32, and resizing in the dtype of its input, as it does on CUDA."""

    def ruled(function: Callable[..., Any], widen: bool) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            if widen:
                args, kwargs = tree_map_only(torch.Tensor, torch.Tensor.float, (args, kwargs))
            with torch.autocast("cpu", enabled=False):
                return function(*args, **kwargs)

        return call

    with contextlib.ExitStack() as stack:
        for name, widen in (("group_norm", True), ("layer_norm", True), ("interpolate", False)):
            stack.enter_context(mock.patch.object(functional, name, ruled(getattr(functional, name), widen)))
        yield


def adapted(name: str, config: trainer.TrainingConfig, sizes: Mapping[str, Any], dtype: torch.dtype) -> Any:
    """Build a component with its adapter on the meta device: names and shapes, and no memory."""
    pattern = trainer.TARGETS[config.lora_targets][name != "unet"]
    with torch.device("meta"), mock.patch.object(trainer, "generator", lambda *_: None):
        component = models.build_component(name, sizes).to(dtype).requires_grad_(False)
        for weight in trainer.add_adapter(name, component, config, pattern).values():
            weight.data = weight.data.to(torch.float32 if config.lora_type == "lokr" else dtype)
        for layer in component.modules():
            if hasattr(layer, "lora_variant") and config.lora_type == "dora":
                layer.lora_variant["default"] = SimpleNamespace(forward=trainer.dora_forward)
    # In training mode LoKr's layers draw numbers that change nothing.
    return component.train(config.lora_type != "lokr")


def give_storages(module: torch.nn.Module) -> None:
    """Replace meta tensors by ones that have a storage without data, inside FakeTensorMode."""
    for part in module.modules():
        for name, old in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
            delattr(part, name)
            is_weight = isinstance(old, torch.nn.Parameter)
            setattr(part, name, torch.nn.Parameter(new, old.requires_grad) if is_weight else new)


def unet_output(unet: Any, config: trainer.TrainingConfig, side: int, dtype: torch.dtype) -> Any:
    images, tokens = config.batch_size, 77 * (config.max_caption_tokens // 75)
    context, conditions = torch.randn(images, tokens, unet.config.cross_attention_dim, dtype=dtype), None
    if unet.config.addition_embed_type == "text_time":
        conditions = {"text_embeds": torch.randn(images, 1280, dtype=dtype), "time_ids": torch.randn(images, 6)}
    noise, timesteps = torch.randn(images, 4, side, side, dtype=dtype), torch.zeros(images, dtype=torch.long)
    return unet(noise, timesteps, context, added_cond_kwargs=conditions).sample


def text_output(encoder: Any, config: trainer.TrainingConfig, *_: Any) -> Any:
    ids = torch.zeros(config.batch_size * (config.max_caption_tokens // 75), 77, dtype=torch.long)
    return encoder(ids, output_hidden_states=True).hidden_states[-1]


@dataclass(frozen=True)
class Setting:
    """One case: `keys` are those of the config that differ from the defaults."""

    family: str
    resolution: int
    checkpointing: bool
    half: bool
    keys: Mapping[str, Any]

    def config(self) -> trainer.TrainingConfig:
        return make_config(resolution=self.resolution, **self.keys)

    def estimate(self) -> dict[str, int]:
        config, source = self.config(), make_source(self.family)
        weights = trainer.count_lora_weights(config, source)
        options = {"half": self.half, "checkpointing": self.checkpointing}
        return trainer.estimate_vram(config, source, self.resolution, weights, **options)

    def count(self, component: str = "unet") -> int:
        """Take a step under FakeTensorMode; return the most bytes that lived at once beside the weights."""
        config, dtype = self.config(), torch.bfloat16 if self.half else torch.float32
        module = adapted(component, config, models.full_size_config(self.family)[component], dtype)
        if self.checkpointing:
            module.enable_gradient_checkpointing()
        output_of, autocasts = (
            (unet_output, text_output)[component != "unet"],
            self.half and config.lora_type == "lokr",
        )
        with cuda_autocast(), FakeTensorMode(allow_non_fake_inputs=True), Storages() as seen:
            give_storages(module)
            start = seen.total()
            with torch.autocast("cpu", dtype, enabled=autocasts):
                output = output_of(module, config, self.resolution // 8, dtype).float()
            loss = functional.mse_loss(output, torch.randn(output.shape))
            trained = [weight for weight in module.parameters() if weight.requires_grad]
            torch.autograd.grad(loss, trained, materialize_grads=True, allow_unused=True)
            return int(seen.peak - start)


def setting(family: str, resolution: int, checkpointing: bool, half: bool = True, **keys: Any) -> Setting:
    return Setting(family, resolution, checkpointing, half, keys)


def make_config(**keys: Any) -> trainer.TrainingConfig:
    """Return the defaults with some keys changed, whatever packages are installed."""
    required = {"dataset_path": ".", "base_model": "sd15", "output_path": ".", "trigger_words": ["zorb"]}
    with tempfile.TemporaryDirectory() as folder:
        models.write_json(Path(folder, "config.json"), required)
        return dataclasses.replace(trainer.load_config(str(Path(folder, "config.json"))), **keys)


@functools.cache
def make_source(family: str) -> trainer.ModelSource:
    """Return a full-size model as the script knows it before loading: configs, and shapes of weights without files."""
    configs, components = models.full_size_config(family), {}
    for name, config in configs.items():
        with torch.device("meta"):
            weights = models.build_component(name, config).named_parameters()
        shapes = {trainer.saved_name(key): tuple(weight.shape) for key, weight in weights}
        components[name] = trainer.ComponentFiles(Path(), shapes)
    return trainer.ModelSource(family, FAMILIES[family], configs["unet"], configs["vae"], {}, components)


# --- the constants in train_lora.py -----------------------------------------------------------------------------------


def kept(family: str, checkpointing: bool, resolution: int = 1024, batch_size: int = 4, **keys: Any) -> float:
    """Count a step in numbers of the compute dtype for each latent pixel of an image."""
    row = setting(family, resolution, checkpointing, batch_size=batch_size, **keys)
    return row.count() / (2 if row.half else 4) / (resolution // 8) ** 2 / batch_size


def constants() -> Iterator[str]:
    for family, targets, lean in itertools.product(FAMILIES, trainer.TARGETS, (False, True)):
        small, large = (kept(family, lean, lora_targets=targets, lora_rank=rank) for rank in (16, 128))
        by_rank = (large - small) / 112
        dora, lokr = (kept(family, lean, lora_targets=targets, lora_type=name) / small for name in ("dora", "lokr"))
        base = f"{small - 16 * by_rank:,.0f} + {by_rank:.0f} for each rank"
        yield f"{family} {targets}{' with checkpointing' * lean}: {base}; dora x {dora:.2f}, lokr x {lokr:.2f}"
    for family in FAMILIES:
        wide = make_config(lora_targets="all", lora_rank=128)
        gradients = trainer.count_lora_weights(wide, make_source(family)) / 64**2
        last = kept(family, True, 512, 1, lora_targets="all", lora_rank=128) - gradients
        encoders = [row.folder for row in FAMILIES[family].text_encoders]
        texts = sum(setting(family, 512, False, batch_size=4).count(name) for name in encoders) / 2 / 4 / 77
        yield f"{family}: {last:,.0f} in the last block, {texts:,.0f} for each token"


# --- the tables of docs/vram.md ---------------------------------------------------------------------------------------

COUNTED = [
    setting("sd15", 512, False),
    setting("sd15", 512, True, batch_size=4),
    setting("sd15", 768, True, half=False, lora_targets="all", lora_rank=128),
    setting("sd21", 512, False, lora_targets="attention", lora_rank=4),
    setting("sd21", 768, True, lora_targets="attention"),
    setting("sd21", 768, False, batch_size=4, lora_targets="all"),
    setting("sdxl", 1024, False),
    setting("sdxl", 1024, True),
    setting("sdxl", 768, True, batch_size=4, lora_targets="all", lora_rank=128),
    setting("sdxl", 512, False, half=False, lora_targets="attention"),
    setting("sd15", 512, False, lora_type="dora", lora_targets="attention"),
    setting("sdxl", 1024, True, lora_type="dora"),
    setting("sd21", 768, False, lora_type="lokr"),
    setting("sdxl", 1024, True, lora_type="lokr", lora_targets="all"),
]
SIZES = [("sd15", 512), ("sd21", 768), ("sdxl", 1024)]
ADAPTERS = [(16, "transformer"), (64, "all")]
MODES: dict[str, dict[str, Any]] = {  # columns of the table of what fits, from the fastest to the leanest
    "fp32": {"half": False, "checkpointing": False},
    "16 bits": {"checkpointing": False},
    "checkpointing": {"checkpointing": True},
    "and adamw8bit": {"checkpointing": True, "optimizer": "adamw8bit"},
    "and nf4": {"checkpointing": True, "optimizer": "adamw8bit", "quantize_base": "nf4"},
}
CARDS: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {  # GB: settings for SD 1.5 at 512, for SDXL at 1024
    6: ({}, {"quantize_base": "nf4"}),
    8: ({"batch_size": 4}, {}),
    12: ({"batch_size": 8, "lora_rank": 32}, {"batch_size": 4, "lora_rank": 32}),
    16: ({"batch_size": 8, "lora_rank": 64, "lora_targets": "all"}, {}),
    24: ({"batch_size": 12, "lora_rank": 64, "lora_targets": "all"}, {"batch_size": 2, "lora_rank": 32}),
}


def gib(count: float) -> str:
    return f"{count / GIB:.2f}"


def row_name(row: Setting) -> list[str]:
    config = row.config()
    adapter = f"{config.lora_type} {config.lora_rank}, {config.lora_targets}"
    precision, lean = "bf16" if row.half else "fp32", "yes" if row.checkpointing else "no"
    return [row.family, str(row.resolution), str(config.batch_size), adapter, precision, lean]


def counted_table() -> str:
    def cells(row: Setting) -> list[str]:
        count, estimate = row.count(), row.estimate()["activations"]
        return [*row_name(row), gib(count), gib(estimate), f"{round(100 * (estimate / count - 1)):+}%"]

    head = ["family", "resolution", "batch", "adapter", "precision", "checkpointing", "counted", "estimated", "off"]
    return models.table(head, map(cells, COUNTED))


def fits_settings() -> list[list[Setting]]:
    """Return the rows of the table of what fits, with a setting for each of MODES."""
    rows = []
    for (family, resolution), batch, (rank, targets) in itertools.product(SIZES, (1, 4), ADAPTERS):
        keys: dict[str, Any] = {"batch_size": batch, "lora_rank": rank, "lora_targets": targets}
        rows.append([setting(family, resolution, **keys, **mode) for mode in MODES.values()])
    return rows


def fits_table() -> str:
    def cells(row: Sequence[Setting]) -> Iterator[str]:
        config = row[0].config()
        yield from (row[0].family, str(config.resolution), str(config.batch_size))
        yield f"{config.lora_rank}, {config.lora_targets}"
        for needed in (mode.estimate()["total"] for mode in row):
            card = next((f"**{card}**" for card in CARDS if needed <= card * GIB), "more")
            yield f"{needed / GIB:.1f} → {card}"

    return models.table(["family", "resolution", "batch", "rank, targets", *MODES], map(cells, fits_settings()))


def cards_table() -> str:
    def cell(card: int, family: str, resolution: int, keys: Mapping[str, Any]) -> str:
        plain, lean = (setting(family, resolution, on, **keys).estimate()["total"] for on in (False, True))
        is_short = plain > 0.9 * card * GIB  # A tenth of the card is left to other programs.
        note = ", checkpointing" if is_short else ""
        return f"`{json.dumps(keys)}` {(lean if is_short else plain) / GIB:.1f}{note}"

    rows = (
        [f"{card} GB", cell(card, "sd15", 512, small), cell(card, "sdxl", 1024, large)]
        for card, (small, large) in CARDS.items()
    )
    return models.table(["card", "SD 1.5 at 512", "SDXL at 1024"], rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("constants", "tables"))
    if parser.parse_args().command == "tables":
        for name, make in {"cards": cards_table, "fits": fits_table, "counted": counted_table}.items():
            models.put_table(DOCUMENT, name, make())
    else:
        for line in constants():
            print(line, flush=True)
