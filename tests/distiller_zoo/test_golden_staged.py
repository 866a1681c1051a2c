"""Entries of AB, FT and KDSVD that the golden file may hold are checked, and spoilt ones noticed."""

import copy

import numpy
import pytest
from torch.nn import functional as F

from distiller_zoo.factor import Paraphraser, Translator
from tests import golden_losses
from tests.distiller_zoo.plain import SVD_SHAPES, plain_kdsvd
from tests.golden_entry import entry_of
from tests.golden_format import Mismatch, fill, loss_input


def boundary_entry():
    def plain(student, teacher):
        losses = []
        for weight, s, t in zip((0.25, 0.5, 1.0), student, teacher, strict=True):
            off = (s + 1).square() * ((s > -1) & (t <= 0)) + (s - 1).square() * ((s <= 1) & (t > 0))
            losses.append(weight * off.sum() * 3 / 1000 / len(s))
        return losses

    return entry_of({f"f{i}_{side}": (2, 2 * i, 4, 4) for side in "st" for i in (1, 2, 3)}, plain)


def plain_factor(s, t, p1=2, p2=1):
    s, t = (F.normalize(each.pow(p1).mean(1).flatten(1)) for each in (s, t))
    return (s - t).abs().pow(p2).mean()


def factor_entry(p1, p2):
    shapes = {"f3_s": (2, 6, 4, 4), "f3_t": (2, 8, 4, 4)}
    return entry_of(shapes, lambda s, t: [plain_factor(*s, *t, p1, p2)])


def translator_entry():
    def convolutions(prefix, first, last, with_bn):
        filled, in_channels = {}, first
        for layer, out_channels in ((0, first), (3, last), (6, last)):
            filled[f"{prefix}.{layer}.weight"] = (out_channels, in_channels, 3, 3)
            filled[f"{prefix}.{layer}.bias"] = (out_channels,)
            if with_bn:
                filled |= {f"{prefix}.{layer + 1}.{kind}": (out_channels,) for kind in ("weight", "bias")}
            in_channels = out_channels
        return {name: fill(name, shape).double() for name, shape in filled.items()}

    translator = convolutions("translator.encoder", 6, 4, True)
    paraphraser = convolutions("paraphraser.encoder", 8, 4, False)
    translator = {name: value.requires_grad_() for name, value in translator.items()}
    means = {}

    def plain(student, teacher):
        (x,), (y,) = student, teacher
        for layer in (0, 3, 6):
            weights = [
                translator[f"translator.encoder.{n}.{kind}"] for n in (layer, layer + 1) for kind in ("weight", "bias")
            ]
            x = F.conv2d(x, *weights[:2], padding=1)
            name = f"translator.encoder.{layer + 1}.running_mean"
            means[name] = [(0.9 * fill(name, (x.shape[1],)).double() + 0.1 * x.mean((0, 2, 3))).mean().item()]
            x = F.leaky_relu(F.batch_norm(x, None, None, *weights[2:], True), 0.1)
            weights = [paraphraser[f"paraphraser.encoder.{layer}.{kind}"] for kind in ("weight", "bias")]
            y = F.leaky_relu(F.conv2d(y, *weights, padding=1), 0.1)
        return [plain_factor(x, y)]

    entry = entry_of({"f3_s": (2, 6, 4, 4), "f3_t": (2, 8, 4, 4)}, plain, translator)
    modules = {"translator": Translator((2, 6, 4, 4), (2, 8, 4, 4)), "paraphraser": Paraphraser((2, 8, 4, 4))}
    state = [
        [f"{name}.{key}", list(value.shape)]
        for name, each in modules.items()
        for key, value in each.state_dict().items()
    ]
    # A gradient that is exactly zero in theory (a bias before BatchNorm) is stored as 0.
    norms = {key: value if value > 1e-13 else 0.0 for key, value in entry["grad_norm_params"].items()}
    return entry | {"bn_after": means, "module_state_dict": state, "grad_norm_params": norms}


def singular_entry():
    shapes = {f"f{i}_{side}": shape for side in "st" for i, shape in enumerate(SVD_SHAPES, 1)}
    entry = entry_of(shapes, plain_kdsvd)
    student, teacher = ([loss_input(3, tag, shape) for tag, shape in shapes.items() if tag.endswith(s)] for s in "st")
    one = [([each[i : i + 1] for each in student], [each[i : i + 1] for each in teacher]) for i in range(5)]
    agree = [[value.item() / 5 for value in plain_kdsvd(*sample)] for sample in one]
    differ = [[value.item() / 5 for value in plain_kdsvd(*sample, signs=(1, -1, 1, -1))] for sample in one]
    by_sign = [[[agree[i][pair], differ[i][pair]] for i in range(5)] for pair in range(3)]
    raw = [sum(max(both) for both in each) for each in by_sign]
    return entry | {
        "per_pair_per_sample_contribution_by_relative_sign": by_sign,
        "raw_lapack_sign": {"values": raw, "total": sum(raw)},
    }


ENTRIES = {
    ("ABLoss", "f1f2f3"): boundary_entry,
    ("FactorTransfer", "p1_2_p2_1"): lambda: factor_entry(2, 1),
    ("FactorTransfer", "p1=1,p2=2"): lambda: factor_entry(1, 2),
    ("FactorTransfer", "p12_p22"): lambda: factor_entry(2, 2),
    ("FactorTransfer", "translator_paraphraser"): translator_entry,
    ("KDSVD", "f1f2f3"): singular_entry,
}


@pytest.mark.parametrize("key", ENTRIES, ids="-".join)
def test_entries_that_the_golden_file_may_hold_are_checked(key):
    entry = ENTRIES[key]()
    golden_losses.check_loss(*key, "3", entry, {})
    for part in set(entry) - {"inputs"}:
        with pytest.raises(Mismatch):
            golden_losses.check_loss(*key, "3", changed(entry, part), {})
    with pytest.raises(Mismatch, match="nothing checks"):
        golden_losses.check_loss(*key, "3", entry | {"unheard_of": 1}, {})


def changed(entry, part):
    """The same entry with another number in one of its parts."""
    entry = copy.deepcopy(entry)
    if part == "total":
        entry[part] *= 1 + 1e-6
    elif part == "values":
        entry[part][-1] *= 1 + 1e-6
    elif part == "module_state_dict":
        entry[part][0][1][0] += 1
    elif part == "raw_lapack_sign":
        entry[part]["values"][1] *= 1.01
    elif part == "per_pair_per_sample_contribution_by_relative_sign":
        entry[part][1][2][1] *= 1 + 1e-6
    else:
        key = max(entry[part], key=lambda name: numpy.abs(entry[part][name]).max())
        entry[part][key] = (numpy.array(entry[part][key]) * (1 + 1e-6)).tolist()
    return entry
