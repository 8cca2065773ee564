"""The forward pass in C++ for CPUs with AVX2, AVX-512 or AMX: sources, their compilation and their interface."""
