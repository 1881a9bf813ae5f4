"""What waits between two parts of a program: the fewest bytes, by trying all sets of variables."""

import itertools
import time

import jax
import jax.numpy as jnp
import pytest

from mhc_jax.pipeline.cut import is_cheap, least_between, needed, part_of


def hidden_layer(x, w):
    """A gated hidden layer, and four values that its backward reads; w is there anyway."""
    gate, up = x @ w, jnp.tanh(x) @ w
    share = jax.lax.logistic(gate)
    hidden = gate * share * up
    return hidden, share, gate * share, up.astype(jnp.float16)


def norm(x, w):
    wide = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(wide * wide, -1, keepdims=True))
    return wide, scale, wide * scale, (wide * scale).astype(x.dtype) * w[:1]


def sorted_rows(x, w):
    """Three of each row, in the order of what a product says."""
    order = jnp.argsort((x @ w).sum(-1))
    rows = jnp.concatenate([x, x, x])[jnp.concatenate([order, order, order])]
    return rows, rows * 2


def num_bytes(variables):
    return sum(var.aval.size * var.aval.dtype.itemsize for var in variables)


@pytest.mark.parametrize("function", [hidden_layer, norm, sorted_rows])
def test_the_fewest_bytes_wait(function):
    x, w = (
        jnp.ones((5, 6), jnp.bfloat16),
        jnp.ones((6, 7 if function is not norm else 6), jnp.bfloat16),
    )
    program = jax.make_jaxpr(jax.jit(function, inline=True))(x, w)
    jaxpr = program.jaxpr
    [of_x, of_w] = jaxpr.invars
    cheap = [eqn for eqn in jaxpr.eqns if is_cheap(eqn)]
    there = [of_w, *jaxpr.constvars]
    found = least_between(jaxpr.eqns, jaxpr.outvars, there, {id(eqn) for eqn in cheap})

    def suffices(waiting):
        there_then = {*there, *waiting}
        again = needed(cheap, jaxpr.outvars, [*there, *waiting])
        made = {var for eqn in again for var in eqn.outvars}
        read = {v for eqn in again for v in eqn.invars if not hasattr(v, "val")}
        return read | {*jaxpr.outvars} <= there_then | made

    variables = [of_x, *(var for eqn in jaxpr.eqns for var in eqn.outvars)]
    sets = itertools.chain.from_iterable(
        itertools.combinations(variables, count) for count in range(len(jaxpr.outvars) + 1)
    )
    assert suffices(found)
    assert num_bytes(found) == min(num_bytes(one) for one in sets if suffices(one))
    assert num_bytes(found) < num_bytes(jaxpr.outvars)
    # And these make what is wanted.
    values = dict(zip(jaxpr.invars, (x, w)))
    forward = part_of(program, jaxpr.invars, jaxpr.eqns, found)
    waiting = forward(*values.values())
    rest = part_of(program, [of_w, *found], cheap, jaxpr.outvars)
    for one, other in zip(rest(w, *waiting), function(x, w), strict=True):
        assert (one == other).all()


@pytest.mark.parametrize("which", ["least_between", "needed"])
def test_a_long_program_is_cut_in_time(which):
    """A stage as one recompute block: once the time grew with the square of its length, to minutes."""

    def seconds(layers):
        def function(x, w):
            found = []
            for k in range(layers):
                gate = x @ w[k]
                x = gate * jax.lax.logistic(gate)
                found.append(x)
            return found

        jaxpr = jax.make_jaxpr(function)(jnp.ones((3, 3)), jnp.ones((layers, 3, 3))).jaxpr
        cheap = {id(eqn) for eqn in jaxpr.eqns if is_cheap(eqn)}
        arguments = jaxpr.eqns, jaxpr.outvars, jaxpr.invars[1:]
        taken = []
        for _ in range(5):
            start = time.process_time()
            found = needed(*arguments) if which == "needed" else least_between(*arguments, cheap)
            taken.append(time.process_time() - start)
        assert len(found) == (len(jaxpr.eqns) if which == "needed" else layers)
        return min(taken)

    # 16 times as long; the square of that is 256.
    assert seconds(800) / seconds(50) < 64
