"""What `Listing` finds in files, folders, tars and shards, and what it refuses."""

import io
import json
import os
import re
import tarfile

import numpy as np
import pytest
from PIL import Image

from parameternet.data.errors import DataError, ImageError
from parameternet.data.listing import Listing
from parameternet.routing import find_images


def png(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))


def write(folder, members):
    for name, data in members.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def shades(listing):
    return [int(np.asarray(listing.read(index))[0, 0, 0]) for index in range(len(listing))]


@pytest.fixture
def shards(tmp_path):
    for shard in range(12):
        members = {f"{key}.png": png(10 * shard + key) for key in range(2)} | {"0.cls": b"3", "0.json": b"{}"}
        write_tar(tmp_path / f"train-{shard:02}.tar", members)
    return tmp_path


def test_a_folder_is_searched_and_sorted(tmp_path):
    write(tmp_path, {"b/2.png": png(2), "a.PNG": png(1), "b/c/3.png": png(3), "readme.txt": b"", ".thumbs/x.png": b""})
    found = Listing([tmp_path])
    assert found.names == [f"{tmp_path}/{name}" for name in ("a.PNG", "b/2.png", "b/c/3.png")]
    assert shades(found) == [1, 2, 3]


def test_a_tar_and_tars_in_it_are_like_folders(tmp_path):
    inner = tmp_path / "inner.tar"
    write_tar(inner, {"3.png": png(3)})
    write_tar(tmp_path / "all.tar", {"x/2.png": png(2), "1.png": png(1), "more.tar": inner.read_bytes()})
    found = Listing([tmp_path / "all.tar"])
    assert found.names == [f"{tmp_path}/all.tar/{name}" for name in ("1.png", "more/3.png", "x/2.png")]
    assert shades(found) == [1, 3, 2]


@pytest.mark.parametrize(
    "form, numbers",
    [
        ("{}", range(12)),  # a folder of nothing but tars
        ("wds/{}", range(12)),
        ("wds/{}:train-{{00..11}}.tar", range(12)),
        ("wds/{}:train-{{03..05}}.tar|6", range(3, 6)),
        ("wds/{}:train-{{01,11}}.tar", (1, 11)),
        ("wds/{}:train-0*.tar", range(10)),
        ("wds/{}:train-{{00..01}}.tar::train-11.tar", (0, 1, 11)),
        ("wds/{}:val", (2, 3)),
    ],
)
def test_every_way_to_name_shards(shards, form, numbers):
    splits = {"splits": {"val": {"filenames": ["train-{02..03}.tar"]}}}
    (shards / "_info.json").write_text(json.dumps(splits))
    found = Listing([form.format(shards)])
    assert shades(found) == [10 * number + key for number in numbers for key in range(2)]
    assert len(set(found.names)) == len(found)  # every shard has its own 0.png


def test_images_named_twice_are_listed_once(tmp_path):
    write(tmp_path, {"1.png": png(1), "2.png": png(2)})
    found = Listing([tmp_path / "2.png", tmp_path])
    assert sorted(shades(found)) == [1, 2]


def twice(tmp_path):
    """Ways to name images of the folder `images` or of the tar `all.tar` twice."""
    write(tmp_path / "images", {"a.png": png(1), "sub/b.png": png(2)})
    write_tar(tmp_path / "all.tar", {"a.png": png(1), "b.png": png(2)})
    (tmp_path / "link").symlink_to("images")
    (tmp_path / "link.png").symlink_to("images/a.png")
    (tmp_path / "link.tar").symlink_to("all.tar")
    return tmp_path


@pytest.mark.parametrize(
    "given, listed",
    [
        ("images images", "images/a.png images/sub/b.png"),
        ("images ./images", "images/a.png images/sub/b.png"),
        ("./images images", "images/a.png images/sub/b.png"),
        ("images images/../images", "images/a.png images/sub/b.png"),
        ("images link", "images/a.png images/sub/b.png"),
        ("link images", "link/a.png link/sub/b.png"),
        ("images {}/images", "images/a.png images/sub/b.png"),
        ("images images/sub", "images/a.png images/sub/b.png"),
        ("images/sub images", "images/sub/b.png images/a.png"),
        ("images/a.png ./images/a.png images", "images/a.png images/sub/b.png"),
        ("link.png images", "link.png images/sub/b.png"),
        ("images link.png", "images/a.png images/sub/b.png"),
        ("all.tar all.tar", "all.tar/a.png all.tar/b.png"),
        ("all.tar {}/all.tar", "all.tar/a.png all.tar/b.png"),
        ("link.tar all.tar", "link.tar/a.png link.tar/b.png"),
        ("wds/.:all.tar::link.tar", "all.tar/a.png all.tar/b.png"),
        ("wds/.:all.tar ./all.tar", "all.tar/a.png all.tar/b.png"),
        ("all.tar images", "all.tar/a.png all.tar/b.png images/a.png images/sub/b.png"),
    ],
)
def test_images_named_in_two_ways_are_listed_once_under_the_first(tmp_path, monkeypatch, given, listed):
    monkeypatch.chdir(twice(tmp_path))
    sources = given.format(tmp_path).split()
    found = Listing(sources)
    assert found.names == listed.split()
    assert set(shades(found)) == {1, 2}
    assert bool(found.notes) == (len(found) == 2)
    assert all("images already listed under another path or source" in note for note in found.notes)
    if not any(source.startswith("wds/") for source in sources):
        assert [sample.name for sample in find_images(sources)] == found.names


def test_links_within_a_folder_are_images_of_their_own(tmp_path):
    """A folder of links, such as a snapshot of the Hub's cache, has one name per image, whatever the links lead to."""
    write(tmp_path, {"stored": png(1)})
    (tmp_path / "snapshot").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "snapshot" / name).symlink_to("../stored")
    found = Listing([tmp_path / "snapshot"])
    assert found.names == [f"{tmp_path}/snapshot/{name}" for name in ("a.png", "b.png")]
    assert not found.notes


def test_sources_keep_their_order_and_their_images_are_sorted(tmp_path):
    write(tmp_path, {f"{folder}/{name}.png": png(0) for folder in "ab" for name in "yx"})
    found = Listing([tmp_path / "b", tmp_path / "a"])
    assert found.names == [f"{tmp_path}/{folder}/{name}.png" for folder in "ba" for name in "xy"]


def test_tars_next_to_images_are_named_and_left_out(tmp_path):
    write(tmp_path, {"1.png": png(1)})
    write_tar(tmp_path / "old.tar", {"1.png": png(9)})
    found = Listing([tmp_path])
    assert shades(found) == [1]
    assert found.notes == [f"{tmp_path}: 1 .tar files next to images are not read; name them too"]


def test_a_digest_changes_with_names_and_sizes(tmp_path):
    write(tmp_path, {"1.png": png(1)})
    first = Listing([tmp_path]).digest()
    assert Listing([tmp_path]).digest() == first
    (tmp_path / "1.png").write_bytes(png(1) + b"more")
    second = Listing([tmp_path]).digest()
    write(tmp_path, {"2.png": png(2)})
    assert len({first, second, Listing([tmp_path]).digest()}) == 3


def test_images_that_cannot_be_read_are_listed_all_the_same(tmp_path):
    write(tmp_path, {"broken.png": png(1)[:30], "empty.png": b""})
    os.symlink("nowhere.png", tmp_path / "link.png")
    found = Listing([tmp_path])
    assert len(found) == 3 and found.digest()
    for index in range(3):
        with pytest.raises(ImageError):
            found.read(index)


def refused(tmp_path):
    write(tmp_path, {"text/notes.txt": b"", "cut.tar": png(1)[:8] * 64, "packed.tar.gz": b"", "images/1.png": png(1)})
    whole = tmp_path / "whole.tar"
    write_tar(whole, {f"{i}.png": bytes(2000) for i in range(5)})
    data = bytearray(whole.read_bytes())
    data[2560:2600] = b"x" * 40  # a header in the middle
    (tmp_path / "damaged.tar").write_bytes(data)
    return {
        "nowhere": "does not exist",
        "text": "no images in",
        "cut.tar": "cannot list the images|is damaged",
        "damaged.tar": "is damaged: no header at byte 2,560",
        "packed.tar.gz": "is compressed, and its images cannot be read one by one: unpack it",
    }


@pytest.mark.parametrize("name", ["nowhere", "text", "cut.tar", "damaged.tar", "packed.tar.gz"])
def test_what_cannot_be_listed_is_refused(tmp_path, name):
    why = refused(tmp_path)[name]
    with pytest.raises(DataError, match=why):
        Listing([tmp_path / "images", tmp_path / name])


@pytest.mark.parametrize(
    "spec, why",
    [
        ("train-{10..13}.tar", "train-12.tar does not exist"),
        ("none-*.tar", "does not exist"),
        ("val", "has no _info.json that lists the files of split 'val'"),
    ],
)
def test_shards_that_do_not_exist_are_refused(shards, spec, why):
    with pytest.raises(DataError, match=re.escape(why)):
        Listing([f"wds/{shards}:{spec}"])
    (shards / "_info.json").write_text('{"splits": {}}')
    with pytest.raises(DataError):
        Listing([f"wds/{shards}:{spec}"])
