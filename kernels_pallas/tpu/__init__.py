"""What the kernels for TPUs share: the call, arithmetic inside of kernels, tiles of tokens."""
