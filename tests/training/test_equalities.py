"""What must be equal is equal: batch sizes, accumulation, processes, resume; and what must not change does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mapo_core.adapter import lora_state
from mapo_core.noising import seed_of
from mapo_core.runs import RunDir, read_events
from mapo_core.session import prepare
from mapo_core.trainer import loop

from .conftest import Run, lora_of, relative_difference, run_here

# Adam divides a gradient by its own size; where that is rounding error alone, the sign of a step would be chance. With
# an eps this large it steps along the gradient, and equal gradients give equal weights.
ALONG_THE_GRADIENT = {"eps": 1.0, "learning_rate": 0.5, "weight_decay": 0.0}
# The links multiply the rounding error of K (1e-7 of a K of 1, that of an untrained model) by these factors; with the
# published ones (1000 and more) equal sums differ by some 1e-5 for that reason alone.
METHODS = {
    "mapo": {"type": "mapo", "logit_scale": 100.0},
    "sft": {"type": "sft"},
    "diffusion_dpo": {"type": "diffusion_dpo", "beta": 100.0},
    "dco": {"type": "dco", "beta": 50.0},
    "dreambooth": {"type": "dreambooth", "class_prompt": "a star", "class_images": 3},
    "inpo": {"type": "inpo", "beta": 50.0, "inversion_steps": 4},
    "smpo": {"type": "smpo", "beta": 50.0, "gamma": 2.0, "inversion_steps": 3},
}
MAIN = Path(__file__).parents[2] / "mapo_core" / "__main__.py"


@pytest.mark.parametrize("method", METHODS)
def test_one_batch_of_four_equals_four_of_one(new_run: Run, method: str) -> None:
    weights, losses = [], []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        run = new_run(
            f"{method}-{batch}x{accumulation}",
            method=METHODS[method],
            training={"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "steps": 3},
            data={"flip": True, "caption_dropout": 0.3},
            optimizer=ALONG_THE_GRADIENT,
            checkpoint={"every_steps": 1},
        )
        run_here(run)
        weights.append(lora_of(run, step=1))  # later steps multiply the rounding errors of the ones before
        losses.append([e["loss"] for e in read_events(run.events) if e["type"] == "step"])
    # DPO's gradient is the difference of two nearly equal ones, so its relative rounding error is larger.
    bound = 2e-5 if method in {"diffusion_dpo", "inpo", "smpo"} else 1e-5
    for other in (0, 1):
        assert relative_difference(weights[other], weights[2]) < bound
        assert losses[other] == pytest.approx(losses[2], rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_gradients_of_a_step_do_not_depend_on_how_it_is_cut(new_run: Run, method: str) -> None:
    gradients = [
        first_gradients(
            new_run(
                f"g-{method}-{batch}",
                method=METHODS[method],
                training={"train_batch_size": batch, "gradient_accumulation_steps": 4 // batch},
            )
        )
        for batch in (1, 2, 4)
    ]
    for other in gradients[1:]:
        scale = max(g.abs().max() for g in other)
        worst = max((a - b).abs().max() for a, b in zip(gradients[0], other, strict=True))
        assert worst / scale < 1e-5


def first_gradients(run: RunDir) -> list[torch.Tensor]:
    """The gradients of the first step, with up weights that are not zero, so that all gradients are there."""
    from mapo_core.backward import backward_batch
    from mapo_core.data_order import batches, step_groups

    session = prepare(run, None, None)
    generator = torch.Generator().manual_seed(0)
    for parameter in session.parameters:
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    buckets = [session.pairs.entries[i].bucket for i in session.train_indices]
    group = next(step_groups(buckets, 4, session.config.seed))
    assert len({buckets[d.index] for d in group}) == 1
    for draws in batches(group, buckets, session.config.training.train_batch_size):
        backward_batch(session, draws, 4)
    return [p.grad.clone() for p in session.parameters]


def test_equal_images_leave_only_the_chosen_term(new_run: Run, drawn_pairs: list[dict[str, str]]) -> None:
    same = [{**r, "rejected": r["chosen"]} for r in drawn_pairs]
    mapo = new_run("same-mapo", pairs=same, method={"type": "mapo", "margin_weight": 0.1})
    sft = new_run("same-sft", pairs=same, method={"type": "sft"})
    other = new_run("other-mapo", method={"type": "mapo", "margin_weight": 0.1})
    a, b, c = first_gradients(mapo), first_gradients(sft), first_gradients(other)
    scale = max(g.abs().max() for g in b)
    assert max((x - y).abs().max() for x, y in zip(a, b, strict=True)) / scale < 1e-5
    assert max((x - y).abs().max() for x, y in zip(c, b, strict=True)) / scale > 1e-2  # else this could not fail


def test_all_lora_weights_change_and_no_base_weight_does(new_run: Run) -> None:
    session = prepare(new_run("changes", adapter={"targets": ["attention", "feed_forward", "conv"]}), None, None)
    trained = {n for n, p in session.model.unet.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in session.model.unet.named_parameters()}
    loop(session)
    for name, parameter in session.model.unet.named_parameters():
        assert torch.equal(before[name], parameter) == (name not in trained), name
    assert trained
    assert all("lora_" in name for name in trained)
    assert all(p.dtype == torch.float32 for p in session.parameters)
    assert lora_state(session.model.unet).keys()


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [("adamw", "cosine"), ("adamw8bit", "linear"), ("adamw8bit", "constant")]
)
def test_stopping_and_resuming_gives_bit_for_bit_the_weights_of_an_uninterrupted_run(
    new_run: Run, optimizer: str, schedule: str
) -> None:
    settings = {
        "training": {"steps": 6, "train_batch_size": 1, "gradient_accumulation_steps": 3},
        "optimizer": {"type": optimizer, "schedule": schedule, "warmup_steps": 2, "learning_rate": 1e-3},
        "adapter": {"rank": 16, "targets": ["attention", "feed_forward"], "dropout": 0.2},
        "data": {"flip": True, "caption_dropout": 0.3},
        "validation": {"every_steps": 2},
        "checkpoint": {"every_steps": 3, "keep": 5},
    }
    whole = new_run(f"whole-{optimizer}-{schedule}", **settings)
    run_here(whole)
    parts = new_run(f"parts-{optimizer}-{schedule}", **settings)
    run_here(parts, before_training=stop_after(parts, 2))
    assert parts.latest_checkpoint().name == "step_00000002"
    assert read_events(parts.events)[-1]["type"] == "run_stopped"
    assert (parts.export / f"{parts.name}.safetensors").exists()
    torch.randn(1000)  # whatever happened in between
    run_here(parts)
    a, b = lora_of(whole), lora_of(parts)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)
    curves = [
        [(e["step"], e["loss"], e["learning_rate"]) for e in read_events(r.events) if e["type"] == "step"]
        for r in (whole, parts)
    ]
    assert curves[0] == curves[1]
    assert len(curves[0]) == 6


def stop_after(run: RunDir, step: int):
    """Request a stop so that the run ends after `step`: a thread that follows the events would race, this does not."""
    import mapo_core.trainer as trainer

    real = trainer.train_step

    def arrange(_: RunDir) -> None:
        def counted(session, group, buckets):
            if session.step == step and session.watcher is not None and session.run.path == run.path:
                run.request("stop")
                assert session.watcher.stop_requested.wait(5)
                trainer.train_step = real
            return real(session, group, buckets)

        trainer.train_step = counted

    return arrange


def test_two_processes_equal_one_with_twice_the_accumulation(new_run: Run, shared_home: Path) -> None:
    one = new_run(
        "one-process",
        optimizer=ALONG_THE_GRADIENT,
        method=METHODS["mapo"],
        training={"train_batch_size": 1, "gradient_accumulation_steps": 4, "steps": 3},
    )
    run_here(one)
    two = new_run(
        "two-processes",
        optimizer=ALONG_THE_GRADIENT,
        method=METHODS["mapo"],
        training={"train_batch_size": 1, "gradient_accumulation_steps": 2, "steps": 3},
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={29500 + seed_of(os.getpid()) % 2000}", str(MAIN), "train", str(two.path)]
    environment = {**os.environ, "MAPO_HOME": str(shared_home), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--lifetime", "detached"], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    ready = next(e for e in read_events(two.events) if e.get("phase") == "ready")
    assert ready["processes"] == 2
    assert ready["pairs_per_step"] == 4
    assert read_events(two.events)[-1]["type"] == "run_finished"
    a, b = ([e["loss"] for e in read_events(r.events) if e["type"] == "step"] for r in (one, two))
    assert a == pytest.approx(b, rel=1e-5)
    assert relative_difference(lora_of(one), lora_of(two)) < 1e-5
