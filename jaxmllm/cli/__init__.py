"""The command line: one module per command. A command parses, calls the library and prints what it returns."""
