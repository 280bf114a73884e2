"""Analysis of a pretrained model before a plan is made: where its attention looks."""

from .locality import Locality as Locality
from .locality import SiteLocality as SiteLocality
from .locality import noised_locality as noised_locality
from .locality import watching_locality as watching_locality
