"""The fused ops, one a file: schema, PyTorch reference, fake kernel and autograd Functions."""
