"""Networks; importing this package registers them with timm."""

from psn_train.models import sew_resnet, weights
from psn_train.models.sew_resnet import SEWResNet
from psn_train.models.weights import load_ann

__all__ = ["SEWResNet", "load_ann", "sew_resnet", "weights"]
