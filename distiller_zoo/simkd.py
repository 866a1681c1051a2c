"""SimKD: knowledge distillation with the reused teacher classifier (Chen et al., CVPR 2022, arXiv 2203.14001).

    L = beta * MSE(P(F_s), F_t) + gamma * CE(s, y) + alpha * KL_T(s, t), with gamma = alpha = 0

F_s is the student's last feature map, pooled to the teacher's size where it is larger (else the teacher's is pooled),
P the projector. The student's own classifier is never trained: what is tested and shipped is its backbone, the
projector and the teacher's frozen classifier, one network (models/wrappers.py).

What the student has behind that output is not trained and not shipped: the last 1x1 convolution of MobileNetV2 (160
channels in front of it) and of ShuffleNetV2 (464), the last BatchNorm of a WRN. F_t is the map that the teacher's
classifier pools: the projector ends with a ReLU and the classifier reads its pooled result, so that no other map will
do. It is another one than the last feature map in WRNs alone, whose feature maps are signed; the repository of SimKD
takes the feature maps, and its WRNs are post-activation ResNets.
"""

import torch
from torch.nn import functional as F

from distiller_zoo.base import ALPHA, BETA, GAMMA, KD_T, Flag, count
from distiller_zoo.kd import LOGIT_STANDARDIZATION, FeatureDistiller
from distiller_zoo.maps import MapDistiller, last_map, pool_to_smaller
from errors import UserError
from models.backbone import probe_shapes
from models.cost import count_parameters
from models.wrappers import ReusedClassifier

PROJECTOR_FACTOR = Flag(
    ("--projector_factor",), count, 2, "how much narrower SimKD's projector is inside than the teacher's last map"
)


class SimKD(MapDistiller):
    """The student's last map becomes the teacher's, whose classifier is reused."""

    name = "simkd"
    summary, source = (
        "SimKD: L2 to the teacher's last map (projected), with the teacher's classifier reused",
        "Chen et al., CVPR 2022",
    )
    reference = "DefangChen/SimKD"
    departures = (
        "The teacher's map is the one that its classifier pools: in WRNs that is not the last feature map, which "
        "is signed and could not be reached behind the projector's ReLU."
    )
    group = "feature maps"
    reads = ("activated",)
    ships = "student + projector + teacher's classifier"
    flags = (
        GAMMA._replace(default=0.0),
        ALPHA._replace(default=0.0),
        BETA,
        KD_T,
        LOGIT_STANDARDIZATION,
        PROJECTOR_FACTOR,
    )
    flags_work_if = FeatureDistiller.flags_work_if
    map_size = "pool"  # what is shipped pools the student's larger map

    def __init__(self, student, teacher, task, **hyper_parameters):
        super().__init__(student, teacher, task, **hyper_parameters)
        channels, size, _ = probe_shapes(teacher, task.image_size).final  # as large as the activated map
        if self.projector_factor > channels:
            raise UserError(f"--projector_factor: must be at most {channels}, the channels of the teacher's last map")
        classifier = teacher.get_classifier()  # that there is none is the better reason
        if not teacher.classifies_average:
            raise UserError(
                "--model_t: --distill simkd reuses the teacher's classifier, which here reads something else than the "
                "average of the last map; choose another teacher"
            )
        width, *_ = last_map(probe_shapes(student, task.image_size))
        self.student = ReusedClassifier(student, width, channels, size, self.projector_factor)
        no_bias = torch.zeros(classifier.out_features)  # of a teacher's classifier without one
        self.student.classifier.load_state_dict({"bias": no_bias, **classifier.state_dict()})
        self.student.classifier.requires_grad_(False)

    @classmethod
    def trains_classifier(cls, flags):
        return True  # what is shipped has the teacher's

    @staticmethod
    def compared(output):
        return [last_map(output)]

    def main_stage(self, epochs):
        return super().main_stage(epochs)._replace(trained=[self.student.network, self.student.projector])

    def feature_loss(self, student, teacher, targets, index):
        return F.mse_loss(*pool_to_smaller(student.activated, teacher.activated))

    def export_note(self):
        projector, classifier = self.student.projector, self.student.classifier
        return (
            f"a projector ({count_parameters(projector):,} parameters) and the teacher's classifier "
            f"({count_parameters(classifier):,}) are kept in place of the student's own classifier"
        )
