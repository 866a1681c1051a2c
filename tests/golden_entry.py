"""Golden entries that are made here from plain formulas: what the golden checks themselves are tested with."""

from tests.golden_format import loss_input

SEED = 3


def entry_of(shapes, plain, parameters=None):
    """A golden entry made from a plain formula of lists of tensors; `parameters`: name -> filled tensor."""
    entry, tensors = {"inputs": {}}, {}
    for tag, shape in shapes.items():
        tensors[tag] = loss_input(SEED, tag, shape, 1.0)
        entry["inputs"][tag] = {
            "shape": list(shape),
            "scale": 1.0,
            "sum": tensors[tag].sum().item(),
            "abs_sum": tensors[tag].abs().sum().item(),
            "first5": tensors[tag].flatten()[:5].tolist(),
            "student": tag.endswith("s"),
        }
        tensors[tag].requires_grad_(tag.endswith("s"))
    student, teacher = ([tensor for tag, tensor in tensors.items() if tag.endswith(side)] for side in "st")
    values = plain(student, teacher)
    sum(values).backward()
    gradients = {tag: tensor.grad for tag, tensor in tensors.items() if tag.endswith("s")}
    entry |= {
        "values": [value.item() for value in values],
        "total": sum(values).item(),
        "grad_norm_student": {tag: gradient.norm().item() for tag, gradient in gradients.items()},
        "grad_first5_student": {tag: gradient.flatten()[:5].tolist() for tag, gradient in gradients.items()},
    }
    if parameters:
        entry["grad_norm_params"] = {name: value.grad.norm().item() for name, value in parameters.items()}
        entry["module_state_dict"] = [[name, list(value.shape)] for name, value in parameters.items()]
    return entry
