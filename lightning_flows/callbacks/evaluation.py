"""Scores of samples beside real items, logged and written with everything needed to read them.

A distance without its extractor, counts, seed, guidance and network calls cannot be compared with anything,
so `metrics.json` holds them in every entry. The metrics are handed in: any `torchmetrics.Metric` whose update
takes `(x, real=bool)`, or one that names the outputs it `consumes`.
"""

from __future__ import annotations

import json
import math
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics import Metric

from lightning_flows.flow import Hutchinson, SampleNoise, dequantize, key

Json = dict[str, Any]


class Evaluation(Callback):
    """Updates metrics with what `test_step` gives, logs them and writes `<default_root_dir>/metrics.json`.

    `test_step` returns a dict with `real` and `sample` (B, ...), `nfe` (calls of the network per sample) and
    `seconds` (of the batch). A metric has `update(x, real=bool)`; its optional attributes are `name` (of the
    value), `extractor` (written beside it), `caution(real, samples)` (a sentence when the counts are too
    small: it is warned about and written) and `consumes` (names of outputs that its update takes instead,
    such as `("losses", "t")` for the losses of `validation_step`).

    `metrics.json` has one block per stage, `{"test": {"values": {name: entry}, "logged", "versions"}}`; an
    entry holds `value` (a number, a dict or list of them, or null when it could not be computed), the counts
    `real` and `samples`, `extractor`, `seed`, `guidance_scale`, `solver`, `steps`, `nfe`,
    `seconds_per_sample`, `device`, and inside a fit `epoch` and `step`. `logged` is what the module itself logged in
    the stage.
    There is no date: equal runs give equal files but for the seconds.

    Args:
        metrics: None for none: then calls and seconds are still written.
        max_samples: of all processes together; further samples are not scored, real items always are.
        on: `test`, or `validation` for a look during the fit (one sample is drawn per real item there, with
            the averaged weights where there are any).
        every_n_epochs: epochs between looks during a fit.
        probes: of the Hutchinson divergence, for metrics that consume ``log_prob`` (`metrics.BitsPerDim`): it is
            unbiased and its noise averages out over the items. 0 is the exact divergence, one backward pass a
            dimension.

    Raises:
        ValueError: a count below 1, an unknown stage, two metrics of one name, or outputs that lack a name.
    """

    def __init__(
        self,
        metrics: list[Metric] | None = None,
        *,
        max_samples: int | None = None,
        on: Literal["test", "validation"] = "test",
        every_n_epochs: int = 1,
        probes: int = 4,
    ) -> None:
        if probes < 0:
            raise ValueError(f"Evaluation: probes must not be negative, got {probes}.")
        self.probes = probes
        for name, value in (("max_samples", max_samples), ("every_n_epochs", every_n_epochs)):
            if value is not None and value < 1:
                raise ValueError(f"Evaluation: {name} must be at least 1, got {value}.")
        if on not in ("test", "validation"):
            raise ValueError(f"Evaluation: on must be 'test' or 'validation', got {on!r}.")
        self.metrics = {_name(metric): metric for metric in metrics or []}
        if len(self.metrics) != len(metrics or []):
            names = [_name(metric) for metric in metrics or []]
            raise ValueError(f"Evaluation: metrics must have different names, got {names}.")
        self.max_samples, self.on, self.every_n_epochs = max_samples, on, every_n_epochs
        self.prefix = "test" if on == "test" else "val"
        self._totals = torch.zeros(4, dtype=torch.float64)  # real items, scored samples, all samples, seconds
        self._nfe = 0
        self._entries: dict[str, Json] = {}

    # ------------------------------------------------------------------ hooks

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with empty metrics."""
        if self.on == "test":
            self._begin(pl_module)

    def on_test_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take in a batch."""
        if self.on == "test":
            self._take(trainer, self._with_log_prob(pl_module, outputs, batch))

    def on_test_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute and log."""
        if self.on == "test":
            self._finish(trainer, pl_module)

    def on_test_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write, now that what the module logged is complete."""
        if self.on == "test":
            self._write(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with empty metrics."""
        if self._looks(trainer):
            self._begin(pl_module)

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Sample beside a batch, and take both in."""
        if not self._looks(trainer):
            return
        outputs = dict(outputs) if isinstance(outputs, dict) else {}
        if "sample" not in outputs and any(_consumes(metric) is None for metric in self.metrics.values()):
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                outputs.update(pl_module.test_step(batch, batch_idx))
        self._take(trainer, self._with_log_prob(pl_module, outputs, batch))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Compute and log."""
        if self._looks(trainer):
            self._finish(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write."""
        if self._looks(trainer):
            self._write(trainer)

    # ------------------------------------------------------------------ work

    def _looks(self, trainer: L.Trainer) -> bool:
        if self.on != "validation" or trainer.sanity_checking:
            return False
        return trainer.state.fn != "fit" or (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def _begin(self, pl_module: L.LightningModule) -> None:
        self._totals, self._nfe, self._entries = torch.zeros(4, dtype=torch.float64), 0, {}
        for metric in self.metrics.values():
            metric.to(pl_module.device).reset()

    def _with_log_prob(self, pl_module: L.LightningModule, outputs: Any, batch: Any) -> Any:
        """The outputs with ``log_prob`` (B,) of the real items and their ``dims``, where a metric asks for them."""
        asking = [metric for metric in self.metrics.values() if "log_prob" in (_consumes(metric) or ())]
        if not asking or not isinstance(outputs, dict) or "log_prob" in outputs:
            return outputs
        x = outputs["real"]
        noise = SampleNoise([key("evaluation", int(i)) for i in outputs.get("index", range(len(x)))])
        levels = getattr(asking[0], "levels", None)
        if levels is not None:  # grey levels; without them the density of the data as they are
            x = dequantize(x, levels, noise)
        options = {"divergence": Hutchinson(self.probes)} if self.probes else {}
        with torch.no_grad():
            log_prob = pl_module.log_prob(x, pl_module.condition_of(batch), **options)
        return {**outputs, "log_prob": log_prob, "dims": pl_module.density_dims(x)}

    @torch.no_grad()
    def _take(self, trainer: L.Trainer, outputs: Any) -> None:
        outputs = outputs if isinstance(outputs, dict) else {}
        real, sample = outputs.get("real"), outputs.get("sample")
        if sample is not None:
            left = self._left(trainer)
            scored = sample if left is None else sample[:left]
            counts = (0 if real is None else len(real), len(scored), len(sample), outputs.get("seconds", 0.0))
            self._totals += torch.tensor(counts, dtype=torch.float64)
            self._nfe = max(self._nfe, int(outputs.get("nfe", 0)))
        for name, metric in self.metrics.items():
            wanted = _consumes(metric)
            missing = [key for key in wanted or ("real", "sample") if outputs.get(key) is None]
            if missing:
                raise ValueError(f"Evaluation: {name} needs {missing}, the step gave {sorted(outputs)}.")
            if wanted is not None:
                metric.update(*(outputs[key] for key in wanted))
                continue
            metric.update(real, real=True)
            if len(scored):
                metric.update(scored, real=False)

    def _left(self, trainer: L.Trainer) -> int | None:
        if self.max_samples is None:
            return None
        return max(0, math.ceil(self.max_samples / trainer.world_size) - int(self._totals[1]))

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        totals = trainer.strategy.reduce(self._totals.to(pl_module.device), reduce_op="sum").tolist()
        real, scored, drawn, seconds = int(totals[0]), int(totals[1]), int(totals[2]), totals[3]
        setting = _setting(trainer, pl_module)
        if drawn:
            setting |= {"nfe": self._nfe, "seconds_per_sample": seconds / drawn}
            pl_module.log(f"{self.prefix}/nfe", float(self._nfe))
            pl_module.log(f"{self.prefix}/seconds_per_sample", seconds / drawn)
        for name, metric in self.metrics.items():
            counts = self._counts(metric, real, scored)
            value, caution = _evaluate(name, metric, real, scored)
            entry = {"value": _plain(value), **counts, "extractor": getattr(metric, "extractor", None)}
            self._entries[name] = entry | setting | ({"caution": caution} if caution else {})
            for label, number in _scalars(f"{self.prefix}/{name}", _plain(value)):
                pl_module.log(label, number)
        if not self.metrics and drawn:
            self._entries["sampling"] = {"value": None, "real": real, "samples": drawn, **setting}

    def _counts(self, metric: Metric, real: int, scored: int) -> Json:
        """What the value of a metric was computed from."""
        consumed = _consumes(metric)
        if consumed is None:
            return {"real": real, "samples": scored}
        if "log_prob" not in consumed:
            return {}
        divergence = f"Hutchinson(probes={self.probes})" if self.probes else "Exact()"
        return {"real": real, "divergence": divergence, "levels": getattr(metric, "levels", None)}

    def _write(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        own = {key for name, entry in self._entries.items() for key, _ in _scalars(name, entry["value"])}
        own |= {"nfe", "seconds_per_sample"}
        stage = [key for key in sorted(trainer.callback_metrics) if key.startswith(f"{self.prefix}/")]
        logged = {key.partition("/")[2]: trainer.callback_metrics[key] for key in stage}
        block = {
            "values": self._entries,
            "logged": {key: _plain(value) for key, value in logged.items() if key not in own},
            "versions": {name: version(name) for name in ("lightning-flows", "torch", "lightning")},
        }
        _update_json(Path(trainer.default_root_dir) / "metrics.json", self.prefix, block)


def _name(metric: Metric) -> str:
    name = getattr(metric, "name", None)
    return name if isinstance(name, str) else type(metric).__name__


def _consumes(metric: Metric) -> tuple[str, ...] | None:
    return getattr(metric, "consumes", None)


def _evaluate(name: str, metric: Metric, real: int, samples: int) -> tuple[Any, str | None]:
    """Value and caution. A metric that lacks items must not cost the others: it is None, with the reason."""
    caution = getattr(metric, "caution", None)
    text = caution(real, samples) if callable(caution) else None
    try:
        value = metric.compute()
    except (ValueError, RuntimeError) as error:
        value, text = None, f"{name} could not be computed: {error}"
    if text:
        rank_zero_warn(f"Evaluation: {text}.")
    return value, text


def _setting(trainer: L.Trainer, pl_module: L.LightningModule) -> Json:
    """What the samples were drawn with; None where the family has no such thing."""
    guidance, solver = getattr(pl_module, "guidance", None), getattr(pl_module, "solver", None)
    device = pl_module.device
    return {
        "seed": int(os.environ.get("PL_GLOBAL_SEED", 0)),
        "guidance_scale": 1.0 if guidance is None else getattr(guidance, "scale", None),
        "guidance": None if guidance is None else repr(guidance),
        "solver": None if solver is None else repr(solver),
        "steps": getattr(pl_module, "steps", None),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        **({"epoch": trainer.current_epoch, "step": trainer.global_step} if trainer.state.fn == "fit" else {}),
    }


def _plain(value: Any) -> Any:
    """Tensors, dicts and sequences of them as JSON values; NaN and infinity, which JSON lacks, as None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _scalars(name: str, value: Any) -> list[tuple[str, float]]:
    """Names and numbers of a plain value: `name`, `name/key`, `name/0`."""
    if isinstance(value, (dict, list)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [pair for key, item in items for pair in _scalars(f"{name}/{key}", item)]
    return [] if value is None else [(name, float(value))]


def _update_json(file: Path, key: str, block: Json) -> None:
    """Replace one block of a JSON file, whole or not at all; the other blocks stay."""
    try:
        content = json.loads(file.read_text()) if file.exists() else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"Evaluation: {file} is no JSON file: {error}") from None
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.{os.getpid()}")
    partial.write_text(json.dumps(content | {key: block}, indent=2, allow_nan=False) + "\n")
    partial.replace(file)
