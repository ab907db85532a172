"""The same logits sooner: packed weights, few bits, CUDA graphs, Triton, several devices.

Nothing here changes a result."""
