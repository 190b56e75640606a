"""Images of many sizes: programs, time and results by buckets, and with a program for each size.

JAX_PLATFORMS=cpu python -m experiments.image_sizes.benchmark [--parts=plan,pairs,evaluation,predict,chip] [--images=200] ...

The parts are:

- **plan**: buckets for sizes like those of the validation images of ADE20K and COCO, drawn from a seeded generator.
- **pairs**: random sizes in random arrays, several to a batch, in float64: the largest difference of a stage's map or of the
  logits from those of the image alone, relative to the largest value of the array. What lies beside the images is NaN and 1e30.
- **evaluation**: an evaluation of a small segmentor (dat_pp_nano with the SemanticFPN of the quickstart) with random weights,
  on images of as many sizes. The images are cut from photographs that packages ship, their short side is given, and their aspect
  ratios are like those of ADE20K. "programs" counts compilations that take at least 0.2 s.
- **predict**: the same for predictions of photographs with a segmentor and a detector, one image at a time.
- **chip**: compiler estimates for a segmentor in bfloat16 on a chip that is not attached (`pip install libtpu`), one array of
  512 x 768, with and without sizes.
"""

import contextlib
import math
import pathlib
import time
from collections.abc import Iterator
from typing import Any

from experiments import measure

PARTS = ("plan", "pairs", "evaluation", "predict", "chip")
CLASSES = 10
_SMALL_HEAD = dict(channels=64, neck_channels=64)  # of configs/quickstart_segmentation.py
_LEAST_SECONDS = 0.2  # of a compilation that counts
_VARIANTS = {  # overrides of dat_pp_nano, for "pairs"
    "DAT++ (N and D)": {},
    "v1 (L, S and D, released form)": dict(
        stages=("LS", "LS", "LD", "LD"),
        deformable_form="cvpr2022",
        conv_patches=False,
        lpu=(False,) * 4,
        conv_mlp=(False,) * 4,
    ),
    "v1 (L, S and D, later form)": dict(
        stages=("LS", "LS", "LD", "LD"), conv_patches=False, lpu=(False,) * 4, conv_mlp=(False,) * 4
    ),
    "P, E, X and D with other biases": dict(
        stages=("P", "E", "XD", "DD"),
        position_bias=("table", "table", "log_cpb", "fixed"),
        reduction_ratios=(8, 4, 2, 1),
    ),
    "D with depthwise bias and without offsets": dict(
        stages=("D", "D", "D", "D"), position_bias=("dwc", "none", "dwc", "none"), use_offsets=(True, True, False, True)
    ),
}


def different_sizes(count: int, short: int) -> list[tuple[int, int]]:
    """The first ``count`` different ones of ``ade_like_sizes``."""
    return list(dict.fromkeys(ade_like_sizes(10 * count, short)))[:count]


def ade_like_sizes(count: int, short: int = 512, seed: int = 0) -> list[tuple[int, int]]:
    """(height, width) after resizing with a short side, like ADE20K's: three quarters are wide, most of them near 4 : 3."""
    import numpy as np

    rng = np.random.default_rng(seed)
    ratios = np.exp(rng.normal(math.log(4 / 3), 0.13, count)).clip(1, 4)
    return [
        (short, round(short * ratio)) if is_wide else (round(short * ratio), short)
        for ratio, is_wide in zip(ratios, rng.random(count) < 0.75, strict=True)
    ]


def coco_like_sizes(count: int, seed: int = 0) -> list[tuple[int, int]]:
    """(height, width) of original images like those of COCO's val2017: a long side of 640 and common aspect ratios."""
    import numpy as np

    rng = np.random.default_rng(seed)
    shorts = rng.choice([480, 427, 426, 425, 428, 640, 360, 512, 500, 333, 400, 612], count, p=_coco_shares())
    jitter = np.where(rng.random(count) < 0.15, rng.integers(-60, 60, count), 0)
    sides = [(min(640, max(200, int(short + more))), 640) for short, more in zip(shorts, jitter, strict=True)]
    return [size if is_wide else size[::-1] for size, is_wide in zip(sides, rng.random(count) < 0.72, strict=True)]


def _coco_shares():
    return [0.36, 0.2, 0.1, 0.08, 0.05, 0.05, 0.03, 0.03, 0.03, 0.03, 0.02, 0.02]


def make_images(sizes: list[tuple[int, int]]) -> Iterator[Any]:
    """Images uint8 (H, W, 3) of these sizes, cut from photographs of scikit-learn and Matplotlib and resized."""
    import importlib.util

    import numpy as np
    from PIL import Image

    files = (
        ("sklearn", "datasets/images/china.jpg"),
        ("sklearn", "datasets/images/flower.jpg"),
        ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
    )
    photographs = []
    for package, path in files:
        spec = importlib.util.find_spec(package)
        assert spec is not None
        assert spec.origin is not None
        with Image.open(pathlib.Path(spec.origin).parent / path) as image:
            photographs.append(image.convert("RGB"))
    rng = np.random.default_rng(1)
    for index, (height, width) in enumerate(sizes):
        photograph = photographs[index % len(photographs)]
        scale = min(photograph.width / width, photograph.height / height) * rng.uniform(0.6, 1)
        cut = (max(1, int(width * scale)), max(1, int(height * scale)))
        left, top = rng.integers(0, photograph.width - cut[0] + 1), rng.integers(0, photograph.height - cut[1] + 1)
        part = photograph.crop((left, top, left + cut[0], top + cut[1]))
        yield np.asarray(part.resize((width, height), Image.Resampling.BICUBIC))


@contextlib.contextmanager
def counted_programs() -> Iterator[list[float]]:
    """Collects the seconds of every compilation of at least ``_LEAST_SECONDS``."""
    import jax

    seconds: list[float] = []

    def listen(event: str, duration: float, **_):
        if event == "/jax/core/compile/backend_compile_duration" and duration >= _LEAST_SECONDS:
            seconds.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield seconds


def compare_pairs(*, variant: str, batches: int, rows: int, seed: int) -> dict[str, Any]:
    """Largest relative differences over random sizes in random arrays, for one of ``_VARIANTS``; in this process."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import numpy as np

    import dat_jax

    rng = np.random.default_rng(seed)
    model = dat_jax.create_model("dat_pp_nano", num_classes=CLASSES, dtype=jnp.float64, **_VARIANTS[variant])
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape) + (leaf.ndim == 1), shapes)

    @jax.jit
    def compute(variables, images, sizes):
        maps = model.apply(variables, images, method="features", sizes=sizes)
        return [*maps, model.apply(variables, maps[-1], sizes=sizes, method="classify")[:, None, None]]

    worst = 0.0
    for _ in range(batches):
        sizes = rng.integers(32, 301, (rows, 2))
        bucket = np.minimum(sizes.max(axis=0) + rng.integers(0, 40, 2), 340)
        images = rng.standard_normal((rows, *bucket, 3))
        for image, (height, width) in zip(images, sizes, strict=True):
            image[height:], image[:, width:] = np.nan, 1e30
        together = compute(variables, images, jnp.asarray(sizes, jnp.int32))
        for index, (height, width) in enumerate(sizes):
            alone = compute(variables, images[index : index + 1, :height, :width], None)
            for whole, one in zip(together, alone, strict=True):
                part = np.asarray(whole[index, : one.shape[1], : one.shape[2]])
                worst = max(worst, float(np.abs(part - one[0]).max() / np.abs(one).max()))
    return {"pairs": batches * rows, "difference": worst}


def run_evaluation(*, buckets: str, images: int, short_side: int, batch: int) -> dict[str, Any]:
    """Evaluate a segmentor in this process, and count programs and seconds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    import dat_jax
    from dat_jax.data.buckets import measure_waste
    from dat_jax.data.segmentation_sources import SegmentationArraySource
    from dat_jax.data.segmentation_transforms import make_segmentation_eval_transform
    from dat_jax.data.sized_batching import choose_eval_buckets, make_sized_eval_batches
    from dat_jax.evaluation.segmentation import make_evaluator
    from dat_jax.tasks.segmentation.objective import make_segmentation_objective

    sizes = different_sizes(images, short_side)
    rng = np.random.default_rng(2)
    labels = [rng.integers(0, CLASSES, size, dtype=np.uint8) for size in sizes]
    source = SegmentationArraySource(list(make_images(sizes)), labels, tuple(map(str, range(CLASSES))))
    transform = make_segmentation_eval_transform(scale=(4 * short_side, short_side))
    model = dat_jax.create_segmentor("sem_fpn", backbone="dat_pp_nano", num_classes=CLASSES, **_SMALL_HEAD)
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    chosen = choose_eval_buckets(source, transform, buckets)
    with counted_programs() as programs:
        start = time.perf_counter()
        evaluate = make_evaluator(
            make_segmentation_objective(model, auxiliary_weight=0.0).predict, exact=chosen is None
        )
        result = evaluate(variables, make_sized_eval_batches(source, transform, batch_size=batch, buckets=chosen))
        seconds = time.perf_counter() - start
    shapes = [transform.view_shapes(*size)[0] for size in sizes]
    return {
        "sizes": len(set(shapes)),
        "buckets": len(chosen or set(shapes)),
        "waste": measure_waste(shapes, chosen) if chosen else 0.0,
        "programs": len(programs),
        "compile_seconds": sum(programs),
        "seconds": seconds,
        "mIoU": result.metrics["mIoU"],
        "loss": result.metrics["loss"],
    }


def run_predictions(*, kind: str, buckets: str, images: int, short_side: int) -> dict[str, Any]:
    """Predict images one by one in this process, and count programs and seconds."""
    import tempfile

    import jax
    import jax.numpy as jnp
    import numpy as np

    import dat_jax

    sizes = ade_like_sizes(images, short_side, seed=3)
    rng = np.random.default_rng(2)
    if kind == "segmentor":
        model = dat_jax.create_segmentor("sem_fpn", backbone="dat_pp_nano", num_classes=CLASSES, **_SMALL_HEAD)
    else:
        model = dat_jax.create_detector("mask_rcnn", backbone="dat_pp_nano", num_classes=CLASSES)
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    variables = jax.tree.map(lambda leaf: abs(jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32)) * 0.1, shapes)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "export"
        dat_jax.export_model(path, model=model, variables=variables, classes=[str(label) for label in range(CLASSES)])
        options = dict(long_side=4 * short_side, short_side=short_side, buckets=buckets)
        with counted_programs() as programs:
            predictor: Any = dat_jax.inference.load(path, **options)
            start = time.perf_counter()
            predictor = predictor.plan(sizes)
            for image in make_images(sizes):
                predictor(image)
            seconds = time.perf_counter() - start
    return {"programs": len(programs), "compile_seconds": sum(programs), "seconds": seconds}


def compile_segmentor(*, variant: str, head: str, bucket: list[int], batch: int, topology: str, sized: bool) -> dict:
    """Compile the logits of a segmentor in bfloat16 for a chip that is not attached, in this process."""
    import jax
    import jax.numpy as jnp

    jax.config.update("jax_platforms", "cpu")  # nothing runs on a device
    import dat_jax
    from dat_jax.ops import dispatch
    from dat_jax.profiling import hlo
    from dat_jax.profiling.topologies import find_devices
    from experiments import steps

    chip, devices = find_devices(topology)
    model = dat_jax.create_segmentor(
        head, backbone={"name": variant, "dtype": jnp.bfloat16, "scan_blocks": True}, num_classes=150
    )
    place = jax.sharding.SingleDeviceSharding(devices[0])

    def on_chip(tree):
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place), tree)

    with dispatch.compiling_for(chip.platform):
        variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
        images = jax.ShapeDtypeStruct((batch, *bucket, 3), jnp.bfloat16)
        sizes = jax.ShapeDtypeStruct((batch, 2), jnp.int32) if sized else None

        def logits(variables, images, sizes):
            return model.apply(variables, images, sizes=sizes)["logits"]

        compiled, report = steps.compile_step(jax.jit(logits, out_shardings=place), on_chip((variables, images, sizes)))
    module = hlo.parse(compiled.as_text())
    indexed = {name: hlo.count_indexed(module, name) for name in ("gather", "scatter")}
    cost = compiled.cost_analysis()
    return {
        "flops": cost["flops"],
        "bytes": cost["bytes accessed"],
        "temporary_bytes": report["temporary_bytes"],
        "compile_seconds": report["compile_seconds"],
        "largest_gather": indexed["gather"],
        "largest_scatter": indexed["scatter"],
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the benchmark."""
    parser = measure.make_parser(__file__, __doc__, repeats=1, min_seconds=0)
    parser.add_argument("--parts", type=measure.words, default=list(PARTS), help=f"some of {','.join(PARTS)}")
    parser.add_argument("--images", type=int, default=200, help="number of images of the evaluation")
    parser.add_argument("--predictions", type=int, default=40, help="number of predicted images")
    parser.add_argument("--short-side", type=int, default=512, help="short side of all images in pixels")
    parser.add_argument("--batch", type=int, default=4, help="batch size of the evaluation")
    parser.add_argument("--pairs", type=int, default=40, help="pairs of a size and an array, for each model")
    parser.add_argument("--topology", default="v5e:1x1", help="chip of the compiler estimates")
    parser.add_argument("--variant", default="dat_pp_tiny", help="backbone of the compiler estimates")
    options = parser.parse_args(argv)
    sections = {name: globals()[f"_show_{name}"](options) for name in options.parts}
    measure.write_results(options.output, title="Images of many sizes", sections={options.command: "", **sections})


def _show_plan(options) -> str:
    from dat_jax.data.buckets import choose_buckets, measure_waste
    from dat_jax.data.detection_transforms import make_detection_eval_transform

    transform = make_detection_eval_transform()
    cases = {
        "2,000 like ADE20K's": ade_like_sizes(2000),
        "5,000 like COCO's, padded to multiples of 32": [transform.view_shapes(*s)[0] for s in coco_like_sizes(5000)],
    }
    rows = []
    for name, shapes in cases.items():
        buckets = choose_buckets(shapes)
        rows.append(
            {
                "images": name,
                "sizes": str(len(set(shapes))),
                "buckets": str(len(buckets)),
                "waste": f"{measure_waste(shapes, buckets):.1%}",
                "height x width": ", ".join(f"{height} x {width}" for height, width in buckets),
            }
        )
        print(rows[-1], flush=True)
    return measure.format_table(rows)


def _show_pairs(options) -> str:
    rows = []
    for seed, variant in enumerate(_VARIANTS):
        arguments = dict(variant=variant, batches=-(-options.pairs // 4), rows=4, seed=seed)
        result = measure.run_fresh("experiments.image_sizes.benchmark:compare_pairs", **arguments)
        found = result.get("failed") or f"{result['difference']:.1e}"
        rows.append({"model": variant, "pairs": str(result.get("pairs", "")), "largest difference": found})
        print(rows[-1], flush=True)
    return measure.format_table(rows)


def _show_evaluation(options) -> str:
    arguments = dict(images=options.images, short_side=options.short_side, batch=options.batch)
    return _compare(lambda buckets: ("run_evaluation", dict(buckets=buckets, **arguments)))


def _show_predict(options) -> str:
    arguments = dict(images=options.predictions, short_side=options.short_side)
    parts = []
    for kind in ("segmentor", "detector"):
        table = _compare(lambda buckets, kind=kind: ("run_predictions", dict(kind=kind, buckets=buckets, **arguments)))
        parts.append(f"{kind}, {options.predictions} images:\n\n{table}")
    return "\n\n".join(parts)


def _compare(make_call) -> str:
    """Table of a function's results with buckets and with a program for each size."""
    rows = []
    for name, buckets in (("by buckets", "auto"), ("a program for each size", "exact")):
        function, arguments = make_call(buckets)
        result = measure.run_fresh(f"experiments.image_sizes.benchmark:{function}", **arguments)
        row = {"images": name}
        for key, value in result.items():
            text = f"{value:.1%}" if key == "waste" else f"{value:.6g}" if isinstance(value, float) else str(value)
            row[key.replace("_", " ")] = text
        rows.append(row)
        print(row, flush=True)
    return measure.format_table(rows)


def _show_chip(options) -> str:
    rows = []
    for name, sized in (("without sizes", False), ("with sizes", True)):
        result = measure.run_fresh(
            "experiments.image_sizes.benchmark:compile_segmentor",
            variant=options.variant,
            head="upernet",
            bucket=[512, 768],
            batch=1,
            topology=options.topology,
            sized=sized,
        )
        rows.append({"program": name, **{key.replace("_", " "): _format(value) for key, value in result.items()}})
        print(rows[-1], flush=True)
    return measure.format_table(rows)


def _format(value: Any) -> str:
    return measure.format_number(value) if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
