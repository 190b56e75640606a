"""Reader of Python configurations: merging as in MMCV, and errors with the line of unsupported statements."""

import json
import textwrap
import time

import jax
import numpy as np
import pytest

from dat_jax.conversion import detectors, read_python_config, segmentors
from dat_jax.errors import UserError
from dat_jax.models.registry import create_detector, create_model, create_segmentor
from tests.helpers.golden_files import read_keys
from tests.helpers.published_configs import FILES, file_of, make_config

HEADS = {
    **{"semfpn": "sem_fpn", "upernet": "upernet", "retinanet": "retinanet"},
    **{"maskrcnn": "mask_rcnn", "cascade": "cascade_mask_rcnn"},
}


def write(folder, **files):
    """Write files, each by its name without .py, and return the path of the last one."""
    for name, text in files.items():
        path = folder / f"{name}.py"
        path.write_text(textwrap.dedent(text))
    return path


def refused(path, message):
    with pytest.raises(UserError, match=message) as info:
        read_python_config(path)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 1000
    return str(info.value)


@pytest.mark.parametrize("name", FILES)
def test_published_files_equal_the_mappings_and_the_registered_models(name):
    config, (kind, size) = read_python_config(file_of(name)), name.split("_")
    assert config == make_config(name)
    assert json.loads(json.dumps(config)) is not None  # of plain values
    dat = create_model(f"dat_pp_{size}", drop_path_rate=FILES[name][1])
    if kind in ("semfpn", "upernet"):
        model = segmentors.segmentor_from_official(config)
        unused = {"auxiliary_channels": 0} if kind == "semfpn" else {}
        assert model == create_segmentor(HEADS[kind], backbone=dat, **unused)
    else:
        assert detectors.detector_from_official(config) == create_detector(HEADS[kind], backbone=dat)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cascade_tiny", "maskrcnn_tiny", "retinanet_tiny", "semfpn_tiny", "upernet_tiny"])
def test_model_of_a_published_file_has_the_recorded_names_and_shapes(name):
    """Other sizes need no test: their models are the registered ones, whose names and shapes other tests compare."""
    config, (_, recorded) = read_python_config(file_of(name)), read_keys(name)
    if config["type"] == "EncoderDecoder":
        shapes = segmentors.segmentor_shapes(segmentors.segmentor_from_official(config))
    else:
        shapes = detectors.detector_shapes(detectors.detector_from_official(config))
    assert shapes == {key: shape for key, shape in recorded.items() if not key.endswith("num_batches_tracked")}


def test_literals_names_arithmetic_and_concatenation(tmp_path):
    path = write(
        tmp_path,
        config="""
            '''Docstring.'''
            import os
            width = 2 * (3 + 1)
            common = dict(a=None, b=True)
            sides: list = [1, -2] + [3]
            model = dict(
                common, e=1e-3, width=width, half=width / 2, third=7 // 3, rest=7 % 3, power=2**10,
                sides=sides * 2, pair=(1,) + (2,), text='a' + "b", **{'c d': {1: 2}}, nested=[dict(x=[])], plain=f"f",
            )
            work_dir = os.path.join('runs', os.environ.get('NAME', 'x'))
            steps = [int(width * k) for k in range(3)]
            """,
    )
    assert read_python_config(path) == {
        **{"a": None, "b": True, "e": 1e-3, "width": 8, "half": 4.0, "third": 2, "rest": 1, "power": 1024},
        **{"sides": [1, -2, 3, 1, -2, 3], "pair": (1, 2), "text": "ab", "c d": {1: 2}, "nested": [{"x": []}]},
        "plain": "f",
    }


def test_bases_merge_as_mmcv_merges_them(tmp_path):
    path = write(
        tmp_path,
        first="model = dict(a=dict(x=1, y=[1, 2], z=dict(p=1)), b=dict(q=1), c=dict(r=1), d=1)\nwidth = dict(n=7)",
        second="_base_ = 'third.py'\nother = dict(k=2)",
        third="runtime = 1\nother = dict(k=1, l=1)",
        config="""
            _base_ = ['first.py', './second.py']
            model = dict(
                a=dict(y=[3], z=dict(s=2)), b=dict(_delete_=True, t=dict(_delete_=True, u=1)), e=dict(_delete_=True, v=1),
                f={{_base_.width.n}}, g=_base_.other, d='text')
            """,
    )
    assert read_python_config(path) == {
        **{"a": {"x": 1, "y": [3], "z": {"p": 1, "s": 2}}, "b": {"t": {"u": 1}}, "c": {"r": 1}, "d": "text"},
        **{"e": {"v": 1}, "f": 7, "g": {"k": 2, "l": 1}},
    }


def test_base_may_define_the_whole_model(tmp_path):
    assert read_python_config(write(tmp_path, a="model = dict(x=1)", b="_base_ = 'a.py'")) == {"x": 1}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import os\nmodel = dict(x=os.getcwd())", r"c\.py:2: expected a literal, got a call of os\.getcwd"),
        (
            "import os\n\nname = os.environ['X']\nmodel = dict(\n  x=name)",
            r"c\.py:3: expected a literal.*, and model depends on it",
        ),
        (
            "model = dict(x=[i for i in range(3)])",
            ":1: expected a literal, got a comprehension, and model depends on it",
        ),
        ("model = dict(\n  x=f'{1}')", r"c\.py:2: expected a literal, got an f-string with an expression"),
        ("model = dict(x=1 if True else 2)", ":1: expected a literal, got a conditional expression"),
        ("model = dict(x=lambda: 1)", ":1: expected a literal, got Python's Lambda"),
        ("model = dict(x={1, 2})", ":1: expected a literal, got Python's Set"),
        ("model = dict(x=b'')", ":1: expected a number, a string, True, False or None, got bytes"),
        ("model = dict(x=1j)", ":1: expected a number, a string, True, False or None, got complex"),
        ("model = dict(x=...)", ":1: expected a number, .*, got ellipsis"),
        ("model = dict(x='{{ fileDirname }}/a')", r":1: strings with \{\{ \}\} are not supported"),
        ("model = dict(x=unknown)", ":1: the name unknown is not assigned before"),
        ("model = dict(x=_base_.a)", ":1: the base files have no literal value _base_.a"),
        ("model = dict([('a', 1)])", ":1: expected a dict, got list"),
        ("model = dict(**dict(a=1), **dict(a=2))", r":1: dict\(\.\.\.\) has a twice"),
        (
            "model = dict(x=1)\nif True:\n  model = dict(x=2)",
            r"c\.py:2: expected an assignment .*, got an if statement",
        ),
        ("model = dict(x=1)\nfor i in [1]:\n  pass", ":2: expected an assignment of a literal to a name, got a loop"),
        ("model = dict(x=1)\nmodel['x'] = 2", ":2: expected an .*, got an assignment to a target other than one name"),
        (
            "model = dict(x=1)\nmodel.update(x=2)",
            ":2: expected an assignment of a literal to a name, got an expression",
        ),
        ("a = [1]\nmodel = dict(x=a)\na += [2]", ":3: expected .*, got an augmented assignment"),
        ("model = dict(x=1)\ny = model.pop('x')", ":2: expected a literal, got a call of model.pop"),
        ("model = dict(x=1)\ny = (model := 3)", ":2: expected a literal, got Python's NamedExpr"),
        ("model = dict(x=1)\ny = exec('model = 2')", ":2: expected a literal, got a call of exec"),
        ("model = dict(x=1)\ndef f():\n  pass", ":2: .*got a function"),
        ("model = dict(x=1)\ny = [0 for model['x'] in [2]]", ":2: expected a literal, got a comprehension"),
        ("model = dict(x=1)\ny = [0 for model.x in [2]]", ":2: expected a literal, got a comprehension"),
        ("model = dict(x=1)\nf = model.pop\ny = sorted(['x'], key=f)", ":3: expected a literal, got a call of sorted"),
        ("model = dict(x=1)\ny = max(['model.pop()'], key=exec)", ":2: expected a literal, got a call of max"),
        ("model = dict(x=1)\nf = model.pop\ny = max('x', **{'key': f})", ":3: expected a literal, got a call of max"),
        ("model = dict(x=1)\nlen = model.pop\ny = len('x')", ":2: expected a literal, got Python's Attribute"),
        ("model = dict(x=1)\nf = model.pop\ny = [len('x') for len in [f]]", ":3: expected a literal, got a compre"),
        ("model = dict(x=1)\nf = lambda len: len('x')", ":2: expected a literal, got Python's Lambda"),
        ("g = (len('x') for _ in [0])\nmodel = dict(x=1)", ":1: expected a literal, got a comprehension"),
        ("model = dict(x=1)\ny: model.pop('x') = 1", ":2: an annotation with a call or an assignment cannot be read"),
        ("_base_ = []\n_base_ = []\nmodel = dict(x=1)", ":2: _base_ is assigned a second time"),
        ("from os import *\nmodel = dict()", ":1: an import of all names cannot be read"),
        ("with read_base():\n  from .a import *", ":1: .*got a with statement"),
        ("dict = list\nmodel = dict()", ":1: dict must keep its meaning"),
        ("import model", "expected an assignment of a dict to model, got none"),
        ("optimizer = dict(lr=1)", r"c\.py: expected an assignment of a dict to model, got none"),
        ("model = 3", "expected an assignment of a dict to model, got int"),
        ("print 'model'", r"c\.py:1: not valid Python: Missing parentheses"),
        ("model = dict(\n", r"c\.py:1: not valid Python: '\(' was never closed"),
        ("model = dict(x=1)\n  y = 2", r"c\.py:2: not valid Python: unexpected indent"),
        (
            "_base_ = 'none.py'",
            r"c\.py:1: the base file .*none\.py does not exist; put the configuration into a checkout",
        ),
        ("_base_ = 'c.py'", r"c\.py: _base_ leads back to this file"),
        ("_base_ = '/etc/passwd'", r":1: expected a relative path to a \.py file as _base_, got '/etc/passwd'"),
        ("_base_ = 'mmdet::x.py'", r":1: expected a relative path to a \.py file as _base_, got 'mmdet::x\.py'"),
        ("_base_ = ['a' + '.py']", ":1: expected a path or a list of paths as _base_, written as literals"),
        ("_base_ = [3]", ":1: expected a path or a list of paths"),
        ("model = dict(x=10**10**10)", ":1: an exponent is above 64"),
        ("model = dict(x=2**64)", ":1: an integer has more than 64 bits"),
        ("model = dict(x=0x" + "f" * 5000 + ")", ":1: an integer has more than 64 bits"),
        ("model = dict(x=" + "9" * 5000 + ")", ":1: not valid Python: Exceeds the limit"),
        ("model = dict(x=1 / 0)", ":1: division by zero"),
        ("model = dict(x=1e308**2)", ":1: .*Numerical result out of range"),
        ("model = dict(x=(-8)**0.5)", ":1: expected a real number, got a complex one"),
        ("model = dict(x='a' * 10**9)", ":1: str and int cannot be combined"),
        ("model = dict(x=[1] * 10**9)", ":1: the value is too large"),
        ("model = dict(x=-'a')", ":1: expected the sign of a number"),
        ("model = dict(x=1 << 3)", r":1: expected one of the operators"),
        ("model = dict(x='a' + 1)", ":1: str and int cannot be combined"),
        (
            "x0 = [1]\n" + "".join(f"x{i + 1} = [x{i}, x{i}]\n" for i in range(60)) + "model = dict(x=x60)",
            "65,536 parts",
        ),
        (
            "s0 = 'abcd'\n" + "".join(f"s{i + 1} = s{i} + s{i}\n" for i in range(60)) + "model = dict(x=s60)",
            "too large",
        ),
    ],
)
def test_unsupported_statements_are_refused_with_their_line(text, message, tmp_path):
    path = tmp_path / "c.py"
    path.write_text(text)
    assert str(path) in refused(path, message)


def test_configuration_is_not_run(tmp_path):
    ran = tmp_path / "ran"
    path = write(tmp_path, c=f"model = dict(x=1)\ny = open({str(ran)!r}, 'w')\n")
    refused(path, "c.py:2: expected a literal, got a call of open")
    assert not ran.exists()


def test_values_that_cannot_change_the_model_are_skipped(tmp_path):
    path = write(
        tmp_path,
        c="""
            import os
            model = dict(x=1)
            sides = (1, 2)
            a = sorted(sides, key=lambda side: -side)
            b = sum(int(side) for side in sides)
            c = [os.path.join('a', str(side)) for side in sides]
            d = lambda side: side + 1
            e = model['x']
            f: int = max(sides)
            """,
    )
    assert read_python_config(path) == {"x": 1}


@pytest.mark.parametrize(("flag", "expected"), [("1", {"c": 3}), ("'no'", {"c": 3}), ("0", {"a": 1, "c": 3})])
def test_delete_is_interpreted_by_truth_as_in_mmcv(flag, expected, tmp_path):
    path = write(
        tmp_path, a="model = dict(x=dict(a=1))", c=f"_base_ = 'a.py'\nmodel = dict(x=dict(_delete_={flag}, c=3))"
    )
    assert read_python_config(path) == {"x": expected}


LONG_LIST = "a = [0] * 65535\n"
LONG_DICT = f"a = dict({', '.join(f'k{i}=0' for i in range(9000))})\n"
MOST_VALUES = "the configuration has more than 1,048,576 values"


@pytest.mark.parametrize(
    ("start", "statement"),
    [
        (LONG_LIST, "b = [a]"),
        (LONG_LIST, "b{} = a * 1"),
        (LONG_LIST, "b{} = a + a * 0"),
        (LONG_DICT, "b = [a]"),
        (LONG_DICT, "b{} = dict(a)"),
        (LONG_DICT, "b{} = dict(**a)"),
        (LONG_DICT, "b{} = {{**a}}"),
    ],
)
def test_total_number_of_values_is_limited(start, statement, tmp_path):
    path = tmp_path / "c.py"
    path.write_text(start + "".join(statement.format(i) + "\n" for i in range(5000)) + "model = dict(x=1)")
    before = time.process_time()
    refused(path, rf"c\.py:\d+: {MOST_VALUES}")
    assert time.process_time() - before < 5


def test_values_of_one_expression_strings_and_merged_files_are_limited(tmp_path):
    refused(
        write(tmp_path, c="a = [0] * 65000\nx = [" + "a * 1, " * 5000 + "]\nmodel = {}"), rf"c\.py:2: {MOST_VALUES}"
    )
    strings = "s = 'abcdefghabcdefgh'\n" + "s = s + s\n" * 11 + "".join(f"s{i} = s + s\n" for i in range(5000))
    refused(write(tmp_path, c=strings + "model = {}"), rf"c\.py:\d+: {MOST_VALUES}")
    names = "".join(f"b{i} = a\n" for i in range(5000))
    refused(write(tmp_path, c=LONG_DICT + names + "model = {}"), rf"c\.py: {MOST_VALUES}")
    files = {f"f{i}": f"x{i} = [0] * 60000" for i in range(20)}
    path = write(tmp_path, **files, c=f"_base_ = {[f'{name}.py' for name in files]}\nmodel = {{}}")
    refused(path, rf"f\d+\.py:1: {MOST_VALUES}")


def test_plain_names_are_not_counted_twice(tmp_path):
    path = write(tmp_path, c=LONG_LIST + "b = a\n" * 20_000 + "model = dict(x=1)")
    before = time.process_time()
    assert read_python_config(path) == {"x": 1}
    assert time.process_time() - before < 10


def test_errors_for_paths_that_cannot_be_opened_are_one_sentence(tmp_path):
    (tmp_path / "loop.py").symlink_to("loop.py")
    refused(tmp_path / "loop.py", r"loop\.py cannot be read: Symlink loop|Too many levels of symbolic links")
    refused(tmp_path / "a\0b.py", r"a\\x00b\.py' cannot be read: (lstat: )?embedded null")
    refused(tmp_path / ("a" * 5000), r"a cannot be read: File name too long")
    for base, message in (
        ("'loop.py'", r"c\.py:1: the base file .*loop\.py (does not exist|cannot be read)"),
        ("'\\0.py'", r"c\.py:1: expected a relative path to a \.py file as _base_, got '\\x00\.py'"),
        ("'a\\nb.py'", r"c\.py:1: expected a relative path to a \.py file as _base_, got 'a\\nb\.py'"),
        ("'\\ud800.py'", r"c\.py:1: expected a relative path to a \.py file as _base_, got"),
        (repr("a" * 300 + ".py"), r"c\.py:1: the base file .*a\.py cannot be read: File name too long"),
        (repr("a" * 5000 + ".py"), r"c\.py:1: the base file .*\.\.\.a+\.py cannot be read: File name too long"),
        (repr(["a.py"] * 101), r"c\.py:1: expected at most 100 paths as _base_, got 101"),
    ):
        refused(write(tmp_path, c=f"_base_ = {base}\nmodel = dict(x=1)"), message)


def test_errors_in_base_files_are_named(tmp_path):
    path = write(tmp_path, a="model = dict(x=1)", b="model = dict(y=1)", c="_base_ = ['a.py', 'b.py']")
    refused(path, r"c\.py:1: both base files .*a\.py and .*b\.py assign model")
    path = write(tmp_path, a="_base_ = 'b.py'", b="_base_ = 'a.py'")
    refused(path, r"a\.py: _base_ leads back to this file|b\.py: _base_ leads back")
    path = write(tmp_path, a="model = dict(x=dict(y=1), z=3)", c="_base_ = 'a.py'\nmodel = dict(z=dict(w=1))")
    refused(
        path, r"c\.py: model\.z is a dict that cannot be merged with the int of the base file; _delete_=True replaces"
    )
    path = write(tmp_path, a="import os\nmodel = dict(x=os.sep)", c="_base_ = 'a.py'\nmodel = dict(z=1)")
    refused(path, r"a\.py:2: expected a literal, got Python's Attribute, and model depends on it")
    files = {f"f{index}": f"_base_ = ['f{index - 1}.py']" for index in range(1, 200)}
    refused(write(tmp_path, f0="model = dict()", **files), r"more than 100 files are chained by _base_")


def test_shared_base_files_are_read_once(tmp_path):
    files = {"a0": "", "b0": ""}
    for index in range(1, 30):  # 2 ** 30 chains of bases
        files |= {f"{name}{index}": f"_base_ = ['a{index - 1}.py', 'b{index - 1}.py']" for name in "ab"}
    assert read_python_config(write(tmp_path, **files, c="_base_ = ['a29.py', 'b29.py']\nmodel = dict(x=1)")) == {
        "x": 1
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model = dict(x=1)\0", "got a file with null bytes"),
        (b"model = dict(x='\xff')", "not valid Python"),
        (b"# coding: no-such-codec\nmodel = dict()", "not valid Python"),
        (b"model = " + b"[" * 5000, "not valid Python|too deeply nested"),
        (b"model = dict(x=" + b"-" * 50000 + b"1)", "not valid Python|too deeply nested"),
        (b"model = dict(x=" + b"1+" * 50000 + b"1)", "not valid Python|too deeply nested"),
        (b"model = dict(x=a" + b".a" * 50000 + b")", "not valid Python|too deeply nested"),
        (b"#" * (1 << 21), "at most 1,048,576 bytes, got 2,097,152"),
    ],
)
def test_errors_for_damaged_and_hostile_files_are_one_sentence(content, message, tmp_path):
    path = tmp_path / "c.py"
    path.write_bytes(content)
    refused(path, message)
    refused(tmp_path / "none.py", r"none\.py cannot be read: No such file")
    refused(tmp_path, "cannot be read: Is a directory")


def test_line_endings_tabs_byte_order_marks_and_escapes(tmp_path):
    path = tmp_path / "c.py"
    for content in (
        b"model = dict(\r\n\tx=1)\r\n",
        b"\xef\xbb\xbfmodel = dict(x=1)",
        b"# coding: latin-1\n# \xe9\nmodel = dict(x=1)",
    ):
        path.write_bytes(content)
        assert read_python_config(path) == {"x": 1}
    path.write_text(r"model = dict(x='\d')")
    assert read_python_config(path) == {"x": r"\d"}


def test_models_with_other_settings_round_trip():
    """Networks with other than the published settings also have published names and layouts."""
    config = make_config("maskrcnn_tiny")
    config["backbone"] |= {"dim_stem": 32, "dims": [32, 64, 128, 192], "heads": [1, 2, 4, 6], "groups": [1, 1, 2, 3]}
    config["backbone"] |= {"stage_spec": [["N"], ["N"], ["N"], ["N"]], "depths": [1, 1, 1, 1]}
    config["neck"] |= {"in_channels": [32, 64, 128, 192]}
    roi = config["roi_head"]
    roi["bbox_roi_extractor"]["roi_layer"]["output_size"] = roi["bbox_head"]["roi_feat_size"] = 5
    roi["bbox_head"] |= {"type": "ConvFCBBoxHead", "num_shared_convs": 1, "num_shared_fcs": 2, "conv_out_channels": 256}
    roi["bbox_head"] |= {"norm_cfg": {"type": "BN"}, "fc_out_channels": 16}
    roi["mask_head"]["num_convs"] = 1
    model = detectors.detector_from_official(config)
    assert (model.box_side, model.box_convs, model.box_layers, model.mask_convs) == (5, 1, None, 1)
    shapes = detectors.detector_shapes(model)
    assert shapes["roi_head.bbox_head.shared_fcs.0.weight"] == (16, 256 * 25)
    assert shapes["roi_head.bbox_head.shared_convs.0.bn.running_mean"] == (256,)
    rng = np.random.default_rng(0)
    state_dict = {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}
    back = detectors.detector_to_official(model, jax.device_get(detectors.detector_variables(model, state_dict)))
    for key, array in state_dict.items():
        np.testing.assert_array_equal(back[key], array, err_msg=key)
