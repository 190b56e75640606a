# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where deformable attention samples
#
# Attention compares a query with keys. Neighborhood attention takes the keys around the query. Deformable attention (the D
# blocks) takes keys at points that the network shifts by offsets, which it predicts from the image.
#
# This notebook shows the sampled points of a trained model on an image, and trains a linear layer on the features of the
# model.

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
# `TRAINED` is the work directory of a run, for example of one of the other notebooks, or an export of `python -m
# dat_jax.conversion`. If it does not exist, the model of `configs/quickstart.py` is trained on digits first, which takes
# three minutes on two CPU cores.

# %%
import os

TRAINED = "runs/quickstart"
IMAGE = ""  # a file; "" takes a digit of the validation set
QUERY = None  # (y, x) in pixels of the image; None takes the center

small = os.environ.get("DAT_JAX_SMALL") == "1"  # used by the tests: a few steps of a small model
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
# `inference.load` returns a function of images, which includes the preprocessing. `dat_jax.load(TRAINED)` returns the model
# and its variables.

# %%
from dat_jax import inference
from dat_jax.data.embedded import read_mnist5k
from dat_jax.inference.image_files import read_image

classifier = inference.load(TRAINED)
digits, labels, _ = read_mnist5k("validation")
image = read_image(pathlib.Path(IMAGE)) if IMAGE else digits[labels == 5][3]
print(f"stages {classifier.model.stages}, an image of shape {image.shape} is {classifier.describe(classifier(image))}")

# %% [markdown]
# ## Attention of every block
#
# For a D block, `positions` are its keys, (groups, keys, 2), as (y, x) in pixels of the preprocessed image. Each group of
# channels has its own points. `references` are the positions without offsets. `weights` has one value per head, query and
# key. A query is a pixel of the block's map.

# %%
from dat_jax.inference.attention import find_input_point, make_attention_reader

attention = make_attention_reader(classifier)(image)
query = find_input_point(classifier, image.shape[:2], QUERY)
deformable = {name: block for name, block in attention.blocks.items() if block.kind == "D"}
for name, block in deformable.items():
    print(f"{name}: map {block.map_shape}, positions {block.positions.shape}, weights {block.weights.shape}")

# %%
import IPython.display as ipython

from dat_jax.visualization.attention_figure import save_attention

figure = pathlib.Path(TRAINED) / "attention.png"
save_attention(figure, attention, query=query, blocks=list(deformable))
ipython.display(ipython.Image(str(figure)))

# %% [markdown]
# The figure has three parts:
#
# 1. The sampled points of every block, from fine to coarse maps. Colors are groups, and larger points receive more
#    attention. In a trained model the points leave the regular grid. Some gather along strokes and edges, and some spread
#    over empty regions. Points in a line at the border are clamped there. Blocks of one stage, and groups of one block, may
#    sample different regions.
# 2. The keys with the highest attention of one query, the star. They may lie far outside the window of neighborhood
#    attention (dashed).
# 3. The offsets, from the reference point of a key to its position.
#
# The offsets of an untrained model are random. They are meaningful only in a trained model.
#
# ## Offsets and keys in numbers

# %%
import numpy as np

side = np.array(attention.image.shape[:2])
for name, block in deformable.items():
    offsets = np.linalg.norm((block.positions - block.references) / side, axis=-1)
    print(f"{name}: offsets of {offsets.mean():.1%} of the image side on average, {offsets.max():.1%} at most")

block = deformable[max(deformable)]
for group, key, weight in zip(*block.rank_keys(block.find_query(query), 5), strict=True):
    y, x = block.positions[group, key]
    print(f"  {block.name}: key at y {y:.1f}, x {x:.1f} gets {weight:.1%} of the attention of group {group}")

# %% [markdown]
# ## Other queries
#
# A click on the image selects the query. The page is a single file that needs no network. In a terminal, `python -m
# dat_jax.visualize runs/quickstart photo.jpg --output=shown --html` writes it and the figure above.

# %%
import html

from dat_jax.visualization.attention_page import make_page

page = make_page(attention, title="image", query=query, block=block.name)
frame = f'<iframe srcdoc="{html.escape(page)}" width="100%" height="700"></iframe>'
ipython.display(ipython.HTML(f"<div>{frame}</div>"))

# %% [markdown]
# ## Features for another task
#
# `method="features"` returns the feature maps of an image: four for the published models, at strides 4, 8, 16 and 32.
# Averaging the last map over its pixels gives one vector per image. A linear layer on it learns to distinguish even from odd
# digits, while the backbone is frozen.

# %%
import jax
import jax.numpy as jnp
import optax

import dat_jax
from dat_jax.tasks.preprocessing import normalize

model, variables = dat_jax.load(TRAINED)


@jax.jit
def embed(images):
    """Mean features (B, C) of the last stage, for images uint8 (B, H, W, 3)."""
    return model.apply(variables, normalize(images), method="features")[-1].mean(axis=(1, 2))


resized = np.stack([classifier.transform({"image": digit})["image"] for digit in digits])
vectors = jnp.concatenate([embed(batch) for batch in np.split(resized, 10)])
vectors = (vectors - vectors.mean(0)) / (vectors.std(0) + 1e-6)
train = np.random.default_rng(0).permutation(len(labels)) < 800  # of 1,000 digits of the validation set
targets = labels % 2

# %%
optimizer = optax.adam(1e-2)


def loss(head):
    """Loss of logistic regression over all training vectors."""
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
correct = ((vectors @ head["w"] + head["b"]) > 0) == targets
print(
    f"even or odd: accuracy {correct[train].mean():.1%} on 800 training images, {correct[~train].mean():.1%} on 200 others"
)
