"""The report of a run: one HTML file that needs nothing else, made from what the run's folder holds."""

from ._histogram import class_range as class_range
from ._histogram import write_class_histogram as write_class_histogram
from ._images import write_grid as write_grid
from ._page import write_report as write_report
from ._sweep import write_sweep_picture as write_sweep_picture
