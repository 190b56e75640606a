# ---
# jupyter:
#   accelerator: TPU
#   colab:
#     gpuType: V5E1
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Pretraining on a Colab TPU
#
# From the images to a trained classifier, and how the same run goes to a pod. As it stands, every cell runs in order: without a
# data set of yours it trains a small DAT++ on digits that come with a package.
#
# In Colab choose *Runtime, Change runtime type, v5e-1 TPU* first. None of this has run on a TPU yet.

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
root = next((folder for folder in (here, *here.parents) if (folder / "configs" / "quickstart.py").is_file()), None)
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
# `DATA` is a folder in one of two layouts: what `python -m dat_jax.data.prepare` or TFDS writes (array_record), or
# `train/<class>/` and `val/<class>/` of image files. `CONFIG` is a file of `configs/`; `OVERRIDES` are keys of it, those that
# `--config.KEY=VALUE` sets on a command line. `dat_jax/config/` says what each key means, `dat_jax.list_models("dat_pp*")`
# which models there are.

# %%
import os
import shutil

DATA = ""  # such as "/content/drive/MyDrive/imagenet"; "": the embedded digits
WORKDIR = "runs/pretrain"  # on the mounted drive it outlives the session: "/content/drive/MyDrive/runs/dat_pp_t"
BUCKET = ""  # name of a Google Cloud Storage bucket to mount at /content/bucket
MOUNT_DRIVE = False

if DATA:
    CONFIG = "dat_pp_t"
    OVERRIDES = {"data.directory": DATA, "data.workers": os.cpu_count(), "batch_size": 256, "eval.batch_size": 256}
else:
    CONFIG = "quickstart"
    OVERRIDES = {"epochs": 6}

if os.environ.get("DAT_JAX_SMALL") == "1":  # the tests: a few steps of a smaller model
    CONFIG, OVERRIDES, WORKDIR = "tiny", {"seed": 1}, os.environ["DAT_JAX_WORKDIR"]

# %% [markdown]
# ## Devices
#
# A free Colab TPU is one v5e chip with 16 GiB, a Kaggle or larger one eight chips: the mesh takes them all.

# %%
import jax

print(f"jax {jax.__version__}: {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Mount the data
#
# Drive and a bucket are slow for many small files and good for few large ones: write ImageNet once as array_record, from its two
# archives (`python -m dat_jax.data.prepare --train=ILSVRC2012_img_train.tar --validation=ILSVRC2012_img_val.tar --output=DIR`),
# and copy it to the machine's disk if it fits there. The work directory may lie on either.

# %%
if MOUNT_DRIVE:
    from google.colab import drive

    drive.mount("/content/drive")

INSTALL_GCSFUSE = """
set -e
key=/usr/share/keyrings/cloud.google.asc packages=https://packages.cloud.google.com/apt
curl --silent --show-error --fail --output $key $packages/doc/apt-key.gpg
echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" > /etc/apt/sources.list.d/gcsfuse.list
apt-get -qq update
apt-get -qq install gcsfuse
"""
if BUCKET:
    from google.colab import auth

    auth.authenticate_user()
    if shutil.which("gcsfuse") is None:
        subprocess.run(INSTALL_GCSFUSE, shell=True, check=True)
    os.makedirs("/content/bucket", exist_ok=True)
    subprocess.run(["gcsfuse", "--implicit-dirs", BUCKET, "/content/bucket"], check=True)

# %% [markdown]
# ## The configuration
#
# A configuration is a Python object with every value in sight. What it comes to is known before anything is trained.

# %%
import importlib

from dat_jax.training.run import count_model_flops, describe, make_run

config = importlib.import_module(f"configs.{CONFIG}").get_config().unlock()
config.update_from_flattened_dict(OVERRIDES)
config.lock()

run = make_run(config)
for name, value in describe(run).items():
    print(f"{name:8} {value}")
state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(run.abstract_state))
flops = count_model_flops(run)
print(f"training state {state_bytes / 2**30:.3f} GiB, {flops / 1e9:.3g} GFLOPs an image and step")

# %% [markdown]
# Activations come on top of the training state, and what the compiler needs. `python -m dat_jax.compile_report` compiles a step
# for a chip that is not there and says whether it fits; in `docs/` and the README are its figures for every configuration.
# Where memory is short, `accumulate_steps` splits a batch.
#
# How long: an epoch of ImageNet is 1.28 million images. At 1,000 images/s on a chip, about the most that the memory of a v5e
# allows, 300 epochs are four and a half days, longer than a session lasts. One chip is for short runs and for trying; the
# whole recipe is for a pod, below.

# %% [markdown]
# ## Train
#
# The run leaves checkpoints, `metrics.jsonl` and pictures in `WORKDIR`. *Interrupt execution* saves the next step and ends;
# after that, and in a new session with the same `WORKDIR`, the same cell goes on where it stopped.

# %%
import shlex

from dat_jax.training import loop

flags = shlex.join([f"--config=configs/{CONFIG}.py", *(f"--config.{key}={value}" for key, value in OVERRIDES.items())])
result = loop.train(config, WORKDIR, command_flags=flags)

# %%
from IPython.display import Image, display

display(Image(f"{WORKDIR}/curves.png"))
display(Image(f"{WORKDIR}/sampled_points.png"))

# %% [markdown]
# ## Go on
#
# More epochs of the same run: the state, the data's order and the random numbers are those of a run that was never stopped.
# The learning rate follows the new length.

# %%
with config.unlocked():
    if config.steps:
        config.steps += 2
    else:
        config.epochs += 1
result = loop.train(config, WORKDIR, command_flags=flags)

# %% [markdown]
# ## Evaluate
#
# The best checkpoint on every validation image once. ImageNet's other sets are added by `config.eval.sets`.

# %%
metrics = loop.evaluate(config, WORKDIR)
print(f"top-1 {metrics['top1']:.1f} % of {metrics['examples']} images")

# %% [markdown]
# In a terminal these are:
#
# ```
# python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/pretrain --config.epochs=6
# python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/pretrain --config.epochs=7
# python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/pretrain --mode=eval
# ```
#
# ## The whole recipe on a pod
#
# Every host of a pod slice runs the same command; `--distributed=on` lets jax find the others. The batch is that of all devices
# together, 1,024 in the recipe. The data and the work directory lie where all hosts see them, such as a bucket mounted on each:
#
# ```
# python -m dat_jax.main --distributed=on --config=configs/dat_pp_t.py --workdir=/mnt/bucket/runs/dat_pp_t \
#     --config.data.directory=/mnt/bucket/imagenet
# ```
#
# `docs/launch/tpu_pod.sh` installs on all hosts and runs it there, from your own machine; `docs/many_hosts.md` also has GKE and
# SLURM. Interrupted, the same command goes on, also on a slice of another size. Whether a step fits is known without a pod:
#
# ```
# python -m dat_jax.compile_report --config=configs/dat_pp_t.py --topology=v5e:16x16 --steps=train --config.batch_size=4096
# ```
#
# None of this has run on a pod yet.
