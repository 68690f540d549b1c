"""Floor 3: what a Trainer does besides training: averaged weights, pictures, files, speed, progress."""

from lightning_flows.callbacks.ema import EMA
from lightning_flows.callbacks.evaluation import Evaluation
from lightning_flows.callbacks.prediction_writer import PredictionWriter, write_sample
from lightning_flows.callbacks.progress import SamplingProgress, sampling_progress
from lightning_flows.callbacks.reconstruction_grid import ReconstructionGrid
from lightning_flows.callbacks.sample_grid import SampleGrid
from lightning_flows.callbacks.sampling_speed import SamplingSpeed
from lightning_flows.callbacks.throughput import Throughput

__all__ = [
    "EMA",
    "Evaluation",
    "PredictionWriter",
    "ReconstructionGrid",
    "SampleGrid",
    "SamplingProgress",
    "SamplingSpeed",
    "Throughput",
    "sampling_progress",
    "write_sample",
]
