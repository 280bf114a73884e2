"""The pages of a run and of a comparison: each one HTML file that needs nothing else, made from records that `runs` reads."""

from ._comparison import ComparedRow as ComparedRow
from ._comparison import comparison_page as comparison_page
from ._histogram import class_range as class_range
from ._histogram import write_class_histogram as write_class_histogram
from ._images import write_grid as write_grid
from ._page import report_page as report_page
from ._record import MAX_IMAGES as MAX_IMAGES
from ._record import RunRecord as RunRecord
from ._record import Samples as Samples
from ._record import WrittenLocality as WrittenLocality
from ._record import WrittenPlan as WrittenPlan
from ._sweep import write_sweep_picture as write_sweep_picture
