"""Eight host devices, so that sharded tests run in the same process as the others.

Arrays still live on the first device unless a test says otherwise.
"""

import os

import jax

# XLA has a thread a core, and a device that waits for the others in a collective keeps
# one. With several steps in flight, eight devices on a few cores wait for ever.
os.environ.setdefault("NPROC", "32")

jax.config.update("jax_num_cpu_devices", 8)
