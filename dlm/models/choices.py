"""Names of the choices that a model offers: attention kernels, number types, grids. No torch here: help lists them."""

import math

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
FLOATS = ("float32", "bfloat16", "float16")
EIGHT_BITS = ("int8", "fp8")  # the keys of `kernels.linear.QUANTIZED`
DTYPES = ("auto", *FLOATS, *EIGHT_BITS)
FLOAT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "no": "float32"}


def float_name(name: str) -> str:
    """The one name of a number type: `fp32` and `no` (Accelerate's) are float32; other names come back as they are."""
    return FLOAT_NAMES.get(name, name)


def check_grid(grid_width: int, n_heads: int) -> None:
    """Raises ValueError where a row of `grid_width` tokens is not a label and the cells of whole boxes, or the heads
    cannot take the four views in turn."""
    if grid_width < 5 or math.isqrt(grid_width - 1) ** 2 != grid_width - 1:
        raise ValueError(
            f"config field grid_width={grid_width}: a row is a label and a square number of cells, such as 10 or 5"
        )
    if n_heads % 4:
        raise ValueError(
            f"config has grid_width={grid_width} and n_heads={n_heads}: heads see row, column, box and everything in "
            "turn, so give a multiple of 4"
        )
