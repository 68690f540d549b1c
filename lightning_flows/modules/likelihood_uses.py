r"""What a likelihood gives for free: classes and anomalies of data.

Bayes' rule turns the densities of a conditional flow into a classifier,

.. math:: p(y \mid x) = \frac{p(x \mid y)\, p(y)}{\sum_{y'} p(x \mid y')\, p(y')},

and its denominator is the density of x without a condition.

Data are taken as they are: the noise that the training data held is not added to them. Likelihoods that are compared
should be of data prepared alike.

References:
    Normalizing Flows are Capable Generative Models (Zhai et al., 2025).
    Detecting Out-of-Distribution Inputs to Deep Generative Models Using Typicality (Nalisnick, Matsukawa, Teh,
    Lakshminarayanan, 2019).
    Your Diffusion Model is Secretly a Zero-Shot Classifier (Li, Prabhudesai, Duggal, Brown, Pathak, 2023), for
    captions as classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from lightning_flows.flow import Condition, SampleNoise
from lightning_flows.modules.base import Progress, evaluation
from lightning_flows.modules.inpainting import Inpainting
from lightning_flows.modules.interpolation import Interpolation, rows_of
from lightning_flows.networks import check_condition

AnomalyMethod = Literal["nll", "typicality"]
Marginal = Literal["classes", "null"]
Prior = Sequence[float] | Tensor


class Classification(NamedTuple):
    """Data with the probabilities of K candidates.

    Attributes:
        label: the likeliest candidate: its class where candidates are classes, else its place among the captions,
            int64, shape (B,).
        scores: log posterior, shape (B, K).
        log_prob: log p(x | candidate) in nats, shape (B, K).
    """

    label: Tensor
    scores: Tensor
    log_prob: Tensor


class LikelihoodUses(Inpainting, Interpolation):
    """A mixin of normalizing flows, before `GenerativeModule`.

    All methods run in eval mode and without gradients, and what they say of a sample does not depend on the batch.
    """

    network: Any
    text: Any
    encode: Callable[..., Tensor]
    latent_log_prob: Callable[..., Tensor]
    latent_volume: Callable[[Tensor], Tensor]
    density_dims: Callable[[Tensor], int]
    null_condition: Callable[..., Condition]

    @torch.no_grad()
    def classify(
        self,
        x: Tensor,
        *,
        candidates: Sequence[int] | Sequence[str] | None = None,
        prior: Prior | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        progress: Progress | None = None,
    ) -> Classification:
        r"""The likeliest class of data: :math:`\arg\max_y \log p(x \mid y) + \log p(y)`.

        Args:
            x: data, shape (B, ...); no noise is added to them.
            candidates: K classes, all by default; for a network that reads tokens, K captions.
            prior: p(y) of each candidate up to a factor, shape (K,); equal by default.
            batch_size: most pairs of a sample and a candidate at once; by default as many as there are samples.
            seed: of the draws of a codec that encodes to a distribution: sample i gets the i-th seed derived from it;
                0 by default.
            seeds: or one seed for each sample, shape (B,).
            progress: called with (pairs done, pairs).

        Raises:
            ValueError: a network without a condition, candidates or a prior that do not fit.
        """
        classes, conditions = self._candidates(candidates)
        weights = _log_prior(prior, len(classes))
        z = self._latents(x, seed, seeds)
        nats = self._nats_of_pairs(z, conditions, batch_size, progress)  # (B, K)
        scores = torch.log_softmax(nats.double() + weights.to(nats.device), 1)
        label = torch.tensor(classes, device=nats.device)[scores.argmax(1)]
        return Classification(label, scores.to(nats), nats)

    @torch.no_grad()
    def anomaly_score(
        self,
        x: Tensor,
        condition: Condition | None = None,
        *,
        method: AnomalyMethod = "nll",
        reference: float | Sequence[float] | Tensor | None = None,
        marginal: Marginal | None = None,
        prior: Prior | None = None,
        batch_size: int | None = None,
        seed: int | None = None,
        seeds: Sequence[int] | Tensor | None = None,
        progress: Progress | None = None,
    ) -> Tensor:
        r"""How strange data are, shape (B,): the larger, the stranger.

        ``"nll"`` is :math:`-\tfrac 1D \log p(x)`, nats per dimension of the variable that the flow models.
        ``"typicality"`` is :math:`|-\tfrac 1D \log p(x) - \hat H|`, Nalisnick et al.'s distance from the typical set
        for one sample, over D: simple data (plain grey) may be likelier than any of the kind that the flow knows.
        :math:`\hat H` is the mean of the nats per dimension of data of that kind: the ``reference``.

        Args:
            x: data, shape (B, ...); no noise is added to them.
            condition: under which they are judged. Without one, a network that reads a condition is asked for the
                marginal density, see ``marginal``.
            method: ``"nll"`` or ``"typicality"``.
            reference: nats per dimension of data that are not strange, one number or those of many samples (the
                "nll" scores of held-out data); for typicality.
            marginal: ``"classes"``, the sum over all classes by their prior (networks that read labels), or
                ``"null"``, what the network learned where the condition was dropped. The sum where it can be had, by
                default.
            prior: see `classify`; for the sum.
            batch_size: see `classify`.
            seed: see `classify`.
            seeds: see `classify`.
            progress: see `classify`.

        Raises:
            ValueError: an unknown method or marginal, or arguments that have no meaning together.
        """
        target = _reference(method, reference)
        way = self._marginal(condition, marginal, prior)
        if way == "classes":
            found = self.classify(
                x, prior=prior, batch_size=batch_size, seed=seed, seeds=seeds, progress=progress
            ).log_prob
            nats = torch.logsumexp(found.double() + _log_prior(prior, found.shape[1]).to(found.device), 1)
        else:
            z = self._latents(x, seed, seeds, condition)
            null = way == "null" and len(self.network.streams)
            given = self.null_condition(None, len(z)) if null else condition
            nats = self._nats_in_parts(z, given, batch_size, progress).double()
        score = -nats / self.density_dims(x)
        return (score if target is None else (score - target).abs()).float()

    # ------------------------------------------------------------------ densities

    def _latents(
        self,
        x: Tensor,
        seed: int | None,
        seeds: Sequence[int] | Tensor | None,
        condition: Condition | None = None,
    ) -> Tensor:
        noise = SampleNoise(self._seeds(condition, len(x), seed, seeds))  # type: ignore[attr-defined]
        return self.encode(x.to(self.device), noise)  # type: ignore[attr-defined]

    def _nats_of_pairs(
        self, z: Tensor, conditions: Condition, batch_size: int | None, progress: Progress | None
    ) -> Tensor:
        """Log-densities of all latents (B, ...) under all conditions (K), shape (B, K)."""
        count = conditions.batch_size or 1
        pairs = torch.arange(len(z) * count, device=z.device)
        rows, columns = pairs // count, pairs % count
        size = _size(batch_size, len(z))
        return self._parts(z, rows, conditions, columns, size, progress).reshape(len(z), count)

    def _nats_in_parts(
        self, z: Tensor, condition: Condition | None, batch_size: int | None, progress: Progress | None
    ) -> Tensor:
        """Log-densities of latents (B, ...), each under its own condition, shape (B,)."""
        check_condition(self.network, condition)
        moved = None if condition is None else condition.to(z.device)
        rows = torch.arange(len(z), device=z.device)
        return self._parts(z, rows, moved, rows, _size(batch_size, len(z)), progress)

    def _parts(
        self,
        z: Tensor,
        rows: Tensor,
        condition: Condition | None,
        columns: Tensor,
        size: int,
        progress: Progress | None,
    ) -> Tensor:
        """Log-densities of the latents ``rows`` under the conditions ``columns``, ``size`` at once."""
        nats = []
        with evaluation(self):  # type: ignore[arg-type]
            for chosen, named in zip(rows.split(size), columns.split(size), strict=True):
                part = z[chosen]
                nats.append(self.latent_log_prob(part, rows_of(condition, named)) + self.latent_volume(part))
                if progress is not None:
                    progress(sum(map(len, nats)), len(rows))
        return torch.cat(nats)

    def _candidates(self, given: Sequence[int] | Sequence[str] | None) -> tuple[list[int], Condition]:
        """Labels to be returned, and their conditions."""
        streams, device = self.network.streams, self.device  # type: ignore[attr-defined]
        if "label" in streams:
            classes = _classes(given, self.network.num_classes)
            return classes, Condition(label=torch.tensor(classes, device=device))
        if "tokens" not in streams:
            name = type(self.network).__name__
            raise ValueError(f"classification compares conditions, but {name} reads {list(streams) or 'none'}")
        if not given or not all(isinstance(caption, str) for caption in given):
            raise ValueError(f"candidates must be captions for a network that reads tokens, got {given!r}")
        if self.text is None:
            raise ValueError("candidates are captions, but there is no text encoder: give the module text=...")
        return list(range(len(given))), Condition(tokens=self.text.encode(list(given), device=device))

    def _marginal(self, condition: Condition | None, marginal: Marginal | None, prior: Prior | None) -> str:
        """How data are judged: under the "condition", by the sum over "classes", or by the "null" branch."""
        streams = self.network.streams
        if marginal is not None and marginal not in get_args(Marginal):
            raise ValueError(f"marginal must be one of {get_args(Marginal)}, got {marginal!r}")
        if condition is not None and marginal is not None:
            raise ValueError(f"marginal={marginal!r} is the density without a condition, but there is one")
        if marginal == "classes" and "label" not in streams:
            raise ValueError(f"marginal='classes' needs a network that reads labels, got streams {list(streams)}")
        summed = condition is None and "label" in streams and marginal != "null"
        if prior is not None and not summed:
            raise ValueError("prior is that of classes, but no sum over classes is asked for")
        return "classes" if summed else "null" if condition is None else "condition"


def _size(batch_size: int | None, samples: int) -> int:
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    return samples if batch_size is None else batch_size


def _classes(given: Sequence[Any] | None, count: int) -> list[int]:
    if given is None:
        return list(range(count))
    whole = all(isinstance(label, int) and not isinstance(label, bool) for label in given)
    if not whole or not given or len(set(given)) < len(given) or not 0 <= min(given) <= max(given) < count:
        raise ValueError(f"candidates must be different classes in [0, {count}), got {given!r}")
    return list(given)


def _log_prior(prior: Prior | None, count: int) -> Tensor:
    """Log-probabilities, float64, shape (K,)."""
    weights = torch.ones(count) if prior is None else torch.as_tensor(prior)
    weights = weights.double().cpu()
    if weights.shape != (count,) or not bool((weights >= 0).all() and 0 < weights.sum() < torch.inf):
        raise ValueError(f"prior must be {count} numbers >= 0, not all of them 0, got {weights.tolist()}")
    return (weights / weights.sum()).log()


def _reference(method: AnomalyMethod, reference: float | Sequence[float] | Tensor | None) -> float | None:
    if method not in get_args(AnomalyMethod):
        raise ValueError(f"method must be one of {get_args(AnomalyMethod)}, got {method!r}")
    if (reference is None) == (method == "typicality"):
        raise ValueError(f"reference (nats per dimension) goes with method='typicality', got {reference} for {method}")
    if reference is None:
        return None
    mean = float(torch.as_tensor(reference, dtype=torch.float64).mean())
    if not abs(mean) < torch.inf:
        raise ValueError(f"reference must be finite numbers, got {reference!r}")
    return mean
