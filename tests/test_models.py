"""sam_lab.models: deterministic small networks."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sam_lab.models import (
    ACTIVATIONS,
    INITS,
    SOFTER,
    ChannelNorm,
    Normalize,
    Residual,
    Whiten,
    cnn,
    fast_resnet,
    mlp,
    wide_resnet,
)


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


def test_mlp_refuses_an_unknown_norm() -> None:
    with pytest.raises(ValueError, match="norm must be one of none, batch, got 'layer'"):
        mlp((4, 3), norm="layer")


def test_batch_norm_stands_before_each_activation_of_an_mlp() -> None:
    model = mlp((4, 6, 5, 3), "relu", norm="batch")
    hidden = ["Linear", "BatchNorm1d", "ReLU"]
    assert [type(layer).__name__ for layer in model] == ["Flatten", *hidden, *hidden, "Linear"]
    assert [model[2].num_features, model[5].num_features] == [6, 5]


@pytest.mark.parametrize("init", INITS)
def test_batch_norm_leaves_the_other_initial_weights_as_they_are(init) -> None:
    plain, normed = (mlp((4, 6, 3), norm=norm, init=init, seed=3) for norm in ("none", "batch"))
    linear = [layer for layer in normed if isinstance(layer, nn.Linear)]
    assert torch.equal(flat(plain), flat(nn.Sequential(*linear)))


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


def test_cnn_refuses_an_unknown_norm() -> None:
    with pytest.raises(ValueError, match="norm must be one of none, layer, got 'batch'"):
        cnn(norm="batch")


def test_a_layer_norm_stands_between_activation_and_pooling() -> None:
    model = cnn(activation="relu", pooling="max", norm="layer", widths=(4, 8))
    block = [nn.Conv2d, nn.ReLU, ChannelNorm, nn.MaxPool2d]
    assert [type(layer) for layer in model] == [*block, *block, nn.Flatten, nn.Linear]
    assert not any(isinstance(layer, ChannelNorm) for layer in cnn(widths=(4, 8)))


def test_the_norm_leaves_the_other_initial_weights_as_they_are() -> None:
    plain, normed = cnn(norm="none", seed=3), cnn(norm="layer", seed=3)
    with_weights = [layer for layer in normed if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert torch.equal(flat(plain), flat(nn.Sequential(*with_weights)))


def test_channel_norm_is_the_formula_at_each_pixel() -> None:
    x = torch.randn(2, 5, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x[0, :, 1, 1] = 0.0  # a pixel that is off
    norm = ChannelNorm(5).to(torch.float64)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1, 6))
        norm.bias.copy_(torch.arange(5))
    got = norm(x)
    pixel = x[1, :, 2, 3]
    wanted = (pixel - pixel.mean()) / (pixel.var(correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(got[1, :, 2, 3], wanted * norm.weight + norm.bias)
    torch.testing.assert_close(got[0, :, 1, 1], norm.bias)
    assert got.shape == x.shape


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_cnn_with_layer_norm_can_be_differentiated_twice(memory_format) -> None:
    """Hessian-vector products against central differences of the gradient."""
    model = cnn(
        (3, 8, 8), 4, "relu", widths=(4, 5), pooling="max", norm="layer", dtype=torch.float64
    )
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    x = x.contiguous(memory_format=memory_format)
    params = list(model.parameters())

    def gradient(graph: bool = False) -> torch.Tensor:
        grads = torch.autograd.grad(model(x).square().mean(), params, create_graph=graph)
        return torch.cat([grad.flatten() for grad in grads])

    v = torch.randn(len(flat(model)), generator=generator, dtype=torch.float64)
    product = torch.autograd.grad(gradient(graph=True) @ v, params)
    start, step = flat(model), 1e-8  # so small that no kink is crossed
    sides = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * step * v, params)
        sides.append(gradient())
    difference = (sides[0] - sides[1]) / (2 * step)
    error = torch.cat([part.flatten() for part in product]) - difference
    assert error.norm() < 1e-6 * difference.norm()


# --- wide residual networks -----------------------------------------------------------------------

WIDE = (10, 2, (3, 8, 8), 5)


def wide_parameters(depth, width, channels=3, classes=10):
    """Counted layer by layer."""
    count, fan_in = 9 * channels * 16, 16
    for fan_out in (16 * width, 32 * width, 64 * width):
        for block in range((depth - 4) // 6):
            count += 2 * fan_in + 9 * fan_in * fan_out  # norm, convolution
            count += 2 * fan_out + 9 * fan_out * fan_out
            if block == 0 and fan_in != fan_out:
                count += fan_in * fan_out  # 1x1
            fan_in = fan_out
    return count + 2 * fan_in + (fan_in + 1) * classes


def test_wide_resnets_have_the_parameters_that_their_paper_states():
    """In millions; to the last one for WRN-16-8."""
    assert flat(wide_resnet(16, 8)).numel() == wide_parameters(16, 8) == 10_961_370
    stated = {(40, 1): 0.6, (40, 4): 8.9, (16, 8): 11.0, (22, 8): 17.2, (28, 10): 36.5}
    for (depth, width), millions in stated.items():
        assert round(wide_parameters(depth, width) / 1e6, 1) == millions


@pytest.mark.parametrize(("depth", "width", "channels", "classes"), [(10, 1, 1, 7), (22, 2, 3, 10)])
def test_every_depth_and_width_has_its_number_of_parameters(depth, width, channels, classes):
    model = wide_resnet(depth, width, (channels, 8, 8), classes)
    assert flat(model).numel() == wide_parameters(depth, width, channels, classes)
    convolutions = sum(isinstance(module, nn.Conv2d) for module in model.modules())
    assert convolutions == depth - (width == 1)  # the first group's shortcut is then none


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (2, 9, 5)])
def test_each_group_of_a_wide_resnet_halves_the_resolution(shape, stride):
    model = wide_resnet(16, 1, shape, 7, stride=stride)
    assert model(torch.zeros(2, *shape)).shape == (2, 7)
    seen = []
    for block in model:
        if isinstance(block, Residual):
            block.register_forward_hook(lambda _, __, out: seen.append(tuple(out.shape[1:])))
    model(torch.zeros(2, *shape))
    expected = []
    for group, channels in enumerate((16, 32, 64)):
        sides = (-(-side // (stride * 2**group)) for side in shape[1:])
        expected += [(channels, *sides)] * 2
    assert seen == expected


def tensors(model, training):
    """A copy of the model's tensors by name, and batch norm as a function of them."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def normed(x, name):
        statistics = state[f"{name}.running_mean"], state[f"{name}.running_var"]
        scale, shift = state[f"{name}.weight"], state[f"{name}.bias"]
        return F.batch_norm(x, *statistics, scale, shift, training, 0.1, 1e-5)

    return state, normed


def by_hand(model, x, training):
    """The network as functions of its tensors, statistics of batch norm included."""
    state, normed = tensors(model, training)

    x = F.conv2d(x, state["0.weight"], padding=1)
    for block, stride in ((1, 1), (2, 2), (3, 2)):
        first = F.relu(normed(x, f"{block}.norm1"))
        inner = F.conv2d(first, state[f"{block}.conv1.weight"], stride=stride, padding=1)
        inner = F.conv2d(
            F.relu(normed(inner, f"{block}.norm2")), state[f"{block}.conv2.weight"], padding=1
        )
        x = inner + F.conv2d(first, state[f"{block}.shortcut.weight"], stride=stride)
    x = F.relu(normed(x, "4")).mean((2, 3))
    return x @ state["8.weight"].T + state["8.bias"], state


@pytest.mark.parametrize("training", [True, False])
def test_a_wide_resnet_is_its_formula(training):
    model = wide_resnet(*WIDE, dtype=torch.float64).train(training)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.state_dict().values():  # batch norms begin as 1 and 0
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    x = torch.randn(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    wanted, state = by_hand(model, x, training)
    torch.testing.assert_close(model(x), wanted)
    for name, tensor in model.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(tensor, state[name])


@pytest.mark.parametrize(("fan_in", "fan_out", "stride"), [(4, 4, 1), (4, 6, 1), (4, 4, 2)])
def test_a_block_takes_its_input_as_it_is_unless_channels_or_resolution_change(
    fan_in, fan_out, stride
):
    block = Residual(fan_in, fan_out, stride).eval()
    changes = fan_in != fan_out or stride != 1
    assert (block.shortcut is not None) == changes
    x = torch.randn(2, fan_in, 6, 6, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        block.conv2.weight.zero_()
        first = F.relu(x / (1 + 1e-5) ** 0.5)
        wanted = F.conv2d(first, block.shortcut.weight, stride=stride) if changes else x
        torch.testing.assert_close(block(x), wanted)


def test_wide_resnets_begin_with_normal_weights_by_fan_out_and_batch_norms_as_identities():
    model = wide_resnet(10, 4)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.bias is None
            scale = (2 / (module.kernel_size[0] ** 2 * module.out_channels)) ** 0.5
            assert module.weight.std().item() == pytest.approx(scale, rel=0.1)
            assert module.weight.abs().max() > 2.5 * scale  # normal: a uniform one ends at 1.73
        if isinstance(module, nn.BatchNorm2d):
            assert bool((module.weight == 1).all()) and bool((module.bias == 0).all())


def test_the_seed_alone_decides_the_weights_of_a_wide_resnet():
    before = torch.get_rng_state()
    first = flat(wide_resnet(*WIDE, seed=5))
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(1)
    with torch.device("meta"):
        again = wide_resnet(*WIDE, seed=5)
    assert torch.equal(first, flat(again))
    assert torch.equal(flat(wide_resnet(*WIDE, seed=5, dtype=torch.float64)).float(), first)
    assert not torch.equal(first, flat(wide_resnet(*WIDE, seed=6)))
    assert {p.device.type for p in wide_resnet(*WIDE, device="meta").parameters()} == {"meta"}


@pytest.mark.parametrize("depth", [-2, 0, 4, 9, 12, 15])
def test_a_wide_resnet_refuses_a_depth_without_whole_blocks(depth):
    with pytest.raises(ValueError, match=f"depth must be 10, 16, .* got {depth}$"):
        wide_resnet(depth)


@pytest.mark.parametrize(
    ("options", "got"),
    [
        ({"width": 0}, r"got 0, 1 and \(3, 32, 32\)"),
        ({"stride": 0}, r"got 8, 0 and \(3, 32, 32\)"),
        ({"shape": (3, 32)}, r"got 8, 1 and \(3, 32\)"),
        ({"shape": (3, 0, 32)}, r"got 8, 1 and \(3, 0, 32\)"),
        ({"shape": ()}, r"got 8, 1 and \(\)"),
    ],
)
def test_a_wide_resnet_refuses_what_makes_no_network(options, got):
    with pytest.raises(ValueError, match=f"width, stride and shape .* must be positive, {got}"):
        wide_resnet(**options)


# --- fast residual networks ----------------------------------------------------------------------


def fast_by_hand(model, x, training):
    """The network as functions of its tensors."""
    state, normed = tensors(model, training)

    for group in (0, 1):
        x = F.max_pool2d(F.conv2d(x, state[f"{group}.conv1.weight"], padding=1), 2)
        x = F.gelu(normed(x, f"{group}.norm1"))
        inner = F.conv2d(x, state[f"{group}.conv2.weight"], padding=1)
        x = x + F.gelu(normed(inner, f"{group}.norm2"))
    return (x.amax((2, 3)) @ state["4.weight"].T + state["4.bias"]) / SOFTER


@pytest.mark.parametrize("training", [True, False])
def test_a_fast_resnet_is_its_formula(training):
    model = fast_resnet((5, 11, 9), 7, widths=(4, 6), seed=1, dtype=torch.float64).train(training)
    x = torch.randn(6, 5, 11, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = fast_by_hand(model, x, training)
    torch.testing.assert_close(model(x), wanted)
    assert wanted.shape == (6, 7)


def test_the_seed_alone_decides_the_weights_of_a_fast_resnet():
    first, again, other = (flat(fast_resnet(widths=(2, 3), seed=seed)) for seed in (5, 5, 6))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize(
    "options", [{"widths": ()}, {"widths": (4, 0)}, {"shape": (0, 31, 31)}, {"shape": (3, 7, 31)}]
)
def test_a_fast_resnet_refuses_what_makes_no_network(options):
    with pytest.raises(ValueError, match="widths and channels must be positive"):
        fast_resnet(**options)


def test_whitened_patches_are_uncorrelated_with_variance_one_and_have_their_negatives():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(500, 2, 8, 8, generator=generator, dtype=torch.float64).cumsum(3) / 8
    whitened = Whiten(x, eps=0.0)(x)
    assert whitened.shape == (500, 16, 7, 7)
    half = whitened[:, :8]
    torch.testing.assert_close(whitened[:, 8:], -half)
    own = half[:, :, ::2, ::2].permute(0, 2, 3, 1).flatten(0, 2)  # the patches side by side
    torch.testing.assert_close(own.mean(0), torch.zeros(8, dtype=torch.float64))
    torch.testing.assert_close(torch.cov(own.T), torch.eye(8, dtype=torch.float64))


def test_whitening_has_no_parameters_and_keeps_rare_directions_small():
    flat_images = torch.rand(50, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    layer = Whiten(flat_images.expand(50, 1, 6, 6))
    assert list(layer.parameters()) == [] and set(layer.state_dict()) == {"weight", "bias"}
    noise = layer(torch.rand(9, 1, 6, 6, generator=torch.Generator().manual_seed(1)))
    assert noise.abs().max() < 50  # 1 / sqrt(eps), where no image varies


@pytest.mark.parametrize("shape", [(4, 3, 8), (4, 3, 1, 8)])
def test_whitening_refuses_what_has_no_patches(shape):
    with pytest.raises(ValueError, match="x must be images"):
        Whiten(torch.zeros(shape))


# --- normalisation --------------------------------------------------------------------------------

MEAN, STD = [0.5, 0.25, 0.0], [0.25, 0.5, 2.0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_each_channel_loses_its_mean_and_is_divided_by_its_deviation(memory_format):
    x = torch.rand(4, 3, 5, 6, generator=torch.Generator().manual_seed(0))
    got = Normalize(MEAN, STD)(x.contiguous(memory_format=memory_format))
    assert got.is_contiguous(memory_format=memory_format)
    for channel, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        torch.testing.assert_close(got[:, channel], (x[:, channel] - mean) / std)


def test_a_normalisation_is_saved_and_moved_with_the_model_and_never_trained():
    model = nn.Sequential(Normalize(MEAN, STD), nn.Flatten(), nn.Linear(12, 2))
    assert {"0.mean", "0.std"} <= set(model.state_dict())
    assert not list(model[0].parameters())
    other = nn.Sequential(Normalize([0.0] * 3, [1.0] * 3), nn.Flatten(), nn.Linear(12, 2))
    other.load_state_dict(model.state_dict())
    x = torch.rand(4, 3, 2, 2, dtype=torch.float64)
    assert torch.equal(other.double()(x), model.double()(x))
    assert model[0](x).dtype == torch.float64


@pytest.mark.parametrize(
    "std", [[0.0, 1.0, 1.0], [1.0, -0.2, 1.0], [1.0, 1.0, float("nan")], [1.0]]
)
def test_a_normalisation_refuses_deviations_that_are_none(std):
    with pytest.raises(ValueError, match="std must be above 0 in .* channel.*, got"):
        Normalize(MEAN, std)
