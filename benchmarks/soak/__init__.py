"""The long forms of the tests of what the README promises; the short forms are in tests/."""
