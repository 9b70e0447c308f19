"""Untrusted checkpoints, configs, archives and messages never run code.

Each malicious file would create a folder if its code ran. An environment variable gives
``torch.load`` its old, unsafe default, so that calls without ``weights_only`` are found.
"""

import contextlib
import io
import os
import pickle
import tarfile

import pytest
import torch

from helpers import tiny
from helpers.tiny import SPEC
from selcon_plugin.cli.main import main
from selcon_plugin.compat.torchreid import import_torchreid
from selcon_plugin.datasets import generate_synthetic_persons
from selcon_plugin.fastreid_ext import SelConTrainer
from selcon_plugin.hosts import load_config
from selcon_plugin.io.safe_loading import data_only, load_data, safe_extraction
from selcon_plugin.models.torchreid import create_torchreid_backbone
from selcon_plugin.torchreid_ext import ImageSelConEngine
from selcon_plugin.workflows.bench_runs import read_results

FASTREID = tiny.FASTREID | {"OUTPUT_DIR": "out"}
TORCHREID = tiny.TORCHREID | {"data.root": "datasets", "data.save_dir": "out"}

TOUCHED = "touched"


class Malicious:
    """Object that creates a folder when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, (TOUCHED,)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("datasets")
    generate_synthetic_persons(root, SPEC)
    return root


@pytest.fixture
def place(tmp_path, data, monkeypatch):
    """Working folder in which no code may have created the folder."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    monkeypatch.setenv("FASTREID_DATASETS", str(data))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "datasets").symlink_to(data)
    for trainer in (SelConTrainer, ImageSelConEngine):
        monkeypatch.setattr(trainer, "train", lambda *_, **__: pytest.fail("it trains"))
    yield tmp_path
    assert not (tmp_path / TOUCHED).exists(), "code was run"


def write_malicious(file, form="zip"):
    """Write a checkpoint that both hosts would accept, with a malicious object."""
    weights = {"layer.weight": torch.zeros(2)}
    content = {
        "model": weights,
        "state_dict": weights,
        "selcon": {},
        "epoch": 1,
        "extra": Malicious(),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    if form == "pickle":
        file.write_bytes(pickle.dumps(content))
    else:
        new = form == "zip"
        torch.save(content, file, _use_new_zipfile_serialization=new)
    return file


def arguments_of(options):
    return [word for key, value in options.items() for word in (key, str(value))]


def test_the_malicious_file_would_run_its_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for form in ("zip", "legacy", "pickle"):
        file = write_malicious(tmp_path / "x.pth", form)
        if form == "pickle":
            pickle.loads(file.read_bytes())
        else:
            torch.load(file, weights_only=False)
        (tmp_path / TOUCHED).rmdir()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_load_data_names_file_and_reason(place, form):
    file = write_malicious(place / "evil.pth", form)
    with pytest.raises(ValueError, match=r"evil\.pth cannot be read safely") as error:
        load_data(file)
    if form != "pickle":  # the reader cannot parse this form far enough
        assert "names posix.mkdir" in str(error.value)
    assert "weights_only" not in str(error.value)


def test_data_only_cannot_be_overridden_inside(place):
    file = write_malicious(place / "evil.pth")
    with data_only():
        for options in ({}, {"weights_only": False}, {"pickle_module": pickle}):
            with pytest.raises(ValueError, match=r"posix\.mkdir"):
                torch.load(file, **options)
    tensor = place / "good.pth"
    torch.save(torch.ones(2), tensor)
    with data_only():
        assert torch.equal(torch.load(tensor, map_location="cpu"), torch.ones(2))


def test_what_cannot_be_opened_is_no_matter_of_safety(place):
    with pytest.raises(FileNotFoundError):
        load_data(place / "nowhere.pth")


BACKBONE = "MODEL.BACKBONE."
PRETRAINED = {BACKBONE + "PRETRAIN": True, BACKBONE + "PRETRAIN_PATH": "evil.pth"}
OTHER_HOST = {
    BACKBONE + "NAME": "build_torchreid_backbone",
    BACKBONE + "TORCHREID_NAME": "osnet_x0_25",
}
HOST_NETWORKS = {
    "resnet": {BACKBONE + "DEPTH": "18x"},
    "osnet": {BACKBONE + "DEPTH": "x0_25"},
    "vit": {BACKBONE + "DEPTH": "small", "INPUT.SIZE_TRAIN": "[256,128]"},
}


@pytest.mark.parametrize(
    ("command", "options"),
    [
        pytest.param(["train"], {"MODEL.WEIGHTS": "evil.pth"}, id="weights"),
        pytest.param(["eval"], {"MODEL.WEIGHTS": "evil.pth"}, id="eval"),
        pytest.param(["train", "--eval-only"], {"MODEL.WEIGHTS": "evil.pth"}, id="only"),
        pytest.param(["train"], PRETRAINED, id="pretrained-timm"),
        pytest.param(["train"], PRETRAINED | OTHER_HOST, id="pretrained-torchreid"),
        *(
            pytest.param(
                ["train"],
                PRETRAINED | {BACKBONE + "NAME": f"build_{name}_backbone"} | options,
                id=f"pretrained-{name}",
            )
            for name, options in HOST_NETWORKS.items()
        ),
    ],
)
def test_fastreid_refuses_a_malicious_file(place, capsys, command, options):
    write_malicious(place / "evil.pth")
    assert main([*command, *arguments_of(FASTREID | options)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "evil.pth" in error
    assert "posix.mkdir" in error


def test_fastreid_refuses_to_resume_from_a_malicious_file(place, capsys):
    write_malicious(place / "out" / "model_0001.pth")
    (place / "out" / "last_checkpoint").write_text("model_0001.pth")
    assert main(["train", "--resume", *arguments_of(FASTREID)]) == 2
    assert "model_0001.pth" in capsys.readouterr().err.splitlines()[-1]


def test_extract_refuses_a_malicious_file(place, data, capsys):
    write_malicious(place / "evil.pth")
    images = next(data.rglob("bounding_box_train"))
    command = ["extract", "--images", str(images), "--output", "x.npz"]
    options = {key: v for key, v in FASTREID.items() if not key.startswith("DATASETS")}
    assert main([*command, *arguments_of(options | {"MODEL.WEIGHTS": "evil.pth"})]) == 2
    assert "evil.pth" in capsys.readouterr().err.splitlines()[-1]


def test_fastreids_own_checkpointer_refuses_a_malicious_file(place):
    from fastreid.utils.checkpoint import Checkpointer

    file = write_malicious(place / "evil.pth")
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        Checkpointer(torch.nn.Linear(1, 1)).load(str(file))


@pytest.mark.parametrize(
    ("command", "options"),
    [
        pytest.param("train", {"model.load_weights": "evil.pth"}, id="weights"),
        pytest.param("eval", {"model.load_weights": "evil.pth"}, id="eval"),
        pytest.param("train", {"model.resume": "evil.pth"}, id="resume"),
        pytest.param("eval", {"model.resume": "evil.pth"}, id="eval-resume"),
        pytest.param(
            "train", {"selcon.weights": "evil.pth", "model.pretrained": True}, id="timm"
        ),
        pytest.param(
            "train",
            {
                "model.name": "osnet_x0_25",
                "selcon.weights": "evil.pth",
                "model.pretrained": True,
            },
            id="own",
        ),
    ],
)
def test_torchreid_refuses_a_malicious_file(place, capsys, command, options):
    write_malicious(place / "evil.pth")
    assert main([command, "--host", "torchreid", *arguments_of(TORCHREID | options)]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "evil.pth" in error


def test_torchreid_refuses_to_resume_from_a_malicious_file(place, capsys):
    write_malicious(place / "out" / "model" / "model.pth.tar-1")
    command = ["train", "--host", "torchreid", "--resume", *arguments_of(TORCHREID)]
    assert main(command) == 2
    assert "model.pth.tar-1" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "call",
    [
        lambda utils, file: utils.load_checkpoint(file),
        lambda utils, file: utils.load_pretrained_weights(torch.nn.Linear(1, 1), file),
        lambda utils, file: utils.resume_from_checkpoint(file, torch.nn.Linear(1, 1)),
    ],
    ids=["load_checkpoint", "load_pretrained_weights", "resume_from_checkpoint"],
)
def test_torchreids_own_functions_refuse_a_malicious_file(place, call):
    file = write_malicious(place / "evil.pth")
    with pytest.raises(ValueError, match=r"posix\.mkdir"):
        call(import_torchreid().utils, str(file))


@pytest.mark.parametrize(
    ("name", "cached"),
    [
        ("osnet_x0_25", "checkpoints/osnet_x0_25_imagenet.pth"),
        # torch.hub, which torchreid uses here, asks for weights_only=False.
        ("resnet18", "hub/checkpoints/resnet18-5c106cde.pth"),
    ],
)
def test_downloaded_weights_of_torchreid_are_read_as_data(place, name, cached):
    write_malicious(place / "torch" / cached)
    with pytest.raises(RuntimeError, match=r"posix\.mkdir"):
        create_torchreid_backbone(name, input_size=(64, 32), pretrained=True)


MALICIOUS_TAG = f"!!python/object/apply:os.mkdir [{TOUCHED}]"


@pytest.mark.parametrize("host", ["fastreid", "torchreid", ""])
@pytest.mark.parametrize("where", ["own", "base"])
def test_a_config_that_makes_objects_is_refused(place, host, where):
    (place / "evil.yml").write_text(f"MODEL:\n  DEVICE: {MALICIOUS_TAG}\n")
    (place / "upper.yml").write_text("_BASE_: evil.yml\nSOLVER:\n  MAX_EPOCH: 3\n")
    file = "evil.yml" if where == "own" else "upper.yml"
    with pytest.raises(ValueError, match=r"evil\.yml, line 2: .*os\.mkdir.* is refused"):
        load_config(file, host=host)


def test_the_bench_refuses_a_config_that_makes_objects(place, capsys):
    (place / "evil.yml").write_text(f"MODEL:\n  DEVICE: {MALICIOUS_TAG}\n")
    assert main(["bench", "--configs", "evil.yml", "--output", "bench"]) == 2
    error = capsys.readouterr().err
    assert "evil.yml, line 2" in error
    assert "is refused" in error


def test_a_program_is_no_config(place):
    # yacs runs a .py file given as a config.
    (place / "evil.py").write_text(f"import os\nos.mkdir({TOUCHED!r})\ncfg = {{}}\n")
    with pytest.raises(ValueError, match=r"evil\.py' is a program"):
        load_config("evil.py", host="torchreid")


@pytest.mark.parametrize("key", ["SOLVER.MAX_EPOCH", "OUTPUT_DIR"])
def test_a_value_is_never_evaluated(place, key):
    text = f"__import__('os').mkdir({TOUCHED!r})"
    with contextlib.suppress(ValueError):  # it is not a number
        load_config("", [key, text])


def test_what_processes_send_each_other_is_data():
    from fastreid.utils import comm

    import selcon_plugin.fastreid_ext  # noqa: F401  (patches it)

    sent = [{"feats": torch.rand(3, 2), "pids": [1, 2], "loss": 0.5, "name": "a"}]
    got = comm.pickle.loads(comm.pickle.dumps(sent))
    assert torch.equal(got[0].pop("feats"), sent[0].pop("feats"))
    assert got == sent


@pytest.mark.parametrize("protocol", [2, pickle.HIGHEST_PROTOCOL])
def test_what_others_send_runs_no_code(place, protocol):
    from fastreid.utils import comm

    stream = io.BytesIO()
    torch.save(Malicious(), stream)
    for message in (pickle.dumps(Malicious(), protocol), stream.getvalue()):
        with pytest.raises(ValueError, match="cannot be read safely"):
            comm.pickle.loads(message)


def test_archives_stay_below_their_folder(place):
    inner = place / "inner"
    inner.mkdir()
    with tarfile.open(place / "evil.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("../outside.txt"))
    with (
        safe_extraction(),
        tarfile.open(place / "evil.tar") as archive,
        pytest.raises(tarfile.OutsideDestinationError),
    ):
        archive.extractall(inner)
    assert not (place / "outside.txt").exists()
    assert list(inner.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"metrics": 3}'])
def test_damaged_results_are_named(place, text):
    (place / "results.json").write_text(text)
    message = r"results\.json is damaged: .*Remove it.* --resume"
    with pytest.raises(ValueError, match=message):
        read_results(place / "results.json")


def test_no_source_unpickles_or_starts_a_shell():
    """Files are loaded only by load_data; programs are started by argument lists."""
    import ast
    from pathlib import Path

    import selcon_plugin

    forbidden = {
        *("pickle.load", "pickle.loads", "torch.load", "yaml.load", "yaml.unsafe_load"),
        *("os.system", "os.popen", "eval", "exec"),
        *("dist.all_gather_object", "dist.broadcast_object_list"),
        *("dist.gather_object", "dist.scatter_object_list"),
    }
    found = []
    root = Path(selcon_plugin.__file__).parent
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            if called in forbidden:
                found.append(f"{file.name}:{node.lineno} {called}")
            found += [
                f"{file.name}:{node.lineno}" for k in node.keywords if k.arg == "shell"
            ]
    # compat only tests whether torch reads NumPy scalars, on bytes that it wrote itself.
    assert [place for place in found if not place.startswith("shared.py")] == []
