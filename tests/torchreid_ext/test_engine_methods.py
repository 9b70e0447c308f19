"""``ImageSelConEngine`` trains a method of the user's own."""

import copy
from types import SimpleNamespace
from typing import Annotated

import pytest
import torch

from helpers.engines import BATCH, IMAGES, record_losses, run
from selcon_plugin.methods import base, register_method
from selcon_plugin.methods.cluster_contrast import ClusterContrast
from selcon_plugin.options import Interval


@pytest.fixture
def views_method(monkeypatch):
    """A method of a user's script that compares a batch with two views of it."""
    monkeypatch.setattr(base, "_METHODS", copy.copy(base._METHODS))
    seen = SimpleNamespace(images=[], index=[], features=[])

    @register_method("Views")
    class Views(ClusterContrast):
        def __init__(
            self,
            num_images: int,
            global_dim: int,
            num_parts: int = 0,
            part_dim: int = 0,
            *,
            view_weight: Annotated[float, Interval(0)] = 1.0,
        ) -> None:
            super().__init__(num_images, global_dim)
            self.view_weight = view_weight

        def make_views(self, images):
            seen.images.append(images.clone())
            return images, images.flip(2)

        def loss(self, embeddings, index, camids, *views):
            seen.index.append(index)
            seen.features.append([e.global_features for e in (embeddings, *views)])
            losses = super().loss(embeddings, index, camids)
            apart = embeddings.global_features - views[1].global_features
            return {**losses, "loss_view": self.view_weight * apart.square().sum(1).mean()}

    return seen


def test_method_of_a_users_script_gets_its_views(
    make_engine, manager, tmp_path, views_method
):
    engine = make_engine(
        datamanager=manager(transforms=[]), method="Views", view_weight=0.5
    )
    losses = record_losses(engine)
    run(engine, tmp_path, 1)
    assert len(views_method.images) == IMAGES // BATCH
    # What the method sees are the pixels of the files, 0..255.
    images = engine.train_loader.dataset
    *to_pixels, _ = engine.datamanager.transform_tr.transforms
    for index, batch in zip(views_method.index, views_method.images, strict=True):
        for number, seen in zip(index.tolist(), batch, strict=True):
            picture = images.read(images.paths[number])
            for transform in to_pixels:
                picture = transform(picture)
            assert torch.allclose(seen, 255 * picture, atol=1e-3)
    # The first view is the batch itself, the second another one.
    for own, same, flipped in views_method.features:
        assert torch.allclose(own, same, atol=1e-3)
        assert not torch.allclose(own, flipped, atol=1e-3)
        assert flipped.requires_grad
    assert losses[0]["loss"] == pytest.approx(
        losses[0]["loss_cluster"] + losses[0]["loss_view"]
    )


def test_option_of_a_users_method_is_checked(make_engine, views_method):
    with pytest.raises(ValueError, match=r"view_weight .*>= 0.*got -1"):
        make_engine(method="Views", view_weight=-1.0)
