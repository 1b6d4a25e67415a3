"""The Triton kernels of products with packed matrices."""
