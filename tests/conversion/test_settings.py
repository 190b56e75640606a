"""Every key of the published configurations is honored, checked, ignored for a stated reason, or refused by name.

``python -m tests.conversion.test_settings`` prints how many keys and values there are of each kind.
"""

import collections
import copy
import re
import time

import pytest

import dat_jax
from dat_jax.conversion import detector_settings_from_official, segmentor_options_from_official
from dat_jax.conversion.classifier_settings import read_yaml_config, trace_classifier
from dat_jax.conversion.detector_settings import trace_detector
from dat_jax.conversion.detectors import read_detector_options
from dat_jax.conversion.segmentors import trace_segmentor
from dat_jax.conversion.settings import COUNT, RATE, Settings, list_of
from dat_jax.errors import UserError
from dat_jax.tasks.detection.objective import default_settings
from tests.helpers.published_configs import FILES, YAMLS, make_config, make_yaml

NAMES = (*FILES, *YAMLS)
REASONS = {
    "the weights come from the checkpoint that is converted",
    "the weights come from the file that is converted",
    "it saves memory in training and leaves the function unchanged; the attribute remat does the same here",
    "it belongs to a kind of block that no published model contains",
    "it selects learning rates, which are set in the training configuration",
    "the published code accepts it and does not use it",
    "the published code builds the model from MODEL.DAT alone",
    "it only switches debugging output on",
    "it concerns training, which a configuration of this project sets",
    "it concerns how images are stored and loaded",
    "it concerns the output of a run, not the model",
}


def make(name):
    return make_config(name) if name in FILES else make_yaml(name)


def trace(config):
    """(model with its options or settings, use of each key)."""
    if "MODEL" in config:
        *result, uses = trace_classifier(config)
    elif config.get("type") == "EncoderDecoder":
        *result, uses = trace_segmentor(config)
    else:
        *result, uses = trace_detector(config)
    return result, uses


def list_parents(value, path=()):
    """(path, value) of every mapping and list."""
    if isinstance(value, dict | list | tuple):
        yield path, value
        for key, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from list_parents(part, (*path, key))


def list_leaves(value, path=()):
    """(path, value) of every number, string, flag, None and empty container."""
    if isinstance(value, dict) and value:
        for key, part in value.items():
            yield from list_leaves(part, (*path, key))
    elif isinstance(value, list | tuple) and value:
        for index, part in enumerate(value):
            yield from list_leaves(part, (*path, index))
    else:
        yield path, value


def other_values(value):
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1]
    if isinstance(value, float):
        return [value / 2 + 0.01]
    if isinstance(value, str):
        return [value + "X", 7]
    return ["other"] if value is None else [{"more": 1}]


def replace(config, path, value):
    """A copy of a configuration with another value at a path. Other parts are shared with the original."""
    if not path:
        return value
    key, *rest = path
    if isinstance(config, dict):
        return {**config, key: replace(config[key], rest, value)}
    return [replace(part, rest, value) if index == key else part for index, part in enumerate(config)]


def remove(config, path):
    changed = copy.deepcopy(config)
    parent = changed
    for key in path[:-1]:
        parent = parent[key]
    del parent[path[-1]]
    return changed


def dotted(path):
    return ".".join(map(str, path))


def find_use(path, uses):
    """(dotted path, use) of the innermost key on a path that was read."""
    for length in range(len(path), 0, -1):
        if (name := dotted(path[:length])) in uses:
            return name, uses[name]
    raise AssertionError(f"{dotted(path)} was not read")


def attempt(config):
    """(result, "") or (None, message of the ValueError)."""
    try:
        return trace(config)[0], ""
    except ValueError as error:
        return None, str(error)


def classify_change(config, path, value, original, uses):
    """Effect of another value of a leaf: "differs", "refused", or the reason why it is ignored."""
    key, use = find_use(path, uses)
    result, message = attempt(replace(config, path, value))
    if message:
        assert re.search(rf"(^|[ \[']){re.escape(key)}\b", message), f"{key} = {value}: {message}"
        assert "\n" not in message
        assert not use.startswith("ignored"), f"{key}: {message}"
        return "refused"
    if result != original:
        assert use == "honored", key
        return "differs"
    assert use.startswith("ignored: "), f"{key} = {value!r} changes nothing"
    return use


@pytest.mark.parametrize("name", NAMES)
def test_changed_values_differ_are_refused_or_are_ignored_for_a_reason(name):
    config = make(name)
    original, uses = trace(config)
    outcomes = collections.Counter()
    for path, leaf in list_leaves(config):
        for value in other_values(leaf):
            outcomes[classify_change(config, path, value, original, uses).split(":")[0]] += 1
    assert min(outcomes[kind] for kind in ("differs", "refused", "ignored")) > 5
    assert {use.removeprefix("ignored: ") for use in uses.values() if use.startswith("ignored")} <= REASONS


@pytest.mark.parametrize("name", NAMES)
def test_unknown_keys_are_refused_by_name(name):
    config = make(name)
    _, uses = trace(config)
    for path, value in list_parents(config):
        if not isinstance(value, dict) or find_use((*path, "x"), {**uses, dotted((*path, "x")): ""})[1]:
            continue
        if any(uses.get(dotted(path[:length]), "").startswith("ignored") for length in range(1, len(path) + 1)):
            continue
        with pytest.raises(ValueError, match=re.escape(f"['{dotted((*path, 'surprise'))}']")):
            trace(replace(config, path, {**value, "surprise": 1}))


@pytest.mark.parametrize("name", ["cascade_tiny", "maskrcnn_tiny", "retinanet_tiny", "semfpn_tiny", "upernet_tiny"])
def test_missing_keys_have_the_published_default_or_are_named(name):
    config = make(name)
    same = set()
    original, _ = trace(config)
    for path, value in list_parents(config):
        if not isinstance(value, dict) or path[:1] == ("backbone",):
            continue
        for key in value:
            result, message = attempt(remove(config, (*path, key)))
            assert not message or str(key) in message, f"{dotted((*path, key))}: {message}"
            if result == original:
                same.add(key)
    assert same <= {
        *("pretrained", "train_cfg", "test_cfg", "mode", "align_corners", "dropout_ratio", "pool_scales", "act_cfg"),
        *("requires_grad", "loss_weight", "in_channels", "conv_out_channels", "feat_channels", "start_level", "debug"),
        *("sampling_ratio", "target_means", "target_stds", "fc_out_channels", "roi_feat_size", "reg_class_agnostic"),
        *("num_convs", "stacked_convs", "neg_pos_ub", "add_gt_as_proposals", "pos_weight", "min_bbox_size"),
        *("ignore_iof_thr", "match_low_quality", "min_pos_iou"),
    }


def test_published_settings_equal_those_of_the_tasks():
    for name in FILES:
        config = make(name)
        if config["type"] == "EncoderDecoder":
            assert segmentor_options_from_official(config) == {}
        else:
            model, options = read_detector_options(config)
            assert options == {}
            assert detector_settings_from_official(config) == default_settings(model)


def change(name, **values):
    """A configuration with other values at dotted paths; two underscores stand for a dot."""
    config = make(name)
    for path, value in values.items():
        *parents, key = [int(part) if part.isdigit() else part for part in path.split("__")]
        parent = config
        for part in parents:
            parent = parent[part]
        parent[key] = value
    return config


def test_pooling_of_upernet_is_honored():
    (model, _), _ = trace(change("upernet_tiny", decode_head__pool_scales=[1, 2, 4], auxiliary_head__num_convs=2))
    assert (model.pool_sides, model.auxiliary_convs) == ((1, 2, 4), 2)


def test_sliding_windows_of_a_segmentor_become_options():
    config = change("semfpn_tiny", test_cfg={"mode": "slide", "crop_size": (512, 512), "stride": (341, 341)})
    assert segmentor_options_from_official(config) == {"window": 512, "stride": 341}
    config["test_cfg"]["stride"] = (341, 300)
    with pytest.raises(ValueError, match=r"test_cfg.stride: expected a square, got \(341, 300\)"):
        trace(config)


def test_test_settings_of_a_detector_become_options():
    config = change("maskrcnn_tiny", test_cfg__rcnn__score_thr=0.001, test_cfg__rpn__nms_pre=500)
    assert read_detector_options(config)[1] == {"score_threshold": 0.001, "candidates": 500}
    config = change("retinanet_tiny", test_cfg__nms_pre=300, test_cfg__max_per_img=20, test_cfg__nms__iou_threshold=0.6)
    assert read_detector_options(config)[1] == {"candidates": 300, "max_detections": 20, "iou_threshold": 0.6}


def test_box_coders_of_a_cascade_are_honored():
    values = {"roi_head__bbox_head__1__bbox_coder__target_stds": [0.2, 0.2, 0.3, 0.3]}
    (model, settings), _ = trace(change("cascade_tiny", **values))
    assert model.box_stds[1] == settings.stages[1].stds == (0.2, 0.2, 0.3, 0.3)
    assert default_settings(model).stages == settings.stages


def test_anchors_by_scales_equal_those_by_octaves():
    anchors = {"type": "AnchorGenerator", "ratios": [0.5, 1.0, 2.0], "strides": [8, 16, 32, 64, 128]}
    scales = [4 * 2 ** (octave / 3) for octave in range(3)]
    config = change("retinanet_tiny", bbox_head__anchor_generator={**anchors, "scales": scales})
    assert trace(config)[0] == trace(make("retinanet_tiny"))[0]


def test_box_head_types():
    config = make("maskrcnn_tiny")
    config["roi_head"]["bbox_head"] |= {"type": "Shared4Conv1FCBBoxHead", "norm_cfg": {"type": "BN"}}
    (model, _), _ = trace(config)
    assert (model.box_convs, model.box_layers) == (4, 1)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("upernet_tiny", {"decode_head__align_corners": True}, "decode_head.align_corners: expected False, got True"),
        (
            "upernet_tiny",
            {"decode_head__norm_cfg": {"type": "GN", "num_groups": 32}},
            "norm_cfg.type: expected 'BN' or",
        ),
        (
            "upernet_tiny",
            {"decode_head__type": "PSPHead"},
            "decode_head.type: expected one of 'FPNHead', 'UPerHead', got",
        ),
        (
            "upernet_tiny",
            {"decode_head__num_classes": 0},
            "decode_head.num_classes: expected a positive integer, got 0",
        ),
        (
            "upernet_tiny",
            {"backbone__img_sise": 1},
            r"\['backbone.img_sise'\]. 'backbone.img_sise': did you mean 'img_size'",
        ),
        ("upernet_tiny", {"auxiliary_head": [{}, {}]}, r"auxiliary_head: expected a mapping, got \[\{\}, \{\}\]"),
        ("semfpn_tiny", {"auxiliary_head": {"type": "FCNHead"}}, "auxiliary_head: expected None"),
        (
            "semfpn_tiny",
            {"data_preprocessor": {}},
            "data_preprocessor: not supported, .* MMDetection 3 or MMSegmentation 1",
        ),
        (
            "semfpn_tiny",
            {"test_cfg": {"mode": "tiles"}},
            "test_cfg.mode: expected one of 'whole', 'slide', got 'tiles'",
        ),
        ("retinanet_tiny", {"neck__start_level": 0}, "neck.start_level: expected 1, got 0"),
        (
            "retinanet_tiny",
            {"test_cfg__nms": {"type": "soft_nms"}},
            "test_cfg.nms.type: expected 'nms', got 'soft_nms'",
        ),
        (
            "retinanet_tiny",
            {"type": "FasterRCNN"},
            "^type: expected one of 'RetinaNet', 'MaskRCNN', 'CascadeRCNN', got",
        ),
        ("maskrcnn_tiny", {"roi_head__mask_head": None}, "roi_head.mask_head: expected a mapping, got None"),
        (
            "maskrcnn_tiny",
            {"train_cfg__rpn__sampler__num": -1},
            "train_cfg.rpn.sampler.num: expected a positive integer",
        ),
        ("cascade_tiny", {"roi_head__bbox_head": []}, r"roi_head.bbox_head: expected a list of 3 mappings, got \[\]"),
        (
            "cascade_tiny",
            {"roi_head__bbox_head__0__reg_decoded_bbox": False},
            "must agree with .*0.reg_decoded_bbox, False",
        ),
        ("cascade_tiny", {"train_cfg__rcnn__1__sampler__num": 9}, "expected that of train_cfg.rcnn.0.sampler.num, 512"),
        (
            "dat_tiny",
            {"MODEL__DAT__dwc_pes": [True] * 4},
            "dwc_pes: expected False for stage 0, where MODEL.DAT.use_pes is",
        ),
        ("dat_pp_tiny", {"MODEL__DAT__dwc_pes": [True] * 4, "MODEL__DAT__fixed_pes": [True] * 4}, "fixed_pes is True"),
        ("dat_pp_tiny", {"MODEL__DAT__use_pes": [True]}, "use_pes: expected a list of 4 values, each True or False"),
        (
            "dat_pp_tiny",
            {"MODEL__DAT__groups": [0, 1, 1, 1]},
            "groups: expected a list of 4 values, each -1 or a positive",
        ),
        (
            "dat_tiny",
            {"MODEL__DAT__groups": [-1, -1, -1, 6]},
            "DAT.groups: expected a positive integer for stage 2, which",
        ),
        ("dat_tiny", {"MODEL__DAT__strides": [-1, -1, 1, -1]}, "strides: .* for stage 3, which has D blocks, got -1"),
        ("dat_pp_tiny", {"MODEL__DAT__use_cmt_mlps": [True] * 4}, "use_cmt_mlps: expected .*False"),
        (
            "dat_pp_tiny",
            {"MODEL__NUM_CLASSES": 10},
            "MODEL.NUM_CLASSES: expected 1000, got 10. It must agree with MODEL.DAT",
        ),
        ("dat_pp_tiny", {"MODEL__TYPE": "swin"}, "MODEL.TYPE: expected 'dat', got 'swin'"),
        ("dat_pp_tiny", {"BASE": ["other.yaml"]}, "BASE: expected .* Other files are not merged"),
    ],
)
def test_unsupported_values_are_refused_by_name(name, values, message):
    with pytest.raises(ValueError, match=message):
        trace(change(name, **values))


def test_image_sizes_in_a_yaml_file_become_options():
    for values, options in (
        ({}, {"image_size": 224, "resize": 256}),
        ({"MODEL__DAT__img_size": 384}, {"image_size": 384, "resize": 438}),
        ({"DATA__IMG_SIZE": 288}, {"image_size": 288, "resize": 329}),
        ({"TEST": {"CROP": False}}, {"image_size": 224, "resize": 224}),
        ({"DATA__IMG_SIZE": 384, "TEST": {"CROP": True}}, {"image_size": 384, "resize": 438}),
    ):
        assert trace(change("dat_pp_tiny", **values))[0][1] == options


def test_models_of_yaml_files_equal_the_registered_ones():
    for name in YAMLS:
        model, registered = trace(make(name))[0][0], dat_jax.create_model(name)
        unused = {"position_bias", "offset_range_factors", "reduction_ratios", "neighborhood_sizes"} & set(
            () if name.startswith("dat_p") else type(model).__dataclass_fields__
        )
        assert model.clone(**{field: getattr(registered, field) for field in unused}) == registered


def test_errors_for_hostile_values_are_one_short_sentence():
    nested = []
    for _ in range(40):
        nested = [nested, nested]  # 2 ** 40 values
    for value in (nested, {"a": nested}, "x" * 10**6, 10**300, float("nan"), {1: 2}, object()):
        for path in (
            "decode_head__channels",
            "decode_head__in_index",
            "backbone__dims",
            "decode_head__norm_cfg",
            "type",
        ):
            with pytest.raises(ValueError, match=r"^[\w.]+: |Unknown keys") as info:
                trace(change("upernet_tiny", **{path: value}))
            assert len(str(info.value)) < 3000
    with pytest.raises(ValueError, match=r"^Unknown keys") as info:
        trace({**make("upernet_tiny"), **{f"{key}{'x' * 5000}": 1 for key in range(100)}})
    assert len(str(info.value)) < 5000
    with pytest.raises(ValueError, match="The configuration: expected a mapping, got 3"):
        Settings(3)


@pytest.mark.parametrize("name", ["cascade_tiny", "retinanet_tiny", "semfpn_tiny", "upernet_tiny", "dat_pp_base_384"])
def test_values_of_any_type_are_read_or_refused_in_one_sentence(name):
    config = make(name)
    values = [None, "x", [], {}, [[]], float("nan"), float("inf"), -1, 0, 10**400, True, b"x", [None] * 4, {None: 1}]
    paths = {*(path for path, _ in list_parents(config)), *(path for path, _ in list_leaves(config))} - {()}
    for path in paths:
        for value in values:
            _, message = attempt(replace(config, path, value))  # no other exception
            assert "\n" not in message
            assert len(message) < 3000


def test_finish_names_unread_keys():
    settings = Settings({"a": 1, "b": {"c": [1, 2], "d": 0.5, "typo": 1}, "extra": 2})
    assert settings.take("a", COUNT) == 1
    section = settings.section("b")
    assert section.take("c", list_of(COUNT, length=2)) == (1, 2)
    assert section.take("d", RATE) == 0.5
    with pytest.raises(ValueError, match=r"Unknown keys in the published configuration: \['extra', 'b.typo'\]"):
        settings.finish()
    assert settings.uses == {"a": "honored", "b.c": "honored", "b.d": "honored"}


def test_stages_repeated_by_yaml_aliases_are_counted_before_their_blocks(tmp_path):
    row = ", ".join(["D"] * 12_000)
    path = tmp_path / "m.yaml"
    path.write_text(f"A: &a [{row}]\nMODEL:\n  DAT:\n    stage_spec: [{', '.join(['*a'] * 12_000)}]\n")
    start = time.process_time()
    with pytest.raises(
        UserError, match="stage_spec: expected a list of at most 64 values, each a list of at most 1,000 va"
    ):
        read_yaml_config(path)
    assert time.process_time() - start < 20  # mostly of the YAML parser
    for stages in ([["D"]] * 65, [["D"] * 1001]):
        with pytest.raises(ValueError, match="stage_spec: expected a list of at most 64 values"):
            trace(change("dat_tiny", MODEL__DAT__stage_spec=stages))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("2024-13-45", "cannot be read: line 3 has a value that is not a valid timestamp"),
        ("1" * 5000, "cannot be read: line 3 has a value that is not a valid int"),
        ("0b_", "cannot be read: line 3 has a value that is not a valid int"),
        ("!!int x", "cannot be read: line 3 has a value that is not a valid int"),
        ("!!bool maybe", "cannot be read: line 3 has a value that is not a valid bool"),
        ("!!timestamp maybe", "cannot be read: line 3 has a value that is not a valid timestamp"),
        ("[" * 5000, "cannot be read: it is too deeply nested"),
        ("\0", "cannot be read: unacceptable character"),
        ("0x" + "1" * 5000, "MODEL.DAT.img_size: expected a positive integer, got an integer of 19,997 bits"),
        (
            "[0x" + "1" * 5000 + "]",
            r"MODEL.DAT.img_size: expected a positive integer, got \[an integer of 19,997 bits\]",
        ),
        ("224\n    ? 0x" + "1" * 5000 + "\n    : 1", r"Unknown keys .*\['MODEL.DAT.an integer of 19,997 bits'\]"),
    ],
)
def test_errors_for_invalid_yaml_values_name_the_file(value, message, tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(f"MODEL:\n  DAT:\n    img_size: {value}\n    groups: [1, 1, 1, 1]\n    strides: [1, 1, 1, 1]\n")
    with pytest.raises(UserError, match=rf"m\.yaml .*{message}") as info:
        read_yaml_config(path)
    assert "\n" not in str(info.value)
    assert len(str(info.value)) < 1000


def test_errors_for_yaml_paths_that_cannot_be_opened_are_one_sentence(tmp_path):
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe")
    for name, message in (
        ("loop.yaml", r"loop\.yaml cannot be read: Too many levels of symbolic links"),
        ("a\0b.yaml", r"a\\x00b\.yaml' cannot be read: (lstat: )?embedded null"),
        ("a" * 5000, "a cannot be read: File name too long"),
        ("latin.yaml", "latin.yaml cannot be read: 'utf-8' codec"),
        (".", "cannot be read: Is a directory"),
    ):
        with pytest.raises(UserError, match=message) as info:
            read_yaml_config(tmp_path / name)
        assert len(str(info.value)) < 1000


def main():
    """Print a table of keys by use and of changed values by outcome."""
    kinds, outcomes = ("honored", "checked", "ignored"), ("differs", "refused", "ignored")
    columns = "{:16}" + "{:>9}" * 4 + "  | changed:" + "{:>9}" * 3
    print(columns.format("configuration", "keys", *kinds, *outcomes))
    ignored = {}
    for name in NAMES:
        config = make(name)
        original, uses = trace(config)
        keys = collections.Counter(use.split(":")[0] for use in uses.values())
        changes = collections.Counter(
            classify_change(config, path, value, original, uses).split(":")[0]
            for path, leaf in list_leaves(config)
            for value in other_values(leaf)
        )
        print(columns.format(name, len(uses), *map(keys.get, kinds), *map(changes.get, outcomes)))
        for key, use in uses.items():
            if use.startswith("ignored"):
                ignored.setdefault(use.removeprefix("ignored: "), set()).add(re.sub(r"\.\d+\.", ".N.", key))
    for reason, keys in ignored.items():
        print(f"\n{', '.join(sorted(keys))}:\n  {reason}")


if __name__ == "__main__":
    main()
