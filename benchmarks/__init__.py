"""Benchmarks of varmeta's meta-gradients; README.md here says how to run them."""
