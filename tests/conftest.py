# SPDX-License-Identifier: Apache-2.0
"""One thread, so that numbers are the same on every machine; real images for every test that wants some."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may ask the network

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)


def draw(index: int, side: int = 48) -> np.ndarray:
    """A picture that differs from the others and has edges: a grating under a disc, coloured by its index."""
    rng = np.random.default_rng(index)
    y, x = np.mgrid[:side, :side] / side
    angle, pitch = rng.uniform(0, np.pi), rng.uniform(4, 10)
    grating = np.sin(2 * np.pi * pitch * (x * np.cos(angle) + y * np.sin(angle)))
    cx, cy, radius = (*rng.uniform(0.3, 0.7, 2), rng.uniform(0.1, 0.3))
    disc = (x - cx) ** 2 + (y - cy) ** 2 < radius**2
    colour = rng.uniform(40, 215, (2, 3))
    image = np.where(disc[..., None], colour[0], colour[1]) + 40 * grating[..., None]
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A flat folder of 40 JPEGs of 48 px."""
    folder = tmp_path_factory.mktemp("photos")
    for index in range(40):
        Image.fromarray(draw(index)).save(folder / f"{index:03d}.jpg", quality=95)
    return folder


@pytest.fixture(scope="session")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two class folders of 20 JPEGs: upright and lying stripes, so that orientation is what tells them apart."""
    folder = tmp_path_factory.mktemp("classes")
    y, x = np.mgrid[:48, :48]
    for name, along in (("lying", y), ("upright", x)):
        (folder / name).mkdir()
        for index in range(20):
            rng = np.random.default_rng(index)
            stripes = 128 + 90 * np.sin(along * rng.uniform(0.5, 0.9) + rng.uniform(0, 6))
            noise = rng.normal(0, 10, (48, 48, 3))
            Image.fromarray((stripes[..., None] + noise).clip(0, 255).astype(np.uint8)).save(
                folder / name / f"{index}.jpg"
            )
    return folder


@pytest.fixture(scope="session")
def server() -> Iterator[str]:
    pytest.importorskip("s3fs")
    server = pytest.importorskip("moto.server").ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    yield address
    server.stop()


@pytest.fixture
def s3(server: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A local S3, which is found by the standard settings alone."""
    from fastmim.data.sources import remote

    settings = {"AWS_ENDPOINT_URL": server, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    for name, value in (settings | {"AWS_DEFAULT_REGION": "us-east-1"}).items():
        monkeypatch.setenv(name, value)
    # Both remember the address of the server of another test.
    remote._store.cache_clear()
    pytest.importorskip("s3fs").S3FileSystem.clear_instance_cache()
    monkeypatch.setattr(remote, "PAUSES", (0.0, 0.0))
    return server
