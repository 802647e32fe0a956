"""Results in Weights & Biases: sent while training goes on, laid out in a workspace, and brought back for the gate."""
