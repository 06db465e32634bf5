# SPDX-License-Identifier: Apache-2.0
"""The command line: its speed, its mistakes, and which of several settings wins."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from tyro.conf import Positional

import fastmim
from fastmim.cli import COMMANDS, main
from fastmim.cli_options import leaves
from fastmim.cli_output import finished
from fastmim.config import Config, PretrainSystemConfig, option_words

ROOT = Path(fastmim.__file__).parents[1]
COMMAND = [sys.executable, "-m", "fastmim"]
HEAVY = ("torch", "torchvision", "timm", "numpy", "PIL", "matplotlib")


def environment(*folders: Path) -> dict[str, str]:
    """This process's environment, in which ``folders`` and then this fastmim are found first."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT)))}


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), timeout=120)


def printed_config(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    """The options by flat name that ``fastmim pretrain WORDS --print-config`` would use."""
    assert main(["pretrain", "--print-config", *words]) == 0, capsys.readouterr().err
    sections = yaml.safe_load(capsys.readouterr().out)
    return {name: value for section in sections.values() for name, value in section.items()}


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """The one line with which ``argv`` is refused."""
    assert main(list(argv)) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("fastmim: ")
    assert output.err.count("\n") == 1 and output.err.endswith("\n")
    return output.err.strip()


# ---- Help


def test_help_and_mistakes_import_nothing_heavy() -> None:
    calls = [["--help"], *([name, "--help"] for name in COMMANDS), ["pretrain", "--epohcs", "3"], ["pretrain"]]
    code = f"import sys; from fastmim.cli import main; print('codes', [main(argv) for argv in {calls}])"
    result = run_python(f"{code}; print('heavy', [name for name in {HEAVY} if name in sys.modules])")
    assert result.stdout.splitlines()[-2:] == [f"codes {[0] * (len(calls) - 2) + [2, 2]}", "heavy []"]


@pytest.mark.parametrize("argv", [["--help"], ["pretrain", "--help"]])
def test_help_answers_at_once(argv: list[str]) -> None:
    """It takes 0.3 s on an idle core; the bound leaves room for a busy machine, and none for torch (4 s and more)."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([*COMMAND, *argv], check=True, capture_output=True, env=environment())
        seconds.append(time.perf_counter() - start)
        if seconds[-1] < 0.5:
            break
    assert min(seconds) < 1.5


def test_overview_names_every_command_and_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == main(["--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"fastmim {command.usage} ") for command in COMMANDS.values()]
    assert places == sorted(places)
    assert all(code in text for code in ("0 done", "2 something", "130 interrupted"))
    assert all(len(line) <= 100 for line in text.splitlines())


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_what_the_command_reads(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """tyro draws the help and fastmim reads the words: both must know the same ones."""
    assert main([name, "--help"]) == 0
    drawn = set(re.findall(r"(?<![\w-])--(?:no-)?([a-z][a-z0-9-]*)", capsys.readouterr().out)) - {"help", "config"}
    schema = COMMANDS[name].schema
    fields = {"epochs": None, **leaves(PretrainSystemConfig)} if name == "resume" else leaves(schema)
    known = {word for word, field in fields.items() if field is None or Positional not in field.metadata}
    assert drawn == {word.replace("_", "-") for word in known} - {"config"}
    assert all(field.description for field in leaves(schema).values())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"fastmim {fastmim.__version__}\n"


# ---- Mistakes


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ("pretrian", "unknown command 'pretrian'; nearest: pretrain"),
        ("--epochs 3", "unknown option '--epochs'"),
        ("pretrain a --epohcs 3", "unknown option 'epohcs'; nearest: epochs"),
        ("pretrain a --mask-ration=0.5", "unknown option 'mask-ration'; nearest: mask_ratio"),
        ("pretrain a epohcs=3", "unknown option 'epohcs'; nearest: epochs"),
        ("pretrain a -e 3", "unknown option '-e'"),
        ("pretrain a --no-epochs", "unknown option 'no-epochs'; nearest: epochs"),
        ("pretrain a --recipe fastmin", "unknown recipe 'fastmin'; nearest: fastmim"),
        ("pretrain a --epochs", "--epochs needs a value"),
        ("pretrain a --epochs --flip", "--epochs needs a value"),
        ("pretrain a --crop-scale 0.5", "--crop-scale needs 2 values"),
        ("pretrain a --epochs abc", "command line: epochs = 'abc': Input should be a valid number"),
        ("pretrain a --epochs -3", "command line: epochs = '-3': Input should be greater than 0"),
        ("pretrain a --mask-ratio 1", "command line: mask_ratio = '1': Input should be less than 1"),
        (
            "pretrain a --hide foo",
            "command line: hide = 'foo': Input should be 'pixels', 'tokens', 'drop' or 'compact'",
        ),
        ("pretrain a --flip=maybe", "command line: flip = 'maybe': Input should be a valid boolean"),
        ("pretrain a --no-flip=yes", "--no-flip takes no value"),
        ("pretrain a --model-args {a:", "--model-args, line 1: "),
        ("pretrain a --model-args [1]", "command line: model_args = [1]: Input should be a valid dictionary"),
        ("pretrain", "pretrain needs DATA"),
        ("probe", "probe needs RUN|MODEL"),
        ("probe run", "probe needs DATA"),
        ("probe run data --repeats 1", "command line: repeats = '1': Input should be greater than or equal to 2"),
        ("probe run data --methods knn,linar", "unknown method 'linar'; nearest: linear"),
        (
            "probe run data --labels 10%,120%",
            "labels = '120%' is not a share between 0 and 100 % or a number of each class",
        ),
        ("probe run data more", "unexpected word 'more'"),
        ("probe run data --repeat 3", "unknown option 'repeat'; nearest: repeats"),
        ("resume", "resume needs RUN"),
        ("resume run --workers two", "command line: workers = 'two': Input should be a valid integer"),
        ("report", "report needs RUN..."),
        ("report run --out page.html", "--out is for a comparison"),
        ("export", "export needs RUN"),
        ("models --limit 0", "command line: limit = '0': Input should be greater than or equal to 1"),
        ("doctor now", "unexpected word 'now'"),
    ],
)
def test_mistake_is_one_line(argv: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert refusal(capsys, *argv.split()).startswith(f"fastmim: {expected}")


def test_exit_code_of_the_process() -> None:
    result = subprocess.run([*COMMAND, "pretrian"], capture_output=True, text=True, env=environment())
    assert (result.returncode, result.stdout) == (2, "")
    assert (
        result.stderr
        == "fastmim: unknown command 'pretrian'; nearest: pretrain, prepare, predict; see: fastmim --help\n"
    )


def test_interrupt_is_one_line(tmp_path: Path) -> None:
    """The process waits for a pipe that says nothing, so it is certain to be inside the command."""
    pipe = tmp_path / "config.yaml"
    os.mkfifo(pipe)
    call = [*COMMAND, "pretrain", "--config", str(pipe)]
    with subprocess.Popen(call, stderr=subprocess.PIPE, text=True, env=environment()) as process, pipe.open("w"):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "fastmim: interrupted\n")


def test_reader_that_has_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    call = [*COMMAND, "pretrain", "--print-config"]
    result = subprocess.run(call, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment())
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


# ---- Which setting wins


def test_command_line_beats_file_beats_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("epochs: 7\noptim: {warmup: 0.5, weight_decay: 1e-3}\ndata: pictures\n")
    config = printed_config(capsys, "--config", str(file), "--warmup", "0.25", "block=1")
    assert config["epochs"] == 7
    assert config["warmup"] == 0.25
    assert config["weight_decay"] == 0.001
    assert config["paths"] == ["pictures"]
    assert config["block"] == 1
    assert config["betas"] == [0.9, 0.95]


@pytest.mark.parametrize(
    "words",
    [
        "a b --mask-ratio 0.5 --no-flip --crop-scale 0.3 0.9 --lr none --model resnet50",
        "--mask_ratio=0.5 a --no_flip b --crop_scale=0.3,0.9 --lr=1 --lr=None --model=resnet50",
        "mask_ratio=0.5 data=a data=b flip=false crop-scale=0.3,0.9 model=resnet50",
        "--crop-scale 0.3,0.9 --flip=off --mask-ratio 0.9 --mask-ratio 0.5 model=resnet50 -- a b",
    ],
)
def test_spellings_mean_the_same(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    expected = {"paths": ["a", "b"], "mask_ratio": 0.5, "flip": False, "crop_scale": [0.3, 0.9], "lr": None}
    config = printed_config(capsys, *words.split())
    assert config | expected | {"model": "resnet50"} == config


def test_values_that_look_like_words(capsys: pytest.CaptureFixture[str]) -> None:
    config = printed_config(capsys, "--out", "runs/a=b", "--model", "x=y", "./c=d", "--", "--epochs", "e=f")
    assert config["out"] == "runs/a=b"
    assert config["model"] == "x=y"
    assert config["paths"] == ["./c=d", "--epochs", "e=f"]
    config = printed_config(capsys, "--model-args", '{"drop_path_rate": 1e-1, "depths": [2, 2]}')
    assert config["model_args"] == {"drop_path_rate": 0.1, "depths": [2, 2]}


def test_printed_config_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.yaml"
    words = ["model=1e3", "out=no", "data=010", "data=2024-01-01", "device=true", "lr=1e-7", "model_args={a: [1, {}]}"]
    first = printed_config(capsys, *words, "--config", os.devnull)
    assert main(["pretrain", *words, "--print-config"]) == 0
    file.write_text(capsys.readouterr().out)
    assert printed_config(capsys, "--config", str(file)) == first
    assert first["model"] == "1e3" and first["out"] == "no" and first["paths"] == ["010", "2024-01-01"]


def test_config_of_a_run_folder_reads_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run writes its config.yaml with plain ``yaml.safe_dump``."""
    tree = Config().model_dump(mode="json")
    tree["data"]["paths"], tree["optim"]["lr_per_256"], tree["system"]["out"] = ["images"], 1e-5, "runs/a"
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    flat = {name: value for section in tree.values() for name, value in section.items()}
    assert printed_config(capsys, "--config", str(file)) == flat
    assert set(flat) == {"paths" if word == "data" else word for word in option_words()}


# ---- YAML


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 3\nepochs: 4\n", "{file}, line 2: key 'epochs' stands twice"),
        ("epochs: 3\noptim: {epochs: 4}\n", "{file}: 'epochs' is set twice"),
        ("mask-ratio: 0.5\nmask_ratio: 0.5\n", "{file}: 'mask_ratio' is set twice"),
        ("lr: &x 1\nmin_lr: *x\n", "{file}, line 1: anchors and aliases are not read"),
        ("data: {mean: [1, 1, 1], <<: {flip: no}}\n", "unknown option '<<'"),
        ("epohcs: 3\n", "unknown option 'epohcs'; nearest: epochs"),
        ("optim: {mask_ratio: 0.5}\n", "{file}: 'mask_ratio' stands under 'optim', but belongs under 'method'"),
        ("- epochs\n- 3\n", "{file}: holds a list, but needs options"),
        ("3\n", "{file}: holds a int, but needs options"),
        ("1: 3\n", "{file}, line 1: key 1 is not a word"),
        ("epochs: [1\n", "{file}, line 2: "),
        ("epochs: !!python/name:os.system\n", "{file}, line 1: could not determine a constructor"),
        ("epochs: many\n", "{file}: epochs = 'many': Input should be a valid number"),
        ("epochs: '\x07'\n", "{file}: unacceptable character"),
        ("[" * 5000, "{file}: nested too deeply"),
        ("#" * 1_000_001, "--config {file}: larger than 1000000 bytes"),
    ],
)
def test_yaml_traps(text: str, expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.yaml"
    file.write_text(text)
    assert refusal(capsys, "pretrain", "--config", str(file)).startswith(f"fastmim: {expected.format(file=file)}")


def test_yaml_that_is_not_there_or_not_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    missing, binary = tmp_path / "none.yaml", tmp_path / "binary.yaml"
    binary.write_bytes(b"\xff\xfe\x00")
    assert refusal(capsys, "pretrain", "--config", str(missing)).endswith("none.yaml: No such file or directory")
    assert refusal(capsys, "pretrain", "--config", str(tmp_path)).endswith("Is a directory")
    assert refusal(capsys, "pretrain", "--config", str(binary)).endswith("not UTF-8 text")


def test_yaml_scalars_are_those_of_yaml_1_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "options.yaml"
    file.write_text("\ufefflr: 1e-3\nflip: no\nout: no\nmodel: 2024-01-01\nmodel_args: {a: 5e-1, b: on, c: 1:30}\n")
    config = printed_config(capsys, "--config", str(file))
    assert config["lr"] == 0.001
    assert config["flip"] is False
    assert config["out"] == "no"
    assert config["model"] == "2024-01-01"
    assert config["model_args"] == {"a": 0.5, "b": "on", "c": "1:30"}
    file.write_text("")
    assert printed_config(capsys, "--config", str(file)) == printed_config(capsys)


# ---- Doctor


def test_doctor_says_what_is_broken_and_how_to_mend_it(tmp_path: Path) -> None:
    """A torch that does not load, and an extra that is not installed, as the package's own metadata names it."""
    (tmp_path / "torch.py").write_text("raise ImportError('libcudart.so.99: cannot open shared object file')\n")
    metadata = tmp_path / "fastmim-9.9.9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: fastmim\nVersion: 9.9.9\nRequires-Dist: torch>=2\nProvides-Extra: fast\n"
        "Requires-Dist: no-such-package>=1; extra == 'fast'\nRequires-Dist: pillow; extra == 'fine'\n"
    )
    result = subprocess.run(
        [*COMMAND, "doctor"], capture_output=True, text=True, env=environment(tmp_path), cwd=tmp_path, timeout=60
    )
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    assert result.returncode == 1 and result.stderr == ""
    assert "problem torch libcudart.so.99: cannot open shared object file" in lines
    assert "ok fastmim 9.9.9" in lines
    assert lines[lines.index("note [fast] missing: no-such-package") + 1] == '-> pip install "fastmim[fast]"'
    assert "ok [fine] pillow" in lines
    assert lines[-1].startswith("training is not possible here")


def test_doctor_finds_this_machine_ready(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert f"ok torch {torch.__version__}" in lines
    assert any(line.startswith("ok bf16 works on") for line in lines)
    assert any(line.startswith("ok images JPEG, PNG and WebP") for line in lines)
    assert lines[-1] == "ready to train"


# ---- Commands that need torch


def test_models_lists_families_then_networks(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert next(line for line in lines if line.startswith("swin_transformer ")).split()[1].isdigit()
    assert main(["models", "vit_tiny_patch16", "--limit", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:2] == ["vit_tiny_patch16_224", "5.5"]
    assert lines[1].split()[3:] == ["pixels", "tokens", "drop", "192/16"]
    assert lines[-1].startswith("1 of ")
    assert main(["models", "resnet1[48]*"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:3]] == ["resnet14t", "resnet18"]
    assert refusal(capsys, "models", "resnt18").startswith("fastmim: no model matches 'resnt18'; nearest: resnet18")


def test_dry_run_says_what_would_happen_and_leaves_nothing(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["pretrain", str(photos), "model=test_vit", "resolution=64", "--dry-run"]) == 0
    fields = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert fields["network"] == "test_vit"
    assert fields["images"] == "39" and fields["held"].split() == ["out", "1"]
    assert list(tmp_path.iterdir()) == []


def test_unknown_model_is_one_line(photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nearest: resnet18" in refusal(capsys, "pretrain", str(photos), "--model", "resnt18", "--dry-run")


def test_run_from_start_to_export(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One run through the commands, with words of every spelling."""
    run, out = tmp_path / "run", tmp_path / "exported"
    words = [f"data={photos}", "--model=test_vit", "resolution=32", "--epochs", "1", "global-batch=16", "--workers=0"]
    assert main(["pretrain", *words, "--no-tensorboard", f"out={run}"]) == 0
    assert f"fastmim probe {run} LABELLED_IMAGES" in capsys.readouterr().out
    assert "mask_ratio" in refusal(capsys, "resume", str(run), "mask_ratio=0.5")
    assert main(["resume", str(run), "epochs=2", "--workers", "0"]) == 0
    assert yaml.safe_load((run / "config.yaml").read_text())["optim"]["epochs"] == 2
    assert main(["report", str(run)]) == 0
    assert main(["export", str(run), "--out", str(out)]) == 0
    assert f"local-dir:{out}" in capsys.readouterr().out
    assert {"config.json", "model.safetensors"} <= {file.name for file in out.iterdir()}


def test_interrupted_run_says_how_to_continue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "status.json").write_text('{"state": "interrupted"}')
    assert finished(tmp_path) == 130
    assert capsys.readouterr().err == f"fastmim: interrupted; to continue: fastmim resume {tmp_path}\n"
