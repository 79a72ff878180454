"""A teacher's answers: to which images, in which order of classes, and what becomes of them."""

import pytest
import timm
import torch
from pictures import COLOURS
from stopping import Stop

from parameternet import upcycle
from parameternet.data.sources import Source, open_dataset
from parameternet.hub import release
from parameternet.training import DataError, Interrupted, RecipeError, run, teacher
from parameternet.training.checkpoint import load_last, save_weights
from parameternet.training.device_data import DevicePixels
from parameternet.training.distributed import Place

CPU = torch.device("cpu")
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


@pytest.fixture
def taught(recipe, tmp_path):
    """Makes a recipe with a teacher that knows the three colours, and one more class, in an order of its own."""
    path = tmp_path / "teacher.safetensors"
    write(path, network(), ["red", "yellow", "blue", "green"])
    plain = dict(cache="device", cache_size=32, auto_augment=None, mixup=0.0, cutmix=0.0)
    return lambda **changes: recipe(**{**plain, "teacher": str(path), **changes})


def network(name="test_efficientnet", **kwargs):
    torch.manual_seed(1)
    model = timm.create_model(name, num_classes=4, **kwargs).eval()
    with torch.no_grad():
        model.get_classifier().weight.mul_(100)  # far from undecided, so that a wrong answer shows
    return model


def write(path, model, names, **changes):
    cfg = {"num_classes": 4, "input_size": [3, 40, 40], "mean": MEAN, "std": STD, "interpolation": "bicubic"}
    config = {"architecture": "test_efficientnet", "num_classes": 4, "label_names": names, "pretrained_cfg": cfg}
    save_weights(path, model.state_dict(), {**config, **changes})


def ask(r, pictures, folder, steps=None):
    source = Source(open_dataset(str(pictures / "train"), "train"), "train")
    data = DevicePixels(source, 32, CPU, pytest.fail)
    steps = [] if steps is None else steps
    found = teacher.answers(r, data, source.classes, folder, Place(0, 1, CPU), lambda *step: steps.append(step))
    return data, found


def expected(model, data, side, columns):
    images = torch.nn.functional.interpolate(data.pixels.float(), (side, side), mode="bicubic", antialias=True)
    images = images.clamp(0, 255) / 255
    mean, std = (torch.tensor(v)[:, None, None] for v in (MEAN, STD))
    with torch.no_grad():
        return model((images - mean) / std)[:, columns].softmax(1)


@pytest.mark.parametrize("side", [None, 48])
def test_teacher_predictions_follow_the_datas_class_order(taught, pictures, tmp_path, side):
    assert list(COLOURS) == ["blue", "green", "red"]
    steps = []
    data, found = ask(taught(teacher_size=side), pictures, tmp_path / "run", steps)
    truth = expected(network(), data, side or 40, [2, 3, 0])
    assert found.dtype == torch.float16 and found.shape == (24, 3)
    assert truth.std(0).max() > 0.05  # pictures differ, or their order could be any
    assert torch.allclose(found.float(), truth, atol=1e-3)
    assert steps == [(1, 1)]


def test_it_is_asked_once_in_a_run_folder(taught, pictures, tmp_path, monkeypatch):
    _, first = ask(taught(), pictures, tmp_path / "run")
    with monkeypatch.context() as nobody:
        nobody.setattr(teacher, "load", lambda _: pytest.fail("asked again"))
        assert torch.equal(ask(taught(), pictures, tmp_path / "run")[1], first)
    assert not torch.equal(ask(taught(teacher_size=24), pictures, tmp_path / "run")[1], first)


def test_untrained_upcycled_teacher_is_collapsed_to_dense(pictures, taught, tmp_path, monkeypatch):
    dynamic, names = upcycle(network()), ["red", "yellow", "blue", "green"]
    cfg = {"num_classes": 4, "mean": MEAN, "std": STD, "input_size": (3, 40, 40)}
    monkeypatch.setattr(teacher, "load", lambda _: (dynamic, {"label_names": names, "pretrained_cfg": cfg}))
    data, found = ask(taught(), pictures, tmp_path / "run")
    assert torch.allclose(found.float(), expected(network(), data, 40, [2, 3, 0]), atol=1e-3)
    assert not any(isinstance(module, teacher.DynamicConv) for module in dynamic.modules())


def test_targets_are_labels_and_answers_by_their_shares():
    labels, answers = torch.tensor([2, 0]), torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]], dtype=torch.float16)
    targets = teacher.Targets(labels, answers, share=0.25, smoothing=0.3)
    got = targets[torch.tensor([1, 0])]
    hard = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    assert torch.allclose(got, 0.75 * hard + 0.25 * answers.float().flip(0))


def test_distilled_run_learns_from_its_teacher_and_resumes_bitwise(taught, tmp_path):
    with pytest.raises(Interrupted):
        run(taught(), tmp_path / "stopped", Stop(8))
    run(taught(), tmp_path / "stopped")
    run(taught(), tmp_path / "whole")
    a, b = (load_last(tmp_path / name)["model"] for name in ("stopped", "whole"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    run(taught(teacher_share=0.0), tmp_path / "labels")
    other = load_last(tmp_path / "labels")["model"]
    assert not all(torch.equal(a[name], other[name]) for name in a)


def test_the_card_tells_of_the_teacher(taught, pictures, tmp_path):
    run(taught(epochs=1, teacher_size=48), tmp_path / "run")
    release(tmp_path / "run", "test_efficientnet.colours", str(pictures / "val"), destination=tmp_path, workers=0)
    card = (tmp_path / "test_efficientnet.colours" / "README.md").read_text()
    assert "- distillation: the targets are 50% the probabilities of `teacher.safetensors`, computed once per" in card
    assert "whole image at 48 px, and 50% the labels" in card
    assert "may hold these validation images" in card and str(tmp_path) not in card


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(cache="ram"), "cache=device"),
        (dict(mixup=0.2), "mixup=0 and cutmix=0"),
        (dict(teacher_share=1.5), "from 0 to 1, got 1.5"),
    ],
)
def test_what_a_teacher_cannot_do_is_refused(taught, changes, message):
    with pytest.raises(RecipeError, match=message):
        taught(**changes)


def test_a_teacher_that_does_not_know_the_classes_is_refused(taught, tmp_path):
    write(tmp_path / "other.safetensors", network(), ["red", "yellow", "pink", "green"])
    with pytest.raises(DataError, match="classes do not include blue of the data's 3"):
        run(taught(teacher=str(tmp_path / "other.safetensors")), tmp_path / "run")
