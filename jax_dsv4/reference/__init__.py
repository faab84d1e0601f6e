"""Every operation in plain jnp: the definitions that the compiled kernels are held to."""
