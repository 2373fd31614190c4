"""Programs around the torch-free CPU kernels, and how the tests build them."""
