"""Sizes of scratch memory and caches: one place for the numbers that trade memory for time.

None of them changes a result: the same bits come out whatever they are. Elements are numbers of a tensor, whatever its
precision; bytes are bytes.
"""

from __future__ import annotations

# Updates: elements of ĝ, or of its transform, that are computed at a time. The temporaries take a few megabytes.
UPDATE_ELEMENTS = 1 << 18
# Replay of one tensor: elements a thread that go through all steps together, a megabyte in single precision, as a
# core's own cache holds. An accelerator takes more, for there a launch costs more than a trip to memory.
REPLAY_ELEMENTS = 1 << 18
DEVICE_REPLAY_ELEMENTS = 1 << 24
# Values from before a step, kept until it is whole: weights and states that take more are not copied.
UNDO_BYTES = 16 << 20
# Columns of a tensor in shards: runs of at least so many numbers are computed one by one, shorter ones as whole rows.
RUN_ELEMENTS = 1 << 16
# Passes over weights for a statistic (a magnitude threshold, a root mean square): elements read at a time.
STATISTIC_ELEMENTS = 1 << 20
# Thin factors of low-rank directions that are drawn in one allocation: at most 4 MiB in single precision.
FACTOR_ELEMENTS = 1 << 20

# A perturbed piece of a linear layer on a CPU: 12 MiB in single precision. Products of few rows are slow, and the
# scratch of both ends of a probe has to stay in the heap from step to step (`zotune.system.malloc`).
PERTURBED_ELEMENTS = 3 << 20
# On other devices whole matrices except the largest, for many small products leave a GPU idle.
DEVICE_PERTURBED_ELEMENTS = 1 << 26
# Perturbed tensors are cached for one pass where all of them together take at most this many bytes.
CACHED_BYTES = 16 << 20

# One direction an example: copies of tuned tensors, of which dense directions need one a direction, take at most this.
EXAMPLE_BYTES = 256 << 20

# Forward gradient: elements of a piece of a matrix's tangent, logits per slice of the loss, attention scores at a time.
TANGENT_ELEMENTS = 3 << 20
LOGIT_ELEMENTS = 1 << 20
SCORE_ELEMENTS = 1 << 20
