"""Networks; importing this package registers them with timm."""

from psn_train.models import conv_net, published, sew_resnet, weights
from psn_train.models.conv_net import VGGSNN, CIFARNet, SequentialNet
from psn_train.models.folding import fold_batch_norm
from psn_train.models.inference import prepare
from psn_train.models.network import SpikingNetwork
from psn_train.models.packed_layers import set_memory
from psn_train.models.published import register_pretrained
from psn_train.models.registration import NETWORKS, import_module, register_neuron
from psn_train.models.sew_resnet import SEWResNet
from psn_train.models.weights import load_ann

__all__ = [
    "NETWORKS",
    "VGGSNN",
    "CIFARNet",
    "SEWResNet",
    "SequentialNet",
    "SpikingNetwork",
    "conv_net",
    "fold_batch_norm",
    "import_module",
    "load_ann",
    "prepare",
    "published",
    "register_neuron",
    "register_pretrained",
    "set_memory",
    "sew_resnet",
    "weights",
]
