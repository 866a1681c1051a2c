"""Labels only: how teachers and baseline students are trained."""

from distiller_zoo.base import GAMMA, Distiller


class CrossEntropy(Distiller):
    """L = gamma * CE(s, y)."""

    name = "ce"
    departures = "The student alone: no reference is needed."
    summary = "cross entropy with the labels only: teachers and baselines"
    group = "without a teacher"
    reads_teacher = False
    refuses_unlabelled = "it learns from labels alone"
    flags = (GAMMA,)

    def losses(self, student, teacher, targets, index, progress):
        return self.weighted_cross_entropy(student.logits, targets)
