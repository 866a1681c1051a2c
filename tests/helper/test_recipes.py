"""The recipes, and which of their rows wins."""

from dataset import DATASETS
from distiller_zoo import DISTILLERS
from helper.recipes import (
    CHOSEN,
    CHOSEN_FACTORS,
    CHOSEN_PAIR,
    CIFAR_PAIRS,
    DATASET,
    METHOD,
    METHOD_DATASET,
    METHOD_STUDENT,
    PAIR,
    STUDENT,
    resolve,
)
from models import model_dict


def test_the_rows_lie_over_each_other():
    row = resolve("cifar100", "resnet32x4", "resnet8x4", "norm")
    assert row["gamma"] == (0.1, "pair resnet32x4 -> resnet8x4")
    assert row["co_sponge"] == (8, "pair resnet32x4 -> resnet8x4")
    assert resolve("cifar100", "vgg13", "vgg8", "norm")["gamma"] == (0.125, "method norm")
    assert resolve("cifar100", "vgg13", "MobileNetV2", "norm")["learning_rate"] == (0.01, "student MobileNetV2")
    assert resolve("cifar100", None, "vgg8", "ce")["epochs"] == (240, "data set cifar100")
    semckd = resolve("imagenet", "resnet34", "resnet18", "semckd")
    assert [semckd[name][0] for name in ("epochs", "lr_decay", "lr_decay_epochs")] == [90, "step", (30, 60)]


def test_the_recipe_table_names_only_what_exists():
    flags = {flag.argument for method in DISTILLERS.values() for flag in method.flags}
    assert set(METHOD) <= set(DISTILLERS)
    common = {"learning_rate", "lr_decay", "lr_decay_epochs", "epochs", "batch_size", "weight_decay"}
    tables = (METHOD, PAIR, CHOSEN, CHOSEN_PAIR, CHOSEN_FACTORS, METHOD_STUDENT, METHOD_DATASET)
    rows = [row for table in tables for row in table.values()]
    assert all(set(row) <= flags | common for row in rows)
    assert {name for name, _ in METHOD_STUDENT} | {name for name, *_ in CHOSEN} <= set(DISTILLERS)
    assert {name for _, name in METHOD_STUDENT} <= set(model_dict)
    assert all(name in model_dict for name in STUDENT)
    assert all(name in model_dict for pair in CIFAR_PAIRS for name in pair) and len(CIFAR_PAIRS) == 13
    assert set(DATASET) == set(DATASETS)


def test_rows_of_a_method_that_are_of_one_pair_or_data_set():
    def value(name, *place, **chosen):
        return resolve(*place, chosen)[name][0]

    assert value("beta", "cifar100", "ResNet50", "MobileNetV2", "reviewkd") == 30
    assert value("learning_rate", "imagenet", "resnet34", "resnet18", "mlkd") == 0.1
    assert value("learning_rate", "cifar100", "vgg13", "MobileNetV2_norm", "mlkd") == 0.01
    assert value("alpha", "cifar100", "resnet56", "resnet20", "kd", logit_standardization=True) == 18
    assert value("alpha", "cifar100", "resnet110", "resnet20", "kd", logit_standardization=True) == 9
    assert value("alpha", "imagenet", "resnet34", "resnet18", "srrl", srrl_form="pooled") == 1
    sskd = resolve("imagenet", "resnet34", "resnet18", "sskd")
    assert (sskd["init_learning_rate"][0], sskd["weight_decay"][0]) == (0.1, 5e-4)
