"""SyncBatchNorm's operators, which torch has for GPUs only, stood in for by their formulas.

Without a GPU nothing else tests what the passes give to these operators and make of what they
return. With one, nothing here is used: the tests take the operators themselves.
"""

import contextlib

import torch


class OnGPU(torch.Tensor):
    """A tensor on the CPU that says that it is not, so that passes go a GPU's way."""

    is_cuda = True
    # What is computed of it is on the CPU again, and no view of something else.
    __torch_function__ = torch._C._disabled_torch_function_impl


def on_gpu(x: torch.Tensor) -> torch.Tensor:
    """x on the GPU if there is one, else an :class:`OnGPU` with the values of x."""
    return x.cuda() if torch.cuda.is_available() else x.as_subclass(OnGPU)


def _dense(*features):
    """Asserts what the operators take for granted: dense features, all of one memory format."""
    formats = [torch.contiguous_format, torch.channels_last]
    assert any(all(x.is_contiguous(memory_format=f) for x in features) for f in formats)


def _vector(v):
    return v.double().view(1, -1, 1, 1) if v is not None else 1.0


def _update_stats(x, running_mean, running_var, momentum):
    """torch has this one on a CPU too, but there it returns half precision for half precision."""
    assert running_mean is None and running_var is None
    _dense(x)
    dtype = torch.promote_types(x.dtype, torch.float32)
    var, mean = torch.var_mean(x.to(dtype), (0, 2, 3), unbiased=False)
    return mean, var


def _elemt(x, weight, bias, mean, invstd, eps):
    y = (x.double() - _vector(mean)) * _vector(invstd) * _vector(weight)
    return (y if bias is None else y + _vector(bias)).to(x.dtype)


def _reduce(dy, x, mean, invstd, weight, input_g, weight_g, bias_g):
    assert (input_g, weight_g, bias_g) == (True, False, False)
    _dense(dy, x)
    dy_sum = dy.double().sum((0, 2, 3))
    dy_x = (dy.double() * (x.double() - _vector(mean))).sum((0, 2, 3))
    nothing = mean.new_empty(0)
    return dy_sum.to(mean.dtype), dy_x.to(mean.dtype), nothing, nothing


def _backward_elemt(dy, x, mean, invstd, weight, sum_dy, sum_dy_xmu, count):
    assert count.dtype == torch.int32
    _dense(dy, x)
    n, invstd = count.sum(), _vector(invstd)
    centred = x.double() - _vector(mean)
    dx = dy.double() - _vector(sum_dy) / n - centred * invstd.square() * _vector(sum_dy_xmu) / n
    return (dx * invstd * _vector(weight)).to(x.dtype)


_OPERATORS = {
    "batch_norm_update_stats": _update_stats,
    "batch_norm_elemt": _elemt,
    "batch_norm_backward_reduce": _reduce,
    "batch_norm_backward_elemt": _backward_elemt,
}


@contextlib.contextmanager
def gpu_operators():
    """Within it the operators can be called on a CPU. Gives the names of those that were."""
    called = set()
    if torch.cuda.is_available():
        yield called
        return

    def counted(name, operator):
        def call(*args):
            called.add(name)
            return operator(*args)

        return call

    with torch.library._scoped_library("aten", "IMPL") as library:
        for name, operator in _OPERATORS.items():
            library.impl(name, counted(name, operator), "CPU", allow_override=True)
        yield called
