"""One list of cases of every operation.

tests/kernels/test_battery.py runs `CASES` in every implementation that a case names, on a CPU. On an
accelerator `python -m experiments.kernel_speed --check` runs them too, and larger ones. Its benchmarks take
their inputs from case.py.

A new case is a line of `CASES`. A new operation is, beside it, a line of `ARGUMENTS` in case.py, a line of
`oracle.LEAVES`, and `<op>` and `<op>_vjp` in the oracle.
"""

from typing import Any

from kernels_pallas.testing.case import BF16, F32, Case

EPS = 1e-6  # of norms
_ALL = "xla triton pallas"
_SHORT: dict[str, Any] = {"num_iterations": 4}  # runs the same code as 20
# T, C, n, dtype, and where. Triton's interpreter needs 0.1 s a program, hence the few tokens. For TPUs, 300
# tokens are three windows, an odd number for the two parts of a sum; blocks of 32 walk through a window of
# 128 and end inside the second one.
_ROWS: tuple[dict[str, Any], ...] = (
    {"T": 21, "C": 136, "n": 4, "dtype": BF16, "on": _ALL},
    {"T": 300, "C": 200, "n": 4, "on": "pallas"},
    {"T": 150, "C": 128, "n": 4, "dtype": BF16, "on": "pallas", "block": 32},
    {"T": 5, "C": 200, "n": 4, "on": "xla triton"},
    {"T": 3, "C": 200, "n": 2, "dtype": BF16, "on": "xla triton"},
    {"T": 37, "C": 136, "n": 2, "on": "xla pallas"},
    {"T": 3, "C": 136, "n": 8, "dtype": BF16, "on": "xla triton"},
    {"T": 21, "C": 128, "n": 8, "dtype": BF16, "on": "pallas"},
    {"T": 37, "C": 201, "n": 1},
    {"T": 37, "C": 201, "n": 1, "dtype": BF16},
    {"T": 37, "C": 201, "n": 3},
    {"T": 37, "C": 201, "n": 3, "dtype": BF16},
    {"T": (3, 7), "C": 201, "n": 8},
)
# Every option of an operation at a value that is nobody's default: one that is lost on its way to a kernel
# changes results by a tenth and more.
_SINKHORN: dict[str, Any] = {"num_iterations": 2, "eps": 0.2, "last": "columns"}
_COEFFICIENTS: dict[str, Any] = {
    "num_iterations": 2,
    "sinkhorn_eps": 0.2,
    "last": "columns",
    "pre_eps": 0.3,
}
_READ: dict[str, Any] = {**_COEFFICIENTS, "norm_eps": 0.7}
_LOGITS: dict[str, Any] = {"pre_eps": 0.3, "norm_eps": 0.7}
_HC: dict[str, Any] = {"norm_eps": 0.7}
_FEW: dict[str, Any] = {"T": 5, "C": 8, "n": 2, "on": _ALL}  # 2 streams compile fast
_LONG: dict[str, Any] = {"options": _SHORT, "on": "pallas", "slow": "pallas", "draws": 2}
_CUDA: dict[str, Any] = {"T": 3, "C": 64, "n": 4, "dtype": BF16, "on": "cuda"}

CASES = (
    *(Case(op, **rows) for op in ("projection", "pre", "post_res") for rows in _ROWS),
    Case("projection", 70, 520, 4, BF16, on="triton"),  # several programs a row
    Case("projection", **_FEW, options={"norm_eps": 0.7}),
    Case("pre", 9, 136, 4, BF16, norm=EPS, on=_ALL),
    Case("pre", 300, 200, 4, norm=EPS, on="pallas"),
    Case("pre", 3, 200, 2, norm=EPS, on="xla triton"),
    Case("pre", 37, 200, 2, norm=EPS, on="pallas"),
    Case("pre", 37, 136, 8, BF16, norm=EPS, on="xla pallas"),
    Case("pre", 37, 201, 3, norm=EPS),
    Case("pre", 37, 201, 3, norm=EPS, weight=False),
    Case("pre", **_FEW, norm=0.4),
    Case("sinkhorn", 12, 1, 4, on=_ALL),
    Case("sinkhorn", 12, 1, 2, on="xla triton"),
    Case("sinkhorn", 12, 1, 3, on="xla triton"),
    Case("sinkhorn", 12, 1, 5, on="triton"),
    Case("sinkhorn", 12, 1, 8, on="xla triton"),
    Case("sinkhorn", 12, 1, 1),
    Case("sinkhorn", 12, 1, 8, options={"num_iterations": 3}, on="pallas", slow="pallas"),
    Case("sinkhorn", **_FEW, options=_SINKHORN),
    # With padding.
    Case("sinkhorn", 9, 1, 3, options={"eps": 1e-6, "last": "columns"}, on="triton"),
    Case("coefficients", 37, 1, 4, options=_SHORT, on=_ALL, draws=2),
    Case("coefficients", 4500, 1, 2, options=_SHORT, on="pallas"),  # three windows in two parts
    Case("coefficients", 13, 1, 2, on="xla triton"),
    Case("coefficients", 13, 1, 8, on="xla triton"),
    Case("coefficients", 37, 1, 1, draws=2),
    Case("coefficients", 37, 1, 3, draws=2),
    Case("coefficients", **_FEW, options=_COEFFICIENTS),
    Case("mappings", 37, 40, 4, BF16),
    Case("mappings", **_FEW | {"on": "xla"}, options=_READ),
    # 8 streams are slow to compile for TPUs.
    Case("read", 37, 136, 4, BF16, norm=EPS, options=_SHORT, on="xla pallas", draws=2),
    Case("read", 37, 200, 4, options=_SHORT, on="xla pallas", draws=2),
    Case("read", 9, 136, 4, BF16, norm=EPS, on="triton"),
    Case("read", 3, 200, 2, on="xla triton"),
    Case("read", 69, 128, 4, BF16, options=_SHORT, on="cuda"),
    Case("read", 1, 64, 4, BF16, norm=EPS, on="cuda"),
    Case("read", 150, 136, 2, F32, EPS, **_LONG),
    Case("read", **_FEW, norm=0.4, options=_READ),
    Case("read", **_FEW | {"on": "xla"}, norm=0.4, weight=False, options=_READ),
    Case("read", **_CUDA, norm=0.4, options=_READ),
    Case("boundary", 37, 200, 4, BF16, options=_SHORT, on="xla pallas", slow="pallas", draws=2),
    Case("boundary", 37, 200, 2, BF16, options=_SHORT, on="pallas"),
    Case("boundary", 37, 136, 4, norm=EPS, options=_SHORT, on="xla pallas", draws=2),
    Case("boundary", 9, 136, 4, BF16, on="triton"),
    Case("boundary", 3, 200, 2, on="triton"),
    Case("boundary", 5, 128, 4, BF16, on="triton"),  # what the CUDA C++ kernels take, too
    # One term of t, see cuda_launches.
    Case("boundary", 69, 128, 4, BF16, options=_SHORT, on="cuda"),
    Case("boundary", 1, 64, 4, BF16, on="cuda"),
    Case("boundary", 17, 64, 4, BF16, norm=EPS, options=_SHORT, on="cuda"),
    Case("boundary", 6, 72, 8, norm=EPS),
    Case("boundary", 6, 72, 8, BF16, norm=EPS),
    Case("boundary", (2, 18), 200, 4, BF16, norm=EPS),
    Case("boundary", 1, 320, 2, norm=EPS),
    Case("boundary", 1, 320, 2, BF16, norm=EPS),
    # Three windows in two parts; two windows of 512 tokens, in blocks of 128 (forward of 256).
    Case("boundary", 300, 200, 2, BF16, EPS, **_LONG),
    Case("boundary", 1000, 24, 2, F32, EPS, **_LONG),
    Case("boundary", 21, 40, 8, BF16, **_LONG),
    Case("boundary", **_FEW, norm=0.4, options=_READ),
    Case("boundary", **_CUDA, norm=0.4, options=_READ),
    # tests/kernels/test_logits.py has other numbers of logits.
    Case("read_logits", 9, 72, 6, BF16),
    Case("read_logits", **_FEW, norm=0.4, options=_LOGITS),
    Case("read_logits", **_CUDA, norm=0.4, options=_LOGITS),
    Case("boundary_logits", 21, 136, 3, BF16, norm=EPS),
    Case("boundary_logits", **_FEW, norm=0.4, options=_LOGITS),
    Case("boundary_logits", **_CUDA, norm=0.4, options=_LOGITS),
    Case("hc_read", 3, 72, 3, BF16, on="xla triton"),
    Case("hc_read", 5, 40, 8, norm=EPS, on="xla triton"),
    Case("hc_boundary", 37, 40, 3, BF16, on="pallas", slow="pallas"),
    Case("hc_read", **_FEW, norm=0.4, options=_HC, draws=2),
    Case("hc_read", **_CUDA, norm=0.4, options=_HC),
    Case("hc_boundary", 37, 200, 4, BF16, on="xla", draws=2),
    Case("hc_boundary", 3, 136, 1, norm=EPS, on="xla triton"),
    Case("hc_boundary", 3, 136, 4, BF16, norm=EPS, on="triton"),
    # One term of t, see cuda_launches, and two.
    Case("hc_boundary", 69, 64, 4, BF16, norm=0.4, options=_HC, on="cuda"),
    Case("hc_boundary", **_FEW, norm=0.4, options=_HC),
    Case("hc_boundary", **_CUDA, slow="cuda"),
    # tests/kernels/test_look_ahead.py has more.
    Case("look_ahead", **_FEW, norm=0.4, options=_READ),
    Case("look_ahead", **_CUDA, norm=0.4, options=_READ),
    # One token, where what Triton does not round shows most, see `oracle.limits`.
    Case("look_ahead", 1, 200, 4, BF16, norm=EPS, options=_SHORT, on="triton", draws=4),
)
