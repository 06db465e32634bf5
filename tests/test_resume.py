# SPDX-License-Identifier: Apache-2.0
"""An interrupted run ends with the very bits of the uninterrupted one: killed, stopped, with any number of workers."""

import hashlib
import json
import os
import random
import shutil
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fastmim
from fastmim.errors import UserError
from fastmim.run_folder import Run
from fastmim.train.checkpoint import Checkpoints

# Dropout and drop path, so that their randomness is part of what must come back; accumulation, for steps of two parts.
TINY: dict[str, Any] = {
    "model": "vit_tiny_patch16_224",
    "model_args": {
        "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "proj_drop_rate": 0.1, "drop_path_rate": 0.1,
    },
    "resolution": 32, "decoder_dim": 32, "hide": "drop", "global_batch": 16, "micro_batch": 8, "lr": 1e-3,
    "log_every": 1, "checkpoint_every": 1e-6, "device": "cpu", "tensorboard": False, "holdout": 0.1, "eval_every": 0.25,
}  # fmt: skip
STEPS = 40


def start(photos: Path, out: Path, **words: Any) -> Run:
    options: dict[str, Any] = {**TINY, "epochs": STEPS * 16 / 36, "workers": 0, **words}
    return fastmim.pretrain(data=str(photos), out=str(out), **options)


def digest(run: Path) -> str:
    return digest_of(run, STEPS)


def digest_of(run: Path, steps: int) -> str:
    """Of everything that the last checkpoint holds, but the time it took."""
    found, damage = Checkpoints(run / "checkpoints").latest()
    assert found is not None and damage == [] and found.step == steps
    whole = hashlib.sha256()
    for group in sorted(found.tensors):
        for name, tensor in sorted(found.tensors[group].items()):
            whole.update(name.encode() + tensor.numpy().tobytes())
    return whole.hexdigest()


def told(run: Path) -> list[tuple[Any, ...]]:
    """The metrics, without times and speeds."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        (line["kind"], line["step"], line.get("loss"), line.get("val_loss"), line.get("effective_rank"))
        for line in lines
    ]


def child(work: Callable[[], object]) -> int:
    """Runs ``work`` in a forked process with a group of its own; returns its number."""
    with warnings.catch_warnings():
        # From 3.12 on: a forked child of a process with threads. The threads here are idle and hold nothing.
        warnings.simplefilter("ignore", DeprecationWarning)
        number = os.fork()
    if number:
        return number
    code = 70
    try:
        os.setsid()
        work()
        code = 0
    finally:
        os._exit(code)


def wait_for(number: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(number, 0)[1])


def saved_step(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step-*")), default=0)


@pytest.fixture(scope="module")
def uninterrupted(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return start(photos, tmp_path_factory.mktemp("uninterrupted") / "run").path


@pytest.mark.parametrize("workers", [0, 2])
def test_killed_again_and_again_it_ends_with_the_same_bits(
    workers: int, photos: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out, rng, kills = tmp_path / "run", random.Random(workers), 0
    while True:
        before = saved_step(out)
        if (out / "config.yaml").exists():
            number = child(lambda: fastmim.resume(out, changes={"workers": workers}))
        else:
            number = child(lambda: start(photos, out, workers=workers))
        # Never before the first new step is saved: a kill that costs nothing would prove nothing.
        goal, done = before + rng.randint(1, 6), 0
        while saved_step(out) < min(goal, STEPS) and not done:
            done = os.waitpid(number, os.WNOHANG)[0]
            time.sleep(0.002)
        assert not done or saved_step(out) == STEPS, "the run ended on its own, and not at its last step"
        if saved_step(out) == STEPS:
            assert done or wait_for(number) == 0
            break
        time.sleep(rng.random() * 0.02)
        os.killpg(number, signal.SIGKILL)
        wait_for(number)
        kills += 1
        assert saved_step(out) > before
    assert kills >= 6
    assert digest(out) == digest(uninterrupted)
    assert told(out) == told(uninterrupted)
    assert Run(out).status["state"] == "finished" and (out / "report.html").exists()


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")  # two cores are enough to test it
def test_any_number_of_workers_gives_the_same_bits(photos: Path, uninterrupted: Path, tmp_path: Path) -> None:
    for workers in (1, 3):
        assert digest(start(photos, tmp_path / str(workers), workers=workers).path) == digest(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_to_the_whole_group_saves_and_stops(
    number: signal.Signals, photos: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    # Checkpoints only when stopping: what is saved is what the signal saved.
    process = child(lambda: start(photos, out, workers=2, checkpoint_every=60))
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_bytes().splitlines()) < 6:
        time.sleep(0.005)
    os.killpg(process, number)
    assert wait_for(process) == 0
    status = Run(out).status
    assert status["state"] == "interrupted" and 0 < status["step"] < STEPS and number.name in status["message"]
    assert saved_step(out) == status["step"]
    fastmim.resume(out)
    assert digest(out) == digest(uninterrupted) and told(out) == told(uninterrupted)


def test_killed_before_the_first_checkpoint_it_begins_again(photos: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = child(lambda: start(photos, out, checkpoint_every=60))
    while not (out / "metrics.jsonl").exists() or len((out / "metrics.jsonl").read_bytes().splitlines()) < 6:
        time.sleep(0.005)
    os.killpg(process, signal.SIGKILL)
    wait_for(process)
    assert saved_step(out) == 0
    fastmim.resume(out)
    assert digest(out) == digest(uninterrupted) and told(out) == told(uninterrupted)


def test_resuming_a_finished_run_changes_nothing(uninterrupted: Path) -> None:
    def state() -> dict[str, tuple[int, int]]:
        return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in uninterrupted.rglob("*")}

    before = state()
    fastmim.resume(uninterrupted)
    assert state() == before


def test_a_damaged_checkpoint_gives_way_to_the_one_before(uninterrupted: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(uninterrupted, out)
    victim = out / "checkpoints" / f"step-{STEPS:08d}" / "model.safetensors"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    (out / "report.html").unlink()
    fastmim.resume(out)
    assert digest(out) == digest(uninterrupted)


def test_changed_images_and_changed_mathematics_are_refused(photos: Path, uninterrupted: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "run", tmp_path / "images"
    shutil.copytree(photos, images)
    process = child(lambda: start(images, out))
    while saved_step(out) < 2:
        time.sleep(0.005)
    os.killpg(process, signal.SIGKILL)
    wait_for(process)
    with pytest.raises(UserError, match=r"mask_ratio was 0\.75 and cannot become 0.5"):
        fastmim.resume(out, changes={"mask_ratio": 0.5})
    (images / "000.jpg").unlink()
    with pytest.raises(UserError, match=r"have changed since .* --allow-data-change"):
        fastmim.resume(out)
    assert fastmim.resume(out, changes={"allow_data_change": True}).status["state"] == "finished"


def test_two_processes_cannot_work_on_one_run(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = child(lambda: start(photos, out, epochs=400))
    while saved_step(out) < 1:
        time.sleep(0.005)
    try:
        with pytest.raises(UserError, match="in use by another process"):
            fastmim.resume(out)
        with pytest.raises(UserError, match="in use by another process"):
            start(photos, out, overwrite=True)
    finally:
        os.killpg(process, signal.SIGKILL)
        wait_for(process)


def test_two_ranks_learn_what_one_learns(photos: Path, tmp_path: Path) -> None:
    """Without dropout, whose noise belongs to a rank; the rest differs only by the order of sums."""
    plain = {"model_args": {**TINY["model_args"], "proj_drop_rate": 0.0, "drop_path_rate": 0.0}, "epochs": 20 * 16 / 36}
    one = start(photos, tmp_path / "one", **plain)

    def rank(number: int) -> None:
        os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        os.environ["MASTER_PORT"] = str(20000 + os.getppid() % 20000)
        start(photos, tmp_path / "two", **plain)

    processes = [child(lambda number=number: rank(number)) for number in range(2)]  # type: ignore[misc]
    assert [wait_for(process) for process in processes] == [0, 0]
    ours, theirs = (Checkpoints(tmp_path / name / "checkpoints").latest()[0] for name in ("one", "two"))
    assert ours is not None and theirs is not None and ours.step == theirs.step == 20
    for name, tensor in ours.tensors["model"].items():
        torch.testing.assert_close(theirs.tensors["model"][name], tensor, rtol=0, atol=1e-4)
    losses = [
        [line["loss"] for line in Run(tmp_path / name).metrics if line["kind"] == "train"] for name in ("one", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert one.status["state"] == "finished"
