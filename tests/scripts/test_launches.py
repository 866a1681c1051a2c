"""What a step launches: the counter, and how many launches and synchronisations a fast step of each method may have."""

import json

import pytest
import torch
from torch import nn

from distiller_zoo import DISTILLERS
from scripts import benchmark
from scripts.benchmarks import launches
from scripts.benchmarks.launches import count_launches
from scripts.benchmarks.methods import Stepper
from tests.conftest import message_of

CPU = torch.device("cpu")
#: Launches of a fast step of KD, resnet14 -> resnet8, guard and meter included.
KD = 135
#: What each method may launch more than KD, with two or three to spare; without a teacher in its main stage, less.
BESIDE_KD = {
    "abound": -30,
    "attention": 132,
    "ce": -36,
    "correlation": 11,
    "crd": 190,
    "dist": 63,
    "distpro": 760,
    "dkd": 42,
    "factor": 70,
    "fsp": -30,
    "ft": 41,
    "hint": 5,
    "kd": 0,
    "kdsvd": 426,
    "mlkd": 486,
    "norm": 44,
    "norm_crd": 251,
    "nst": 183,
    "ofd": 69,
    "one": 149,
    "pkt": 57,
    "reviewkd": 263,
    "rkd": 89,
    "semckd": 442,
    "similarity": 39,
    "simkd": 0,
    "srrl": 28,
    "sskd": 141,
    "vid": 105,
}
SCRIPT = """
import sys, torch
layer = torch.nn.Linear(2, 1, bias=False)
optimizer = torch.optim.SGD(layer.parameters(), 0.1)
for _ in range(int(sys.argv[1])):
    optimizer.zero_grad()
    loss = layer(torch.ones(3, 2)).sum()
    loss.backward()
    loss.item()
    optimizer.step()
"""


def test_launches_are_operations_but_views_and_empty_memory():
    x, weights = torch.ones(4, 4), [torch.ones(2), torch.ones(3)]

    def step():
        torch.empty(3)
        torch._foreach_mul_(weights, 2.0)
        return x.T.reshape(2, 8)[:1] + 1  # a transpose and a slice are views, but one of them has to be copied

    counts = count_launches(step)
    assert counts.operations == {"_foreach_mul_": 1, "clone": 1, "add": 1} and counts.launches == 3
    assert counts.synchronisations == 0


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x[0] > 0),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: torch.tensor([1.0, 2.0]),
    ],
)
def test_what_the_host_waits_for_is_a_synchronisation(read):
    assert count_launches(lambda: read(torch.ones(3))).synchronisations == 1


def test_a_copy_to_the_host_is_a_synchronisation():
    found = torch.ones(1), torch.ones(1, device="meta")
    assert launches._copies_to_host([found[1]], found[0]) and not launches._copies_to_host([found[0]], found[1])


def test_backward_pass_and_optimizer_are_counted():
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1, fused=True)

    def step():
        layer(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    operations = count_launches(step).operations
    assert operations["addmm"] == operations["mm"] == operations["_fused_sgd_"] == 1


@pytest.fixture
def script(tmp_path):
    """A training script of another code."""
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return path


def test_the_steps_of_another_script_are_counted(script, capsys):
    counts = launches.main([str(script), "9"])
    assert counts.synchronisations == 1 and counts.operations["mm"] == 2
    assert json.loads(capsys.readouterr().out) == {"launches": counts.launches, "synchronisations": 1}
    assert "after 2 steps" in message_of(launches.main, [str(script), "2"])


@pytest.mark.slow
def test_the_benchmark_counts_a_reference(script):
    counts = benchmark.count_reference(f"{script} 9")
    assert counts["launches_reference"] > 4 and counts["synchronisations_reference"] == 1
    assert "--reference: " in message_of(benchmark.count_reference, f"{script} 2")


def counts_of(method: str, pair: tuple[str, str]) -> launches.Counts:
    stepper = Stepper(method, pair, 8, CPU, benchmark.choose(CPU))
    stepper.step()  # the optimizer's state is made in the first one
    return count_launches(stepper.step)


@pytest.mark.parametrize("method", DISTILLERS)
def test_a_fast_step_stays_within_its_budget(method):
    counts = counts_of(method, ("resnet14", "resnet8"))
    assert counts.launches <= KD + BESIDE_KD[method], counts.operations
    assert counts.synchronisations == 0


@pytest.mark.parametrize(
    ("pair", "budget"),
    [(("resnet32x4", "resnet8x4"), 230), (("resnet110", "resnet32"), 560)],
    ids=lambda value: str(value),
)
def test_norm_stays_within_its_budget_on_the_pairs_of_the_tables(pair, budget):
    assert counts_of("norm", pair).launches <= budget
