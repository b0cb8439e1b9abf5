import torch

from mpp.core import draws


def test_draws_depend_on_nothing_but_seed_epoch_and_key():
    torch.manual_seed(1)
    first = draws.noise((4, 5), 0, 3, "cat")
    torch.manual_seed(2)
    torch.rand(7)
    assert torch.equal(first, draws.noise((4, 5), 0, 3, "cat"))
    state = torch.random.get_rng_state()
    draws.uniform(0, 0, "cat")
    assert torch.equal(state, torch.random.get_rng_state())


def test_every_part_of_the_position_matters():
    base = draws.noise((8,), 0, 1, "cat")
    for other in (draws.noise((8,), 1, 1, "cat"), draws.noise((8,), 0, 2, "cat"), draws.noise((8,), 0, 1, "dog")):
        assert not torch.equal(base, other)
    assert not torch.equal(draws.noise((8,), 1, 11, "a"), draws.noise((8,), 11, 1, "a"))


def test_parts_of_the_position_do_not_run_together():
    assert draws.generator(0, "a", "bc").initial_seed() != draws.generator(0, "ab", "c").initial_seed()


def test_noise_over_samples_is_standard_normal_and_uncorrelated():
    sample = torch.stack([draws.noise((64,), 0, 0, f"k{n}") for n in range(4000)]).double()
    assert abs(float(sample.mean())) < 0.01
    assert abs(float(sample.std()) - 1) < 0.01
    correlation = torch.corrcoef(sample.T) - torch.eye(64, dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.08


def test_sigma_draws_are_uniform_and_independent_of_the_noise():
    keys = [f"k{n}" for n in range(4000)]
    values = torch.stack([draws.uniform(7, 2, key) for key in keys])
    histogram = torch.histc(values, 10, 0, 1) / len(keys)
    assert float((histogram - 0.1).abs().max()) < 0.02
    first = torch.stack([draws.noise((1,), 7, 2, key)[0] for key in keys]).double()
    assert abs(float(torch.corrcoef(torch.stack([values, first]))[0, 1])) < 0.05


def test_order_is_a_permutation_that_changes_with_the_epoch():
    orders = [draws.order(50, 0, epoch, "x") for epoch in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert orders[0] != orders[1] != orders[2]
