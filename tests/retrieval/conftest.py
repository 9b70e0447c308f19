"""An embedder that needs no network, and folders of small images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


class ColorGrid:
    """Mean colors of 4 x 2 cells, centered, as a unit vector of 24 values."""

    dim = 24

    def __init__(self, tint=0.0):
        self.tint = np.linspace(-tint, tint, self.dim)
        self.num_embedded = 0

    def __call__(self, images, *, batch_size=64):
        rows = [
            np.asarray(
                Image.fromarray(np.asarray(image)).resize((2, 4), Image.Resampling.BOX)
            )
            for image in images
        ]
        self.num_embedded += len(rows)
        vectors = np.reshape(rows, (len(rows), self.dim)) / 127.5 - 1.0 + self.tint
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        return vectors.astype(np.float32)


@pytest.fixture
def embedder():
    return ColorGrid()


@pytest.fixture
def draw_images(tmp_path):
    """Render persons: each has its own colors, and each image a little noise."""

    def draw(folder, *, people=6, images=4, seed=0, cameras=2):
        rng = np.random.default_rng(seed)
        root = tmp_path / folder
        for person in range(people):
            look = rng.integers(0, 256, (4, 2, 3))
            for number in range(images):
                noisy = np.clip(look + rng.normal(0, 12, look.shape), 0, 255)
                file = root / f"cam{number % cameras}" / f"p{person}_{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                crop = Image.fromarray(noisy.astype(np.uint8))
                crop.resize((16, 32), Image.Resampling.NEAREST).save(file)
        return Path(root)

    return draw


@pytest.fixture
def folder(draw_images):
    return draw_images("crops")
