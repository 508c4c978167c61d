"""Independent references for the tests: the formulas of the papers in a few lines of torch or numpy, in float64."""
