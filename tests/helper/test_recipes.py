"""The recipes, and which of their rows wins."""

import re

from dataset import DATASETS
from distiller_zoo import DISTILLERS
from helper import recipes
from helper.command_line import resolve
from helper.configuration import row_key
from helper.recipes import CIFAR_PAIRS, IMAGENET_PAIRS, NAMED_RECIPES, RECIPES, ROWS, Row, find_rows, recipe_of
from helper.settings import SETTINGS as TABLE
from helper.settings import all_settings
from models import imagenet_model_dict, model_dict


def config(distill, model_s, of_teacher=None, **given):
    """A run's configuration."""
    return resolve({"distill": distill, "model_s": model_s, **given}, of_teacher=of_teacher)


def test_the_rows_lie_over_each_other():
    row = recipe_of("cifar100", "resnet32x4", "resnet8x4", "norm")
    assert row["gamma"] == (0.1, "pair resnet32x4 -> resnet8x4")
    assert row["co_sponge"] == (8, "pair resnet32x4 -> resnet8x4")
    assert recipe_of("cifar100", "vgg13", "vgg8", "norm")["gamma"] == (0.125, "method norm")
    assert recipe_of("cifar100", "vgg13", "MobileNetV2", "norm")["learning_rate"] == (0.01, "student MobileNetV2")
    assert recipe_of("cifar100", None, "vgg8", "ce")["epochs"] == (240, "data set cifar100")
    semckd = recipe_of("imagenet", "resnet34", "resnet18", "semckd")
    assert [semckd[name][0] for name in ("epochs", "lr_decay", "lr_decay_epochs")] == [90, "step", (30, 60)]


def test_the_recipe_table_names_only_what_exists():
    networks = {*model_dict, *imagenet_model_dict}
    for row in ROWS:
        assert row.source and set(row.values) <= set(all_settings()), row
        assert set(row.method or ()) <= set(DISTILLERS) and set(row.dataset or ()) <= set(DATASETS), row
        assert {*(row.teacher or ()), *(row.student or ())} <= networks, row
        assert row.chosen is None or row.chosen[0] in all_settings(), row
        if row.method and not row.chosen:
            known = [{flag.argument for flag in DISTILLERS[name].flags} for name in row.method]
            own = {name for name in row.values if name not in {one.argument for one in TABLE}}
            assert all(own <= flags for flags in known), row
    assert all(name in model_dict for pair in CIFAR_PAIRS for name in pair) and len(CIFAR_PAIRS) == 13
    assert all(name in imagenet_model_dict for pair in IMAGENET_PAIRS for name in pair)


def test_rows_of_a_method_that_are_of_one_pair_or_data_set():
    def value(name, *place, **chosen):
        return recipe_of(*place, chosen)[name][0]

    assert value("beta", "cifar100", "ResNet50", "MobileNetV2", "reviewkd") == 30
    assert value("learning_rate", "imagenet", "resnet34", "resnet18", "mlkd") == 0.05
    assert value("learning_rate", "cifar100", "vgg13", "MobileNetV2_norm", "mlkd") == 0.01
    assert value("alpha", "cifar100", "resnet56", "resnet20", "kd", logit_standardization=True) == 9
    assert value("alpha", "cifar100", "resnet110", "resnet20", "kd", logit_standardization=True) == 12
    assert value("alpha", "imagenet", "resnet34", "resnet18", "srrl", srrl_form="pooled") == 1
    sskd = recipe_of("imagenet", "resnet34", "resnet18", "sskd")
    assert (sskd["init_learning_rate"][0], sskd["weight_decay"][0]) == (0.1, 5e-4)


def test_what_a_recipe_says_of_sgd_is_left_out_with_another_optimizer():
    place = "ofd", "resnet8x4", {"path_t": "t.pth", "model_t": "resnet32x4", "dataset": "cifar100"}
    plain, other = config(*place), config(*place, optimizer="adamw", learning_rate=1e-3)
    assert (plain.drop_momentum, plain.nesterov, other.drop_momentum, other.nesterov) == (True, True, False, False)
    assert other.origins["drop_momentum"] == "its value is for --optimizer sgd"
    stored = dict(other) | {"drop_momentum": True}
    assert resolve({}, stored, place[2], folder="run").drop_momentum, "as the run began"


def test_a_recipe_is_on_top_of_the_tables_and_below_flags():
    def run(**given):
        return config("kd", "resnet8", of_teacher={"path_t": "t.pth", "model_t": "resnet20"}, **given)

    plain, patient = run(), run(recipe="patient")
    assert (patient.gamma, patient.alpha, patient.lr_decay, patient.mixup, patient.clip_grad) == (0, 1, "cos", 1, 1)
    assert patient.origins["clip_grad"] == "kd with recipe patient" and patient.epochs == 160
    assert run(recipe="patient", gamma=0.5).gamma == 0.5
    tables = run(recipe="tables")
    assert {name for name in plain if plain[name] != tables[name]} == set()
    assert row_key(plain) == row_key(tables) != row_key(patient)


def test_every_number_of_a_recipe_is_of_a_paper_or_our_choice():
    """Papers alone: their sections and tables cannot be looked up here."""
    for row in NAMED_RECIPES:
        assert re.match(r"our choice: |[A-Z]\w+ et al\. \((CVPR )?20\d\d\)[:,] ", row.source), row
        assert not re.search(r"(section|table|column) \w*\d", row.source), row
    assert not any(re.match(r"ours?\b(?! choice: )", row.source) for row in ROWS)


def test_the_warm_up_of_a_recipe_scales_with_the_run():
    def warm_up(**given):
        return config("ce", "resnet8", recipe="finetune", **given).lr_warmup_epochs

    assert (warm_up(), warm_up(epochs=40), warm_up(epochs=2), warm_up(epochs=40, lr_warmup_epochs=3)) == (2, 4, 1, 3)


def test_a_warm_up_that_scales_is_never_the_whole_run():
    """ReviewKD's loss has no weight in its first epoch: a run of one would train without it."""
    of_loss = [config("reviewkd", "resnet8", path_t="t.pth", epochs=epochs).warmup_epochs for epochs in (1, 2, 24)]
    of_rate = config("ce", "resnet8", recipe="finetune", epochs=1).lr_warmup_epochs
    given = config("reviewkd", "resnet8", path_t="t.pth", epochs=1, warmup_epochs=5).warmup_epochs
    assert (of_loss, of_rate, given) == ([0, 1, 2], 0, 5)


def test_epochs_that_a_method_publishes_for_a_data_set_belong_to_its_run_there(monkeypatch):
    def of(teacher):
        return config("fsp", "resnet18", {"path_t": "t.pth", "model_t": teacher, "dataset": "imagenet"}).init_epochs

    assert of("resnet34") == of("resnet50") == 12  # 30 in a run of 240
    row = Row({"init_epochs": 40}, "a paper", ("fsp",), ("imagenet",), ("resnet34",), ("resnet18",))
    monkeypatch.setattr(recipes, "ROWS", (*ROWS, row))
    assert (of("resnet34"), of("resnet50")) == (40, 12)


def test_every_recipe_is_whole_on_every_data_set():
    for name in RECIPES:
        for dataset in DATASETS:
            found = config("ce", "resnet8", recipe=name, dataset=dataset)
            assert found.min_learning_rate <= found.learning_rate and found.lr_warmup_epochs < found.epochs
            row = find_rows(dataset, None, "resnet8", "ce", {"recipe": name})
            assert name == "tables" or any(one.chosen == ("recipe", name) for one in row.values())
