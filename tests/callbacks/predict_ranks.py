"""Predict five requests on the number of processes given; started by `test_prediction_writer`."""

import sys

import torch

from lightning_flows.callbacks import PredictionWriter
from tests.callbacks.toy import Toy, requests, trainer


def main() -> None:
    folder, devices, ids = sys.argv[1], int(sys.argv[2]), sys.argv[3].split(",")
    torch.set_num_threads(1)
    options = {"strategy": "ddp_spawn"} if devices > 1 else {}
    predict = trainer(folder, PredictionWriter(), devices=devices, **options)
    predict.predict(Toy(), requests(ids, batch_size=2), return_predictions=False)


if __name__ == "__main__":
    main()
