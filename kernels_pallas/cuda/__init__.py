"""What the CUDA kernels share, and their emulation on a CPU."""
