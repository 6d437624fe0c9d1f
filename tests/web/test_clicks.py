"""A hundred clicks on real trainings: whatever is pressed when, nothing is left running and every run can go on."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from mapo_core import load_config
from mapo_core.pairs import read_pairs
from mapo_core.runs import checkpoint_step, list_runs, queue_entries, read_events, run_status

from .test_api import few_pairs, zombies_of

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

CLICKS, RUNS, STEPS = 100, 6, 12
SETTINGS = """
training: {steps: 12, train_batch_size: 1, gradient_accumulation_steps: 1, gradient_checkpointing: false}
adapter: {rank: 2}
validation: {every_steps: 0, sample_every_steps: 0}
checkpoint: {every_steps: 3}
"""
ACTIONS = ("start", "stop", "stop", "stop", "resume", "resume", "pause", "save_now")
RESTING = ("finished", "stopped", "created", "interrupted")  # a second stop interrupts, as it says


def processes_of(home: Path, but: int) -> dict[int, str]:
    """The processes that work for a home folder, by id, with their command lines."""
    found = {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            own = f"MAPO_HOME={home}\0".encode() in (place / "environ").read_bytes() + b"\0"
            words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if own and int(place.name) != but:
            found[int(place.name)] = words
    return found


def quiet(app: Any, seconds: float) -> None:
    """Wait until nothing waits, trains or is left of it."""
    deadline = time.monotonic() + seconds
    while queue_entries(app.home) or processes_of(app.home, app.process.pid):
        assert time.monotonic() < deadline, (queue_entries(app.home), processes_of(app.home, app.process.pid), app.log)
        time.sleep(0.2)


def check_steps(run: Any) -> int:
    """The last step of a run whose steps follow one another from where each of its processes began."""
    step = 0
    for event in read_events(run.events):
        if event["type"] in ("run_started", "run_resumed"):
            step = event["step"]
        elif event["type"] == "step":
            assert event["step"] == step + 1, (run.name, event)
            step += 1
    return step


def test_a_hundred_clicks_on_real_trainings(
    start_app: Callable[..., Any], client_of: Callable[..., Any], tmp_path: Path
) -> None:
    if not Path("/proc/self/environ").exists():
        pytest.skip("looks for processes that are left over in /proc")
    app = start_app()
    client, dice = client_of(app), random.Random(11)
    pairs = few_pairs(tmp_path)
    names: list[str] = []
    clicked: Counter[tuple[str, str]] = Counter()
    refused: list[str] = []
    began = time.monotonic()
    for click in range(CLICKS):
        action = dice.choice(ACTIONS)
        if action == "start" and len(names) >= RUNS:
            action = "resume"
        if action == "start" or not names:
            made = client.predict(f"click {click}", "demo", pairs, SETTINGS, api_name="/start_run")
            names.append(made["name"])
            clicked["start", "-"] += 1
        else:
            states = {one["name"]: one["state"] for one in client.predict(api_name="/list_runs")}
            busy = [name for name in names if states[name] in ("starting", "running", "paused", "stopping")]
            name = dice.choice(busy if busy and dice.random() < 0.6 else names)
            clicked[action, states[name]] += 1
            try:
                client.predict(name, api_name=f"/{action}" if action == "save_now" else f"/{action}_run")
            except Exception as refusal:  # "is finished", "is not being trained": what a person would be told
                refused.append(str(refusal))
        time.sleep(dice.uniform(0, 4))  # people take their time, so that a click meets every moment of a run
    took = time.monotonic() - began
    for name in names:
        if client.predict(name, api_name="/run_status")["state"] not in RESTING:
            client.predict(name, api_name="/stop_run")
    quiet(app, 300)
    ended = Counter(run_status(run).state for run in list_runs(app.home))
    print(f"\n{CLICKS} clicks on {len(names)} runs in {took:.0f} s: {dict(clicked)}")
    print(f"refused {len(refused)}; ended as {dict(ended)}, checkpoints {checkpoints(app.home)}")
    assert set(ended) <= set(RESTING), [(run.name, run_status(run)) for run in list_runs(app.home)]
    assert zombies_of(app.process.pid) == []
    assert [words for words in refused if "server.log" in words] == []
    assert "Traceback" not in app.log
    check_resumable(app, client, names)


def checkpoints(home: Path) -> dict[str, list[int]]:
    return {run.name: [checkpoint_step(path) for path in run.list_checkpoints()] for run in list_runs(home)}


def check_resumable(app: Any, client: Any, names: list[str]) -> None:
    """Every run can be read, goes on from what it has, and comes to its end with a LoRA that can be opened."""
    assert sorted(run.name for run in list_runs(app.home)) == sorted(names)
    before = checkpoints(app.home)
    starts = {run.name: len(read_events(run.events)) if run.events.exists() else 0 for run in list_runs(app.home)}
    for run in list_runs(app.home):
        assert load_config(run.config).training.steps == STEPS
        assert len(read_pairs(run.pairs)) == 3
        if run.events.exists():
            check_steps(run)
        if run_status(run).state != "finished":
            client.predict(run.name, api_name="/resume_run")
    quiet(app, 900)
    for run in list_runs(app.home):
        status = run_status(run)
        assert (status.state, status.step, check_steps(run)) == ("finished", STEPS, STEPS), (run.name, status)
        again = [e for e in read_events(run.events)[starts[run.name] :] if e["type"] in ("run_started", "run_resumed")]
        assert [e["step"] for e in again] in ([], [max(before[run.name], default=0)]), run.name
        with safe_open(run.export / f"{run.name}.safetensors", "pt") as lora:
            assert len(list(lora.keys())) > 10
    assert zombies_of(app.process.pid) == []
    assert "Traceback" not in app.log
