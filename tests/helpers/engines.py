"""Helpers for the tests of ``ImageSelConEngine``."""

import torch
from torch import nn

from selcon_plugin.compat.torchreid import import_torchreid

torchreid = import_torchreid()

METHODS = ["SelectiveContrastive", "ClusterContrast", "SelConCluster"]
# With these options the features of a random network on 40 images form clusters.
CLUSTERING = {"eps": 0.7, "min_samples": 2, "k1": 8, "k2": 3}
BATCH, IMAGES = 8, 40
NETWORK = "timm:test_resnet"  # a third of OSNet x0.25's time


def run(engine, folder, epochs=2, **arguments):
    engine.run(save_dir=str(folder), max_epoch=epochs, **arguments)
    return engine


def network_of(engine):
    model = engine.model
    return model.module if isinstance(model, nn.DataParallel) else model


def state_of(engine):
    return network_of(engine).state_dict()


def assert_equal_states(first, second):
    first, second = state_of(first), state_of(second)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def assert_states_differ(first, second, name="heads.global_projection.weight"):
    assert not torch.equal(state_of(first)[name], state_of(second)[name])


def checkpoints_in(folder):
    return sorted(file.name for file in (folder / "model").iterdir())


def record_losses(engine):
    """Record the return value of every step."""
    found, step = [], engine.forward_backward

    def recorded(batch):
        found.append(step(batch))
        return found[-1]

    engine.forward_backward = recorded
    return found


class Scalars:
    """A fake of TensorBoard's writer."""

    def __init__(self):
        self.found = {}

    def add_scalar(self, name, value, step):
        self.found.setdefault(name, {})[step] = float(value)

    def close(self):
        pass
