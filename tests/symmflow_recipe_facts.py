"""Published facts of SymmFlow's configurations.

From the authors' commands (docs/TRAINING.md of github.com/caetas/SymmetricFlow) and loaders, and from counting the
parameters of the official networks; not from our YAML. Incomplete batches are trained on, so that an epoch has the
rounded-up number of steps.
"""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class SymmFlowFact:
    """One published configuration.

    Attributes:
        network: class of the network, with its sizes.
        parameters: their number, exactly, or in millions to as many digits as are known.
        channels: of image (or its latent) and semantic code.
        image: side of an image in pixels.
        items: training images.
        batch: samples of one process.
        processes: number of processes.
        lr: highest learning rate.
        epochs: length of the run.
        warmup: epochs until the highest rate.
        beta: of the semantic code.
        code: class of the semantic code, and what else it is given.
        image_weight: w of the loss.
        ema: decay of the averaged weights.
        precision: of the run.
        read_steps: of the published figures.
        crop: of training images.
    """

    network: tuple[str, dict[str, Any]]
    parameters: int | str
    channels: tuple[int, int]
    image: int
    items: int
    batch: int
    lr: float
    epochs: int
    warmup: int
    beta: float
    code: tuple[str, dict[str, Any]]
    processes: int = 1
    image_weight: float = 0.9
    ema: float = 0.999
    precision: str = "32-true"
    read_steps: int = 1
    crop: str = "center"

    @property
    def global_batch(self) -> int:
        """Samples of one step."""
        return self.batch * self.processes

    @property
    def epoch(self) -> int:
        """Steps of an epoch."""
        return -(-self.items // self.global_batch)


STABLE_DIFFUSION = {
    "channels": [320, 640, 1280, 1280], "num_blocks": 2, "num_heads": [5, 10, 20, 20], "context_dim": 1024,
    "attention": [True, True, True, False], "depth": 1, "context_length": 77, "reads_tokens": False,
}  # fmt: skip
MASKS: dict[str, Any] = {
    "network": ("StableDiffusionUNet", STABLE_DIFFUSION), "parameters": 865_933_768, "channels": (4, 4), "image": 512,
    "batch": 32, "lr": 8e-5, "epochs": 200, "warmup": 10, "image_weight": 0.7, "ema": 0.9, "precision": "bf16-mixed",
    "read_steps": 25,
}  # fmt: skip


def adm(hidden_size: int) -> dict[str, Any]:
    """What the two networks of the classifiers have in common; their option "attention at 16" meets no level."""
    sizes = {"channel_mult": [1, 2, 2, 2], "num_blocks": 2, "head_channels": 64, "attention_factors": []}
    kept = {"scale_shift": False, "conv_resample": True, "resblock_updown": False, "num_classes": None}
    return {"hidden_size": hidden_size, **sizes, **kept, "qkv_order": "head", "dropout": 0.0}


CLASSES: dict[str, Any] = {"code": ("ClassPlane", {"num_classes": 10}), "beta": 4.0, "epochs": 1000, "warmup": 100}

SYMMFLOW = {
    "symmflow/celebamask_hq512": SymmFlowFact(
        **MASKS, items=24_183, processes=2, beta=10.0, code=("RGBPalette", {"palette": "celebamask-hq"})
    ),
    "symmflow/coco_stuff512": SymmFlowFact(
        **MASKS, items=118_287, processes=4, beta=6.0, code=("RGBPalette", {"palette": "coco-stuff"}), crop="random"
    ),
    "symmflow/mnist32": SymmFlowFact(
        **CLASSES, network=("ADMUNet", adm(32)), parameters="2.16", channels=(1, 1), image=32, items=60_000, batch=512,
        lr=5e-4,
    ),
    "symmflow/cifar10": SymmFlowFact(
        **CLASSES, network=("ADMUNet", adm(256)), parameters="137.6", channels=(3, 1), image=32, items=50_000,
        batch=180, lr=3e-4,
    ),
}  # fmt: skip

OURS = ("symmflow/celebamask_hq256",)  # full-size, and nobody's but ours
