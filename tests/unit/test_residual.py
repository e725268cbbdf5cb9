"""The residual stream that defers its sums gives what the plain one gives."""

from __future__ import annotations

import torch

from foretell.kernels.base import HeadNorms
from foretell.kernels.reference import ReferenceKernels
from foretell.model.norm import DeferredRMSNorm, LayerNorm, RMSNorm
from foretell.model.residual import PendingSum, chosen, total
from tests.unit.test_kernels_attention import Case


class Counting(ReferenceKernels):
    """Notes which of the two norms were asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def rms_norm(self, x, weight, eps):
        self.calls.append("norm")
        return super().rms_norm(x, weight, eps)

    def add_rms_norm(self, x, y, weight, eps, y_weight=None):
        self.calls.append("add+norm" if y_weight is None else "norm+add+norm")
        return super().add_rms_norm(x, y, weight, eps, y_weight)


def test_sum_and_norm_are_one_call_and_the_sum_is_kept():
    kernels = Counting()
    norm = RMSNorm(kernels, torch.randn(8), 1e-5)
    x, y, z = torch.randn(3, 4, 8)
    stream = PendingSum(kernels, x)
    assert torch.equal(norm(stream), norm(x))
    kernels.calls.clear()
    stream = stream + y
    normed = norm(stream)
    assert kernels.calls[0] == "add+norm"
    assert torch.equal(normed, norm(x + y))
    assert torch.equal(norm(stream), normed), "asked again, the sum is there"
    stream = stream + y + z  # two halves of a parallel block
    assert torch.equal(total(stream), x + y + y + z)
    layer = LayerNorm(kernels, torch.randn(8), None, 1e-5)
    assert torch.equal(layer(stream + z), layer(total(stream) + z))


def test_a_norm_before_the_sum_is_part_of_the_call():
    kernels = Counting()
    norm, behind = RMSNorm(kernels, torch.randn(8), 1e-5), DeferredRMSNorm(kernels, torch.randn(8), 1e-5)
    x, y, z = torch.randn(3, 4, 8)
    plain = x + RMSNorm(kernels, behind.weight, 1e-5)(y)
    stream = PendingSum(kernels, x) + behind(y)
    kernels.calls.clear()
    normed = norm(stream)
    assert kernels.calls[0] == "norm+add+norm"
    assert torch.equal(total(stream), plain)
    assert torch.equal(normed, norm(plain))
    assert torch.equal(total(PendingSum(kernels, x) + behind(y)), plain), "no norm comes: it is added as it is"
    torch.testing.assert_close(total(PendingSum(kernels, x) + behind(y) * 2.0), x + 2 * (plain - x))
    other = RMSNorm(kernels, norm.weight, 1e-3)
    assert torch.equal(other(PendingSum(kernels, x) + behind(y)), other(plain)), "of another eps: two calls"
    rows = torch.tensor([2, 0])
    assert torch.equal(total(chosen(stream + z, rows)), (plain + z)[rows])


def test_attend_is_its_steps_one_after_the_other():
    case = Case([21, 5], H=4, G=2, D=16)
    kernels, norms = ReferenceKernels(), HeadNorms(torch.randn(16), torch.randn(16), 1e-6)
    context = case.context([21, 5], [21, 5])
    qkv = torch.randn(26, 8, 16)
    angle = torch.rand(26, 8)
    rotation = (angle.cos(), angle.sin())
    q, k, v = qkv.clone().split([4, 2, 2], dim=1)
    y = kernels.attend(q, k, v, norms, rotation, case.cache, context, 0.3, None)
    q, k, v = qkv.clone().split([4, 2, 2], dim=1)
    q, k = kernels.rms_norm(q, norms.q, 1e-6), kernels.rms_norm(k, norms.k, 1e-6)
    kernels.rope_(q, *rotation)
    kernels.rope_(k, *rotation)
    kernels.write_kv(k, v, case.cache, context)
    assert torch.equal(y, kernels.attention(q, case.cache, context, 0.3, None))
