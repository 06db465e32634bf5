# SPDX-License-Identifier: Apache-2.0
"""FastMIM-P: a network that grows with its images, in the middle of a run."""

import itertools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from test_resume import STEPS, child, digest, saved_step, start, told, wait_for

import fastmim
from fastmim.config import Config, update
from fastmim.errors import UserError
from fastmim.run_folder import Run
from fastmim.run_images import phases
from fastmim.run_network import build_network
from fastmim.runs import export
from fastmim.tasks.pretrain import Pretrain, build_mim
from fastmim.tasks.resolve import resolve
from fastmim.train.checkpoint import Checkpoints
from fastmim.train.optim import learning_rate

GROWING = {"phases": "32:0.4,48:0.35,40:0.25", "hide": "pixels"}
SWIN = {
    "model": "swin_tiny_patch4_window7_224",
    "model_args": {"embed_dim": 32, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
}
CMT = {
    "model": "cmt_small",
    "model_args": {"stem_dim": 8, "embed_dims": [16, 32, 64, 64], "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
}
NETWORKS: dict[str, dict[str, Any]] = {
    "vit": {"model": "vit_tiny_patch16_224", "model_args": {"embed_dim": 64, "depth": 2, "num_heads": 2}},
    "swin": SWIN,
    "pvt": {"model": "pvt_v2_b0"},
    "cmt": CMT,
    "convnext": {"model": "convnext_atto", "model_args": {"dims": [16, 32, 64, 64], "depths": [1, 1, 1, 1]}},
}


def resolved(**words: Any) -> Config:
    return update(Config(), {"global_batch": 16, "micro_batch": 16, "mean": (0.5,) * 3, "std": (0.2,) * 3, **words})


def task_of(config: Config) -> Pretrain:
    backbone = build_network(config, None)
    return Pretrain(build_mim(resolve(config, backbone, 100), backbone), resolve(config, backbone, 100))


def batch_of(side: int) -> dict[str, torch.Tensor]:
    images = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    return {"images": images, "keys": torch.tensor([1, 2])}


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("sizes", ["128:0.5,160:0.3,192:0.2", "192:0.5,128:0.5"])
def test_every_kind_of_network_goes_over(network: str, sizes: str) -> None:
    torch.manual_seed(0)
    config = resolved(phases=sizes, **NETWORKS[network])
    task = task_of(config)
    for number, (side, _) in enumerate(config.data.course):
        if number:
            before = {name: value.detach().clone() for name, value in task.named_parameters()}
            carry = task.enter(number)
            for name, value in task.named_parameters():
                torch.testing.assert_close(carry(name, before[name]), value.detach())
        loss, _ = task(batch_of(side))
        loss.backward()
        assert loss.isfinite()
        assert [name for name, value in task.named_parameters() if value.requires_grad and value.grad is None] == []
        task.zero_grad()


def test_the_micro_batch_follows_the_size_and_the_batch_does_not() -> None:
    config = resolved(phases="128:0.5,256:0.25,64:0.25", global_batch=64, micro_batch=16)
    found = phases(config, steps=100, world=2)
    assert [(phase.begin, phase.resolution, phase.micro_batch) for phase in found] == [
        (0, 128, 16), (50, 256, 4), (75, 64, 32),
    ]  # fmt: skip


def test_the_last_phase_has_a_step_in_a_run_of_a_few() -> None:
    config = resolved(phases="32:0.7,40:0.2,48:0.1", global_batch=16, micro_batch=16)
    for steps in (1, 2, 3, 4):
        assert [phase.resolution for phase in phases(config, steps, world=1) if phase.begin < steps][-1] == 48


@pytest.mark.parametrize("hide", ["pixels", "compact"])
def test_a_run_that_stopped_in_an_early_phase_is_exported_at_its_last_size(
    photos: Path, tmp_path: Path, hide: str
) -> None:
    out, masking = tmp_path / "run", "grid" if hide == "compact" else "random"
    start(photos, out, phases="32:0.7,64:0.3", hide=hide, masking=masking, keep=STEPS)
    for later in sorted((out / "checkpoints").iterdir())[10:]:
        shutil.rmtree(later)
    found, _ = Checkpoints(out / "checkpoints").latest()
    assert found is not None and found.state["phase"] == 0
    folder, difference = export(out)
    assert difference < 1e-5
    assert json.loads((folder / "config.json").read_text())["pretrained_cfg"]["input_size"] == [3, 64, 64]


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(photos, tmp_path_factory.mktemp("growing") / "run", **GROWING).path


def test_a_run_grows(uninterrupted: Path) -> None:
    run = Run(uninterrupted)
    lines = [line for line in run.metrics if line["kind"] == "train"]
    assert [line["phase"] for line in lines] == [0] * 16 + [1] * 14 + [2] * 10
    # The learning rate and the samples know nothing of phases.
    assert [line["samples"] for line in lines] == [16 * (step + 1) for step in range(STEPS)]
    assert [line["lr"] for line in lines] == [
        learning_rate(16 * step, 16 * STEPS, 1e-3, run.config.optim.warmup) for step in range(STEPS)
    ]
    losses = [line["loss"] for line in lines]
    for change in (16, 30):
        noise = max(abs(a - b) for a, b in itertools.pairwise(losses[5:]))
        assert losses[change] - losses[change - 1] <= noise
    config = json.loads((uninterrupted / "export/timm/config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 40, 40] and run.config.data.resolution == 40
    assert "32 x 32 px (40%), then 48 x 48 px (35%)" in (uninterrupted / "report.html").read_text()


def test_moments_go_over_too(uninterrupted: Path, photos: Path, tmp_path: Path) -> None:
    found, _ = Checkpoints(uninterrupted / "checkpoints").latest()
    assert found is not None and found.state["phase"] == 2
    name = "mim.backbone.backbone.model.pos_embed"
    assert found.tensors["model"][name].shape == found.tensors["optimizer"][f"exp_avg.{name}"].shape == (1, 26, 32)
    # Adam has counted all steps, and not begun anew.
    assert found.tensors["optimizer"][f"step.{name}"].item() == STEPS


def test_killed_around_every_change_it_ends_with_the_same_bits(
    photos: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out, rng, killed_at = tmp_path / "run", random.Random(0), []
    while saved_step(out) < STEPS:
        begun = (out / "config.yaml").exists()
        number = child(lambda: fastmim.resume(out) if begun else start(photos, out, workers=0, **GROWING))  # noqa: B023
        # Just before, at, and just after the steps 16 and 30 at which the size changes; and somewhere else.
        goals = [goal for goal in (7, 15, 16, 17, 23, 29, 30, 31, STEPS) if goal > saved_step(out)]
        done = 0
        while saved_step(out) < goals[0] and not done:
            done = os.waitpid(number, os.WNOHANG)[0]
            time.sleep(0.001)
        if done or goals[0] == STEPS:
            assert done or wait_for(number) == 0
            continue
        time.sleep(rng.random() * 0.005)
        os.killpg(number, signal.SIGKILL)
        wait_for(number)
        killed_at.append(saved_step(out))
    assert len(killed_at) >= 5 and killed_at == sorted(set(killed_at))
    fastmim.resume(out)
    assert digest(out) == digest(uninterrupted)
    assert told(out) == told(uninterrupted)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"phases": "128:0.5,160:0.4"}, "add up to 0.9"),
        ({"phases": "128:0.5,150:0.5"}, "cannot take images of 150 px"),
        ({"hide": "compact", "masking": "grid", "resolution": 96, **SWIN}, "half the side.*of 48 px"),
        ({"hide": "compact", "masking": "grid", "phases": "128:0.5,160:0.5", **SWIN}, "half the side.*of 80 px"),
        ({"phases": ()}, "phases are pairs"),
        ({"phases": "128:1.5,160:-0.5"}, "must be above 0"),
        ({"model": "mixer_s32_224", "phases": "224:0.5,256:0.5"}, "depend"),
    ],
)  # fmt: skip
def test_phases_that_do_not_work_are_refused_before_the_first_step(words: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        task_of(resolved(**words))
    assert "\n" not in str(caught.value)
