"""State between the losses, which read the banks, and the write into them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from selcon_plugin.engine import network as network_module
from selcon_plugin.engine.network import EmbeddingNetwork, SeenBatch
from selcon_plugin.features import Embeddings, GlobalPartEmbedding
from selcon_plugin.methods import Method, build_method
from selcon_plugin.models.backbone import ModelBackbone
from selcon_plugin.models.preprocessing import Preprocessing

IMAGES = 12
OPTIONS: dict[str, dict[str, Any]] = {
    "SelectiveContrastive": {"num_neighbors": 2, "num_negatives": 4, "warmup_epochs": 0},
    "CACL": {},
}


class Convolution(ModelBackbone):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 8, 3, stride=4), Preprocessing(size=(16, 8)))

    def compute_map(self, images: Tensor) -> Tensor:
        return self.model(images)


def unit(*shape: int) -> Tensor:
    return nn.functional.normalize(torch.randn(*shape), dim=-1)


def make_network(name: str = "SelectiveContrastive") -> EmbeddingNetwork:
    torch.manual_seed(0)
    network = EmbeddingNetwork(
        nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU()),
        GlobalPartEmbedding(8, 8, 2),
        Preprocessing(pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3),
        images_normalized=True,
    )
    network.method = build_method(name, IMAGES, 8, 2, 4, **OPTIONS[name])
    if name == "SelectiveContrastive":
        network.method.prepare(Embeddings(unit(IMAGES, 8), unit(IMAGES, 2, 4)), None)
    else:
        from selcon_plugin.clustering import PseudoLabels

        labels = PseudoLabels.numbered([i // 4 for i in range(IMAGES)])
        network.method.prepare(Embeddings(unit(IMAGES, 8)), None, labels)
    return network


def see(network: EmbeddingNetwork, index: list[int]) -> None:
    images = torch.randn(len(index), 3, 16, 8)
    network.losses(images, torch.tensor(index), torch.zeros(len(index), dtype=torch.int64))


@pytest.mark.parametrize("name", OPTIONS)
def test_there_is_one_queue_and_a_skipped_step_clears_it(name: str) -> None:
    network = make_network(name)
    method = network.method
    assert method is not None
    see(network, [3, 1])
    assert method.take_memos() == []  # the network's queue has them
    assert len(network.pending_batch().memos) == 1
    network.clear_pending()
    see(network, [5, 0])
    see(network, [7, 2, 4])
    assert [size for size, _ in network.pending_batch().memos] == [2, 3]
    network.update_banks()
    assert method.step == 1
    with pytest.raises(RuntimeError, match="must follow a training step"):
        network.update_banks()


def test_micro_batches_are_joined_once(monkeypatch: pytest.MonkeyPatch) -> None:
    joined = []
    join = Embeddings.cat
    monkeypatch.setattr(
        Embeddings, "cat", lambda batches: joined.append(len(batches)) or join(batches)
    )
    network = make_network()
    for index in ([3, 1], [5, 0], [7, 2]):
        see(network, index)
    seen = network.pending_batch()
    assert network.pending_batch() is seen
    assert seen.index.tolist() == [3, 1, 5, 0, 7, 2]
    network.update_banks()
    assert joined == [3]


def test_whole_batch_is_not_copied() -> None:
    batch = SeenBatch(torch.tensor([1]), Embeddings(unit(1, 8)), [])
    assert SeenBatch.cat([batch]) is batch


def test_feature_map_is_formed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    formed = []
    form = network_module.as_feature_map
    monkeypatch.setattr(
        network_module, "as_feature_map", lambda *a: formed.append(a) or form(*a)
    )
    plain = make_network()
    plain.embed(torch.randn(2, 3, 16, 8))
    assert len(formed) == 1
    plain.backbone = Convolution()  # forms it itself
    plain.embed(torch.randn(2, 3, 16, 8))
    assert len(formed) == 1


def test_own_method_needs_no_memos() -> None:
    """``loss`` and ``update`` as documented are all that a method has to have."""

    class Own(Method):
        def prepare(self, embeddings, camids, pseudo_labels=None):  # type: ignore[no-untyped-def]
            self._finish_prepare()

        def loss(self, embeddings, index, camids):  # type: ignore[no-untyped-def,override]
            return {"loss": embeddings.global_features.square().sum()}

        def update(self, index, embeddings):  # type: ignore[no-untyped-def]
            self.written = index.tolist()
            self._finish_update()

    network = make_network()
    network.method = Own(IMAGES, 8)
    see(network, [3, 1])
    see(network, [2, 4])
    network.update_banks()
    assert network.method.written == [3, 1, 2, 4]


def step(network: EmbeddingNetwork) -> None:
    with torch.no_grad():
        for weight in network.heads.parameters():
            weight.add_(0.1)


def test_loop_that_never_writes_the_banks_stops_at_its_second_step() -> None:
    network = make_network()
    see(network, [3, 1])
    see(network, [5, 0])  # a micro-batch of the same step
    step(network)
    for _ in range(3):
        with pytest.raises(RuntimeError, match=r"not written.*SelConTrainer"):
            see(network, [7, 2])
    assert len(network.pending_batch().index) == 4
    network.update_banks()
    see(network, [7, 2])


def test_queue_is_bounded_where_no_weight_changes() -> None:
    network = make_network()
    for _ in range(IMAGES // 2):
        see(network, [3, 1])
    with pytest.raises(RuntimeError, match="not written"):
        see(network, [3, 1])
    assert len(network.pending_batch().index) <= IMAGES


def test_opened_step_sees_its_micro_batches_and_no_more() -> None:
    network = make_network()
    network.begin_step(2)
    see(network, [3, 1])
    see(network, [5, 0])
    with pytest.raises(RuntimeError, match="not written"):
        see(network, [7, 2])
    with pytest.raises(RuntimeError, match="not written"):
        network.begin_step()
    network.update_banks()
    with pytest.raises(RuntimeError, match="not written"):
        see(network, [7, 2])
    network.begin_step()
    see(network, [7, 2])


@pytest.mark.parametrize("index", [-1, IMAGES, 10_000])
def test_label_that_is_no_index_is_refused(index: int) -> None:
    with pytest.raises(RuntimeError, match=rf"^{index} is not the index"):
        see(make_network(), [3, index])


@pytest.mark.parametrize(
    ("index", "paths", "message"),
    [
        ([0, 1], ["a", "c"], "c has the label 1"),
        ([0, 7], ["a", "b"], "b has the label 7"),
        ([2, 2], ["c", "b"], "b and c have the same label 2"),
    ],
)
def test_labels_that_are_not_those_of_the_paths_are_refused(
    index: list[int], paths: list[str], message: str
) -> None:
    network = make_network()
    network.training_paths = ["a", "b", "c"]
    network.check_paths(torch.tensor([2, 0, 2]), ["c", "a", "c"])
    with pytest.raises(RuntimeError, match=message):
        network.check_paths(torch.tensor(index), paths)
