"""Published facts of the normalizing flows that recipes claim to reproduce; `recipe_facts` has those of other families.

They come from the authors' papers, commands and argument files, and from counting the parameters of the official
networks (masks and other buffers left out). None stands for what was not published.
"""

from dataclasses import dataclass, field
from typing import Any

IMAGENET, AFHQ, MNIST = 1_281_167, 14_630, 59_000  # of MNIST a thousand of the training images are set aside


@dataclass(frozen=True)
class FlowFact:
    """One published configuration.

    Attributes:
        network: class of the network.
        parameters: their number, to as many digits as are known, M or B.
        sizes: arguments of the network.
        image: side of an image in pixels.
        noise: deviation of the noise on the data; None for uniform noise within a grey level.
        batch: samples of one process.
        processes: number of processes.
        items: training images; None where they are not known.
        epochs: length of the run in epochs.
        images: length of the run in images, where it is given so.
        lr: learning rate of AdamW, with betas 0.9 and 0.95 and weight decay 1e-4.
        least_lr: rate at which the rise begins and the cosine ends; None where no schedule was published.
        warmup: steps of the rise; None for one epoch.
        classes: number of classes.
        dropout: rate of labels or texts.
        penalty: on the mean squares between the blocks.
        latents: of which autoencoder; None for pixels.
        text: encoder of captions, its length and the size of its tokens.
        flip: mirror images in training.
        precision: of our recipe.
        strategy: of our recipe.
        chosen: names of what we chose where nothing was published, with its value above.
    """

    network: str
    parameters: str
    sizes: dict[str, Any]
    image: int
    noise: float | None
    batch: int
    processes: int
    items: int | None
    epochs: int | None = None
    images: int | None = None
    lr: float = 1e-4
    least_lr: float | None = 1e-6
    warmup: int | None = None
    classes: int | None = None
    dropout: float = 0.0
    penalty: float = 0.0
    latents: str | None = None
    text: tuple[str, int, int] | None = None
    flip: bool = True
    precision: str = "bf16-mixed"
    strategy: str = "auto"
    chosen: tuple[str, ...] = field(default=())

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        if self.images is not None:
            return self.images // self.global_batch
        assert self.epochs is not None
        return self.epochs * self.epoch

    @property
    def epoch(self) -> int:
        """Optimizer steps of an epoch; what does not fill a batch is left out."""
        assert self.items is not None
        return self.items // self.global_batch

    @property
    def global_batch(self) -> int:
        """Samples of one optimizer step."""
        return self.batch * self.processes


def tarflow(patch: int, width: int, blocks: int = 8, depth: int = 8, channels: int = 3) -> dict[str, Any]:
    sizes = {"patch_size": patch, "in_channels": channels, "hidden_size": width, "num_blocks": blocks, "depth": depth}
    return {**sizes, "head_size": 64, "mlp_ratio": 4.0, "volume_preserving": False}


def starflow(width: int, deep: int) -> dict[str, Any]:
    return {
        "patch_size": 1, "in_channels": 4, "hidden_size": width, "depth": [2, 2, 2, 2, 2, deep], "head_size": 64,
        "deep_hidden_size": None, "mlp_ratio": 4.0, "deep_condition_only": True, "reverse_first": True,
        "start_token": True, "scale": "softplus", "soft_clip": 4.0, "final_norm": True, "reference_length": None,
        "theta": 10000.0, "half_split": False, "norm": "layer", "gated_mlp": False, "bias": True,
    }  # fmt: skip


IN64 = {"image": 64, "items": IMAGENET, "epochs": 200, "noise": 0.05, "batch": 32, "processes": 8}
LATENT = {"image": 256, "noise": 0.3, "penalty": 1e-4, "latents": "stabilityai/sd-vae-ft-ema", "flip": False}

FLOWS = {
    "tarflow/imagenet64_bits": FlowFact(
        "TARFlow", "460.1M", tarflow(2, 768), image=64, noise=None, batch=16, processes=16, items=IMAGENET, epochs=100,
        precision="32-true",
    ),
    "tarflow/imagenet64": FlowFact("TARFlow", "460.1M", tarflow(2, 768), **IN64),
    "tarflow/imagenet64_class": FlowFact("TARFlow", "466.3M", tarflow(2, 768), **IN64, classes=1000, dropout=0.1),
    "tarflow/imagenet128_class": FlowFact(
        "TARFlow", "823.9M", tarflow(4, 1024), image=128, noise=0.15, batch=24, processes=32, items=IMAGENET,
        epochs=320, classes=1000, dropout=0.1,
    ),
    "tarflow/afhq256": FlowFact(
        "TARFlow", "463.5M", tarflow(8, 768), image=256, noise=0.07, batch=32, processes=8, items=AFHQ, epochs=4000,
        classes=3, dropout=0.1,
    ),
    "tarflow/mnist": FlowFact(
        "TARFlow", "3.23M", tarflow(4, 128, 4, 4, 1), image=28, noise=0.1, batch=256, processes=1, items=MNIST,
        epochs=100, lr=2e-3, least_lr=None, classes=10, dropout=0.1, flip=False, precision="32-true",
        chosen=("dropout", "flip"),
    ),
    "starflow/imagenet256": FlowFact(
        "STARFlow", "1.41B", starflow(2048, 18), **LATENT, batch=16, processes=32, items=IMAGENET, images=400_000_000,
        classes=1000, dropout=0.1,
    ),
    "starflow/text_to_image256": FlowFact(
        "STARFlow", "3.858B", starflow(3072, 24), **LATENT, batch=16, processes=64, items=None, images=400_000_000,
        lr=6.4e-5, warmup=10_000, dropout=0.1, text=("google/flan-t5-xl", 128, 2048), strategy="fsdp2",
        chosen=("warmup",),
    ),
}  # fmt: skip
