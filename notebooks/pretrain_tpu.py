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
# This notebook trains a classifier, and shows how to start the same run on a pod. In Colab, first choose *Runtime, Change
# runtime type, v5e-1 TPU*. Without changes, all cells run in order and train a small DAT++ on embedded digits.
#
# **It has not been run on a TPU.**

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
# - `DATA` is a folder in one of two layouts: array_record, as `python -m dat_jax.data.prepare` or TFDS writes it, or
#   `train/<class>/` and `val/<class>/` with image files.
# - `CONFIG` is the name of a file in `configs/`.
# - `OVERRIDES` sets keys of the configuration, like `--config.KEY=VALUE` on a command line. The files of `dat_jax/config/`
#   define all keys. `dat_jax.list_models("dat_pp*")` lists models.

# %%
import os
import shutil

DATA = ""  # such as "/content/drive/MyDrive/imagenet"; "" takes the embedded digits
WORKDIR = "runs/pretrain"  # use a mounted drive to keep it after the session: "/content/drive/MyDrive/runs/dat_pp_t"
BUCKET = ""  # name of a Google Cloud Storage bucket to mount at /content/bucket
MOUNT_DRIVE = False

if DATA:
    CONFIG = "dat_pp_t"
    OVERRIDES = {"data.directory": DATA, "data.workers": os.cpu_count(), "batch_size": 256, "eval.batch_size": 256}
else:
    CONFIG = "quickstart"
    OVERRIDES = {"epochs": 6}

if os.environ.get("DAT_JAX_SMALL") == "1":  # used by the tests: a few steps of a small model
    CONFIG, OVERRIDES, WORKDIR = "tiny", {"seed": 1}, os.environ["DAT_JAX_WORKDIR"]

# %% [markdown]
# ## Devices
#
# A free Colab TPU is one v5e chip with 16 GiB. Kaggle and larger machines have eight chips. The mesh uses all of them.

# %%
import jax

print(f"jax {jax.__version__}: {jax.device_count()} x {jax.devices()[0].device_kind}")

# %% [markdown]
# ## Mount the data
#
# Drive and buckets are slow for many small files and fast for a few large ones. Convert ImageNet once to array_record, from
# its two archives: `python -m dat_jax.data.prepare --train=ILSVRC2012_img_train.tar --validation=ILSVRC2012_img_val.tar
# --output=DIR`. Copy the result to the machine's disk if it fits there. The work directory may be on Drive or in a bucket.

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
# A configuration is a Python object that lists every value. Model, data and cost of the run are known before training.

# %%
import importlib

from dat_jax.training.trainer import Trainer

config = importlib.import_module(f"configs.{CONFIG}").get_config().unlock()
config.update_from_flattened_dict(OVERRIDES)
config.lock()

trainer = Trainer(config)
for name, value in trainer.describe().items():
    print(f"{name:8} {value}")
state_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(trainer.abstract_state))
flops = trainer.count_model_flops()
print(f"training state {state_bytes / 2**30:.3f} GiB, {flops / 1e9:.3g} GFLOPs per image and step")

# %% [markdown]
# **Memory.** Activations and temporaries of the compiler are added to the training state. `python -m dat_jax.compile_report`
# compiles a step for a chip that is not attached and reports whether it fits. `docs/benchmarks.md` has its estimates for
# every configuration. To save memory, split the batch with `accumulate_steps`.
#
# **Time.** An epoch of ImageNet has 1.28 million images. The memory bandwidth of a v5e allows about 1,000 images/s per chip
# at most. At that rate, 300 epochs take four and a half days, which is longer than a session. Use one chip for short runs,
# and a pod for the full recipe (below).

# %% [markdown]
# ## Train
#
# The run writes checkpoints, `metrics.jsonl` and figures into `WORKDIR`. *Interrupt execution* saves the next step and
# stops. Run the cell again to resume, also in a new session with the same `WORKDIR`.

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
# ## Resume for more epochs
#
# The state, the order of the data and the random numbers are the same as in an uninterrupted run. The learning rate follows
# the new length.

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
# This evaluates the best checkpoint on every validation image once. `config.eval.sets` adds other sets, such as ImageNet-V2.

# %%
metrics = loop.evaluate(config, WORKDIR)
print(f"top-1 {metrics['top1']:.1f} % of {metrics['examples']} images")

# %% [markdown]
# The same commands in a terminal:
#
# ```
# python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/pretrain --config.epochs=6
# python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/pretrain --config.epochs=7
# python -m dat_jax.main --config=configs/quickstart.py --workdir=runs/pretrain --mode=eval
# ```
#
# ## The full recipe on a pod
#
# **This has not been run on a pod.** Every host of a pod slice runs the same command. With `--distributed=on`, jax finds the
# other hosts. The batch is the total over all devices, 1,024 in the recipe. Data and work directory must be visible to all
# hosts, for example in a mounted bucket:
#
# ```
# python -m dat_jax.main --distributed=on --config=configs/dat_pp_t.py --workdir=/mnt/bucket/runs/dat_pp_t \
#     --config.data.directory=/mnt/bucket/imagenet
# ```
#
# `docs/launch/tpu_pod.sh` installs the package on all hosts and starts the run, from your own machine. `docs/many_hosts.md`
# also covers GKE and SLURM. Rerun the command to resume, also on a slice of another size. To check without a pod that a step
# fits:
#
# ```
# python -m dat_jax.compile_report --config=configs/dat_pp_t.py --topology=v5e:16x16 --steps=train --config.batch_size=4096
# ```
