"""Make what tests and benchmarks train with: models with random weights, pictures with captions, a small config.

    build_model(folder, "sdxl")                                  a tiny model, in a tenth of a second
    build_model(folder, "sdxl", full_size_config("sdxl"))        the same in full size
    to_single_file(folder, Path("model.safetensors"), dtype)     the same as one file in the original layout

Importing this imports neither torch nor Pillow, because some tests run where torch is not installed.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

JSON = dict[str, Any]
Tensors = dict[str, Any]

KINDS = ("sd15", "sd21", "sd21v", "sdxl")  # SD 2.x exists with both predictions: sd21v predicts v

# --- pictures, configs and tables -------------------------------------------------------------------------------------


def write_json(path: Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document), "utf-8")


def table(head: Sequence[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, ["---"] * len(head), *rows))


def put_table(page: Path, name: str, text: str) -> None:
    """Replace what a page has between its marks of this name, if it has them."""
    begin, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
    before, _, rest = page.read_text("utf-8").partition(begin)
    if end in rest:
        page.write_text(before + begin + text + rest[rest.index(end) :], "utf-8")


def draw_image(path: Path, size: tuple[int, int], shade: int = 0) -> None:
    """Draw a blob in colours that are different for each `shade`, so that no two images have the same pixels."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", size, (shade * 37 % 256, 200 - shade // 256, 90))
    ImageDraw.Draw(image).ellipse((8, 8, size[0] // 2, size[1] // 2), fill=(250, 20, shade * 53 % 256))
    image.save(path)


def make_dataset(folder: Path, sizes: Sequence[tuple[int, int]]) -> Path:
    """Draw one image per size, each with a caption beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, size in enumerate(sizes):
        draw_image(folder / f"{number}.png", size, number)
        (folder / f"{number}.txt").write_text(f"picture {number}, blob", "utf-8")
    return folder


def small(images: Path, model: Path, output: Path, **changes: Any) -> JSON:
    """Return a config with which a tiny model trains in a second."""
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


# --- component configs ------------------------------------------------------------------------------------------------

PLAIN, CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
SD_UNET: JSON = {"block_out_channels": [320, 640, 1280, 1280], "down_block_types": [CROSS, CROSS, CROSS, PLAIN]}
UNETS: dict[str, JSON] = {  # as in the official repositories on the Hub; sd21 is the model for 768 pixels
    "sd15": SD_UNET | {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64},
    "sd21": SD_UNET
    | {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "sample_size": 96}
    | {"use_linear_projection": True, "upcast_attention": True},
    "sdxl": {"block_out_channels": [320, 640, 1280], "down_block_types": [PLAIN, CROSS, CROSS]}
    | {"cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20], "sample_size": 128}
    | {"use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10]}
    | {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    | {"projection_class_embeddings_input_dim": 2816},
}
VAE: JSON = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
VAE |= {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4}
VAES = {name: VAE | {"scaling_factor": 0.18215, "force_upcast": False} for name in ("sd15", "sd21")}
VAES |= {"sdxl": VAE | {"scaling_factor": 0.13025, "force_upcast": True}}


def clip(width: int, layers: int, activation: str, projection: int) -> JSON:
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "projection_dim": projection, "vocab_size": 49408}
    return sizes | {"num_hidden_layers": layers, "num_attention_heads": width // 64, "hidden_act": activation}


TEXT_ENCODERS = {
    "sd15": {"text_encoder": clip(768, 12, "quick_gelu", 768)},
    "sd21": {"text_encoder": clip(1024, 23, "gelu", 512)},
    "sdxl": {"text_encoder": clip(768, 12, "quick_gelu", 768), "text_encoder_2": clip(1280, 32, "gelu", 1280)},
}
LETTERS = [chr(code) for code in range(33, 127)]
TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
VOCABULARY = {token: number for number, token in enumerate(TOKENS)}  # a token per letter; the real one has 49,408
ENDS = {"bos_token_id": VOCABULARY["<|startoftext|>"], "eos_token_id": VOCABULARY["<|endoftext|>"]}
ENDS |= {"pad_token_id": VOCABULARY["<|endoftext|>"]}


def with_up_blocks(unet: JSON) -> JSON:
    """Add the way up, which mirrors the way down."""
    return unet | {"up_block_types": [name.replace("Down", "Up") for name in reversed(unet["down_block_types"])]}


def full_size_config(family: str) -> dict[str, JSON]:
    """Return the configs of a family's official model, by component: unet, vae, text_encoder and so on."""
    return {
        "unet": with_up_blocks(UNETS[family] | {"layers_per_block": 2}),
        "vae": VAES[family],
        **TEXT_ENCODERS[family],
    }


def tiny_config(kind: str) -> dict[str, JSON]:
    """Return the same configs, narrow and shallow, for a native resolution of 64 or 96 pixels."""
    xl = kind == "sdxl"
    unet: JSON = {"block_out_channels": [32, 64], "norm_num_groups": 8, "cross_attention_dim": 64 if xl else 32}
    unet |= {"layers_per_block": 2 if xl else 1, "attention_head_dim": 8 if kind == "sd15" else [4, 8]}
    unet |= {"down_block_types": [PLAIN, CROSS] if xl else [CROSS, PLAIN]}
    unet |= {"sample_size": 12 if kind in ("sd21v", "sdxl") else 8}
    if xl:
        unet |= {"transformer_layers_per_block": [1, 2], "addition_time_embed_dim": 8}
        unet |= {"projection_class_embeddings_input_dim": 8 * 6 + 32}
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
    text |= {"projection_dim": 32, "vocab_size": len(VOCABULARY)} | ENDS
    vae = {"block_out_channels": [8, 8, 16, 16], "layers_per_block": 1, "norm_num_groups": 4}
    tiny = {"unet": unet, "vae": vae}
    configs = {name: config | tiny.get(name, text) for name, config in full_size_config(kind.removesuffix("v")).items()}
    return configs | {"unet": with_up_blocks(configs["unet"])}


# --- models in diffusers' layout --------------------------------------------------------------------------------------

SCHEDULER: JSON = {"_class_name": "DDIMScheduler", "num_train_timesteps": 1000, "beta_schedule": "scaled_linear"}
SCHEDULER |= {"beta_start": 0.00085, "beta_end": 0.012, "steps_offset": 1}
SCHEDULER |= {"clip_sample": False, "set_alpha_to_one": False}


def build_component(name: str, config: Mapping[str, Any]) -> Any:
    """Build one component with random weights; under `torch.device("meta")` it takes no memory."""
    import diffusers
    import transformers

    if name.startswith("text_encoder"):
        owner: Any = transformers.CLIPTextModelWithProjection if name[-1] == "2" else transformers.CLIPTextModel
        return owner(transformers.CLIPTextConfig(**config))
    owner = diffusers.UNet2DConditionModel if name == "unet" else diffusers.AutoencoderKL
    return owner(**config)


def build_model(folder: Path, kind: str, configs: Mapping[str, JSON] | None = None, dtype: Any = None) -> Path:
    """Write a model with random weights, tiny by default: real layout, real classes, real tokenizer files."""
    import torch

    torch.manual_seed(0)
    for name, config in (configs or tiny_config(kind)).items():
        text = name.startswith("text_encoder")
        build_component(name, {**config, **ENDS} if text else config).to(dtype).save_pretrained(folder / name)
        if text:
            pad = "!" if config["hidden_act"] == "gelu" else "<|endoftext|>"
            write_tokenizer(folder / name.replace("text_encoder", "tokenizer"), pad)
    write_index(folder, kind)
    return folder


def write_tokenizer(folder: Path, pad: str) -> None:
    write_json(folder / "vocab.json", VOCABULARY)
    (folder / "merges.txt").write_text("#version: 0.2\n", "utf-8")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "pad_token": pad, **special}
    write_json(folder / "tokenizer_config.json", settings)


def write_index(folder: Path, kind: str) -> None:
    """Write model_index.json and the scheduler's config."""
    prediction = "v_prediction" if kind == "sd21v" else "epsilon"
    write_json(folder / "scheduler/scheduler_config.json", SCHEDULER | {"prediction_type": prediction})
    index: JSON = {"_class_name": "StableDiffusionPipeline", "scheduler": ["diffusers", "DDIMScheduler"]}
    index |= {"unet": ["diffusers", "UNet2DConditionModel"], "vae": ["diffusers", "AutoencoderKL"]}
    index |= {"text_encoder": ["transformers", "CLIPTextModel"], "tokenizer": ["transformers", "CLIPTokenizer"]}
    index |= {"feature_extractor": [None, None], "image_encoder": [None, None]}
    if kind == "sdxl":
        index |= {"_class_name": "StableDiffusionXLPipeline", "tokenizer_2": index["tokenizer"]}
        index |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
    else:
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    write_json(folder / "model_index.json", index)


def hollow_model(folder: Path) -> Path:
    """Make an SD 1.5 that is whole for everything that reads only configs and headers; it needs no torch."""
    write_index(folder, "sd15")
    header = json.dumps({"a": {"dtype": "F16", "shape": [3, 5], "data_offsets": [0, 30]}}).encode()
    for name, config in full_size_config("sd15").items():
        write_json(folder / name / "config.json", config)
        stem = "model" if name.startswith("text_encoder") else "diffusion_pytorch_model"
        content = len(header).to_bytes(8, "little") + header + bytes(30)
        (folder / name / f"{stem}.safetensors").write_bytes(content)
    write_tokenizer(folder / "tokenizer", "<|endoftext|>")
    return folder


# --- single files in the original layout ------------------------------------------------------------------------------


def words(text: str) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in text.split())


RESNET = words("norm1=in_layers.0 conv1=in_layers.2 norm2=out_layers.0 conv2=out_layers.3")
RESNET |= words("time_emb_proj=emb_layers.1 conv_shortcut=skip_connection")
UNET_ENDS = words("conv_in=input_blocks.0.0 conv_norm_out=out.0 conv_out=out.2 add_embedding=label_emb.0")
UNET_ENDS |= words("time_embedding=time_embed linear_1=0 linear_2=2")
VAE_NAMES = words("down_blocks=down up_blocks=up resnets=block conv_shortcut=nin_shortcut conv_norm_out=norm_out")
VAE_NAMES |= words("downsamplers.0=downsample upsamplers.0=upsample group_norm=norm to_q=q to_k=k to_v=v")
VAE_NAMES |= words("mid_block.resnets.0=mid.block_1 mid_block.resnets.1=mid.block_2 to_out.0=proj_out")
VAE_NAMES |= words("mid_block.attentions.0=mid.attn_1")
OPEN_CLIP = words("encoder.layers=transformer.resblocks self_attn=attn layer_norm1=ln_1 layer_norm2=ln_2 fc1=c_fc")
OPEN_CLIP |= words("fc2=c_proj final_layer_norm=ln_final embeddings.token_embedding=token_embedding")
OPEN_CLIP |= words("embeddings.position_embedding.weight=positional_embedding")
PLACE = re.compile(r"(down|up|mid)_blocks?\.(?:(\d+)\.)?(resnet|attention|downsampler|upsampler)s\.(\d+)\.(.+)")


def swap(name: str, table: Mapping[str, str]) -> str:
    """Replace whole dotted parts of a name."""
    parts = "|".join(re.escape(part) for part in sorted(table, key=len, reverse=True))
    return re.sub(rf"(?<![^.])({parts})(?![^.])", lambda match: table[match[1]], name)


def original_unet(tensors: Tensors, layers: int) -> Tensors:
    """Rename to the original code's layout, which numbers blocks through; `layers` is layers_per_block."""

    def rename(name: str) -> str:
        match = PLACE.match(name)
        if not match:
            return swap(name, UNET_ENDS)
        side, part, place, rest = match[1], match[3], int(match[4]), match[5]
        first = int(match[2] or 0) * (layers + 1)
        if part == "downsampler":
            return f"input_blocks.{first + layers + 1}.0.{rest.replace('conv', 'op')}"
        if part == "upsampler":
            attends = any(key.startswith(f"up_blocks.{match[2]}.attentions.") for key in tensors)
            return f"output_blocks.{first + layers}.{1 + attends}.{rest}"
        if part == "resnet":
            rest = swap(rest, RESNET)
        if side == "mid":
            return f"middle_block.{1 if part == 'attention' else 2 * place}.{rest}"
        block = f"input_blocks.{first + place + 1}" if side == "down" else f"output_blocks.{first + place}"
        return f"{block}.{int(part == 'attention')}.{rest}"

    return {rename(name): tensor for name, tensor in tensors.items()}


def original_vae(tensors: Tensors, levels: int = 4) -> Tensors:
    result: Tensors = {}
    for key, tensor in tensors.items():
        name = re.sub(r"up_blocks\.(\d+)", lambda match: f"up_blocks.{levels - 1 - int(match[1])}", key)
        linear = ".attentions." in name and tensor.ndim == 2  # the original has a 1x1 convolution there
        result[swap(name, VAE_NAMES)] = tensor[:, :, None, None] if linear else tensor
    return result


def original_clip(tensors: Tensors) -> Tensors:
    """Name CLIP-L's tensors as the older transformers did: under text_model., with the position numbers."""
    import torch

    result = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}
    positions = len(result["text_model.embeddings.position_embedding.weight"])
    return result | {"text_model.embeddings.position_ids": torch.arange(positions)[None]}


def original_open_clip(tensors: Tensors) -> Tensors:
    """Rename to OpenCLIP's layout; an SD 2 file also has a last layer and a projection that diffusers leaves out."""
    import torch

    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    if "text_projection.weight" not in tensors:
        last = max(int(name.split(".")[2]) for name in tensors if name.startswith("encoder.layers."))
        old, new = f"encoder.layers.{last}.", f"encoder.layers.{last + 1}."
        tensors |= {name.replace(old, new): tensor for name, tensor in tensors.items() if name.startswith(old)}
        tensors["text_projection.weight"] = torch.zeros_like(tensors[f"{old}self_attn.out_proj.weight"])
    projection = tensors.pop("text_projection.weight").T
    result: Tensors = {"text_projection": projection, "logit_scale": torch.tensor(4.6052)}
    for key, tensor in tensors.items():
        if "q_proj." in key:
            tensor = torch.cat([tensors[key.replace("q_proj", f"{letter}_proj")] for letter in "qkv"])
        if not re.search(r"\.[kv]_proj\.", key):
            result[swap(key, OPEN_CLIP).replace("q_proj.", "in_proj_")] = tensor
    return result


def original_layout(components: Mapping[str, Tensors], unet: Mapping[str, Any]) -> Tensors:
    """Return the tensors of a model's components under their names in a single file; `unet` is the UNet's config."""
    rules: dict[str, tuple[str, Callable[[Tensors], Tensors]]] = {
        "unet": ("model.diffusion_model.", functools.partial(original_unet, layers=unet["layers_per_block"])),
        "vae": ("first_stage_model.", original_vae),
        "text_encoder": ("cond_stage_model.transformer.", original_clip),
        "text_encoder_2": ("conditioner.embedders.1.model.", original_open_clip),
    }
    if "text_encoder_2" in components:
        rules["text_encoder"] = ("conditioner.embedders.0.transformer.", original_clip)
    elif unet.get("use_linear_projection"):  # SD 2.x
        rules["text_encoder"] = ("cond_stage_model.model.", original_open_clip)
    result: Tensors = {}
    for part, tensors in components.items():
        prefix, rename = rules[part]
        result |= {prefix + name: tensor for name, tensor in rename(tensors).items()}
    return result


def to_single_file(
    folder: Path, target: Path, dtype: Any, metadata: dict[str, str] | None = None, with_vae: bool = True
) -> Path:
    """Write a model folder's UNet, text encoders and VAE to one file in the original layout."""
    import safetensors.torch

    parts = ["unet", "text_encoder", "text_encoder_2", *(["vae"] if with_vae else [])]
    paths = {part: path for part in parts for path in (folder / part).glob("*.safetensors")}
    components = {part: safetensors.torch.load_file(path) for part, path in paths.items()}
    unet = json.loads((folder / "unet/config.json").read_text("utf-8"))
    tensors = {
        name: (tensor.to(dtype) if tensor.is_floating_point() else tensor).clone().contiguous()
        for name, tensor in original_layout(components, unet).items()
    }
    safetensors.torch.save_file(tensors, target, metadata)
    return target


def with_tiny_configs(families: Sequence[Any]) -> tuple[Any, ...]:
    """Return rows of `train_lora.FAMILIES` with the tiny models' configs, by which single files are then built."""
    changed = []
    for family in families:
        configs = tiny_config("sd21v" if family.name == "sd21" else family.name)
        encoders = (dataclasses.replace(row, config=configs[row.folder]) for row in family.text_encoders)
        tiny = {"unet": configs["unet"], "vae": configs["vae"], "text_encoders": tuple(encoders)}
        changed.append(dataclasses.replace(family, **tiny))
    return tuple(changed)
