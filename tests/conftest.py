"""Eight host devices, so that sharded tests run in the same process as the others.

Arrays still live on the first device unless a test says otherwise.
"""

import jax

jax.config.update("jax_num_cpu_devices", 8)
