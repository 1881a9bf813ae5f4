"""Test tools of the kernels. They are in a clone, not in the wheel."""
