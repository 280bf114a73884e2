"""The figures that an `Evaluator` makes, with the protocol under which they hold, and their ratio under one protocol."""

from ..errors import ProtocolError, listed
from ..machine.settings import Settings
from .protocol import Protocol
from .suite import Result


class Evaluation(Settings):
    """The figures of one model's images, and the protocol under which they hold.

    Intervals are 95 %, over other draws of as many images; the reference is taken as fixed.
    """

    frechet: float
    frechet_low: float
    frechet_high: float
    frechet_bias: float | None
    """About how much `frechet` is too high because images are finite; None where they are too few to tell."""
    kid: float
    kid_error: float
    """Standard error of `kid`."""
    precision: float
    recall: float
    density: float
    coverage: float
    inception_score: float | None
    """None, as `agreement`, where the feature network has no classes."""
    agreement: float | None
    """Share of images whose most likely class is the label they were sampled with."""
    num_images: int
    notes: tuple[str, ...] = ()
    """Notes for readers of the figures."""
    protocol: Protocol


def ratio(a: Result, b: Result, metric: str = "frechet") -> float:
    """a's figure over b's.

    Raises:
        ProtocolError: the protocols differ (names each field with both values), there is no such figure, or b's is 0.
    """
    differences = a.protocol.differences(b.protocol)
    if differences:
        raise ProtocolError(
            listed("these figures were measured differently and cannot be compared:", differences)
        )
    over, under = (evaluation.model_dump().get(metric) for evaluation in (a, b))
    if not (isinstance(over, float) and isinstance(under, float)):
        raise ProtocolError(f"figure {metric!r} is not in both evaluations")
    if under == 0:
        raise ProtocolError(f"{metric} of the second evaluation is 0, so no ratio to it exists")
    return over / under
