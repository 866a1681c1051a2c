"""Time and memory of losses that are computed in another way than their formula is written, and of the formula.

python scripts/benchmarks/losses.py [--pair resnet32x4:resnet8x4] [--batch_size 64] [--json FILE]

Forward and backward pass, alternating, on random maps of the pair's shapes; both must give the same value.
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch
from torch import Tensor

from crd import CRDLoss
from distiller_zoo import PKT, Attention, NSTLoss, RKDLoss, Similarity
from distiller_zoo.feature_transform import FeatureTransform
from distiller_zoo.kdsvd import KDSVD
from distiller_zoo.maps import middle_maps
from errors import UserError, run_script
from helper.command_line import Parser
from helper.distributed import find_device
from helper.tables.pages import markdown_table
from helper.tables.plan import read_pairs
from models import build_model
from models.backbone import Output
from scripts.benchmarks import plain_losses
from scripts.benchmarks.parts import peak_memory, report, wait_for
from setting import count, file_to_write

IMAGES, CLASSES, SIZE, N, NEGATIVES = 50_000, 100, 32, 8, 16_384


class Case(NamedTuple):
    """One loss in both forms, functions of nothing; `trained` are the tensors that get gradients."""

    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    trained: list[Tensor]
    compare: bool = True  # False where the formula's value depends on signs that the library chooses
    rounding: float = 1e-9  # the difference of the values that float32 may leave, besides a relative one


def make_cases(student: Output, teacher: Output) -> dict[str, Case]:
    """Every case on the outputs of two networks for the same images."""
    s_maps, t_maps = ([each.detach().requires_grad_() for each in middle_maps(output)] for output in (student, teacher))
    (s_vector, t_vector), t_maps = (
        (each.detach() for each in (student.pooled, teacher.pooled)),
        [each.detach() for each in t_maps],
    )
    s_vector.requires_grad_()
    layers = list(zip(s_maps, t_maps, strict=True))
    cases = {
        "attention": Case(
            lambda: sum(Attention()(s_maps, t_maps)),
            lambda: sum(plain_losses.attention(*pair) for pair in layers),
            s_maps,
        ),
        "similarity": Case(
            lambda: sum(Similarity()(s_maps[-1:], t_maps[-1:])), lambda: plain_losses.similarity(*layers[-1]), s_maps
        ),
        "nst": Case(
            lambda: sum(NSTLoss()(s_maps, t_maps)), lambda: sum(plain_losses.nst(*pair) for pair in layers), s_maps
        ),
        "rkd": Case(lambda: RKDLoss()(s_vector, t_vector), lambda: plain_losses.rkd(s_vector, t_vector), [s_vector]),
        "pkt": Case(  # its terms nearly cancel: what float32 rounds in them is an absolute error
            lambda: PKT()(s_vector, t_vector), lambda: plain_losses.pkt(s_vector, t_vector), [s_vector], rounding=3e-8
        ),
        "crd": _contrast(s_vector, t_vector),
        "norm": _transform(s_maps[-1], t_maps[-1]),
    }
    if all(s.shape == t.shape for s, t in layers):
        svd = KDSVD()
        cases["kdsvd"] = Case(
            lambda: sum(svd(s_maps, t_maps)), lambda: plain_losses.kdsvd(s_maps, t_maps), s_maps, compare=False
        )
    return cases


def _transform(s_map: Tensor, t_map: Tensor) -> Case:
    """NORM's transform and loss, second moments against the expanded map."""
    forms = {}
    for form in ("collapsed", "direct"):
        torch.manual_seed(0)
        forms[form] = FeatureTransform(s_map.shape[1], t_map.shape[1], N, form=form).to(s_map.device)

    def plain() -> Tensor:
        expanded = forms["direct"].expand(s_map)
        out = forms["direct"].contract(expanded) + s_map
        return plain_losses.norm(expanded, t_map) + out.square().mean()

    def ours() -> Tensor:
        out, loss = forms["collapsed"](s_map, t_map)
        return loss + out.square().mean()

    return Case(ours, plain, [s_map, *forms["collapsed"].parameters(), *forms["direct"].parameters()])


def _contrast(s_vector: Tensor, t_vector: Tensor) -> Case:
    """CRD with the published number of negatives, both with one set of banks, which both leave updated."""
    device, batch = s_vector.device, len(s_vector)
    criterion = CRDLoss(s_vector.shape[1], t_vector.shape[1], IMAGES).to(device)
    contrast = criterion.contrast
    contrast.z_v1.fill_(1e6), contrast.z_v2.fill_(1e6)
    index = torch.arange(batch, device=device)
    contrast_index = torch.randint(0, IMAGES, (batch, 1 + NEGATIVES), device=device)
    contrast_index[:, 0] = index
    banks = [contrast.memory_v2.clone(), contrast.memory_v1.clone()]

    def plain() -> Tensor:
        embedded = criterion.embed_s(s_vector), criterion.embed_t(t_vector)
        return plain_losses.crd(*embedded, banks, index, contrast_index, (contrast.z_v1, contrast.z_v2))

    return Case(
        lambda: criterion(s_vector, t_vector, index, contrast_index), plain, [s_vector, *criterion.parameters()]
    )


def compare(name: str, case: Case, rounds: int, device: torch.device) -> dict:
    """One record: seconds and peak bytes of both forms."""

    def clear() -> None:
        for tensor in case.trained:
            tensor.grad = None

    def step(form: Callable[[], Tensor]) -> float:
        clear()
        loss = form()
        loss.backward()
        return loss.item()

    forms = {"ours": case.ours, "plain": case.plain}
    values = {key: step(form) for key, form in forms.items()}
    if case.compare and abs(values["ours"] - values["plain"]) > 1e-3 * abs(values["plain"]) + case.rounding:
        raise UserError(f"{name}: the forms disagree: {values}")
    times: dict[str, list[float]] = {key: [] for key in forms}
    for _ in range(rounds):
        for key, form in forms.items():
            wait_for(device)
            start = time.perf_counter()
            step(form)
            times[key].append(time.perf_counter() - start)
    seconds = {key: statistics.median(measured) for key, measured in times.items()}
    memory = {}
    for key, form in forms.items():
        clear()  # outside of what is measured
        memory[key] = peak_memory(lambda form=form: step(form), device)
    return {
        "loss": name,
        "device": str(device),
        **{f"{key}_s": value for key, value in seconds.items()},
        "ratio": seconds["plain"] / seconds["ours"],
        **{f"{key}_bytes": value for key, value in memory.items()},
    }


def table(records: list[dict]) -> str:
    """The records as Markdown."""
    lines = [["loss", "as written", "here", "ratio", "memory"]]
    for record in records:
        times = [f"{1000 * record[name]:.2f} ms" for name in ("plain_s", "ours_s")]
        memory = f"{record['plain_bytes'] / 2**20:.1f} -> {record['ours_bytes'] / 2**20:.1f} MiB"
        lines.append([record["loss"], *times, f"{record['ratio']:.2f}", memory])
    return markdown_table(lines)


def main(argv=None) -> list[dict]:
    parser = Parser.of_script(__doc__)
    parser.add_argument("--pair", type=read_pairs, default="resnet32x4:resnet8x4", metavar="T:S")
    parser.add_argument("--batch_size", type=count, default=64)
    parser.add_argument("--rounds", type=count, default=9, help="alternating rounds (9)")
    parser.add_argument("--losses", metavar="NAME,...", help="all by default")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=file_to_write, metavar="FILE", help="write the records there")
    args = parser.parse_args(argv)
    device, (pair,) = find_device(args.device), args.pair
    torch.manual_seed(0)
    images = torch.randn(args.batch_size, 3, SIZE, SIZE, device=device)
    teacher, student = (build_model(name, CLASSES).to(device).outputs(images) for name in pair)
    cases = make_cases(student, teacher)
    names = args.losses.split(",") if args.losses else list(cases)
    for name in names:
        if name not in cases:
            raise UserError(f"--losses: {name} is none of {', '.join(cases)}")
    measured = ({"pair": ":".join(pair), **compare(name, cases[name], args.rounds, device)} for name in names)
    return report(measured, table, args.json)


if __name__ == "__main__":
    run_script(main)
