# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: whole or not there, damage found, the newest whole one taken, modes as the umask says."""

import os
import random
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastmim.errors import UserError
from fastmim.train.checkpoint import Checkpoints, NotFiniteError


def content(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((64, 8), value)}, "optimizer": {"exp_avg.w": torch.full((64, 8), -value)}}


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path / "checkpoints")
    store.save(7, content(1 / 3), {"loss_sum": 0.1, "samples": 21})
    found, damage = store.latest()
    assert found is not None and damage == []
    assert found.step == 7 and found.state["loss_sum"] == 0.1 and found.state["samples"] == 21
    assert torch.equal(found.tensors["model"]["w"], content(1 / 3)["model"]["w"])
    assert torch.equal(found.tensors["optimizer"]["exp_avg.w"], content(1 / 3)["optimizer"]["exp_avg.w"])


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path, keep=2)
    for step in (1, 5, 9, 100):
        store.save(step, content(step), {})
    assert store.steps() == [9, 100]


def test_every_kind_of_damage_is_found_and_the_one_before_is_taken(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    store = Checkpoints(whole)
    store.save(1, content(1), {})
    store.save(2, content(2), {})
    names = sorted(path.name for path in (whole / "step-00000002").iterdir())
    assert names == ["SHA256SUMS", "model.safetensors", "optimizer.safetensors", "state.json"]
    rng = random.Random(0)
    for case in range(300):
        copy = tmp_path / "copy"
        shutil.copytree(whole, copy)
        victim = copy / "step-00000002" / names[case % 4]
        data = bytearray(victim.read_bytes())
        match case % 5:
            case 0 | 1 | 2:
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
            case 3:
                del data[rng.randrange(len(data)) :]
            case 4:
                data = bytearray()
        victim.write_bytes(data)
        found, damage = Checkpoints(copy).latest()
        assert found is not None and found.step == 1, f"{victim.name}, case {case}: not noticed"
        assert len(damage) == 1 and "step-00000002" in damage[0]
        shutil.rmtree(copy)


def test_swapped_and_missing_files_are_found(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, content(1), {})
    store.save(2, content(2), {})
    shutil.copy(tmp_path / "step-00000001" / "model.safetensors", tmp_path / "step-00000002" / "model.safetensors")
    found, _ = store.latest()
    assert found is not None and found.step == 1
    shutil.rmtree(tmp_path / "step-00000002")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000003")
    found, damage = store.latest()
    assert found is not None and found.step == 1 and "holds step 1" in damage[0]
    (tmp_path / "step-00000009").mkdir()
    found, damage = store.latest()
    assert found is not None and found.step == 1 and "has no SHA256SUMS" in damage[0]
    (tmp_path / "step-00000001" / "optimizer.safetensors").unlink()
    with pytest.raises(UserError, match="no checkpoint is whole"):
        store.latest()


def test_weights_that_are_not_finite_are_never_written(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, content(1), {})
    with pytest.raises(NotFiniteError, match="model: w"):
        store.save(2, content(float("nan")), {})
    assert store.steps() == [1] and [p.name for p in tmp_path.iterdir()] == ["step-00000001"]


def test_a_full_disk_leaves_the_old_ones_and_nothing_half(tmp_path: Path) -> None:
    store = Checkpoints(tmp_path)
    store.save(1, content(1), {})
    # RLIMIT_FSIZE gives the errors of a full disk, in a process of its own.
    script = (
        "import resource, signal, sys, torch\n"
        "from pathlib import Path\n"
        "from fastmim.train.checkpoint import Checkpoints\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))\n"
        "try:\n"
        "    Checkpoints(Path(sys.argv[1])).save(2, {'model': {'w': torch.zeros(1 << 20)}}, {})\n"
        "except OSError as error:\n"
        "    sys.exit(error.errno)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=False, timeout=120)
    assert done.returncode == 27  # EFBIG
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    found, _ = store.latest()
    assert found is not None and found.step == 1


def test_file_modes_follow_the_umask(tmp_path: Path) -> None:
    former = os.umask(0o022)
    try:
        folder = Checkpoints(tmp_path).save(1, content(1), {})
    finally:
        os.umask(former)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o644}


def test_killed_while_saving_nothing_torn_is_visible(tmp_path: Path) -> None:
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from fastmim.train.checkpoint import Checkpoints\n"
        "store = Checkpoints(Path(sys.argv[1]))\n"
        "found, damage = store.latest()\n"
        "assert not damage, damage\n"
        "step = found.step if found else 0\n"
        "print('ready', flush=True)\n"
        "while True:\n"
        "    step += 1\n"
        "    store.save(step, {'model': {'w': torch.full((1 << 18,), float(step))}}, {})\n"
    )
    newest, rng = 0, random.Random(1)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE)
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        time.sleep(0.3 + rng.random() / 2)
        process.kill()
        process.wait()
        process.stdout.close()
        found, damage = Checkpoints(tmp_path).latest()
        assert found is not None and damage == []
        assert found.step > newest, "no progress between two kills: the test would prove nothing"
        assert (found.tensors["model"]["w"] == found.step).all()
        newest = found.step


def test_a_newer_format_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmim.train.checkpoint.FORMAT", 99)
    Checkpoints(tmp_path).save(1, content(1), {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="newer fastmim"):
        Checkpoints(tmp_path).latest()
