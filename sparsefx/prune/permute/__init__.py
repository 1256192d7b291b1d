"""Channel permutations: orders of input channels under which N:M keeps more of a weight."""
