"""float64 NumPy oracle of every operation and its gradient; shares no code with the package.

Written for clarity on `[T, n, C]` arrays with einsum, and with Sinkhorn-Knopp in the log domain
throughout, where the package keeps streams flat and iterates on sums. Gradients are hand-derived; a
test checks them against central differences.
"""

import numpy as np


def round_tf32(x):
    """Round to nearest even on the 10 mantissa bits of TF32, by integer arithmetic on float32."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    keep = 13  # float32 has 23 mantissa bits
    half_even = (1 << (keep - 1)) - 1 + ((bits >> keep) & 1)
    bits = ((bits + half_even) >> keep) << keep
    return bits.astype(np.uint32).view(np.float32)


def _f64(*arrays):
    return [np.asarray(a, np.float64) for a in arrays]


def _logsumexp(x, axis):
    top = x.max(axis=axis, keepdims=True)
    return top + np.log(np.exp(x - top).sum(axis=axis, keepdims=True))


def _sinkhorn_tape(logits, num_iterations):
    log_m = np.asarray(logits, np.float64)
    tape = []
    for _ in range(num_iterations):
        for axis in (-2, -1):  # columns sum over i = axis -2 first, rows last
            log_m = log_m - _logsumexp(log_m, axis)
            tape.append((log_m, axis))
    return tape


def sinkhorn(logits, num_iterations=20):
    return np.exp(_sinkhorn_tape(logits, num_iterations)[-1][0])


def sinkhorn_vjp(logits, d_h_res, num_iterations=20):
    tape = _sinkhorn_tape(logits, num_iterations)
    d = np.asarray(d_h_res, np.float64) * np.exp(tape[-1][0])
    for log_m, axis in reversed(tape):
        d = d - np.exp(log_m) * d.sum(axis=axis, keepdims=True)
    return d


def projection(x, phi, norm_eps=1e-20):
    x, phi = _f64(x, phi)
    return x @ phi, np.sqrt((x**2).mean(-1) + norm_eps)


def projection_vjp(x, phi, ds, dr, norm_eps=1e-20):
    x, phi, ds, dr = _f64(x, phi, ds, dr)
    r = projection(x, phi, norm_eps)[1]
    dx = np.einsum("tm,km->tk", ds, phi) + x * (dr / r)[:, None] / x.shape[1]
    return dx, np.einsum("tk,tm->km", x, ds)


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


def _logits(s, r, bias, alpha, n):
    columns = np.concatenate([np.full(n, alpha[0]), np.full(n, alpha[1]), np.full(n * n, alpha[2])])
    return s * columns / r[:, None] + bias, columns


def coefficients(s, r, bias, alpha, n, num_iterations=20):
    s, r, bias, alpha = _f64(s, r, bias, alpha)
    h, _ = _logits(s, r, bias, alpha, n)
    h_res = sinkhorn(h[:, 2 * n :].reshape(-1, n, n), num_iterations)
    return _sigmoid(h[:, :n]), 2 * _sigmoid(h[:, n : 2 * n]), h_res


def coefficients_vjp(s, r, bias, alpha, dh_pre, dh_post, dh_res, n, num_iterations=20):
    """Returns (ds, dr, dbias, dalpha)."""
    s, r, bias, alpha, dh_pre, dh_post = _f64(s, r, bias, alpha, dh_pre, dh_post)
    h, columns = _logits(s, r, bias, alpha, n)
    h_pre, h_post = _sigmoid(h[:, :n]), 2 * _sigmoid(h[:, n : 2 * n])
    d_res = sinkhorn_vjp(h[:, 2 * n :].reshape(-1, n, n), dh_res, num_iterations)
    d = np.concatenate(
        [
            dh_pre * (h_pre - h_pre**2),
            dh_post * (h_post - h_post**2 / 2),
            d_res.reshape(-1, n * n),
        ],
        axis=1,
    )
    per_column = (d * s / r[:, None]).sum(0)
    dalpha = np.array(
        [per_column[:n].sum(), per_column[n : 2 * n].sum(), per_column[2 * n :].sum()]
    )
    dr = -(d * columns * s).sum(1) / r**2
    return d * columns / r[:, None], dr, d.sum(0), dalpha


def _streams(x, n):
    return np.asarray(x, np.float64).reshape(len(x), n, -1)


def pre(x, h_pre):
    (h_pre,) = _f64(h_pre)
    return np.einsum("ti,tic->tc", h_pre, _streams(x, h_pre.shape[1]))


def pre_vjp(x, h_pre, dy):
    h_pre, dy = _f64(h_pre, dy)
    dx = np.einsum("ti,tc->tic", h_pre, dy).reshape(len(dy), -1)
    return dx, np.einsum("tic,tc->ti", _streams(x, h_pre.shape[1]), dy)


def post_res(x, y, h_post, h_res):
    y, h_post, h_res = _f64(y, h_post, h_res)
    x = _streams(x, h_post.shape[1])
    new = np.einsum("tij,tjc->tic", h_res, x) + np.einsum("ti,tc->tic", h_post, y)
    return new.reshape(len(y), -1)


def post_res_vjp(x, y, h_post, h_res, g):
    """Returns (dx, dy, dh_post, dh_res)."""
    y, h_post, h_res = _f64(y, h_post, h_res)
    n = h_post.shape[1]
    x, g = _streams(x, n), _streams(g, n)
    dx = np.einsum("tij,tic->tjc", h_res, g).reshape(len(y), -1)
    dy = np.einsum("ti,tic->tc", h_post, g)
    return dx, dy, np.einsum("tic,tc->ti", g, y), np.einsum("tic,tjc->tij", g, x)


def rms_norm(x, weight=None, eps=1e-20):
    (x,) = _f64(x)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return y if weight is None else y * np.asarray(weight, np.float64)


def rms_norm_vjp(x, weight, dy, eps=1e-20):
    """Returns (dx, dweight); weight may be None, then dweight is that of a weight of ones."""
    x, dy = _f64(x, dy)
    r = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    d = dy if weight is None else dy * np.asarray(weight, np.float64)
    return d / r - x * (d * x).mean(-1, keepdims=True) / r**3, (dy * x / r).sum(0)


def read(x, phi, bias, alpha, weight, n, num_iterations=20, eps=1e-20):
    """Returns (layer_input, h_post, h_res, streams); weight None: no norm of the layer input."""
    h_pre, h_post, h_res = coefficients(*projection(x, phi), bias, alpha, n, num_iterations)
    u = pre(x, h_pre)
    return (
        *(u if weight is None else rms_norm(u, weight, eps), h_post, h_res),
        np.asarray(x, np.float64),
    )


def read_vjp(x, phi, bias, alpha, weight, cotangents, n, num_iterations=20, eps=1e-20):
    """Returns (dx, dphi, dbias, dalpha), then dweight if there is a weight."""
    d, dh_post, dh_res, d_streams = cotangents
    s, r = projection(x, phi)
    h_pre, _, _ = coefficients(s, r, bias, alpha, n, num_iterations)
    d_weight = []
    if weight is not None:
        d, *d_weight = rms_norm_vjp(pre(x, h_pre), weight, d, eps)
    dx, dh_pre = pre_vjp(x, h_pre, d)
    ds, dr, dbias, dalpha = coefficients_vjp(
        s, r, bias, alpha, dh_pre, dh_post, dh_res, n, num_iterations
    )
    dx_projection, dphi = projection_vjp(x, phi, ds, dr)
    return dx + dx_projection + _f64(d_streams)[0], dphi, dbias, dalpha, *d_weight
