"""Image files of every kind, each with the pixels that a person sees: (suffix, bytes, array (H, W, 3))."""

from __future__ import annotations

import io

import numpy as np
from PIL import ExifTags, Image

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RGB[..., 0]
ALPHA = np.where(np.arange(35).reshape(5, 7) % 3 == 0, 0, 255).astype(np.uint8)
ON_WHITE = np.where(ALPHA[..., None] == 0, 255, RGB).astype(np.uint8)
ROTATED = {3: np.rot90(RGB, 2), 6: np.rot90(RGB, -1), 8: np.rot90(RGB)}


def _bytes(image, form, **how):
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


def _exif(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def _palette(**how):
    image = Image.new("P", (7, 5))
    image.putpalette([255, 0, 0, 0, 0, 255] + [0] * 762)
    image.putdata([i % 2 for i in range(35)])
    return _bytes(image, "PNG", **how)


def _grey(values):
    return np.repeat(values[..., None], 3, 2)


def _flat(colour):
    return np.full((5, 7, 3), colour, np.uint8)


def _frames(form, **how):
    frames = [Image.new("RGB", (7, 5), colour) for colour in ("red", "blue")]
    return _bytes(frames[0], form, save_all=True, append_images=frames[1:], duration=50, **how)


def _decoded(data):
    """For lossy formats: what Pillow decodes, which is right where nothing else is to be done."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def _striped(clear):
    return np.where((np.arange(35).reshape(5, 7, 1) % 2) == 0, [255, 255, 255] if clear else [255, 0, 0], [0, 0, 255])


def every_kind():
    image, grey = Image.fromarray(RGB), Image.fromarray(GREY)
    rgba = Image.fromarray(np.dstack([RGB, ALPHA]))
    la = Image.fromarray(np.dstack([GREY, ALPHA]))
    deep = GREY.astype(np.uint16) * 257
    deep[0, 0] = 65535
    shades = GREY.copy()
    shades[0, 0] = 255
    clear = np.where(deep == deep[2, 3], 255, shades)
    cmyk, jpeg, webp, avif = (
        _bytes(image.convert("CMYK"), "JPEG", quality=95),
        _bytes(image, "JPEG"),
        _bytes(image, "WEBP"),
        _bytes(image, "AVIF"),
    )
    kinds = {
        "png": (".png", _bytes(image, "PNG"), RGB),
        "upper case": (".PNG", _bytes(image, "PNG"), RGB),
        "bmp": (".bmp", _bytes(image, "BMP"), RGB),
        "tif": (".tif", _bytes(image, "TIFF"), RGB),
        "tiff": (".tiff", _bytes(image, "TIFF", compression="tiff_lzw"), RGB),
        "ppm": (".ppm", _bytes(image, "PPM"), RGB),
        "tga": (".tga", _bytes(image, "TGA"), RGB),
        "jpeg": (".jpeg", jpeg, _decoded(jpeg)),
        "JPG": (".JPG", jpeg, _decoded(jpeg)),
        "lossless webp": (".webp", _bytes(image, "WEBP", lossless=True), RGB),
        "webp": (".webp", webp, _decoded(webp)),
        "avif": (".avif", avif, _decoded(avif)),
        "avif named jpg": (".jpg", avif, _decoded(avif)),
        "cmyk": (".jpg", cmyk, _decoded(cmyk)),
        "grey": (".png", _bytes(grey, "PNG"), _grey(GREY)),
        "one bit": (".png", _bytes(Image.fromarray(GREY > 127), "PNG"), _grey(np.where(GREY > 127, 255, 0))),
        "16 bit": (".png", _bytes(Image.fromarray(deep), "PNG"), _grey(shades)),
        "16 bit tif": (".tif", _bytes(Image.fromarray(deep), "TIFF"), _grey(shades)),
        "16 bit with a clear shade": (
            ".png", _bytes(Image.fromarray(deep), "PNG", transparency=int(deep[2, 3])), _grey(clear)
        ),
        "rgba": (".png", _bytes(rgba, "PNG"), ON_WHITE),
        "rgba webp": (".webp", _bytes(rgba, "WEBP", lossless=True), ON_WHITE),
        "rgba tif": (".tif", _bytes(rgba, "TIFF"), ON_WHITE),
        "grey with alpha": (".png", _bytes(la, "PNG"), _grey(np.where(ALPHA == 0, 255, GREY))),
        "clear colour": (".png", _bytes(Image.new("RGB", (7, 5), "red"), "PNG", transparency=(255, 0, 0)), _flat(255)),
        "palette": (".png", _palette(), _striped(False)),
        "palette with a clear entry": (".png", _palette(transparency=0), _striped(True)),
        "palette with alpha": (".png", _palette(transparency=b"\0\xff"), _striped(True)),
        "animated gif": (".gif", _frames("GIF"), _flat([255, 0, 0])),
        "animated webp": (".webp", _frames("WEBP", lossless=True), _flat([255, 0, 0])),
        "animated png": (".png", _frames("PNG"), _flat([255, 0, 0])),
        "many pages": (".tif", _frames("TIFF"), _flat([255, 0, 0])),
        "one pixel": (".png", _bytes(Image.new("RGB", (1, 1), "red"), "PNG"), np.array([[[255, 0, 0]]])),
        "damaged exif": (".png", _bytes(image, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"), RGB),
    }  # fmt: skip
    for orientation, seen in ROTATED.items():
        exif = _exif(orientation)
        kinds[f"png rotated {orientation}"] = (".png", _bytes(image, "PNG", exif=exif), seen)
        kinds[f"webp rotated {orientation}"] = (".webp", _bytes(image, "WEBP", lossless=True, exif=exif), seen)
        kinds[f"tif rotated {orientation}"] = (".tif", _bytes(image, "TIFF", exif=exif), seen)
        jpeg = _bytes(image, "JPEG", exif=exif)
        turned = np.rot90(_decoded(jpeg), {3: 2, 6: -1, 8: 1}[orientation])
        kinds[f"jpg rotated {orientation}"] = (".jpg", jpeg, turned)
    return kinds


def every_damage():
    """Bytes that are no image, by kind: (suffix, bytes)."""
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    whole = {form: _bytes(image, form) for form in ("JPEG", "PNG", "WEBP", "AVIF", "TIFF", "BMP", "GIF")}
    found = {f"cut {form}": (".jpg", data[: len(data) // 2]) for form, data in whole.items()}
    start = whole["AVIF"].index(b"mdat") + 4
    found["corrupt avif"] = (".jpg", whole["AVIF"][:start] + bytes(20) + whole["AVIF"][start + 20 :])  # RuntimeError
    found["avif without its last byte"] = (".avif", whole["AVIF"][:-1])  # SyntaxError
    found["text"] = (".png", b"not an image")
    found["empty"] = (".png", b"")
    found["postscript"] = (".jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n")
    found["no pixels"] = (".ppm", b"P6 0 0 255\n")
    return found
