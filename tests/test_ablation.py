"""Ablations of routing, held against routers that were replaced by hand."""

import json

import checkpoints
import numpy as np
import pytest
import timm
import torch
from click.testing import CliRunner
from lively import lively
from PIL import Image
from torch import nn

from parameternet import DynamicConv, cli
from parameternet.models import loading
from parameternet.prediction import Predictor
from parameternet.routing import ablate
from parameternet.training import validate

CLASSES = ["n0", "n1", "n2", "n3", "n4"]
TIE = 1e-3  # of the spread of logits: processors round differently, so a smaller margin may fall either way


def draw(number):
    """Images of many colours and contrasts."""
    rng = np.random.default_rng(number)
    noise = rng.normal(0, rng.integers(5, 90), (64, 64, 3))
    return Image.fromarray((rng.integers(0, 256, 3) + noise).clip(0, 255).astype("uint8"))


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """A checkpoint whose routing matters, and images labelled by its own answers: it is right on all of them."""
    root, pictures = tmp_path_factory.mktemp("ablation"), [draw(number) for number in range(60)]
    network = lively(checkpoints.network(), seed=3)
    folder = checkpoints.write(root / checkpoints.NAME, network, label_names=CLASSES, label_descriptions={})
    predictor = Predictor(loading.load(folder).model, "cpu")
    with torch.no_grad():  # answers of every class
        network.classifier.bias -= network(torch.stack([predictor.transform(image) for image in pictures])).mean(0)
    folder = checkpoints.write(folder, network, label_names=CLASSES, label_descriptions={})
    for name in CLASSES:
        (root / "images" / name).mkdir(parents=True)
    predictor = Predictor(loading.load(folder).model, "cpu")
    with torch.no_grad():
        logits = predictor.model(torch.stack([predictor.transform(image) for image in pictures]))
    answers = logits.argmax(1)
    for number in (margins(logits, answers) > TIE).nonzero()[:, 0].tolist():
        pictures[number].save(root / "images" / CLASSES[answers[number]] / f"{number}.png")
    return folder, root / "images"


def margins(logits, labels):
    """How far each label's logit is above the highest other one, as a share of the spread of logits."""
    own = logits.gather(1, labels[:, None])[:, 0]
    others = logits.scatter(1, labels[:, None], float("-inf")).amax(1)
    return (own - others) / logits.std()


class By(nn.Module):
    """A router whose answers are changed by a function."""

    def __init__(self, router, change):
        super().__init__()
        self.router, self.change = router, change

    def forward(self, x):
        return self.change(self.router(x))


def by_hand(folder, images, change):
    """Lowest and highest top-1 with `change(layer's own routing weights of all images)` for each router's answers."""
    network = loading.load(folder).model
    predictor = Predictor(network, "cpu")
    paths = sorted(images.rglob("*.png"))
    x = torch.stack([predictor.transform(Image.open(path).convert("RGB")) for path in paths])
    labels = torch.tensor([CLASSES.index(path.parent.name) for path in paths])
    convs, seen = [m for m in network.modules() if isinstance(m, DynamicConv)], {}
    hooks = [c.routing.register_forward_hook(lambda m, _, y, c=c: seen.__setitem__(c, y)) for c in convs]
    with torch.no_grad():
        network(x)
        for hook in hooks:
            hook.remove()
        for conv in convs:
            conv.routing = By(conv.routing, change(seen[conv]))
        found = margins(network(x), labels)
    return [100 * float((found > limit).float().mean()) for limit in (TIE, -TIE)]


def shares(weights):
    return weights / weights.sum(1, keepdim=True)


def without_second(weights):
    kept = weights * torch.tensor([1.0, 0.0, 1.0, 1.0])
    return shares(kept) * weights.sum(1, keepdim=True)


CHANGES = {
    "own": lambda seen: lambda w: w,
    "mean weights": lambda seen: lambda w: seen.mean(0).expand_as(w),
    "mean shares": lambda seen: lambda w: shares(seen).mean(0) * w.sum(1, keepdim=True),
    "mean sum": lambda seen: lambda w: shares(w) * seen.sum(1).mean(),
    "without expert 2": lambda seen: without_second,
}


def test_each_row_is_what_replaced_routers_give(case):
    rows = {row.routing: row for row in ablate(*case, workers=0, device="cpu")}
    without = [f"without expert {number}" for number in (1, 2, 3, 4)]
    assert list(rows) == ["own", "mean weights", "mean shares", "mean sum", *without]
    for name, change in CHANGES.items():
        lowest, highest = by_hand(*case, change)
        assert lowest - 1e-4 <= rows[name].top1 <= highest + 1e-4, name
        assert highest - lowest < 5, f"{name}: too many ties to compare"
        assert rows[name].difference == pytest.approx(rows[name].top1 - 100)
    assert rows["own"].top1 == 100 and rows["mean weights"].top1 < 90, "routing matters in this network"


def test_the_network_is_the_same_afterwards(case):
    ablate(*case, workers=0, device="cpu")
    assert validate(*case, workers=0, device="cpu")["top1"] == 100


def test_the_command(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, images = map(str, case)
    done = CliRunner().invoke(cli.main, ["routing", folder, images, "--ablate", "--device", "cpu", "--json"])
    rows = json.loads(done.stdout)
    assert rows[0] == {"routing": "own", "top1": 100.0, "difference": 0.0} and len(rows) == 8
    done = CliRunner().invoke(cli.main, ["routing", folder, images, "--ablate", "--device", "cpu"])
    assert f"{rows[1]['top1']:.2f}" in done.stdout and not list(tmp_path.iterdir())
    done = CliRunner().invoke(cli.main, ["routing", folder, images, images, "--ablate"])
    assert done.exit_code == 2 and "--ablate takes one data set of labelled images, got 2" in done.output


def test_a_static_network_is_an_error(case, tmp_path):
    arguments = {**checkpoints.MODEL_ARGS, "dynamic": False}
    static = timm.create_model("parameternet_50m", num_classes=5, **arguments)
    checkpoints.write(tmp_path / "static", static, model_args=arguments)
    with pytest.raises(ValueError, match="this ParameterNet has none"):
        ablate(tmp_path / "static", case[1])
