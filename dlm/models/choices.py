"""Names of the choices that a model offers: attention kernels and number types. No torch here: help lists them."""

ATTENTION = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
FLOATS = ("float32", "bfloat16", "float16")
EIGHT_BITS = ("int8", "fp8")  # the keys of `kernels.linear.QUANTIZED`
DTYPES = ("auto", *FLOATS, *EIGHT_BITS)
