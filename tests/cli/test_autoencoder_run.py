"""An autoencoder from the command line: trained, tested, exported, and then the codec of a flow."""

import json

import torch
import yaml

from lightning_flows import from_pretrained
from lightning_flows.cli import dispatch
from lightning_flows.codecs import AutoencoderKL

RECIPE = {
    "model": {
        "class_path": "lightning_flows.modules.KLAutoencoder",
        "init_args": {
            "network": {
                "class_path": "lightning_flows.codecs.KLNetwork",
                "init_args": {
                    "in_channels": 1,
                    "latent_channels": 2,
                    "channels": [4, 8],
                    "layers": 1,
                    "norm_groups": 2,
                },
            }
        },
    },
    "data": {"class_path": "lightning_flows.data.Digits", "init_args": {"batch_size": 32}},
    "trainer": {
        "max_steps": 2,
        "limit_val_batches": 1,
        "limit_test_batches": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [
            {"class_path": "lightning_flows.callbacks.EMA"},
            {"class_path": "lightning_flows.callbacks.ReconstructionGrid", "init_args": {"every_n_epochs": None}},
        ],
    },
}


def test_from_a_run_to_a_codec(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kl.yaml").write_text(yaml.safe_dump(RECIPE))
    dispatch(["fit", "-c", "kl.yaml"])
    assert (tmp_path / "runs/kl/samples/step-000002.png").is_file()
    dispatch(["test", "-c", "kl.yaml", "--ckpt_path", "last"])
    values = json.loads((tmp_path / "runs/kl/metrics.json").read_text())["test"]["values"]
    assert values["psnr"]["value"] > 0
    assert -1 <= values["ssim"]["value"] <= 1
    assert len(values["latent"]["value"]["std"]) == 2
    assert values["frechet[pixels]"]["real"] == 64
    dispatch(["export", "kl", "out", "cc-by-4.0"])
    model, codec = from_pretrained(tmp_path / "out"), AutoencoderKL(str(tmp_path / "out"))
    x = torch.rand(3, 1, 8, 8) * 2 - 1
    assert torch.allclose(codec.encode(x), model.encode(x), atol=1e-5)
    assert torch.allclose(codec.decode(codec.encode(x)), model.reconstruct(x), atol=1e-5)
