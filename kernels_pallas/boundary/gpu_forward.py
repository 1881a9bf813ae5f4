"""F_post,res and the next projection in one Triton kernel: 9C instead of 9C + 4C.

The product is taken transposed, s^T = phi^T x'^T. As the right operand of a tensor-core product the new
streams must lie in shared memory, so the layout of the tensor cores stays away from the loads; as the left
one it is carried back to them (and the kernel spills). What else decides is the order of memory: programs
that sweep along the rows of all tokens at once, 64 bytes a row, reach 56 % of the copy rate.
"""

import jax
import jax.numpy as jnp
import triton
import triton.language as tl

from kernels_pallas import triton_call
from kernels_pallas.projection import gpu as projection
from kernels_pallas.triton_call import Launch, cdiv, struct
from kernels_pallas.triton_math import cast, dot, load_tile, opaque


@triton.jit
def write_project_kernel(
    x_ptr,
    y_ptr,
    post_ptr,
    res_ptr,
    terms_ptr,
    T,
    out_ptr,
    parts_ptr,
    C: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    MP: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    VEC: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
):
    """New streams x' of BLOCK_T tokens, and their partial sums [T, MP] as in `projection_kernel`.

    The programs of a token tile take turns along its columns, BLOCK_C of every stream a step.
    """
    WIDTH: tl.constexpr = 2 * MP
    split = tl.program_id(0)
    # From the last tokens to the first: F_pre, which follows, begins with the first ones.
    t = (tl.num_programs(1) - 1 - tl.program_id(1)) * BLOCK_T + tl.arange(0, BLOCK_T)
    exists = t < T
    row = t.to(tl.int64)[:, None]
    res = ()
    for k in tl.static_range(N * N):
        res = res + (load_tile(res_ptr + t * (N * N) + k, exists, EVEN)[:, None],)
    post = ()
    for k in tl.static_range(N):
        post = post + (load_tile(post_ptr + t * N + k, exists, EVEN)[:, None],)
    term = tl.arange(0, WIDTH)[None, :]
    acc = tl.zeros((WIDTH, BLOCK_T), tl.float32)
    squares = tl.zeros((BLOCK_T, BLOCK_C // VEC), tl.float32)
    for step in tl.range(0, STEPS, num_stages=STAGES):
        c = (step * tl.num_programs(0) + split) * BLOCK_C + tl.arange(0, BLOCK_C)
        mask = exists[:, None] & (c[None, :] < C)
        y = load_tile(y_ptr + row * C + c[None, :], mask, EVEN).to(tl.float32)
        x = ()
        for j in tl.static_range(N):
            at = row * (N * C) + (j * C + c)[None, :]
            x = x + (load_tile(x_ptr + at, mask, EVEN).to(tl.float32),)
        product = tl.zeros((WIDTH, BLOCK_T), tl.float32)
        for i in tl.static_range(N):
            new = res[i * N] * x[0]
            for j in tl.static_range(1, N):
                new += res[i * N + j] * x[j]
            new += post[i] * y
            new = cast(new, out_ptr.dtype.element_ty)
            at = row * (N * C) + (i * C + c)[None, :]
            if EVEN:
                tl.store(out_ptr + at, new)
            else:
                tl.store(out_ptr + at, new, mask=mask)
            in_row = tl.broadcast_to(c[:, None] < C, (BLOCK_C, WIDTH))
            phi = load_tile(terms_ptr + (i * C + c)[:, None] * WIDTH + term, in_row, EVEN)
            product = dot(tl.trans(phi), tl.trans(new), product)
            new = new.to(tl.float32)
            squares += tl.sum(tl.reshape(new * new, (BLOCK_T, BLOCK_C // VEC, VEC)), axis=2)
        # Opaque for the reasons given in `projection_kernel`.
        acc += opaque(product)
    acc = tl.sum(tl.reshape(tl.trans(acc), (BLOCK_T, 2, MP)), axis=1)
    m = tl.arange(0, MP)[None, :]
    acc = tl.where(m == M, tl.sum(squares, axis=1)[:, None], acc)
    part = (split.to(tl.int64) * T + t)[:, None]
    tl.store(parts_ptr + part * MP + m, acc, mask=exists[:, None])


def takes(n: int, dtype, capability: int | None = None) -> bool:
    """Whether the fused kernel runs: n = 4, bfloat16, compute capability 9 or more.

    n = 8 has no registers for 72 coefficients a token; before Hopper tensor cores read registers alone.
    """
    capability = capability or triton_call.capability()
    return n == 4 and dtype == jnp.bfloat16 and capability >= 90


def launch(T: int, C: int, n: int, dtype) -> Launch:
    """The launch for x [T, n*C], y [T, C], h_post, h_res and `phi_terms`; outputs x' and [splits, T, MP]."""
    m = n * n + 2 * n
    columns = projection.padded_columns(m)
    # H200, T 16384 / T 8192, C 4096: 12.8C / 12.6C, the two kernels that it replaces 13.8C / 13.9C;
    # 128 x 32 in two splits 13.5C / 13.4C, two stages 17C. Three stages fill the shared memory.
    block_t, block_c = 64, 64
    tiles, steps = cdiv(T, block_t), cdiv(C, block_c)
    splits = max(1, min(steps // 2, projection.MULTIPROCESSORS // tiles))
    steps = cdiv(steps, splits)
    return Launch(
        kernel=write_project_kernel,
        grid=(splits, tiles),
        outputs=(struct((T, n * C), dtype), struct((splits, T, columns))),
        constants={
            "C": C,
            "N": n,
            "M": m,
            "MP": columns,
            "STEPS": steps,
            "BLOCK_T": block_t,
            "BLOCK_C": block_c,
            "VEC": 16 // dtype.itemsize,
            "EVEN": T % block_t == 0 and steps * splits * block_c == C,
            "STAGES": 3,
        },
        num_warps=8,
        num_stages=3,
    )


def new_streams_and_parts(
    streams: jax.Array,
    layer_output: jax.Array,
    h_post: jax.Array,
    h_res: jax.Array,
    phi: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """The write, and the first stage of the projection of what it writes; T > 0."""
    n, C = h_post.shape[-1], layer_output.shape[-1]
    T = triton_call.num_tokens(h_post.shape[:-1])
    call = launch(T, C, n, streams.dtype)
    terms = projection.phi_terms(phi, phi.shape[0], call.constants["MP"], pair=True)
    new, parts = call(streams, layer_output, h_post, h_res, terms, T)
    return new.reshape(streams.shape), parts
