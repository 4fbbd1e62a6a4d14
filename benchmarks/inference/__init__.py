"""What a trained model costs to run: transformed, materialized, compiled and in INT8."""
