"""How the oracle applies mappings to streams (`pre`, `post_res`), and the RMSNorm."""

import numpy as np

from kernels_pallas.testing.oracle.arrays import by_stream, f64


def pre(x, h_pre):
    (h_pre,) = f64(h_pre)
    return np.einsum("ti,tic->tc", h_pre, by_stream(x, h_pre.shape[1]))


def pre_vjp(x, h_pre, dy):
    h_pre, dy = f64(h_pre, dy)
    dx = np.einsum("ti,tc->tic", h_pre, dy).reshape(len(dy), -1)
    return dx, np.einsum("tic,tc->ti", by_stream(x, h_pre.shape[1]), dy)


def pre_normed(x, h_pre, weight, eps):
    return rms_norm(pre(x, h_pre), weight, eps)


def pre_normed_vjp(x, h_pre, weight, dy, eps):
    """Returns (dx, dh_pre, dweight)."""
    du, d_weight = rms_norm_vjp(pre(x, h_pre), weight, dy, eps)
    return *pre_vjp(x, h_pre, du), d_weight


def post_res(x, y, h_post, h_res):
    y, h_post, h_res = f64(y, h_post, h_res)
    x = by_stream(x, h_post.shape[1])
    new = np.einsum("tij,tjc->tic", h_res, x) + np.einsum("ti,tc->tic", h_post, y)
    return new.reshape(len(y), -1)


def post_res_vjp(x, y, h_post, h_res, g):
    """Returns (dx, dy, dh_post, dh_res)."""
    y, h_post, h_res = f64(y, h_post, h_res)
    n = h_post.shape[1]
    x, g = by_stream(x, n), by_stream(g, n)
    dx = np.einsum("tij,tic->tjc", h_res, g).reshape(len(y), -1)
    dy = np.einsum("ti,tic->tc", h_post, g)
    return dx, dy, np.einsum("tic,tc->ti", g, y), np.einsum("tic,tjc->tij", g, x)


def rms_norm(x, weight=None, eps=1e-20):
    (x,) = f64(x)
    y = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    return y if weight is None else y * np.asarray(weight, np.float64)


def rms_norm_vjp(x, weight, dy, eps=1e-20):
    """Returns (dx, dweight); weight may be None, then dweight is that of a weight of ones."""
    x, dy = f64(x, dy)
    r = np.sqrt((x**2).mean(-1, keepdims=True) + eps)
    d = dy if weight is None else dy * np.asarray(weight, np.float64)
    return d / r - x * (d * x).mean(-1, keepdims=True) / r**3, (dy * x / r).sum(0)
