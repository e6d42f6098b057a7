"""The commands of `dcnv4`, a module each: `add_arguments(parser)` and `run(args)`."""
