#!/usr/bin/env python3
"""Tests of train_lora.py: `python test_trainer.py`, or pytest. The sections mirror the script's.

Everything runs offline on the CPU. The models are tiny, with random weights, in the real layout; they are made by
benchmarks/models.py. Tests that need torch are skipped where it is not installed; the others still run.
"""

from __future__ import annotations

import ast
import asyncio
import collections
import contextlib
import copy
import dataclasses
import errno
import functools
import gc
import hashlib
import html
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
import shlex
import shutil
import signal
import socket
import stat
import string
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
import urllib.parse
import urllib.request
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest import mock

import jsonschema
import pytest
from PIL import Image, ImageOps, PngImagePlugin

import train_lora as trainer

ROOT = Path(__file__).resolve().parent
sys.path.append(str(ROOT / "benchmarks"))
from models import (  # noqa: E402
    KINDS,
    SCHEDULER,
    build_component,
    build_model,
    draw_image,
    full_size_config,
    hollow_model,
    make_dataset,
    original_layout,
    original_unet,
    small,
    tiny_config,
    to_single_file,
    with_tiny_configs,
    write_json,
)

trainer.import_checkers()
# Most tests measure the drift with two prompts, which saves a minute; those of the drift itself use all of them.
ALL_DRIFT_PROMPTS = trainer.DRIFT_PROMPTS
vars(trainer)["DRIFT_PROMPTS"] = ALL_DRIFT_PROMPTS[:2]

SCRIPT = ROOT / "train_lora.py"
SCHEMA = json.loads((ROOT / "config_schema.json").read_text("utf-8"))
EVENT_SCHEMA = json.loads((ROOT / "docs" / "events.schema.json").read_text("utf-8"))
EVENT_VALIDATOR = jsonschema.Draft7Validator(EVENT_SCHEMA)
HAS_TORCH = importlib.util.find_spec("torch") is not None
needs_torch = pytest.mark.skipif(not HAS_TORCH, reason="torch is not installed")
posix = pytest.mark.skipif(os.name == "nt", reason="POSIX signals and descriptors")

Json = dict[str, Any]
Patch = pytest.MonkeyPatch


class Missing:
    """It stands for a library that is not installed: a test is skipped when it comes to use it."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):  # pytest asks every global for these.
            raise AttributeError(name)
        pytest.skip("a library is not installed")


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if not importlib.util.find_spec(name)]
    return pytest.mark.skipif(bool(missing), reason=f"not installed: {', '.join(missing)}")


os.environ.setdefault("OMP_NUM_THREADS", "1")  # Tiny models run faster so, here and in the child processes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # A shell's background job ignores it; the children must hear it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

numpy: Any = importlib.import_module("numpy") if importlib.util.find_spec("numpy") else Missing()
if not HAS_TORCH:
    globals().update(dict.fromkeys(("diffusers", "memory", "safetensors", "torch"), Missing()))
else:
    trainer.import_libraries()
    import diffusers
    import memory
    import safetensors.torch
    import torch
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    # The libraries import these only when they are used: every Copy would do so again.
    assert all((diffusers.AutoencoderKL, diffusers.UNet2DConditionModel, CLIPTextModelWithProjection, CLIPTokenizer))
    gc.freeze()  # A run lets the garbage collector look at everything, which takes a second with all of the libraries.


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
    done = subprocess.run(command(*arguments), capture_output=True, timeout=LIMIT_S, **options)
    return Run(done.returncode, done.stdout, done.stderr)


PROLOGUE, EPILOGUE = "import os, sys, time\nimport train_lora as t\n", "\nsys.exit(t.main(sys.argv[1:]))"


def patched(code: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    """Start the script in a new process, after `code` has replaced some parts of the module `t`."""
    process = [sys.executable, "-c", PROLOGUE + code + EPILOGUE, *map(str, arguments)]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **options}
    return subprocess.Popen(process, cwd=ROOT, **options)


class Copy:
    """The same, in a copy of a process that has imported everything, which saves seconds; it serves as a Popen does."""

    def __init__(self, code: str, *arguments: str | Path, **environment: str) -> None:
        if os.name == "nt":
            pytest.skip("no process can be copied here")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([Path(__file__).stem])
        pipes = [context.Pipe(duplex=False) for _ in ("stdout", "stderr")]
        row = (code, [*map(str, arguments)], os.environ | environment, [writing for _, writing in pipes])
        self.process = context.Process(target=be_the_script, args=row, daemon=True)
        self.process.start()
        self.stdout, self.stderr = (os.fdopen(os.dup(reading.fileno()), "rb") for reading, _ in pipes)
        for connection in itertools.chain(*pipes):
            connection.close()
        self.terminate, self.kill = self.process.terminate, self.process.kill

    def send_signal(self, number: int) -> None:
        os.kill(self.process.pid or 0, number)

    def wait(self, timeout: float) -> int:
        self.process.join(timeout)
        assert self.process.exitcode is not None
        return self.process.exitcode

    def __enter__(self) -> Copy:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.stdout.close()
        self.stderr.close()


def be_the_script(code: str, arguments: list[str], environment: Mapping[str, str], pipes: list[Any]) -> None:
    """The body of a Copy's process."""
    os.environ.update(environment)
    sys.argv[1:] = arguments
    for descriptor, pipe in enumerate(pipes, start=1):
        os.dup2(pipe.fileno(), descriptor)
        pipe.close()
    exec(PROLOGUE + code + EPILOGUE, {})


Process = subprocess.Popen[bytes] | Copy


def run_copy(*arguments: str | Path, **environment: str) -> Run:
    with Copy("", *arguments, **environment) as process:
        return finish(process)


# Code for `patched`: single files are then built as the tiny models are.
TINY_FAMILIES = """
sys.path.append("benchmarks")
from models import with_tiny_configs
t.FAMILIES = with_tiny_configs(t.FAMILIES)
"""


def write_config(folder: Path, **keys: Any) -> Path:
    write_json(folder / "config.json", keys)
    return folder / "config.json"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with five images in several shapes, and their captions."""
    sizes = [(64, 64), (96, 64), (64, 100), (128, 128), (200, 90)]
    return make_dataset(tmp_path_factory.mktemp("images"), sizes)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model of each kind."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        build_model(folder / kind, kind)
    return folder


@pytest.fixture(scope="session")
def converted_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("single_files")
    for kind, prediction in {"sd15": "epsilon", "sd21v": "v", "sdxl": "epsilon"}.items():
        build_model(folder / kind, kind)
        dtype = torch.float16 if kind == "sdxl" else torch.float32
        for path in (folder / kind).glob("*/*.safetensors"):  # A file in half precision then holds the same values.
            values = {key: value.to(dtype).float() for key, value in tensors_of(path).items()}
            safetensors.torch.save_file(values, path, {"format": "pt"})
        header = {"modelspec.prediction_type": prediction}
        to_single_file(folder / kind, folder / f"{kind}.safetensors", dtype, header)
    shutil.copytree(folder / "sd15/tokenizer", folder / "clip_tokenizer")
    return folder


@pytest.fixture
def single_files(converted_models: Path, tiny_families: None) -> Path:
    """Return a folder with tiny models as single files and as folders, of which the files can be loaded."""
    return converted_models


@pytest.fixture
def tiny_families(monkeypatch: Patch) -> None:
    """Let single files be built as the tiny models are: they bring no configs, so the families' rows decide."""
    monkeypatch.setattr(trainer, "FAMILIES", with_tiny_configs(trainer.FAMILIES))


class Recorder(trainer.EventStream):
    """An event stream into a list, for runs inside this process."""

    def __init__(self) -> None:
        self.events: list[Json] = []
        self.warnings: list[Json] = []
        self.phase, self.ended = "test", ""
        self.lock, self.before_last = threading.RLock(), lambda: None

    def emit(self, event_type: str, **fields: Any) -> None:
        if event_type in trainer.LAST_TYPES:
            self.before_last()
        self.events.append({"type": event_type, **fields})

    def info(self, message: str, phase: str | None = None, **fields: Any) -> None:
        self.beat()
        self.phase = phase or self.phase
        self.emit("info", message=message, **fields)

    def open_log(self, path: Path) -> None: ...


class Quiet(trainer.StopWatcher):
    """A watcher that hears nothing; `after` asks for a stop once that many polls have passed."""

    def __init__(self, after: float = math.inf) -> None:
        self.signal, self.save_requested, self.after = None, False, after

    @property
    def requested(self) -> bool:
        self.after -= 1
        return self.after < 0

    def arm(self, *_: Any) -> None: ...


def load(tmp_path: Path, config: Json) -> trainer.TrainingConfig:
    write_json(tmp_path / "in_process.json", config)
    return trainer.load_config(str(tmp_path / "in_process.json"))


def scan_quietly(config: trainer.TrainingConfig) -> trainer.Dataset:
    return trainer.scan_dataset(config, Recorder())


def make_plan(tmp_path: Path, config: Json, **options: Any) -> trainer.Plan:
    return trainer.plan_run(load(tmp_path, config), Recorder(), download=True, **options)


def release(folder: trainer.OutputFolder) -> None:
    """Let another trainer of this process have the folder."""
    if folder.lock:
        folder.lock.release()


def make_trainer(
    tmp_path: Path, config: Json, *, stop: Quiet | None = None, fresh: bool = False
) -> trainer.LoRATrainer:
    """Make a trainer in this process that has its plan and holds its folder."""
    loaded, events = load(tmp_path, config), Recorder()
    folder = trainer.OutputFolder(Path(loaded.output_path))
    try:
        plan = trainer.plan_run(loaded, events, folder.open, download=True)
        return trainer.LoRATrainer(plan, events, stop or Quiet(), folder, fresh=fresh)
    except trainer.TrainerError:
        release(folder)
        raise


def prepare(tmp_path: Path, config: Json, **options: Any) -> trainer.LoRATrainer:
    """Make a trainer and set it up, but do not train."""
    made = make_trainer(tmp_path, config, **options)
    try:
        made.setup()
    except trainer.TrainerError:
        release(made.folder)
        raise
    return made


def train(tmp_path: Path, config: Json, **options: Any) -> trainer.LoRATrainer:
    """Train to the end or to the stop, as `run` does, but let every failure through."""
    made = prepare(tmp_path, config, **options)
    if made.train():
        made.finish()
    elif made.state.step and not made.is_saved():
        made.save()
    release(made.folder)
    return made


def cached_image(made: trainer.LoRATrainer, index: int, mirrored: bool = False) -> dict[str, Any]:
    """Return the cache's entry of an image."""
    return made.data.cache[made.data.keys[made.plan.variant(index, mirrored)]]


def logged(path: Path) -> list[Json]:
    """Return the events in a file, apart from a torn last line."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def emitted(made: trainer.LoRATrainer, event_type: str) -> list[Json]:
    events: Any = made.events
    return [event for event in events.events if event["type"] == event_type]


def warning_codes(made: trainer.LoRATrainer) -> list[str]:
    return [event["code"] for event in emitted(made, "warning")]


def tensors_of(path: Path) -> dict[str, Any]:
    return dict(safetensors.torch.load_file(path))


def shapes_of(path: Path) -> dict[str, list[int]]:
    return trainer.weight_shapes(path)


def assert_same_tensors(one: Path, other: Path) -> None:
    left, right = tensors_of(one), tensors_of(other)
    assert left.keys() == right.keys()
    different = [key for key in left if not torch.equal(left[key], right[key])]
    assert not different


# ======================================================================================
# the file itself
# ======================================================================================

SOURCE = SCRIPT.read_text("utf-8")
TREE = ast.parse(SOURCE)
SECTIONS = """
imports and constants, errors and helpers, config, events and terminal, stopping and requests, processes, health,
output folder, model families, base models, images, dataset, diffusion maths, text and latents, adapter, LoRA files,
checkpoints, hardware and memory, plan, cache, samples and report, trainer, command line
"""


RULE = "# " + "=" * 86
BANNERS = {  # title -> its line
    match[1]: SOURCE.count("\n", 0, match.start()) + 2
    for match in re.finditer(rf"^{RULE}\n# (.+)\n{RULE}$", SOURCE, re.MULTILINE)
}


def section_number(line: int) -> int:
    return sum(start < line for start in BANNERS.values())


def test_the_sections_stand_in_order_and_the_docstring_lists_them() -> None:
    listed = re.findall(r"^    ([a-zA-Z][\w ,]*?)  +\S", trainer.__doc__ or "", re.MULTILINE)
    assert listed == list(BANNERS) == re.split(r",\s+", SECTIONS.strip())


def names_in(owner: ast.AST, context: type[ast.expr_context]) -> set[str]:
    return {node.id for node in ast.walk(owner) if isinstance(node, ast.Name) and isinstance(node.ctx, context)}


def names_defined_by(statement: ast.stmt) -> set[str]:
    if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
        return {statement.name}
    targets = statement.targets if isinstance(statement, ast.Assign) else []
    targets = [statement.target] if isinstance(statement, ast.AnnAssign) else targets
    return {name for target in targets for name in names_in(target, ast.Store)}


def test_no_section_uses_a_later_one() -> None:
    """Annotations count too, although Python does not evaluate them."""
    sections = {name: section_number(node.lineno) for node in TREE.body for name in names_defined_by(node)}
    forward = []
    for node in TREE.body:
        later = {name for name, number in sections.items() if number > section_number(node.lineno)}
        forward += [(node.lineno, name) for name in later & names_in(node, ast.Load) - names_in(node, ast.Store)]
    assert forward == []


def test_the_file_its_classes_and_its_functions_have_a_size_that_one_can_read() -> None:
    def lengths(type_of_node: type[ast.FunctionDef] | type[ast.ClassDef]) -> list[tuple[int, str]]:
        nodes = [node for node in ast.walk(TREE) if isinstance(node, type_of_node)]
        return sorted(((node.end_lineno or 0) - node.lineno + 1, node.name) for node in nodes)

    functions = lengths(ast.FunctionDef)
    assert len(SOURCE.splitlines()) <= 6370
    assert [(lines, name) for lines, name in lengths(ast.ClassDef) if lines > 500] == []
    assert [(lines, name) for lines, name in functions if lines > 60] == []
    assert functions[len(functions) // 2][0] <= 12


def test_only_the_families_section_names_a_family() -> None:
    titles = list(BANNERS)
    outside = [
        (titles[section_number(line) - 1], text)
        for line, text in enumerate(SOURCE.splitlines(), start=1)
        if re.search(r"[\"'](sd15|sd21|sdxl)[\"']", text) and section_number(line)
    ]
    assert {title for title, _ in outside} == {"model families"}
    assert not re.search(r"\bis_xl\b|family\.name (==|in)\b", SOURCE)


def test_a_python_that_is_too_old_is_refused_in_words() -> None:
    code = "import sys; sys.version_info = (3, 9, 18); import train_lora"
    ran = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("train_lora.py needs Python 3.10 or later; this is ")
    assert len(ran.stderr.splitlines()) == 1


def test_importing_the_script_imports_nothing_heavy() -> None:
    heavy = ("torch", "diffusers", "transformers", "PIL", "numpy", "jsonschema", "tqdm", "huggingface_hub", "filelock")
    code = f"import sys, train_lora; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_requirements_and_the_inline_metadata_list_the_same_packages() -> None:
    header = re.search(r"# dependencies = \[\n(.*?)# \]", SOURCE, re.DOTALL)
    assert header
    inline = re.findall(r'"([^"]+)"', header[1])
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    listed = [line.partition("#")[0].strip() for line in lines]
    assert [line for line in listed if line] == inline
    assert {re.split("[>=<;]", line)[0] for line in inline} >= {"tqdm", "filelock", "huggingface_hub"}


def test_the_top_level_holds_only_what_the_design_lists() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = {"train_lora.py", "test_trainer.py", "config_schema.json", "example_config.json", "requirements.txt"}
    files |= {"Dockerfile", "README.md", "LICENSE"}
    top = {name.partition("/")[0] for name in listed.stdout.split()}
    assert {name for name in top if not name.startswith(".")} == files | {"demo", "docs", "benchmarks"}


# ======================================================================================
# config
# ======================================================================================

REQUIRED: Json = {"dataset_path": "images", "base_model": "me/model", "output_path": "out", "trigger_words": ["zorb"]}
DEFINITIONS: Json = SCHEMA["definitions"]
BOUNDS: dict[str, tuple[Callable[[Any], Any], str]] = {  # a value that breaks the bound, and what is said then
    "minimum": (lambda bound: bound - 1, "is less than the minimum of {}"),
    "exclusiveMinimum": (lambda bound: bound, "is less than or equal to the minimum of {}"),
    "maximum": (lambda bound: bound + 1, "is greater than the maximum of {}"),
    "exclusiveMaximum": (lambda bound: bound, "is greater than or equal to the maximum of {}"),
    "multipleOf": (lambda step: 10 * step + 1, "is not a multiple of {}"),
    "enum": (lambda _: "nonsense", "is not one of {}"),
    "pattern": (lambda _: "\0", " is not "),
}
WRONG_OVERRIDES = {
    "stepz=9": "--set stepz: unknown key (did you mean 'steps'?)",
    "steps": "--set steps: must have the form KEY=VALUE",
    "steps=x": "steps: 'x' is not of type 'integer', 'null'",
    "weight_decay=NaN": "--set weight_decay: --set weight_decay has the number NaN, which is not finite",
}


def parse(tmp_path: Path, document: Any, overrides: tuple[str, ...] = ()) -> trainer.TrainingConfig:
    path = tmp_path / "config.json"
    text = document if isinstance(document, (str, bytes)) else json.dumps(document)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return trainer.load_config(str(path), overrides)


def problems_of(tmp_path: Path, document: Any, overrides: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the messages of a config's problems by their paths."""
    with pytest.raises(trainer.TrainerError) as caught:
        parse(tmp_path, document, overrides)
    assert caught.value.code == "config_invalid"
    by_path = trainer.grouped(caught.value.problems, lambda item: item["path"])
    return {path: "; ".join(item["message"] for item in items) for path, items in by_path.items()}


def test_the_schema_alone_defines_every_key_and_default_once_for_both_shapes() -> None:
    fields = dataclasses.fields(trainer.TrainingConfig)
    assert [field.name for field in fields] == list(DEFINITIONS)
    assert all(field.default is dataclasses.MISSING for field in fields)
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    refs = {key: {"$ref": f"#/definitions/{key}"} for key in DEFINITIONS}
    top = {key: value for key, value in SCHEMA["properties"].items() if key not in ("$schema", "training_params")}
    assert top == SCHEMA["properties"]["training_params"]["properties"] == refs
    for key, definition in DEFINITIONS.items():
        assert definition["description"], key
        for value in (*definition.get("examples", []), *([definition["default"]] if "default" in definition else [])):
            jsonschema.validate(value, definition)


def test_the_example_shows_every_key_and_lacks_only_the_images() -> None:
    document = json.loads((ROOT / "example_config.json").read_text("utf-8"))
    assert {*document, *document["training_params"]} - {"$schema", "training_params"} == {*DEFINITIONS}
    assert run("--config", ROOT / "example_config.json", "--validate-only").last["code"] == "dataset_unreadable"


def test_flat_and_nested_configs_are_the_same_and_a_key_in_both_has_one_value(tmp_path: Path) -> None:
    changes = {"steps": 7, "lora_rank": 8}
    shapes = [REQUIRED | changes, {**REQUIRED, "training_params": changes}, {"training_params": REQUIRED | changes}]
    shapes.append(REQUIRED | changes | {"training_params": {"steps": 7}})
    flat, *nested = (parse(tmp_path, shape) for shape in shapes)
    assert nested == [flat] * 3
    is_valid = jsonschema.Draft7Validator(SCHEMA).is_valid
    assert [is_valid(shape) for shape in (*shapes, {"training_params": changes})] == [True] * 4 + [False]
    assert "keep one" in problems_of(tmp_path, REQUIRED | {"steps": 7, "training_params": {"steps": 8}})["steps"]


def test_all_problems_are_reported_at_once_before_torch_is_imported(tmp_path: Path) -> None:
    nested = {"lora_rank": 0, "device": "tpu"}
    config = write_config(tmp_path, dataset_path=3, trigger_words=[], stepz=1, training_params=nested)
    code = "main = t.main\nt.main = lambda argv: main(argv) + 2 * ('torch' in sys.modules)"
    result = finish(patched(code, "--config", config))
    assert (result.code, result.last["code"]) == (1, "config_invalid")
    found = {item["path"]: item["message"] for item in result.last["problems"]}
    assert {*found} == {"dataset_path", "base_model", "output_path", "trigger_words", "stepz", "lora_rank", "device"}
    assert found["stepz"] == "unknown key (did you mean 'steps'?)"
    assert found["lora_rank"] == "0 is less than the minimum of 1"
    assert found["base_model"] == f"is required: {DEFINITIONS['base_model']['description']}"


def test_every_key_refuses_what_its_definition_does_not_allow_and_says_what_it_allows(tmp_path: Path) -> None:
    for key, definition in DEFINITIONS.items():
        types = [definition["type"]] if isinstance(definition["type"], str) else definition["type"]
        refused: list[Any] = [([] if types == ["object"] else {}, "is not of type " + ", ".join(map(repr, types)))]
        for word, (make_bad, words) in BOUNDS.items():
            refused += [(make_bad(definition[word]), words.format(definition[word]))] if word in definition else []
        for value, words in refused:
            problems = problems_of(tmp_path, REQUIRED | {key: value})
            assert ([*problems], words in problems[key]) == ([key], True), problems


@pytest.mark.parametrize(
    ("text", "code", "words"),
    [
        ('{\n"a": 1\n"b": 2}', "config_unreadable", "line 3, column 1"),
        ("[]", "config_invalid", "must be a JSON object"),
        ('{"training_params": 3}', "config_invalid", "must be an object"),
        ('{"a":' * 100_000, "config_unreadable", "cannot be parsed"),
        ('{"steps": ' + "9" * 5000 + "}", "config_unreadable", "cannot be parsed"),
        ('{"steps": NaN}', "config_invalid", "NaN, which is not finite"),
        ('{"steps": 1, "steps": 2}', "config_invalid", "the key 'steps' twice"),
        ('{"a": "Möwe"}'.encode("latin-1"), "config_unreadable", "cannot be parsed"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_malformed_json_is_an_error_with_a_place_or_a_reason(tmp_path: Path, text: Any, code: str, words: str) -> None:
    with pytest.raises(trainer.TrainerError) as caught:
        parse(tmp_path, text)
    assert (caught.value.code, words in caught.value.message) == (code, True)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
def test_byte_order_marks_utf_16_and_whole_floats_are_read(tmp_path: Path, encoding: str) -> None:
    text = json.dumps(REQUIRED | {"steps": 1000.0, "trigger_words": ["Möwe"]}, ensure_ascii=False)
    config = parse(tmp_path, text.encode(encoding))
    assert (config.steps, type(config.steps), config.trigger_words) == (1000, int, ("Möwe",))


def test_a_config_comes_from_a_file_that_is_named_if_it_is_missing_or_from_stdin() -> None:
    missing, piped = run("--config", "my.json"), run("--config", "-", input=b'{"stepz": 1}')
    assert (missing.code, missing.last["code"]) == (1, "config_unreadable")
    assert "my.json: No such file" in missing.last["message"]
    assert (piped.code, piped.last["code"], piped.last["problems"][0]["path"]) == (1, "config_invalid", "stepz")


def test_keys_of_other_trainers_are_known_by_their_names_here(tmp_path: Path) -> None:
    others = {name: key for key, row in DEFINITIONS.items() for name in row.get("x-other-names", [])}
    assert (len(others) > 40, {*others} & {*DEFINITIONS}) == (True, set())
    problems = problems_of(tmp_path, REQUIRED | dict.fromkeys(others, 1), ("network_dim=3",))
    names = others | {"--set network_dim": "lora_rank"}
    assert problems == {name: f"unknown key (it is called '{key}' here)" for name, key in names.items()}


def test_set_overrides_a_key_wherever_it_stands(tmp_path: Path) -> None:
    overrides = ("steps=9", "output_name=mine", 'trigger_words=["a", "b"]')
    config = parse(tmp_path, REQUIRED | {"training_params": {"steps": 7}}, overrides)
    assert (config.steps, config.output_name, config.trigger_words) == (9, "mine", ("a", "b"))


@pytest.mark.parametrize("override", WRONG_OVERRIDES, ids=lambda text: text[:12])
def test_a_wrong_override_is_named_as_such(tmp_path: Path, override: str) -> None:
    with pytest.raises(trainer.TrainerError) as caught:
        parse(tmp_path, REQUIRED, (override,))
    assert (caught.value.code, WRONG_OVERRIDES[override] in caught.value.message) == ("config_invalid", True)


def test_paths_are_relative_to_the_config_overrides_to_here(tmp_path: Path, monkeypatch: Patch) -> None:
    for name in ("base", "elsewhere"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    config = parse(tmp_path, REQUIRED | {"base_model": "base"}, ("output_path=here", "cache_dir=~nosuchuser/x"))
    assert (config.dataset_path, config.base_model) == (str(tmp_path / "images"), str(tmp_path / "base"))
    elsewhere = [str(tmp_path / "elsewhere" / name) for name in ("here", "~nosuchuser/x")]
    assert [config.output_path, config.cache_dir] == elsewhere
    assert parse(tmp_path, REQUIRED | {"base_model": "sdxl"}).base_model == "sdxl"
    assert parse(tmp_path, REQUIRED | {"base_model": "x.safetensors"}).base_model == str(tmp_path / "x.safetensors")


@pytest.fixture
def all_packages(monkeypatch: Patch) -> None:
    """Let every optional package seem to be installed."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: SimpleNamespace(origin=name))


WITH_CLASS: Json = {"class_preservation_weight": 0.5, "class_words": "thing"}
STOPS_TEXT: Json = {"train_text_encoder": True, "text_encoder_stop": 0.5}


@pytest.mark.parametrize(
    ("path", "words", "changes"),
    [
        ("steps", "is not of type 'integer', 'null'", {"steps": "9" * 500}),
        ("trigger_words[1]", "' ' is not a word", {"trigger_words": ["ok", " "]}),
        ("metadata", "'colour' was unexpected", {"metadata": {"colour": "red"}}),
        ("sample_prompts", "surrogate", {"sample_prompts": ["\udcff \ud800"]}),
        ("training_params.lora_rnk", "unknown key (did you mean 'lora_rank'?)", {"training_params": {"lora_rnk": 3}}),
        ("save_format", "diffusers reads no lokr", {"lora_type": "lokr", "save_format": "diffusers"}),
        ("use_rslora", "must be false with lora_type lokr", {"lora_type": "lokr", "use_rslora": True}),
        ("lora_dropout", "must be 0 with lora_type lokr", {"lora_type": "lokr", "lora_dropout": 0.1}),
        ("quantize_base", "must be none with lora_type lokr", {"lora_type": "lokr", "quantize_base": "nf4"}),
        ("quantize_base", "nf4 needs CUDA", {"quantize_base": "nf4", "device": "cpu"}),
        ("max_timestep", "must be more than min_timestep (500)", {"min_timestep": 500, "max_timestep": 500}),
        ("ema_decay", "averages by itself", {"optimizer": "schedulefree_adamw", "ema_decay": 0.9}),
        ("adam_beta1", "must be more than 0", {"optimizer": "schedulefree_adamw", "adam_beta1": 0}),
        ("init_lora_path", "must be an existing .safetensors file", {"init_lora_path": "missing.safetensors"}),
        ("regularization_path", "must be another folder", {"regularization_path": "./images"}),
        ("change_penalty", "must be 0 with lora_type dora", {"change_penalty": 0.1, "lora_type": "dora"}),
        ("class_words", "is needed by class_preservation_weight", {"class_preservation_weight": 1}),
        ("class_words", "must not contain a trigger word", WITH_CLASS | {"class_words": "a Zorb"}),
        ("text_encoder_stop", "must be 1", STOPS_TEXT | {"optimizer": "prodigy"}),
        ("training_params", "must be an object", {"training_params": [], "regularization_path": "x"}),
        ("class_words", "is not words with one space between", {"class_words": "wo{man"}),
        ("class_preservation_weight", "needs train_text_encoder false", WITH_CLASS | {"train_text_encoder": True}),
        ("unmasked_target", "needs train_text_encoder false", {"unmasked_target": "base", "train_text_encoder": True}),
        ("text_encoder_learning_rate", "is too short", {"text_encoder_learning_rate": [1e-5]}),
    ],
)
@pytest.mark.usefixtures("all_packages")
def test_settings_that_cannot_be_or_work_together_are_named(
    tmp_path: Path, path: str, words: str, changes: Json
) -> None:
    problems = problems_of(tmp_path, REQUIRED | changes)
    assert ([*problems], words in problems[path]) == ([path], True)


def test_each_concept_may_have_its_own_class_words(tmp_path: Path) -> None:
    concept = {"folder": "anna", "trigger_words": ["zorb"], "class_words": "woman"}
    changes: Json = {"class_preservation_weight": 1, "trigger_words": ["zorb"], "concepts": [concept]}
    assert parse(tmp_path, REQUIRED | changes).class_words is None
    for words in ("a zorb", "other"):  # One is its own trigger word, one is another concept's.
        other = {"folder": "b", "trigger_words": ["Other"], "class_words": ""}
        wrong = changes | {"concepts": [concept | {"class_words": words}, other]}
        assert [*problems_of(tmp_path, REQUIRED | wrong)] == ["class_words"]
    del concept["class_words"]
    for lacking in ({"trigger_words": ["zorb", "for all the rest"]}, {"concepts": [concept]}):
        assert [*problems_of(tmp_path, REQUIRED | changes | lacking)] == ["class_words"]


def test_a_missing_package_is_named_with_its_command(tmp_path: Path, monkeypatch: Patch) -> None:
    # A folder beside the script that has a package's name looks like one without a file of its own.
    specs = {"wandb": SimpleNamespace(origin=None)}
    monkeypatch.setattr(importlib.util, "find_spec", specs.get)
    for optimizer, package in ((name, row.package) for name, row in trainer.OPTIMIZERS.items() if row.package):
        changes = {"optimizer": optimizer, "quantize_base": "nf4", "report_to": ["wandb"]}
        messages = " ".join(problems_of(tmp_path, REQUIRED | changes).values())
        assert {*re.findall(r"pip install (\S+)", messages)} == {package, "bitsandbytes", "wandb"}


@pytest.mark.usefixtures("all_packages")
def test_null_stands_for_what_the_schema_says_and_each_optimizer_has_a_rate_of_its_own(tmp_path: Path) -> None:
    rates = DEFINITIONS["learning_rate"]["x-when-null"]
    assert list(rates) == [*DEFINITIONS["optimizer"]["enum"], "lokr"] == [*trainer.OPTIMIZERS, "lokr"]
    assert (rates["adamw"], rates["prodigy"], rates["lion"]) == (1e-4, 1.0, 3e-5)
    for optimizer in trainer.OPTIMIZERS:
        config, rate = parse(tmp_path, REQUIRED | {"optimizer": optimizer}), rates[optimizer]
        assert (config.learning_rate, config.lora_alpha, config.sample_prompts) == (rate, config.lora_rank, ("zorb",))
        assert list(trainer.config_warnings(config)) == []
        lokr = parse(tmp_path, REQUIRED | {"optimizer": optimizer, "lora_type": "lokr"})
        assert lokr.learning_rate == (rates["lokr"] if optimizer.startswith("adamw") else rate)


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("steps_over_epochs", {"steps": 5, "epochs": 2}),
        ("prodigy_rate_low", {"optimizer": "prodigy", "learning_rate": 1e-4}),
        ("schedule_not_needed", {"optimizer": "schedulefree_adamw", "lr_scheduler": "cosine"}),
        ("schedule_not_needed", {"optimizer": "prodigy", "lr_scheduler": "cosine_with_restarts"}),
        ("learning_rate_high", {"learning_rate": 1.0}),
        ("setting_unused", {"huber_c": 0.5}),
        ("setting_unused", {"regularization_target": "base"}),
        ("setting_unused", {"unmasked_target": "base"}),
        ("setting_unused", {"text_encoder_stop": 0.5}),
        ("setting_unused", {"optimizer": "lion", "adam_beta2": 0.99}),
    ],
)
@pytest.mark.usefixtures("all_packages")
def test_settings_that_hardly_make_sense_warn(tmp_path: Path, code: str, changes: Json) -> None:
    assert [name for name, _, _ in trainer.config_warnings(parse(tmp_path, REQUIRED | changes))] == [code]


def test_every_pattern_has_its_rule_in_words(tmp_path: Path) -> None:
    values = {
        "output_name": "my lora",
        "caption_extension": "txt",
        "variant": "f p",
        "device": "gpu",
        "dataset_path": "",
    }
    problems = problems_of(tmp_path, REQUIRED | values | {"trigger_words": [" "]})
    assert "'my lora' is not made of 1 to 64 letters, digits, _, - and dots" in problems["output_name"]
    assert "'txt' is not a dot and up to 16 letters" in problems["caption_extension"]
    assert problems.keys() == {*values, "trigger_words[0]"}
    assert not any(re.search(r"[\^$\\]", message) for message in problems.values())


@pytest.mark.parametrize("text", ["steps = 5\n", "steps: 5\ndataset_path: x\n", "# a comment\n{}"])
def test_a_config_that_is_no_json_at_all_is_not_told_about_commas(tmp_path: Path, text: str) -> None:
    with pytest.raises(trainer.TrainerError) as caught:
        parse(tmp_path, text)
    assert "TOML and YAML are not read" in caught.value.hint
    problems = problems_of(tmp_path, {"training_params": [], "stepz": 1, "base_model": "sd15"})
    assert list(problems) == ["training_params", "stepz"]


# ======================================================================================
# events and terminal
# ======================================================================================

LIMIT_S = 600  # It is a limit for what hangs; on a busy machine everything takes many times its time.
WRONG_COMMAND_LINES = {
    "": "Put --config before the JSON file.",
    "my.json": "Put --config before my.json.",
    "--confg x": "No such option: --confg (did you mean '--config'?).",
    "--config": "expected one argument",
}
NUMBERS = "percent loss loss_avg learning_rate grad_norm epoch steps_per_second eta_seconds vram_gb"
PROGRESS: Json = dict.fromkeys(NUMBERS.split(), 0.1) | {"total_steps": 1500, "learning_rates": {"unet": 1e-4}}
FILE: Json = {"bytes": 1, "sha256": "0" * 64}
END = "s.emit('complete', step=1, final_path='/out/a', total_time=1, loss=None, recommended=None, **FILE); s.close()\n"
NOISY_IMPORT = """
import ctypes, logging, subprocess, warnings
load = t.import_libraries
def noisy(unused):
    print("python print"); os.write(1, b"raw write\\n"); subprocess.run(["echo", "a child process"])
    ctypes.CDLL(None).puts(b"C puts"); ctypes.CDLL(None).fflush(None)
    warnings.warn("careful"); logging.getLogger("a library").warning("logged")
    load(unused)
t.import_libraries = noisy
"""


def started(config: Path, code: str = "", *options: str, **environment: str) -> Copy:
    """Start the script with parts of it replaced by `code`; it is killed at the latest when the test is over."""
    return Copy(code, "--config", config, *options, **environment)


def with_pipes(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def read_until(process: Process, **fields: Any) -> bytes:
    """Read the events of a process up to the first one with these fields."""
    lines = b""
    for line in process.stdout or ():
        lines += line
        if fields.items() <= json.loads(line).items():
            return lines
    pytest.fail(f"The process ended first: {lines.decode()}")


def finish(process: Process, lines: bytes = b"") -> Run:
    """Read the rest of a process's events, after `lines` of them, to its end."""
    rest, stderr = (pipe.read() if pipe else b"" for pipe in (process.stdout, process.stderr))
    return Run(process.wait(timeout=LIMIT_S), lines + rest, stderr)


@pytest.fixture
def endless(tmp_path: Path, images: Path, request: pytest.FixtureRequest) -> Path:
    """Return the config of a run that ends only when it is stopped, by a signal in most tests."""
    if os.name == "nt":
        pytest.skip("this needs POSIX signals")
    models = request.getfixturevalue("models")
    changes = {"steps": 100_000, "checkpoint_steps": 0, "batch_size": 1}
    return write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", **changes))


@pytest.mark.parametrize("arguments", WRONG_COMMAND_LINES)
def test_a_wrong_command_line_is_an_error_event_and_exit_code_2(arguments: str) -> None:
    result = run(*arguments.split())
    assert (result.code, [event["type"] for event in result.events]) == (2, ["start", "error"])
    assert (result.last["code"], WRONG_COMMAND_LINES[arguments] in result.last["message"]) == ("usage", True)


def test_a_heartbeat_comes_when_there_was_no_event_and_is_no_sign_of_progress() -> None:
    code = "s.HEARTBEAT_S, before = 0.3, s.beat_at\nwhile s._seq < 3: time.sleep(0.05)\n"
    code += "s.emit('response', id=1, request='save', state='done', message='Done.', paths=[])\n"
    result = streamed(f"{code}assert s.beat_at == before\n{END}")
    beats = result.of("info")
    assert len(beats) == 2 and all(event["message"] == "Still starting." for event in beats)
    idle_s = [event["idle_seconds"] for event in beats]
    assert 0.2 < idle_s[0] < idle_s[1] < result.last["elapsed"] + 1
    assert "Still" not in result.stderr


def test_events_are_strict_ascii_json_in_one_line_whatever_they_hold() -> None:
    fields = {"loss": math.nan, "path": Path("a\udcffb"), "text": "\ud800é\n" * 10**6, "deep": [{"a": math.inf}]}
    line = trainer.json_line(fields)
    event = json.loads(line, parse_constant=lambda token: pytest.fail(token))
    assert event["text"] == "\ufffdé\n" * 10**6
    assert (event["loss"], event["path"], event["deep"]) == (None, "a\ufffdb", [{"a": None}])
    assert (line.isascii(), line.count(b"\n")) == (True, 1)


def stream(code: str, *arguments: str | Path) -> list[str]:
    """Return the command of a process that opens an event stream `s`, runs `code` and emits the last event."""
    start = "import os, sys, time\nfrom pathlib import Path\nimport train_lora as t\n"
    start += f"progress = {PROGRESS}\nFILE = {FILE}\ns = t.EventStream()\ns.start(lambda: None, None)\n"
    return [sys.executable, "-c", start + code + END, *map(str, arguments)]


def streamed(code: str, *arguments: str | Path) -> Run:
    done = subprocess.run(stream(code, *arguments), cwd=ROOT, capture_output=True, timeout=LIMIT_S)
    return Run(done.returncode, done.stdout, done.stderr)


def test_repeats_of_a_phase_are_thinned_out_and_nothing_comes_after_the_last_event() -> None:
    code = "s.REPEAT_S = 1e9; beats = []\nfor n in s.track('Encoding.', range(5), 5, phase='caching'):\n"
    code += "    beats.append(s.beat_at > 0); s.beat_at = 0.0  # Each item is a sign of progress all the same.\n"
    code += f"s.info(f'beats: {{sum(beats)}} {{s.beat_at > 0}}')\n{END}s.info('late')\n"
    result = streamed(code)
    assert [event["current"] for event in result.of("info")[:-1]] == [0, 5]
    assert result.of("info")[-1]["message"] == "beats: 5 True"
    numbered = [(event["seq"], event["type"]) for event in result.events]
    assert numbered == [*enumerate(["start", "info", "info", "info", "complete"])]


def test_a_noisy_library_cannot_reach_stdout(endless: Path) -> None:
    result = finish(patched(NOISY_IMPORT, "--config", endless, "--validate-only"))
    assert (result.code, result.last["type"]) == (0, "validated")
    noise = ("python print", "raw write", "a child process", "C puts")
    assert [words for words in noise if words not in result.stderr] == []
    assert not re.search("careful|logged", result.stderr), "advice for people at a notebook"


@posix
@pytest.mark.parametrize("redirection", ["<&-", "<&- 2>&-", "2>/dev/full", ">&-", "<&- >&- 2>&-"])
def test_descriptors_that_are_closed_at_the_start_disturb_no_file(tmp_path: Path, redirection: str) -> None:
    line = f"{shlex.join(command('--config', tmp_path / 'none.json'))} {redirection}"
    done = subprocess.run(["sh", "-c", line], capture_output=True, timeout=LIMIT_S)
    assert done.returncode == 1
    if ">&-" in redirection.split():
        assert (b"stdout is closed" in done.stderr) is ("2>&-" not in redirection)
    else:
        assert Run(1, done.stdout, done.stderr).last["code"] == "config_unreadable"


def test_a_stderr_that_nobody_reads_delays_nothing() -> None:
    reading, writing = os.pipe()  # It holds 64 KB.
    code = "for n in range(3000): s.info(f'note {n} ' + 'x' * 100)\n"
    done = subprocess.run(stream(code), cwd=ROOT, stdout=subprocess.PIPE, stderr=writing, timeout=LIMIT_S)
    os.close(reading)
    os.close(writing)
    assert (done.returncode, len(Run(0, done.stdout, b"").of("info"))) == (0, 3000)


def test_a_slow_reader_loses_progress_and_nothing_else_and_a_person_still_reads_the_end(tmp_path: Path) -> None:
    code = "s.QUEUE_LIMIT = 50\nfor n in range(5000):\n    s.emit('progress', step=n, **progress)\n"
    code += f"    n % 100 or s.info(f'note {{n}}')\n{END.partition(';')[0]}\n"
    code += "Path(sys.argv[1]).touch()\ns.close(); t.wait_until_empty(s._spoken, None)\n"
    with with_pipes(stream(code, tmp_path / "emitted")) as process:
        while not (tmp_path / "emitted").exists():
            time.sleep(0.02)
        result = finish(process)
    assert [event["message"] for event in result.of("info")] == [f"note {n}" for n in range(0, 5000, 100)]
    assert 0 < len(result.of("progress")) == 5000 - result.last["dropped"] < 5000
    assert "complete: Step 1 after 1 s: /out/a" in result.stderr.splitlines()


def test_when_the_reader_goes_away_the_run_saves_and_exits_141(tmp_path: Path, endless: Path) -> None:
    with started(endless) as process:
        read_until(process, type="progress")
        process.stdout.close()
        assert process.wait(timeout=LIMIT_S) == 141
    log = logged(tmp_path / "out/events.jsonl")
    check_events(log)
    assert (log[-1]["type"], Path(log[-1]["state_path"]).exists()) == ("interrupted", True)


def test_half_a_line_of_a_killed_run_is_ended_by_a_newline(tmp_path: Path) -> None:
    log, before = tmp_path / "events.jsonl", b'{"type": "start"}\n{"type": "prog\0\0'
    log.write_bytes(before)
    result = streamed("s.open_log(Path(sys.argv[1])); s.info('hello')\n", log)
    written = [json.loads(line) for line in log.read_bytes().removeprefix(before + b"\n").splitlines()]
    assert written == result.events


def test_a_log_that_cannot_be_written_to_any_more_is_one_warning_and_the_events_go_on(tmp_path: Path) -> None:
    pytest.importorskip("resource")
    code = "from resource import *\nlog = Path(sys.argv[1]); s.open_log(log)\n"
    code += "setrlimit(RLIMIT_FSIZE, (log.stat().st_size + 250, RLIM_INFINITY))\n"
    code += "for n in range(5): s.info(f'note {n}')\n"
    result = streamed(code, tmp_path / "events.jsonl")
    assert [event["code"] for event in result.of("warning")] == ["log_not_written"]
    assert [event["seq"] for event in result.events] == list(range(8))
    assert logged(tmp_path / "events.jsonl") == result.events[:3]


def test_people_read_every_problem_of_an_error_on_stderr_and_what_to_do(tmp_path: Path) -> None:
    config = write_config(tmp_path, stepz=1, mötiv=2)
    result = run("--config", config, "--set", "lora_rank=0", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    first, *listed = result.stderr.splitlines()
    assert first.startswith("error: The config has 7 problems: stepz: unknown key (did you mean 'steps'?); m\\xf6tiv: ")
    assert first.endswith(f" {trainer.HINTS['config_invalid']} (config_invalid: see docs/troubleshooting.md)")
    texts = [f"{item['path']}: {item['message']}" for item in result.last["problems"]]
    assert [text for text in texts if text.replace("ö", r"\xf6") not in result.stderr] == []
    assert {line.removeprefix("  - ") for line in listed} < {*texts}, "what the first line says is not said again"


def test_a_log_is_sparse_and_clean(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    now = 100.0
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: now))
    terminal = trainer.Terminal()
    for message in ("Encoding images.", "Sampling at step 4."):
        for done in range(41):
            now += 0.45
            terminal.show("info", {"message": message, "current": done, "total": 40})
    terminal.show("progress", PROGRESS | {"step": 9})
    terminal.show("warning", {"message": "a\r\nb\tc\x9bm\u202ed", "hint": "\x1b[2Je"})
    expected = [f"{title}: {done}/40" for title in ("Encoding images", "Sampling at step 4") for done in (0, 23)]
    expected += ["Training: 9/1500, loss 0.1000", "warning: a ", "b c?m?d ?[2Je", ""]
    assert capsys.readouterr().err.split("\n") == expected


def at_a_terminal(process: list[str], width: int = 80, stdout: bool = False) -> tuple[int, str]:
    """Run with a terminal of this width at stderr (and at stdout); return the exit code and what was written there."""
    reading, writing = os.openpty()
    streams: Json = {"stdout": writing if stdout else subprocess.DEVNULL, "stderr": writing}
    sized = ["sh", "-c", f'stty rows 24 columns {width} <&2; exec "$@"', "sh", *process]
    written = b""
    with subprocess.Popen(sized, cwd=ROOT, env=os.environ | {"NO_COLOR": "1"}, **streams) as child:
        os.close(writing)
        with contextlib.suppress(OSError):  # The other end is closed.
            while data := os.read(reading, 4096):
                written += data
        os.close(reading)
    return child.returncode, written.decode().replace("\r\n", "\n")


@posix
def test_at_a_terminal_a_bar_fits_the_width_and_leaves_the_messages_and_the_end() -> None:
    code = "for n in s.track('Encoding images.', range(9), 9): pass\n"
    code += "for n in range(200):\n    s.emit('progress', step=n, **progress)\n"
    code += "    if n == 99: s.warning('x', 'Careful.', 'Look.')\n"
    ended, written = at_a_terminal(stream(code), width=40)
    lines = [line.rpartition("\r")[2] for line in written.split("\n")]  # The bar before it was overwritten.
    assert (ended, lines) == (0, ["warning: Careful. Look.", "complete: Step 1 after 1 s: /out/a", ""])
    bars = re.findall(r"((?:Encoding images|Training): [^\r\n]*)", written)
    assert {bar.partition(":")[0] for bar in bars} == {"Encoding images", "Training"}
    assert max(map(len, bars)) <= 40


@posix
def test_events_on_the_same_terminal_stay_whole_and_the_end_can_be_read() -> None:
    ended, written = at_a_terminal(command("--config", "none.json"), stdout=True)
    *lines, end = written.splitlines()
    check_events([json.loads(line) for line in lines])
    assert (ended, "\x1b" in written) == (1, False)
    assert re.match(r"error: .*none\.json: No such file", end)


# ======================================================================================
# stopping and requests
# ======================================================================================

# Code for `started`: the run stays after a step or in one until it is stopped; other obstacles.
HOLD_AT_STEP = """
periodic = t.LoRATrainer.periodic
def hold(self):
    periodic(self)
    while self.state.step == int(os.environ["STEP"]) and not self.stop.requested: time.sleep(0.02)
t.LoRATrainer.periodic = hold
"""
HANG_IN_STEP = """
t.StopWatcher.PATIENCE_S = float(os.environ["PATIENCE_S"])
loss = t.LoRATrainer.loss
def hang(self, batch, step, micro_batch):
    while step == 3 and not self.events.reader_is_gone:
        self.events.info(f"stop: {self.stop.requested}"); time.sleep(0.1)
    time.sleep(0.5 * (step == 3))  # In this time the watcher hears of the reader.
    return loss(self, batch, step, micro_batch)
t.LoRATrainer.loss = hang
"""
STUCK_FILE = """
unlink, save = t.Path.unlink, t.LoRATrainer.save
def stuck(self, *unused, **options):
    if self.name == "stop": raise PermissionError(13, "stuck")
    unlink(self, *unused, **options)
def slow_save(self, *unused, **options):
    time.sleep(1.5)  # In this time the files are looked for again.
    save(self, *unused, **options)
t.Path.unlink, t.LoRATrainer.save = stuck, slow_save
"""
PHASES = {"importing": "import_libraries", "loading": "PromptEncoder", "caching": "encode_images"}
PHASES |= {"sampling": "decode_latents"}
WAYS = {"patience": ("0.1", 3), "second signal": ("600", 3), "reader gone": ("600", 4)}  # The last is no second stop.
WAITING = "t.load_config = lambda *_: (print('ready', file=sys.stderr, flush=True), time.sleep(9999))"


@pytest.mark.parametrize("phase", PHASES)
def test_a_stop_before_the_first_step_leaves_at_once(tmp_path: Path, endless: Path, phase: str) -> None:
    hang = f"t.{PHASES[phase]} = lambda *_, **__: time.sleep(600)"
    with started(endless, hang, "--set", "sample_at_start=true") as process:
        lines = read_until(process, phase=phase)
        process.terminate()
        result = finish(process, lines)
    assert (result.code, result.last["type"], result.last["signal"]) == (143, "interrupted", "SIGTERM")
    assert (result.last["path"], result.last["state_path"], result.last["step"]) == (None, None, 0)
    assert [*(tmp_path / "out").glob("checkpoints/*")] == []


def test_a_stopped_run_saves_goes_on_and_ends_in_the_same_bits(tmp_path: Path, images: Path, models: Path) -> None:
    changes = {"steps": 6, "lora_dropout": 0.1, "lr_scheduler": "cosine"}
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", **changes))
    whole = run_copy("--config", config, "--set", f"output_path={tmp_path / 'whole'}")
    parts: list[Run] = []
    for step, number in ((2, signal.SIGINT), (4, signal.SIGTERM)):
        with started(config, HOLD_AT_STEP, STEP=str(step)) as process:
            lines = read_until(process, step=step)
            process.send_signal(number)
            parts.append(finish(process, lines))
        last = parts[-1].last
        assert (parts[-1].code, last["type"], last["signal"]) == (128 + number, "interrupted", number.name)
        assert (last["step"], Path(last["path"]).exists(), Path(last["state_path"]).exists()) == (step, True, True)
    parts.append(run_copy("--config", config))
    assert (parts[-1].code, parts[-1].last["type"]) == (0, "complete")
    losses = {event["step"]: event["loss"] for part in parts for event in part.of("progress")}
    assert losses == {event["step"]: event["loss"] for event in whole.of("progress")}
    for name in ("lora_final.safetensors", "checkpoints/state_step_6.safetensors"):
        assert_same_tensors(tmp_path / "out" / name, tmp_path / "whole" / name)
    assert logged(tmp_path / "out/events.jsonl") == [event for part in parts for event in part.events]


def test_sigusr1_and_the_files_save_and_stop_do_what_they_say(tmp_path: Path, endless: Path) -> None:
    with started(endless) as process:
        lines = read_until(process, type="progress")
        process.send_signal(signal.SIGUSR1)
        lines += read_until(process, type="checkpoint")
        (tmp_path / "out/save").touch()
        lines += read_until(process, type="checkpoint")
        (tmp_path / "out/stop").touch()
        result = finish(process, lines)
    assert (result.code, result.last["type"]) == (143, "interrupted")
    assert [Path(event["path"]).exists() for event in result.of("checkpoint")] == [True] * 3
    assert not {"stop", "save"} & {path.name for path in (tmp_path / "out").iterdir()}


def test_a_file_stop_that_cannot_be_removed_is_one_request(tmp_path: Path, endless: Path) -> None:
    with started(endless, STUCK_FILE) as process:
        lines = read_until(process, type="progress")
        (tmp_path / "out/stop").touch()
        result = finish(process, lines)
    # A second request would have saved the state only.
    assert (result.code, result.last["type"], bool(result.last["path"])) == (143, "interrupted", True)


def test_a_file_stop_that_was_meant_for_an_earlier_run_is_removed(tmp_path: Path) -> None:
    for name, age_s in (("stop", 1e5), ("save", -1e5)):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (time.time() - age_s,) * 2)
    trainer.StopWatcher(Recorder()).watch(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["save"]


@posix
def test_a_stop_is_heard_while_the_reader_is_asleep(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with pytest.raises(BlockingIOError):
        while True:
            os.write(writing, b" " * 65536)
    os.set_blocking(writing, True)
    with patched(WAITING, "--config", tmp_path / "none", stdout=writing) as process:
        os.close(writing)
        assert next(iter(process.stderr or ())) == b"ready\n"
        process.terminate()
        assert process.wait(timeout=LIMIT_S) == 143
    os.close(reading)


def test_a_signal_that_was_ignored_at_the_start_stays_ignored(tmp_path: Path) -> None:
    ignore = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"  # as nohup does
    with started(tmp_path / "none", ignore + WAITING) as process:
        lines = read_until(process, type="start")
        for number in (signal.SIGHUP, signal.SIGINT):
            process.send_signal(number)
        result = finish(process, lines)
    assert (result.code, result.last["signal"], len(result.events)) == (130, "SIGINT", 3)


@pytest.mark.parametrize("way", WAYS)
def test_a_stop_in_a_step_without_end_saves_the_last_whole_step(tmp_path: Path, endless: Path, way: str) -> None:
    patience_s, step = WAYS[way]
    assert trainer.StopWatcher.PATIENCE_S + trainer.StopWatcher.LEAVE_S < 10, "Docker kills after ten seconds"
    with started(endless, HANG_IN_STEP, PATIENCE_S=patience_s) as process:
        assert process.stdout
        read_until(process, message="stop: False")
        process.terminate()
        read_until(process, message="stop: True") if way != "patience" else None
        process.send_signal(signal.SIGINT) if way == "second signal" else None
        process.stdout.close() if way == "reader gone" else process.stdout.read()
        assert process.wait(timeout=LIMIT_S) == 143
    last = logged(tmp_path / "out/events.jsonl")[-1]
    assert (last["type"], last["step"], bool(last["path"])) == ("interrupted", step, way == "reader gone")
    stopped = Path(shutil.move(last["state_path"], tmp_path / "stopped"))
    run_copy("--config", endless, "--set", f"steps={step}")
    assert_same_tensors(stopped, Path(last["state_path"]))


def test_as_the_first_process_of_a_container_it_hears_a_stop(endless: Path) -> None:
    inside = ["unshare", "--user", "--map-root-user", "--fork", "--pid", "--kill-child"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], capture_output=True).returncode:
        pytest.skip("no PID namespace can be made here")
    with with_pipes([*inside, *command("--config", endless)]) as process:
        lines = read_until(process, type="progress")
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(child), signal.SIGTERM)
        result = finish(process, lines)
    assert (result.events[0]["pid"], result.code, result.last["type"]) == (1, 143, "interrupted")
    assert Path(result.last["path"]).exists()


# Code for `started`: stdin is a named pipe.
LISTEN = "os.dup2(os.open(os.environ['STDIN'], os.O_RDONLY), 0)\n"


def request(key: Any, kind: str, **fields: Any) -> bytes:
    return json.dumps({"id": key, "request": kind, **fields}).encode()


REFUSED: dict[str, tuple[bytes, Any, str]] = {  # Each line has the id of its answer, and words from it.
    "empty": (b"", None, "not valid JSON"),
    "binary": (b"\xff\x00\x80" * 9, None, "cannot be parsed"),
    "too long": (request("x" * 2**20, "save"), None, "longer than 262,144 bytes"),
    "half": (b'{"id": 1, "request": "save"', None, "not valid JSON"),
    "deep": (b"[" * 10**5, None, "cannot be parsed"),
    "a list": (b'["save"]', None, "It needs an id"),
    "no id": (b'{"request": "save"}', None, "It needs an id"),
    "a boolean id": (request(True, "save"), None, "It needs an id"),
    "a long id": (request("x" * 201, "save"), None, "It needs an id"),
    "unknown": (request(1, "dance"), 1, "sample, save, set, stop"),
    "no name": (request(1, ["save"]), 1, "sample, save, set, stop"),  # type: ignore[arg-type]  # It is wrong.
    "twice": (b'{"id": 1, "id": 2, "request": "save"}', None, "has the key 'id' twice"),
    "NaN": (b'{"id": NaN, "request": "save"}', None, "is not finite"),
    "another field": (request(1, "save", prompts=["a"]), 1, "save takes nothing"),
    "one field more": (request(1, "sample", prompts=["a"], steps=3), 1, "sample takes prompts"),
    "no values": (request("a", "set"), "a", "set takes values"),
    "empty values": (request("a", "set", values={}), "a", "set takes values"),
    "a list of values": (request("a", "set", values=["steps"]), "a", "set takes values"),
    "a key that defines the run": (request(1, "set", values={"lora_rank": 4}), 1, "lora_rank: cannot be set"),
    "a key that nobody knows": (request(1, "set", values={"stepz": 4}), 1, "stepz: cannot be set"),
    "a wrong value": (request(1, "set", values={"steps": "many", "log_steps": 0}), 1, "steps: 'many' is not of type"),
    "two wrong values": (request(1, "set", values={"steps": 5, "log_steps": 0}), 1, "0 is less than the minimum"),
    "null steps": (request(1, "set", values={"steps": None}), 1, "steps: must not be null"),
    "no prompt": (request(1, "sample", prompts=[]), 1, "sample_prompts"),
    "a prompt that is no text": (request(1, "sample", prompts=[1]), 1, "1 is not of type 'string'"),
    "half a character": (request(1, "sample", prompts=["a\udc80b"]), 1, "has half a character"),
    "half an id": (request("\udc80", "save"), None, "It needs an id"),
    "nested prompts": (request(1, "sample", prompts=[])[:-2] + b"[" * 200 + b"]" * 201 + b"}", 1, "is not of type"),
    "a huge number": (request(1, "set", values={"sample_guidance_scale": 10**400}), 1, "is greater than the maximum"),
    "a field without a name": (b'{"id": 1, "request": "stop", "": 1}', 1, "stop takes nothing"),
    "an odd size": (request(1, "sample", prompts=[{"prompt": "a", "width": 65}]), 1, "65 is not a multiple of 8"),
}


class Asked(trainer.Requests):
    """Requests that a test hands over by `receive`; it can read the answers."""

    def __init__(self, made: trainer.LoRATrainer) -> None:
        super().__init__(made.events, made.stop, made.config)
        made.requests, made.events.before_last = self, self._answer_the_rest


@pytest.mark.parametrize("name", REFUSED)
def test_a_line_that_is_no_request_is_refused_and_says_why(tmp_path: Path, name: str) -> None:
    line, key, words = REFUSED[name]
    events, stop = Recorder(), mock.Mock(spec=trainer.StopWatcher)
    requests = trainer.Requests(events, stop, load(tmp_path, small(tmp_path, tmp_path, tmp_path)))
    requests.receive(line)
    (answer,) = events.events
    assert (answer["id"], answer["state"], requests.next()) == (key, "refused", None)
    assert words in answer["message"] and len(answer["message"]) < 1000
    assert answer["request"] in (None, *trainer.REQUESTS)
    assert not stop.method_calls


def test_equal_requests_are_each_answered_and_a_second_stop_is_no_second_signal(tmp_path: Path) -> None:
    events, stop = Recorder(), mock.Mock(spec=trainer.StopWatcher, saved=lambda: trainer.NOTHING_SAVED)
    requests = trainer.Requests(events, stop, load(tmp_path, small(tmp_path, tmp_path, tmp_path)))
    for line in (
        request(1, "save"),
        request(1, "save"),
        request(1, "save", x=1),
        request(2, "stop"),
        request(2, "stop"),
    ):
        requests.receive(line)
    waiting = requests.next()
    assert waiting is not None
    requests.answer(waiting, "done", "It is done.")
    requests._answer_the_rest()
    answers = [(event["id"], event["state"]) for event in events.events]
    assert answers[:3] == [(1, "accepted"), (1, "accepted"), (1, "refused")]
    assert answers[3:] == [(2, "accepted"), (2, "accepted"), (1, "done"), (1, "refused"), (2, "done"), (2, "done")]
    assert stop.request.mock_calls == [mock.call(signal.SIGTERM)]


def train_with_requests(made: trainer.LoRATrainer, lines: Mapping[int, Iterable[bytes]]) -> list[Json]:
    """Train; after each step the requests for it arrive. Return the answers."""
    requests, periodic = Asked(made), made.periodic

    def receive_first() -> None:
        for line in lines.get(made.state.step, ()):
            requests.receive(line)
        periodic()

    vars(made)["periodic"] = receive_first
    assert made.train()
    made.finish()
    made.complete()
    release(made.folder)
    return emitted(made, "response")


def random_requests(seed: int, count: int, steps: int) -> dict[int, list[bytes]]:
    """Return for each step some requests and some lines that are none; the ids are numbers from 0."""
    draw, lines = random.Random(seed), collections.defaultdict(list)
    values: list[Json] = [{"log_steps": 2}, {"checkpoint_steps": 3, "checkpoint_limit": 2}, {"sample_seed": 9}]
    values += [{"validation_steps": 4, "sample_prompts": ["b"]}, {"sample_negative_prompt": "c", "sample_steps": 2}]
    values += [{"sample_guidance_scale": 3, "autosave_minutes": 0}, {"steps": steps}]
    for key in range(count):
        kind = draw.choice(["sample", "save", "set", "prompts", "junk"])
        junk = draw.choice([line for line, known, _ in REFUSED.values() if known is None])
        rows = {"set": request(key, "set", values=draw.choice(values)), "junk": junk}
        own = {"prompt": "b", "negative_prompt": "c", "width": 72.0, "height": 64, "steps": 1, "lora_scale": 0.5}
        rows["prompts"] = request(key, "sample", prompts=draw.choices(["a", "b", "some other", "", own], k=2))
        lines[draw.randrange(1, steps)].append(rows.get(kind) or request(key, kind))
    return lines


REQUESTED: Json = {"steps": 8, "lora_dropout": 0.2, "ema_decay": 0.9, "sample_steps": 1, "shuffle_tags": True}
REQUESTED |= {"lr_scheduler": "cosine", "caption_dropout": 0.3}


def check_that_requests_change_no_bit(tiny: TinyRuns, count: int, **changes: Any) -> None:
    plain = tiny.train(output="plain", **REQUESTED | changes)
    made = tiny.set_up(**REQUESTED | changes)
    lines = random_requests(3, count, made.plan.total_steps)
    answers = train_with_requests(made, lines)
    assert_same_tensors(made.final_path, plain.final_path)
    assert_same_tensors(made.checkpoints.state_path(8), plain.checkpoints.state_path(8))
    states = collections.defaultdict(list)
    for answer in answers:
        EVENT_VALIDATOR.validate(answer | {"seq": 1, "timestamp": "2026-01-01T00:00:00.000Z", "elapsed": 1})
        states[answer["id"]].append(answer["state"])
        assert all(Path(path).suffix == ".safetensors" or Path(path).exists() for path in answer["paths"])
        is_file = answer["state"] == "done" and answer["request"] != "set"
        assert bool(answer["paths"]) == is_file, answer
    received = sum(map(len, lines.values()))
    refused = states.pop(None)
    assert {*map(tuple, states.values())} <= {("accepted", "done"), ("refused",)}
    assert received == count == len(refused) + len(states)


@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True, "kind": "sdxl"}, {"cache_dir": "cache"}])
def test_requests_at_random_steps_change_no_bit_and_each_is_answered(tiny: TinyRuns, changes: Json) -> None:
    check_that_requests_change_no_bit(tiny, 40, **changes)


@pytest.mark.torture
def test_a_thousand_requests_change_no_bit(tiny: TinyRuns) -> None:
    check_that_requests_change_no_bit(tiny, 1000)


def test_what_is_asked_for_is_done_in_order_and_said_where(tiny: TinyRuns) -> None:
    made = tiny.set_up(steps=3, validation_steps=0, checkpoint_steps=0)
    lines = [request(1, "sample"), request(2, "sample", prompts=["x", "y"]), request(3, "sample", prompts=["z"])]
    lines += [request("s", "save"), request(4, "set", values={"sample_prompts": ["new"]}), request(5, "sample")]
    answers = train_with_requests(made, {1: lines, 2: [request(6, "set", values={"steps": 1})]})
    done = {answer["id"]: answer for answer in answers if answer["state"] != "accepted"}
    names = {key: [Path(path).name for path in answer["paths"]] for key, answer in done.items()}
    assert names.pop("s") == ["lora_step_1.safetensors", "state_step_1.safetensors"]
    first = ["step_1_0.png", "step_1_1.png", "step_1_2.png", "step_1_3.png"]
    assert names == {1: first[:1], 2: first[1:3], 3: first[3:], 4: [], 5: first[:1], 6: []}
    assert [answer["id"] for answer in answers if answer["state"] == "done"] == [1, 2, 3, "s", 4, 5]
    assert (done[6]["state"], "step 2 is done already" in done[6]["message"]) == ("refused", True)
    samples = [(event["prompt"], event["index"], event["seed"]) for event in emitted(made, "sample")]
    trigger = made.plan.captions[0] or made.plan.config.trigger_words[0]
    assert samples[1:] == [("x", 1, 42), ("y", 2, 43), ("z", 3, 42), ("new", 0, 42)] and trigger
    assert json.loads((tiny.output / "config.json").read_text())["config"]["sample_prompts"] == ["new"]
    with Image.open(tiny.output / "samples/step_1_2.png") as image:
        assert (image.text["prompt"], image.text["seed"]) == ("y", "43")
    expected = tiny.train(output="expected", steps=1, sample_prompts=["y"], sample_seed=43, validation_steps=1)
    with Image.open(expected.folder.sample(1, 0)) as one, Image.open(made.folder.sample(1, 2)) as other:
        assert one.tobytes() == other.tobytes(), "a prompt of a request is drawn as one of the config"


@pytest.mark.parametrize("steps", [5, 9])
def test_another_number_of_steps_is_as_if_the_run_had_stopped_and_gone_on_with_it(tiny: TinyRuns, steps: int) -> None:
    keys: Json = {"lr_scheduler": "cosine", "ema_decay": 0.9}
    asked = tiny.set_up(steps=7, **keys)
    answers = train_with_requests(asked, {3: [request(1, "set", values={"steps": steps})]})
    assert [answer["state"] for answer in answers] == ["accepted", "done"]
    tiny.train(output="resumed", steps=7, stop=3, **keys)
    resumed = tiny.train(output="resumed", steps=steps, **keys)
    assert (asked.state.step, len(emitted(resumed, "progress"))) == (steps, steps - 3)
    assert_same_tensors(asked.final_path, resumed.final_path)
    assert emitted(asked, "progress")[-1]["total_steps"] == steps
    again: trainer.LoRATrainer = tiny.start(make_trainer, steps=steps, **keys)
    assert again.setup(), "it is finished"


def test_what_fails_is_refused_and_the_run_goes_on(tiny: TinyRuns, monkeypatch: Patch) -> None:
    made = tiny.set_up(steps=3)
    monkeypatch.setattr(trainer, "decode_latents", mock.Mock(side_effect=MemoryError("out of memory")))
    write, calls = made.write_lora, itertools.count()

    def write_lora(*arguments: Any) -> Json:
        if next(calls) == 0:
            raise trainer.TrainerError("disk_full", "No space.")
        return write(*arguments)

    vars(made)["write_lora"] = write_lora
    answers = train_with_requests(made, {1: [request(1, "sample"), request(2, "save"), request(3, "save")]})
    by_id = {answer["id"]: (answer["state"], answer["message"]) for answer in answers if answer["state"] != "accepted"}
    assert (by_id[1][0], "Out of memory while sampling" in by_id[1][1]) == ("refused", True)
    assert (by_id[2][0], by_id[3][0], "No space." in by_id[2][1]) == ("refused", "done", True)


def test_a_diverged_run_ends_although_it_was_asked_for_a_save(tiny: TinyRuns, monkeypatch: Patch) -> None:
    made = tiny.set_up(steps=3)
    diverged = trainer.TrainerError("loss_not_finite", "It has diverged.")
    monkeypatch.setattr(made, "save", mock.Mock(side_effect=diverged))
    with pytest.raises(trainer.TrainerError, match="diverged"):
        train_with_requests(made, {1: [request(1, "save")]})


def test_a_prompt_whose_encoding_failed_can_be_drawn_later(tiny: TinyRuns, monkeypatch: Patch) -> None:
    made, calls = tiny.set_up(steps=3), itertools.count()
    encoder = trainer.PromptEncoder

    def fail_once(*arguments: Any) -> Any:
        if next(calls) == 0:
            raise trainer.TrainerError("model_corrupt", "It is away.")
        return encoder(*arguments)

    monkeypatch.setattr(trainer, "PromptEncoder", fail_once)
    again = {step: [request(step, "sample", prompts=["new"])] for step in (1, 2)}
    states = [(answer["id"], answer["state"]) for answer in train_with_requests(made, again)]
    assert states == [(1, "accepted"), (1, "refused"), (2, "accepted"), (2, "done")]


def test_a_run_that_is_told_to_end_here_draws_its_last_samples(tiny: TinyRuns) -> None:
    made = tiny.set_up(steps=9, validation_steps=8, lr_scheduler="cosine")
    train_with_requests(made, {3: [request(1, "set", values={"steps": 3})]})
    assert (made.state.step, [event["step"] for event in emitted(made, "sample")]) == (3, [3])
    assert "schedule_stretched" in warning_codes(made)


def test_requests_arrive_by_stdin_and_wait_until_the_training_begins(tmp_path: Path, endless: Path) -> None:
    stdin = tmp_path / "stdin"
    os.mkfifo(stdin)
    pipe = os.open(stdin, os.O_RDWR)
    os.write(pipe, b"\n" + request(1, "sample") + b"\r\nnonsense\n" + request("\u20ac", "save")[:9])
    with started(endless, LISTEN, "--listen", STDIN=str(stdin)) as process:
        lines = read_until(process, phase="loading")
        os.write(pipe, request("\u20ac", "save")[9:] + b"\n\xff\xfe\n" + b"x" * 2**20 + b"\n")
        lines += read_until(process, type="response", id="\u20ac", state="done")
        os.write(pipe, request(3, "stop"))  # The last line has no end.
        os.close(pipe)
        result = finish(process, lines)
    answers = [(event["id"], event["request"], event["state"]) for event in result.of("response")]
    unknown = (None, None, "refused")
    accepted = [unknown, (1, "sample", "accepted"), unknown, ("\u20ac", "save", "accepted"), unknown, unknown]
    assert [answer for answer in answers if answer[2] != "done"] == [*accepted, (3, "stop", "accepted")]
    done = [event for event in result.of("response") if event["state"] == "done"]
    assert [event["id"] for event in done] == [1, "\u20ac", 3]
    assert all(Path(path).exists() for event in done for path in event["paths"])
    assert (result.code, result.last["type"], result.events[-2]["id"]) == (143, "interrupted", 3)
    assert done[-1]["paths"] == [result.last["path"], result.last["state_path"]]
    assert "stopping" in [event.get("phase") for event in result.of("info")]


@pytest.mark.parametrize("phase", ["importing", "loading"])
def test_a_stop_is_served_while_others_wait_and_none_stays_without_an_answer(
    tmp_path: Path, endless: Path, phase: str
) -> None:
    stdin = tmp_path / "stdin"
    os.mkfifo(stdin)
    pipe = os.open(stdin, os.O_RDWR)
    os.write(pipe, request(1, "sample") + b"\n")
    hang = f"t.{PHASES[phase]} = lambda *_, **__: time.sleep(600)"
    with started(endless, LISTEN + hang, "--listen", STDIN=str(stdin)) as process:
        lines = read_until(process, phase=phase)
        os.write(pipe, request(2, "stop") + b"\n")
        result = finish(process, lines)
    os.close(pipe)
    answers = [(event["id"], event["state"]) for event in result.of("response")]
    assert answers == [(1, "accepted"), (2, "accepted"), (1, "refused"), (2, "done")]
    assert (result.code, result.last["type"]) == (143, "interrupted")
    assert [event.get("phase") for event in result.of("info")][-1] == "stopping"


def test_stdin_cannot_hold_a_config_and_requests() -> None:
    result = run("--config", "-", "--listen", input=b"{}")
    assert (result.code, result.last["code"]) == (2, "usage")


def test_two_processes_go_on_to_the_steps_that_were_asked_for(tmp_path: Path, images: Path, models: Path) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", steps=10**6, batch_size=1))
    stdin = tmp_path / "stdin"
    os.mkfifo(stdin)
    pipe = os.open(stdin, os.O_RDWR)
    code = "if rank == 0: os.dup2(os.open(os.environ['STDIN'], os.O_RDONLY), 0)\n"
    pair = start_pair(config, "--listen", code=f"os.environ['STDIN'] = {str(stdin)!r}\n{code}")
    lines = read_until(pair[0], step=2)
    os.write(pipe, request(1, "set", values={"steps": 150}) + b"\n" + request(2, "sample") + b"\n")
    result, code_of_other, errors = finish_pair(pair, lines)
    os.close(pipe)
    assert (result.code, code_of_other, result.last["type"], result.last["step"]) == (0, 0, "complete", 150), errors
    assert [event["state"] for event in result.of("response")].count("done") == 2


# ======================================================================================
# processes
# ======================================================================================

END_AT_THIRD_STEP = """
periodic = t.LoRATrainer.periodic
def end_at_third_step(self):
    periodic(self)
    if self.state.step == 3 and rank == 1: end()
t.LoRATrainer.periodic = end_at_third_step
"""
WORKER_ENDS = {
    "is killed": "end = lambda: os.kill(os.getpid(), 9)",
    "fails": "def end(): raise MemoryError('no memory left')",
}
ALL_DRAWS: Json = {"train_text_encoder": True, "max_caption_tokens": 150, "random_flip": True, "caption_dropout": 0.3}
ALL_DRAWS |= {"noise_offset": 0.1, "snr_gamma": 5.0, "loss_type": "huber", "ema_decay": 0.9}
ALL_DRAWS |= {"gradient_accumulation_steps": 2, "lr_scheduler": "cosine"}


def start_pair(config: Path, *options: str, code: str = "") -> list[Copy]:
    """Start two processes of a run as torchrun does; `code` can ask for `rank`."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1])}
    launched |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    ranks = [{"RANK": rank, "LOCAL_RANK": rank} for rank in "01"]
    return [started(config, f"rank = {rank['RANK']}\n{code}", *options, **launched, **rank) for rank in ranks]


def finish_pair(pair: list[Copy], lines: bytes = b"") -> tuple[Run, int, str]:
    """Return the main process's run, and the other's exit code and stderr; the other emits no event."""
    result, (_, other) = finish(pair[0], lines), pair
    assert other.stdout.read() == b""
    return result, other.wait(LIMIT_S), other.stderr.read().decode()


def train_together(tmp_path: Path, config: Json, *options: str) -> Run:
    result, code, _ = finish_pair(start_pair(write_config(tmp_path, **config), *options))
    assert (result.code, code, result.last["type"]) == (0, 0, "complete"), result.last
    return result


HELD_TO_BASE: Json = {"regularization_path": "prior", "regularization_target": "base", "change_penalty": 0.01}
HELD_TO_BASE |= WITH_CLASS


@pytest.mark.parametrize(("kind", "batch_size", "changes"), [("sd15", 1, HELD_TO_BASE), ("sdxl", 2, ALL_DRAWS)])
def test_two_processes_end_where_one_does_that_has_the_whole_batch(
    tmp_path: Path, images: Path, models: Path, kind: str, batch_size: int, changes: Json
) -> None:
    folder = Path(shutil.copytree(images, tmp_path / "images"))
    (folder / "0.txt").write_text("ab " * 60, "utf-8")
    make_dataset(tmp_path / "prior", [(72, 64), (64, 72)])
    config = small(folder, models / kind, tmp_path / "one", epochs=3, learning_rate=1e-4, **changes) | {"steps": None}
    one = train(tmp_path, config | {"batch_size": 2 * batch_size})
    # Buckets of one to three images: batches that are uneven, and that leave a process without samples.
    assert {len(bucket) for bucket in one.plan.buckets.values()} & {1, 3}
    changes = {"output_path": str(tmp_path / "two"), "batch_size": batch_size, "validation_steps": 2}
    two = train_together(tmp_path, config | changes, "--health-port", "0")
    runs = [two.of("progress"), emitted(one, "progress")]
    curves = [torch.tensor([[event["loss"], event["grad_norm"]] for event in events]) for events in runs]
    torch.testing.assert_close(*curves)
    paths = [tmp_path / "two/lora_final.safetensors", one.final_path]
    torch.testing.assert_close(*map(tensors_of, paths), rtol=1e-3, atol=1e-5)
    sizes = [trainer.read_header(path)["ss_total_batch_size"] for path in paths]
    assert sizes[0] == sizes[1]
    assert [event["seq"] for event in two.of("info") if "address" in event] == [1], "only the main process serves"


def test_a_signal_to_either_process_stops_both_and_no_bit_is_lost(tmp_path: Path, images: Path, models: Path) -> None:
    changes = {"steps": 6, "batch_size": 1, "lora_dropout": 0.1, "ema_decay": 0.9}
    config = small(images, models / "sd15", tmp_path / "out", **changes)
    whole = train_together(tmp_path, config | {"output_path": str(tmp_path / "whole")})
    parts: list[Run] = []
    for rank, step in ((1, 2), (0, 4)):
        # The process that gets no signal goes on to the vote in the next step.
        hold = HOLD_AT_STEP.replace('int(os.environ["STEP"])', f"{step} and {rank} == rank")
        pair = start_pair(write_config(tmp_path, **config), code=hold)
        lines = read_until(pair[0], step=step)
        pair[rank].terminate()
        result, code, _ = finish_pair(pair, lines)
        parts.append(result)
        assert (result.code, code, result.last["type"], result.last["step"]) == (143, 143, "interrupted", step)
    parts.append(train_together(tmp_path, config))
    losses = {event["step"]: event["loss"] for part in parts for event in part.of("progress")}
    assert losses == {event["step"]: event["loss"] for event in whole.of("progress")}
    for name in ("lora_final.safetensors", "checkpoints/state_step_6.safetensors"):
        assert_same_tensors(tmp_path / "out" / name, tmp_path / "whole" / name)
    with pytest.raises(trainer.TrainerError, match="batch_size"):
        prepare(tmp_path, config | {"steps": 7})
    alone = train(tmp_path, config | {"steps": 7, "batch_size": 2})  # the same batches, summed in another order
    assert (alone.state.step, warning_codes(alone).count("resume_not_exact")) == (7, 1)


@pytest.mark.parametrize("end", WORKER_ENDS)
def test_a_worker_that_ends_ends_the_run_and_what_was_trained_is_saved(tmp_path: Path, endless: Path, end: str) -> None:
    pair = start_pair(endless, code=END_AT_THIRD_STEP + WORKER_ENDS[end])
    result, code, errors = finish_pair(pair)
    assert (result.code, result.last["type"], code) == (1, "error", -9 if end == "is killed" else 1)
    assert (tmp_path / f"out/checkpoints/state_step_{result.last['step']}.safetensors").exists()
    reasons = re.findall(r"train_lora\.py, process 1: Out of memory while training: .*no memory left", errors)
    assert len(reasons) == (end == "fails")


def test_accelerate_launch_starts_a_run_of_two_processes_and_stops_it(tmp_path: Path, endless: Path) -> None:
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --main_process_port 0"
    with with_pipes([sys.executable, *launch.split(), str(SCRIPT), "--config", str(endless)]) as process:
        lines = read_until(process, step=3)
        process.terminate()
        result = finish(process, lines)
    assert (result.code != 0, result.last["type"], result.last["step"] >= 3) == (True, "interrupted", True)
    assert (tmp_path / f"out/checkpoints/state_step_{result.last['step']}.safetensors").exists()


def test_stdin_and_one_gpu_are_no_settings_of_several_processes(tmp_path: Path, images: Path) -> None:
    config = write_config(tmp_path, **small(images, tmp_path / "none", tmp_path / "out", device="cuda:1"))
    launched = os.environ | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    piped, one_gpu = (run("--config", name, env=launched, input=b"") for name in ("-", config))
    assert (piped.code, piped.last["code"]) == (2, "usage")
    assert (one_gpu.code, [item["path"] for item in one_gpu.last["problems"]]) == (1, ["device"])


# ======================================================================================
# health
# ======================================================================================

HUNG = "import ctypes; t.STALLED_S = 0.2\n"  # A signal ends C's sleep.
HUNG += WAITING.replace("time.sleep(9999)", "[ctypes.CDLL(None).sleep(600) for _ in range(99)]")
HOSTS = {"localhost": 200, "localhost:8080": 200, "127.0.0.1:80": 200, "[::1]:80": 200, "": 403}
HOSTS |= dict.fromkeys(["rebound.example.com", "127.0.0.1.example.com:80", "localhost.example.com"], 403)
BROKEN = {
    "silence": b"",
    "half a request": b"GET /health HTTP/1.1\r\nHost: localhost\r\n",
    "binary": bytes(range(256)) * 100 + b"\r\n\r\n",
    "a long path": b"GET /" + b"a" * 1_000_000,
    "many headers": b"GET /health HTTP/1.1\r\n" + b"X: a\r\n" * 10_000 + b"\r\n",
    "a body that never comes": b"POST /health HTTP/1.1\r\nContent-Length: 9999999999\r\n\r\n",
}
ADDRESSES: dict[str, Any] = {"0": ("127.0.0.1", 0), "0.0.0.0:65535": ("0.0.0.0", 65535), "[::1]:9": ("::1", 9)}
ADDRESSES |= {"trainer.local:80": ("trainer.local", 80), "[fe80::1%eth0]:80": ("fe80::1%eth0", 80)}
MALFORMED = ["", " ", "x", "-1", "65536", ":80", "::1:80", "[::1]", "1.2.3.4", "80x", "a:b:1", "\uff18"]


class Served:
    """The script with --health-port, as it waits or trains; what it answers, and how it ends."""

    def __init__(self, start: Callable[..., Process], code: str, config: Path) -> None:
        self.process = start(code, "--config", config, "--health-port", "0")
        assert self.process.stdout
        self.lines = self.process.stdout.readline() + self.process.stdout.readline()
        self.address = json.loads(self.lines.splitlines()[1])["address"]

    def get(self, page: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str], Any]:
        client = http.client.HTTPConnection(self.address, timeout=LIMIT_S)
        client.request(method, page, headers=headers)
        with contextlib.closing(client), client.getresponse() as answer:
            content = answer.read()
        return answer.status, dict(answer.getheaders()), json.loads(content) if content else None

    def wait_for(self, page: str, ready: Callable[[int, Json], Any]) -> Json:
        deadline = time.monotonic() + LIMIT_S
        while time.monotonic() < deadline:
            status, _, body = self.get(page)
            if ready(status, body):
                return dict(body)
            time.sleep(0.05)
        pytest.fail(f"{page} is not as expected: {body}")

    def stop(self) -> Run:
        self.process.terminate()
        return finish(self.process, self.lines)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One process for all requests; none of them leaves a trace in its events or on its stderr."""
    made = Served(patched, WAITING, tmp_path_factory.mktemp("served") / "none")
    yield made
    result = made.stop()
    types = [event["type"] for event in result.events if "idle_seconds" not in event]
    assert (result.code, types) == (143, ["start", "info", "info", "interrupted"])
    lines = ["ready", result.events[1]["message"], "A stop was asked for."]
    lines.append("interrupted: Stopped by SIGTERM: nothing to save.")
    assert sorted(result.stderr.splitlines()) == sorted(lines)


@pytest.mark.parametrize("page", ["/health?verbose=1", "/status", "/", "/../../etc/passwd"])
def test_two_pages_are_served_by_get_and_head_before_anything_is_loaded(served: Served, page: str) -> None:
    status, headers, body = served.get(page)
    is_page = page in ("/health?verbose=1", "/status")
    assert (status, "error" in body, headers["Cache-Control"]) == (200 if is_page else 404, not is_page, "no-store")
    assert served.get(page, "HEAD")[::2] == (status, None)
    if is_page:
        assert (body["status"], body["phase"], body["step"]) == ("ok", "starting", 0)
        assert body["stalled_after_seconds"] == trainer.STALLED_S == 600


@pytest.mark.parametrize("host", HOSTS)
def test_a_web_page_cannot_ask_under_a_name_of_its_own(served: Served, host: str) -> None:
    assert served.get("/status", Host=host)[0] == HOSTS[host]


@pytest.mark.parametrize("request_", BROKEN.values(), ids=BROKEN)
def test_a_broken_request_does_not_disturb_the_next(served: Served, request_: bytes) -> None:
    with socket.create_connection(("127.0.0.1", int(served.address.rpartition(":")[2]))) as connection:
        with contextlib.suppress(OSError):  # The other end has read enough.
            connection.sendall(request_)
        assert served.get("/health")[0] == 200
    assert served.get("/health")[0] == 200


@pytest.mark.parametrize("host", ["taken", "203.0.113.1", "a..b"])
def test_a_port_that_cannot_be_had_is_a_warning_and_the_run_goes_on(tmp_path: Path, host: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = f"{'127.0.0.1' if host == 'taken' else host}:{taken.getsockname()[1]}"
        result = run("--config", tmp_path / "none", "--health-port", place)
    assert [event.get("code") for event in result.events] == [None, "health_unavailable", "config_unreadable"]


@pytest.mark.parametrize("text", [*ADDRESSES, *MALFORMED])
def test_an_address_is_the_options_else_the_environments(monkeypatch: Patch, text: str) -> None:
    monkeypatch.setenv("LORA_HEALTH_PORT", "8080")
    assert trainer.health_address(None) == ("127.0.0.1", 8080)
    if text in ADDRESSES:
        assert trainer.health_address(text) == ADDRESSES[text]
    else:
        with pytest.raises(trainer.TrainerError, match=re.escape(f"--health-port: '{text}' is not [HOST:]N")) as caught:
            trainer.health_address(text)
        assert caught.value.code == "usage"
    monkeypatch.setenv("LORA_HEALTH_PORT", "")
    assert trainer.health_address(None) is None


def test_health_goes_from_ok_to_stalled_to_ok_to_ended() -> None:
    events, stop, statuses = Recorder(), Quiet(), []
    events.progress, stop.saved = {}, lambda: trainer.NOTHING_SAVED
    for idle_s, ended in ((-9, ""), (700, ""), (0, ""), (700, "complete")):  # A beat can come during the answer.
        events.beat_at, events.ended = time.monotonic() - idle_s, ended
        report = trainer.health_report(events, stop)
        statuses.append((report["status"], report["idle_seconds"] >= 0))
    assert statuses == [(status, True) for status in ("ok", "stalled", "ok", "ended")]


@posix
def test_a_main_thread_that_hangs_in_a_library_is_stalled_with_503_and_can_be_stopped(tmp_path: Path) -> None:
    made = Served(patched, HUNG, tmp_path / "none")
    body = made.wait_for("/health", lambda status, _: status == 503)
    assert (body["status"], body["stalled_after_seconds"]) == ("stalled", 0.2)
    assert (made.get("/status")[0], made.get("/health", "HEAD")[0], made.stop().code) == (200, 503, 143)


def test_status_has_the_newest_progress_and_what_is_saved(tmp_path: Path, endless: Path) -> None:
    made = Served(Copy, "", endless)
    made.wait_for("/status", lambda _, body: body["step"])
    made.process.send_signal(signal.SIGUSR1)
    body = made.wait_for("/status", lambda _, body: body["saved_step"])
    steps = {event["step"]: event for event in logged(tmp_path / "out/events.jsonl") if event["type"] == "progress"}
    keys = ("step", "total_steps", "percent", "loss", "loss_avg", "learning_rate", "epoch", "steps_per_second")
    assert [body[key] for key in keys] == [steps[body["step"]][key] for key in keys]
    assert (body["status"], body["state"], body["phase"]) == ("ok", "running", "training")
    assert Path(body["saved_state_path"]).name == f"state_step_{body['saved_step']}.safetensors"
    assert made.stop().code == 143


def test_every_use_of_the_unet_is_a_sign_of_progress(tmp_path: Path, images: Path, models: Path) -> None:
    made = prepare(tmp_path, small(images, models / "sd15", tmp_path / "out", gradient_accumulation_steps=3))
    release(made.folder)
    beats: list[int] = []
    made.events.beat = functools.partial(beats.append, 1)  # type: ignore[method-assign]
    made.accumulate(0)
    assert len(beats) == 3


def test_the_health_page_describes_every_field_and_states_the_time(served: Served) -> None:
    page = (ROOT / "docs/health.md").read_text("utf-8")
    assert re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE) == [*served.get("/status")[2]]
    (shown,) = re.findall(r"^```json\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert [*json.loads(shown)] == [*served.get("/health")[2]] == [*trainer.VITALS]
    assert f"{trainer.STALLED_S:.0f} seconds" in page


# ======================================================================================
# output folder
# ======================================================================================


@pytest.mark.parametrize("place", ["os.fsync", "pathlib.Path.replace", "pathlib.Path.open"])
@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, "disk_full"), (errno.EIO, "output_not_writable")])
def test_a_file_is_written_whole_or_not(tmp_path: Path, monkeypatch: Patch, place: str, number: int, code: str) -> None:
    target = tmp_path / "deep/file.bin"
    trainer.write_file(target, b"old")

    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch, pytest.raises(trainer.TrainerError) as caught:
        patch.setattr(place, fail)
        trainer.write_file(target, b"new")
    assert (caught.value.code, target.read_bytes(), [*target.parent.iterdir()]) == (code, b"old", [target])


def test_unsyncable_folders_and_files_that_a_scanner_holds(tmp_path: Path, monkeypatch: Patch) -> None:
    failures, replace, sync = [PermissionError(13, "held")] * 2, Path.replace, os.fsync

    def hold(source: Path, target: Path) -> Path:
        if failures:
            raise failures.pop()
        return replace(source, target)

    def refuse_folders(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(trainer, "WINDOWS", True)
    monkeypatch.setattr(Path, "replace", hold)
    monkeypatch.setattr(os, "fsync", refuse_folders)
    trainer.write_file(tmp_path / "file", b"data")
    assert ((tmp_path / "file").read_bytes(), failures) == (b"data", [])


@posix
def test_files_follow_the_umask_and_replace_links(tmp_path: Path) -> None:
    precious, link = tmp_path / "precious", tmp_path / "link.bin"
    precious.write_text("mine")
    link.symlink_to(precious)
    previous = os.umask(0o027)
    try:
        trainer.write_file(link, b"data")
    finally:
        os.umask(previous)
    assert (precious.read_text(), link.is_symlink(), link.stat().st_mode & 0o777) == ("mine", False, 0o640)


def test_one_run_has_the_folder_at_a_time_and_removes_only_its_own_leftovers(tmp_path: Path) -> None:
    first, second = trainer.OutputFolder(tmp_path / "out"), trainer.OutputFolder(tmp_path / "out")
    first.open()
    leftover = first.checkpoints / ".state_step_2.safetensors.0a1b2c3d.train_lora.tmp"
    foreign = first.checkpoints / "other.tmp"
    for path in (leftover, foreign):
        path.touch()
    with pytest.raises(trainer.TrainerError) as caught:
        second.open()
    assert (caught.value.code, leftover.exists()) == ("output_in_use", True)
    release(first)
    second.open()
    assert (leftover.exists(), foreign.exists()) == (False, True)
    release(second)


def test_the_output_folder_holds_exactly_what_the_readme_lists(tmp_path: Path, images: Path, models: Path) -> None:
    changes = {"checkpoint_steps": 2, "validation_steps": 2, "output_name": "my", "sample_prompts": ["a", "b"]}
    out = tmp_path / (os.fsdecode(b"\xff\n\xe9") if sys.platform == "linux" else "out")  # It need not be UTF-8.
    config = write_config(tmp_path, **small(images, models / "sd15", out, steps=6, **changes))
    result = run_copy("--config", config)
    assert (result.code, Path(result.last["final_path"]).name) == (0, "my_final.safetensors")
    names = {"config.json", "events.jsonl", "my_final.safetensors", "report.html", "samples/grid.png"}
    names |= {f"checkpoints/my_step_{step}.safetensors" for step in (2, 4, 6)}
    names |= {f"checkpoints/state_step_{step}.safetensors" for step in (4, 6)}
    names |= {f"samples/step_{step}_{index}.png" for step in (2, 4, 6) for index in (0, 1)}
    assert {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {".lock"} == names
    assert [event["step"] for event in result.of("checkpoint")] == [2, 4, 6]
    assert [event["step"] for event in result.of("progress")] == [1, 2, 3, 4, 5, 6]
    assert (out / "events.jsonl").read_bytes().splitlines() == [json.dumps(event).encode() for event in result.events]
    with Image.open(out / "samples/step_4_1.png") as picture:
        entries = {key: picture.info[key] for key in ("prompt", "seed", "step")}
    assert entries == {"prompt": "b", "seed": "43", "step": "4"}
    resolved = json.loads((out / "config.json").read_text("utf-8"))["config"]
    assert (resolved["resolution"], resolved["steps"], resolved["lora_alpha"]) == (64, 6, 4)
    before = {name: (out / name).stat().st_mtime_ns for name in names - {"events.jsonl"}}
    again = run_copy("--config", config)
    assert (again.code, again.last["type"], again.last["step"]) == (0, "complete", 6)
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before


@posix
def test_an_output_that_cannot_be_written_is_an_error_and_nothing_is_made(tmp_path: Path, images: Path) -> None:
    (tmp_path / "file").touch()
    config = write_config(tmp_path, **small(images, hollow_model(tmp_path / "model"), tmp_path / "file/out"))
    before = sorted(tmp_path.rglob("*"))
    result = run("--config", config)
    assert (result.code, result.last["code"], sorted(tmp_path.rglob("*"))) == (1, "output_not_writable", before)


# ======================================================================================
# model families
# ======================================================================================


def locate(
    tmp_path: Path, base: str | Path, *, half: bool = False, download: bool = True, events: Any = None, **keys: Any
) -> trainer.ModelSource:
    required = {"dataset_path": ".", "base_model": str(base), "output_path": "out", "trigger_words": ["zorb"]}
    config = load(tmp_path, required | keys)
    return trainer.locate_model(config, events or Recorder(), half=half, download=download)


def refusal(tmp_path: Path, base: str | Path, **options: Any) -> trainer.TrainerError:
    with pytest.raises(trainer.TrainerError) as caught:
        locate(tmp_path, base, **options)
    return caught.value


def change_json(path: Path, changes: Json) -> None:
    write_json(path, json.loads(path.read_text("utf-8")) | changes)


XL: Json = {"_class_name": "StableDiffusionXLPipeline"}
XL |= {"text_encoder_2": ["transformers", "CLIPTextModelWithProjection"]}
LINEAR = {"use_linear_projection": True}


@pytest.mark.parametrize(
    ("index", "unet", "outcome"),
    [
        ({}, {}, "sd15"),
        ({}, {"cross_attention_dim": 32, "block_out_channels": [32, 64]}, "sd15"),
        ({}, LINEAR, "sd21"),
        (XL, LINEAR | {"addition_embed_type": "text_time"}, "sdxl"),
        (XL, LINEAR, "(StableDiffusionXLPipeline) has a class or a UNet that this trainer does not know"),
        ({"_class_name": "FluxPipeline"}, {}, "(FluxPipeline) has a class"),
        ({"text_encoder": ["transformers", "T5EncoderModel"]}, {}, "does not know"),
        ({"unet": ["my_unet", "UNet2DConditionModel"]}, {}, "does not know"),
        ({}, {"in_channels": 9}, "takes 9 channels: an inpainting"),
    ],
)
def test_a_folders_family_shows_in_its_classes_and_unet(tmp_path: Path, index: Json, unet: Json, outcome: str) -> None:
    model: Path = hollow_model(tmp_path / "model")
    change_json(model / "model_index.json", index)
    change_json(model / "unet/config.json", unet)
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(model / part, model / f"{part}_2")
    if outcome in trainer.SHORT_NAMES:
        assert locate(tmp_path, model).family.name == outcome
        other = "sdxl" if outcome == "sd15" else "sd15"
        assert f'Set model_type to "{outcome}"' in refusal(tmp_path, model, model_type=other).hint
    else:
        error = refusal(tmp_path, model)
        assert (error.code, outcome in error.message) == ("model_unsupported", True)


@pytest.mark.parametrize("row", trainer.FAMILIES, ids=lambda row: row.name)
def test_a_familys_row_holds_the_official_models_configs(row: trainer.ModelFamily) -> None:
    official = full_size_config(row.name)
    assert row.native_resolution[row.usual_prediction] == official["unet"].pop("sample_size") * 8
    official["text_encoder"].pop("projection_dim")  # These encoders have no projection.
    rows = {"unet": row.unet, "vae": row.vae} | {encoder.folder: encoder.config for encoder in row.text_encoders}
    assert {part: {key: rows[part].get(key) for key in config} for part, config in official.items()} == official


def write_header(path: Path, shapes: Json, metadata: dict[str, str] | None = None, dtype: str = "F16") -> Path:
    """Write a safetensors file of any size; its data is a hole, which takes no space."""
    header: Json = {"__metadata__": metadata or {}}
    end, width = 0, 1 if dtype == "U8" else 2
    for name, shape in shapes.items():
        start, end = end, end + width * math.prod(shape)
        header[name] = {"dtype": dtype, "shape": [*shape], "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    return path


@posix
@pytest.mark.parametrize(("name", "weights"), [("sd15", 859520964), ("sd21", 865910724), ("sdxl", 2567463684)])
def test_a_full_size_single_files_weights_are_known_by_diffusers_names(tmp_path: Path, name: str, weights: int) -> None:
    with torch.device("meta"):
        parts = {part: build_component(part, config) for part, config in full_size_config(name).items()}
    states = {part: dict(component.state_dict()) for part, component in parts.items()}
    tensors = original_layout(states, parts["unet"].config)
    path = write_header(tmp_path / "m.safetensors", {key: value.shape for key, value in tensors.items()})
    source = locate(tmp_path, path, tokenizer_path=str(hollow_model(tmp_path / "words")))
    counts = source.weight_counts
    assert (source.family.name, counts["unet"], counts["vae"], source.vae_factor) == (name, weights, 83653863, 8)
    assert source.prediction_type == ("v_prediction" if name == "sd21" else "epsilon")
    for part in source.components.keys() - {"vae"}:
        counted = "" if part == "unet" else r"proj\.weight|mlp\.fc.\.weight|token"  # a text encoder's large matrices
        shapes = {trainer.saved_name(key): [*shape] for key, shape in source.components[part].shapes.items()}
        expected = {trainer.saved_name(key): [*value.shape] for key, value in states[part].items()}
        assert shapes == {key: shape for key, shape in expected.items() if re.search(counted, key)}
        assert counts[part] == pytest.approx(sum(map(math.prod, expected.values())), rel=0.01)


# ======================================================================================
# base models
# ======================================================================================

SAFETENSORS = b'\x3b\0\0\0\0\0\0\0{"a.bias":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}1234'
UNET = "unet/diffusion_pytorch_model.safetensors"
FP16_FILE, NON_EMA = UNET.replace(".safe", ".fp16.safe"), UNET.replace(".safe", ".non_ema.safe")
SHARDS = [UNET.replace(".safe", f"-0000{number}-of-00002.safe") for number in (1, 2)]
PICKLE = "unet/diffusion_pytorch_model.bin"


@pytest.mark.parametrize(
    ("names", "variant", "half", "expected"),
    [
        ([UNET, FP16_FILE], None, True, ("fp16", [FP16_FILE])),
        ([UNET, FP16_FILE], None, False, (None, [UNET])),
        ([FP16_FILE], None, False, ("fp16", [FP16_FILE])),
        ([UNET, NON_EMA], None, True, (None, [UNET])),
        ([UNET, NON_EMA], "non_ema", True, ("non_ema", [NON_EMA])),
        ([*SHARDS, FP16_FILE, PICKLE], None, False, (None, SHARDS)),
        ([PICKLE], None, False, "model_unsafe"),
        ([], None, False, "model_not_found"),
        ([UNET], "ema", False, "model_not_found"),
        (SHARDS[:1], None, False, "model_corrupt"),
    ],
)
def test_a_variant_is_chosen_but_no_pickle(
    tmp_path: Path, names: list[str], variant: Any, half: bool, expected: Any
) -> None:
    model = hollow_model(tmp_path / "model")
    weights = (model / UNET).read_bytes()
    (model / UNET).unlink()
    for name in names:
        (model / name).write_bytes(weights)
    (model / f"{UNET}.index.json").write_text("{}")  # It is needed where the weights are in several files.
    if isinstance(expected, str):
        assert refusal(tmp_path, model, variant=variant, half=half).code == expected
        return
    unet = locate(tmp_path, model, variant=variant, half=half).components["unet"]
    assert (unet.variant, [f"unet/{name}" for name in unet.files]) == expected


def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    for name in ("model.CKPT", "model.gguf"):
        (tmp_path / name).touch()
    assert refusal(tmp_path, tmp_path / "model.CKPT").code == "model_unsafe"
    for name in ("model", "model.safetensors", "model.gguf", "."):
        error = refusal(tmp_path, tmp_path / name)
        assert (error.code, "is no .safetensors file" in error.message) == ("model_not_found", True)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *((UNET, data) for data in (b"", b"\x80\x02cos\nsystem\n", SAFETENSORS[:-1])),
        ("unet/config.json", b"{"),
        ("scheduler/scheduler_config.json", b"7"),
        ("tokenizer/vocab.json", None),
    ],
)
def test_a_broken_model_is_recognised_without_torch(tmp_path: Path, name: str, content: bytes | None) -> None:
    model = hollow_model(tmp_path / "model")
    (model / name).unlink()
    if content is not None:
        (model / name).write_bytes(content)
    error = refusal(tmp_path, model)
    assert (error.code, name.partition("/")[0] in error.message) == ("model_corrupt", True)
    if name == UNET:
        assert refusal(tmp_path, shutil.copy(model / UNET, tmp_path / "single.safetensors")).code == "model_corrupt"


UNET_PREFIX, TEXT = "model.diffusion_model.", "cond_stage_model.transformer.text_model.final_layer_norm.weight"
FIRST = f"{UNET_PREFIX}input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"], "is a LoRA"),  # for FLUX
        (["control_model.input_hint_block.0.weight"], "is a ControlNet"),
        ([f"{UNET_PREFIX}joint_blocks.0.context_block.attn.qkv.weight"], "is Stable Diffusion 3"),
        (["double_blocks.0.img_attn.qkv.weight"], "is FLUX"),
        ([FIRST, "conditioner.embedders.0.model.ln_final.weight"], "is the SDXL refiner"),
        ([TEXT, FIRST, f"{UNET_PREFIX}scaled_fp8"], "is a quantized model"),
        (["first_stage_model.decoder.conv_in.weight"], "is a VAE"),
        ([TEXT, FIRST, f"{UNET_PREFIX}time_embed.cond_proj.weight"], "is not built as Stable Diffusion 1.x is"),
        ([FIRST], "is no whole checkpoint of a family"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(tmp_path: Path, names: list[str], words: str) -> None:
    error = refusal(tmp_path, write_header(tmp_path / "x.safetensors", dict.fromkeys(names, (8, 4, 3, 3))))
    assert (error.code, words in error.message) == ("model_unsupported", True)
    assert "text-to-image" in error.hint


def test_other_single_files_of_a_family_are_refused_before_a_run(tmp_path: Path, single_files: Path) -> None:
    shapes, path = shapes_of(single_files / "sd15.safetensors"), tmp_path / "m.safetensors"
    assert "quantized" in refusal(tmp_path, write_header(path, shapes, dtype="U8")).message
    assert "takes 9 channels" in refusal(tmp_path, write_header(path, shapes | {FIRST: [32, 9, 3, 3]})).message
    for block in ("middle_block.1.", "input_blocks.1.1.", "input_blocks.0.0.weight"):  # Distilled ones lack some.
        rest = {key: shape for key, shape in shapes.items() if not key.startswith(UNET_PREFIX + block)}
        error = refusal(tmp_path, write_header(path, rest))
        assert (error.code, "not built as Stable Diffusion 1.x" in error.message) == ("model_unsupported", True)


@pytest.mark.parametrize(
    ("marks", "header", "stated", "zero_snr"),
    [
        ((), {}, None, False),
        ((), {"predict_key": "epsilon"}, "epsilon", False),
        ((), {"architecture": "stable-diffusion-v2-512"}, "epsilon", False),
        (("v_pred",), {"prediction_type": "epsilon"}, "v_prediction", False),
        (("ztsnr",), {}, None, True),
        ((), {"prediction_type": "v-zsnr"}, "v_prediction", True),
        (("edm_mean",), {}, "edm", False),
    ],
)
def test_what_a_single_file_predicts_stands_in_its_header(
    marks: tuple[str, ...], header: dict[str, str], stated: str | None, zero_snr: bool
) -> None:
    spec = {f"modelspec.{key}": value for key, value in header.items()}
    scheduler = trainer.prediction_from_header(dict.fromkeys(marks, (0,)), spec)
    assert (scheduler.get("prediction_type"), scheduler["rescale_betas_zero_snr"]) == (stated, zero_snr)


V, ZERO_SNR = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}


@pytest.mark.parametrize(
    ("scheduler", "config", "outcome"),
    [
        ({}, {}, ("epsilon", False, False)),
        (V, {}, ("v_prediction", True, False)),
        (V, {"zero_terminal_snr": True}, ("v_prediction", True, True)),
        (V | ZERO_SNR, {"zero_terminal_snr": False}, ("v_prediction", True, False)),
        (V | ZERO_SNR, {"prediction_type": "epsilon"}, ("epsilon", True, False)),
        (ZERO_SNR, {}, ("v_prediction", True, True)),
        ({"prediction_type": "flow"}, {"prediction_type": "epsilon"}, ("epsilon", True, False)),
    ],
)
def test_the_config_decides_before_the_scheduler(tmp_path: Path, scheduler: Json, config: Json, outcome: Any) -> None:
    model = hollow_model(tmp_path / "model")
    write_json(model / "scheduler/scheduler_config.json", scheduler)
    source = locate(tmp_path, model, **config)
    assert (source.prediction_type, source.prediction_known, source.scheduler["rescale_betas_zero_snr"]) == outcome
    if "flow" in scheduler.values():
        assert "predicts 'flow'" in refusal(tmp_path, model).message


def loaded(source: trainer.ModelSource, part: str, dtype: str = "float32") -> Any:
    return trainer.load_component(source, part, getattr(torch, dtype), torch.device("cpu"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["sd15", "sd21v", "sdxl"])
def test_folders_and_single_files_load_the_same_bits(tmp_path: Path, single_files: Path, kind: str, dtype: str) -> None:
    folder, file = sources = [locate(tmp_path, single_files / name) for name in (kind, f"{kind}.safetensors")]
    assert (file.family.name, file.prediction_type) == (folder.family.name, folder.prediction_type)
    assert (file.name, file.native_resolution) == (f"{kind}.safetensors", folder.native_resolution)
    assert file.scheduler.items() <= folder.scheduler.items()
    for part in folder.components:
        (path,) = (single_files / kind / part).glob("*.safetensors")
        expected = {key: value.to(getattr(torch, dtype)) for key, value in tensors_of(path).items()}
        for module in (loaded(source, part, dtype) for source in sources):
            states = module.state_dict()
            assert states.keys() == expected.keys()
            assert all(torch.equal(states[key], expected[key]) for key in expected)
            assert not any(module.training or weight.requires_grad for weight in module.parameters())
    one, other = ([word("a zorb", padding="max_length") for word in trainer.load_tokenizers(s)] for s in sources)
    assert one == other


def test_weights_that_are_missing_or_of_another_shape_are_one_error(tmp_path: Path, single_files: Path) -> None:
    base = shutil.copytree(single_files, tmp_path / "models") / "sdxl.safetensors"
    tensors = tensors_of(base)
    projection = tensors.pop("conditioner.embedders.1.model.text_projection")
    safetensors.torch.save_file(tensors | {FIRST: torch.zeros(16, 4, 3, 3)}, base)
    for part, words in {"text_encoder_2": "missing.*projection", "unet": "of another shape: conv_in"}.items():
        with pytest.raises(trainer.TrainerError, match=words) as caught:
            loaded(locate(tmp_path, base), part)
        assert caught.value.code == "model_unsupported"
    # Older files of diffusers' converter have the projection as a linear layer.
    tensors["conditioner.embedders.1.model.text_projection.weight"] = projection.T.contiguous()
    safetensors.torch.save_file(tensors, base)
    assert torch.equal(loaded(locate(tmp_path, base), "text_encoder_2").text_projection.weight, projection.T.float())
    path = base.parent / "sd15" / UNET
    unet = tensors_of(path)
    safetensors.torch.save_file({key: unet[key] for key in sorted(unet)[3:]}, path)
    with pytest.raises(trainer.TrainerError, match="3 weights missing") as caught:
        loaded(locate(tmp_path, base.parent / "sd15"), "unet")
    assert caught.value.code == "model_corrupt"


def test_another_vae_comes_from_a_folder_or_a_file_of_either_layout(tmp_path: Path, single_files: Path) -> None:
    folder, whole = single_files / "sd15", single_files / "sd15.safetensors"
    base = to_single_file(folder, single_files / "no_vae.safetensors", torch.float32, with_vae=False)
    assert "has no VAE" in refusal(tmp_path, base).message
    own, prefix = folder / "vae/diffusion_pytorch_model.safetensors", "first_stage_model."
    original, old_names = tmp_path / "original.safetensors", tmp_path / "old.safetensors"
    expected, parts = tensors_of(own), tensors_of(whole)
    safetensors.torch.save_file({key[len(prefix) :]: parts[key] for key in parts if key.startswith(prefix)}, original)
    renamed = {key.replace("to_q", "query").replace("to_out.0", "proj_attn"): expected[key] for key in expected}
    safetensors.torch.save_file(renamed, old_names)
    for path in (folder / "vae", own, whole, original, old_names):
        source = locate(tmp_path, base, vae_path=str(path))
        vae = loaded(source, "vae")
        assert all(torch.equal(value, expected[key]) for key, value in vae.state_dict().items())
        assert source.vae["scaling_factor"] == vae.config.scaling_factor == 0.18215
    refused = {tmp_path / "vae.PT": "model_unsafe", tmp_path / "none.safetensors": "model_not_found"}
    wrong = (single_files / "sdxl/vae", folder / "unet", folder / "text_encoder/model.safetensors")
    for path, code in (refused | dict.fromkeys(wrong, "model_unsupported")).items():
        error = refusal(tmp_path, folder, vae_path=str(path))
        assert (error.code, error.problems[0]["path"]) == (code, "vae_path")


def test_a_tokenizer_is_looked_up_in_order(tmp_path: Path, single_files: Path, monkeypatch: Patch) -> None:
    import transformers

    base, sdxl = tmp_path / "models/m.safetensors", single_files / "sdxl"
    base.parent.mkdir()
    shutil.copy(single_files / "sd15.safetensors", base)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    beside, error = base.parent / "clip_tokenizer", refusal(tmp_path, base)
    assert (error.code, str(beside) in error.message) == ("model_not_found", True)
    home = tmp_path / "hub/models--openai--clip-vit-large-patch14"
    shutil.copytree(sdxl / "tokenizer", home / "snapshots" / COMMIT)
    (home / "refs").mkdir()
    (home / "refs/main").write_text(COMMIT)
    assert locate(tmp_path, base).tokenizers == [home / "snapshots" / COMMIT]
    shutil.copytree(single_files / "clip_tokenizer", beside)
    assert locate(tmp_path, base).tokenizers == [beside]
    assert locate(tmp_path, base, tokenizer_path=str(sdxl)).tokenizers == [sdxl / "tokenizer"]
    assert locate(tmp_path, sdxl, tokenizer_path=str(beside)).tokenizers == [beside, beside]
    one_file = tmp_path / "one_file"  # as transformers 5 saves it
    transformers.CLIPTokenizer.from_pretrained(beside).save_pretrained(one_file)
    for folder in (beside, one_file):
        (tokenizer,) = trainer.load_tokenizers(locate(tmp_path, base, tokenizer_path=str(folder)))
        assert len(tokenizer.get_vocab()) == 190
    write_json(beside / "vocab.json", {})
    with pytest.raises(trainer.TrainerError, match="cannot be used") as caught:
        trainer.load_tokenizers(locate(tmp_path, base))
    for error in (caught.value, refusal(tmp_path, base, tokenizer_path=str(tmp_path / "nowhere"))):
        assert error.problems[0]["path"] == "tokenizer_path"


COMMIT, HUB_MODEL = "0123456789" * 4, "someone/tiny-sd"


class FakeHub(http.server.ThreadingHTTPServer):
    """What huggingface_hub asks of the Hub, for one model; `log` has every request, `faults` what goes wrong."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), HubAnswer)
        self.files, self.url = files, f"http://127.0.0.1:{self.server_port}"
        self.log: list[str] = []
        self.faults: dict[str, tuple[int, dict[str, str]]] = {}  # by a part of the path
        self.cut = ""  # the file whose connection breaks half-way
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def downloaded(self, verb: str = "GET") -> set[str]:
        return {line.partition(f"/{COMMIT}/")[2] for line in self.log if line.startswith(verb) and "/resolve/" in line}

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        info: Json = {"id": HUB_MODEL, "sha": COMMIT, "siblings": [{"rfilename": name} for name in self.files]}
        tree = [{"type": "file", "oid": "0", "path": name, "size": len(data)} for name, data in self.files.items()]
        ends = {"": info, "/revision/main": info, f"/revision/{COMMIT}": info, f"/tree/{COMMIT}": tree}
        bodies = {f"/api/models/{HUB_MODEL}{end}": json.dumps(document).encode() for end, document in ends.items()}
        bodies |= {f"/{HUB_MODEL}/resolve/{COMMIT}/{name}": data for name, data in self.files.items()}
        if fault := next((fault for part, fault in self.faults.items() if part in path), None):
            return *fault, b""
        if path not in bodies:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        tag = hashlib.sha1(path.encode() + bodies[path]).hexdigest()
        return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": COMMIT}, bodies[path]


class HubAnswer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeHub

    def do_GET(self) -> None:
        hub, path = self.server, urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        hub.log.append(f"{'HEADER' if 'Range' in self.headers else self.command} {path}")
        status, headers, body = hub.answer(path)
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(name, value)
        self.end_headers()
        half = 0 if self.command == "HEAD" else len(body) // 2
        self.wfile.write(body[:half])
        if half and hub.cut and path.endswith(hub.cut) and "Range" not in self.headers:
            self.close_connection = True
        elif half:
            self.wfile.write(body[half:])

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None: ...


CONFIGS = {"model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json", "tokenizer/merges.txt"}
CONFIGS |= {"tokenizer/tokenizer_config.json"} | {f"{part}/config.json" for part in ("unet", "vae", "text_encoder")}
WEIGHTS = {UNET, "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
JUNK = """README.md v1-5-pruned.safetensors unet/diffusion_pytorch_model.bin unet/flax_model.msgpack unet/model.onnx
    unet/diffusion_pytorch_model.non_ema.safetensors safety_checker/config.json safety_checker/model.safetensors"""


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: Patch) -> Iterator[FakeHub]:
    """A Hub that has one whole model in two variants and much that nobody needs; this process asks it."""
    constants = pytest.importorskip("huggingface_hub.constants")
    folder = hollow_model(tmp_path / "on_the_hub")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
    files |= {name.replace(".safe", ".fp16.safe"): files[name] for name in WEIGHTS}
    made = FakeHub(files | {name: name.encode() for name in JUNK.split()})
    template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
    values = {"ENDPOINT": made.url, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(tmp_path / "hub")}
    values |= {"HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_TOKEN_PATH": str(tmp_path / "no token")}
    for name, value in values.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield made
    made.shutdown()
    made.server_close()


@pytest.mark.parametrize("half", [False, True])
def test_only_what_a_run_needs_is_downloaded_and_only_once(tmp_path: Path, hub: FakeHub, half: bool) -> None:
    weights = {name.replace(".safe", ".fp16.safe") for name in WEIGHTS} if half else WEIGHTS
    source = locate(tmp_path, HUB_MODEL, half=half, download=False)
    assert (hub.downloaded(), hub.downloaded("HEADER")) == (CONFIGS, weights), "of the weights only the headers"
    assert source.weight_counts == {"unet": 15, "vae": 15, "text_encoder": 15}
    source = locate(tmp_path, HUB_MODEL, half=half)
    assert (hub.downloaded(), source.name) == (CONFIGS | weights, HUB_MODEL)
    assert {part.variant for part in source.components.values()} == {"fp16" if half else None}
    hub.log.clear()
    locate(tmp_path, HUB_MODEL, half=half)
    assert not hub.downloaded() | hub.downloaded("HEADER")


def test_a_download_reports_its_megabytes(tmp_path: Path, hub: FakeHub, monkeypatch: Patch) -> None:
    hub.files[UNET] = write_header(tmp_path / "weights", {"a": [2_500_000]}).read_bytes()
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 500_000)
    locate(tmp_path, HUB_MODEL, events=(events := Recorder()))
    done = [event["current"] for event in events.events]
    assert (done, {*done}, events.events[-1]["total"]) == (sorted(done), {1, 2, 3, 4, 5}, 5)
    assert {event["message"] for event in events.events} == {"Downloading someone/tiny-sd (MB)."}


def test_a_download_that_breaks_off_goes_on_at_the_next_start(tmp_path: Path, hub: FakeHub, monkeypatch: Patch) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    hub.files |= dict.fromkeys(SHARDS, hub.files.pop(UNET)) | {f"{UNET}.index.json": b"{}"}
    hub.cut = SHARDS[1]
    error = refusal(tmp_path, HUB_MODEL)
    assert (error.code, "did not deliver" in error.message) == ("model_not_found", True)
    assert "same command again with a network" in error.hint
    assert hub.downloaded() >= CONFIGS | {f"{UNET}.index.json", SHARDS[0]}
    with monkeypatch.context() as patch:
        full = mock.Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
        patch.setattr("huggingface_hub.file_download.http_get", full)
        assert refusal(tmp_path, HUB_MODEL).code == "disk_full"
    hub.cut = ""
    hub.log.clear()
    locate(tmp_path, HUB_MODEL)
    assert SHARDS[1] in hub.downloaded()
    assert not hub.downloaded() & {*CONFIGS, SHARDS[0]}


@pytest.mark.parametrize(
    ("status", "code", "text", "words"),
    [
        (403, "GatedRepo", "", "gated.*Accept its terms on https://huggingface.co/someone/tiny-sd.*HF_TOKEN"),
        (401, "", "Invalid credentials in Authorization header", "token is wrong.*HF_TOKEN"),
        (401, "RepoNotFound", "", "no such model.*Check the name"),
        (404, "RevisionNotFound", "", "no such model or revision"),
        (503, "", "", "503.*with a network"),
    ],
)
def test_a_refusal_of_the_hub_says_what_to_do_and_its_cache_serves(
    tmp_path: Path, hub: FakeHub, status: int, code: str, text: str, words: str
) -> None:
    fault = (status, {"X-Error-Code": code, "X-Error-Message": text})
    hub.faults = {"/resolve/" if status == 403 else "/api/": fault}
    error = refusal(tmp_path, HUB_MODEL)
    assert error.code == "model_not_found"
    assert re.search(f"did not deliver .*{words}", f"{error.message} {error.hint}")
    hub.faults = {}
    locate(tmp_path, HUB_MODEL)
    hub.faults = {"": fault}
    assert locate(tmp_path, HUB_MODEL).family.name == "sd15"
    assert refusal(tmp_path, HUB_MODEL, revision="v9").code == "model_not_found"


def test_names_of_models_are_resolved_and_corrected(tmp_path: Path, hub: FakeHub) -> None:
    for name, home in trainer.SHORT_NAMES.items():
        refusal(tmp_path, name)
        assert hub.log[-1] == f"GET /api/models/{home}"
    for gone, home in trainer.MOVED.items():
        error = refusal(tmp_path, gone)
        assert (error.code, f'"{home}"' in error.hint) == ("model_not_found", True)
    assert "did you mean 'sdxl'?" in refusal(tmp_path, "sdx").message
    hub.files = {"README.md": b"", "juggernaut.safetensors": b""}
    error = refusal(tmp_path, HUB_MODEL)
    assert (error.code, "Download its .safetensors file" in error.hint) == ("model_unsupported", True)


TOKEN = "hf_" + "aB3x" * 9


@pytest.mark.parametrize(("token", "model"), [(TOKEN + "\n", HUB_MODEL), ("odd-\x01-secret", HUB_MODEL), ("", TOKEN)])
def test_a_token_is_in_no_output(tmp_path: Path, hub: FakeHub, images: Path, token: str, model: str) -> None:
    hub.faults[""] = (401, {"X-Error-Message": f"Invalid credentials in Authorization header: {token!a}"[:90]})
    config = write_config(tmp_path, **small(images, Path("x"), tmp_path / "out") | {"base_model": model})
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
    result = run("--config", config, "--debug", env=environment | {"HF_TOKEN": token})
    assert (result.code, result.last["code"]) == (1, "model_not_found")
    assert "Traceback" in result.stderr
    output = json.dumps(result.events, ensure_ascii=False) + result.stderr
    assert not re.search("aB3xaB3x|odd-", output)


def test_a_run_downloads_once_and_needs_no_network(tmp_path: Path, images: Path, models: Path, hub: FakeHub) -> None:
    folder = models / "sd15"
    hub.files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.*")}
    config = write_config(tmp_path, **small(images, Path("x"), tmp_path / "out") | {"base_model": HUB_MODEL})
    environment = os.environ | {"HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(tmp_path / "hub")}
    result = run("--config", config, env=environment | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": hub.url})
    assert (result.code, result.last["type"]) == (0, "complete")
    assert [event["current"] for event in result.of("info") if "(MB)" in event["message"]][-1] > 0
    written = [result.stderr.encode(), *(path.read_bytes() for path in (tmp_path / "out").rglob("*.*"))]
    assert not any(TOKEN.encode() in data for data in written)
    offline_hub = f"import huggingface_hub.constants as c; c.HF_HUB_CACHE = {str(tmp_path / 'hub')!r}"
    again = finish(started(config, offline_hub, "--set", "steps=6"))
    assert (again.code, again.last["type"], again.last["step"]) == (0, "complete", 6)
    for offline in ({"HF_HUB_OFFLINE": "1"}, {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": "http://127.0.0.1:9"}):
        missing = run("--config", config, "--set", "base_model=sdxl", env=environment | offline)
        assert (missing.code, missing.last["code"]) == (1, "model_not_found")
        assert missing.last["elapsed"] < 120  # Retries would take minutes.


@needs_torch
def test_a_whole_checkpoint_with_a_stray_key_of_a_lora_is_a_checkpoint(tmp_path: Path, single_files: Path) -> None:
    tensors = tensors_of(single_files / "sd15.safetensors")
    stray = {"lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.zeros(2, 2)}
    safetensors.torch.save_file(tensors | stray, tmp_path / "merged.safetensors")
    safetensors.torch.save_file(stray, tmp_path / "lora.safetensors")
    assert trainer.open_single_file(tmp_path / "merged.safetensors").family.name == "sd15"
    with pytest.raises(trainer.TrainerError, match="is a LoRA"):
        trainer.open_single_file(tmp_path / "lora.safetensors")


@needs_torch
def test_a_check_reads_the_files_that_the_run_reads(tmp_path: Path, images: Path, models: Path) -> None:
    model = Path(shutil.copytree(models / "sd15", tmp_path / "model"))
    config = load(tmp_path, small(images, model, tmp_path / "out"))
    (model / "unet/diffusion_pytorch_model.fp16.safetensors").write_bytes(b"broken, and never read in fp32")
    for download in (False, True):
        assert trainer.plan_run(config, Recorder(), download=download).source.components["unet"].variant is None
    weights = model / "unet/diffusion_pytorch_model.safetensors"
    for number in (1, 2):
        shutil.copy(weights, weights.with_name(f"diffusion_pytorch_model-0000{number}-of-00002.safetensors"))
    weights.unlink()
    for download in (False, True):
        with pytest.raises(trainer.TrainerError, match="lacks the index") as caught:
            trainer.plan_run(config, Recorder(), download=download)
        assert caught.value.code == "model_corrupt"
    weights.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    for path in (model / "unet").glob("*-of-*"):
        path.unlink()
    with pytest.raises(trainer.TrainerError) as caught:
        trainer.plan_run(config, Recorder(), download=False)
    assert "git lfs pull" in caught.value.hint


# ======================================================================================
# images
# ======================================================================================


def save_picture(path: Path, image: Image.Image, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path, **options)
    return path


def picture_kinds() -> Iterator[tuple[str, Image.Image, Json, Any]]:
    """Yield (file name, image, options of `save`, RGB [h, w, 3] that numpy computes from what is written)."""
    numpy = pytest.importorskip("numpy")
    rng = numpy.random.default_rng(0)
    rgb, cmyk = (rng.integers(0, 256, (12, 20, depth), dtype="uint8") for depth in (3, 4))
    picture, opacity = Image.fromarray(rgb), rgb[..., 1:2] / 255
    # What a viewer does with the stored rows, by EXIF's definition: (axes swapped, step down, step across).
    turns = [(0, 1, 1), (0, 1, -1), (0, -1, -1), (0, -1, 1), (1, 1, 1), (1, 1, -1), (1, -1, -1), (1, -1, 1)]
    for number, (swapped, down, across) in enumerate(turns, 1):
        exif = Image.Exif()
        exif[0x0112] = number
        yield f"exif{number}.png", picture, {"exif": exif}, (rgb.swapaxes(0, 1) if swapped else rgb)[::down, ::across]
    lossless: Json = {"lossless": True, "exact": True}
    for suffix, options in {"png": {}, "tif": {}, "webp": lossless}.items():
        faint = Image.fromarray(numpy.dstack([rgb, rgb[..., 1]]))
        yield f"transparent.{suffix}", faint, options, rgb * opacity + 255 * (1 - opacity)
        frames = {"save_all": True, "append_images": [Image.fromarray(255 - rgb)], **options}
        yield f"two_frames.{suffix}", picture, frames, rgb
    inks = 255.0 - cmyk
    yield "inks.tif", Image.frombytes("CMYK", (20, 12), cmyk.tobytes()), {}, inks[..., :3] * inks[..., 3:] / 255
    deep = rng.integers(0, 65536, (12, 20), dtype="uint16")
    yield "deep.png", Image.fromarray(deep), {}, (deep / 257)[..., None]
    yield "floats.tif", Image.fromarray((deep / 65535).astype("float32")), {}, (deep / 257)[..., None]
    grey = Image.frombytes("LA", (20, 12), rgb[..., :2].tobytes())
    yield "grey.png", grey, {}, rgb[..., :1] * opacity + 255 * (1 - opacity)
    palette = Image.frombytes("P", (20, 12), (rgb[..., 0] // 16).tobytes())
    palette.putpalette(cmyk[:4, :4, :3].tobytes())
    colours = cmyk[:4, :4, :3].reshape(16, 3)[rgb[..., 0] // 16]
    yield "palette.bmp", palette, {}, colours
    yield "clear.png", palette, {"transparency": 3}, numpy.where(rgb[..., :1] // 16 == 3, 255, colours)


def test_every_kind_of_picture_is_read_as_it_looks(tmp_path: Path) -> None:
    numpy = pytest.importorskip("numpy")
    for name, image, options, expected in picture_kinds():
        path = save_picture(tmp_path / name, image, **options)
        read, digest = trainer.read_image(path, tmp_path)
        assert digest == hashlib.sha256(path.read_bytes()).hexdigest()
        pixels = numpy.asarray(trainer.to_rgb(read)).astype(float)
        assert pixels.shape == (*expected.shape[:2], 3), name
        assert abs(pixels - expected).max() <= 1, name


def test_broken_exif_still_turns_a_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    broken = exif.tobytes().replace(b"\x01\x0e\0\x02", b"\x01\x19\0\x02")  # text in a tag that holds a number
    path = save_picture(tmp_path / "a.jpg", Image.new("RGB", (20, 12)), exif=broken)
    assert trainer.read_image(path, tmp_path)[0].size == (12, 20)


def test_an_image_is_scaled_to_cover_and_cropped_in_the_centre_and_a_thin_one_is_not_scaled_as_a_whole() -> None:
    image = Image.new("RGB", (200, 100), "red")
    image.paste((0, 0, 255), (50, 0, 150, 100))
    fitted, crop = trainer.fit_image(image, (64, 64))
    assert (fitted.size, crop) == ((64, 64), (32, 0))
    assert {fitted.getpixel((x, 32)) for x in (3, 60)} == {(0, 0, 255)}
    fitted, crop = trainer.fit_image(Image.new("RGB", (1, 20_000), "red"), (1024, 1024))  # All of it would take 60 GB.
    assert (fitted.size, crop, fitted.getpixel((9, 9))) == ((1024, 1024), (0, 10_239_488), (255, 0, 0))


# Colour profiles, made here by the ICC's specification, and the right colours, computed by the spaces' own formulas.

PRIMARIES = {  # (x, y) of red, green and blue; the white is D65
    "sRGB": ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06)),
    "Display P3": ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06)),
    "Adobe RGB": ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06)),
}
D65, D50 = (0.3127 / 0.3290, 1.0, 0.3583 / 0.3290), (0.9642, 1.0, 0.8249)
BRADFORD = ((0.8951, 0.2664, -0.1614), (-0.7502, 1.7135, 0.0367), (0.0389, -0.0685, 1.0296))


def to_xyz(space: str) -> Any:
    """Return the matrix from linear RGB to XYZ under D50, as a profile stores it."""
    primaries = numpy.array([[x / y, 1, (1 - x - y) / y] for x, y in PRIMARIES[space]]).T
    matrix = primaries * numpy.linalg.solve(primaries, numpy.array(D65))
    bradford = numpy.array(BRADFORD)
    cones = (bradford @ numpy.array(D50)) / (bradford @ numpy.array(D65))
    return numpy.linalg.inv(bradford) @ numpy.diag(cones) @ bradford @ matrix


def srgb_bytes(xyz: Any) -> list[int]:
    """Return the sRGB bytes of a colour in XYZ under D50."""
    linear = numpy.linalg.solve(to_xyz("sRGB"), numpy.array(xyz)).clip(0, 1)
    encoded = numpy.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    return [int(value) for value in (encoded * 255).round()]


def icc_profile(colours: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """Write a display profile of version 2 with these tags (ICC.1:2001-04)."""
    table, body, start = b"", b"", 128 + 4 + 12 * len(tags)
    for name, data in tags.items():
        table += name + struct.pack(">II", start + len(body), len(data))
        body += data + bytes(-len(data) % 4)
    size = start + len(body)
    white = struct.pack(">3i", *(round(value * 65536) for value in D50))
    head = struct.pack(
        ">I4sI4s4s4s", size, bytes(4), 0x02400000, b"mntr", colours, b"XYZ " if b"A2B0" not in tags else b"Lab "
    )
    head += bytes(12) + b"acsp" + bytes(28) + white
    return head.ljust(128, b"\0") + struct.pack(">I", len(tags)) + table + body


def xyz_tag(values: Any) -> bytes:
    return b"XYZ " + bytes(4) + struct.pack(">3i", *(round(float(value) * 65536) for value in values))


def gamma_tag(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def rgb_profile(space: str, gamma: float = 2.2) -> bytes:
    matrix = to_xyz(space)
    tags = {b"wtpt": xyz_tag(D50)} | {
        name: xyz_tag(matrix[:, column]) for column, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))
    }
    return icc_profile(b"RGB ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), gamma_tag(gamma)))


def ink_profile() -> bytes:
    """Return a profile for CMYK whose table has the 16 mixtures of whole inks: in Lab they get darker and bluer."""
    inks = itertools.product((0, 1), repeat=4)
    table = b"".join(struct.pack(">3B", round(255 * lightness(ink) / 100), 128, 128 - 20 * ink[0]) for ink in inks)
    straight = bytes(range(256))
    data = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + struct.pack(">9i", *(65536 * (i % 4 == 0) for i in range(9)))
    return icc_profile(b"CMYK", {b"wtpt": xyz_tag(D50), b"A2B0": data + straight * 4 + table + straight * 3})


def lightness(ink: Sequence[int]) -> float:
    return 100 - 20 * sum(ink[:3]) - 40 * ink[3]


def lab_bytes(lightness: float, b: float) -> list[int]:
    """Return the sRGB bytes of a colour in Lab with a = 0 (CIE 15), for lightness above 8."""
    y, z = (lightness + 16) / 116, (lightness + 16) / 116 - b / 200
    return srgb_bytes([white * part**3 for white, part in zip(D50, (y, y, z), strict=True)])


def rgb_bytes(space: str, colour: Sequence[int]) -> list[int]:
    return srgb_bytes(to_xyz(space) @ (numpy.array(colour) / 255) ** 2.2)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L", "LA", "CMYK"])
def test_a_picture_with_a_colour_profile_trains_in_the_colours_that_a_viewer_shows(mode: str) -> None:
    grey = icc_profile(b"GRAY", {b"wtpt": xyz_tag(D50), b"kTRC": gamma_tag(1.0)})
    inks = {(255, 0, 0, 0): lab_bytes(80, -20), (0, 255, 255, 0): lab_bytes(60, 0), (0, 0, 0, 255): lab_bytes(60, 0)}
    cases: list[Any] = [(colour, ink_profile(), expected) for colour, expected in inks.items()]
    if mode in ("L", "LA"):
        cases = [((100, 255)[: len(mode)], grey, srgb_bytes([100 / 255 * value for value in D50]))]
    elif mode != "CMYK":
        pairs = itertools.product(PRIMARIES, [(200, 60, 40), (30, 180, 90), (10, 10, 250)])
        cases = [(colour, rgb_profile(space), rgb_bytes(space, colour)) for space, colour in pairs]
    for colour, profile, expected in cases:
        image = Image.new(mode if mode != "P" else "RGB", (8, 8), tuple([*colour, 255][: len(mode)]))
        if mode == "P":
            image = Image.new("P", (8, 8), 1)
            image.putpalette([0, 0, 0, *colour])
        image.info["icc_profile"] = profile
        assert trainer.profile_fault(image) == ""
        pixel: Any = trainer.to_rgb(image).getpixel((3, 3))
        assert list(pixel) == pytest.approx(expected, abs=1), (colour, profile)
    if mode == "RGB":
        assert rgb_bytes("Display P3", (200, 60, 40)) == [219, 37, 13]


def test_a_broken_or_foreign_profile_is_named_and_the_numbers_train(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "good.png")
    profiles = {"cut.png": rgb_profile("sRGB")[:150], "junk.png": b"junk", "ink.png": ink_profile()}
    for name, profile in profiles.items():
        Image.new("RGB", (64, 64), (200, len(name), 40)).save(folder / name, icc_profile=profile)
    config = parse(tmp_path, REQUIRED | {"dataset_path": str(folder), "output_path": str(tmp_path / "out")})
    dataset = scan_quietly(config)
    assert {e.name for e in dataset.examples if e.profile_fault} == {*profiles}
    (message,) = [
        m for code, m, _ in trainer.dataset_warnings(config, dataset, 64) if code == "colour_profile_unusable"
    ]
    assert all(name in message for name in profiles) and "it is for CMYK, the image is RGB" in message
    assert trainer.to_rgb(Image.open(folder / "ink.png")).getpixel((0, 0)) == (200, 7, 40)


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("I;16", 25700, 100),
        ("I", 25700, 100),
        ("F", 100 / 255, 100),
        ("F", 255.0, None),
        ("I", 65536, None),
        ("I", -1, None),
    ],
)
def test_a_sample_format_has_one_white(tmp_path: Path, mode: str, value: float, expected: int | None) -> None:
    folder = tmp_path / "images"
    save_picture(folder / "0.tif", Image.new(mode, (64, 64), value))
    if expected is not None:
        scan(tmp_path, folder)
        assert trainer.to_rgb(Image.open(folder / "0.tif")).getpixel((0, 0)) == (expected,) * 3
        return
    with pytest.raises(trainer.TrainerError, match="no usable image") as caught:
        scan(tmp_path, folder)
    assert "nobody knows what is white" in caught.value.problems[0]["message"]


def test_a_transparent_16_bit_value_is_transparent_and_no_other(tmp_path: Path) -> None:
    image = Image.new("I;16", (64, 64), 25700)
    image.putpixel((0, 0), 100)
    read, _ = trainer.read_image(save_picture(tmp_path / "0.png", image, transparency=100), tmp_path)
    assert [trainer.to_rgb(read).getpixel(place) for place in ((0, 0), (9, 9))] == [(255,) * 3, (100,) * 3]


def test_a_png_with_megabytes_of_text_trains(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", "x" * 3_000_000, zip=True)
    (tmp_path / "images").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "images/0.png", pnginfo=info)
    assert len(scan(tmp_path, tmp_path / "images").examples) == 1


# ======================================================================================
# dataset
# ======================================================================================


def scan(tmp_path: Path, folder: Path, **changes: Any) -> trainer.Dataset:
    return scan_quietly(parse(tmp_path, REQUIRED | {"dataset_path": str(folder), **changes}))


def fill(folder: Path, *names: str, size: tuple[int, int] = (64, 64)) -> Path:
    """Add images of different contents to a folder."""
    for name in names:
        colour = tuple(hashlib.sha256(name.encode()).digest()[:3])
        save_picture(folder / name, Image.new("RGB", size, colour))
    return folder


def captions_of(dataset: trainer.Dataset) -> dict[str, str]:
    return {example.name: example.caption for example in dataset.examples}


def test_captions_come_from_metadata_sidecars_and_folders_and_get_the_trigger_words(tmp_path: Path) -> None:
    names = ("10_zorb/a.png", "10_zorb/deep/b.png", "1_x/2_blue bird/c.png", "0_off/d.png", "e.png", "f.png", "g.png")
    folder = fill(tmp_path / "images", *names)
    (folder / "metadata.jsonl").write_text('{"file_name": "e.png", "text": " from metadata "}', "utf-8")
    (folder / "e.txt").write_text("from sidecar", "utf-8")
    (folder / "f.txt").write_text(" a Zorb, resting \n", "utf-8")
    dataset = scan(tmp_path, folder, repeats=3, on_bad_image="error")
    assert {e.name: (e.repeats, e.caption, e.caption_source) for e in dataset.examples} == {
        "10_zorb/a.png": (30, "zorb", "folder name"),
        "10_zorb/deep/b.png": (30, "zorb", "folder name"),
        "1_x/2_blue bird/c.png": (6, "zorb, blue bird", "folder name"),
        "e.png": (3, "zorb, from metadata", "metadata.jsonl"),
        "f.png": (3, "a Zorb, resting", "sidecar"),
        "g.png": (3, "zorb", "trigger words"),
    }
    assert [(issue.code, issue.path) for issue in dataset.issues] == [("folder_left_out", "0_off")]
    config, other = (parse(tmp_path, REQUIRED | {"caption_separator": separator}) for separator in ",;")
    assert trainer.with_trigger_words("a zorbing ball", ["zorb", "Ball"], config) == "zorb, a zorbing ball"
    assert trainer.with_trigger_words("", ["a b", "c"], other) == "a b; c"
    assert trainer.with_trigger_words("{zorb|{a|b}} ball", ["zorb", "ball"], config) == "{zorb|{a|b}} ball"
    choosing = dataclasses.replace(config, caption_choices=True)
    assert trainer.with_trigger_words("{zorb|{a|b}} ball", ["zorb", "ball"], choosing) == "zorb, {zorb|{a|b}} ball"


def test_lines_of_metadata_that_cannot_be_used_are_one_warning(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "a.png")
    bad: list[Any] = [{"file_name": "a.png", "text": 1}, {"file_name": 1, "text": "x"}, {"text": "x"}, [], "x", 7, None]
    outside = ("../outside/secret.png", "/etc/passwd.png", "C:\\secret.png", "b.png")
    bad += [{"file_name": name, "text": "x"} for name in outside]
    lines = ["{", "[" * 100_000, *map(json.dumps, bad), "", '{"file_name": "a.png", "text": "said \\ud800"}']
    (folder / "metadata.jsonl").write_text("\n".join(lines), "utf-8")
    dataset = scan(tmp_path, folder)
    assert captions_of(dataset) == {"a.png": "zorb, said ?"}
    (issue,) = dataset.issues
    assert (issue.code, issue.path) == ("caption_skipped", "metadata.jsonl")
    assert issue.message.startswith("has lines that cannot be used (1, 2, 3, 4, 5 and 8 more)")
    with pytest.raises(trainer.TrainerError, match="1 file cannot be used, and on_bad_image is error"):
        scan(tmp_path, folder, on_bad_image="error")


def test_names_match_whatever_system_wrote_them(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "cafe\u0301.png", "b.png", "\u00fc.png")  # A Mac stores the accent apart.
    (folder / "b.TXT").write_text("from Windows")
    entries = [{"file_name": ".\\caf\u00e9.png", "text": "composed"}, {"file_name": "u\u0308.png", "text": "apart"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, entries)))
    dataset = scan(tmp_path, folder)
    assert list(captions_of(dataset).values()) == ["zorb, from Windows", "zorb, composed", "zorb, apart"]
    assert dataset.issues == ()


@pytest.mark.parametrize(
    ("data", "caption", "doubtful"),
    [
        pytest.param("über, zorb".encode(), "über, zorb", False, id="UTF-8"),
        pytest.param("über, zorb".encode("utf-8-sig"), "über, zorb", False, id="byte order mark"),
        pytest.param(b"\xff\xfe" + "über, zorb".encode("utf-16-le"), "über, zorb", False, id="UTF-16"),
        pytest.param(b" \n", "zorb", False, id="blank"),
        pytest.param("café, zorb".encode("cp1252"), "caf\ufffd, zorb", True, id="Windows-1252"),
        pytest.param("zorb".encode("utf-16-le"), "zorb, z\0o\0r\0b\0", True, id="UTF-16 without a mark"),
    ],
)
def test_captions_are_read_as_editors_write_them(tmp_path: Path, data: bytes, caption: str, doubtful: bool) -> None:
    folder = fill(tmp_path / "images", "a.png")
    (folder / "a.txt").write_bytes(data)
    assert captions_of(scan(tmp_path, folder)) == {"a.png": caption}
    assert ("caption_doubtful" in warnings_of(tmp_path, folder)) is doubtful


def make_links(folder: Path) -> dict[str, str]:
    """Add links that lead out or in circles, and a pipe, as images, captions and masks: {image: its reason}."""
    outside = fill(folder.parent / "outside", "secret.png")
    fill(folder, "captioned.png", "masked.png")
    links = {"link.png": outside / "secret.png", "loop.png": Path("loop.png"), "device.png": Path("/dev/zero")}
    links |= {"captioned.txt": outside / "secret.png", "masked-masklabel.png": outside / "secret.png"}
    for name, target in (links | {"linked": outside, "circle": folder}).items():
        (folder / name).symlink_to(target)
    os.mkfifo(folder / "pipe.png")
    reasons = dict.fromkeys(("linked", "circle"), "is a link to a folder")
    reasons |= {name: f"{name} is no regular file" for name in ("link.png", "loop.png", "device.png", "pipe.png")}
    return reasons | {
        "captioned.png": "captioned.txt is no regular",
        "masked.png": "masked-masklabel.png is no regular",
    }


def make_junk(folder: Path) -> dict[str, str]:
    """Add a bomb, cut files, formats that are not read, and masks that are none: {image: its reason}."""
    image = Image.effect_noise((64, 64), 50).convert("RGB")
    cut = [f"cut.{suffix}" for suffix in ("jpg", "png", "webp", "bmp", "tif", "avif")]
    for name in cut:
        data = save_picture(folder / name, image).read_bytes()
        (folder / name).write_bytes(data[: len(data) * 2 // 3])
    save_picture(folder / "bomb.png", Image.new("1", (12_100, 10_000)))
    save_picture(folder / "script.jpg", image, format="EPS")
    save_picture(folder / "other.png", image.convert("P"), format="GIF")
    fill(folder, "maskless.png", "larger.png")
    save_picture(folder / "larger-masklabel.png", Image.new("L", (65, 64)))
    for name in ("phone.heic", "maskless-masklabel.png"):
        (folder / name).write_bytes(b"\0\0\0\x24ftypheic\0\0\0\0mif1")
    unread = ("script.jpg", "other.png", "phone.heic", "maskless.png")
    reasons = dict.fromkeys(unread, "cannot be read as any of JPEG") | dict.fromkeys(cut, "cut.")
    return reasons | {"bomb.png": "121000000 pixels", "larger.png": "larger-masklabel.png has another size (65x64)"}


@posix
def test_hostile_files_are_named_and_none_outside_is_read(tmp_path: Path, monkeypatch: Patch) -> None:
    good = ("good.png", "good\nname 'x'.png", "ends.in.dots...png", f"{'n' * 247}.png")  # Its mask's name is too long.
    folder = fill(tmp_path / "images", *good)
    reasons = make_links(folder) | make_junk(folder)
    reading = mock.Mock(side_effect=Path.read_bytes)
    monkeypatch.setattr(Path, "read_bytes", lambda path: reading(path))
    dataset = scan(tmp_path, folder, masked_loss=True)
    issues = {issue.path: issue.message for issue in dataset.issues}
    assert issues.keys() == reasons.keys()
    assert [name for name, reason in reasons.items() if reason not in issues[name]] == []
    assert {example.name for example in dataset.examples} == {*good}
    names = {Path(os.path.realpath(call.args[0])).name for call in reading.mock_calls}
    assert names >= {*good} and not names & {"secret.png", "zero"}
    with pytest.raises(trainer.TrainerError) as caught:
        scan(tmp_path, folder, masked_loss=True, on_bad_image="error")
    assert caught.value.code == "dataset_unreadable"
    assert {item["path"] for item in caught.value.problems} == reasons.keys()


def test_an_empty_or_unusable_folder_is_an_error_that_lists_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for problems in (0, 1):
        with pytest.raises(trainer.TrainerError) as caught:
            scan(tmp_path, folder)
        assert (caught.value.code, len(caught.value.problems)) == ("dataset_empty", problems)
        (folder / "empty.png").touch()
    for wrong in ("imagse", "images/empty.png"):
        with pytest.raises(trainer.TrainerError, match=wrong) as caught:
            scan(tmp_path, tmp_path / wrong)
        assert caught.value.code == "dataset_unreadable"


def test_our_own_output_is_never_a_training_image(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "samples/mine.png", "out/samples/step_1_0.png", ".hidden.png", ".hidden/a.png")
    for name in ("config.json", "events.jsonl"):
        (folder / "out" / name).write_text("{}")
    for name in ("liked.png", "grid.png"):
        (folder / name).write_bytes(trainer.png_bytes(Image.new("RGB", (64, 64), "red"), {"prompt": "a zorb"}))
    dataset = scan(tmp_path, folder, output_path=str(tmp_path / "other"))
    assert [*captions_of(dataset)] == ["samples/mine.png"]
    warned = [
        text for code, text, _ in trainer.dataset_warnings(parse(tmp_path, REQUIRED), dataset, 64) if "own_" in code
    ]
    assert warned == ["out is an output folder of this trainer.", "grid.png, liked.png was drawn by this trainer."]


def test_files_that_look_like_pictures_or_captions_and_are_not_read_are_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "0.png", "1.jpe", "2.png")
    for name in ("a.CR2", "b.dng", "0-masklabel.jpg", "notes.md", "data.bin"):
        (folder / name).write_bytes(b"anything")
    (folder / "no_ending").write_bytes((folder / "1.jpe").read_bytes())
    (folder / "README").write_text("no picture")
    for name in ("0.caption", "2.json", "metadata.csv", "1.txt"):
        (folder / name).write_text("a caption")
    dataset = scan(tmp_path, folder)
    assert [*captions_of(dataset)] == ["0.png", "1.jpe", "2.png"]
    assert {issue.code: issue.message.partition(": ")[2] for issue in dataset.issues} == {
        "images_not_read": "0-masklabel.jpg, a.CR2, b.dng, no_ending",
        "captions_unread": "0.caption, 2.json, metadata.csv",
    }
    (folder / "0.txt").write_text("here")
    (folder / "2.txt").write_text("here")
    assert [issue.code for issue in scan(tmp_path, folder).issues] == ["images_not_read"]


def test_names_match_in_composed_and_decomposed_unicode(tmp_path: Path) -> None:
    forms = [unicodedata.normalize("NFC", "é1"), unicodedata.normalize("NFD", "é1")]
    for number, (image, stem) in enumerate((forms, forms[::-1])):
        folder = tmp_path / str(number)
        save_picture(folder / f"{image}.png", Image.new("RGBA", (64, 64), "red"))
        (folder / f"{stem}.txt").write_text("zorb, mine", "utf-8")
        save_picture(folder / f"{stem}-masklabel.png", Image.new("L", (64, 64), 9))
        (example,) = scan(tmp_path, folder, masked_loss=True).examples
        assert example.caption == "zorb, mine" and example.mask


def test_a_kohya_folder_one_level_too_low_works_and_a_whole_project_is_named(tmp_path: Path) -> None:
    project = fill(tmp_path / "project", "img/10_ohwx man/a.png", "reg/1_man/b.png")
    (low,) = scan(tmp_path, project / "img/10_ohwx man", trigger_words=["ohwx"]).examples
    (right,) = scan(tmp_path, project / "img", trigger_words=["ohwx"]).examples
    assert (low.repeats, low.caption) == (right.repeats, right.caption) == (10, "ohwx man")
    with pytest.raises(trainer.TrainerError, match="whole project") as caught:
        scan(tmp_path, project)
    assert "img" in caught.value.hint and "reg" in caught.value.hint
    both = scan(tmp_path, project / "img", regularization_path=str(project / "reg"))
    assert [e.role for e in both.examples] == ["train", "prior"]


@posix
def test_a_dataset_of_links_that_lead_out_says_what_to_give_instead(tmp_path: Path) -> None:
    blobs = fill(tmp_path / "blobs", "a.png")
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot/a.png").symlink_to("../blobs/a.png")
    with pytest.raises(trainer.TrainerError) as caught:
        scan(tmp_path, tmp_path / "snapshot")
    assert caught.value.code == "dataset_empty" and caught.value.hint == trainer.DATASET_HINTS["link_not_followed"]
    assert len(scan(tmp_path, blobs).examples) == 1


def test_a_changed_dataset_is_named_file_by_file(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "a.png", "b.png", "c.png")
    before = scan(tmp_path, folder).contents()
    assert before == scan(tmp_path, Path(shutil.copytree(folder, tmp_path / "moved"))).contents()
    (folder / "a.txt").write_text("another caption")
    (folder / "b.png").unlink()
    fill(folder, "d.png")
    with pytest.raises(trainer.TrainerError) as caught:
        saved = {"dataset": before, "seed": 1}
        trainer.check_identity({"dataset": scan(tmp_path, folder).contents(), "seed": 1}, saved, True, tmp_path)
    (entry,) = caught.value.problems
    parts = "added: d.png; removed: b.png; changed (image, mask, caption, repeats or part): a.png"
    assert (caught.value.code, entry["message"]) == ("resume_mismatch", parts)


@needs_torch
def test_prompts_are_checked_as_the_text_encoder_sees_them(tmp_path: Path, images: Path, models: Path) -> None:
    long, flagged = f"{'red ' * 90}zorb", "zorb --w 512 --h 768 --s 28"
    prompts = [long, flagged, "zorb - a well-known -- thing"]
    plan = make_plan(tmp_path, small(images, models / "sd15", tmp_path / "out", sample_prompts=prompts))
    assert plan.tokens and plan.tokens["prompts_cut"] == [long]
    texts = {code: message for code, message, _ in trainer.plan_warnings(plan)}
    assert texts["prompts_cut"].startswith("1 prompt of more than 75 tokens: red red")
    assert texts["prompt_flags"].endswith(f"(1): {flagged}.")


@needs_torch
def test_warnings_and_the_header_use_what_the_run_resolves_to(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", steps=None, epochs=1, batch_size=64, lr_warmup_steps=50)
    plan = make_plan(tmp_path, config | {"aspect_ratio_bucketing": False})
    assert "warmup_too_long" in [code for code, *_ in trainer.plan_warnings(plan)]
    assert plan.header_facts(1)["ss_total_batch_size"] == len(plan.dataset.examples) == 5


def test_caption_files_that_belong_to_no_image_are_named(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "01.png", "a.b.png", "5_in/02.PNG")
    (folder / "phone.heic").touch()
    strays = ["01.png.txt", "01.txt.txt", "1.txt", "5_in/02.PNG.txt"]
    for name in (*strays, "01.txt", "a.b.txt", "5_in/02.TXT", "phone.txt", ".hidden.txt", "notes.md"):
        (folder / name).write_text("caption")
    (message,) = [issue.message for issue in scan(tmp_path, folder).issues if issue.code == "captions_stray"]
    assert message == f"has 4 files that look like captions, without an image of that name: {', '.join(strays)}"


@pytest.mark.parametrize("mirrored", [False, True])
def test_a_variant_is_the_image_and_its_mask_at_one_size(tmp_path: Path, mirrored: bool) -> None:
    folder = tmp_path / "images"
    picture, half = Image.new("RGB", (200, 100), "red"), Image.new("L", (200, 100), 0)
    picture.paste("blue", (100, 0, 200, 100))
    half.paste(255, (0, 0, 100, 100))
    see_through = picture.copy()
    see_through.putalpha(half)
    save_picture(folder / "alpha.png", see_through)
    save_picture(folder / "file.png", see_through.convert("RGB"))
    clear = Image.merge("LA", [Image.new("L", (200, 100), 255), half])  # What is transparent in a mask does not train.
    save_picture(folder / "file-masklabel.png", clear)
    save_picture(folder / "whole.png", picture, compress_level=1)
    left, right = (90, 5) if mirrored else (5, 90)
    dataset = scan(tmp_path, folder, masked_loss=True)
    variants = [trainer.ImageVariant(example, (96, 64), mirrored, True) for example in dataset.examples]
    for variant, masked in zip(variants, (True, True, False), strict=True):
        image = variant.load()
        assert (image.name, image.picture.mode, image.picture.size) == (variant.example.name, "RGB", (96, 64))
        assert image.time_ids == (100, 200, 0, 16, 64, 96)
        assert (image.mask is not None) is variant.example.has_mask is masked
        if image.mask:
            assert (image.mask.mode, image.mask.size) == ("L", (96, 64))
            assert [image.mask.getpixel((x, 9)) for x in (left, right)] == [255, 0]
        blue = image.picture.getpixel((right, 9))
        assert blue == ((255, 255, 255) if variant.example.name == "alpha.png" else (0, 0, 255))
    assert len({json.dumps(variant.identity()) for variant in variants}) == 3
    plain = [dataclasses.replace(variant, masked=False) for variant in variants]
    assert plain[0].load().mask is None and plain[1].identity() != variants[1].identity()


@pytest.mark.parametrize("name", ["a.png", "a-masklabel.png"])
def test_a_file_that_changed_since_its_check_is_not_trained_on(tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path / "images", "a.png", "a-masklabel.png")
    (example,) = scan(tmp_path, folder, masked_loss=True).examples
    variant = trainer.ImageVariant(example, (64, 64), False, True)
    variant.load()
    for change in (Image.new("RGB", (64, 64)).save, os.unlink):
        change(folder / name)
        with pytest.raises(trainer.TrainerError, match=name) as caught:
            variant.load()
        assert caught.value.code == "dataset_unreadable"


def test_the_contents_follow_the_files_and_not_the_folders(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "a.png", "5_b/b.png")
    first = scan(tmp_path, folder).contents()
    folder = folder.rename(tmp_path / "moved")
    assert scan(tmp_path, folder).contents() == first
    changed = [scan(tmp_path, folder, **changes) for changes in ({"repeats": 2}, {"validation_split": 0.5})]
    (folder / "a.txt").write_text("caption")
    changed.append(scan(tmp_path, folder))
    save_picture(folder / "a.png", Image.new("RGB", (64, 64)))
    everything = [first, scan(tmp_path, folder).contents(), *(dataset.contents() for dataset in changed)]
    assert len({json.dumps(contents) for contents in everything}) == 5


def warnings_of(tmp_path: Path, folder: Path, **changes: Any) -> dict[str, str]:
    """Return {code: message} of the warnings about a folder, at resolution 512."""
    config = parse(tmp_path, REQUIRED | {"dataset_path": str(folder), **changes})
    dataset = scan_quietly(config)
    rows = list(trainer.dataset_warnings(config, dataset, 512))
    assert [code for code, _, hint in rows if hint != trainer.DATASET_HINTS[code]] == []
    return {code: message for code, message, _ in rows}


def test_what_is_usable_but_hardly_meant_is_a_warning(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", "a.png")
    shutil.copy(folder / "a.png", folder / "b.png")
    (folder / "c.png").touch()
    fill(folder, "d.png", "d-masklabel.png", size=(300, 300))
    (folder / "d.txt").write_text("caption")
    prior = fill(tmp_path / "prior", "p.png", size=(512, 512))
    assert warnings_of(tmp_path, folder, masked_loss=True, regularization_path=str(prior)) == {
        "image_skipped": f"c.png cannot be used: c.png cannot be read as any of {', '.join(trainer.IMAGE_FORMATS)}.",
        "captions_missing": "Images without a caption (3): a.png, b.png, prior/p.png.",
        "images_tiny": "Images smaller than half the resolution 512 (2): a.png, b.png.",
        "duplicates": "Images that are there more than once (1): a.png = b.png.",
        "masks_missing": "Images without a mask (3): a.png, b.png, prior/p.png.",
    }
    untriggered = warnings_of(tmp_path, prior, sample_prompts=["a dog", "zorbing"])
    assert untriggered["prompts_untriggered"] == "Sample prompts without a trigger word (2): a dog, zorbing."
    assert "prompts_untriggered" not in warnings_of(tmp_path, prior, sample_prompts=["a dog", "a Zorb, red"])


def test_buckets_keep_the_area_and_the_nearest_aspect_ratio_is_chosen() -> None:
    sizes = trainer.bucket_sizes(512, 64)
    assert sizes[0] == (512, 512) and trainer.bucket_sizes(64, 64) == [(64, 64)]
    for width, height in sizes[1:]:
        assert width % 64 == height % 64 == 0 and max(width, height) <= 4 * min(width, height)
        assert 0.7 * 512**2 <= width * height <= 512**2
    for width, height, size in ((1000, 1000, (512, 512)), (1920, 1080, (640, 384)), (1080, 1920, (384, 640))):
        assert trainer.choose_bucket(width, height, sizes) == size
    assert trainer.choose_bucket(10, 10, [(64, 64), (128, 128), (96, 96)]) == (128, 128), "the largest of equals"


def random_examples(count: int) -> list[trainer.Example]:
    """Images of all sizes that people have, without their files."""
    draw, examples = random.Random(1), []
    for name in map(str, range(count)):
        width, height = (round(math.exp(draw.uniform(math.log(300), math.log(6000)))) for _ in range(2))
        height = min(max(height, width // 4), width * 4)
        path = Path(f"{name}.png")
        examples.append(trainer.Example(name, path, path, "", "", 1, width, height, name, "train", False, None, "", ""))
    return examples


def test_an_epoch_shows_every_image_in_batches_of_one_size_and_little_is_cropped() -> None:
    examples = random_examples(500)
    allowed = trainer.bucket_sizes(1024, 64)
    sizes = [trainer.choose_bucket(example.width, example.height, allowed) for example in examples]
    buckets = trainer.make_buckets(trainer.Dataset(tuple(examples), ()), sizes, 0)
    assert list(buckets) == sorted(set(sizes))
    batches = trainer.epoch_batches(buckets, 4, seed=0, epoch=0)
    assert len(batches) == trainer.batches_per_epoch(buckets, 4)
    assert sorted(index for batch in batches for index in batch) == list(range(500))
    assert all(len({sizes[index] for index in batch}) == 1 for batch in batches)
    assert batches != trainer.epoch_batches(buckets, 4, seed=0, epoch=1)
    wider = [e.width * height / (e.height * width) for e, (width, height) in zip(examples, sizes, strict=True)]
    assert sum(min(ratio, 1 / ratio) for ratio in wider) > 0.95 * 500, "the crop leaves so much of the images"


def key_of(text: str) -> int:
    """Return the key of a draw, computed apart from the script: changing it breaks every run that is to be resumed."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") // 2


def test_draws_are_pure_functions_that_later_versions_keep(tmp_path: Path) -> None:
    config = parse(tmp_path, REQUIRED | {"shuffle_tags": True, "random_flip": True, "caption_dropout": 0.2, "seed": 9})
    order = random.Random(key_of("batch order/9/4"))
    wide, tall = order.sample([0, 0, 3], 3), order.sample([1, 2], 2)
    batches = [wide[:2], wide[2:], tall]
    order.shuffle(batches)
    assert trainer.epoch_batches({(96, 48): [0, 0, 3], (48, 96): [1, 2]}, 2, seed=9, epoch=4) == batches
    tags = random.Random(key_of("tags/9/a, b, c, d/1")).sample(["a", "b", "c", "d"], 4)
    assert trainer.caption_variants("a, b, c, d", config, 2)[1] == ", ".join(tags)
    for place in range(99):
        draw = random.Random(key_of(f"augmentation/9/7/{place}"))
        assert trainer.draw_augmentation(config, 7, place) == (draw.random() < 0.5, draw.random() < 0.2)
        assert trainer.draw_augmentation(parse(tmp_path, REQUIRED), 7, place) == (False, False)
    first = min("0123", key=lambda digest: key_of(f"held out/9/{digest}"))
    assert [e.digest for e in trainer.hold_out(random_examples(4), 0.25, 9) if e.role == "validation"] == [first]


def test_regularization_images_are_a_fixed_draw_as_large_as_the_training_images(tmp_path: Path) -> None:
    folder = fill(tmp_path / "images", *(f"{number}.png" for number in range(4)))
    prior = fill(folder / "reg", *(f"1_a car/{number}.png" for number in range(10)))
    dataset = scan(tmp_path, folder, regularization_path=str(prior), repeats=2)
    assert dataset.examples[-1].name == "reg/1_a car/9.png"
    roles = collections.Counter((example.role, example.caption, example.repeats) for example in dataset.examples)
    assert roles == {("train", "zorb", 2): 4, ("prior", "a car", 1): 10}
    sizes = [(64, 64)] * 4 + [(64, 64), (96, 48)] * 5
    buckets = trainer.make_buckets(dataset, sizes, 7)
    shown = collections.Counter(index for members in buckets.values() for index in members)
    assert [shown[index] for index in range(4)] == [2] * 4
    drawn = random.Random(key_of("prior order/7")).sample(range(4, 14), 10)[:8]
    assert {index for index in shown if index >= 4} == set(drawn) and shown.total() == 16
    assert all(sizes[index] == size for size, members in buckets.items() for index in members)
    few = dataclasses.replace(dataset, examples=dataset.examples[:7])
    (members,) = trainer.make_buckets(few, [(64, 64)] * 7, 7).values()
    assert sorted(collections.Counter(members).values()) == [2, 2, 2, 2, 2, 3, 3], "three images stand for eight"


def test_held_out_images_are_drawn_by_content_and_never_trained_on() -> None:
    examples = random_examples(40)
    copies = [dataclasses.replace(example, name=f"copy {example.name}") for example in examples[:20]]
    parted = trainer.hold_out([*examples, *copies], 0.25, seed=3)
    held_out = {example.digest for example in parted if example.role == "validation"}
    assert len(held_out) == 10 and parted != trainer.hold_out([*examples, *copies], 0.25, seed=4)
    hundred = trainer.hold_out(random_examples(100), 0.07, seed=3)
    assert len(trainer.Dataset(tuple(hundred), ()).of_role("validation")) == 7, "0.07 * 100 is a little more in floats"
    assert [example.role for example in trainer.hold_out(examples[:1], 0.5, seed=3)] == ["train"]
    (members,) = trainer.make_buckets(trainer.Dataset(tuple(parted), ()), [(64, 64)] * 60, 0).values()
    assert {parted[index].digest for index in members} == {example.digest for example in examples} - held_out


def test_shuffled_captions_keep_their_first_tags_and_a_longer_run_only_adds(tmp_path: Path) -> None:
    config = parse(tmp_path, REQUIRED | {"shuffle_tags": True, "keep_tokens": 2})
    caption = "zorb, big, a, b ,, c, d"
    variants = trainer.caption_variants(caption, config, 9)
    assert len(variants) == 9 and len(set(variants)) > 4
    assert all(text.startswith("zorb, big, ") for text in variants)
    assert {tuple(sorted(text.split(", "))) for text in variants} == {("a", "b", "big", "c", "d", "zorb")}
    longer = trainer.caption_variants(caption, config, 99)
    assert longer[:9] == variants and len(longer) == 16
    assert trainer.caption_variants(caption, dataclasses.replace(config, seed=1), 9) != variants
    assert trainer.caption_variants(caption, dataclasses.replace(config, shuffle_tags=False), 9) == (caption,)
    assert trainer.caption_variants(caption, config, 0) == (caption,)


CONCEPTS: list[Json] = [
    {"folder": "./anna/", "trigger_words": ["ohwx", "anna"], "class_words": "woman", "loss_weight": 0.5},
    {"folder": "dogs\\rex", "trigger_words": ["skx dog"], "repeats": 3},
]


def test_each_image_has_the_words_repeats_and_weight_of_its_concept_only(tmp_path: Path) -> None:
    names = ("anna/1.png", "anna/2_x/2.png", "dogs/rex/3.png", "dogs/rex/4.png", "dogs/5.png", "6.png", "annabel/7.png")
    folder = fill(tmp_path / "images", *names)
    for name, caption in {"anna/1": "Anna at home", "dogs/rex/3": "ohwx, zorb", "dogs/5": "skx dog, park"}.items():
        (folder / f"{name}.txt").write_text(caption, "utf-8")
    keys: Json = {"dataset_path": str(folder), "trigger_words": ["zorb", "skx dog"], "concepts": CONCEPTS, "repeats": 2}
    config = parse(tmp_path, REQUIRED | keys)
    dataset = scan_quietly(config)
    rows = {e.name: (e.caption, e.repeats, e.loss_weight, e.concept) for e in dataset.examples}
    assert rows == {
        "anna/1.png": ("ohwx, Anna at home", 2, 0.5, "anna"),
        "anna/2_x/2.png": ("ohwx, anna, x", 4, 0.5, "anna"),  # Its folder is kohya's.
        "dogs/rex/3.png": ("skx dog, ohwx, zorb", 3, 1.0, "dogs/rex"),
        "dogs/rex/4.png": ("skx dog", 3, 1.0, "dogs/rex"),
        "dogs/5.png": ("zorb, skx dog, park", 2, 1.0, ""),
        "6.png": ("zorb", 2, 1.0, ""),
        "annabel/7.png": ("zorb", 2, 1.0, ""),
    }
    assert config.sample_prompts == ("ohwx, anna", "skx dog", "zorb")
    assert trainer.all_trigger_words(config) == ["zorb", "skx dog", "ohwx", "anna"]
    (folder / "anna/2_x").rename(folder / "anna/more")
    bare = {e.name: e.caption for e in scan_quietly(config).examples}["anna/more/2.png"]
    assert bare == "ohwx, anna woman", "an image without a caption gets the class too"
    common = parse(tmp_path, REQUIRED | keys | {"class_words": "thing"})
    captions = {e.name: e.caption for e in scan_quietly(common).examples}
    assert [captions[name] for name in ("anna/more/2.png", "dogs/rex/4.png", "6.png")] == [
        "ohwx, anna woman",
        "skx dog thing",
        "zorb thing",
    ]
    claimed = parse(tmp_path, REQUIRED | keys | {"trigger_words": ["SKX dog"]})
    assert {e.name: e.caption for e in scan_quietly(claimed).examples}["6.png"] == ""
    assert claimed.sample_prompts == ("ohwx, anna", "skx dog")


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a photo of Ohwx woman, in a park", "a photo of woman, in a park"),
        ("a photo of ohwx in a park", "a photo of woman in a park"),
        ("ohwx, anna,  a woman at home", "woman,  a woman at home"),
        ("anna ohwx woman", "woman"),
        ("ohwx, woman, red", "woman, red"),
        ("ohwx and skx dog", "ohwx and skx dog"),
        ("ohwx womanly, annabel", "woman womanly, annabel"),
        ("ohwx and anna, 1,000 f/1,8", "woman and woman, 1,000 f/1,8"),
        ("ohwx! (woman:1.2)", "woman! (woman:1.2)"),
        ("a park, ", "a park, "),
    ],
)
def test_class_words_stand_for_trigger_words_in_a_caption(tmp_path: Path, caption: str, expected: str) -> None:
    dog: Json = {"folder": "rex", "trigger_words": ["skx dog"], "class_words": "dog"}
    config = parse(tmp_path, REQUIRED | {"trigger_words": ["ohwx", "anna"], "class_words": "woman", "concepts": [dog]})
    assert trainer.class_caption(caption, "", config) == expected
    assert trainer.class_caption("a skx dog", "rex", config) == "a dog"
    no_class = dataclasses.replace(config, class_words="")
    for text, rest in (("Ohwx, anna, a house", "a house"), ("a red ohwx house, anna", "a red house"), ("ohwx", "")):
        assert trainer.class_caption(text, "", no_class) == rest
    assert trainer.class_caption("a park, ", "", no_class) == "a park, "
    longer = dataclasses.replace(config, trigger_words=("anna", "anna smith"))
    assert trainer.class_caption("Anna Smith and anna", "", longer) == "woman and woman"
    assert trainer.class_caption(caption, "", dataclasses.replace(config, trigger_words=())) == caption


WRONG_CONCEPTS: dict[str, tuple[list[str], list[str]]] = {  # The folders, and the ones that are refused by number.
    "outside": (["..", "/anna", "../images/anna", ".", "C:/x", "a/../.."], ["0", "1", "2", "3", "4", "5"]),
    "the same": (["anna", "./anna/"], ["1"]),
    "nested": (["anna/a", "b", "anna"], ["2"]),
    "missing": (["anna", "nobody"], ["1"]),
    "without images": (["anna", "empty"], ["1"]),
}


@pytest.mark.parametrize("name", WRONG_CONCEPTS)
def test_a_concepts_folder_that_cannot_be_one_is_a_config_error_with_its_path(tmp_path: Path, name: str) -> None:
    folder = fill(tmp_path / "images", "anna/a/1.png", "b/1.png")
    (folder / "empty").mkdir()
    folders, numbers = WRONG_CONCEPTS[name]
    concepts = [{"folder": text, "trigger_words": ["x"]} for text in folders]
    with pytest.raises(trainer.TrainerError) as caught:
        scan(tmp_path, folder, concepts=concepts)
    assert caught.value.code == "config_invalid"
    assert [item["path"] for item in caught.value.problems] == [f"concepts[{number}].folder" for number in numbers]


def test_a_run_weights_counts_and_names_its_concepts(tiny: TinyRuns) -> None:
    folder = fill(tiny.folder / "images", "anna/1.png", "rex/2.png", "rex/3.png", "4.png")
    rows = [("anna", 0.25), ("rex", 4.0)]
    concepts = [{"folder": name, "trigger_words": [f"{name}x"], "loss_weight": weight} for name, weight in rows]
    keys: Json = {"dataset_path": str(folder), "concepts": concepts, "batch_size": 4, "steps": 1}
    made = tiny.train(**keys)
    (batch,) = made.data.collate(0)
    weights = {"anna/1.png": 0.25, "rex/2.png": 4.0, "rex/3.png": 4.0, "4.png": 1.0}
    names = [made.plan.dataset.examples[index].name for index in made.data.batch_at(0)[1]]
    assert batch.weights.tolist() == [weights[name] for name in names]
    assert made.plan.dataset_report()["concepts"] == {"anna": 1, "rex": 2}
    header = trainer.read_header(made.final_path)
    words = [made.config.trigger_words[0], "annax", "rexx"]
    assert json.loads(header["train_lora.trigger_words"]) == words
    assert "trigger_words_unused" not in warning_codes(made)
    assert header["modelspec.trigger_phrase"] == ", ".join(words)


SEVERAL_LINES = "a red hat\n\n  zorb, left \n{big|small} zorb"


@pytest.mark.parametrize(
    ("changes", "caption"),
    [
        ({}, "a red hat\n\n  zorb, left \n{big|small} zorb"),
        ({"caption_lines": "first"}, "zorb, a red hat"),
        ({"caption_lines": "each"}, "zorb, a red hat\nzorb, left\n{big|small} zorb"),
    ],
)
def test_several_lines_are_what_the_config_says_and_a_warning_says_it_too(
    tmp_path: Path, changes: Json, caption: str
) -> None:
    folder = fill(tmp_path / "images", "1.png", "2.png", "3.png")
    (folder / "1.txt").write_text(SEVERAL_LINES, "utf-8")
    (folder / "2.txt").write_text("zorb (red:1.2) BREAK (x: y)", "utf-8")
    config = parse(tmp_path, REQUIRED | {"dataset_path": str(folder), **changes})
    dataset = scan_quietly(config)
    assert dataset.examples[0].caption == caption
    warnings = {code: message for code, message, _ in trainer.dataset_warnings(config, dataset, 64)}
    doing = {"first": "only the first one trains", "each": "one line per epoch, up to 16"}
    words = doing.get(config.caption_lines, "read as one caption")
    assert warnings["captions_multiline"] == f"Captions of several lines, {words} (1): 1.png."
    assert warnings["captions_weighted"] == "Captions with weights or BREAK (1): 2.png."


def test_which_caption_an_image_has_in_an_epoch_is_written_down_by_hand(tmp_path: Path) -> None:
    lines, tags = "one\ntwo\nthree", "zorb, a, b, c, d, e"
    each = parse(tmp_path, REQUIRED | {"caption_lines": "each", "seed": 9})
    order = random.Random(key_of(f"caption lines/9/{lines}")).sample(["one", "two", "three"], 3)
    assert trainer.caption_variants(lines, each, 5) == tuple(order[epoch % 3] for epoch in range(5))
    assert len(trainer.caption_variants(lines, each, 99)) == 16 and trainer.caption_variants(lines, each, 0) == ("one",)

    text = "a {red|blue|{big|small} green} hat, {x} | y"
    choices = parse(tmp_path, REQUIRED | {"caption_choices": True, "seed": 9})
    expected = []
    for number in range(4):
        draw = random.Random(key_of(f"choices/9/{text}/{number}"))
        inner = draw.choice(["big", "small"])
        expected.append(f"a {draw.choice(['red', 'blue', f'{inner} green'])} hat, {{x}} | y")
    assert trainer.caption_variants(text, choices, 4) == tuple(expected) and len(set(expected)) > 1
    assert trainer.caption_variants(text, choices, 0) == ("a red hat, {x} | y",)
    assert trainer.caption_variants("no choice", choices, 9) == ("no choice",)
    assert trainer.caption_variants(text, each, 9) == (text,)

    dropout = parse(tmp_path, REQUIRED | {"tag_dropout": 0.5, "keep_tokens": 1, "shuffle_tags": True, "seed": 9})
    expected = []
    for number in range(6):
        shuffled = random.Random(key_of(f"tags/9/{tags}/{number}")).sample(["a", "b", "c", "d", "e"], 5)
        draw = random.Random(key_of(f"tag dropout/9/{tags}/{number}"))
        expected.append(", ".join(["zorb", *(tag for tag in shuffled if draw.random() >= 0.5)]))
    assert trainer.caption_variants(tags, dropout, 6) == tuple(expected)
    many = trainer.caption_variants(", ".join(f"t{n}" for n in range(4000)), dropout, 1)[0]
    assert 1800 < len(many.split(", ")) < 2200


CAPTIONED: Json = {"caption_lines": "each", "caption_choices": True, "tag_dropout": 0.3, "shuffle_tags": True}
CAPTIONED |= {"keep_tokens": 1, "caption_dropout": 0.2, "validation_split": 0.2, "steps": 7, "sample_prompts": ["a"]}


@pytest.mark.parametrize("changes", [{}, {"train_text_encoder": True}])
def test_held_out_images_are_measured_with_their_first_line_and_choices(tiny: TinyRuns, changes: Json) -> None:
    folder = Path(shutil.copytree(tiny.images, tiny.folder / "images"))
    for path in folder.glob("*.txt"):
        path.write_text("zorb, {red|green} hat\nzorb, other", "utf-8")
    keys: Json = {"dataset_path": str(folder), "caption_lines": "each", "caption_choices": True, **changes}
    made = tiny.set_up(validation_split=0.4, **keys)
    asked = mock.Mock(side_effect=made.data.embeddings)
    vars(made.data)["embeddings"] = asked
    made.validate(0)
    texts = {text for call in asked.mock_calls for text in call.args[0]}
    assert texts - {*trainer.DRIFT_PROMPTS} == {"zorb, red hat"}
    assert len(emitted(made, "validation")) == 1


def test_a_run_that_draws_its_captions_once_or_drops_their_words_says_so(tiny: TinyRuns) -> None:
    made = tiny.set_up(epochs=1, steps=None, repeats=9, shuffle_tags=True, tag_dropout=0.1)
    assert {"captions_drawn_once", "trigger_words_dropped"} <= {*warning_codes(made)}
    other = tiny.set_up(output="other", epochs=2, steps=None, shuffle_tags=True, tag_dropout=0.1, keep_tokens=1)
    assert not {"captions_drawn_once", "trigger_words_dropped"} & {*warning_codes(other)}


def test_a_stop_in_an_epoch_with_every_rule_for_captions_ends_in_equal_bits(tiny: TinyRuns) -> None:
    folder = Path(shutil.copytree(tiny.images, tiny.folder / "images"))
    for path in folder.glob("*.txt"):
        path.write_text(f"zorb, {{red|green}}, a, b, c{path.stem}\nzorb, {{x|y|z}}, d\nlast, e, f", "utf-8")
    (folder / "anna").mkdir()
    shutil.move(folder / "0.png", folder / "anna/0.png")
    concepts = [{"folder": "anna", "trigger_words": ["ohwx"], "repeats": 2, "loss_weight": 2}]
    keys = CAPTIONED | {"dataset_path": str(folder), "concepts": concepts}
    whole = tiny.train(output="whole", **keys)
    assert len(whole.plan.captions) > 8, "the captions vary"
    for stop in (2, 3, math.inf):
        made = tiny.train(stop=stop, **keys)
    assert made.state.step == 7
    assert_same_tensors(made.final_path, whole.final_path)
    with pytest.raises(trainer.TrainerError, match="concepts"):
        prepare(tiny.folder, tiny.config(**keys | {"concepts": [], "steps": 9}))


# ======================================================================================
# diffusion maths
# ======================================================================================


def reference_scheduler(name: str, **changes: Any) -> Any:
    """Build one of diffusers' schedulers with the noise schedule of all families."""
    return getattr(diffusers, name).from_config(SCHEDULER | changes)


@needs_torch
@pytest.mark.parametrize(
    "changes", [{}, {"beta_schedule": "linear"}, {"trained_betas": [0.1, 0.3, 0.2]}, {"rescale_betas_zero_snr": True}]
)
def test_the_noise_schedule_is_that_of_diffusers_or_refused(changes: Json) -> None:
    alpha_bar = trainer.noise_schedule(SCHEDULER | changes)
    expected = reference_scheduler("DDIMScheduler", **changes).alphas_cumprod.double()
    torch.testing.assert_close(alpha_bar, expected, atol=2e-6, rtol=1e-4)
    with pytest.raises(trainer.TrainerError, match="squaredcos_cap_v2") as caught:
        trainer.noise_schedule(SCHEDULER | {"beta_schedule": "squaredcos_cap_v2"})
    assert caught.value.code == "model_unsupported"


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_targets_are_those_of_diffusers(prediction: str) -> None:
    reference = reference_scheduler("DDPMScheduler")
    latents, noise = torch.randn(5, 4, 8, 8), torch.randn(5, 4, 8, 8)
    timesteps = torch.tensor([0, 1, 250, 998, 999])
    noisy, target = trainer.diffuse(latents, noise, trainer.noise_schedule(SCHEDULER), timesteps, prediction)
    torch.testing.assert_close(noisy, reference.add_noise(latents, noise, timesteps), atol=2e-6, rtol=2e-6)
    expected = noise if prediction == "epsilon" else reference.get_velocity(latents, noise, timesteps)
    torch.testing.assert_close(target, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("warmup", [0, 7])
@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "cosine_with_restarts"])
def test_learning_rates_follow_diffusers_schedules(name: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    reference = "constant_with_warmup" if name == "constant" and warmup else name
    options: Json = {"num_warmup_steps": warmup, "num_training_steps": 40, "num_cycles": trainer.RESTARTS}
    schedule = diffusers.optimization.get_scheduler(reference, optimizer, **options)
    for step in range(40):
        assert trainer.learning_rate_factor(name, step, 40, warmup) == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()


@needs_torch
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr_weights_are_those_of_the_paper(prediction: str) -> None:
    alpha_bar = trainer.noise_schedule(SCHEDULER)
    utilities: Any = diffusers.training_utils
    snr = utilities.compute_snr(reference_scheduler("DDPMScheduler"), torch.arange(1000)).double()
    expected = snr.clamp(max=5) / (snr if prediction == "epsilon" else snr + 1)
    torch.testing.assert_close(trainer.loss_weights(alpha_bar, prediction, 5.0), expected, atol=0, rtol=1e-3)
    assert trainer.loss_weights(alpha_bar, prediction, None).tolist() == [1] * 1000
    # By hand: alpha_bar 0.9 has snr 9, and 0.5 has 1.
    by_hand = [5 / 9, 1.0] if prediction == "epsilon" else [5 / 10, 1 / 2]
    assert trainer.loss_weights(torch.tensor([0.9, 0.5]), prediction, 5.0).tolist() == pytest.approx(by_hand)


def test_the_loss_of_a_sample_by_hand() -> None:
    prediction, target = torch.zeros(2, 1, 1, 3), torch.tensor([[[[0.0, 0.3, -4.0]]], [[[1e-3, 1e-3, 1e-3]]]])
    mask, c = torch.tensor([[[[1.0, 0.5, 0.0]]]]), 0.1
    huber = [2 * c * (math.sqrt(error**2 + c**2) - c) for error in (0.0, 0.3, -4.0)]
    for options, first in (({}, 0.09 + 16), ({"mask": mask}, 0.09 / 2), ({"huber_c": c}, sum(huber))):
        share = 0.5 if "mask" in options else 1  # Both forms of an error far below huber_c are its square.
        expected = pytest.approx([first / 3, share * 1e-6], rel=1e-3)
        assert trainer.sample_error(prediction, target, **options).tolist() == expected


# ======================================================================================
# text and latents
# ======================================================================================

LONG = " ".join(string.ascii_lowercase * 5)  # 130 tokens
ENCODE: Json = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
IN_BF16: Json = {"atol": 2e-3, "rtol": 1e-3}  # The cache is in fp16, which keeps eleven bits.
Prepare = Callable[..., trainer.LoRATrainer]


@pytest.fixture
def prepared(tmp_path: Path, request: pytest.FixtureRequest) -> Prepare:
    """Return a function that sets up runs with a tiny model, each in a folder of its own."""
    pytest.importorskip("torch")
    images, models = map(request.getfixturevalue, ("images", "models"))
    outputs = (tmp_path / f"run{number}" for number in itertools.count())
    return lambda kind="sd15", **changes: prepare(tmp_path, small(images, models / kind, next(outputs), **changes))


def load_pipeline(made: trainer.LoRATrainer) -> Any:
    """Load the pipeline that diffusers has for a run's model, with its DDIM scheduler."""
    pipelines: Any = diffusers.DiffusionPipeline
    return pipelines.from_pretrained(made.config.base_model)


@pytest.mark.parametrize("kind", KINDS)
def test_texts_and_images_are_encoded_as_the_pipeline_does(prepared: Prepare, kind: str) -> None:
    pipeline = load_pipeline(made := prepared(kind, random_flip=True))
    text = made.plan.dataset.examples[2].caption
    encoded, cached = pipeline.encode_prompt(text, **ENCODE), made.data.cache[made.data.keys[text]]
    expected = {"context": encoded[0]} | ({"pooled": encoded[2]} if kind == "sdxl" else {})
    torch.testing.assert_close({name: tensor.float() for name, tensor in cached.items()}, expected, **IN_BF16)
    for index, mirrored in itertools.product(range(5), (False, True)):
        entry, example = cached_image(made, index, mirrored), made.plan.dataset.examples[index]
        size = (entry["mean"].shape[2] * 8, entry["mean"].shape[1] * 8)
        with Image.open(example.path) as image:
            fitted, crop = trainer.fit_image(ImageOps.mirror(image) if mirrored else image, size)
        latents = pipeline.vae.encode(pipeline.image_processor.preprocess(fitted)).latent_dist
        scale = pipeline.vae.config.scaling_factor
        expected = {"mean": latents.mean[0] * scale, "std": latents.std[0] * scale}
        torch.testing.assert_close({name: entry[name].float() for name in expected}, expected, **IN_BF16)
        assert entry["time_ids"].tolist() == [example.height, example.width, *crop[::-1], *size[::-1]]


@pytest.mark.parametrize("training", [False, True])
def test_only_what_trains_or_draws_stays(prepared: Prepare, monkeypatch: Patch, training: bool) -> None:
    real, alive = trainer.load_component, weakref.WeakSet[Any]()

    def load_and_watch(*arguments: Any) -> Any:
        alive.add(component := real(*arguments))
        return component

    monkeypatch.setattr(trainer, "load_component", load_and_watch)
    made = prepared("sdxl", train_text_encoder=training, sample_at_start=True)
    encoders = {"CLIPTextModel", "CLIPTextModelWithProjection"} if training else set()
    assert {type(component).__name__ for component in alive} == {"UNet2DConditionModel", "AutoencoderKL"} | encoders
    assert {name.split(".")[0] for name, _ in made.data.vae.named_parameters()} == {"decoder", "post_quant_conv"}


def test_cut_captions_and_common_trigger_words_are_warnings(tmp_path: Path, prepared: Prepare) -> None:
    folder = make_dataset(tmp_path / "images", [(64, 64)])
    (folder / "0.txt").write_text(LONG, "utf-8")
    for limit, message in ((75, "1 caption of more than 75 tokens: 0.png."), (150, None)):
        made = prepared(dataset_path=str(folder), trigger_words=["z", "zorb"], max_caption_tokens=limit)
        messages = {event["code"]: event["message"] for event in emitted(made, "warning")}
        assert messages["trigger_words_common"].endswith("common words: z.")
        assert messages.get("captions_cut") == message


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_long_captions_are_encoded_in_windows_and_short_ones_padded(prepared: Prepare, kind: str) -> None:
    made = prepared(kind, max_caption_tokens=150, sample_prompts=[LONG, "a b"])
    context, added = made.data.conditions([LONG, "a b"], torch.zeros(2, 6))
    letters, pipeline = LONG.split(), load_pipeline(made)
    windows = [" ".join(letters[:75]), " ".join(letters[75:]), "a b", ""]
    encoded = [pipeline.encode_prompt(window, **ENCODE) for window in windows]
    expected = torch.stack([torch.cat([encoded[i][0], encoded[i + 1][0]], dim=1)[0] for i in (0, 2)])
    torch.testing.assert_close(context, expected, **IN_BF16)
    if added:
        torch.testing.assert_close(added["text_embeds"], torch.cat([encoded[0][2], encoded[2][2]]), **IN_BF16)


@pytest.mark.parametrize("kind", ["sd15", "sd21"])
def test_clip_skip_uses_an_earlier_layer_and_the_last_norm(prepared: Prepare, kind: str) -> None:
    skipping, plain, text = prepared(kind, clip_skip=1), prepared(kind), "zorb, picture 1, blob"
    pipeline = load_pipeline(plain)
    tokens = pipeline.tokenizer(text, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        states = pipeline.text_encoder(tokens, output_hidden_states=True).hidden_states
        for made, state in ((skipping, states[-2]), (plain, states[-1])):
            expected = pipeline.text_encoder.final_layer_norm(state)
            torch.testing.assert_close(made.data.conditions([text], torch.zeros(1, 6))[0], expected, **IN_BF16)
    assert plain.data.keys[text] != skipping.data.keys[text]
    with pytest.raises(trainer.TrainerError, match="clip_skip must be less than the text encoder's"):
        prepared(kind, clip_skip=11)


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_text_encoders_that_train_start_as_the_pipelines(prepared: Prepare, kind: str) -> None:
    made = prepared(kind, max_caption_tokens=150, train_text_encoder=True, text_encoder_learning_rate=2e-2)
    texts = ["a zorb", "zorb, picture 1, blob"]
    context, added = made.data.conditions(texts, torch.zeros(2, 6))
    encoded = load_pipeline(made).encode_prompt(texts, **ENCODE)
    torch.testing.assert_close(context, encoded[0], atol=1e-5, rtol=1e-5)
    if added:
        torch.testing.assert_close(added["text_embeds"], encoded[2], atol=1e-5, rtol=1e-5)
    assert made.data.conditions([*texts, LONG], torch.zeros(3, 6))[0].shape[1] == 154
    assert "captions" not in encoded_counts(made)
    made.train()
    moved = {key: bool(weight.any()) for key, weight in made.adapter.named(made.adapter.weights).items()}
    still = {re.sub(r"layers\.(\d).*", r"\1", key) for key, has_moved in moved.items() if not has_moved}
    # SDXL uses the output of the last but one layer: the last layer of its first encoder has no effect.
    assert still == ({"text_encoder.text_model.encoder.2"} if kind == "sdxl" else set())
    assert emitted(made, "progress")[-1]["learning_rates"] == {"unet": 1e-2, "text_encoder": 2e-2}


@pytest.mark.parametrize("optimizer", ["adafactor", "schedulefree_adamw"])
def test_two_text_encoders_have_rates_of_their_own_and_rest_after_their_share(tiny: TinyRuns, optimizer: str) -> None:
    pytest.importorskip(trainer.OPTIMIZERS[optimizer].module.partition(".")[0])
    keys: Json = STOPS_TEXT | {"text_encoder_learning_rate": [1e-3, 2e-3], "checkpoint_steps": 1}
    made = tiny.train(kind="sdxl", weight_decay=0.5, optimizer=optimizer, **keys)
    rates = [[*event["learning_rates"].items()][1:] for event in emitted(made, "progress")]
    learning, resting = (
        [("text_encoder", first), ("text_encoder_2", second)] for first, second in ((1e-3, 2e-3), (0, 0))
    )
    assert rates == [learning] * 2 + [resting] * 2
    states = [trainer.decode_state(path)[0]["weights"] for _, path in sorted(made.checkpoints.states())]
    before, after = (made.adapter.named(state) for state in states)  # The newest two, of the steps 3 and 4.
    moved = {key.partition(".")[0] for key in before if not torch.equal(before[key], after[key])}
    assert moved == {"unet"}
    assert any(part.any() for key, part in after.items() if key.startswith("text_encoder_2"))


@needs("bitsandbytes")
@pytest.mark.parametrize(("kind", "adapter"), [("sd15", "lora"), ("sdxl", "dora")])
def test_an_nf4_base_computes_what_its_weights_stand_for(prepared: Prepare, kind: str, adapter: str) -> None:
    functional: Any = importlib.import_module("bitsandbytes.functional")
    made = prepared(kind, lora_type=adapter, lora_targets="all")
    options = (made.source, "unet", torch.float32, torch.device("cpu"))
    nf4, plain = trainer.load_component(*options, True), trainer.load_component(*options)
    layers = {name: layer for name, layer in nf4.named_modules() if type(layer).__name__ == "Linear4bit"}
    assert layers.keys() == {name for name, layer in plain.named_modules() if isinstance(layer, torch.nn.Linear)}
    for name, layer in layers.items():
        value = functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        weight = plain.get_submodule(name).weight
        assert 0 < (weight - value).norm() < 0.11 * weight.norm()  # Normal numbers lose a tenth in nf4.
        weight.data = value
    results = []
    for unet in (nf4.train(), plain.train()):  # In eval mode, bitsandbytes packs weights anew for some CPUs.
        parameters = trainer.add_adapter("unet", unet, made.config, trainer.TARGETS["all"][0])
        for key, weight in parameters.items():
            weight.data += torch.rand(weight.shape, generator=trainer.generator(key)) / 8
        output = answer(unet)
        results.append([output, *torch.autograd.grad(output.square().mean(), list(parameters.values()))])
    for value, expected in zip(*results, strict=True):
        assert (value - expected).norm() <= 1e-4 * expected.norm() + 1e-7


@pytest.mark.parametrize(("change", "prediction"), [(0.1, "epsilon"), (1e3, "v_prediction")])
def test_a_model_that_returns_pure_noise_predicts_epsilon(change: float, prediction: str) -> None:
    conditions = (torch.zeros(1, 77, 8), None)
    predict = mock.Mock(side_effect=lambda noise, timesteps, conditions: noise + change)
    assert trainer.measure_prediction_type(predict, 4, conditions, 1000) == prediction
    assert predict.call_args.args[1].tolist() == [999]


def test_what_the_model_predicts_is_measured_at_the_start_and_kept_on_a_resume(
    prepared: Prepare, monkeypatch: Patch
) -> None:
    made = prepared("sd15")
    monkeypatch.setattr(trainer, "measure_prediction_type", lambda *_: "v_prediction")
    assert made.source.prediction_known and made.measure_prediction() == "epsilon"
    assert "set prediction_type" in made.events.warnings[-1]["hint"]
    made.source = dataclasses.replace(made.source, prediction_known=False)
    made.plan = dataclasses.replace(made.plan, source=made.source)
    assert made.measure_prediction() == "v_prediction"
    assert made.events.warnings[-1]["hint"].startswith("It trains as v_prediction")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_component_that_answers_nan_is_named_before_the_first_step(
    tmp_path: Path, images: Path, models: Path, component: str
) -> None:
    model = Path(shutil.copytree(models / "sd15", tmp_path / "model"))
    (path,) = (model / component).glob("*.safetensors")
    tensors = tensors_of(path)
    name = next(name for name in tensors if tensors[name].dim() > 1 and not name.startswith(("decoder", "post_quant")))
    safetensors.torch.save_file(tensors | {name: tensors[name] * math.nan}, path, {"format": "pt"})
    with pytest.raises(trainer.TrainerError) as caught:
        prepare(tmp_path, small(images, model, tmp_path / "out"))
    failure = caught.value
    assert failure.code == "loss_not_finite" and f"({component}" in failure.message.lower()
    assert failure.hint.startswith("Use another copy") and "mixed_precision" not in failure.hint


# ======================================================================================
# adapter
# ======================================================================================


def make_adapter(tmp_path: Path, dtype: str = "float32", rank: int = 4, **changes: Any) -> tuple[Any, trainer.Adapter]:
    """Put an adapter on two small frozen layers, for steps of two micro-batches."""
    settings: Json = {"lora_rank": rank, "lora_alpha": rank, "gradient_accumulation_steps": 2, **changes}
    config = load(tmp_path, small(tmp_path, tmp_path, tmp_path / "out", **settings))
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)).requires_grad_(False)
    parameters = trainer.add_adapter("unet", layers.to(getattr(torch, dtype)), config, r"\d")
    return layers.train(), trainer.Adapter([layers], parameters, config, getattr(torch, dtype))


def batch_of(step: int) -> torch.Tensor:
    return torch.randn(16, 64, generator=trainer.generator("batch", step))


def backward(layers: Any, adapter: trainer.Adapter, step: int) -> Any:
    """Run the backward passes of a step over two micro-batches; return its loss."""
    micro_batches = batch_of(step).to(layers[0].weight.dtype).chunk(2)
    losses = [layers(inputs).float().square().mean() / 2 for inputs in micro_batches]
    for index, loss in enumerate(losses):
        adapter.backward(loss, first=index == 0)
    return (losses[0] + losses[1]).detach()


def flat(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


ADAPTERS: dict[str, Json] = {name: {"lora_type": name} for name in ("lora", "dora", "lokr")}
ADAPTERS["lokr, rank 1"] = {"lora_type": "lokr", "lora_rank": 1}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_starts_as_the_identity_and_depends_on_the_seed_only(tmp_path: Path, name: str) -> None:
    config = small(tmp_path, tmp_path, tmp_path, **ADAPTERS[name])

    def start(seed: int, global_seed: int) -> Json:
        torch.manual_seed(global_seed)
        unet = build_component("unet", tiny_config("sd15")["unet"]).requires_grad_(False)
        before = answer(unet)
        changed, (targets, _) = load(tmp_path, config | {"seed": seed}), trainer.TARGETS["all"]
        parameters = trainer.add_adapter("unet", unet, changed, targets)
        torch.testing.assert_close(answer(unet), before, atol=1e-6, rtol=0)
        return {key: weight for key, weight in parameters.items() if not key.endswith("vector")}

    one, same, other = start(5, 0), start(5, 1), start(6, 0)
    for key, weight in one.items():
        assert weight.dtype == torch.float32 and torch.equal(weight, same[key])
        if key.endswith(("/lora_B", "/lokr_w2", "/lokr_w2_b")):
            assert not weight.any()
        else:
            bound = 1 / math.sqrt(weight[0].numel())  # Kaiming uniform with a = sqrt(5)
            assert 0.3 * bound < weight.abs().max() <= bound and not torch.equal(weight, other[key])


@pytest.mark.parametrize(
    ("adapter_type", "dtype", "in_modules"),
    [("lora", "float32", "float32"), ("lora", "bfloat16", "bfloat16"), ("lokr", "bfloat16", "float32")],
)
def test_modules_see_views_of_the_flat_vectors(tmp_path: Path, adapter_type: str, dtype: str, in_modules: str) -> None:
    dropout: Json = {} if adapter_type == "lokr" else {"lora_dropout": 0.5}
    layers, adapter = make_adapter(tmp_path, dtype, lora_type=adapter_type, ema_decay=0.9, **dropout)
    inputs, average = torch.ones(2, 64, dtype=getattr(torch, dtype)), adapter.average
    assert average is not None and adapter.weights.dtype == adapter.gradient.dtype == average.dtype == torch.float32
    for vector, value in ((adapter.weights, 0.25), (adapter.gradient, 0.75), (average, 0.5)):
        vector.fill_(value)
    adapter.refresh_modules(adapter.weights)
    (group,) = adapter.optimizer.param_groups
    assert all(bool((weight == 0.25).all() and (weight.grad == 0.75).all()) for weight in group["params"])
    of_modules = [weight for name, weight in layers.named_parameters() if "lora_" in name or "lokr_" in name]
    assert torch.equal(flat(of_modules), adapter.weights.to(getattr(torch, in_modules)))
    autocast = trainer.autocast(adapter.config, getattr(torch, dtype), adapter.device)
    with pytest.raises(KeyError), adapter.evaluating(), autocast:
        assert bool((flat(of_modules) == 0.5).all()) and torch.equal(layers(inputs), layers(inputs)), "no dropout"
        raise KeyError
    assert bool((flat(of_modules) == 0.25).all()) and layers[0].training


def dora_pair(
    tmp_path: Path, dtype: torch.dtype, dropout: float = 0
) -> tuple[torch.nn.Module, torch.nn.Module, trainer.Adapter]:
    """Return two equal networks with a moved DoRA, one with PEFT's own forward pass, and the adapter of the other."""
    networks = []
    for _ in range(2):
        torch.manual_seed(1)
        layers = (torch.nn.Conv2d(4, 8, 3), torch.nn.Flatten(2), torch.nn.Linear(36, 16), torch.nn.Linear(16, 6, False))
        networks.append(torch.nn.Sequential(*layers).requires_grad_(False))
    keys: Json = {"lora_type": "dora", "lora_alpha": 6, "lora_rank": 4, "lora_dropout": dropout}
    config = load(tmp_path, small(tmp_path, tmp_path, tmp_path / "out", **keys))
    theirs, ours = (trainer.add_adapter("unet", network, config, r"[023]") for network in networks)
    for key, weight in theirs.items():
        noise = torch.rand(weight.shape, generator=trainer.generator(key)) / 5
        for parameter in (weight, ours[key]):
            parameter.data += noise
    return networks[0], networks[1], trainer.Adapter([networks[1].to(dtype)], ours, config, dtype)


DORA_INPUTS = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0)) if "torch" in sys.modules else None


def test_a_dora_starts_as_the_base_in_16_bits_and_a_row_of_zeros_stays_finite(tmp_path: Path) -> None:
    layer = torch.nn.Linear(64, 64).requires_grad_(False)
    layer.weight[3] = 0
    layers = torch.nn.Sequential(layer.bfloat16())
    inputs = batch_of(0).bfloat16()
    before = layers(inputs)
    config = load(tmp_path, small(tmp_path, tmp_path, tmp_path / "out", lora_type="dora"))
    adapter = trainer.Adapter([layers], trainer.add_adapter("unet", layers, config, r"\d"), config, torch.bfloat16)
    assert torch.equal(layers(inputs)[:, :3], before[:, :3])
    adapter.backward(layers(inputs).float().square().mean(), first=True)
    assert bool(layers(inputs).isfinite().all() and adapter.gradient.isfinite().all())


@pytest.mark.parametrize("dropout", [0, 0.5])
def test_a_dora_computes_as_pefts_own_does(tmp_path: Path, dropout: float) -> None:
    theirs, ours, adapter = dora_pair(tmp_path, torch.float32, dropout)

    def loss(network: Any) -> torch.Tensor:
        torch.manual_seed(2)
        return cast(torch.Tensor, network(DORA_INPUTS).square().mean())

    for _ in range(2):  # The second time is after a step, for which the norms are computed anew.
        expected = loss(theirs)
        torch.testing.assert_close(loss(ours), expected, atol=0, rtol=1e-5)
        weights = [weight for name, weight in sorted(theirs.named_parameters()) if "lora_" in name]
        adapter.backward(loss(ours), first=True)
        torch.testing.assert_close(adapter.gradient, flat(torch.autograd.grad(expected, weights)), atol=1e-6, rtol=1e-3)
        adapter.set_rates(10.0)
        adapter.step(torch.zeros(()), 0)
        for weight, view in zip(weights, adapter.split(adapter.weights), strict=True):
            weight.data = view.clone()
    with adapter.evaluating():
        torch.testing.assert_close(loss(ours), loss(theirs.eval()), atol=0, rtol=1e-5)


def test_a_dora_in_16_bits_keeps_small_changes_of_its_magnitudes(tmp_path: Path) -> None:
    _, ours, adapter = dora_pair(tmp_path, torch.bfloat16)
    _, exact_ours, exact = dora_pair(tmp_path, torch.float32)
    inputs: Any = DORA_INPUTS
    adapter.backward(ours(inputs.bfloat16()).float().square().mean(), first=True)
    exact.backward(exact_ours(inputs).square().mean(), first=True)
    for name, value in exact.named(exact.gradient).items():
        assert (adapter.named(adapter.gradient)[name] - value).norm() < 0.03 * value.norm(), name
    with torch.no_grad():
        before = ours(inputs.bfloat16()).float()
        weights = adapter.named(adapter.weights)["unet.3/lora_magnitude_vector"]
        weights *= 1.001  # bf16 knows no number between 1 and 1.0078.
        adapter.refresh_modules(adapter.weights)
        assert float((ours(inputs.bfloat16()).float() / before).mean()) == pytest.approx(1.001, abs=2e-4)


ADAM: Json = {"betas": (0.8, 0.95), "eps": 1e-6}
FIXED: dict[str, Json] = {  # what the config does not say
    "adafactor": {"scale_parameter": False, "relative_step": False},
    "prodigy": {"decouple": True, "use_bias_correction": True, "safeguard_warmup": True},
}


@pytest.mark.parametrize("name", trainer.OPTIMIZERS)
def test_a_step_clips_and_is_the_librarys_own_with_the_configs_settings(tmp_path: Path, name: str) -> None:
    row = trainer.OPTIMIZERS[name]
    owner = getattr(pytest.importorskip(row.module), row.class_name)
    changes: Json = {"weight_decay": 0.2, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6}
    changes |= {"max_grad_norm": 1e-4, "ema_decay": None if row.averages else 0.7}
    layers, adapter = make_adapter(tmp_path, rank=64, optimizer=name, **changes)
    weights = [torch.nn.Parameter(view.clone()) for view in adapter.split(adapter.weights)]
    options = {"lr": 1e-2, "weight_decay": 0.2} | (ADAM if row.adam else {}) | FIXED.get(name, {})
    optimizer = owner(weights, **options)
    average = diffusers.training_utils.EMAModel(weights, decay=0.7)
    if row.averages:
        optimizer.train()
    for step in range(4):
        rates, (group,) = adapter.set_rates(1 - step / 8), optimizer.param_groups
        group["lr"] = 1e-2 * (1 - step / 8)
        assert rates == {"unet": group["lr"] * group.get("d", 1.0)}  # d is prodigy's factor.
        loss = backward(layers, adapter, step)
        larger = torch.autograd.grad(layers(batch_of(step)).square().mean(), adapter.modules)
        torch.testing.assert_close(adapter.gradient, flat(larger), atol=1e-7, rtol=1e-4)
        for weight, view in zip(weights, adapter.split(adapter.gradient), strict=True):
            weight.grad = view.clone()
        norm = float(torch.nn.utils.clip_grad_norm_(weights, 1e-4))
        optimizer.step()
        average.step(weights)
        assert norm > 2e-4 and adapter.step(loss, step).tolist() == pytest.approx([float(loss), norm])
    torch.testing.assert_close(adapter.weights, flat(weights), atol=1e-5, rtol=1e-3)  # A step is up to 1e-2.
    before, result = adapter.weights.clone(), adapter.result()
    with adapter.evaluating():
        assert torch.equal(flat(adapter.modules), result)
    assert torch.equal(flat(adapter.modules), before)
    if row.averages:
        optimizer.eval()  # It writes its average over the weights that train.
    expected = flat(weights if row.averages else average.shadow_params)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-3)
    assert type(adapter.optimizer) is owner and not torch.equal(result, before)
    states = [[value for value in state.values() if torch.is_tensor(value)] for state in optimizer.state.values()]
    kept = [sum(value.nbytes for value in state if value.numel() == 64 * 64) for state in states]
    assert max(kept) == row.state_bytes * 64 * 64, "the memory estimate counts this"


@pytest.mark.parametrize("loss_factor", [1, math.nan])
@pytest.mark.parametrize(("name", "dtype"), [("adamw", "float32"), ("adafactor", "float32"), ("adamw", "float16")])
def test_a_step_that_is_not_finite_leaves_no_trace(tmp_path: Path, name: str, dtype: str, loss_factor: float) -> None:
    layers, adapter = make_adapter(tmp_path, dtype, optimizer=name, ema_decay=0.7)
    plain_layers, plain = make_adapter(tmp_path, optimizer=name, ema_decay=0.7)

    def state() -> Any:
        return copy.deepcopy([adapter.weights, adapter.average, adapter.optimizer.state_dict()["state"]])

    for step in (0, 1):
        adapter.step(backward(layers, adapter, step), step)
    before, loss = state(), backward(layers, adapter, 2)
    if loss_factor == 1 or dtype == "float16":  # The loss scaler judges by the gradient.
        adapter.gradient[3] = math.inf
    assert not adapter.step(loss * loss_factor, 2).isfinite().all()
    torch.testing.assert_close(state(), before, atol=0, rtol=0)
    for step in (0, 1, 3):
        numbers = plain.step(backward(plain_layers, plain, step), step)
    torch.testing.assert_close(adapter.step(backward(layers, adapter, 3), 3), numbers, atol=1e-3, rtol=1e-2)
    torch.testing.assert_close(adapter.result(), plain.result(), atol=2e-3, rtol=1e-2)
    assert adapter.scaler.get_scale() == (2**15 if dtype == "float16" else 1)  # It begins with 2**16.


def test_a_process_without_a_sample_takes_its_step_in_fp16_too(prepared: Prepare, monkeypatch: Patch) -> None:
    made = prepared("sd15", mixed_precision="fp16", weight_decay=0)
    monkeypatch.setattr(made.data, "collate", lambda micro_batch: [])
    loss, before = made.accumulate(0), made.adapter.weights.clone()
    assert loss is not None
    made.adapter.step(loss, 0)
    assert torch.equal(made.adapter.weights, before)


# ======================================================================================
# LoRA files
# ======================================================================================

WITH_TEXT = {"train_text_encoder": True}
DRAWN: list[tuple[str, Json]] = [
    *((kind, {}) for kind in KINDS),
    ("sd15", WITH_TEXT | {"ema_decay": 0.5}),
    ("sd21", {"save_format": "diffusers", "lora_type": "dora", "lora_targets": "all"}),
    ("sd21v", WITH_TEXT | {"zero_terminal_snr": True, "save_format": "diffusers"}),
    ("sdxl", WITH_TEXT | {"lora_targets": "all", "prediction_type": "v_prediction"}),
    ("sdxl", WITH_TEXT | {"save_format": "diffusers", "use_rslora": True}),
]


@pytest.mark.parametrize(("kind", "extra"), DRAWN, ids=str)
def test_the_stock_pipeline_draws_the_same_image(prepared: Prepare, kind: str, extra: Json) -> None:
    rates = {"learning_rate": 3e-2, "text_encoder_learning_rate": 3e-2, "lora_alpha": 2}
    samples = {"sample_steps": 6, "sample_prompts": ["a zorb"], "sample_negative_prompt": "bad"}
    made = prepared(kind, steps=6, validation_steps=6, **samples, **rates, **extra)
    assert made.train()
    made.finish()
    pipeline, side = load_pipeline(made), made.plan.resolution
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"} if "zero_terminal_snr" in extra else {}
    settings = {"prediction_type": made.prediction_type, **zero}
    pipeline.scheduler = pipeline.scheduler.from_config(pipeline.scheduler.config, **settings)
    sample = trainer.pixel_tensor(Image.open(made.folder.samples / "step_6_0.png")).int()

    def difference() -> int:
        noise = torch.randn(1, 4, side // 8, side // 8, generator=torch.Generator().manual_seed(42))
        options = {"num_inference_steps": 6, "guidance_scale": 7.0, "height": side, "width": side, "latents": noise}
        drawn = pipeline("a zorb", negative_prompt="bad", **options).images[0]
        return int((trainer.pixel_tensor(drawn).int() - sample).abs().max())

    assert difference() > 40, "the LoRA must matter for this test to mean anything"
    pipeline.load_lora_weights(made.final_path)
    assert difference() <= 2


# sd-scripts (networks/lora.py) trains the linear layers and convolutions in blocks of these classes.
TRANSFORMER_BLOCKS = ("Transformer2DModel", "CLIPAttention", "CLIPMLP")
KOHYA_BLOCKS = (*TRANSFORMER_BLOCKS, "ResnetBlock2D", "Downsample2D", "Upsample2D")


def kohya_layers(components: Mapping[str, Any], blocks: Sequence[str] = KOHYA_BLOCKS) -> dict[str, Any]:
    """Return a model's layers by their names in kohya's files."""
    layers: Json = {}
    is_xl = "text_encoder_2" in components
    prefixes = {"unet": "unet", "text_encoder": "te1" if is_xl else "te", "text_encoder_2": "te2"}
    for part, component in ((part, components[part]) for part in prefixes if part in components):
        inside = tuple(f"{name}." for name, block in component.named_modules() if type(block).__name__ in blocks)
        named = {name: layer for name, layer in component.named_modules() if name.startswith(inside)}
        named = {name: layer for name, layer in named.items() if type(layer).__name__ in ("Linear", "Conv2d")}
        if part != "unet":
            named = {f"text_model.{name.removeprefix('text_model.')}": layer for name, layer in named.items()}
        elif is_xl:
            named = original_unet(named, component.config.layers_per_block)
        layers |= {f"lora_{prefixes[part]}_{name.replace('.', '_')}": layer for name, layer in named.items()}
    return layers


def merged(parts: Mapping[str, Any], base: Any) -> Any:
    """Compute a layer's weight with kohya's or LyCORIS's tensors on it, as ComfyUI and LyCORIS do."""
    weight, w = base.double(), {name: value.double() for name, value in parts.items()}
    if "lokr_w1" in w:
        w2 = w["lokr_w2"] if "lokr_w2" in w else w["lokr_w2_a"] @ w["lokr_w2_b"]
        scale = w["alpha"] / len(w["lokr_w2_b"]) if "lokr_w2_b" in w else 1
        w1 = w["lokr_w1"].reshape(*w["lokr_w1"].shape, *[1] * (w2.dim() - 2))
        return weight + torch.kron(w1, w2).reshape(weight.shape) * scale
    down, up = w["lora_down.weight"].flatten(1), w["lora_up.weight"].flatten(1)
    changed = weight + (w["alpha"] / len(down) * up @ down).reshape(weight.shape)
    if "dora_scale" in w:  # Liu et al. 2024: the norm is that of all inputs of an output.
        changed *= w["dora_scale"] / changed.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.dim() - 1))
    return changed


def by_layer(tensors: Json) -> dict[str, Json]:
    layers = trainer.grouped(tensors, lambda key: key.partition(".")[0])
    return {layer: {key.partition(".")[2]: tensors[key] for key in keys} for layer, keys in layers.items()}


def merge_by_formula(path: Path, pipeline: Any) -> None:
    layers = kohya_layers(pipeline.components)
    for name, parts in by_layer(tensors_of(path)).items():
        layers[name].weight.data = merged(parts, layers[name].weight.data).float()


def merge_by_lycoris(path: Path, pipeline: Any) -> None:
    lycoris: Any = pytest.importorskip("lycoris.modules")
    tensors, layers = tensors_of(path), kohya_layers(pipeline.components)
    for name in by_layer(tensors):
        algorithm, parts = lycoris.get_module(tensors, name)
        lycoris.make_module(algorithm, parts, name, layers[name]).merge_to(1.0)


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Prepare:
    """Return a function that trains an adapter on every layer, once for each base model and adapter."""
    pytest.importorskip("torch")
    images, models = map(request.getfixturevalue, ("images", "models"))

    @functools.cache
    def train_once(kind: str, adapter: str) -> trainer.LoRATrainer:
        folder = tmp_path_factory.mktemp("trained")
        changes: Json = {"lora_targets": "all", "lora_alpha": 3, "learning_rate": 3e-2, "steps": 3, **WITH_TEXT}
        return train(folder, small(images, models / kind, folder / "out", **changes | ADAPTERS[adapter]))

    return train_once


def write_as(made: trainer.LoRATrainer, **changes: Any) -> Path:
    """Write what was trained with other settings for the file."""
    config = dataclasses.replace(made.config, **changes)
    header = trainer.lora_header(config, made.source, made.prediction_type, {}, 3, "id")
    tensors = trainer.file_tensors(made.adapter.named(made.adapter.result()), config, made.source)
    safetensors.torch.save_file(tensors, made.folder.path / "lora.safetensors", header)
    return made.folder.path / "lora.safetensors"


def answer(component: Any) -> Any:
    """Run a UNet or a text encoder on fixed inputs."""
    if hasattr(component.config, "vocab_size"):
        return component(torch.arange(77)[None] + 5)[0]
    noisy = torch.randn(2, 4, 8, 8, generator=trainer.generator("noisy"))
    added = {"text_embeds": torch.ones(2, 32), "time_ids": torch.ones(2, 6)}
    context = torch.ones(2, 77, component.config.cross_attention_dim)
    return component(noisy, torch.tensor([7, 700]), context, added_cond_kwargs=added)[0]


@pytest.mark.parametrize("merge", [merge_by_formula, merge_by_lycoris])
@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("kind", ["sd15", "sd21", "sdxl"])
def test_merged_files_have_the_trained_effect(trained: Prepare, kind: str, adapter: str, merge: Any) -> None:
    made = trained(kind, adapter)
    plain, changed = load_pipeline(made), load_pipeline(made)
    merge(made.final_path, changed)
    encoders = {row.folder: encoder for row, _, encoder in made.data.encoder.parts} if made.data.encoder else {}
    with made.adapter.evaluating():
        for name, component in {"unet": made.unet, **encoders}.items():
            before, expected, after = map(answer, (getattr(plain, name), component, getattr(changed, name)))
            assert (after - expected).norm() < 1e-3 * (before - expected).norm() + 1e-5, name


@pytest.mark.parametrize(
    ("kind", "adapter", "rslora"),
    [("sd15", "dora", 0), ("sdxl", "lora", 1), ("sdxl", "lokr", 0), ("sd21", "lokr, rank 1", 0)],
)
def test_a_run_starts_from_a_file(prepared: Prepare, trained: Prepare, kind: str, adapter: str, rslora: int) -> None:
    first, scale = trained(kind, adapter), 3 / 2.5 / (1 + rslora)  # alpha / rank, or alpha / sqrt(rank), with rank 4
    before = first.adapter.named(first.adapter.weights)
    changes: Json = {"lora_targets": "all", "lora_alpha": 2.5, "use_rslora": bool(rslora)}
    changes |= WITH_TEXT | ADAPTERS[adapter]
    for style in ["kohya", *["diffusers"] * ("lokr" not in adapter)]:
        path = write_as(first, save_format=style)
        made = prepared(kind, init_lora_path=str(path), **changes)
        for key, weight in made.adapter.named(made.adapter.weights).items():
            factor = scale if key.endswith(("/lora_B", "/lokr_w1")) else 1
            torch.testing.assert_close(weight, before[key] * factor, atol=1e-6, rtol=1e-5)


Edit = Callable[[Json], Json]  # a change of a file's tensors


def scaled(part: str, factor: float) -> Edit:
    return lambda tensors: {key: value * (factor if part in key else 1) for key, value in tensors.items()}


MISFITS: list[tuple[str, Json, Edit]] = [
    (r"lora_down.weight has shape \[4, .+ see lora_rank", {"lora_rank": 8}, dict),
    ("it has no .+: lora_targets, lora_type and train_text_encoder must match", {"lora_type": "dora"}, dict),
    ("weights that do not train here, such as lora_unet_", {"lora_targets": "attention"}, dict),
    ("is not finite", {}, scaled("lora_up", math.nan)),
    ("or its alpha is not finite", {}, scaled("alpha", math.inf)),
]


@pytest.mark.parametrize(("message", "changes", "edit"), MISFITS)
def test_misfits_say_what_to_change(tmp_path: Path, trained: Prepare, message: str, changes: Json, edit: Edit) -> None:
    made, path = trained("sd15", "lora"), tmp_path / "start.safetensors"
    tensors = {key: value for key, value in tensors_of(made.final_path).items() if key.startswith("lora_unet_")}
    safetensors.torch.save_file(edit(tensors), path)
    config = dataclasses.replace(made.config, init_lora_path=str(path), **changes)
    unet = build_component("unet", tiny_config("sd15")["unet"])
    weights = trainer.add_adapter("unet", unet, config, trainer.TARGETS[config.lora_targets][0])
    with pytest.raises(trainer.TrainerError, match=message) as caught:
        trainer.initial_weights(weights, config, made.source)
    assert (caught.value.code, caught.value.problems[0]["path"]) == ("config_invalid", "init_lora_path")


@pytest.mark.parametrize(
    ("adapter", "changes", "alpha"),
    [
        ("lora", {"save_dtype": "fp16"}, 3),
        ("lora", {"save_dtype": "bf16", "use_rslora": True}, 6),
        ("dora", {"save_dtype": "fp16", "lora_alpha": 4 / 128}, 4 / 128),  # This is the scale of rank 128 with alpha 1.
        ("lokr", {"save_dtype": "fp16", "lora_alpha": 4 / 128}, 4),  # The scale is in lokr_w1.
        ("lokr, rank 1", {"save_dtype": "bf16"}, 1),
    ],
)
def test_16_bit_files_have_the_trained_scale(trained: Prepare, adapter: str, changes: Json, alpha: float) -> None:
    made = trained("sd15", adapter)
    path, config = write_as(made, **changes), dataclasses.replace(made.config, **changes)
    trainer.check_lora(path, made.adapter.named(made.adapter.result()), config, made.source)
    parts = {key.rpartition(".")[2]: value for key, value in tensors_of(path).items()}
    assert (parts["alpha"].tolist(), parts.pop("alpha").dtype) == (alpha, torch.float32)
    dtypes = {"fp16": torch.half, "bf16": torch.bfloat16}
    assert {value.dtype for value in parts.values()} == {dtypes[config.save_dtype]}


# The programs that read kohya's files, where they do so, and which adapters they read otherwise than they trained.
Reader = collections.namedtuple("Reader", ("source", "misread"))
FROZEN, PER_INPUT = {"dora": "held against the frozen weight's norm"}, {"dora": "one magnitude per input"}
READERS = {
    "ComfyUI": Reader("comfyanonymous: comfy/lora.py, comfy/weight_adapter/", FROZEN),
    "Forge": Reader("lllyasviel: backend/patcher/lora.py, packages_3rdparty/", FROZEN),
    "A1111": Reader("AUTOMATIC1111: extensions-builtin/Lora/network*.py", PER_INPUT),
    "InvokeAI": Reader("invokeai 6.14: backend/patches/", PER_INPUT),
    "LyCORIS": Reader("lycoris_lora 4.1: kohya.py, modules/", {}),
    "sd-scripts": Reader("kohya-ss: networks/lora.py", {"dora": "no magnitudes", "lokr": "nothing"}),
}
COUNTS = {"sd15": (192, 278, 72), "sd21": (192, 278, 138), "sdxl": (722, 788, 72 + 192)}  # UNet; text encoders


@pytest.mark.parametrize(("targets", "adapter"), [("transformer", "lora"), ("all", "dora"), ("all", "lokr")])
@pytest.mark.parametrize("name", COUNTS)
def test_full_size_files_have_the_layers_readers_know(name: str, targets: str, adapter: str) -> None:
    configs = {part: config for part, config in full_size_config(name).items() if part != "vae"}
    with torch.device("meta"):
        components = {part: build_component(part, config) for part, config in configs.items()}
    layers = kohya_layers(components, KOHYA_BLOCKS if targets == "all" else TRANSFORMER_BLOCKS)
    source, weights = memory.make_source(name), dict[str, Any]()
    config = memory.make_config(lora_type=adapter, lora_rank=2, lora_targets=targets, **WITH_TEXT)
    for part, pattern in trainer.trained_parts(config, source.family).items():
        weights |= trainer.add_adapter(part, components[part], config, pattern)
    zeros = {key: torch.zeros(weight.shape) for key, weight in weights.items()}
    found = by_layer(trainer.file_tensors(zeros, config, source))
    assert found.keys() == layers.keys()
    assert len(found) == COUNTS[name][targets == "all"] + COUNTS[name][2]
    for layer, parts in found.items():  # Sizes that do not fit raise an error.
        merged({part: value.to("meta") for part, value in parts.items()}, layers[layer].weight)


HEADER = """
modelspec. architecture author date hash_sha256 implementation prediction_type resolution sai_model_spec title
modelspec. trigger_phrase
ss_ base_model_version bucket_info clip_skip dataset_dirs epoch learning_rate loss_type lr_scheduler max_train_steps
ss_ min_snr_gamma network_alpha network_args network_dim network_module noise_offset num_reg_images num_train_images
ss_ optimizer output_name resolution sd_model_name seed steps tag_frequency text_encoder_lr total_batch_size
ss_ training_finished_at unet_lr v2 zero_terminal_snr
sshs_ legacy_hash model_hash
train_lora. params run_id save_dtype save_format trigger_words version
"""
SEEN_BY = {  # A1111 sees a family by the last two (extensions-builtin/Lora/network.py), Forge also by the first.
    "sd15": ("stable-diffusion-v1/lora", "sd_v1", "False"),
    "sd21": ("stable-diffusion-v2-512/lora", "sd_v2", "True"),
    "sd21v": ("stable-diffusion-v2-768-v/lora", "sd_v2_v", "True"),
    "sdxl": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_header_says_what_readers_need_and_nothing_private(prepared: Prepare, kind: str) -> None:
    token = "hf_" + "a1B2" * 9
    changes: Json = {"metadata": {"title": "Zorb", "author": f"me {token}"}, "trigger_words": ["zorb", f"x {token}"]}
    made = prepared(kind, steps=1, lora_rank=64, lora_targets="all", **changes)
    assert made.train()
    made.finish()
    data, header = made.final_path.read_bytes(), trainer.read_header(made.final_path)
    assert header.keys() == {prefix + key for prefix, *keys in map(str.split, HEADER.split("\n")[1:-1]) for key in keys}
    assert (header["modelspec.architecture"], header["ss_base_model_version"], header["ss_v2"]) == SEEN_BY[kind]
    assert (header["modelspec.title"], header["ss_network_dim"], header["ss_network_alpha"]) == ("Zorb", "64", "64")
    assert json.loads(header["ss_tag_frequency"])["dataset"]["zorb"] == 5
    private = (token, str(made.folder.path), made.config.base_model, made.config.dataset_path)
    assert not [text for text in private if text.encode() in data]
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert (header["sshs_model_hash"], header["modelspec.hash_sha256"]) == (digest, f"0x{digest}")
    assert header["sshs_legacy_hash"] == hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert len(data) > 0x110000 and made.has_final_files(1)


MISTAKES: dict[str, Edit] = {  # what a bug in the writer might do
    "alpha too large": scaled("alpha", 1.25),
    "zeros": scaled("lora_down", 0),
    "not finite": scaled("lora_up", math.nan),
    "exchanged": lambda tensors: dict(zip(tensors, [*tensors.values()][::-1], strict=True)),
    "a layer left out": lambda tensors: {key: value for key, value in tensors.items() if "mid_block" not in key},
    "another prefix": lambda tensors: {key.replace("lora_unet", "lora_net"): value for key, value in tensors.items()},
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_final_file_that_reads_back_otherwise_is_an_error_and_costs_nothing(prepared: Prepare, mistake: str) -> None:
    made, real = prepared(mixed_precision="bf16", learning_rate=1e-5, steps=2), trainer.file_tensors
    assert made.train()
    writer = mock.patch.object(trainer, "file_tensors", lambda *rest: MISTAKES[mistake](real(*rest)))
    with writer, pytest.raises(trainer.TrainerError, match="did not read back") as caught:
        made.finish()
    assert caught.value.code == "checkpoint_corrupt" and not [*made.folder.path.glob("*lora_*")]
    made.finish()
    assert made.final_path.exists()


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_run_starts_from_what_other_programs_write(
    tmp_path: Path, trained: Prepare, prepared: Prepare, kind: str
) -> None:
    made = trained(kind, "lora")
    weights = {
        key: value.detach().clone()
        for key, value in made.adapter.named(made.adapter.weights).items()
        if key.startswith("unet.")
    }
    scale = trainer.adapter_scale(made.config)
    config = dataclasses.replace(made.config, train_text_encoder=False)

    def name_peft(module: str, part: str) -> str:
        return f"base_model.model.{module.removeprefix('unet.')}.{part}.weight"

    def name_diffusers_old(module: str, part: str) -> str:
        return f"{module}.lora.{'down' if part == 'lora_A' else 'up'}.weight"

    def name_linear_layer(module: str, part: str) -> str:
        return f"{module}.lora_linear_layer.{'down' if part == 'lora_A' else 'up'}.weight"

    def name_kohya_blocks(module: str, part: str) -> str:
        layer = module.removeprefix("unet.").replace(".", "_")
        return f"lora_unet_{layer}.lora_{'down' if part == 'lora_A' else 'up'}.weight"

    rank = config.lora_rank
    for number, name in enumerate((name_peft, name_diffusers_old, name_linear_layer, name_kohya_blocks)):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = folder / ("adapter_model.safetensors" if name is name_peft else "lora.safetensors")
        file = {name(*key.split("/")): value.clone() for key, value in weights.items()}
        effect = 1.0  # of the file: alpha / rank, which is 1 where nothing says it
        if name is name_peft:
            write_json(folder / "adapter_config.json", {"r": rank, "lora_alpha": 3 * rank, "use_rslora": False})
            effect = 3.0
        elif name is name_kohya_blocks:
            file |= {f"{key.partition('.')[0]}.alpha": torch.tensor(rank / 2) for key in [*file]}
            effect = 0.5
        safetensors.torch.save_file(file, path)
        values = trainer.initial_weights(weights, dataclasses.replace(config, init_lora_path=str(path)), made.source)
        for key, value in values.items():
            factor = effect / scale if key.endswith("/lora_B") else 1.0
            torch.testing.assert_close(value, weights[key] * factor)


def test_a_check_refuses_a_file_to_start_from_as_the_run_does(tmp_path: Path, trained: Prepare, images: Path) -> None:
    made = trained("sd15", "lora")
    config = small(
        images, Path(made.config.base_model), tmp_path / "out", init_lora_path=str(made.final_path), lora_rank=8
    )
    with pytest.raises(trainer.TrainerError, match="see lora_rank") as caught:
        trainer.plan_run(load(tmp_path, config), Recorder(), download=False)
    assert caught.value.code == "config_invalid"


def test_a_dora_is_written_as_the_plain_lora_that_is_closest(prepared: Prepare) -> None:
    made = prepared("sd15", lora_type="dora", dora_as_lora_rank=6, steps=3, learning_rate=0.02)
    assert made.train()
    made.finish()
    weights = made.adapter.named(made.adapter.result())
    wide = dataclasses.replace(made.config, dora_as_lora_rank=100)
    (_, one, lack), (_, other, _) = (trainer.closest_lora(made.layers, weights, wide) for _ in range(2))
    assert {tensor.shape[0] for key, tensor in one.items() if key.endswith("lora_A")} == {100}
    assert lack.startswith("lacks 0.0%")
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert made.has_final_files(3)
    made.config = wide
    assert not made.has_final_files(3)
    made.config = made.plan.config
    plain, dora = tensors_of(made.as_lora_path), tensors_of(made.final_path)
    assert {key.partition(".")[0] for key in plain} == {key.partition(".")[0] for key in dora}
    remains = []
    for module, layer in made.layers.items():
        prefix = trainer.file_prefixes(module, made.source)[0]
        weight = layer.get_base_layer().weight.flatten(1).double()
        moved = weight + trainer.adapter_scale(made.config) * (
            dora[f"{prefix}.lora_up.weight"].flatten(1).double()
            @ dora[f"{prefix}.lora_down.weight"].flatten(1).double()
        )
        change = dora[f"{prefix}.dora_scale"].double().view(-1, 1) * moved / moved.norm(dim=1, keepdim=True) - weight
        best = torch.linalg.svdvals(change)[6:].norm()  # What no matrix of rank 6 can hold.
        up, down = (plain[f"{prefix}.lora_{part}.weight"].flatten(1).double() for part in ("up", "down"))
        left = (change - float(plain[f"{prefix}.alpha"]) / 6 * up @ down).norm()
        assert left <= 1.05 * best + 0.01 * change.norm()
        remains.append(float(left / change.norm()))
    (message,) = [event["message"] for event in emitted(made, "info") if "plain LoRA" in event["message"]]
    assert float(message.partition("lacks ")[2].partition("%")[0]) == pytest.approx(
        100 * sorted(remains)[len(remains) // 2], abs=1
    )


# ======================================================================================
# cache
# ======================================================================================


def encoded_counts(made: trainer.LoRATrainer) -> dict[str, int]:
    """Count the images and captions that were encoded."""
    events = [event for event in emitted(made, "info") if event["message"].startswith("Encoding") and "total" in event]
    return {event["message"].split()[1].rstrip("."): event["total"] for event in events}


def test_a_second_run_encodes_only_what_changed(tmp_path: Path, images: Path, models: Path, prepared: Prepare) -> None:
    folder, model = shutil.copytree(images, tmp_path / "images"), shutil.copytree(models / "sd15", tmp_path / "model")
    start = functools.partial(prepared, dataset_path=str(folder), base_model=str(model))
    cached = functools.partial(start, cache_dir=str(tmp_path / "cache"))
    first, second, in_memory = cached(random_flip=True), cached(random_flip=True), start(random_flip=True)
    assert encoded_counts(first) == encoded_counts(in_memory) == {"images": 10, "captions": 7}
    assert encoded_counts(second) == {}
    assert "10 of 10 images are in the cache already." in [event["message"] for event in emitted(second, "info")]
    for item, key in in_memory.data.keys.items():
        entry = second.data.cache[second.data.keys[item]]
        torch.testing.assert_close(entry, in_memory.data.cache[key], atol=0, rtol=0)
    whole = {path: trainer.tensor_bytes_hash(path.read_bytes()) for path in (tmp_path / "cache").glob("*/*")}
    for path, damage in zip(whole, (b"", b"junk", next(iter(whole)).read_bytes()[:-1]), strict=False):
        path.write_bytes(damage)
    assert sum(encoded_counts(cached(random_flip=True)).values()) == 3
    assert whole == {path: trainer.tensor_bytes_hash(path.read_bytes()) for path in whole}
    draw_image(folder / "3.png", (128, 128), 99)
    assert encoded_counts(cached()) == {"images": 1}
    (folder / "3.txt").write_text("another caption", "utf-8")
    assert encoded_counts(cached()) == {"captions": 1}
    assert encoded_counts(cached(resolution=96)) == {"images": 5}
    assert encoded_counts(cached(max_caption_tokens=150)) == {"captions": 7}
    weights = model / "vae/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + bytes([weights.read_bytes()[-1] ^ 1]))
    assert encoded_counts(cached()) == {"captions": 7, "images": 5}


def test_a_cache_too_large_for_memory_is_read_from_files(prepared: Prepare, monkeypatch: Patch) -> None:
    in_memory = prepared("sdxl")
    plan, keys = in_memory.plan, in_memory.data.keys
    texts = len(plan.captions) + len(plan.prompts)
    needed = trainer.cache_bytes(plan.config, plan.source, plan.sizes, texts)
    held = sum(tensor.nbytes for key in keys.values() for tensor in in_memory.data.cache[key].values())
    assert needed == pytest.approx(held, rel=0.05)
    monkeypatch.setattr(trainer, "available_memory_bytes", lambda: 2 * needed - 1)
    made = prepared("sdxl")
    folder = made.folder.path / "cache"
    assert made.plan.cache_folder == folder and len(list(folder.glob("*/*.safetensors"))) == len(keys)
    assert made.train() and in_memory.train()
    assert torch.equal(made.adapter.weights, in_memory.adapter.weights)
    shutil.rmtree(folder)
    with pytest.raises(trainer.TrainerError, match="is gone") as caught:
        made.data.embeddings([""])
    assert caught.value.code == "dataset_unreadable"


def test_a_gpu_encodes_whole_groups(tmp_path: Path, prepared: Prepare, monkeypatch: Patch) -> None:
    changes = {"aspect_ratio_bucketing": False, "max_caption_tokens": 150, "sample_prompts": [LONG]}
    start = functools.partial(prepared, "sdxl", **changes)
    alone = start()
    monkeypatch.setattr(trainer.EncodedDataset, "encoding_groups", lambda self, items, most: trainer.chunks(items, 3))
    grouped = start(cache_dir=str(tmp_path))
    for item, key in alone.data.keys.items():
        torch.testing.assert_close(grouped.data.cache[grouped.data.keys[item]], alone.data.cache[key], **IN_BF16)
    entries = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.glob("*/*.safetensors")}
    lost = next(path for path in entries if path.stem == grouped.data.keys[grouped.plan.variant(1)])
    lost.unlink()
    assert encoded_counts(start(cache_dir=str(tmp_path))) == {"images": 3}
    assert trainer.tensor_bytes_hash(lost.read_bytes()) == trainer.tensor_bytes_hash(entries.pop(lost)[1])
    assert {path: path.stat().st_mtime_ns for path in entries} == {path: then for path, (then, _) in entries.items()}


# ======================================================================================
# hardware and memory
# ======================================================================================

GIB = 1024**3


def pretend_hardware(monkeypatch: Patch, gpus: int = 0, apple: bool = False, bf16: bool = True) -> None:
    """Let torch see so many CUDA GPUs of 8 GiB with 5 free, or Apple's GPU with 8 GiB of which 1 is in use."""
    replaced: Json = {
        "cuda.is_available": lambda: gpus > 0,
        "cuda.device_count": lambda: gpus,
        "cuda.set_device": lambda _: None,
        "cuda.mem_get_info": lambda _: (5 * GIB, 8 * GIB),
        "cuda.get_device_name": lambda index: f"GPU {index}",
        "cuda.is_bf16_supported": lambda including_emulation: bf16,
        "backends.mps.is_available": lambda: apple,
        "mps.recommended_max_memory": lambda: 8 * GIB,
        "mps.driver_allocated_memory": lambda: GIB,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(f"torch.{name}", value)


@needs_torch
@pytest.mark.parametrize(
    ("gpus", "apple", "wish", "rank", "expected"),
    [
        (2, False, "auto", 0, ("cuda:0", 5.49)),  # With what CUDA takes at the first question.
        (2, True, "auto", 1, ("cuda:1", 5.49)),
        (2, False, "cuda", 1, ("cuda:1", 5.49)),
        (2, False, "cuda:1", 0, ("cuda:1", 5.49)),
        (0, True, "auto", 0, ("mps", 6.0)),  # Its memory is the main memory.
        (0, False, "auto", 0, ("cpu", 3.0)),  # Two processes share it.
        (2, True, "cpu", 1, ("cpu", 3.0)),
        (2, False, "cuda:2", 0, None),
        (2, False, "auto", 2, None),
        (0, True, "cuda", 0, None),
        (2, False, "mps", 0, None),
    ],
)
def test_the_best_device_is_chosen_or_the_named_one_which_must_be_there(
    monkeypatch: Patch, gpus: int, apple: bool, wish: str, rank: int, expected: tuple[str, float] | None
) -> None:
    pretend_hardware(monkeypatch, gpus, apple)
    monkeypatch.setattr(trainer, "available_memory_bytes", lambda: 6 * GIB)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    if expected:
        report = trainer.choose_device(wish, rank).report()
        assert (report["device"], report["free_gb"]) == expected
        return
    with pytest.raises(trainer.TrainerError, match=f"'{wish}' cannot be used") as caught:
        trainer.choose_device(wish, rank)
    assert caught.value.code == "device_unavailable"


@needs("psutil")
def test_a_containers_limit_bounds_the_free_memory(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(trainer, "Path", lambda _: tmp_path)
    unlimited = trainer.available_memory_bytes()
    for name, text in {"stat": "anon 70\nfile 30\n", "current": "100\n", "max": "1070\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text, "utf-8")
    assert (trainer.available_memory_bytes(), bool(unlimited and unlimited > 1000)) == (1000, True)
    (tmp_path / "memory.max").write_text("max\n", "utf-8")
    assert (trainer.available_memory_bytes() or 0) > 1000


@needs_torch
@pytest.mark.parametrize(("cuda", "reason"), [(None, "is a build without CUDA"), ("13.0", "or its driver")])
def test_a_gpu_that_torch_cannot_use_is_named(monkeypatch: Patch, cuda: str | None, reason: str) -> None:
    pretend_hardware(monkeypatch)
    monkeypatch.setattr(trainer, "has_nvidia_gpu", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(trainer.TrainerError, match=reason):
        trainer.choose_device("cuda")
    for wish, codes in {"auto": ["gpu_unusable", "training_on_cpu"], "cpu": []}.items():
        warnings = [*trainer.hardware_warnings(trainer.choose_device(wish), wish)]
        assert [code for code, *_ in warnings] == codes
        assert all(reason in message for code, message, _ in warnings if code == "gpu_unusable")


@needs_torch
@pytest.mark.parametrize(
    ("wish", "device", "bf16", "dtype"),
    [
        ("auto", "cuda:0", True, "bfloat16"),
        ("auto", "cuda:0", False, "float16"),
        ("auto", "cpu", True, "float32"),
        ("fp16", "cpu", True, "float16"),
        ("bf16", "cuda:0", False, "bfloat16"),
        ("no", "cuda:0", True, "float32"),
    ],
)
def test_the_dtype_fits_the_device(monkeypatch: Patch, wish: str, device: str, bf16: bool, dtype: str) -> None:
    pretend_hardware(monkeypatch, gpus=1, bf16=bf16)
    assert trainer.choose_dtype(wish, device)[0] == getattr(torch, dtype)


@pytest.mark.parametrize("family", [family.name for family in trainer.FAMILIES])
def test_full_size_models_have_the_expected_targets_and_sizes(family: str) -> None:
    modules, widths, unet = {  # for attention, transformer, all; the UNet's weights, and those of its linear layers
        "sd15": ((128, 192, 278), (199_296, 423_936, 1_050_816), (859_520_964, 270_049_280)),
        "sd21": ((128, 192, 278), (207_488, 432_128, 1_059_008), (865_910_724, 301_219_840)),
        "sdxl": ((560, 722, 788), (1_451_520, 2_659_840, 3_074_240), (2_567_463_684, 2_232_647_680)),
    }[family]
    source = memory.make_source(family)
    shapes = source.components["unet"].shapes
    assert source.weight_counts["unet"] == unet[0]
    for (targets, patterns), count, width in zip(trainer.TARGETS.items(), modules, widths, strict=True):
        assert sum(bool(re.fullmatch(patterns[0] + r"\.weight", name)) for name in shapes) == count
        config = memory.make_config(lora_targets=targets, lora_rank=3)
        assert trainer.count_lora_weights(config, source) == 3 * width
    nf4 = memory.make_config(quantize_base="nf4")
    saved = trainer.unet_bytes(memory.make_config(), source, 2) - trainer.unet_bytes(nf4, source, 2)
    assert saved == pytest.approx(unet[1] * (2 - 1 / 2 - 1 / 64 - 1 / 4096), abs=1)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_estimate_counts_a_runs_weights(tmp_path: Path, images: Path, models: Path, accumulation: int) -> None:
    config = small(images, models / "sdxl", tmp_path / "out", gradient_accumulation_steps=accumulation, ema_decay=0.9)
    made = prepare(tmp_path, config)
    terms, adapter = made.plan.memory, made.adapter
    frozen = [weight for weight in made.unet.parameters() if not weight.requires_grad]
    assert terms["weights"] == sum(weight.nbytes for weight in frozen)
    assert terms["lora"] == adapter.weights.nbytes
    assert terms["gradients"] == accumulation * adapter.gradient.nbytes
    assert (adapter.incoming is adapter.gradient) == (accumulation == 1)
    assert adapter.average is not None and terms["ema"] == adapter.average.nbytes
    assert terms["optimizer"] == 2 * adapter.weights.nbytes
    assert 0 < terms["activations"] < 100 * 2**20
    release(made.folder)


@pytest.mark.parametrize("gpu", [True, False])
@pytest.mark.parametrize("text", [True, False])
def test_the_terms_of_the_estimate_add_up(gpu: bool, text: bool) -> None:
    keys: Json = {"train_text_encoder": text, "sample_prompts": ("a zorb",)}
    config, source = memory.make_config(**keys), memory.make_source("sdxl")
    options: Json = {"half": True, "checkpointing": True, "gpu": gpu, "cached": 1000}
    terms = trainer.estimate_vram(config, source, 1024, 10**6, **options)
    resident = sum(terms[term] for term in ("weights", "lora", "gradients", "optimizer", "ema", "workspaces"))
    most = max(terms[term] for term in ("activations", "sampling", "finishing"))
    assert terms["training"] == resident + terms["activations"]
    assert terms["allocated"] == max(resident + most, terms["caching"] + terms["workspaces"])
    assert terms["total"] == terms["allocated"] + terms["overhead"]
    assert terms["overhead"] == int(terms["allocated"] * 0.05) + 500 * 2**20 + (0 if gpu else 1000)
    loading = 500 * 2**20 + 2 * source.weight_counts["unet"] + 1000
    assert terms["host"] == (loading if gpu else terms["total"])
    counts = source.weight_counts
    assert terms["weights"] == 2 * (counts["unet"] + text * (counts["text_encoder"] + counts["text_encoder_2"]))
    silent = memory.make_config(**keys, validation_steps=0)
    without = trainer.estimate_vram(silent, source, 1024, 10**6, **options)
    assert without["sampling"] == 0 < terms["sampling"]


@pytest.mark.parametrize(
    ("family", "checkpointing", "keys"),
    [("sd15", False, {}), ("sd21", True, {"lora_targets": "all", "lora_rank": 128})],
)
def test_the_estimate_of_activations_is_what_a_step_holds(family: str, checkpointing: bool, keys: Json) -> None:
    row = memory.setting(family, 512, checkpointing, **keys)
    assert row.estimate()["activations"] == pytest.approx(row.count(), rel=0.1)
    if not keys:
        with_text, alone = (
            memory.setting(family, 512, False, batch_size=4, train_text_encoder=on) for on in (True, False)
        )
        more = with_text.estimate()["activations"] - alone.estimate()["activations"]
        assert more == pytest.approx(with_text.count("text_encoder"), rel=0.1)


def test_the_memory_page_has_the_scripts_numbers_and_its_counts_bear_them_out() -> None:
    page = memory.DOCUMENT.read_text("utf-8")
    assert memory.fits_table() in page
    lines = re.search(r"<!-- counted -->\n.*\n.*\n((?:\|.*\n)+)", page)
    assert lines
    for row, line in zip(memory.COUNTED, lines[1].splitlines(), strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert (cells[:6], cells[7]) == (memory.row_name(row), memory.gib(row.estimate()["activations"]))
        deviation = float(cells[7]) / float(cells[6]) - 1
        assert abs(deviation) < 0.15 if cells[3].startswith("lora ") else -0.1 < deviation < 1


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("lora_type", ["lora", "dora", "lokr"])
@pytest.mark.parametrize("family", [family.name for family in trainer.FAMILIES])
def test_more_of_anything_never_needs_less_memory(family: str, lora_type: str, checkpointing: bool) -> None:
    def total(resolution: int = 768, half: bool = True, **keys: Any) -> int:
        row = memory.setting(family, resolution, checkpointing, half, lora_type=lora_type, **keys)
        return int(row.estimate()["total"])

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
        assert needed[-1] > needed[0] or key == "max_caption_tokens", key


def test_a_sample_is_decoded_in_tiles_if_that_would_take_more_than_training() -> None:
    source = memory.make_source("sdxl")
    options = {"half": True, "gpu": True, "decoding": True}
    room = trainer.vae_bytes(source, 1024**2, **options)
    pixels = [trainer.pixels_at_once(source, [1024**2], size, **options) for size in (room, room - 1)]
    assert pixels == [1024**2, 256**2]
    assert room > 2 * trainer.vae_bytes(source, 1024**2, **options | {"gpu": False}), "cuDNN's workspaces"


def test_images_are_encoded_in_groups_or_one_by_one_or_in_tiles_as_memory_allows() -> None:
    source, options = memory.make_source("sdxl"), {"half": True, "gpu": True, "decoding": False}
    choices = trainer.encoding_choices(512, gpu=True)
    assert (choices, trainer.encoding_choices(512, gpu=False)) == ([4 * 512**2, 512**2], [512**2, 512**2])
    for pixels in (*choices, 256**2):
        room = trainer.vae_bytes(source, pixels, **options)
        assert trainer.pixels_at_once(source, choices, room, **options) == pixels


def test_latents_made_in_tiles_are_nearly_those_of_the_whole_image(
    tmp_path: Path, prepared: Prepare, monkeypatch: Patch
) -> None:
    whole = prepared("sd15", cache_dir=str(tmp_path))
    monkeypatch.setattr(trainer, "pixels_at_once", lambda *_, **__: 256**2)
    monkeypatch.setattr(trainer, "TILE_SIDE", 32)
    monkeypatch.setattr(trainer.Plan, "resolution", 1024)
    tiled = prepared("sd15", cache_dir=str(tmp_path))
    mean, other = (cached_image(made, 3)["mean"].float() for made in (tiled, whole))
    assert mean.shape == other.shape and not torch.equal(mean, other), "the cache keeps them apart"


@pytest.mark.parametrize(
    ("wish", "need_gib", "free_gib", "expected"),
    [
        ("auto", 8, 7, True),
        ("auto", 6, 7, False),
        ("auto", 6.5, 7, True),
        (True, 0, 7, True),
        (False, 8, 7, False),
        ("auto", 8, None, False),
    ],
)
def test_checkpointing_is_on_if_a_run_would_not_fit(wish: Any, need_gib: float, free_gib: Any, expected: bool) -> None:
    gpu = trainer.Hardware("cuda:0", "GPU", "", 8 * GIB, free_gib and free_gib * GIB)
    assert trainer.choose_checkpointing(wish, int(need_gib * GIB), gpu)[0] is expected


ADVICE: dict[str, Json] = {  # what the hint says, in its order, and a change of the keys that follows it
    "gradient_checkpointing true": {},
    "batch_size 1 with gradient_accumulation_steps 8": {"batch_size": 1, "gradient_accumulation_steps": 8},
    'quantize_base "nf4"': {"quantize_base": "nf4"},
    'optimizer "adamw8bit"': {"optimizer": "adamw8bit"},
    "a smaller resolution": {"resolution": 768},
    "a smaller lora_rank": {"lora_rank": 16},
}
NEEDY: Json = {"batch_size": 4, "gradient_accumulation_steps": 2, "resolution": 1024, "lora_rank": 128}


@pytest.mark.parametrize(
    ("keys", "checkpointing", "gpu", "missing"),
    [
        ({}, False, True, ()),
        ({}, True, True, (0,)),
        ({"batch_size": 1}, False, True, (1,)),
        ({}, False, False, (2, 3)),
        ({"quantize_base": "nf4"}, False, True, (2,)),
        ({"lora_type": "lokr"}, False, True, (2,)),
        ({"optimizer": "adafactor"}, False, True, (3,)),
        ({"resolution": 256}, False, True, (4,)),
        ({"lora_rank": 4}, False, True, (5,)),
        ({"init_lora_path": "a.safetensors"}, False, True, (5,)),
    ],
)
def test_the_hint_lists_what_would_help(keys: Json, checkpointing: bool, gpu: bool, missing: tuple[int, ...]) -> None:
    hint = trainer.memory_hint(memory.make_config(**NEEDY | keys), checkpointing, gpu)
    advice = [text for number, text in enumerate(ADVICE) if number not in missing]
    assert hint == f"Set, in this order until it fits: {', '.join(advice)}."


def test_each_advice_saves_memory_and_a_run_that_nothing_helps_needs_another_device() -> None:
    def total(checkpointing: bool, resolution: int, **keys: Any) -> int:
        return int(memory.setting("sdxl", resolution, checkpointing, **keys).estimate()["total"])

    for advice, change in ADVICE.items():
        assert total("checkpointing" in advice, **NEEDY | change) < total(False, **NEEDY), advice
    least = memory.make_config(resolution=256, lora_rank=4)
    assert trainer.memory_hint(least, True, False) == "Use a device with more free memory."


def test_a_run_on_the_cpu_is_held_against_main_memory(tmp_path: Path, images: Path, models: Path) -> None:
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out", batch_size=4, device="cpu"))
    result = finish(started(config, "t.available_memory_bytes = lambda: 2**28", "--validate-only"))
    assert result.last["hardware"]["free_gb"] == 0.25
    assert result.last["memory"]["host_gb"] == result.last["memory"]["total_gb"]
    assert any("Gradient checkpointing: on" in event["message"] for event in result.of("info"))
    (warning,) = [event for event in result.of("warning") if event["code"] == "memory_short"]
    assert "0.25 GB are free (cpu)" in warning["message"]
    assert warning["hint"].startswith("Set, in this order until it fits: batch_size 1 with")


def test_a_micro_model_computes_on_one_thread_and_says_why(monkeypatch: Patch) -> None:
    set_threads = mock.Mock()
    monkeypatch.setattr(torch, "set_num_threads", set_threads)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert "1.5 million weights" in trainer.limit_threads(1_500_000, "cpu")
    assert trainer.limit_threads(860_000_000, "cpu") == trainer.limit_threads(1_500_000, "cuda:0") == ""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert trainer.limit_threads(1_500_000, "cpu") == ""
    set_threads.assert_called_once_with(1)


def accelerator_error(text: str = "CUDA error: an illegal memory access was encountered") -> Exception:
    """Return an error as torch raises it for CUDA; its class is in torch only since 2.8."""
    error: Exception = type("AcceleratorError", (RuntimeError,), {})(text)
    return error


def test_a_failure_of_the_gpu_has_a_code_and_passes_through_samples(prepared: Prepare, monkeypatch: Patch) -> None:
    failure = trainer.as_trainer_error(accelerator_error(), "training")
    assert (failure.code, "illegal memory access" in failure.message) == ("device_failed", True)
    assert trainer.as_trainer_error(accelerator_error("CUDA error: out of memory"), "").code == "out_of_memory"
    for text in (
        "CUBLAS_STATUS_ALLOC_FAILED",
        "CUBLAS_STATUS_NOT_INITIALIZED",
        "Unable to find a valid cuDNN algorithm",
    ):
        assert trainer.as_trainer_error(RuntimeError(text), "").code == "out_of_memory"
    made = prepared("sd15")
    monkeypatch.setattr(trainer.Sampler, "draw", mock.Mock(side_effect=accelerator_error()))
    with pytest.raises(RuntimeError, match="illegal memory"):
        made.sample(1, ["a"])
    with pytest.raises(RuntimeError, match="illegal memory"):
        trainer.compile_blocks(made.unet, mock.Mock(side_effect=accelerator_error()), made.events)


@needs_torch
def test_a_card_that_cannot_compute_is_named_before_the_run(
    tmp_path: Path, images: Path, models: Path, monkeypatch: Patch
) -> None:
    config = small(images, models / "sd15", tmp_path / "out")
    text = "CUDA error: no kernel image is available for execution on the device\nMore lines"
    monkeypatch.setattr(torch.nn.functional, "conv2d", mock.Mock(side_effect=accelerator_error(text)))
    for download in (False, True):
        with pytest.raises(trainer.TrainerError, match=r"cannot compute with torch .+: CUDA error") as caught:
            trainer.plan_run(load(tmp_path, config), Recorder(), download=download)
        assert caught.value.code == "device_unavailable" and "\n" not in caught.value.message


@needs_torch
def test_a_library_that_ends_its_process_does_not_end_the_run_without_a_word(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    gpu = trainer.Hardware("cuda:0", "RTX", "")
    config = parse(tmp_path, REQUIRED)
    eight_bits = dataclasses.replace(config, optimizer="adamw8bit")
    monkeypatch.setattr(trainer, "BITSANDBYTES_TRIAL", "import os; print('Error: no kernel', flush=True); os._exit(1)")
    trainer.try_bitsandbytes(config, gpu, "float16")
    trainer.try_bitsandbytes(eight_bits, dataclasses.replace(gpu, device="cpu"), "float16")
    with pytest.raises(trainer.TrainerError, match="bitsandbytes does not work on RTX") as caught:
        trainer.try_bitsandbytes(eight_bits, gpu, "float16")
    assert caught.value.code == "device_unavailable"
    monkeypatch.undo()
    code = trainer.BITSANDBYTES_TRIAL.format(dtype="bfloat16", device="cpu").replace("torch.cuda.synchronize()", "")
    if importlib.util.find_spec("bitsandbytes"):
        subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("wish", ["auto", False])
def test_a_first_step_that_does_not_fit_turns_checkpointing_on_if_it_may(
    prepared: Prepare, monkeypatch: Patch, wish: Any
) -> None:
    made, whole = (prepared("sd15", gradient_checkpointing=wish) for _ in range(2))
    predict, calls = trainer.LoRATrainer.predict, itertools.count()

    def out_of_memory_once(self: trainer.LoRATrainer, *arguments: Any) -> Any:
        if next(calls) == 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return predict(self, *arguments)

    assert whole.train()
    monkeypatch.setattr(trainer.LoRATrainer, "predict", out_of_memory_once)
    if not wish:
        with pytest.raises(torch.OutOfMemoryError):
            made.train()
        return
    assert made.train() and made.unet.is_gradient_checkpointing
    assert warning_codes(made).count("checkpointing_turned_on") == 1
    assert torch.equal(made.adapter.weights, whole.adapter.weights)


# ======================================================================================
# samples and report
# ======================================================================================


def test_a_stop_ends_a_sample_and_the_vae_leaves_the_device_also_when_it_fails(monkeypatch: Patch) -> None:
    source: Any = SimpleNamespace(scheduler=SCHEDULER | {"rescale_betas_zero_snr": False}, vae_factor=8, unet={})
    vae, predict, device = mock.Mock(), mock.Mock(side_effect=lambda latents, *_: latents), torch.device("cpu")
    monkeypatch.setattr(trainer, "decode_latents", mock.Mock(side_effect=MemoryError))
    parts = (lambda pixels: vae, device, predict, mock.Mock(), Recorder())
    sampler = trainer.Sampler(source, "epsilon", *parts, stop=Quiet(after=2))
    settings = trainer.SampleSettings("a", "", 64, 64, 1, 4, 3.0, 1.0)
    assert sampler.draw(settings, "Sampling.") is None
    assert ([int(call.args[1]) for call in predict.mock_calls], vae.mock_calls) == ([751, 501], [])
    sampler.stop = Quiet()
    with pytest.raises(MemoryError):
        sampler.draw(settings, "Sampling.")
    assert vae.to.call_args_list == [mock.call(device), mock.call("cpu")]


INFOTEXT = re.compile(r"(?:^|, )(\w[\w ]*): ([^,]*)")  # So A1111 splits the last line.


def test_each_sample_has_settings_of_its_own_which_other_programs_read_back(tiny: TinyRuns) -> None:
    own: Json = {"prompt": "a: b, c", "negative_prompt": "not\u20ac", "width": 136, "height": 72, "seed": 7}
    own |= {"steps": 2, "guidance_scale": 2.5, "lora_scale": 0.5}
    prompts: list[Any] = ["plain", own, {"prompt": "tall", "height": 128}]
    made = tiny.train(steps=1, validation_steps=1, sample_prompts=prompts, sample_negative_prompt="bad", kind="sdxl")
    events = emitted(made, "sample")
    keys = ("prompt", "index", "seed", "width", "height", "lora_scale")
    side = made.plan.resolution
    assert [tuple(event[key] for key in keys) for event in events] == [
        ("plain", 0, 42, side, side, 1.0),
        ("a: b, c", 1, 7, 136, 72, 0.5),
        ("tall", 2, 44, side, 128, 1.0),
    ]
    with Image.open(events[1]["image_path"]) as image:
        assert image.size == (136, 72)
        prompt, negative, line = image.text["parameters"].split("\n")
    assert (prompt, negative) == ("a: b, c", "Negative prompt: not\u20ac")
    settings = dict(INFOTEXT.findall(line))
    assert len(settings) >= 3, "A1111 takes a line with fewer for a part of the prompt"
    expected = {"Steps": "2", "Sampler": "DDIM", "CFG scale": "2.5", "Seed": "7", "Size": "136x72"}
    assert expected.items() <= settings.items()
    sheet = trainer.draw_grid({(event["index"], event["prompt"]): {1: Path(event["image_path"])} for event in events})
    middle = [sheet.getpixel((32 + 128, 32 + 320 * row + 32 + 128)) for row in range(3)]
    assert (255, 255, 255) not in middle, "each picture is in its cell"
    assert sheet.getpixel((32 + 128, 32 + 320 + 40)) == (255, 255, 255), "a wide one is not stretched"


@pytest.mark.parametrize("lora_type", ["lora", "dora", "lokr"])
def test_a_strength_scales_the_change_of_each_weight(tiny: TinyRuns, lora_type: str) -> None:
    made = tiny.set_up(lora_type=lora_type, lora_targets="all", optimizer="adamw", learning_rate=0.05, steps=2)
    made.train()
    layers = {name: layer for name, layer in made.layers.items() if "resnets" in name or "attn1.to_out" in name}
    with made.adapter.evaluating():
        for layer in layers.values():
            base = layer.get_base_layer()
            shape = (2, base.in_channels, 5, 5) if hasattr(base, "in_channels") else (2, 3, base.in_features)
            inputs = torch.randn(shape, generator=trainer.generator("inputs"))
            changed, frozen = layer(inputs), base(inputs)
            assert not torch.allclose(changed, frozen)
            for scale in (0, 0.5, 1, -1.5):
                with made.adapter.strength(scale):
                    torch.testing.assert_close(layer(inputs), frozen + scale * (changed - frozen))
        torch.testing.assert_close(layer(inputs), changed)


def test_a_cadence_in_epochs_is_one_in_steps_and_both_are_too_much(tmp_path: Path, tiny: TinyRuns) -> None:
    keys: Json = {"batch_size": 2, "gradient_accumulation_steps": 2, "epochs": 3, "steps": None, "repeats": 3}
    config = small(tiny.images, tiny.models / "sd15", tiny.output, **keys) | {"validation_epochs": 1}
    config |= {"checkpoint_epochs": 2}
    for key in ("validation_steps", "checkpoint_steps"):
        config.pop(key, None)
    plan = make_plan(tmp_path, config)
    steps = math.ceil(plan.batches_per_epoch / 2)
    assert (plan.config.validation_steps, plan.config.checkpoint_steps) == (steps, math.ceil(plan.batches_per_epoch))
    assert plan.memory["sampling"] > 0
    both = problems_of(tmp_path, REQUIRED | {"validation_epochs": 1, "training_params": {"validation_steps": 9}})
    assert both == {"validation_epochs": "cannot be combined with validation_steps: remove one of the two"}
    by_epochs, by_steps = ({f"checkpoint_{unit}": 9} for unit in ("epochs", "steps"))
    set_steps = parse(tmp_path, REQUIRED | by_epochs, ("checkpoint_steps=7",))
    assert (set_steps.checkpoint_steps, set_steps.checkpoint_epochs) == (7, None)
    assert parse(tmp_path, REQUIRED | by_steps, ("checkpoint_epochs=3",)).checkpoint_epochs == 3
    again = REQUIRED | {key: getattr(plan.config, key) for key in ("validation_steps", "validation_epochs")}
    assert parse(tmp_path, again).validation_steps == steps, "config.json can be used as a config"


def test_whole_numbers_in_objects_are_integers_as_they_are_at_the_top(tmp_path: Path) -> None:
    item = {"prompt": "a", "width": 64.0, "seed": 5.0, "guidance_scale": 2}
    concepts = [{"folder": "a", "trigger_words": ["x"], "repeats": 2.0, "loss_weight": 1}]
    config = parse(tmp_path, REQUIRED | {"sample_prompts": [item], "concepts": concepts})
    (settings,) = trainer.sample_settings(config.sample_prompts, config)
    values = (settings.width, settings.seed, settings.guidance_scale, config.concepts[0]["repeats"])
    assert values == (64, 5, 2.0, 2) and [type(value) for value in values] == [int, int, float, int]


def test_the_estimate_knows_the_largest_sample(tmp_path: Path, tiny: TinyRuns) -> None:
    def plan(**size: int) -> trainer.Plan:
        config = tiny.config(validation_steps=1, sample_prompts=["a", {"prompt": "b", **size}])
        return make_plan(tmp_path, config)

    small_one, large = plan(), plan(width=512, height=1024)
    assert large.memory["sampling"] > small_one.memory["sampling"]
    gpu = dataclasses.replace(large, hardware=trainer.Hardware("cuda:0", "x", "y"))
    assert gpu.vae_pixels([512 * 1024], "activations", decoding=True) == trainer.TILE_SIDE**2 < 512 * 1024


@needs("tensorboard")
def test_tensorboard_shows_what_the_events_say_also_after_a_resume(tmp_path: Path, images: Path, models: Path) -> None:
    config = small(images, models / "sd15", tmp_path / "out", train_text_encoder=True, report_to=["tensorboard"])
    config |= {"validation_split": 0.2, "validation_steps": 2, "steps": 6}
    events: list[Json] = []
    for stop in (Quiet(after=3), Quiet()):
        made = train(tmp_path, config, stop=stop)
        made.trackers.close()
        events += [*emitted(made, "progress"), *emitted(made, "validation")]
    library: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    board = library.EventAccumulator(str(tmp_path / "out/tensorboard"), purge_orphaned_data=False).Reload()
    for kind, name in (("progress", "loss"), ("progress", "grad_norm"), ("validation", "loss")):
        scalars = {scalar.step: scalar.value for scalar in board.Scalars(f"{kind}/{name}")}
        assert scalars == pytest.approx({e["step"]: e[name] for e in events if e["type"] == kind}, rel=1e-6)
    assert len(board.Scalars("progress/learning_rate/text_encoder")) == 6
    pictures = {image.step: Image.open(io.BytesIO(image.encoded_image_string)) for image in board.Images("samples/0")}
    assert [*pictures] == [2, 4, 6]
    assert pictures[6].tobytes() == Image.open(tmp_path / "out/samples/step_6_0.png").tobytes()


@needs("wandb")
def test_wandb_keeps_the_events(tmp_path: Path, images: Path, models: Path, monkeypatch: Patch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = small(images, models / "sd15", tmp_path / "out", report_to=["wandb"], validation_steps=4)
    result = run_copy("--config", write_config(tmp_path, **config))
    assert "tracking_failed" not in {event["code"] for event in result.of("warning")}
    logged_run = next((tmp_path / "out/wandb").glob("offline-run-*"))
    summary = next(logged_run.glob("run-*.wandb")).read_bytes()
    assert b"progress/loss_avg" in summary and b"learning_rate/unet" in summary
    assert str(tmp_path).encode() not in summary.replace(str(tmp_path / "out").encode(), b"")
    (picture,) = (logged_run / "files/media/images/samples").glob("*.png")
    assert Image.open(picture).tobytes() == Image.open(tmp_path / "out/samples/step_4_0.png").tobytes()


@needs_torch
def test_a_wandb_without_an_account_asks_nobody(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", cast("Any", SimpleNamespace(login=lambda *, prompt, verify: prompt)))
    trainer.Trackers(warn := mock.Mock()).open(["wandb"], tmp_path, "id", cast("Any", None), 0)
    warn.assert_called_once_with("tracking_failed", mock.ANY, mock.ANY)
    assert "WANDB_API_KEY" in warn.call_args.args[1]


@needs_torch
@pytest.mark.parametrize("failing", ["start", "log", "log_images", "finish"])
def test_a_tracker_that_fails_is_one_warning(tmp_path: Path, monkeypatch: Patch, failing: str) -> None:
    bad, good, warn = mock.Mock(**{f"{failing}.side_effect": ConnectionError("no network")}), mock.Mock(), mock.Mock()
    monkeypatch.setattr(trainer, "open_tracker", lambda name, *_: {"wandb": bad, "tensorboard": good}[name])
    draw_image(tmp_path / "sample.png", (64, 64))
    trackers = trainer.Trackers(warn)
    trackers.open(["wandb", "tensorboard"], tmp_path, "id", cast("Any", None), 0)
    for step in (1, 2):
        trackers.log("progress", {"step": step, "loss": 0.5, "learning_rates": {"unet": 1e-4}})
        trackers.log("sample", {"step": step, "index": 0, "image_path": tmp_path / "sample.png"})
    trackers.close()
    names = [name for name, *_ in good.method_calls]
    assert names == ["start", "log", "log_images", "log", "log_images", "finish"]
    assert [name for name, *_ in bad.method_calls] == names[: names.index(failing) + 1]
    warn.assert_called_once_with("tracking_failed", "wandb failed and is left out: no network", mock.ANY)


def event_line(event: Any) -> str:
    """Write an event in short: a text is the phase of an info event, an int the step of a progress event."""
    if isinstance(event, int):
        return json.dumps({"type": "progress", "step": event, "loss_avg": event / 10, "learning_rate": 1e-4})
    return json.dumps({"type": "start"} if event == "start" else {"type": "info", "message": "", "phase": event})


@pytest.mark.parametrize(
    ("then", "steps"),
    [
        ((), [1, 2, 3, 4]),
        (("start", "resuming", "training", 3, 5, "sampling", "training"), [1, 2, 3, 5]),
        (("start", "loading", "start", "training", 2), [2]),
        (("start", "training", 1, 2, 3, "start", "resuming", "training", 3), [1, 2, 3]),
        ((5, 6, 7), [1, 2, 3, 4, 5, 6]),
    ],
)
def test_the_attempts_in_a_log_are_read_as_one_run(tmp_path: Path, then: Any, steps: list[int]) -> None:
    lines = [*map(event_line, ("start", "loading", "training", 1, 2, 3, 4)), '{"type": "prog', *map(event_line, then)]
    (tmp_path / "events.jsonl").write_text("\n".join(lines) + "\n")
    history = trainer.read_history(tmp_path / "events.jsonl", 6)
    assert [*dict.fromkeys(event["step"] for event in history)] == steps


@pytest.mark.parametrize(("values", "labels"), [([0.0], "00"), ([0.1, None, 2], "20.1"), ([1] * 9999, "11"), ([], "")])
def test_a_chart_names_its_lowest_and_highest_value_and_stays_small(values: list[Any], labels: str) -> None:
    history = [{"type": "validation", "step": step, "loss": value} for step, value in enumerate(values)]
    figure = trainer.chart(history, "Loss", "validation", "loss")
    assert "".join(re.findall(r'<text x="-10"[^>]*>([^<]*)<', figure)) == labels
    points = re.findall(r"([\d.]+),([\d.]+)", figure.partition("/>")[0])
    assert len(points) < 2000 and all(float(x) <= 540 and float(y) <= 180 for x, y in points)


@needs_torch
def test_the_grid_has_a_row_per_prompt_and_a_column_per_step(tmp_path: Path) -> None:
    red, lime, blue, white = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)
    files = {step: tmp_path / f"{step}.png" for step in (0, 5, 10)}
    for path, colour in zip(files.values(), (red, lime, blue), strict=True):
        Image.new("RGB", (512, 512), colour).save(path)
    hostile = "a caf\u00e9 on \u5e02\u5834 \U0001f600\ud800\n hill"
    grid = trainer.draw_grid({(0, hostile): files, (1, "word " * 400): {0: files[0], 10: files[10]}})
    assert grid.size == (32 + 3 * 288, 32 + 2 * 320)
    middles = [[grid.getpixel((160 + 288 * column, 192 + 320 * row)) for column in range(3)] for row in range(2)]
    assert middles == [[red, lime, blue], [red, white, blue]]


def shown_samples(folder: Path) -> list[str]:
    """Return the samples on a run's page, as step_number; each is a file."""
    names = re.findall('<img src="samples/step_([^"]*).png"', (folder / "report.html").read_text("utf-8"))
    assert all((folder / f"samples/step_{name}.png").is_file() for name in names)
    return names


def test_the_page_follows_a_run(tmp_path: Path, images: Path, models: Path, monkeypatch: Patch) -> None:
    config = small(images, models / "sd15", tmp_path / "out", validation_steps=2, sample_prompts=["a", "b"])
    emit = Recorder.emit
    (tmp_path / "out").mkdir()

    def emit_and_log(self: Recorder, event_type: str, **fields: Any) -> None:
        emit(self, event_type, **fields)
        with (tmp_path / "out/events.jsonl").open("a") as file:
            file.write(json.dumps({"phase": self.phase} | self.events[-1]) + "\n")

    def samples_after(fresh: bool = False, **changes: Any) -> list[str]:
        Recorder().emit("start")
        assert "report_not_written" not in warning_codes(train(tmp_path, config | changes, fresh=fresh))
        return shown_samples(tmp_path / "out")

    monkeypatch.setattr(Recorder, "emit", emit_and_log)
    assert samples_after(steps=3, checkpoint_steps=2) == ["2_0", "3_0", "2_1", "3_1"]
    resumed = samples_after(steps=6, sample_prompts=["a", "other"])
    assert resumed == ["2_0", "3_0", "4_0", "6_0", "2_1", "3_1", "4_1", "6_1"]
    assert Image.open(tmp_path / "out/samples/grid.png").size == (32 + 4 * 288, 32 + 3 * 320)
    assert samples_after(fresh=True, validation_steps=3) == ["3_0", "4_0", "3_1", "4_1"], "also of the last step"
    assert samples_after(fresh=True, validation_steps=0) == []


def test_a_failed_run_says_so_on_its_page(tmp_path: Path, images: Path, models: Path) -> None:
    code = "def fail(self, *_):\n    raise RuntimeError('no luck <today>')\nt.LoRATrainer.finish = fail"
    config = write_config(tmp_path, **small(images, models / "sd15", tmp_path / "out"))
    assert finish(started(config, code)).code == 1
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert "<h1>lora: failed</h1>" in page and "no luck &lt;today&gt;" in page


def make_report(folder: Path, prompts: Sequence[str], steps: Sequence[int] = (2, 4)) -> trainer.Report:
    """Return a report on a run that never was; its samples are on disk and in events.jsonl."""
    (folder / "samples").mkdir(parents=True)
    lines = [*map(event_line, ("training", 1, 2))]
    for step, row in itertools.product(steps, range(len(prompts))):
        draw_image(folder / f"samples/step_{step}_{row}.png", (64, 64), row)
        lines.append(json.dumps({"type": "sample", "step": step, "index": row, "prompt": prompts[row]}))
    (folder / "events.jsonl").write_text("\n".join(lines) + "\n")
    config = dataclasses.make_dataclass("Config", ["output_name", "steps", "sample_prompts"])("lora", 99, prompts)
    source = SimpleNamespace(name="base")
    plan: Any = SimpleNamespace(
        config=config, source=source, hardware=None, dtype_name="float32", epoch=lambda step: step / 2
    )
    return trainer.Report(folder, Recorder(), plan)


@needs_torch
def test_nothing_on_a_page_is_markup_or_from_elsewhere(tmp_path: Path) -> None:
    hostile = ["</style><script>alert(1)</script>", "\"'><img src=x onerror=alert(2)> {x} $title &amp; \ud800"]
    report = make_report(tmp_path / "o'u\"t #1 %41?<b>", hostile)
    report.events.warning("code", hostile[0], hostile[1])
    report.write(trainer.TrainState(step=4, seconds=90), "interrupted", hostile[0])
    page = (report.folder / "report.html").read_text("utf-8")
    assert [html.unescape(page).count(text.replace("\ud800", "?")) for text in hostile] == [4, 3]
    tags = "html head meta title style body h1 h2 h3 p pre a img figure svg polyline text"
    assert {*re.findall(r"<(\w+)", page)} == {*tags.split()}
    links = [f"samples/step_{step}_{row}.png" for row in (0, 1) for step in (2, 4)]
    assert re.findall('(?:href|src)="([^"]*)"', page) == [link for link in links for _ in range(2)]
    assert "content=\"default-src 'none';img-src 'self' file:;style-src 'unsafe-inline'\"" in page
    assert "Step 4 of 99, or 2.0 passes over the dataset, after 1.5 minutes of training." in page


@needs_torch
def test_twelve_steps_and_no_lost_files_are_shown_and_the_grid_is_drawn_for_new_samples_only(tmp_path: Path) -> None:
    report = make_report(tmp_path, ["a"], range(1, 26))
    grid, state = tmp_path / "samples/grid.png", trainer.TrainState(step=24)
    report.write(state)
    even = [f"{step}_0" for step in (1, 3, 5, 7, 9, 11, 14, 16, 18, 20, 22, 24)]
    assert shown_samples(tmp_path) == even
    grid.unlink()
    report.write(state)
    assert not grid.exists()
    (tmp_path / "samples/step_9_0.png").unlink()
    report.write(state)
    assert shown_samples(tmp_path) == [name for name in even if name != "9_0"] and grid.exists()


@needs_torch
@pytest.mark.parametrize("hindered", ["report.html", "samples/grid.png"])
def test_a_report_that_cannot_be_written_is_one_warning_and_comes_later(tmp_path: Path, hindered: str) -> None:
    report, state = make_report(tmp_path, ["a"]), trainer.TrainState(step=4)
    (tmp_path / hindered).mkdir()
    report.write(state)
    report.write(state)
    assert [warning["code"] for warning in report.events.warnings] == ["report_not_written"]
    (tmp_path / hindered).rmdir()
    report.write(state)
    assert shown_samples(tmp_path) == ["2_0", "4_0"] and (tmp_path / "samples/grid.png").is_file()


# ======================================================================================
# checkpoints
# ======================================================================================


class TinyRuns:
    """Runs of tiny models in a test's own folder; what is not said is as in `small`. `stop` counts polls."""

    def __init__(self, folder: Path, images: Path, models: Path) -> None:
        self.folder, self.images, self.models, self.output = folder, images, models, folder / "out"
        self.checkpoints = self.output / "checkpoints"

    def config(self, kind: str = "sd15", output: str = "out", **changes: Any) -> Json:
        return dict(small(self.images, self.models / kind, self.folder / output, **changes))

    def start(self, start: Callable[..., Any], *, stop: float = math.inf, fresh: bool = False, **changes: Any) -> Any:
        return start(self.folder, self.config(**changes), stop=Quiet(after=stop), fresh=fresh)

    def set_up(self, **changes: Any) -> trainer.LoRATrainer:
        return cast(trainer.LoRATrainer, self.start(prepare, **changes))

    def train(self, **changes: Any) -> trainer.LoRATrainer:
        return cast(trainer.LoRATrainer, self.start(train, **changes))

    def refusal(self, start: Callable[..., Any] = prepare, **changes: Any) -> trainer.TrainerError:
        with pytest.raises(trainer.TrainerError) as caught:
            self.start(start, **changes)
        return caught.value


@pytest.fixture
def tiny(tmp_path: Path, request: pytest.FixtureRequest) -> TinyRuns:
    pytest.importorskip("torch")
    return TinyRuns(tmp_path, request.getfixturevalue("images"), request.getfixturevalue("models"))


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.stem: path.read_bytes() for path in sorted(folder.iterdir())}


def test_a_state_reads_back_bit_by_bit(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3, 4), "b": torch.tensor(7.0), "c": torch.randn(5).bfloat16()}
    path = tmp_path / "state.safetensors"
    path.write_bytes(trainer.encode_state(tensors, {"name": "x", "number": 0.1}))
    back, record = trainer.decode_state(path)
    assert record == {"name": "x", "number": 0.1}
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
    assert trainer.read_header(path).keys() == {"format", "record", "sha256"}


AUGMENTED: Json = {"caption_dropout": 0.3, "random_flip": True, "shuffle_tags": True, "max_caption_tokens": 150}
AUGMENTED |= {"repeats": 2, "masked_loss": True, "validation_split": 0.2, "validation_steps": 3, "cache_dir": "cache"}
AUGMENTED |= {"regularization_path": "prior", "prior_loss_weight": 0.5}
PRESERVED: Json = WITH_CLASS | {"regularization_target": "base", "unmasked_target": "base", "change_penalty": 0.01}
TEXT_RESTS: Json = {"train_text_encoder": True, "text_encoder_learning_rate": [1e-3, 1e-2], "text_encoder_stop": 0.5}
ACCUMULATED: Json = {"gradient_accumulation_steps": 2, "ema_decay": 0.8, "lr_scheduler": "cosine", "log_steps": 3}
RESUMED: list[tuple[str, Json, str]] = [  # (model, settings, package)
    ("sd15", ACCUMULATED | {"lora_dropout": 0.3, "lr_warmup_steps": 2, "validation_steps": 1}, "torch"),
    ("sd15", {"gradient_checkpointing": True, "mixed_precision": "bf16", "batch_size": 1}, "torch"),
    ("sd15", {"mixed_precision": "fp16"}, "torch"),
    ("sd15", AUGMENTED | PRESERVED, "torch"),
    ("sdxl", AUGMENTED, "torch"),
    ("sdxl", ACCUMULATED | TEXT_RESTS | {"mixed_precision": "bf16", "snr_gamma": 5}, "torch"),
    ("sd15", {"optimizer": "adamw8bit", "lora_type": "dora", "lora_rank": 64}, "bitsandbytes"),
    ("sd15", {"optimizer": "adafactor", "lora_type": "lokr", "validation_steps": 3}, "transformers"),
    ("sd15", {"optimizer": "prodigy", "train_text_encoder": True, "lora_dropout": 0.2}, "prodigyopt"),
    ("sd15", {"optimizer": "lion", "ema_decay": 0.8, "validation_steps": 3, "noise_offset": 0.1}, "lion_pytorch"),
    ("sd15", {"optimizer": "schedulefree_adamw", "lora_targets": "all", "validation_steps": 3}, "schedulefree"),
]
assert {changes.get("optimizer", "adamw") for _, changes, _ in RESUMED} == {*trainer.OPTIMIZERS}


@pytest.mark.parametrize(("kind", "changes", "package"), RESUMED)
def test_an_interrupted_run_ends_in_the_same_bits(tiny: TinyRuns, kind: str, changes: Json, package: str) -> None:
    pytest.importorskip(package)
    make_dataset(tiny.folder / "prior", [(64, 64)])
    whole = tiny.train(
        kind=kind, output="whole", steps=6, **changes | {"validation_steps": 0}
    )  # Samples change no bit.
    parts, moments = list[trainer.LoRATrainer](), random.Random(str(changes))
    for polls in (moments.randint(1, 3), moments.randint(1, 2), math.inf):
        torch.manual_seed(len(parts))  # What was drawn before must not matter.
        parts.append(tiny.train(kind=kind, steps=6, stop=polls, **changes))
    keys = ("step", "loss", "loss_avg", "learning_rates", "grad_norm", "epoch", "percent")
    progress = [[event[key] for key in keys] for part in parts for event in emitted(part, "progress")]
    assert progress == [[event[key] for key in keys] for event in emitted(whole, "progress")]
    assert_same_tensors(parts[-1].final_path, whole.final_path)
    paths = [made.checkpoints.state_path(6) for made in (parts[-1], whole)]
    assert_same_tensors(*paths)
    (_, record), (tensors, other) = map(trainer.decode_state, paths)
    assert all(record["adapter"][key] == other["adapter"][key] for key in ("optimizer", "scaler"))
    assert parts[-1].state == dataclasses.replace(whole.state, seconds=parts[-1].state.seconds)
    assert torch.equal(tensors["weights"], whole.adapter.weights)
    assert ("average" in tensors) == ("ema_decay" in changes)


def test_a_state_brings_neither_kernels_nor_a_loss_scaler_from_another_device(tiny: TinyRuns) -> None:
    tiny.train(stop=2)
    made = tiny.set_up()
    made.adapter.scaler, point = torch.amp.GradScaler("cpu", init_scale=4.0), made.find_point()
    made.adapter.optimizer.param_groups[0]["fused"] = False  # The state's is True, and it has no scaler.
    assert point
    made.restore(point)
    assert (made.adapter.optimizer.param_groups[0]["fused"], made.adapter.scaler.get_scale()) == (False, 4.0)


def test_a_damaged_state_falls_back_to_the_one_before_and_none_left_is_an_error(tiny: TinyRuns) -> None:
    keys: Json = {"steps": 8, "checkpoint_steps": 2, "checkpoint_limit": 1}
    tiny.train(stop=6, **keys)
    state = tiny.checkpoints / "state_step_4.safetensors"
    state.write_bytes(state.read_bytes()[:-7])
    (tiny.checkpoints / "state_step_9.safetensors").write_bytes(b"junk")
    resumed = tiny.train(stop=1, **keys)
    assert warning_codes(resumed).count("checkpoint_corrupt") == 2
    assert [event["step"] for event in emitted(resumed, "progress")] == [3]
    assert [*files_in(tiny.checkpoints)] == ["lora_step_3", "lora_step_4", "state_step_2", "state_step_3"]
    for path in tiny.checkpoints.glob("state_*"):
        path.write_bytes(b"junk")
    error = tiny.refusal(**keys)
    assert error.code == "checkpoint_corrupt" and "None of this run's states can be used" in error.message


@needs_torch
def test_a_state_in_an_older_format_is_refused_with_both_formats_and_a_hint(tmp_path: Path) -> None:
    path, warn = tmp_path / "state_step_4.safetensors", mock.Mock()
    path.write_bytes(trainer.encode_state({}, {}).replace(b"train_lora state 4", b"train_lora state 3"))
    with pytest.raises(trainer.TrainerError) as caught:
        trainer.find_resume_point([(4, path)], warn)
    assert (caught.value.code, "--fresh" in caught.value.hint) == ("checkpoint_corrupt", True)
    assert "it is a 'train_lora state 3' file, and this version reads 'train_lora state 4'" in warn.call_args.args[1]


@needs_torch
def test_a_state_that_may_not_be_read_is_not_called_corrupt(monkeypatch: Patch) -> None:
    forbidden = mock.Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr(Path, "read_bytes", forbidden)
    with pytest.raises(trainer.TrainerError, match="Permission denied") as caught:
        trainer.find_resume_point([(1, Path("state_step_1.safetensors"))], lambda *_: None)
    assert caught.value.code == "output_not_writable"


def check_damage(tiny: TinyRuns, step: int) -> int:
    """Flip every `step`-th bit of a state and cut it at every `step`-th byte: the one before it must then be used."""
    states, warnings = tiny.train(lora_rank=1, lora_targets="attention", checkpoint_steps=1).checkpoints.states(), []
    path, data = states[0][1], states[0][1].read_bytes()
    flips = ((bit // 8, 1 << bit % 8) for bit in range(0, len(data) * 8, step))
    flipped = (data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :] for place, bit in flips)
    for damaged in itertools.chain(flipped, (data[:length] for length in range(0, len(data), step))):
        path.write_bytes(damaged)
        point = trainer.find_resume_point(states, lambda code, *_: warnings.append(code))
        assert point and point.record.state.step == 3
    assert {*warnings} == {"checkpoint_corrupt"}
    return len(warnings)


def test_a_flipped_bit_or_a_cut_falls_back_to_the_older_state(tiny: TinyRuns) -> None:
    assert check_damage(tiny, step=499) > 500


def killed(work: Callable[[], Any], after_s: float = math.inf, profile: Any = None) -> bool:
    """Do `work` in a copy of this process, which has imported everything; tell whether it was killed."""
    if not (child := os.fork()):
        sys.setprofile(profile)
        with contextlib.suppress(BaseException):
            work()
            os._exit(0)
        os._exit(1)
    if after_s < math.inf:
        time.sleep(after_s)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def kill_in_save(made: trainer.LoRATrainer, number: int) -> bool:
    """Save in a copy of this process that is killed at its `number`-th system call for a file."""
    calls = itertools.count(1)

    def count(_: Any, event: str, called: Any) -> None:
        module = getattr(called, "__module__", None) or type(getattr(called, "__self__", None)).__module__
        if event == "c_call" and module in ("posix", "_io") and next(calls) == number:
            os.kill(os.getpid(), signal.SIGKILL)

    return killed(made.save, profile=count)


@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_kill_at_every_system_call_of_a_save_leaves_a_good_state_and_its_lora(tiny: TinyRuns) -> None:
    made = tiny.set_up(checkpoint_steps=1, checkpoint_limit=2, steps=3)
    before, newest = tiny.folder / "before", list[int]()
    assert made.train()
    made.state = dataclasses.replace(made.state, step=4)
    shutil.copytree(tiny.output, before)
    while kill_in_save(made, len(newest) + 1):
        point = trainer.find_resume_point(made.checkpoints.states(), lambda *warning: pytest.fail(str(warning)))
        assert point and len([tensors_of(path) for _, path in made.checkpoints.loras()]) >= 2
        newest.append(point.record.state.step)
        shutil.rmtree(tiny.output)
        shutil.copytree(before, tiny.output)
    assert newest == sorted(newest) and {*newest} == {3, 4}
    assert len(newest) > 30


def test_other_settings_do_not_resume_but_more_steps_and_other_cadences_do(tiny: TinyRuns) -> None:
    tiny.train(lora_alpha=4, checkpoint_steps=2)
    error = tiny.refusal(lora_alpha=4, lora_rank=8, seed=7)
    problems = {item["path"]: item["message"] for item in error.problems}
    changed = {"lora_rank": "was 4, is now 8", "seed": "was 42, is now 7"}
    assert (error.code, problems) == ("resume_mismatch", changed)
    longer = tiny.train(lora_alpha=4, steps=6, sample_prompts=["new"], log_steps=2)
    assert [event["step"] for event in emitted(longer, "progress")] == [6]
    assert_same_tensors(longer.final_path, tiny.train(lora_alpha=4, steps=6, output="straight").final_path)


def test_what_else_changed_since_the_last_attempt_is_a_warning(tiny: TinyRuns, monkeypatch: Patch) -> None:
    keys: Json = {"lr_scheduler": "cosine", "lr_warmup_steps": 1}
    tiny.train(stop=2, **keys)
    assert not {"resume_not_exact", "schedule_stretched"} & {*warning_codes(tiny.train(stop=1, **keys))}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    monkeypatch.setattr(diffusers, "__version__", "0.1")
    made = tiny.set_up(steps=9, **keys)
    warnings = {event["code"]: event["message"] for event in emitted(made, "warning")}
    assert "last attempt: diffusers, threads;" in warnings["resume_not_exact"]
    assert "planned for 4 steps and now has 9" in warnings["schedule_stretched"]


@pytest.mark.parametrize(
    ("moved", "change", "differs"),
    [
        (True, {}, ""),
        (False, {"weights": 1.5}, "base_model_changed"),
        (True, {"weights": 1.5}, "base_model"),
        (False, {"sample_size": 16}, "unet"),
        (False, {"beta_end": 0.02}, "scheduler"),
    ],
)
def test_a_base_may_move_but_no_other_takes_its_place(tiny: TinyRuns, moved: bool, change: Json, differs: str) -> None:
    model = Path(shutil.copytree(tiny.models / "sd15", tiny.folder / "model"))
    tiny.train(base_model=str(model), resolution=64, stop=2)
    model = model.rename(tiny.folder / "moved") if moved else model
    if "weights" in change:
        tensors = {key: tensor * change["weights"] for key, tensor in tensors_of(model / UNET).items()}
        safetensors.torch.save_file(tensors, model / UNET)
    elif change:
        path = next((model / differs).glob("*.json"))
        write_json(path, json.loads(path.read_text("utf-8")) | change)
    keys: Json = {"base_model": str(model), "resolution": 64}
    if differs in ("", "base_model_changed"):
        made = tiny.set_up(**keys)
        assert (made.state.step, "base_model_changed" in warning_codes(made)) == (2, bool(differs))
        return
    for error in (tiny.refusal(prepare, **keys), tiny.refusal(foresee, **keys)):
        assert (error.code, [item["path"] for item in error.problems]) == ("resume_mismatch", [differs])


def test_fresh_sets_the_checkpoints_aside_once_config_dataset_and_model_are_good(tiny: TinyRuns) -> None:
    first, aside = tiny.train(checkpoint_steps=2), tiny.output / "checkpoints.old"
    (tiny.checkpoints / "state_step_9.safetensors").write_bytes(b"junk")  # A broken state hinders no fresh start.
    before = files_in(tiny.checkpoints)
    write_json(aside / "older.safetensors", "an older run's")
    for broken in ({"lora_rank": 0}, {"dataset_path": "nowhere"}, {"base_model": "./nowhere"}):
        tiny.refusal(fresh=True, **broken)
    assert (files_in(tiny.checkpoints), [*files_in(aside)]) == (before, ["older"])
    fresh = tiny.train(fresh=True, lora_rank=2, checkpoint_steps=3)
    assert files_in(aside) == before
    assert [*files_in(tiny.checkpoints)] == ["lora_step_3", "state_step_3", "state_step_4"]
    assert trainer.read_header(fresh.final_path)["train_lora.run_id"] == fresh.run_id != first.run_id


@pytest.mark.parametrize("killed_in", ["add_adapter", ""])
def test_a_fresh_run_killed_early_goes_on(tiny: TinyRuns, monkeypatch: Patch, killed_in: str) -> None:
    first = tiny.train()
    with monkeypatch.context() as patch, contextlib.suppress(trainer.TrainerError):
        if killed_in:
            patch.setattr(trainer, killed_in, mock.Mock(side_effect=trainer.TrainerError("internal", "killed")))
        release(tiny.set_up(fresh=True).folder)
    again = tiny.set_up()
    assert (again.state.step, again.run_id) == (0, trainer.read_attempt(tiny.output / "config.json")[0])
    assert again.run_id != first.run_id, "the earlier run's final LoRA would pass for this run's"


def test_each_attempt_says_which_run_it_is(tiny: TinyRuns) -> None:
    facts, runs = [], list[str]()
    for keys in ({"stop": 2}, {}, {"steps": 6, "label": "job 17"}, {"fresh": True}):
        made = tiny.train(**keys)
        (event,) = emitted(made, "run")
        facts.append([event[key] for key in ("attempt", "resumed_from", "total_steps", "label")])
        assert event["run_id"] == made.run_id
        runs.append(made.run_id)
    assert facts == [[1, None, 4, None], [2, 2, 4, None], [3, 4, 6, "job 17"], [1, None, 4, None]]
    assert runs[0] == runs[1] == runs[2] != runs[3]
    files = (tiny.output / "config.json").read_bytes()
    made = tiny.start(make_trainer)
    assert made.setup() and emitted(made, "run")[0]["attempt"] == 2
    assert (tiny.output / "config.json").read_bytes() == files, "a finished run's files stay as they are"


def test_files_carry_their_size_and_hash(tiny: TinyRuns) -> None:
    made = tiny.train(checkpoint_steps=2)
    made.complete()
    (complete,) = emitted(made, "complete")
    pairs = [(complete["final_path"], complete["bytes"], complete["sha256"])]
    for event in emitted(made, "checkpoint"):
        pairs.append((event["state_path"], event["state_bytes"], event["state_sha256"]))
        pairs += [(event["path"], event["bytes"], event["sha256"])] if event["path"] else []
        assert event["path"] or (event["bytes"], event["sha256"]) == (None, None)
    assert len(pairs) == 5
    for path, size, digest in pairs:
        data = Path(path).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (size, digest), path


def test_a_lost_config_json_loses_no_run(tiny: TinyRuns) -> None:
    stopped = tiny.train(stop=2)
    (tiny.output / "config.json").write_text("{")
    again = tiny.train()
    assert again.run_id == stopped.run_id == trainer.read_attempt(tiny.output / "config.json")[0]
    assert len(emitted(again, "progress")) == 2


def test_a_finished_run_says_complete_at_once_and_mends_a_final_lora_that_is_not_as_wanted(tiny: TinyRuns) -> None:
    final = tiny.train().final_path
    content = final.read_bytes()

    def loads_the_unet(**changes: Any) -> bool:
        made: trainer.LoRATrainer = tiny.start(make_trainer, **changes)
        made.run()
        release(made.folder)
        assert [(event["step"], event["final_path"]) for event in emitted(made, "complete")] == [(4, str(final))]
        return "Loading the UNet." in [event["message"] for event in emitted(made, "info")]

    assert (loads_the_unet(), final.read_bytes()) == (False, content)
    final.write_bytes(content[:-1] + b"x")
    assert loads_the_unet()
    assert trainer.tensor_bytes_hash(final.read_bytes()) == trainer.tensor_bytes_hash(content)
    assert loads_the_unet(save_dtype="bf16", metadata={"title": "Zorb"})
    dtypes = {tensor.dtype for tensor in tensors_of(final).values()}
    assert trainer.read_header(final)["modelspec.title"] == "Zorb" and torch.bfloat16 in dtypes


def test_what_a_kill_prevented_at_the_resumed_step_is_made_then(tiny: TinyRuns) -> None:
    final = tiny.train(checkpoint_steps=2, validation_steps=2).final_path
    late = [final, tiny.checkpoints / "lora_step_4.safetensors", tiny.output / "samples/step_4_0.png"]
    trainer.remove(*late)
    tiny.train(checkpoint_steps=2, validation_steps=2)
    assert all(path.exists() for path in late)


def test_checkpoint_limit_keeps_the_newest_loras_and_two_states_are_kept_in_any_case(tiny: TinyRuns) -> None:
    tiny.train(checkpoint_steps=1, checkpoint_limit=1)
    assert [*files_in(tiny.checkpoints)] == ["lora_step_4", "state_step_3", "state_step_4"]


# ======================================================================================
# plan
# ======================================================================================


def foresee(folder: Path, config: Json, *, fresh: bool = False, **_: Any) -> list[str]:
    """Validate, and return what is said about a start."""
    events: Any = Recorder()
    trainer.check_run(load(folder, config), events, trainer.Group(), fresh)
    return [event["message"] for event in events.events if "A start" in event.get("message", "")]


def test_epochs_give_the_length_if_steps_do_not(tiny: TinyRuns) -> None:
    keys: Json = {"epochs": 3, "batch_size": 1, "gradient_accumulation_steps": 2}
    default = SCHEMA["definitions"]["steps"]["x-when-null"]
    for changes, steps in (({"steps": None}, 8), ({"steps": 7}, 7), ({"steps": None, "epochs": None}, default)):
        plan = make_plan(tiny.folder, tiny.config(**keys | changes))
        assert (plan.total_steps, plan.config.steps) == (steps, steps)
        assert plan.epoch(steps) == 2 * steps / 5


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("sd15", "zero_terminal_snr", True),
        ("sdxl", "clip_skip", 1),
        ("sd15", "text_encoder_learning_rate", [1e-5, 1e-4]),
    ],
)
def test_a_setting_that_cannot_work_with_the_model_is_named(tiny: TinyRuns, kind: str, key: str, value: Any) -> None:
    error = tiny.refusal(foresee, kind=kind, **{key: value})
    assert (error.code, [item["path"] for item in error.problems]) == ("config_invalid", [key])


def test_a_plan_that_does_not_fit_checkpoints_and_warns(tiny: TinyRuns, monkeypatch: Patch) -> None:
    monkeypatch.setattr(trainer, "available_memory_bytes", lambda: 2**24)
    keys: Json = {"batch_size": 8, "lr_warmup_steps": 9, "prediction_type": "v_prediction", "resolution": 512}
    config = load(tiny.folder, tiny.config(base_model=str(hollow_model(tiny.folder / "model")), **keys))
    source = trainer.locate_model(config, Recorder(), half=True, download=False)
    gpus = [trainer.Hardware("cuda:0", "GPU", "named", 2**35, free) for free in (20 * 2**30, 2**30)]
    roomy, tight = (trainer.decide(config, scan_quietly(config), source, gpu, "bfloat16") for gpu in gpus)
    assert (roomy.checkpointing, tight.checkpointing) == (False, True)
    assert 2**30 < tight.memory["total"] < roomy.memory["total"] < 20 * 2**30
    codes = [[code for code, *_ in trainer.plan_warnings(plan)] for plan in (roomy, tight)]
    assert [some.count("memory_short") for some in codes] == [1, 2]
    assert all({"warmup_too_long", "prediction_type_suspect"} < {*some} for some in codes)
    hints = [hint for code, _, hint in trainer.plan_warnings(tight) if code == "memory_short"]
    assert hints[0].startswith("Set, in this order") and hints[1] == "Close other programs."  # the GPU's, main memory


@pytest.mark.parametrize(
    ("files", "precision", "code"),
    [
        ({"tokenizer": "elsewhere"}, "no", "model_corrupt"),
        ({UNET: UNET.replace(".safe", "-00001-of-00002.safe")}, "no", "model_corrupt"),
        ({UNET: b"torn"}, "no", "model_corrupt"),
        ({UNET.replace(".safe", ".fp16.safe"): b"torn"}, "no", ""),  # It is not read.
        ({UNET.replace(".safe", ".fp16.safe"): b"torn"}, "bf16", "model_corrupt"),
    ],
)
def test_validation_and_training_give_the_same_answer(tiny: TinyRuns, files: Json, precision: str, code: str) -> None:
    model = Path(shutil.copytree(tiny.models / "sd15", tiny.folder / "model"))
    for name, change in files.items():
        (model / name).write_bytes(change) if isinstance(change, bytes) else (model / name).rename(model / change)
    keys: Json = {"base_model": str(model), "mixed_precision": precision, "device": "cpu"}
    for start in (foresee, prepare):
        with pytest.raises(trainer.TrainerError) if code else contextlib.nullcontext() as caught:
            tiny.start(start, **keys)
        assert not caught or caught.value.code == code


def test_cublas_hears_of_determinism_with_the_plan(tiny: TinyRuns, monkeypatch: Patch) -> None:
    monkeypatch.setattr(os, "environ", environment := {"OMP_NUM_THREADS": "1"})
    monkeypatch.setattr(torch, "use_deterministic_algorithms", mock.Mock())
    make_plan(tiny.folder, tiny.config(deterministic=True))
    assert environment["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_validation_says_from_where_a_start_would_go_on(tiny: TinyRuns) -> None:
    tiny.train(stop=1)
    assert tiny.start(foresee) == ["A start goes on from step 1 of 4."]
    error = tiny.refusal(foresee, lora_rank=8)
    assert (error.code, [item["path"] for item in error.problems]) == ("resume_mismatch", ["lora_rank", "lora_alpha"])
    assert tiny.start(foresee, lora_rank=8, fresh=True) == []


# ======================================================================================
# trainer
# ======================================================================================


def diffusers_errors(made: trainer.LoRATrainer, kind: Path, step: int) -> tuple[trainer.Batch, Any, Any]:
    """Return (the step's batch, each latent pixel's error [B, C, h, w] and sample's SNR [B] by diffusers' own code)."""
    config, (batch,) = made.config, made.data.collate(step)
    shape, key = batch.mean.shape, (config.seed, step, 0)

    def drawn(purpose: str, *size: int) -> Any:
        return torch.randn(size or shape, generator=trainer.generator(purpose, *key))

    noise = drawn("noise") + config.noise_offset * drawn("offset", *shape[:2], 1, 1)
    span, source = (config.min_timestep, config.max_timestep or 1000), trainer.generator("timesteps", *key)
    timesteps = torch.randint(*span, shape[:1], generator=source)
    zero, library = {"rescale_betas_zero_snr": config.zero_terminal_snr is True}, cast(Any, diffusers)
    scheduler = library.DDPMScheduler.from_pretrained(kind / "scheduler", **zero)
    unet = library.UNet2DConditionModel.from_pretrained(kind / "unet")
    latents, (context, added) = batch.mean + batch.std * drawn("posterior"), batch.conditions
    with torch.no_grad():
        noisy = scheduler.add_noise(latents, noise, timesteps)
        prediction = unet(noisy, timesteps, context, added_cond_kwargs=added).sample
    velocity = "v_prediction" in (config.prediction_type, scheduler.config.prediction_type)
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    alphas = scheduler.alphas_cumprod[timesteps]
    return batch, (prediction - target).double(), alphas / (1 - alphas)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        *((kind, {}) for kind in KINDS),
        ("sd15", {"snr_gamma": 2.0, "noise_offset": 0.1, "min_timestep": 300, "max_timestep": 900}),
        ("sd15", {"loss_type": "huber", "huber_c": 0.3}),
        ("sd21v", {"zero_terminal_snr": True, "min_timestep": 999}),
        ("sd21v", {"snr_gamma": 0.5, "noise_offset": 0.2}),
        ("sdxl", {"prediction_type": "v_prediction", "loss_type": "huber", "snr_gamma": 5, "zero_terminal_snr": True}),
    ],
)
def test_every_loss_equals_an_independent_computation(tiny: TinyRuns, kind: str, changes: Json) -> None:
    made = tiny.set_up(kind=kind, **changes)
    batch, errors, snr = diffusers_errors(made, tiny.models / kind, 0)
    c = changes.get("huber_c", 0.1)
    losses = 2 * c * ((errors**2 + c**2).sqrt() - c) if "loss_type" in changes else errors**2
    weights = snr.clamp(max=changes.get("snr_gamma", math.inf)) / (snr + (made.prediction_type == "v_prediction"))
    expected = (losses.mean(dim=(1, 2, 3)) * (weights if "snr_gamma" in changes else 1)).mean()
    assert made.loss(batch, 0, 0).item() == pytest.approx(float(expected), abs=1e-6)


def test_regularization_images_weigh_what_the_config_says_in_any_batch(tiny: TinyRuns) -> None:
    prior = make_dataset(tiny.folder / "prior", [(80, 64), (64, 80), (72, 64)])
    keys: Json = {"regularization_path": str(prior), "prior_loss_weight": 0.3, "batch_size": 3}
    made, mixes = tiny.set_up(aspect_ratio_bucketing=False, **keys), set()
    for step in range(4):
        batch, errors, _ = diffusers_errors(made, tiny.models / "sd15", step)
        roles = [made.plan.dataset.examples[index].role for index in made.data.batch_at(step)[1]]
        weights = torch.tensor([{"train": 1.0, "prior": 0.3}[role] for role in roles])
        expected = float((errors.square().mean(dim=(1, 2, 3)) * weights).mean())
        assert made.loss(batch, step, 0).item() == pytest.approx(expected, abs=1e-6)
        mixes.add(tuple(sorted(roles)))
    assert len(mixes) > 1


def test_a_mask_weighs_each_latent_pixel_and_turns_with_its_image(tiny: TinyRuns) -> None:
    folder = make_dataset(tiny.folder / "images", [(64, 64)] * 3)
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    half.paste(51, (32, 0, 64, 8))
    half.save(folder / "0-masklabel.png")
    shutil.copy(folder / "0-masklabel.png", folder / "1-masklabel.png")
    mask = torch.full((8, 8), 0.25)
    mask[:, :4], mask[0, 4:] = 1, 0.2 + 0.8 * 0.25
    keys: Json = {"masked_loss": True, "unmasked_weight": 0.25, "random_flip": True, "batch_size": 3}
    made = tiny.set_up(dataset_path=str(folder), **keys)
    assert "masks_missing" in warning_codes(made)  # Image 2 has none.
    for step in range(3):
        batch, errors, _ = diffusers_errors(made, tiny.models / "sd15", step)
        indices = made.data.batch_at(step)[1]
        mirrored = [trainer.draw_augmentation(made.config, step, place)[0] for place in range(3)]
        masks = [mask.flip(1) if turned else mask for turned in mirrored]
        masks = [torch.ones(8, 8) if index == 2 else one for index, one in zip(indices, masks, strict=True)]
        expected = torch.stack(masks)[:, None]
        torch.testing.assert_close(batch.mask, expected, atol=1e-7, rtol=0)
        assert made.loss(batch, step, 0).item() == pytest.approx(float((errors**2 * expected).mean()), abs=1e-6)


def peft_model(made: trainer.LoRATrainer, base: Path) -> Any:
    """Load a base UNet by diffusers, and put the trainer's LoRA on it by PEFT's own code."""
    unet = cast(Any, diffusers).UNet2DConditionModel.from_pretrained(base / "unet")
    peft: Any = importlib.import_module("peft")
    pattern = trainer.TARGETS[made.config.lora_targets][0]
    options: Json = {"r": 4, "lora_alpha": made.config.lora_alpha, "use_rslora": made.config.use_rslora}
    model = peft.get_peft_model(unet, peft.LoraConfig(target_modules=pattern, **options))
    weights = made.adapter.named(made.adapter.weights)
    for name, weight in model.named_parameters():
        if match := re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.default\.weight", name):
            weight.data = weights[f"unet.{match[1]}/{match[2]}"].clone()
    return model


def stir(made: trainer.LoRATrainer) -> None:
    """Give the LoRA weights as they are after a while."""
    made.adapter.weights.copy_(0.2 * torch.randn(made.adapter.weights.shape, generator=trainer.generator("stir")))
    made.adapter.refresh_modules(made.adapter.weights)


HELD: list[tuple[str, Json]] = [
    ("sd15", WITH_CLASS | {"regularization_target": "base", "prior_loss_weight": 0.3, "gradient_checkpointing": True}),
    ("sd21v", {"masked_loss": True, "unmasked_target": "base", "unmasked_weight": 0.25, "snr_gamma": 2.0}),
    ("sdxl", WITH_CLASS | {"loss_type": "huber", "masked_loss": True}),
]


@pytest.mark.parametrize(("kind", "changes"), HELD, ids=str)
def test_what_holds_a_lora_to_its_base_equals_a_computation_with_peft(tiny: TinyRuns, kind: str, changes: Json) -> None:
    """The base's predictions come from PEFT's disable_adapter, and masks and class captions are written by hand."""
    images = make_dataset(tiny.folder / "images", [(64, 64)] * 3)
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    half.save(images / "0-masklabel.png")
    prior = make_dataset(tiny.folder / "prior", [(72, 64), (64, 72), (72, 72)])
    keys: Json = {"dataset_path": str(images), "regularization_path": str(prior), "batch_size": 3, "resolution": 64}
    made = tiny.set_up(kind=kind, lora_targets="all", aspect_ratio_bucketing=False, **keys, **changes)
    stir(made)
    model, roles = peft_model(made, tiny.models / kind), set()
    huber_c = 0.1 if "loss_type" in changes else None
    for step in range(3):
        batch, key = made.data.collate(step)[0], (42, step, 0)
        shape, timesteps = (
            batch.mean.shape,
            torch.randint(0, 1000, (3,), generator=trainer.generator("timesteps", *key)),
        )
        drawn = {what: torch.randn(shape, generator=trainer.generator(what, *key)) for what in ("posterior", "noise")}
        latents = batch.mean + batch.std * drawn["posterior"]
        ids = (batch.conditions[1] or {"time_ids": torch.zeros(3, 6)})["time_ids"]
        noisy, target = trainer.diffuse(latents, drawn["noise"], made.alpha_bar, timesteps, made.prediction_type)
        total = torch.zeros(())
        for place, index in enumerate(made.data.batch_at(step)[1]):
            example = made.plan.dataset.examples[index]
            is_prior, masked = example.role == "prior", example.has_mask and "masked_loss" in changes
            roles.add(example.role)
            one, mask = slice(place, place + 1), torch.ones(8, 8)
            if masked:
                mask[:, 4:] = 0
            inputs: Any = noisy[one], timesteps[one], made.data.conditions([example.caption], ids[one])
            errors = torch.stack(compare(model, inputs, target[one], huber_c))
            outside = mask + (1 - mask) * changes.get("unmasked_weight", 0.0)
            of_base = (1 - mask) if changes.get("unmasked_target") == "base" else torch.zeros(8, 8)
            if is_prior and changes.get("regularization_target") == "base":
                outside, of_base = torch.zeros(8, 8), torch.ones(8, 8)
            loss = (errors[0] * outside + errors[1] * of_base).mean()
            if "class_words" in changes and not is_prior:
                text = example.caption.replace("zorb", "thing")
                inputs = *inputs[:2], made.data.conditions([text], ids[one])
                loss = loss + 0.5 * compare(model, inputs, target[one], huber_c)[1].mean()
            snr = made.alpha_bar[timesteps[one]] / (1 - made.alpha_bar[timesteps[one]])
            weight = float(snr.clamp(max=2) / (snr + 1)) if "snr_gamma" in changes else 1.0
            total = total + loss * weight * (changes.get("prior_loss_weight", 1.0) if is_prior else 1.0) / 3
        assert float(cast(Any, made.accumulate(step))) == pytest.approx(float(total.detach()), abs=1e-6)
        model.zero_grad()
        cast(Any, total).backward()
        named = {name.replace("base_model.model", "unet"): weight.grad for name, weight in model.named_parameters()}
        for name, gradient in made.adapter.named(made.adapter.gradient).items():
            right = named[name.replace("/", ".") + ".default.weight"]
            torch.testing.assert_close(gradient, right, rtol=2e-4, atol=1e-6)
    assert roles == {"train", "prior"}


def compare(model: Any, inputs: Any, target: Any, huber_c: float | None) -> tuple[Any, Any]:
    """Return each latent pixel's error against the target, and against the model without its adapter."""
    latents, timesteps, (context, added) = inputs
    with torch.no_grad(), model.disable_adapter():
        base = model(latents, timesteps, context, added_cond_kwargs=added).sample
    output = model(latents, timesteps, context, added_cond_kwargs=added).sample
    squares = [(output - wanted).square()[0].mean(0) for wanted in (target, base)]
    if huber_c is None:
        return squares[0], squares[1]
    pairs = [((output - wanted).square() + huber_c**2).sqrt() for wanted in (target, base)]
    first, second = ((2 * huber_c * (root - huber_c))[0].mean(0) for root in pairs)
    return first, second


def test_class_preservation_leaves_out_what_has_no_trigger_word(tiny: TinyRuns) -> None:
    images = fill(tiny.folder / "images", "anna/1.png", "2.png", "3.png")
    concepts = [{"folder": "anna", "trigger_words": ["zorb"], "class_words": "woman"}]
    keys: Json = {"dataset_path": str(images), "concepts": concepts, "class_preservation_weight": 0.5, "batch_size": 3}
    made = tiny.set_up(steps=1, **keys)
    plain, again = made.data.collate(0)
    (place,) = again.part
    assert made.plan.dataset.examples[made.data.batch_at(0)[1][place]].name == "anna/1.png"
    assert (plain.total, again.total, again.weights.tolist()) == (3, 3, [0.5])
    assert "woman" in made.plan.captions
    assert made.accumulate(0) is not None
    keys |= {"concepts": [], "class_words": "", "caption_dropout": 0.5}
    made = tiny.set_up(steps=9, output="dropped", **keys)
    batches = [made.data.collate(index) for index in range(9)]
    dropped = [trainer.draw_augmentation(made.config, index, place)[1] for index in range(9) for place in range(3)]
    # A picture whose caption was dropped has the text "" already.
    assert sum(len(batch.part) for _, *again in batches for batch in again) == dropped.count(False) < 27


@needs_torch
def test_what_checks_the_compiler_is_a_gradient_that_is_not_zero() -> None:
    gradient = torch.zeros(3)  # At the start it is zero where all targets are the base's.
    run: Any = SimpleNamespace(adapter=SimpleNamespace(gradient=gradient))
    run.accumulate = lambda step: gradient.fill_(max(0, step - 2))
    assert trainer.first_gradient(run).tolist() == [1, 1, 1]


@pytest.mark.parametrize("changes", [{"lora_targets": "all"}, {"train_text_encoder": True, "use_rslora": True}])
def test_the_change_penalty_is_the_size_of_the_full_matrices(tiny: TinyRuns, changes: Json) -> None:
    made = tiny.set_up(change_penalty=0.3, **changes)
    stir(made)
    layers = [layer for part in made.adapter.components for layer in part.modules() if hasattr(layer, "lora_A")]
    size = torch.stack([layer.get_delta_weight("default").square().sum() for layer in layers if layer.lora_A]).sum()
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(0.3 * size, made.adapter.modules)])
    made.adapter.gradient.zero_()
    made.adapter.add_change_penalty()
    torch.testing.assert_close(made.adapter.gradient, expected, rtol=1e-5, atol=1e-6)
    made.adapter.set_rates(1.0, text_rests=True)
    made.adapter.gradient.zero_()
    made.adapter.add_change_penalty()
    still = {name for name, part in made.adapter.named(made.adapter.gradient).items() if not part.any()}
    assert still == {name for name in made.adapter.names if name.startswith("text_encoder")}
    plain = tiny.train(output="plain", **changes)
    held = tiny.train(output="held", change_penalty=10.0, **changes)
    assert held.adapter.weights[: len(plain.adapter.weights)].norm() < plain.adapter.weights.norm()


def test_the_held_out_loss_is_the_same_each_time_and_equals_an_independent_one(tiny: TinyRuns) -> None:
    made = tiny.train(validation_split=0.4, validation_steps=2, sample_at_start=True, lora_dropout=0.5)
    reported = {event["step"]: event["loss"] for event in emitted(made, "validation")}
    examples = made.plan.dataset.examples
    held_out = [index for index, example in enumerate(examples) if example.role == "validation"]
    assert (list(reported), len(held_out)) == ([0, 2, 4], 2)
    assert not {index for step in range(20) for index in made.data.batch_at(step)[1]} & set(held_out)
    losses, library = [], cast(Any, diffusers)
    unet = library.UNet2DConditionModel.from_pretrained(tiny.models / "sd15/unet")
    scheduler = library.DDPMScheduler.from_pretrained(tiny.models / "sd15/scheduler")
    for index, timestep in itertools.product(held_out, (125, 375, 625, 875)):
        batch = made.data.batch({0: trainer.BatchItem(made.plan.variant(index), examples[index].caption)}, [0], 1)
        source = trainer.generator("validation", 42, index, timestep)
        noise, timesteps = torch.randn(batch.mean.shape, generator=source), torch.tensor([timestep])
        with torch.no_grad():
            noisy = scheduler.add_noise(batch.mean, noise, timesteps)
            losses.append(float((unet(noisy, timesteps, batch.conditions[0]).sample - noise).square().mean()))
    assert reported[0] == pytest.approx(sum(losses) / 8, abs=1e-6)
    made.validate(4)
    assert emitted(made, "validation")[-1]["loss"] == reported[4] != reported[2]


@pytest.fixture
def all_drift_prompts(monkeypatch: Patch) -> None:
    monkeypatch.setattr(trainer, "DRIFT_PROMPTS", ALL_DRIFT_PROMPTS)


@pytest.mark.parametrize(
    ("kind", "changes"), [("sd21v", {"zero_terminal_snr": True, "lora_targets": "all"}), ("sdxl", {"ema_decay": 0.5})]
)
@pytest.mark.usefixtures("all_drift_prompts")
def test_the_drift_is_how_far_the_unet_is_from_its_base(tiny: TinyRuns, kind: str, changes: Json) -> None:
    made = tiny.train(kind=kind, validation_steps=2, sample_at_start=True, **changes)
    reported = {event["step"]: (event["loss"], event["drift"]) for event in emitted(made, "validation")}
    assert (list(reported), reported[0]) == ([0, 2, 4], (None, 0.0))
    assert 0 < reported[2][1] != reported[4][1]
    made.adapter.weights.copy_(made.adapter.result())
    model, alpha_bar = peft_model(made, tiny.models / kind), made.alpha_bar.float()
    errors, sizes, side = [], [], made.plan.resolution // 8
    pairs = zip(trainer.DRIFT_PROMPTS[::2], trainer.DRIFT_PROMPTS[1::2], strict=True)
    for number, texts in enumerate(pairs):
        latents = torch.randn((2, 4, side, side), generator=trainer.generator("drift", number))
        ids = torch.tensor([[made.plan.resolution] * 2 + [0, 0] + [made.plan.resolution] * 2] * 2).float()
        context, added = made.data.conditions(texts, ids)
        for timestep in (999, 749, 499, 249):
            inputs: Any = latents, torch.tensor(timestep), context
            with torch.no_grad():
                output = model(*inputs, added_cond_kwargs=added).sample
                with model.disable_adapter():
                    base = model(*inputs, added_cond_kwargs=added).sample
            errors.append((output - base).square().sum())
            sizes.append(base.square().sum())
            # DDIM (Song et al. 2021, equation 12) without noise: from (x0, epsilon) to the next timestep.
            alpha, sigma = alpha_bar[timestep].sqrt(), (1 - alpha_bar[timestep]).sqrt()
            if made.prediction_type == "epsilon":
                clean, noise = (latents - sigma * base) / alpha, base
            else:
                clean, noise = alpha * latents - sigma * base, alpha * base + sigma * latents
            following = alpha_bar[timestep - 250] if timestep > 250 else alpha_bar[0]
            latents = following.sqrt() * clean + (1 - following).sqrt() * noise
    expected = (torch.stack(errors).sum() / torch.stack(sizes).sum()).sqrt()
    assert reported[4][1] == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.usefixtures("all_drift_prompts")
def test_a_drift_costs_less_than_a_sample_and_its_failure_is_a_warning(tiny: TinyRuns, monkeypatch: Patch) -> None:
    made, counted = tiny.set_up(validation_steps=2), list[int]()
    predict = made.sampler.predict

    def count(latents: Any, *rest: Any) -> Any:
        counted.append(len(latents))
        return predict(latents, *rest)

    made.sampler.predict = count
    made.validate(0)
    once = sum(counted)
    made.validate(0)
    assert sum(counted) - once == once / 2, "what the base predicts is found out once"
    assert once / 2 < 2 * DEFINITIONS["sample_steps"]["default"], "guidance takes two predictions a step"
    monkeypatch.setattr(trainer.Sampler, "drift", mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory.")))
    release(made.folder)
    failed = tiny.train(validation_steps=2)
    assert warning_codes(failed).count("validation_failed") == 2
    assert (len(emitted(failed, "progress")), len(emitted(failed, "sample"))) == (4, 2)


@pytest.mark.parametrize("polls", [16, 30])
@pytest.mark.usefixtures("all_drift_prompts")
def test_a_stop_while_the_drift_is_measured_leaves_no_half_of_it(tiny: TinyRuns, polls: int) -> None:
    made = tiny.set_up(validation_steps=2)
    made.stop = made.sampler.stop = Quiet(after=polls)
    made.validate(0)
    assert (emitted(made, "validation"), len(made.sampler.base_walk)) == ([], 16 * (polls > 16))


VALIDATED = [
    (100, 0.5, 0.1),
    (200, 0.4, None),
    (300, 0.403, 0.2),
    (400, None, 0.05),
    (500, 0.6, 0.4),
    (700, 0.604, None),
]


@pytest.mark.parametrize(
    ("kept", "step", "why"),
    [
        ((100, 200, 300, 400, 500), 300, "the 2 saved files with a held-out loss within 1 % of the lowest"),
        ((100, 200, 500), 200, "Of the saved files, it has the lowest held-out loss (0.4)."),
        ((500, 700), 500, "it has drifted least (0.6)."),
        ((400, 600), None, ""),
    ],
)
def test_the_recommended_file_has_the_lowest_loss_and_of_equals_the_least_drift(
    tmp_path: Path, kept: tuple[int, ...], step: int | None, why: str
) -> None:
    log, loras = tmp_path / "events.jsonl", {number: tmp_path / f"{number}.safetensors" for number in kept}
    assert trainer.recommend(log, 700, loras) is None
    rows = [{"type": "validation", "step": at, "loss": loss, "drift": drift} for at, loss, drift in VALIDATED]
    log.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    recommended = trainer.recommend(log, 700, loras)
    assert recommended == (step and recommended | {"step": step, "path": str(loras[step])} if recommended else None)
    assert (recommended is None) == (step is None) and why in (recommended or {"why": ""})["why"]
    log.write_text("{}\n", "utf-8")  # It is no event.
    assert trainer.recommend(log, 700, loras) is None


def gradient_of(made: trainer.LoRATrainer, step: int = 0) -> Any:
    made.accumulate(step)
    return made.adapter.gradient.clone()


def test_accumulating_equals_one_larger_batch(tiny: TinyRuns) -> None:
    made = tiny.set_up(gradient_accumulation_steps=2)
    total = made.accumulate(0)
    batches: Any = [batch for index in (0, 1) for batch in made.data.collate(index)]
    mean = torch.stack([made.loss(batch, 0, index) for index, batch in enumerate(batches)]).mean()
    assert total is not None and float(total) == pytest.approx(mean.item(), rel=1e-6)
    expected = torch.cat([part.flatten() for part in torch.autograd.grad(mean, made.adapter.modules)])
    torch.testing.assert_close(made.adapter.gradient, expected, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "other", "tolerance"),
    [
        ({"kind": "sdxl", "gradient_checkpointing": False}, {"gradient_checkpointing": True}, 1e-5),
        ({}, {"mixed_precision": "bf16"}, 0.03),
        ({"train_text_encoder": True}, {"mixed_precision": "bf16"}, 0.03),
        ({"lora_type": "dora"}, {"mixed_precision": "bf16"}, 0.03),
        ({"lora_type": "lokr"}, {"mixed_precision": "bf16"}, 0.03),
    ],
)
def test_checkpointing_and_bf16_keep_the_gradient(tiny: TinyRuns, changes: Json, other: Json, tolerance: float) -> None:
    gradients = []
    for output, keys in (("one", changes), ("other", changes | other)):
        made = tiny.set_up(output=output, batch_size=4, **keys)
        assert made.unet.is_gradient_checkpointing == keys.get("gradient_checkpointing", False)
        for weight in made.unet.parameters():  # Both compute with a base that is rounded alike.
            weight.data = weight if weight.requires_grad else weight.bfloat16().to(weight.dtype)
        gradients.append(gradient_of(made))
    assert float((gradients[1] - gradients[0]).norm() / gradients[0].norm()) < tolerance


def take_step(made: trainer.LoRATrainer, step: int) -> int:
    """Take a step of the run; return how many losses have been read."""
    made.clock = time.monotonic()
    loss = made.accumulate(step)
    assert loss is not None
    made.advance(step, loss, made.adapter.set_rates(1.0))
    return len(made.state.losses)


def test_losses_are_read_when_they_are_reported_which_changes_nothing_else(tiny: TinyRuns) -> None:
    seldom = tiny.set_up(steps=7, ema_decay=0.9, log_steps=3)
    assert [take_step(seldom, step) for step in range(7)] == [0, 0, 3, 3, 3, 6, 7]
    seldom.finish()
    often = tiny.train(output="often", steps=7, ema_decay=0.9)
    assert seldom.state.losses == often.state.losses
    assert_same_tensors(seldom.final_path, often.final_path)
    losses = [{event["step"]: event["loss"] for event in emitted(made, "progress")} for made in (seldom, often)]
    assert losses[0] == {step: losses[1][step] for step in (3, 6, 7)}
    assert all(view.any() for view in often.adapter.split(often.adapter.weights)), "half of them start at 0"


@pytest.mark.parametrize("log_steps", [1, 4])
def test_a_step_that_is_not_finite_changes_no_weight_and_names_its_images(tiny: TinyRuns, log_steps: int) -> None:
    made = tiny.set_up(ema_decay=0.5, log_steps=log_steps)
    indices = made.data.batch_at(1)[1]
    mean = cached_image(made, indices[0])["mean"]
    take_step(made, 0)
    before, mean[0, 0, 0] = made.adapter.weights.clone(), math.nan
    take_step(made, 1)
    assert torch.equal(made.adapter.weights, before)
    mean[0, 0, 0] = 0
    assert made.train()
    assert (made.state.step, made.state.bad_steps, len(made.state.losses)) == (4, 0, 3)
    (warning,) = (event for event in emitted(made, "warning") if event["code"] == "step_not_finite")
    names = ", ".join(made.plan.dataset.examples[index].name for index in indices)
    assert warning["message"].startswith("Step 2 ") and f"({names})" in warning["message"]


def test_divergence_ends_the_run_and_no_broken_lora_is_written(tiny: TinyRuns) -> None:
    made = tiny.set_up(steps=20, checkpoint_steps=2)
    take_step(made, 0)
    for index in range(5):
        cached_image(made, index)["mean"] *= math.inf
    with pytest.raises(trainer.TrainerError, match="6 steps in a row were not finite") as caught:
        made.train()
    assert (caught.value.code, made.state.step) == ("loss_not_finite", 7)
    for state, weight, message in ((made.state, math.nan, "finite"), (trainer.TrainState(2), 0, "nothing was trained")):
        made.state = state
        made.adapter.weights.fill_(weight)
        with pytest.raises(trainer.TrainerError, match=message):
            made.finish()
    assert not made.final_path.exists()


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_unet_computes_the_same_for_every_bucket(tiny: TinyRuns) -> None:
    plain, made = (tiny.set_up(output=f"{wish}", batch_size=1, compile=wish) for wish in (False, True))
    assert "compile_unavailable" not in warning_codes(made)
    by_size = {made.plan.sizes[made.data.batch_at(step)[1][0]]: step for step in range(6)}
    assert len(by_size) > 1
    for step in by_size.values():
        torch.testing.assert_close(gradient_of(made, step), gradient_of(plain, step), rtol=1e-3, atol=1e-6)


def test_without_a_compiler_a_run_warns_and_goes_on(tiny: TinyRuns, monkeypatch: Patch) -> None:
    failure = mock.Mock(side_effect=RuntimeError("Failed to find a C++ compiler\nand a stack trace"))
    monkeypatch.setattr(torch, "compile", failure)
    made = tiny.train(steps=1, compile=True)
    (warning,) = (event for event in emitted(made, "warning") if event["code"] == "compile_unavailable")
    assert warning["message"].endswith("nothing is compiled: RuntimeError: Failed to find a C++ compiler")
    assert made.final_path.exists()


def test_the_state_is_saved_between_checkpoints_once_minutes_have_passed(tiny: TinyRuns) -> None:
    made = tiny.train(autosave_minutes=1e-9, checkpoint_steps=3)
    saved = [(event["step"], event["path"] is not None) for event in emitted(made, "checkpoint")]
    assert saved == [(1, False), (2, False), (3, True), (4, False)]
    paths = {"path": made.checkpoints.lora_path(3), "state_path": made.checkpoints.state_path(4)}
    assert made.saved == {"step": 4} | {key: str(path) for key, path in paths.items()}
    assert tiny.set_up().saved == made.saved


def fail_writes(monkeypatch: Patch, failing: Callable[[str], bool]) -> None:
    """Let the disk be full where a file would get a name that is `failing`."""
    real = trainer.replace_file

    def replace(source: Path, target: Path) -> None:
        if failing(target.name):
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        real(source, target)

    monkeypatch.setattr(trainer, "replace_file", replace)


def test_a_failed_save_warns_and_two_in_a_row_end_the_run(tiny: TinyRuns, monkeypatch: Patch) -> None:
    made = tiny.set_up(steps=12, checkpoint_steps=2)
    fail_writes(monkeypatch, lambda _: made.state.step in (4, 8, 10))
    with pytest.raises(trainer.TrainerError) as caught:
        made.train()
    assert (caught.value.code, warning_codes(made).count("save_failed")) == ("disk_full", 2)
    assert [event["step"] for event in emitted(made, "checkpoint")] == [2, 6]
    assert [*files_in(tiny.checkpoints)] == ["lora_step_2", "lora_step_6", "state_step_2", "state_step_6"]


@pytest.mark.parametrize("name", ["lora_step", "final"])
def test_a_lora_that_cannot_be_written_comes_later(tiny: TinyRuns, monkeypatch: Patch, name: str) -> None:
    made = tiny.set_up(checkpoint_steps=2)
    fail_writes(monkeypatch, lambda target: name in target)
    with pytest.raises(trainer.TrainerError) as caught:
        made.train()
        made.finish()
    state_path = str(made.checkpoints.state_path(4))
    assert (caught.value.code, made.saved["state_path"]) == ("disk_full", state_path)
    assert (made.saved["path"] is None) == (name == "lora_step")
    release(made.folder)
    monkeypatch.undo()
    again = tiny.train(checkpoint_steps=2)
    assert not emitted(again, "progress") and again.final_path.exists() and again.checkpoints.lora_path(4).exists()


@pytest.mark.parametrize(
    ("phase", "name", "saved"),  # where memory runs out, in which function, and the step that is saved then
    [
        ("caching", "encode_images", 0),
        ("loading", "add_adapter", 0),
        ("resuming", "unpack", 2),
        ("training", "sample_error", 4),
        ("saving", "file_tensors", 6),
    ],
)
def test_out_of_memory_says_where_and_what_to_change_and_saves(
    tiny: TinyRuns, monkeypatch: Patch, phase: str, name: str, saved: int
) -> None:
    if phase == "resuming":
        tiny.train(steps=6, stop=2)
    made: trainer.LoRATrainer = tiny.start(make_trainer, steps=6)
    real, calls = getattr(trainer, name), itertools.count()

    def exhausted(*arguments: Any) -> Any:
        if phase == "training" and next(calls) < 4:
            return real(*arguments)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(trainer, name, exhausted)
    with pytest.raises(trainer.TrainerError, match=f"while {phase}") as caught:
        made.run()
    release(made.folder)
    assert (caught.value.code, made.saved["step"]) == ("out_of_memory", saved)
    assert "resolution 64, batch_size 2, lora_rank 4, gradient checkpointing off" in caught.value.message
    assert "batch_size 1" in caught.value.hint
    monkeypatch.undo()
    assert len(emitted(tiny.train(steps=6), "progress")) == 6 - saved


def test_a_sample_that_cannot_be_made_is_a_warning(tiny: TinyRuns, monkeypatch: Patch) -> None:
    exhausted = mock.Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory."))
    monkeypatch.setattr(trainer, "decode_latents", exhausted)
    made = tiny.train(validation_steps=2)
    assert warning_codes(made).count("sample_not_written") == 2
    assert len(emitted(made, "progress")) == 4


def test_a_disk_that_will_not_hold_the_run_is_a_warning(tiny: TinyRuns, monkeypatch: Patch) -> None:
    nearly_full = shutil.disk_usage(tiny.folder)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nearly_full)
    assert "disk_space_low" in warning_codes(tiny.set_up())


def test_an_exception_of_a_library_or_the_system_has_its_code_and_a_hint() -> None:
    texts = {
        "[enforce fail] DefaultCPUAllocator: can't allocate memory": "out_of_memory",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 64 bytes.": "out_of_memory",  # on Windows
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED": "out_of_memory",
    }
    errors: list[tuple[Exception, str]] = [(RuntimeError(text), code) for text, code in texts.items()]
    errors += [(OSError(number, ""), "disk_full") for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    errors += [(MemoryError(), "out_of_memory"), (KeyError("x"), "internal")]
    failures = [(trainer.as_trainer_error(error, "training"), code) for error, code in errors]
    assert [failure.code for failure, _ in failures] == [code for _, code in failures]
    assert all(failure.hint for failure, _ in failures)


# ======================================================================================
# command line
# ======================================================================================


def test_validation_reports_model_dataset_memory_and_hardware(tiny: TinyRuns) -> None:
    folder = Path(shutil.copytree(tiny.images, tiny.folder / "images"))
    (folder / "0.txt").write_text("ab " * 52)
    (folder / "4.png").write_text("no image")
    for name, mode in {"images/3_bird/a.png": "RGBA", "images/copy.png": "RGBA", "prior/a.png": "RGB"}.items():
        (tiny.folder / name).parent.mkdir(exist_ok=True)
        Image.new(mode, (64, 64), (9, 9, 9, 99)[: len(mode)]).save(tiny.folder / name)
    Image.new("L", (64, 64)).save(folder / "copy-masklabel.png")
    keys: Json = {"repeats": 2, "validation_split": 0.1, "masked_loss": True, "regularization_path": "prior"}
    keys |= {"dataset_path": "images"}
    result = run_copy("--config", write_config(tiny.folder, **tiny.config("sd21v", **keys)), "--validate-only")
    last, dataset = result.last, result.last["dataset"]
    assert (result.code, last["type"], last["valid"]) == (0, "validated", True)
    model = {"family": "sd21", "prediction_type": "v_prediction", "native_resolution": 96, "guessed": False}
    assert model.items() <= last["model"].items()
    buckets, suggestions, skipped = (dataset.pop(key) for key in ("buckets", "suggestions", "skipped"))
    assert [item["path"] for item in skipped] == ["4.png"] and "Remove the copies, or use repeats." in suggestions
    assert dataset == {
        "images": 6,
        "validation_images": 1,
        "regularization_images": 1,
        "masks": 2,
        "captions": {"sidecar": 4, "folder name": 1, "trigger words": 1},
        "concepts": {},
        "repeats": {"2": 5, "6": 1},
        "steps_per_epoch": sum(math.ceil(count / 2) for count in buckets.values()),
        "tokens": {"limit": 75, "longest": 109, "cut": ["0.png"], "prompts_cut": [], "common_trigger_words": []},
        "duplicates": [["3_bird/a.png", "copy.png"]],
    }
    assert last["hardware"]["device"] and last["memory"]["total_gb"] > 0 and last["config"]["resolution"] == 96
    assert [item["code"] for item in last["warnings"]] == [event["code"] for event in result.of("warning")]
    assert not tiny.output.exists()


def test_validation_lists_the_problems_of_dataset_model_and_folder_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    config = write_config(tmp_path, **small(tmp_path / "no", tmp_path / "nothing", tmp_path / "file/out"))
    result = run("--config", config, "--validate-only")
    assert result.code == 1
    codes = ["dataset_unreadable", "model_not_found", "output_not_writable"]
    assert [item["path"] for item in result.last["problems"]] == codes


def test_validation_works_without_torch_and_says_so_and_training_does_not(tmp_path: Path, images: Path) -> None:
    config = write_config(tmp_path, **small(images, hollow_model(tmp_path / "model"), tmp_path / "out"))
    result = finish(patched("sys.modules['torch'] = None", "--config", config, "--validate-only"))
    assert (result.code, result.last["type"]) == (0, "validated")
    assert (result.last["hardware"], result.last["dataset"]["tokens"]) == (None, None)
    assert next(event["code"] for event in result.of("warning")) == "torch_missing"
    trained = finish(patched("sys.modules['torch'] = None", "--config", config))
    assert (trained.code, trained.last["code"]) == (1, "dependency_missing")


DESCRIBED = json.loads((ROOT / "docs/describe.schema.json").read_text("utf-8"))


def describe(code: str) -> Json:
    done = subprocess.run(
        [sys.executable, "-c", PROLOGUE + code + EPILOGUE, "--describe"], capture_output=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    answer: Json = json.loads(line)
    type(EVENT_VALIDATOR)(DESCRIBED).validate(answer)
    return answer


def test_describe_says_what_the_installation_can_do_also_without_torch() -> None:
    missing = "found = t.importlib.metadata.distributions\nsys.modules['torch'] = None\n"
    missing += "t.importlib.metadata.distributions = lambda name: [] if name == 'torch' else found(name=name)\n"
    answer = describe(missing)
    assert (answer["devices"], answer["packages"]["torch"]) == (None, None)
    assert (answer["version"], answer["protocol"]) == (trainer.VERSION, trainer.PROTOCOL)
    assert (answer["config_schema"], answer["events_schema"]) == (SCHEMA, EVENT_SCHEMA)
    assert {code: row["hint"] for code, row in answer["errors"].items()} == trainer.HINTS
    never = {code for code, row in answer["errors"].items() if row["retry"] == "never"}
    assert (never, answer["errors"]["output_in_use"]["retry"]) == ({"internal"}, "same")
    assert {*answer["families"]} == {*SCHEMA["definitions"]["model_type"]["enum"]} - {"auto"}
    assert answer["packages"]["pillow"] == importlib.metadata.version("pillow")


@needs_torch
def test_describe_tries_each_device_and_lets_no_library_write_before_its_answer() -> None:
    noisy = "import torch\nones = torch.ones\ndef loud(*sizes, device):\n    print('loud'); os.write(1, b'x')\n"
    noisy += (
        "    if device == 'cpu': raise RuntimeError('no kernel\\nimage')\n    return ones(*sizes)\ntorch.ones = loud\n"
    )
    (cpu,) = [row for row in describe(noisy)["devices"] if row["device"] == "cpu"]
    assert cpu["fault"] == "no kernel"
    (cpu,) = [row for row in describe("")["devices"] if row["device"] == "cpu"]
    assert (cpu["fault"], cpu["bf16"]) == (None, True)
    (broken,) = describe("sys.modules['torch'] = None\n")["devices"]
    assert "torch" in broken["fault"]


def test_an_internal_error_is_one_event_and_a_traceback_only_with_debug(tmp_path: Path, images: Path) -> None:
    config = write_config(tmp_path, **small(images, hollow_model(tmp_path / "model"), tmp_path / "out"))
    for options in ((), ("--debug",)):
        result = finish(patched("t.import_libraries = lambda _: {}['bug']", "--config", config, *options))
        assert (result.code, result.last["code"]) == (1, "internal")
        assert ("Traceback" in result.stderr) == bool(options)


# ======================================================================================
# README, docs and the demo
# ======================================================================================

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks/RESULTS.md"]
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text("utf-8") for page in PAGES}
README = TEXTS["README.md"]
FIRST_LORA = "## Your first LoRA"

# The demo takes longest. It stands here, not at the end, so that another process has other tests for that time.


@needs_torch
def test_the_demo_teaches_its_concept_and_old_prompts_stay(tmp_path: Path) -> None:
    """Run the README's first command for half of its steps, and measure its LoRA by benchmarks/quality.py."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # Threads that share a core wait for each other.
    arguments = command("--config", ROOT / "demo/config.json", "--set", f"output_path={tmp_path}", "--set", "steps=200")
    done = subprocess.run(arguments, capture_output=True, env=environment, timeout=LIMIT_S)
    result = Run(done.returncode, done.stdout, done.stderr)
    assert (result.code, result.last["type"]) == (0, "complete")
    assert [event["step"] for event in result.of("sample") if event["index"] == 0] == [0, 200]
    measure = [sys.executable, str(ROOT / "benchmarks/quality.py"), "lora", result.last["final_path"]]
    measure += ["--samples", "4", "--steps", "10"]
    done = subprocess.run(measure, capture_output=True, env=environment, timeout=LIMIT_S, check=True)
    gains = {
        prompt: measured["after"]["closeness"] - measured["before"]["closeness"]
        for prompt, measured in json.loads(done.stdout)["prompts"].items()
    }
    assert min(gains["a red zorb"], gains["a blue zorb"]) > 0.1
    assert min(gains["a red circle"], gains["a blue square"]) > -0.2


def section(text: str, heading: str) -> str:
    """Return the text under a heading, up to the next heading of its level."""
    level = heading.partition(" ")[0]
    match = re.search(rf"^{re.escape(heading)}\n(.*?)(?=^{level} |\Z)", text, re.MULTILINE | re.DOTALL)
    assert match, heading
    return match[1]


def first_column(page: str, heading: str) -> list[str]:
    """Return the names in backticks that the rows of a section's tables start with."""
    return re.findall(r"^\| `(\w+)` \|", section(TEXTS[page], heading), re.MULTILINE)


def prose(text: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(text: str, level: str = "##") -> list[str]:
    return re.findall(rf"^{level} (.+)$", prose(text), re.MULTILINE)


def test_the_readme_has_its_headings_stays_short_and_links_every_page() -> None:
    first = ["Your first LoRA", "Features", "Installation", "Configuration", "Usage"]
    assert headings(README) == [*first, "Output", "Events", "Docker", "Documentation"]
    assert len(README.splitlines()) <= 350
    assert all(f"]({name})" in section(README, "## Documentation") for name in TEXTS if name != "README.md")
    steps = headings(section(README, FIRST_LORA), "###")
    assert [step.partition(".")[0] for step in steps] == list("12345678")


def test_the_docs_say_which_programs_draw_a_dora_differently() -> None:
    text = " ".join(TEXTS["docs/output.md"].split())
    match = re.search(r"LyCORIS\. (.+) draw slightly different pictures\. (.+?) draw wrong pictures", text)
    assert match
    for name, reader in READERS.items():
        assert (name in match[1], name in match[2]) == (reader.misread == FROZEN, reader.misread == PER_INPUT)


def test_every_error_code_and_every_event_has_one_entry() -> None:
    source = SCRIPT.read_text("utf-8")
    codes = list(trainer.HINTS)
    assert {*re.findall(r'TrainerError\(\s*"(\w+)"', source)} <= {*codes}
    assert codes == EVENT_SCHEMA["definitions"]["error"]["properties"]["code"]["enum"]
    assert codes == headings(section(TEXTS["docs/troubleshooting.md"], "## By error code"), "###")
    types = EVENT_SCHEMA["properties"]["type"]["enum"]
    assert {*types} == {*re.findall(r'\b(?:emit|emit_and_track)\(\s*"(\w+)"', source)}
    assert types == headings(section(TEXTS["docs/events.md"], "## Types"), "###")
    terms = EVENT_SCHEMA["definitions"]["validated"]["properties"]["memory"]["properties"]
    assert {f"{term}_gb" for term in first_column("docs/vram.md", "## Terms")} == {*terms}


def codes_in(node: ast.AST) -> list[Any]:
    """Return the warning codes in a part of the script: those that are emitted, and those of a `..._warnings`."""
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] in (
        "warning",
        "warn",
        "_warn",
        "tolerated",
    ):
        return [first.value for first in node.args[:1] if isinstance(first, ast.Constant)]
    if not isinstance(node, ast.FunctionDef) or not node.name.endswith("warnings"):
        return []
    items = [item for part in ast.walk(node) if isinstance(part, ast.Tuple) for item in part.elts[:-1]]
    texts = [str(item.value) for item in items if isinstance(item, ast.Constant)]
    return [text for text in texts if re.fullmatch("[a-z]+(_[a-z]+)+", text)]


def test_every_warning_code_has_one_entry() -> None:
    tree = ast.parse(SCRIPT.read_text("utf-8"))
    codes = {*trainer.DATASET_HINTS, *itertools.chain.from_iterable(map(codes_in, ast.walk(tree)))}
    dataset = first_column("docs/datasets.md", "## Warnings")
    assert sorted([*first_column("docs/events.md", "## Warning codes"), *dataset]) == sorted(codes)
    assert EVENT_SCHEMA["definitions"]["warning"]["properties"]["code"]["examples"] == sorted(codes)
    assert set(trainer.DATASET_HINTS) <= {*dataset}


# What follows from the two schemas; `python test_trainer.py --write` writes it.

COMMON_FIELDS = ("type", "seq", "timestamp", "elapsed", "dropped")


def event_types(events: Json) -> list[str]:
    return [name for name, row in events["definitions"].items() if "const" in row.get("properties", {}).get("type", {})]


def tables(keys: Json, events: Json) -> dict[str, list[str]]:
    """Return the rows of the generated tables, by the mark above each."""
    shared = events["definitions"]
    types = {name: shared[name]["properties"] for name in event_types(events)}
    parts = {name: types["validated"][name]["properties"] for name in ("model", "hardware", "dataset")}
    parts["tokens"] = parts["dataset"]["tokens"]["properties"]
    for name, fields in types.items():
        parts[name] = {key: value for key, value in fields.items() if key not in COMMON_FIELDS}
    parts["common"] = {key: shared[key] for key in COMMON_FIELDS[1:]}
    rows = {}
    for name, fields in parts.items():
        full = {key: shared[row["$ref"].rpartition("/")[2]] if "$ref" in row else row for key, row in fields.items()}
        rows[f"fields of {name}"] = [f"| `{key}` | {row['description']} |" for key, row in full.items()]
    defaults = {key: f"`{json.dumps(row['default'])}`" if "default" in row else "required" for key, row in keys.items()}
    return rows | {"parameters": [f"| `{key}` | {defaults[key]} | {keys[key]['description']} |" for key in keys]}


def with_lines(text: str, pattern: str, lines: list[str]) -> str:
    """Replace the lines of JSON that match a pattern; the last one keeps its comma or has none, as before."""
    block = re.search(rf"(?:^{pattern},?\n)+", text, re.MULTILINE)
    assert block
    end = ",\n" if block[0].endswith(",\n") else "\n"
    return text[: block.start()] + ",\n".join(lines) + end + text[block.end() :]


def derived_schemas() -> tuple[str, str]:
    """Return the config's schema with a reference per key in both shapes, and the events' with a rule per type."""
    schema, events = ((ROOT / name).read_text("utf-8") for name in ("config_schema.json", "docs/events.schema.json"))
    for indent in ("    ", "        "):
        refs = [f'{indent}"{key}": {{"$ref": "#/definitions/{key}"}}' for key in json.loads(schema)["definitions"]]
        schema = with_lines(schema, indent + r'"\w+": \{"\$ref": "#/definitions/\w+"\}', refs)
    types = event_types(json.loads(events))
    events = with_lines(events, r'      "enum": \["start".*\]', [f'      "enum": {json.dumps(types)}'])
    rule = '    {{"if": {{"properties": {{"type": {{"const": "{0}"}}}}}}, "then": {{"$ref": "#/definitions/{0}"}}}}'
    return schema, with_lines(events, r'    \{"if": .*\}', [rule.format(name) for name in types])


def derived() -> dict[Path, str]:
    """Return every file that has something derived from the schemas' definitions, as it should be."""
    schema, events = derived_schemas()
    keys = json.loads(schema)["definitions"]
    texts = {ROOT / "config_schema.json": schema, ROOT / "docs/events.schema.json": events}
    example = json.loads((ROOT / "example_config.json").read_text("utf-8"))
    nested = {key: keys[key].get("default") for key in keys if key not in example} | example["training_params"]
    example["training_params"] = {key: nested[key] for key in keys if key in nested}
    texts[ROOT / "example_config.json"] = json.dumps(example, indent=2) + "\n"
    rows = tables(keys, json.loads(events))

    def with_rows(match: re.Match[str]) -> str:
        return match[1] + ("".join(f"{row}\n" for row in rows[match[2]]) if match[2] in rows else match[3])

    pattern = re.compile(r"^(<!-- ([a-z ]+) -->\n(?:\|.*\n){2})((?:\|.*\n)*)", re.MULTILINE)
    return texts | {page: pattern.sub(with_rows, page.read_text("utf-8")) for page in PAGES}


def test_what_follows_from_the_schemas_is_written_down() -> None:
    stale = [path.name for path, text in derived().items() if path.read_text("utf-8") != text]
    assert not stale, "python test_trainer.py --write"
    marks = {mark for text in TEXTS.values() for mark in re.findall(r"^<!-- ([a-z ]+) -->", text, re.MULTILINE)}
    assert marks >= tables(SCHEMA["definitions"], EVENT_SCHEMA).keys()


# The blocks of the pages. Each is executed or validated, by its language; a block that nobody checks fails.


FENCE = re.compile(r"^( *)```(.*)\n((?:.*\n)*?)\1```$", re.MULTILINE)
BLOCKS = [  # (page, line, language, text)
    (page, text.count("\n", 0, match.start()) + 1, match[2], re.sub(f"^{match[1]}", "", match[3], flags=re.MULTILINE))
    for page, text in TEXTS.items()
    for match in FENCE.finditer(text)
]
RUN_ELSEWHERE = {  # (page, language): the tests that have all of these blocks
    ("README.md", "python"): [
        "test_the_first_lora_comes_out_as_the_readme_says",
        "test_the_readmes_parent_asks_for_a_sample_and_reads_the_answer",
    ],
    ("docs/embedding.md", "js"): ["test_a_parent_shows_stops_and_resumes_a_run"],
    ("docs/embedding.md", "python"): ["test_a_parent_shows_stops_and_resumes_a_run"],
    ("docs/health.md", "json"): ["test_the_health_page_describes_every_field_and_states_the_time"],
}


def blocks(page: str, language: str, part: str = "") -> list[str]:
    """Return the texts of a page's blocks in a language, or only those in a part of the page."""
    texts = [text for name, _, kind, text in BLOCKS if (name, kind) == (page, language)]
    return [text for text in texts if text in (part or TEXTS[page])]


def test_no_block_of_the_pages_is_overlooked() -> None:
    assert sum(len(re.findall(r"^\s*(?:```|~~~)", text, re.MULTILINE)) for text in TEXTS.values()) == 2 * len(BLOCKS)
    assert all(callable(globals()[name]) for names in RUN_ELSEWHERE.values() for name in names)
    assert len(blocks("README.md", "python")) == len(RUN_ELSEWHERE["README.md", "python"])
    demo, tests, *_ = blocks("README.md", "bash")
    assert demo.endswith("train_lora.py --config demo/config.json > /dev/null\n")
    assert tests.endswith(".venv/bin/python test_trainer.py\n")  # .ci/run runs this block.


@pytest.mark.parametrize(("page", "line", "language", "text"), BLOCKS, ids=[f"{b[0]}:{b[1]} {b[2]}" for b in BLOCKS])
def test_every_block_is_run_or_validated(tmp_path: Path, page: str, line: int, language: str, text: str) -> None:
    if (page, language) not in RUN_ELSEWHERE:
        CHECKS[language](text, tmp_path)


def check_config(document: Json, overrides: tuple[str, ...] = ()) -> None:
    """Let the loader check a config or a part of one; packages that this machine lacks do not count."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            parse(Path(folder), REQUIRED | document, overrides)
        except trainer.TrainerError as error:
            faults = [item for item in error.problems if not item["message"].startswith("needs the package")]
            assert error.problems, error.message
            assert not faults, faults


def check_json(text: str, _: Path) -> None:
    """Check events, one per line, or a config."""
    documents = [json.loads(line) for line in text.splitlines()] if '"type"' in text else [json.loads(text)]
    for document in documents:
        EVENT_VALIDATOR.validate(document) if "type" in document else check_config(document)


def check_jsonl(text: str, _: Path) -> None:
    assert all(map(trainer.parse_metadata, text.splitlines()))


def check_text(text: str, folder: Path) -> None:
    """Check the script's options, or a tree of files; the script must accept a dataset as it is drawn."""
    if text.startswith("train_lora.py"):
        assert {*re.findall(r"--[a-z-]+", text)} == OPTIONS
    elif text.startswith("my_photos/"):
        make_tree(text, folder)
        document = REQUIRED | {"dataset_path": str(folder / "my_photos"), "masked_loss": "mask" in text}
        dataset = scan_quietly(parse(folder, document))
        pictures = [name for name, _ in tree_lines(text) if not name.endswith((".txt", trainer.MASK_SUFFIX))]
        assert [example.name for example in dataset.examples] == pictures
        assert not dataset.issues
    else:
        assert text.startswith("output_path/")  # test_the_first_lora_comes_out_as_the_readme_says has it.


def tree_lines(text: str) -> list[tuple[str, str]]:
    """Return the files below a tree's first line, each with the remark beside it."""
    lines = [line.strip().partition("  ") for line in text.splitlines()[1:]]
    return [(name, remark.strip()) for name, _, remark in lines]


def make_tree(text: str, folder: Path) -> None:
    for number, (name, remark) in enumerate(tree_lines(text)):
        path = folder / "my_photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(remark, "utf-8") if path.suffix == ".txt" else draw_image(path, (64, 64), number)


def check_bash(text: str, _: Path) -> None:
    """Run a block that makes its own folder; of other blocks check every command."""
    if "mktemp" not in text:
        commands = [words for line in text.replace("\\\n", " ").splitlines() for words in shell_commands(line)]
        assert commands
        for words in commands:
            check_command(words)
    elif not HAS_TORCH or os.name == "nt":
        pytest.skip("it trains, in a POSIX shell")
    else:
        environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
        words = ["bash", "-euo", "pipefail", "-c", text]
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=LIMIT_S)
        assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr


def shell_commands(line: str) -> list[list[str]]:
    """Split a line into its commands' words, without leading assignments, redirections and comments."""
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


OPTIONS = {*re.findall(r'add_argument\("(--[a-z-]+)"', SCRIPT.read_text("utf-8")), "--help"}
REQUIREMENTS = (ROOT / "requirements.txt").read_text("utf-8")
KNOWN_COMMANDS = [  # `names` are files here or packages in requirements.txt, `script` has options that are known
    r"(python3?(\.\d+)?|py) -m (venv (\.venv|build/\w+)|json\.tool)",
    r"python3? -m pytest -q (-n [02] )?test_trainer\.py( -k [\w ]+)?",
    r"source \.venv/bin/activate",
    r"pre-commit (install|run --all-files)",
    r"sed s/>=\\\(\[0-9\]\\\)/==\\1/ requirements\.txt",  # lower bounds as versions
    r"pip install -r build/\w+/requirements\.txt",
    r"pip install (-U )?(-r )?(?P<names>[\w.-]+( [\w-]+)*)( --index-url https://download\.pytorch\.org/whl/\w+)?",
    r"python3? (?P<script>(test_trainer|(benchmarks|demo)/\w+)\.py)( .+)?",
    r"(python parent\.py|node parent\.mjs) (?P<names>[\w/.]+) [\w/]+",
    r"docker (build|compose|exec|inspect|logs|ps|run|stop) .+",
    r"curl (-\w )?http://127\.0\.0\.1:\d+/(health|status)",
    r"mkdir -p \w+( \w+)*",
    r"tensorboard --logdir \w+",
    r"(cat|tail -n 1)( \w+\.jsonl)+",
]


def check_command(words: list[str]) -> None:
    """Check a command: the script's by its own parser, others by the forms that the pages use."""
    if "train_lora.py" in words:  # It stands behind python, accelerate launch, torchrun and their options.
        return check_call(words[words.index("train_lora.py") + 1 :])
    if words[0] == "docker" and "--config" in words:  # The image's entry point is the script.
        return check_call(words[min(words.index(option) for option in OPTIONS if option in words) :])
    line = " ".join([words[0].rpartition("/")[2], *words[1:]])
    parts = next((match.groupdict() for form in KNOWN_COMMANDS if (match := re.fullmatch(form, line))), None)
    assert parts is not None, f"nobody checks: {line}"
    for name in parts.get("names", "").split():
        assert (ROOT / name).exists() or re.search(rf"^(# )?{re.escape(name)}\b", REQUIREMENTS, re.MULTILINE), name
    if script := parts.get("script"):
        known = re.findall(r'"(--[\w-]+)"', (ROOT / script).read_text("utf-8"))
        assert {*re.findall(r"(?<= )--[\w-]+", line)} <= {*known}, line
    return None


def check_call(arguments: list[str]) -> None:
    """Let the script's own parser and loader read the arguments of a call."""
    options = trainer.parse_arguments(arguments)
    check_config({}, tuple(options.set))
    if options.config.startswith("demo/"):
        assert (ROOT / options.config).exists()


def check_yaml(text: str, _: Path) -> None:
    """Check a file for a container engine: the script must accept the arguments in it."""
    waiting = [pytest.importorskip("yaml").safe_load(text)]
    while waiting:
        part = waiting.pop()
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []
        if isinstance(part, list) and "--config" in part:
            check_call(part)


CHECKS: dict[str, Callable[[str, Path], None]] = {
    "bash": check_bash,
    "json": check_json,
    "jsonl": check_jsonl,
    "powershell": lambda text, folder: check_bash(text.replace("\\", "/"), folder),
    "text": check_text,
    "yaml": check_yaml,
}


def test_the_first_lora_without_a_gpu_has_the_demos_model_and_settings() -> None:
    text = section(section(README, FIRST_LORA), "### 4. Write the config")
    pairs = re.findall(r'`("\w+": [^`]+)`', text)
    instead = json.loads("{" + ", ".join(pairs) + "}")
    demo = json.loads((ROOT / "demo/config.json").read_text("utf-8"))
    assert instead == {"base_model": "demo/base"} | {key: demo[key] for key in ("steps", "learning_rate", "batch_size")}
    assert (ROOT / instead["base_model"] / "model_index.json").is_file()


def copy_of_the_script(folder: Path) -> None:
    """Put the script into a folder as the README's tutorial assumes, with an interpreter in .venv."""
    for name in ("train_lora.py", "config_schema.json"):
        shutil.copy(ROOT / name, folder)
    interpreter = folder / ".venv/bin/python"
    interpreter.parent.mkdir(parents=True)
    interpreter.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)


def check_output_tree(output: Path) -> None:
    """Check that an output folder holds the files of the README's tree, and no others."""
    tree = next(text for text in blocks("README.md", "text") if text.startswith("output_path/"))
    forms = [re.sub(r"\\?\d+", r"\\d+", re.escape(name)) for name, _ in tree_lines(tree)]
    forms = [form.replace("lora_", "(my_)?lora_") for form in forms]
    files = [path.relative_to(output).as_posix() for path in output.rglob("*") if path.is_file()]
    assert [form for form in forms if not any(re.fullmatch(form, file) for file in files)] == []
    assert [file for file in files if not any(re.fullmatch(form, file) for form in [*forms, r"\.lock"])] == []


@posix
def test_the_first_lora_comes_out_as_the_readme_says(tmp_path: Path, models: Path) -> None:
    """Follow the section in a folder of its own, with a tiny model and two steps in place of 250."""
    steps = section(README, FIRST_LORA)
    (photos, *_), (document,), (program,) = (blocks("README.md", kind, steps) for kind in ("text", "json", "python"))
    check, start = blocks("README.md", "bash", steps)
    copy_of_the_script(tmp_path)
    make_tree(photos, tmp_path)
    config = json.loads(document)
    assert (config["base_model"], config["validation_steps"], config["checkpoint_steps"]) == ("sd15", 250, 250)
    few: Json = {"base_model": str(models / "sd15"), "steps": 4, "validation_steps": 2, "checkpoint_steps": 2}
    write_json(tmp_path / "my_lora.json", config | few | {"sample_steps": 2})

    def follow(*words: str) -> str:
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S)
        assert done.returncode == 0, done.stderr
        return done.stderr

    lines = follow("bash", "-c", check)
    labels = re.findall(r"^\| `([\w ]+:)` \|", section(steps, "### 5. Check"), re.MULTILINE)
    assert {"warning:", "error:", "validated:"} < {*labels}
    assert [label for label in labels if label != "error:" and f"\n{label} " not in f"\n{lines}"] == []

    follow("bash", "-c", start)
    names = re.findall(r"^- `([\w/.]+)`:", section(steps, "### 6. Train"), re.MULTILINE)
    output = tmp_path / config["output_path"]
    assert len(names) == 5
    assert [name for name in names if not (output / name.replace("250", "2")).is_file()] == []
    order = [event["type"] for event in logged(output / "events.jsonl") if event.get("step") == 2]
    assert order == ["progress", "checkpoint", "validation", "sample", "sample"]  # docs/events.md says so.
    check_output_tree(output)

    follow(sys.executable, "-c", program.replace("stable-diffusion-v1-5/stable-diffusion-v1-5", str(models / "sd15")))
    assert len({path.read_bytes() for path in tmp_path.glob("picture_*.png")}) == 4


SOURCES = {
    path: path.read_text("utf-8")
    for pattern in ("*.py", "*.json", "*.txt", "*/*.py", "docs/*.json", "Dockerfile")
    for path in ROOT.glob(pattern)
}
OTHER_OPTIONS = {"--all-files", "--build-arg", "--gpus", "--help", "--index-url", "--python-version", "--read-only"}
OTHER_OPTIONS |= {"--tmpfs", "--user"}


@pytest.mark.parametrize("page", TEXTS)
def test_what_stands_in_backticks_exists(page: str) -> None:
    """Check commands, options, paths, names with an underscore (keys, fields, codes) and values of config keys."""
    examples = " ".join(text for *_, text in BLOCKS)
    known = {word for text in (*SOURCES.values(), examples) for word in re.findall(r"\w+", text)}
    known |= {*first_column("docs/health.md", "## `GET /status`")}
    options = {option for text in SOURCES.values() for option in re.findall(r'add_argument\("(--[\w-]+)"', text)}
    for span in re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose(TEXTS[page])):
        if re.match(r"\S*(python3?|pip|docker|accelerate|torchrun|tensorboard) -*\w+ ", span) and "…" not in span:
            check_bash(span, ROOT)
        else:
            assert {*re.findall(r"(?<![\w-])--[a-z][\w-]+", span)} <= options | OTHER_OPTIONS, span
        for word in re.findall(r"(?<![\w./{-])[a-z]+(?:_[a-z0-9]+)+(?![\w./*…])", span):
            assert word in known, f"{word} in {span}"
        if re.match(r"(docs|benchmarks|demo)/(?!output)[\w/.]+$", span):
            assert (ROOT / span).exists(), span
    for key, value in re.findall(r"`(\w+)`:? `(\"[^`]+\"|[\d.e-]+|true|false|null)`", prose(TEXTS[page])):
        if key in SCHEMA["definitions"]:
            jsonschema.validate(json.loads(value), SCHEMA["definitions"][key])


@pytest.mark.parametrize("page", TEXTS)
def test_every_link_between_the_pages_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", prose(TEXTS[page])):
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:  # GitHub makes it of a heading like this.
            titles = headings(path.read_text("utf-8"), "#+")
            assert anchor in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], target


def test_what_the_memory_page_sets_for_a_card_leaves_a_tenth_of_it() -> None:
    assert memory.cards_table() in section(TEXTS["docs/vram.md"], "## What to set for your card")
    for card, columns in memory.CARDS.items():
        for (family, side), keys in zip((("sd15", 512), ("sdxl", 1024)), columns, strict=True):
            needed = min(memory.setting(family, side, lean, **keys).estimate()["total"] for lean in (False, True))
            assert needed <= 0.9 * card * memory.GIB
            check_config(keys)


# The image. Docker is not needed: the tests read its files.

DOCKERFILE = re.sub(r"^#.*\n|\\\n", "", (ROOT / "Dockerfile").read_text("utf-8"), flags=re.MULTILINE)


def instructions(name: str) -> list[str]:
    return re.findall(rf"^{name} +(.+)$", DOCKERFILE, re.MULTILINE)


def test_the_image_is_what_the_readme_says() -> None:
    assert instructions("ARG")[0] == "BASE_IMAGE=nvidia/cuda:11.8.0-base-ubuntu22.04"
    assert f'image.version="{trainer.VERSION}"' in DOCKERFILE
    text = TEXTS["docs/docker.md"]
    names = {argument.partition("=")[0] for argument in instructions("ARG")}
    assert {*re.findall(r"--build-arg (\w+)=", text)} == names
    assert f"without `--user`: {instructions('USER')[0]})" in text
    assert {"HF_HOME=/models", "LORA_HEALTH_PORT=8080"} <= {*instructions("ENV")[-1].split()}


def test_the_files_of_the_image_are_enough_to_validate_its_demo(tmp_path: Path) -> None:
    """Copy what COPY names and .dockerignore lets through, and run the entry point on it."""
    allowed = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text("utf-8"), re.MULTILINE)
    copies = [(name, copy.split()[-1]) for copy in instructions("COPY") for name in copy.split()[:-1]]
    assert sorted(name for name, _ in copies) == sorted(allowed)
    for name, target in copies:
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


def test_docker_runs_mount_the_volumes_of_the_image_and_keep_to_them() -> None:
    """Check every `docker run` in the README, and the compose file's service as such a line."""
    lines = TEXTS["docs/docker.md"].replace("\\\n", " ")
    runs = [
        shlex.split(line, comments=True) for line in re.findall(r"(?:^|`)(docker run [^`\n]+)", lines, re.MULTILINE)
    ]
    yaml = pytest.importorskip("yaml")
    service = yaml.safe_load((ROOT / "docs/compose.yaml").read_text("utf-8"))["services"]["train"]
    runs.append([*(word for name in service["volumes"] for word in ("-v", name)), "train-lora", *service["command"]])
    assert (len(runs), service["image"]) == (5, "train-lora")
    volumes = {*json.loads(instructions("VOLUME")[0])} - {"/tmp"}
    for words in runs:
        options, arguments = words[: words.index("train-lora")], words[words.index("train-lora") + 1 :]
        mounted = {word.split(":")[1] for option, word in itertools.pairwise(options) if option == "-v"}
        assert mounted in (set(), volumes)
        check_call(arguments)
        paths = {*re.findall(r"(?:^|=)(/\w+)", "\n".join(arguments), re.MULTILINE)}
        assert set() < paths <= (mounted or volumes | {"/app"})


def health_check(address: str | None) -> int:
    """Run the image's health check with this value of LORA_HEALTH_PORT; return its exit code."""
    check = instructions("HEALTHCHECK")[0].partition(" CMD ")[2]
    environment = {name: text for name, text in os.environ.items() if name != "LORA_HEALTH_PORT"}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "http_proxy": "http://127.0.0.1:9"}
    environment |= {} if address is None else {"LORA_HEALTH_PORT": address}
    return subprocess.run(["sh", "-c", check], env=environment, stderr=subprocess.DEVNULL).returncode


@posix
@pytest.mark.parametrize("form", ["{}", "127.0.0.1:{}", "0.0.0.0:{}"])
def test_the_health_check_of_the_image_follows_the_health_port(form: str) -> None:
    answers: list[int] = []

    class Health(http.server.BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            self.send_response(self.status if self.path == "/health" else 404)
            self.end_headers()
            answers.append(self.status)

        def log_message(self, *_: Any) -> None: ...

    def answered_check() -> int:
        """Check until the server has answered: on a busy machine a connection can fail, or time out, first."""
        deadline, before, code = time.monotonic() + LIMIT_S, len(answers), 1
        while code and len(answers) == before:
            assert time.monotonic() < deadline
            code = health_check(address)
        return code

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Health) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        address = form.format(server.server_port)
        assert answered_check() == 0
        Health.status = 503
        assert answered_check() == 1
        server.shutdown()
    assert health_check(address) == 1  # Nobody answers.
    assert (health_check(""), health_check(None)) == (0, 0)


# ======================================================================================
# embedding, contributing, changelog
# ======================================================================================

PARENTS = {"python": "parent.py", "js": "parent.mjs"}
needs_node = pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
each_parent = pytest.mark.parametrize("language", ["python", pytest.param("js", marks=needs_node)])


def start_parent(folder: Path, language: str, *arguments: str | Path, **options: Any) -> subprocess.Popen[str]:
    """Start a parent of docs/embedding.md as it stands there."""
    (text,) = blocks("docs/embedding.md", language)
    path = folder / PARENTS[language]
    path.write_text(text, "utf-8")
    words = [sys.executable if language == "python" else "node", path, *arguments]
    options = {"env": os.environ | {"PYTHON": sys.executable}, "stderr": subprocess.DEVNULL, **options}
    pipes: Json = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE)
    return subprocess.Popen(words, encoding="utf-8", **pipes | options)


def line_with(process: subprocess.Popen[str], words: str) -> str:
    """Read on until a line with these words comes, and return it."""
    assert process.stdout
    found = next((line for line in process.stdout if words in line), None)
    assert found is not None, words
    return found


def interrupt(process: subprocess.Popen[str]) -> str:
    """Press Ctrl-C; return the rest of the output. The parent's own stdin stays open, as it does on a terminal."""
    process.send_signal(signal.SIGINT)
    assert process.stdout
    rest = process.stdout.read()
    process.wait(LIMIT_S)
    return rest


@each_parent
def test_a_parent_is_short_and_says_what_it_needs(tmp_path: Path, language: str) -> None:
    (text,) = blocks("docs/embedding.md", language)
    assert len(text.splitlines()) < 40
    with start_parent(tmp_path, language, stderr=subprocess.PIPE) as process:
        _, errors = process.communicate(timeout=LIMIT_S)
    assert (process.returncode, errors) == (1, f"usage: {PARENTS[language]} CONFIG OUTPUT\n")
    if language == "js":  # Its interpreter comes from the environment.
        options: Json = {"env": os.environ | {"PYTHON": str(tmp_path / "none")}, "stderr": subprocess.PIPE}
        with start_parent(tmp_path, language, "x.json", tmp_path / "out", **options) as process:
            _, errors = process.communicate(timeout=LIMIT_S)
        assert (process.returncode, errors) == (127, f"PYTHON: spawn {tmp_path / 'none'} ENOENT\n")


@needs_torch
@each_parent
def test_a_parent_shows_stops_and_resumes_a_run(tmp_path: Path, language: str) -> None:
    demo = json.loads((ROOT / "demo/config.json").read_text("utf-8"))
    demo |= {key: str(ROOT / "demo" / demo[key]) for key in ("dataset_path", "base_model")}
    demo |= {"validation_steps": 0, "sample_at_start": False, "batch_size": 1, "sample_steps": 2}
    output = tmp_path / "out"

    def started(steps: int) -> subprocess.Popen[str]:
        return start_parent(tmp_path, language, write_config(tmp_path, **demo | {"steps": steps}), output, cwd=ROOT)

    with started(100_000) as process:
        line_with(process, "step 3 of 100000, ")
        print("sample", file=process.stdin, flush=True)
        line_with(process, "sample accepted ")
        done = line_with(process, "sample done ").split()
        line_with(process, "step ")  # The training goes on.
        rest = interrupt(process)
    pictures = [path for path in map(Path, done) if path.suffix == ".png"]
    assert [path.parent for path in pictures] == [output / "samples"] * len(demo["sample_prompts"])
    assert all(path.is_file() for path in pictures)
    with pytest.importorskip("filelock").FileLock(output / ".lock", timeout=LIMIT_S):  # The run has ended.
        saved = logged(output / "events.jsonl")[-1]
    assert rest.endswith("last event: interrupted, exit code: 143\n")
    assert [words for words in ("stop accepted ", "A stop was asked for", "stop done ") if words not in rest] == []
    assert (process.returncode, saved["type"]) == (143, "interrupted")
    with started(saved["step"] + 2) as process:
        text, _ = process.communicate(timeout=LIMIT_S)
    assert re.findall(r"^step (\d+) of", text, re.MULTILINE) == [str(saved["step"] + 1), str(saved["step"] + 2)]
    assert text.endswith("last event: complete, exit code: 0\n")
    assert process.returncode == 0
    assert re.search(r"^Encoding images\. \d+ of \d+$", text, re.MULTILINE)
    assert "complete: " in (output / "stderr.log").read_text("utf-8")


ODD_CHILD = """
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
@each_parent
def test_a_parent_reads_pieces_long_lines_and_unknown_ones_and_sees_a_child_die(tmp_path: Path, language: str) -> None:
    dies = 'say(\'{"type": "comp\')\nos.kill(os.getpid(), 9)'
    (tmp_path / "train_lora.py").write_text(ODD_CHILD + dies, "utf-8")
    with start_parent(tmp_path, language, "x.json", tmp_path / "out", cwd=tmp_path) as process:
        text, _ = process.communicate(timeout=LIMIT_S)
    first, long, last = text.splitlines()
    assert (first, long.strip()) == ("step 1 of 2, 0 s left", "x" * 300_000)
    assert last == f"last event: info, exit code: {-9 if language == 'python' else 'SIGKILL'}"
    assert process.returncode != 0


@posix
@pytest.mark.torture
@each_parent
def test_a_parent_kills_a_child_that_does_not_stop(tmp_path: Path, language: str) -> None:
    (tmp_path / "train_lora.py").write_text(f"{ODD_CHILD}\ntime.sleep(600)", "utf-8")
    with start_parent(tmp_path, language, "x.json", tmp_path / "out", cwd=tmp_path) as process:
        line_with(process, "xxx")
        text = interrupt(process)
    assert "exit code: -9" in text or "exit code: SIGKILL" in text


@needs_torch
def test_the_readmes_parent_asks_for_a_sample_and_reads_the_answer(tmp_path: Path, tiny: TinyRuns) -> None:
    (program,) = blocks("README.md", "python", section(README, "## Events"))
    assert len(program.splitlines()) <= 20
    copy_of_the_script(tmp_path)
    write_json(tmp_path / "my_lora.json", tiny.config(steps=101))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT_S
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    steps = [index for index, line in enumerate(lines) if line.startswith("step ")]
    answers = [index for index, line in enumerate(lines) if line.startswith("sample ")]
    assert len(steps) == 101
    assert [lines[index].split()[1] for index in answers] == ["accepted", "done"]
    assert steps[99] < answers[0] < answers[1] < len(lines) - 1
    (picture,) = tiny.output.glob("samples/step_*.png")
    assert str(picture) in lines[answers[1]]
    assert PngImagePlugin.PngImageFile(picture).text["prompt"] in program
    assert str(tiny.output / "lora_final.safetensors") in lines[-1]


def test_the_parent_for_language_models_is_short() -> None:
    assert len(SOURCES[ROOT / "docs/mcp_server.py"].splitlines()) <= 150


@needs_torch
@needs("mcp")
def test_a_language_model_checks_starts_watches_asks_and_stops_a_run(tiny: TinyRuns) -> None:
    """Talk to docs/mcp_server.py with the package's own client; the second server finds the run of the first."""
    mcp: Any = importlib.import_module("mcp")
    program = {"command": sys.executable, "args": [str(ROOT / "docs/mcp_server.py")], "env": {**os.environ}}
    config = str(write_config(tiny.folder, **tiny.config(steps=100_000, sample_prompts=["a zorb"])))
    output, stray = str(tiny.output), list[Any]()

    async def keep_strays(message: Any) -> None:
        stray.append(message)

    def connect() -> Any:
        return mcp.Client(mcp.StdioServerParameters(**program), message_handler=keep_strays)

    async def call(client: Any, tool: str, **arguments: Any) -> Any:
        """Return the answer; of an error, its text."""
        result = await client.call_tool(tool, arguments, read_timeout_seconds=LIMIT_S)
        return result.content[0].text if result.is_error else result.structured_content

    async def first() -> str:
        async with connect() as client:
            names = [tool.name for tool in (await client.list_tools()).tools]
            assert names == ["check_config", "start", "status", "sample", "stop"]
            broken: Json = {"steps": -1, "lora_rank": "many"}
            answer = await call(client, "check_config", config=config, settings=broken)
            assert (answer["type"], answer["code"]) == ("error", "config_invalid")
            assert {row["path"] for row in answer["problems"]} == {*broken}
            assert not (await call(client, "start", config=config, settings=broken, dry_run=False))["started"]
            answer = await call(client, "start", config=config)
            assert (answer["started"], answer["checked"]["type"]) == (False, "validated")
            assert "No run has written events" in await call(client, "status", output=output)
            run = await call(client, "start", config=config, dry_run=False)
            assert (run["started"], run["output"], run["exit_code"]) == (True, output, None)
            assert "A run goes on" in await call(client, "start", config=config, dry_run=False)
            while not (answer := await call(client, "status", output=output))["progress"]:
                assert answer["running"]
                await asyncio.sleep(0.1)
            assert answer["run"]["run_id"] == run["run_id"] != ""
            answer = await call(client, "sample", output=output, prompts=["a red zorb", "a blue zorb"])
            assert (answer["state"], [Path(path).is_file() for path in answer["paths"]]) == ("done", [True] * 2)
            return str(run["run_id"])

    async def second(run_id: str) -> None:
        async with connect() as client:
            assert (await call(client, "status", output=output))["running"]
            assert "No run that this server started" in await call(client, "sample", output=output)
            answer = await call(client, "stop", output=output)
            assert (answer["running"], answer["last_events"][-1]["type"]) == (False, "interrupted")
            assert (answer["run"]["attempt"], answer["run"]["run_id"]) == (1, run_id)

    try:
        asyncio.run(second(asyncio.run(first())))
    finally:
        if tiny.output.exists():
            (tiny.output / "stop").touch()
    assert stray == []
    for event in logged(tiny.output / "events.jsonl"):
        EVENT_VALIDATOR.validate(event)


CONTRIBUTING = TEXTS["docs/CONTRIBUTING.md"]


def test_each_addition_takes_at_most_three_places_and_every_name_in_them_exists() -> None:
    parts = dict(re.findall(r"^### (An? .+)\n((?:(?!#).*\n)*)", CONTRIBUTING, re.MULTILINE))
    assert set(parts) == {"A config key", "An event", "An optimizer", "A model family"}
    for title, body in parts.items():
        places = re.findall(r"^\d\. `([^`]+)`: (.+)$", body, re.MULTILINE)
        assert 1 < len(places) <= 3, title
        for file, text in places:
            source = (ROOT / file).read_text("utf-8")
            assert [name for name in re.findall(r"`([A-Za-z_-]+)`", text) if name not in source] == [], (title, file)
    for name in re.findall(r"`((?:docs|benchmarks|\.ci)/[\w.]+)`", CONTRIBUTING):
        assert (ROOT / name).exists(), name


def test_the_contributing_page_lists_the_scripts_sections_and_selections_that_find_tests() -> None:
    rows = re.findall(r"^\| ([a-zA-Z ,]+) \|", section(CONTRIBUTING, "## The sections"), re.MULTILINE)[1:]
    sections = re.findall(r"^    ([a-zA-Z][\w ]*?)  +\S", trainer.__doc__ or "", re.MULTILINE)
    assert ", ".join(rows).split(", ") == sections[1:]  # The first one is the imports.
    tests = " ".join(name.lower() for name in globals() if name.startswith("test_"))
    selections = re.findall(r'^\|.*`"(.+)"`', section(CONTRIBUTING, "## Checks"), re.MULTILINE)
    assert [word for selection in selections for word in selection.split(" or ") if word not in tests] == []


def test_the_newest_version_of_the_changelog_is_the_scripts() -> None:
    text = TEXTS["docs/CHANGELOG.md"]
    versions = re.findall(r"^## (\d+\.\d+\.\d+) - (\d{4}-\d\d-\d\d|unreleased)$", text, re.MULTILINE)
    assert len(versions) == len(headings(text))
    assert versions[0][0] == trainer.VERSION
    assert "unreleased" not in [date for _, date in versions[1:]]


def test_the_hooks_before_a_commit_are_checks_of_ci() -> None:
    hooks = re.findall(r"^ +entry: (.+)$", (ROOT / ".pre-commit-config.yaml").read_text("utf-8"), re.MULTILINE)
    ci = (ROOT / ".ci/run").read_text("utf-8")
    assert len(hooks) == 3
    assert [hook for hook in hooks if f".venv/bin/{hook}" not in ci] == []


# ======================================================================================
# a simulated GPU: .ci/fakecuda
# ======================================================================================

sys.path.append(str(ROOT / ".ci/fakecuda"))
fakecuda: Any = importlib.import_module("fakecuda")

# The body of a process that has imported everything and sees the simulated card. For each line of its input it runs
# code in a copy of itself, which saves seconds. A Copy cannot do so: its torch has looked for CUDA already.
SIMULATED_GPU = """
import itertools, json, signal
sys.path.append(".ci/fakecuda")
import fakecuda
fakecuda.install()
import torch
t.import_checkers()
t.import_libraries()
from transformers import CLIPTextModelWithProjection, CLIPTokenizer
from diffusers import AutoencoderKL, UNet2DConditionModel
t.gc.freeze()
for line in sys.stdin:
    code, sys.argv[1:], environment, files = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    signal.alarm(600)
    os.environ.update(environment)
    for descriptor, path in enumerate(files, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    fakecuda.use_environment()
    exec(code)
    sys.exit()
"""


class SimulatedGpu:
    def __init__(self, folder: Path) -> None:
        self.files = [str(folder / name) for name in ("stdout", "stderr")]
        options: Json = dict.fromkeys(("stdin", "stdout"), subprocess.PIPE) | {"stderr": subprocess.DEVNULL}
        start = [sys.executable, "-c", PROLOGUE + SIMULATED_GPU]
        self.process: Any = subprocess.Popen(start, cwd=ROOT, text=True, **options)

    def execute(self, code: str, *arguments: str, **environment: str) -> Any:
        """Run `code`; return (exit code, stdout, stderr)."""
        print(json.dumps([code, arguments, environment, self.files]), file=self.process.stdin, flush=True)
        return int(self.process.stdout.readline()), *(Path(path).read_bytes() for path in self.files)

    def train(self, tiny: TinyRuns, code: str = "", card: Mapping[str, str] | None = None, **changes: Any) -> Run:
        """Run the script on a tiny model, after `code` has replaced some of its parts."""
        config = write_config(tiny.folder, **tiny.config(**changes))
        untried = "t.BITSANDBYTES_TRIAL = ''\n"  # Its child process would not have the card.
        return Run(*self.execute(untried + code + EPILOGUE, "--config", str(config), **card or {}))


@pytest.fixture(scope="session")
def gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimulatedGpu]:
    built, reason = fakecuda.build()
    if not built:
        pytest.skip(f"the simulated GPU cannot be had: {reason}")
    simulated = SimulatedGpu(tmp_path_factory.mktemp("gpu"))
    yield simulated
    simulated.process.communicate()  # Its input ends, and so does it.


ACTS_AS_A_GPU = """
def error_of(action, kind=RuntimeError):
    try: action()
    except kind as error: return str(error)
cpu, weight = torch.ones(1000), torch.ones(1000, device="cuda:1", requires_grad=True)
(weight * cpu.to("cuda:1")).sum().backward()
assert str(weight.grad.device) == "cuda:1"
assert all("on the same device" in error_of(lambda: weight + other) for other in (cpu, cpu.to("cuda:0")))
def counted(action):
    before = fakecuda.counts()
    kept = action()
    return [fakecuda.counts()[name] - before[name] for name in
            ("kernels", "waits", "pinned_copies", "unpinned_copies", "allocated")]
gpu, pinned = cpu.cuda(), cpu.pin_memory()
assert counted(lambda: gpu * 2) == [1, 0, 0, 0, 4000]
assert counted(lambda: gpu[3:].view(-1)) == [0, 0, 0, 0, 0]
assert counted(lambda: pinned.to("cuda", non_blocking=True)) == [0, 0, 1, 0, 4000]
assert counted(lambda: cpu.to("cuda", non_blocking=True)) == [0, 0, 0, 1, 4000]
assert counted(lambda: pinned.to("cuda")) == [0, 1, 1, 0, 4000]
assert counted(lambda: gpu.cpu()) == [0, 1, 0, 1, 0]
assert counted(lambda: gpu[0].item()) == [0, 1, 0, 0, 0]
assert counted(lambda: gpu[gpu > 2]) == [3, 1, 0, 0, 0]  # It compares, looks for places, and takes them.
assert counted(lambda: gpu.index_put_([torch.tensor([3])], gpu[0])) == [1, 1, 0, 1, 0]
assert counted(lambda: torch._foreach_add([gpu, gpu], 1)) == [1, 0, 0, 0, 8000]
assert counted(torch.cuda.synchronize) == [0, 1, 0, 0, 0]
torch.cuda.reset_peak_memory_stats()
used = torch.cuda.memory_allocated()
gpu * 2 + 1
assert (torch.cuda.max_memory_allocated() - used, torch.cuda.mem_get_info()[0] + used) == (8000, 12 * 2**30)
fakecuda.arm(allocation_fails=2)
assert [error_of(lambda: gpu * 2, torch.OutOfMemoryError) is None for _ in range(3)] == [True, False, True]
fakecuda.arm(kernel_breaks=1)
gpu += 1
calls = (lambda: gpu + 1, gpu.cpu, cpu.pin_memory, torch.cuda.synchronize, torch.cuda.mem_get_info)
assert all("illegal memory access" in error_of(call, torch.AcceleratorError) for call in calls)
"""


def test_the_simulated_gpu_mixes_no_devices_counts_and_fails_as_a_gpu_does(gpu: SimulatedGpu) -> None:
    assert gpu.execute(ACTS_AS_A_GPU) == (0, b"", b"")


@pytest.mark.parametrize(
    ("kind", "changes", "difference"),
    [
        ("sd15", {"mixed_precision": "no"}, 0.001),
        ("sd15", {"mixed_precision": "bf16", "validation_steps": 2, "validation_split": 0.2}, 0.3),
        ("sd15", {"mixed_precision": "fp16"}, 0.15),
        ("sd15", {"mixed_precision": "bf16", "lora_type": "dora"}, 0.3),
        ("sdxl", {"mixed_precision": "bf16", "train_text_encoder": True, "device": "cuda:1"}, 0.4),
        pytest.param("sd15", {"mixed_precision": "bf16", "quantize_base": "nf4"}, 0.6, marks=needs("bitsandbytes")),
    ],
)
def test_a_run_on_a_gpu_ends_close_to_the_same_run_on_the_cpu(
    tiny: TinyRuns, gpu: SimulatedGpu, kind: str, changes: Json, difference: float
) -> None:
    result = gpu.train(tiny, kind=kind, steps=3, **changes)
    assert (result.code, result.last["type"]) == (0, "complete"), result.stderr
    assert f"Device: {changes.get('device', 'cuda:0')}, NVIDIA GeForce RTX 3060 (" in str(result.of("info"))
    assert result.of("progress")[-1]["vram_gb"] is not None
    made = tiny.train(kind=kind, output="cpu", steps=3, **changes | {"device": "cpu", "quantize_base": "none"})
    there, here = tensors_of(tiny.output / "lora_final.safetensors"), tensors_of(made.final_path)
    up = [key for key in here if "lora_up" in key]  # These began at 0.
    one, other = (torch.cat([file[key].flatten() for key in up]) for file in (there, here))
    assert (one - other).norm() < difference * other.norm()


# Code that does something first in the {call}-th call of one of the script's functions.
AT_CALL = """
owner, _, name = "{place}".rpartition(".")
owner = getattr(t, owner) if owner else t
function, calls = getattr(owner, name), itertools.count(1)
def changed(*arguments, **options):
    call = next(calls)
    if call == {call}: {action}
    return function(*arguments, **options)
setattr(owner, name, changed)
"""


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sd15", ACCUMULATED | {"gradient_checkpointing": True, "lora_dropout": 0.3, "mixed_precision": "bf16"}),
        ("sdxl", {"train_text_encoder": True, "mixed_precision": "fp16", "lora_dropout": 0.1}),
    ],
)
def test_a_stopped_run_on_a_gpu_ends_in_equal_bits(tiny: TinyRuns, gpu: SimulatedGpu, kind: str, changes: Json) -> None:
    stop = AT_CALL.format(place="LoRATrainer.periodic", call=1, action="arguments[0].stop.signal = 15")
    stopped = gpu.train(tiny, stop, kind=kind, steps=3, **changes)
    assert (stopped.last["type"], stopped.last["step"]) == ("interrupted", 1)
    resumed, whole = (gpu.train(tiny, kind=kind, output=name, steps=3, **changes) for name in ("out", "whole"))
    assert [result.last["type"] for result in (resumed, whole)] == ["complete"] * 2
    for name in ("lora_final", "checkpoints/state_step_3"):
        assert_same_tensors(tiny.output / f"{name}.safetensors", tiny.folder / f"whole/{name}.safetensors")


@pytest.mark.parametrize(
    ("changes", "package", "waits"),
    [
        ({"mixed_precision": "bf16"}, "torch", 0),
        ({"mixed_precision": "fp16", "lora_type": "dora", "masked_loss": True, "snr_gamma": 5}, "torch", 0),
        (ACCUMULATED | {"train_text_encoder": True, "lora_dropout": 0.1, "noise_offset": 0.1}, "torch", 0),
        ({"quantize_base": "nf4", "gradient_checkpointing": True}, "bitsandbytes", 0),
        ({"optimizer": "adafactor"}, "transformers", 1),
        ({"optimizer": "lion"}, "lion_pytorch", 1),
        ({"optimizer": "schedulefree_adamw"}, "schedulefree", 1),
        ({"optimizer": "prodigy"}, "prodigyopt", 3),  # It reads two numbers of each group,
        ({"optimizer": "adamw8bit"}, "bitsandbytes", 2),  # and bitsandbytes synchronizes after each.
    ],
)
def test_a_step_waits_for_the_gpu_no_more_often_than_its_optimizer_must(
    tiny: TinyRuns, gpu: SimulatedGpu, changes: Json, package: str, waits: int
) -> None:
    pytest.importorskip(package)
    action = "arguments[0].events.info(json.dumps(fakecuda.counts()))"
    after_each_step = AT_CALL.format(place="LoRATrainer.periodic", call="call", action=action)
    result = gpu.train(tiny, after_each_step, **changes | {"steps": 4, "log_steps": 100})
    assert result.code == 0, result.stderr
    counts = [json.loads(event["message"]) for event in result.of("info") if event["message"].startswith("{")]
    for before, after in itertools.pairwise(counts[:3]):  # The first step makes state, and the last one reports.
        step = {name: after[name] - before[name] for name in after}
        assert step["waits"] == waits
        assert (step["unpinned_copies"], step["pinned_copies"] > 0) == (0, True)


@pytest.fixture(scope="module")
def narrow_sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make an SD 1.5 whose UNet has all of its blocks, each a fifth as wide."""
    configs, full = tiny_config("sd15"), full_size_config("sd15")["unet"]
    narrow: Json = {"block_out_channels": [width // 5 for width in full["block_out_channels"]]}
    configs["unet"] = full | narrow | {"cross_attention_dim": 32, "sample_size": 32}
    return Path(build_model(tmp_path_factory.mktemp("narrow"), "sd15", configs))


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_checkpointing": True, "optimizer": "adamw", "lora_rank": 16},
        {"mixed_precision": "no", "ema_decay": 0.9, "lora_targets": "attention", **WITH_CLASS},
        {"lora_type": "dora"},
    ],
)
def test_the_peak_of_a_run_is_what_the_estimate_says(
    tiny: TinyRuns, gpu: SimulatedGpu, narrow_sd15: Path, changes: Json
) -> None:
    action = "arguments[0].events.info(json.dumps([fakecuda.counts()['peak'], dict(arguments[0].plan.memory)]))"
    after_the_step = AT_CALL.format(place="LoRATrainer.periodic", call=2, action=action)
    keys: Json = {
        "base_model": str(narrow_sd15),
        "resolution": 256,
        "mixed_precision": "bf16",
        "steps": 2,
        "batch_size": 4,
    }
    result = gpu.train(tiny, after_the_step, **keys | changes)
    assert result.code == 0, result.stderr
    (text,) = [event["message"] for event in result.of("info") if event["message"].startswith("[")]
    peak, memory = json.loads(text)
    assert peak == pytest.approx(memory["training"] - memory["workspaces"], rel=0.1)  # This card has no workspaces.


MEMORY, BREAK = "allocation_fails", "kernel_breaks"
AVERAGED: Json = {"optimizer": "schedulefree_adamw"}  # Its average is computed on the device for each save.


@pytest.mark.parametrize(
    ("place", "call", "fault", "changes", "ending"),  # The ending is the error's code and phase, its step, warnings.
    [
        ("load_component", 1, MEMORY, {}, ("out_of_memory", "loading", None)),
        ("EncodedDataset.fill", 2, MEMORY, {}, ("out_of_memory", "caching", None)),
        ("LoRATrainer.loss", 4, MEMORY, {}, ("out_of_memory", "training", 3)),
        ("Adapter.backward", 4, MEMORY, {}, ("out_of_memory", "training", 3)),
        ("Adapter.step", 4, MEMORY, {}, ("out_of_memory", "training", 3)),
        ("decode_latents", 1, MEMORY, {}, ("", "", 4, "sample_not_written")),
        ("Sampler.draw", 1, MEMORY, {}, ("", "", 4, "sample_not_written")),
        ("Sampler.drift", 1, MEMORY, {}, ("", "", 4, "validation_failed")),
        ("LoRATrainer.save", 1, MEMORY, AVERAGED, ("", "", 4, "save_failed")),
        ("LoRATrainer.finish", 1, MEMORY, AVERAGED, ("out_of_memory", "saving", 4)),
        ("compile_blocks", 1, MEMORY, {"compile": True}, ("", "", 4, "compile_unavailable")),
        ("EncodedDataset.fill", 2, BREAK, {}, ("device_failed", "caching", None)),
        ("LoRATrainer.loss", 4, BREAK, {}, ("device_failed", "training", 2)),
        ("decode_latents", 1, BREAK, {}, ("device_failed", "sampling", 2)),
        ("compile_blocks", 1, BREAK, {"compile": True}, ("device_failed", "compiling", None)),
    ],
)
def test_a_fault_of_the_gpu_has_its_code_and_leaves_what_was_saved(
    tiny: TinyRuns, gpu: SimulatedGpu, place: str, call: int, fault: str, changes: Json, ending: tuple[Any, ...]
) -> None:
    pytest.importorskip("schedulefree" if changes == AVERAGED else "torch")
    (code, phase, step), warnings = ending[:3], [*ending[3:]]
    keys: Json = {"steps": 4, "checkpoint_steps": 2, "validation_steps": 2, "prediction_type": "v_prediction"}
    arm = AT_CALL.format(place=place, call=call, action=f"fakecuda.arm({fault}=1)")
    result = gpu.train(tiny, arm, **keys | changes)
    last = result.last
    assert (last["type"], last.get("code", ""), last["step"]) == ("error" if code else "complete", code, step)
    assert [event["code"] for event in result.of("warning") if not event["code"].startswith("prediction")] == warnings
    assert not code or f" while {phase}" in last["message"]
    states = [number for number, path in trainer.numbered(tiny.checkpoints, "state_step") if trainer.decode_state(path)]
    assert max(states, default=None) == step


@pytest.mark.parametrize(
    ("card", "code", "words"),
    [
        ({"FIRST_CALL_FAILS": "out of memory"}, "out_of_memory", "while importing"),
        ({"GIB": "0.0005"}, "out_of_memory", "estimated at"),
        ({"FIRST_CALL_FAILS": "CUDA-capable device(s) is/are busy"}, "device_unavailable", "busy"),
        ({"SM": "6.1", "NAME": "GTX 1080"}, "device_unavailable", "GTX 1080.*sm_61.*sm_75"),
    ],
)
def test_an_unusable_card_is_refused(tiny: TinyRuns, gpu: SimulatedGpu, card: Json, code: str, words: str) -> None:
    last = gpu.train(tiny, card={f"FAKECUDA_{name}": value for name, value in card.items()}).last
    assert (last["type"], last["code"], last["step"]) == ("error", code, None)
    assert last["retry"] == ("same" if words == "busy" else "change")
    assert re.search(words, last["message"] + last["hint"], re.DOTALL)


@pytest.mark.parametrize(("capability", "bf16", "fault"), [("8.6", True, None), ("6.1", False, "no kernel image")])
def test_describe_names_each_card_and_whether_torch_has_kernels_for_it(
    gpu: SimulatedGpu, capability: str, bf16: bool, fault: str | None
) -> None:
    code, answer, _ = gpu.execute("print(json.dumps(t.describe_devices()))", FAKECUDA_SM=capability, FAKECUDA_GIB="8")
    cards = [row for row in json.loads(answer) if row["device"] != "cpu"]
    assert (code, [card["device"] for card in cards]) == (0, ["cuda:0", "cuda:1"])
    for card in cards:
        assert (card["name"], card["total_gb"], card["bf16"]) == ("NVIDIA GeForce RTX 3060", 8.0, bf16)
        assert (fault is None and card["fault"] is None) or fault in card["fault"]


# ======================================================================================
# the torture run: python test_trainer.py -m torture -s
# ======================================================================================


def run_script(output: Path) -> None:
    """Run {output}.json in this process, with its events to {output}.jsonl."""
    events = os.open(output.with_suffix(".jsonl"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor, target in ((os.open(os.devnull, os.O_RDWR), 2), (events, 1)):
        os.dup2(descriptor, target)
    assert trainer.main(["--config", str(output.with_suffix(".json"))]) == 0


def steps_of(events: list[Json], event_type: str) -> list[int]:
    return [event["step"] for event in events if event["type"] == event_type]


def kill_until_done(tiny: TinyRuns, number: int, moments: random.Random) -> tuple[int, int]:
    """Train once in one go, and once with one kill after the other; return (kills, the most steps to do again)."""
    make_dataset(tiny.folder / "prior", [(64, 64)])
    kind, changes, _ = RESUMED[number % 6]
    often = {"checkpoint_steps": 2, "checkpoint_limit": number % 4 or None, "validation_steps": 30}
    whole, parts = (tiny.folder / f"{name}{number}" for name in ("whole", "parts"))
    for output in (whole, parts):
        write_json(output.with_suffix(".json"), tiny.config(kind, output.name, **changes | often | {"steps": 120}))
    start = time.monotonic()
    assert not killed(lambda: run_script(whole))
    duration_s, kills, saved, lost_steps = time.monotonic() - start, 0, 0, 0
    while killed(lambda: run_script(parts), after_s=moments.uniform(0, 0.4 * duration_s)):
        events, kills = logged(parts.with_suffix(".jsonl")), kills + 1
        saved = max([saved, *steps_of(events, "checkpoint")])
        assert all(tensors_of(path) for path in parts.rglob("[!.]*.safetensors")), "a file that cannot be read"
        states = trainer.numbered(parts / "checkpoints", "state_step")
        assert all(trainer.decode_state(path) for _, path in states)
        newest = max([0, *(step for step, _ in states)])
        assert newest >= saved, "a checkpoint that was announced is gone"
        lost_steps = max([lost_steps, *(step - newest for step in steps_of(events, "progress"))])
    names = [{path.relative_to(output) for path in output.rglob("*")} for output in (whole, parts)]
    assert names[0] == names[1], "temporaries or missing files"
    for path in whole.rglob("*.safetensors"):
        assert_same_tensors(path, parts / path.relative_to(whole))
    losses = [
        {(event["step"], event["loss"]) for event in logged(output / "events.jsonl") if event["type"] == "progress"}
        for output in (whole, parts)
    ]
    assert losses[0] == losses[1]
    return kills, lost_steps


@pytest.mark.torture
@posix
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_two_hundred_kills_lose_no_checkpoint_and_change_no_bit(tiny: TinyRuns) -> None:
    moments, runs, kills, lost_steps = random.Random(3), 0, 0, 0
    while kills < 200:
        some, most = kill_until_done(tiny, runs, moments)
        runs, kills, lost_steps = runs + 1, kills + some, max(lost_steps, most)
    assert lost_steps <= 2
    print(f"\n{kills} kills over {runs} runs; never more than {lost_steps} steps to do again")


@pytest.mark.torture
@posix
def test_a_hundred_stops_at_random_events_end_as_promised(tiny: TinyRuns) -> None:
    moments, waits_s = random.Random(4), list[float]()
    keys: Json = {"steps": 100_000, "checkpoint_steps": 7, "validation_steps": 5, "sample_at_start": True}
    for number in range(100):
        kind = ("sd15", "sdxl")[number % 2]
        config = write_config(tiny.folder, **tiny.config(kind, output=kind, **keys))
        if number % 10 == 0:
            shutil.rmtree(tiny.folder / kind, ignore_errors=True)
        with patched("", "--config", config, stderr=subprocess.DEVNULL) as process:
            assert process.stdout
            lines = b"".join(process.stdout.readline() for _ in range(moments.randint(1, 80)))
            start = time.monotonic()
            process.send_signal(signal.SIGTERM)
            result = Run(0, lines + process.stdout.read(), b"")
            waits_s.append(time.monotonic() - start)
        assert (process.returncode, result.last["type"], result.last["signal"]) == (143, "interrupted", "SIGTERM")
        if state := result.last["state_path"]:
            assert trainer.decode_state(Path(state))[1]["state"]["step"] == result.last["step"]
        assert result.last["step"] >= max([0, *steps_of(result.events, "progress")])
    assert max(waits_s) < 10
    print(f"\n100 stops: half within {sorted(waits_s)[50]:.2f} s, all within {max(waits_s):.2f} s")


@pytest.mark.torture
def test_no_flipped_bit_and_no_cut_of_a_state_goes_unnoticed(tiny: TinyRuns) -> None:
    print(f"\n{check_damage(tiny, step=61):,} damaged states")


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        for path, text in derived().items():
            path.write_text(text, "utf-8")
        sys.exit()
    side_by_side = importlib.util.find_spec("xdist") and "-s" not in sys.argv  # It would hide what -s is to show.
    workers = ["-n", "auto", "--dist", "worksteal"] if side_by_side else []
    sys.exit(pytest.main([__file__, "-q", *workers, *sys.argv[1:]]))
