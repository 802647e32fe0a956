"""Getting regions cheaply: they are proposed by detectors, checked, chosen, and handed to the editors people have."""
