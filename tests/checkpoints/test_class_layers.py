"""Classes of trained weights in another order, and layers that depend on the classes."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from dat_jax.checkpoints.adaptation import reorder_classes, replace_class_layers

ORDER = (2, 0, 1)  # of three classes


def name_outputs(layer: str) -> list[list[int]]:
    """For each output of a layer, what it belongs to: [class or -1, anchor or number]."""
    return {
        "cls_head": [[k, 0] for k in range(3)],
        "decode_head/classifier/conv_seg": [[k, 0] for k in range(3)],
        "mask_head/conv_logits": [[k, 0] for k in range(3)],
        "bbox_heads_0/fc_cls": [*([k, 0] for k in range(3)), [-1, 0]],  # the last one is the background
        "bbox_heads_0/fc_reg": [[k, number] for k in range(3) for number in range(4)],
        "bbox_head/retina_cls": [[k, anchor] for anchor in range(9) for k in range(3)],
        "bbox_head/retina_reg": [[-1, number] for number in range(36)],
    }[layer]


@pytest.mark.parametrize(
    "layer",
    [
        *("cls_head", "decode_head/classifier/conv_seg", "mask_head/conv_logits", "bbox_heads_0/fc_cls"),
        *("bbox_heads_0/fc_reg", "bbox_head/retina_cls", "bbox_head/retina_reg"),
    ],
)
def test_outputs_follow_their_classes(layer):
    outputs = np.array(name_outputs(layer))
    codes = outputs[:, 0] * 100 + outputs[:, 1]
    params = unflatten_dict({f"{layer}/bias": codes, f"{layer}/kernel": np.stack([codes, -codes])}, sep="/")
    reordered = flatten_dict(reorder_classes(params, ORDER), sep="/")
    old_class = np.append(ORDER, -1)[outputs[:, 0]]
    expected = old_class * 100 + outputs[:, 1]
    np.testing.assert_array_equal(reordered[f"{layer}/bias"], expected)
    np.testing.assert_array_equal(reordered[f"{layer}/kernel"], [expected, -expected])


def test_only_layers_of_classes_are_replaced():
    trained = {"backbone": {"kernel": np.ones(3)}, "cls_head": {"kernel": np.ones((2, 3)), "bias": np.ones(3)}}
    fresh = jax.tree.map(np.zeros_like, trained)
    replaced = replace_class_layers(trained, fresh)
    assert replaced["backbone"]["kernel"].all()
    assert not replaced["cls_head"]["kernel"].any()
    assert not replaced["cls_head"]["bias"].any()
