"""sam_lab.models: deterministic small networks."""

import pytest
import torch
from torch import nn

from sam_lab.models import ACTIVATIONS, cnn, mlp


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("build", [lambda **kw: mlp((12, 7, 3), **kw), lambda **kw: cnn(**kw)])
class TestBothModels:
    def test_the_seed_alone_decides_the_weights(self, build) -> None:
        torch.manual_seed(1)
        first = flat(build(seed=5))
        torch.manual_seed(2)
        assert torch.equal(first, flat(build(seed=5)))
        assert not torch.equal(first, flat(build(seed=6)))

    def test_the_global_random_state_is_untouched(self, build) -> None:
        before = torch.get_rng_state()
        build(seed=3)
        assert torch.equal(before, torch.get_rng_state())

    def test_the_default_device_does_not_change_the_weights(self, build) -> None:
        with torch.device("meta"):
            model = build(seed=5)
        assert torch.equal(flat(model), flat(build(seed=5)))

    def test_float64_holds_the_same_weights(self, build) -> None:
        wide = flat(build(seed=5, dtype=torch.float64))
        assert wide.dtype == torch.float64
        assert torch.equal(wide.float(), flat(build(seed=5)))

    @pytest.mark.parametrize("activation", list(ACTIVATIONS))
    def test_every_activation_is_the_named_one(self, build, activation) -> None:
        kinds = {type(layer) for layer in build(activation=activation)}
        assert ACTIVATIONS[activation] in kinds

    def test_an_unknown_activation_is_refused_with_the_names(self, build) -> None:
        with pytest.raises(ValueError, match=r"activation must be one of .*tanh.*'swish'"):
            build(activation="swish")

    def test_an_unknown_init_is_refused(self, build) -> None:
        with pytest.raises(ValueError, match=r"init must be one of torch, glorot, got 'he'"):
            build(init="he")

    def test_glorot_has_zero_biases(self, build) -> None:
        for name, parameter in build(init="glorot").named_parameters():
            assert bool((parameter == 0).all()) == name.endswith("bias")


def test_glorot_weights_have_the_variance_of_the_formula() -> None:
    weight = mlp((400, 600, 2), init="glorot")[1].weight
    assert weight.var().item() == pytest.approx(2 / (400 + 600), rel=0.01)
    assert weight.abs().max() > 3 * weight.std()  # normal: a uniform one would end at 1.73


def test_torch_init_is_bounded_by_the_fan_in() -> None:
    layer = mlp((400, 600, 2))[1]
    for parameter in (layer.weight, layer.bias):
        assert 0.04 < parameter.abs().max() <= 1 / 400**0.5


def test_mlp_flattens_images_and_counts_its_parameters() -> None:
    model = mlp((64, 128, 128, 10))
    assert model(torch.zeros(5, 1, 8, 8)).shape == (5, 10)
    assert flat(model).numel() == 26_122


def test_mlp_without_hidden_layer_is_linear() -> None:
    model = mlp((4, 3))
    x, y = torch.rand(2, 6, 4)
    zero = model(torch.zeros(6, 4))
    torch.testing.assert_close(model(x + y) + zero, model(x) + model(y))


@pytest.mark.parametrize("sizes", [(), (3,), (3, 0, 2)])
def test_mlp_refuses_sizes_that_make_no_network(sizes) -> None:
    with pytest.raises(ValueError, match="sizes must be two or more positive integers"):
        mlp(sizes)


def test_cnn_of_colour_images() -> None:
    model = cnn((3, 32, 32), classes=7, widths=(4, 8, 16), pooling="max")
    assert model(torch.zeros(2, 3, 32, 32)).shape == (2, 7)
    assert sum(isinstance(layer, nn.MaxPool2d) for layer in model) == 3


def test_cnn_refuses_a_shape_that_pooling_does_not_divide() -> None:
    with pytest.raises(ValueError, match=r"divisible by 4 .*got \(1, 30, 28\)"):
        cnn((1, 30, 28))


def test_cnn_refuses_an_unknown_pooling() -> None:
    with pytest.raises(ValueError, match="pooling must be one of avg, max"):
        cnn(pooling="median")
