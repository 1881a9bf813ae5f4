"""Counts FLOPs of the instructions that multiply: convolutions, dots, attention kernels."""

import math
import re

from experiments.pod_plan.text import Instruction, arrays


def convolution_flops(instruction: Instruction, lhs: str, rhs: str) -> float:
    """Returns 2 x the products of a convolution, without padding and holes: TPUs write every dot as one."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", instruction.attributes)
    [(_, left, _)], [(_, right, _)] = arrays(lhs)[:1], arrays(rhs)[:1]
    [(_, out, _)] = arrays(instruction.type)[:1]
    window = re.search(r"window=\{([^}]*)\}", instruction.attributes)
    window = dict(item.split("=") for item in window[1].split()) if window else {}
    spatial = sorted(label for label in labels[2] if label.isdigit())

    def per_dimension(name, default):
        values = window.get(name)
        return values.split("x") if values else [default] * len(spatial)

    valid = 1
    for d, size, stride, pad, left_holes, right_holes in zip(
        spatial,
        *(
            per_dimension(*item)
            for item in (
                ("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1"), ("rhs_dilate", "1")
            )
        ),
    ):  # fmt: skip
        size, stride, left_holes, right_holes = map(int, (size, stride, left_holes, right_holes))
        extent, low = left[labels[1].index(d)], int(pad.split("_")[0])
        count = 0
        for o in range(out[labels[3].index(d)]):
            first = o * stride - low
            positions = (first + k * right_holes for k in range(size))
            count += sum(
                0 <= p <= (extent - 1) * left_holes and p % left_holes == 0 for p in positions
            )
        valid *= count
    groups = re.search(r"batch_group_count=(\d+)", instruction.attributes)
    return (
        2.0 * valid * right[labels[2].index("i")] * right[labels[2].index("o")]
        * left[labels[1].index("b")] / (int(groups[1]) if groups else 1)
    )  # fmt: skip


def attention_flops(instruction: Instruction, operands: list[str]) -> float:
    """Returns FLOPs of a splash attention kernel, which reports none; half the pairs are masked.

    With queries and keys D wide and values Dv, each pair costs D + Dv products forward, 2 D + Dv for the
    gradient of q, 2 D + 2 Dv for those of k and v.
    """
    shapes = [shape for type_ in operands for _, shape, _ in arrays(type_) if len(shape) >= 3]
    queries, _, values = [shape for shape in shapes if len(shape) == max(map(len, shapes))][:3]
    length, width, value_width = queries[-2], queries[-1], values[-1]
    products = {
        "fwd": width + value_width,
        "dq_": 2 * width + value_width,
        "dkv": 2 * width + 2 * value_width,
    }
    [per_pair] = [n for kind, n in products.items() if f"_{kind}" in f"{instruction.name}_"]
    return 2.0 * math.prod(queries[:-2]) * length**2 / 2 * per_pair
