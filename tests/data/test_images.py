"""Every reader of the package gives the same pixels of an image, and an error that names it."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
import torch
from kinds import every_damage, every_kind
from PIL import Image

from parameternet.data import images
from parameternet.data.errors import DataError, ImageError
from parameternet.data.sources import Source, Unreadable, open_dataset
from parameternet.prediction import read_image
from parameternet.routing import find_images
from parameternet.training.device_data import DevicePixels
from parameternet.training.sources import Memory

KINDS, DAMAGE = every_kind(), every_damage()


def tar_of(path, members):
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def folder_of(path, members):
    for name, data in members.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def of(where, index=0):
    return Source(open_dataset(str(where), "train"), str(where)).read(index)[0]


def by_folder(path, suffix, data):
    return of(folder_of(path / "data", {f"cat/1{suffix}": data}))


def by_tar(path, suffix, data):
    return of(tar_of(path / "data.tar", {f"cat/1{suffix}": data}))


def by_tar_in_a_tar(path, suffix, data):
    inner = tar_of(path / "cat.tar", {f"1{suffix}": data}).read_bytes()
    return of(tar_of(path / "data.tar", {"cat.tar": inner}))


def by_memory(path, suffix, data):
    where = folder_of(path / "data", {f"cat/1{suffix}": data})
    return Memory(Source(open_dataset(str(where), "train"), "")).read(0)[0]


def by_device(path, suffix, data):
    """Training with `cache: device` and teachers."""
    where = folder_of(path / "data", {f"cat/1{suffix}": data})
    pixels = DevicePixels(Source(open_dataset(str(where), "train"), ""), None, torch.device("cpu"), pytest.fail).pixels
    return pixels[0].permute(1, 2, 0).numpy()


def by_predict(path, suffix, data):
    return read_image(folder_of(path, {f"1{suffix}": data}) / f"1{suffix}")


def by_predict_of_an_open_image(path, suffix, data):
    return read_image(Image.open(io.BytesIO(data)))


def by_routing_of_a_folder(path, suffix, data):
    return read_image(find_images([folder_of(path / "data", {f"cat/1{suffix}": data})])[0].get())


def by_routing_of_a_tar(path, suffix, data):
    return find_images([tar_of(path / "data.tar", {f"cat/1{suffix}": data})])[0].get()


def by_torchvision(path, suffix, data):
    if suffix.lower() not in (".png", ".jpg", ".jpeg", ".ppm", ".bmp", ".tif", ".tiff", ".webp"):
        pytest.skip("torchvision's folders leave these files out")
    where = folder_of(path / "data", {f"cat/1{suffix}": data})
    return of_spec({"name": "torch/image_folder", "root": str(where)})


def by_shard(path, suffix, data):
    pytest.importorskip("webdataset")
    tar_of(path / "s-0.tar", {f"1{suffix}": data, "1.cls": b"0"})
    return next(iter(open_dataset(f"wds/{path}:s-0.tar|1", "train")))[0]


def of_spec(spec):
    return Source(open_dataset(spec, "train"), "").read(0)[0]


READERS = [
    by_folder, by_tar, by_tar_in_a_tar, by_memory, by_device, by_predict, by_predict_of_an_open_image,
    by_routing_of_a_folder, by_routing_of_a_tar, by_torchvision, by_shard,
]  # fmt: skip


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_every_reader_gives_the_pixels_that_a_person_sees(tmp_path, kind, reader):
    suffix, data, seen = KINDS[kind]
    found = np.asarray(reader(tmp_path, suffix, data))
    assert found.shape == seen.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - seen).max() <= (1 if "16 bit" in kind else 0)


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "tar"])
@pytest.mark.parametrize("kind", DAMAGE)
def test_what_cannot_be_decoded_is_one_error_that_names_the_file(tmp_path, kind, packed):
    suffix, data = DAMAGE[kind]
    members = {f"cat/1{suffix}": data, "dog/2.png": KINDS["png"][1]}
    where = tar_of(tmp_path / "data.tar", members) if packed else folder_of(tmp_path / "data", members)
    source = Source(open_dataset(str(where), "train"), "data")
    found = source.read(0)
    assert isinstance(found, Unreadable) and found.name == f"cat/1{suffix}" and found.why
    assert isinstance(Memory(source).read(0), Unreadable)
    bad = []
    DevicePixels(source, 8, torch.device("cpu"), bad.append)
    assert [item.name for item in bad] == [found.name]
    path = folder_of(tmp_path, {f"1{suffix}": data}) / f"1{suffix}"
    with pytest.raises(ImageError) as error:
        read_image(path)
    assert error.value.name == str(path) and error.value.reason == found.why and isinstance(error.value, DataError)


def test_a_decoder_may_raise_anything(tmp_path, monkeypatch):
    class Odd(Exception):
        pass

    def fail(*_, **__):
        raise Odd("of a plugin")

    where = folder_of(tmp_path, {"cat/1.png": KINDS["png"][1], "dog/1.png": KINDS["png"][1]})
    monkeypatch.setattr(Image, "open", fail)
    assert Source(open_dataset(str(where), "train"), "").read(0).why == "cannot be read: of a plugin"
    with pytest.raises(ImageError, match=r"1\.png: cannot be read: of a plugin"):
        images.read(where / "cat" / "1.png")


def test_an_image_without_pixels_is_an_error():
    with pytest.raises(ImageError, match="has 0 x 3 pixels"):
        images.as_seen(Image.new("RGB", (0, 3)), "given")


def test_a_given_image_is_not_changed():
    image = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    image.getexif()[274] = 6
    seen = images.as_seen(image, "given")
    assert (seen.mode, seen.size, seen.getpixel((0, 0))) == ("RGB", (1, 2), (255, 255, 255))
    assert (image.mode, image.size) == ("RGBA", (2, 1))


def test_every_extension_that_pillow_decodes_is_known_and_no_other():
    assert {".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".avif", ".jfif"} <= images.extensions()
    assert not {".txt", ".eps", ".pdf", ".mpg", ".h5", ".svg"} & images.extensions()
    assert images.is_image_name("a/B.JPG") and not images.is_image_name("png")
