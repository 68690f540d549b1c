"""What is measured of normalizing flows alone: whether they undo themselves, and what their densities know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from benchmarks import common
from lightning_flows.flow import SampleNoise, key
from lightning_flows.modules import NormalizingFlow
from lightning_flows.modules.base import evaluation
from lightning_flows.networks import Automatic, Sequential

MOST_ERROR, MOST_LOG_DET = 1e-3, 1e-4  # bars of `invertibility`
_ROWS = 250  # images handled at once


def is_flow(model: Any) -> bool:
    """Whether a model is a normalizing flow, whose network goes both ways."""
    return isinstance(model, NormalizingFlow)


def setting_of(model: NormalizingFlow, options: Mapping[str, Any]) -> dict[str, Any]:
    """How a flow draws samples, where flow matching has a solver and steps."""
    noise = model.objective.data_noise
    denoise = options.get("denoise", model.denoise)
    return {
        "method": repr(options.get("method") or model.method or Automatic()),
        "denoise": denoise if noise.std else 0.0,  # only Gaussian noise can be removed
        "data_noise": repr(noise),
    }


def noisy(model: NormalizingFlow, images: Tensor, purpose: str, first: int = 0) -> Tensor:
    """Latents (N, C, H, W) with the noise of the training, keyed by a purpose and the place of an image from ``first``.

    Args:
        model: a flow.
        images: data, shape (N, C', H', W').
        purpose: what the draws are for.
        first: place of the first image.
    """
    noise = SampleNoise([key(purpose, first + i) for i in range(len(images))])
    return model.objective.data_noise.add(model.encode(images, noise), noise)


# ------------------------------------------------------------------ both ways


@torch.no_grad()
def invertibility(model: NormalizingFlow, images: Tensor, labels: Tensor) -> dict[str, dict[str, Any]]:
    """Largest errors of latents that were turned into noise and back, token by token, in float32.

    Args:
        model: a flow.
        images: real images (N, C', H', W'); the training's noise is added to their latents.
        labels: of the images (N,), for a flow that reads them.

    Returns:
        ``inverse_error``, max |x - inverse(forward(x))| in units of the latents, and ``log_det_error``, max
        |log_det_forward + log_det_inverse| in nats per dimension; each beside its bar.
    """
    errors, sums = [], []
    with evaluation(model):
        for rows in torch.arange(len(images)).split(_ROWS):
            x = noisy(model, images[rows].to(model.device), "invertibility", int(rows[0]))
            condition = model.condition_of({"label": labels[rows].to(model.device)})
            z, log_det = model.network(x, model.filled(condition))
            back = model.draw(z, condition, guidance=1.0, method=Sequential())
            errors.append((x - back.x).abs().max())
            sums.append((log_det + back.log_det).abs().max() / x[0].numel())
    how = {
        "real": len(images), "guidance_scale": 1.0, "method": repr(Sequential()),
        "data_noise": repr(model.objective.data_noise), "precision": "float32", **machine(model),
    }  # fmt: skip
    return {
        "inverse_error": {"value": torch.stack(errors).max().item(), "bar": MOST_ERROR, **how},
        "log_det_error": {"value": torch.stack(sums).max().item(), "bar": MOST_LOG_DET, **how},
    }


def missed(values: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What is not below its bar (not a number: neither)."""
    found = [(name, entry["value"], entry["bar"]) for name, entry in values.items() if "bar" in entry]
    return [f"{name} is {value:.3g}, at most {bar:g} is allowed" for name, value, bar in found if not value <= bar]


def finite_samples(model: NormalizingFlow, count: int, seed: int) -> dict[str, dict[str, Any]]:
    """Share of ``count`` samples of a flow without condition that did not run away."""
    each = model.sample(n=count, seed=seed, batch_size=_ROWS).flatten(1).isfinite().all(1)
    how = {"samples": count, "seed": seed, **setting_of(model, {}), **machine(model)}
    return {"finite_samples": {"value": each.double().mean().item(), **how}}


# ------------------------------------------------------------------ densities


def classification(model: NormalizingFlow, images: Tensor, labels: Tensor) -> dict[str, dict[str, Any]]:
    """Share of real images (N, C, H, W) whose own label makes them likeliest, by Bayes' rule with equal priors.

    Once as they are, and once with the noise of the training, for a flow in pixels.
    """
    rows = torch.arange(len(images)).split(_ROWS)
    seen = {
        "likelihood_accuracy": images,
        "likelihood_accuracy[data noise]": torch.cat(
            [model.decode(noisy(model, images[r].to(model.device), "classification", int(r[0]))) for r in rows]
        ),
    }
    how = {"real": len(images), "data_noise": repr(model.objective.data_noise), **machine(model)}
    found = {name: [model.classify(x[r], batch_size=_ROWS).label.cpu() for r in rows] for name, x in seen.items()}
    return {
        name: {"value": (torch.cat(parts) == labels).double().mean().item(), **how} for name, parts in found.items()
    }


def report(values: Mapping[str, Mapping[str, Any]]) -> str:
    """A table of figures of one number each."""
    names = ("bar", "judge_accuracy", "standard_error", "real", "samples", "method", "denoise", "data_noise")
    rows = [
        [name, f"{entry['value']:.4g}", ", ".join(f"{part}: {entry[part]}" for part in names if part in entry)]
        for name, entry in values.items()
    ]
    return common.table(["score", "value", "beside"], rows)


def machine(model: NormalizingFlow) -> dict[str, Any]:
    """Where figures were computed."""
    return {"device": str(model.device), "threads": torch.get_num_threads()}
