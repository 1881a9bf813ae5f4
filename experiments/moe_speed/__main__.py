"""How near does the MoE layer come to dense matmuls of the same FLOPs, forward and backward?

Command:  python -m experiments.moe_speed                  (one GPU with 60 GiB free; about 1 minute)
Result:   a table of milliseconds and of the share of the dense rate, also as JSON with --output or --record.

The layer of the paper's 27B model on 16384 tokens: width 2560, 72 experts of width 1536, 6 a token and 2
shared; bfloat16 products, float32 parameters and gradients, router and casts included. FLOPs count the
active experts' matrices, 3 x 6 C F for each of a token's 8. Routing comes from random weights.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from configs import default
from experiments import cli, output, timing
from mhc_jax.config import ModelConfig, from_dict
from mhc_jax.moe import MoE, dispatch, router
from mhc_jax.moe.experts import ExpertWeights, expert_ffn
from mhc_jax.moe.grouped_matmul import grouped_matmul
from mhc_jax.moe.parallel import capacity, choose_dispatch


def parse_arguments() -> argparse.Namespace:
    parser = cli.Parser(
        prog="python -m experiments.moe_speed",
        description=__doc__,
        small="--tokens 256 --sequence_length 64 --width 64 --expert_width 64",
    )
    parser.add_argument(
        "--tokens", type=cli.positive, default=16384, help="in sequences of --sequence_length"
    )
    parser.add_argument("--sequence_length", type=cli.positive, default=4096)
    parser.add_argument("--width", type=cli.positive, default=2560, help="C")
    parser.add_argument("--num_experts", type=cli.positive, default=72)
    parser.add_argument("--experts_per_token", type=cli.positive, default=6)
    parser.add_argument("--shared_experts", type=cli.count, default=2)
    parser.add_argument("--expert_width", type=cli.positive, default=1536, help="F")
    parser.add_argument("--capacity_factors", type=cli.number, nargs="*", default=[1.0, 1.25, 1.5])
    parser.add_argument(
        "--repeats", type=cli.positive, default=10, help="timed calls, after 3 others"
    )
    output.add_arguments(parser)
    options = parser.parse_args()
    if options.tokens % options.sequence_length:
        parser.error(
            f"--tokens={options.tokens} is no multiple of --sequence_length={options.sequence_length}"
        )
    if options.experts_per_token > options.num_experts:
        parser.error(
            f"--experts_per_token={options.experts_per_token} is more than "
            f"--num_experts={options.num_experts}"
        )
    return options


def time_ms(function, *args, repeats: int) -> float:
    """Returns the median milliseconds of a call that is waited for."""
    return timing.time_ms(function, *args, repeats=1, rounds=repeats, warmup=3)


def forward_backward(function):
    """Compiles (args, cotangent) -> output and the gradients of all args."""

    @jax.jit
    def both(args, cotangent):
        out, vjp = jax.vjp(function, *args)
        return out, vjp(cotangent)

    return both


def normal(seed: int, *shape, dtype=jnp.bfloat16, std=1.0) -> jax.Array:
    return (std * jax.random.normal(jax.random.key(seed), shape, jnp.float32)).astype(dtype)


def layer_config(options: argparse.Namespace, name: str, factor: float) -> ModelConfig:
    config = default.get_config()
    for field in ("width", "num_experts", "experts_per_token", "shared_experts", "expert_width"):
        config.model[field] = getattr(options, field)
    config.model.update(moe_dispatch=name, capacity_factor=factor, dtype="bfloat16", num_heads=1)
    return from_dict(config).model


def time_layer(options, name: str, factor: float, x, dy) -> dict:
    """Times the whole layer: output, gradients of all parameters and of the input."""
    config = layer_config(options, name, factor)
    graph, params, rest = nnx.split(MoE(config, rngs=nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def step(params, rest, x, dy):
        y, vjp, aux = jax.vjp(lambda p, x: nnx.merge(graph, p, rest)(x), params, x, has_aux=True)
        return y, aux, vjp(dy)

    compiled = step.lower(params, rest, x, dy).compile()
    y, aux, (_, dx) = compiled(params, rest, x, dy)
    for array in (y, dx):
        if not jnp.isfinite(array).all():
            raise RuntimeError(f"{name} {factor}: not finite")
    return {
        "ms": time_ms(compiled, params, rest, x, dy, repeats=options.repeats),
        "dropped": float(aux.dropped),
        "busiest_over_mean": float(aux.load.max() / aux.load.mean()),
        "temporaries_GiB": compiled.memory_analysis().temp_size_in_bytes / 2**30,
    }


def time_dense(options, active_width: int) -> float:
    """Times only the matmuls of a gated FFN of this width, forward and backward."""
    tokens, width = options.tokens, options.width
    x, dy = normal(1, tokens, width), normal(2, tokens, width)
    gate_up = normal(3, width, 2 * active_width)
    hidden, d_gate_up = normal(4, tokens, active_width), normal(5, tokens, 2 * active_width)
    down = normal(6, active_width, width)

    @jax.jit
    def matmuls(x, dy, gate_up, hidden, d_gate_up, down):
        forward = x @ gate_up, hidden @ down
        return forward, dy @ down.T, hidden.T @ dy, d_gate_up @ gate_up.T, x.T @ d_gate_up

    return time_ms(matmuls, x, dy, gate_up, hidden, d_gate_up, down, repeats=options.repeats)


def time_parts(options, x) -> dict[str, float]:
    """Times the parts of the layer, each by itself; router and experts forward and backward."""
    k, num_experts = options.experts_per_token, options.num_experts
    ms = functools.partial(time_ms, repeats=options.repeats)
    tokens = x.reshape(-1, options.width)
    kernel, bias = (
        normal(1, options.width, num_experts, dtype=jnp.float32, std=0.02),
        jnp.zeros(num_experts),
    )
    parts = {}

    route = forward_backward(lambda x, kernel: router.route(x, kernel, bias, k).weights)
    parts["router"] = ms(route, (tokens, kernel), jnp.ones((options.tokens, k)))
    routing = jax.jit(functools.partial(router.route, experts_per_token=k))(tokens, kernel, bias)

    limit = capacity(options.tokens, k, num_experts, 1.25)
    plans = {
        "dropless": jax.jit(lambda e: dispatch.dropless_rows(e, num_experts)),
        "capacity 1.25": jax.jit(lambda e: dispatch.capacity_rows(e, num_experts, limit)),
    }
    shapes = num_experts, options.width, options.expert_width
    columns = normal(1, *shapes, std=0.02), normal(2, *shapes, std=0.02)
    weights = ExpertWeights(*columns, normal(3, shapes[0], shapes[2], shapes[1], std=0.02))
    for name, plan in plans.items():
        parts[f"{name}: sort"] = ms(plan, routing.experts)
        rows = plan(routing.experts)

        filled = dispatch.to_rows(tokens, rows)
        # Each is the other's backward. They are timed apart, since XLA would merge the two gathers.
        parts[f"{name}: to rows"] = ms(jax.jit(dispatch.to_rows), tokens, rows)
        parts[f"{name}: to tokens"] = ms(jax.jit(dispatch.to_tokens), filled, rows)
        row_weights = dispatch.weights_to_rows(routing.weights, rows)
        if name == "dropless":
            if choose_dispatch("auto", *shapes[1:], jnp.bfloat16) != "dropless":
                continue

            def matmul(a, w, rows=rows):
                return grouped_matmul(a, w, rows.sizes)
        else:
            filled = filled.reshape(num_experts, limit, -1)
            row_weights = row_weights.reshape(num_experts, limit)
            matmul = functools.partial(jnp.einsum, "erk,ekn->ern")
        ffn = forward_backward(functools.partial(expert_ffn, matmul=matmul))
        parts[f"{name}: experts"] = ms(ffn, (filled, row_weights, weights), filled)
        del filled, row_weights
    return parts


def main() -> None:
    options = parse_arguments()
    device = jax.devices()[0]
    lead = options.tokens // options.sequence_length, options.sequence_length
    x, dy = normal(7, *lead, options.width), normal(8, *lead, options.width)
    active = options.experts_per_token + options.shared_experts
    flops = 18 * options.tokens * active * options.width * options.expert_width

    dense_ms = time_dense(options, active * options.expert_width)
    rows = [{"layer": "dense matmuls", "ms": dense_ms}]
    variants = [("capacity", factor) for factor in options.capacity_factors]
    if choose_dispatch("auto", options.width, options.expert_width, jnp.bfloat16) == "dropless":
        variants.append(("dropless", 1.0))
    for name, factor in variants:
        label = name if name == "dropless" else f"{name} {factor:g}"
        rows.append({"layer": label, **time_layer(options, name, factor, x, dy)})
    for row in rows:
        row["tflops"] = flops / row["ms"] / 1e9
        row["share_of_dense"] = dense_ms / row["ms"]

    print(
        f"{device.device_kind}, jax {jax.__version__}: forward + backward, {flops / 1e12:.2f} TFLOP"
    )
    print(
        f"{'':16}{'ms':>9}{'TFLOP/s':>9}{'of dense':>9}{'dropped':>9}{'max load':>9}{'temp GiB':>9}"
    )
    for row in rows:
        print(
            f"{row['layer']:16}{row['ms']:9.2f}{row['tflops']:9.0f}{row['share_of_dense']:9.1%}"
            + (
                f"{row['dropped']:9.2%}{row['busiest_over_mean']:9.2f}{row['temporaries_GiB']:9.2f}"
                if "dropped" in row
                else ""
            ),
            flush=True,
        )
    parts = time_parts(options, x)
    print("parts, ms (router and experts forward + backward)")
    for name, ms in parts.items():
        print(f"  {name:36}{ms:8.2f}")
    payload = {"options": output.shape_of(options), "layers": rows, "parts_ms": parts}
    output.write(options, "moe_speed", payload)


if __name__ == "__main__":
    cli.run(main)
