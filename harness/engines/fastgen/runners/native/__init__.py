"""The forward pass in C++ for CPUs with AVX-512: sources, their compilation and their interface."""
