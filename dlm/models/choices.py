"""Names of the choices that a model offers: attention kernels and number types. No torch here: help lists them."""

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
FLOATS = ("float32", "bfloat16", "float16")
EIGHT_BITS = ("int8", "fp8")  # the keys of `kernels.linear.QUANTIZED`
DTYPES = ("auto", *FLOATS, *EIGHT_BITS)
FLOAT_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "no": "float32"}


def float_name(name: str) -> str:
    """The one name of a number type: `fp32` and `no` (Accelerate's) are float32; other names come back as they are."""
    return FLOAT_NAMES.get(name, name)
