"""The base of methods whose own loss trains the student's feature layers in a first stage, and nothing after it."""

from torch import Tensor

from distiller_zoo.base import INIT_EPOCHS, NOTHING_TO_TRAIN, Stage
from distiller_zoo.kd import LogitDistiller
from errors import UserError
from models.backbone import Output


class FeaturesFirst(LogitDistiller):
    """First stage: the layers below the student's head and the method's adapters learn from the teacher's maps, for
    `--init_epochs` epochs at the run's learning rate, held constant; the rest of the student is in eval mode.
    Main stage: gamma * CE + alpha * KL_T, without the adapters. A method names its adapters in `frozen` and writes
    `first_loss`, which has no weight: the first stage has no other term.
    """

    group = "feature maps"
    reads = ("maps",)
    refuses_unlabelled = "after its first stage the cross entropy is what trains"
    flags = (*LogitDistiller.flags, INIT_EPOCHS)

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        if not (self.gamma or self.alpha):  # said before the first stage, not after it
            raise UserError(NOTHING_TO_TRAIN)

    def first_loss(self, student: Output, teacher: Output) -> Tensor:
        """The method's own loss, a scalar."""
        raise NotImplementedError

    def stages(self, epochs):
        trained = [self.student.get_feat_modules(), *(self.get_submodule(name) for name in self.frozen)]
        first = Stage("features", self.init_epochs, trained, self.first_losses, self.respond, milestones=())
        return [first, self.main_stage(epochs)]

    def first_losses(self, student, teacher, targets, index, progress):
        """The `losses` of the first stage."""
        return {self.name: self.first_loss(student, teacher)}

    def reads_teacher_output(self):
        return self.alpha > 0

    reads_teacher_logits = reads_teacher_output

    def losses(self, student, teacher, targets, index, progress):
        return self.label_and_logit_losses(student, teacher, targets)
