"""Every preset can be built, and one layer of it runs: the large ones never whole."""

from dataclasses import replace

import pytest
import torch

from pyllm.models import PRESETS, Transformer
from pyllm.train.config import TRAIN_PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_layer_of_each_preset_trains(name):
    # The first layer that is of the kind the preset is about, at its full width.
    config = replace(PRESETS[name], n_layers=1, vocab_size=300, max_seq_len=16)
    torch.manual_seed(0)
    model = Transformer(config)
    ids = torch.randint(300, (1, 17))
    output = model(ids[:, :-1], ids[:, 1:])
    # Untrained: about as unsure as a die of 300 sides.
    assert 5.0 < output.loss.item() < 7.5
    output.loss.backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), parameter_name
        assert (parameter.grad != 0).any(), parameter_name


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_can_be_laid_out_whole(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model = Transformer(config)
        logits = model(torch.zeros(1, 8, dtype=torch.long)).logits
    assert logits.shape == (1, 8, config.vocab_size)
    assert len(model.blocks) == config.n_layers


def test_each_preset_has_settings_to_train_it_with():
    assert TRAIN_PRESETS.keys() == PRESETS.keys()
    for name, train in TRAIN_PRESETS.items():
        assert train.seq_len <= PRESETS[name].max_seq_len
