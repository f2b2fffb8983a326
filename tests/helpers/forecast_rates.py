"""How fast a machine is that forecasts are made for."""

from qvla_export.pipeline.sizing.machine_rates import MachineRates
from qvla_export.quantizer.rounding_costs import Rates

# Of no machine: what is compared are forecasts.
RATES = MachineRates(Rates(4e10, 1e10, 2e4, 5e4, 2e7), 4e10, 4e8, 1e9)
