"""Names of the choices in reading data. No torch here: help lists them."""

OVERLONG = ("truncate", "skip")  # what happens to an example that is longer than the limit
ON_BAD_ROW = ("stop", "skip")  # what happens at a row that cannot be used
