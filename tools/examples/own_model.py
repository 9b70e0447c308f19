"""Index images with a custom model, or torchreid's OSNet: no training, no config.

    python tools/examples/own_model.py --images gallery --query person.jpg
    python tools/examples/own_model.py --images gallery --query a.jpg b.jpg
        --model osnet_x1_0 --weights osnet_x1_0_msmt17.pth

Anything that turns a list of images into unit vectors can fill an index: here a PyTorch
model in a class of ten lines. (For trained checkpoints use ``selcon_plugin.Embedder``.)
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

import selcon_plugin
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.io.safe_loading import load_data

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


class ModelEmbedder:
    """Embedder that uses a PyTorch model ``(B, 3, h, w)`` → ``(B, D)``."""

    def __init__(self, model: torch.nn.Module, size: tuple[int, int]) -> None:
        self.model, self.size = model.eval(), size
        self.dim = self._features([Image.new("RGB", size[::-1])]).shape[1]

    @torch.inference_mode()
    def _features(self, images: Sequence[Any]) -> torch.Tensor:
        pixels = [np.asarray(image.resize(self.size[::-1])) / 255.0 for image in images]
        batch = (
            torch.from_numpy((np.stack(pixels) - MEAN) / STD).float().permute(0, 3, 1, 2)
        )
        device = next(self.model.parameters()).device
        return torch.nn.functional.normalize(self.model(batch.to(device))).cpu()

    def __call__(self, images: Sequence[Any], *, batch_size: int = 64) -> np.ndarray:
        """Embed Pillow images or RGB arrays into unit vectors."""
        images = [
            image if isinstance(image, Image.Image) else Image.fromarray(image)
            for image in images
        ]
        batches = range(0, len(images), batch_size)
        return torch.cat([self._features(images[i:][:batch_size]) for i in batches]).numpy()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", required=True, help="folder to search in")
    parser.add_argument("--query", required=True, nargs="+", help="images of persons")
    parser.add_argument("--model", default="osnet_x1_0", help="of torchreid")
    parser.add_argument("--weights", default="", help="state dict; random if omitted")
    parser.add_argument("--height", type=int, default=256)
    parser.add_argument("--index", default="logs/own_model/index")
    return parser.parse_args()


def main() -> None:
    """Index a folder and search in it."""
    args = parse_arguments()
    torch.manual_seed(0)
    model = import_torchreid().models.build_model(args.model, 1, pretrained=False)
    if args.weights:
        state = load_data(args.weights)
        state = state.get("state_dict", state)
        state = {name.removeprefix("module."): value for name, value in state.items()}
        kept = {name: v for name, v in state.items() if not name.startswith("classifier.")}
        model.load_state_dict({**model.state_dict(), **kept})
    embedder = ModelEmbedder(model, (args.height, args.height // 2))
    index = selcon_plugin.Index.create(args.index, embedder)
    added = index.add(args.images, embedder)
    print(f"{added.new} images added; {index}")
    for result in selcon_plugin.search(index, args.query, embedder=embedder, top=5):
        print(result.query)
        for match in result.matches:
            print(f"  {match.similarity:.3f}  {match.path}")


if __name__ == "__main__":
    main()
