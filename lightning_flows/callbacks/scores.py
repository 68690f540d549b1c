"""What `Evaluation` counts and hands to its metrics; knows metrics and batches, but no trainer."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_flows.callbacks.results import Json, plain


class Scores:
    """Metrics, and the counts of what they were given by this process.

    Args:
        metrics: with different names.
        samples: samples scored of all processes together, None for all.
        minimum: see `Evaluation`.

    Attributes:
        totals: real items, scored samples, drawn samples, seconds of drawing, float64 (4,).
        nfe: most network calls of a batch.

    Raises:
        ValueError: two metrics of one name.
    """

    def __init__(self, metrics: list[Metric], samples: int | None, minimum: int | Literal["needed"] | None) -> None:
        self.metrics = {name_of(metric): metric for metric in metrics}
        if len(self.metrics) != len(metrics):
            raise ValueError(f"Evaluation: metrics must have different names, got {[name_of(m) for m in metrics]}.")
        self.distances = {name: metric for name, metric in self.metrics.items() if consumed_by(metric) is None}
        self.samples, self.minimum = samples, minimum
        self._forget()

    def begin(self, device: torch.device) -> None:
        """Empty metrics on a device, with extractors that are ready."""
        self._forget()
        for metric in self.metrics.values():
            getattr(metric, "prepare", lambda: None)()
            metric.to(device).reset()

    def _forget(self) -> None:
        self.totals, self.nfe = torch.zeros(4, dtype=torch.float64), 0

    def complete(self, place: int) -> bool:
        """Whether a place and all after it are beyond the samples asked for."""
        return self.samples is not None and place >= self.samples

    def lacking(self, outputs: Json) -> list[str]:
        """Outputs that metrics consume and that are not there, but for the density, which `Evaluation` computes."""
        wanted = {name for metric in self.metrics.values() for name in consumed_by(metric) or ()}
        return sorted(name for name in wanted - {"log_prob", "dims"} if outputs.get(name) is None)

    def draws(self, outputs: Json) -> bool:
        """Whether a look needs more than a step of the validation gave: samples, or what a metric consumes."""
        return bool(self.distances or self.lacking(outputs))

    def logged(self, name: str, entry: Json) -> Any:
        """The part of a plain value that is logged."""
        keys, value = getattr(self.metrics[name], "logged", None), entry["value"]
        return {key: value[key] for key in keys} if keys is not None and isinstance(value, dict) else value

    def add_real(self, outputs: Json, fresh: Tensor) -> None:
        """Hand the real items to the distances, and what they consume to the other metrics.

        Args:
            outputs: of a step.
            fresh: which items were not counted before, bool (B,).

        Raises:
            ValueError: an output that a metric needs is missing.
        """
        for name, metric in self.metrics.items():
            self._check(name, metric, outputs)
        real = outputs.get("real")
        if real is not None:
            real = pick(real, fresh)
            self.totals[0] += len(real)
            for metric in self.distances.values():  # one after the other: they share the features of one tensor
                if len(real) and sees_items(metric):
                    metric.update(real, real=True)
        for metric in self.metrics.values():
            wanted = consumed_by(metric)
            if wanted is not None and all(outputs.get(name) is not None for name in wanted):
                metric.update(*(pick(outputs[name], fresh) for name in wanted))

    def _check(self, name: str, metric: Metric, outputs: Json) -> None:
        wanted = consumed_by(metric)
        without_data = "sample" in outputs and outputs.get("real") is None
        if wanted is None and not sees_items(metric):
            return
        if wanted is not None and "log_prob" in wanted and without_data:
            return  # latents whose data are not there have no such density; the result says that it was never given
        missing = [key for key in wanted or ("real",) if outputs.get(key) is None]
        if missing:
            given = sorted(key for key, value in outputs.items() if value is not None)
            hint = "a saved reference can stand for real items (lightning-flows statistics)"
            if wanted:
                hint = f"data and module have no {' or '.join(missing)}: take the metric away, or give what it reads"
            raise ValueError(f"Evaluation: {name} needs {missing}, the step gave {given}; {hint}.")

    def add_samples(self, outputs: Json, places: Tensor, fresh: Tensor) -> None:
        """Hand samples to the distances, as many as are asked for.

        Args:
            outputs: of a step, with ``sample`` (B, ...).
            places: of the samples among those of all processes, int64 (B,).
            fresh: which were not counted before, bool (B,).
        """
        sample = outputs["sample"]
        scored = pick(sample, fresh if self.samples is None else fresh & (places < self.samples))
        counts = (0, len(scored), len(sample), outputs.get("seconds", 0.0))
        self.totals += torch.tensor(counts, dtype=torch.float64)
        self.nfe = max(self.nfe, int(outputs.get("nfe", 0)))
        for metric in self.distances.values():
            if len(scored):
                metric.update(scored, real=False)

    def needed(self, name: str) -> int:
        """Items of each set below which a value is refused, as far as this process knows; 0 never refuses."""
        if self.minimum is None or name not in self.distances:
            return 0
        return int(getattr(self.metrics[name], "needed", 1)) if self.minimum == "needed" else int(self.minimum)

    def entry(self, name: str, real: int, samples: int, needed: int = 0) -> Json:
        """Value of a metric and what it was computed from; the counts are those of all processes."""
        metric = self.metrics[name]
        reference = getattr(metric, "reference", None)
        real = real if reference is None else reference.count
        value, caution = self._value(name, metric, real, samples, needed)
        consumed = consumed_by(metric)
        counts = {"real": real} if consumed is None or {"real", "mask", "label"} & {*consumed} else {}
        counts |= {"samples": samples} if consumed is None else {}
        settings = getattr(metric, "settings", dict)()
        entry = {"value": plain(value), **counts, "extractor": getattr(metric, "extractor", None), **settings}
        return entry | ({"caution": caution} if caution else {})

    def _value(self, name: str, metric: Metric, real: int, samples: int, needed: int) -> tuple[Any, str | None]:
        """Value and caution. A metric that lacks items must not cost the others: it is None, with the reason."""
        caution = getattr(metric, "caution", None)
        text = caution(real, samples) if callable(caution) else None
        value, refusal = None, _refusal(name, metric, real, samples, needed)
        if refusal is None:
            try:
                value = metric.compute()
            except (ValueError, RuntimeError) as error:
                refusal = f"{name} could not be computed: {error}"
        if refusal or text:
            rank_zero_warn(f"Evaluation: {refusal or text}.")
        return value, refusal or text


def _refusal(name: str, metric: Metric, real: int, samples: int, needed: int) -> str | None:
    compares = sees_items(metric) or getattr(metric, "reference", None) is not None
    counted = {"samples": samples, **({"real items": real} if compares else {})}
    few = [f"{count} {which}" for which, count in counted.items() if count < needed]
    return f"{name} refused: it needs {needed} items of each set, there are {' and '.join(few)}" if few else None


def sees_items(metric: Metric) -> bool:
    """Whether real items have to be shown to a metric: no reference stands for them, and it compares with any."""
    return getattr(metric, "needs_real", True)


def name_of(metric: Metric) -> str:
    """The name of a metric's value."""
    name = getattr(metric, "name", None)
    return name if isinstance(name, str) else type(metric).__name__


def consumed_by(metric: Metric) -> tuple[str, ...] | None:
    """Names of the outputs that a metric takes, None for ``(x, real)``."""
    return getattr(metric, "consumes", None)


def pick(value: Any, which: Tensor) -> Any:
    """The chosen items of a tensor (B, ...); the very same tensor where all are chosen, other values as they are."""
    if not isinstance(value, Tensor) or value.ndim == 0 or bool(which.all()):
        return value
    return value[which.to(value.device)]
