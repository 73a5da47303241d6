import math

import numpy as np
import pytest
import torch

from fourmill.core.modality import Modality, modality_table
from fourmill.core.positions import grid_positions, text_positions
from fourmill.train.assemble import Sample, assemble
from fourmill.train.batch import Batch, cut_patches
from fourmill.train.blocks import attention, hidden_bias
from fourmill.train.config import ModelConfig, fourm_b_cc12m
from fourmill.train.masking import Mixture
from fourmill.train.model import FourM, hidden_from, normalise_patches
from fourmill.train.optim import AdamW, is_plain, learning_rate

TI = ModelConfig(dim=384, encoder_depth=6, decoder_depth=6, num_heads=6)
PUBLIC = modality_table(224, 16, {"rgb": 16384, "depth": 8192, "normal": 8192, "semseg": 4096, "clip": 8192}, 30_000)


def _model(table: dict[str, Modality], **changes: object) -> FourM:
    torch.manual_seed(0)
    return FourM(ModelConfig(dim=32, encoder_depth=1, decoder_depth=1, num_heads=2, **changes), table.values(), 8)  # type: ignore[arg-type]


def _batch(model: FourM, size: int = 8, seed: int = 0) -> Batch:
    rng = np.random.default_rng(seed)
    samples = [
        Sample(
            {
                m.name: rng.integers(0, m.vocab_size or 1, 16).astype(np.int16)
                for m in model.modalities
                if m.kind == "tokens"
            },
            {m.name: np.array([4284, 4285, 4286, 3], np.int32) for m in model.modalities if m.kind == "text"},
            {"rgb@32": rng.integers(0, 256, (16, 192)).astype(np.uint8)},
        )
        for _ in range(size)
    ]
    masking = fourm_b_cc12m().masking.model_copy(update={"num_input_tokens": (20, 20), "num_target_tokens": (24, 24)})
    return assemble(
        samples, Mixture(masking, model.modalities), [np.random.default_rng([seed, i]) for i in range(size)], 192
    )


def test_state_dict_has_the_public_names_and_shapes_at_ti_size():
    with torch.device("meta"):
        state = FourM(TI, PUBLIC.values(), 16).state_dict()
    assert len(state) == 209
    expected = {
        "mask_token": (1, 1, 384),
        "encoder_norm.bias": (384,),
        "decoder_proj_context.bias": (384,),
        "encoder.5.attn.qkv.weight": (1152, 384),
        "encoder.0.norm1.bias": (384,),
        "encoder.0.mlp.fc3.weight": (1024, 384),
        "encoder.0.mlp.fc2.weight": (384, 1024),
        "decoder.0.cross_attn.kv.weight": (768, 384),
        "decoder.0.cross_attn.q.weight": (384, 384),
        "decoder.5.context_norm.weight": (384,),
        "decoder.5.self_attn.proj.weight": (384, 384),
        "encoder_embeddings.rgb@224.proj.weight": (384, 768),
        "encoder_embeddings.rgb@224.pos_emb": (1, 196, 384),
        "encoder_embeddings.caption.pos_emb": (1, 512, 384),
        "encoder_embeddings.tok_rgb@224.token_emb.weight": (16384, 384),
        "decoder_embeddings.det.to_logits.weight": (30000, 384),
        "decoder_embeddings.tok_semseg@224.mod_emb": (1, 1, 384),
    }
    assert {key: tuple(state[key].shape) for key in expected} == expected
    assert not any(key.startswith("decoder_embeddings.rgb@224") for key in state)


def test_ti_has_the_public_number_of_parameters_outside_embeddings():
    with torch.device("meta"):
        named = FourM(TI, PUBLIC.values(), 16).named_parameters()
        trunk = sum(p.numel() for name, p in named if "_embeddings." not in name)
    assert round(trunk / 1e6, 2) == 24.94


def test_positions_are_the_worked_values():
    grid = grid_positions(8, 14)[0]
    one = [0.84147, 0.01, 0.5403, 0.99995]
    assert grid[1].tolist() == pytest.approx([0, 0, 1, 1, *one], abs=1e-5)
    assert grid[14].tolist() == pytest.approx([*one, 0, 0, 1, 1], abs=1e-5)
    text = text_positions(8)
    assert text.shape == (1, 512, 8)
    expected = [0.84147, 0.09983, 0.01, 0.001, 0.5403, 0.995, 0.99995, 1.0]
    assert text[0, 1].tolist() == pytest.approx(expected, abs=1e-5)


def test_centred_positions_of_a_low_temperature_tell_places_apart():
    def likeness(table: torch.Tensor) -> float:
        unit = torch.nn.functional.normalize(table[0], dim=-1)
        return float((unit @ unit.T).mean())

    assert likeness(grid_positions(128, 8)) > 0.8
    assert abs(likeness(grid_positions(128, 8, 10.0, centred=True))) < 0.1


@pytest.mark.parametrize(
    ("visible", "modality", "seen"),
    [
        (
            [3, 0, 0, 1, 1, 0, 0],
            [1, 1, 1, 2, 2, 1, 2],
            [{0, 1, 2}, {0, 1, 2}, {0, 1, 2}, {3}, {3, 4}, {0, 1, 2}, {3, 4}],
        ),
        ([1, 1, 3, 0, 0, 0], [2, 2, 1, 1, 1, 2], [{0}, {0, 1}, {2, 3, 4}, {2, 3, 4}, {2, 3, 4}, {0, 1}]),
    ],
)
def test_decoder_mask_is_the_worked_table(visible: list[int], modality: list[int], seen: list[set[int]]):
    hidden = hidden_from(torch.tensor([visible]), torch.tensor([modality]))[0]
    assert [set((~row).nonzero().flatten().tolist()) for row in hidden] == seen


def test_a_query_that_may_see_nothing_averages():
    q = k = v = torch.randn(1, 1, 3, 4)
    hidden = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    out = attention(q, k, v, hidden_bias(hidden, torch.float32))
    assert torch.allclose(out[0, 0], v[0, 0].mean(0), atol=1e-6)


def test_loss_at_the_start_is_about_guessing():
    model = _model(modality_table(32, 8, {"depth": 1024, "semseg": 512}, 4292))
    losses = model.losses(_batch(model, 32))
    assert set(losses) == {"caption", "det", "tok_depth@32", "tok_semseg@32"}
    for name, loss in losses.items():
        assert float(loss.detach()) == pytest.approx(math.log(model.by_name[name].vocab_size or 1), abs=0.6)


def test_total_is_the_mean_over_all_modalities_that_can_be_predicted(table: dict[str, Modality]):
    model = _model(table)
    total, losses = model.loss(_batch(model))
    assert float(total.detach()) == pytest.approx(sum(float(v.detach()) for v in losses.values()) / 4, rel=1e-5)


def test_padding_and_neighbours_in_the_batch_change_nothing(table: dict[str, Modality]):
    model = _model(table).eval()
    batch = _batch(model, 2)
    with torch.inference_mode():
        y = model.decode(batch.targets, *model.encode(batch.inputs))[0]
        wide = _padded(batch)
        z = model.decode(wide.targets, *model.encode(wide.inputs))[0]
    number = int((batch.targets.modality_BM[0] >= 0).sum())
    assert torch.allclose(y[:number], z[:number], atol=1e-5)


def _padded(batch: Batch) -> Batch:
    def wider(part, fills: dict[str, int]):
        pad = {
            key: np.pad(value, ((0, 0), (0, 5)), constant_values=fills.get(key, 0))
            for key, value in vars(part).items()
            if key != "patches_PK"
        }
        return type(part)(**{**vars(part), **pad})

    return Batch(wider(batch.inputs, {"modality_BN": -1}), wider(batch.targets, {"modality_BM": -1}))


def test_a_text_target_sees_only_what_was_written_before(table: dict[str, Modality]):
    model = _model(table).eval()
    batch = _batch(model, 8)
    index = model.index("caption")
    row = next(b for b in range(8) if (batch.targets.modality_BM[b] == index).sum() >= 3)
    where = np.flatnonzero(batch.targets.modality_BM[row] == index)
    given = batch.targets.given_BM.copy()
    given[row, where[-1]] = 4288
    changed = Batch(batch.inputs, type(batch.targets)(**{**vars(batch.targets), "given_BM": given}))
    with torch.inference_mode():
        one, other = (model.decode(b.targets, *model.encode(b.inputs))[row, where] for b in (batch, changed))
    assert torch.equal(one[:-1], other[:-1]) and not torch.equal(one[-1], other[-1])


def test_patches_are_cut_row_column_channel_and_normalised_by_imagenet():
    rgb = np.arange(16 * 16 * 3, dtype=np.uint16).reshape(1, 16, 16, 3).astype(np.uint8)
    patches = cut_patches(rgb, 8)
    assert patches.shape == (1, 4, 192)
    assert patches[0, 1, :6].tolist() == rgb[0, 0, 8:10].reshape(-1).tolist()
    assert patches[0, 2, 24:27].tolist() == rgb[0, 9, 0].tolist()
    white = normalise_patches(torch.full((1, 192), 255, dtype=torch.uint8))[0, :3]
    assert white.tolist() == pytest.approx([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225], rel=1e-5)


def test_keys_can_start_as_queries(table: dict[str, Modality]):
    model = _model(table, queries_are_keys_init=2.0)
    q, k, _ = model.state_dict()["encoder.0.attn.qkv.weight"].chunk(3)
    assert torch.equal(k, 2 * q)
    cross = model.state_dict()
    assert torch.equal(cross["decoder.0.cross_attn.kv.weight"][:32], 2 * cross["decoder.0.cross_attn.q.weight"])


def test_norms_are_spared_weight_decay_and_embeddings_are_not():
    assert (
        is_plain("encoder.0.norm1.weight")
        and is_plain("decoder.0.query_norm.weight")
        and is_plain("decoder_norm.weight")
    )
    assert is_plain("decoder_proj_context.bias")
    assert not is_plain("encoder_embeddings.tok_normal@224.token_emb.weight") and not is_plain("mask_token")


def test_a_step_is_adamw(table: dict[str, Modality]):
    model, config = _model(table), fourm_b_cc12m().optim
    optimizer = AdamW(model, config)
    parameters = {"mask_token": config.weight_decay, "encoder_norm.weight": 0.0}
    expected = {name: model.get_parameter(name).detach().double() for name in parameters}
    mean, square = ({name: torch.zeros_like(value) for name, value in expected.items()} for _ in range(2))
    for step, rate in enumerate((0.1, 0.05), 1):
        optimizer.zero_grad()
        for name, decay in parameters.items():
            parameter = model.get_parameter(name)
            parameter.grad = grad = torch.randn_like(parameter)
            mean[name] = 0.9 * mean[name] + 0.1 * grad.double()
            square[name] = 0.95 * square[name] + 0.05 * grad.double() ** 2
            move = mean[name] / (1 - 0.9**step) / ((square[name] / (1 - 0.95**step)) ** 0.5 + 1e-8)
            expected[name] = expected[name] * (1 - rate * decay) - rate * move
        optimizer.step(rate)
    for name, value in expected.items():
        assert torch.allclose(model.get_parameter(name).detach().double(), value, atol=1e-6)


def test_the_learning_rate_warms_up_and_ends_at_nothing():
    config = fourm_b_cc12m()
    rates = [learning_rate(config.optim, config.steps, s) for s in (0, 4_768, 4_769, 239_119)]
    assert rates[1] == rates[2] == pytest.approx(3.2e-3) and rates[0] < 1e-6 and rates[3] < 1e-8
