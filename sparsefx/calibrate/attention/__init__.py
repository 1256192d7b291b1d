"""Thresholds of attention, decided from data: what would be skipped, and under which budget."""
