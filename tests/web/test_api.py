"""The training actions through gradio_client, and what random starting and stopping leaves behind."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mapo_core.runs import list_runs, queue_entries, read_events, run_status

pytestmark = [pytest.mark.browser, pytest.mark.timeout(900)]  # no browser, but a server

STEPS = (
    "training: {steps: %d, train_batch_size: 4, gradient_accumulation_steps: 1}\nvalidation: {sample_every_steps: 0}"
)


def wait(client: Any, name: str, states: set[str], seconds: float = 180) -> dict[str, Any]:
    deadline = time.monotonic() + seconds
    while (status := client.predict(name, api_name="/run_status"))["state"] not in states:
        assert time.monotonic() < deadline, status
        time.sleep(0.3)
    return status


def few_pairs(folder: Path) -> str:
    """Two folders of small pictures."""
    for side, level in (("chosen", 200), ("rejected", 40)):
        (folder / side).mkdir()
        for i in range(3):
            picture = Image.effect_noise((64, 64), 20 + level / 4).convert("RGB")
            picture.save(folder / side / f"{i}.png")
            (folder / side / f"{i}.txt").write_text(f"noise number {i}")
    return str(folder)


def zombies_of(pid: int) -> list[int]:
    """Ended children that nobody has taken the end of, of a process and of all that it started."""
    found, parents = [], {}
    for place in Path("/proc").glob("[0-9]*"):
        try:
            fields = (place / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(place.name)] = (int(fields[1]), fields[0])
    for one, (_, state) in parents.items():
        above = one
        while above in parents and above != pid:
            above = parents[above][0]
        if above == pid and state == "Z":
            found.append(one)
    return found


def test_a_demo_run_through_the_api(app: Any, few: str, client_of: Any) -> None:
    """Start, poll, stop, resume to the end, download: with the real trainer."""
    client = client_of(app)
    started = client.predict("by program", "demo", few, STEPS % 40, api_name="/start_run")
    assert "12 pairs" in started["message"]
    name = started["name"]
    deadline = time.monotonic() + 300
    while client.predict(name, api_name="/run_status")["step"] < 2:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert "asked to stop" in client.predict(name, api_name="/stop_run")["message"]
    stopped = wait(client, name, {"stopped"})
    assert stopped["lora"]
    client.predict(name, api_name="/resume_run")
    done = wait(client, name, {"finished"}, 400)
    assert done["step"] == 40
    assert [e["type"] for e in read_events(app.home / "runs" / name / "events.jsonl")].count("run_resumed") == 1
    path = Path(client.predict(name, api_name="/download_lora"))
    from safetensors import safe_open

    with safe_open(path, "pt") as lora:
        assert len(list(lora.keys())) > 10
    curves = client.predict(name, api_name="/run_curves")
    assert [point["step"] for point in curves["loss"]] == list(range(1, 41))


def test_wrong_arguments_are_explained(quick_app: Any, client_of: Any) -> None:
    client = client_of(quick_app)
    for arguments, words in (
        (("x", "demo", "no such set", ""), "no such set"),
        (("x", "/no/such/model.safetensors", "demo", ""), "no model at"),
        (("x", "demo", "demo", "training: {stepz: 3}"), "did you mean training.steps"),
        (("x", "demo", "demo", "training: ["), "neither YAML nor JSON"),
        (("a/b", "demo", "demo", ""), "cannot be a file name"),
    ):
        with pytest.raises(Exception, match=words):
            client.predict(*arguments, api_name="/start_run")
    with pytest.raises(Exception, match="no run"):
        client.predict("../x", api_name="/run_status")
    with pytest.raises(Exception, match="no run"):
        client.predict("nobody", api_name="/download_lora")
    assert "Traceback" not in quick_app.log


def test_a_hundred_clicks_in_random_order(start_app: Any, stand_in: Path, client_of: Any, tmp_path: Path) -> None:
    """Starts, stops, pauses and resumes as they come: every run stays whole, and no process is left."""
    app = start_app(entry=stand_in, env={"STAND_IN_STEP_S": "0.03"})
    pairs = few_pairs(tmp_path)
    client, dice, names = client_of(app), random.Random(7), []
    refused: list[str] = []
    for click in range(100):
        action = dice.choice(["start", "stop", "stop", "resume", "pause", "save_now"])
        if action == "start" or not names:
            if len(names) < 12:
                names.append(client.predict(f"run {click}", "demo", pairs, STEPS % 25, api_name="/start_run")["name"])
            continue
        try:
            api_name = f"/{action}" if action == "save_now" else f"/{action}_run"
            client.predict(dice.choice(names), api_name=api_name)
        except Exception as refusal:  # "is finished", "is not being trained": what a person would be told
            refused.append(str(refusal))
    for name in names:
        if client.predict(name, api_name="/run_status")["state"] not in ("finished",):
            client.predict(name, api_name="/stop_run")
    for name in names:
        wait(client, name, {"finished", "stopped", "created", "failed"})
    deadline = time.monotonic() + 30
    while queue_entries(app.home) or any(run_status(run).alive for run in list_runs(app.home)):
        assert time.monotonic() < deadline, queue_entries(app.home)
        time.sleep(0.2)
    for run in list_runs(app.home):
        status = run_status(run)
        assert status.state in ("finished", "stopped", "created"), (run.name, status)
        steps = [e["step"] for e in read_events(run.events) if e["type"] == "step"]
        assert steps == list(range(1, len(steps) + 1)), run.name
    assert [words for words in refused if "server.log" in words] == [], app.log
    assert zombies_of(app.process.pid) == []
    assert "Traceback" not in app.log
