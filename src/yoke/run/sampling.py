"""Drawing a token from logits. The draw is a function of logits, settings, seed and position alone, so any machine that has them draws the same token.

Legend of shapes: V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray

from yoke.core.request import Sampling

_NUCLEUS_STEPS = (256, 4096)  # almost every nucleus is found among this many candidates, which spares sorting the whole vocabulary


def draw(logits_V: NDArray[np.float32], sampling: Sampling, position: int) -> int:
    """The next token.

    Parameters
    ----------
    logits_V : float32 [V].
    sampling : temperature 0 takes the largest logit, the lowest id among equals.
    position : index of the token that the logits follow; with the seed it names the random number (Philox, doi 10.1145/2063384.2063405).
    """
    if sampling.temperature == 0.0 or sampling.top_k == 1:
        return int(np.argmax(logits_V))
    ids = _top_k(logits_V, sampling.top_k)
    below_best = (logits_V if ids is None else logits_V[ids]).astype(np.float64)
    below_best -= below_best.max()
    with np.errstate(over="ignore"):  # at a tiny temperature all but the best become minus infinity, which is right
        weights = np.exp(below_best / sampling.temperature)
    if sampling.top_p < 1.0:
        weights = _nucleus(weights, sampling.top_p)
    if sampling.min_p > 0.0:
        weights[weights < sampling.min_p * weights.max()] = 0.0
    cumulative = np.cumsum(weights)
    uniform = np.random.Generator(np.random.Philox(key=sampling.seed, counter=position)).random()
    index = min(int(np.searchsorted(cumulative, uniform * cumulative[-1], side="right")), int(np.flatnonzero(weights)[-1]))
    return index if ids is None else int(ids[index])


def _top_k(logits_V: NDArray[np.float32], k: int) -> NDArray[np.intp] | None:
    """Ids of the ``k`` largest logits in ascending order; None for all of them."""
    if k == 0 or k >= logits_V.size:
        return None
    return np.sort(np.argpartition(logits_V, -k)[-k:])


def _nucleus(weights: NDArray[np.float64], top_p: float) -> NDArray[np.float64]:
    """Zero all but the fewest largest weights that together reach ``top_p`` of the sum (arXiv 1904.09751); the largest always stays."""
    wanted = top_p * weights.sum()
    for size in (*(step for step in _NUCLEUS_STEPS if step < weights.size), weights.size):
        largest = np.argpartition(weights, -size)[-size:]
        ordered = largest[np.argsort(-weights[largest], kind="stable")]
        reached = int(np.searchsorted(np.cumsum(weights[ordered]), wanted)) + 1
        if reached <= size or size == weights.size:
            kept = np.zeros_like(weights)
            chosen = ordered[:reached]
            kept[chosen] = weights[chosen]
            return kept
    return weights
