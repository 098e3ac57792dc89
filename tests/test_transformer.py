"""sam_lab.models.transformer: what a causal language model must do, and that it can be curved."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sam_lab import Hessian
from sam_lab.models import Block, transformer


def small(**kw) -> nn.Sequential:
    return transformer(vocab=11, width=12, layers=2, heads=3, length=7, **kw)


def tokens(n: int = 4, t: int = 7, seed: int = 0) -> torch.Tensor:
    return torch.randint(11, (n, t), generator=torch.Generator().manual_seed(seed))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_later_token_changes_no_earlier_logit() -> None:
    model, x = small(dtype=torch.float64), tokens()
    before = model(x)
    for t in range(7):
        changed = x.clone()
        changed[:, t] = (changed[:, t] + 1) % 11
        after = model(changed)
        assert torch.equal(after[:, :t], before[:, :t])
        assert (after[:, t:] != before[:, t:]).flatten(2).any(2).all()  # each later one sees it


def test_a_shorter_sequence_gives_the_first_logits_of_a_longer_one() -> None:
    model, x = small(dtype=torch.float64), tokens()
    torch.testing.assert_close(model(x[:, :4]), model(x)[:, :4])


def test_sequences_of_a_batch_do_not_see_each_other() -> None:
    model, x = small(dtype=torch.float64), tokens()
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(model(x[order]), model(x)[order])
    torch.testing.assert_close(model(x[1:2]), model(x)[1:2])


def test_earlier_tokens_are_told_apart_by_their_places() -> None:
    model, x = small(dtype=torch.float64), torch.tensor([[1, 2, 3], [2, 1, 3]])
    last = model(x)[:, -1]
    assert not torch.allclose(last[0], last[1], rtol=0, atol=1e-6)
    with torch.no_grad():
        model[0].place.zero_()
    one = nn.Sequential(model[0], model[1])(x)[:, -1]  # one block without places: a set of tokens
    torch.testing.assert_close(one[0], one[1])


def test_attention_is_the_softmax_of_scaled_scores_of_the_past() -> None:
    block = Block(width=6, heads=2, key=5, layers=1).double()
    x = torch.randn(1, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = (block.qkv(x)[0].unflatten(-1, (3, 2, 5))[:, i] for i in range(3))  # (T, heads, key)
    rows = []
    for t in range(4):
        mixed = []
        for head in range(2):
            weights = torch.softmax(k[: t + 1, head] @ q[t, head] / 5**0.5, 0)
            mixed.append(weights @ v[: t + 1, head])
        rows.append(block.out(torch.cat(mixed)))
    torch.testing.assert_close(block.attention(x)[0], torch.stack(rows))


def test_written_out_attention_agrees_with_torchs_own() -> None:
    block = Block(width=6, heads=2, key=5, layers=1).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    q, k, v = block.qkv(x).view(3, 4, 3, 2, 5).permute(2, 0, 3, 1, 4)
    fused = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = block.out(fused.transpose(1, 2).reshape(3, 4, 10))
    torch.testing.assert_close(block.attention(x), expected)


def test_shape_and_number_of_parameters() -> None:
    model = small(key=5)
    assert model(tokens(3, 6)).shape == (3, 6, 11)
    embedding = 11 * 12 + 7 * 12
    attention = (12 + 1) * 3 * 3 * 5 + (3 * 5 + 1) * 12
    network = (12 + 1) * 48 + (48 + 1) * 12
    block = attention + network + 2 * 2 * 12  # two layer norms, scale and shift
    assert flat(model).numel() == embedding + 2 * block + 2 * 12 + (12 + 1) * 11


def test_the_defaults_are_the_papers_network() -> None:
    model = transformer(key=32)
    assert model(torch.zeros(1, 64, dtype=torch.int64)).shape == (1, 64, 128)
    blocks = [layer for layer in model if isinstance(layer, Block)]
    assert len(blocks) == 6
    assert blocks[0].heads == 8 and blocks[0].qkv.out_features == 3 * 8 * 32
    assert blocks[0].network[0].out_features == 4 * 128


def test_the_key_size_is_by_default_the_width_over_the_heads() -> None:
    assert small()[1].qkv.out_features == 3 * 12


def test_initial_deviations_are_those_stated() -> None:
    model = transformer(vocab=512, width=128, layers=6, heads=8, length=256, key=32)
    block = model[1]
    assert model[0].token.std().item() == pytest.approx(0.02, rel=0.03)
    assert model[0].place.std().item() == pytest.approx(0.02, rel=0.03)
    for layer, fan_in in [
        (block.qkv, 128),
        (block.out, 256),
        (block.network[0], 128),
        (block.network[2], 512),
    ]:
        assert layer.weight.std().item() == pytest.approx((2 / 6 / fan_in) ** 0.5, rel=0.03)
        assert not layer.bias.any()
    assert model[-1].weight.std().item() == pytest.approx(128**-0.5, rel=0.03)
    assert not model[-1].bias.any()


class TestSeeding:
    def test_the_seed_alone_decides_the_weights(self) -> None:
        torch.manual_seed(1)
        first = flat(small(seed=5))
        torch.manual_seed(2)
        assert torch.equal(first, flat(small(seed=5)))
        assert not torch.equal(first, flat(small(seed=6)))

    def test_the_global_random_state_is_untouched(self) -> None:
        before = torch.get_rng_state()
        small(seed=3)
        assert torch.equal(before, torch.get_rng_state())

    def test_the_default_device_does_not_change_the_weights(self) -> None:
        with torch.device("meta"):
            model = small(seed=5)
        assert torch.equal(flat(model), flat(small(seed=5)))

    def test_float64_holds_the_same_weights(self) -> None:
        assert torch.equal(flat(small(seed=5, dtype=torch.float64)).float(), flat(small(seed=5)))


def test_hessian_vector_products_agree_with_finite_differences() -> None:
    model, x = small(dtype=torch.float64), tokens()
    params = list(model.parameters())

    def loss() -> torch.Tensor:
        return F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())

    H = Hessian(loss, params)
    v = torch.randn(H.shape[0], dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    v /= v.norm()
    product, start, h = H @ v, flat(model), 1e-6

    def gradient_at(w: torch.Tensor) -> torch.Tensor:
        nn.utils.vector_to_parameters(w, params)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss(), params)])

    finite = (gradient_at(start + h * v) - gradient_at(start - h * v)) / (2 * h)
    assert product.norm() > 1e-3
    torch.testing.assert_close(product, finite, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", ["vocab", "width", "layers", "heads", "length", "key"])
def test_sizes_below_one_are_refused(name) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
        transformer(**{name: 0})


def test_heads_that_do_not_divide_the_width_are_refused_without_a_key_size() -> None:
    with pytest.raises(ValueError, match="width must be divisible by heads=3 .*got 16"):
        transformer(width=16, heads=3)
    assert transformer(width=16, heads=3, key=5, layers=1)[1].heads == 3


def test_a_sequence_that_is_too_long_is_refused() -> None:
    with pytest.raises(ValueError, match="at most 7 tokens, got 8"):
        small()(tokens(1, 8))
