"""Where experts go: shares and entropies held against arithmetic done here, pictures found, a heat map drawn."""

import math
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from parameternet.layers import DynamicConv
from parameternet.prediction import Predictor
from parameternet.routing import LayerRouting, Routing, Row, draw, find_images, measure
from parameternet.training import DataError

RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (51, 102, 153)


class Tiny(nn.Module):
    """One dynamic convolution, whose router sees the mean colour of a picture."""

    def __init__(self, weight, bias, routing="softmax"):
        super().__init__()
        self.num_classes = 2
        self.pretrained_cfg = {
            "architecture": "tiny", "num_classes": 2, "input_size": (3, 8, 8), "crop_pct": 1.0, "mean": (0, 0, 0),
            "std": (1, 1, 1), "label_descriptions": {"n1": "fire engine"},
        }  # fmt: skip
        self.conv = DynamicConv(3, 2, num_experts=len(bias), routing=routing, routing_norm="none")
        with torch.no_grad():
            self.conv.routing.weight.copy_(torch.tensor(weight))
            self.conv.routing.bias.copy_(torch.tensor(bias))

    def forward(self, x):
        return self.conv(x).mean((2, 3))


def save(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def routed(network, folder, **options):
    return measure(Predictor(network, "cpu"), find_images([folder]), **options)


def only_layer(network, folder):
    return routed(network, folder).layers[0]


# Measurement ---------------------------------------------------------------------------------------------------------

WEIGHT = [[2.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -1.0, 3.0]]
BIAS = [0.1, 0.0, -0.4]


def routing_weights_of(colour, routing):
    logits = [
        sum(w * c / 255 for w, c in zip(row, colour, strict=True)) + b for row, b in zip(WEIGHT, BIAS, strict=True)
    ]
    if routing == "sigmoid":
        return [1 / (1 + math.exp(-z)) for z in logits]
    return [math.exp(z) / sum(map(math.exp, logits)) for z in logits]


def mean(rows):
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def entropy(shares):
    return -sum(p * math.log(p) for p in shares)


@pytest.mark.parametrize("routing", ["sigmoid", "softmax"])
def test_figures_are_those_of_hand_arithmetic(tmp_path, routing):
    classes = {"n1": [RED, GREY], "n2": [BLUE]}  # of unequal size: a mean of means would show
    for name, colours in classes.items():
        for index, colour in enumerate(colours):
            save(tmp_path / name / f"{index}.png", colour)
    layer = only_layer(Tiny(WEIGHT, BIAS, routing), tmp_path)
    routing_weights = [[routing_weights_of(c, routing) for c in colours] for colours in classes.values()]
    shares = [[[c / sum(picture) for c in picture] for picture in rows] for rows in routing_weights]
    each = [picture for rows in shares for picture in rows]
    assert layer.name == "conv" and layer.num_experts == 3 and layer.images == 3
    assert layer.routing_weights.dtype == layer.shares.dtype == torch.float64
    assert np.allclose(layer.routing_weights, [mean(rows) for rows in routing_weights], atol=1e-6)
    assert np.allclose(layer.shares, [mean(rows) for rows in shares], atol=1e-6)
    assert np.allclose(layer.mean_shares, mean(each), atol=1e-6)
    assert layer.image_entropy == pytest.approx(mean([[entropy(p)] for p in each])[0] / math.log(3), abs=1e-6)
    assert layer.overall_entropy == pytest.approx(entropy(mean(each)) / math.log(3), abs=1e-6)
    assert layer.experts_in_use == pytest.approx(math.exp(entropy(mean(each))), abs=1e-5)
    assert layer.image_entropy < layer.overall_entropy < 1


@pytest.mark.parametrize("routing", ["sigmoid", "softmax"])
def test_a_uniform_router_uses_all_experts(tmp_path, routing):
    save(tmp_path / "a.png", GREY)
    layer = only_layer(Tiny([[0.0] * 3] * 5, [0.0] * 5, routing), tmp_path)
    assert layer.image_entropy == pytest.approx(1) and layer.overall_entropy == pytest.approx(1)
    assert layer.experts_in_use == pytest.approx(5) and layer.active_experts == 5
    assert np.allclose(layer.routing_weights, 0.5 if routing == "sigmoid" else 0.2)


def test_a_router_that_always_takes_one_expert_uses_one(tmp_path):
    for name, colour in {"a": RED, "b": BLUE}.items():
        save(tmp_path / f"{name}.png", colour)
    layer = only_layer(Tiny([[0.0] * 3] * 4, [500.0, 0.0, 0.0, 0.0]), tmp_path)
    assert layer.image_entropy == layer.overall_entropy == 0
    assert layer.experts_in_use == 1 and layer.active_experts == 1
    assert layer.shares.tolist() == [[1, 0, 0, 0]] * 2


def test_one_expert_alone_has_no_entropy(tmp_path):
    save(tmp_path / "a.png", RED)
    layer = only_layer(Tiny([[1.0] * 3], [0.0], "sigmoid"), tmp_path)
    assert (layer.image_entropy, layer.overall_entropy, layer.experts_in_use, layer.active_experts) == (0, 0, 1, 1)


def test_all_zero_routing_weights_give_equal_shares(tmp_path):
    save(tmp_path / "a.png", RED)
    layer = only_layer(Tiny([[0.0] * 3] * 4, [-500.0] * 4, "sigmoid"), tmp_path)
    assert layer.routing_weights.tolist() == [[0.0] * 4] and layer.shares.tolist() == [[0.25] * 4]


def test_shares_separate_classes_that_are_routed_differently(tmp_path):
    for index in range(2):
        save(tmp_path / "n1" / f"{index}.png", RED)
        save(tmp_path / "blue" / f"{index}.png", BLUE)
    found = routed(Tiny([[500.0, 0.0, 0.0], [0.0, 0.0, 500.0]], [0.0, 0.0]), tmp_path, batch_size=3)
    layer = found.layers[0]
    assert found.rows == [Row("blue", "blue", 2, True), Row("n1", "fire engine", 2, True)] and found.images == 4
    assert layer.shares.tolist() == [[0, 1], [1, 0]]
    assert layer.image_entropy == 0 and layer.overall_entropy == pytest.approx(1)
    assert layer.experts_in_use == pytest.approx(2)


@pytest.mark.parametrize(("share", "active"), [(0.04, 1), (0.06, 2)])
def test_an_expert_is_active_from_a_tenth_of_an_even_share(tmp_path, share, active):
    save(tmp_path / "a.png", RED)
    layer = only_layer(Tiny([[0.0] * 3] * 2, [math.log(1 - share), math.log(share)]), tmp_path)
    assert layer.active_experts == active


def test_layer_used_twice_counts_each_image_once(tmp_path):
    class Twice(Tiny):
        def forward(self, x):
            return (self.conv(x) + self.conv(x.flip(1))).mean((2, 3))

    for name, colour in {"a": RED, "b": GREEN}.items():
        save(tmp_path / f"{name}.png", colour)
    layer = only_layer(Twice([[500.0, 0.0, 0.0], [0.0, 400.0, 400.0]], [0.0, 0.0]), tmp_path)
    assert layer.images == 2 and layer.shares.tolist() == [[0.5, 0.5], [0, 1]]


def test_damaged_images_are_named_and_others_keep_their_rows(tmp_path):
    save(tmp_path / "a.png", RED)
    (tmp_path / "b.png").write_text("no image")
    for name in "cd":
        save(tmp_path / f"{name}.png", BLUE)
    found = routed(Tiny([[500.0, 0.0, 0.0], [0.0, 0.0, 500.0]], [0.0, 0.0]), tmp_path)
    assert found.unreadable == [(str(tmp_path / "b.png"), "not an image, or of a format that Pillow does not read")]
    assert [row.label for row in found.rows] == ["a.png", "c.png", "d.png"]
    assert found.layers[0].shares.tolist() == [[1, 0], [0, 1], [0, 1]]


def test_nothing_to_measure_is_an_error(tmp_path):
    network = Tiny(WEIGHT, BIAS)
    with pytest.raises(
        ValueError, match=r"none of the 1 given could be read \(the first is .*none.png: no such file\): give"
    ):
        routed(network, tmp_path / "none.png")
    network.spare = DynamicConv(3, 2)
    with pytest.raises(ValueError, match="no image reached spare"):
        routed(network, save(tmp_path / "a.png", RED))
    del network.spare
    network.conv = nn.Conv2d(3, 2, 1)
    with pytest.raises(ValueError, match="expected a network with dynamic convolutions, but this Tiny has none"):
        routed(network, tmp_path)


# Pictures ------------------------------------------------------------------------------------------------------------


def tar_of(folder, path):
    with tarfile.open(path, "w") as tar:
        for file in sorted(folder.rglob("*.*")):
            tar.add(file, file.relative_to(folder))
    return path


def test_a_tar_gives_what_its_folder_gives(tmp_path):
    colours = {"n1/a": RED, "n1/b": GREY, "n2/a": BLUE, "single": GREEN}
    for name, colour in colours.items():
        save(tmp_path / "folder" / f"{name}.png", colour)
    tar = tar_of(tmp_path / "folder", tmp_path / "all.tar")
    of_folder, of_tar = (routed(Tiny(WEIGHT, BIAS), path) for path in (tmp_path / "folder", tar))
    assert [row[1:] for row in of_folder.rows] == [("single.png", 1, False), ("fire engine", 2, True), ("n2", 1, True)]
    assert [row[1:] for row in of_tar.rows] == [row[1:] for row in of_folder.rows]
    assert torch.equal(of_tar.layers[0].routing_weights, of_folder.layers[0].routing_weights)


def test_damage_inside_a_tar_is_named_and_the_others_keep_their_rows(tmp_path):
    for name, colour in {"n1/a": RED, "n1/b": BLUE, "n2/c": RED}.items():
        path = save(tmp_path / "folder" / f"{name}.png", colour)
        if name == "n1/a":
            path.write_bytes(path.read_bytes()[:40])
    tar = tar_of(tmp_path / "folder", tmp_path / "all.tar")
    found = routed(Tiny([[500.0, 0.0, 0.0], [0.0, 0.0, 500.0]], [0.0, 0.0]), tar)
    assert [name for name, _ in found.unreadable] == [f"{tar}/n1/a.png"]
    assert found.layers[0].shares.tolist() == [[0, 1], [1, 0]]


@pytest.mark.parametrize("content", [b"", b"no tar", None])
def test_a_tar_without_pictures_is_an_error(tmp_path, content):
    path = tmp_path / "a.tar"
    if content is None:
        tarfile.open(path, "w").close()
    else:
        path.write_bytes(content)
    with pytest.raises((ValueError, DataError), match=r"a\.tar.* [Ee]xpected a "):
        find_images([path])


def test_a_class_gives_a_fixed_choice_that_others_do_not_change(tmp_path):
    for index in range(30):
        save(tmp_path / "n1" / f"{index:02}.png", RED)
    alone = [picture.name for picture in find_images([tmp_path], per_class=4)]
    for index in range(3):
        save(tmp_path / "a" / f"{index}.png", RED)
    both = find_images([str(tmp_path)], per_class=4)
    assert len(alone) == 4 and alone == sorted(alone) and alone != [str(p) for p in sorted(tmp_path.glob("n1/*"))[:4]]
    assert [picture.name for picture in both if picture.group == "n1"] == alone
    assert [Path(picture.name).name for picture in both if picture.group == "a"] == ["0.png", "1.png", "2.png"]


def test_images_without_class_are_all_used_with_distinct_names(tmp_path):
    given = [save(tmp_path / folder / "cat.png", RED) for folder in "abc"] + [save(tmp_path / "dog.png", BLUE)]
    pictures = find_images(given, per_class=1)
    found = measure(Predictor(Tiny(WEIGHT, BIAS), "cpu"), pictures)
    assert [row.label for row in found.rows] == ["a/cat.png", "b/cat.png", "c/cat.png", "dog.png"]


# The heat map --------------------------------------------------------------------------------------------------------


def fake(shares, num_layers=1):
    shares = torch.tensor(shares, dtype=torch.float64)
    layer = LayerRouting("blocks.0.conv", shares, shares, shares.mean(0), 0.5, len(shares))
    rows = [Row(str(index), f"row {index}", 1, False) for index in range(len(shares))]
    return Routing("tiny", rows, [layer] * num_layers, [])


def drawing(path, shares, num_layers=1):
    draw(fake(shares, num_layers), path)
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def area(picture, colour):
    """Pixels of a colour: only those of the heat map and its scale have the ends of the scale."""
    return int((np.abs(picture - colour).max(2) <= 2).sum())


def test_colours_are_shares_relative_to_an_even_one(tmp_path):
    darkest_red, darkest_blue, middle = (103, 0, 31), (5, 48, 97), (247, 247, 247)
    one_takes_all = drawing(tmp_path / "a.png", [[0.0, 1.0, 0.0, 0.0]])
    assert area(one_takes_all, darkest_blue) > 2.5 * area(one_takes_all, darkest_red) > 10_000
    even = drawing(tmp_path / "b.png", [[0.25] * 4])
    assert area(even, middle) > 10 * area(one_takes_all, middle) and area(even, darkest_red) < 1000
    favoured = drawing(tmp_path / "c.png", [[0.5, 0.5 / 3, 0.5 / 3, 0.5 / 3]])
    cell = favoured[:, favoured.shape[1] // 4]
    assert any(r > b + 50 for r, _, b in cell) and not any(b > r + 50 for r, _, b in cell)


def test_plot_size_grows_with_layers_and_rows(tmp_path):
    few = drawing(tmp_path / "few.png", [[0.1, 0.2, 0.3, 0.4]] * 3)
    many = drawing(tmp_path / "many.png", [[0.1, 0.2, 0.3, 0.4]] * 100, num_layers=88)
    assert 900 < few.shape[1] < 1500 and 500 < few.shape[0] < 1000
    assert 2400 < many.shape[1] < 3500 and 1500 < many.shape[0] < 3000


@pytest.mark.parametrize("suffix", [".pdf", ".svg", ".JPG", ".webp"])
def test_the_suffix_is_the_format(tmp_path, suffix):
    draw(fake([[1.0]]), tmp_path / f"a{suffix}")
    start = (tmp_path / f"a{suffix}").read_bytes()[:16]
    assert {".pdf": b"%PDF", ".svg": b"<?xml", ".JPG": b"\xff\xd8", ".webp": b"WEBP"}[suffix] in start


def test_names_are_no_formulae(tmp_path):
    found = fake([[0.5, 0.5]])
    found.rows[0] = Row("a", r"5$ \no $.jpg", 1, False)
    draw(found, tmp_path / "a.svg")
    assert "no $.jpg" in (tmp_path / "a.svg").read_text()


def test_a_drawing_that_fails_leaves_the_old_picture(tmp_path, monkeypatch):
    def full(_, file, **__):
        file.write(b"half")
        raise OSError("disk full")

    old = save(tmp_path / "a.png", RED).read_bytes()
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", full)
    with pytest.raises(OSError, match="disk full"):
        draw(fake([[1.0]]), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes() == old and len(list(tmp_path.iterdir())) == 1
