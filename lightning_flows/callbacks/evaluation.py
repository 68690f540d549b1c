"""Scores of samples beside real items, logged and written with everything needed to read them.

A distance without its extractor, counts, seed, guidance and network calls cannot be compared with anything,
so `metrics.json` holds them in every entry. The metrics are handed in: any `torchmetrics.Metric` whose update
takes `(x, real=bool)`, or one that names the outputs it `consumes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader
from torchmetrics import Metric

from lightning_flows.callbacks import density, results
from lightning_flows.callbacks.places import Places
from lightning_flows.callbacks.results import Json
from lightning_flows.callbacks.scores import Scores, sees_items
from lightning_flows.callbacks.throughput import batch_size


class Evaluation(Callback):
    """Updates metrics with what `test_step` gives, logs them and writes `<default_root_dir>/metrics.json`.

    `test_step` returns a dict with `real` (B, ...) or None, `sample` (B, ...), `nfe` (calls of the network per sample)
    and `seconds` (of the batch). A metric has `update(x, real=bool)`; its optional attributes are `name` (of the
    value), `extractor` and `settings()` (written beside it), `prepare()` (called before anything is sampled),
    `needs_real` (False where a saved `reference` stands for the real items), `caution(real, samples)` (a sentence
    when the counts are too small: it is warned about and written), `needed` (see ``minimum``), `logged` (keys of a dict
    value that are logged, where not all are) and `consumes` (names of outputs that its update takes instead, such as
    `("losses", "t")` for the losses of `validation_step`); a look takes from `test_step` what those lack.

    `metrics.json` has one block per stage, `{"test": {"values": {name: entry}}, "logged", "versions"}`; an
    entry holds `value` (a number, a dict or list of them, or null when it could not be computed), the counts
    `real` and `samples`, `extractor`, the metric's settings, `seed`, `guidance_scale`, `solver`, `steps`, `nfe`,
    `seconds_per_sample`, `device`, `precision`, and inside a fit `epoch` and `step`. `logged` is what the module itself
    logged in the stage. There is no date: equal runs give equal files but for the seconds. Where batches hold cached
    latents and no images, `real_items` says that the real items are what the latents decode to.

    Several processes give the values of one: each item and each sample counts once, also where a sampler repeats
    items so that all processes have equally many.

    Args:
        metrics: None for none: then calls and seconds are still written.
        samples: number of samples scored, of all processes together; None is one for each item. More than there are
            items are drawn in further rounds over their conditions, with other seeds. Real items count once.
        per_item: number of samples drawn for each item, in place of ``samples``. The values from one for each item
            keep their names, those from all of them are called ``fid[per_item=17]``, and `samples_per_item` says it:
            distances of small sets are too large, so the two do not compare. Metrics that consume outputs see the
            first sample of an item.
        minimum: items of each set below which a distance is refused (its value is null, with the reason): a
            number, or ``"needed"``, what each metric says it needs: one more than features for a Frechet distance.
            None computes it all the same and writes the caution.
        on: `test`, or `validation` for a look during the fit (with the averaged weights where there are any).
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
        samples: int | None = None,
        per_item: int | None = None,
        minimum: int | Literal["needed"] | None = None,
        on: Literal["test", "validation"] = "test",
        every_n_epochs: int = 1,
        probes: int = 4,
    ) -> None:
        if probes < 0:
            raise ValueError(f"Evaluation: probes must not be negative, got {probes}.")
        if isinstance(minimum, str) and minimum != "needed":
            raise ValueError(f"Evaluation: minimum must be a number, 'needed' or None, got {minimum!r}.")
        counts = {"samples": samples, "per_item": per_item, "minimum": minimum, "every_n_epochs": every_n_epochs}
        for name, value in counts.items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"Evaluation: {name} must be at least 1, got {value}.")
        if samples is not None and per_item is not None:
            raise ValueError(f"Evaluation: samples must be None beside per_item={per_item}, got {samples}.")
        if on not in ("test", "validation"):
            raise ValueError(f"Evaluation: on must be 'test' or 'validation', got {on!r}.")
        self.scores = Scores(metrics or [], samples, minimum)
        self.samples, self.per_item, self.probes = samples, per_item, probes
        self.on, self.every_n_epochs = on, every_n_epochs
        self.prefix = "test" if on == "test" else "val"
        self._entries: dict[str, Json] = {}

    @property
    def metrics(self) -> dict[str, Metric]:
        """The metrics by name."""
        return self.scores.metrics

    # ------------------------------------------------------------------ hooks

    def on_test_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin with empty metrics."""
        if self.on == "test":
            self._begin(trainer, pl_module)

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
            self._take(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

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
            self._begin(trainer, pl_module)

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
        if self._looks(trainer):
            self._take(trainer, pl_module, outputs, batch, batch_idx, dataloader_idx)

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

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._entries, self._batches = {}, {}  # of each loader: batches seen
        self._decoded = False
        self._places = Places(trainer.global_rank, trainer.world_size)
        self.scores.begin(pl_module.device)

    @torch.no_grad()
    def _take(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int, which: int
    ) -> None:
        """Count a batch, and draw beside it where the step has not."""
        self._batches[which] = batch_idx + 1
        self._decoded |= isinstance(batch, Mapping) and "latent" in batch and "image" not in batch
        places, fresh = self._places.take(batch_size(batch), self._loaders(trainer)[which], which)
        outputs = dict(outputs) if isinstance(outputs, dict) else {}
        if self.on == "validation" and "sample" not in outputs and self.scores.draws(outputs):
            if self.scores.lacking(outputs) or not self.scores.complete(self._places.first(places)):
                outputs |= self._draw(trainer, pl_module, batch, batch_idx)
            elif hasattr(pl_module, "data_of"):
                outputs["real"] = pl_module.data_of(batch)
        outputs = density.with_log_prob(self.metrics.values(), pl_module, outputs, batch, self.probes)
        self.scores.add_real(outputs, fresh)
        if outputs.get("sample") is not None:
            self.scores.add_samples(outputs, places, fresh)

    def _loaders(self, trainer: L.Trainer) -> list[Any]:
        loaders = trainer.test_dataloaders if self.on == "test" else trainer.val_dataloaders
        loaders = loaders.values() if isinstance(loaders, Mapping) else loaders
        return [loaders] if isinstance(loaders, DataLoader) or not isinstance(loaders, Iterable) else list(loaders)

    def _draw(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int) -> Json:
        with trainer.precision_plugin.forward_context():
            return pl_module.test_step(batch, batch_idx)

    @torch.no_grad()
    def _further_rounds(self, trainer: L.Trainer, pl_module: L.LightningModule, size: int, wanted: int) -> None:
        """Draw what is wanted beyond one sample for each of ``size`` items, under their conditions again."""
        if not size or not self.scores.distances:
            return
        for start in range(size, wanted, size):
            self._places.restart()
            for which, loader in enumerate(self._loaders(trainer)):
                for batch_idx, batch in enumerate(itertools.islice(loader, self._batches.get(which, 0))):
                    places, fresh = self._places.take(batch_size(batch), loader, which)
                    if self.scores.complete(self._places.first(places) + start):
                        break
                    batch = _renumbered(trainer.strategy.batch_to_device(batch, dataloader_idx=which), places + start)
                    outputs = self._draw(trainer, pl_module, batch, batch_idx)
                    self.scores.add_samples(outputs, places + start, fresh)

    def _finish(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        size = int(trainer.strategy.reduce(self._places.fresh(pl_module.device), reduce_op="sum"))
        again = (self.per_item or 1) > 1
        if again:
            self._score(trainer, pl_module, self.metrics, size)
        self._further_rounds(trainer, pl_module, size, size * self.per_item if self.per_item else self.samples or 0)
        suffix = f"[per_item={self.per_item}]" if again else ""
        setting = self._score(trainer, pl_module, self.scores.distances if again else self.metrics, size, suffix)
        for name in ("nfe", "seconds_per_sample"):
            if name in setting:
                pl_module.log(f"{self.prefix}/{name}", float(setting[name]))

    def _score(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        metrics: Mapping[str, Metric],
        size: int,
        suffix: str = "",
    ) -> Json:
        """Compute and log metrics from what was seen of ``size`` items until now; gives what samples are drawn with."""
        totals = self.scores.totals.clone().to(pl_module.device)  # they are summed in place, and perhaps once more
        totals = trainer.strategy.reduce(totals, reduce_op="sum").tolist()
        self._refuse_idle(trainer)
        nfe = _most(trainer, self.scores.nfe)
        real, scored, drawn, seconds = int(totals[0]), int(totals[1]), int(totals[2]), totals[3]
        setting = results.setting(trainer, pl_module)
        setting |= {"nfe": nfe, "seconds_per_sample": seconds / drawn} if drawn else {}
        for name, metric in metrics.items():
            needed = _most(trainer, self.scores.needed(name))
            entry = self.scores.entry(name, real, scored, needed)
            entry |= density.description(metric, real, pl_module, self.probes)
            if "samples" in entry and (self.per_item or scored > size):
                entry["samples_per_item"] = _ratio(scored, size)
            caution = {"caution": entry.pop("caution")} if "caution" in entry else {}
            if self._decoded and "real" in entry and sees_items(metric):
                entry["real_items"] = "decoded from cached latents"
            self._entries[name + suffix] = entry | setting | caution
            for label, number in results.scalars(f"{self.prefix}/{name}{suffix}", self.scores.logged(name, entry)):
                pl_module.log(label, number)
        if not self.metrics and drawn:
            self._entries["sampling"] = {"value": None, "real": real, "samples": drawn, **setting}
        return setting

    def _refuse_idle(self, trainer: L.Trainer) -> None:
        """Stop on all processes where one has nothing to add: they would wait for its features for ever."""
        distances, (real, samples) = self.scores.distances.values(), self.scores.totals[:2].tolist()
        lacks = bool(distances) and (not samples or (not real and any(sees_items(each) for each in distances)))
        if trainer.world_size > 1 and _most(trainer, int(lacks)):
            raise ValueError(
                f"Evaluation: one of {trainer.world_size} processes has no item or no sample: use fewer devices, or "
                "more items or samples."
            )

    def _write(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero:
            return
        own = {key for name, entry in self._entries.items() for key, _ in results.scalars(name, entry["value"])}
        own |= {"nfe", "seconds_per_sample"}
        stage = [key for key in sorted(trainer.callback_metrics) if key.startswith(f"{self.prefix}/")]
        logged = {key.partition("/")[2]: trainer.callback_metrics[key] for key in stage}
        block = {
            "values": self._entries,
            "logged": {key: results.plain(value) for key, value in logged.items() if key not in own},
            "versions": results.versions(),
        }
        results.update_json(Path(trainer.default_root_dir) / results.FILE, self.prefix, block)


def _renumbered(batch: Any, places: torch.Tensor) -> Any:
    """The batch with other numbers, from which the seeds of its samples are made."""
    return {**batch, "index": places} if isinstance(batch, Mapping) else batch


def _ratio(samples: int, items: int) -> float:
    """Samples for each item; a whole number where it is one."""
    return samples // max(items, 1) if samples % max(items, 1) == 0 else samples / items


def _most(trainer: L.Trainer, number: int) -> int:
    """The greatest of the processes' numbers."""
    return int(trainer.strategy.reduce(torch.tensor(number, device=trainer.strategy.root_device), reduce_op="max"))
