"""Count the memory that a training step takes, without a GPU and without allocating it; write docs/vram.md's tables.

    python benchmarks/memory.py --write     put both tables into docs/vram.md: counted against estimated, and what fits
    python benchmarks/memory.py             only print them

A UNet of full size is built under FakeTensorMode, whose tensors have sizes and storages but no data, gets its adapter
by the script's own functions and takes a step. A storage counts from the operation that makes it until nothing refers
to it any more, so temporaries are in the peak. The tensors say that they are on the CPU: on `meta`, attention would
fall to its plain formula and keep matrices that no GPU keeps. It needs the development tools.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import train_lora as trainer  # noqa: E402

trainer.import_checkers()

DOCUMENT = ROOT / "docs" / "vram.md"
FAMILIES = {family.name: family for family in trainer.FAMILIES}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816}
VAE: dict[str, Any] = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}


def full_size(name: str) -> dict[str, Any]:
    """Give the config of a family's UNet as diffusers writes it."""
    family = FAMILIES[name]
    kinds = list(family.unet["down_block_types"])
    config = dict(family.unet) | {"up_block_types": [kind.replace("Down", "Up") for kind in reversed(kinds)]}
    heads = [channels // trainer.HEAD_WIDTH for channels in family.unet["block_out_channels"]]
    config |= {"attention_head_dim": family.unet_config.get("attention_head_dim", heads)}
    config |= {"use_linear_projection": family.linear_projection}
    return config | (XL if family.time_ids else {})


@functools.cache
def default_config() -> trainer.TrainingConfig:
    required = {"dataset_path": ".", "base_model": "sd15", "output_path": ".", "trigger_words": ["zorb"]}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "config.json")
        path.write_text(json.dumps(required), "utf-8")
        return trainer.load_config(str(path))


def make_config(**keys: Any) -> trainer.TrainingConfig:
    """Give the defaults with some keys changed; what packages are here is not asked."""
    return dataclasses.replace(default_config(), **keys)


def make_source(name: str, unet: Mapping[str, Any] | None = None) -> trainer.ModelSource:
    """Give a family's model without files, of full size or with another UNet."""
    family = FAMILIES[name]
    return trainer.ModelSource(name, family, unet or full_size(name), VAE | dict(family.vae_config), {}, family.usually)


@dataclass(frozen=True)
class Count:
    """Bytes: the frozen weights, the adapter that the forward pass sees; and besides these what lives when backward
    starts, and the most in a whole step.
    """

    weights: int
    adapter: int
    kept: int
    peak: int


def storages() -> Any:
    """Make a mode that counts the bytes of storages that live, and the most that lived at once."""
    from torch import Tensor
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Storages(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]  # likewise
            self.live = self.peak = 0
            self.known: dict[int, Any] = {}

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            made = func(*args, **(kwargs or {}))
            for tensor in tree_leaves(made):
                if isinstance(tensor, Tensor):
                    self.meet(tensor.untyped_storage())
            return made

        def meet(self, storage: Any) -> None:
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known:
                self.known[key] = weakref.ref(storage, lambda _: self.leave(key, size))
                self.live += size
                self.peak = max(self.peak, self.live)

        def leave(self, key: int, size: int) -> None:
            del self.known[key]
            self.live -= size

    return Storages()


@contextlib.contextmanager
def cuda_autocast() -> Iterator[None]:
    """Let normalisations run in fp32 under autocast, as on CUDA, and resizing in the dtype that it is given."""
    import torch
    from torch.nn import functional

    def ruled(function: Callable[..., Any], widen: bool) -> Callable[..., Any]:
        def wide(value: Any) -> Any:
            return value.float() if widen and isinstance(value, torch.Tensor) else value

        def call(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_autocast_enabled("cpu"):
                return function(*args, **kwargs)
            with torch.autocast("cpu", enabled=False):
                return function(*map(wide, args), **{key: wide(value) for key, value in kwargs.items()})

        return call

    with contextlib.ExitStack() as stack:
        for name, widen in (("group_norm", True), ("layer_norm", True), ("interpolate", False)):
            function = ruled(getattr(functional, name), widen)
            stack.enter_context(mock.patch.object(functional, name, function))
        yield


def hollow(config: trainer.TrainingConfig, unet: Mapping[str, Any], half: bool, checkpointing: bool) -> Any:
    """Give a trainer that has a UNet with its adapter, as the script makes it, on the meta device."""
    import diffusers
    import torch

    made = trainer.LoRATrainer.__new__(trainer.LoRATrainer)
    made.config, made.device, made.half = config, torch.device("cpu"), half
    made.events = mock.Mock()
    made.dtype, made.autocasts = torch.bfloat16 if half else torch.float32, half and config.lora_type != "lora"
    owner: Any = diffusers.UNet2DConditionModel
    pattern = trainer.TARGETS[config.lora_targets][0]
    with torch.device("meta"), mock.patch.object(trainer, "generator", lambda *_: None):
        made.unet = owner(**unet).to(made.dtype).requires_grad_(False)
        made.components = {"unet": made.unet}
        made.parameters = trainer.add_adapter("unet", made.unet, config, pattern)
        made.make_masters()
    made.unet.train(config.lora_type != "lokr")  # whose layers draw numbers while they train, to no effect
    if checkpointing:
        made.unet.enable_gradient_checkpointing()
    return made


def materialize(module: Any, trained: bool) -> None:
    """Put storages without data under the frozen or the trained weights."""
    import torch

    for part in module.modules():
        for name, weight in [*part._parameters.items()]:
            if weight is not None and weight.requires_grad == trained:
                value = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
                part._parameters[name] = torch.nn.Parameter(value, requires_grad=trained)


def count(
    config: trainer.TrainingConfig, unet: Mapping[str, Any], side: int, *, half: bool, checkpointing: bool
) -> Count:
    """Take a step on square latents; see Count."""
    trainer.import_libraries()
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    made, images = hollow(config, unet, half, checkpointing), config.batch_size
    with cuda_autocast(), FakeTensorMode(allow_non_fake_inputs=True), storages() as seen:
        materialize(made.unet, trained=False)
        weights = seen.live
        materialize(made.unet, trained=True)
        start = seen.live
        trained = [weight for weight in made.unet.parameters() if weight.requires_grad]
        latents, timesteps = torch.randn(images, 4, side, side), torch.zeros(images, dtype=torch.long)
        tokens = trainer.TOKENS * (config.max_caption_tokens // 75)
        context = torch.randn(images, tokens, unet["cross_attention_dim"], dtype=made.dtype)
        conditions = None
        if unet.get("addition_embed_type"):
            pooled = torch.randn(images, 1280, dtype=made.dtype)
            conditions = {"text_embeds": pooled, "time_ids": torch.randn(images, 6)}
        loss = trainer.sample_error(made.predict(latents, timesteps, context, conditions), latents, None, None).mean()
        kept = seen.live - start
        torch.autograd.grad(loss, trained, materialize_grads=True)
        return Count(weights, start - weights, kept, seen.peak - start)


@dataclass(frozen=True)
class Setting:
    """What one row of a table is about."""

    family: str
    resolution: int
    checkpointing: bool
    half: bool = True
    keys: tuple[tuple[str, Any], ...] = ()

    def config(self) -> trainer.TrainingConfig:
        return make_config(resolution=self.resolution, **dict(self.keys))

    def estimate(self) -> dict[str, int]:
        options = {"half": self.half, "checkpointing": self.checkpointing}
        return trainer.estimate_vram(self.config(), make_source(self.family), self.resolution, **options)

    def count(self) -> Count:
        side = self.resolution // 8
        options = {"half": self.half, "checkpointing": self.checkpointing}
        return count(self.config(), full_size(self.family), side, **options)


def setting(family: str, resolution: int, checkpointing: bool, half: bool = True, **keys: Any) -> Setting:
    return Setting(family, resolution, checkpointing, half, tuple(keys.items()))


COUNTED = [
    setting("sd15", 512, False),
    setting("sd15", 512, True, batch_size=4),
    setting("sd15", 768, True, half=False, lora_targets="all", lora_rank=128),
    setting("sd15", 512, False, lora_type="dora", lora_targets="attention"),
    setting("sd21", 512, False, lora_targets="attention", lora_rank=4),
    setting("sd21", 768, True, lora_targets="attention"),
    setting("sd21", 768, False, batch_size=4, lora_targets="all"),
    setting("sd21", 512, True, max_caption_tokens=225, lora_type="lokr"),
    setting("sdxl", 1024, False),
    setting("sdxl", 1024, True),
    setting("sdxl", 768, True, batch_size=4, lora_targets="all", lora_rank=128),
    setting("sdxl", 512, False, half=False, lora_targets="attention"),
]


@dataclass(frozen=True)
class Comparison:
    """A step's peak in bytes, beside the weights and with them: the frozen ones, and the adapter's in the modules."""

    kept: int
    counted: int
    estimated: int
    counted_all: int
    estimated_all: int


def compared(row: Setting) -> Comparison:
    found, terms = row.count(), row.estimate()
    estimated, resident = terms["activations"], found.weights + found.adapter
    estimated_all = terms["weights"] + found.adapter + estimated
    return Comparison(found.kept, found.peak, estimated, resident + found.peak, estimated_all)


def gib(count: float) -> str:
    return f"{count / 1024**3:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row_name(row: Setting) -> list[str]:
    config = row.config()
    texts = f", {config.max_caption_tokens} tokens" if config.max_caption_tokens > 75 else ""
    adapter = f"{config.lora_type} {config.lora_rank}, {config.lora_targets}{texts}"
    return [row.family, str(row.resolution), str(config.batch_size), adapter, "yes" if row.checkpointing else "no"]


def counted_row(row: Setting) -> list[str]:
    found, precision = compared(row), "bf16" if row.half else "fp32"
    cells = [gib(count) for count in (found.kept, found.counted, found.estimated, found.counted_all)]
    cells.insert(3, f"{found.estimated / found.counted - 1:+.1%}")
    return [*row_name(row), precision, *cells, f"{found.estimated_all / found.counted_all - 1:+.1%}"]


def counted_table() -> str:
    head = ["family", "resolution", "batch", "adapter", "checkpointing", "precision", "kept"]
    head += ["peak", "estimate", "off", "peak with weights", "off"]
    return table(head, map(counted_row, COUNTED))


CARDS_GIB = (6, 8, 12, 16, 24)
MODES: dict[str, dict[str, Any]] = {  # columns of the table of what fits, from the fastest to the leanest
    "fp32": {"half": False, "checkpointing": False},
    "16 bits": {"checkpointing": False},
    "checkpointing": {"checkpointing": True},
    "and adamw8bit": {"checkpointing": True, "optimizer": "adamw8bit"},
    "and nf4": {"checkpointing": True, "optimizer": "adamw8bit", "quantize_base": "nf4"},
}
SIZES = [("sd15", 512), ("sd15", 768), ("sd21", 768), ("sdxl", 768), ("sdxl", 1024)]
ADAPTERS = [(16, "transformer"), (64, "all")]


def fit_cell(bytes_needed: int) -> str:
    """Give the estimate and the smallest card that has as much."""
    card = next((card for card in CARDS_GIB if bytes_needed <= card * 1024**3), None)
    return f"{bytes_needed / 1024**3:.1f} → {f'**{card}**' if card else 'more'}"


def fit_rows() -> Iterator[list[str]]:
    for (family, resolution), batch, (rank, targets) in itertools.product(SIZES, (1, 4), ADAPTERS):
        shared: dict[str, Any] = {"batch_size": batch, "lora_rank": rank, "lora_targets": targets}
        cells = (setting(family, resolution, **shared, **mode).estimate()["total"] for mode in MODES.values())
        yield [family, str(resolution), str(batch), f"{rank}, {targets}", *map(fit_cell, cells)]


def fit_table() -> str:
    return table(["family", "resolution", "batch", "rank, targets", *MODES], fit_rows())


TABLES: dict[str, Callable[[], str]] = {"counted": counted_table, "fits": fit_table}


def written(text: str, tables: Mapping[str, str]) -> str:
    """Put tables between their marks in a document."""
    for name, lines in tables.items():
        begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, after = text[: text.index(begin)], text[text.index(end) :]
        text = f"{before}{begin}\n{lines}\n{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put them into docs/vram.md")
    parser.add_argument("--only", choices=TABLES, help="one of them")
    options = parser.parse_args()
    tables = {name: make() for name, make in TABLES.items() if options.only in (None, name)}
    print("\n\n".join(tables.values()))
    if options.write:
        DOCUMENT.write_text(written(DOCUMENT.read_text("utf-8"), tables), "utf-8")


if __name__ == "__main__":
    main()
