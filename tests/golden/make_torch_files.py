"""Record torch_files.tar.xz: small files that PyTorch, MMEngine, Lightning, timm-like and other programs write.

Run it in an environment of its own, which the tests do not need:

  pip install torch==2.13.0 numpy mmengine==0.10.7 lightning==2.6.6 yacs omegaconf safetensors setuptools
  python tests/golden/make_torch_files.py

Each file of weights F is recorded with the arrays that reading it must give, as F.npz. bfloat16 arrays are stored as
float32 under "NAME:bfloat16". A folder refused/ has files that hold no weights that can be read.
"""

import argparse
import collections
import datetime
import decimal
import enum
import functools
import logging
import pathlib
import random
import tarfile
import tempfile
import uuid
import warnings

import lightning
import numpy as np
import safetensors.torch
import torch
import yacs.config
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from mmengine.model import BaseModel
from mmengine.runner import Runner
from omegaconf import OmegaConf
from torch import nn

OUTPUT = pathlib.Path(__file__).parent / "torch_files.tar.xz"


class Color(enum.Enum):
    """A class that no reader can import."""

    RED = 1


class Meter:
    """Another one, with a state."""

    def __init__(self):
        self.values, self.path = [1.0, 2.0], pathlib.Path("runs/x")


def make_model() -> nn.Module:
    """Six numbers of weights and a buffer, in two layers."""
    torch.manual_seed(0)
    return nn.Sequential(collections.OrderedDict(proj=nn.Linear(2, 2), norm=nn.BatchNorm1d(2)))


def make_every_tensor() -> dict[str, torch.Tensor]:
    """Tensors of every dtype and layout that a state dict may have."""
    torch.manual_seed(1)
    base = torch.randn(4, 6)
    attributed = torch.randn(3)
    attributed.note = "an attribute"
    parameter = nn.Parameter(torch.randn(2, 2))
    parameter.note = "an attribute"
    return {
        **{f"f{8 * d.itemsize}": torch.randn(3, 2).to(d) for d in (torch.float64, torch.float32, torch.float16)},
        "bf16": torch.randn(3, 2).bfloat16(),
        **{
            str(d).split(".")[1]: torch.arange(5).to(d)
            for d in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.bool)
        },
        "transposed": base.T,
        "columns": base[:, 1::2],
        "corner": base[2:, 3:],
        "tied": base,
        "expanded": torch.tensor([1.5]).expand(1),
        "channels_last": torch.randn(2, 3, 2, 2).contiguous(memory_format=torch.channels_last),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "parameter": nn.Parameter(torch.randn(3)),
        "attributed": attributed,
        "attributed_parameter": parameter,
    }


def make_extras() -> dict:
    """What training programs keep beside the weights."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 2)).sum().backward()
    optimizer.step()
    config = yacs.config.CfgNode({"MODEL": {"TYPE": "dat", "DEPTHS": [2, 2]}})
    return {
        "optimizer": optimizer.state_dict(),
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2).state_dict(),
        "config": config,
        "args": argparse.Namespace(lr=0.1, output=pathlib.PurePosixPath("a/b")),
        "date": datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC),
        "containers": [collections.deque([1]), collections.defaultdict(list, a=[1]), {1, 2}, frozenset([3])],
        "more": [functools.partial(max, 1), Color.RED, Meter(), decimal.Decimal("1.5"), uuid.UUID(int=3)],
        "numpy": [np.float64(0.5), np.arange(3), np.array(["a", "b"]), np.random.default_rng(0)],
        "rng": [random.Random, torch.get_rng_state()[:100]],
        "torch": [torch.device("cpu"), torch.float16, torch.Size([1, 2]), Meter],
    }


def write_torch_files(folder: pathlib.Path) -> None:
    """Files of torch.save, with the arrays that they must give."""
    tensors, state = make_every_tensor(), make_model().state_dict()
    average = {name: (0.5 * value).to(value.dtype) for name, value in state.items()}
    write(folder / "zip.pth", tensors, tensors)
    for protocol in (3, 4, 5):
        write(folder / f"zip_protocol{protocol}.bin", {"model": tensors}, tensors, pickle_protocol=protocol)
    legacy = dict(_use_new_zipfile_serialization=False)
    typed = {name: tensor for name, tensor in tensors.items() if name != "uint16"}
    write(folder / "legacy.pth", typed, typed, **legacy)
    write(
        folder / "legacy_protocol4.pth.tar", {"state_dict": typed, **make_extras()}, typed, pickle_protocol=4, **legacy
    )
    write(folder / "extras.pt", {"model": state, **make_extras()}, state)
    write(folder / "legacy_extras.pt", {"model": state, **make_extras()}, state, **legacy)
    timm = {"epoch": 3, "arch": "dat", "state_dict": state, "version": 2, "state_dict_ema": average, "metric": 0.5}
    write(folder / "timm.pth.tar", timm, {"raw": state, "ema": average})
    deepspeed = {"module": state, "buffer_names": ["norm.running_mean"], "optimizer": None, "ds_config": {"a": 1}}
    write(folder / "mp_rank_00_model_states.pt", deepspeed, state)
    wrapped = nn.DataParallel(torch.compile(make_model()))
    write(folder / "wrapped.pth", {"model": wrapped.state_dict()}, state)
    averaged = torch.optim.swa_utils.AveragedModel(make_model())
    write(folder / "averaged.pth", averaged.state_dict(), {"ema": state})
    bf16 = {name: value.bfloat16() for name, value in state.items()}
    write(folder / "bf16.ckpt", {"state_dict": {f"model.{name}": value for name, value in bf16.items()}}, bf16)
    contiguous = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(contiguous, folder / "torch.safetensors")
    write_arrays(folder / "torch.safetensors", contiguous)


def write_refused_files(folder: pathlib.Path) -> None:
    """Files of PyTorch whose weights are not read."""
    folder.mkdir()
    matrix = torch.eye(2)
    torch.save(make_model(), folder / "model.pth")
    torch.save({"model": make_model()}, folder / "model_in_dict.pth", _use_new_zipfile_serialization=False)
    torch.save({"w": torch.quantize_per_tensor(matrix, 0.1, 0, torch.qint8)}, folder / "quantized.pth")
    torch.save({"w": matrix.to_sparse(), "v": matrix}, folder / "sparse.pth")
    torch.save({"w": torch.empty(2, device="meta")}, folder / "meta.pth")
    torch.save({"w": matrix.to(torch.float8_e4m3fn)}, folder / "float8.pth")
    torch.save({"w": matrix.to(torch.complex64)}, folder / "complex.pth")
    torch.save(matrix, folder / "tensor.pth")
    torch.save({"epoch": 1, "arrays": {"w": np.ones(2)}}, folder / "no_tensors.pth")
    torch.jit.trace(make_model().eval(), torch.ones(1, 2)).save(folder / "script.pt")
    safetensors.torch.save_file({"w": matrix.to(torch.float8_e4m3fn)}, folder / "float8.safetensors")


class MMModel(BaseModel):
    """A model that MMEngine trains."""

    def __init__(self):
        super().__init__()
        self.backbone, self.decode_head = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, inputs, data_samples=None, mode="loss"):
        """The loss of a batch."""
        return {"loss": self.decode_head(self.backbone(torch.stack(inputs))).pow(2).sum()}


def write_mmengine_file(folder: pathlib.Path) -> None:
    """A checkpoint of MMEngine's runner with its EMAHook, which swaps the raw and the averaged weights."""
    torch.manual_seed(2)
    with tempfile.TemporaryDirectory() as work_dir:
        data = [{"inputs": torch.ones(2) * i, "data_samples": torch.zeros(1)} for i in range(4)]
        runner = Runner(
            model=MMModel(),
            work_dir=work_dir,
            train_dataloader=dict(dataset=data, batch_size=2, sampler=dict(type="DefaultSampler", shuffle=False)),
            train_cfg=dict(by_epoch=True, max_epochs=2),
            optim_wrapper=dict(optimizer=dict(type="SGD", lr=0.01)),
            param_scheduler=dict(type="LinearLR", start_factor=0.1),
            custom_hooks=[dict(type="EMAHook", momentum=0.3)],
            default_hooks=dict(logger=dict(type="LoggerHook", interval=1)),
            log_level="ERROR",
        )
        runner.train()
        (folder / "mmengine.pth").write_bytes((pathlib.Path(work_dir) / "epoch_2.pth").read_bytes())
    ema_hook = next(hook for hook in runner.hooks if type(hook).__name__ == "EMAHook")
    average = ema_hook.ema_model.module.state_dict()
    write_arrays(folder / "mmengine.pth", {"raw": runner.model.state_dict(), "ema": average})


class LightningModel(lightning.LightningModule):
    """A model that Lightning trains."""

    def __init__(self, config):
        super().__init__()
        self.save_hyperparameters()
        self.model = nn.Linear(2, 2)

    def training_step(self, batch, _):
        """The loss of a batch."""
        return self.model(batch).pow(2).sum()

    def configure_optimizers(self):
        """AdamW with a schedule."""
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.1)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)]


def write_lightning_files(folder: pathlib.Path) -> None:
    """Checkpoints of Lightning, with averaged weights, which it swaps with the raw ones, and without."""
    seen = {}

    class Recorder(lightning.Callback):
        def on_save_checkpoint(self, trainer, module, checkpoint):
            seen["raw"] = {name: value.clone() for name, value in module.model.state_dict().items()}
            for callback in trainer.callbacks:
                if isinstance(callback, EMAWeightAveraging):
                    averaged = callback._average_model.module.model.state_dict()
                    seen["ema"] = {name: value.clone() for name, value in averaged.items()}

    for name, callbacks in (("lightning.ckpt", []), ("lightning_ema.ckpt", [EMAWeightAveraging(decay=0.5)])):
        lightning.seed_everything(3, verbose=False)
        seen.clear()
        with tempfile.TemporaryDirectory() as work_dir:
            saver = ModelCheckpoint(work_dir, filename="x", every_n_train_steps=3, save_top_k=-1)
            options = dict(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
            trainer = lightning.Trainer(max_steps=3, callbacks=[*callbacks, saver, Recorder()], **options)
            model = LightningModel(OmegaConf.create({"dims": [1, 2], "name": "dat"}))
            trainer.fit(model, torch.utils.data.DataLoader(torch.randn(8, 2), batch_size=2))
            (folder / name).write_bytes((pathlib.Path(work_dir) / "x.ckpt").read_bytes())
        write_arrays(folder / name, dict(seen) if "ema" in seen else seen["raw"])


def write(path: pathlib.Path, content, expected, **options) -> None:
    """A file of torch.save and its arrays."""
    torch.save(content, path, **options)
    write_arrays(path, expected)


def write_arrays(path: pathlib.Path, expected) -> None:
    """F.npz; names start with "raw/" or "ema/" if ``expected`` has both."""
    arrays = {}
    for key, value in expected.items():
        items = {f"{key}/{name}": tensor for name, tensor in value.items()} if isinstance(value, dict) else {key: value}
        for name, tensor in items.items():
            half = tensor.dtype == torch.bfloat16
            tensor = (tensor.float() if half else tensor).detach().clone().contiguous()
            arrays[name + ":bfloat16" * half] = tensor.numpy()
    np.savez(f"{path}.npz", **arrays)


def main() -> None:
    """Write all files into one compressed archive."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        write_torch_files(folder)
        write_refused_files(folder / "refused")
        write_mmengine_file(folder)
        write_lightning_files(folder)
        with tarfile.open(OUTPUT, "w:xz", preset=9) as archive:  # one stream, as the files are much alike
            for path in sorted(path for path in folder.rglob("*") if path.is_file()):
                archive.add(path, arcname=str(path.relative_to(folder)))
    print(OUTPUT, OUTPUT.stat().st_size)


if __name__ == "__main__":
    main()
