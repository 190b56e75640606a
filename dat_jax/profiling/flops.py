"""FLOPs of the matrix products and convolutions of a traced program, two per multiply-add."""

import math


def count_product_flops(jaxpr) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, summed over all devices.

    The body of a scan is counted as often as it runs and the body of a while loop once. Of a conditional the most expensive
    branch is counted.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            contracted_size = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * contracted_size
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
        else:
            bodies = [count_product_flops(body) for value in params.values() for body in _bodies(value)]
            if name == "scan":
                total += params["length"] * sum(bodies)
            elif name == "pallas_call":
                total += math.prod(params["grid_mapping"].grid) * sum(bodies)
            else:
                total += max(bodies, default=0.0) if name == "cond" else sum(bodies)
    return total


def _bodies(value) -> list:
    if isinstance(value, tuple | list):
        return [body for item in value for body in _bodies(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []
