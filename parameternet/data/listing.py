"""List the images of files, folders, tars and webdataset shards, and read them by index, without labels."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from parameternet.data import images
from parameternet.data.errors import DataError
from parameternet.data.sources import Folder, Tar, is_tar, location, open_files
from parameternet.text import address_error, printable

__all__ = ["Listing"]

EXPECTED = "Expected an image, a folder or a .tar of images, or wds/FOLDER:shards-{000..009}.tar"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_INFO = ("_info.json", "info.json")  # timm's names for the file that lists a webdataset's splits


class _Item(NamedTuple):
    store: Folder | Tar | None  # None: a single file
    name: str  # in its store, or the file's path

    @property
    def location(self) -> tuple[str, str]:
        return self.store.location(self.name) if self.store else location(self.name)


_Found = dict[str, _Item]  # by path


class Listing:
    """The images of `given`: sources in the given order, and the images of a source sorted by name.

    Folders are searched recursively; the .tar files of a folder without images are its shards. Files in a tar that are
    not images are ignored. An image that several sources or shards contain, also under other paths or through links, is
    listed once, under its first path. Links within a folder or tar count as separate images.

    names: The path of each image, as given; in a tar, the tar's path followed by the path inside it.
    notes: Sentences about skipped files.

    Args:
        given: Image files, folders, .tar files, `wds/FOLDER`, `wds/FOLDER:SHARDS` or `wds/FOLDER:SPLIT`. SHARDS is a
            file name with `{000..009}`, `{a,b}` or `*` in it.

    Raises:
        DataError: a source that does not exist, cannot be listed, or has no images.
    """

    def __init__(self, given: Iterable[str | Path]):
        self.notes: list[str] = []
        self._items: dict[str, _Item] = {}
        known: set[tuple[str, str]] = set()
        for source in map(str, given):
            found = [*self._found(source)]
            if not any(found):
                raise DataError(f"no images in {printable(source)}. {EXPECTED}")
            again = sum(len(part) - self._add(part, known) for part in found)
            if again:
                self.notes.append(f"{printable(source)}: images already listed under another path or source: {again:,}")
        self.names = [*self._items]

    def __len__(self) -> int:
        return len(self.names)

    def read(self, index: int) -> Image.Image:
        """Read image `index` with `parameternet.data.images`.

        Raises:
            ImageError: it cannot be read or decoded.
        """
        store, name = self._items[self.names[index]]
        if store is None:
            return images.read(name)
        with images.naming(name):
            data = store.data(name)
        return images.decode(data, name)

    def digest(self) -> str:
        """Return the SHA-256 of the names and sizes of all images."""
        digest = hashlib.sha256()
        for path, (store, name) in self._items.items():
            size = store.size(name) if store else Path(name).stat().st_size
            digest.update(f"{path}\0{size}\n".encode("utf-8", "surrogateescape"))
        return digest.hexdigest()

    def _add(self, found: _Found, known: set[tuple[str, str]]) -> int:
        """Add images whose locations are not known yet; return their number."""
        locations = {path: item.location for path, item in found.items()}
        new = {path: item for path, item in found.items() if locations[path] not in known}
        self._items |= new
        known.update(locations.values())
        return len(new)

    def _found(self, source: str) -> Iterator[_Found]:
        if source.startswith("wds/"):
            for shard in _shards(source):
                yield from self._in_store(str(shard))
        elif Path(source).is_dir() or is_tar(source):
            yield from self._in_store(source)
        elif source.lower().endswith(_COMPRESSED):
            raise DataError(f"{printable(source)} is compressed, and its images cannot be read one by one: unpack it")
        elif Path(source).is_file():
            yield {source: _Item(None, source)}
        else:
            raise DataError(address_error(source) or f"{printable(source)} does not exist. {EXPECTED}")

    def _in_store(self, source: str) -> Iterator[_Found]:
        store = _open(source)
        names = sorted(name for name in store.names if images.is_image_name(name))
        tars = sorted(name for name in store.names if isinstance(store, Folder) and name.lower().endswith(".tar"))
        self.notes += [f"{printable(source)}: {note}" for note in store.notes]
        if names and tars:
            self.notes.append(f"{printable(source)}: {len(tars)} .tar files next to images are not read; name them too")
        yield {f"{Path(source)}/{name}": _Item(store, name) for name in names}
        for name in [] if names else tars:
            yield from self._in_store(f"{Path(source)}/{name}")


def _open(source: str) -> Folder | Tar:
    try:
        store = open_files(source)
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"cannot list the images of {printable(source)}: {error}") from error
    if store.unlisted:
        folder, why = store.unlisted[0]
        raise DataError(f"cannot read the folder {printable(folder)} of {printable(source)}: {why}")
    return store


# ---------------------------------------------------------------------------------------------------------------------
# Shards
# ---------------------------------------------------------------------------------------------------------------------


def _shards(source: str) -> list[Path]:
    """Return the shards of `wds/FOLDER[:SHARDS or SPLIT]`; ignore timm's number of samples, `|10000`."""
    root, _, wanted = source.removeprefix("wds/").partition(":")
    folder, wanted = Path(root), wanted.partition("|")[0]
    patterns = _of_split(folder, wanted) if wanted and ".tar" not in wanted else [wanted or "*.tar"]
    found = [path for pattern in patterns for part in pattern.split("::") for path in _expanded(folder, part)]
    missing = [path for path in found if not path.is_file()]
    if missing or not found:
        raise DataError(f"{printable(str(missing[0] if missing else folder / wanted))} does not exist. {EXPECTED}")
    return found


def _of_split(folder: Path, split: str) -> list[str]:
    for name in _INFO:
        try:
            splits = json.loads((folder / name).read_text())["splits"]
            return [*splits[split]["filenames"]]
        except FileNotFoundError:
            continue
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{folder / name} does not list the files of split {split!r}: {error}") from error
    raise DataError(f"{folder} has no {_INFO[0]} that lists the files of split {split!r}. {EXPECTED}")


def _expanded(folder: Path, pattern: str) -> list[Path]:
    names = _braces(pattern)
    if "*" not in pattern:
        return [folder / name for name in names]
    return [folder / name for pattern in names for name in sorted(glob.glob(pattern, root_dir=folder))]


def _braces(pattern: str) -> list[str]:
    """Expand `a{0..2}{x,y}` like a shell; numbers are zero-padded to the width of the first one."""
    found = re.search(r"\{(\d+)\.\.(\d+)\}|\{([^{}]*,[^{}]*)\}", pattern)
    if not found:
        return [pattern]
    first, last, listed = found.groups()
    if listed is None:
        choices = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        choices = listed.split(",")
    rest = _braces(pattern[found.end() :])
    return [pattern[: found.start()] + choice + end for choice in choices for end in rest]
