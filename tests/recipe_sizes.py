"""Recipes made small: the same classes and choices with smaller sizes, on stand-ins of their data.

A recipe with a new class adds a line to `NETWORKS` or `DATA`.
"""

import copy
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from lightning_flows.store import build
from tests.codecs.tiny_text import write_t5
from tests.mask_stand_ins import cifar10, coco, faces, masks_of, mnist, packed, pixels

# Smallest sizes of each network, and the side of what it then reads (None: as in the recipe).
NETWORKS = {
    "DiT": ({"hidden_size": 16, "depth": 1, "num_heads": 2}, 4),
    "ADMUNet": (
        {"hidden_size": 32, "num_blocks": 1, "channel_mult": [1, 2], "attention_factors": [2], "num_heads": 2}, 4,
    ),
    "EDMUNet": (
        {"hidden_size": 32, "num_blocks": 1, "channel_mult": [1, 2], "attention_sizes": [2], "head_channels": 16}, 4,
    ),
    "StableDiffusionUNet": (
        {
            "channels": [8, 16], "num_blocks": 1, "attention": [True, False], "num_heads": 2, "context_dim": 8,
            "context_length": 3, "groups": 4,
        }, 4,
    ),
    "KLNetwork": ({"channels": [8, 8], "layers": 1, "norm_groups": 4}, 8),
    "TARFlow": ({"patch_size": 2, "hidden_size": 16, "num_blocks": 2, "depth": 1, "head_size": 8}, 4),
    "STARFlow": ({"hidden_size": 32, "depth": [1, 1], "head_size": 32}, 4),
}  # fmt: skip
WRAPPERS = ("Preconditioned",)
TEXT = {"text_length": 5, "text_size": 8}  # of a network that reads the tokens of a tiny T5
ITEMS = 6  # of a stand-in
MANY = 48  # of a stand-in that is divided by fractions
BUNDLED = {  # data that needs no stand-in, with what makes it small
    "Digits": {},
    "Shapes": {"n_train": MANY, "n_val": ITEMS, "n_test": ITEMS},
}
TRAINER = {
    "accelerator": "cpu",
    "devices": 1,
    "strategy": "auto",
    "max_steps": 2,
    "max_epochs": None,
    "limit_val_batches": 1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def small(recipe, folder, autoencoder):
    """A recipe (dictionary) with every size reduced.

    Args:
        recipe: content of the YAML; left as it is.
        folder: where the stand-in of the data is written.
        autoencoder: ``(image channels, latent channels, levels) -> folder`` of a diffusers autoencoder.
    """
    recipe = copy.deepcopy(recipe)
    network = recipe["model"]["init_args"]["network"]
    bundled = name_of(recipe["data"]) in BUNDLED
    side = _reduce_network(network, keep_side=bundled)
    _reduce_distances(recipe["model"]["init_args"])
    _reduce_text(recipe["model"]["init_args"], folder)
    levels = _reduce_codec(recipe, autoencoder)
    if bundled:
        recipe["data"].setdefault("init_args", {}).update(BUNDLED[name_of(recipe["data"])])
    else:
        _reduce_data(recipe, folder, side * 2 ** (levels - 1))
    _reduce_trainer(recipe)
    return recipe


def name_of(entry):
    return entry["class_path"].rpartition(".")[2]


def bare(entry):
    """A network without what is wrapped around it."""
    return bare(entry["init_args"]["network"]) if name_of(entry) in WRAPPERS else entry


def _reduce_network(entry, keep_side):
    entry = bare(entry)
    name = name_of(entry)
    assert name in NETWORKS, f"add the smallest sizes of {name} to NETWORKS in {__name__}"
    sizes, side = NETWORKS[name]
    entry["init_args"] |= sizes
    if name.endswith("UNet"):  # else its coarsest map has one place, which no norm can do with
        side *= entry["init_args"].get("patch_size", 1)
    if "input_size" in entry["init_args"] and not keep_side:
        entry["init_args"]["input_size"] = side
    return side


def _reduce_distances(arguments):
    """The frozen features and the critic of an autoencoder's loss."""
    given = arguments.get("perceptual") or []
    for entry in given if isinstance(given, list) else [given]:
        features = {"model": "resnet18", "layers": [0], "pretrained": False}
        entry["init_args"]["features"]["init_args"] |= features
    if arguments.get("adversary") is not None:
        sizes = {"hidden_size": 8, "depth": 1}
        arguments["adversary"]["init_args"]["network"]["init_args"] |= sizes


def _reduce_text(arguments, folder):
    """Replaces a frozen text model by a tiny one with random weights."""
    if arguments.get("text") is not None:
        repo = write_t5(folder.with_name("t5"))
        arguments["text"]["init_args"] |= {"repo": str(repo), "length": TEXT["text_length"]}
        arguments["network"]["init_args"] |= TEXT


def _reduce_codec(recipe, autoencoder):
    """Replaces the weights of codecs; the number of levels, 1 without one."""
    arguments = recipe["model"]["init_args"]
    codec = arguments.get("codec")
    if codec is None or "repo" not in codec.get("init_args", {}):
        return 1
    levels = 4  # 8 times, as the autoencoders of Stable Diffusion
    latent = bare(arguments["network"])["init_args"]["in_channels"] - planes_of(arguments)
    repo = str(autoencoder(channels_of(recipe), latent, levels))
    codec["init_args"]["repo"] = repo
    if (masks := arguments.get("semantic", {}).get("init_args", {}).get("codec")) is not None:
        masks["init_args"]["repo"] = repo
    return levels


def planes_of(arguments):
    """Channels of the semantic code of a model that has one, else 0."""
    return build(arguments["semantic"]).channels if "semantic" in arguments else 0


def channels_of(recipe):
    """Channels of an image."""
    data = recipe["data"]["init_args"]
    if data.get("layout") == "NHW":
        return 1
    arguments = recipe["model"]["init_args"]
    own = bare(arguments["network"])["init_args"].get("in_channels", 3) - planes_of(arguments)
    return data.get("channels") or (3 if arguments.get("codec") else own)


def _reduce_data(recipe, folder, side):
    entry = recipe["data"]
    name, arguments = name_of(entry), entry["init_args"]
    assert name in DATA, f"add a stand-in of {name} to DATA in {__name__}"
    arguments["root"] = str(DATA[name](arguments, folder, side, channels_of(recipe)))
    arguments |= {"batch_size": 2, "num_workers": 0}
    if "size" in arguments:
        arguments["size"] = side
    if "resize" in arguments:
        arguments["resize"] = side + 2
    if recipe.get("global_batch") is not None:
        recipe["global_batch"] = 2 * recipe["trainer"].get("accumulate_grad_batches", 1)


def _reduce_trainer(recipe):
    arguments = recipe["model"]["init_args"]
    if arguments.get("steps", 1) > 1:
        arguments["steps"] = 2
    recipe["trainer"] |= TRAINER
    if isinstance(recipe["trainer"].get("val_check_interval"), int):
        recipe["trainer"]["val_check_interval"] = 2
    for callback in recipe["trainer"]["callbacks"]:
        if name_of(callback) in ("SampleGrid", "SymmetryGrid"):
            callback["init_args"]["n"] = len(callback["init_args"].get("labels") or [0, 0])
        if name_of(callback) == "Compile":  # minutes on a CPU, and tested elsewhere: traced, but not compiled
            callback.setdefault("init_args", {})["backend"] = "eager"


# ---- stand-ins of data, each in the layout that the recipe reads


def encoded(image, kind="PNG"):
    Image.fromarray(image.squeeze()).save(file := io.BytesIO(), kind)
    return file.getvalue()


def lmdb_of(arguments, folder, side, channels):
    layout = arguments["layout"]
    values = {
        "raw": lambda image: image.tobytes(),
        "encoded": lambda image: encoded(image, "WEBP"),
        "pickled": lambda image: pickle.dumps((encoded(image), 0)),
    }[layout]
    larger = side + 8 if layout == "encoded" else side  # as LSUN's, to be resized
    names = {"train": "sea_train_lmdb", "val": "sea_val_lmdb"} if layout == "encoded" else {"train": "train.lmdb"}
    for name in {**names, **({"val": "validation.lmdb"} if layout == "raw" else {})}.values():
        _write_lmdb(folder / name, [values(image) for image in pixels(ITEMS, larger, channels)], layout)
    if "first" in arguments:
        arguments["first"] = ITEMS - 1
    return folder


def _write_lmdb(path, values, layout):
    import lmdb

    with lmdb.open(str(path), map_size=1 << 22) as environment, environment.begin(write=True) as into:
        for i, value in enumerate(values):
            into.put(f"{7 * i % 16:x}ab".encode() if layout == "encoded" else str(i).encode(), value)


def image_folder(arguments, folder, side, channels):
    for split in ("train", "val"):
        for i, image in enumerate(pixels(ITEMS, 2 * side + 3, channels)):  # larger, so that it is halved
            path = folder / split / f"n{i % 2}" / f"{i}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(image, "JPEG"))
    return folder


def arrays(arguments, folder, side, channels):
    images, layout = pixels(MANY, side, channels), arguments.get("layout", "NHWC")
    images = {"NHW": images[..., 0], "NHWC": images, "NCHW": images.transpose(0, 3, 1, 2)}[layout]
    if arguments.get("value_range") is not None:
        low, high = arguments["value_range"]
        images = (low + (high - low) * images / 255).astype(np.float32)
    labels = np.arange(MANY) % len(arguments.get("classes") or range(10))
    named = {arguments.get("label_key", "labels"): labels, **masks_of(arguments, MANY, side)}
    if (key := arguments.get("image_key", "images")) == "jpeg":
        images, named["offsets"] = packed(images)
    suffix = Path(arguments["root"]).suffix
    if suffix == ".npy":
        np.save(folder / "train.npy", images)
    else:
        for split in ("train", "val") if arguments.get("test_split") == "val" else ("train",):
            np.savez(folder / f"{split}.npz", **named, **{key: images})
    return folder / f"train{suffix}" if suffix else folder


def shards(arguments, folder, side, channels):
    images = pixels(ITEMS, 2 * side + 3, channels)
    for split in ("train", "val"):
        with tarfile.open(folder / f"{split}-000000.tar", "w") as tar:
            for i, image in enumerate(images):
                for name, content in ((f"{i}.jpg", encoded(image, "JPEG")), (f"{i}.txt", f"a cat, {i}".encode())):
                    header = tarfile.TarInfo(name)
                    header.size = len(content)
                    tar.addfile(header, io.BytesIO(content))
    arguments["index"] = str(folder.with_name("index"))
    return folder


DATA = {
    "ImageLMDB": lmdb_of,
    "ImageFolder": image_folder,
    "Arrays": arrays,
    "WebDataset": shards,
    "CelebAMaskHQ": faces,
    "COCOStuff": coco,
    "MNIST": mnist,
    "CIFAR10": cifar10,
}
