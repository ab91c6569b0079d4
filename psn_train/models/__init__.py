"""Networks; importing this package registers them with timm."""

from psn_train.models import sew_resnet
from psn_train.models.sew_resnet import SEWResNet

__all__ = ["SEWResNet", "sew_resnet"]
