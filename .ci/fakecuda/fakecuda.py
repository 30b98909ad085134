"""A simulated CUDA device for a CPU build of torch; README.md says what it models.

`build()` compiles fakecuda.cpp once; `install()` must run before anything imports torch. These variables name the card
and its faults; `use_environment()` reads them again:

    FAKECUDA_NAME, FAKECUDA_GIB, FAKECUDA_SM   the card's name, its memory, and its compute capability, such as 8.6
    FAKECUDA_FIRST_CALL_FAILS                  the text of the error with which CUDA answers the first use of the card
    FAKECUDA_ALLOCATION_FAILS                  n: the n-th allocation from now on is out of memory
    FAKECUDA_KERNEL_BREAKS                     n: the n-th kernel from now on breaks the context: every later call fails
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib
import importlib.util
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

SOURCE = Path(__file__).with_name("fakecuda.cpp")
CACHE = Path(__file__).resolve().parents[2] / "build" / "fakecuda"  # git ignores this folder.
ARCHITECTURES = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120"]  # as in the wheels for CUDA 13.0
COUNTERS = ("allocated", "peak", "allocations", "kernels", "waits", "pinned_copies", "unpinned_copies")
torch_spec = importlib.util.find_spec("torch")  # This does not import it.
TORCH = Path(torch_spec.origin).parent if torch_spec and torch_spec.origin else None
library: Any = None


def build() -> tuple[Path | None, str]:
    """Return (the compiled library, ""), or (None, the reason) where it cannot be had."""
    if not TORCH or sys.platform != "linux" or not shutil.which("g++"):
        return None, "it needs Linux, g++ and torch"
    version = runpy.run_path(str(TORCH / "version.py"))
    if version["cuda"] or version["hip"]:
        return None, f"torch {version['__version__']} has kernels of its own for GPUs"
    digest = hashlib.sha256(SOURCE.read_bytes() + version["__version__"].encode()).hexdigest()
    target = CACHE / f"{digest[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    # Of several test processes one compiles, and the others wait for it. torch requires filelock.
    with importlib.import_module("filelock").FileLock(CACHE / "lock"):
        if not target.exists():
            draft = target.with_suffix(".tmp")
            options = ["-O1", "-std=c++20", "-shared", "-fPIC", f"-L{TORCH / 'lib'}", "-lc10", "-ltorch_cpu"]
            headers = [f"-I{TORCH / 'include'}", f"-I{TORCH / 'include/torch/csrc/api/include'}"]
            command = ["g++", str(SOURCE), "-o", str(draft), *headers, *options]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                return None, f"g++ cannot compile it: {done.stderr[:2000]}"
            draft.replace(target)
    return target, ""


def install() -> None:
    """Load the library, and give torch.cuda the functions that a CPU build lacks."""
    global library
    path, reason = build()
    if not TORCH or not path or "torch" in sys.modules:
        raise RuntimeError(reason or "torch is imported already, and has looked for CUDA")
    for name in ("libtorch_global_deps.so", "libc10.so", "libtorch_cpu.so"):
        ctypes.CDLL(str(TORCH / "lib" / name), mode=ctypes.RTLD_GLOBAL)
    library = ctypes.CDLL(str(path))
    library.get_number.restype = ctypes.c_int64
    library.set_number.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # bitsandbytes would compile its CPU kernels for half a minute.
    torch: Any = importlib.import_module("torch")
    if importlib.util.find_spec("bitsandbytes"):
        importlib.import_module("bitsandbytes")  # It must choose its CPU library, so CUDA must not be there yet.
    complete(torch.cuda, torch.AcceleratorError, torch.default_generator)
    torch.nn.functional.scaled_dot_product_attention = fused_attention
    torch.version.cuda = "13.0"
    use_environment()


def fused_attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, **rest: Any
) -> Any:
    """Attend as torch does, which on this card would take the plain formula: a GPU's kernels keep no such matrices."""
    fused: Any = importlib.import_module("torch").ops.aten._scaled_dot_product_flash_attention_for_cpu
    return fused(query, key, value, dropout_p, rest.get("is_causal", False), attn_mask=attn_mask)[0]


def use_environment() -> None:
    """Let the environment's card be there, with its faults."""
    built = [divmod(int(name.removeprefix("sm_")), 10) for name in ARCHITECTURES]
    # A kernel for one version runs on later ones of the same generation.
    runs = any(major == card().major and minor <= card().minor for major, minor in built)
    set_number("kernels_missing", not runs)
    set_number("memory", card().total_memory)
    arm(**{key: int(os.environ.get(f"FAKECUDA_{key.upper()}", 0)) for key in ("allocation_fails", "kernel_breaks")})


def arm(allocation_fails: int = 0, kernel_breaks: int = 0) -> None:
    """Let the n-th allocation, or kernel, from now on fail; 0 is none."""
    set_number("allocation_fails", allocation_fails)
    set_number("kernel_breaks", kernel_breaks)


def card(device: object = None) -> Any:
    """Return what torch.cuda.get_device_properties does."""
    major, minor = map(int, os.environ.get("FAKECUDA_SM", "8.6").split("."))
    name, gib = os.environ.get("FAKECUDA_NAME", "NVIDIA GeForce RTX 3060"), os.environ.get("FAKECUDA_GIB", "12")
    return SimpleNamespace(name=name, major=major, minor=minor, total_memory=int(float(gib) * 2**30))


def get_number(name: str) -> int:
    return int(library.get_number(name.encode()))


def set_number(name: str, value: int) -> None:
    library.set_number(name.encode(), value)


def counts() -> dict[str, int]:
    return {name: get_number(name) for name in COUNTERS}


def complete(cuda: Any, error_class: Any, random: Any) -> None:
    """Replace functions of torch.cuda: those that the trainer and its libraries call."""

    def call(text: str = "") -> None:
        text = "an illegal memory access was encountered" if get_number("broken") else text
        if text:
            raise error_class(f"CUDA error: {text}")

    def set_device(index: int) -> int:
        call(os.environ.get("FAKECUDA_FIRST_CALL_FAILS", ""))
        before = int(library.get_gpu())
        library.set_gpu(index)
        return before

    def synchronize(device: object = None) -> None:
        call()
        set_number("waits", get_number("waits") + 1)

    def memory(device: object = None) -> tuple[int, int]:
        call()
        return card().total_memory - get_number("allocated"), card().total_memory

    cuda._lazy_init, cuda.is_available, cuda.synchronize = lambda: None, lambda: True, synchronize
    # dynamo wants functions that can be hashed, which those of ctypes cannot.
    cuda.device_count, cuda.current_device, cuda.set_device = lambda: 2, lambda: int(library.get_gpu()), set_device
    cuda._exchange_device = cuda._maybe_exchange_device = set_device  # They return the device before.
    cuda.get_device_properties, cuda.get_device_name = card, lambda device=None: card().name
    cuda.get_device_capability = lambda device=None: (card().major, card().minor)
    cuda.get_arch_list, cuda.mem_get_info, cuda.empty_cache = lambda: ARCHITECTURES, memory, call
    cuda.memory_allocated = lambda device=None: get_number("allocated")
    cuda.max_memory_allocated = lambda device=None: get_number("peak")
    cuda.reset_peak_memory_stats = lambda device=None: set_number("peak", get_number("allocated"))
    # Streams are not modelled: all work is done in one order.
    for name in ("Event", "Stream"):
        setattr(cuda, name, type(name, (), {"record": lambda self: call(), "wait_event": lambda self, event: None}))
    cuda.stream = contextlib.nullcontext
    # Random kernels draw from the CPU's generator, so its seed and state are the device's.
    cuda.manual_seed = cuda.manual_seed_all = random.manual_seed
    cuda.get_rng_state = lambda device=None: random.get_state()
    cuda.set_rng_state = lambda state, device=None: random.set_state(state)
