"""The command `nv-embed`: a file for each of its subcommands, which `__main__` lists."""
