# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where deformable attention looks
#
# Attention compares a query with keys. Neighborhood attention takes the keys around it, deformable attention (the D blocks)
# keys at points that the network moves, by offsets that it computes from the image. This notebook shows the points of a
# trained model on an image, and what its features are good for elsewhere.

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
# `TRAINED` is the work directory of a run, such as that of one of the other notebooks, or converted weights
# (`python -m dat_jax.conversion`). Where there is nothing yet, the model of `configs/quickstart.py` is trained on digits first:
# three minutes on two CPU cores.

# %%
import os

TRAINED = "runs/quickstart"
IMAGE = ""  # a file; "": a digit that it was not trained on
QUERY = None  # (y, x) in pixels of the image; None: its centre

small = os.environ.get("DAT_JAX_SMALL") == "1"  # the tests: a few steps of a smaller model
if small:
    TRAINED = os.environ["DAT_JAX_WORKDIR"]

# %%
from configs import quickstart, tiny
from dat_jax.training import loop

if not pathlib.Path(TRAINED).exists():
    loop.train((tiny if small else quickstart).get_config(), TRAINED)

# %% [markdown]
# ## A model and an image
#
# `inference.load` gives a function of images, which resizes them as the model wants it; `dat_jax.load(TRAINED)` gives the bare
# model and its variables.

# %%
from dat_jax import inference
from dat_jax.data.embedded import read_mnist5k
from dat_jax.inference.image_files import read_image

looker = inference.load(TRAINED)
digits, labels, _ = read_mnist5k("validation")
image = read_image(pathlib.Path(IMAGE)) if IMAGE else digits[labels == 5][3]
print(f"stages {looker.model.stages}, an image of {image.shape} is {looker.describe(looker(image))}")

# %% [markdown]
# ## What every block attends to
#
# Of a D block there are the positions of its keys, (groups, keys, 2), as (y, x) in pixels of the image as the network sees it: a
# group of channels has points of its own. `references` is where they would be without offsets. The weights are those of
# every head, query and key; a query is a pixel of the block's map.

# %%
from dat_jax.inference.attention import find_input_point, make_attention_reader

attention = make_attention_reader(looker)(image)
query = find_input_point(looker, image.shape[:2], QUERY)
deformable = {name: block for name, block in attention.blocks.items() if block.kind == "D"}
for name, block in deformable.items():
    print(f"{name}: map {block.map_shape}, positions {block.positions.shape}, weights {block.weights.shape}")

# %%
import IPython.display as ipython

from dat_jax.visualization.attention_figure import save_attention

picture = pathlib.Path(TRAINED) / "attention.png"
save_attention(picture, attention, query=query, blocks=list(deformable))
ipython.display(ipython.Image(str(picture)))

# %% [markdown]
# First the points of every block, from fine maps to coarse ones; a colour is a group, and a large point gets much attention. In a
# trained model points leave the regular grid: some gather along strokes and edges, some spread where nothing is, which
# tells as much. Those in a line at the border were sent further and are clamped there. Blocks of one stage may look at quite
# different places, and groups of one block too. Then the keys that one query, the star, attends to most, which may lie far
# outside the window of neighborhood attention (dashed). Last the offsets, from where a key would be to where it is.
#
# The offsets of an untrained model are as random as its weights: only in a trained one they mean something.
#
# ## The offsets and the query's keys in numbers

# %%
import numpy as np

side = np.array(attention.image.shape[:2])
for name, block in deformable.items():
    moved = np.linalg.norm((block.positions - block.references) / side, axis=-1)
    print(f"{name}: moved by {moved.mean():.1%} of a side in the mean, {moved.max():.1%} at most")

block = deformable[max(deformable)]
for group, key, weight in zip(*block.rank_keys(block.find_query(query), 5), strict=True):
    y, x = block.positions[group, key]
    print(f"  {block.name}: the query gives {weight:.1%} of group {group} to the key at y {y:.1f}, x {x:.1f}")

# %% [markdown]
# ## Other queries
#
# A click on the image chooses the query. The page is one file that needs no network; in a terminal
# `python -m dat_jax.visualize runs/quickstart photo.jpg --output=shown --html` makes it, and the picture above.

# %%
import html

from dat_jax.visualization.attention_page import make_page

page = make_page(attention, title="image", query=query, block=block.name)
frame = f'<iframe srcdoc="{html.escape(page)}" width="100%" height="700"></iframe>'
ipython.display(ipython.HTML(f"<div>{frame}</div>"))

# %% [markdown]
# ## Features for something else
#
# `method="features"` gives the maps of an image, of the published models four at strides 4, 8, 16 and 32. Here the last one,
# averaged over its pixels, is a vector an image, and a linear layer on it learns to tell even digits from odd ones, while the
# backbone stays as it is.

# %%
import jax
import jax.numpy as jnp
import optax

import dat_jax
from dat_jax.tasks.classification import normalize

model, variables = dat_jax.load(TRAINED)


@jax.jit
def embed(images):
    """uint8 (B, H, W, 3) -> (B, C)."""
    return model.apply(variables, normalize(images), method="features")[-1].mean(axis=(1, 2))


resized = np.stack([looker.transform({"image": digit})["image"] for digit in digits])
vectors = jnp.concatenate([embed(batch) for batch in np.split(resized, 10)])
vectors = (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6)
train = np.random.default_rng(0).permutation(len(labels)) < 800  # of 1,000 digits that the backbone was not trained on
targets = labels % 2

# %%
optimizer = optax.adam(1e-2)


def loss(head):
    """Of logistic regression on all training vectors."""
    logits = vectors[train] @ head["w"] + head["b"]
    return optax.sigmoid_binary_cross_entropy(logits, targets[train]).mean()


@jax.jit
def step(head, state):
    updates, state = optimizer.update(jax.grad(loss)(head), state)
    return optax.apply_updates(head, updates), state


head = {"w": jnp.zeros(vectors.shape[1]), "b": jnp.zeros(())}
state = optimizer.init(head)
for _ in range(200):
    head, state = step(head, state)
right = ((vectors @ head["w"] + head["b"]) > 0) == targets
print(f"even or odd, right: {right[train].mean():.1%} of 800 trained on, {right[~train].mean():.1%} of 200 others")
