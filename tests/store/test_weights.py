"""Tensors in and out: whole or not at all, strict, and never a pickle."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from lightning_flows.store import in_16_bits, load_into, load_tensors, save_tensors


def tensors():
    return {"weight": torch.arange(6.0).reshape(3, 2), "bias": torch.ones(3)}


def one_sentence(error):
    text = str(error.value)
    return "\n" not in text and text.endswith(".")


def test_tensors_return_as_they_were_saved(tmp_path):
    file = tmp_path / "model.safetensors"
    saved = {**tensors(), "half": torch.randn(4).to(torch.bfloat16), "count": torch.tensor(3)}
    save_tensors(file, saved, {"note": "x"})
    loaded = load_tensors(file)
    assert loaded.keys() == saved.keys()
    for name, value in saved.items():
        assert loaded[name].dtype == value.dtype
        assert torch.equal(loaded[name], value)
    with safe_open(file, framework="pt") as stored:
        assert stored.metadata() == {"format": "pt", "note": "x"}


@pytest.mark.parametrize("length", range(1, 130))
def test_a_header_of_any_length_is_read(tmp_path, length):
    """The first byte is the header's length; some lengths look like the first byte of a pickle."""
    save_tensors(tmp_path / "w", {"x": torch.ones(1)}, {"note": "x" * length})
    assert torch.equal(load_tensors(tmp_path / "w")["x"], torch.ones(1))


def test_tied_and_viewed_tensors_can_be_saved(tmp_path):
    base = torch.arange(8.0)
    save_tensors(tmp_path / "w", {"a": base, "b": base, "tail": base[4:], "turned": base.reshape(2, 4).t()})
    loaded = load_tensors(tmp_path / "w")
    assert torch.equal(loaded["b"], base)
    assert torch.equal(loaded["tail"], base[4:])
    assert torch.equal(loaded["turned"], base.reshape(2, 4).t())


def test_a_failing_save_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    file = tmp_path / "model.safetensors"
    save_tensors(file, tensors())
    before = file.read_bytes()

    def half(data, path, metadata=None):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.torch.save_file", half)
    with pytest.raises(OSError, match="disk full"):
        save_tensors(file, {"other": torch.ones(1)})
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_is_refused_unread(tmp_path, zipped):
    class Bomb:
        def __reduce__(self):
            return pytest.fail, ("the pickle was executed",)

    file = tmp_path / "model.safetensors"
    torch.save(Bomb(), file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match="is a pickle") as caught:
        load_tensors(file)
    assert one_sentence(caught)


@pytest.mark.parametrize("keep", [0, 4, 20, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    file = tmp_path / "model.safetensors"
    save_tensors(file, tensors())
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ValueError, match="is truncated or no safetensors") as caught:
        load_tensors(file)
    assert one_sentence(caught)
    assert str(file) in str(caught.value)


def test_a_missing_file_and_a_pointer_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"weights file .*absent does not exist"):
        load_tensors(tmp_path / "absent")
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(ValueError, match="Git LFS pointer"):
        load_tensors(tmp_path / "pointer")


def test_loading_copies_every_value():
    module = nn.Linear(2, 3)
    assert load_into(module, tensors()) == []
    assert torch.equal(module.weight, tensors()["weight"])
    assert module.weight.requires_grad


def test_sixteen_bit_storage_keeps_the_dtype_of_the_module():
    module = nn.Linear(2, 3)
    load_into(module, {name: value.to(torch.bfloat16) for name, value in tensors().items()})
    assert module.weight.dtype == torch.float32
    assert torch.equal(module.weight, tensors()["weight"])


def test_a_module_on_the_meta_device_gets_real_tensors():
    with torch.device("meta"):
        module = nn.Linear(2, 3)
    with pytest.raises(ValueError, match="meta device has no fresh values"):
        load_into(module, tensors(), reinit=["bias"])
    load_into(module, {name: value.half() for name, value in tensors().items()})
    assert module.weight.dtype == torch.float32
    assert torch.equal(module(torch.ones(1, 2)), torch.tensor([[2.0, 6.0, 10.0]]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": None}, "missing bias"),
        ({"gain": torch.ones(1)}, "unknown gain"),
        ({"weight": torch.ones(2, 3)}, r"weight has shape \(2, 3\) instead of \(3, 2\)"),
        ({"bias": torch.ones(3, dtype=torch.int64)}, "bias has dtype torch.int64 instead of torch.float32"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_copied(changes, message):
    module = nn.Linear(2, 3)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    given = {name: value for name, value in {**tensors(), **changes}.items() if value is not None}
    with pytest.raises(ValueError, match=message) as caught:
        load_into(module, given)
    assert one_sentence(caught)
    assert "reinit" in str(caught.value)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


@pytest.mark.parametrize("patterns", [["0.weight", "0.bias"], ["0.*"]])
def test_named_tensors_start_afresh(patterns):
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 1))
    fresh = module[0].weight.clone()
    given = nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 1)).state_dict()
    assert load_into(module, given, reinit=patterns) == ["0.weight", "0.bias"]
    assert torch.equal(module[0].weight, fresh)
    assert torch.equal(module[1].weight, given["1.weight"])


def test_a_tensor_that_is_gone_can_be_named_too():
    assert load_into(nn.Linear(2, 3), {**tensors(), "gain": torch.ones(1)}, reinit=["gain"]) == []


def test_a_pattern_that_fits_nothing_is_an_error():
    with pytest.raises(ValueError, match=r"reinit=\['haed.*'\] names no tensor"):
        load_into(nn.Linear(2, 3), tensors(), reinit=["haed.*"])
    with pytest.raises(ValueError, match="is a string"):
        load_into(nn.Linear(2, 3), tensors(), reinit="bias")


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2**-11), ("bfloat16", 2**-8)])
def test_large_tensors_are_stored_in_16_bits_and_loaded_as_float32(tmp_path, dtype, error):
    module = nn.Linear(64, 32)
    module.register_buffer("count", torch.arange(2000))
    narrow = in_16_bits(module.state_dict(), dtype)
    assert narrow["weight"].dtype == getattr(torch, dtype)
    assert torch.equal(narrow["bias"], module.bias)  # small: as it was
    assert narrow["count"].dtype == torch.int64
    save_tensors(tmp_path / "w", narrow)
    other = nn.Linear(64, 32)
    other.register_buffer("count", torch.zeros(2000, dtype=torch.int64))
    load_into(other, load_tensors(tmp_path / "w"))
    assert other.weight.dtype == torch.float32
    # relative to 2^-14, the smallest normal number of float16
    assert ((other.weight - module.weight).abs() <= error * module.weight.abs().clamp(min=2**-14)).all()


def test_values_that_16_bits_cannot_hold_are_named():
    large = {"gain": torch.full((2000,), 1e5)}
    assert in_16_bits(large, "bfloat16")["gain"].isfinite().all()
    with pytest.raises(ValueError, match="cannot hold the values of gain") as caught:
        in_16_bits(large, "float16")
    assert one_sentence(caught)
    with pytest.raises(ValueError, match="dtype must be one of float16, bfloat16, got 'int8'"):
        in_16_bits(large, "int8")
