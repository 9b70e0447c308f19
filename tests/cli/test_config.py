"""Tests of ``selcon config``: explanations of both hosts' keys, and legal examples."""

import importlib.util
import re

import pytest

from selcon_plugin.cli.main import main
from selcon_plugin.hosts import get_host, load_config

HOSTS = {"fastreid": "MODEL.SELCON.TEMPERATURE", "torchreid": "selcon.temperature"}


def need(host):
    if (
        importlib.util.find_spec(host) is None
    ):  # do not import it: it needs the compatibility patches first
        pytest.skip(f"{host} is not installed")


@pytest.fixture(params=HOSTS)
def host(request):
    need(request.param)
    return request.param


def test_full_key_of_either_host_is_explained(host, capsys):
    assert main(["config", "--explain", HOSTS[host]]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{HOSTS[host]}\n")
    assert "a number > 0" in out


def test_end_of_a_key_is_found_in_the_host_asked_for(host, capsys):
    assert main(["config", "--explain", "temperature", "--host", host]) == 0
    assert capsys.readouterr().out.startswith(f"{HOSTS[host]}\n")


def test_all_keys_are_listed(host, capsys):
    assert main(["config", "--list", "--host", host]) == 0
    out = capsys.readouterr().out
    assert f"\n  {HOSTS[host]} " in out


def test_mistyped_key_gets_a_suggestion(capsys):
    need("fastreid")
    assert main(["config", "--explain", "MODEL.SELCON.NUMNEIGHBORS"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("selcon config: error: FastReID's config has no key")
    assert "did you mean MODEL.SELCON.NUM_NEIGHBORS" in error


@pytest.mark.parametrize("key", ["", " ", "."])
def test_no_key_gets_a_remedy(key, host, capsys):
    assert main(["config", "--explain", key, "--host", host]) == 2
    error = capsys.readouterr().err
    assert "selcon config --list" in error
    assert repr(key) in error


def test_key_of_a_custom_method_is_explained(tmp_path, capsys):
    need("fastreid")
    file = tmp_path / "with_strange_option.py"
    file.write_text(
        "from selcon_plugin.config.keys import run_options\n"
        "from selcon_plugin.methods.cluster_contrast import ClusterContrast\n"
        "from selcon_plugin.methods import base\n"
        "class Strange(ClusterContrast):\n"
        '    """Strange.\n\n    Args:\n        oddness: How odd it is.\n    """\n'
        "    def __init__(self, *args, oddness: float = 0.25, **options):\n"
        "        super().__init__(*args, **options)\n"
        "base._METHODS['Strange'] = Strange\n"
    )
    try:
        main(["config", "--explain", "oddness", "--import", str(file)])
    finally:
        from selcon_plugin.methods import base

        base._METHODS.pop("Strange", None)
    out = capsys.readouterr().out
    assert "How odd it is." in out
    assert "It belongs to the method Strange." in out


def test_examples_are_legal(host):
    config_help = get_host(host).help()
    for key, found in config_help.plugin_keys.items():
        command = config_help.explain(key).splitlines()[-1]
        opts = re.search(r"FILE (.*)$", command)[1].split(" ")
        if found.example() in ("", []) or found.example() is None:
            continue
        if key.lower().endswith((".sampler", ".test_camera_term", ".reliability")):
            continue  # these require other options
        if host == "torchreid":
            opts += ["use_gpu", "False"]
        cfg = load_config("", opts, host=host)
        node = cfg
        for name in key.split("."):
            node = node[name]
        assert node == found.example(), key
