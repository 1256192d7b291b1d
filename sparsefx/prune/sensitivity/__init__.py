"""What each layer, and the model, can bear: errors and metrics over patterns, knees, budgets."""
