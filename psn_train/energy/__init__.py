"""What a forward pass costs: multiply-accumulates, accumulates, and their energy in 45 nm."""

from psn_train.energy.measure import measure_energy
from psn_train.energy.report import Costs, EnergyReport

__all__ = ["Costs", "EnergyReport", "measure_energy"]
