"""Gain magnitudes of models and runs, and the paper's figures of them.

    from mhc_jax import analysis

    gains = {"mHC": analysis.gains_of(model, tokens), "HC": analysis.gains_of_run("runs/hc")}
    analysis.plot_gains(gains)

| function | what it gives |
|---|---|
| `gains_of(model, inputs)` | gains of any model with connections of this package, on these inputs |
| `gains_of_run(workdir)` | those of a training |
| `static_gains(parameters)` | those of the static part, from parameters alone |
| `gain_magnitudes(h_res)` | those of mappings from anywhere, [L, ..., n, n] |
| `plot_gains`, `heat_maps`, `collapse`, `spread` | figures of {name: gains} |
| `loss_gap` | figure of {name: workdir} |

`docs/analysis.md` has an example of each. matplotlib is imported by the figures alone.
"""

from mhc_jax.gains import GainMagnitudes, gain_magnitudes
from mhc_jax.lazy import attach

# Imported on first use: connections import this package, and figures need matplotlib.
_LAZY = {
    "collapse": "mixing",
    "gains_of": "measure",
    "gains_of_run": "measure",
    "heat_maps": "plots",
    "loss_gap": "losses",
    "plot_gains": "plots",
    "spread": "mixing",
    "static_gains": "static",
}

__all__ = ["GainMagnitudes", "gain_magnitudes", *_LAZY]

__getattr__, __dir__ = attach(
    __name__, {name: f"{__name__}.{file}" for name, file in _LAZY.items()}
)
