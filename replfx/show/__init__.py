"""Looking at models: drawings, comparisons, models by name."""
