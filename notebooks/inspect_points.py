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
# The configurations are files of the repository, so it is cloned; nothing happens where this notebook lies in a clone already.

# %%
import pathlib
import subprocess
import sys

REPOSITORY = ""  # the address that `git clone` takes

here = pathlib.Path.cwd()
folders = [here, *here.parents, here / "dat_jax_clone"]
root = next((folder for folder in folders if (folder / "configs" / "common.py").is_file()), None)
if root is None:
    assert REPOSITORY, "Set REPOSITORY to the address of the dat_jax repository."
    root = here / "dat_jax_clone"
    subprocess.run(["git", "clone", "--quiet", "--depth=1", REPOSITORY, root], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-r", root / "requirements.txt"], check=True)
sys.path.insert(0, str(root))

# %% [markdown]
# ## Settings
#
# `TRAINED` is a work directory, or converted weights (`python -m dat_jax.conversion`). Where there is nothing yet, the model of
# `configs/quickstart.py` is trained on digits first: three minutes on two CPU cores.

# %%
import os

TRAINED = "runs/quickstart"
IMAGE = ""  # a file; "": a digit that it was not trained on

small = os.environ.get("DAT_JAX_SMALL") == "1"  # the tests: a few steps of a smaller model
if small:
    TRAINED = os.environ.get("DAT_JAX_WORKDIR", "runs/tiny")

# %%
from configs import quickstart, tiny
from dat_jax.training import loop

if not pathlib.Path(TRAINED).exists():
    loop.train((tiny if small else quickstart).get_config(), TRAINED)

# %% [markdown]
# ## A model and an image
#
# `looker.transform` is what the model sees of an image: resized, and its centre.

# %%
import numpy as np
from PIL import Image

from dat_jax import inference
from dat_jax.data.embedded import read_mnist5k

looker = inference.load(TRAINED)
model, variables = looker.model, looker.variables
digits, labels, _ = read_mnist5k("validation")
image = np.asarray(Image.open(IMAGE).convert("RGB")) if IMAGE else digits[labels == 5][3]
seen = looker.transform({"image": image})["image"]
print(f"stages {model.stages}, image {seen.shape}, said: {looker.describe(looker(image))}")

# %% [markdown]
# ## The points
#
# Every D block sows the positions of its keys, (batch, groups, rows, columns, 2), as (y, x) with -1 and 1 at the centres of the
# first and the last pixel of its map. A group of channels has points of its own.

# %%
import jax

from dat_jax.tasks.classification import normalize
from dat_jax.tasks.positions import name_positions


@jax.jit
def find_points(images):
    """uint8 (B, H, W, 3) -> block -> positions."""
    _, state = model.apply(variables, normalize(images), train=False, mutable=["intermediates"])
    return name_positions(state["intermediates"], model, images.shape[1:3])["positions"]


points = jax.device_get(find_points(seen[None]))
for name, positions in points.items():
    print(name, positions.shape)

# %%
import IPython.display as ipython

from dat_jax import plots

map_shapes = {name: model.map_shape(seen.shape[:2], stage=int(name[7])) for name in points}  # stages_2/blocks_1
picture = pathlib.Path(TRAINED) / "points_of_one_image.png"
plots.save_sampled_points(picture, seen[None], points, map_shapes=map_shapes)
ipython.display(ipython.Image(str(picture)))

# %% [markdown]
# On the left the image, then a panel a block, from fine maps to coarse ones; a colour is a group. In a trained model points
# leave the regular grid: some gather along strokes and edges, some spread where nothing is, which tells as much. Those in a
# line at the border were sent further and are clamped there. Blocks of one stage may look at quite different places, and
# groups of one block too. The offsets of an untrained model are as random as its weights: only in a trained one they mean
# something.
#
# ## The offsets
#
# Offset = position less where the key would sit without one. The arrows of a block, in its first group:

# %%
from matplotlib import pyplot as plt

from dat_jax.ops.deformable_attention import reference_points

name = max(points, key=lambda name: points[name][0, 0].size)  # the most points
positions = points[name][0, 0]
grid = np.asarray(reference_points(positions.shape[:2]))


def to_image(where):
    """Normalised (y, x) of the block's map -> pixels of the image."""
    size, sides = np.array(map_shapes[name]), np.array(seen.shape[:2])
    return ((where + 1) / 2 * (size - 1) + 0.5) / size * sides - 0.5


start, move = to_image(grid), to_image(positions) - to_image(grid)
figure, axes = plt.subplots(figsize=(5, 5))
axes.imshow(seen, alpha=0.6)
axes.quiver(
    start[..., 1], start[..., 0], move[..., 1], move[..., 0], color="C1", angles="xy", scale_units="xy", scale=1
)
axes.set_title(name)
plt.show()
for block, where in points.items():
    lengths = np.linalg.norm(where[0] - reference_points(where.shape[2:4]), axis=-1) / 2
    at_border = (np.abs(where[0]) >= 1).any(axis=-1).mean()
    print(f"{block}: moved by {lengths.mean():.1%} of a side in the mean, {at_border:.0%} of the points at the border")

# %% [markdown]
# ## Features for something else
#
# `method="features"` gives the four maps of an image, strides 4, 8, 16 and 32. Here the last one, averaged over its pixels, is a
# vector an image, and a linear layer on it learns to tell even digits from odd ones, while the backbone stays as it is.

# %%
import jax.numpy as jnp
import optax


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


@jax.jit
def step(head, state):
    """One step of logistic regression on all training vectors."""

    def loss(head):
        logits = vectors[train] @ head["w"] + head["b"]
        return optax.sigmoid_binary_cross_entropy(logits, targets[train]).mean()

    updates, state = optimizer.update(jax.grad(loss)(head), state)
    return optax.apply_updates(head, updates), state


head = {"w": jnp.zeros(vectors.shape[1]), "b": jnp.zeros(())}
state = optimizer.init(head)
for _ in range(200):
    head, state = step(head, state)
right = ((vectors @ head["w"] + head["b"]) > 0) == targets
print(f"even or odd, right: {right[train].mean():.1%} of 800 trained on, {right[~train].mean():.1%} of 200 others")
