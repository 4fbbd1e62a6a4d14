"""What was found, and what was done: values and their text."""
