"""A tiny module and its data, for callbacks only."""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_flows.networks.parallel import leave_group_at_exit


class Toy(L.LightningModule):
    """Linear regression with a frozen part, a running statistic, momentum, and a fake `sample`."""

    def __init__(self, *, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.fail_at = fail_at
        self.validated: list[torch.Tensor] = []
        self.sampled: list[torch.Tensor] = []
        self.progress = None

    def setup(self, stage):
        leave_group_at_exit()

    def loss(self, batch):
        (x,) = batch
        x = x.to(self.net.weight.dtype)
        return (self.net(x) - self.frozen(x)).square().mean()

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.mean.lerp_(batch[0].mean(0).to(self.mean.dtype), 0.5)
            self.count += 1
        return self.loss(batch)

    def validation_step(self, batch, batch_idx):
        self.validated.append(self.net.weight.detach().clone())
        if self.fail_at is not None and self.trainer.global_step >= self.fail_at:
            raise RuntimeError("validation broke")
        self.log("val/loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.validated.append(self.net.weight.detach().clone())

    def predict_step(self, batch, batch_idx):
        n = len(batch["id"])
        for step in range(3):
            if self.progress is not None:
                self.progress(step + 1, 3)
        shade = batch["seed"].float().reshape(n, 1, 1, 1) / 10
        return {"id": batch["id"], "sample": shade.expand(n, 1, 8, 8)}

    def sample(self, condition=None, *, n=None, seed=None, **_):
        self.sampled.append(self.net.weight.detach().clone())
        torch.rand(3)  # a careless network
        assert not self.training
        generator = torch.Generator().manual_seed(seed)
        images = torch.rand(n, 1, 8, 8, generator=generator) - 1.0
        if condition is not None:
            images = images + condition.label.reshape(n, 1, 1, 1) / 10
        return images

    def configure_optimizers(self):
        return torch.optim.AdamW(self.net.parameters(), lr=0.05)


class Tied(Toy):
    """One parameter under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.alias = nn.Linear(4, 4, bias=False)
        self.alias.weight = self.net.weight


class Late(Toy):
    """Builds its network in `configure_model`."""

    def __init__(self) -> None:
        super().__init__()
        self.net = None

    def configure_model(self):
        if self.net is None:
            torch.manual_seed(0)
            self.net = nn.Linear(4, 4)


def data(n: int = 12, batch_size: int = 2) -> DataLoader:
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=batch_size)


def trainer(folder, *callbacks, **kwargs) -> L.Trainer:
    """A quiet CPU trainer."""
    defaults = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "default_root_dir": folder,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
        "num_sanity_val_steps": 0,
        "max_epochs": -1,
        "log_every_n_steps": 1,
    }
    return L.Trainer(**{**defaults, **kwargs}, callbacks=list(callbacks))


class Requests(torch.utils.data.Dataset):
    def __init__(self, ids) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index):
        return {"id": self.ids[index], "seed": index}


def requests(ids, batch_size: int = 2) -> DataLoader:
    return DataLoader(Requests(list(ids)), batch_size=batch_size)
