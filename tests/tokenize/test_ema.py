import pytest
import torch

from fourmill.core.ranks import ALONE
from fourmill.core.work import no_progress
from fourmill.tokenize.batches import Batches
from fourmill.tokenize.load import load_image_tokenizer
from fourmill.tokenize.state import start
from fourmill.tokenize.train import train_step, train_tokenizer
from fourmill.tokenize.train_set import read_label


def test_the_average_follows_the_rule_over_weights_and_codebook(spec, store):
    one = spec("clip", ema_decay=0.15)
    labels = read_label(store, one.train_set, one.train_set_digest, "clip")
    state, batches = start(one.config, labels, ALONE.device), Batches(labels, one.config)
    seen = []
    for _ in range(4):
        train_step(state, batches(state.draw), one.config)
        seen.append({key: value.clone() for key, value in state.model.state_dict().items()})
    for key, value in state.published.state_dict().items():
        expected = seen[0][key]  # the first step's weights, not those before it
        for num, model in enumerate(seen[1:], 1):
            decay = min(0.15, num / (num + 10))
            expected = decay * expected + (1 - decay) * model[key]
        assert torch.allclose(value, expected, atol=1e-6), key
    assert state.published.quantize.codewords_KD.data_ptr() != state.model.quantize.codewords_KD.data_ptr()
    assert float(state.published.quantize._codebook.initted) == 1


def test_the_average_is_published_with_the_figures_of_both(spec, store, read_report):
    with_average = read_report(train_tokenizer(spec("clip", steps=8, ema_decay=0.5), no_progress))
    without = read_report(train_tokenizer(spec("clip", steps=8), no_progress))
    assert with_average["live_figures"] == without["figures"] != with_average["figures"]
    card = store.read(f"{with_average['path']}/card.md").decode()
    assert "moving average" in card and str(without["figures"]["r2"]) in card
    model = load_image_tokenizer(store, with_average["path"])
    last = load_image_tokenizer(store, without["path"])
    assert not torch.equal(model.quant_proj.weight, last.quant_proj.weight)
    assert with_average["curve"] == without["curve"]


def test_an_average_that_never_forgets_is_refused(spec):
    config = spec("clip").config
    with pytest.raises(ValueError, match="less than 1"):
        type(config.training).model_validate(config.training.model_dump() | {"ema_decay": 1})
