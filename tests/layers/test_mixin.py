"""What both norms do with a prior before Eq. 7."""

import pytest

from kn_detectron.layers import Belief, KalmanNorm2d

from .inputs import prior_of


def test_no_prior_gradient(x):
    prior = Belief(*(v.requires_grad_() for v in prior_of()))
    norm = KalmanNorm2d(4, prior_gradient=False)
    norm(x, prior=prior)[0].square().sum().backward()
    assert prior.mean.grad is None and prior.var.grad is None
    assert norm.log_var_scale.grad.abs().sum() > 0


def test_another_variant_is_refused():
    with pytest.raises(ValueError, match="variant is one of .* not 'nets'"):
        KalmanNorm2d(4, variant="nets")
