"""Training of the shipped model `tiny`."""
