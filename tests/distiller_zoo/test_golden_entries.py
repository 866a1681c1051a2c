"""Entries of losses that the golden file may hold are checked, and spoilt ones noticed."""

import copy

import numpy
import pytest

from tests import golden_losses
from tests.distiller_zoo.plain import (
    plain_correlation,
    plain_nst,
    plain_pkt,
    plain_rkd,
    plain_similarity,
)
from tests.golden_entry import entry_of
from tests.golden_format import Mismatch, fill
from tests.golden_maps import CHECKS


def changed(entry, part):
    """The same entry with another last number in one of its parts."""
    entry = copy.deepcopy(entry)
    if part == "values":
        entry[part][-1] *= 1 + 1e-6
    elif part == "module_state_dict":
        entry[part][0][1][0] += 1
    else:
        key = max(entry[part], key=lambda name: numpy.abs(entry[part][name]).max())
        entry[part][key] = (numpy.array(entry[part][key]) * (1 + 1e-6)).tolist()
    return entry


def linear_embed_entry():
    names = [f"embed_{side}.linear.{part}" for side in "st" for part in ("weight", "bias")]
    shapes = [shape for width in (12, 20) for shape in ((7, width), (7,))]
    filled = {name: fill(name, shape).double().requires_grad_() for name, shape in zip(names, shapes, strict=True)}

    def plain(student, teacher):
        embedded = [
            vectors @ filled[f"embed_{side}.linear.weight"].T + filled[f"embed_{side}.linear.bias"]
            for side, (vectors,) in (("s", student), ("t", teacher))
        ]
        return [plain_correlation(*embedded)]

    return entry_of({"q_s": (6, 12), "p_t": (6, 20)}, plain, filled)


def pairwise(plain):
    return lambda student, teacher: [plain(s, t) for s, t in zip(student, teacher, strict=True)]


MAPS = {"f1_s": (3, 4, 6, 6), "f2_s": (3, 9, 2, 2), "f1_t": (3, 5, 6, 6), "f2_t": (3, 8, 2, 2)}


VECTORS = {"q_s": (6, 9), "p_t": (6, 14)}


@pytest.mark.parametrize(
    ("losses", "case", "entry"),
    [
        (("NSTLoss", "NST"), "f1f2", lambda: entry_of(MAPS, pairwise(plain_nst))),
        (("Similarity",), "f1f2", lambda: entry_of(MAPS, pairwise(plain_similarity))),
        (("RKDLoss", "RKD"), "9_14", lambda: entry_of(VECTORS, pairwise(plain_rkd))),
        (("PKT",), "9_14", lambda: entry_of(VECTORS, pairwise(plain_pkt))),
        (
            ("Correlation",),
            "direct",
            lambda: entry_of(dict.fromkeys(("p_s", "p_t"), (6, 9)), pairwise(plain_correlation)),
        ),
        (("Correlation",), "linear_embed", linear_embed_entry),
    ],
    ids=lambda value: str(value) if isinstance(value, (str, tuple)) else "",
)
def test_entries_that_the_golden_file_may_hold_are_checked(losses, case, entry, monkeypatch):
    monkeypatch.setattr(golden_losses, "CHECKS", golden_losses.CHECKS | CHECKS)
    content = entry()
    for loss in losses:
        golden_losses.check_loss(loss, case, "3", content, {})
        parts = ["values", "grad_norm_student", *(part for part in ("grad_norm_params",) if part in content)]
        for part in parts:
            with pytest.raises(Mismatch):
                golden_losses.check_loss(loss, case, "3", changed(content, part), {})
        with pytest.raises(Mismatch, match="nothing checks"):
            golden_losses.check_loss(loss, case, "3", content | {"unheard_of": 1}, {})
