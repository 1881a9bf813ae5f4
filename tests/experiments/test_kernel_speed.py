"""kernel_speed: what --check sees, the chart of a result file, the cost of terms, all without a GPU."""

import functools
import json
import os
import pathlib

# As the tests of kernels, whichever comes first: Triton chooses its interpreter when it is imported.
os.environ["TRITON_INTERPRET"] = "1"

import jax
import jax.numpy as jnp
import pytest

from experiments import record
from experiments.kernel_speed import chart, check, tpu_cases
from kernels_pallas.boundary import reference
from kernels_pallas.pre import reference as pre
from kernels_pallas.testing import emulate
from kernels_pallas.testing.case import Case
from kernels_pallas.testing.cases import CASES, EPS

RESULTS = pathlib.Path(chart.__file__).parent / "results"
BF16 = jnp.bfloat16
needs_gcc = pytest.mark.skipif(not emulate.available(), reason="no g++")


@pytest.mark.parametrize("name", ["projection", "pre+norm", "read", "boundary+norm"])
def test_check_passes_and_names_what_is_wrong(name, capsys, monkeypatch):
    """With batch axes; the sum of a row that is off by one part in ten thousand is seen."""
    op, _, norm = name.partition("+")
    case = Case(op, (2, 3), 40, 2, BF16, norm=EPS if norm else None)
    assert check.check_case(case, "xla") is None
    assert capsys.readouterr().out.startswith(f"ok   xla    {name}")
    module, function = {
        "projection": (reference.projection, "forward"),
        "pre+norm": (pre, "norm_backward"),
        "read": (reference, "read_forward"),
        "boundary+norm": (reference, "forward"),
    }[name]
    real = getattr(module, function)

    def wrong(*args, **static):
        leaves, tree = jax.tree.flatten(real(*args, **static))
        return jax.tree.unflatten(tree, (*leaves[:-1], leaves[-1] * 1.0001))

    wrong.layout, wrong.__name__ = getattr(real, "layout", None), function
    monkeypatch.setattr(module, function, wrong)
    assert check.check_case(case, "xla")
    assert "WRONG" in capsys.readouterr().out


def test_check_asks_for_every_implementation_of_the_platform():
    assert check.implementations(Case("boundary", (2, 3), 64, 4, BF16)) == ("xla",)
    assert any(len(case.lead) > 1 for case in check.cases())


def test_the_whole_check_at_toy_size(capsys):
    checked = check.cases(shapes=((3, 8, 2),), wide=(), dtypes=(BF16,))
    assert check.run(checked, transformations=False)
    printed = capsys.readouterr().out
    assert "21 of 21 cases within the limits of every leaf" in printed


def test_the_check_runs_the_cases_of_the_tests(monkeypatch):
    checked = []
    monkeypatch.setattr(check, "check_case", lambda case, name: checked.append(case))
    monkeypatch.setattr(check, "implementations", lambda case: ("xla",))
    assert check.run(transformations=False)
    assert checked == [*CASES, *check.cases()]


def rows(*found):
    return [
        {"name": name, "implementation": i, "T": T, "C": 64, "tau": c} for name, i, T, c in found
    ]


def test_a_chart_is_drawn_from_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MHC_COMMIT", "a" * 40)
    ours = rows(("sublayer", "cuda", 8, 56.0), ("sublayer, boundary", "cuda", 8, 45.0))
    ours += rows(("sublayer", "cuda", 1, 900.0), ("pre fwd", "triton", 8, 5.0))
    others = rows(("sublayer", "xla", 8, 126.0), ("pre fwd", "xla", 8, 6.0))
    for key, found in (("table", ours), ("baselines", others)):
        path = record.update("kernel_speed", key, {"rows": found}, device="a_gpu", folder=tmp_path)
    content = record.read(path)
    assert chart.bars(content) == {
        (8, 64): [
            ("xla", 126.0, False),
            ("read + post_res", 56.0, True),
            ("boundary", 45.0, True),
        ]
    }
    assert chart.caption(content).startswith("cpu; ours: commit ")
    chart.draw_all(path.parent)
    assert path.with_suffix(".png").stat().st_size > 5000
    with pytest.raises(SystemExit, match=r"no file of .* has a table"):
        chart.draw_all(tmp_path)


def test_the_stored_result_says_where_every_part_comes_from():
    content = json.loads((RESULTS / "nvidia_h200.json").read_text())
    for part in content.values():
        about = part["environment"]
        assert about["device"]["name"] == "NVIDIA H200"
        assert about["driver"]
        assert len(about["commit"]) == 40
        assert about["command"].startswith("python -m experiments.kernel_speed")
    assert len(chart.bars(content)[16384, 2560]) >= 6


@pytest.mark.gpu_interpreter
@needs_gcc
def test_the_cost_of_two_terms(monkeypatch, capsys):
    from experiments.kernel_speed import measure, terms

    times = iter([10.0, 10.5] * terms.ROUNDS + [10.0, 20.0] * terms.ROUNDS)
    monkeypatch.setattr(measure, "seconds", lambda f, inputs: 1e-6 * next(times))
    monkeypatch.setattr(measure, "copy_rate", lambda: 2e6 * 16 * 64)  # 1 τ is a microsecond
    monkeypatch.setattr(terms, "error_of_sums", lambda n, f=terms.error_of_sums: f(n, 16, 64))
    cheap = terms.run(((16, 64),))
    assert cheap["rows"][0]["cost_tau"] == pytest.approx(0.5)
    assert cheap["errors"]["2"] < 1e-5 < 5e-4 < cheap["errors"]["1"]
    assert "set TERMS = 2" in capsys.readouterr().out
    terms.run(((16, 64),))
    assert "set TERMS = 1" in capsys.readouterr().out


def test_the_tpu_cases_have_the_arguments_of_the_kernels():
    cases = tpu_cases.cases(2048, 256, BF16, n=2, num_iterations=2)  # short traces
    for op, direction, kernel, args, options, _ in cases:
        outputs = jax.eval_shape(functools.partial(kernel, **options), *args)
        assert jax.tree.leaves(outputs), (op, direction)
