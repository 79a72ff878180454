"""Read images: the only place in the package that decodes them.

Images are returned as a viewer shows them: first frame, rotated by EXIF, transparency on white, RGB.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from parameternet.data.errors import ImageError

UNIDENTIFIED = "not an image, or of a format that Pillow does not read"
COMMON = (".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Pillow recognises these formats but cannot decode them, or starts another program to do it.
_NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF"}


@cache
def formats() -> tuple[str, ...]:
    """Return the formats that the installed Pillow decodes, including plugins of other packages."""
    Image.init()
    return tuple(name for name in Image.OPEN if name not in _NOT_DECODED)


@cache
def extensions() -> frozenset[str]:
    """Return the file name extensions of `formats`, in lower case, with the dot."""
    known = Image.registered_extensions()
    return frozenset(extension.lower() for extension, name in known.items() if name in formats()) | set(COMMON)


def is_image_name(name: str) -> bool:
    """Return whether a file name has an image's extension, in upper or lower case."""
    return Path(name).suffix.lower() in extensions()


def read(path: str | Path, name: str | None = None) -> Image.Image:
    """Read an image file; `name` is used in errors (default: the path).

    Raises:
        ImageError: the file cannot be opened or decoded.
    """
    with naming(name or str(path)):
        data = Path(path).read_bytes()
    return decode(data, name or str(path))


def decode(data: bytes, name: str) -> Image.Image:
    """Decode an image file's bytes.

    Raises:
        ImageError: the decoder failed, whatever it raised.
    """
    if not data:
        raise ImageError(name, "empty file")
    with naming(name), Image.open(io.BytesIO(data), formats=formats()) as image:
        return _as_seen(image)


def as_seen(image: Image.Image, name: str) -> Image.Image:
    """Return a Pillow image as `decode` would: upright, on white, RGB. The image itself is not changed.

    Raises:
        ImageError: it cannot be decoded or has no pixels.
    """
    with naming(name):
        return _as_seen(image)


@contextmanager
def naming(name: str, kinds: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Turn errors of `kinds` into `ImageError`; by default all, since decoders raise anything on broken bytes."""
    try:
        yield
    except ImageError:
        raise
    except kinds as error:
        raise ImageError(name, _reason(error)) from error


def _reason(error: Exception) -> str:
    # Plugins that try more formats after Pillow fails may raise errors about what they lack.
    if isinstance(error, Image.UnidentifiedImageError) or isinstance(error.__context__, Image.UnidentifiedImageError):
        return UNIDENTIFIED
    if isinstance(error, Image.DecompressionBombError):
        return f"too large: {error}"
    if isinstance(error, FileNotFoundError):
        return "no such file"
    return f"cannot be read: {(isinstance(error, OSError) and error.strerror) or str(error) or type(error).__name__}"


def _as_seen(image: Image.Image) -> Image.Image:
    image.load()  # some formats store EXIF after the pixels
    if 0 in image.size:
        raise ValueError(f"it has {image.width} x {image.height} pixels")
    image = _upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _to_eight_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        return ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF, readable pixels
        return image


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit images to 8 bits; Pillow's own conversion clips everything above 255 to white."""
    shades = image.convert("F")
    high = shades.getextrema()[1]
    white = 65535 if high > 255 else 255 if high > 1 else 1
    grey = shades.point(lambda shade: shade * (255 / white) + 0).convert("L")
    clear = grey.info.pop("transparency", None)  # the transparent 16-bit shade
    if clear is not None:
        grey.paste(255, mask=Image.fromarray(np.asarray(shades) == clear))
    return grey
