import math

import pytest
import torch

from burnish.evaluate import Estimate, mean_per_token, negative_log_likelihood, perplexity
from burnish.evaluate.perplexity import predicted

VOCAB = 11


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, VOCAB, generator=generator) * 3
    ids = torch.randint(VOCAB, (3, 7), generator=generator)
    mask = torch.ones(3, 7, dtype=torch.bool)
    mask[1, 4:] = False
    return logits, ids, mask


def test_uniform_logits_have_the_vocabulary_as_perplexity(batch):
    _, ids, mask = batch
    sums, counts = negative_log_likelihood(torch.full((3, 7, VOCAB), 2.5), ids, mask)
    assert counts.tolist() == [6, 3, 6]
    assert perplexity(mean_per_token(sums, counts)).value == pytest.approx(VOCAB, rel=1e-6)


def test_next_token_is_what_is_predicted():
    ids = torch.tensor([[0, 1, 2]])
    logits = torch.tensor([[[0.0, math.log(3), 0.0], [0.0, 0.0, math.log(2)], [9.0, 0.0, 0.0]]])
    sums, counts = negative_log_likelihood(logits, ids, torch.ones(1, 3))
    assert counts.tolist() == [2]
    assert sums.item() == pytest.approx(math.log(5 / 3) + math.log(4 / 2))


def test_sums_are_the_float64_formula(batch):
    logits, ids, mask = batch
    expected = [
        sum(-logits[b, t].double().log_softmax(-1)[ids[b, t + 1]] for t in range(6) if mask[b, t + 1]) for b in range(3)
    ]
    sums, _ = negative_log_likelihood(logits, ids, mask)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, torch.stack(expected), rtol=1e-6, atol=0)


def test_padding_contributes_nothing_even_when_it_is_not_a_number(batch):
    logits, ids, mask = batch
    padded = logits.masked_fill(~mask[..., None], torch.nan)
    torch.testing.assert_close(
        negative_log_likelihood(padded, ids, mask), negative_log_likelihood(logits, ids, mask), rtol=0, atol=0
    )


def test_left_padding_does_not_predict_the_first_token():
    assert predicted(torch.tensor([[0, 0, 1, 1, 1, 0]])).tolist() == [[False, False, True, True, False]]


def test_a_constant_added_to_the_logits_changes_nothing(batch):
    logits, ids, mask = batch
    shifted, _ = negative_log_likelihood(logits + 7.0, ids, mask)
    torch.testing.assert_close(shifted, negative_log_likelihood(logits, ids, mask)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_chunks_do_not_change_the_sums(batch, chunk_tokens):
    torch.testing.assert_close(
        negative_log_likelihood(*batch, chunk_tokens=chunk_tokens), negative_log_likelihood(*batch), rtol=1e-12, atol=0
    )


def test_bfloat16_logits_are_reduced_in_float32(batch):
    logits, ids, mask = batch
    half = logits.bfloat16()
    sums, _ = negative_log_likelihood(half, ids, mask)
    torch.testing.assert_close(sums, negative_log_likelihood(half.float(), ids, mask)[0], rtol=0, atol=0)


def test_equal_lengths_give_the_standard_error_of_a_mean():
    means = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=torch.float64)
    estimate = mean_per_token(means * 5, torch.full((4,), 5))
    assert estimate.value == pytest.approx(4.0)
    assert estimate.standard_error == pytest.approx((means.std(correction=1) / 2).item())


def test_unequal_lengths_give_the_error_of_a_ratio():
    # R = 10 / 4; residuals -1/2, 1/2; SE^2 = 2/1 * (1/4 + 1/4) / 4^2 = 1/16.
    estimate = mean_per_token(torch.tensor([2.0, 8.0]).double(), torch.tensor([1, 3]))
    assert estimate == Estimate(2.5, 0.25)


def test_the_standard_error_is_the_spread_over_repeated_draws():
    """4,000 draws of 50 sequences of correlated tokens: the mean of SE^2 is within 5 % of the variance of the ratio,
    3 standard errors of the latter being 3 * sqrt(2 / 4000) = 6.7 %, so the bound is 10 %."""
    generator = torch.Generator().manual_seed(1)
    counts = torch.randint(1, 9, (4000, 50), generator=generator)
    level = torch.randn(4000, 50, generator=generator, dtype=torch.float64)
    draws = [mean_per_token(c * (2 + x), c) for c, x in zip(counts, level, strict=True)]
    variance = torch.tensor([draw.value for draw in draws]).var().item()
    squared = torch.tensor([draw.standard_error**2 for draw in draws]).mean().item()
    assert squared == pytest.approx(variance, rel=0.1)


def test_one_sequence_has_no_standard_error():
    estimate = mean_per_token(torch.tensor([3.0]), torch.tensor([2]))
    assert estimate.value == 1.5
    assert math.isnan(estimate.standard_error)


def test_no_token_is_refused():
    with pytest.raises(ValueError, match="no predicted token"):
        mean_per_token(torch.zeros(2), torch.zeros(2, dtype=torch.int64))


def test_perplexity_error_follows_the_derivative():
    nll, step = 1.7, 1e-6
    slope = (perplexity(Estimate(nll + step, 0)).value - perplexity(Estimate(nll - step, 0)).value) / (2 * step)
    estimate = perplexity(Estimate(nll, 0.01))
    assert estimate.value == pytest.approx(math.exp(nll))
    assert estimate.standard_error == pytest.approx(0.01 * slope, rel=1e-6)


def test_perplexity_beyond_a_double_is_infinite():
    assert perplexity(Estimate(1e4, 1.0)) == Estimate(math.inf, math.inf)
