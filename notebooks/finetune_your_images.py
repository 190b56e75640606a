# ---
# jupyter:
#   accelerator: GPU
#   colab:
#     gpuType: T4
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Fine-tuning on your own images
#
# This notebook trains a classifier on a folder of images, on a free GPU, and applies it to a new image. In Colab, first
# choose *Runtime, Change runtime type, T4 GPU*. Without changes, all cells run in order on embedded digits.
#
# **It has not been run on a GPU.**

# %% [markdown]
# ## Install
#
# `REPOSITORY` is the location of dat_jax: a URL for `git clone`, or a folder with an uploaded copy. If this notebook is
# inside a clone of the repository, nothing is installed, and its requirements must be installed already. Colab's jax and
# flax (0.7.2 and 0.11.2, or newer) are kept.

# %%
import pathlib
import subprocess
import sys

REPOSITORY = ""  # a URL, or a folder such as "/content/dat_jax"

here = pathlib.Path.cwd()
root = next((folder for folder in (here, *here.parents) if (folder / "configs" / "quickstart.py").is_file()), None)
if root is None:
    assert REPOSITORY, "Set REPOSITORY to the URL of the dat_jax repository, or to a folder with a copy of it."
    root = pathlib.Path(REPOSITORY)
    if not root.is_dir():
        root = here / "dat_jax"
        if not root.is_dir():
            subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, root], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-r", root / "requirements.txt"], check=True)
sys.path.insert(0, str(root))  # configs/ is imported from the repository

# %% [markdown]
# ## Settings
#
# `IMAGES` is a folder in one of two layouts:
#
# - `train/<class>/` and `val/<class>/` with image files, which are used as they are;
# - `<class>/` with image files, of which a random fifth of each class is held out for validation.
#
# `WEIGHTS` are the initial weights: a published `.pth` or `.safetensors` file, an export of `python -m dat_jax.conversion`,
# or the work directory of another run. `""` trains a small model from scratch on 48 x 48 pixels, which is enough for digits.
# Use weights for photographs: a few dozen images per class are then enough, whereas training from scratch needs many
# thousands.

# %%
import os

IMAGES = ""  # such as "/content/drive/MyDrive/my_images"; "" writes digits as PNG files
WEIGHTS = ""  # such as "/content/drive/MyDrive/dat_pp_tiny.pth"; "" trains from scratch
MODEL = "dat_pp_tiny"  # the model of WEIGHTS
WORKDIR = "runs/finetune"
SAVE_TO = ""  # such as "/content/drive/MyDrive/my_classifier"; folder for the trained model
EPOCHS, BATCH_SIZE, DIGITS_PER_CLASS = 10, 32, 100

small = os.environ.get("DAT_JAX_SMALL") == "1"  # used by the tests: a few steps of a small model
if small:
    WORKDIR = os.environ["DAT_JAX_WORKDIR"]
    EPOCHS, BATCH_SIZE, DIGITS_PER_CLASS = 1, 16, 10

if any("/drive/" in place for place in (IMAGES, WEIGHTS, SAVE_TO)):
    from google.colab import drive

    drive.mount("/content/drive")

# %% [markdown]
# ## The images
#
# Images in `val/` are not used for training, so the accuracy on them is what to expect on similar new images. Put images of
# one object that were taken in a row into the same split.

# %%
import random
import shutil
import zlib

from PIL import Image

from dat_jax.data.embedded import read_mnist5k


def write_digits(folder):
    """Write some of the embedded digits to folder/train/<digit>/*.png and folder/val/<digit>/*.png."""
    for split, name, count in (("train", "train", DIGITS_PER_CLASS), ("validation", "val", DIGITS_PER_CLASS // 2)):
        images, labels, class_names = read_mnist5k(split)
        for label, class_name in enumerate(class_names):
            place = folder / name / class_name
            place.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(images[labels == label][:count]):
                Image.fromarray(image).save(place / f"{index}.png")


def split_classes(source, folder):
    """Copy a fifth of source/<class>/* to folder/val/<class>, and the rest to folder/train/<class>."""
    for place in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(path for path in place.iterdir() if path.is_file())
        random.Random(0).shuffle(files)
        count = max(len(files) // 5, 1)
        for name, chosen in (("val", files[:count]), ("train", files[count:])):
            (folder / name / place.name).mkdir(parents=True, exist_ok=True)
            for file in chosen:
                shutil.copy(file, folder / name / place.name)


data = pathlib.Path(WORKDIR) / (
    f"images_{zlib.crc32(IMAGES.encode())}" if IMAGES else "images"
)  # one folder per IMAGES
if not IMAGES:
    write_digits(data)
elif (pathlib.Path(IMAGES) / "train").is_dir():
    data = pathlib.Path(IMAGES)
elif not data.is_dir():
    unfinished = data.with_name(f"{data.name}_unfinished")
    split_classes(pathlib.Path(IMAGES), unfinished)
    unfinished.rename(data)

for split in ("train", "val"):
    print(
        split, {place.name: len(list(place.iterdir())) for place in sorted((data / split).iterdir()) if place.is_dir()}
    )

# %% [markdown]
# ## The weights
#
# Published weights are converted once. The conversion checks that names and shapes match the model.

# %%
weights = WEIGHTS
if WEIGHTS.endswith((".pth", ".pt", ".safetensors")):
    file, weights = os.path.abspath(WEIGHTS), os.path.abspath(f"{WORKDIR}/weights_{zlib.crc32(WEIGHTS.encode())}")
    if not os.path.isdir(weights):
        subprocess.run([sys.executable, "-m", "dat_jax.conversion", file, weights], check=True, cwd=root)

# %% [markdown]
# ## The configuration
#
# - `configs/finetune.py` has the learning rates for fine-tuning, `configs/quickstart.py` those for a small model from
#   scratch.
# - `dtype="auto"` is bfloat16 on every GPU. A T4 has no bfloat16 arithmetic and emulates it, so float32 is set there.
# - Batches of 32 images of 224 x 224 should fit into the 15 GiB of a T4: the compiler estimates 3.3 GiB for 128 of them in
#   bfloat16 on an H100.
# - `data.workers` is the number of processes that read images, here the number of cores of a Colab machine.

# %%
import jax

from configs import finetune, quickstart, tiny

module = tiny if small else finetune if weights else quickstart
config = module.get_config().unlock()
config.data.name, config.data.directory = "folders", str(data)
config.data.workers = 0 if small else 2
config.init_from = weights
config.epochs, config.steps, config.eval.every_steps = EPOCHS, 0, 0
config.batch_size, config.eval.batch_size = BATCH_SIZE, BATCH_SIZE
config.schedule.warmup_epochs = EPOCHS / 10
if weights:
    config.model.name = MODEL
    config.schedule.reference_batch_size = BATCH_SIZE  # keep the rate for a small batch: there are few steps
if "T4" in jax.devices()[0].device_kind:
    config.model.dtype = "float32"
config = config.lock()

# %% [markdown]
# The recipe for fine-tuning flips and crops images and changes colors. If left and right, or colors, distinguish the
# classes, disable this before training: `config.augmentation.flip_probability = 0.0`,
# `config.augmentation.rand_augment_count = 0`.
#
# ## Train
#
# *Interrupt execution* saves a checkpoint and stops. Run the cell again to resume. `top1` is the percentage of images in
# `val/` that are classified correctly.

# %%
from dat_jax.training import loop

result = loop.train(config, WORKDIR)

# %%
import IPython.display as ipython

ipython.display(ipython.Image(f"{WORKDIR}/curves.png"))
ipython.display(ipython.Image(f"{WORKDIR}/predictions.png"))

# %% [markdown]
# ## Confusion matrix
#
# `inference.load` loads the best checkpoint as a function of images. A row of the matrix is the true class, a column the
# predicted class. A dark diagonal entry marks a class that needs more images, or that cannot be distinguished from another.

# %%
import numpy as np
from matplotlib import pyplot as plt

from dat_jax import inference
from dat_jax.inference.image_files import find_images, read_image

classifier = inference.load(WORKDIR)
names = classifier.class_names
files = [file for name in names for file in find_images([data / "val" / name])]
confusion = np.zeros((len(names), len(names)), int)
for start in range(0, len(files), BATCH_SIZE):
    batch = files[start : start + BATCH_SIZE]
    predictions = classifier.classify(
        [read_image(file) for file in batch], pad_to=BATCH_SIZE
    )  # one batch size, compiled once
    for file, probabilities in zip(batch, predictions, strict=True):
        confusion[names.index(file.parent.name), probabilities.argmax()] += 1

figure, axes = plt.subplots(figsize=(5, 5))
axes.imshow(confusion / confusion.sum(axis=1, keepdims=True), vmin=0, vmax=1)
axes.set(xlabel="predicted", ylabel="true", xticks=range(len(names)), yticks=range(len(names)))
axes.set_xticklabels(names, rotation=90)
axes.set_yticklabels(names)
plt.show()

mistakes = confusion * (1 - np.eye(len(names), dtype=int))
for place in np.argsort(-mistakes, axis=None)[:3]:
    label, prediction = np.unravel_index(place, mistakes.shape)
    print(f"{names[label]} predicted as {names[prediction]}: {mistakes[label, prediction]} times")
print(f"correct: {np.trace(confusion)} of {confusion.sum()}")

# %% [markdown]
# ## A new image
#
# The classifier assigns one of its classes to any image, whatever it shows. In a terminal, `python -m dat_jax.predict
# runs/finetune photos/ --csv=found.csv` classifies a whole folder, and `python -m dat_jax.visualize runs/finetune photo.jpg
# --output=shown --html` shows where the model attends. The notebook `inspect_points` shows the same.

# %%
NEW_IMAGE = ""  # a file; "" takes one of val/

image = read_image(pathlib.Path(NEW_IMAGE or files[0]))
ipython.display(Image.fromarray(image).resize((192, 192)))
print(classifier.describe(classifier(image)))

# %% [markdown]
# ## Save the model
#
# This writes the model with the names of its classes, without the optimizer state. `dat_jax.load`, `inference.load` and the
# tools read the folder. Save it to a mounted drive: the disk of a Colab machine is deleted after the session.

# %%
import dat_jax

exported = pathlib.Path(SAVE_TO or f"{WORKDIR}/export")
if exported.exists():
    print(f"{exported} exists already; set SAVE_TO to another folder.")
else:
    dat_jax.export_model(
        exported,
        model=classifier.model,
        variables=classifier.variables,
        classes=names,
        options={name: classifier.options[name] for name in ("image_size", "resize")},
    )
    restored = inference.load(exported)
    print(f"{exported} predicts {restored.describe(restored(image))}")
