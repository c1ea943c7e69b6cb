"""The only files that see a command line. Verbs import libraries, never each other."""
