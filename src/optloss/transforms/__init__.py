"""One feature a file, each an ``optax.GradientTransformation`` that works alone."""
