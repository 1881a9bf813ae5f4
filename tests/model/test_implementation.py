"""`model.implementation`: None, a name, or names by operation; as a flag, in JSON and in a model."""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import pytest
from absl import flags
from flax import nnx
from ml_collections import config_flags

from configs import default
from mhc_jax.config import conflicts, from_dict, from_workdir
from mhc_jax.connections import ManifoldHyperConnections

BY_OP = "read=cuda,boundary=cuda,post_res=triton"


def parse(monkeypatch, *arguments):
    values = flags.FlagValues()
    monkeypatch.setattr(sys, "argv", ["main", *arguments])  # ml_collections reads it
    config = config_flags.DEFINE_config_dict("config", default.get_config(), flag_values=values)
    values(["main", *arguments])
    return config.value


@pytest.mark.parametrize("name", [None, "xla", "pallas", "triton", BY_OP])
def test_command_line_and_json_hold_it(monkeypatch, name):
    given = parse(monkeypatch, *([] if name is None else [f"--config.model.implementation={name}"]))
    config = from_dict(given)
    assert config.model.implementation == name
    # "triton" and the others in a config.json from before there was "cuda", too.
    assert from_workdir(json.loads(json.dumps(dataclasses.asdict(config)))) == config


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rocm", "model.implementation='rocm' is unknown"),
        ("boundary:cuda", "names by operation as in 'boundary=cuda,sinkhorn=triton'"),
        ("sinkhorn=cuda", "sinkhorn has no 'cuda' kernel, it has xla, pallas, triton"),
        ("cuda", "name the operations that have: 'read=cuda,boundary=cuda,"),
    ],
)
def test_what_it_cannot_be(name, message):
    values = default.get_config()
    values.model.implementation = name
    with pytest.raises(ValueError, match=message):
        from_dict(values)


def test_a_run_may_be_resumed_with_another():
    there, now = ({"model": {"implementation": name, "n": 4}} for name in ("triton", BY_OP))
    assert not conflicts(there, now)
    assert conflicts(there, {"model": {"implementation": "triton", "n": 2}})


def test_a_connection_passes_it_to_each_of_its_operations():
    def lower(implementation):
        connection = ManifoldHyperConnections(16, 4, implementation=implementation)
        graph, params = nnx.split(connection)

        def step(params, x):
            return nnx.merge(graph, params)(x, lambda u: 2 * u)

        return jax.jit(step).lower(params, jnp.ones((3, 64)))

    lower("read=xla,post_res=xla,boundary=pallas")  # a connection on its own has no boundary
    for op, there in (("read", "read"), ("post_res", "post_res")):
        with pytest.raises(NotImplementedError, match=f"{there}: implementation='pallas' needs"):
            lower(f"{op}=pallas")
