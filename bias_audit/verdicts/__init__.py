"""What the evidence says of each region and attribute, and whether a policy's rules hold."""
