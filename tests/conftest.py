"""What pytest leaves alone: the fuzzer, which needs a package that the environment does not have."""

collect_ignore = ["fuzz"]
