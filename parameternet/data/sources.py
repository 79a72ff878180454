"""Sources of images: folders, tars, and timm's data sets, behind one interface."""

from __future__ import annotations

import io
import os
import posixpath
import tarfile
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data import ImageDataset, IterableImageDataset, create_dataset
from timm.data.readers.class_map import load_class_map
from timm.data.readers.reader import Reader

from parameternet.data import images, labels
from parameternet.data.errors import DataError, ImageError
from parameternet.text import address_error, printable

_STREAMS = ("wds/", "tfds/", "hfids/")
_EXPECTED = "Expected a folder or a .tar with one sub-folder of images per class, or hfds/NAME, or wds/FOLDER:shards"


# ---------------------------------------------------------------------------------------------------------------------
# Files below a folder or in a tar
# ---------------------------------------------------------------------------------------------------------------------


class Folder:
    """Files below a folder, following links. `names` and `folders` are relative, with slashes; `hidden` are left out.

    `unlisted` has (folder, reason) of folders that could not be read.
    """

    def __init__(self, root: Path):
        self.root = root
        self.names: list[str] = []
        self.folders: list[str] = []
        self.hidden: list[str] = []
        self.unlisted: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self._walk("", frozenset())

    def data(self, name: str) -> bytes:
        """Return the content of a file."""
        return (self.root / name).read_bytes()

    def size(self, name: str) -> int:
        """Return a file's size in bytes; -1 if it is inaccessible."""
        try:
            return (self.root / name).stat().st_size
        except OSError:
            return -1

    def location(self, name: str) -> tuple[str, str]:
        """Return where a file is, the same for every path that leads to it."""
        return location(self.root / name)

    def _walk(self, below: str, above: frozenset[tuple[int, int]]) -> None:
        try:
            found = os.stat(self.root / below)
            if (found.st_dev, found.st_ino) in above:  # a link to one of its own parents
                return
            entries = sorted(os.scandir(self.root / below), key=lambda entry: entry.name)
        except OSError as error:
            self.unlisted.append((below or ".", error.strerror or str(error)))
            return
        for entry in entries:
            name = below + entry.name
            if labels.is_hidden(entry.name):
                self.hidden.append(name)
            elif entry.is_dir():
                self.folders.append(name)
                self._walk(f"{name}/", above | {(found.st_dev, found.st_ino)})
            else:
                self.names.append(name)


class _Place(NamedTuple):
    offset: int
    size: int


class Tar:
    """Files in an uncompressed tar, and in tars inside it, as if those were folders; attributes as in `Folder`.

    Only offsets are kept, and each read reopens the file: an open tar has one file position, so workers that share it
    would read each other's images.
    """

    def __init__(self, root: Path):
        self.root = root
        self.places: dict[str, _Place] = {}
        self.folders: list[str] = []
        self.hidden: list[str] = []
        self.unlisted: list[tuple[str, str]] = []
        self.links: dict[str, str] = {}
        self.notes: list[str] = []
        with open(root, "rb") as file:
            self._scan(file, "", 0)
        self.names = [*self.places, *(name for name in self.links if name not in self.places)]

    def data(self, name: str) -> bytes:
        """Return the content of a file."""
        place = self._place(name)
        if place is None:
            raise ImageError(name, "a link to a file that is not in the tar")
        with open(self.root, "rb") as file:
            file.seek(place.offset)
            return file.read(place.size)

    def size(self, name: str) -> int:
        """Return a file's size in bytes; -1 if the tar does not contain it."""
        place = self._place(name)
        return -1 if place is None else place.size

    def location(self, name: str) -> tuple[str, str]:
        """Return where a file is, the same for every path that leads to the tar."""
        return os.path.realpath(self.root), name

    def _place(self, name: str) -> _Place | None:
        for _ in range(8):  # links may lead to links
            if name in self.places:
                break
            name = self.links.get(name, "")
        return self.places.get(name)

    def _scan(self, file: Any, prefix: str, base: int) -> None:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for member in tar:
                self._add(tar, member, prefix, base)
            self._check_end(file, tar.offset)

    def _add(self, tar: tarfile.TarFile, member: tarfile.TarInfo, prefix: str, base: int) -> None:
        name = prefix + _plain(member.name)
        if not _plain(member.name):
            return
        if any(labels.is_hidden(part) for part in name.split("/")):
            self._hide(name)
        elif member.isdir():
            self.folders.append(name)
        elif member.islnk():
            self.links[name] = prefix + _plain(member.linkname)
        elif member.issym():
            self.links[name] = prefix + _plain(posixpath.join(posixpath.dirname(member.name), member.linkname))
        elif member.isfile() and name.lower().endswith(".tar"):
            self._scan(tar.extractfile(member), f"{name[:-4]}/", base + member.offset_data)
        elif member.isfile():
            self.places[name] = _Place(base + member.offset_data, member.size)  # of duplicate names, tar keeps the last

    def _hide(self, name: str) -> None:
        parts = name.split("/")
        first = next(i for i, part in enumerate(parts) if labels.is_hidden(part))
        top = "/".join(parts[: first + 1])
        if top not in self.hidden:
            self.hidden.append(top)

    def _check_end(self, file: Any, offset: int) -> None:
        # tarfile treats a damaged header as the end of the archive and silently drops the rest
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if block.strip(b"\0"):
            raise DataError(f"{self.root} is damaged: no header at byte {offset:,}, so the rest cannot be listed")
        if not block:
            self.notes.append("the tar has no end marker: it may be truncated")


def _plain(name: str) -> str:
    plain = posixpath.normpath(name).lstrip("/")
    return "" if plain == "." else plain


def location(path: str | Path) -> tuple[str, str]:
    """Return where a file is, the same for every path that leads to it; see `Folder` and `Tar`."""
    return os.path.realpath(path), ""


def is_tar(path: str | Path) -> bool:
    """Return whether a path is a .tar file."""
    return Path(path).suffix.lower() == ".tar" and Path(path).is_file()


def open_files(path: str | Path) -> Folder | Tar:
    """List the files below a folder or in a tar.

    Raises:
        DataError: the tar is damaged.
        OSError, tarfile.TarError: it cannot be opened.
    """
    return Tar(Path(path)) if is_tar(path) else Folder(Path(path))


def arrange(files: Folder | Tar, **kwargs: Any) -> labels.Listing:
    """Label the images among `files`; see `labels.arrange`."""
    name = Path(os.path.abspath(files.root)).name
    own = name[:-4] if isinstance(files, Tar) else name
    return labels.arrange(files.names, files.folders, files.hidden, own_name=own, **kwargs)


class FileReader(Reader):
    """Labelled images of a folder or tar, with the interface of timm's readers.

    Args:
        root: folder or .tar.
        class_map: labels by class, or a file of class names, as in timm.
        input_key: extensions, separated by `;`; None: every format that can be decoded.

    Raises:
        DataError: no images, splits where classes should be, or a folder that cannot be read.
    """

    def __init__(self, root: str | Path, class_map: Any = None, input_key: str | None = None):
        super().__init__()
        self.root, self.files = root, open_files(root)
        kinds = {"is_image": lambda name: name.lower().endswith(tuple(input_key.split(";")))} if input_key else {}
        table = load_class_map(class_map, str(root)) if class_map else None
        self.class_to_idx, self.samples, _, notes = arrange(self.files, class_map=table, **kinds)
        self.notes = [*self.files.notes, *notes]
        self._check()

    def _check(self) -> None:
        if self.files.unlisted:
            folder, why = self.files.unlisted[0]
            raise DataError(f"cannot read the folder {printable(folder)} of {self.root}: {why}")
        if not self.samples:
            raise DataError("; ".join(["no images in class folders", *self.notes]))
        # both `train/cat/1.jpg` and `val/cat/1.jpg`: the whole data set instead of one of its splits
        splits = [name for name in self.class_to_idx if name.lower() in labels.SPLITS]
        if 1 < len(splits) == len(self.class_to_idx) and all(name.count("/") > 1 for name, _ in self.samples):
            raise DataError(
                f"its folders {labels.few(splits)} are splits and not classes: give one of them, "
                f"{Path(self.root) / splits[0]}"
            )

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        name, label = self.samples[index]
        return io.BytesIO(self.files.data(name)), label

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        name = self.samples[index][0]
        return posixpath.basename(name) if basename else str(Path(self.root) / name) if absolute else name


# ---------------------------------------------------------------------------------------------------------------------
# One interface
# ---------------------------------------------------------------------------------------------------------------------


class Unreadable(NamedTuple):
    """An image that could not be read: its index, its name, and the reason."""

    index: int
    name: str
    why: str


class Source:
    """Images of a timm dataset by index. `read(i)` returns an RGB image and its label, or an `Unreadable`.

    timm's own dataset replaces a broken image with the next one, which may be of another class; this class uses the
    underlying reader instead.
    """

    def __init__(self, dataset: Any, where: str):
        self.reader = getattr(dataset, "reader", None)
        self.dataset, self.where = dataset, where
        self.classes = classes_of(dataset)

    def __len__(self) -> int:
        return len(self.dataset)

    def name(self, index: int) -> str:
        """Return the image's file name, as the reader reports it."""
        found = self.reader.filename(index) if self.reader is not None else None
        return f"{self.where}[{index}]" if found is None else printable(str(found))

    def read(self, index: int) -> tuple[Image.Image, int] | Unreadable:
        """Return image `index` (RGB) and its label, or an `Unreadable`.

        Raises:
            DataError: a label outside the data's classes.
        """
        try:
            with images.naming(self.where, (OSError, ValueError, SyntaxError, EOFError)):
                found, label = self.reader[index] if self.reader is not None else self.dataset[index]
            if isinstance(found, Image.Image):
                image = images.as_seen(found, self.where)
            else:
                with images.naming(self.where), found:
                    data = found.read()
                image = images.decode(data, self.where)
        except ImageError as error:
            return Unreadable(index, self.name(index), error.reason)
        return image, self._checked(index, label)

    def _checked(self, index: int, label: Any) -> int:
        try:
            number = int(label)
        except (TypeError, ValueError):
            number = -1
        if number < 0 or (self.classes and number >= len(self.classes)):
            known = f"from 0 to {len(self.classes) - 1}" if self.classes else "from 0"
            raise DataError(f"the label of {self.name(index)} must be a number {known}, got {label!r}")
        return number


def is_stream(spec: str | dict) -> bool:
    """Whether the images can only be read in order (webdataset, TFDS, streamed Hub data sets)."""
    name = spec.get("name", "") if isinstance(spec, dict) else spec
    return name.lower().startswith(_STREAMS)


def open_dataset(spec: str | dict, split: str, **kwargs: Any) -> Any:
    """Open the timm dataset of a recipe's `train` or `val`.

    Args:
        spec: a folder, a tar, `hfds/NAME[:split]`, `wds/FOLDER:split`, a name with another timm prefix, or a
            dictionary of arguments for `timm.data.create_dataset`.
        split: used if the spec names none.
        kwargs: passed on to streams (batch size, seed, whether training).

    Raises:
        DataError: the data does not exist or has no images.
    """
    arguments = _arguments(spec, split)
    if is_stream(spec):
        arguments |= kwargs
    try:
        dataset = _open(**arguments)
    except (OSError, RuntimeError, AssertionError, ValueError, TypeError, ImportError, tarfile.TarError) as error:
        raise DataError(f"cannot read images from {spec!r}: {error or type(error).__name__}. {_EXPECTED}") from error
    if not isinstance(dataset, IterableImageDataset) and len(dataset) == 0:
        raise DataError(f"no images in {spec!r}. {_EXPECTED}")
    return dataset


def _arguments(spec: str | dict, split: str) -> dict[str, Any]:
    if isinstance(spec, dict):
        return {"name": "", "split": split, **spec}
    prefix, slash, rest = spec.partition("/")
    if slash and prefix in ("hfds", "hfids"):
        name, _, named = rest.partition(":")
        return {"name": f"{prefix}/{name}", "split": named or split}
    if slash and prefix in ("wds", "tfds", "torch"):
        root, _, named = rest.partition(":")
        name = f"{prefix}/" if prefix == "wds" else f"{prefix}/{root}"
        return {"name": name, "root": root if prefix == "wds" else None, "split": named or split}
    if not Path(spec).exists():
        raise DataError(address_error(spec) or f"{spec!r} does not exist. {_EXPECTED}")
    return {"name": "", "root": spec, "search_split": False}


def _open(name: str, **kwargs: Any) -> Any:
    """Call timm's `create_dataset`, with our file and image readers where timm allows it."""
    prefix = name.partition("/")[0].lower() if "/" in name else ""
    if prefix == "":
        return _of_files(name, **kwargs)
    if prefix == "wds":
        kwargs.setdefault("input_key", ";".join(sorted(e[1:] for e in images.extensions())))
    if prefix in ("wds", "hfids"):
        kwargs["input_img_mode"] = ""  # no conversion: `_AsSeen` does it
    dataset = create_dataset(name, **kwargs)
    if prefix in ("wds", "hfids"):
        dataset.reader = _AsSeen(dataset.reader, name)
    if hasattr(dataset, "loader"):  # torchvision's folder datasets
        dataset.loader = images.read
    return dataset


def _of_files(
    name: str, root: str | None = None, split: str = "train", search_split: bool = True, **kwargs: Any
) -> ImageDataset:
    if root is None or not Path(root).exists():
        raise DataError(address_error(str(root)) or f"{root!r} does not exist")
    if search_split and Path(root).is_dir():
        root = _split_folder(root, split)
    kinds = {key: kwargs.pop(key) for key in ("class_map", "input_key") if key in kwargs}
    return ImageDataset(root, reader=FileReader(root, **kinds), **kwargs)


def _split_folder(root: str, split: str) -> str:
    """Return the folder of a split below `root`, or `root` itself if there is none."""
    wanted = split.split("[")[0]
    synonyms = next((names for names in (labels.TRAIN_SPLITS, labels.EVAL_SPLITS) if wanted in names), ())
    folders = [Path(root) / name for name in (wanted, *synonyms)]
    return str(next((folder for folder in folders if folder.is_dir()), root))


class _AsSeen(Reader):
    """A stream's reader that decodes images with `parameternet.data.images`."""

    def __init__(self, reader: Reader, where: str):
        super().__init__()
        self.reader, self.where = reader, where

    def __iter__(self) -> Any:
        for image, target in self.reader:
            yield images.as_seen(image, self.where), target

    def __len__(self) -> int:
        return len(self.reader)

    def __getattr__(self, name: str) -> Any:
        if name == "reader":  # not set yet, while unpickling
            raise AttributeError(name)
        return getattr(self.reader, name)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        return self.reader._filename(index, basename, absolute)


def classes_of(dataset: Any) -> list[str] | None:
    """Return class names in the order of their labels, if the reader knows them."""
    reader = getattr(dataset, "reader", None) or dataset
    table = getattr(reader, "class_to_idx", None) or getattr(reader, "class_name_to_idx", None)
    return sorted(table, key=table.get) if table else None


def notes_of(dataset: Any) -> list[str]:
    """Return sentences about files that the reader skipped."""
    return getattr(getattr(dataset, "reader", None), "notes", [])


def digest_of(dataset: Any) -> dict[str, Any] | None:
    """Return the digest of names and labels of a folder or tar (see `labels.digest`); None for other data."""
    reader = getattr(dataset, "reader", None)
    return labels.digest(reader.samples, classes_of(dataset)) if isinstance(reader, FileReader) else None
