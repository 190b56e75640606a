"""Parameters and multiply-adds of every model, with the published ones: python -m experiments.multiply_adds.count

They are counted in the traced program of the plain implementations, for one image. Counted are all convolutions and matrix
products, including both products of attention and those of the windows of neighborhood attention. Norms, GELU, softmax, biases,
and sampling of features and tables are not counted.
"""

import math

import jax
import jax.numpy as jnp
from rich.console import Console
from rich.table import Table

import dat_jax
from dat_jax.profiling.flops import count_product_flops

# Published multiply-adds in billions at this image side: DAT++ (2309.01430), DAT v1 (CVPR 2022).
PUBLISHED = {
    ("dat_pp_tiny", 224): 4.3,
    ("dat_pp_small", 224): 9.4,
    ("dat_pp_base", 224): 16.6,
    ("dat_pp_base_384", 384): 49.7,
    ("dat_tiny", 224): 4.6,
    ("dat_small", 224): 9.0,
    ("dat_base", 224): 15.8,
    ("dat_base_384", 384): 49.8,
    ("dat_p_tiny", 224): None,
    ("dat_pp_nano", 48): None,
}


def count(name: str, side: int) -> tuple[int, int]:
    """Parameters of a model, and its multiply-adds for one image of side x side."""
    model = dat_jax.create_model(name, implementation="plain")
    images = jax.ShapeDtypeStruct((1, side, side, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    flops = count_product_flops(jax.make_jaxpr(model.apply)(variables, images).jaxpr)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])), round(flops / 2)


def main():
    """Print the table."""
    table = Table("model", "image", "parameters", "multiply-adds, G", "published, G")
    for (name, side), published in PUBLISHED.items():
        parameters, counted = count(name, side)
        table.add_row(name, str(side), f"{parameters:,}", f"{counted / 1e9:.2f}", str(published or "-"))
    Console().print(table)


if __name__ == "__main__":
    main()
