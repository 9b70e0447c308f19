"""Folders of finished runs with small real crops, synthetic features and clusters."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from selcon_plugin.clustering import DBSCANLabeler
from selcon_plugin.runs.embedding import record_embedding
from selcon_plugin.runs.ranked import rank_queries, write_ranked

NUM_PEOPLE, IMAGES_EACH = 6, 8
# A file name that is HTML markup unless it is escaped.
NASTY = "<b>&'\"x.png"


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Make the folder of a finished run with six persons and three cameras."""

    def make(
        name: str = "run",
        *,
        clustered: bool = True,
        identities: bool = True,
        ranked: bool = True,
        **settings: object,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rng = np.random.default_rng(0)
        people = np.repeat(np.arange(NUM_PEOPLE), IMAGES_EACH)
        cameras = np.tile(np.arange(IMAGES_EACH) % 3, NUM_PEOPLE)
        colors = rng.integers(0, 256, (NUM_PEOPLE, 3))
        paths = []
        for i, person in enumerate(people):
            path = folder / (NASTY if i == 0 else f"c{cameras[i]}_{i:02d}.png")
            Image.new("RGB", (32, 64), tuple(colors[person].tolist())).save(path)
            paths.append(str(path))
        centers = torch.from_numpy(rng.normal(size=(NUM_PEOPLE, 16)))
        noise = torch.from_numpy(rng.normal(size=(len(people), 16)))
        features = (centers[people] + 0.25 * noise).float()
        camids = torch.from_numpy(cameras).long()
        labeler = DBSCANLabeler(eps=0.6, min_samples=3, k1=6, k2=2)
        found = labeler(features, camids) if clustered else None
        record_embedding(features, camids, found, epoch=2).save(folder)
        pids = people if identities else np.full(len(people), -1)
        rows = [
            [path, 1, int(c), int(p)]
            for path, c, p in zip(paths, cameras, pids, strict=True)
        ]
        (folder / "images.json").write_text(json.dumps({"images": rows, "num_left_out": 0}))
        lines = [
            {
                "iteration": 10 * e,
                "num_clusters": 6.0,
                "outlier_ratio": 0.1,
                "silhouette": 0.5,
            }
            for e in range(3)
        ]
        lines += [
            {"iteration": 10 * e + 9, "total_loss": 3.0 - e, "lr": 0.01, "loss_a": 1.0}
            for e in range(3)
        ]
        (folder / "metrics.json").write_text("\n".join(map(json.dumps, lines)))
        metrics = {"Small": {"mAP": 61.25, "Rank-1": 80.0}} if ranked else {}
        (folder / "results.json").write_text(
            json.dumps(
                {
                    **{"method": "ClusterContrast", "epochs": 3, "steps": 30, "seed": 0},
                    **{"train_seconds": 75.0, "metrics": metrics, "num_images": len(paths)},
                    **{
                        "host": "fastreid",
                        "device": "a CPU",
                        "versions": {"torch": "2.13"},
                    },
                }
            )
        )
        values = {"MODEL": {"SELCON": {"METHOD": "ClusterContrast", **settings}}}
        (folder / "config.yaml").write_text(json.dumps(values))
        if ranked:
            items = list(zip(paths, people.tolist(), cameras.tolist(), strict=True))
            distance = torch.cdist(features[::4], features)
            write_ranked(folder, "Small", rank_queries(distance, items[::4], items))
        return folder

    return make
