# SPDX-License-Identifier: Apache-2.0
"""An export is what timm and transformers load, in every way that they are asked to."""

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from fastmim.backbones.adapter import TimmBackbone, build
from fastmim.errors import UserError
from fastmim.export import export_state, export_timm, verify

MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)
CARD = {"Images": "1,234 of folder shelves/", "Epochs": "400", "license": "cc-by-4.0"}


@dataclass(frozen=True)
class Case:
    """An architecture made tiny, and the layers that its feature map does not need."""

    architecture: str
    args: dict[str, Any]
    resolution: int
    unused: tuple[str, ...]
    first_conv: str
    other_size: dict[str, Any] | None


CASES = {
    "vit": Case("vit_tiny_patch16_224", {"depth": 3, "embed_dim": 48}, 128, (), "patch_embed.proj", {"img_size": 224}),
    "vit-pooled": Case(
        "vit_tiny_patch16_224",
        {"depth": 3, "embed_dim": 48, "global_pool": "avg", "drop_path_rate": 0.1},
        128,
        ("fc_norm.weight", "fc_norm.bias"),
        "patch_embed.proj",
        {"img_size": 224},
    ),
    "swin": Case(
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 24, "depths": (1, 2, 1, 1), "num_heads": (1, 2, 4, 8)},
        128,
        (),
        "patch_embed.proj",
        {"img_size": 224, "window_size": 7},
    ),
    "cmt": Case(
        "cmt_small",
        {"stem_dim": 8, "embed_dims": (8, 16, 32, 32), "depths": (1, 2, 1, 1), "mlp_ratio": 2.0},
        128,
        (),
        "stem.0.conv",
        {"img_size": 224},
    ),
    "resnet": Case("test_resnet", {}, 96, (), "conv1.0", None),
    "convnext": Case("test_convnext", {}, 96, ("head.norm.weight", "head.norm.bias"), "stem.0", None),
    "efficientnet": Case(
        "test_efficientnet",
        {},
        96,
        (
            "conv_head.weight",
            *(f"bn2.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")),
        ),
        "conv_stem",
        None,
    ),
}


@dataclass(frozen=True)
class Exported:
    case: Case
    folder: Path
    network: TimmBackbone
    images: Tensor


def trained(case: Case) -> TimmBackbone:
    """A network unlike any fresh one: every number of its state is moved."""
    network = build(case.architecture, case.resolution, model_args=case.args).eval()
    generator = torch.Generator().manual_seed(1)
    for value in network.weights().values():
        if value.is_floating_point():
            value += 0.05 * torch.rand(value.shape, generator=generator)
    return network


def export(case: Case, network: TimmBackbone, folder: Path, weights: dict[str, Tensor] | None = None) -> Path:
    return export_timm(
        network.architecture,
        network.create_args,
        network.weights() if weights is None else weights,
        folder,
        resolution=case.resolution,
        mean=MEAN,
        std=STD,
        card=CARD,
    )


@pytest.fixture(scope="module", params=CASES)
def exported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    case = CASES[request.param]
    network = trained(case)
    folder = export(case, network, tmp_path_factory.mktemp("export") / "timm")
    images = torch.randn(2, 3, case.resolution, case.resolution, generator=torch.Generator().manual_seed(2))
    return Exported(case, folder, network, images)


def assert_same_weights(found: dict[str, Tensor], exported: Exported, skip: tuple[str, ...] = ()) -> None:
    expected = exported.network.weights()
    for key in expected.keys() - set(skip):
        assert torch.equal(found[key], expected[key]), key


def test_timm_loads_the_same_network(exported: Exported) -> None:
    loaded = timm.create_model(f"local-dir:{exported.folder}", pretrained=True).eval()
    assert loaded.num_classes == 0
    assert loaded.state_dict().keys() - exported.network.weights().keys() == set(exported.case.unused)
    assert_same_weights(loaded.state_dict(), exported)
    assert verify(exported.folder, exported.network, exported.images) == 0


def test_verify_sees_another_network(exported: Exported) -> None:
    def other(images: Tensor) -> list[Tensor]:
        return [map_ + 0.25 for map_ in exported.network(images)]

    assert verify(exported.folder, other, exported.images) == pytest.approx(0.25, abs=1e-4)


def test_timm_puts_a_new_head_on_it(exported: Exported) -> None:
    loaded = timm.create_model(f"local-dir:{exported.folder}", pretrained=True, num_classes=7).eval()
    assert_same_weights(loaded.state_dict(), exported)
    assert loaded(exported.images).shape == (2, 7)


def test_timm_takes_features_only(exported: Exported) -> None:
    loaded = timm.create_model(f"local-dir:{exported.folder}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        maps, expected = loaded(exported.images), exported.network(exported.images)[-1]
    last = maps[-1]
    if exported.case.architecture.startswith("swin"):
        last = last.permute(0, 3, 1, 2)  # timm's feature pyramid of a Swin is NHWC
    if hasattr(exported.network.model, "norm"):
        last = exported.network.model.norm(last.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)  # it ends before the last norm
    torch.testing.assert_close(last, expected)


# timm 1.0.31 resizes a relative position table by old ways of indexing.
@pytest.mark.filterwarnings(r"ignore:torch.searchsorted\(\). input value tensor is non-contiguous:UserWarning")
@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence for multidimensional indexing:UserWarning")
def test_timm_takes_another_size(exported: Exported) -> None:
    size = exported.case.other_size
    loaded = timm.create_model(f"local-dir:{exported.folder}", pretrained=True, **(size or {})).eval()
    resized = tuple(key for key in exported.network.weights() if re.search("pos_embed|relative_position|pos_bias", key))
    assert_same_weights(loaded.state_dict(), exported, skip=resized)
    side = size["img_size"] if size else 160
    assert loaded(torch.rand(1, 3, side, side)).isfinite().all()


def test_timm_takes_five_channels(exported: Exported) -> None:
    loaded = timm.create_model(f"local-dir:{exported.folder}", pretrained=True, in_chans=5).eval()
    first = f"{exported.case.first_conv}.weight"
    assert_same_weights(loaded.state_dict(), exported, skip=(first,))
    expected = exported.network.weights()[first]
    torch.testing.assert_close(loaded.state_dict()[first][:, :3], expected * 3 / 5)


def test_timm_knows_how_to_prepare_images(exported: Exported) -> None:
    loaded = timm.create_model(f"local-dir:{exported.folder}", pretrained=True)
    data = timm.data.resolve_model_data_config(loaded)
    side = exported.case.resolution
    assert (data["mean"], data["std"], list(data["input_size"])) == (list(MEAN), list(STD), [3, side, side])
    assert data["interpolation"] == exported.network.model.pretrained_cfg["interpolation"]


@pytest.fixture(scope="module")
def transformers() -> Any:
    return pytest.importorskip("transformers", reason="the optional extra 'dev' brings transformers")


def test_transformers_loads_the_same_network(exported: Exported, transformers: Any) -> None:
    loaded = transformers.AutoModel.from_pretrained(exported.folder).eval()
    state = {key.removeprefix("timm_model."): value for key, value in loaded.state_dict().items()}
    assert_same_weights(state, exported)


def test_transformers_puts_a_new_head_on_it(exported: Exported, transformers: Any) -> None:
    loaded = transformers.AutoModelForImageClassification.from_pretrained(
        exported.folder, num_labels=7, ignore_mismatched_sizes=True
    ).eval()
    state = {key.removeprefix("timm_model."): value for key, value in loaded.state_dict().items()}
    assert_same_weights(state, exported)
    assert loaded(exported.images).logits.shape == (2, 7)


def test_transformers_prepares_images(exported: Exported, transformers: Any) -> None:
    processor = transformers.AutoImageProcessor.from_pretrained(exported.folder)
    side = exported.case.resolution
    grey = Image.new("RGB", (200, 300), (128, 128, 128))
    pixels = processor(grey, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, side, side)
    expected = [(128 / 255 - mean) / std for mean, std in zip(MEAN, STD, strict=True)]
    torch.testing.assert_close(pixels.mean((0, 2, 3)), torch.tensor(expected), atol=1e-3, rtol=0)


def test_config_keeps_what_builds_and_not_what_trains(exported: Exported) -> None:
    config = json.loads((exported.folder / "config.json").read_text())
    assert config["architecture"] == exported.case.architecture
    assert not {"num_classes", "drop_path_rate"} & config["model_args"].keys()
    assert not {"url", "hf_hub_id", "license", "label_offset"} & config["pretrained_cfg"].keys()
    with safe_open(exported.folder / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_readme_tells_what_it_is(exported: Exported) -> None:
    text = (exported.folder / "README.md").read_text()
    assert f'"local-dir:{exported.folder.as_posix()}"' in text
    assert "- Images: 1,234 of folder shelves/" in text
    assert "Licence of these weights: cc-by-4.0." in text and 'license: "cc-by-4.0"' in text
    for key in exported.case.unused:
        assert f"- `{key}`" in text
    assert ("## Not pre-trained" in text) == bool(exported.case.unused)
    assert text.count("import fastmim.backbones.cmt") == (2 if exported.case.architecture.startswith("cmt") else 0)


def test_the_readme_that_is_written_runs(exported: Exported) -> None:
    text = (exported.folder / "README.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    exec(compile(code, "README.md", "exec"), {})


def test_same_weights_same_bytes_whatever_was_random_before(tmp_path: Path) -> None:
    case = CASES["convnext"]  # its last norm is not pre-trained, so it holds what the builder drew
    network = trained(case)
    torch.manual_seed(1)
    first = export(case, network, tmp_path / "a")
    torch.manual_seed(2)
    expected = torch.rand(3)
    torch.manual_seed(2)
    second = export(case, network, tmp_path / "b")
    assert torch.equal(torch.rand(3), expected), "the caller's generator was disturbed"
    assert (first / "model.safetensors").read_bytes() == (second / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("vit", {"blocks.1.attn.qkv.weight": None}, "needs are missing: blocks.1.attn.qkv.weight"),
        ("vit", {"cls_token": None}, "needs are missing: cls_token"),
        ("resnet", {"layer4.0.bn1.running_mean": None}, "needs are missing: layer4.0.bn1.running_mean"),
        ("vit", {"mask_token": torch.zeros(1)}, "does not have: mask_token"),
        ("vit", {"norm.weight": torch.zeros(5)}, r"norm.weight is \(5,\), but \(48,\)"),
    ],
)
def test_weights_that_do_not_fit_are_an_error_and_the_old_export_stays(
    name: str, change: dict[str, Tensor | None], message: str, tmp_path: Path
) -> None:
    case = CASES[name]
    network = trained(case)
    folder = export(case, network, tmp_path / "timm")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    changed = {key: value for key, value in (network.weights() | change).items() if value is not None}
    with pytest.raises(ValueError, match=message):
        export(case, network, folder, changed)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_an_earlier_export_is_replaced_as_a_whole(tmp_path: Path) -> None:
    case = CASES["convnext"]
    folder = export(case, trained(case), tmp_path / "timm")
    # What a process that was killed leaves behind.
    (tmp_path / ".timm.new").mkdir()
    (tmp_path / ".timm.new" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".timm.old").mkdir()
    export_state({"layer": torch.ones(2)}, folder, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["timm"]
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]


def test_other_files_are_never_deleted(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"thesis\.tex"):
        export_state({"layer": torch.ones(2)}, tmp_path, {})
    with pytest.raises(UserError, match="is a file"):
        export_state({"layer": torch.ones(2)}, tmp_path / "thesis.tex", {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.fixture
def group_readable() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path: Path, group_readable: None) -> None:
    folder = export_state({"layer": torch.ones(2)}, tmp_path / "state", {})
    assert folder.stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in folder.iterdir()} == {0o640}


def test_state_of_a_custom_network(tmp_path: Path) -> None:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    folder = export_state(network.state_dict(), tmp_path / "state", CARD)
    loaded = load_file(folder / "model.safetensors")
    assert loaded.keys() == network.state_dict().keys()
    assert all(torch.equal(loaded[key], value) for key, value in network.state_dict().items())
    assert f'load_file("{folder.as_posix()}/model.safetensors")' in (folder / "README.md").read_text()
