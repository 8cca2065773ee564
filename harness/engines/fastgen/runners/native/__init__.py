"""The forward pass in C++ for CPUs with AVX-512 or AVX2: sources, their compilation and their interface."""
