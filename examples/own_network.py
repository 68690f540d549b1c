"""A network of your own in LatentFlowMatching: trained, saved, and loaded again.

python examples/own_network.py [--steps 20]
"""

import argparse
import tempfile

import lightning as L
import torch
from torch import Tensor, nn

import lightning_flows as lf
from lightning_flows.data import Digits
from lightning_flows.store import Recorded


class ConvNet(Recorded, nn.Module):  # Recorded writes the constructor's arguments into the config
    streams = ()  # reads no condition
    shape = (1, 8, 8)

    def __init__(self, *, width: int = 32) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(2, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, condition: lf.Condition | None = None) -> Tensor:
        time = t.expand(len(x)).reshape(-1, 1, 1, 1).expand_as(x)
        return self.layers(torch.cat([x, time], 1))  # (B, 1, 8, 8)

    def null(self, condition: lf.Condition | None = None, batch_size: int | None = None) -> lf.Condition:
        return lf.Condition()


if __name__ == "__main__":
    from own_network import ConvNet  # the config shall say own_network.ConvNet, not __main__.ConvNet

    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    steps = parser.parse_args().steps
    L.seed_everything(0)
    model = lf.LatentFlowMatching(network=ConvNet(width=16), steps=4)
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(model, Digits(batch_size=128))

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        try:
            lf.from_pretrained(folder)
        except ValueError as error:
            print(f"refused: {error}")
        again = lf.from_pretrained(folder, trust_remote_code=True)  # only for code that you trust
    print(f"same samples: {torch.equal(model.sample(n=4, seed=1), again.sample(n=4, seed=1))}")
