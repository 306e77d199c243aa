"""What a training step costs, beside others; see :mod:`benchmarks.step`."""
