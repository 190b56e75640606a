"""Keys of the group ``optimizer``: which optimizer, which parameters learn, and how fast."""

from typing import Any

from dat_jax.config.keys import Key

OPTIMIZER: dict[str, Any] = {
    "name": Key(
        str,
        "adamw",
        "The optimizer, of optax. lamb, lion, adafactor, sgd and muon have a group of keys of their own; adamw and "
        "schedule_free_adamw have b1, b2 and eps. muon updates the parameters with two axes, and adamw all others. "
        "schedule_free_adamw evaluates an average of the weights; use it with a constant learning rate after the warm-up "
        "(min_lr equal to base_lr).",
        choices=("adamw", "lamb", "lion", "adafactor", "sgd", "muon", "schedule_free_adamw"),
    ),
    "b1": Key(
        float,
        0.9,
        "adamw, muon: decay of the first moment. schedule_free_adamw: weight of the average in the weights at which "
        "gradients are computed.",
        minimum=0,
        below=1,
    ),
    "b2": Key(float, 0.999, "adamw, schedule_free_adamw, muon: decay of the second moment.", minimum=0, below=1),
    "eps": Key(float, 1e-8, "adamw, schedule_free_adamw, muon: added to the denominator.", minimum=0),
    "weight_decay": Key(
        float,
        0.05,
        "Weight decay. It is decoupled: each step subtracts the learning rate times this number times the parameter. For "
        "sgd it is added to the gradient.",
        minimum=0,
    ),
    "decay_rule": Key(
        str,
        "matrices",
        "Parameters with weight decay; position bias tables have none. matrices: matrices and convolution kernels, as in "
        "the published classifiers. all_but_norms: all but LayerNorm, as in the published segmentors. "
        "all_but_norms_and_bn: all but LayerNorm and BatchNorm, as in the published detectors.",
        choices=("matrices", "all_but_norms", "all_but_norms_and_bn"),
    ),
    "clip_norm": Key(float, 5.0, "Largest global norm of the gradient; 0 disables clipping.", minimum=0),
    "freeze": Key(
        tuple,
        (),
        "Parameters that do not learn: backbone, all_but_head (the same), stages.0-1 (with the stem or down-projection before "
        "each stage), or patterns of parameter names, such as '*/conv_offset_*'. They have no gradient and no optimizer state.",
        items=str,
    ),
    "layer_decay": Key(
        float,
        1.0,
        "Layer-wise decay: the learning rate of each block is this factor times that of the next, and the head has the "
        "whole. The stem is the first layer; a down-projection belongs to the block after it.",
        above=0,
        maximum=1,
    ),
    "decay_offsets": Key(bool, True, "Whether the networks that compute the offsets of keys have weight decay."),
    "backbone_factor": Key(float, 1.0, "Factor of the learning rate of all parameters but those of the head.", above=0),
    "offset_factor": Key(
        float, 1.0, "Factor of the learning rate of the networks that compute the offsets of keys.", above=0
    ),
    "lamb": {
        "b1": Key(float, 0.9, "Decay of the first moment.", minimum=0, below=1),
        "b2": Key(float, 0.999, "Decay of the second moment.", minimum=0, below=1),
        "eps": Key(float, 1e-6, "Added to the denominator.", minimum=0),
    },
    "lion": {
        "b1": Key(float, 0.9, "Weight of the momentum in the direction of a step.", minimum=0, below=1),
        "b2": Key(float, 0.99, "Decay of the momentum.", minimum=0, below=1),
    },
    "adafactor": {
        "decay_rate": Key(float, 0.8, "Exponent of the decay of the second moment: 1 - step ** -rate.", minimum=0),
        "momentum": Key(float, 0.0, "Decay of the first moment; 0 keeps none.", minimum=0, below=1),
        "min_side": Key(
            int, 128, "Parameters with two sides of at least this length keep sums of rows and columns only.", minimum=1
        ),
        "scale_by_parameter": Key(bool, False, "Multiply each update by the root mean square of its parameter."),
        "clip_rms": Key(
            float, 1.0, "Largest root mean square of the update of a parameter; 0 disables clipping.", minimum=0
        ),
        "eps": Key(float, 1e-30, "Added to the squares of the gradient.", minimum=0),
    },
    "sgd": {
        "momentum": Key(float, 0.9, "Decay of the momentum.", minimum=0, below=1),
        "nesterov": Key(bool, True, "Nesterov's momentum."),
    },
    "muon": {
        "momentum": Key(float, 0.95, "Decay of the momentum, which is Nesterov's.", minimum=0, below=1),
        "steps": Key(int, 5, "Newton-Schulz iterations that make the momentum orthogonal.", minimum=1),
        "update_rms": Key(
            float,
            0.2,
            "Root mean square of an update at a learning rate of 1. With 0.2, that of adamw, both take the same learning "
            "rate. 0: the update has singular values near 1, times the root of rows to columns where that is above 1.",
            minimum=0,
        ),
    },
}
