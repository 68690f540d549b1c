import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image

from lightning_flows.callbacks import EMA, SampleGrid
from tests.callbacks.toy import Toy, data, trainer


def names(folder):
    return sorted(p.name for p in (folder / "samples").iterdir())


@pytest.mark.parametrize("validate", [True, False])
def test_one_picture_per_epoch_and_none_twice_at_the_end(tmp_path, validate):
    loaders = (data(), data(2)) if validate else (data(),)
    trainer(tmp_path, SampleGrid(n=4), max_epochs=3, num_sanity_val_steps=1).fit(Toy(), *loaders)
    assert names(tmp_path) == ["step-000006.png", "step-000012.png", "step-000018.png"]


def test_steps_and_fit_end_only(tmp_path):
    grid = SampleGrid(every_n_steps=4, every_n_epochs=None, n=1, filename="{step}.png")
    trainer(tmp_path, grid, max_steps=10).fit(Toy(), data())
    assert names(tmp_path) == ["10.png", "4.png", "8.png"]


def test_accumulated_micro_batches_draw_once(tmp_path):
    model = Toy()
    grid = SampleGrid(every_n_steps=2, every_n_epochs=None, n=1, at_fit_end=False)
    trainer(tmp_path, grid, max_epochs=1, accumulate_grad_batches=2).fit(model, data(16))
    assert len(model.sampled) == 2


@pytest.mark.parametrize("options", [{}, {"every_n_steps": 3}])
@pytest.mark.parametrize("grid_first", [True, False])
def test_samples_are_drawn_with_the_average(tmp_path, grid_first, options):
    ema, model = EMA(0.9), Toy()
    averages = []

    class Watch(EMA):
        def on_train_batch_end(self, *args):
            super().on_train_batch_end(*args)
            averages.append(self._weights.average[0].clone())

    ema = Watch(0.9)
    grid = SampleGrid(n=2, **options)
    callbacks = (grid, ema) if grid_first and not options else (ema, grid)
    trainer(tmp_path, *callbacks, max_epochs=2).fit(model, data(), data(2))
    steps = [2, 5, 8, 11] if options else [5, 11]
    assert len(model.sampled) == len(steps)
    assert all(torch.equal(s, averages[i]) for s, i in zip(model.sampled, steps, strict=True))


def test_training_is_the_same_with_and_without_pictures(tmp_path):
    class Noisy(Toy):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * torch.rand(())

    results = []
    for callbacks in ((), (SampleGrid(n=2, every_n_steps=1),)):
        model = Noisy()
        model.frozen.eval()
        torch.manual_seed(3)
        trainer(tmp_path, *callbacks, max_steps=8).fit(model, data())
        results.append((model.net.weight.detach(), torch.rand(2)))
        assert model.training
        assert not model.frozen.training
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_labels_fill_whole_rows_and_tiny_digits_are_enlarged(tmp_path):
    grid = SampleGrid(labels=[0, 5, 9])
    trainer(tmp_path, grid, max_steps=1).fit(Toy(), data())
    (path,) = (tmp_path / "samples").iterdir()
    assert Image.open(path).size == (3 * 66 + 2, 21 * 66 + 2)


def test_pictures_go_to_tensorboard_and_past_other_loggers(tmp_path):
    loggers = [CSVLogger(tmp_path), TensorBoardLogger(tmp_path)]
    seen = []
    loggers[1].experiment.add_image = lambda *args, **kwargs: seen.append((args, kwargs))
    trainer(tmp_path, SampleGrid(n=1), max_steps=2, logger=loggers).fit(Toy(), data())
    ((tag, image, step), kwargs) = seen[0]
    assert (tag, step, image.shape, kwargs) == ("samples", 2, (68, 68, 3), {"dataformats": "HWC"})


def test_pictures_go_to_loggers_that_log_images(tmp_path):
    class Board(CSVLogger):
        seen: list = []  # noqa: RUF012

        def log_image(self, key, images, step):
            self.seen.append((key, images[0].size, step))

    trainer(tmp_path, SampleGrid(n=1), max_steps=2, logger=Board(tmp_path)).fit(Toy(), data())
    assert Board.seen == [("samples", (68, 68), 2)]


def test_a_module_that_does_not_draw_pictures_is_named(tmp_path):
    class Shapes(Toy):
        def sample(self, *args, **kwargs):
            return [object()]

    with pytest.raises(ValueError, match=r"Shapes must give \(B, C, H, W\), got list"):
        trainer(tmp_path, SampleGrid(), max_steps=1).fit(Shapes(), data())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"every_n_steps": 0}, "every_n_steps"),
        ({"every_n_epochs": 0}, "every_n_epochs"),
        ({"n": 0}, "n must"),
        ({"nrow": 0}, "nrow"),
        ({"labels": []}, "labels"),
        ({"filename": "a.png"}, "filename"),
        ({"filename": "{step}.jpg"}, "filename"),
    ],
)
def test_bad_arguments_are_named(arguments, name):
    with pytest.raises(ValueError, match=name):
        SampleGrid(**arguments)


def test_prompts_are_drawn_in_turn_under_the_conditions_that_the_module_makes_of_them(tmp_path):
    asked = []

    class Reads(Toy):
        def condition_of(self, batch):
            asked.append(batch["caption"])

    trainer(tmp_path, SampleGrid(n=5, prompts=["a hat", "a shoe"]), max_epochs=1).fit(Reads(), data())
    assert asked == [["a hat", "a shoe", "a hat", "a shoe", "a hat"]]
    assert SampleGrid(prompts=["a", "b", "c"]).n == 63


@pytest.mark.parametrize("options", [{"prompts": []}, {"prompts": ["a"], "labels": [1]}])
def test_prompts_without_text_or_beside_labels_are_refused(options):
    with pytest.raises(ValueError, match="prompts must be at least one text, and without labels"):
        SampleGrid(**options)
