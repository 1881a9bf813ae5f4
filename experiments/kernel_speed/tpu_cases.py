"""Lists what `tpu_schedule` compiles: every Pallas kernel with its grid, loops and conditional parts."""

from kernels_pallas.boundary import tpu as boundary
from kernels_pallas.boundary import tpu_blocks as blocks
from kernels_pallas.boundary import tpu_mix
from kernels_pallas.boundary.contract import Parameters, ReadOut, ReadStatic, Saved, Update
from kernels_pallas.coefficients import tpu as mappings
from kernels_pallas.post_res import tpu as post_res
from kernels_pallas.pre import tpu as pre
from kernels_pallas.projection import tpu as projection
from kernels_pallas.sinkhorn import tpu as sinkhorn
from kernels_pallas.testing.case import structs
from kernels_pallas.tpu.tiles import MIN_TOKENS, sinkhorn_window


def cases(num_tokens: int, width: int, dtype, n: int = 4, num_iterations: int = 20):
    """Yields (op, direction, function, arguments, options, schedule) of every kernel.

    The schedule is grid steps, trips of inner loops, and shares of conditional regions.
    """
    T, C, m = num_tokens, width, n * n + 2 * n
    names = "x y h hh s r phi bias alpha weight"
    x, y, h, h_res, s, r, phi, bias, alpha, weight = structs(names, (T,), C, n, dtype)

    def steps(block, *trips):
        return -(-T // block), trips, ()

    def rows(block):
        return steps(block, block // MIN_TOKENS)

    again = num_iterations - 1  # iterations after the first
    once, twice = steps(sinkhorn.TOKENS, again), steps(sinkhorn.TOKENS, again, again)
    coefficients = {"n": n, "num_iterations": num_iterations}
    iterations = {"num_iterations": num_iterations}
    p_block = projection.block_tokens(n * C, m, dtype, backward=False)
    b_block = projection.block_tokens(n * C, m, dtype, backward=True)
    table = [
        ("projection", "forward", projection, (x, phi), {"norm_eps": 1e-20}, steps(p_block)),
        ("projection", "backward", projection, (x, phi, r, s, r), {}, steps(b_block)),
        ("coefficients", "forward", mappings, (s, r, bias, alpha), coefficients, once),
        (
            "coefficients",
            "backward",
            mappings,
            (s, r, bias, alpha, h, h, h_res),
            coefficients,
            twice,
        ),
        ("sinkhorn", "forward", sinkhorn, (h_res,), iterations, once),
        ("sinkhorn", "backward", sinkhorn, (h_res, h_res), iterations, twice),
        ("pre", "forward", pre, (x, h), {}, rows(pre.block_tokens(n * C, n, dtype))),
        ("pre", "backward", pre, (x, h, y), {}, rows(pre.block_tokens(n * C, n, dtype))),
    ]
    block = rows(post_res.block_tokens(n * C, n, dtype))
    table += [
        ("post_res", "forward", post_res, (x, y, h, h_res), {}, block),
        ("post_res", "backward", post_res, (x, y, h, h_res, x), {}, block),
    ]
    # With the RMSNorm of the layer input, as the model calls them.
    static = {"static": ReadStatic(n, num_iterations, norm_eps=1e-20, input_norm_eps=1e-20)}
    parameters = Parameters(phi, bias, alpha, weight)

    def fused_steps(block, *parts):
        """`parts` are the conditional regions: how often a step runs each, and the trips of its loops."""
        often = {"step": 1, "window": block / sinkhorn_window(T), "first": 1 / steps(block)[0]}
        shares = tuple(often[name] for name, *_ in parts)
        groups = block // MIN_TOKENS
        count = {"rows": groups, "input rows": groups // min(blocks.input_unroll(C), groups)}
        trips = (count.get(k, k) for _, *loops in parts for k in loops)
        return *steps(block, *trips)[:2], shares

    def forward_steps(*parts, fused):
        return fused_steps(blocks.forward_tokens(n * C, n, dtype, fused=fused), *parts)

    def backward_steps(*parts, fused):
        block = blocks.backward_tokens(n * C, n, dtype, num_iterations, fused=fused)
        return fused_steps(block, ("first",), *parts)

    update = Update(x, y, h, h_res)
    cotangents = parameters, Saved(h, s, r), ReadOut(y, h, h_res), x
    rows, input_rows = ("step", "rows"), ("step", "input rows")
    block = blocks.forward_tokens(n * C, n, dtype, fused=True)
    mixed_rows = ("step", block // (tpu_mix.group_tokens(block, n, dtype) or MIN_TOKENS))
    step, window = ("step",), ("window",)
    project, transpose = ("window", again), ("window", again, again)
    table += [
        (
            *("read", "forward", boundary, (x, parameters), static),
            forward_steps(input_rows, project, fused=False),
        ),
        (
            *("read", "backward", boundary, (x, *cotangents), static),
            backward_steps(transpose, input_rows, step, fused=False),
        ),
        (
            *("boundary", "forward", boundary, (update, parameters), static),
            forward_steps(window, window, mixed_rows, input_rows, project, fused=True),
        ),
        (
            *("boundary", "backward", boundary, (update, x, *cotangents), static),
            backward_steps(window, transpose, input_rows, rows, window, fused=True),
        ),
    ]
    for op, direction, module, args, static, schedule in table:
        name = f"read_{direction}" if op == "read" else direction
        yield op, direction, getattr(module, name), args, static, schedule
