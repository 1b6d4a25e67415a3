"""One matrix: quantised as a composition, decoded where it is used, laid out for kernels."""
