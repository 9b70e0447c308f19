"""``selcon train`` and ``selcon eval``: parse, load the config, call the host."""

from __future__ import annotations

import argparse
import sys
from functools import partial

from selcon_plugin.cli.arguments import add_folder_arguments, add_import_argument
from selcon_plugin.config.checks import make_output_folder
from selcon_plugin.config.loading import import_files
from selcon_plugin.hosts import is_torchreid, load_config


def _train_parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"selcon {prog}",
        description="Arguments as in FastReID's train script, those for a folder, and the "
        "choice of the host.",
    )
    parser.add_argument(
        "--config-file", default="", metavar="FILE", help="FastReID or torchreid config"
    )
    parser.add_argument(
        "--host",
        choices=("fastreid", "torchreid"),
        default="",
        help="framework that trains; default: the one whose keys the config has",
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="go on from the last checkpoint in OUTPUT_DIR (torchreid: data.save_dir)",
    )
    parser.add_argument(
        "--eval-only",
        action="store_true",
        help="evaluate MODEL.WEIGHTS (torchreid: model.load_weights) only",
    )
    parser.add_argument(
        "--num-gpus", type=int, default=1, help="processes on this machine (CPU or GPU)"
    )
    parser.add_argument("--num-machines", type=int, default=1, help="number of machines")
    parser.add_argument("--machine-rank", type=int, default=0, help="rank of this machine")
    parser.add_argument(
        "--dist-url", default="auto", help="tcp://host:port at which the machines meet"
    )
    parser.add_argument(
        "--dist-timeout",
        type=float,
        default=30.0,
        metavar="MINUTES",
        help="how long a process waits for another before it gives up; more than the "
        "longest clustering or evaluation takes; default: 30",
    )
    add_folder_arguments(parser)
    add_import_argument(parser)
    parser.add_argument(
        "opts",
        metavar="KEY VALUE",
        nargs=argparse.REMAINDER,
        default=[],
        help="config options, for instance SOLVER.MAX_EPOCH 20 OUTPUT_DIR logs/mine",
    )
    return parser


def _train(argv: list[str]) -> int:
    return _launch(_train_parser("train").parse_args(argv))


def _eval(argv: list[str]) -> int:
    args = _train_parser("eval").parse_args(argv)
    args.eval_only = True
    return _launch(args)


def _launch(args: argparse.Namespace) -> int:
    import_files(args.imports)
    cfg = load_config(
        args.config_file,
        args.opts,
        images=args.images,
        camera_pattern=args.camera_pattern,
        host=args.host,
    )
    if is_torchreid(cfg):
        from selcon_plugin.torchreid_ext.host import run_torchreid

        if args.num_gpus > 1 or args.num_machines > 1:
            raise ValueError(
                "torchreid trains in one process, on all GPUs that CUDA_VISIBLE_DEVICES "
                "shows it: leave out --num-gpus and --num-machines"
            )
        run_torchreid(cfg, resume=args.resume, eval_only=args.eval_only)
        return 0
    from selcon_plugin.fastreid_ext.data import check_processes
    from selcon_plugin.fastreid_ext.host import run_fastreid
    from selcon_plugin.fastreid_ext.launch import ProcessFailure, check_launch, launch

    make_output_folder("OUTPUT_DIR", cfg.OUTPUT_DIR)
    check_launch(args.num_gpus, args.num_machines, args.machine_rank, args.dist_url)
    if args.num_gpus > 1 and not args.eval_only:
        # To start processes that all fail takes its time.
        check_processes(cfg, args.num_gpus * args.num_machines)
    try:
        launch(
            partial(
                run_fastreid,
                resume=args.resume,
                eval_only=args.eval_only,
                config_file=args.config_file,
                imports=args.imports,
            ),
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            timeout_minutes=args.dist_timeout,
            args=(cfg,),
        )
    except ProcessFailure as error:
        sys.stderr.write(f"selcon train: error: {error}\n")
        return 1
    return 0
