"""How the oracle makes h_pre, h_post and h_res of streams; Sinkhorn-Knopp in the log domain."""

import numpy as np

from kernels_pallas.testing.oracle.arrays import by_stream, f64, is_bf16, round_bits


def _logsumexp(x, axis):
    top = x.max(axis=axis, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))


def _sinkhorn_tape(logits, num_iterations, eps, last):
    """Returns of every step (logarithm of its result, axis, d log(what follows) / d log(its result)).

    These derivatives are 1, but for the first result, the softmax, to which eps is added.
    """
    log_m, tape = np.asarray(logits, np.float64), []
    axes = (-2, -1) if last == "rows" else (-1, -2)  # columns sum over i = axis -2
    for step in range(2 * num_iterations):
        axis = axes[step % 2]
        log_sum = _logsumexp(log_m, axis)
        if eps and step:
            log_sum = np.logaddexp(log_sum, np.log(eps))
        log_m = log_m - log_sum
        if eps and not step:
            m = np.exp(log_m)
            tape.append((log_m, axis, m / (m + eps)))
            log_m = np.log(m + eps)
        else:
            tape.append((log_m, axis, 1.0))
    return tape


def sinkhorn(logits, num_iterations=20, eps=0.0, last="rows"):
    return np.exp(_sinkhorn_tape(logits, num_iterations, eps, last)[-1][0])


def sinkhorn_vjp(logits, d_h_res, num_iterations=20, eps=0.0, last="rows"):
    tape = _sinkhorn_tape(logits, num_iterations, eps, last)
    d = np.asarray(d_h_res, np.float64) * np.exp(tape[-1][0])
    for log_m, axis, factor in reversed(tape):
        d = d * factor
        d = d - np.exp(log_m) * d.sum(axis=axis, keepdims=True)
    return d


def projection(x, phi, norm_eps=1e-20):
    x, phi = f64(x, phi)
    return x @ phi, np.sqrt((x**2).mean(-1) + norm_eps)


def projection_vjp(x, phi, ds, dr, norm_eps=1e-20):
    if is_bf16(x):
        ds = round_bits(ds, 11)
    x, phi, ds, dr = f64(x, phi, ds, dr)
    r = projection(x, phi, norm_eps)[1]
    dx = np.einsum("tm,km->tk", ds, phi) + x * (dr / r)[:, None] / x.shape[1]
    return dx, np.einsum("tk,tm->km", x, ds)


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def _affine(s, r, bias, alpha, n):
    columns = np.repeat(alpha, [n, n, len(bias) - 2 * n])
    return s * columns / r[:, None] + bias, columns


def logits(s, r, bias, alpha, n, *, pre_eps=0.0):
    """Returns (h_pre, h_post, logits [T, k]) of 2n + k columns."""
    h, _ = _affine(*f64(s, r, bias, alpha), n)
    return _sigmoid(h[:, :n]) + pre_eps, 2 * _sigmoid(h[:, n : 2 * n]), h[:, 2 * n :]


def logits_vjp(s, r, bias, alpha, dh_pre, dh_post, d_logits, n, *, pre_eps=0.0):
    """Returns (ds, dr, dbias, dalpha), which do not depend on pre_eps."""
    s, r, bias, alpha, dh_pre, dh_post, d_logits = f64(s, r, bias, alpha, dh_pre, dh_post, d_logits)
    h, columns = _affine(s, r, bias, alpha, n)
    h_pre, h_post = _sigmoid(h[:, :n]), 2 * _sigmoid(h[:, n : 2 * n])
    d = np.concatenate(
        [dh_pre * (h_pre - h_pre**2), dh_post * (h_post - h_post**2 / 2), d_logits], axis=1
    )
    per_column = (d * s / r[:, None]).sum(0)
    dalpha = np.array(
        [per_column[:n].sum(), per_column[n : 2 * n].sum(), per_column[2 * n :].sum()]
    )
    dr = -(d * columns * s).sum(1) / r**2
    return d * columns / r[:, None], dr, d.sum(0), dalpha


def coefficients(
    s, r, bias, alpha, n, num_iterations=20, *, sinkhorn_eps=0.0, last="rows", pre_eps=0.0
):
    h_pre, h_post, res = logits(s, r, bias, alpha, n, pre_eps=pre_eps)
    h_res = sinkhorn(res.reshape(-1, n, n), num_iterations, sinkhorn_eps, last)
    return h_pre, h_post, h_res


def coefficients_vjp(
    s,
    r,
    bias,
    alpha,
    dh_pre,
    dh_post,
    dh_res,
    n,
    num_iterations=20,
    *,
    sinkhorn_eps=0.0,
    last="rows",
    pre_eps=0.0,
):
    """Returns (ds, dr, dbias, dalpha), which do not depend on pre_eps."""
    res = logits(s, r, bias, alpha, n)[2].reshape(-1, n, n)
    d_res = sinkhorn_vjp(res, dh_res, num_iterations, sinkhorn_eps, last)
    return logits_vjp(s, r, bias, alpha, dh_pre, dh_post, d_res.reshape(-1, n * n), n)


def stream_projection(x, theta, norm_eps=1e-20):
    """Returns (s [T, n, 2 + n], r [T, n]) of every stream by itself; theta [2 + n, C]."""
    rows, theta = by_stream(x, len(theta) - 2), f64(theta)[0]
    return np.einsum("tjc,pc->tjp", rows, theta), np.sqrt((rows**2).mean(-1) + norm_eps)


def stream_projection_vjp(x, theta, ds, dr, norm_eps=1e-20):
    rows, theta = by_stream(x, len(theta) - 2), f64(theta)[0]
    r = stream_projection(x, theta, norm_eps)[1]
    dx = np.einsum("tjp,pc->tjc", ds, theta) + rows * (dr / r)[..., None] / theta.shape[1]
    return dx.reshape(len(x), -1), np.einsum("tjc,tjp->pc", rows, ds)


def _tanh(s, r, n):
    """Returns tanh(s / r) with rows of theta before streams, flat as the bias [T, m]."""
    return np.tanh(s / r[..., None]).swapaxes(1, 2).reshape(len(s), -1)


def hc_mappings(s, r, bias, alpha, n):
    """Returns (h_pre, h_post, h_res) of Hyper-Connections."""
    bias, alpha = f64(bias, alpha)
    h = _tanh(s, r, n) * np.repeat(alpha, [n, n, n * n]) + bias
    return h[:, :n], h[:, n : 2 * n], h[:, 2 * n :].reshape(-1, n, n)


def hc_mappings_vjp(s, r, bias, alpha, dh_pre, dh_post, dh_res, n):
    """Returns (ds, dr, dbias, dalpha)."""
    alpha, *d = f64(alpha, dh_pre, dh_post, dh_res)
    d = np.concatenate([x.reshape(len(s), -1) for x in d], axis=1)
    t = _tanh(s, r, n)
    per_column = np.split((d * t).sum(0), (n, 2 * n))
    d_normed = (d * np.repeat(alpha, [n, n, n * n])).reshape(-1, 2 + n, n).swapaxes(1, 2)
    d_normed = d_normed / np.cosh(s / r[..., None]) ** 2
    dr = -(d_normed * s).sum(-1) / r**2
    return d_normed / r[..., None], dr, d.sum(0), np.array([x.sum() for x in per_column])


def mappings(x, phi, bias, alpha, n, *, norm_eps=1e-20, **options):
    """`options`: as in `coefficients`."""
    return coefficients(*projection(x, phi, norm_eps), bias, alpha, n, **options)


def mappings_vjp(
    x, phi, bias, alpha, dh_pre, dh_post, dh_res, n, *, norm_eps=1e-20, other=False, **options
):
    """Returns (dx, dphi, dbias, dalpha). `other`: as in `round_bits`."""
    d = dh_pre, dh_post, dh_res
    s, r = projection(x, phi, norm_eps)
    ds, dr, *d_parameters = coefficients_vjp(s, r, bias, alpha, *d, n, **options)
    ds = round_bits(ds, 11, other) if is_bf16(x) else ds
    return *projection_vjp(x, phi, ds, dr, norm_eps), *d_parameters
