"""Decoding and resizing of images. Every task and tool decodes with ``decode_image``.

Pillow is used where pixels must match the reference exactly, OpenCV where its result is equal or close and faster.
"""

import io
import warnings

import cv2
import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from dat_jax.data.image_files import DamagedFile
from dat_jax.errors import UserError

cv2.setNumThreads(0)  # the pipeline is already parallel over images
# Pillow prints warnings about damaged metadata, without the name of the file; the pixels are valid all the same.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.TiffImagePlugin")
# Pillow warns above Image.MAX_IMAGE_PIXELS and raises above twice that; here both raise.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
_TOO_LARGE = (Image.DecompressionBombError, Image.DecompressionBombWarning)
# Exceptions that Pillow raises for damaged files; RuntimeError for AVIF.
DAMAGE = (OSError, SyntaxError, ValueError, RuntimeError, *_TOO_LARGE)
_OPENCV_CHANNELS = 4  # that cv2.resize takes when it averages areas
# Modes of Pillow with at most 8 bits per channel that it converts to RGB.
_MODES = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV")


def decode_image(data: bytes, *, name: str, apply_orientation: bool = True) -> np.ndarray:
    """Decode an image file to uint8 (H, W, 3) RGB, with the pixels of Pillow's ``convert("RGB")``.

    - The format is detected from the bytes, not from the name.
    - Gray, palette and CMYK images are converted to RGB. Alpha is dropped without blending. Animations give their first frame.
    - Color images with 16 bits per channel (PNG, TIFF, PPM) give the high byte of each value. Gray images with more than 8 bits
      per channel are refused, since the range of their values is not known.
    - Color profiles and gamma are ignored.
    - RGB and gray JPEGs are decoded by OpenCV: its pixels were equal to Pillow's on every photograph tried, in 3/4 of the time.

    Args:
      data: content of the file.
      name: name of the image for error messages.
      apply_orientation: whether the image is turned upright, as its EXIF orientation tag says. TIFF files always are.

    Raises:
      DamagedFile: the bytes are not a readable image, are truncated, or have more than ``Image.MAX_IMAGE_PIXELS`` pixels.
      UserError: the image is gray with more than 8 bits per channel, or has colors that cannot be converted.
    """
    if not data:
        raise DamagedFile(f"The image {name} cannot be decoded: the file is empty.")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if reason := _why_unsupported(image):
                raise UserError(f"The image {name} {reason}.")
            pixels = _decode_jpeg(data) if image.format == "JPEG" and image.mode in ("RGB", "L") else None
            if pixels is None:
                pixels = np.asarray(_to_rgb(image))
            return turn_upright(pixels, read_orientation(image)) if apply_orientation else pixels
    except UserError:
        raise
    except DAMAGE as error:
        raise DamagedFile(f"The image {name} cannot be decoded: {_describe(error)}.") from error


def read_size(path: str, *, apply_orientation: bool = True) -> tuple[int, int]:
    """Read the height and width, in pixels, that ``decode_image`` gives an image file, from the header of the file.

    Raises:
      DamagedFile: the header cannot be read.
    """
    try:
        with Image.open(path) as image:
            if image.format == "TIFF":
                image.load()  # turns the image, and in some versions of Pillow changes its size
                return image.height, image.width
            turned = apply_orientation and read_orientation(image) >= 5
            return (image.width, image.height) if turned else (image.height, image.width)
    except DAMAGE as error:
        reason = getattr(error, "strerror", None) or _describe(error)
        raise DamagedFile(f"The size of the image {path} cannot be read: {reason}.") from error


def is_turned(path: str) -> bool:
    """Return whether an image file has an orientation tag other than upright; False if it cannot be read."""
    try:
        with Image.open(path) as image:
            return read_orientation(image) != 1
    except DAMAGE:
        return False


def explain_turned(path: str, size: tuple[int, int], *, apply_orientation: bool) -> str:
    """Explain why an image does not have the size of its annotations.

    Args:
      path: the image file, which can be read.
      size: height and width that the annotations have.
      apply_orientation: value of the setting.

    Returns:
      A sentence to append to a message, with a space in front; "" if the sizes differ by more than an exchange of the sides.
    """
    if read_size(path, apply_orientation=not apply_orientation) == size:
        return (
            f" Its orientation tag was {'' if apply_orientation else 'not '}applied: set "
            f"config.data.apply_orientation={not apply_orientation} if the annotations belong to the other one."
        )
    if read_size(path, apply_orientation=apply_orientation) == size[::-1]:
        return " The height and the width are exchanged."
    return ""


def check_image(data: bytes) -> str | None:
    """Return why ``decode_image`` cannot decode the bytes, or None if it can.

    All bytes are read; JPEGs are decoded at an eighth of their size.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            if reason := _why_unsupported(image):
                return f"it {reason}"
            image.draft("RGB", (1, 1))
            image.load()
    except DAMAGE as error:
        return _describe(error)
    return None


def _why_unsupported(image: Image.Image) -> str | None:
    # Pillow reads gray with alpha and 16 bits as LA, of which it keeps the high bytes.
    is_deep_png = image.format == "PNG" and any(tile[3] == "LA;16B" for tile in getattr(image, "tile", ()))
    if image.mode.startswith(("I", "F")) or is_deep_png:
        return (
            "has more than 8 bits per channel: convert it to 8 bits first, with a range of values that fits your images"
        )
    if image.mode not in _MODES:
        return f"has the color mode {image.mode}: convert it to RGB first"
    return None


def _decode_jpeg(data: bytes) -> np.ndarray | None:
    """Decode with OpenCV; None if it cannot."""
    pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)
    return None if pixels is None else cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # otherwise Pillow warns; the colors are the same
    return image.convert("RGB")


def read_orientation(image: Image.Image) -> int:
    """Return the EXIF orientation, 1 to 8; 1, which is upright, if there is none or it cannot be read."""
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # Pillow raises many types for damaged tags, without which the image is still valid
        return 1
    return orientation if orientation in range(1, 9) else 1


def turn_upright(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W) or (H, W, 3) by an EXIF orientation, 1 to 8, as ``PIL.ImageOps.exif_transpose`` does."""
    if orientation >= 5:
        pixels = pixels.swapaxes(0, 1)
    rows_reversed, columns_reversed = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return np.ascontiguousarray(pixels[:: -1 if rows_reversed else 1, :: -1 if columns_reversed else 1])


def _describe(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):
        return "the image format is not recognized"
    if isinstance(error, _TOO_LARGE):
        return f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels; resize it first"
    return " ".join(str(error).split()).rstrip(".")


def resize_bicubic(image: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Resize approximately as Pillow's bicubic filter does, about three times as fast.

    OpenCV's cubic interpolation has no antialiasing filter, unlike Pillow's. For a reduction by a factor s <= 2, the image is
    therefore blurred first, with a standard deviation of sqrt(s^2 - 1) / 2 pixels; beyond that, areas are averaged. The mean
    difference from Pillow on a photograph of fine detail at s = 1.5 is 1.1 of 255; without blurring it is 3.6, and 1.0 by area
    averaging in twice the time (experiments/input_pipeline).

    Args:
      image: uint8, uint16 or float32 (H, W, C).
      width, height: size of the result in pixels.

    Returns:
      (height, width, C) of the same dtype.
    """
    if image.shape[2] > _OPENCV_CHANNELS:
        starts = range(0, image.shape[2], _OPENCV_CHANNELS)
        parts = [image[:, :, start : start + _OPENCV_CHANNELS] for start in starts]
        return np.concatenate([resize_bicubic(part, width=width, height=height) for part in parts], axis=2)
    resized = _resize_by_opencv(image, width=width, height=height)
    return resized.reshape(height, width, -1)  # OpenCV drops the axis of a single channel


def _resize_by_opencv(image: np.ndarray, *, width: int, height: int) -> np.ndarray:
    scale_x, scale_y = image.shape[1] / width, image.shape[0] / height
    if max(scale_x, scale_y) > 2:
        return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    if max(scale_x, scale_y) > 1:
        sigma_x, sigma_y = (max(np.sqrt(max(scale**2 - 1, 0)) / 2, 1e-3) for scale in (scale_x, scale_y))
        image = cv2.GaussianBlur(image, (5, 5), sigmaX=sigma_x, sigmaY=sigma_y)
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC)


def resize_as_pillow(image: np.ndarray, *, width: int, height: int) -> np.ndarray:
    """Resize every channel by Pillow's bicubic filter.

    Args:
      image: uint8, uint16 or float32 (H, W, C).
      width, height: size of the result in pixels.

    Returns:
      (height, width, C) of the same dtype. Integers are rounded, and clipped to the values of the dtype.
    """
    values = image if image.dtype == np.uint8 else image.astype(np.float32)
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(values, 2, 0)]
    channels = [channel.resize((width, height), Image.Resampling.BICUBIC) for channel in channels]
    resized = np.stack([np.asarray(channel) for channel in channels], axis=2)
    if image.dtype == np.uint16:
        resized = np.clip(np.rint(resized), 0, np.iinfo(np.uint16).max)
    return resized.astype(image.dtype)
