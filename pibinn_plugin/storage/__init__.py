"""The packed file: what is in it, where its bytes are, and how it is written and read."""
