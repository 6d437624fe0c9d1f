"""The divergence guard where several processes train: all of them go back, to the same state, and resume exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from mapo_core.runs import RunDir

from .conftest import Run
from .test_guard import WILD, cartoons, events_with_superseded, new_cartoon_run, of_type
from .test_optimizers import load_all
from .test_processes import MAIN, train_in_child

__all__ = ["cartoons", "new_cartoon_run"]

# What each process writes down: its weights and optimizer before and after every return, and at the end. The main one
# can be told to stop in a step.
WITNESS = """
import os
if "RANK" in os.environ:
    import hashlib, json, pathlib
    import mapo_core.guarding as guarding
    import mapo_core.trainer as trainer

    seen, place = [], pathlib.Path(os.environ["WITNESS"]) / (os.environ["RANK"] + ".json")

    def state(session):
        tensors = [p.detach() for p in session.parameters]
        for values in session.optimizer.state_dict()["state"].values():
            tensors += [v for v in values.values() if hasattr(v, "detach")]
        digest = hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()
        return {"step": session.step, "state": digest, "rate": session.optimizer.param_groups[0]["lr"]}

    def note(what, *states):
        seen.append([what, *states])
        place.write_text(json.dumps(seen))

    back, finish, step = guarding._go_back, trainer.finish, trainer.train_step

    def noted_back(session, verdict):
        before = state(session)
        back(session, verdict)
        note("back", before, state(session))

    def noted_finish(session):
        note("end", state(session))
        finish(session)

    def stopping(session, group, buckets):
        if session.watcher is not None and session.step == int(os.environ.get("STOP_AT", -1)):
            session.run.request("stop")
            assert session.watcher.stop_requested.wait(20)
        return step(session, group, buckets)

    guarding._go_back, trainer.finish, trainer.train_step = noted_back, noted_finish, stopping
"""


def train_two(run: RunDir, home: Path, folder: Path, **environment: str) -> list[list[Any]]:
    """Train with two processes; what each of them wrote down."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(WITNESS)
    path = os.pathsep.join([str(folder), str(MAIN.parents[1])])
    done = train_in_child(run, home, PYTHONPATH=path, WITNESS=str(folder), **environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def settings_of(method: str) -> dict[str, Any]:
    training = {**WILD["training"], "train_batch_size": 2, "processes": 2}
    guard = {"learning_rate_factor": 0.02, "window_steps": 4}
    return {**WILD, "training": training, "method": {"type": method}, "guard": guard}


def test_both_processes_go_back_to_the_same_state(new_cartoon_run: Run, shared_home: Path, tmp_path: Path) -> None:
    run = new_cartoon_run("two-guarded", **settings_of("diffusion_dpo"))
    main, other = train_two(run, shared_home, tmp_path / "witness")
    assert main == other  # same steps, weights, averages and rates, before and after
    returns = [entry[1:] for entry in main if entry[0] == "back"]
    said = [e for e in events_with_superseded(run) if e["type"] == "rolled_back"]
    assert [(b["step"], a["step"]) for b, a in returns] == [(e["from_step"], e["step"]) for e in said]
    assert returns
    for before, after in returns:
        assert before["step"] > after["step"]
        assert before["state"] != after["state"]
        assert after["rate"] == pytest.approx(0.02 * before["rate"])
    assert main[-1][0] == "end"
    assert main[-1][1]["step"] == 12
    measured = of_type(run, "evaluated")
    assert measured[-1]["chosen_mse"] < 1.1 * measured[-1]["base"]["chosen_mse"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["mapo", "diffusion_dpo"])
def test_two_processes_resume_exactly_after_a_return(
    new_cartoon_run: Run, shared_home: Path, tmp_path: Path, method: str
) -> None:
    whole = new_cartoon_run(f"two-whole-{method}", **settings_of(method))
    train_two(whole, shared_home, tmp_path / "whole")
    assert of_type(whole, "rolled_back")
    parts = new_cartoon_run(f"two-parts-{method}", **settings_of(method))
    train_two(parts, shared_home, tmp_path / "first", STOP_AT="10")
    assert of_type(parts, "run_stopped")
    train_two(parts, shared_home, tmp_path / "second")
    a, b = load_all(whole), load_all(parts)
    assert all(torch.equal(a[k], b[k]) for k in a)
