"""The report of a run: one HTML file that needs nothing else, made from what the run's folder holds."""

from ._images import write_grid as write_grid
from ._page import write_report as write_report
from ._sweep import write_sweep_picture as write_sweep_picture
