"""Order, fractions and steps of the sampler, for one rank and for several."""

import pytest
import torch

from cifar_lightning.data.sampler import EpochSampler, Rank, balanced_order, evaluation_order
from cifar_lightning.transforms.transform import seeded_generator

COUNT = 50
UNEVEN = torch.repeat_interleave(torch.arange(4), torch.tensor([300, 70, 25, 5]))


def sampler(count=COUNT, batch_size=8, training=True, rank=None, **kwargs):
    return EpochSampler(torch.arange(count), batch_size, seed=3, training=training, rank=rank or Rank(), **kwargs)


def test_an_epoch_has_every_image_once_and_the_next_another_order():
    order = sampler()
    first, second = torch.cat(order.begin()), torch.cat(order.begin())
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(COUNT))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("balanced_by", [None, torch.arange(COUNT) % 3])
def test_with_repeats_every_epoch_has_the_order_of_the_first(balanced_by):
    usual, repeated = (sampler(repeats=repeats, balanced_by=balanced_by) for repeats in (False, True))
    first, second, third = (torch.cat(repeated.begin()) for _ in range(3))
    assert torch.equal(first, torch.cat(usual.begin()))
    assert torch.equal(first, second)
    repeated.load_state_dict({"epoch": 7, "position": 2})
    assert torch.equal(torch.cat(repeated.begin()), third[16:])


@pytest.mark.parametrize(("count", "ranks"), [(50, 2), (50, 3), (49, 3), (17, 2), (25, 3)])
def test_ranks_deal_each_global_batch_evenly_and_make_as_many_steps(count, ranks):
    shares = [sampler(count, rank=Rank(r, ranks)).begin() for r in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    whole = sampler(count, batch_size=8 * ranks).begin()
    for step, batch in enumerate(whole):
        dealt = [share[step] for share in shares]
        sizes = [len(part) for part in dealt]
        assert max(sizes) - min(sizes) <= 1
        assert set(torch.cat(dealt).tolist()) == set(batch.tolist())


def test_a_rank_without_an_image_of_the_last_batch_repeats_one():
    shares = [sampler(25, rank=Rank(r, 3)).begin() for r in range(3)]
    assert [len(share[-1]) for share in shares] == [1, 1, 1]
    assert shares[0][-1].tolist() == shares[1][-1].tolist() == shares[2][-1].tolist()


@pytest.mark.parametrize(("count", "ranks"), [(50, 1), (50, 2), (50, 3), (17, 2), (16, 3), (5, 2)])
def test_evaluation_deals_every_image_exactly_once_in_equal_steps(count, ranks):
    shares = [sampler(count, training=False, rank=Rank(r, ranks)).begin() for r in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert sorted(torch.cat([torch.cat(share) for share in shares]).tolist()) == list(range(count))


def test_drop_last_leaves_out_the_smaller_batch_alone():
    assert [len(batch) for batch in sampler(drop_last=True).begin()] == [8] * 6
    assert [len(batch) for batch in sampler().begin()] == [8] * 6 + [2]
    assert len(sampler(drop_last=True)) == 6


def test_a_balanced_order_shows_classes_equally_often_and_images_of_a_class_too():
    order = balanced_order(UNEVEN, seeded_generator(0, 0, 0))
    assert len(order) == 400
    assert torch.bincount(UNEVEN[order]).tolist() == [100] * 4
    shown = torch.bincount(order, minlength=400)
    assert shown[:300].max() == 1
    assert set(shown[300:370].tolist()) == {1, 2}
    assert set(shown[395:].tolist()) == {20}


@pytest.mark.parametrize("seed", range(5))
def test_a_balanced_order_is_that_of_a_search_for_each_class(seed):
    targets = 3 * UNEVEN[torch.randperm(400, generator=seeded_generator(seed, 1, 0))]  # some classes have no image
    generator, chosen = seeded_generator(seed, 0, 0), []
    places = torch.full((4,), 100)
    torch.randperm(4, generator=generator)  # of the classes with a place more, here none
    for label, num in zip((0, 3, 6, 9), places.tolist(), strict=True):
        own = (targets == label).nonzero().flatten()
        rounds = [own[torch.randperm(len(own), generator=generator)] for _ in range(-(-num // len(own)))]
        chosen.append(torch.cat(rounds)[:num])
    expected = torch.cat(chosen)[torch.randperm(400, generator=generator)]
    assert torch.equal(balanced_order(targets, seeded_generator(seed, 0, 0)), expected)


def test_a_balanced_order_leaves_out_others_each_epoch_and_is_mixed():
    first, again, other = (balanced_order(UNEVEN, seeded_generator(0, epoch, 0)) for epoch in (0, 0, 1))
    assert torch.equal(first, again)
    assert set(first.tolist()) != set(other.tolist())
    assert UNEVEN[first[:100]].unique().tolist() == [0, 1, 2, 3]


def test_places_that_do_not_divide_go_to_different_classes():
    targets = torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 2, 2])
    counts = {
        tuple(torch.bincount(targets[balanced_order(targets, seeded_generator(0, e, 0))]).tolist()) for e in range(20)
    }
    assert counts == {(4, 3, 3), (3, 4, 3), (3, 3, 4)}


def test_an_evaluation_that_stops_early_is_shuffled_by_the_seed():
    assert evaluation_order(100, seed=0, shuffled=False).tolist() == list(range(100))
    first, again, other = (evaluation_order(100, seed=seed, shuffled=True) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert sorted(first.tolist()) == list(range(100))


@pytest.mark.parametrize(("count", "ranks"), [(17, 2), (49, 3), (33, 4)])
def test_no_evaluation_batch_is_empty_where_a_rank_has_images_for_each_step(count, ranks):
    shares = [sampler(count, training=False, rank=Rank(r, ranks)).begin() for r in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    assert min(len(batch) for share in shares for batch in share) > 0
    for rank, share in enumerate(shares):
        assert torch.cat(share).tolist() == list(range(count))[rank::ranks]
