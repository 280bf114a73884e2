"""The Inception score's form, exp of the mean KL(p(y|x) || p(y)), from any classifier's logits.

Source: arXiv:1606.03498.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..machine.randomness import generator


class InceptionScore(NamedTuple):
    """Mean and standard deviation (over their number, as in the paper's code) of the splits' scores."""

    value: float
    deviation: float


def inception_score(logits: Float[Tensor, "n k"], *, splits: int = 10, seed: int = 0) -> InceptionScore:
    """The score of each of `splits` equal parts of the shuffled rows; in [1, K], biased low for small parts.

    Raises:
        ValueError: fewer rows than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{splits} splits need as many rows of logits; there are {len(logits)}")
    order = torch.randperm(len(logits), generator=generator(seed)).to(logits.device)
    scores = torch.stack([_score(part) for part in logits[order].double().tensor_split(splits)])
    return InceptionScore(float(scores.mean()), float(scores.std(correction=0)))


def _score(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    log_marginal = log_p.logsumexp(0) - torch.tensor(float(len(logits)), dtype=log_p.dtype).log()
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()
