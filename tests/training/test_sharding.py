"""The frozen base in shares (FSDP2): half of it in each of two processes, and the same training as with a whole one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from mapo_core import build_config
from mapo_core.backward import shares
from mapo_core.data_order import batches, split_held_out, step_groups
from mapo_core.errors import ConfigError
from mapo_core.runs import RunDir, read_events, run_status, start_run
from mapo_core.session import build_accelerator
from mapo_core.sharding import take_from_accelerate, with_shared_base

from .conftest import Run, lora_of, run_here
from .test_equalities import ALONG_THE_GRADIENT, METHODS
from .test_processes import MAIN, assert_equal, train_in_child, types, with_fault

SETTINGS: dict[str, Any] = {
    "optimizer": {**ALONG_THE_GRADIENT, "ema_decay": 0.9},
    "method": METHODS["mapo"],
    "data": {"held_out": 0.2, "flip": True},
    "validation": {"every_steps": 2, "sample_every_steps": 2},
    "checkpoint": {"every_steps": 1, "keep": 9},
}


def pair_of_runs(new_run: Run, name: str, steps: int = 4, **changes: Any) -> tuple[RunDir, RunDir]:
    """The same training with one process, and with two that share the base."""
    groups = {k: {**SETTINGS.get(k, {}), **changes.get(k, {})} for k in SETTINGS.keys() | changes.keys()}
    if "method" in changes:
        groups["method"] = changes["method"]
    training = {"train_batch_size": 2, "steps": steps, **groups.pop("training", {})}
    memory = groups.pop("memory", {})
    one = new_run(f"{name}-whole", training={**training, "gradient_accumulation_steps": 2}, **groups, memory=memory)
    two = new_run(
        f"{name}-shared",
        training={**training, "gradient_accumulation_steps": 1, "processes": 2},
        **groups,
        memory={**memory, "shard_base": True},
    )
    return one, two


def test_one_process_has_more_batches_than_the_other() -> None:
    """Of the 12 pairs every third is wide; so the runs below have steps in which either process has more to do."""
    train, _ = split_held_out([f"chosen-{i}.png" for i in range(12)], 0.2, seed=0)
    wide = [i % 3 == 0 for i in train]
    groups = islice(step_groups(wide, 4, 0), 3)
    assert [[len(batches(part, wide, 2)) for part in shares(group, 2)] for group in groups] == [[1, 1], [1, 2], [2, 1]]


def phase(run: RunDir, name: str) -> dict[str, Any]:
    return next(e for e in read_events(run.events) if e.get("phase") == name)


def test_a_shared_base_trains_as_a_whole_one(new_run: Run, shared_home: Path) -> None:
    one, two = pair_of_runs(new_run, "fsdp", training={"gradient_checkpointing": True})
    run_here(one)
    done = train_in_child(two, shared_home)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_equal(one, two)
    shared = phase(two, "base shared")
    assert len(shared["held_bytes"]) == 2
    assert all(0.49 < held / shared["base_bytes"] < 0.55 for held in shared["held_bytes"])
    assert phase(two, "ready")["base_shared"]
    assert not phase(one, "ready")["base_shared"]


MANY: dict[str, dict[str, Any]] = {
    "lokr": {"adapter": {"type": "lokr", "targets": ["attention", "conv"]}},
    "conv": {"adapter": {"targets": ["attention", "feed_forward", "conv"]}, "export": {"layout": "diffusers"}},
    "smaller": {"export": {"rank": 2}},
    "preflight": {"memory": {"preflight": "on"}},
    "split": {"memory": {"split_pairs": "on"}, "training": {"gradient_checkpointing": True}},
    "dco": {"method": METHODS["dco"]},
    "inpo": {"method": METHODS["inpo"], "optimizer": {**ALONG_THE_GRADIENT, "ema_decay": 0.0}},
    "smpo": {"method": METHODS["smpo"]},
    "text": {"adapter": {"text_encoder": True}},
}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_way_to_train_goes_with_a_shared_base(new_run: Run, shared_home: Path) -> None:
    runs = {name: pair_of_runs(new_run, f"fsdp-{name}", steps=3, **MANY[name]) for name in MANY}
    script = str(Path(__file__).with_name("train_these.py"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script]
    path = os.pathsep.join([str(MAIN.parents[1]), os.environ.get("PYTHONPATH", "")])
    variables = {**os.environ, "MAPO_HOME": str(shared_home), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command += [str(two.path) for _, two in runs.values()]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=1500, check=False)
    assert done.returncode == 0, done.stderr[-5000:]
    wrong: dict[str, str] = {}
    for name, (one, two) in runs.items():
        run_here(one)
        assert phase(two, "ready")["base_shared"]
        try:
            assert_equal(one, two, 2e-5 if name in ("inpo", "smpo") else 1e-5)
        except AssertionError as error:
            wrong[name] = str(error)
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_whose_process_was_killed_goes_on_to_the_same_weights(
    new_run: Run, shared_home: Path, tmp_path: Path
) -> None:
    whole = new_run("fsdp-uninterrupted", **_interrupted())
    assert train_in_child(whole, shared_home).returncode == 0
    run = new_run("fsdp-killed", **_interrupted())
    path = with_fault(tmp_path, "killed", step=3)
    assert train_in_child(run, shared_home, PYTHONPATH=path).returncode != 0
    assert run.latest_checkpoint() == run.checkpoint_path(2)
    done = train_in_child(run, shared_home)
    assert done.returncode == 0, done.stderr[-3000:]
    a, b = lora_of(whole), lora_of(run)
    assert all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_pause_pictures_in_it_and_a_stop(new_run: Run) -> None:
    """Only the main process knows of them, and the pictures need the others' shares."""
    training = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "steps": 10_000, "processes": 2}
    run = new_run("fsdp-asked", training=training, memory={"shard_base": True}, validation={"prompts": ["a star"]})
    handle = start_run(run, "tied", env={"OMP_NUM_THREADS": "1"})

    def wait_for(what: Callable[[], bool]) -> None:
        while not what():
            assert handle.is_alive(), run.log.read_text()[-3000:]
            time.sleep(0.05)

    try:
        wait_for(lambda: run_status(run).step >= 2)
        handle.request("pause")
        wait_for(lambda: "paused" in types(run))
        drawn = types(run).count("sample_saved")
        handle.request("sample")
        wait_for(lambda: types(run).count("sample_saved") > drawn)
        handle.request("resume")
        paused_at = run_status(run).step
        wait_for(lambda: run_status(run).step > paused_at)
        assert handle.request("stop")
        status = handle.wait(200)
    finally:
        handle.kill()
    assert status.state == "stopped", run.log.read_text()[-3000:]
    assert run.latest_checkpoint() is not None
    assert (run.export / f"{run.name}.safetensors").exists()


def _interrupted() -> dict[str, Any]:
    settings = {k: v for k, v in SETTINGS.items() if k != "checkpoint"}
    training = {"train_batch_size": 2, "gradient_accumulation_steps": 1, "steps": 5, "processes": 2}
    return {**settings, "training": training, "memory": {"shard_base": True}, "adapter": {"dropout": 0.1}}


# --- what is refused, and what accelerate's configurations mean -------------------------------------------------------


class Two:
    """An accelerator as far as the settings look at it."""

    num_processes = 2


@pytest.mark.parametrize(
    ("group", "values", "named"),
    [
        ("memory", {"base_precision": "int8"}, "memory.base_precision"),
        ("memory", {"offload": "on"}, "memory.offload"),
        ("memory", {"compile": True}, "memory.compile"),
        ("memory", {"channels_last": True}, "memory.channels_last"),
        ("method", METHODS["dreambooth"], "dreambooth"),
        ("adapter", {"type": "dora"}, "dora"),
    ],
)
def test_what_a_shared_base_cannot_do_is_refused(group: str, values: dict[str, Any], named: str) -> None:
    settings: dict[str, Any] = {"name": "r", "model": {"path": "m"}, "data": {"pairs": "p"}, group: values}
    config = build_config(settings)
    assert not with_shared_base(config, Two(), False).memory.shard_base  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match=named):
        with_shared_base(config, Two(), True)  # pyright: ignore[reportArgumentType]


def test_a_shared_base_has_no_rung_that_would_pack_it() -> None:
    config = build_config({"name": "r", "model": {"path": "m"}, "data": {"pairs": "p"}, "memory": {"plan": "8GB"}})
    from mapo_core.memory_plan import first_plan

    assert first_plan(config).base_precision == "int8"
    shared = with_shared_base(config, Two(), True)  # pyright: ignore[reportArgumentType]
    assert first_plan(shared).base_precision == "full"
    assert shared.memory.offload == "off"


CONFIGURATIONS = Path(__file__).parents[2] / "docs" / "accelerate"


def environment_of(name: str, *more: str) -> tuple[Any, dict[str, str]]:
    """What `accelerate launch --config_file` makes of a file: its arguments, and its processes' environment."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env

    given = ["--config_file", str(CONFIGURATIONS / name), "--main_process_port", "0", *more, "x.py"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(given))
    return args, prepare_multi_gpu_env(args)


@pytest.mark.parametrize("name", sorted(path.name for path in CONFIGURATIONS.glob("*.yaml")))
def test_accelerate_reads_every_configuration_of_the_docs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    args, environment = environment_of(name, "--machine_rank", "1", "--main_process_ip", "127.0.0.1")
    assert args.use_fsdp == ("fsdp" in name)
    assert args.multi_gpu == (not args.use_fsdp)
    assert int(args.nproc_per_node) == 2
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    assert take_from_accelerate() == args.use_fsdp
    assert "ACCELERATE_USE_FSDP" not in os.environ


@pytest.mark.parametrize("key", ["VERSION", "RESHARD_AFTER_FORWARD", "OFFLOAD_PARAMS", "ACTIVATION_CHECKPOINTING"])
def test_what_an_fsdp_configuration_asks_in_vain_is_refused(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in environment_of("fsdp.yaml")[1].items():
        monkeypatch.setenv(name, value)
    turned = {"2": "1", "true": "false", "false": "true"}
    monkeypatch.setenv(f"FSDP_{key}", turned[os.environ[f"FSDP_{key}"]])
    with pytest.raises(ConfigError, match=key.lower()):
        take_from_accelerate()


def test_deepspeed_is_refused_with_what_to_do(new_run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from mapo_core.config import load_config

    run = new_run("deepspeed")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ConfigError, match=r"fsdp\.yaml"):
        build_accelerator(load_config(run.config), run)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", ["ddp.yaml", "fsdp.yaml"])
def test_the_launch_commands_of_the_docs_run(new_run: Run, shared_home: Path, name: str) -> None:
    """As docs/multi_gpu.md gives them; the run's own training.device is the CPU."""
    run = new_run(f"launched-{name[:-5]}", training={"gradient_accumulation_steps": 1, "steps": 2})
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGURATIONS / name)]
    command += [str(MAIN), "train", str(run.path), "--lifetime", "detached"]
    variables = {**os.environ, "MAPO_HOME": str(shared_home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert run_status(run).state == "finished"
    assert phase(run, "ready")["processes"] == 2
    assert phase(run, "ready")["base_shared"] == (name == "fsdp.yaml")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_machines_train_one_run(new_run: Run, shared_home: Path) -> None:
    """Two launchers, one process each, that know nothing of each other but an address; here both are this machine."""
    run = new_run("machines", training={"gradient_accumulation_steps": 1, "steps": 2})
    variables = {**os.environ, "MAPO_HOME": str(shared_home), "OMP_NUM_THREADS": "1"}
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launchers = []
    for rank in (0, 1):
        command = [sys.executable, "-m", "accelerate.commands.launch"]
        command += ["--config_file", str(CONFIGURATIONS / "two_machines.yaml"), "--machine_rank", str(rank)]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port), "--num_processes", "2"]
        command += [str(MAIN), "train", str(run.path), "--lifetime", "detached"]
        launchers.append(subprocess.Popen(command, env=variables, stderr=subprocess.PIPE, text=True))
    try:
        for launcher in launchers:
            _, said = launcher.communicate(timeout=400)
            assert launcher.returncode == 0, said[-3000:]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert run_status(run).state == "finished"
    assert phase(run, "ready")["processes"] == 2
