"""What the kernels for GPUs share: launches, facts of the device, arithmetic inside of kernels."""
