"""The Inception score's form, exp of the mean KL(p(y|x) || p(y)), from any classifier's logits; of shuffled rows, and by ADM's rule.

Source: arXiv:1606.03498; ADM's rule: openai/guided-diffusion, evaluations/evaluator.py.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from ..machine.randomness import generator


def inception_score(logits: Float[Tensor, "n k"], *, splits: int = 10) -> float:
    """The mean score of `splits` equal parts of the shuffled rows; in [1, K], biased low for small parts.

    Raises:
        ValueError: fewer rows than splits.
    """
    if len(logits) < splits:
        raise ValueError(f"{splits} splits need as many rows of logits; there are {len(logits)}")
    order = torch.randperm(len(logits), generator=generator(0)).to(logits.device)
    scores = torch.stack([_score(part) for part in logits[order].double().tensor_split(splits)])
    return float(scores.mean())


def adm_inception_score(logits: Float[Tensor, "n k"], *, split_size: int = 5000) -> float:
    """The mean of the scores of `split_size` rows after each other; a last, shorter part counts as much as the others.

    In float64, where ADM's float32 gives NaN for a class of probability 0.

    Raises:
        ValueError: no rows.
    """
    if not len(logits):
        raise ValueError("an Inception score needs at least one row of logits")
    scores = torch.stack([_score(part.double()) for part in logits.split(split_size)])
    return float(scores.mean())


def _score(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(1)
    log_marginal = log_p.logsumexp(0) - torch.tensor(float(len(logits)), dtype=log_p.dtype).log()
    return (log_p.exp() * (log_p - log_marginal)).sum(1).mean().exp()
