"""The scheme in each framework's own words, one file a framework, which alone imports that framework."""
