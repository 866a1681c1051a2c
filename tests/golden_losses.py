"""Golden checks of the losses: values and gradients, one entry per loss, case and seed."""

import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import numpy
import torch

from crd import ContrastLoss, CRDLoss
from distiller_zoo import DistillKL
from tests import golden_maps, golden_staged
from tests.golden_case import Case, Difference, fill_module
from tests.golden_format import Family, Mismatch, compare, compare_summary, generator


def check_distill_kl(case: Case) -> Difference:
    temperature = float(re.fullmatch(r"T([\d.]+)", case.case)[1])
    return case.check([DistillKL(temperature)(case.inputs["logit_s"], case.inputs["logit_t"])])


def check_crd(case: Case) -> Difference:
    if case.case.startswith("ContrastLoss"):
        scores = torch.exp(case.inputs["contrast_x"]) / 1000
        return case.check([ContrastLoss(1000)(scores)])
    n_data, nce_k, feat_dim, batch = 1000, 32, 128, len(case.inputs["p_s"])
    dims = (case.inputs["p_s"].shape[1], case.inputs["p_t"].shape[1])
    crd = CRDLoss(*dims, n_data, feat_dim, nce_t=case.entry["T_used"], nce_m=0.5).double()
    for side in ("embed_s", "embed_t"):
        fill_module(side, getattr(crd, side))
    bound = 1 / numpy.sqrt(feat_dim / 3)
    for name in ("memory_v1", "memory_v2"):
        sample = generator(f"{case.seed}:crd_{name}").random_sample((n_data, feat_dim))
        getattr(crd.contrast, name).copy_(torch.from_numpy(((2 * sample - 1) * bound).astype(numpy.float32)))
    y = torch.from_numpy(generator(f"{case.seed}:crd_y").permutation(n_data)[:batch])
    index = torch.from_numpy(generator(f"{case.seed}:crd_idx").randint(0, n_data, (batch, nce_k + 1)))
    index[:, 0] = y
    for name, ours in (("y", y), ("contrast_idx", index)):
        if f"CRD|*|{case.seed}|{name}" in case.arrays:
            compare(name, ours, case.arrays[f"CRD|*|{case.seed}|{name}"].tolist())
    inputs = (case.inputs["p_s"], case.inputs["p_t"], y, index)
    with torch.no_grad():
        probe = CRDLoss(*dims, n_data, feat_dim, nce_t=case.entry["T_used"], nce_m=0.5).double()
        probe.load_state_dict(crd.state_dict())
        scores = probe.contrast(probe.embed_s(inputs[0]), probe.embed_t(inputs[1]), y, index)
    for side, ours in zip(("out_s", "out_t"), scores, strict=True):
        compare_summary(side, ours, case.entry[side])
    difference = case.check(list(crd.terms(*inputs)), {"embed_s": crd.embed_s, "embed_t": crd.embed_t})
    compare("Z", [crd.contrast.z_v1, crd.contrast.z_v2], [case.entry["Z_v1"], case.entry["Z_v2"]])
    rows = case.entry["memory_v1_updated_rows_first3"]
    compare("memory_v1 rows", crd.contrast.memory_v1[y][:, : len(rows[0])], rows)
    for name in ("memory_v1", "memory_v2"):
        compare(name, getattr(crd.contrast, name).abs().sum(), case.entry[f"{name}_abs_sum_after"])
    with torch.no_grad():
        compare("second call", crd(*inputs), case.entry["second_call_loss_same_batch_Z_kept_memory_updated"])
    return difference


CHECKS: dict[str, Callable[[Case], Difference]] = {
    "DistillKL": check_distill_kl,
    "CRD": check_crd,
    **golden_maps.CHECKS,
    **golden_staged.CHECKS,
}


def families(content: dict, path: Path) -> Iterator[Family]:
    """One family per loss, case and seed; a loss without a check here is a failure by name."""
    arrays = read_arrays(path)
    for loss, cases in content["losses"].items():
        for case_name, seeds in cases.items():
            for seed, entry in seeds.items():
                name = f"{loss} {case_name} seed {seed}"
                yield name, partial(check_loss, loss, case_name, seed, entry, arrays)


def check_loss(loss: str, case_name: str, seed: str, entry: Mapping, arrays: Mapping) -> Difference:
    """Check one entry of a loss."""
    return check_entry(CHECKS.get(loss), Case, loss, case_name, seed, entry, arrays)


def read_arrays(path: Path) -> Mapping[str, numpy.ndarray]:
    """The arrays next to a golden file, if there are any."""
    arrays = path.with_suffix(".npz")
    return dict(numpy.load(arrays)) if arrays.exists() else {}


def check_entry(check, kind: type[Case], loss: str, case_name: str, seed: str, entry: Mapping, arrays) -> Difference:
    """Run `check` on one entry, of which every key must be read."""
    if check is None:
        raise Mismatch(f"no check for {loss}")
    case = kind(loss, case_name, seed, entry, arrays)
    difference = check(case)
    case.entry.finish("entry")
    prefix = f"{loss}|{case_name}|{seed}|grad|"
    stray = [key for key in arrays if key.startswith(prefix) and key.split("|")[-1] not in case.inputs]
    if stray:
        raise Mismatch(f"nothing checks {', '.join(stray)}")
    return difference
