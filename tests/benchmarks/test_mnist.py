"""The judge of MNIST, on small made-up digits: what it does not share with the judge of garments."""

import numpy as np
import pytest
import torch

from benchmarks.judges import cnn, fashion_cnn, mnist_cnn
from tests.benchmarks.tiny import images, pictures

SHORT = cnn.Recipe(epochs=2, batch_size=16, lr=0.05)


def test_digits_are_moved_by_up_to_two_pixels_and_never_mirrored():
    x = torch.full((400, 1, 28, 28), -1.0)
    x[..., 10:18, 12] = 1  # an L
    x[..., 17, 12:16] = 0.5
    torch.manual_seed(0)
    moved = mnist_cnn.shifted(x)
    wanted = {(down, right): x[0].roll((down, right), (1, 2)) for down in range(-2, 3) for right in range(-2, 3)}
    found = [place for image in moved for place, whole in wanted.items() if torch.equal(image, whole)]
    assert len(found) == 400
    assert set(found) == set(wanted)


def test_what_is_moved_out_is_gone_and_black_comes_in():
    x = torch.ones(200, 1, 28, 28)
    torch.manual_seed(0)
    moved = mnist_cnn.shifted(x)
    assert moved.unique().tolist() == [-1, 1]
    rows, columns = ((moved == 1).any(axis).flatten(1).sum(1) for axis in (3, 2))
    assert torch.equal((moved == 1).flatten(1).sum(1), rows * columns)
    assert sorted(set(rows.tolist())) == [26, 27, 28]


def test_training_is_the_same_each_time_and_leaves_the_global_numbers_alone():
    pixels, labels = pictures(48)
    state = torch.get_rng_state()
    first, second = (mnist_cnn.train(pixels, labels, SHORT) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in first.state_dict().items())
    assert not torch.equal(first.head[1].weight, fashion_cnn.train(pixels, labels, SHORT).head[1].weight)


def test_the_judge_is_trained_once_and_kept_with_its_accuracy(monkeypatch, tmp_path):
    asked, splits = [], {"train": pictures(64), "test": pictures(30, seed=1)}
    monkeypatch.setattr(mnist_cnn, "_stored", lambda split: asked.append(split) or splits[split])
    monkeypatch.setattr(mnist_cnn, "RECIPE", SHORT)
    monkeypatch.setattr(mnist_cnn, "REQUIRED", 0.0)
    found = [mnist_cnn.trained.__wrapped__(tmp_path) for _ in range(2)]
    assert asked == ["train", "test"]
    assert found[0].accuracy == found[1].accuracy > 0.1
    assert found[0].digest == found[1].digest
    assert mnist_cnn.place(tmp_path, SHORT).is_file()
    assert fashion_cnn.place(tmp_path, SHORT) != mnist_cnn.place(tmp_path, SHORT)
    monkeypatch.setattr(mnist_cnn, "REQUIRED", 1.01)
    with pytest.raises(RuntimeError, match=r"1\.01 are needed"):
        mnist_cnn.trained.__wrapped__(tmp_path)


def test_all_files_of_a_split_are_read_and_a_missing_one_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv(cnn.DATA, raising=False)
    with pytest.raises(ValueError, match="LIGHTNING_FLOWS_DATA is not set"):
        mnist_cnn.digits("test")
    monkeypatch.setenv(cnn.DATA, str(tmp_path))
    with pytest.raises(ValueError, match=r"holds no mnist/test\*\.npz"):
        mnist_cnn.digits("test")
    pixels, labels = pictures(6)
    (tmp_path / "mnist").mkdir()
    for part in (0, 1):
        rows = slice(3 * part, 3 * part + 3)
        stored = {"images": pixels[rows, 0].numpy(), "labels": labels[rows].numpy().astype(np.uint8)}
        np.savez(tmp_path / f"mnist/train-0{part}.npz", **stored)
    real = mnist_cnn.digits("train")
    assert torch.equal(real.images, images(6)[0])
    assert torch.equal(real.labels, labels)


def test_the_judge_judges_and_its_features_are_an_extractor(monkeypatch):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = mnist_cnn.Network().eval()
    monkeypatch.setattr(mnist_cnn, "trained", lambda: mnist_cnn.Judge(network, 0.99, "digest"))
    x, _ = images(12)
    taken = network(x).argmax(1)
    assert mnist_cnn.judge(x, taken) == (1.0, 0.99, 12)
    assert mnist_cnn.judge(x, (taken + 1) % 10).accuracy == 0
    assert torch.allclose(mnist_cnn.features(x), network.features(x))
    assert mnist_cnn.extractor().name == "mnist-cnn"
    with pytest.raises(ValueError, match="images and labels must be"):
        mnist_cnn.judge(x[:, 0], taken)


def test_the_command_says_where_the_judge_is_and_its_accuracy(monkeypatch, tmp_path, capsys):
    found = mnist_cnn.Judge(mnist_cnn.Network(), 0.9876, "digest")
    monkeypatch.setattr("sys.argv", ["mnist_cnn", "--folder", str(tmp_path)])
    threads = torch.get_num_threads()
    try:
        cnn.main("A judge.", lambda folder: found, mnist_cnn.place, "real test images")
    finally:
        torch.set_num_threads(threads)
    assert capsys.readouterr().out == (
        f"accuracy on the real test images: 0.9876 ({mnist_cnn.place(tmp_path)}, digest)\n"
    )
