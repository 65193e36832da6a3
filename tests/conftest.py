"""What pytest leaves alone: what is run by hand."""

collect_ignore = ["emulation", "fuzz", "mutations"]
