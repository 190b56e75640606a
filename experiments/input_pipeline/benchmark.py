"""Cost of the host's part of the recipe: decode, crop, flip and RandAugment of 500 x 375 JPEG files, on one core.

python -m experiments.input_pipeline.benchmark

Prints the tables of README.md in this folder. Values are medians over rounds. Every round measures all columns in turn, so that
other load on the machine does not change their ratio. The photographs are those of scikit-learn and matplotlib.
"""

import importlib.util
import io
import itertools
import os
import pathlib
import time
from collections.abc import Callable

import cv2
import numpy as np
from PIL import Image

from dat_jax.data import batching, images, transforms
from dat_jax.data.randaugment import OPERATIONS, apply_operation, draw_operations

ROUNDS = 15
FED_BATCHES = 40
SETTINGS = dict(
    image_size=224,
    min_crop_area=0.08,
    max_crop_aspect=4 / 3,
    flip_probability=0.5,
    rand_augment_count=2,
    rand_augment_magnitude=9.0,
    rand_augment_std=0.5,
)
PHOTOGRAPHS = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)


def load_photographs() -> list[np.ndarray]:
    """Twelve crops of three photographs, uint8 (375, 500, 3)."""
    rng, cuts = np.random.default_rng(0), []
    for index in range(12):
        package, path = PHOTOGRAPHS[index % 3]
        with Image.open(pathlib.Path(importlib.util.find_spec(package).origin).parent / path) as file:
            image = file.convert("RGB")
        width, height = (int(rng.integers(side * 4 // 5, side + 1)) for side in image.size)
        x, y = int(rng.integers(image.width - width + 1)), int(rng.integers(image.height - height + 1))
        cuts.append(np.asarray(image.resize((500, 375), Image.Resampling.BICUBIC, (x, y, x + width, y + height))))
    return cuts


def encode(image: np.ndarray) -> bytes:
    """Encode an image as JPEG with quality 95."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=95)
    return file.getvalue()


def pillow_pipeline(data: bytes, rng: np.random.Generator) -> np.ndarray:
    """The same recipe with Pillow only: the same random numbers, with Pillow's resampling."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    x, y, w, h = transforms.draw_crop(rng, width=image.width, height=image.height, min_area=0.08, max_aspect=4 / 3)
    image = image.crop((x, y, x + w, y + h)).resize((224, 224), Image.Resampling.BICUBIC)
    if rng.uniform() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    for name, argument in draw_operations(rng, count=2, magnitude=9.0, magnitude_std=0.5):
        image = _pillow_operation(image, name, argument)
    return np.asarray(image)


def _pillow_operation(image: Image.Image, name: str, argument: float) -> Image.Image:
    matrices = {
        "ShearX": (1, argument, 0, 0, 1, 0),
        "ShearY": (1, 0, 0, argument, 1, 0),
        "TranslateX": (1, 0, argument * image.width, 0, 1, 0),
        "TranslateY": (1, 0, 0, 0, 1, argument * image.height),
    }
    resampled = dict(resample=Image.Resampling.BICUBIC, fillcolor=(124, 116, 104))
    if name == "Rotate":
        return image.rotate(argument, **resampled)
    if name in matrices:
        return image.transform(image.size, Image.Transform.AFFINE, matrices[name], **resampled)
    return Image.fromarray(apply_operation(np.asarray(image), name, argument))  # identical to Pillow


def measure(columns: dict[str, Callable[[int], object]], count: int) -> dict[str, float]:
    """Median over rounds of the milliseconds per call. Each column is called with 0 .. count - 1 in every round."""
    seconds = {name: [] for name in columns}
    for _ in range(ROUNDS):
        for name, function in columns.items():
            start = time.perf_counter()
            for index in range(count):
                function(index)
            seconds[name].append((time.perf_counter() - start) / count)
    return {name: 1e3 * float(np.median(values)) for name, values in seconds.items()}


def table(title: str, rows: dict[str, tuple]) -> None:
    """Print a Markdown table. ``title`` has its heads, separated by |."""
    print(f"\n| {title} |\n|{'---|' * title.count('|')}---|")
    for name, values in rows.items():
        print(f"| {name} | {' | '.join(str(value) for value in values)} |")


def measure_pipeline(photographs: list[np.ndarray], files: list[bytes]) -> None:
    """Measure the whole pipeline, decoding only, and the pipeline with Pillow."""
    transform = transforms.make_train_transform(**SETTINGS)

    def run(index):
        image = images.decode_image(files[index % 12], name="")
        return transform({"image": image}, np.random.default_rng(index))

    milliseconds = measure(
        {
            "decode only": lambda i: images.decode_image(files[i % 12], name=""),
            "decode, crop, flip, RandAugment": run,
            "the same with Pillow": lambda i: pillow_pipeline(files[i % 12], np.random.default_rng(i)),
        },
        count=120,
    )
    whole = milliseconds["decode, crop, flip, RandAugment"]
    rows = {name: (f"{ms:.2f}", f"{1e3 / ms:.0f}", f"{ms / whole:.2f}") for name, ms in milliseconds.items()}
    table("one core | ms per image | images/s | relative time", rows)


def measure_resizing(photographs: list[np.ndarray]) -> None:
    """Measure time, and mean absolute difference from Pillow's bicubic in 1/255, for several reductions."""
    ways = {
        "dat_jax: blur, then OpenCV cubic": lambda x: images.resize_bicubic(x, width=224, height=224),
        "OpenCV cubic": lambda x: cv2.resize(x, (224, 224), interpolation=cv2.INTER_CUBIC),
        "OpenCV area": lambda x: cv2.resize(x, (224, 224), interpolation=cv2.INTER_AREA),
        "Pillow": lambda x: np.asarray(Image.fromarray(x).resize((224, 224), Image.Resampling.BICUBIC)),
    }
    sides = (150, 280, 340, 375)
    distances = {name: [] for name in ways}
    for side in sides:
        cuts = [np.ascontiguousarray(image[:side, :side]) for image in photographs]
        for name, way in ways.items():
            distances[name].append(np.mean([np.abs(way(x).astype(int) - ways["Pillow"](x)).mean() for x in cuts]))
    cuts = [np.ascontiguousarray(image[:280, :280]) for image in photographs]
    times = measure({name: lambda i, way=way: way(cuts[i % 12]) for name, way in ways.items()}, count=24)
    rows = {name: (f"{times[name]:.2f}", *(f"{d:.2f}" for d in distances[name])) for name in ways}
    heads = " | ".join(f"from {side}" for side in sides)
    table(f"resize to 224 | ms from 280 | distance {heads}", rows)


def measure_operations(photographs: list[np.ndarray]) -> None:
    """Measure every RandAugment operation at magnitude 9."""
    small = [images.resize_bicubic(image, width=224, height=224) for image in photographs]
    arguments = {name: 0.9 for name in OPERATIONS}
    arguments |= {"Rotate": 27.0, "Posterize": 1, "Solarize": 26, "SolarizeAdd": 99, "Color": 1.81, "ShearX": 0.27}
    arguments |= {"ShearY": 0.27, "TranslateX": 0.4, "TranslateY": 0.4}
    times = measure(
        {name: lambda i, name=name: apply_operation(small[i % 12], name, arguments[name]) for name in OPERATIONS},
        count=12,
    )
    table("operation, 224 x 224 | ms", {name: (f"{ms:.2f}",) for name, ms in times.items()})


class _Files:
    """Source of 100,000 records that repeat the encoded photographs."""

    class_names = ("any",)

    def __init__(self, files):
        self.files = files

    def __len__(self):
        return 100_000

    def __getitem__(self, index):
        return {"image": images.decode_image(self.files[index % 12], name=""), "label": np.int32(0)}


def measure_batches(files: list[bytes]) -> None:
    """Measure loading of training batches of 128, on all cores of the machine."""
    rows = {}
    for workers in (0, 1, os.cpu_count()):
        batches = batching.make_train_batches(
            _Files(files), transforms.make_train_transform(**SETTINGS), batch_size=128, seed=0, workers=workers
        )
        for _ in itertools.islice(batches, 8):  # skip prefetched batches and the start of the workers
            pass
        start = time.perf_counter()
        for _ in itertools.islice(batches, 24):
            pass
        rate = 24 * 128 / (time.perf_counter() - start)
        rows[f"worker processes: {workers}"] = (f"{rate:.0f}",)
        del batches
    table(f"loading, {os.cpu_count()} cores | images/s", rows)


def measure_feeding(files: list[bytes]) -> None:
    """Measure whether the loader keeps up with devices that take batches of 128 at a fixed rate, in images/s per core.

    A host of eight chips has 16 cores or more for them. At 1,000 images/s a chip, a core must load 500. The devices are replaced
    by pauses, in which the loader has all cores.
    """
    rows, cores = {}, os.cpu_count()
    for per_core in (400, 500, 600, 700):
        period = 128 / (per_core * cores)
        batches = batching.make_train_batches(
            _Files(files), transforms.make_train_transform(**SETTINGS), batch_size=128, seed=0, workers=0
        )
        for _ in itertools.islice(batches, 8):  # skip prefetched batches
            pass
        start, waited = time.perf_counter(), 0.0
        for _ in range(FED_BATCHES):
            asked = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - asked
            time.sleep(period)
        seconds = time.perf_counter() - start
        rows[str(per_core)] = (f"{FED_BATCHES * 128 / seconds / cores:.0f}", f"{100 * waited / seconds:.1f}")
        del batches
    table("images/s per core, wanted | delivered | time spent waiting, %", rows)


def main() -> None:
    """Print all tables."""
    photographs = load_photographs()
    files = [encode(image) for image in photographs]
    print(f"{os.cpu_count()} cores; JPEGs of {np.mean([len(file) for file in files]) / 1e3:.0f} kB")
    measure_pipeline(photographs, files)
    measure_resizing(photographs)
    measure_operations(photographs)
    measure_batches(files)
    measure_feeding(files)


if __name__ == "__main__":
    main()
