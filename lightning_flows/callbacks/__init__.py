"""Floor 3: what a Trainer does besides training: averaged weights, pictures, files, speed, progress."""

from lightning_flows.callbacks.activation_checkpointing import ActivationCheckpointing
from lightning_flows.callbacks.compile import Compile
from lightning_flows.callbacks.ema import EMA
from lightning_flows.callbacks.evaluation import Evaluation
from lightning_flows.callbacks.fail_together import FailTogether
from lightning_flows.callbacks.freeze import Freeze
from lightning_flows.callbacks.gradient_watch import GradientWatch
from lightning_flows.callbacks.learning_rates import LearningRates
from lightning_flows.callbacks.lora import LoRA
from lightning_flows.callbacks.prediction_writer import PredictionWriter, write_sample
from lightning_flows.callbacks.preemption import Preemption
from lightning_flows.callbacks.progress import SamplingProgress, sampling_progress
from lightning_flows.callbacks.reconstruction_grid import ReconstructionGrid
from lightning_flows.callbacks.sample_grid import SampleGrid
from lightning_flows.callbacks.sampling_speed import SamplingSpeed
from lightning_flows.callbacks.symmetry_grid import SymmetryGrid
from lightning_flows.callbacks.throughput import Throughput

__all__ = [
    "ActivationCheckpointing",
    "Compile",
    "EMA",
    "Evaluation",
    "FailTogether",
    "Freeze",
    "GradientWatch",
    "LearningRates",
    "LoRA",
    "PredictionWriter",
    "Preemption",
    "ReconstructionGrid",
    "SampleGrid",
    "SamplingProgress",
    "SamplingSpeed",
    "SymmetryGrid",
    "Throughput",
    "sampling_progress",
    "write_sample",
]
