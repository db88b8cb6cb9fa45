"""chaosd: the pre-forking daemon and its pool of shells."""
