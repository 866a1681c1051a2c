"""Golden checks of the zoo that need whole networks: DistPro's scores, ONE's branches, MLKD's two passes."""

import re

import torch
from torch import Tensor, nn

from dataset import Batch
from distiller_zoo import Progress, Task, find_distiller
from distiller_zoo.one import BranchOutput
from models import build_model
from models.backbone import Backbone
from tests.golden_case import Difference
from tests.golden_format import Reader, by_suffix, compare, compare_named, fill, loss_input


def network(name: str, num_classes: int) -> Backbone:
    """A network as the model table builds it."""
    return build_model(name, num_classes)


def fill_with_prefix(module: nn.Module, prefix: str) -> None:
    """Fill a whole module by the hashed keys `prefix.key`."""
    state = {key: fill(f"{prefix}.{key}", value.shape) for key, value in module.state_dict().items()}
    module.load_state_dict(state)


def branch_output(branches: list[Tensor], gate: Tensor) -> BranchOutput:
    """What ONE's losses read."""
    return BranchOutput(branches[0], branches[0], branches, gate)


def _task(num_classes: int, batch: int) -> Task:
    return Task(num_classes, 32, batch, torch.zeros(2 * batch, dtype=torch.int64))


def check_score_gradient(case) -> Difference:
    """DistPro's gradient of the scores in the first step of its search; the entry's text names the networks."""
    entry: Reader = case.entry
    text, images = entry["what"], entry["images"]
    teacher_name, student_name = re.search(r"(\w+) -> (\w+)", text).groups()
    num_classes = int(re.search(r"K=(\d+)", text)[1])
    style = re.search(r"style (\w+)", text)[1]
    rate, momentum, decay = (float(re.search(rf"{name} ([\d.e-]+)", text)[1]) for name in ("lr", "momentum", r"\bwd"))
    prefixes = entry["prefixes"]
    teacher, student = network(teacher_name, num_classes), network(student_name, num_classes)
    (of_student,) = [prefix for prefix, meaning in prefixes.items() if "student" in meaning]
    (of_teacher,) = [prefix for prefix, meaning in prefixes.items() if meaning == "teacher"]
    (of_search,) = [prefix for prefix in prefixes if "search" in prefix]
    fill_with_prefix(teacher, of_teacher)
    fill_with_prefix(student, of_student)
    values = {"gamma": 1.0, "alpha": 0.0, "beta": 1.0, "kd_weight": 1.0, "distpro_search_style": style}
    method = find_distiller("distpro")(student, teacher, _task(num_classes, images["shape"][0]), **values)
    fill_with_prefix(method.search.student, of_student)
    fill_with_prefix(method.search.pathways, f"{of_search}.pathways")
    method, teacher = method.double().train(), teacher.double().eval()
    inputs = [loss_input(images["seed"], images[name], images["shape"]) for name in ("train", "val")]
    labels = [torch.tensor(entry[name]) for name in ("labels", "labels_val")]
    batch, held_out = (
        Batch(image, label, torch.arange(len(label))) for image, label in zip(inputs, labels, strict=True)
    )
    with torch.no_grad():
        shown = teacher.outputs(batch.images, preact=True)
    parameters = method.search.parameters()
    optimizer = torch.optim.SGD(parameters, lr=rate, momentum=momentum, weight_decay=decay)
    gradient = method.score_gradient(optimizer, batch, shown, held_out)
    return Difference(0.0, compare("score_gradient", gradient, entry["score_gradient"]), case.loss)


def check_ensemble(case) -> Difference:
    """ONE around a whole network: values, logits and gradients of a step."""
    entry: Reader = case.entry
    name = case.case.split("_", 1)[1]
    logits, labels = entry["logits_first5"], torch.tensor(entry["labels"])
    images = entry["images"]
    num_classes = classes_of(name, case.how)
    values = {"branches": len(logits) - 1}
    method = find_distiller("one")(network(name, num_classes), None, _task(num_classes, len(labels)), **values)
    for prefix in entry["prefixes"]:
        fill_with_prefix(method.get_submodule(prefix.split(".", 1)[1]), prefix)
    method.double().train(entry["mode"] == "train")
    shown = method.respond(loss_input(case.seed, images["tag"], images["shape"], images["scale"]), None)
    terms = method.losses(shown, None, labels, None, Progress(entry["epoch_counted_from_0"], 300))
    ours = {"cross_entropies": terms["ce"] + terms["ce_ensemble"], "one": terms["one"]}
    compare_named("values", ours, entry["values"])
    total = sum(terms.values())
    difference = compare("total", total, entry["total"])
    branches = [each.flatten()[:5] for each in shown.branch_logits]
    compare("logits", branches, logits[: len(branches)])
    total.backward()
    norms = {key: value.grad.norm() for key, value in method.named_parameters() if value.grad is not None}
    golden = entry["grad_norm_params"]
    return Difference(difference, compare_named("grad_norm_params", by_suffix(norms, golden), golden), case.loss)


def classes_of(name: str, how: str) -> int:
    """How many classes the file's text gives a network: build_model('resnet20'/'resnet14', K), K = 10/7."""
    names, numbers = re.search(r"build_model\(([^,]+), K\), K = ([\d/]+)", how).groups()
    return dict(zip(re.findall(r"\w+", names), map(int, numbers.split("/")), strict=True))[name]


def check_two_passes(case) -> Difference:
    """MLKD's student sees the weak view first, then the strong one, each with its own batch statistics."""
    entry: Reader = case.entry
    text = entry["what"]
    name, num_classes = re.search(r"student (\w+) \(K=(\d+)\)", text).groups()
    shape = tuple(map(int, re.search(r"'mlkd_weak',\(([\d,]+)\)", text)[1].split(",")))
    student = network(name, int(num_classes))
    fill_with_prefix(student, "student")
    method = find_distiller("mlkd")(student, student, _task(int(num_classes), shape[0])).double().train()
    weak = loss_input(case.seed, "mlkd_weak", shape)
    strong = 2 * loss_input(case.seed, "mlkd_strong", shape) + 0.5
    shown = method.respond(torch.cat([weak, strong]), None).logits.chunk(2)
    differences = [
        compare(view, logits.flatten()[:5], entry[f"logits_{view}_first5"])
        for view, logits in zip(("weak", "strong"), shown, strict=True)
    ]
    for key in ("running_mean", "running_var"):
        compare(key, getattr(method.student.bn1, key).sum(), entry[f"{key}_after_bn1_sum"])
    return Difference(max(differences), 0.0, case.loss)
