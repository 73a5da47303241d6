import pytest
import torch
from torch.nn import functional as F

from fourmill.tokenize.config import QuantizerConfig
from fourmill.tokenize.quantizer import Quantizer


def _quantizer(size=8, dim=4, threshold=0.0, **config):
    torch.manual_seed(0)
    return Quantizer(QuantizerConfig(codebook_size=size, latent_dim=dim, **config), threshold)


def _latents(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_tokens_are_the_nearest_codewords_by_cosine():
    quantizer, latent = _quantizer().eval(), _latents(3, 4, 2, 5)
    found = quantizer(latent)
    cosine = torch.einsum("bdhw,kd->bkhw", F.normalize(latent, dim=1), F.normalize(quantizer.codewords_KD, dim=1))
    assert torch.equal(found.tokens_Bhw, cosine.argmax(1))
    assert torch.equal(quantizer(latent * 7).tokens_Bhw, found.tokens_Bhw)


def test_codewords_are_looked_up_as_stored_and_gradients_pass_straight_through():
    quantizer, latent = _quantizer().eval(), _latents(2, 4, 3, 3).requires_grad_()
    quantizer._codebook.embed *= 0.5
    found = quantizer(latent)
    assert torch.allclose(found.latent_BDhw, quantizer.lookup(found.tokens_Bhw))
    assert torch.allclose(found.latent_BDhw.norm(dim=1), torch.tensor(0.5))
    found.latent_BDhw.sum().backward()
    assert latent.grad is not None and torch.equal(latent.grad, torch.ones_like(latent))
    assert not quantizer.codewords_KD.requires_grad


def test_commitment_pulls_the_latent_as_it_is_towards_its_codeword():
    quantizer, latent = _quantizer().eval(), _latents(2, 4, 3, 3).requires_grad_()
    found = quantizer(latent)
    codes = quantizer.lookup(found.tokens_Bhw)
    assert torch.isclose(found.commitment, ((latent - codes) ** 2).mean())
    found.commitment.backward()
    assert latent.grad is not None and torch.allclose(latent.grad, 2 * (latent - codes).detach() / latent.numel())


def test_training_moves_codewords_by_the_ema_rule():
    quantizer, latent = _quantizer(ema_decay=0.9).train(), _latents(4, 4, 4, 4)
    before = quantizer.codewords_KD.clone()
    tokens = quantizer(latent, torch.Generator().manual_seed(0)).tokens_Bhw.flatten()
    unit = F.normalize(latent, dim=1).permute(0, 2, 3, 1).flatten(0, 2)
    for k in range(8):
        mine = unit[tokens == k]
        goal = F.normalize(mine.mean(0), dim=0) if len(mine) else F.normalize(before[k], dim=0)
        assert torch.allclose(quantizer.codewords_KD[k], 0.9 * before[k] + 0.1 * goal, atol=1e-6)
    counts = torch.bincount(tokens, minlength=8)
    assert torch.allclose(quantizer._codebook.cluster_size, 0.1 * counts)


def test_evaluation_changes_nothing():
    quantizer = _quantizer(kmeans_init=True).eval()
    before = {k: v.clone() for k, v in quantizer.state_dict().items()}
    quantizer(_latents(2, 4, 3, 3))
    assert all(torch.equal(before[k], v) for k, v in quantizer.state_dict().items())


def test_stale_codewords_restart_from_the_batch_and_used_ones_stay():
    quantizer = _quantizer(size=8, threshold=0.5, ema_decay=0.0).train()
    target = F.normalize(_latents(1, 4), dim=1)
    latent = target[:, :, None, None].expand(2, 4, 4, 4).contiguous()
    found = quantizer(latent, torch.Generator().manual_seed(0))
    assert len(found.tokens_Bhw.unique()) == 1
    assert torch.allclose(quantizer.codewords_KD, target.expand(8, 4), atol=1e-6)
    assert (quantizer._codebook.cluster_size == 0).sum() == 7


def test_kmeans_gives_each_cluster_its_codeword_at_once():
    quantizer = _quantizer(size=4, dim=4, kmeans_init=True).train()
    centres = torch.eye(4).repeat(16, 1) + 0.02 * _latents(64, 4)
    latent = centres.view(1, 8, 8, 4).permute(0, 3, 1, 2)
    found = quantizer(latent, torch.Generator().manual_seed(3))
    groups = found.tokens_Bhw.flatten().view(16, 4)
    assert bool(quantizer._codebook.initted)
    assert all(len(groups[:, i].unique()) == 1 for i in range(4))


def test_equal_seeds_move_equally():
    books = []
    for _ in range(2):
        quantizer = _quantizer(threshold=1.0).train()
        quantizer(_latents(4, 4, 4, 4), torch.Generator().manual_seed(5))
        books.append(quantizer.codewords_KD)
    assert torch.equal(*books)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_codebook_stays_float32_under_autocast(dtype):
    with torch.autocast("cpu", torch.bfloat16):
        found = _quantizer().train()(_latents(2, 4, 3, 3).to(dtype), torch.Generator().manual_seed(0))
    assert found.latent_BDhw.dtype == found.commitment.dtype == torch.float32


def test_a_start_that_was_put_back_is_made_again():
    quantizer = _quantizer(kmeans_init=True).train()
    kept = quantizer.keep()
    for seed in (1, 2):
        latent = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
        for _ in range(2):  # after the first it need not ask any more
            quantizer(latent, torch.Generator().manual_seed(0))
        assert quantizer._codebook.initted == 1 and not torch.equal(quantizer.codewords_KD, kept[2])
        quantizer.put_back(kept)
        assert quantizer._codebook.initted == 0 and torch.equal(quantizer.codewords_KD, kept[2])
