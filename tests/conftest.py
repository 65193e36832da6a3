"""What pytest leaves alone: what needs packages that the environment does not have."""

collect_ignore = ["emulation", "fuzz"]
