"""What a run trains: its data, its network, its SGD, and what its Hessian is taken over."""

import pytest
import torch
from sam_problem import assert_equal
from torch import nn

from sam_lab import Hessian, data, models
from sam_lab.experiments.recipe import Recipe, hessian
from sam_lab.training import Phase, late, step_decay

DIGITS = Recipe("digits", 60, 40, hidden=(5,), epochs=4, batch=20, measured=30, tol=1e-4)
PHOTOS = Recipe("photos", 50, 20, hidden=(5,))


def state(network):
    return network.state_dict()


# --- data -----------------------------------------------------------------------------------------


def test_something_changed_leaves_the_rest_and_the_recipe_itself():
    other = DIGITS.but(lr=0.3, hidden=())
    assert other == Recipe(
        "digits", 60, 40, lr=0.3, hidden=(), epochs=4, batch=20, measured=30, tol=1e-4
    )
    assert DIGITS.lr == 0.05 and DIGITS.hidden == (5,)


def test_another_place_to_standardize_is_refused_also_in_a_change():
    with pytest.raises(ValueError, match="one of nowhere, data, network, patches, got 'images'"):
        PHOTOS.but(standardize="images")


@pytest.mark.parametrize("where", ["nowhere", "network"])
def test_data_is_as_it_was_loaded_unless_it_is_standardized(where):
    dataset = PHOTOS.but(standardize=where).dataset(seed=2)
    raw = data.load("photos", train=50, test=20, seed=2)
    assert_equal([dataset.x, dataset.x_test], [raw.x, raw.x_test])
    assert_equal([dataset.y, dataset.y_test], [raw.y, raw.y_test])


def test_data_is_standardized_by_the_training_set_a_channel_each():
    dataset = PHOTOS.but(standardize="data").dataset(seed=2)
    raw = data.load("photos", train=50, test=20, seed=2)
    for channel in range(3):
        mean, std = raw.x[:, channel].mean(), raw.x[:, channel].std()
        for got, was in ((dataset.x, raw.x), (dataset.x_test, raw.x_test)):
            torch.testing.assert_close(got[:, channel], (was[:, channel] - mean) / std)
    assert_equal([dataset.y, dataset.y_test], [raw.y, raw.y_test])


@pytest.mark.parametrize("changed", [{"data": "letters"}, {"train": 100_000}, {"test": 100_000}])
def test_data_that_is_not_there_is_refused(changed):
    with pytest.raises(ValueError, match=r"letters|100,?000"):
        DIGITS.but(**changed).training()


# --- networks -------------------------------------------------------------------------------------


def test_hidden_widths_make_a_fully_connected_network():
    network = DIGITS.network(DIGITS.dataset(), seed=3)
    assert_equal(state(network), state(models.mlp((64, 5, 10), "relu", seed=3)))


def test_channels_alone_make_a_convolutional_network_with_max_pooling():
    recipe = DIGITS.but(hidden=(), channels=(3, 4))
    dataset = recipe.dataset()
    network = recipe.network(dataset, seed=3)
    plain = models.cnn((1, 8, 8), 10, "relu", widths=(3, 4), pooling="max", seed=3)
    assert_equal(state(network), state(plain))
    assert torch.equal(network(dataset.x), plain(dataset.x))
    assert isinstance(recipe.but(hidden=(5,)).network(dataset)[1], nn.Linear)


def test_neither_makes_a_wide_residual_network_with_the_channels_last():
    recipe = PHOTOS.but(hidden=(), depth=10, width=2, stride=2)
    dataset = recipe.dataset()
    network = recipe.network(dataset, seed=3)
    assert_equal(
        state(network), state(models.wide_resnet(10, 2, (3, 32, 32), 10, stride=2, seed=3))
    )
    weights = [p for p in network.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


def test_groups_make_a_fast_residual_network_behind_whitened_patches():
    recipe = PHOTOS.but(hidden=(), groups=(4, 6), standardize="patches")
    dataset = recipe.dataset()
    whiten, _, network = recipe.network(dataset, seed=3)
    assert_equal(state(network), state(models.fast_resnet((24, 31, 31), 10, widths=(4, 6), seed=3)))
    assert torch.equal(whiten.weight, models.Whiten(dataset.x).weight)
    assert recipe.network(dataset, seed=3)(dataset.x[:2]).shape == (2, 10)


def test_a_network_that_standardizes_takes_pixels():
    behind, bare = PHOTOS.but(standardize="network"), PHOTOS.but(standardize="data")
    pixels, standardized = behind.dataset(), bare.dataset()
    outputs = behind.network(pixels, seed=3)(pixels.x_test)
    torch.testing.assert_close(outputs, bare.network(standardized, seed=3)(standardized.x_test))


def test_batch_norm_is_put_into_a_fully_connected_network_alone():
    dataset = DIGITS.dataset()
    normed = DIGITS.network(dataset, seed=3, norm="batch")
    assert_equal(state(normed), state(models.mlp((64, 5, 10), "relu", norm="batch", seed=3)))
    wide = DIGITS.but(hidden=())
    assert_equal(
        state(wide.network(dataset, norm="batch")), state(wide.network(dataset, norm="none"))
    )
    with pytest.raises(ValueError, match="norm must be one of none, layer, got 'batch'"):
        DIGITS.but(hidden=(), channels=(3,)).network(dataset, norm="batch")


# --- training -------------------------------------------------------------------------------------


def test_a_training_is_sgd_as_the_recipe_says():
    recipe = DIGITS.but(lr=0.3, momentum=0.8, weight_decay=0.01)
    training, dataset = recipe.training(seed=3)
    (group,) = training.optimizer.param_groups
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (0.3, 0.8, 0.01)
    assert training.phases == (Phase(0, 4),) and training.epoch == 0
    assert (training.batch, training.seed, training.augment) == (20, 3, None)
    assert_equal([training.x, training.y], [dataset.x, dataset.y])
    assert len(dataset.x) == 60 and len(dataset.x_test) == 40
    assert recipe.but(augment=True).training()[0].augment is not None


def test_a_training_takes_phases_and_what_training_takes():
    loss_fn = nn.CrossEntropyLoss(label_smoothing=0.1)
    training, _ = DIGITS.but(weight_decay=0.0).training(
        phases=late(2, 4, rho=0.1),
        loss_fn=loss_fn,
        schedule=step_decay({0.5: 0.1}),
    )
    assert training.optimizer.param_groups[0]["weight_decay"] == 0.0
    assert training.phases == late(2, 4, rho=0.1)
    assert training.loss_fn is loss_fn and training.schedule(0.5) == 0.1


def test_a_training_on_fewer_examples_has_the_first_and_all_of_the_data_beside_it():
    training, dataset = DIGITS.training(seed=3, examples=40)
    whole = DIGITS.dataset(seed=3)
    assert_equal([training.x, training.y], [whole.x[:40], whole.y[:40]])
    assert_equal([dataset.x, dataset.y], [whole.x, whole.y])


def test_weights_and_order_can_have_seeds_of_their_own():
    (one, here), (other, there) = (
        DIGITS.training(seed=3),
        DIGITS.training(seed=3, weights=5, order=7),
    )
    assert_equal([here.x, here.x_test], [there.x, there.x_test])
    assert_equal(state(one.model), state(DIGITS.network(here, seed=3)))
    assert_equal(state(other.model), state(DIGITS.network(here, seed=5)))
    assert (one.seed, other.seed) == (3, 7)
    assert not torch.equal(here.x, DIGITS.training(seed=0)[1].x)
    assert DIGITS.training(seed=3, weights=0, order=0)[0].seed == 0


# --- curvature ------------------------------------------------------------------------------------


def test_the_examined_examples_are_the_first_that_are_trained_on():
    training, dataset = DIGITS.training()
    assert_equal(list(DIGITS.examined(training)), [dataset.x[:30], dataset.y[:30]])
    fewer, _ = DIGITS.training(examples=20)
    assert len(DIGITS.examined(fewer)[0]) == 20


@pytest.mark.parametrize("loss_fn", [None, nn.functional.cross_entropy])
def test_the_hessian_is_that_of_the_mean_loss_over_the_examined_examples(loss_fn):
    smoothed = nn.CrossEntropyLoss(label_smoothing=0.3)
    training, dataset = DIGITS.training(norm="batch", loss_fn=smoothed)
    training.run(1)
    operator = DIGITS.hessian(training, loss_fn)
    assert not training.model.training
    x, y, measured = dataset.x[:30], dataset.y[:30], loss_fn or smoothed
    dense = Hessian(lambda: measured(training.model(x), y), list(training.model.parameters()))
    identity = torch.eye(dense.shape[0])
    torch.testing.assert_close(operator @ identity, dense @ identity, rtol=1e-4, atol=1e-5)
    top = torch.linalg.eigvalsh((dense @ identity).double())[-1].item()
    assert DIGITS.sharpness(training, loss_fn) == pytest.approx(top, rel=1e-3)


def test_the_hessian_over_many_examples_is_the_mean_over_uneven_parts():
    x, y = DIGITS.but(train=1300).dataset().x[:, :, 3, 2:5], torch.arange(1300) % 2
    model = models.mlp((3, 2))
    whole = Hessian(lambda: nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    identity = torch.eye(whole.shape[0])
    torch.testing.assert_close(hessian(model, x, y) @ identity, whole @ identity)
