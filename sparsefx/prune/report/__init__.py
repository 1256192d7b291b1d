"""What pruning did to each layer, as text, JSON and HTML."""
