"""The folder at the top is the class, in one order, and whatever is left out is named."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from parameternet.data import labels
from parameternet.data.errors import DataError
from parameternet.data.sources import Source, classes_of, digest_of, notes_of, open_dataset
from parameternet.prediction import expand
from parameternet.routing import find_images


def picture(form="PNG"):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, form)
    return buffer.getvalue()


PNG = picture()


@pytest.fixture(params=["folder", "tar"])
def made(request, tmp_path):
    """Makes data of file names (a folder ends with a slash), in a folder or a tar."""

    def make(*names, root="data"):
        if request.param == "folder":
            for name in names:
                path = tmp_path / root / name
                (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
                if not name.endswith("/"):
                    path.write_bytes(PNG)
            return str(tmp_path / root)
        with tarfile.open(tmp_path / f"{root}.tar", "w") as tar:
            for name in names:
                member = tarfile.TarInfo(name.rstrip("/"))
                member.type, member.size = (tarfile.DIRTYPE, 0) if name.endswith("/") else (tarfile.REGTYPE, len(PNG))
                tar.addfile(member, io.BytesIO(PNG))
        return str(tmp_path / f"{root}.tar")

    return make


def labelled(where):
    """(classes, {name: class}) of data."""
    source = Source(open_dataset(where, "train"), where)
    return source.classes, {source.name(i): source.classes[source.read(i)[1]] for i in range(len(source))}


LAYOUTS = {
    "flat": ["cat/1.png", "dog/1.png"],
    "tiny-imagenet": ["cat/images/1.png", "cat/boxes.txt", "dog/images/1.png"],
    "years": ["dog/2020/1.png", "dog/2021/1.png", "cat/2020/1.png", "cat/2021/1.png"],
    "of several depths": ["cat/1.png", "cat/more/1.png", "dog/a/b/c/1.png"],
    "upper case and other formats": ["cat/1.JPG", "dog/1.webp", "dog/2.tiff", "dog/3.bmp"],
    "after ./": ["./cat/1.png", "./dog/1.png"],
    "packed with its folder": ["data/cat/images/1.png", "data/dog/images/1.png"],
    "packed with the split's folder": ["train/cat/1.png", "train/dog/1.png"],
    "with hidden folders": [
        "cat/1.png", "dog/1.png", ".ipynb_checkpoints/1.png", ".thumbs/1.png", "__MACOSX/cat/._1.png",
        "cat/.ipynb_checkpoints/1.png", "dog/._1.png",
    ],
    "with strays": ["cat/1.png", "dog/1.png", "readme.txt", "1.png", "cat/list.txt", "fox/"],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_folder_at_the_top_is_the_class(made, layout):
    where = made(*LAYOUTS[layout])
    classes, found = labelled(where)
    assert classes == ["cat", "dog"]
    assert all(f"{label}/" in name for name, label in found.items())
    wanted = [n for n in LAYOUTS[layout] if not any(labels.is_hidden(part) for part in n.split("/") if part != ".")]
    images = [os.path.normpath(n) for n in wanted if labels.is_image_name(n) and n != "1.png"]
    assert sorted(found) == sorted(images)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_routing_has_the_same_classes(made, layout):
    groups = {picture.name.split("data", 1)[1]: picture.group for picture in find_images([made(*LAYOUTS[layout])])}
    assert set(groups.values()) - {None} == {"cat", "dog"}
    assert all(f"/{group}/" in name for name, group in groups.items() if group)


def test_what_is_left_out_is_counted_and_named_once(made):
    where = made(*LAYOUTS["with hidden folders"], "1.png", "readme.txt", "cat/a.heic", "fox/", "owl/a.txt")
    assert notes_of(open_dataset(where, "train")) in (
        [
            "hidden files and folders skipped (5): "
            ".ipynb_checkpoints, .thumbs, __MACOSX, cat/.ipynb_checkpoints, dog/._1.png",
            "images outside the class folders skipped (1): 1.png",
            "files without an image's extension ignored (3): cat/a.heic, owl/a.txt, readme.txt",
            "class folders without images left out (2): fox, owl",
        ],
        # a tar names only folders that it has an entry of
        [
            "hidden files and folders skipped (5): "
            ".ipynb_checkpoints, .thumbs, __MACOSX, cat/.ipynb_checkpoints, dog/._1.png",
            "images outside the class folders skipped (1): 1.png",
            "files without an image's extension ignored (3): cat/a.heic, owl/a.txt, readme.txt",
            "class folders without images left out (1): fox",
        ],
    )
    assert not notes_of(open_dataset(made("cat/1.png", "dog/1.png", root="other"), "train"))


def test_names_in_messages_are_printable():
    assert labels.printable("a\x1b[31m\udce9\n") == r"a\x1b[31m\xe9\n"
    assert labels.printable("Häuser ö 猫") == "Häuser ö 猫"


def test_one_order_whatever_the_hash_seed(made):
    where = made(*(f"{name}/1.png" for name in ["Maple", "maple", "MAPLE", "oak", "Oak", "a10", "a9", "x²1"]))
    code = (
        "import sys; from parameternet.data.sources import *\n"
        "d = open_dataset(sys.argv[1], 'train'); print(classes_of(d), digest_of(d)['sha256'])"
    )
    found = {
        subprocess.run([sys.executable, "-c", code, where], cwd=Path(__file__).parents[2], check=True, text=True,
                       capture_output=True, env={**os.environ, "PYTHONHASHSEED": str(seed)}).stdout
        for seed in range(2)
    }  # fmt: skip
    assert len(found) == 1
    assert found.pop().startswith("['a9', 'a10', 'MAPLE', 'Maple', 'maple', 'Oak', 'oak', 'x²1']")


def test_splits_are_no_classes(made):
    where = made("train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/dog/1.png")
    with pytest.raises(DataError, match=r"its folders train, val are splits and not classes: give one of them, .*/"):
        open_dataset(where, "train")
    classes, _ = labelled(made("train/1.png", "test/1.png", root="words"))  # images: these are classes
    assert classes == ["test", "train"]


def test_only_strays_is_an_error_that_names_them(made):
    with pytest.raises(DataError, match=r"images outside the class folders skipped \(2\): 1\.png, 2\.png"):
        open_dataset(made("1.png", "2.png"), "train")


@pytest.mark.parametrize("form", ["dictionary", "file"])
def test_class_map_overrides_the_folders(made, tmp_path, form):
    where = made("cat/images/1.png", "dog/1.png", "fox/1.png")
    (tmp_path / "classes.txt").write_text("fox\ncat\n\n")
    table = {"fox": 0, "cat": 1} if form == "dictionary" else str(tmp_path / "classes.txt")
    dataset = open_dataset({"name": "", "root": where, "class_map": table}, "train")
    assert classes_of(dataset) == ["fox", "cat"]
    source = Source(dataset, "")
    assert [(source.name(i), source.read(i)[1]) for i in range(2)] == [("cat/images/1.png", 1), ("fox/1.png", 0)]
    assert notes_of(dataset) == ["classes missing from class_map left out (1): dog"]


@pytest.mark.parametrize("table", [{"cat": 1, "dog": 2}, {"cat": 0, "dog": 0}])
def test_a_class_map_with_gaps_is_refused(made, table):
    where = made("cat/1.png", "dog/1.png")
    with pytest.raises(DataError, match="class_map must number its 2 classes from 0 to 1"):
        open_dataset({"name": "", "root": where, "class_map": table}, "train")


def test_a_dictionary_finds_the_folder_of_a_split(tmp_path):
    for split, name in (("train", "cat"), ("val", "dog")):
        (tmp_path / split / name).mkdir(parents=True)
        (tmp_path / split / name / "1.png").write_bytes(PNG)
    assert classes_of(open_dataset({"name": "", "root": str(tmp_path)}, "train")) == ["cat"]
    assert classes_of(open_dataset({"name": "", "root": str(tmp_path)}, "validation")) == ["dog"]


def test_names_that_are_not_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/cat"
    os.mkdir(folder)
    Path(os.fsdecode(folder + b"/caf\xe9.png")).write_bytes(b"")
    dataset = open_dataset(str(tmp_path), "train")
    assert digest_of(dataset)["classes"]["cat"][0] == 1
    assert Source(dataset, "").read(0).name == r"cat/caf\xe9.png"
    os.rename(folder, os.fsencode(tmp_path) + b"/h\xe9")
    with pytest.raises(DataError, match=r"class folders must have names in UTF-8, got h\\xe9: rename them"):
        open_dataset(str(tmp_path), "train")


# Folders -------------------------------------------------------------------------------------------------------------


def test_linked_folders_are_read_and_circles_end(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "1.png").write_bytes(PNG)
    (tmp_path / "data" / "dog").mkdir(parents=True)
    (tmp_path / "data" / "dog" / "2.png").write_bytes(PNG)
    (tmp_path / "data" / "cat").symlink_to(tmp_path / "far")
    (tmp_path / "data" / "dog" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "nowhere")
    dataset = open_dataset(str(tmp_path / "data"), "train")
    assert [name for name, _ in dataset.reader.samples] == ["cat/1.png", "dog/2.png"]
    assert notes_of(dataset) == ["files without an image's extension ignored (1): gone"]
    assert [path.name for path in expand(tmp_path / "data")] == ["1.png", "2.png"]


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    """A class would be missing, or a part of it."""
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.png").write_bytes(PNG)
    listed = os.scandir

    def refuse(path):
        if str(path).rstrip("/").endswith("dog"):
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot read the folder dog/? of .*: Permission denied"):
        open_dataset(str(tmp_path), "train")


# Tars ----------------------------------------------------------------------------------------------------------------


def entry(tar, name, data=PNG, **facts):
    member = tarfile.TarInfo(name)
    member.size = len(data)
    for key, value in facts.items():
        setattr(member, key, value)
    tar.addfile(member, io.BytesIO(data))


def colours(where):
    source = Source(open_dataset(str(where), "train"), "")
    return {source.name(i): source.read(i)[0].getpixel((0, 0)) for i in range(len(source))}


def solid(colour):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(buffer, "PNG")
    return buffer.getvalue()


def test_links_repeated_and_equal_names_in_a_tar(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        entry(tar, "cat/1.png", solid("red"))
        entry(tar, "dog/1.png", solid("blue"))
        entry(tar, "dog/hard.png", b"", type=tarfile.LNKTYPE, linkname="cat/1.png")
        entry(tar, "dog/soft.png", b"", type=tarfile.SYMTYPE, linkname="../cat/1.png")
        entry(tar, "cat/1.png", solid("lime"))  # tar itself extracts the last of a name
    red, blue, lime = (255, 0, 0), (0, 0, 255), (0, 255, 0)
    assert red != lime
    assert colours(tmp_path / "a.tar") == {
        "cat/1.png": lime, "dog/1.png": blue, "dog/hard.png": lime, "dog/soft.png": lime
    }  # fmt: skip
    with tarfile.open(tmp_path / "b.tar", "w") as tar:
        entry(tar, "cat/1.png", b"", type=tarfile.SYMTYPE, linkname="gone.png")
    found = Source(open_dataset(str(tmp_path / "b.tar"), "train"), "").read(0)
    assert (found.name, found.why) == ("cat/1.png", "a link to a file that is not in the tar")


def test_a_tar_of_a_tar_for_each_class(tmp_path):
    for name in ("cat", "dog"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            entry(tar, "1.png", solid("red" if name == "cat" else "blue"))
    with tarfile.open(tmp_path / "all.tar", "w") as tar:
        for name in ("cat", "dog"):
            tar.add(tmp_path / f"{name}.tar", f"{name}.tar")
    assert colours(tmp_path / "all.tar") == {"cat/1.png": (255, 0, 0), "dog/1.png": (0, 0, 255)}


@pytest.mark.parametrize("damage", ["header", "cut", "end"])
def test_a_damaged_tar_never_lacks_images_unnoticed(tmp_path, damage):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("cat", "dog", "fox"):
            entry(tar, f"{name}/1.png")
            start = tar.offset  # of the next header
        last = tar.members[-1].offset
    data = path.read_bytes()
    changed = {"header": data[:last] + b"\xff" * 100 + data[last + 100 :], "cut": data[: last + 520]}
    path.write_bytes(changed.get(damage, data[:start]))
    if damage == "end":
        assert notes_of(open_dataset(str(path), "train")) == ["the tar has no end marker: it may be truncated"]
        return
    with pytest.raises(DataError, match=r"cannot read images from .*a\.tar"):
        open_dataset(str(path), "train")


# What changed --------------------------------------------------------------------------------------------------------


def test_a_difference_is_named_by_class():
    classes = ["cat", "dog"]
    before = [("cat/1", 0), ("cat/2", 0), ("dog/1", 1)]
    old = labels.digest(before, classes)
    assert labels.difference(old, labels.digest(before, classes)) == ""
    for after, text in (
        ([*before, ("dog/2", 1)], "dog has 2 images instead of 1"),
        (before[1:], "cat has 1 images instead of 2"),
        ([("cat/1", 0), ("cat/2", 1), ("dog/1", 1)], "cat has 1 images instead of 2, dog has 2 images instead of 1"),
        ([("cat/1", 0), ("cat/3", 0), ("dog/1", 1)], "cat has other images"),
        (before[::-1], "the images have different labels or a different order"),
    ):
        assert labels.difference(old, labels.digest(after, classes)) == text


def test_labels_that_are_no_class_are_an_error():
    class Labelled(list):
        class_to_idx = {"cat": 0, "dog": 1}  # noqa: RUF012

    for label in (-1, 2, None, "cat"):
        with pytest.raises(DataError, match=rf"the label of data\[0\] must be a number from 0 to 1, got {label!r}"):
            Source(Labelled([(Image.new("RGB", (2, 2)), label)]), "data").read(0)
