"""PSN, masked PSN and sliding PSN, fast: operators with three backends. The law that they keep is in functional/."""

from psn_train.neurons.kernels.backends import BACKENDS, choose, use_backend, using_backend
from psn_train.neurons.kernels.operators import psn, psn_backward

__all__ = ["BACKENDS", "choose", "psn", "psn_backward", "use_backend", "using_backend"]
