"""FLOPs of a traced program: matrix products and convolutions, two FLOPs a multiply-add."""

import math


def count_product_flops(jaxpr) -> float:
    """FLOPs of the matrix products and convolutions of a jaxpr, over all devices.

    The body of a scan counts as often as it runs and of a conditional the largest branch; a while loop counts once.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * inner
        elif name == "conv_general_dilated":
            kernel = equation.invars[1].aval.shape
            features = kernel[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / features
        else:
            inner = [count_product_flops(body) for value in params.values() for body in _bodies(value)]
            if name == "scan":
                total += params["length"] * sum(inner)
            elif name == "pallas_call":
                total += math.prod(params["grid_mapping"].grid) * sum(inner)
            else:
                total += max(inner, default=0.0) if name == "cond" else sum(inner)
    return total


def _bodies(value) -> list:
    if isinstance(value, tuple | list):
        return [body for item in value for body in _bodies(item)]
    value = getattr(value, "jaxpr", value)
    return [value] if hasattr(value, "eqns") else []
