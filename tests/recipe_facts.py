"""Published facts of the configurations that recipes claim to reproduce.

The numbers come from the authors' repositories and pages (commands, argument files, readmes) and from counting the
parameters of the official networks, not from our YAML. None stands for what was not published; what a recipe then
chooses is in `Fact.chosen`, so that it does not change unseen.

Parameter counts are those of the official state dicts: a DiT's fixed position table is one of its tensors.
"""

from dataclasses import dataclass, field
from typing import Any

MSE, EMA_VAE = "stabilityai/sd-vae-ft-mse", "stabilityai/sd-vae-ft-ema"


@dataclass(frozen=True)
class Fact:
    """One published configuration.

    Attributes:
        network: class of the network.
        millions: parameters in millions, to as many digits as are known.
        image: side of an image in pixels.
        items: training images.
        batch: samples of one process.
        processes: number of processes.
        lr: learning rate of AdamW.
        final_lr: rate at the end of the cosine; None for a constant rate.
        epochs: length of the run in epochs.
        steps: length of the run in optimizer steps, where it is given so.
        sizes: further arguments of the network.
        classes: number of classes; 1 is an unconditional DiT, None another network without labels.
        label_dropout: rate of the labels.
        sigma_min: noise that the path leaves at the data.
        vae: the autoencoder.
        solver: of the samples, with its arguments.
        guidance: scale of the published figure.
        ema: decay of the averaged weights (LFM: an option, off in the commands, on here).
        precision: of our recipe; None where any will do.
        chosen: what we chose where nothing was published, by the names above.
    """

    network: str
    millions: str | None
    items: int
    batch: int | None
    processes: int | None
    lr: float | None
    epochs: int | None = None
    steps: int | None = None
    image: int = 256
    final_lr: float | None = None
    sizes: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None
    label_dropout: float = 0.0
    sigma_min: float = 1e-5
    vae: str = MSE
    solver: tuple[str, dict[str, Any]] = ("DormandPrince", {"rtol": 1e-5, "atol": 1e-5})
    guidance: float | None = None
    ema: float = 0.9999
    precision: str = "bf16-mixed"
    chosen: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class DecoderFact:
    """One published finetuning of a decoder on noisy latents.

    Attributes:
        millions: trained parameters in millions, of all: of the network, without the critic.
        latent_noise: deviation in units of the scaled latents.
        scaling_factor: of the latents.
        perceptual: weight of each distance in features.
        critic: weight of the adversarial term, of LeCam in the critic's loss, and the decay of its means.
        steps: updates of the decoder.
        batch: samples of one process.
        processes: number of processes.
        betas: of AdamW.
        weight_decay: of AdamW.
        warmup: steps of the decoder over which the rate rises.
        image: side of an image in pixels.
    """

    millions: tuple[str, str]
    latent_noise: float
    scaling_factor: float
    perceptual: tuple[float, ...]
    critic: tuple[float, float, float]
    steps: int
    batch: int
    processes: int
    betas: tuple[float, float]
    weight_decay: float
    warmup: int
    image: int = 256


CELEBA, FFHQ, LSUN, IMAGENET = 27_000, 63_000, 120_000, 1_281_167
L2 = {"network": "DiT", "sizes": {"patch_size": 2, "hidden_size": 1024, "depth": 24, "num_heads": 16}}
B2 = {"network": "DiT", "sizes": {"patch_size": 2, "hidden_size": 768, "depth": 12, "num_heads": 12}}
S2 = {"network": "DiT", "sizes": {"patch_size": 2, "hidden_size": 384, "depth": 12, "num_heads": 6}}
XL2 = {"network": "DiT", "sizes": {"patch_size": 2, "hidden_size": 1152, "depth": 28, "num_heads": 16}}
UNCONDITIONAL = {**L2, "millions": "457.06", "classes": 1}
ADM = {"hidden_size": 256, "num_blocks": 2, "num_heads": 4, "dropout": 0.0}
EDM = {"hidden_size": 256, "num_blocks": 2, "head_channels": 64, "dropout": 0.0}
EDM_32 = {**EDM, "channel_mult": [1, 2, 3, 4], "attention_sizes": [16, 8, 4]}
SIT = {
    "items": IMAGENET,
    "batch": None,
    "processes": None,
    "lr": 1e-4,
    "classes": 1000,
    "label_dropout": 0.1,
    "sigma_min": 0.0,
    "vae": EMA_VAE,
    "solver": ("Heun", {}),
    "chosen": {"batch": 32, "processes": 8},  # published: the global batch of 256
}

PUBLISHED = {
    "lfm/celebahq256": Fact(**UNCONDITIONAL, items=CELEBA, batch=32, processes=1, lr=2e-4, epochs=500),
    "lfm/celebahq256_adm": Fact(
        "ADMUNet", "153.1", CELEBA, 112, 1, 2e-5, epochs=500, final_lr=1e-5,
        sizes={**ADM, "channel_mult": [1, 2, 2, 2], "attention_factors": [8]},
    ),
    "lfm/ffhq256_dit": Fact(**UNCONDITIONAL, items=FFHQ, batch=32, processes=1, lr=2e-4, final_lr=1e-5, epochs=500),
    "lfm/ffhq256_adm": Fact("EDMUNet", "406.4", FFHQ, 128, 1, 2e-5, epochs=500, final_lr=1e-5, sizes=EDM_32),
    "lfm/bedroom256_dit": Fact(**UNCONDITIONAL, items=LSUN, batch=32, processes=1, lr=1e-4, epochs=600),
    "lfm/bedroom256_adm": Fact("EDMUNet", "406.4", LSUN, 128, 1, 1e-5, epochs=500, sizes=EDM_32),
    "lfm/church256_dit": Fact(**UNCONDITIONAL, items=LSUN, batch=48, processes=2, lr=1e-4, epochs=600),
    "lfm/church256_adm": Fact(
        "ADMUNet", "356.1", LSUN, None, None, None,
        sizes={**ADM, "channel_mult": [1, 2, 3, 4], "attention_factors": [8]},
        chosen={"batch": 128, "processes": 1, "lr": 1e-5, "epochs": 500},
    ),
    "lfm/imagenet256_adm": Fact(
        "EDMUNet", "407.4", IMAGENET, 96, 8, 1e-4, epochs=1200, classes=1000, guidance=1.25, sizes=EDM_32,
        chosen={"label_dropout": 0.1},  # published: none, though samples are guided
    ),
    "lfm/imagenet256_dit_b2": Fact(
        **B2, millions="130.50", items=IMAGENET, batch=160, processes=8, lr=1e-4, epochs=1000, classes=1000,
        label_dropout=0.1, guidance=1.5,
    ),
    "lfm/celebahq512_adm": Fact(
        "ADMUNet", "352.2", CELEBA, 6, 8, 2e-5, image=512, epochs=1000,
        sizes={**ADM, "channel_mult": [1, 2, 2, 2, 4], "attention_factors": [8, 16]},
    ),
    "lfm/celebahq1024_adm": Fact(
        "EDMUNet", None, CELEBA, 6, 8, 2e-5, image=1024, epochs=1000,
        sizes={**EDM, "channel_mult": [1, 1, 2, 2, 4, 4], "attention_sizes": [16, 8]},
        chosen={"millions": "531.8"},
    ),
    "sit/imagenet256_s2": Fact(**S2, **SIT, millions="32.96", steps=400_000),
    "sit/imagenet256_b2": Fact(**B2, **SIT, millions="130.50", steps=400_000),
    "sit/imagenet256_l2": Fact(**L2, **SIT, millions="458.09", steps=400_000),
    "sit/imagenet256_xl2": Fact(**XL2, **SIT, millions="675", steps=7_000_000, guidance=1.5),
}  # fmt: skip

DECODERS = {
    "autoencoder/sd_decoder_imagenet256": DecoderFact(
        millions=("49.5", "83.7"), latent_noise=0.3, scaling_factor=0.18215, perceptual=(1.0, 0.1),
        critic=(0.1, 1e-3, 0.999), steps=200_000, batch=8, processes=8, betas=(0.9, 0.999), weight_decay=1e-4,
        warmup=10_000,
    ),
}  # fmt: skip
