"""One process of `experiments.start_up`: trains four steps and writes what took how long."""

import gc

if __name__ == "__main__":
    gc.disable()  # as `mhc_jax.main` does

import contextlib
import functools
import importlib
import json
import logging
import os
import pathlib
import threading
import time
import warnings

import jax
from jax import monitoring

from experiments import cli
from kernels_pallas.gpu import ahead, cuda_launch
from mhc_jax import compilation_cache, preemption
from mhc_jax.config import from_dict

# Headings of the table. XLA's are sums over programs that are compiled at the same time.
COLUMNS = {
    "first_step": "first step",
    "imports": "imports, devices",
    "run": "data, state",
    "read": "reading programs",
    "trace": "tracing",
    "lower": "lowering",
    "kernels": "kernels",
    "wait": "waiting for XLA",
    "xla": "XLA, all programs",
    "first_batch": "first batch",
    "step": "step",
    "evaluation": "first evaluation",
    "evaluation_again": "next",
    "gains": "first gains",
    "gains_again": "next",
    "kept": "from jax's cache",
    "whole": "found whole",
}
STEPS = 4
_TRACE = "/jax/core/compile/jaxpr_trace_duration"
_LOWER = "/jax/core/compile/jaxpr_to_mlir_module_duration"
_XLA = "/jax/core/compile/backend_compile_duration"


class _Done(Exception):
    """Everything has been measured."""


class Spans:
    """Adds up seconds by name. What lies inside of a span of the same name and thread counts once."""

    def __init__(self):
        self._spans: dict[str, dict[int, list[tuple[float, float]]]] = {}

    def ended(self, name: str, seconds: float) -> None:
        """A span of `seconds` has just ended."""
        now = time.perf_counter()
        own = self._spans.setdefault(name, {}).setdefault(threading.get_ident(), [])
        while own and own[-1][0] >= now - seconds:
            own.pop()
        own.append((now - seconds, now))

    def seconds(self, name: str) -> float:
        """Their sum over all threads."""
        return sum(b - a for own in self._spans.get(name, {}).values() for a, b in own)

    def timed(self, name: str, function):
        """Returns `function` whose calls are spans."""

        @functools.wraps(function)
        def call(*args, **kwargs):
            begin = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.ended(name, time.perf_counter() - begin)

        return call


class CacheLog(logging.Handler):
    """Collects which programs jax's persistent cache had."""

    def __init__(self):
        super().__init__(logging.DEBUG)
        self.hit, self.missed = [], []
        logger = logging.getLogger("jax._src.compiler")
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        said = record.getMessage()
        found = self.hit if "cache hit" in said else self.missed if "CACHE MISS" in said else None
        if found is not None:
            found.append(said.split("'")[1])


class Said(logging.Handler):
    """Collects what is said of programs that are kept whole."""

    def __init__(self):
        super().__init__(logging.INFO)
        self.lines = []
        logger = logging.getLogger("mhc_jax.kept_programs")
        logger.setLevel(logging.INFO)
        logger.addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage()[:300])


def make_config(name: str, arm: str, settings: list[str]):
    """A config of `configs/` that evaluates after every other step."""
    module = importlib.import_module(f"configs.{name}")
    try:
        values = module.get_config(arm)
    except TypeError:  # a config without arms
        values = module.get_config()
        values.model.connection = arm
    values.eval_every, values.gains_every, values.eval_batches = 2, 2, 2
    values.checkpoint_every, values.tensorboard = 0, False
    numbers = dict(setting.split("=") for setting in settings)
    values.update_from_flattened_dict({name: int(number) for name, number in numbers.items()})
    return from_dict(values)


def time_kernels(spans: Spans) -> None:
    """Times NVRTC and the waiting for Triton, which compiles in other threads."""
    cuda_launch._compile = spans.timed("kernels", cuda_launch._compile)
    ahead.wait = spans.timed("kernels", ahead.wait)


def start(began: float) -> float:
    """Starts as `mhc_jax.main` does: imports while devices start. Returns the seconds since `began`."""
    imports = preemption.Background(
        functools.partial(importlib.import_module, "mhc_jax.train"), "importing"
    )
    jax.devices()
    imports.result()
    gc.freeze()
    gc.enable()
    return time.time() - began


def main() -> None:
    parser = cli.Parser(prog="python -m experiments.start_up.run", description=__doc__)
    for name in ("config", "arm", "workdir", "output"):
        parser.add_argument(name)
    parser.add_argument("settings", nargs="*")
    options = parser.parse_args()
    config = make_config(options.config, options.arm, options.settings)
    began = float(os.environ["START_UP_BEGAN"])
    found, spans, kept = {"imports": start(began)}, Spans(), CacheLog()
    said = Said()
    from mhc_jax.programs import Programs
    from mhc_jax.train import Run

    names = {_TRACE: "trace", _LOWER: "lower", _XLA: "xla"}
    monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: spans.ended(names.get(event, event), seconds)
    )
    time_kernels(spans)
    Programs.wait = spans.timed("wait", Programs.wait)
    Programs.look_up = spans.timed("read", Programs.look_up)
    compilation_cache.use()
    begin = time.perf_counter()
    with warnings.catch_warnings(record=True) as warned, preemption.stop_signals() as stop:
        warnings.simplefilter("always")
        workdir = pathlib.Path(options.workdir) / "run"
        run = Run(config, workdir, programs=compilation_cache.programs())
        inside = sum(spans.seconds(name) for name in ("trace", "lower", "wait", "read"))
        found["run"] = time.perf_counter() - begin - inside
        run.data = _Timed(run.data, spans)
        run._evaluate = spans.timed("evaluations", run._evaluate)
        run._log_gains = spans.timed("all_gains", run._log_gains)
        steps = []

        def after(step):
            jax.block_until_ready(run.state)
            steps.append((time.time(), spans.seconds("evaluations"), spans.seconds("all_gains")))
            if step == 1:
                for name in ("trace", "lower", "kernels", "wait", "xla", "first_batch", "read"):
                    found[name] = spans.seconds(name)
            if step == STEPS:
                raise _Done
            return stop(step)

        with contextlib.suppress(_Done):
            run.loop(after, "start_up")
        run.close()
    run._programs._pool.shutdown()  # all is written
    found["said"] = said.lines
    found["first_step"] = steps[0][0] - began
    found["step"] = steps[2][0] - steps[1][0]
    found["evaluation"], found["evaluation_again"] = steps[1][1], steps[3][1] - steps[1][1]
    found["gains"], found["gains_again"] = steps[1][2], steps[3][2] - steps[1][2]
    found["kept"] = f"{len(kept.hit)} of {len(kept.hit) + len(kept.missed)}"
    found["hit"], found["missed"] = kept.hit, kept.missed
    started = run._programs._futures
    found["whole"] = f"{len(started) - len(run._programs._lowered)} of {len(started)}"
    found["warnings"] = sorted({str(w.message)[:300] for w in warned})
    found["xla_by_the_end"] = spans.seconds("xla")
    pathlib.Path(options.output).write_text(json.dumps(found))


class _Timed:
    """An iterator whose first `next` is timed."""

    def __init__(self, iterator, spans: Spans):
        self._iterator, self._spans, self._timed = iterator, spans, False

    def __next__(self):
        if self._timed:
            return next(self._iterator)
        self._timed = True
        return self._spans.timed("first_batch", next)(self._iterator)

    def __getattr__(self, name):
        return getattr(self._iterator, name)


if __name__ == "__main__":
    cli.run(main)
