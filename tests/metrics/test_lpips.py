"""LPIPS with a network from a file: the formula written out, what is refused, and the way out without the internet."""

import urllib.error

import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional as F

from lightning_flows.metrics import LPIPS


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A random AlexNet in a file, and the network."""
    torch.manual_seed(0)
    network = torchvision.models.alexnet(weights=None).eval()
    file = tmp_path_factory.mktemp("weights") / "alexnet.pth"
    kept = {name: value for name, value in network.state_dict().items() if "features" in name or name.endswith("bias")}
    torch.save(kept, file)  # the classifier's biases are more than is needed, as in torchvision's file
    return str(file), network


def images(n=3, side=40, channels=3):
    grey = torch.randint(256, (2, n, channels, side, side), generator=torch.Generator().manual_seed(1))
    return grey / 127.5 - 1


def by_the_formula(metric, network, x, y):
    """Distances (B,): features after each of the five ReLUs, unit vectors, weighted squares, means over places."""
    heads = [head.model[-1].weight for head in metric.network.lins]  # (1, C, 1, 1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x, y = ((image - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for image in (x, y))
    total = torch.zeros(len(x))
    for layer in network.features[:-1]:  # without the last pooling
        layer = F.relu if isinstance(layer, torch.nn.ReLU) else layer  # torchvision's works in place
        x, y = layer(x), layer(y)
        if layer is F.relu:
            square = (F.normalize(x, dim=1) - F.normalize(y, dim=1)).square()
            total += (heads.pop(0) * square).sum(1).mean((1, 2))
    assert not heads
    return total


def test_it_is_the_formula_with_the_weights_of_the_file(weights):
    file, network = weights
    metric, (x, y) = LPIPS(backbone_weights=file), images()
    metric.update(x[:1], y[:1])
    metric.update(x[1:], y[1:])
    with torch.no_grad():
        expected = by_the_formula(metric, network, x, y)
    assert expected.min() > 1e-4
    assert metric.compute().item() == pytest.approx(expected.mean().item(), rel=1e-4)


def test_equal_images_have_no_distance_and_grey_ones_are_repeated(weights):
    metric, (x, y) = LPIPS(backbone_weights=weights[0]), images(channels=1)
    metric.update(x, x)
    assert metric.compute() == 0
    metric.update(x, y)
    grey, rgb = metric.compute(), LPIPS(backbone_weights=weights[0])
    rgb.update(x.expand(-1, 3, -1, -1), x.expand(-1, 3, -1, -1))
    rgb.update(x.expand(-1, 3, -1, -1), y.expand(-1, 3, -1, -1))
    assert grey == rgb.compute() > 0


def test_precision_and_random_state_around_it_do_not_matter(weights):
    (x, y), values = images(), []
    before = torch.get_rng_state()
    for autocast in (False, True):
        metric = LPIPS(backbone_weights=weights[0])
        metric.prepare()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            metric.update(x, y)
        values.append(metric.compute())
    assert values[0] == values[1]
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(weight.requires_grad for weight in metric.parameters())


def test_other_weights_are_called_by_their_hash_and_only_the_published_ones_are_lpips(weights):
    metric = LPIPS(backbone_weights=weights[0])
    assert metric.name.startswith("lpips[alex-")
    assert metric.extractor.startswith("alexnet-")
    assert (LPIPS().name, LPIPS().extractor) == ("lpips", "alexnet")
    assert LPIPS("vgg").name == "lpips[vgg]"


@pytest.mark.parametrize(("net", "model"), [("vgg", "vgg16"), ("squeeze", "squeezenet1_1")])
def test_the_other_networks_take_their_files_too(net, model, tmp_path):
    state = getattr(torchvision.models, model)(weights=None).features.state_dict()
    file = tmp_path / "weights.safetensors"
    save_file({f"features.{name}": value for name, value in state.items()}, file)
    metric, (x, y) = LPIPS(net, str(file)), images(1, side=24)
    metric.update(x, y)
    assert metric.compute() > 0
    last = max((name for name in state if name.endswith("weight")), key=lambda name: int(name.split(".")[0]))
    assert any(torch.equal(value, state[last]) for value in metric.network.net.state_dict().values())


def test_without_the_internet_it_names_the_file_and_the_argument(monkeypatch):
    def offline(*_, **__):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(FileNotFoundError, match=r"alexnet-owt-7be5be79\.pth.*backbone_weights=FILE"):
        LPIPS().prepare()


def test_a_file_of_another_network_is_refused(tmp_path):
    file = tmp_path / "vgg.pth"
    torch.save({"features.0.weight": torch.zeros(64, 3, 3, 3)}, file)
    with pytest.raises(ValueError, match=r"backbone_weights must be those of alexnet: features\.0\.weight"):
        LPIPS(backbone_weights=str(file)).prepare()


@pytest.mark.parametrize(("net", "side"), [("alex", 30), ("vgg", 15), ("squeeze", 16)])
def test_images_too_small_for_the_network_are_refused(net, side):
    x = torch.zeros(1, 3, side, side)
    with pytest.raises(ValueError, match=f"side {side + 1} or more for net='{net}'"):
        LPIPS(net).update(x, x)


def test_wrong_arguments_are_named(weights):
    with pytest.raises(ValueError, match="net must be one of alex, vgg, squeeze"):
        LPIPS("resnet")
    with pytest.raises(ValueError, match=r"backbone_weights must be a file, got 'nowhere\.pth'"):
        LPIPS(backbone_weights="nowhere.pth")
    with pytest.raises(ValueError, match="one shape"):
        LPIPS(backbone_weights=weights[0]).update(torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, 32, 32))
    with pytest.raises(ValueError, match="no pair"):
        LPIPS(backbone_weights=weights[0]).compute()
