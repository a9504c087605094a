"""What the core knows of a model: its tuned tensors, its layers, and where a forward pass reads them.

Read `parameters` (names and ids of the tuned tensors) and `tuned_tensor` (one of them), then `intercept` (the one place
where probes and tangents enter a model). `layers` finds the stack of layers, `matmul` takes products, `eager_mode`
suspends compiled code. `streaming` brings the layers of a model that is larger than memory in from a file, `transfer`
to a device.
"""
