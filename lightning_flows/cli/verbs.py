"""The verbs that are not a trainer's: zoo, export, push, convert."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from lightning_flows.cli import runs


def zoo() -> str:
    """Table of the published models: id, family, data, metric, size, licence."""
    from lightning_flows.hub import table

    return table()


def export(
    run: str,
    out: str,
    licence: str,
    ckpt_path: str = "last",
    summary: str = "",
    command: str | None = None,
    dtype: Literal["float32", "float16", "bfloat16"] = "float32",
) -> str:
    """Write a run as a folder of weights that from_pretrained, push and predict read.

    Args:
        run: folder of the run, or its name under runs/.
        out: folder to write: model.safetensors (EMA weights), config.json, recipe.yaml, README.md (card), metrics.json.
        licence: of the weights; it must agree with that of the data.
        ckpt_path: checkpoint file, or last.
        summary: what the model is, in a few sentences, for the card.
        command: shell command that gives the card's figures again.
        dtype: in which large tensors are stored; they are loaded as float32.
    """
    from lightning_flows.hub.export import export_run

    folder = Path(run) if Path(run).is_dir() else runs.ROOT / run
    ckpt = runs.newest_last(folder) if ckpt_path == "last" else Path(ckpt_path)
    about = {"licence": licence, "summary": summary, "command": command, "dtype": dtype}
    return f"wrote {export_run(folder, Path(out), ckpt=ckpt, **about)}"


def push(
    folder: str, repo_id: str, private: bool = False, revision: str | None = None, licence: str | None = None
) -> str:
    """Upload weights, config, card, recipe and metrics to the Hugging Face Hub in one commit.

    Args:
        folder: what export, save_pretrained or save_adapter wrote.
        repo_id: org/name.
        private: make a new repository private.
        revision: branch to commit to.
        licence: of an adapter whose folder has no card yet: one is written.
    """
    from lightning_flows.hub import push as upload

    return str(upload(folder, repo_id, private=private, revision=revision, licence=licence))


def convert(
    format: str,
    file: str,
    out: str,
    weights: str | None = None,
    num_heads: int | None = None,
    head_channels: int | None = None,
    qkv_order: str | None = None,
    input_size: list[int] | None = None,
    label_dropout: float | None = None,
    scaling_factor: float | None = None,
    in_channels: int | None = None,
    head_size: int | None = None,
    text_length: int | None = None,
    text_encoder: str | None = None,
    class_token: bool | None = None,
    noise_std: float | None = None,
    semantic: str | None = None,
    num_classes: int | None = None,
    beta: float | None = None,
    context: str | None = None,
    autoencoder: str | None = None,
    network: dict[str, Any] | None = None,
) -> str:
    """Turn an official checkpoint into a folder that from_pretrained reads.

    Args:
        format: lfm-dit, lfm-adm, lfm-edm, sit, dit, guided-diffusion, guided-diffusion-cosine, tarflow, starflow,
            symmflow, diffusers-unet, diffusers-vae, or to-diffusers-vae for an autoencoder of ours.
        file: the downloaded .pth, .pt or .safetensors, or a folder of torch.distributed.checkpoint; for autoencoders a
            folder.
        out: folder to write.
        weights: ema or raw, where the file holds both.
        num_heads: attention heads, where the width of the network does not tell.
        head_channels: channels of an attention head, for U-Nets.
        qkv_order: head or kind, how a U-Net of guided diffusion writes q, k and v.
        input_size: height and width of what the network reads, where the file does not tell.
        label_dropout: of the training; above 0 the last row of the label table means no label.
        scaling_factor: of to-diffusers-vae, what its users multiply latents by.
        in_channels: of tarflow and starflow, channels of the data, where they are not the published ones.
        head_size: of tarflow and starflow, channels of an attention head, likewise.
        text_length: of starflow, tokens of a text, where the file does not tell.
        text_encoder: of starflow, repository or folder of the text model, where it is not the published one.
        class_token: of starflow, true where the text is one token, a class.
        noise_std: of tarflow and starflow, deviation of the noise on the training data; 0 for uniform noise.
        semantic: of symmflow, celebamask-hq, coco-stuff or class.
        num_classes: of symmflow, classes of the plane of class.
        beta: of symmflow, width of the dequantisation; that of the recipe by default.
        context: of symmflow from Stable Diffusion and of diffusers-unet, embedding of the empty prompt: a file with it,
            or the folder or org/name of a pipeline with text_encoder and tokenizer.
        autoencoder: of symmflow on latents, repository or folder of the image autoencoder.
        network: of starflow, further arguments of the network, such as --network.reverse_first false.
    """
    from lightning_flows.hub.convert import convert as run

    given = {
        "weights": weights,
        "num_heads": num_heads,
        "head_channels": head_channels,
        "qkv_order": qkv_order,
        "input_size": tuple(input_size) if input_size else None,
        "label_dropout": label_dropout,
        "scaling_factor": scaling_factor,
        "in_channels": in_channels,
        "head_size": head_size,
        "text_length": text_length,
        "text_encoder": text_encoder,
        "class_token": class_token,
        "noise_std": noise_std,
        "semantic": semantic,
        "num_classes": num_classes,
        "beta": beta,
        "context": context,
        "autoencoder": autoencoder,
        "network": network,
    }
    folder = run(format, file, out, **{name: value for name, value in given.items() if value is not None})
    return f"wrote {folder}"


def _verb(function: Callable[..., str]) -> Callable[[Sequence[str]], Any]:
    def call(args: Sequence[str]) -> str:
        text = jsonargparse.auto_cli(
            function, args=list(args), as_positional=True, prog=f"lightning-flows {function.__name__}"
        )
        sys.stdout.write(f"{text}\n")
        return text

    return call


def _encode(args: Sequence[str]) -> str:
    from lightning_flows.cli.encode import encode

    return encode(args)


def _statistics(args: Sequence[str]) -> str:
    from lightning_flows.cli.statistics import statistics

    return statistics(args)


VERBS = {function.__name__: _verb(function) for function in (zoo, export, push, convert)}
VERBS["encode"] = _encode
VERBS["statistics"] = _statistics
