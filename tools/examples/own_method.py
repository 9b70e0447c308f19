"""Compare a custom method with Cluster Contrast: same engine, same budget, one table.

    python tools/examples/own_method.py --seeds 2 --epochs 10

Options at the end are config keys for both: ``DATASETS.NAMES '("Market1501",)'``.
"""

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selcon_plugin.config.files import builtin_config
from selcon_plugin.features import Embeddings
from selcon_plugin.memory.cluster import ClusterMemory
from selcon_plugin.memory.writes import cluster_means
from selcon_plugin.methods import register_method
from selcon_plugin.methods.cluster_method import ClusterMethod
from selcon_plugin.options import Interval


@register_method("SmoothContrast")
class SmoothContrast(ClusterMethod):
    """Cluster Contrast with label smoothing, which reduces the weight of wrong labels."""

    def __init__(
        self,
        num_images: int,
        global_dim: int,
        num_parts: int = 0,
        part_dim: int = 0,
        *,
        temperature: Annotated[float, Interval(0, below=True)] = 0.05,
        smoothing: Annotated[float, Interval(0, 1)] = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(num_images, global_dim, num_parts, part_dim, **options)
        self.temperature, self.smoothing = temperature, smoothing
        self.memory = ClusterMemory(torch.zeros(0, global_dim), momentum=0.1)

    def _rebuild(self, features: Tensor, labels: Tensor) -> None:
        self.memory.reset(cluster_means(features, labels))

    def loss(
        self, embeddings: Embeddings, index: Tensor, camids: Tensor, *views: Embeddings
    ) -> dict[str, Tensor]:
        """Compare a batch with the cluster means."""
        targets = self.labels[index]
        features, targets = embeddings.global_features[targets >= 0], targets[targets >= 0]
        logits = features @ self.memory.bank.T / self.temperature
        total = F.cross_entropy(
            logits, targets, label_smoothing=self.smoothing, reduction="sum"
        )
        return {"loss_smooth": total / len(index)}

    def _write(self, index: Tensor, features: Tensor, targets: Tensor) -> None:
        self.memory.update(features, targets)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="logs/own_method")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="config keys and values")
    return parser.parse_args()


def main() -> int:
    """Write a config and run the bench."""
    args = parse_arguments()
    output = Path(args.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    baseline = builtin_config("SyntheticPersons/cluster_contrast.yml")
    config = output / "smooth_contrast.yml"
    config.write_text(
        f"_BASE_: {baseline}\nMODEL:\n  SELCON:\n    METHOD: SmoothContrast\n"
    )
    # Each run is a separate process, which imports this file to register the method.
    bench = [sys.executable, "-m", "selcon_plugin", "bench", "--import", __file__]
    bench += ["--configs", str(config), baseline, "--output", str(output / "bench")]
    bench += ["--seeds", str(args.seeds), "--epochs", str(args.epochs), *args.opts]
    return subprocess.run(bench, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
