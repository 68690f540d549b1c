"""The density of the real items, for metrics that consume `log_prob`, and how the result says it was computed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import lightning as L
from torchmetrics import Metric

from lightning_flows.callbacks.results import Json
from lightning_flows.callbacks.scores import consumed_by
from lightning_flows.flow import Hutchinson, SampleNoise, dequantize, key


def asks(metric: Metric) -> bool:
    """Whether a metric consumes `log_prob`."""
    return "log_prob" in (consumed_by(metric) or ())


def with_log_prob(
    metrics: Iterable[Metric], pl_module: L.LightningModule, outputs: Json, batch: Any, probes: int
) -> Json:
    """The outputs with ``log_prob`` (B,) of the real items and their ``dims``, where a metric asks for them."""
    asking = [metric for metric in metrics if asks(metric)]
    if not asking or "log_prob" in outputs:
        return outputs
    x = outputs["real"] if outputs.get("real") is not None else pl_module.data_of(batch)
    noise = SampleNoise([key("evaluation", int(i)) for i in outputs.get("index", range(len(x)))])
    levels = getattr(asking[0], "levels", None)
    if levels is not None:  # grey levels; without them the density of the data as they are
        x = dequantize(x, levels, noise)
    options = {"divergence": Hutchinson(probes)} if _estimated(pl_module, probes) else {}
    log_prob = pl_module.log_prob(x, pl_module.condition_of(batch), **options)
    return {**outputs, "log_prob": log_prob, "dims": pl_module.density_dims(x)}


def description(metric: Metric, real: int, pl_module: L.LightningModule, probes: int) -> Json:
    """How a likelihood was computed; empty for other metrics."""
    if not asks(metric):
        return {}
    divergence = f"Hutchinson(probes={probes})" if _estimated(pl_module, probes) else "Exact()"
    return {"real": real, "divergence": divergence, "levels": getattr(metric, "levels", None)}


def _estimated(pl_module: L.LightningModule, probes: int) -> bool:
    """Whether there is a divergence to estimate: a normalizing flow has none."""
    return bool(probes) and not getattr(pl_module, "exact_log_prob", False)
