from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from selcon_plugin.models.ema import EMATeacher


def make_student(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


def train_a_step(student: nn.Module, seed: int) -> None:
    """Move every weight by noise, and the running statistics by a forward pass."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(4, 3, 6, 6, generator=generator)
    device = next(student.parameters()).device
    student(images.to(device))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += torch.randn(parameter.shape, generator=generator).to(device)


def weights_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.named_parameters()}


def assert_same_state(first: nn.Module, second: nn.Module) -> None:
    state, other = first.state_dict(), second.state_dict()
    assert state.keys() == other.keys()
    for name, tensor in state.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_update_equals_the_definition_by_loops(decay: float, device: str) -> None:
    student = make_student().to(device).train()
    teacher = EMATeacher(student, decay)
    expected = weights_of(student)
    for step in range(1, 15):
        train_a_step(student, step)
        teacher.update(student)
        rate = min(decay, 1 - 1 / step)
        for name, weight in student.named_parameters():
            expected[name] = rate * expected[name] + (1 - rate) * weight.detach()
    found = weights_of(teacher.module)
    assert teacher.step == 14
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)


def test_teacher_is_the_mean_of_the_weights_until_the_decay_takes_over() -> None:
    student = nn.Linear(1, 1, bias=False)
    teacher = EMATeacher(student, 0.8)  # takes over after 5 updates
    found = []
    for value in (1.0, 3.0, 8.0, 0.0, -2.0, 12.0):
        nn.init.constant_(student.weight, value)
        teacher.update(student)
        found.append(teacher.module.weight.item())
    assert found == pytest.approx([1.0, 2.0, 4.0, 3.0, 2.0, 0.8 * 2.0 + 0.2 * 12.0])


def test_buffers_are_copied() -> None:
    student = make_student().train()
    teacher = EMATeacher(student, 0.9)
    for step in range(3):
        train_a_step(student, step)
        teacher.update(student)
    for (name, own), other in zip(
        teacher.module.named_buffers(), student.buffers(), strict=True
    ):
        assert torch.equal(own, other), name
        assert own.data_ptr() != other.data_ptr()
    assert int(teacher.module[1].num_batches_tracked) == 3


def test_student_is_unchanged() -> None:
    student = make_student().train()
    before = copy.deepcopy(student)
    teacher = EMATeacher(student)
    assert_same_state(teacher.module, student)
    train_a_step(student, 0)
    after = copy.deepcopy(student)
    teacher.update(student)
    assert_same_state(student, after)
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    assert not torch.equal(student[0].weight, before[0].weight)


def test_teacher_cannot_be_trained() -> None:
    model = nn.ModuleDict({"student": make_student()})
    model["teacher"] = teacher = EMATeacher(model["student"])
    for module in (model, teacher):
        module.train()
        assert not any(part.training for part in teacher.modules())
    assert model["student"].training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    images = torch.randn(2, 3, 6, 6, requires_grad=True)
    assert not teacher(images).requires_grad
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    assert trainable == [f"student.{name}" for name, _ in make_student().named_parameters()]


def test_forward_uses_the_averaged_weights_and_the_running_statistics() -> None:
    student = make_student().train()
    teacher = EMATeacher(student, 0.9)
    for step in range(3):
        train_a_step(student, step)
        teacher.update(student)
    images = torch.randn(2, 3, 6, 6)
    frozen = make_student().eval()
    frozen.load_state_dict(teacher.module.state_dict())
    assert torch.equal(teacher(images), frozen(images))
    assert not torch.allclose(teacher(images), student.eval()(images))


def test_several_modules_in_one_teacher() -> None:
    backbone, head = make_student(), nn.Linear(4, 2)
    teacher = EMATeacher(nn.ModuleDict({"backbone": backbone, "head": head}), 0.0)
    nn.init.constant_(head.weight, 3.0)
    teacher.update(nn.ModuleDict({"backbone": backbone, "head": head}))
    assert torch.equal(teacher.module["head"].weight, head.weight)


def test_module_without_buffers_or_without_weights() -> None:
    for student in (nn.Linear(2, 2), nn.BatchNorm1d(2, affine=False), nn.ReLU()):
        teacher = EMATeacher(student)
        teacher.update(student)
        assert_same_state(teacher.module, student)


def test_shared_weights_stay_shared() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    student[1].weight = student[0].weight
    teacher = EMATeacher(student, 0.5)
    for value in (1.0, 2.0):
        nn.init.constant_(student[0].weight, value)
        teacher.update(student)
    assert teacher.module[1].weight is teacher.module[0].weight
    assert torch.equal(teacher.module[0].weight, torch.full((2, 2), 1.5))  # moved once


def test_resumed_run_is_bit_identical() -> None:
    student = make_student().train()
    teacher = EMATeacher(student, 0.9)
    resumed_student = make_student(seed=1).train()
    resumed = EMATeacher(resumed_student, 0.9)
    for step in range(8):
        if step == 4:  # while the teacher is a plain mean, so that the counter matters
            resumed_student.load_state_dict(student.state_dict())
            resumed.load_state_dict(teacher.state_dict())
        for network, follower in ((student, teacher), (resumed_student, resumed)):
            train_a_step(network, step)
            follower.update(network)
    assert resumed.step == teacher.step == 8
    assert_same_state(resumed, teacher)


def test_step_is_restored_inside_a_larger_module() -> None:
    student = make_student()
    model = nn.ModuleDict({"teacher": EMATeacher(student)})
    for _ in range(3):
        model["teacher"].update(student)
    fresh = nn.ModuleDict({"teacher": EMATeacher(student)})
    fresh.load_state_dict(model.state_dict())
    assert fresh["teacher"].step == 3


def test_reset_copies_the_student_and_clears_the_step() -> None:
    student = make_student().train()
    teacher = EMATeacher(student, 0.9)
    for step in range(3):
        train_a_step(student, step)
        teacher.update(student)
    teacher.reset(student)
    assert_same_state(teacher.module, student)
    assert teacher.step == 0
    assert_same_state(teacher, EMATeacher(student, 0.9))


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_outside_its_range_is_refused(decay: float) -> None:
    with pytest.raises(ValueError, match=rf"decay .*got {decay}"):
        EMATeacher(nn.Linear(1, 1), decay)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (nn.Linear(2, 3), "weight"),  # a shape that would broadcast
        (nn.Linear(2, 1, bias=False), "bias"),
        (nn.Sequential(nn.Linear(2, 1)), r"0\.bias"),
    ],
)
def test_another_student_is_refused_and_changes_nothing(
    other: nn.Module, name: str
) -> None:
    student = nn.Linear(2, 1)
    teacher = EMATeacher(student)
    before = copy.deepcopy(teacher)
    with pytest.raises(ValueError, match=rf"than the teacher: .*{name}"):
        teacher.update(other)
    assert_same_state(teacher, before)
    assert teacher.step == 0


def test_repr_includes_the_settings() -> None:
    assert "decay=0.99" in repr(EMATeacher(nn.Linear(1, 1), 0.99))
