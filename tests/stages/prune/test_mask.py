"""Masks: exact counts, ties, groups, patterns."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gradpipe.errors import InputError
from gradpipe.stages.prune.mask import pattern_mask, unstructured_mask
from gradpipe.stages.prune.target import Group, Pattern, exact_sparsity
from tests.support.reference import reference_mask, reference_nm_mask

GROUPS = ("output", "input", "layer", "output:2", "input:3", "output:128", "input:128")
scores = st.tuples(st.integers(1, 9), st.integers(1, 12), st.integers(0, 2**31)).map(
    # Few distinct values, so that ties are the rule.
    lambda t: torch.randint(0, 4, t[:2], generator=torch.Generator().manual_seed(t[2])).float()
)


@given(scores, st.sampled_from([0.0, 0.1, 0.29, 0.5, 0.66, 0.999]), st.sampled_from(GROUPS))
def test_unstructured_masks_equal_the_reference(
    score: torch.Tensor, sparsity: float, group: str
) -> None:
    """Whatever the shape, the ties and the group, the mask is the sorted reference's."""
    mask = unstructured_mask(score, exact_sparsity(sparsity), Group.parse(group))
    assert torch.equal(mask, reference_mask(score, sparsity, group))


@given(
    st.integers(1, 8).flatmap(lambda m: st.tuples(st.integers(0, m), st.just(m))),
    st.integers(1, 5),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_pattern_masks_equal_the_reference(
    pattern: tuple[int, int], rows: int, groups: int, seed: int
) -> None:
    """Any n:m keeps exactly n of every m, ties to the lower index."""
    shape = (rows, groups * pattern[1])
    score = torch.randint(0, 3, shape, generator=torch.Generator().manual_seed(seed)).float()
    mask = pattern_mask(score, Pattern(*pattern))
    assert torch.equal(mask, reference_nm_mask(score, *pattern))
    assert bool((mask.view(rows, -1, pattern[1]).sum(-1) == pattern[0]).all())


def test_a_sparsity_is_the_decimal_that_was_typed() -> None:
    """0.29 of 100 weights is 29, although 0.29 * 100 is 28.999999999999996 in binary."""
    mask = unstructured_mask(torch.rand(1, 100), exact_sparsity(0.29), Group.parse("output"))
    assert int((~mask).sum()) == 29


def test_masks_at_rising_sparsity_are_nested() -> None:
    """A weight pruned at 50 % is pruned at 70 %."""
    score = torch.rand(16, 64, generator=torch.Generator().manual_seed(0))
    masks = [
        unstructured_mask(score, exact_sparsity(s), Group.parse("output")) for s in (0.5, 0.6, 0.7)
    ]
    assert not bool((~masks[0] & masks[1]).any())
    assert not bool((~masks[1] & masks[2]).any())


@pytest.mark.parametrize("text", ["", "2", "2:", "4:2", "0:0", "a:b", "2:4:8", "-1:4", "2.0:4"])
def test_patterns_that_cannot_be_are_refused(text: str) -> None:
    """Anything but n:m with n ≤ m names what was expected."""
    with pytest.raises(InputError, match="expected n"):
        Pattern.parse(text)


@pytest.mark.parametrize("text", ["", "row", "output:0", "layer:2", "input:-1", "output:x"])
def test_groups_that_cannot_be_are_refused(text: str) -> None:
    """Anything but the five groups names them."""
    with pytest.raises(InputError, match="expected output, input, layer"):
        Group.parse(text)


@pytest.mark.gpu
@pytest.mark.parametrize("group", GROUPS)
def test_masks_on_cuda_equal_the_cpu_s(group: str) -> None:
    """The same scores give the same mask on every device, ties included."""
    score = torch.randint(0, 50, (256, 512), generator=torch.Generator().manual_seed(0)).float()
    on_cpu = unstructured_mask(score, exact_sparsity(0.6), Group.parse(group))
    on_gpu = unstructured_mask(score.cuda(), exact_sparsity(0.6), Group.parse(group))
    assert torch.equal(on_cpu, on_gpu.cpu())
