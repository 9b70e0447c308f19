from __future__ import annotations

import contextlib
import copy
import io
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selcon_plugin.compat.fastreid import prepare_fastreid
from selcon_plugin.compat.shared import HostMissingError
from selcon_plugin.compat.torchreid import prepare_torchreid
from selcon_plugin.models.ghost_norm import convert_ghost_batch_norm

PLAIN_LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "vectors": (lambda: nn.BatchNorm1d(5), (5,)),
    "sequences": (lambda: nn.BatchNorm1d(5), (5, 3)),
    "maps": (lambda: nn.BatchNorm2d(5), (5, 4, 3)),
    "volumes": (lambda: nn.BatchNorm3d(5), (5, 2, 4, 3)),
    "no affine": (lambda: nn.BatchNorm2d(5, affine=False), (5, 4, 3)),
    "no running statistics": (
        lambda: nn.BatchNorm2d(5, track_running_stats=False),
        (5, 4, 3),
    ),
    "cumulative average": (lambda: nn.BatchNorm2d(5, momentum=None), (5, 4, 3)),
}


def random_images(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=dtype)


def randomize(module: nn.Module) -> None:
    """Randomize weights and statistics of batch norm layers, so that errors are visible."""
    generator = torch.Generator().manual_seed(7)
    for layer in module.modules():
        if not isinstance(layer, nn.modules.batchnorm._BatchNorm):
            continue
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            if tensor is not None:
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.data.copy_(0.5 + noise)


def run_and_differentiate(
    module: nn.Module, batches: Sequence[Tensor], sizes: Sequence[int]
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Return outputs and gradients of weights and inputs for batches run in sequence."""
    joined = torch.cat(list(batches)).requires_grad_()
    outputs = [module(batch) for batch in joined.split(list(sizes))]
    output = torch.cat(outputs)
    output.backward(random_images(*output.shape, seed=1).to(output))
    grads = {
        name: weight.grad
        for name, weight in module.named_parameters()
        if weight.grad is not None
    }
    assert joined.grad is not None
    return output.detach(), grads, joined.grad


def assert_group_statistics(
    module: nn.Module, images: Tensor, group_size: int, sizes: Sequence[int]
) -> None:
    """Check that the converted module on a batch equals the plain one on small batches."""
    module.train()
    randomize(module)
    converted = copy.deepcopy(module)
    assert convert_ghost_batch_norm(converted, group_size) > 0
    expected = run_and_differentiate(module, images.split(list(sizes)), sizes)
    found = run_and_differentiate(converted, [images], [len(images)])
    tolerance = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(found[0], expected[0], **tolerance)
    assert found[1].keys() == expected[1].keys()
    scale = max((grad.abs().max().item() for grad in expected[1].values()), default=1.0)
    for name, grad in found[1].items():
        torch.testing.assert_close(
            grad, expected[1][name], rtol=1e-8, atol=1e-10 * scale, msg=name
        )
    torch.testing.assert_close(found[2], expected[2], **tolerance)
    state, other = converted.state_dict(), module.state_dict()
    assert list(state) == list(other)
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-8, atol=1e-8, msg=name)


# --- layers ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLAIN_LAYERS)
def test_layer_equals_small_batches(name: str, device: str) -> None:
    make_layer, shape = PLAIN_LAYERS[name]
    images = random_images(12, *shape).to(device)
    assert_group_statistics(make_layer().double().to(device), images, 4, [4, 4, 4])


@pytest.mark.parametrize(
    ("batch_size", "group_size", "sizes"),
    [
        (8, 4, [4, 4]),
        (9, 4, [5, 4]),  # a group of one image would have no statistics
        (11, 4, [6, 5]),
        (15, 4, [5, 5, 5]),
        (7, 4, [7]),
        (4, 4, [4]),
        (3, 4, [3]),
        (5, 2, [3, 2]),
        (1, 2, [1]),
    ],
)
def test_batch_size_that_is_not_a_multiple(
    batch_size: int, group_size: int, sizes: list[int]
) -> None:
    images = random_images(batch_size, 5, 4, 3)
    assert_group_statistics(nn.BatchNorm2d(5).double(), images, group_size, sizes)


@pytest.mark.parametrize("running_statistics", [True, False])
def test_evaluation_mode_is_untouched(running_statistics: bool) -> None:
    layer = nn.BatchNorm2d(5, track_running_stats=running_statistics)
    randomize(layer)
    layer.eval()
    images = random_images(12, 5, 4, 3, dtype=torch.float32)
    expected, state = layer(images), copy.deepcopy(layer.state_dict())
    convert_ghost_batch_norm(layer, 4)
    assert torch.equal(layer(images), expected)
    for name, tensor in layer.state_dict().items():
        assert torch.equal(tensor, state[name])


def test_groups_differ_from_the_whole_batch() -> None:
    plain = nn.BatchNorm2d(5).double()
    converted = copy.deepcopy(plain)
    convert_ghost_batch_norm(converted, 4)
    images = random_images(8, 5, 4, 3)
    assert not torch.allclose(plain(images), converted(images), atol=1e-3)
    assert int(plain.num_batches_tracked) == 1
    assert int(converted.num_batches_tracked) == 2


def test_only_plain_batch_norm_layers_are_converted() -> None:
    class OwnBatchNorm(nn.BatchNorm2d):
        pass

    shared = nn.BatchNorm1d(2)
    network = nn.Sequential(
        shared,
        nn.Sequential(nn.BatchNorm3d(2), OwnBatchNorm(2)),
        shared,
        nn.SyncBatchNorm(2),
        nn.InstanceNorm2d(2),
        nn.GroupNorm(1, 2),
    )
    untouched = list(network)[3:]
    classes = [type(layer) for layer in untouched]
    assert convert_ghost_batch_norm(network, 4) == 3
    assert [type(layer) for layer in untouched] == classes
    assert isinstance(network[1][1], OwnBatchNorm)
    assert convert_ghost_batch_norm(network, 8) == 0  # all layers are converted already
    assert shared.group_size == 4
    assert convert_ghost_batch_norm(nn.BatchNorm2d(2), 8) == 1  # a single layer
    again = nn.BatchNorm2d(2)
    convert_ghost_batch_norm(again, 8)
    other = nn.BatchNorm2d(2)
    convert_ghost_batch_norm(other, 8)
    assert type(again) is type(other)


@pytest.mark.parametrize("group_size", [1, 0, -16])
def test_groups_without_statistics_are_refused(group_size: int) -> None:
    with pytest.raises(ValueError, match=rf"group_size .*2.*got {group_size}"):
        convert_ghost_batch_norm(nn.BatchNorm2d(2), group_size)


def converted_network() -> nn.Sequential:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    convert_ghost_batch_norm(network, 4)
    return network


def pickled(network: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(network))


def saved_whole(network: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(network, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, pickled, saved_whole])
def test_copies_keep_the_groups(copied: Callable[[nn.Module], Any]) -> None:
    network = converted_network()
    twin = copied(network)
    assert type(twin[1]) is type(network[1])
    images = random_images(8, 3, 5, 5, dtype=torch.float32)
    assert torch.equal(twin(images), network(images))
    if copied is not copy.copy:
        network[1].running_mean.zero_()
        assert twin[1].running_mean.any()


def test_state_dict_is_compatible_in_both_directions() -> None:
    network = converted_network()
    network(random_images(8, 3, 5, 5, dtype=torch.float32))
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    plain.load_state_dict(state)
    images = random_images(8, 3, 5, 5, seed=1, dtype=torch.float32)
    assert torch.equal(plain.eval()(images), network.eval()(images))
    convert_ghost_batch_norm(plain, 4)
    plain.load_state_dict(state)


def test_repr_includes_the_group_size() -> None:
    assert "GhostBatchNorm2d(4" in repr(converted_network())
    assert "group_size=4" in repr(converted_network())


def test_channels_last_format_is_kept(device: str) -> None:
    network = converted_network().to(device).to(memory_format=torch.channels_last)
    images = random_images(8, 3, 5, 5, dtype=torch.float32).to(device)
    images = images.to(memory_format=torch.channels_last)
    output = network(images)
    assert output.is_contiguous(memory_format=torch.channels_last)
    contiguous = converted_network().to(device)(images.contiguous())
    torch.testing.assert_close(output, contiguous, rtol=1e-4, atol=1e-4)


def test_mixed_precision(device: str) -> None:
    network = converted_network().to(device)
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).to(device)
    plain.load_state_dict(network.state_dict())
    images = random_images(8, 3, 5, 5, dtype=torch.float32).to(device)
    with torch.autocast(device, torch.bfloat16):
        output = network(images)
        expected = torch.cat([plain(group) for group in images.split(4)])
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output, expected)
    output.float().sum().backward()
    assert network[1].weight.grad.dtype == torch.float32
    assert network[1].running_mean.dtype == torch.float32
    assert int(network[1].num_batches_tracked) == 2


# --- networks of the hosts ---------------------------------------------------------------


def require(module: str) -> Any:
    for prepare in (prepare_fastreid, prepare_torchreid):  # timm imports torchvision
        with contextlib.suppress(HostMissingError):
            prepare()
    return pytest.importorskip(module)


def host_backbone(**settings: Any) -> nn.Module:
    require("fastreid")
    from fastreid.config import get_cfg
    from fastreid.modeling.backbones import build_backbone

    cfg = get_cfg()
    for name, value in settings.items():
        cfg.MODEL.BACKBONE[name] = value
    torch.manual_seed(0)
    network: nn.Module = build_backbone(cfg).double()
    return network


HOST_BACKBONES: dict[str, dict[str, Any]] = {
    "resnet": {"NAME": "build_resnet_backbone", "DEPTH": "18x"},
    "resnet ibn": {"NAME": "build_resnet_backbone", "DEPTH": "18x", "WITH_IBN": True},
    "osnet": {"NAME": "build_osnet_backbone", "DEPTH": "x0_25"},
    "resnet GhostBN": {"NAME": "build_resnet_backbone", "DEPTH": "18x", "NORM": "GhostBN"},
}


@pytest.mark.parametrize("name", HOST_BACKBONES)
def test_fastreid_backbone_equals_small_batches(name: str) -> None:
    network = host_backbone(**HOST_BACKBONES[name])
    assert_group_statistics(network, random_images(6, 3, 48, 32), 3, [3, 3])


@pytest.mark.parametrize("name", ["test_resnet", "test_efficientnet"])
def test_timm_model_equals_small_batches(name: str) -> None:
    timm = require("timm")
    torch.manual_seed(0)
    network = timm.create_model(name, num_classes=0).double()
    assert_group_statistics(network, random_images(6, 3, 64, 64), 3, [3, 3])


def test_timm_activation_inside_the_norm_layer_is_kept() -> None:
    require("timm")
    from timm.layers import BatchNormAct2d

    layer = BatchNormAct2d(5).double()
    assert_group_statistics(layer, random_images(8, 5, 4, 3), 4, [4, 4])
    convert_ghost_batch_norm(layer, 4)
    assert (layer(random_images(8, 5, 4, 3)) >= 0).all()


def test_fastreid_frozen_shift_stays_frozen() -> None:
    require("fastreid")
    from fastreid.layers import get_norm

    layer = get_norm("BN", 5, bias_freeze=True).double()
    assert_group_statistics(layer, random_images(8, 5, 1, 1), 4, [4, 4])
    convert_ghost_batch_norm(layer, 4)
    assert not layer.bias.requires_grad
    frozen = get_norm("FrozenBN", 5)
    assert convert_ghost_batch_norm(frozen, 4) == 0


def test_fastreid_ghost_norm_differs() -> None:
    """FastReID's layer has one group if set by a config, and interleaved groups else."""
    require("fastreid")
    from fastreid.layers.batch_norm import GhostBatchNorm, get_norm

    assert get_norm("GhostBN", 5).num_splits == 1
    interleaved = GhostBatchNorm(5, num_splits=2).double()
    images = random_images(8, 5, 4, 3)
    plain = nn.BatchNorm2d(5).double()
    expected = torch.empty_like(images)
    for first in (0, 1):
        expected[first::2] = plain(images[first::2])
    torch.testing.assert_close(interleaved(images), expected)
    assert not torch.allclose(interleaved.running_mean, plain.running_mean)
