"""Laws of conditions: streams, presence, joining, choosing."""

import pytest
import torch

from lightning_flows.flow.condition import STREAMS, Condition, Tokens


@pytest.fixture
def full():
    return Condition(
        label=torch.arange(4),
        tokens=Tokens(torch.arange(24.0).reshape(4, 3, 2), torch.ones(4, 3, dtype=torch.bool)),
        vector=torch.arange(8.0).reshape(4, 2),
        spatial=torch.arange(16.0).reshape(4, 1, 2, 2),
        present={"label": torch.tensor([True, False, True, True])},
    )


def test_streams_and_batch_size(full):
    assert full.streams == STREAMS
    assert full.batch_size == 4
    assert Condition().streams == ()
    assert Condition().batch_size is None


def test_presence_is_true_unless_said_and_false_for_what_is_not_given(full):
    assert full.presence("label").tolist() == [True, False, True, True]
    assert full.presence("vector").tolist() == [True] * 4
    assert Condition(label=torch.arange(2)).presence("tokens").tolist() == [False] * 2
    assert Condition().presence("label", batch_size=3).tolist() == [False] * 3
    with pytest.raises(ValueError, match="batch_size"):
        Condition().presence("label")
    with pytest.raises(ValueError, match="stream"):
        full.presence("colour")


def test_absent_marks_streams_keeps_values_and_leaves_the_original(full):
    gone = full.absent()
    assert all(not bool(gone.presence(s).any()) for s in STREAMS)
    assert torch.equal(gone.label, full.label)
    assert bool(full.presence("vector").all())
    partly = full.absent("label", where=torch.tensor([True, False, False, False]))
    assert partly.presence("label").tolist() == [False, False, True, True]
    assert bool(partly.presence("vector").all())


def test_choosing_and_joining_are_inverse(full):
    joined = Condition.cat([full[:1], full[1:]])
    assert torch.equal(joined.label, full.label)
    assert torch.equal(joined.tokens.values, full.tokens.values)
    assert torch.equal(joined.tokens.mask, full.tokens.mask)
    assert torch.equal(joined.spatial, full.spatial)
    assert torch.equal(joined.presence("label"), full.presence("label"))
    order = torch.tensor([3, 1])
    assert full[order].label.tolist() == [3, 1]
    assert full[order].presence("label").tolist() == [True, False]
    assert full[full.presence("label")].label.tolist() == [0, 2, 3]


def test_joining_present_and_absent_keeps_each(full):
    both = Condition.cat([full, full.absent()])
    assert both.presence("vector").tolist() == [True] * 4 + [False] * 4
    with pytest.raises(ValueError, match="streams"):
        Condition.cat([full, Condition(label=torch.arange(2))])


def test_inconsistent_conditions_are_refused():
    with pytest.raises(ValueError, match="batch size"):
        Condition(label=torch.arange(3), vector=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="present"):
        Condition(label=torch.arange(3), present={"vector": torch.ones(3, dtype=torch.bool)})


def test_to_moves_every_tensor(full):
    moved = full.to("meta")
    tensors = [moved.label, *moved.tokens, moved.vector, moved.spatial, moved.presence("label")]
    assert all(x.device.type == "meta" for x in tensors)
