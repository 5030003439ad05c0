"""What our packages keep for the life of a process: sizes of their caches, and kernels that Triton has compiled."""

import functools
import sys


def cache_sizes() -> dict[str, int]:
    """Entries of each ``functools`` cache, and variants of each Triton kernel, by name."""
    sizes = {}
    for name, module in list(sys.modules.items()):
        if not name.startswith(("quartet_kernels", "lightning_quartet")):
            continue
        for attribute, value in vars(module).items():
            if isinstance(value, functools._lru_cache_wrapper):
                sizes[f"{name}.{attribute}"] = value.cache_info().currsize
            elif hasattr(value, "device_caches"):  # a triton.JITFunction; in the interpreter there are none
                sizes[f"{name}.{attribute}"] = sum(len(cache[0]) for cache in value.device_caches.values())
    return sizes
