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
# A folder of images becomes a classifier that says what is in a new one, on a free GPU (in Colab: *Runtime, Change runtime type,
# T4 GPU*). As it stands every cell runs in order on digits that come with a package. It has not run on a GPU yet.

# %% [markdown]
# ## Install
#
# `REPOSITORY` is where dat_jax is: an address that `git clone` takes, or a folder with a copy of it that was uploaded. Nothing
# is installed where this notebook lies in such a copy, whose requirements are there already. Colab's own jax and flax (0.7.2 and
# 0.11.2, or newer) stay as they are.

# %%
import pathlib
import subprocess
import sys

REPOSITORY = ""  # an address, or a folder such as "/content/dat_jax"

here = pathlib.Path.cwd()
root = next((folder for folder in (here, *here.parents) if (folder / "configs" / "common.py").is_file()), None)
if root is None:
    assert REPOSITORY, "Set REPOSITORY to the address of the dat_jax repository, or to a folder with a copy of it."
    root = pathlib.Path(REPOSITORY)
    if not root.is_dir():
        root = here / "dat_jax"
        if not root.is_dir():
            subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, root], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-r", root / "requirements.txt"], check=True)
sys.path.insert(0, str(root))  # configs/ are files of the repository

# %% [markdown]
# ## Settings
#
# `IMAGES` is a folder in one of two layouts:
#
# - `train/<class>/` and `val/<class>/`, each with image files: taken as it is;
# - `<class>/` with image files: a fifth of each class is put aside, at random, to measure with.
#
# `WEIGHTS` is where the training starts: a published `.pth` or `.safetensors` file, or what `python -m dat_jax.conversion` or
# an earlier run has left. With `""` a small model starts from nothing, on 48 x 48 pixels, which is enough for digits and the
# like. For photographs take weights: some dozens of images a class are then enough, from scratch thousands are few.

# %%
import os

IMAGES = ""  # such as "/content/drive/MyDrive/my_images"; "": digits, written as PNG files
WEIGHTS = ""  # such as "/content/drive/MyDrive/dat_pp_tiny.pth"; "": from scratch
MODEL = "dat_pp_tiny"  # the one of the weights
WORKDIR = "runs/finetune"
SAVE_TO = ""  # such as "/content/drive/MyDrive/my_classifier": what is kept at the end
EPOCHS, BATCH_SIZE, DIGITS_A_CLASS = 10, 32, 100

small = os.environ.get("DAT_JAX_SMALL") == "1"  # the tests: a few steps of a smaller model
if small:
    WORKDIR = os.environ["DAT_JAX_WORKDIR"]
    EPOCHS, BATCH_SIZE, DIGITS_A_CLASS = 1, 16, 10

if any("/drive/" in place for place in (IMAGES, WEIGHTS, SAVE_TO)):
    from google.colab import drive

    drive.mount("/content/drive")

# %% [markdown]
# ## The images
#
# Training never sees the images of `val/`: what is measured there is what to expect of new ones, if they are like them.
# Pictures of one thing taken in a row belong into the same half.

# %%
import random
import shutil
import zlib

from PIL import Image

from dat_jax.data.embedded import read_mnist5k


def write_digits(folder):
    """A few of the embedded digits as folder/train/<digit>/*.png and folder/val/<digit>/*.png."""
    for split, name, count in (("train", "train", DIGITS_A_CLASS), ("validation", "val", DIGITS_A_CLASS // 2)):
        images, labels, class_names = read_mnist5k(split)
        for label, class_name in enumerate(class_names):
            place = folder / name / class_name
            place.mkdir(parents=True, exist_ok=True)
            for index, image in enumerate(images[labels == label][:count]):
                Image.fromarray(image).save(place / f"{index}.png")


def split_classes(source, folder):
    """Copies source/<class>/* to folder/train/<class> and, a fifth of each class, to folder/val/<class>."""
    for place in sorted(path for path in source.iterdir() if path.is_dir()):
        files = sorted(path for path in place.iterdir() if path.is_file())
        random.Random(0).shuffle(files)
        count = max(len(files) // 5, 1)
        for name, chosen in (("val", files[:count]), ("train", files[count:])):
            (folder / name / place.name).mkdir(parents=True, exist_ok=True)
            for file in chosen:
                shutil.copy(file, folder / name / place.name)


data = pathlib.Path(WORKDIR) / (f"images_{zlib.crc32(IMAGES.encode())}" if IMAGES else "images")  # a folder for each
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
# Published weights are converted once: their names are checked, and so is that every one has found its place.

# %%
weights = WEIGHTS
if WEIGHTS.endswith((".pth", ".pt", ".safetensors")):
    file, weights = os.path.abspath(WEIGHTS), os.path.abspath(f"{WORKDIR}/weights_{zlib.crc32(WEIGHTS.encode())}")
    if not os.path.isdir(weights):
        subprocess.run([sys.executable, "-m", "dat_jax.conversion", file, weights], check=True, cwd=root)

# %% [markdown]
# ## The configuration
#
# `configs/finetune.py` has the rates for training on from weights, `configs/quickstart.py` those of a small model from scratch.
# A T4 has no arithmetic in bfloat16, which `dtype="auto"` takes on every GPU, and emulates it: float32 is what it wants.
# Batches of 32 images of 224 x 224 should fit into its 15 GiB well: 128 of them in bfloat16 are compiled to 3.3 GiB on an H100.
# `data.workers` are processes that read images, as many as a Colab machine has cores.

# %%
import jax

from configs import finetune, quickstart, tiny

chosen = tiny if small else finetune if weights else quickstart
config = chosen.get_config().unlock()
config.data.name, config.data.directory = "folders", str(data)
config.data.workers = 0 if small else 2
config.init_from = weights
config.epochs, config.steps, config.eval.every_steps = EPOCHS, 0, 0
config.batch_size, config.eval.batch_size = BATCH_SIZE, BATCH_SIZE
config.schedule.warmup_epochs = EPOCHS / 10
if weights:
    config.model.name = MODEL
    config.schedule.reference_batch_size = BATCH_SIZE  # the rate is not made smaller with the batch: the steps are few
if "T4" in jax.devices()[0].device_kind:
    config.model.dtype = "float32"
config = config.lock()

# %% [markdown]
# With weights the recipe mirrors images, crops them and changes colours. Where left and right, or colours, tell the classes
# apart, take that out before training: `config.augmentation.flip_probability = 0.0`,
# `config.augmentation.rand_augment_count = 0`.
#
# ## Train
#
# *Interrupt execution* saves and ends; the same cell goes on from there. `top1` is the percentage of the images in `val/` that
# are named rightly.

# %%
from dat_jax.training import loop

result = loop.train(config, WORKDIR)

# %%
import IPython.display as ipython

ipython.display(ipython.Image(f"{WORKDIR}/curves.png"))
ipython.display(ipython.Image(f"{WORKDIR}/predictions.png"))

# %% [markdown]
# ## What is mixed up
#
# The best checkpoint as a function of images. A row of the matrix is what an image is, a column what the model says. Rows whose
# diagonal is dark are the classes that want more images, or are not to be told apart.

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
    found = classifier.classify([read_image(file) for file in batch], pad_to=BATCH_SIZE)  # one size, compiled once
    for file, probabilities in zip(batch, found, strict=True):
        confusion[names.index(file.parent.name), probabilities.argmax()] += 1

figure, axes = plt.subplots(figsize=(5, 5))
axes.imshow(confusion / confusion.sum(axis=1, keepdims=True), vmin=0, vmax=1)
axes.set(xlabel="said", ylabel="is", xticks=range(len(names)), yticks=range(len(names)))
axes.set_xticklabels(names, rotation=90)
axes.set_yticklabels(names)
plt.show()

mistakes = confusion * (1 - np.eye(len(names), dtype=int))
for place in np.argsort(-mistakes, axis=None)[:3]:
    label, said = np.unravel_index(place, mistakes.shape)
    print(f"{names[label]} taken for {names[said]}: {mistakes[label, said]} times")
print(f"right: {np.trace(confusion)} of {confusion.sum()}")

# %% [markdown]
# ## A new image
#
# Any image will do; it always gets some class of these, whatever it shows. In a terminal
# `python -m dat_jax.predict runs/finetune photos/ --csv=found.csv` does so with a whole folder. Where the model looks is shown
# by `python -m dat_jax.visualize runs/finetune photo.jpg --output=shown --html`, and by the notebook `inspect_points`.

# %%
NEW_IMAGE = ""  # a file; "": one of val/

image = read_image(pathlib.Path(NEW_IMAGE or files[0]))
ipython.display(Image.fromarray(image).resize((192, 192)))
print(classifier.describe(classifier(image)))

# %% [markdown]
# ## Keep it
#
# The model without the optimizer's state, with the names of its classes: a folder that `dat_jax.load`, `inference.load` and the
# tools take. A Colab machine's own disk is gone after the session.

# %%
import dat_jax

exported = pathlib.Path(SAVE_TO or f"{WORKDIR}/export")
if exported.exists():
    print(f"{exported} exists already; name another place.")
else:
    dat_jax.export_model(
        exported,
        model=classifier.model,
        variables=classifier.variables,
        classes=names,
        options={name: classifier.options[name] for name in ("image_size", "resize")},
    )
    again = inference.load(exported)
    print(f"{exported} says {again.describe(again(image))}")
