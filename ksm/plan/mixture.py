"""How many contents more images will bring: the mixture behind the incidence counts, fitted and extrapolated.

A content occurs in an image of its class with some probability p. Of T images, Q_k contents occur in exactly k:
E Q_k = sum over contents of C(T, k) p^k (1-p)^(T-k), and n images hold D(n) = sum of 1 - (1-p)^n contents. Up to
T images D has an exact, unbiased estimate from the Q_k (rarefaction, `ksm.plan.growth`). Beyond T it follows the
measure of the p, which the Q_k show only in part. Its slope at T is Q_1 / T, by Good and Turing; slope and curvature
by Q_1 and Q_2 give Chao's lower bound of what there is in all. But memory is not a pool of species: a part of every
VM's contents occurs nowhere else, however many VMs there are, and most of the others occur in nearly all; Q_2 of few
images is made of the latter and says nothing on how the former saturate. So the whole measure is fitted, with an atom
at p -> 0 for the contents of their own, whose number grows in proportion to n: the mixture approach of Colwell, Mao
and Chang, by maximum likelihood.

- I. J. Good, The population frequencies of species and the estimation of population parameters, Biometrika 40 (1953).
- A. Chao, Estimating the population size for capture-recapture data with unequal catchability, Biometrics 43 (1987).
- R. K. Colwell, C. X. Mao, J. Chang, Interpolating, extrapolating, and comparing incidence-based species accumulation
  curves, Ecology 85 (2004).
- R. K. Colwell et al., Models and estimators linking individual-based and sample-based rarefaction, extrapolation and
  comparison of assemblages, Journal of Plant Ecology 5 (2012).
- A. Chao et al., Rarefaction and extrapolation with Hill numbers, Ecological Monographs 84 (2014).
- R. Varadhan, C. Roland, Simple and globally convergent methods for accelerating the convergence of any EM algorithm,
  Scandinavian Journal of Statistics 35 (2008).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

_ROUNDS = 200
_POINTS = 24  # of the grid, on each side of 1/2
_RARE = 0.2  # of 1/2T: the grid's lowest, to tell what few images have from what one alone will ever have
_FEW = 8  # further points below
_SETTLED = 1e-7
_BETWEEN = 0.1


@dataclass(frozen=True, slots=True, eq=False)
class Mixture:
    """What the contents of one class are like, as far as T images show.

    Attributes:
        p: (points,) probabilities that an image has a content.
        seen: (points,) how many contents of that probability were seen in the T images.
        own: contents seen that no other image will ever have.
        images: T.

    >>> fit(np.array([600.0, 0.0, 1000.0])).more(np.array([3])).round(1)  # three more images, 200 new contents each
    array([600.])
    """

    p: Floats
    seen: Floats
    own: float
    images: int

    def more(self, further: npt.NDArray[np.int64]) -> Floats:
        """Contents expected in so many further images that the T images do not have."""
        there = 1 - (1 - self.p) ** self.images
        unseen = self.seen * (1 - self.p) ** self.images / there
        new = (unseen * (1 - (1 - self.p) ** further[:, None])).sum(axis=1)
        result: Floats = new + self.own / self.images * further
        return result

    def once(self, images: npt.NDArray[np.int64]) -> Floats:
        """Contents expected in exactly one of so many images."""
        n = images[:, None]
        there = 1 - (1 - self.p) ** self.images
        each = self.seen / there * n * self.p * (1 - self.p) ** np.maximum(n - 1, 0)
        result: Floats = each.sum(axis=1) + self.own / self.images * images
        return result


def fit(incidence: Floats, between: float = _BETWEEN) -> Mixture:
    """Maximum likelihood by expectation and maximisation, from Q_1 .. Q_T; O(T) for each of a fixed number of rounds.

    Few images leave the measure open; then the start decides. `between` of the contents start out as shared by some
    images, evenly over all probabilities, the others as had by all or by one alone, as memory is. Two images show no
    more than that, and what one of them has is taken as its own, unless `between` is 1.

    >>> fit(np.array([100.0])).own  # one image tells nothing: as if all of it were its own
    100.0
    >>> counts = np.array([60.0, 60.0, 100.0])
    >>> fit(counts).more(np.array([8])).round() > fit(counts, between=1.0).more(np.array([8])).round()
    array([ True])
    """
    images = len(incidence)
    if images == 1:
        return Mixture(np.empty(0), np.empty(0), float(incidence[0]), 1)
    if images == 2 and between < 1:
        return Mixture(np.ones(1), incidence[1:].astype(np.float64), float(incidence[0]), 2)
    p, shape = _grid(images)
    weight = np.full(len(shape), between / len(shape))
    weight[[0, -1]] += (1 - between) / 2
    weight *= incidence.sum()
    weight = _maximised(weight, shape, incidence)
    return Mixture(p, weight[1:], float(weight[0]), images)


def _maximised(weight: Floats, shape: Floats, incidence: Floats) -> Floats:
    """Steps of expectation and maximisation, extrapolated from pairs of them where that is more likely still."""

    def step(weight: Floats) -> Floats:
        expected = weight @ shape
        ratio = np.divide(incidence, expected, out=np.zeros_like(expected), where=expected > 0)
        found: Floats = weight * (shape @ ratio)
        return found

    def likelihood(weight: Floats) -> float:
        seen = incidence > 0
        return float(incidence[seen] @ np.log((weight @ shape)[seen]))

    total = incidence.sum()
    for _ in range(_ROUNDS):
        once = step(weight)
        twice = step(once)
        first, change = once - weight, twice - 2 * once + weight
        length = float(np.abs(change).sum())
        if np.abs(first).sum() <= _SETTLED * total or not length:
            return twice
        far = max(1.0, float(np.abs(first).sum()) / length)
        ahead = np.maximum(weight + 2 * far * first + far**2 * change, twice / 10)
        ahead *= total / ahead.sum()
        weight = step(ahead) if likelihood(ahead) > likelihood(twice) else twice
    return weight


@functools.lru_cache(maxsize=256)
def _grid(images: int) -> tuple[Floats, Floats]:
    """Probabilities, and (1 + points, T) how the contents of each that are seen fall on 1 .. T images; the first row is
    of contents that one image alone has."""
    half = np.geomspace(_RARE * 0.5 / images, 0.5, _POINTS + _FEW)
    upper = np.geomspace(0.5 / images, 0.5, _POINTS)
    p = np.concatenate((half, 1 - upper[-2::-1], [1.0]))
    k = np.arange(1, images + 1)
    log_choose = _log_factorial(images)[images] - _log_factorial(images)[k] - _log_factorial(images)[images - k]
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = log_choose + k * np.log(p)[:, None] + np.where(k < images, (images - k) * np.log1p(-p)[:, None], 0.0)
    shape = np.exp(logs)
    shape /= shape.sum(axis=1, keepdims=True)  # given that a content is seen at all
    return p, np.vstack((np.eye(1, images), shape))


@functools.lru_cache(maxsize=256)
def _log_factorial(n: int) -> Floats:
    return np.concatenate(([0.0], np.cumsum(np.log(np.arange(1, n + 1)))))


@functools.lru_cache(maxsize=512)
def missing(images: int, n: int) -> Floats:
    """Probability that n of T images, drawn without replacement, miss a content that q have; by q = 0 .. T.

    >>> missing(4, 2).round(3).tolist()
    [1.0, 0.5, 0.167, 0.0, 0.0]
    """
    q = np.arange(images + 1)
    logs = _log_factorial(images)
    rest = images - q
    fits = rest >= n
    found = np.zeros(images + 1)
    found[fits] = np.exp(logs[rest[fits]] - logs[rest[fits] - n] - logs[images] + logs[images - n])
    return found


@functools.lru_cache(maxsize=512)
def met_once(images: int, n: int) -> Floats:
    """Probability that exactly one of n of T images, drawn without replacement, has a content that q have; by q.

    >>> met_once(4, 2).round(3).tolist()
    [0.0, 0.5, 0.667, 0.5, 0.0]
    """
    if n == 0:
        return np.zeros(images + 1)
    q = np.arange(images + 1)
    logs = _log_factorial(images)
    rest = images - q
    fits = (rest >= n - 1) & (q > 0)
    found = np.zeros(images + 1)
    ways = logs[rest[fits]] - logs[rest[fits] - (n - 1)] - logs[n - 1]
    found[fits] = q[fits] * np.exp(ways - logs[images] + logs[images - n] + logs[n])
    return found
