"""What `--compile` makes of a method: a stage's pass and losses are one graph, in every epoch, and the same numbers."""

import copy

import pytest
import torch

from distiller_zoo import DISTILLERS, Progress
from helper.loops import set_modes
from tests.conftest import pair_networks
from tests.distiller_zoo.helpers import FrozenTeacher, batch_of
from tests.distiller_zoo.test_every_pair import BATCH, CLASSES, build, with_statistics


def losses_of(compute, method, stage, teacher, progress):
    """The losses of a pass on a batch that depends on the epoch."""
    torch.manual_seed(progress.epoch)
    batch = batch_of(method, BATCH)
    batch = batch._replace(targets=batch.targets % CLASSES)
    output = teacher(batch.images, method.teacher_preact) if stage.reads_teacher else None
    return compute(batch, output, progress, stage)[1]


@pytest.mark.quick(1)
@pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # of Python 3.13.0
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch's own, while it traces
@pytest.mark.parametrize("name", DISTILLERS)
def test_every_stage_is_one_graph_in_all_epochs(name, graphs):
    torch.manual_seed(0)
    network, student = pair_networks("resnet14", "resnet8", CLASSES)
    with_statistics(network)
    method, teacher = build(name, network, student), FrozenTeacher(network)
    plain = copy.deepcopy(method)
    for number, (stage, same) in enumerate(zip(method.stages(240), plain.stages(240), strict=True), 1):
        set_modes(stage, method)
        set_modes(same, plain)
        compiled = torch.compile(method.forward, fullgraph=True, dynamic=False)
        for epoch in (0, 20, 239):
            progress = Progress(epoch, 240)
            as_tensor = progress._replace(factor=torch.as_tensor(method.schedule(progress), dtype=torch.float32))
            expected = losses_of(plain, plain, same, teacher, progress)
            found = losses_of(compiled, method, stage, teacher, as_tensor)
            assert {key: value.item() for key, value in found.items()} == pytest.approx(
                {key: value.item() for key, value in expected.items()}, rel=1e-5
            )
        assert len(graphs) == number, "it was compiled again"
