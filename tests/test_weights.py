"""Copying weights: every key used once, every shape agreed, or a refusal that names it."""

import pytest
import torch
from torch import nn

from mmlearn.weights import copy_weights, load_hf, rename


def source_of(linear: nn.Linear, **changes) -> dict:
    state = {"w": torch.ones(linear.weight.shape), "b": torch.full(linear.bias.shape, 2.0)}
    return {key: value for key, value in (state | changes).items() if value is not None}


RENAMES = {"weight": "w", "bias": "b"}


def test_weights_are_copied_under_their_new_names():
    linear = nn.Linear(3, 4)
    copy_weights(linear, source_of(linear), RENAMES)
    assert (linear.weight == 1).all()
    assert (linear.bias == 2).all()


def test_a_transposed_weight_is_turned():
    linear = nn.Linear(3, 4)
    turned = torch.arange(12.0).reshape(3, 4)
    copy_weights(linear, source_of(linear, w=turned), RENAMES, transposed=["weight"])
    assert torch.equal(linear.weight, turned.T)


def test_half_precision_weights_are_widened():
    linear = nn.Linear(3, 4)
    copy_weights(linear, source_of(linear, w=torch.ones(4, 3).half()), RENAMES)
    assert linear.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"b": None}, r"missing \['b'\]"),
        ({"extra": torch.zeros(1)}, r"not used by this model \['extra'\]"),
        ({"w": torch.zeros(5, 3)}, r"w has shape \(5, 3\), wanted \(4, 3\) for weight"),
    ],
)
def test_a_missing_extra_or_misshapen_key_is_refused_by_name(changes, message):
    linear = nn.Linear(3, 4)
    before = {key: value.clone() for key, value in linear.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        copy_weights(linear, source_of(linear, **changes), RENAMES)
    for key, value in linear.state_dict().items():
        assert torch.equal(value, before[key]), "a refused copy must change nothing"


def test_a_key_of_ours_without_a_source_is_refused():
    linear = nn.Linear(3, 4)
    with pytest.raises(ValueError, match=r"missing \['bias'\]|not used by this model \['bias'\]"):
        copy_weights(linear, {"w": torch.ones(4, 3)}, {"weight": "w"})


def test_a_skipped_key_may_be_there_or_not():
    linear = nn.Linear(3, 4)
    copy_weights(linear, source_of(linear, extra=torch.zeros(1)), RENAMES, skipped=["extra"])
    copy_weights(linear, source_of(linear), RENAMES, skipped=["extra"])


def test_rename_replaces_fragments_in_their_order():
    fragments = (("a.", "alpha."), (".x", ".y"))
    assert rename(["a.x", "b.x"], fragments) == {"a.x": "alpha.y", "b.x": "b.y"}


def test_a_folder_that_is_no_checkpoint_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        load_hf(tmp_path, "CLIPModel", "clip")


def test_a_hub_name_without_the_hub_is_refused_with_the_way_out():
    with pytest.raises(ValueError, match="Name a local folder"):
        load_hf("nobody/no-such-model", "CLIPModel", "clip")


def test_another_model_is_refused_by_name(tmp_path):
    from transformers import BertConfig, BertModel

    bert = BertModel(
        BertConfig(
            vocab_size=9,
            hidden_size=4,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=4,
        )
    )
    with pytest.raises(ValueError, match="source is a BertModel, wanted a CLIPModel"):
        load_hf(bert, "CLIPModel", "clip")
    bert.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'bert' model, wanted 'clip'"):
        load_hf(tmp_path, "CLIPModel", "clip")
