"""Every Pallas kernel through the TPU compiler, no TPU needed; skipped where libtpu is not installed."""

import json
import pathlib

import pytest

PROGRAMS = pathlib.Path(__file__).with_name("tpu_programs.py")

pytestmark = pytest.mark.tpu_compiler


SLOW = pytest.mark.slow  # each takes more than a minute


@pytest.mark.parametrize(
    "widths", [("1280", "7168"), pytest.param(("2560", "4096"), marks=SLOW)], ids=" ".join
)
@pytest.mark.parametrize(
    "topology",
    ["v5p:2x2x1", *(pytest.param(t, marks=SLOW) for t in ("v5e:2x2", "v6e:2x2", "tpu7x:2x2x1"))],
)
def test_every_kernel_compiles_at_every_width(topology, widths, run_python):
    printed = run_python(PROGRAMS, "compile_kernels", topology, *widths, tpu_compiler=True)
    assert printed.split() == [word for width in widths for word in ("compiled", width)]


@SLOW
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_every_kernel_compiles_for_two_and_eight_streams(topology, run_python):
    printed = run_python(PROGRAMS, "compile_other_n", topology, tpu_compiler=True)
    assert printed.split() == ["compiled", "2", "compiled", "8"]


@SLOW
def test_kernels_up_to_the_logits_compile_for_any_number_of_streams(run_python):
    printed = run_python(PROGRAMS, "compile_logits", "v5p:2x2x1", tpu_compiler=True)
    assert printed.split() == [word for n in "3458" for word in ("compiled", n)]


@SLOW
@pytest.mark.parametrize("topology", ["v5p:2x2x1", "v6e:2x2"])
def test_look_ahead_compiles_at_every_width(topology, run_python):
    printed = run_python(PROGRAMS, "compile_look_ahead", topology, tpu_compiler=True)
    assert printed.split()[1::2] == ["1280", "2560", "4096", "7168"]


def test_none_takes_the_kernels_and_xla_takes_none(run_python):
    assert "chosen" in run_python(PROGRAMS, "choose_kernels", "v5p:2x2x1", tpu_compiler=True)


def test_train_step_holds_the_kernels(run_python):
    calls = json.loads(run_python(PROGRAMS, "compile_train_step", "v5p:2x2x1", tpu_compiler=True))
    # A block is scanned: two sublayers there, the last write and the read-out behind it.
    assert calls == {
        **{"mhc_boundary_forward": 2, "mhc_boundary_backward": 2, "mhc_post_res_backward": 1},
        **{"mhc_post_res_forward": 1, "mhc_pre_forward": 1, "mhc_pre_backward": 1},
    }
