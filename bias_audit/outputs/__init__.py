"""What the gate found, for each who reads it: a person, a program, a pull request, a CI server."""
