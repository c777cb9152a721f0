"""Tests of the mix kernels."""
