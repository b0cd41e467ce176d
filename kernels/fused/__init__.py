"""Kernels for GPUs in Triton: ``jit`` holds what Triton compiles, the files here what launches it.

Nothing here is imported where no GPU is used: only ``kernels.dispatch`` says when one is.
"""
