"""Names of the choices in reading data. No torch here: help lists them."""

OVERLONG = ("truncate", "skip")  # what happens to an example that is longer than the limit
