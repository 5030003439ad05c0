"""Triton kernels, one concern a file. Importing this package compiles nothing and needs neither triton nor a GPU."""
