"""The images that are audited: what they are, where they are read from, and generated ones."""
