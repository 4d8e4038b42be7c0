import math

import pytest
import torch

from burnish.evaluate import forward_kl, top1_agreement


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    teacher, student = torch.randn(2, 3, 6, 11, generator=generator) * 2
    mask = torch.ones(3, 6, dtype=torch.bool)
    mask[2, 2:] = False
    return teacher, student, mask


def test_two_tokens_in_closed_form():
    """sigma(1) = 0.7310586 against 1/2: log 2 - H(sigma(1)) = 0.1109441 nats; the reverse KL would be 0.1201145."""
    teacher, student = torch.tensor([[[1.0, 0.0]]]), torch.zeros(1, 1, 2)
    mask = torch.ones(1, 1, dtype=torch.bool)
    assert forward_kl(teacher, student, mask).item() == pytest.approx(0.1109441, abs=1e-7)
    assert forward_kl(student, teacher, mask).item() == pytest.approx(0.1201145, abs=1e-7)


def test_sums_are_the_float64_formula(pair):
    teacher, student, mask = pair
    p, q = teacher.double().log_softmax(-1), student.double().log_softmax(-1)
    expected = ((p.exp() * (p - q)).sum(-1) * mask).sum(1)
    sums = forward_kl(*pair)
    assert sums.dtype == torch.float64
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=0)


def test_a_distribution_does_not_diverge_from_itself(pair):
    teacher, _, mask = pair
    assert forward_kl(teacher, teacher, mask).tolist() == [0, 0, 0]


def test_against_uniform_it_is_the_missing_entropy(pair):
    teacher, _, mask = pair
    entropy = torch.distributions.Categorical(logits=teacher.double()).entropy()
    expected = ((math.log(11) - entropy) * mask).sum(1)
    torch.testing.assert_close(forward_kl(teacher, torch.full_like(teacher, 3.0), mask), expected, rtol=1e-5, atol=0)


def test_constants_added_to_the_logits_change_nothing(pair):
    teacher, student, mask = pair
    torch.testing.assert_close(forward_kl(teacher + 5, student - 3, mask), forward_kl(*pair), rtol=1e-5, atol=0)


def test_padding_contributes_nothing_even_when_it_is_not_a_number(pair):
    teacher, student, mask = pair
    teacher_padded, student_padded = (t.masked_fill(~mask[..., None], torch.nan) for t in (teacher, student))
    torch.testing.assert_close(forward_kl(teacher_padded, student_padded, mask), forward_kl(*pair), rtol=0, atol=0)


def test_a_token_without_probability_under_the_teacher_contributes_nothing(pair):
    teacher, student, mask = pair
    impossible = torch.full((3, 6, 1), -torch.inf)
    sums = forward_kl(torch.cat([teacher, impossible], -1), torch.cat([student, impossible], -1), mask)
    torch.testing.assert_close(sums, forward_kl(*pair), rtol=1e-12, atol=0)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 1000])
def test_u8_2_chunks_do_not_change_the_sums(pair, chunk_tokens):
    torch.testing.assert_close(forward_kl(*pair, chunk_tokens=chunk_tokens), forward_kl(*pair), rtol=1e-12, atol=0)


def test_u8_2_memory_does_not_grow_with_the_sequence(monkeypatch):
    """The largest tensor that log-softmax makes holds one chunk."""
    sizes = []
    log_softmax = torch.Tensor.log_softmax

    def recorded(self, dim):
        sizes.append(self.numel())
        return log_softmax(self, dim)

    monkeypatch.setattr(torch.Tensor, "log_softmax", recorded)
    for length in (64, 512):
        forward_kl(*torch.zeros(2, 2, length, 5), torch.ones(2, length, dtype=torch.bool), chunk_tokens=32)
    assert set(sizes) == {32 * 5}


def test_top1_agreement_counts_real_tokens_only():
    teacher = torch.tensor([[[2.0, 1, 0], [2, 1, 0], [0, 1, 2]], [[0, 3, 1], [0, 0, 1], [1, 0, 0]]])
    student = torch.tensor([[[5.0, 1, 0], [0, 1, 0], [1, 2, 9]], [[0, 1, 0], [0, 0, 1], [1, 0, 0]]])
    mask = torch.tensor([[True, True, True], [True, False, False]])
    assert top1_agreement(teacher, student, mask).tolist() == [2, 1]
