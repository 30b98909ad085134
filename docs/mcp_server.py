"""A Model Context Protocol server: programs with a language model check, start, watch and stop runs of train_lora.py.

It needs `pip install mcp` (version 2) in the environment of the requirements. It speaks over stdin and stdout. All that
it knows of a run stands in the output folder's events.jsonl. So a run outlives its server, and the next server can tell
how it goes and stop it. Only `sample` needs the server that started the run, because it holds the run's stdin.
"""

import contextlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen
from typing import Any

import anyio
from mcp.server import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

Json = dict[str, Any]

SCRIPT = Path(__file__).resolve().parent.parent / "train_lora.py"
LAST_TYPES = ("validated", "complete", "interrupted", "error")
TAIL_BYTES = 1 << 20  # A log can be long; the newest events are in its last part.
SILENCE_S = 60  # A run sends an event at least every 10 seconds. After this silence, one that is no child is gone.

server = MCPServer("train_lora", instructions="Call check_config before start.", log_level="WARNING")
children: dict[Path, Popen[bytes]] = {}  # The runs that this server started, by output folder.


def command(config: str, settings: Json | None, *options: str) -> list[str]:
    overrides = [f"--set={key}={json.dumps(value)}" for key, value in (settings or {}).items()]
    return [sys.executable, str(SCRIPT), "--config", str(Path(config).absolute()), *overrides, *options]


def parse_events(data: bytes) -> list[Json]:
    """Return the events in these lines, without lines that are torn."""
    events = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError):
            events.append(json.loads(line))
    return events


def newest_events(folder: Path) -> list[Json]:
    path = folder / "events.jsonl"
    if not path.exists():
        return []
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        return parse_events(file.read())


def silence_s(folder: Path) -> float:
    return time.time() - (folder / "events.jsonl").stat().st_mtime


def is_running(folder: Path) -> bool:
    if child := children.get(folder):
        return child.poll() is None
    events = newest_events(folder)
    return bool(events) and events[-1]["type"] not in LAST_TYPES and silence_s(folder) < SILENCE_S


async def wait_for(folder: Path, limit_s: float, matches: Callable[[Json], bool]) -> Json | None:
    """Return the first of the newest events that matches; None if the run or the time ends before it comes."""
    with anyio.move_on_after(limit_s):
        while True:
            has_ended = not is_running(folder)
            if (found := next(filter(matches, newest_events(folder)), None)) or has_ended:
                return found
            await anyio.sleep(0.2)
    return None


def send(folder: Path, name: str, **fields: Any) -> str:
    """Send a request to a run; return its id, which is empty if it is not a run of this server."""
    child, key = children.get(folder), str(time.time_ns())
    if not child or not child.stdin or child.poll() is not None:
        return ""
    with contextlib.suppress(OSError):  # The run ends just now.
        child.stdin.write(json.dumps({"id": key, "request": name, **fields}).encode() + b"\n")
    return key


@server.tool()
async def check_config(config: str, settings: Json | None = None) -> Json:
    """Check a config file, with `settings` in place of its keys. Return the event `validated`, or `error` and why."""
    done = await anyio.run_process(command(config, settings, "--validate-only"), stdin=DEVNULL, check=False)
    if events := parse_events(done.stdout):
        return events[-1]
    raise ToolError(done.stderr[-2000:].decode(errors="replace"))


@server.tool()
async def start(config: str, settings: Json | None = None, dry_run: bool = True) -> Json:
    """Start a run, or go on with a stopped one. With dry_run only check. The other tools take the answer's `output`."""
    checked = await check_config(config, settings)
    if dry_run or checked["type"] != "validated":
        return {"started": False, "checked": checked}
    folder = Path(checked["config"]["output_path"]).resolve()
    if is_running(folder):
        raise ToolError(f"A run goes on in {folder}.")
    folder.mkdir(parents=True, exist_ok=True)
    words, before = command(config, settings, "--listen"), checked["timestamp"]
    with (folder / "stderr.log").open("ab") as log:
        child = Popen(words, bufsize=0, stdin=PIPE, stdout=DEVNULL, stderr=log, start_new_session=True)
    children[folder] = child
    run = await wait_for(folder, 30, lambda event: event["type"] == "run" and event["timestamp"] > before)
    facts = {"started": True, "output": str(folder), "pid": child.pid, "exit_code": child.poll()}
    return facts | {"run_id": run and run["run_id"]}  # It is null while a large model loads; `status` has it later.


@server.tool()
def status(output: str) -> Json:
    """Tell of an output folder whether its run goes on, the newest progress, and the last other events."""
    folder = Path(output).resolve()
    if not (events := newest_events(folder)):
        raise ToolError(f"No run has written events to {folder}.")
    newest = {event["type"]: event for event in events}
    others = [event for event in events if event["type"] != "progress" and "idle_seconds" not in event]
    facts = {"running": is_running(folder), "seconds_since_last_event": round(silence_s(folder))}
    return facts | {"run": newest.get("run"), "progress": newest.get("progress"), "last_events": others[-5:]}


@server.tool()
async def sample(output: str, prompts: list[str] | None = None, wait_s: float = 600) -> Json:
    """Draw pictures with the LoRA as it is now, and wait for their paths. Without prompts, the config's are drawn."""
    folder = Path(output).resolve()
    if not (key := send(folder, "sample", **({"prompts": prompts} if prompts else {}))):
        raise ToolError(f"No run that this server started goes on in {folder}.")
    answer = await wait_for(folder, wait_s, lambda event: event.get("id") == key and event["state"] != "accepted")
    if answer is None or answer["state"] == "refused":
        raise ToolError(answer["message"] if answer else "There was no answer in time. Ask for the status.")
    return answer


@server.tool()
async def stop(output: str) -> Json:
    """Stop a run and save its work; the same start goes on from there. Return its status."""
    folder = Path(output).resolve()
    if not send(folder, "stop") and is_running(folder):
        (folder / "stop").touch()
    await wait_for(folder, 15, lambda _: False)
    return status(output)


if __name__ == "__main__":
    server.run()
