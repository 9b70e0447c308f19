"""Train without identity labels in torchreid: a script to copy and adapt.

    python tools/train_torchreid.py                                   # the embedded data
    python tools/train_torchreid.py --root reid-data --data market1501 --height 256
    python tools/train_torchreid.py --root my/crops --data imagefolderreid --no-test

It is the usual script around torchreid's ImageSoftmaxEngine, with a different engine.
"""

import argparse

import torch

from selcon_plugin.torchreid_ext import (
    ImageSelConEngine,
    build_selcon_model,
)  # before torchreid

import torchreid  # isort: skip


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", default="datasets", help="folder of the data sets")
    parser.add_argument("--data", default="syntheticpersons", nargs="+", help="data sets")
    parser.add_argument("--no-test", action="store_true", help="the data has no test set")
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--model", default="osnet_x1_0", help="of torchreid, or timm:NAME")
    parser.add_argument("--weights", default="", help="file; torchreid's download if empty")
    parser.add_argument("--untrained", action="store_true", help="random weights")
    parser.add_argument("--method", default="ClusterContrast")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.02)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", default="logs/train_torchreid")
    parser.add_argument(
        "--resume", action="store_true", help="resume from the last checkpoint"
    )
    return parser.parse_args()


def main() -> None:
    """Train and evaluate."""
    args = parse_arguments()
    width = args.height // 2
    datamanager = torchreid.data.ImageDataManager(
        root=args.root,
        sources=args.data,
        targets=[] if args.no_test else None,
        height=args.height,
        width=width,
        batch_size_train=args.batch_size,
        batch_size_test=100,
        transforms=["random_flip", "random_crop", "random_erase"],
        workers=args.workers,
    )
    model = build_selcon_model(
        args.model,
        pretrained=not args.untrained,
        weights=args.weights,
        input_size=(args.height, width),
        pool="gem",
        bn_neck=True,
        project_global=False,
    )
    if torch.cuda.is_available():
        model = model.cuda()
    optimizer = torchreid.optim.build_optimizer(model, optim="sgd", lr=args.lr)
    scheduler = torchreid.optim.build_lr_scheduler(optimizer, stepsize=2 * args.epochs)
    engine = ImageSelConEngine(
        datamanager,
        model,
        optimizer,
        scheduler,
        method=args.method,
        clustering={"labeler": "DBSCAN", "eps": "auto"},
    )
    start_epoch = engine.resume(args.output) if args.resume else 0
    engine.run(
        save_dir=args.output,
        max_epoch=args.epochs,
        start_epoch=start_epoch,
        eval_freq=5,
        print_freq=10,
    )


if __name__ == "__main__":
    main()
