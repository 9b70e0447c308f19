"""Train on a folder of person crops, cluster it, index it, and search in it.

python tools/examples/own_folder.py --images my/crops
python tools/examples/own_folder.py            # with synthetic persons
"""

import argparse
from pathlib import Path

import numpy as np

import selcon_plugin
from selcon_plugin.datasets import SyntheticPersonsSpec, generate_synthetic_persons
from selcon_plugin.retrieval.page import write_page


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", default="", help="crops; synthetic if omitted")
    parser.add_argument("--camera-pattern", default="", help="regex of cameras in paths")
    parser.add_argument("--output", default="logs/own_folder")
    parser.add_argument("--backbone", default="", help="osnet_x0_25, timm:NAME, ...")
    parser.add_argument("--untrained", action="store_true", help="no ImageNet weights")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--people", type=int, default=60, help="synthetic identities")
    return parser.parse_args()


def render_images(folder: Path, num_people: int) -> Path:
    """Render synthetic persons from six cameras."""
    spec = SyntheticPersonsSpec(num_train_ids=num_people, num_test_ids=2)
    generate_synthetic_persons(folder, spec)
    return next(folder.rglob("bounding_box_train"))


def main() -> None:
    """Train, cluster, index and search."""
    args = parse_arguments()
    output = Path(args.output)
    images, pattern = args.images, args.camera_pattern
    if not images:
        images, pattern = render_images(output / "synthetic", args.people), r"c(\d)"

    run = selcon_plugin.fit(
        images,
        output / "run",
        epochs=args.epochs,
        backbone=args.backbone,
        pretrained=not args.untrained,
        input_size=(args.height, args.height // 2),
        camera_pattern=pattern,
        clustering={"eps": "auto"},
    )
    embedder = run.embedder()

    clusters = selcon_plugin.cluster(images, embedder, camera_pattern=pattern)
    clusters.to_csv(output / "clusters.csv")
    print(f"{clusters.num_clusters} clusters of {len(clusters.paths)} images")

    index = selcon_plugin.Index.create(output / "index", embedder)
    index.add(images, embedder, camera_pattern=pattern)
    threshold = index.suggest_threshold()
    queries = [
        clusters.paths[i] for i in np.linspace(0, len(clusters.paths) - 1, 5, dtype=int)
    ]
    results = selcon_plugin.search(index, queries, embedder=embedder)
    print(f"{index}; threshold {threshold}")
    for result in results:
        best = result.matches[0]
        print(f"{result.query}: {best.similarity:.3f} {best.path}")
    write_page(output / "search.html", results, summary=f"Threshold {threshold}.")
    print(f"{output / 'search.html'} written")


if __name__ == "__main__":
    main()
