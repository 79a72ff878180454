"""`cache: device`: the same pictures, order and labels as otherwise, augmented a batch at a time."""

import numpy as np
import pytest
import torch
from pictures import draw
from PIL import Image, ImageEnhance
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision.transforms import RandomResizedCrop

from parameternet.data.sources import Source, Unreadable, open_dataset
from parameternet.training import DataError, RecipeError, Reporter
from parameternet.training.batches import TrainBatches
from parameternet.training.device_data import (
    Augment,
    DeviceBatches,
    DevicePixels,
    Kept,
    jitter,
    random_boxes,
    sample,
)
from parameternet.training.distributed import Place
from parameternet.training.hub_config import data_config
from parameternet.training.loaders import eval_loader
from parameternet.training.trainer import Trainer

CPU = torch.device("cpu")


def quiet(item):
    raise AssertionError(item)


def source(where):
    return Source(open_dataset(str(where), "train"), str(where))


@pytest.fixture
def plain(recipe):
    """Makes a recipe that `cache: device` can do, changed by keywords."""
    return lambda **changes: recipe(**{"cache": "device", "auto_augment": None, "color_jitter": None, **changes})


def loader(where, r, rank=0, world=1, epoch=0, report=quiet):
    data = DevicePixels(source(where), r.cache_size, CPU, report)
    batches = TrainBatches(len(data.labels), r.batch_size, r.seed, rank, world)
    batches.seek(epoch, 0, r.input_size)
    return DeviceBatches(data, batches, Augment(r, len(data.labels), CPU))


@pytest.mark.parametrize("where", ["train", "train.tar"])
def test_without_augmentation_images_match_the_source(pictures, plain, where):
    r = plain(no_aug=True, hflip=0.0, cache_size=28, input_size=28, batch_size=24, mean=[0.0] * 3, std=[1.0] * 3)
    images, labels = next(iter(loader(pictures / where, r)))
    disk = source(pictures / where)
    order = [key.index for key in next(iter(TrainBatches(24, 24, r.seed, 0, 1)))]
    assert labels.tolist() == [disk.read(i)[1] for i in order]
    for image, i in zip(images, order, strict=True):
        middle = np.asarray(disk.read(i)[0].crop((4, 0, 32, 28)))
        assert np.allclose(255 * image.permute(1, 2, 0).numpy(), middle, atol=1e-2)


def test_without_augmentation_nothing_is_flipped_or_coloured(pictures, plain):
    changes = dict(cache_size=28, input_size=28, batch_size=24, no_aug=True)
    loud = plain(
        **changes, hflip=1.0, vflip=1.0, color_jitter=1.0, auto_augment="rand-m9", crop_mode="rkrc", reprob=1.0
    )
    one, other = (next(iter(loader(pictures / "train", r)))[0] for r in (plain(**changes, hflip=0.0), loud))
    assert torch.equal(one, other)


def test_without_augmentation_nothing_is_erased(tmp_path, plain):
    r = plain(no_aug=True, reprob=1.0, cache_size=28, input_size=28)
    assert Trainer(r, tmp_path, Place(0, 1, CPU), Reporter()).learner.erase is None


def test_normalisation_is_that_of_the_recipe(pictures, plain):
    r = plain(no_aug=True, hflip=0.0, cache_size=28, input_size=28)
    raw = next(iter(loader(pictures / "train", plain(**{**vars(r), "mean": [0.0] * 3, "std": [1.0] * 3}))))[0]
    ours = next(iter(loader(pictures / "train", r)))[0]
    mean, std = (torch.tensor(v)[:, None, None] for v in (r.mean, r.std))
    assert torch.allclose(ours, (raw - mean) / std, atol=1e-4)


def test_boxes_and_flips_copy_the_right_pixels():
    images = torch.arange(2 * 3 * 12 * 10, dtype=torch.float32).reshape(2, 3, 12, 10) % 251
    boxes = torch.tensor([[2.0, 3.0, 6.0, 6.0], [4.0, 0.0, 6.0, 6.0]])  # left, top, width, height
    for mode in ("bilinear", "bicubic"):
        got = sample(images, boxes, torch.tensor([[1.0, 1.0], [1.0, 1.0]]), 6, mode)
        assert torch.allclose(got[0], images[0, :, 3:9, 2:8], atol=1e-2)
        assert torch.allclose(got[1], images[1, :, 0:6, 4:10], atol=1e-2)
        got = sample(images, boxes, torch.tensor([[-1.0, 1.0], [1.0, -1.0]]), 6, mode)
        assert torch.allclose(got[0], images[0, :, 3:9, 2:8].flip(-1), atol=1e-2)
        assert torch.allclose(got[1], images[1, :, 0:6, 4:10].flip(-2), atol=1e-2)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (40, 90)])
def test_crops_are_distributed_as_those_of_torchvision(height, width):
    scale, ratio, draws = [0.08, 1.0], [0.75, 4 / 3], 4000
    torch.manual_seed(0)
    ours = random_boxes(torch.rand(draws, 22), height, width, scale, ratio)
    picture = torch.empty(3, height, width)
    boxes = [RandomResizedCrop.get_params(picture, scale, ratio) for _ in range(draws)]
    theirs = torch.tensor([[left, top, w, h] for top, left, h, w in boxes], dtype=torch.float32)
    for values in (ours, theirs):
        assert (values[:, :2] > -1e-3).all() and (values[:, 0] + values[:, 2] <= width + 1e-3).all()
        assert (values[:, 1] + values[:, 3] <= height + 1e-3).all()
    spread = theirs.std(0)
    assert ((ours.mean(0) - theirs.mean(0)).abs() <= 0.1 * spread + 0.5).all()  # theirs are whole pixels
    assert ((ours.std(0) - spread).abs() <= 0.1 * spread).all()


def test_a_shape_that_never_fits_gives_the_largest_crop_at_the_centre():
    boxes = random_boxes(torch.rand(5, 22), 10, 100, [0.9, 1.0], [0.75, 4 / 3])
    assert torch.allclose(boxes, torch.tensor([50 - 20 / 3, 0.0, 40 / 3, 10.0]).expand(5, 4), atol=1e-4)


def test_colours_change_as_pillow_changes_them():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    for position, enhance in enumerate((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)):
        factors = torch.ones(1, 3)
        factors[0, position] = 1.3
        expected = np.asarray(enhance(Image.fromarray(pixels)).enhance(1.3), dtype=np.float32)
        assert np.abs(jitter(images, factors)[0].permute(1, 2, 0).numpy() - expected).max() <= 2  # they round
    assert torch.allclose(jitter(images, torch.ones(1, 3)), images, atol=1e-3)


def test_random_augmentation_depends_only_on_seed_epoch_and_index(pictures, plain):
    def looks(**changes):
        epoch, world = changes.pop("epoch", 0), changes.pop("world", 1)
        r = plain(color_jitter=0.3, cache_size=28, **changes)
        found = {}
        for rank in range(world):
            made = loader(pictures / "train", r, rank, world, epoch)
            keys = [key.index for batch in made.batches for key in batch]
            found |= dict(zip(keys, torch.cat([images for images, _ in made]), strict=True))
        return found

    one = looks()
    for changes in ({"world": 2}, {"batch_size": 6}):
        other = looks(**changes)
        assert other.keys() == one.keys() and all(torch.allclose(one[i], other[i], atol=1e-5) for i in one)
    for changes in ({"epoch": 1}, {"seed": 1}):
        other = looks(**changes)
        assert not any(torch.equal(one[i], other[i]) for i in one)


def test_flips_come_as_often_as_the_recipe_says(pictures, plain):
    def flipped(**changes):
        r = plain(cache_size=28, input_size=28, batch_size=24, scale=[1.0, 1.0], ratio=[1.0, 1.0], **changes)
        return next(iter(loader(pictures / "train", r)))[0]

    straight, mirrored = flipped(hflip=0.0), flipped(hflip=1.0)
    assert torch.allclose(straight.flip(-1), mirrored, atol=1e-2)
    some = flipped(hflip=0.5)
    share = sum(torch.allclose(a, b, atol=1e-2) for a, b in zip(some, mirrored, strict=True))
    assert 4 <= share <= 20


def test_unreadable_images_are_dropped_and_reported(pictures, plain, tmp_path):
    draw(tmp_path / "train", 4, seed=0)
    (tmp_path / "train" / "green" / "green_1.png").write_bytes(b"not a picture")
    bad = []
    made = loader(tmp_path / "train", plain(cache_size=28), report=bad.append)
    batches = list(made)
    assert [item.name for item in bad] == ["green/green_1.png"] and isinstance(bad[0], Unreadable)
    assert sorted(len(labels) for _, labels in batches) == [3, 4, 4]
    assert torch.cat([labels for _, labels in batches]).bincount().tolist() == [4, 3, 4]


def test_batch_of_unreadable_images_is_empty(plain, tmp_path):
    draw(tmp_path / "train", 2, seed=0)
    for name in ("blue/blue_0", "green/green_0", "green/green_1", "red/red_0", "red/red_1"):
        (tmp_path / "train" / f"{name}.png").write_bytes(b"?")
    batches = list(loader(tmp_path / "train", plain(cache_size=28, batch_size=2), report=lambda item: None))
    assert sorted(tuple(images.shape) for images, _ in batches) == [(0, 3, 32, 32), (0, 3, 32, 32), (1, 3, 32, 32)]


def test_pictures_of_several_sizes_need_a_size(pictures, plain, tmp_path):
    draw(tmp_path / "train", 4, seed=0)
    Image.new("RGB", (50, 40)).save(tmp_path / "train" / "red" / "red_3.png")
    with pytest.raises(DataError, match=r"36 x 28 and 50 x 40: set cache_size"):
        loader(tmp_path / "train", plain())
    assert next(iter(loader(tmp_path / "train", plain(cache_size=20))))[0].shape == (4, 3, 32, 32)


def test_too_little_memory_and_nothing_to_read_are_said(pictures, plain, tmp_path, monkeypatch):
    draw(tmp_path / "train", 1, seed=0)
    for path in (tmp_path / "train").rglob("*.png"):
        path.write_bytes(b"")
    with pytest.raises(DataError, match="no image of"):
        loader(tmp_path / "train", plain(), report=lambda item: None)
    monkeypatch.setattr("parameternet.training.device_data.free_memory", lambda device: 10)
    with pytest.raises(DataError, match=r"needs .* MiB .* lower cache_size, or set cache=none"):
        loader(pictures / "train", plain())


@pytest.mark.parametrize(
    "changes", [{"auto_augment": "rand-m3"}, {"crop_mode": "rkrc"}, {"interpolation": "random"}], ids=str
)
def test_what_is_done_picture_by_picture_is_refused(plain, changes):
    with pytest.raises(RecipeError, match=f"cache: device does not support .*{next(iter(changes))}.* cache=ram"):
        Augment(plain(**changes), 10, CPU)


def test_validation_sees_the_same_batches_each_time_and_reads_once(pictures, plain):
    config = data_config(plain())
    place = Place(0, 1, CPU)
    once = eval_loader(source(pictures / "val"), config, 4, 0, place, quiet)
    kept = Kept(eval_loader(source(pictures / "val"), config, 4, 0, place, quiet), CPU)
    assert len(kept) == len(once) == 4
    first, second = list(kept), list(kept)
    for (a, x), (b, y), (c, z) in zip(once, first, second, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c) and torch.equal(x, y) and torch.equal(x, z)


def test_it_looks_like_timm_s_own_on_average(pictures, plain):
    """Mean and spread of many crops of one picture, beside timm's transform."""
    r = plain(cache_size=28, input_size=28, batch_size=24, mean=[0.0] * 3, std=[1.0] * 3, color_jitter=0.3)
    transform = transforms_imagenet_train(
        28, scale=r.scale, color_jitter=0.3, interpolation="bicubic", use_prefetcher=True
    )
    torch.manual_seed(0)
    picture = Image.fromarray(
        np.kron(np.random.default_rng(0).integers(0, 256, (7, 7, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    )
    theirs = torch.stack([torch.from_numpy(np.asarray(transform(picture))) for _ in range(600)]).float() / 255
    pixels = torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)[None].expand(600, -1, -1, -1)
    ours = Augment(r, 600, CPU)(pixels, torch.arange(600), 0, 28)
    assert torch.allclose(ours.mean((0, 2, 3)), theirs.mean((0, 2, 3)), atol=0.02)
    assert torch.allclose(ours.std((0, 2, 3)), theirs.std((0, 2, 3)), atol=0.02)
