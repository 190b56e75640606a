"""Formats of images, with any number of channels, and the decoding of files to them."""

import dataclasses
import io
import logging

import numpy as np
import tifffile
from PIL import Image

from dat_jax.data.image_files import DamagedFile, error_text
from dat_jax.data.images import decode_image, read_orientation, turn_upright
from dat_jax.errors import UserError

for _logger in ("tifffile", "PIL.TiffImagePlugin"):  # they log damage without the name of the file
    logging.getLogger(_logger).setLevel(logging.CRITICAL)
DTYPES = ("uint8", "uint16", "float32")
_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # also BigTIFF, in both byte orders
_TIFF_COLORS = ("MINISBLACK", "RGB", "SEPARATED")  # gray or any channels, RGB and CMYK
_PILLOW_CHANNELS = (1, 3, 4)  # of TIFF files that are converted to RGB
_PILLOW_MODES = ("L", "LA", "RGB", "RGBA", "CMYK")  # with 8 bits per channel and without a palette


@dataclasses.dataclass(frozen=True)
class ImageFormat:
    """Number and type of the values of every pixel.

    Attributes:
      channels: number of channels.
      dtype: one of ``DTYPES``.
    """

    channels: int = 3
    dtype: str = "uint8"

    def __str__(self) -> str:
        return f"{self.channels} {'channel' if self.channels == 1 else 'channels'} of {self.dtype}"

    def check(self, image: np.ndarray, *, name: str) -> None:
        """Check an array (H, W, C).

        Raises:
          UserError: the number of channels or the dtype is another one, or values are not finite; it names the image.
        """
        actual = ImageFormat(image.shape[-1], image.dtype.name)
        if actual != self:
            raise self.make_error(actual, name=name)
        if self.dtype == "float32" and not np.isfinite(image).all():
            raise UserError(f"The image {name} has values that are not finite: replace NaN and infinity by numbers.")

    def make_error(self, actual: "ImageFormat", *, name: str) -> UserError:
        """Make the error for an image of another format."""
        return UserError(
            f"The image {name} has {actual}: expected {self} (config.data.channels and config.data.dtype of the run)."
        )


RGB = ImageFormat()


def decode(data: bytes, *, name: str, image_format: ImageFormat = RGB, apply_orientation: bool = True) -> np.ndarray:
    """Decode an image file to an array (H, W, C) of a format.

    RGB with 8 bits is decoded by ``decode_image``, which converts other colors to it. Otherwise values are as they are stored
    and nothing is converted:

    - TIFF files with any number of channels, interleaved, in planes, or as one page for each channel.
    - NumPy files (.npy) with an array (H, W, C), or (H, W) for one channel. These can be RGB, too.
    - Other image files with gray values or colors of 8 bits, and gray PNG files with 16 bits.

    Args:
      data: content of the file, whose type is detected from the bytes.
      name: name of the image for error messages.
      image_format: channels and dtype of the result.
      apply_orientation: see ``decode_image``.

    Raises:
      DamagedFile: the bytes are not a readable image, or are truncated.
      UserError: the image has another format or values that are not finite, see ``ImageFormat.check``, or a palette.
    """
    if image_format == RGB and not data.startswith(_NPY):
        try:
            return decode_image(data, name=name, apply_orientation=apply_orientation)
        except DamagedFile as error:
            stored = _read_tiff_format(data)
            if stored is None or stored.channels in _PILLOW_CHANNELS:
                raise
            raise RGB.make_error(stored, name=name) from error
    return _decode_stored(data, name=name, image_format=image_format, apply_orientation=apply_orientation)


def _decode_stored(data: bytes, *, name: str, image_format: ImageFormat, apply_orientation: bool) -> np.ndarray:
    """Decode a file without any conversion of its values."""
    if not data:
        raise DamagedFile(f"The image {name} cannot be decoded: the file is empty.")
    try:
        if data.startswith(_NPY):
            image = np.load(io.BytesIO(data), allow_pickle=False)
        elif data.startswith(_TIFF):
            image = _decode_tiff(data, channels=image_format.channels, apply_orientation=apply_orientation)
        else:
            image = _decode_with_pillow(data, apply_orientation=apply_orientation)
    except _Unsupported as error:
        raise UserError(f"The image {name} {error}.") from error
    except Exception as error:  # NumPy, tifffile and Pillow raise many types for damaged files
        raise DamagedFile(f"The image {name} cannot be decoded: {error_text(error)}.") from error
    image = image[:, :, None] if image.ndim == 2 else image
    if image.ndim != 3 or not image.size:
        raise UserError(f"The image {name} has the shape {image.shape}: expected (height, width, channels).")
    image_format.check(image, name=name)
    return np.ascontiguousarray(image, image_format.dtype)  # also native byte order


class _Unsupported(Exception):
    """A readable image that is refused; the message is the end of a sentence."""


def _read_tiff_format(data: bytes) -> ImageFormat | None:
    """Format of the first page of a TIFF file, from its header; None for other and damaged files."""
    try:
        with tifffile.TiffFile(io.BytesIO(data)) as file:
            page = file.pages.first
            return ImageFormat(page.samplesperpixel, np.dtype(page.dtype).name)
    except Exception:  # see ``_decode_stored``
        return None


def _decode_tiff(data: bytes, *, channels: int, apply_orientation: bool) -> np.ndarray:
    """Decode to (H, W, C), or (H, W). ``channels`` decides which axis of pages is that of the channels."""
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        page, series = file.pages.first, file.series[0]
        if page.imagelength * page.imagewidth > (Image.MAX_IMAGE_PIXELS or np.inf):
            raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels; resize it first")
        colors, compression = (getattr(tag, "name", str(tag)) for tag in (page.photometric, page.compression))
        if colors not in _TIFF_COLORS:
            raise _Unsupported(f"has the TIFF color type {colors}: expected {', '.join(_TIFF_COLORS)}")
        try:
            image, axes = series.asarray(), series.axes
        except Exception as error:
            if "imagecodecs" not in str(error) and not isinstance(error, ImportError):
                raise
            reason = f"has the compression {compression}, which another package reads: pip install imagecodecs"
            raise _Unsupported(reason) from error
        orientation = page.tags.valueof("Orientation", default=1)
    if axes == "SYX":  # planes
        image = np.moveaxis(image, 0, 2)
    elif image.ndim == 3 and axes != "YXS":
        # A page for each channel, or for each row: so tifffile writes arrays (H, W, C) without a color type.
        pages, height, width = image.shape
        if (pages == channels) == (width == channels):
            raise _Unsupported(
                f"has {pages} pages of {height} x {width}: expected a page for each of {channels} channels"
            )
        image = np.moveaxis(image, 0, 2) if pages == channels else image
    return turn_upright(image, orientation) if apply_orientation else image


def _decode_with_pillow(data: bytes, *, apply_orientation: bool) -> np.ndarray:
    """Decode to (H, W, C), or (H, W)."""
    with Image.open(io.BytesIO(data)) as image:
        is_deep = any(";16B" in str(tile[3]) for tile in getattr(image, "tile", ()))  # before the file is read
        orientation = read_orientation(image) if apply_orientation else 1
        if image.format == "PNG" and image.mode.startswith("I"):  # gray with 16 bits, int32 in older versions of Pillow
            return turn_upright(np.asarray(image).astype(np.uint16), orientation)
        if is_deep:
            raise _Unsupported("has colors with 16 bits in a PNG file: convert it to TIFF or .npy")
        image = image.convert("L") if image.mode == "1" else image
        if image.mode not in _PILLOW_MODES:
            raise _Unsupported(f"has the color mode {image.mode}: expected {', '.join(_PILLOW_MODES)}")
        return turn_upright(np.asarray(image), orientation)
