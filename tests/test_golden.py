"""The golden folder, and that its checker reads the whole format and can fail."""

import copy
import json
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from models import build_model
from models.cost import count_multiply_adds, count_parameters
from tests import golden, golden_steps
from tests.conftest import SHARED
from tests.golden_entry import entry_of
from tests.golden_format import fill_all, images, loss_input

GOLDEN = SHARED / "golden"
FILES = sorted(path.name for path in GOLDEN.glob("*.json"))
needs_golden = pytest.mark.skipif(not FILES, reason=f"no golden numbers at {GOLDEN}")


def check(tmp_path, content: dict, name: str = "some.json") -> int:
    """The exit code for a folder with this one file."""
    (tmp_path / name).write_text(json.dumps(content))
    return golden.main(["--dir", str(tmp_path)])


@needs_golden
@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_this_implementation_gives_the_golden_numbers(name, tmp_path):
    for path in GOLDEN.glob(f"{name.removesuffix('.json')}.*"):
        (tmp_path / path.name).symlink_to(path)
    assert golden.main(["--dir", str(tmp_path)]) == 0


def numbers(entry, keys=()) -> Iterator[tuple]:
    """The paths of all numbers in nested lists and dictionaries."""
    if isinstance(entry, float):
        yield keys
    for key, value in entry.items() if isinstance(entry, dict) else enumerate(entry) if isinstance(entry, list) else ():
        yield from numbers(value, (*keys, key))


def changed(content: dict, place: tuple) -> dict:
    content = copy.deepcopy(content)
    *path, last = place
    entry = content
    for key in path:
        entry = entry[key]
    entry[last] = entry[last] * 1.001 + 1e-4
    return content


#: A case per method that is quick to check.
QUICK = {
    "srrl": "pooled",
    "semckd": "S2_T2_B4",
    "reviewkd": "vgg_like_4",
    "simkd": "equal",
    "one": "losses_n2_epoch40",
    "sskd": "B3_K4",
    "ofd": "one_2",
    "dkd": "T1_beta0.5",
    "kd": "T4",
    "dist": "T1",
    "mlkd": "plain_as_published",
    "factor": "whole_vector_norm",
}
TEXT = ("largest_relative_difference", "inputs")


@needs_golden
@pytest.mark.parametrize("method", QUICK)
def test_a_spoilt_number_of_the_zoo_is_noticed(method, tmp_path, capsys):
    content = json.loads((GOLDEN / "zoo.json").read_text())
    case = QUICK[method]
    content = {"how": content["how"], "cases": {method: {case: content["cases"][method][case]}}}
    assert check(tmp_path, content) == 0
    places = [place for place in numbers(content) if not set(place) & {*TEXT, "bias"}]
    by_key = {place[4]: place for place in places}  # the last number of each quantity
    assert {"total", "values", "grad_norm_student", "grad_first5_student"} <= set(by_key)
    for place in by_key.values():
        assert check(tmp_path, changed(content, place)) == 1, place
    assert "1 DIFFER" in capsys.readouterr().out


@needs_golden
@pytest.mark.parametrize("section", ["recipes", "initialisation", "schedules"])
def test_a_spoilt_fact_of_the_zoo_is_noticed(section, tmp_path):
    facts = json.loads((GOLDEN / "zoo.json").read_text())[section]
    for fact in facts[-4:]:
        spoilt = copy.deepcopy(fact)
        if isinstance(fact["expected"], dict):
            argument = next(iter(fact["expected"]))
            spoilt["expected"][argument] *= 1.01
        elif isinstance(fact["expected"], str):
            spoilt["expected"] = fact["expected"].replace("3*", "9*").replace("2/", "3/")
        else:
            spoilt["expected"] = fact["expected"][::-1]
        assert (check(tmp_path, {section: [fact]}), check(tmp_path, {section: [spoilt]})) == (0, 1)


@needs_golden
def test_what_cannot_be_read_is_a_failure_by_name_and_the_rest_is_checked(tmp_path, capsys):
    losses = json.loads((GOLDEN / "losses.json").read_text())["losses"]
    entry = losses["DistillKL"]["T4"]["0"]
    content = {
        "about": "text",
        "new section": {"value": 1.0},
        "losses": {
            "NewLoss": {"case": {"0": entry}},
            "DistillKL": {"T4": {"0": entry, "1": entry | {"new_quantity": 1.0}}, "warm": {"0": entry}},
        },
        "models": {"new_network": {"macs_1x3x32x32": 1}},
    }
    assert check(tmp_path, content) == 1
    printed = capsys.readouterr().out
    assert "some.json: 1 families agree, 5 DIFFER" in printed
    for name in ("section new section", "NewLoss case", "DistillKL T4 seed 1", "DistillKL warm", "new_network"):
        assert f"  {name}" in printed


def test_a_folder_without_golden_files_is_an_error(tmp_path, capsys):
    assert golden.main(["--dir", str(tmp_path)]) == 2
    assert check(tmp_path, {"timings": {"cpu": 1.0}}) == 2


# --- parts of the format that the public files do not show ------------------------------------------------------------


def reconstruction_entry() -> dict:
    """The paraphraser's own stage, in plain layers."""
    shapes = {"encoder.0": (8, 8), "encoder.3": (4, 8), "encoder.6": (4, 4)}
    shapes |= {"decoder.0": (4, 4), "decoder.3": (4, 8), "decoder.6": (8, 8)}
    sizes = {f"{name}.weight": [*widths, 3, 3] for name, widths in shapes.items()}
    outs = {"encoder.0": 8, "encoder.3": 4, "encoder.6": 4, "decoder.0": 4, "decoder.3": 8, "decoder.6": 8}
    sizes |= {f"{name}.bias": [width] for name, width in outs.items()}
    keys = [[f"paraphraser.{layer}.{end}", sizes[f"{layer}.{end}"]] for layer in shapes for end in ("weight", "bias")]
    filled = {name: value.double().requires_grad_() for name, value in fill_all(keys).items()}

    def plain(student, teacher):
        (feature_map,) = teacher
        x = feature_map
        for layer in shapes:
            weight, bias = (filled[f"paraphraser.{layer}.{end}"] for end in ("weight", "bias"))
            convolve = F.conv2d if layer.startswith("encoder") else F.conv_transpose2d
            x = F.leaky_relu(convolve(x, weight, bias, padding=1), 0.1)
        return [((x - feature_map) ** 2).mean()]

    return entry_of({"f3_t": (2, 8, 4, 4)}, plain, filled)


def test_a_loss_with_an_input_on_one_side_only_is_checked(tmp_path):
    entry = reconstruction_entry()
    content = {"losses": {"FactorTransfer": {"paraphraser_init_mse_rec": {"3": entry}}}}
    assert check(tmp_path, content) == 0
    entry["grad_norm_params"]["paraphraser.encoder.3.weight"] *= 1.001
    assert check(tmp_path, content) == 1


def unit_entry() -> dict:
    """One step's arithmetic where the teacher lists an additional map in front of the student's one."""
    shapes = {"student_feature_shapes": [[2, 12, 4, 4]], "teacher_feature_shapes": [[2, 5, 8, 8], [2, 4, 4, 4]]}
    student, teacher = loss_input(0, "u_fs0", (2, 12, 4, 4)), loss_input(0, "u_ft1", (2, 4, 4, 4))
    logits = [loss_input(0, f"u_logit_{side}", (2, 5), 3) for side in "st"]
    targets = torch.from_numpy(golden_steps.generator("0:u_label").randint(0, 5, 2))
    student.requires_grad_(), logits[0].requires_grad_()
    standard = [
        2.5 * (z - z.mean(1, keepdim=True)) / (z.var(1, keepdim=True, correction=0) + 1e-7).sqrt() for z in logits
    ]
    cross_entropy = F.cross_entropy(standard[0], targets)
    probabilities = (standard[1] / 4).softmax(1)
    divergence = 16 * (probabilities * (probabilities.log() - (standard[0] / 4).log_softmax(1))).sum() / 2
    norm = sum(((part - teacher) ** 2).mean() for part in student.chunk(3, 1))
    total = cross_entropy + 0.9 * divergence + norm
    total.backward()
    losses = {"cls": cross_entropy, "div": divergence, "norm": norm, "total": total}
    return {
        "dataset": "cifar100",
        "N": 3,
        "num_classes": 5,
        "gamma": 1.0,
        "alpha": 0.9,
        "beta": 1.0,
        "seed": 0,
        "beta1_set_by_epoch": 1.0,
        "epoch": 20,
        "ceta": 2.5,
        "kd_T": 4,
        **shapes,
        **{f"loss_{name}": value.item() for name, value in losses.items()},
        "grad_norm_features": [student.grad.norm().item()],
        "grad_first5_features": [student.grad.flatten()[:5].tolist()],
        "grad_norm_logits": logits[0].grad.norm().item(),
        "grad_first5_logits": logits[0].grad.flatten()[:5].tolist(),
    }


def test_where_the_teacher_lists_more_maps_the_last_ones_are_paired(tmp_path):
    assert check(tmp_path, {"unit": {"more maps": unit_entry()}}) == 0


@pytest.mark.parametrize("name, variant", [("a->b|N=8|plain", {}), ("a->b|N=8", {"variant": "plain FT: no residual"})])
def test_a_whole_step_of_the_plain_transform_is_built_without_the_residual(name, variant, monkeypatch):
    built = []
    monkeypatch.setattr(golden_steps, "NORM", lambda *_, **flags: built.append(flags["ft"]))
    entry = {"teacher": "resnet14", "student": "resnet8", "N": 8, "channel_t": 64, **variant, "runs": {"alpha=0": {}}}
    for _, family in golden_steps.pair_families({"pairs": {name: entry, "a->b|N=8|": entry | {"variant": ""}}}, None):
        with pytest.raises(AttributeError):
            family()
    assert built == ["plain"] * 3 + ["default"] * 3


@torch.no_grad()
def plain_student_entry() -> dict:
    """A student for which the official code builds no transform: the plain network."""
    network, x = build_model("resnet8", 10), images(2, 32)
    keys = [[key, list(value.shape)] for key, value in network.state_dict().items()]
    network.load_state_dict(fill_all(keys))
    network.double().eval()

    def summaries(preact):
        features, logits = network(x, is_feat=True, preact=preact)
        return logits.tolist(), [
            {
                "shape": list(each.shape),
                "mean": each.mean().item(),
                "std": each.std(correction=0).item(),
                "first5": each.flatten()[:5].tolist(),
            }
            for each in features
        ]

    (logits, feats), (_, preact_feats) = summaries(False), summaries(True)
    entry = {
        "student": "resnet8",
        "co_sponge": 8,
        "channel_t": None,
        "num_classes": 10,
        "state_dict": keys,
        "n_params_ft": {},
        "n_params_trainable": count_parameters(network),
        "macs_1x3x32x32": count_multiply_adds(network, 32),
        "feat_shapes": [each["shape"] for each in feats],
        "eval": {"logits": logits, "feats": feats, "preact_feats": preact_feats},
    }
    train_logits, train_feats = (network.train(), summaries(False))[1]
    sums = [
        sum(value.sum().item() for key, value in network.state_dict().items() if key.endswith(end))
        for end in ("running_mean", "running_var")
    ]
    entry["train"] = {
        "logits": train_logits,
        "feats": train_feats,
        "ft_bn_running": {},
        **dict(zip(("sum_running_mean_all", "sum_running_var_all"), sums, strict=True)),
    }
    return entry


def test_a_student_without_a_transform_is_checked_as_the_plain_network(tmp_path):
    content = {"models": {"resnet8|channel_t=None|N=8": plain_student_entry()}}
    assert check(tmp_path, content) == 0
    content["models"]["resnet8|channel_t=None|N=8"]["train"]["sum_running_var_all"] *= 1.001
    assert check(tmp_path, content) == 1
