"""The benchmarks run as they are, and what they compare is the same training."""

import json
import math

import pytest
import torch

from dataset import POLICIES, Batch, load_data
from helper.fast import Fast
from helper.recipes import RECIPES
from scripts import benchmark
from scripts.benchmarks import augmentation, estimate_imagenet, losses, memory, methods, overhead, tables
from tests.conftest import message_of

RECORD = {
    "pair",
    "n",
    "batch_size",
    "device",
    "plain_step_s",
    "fast_step_s",
    "step_ratio",
    "plain_epoch_images_per_s",
    "fast_epoch_images_per_s",
    "epoch_ratio",
    "peak_memory_plain",
    "peak_memory_fast",
    "floor_s",
    "launches_plain",
    "launches_fast",
    "flops",
}
SMALL = ["--pairs", "resnet14:resnet8", "--batch_size", "8", "--steps", "1", "--compile", "off"]


@pytest.mark.slow
def test_the_speed_benchmark_writes_its_records(tmp_path, capsys):
    path = tmp_path / "records.json"
    flags = ["--n", "1,2", "--rounds", "1", "--workers", "0", "--trials", "2", "--json", str(path)]
    records = benchmark.main([*SMALL, *flags])
    assert json.loads(path.read_text()) == records and [record["n"] for record in records] == [1, 2]
    for record in records:
        assert set(record) >= RECORD and record["pair"] == "resnet14:resnet8"
        numbers = [record[key] for key in RECORD - {"pair", "device"}]
        assert all(math.isfinite(number) and number > 0 for number in numbers)
        assert record["step_ratio"] == pytest.approx(record["plain_step_s"] / record["fast_step_s"])
        assert record["trials_ratio"] > 0 and record["launches_fast"] < 0.6 * record["launches_plain"]
        assert record["synchronisations_fast"] == 0 and record["machine"] and record["matrix_units"] in (True, False)
    assert "| resnet14 -> resnet8 | 2 |" in capsys.readouterr().out


def test_what_cannot_be_timed_is_one_line():
    for flag in ("--batch_size", "--steps", "--n"):
        assert flag in message_of(benchmark.main, [*SMALL, flag, "0"])


def test_the_profile_writes_a_trace(tmp_path, capsys):
    trace = tmp_path / "trace.json"
    benchmark.main([*SMALL, "--profile", str(trace)])
    assert "traceEvents" in json.loads(trace.read_text()) and "conv" in capsys.readouterr().out


def test_plain_and_fast_take_the_same_step():
    """In one precision, so that the comparison can be sharp."""
    data = load_data("digits", None)
    args = benchmark.Namespace(device=torch.device("cpu"), batch_size=8)
    fast = Fast(channels_last=True, fold_teacher=True, fused_optimizer=True)
    contenders = [
        benchmark.Contender(("resnet14", "resnet8"), 4, data, args, form, chosen)
        for form, chosen in (("direct", Fast()), ("collapsed", fast))
    ]
    batch = Batch(torch.randn(8, 3, 32, 32), torch.arange(8), torch.arange(8))
    for contender in contenders:
        contender.step(batch)
    plain, quick = (contender.method.state_dict() for contender in contenders)
    for key, value in plain.items():
        assert torch.allclose(value.float(), quick[key].float(), rtol=1e-3, atol=1e-4), key


def test_operations_inside_a_fused_convolution_are_counted():
    data, args = load_data("digits", None), benchmark.Namespace(device=torch.device("cpu"), batch_size=8)
    batch = Batch(torch.randn(8, 3, 32, 32), torch.arange(8), torch.arange(8))
    work = []
    for fold in (False, True):
        contender = benchmark.Contender(("resnet14", "resnet8"), 4, data, args, "direct", Fast(fold_teacher=fold))
        work.append(benchmark.count_flops(lambda contender=contender: contender.step(batch)))
    assert work[0] == work[1]


def test_methods_are_timed_beside_kd_and_refusals_are_told(capsys):
    flags = ["--methods", "kd,fsp", "--pairs", "resnet14:resnet8,vgg13:resnet8", "--batch_size", "4", "--steps", "1"]
    timed, vgg, fsp, refused = methods.main(flags)
    assert timed["ratio"] > 0 and vgg["ratio"] > 0 and fsp["ratio"] > 0
    assert "ratio" not in refused and "equal" in refused["refused"]
    assert timed["cached_ratio"] > 0 and "cached_ratio" not in fsp
    shown = capsys.readouterr().out
    assert "| fsp |" in shown and "| teacher computed |" in shown
    row = f"| kd | resnet14 -> resnet8 | {1e3 * timed['cached_step_s'] / timed['cached_ratio']:.1f} ms |"
    assert row in methods.cached_table([timed, fsp, refused]) and "fsp" not in methods.cached_table([fsp, refused])


def test_losses_are_timed_beside_their_formula(capsys):
    flags = ["--pair", "resnet20:resnet20", "--batch_size", "6", "--rounds", "1"]
    records = losses.main([*flags, "--losses", "attention,similarity,nst,rkd,pkt,norm,kdsvd"])
    assert len(records) == 7 and all(record["ratio"] > 0 and record["plain_bytes"] > 0 for record in records)
    assert "| kdsvd |" in capsys.readouterr().out


def test_forms_that_disagree_are_an_error(monkeypatch):
    monkeypatch.setattr(losses.plain_losses, "pkt", lambda student, teacher: student.square().sum())
    message = message_of(losses.main, ["--batch_size", "4", "--rounds", "1", "--losses", "pkt"])
    assert "the forms disagree" in message


@pytest.mark.slow
def test_memory_hardly_grows_with_n_for_tokens(capsys):
    flags = ["--pairs", "timm:test_vit:timm:test_vit", "--image_size", "160", "--batch_size", "32", "--n", "1,16"]
    one, sixteen = memory.main(flags)
    assert one["held"] < sixteen["held"] and memory.peak(sixteen) < 1.05 * memory.peak(one)
    assert "| timm:test_vit -> timm:test_vit | 160x160 | 32 | 16 |" in capsys.readouterr().out


def test_the_published_memory_of_tokens_hardly_grows_with_n():
    one, sixteen = json.loads((tables.RECORDS / "memory_tokens.json").read_text(encoding="utf-8"))
    assert (one["n"], sixteen["n"]) == (1, 16) and memory.peak(sixteen) < 1.05 * memory.peak(one)


def test_the_page_shows_its_records():
    page = tables.PAGE.read_text(encoding="utf-8")
    assert tables.fill(page) == page, "run python scripts/benchmarks/tables.py"
    assert "| resnet32x4 -> resnet8x4 |" in page


@pytest.mark.slow
def test_the_augmentation_of_every_recipe_is_timed_next_to_a_step(capsys):
    flags = ["--pairs", "resnet14:resnet8", "--batch_size", "4", "--batches", "1", "--rounds", "1"]
    records = augmentation.main(flags)
    names = {record["augmentation"] for record in records}
    assert names >= {f"--recipe {name}" for name in RECIPES}
    assert names >= {f"--augment {name}" for name in POLICIES if name not in ("standard", "none")}
    assert all(record["share"] == record["batch_s"] / record["step_s"] > 0 for record in records)
    assert "| `--recipe a3` |" in capsys.readouterr().out


@pytest.mark.slow
def test_imagenet_is_estimated_from_work_and_rates():
    slow, fast = (estimate_imagenet.main(["--flops_per_s", rate, "--shares", "0.5"]) for rate in ("1e12", "1e18"))
    first = slow[0]
    products = 3.66e9 + 3 * 1.81e9  # He et al., CVPR 2016, table 1, for ResNet-34 and -18
    assert first["flops_per_image"] == pytest.approx(2 * products, rel=0.02)
    assert first["images_per_s"] == [pytest.approx(0.5e12 / first["flops_per_image"])]
    assert first["gpu_hours"] == [pytest.approx(128_116_700 / first["images_per_s"][0] / 3600)]
    assert fast[0]["floor_s_per_image"] == pytest.approx(first["bytes_per_image"] / 3.35e12)


def test_a_step_is_compared_with_its_parts(tmp_path, capsys):
    argv = [
        "--pairs",
        "timm:test_vit:resnet8",
        "--image_size",
        "64",
        "--batch_size",
        "4",
        "--steps",
        "1",
        "--rounds",
        "1",
    ]
    (record,) = overhead.main([*argv, "--n", "2", "--json", str(tmp_path / "overhead.json")])
    assert record["ratio"] == record["step_s"] / (record["teacher_s"] + record["student_s"]) > 0
    assert (
        json.loads((tmp_path / "overhead.json").read_text()) and "timm:test_vit -> resnet8" in capsys.readouterr().out
    )
