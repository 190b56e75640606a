"""Reader of pickles: plain values are read, and hostile pickles run no code and take little time and memory."""

import argparse
import collections
import contextlib
import copyreg
import io
import os
import pickle
import random
import struct
import sys
import time
import tracemalloc

import numpy as np
import pytest

from dat_jax.conversion import pickles, read_weights
from dat_jax.conversion.torch_files import show
from dat_jax.errors import UserError
from tests.helpers import pth_writer as pth


def read(data: bytes):
    return pickles.read_pickle(
        io.BytesIO(data), construct=pickles.Object, load_persistent=lambda pid: ("persistent", pid)
    )


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_values_are_read_as_python_reads_them(protocol):
    shared = ["x"]
    values = [
        *(
            None,
            True,
            False,
            0,
            -1,
            255,
            2**16,
            -(2**31),
            2**70,
            -(2**2100),
            0.5,
            float("inf"),
            "",
            "text",
            "é\n",
            "x" * 300,
        ),
        *((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4), [], [1, [2, [3]]], {}, {"a": {"b": (1,)}, "c": [None]}),
        {str(number): number for number in range(2000)},
        list(range(2000)),
        {"a": shared, "b": shared},
    ]
    for value in values:
        assert read(pickle.dumps(value, protocol=protocol)) == value
    twice = read(pickle.dumps((shared, shared), protocol=protocol))
    assert twice[0] is twice[1]
    if protocol >= 3:
        assert read(pickle.dumps([b"bytes", b"x" * 300], protocol=protocol)) == [b"bytes", b"x" * 300]
    assert read(pickle.dumps(collections.OrderedDict(a=1), protocol=protocol)) == {"a": 1}
    assert read(pickle.dumps(collections.defaultdict(list, a=1), protocol=protocol)) == {"a": 1}


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_objects_are_recorded_and_not_built(protocol):
    value = read(pickle.dumps(argparse.Namespace(a=1), protocol=protocol))
    assert (str(value.maker), value.state) == ("argparse.Namespace", {"a": 1})
    value = read(pickle.dumps(np.float64(0.5), protocol=protocol))
    assert str(value.maker).endswith("multiarray.scalar")
    assert str(value.arguments[0].maker) == "numpy.dtype"


def test_keys_other_than_text_are_dropped():
    assert read(pickle.dumps({1: 2, (3,): 4, "a": 5, None: 6})) == {"a": 5}


def test_stream_is_left_at_the_end_of_the_pickle():
    stream = io.BytesIO(pickle.dumps(1) + pickle.dumps("two") + b"rest")
    options = dict(construct=pickles.Object, load_persistent=lambda pid: pid)
    assert [pickles.read_pickle(stream, **options) for _ in range(2)] == [1, "two"]
    assert stream.read() == b"rest"


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("os", "system"), ("posix", "system"), ("nt", "system"), ("builtins", "eval"), ("__builtin__", "execfile")),
        *(("subprocess", "Popen"), ("torch.hub", "load"), ("torch.serialization", "os.system"), ("runpy", "run_path")),
        *(("ctypes", "CDLL"), ("importlib", "import_module"), ("numpy", "os.popen"), ("sys", "modules")),
    ],
)
def test_functions_that_run_code_are_refused_and_named(module, name):
    with pytest.raises(pickles.CodeError, match=rf"^{module}\.{name}$"):
        pickles.check_global(module, name)


@pytest.mark.parametrize(
    ("module", "name"),
    [
        *(("builtins", "getattr"), ("builtins", "set"), ("collections", "deque"), ("numpy._core.multiarray", "scalar")),
        *(("mmengine.logging.history_buffer", "HistoryBuffer"), ("omegaconf.base", "ContainerMetadata")),
        *(
            ("torch.nn.modules.linear", "Linear"),
            ("__main__", "Config"),
            ("functools", "partial"),
            ("pathlib", "PosixPath"),
        ),
    ],
)
def test_other_classes_and_functions_are_only_recorded(module, name):
    assert str(pickles.check_global(module, name)) == f"{module}.{name}"


def test_number_of_steps_is_limited(monkeypatch):
    monkeypatch.setattr(pickles, "MAX_STEPS", 1000)
    assert read(pickle.dumps(["x"] * 300))
    for data in (b"(" + b"N" * 2000 + b"l.", b"]" + b"(" + b"(K\x01K\x02l" * 300 + b"e."):
        with pytest.raises(pickles.PickleError, match="its pickle has more than 1,000 steps"):
            read(data)
    pairs = b"](" + b"](X\x01\x00\x00\x00aNe" * 100 + b"eq\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 50 + b"."
    with pytest.raises(pickles.PickleError, match="steps"):  # 51 lists of 100 pairs, each of which costs steps
        read(pairs)


# Hostile pickles.

TARGETS = [
    *(("os", "system"), ("posix", "system"), ("builtins", "eval"), ("builtins", "exec"), ("subprocess", "getoutput")),
    *(("builtins", "print"), ("shutil", "copy"), ("webbrowser", "open"), ("pathlib", "Path.touch"), ("numpy", "load")),
    *(
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("torch.hub", "load"),
        ("torch.serialization", "os.system"),
    ),
    *(
        ("builtins", "getattr"),
        ("torch._utils", "_rebuild_tensor_v2"),
        ("collections", "OrderedDict"),
        ("torch", "load"),
    ),
    *(
        ("tests.conversion.test_pickles", "trap"),
        ("copyreg", "_reconstructor"),
        ("numpy.core.multiarray", "_reconstruct"),
    ),
]
WATCHED = (
    "os.",
    "subprocess.",
    "exec",
    "compile",
    "import",
    "pickle.find_class",
    "socket.",
    "ctypes.",
    "shutil.",
    "webbrowser.",
)
EXTENSION = 0x7FFFFFF0
TENSOR = pth.tensor("float32", (6,), key="0", count=6)
events: list[str] | None = None


def trap(*_, **__):
    raise SystemExit("A pickle called a function.")


def watch(event, arguments):
    if events is not None and (event.startswith(WATCHED) or (event == "open" and "w" in str(arguments[1]))):
        events.append(f"{event} {arguments}")


@pytest.fixture(scope="module", autouse=True)
def _hook():
    sys.addaudithook(watch)  # cannot be removed; it does nothing while events is None
    copyreg.add_extension("posix", "system", EXTENSION)
    yield
    copyreg.remove_extension("posix", "system", EXTENSION)


def make_value(rng, depth=0) -> bytes:
    """Opcodes of one random value, sometimes with a call in it."""
    if depth > 4 or rng.random() < 0.4:
        return rng.choice(
            [b"N", b"\x88", pth.integer(rng.randrange(9)), pth.text("x" * rng.randrange(9)), b"]", b"}", b")", TENSOR]
        )
    items = [make_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    kind = rng.choice(["list", "tuple", "mapping", "call"])
    if kind == "mapping":
        return pth.mapping({f"k{index}": item for index, item in enumerate(items)})
    if kind == "call":
        return make_call(rng, items)
    return b"(" + b"".join(items) + (b"l" if kind == "list" else b"t")


def make_call(rng, items=()) -> bytes:
    """Opcodes that call a function in one of the ways that pickles have."""
    module, name = rng.choice(TARGETS)
    target = pth.name(module, name)
    stack_target = pth.text(module) + pth.text(name) + b"\x93"
    command = pth.text(f"touch {SENTINEL}")
    arguments = b"(" + command + b"".join(items) + b"t"
    return rng.choice(
        [
            target + arguments + b"R",
            stack_target + arguments + b"R",
            target + arguments + b"\x81",  # NEWOBJ
            stack_target + arguments + b"}\x92",  # NEWOBJ_EX
            b"(" + target + command + b"o",  # OBJ
            b"(" + command + f"i{module}\n{name}\n".encode(),  # INST
            target + pth.mapping({"__setstate__": target, "__reduce__": command}) + b"b",
            target + b")R" + b"N" + pth.mapping({"__class__": target}) + b"\x86b",
            b"\x84" + struct.pack("<i", EXTENSION) + arguments + b"R",  # EXT4
            b"\x82" + bytes([rng.randrange(1, 256)]) + arguments + b"R",  # EXT1
            pth.name("builtins", "getattr") + b"(" + target + pth.text("__call__") + b"tR" + arguments + b"R",
            pth.name("builtins", "map") + b"(" + target + b"]" + command + b"atR",
            arguments + b"Q",  # a persistent id
            b"(" + pth.text("storage") + target + pth.text("0") + command + pth.integer(6) + b"tQ",
            target + arguments + b"R" + pth.text("k") + command + b"s",  # SETITEM
            target + arguments + b"R" + command + b"a",  # APPEND
        ]
    )


def make_abuse(rng) -> bytes:
    """Opcodes that abuse the stack, the memo, lengths or nesting."""
    huge = rng.choice([2**31, 2**40, 2**62])
    count = rng.choice([1000, 20_000, 50_000])
    return rng.choice(
        [
            b"]" + b"\x85" * count,  # nested tuples
            b"]" * count + b"a" * (count - 1),  # nested lists
            b"}" + pth.text("model") + b"}" * 3 + b"s" * 5,
            b"(" * count + b"t" * count,
            b"}" + b"]" + b"\x85" * count + b"Ns",  # nested tuples as a key, whose hash would recurse
            b"(" * count,
            b"0" * 9,  # POP of nothing
            b"1",  # POP_MARK without a mark
            rng.choice(
                [
                    b"R",
                    b"b",
                    b"s",
                    b"u",
                    b"a",
                    b"e",
                    b"t",
                    b"\x81",
                    b"\x92",
                    b"\x93",
                    b"o",
                    b"Q",
                    b"2",
                    b"\x94",
                    b"\x90",
                ]
            ),
            b"Nr" + struct.pack("<I", 2**32 - 1),  # memo index 4294967295
            b"h\x07",
            b"g99999999999999999999\n",
            b"p-1\nN",
            b"\x8d" + struct.pack("<Q", huge) + b"x",  # BINUNICODE8
            b"\x8e" + struct.pack("<Q", huge) + b"x",  # BINBYTES8
            b"\x96" + struct.pack("<Q", huge) + b"x",  # BYTEARRAY8
            b"X" + struct.pack("<I", 2**32 - 1) + b"x",
            b"\x8b" + struct.pack("<i", 2**31 - 1) + b"x",  # LONG4
            b"\x8b" + struct.pack("<i", -5),
            b"\x95" + struct.pack("<Q", huge) + b"N",  # FRAME
            b"I" + b"9" * 5000 + b"\n",
            b"L" + b"9" * 5000 + b"L\n",
            b"S'" + b"\\x41" * 50 + b"'\n",
            b"F1e999999\n",
            b"X\x02\x00\x00\x00\xff\xfe",  # no UTF-8
            b"c" + b"a" * count + b"\nb\n",
            b"\x97",  # NEXT_BUFFER
            b"\x98",
            b"\x80\xff",
            bytes([rng.choice([0, 7, 127, 255])]),
            b"]q\x00" + b"h\x00a" * 1000,  # a list of itself
            b"}q\x00(" + b"".join(pth.text(key) + b"h\x00" for key in ("model", "state_dict", "ema", "module")) + b"u",
            b"](" + b"](X\x01\x00\x00\x00aNe" * 1000 + b"eq\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 5000,
            b"(" + b"N" * count + b"tq\x00" + b"h\x00Q" * 1000,  # a huge persistent id
            b"X" + struct.pack("<I", count) + b"a." * (count // 2) + b"q\x00" + b"h\x00h\x00\x93" * 1000,
        ]
    )


def make_soup(rng) -> bytes:
    """Random opcodes, cut anywhere."""
    data = b"".join(
        rng.choice([make_value, make_call, make_abuse])(rng)[: rng.randrange(1, 60)]
        for _ in range(rng.randrange(1, 30))
    )
    return bytes(byte if rng.random() > 0.02 else rng.randrange(256) for byte in data)


def make_hostile(seed: int) -> tuple[bytes, str]:
    """Opcodes of the object of a file, and the place of the hostile part in it."""
    rng = random.Random(seed)
    part = rng.choice([make_call, make_call, make_value, make_abuse, make_soup])(rng)
    place = ("whole", "weight", "beside", "in weights", "before", "argument", "key", "after")[seed % 8]
    model = pth.mapping({"w": TENSOR})
    content = {
        "whole": part,
        "weight": pth.mapping({"model": pth.mapping({"w": part})}),
        "beside": pth.mapping({"optimizer": part, "model": model}),
        "in weights": pth.mapping({"model": pth.mapping({"w": TENSOR, "v": part})}),
        "before": part + b"0" + pth.mapping({"model": model}),
        "argument": pth.call("torch._utils", "_rebuild_tensor_v2", part, pth.integer(0), b")", b")"),
        "key": b"}(" + part + b"N" + pth.text("model") + model + b"u",
        "after": pth.mapping({"model": model}) + part + b"0",
    }[place]
    return content, place


SENTINEL = ""


@pytest.mark.parametrize("kind", ["zip", "legacy", "legacy, beside the object"])
def test_hostile_pickles_run_no_code_and_end_quickly(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "SENTINEL", str(tmp_path / "ran"))
    path, outcomes = tmp_path / "w", collections.Counter()
    for content in (pth.mapping({"w": TENSOR}), pth.mapping({"\n": b"N"}), b"", pth.name("os", "system")):
        with contextlib.suppress(UserError):
            read_weights(write(path, content, kind))  # imports the modules that reading needs
    for seed in range(200):
        content, place = make_hostile(seed)
        outcome, seconds, peak = read_outcome(write(path, content, kind))
        outcomes[outcome.split()[0]] += 1
        assert not (tmp_path / "ran").exists(), (seed, place)
        assert seconds < 5, (seed, place, seconds)
        assert peak < 100e6, (seed, place, peak)
    assert outcomes["refused"] > 60, outcomes
    assert outcomes["weights"] > 20, outcomes


def write(path, content, kind):
    """Write a file with a hostile object, or with hostile headers and a harmless object."""
    if kind == "zip":
        pth.write_archive(path, content, {"0": bytes(24)})
    elif kind == "legacy":
        pth.write_legacy(path, content, {"0": np.zeros(6, np.float32)})
    else:
        pth.write_legacy(path, pth.mapping({"w": TENSOR}), {"0": np.zeros(6, np.float32)})
        information = pickle.dumps({"protocol_version": pth.PROTOCOL}, protocol=2)[2:-1]
        start, end = path.read_bytes().split(information[:1] + b"q\x00(X\x10\x00\x00\x00protocol_version", 1)
        path.write_bytes(start + content + b"0N." + end[end.index(b"u.") + 2 :])
    return path


def read_outcome(path) -> tuple[str, float, int]:
    """Outcome of reading a file, its seconds and its peak memory in bytes. Fails if any watched event occurs."""
    global events
    tracemalloc.start()
    started, events = time.perf_counter(), []
    try:
        weights = read_weights(path)
        outcome = f"weights {sorted(weights)}"
        assert all(isinstance(array, np.ndarray) for array in weights.values())
    except UserError as error:
        outcome = f"refused {error}"
    finally:
        observed, events = events, None
        seconds, peak = time.perf_counter() - started, tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if outcome.startswith("refused"):
        assert "\n" not in outcome
        assert outcome.isprintable()
        assert outcome.endswith(".")
        assert len(outcome) < 1000
    assert observed == []
    return outcome, seconds, peak


# A tuple whose text is 2**40 times as long as its opcodes, as each tuple contains the previous one twice (DUP, TUPLE2).
EXPONENTIAL = pth.text("a") + b"2\x86" * 40


@pytest.mark.parametrize(
    "content",
    [
        b"(" + pth.text("module") + EXPONENTIAL + b"tQ",
        b"(" + pth.text("storage") + EXPONENTIAL + pth.text("0") + pth.text("cpu") + pth.integer(6) + b"tQ",
        b"(" + EXPONENTIAL + pth.name("torch", "FloatStorage") + b"tQ",
        EXPONENTIAL,
        pth.mapping({"model": EXPONENTIAL}),
        pth.mapping({"model": b"(" + pth.text("module") + pth.name("a", "B") + EXPONENTIAL + b"tQ"}),
        pth.call("a", "B", EXPONENTIAL),
    ],
)
@pytest.mark.parametrize("kind", ["zip", "legacy", "legacy, beside the object"])
def test_tuples_with_exponentially_long_text_are_not_printed(content, kind, tmp_path):
    _, seconds, peak = read_outcome(write(tmp_path / "w", content, kind))
    assert seconds < 5
    assert peak < 10e6


def test_other_values_are_shown_by_their_type():
    assert show("a\n") == r"a\n"
    assert show(pickles.Global("a", "B")) == "a.B"
    assert show(("x",) * 9) == "tuple"


def test_pythons_unpickler_would_run_the_hostile_pickles(tmp_path):
    """Control: Python's unpickler runs a call and an extension of the generator, and the hook observes both."""
    global events
    for number, target in enumerate((pth.name(os.system.__module__, "system"), b"\x84" + struct.pack("<i", EXTENSION))):
        sentinel = tmp_path / f"ran{number}"
        opcodes = b"\x80\x02" + target + b"(" + pth.text(f"touch {sentinel}") + b"tR."
        events = []
        pickle.loads(opcodes)
        observed, events = events, None
        assert sentinel.exists()
        assert any(event.startswith("os.system") for event in observed)
