"""How good a model or a text is: bounds, judges, metrics, tasks."""
