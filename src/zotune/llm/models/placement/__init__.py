"""Models whose weights do not all lie on one device: which module lies where, and layers that are streamed.

Start with `device_map`, which says where each module lies; `layers` loads a model by it, and `room` checks that the
disk holds what a run writes there.
"""
