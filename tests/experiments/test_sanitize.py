"""compute-sanitizer over every CUDA kernel: none is forgotten, and no tool that failed looks clean."""

import importlib.util
import pathlib
import re
import sys

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed (extra 'parity')", allow_module_level=True)

from experiments.kernel_speed import sanitize

PACKAGE = pathlib.Path(sanitize.cuda_launch.__file__).parents[1]


def test_every_kernel_is_run():
    sources = "".join(path.read_text() for path in PACKAGE.glob("*/*.cu"))
    made = [make() for make in sanitize.CASES.values()]
    assert {launch.kernel for launch, _ in made} == set(re.findall(r"\bmhc_\w+", sources))
    for launch, args in made:
        assert args[-1] % 16  # the last tile is not full
        assert launch.macros["C"] == 128


@pytest.mark.parametrize(
    ("ran", "status", "summary", "clean"),
    [
        (len(sanitize.CASES), 0, "ERROR SUMMARY: 0 errors", True),
        (len(sanitize.CASES), 9, "ERROR SUMMARY: 2 errors", False),
        (len(sanitize.CASES) - 1, 0, "ERROR SUMMARY: 0 errors", False),
        (len(sanitize.CASES), 0, "", False),
    ],
)
def test_the_verdict(tmp_path, capfd, ran, status, summary, clean):
    fake = tmp_path / "compute-sanitizer"
    lines = "".join(f"print('ran {k}')\n" for k in range(ran))
    said = f"print('========= {summary}')\n" if summary else ""
    fake.write_text(f"#!{sys.executable}\nimport sys\n{lines}{said}sys.exit({status})\n")
    fake.chmod(0o755)
    assert sanitize.sanitize(str(fake), ["memcheck"]) is clean
    assert (
        f"| {ran} of {len(sanitize.CASES)} | {summary or 'no summary'} |" in capfd.readouterr().out
    )
