"""`psn average`: one network out of several checkpoints of a run, their weights averaged, evaluated beside them."""

from psn_train.average.averaging import average_checkpoints

__all__ = ["average_checkpoints"]
