"""Training of SAEs: kernels, objectives, the stream of activations, the loop."""
