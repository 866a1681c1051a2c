"""The weights that a run starts from, where they are not random: `--init`."""

from argparse import Namespace
from collections.abc import Sequence

from helper.distributed import main_first
from helper.pretrained import published_name
from helper.teacher import TeacherFile, naming, read_network
from models.backbone import Backbone
from models.checkpoints import load_initial
from models.external import is_external

FLAG, NAME_FLAG = "--init", "--model_s (in train_teacher.py: --model)"


def find_model(source: str) -> str:
    """The model whose weights `source` holds, where no flag names one; of published weights without a download."""
    if not is_external(source):
        return read_network(source, None, FLAG, NAME_FLAG).name
    with naming(FLAG):
        return published_name(source)


def read_initial(configs: Sequence[Namespace]) -> TeacherFile | None:
    """What `--init` names, for the runs that begin; None where none does, or none has the flag.

    The weights of a run that goes on are in its checkpoint: what its configuration says of their source is not read.
    """
    config = next((config for config in configs if config.resume is None and config.init is not None), None)
    if config is None:
        return None
    return main_first(lambda: read_network(config.init, config.model_s, FLAG, NAME_FLAG))


def start_from(initial: TeacherFile, student: Backbone, config: Namespace, num_classes: int) -> str:
    """Give a new network its initial weights; returns a line on what was taken."""
    source = f"{FLAG} {initial.path}"
    takes_classifier = load_initial(student, config.model_s, initial.network, f"{FLAG}: {initial.path}")
    new = f" but the classifier's, which is new: {initial.num_classes} classes there, {num_classes} here"
    return (
        f"{source}: all weights{'' if takes_classifier else new}; images are normalised with the mean and deviation "
        f"of {config.dataset}, whatever these weights were trained with"
    )
