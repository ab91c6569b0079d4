"""What the bytes of an image file are, whatever its name says: kind, size, colours; shrinking and PNG writing."""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass

import numpy as np
from PIL import Image, features

# what webdataset's and timm's readers take for an image without being asked
NATIVE = ("jpg", "png", "webp")
# member names that are images, in native shards and in foreign ones
IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "pbm", "pnm", "bmp", "tif", "tiff", "gif")
_SAME = {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg"}


class BadImage(ValueError):
    """Bytes that are not an image. The message says why, not where."""


@dataclass(frozen=True)
class Prepared:
    """An image as it goes into a shard."""

    extension: str  # jpg, png or webp: what the bytes are
    data: bytes
    found: str  # what the bytes of the source were: jpg, png, webp, or Pillow's name for another format
    cmyk: bool
    changed: bool  # False if the source's bytes stand untouched


def sniff(data: bytes) -> str | None:
    """jpg, png or webp by the first bytes; None for anything else."""
    if data[:3] == b"\xff\xd8\xff":
        return "jpg"
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return "png"
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    return None


def claimed_kind(extension: str) -> str:
    """The kind that a file name's suffix or a member's extension claims: `.JPEG` -> jpg."""
    extension = extension.lower().lstrip(".")
    return _SAME.get(extension, extension)


def open_image(data: bytes) -> Image.Image:
    """Parse an image's header.

    Raises:
        BadImage: empty, not an image, or larger than Pillow's limit against decompression bombs.
    """
    if not data:
        raise BadImage("the file is empty")
    try:
        with warnings.catch_warnings():
            # large photographs are fine; Pillow still refuses those of twice that limit
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(io.BytesIO(data))
    # Pillow raises SyntaxError, struct.error, ValueError and others on broken files
    except Exception as error:
        raise BadImage(_why(error)) from error


def decode_fully(data: bytes) -> Image.Image:
    """Decode every pixel of an image.

    Raises:
        BadImage: as `open_image`, and for a file that ends early or whose data cannot be decoded.
    """
    image = open_image(data)
    try:
        image.load()
    except Exception as error:
        raise BadImage(_why(error)) from error
    return image


def _why(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image that Pillow knows"
    return str(error) or type(error).__name__


def prepare_image(data: bytes, max_side: int | None = None, quality: int = 90) -> Prepared:
    """Bytes of an image file -> what goes into a shard.

    JPEG, PNG and WebP stay as they are, whatever they are called; other formats become PNG, which loses nothing but
    further frames. With `max_side` (pixels) an image whose longer side exceeds it is made that small and written as
    JPEG with restart markers; as everywhere here, EXIF orientation is not applied, because the usual loaders do not
    apply it either.

    Raises:
        BadImage: the header is not an image's, or an image that has to be decoded cannot be.
    """
    image = open_image(data)
    kind = sniff(data)
    found = kind or (image.format or "unknown").lower()
    cmyk = image.mode == "CMYK"
    if max_side is not None and max(image.size) > max_side:
        try:
            image.thumbnail((max_side, max_side), Image.Resampling.LANCZOS)
            image = image if image.mode == "L" else image.convert("RGB")
        except Exception as error:
            raise BadImage(_why(error)) from error
        out = io.BytesIO()
        # a reader that wants a part decodes the intervals of that part alone: see jpeg.py
        image.save(out, "JPEG", quality=quality, restart_marker_blocks=_restart_interval(image))
        return Prepared("jpg", out.getvalue(), found, cmyk, changed=True)
    if kind is not None:
        return Prepared(kind, data, found, cmyk, changed=False)
    image = decode_fully(data)
    if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"):
        image = image.convert("RGB")
    return Prepared("png", _png(image), found, cmyk, changed=True)


def _restart_interval(image: Image.Image) -> int:
    """Minimum coded units between two restart markers of a JPEG, so that each row of them is whole intervals.

    About four, which are 64 pixels and cost 1 % more bytes; a row, where its length has no such divisor.
    """
    # Pillow halves the colours of both directions
    across = -(-image.width // (8 if image.mode == "L" else 16))
    fitting = [units for units in (4, 5, 3, 6) if across % units == 0]
    return fitting[0] if fitting else across


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 [H, W] or [H, W, 3] -> the bytes of a PNG file."""
    return _png(Image.fromarray(pixels))


def _png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def encoder_versions() -> str:
    """What re-encoded bytes depend on beside the pixels."""
    parts = [f"pillow {Image.__version__}", "restart markers"]
    parts += [f"{name} {features.version(name)}" for name in ("jpg", "zlib")]
    return ", ".join(parts)
