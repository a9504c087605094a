"""Models whose weights do not all lie on one device, or in one process: which module, layer or slice lies where.

Start with `device_map`, which says where each module lies (`devices`: whether a device is here); `layers` loads a model
by it and streams the layers that lie on a disk. `sharded` cuts a model over the processes that torchrun started, by
FSDP2 or by one of the `plans`.
"""
