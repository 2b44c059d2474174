"""The kinds of measurement that `qquant profile` knows, one module each (see `parts.base`)."""
