"""The semantic codes of SymmFlow side by side on procedural shapes: the same network, steps, data and seed.

``onehot`` is the default, ``published`` the colours and the scalar plane of the paper. The colours are six corners of
the RGB cube, as far apart as colours can be, the scalar plane has the published width.

    python -m benchmarks.semantic_codes --steps 1500 --json FILE     # what FILE holds already is kept
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from omegaconf import OmegaConf

from benchmarks.common import finish, parser, show, single_thread, table
from lightning_flows.cli import main as command

RECIPE = Path(__file__).parents[1] / "configs" / "symmflow" / "shapes.yaml"
CORNERS = [[0, 0, 0], [255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 0], [255, 0, 255]]
CODES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "onehot": [("OneHot", {"num_classes": 6}), ("OneHot", {"num_classes": 5, "per": "image"})],
    "published": [("RGBPalette", {"palette": CORNERS, "beta": 10.0}), ("ClassPlane", {"num_classes": 5, "beta": 4.0})],
    "bits": [("AnalogBits", {"num_classes": 6}), ("AnalogBits", {"num_classes": 5, "per": "image"})],
    "learned": [
        ("LearnedColours", {"num_classes": 6, "channels": 3}),
        ("LearnedColours", {"num_classes": 5, "channels": 3, "per": "image"}),
    ],
}
PLANES = {"onehot": 11, "published": 4, "bits": 6, "learned": 6}
VALUES = ("miou", "pixel_accuracy", "boundary_f", "accuracy", "asked_miou")


def recipe(code: str, steps: int) -> Any:
    """The recipe of the zoo entry with another code, shorter."""
    config = OmegaConf.load(RECIPE)
    model = config.model.init_args
    model.network.init_args.codes = PLANES[code]
    model.network.init_args.network.init_args.in_channels = 3 + PLANES[code]
    parts = [{"class_path": f"lightning_flows.codecs.{name}", "init_args": given} for name, given in CODES[code]]
    model.semantic.init_args.parts = parts
    model.lr_scheduler.init_args.total_steps = config.trainer.max_steps = steps
    model.lr_scheduler.init_args.warmup_steps = min(100, steps // 4)
    config.trainer.val_check_interval = steps
    config.trainer.enable_progress_bar = False
    config.trainer.callbacks[-1].init_args.every_n_train_steps = steps
    return config


def scores(code: str, steps: int, folder: Path) -> dict[str, Any]:
    """Values on the 1,000 test items after a training, and its CPU seconds."""
    file = folder / f"{code}.yaml"
    OmegaConf.save(recipe(code, steps), file)
    arguments = ["-c", str(file), "--run_name", code, "--trainer.default_root_dir", str(folder / code)]
    start = time.process_time()
    command(["fit", *arguments])
    seconds = time.process_time() - start
    command(["test", *arguments, "--ckpt_path", "last"])
    found = json.loads((folder / code / "metrics.json").read_text())["test"]["values"]
    values = {name: found[name]["value"] for name in VALUES}
    picked = {name: next(iter(v.values())) if isinstance(v, dict) else v for name, v in values.items()}
    return {**picked, "cpu_seconds": round(seconds, 1)}


def main() -> None:
    """Train and test each code, and print the table."""
    options = parser(__doc__)
    options.add_argument("--codes", nargs="+", default=list(CODES), choices=list(CODES))
    options.add_argument("--steps", type=int, default=1500)
    args = options.parse_args()
    rows: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    with TemporaryDirectory() as folder:
        for code in args.codes:
            rows[code] = {"steps": args.steps, **scores(code, args.steps, Path(folder))}
            finish(rows, [], args.json)
    head = ["code", "planes", *VALUES, "CPU s"]
    cells = [[f"{row[name]:.3f}" for name in VALUES] + [f"{row['cpu_seconds']:.0f}"] for row in rows.values()]
    show(table(head, [[code, PLANES[code], *row] for code, row in zip(rows, cells, strict=True)]))


if __name__ == "__main__":
    single_thread()
    main()
