"""One of the two processes of `compare`: does in its checkout what it is asked, one line of JSON at a time.

A request is `{"do": "time", "mode": "boundary", "count": 5}`, its answer a line "@" and `{"ok": ...}` or
`{"error": ...}`. `compare` starts this file by its path, with the checkout as folder and first in PYTHONPATH:
an older checkout has no such file. Clock and profiler come from beside this file and the chains from AFTER,
so that the same programs measure both checkouts; operations and all else are the checkout's own.
"""

import concurrent.futures
import functools
import importlib.util
import json
import pathlib
import statistics
import sys
import traceback
from types import ModuleType
from typing import Any

import jax

HERE = pathlib.Path(__file__).parent
STEPS = 4  # runs of the chain in a trace
THREADS = 4  # that compile
# T, C, n of --check: one token, odd numbers of tokens, widths with different tiles.
CHECKED = ((1, 1280, 4), (37, 128, 4), (129, 1920, 4), (1000, 1536, 4), (512, 2560, 4))


def _load(path: pathlib.Path) -> ModuleType:
    """Imports a file that belongs to another checkout than `import` would find."""
    spec = importlib.util.spec_from_file_location(f"compare_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # a dataclass of it looks there
    spec.loader.exec_module(module)
    return module


class Worker:
    """Programs of one shape, compiled once and measured as often as asked; each method answers a request."""

    def __init__(self, chains: pathlib.Path):
        """`chains` is the cases.py of AFTER: that of an older checkout has fewer modes."""
        self._chains = chains
        self._measure = _load(HERE / "measure.py")
        self._programs = {}  # (mode, sublayers) -> compiled program and its inputs

    def environment(self) -> dict[str, Any]:
        import kernels_pallas
        from experiments import record

        if not pathlib.Path(kernels_pallas.__file__).resolve().is_relative_to(pathlib.Path.cwd()):
            raise ImportError(f"imports {kernels_pallas.__file__}, which is of another checkout")
        return record.environment()

    def copy_rate(self) -> float:
        return self._measure.copy_rate()

    def prepare(self, T: int, C: int, modes: list[str], count: int) -> int:
        """Compiles a chain of one and one of `count` sublayers for each mode; forgets those of before."""
        self._programs.clear()
        jobs = [(mode, length) for mode in modes for length in (count, 1)]
        # Tracing begins to compile Triton's kernels in other threads. Lowering is no work for threads.
        traced = [self._traced(*job, T, C) for job in jobs]
        lowered = [step.lower() for step, _ in traced]
        with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
            compiled = list(pool.map(lambda step: step.compile(), lowered))
        for job, program, (_, inputs) in zip(jobs, compiled, traced):
            self._programs[job] = program, inputs
        return len(jobs)

    def _traced(self, mode: str, length: int, T: int, C: int):
        chains = sys.modules.get(f"compare_{self._chains.stem}") or _load(self._chains)
        make = functools.partial(chains.sublayer_inputs, length, mode)
        inputs = self._measure.inputs_beyond_l2(lambda key: make(key, T, C), 36 * T * C, 1)
        step = functools.partial(chains.sublayers, None, length, mode)
        return jax.jit(lambda arrays: step(*arrays)).trace(inputs[0]), inputs

    def time(self, mode: str, count: int) -> dict[str, float]:
        """Returns the microseconds of the chain, of the first sublayer, and of one more."""
        pair = (self._programs[mode, length] for length in (count, 1))
        chain, first = (1e6 * self._measure.seconds_a_call(*program) for program in pair)
        return {"chain_us": chain, "first_us": first, "one_us": (chain - first) / (count - 1)}

    def trace(self, mode: str, count: int) -> dict[str, list[float]]:
        """Returns kernel -> its runs in the chain, the median and the sum of their microseconds."""
        profile = _load(HERE.parent / "model_speed" / "profile.py")
        program, inputs = self._programs[mode, count]
        jax.block_until_ready(program(inputs[0]))

        def run():
            for i in range(STEPS):
                jax.block_until_ready(program(inputs[i % len(inputs)]))

        times = {}
        for event in profile.record(run)[1]:
            times.setdefault(event.kernel, []).append(event.end - event.start)
        return {
            kernel: [len(us) / STEPS, statistics.median(us), sum(us) / STEPS]
            for kernel, us in times.items()
        }

    def check(self, operations: list[str]) -> bool:
        """Compares the CUDA kernels of these operations with the float64 oracle; False: some leaf is off."""
        from experiments.kernel_speed import check

        cases = check.cases(shapes=CHECKED, wide=(), dtypes=(check.BF16,))
        cases = [case for case in cases if case.op in operations]
        cases = [case for case in cases if "cuda" in check.implementations(case)]
        if not cases:
            raise ValueError(f"no CUDA kernel here for {' '.join(operations)}")
        return bool(check.run(tuple(cases), choose=lambda case: ("cuda",)))


def main() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what is printed must not look like an answer
    worker = Worker(pathlib.Path(sys.argv[1]))
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = {"ok": getattr(worker, request.pop("do"))(**request)}
        except Exception as error:  # told where the command was typed, which ends with it
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(f"@{json.dumps(answer)}\n")
        answers.flush()


if __name__ == "__main__":
    main()
