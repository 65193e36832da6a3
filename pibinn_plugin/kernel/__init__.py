"""Products with packed bits: `native`, the kernel built from ``csrc/``, which `pibinn_plugin.functional` calls."""
