"""Run by test_pipeline_plan.py in a process of its own: several command lines, since flags are global."""

import sys

from absl import flags

from experiments.pipeline_plan import __main__ as plan
from mhc_jax import command_line

CASES = (
    "--pipe=8 --microbatches=32 --schedule=dualpipev --figure={figure} --output={output}",
    "--pipe=16 --microbatches=64 --schedule=dualpipev",
    "--pipe=8 --microbatches=4 --schedule=dualpipev",
    "--pipe=8 --microbatches=32 --schedule=fast",
    "--pipe=0 --microbatches=32 --schedule=1f1b",
    "--pipe=4 --microbatches=8 --schedule=1f1b --links=fast",
    "--pipe=4 --microbatches=8 --schedule=1f1b --links=50 --forward_ms=-1",
    "--pipe=8 --microbatches=99999999999999999 --links=50 --forward_ms=1",
    "--pipe=8 --microbatches=32768",
    "--pipe=4096 --microbatches=8",
    "--pipe=4 --microbatches=8 --sequences=99999999999999999",
    "--pipe=4 --microbatches=8 --sequences=1 --links=",
)

for number, case in enumerate(CASES):
    flags.FLAGS.unparse_flags()
    given = case.format(figure=f"{sys.argv[1]}/plan", output=f"{sys.argv[1]}/plan.json").split()
    if number:
        given += ["--figure=", "--output="]
    argv = ["plan", "--config=configs/paper_27b.py", *given]
    print(f"case {number}", flush=True)
    try:
        plan.main(command_line._parse_flags(argv)[:1])
    except SystemExit as end:
        print(end.code, flush=True)
