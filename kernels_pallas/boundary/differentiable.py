"""`custom_vjp` of the operations that read streams, and of those that write and then read them."""

from collections.abc import Callable
from typing import Any

from kernels_pallas.derivatives import custom_vjp, run


def reading(op: str, reference: Any) -> Callable:
    """Returns (streams, parameters, static, implementation) -> (out, streams) of operation `op`.

    Args:
      op: a name of `dispatch.OPS`.
      reference: its module with the definitions `read_forward` and `read_backward`.
    """

    def forward(streams, parameters, static, implementation):
        args = streams, parameters
        out, saved = run(op, reference.read_forward, implementation, *args, static=static)
        return (out, streams), (streams, parameters, saved)

    def backward(static, implementation, residuals, cotangents):
        args = *residuals, *cotangents
        return run(op, reference.read_backward, implementation, *args, static=static)

    return _differentiable(op, forward, backward)


def writing(op: str, reference: Any) -> Callable:
    """Returns (pending, parameters, static, implementation) -> (out, new_streams) of operation `op`.

    Args:
      op: a name of `dispatch.OPS`.
      reference: its module with the definitions `forward` and `backward`.
    """

    def forward(pending, parameters, static, implementation):
        args = pending, parameters
        new_streams, out, saved = run(op, reference.forward, implementation, *args, static=static)
        return (out, new_streams), (pending, new_streams, parameters, saved)

    def backward(static, implementation, residuals, cotangents):
        args = *residuals, *cotangents
        return run(op, reference.backward, implementation, *args, static=static)

    return _differentiable(op, forward, backward)


def _differentiable(op, forward, backward):
    def call(arrays, parameters, static, implementation):
        return forward(arrays, parameters, static, implementation)[0]

    call.__name__ = op
    operation = custom_vjp(call, nondiff_argnums=(2, 3))
    operation.defvjp(forward, backward)
    return operation
