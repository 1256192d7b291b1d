"""Thresholds and masks decided from data: observers of a graph run, and who drives them."""
