"""How the halves compute: precision, recorded and fused kernels, optimizers."""
